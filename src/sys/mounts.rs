//! The mount API that works with descriptors (Linux 5.2; `mount_setattr(2)` since 5.12).

#![expect(unsafe_code, reason = "no crate wraps these system calls")]

use std::{
    ffi::CStr,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
};

use nix::{errno::Errno, libc};
use zerocopy::{Immutable, IntoBytes};

/// `OPEN_TREE_CLONE` (`linux/mount.h`): makes a detached copy of a mount.
pub const OPEN_TREE_CLONE: u32 = 1;
/// `OPEN_TREE_CLOEXEC`.
pub const OPEN_TREE_CLOEXEC: u32 = libc::O_CLOEXEC.cast_unsigned();
/// Copies with `open_tree(2)`, and follows neither a link nor an automount at the end of the path.
pub const COPY_AS_IT_IS: u32 = OPEN_TREE_CLONE
    | OPEN_TREE_CLOEXEC
    | (libc::AT_SYMLINK_NOFOLLOW | libc::AT_NO_AUTOMOUNT).cast_unsigned();

/// Flags of `fsopen(2)`, `fsmount(2)` and `fspick(2)`: `FSOPEN_CLOEXEC`, `FSMOUNT_CLOEXEC`,
/// `FSPICK_CLOEXEC`, `FSPICK_EMPTY_PATH`.
pub const CLOSE_ON_EXEC: u32 = 1;
/// `FSPICK_EMPTY_PATH`.
pub const FSPICK_EMPTY_PATH: u32 = 8;

/// Commands of `fsconfig(2)`.
pub const FSCONFIG_SET_FLAG: u32 = 0;
/// `FSCONFIG_SET_STRING`.
pub const FSCONFIG_SET_STRING: u32 = 1;
/// `FSCONFIG_CMD_CREATE`.
pub const FSCONFIG_CMD_CREATE: u32 = 6;
/// `FSCONFIG_CMD_RECONFIGURE`.
pub const FSCONFIG_CMD_RECONFIGURE: u32 = 7;

/// `MOVE_MOUNT_F_EMPTY_PATH`: what to attach is a descriptor.
pub const MOVE_FROM_DESCRIPTOR: u32 = 0x4;
/// With `MOVE_MOUNT_T_EMPTY_PATH`: both ends are descriptors.
pub const MOVE_BY_DESCRIPTORS: u32 = MOVE_FROM_DESCRIPTOR | 0x40;
/// `MOVE_MOUNT_SET_GROUP` (Linux 5.15): the target joins the sharing group of the source.
pub const MOVE_MOUNT_SET_GROUP: u32 = 0x100;

/// `AT_RECURSIVE` (`linux/fcntl.h`).
pub const AT_RECURSIVE: u32 = 0x8000;

/// Attributes of mounts (`MOUNT_ATTR_*`, `linux/mount.h`).
pub mod attribute {
    /// `MOUNT_ATTR_RDONLY`.
    pub const READ_ONLY: u64 = 1;
    /// `MOUNT_ATTR_NOSUID`.
    pub const NO_SUID: u64 = 2;
    /// `MOUNT_ATTR_NODEV`.
    pub const NO_DEV: u64 = 4;
    /// `MOUNT_ATTR_NOEXEC`.
    pub const NO_EXEC: u64 = 8;
    /// `MOUNT_ATTR__ATIME`: all bits of the choice when access times are updated.
    pub const ACCESS_TIMES: u64 = 0x70;
    /// `MOUNT_ATTR_NOATIME`.
    pub const NO_ATIME: u64 = 0x10;
    /// `MOUNT_ATTR_STRICTATIME`.
    pub const STRICT_ATIME: u64 = 0x20;
    /// `MOUNT_ATTR_NODIRATIME`.
    pub const NO_DIR_ATIME: u64 = 0x80;
    /// `MOUNT_ATTR_NOSYMFOLLOW` (Linux 5.14).
    pub const NO_LINKS: u64 = 0x20_0000;
    /// All that a restore sets.
    pub const ALL: u64 =
        READ_ONLY | NO_SUID | NO_DEV | NO_EXEC | ACCESS_TIMES | NO_DIR_ATIME | NO_LINKS;
}

/// `struct mount_attr` (`linux/mount.h`, Linux 5.12).
#[derive(Clone, Copy, Debug, Default, IntoBytes, Immutable)]
#[repr(C)]
pub struct MountAttributes {
    /// Attributes to set.
    pub set: u64,
    /// Attributes to clear before.
    pub clear: u64,
    /// `MS_SHARED` and the like, or 0.
    pub propagation: u64,
    /// A user namespace for mapped ids; not used.
    pub user_namespace: u64,
}

const _: () = assert!(size_of::<MountAttributes>() == 32);

/// Returns a detached copy of the mount on which `path` is, with that file or directory as its root.
/// The copy has no mounts on it. Does not follow a symbolic link at the end of the path.
///
/// # Errors
/// Those of `open_tree(2)`.
pub fn copy(path: &CStr) -> nix::Result<OwnedFd> {
    let flags = COPY_AS_IT_IS;
    // SAFETY: `path` is a string that outlives the call, which writes no memory.
    let fd = unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags) };
    let fd = Errno::result(fd)?;
    let fd = i32::try_from(fd).expect("a descriptor");
    // SAFETY: the kernel has just returned the descriptor, which nothing else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Puts a mount into the sharing groups of another one.
///
/// # Errors
/// Those of `move_mount(2)`: `EPERM` without power over the mount namespaces of both.
pub fn join(mount: BorrowedFd, other: BorrowedFd) -> nix::Result<()> {
    let flags = MOVE_BY_DESCRIPTORS | MOVE_MOUNT_SET_GROUP;
    let (from, to) = (other.as_raw_fd(), mount.as_raw_fd());
    let empty = c"".as_ptr();
    // SAFETY: the strings outlive the call, which writes no memory.
    let done = unsafe { libc::syscall(libc::SYS_move_mount, from, empty, to, empty, flags) };
    Errno::result(done).map(drop)
}
