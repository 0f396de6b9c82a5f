//! Scratch memory in another process, from which its threads work for us.

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

/// Bytes of scratch memory for tables and data, unless more is asked for.
pub const TABLE_BYTES: usize = 64 << 10;

/// Bytes mapped for the code.
const CODE_BYTES: u64 = PAGE_SIZE;

/// Room for scratch memory is `MAP_PRIVATE | MAP_ANONYMOUS`; and not reserved, it is joined
/// with no neighbour: that would make all of the neighbour's pages soft-dirty, and is more
/// to put back.
pub(super) const MAP_FLAGS: i32 =
    libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED_NOREPLACE;

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

    /// Whether there is none: never.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Maps scratch memory at `place`, by a stopped thread of a process that ends if this
    /// program does.
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

    /// Makes a call that has to succeed.
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

    /// Lets a thread make the calls of a script, and returns what came of them.
    /// Its other threads may work at the same time in other scratch memory only.
    ///
    /// # Errors
    /// [`InjectError::Call`] for the first call that had to succeed and did not;
    /// [`InjectError::TooLong`], [`InjectError::Lost`].
    pub fn run(&self, tracee: &mut Tracee, script: &Script) -> Result<Answers> {
        self.run_births(tracee, script, &mut no_births)
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
        tracee.join(Sign::Trap, born)?;
        self.answers(tracee.tid, script)
    }

    /// As [`Self::run`], but the thread is stopped at each call instead of by a trap, so
    /// that no `SIGTRAP` is taken that waits for it.
    ///
    /// # Errors
    /// As [`Self::run`].
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

    /// As [`Self::run`]; `act` is called when the script pauses, with the answers so far.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub fn run_paused(
        &self,
        tracee: &mut Tracee,
        script: &Script,
        act: &mut dyn FnMut(&Answers),
    ) -> Result<Answers> {
        self.start(tracee, script)?;
        self.go_on_paused(tracee, Sign::Trap, script, act)
    }

    /// Waits for the pause of a script that was begun with, acts, and waits for its end.
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

    /// Starts a script in a thread; another caller waits for it.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub fn start(&self, tracee: &mut Tracee, script: &Script) -> Result<()> {
        self.load(tracee.tid, script)?;
        tracee.set_registers(&arch::enter(&tracee.registers, self.start, self.table()))?;
        tracee.block(MASK_FOR_TRAPS)?;
        tracee.start()
    }

    /// Lets a thread begin with a script that does not come to an end, and lets go of it.
    ///
    /// # Errors
    /// As [`Self::run`].
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

    /// Reads what came of a script.
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

/// Returns the error of a call that had to succeed.
pub(super) fn failed_call(
    tid: HostPid,
    script: &Script,
    (position, source): (usize, Errno),
) -> InjectError {
    InjectError::Call { tid, what: script.what(position).to_owned(), source }
}

/// For scripts that make no thread and no process.
pub(super) fn no_births(child: HostPid) -> Result<()> {
    Err(InjectError::Lost { tid: child, what: "was born".into() })
}

pub(super) fn bits(flags: i32) -> u64 {
    u64::from(flags.cast_unsigned())
}
