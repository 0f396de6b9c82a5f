//! Running processes on x86-64.

use nix::libc;

pub use super::{
    code::{
        CALL_AND_RETURN, CALL_BYTES, RESTORERS, SYSCALL_INSTRUCTION, code, enter, enter_and_return,
        exchanged_call, mended, restart, sigreturn_registers, syscall_registers, told,
        uninterrupted,
    },
    frame::{Area, FRAME_AREA_OFFSET, FRAME_MARK_BYTES, frame, is_frame},
};
use super::{registers, xsave};
use crate::{
    arch::Machine,
    proto::{CoreEntry, CpuinfoX86Entry, UserDescT, UserX86RegsEntry, UserX86RegsMode},
};

/// The machine.
pub const MACHINE: Machine = Machine::X86_64;

/// Whether processes can be dumped and restored.
pub const IS_BUILT: bool = true;

/// The general registers of a thread (`struct user_regs_struct`, `linux/user.h`).
pub type Registers = libc::user_regs_struct;

/// The end of the addresses that a process may have.
pub const ADDRESSES_END: u64 = registers::ADDRESSES_END;

/// `NT_X86_XSTATE` (`linux/elf.h`): everything that `XSAVE` saves.
pub const EXTENDED_NOTE: usize = 0x202;

/// `NT_386_TLS` (`linux/elf.h`): descriptors of thread-local storage for 32-bit code.
pub const LOCAL_STORAGE_NOTE: Option<usize> = Some(0x200);

/// `NT_386_IOPERM` (`linux/elf.h`): the ports that `ioperm(2)` has opened.
pub const PORTS_NOTE: Option<usize> = Some(0x201);

/// The call by which a process maps the vDSO at an address, which is its second argument,
/// and the first argument: `ARCH_MAP_VDSO_64` (`asm/prctl.h`).
pub const MAP_VDSO: Option<(libc::c_long, u64)> = Some((libc::SYS_arch_prctl, 0x2003));

/// Describes the processor, as images of it do.
///
/// # Errors
/// It is one that the images do not know.
pub fn processor() -> Result<Option<CpuinfoX86Entry>, String> {
    super::processor::describe().map(Some)
}

/// The bit in the number of a system call by which a program makes it through the x32
/// interface (`__X32_SYSCALL_BIT`, `asm/unistd.h`).
pub const OTHER_INTERFACE: Option<libc::c_long> = Some(0x4000_0000);

/// Whether a thread that sleeps in this call, with this first argument, has made a process
/// and waits for it.
pub const fn waits_for_child(number: i64, first: Option<i32>) -> bool {
    match (number, first) {
        // Whose flags are in memory; but it waits for nothing else so.
        (libc::SYS_vfork | libc::SYS_clone3, _) => true,
        (libc::SYS_clone, Some(flags)) => flags & libc::CLONE_VFORK != 0,
        _ => false,
    }
}

/// Returns the address of the next instruction.
pub const fn instruction_pointer(registers: &Registers) -> u64 {
    registers.rip
}

/// Returns the registers with another next instruction.
pub const fn with_instruction_pointer(registers: &Registers, address: u64) -> Registers {
    Registers { rip: address, ..*registers }
}

/// Returns the address of the end of the stack.
pub const fn stack_pointer(registers: &Registers) -> u64 {
    registers.rsp
}

/// Returns the registers with another end of the stack.
pub const fn with_stack_pointer(registers: &Registers, address: u64) -> Registers {
    Registers { rsp: address, ..*registers }
}

/// Returns what a system call that has just ended returns.
pub const fn call_result(registers: &Registers) -> u64 {
    registers.rax
}

/// Descriptors of thread-local storage that a 64-bit thread has for 32-bit code.
const TLS_ENTRIES: std::ops::Range<u32> = 12..15;

/// Fills in what an image says of a thread's registers: `extended` is what
/// [`EXTENDED_NOTE`] has.
///
/// # Errors
/// Registers that the format has no field for.
pub fn describe(core: &mut CoreEntry, general: &Registers, extended: &[u8]) -> Result<(), String> {
    let unused_tls = |entry_number| UserDescT {
        entry_number,
        read_exec_only: true,
        seg_not_present: true,
        ..Default::default()
    };
    let info = core.thread_info.get_or_insert_default();
    info.fpregs = registers::from_area(extended, &xsave::offset)?;
    info.gpregs = general_entry(general);
    info.tls = TLS_ENTRIES.map(unused_tls).collect();
    Ok(())
}

/// Fills in where the kernel clears the id of a thread at its end; 0 for nowhere.
pub fn set_tid_address(core: &mut CoreEntry, address: u64) {
    core.thread_info.get_or_insert_default().clear_tid_addr = address;
}

/// Replaces the general registers in an image; the kernel will write the id of this thread nowhere.
pub fn replace_general(core: &mut CoreEntry, general: &Registers) {
    if let Some(info) = &mut core.thread_info {
        info.gpregs = general_entry(general);
        info.clear_tid_addr = 0;
    }
}

/// Puts dumped registers into those that were read from a thread of this processor:
/// general ones, and what [`EXTENDED_NOTE`] has.
///
/// # Errors
/// What is wrong with the image, or what this processor does not have.
pub fn overwrite(
    core: &CoreEntry,
    general: &mut Registers,
    extended: &mut [u8],
) -> Result<(), String> {
    let info = core.thread_info.as_ref().ok_or("it has no registers")?;
    registers::overwrite(extended, &info.fpregs, &xsave::offset)?;
    let from = &info.gpregs;
    general.r15 = from.r15;
    general.r14 = from.r14;
    general.r13 = from.r13;
    general.r12 = from.r12;
    general.rbp = from.bp;
    general.rbx = from.bx;
    general.r11 = from.r11;
    general.r10 = from.r10;
    general.r9 = from.r9;
    general.r8 = from.r8;
    general.rax = from.ax;
    general.rcx = from.cx;
    general.rdx = from.dx;
    general.rsi = from.si;
    general.rdi = from.di;
    general.orig_rax = from.orig_ax;
    general.rip = from.ip;
    general.cs = from.cs;
    general.eflags = from.flags;
    general.rsp = from.sp;
    general.ss = from.ss;
    general.fs_base = from.fs_base;
    general.gs_base = from.gs_base;
    general.ds = from.ds;
    general.es = from.es;
    general.fs = from.fs;
    general.gs = from.gs;
    Ok(())
}

/// Returns what an image says of a thread's general registers.
fn general_entry(regs: &Registers) -> UserX86RegsEntry {
    UserX86RegsEntry {
        r15: regs.r15,
        r14: regs.r14,
        r13: regs.r13,
        r12: regs.r12,
        bp: regs.rbp,
        bx: regs.rbx,
        r11: regs.r11,
        r10: regs.r10,
        r9: regs.r9,
        r8: regs.r8,
        ax: regs.rax,
        cx: regs.rcx,
        dx: regs.rdx,
        si: regs.rsi,
        di: regs.rdi,
        orig_ax: regs.orig_rax,
        ip: regs.rip,
        cs: regs.cs,
        flags: regs.eflags,
        sp: regs.rsp,
        ss: regs.ss,
        fs_base: regs.fs_base,
        gs_base: regs.gs_base,
        ds: regs.ds,
        es: regs.es,
        fs: regs.fs,
        gs: regs.gs,
        mode: Some(UserX86RegsMode::Native.into()),
    }
}
