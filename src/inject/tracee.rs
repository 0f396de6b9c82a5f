//! A stopped thread of another process.

use std::sync::OnceLock;

use memchr::memmem;
use nix::{errno::Errno, libc};
use zerocopy::{FromBytes, IntoBytes};

use super::{InjectError, Result, script};
use crate::{
    arch::native::{self as arch, SYSCALL_INSTRUCTION},
    fault::{self, Point},
    proc::{self, Mapping, Status},
    sys::{
        process,
        ptrace::{self, RSEQ_CS_OFFSET, Registers, RseqConfiguration, Wait},
    },
    units::{HostPid, RemoteAddr},
};

/// Returns the registers with which a thread, stopped with `registers`, resumes where the kernel does
/// not restart an interrupted system call: after a restore, or by a frame (see `home`). Reads the
/// code of the thread, so its memory must be in place.
fn restarted(tid: HostPid, registers: &Registers) -> Registers {
    let mut code = [0; arch::CALL_BYTES];
    let before = arch::instruction_pointer(registers).wrapping_sub(code.len() as u64);
    let readable = process::read_memory(tid, RemoteAddr(before), &mut code).is_ok();
    arch::restart(registers, readable.then_some(code))
}

/// Returns the registers with which a restored thread resumes, from those in an image. Its memory must
/// be restored already.
///
/// Registers that rcriu has recorded can be used as they are. CRIU may record an interrupted
/// system call that should be restarted.
pub fn registers_to_resume(tid: HostPid, stored: &Registers) -> Registers {
    restarted(tid, &arch::uninterrupted(stored))
}

/// The signal mask of a thread that runs a script which ends with a trap: it blocks all signals
/// except the trap.
pub(super) const MASK_FOR_TRAPS: u64 = !(1 << (libc::SIGTRAP - 1));

/// The number of stops at a system call: on entry and on exit.
const SYSCALL_STOPS: usize = 2;

/// `struct rseq_cs` (`linux/rseq.h`).
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes)]
#[repr(C)]
struct CriticalSection {
    version: u32,
    flags: u32,
    start: u64,
    bytes: u64,
    abort: u64,
}

/// A stopped thread, and its state when it was stopped.
#[derive(Debug)]
pub struct Tracee {
    /// The thread.
    pub tid: HostPid,
    /// Its general registers.
    pub registers: Registers,
    /// The signals that it blocks.
    pub signal_mask: u64,
    /// Its restartable sequences.
    pub rseq: RseqConfiguration,
    /// The critical section that it is in, or 0.
    pub rseq_cs: u64,
    /// The signal that stopped its process before, or 0.
    pub stopped_by: i32,
    /// Whether a pending SIGSTOP was consumed while its process was stopped.
    stopped_again: bool,
    /// The address where it resumes if its critical section must be aborted.
    abort: Option<u64>,
    /// Whether the thread's registers or signal mask differ from those it was found with.
    dirty: bool,
    /// The signals that it blocks now.
    mask_now: u64,
    /// Whether its seccomp filters are suspended.
    unfiltered: bool,
    status: OnceLock<Status>,
}

/// How a thread reports that its script has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sign {
    /// By a trap.
    Trap,
    /// By this signal, which it sends itself right before the instruction at `told`.
    Signal { number: i32, told: RemoteAddr },
}

impl Tracee {
    /// Takes over a stopped tracee.
    ///
    /// # Errors
    /// [`InjectError::Trace`]; [`InjectError::Code32`].
    pub fn new(tid: HostPid, stopped_by: i32) -> Result<Self> {
        let registers = ptrace::registers(tid).map_err(|errno| match errno {
            Errno::ENOEXEC => InjectError::Code32 { tid },
            errno => InjectError::trace(tid, "read the registers of")(errno),
        })?;
        let signal_mask =
            ptrace::signal_mask(tid).map_err(InjectError::trace(tid, "read the signal mask of"))?;
        // A kernel that cannot report restartable sequences does not abort them wrongly either.
        let rseq = ptrace::rseq_configuration(tid).unwrap_or_default();
        let mut tracee = Self {
            tid,
            registers,
            signal_mask,
            rseq,
            rseq_cs: 0,
            stopped_by,
            stopped_again: false,
            abort: None,
            dirty: false,
            mask_now: signal_mask,
            unfiltered: false,
            status: OnceLock::new(),
        };
        if rseq.pointer != 0 {
            let mut bytes = [0; 8];
            let address = RemoteAddr(rseq.pointer).plus(RSEQ_CS_OFFSET);
            if process::read_memory(tid, address, &mut bytes).is_ok() {
                tracee.rseq_cs = u64::from_le_bytes(bytes);
            }
        }
        if tracee.rseq_cs != 0 {
            let mut section = CriticalSection::default();
            let address = RemoteAddr(tracee.rseq_cs);
            let known = process::read_memory(tid, address, section.as_mut_bytes()).is_ok();
            // Since Linux 6.1, the kernel aborts all critical sections, whatever their flags.
            let at = arch::instruction_pointer(&tracee.registers);
            if known && at.wrapping_sub(section.start) < section.bytes {
                tracee.abort = Some(section.abort);
            }
        }
        Ok(tracee)
    }

    /// Returns its `/proc/TID/status`, which is read once. Signals may have become pending since then,
    /// but ids, capabilities and the seccomp mode cannot change while the thread is stopped.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn status(&self) -> proc::Result<&Status> {
        if let Some(status) = self.status.get() {
            return Ok(status);
        }
        let status = proc::status(self.tid)?;
        Ok(self.status.get_or_init(|| status))
    }

    /// Suspends the seccomp filters of the thread, so that it can make any system call. They are
    /// in force again when the tracer detaches from it or dies.
    ///
    /// # Errors
    /// [`InjectError::Filtered`].
    pub fn suspend_filters(&mut self) -> Result<()> {
        try_to_suspend_filters(self.tid)?;
        self.unfiltered = true;
        Ok(())
    }

    /// Puts suspended seccomp filters in force again.
    pub(super) fn resume_filters(&mut self) -> Result<()> {
        if std::mem::take(&mut self.unfiltered) {
            ptrace::set_options(self.tid, ptrace::options::SYSGOOD)
                .map_err(InjectError::trace(self.tid, "set the options of"))?;
        }
        Ok(())
    }

    /// Returns the general registers with which the thread resumes after a restore.
    pub fn registers_to_restore(&self) -> Registers {
        restarted(self.tid, &self.registers)
    }

    /// Returns the registers with which the thread resumes here. Aborts a critical section that it
    /// is in, as the kernel does for a thread that was preempted: otherwise the kernel would
    /// forget the section when the thread executes other code.
    pub(super) fn registers_to_go_on(&self) -> Registers {
        match self.abort {
            Some(abort) => arch::with_instruction_pointer(&self.registers, abort),
            None => self.registers,
        }
    }

    /// Returns the registers with which the thread resumes by a frame, where the kernel does not
    /// restart interrupted system calls.
    pub(super) fn registers_to_come_home(&self) -> Registers {
        restarted(self.tid, &self.registers_to_go_on())
    }

    /// Sets other registers than the thread's own.
    pub(super) fn set_registers(&mut self, registers: &Registers) -> Result<()> {
        self.dirty = true;
        ptrace::set_registers(self.tid, registers)
            .map_err(InjectError::trace(self.tid, "set the registers of"))
    }

    /// Sets the signal mask while the thread works for rcriu.
    pub(super) fn block(&mut self, mask: u64) -> Result<()> {
        self.dirty = true;
        if self.mask_now != mask {
            ptrace::set_signal_mask(self.tid, mask)
                .map_err(InjectError::trace(self.tid, "block the signals of"))?;
            self.mask_now = mask;
        }
        Ok(())
    }

    /// Returns the registers with which the thread makes one system call. `stack`, if any,
    /// becomes its stack pointer.
    pub(super) fn registers_to_call(
        &self,
        instruction: RemoteAddr,
        stack: Option<RemoteAddr>,
        number: libc::c_long,
        arguments: [u64; 6],
    ) -> Registers {
        let registers = arch::syscall_registers(&self.registers, instruction, number, arguments);
        match stack {
            Some(stack) => arch::with_stack_pointer(&registers, stack.0),
            None => registers,
        }
    }

    /// Has the thread make one system call with the instruction at `instruction`, while it blocks the
    /// signals in `mask`. Returns the kernel's result. Sets the registers before the mask: by the
    /// registers the thread finds home (see `home`), and the frame there holds the old mask.
    ///
    /// A thread with suspended seccomp filters, which might kill it for the call if rcriu were
    /// killed, gets registers with which it returns at once (`rt_sigreturn(2)`). rcriu replaces the
    /// call only when the thread is in the kernel.
    pub(super) fn call(
        &mut self,
        instruction: RemoteAddr,
        stack: Option<RemoteAddr>,
        mask: u64,
        number: libc::c_long,
        arguments: [u64; 6],
    ) -> Result<Result<u64, Errno>> {
        let tid = self.tid;
        let failed = |step| InjectError::trace(tid, step);
        let exchange = stack.filter(|_| self.unfiltered);
        let registers = match exchange {
            Some(frame) => arch::sigreturn_registers(&self.registers, instruction, frame),
            None => self.registers_to_call(instruction, stack, number, arguments),
        };
        self.set_registers(&registers)?;
        let mut fault = fault::hit(Point::DumpCallSet);
        self.block(mask)?;
        // A pending stop comes before the entry of the call.
        let mut stops = 0;
        let mut signal = 0;
        while stops < SYSCALL_STOPS {
            ptrace::resume_to_syscall(self.tid, signal).map_err(failed("resume"))?;
            signal = 0;
            match self.wait()? {
                Wait::Syscall => {
                    stops += 1;
                    fault = fault.and(fault::hit(Point::DumpCall));
                    if let Some(frame) = exchange.filter(|_| stops == 1) {
                        let entered =
                            ptrace::registers(tid).map_err(failed("read the registers of"))?;
                        let wanted = arch::exchanged_call(&entered, frame, number, arguments);
                        self.set_registers(&wanted)?;
                    }
                }
                // Another process stops this one meanwhile. It must also be stopped when it is released.
                Wait::Signal(libc::SIGSTOP) if stops == 0 => {
                    self.stopped_again |= self.stopped_by != 0;
                    signal = libc::SIGSTOP;
                }
                Wait::Stopped(signal) if stops == 0 => self.stopped_by = signal,
                Wait::Interrupted if stops == 0 => {}
                // The signal is not blocked because the process ignores it.
                Wait::Signal(number) if stops == 0 && is_clear(mask, number) => {}
                other => return Err(lost(self.tid, other)),
            }
        }
        let now = ptrace::registers(self.tid).map_err(failed("read the registers of"))?;
        fault?;
        Ok(script::outcome(arch::call_result(&now)))
    }

    /// Resumes the thread, whose registers are set, without waiting for it.
    pub(super) fn start(&self) -> Result<()> {
        ptrace::resume(self.tid, 0).map_err(InjectError::trace(self.tid, "resume"))
    }

    /// Waits for the end of the script; calls `born` with each thread and process that it creates.
    pub(super) fn join(
        &mut self,
        sign: Sign,
        born: &mut dyn FnMut(HostPid) -> Result<()>,
    ) -> Result<()> {
        loop {
            match (self.wait()?, sign) {
                (Wait::Signal(libc::SIGTRAP), Sign::Trap) => return Ok(()),
                (Wait::Signal(signal), Sign::Signal { number, told }) if signal == number => {
                    let now = ptrace::registers(self.tid)
                        .map_err(InjectError::trace(self.tid, "read the registers of"))?;
                    if arch::instruction_pointer(&now) == told.0 {
                        return Ok(());
                    }
                    // The signal comes from another process; this one ignores it.
                    ptrace::resume(self.tid, 0).map_err(InjectError::trace(self.tid, "resume"))?;
                }
                (
                    Wait::Event(
                        libc::PTRACE_EVENT_CLONE
                        | libc::PTRACE_EVENT_FORK
                        | libc::PTRACE_EVENT_VFORK,
                    ),
                    _,
                ) => {
                    let child = ptrace::event_message(self.tid)
                        .map_err(InjectError::trace(self.tid, "ask for the child of"))?;
                    born(HostPid(i32::try_from(child).expect("pids are small")))?;
                    ptrace::resume(self.tid, 0).map_err(InjectError::trace(self.tid, "resume"))?;
                }
                // Another process stops this one meanwhile. It must also be stopped when it is released.
                (Wait::Signal(libc::SIGSTOP), _) => {
                    self.stopped_again |= self.stopped_by != 0;
                    ptrace::resume(self.tid, libc::SIGSTOP)
                        .map_err(InjectError::trace(self.tid, "resume"))?;
                }
                (Wait::Stopped(signal), _) => {
                    self.stopped_by = signal;
                    ptrace::resume(self.tid, 0).map_err(InjectError::trace(self.tid, "resume"))?;
                }
                (Wait::Interrupted, _) => {
                    ptrace::resume(self.tid, 0).map_err(InjectError::trace(self.tid, "resume"))?;
                }
                (other, _) => return Err(lost(self.tid, other)),
            }
        }
    }

    fn wait(&self) -> Result<Wait> {
        ptrace::wait(self.tid).map_err(InjectError::trace(self.tid, "wait for"))
    }

    /// Restores the registers and the signal mask of the thread, which stays stopped.
    ///
    /// # Errors
    /// [`InjectError::Trace`] if it has died.
    pub fn put_back(&mut self) -> Result<()> {
        if !self.dirty {
            return Ok(());
        }
        // Set the mask first: until it has its registers, the thread comes home by a frame.
        self.block(self.signal_mask)?;
        self.set_registers(&self.registers_to_go_on())?;
        self.dirty = false;
        Ok(())
    }

    /// Restores the thread and resumes it, or leaves it as stopped as it was.
    ///
    /// # Errors
    /// [`InjectError::Trace`] if it has died.
    pub fn release(mut self) -> Result<()> {
        self.put_back()?;
        let tid = self.tid;
        ptrace::detach(tid, 0).map_err(InjectError::trace(tid, "detach from"))?;
        if self.stopped_again {
            // The thread stays stopped, and the signal is pending again.
            process::signal(tid, libc::SIGSTOP)
                .map_err(InjectError::trace(tid, "send a signal to"))?;
        }
        Ok(())
    }
}

/// Whether the mask does not block a signal.
fn is_clear(mask: u64, signal: i32) -> bool {
    mask & 1 << (signal - 1) == 0
}

pub(super) fn lost(tid: HostPid, wait: Wait) -> InjectError {
    let what = match wait {
        Wait::Exited(code) => format!("exited with code {code}"),
        Wait::Killed(signal) => format!("was killed by signal {signal}"),
        Wait::Signal(signal) => format!("got signal {signal}"),
        other => format!("stopped for {other:?}"),
    };
    InjectError::Lost { tid, what }
}

/// Suspends the seccomp filters of a stopped tracee.
///
/// # Errors
/// [`InjectError::Filtered`].
pub fn try_to_suspend_filters(tid: HostPid) -> Result<()> {
    let wanted = ptrace::options::SYSGOOD | ptrace::options::SUSPEND_SECCOMP;
    ptrace::set_options(tid, wanted).map_err(|source| InjectError::Filtered { tid, source })
}

pub(super) fn denied(tid: HostPid, errno: Errno) -> InjectError {
    if errno != Errno::EPERM {
        return InjectError::Trace { tid, step: "trace", source: errno };
    }
    let tracer = proc::status(tid).map(|status| status.tracer_pid.0).unwrap_or_default();
    let why = if tracer == 0 {
        "not permitted\nhelp: run rcriu as root or with CAP_SYS_PTRACE".to_owned()
    } else {
        format!("process {tracer} already traces it; end that process first")
    };
    InjectError::Denied { tid, why }
}

/// How many bytes of a mapping are searched at a time.
pub(super) const SEARCH_BYTES: usize = 64 << 10;

/// Returns the address of a system call instruction in a process: in the vDSO if possible, otherwise
/// in any mapping.
pub(super) fn find_syscall(pid: HostPid, mappings: &[Mapping]) -> Result<RemoteAddr> {
    let executable = |mapping: &&Mapping| mapping.execute && mapping.read;
    let vdso = mappings.iter().filter(|mapping| mapping.name == b"[vdso]");
    let others = mappings.iter().filter(|mapping| mapping.name != b"[vsyscall]");
    let mut unread = None;
    for mapping in vdso.chain(others).filter(executable) {
        let mut buffer = vec![0; SEARCH_BYTES];
        let mut next = mapping.start;
        while next < mapping.end {
            let len = usize::try_from(mapping.end.0 - next.0).unwrap_or(usize::MAX);
            let buffer = &mut buffer[..len.min(SEARCH_BYTES)];
            if let Err(source) = process::read_memory(pid, next, buffer) {
                let (step, len) = ("look for a system call in", buffer.len() as u64);
                unread = Some(InjectError::Memory { tid: pid, step, address: next, len, source });
                break;
            }
            if let Some(offset) = memmem::find(buffer, &SYSCALL_INSTRUCTION) {
                return Ok(next.plus(offset as u64));
            }
            next = next.plus(buffer.len() as u64);
        }
    }
    Err(unread.unwrap_or(InjectError::NoSyscall { tid: pid }))
}
