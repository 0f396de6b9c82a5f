//! Files that are opened by path: regular files, directories, devices without state, and `O_PATH`
//! descriptors of any file.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::{
    libc,
    sys::stat::{major, minor},
};

use super::{
    Collector, Deferred, Description, FileError, FileKind, Intake, Opened, Opener, Result, Usage,
    deferred, descriptor, path, unsupported, validation,
};
use crate::image::proto::{self, FdTypes};

pub(super) const KIND: FileKind = FileKind {
    name: "file",
    types: &[FdTypes::Reg],
    usage: Usage::Path,
    collector: |_| Box::new(RegularFiles),
    opener: |_| Box::new(RegularFiles),
};

/// The major number of memory devices (`include/uapi/linux/major.h`).
const MEM_MAJOR: u64 = 1;
/// Minor numbers of the memory devices without state: null, zero, full, random and urandom
/// (`drivers/char/mem.c`).
const HARMLESS_DEVICES: [u64; 5] = [3, 5, 7, 8, 9];

struct RegularFiles;

impl Collector for RegularFiles {
    fn claims(&self, file: &Description) -> bool {
        // Files without a path belong to other kinds.
        if file.link.first() != Some(&b'/') && !file.link.starts_with(b"(unreachable)") {
            return false;
        }
        match file.stat.st_mode & libc::S_IFMT {
            _ if descriptor::is_path(file.flags) => true,
            // Terminals have a kind of their own, which comes earlier.
            libc::S_IFREG | libc::S_IFDIR | libc::S_IFLNK | libc::S_IFBLK | libc::S_IFCHR => true,
            _ => false,
        }
    }

    fn collect(&mut self, file: &Description, intake: &mut dyn Intake) -> Result<proto::FileEntry> {
        if !descriptor::is_path(file.flags) {
            let name = || String::from_utf8_lossy(&file.link).into_owned();
            let device = file.stat.st_rdev;
            let is_harmless =
                major(device) == MEM_MAJOR && HARMLESS_DEVICES.contains(&minor(device));
            if file.is_type(libc::S_IFBLK) || file.is_type(libc::S_IFCHR) && !is_harmless {
                let (what, help) = unsupported::device(&file.link).unwrap_or_else(|| {
                    (format!("the device {}", name()), "have the program close it")
                });
                return Err(file.unsupported(what, help));
            }
        }
        path::entry_of(file, intake)
    }
}

impl Opener for RegularFiles {
    fn open(&mut self, entries: &[proto::FileEntry], opened: &mut Opened) -> Result<()> {
        for entry in entries {
            // Another kind has opened it.
            if opened.contains(entry.id) {
                continue;
            }
            let file = inner(entry)?;
            let fd = if path::is_deferred(file, opened) {
                deferred::placeholder(entry.id, Deferred::ByPath, opened)?
            } else {
                open_positioned(file, opened)?
            };
            opened.insert(entry.id, fd);
        }
        Ok(())
    }

    fn reopen(
        &mut self,
        entry: &proto::FileEntry,
        flags: i32,
        opened: &mut Opened,
    ) -> Result<OwnedFd> {
        path::open_entry(inner(entry)?, flags, opened)
    }

    fn check_unwritten(
        &self,
        entry: &proto::FileEntry,
        fd: BorrowedFd<'_>,
        opened: &Opened,
    ) -> Result<()> {
        validation::check_unwritten(inner(entry)?, fd, opened.validation)
    }

    fn is_deferred(&self, entry: &proto::FileEntry, opened: &Opened) -> bool {
        entry.reg.as_ref().is_some_and(|file| path::is_deferred(file, opened))
    }

    fn open_deferred(&mut self, entry: &proto::FileEntry, opened: &mut Opened) -> Result<OwnedFd> {
        let file = inner(entry)?;
        path::open_entry(file, file.flags.cast_signed(), opened)
    }

    fn complete(&self, entry: &proto::FileEntry, opened: &Opened) -> Result<()> {
        // To find the position, the kernel generates the contents up to it, so they must be final.
        position(opened.get(entry.id)?, inner(entry)?)
    }
}

fn position(fd: BorrowedFd, file: &proto::RegFileEntry) -> Result<()> {
    let positioned = descriptor::seek(fd, file.pos, file.flags);
    positioned.map_err(FileError::restore(file.id, "position", &file.name))
}

fn open_positioned(file: &proto::RegFileEntry, opened: &mut Opened) -> Result<OwnedFd> {
    let fd = path::open_entry(file, file.flags.cast_signed(), opened)?;
    position(fd.as_fd(), file)?;
    Ok(fd)
}

fn inner(entry: &proto::FileEntry) -> Result<&proto::RegFileEntry> {
    let missing = || FileError::image(entry.id, "it is a regular file, but its entry is missing");
    entry.reg.as_ref().ok_or_else(missing)
}

#[cfg(test)]
mod tests;
