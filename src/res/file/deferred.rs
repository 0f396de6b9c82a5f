//! Deferred files, which can only be opened once the tree exists.

use std::{ffi::CString, os::fd::OwnedFd};

use nix::libc;

use super::{Deferred, FileError, Opened, Result, descriptor};
use crate::{inject::Script, sys::root::Root, units::TargetFd};

/// Opens a placeholder for a deferred file.
pub(super) fn placeholder(id: u32, deferred: Deferred, opened: &mut Opened) -> Result<OwnedFd> {
    let path = "/dev/null";
    let fd = descriptor::open(&Root::own(), path.as_bytes(), libc::O_RDWR.cast_unsigned())
        .map_err(FileError::restore(id, "open", path))?;
    opened.deferred.insert(id, deferred);
    Ok(fd)
}

/// Adds the calls that open the file at `path` and replace the placeholder at `fd`.
pub(super) fn install(
    id: u32,
    path: &[u8],
    flags: u32,
    fd: TargetFd,
    script: &mut Script,
) -> Result<()> {
    let path =
        CString::new(path).map_err(|_| FileError::image(id, "its path has a NUL byte in it"))?;
    let what = format!("open {}", path.to_string_lossy());
    let path = script.string(&path);
    let close_on_exec = script.call(
        "read the flags of a descriptor",
        libc::SYS_fcntl,
        &[fd.0.into(), libc::F_GETFD.into()],
    );
    let flags = flags.cast_signed() | libc::O_NOCTTY;
    let file =
        script.call(what, libc::SYS_openat, &[libc::AT_FDCWD.into(), path.into(), flags.into()]);
    script.call("install a descriptor", libc::SYS_dup3, &[file.into(), fd.0.into()]);
    script.call(
        "set the flags of a descriptor",
        libc::SYS_fcntl,
        &[fd.0.into(), libc::F_SETFD.into(), close_on_exec.into()],
    );
    script.call("close a descriptor", libc::SYS_close, &[file.into()]);
    Ok(())
}
