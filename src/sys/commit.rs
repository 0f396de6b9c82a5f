//! Asks a mount of `imgfs` to free the pages that were marked.
#![expect(unsafe_code, reason = "an ioctl of our own")]

use std::{
    fs::File,
    os::fd::{AsFd, AsRawFd},
};

use nix::libc;

/// The number of the ioctl on the root directory of a mount: `_IOR('i', 0x50, u64)`. It returns the
/// number of freed pages.
pub const REQUEST: u32 = 2 << 30 | 8 << 16 | (b'i' as u32) << 8 | 0x50;
const _: () = assert!(REQUEST as libc::Ioctl == nix::request_code_read!(b'i', 0x50, 8));

/// Has the mount with the root directory `dir` free the marked pages. Returns their number.
///
/// # Errors
/// `ENOTTY` if `dir` is not a mount that frees pages; `EPERM` unless the user is root or has mounted
/// it; the error that prevents freeing the pages.
pub fn commit(dir: &File) -> nix::Result<u64> {
    let mut pages = 0_u64;
    let number = libc::Ioctl::from(REQUEST);
    // SAFETY: the request is for the kernel to write eight bytes, as many as `pages`
    // has, which lives until after the call.
    let result = unsafe { libc::ioctl(dir.as_fd().as_raw_fd(), number, &raw mut pages) };
    nix::errno::Errno::result(result)?;
    Ok(pages)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_directories_do_not_know_it() {
        let dir = tempfile::tempdir().unwrap();
        let error = commit(&File::open(dir.path()).unwrap()).unwrap_err();
        assert_eq!(error, nix::errno::Errno::ENOTTY);
    }
}
