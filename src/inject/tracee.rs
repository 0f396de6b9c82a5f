//! One thread of another process, stopped.

use nix::{errno::Errno, libc};

use super::{
    InjectError, Result,
    arch::{self, SYSCALL_INSTRUCTION},
};
use crate::{
    proc::{self, Mapping},
    sys::{
        process,
        ptrace::{self, RSEQ_CS_OFFSET, Registers, RseqConfiguration, Wait},
    },
    units::{HostPid, RemoteAddr},
};

/// Returns the registers with which a thread that has stopped with `registers` goes on
/// elsewhere; its memory is there.
fn restarted(tid: HostPid, registers: &Registers) -> Registers {
    let mut code = [0; arch::CALL_BYTES];
    let before = RemoteAddr(registers.rip.wrapping_sub(code.len() as u64));
    let readable = process::read_memory(tid, before, &mut code).is_ok();
    arch::restart(registers, readable.then_some(code))
}

/// Returns the registers with which a restored thread goes on, whose memory is
/// restored, of those that an image has.
///
/// Those that this program records are ready. CRIU leaves calls interrupted that would
/// have gone on.
pub fn registers_to_resume(tid: HostPid, stored: &Registers) -> Registers {
    restarted(tid, &arch::uninterrupted(stored))
}

/// A thread that works for this program gets no signal but those that cannot be
/// blocked, and the trap at the end.
const WORKING_MASK: u64 = !(1 << (libc::SIGTRAP - 1));

/// A thread stops when it enters a system call and when it leaves it.
const SYSCALL_STOPS: usize = 2;

/// A thread that was stopped, and its state at that moment.
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
    /// The critical section that it had entered, or 0.
    pub rseq_cs: u64,
    /// The signal that had stopped its process, or 0.
    pub stopped_by: i32,
    /// Whether the thread is in a state other than the one it was found in.
    dirty: bool,
}

impl Tracee {
    /// Takes over a thread that is traced and stopped.
    ///
    /// # Errors
    /// [`InjectError::Trace`].
    pub fn new(tid: HostPid, stopped_by: i32) -> Result<Self> {
        let registers =
            ptrace::registers(tid).map_err(InjectError::trace(tid, "read the registers of"))?;
        let signal_mask =
            ptrace::signal_mask(tid).map_err(InjectError::trace(tid, "read the signal mask of"))?;
        // Kernels that cannot tell have no way to get it wrong either.
        let rseq = ptrace::rseq_configuration(tid).unwrap_or_default();
        let mut tracee =
            Self { tid, registers, signal_mask, rseq, rseq_cs: 0, stopped_by, dirty: false };
        if rseq.pointer != 0 {
            let mut bytes = [0; 8];
            let address = RemoteAddr(rseq.pointer).plus(RSEQ_CS_OFFSET);
            if process::read_memory(tid, address, &mut bytes).is_ok() {
                tracee.rseq_cs = u64::from_le_bytes(bytes);
            }
        }
        Ok(tracee)
    }

    /// Returns the general registers with which the thread is to go on after a
    /// restore.
    pub fn registers_to_restore(&self) -> Registers {
        restarted(self.tid, &self.registers)
    }

    /// Blocks signals, so that the thread can work for this program.
    pub(super) fn begin_work(&mut self) -> Result<()> {
        self.dirty = true;
        ptrace::set_signal_mask(self.tid, WORKING_MASK)
            .map_err(InjectError::trace(self.tid, "block the signals of"))
    }

    /// Makes the thread call the kernel once, with the instruction at
    /// `instruction`, and returns the result as the kernel gives it.
    pub(super) fn call(
        &mut self,
        instruction: RemoteAddr,
        number: libc::c_long,
        arguments: [u64; 6],
    ) -> Result<Result<u64, Errno>> {
        let failed = |step| InjectError::trace(self.tid, step);
        let registers = arch::syscall_registers(&self.registers, instruction, number, arguments);
        self.dirty = true;
        ptrace::set_registers(self.tid, &registers).map_err(failed("set the registers of"))?;
        // A stop that was pending comes first, before the call is entered.
        let mut stops = 0;
        while stops < SYSCALL_STOPS {
            ptrace::resume_to_syscall(self.tid).map_err(failed("resume"))?;
            match self.wait()? {
                Wait::Syscall => stops += 1,
                Wait::Stopped(_) | Wait::Interrupted if stops == 0 => {}
                other => return Err(lost(self.tid, other)),
            }
        }
        let result = ptrace::registers(self.tid).map_err(failed("read the registers of"))?.rax;
        let error = result.wrapping_neg();
        Ok(match i32::try_from(error) {
            Ok(number @ 1..=4095) => Err(Errno::from_raw(number)),
            _ => Ok(result),
        })
    }

    /// Lets the thread walk the table at `table`, without waiting for it.
    pub(super) fn start(&mut self, code: RemoteAddr, table: RemoteAddr) -> Result<()> {
        let registers = arch::enter(&self.registers, code, table);
        self.dirty = true;
        ptrace::set_registers(self.tid, &registers)
            .map_err(InjectError::trace(self.tid, "set the registers of"))?;
        ptrace::resume(self.tid, 0).map_err(InjectError::trace(self.tid, "resume"))
    }

    /// Waits for the trap at the end of the table; `born` is told of threads and
    /// processes that it makes.
    pub(super) fn join(&mut self, born: &mut dyn FnMut(HostPid) -> Result<()>) -> Result<()> {
        loop {
            match self.wait()? {
                Wait::Signal(libc::SIGTRAP) => return Ok(()),
                Wait::Event(
                    libc::PTRACE_EVENT_CLONE | libc::PTRACE_EVENT_FORK | libc::PTRACE_EVENT_VFORK,
                ) => {
                    let child = ptrace::event_message(self.tid)
                        .map_err(InjectError::trace(self.tid, "ask for the child of"))?;
                    born(HostPid(i32::try_from(child).expect("pids are small")))?;
                    ptrace::resume(self.tid, 0).map_err(InjectError::trace(self.tid, "resume"))?;
                }
                // Such as a stop of the process, which it will be told of later.
                Wait::Stopped(_) | Wait::Interrupted => {
                    ptrace::resume(self.tid, 0).map_err(InjectError::trace(self.tid, "resume"))?;
                }
                // Blocked signals do not come; these do, and are not for the worker.
                Wait::Signal(libc::SIGSTOP | libc::SIGCHLD) => {
                    ptrace::resume(self.tid, 0).map_err(InjectError::trace(self.tid, "resume"))?;
                }
                other => return Err(lost(self.tid, other)),
            }
        }
    }

    fn wait(&self) -> Result<Wait> {
        ptrace::wait(self.tid).map_err(InjectError::trace(self.tid, "wait for"))
    }

    /// Puts the thread back into the state that it was found in, still stopped.
    ///
    /// # Errors
    /// [`InjectError::Trace`] if it has died.
    pub fn put_back(&mut self) -> Result<()> {
        if !self.dirty {
            return Ok(());
        }
        let failed = |step| InjectError::trace(self.tid, step);
        ptrace::set_registers(self.tid, &self.registers).map_err(failed("set the registers of"))?;
        ptrace::set_signal_mask(self.tid, self.signal_mask)
            .map_err(failed("set the signal mask of"))?;
        if self.rseq_cs != 0 {
            // The kernel clears it when the thread runs outside of the section.
            let address = RemoteAddr(self.rseq.pointer).plus(RSEQ_CS_OFFSET);
            process::write_memory(self.tid, address, &self.rseq_cs.to_le_bytes()).map_err(
                |source| InjectError::Memory {
                    tid: self.tid,
                    step: "write",
                    address,
                    len: 8,
                    source,
                },
            )?;
        }
        self.dirty = false;
        Ok(())
    }

    /// Puts the thread back and lets it go on, or stay as stopped as it was.
    ///
    /// # Errors
    /// [`InjectError::Trace`] if it has died.
    pub fn release(mut self) -> Result<()> {
        self.put_back()?;
        ptrace::detach(self.tid, 0).map_err(InjectError::trace(self.tid, "detach from"))
    }
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

pub(super) fn denied(tid: HostPid, errno: Errno) -> InjectError {
    if errno != Errno::EPERM {
        return InjectError::Trace { tid, step: "trace", source: errno };
    }
    let tracer = proc::status(tid).map(|status| status.tracer_pid.0).unwrap_or_default();
    let why = if tracer == 0 {
        "not permitted; run as root or with CAP_SYS_PTRACE".to_owned()
    } else {
        format!("process {tracer} traces it already; end that one first")
    };
    InjectError::Denied { tid, why }
}

/// Bytes of a mapping that are searched at a time.
const SEARCH_BYTES: usize = 64 << 10;

/// Finds an instruction in a process that calls the kernel: in the vDSO, else
/// anywhere.
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
            let found = buffer
                .windows(SYSCALL_INSTRUCTION.len())
                .position(|window| window == SYSCALL_INSTRUCTION);
            if let Some(offset) = found {
                return Ok(next.plus(offset as u64));
            }
            next = next.plus(buffer.len() as u64);
        }
    }
    Err(unread.unwrap_or(InjectError::NoSyscall { tid: pid }))
}
