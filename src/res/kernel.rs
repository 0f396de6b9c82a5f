//! State that only the memory of the kernel shows.
//!
//! No system call shows the data in a connection that was not accepted, or in a message queue, and
//! leaves it there; none counts the AIO requests in flight, or shows what the kernel undoes at the
//! end of a process. So the dump follows the kernel's structures, starting at its own task or at a
//! descriptor of the file. The kernel's type information says where their members are. The dump compares lengths
//! and counts in the structures with those that system calls return.

use std::{collections::HashMap, fs, os::fd::AsRawFd, os::fd::BorrowedFd};

use nix::{errno::Errno, libc};
use thiserror::Error;

use crate::{
    proc::Btf,
    sys::kernel_memory::{KernelAddr, KernelMemory, TYPES},
};

/// An error of reading the memory of the kernel.
#[derive(Debug, Error)]
pub(super) enum KernelError {
    /// The kernel lets rcriu load no BPF program.
    #[error("load a BPF program that reads memory of the kernel")]
    Load(#[source] Errno),
    /// The kernel does not show its types.
    #[error("read the kernel's type information, {TYPES}")]
    Types(#[source] std::io::Error),
    /// The type information has an unknown format.
    #[error("understand the kernel's type information, {TYPES}")]
    Malformed,
    /// A structure lacks a member.
    #[error("find {member} of struct {structure} in the kernel's type information")]
    Member {
        /// The structure.
        structure: &'static str,
        /// The member.
        member: &'static str,
    },
    /// An object could not be read.
    #[error("read {what} at {:#x} in the kernel", at.0)]
    Read {
        /// The object.
        what: &'static str,
        /// Its address.
        at: KernelAddr,
        /// The cause.
        source: Errno,
    },
    /// The memory of a process, which leads to it in the kernel, cannot be opened.
    #[error("open the memory of the process")]
    Open(#[source] std::io::Error),
    /// The kernel does not list its processors.
    #[error("list the processors")]
    Processors(#[source] std::io::Error),
    /// This thread cannot run on each processor.
    #[error("run on each processor")]
    Run(#[source] Errno),
    /// The structures contradict system calls.
    #[error("understand {0} in the kernel")]
    Unexpected(&'static str),
}

/// The result of reading the memory of the kernel.
pub(super) type KernelResult<T> = Result<T, KernelError>;

/// The kernel's structures.
#[derive(Debug)]
pub(super) struct Kernel {
    memory: KernelMemory,
    types: Btf,
    /// The table of open files of this process.
    files: KernelAddr,
    /// Where the kernel has mapped memory, once a reader needs it.
    variables: Option<Variables>,
}

/// The binary logarithm of the size of a page.
const PAGE_SHIFT: u32 = 12;

/// Where the kernel has mapped all memory, and the structures of its pages
/// (`arch/x86/include/asm/page_64.h`).
#[derive(Clone, Copy, Debug)]
struct Variables {
    memory: KernelAddr,
    pages: KernelAddr,
}

/// A pid, as rcriu sees it, with the ids that were sent with it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Credentials {
    /// 0 if it belongs to another pid namespace.
    pub(super) pid: i32,
    /// The user.
    pub(super) uid: u32,
    /// The group.
    pub(super) gid: u32,
    /// Further groups.
    pub(super) groups: Vec<u32>,
}

impl Kernel {
    /// Prepares for reading. Changes nothing.
    pub(super) fn open() -> KernelResult<Self> {
        let mut memory = KernelMemory::open().map_err(KernelError::Load)?;
        let types = Btf::parse(fs::read(TYPES).map_err(KernelError::Types)?);
        let types = types.ok_or(KernelError::Malformed)?;
        let task = memory.current_task().map_err(KernelError::Load)?;
        let mut kernel = Self { memory, types, files: task, variables: None };
        kernel.files = kernel.pointer(task, "task_struct", "files")?;
        Ok(kernel)
    }

    fn offset(&self, structure: &'static str, member: &'static str) -> KernelResult<u64> {
        self.types.offset(structure, member).ok_or(KernelError::Member { structure, member })
    }

    pub(super) fn size(&self, structure: &'static str) -> KernelResult<u64> {
        self.types.size(structure).ok_or(KernelError::Member { structure, member: "the size" })
    }

    /// Returns the address of a member.
    pub(super) fn member(
        &self,
        at: KernelAddr,
        structure: &'static str,
        member: &'static str,
    ) -> KernelResult<KernelAddr> {
        Ok(at.plus(self.offset(structure, member)?))
    }

    /// Returns the address of the structure that contains `at` as this member.
    pub(super) fn containing(
        &self,
        at: KernelAddr,
        structure: &'static str,
        member: &'static str,
    ) -> KernelResult<KernelAddr> {
        Ok(at.minus(self.offset(structure, member)?))
    }

    /// Reads bytes.
    pub(super) fn bytes(
        &mut self,
        at: KernelAddr,
        len: usize,
        what: &'static str,
    ) -> KernelResult<Vec<u8>> {
        let mut bytes = vec![0; len];
        self.memory.read(at, &mut bytes).map_err(|source| KernelError::Read {
            what,
            at,
            source,
        })?;
        Ok(bytes)
    }

    /// Reads a number of 8 bytes.
    pub(super) fn long_at(&mut self, at: KernelAddr, what: &'static str) -> KernelResult<u64> {
        let bytes = self.bytes(at, 8, what)?;
        Ok(u64::from_ne_bytes(bytes.try_into().expect("8 bytes")))
    }

    /// Reads a member of 8 bytes.
    pub(super) fn long(
        &mut self,
        at: KernelAddr,
        structure: &'static str,
        member: &'static str,
    ) -> KernelResult<u64> {
        let at = self.member(at, structure, member)?;
        self.long_at(at, structure)
    }

    /// Reads a member that is a pointer.
    pub(super) fn pointer(
        &mut self,
        at: KernelAddr,
        structure: &'static str,
        member: &'static str,
    ) -> KernelResult<KernelAddr> {
        self.long(at, structure, member).map(KernelAddr)
    }

    /// Reads a member of 4 bytes.
    pub(super) fn word(
        &mut self,
        at: KernelAddr,
        structure: &'static str,
        member: &'static str,
    ) -> KernelResult<u32> {
        let at = self.member(at, structure, member)?;
        let bytes = self.bytes(at, 4, structure)?;
        Ok(u32::from_ne_bytes(bytes.try_into().expect("4 bytes")))
    }

    /// Returns the `task_struct` of this thread.
    pub(super) fn task(&mut self) -> KernelResult<KernelAddr> {
        self.memory.current_task().map_err(KernelError::Load)
    }

    /// Returns where a variable is that each processor has, from the start of their section on.
    pub(super) fn per_cpu_variable(&self, name: &'static str) -> KernelResult<u64> {
        let found = self.types.per_cpu_variable(name);
        found.ok_or(KernelError::Member { structure: "per-CPU variables", member: name })
    }

    /// Returns the `struct file` of a descriptor of this process.
    pub(super) fn file(&mut self, fd: BorrowedFd) -> KernelResult<KernelAddr> {
        let number = u64::try_from(fd.as_raw_fd()).expect("descriptors are not negative");
        let files = self.files;
        let table = self.pointer(files, "files_struct", "fdt")?;
        let list = self.pointer(table, "fdtable", "fd")?;
        let file = KernelAddr(self.long_at(list.plus(number * 8), "a table of files")?);
        if file.is_null() {
            return Err(KernelError::Unexpected("a table of files"));
        }
        Ok(file)
    }

    /// Returns the files of all descriptors of this process.
    pub(super) fn own_files(&mut self) -> KernelResult<HashMap<KernelAddr, i32>> {
        let files = self.files;
        let table = self.pointer(files, "files_struct", "fdt")?;
        let count = self.word(table, "fdtable", "max_fds")?;
        let list = self.pointer(table, "fdtable", "fd")?;
        let bytes = self.bytes(list, count as usize * 8, "a table of files")?;
        let addresses = bytes
            .chunks_exact(8)
            .map(|bytes| KernelAddr(u64::from_ne_bytes(bytes.try_into().expect("chunks of 8"))));
        Ok(addresses.zip(0..).filter(|(address, _)| !address.is_null()).collect())
    }

    /// Returns the number of a `struct pid` as rcriu sees it; 0 if it does not.
    pub(super) fn pid(&mut self, pid: KernelAddr) -> KernelResult<i32> {
        if pid.is_null() {
            return Ok(0);
        }
        let task = self.task()?;
        let own = self.pointer(task, "task_struct", "thread_pid")?;
        let level = self.word(own, "pid", "level")?;
        let step = self.size("upid")?;
        let place = |kernel: &Self, pid| -> KernelResult<KernelAddr> {
            let at = kernel.member(pid, "pid", "numbers")?;
            Ok(at.plus(step * u64::from(level)))
        };
        if self.word(pid, "pid", "level")? < level {
            return Ok(0);
        }
        let (theirs, ours) = (place(self, pid)?, place(self, own)?);
        if self.pointer(theirs, "upid", "ns")? != self.pointer(ours, "upid", "ns")? {
            return Ok(0);
        }
        Ok(self.word(theirs, "upid", "nr")?.cast_signed())
    }

    /// Returns the effective ids and the groups of a `struct cred`.
    pub(super) fn credentials(
        &mut self,
        pid: KernelAddr,
        cred: KernelAddr,
    ) -> KernelResult<Credentials> {
        let list = self.pointer(cred, "cred", "group_info")?;
        let count = self.word(list, "group_info", "ngroups")?;
        if count > libc::c_uint::from(u16::MAX) + 1 {
            return Err(KernelError::Unexpected("groups"));
        }
        let at = self.member(list, "group_info", "gid")?;
        let groups = self.bytes(at, count as usize * 4, "groups")?;
        let word = |bytes: &[u8]| u32::from_ne_bytes(bytes.try_into().expect("chunks of 4"));
        Ok(Credentials {
            pid: self.pid(pid)?,
            uid: self.word(cred, "cred", "euid")?,
            gid: self.word(cred, "cred", "egid")?,
            groups: groups.chunks_exact(4).map(word).collect(),
        })
    }

    /// Returns where the kernel has mapped the page of a `struct page`.
    ///
    /// # Errors
    /// [`KernelError::Unexpected`] before [`Self::find_pages`].
    pub(super) fn page(&self, page: KernelAddr) -> KernelResult<KernelAddr> {
        let variables = self.variables.ok_or(KernelError::Unexpected("where memory is mapped"))?;
        self.page_at(page, variables)
    }

    fn page_at(&self, page: KernelAddr, variables: Variables) -> KernelResult<KernelAddr> {
        let number = page.0.wrapping_sub(variables.pages.0) / self.size("page")?.max(1);
        Ok(variables.memory.plus(number << PAGE_SHIFT))
    }

    /// Whether [`Self::page`] may be used.
    pub(super) fn knows_pages(&self) -> bool {
        self.variables.is_some()
    }

    /// Finds out where the kernel has mapped all memory, and the structures of its pages, from a
    /// `struct page` whose bytes at `offset` are `known`, which no other page has.
    ///
    /// Both places are random, but multiples of 1 GiB (`arch/x86/mm/kaslr.c`); every object of
    /// the kernel's allocator, such as the table of files, is behind the first.
    pub(super) fn find_pages(
        &mut self,
        page: KernelAddr,
        offset: u64,
        known: &[u8],
    ) -> KernelResult<()> {
        const ALIGNMENT: u64 = 1 << 30;
        // Enough for 16 TiB of memory.
        const MEMORY_MAX: u64 = 1 << 14;
        const PAGES_MAX: u64 = 1 << 8;
        let before = |at: KernelAddr, count: u64| {
            (0..count).map(move |step| KernelAddr((at.0 & !(ALIGNMENT - 1)) - step * ALIGNMENT))
        };
        let files = self.files;
        let mut bytes = vec![0; known.len()];
        for pages in before(page, PAGES_MAX) {
            for memory in before(files, MEMORY_MAX) {
                let variables = Variables { memory, pages };
                let at = self.page_at(page, variables)?.plus(offset);
                if self.memory.read(at, &mut bytes).is_ok() && bytes == known {
                    self.variables = Some(variables);
                    return Ok(());
                }
            }
        }
        Err(KernelError::Unexpected("where memory is mapped"))
    }
}
