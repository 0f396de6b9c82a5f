//! Mounting and unmounting, without `fuser`.
//!
//! `fuser` 0.18 unmounts its mount point even if another program has already done so, and
//! then hits a file system that was mounted there since. So it is only given the open
//! device.

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, mount, umount2},
    unistd::{getgid, getuid},
};

use super::{
    MountError, MountOptions, Result,
    recent::{LOG_XATTR, PLACE_XATTR},
};
use crate::{
    chain::{Chain, DIRECTORY_XATTR, PUNCH_XATTR},
    proc::{self, Mount},
    sys,
};

const DEVICE: &str = "/dev/fuse";

/// The type of our mounts in the table of mounts.
pub const FS_TYPE: &str = "fuse.imgfs";

/// The extended attribute of the root of a mount that holds the pid of the daemon.
pub(super) const DAEMON_XATTR: &str = "user.imgfs.daemon";

/// The program that mounts and unmounts for ordinary users.
const HELPER: &str = "fusermount3";

/// Returns the absolute path of a mount point. It must be a directory without a mounted
/// chain, and must neither contain the images of `chain` nor be one of its directories.
pub(super) fn check_mount_point(path: &Path, chain_path: &Path, chain: &Chain) -> Result<PathBuf> {
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::NotFound => MountError::NoMountPoint { path: path.to_owned() },
        _ => MountError::MountPoint { path: path.to_owned(), source },
    };
    let mount_point = path.canonicalize().map_err(failed)?;
    if !mount_point.metadata().map_err(failed)?.is_dir() {
        return Err(MountError::NotADirectory { path: mount_point });
    }
    if let Some(mounted) = mounted_at(&mount_point)?
        && mounted.fs_type == FS_TYPE.as_bytes()
    {
        return Err(MountError::Mounted { path: mount_point, chain: mounted.source });
    }
    let chain_dir = chain_path.canonicalize().unwrap_or_else(|_| chain_path.to_owned());
    let dirs = chain.snapshots().iter().filter_map(|snapshot| snapshot.directory());
    for images in dirs.chain([chain_dir.as_path()]) {
        if images.starts_with(&mount_point) {
            return Err(MountError::HidesImages { path: mount_point, images: images.to_owned() });
        }
    }
    Ok(mount_point)
}

/// Mounts at `mount_point` and returns the device on which the kernel's requests arrive.
pub(super) fn mount_device(
    mount_point: &Path,
    source: &str,
    options: &MountOptions,
) -> Result<OwnedFd> {
    let device = File::options().read(true).write(true).open(DEVICE).map_err(|source| {
        if source.kind() == io::ErrorKind::PermissionDenied {
            MountError::FuseDenied { source }
        } else {
            MountError::NoFuse { source }
        }
    })?;
    let mut text = format!(
        "fd={},rootmode=40000,user_id={},group_id={},default_permissions",
        device.as_raw_fd(),
        getuid(),
        getgid(),
    );
    if options.allow_other {
        text.push_str(",allow_other");
    }
    let mut flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    // The kernel treats the punching of holes as a write.
    flags.set(MsFlags::MS_RDONLY, options.punch.is_none());
    match mount(Some(source), mount_point, Some(FS_TYPE), flags, Some(text.as_str())) {
        Ok(()) => Ok(device.into()),
        Err(Errno::EPERM) => mount_by_helper(mount_point, source, options),
        Err(Errno::ENODEV) => Err(MountError::NoFuse { source: Errno::ENODEV.into() }),
        Err(source) => Err(MountError::Mount { path: mount_point.to_owned(), source }),
    }
}

/// Mounts with `fusermount3`, which is set-user-ID root.
fn mount_by_helper(mount_point: &Path, source: &str, options: &MountOptions) -> Result<OwnedFd> {
    let failed = |message: String| MountError::Helper { path: mount_point.to_owned(), message };
    let mut text = format!(
        "{},nosuid,nodev,default_permissions,subtype=imgfs,fsname={}",
        if options.punch.is_none() { "ro" } else { "rw" },
        source.replace('\\', "\\\\").replace(',', "\\,")
    );
    if options.allow_other {
        text.push_str(",allow_other");
    }
    let (ours, theirs) = std::os::unix::net::UnixStream::pair()
        .map_err(|error| failed(format!("socket: {error}")))?;
    let helper = Command::new(HELPER)
        .args(["-o", &text, "--"])
        .arg(mount_point)
        // `fusermount3` sends the device over the socket with this descriptor.
        .env("_FUSE_COMMFD", "0")
        .stdin(OwnedFd::from(theirs))
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|source| MountError::NoHelper { path: mount_point.to_owned(), source })?;
    let device = sys::receive_fd(&ours);
    let output = helper.wait_with_output().map_err(|error| failed(error.to_string()))?;
    match device {
        Ok(Some(device)) if output.status.success() => Ok(device),
        _ => {
            let message = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            let path = mount_point.to_owned();
            Err(match &message {
                said if said.contains("user_allow_other") => MountError::OtherUsers { path },
                said if said.contains("no write access to mountpoint")
                    || said.contains("not owned by the current user") =>
                {
                    MountError::NotOwnMountPoint { path, message }
                }
                _ => MountError::Helper { path, message },
            })
        }
    }
}

/// Unmounts the chain that is mounted at `path`; `lazy` detaches it even if it is in use,
/// and lets the processes that use it finish.
///
/// # Errors
/// [`MountError::NotMounted`], [`MountError::ForeignMount`],
/// [`MountError::Busy`], [`MountError::Unmount`].
pub fn unmount(path: &Path, lazy: bool) -> Result<()> {
    unmount_device(&mount_of_ours(path)?, lazy)
}

/// Makes the mount at `path` free the recorded pages, and returns their number.
///
/// # Errors
/// [`MountError::NotMounted`], [`MountError::ForeignMount`],
/// [`MountError::NotPunching`], [`MountError::Commit`].
pub fn commit(path: &Path) -> Result<u64> {
    let mount_point = mount_of_ours(path)?;
    let failed = |source| MountError::Commit { path: path.to_owned(), source };
    let root = File::open(&mount_point).map_err(failed)?;
    match sys::commit::commit(&root) {
        Err(Errno::ENOTTY) => Err(MountError::NotPunching { path: path.to_owned() }),
        result => result.map_err(|errno| failed(errno.into())),
    }
}

/// Returns the last messages of the mount at `path`, a line each.
///
/// # Errors
/// [`MountError::NotMounted`], [`MountError::ForeignMount`], [`MountError::Log`].
pub fn log(path: &Path) -> Result<String> {
    let mount_point = mount_of_ours(path)?;
    let text = sys::xattr::get(&mount_point, LOG_XATTR);
    let text = text.map_err(|source| MountError::Log { path: path.to_owned(), source })?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// A chain that is mounted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountedChain {
    /// The chain, as the user named it.
    pub chain: PathBuf,
    /// The mount point.
    pub mount_point: PathBuf,
    /// The image directory that the root shows; `None` if pages of it are freed, or the
    /// mount belongs to another user.
    pub directory: Option<PathBuf>,
    /// When the mount frees pages; `None` if it does not.
    pub punch: Option<String>,
    /// The daemon; `None` if it has ended, or the mount belongs to another user.
    pub daemon: Option<u32>,
    /// Where it logs; `None` if it has ended, or the mount belongs to another user.
    pub log: Option<String>,
}

/// Returns the chains that are mounted, in the order of the table of mounts.
///
/// # Errors
/// [`MountError::MountTable`].
pub fn mounts() -> Result<Vec<MountedChain>> {
    let mounts = proc::mounts().map_err(|source| MountError::MountTable { source })?;
    let ours = mounts.into_iter().filter(|mount| mount.fs_type == FS_TYPE.as_bytes());
    Ok(ours
        .map(|mount| {
            let told = |name| {
                let value = sys::xattr::get(&mount.point, name).ok()?;
                Some(String::from_utf8_lossy(&value).into_owned())
            };
            MountedChain {
                directory: told(DIRECTORY_XATTR).map(PathBuf::from),
                punch: told(PUNCH_XATTR),
                log: told(PLACE_XATTR).filter(|place| !place.is_empty()),
                daemon: told(DAEMON_XATTR).and_then(|pid| pid.parse().ok()),
                chain: mount.source,
                mount_point: mount.point,
            }
        })
        .collect())
}

/// Returns the mount point at `path`, which must be one of ours.
fn mount_of_ours(path: &Path) -> Result<PathBuf> {
    let mount_point = resolve(path);
    let Some(mounted) = mounted_at(&mount_point)? else {
        return Err(MountError::NotMounted { path: path.to_owned() });
    };
    if mounted.fs_type != FS_TYPE.as_bytes() {
        return Err(MountError::ForeignMount {
            path: path.to_owned(),
            found: String::from_utf8_lossy(&mounted.fs_type).into_owned(),
            expected: FS_TYPE,
        });
    }
    Ok(mount_point)
}

/// Returns the mount at `mount_point`, the uppermost if there are several.
///
/// # Errors
/// [`MountError::MountTable`].
pub fn mounted_at(mount_point: &Path) -> Result<Option<Mount>> {
    let mounts = proc::mounts().map_err(|source| MountError::MountTable { source })?;
    // Later mounts are further down, and lie over the earlier ones.
    Ok(mounts.into_iter().rfind(|mount| mount.point == mount_point))
}

/// Unmounts what is at `mount_point`, whatever it is.
pub(super) fn unmount_device(mount_point: &Path, lazy: bool) -> Result<()> {
    let detach = if lazy { MntFlags::MNT_DETACH } else { MntFlags::empty() };
    match umount2(mount_point, MntFlags::UMOUNT_NOFOLLOW | detach) {
        Ok(()) => Ok(()),
        Err(Errno::EBUSY) => Err(MountError::Busy { path: mount_point.to_owned() }),
        Err(Errno::EPERM) => unmount_by_helper(mount_point, lazy),
        Err(source) => Err(MountError::Unmount { path: mount_point.to_owned(), source }),
    }
}

fn unmount_by_helper(mount_point: &Path, lazy: bool) -> Result<()> {
    let output = Command::new(HELPER)
        .args(["-q", "-u"])
        .args(lazy.then_some("-z"))
        .arg("--")
        .arg(mount_point)
        .stdin(Stdio::null())
        .output()
        .map_err(|source| MountError::NoHelper { path: mount_point.to_owned(), source })?;
    if output.status.success() {
        return Ok(());
    }
    let message = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    if message.contains("busy") {
        return Err(MountError::Busy { path: mount_point.to_owned() });
    }
    Err(MountError::Helper { path: mount_point.to_owned(), message })
}

/// Returns the path under which the table of mounts has `path`.
///
/// A mount whose daemon has died cannot be accessed, only its parent.
fn resolve(path: &Path) -> PathBuf {
    if let Ok(path) = path.canonicalize() {
        return path;
    }
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    match (absolute.parent().map(Path::canonicalize), absolute.file_name()) {
        (Some(Ok(parent)), Some(name)) => parent.join(name),
        _ => absolute,
    }
}
