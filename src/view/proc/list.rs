//! Processes, descriptors and mappings as rows of tables.

use super::{
    Proc, Who,
    memory::{Text, protection},
};
use crate::{image::vma, view::Result};

/// A process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProcessRow {
    /// Its pid in its own pid namespace.
    pub pid: u32,
    /// The pid of its parent; 0 if the parent is not in the tree.
    pub ppid: u32,
    /// Its effective user id, if the images have it.
    pub uid: Option<u32>,
    /// `S`, `T` or `Z`, as in `ps`.
    pub state: char,
    /// The number of threads.
    pub threads: usize,
    /// The size of its mappings in bytes.
    pub mapped: u64,
    /// The bytes of its private memory in images, in any snapshot.
    pub private: u64,
    /// The bytes in images of the shared objects that it maps.
    pub shared: u64,
    /// Its command line, with spaces between the arguments; without one, its name in brackets.
    pub command: String,
}

/// A descriptor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DescriptorRow {
    /// The pid of its process.
    pub pid: u32,
    /// Its number.
    pub fd: u32,
    /// `r`, `w`, `u` for both, or `-` for neither, as in `lsof`.
    pub access: char,
    /// Whether `execve(2)` closes it.
    pub close_on_exec: bool,
    /// The position in the file; 0 if it has none.
    pub position: u64,
    /// Its target, as its link in `/proc/PID/fd` shows it.
    pub target: String,
}

/// A mapping.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MappingRow {
    /// The first address.
    pub start: u64,
    /// The address after the last byte.
    pub end: u64,
    /// `rwxp`, as in `/proc/PID/maps`.
    pub protection: String,
    /// The bytes of private pages there that are in images.
    pub private: u64,
    /// The bytes of a shared object there that are in images.
    pub shared: u64,
    /// The mapped object; empty for memory without a name.
    pub name: String,
}

/// `O_ACCMODE` (`asm-generic/fcntl.h`), and `FD_CLOEXEC` as images have it.
const ACCESS: u32 = 3;
const PATH_ONLY: u32 = 0o10_000_000;
const FD_CLOEXEC: u32 = 1;

impl Proc<'_> {
    /// Returns the processes, parents first, in the order of the images.
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

    /// Returns the descriptors of a process in ascending order.
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

    /// Returns the mappings of a process in ascending order.
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
