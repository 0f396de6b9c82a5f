//! What messages call an open file of the images: by its user and its path.

use crate::image::{
    proto::{FdinfoEntry, FileEntry, FsEntry, MmEntry, VmaEntry},
    vma,
};

/// What a process uses files as.
#[derive(Clone, Copy, Debug)]
pub struct Uses<'a> {
    /// The process.
    pub pid: u32,
    /// Its descriptors.
    pub fds: &'a [FdinfoEntry],
    /// Its root and working directory.
    pub fs: &'a FsEntry,
    /// The program that it executes.
    pub mm: &'a MmEntry,
    /// The files that it maps.
    pub vmas: &'a [VmaEntry],
}

impl Uses<'_> {
    fn of(&self, id: u32) -> Option<String> {
        let Self { pid, fds, fs, mm, vmas } = *self;
        if let Some(entry) = fds.iter().find(|entry| entry.id == id) {
            return Some(format!("descriptor {} of process {pid}", entry.fd));
        }
        for (what, used) in [
            ("working directory", fs.cwd_id),
            ("root directory", fs.root_id),
            ("program", mm.exe_file_id),
        ] {
            if used == id {
                return Some(format!("{what} of process {pid}"));
            }
        }
        let maps = |entry: &&VmaEntry| {
            entry.status & (vma::FILE_PRIVATE | vma::FILE_SHARED) != 0
                && entry.shmid == u64::from(id)
        };
        let mapping = vmas.iter().find(maps)?;
        Some(format!("mapping at {:#x} of process {pid}", mapping.start))
    }
}

/// Returns what messages call file `id` of the table `files`, as in "descriptor 3 of process
/// 12 (/var/log/messages)". Files that no process uses, such as those that wait in the queue
/// of a socket, go by their path or by their number.
pub fn of_file<'a>(
    id: u32,
    files: &[FileEntry],
    processes: impl IntoIterator<Item = Uses<'a>>,
) -> String {
    // Processes refer to a FIFO or a terminal, not to the entry that has its path.
    let refers = |entry: &&FileEntry| path_id(entry) == Some(id);
    let id = files.iter().find(refers).map_or(id, |entry| entry.id);
    let entry = |id: u32| files.iter().find(|entry| entry.id == id);
    let user = processes.into_iter().find_map(|uses| uses.of(id));
    let path = [Some(id), entry(id).and_then(path_id)].into_iter().flatten().find_map(|id| {
        let path = &entry(id)?.reg.as_ref()?.name;
        Some(String::from_utf8_lossy(path).into_owned())
    });
    match (user, path) {
        (Some(user), Some(path)) => format!("{user} ({path})"),
        (Some(user), None) => user,
        (None, Some(path)) => path,
        (None, None) => format!("file {id:#x} of the images"),
    }
}

/// Returns the number of the entry that has the path of a FIFO or a terminal.
fn path_id(entry: &FileEntry) -> Option<u32> {
    let fifo = entry.fifo.as_ref().and_then(|fifo| fifo.regf_id);
    fifo.or_else(|| entry.tty.as_ref().and_then(|tty| tty.regf_id))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::proto::{RegFileEntry, TtyFileEntry};

    fn file(id: u32, path: Option<&str>, regf_id: Option<u32>) -> FileEntry {
        let reg = path.map(|path| RegFileEntry { name: path.into(), ..Default::default() });
        let tty = regf_id.map(|id| TtyFileEntry { regf_id: Some(id), ..Default::default() });
        FileEntry { id, reg, tty, ..Default::default() }
    }

    #[test]
    fn a_file_goes_by_its_user_and_its_path() {
        let files = [
            file(2, Some("/var/log/messages"), None),
            file(3, Some("/dev/pts/0"), None),
            file(4, None, Some(3)),
            file(5, None, None),
            file(6, Some("/srv"), None),
            file(7, Some("/bin/dash"), None),
            file(8, Some("/queued"), None),
        ];
        let fds =
            [(0, 4), (3, 2), (9, 5)].map(|(fd, id)| FdinfoEntry { fd, id, ..Default::default() });
        let fs = FsEntry { cwd_id: 6, root_id: 6, ..Default::default() };
        let mm = MmEntry { exe_file_id: 70, ..Default::default() };
        let mapping =
            VmaEntry { start: 0x1000, status: vma::FILE_PRIVATE, shmid: 7, ..Default::default() };
        let uses = Uses { pid: 12, fds: &fds, fs: &fs, mm: &mm, vmas: &[mapping] };
        for (id, expected) in [
            (2, "descriptor 3 of process 12 (/var/log/messages)"),
            (3, "descriptor 0 of process 12 (/dev/pts/0)"),
            (4, "descriptor 0 of process 12 (/dev/pts/0)"),
            (5, "descriptor 9 of process 12"),
            (6, "working directory of process 12 (/srv)"),
            (7, "mapping at 0x1000 of process 12 (/bin/dash)"),
            (8, "/queued"),
            (70, "program of process 12"),
            (0x99, "file 0x99 of the images"),
        ] {
            assert_eq!(of_file(id, &files, [uses]), expected);
        }
    }
}
