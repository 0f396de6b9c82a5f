//! The descriptors of one process.

use std::{
    fs::File,
    os::{fd::OwnedFd, unix::ffi::OsStringExt},
    path::{Path, PathBuf},
};

use nix::{
    fcntl::{OFlag, openat, readlinkat},
    sys::stat::Mode,
};

use super::{FdInfo, ProcError, Result, of_process, parse, parse_fdinfo, read_all, tasks};
use crate::units::{HostPid, TargetFd};

/// The directories of a process in which the kernel shows its descriptors.
///
/// They are open, so that the kernel does not look up the process for each of thousands of descriptors.
#[derive(Debug)]
pub struct Descriptors {
    links: Directory,
    infos: Directory,
}

impl Descriptors {
    /// Opens the directories of a process.
    ///
    /// # Errors
    ///
    /// See the [module](super).
    pub fn open(pid: HostPid) -> Result<Self> {
        let open = |name| Directory::open(of_process(pid, name));
        Ok(Self { links: open("fd")?, infos: open("fdinfo")? })
    }

    /// Returns the numbers of all open descriptors, in ascending order.
    ///
    /// # Errors
    ///
    /// See the [module](super).
    pub fn numbers(&self) -> Result<Vec<TargetFd>> {
        Ok(tasks::numbered(&self.links.path)?.into_iter().map(TargetFd).collect())
    }

    /// Reads the link of a descriptor, as [`super::fd_link`] does.
    ///
    /// # Errors
    ///
    /// See the [module](super).
    pub fn link(&self, fd: TargetFd) -> Result<Vec<u8>> {
        let name = fd.to_string();
        let link = readlinkat(&self.links.fd, name.as_str());
        link.map(OsStringExt::into_vec).map_err(|errno| self.links.failed(&name, errno.into()))
    }

    /// Reads the information about a descriptor, as [`super::fdinfo`] does.
    ///
    /// # Errors
    ///
    /// See the [module](super).
    pub fn info(&self, fd: TargetFd) -> Result<FdInfo> {
        let name = fd.to_string();
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
        let text = openat(&self.infos.fd, name.as_str(), flags, Mode::empty())
            .map_err(std::io::Error::from)
            .and_then(|fd| read_all(File::from(fd)))
            .map_err(|source| self.infos.failed(&name, source))?;
        parse(&self.infos.path.join(name), &text, parse_fdinfo)
    }
}

/// An open directory.
#[derive(Debug)]
struct Directory {
    path: PathBuf,
    fd: OwnedFd,
}

impl Directory {
    fn open(path: PathBuf) -> Result<Self> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        match nix::fcntl::open(&path, flags, Mode::empty()) {
            Ok(fd) => Ok(Self { path, fd }),
            Err(errno) => Err(ProcError::from_io(&path, errno.into())),
        }
    }

    fn failed(&self, name: impl AsRef<Path>, source: std::io::Error) -> ProcError {
        ProcError::from_io(&self.path.join(name), source)
    }
}
