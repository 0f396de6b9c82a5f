//! The injected code and the registers it uses, on x86-64.
#![expect(unsafe_code, reason = "the injected code is assembly")]

use std::arch::global_asm;

use nix::libc;

use super::native::Registers;
use crate::{
    arch::{Entry, Return},
    units::RemoteAddr,
};

/// The instruction `syscall`.
pub const SYSCALL_INSTRUCTION: [u8; 2] = [0x0f, 0x05];

/// The instruction `syscall`, and `ret` behind it.
pub const CALL_AND_RETURN: &[u8] = &[0x0f, 0x05, 0xc3];

/// What every program has that can handle signals (`SA_RESTORER`): the instructions that
/// load the number of `rt_sigreturn(2)` and call the kernel.
pub const RESTORERS: &[&[u8]] =
    &[&[0x48, 0xc7, 0xc0, 0x0f, 0, 0, 0, 0x0f, 0x05], &[0xb8, 0x0f, 0, 0, 0, 0x0f, 0x05]];

// Walks the table of `Entry` that `rbx` points to. It needs neither a stack nor relocation.
// At its end, and where the table says so, it stops: by a trap, or if `r14` has the number
// of a signal, by sending that to itself. The process ignores this signal (see `session`),
// so that nothing happens if the thread is no longer traced. It then goes on with the
// table, and after its end home: it has the kernel unmap scratch memory (`r15`, and the
// upper half of `r14` for its length) by the instruction at `rbp`, which returns to the
// frame that is above the stack pointer.
global_asm!(
    ".pushsection .rodata.rcriu_inject, \"a\", @progbits",
    ".globl rcriu_inject_start",
    ".globl rcriu_inject_told",
    ".globl rcriu_inject_end",
    "rcriu_inject_start:",
    "20:",
    "mov rax, [rbx + {number}]",
    "cmp rax, -1",
    "je 29f",
    "cmp rax, -2",
    "je 27f",
    "mov r12, [rbx + {from_results}]",
    "lea r13, [rbx + {arguments}]",
    // Arguments that are results of earlier calls.
    "21:",
    "test r12, r12",
    "jz 23f",
    "movzx ecx, r12b",
    "test ecx, ecx",
    "jz 22f",
    "imul rcx, rcx, {size}",
    "mov rdx, rbx",
    "sub rdx, rcx",
    "mov rdx, [rdx + {result}]",
    "mov [r13], rdx",
    "22:",
    "add r13, 8",
    "shr r12, 8",
    "jmp 21b",
    "23:",
    "mov rdi, [rbx + {arguments}]",
    "mov rsi, [rbx + {arguments} + 8]",
    "mov rdx, [rbx + {arguments} + 16]",
    "mov r10, [rbx + {arguments} + 24]",
    "mov r8, [rbx + {arguments} + 32]",
    "mov r9, [rbx + {arguments} + 40]",
    "syscall",
    "mov [rbx + {result}], rax",
    "cmp rax, -4095",
    "jb 24f",
    "test qword ptr [rbx + {flags}], 1",
    "jnz 29f",
    "24:",
    "add rbx, {size}",
    "jmp 20b",
    "27:",
    "lea r13, [rip + 24b]",
    "jmp 28f",
    "29:",
    "xor r13d, r13d",
    "28:",
    "test r14, r14",
    "jz 26f",
    "mov eax, {gettid}",
    "syscall",
    "mov r12, rax",
    "mov eax, {getpid}",
    "syscall",
    "mov rdi, rax",
    "mov rsi, r12",
    "mov edx, r14d",
    "mov eax, {tgkill}",
    "syscall",
    "rcriu_inject_told:",
    "25:",
    "test r13, r13",
    "jz 30f",
    "jmp r13",
    "30:",
    "mov rdi, r15",
    "mov rsi, r14",
    "shr rsi, 32",
    "mov eax, {munmap}",
    "jmp rbp",
    "26:",
    "int3",
    "jmp 25b",
    "rcriu_inject_end:",
    ".popsection",
    number = const std::mem::offset_of!(Entry, number),
    arguments = const std::mem::offset_of!(Entry, arguments),
    result = const std::mem::offset_of!(Entry, result),
    flags = const std::mem::offset_of!(Entry, flags),
    from_results = const std::mem::offset_of!(Entry, from_results),
    size = const size_of::<Entry>(),
    gettid = const libc::SYS_gettid,
    getpid = const libc::SYS_getpid,
    tgkill = const libc::SYS_tgkill,
    munmap = const libc::SYS_munmap,
);

unsafe extern "C" {
    static rcriu_inject_start: u8;
    static rcriu_inject_told: u8;
    static rcriu_inject_end: u8;
}

/// Returns the code, which runs at any address.
pub fn code() -> &'static [u8] {
    let (start, end) = (&raw const rcriu_inject_start, &raw const rcriu_inject_end);
    // SAFETY: both are labels in one section above, the second behind the first,
    // and what is between them is never written.
    unsafe { std::slice::from_raw_parts(start, end.addr() - start.addr()) }
}

/// Returns where in the code a thread is that has sent itself its signal.
pub fn told(code: RemoteAddr) -> RemoteAddr {
    let (start, told) = (&raw const rcriu_inject_start, &raw const rcriu_inject_told);
    code.plus((told.addr() - start.addr()) as u64)
}

/// Returns the registers with which a thread walks the table at `table` and comes home.
pub fn enter_and_return(
    base: &Registers,
    code: RemoteAddr,
    table: RemoteAddr,
    home: Return,
) -> Registers {
    let mut registers = enter(base, code, table);
    registers.rsp = home.frame.0;
    registers.rbp = home.call.0;
    registers.r15 = home.scratch.0;
    registers.r14 = u64::from(home.scratch_bytes) << 32 | u64::from(home.signal.cast_unsigned());
    registers
}

/// Returns registers with which a thread begins to walk the table at `table`, and stops by
/// a trap.
/// `base` are those it had, whose segments are kept.
pub fn enter(base: &Registers, code: RemoteAddr, table: RemoteAddr) -> Registers {
    let mut registers = *base;
    registers.rip = code.0;
    registers.rbx = table.0;
    registers.r14 = 0;
    // No system call is to be restarted.
    registers.orig_rax = u64::MAX;
    registers
}

/// Returns registers with which a thread that is at the instruction `syscall`
/// makes this call.
pub fn syscall_registers(
    base: &Registers,
    instruction: RemoteAddr,
    number: libc::c_long,
    arguments: [u64; 6],
) -> Registers {
    let mut registers = *base;
    registers.rip = instruction.0;
    registers.rax = number.cast_unsigned();
    registers.orig_rax = u64::MAX;
    [registers.rdi, registers.rsi, registers.rdx, registers.r10, registers.r8, registers.r9] =
        arguments;
    registers
}

/// Returns registers with which a thread that is at [`SYSCALL_INSTRUCTION`] calls
/// `rt_sigreturn(2)` for the frame at `frame`.
pub fn sigreturn_registers(
    base: &Registers,
    instruction: RemoteAddr,
    frame: RemoteAddr,
) -> Registers {
    /// The kernel takes the first word of the frame for popped.
    const POPPED: u64 = size_of::<u64>() as u64;
    let registers = syscall_registers(base, instruction, libc::SYS_rt_sigreturn, [0; 6]);
    Registers { rsp: frame.plus(POPPED).0, ..registers }
}

/// Returns registers with which a thread that has stopped on entering a system call makes
/// this one instead.
pub fn exchanged_call(
    entered: &Registers,
    stack: RemoteAddr,
    number: libc::c_long,
    arguments: [u64; 6],
) -> Registers {
    let mut registers = *entered;
    registers.orig_rax = number.cast_unsigned();
    registers.rsp = stack.0;
    [registers.rdi, registers.rsi, registers.rdx, registers.r10, registers.r8, registers.r9] =
        arguments;
    registers
}

/// Results that mean that the kernel will restart an interrupted call
/// (`include/linux/errno.h`).
const ERESTARTSYS: i64 = -512;
const ERESTARTNOINTR: i64 = -513;
const ERESTARTNOHAND: i64 = -514;
const ERESTART_RESTARTBLOCK: i64 = -516;

/// Calls that the kernel continues through `restart_syscall(2)`, since they have
/// relative timeouts.
const CONTINUED: [i64; 4] =
    [libc::SYS_poll, libc::SYS_nanosleep, libc::SYS_futex, libc::SYS_clock_nanosleep];

/// Returns the registers of a thread that stopped for this program alone so that a call
/// without a timeout goes on, which the kernel would let fail with `EINTR` although no
/// handler was run. If one is run now, the call fails all the same.
///
/// A timeout would begin anew each time: a program that is dumped more often than that
/// would wait for ever. Such calls are left as they are.
pub fn mended(stopped: &Registers) -> Option<Registers> {
    /// `timeout` of `epoll_wait(2)`, of which the kernel takes the lower half.
    const FOR_EVER: i32 = -1;
    if stopped.rax.cast_signed() != i64::from(-libc::EINTR) {
        return None;
    }
    let timeout = stopped.r10 & u64::from(u32::MAX);
    let untimed = match stopped.orig_rax.cast_signed() {
        libc::SYS_semop => true,
        libc::SYS_semtimedop | libc::SYS_epoll_pwait2 => stopped.r10 == 0,
        libc::SYS_rt_sigtimedwait => stopped.rdx == 0,
        libc::SYS_epoll_wait | libc::SYS_epoll_pwait => {
            timeout == u64::from(FOR_EVER.cast_unsigned())
        }
        _ => false,
    };
    untimed.then(|| Registers { rax: ERESTARTNOHAND.cast_unsigned(), ..*stopped })
}

/// Bytes of `mov eax, NUMBER; syscall`.
pub const CALL_BYTES: usize = 7;

/// Returns the registers with which a thread that was stopped goes on elsewhere:
/// if a system call was interrupted, it is made again, as the kernel would have
/// seen to. `code` is what stands before the instruction pointer.
///
/// A call that the kernel would have continued from where it was (one with a
/// relative timeout) is begun again; `nanosleep(2)` and `clock_nanosleep(2)` go on
/// with the time that was left where the program has room for that. If such a call
/// had been continued before, the kernel has forgotten its number: it is taken from
/// the instruction that loaded it, and where there is none, the call fails with
/// `EINTR`.
pub fn restart(stopped: &Registers, code: Option<[u8; CALL_BYTES]>) -> Registers {
    let mut registers = *stopped;
    let mut number = registers.orig_rax.cast_signed();
    registers.orig_rax = u64::MAX;
    if number < 0 {
        return registers;
    }
    match registers.rax.cast_signed() {
        ERESTARTSYS | ERESTARTNOINTR | ERESTARTNOHAND => {}
        ERESTART_RESTARTBLOCK => {
            if number == libc::SYS_restart_syscall {
                let Some(loaded) = code.and_then(loaded_number) else {
                    registers.rax = i64::from(-libc::EINTR).cast_unsigned();
                    return registers;
                };
                number = loaded;
            }
            match number {
                libc::SYS_nanosleep if registers.rsi != 0 => registers.rdi = registers.rsi,
                libc::SYS_clock_nanosleep if registers.r10 != 0 => registers.rdx = registers.r10,
                _ => {}
            }
        }
        _ => return registers,
    }
    registers.rax = number.cast_unsigned();
    registers.rip -= SYSCALL_INSTRUCTION.len() as u64;
    registers
}

/// Returns the registers of a thread as they were when it stopped, of what CRIU makes
/// of them: it lets calls that the kernel would have continued fail with `EINTR`, but
/// keeps their number. The kernel itself never has both in the registers: only a
/// handler could have interrupted such a call, and what returns from one clears the
/// number.
pub fn uninterrupted(stored: &Registers) -> Registers {
    let number = stored.orig_rax.cast_signed();
    let continued = CONTINUED.contains(&number) || number == libc::SYS_restart_syscall;
    let mut registers = *stored;
    if continued && registers.rax.cast_signed() == i64::from(-libc::EINTR) {
        registers.rax = ERESTART_RESTARTBLOCK.cast_unsigned();
    }
    registers
}

/// Returns the number that the instruction before `syscall` loads.
fn loaded_number(code: [u8; CALL_BYTES]) -> Option<i64> {
    /// `mov eax, imm32`.
    const LOAD: u8 = 0xb8;
    let [LOAD, a, b, c, d, instruction @ ..] = code else { return None };
    let number = i64::from(i32::from_le_bytes([a, b, c, d]));
    (instruction == SYSCALL_INSTRUCTION && CONTINUED.contains(&number)).then_some(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interrupted_calls_are_made_again() {
        let stopped = |number: i64, result: i64| Registers {
            orig_rax: number.cast_unsigned(),
            rax: result.cast_unsigned(),
            rip: 0x1002,
            rsi: 0x55,
            // SAFETY: the structure is plain integers.
            ..unsafe { std::mem::zeroed() }
        };
        let code = Some([0xb8, 7, 0, 0, 0, 0x0f, 0x05]);
        let again = |stopped: Registers, code| {
            let registers = restart(&stopped, code);
            assert_eq!(registers.orig_rax, u64::MAX);
            (registers.rax.cast_signed(), registers.rip, registers.rdi)
        };
        assert_eq!(again(stopped(0, ERESTARTSYS), None), (0, 0x1000, 0));
        assert_eq!(again(stopped(35, ERESTART_RESTARTBLOCK), None), (35, 0x1000, 0x55));
        assert_eq!(again(stopped(219, ERESTART_RESTARTBLOCK), code), (7, 0x1000, 0));
        assert_eq!(again(stopped(219, ERESTART_RESTARTBLOCK), None), (-4, 0x1002, 0));
        assert_eq!(again(stopped(0, 17), None), (17, 0x1002, 0));
        assert_eq!(again(stopped(-1, -512), None), (-512, 0x1002, 0));
        assert_eq!(again(uninterrupted(&stopped(7, -4)), None), (7, 0x1000, 0));
        assert_eq!(again(uninterrupted(&stopped(219, -4)), code), (7, 0x1000, 0));
        assert_eq!(again(uninterrupted(&stopped(232, -4)), code), (-4, 0x1002, 0));
        assert_eq!(again(uninterrupted(&stopped(7, 1)), None), (1, 0x1002, 0));
        assert_eq!(again(uninterrupted(&stopped(-1, -4)), None), (-4, 0x1002, 0));
        // Without a timeout, as r10 and rdx say, but for that of epoll_wait.
        let mended = |number: i64, result: i64, r10: u64| {
            let registers = mended(&Registers { r10, ..stopped(number, result) });
            registers.map(|registers| registers.rax.cast_signed())
        };
        let forever = u64::from(u32::MAX);
        assert_eq!(mended(libc::SYS_semop, -4, 7), Some(ERESTARTNOHAND));
        assert_eq!(mended(libc::SYS_semtimedop, -4, 0), Some(ERESTARTNOHAND));
        assert_eq!(mended(libc::SYS_semtimedop, -4, 7), None);
        assert_eq!(mended(libc::SYS_epoll_wait, -4, forever), Some(ERESTARTNOHAND));
        assert_eq!(mended(libc::SYS_epoll_wait, -4, 100), None);
        assert_eq!(mended(libc::SYS_semop, 0, 0), None);
        assert_eq!(mended(libc::SYS_read, -4, 0), None);
    }
}
