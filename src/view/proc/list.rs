//! Processes, descriptors and mappings as rows of a table.

use super::{
    Proc, Who,
    memory::{Text, protection},
};
use crate::{image::vma, view::Result};

/// A process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProcessRow {
    /// Its pid, as it knew it.
    pub pid: u32,
    /// Its parent's; 0 if that is not in the tree.
    pub ppid: u32,
    /// Its effective user, where images tell.
    pub uid: Option<u32>,
    /// `S`, `T` or `Z`, as in `ps`.
    pub state: char,
    /// How many threads it has.
    pub threads: usize,
    /// Bytes of its mappings.
    pub mapped: u64,
    /// Bytes of its private memory that are in images, in whichever snapshot.
    pub private: u64,
    /// Bytes of the shared objects that it maps that are in images.
    pub shared: u64,
    /// Its command line with spaces between the words; its name in brackets if it has none.
    pub command: String,
}

/// A descriptor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DescriptorRow {
    /// The pid of its process.
    pub pid: u32,
    /// Its number.
    pub fd: u32,
    /// `r`, `w`, `u` for both, or `-` for neither, as `lsof` has it.
    pub access: char,
    /// Whether it is closed when a program is executed.
    pub close_on_exec: bool,
    /// The position in the file; 0 where there is none.
    pub position: u64,
    /// What it leads to, as its link in `/proc/PID/fd` says.
    pub target: String,
}

/// A mapping.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MappingRow {
    /// The first address.
    pub start: u64,
    /// The first address after it.
    pub end: u64,
    /// `rwxp`, as in `/proc/PID/maps`.
    pub protection: String,
    /// Bytes of the process's own pages there that are in images.
    pub private: u64,
    /// Bytes of a shared object there that are in images.
    pub shared: u64,
    /// What is mapped; empty for memory without a name.
    pub name: String,
}

/// `O_ACCMODE` (`asm-generic/fcntl.h`), and `FD_CLOEXEC` as images have it.
const ACCESS: u32 = 3;
const PATH_ONLY: u32 = 0o10_000_000;
const FD_CLOEXEC: u32 = 1;

impl Proc<'_> {
    /// Returns the processes, in the order of the images, parents first.
    pub(in crate::view) fn process_rows(&self) -> Result<Vec<ProcessRow>> {
        self.tables.tree()?.iter().map(|entry| self.process_row(entry.pid)).collect()
    }

    fn process_row(&self, pid: u32) -> Result<ProcessRow> {
        let task = self.task(Who { pid, tid: pid })?;
        let sizes = self.sizes(pid)?.unwrap_or_default();
        let words = self.memory_text(pid, Text::Arguments)?;
        let words = words.strip_suffix(b"\0").unwrap_or(&words);
        let command = if words.is_empty() {
            format!("[{}]", String::from_utf8_lossy(task.comm()))
        } else {
            String::from_utf8_lossy(words).replace(|c: char| c.is_control(), " ")
        };
        Ok(ProcessRow {
            pid,
            ppid: task.entry.ppid,
            uid: task.thread.creds.as_ref().map(|creds| creds.euid),
            state: task.state().0,
            threads: task.entry.threads.len().max(1),
            mapped: sizes.mapped,
            private: sizes.own,
            shared: sizes.shared,
            command,
        })
    }

    /// Returns the descriptors of a process, ascending.
    pub(in crate::view) fn descriptor_rows(&self, pid: u32) -> Result<Vec<DescriptorRow>> {
        self.entry(pid)?;
        let files = self.tables.files()?;
        let mut rows: Vec<DescriptorRow> = Vec::new();
        for entry in self.descriptors(pid)? {
            let flags = files.entry(entry.id).map_or(0, super::files::flags);
            let position = files.entry(entry.id).map_or(0, super::files::position);
            let access = match flags & ACCESS {
                _ if flags & PATH_ONLY != 0 => '-',
                0 => 'r',
                1 => 'w',
                _ => 'u',
            };
            rows.push(DescriptorRow {
                pid,
                fd: entry.fd,
                access,
                close_on_exec: entry.flags & FD_CLOEXEC != 0,
                position,
                target: String::from_utf8_lossy(&files.target(entry.id)).into_owned(),
            });
        }
        rows.sort_by_key(|row| row.fd);
        Ok(rows)
    }

    /// Returns the mappings of a process, ascending.
    pub(in crate::view) fn mapping_rows(&self, pid: u32) -> Result<Vec<MappingRow>> {
        self.entry(pid)?;
        let mm = self.tables.mm(pid)?.unwrap_or_default();
        let shown = self.shown(pid)?.into_iter();
        let rows = shown.filter(|mapping| mapping.entry.status & vma::VSYSCALL == 0);
        rows.map(|mapping| {
            let entry = &mapping.entry;
            let name = self.mapping_name(&mm, entry)?;
            Ok(MappingRow {
                start: entry.start,
                end: entry.end,
                protection: protection(entry),
                private: mapping.own,
                shared: mapping.shared,
                name: String::from_utf8_lossy(&name).into_owned(),
            })
        })
        .collect()
    }
}
