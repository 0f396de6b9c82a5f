//! Relations between namespaces (`linux/nsfs.h`).
#![expect(unsafe_code, reason = "ioctls")]

use std::{
    fs::File,
    io,
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::Path,
};

use nix::{errno::Errno, libc};

/// `NS_GET_USERNS`: opens the user namespace that owns a namespace. Since Linux 4.9.
const NS_GET_USERNS: libc::c_ulong = 0xb701;

/// `NS_GET_PARENT`: opens the parent of a user or pid namespace. Since Linux 4.9.
const NS_GET_PARENT: libc::c_ulong = 0xb702;

/// `NS_GET_NSTYPE`: the flag of `clone(2)` for the kind of a namespace. Since Linux 4.11.
const NS_GET_NSTYPE: libc::c_ulong = 0xb703;

const _: () = assert!(NS_GET_USERNS == (0xb7 << 8 | 1) && NS_GET_PARENT == (0xb7 << 8 | 2));
const _: () = assert!(NS_GET_NSTYPE == (0xb7 << 8 | 3));

/// Returns the kind of the namespace that a file leads to, as a flag of `clone(2)`.
///
/// # Errors
/// `ENOTTY` if it is no namespace.
pub fn kind(file: &File) -> nix::Result<i32> {
    // SAFETY: this ioctl takes no argument; the descriptor is open.
    Errno::result(unsafe { libc::ioctl(file.as_raw_fd(), NS_GET_NSTYPE) })
}

/// Returns the inode of the user namespace that owns the namespace at a path.
///
/// # Errors
/// `EPERM` if it is not below that of this program.
pub fn owner(path: &Path) -> io::Result<u64> {
    Ok(open_owner(&File::open(path)?)?.metadata()?.ino())
}

/// Opens the user namespace that owns a namespace.
///
/// # Errors
/// As [`owner`].
pub fn open_owner(namespace: &File) -> io::Result<File> {
    related(namespace, NS_GET_USERNS)
}

/// Returns the inode of the parent of the user or pid namespace at a path.
///
/// # Errors
/// As [`owner`].
pub fn parent(path: &Path) -> io::Result<u64> {
    Ok(related(&File::open(path)?, NS_GET_PARENT)?.metadata()?.ino())
}

fn related(namespace: &File, question: libc::c_ulong) -> io::Result<File> {
    // SAFETY: these ioctls take no argument; the descriptor is open.
    let made = unsafe { libc::ioctl(namespace.as_raw_fd(), question) };
    let made = Errno::result(made)?;
    // SAFETY: the kernel has just made this descriptor for the caller.
    Ok(unsafe { OwnedFd::from_raw_fd(made) }.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_owner_of_a_namespace_is_a_user_namespace() {
        let own = std::fs::metadata("/proc/self/ns/user").unwrap().ino();
        // Tests may run in a user namespace below that of the machine.
        match owner(Path::new("/proc/self/ns/net")) {
            Ok(owner) => assert_eq!(owner, own),
            Err(error) => assert_eq!(error.raw_os_error(), Some(libc::EPERM)),
        }
        parent(Path::new("/proc/self/ns/net")).unwrap_err();
    }
}
