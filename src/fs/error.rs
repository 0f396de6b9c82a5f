//! Errors of mounting and unmounting.

use std::{io, path::PathBuf};

use nix::errno::Errno;

use crate::{chain::ChainError, proc::ProcError};

/// The result of mounting and unmounting.
pub type Result<T, E = MountError> = std::result::Result<T, E>;

/// Errors of mounting and unmounting a chain.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// This program could not take the rights of the images' owner.
    #[error("open the images for {path} with the rights of their owner", path = .path.display())]
    Rights {
        /// The mount point.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The chain cannot be shown.
    #[error(transparent)]
    Chain(#[from] ChainError),
    /// The mount point cannot be used.
    #[error("mount point {path}", path = .path.display())]
    MountPoint {
        /// The mount point.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// Nothing is at the path of the mount point.
    #[error("mount point {path} does not exist\nhelp: make it: `mkdir {path}`", path = .path.display())]
    NoMountPoint {
        /// The mount point.
        path: PathBuf,
    },
    /// The mount point is no directory.
    #[error("mount point {path} is not a directory", path = .path.display())]
    NotADirectory {
        /// The mount point.
        path: PathBuf,
    },
    /// The mount would lie over the images that it shows.
    #[error(
        "mount point {path} would hide {images}\nhelp: mount the chain elsewhere",
        path = .path.display(), images = .images.display()
    )]
    HidesImages {
        /// The mount point.
        path: PathBuf,
        /// The directory that would be hidden.
        images: PathBuf,
    },
    /// A chain is mounted there already.
    #[error(
        "{source_path} is already mounted at {path}\nhelp: run `imgfs umount {path}` first, or choose another mount point",
        path = .path.display(), source_path = .chain.display()
    )]
    Mounted {
        /// The mount point.
        path: PathBuf,
        /// The mounted chain.
        chain: PathBuf,
    },
    /// The kernel has no FUSE.
    #[error(
        "open /dev/fuse\nhelp: load the kernel module: `modprobe fuse` as root; in a container, pass the device in \
         (`--device /dev/fuse`); without a mount, `imgfs ps`, `cat` and `get` show the same"
    )]
    NoFuse {
        /// The cause.
        source: io::Error,
    },
    /// The device may not be opened.
    #[error(
        "open /dev/fuse\nhelp: run as root, or have root make the device accessible: \
         `chmod 666 /dev/fuse`; without a mount, `imgfs ps`, `cat` and `get` show the same"
    )]
    FuseDenied {
        /// The cause.
        source: io::Error,
    },
    /// The kernel did not mount.
    #[error("mount at {path}", path = .path.display())]
    Mount {
        /// The mount point.
        path: PathBuf,
        /// The cause.
        source: Errno,
    },
    /// An ordinary user needs `fusermount3`, which is not installed.
    #[error("run fusermount3 for {path}\nhelp: run as root, or install fusermount3: `apt-get install fuse3`, `dnf install fuse3`", path = .path.display())]
    NoHelper {
        /// The mount point.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// Ordinary users may not allow other users, unless root has configured it.
    #[error(
        "allow others to read the mount at {path}\nhelp: leave out allow_other, run as root, or have \
         root add the line user_allow_other to /etc/fuse.conf",
        path = .path.display()
    )]
    OtherUsers {
        /// The mount point.
        path: PathBuf,
    },
    /// An ordinary user mounts only where that user may write.
    #[error(
        "mount at {path}: {message}\nhelp: choose a directory of your own, as in \
         `mkdir ~/mnt && imgfs mount CHAIN ~/mnt`",
        path = .path.display()
    )]
    NotOwnMountPoint {
        /// The mount point.
        path: PathBuf,
        /// The output of `fusermount3`.
        message: String,
    },
    /// `fusermount3` failed.
    #[error("fusermount3 at {path}: {message}", path = .path.display())]
    Helper {
        /// The mount point.
        path: PathBuf,
        /// Its output.
        message: String,
    },
    /// The kernel and the daemon could not start the FUSE session.
    #[error("start to serve {path}", path = .path.display())]
    Handshake {
        /// The mount point.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The daemon stopped serving before the mount was unmounted.
    #[error("serve {path}", path = .path.display())]
    Serve {
        /// The mount point.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// Nothing is mounted there.
    #[error("nothing is mounted at {path}", path = .path.display())]
    NotMounted {
        /// The path.
        path: PathBuf,
    },
    /// Another kind of file system is mounted there.
    #[error("{path} is a mount of type {found}, not of {expected}", path = .path.display())]
    ForeignMount {
        /// The path.
        path: PathBuf,
        /// The type of the mount.
        found: String,
        /// The expected type.
        expected: &'static str,
    },
    /// The mount frees no pages.
    #[error("{path} is mounted read-only\nhelp: mount the chain with --punch", path = .path.display())]
    NotPunching {
        /// The mount point.
        path: PathBuf,
    },
    /// The mount could not free the recorded pages.
    #[error("free what was punched through {path}\nhelp: `imgfs log {path}` says more", path = .path.display())]
    Commit {
        /// The mount point.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The last messages of the mount could not be read.
    #[error("read the log of {path}\nhelp: run as root, or as the user who mounted it", path = .path.display())]
    Log {
        /// The mount point.
        path: PathBuf,
        /// The cause.
        source: Errno,
    },
    /// Files in the mount are open, or a process is in it.
    #[error("{path} is busy\nhelp: `fuser -vm {path}` shows which processes use it, `imgfs umount --lazy` detaches it", path = .path.display())]
    Busy {
        /// The mount point.
        path: PathBuf,
    },
    /// The kernel did not unmount.
    #[error("unmount {path}", path = .path.display())]
    Unmount {
        /// The mount point.
        path: PathBuf,
        /// The cause.
        source: Errno,
    },
    /// The table of mounts could not be read.
    #[error("read the table of mounts")]
    MountTable {
        /// The cause.
        source: ProcError,
    },
}
