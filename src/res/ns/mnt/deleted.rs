//! Mounts that show a deleted file or directory, as container managers make them over files of `/proc`:
//! bound from a file of a tmpfs that is deleted then.
//!
//! An image has the file. The restore makes it anew under its former name in another mount of its file
//! system, until all mounts are in their places: the kernel attaches no mount of a deleted file.

use std::{
    collections::HashMap,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, openat},
    libc,
    sys::{
        stat::{FileStat, Mode, SFlag, fstat, futimens, mkdirat},
        time::TimeSpec,
    },
    unistd::{UnlinkatFlags, unlinkat},
};

use super::{contents, reach::reach, survey::Found, survey::Source};
use crate::{
    image::{ImageStore, Kind, SnapshotWriter},
    proc::Mount,
    res::{ResError, Result, ns::Dumped},
    sys::root,
    units::HostPid,
};

const HELP: &str = "unmount it, leave it out (--skip-mnt), or provide it at the restore (--external \
                    'mnt[POINT]:KEY')";

/// Checks that the files of all such mounts can be stored.
pub(super) fn check(all: &[Dumped<'_>], found: &[Found]) -> Result<()> {
    let mut deleted = found.iter().filter(|found| found.source == Source::Deleted);
    deleted.try_for_each(|Found { space, mount, .. }| examine(all[*space].pid, mount).map(drop))
}

fn examine(pid: HostPid, mount: &Mount) -> Result<(OwnedFd, FileStat)> {
    let failed = |source: Errno| ResError::Mount {
        point: mount.point.clone(),
        step: "examine the deleted file at",
        source: source.into(),
    };
    let refused = |what: &str| {
        let fs_type = String::from_utf8_lossy(&mount.fs_type);
        let what = format!("has a mount at {} ({fs_type}) of {what}", mount.point.display());
        ResError::Refused { pid, what, help: HELP }
    };
    let file =
        reach(pid, mount)?.ok_or_else(|| refused("a deleted file that is hidden for good"))?;
    let stat = fstat(&file).map_err(failed)?;
    if SFlag::from_bits_truncate(stat.st_mode & libc::S_IFMT) == SFlag::S_IFSOCK {
        return Err(refused("a deleted socket"));
    }
    Ok((file, stat))
}

/// Stores the file of each mount once. Returns the number of the image for each mount, by its number.
pub(super) fn write(
    all: &[Dumped<'_>],
    found: &[Found],
    images: &SnapshotWriter,
) -> Result<HashMap<i32, u32>> {
    let (mut numbers, mut stored) = (HashMap::new(), HashMap::new());
    for Found { space, mount, .. } in found.iter().filter(|found| found.source == Source::Deleted) {
        let Dumped { pid, ids, .. } = all[*space];
        let users = (!ids.is_own_namespace()).then_some(pid);
        let (file, stat) = examine(pid, mount)?;
        let number = mount.id.cast_unsigned();
        let first = *stored.entry((stat.st_dev, stat.st_ino)).or_insert(number);
        if first == number {
            contents::pack(Some(&file), mount, (Kind::DeletedMount, number), images, users)?;
        }
        numbers.insert(mount.id, first);
    }
    Ok(numbers)
}

/// A file that has a name for as long as the restore needs it.
#[derive(Debug)]
pub(super) struct Named {
    directory: OwnedFd,
    /// The directory before, whose times come back.
    before: FileStat,
    /// The path in the mount, and its last component.
    pub(super) path: PathBuf,
    name: PathBuf,
    is_directory: bool,
    is_there: bool,
}

/// What is to be made, and where.
#[derive(Clone, Copy, Debug)]
pub(super) struct Former<'a> {
    /// The mount point, for messages.
    pub(super) point: &'a Path,
    /// The number of its image; CRIU's images have none.
    pub(super) number: Option<u32>,
    pub(super) path: &'a Path,
    /// Whether the mount point is a directory, and so was the file.
    pub(super) is_directory: bool,
}

impl Named {
    /// Makes the file again, below the directory `tree`. Users are as for [`contents::unpack`].
    pub(super) fn make(
        images: &dyn ImageStore,
        former: Former<'_>,
        tree: &OwnedFd,
        users: Option<(HostPid, (u32, u32))>,
    ) -> Result<Self> {
        let failed = |source: Errno| ResError::Mount {
            point: former.point.to_owned(),
            step: "make again the deleted file of",
            source: source.into(),
        };
        let find =
            |path: &Path| root::name_on_mount(tree.as_fd(), path.as_os_str().as_encoded_bytes());
        let parent = former.path.parent().unwrap_or(Path::new(""));
        let is_free = former.path.file_name().is_some()
            && find(parent).is_ok()
            && matches!(find(former.path), Err(Errno::ENOENT));
        let path = if is_free {
            former.path.to_owned()
        } else {
            let other = format!(".rcriu-deleted-{}", former.number.unwrap_or(std::process::id()));
            log::warn!(
                "the mount at {} shows a deleted file that was {}, which is taken now: mountinfo shows \
                 /{other}",
                former.point.display(),
                former.path.display()
            );
            PathBuf::from(other)
        };
        let parent = path.parent().unwrap_or(Path::new(""));
        let directory = find(parent).map_err(failed)?;
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let directory = openat(&directory, ".", flags, Mode::empty()).map_err(failed)?;
        let before = fstat(&directory).map_err(failed)?;
        let name = PathBuf::from(path.file_name().unwrap_or_default());
        let mut named = Self {
            directory,
            before,
            path,
            name,
            is_directory: former.is_directory,
            is_there: false,
        };
        let point = (former.point, named.path.as_path());
        let has_image = match former.number {
            Some(number) => contents::unpack_deleted(images, number, point, tree.as_fd(), users)?,
            None => false,
        };
        if !has_image {
            log::warn!(
                "the images do not have the deleted file at {}: it is empty",
                former.point.display()
            );
            named.make_empty().map_err(failed)?;
        }
        named.is_there = true;
        Ok(named)
    }

    fn make_empty(&self) -> nix::Result<()> {
        if self.is_directory {
            return mkdirat(&self.directory, &self.name, Mode::S_IRWXU);
        }
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC;
        openat(&self.directory, &self.name, flags, Mode::S_IRUSR | Mode::S_IWUSR).map(drop)
    }

    /// Deletes it again.
    pub(super) fn remove(mut self) -> Result<()> {
        self.delete().map_err(|source| ResError::Mount {
            point: self.path.clone(),
            step: "delete again the file of",
            source: source.into(),
        })
    }

    fn delete(&mut self) -> nix::Result<()> {
        if !std::mem::take(&mut self.is_there) {
            return Ok(());
        }
        let how = match self.is_directory {
            true => UnlinkatFlags::RemoveDir,
            false => UnlinkatFlags::NoRemoveDir,
        };
        unlinkat(&self.directory, &self.name, how)?;
        let stat = &self.before;
        let accessed = TimeSpec::new(stat.st_atime, stat.st_atime_nsec);
        futimens(&self.directory, &accessed, &TimeSpec::new(stat.st_mtime, stat.st_mtime_nsec))
    }
}

impl Drop for Named {
    fn drop(&mut self) {
        if let Err(errno) = self.delete() {
            log::warn!("cannot delete {} again: {errno}", self.path.display());
        }
    }
}
