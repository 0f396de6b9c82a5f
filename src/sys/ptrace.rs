//! `ptrace(2)`: stops other threads, and reads and writes their registers.
//!
//! The thread that has seized a tracee must make all calls about it.
#![expect(unsafe_code, reason = "ptrace and waitpid")]

use std::{mem::MaybeUninit, ptr};

use nix::{errno::Errno, libc};

pub use crate::arch::native::Registers;
use crate::{
    arch::native::{EXTENDED_NOTE, LOCAL_STORAGE_NOTE, PORTS_NOTE},
    units::{HostPid, RemoteAddr},
};

/// `NT_PRSTATUS` (`linux/elf.h`): general registers.
const NT_PRSTATUS: usize = 1;

/// Requests that `libc` does not name (`linux/ptrace.h`).
const PTRACE_GETSIGMASK: libc::c_uint = 0x420a;
const PTRACE_SETSIGMASK: libc::c_uint = 0x420b;
const PTRACE_SECCOMP_GET_FILTER: libc::c_uint = 0x420c;
const PTRACE_SECCOMP_GET_METADATA: libc::c_uint = 0x420d;
const PTRACE_GET_RSEQ_CONFIGURATION: libc::c_uint = 0x420f;
const PTRACE_SET_SYSCALL_USER_DISPATCH_CONFIG: libc::c_uint = 0x4210;
const PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG: libc::c_uint = 0x4211;

/// Bytes of a kernel signal set.
const SIGSET_BYTES: usize = 8;

/// More than the largest extended registers: 11 KiB on x86-64 with AMX.
const EXTENDED_LIMIT: usize = 64 << 10;

/// Options of a tracee.
pub mod options {
    use nix::libc;

    /// Distinguish system call stops from signals (`PTRACE_O_TRACESYSGOOD`).
    pub const SYSGOOD: i32 = libc::PTRACE_O_TRACESYSGOOD;
    /// Also trace the children and threads that it creates, from their first instruction.
    pub const FOLLOW: i32 =
        libc::PTRACE_O_TRACECLONE | libc::PTRACE_O_TRACEFORK | libc::PTRACE_O_TRACEVFORK;
    /// Kill it when the tracer exits (`PTRACE_O_EXITKILL`, since Linux 3.8).
    pub const EXITKILL: i32 = libc::PTRACE_O_EXITKILL;
    /// Suspend its seccomp filters while it is traced (`PTRACE_O_SUSPEND_SECCOMP`, since Linux
    /// 4.3). Needs `CAP_SYS_ADMIN` in the first user namespace, and a tracer without filters.
    pub const SUSPEND_SECCOMP: i32 = 1 << 21;
}

/// What `waitpid(2)` reports about a thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// It has exited with this code.
    Exited(i32),
    /// A signal killed it.
    Killed(i32),
    /// It is about to receive this signal.
    Signal(i32),
    /// It was interrupted, or is a new tracee.
    Interrupted,
    /// Its process is stopped by this signal (group-stop).
    Stopped(i32),
    /// It enters or leaves a system call.
    Syscall,
    /// `PTRACE_EVENT_*`: fork, vfork, clone, exec, ...
    Event(i32),
    /// It has continued (`WCONTINUED`, which is not requested).
    Other(i32),
}

fn decode(status: i32) -> Wait {
    if libc::WIFEXITED(status) {
        return Wait::Exited(libc::WEXITSTATUS(status));
    }
    if libc::WIFSIGNALED(status) {
        return Wait::Killed(libc::WTERMSIG(status));
    }
    if !libc::WIFSTOPPED(status) {
        return Wait::Other(status);
    }
    let signal = libc::WSTOPSIG(status);
    match status >> 16 {
        0 if signal == libc::SIGTRAP | 0x80 => Wait::Syscall,
        0 => Wait::Signal(signal),
        libc::PTRACE_EVENT_STOP if signal == libc::SIGTRAP => Wait::Interrupted,
        libc::PTRACE_EVENT_STOP => Wait::Stopped(signal),
        event => Wait::Event(event),
    }
}

/// Waits until a tracee or child changes state.
///
/// # Errors
/// `ECHILD` if there is no such tracee or child.
pub fn wait(tid: HostPid) -> Result<Wait, Errno> {
    wait_with(tid, 0).map(|(_, wait)| wait.expect("waits until there is something"))
}

/// Returns whether a tracee or child has changed state.
///
pub fn wait_nohang(tid: HostPid) -> Result<Option<Wait>, Errno> {
    wait_with(tid, libc::WNOHANG).map(|(_, wait)| wait)
}

fn wait_with(tid: HostPid, flags: i32) -> Result<(HostPid, Option<Wait>), Errno> {
    let mut status = 0;
    loop {
        // SAFETY: `status` outlives the call.
        let result = unsafe { libc::waitpid(tid.0, &raw mut status, flags | libc::__WALL) };
        match Errno::result(result) {
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
            Ok(0) => return Ok((tid, None)),
            Ok(tid) => return Ok((HostPid(tid), Some(decode(status)))),
        }
    }
}

/// Makes a request with numbers as address and data.
fn request(
    request: libc::c_uint,
    tid: HostPid,
    address: usize,
    data: usize,
) -> Result<libc::c_long, Errno> {
    // SAFETY: the callers pass numbers, or pointers to memory that outlives the
    // call and has the size that the request writes or reads.
    let result = unsafe { libc::ptrace(request, tid.0, address, data) };
    Errno::result(result)
}

/// Starts to trace a thread, without stopping it.
///
/// # Errors
/// `EPERM` if it may not be traced or is traced already; `ESRCH`.
pub fn seize(tid: HostPid, options: i32) -> Result<(), Errno> {
    request(libc::PTRACE_SEIZE, tid, 0, options.cast_unsigned() as usize).map(drop)
}

/// Changes the options of [`seize`].
///
/// # Errors
/// `ESRCH` if the tracee is not stopped.
pub fn set_options(tid: HostPid, options: i32) -> Result<(), Errno> {
    request(libc::PTRACE_SETOPTIONS, tid, 0, options.cast_unsigned() as usize).map(drop)
}

/// Asks a tracee to stop; [`wait`] returns when it has.
///
/// # Errors
/// `ESRCH`.
pub fn interrupt(tid: HostPid) -> Result<(), Errno> {
    request(libc::PTRACE_INTERRUPT, tid, 0, 0).map(drop)
}

/// Resumes a stopped tracee, with a signal or with 0.
///
/// # Errors
/// `ESRCH` if it is not stopped.
pub fn resume(tid: HostPid, signal: i32) -> Result<(), Errno> {
    request(libc::PTRACE_CONT, tid, 0, signal.cast_unsigned() as usize).map(drop)
}

/// Resumes a stopped tracee, with a signal or with 0, until it enters or leaves a system call.
///
/// # Errors
/// `ESRCH` if it is not stopped.
pub fn resume_to_syscall(tid: HostPid, signal: i32) -> Result<(), Errno> {
    request(libc::PTRACE_SYSCALL, tid, 0, signal.cast_unsigned() as usize).map(drop)
}

/// Detaches from a stopped tracee, which resumes.
///
/// # Errors
/// `ESRCH` if it is not stopped.
pub fn detach(tid: HostPid, signal: i32) -> Result<(), Errno> {
    request(libc::PTRACE_DETACH, tid, 0, signal.cast_unsigned() as usize).map(drop)
}

/// Returns the thread that a fork, vfork or clone event has created.
///
/// # Errors
/// `ESRCH` if the tracee is not stopped.
pub fn event_message(tid: HostPid) -> Result<u64, Errno> {
    let mut message: libc::c_ulong = 0;
    request(libc::PTRACE_GETEVENTMSG, tid, 0, (&raw mut message).addr())?;
    Ok(message)
}

fn io_vector(buffer: &mut [u8]) -> libc::iovec {
    libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() }
}

/// Returns the general registers of a stopped tracee.
///
/// # Errors
/// `ESRCH` if it is not stopped; `ENOEXEC` if it executes 32-bit code, which has other registers.
pub fn registers(tid: HostPid) -> Result<Registers, Errno> {
    let mut registers = MaybeUninit::<Registers>::zeroed();
    let mut vector =
        libc::iovec { iov_base: registers.as_mut_ptr().cast(), iov_len: size_of::<Registers>() };
    request(libc::PTRACE_GETREGSET, tid, NT_PRSTATUS, (&raw mut vector).addr())?;
    if vector.iov_len != size_of::<Registers>() {
        return Err(Errno::ENOEXEC);
    }
    // SAFETY: the structure is plain integers, for which all bytes are valid.
    Ok(unsafe { registers.assume_init() })
}

/// Sets the general registers of a stopped tracee, including segment bases.
///
/// # Errors
/// `ESRCH` if it is not stopped, `EIO` for values that the processor forbids.
pub fn set_registers(tid: HostPid, registers: &Registers) -> Result<(), Errno> {
    let mut vector = libc::iovec {
        iov_base: ptr::from_ref(registers).cast_mut().cast(),
        iov_len: size_of::<Registers>(),
    };
    request(libc::PTRACE_SETREGSET, tid, NT_PRSTATUS, (&raw mut vector).addr()).map(drop)
}

/// Returns the extended registers of a stopped tracee: on x86-64 what `XSAVE` saves, in the standard
/// format.
///
/// # Errors
/// `ESRCH` if it is not stopped, `ENODEV` on processors without any.
pub fn extended_registers(tid: HostPid) -> Result<Vec<u8>, Errno> {
    let mut bytes = vec![0; EXTENDED_LIMIT];
    let mut vector = io_vector(&mut bytes);
    request(libc::PTRACE_GETREGSET, tid, EXTENDED_NOTE, (&raw mut vector).addr())?;
    let len = vector.iov_len;
    bytes.truncate(len);
    Ok(bytes)
}

/// Sets the extended registers, in the format of [`extended_registers`].
///
/// # Errors
/// `ESRCH` if it is not stopped, `EINVAL` for registers that this processor lacks.
pub fn set_extended_registers(tid: HostPid, bytes: &[u8]) -> Result<(), Errno> {
    let mut vector =
        libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    request(libc::PTRACE_SETREGSET, tid, EXTENDED_NOTE, (&raw mut vector).addr()).map(drop)
}

/// Returns the signals that a stopped tracee blocks; bit 0 stands for signal 1.
///
/// # Errors
/// `ESRCH` if it is not stopped.
pub fn signal_mask(tid: HostPid) -> Result<u64, Errno> {
    let mut mask = 0_u64;
    request(PTRACE_GETSIGMASK, tid, SIGSET_BYTES, (&raw mut mask).addr())?;
    Ok(mask)
}

/// Sets the signals that a stopped tracee blocks.
///
/// # Errors
/// `ESRCH` if it is not stopped.
pub fn set_signal_mask(tid: HostPid, mask: u64) -> Result<(), Errno> {
    let mut mask = mask;
    request(PTRACE_SETSIGMASK, tid, SIGSET_BYTES, (&raw mut mask).addr()).map(drop)
}

/// Writes a word of a stopped tracee's memory, whatever its protection.
///
/// # Errors
/// `EIO` or `EFAULT` if nothing is mapped there.
pub fn poke(tid: HostPid, address: RemoteAddr, word: u64) -> Result<(), Errno> {
    let address = usize::try_from(address.0).map_err(|_| Errno::EFAULT)?;
    let word = usize::try_from(word).map_err(|_| Errno::EFAULT)?;
    request(libc::PTRACE_POKEDATA, tid, address, word).map(drop)
}

/// Offset of `rseq_cs` in `struct rseq` (`linux/rseq.h`).
pub const RSEQ_CS_OFFSET: u64 = 8;

/// The restartable sequences of a thread (`struct ptrace_rseq_configuration`, `linux/ptrace.h`, since
/// Linux 5.13).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct RseqConfiguration {
    /// The address of the thread's `struct rseq`; 0 if it has none.
    pub pointer: u64,
    /// Its size in bytes.
    pub size: u32,
    /// The word before each abort handler.
    pub signature: u32,
    flags: u32,
    pad: u32,
}

const _: () = assert!(size_of::<RseqConfiguration>() == 24);

/// Returns the restartable sequences of a stopped tracee.
///
/// # Errors
/// `EIO` on kernels before 5.13.
pub fn rseq_configuration(tid: HostPid) -> Result<RseqConfiguration, Errno> {
    let mut configuration = RseqConfiguration::default();
    let size = size_of::<RseqConfiguration>();
    request(PTRACE_GET_RSEQ_CONFIGURATION, tid, size, (&raw mut configuration).addr())?;
    Ok(configuration)
}

/// System call user dispatch of a thread (`struct ptrace_sud_config`, `linux/ptrace.h`, since Linux
/// 6.4).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct SyscallDispatch {
    /// 0 if it is off.
    pub mode: u64,
    /// The address of the byte that switches it on and off.
    pub selector: u64,
    /// The start of the code whose system calls always pass.
    pub offset: u64,
    /// The length of that code.
    pub len: u64,
}

const _: () = assert!(size_of::<SyscallDispatch>() == 32);

/// Returns whether and how a stopped tracee intercepts its own system calls
/// (`PR_SET_SYSCALL_USER_DISPATCH`).
///
/// # Errors
/// `EIO` on kernels before 6.4; `ESRCH` if it is not stopped.
pub fn syscall_dispatch(tid: HostPid) -> Result<SyscallDispatch, Errno> {
    let mut config = SyscallDispatch::default();
    let size = size_of::<SyscallDispatch>();
    request(PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG, tid, size, (&raw mut config).addr())?;
    Ok(config)
}

/// Instructions in the longest filter (`BPF_MAXINSNS`, `linux/bpf_common.h`).
const FILTER_INSTRUCTIONS: usize = 4096;

/// Returns the seccomp filter of a stopped tracee with this index, as an array of
/// `struct sock_filter`; `None` if it has no more filters. The oldest filter has the index 0.
///
/// # Errors
/// `EINVAL` if it has no filters at all; `EACCES` without `CAP_SYS_ADMIN`, or if the tracer has
/// filters itself; `EMEDIUMTYPE` for a filter that is not classic BPF.
pub fn seccomp_filter(tid: HostPid, index: usize) -> Result<Option<Vec<u8>>, Errno> {
    // The kernel writes the whole filter, whatever its length.
    let mut program = vec![0_u64; FILTER_INSTRUCTIONS];
    match request(PTRACE_SECCOMP_GET_FILTER, tid, index, program.as_mut_ptr().addr()) {
        Ok(count) => {
            let count = usize::try_from(count).unwrap_or_default();
            let bytes = program.iter().take(count).flat_map(|word| word.to_ne_bytes());
            Ok(Some(bytes.collect()))
        }
        Err(Errno::ENOENT) => Ok(None),
        Err(errno) => Err(errno),
    }
}

/// `struct seccomp_metadata` (`linux/ptrace.h`, since Linux 4.16).
#[repr(C)]
struct SeccompMetadata {
    index: u64,
    flags: u64,
}

const _: () = assert!(size_of::<SeccompMetadata>() == 16);

/// Returns the flags of the seccomp filter with this index: `SECCOMP_FILTER_FLAG_LOG` or 0.
///
/// # Errors
/// Those of [`seccomp_filter`]; `ENOENT` if there is no such filter.
pub fn seccomp_flags(tid: HostPid, index: usize) -> Result<u64, Errno> {
    let mut metadata = SeccompMetadata { index: index as u64, flags: 0 };
    let size = size_of::<SeccompMetadata>();
    request(PTRACE_SECCOMP_GET_METADATA, tid, size, (&raw mut metadata).addr())?;
    Ok(metadata.flags)
}

/// Sets how a stopped tracee intercepts its own system calls.
///
/// # Errors
/// `EINVAL` for a range that wraps, or a selector outside of user memory; `EIO` on kernels before
/// 6.4.
pub fn set_syscall_dispatch(tid: HostPid, config: SyscallDispatch) -> Result<(), Errno> {
    let size = size_of::<SyscallDispatch>();
    let config = (&raw const config).addr();
    request(PTRACE_SET_SYSCALL_USER_DISPATCH_CONFIG, tid, size, config).map(drop)
}

/// Registers that few threads use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rare {
    /// Descriptors of thread-local storage for 32-bit code (`set_thread_area(2)`).
    LocalStorage,
    /// I/O port permissions (`ioperm(2)`).
    Ports,
}

/// Whether a stopped tracee uses these registers.
///
/// # Errors
/// `ESRCH` if it is not stopped.
pub fn has_rare(tid: HostPid, which: Rare) -> Result<bool, Errno> {
    /// `IO_BITMAP_BYTES`: a bit for each port.
    const BITMAP_BYTES: usize = 8192;
    let mut buffer = vec![0; BITMAP_BYTES];
    let mut vector = io_vector(&mut buffer);
    let set = match which {
        Rare::LocalStorage => LOCAL_STORAGE_NOTE,
        Rare::Ports => PORTS_NOTE,
    };
    let Some(set) = set else { return Ok(false) };
    match request(libc::PTRACE_GETREGSET, tid, set, (&raw mut vector).addr()) {
        Err(Errno::ENXIO | Errno::ENODEV | Errno::EINVAL | Errno::EIO) => Ok(false),
        Err(errno) => Err(errno),
        Ok(_) => {
            let len = vector.iov_len;
            // The kernel shows an unused descriptor as not present and otherwise empty.
            Ok(match which {
                Rare::LocalStorage => buffer[..len].chunks(TLS_BYTES).any(|entry| {
                    let (address_and_limit, bits) = entry[4..].split_at(8);
                    address_and_limit.iter().any(|byte| *byte != 0)
                        || !matches!(bits.first(), None | Some(&(0 | TLS_UNUSED)))
                }),
                Rare::Ports => len > 0,
            })
        }
    }
}

/// The size of a `struct user_desc` (`asm/ldt.h`).
const TLS_BYTES: usize = 16;

/// The bits of an empty descriptor: read-execute-only and not present.
const TLS_UNUSED: u8 = 0b10_1000;

/// Bytes of a `siginfo_t`.
pub const SIGINFO_BYTES: usize = 128;

/// Signals read at a time.
const SIGINFO_BATCH: usize = 32;

/// `PTRACE_PEEKSIGINFO_SHARED` (`linux/ptrace.h`): the queue of the process.
const PEEK_SHARED: u32 = 1;

/// `struct ptrace_peeksiginfo_args` (`linux/ptrace.h`, since Linux 3.10).
#[repr(C)]
struct PeekArguments {
    offset: u64,
    flags: u32,
    count: i32,
}

const _: () = assert!(size_of::<PeekArguments>() == 16);

/// Returns the signals pending for a stopped tracee, or for its process if `shared`, oldest first, each
/// as a `siginfo_t`.
///
/// # Errors
/// `ESRCH` if it is not stopped.
pub fn queued_signals(tid: HostPid, shared: bool) -> Result<Vec<Vec<u8>>, Errno> {
    let mut found = Vec::new();
    loop {
        let mut buffer = [0_u8; SIGINFO_BYTES * SIGINFO_BATCH];
        let arguments = PeekArguments {
            offset: found.len() as u64,
            flags: if shared { PEEK_SHARED } else { 0 },
            count: i32::try_from(SIGINFO_BATCH).expect("small"),
        };
        let count = request(
            libc::PTRACE_PEEKSIGINFO,
            tid,
            (&raw const arguments).addr(),
            (&raw mut buffer).addr(),
        )?;
        let count = usize::try_from(count).expect("not negative");
        found.extend(buffer.chunks(SIGINFO_BYTES).take(count).map(<[u8]>::to_vec));
        if count < SIGINFO_BATCH {
            return Ok(found);
        }
    }
}

/// Makes this process a subreaper, which adopts orphaned descendants, or no longer.
pub fn set_subreaper(on: bool) -> Result<(), Errno> {
    // SAFETY: the call takes numbers.
    let result = unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, i32::from(on), 0, 0, 0) };
    Errno::result(result).map(drop)
}
