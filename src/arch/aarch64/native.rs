//! What runs processes on aarch64: so far only what other modules need to compile.
//!
//! [`IS_BUILT`] is false, and dump and restore end with [`NotBuilt`](crate::arch::NotBuilt)
//! before they touch any process. So the functions that need injected code or the layout of
//! signal frames are never called; they say so if they are.

use nix::libc;

use crate::{
    arch::{Machine, Return},
    proto::{CoreEntry, CpuinfoX86Entry},
    units::RemoteAddr,
};

/// The machine.
pub const MACHINE: Machine = Machine::Aarch64;

/// Whether processes can be dumped and restored.
pub const IS_BUILT: bool = false;

/// The general registers of a thread (`struct user_pt_regs`, `asm/ptrace.h`).
pub type Registers = libc::user_regs_struct;

/// The end of the addresses that a process has unless it asks for more (`DEFAULT_MAP_WINDOW`
/// with 48 bits).
pub const ADDRESSES_END: u64 = 1 << 48;

/// `NT_PRFPREG` (`linux/elf.h`): the vector registers.
pub const EXTENDED_NOTE: usize = 2;

/// There are no descriptors of thread-local storage.
pub const LOCAL_STORAGE_NOTE: Option<usize> = None;

/// There are no ports.
pub const PORTS_NOTE: Option<usize> = None;

/// No call maps the vDSO: it is moved by `mremap(2)`.
pub const MAP_VDSO: Option<(libc::c_long, u64)> = None;

/// Images of this machine do not describe the processor.
///
/// # Errors
/// None.
pub const fn processor() -> Result<Option<CpuinfoX86Entry>, String> {
    Ok(None)
}

/// There is no other interface of system calls for 64-bit programs.
pub const OTHER_INTERFACE: Option<libc::c_long> = None;

/// The instruction `svc #0`.
pub const SYSCALL_INSTRUCTION: [u8; 4] = [0x01, 0x00, 0x00, 0xd4];

/// The instruction `svc #0`, and `ret` behind it.
pub const CALL_AND_RETURN: &[u8] = &[0x01, 0x00, 0x00, 0xd4, 0xc0, 0x03, 0x5f, 0xd6];

/// What returns from signal handlers, in the vDSO: `mov x8, #139` and `svc #0`.
pub const RESTORERS: &[&[u8]] = &[&[0x68, 0x11, 0x80, 0xd2, 0x01, 0x00, 0x00, 0xd4]];

/// Bytes of an instruction that loads the number of a call, and of the call.
pub const CALL_BYTES: usize = 8;

/// Where registers are behind a frame.
pub const FRAME_AREA_OFFSET: u64 = 0;

/// How many bytes of a frame [`is_frame`] looks at.
pub const FRAME_MARK_BYTES: usize = 0;

/// Registers beside the general ones, in the form that a frame has.
#[derive(Clone, Debug)]
pub struct Area(Vec<u8>);

impl Area {
    /// Makes it of what [`EXTENDED_NOTE`] has.
    pub fn new(bytes: Vec<u8>) -> Option<Self> {
        Some(Self(bytes))
    }

    /// Returns the bytes in it.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Ends the program: the caller should have asked [`IS_BUILT`].
fn not_built() -> ! {
    unreachable!("dump and restore end before this on aarch64")
}

/// Whether a thread that sleeps in this call, with this first argument, has made a process
/// and waits for it.
pub const fn waits_for_child(number: i64, first: Option<i32>) -> bool {
    match (number, first) {
        (libc::SYS_clone3, _) => true,
        (libc::SYS_clone, Some(flags)) => flags & libc::CLONE_VFORK != 0,
        _ => false,
    }
}

/// Returns the address of the next instruction.
pub const fn instruction_pointer(registers: &Registers) -> u64 {
    registers.pc
}

/// Returns the registers with another next instruction.
pub const fn with_instruction_pointer(registers: &Registers, address: u64) -> Registers {
    Registers { pc: address, ..*registers }
}

/// Returns the address of the end of the stack.
pub const fn stack_pointer(registers: &Registers) -> u64 {
    registers.sp
}

/// Returns the registers with another end of the stack.
pub const fn with_stack_pointer(registers: &Registers, address: u64) -> Registers {
    Registers { sp: address, ..*registers }
}

/// Returns what a system call that has just ended returns.
pub const fn call_result(registers: &Registers) -> u64 {
    registers.regs[0]
}

/// Returns the code that walks a table of calls.
pub fn code() -> &'static [u8] {
    not_built()
}

/// Returns where in the code a thread is that has sent itself its signal.
pub fn told(_code: RemoteAddr) -> RemoteAddr {
    not_built()
}

/// Returns the registers with which a thread walks the table at `table` and comes home.
pub fn enter_and_return(
    _base: &Registers,
    _code: RemoteAddr,
    _table: RemoteAddr,
    _home: Return,
) -> Registers {
    not_built()
}

/// Returns registers with which a thread begins to walk the table at `table`.
pub fn enter(_base: &Registers, _code: RemoteAddr, _table: RemoteAddr) -> Registers {
    not_built()
}

/// Returns registers with which a thread that is at [`SYSCALL_INSTRUCTION`] makes this call.
pub fn syscall_registers(
    _base: &Registers,
    _instruction: RemoteAddr,
    _number: libc::c_long,
    _arguments: [u64; 6],
) -> Registers {
    not_built()
}

/// Returns registers with which a thread that is at [`SYSCALL_INSTRUCTION`] calls
/// `rt_sigreturn(2)` for the frame at `frame`.
pub fn sigreturn_registers(
    _base: &Registers,
    _instruction: RemoteAddr,
    _frame: RemoteAddr,
) -> Registers {
    not_built()
}

/// Returns registers with which a thread that has stopped on entering a system call makes
/// this one instead.
pub fn exchanged_call(
    _entered: &Registers,
    _stack: RemoteAddr,
    _number: libc::c_long,
    _arguments: [u64; 6],
) -> Registers {
    not_built()
}

/// Returns the registers with which a call goes on that was interrupted by the stop alone.
pub fn mended(_stopped: &Registers) -> Option<Registers> {
    not_built()
}

/// Returns the registers with which a thread that was stopped goes on elsewhere.
pub fn restart(_stopped: &Registers, _code: Option<[u8; CALL_BYTES]>) -> Registers {
    not_built()
}

/// Returns the registers of a thread as they were when it stopped, of what CRIU makes of
/// them.
pub fn uninterrupted(_stored: &Registers) -> Registers {
    not_built()
}

/// Returns the bytes of a frame at `address`.
pub fn frame(
    _address: RemoteAddr,
    _restorer: RemoteAddr,
    _registers: &Registers,
    _mask: u64,
    _area: Option<&Area>,
) -> Vec<u8> {
    not_built()
}

/// Whether bytes begin a frame of this program's.
pub fn is_frame(_bytes: &[u8]) -> bool {
    not_built()
}

/// Fills in what an image says of a thread's registers.
///
/// # Errors
/// Registers that the format has no field for.
pub fn describe(
    _core: &mut CoreEntry,
    _general: &Registers,
    _extended: &[u8],
) -> Result<(), String> {
    not_built()
}

/// Fills in where the kernel clears the id of a thread at its end; 0 for nowhere.
pub fn set_tid_address(_core: &mut CoreEntry, _address: u64) {
    not_built()
}

/// Puts other general registers into an image.
pub fn replace_general(_core: &mut CoreEntry, _general: &Registers) {
    not_built()
}

/// Puts dumped registers into those that were read from a thread.
///
/// # Errors
/// What is wrong with the image, or what this processor does not have.
pub fn overwrite(
    _core: &CoreEntry,
    _general: &mut Registers,
    _extended: &mut [u8],
) -> Result<(), String> {
    not_built()
}
