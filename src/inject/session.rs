//! Scratch memory in another process, from which its threads work for us.

use nix::{errno::Errno, libc};

use super::{
    Answers, InjectError, Result, Script, arch,
    tracee::{Tracee, find_syscall},
};
use crate::{
    fault::{self, Point},
    proc::{self, Mapping},
    sys::process,
    units::{HostPid, PAGE_SIZE, RemoteAddr},
};

/// Bytes of scratch memory for tables and data, unless more is asked for.
pub const TABLE_BYTES: usize = 64 << 10;

/// Bytes mapped for the code.
const CODE_BYTES: u64 = PAGE_SIZE;

/// `SIGTRAP`'s bit in a signal set.
const TRAP_BIT: u64 = 1 << (libc::SIGTRAP - 1);

/// Bytes of `struct kernel_sigaction` on x86-64.
const SIGACTION_BYTES: usize = 32;

/// Scratch memory: a page of code and a table behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scratch {
    /// Where the code is.
    pub start: RemoteAddr,
    /// Bytes of the table.
    pub table_bytes: usize,
    /// An instruction that calls the kernel, outside of the scratch memory.
    pub instruction: RemoteAddr,
}

impl Scratch {
    /// Returns where the table is.
    pub fn table(&self) -> RemoteAddr {
        self.start.plus(CODE_BYTES)
    }

    /// Returns the bytes of code and table together.
    pub fn len(&self) -> u64 {
        CODE_BYTES + self.table_bytes as u64
    }

    /// Returns the address of a page that nobody has written to, before the first script.
    pub fn untouched(&self) -> RemoteAddr {
        self.table()
    }

    /// Whether there is none: never.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Maps scratch memory through a stopped thread of the process: at `place`, or
    /// where the kernel likes.
    ///
    /// # Errors
    /// [`InjectError::NoSyscall`], [`InjectError::Call`], [`InjectError::Trace`].
    pub fn map(
        tracee: &mut Tracee,
        mappings: &[Mapping],
        place: Option<RemoteAddr>,
        table_bytes: usize,
    ) -> Result<Self> {
        let instruction = find_syscall(tracee.tid, mappings)?;
        let table_bytes = table_bytes.next_multiple_of(usize::try_from(PAGE_SIZE).expect("small"));
        let mut scratch = Self { start: RemoteAddr(0), table_bytes, instruction };
        tracee.begin_work()?;
        // Not reserved, it is joined with no neighbour: that would make all of the
        // neighbour's pages soft-dirty, and is more to put back.
        let flags = libc::MAP_PRIVATE
            | libc::MAP_ANONYMOUS
            | libc::MAP_NORESERVE
            | place.map_or(0, |_| libc::MAP_FIXED_NOREPLACE);
        let map = [
            place.unwrap_or_default().0,
            scratch.len(),
            bits(libc::PROT_READ | libc::PROT_WRITE),
            bits(flags),
            u64::MAX,
            0,
        ];
        scratch.start =
            RemoteAddr(made(tracee, instruction, "map scratch memory", libc::SYS_mmap, map)?);
        let protect =
            [scratch.start.0, CODE_BYTES, bits(libc::PROT_READ | libc::PROT_EXEC), 0, 0, 0];
        let result = scratch.load_code(tracee.tid).and_then(|()| {
            let what = "make scratch memory executable (PR_SET_MDWE forbids it, and is not dumped)";
            made(tracee, instruction, what, libc::SYS_mprotect, protect)
        });
        if let Err(error) = result {
            scratch.unmap(tracee)?;
            return Err(error);
        }
        Ok(scratch)
    }

    /// Returns the same scratch memory with the instruction that calls the kernel in
    /// its own code, for when nothing else is left of the address space.
    #[must_use]
    pub fn on_its_own(self) -> Self {
        let offset = arch::code()
            .windows(arch::SYSCALL_INSTRUCTION.len())
            .position(|window| window == arch::SYSCALL_INSTRUCTION)
            .expect("the code calls the kernel");
        Self { instruction: self.start.plus(offset as u64), ..self }
    }

    /// Writes the code, as long as its page is writable.
    fn load_code(&self, tid: HostPid) -> Result<()> {
        let code = arch::code();
        process::write_memory(tid, self.start, code).map_err(|source| InjectError::Memory {
            tid,
            step: "write",
            address: self.start,
            len: code.len() as u64,
            source,
        })
    }

    /// Unmaps the scratch memory.
    ///
    /// # Errors
    /// [`InjectError::Call`], [`InjectError::Trace`].
    pub fn unmap(&self, tracee: &mut Tracee) -> Result<()> {
        let unmap = [self.start.0, self.len(), 0, 0, 0, 0];
        made(tracee, self.instruction, "unmap scratch memory", libc::SYS_munmap, unmap).map(drop)
    }

    /// Lets a thread make the calls of a script, and returns what came of them.
    /// Its other threads may work at the same time in other scratch memory only.
    ///
    /// # Errors
    /// [`InjectError::Call`] for the first call that had to succeed and did not;
    /// [`InjectError::TooLong`], [`InjectError::Lost`].
    pub fn run(&self, tracee: &mut Tracee, script: &Script) -> Result<Answers> {
        self.run_births(tracee, script, &mut |child| {
            Err(InjectError::Lost { tid: child, what: "was born".into() })
        })
    }

    /// As [`Self::run`], for scripts that make threads or processes: `born` is told
    /// of each while the thread waits.
    ///
    /// # Errors
    /// As [`Self::run`], and what `born` returns.
    pub fn run_births(
        &self,
        tracee: &mut Tracee,
        script: &Script,
        born: &mut dyn FnMut(HostPid) -> Result<()>,
    ) -> Result<Answers> {
        self.start(tracee, script)?;
        tracee.join(born)?;
        self.answers(tracee, script)
    }

    /// Lets a thread begin with a script; [`Self::join`] waits for it.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub fn start(&self, tracee: &mut Tracee, script: &Script) -> Result<()> {
        let bytes = script.bytes_needed();
        let limit = self.table_bytes - SIGACTION_BYTES;
        if bytes > limit {
            return Err(InjectError::TooLong { tid: tracee.tid, bytes, limit });
        }
        let mut table = vec![0; bytes];
        script.write(&mut table, self.table());
        let failed = |source| self.memory(tracee.tid, "write", bytes, source);
        process::write_memory(tracee.tid, self.table(), &table).map_err(failed)?;
        tracee.start(self.start, self.table())
    }

    /// Waits until a thread is through with a script.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub fn join(&self, tracee: &mut Tracee, script: &Script) -> Result<Answers> {
        tracee.join(&mut |child| Err(InjectError::Lost { tid: child, what: "was born".into() }))?;
        self.answers(tracee, script)
    }

    fn answers(&self, tracee: &Tracee, script: &Script) -> Result<Answers> {
        let tid = tracee.tid;
        let mut table = vec![0; script.bytes_needed()];
        process::read_memory(tid, self.table(), &mut table)
            .map_err(|source| self.memory(tid, "read", table.len(), source))?;
        script.read(&table).map_err(|(position, source)| InjectError::Call {
            tid,
            what: script.what(position).to_owned(),
            source,
        })
    }

    fn memory(&self, tid: HostPid, step: &'static str, len: usize, source: Errno) -> InjectError {
        InjectError::Memory { tid, step, address: self.table(), len: len as u64, source }
    }
}

fn bits(flags: i32) -> u64 {
    u64::from(flags.cast_unsigned())
}

/// Makes a call that has to succeed.
fn made(
    tracee: &mut Tracee,
    instruction: RemoteAddr,
    what: &str,
    number: libc::c_long,
    arguments: [u64; 6],
) -> Result<u64> {
    let tid = tracee.tid;
    tracee.call(instruction, number, arguments)?.map_err(|source| InjectError::Call {
        tid,
        what: what.to_owned(),
        source,
    })
}

/// Lets threads of a process make system calls and puts everything back: scratch
/// memory lives as long as `work` runs.
///
/// The trap at the end of a script makes the kernel forget that `SIGTRAP` is
/// ignored, if it is; that is put back, too.
///
/// # Errors
/// What `work` returns, and whatever keeps the process from being put back.
pub fn with_scratch<T>(
    threads: &mut [Tracee],
    mappings: &[Mapping],
    table_bytes: usize,
    work: impl FnOnce(&Scratch, &mut [Tracee]) -> Result<T>,
) -> Result<T> {
    let pid = threads[0].tid;
    let traps_ignored = proc::status(pid)?.sig_ignored & TRAP_BIT != 0;
    let scratch = Scratch::map(&mut threads[0], mappings, None, table_bytes)?;
    let result = fault::hit(Point::DumpInjected).map_err(InjectError::from).and_then(|()| {
        for thread in &mut threads[1..] {
            thread.begin_work()?;
        }
        let saved = traps_ignored.then(|| trap_action(&scratch, &mut threads[0])).transpose()?;
        let result = work(&scratch, threads);
        if saved.is_some() {
            restore_trap_action(&scratch, &mut threads[0])?;
        }
        result
    });
    let unmapped = scratch.unmap(&mut threads[0]);
    for thread in threads.iter_mut() {
        thread.put_back()?;
    }
    unmapped?;
    result
}

/// The end of the table, which scripts leave alone.
fn saved_action(scratch: &Scratch) -> RemoteAddr {
    scratch.table().plus((scratch.table_bytes - SIGACTION_BYTES) as u64)
}

fn trap_action(scratch: &Scratch, tracee: &mut Tracee) -> Result<()> {
    let signal = bits(libc::SIGTRAP);
    let arguments = [signal, 0, saved_action(scratch).0, 8, 0, 0];
    let what = "read the action of SIGTRAP";
    made(tracee, scratch.instruction, what, libc::SYS_rt_sigaction, arguments).map(drop)
}

fn restore_trap_action(scratch: &Scratch, tracee: &mut Tracee) -> Result<()> {
    let signal = bits(libc::SIGTRAP);
    let arguments = [signal, saved_action(scratch).0, 0, 8, 0, 0];
    let what = "set the action of SIGTRAP";
    made(tracee, scratch.instruction, what, libc::SYS_rt_sigaction, arguments).map(drop)
}
