//! Scratch memory, from which threads of another process make calls for rcriu.

use nix::{errno::Errno, libc};

use super::{
    Answers, InjectError, Result, Script,
    tracee::{MASK_FOR_TRAPS, Sign, Tracee, find_syscall},
};
use crate::{
    arch::native as arch,
    proc::Mapping,
    sys::{process, ptrace},
    units::{HostPid, PAGE_SIZE, RemoteAddr},
};

/// The default size of the table, which holds calls and data.
pub const TABLE_BYTES: usize = 64 << 10;

/// The size of the code.
const CODE_BYTES: u64 = PAGE_SIZE;

/// Flags for mapping scratch memory. `MAP_NORESERVE` keeps the kernel from merging it with a
/// neighbour: that would mark all pages of the neighbour as soft-dirty, and be more to undo.
pub(super) const MAP_FLAGS: i32 =
    libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED_NOREPLACE;

/// Scratch memory: one page of code, followed by a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scratch {
    /// The address of the code.
    pub start: RemoteAddr,
    /// The size of the table in bytes.
    pub table_bytes: usize,
    /// The address of a system call instruction outside the scratch memory.
    pub instruction: RemoteAddr,
}

impl Scratch {
    /// Returns the address of the table.
    pub fn table(&self) -> RemoteAddr {
        self.start.plus(CODE_BYTES)
    }

    /// Returns the size of code and table together, in bytes.
    pub fn len(&self) -> u64 {
        CODE_BYTES + self.table_bytes as u64
    }

    /// Always false.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Maps scratch memory at `place` through a stopped thread of a process that dies with rcriu.
    ///
    /// # Errors
    /// [`InjectError::NoSyscall`], [`InjectError::Call`], [`InjectError::Trace`].
    pub fn map(
        tracee: &mut Tracee,
        mappings: &[Mapping],
        place: RemoteAddr,
        table_bytes: usize,
    ) -> Result<Self> {
        let instruction = find_syscall(tracee.tid, mappings)?;
        let table_bytes = table_bytes.next_multiple_of(usize::try_from(PAGE_SIZE).expect("small"));
        let scratch = Self { start: place, table_bytes, instruction };
        let writable = libc::PROT_READ | libc::PROT_WRITE;
        let map = [place.0, scratch.len(), bits(writable), bits(MAP_FLAGS), u64::MAX, 0];
        scratch.made(tracee, MASK_FOR_TRAPS, "map scratch memory", libc::SYS_mmap, map)?;
        scratch.load_code(tracee.tid)?;
        let executable = bits(libc::PROT_READ | libc::PROT_EXEC);
        let protect = [scratch.start.0, CODE_BYTES, executable, 0, 0, 0];
        scratch.made(
            tracee,
            MASK_FOR_TRAPS,
            "make scratch memory executable",
            libc::SYS_mprotect,
            protect,
        )?;
        Ok(scratch)
    }

    /// Unmaps the scratch memory.
    ///
    /// # Errors
    /// [`InjectError::Call`], [`InjectError::Trace`].
    pub fn unmap(&self, tracee: &mut Tracee) -> Result<()> {
        let unmap = [self.start.0, self.len(), 0, 0, 0, 0];
        self.made(tracee, u64::MAX, "unmap scratch memory", libc::SYS_munmap, unmap)
    }

    /// Makes a call that must succeed.
    fn made(
        &self,
        tracee: &mut Tracee,
        mask: u64,
        what: &str,
        number: libc::c_long,
        arguments: [u64; 6],
    ) -> Result<()> {
        let result = tracee.call(self.instruction, None, mask, number, arguments)?;
        let failed = |source| InjectError::Call { tid: tracee.tid, what: what.into(), source };
        result.map(drop).map_err(failed)
    }

    /// Returns the same scratch memory, but with the system call instruction in its own code, for
    /// use when the rest of the address space is unmapped.
    #[must_use]
    pub fn on_its_own(self) -> Self {
        let offset = arch::code()
            .windows(arch::SYSCALL_INSTRUCTION.len())
            .position(|window| window == arch::SYSCALL_INSTRUCTION)
            .expect("the code calls the kernel");
        Self { instruction: self.start.plus(offset as u64), ..self }
    }

    /// Writes the code while its page is writable.
    pub(super) fn load_code(&self, tid: HostPid) -> Result<()> {
        let code = arch::code();
        process::write_memory(tid, self.start, code).map_err(|source| InjectError::Memory {
            tid,
            step: "write",
            address: self.start,
            len: code.len() as u64,
            source,
        })
    }

    /// Has a thread make the calls of a script, and returns the answers. Other threads of the
    /// process may run scripts at the same time only from other scratch memory.
    ///
    /// # Errors
    /// [`InjectError::Call`] for the first failed call that must succeed;
    /// [`InjectError::TooLong`], [`InjectError::Lost`].
    pub fn run(&self, tracee: &mut Tracee, script: &Script) -> Result<Answers> {
        self.run_births(tracee, script, &mut no_births)
    }

    /// Like [`Self::run`], for scripts that create threads or processes. `born` is called with
    /// each of them while the creating thread waits.
    ///
    /// # Errors
    /// Those of [`Self::run`] and of `born`.
    pub fn run_births(
        &self,
        tracee: &mut Tracee,
        script: &Script,
        born: &mut dyn FnMut(HostPid) -> Result<()>,
    ) -> Result<Answers> {
        self.start(tracee, script)?;
        tracee.join(Sign::Trap, born)?;
        self.answers(tracee.tid, script)
    }

    /// Like [`Self::run`], but stops the thread at each call instead of by a trap, so that a
    /// pending `SIGTRAP` of the thread is not consumed.
    pub fn run_without_traps(&self, tracee: &mut Tracee, script: &Script) -> Result<Answers> {
        let (tid, at) = (tracee.tid, self.table());
        let mut data = script.data(at);
        if data.len() > self.table_bytes {
            let (bytes, limit) = (data.len(), self.table_bytes);
            return Err(InjectError::TooLong { tid, bytes, limit });
        }
        process::write_memory(tid, at, &data)
            .map_err(|source| self.memory(tid, "write", data.len(), source))?;
        let call =
            |number, arguments| tracee.call(self.instruction, None, u64::MAX, number, arguments);
        let results = script.walk(at, call, |_| Ok::<_, InjectError>(()))?;
        process::read_memory(tid, at, &mut data)
            .map_err(|source| self.memory(tid, "read", data.len(), source))?;
        script.conclude(&results, data).map_err(|failed| failed_call(tid, script, failed))
    }

    /// Like [`Self::run`]; calls `act` with the answers so far when the script pauses.
    pub fn run_paused(
        &self,
        tracee: &mut Tracee,
        script: &Script,
        act: &mut dyn FnMut(&Answers),
    ) -> Result<Answers> {
        self.start(tracee, script)?;
        self.go_on_paused(tracee, Sign::Trap, script, act)
    }

    /// Waits until a started script pauses, calls `act`, and waits until the script ends.
    pub(super) fn go_on_paused(
        &self,
        tracee: &mut Tracee,
        sign: Sign,
        script: &Script,
        act: &mut dyn FnMut(&Answers),
    ) -> Result<Answers> {
        tracee.join(sign, &mut no_births)?;
        act(&self.answers(tracee.tid, script)?);
        tracee.start()?;
        tracee.join(sign, &mut no_births)?;
        self.answers(tracee.tid, script)
    }

    /// Starts a script without waiting for its end.
    pub fn start(&self, tracee: &mut Tracee, script: &Script) -> Result<()> {
        self.load(tracee.tid, script)?;
        tracee.set_registers(&arch::enter(&tracee.registers, self.start, self.table()))?;
        tracee.block(MASK_FOR_TRAPS)?;
        tracee.start()
    }

    /// Starts a script that never returns, and detaches from the thread.
    pub fn let_go(&self, mut tracee: Tracee, script: &Script) -> Result<()> {
        let tid = tracee.tid;
        self.load(tid, script)?;
        tracee.set_registers(&arch::enter(&tracee.registers, self.start, self.table()))?;
        tracee.block(u64::MAX)?;
        ptrace::detach(tid, 0).map_err(InjectError::trace(tid, "detach from"))
    }

    /// Writes the table of a script.
    pub(super) fn load(&self, tid: HostPid, script: &Script) -> Result<()> {
        let (bytes, limit) = (script.bytes_needed(), self.table_bytes);
        if bytes > limit {
            return Err(InjectError::TooLong { tid, bytes, limit });
        }
        let mut table = vec![0; bytes];
        script.write(&mut table, self.table());
        process::write_memory(tid, self.table(), &table)
            .map_err(|source| self.memory(tid, "write", bytes, source))
    }

    /// Reads the answers of a script.
    pub(super) fn answers(&self, tid: HostPid, script: &Script) -> Result<Answers> {
        let mut table = vec![0; script.bytes_needed()];
        process::read_memory(tid, self.table(), &mut table)
            .map_err(|source| self.memory(tid, "read", table.len(), source))?;
        script.read(&table).map_err(|failed| failed_call(tid, script, failed))
    }

    fn memory(&self, tid: HostPid, step: &'static str, len: usize, source: Errno) -> InjectError {
        InjectError::Memory { tid, step, address: self.table(), len: len as u64, source }
    }
}

/// Returns the error of a failed call that must succeed.
pub(super) fn failed_call(
    tid: HostPid,
    script: &Script,
    (position, source): (usize, Errno),
) -> InjectError {
    InjectError::Call { tid, what: script.what(position).to_owned(), source }
}

/// The `born` callback for scripts that create no threads or processes.
pub(super) fn no_births(child: HostPid) -> Result<()> {
    Err(InjectError::Lost { tid: child, what: "was created unexpectedly".into() })
}

pub(super) fn bits(flags: i32) -> u64 {
    u64::from(flags.cast_unsigned())
}
