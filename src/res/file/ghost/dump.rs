//! Dumps deleted files.
//!
//! A file without any name is a *ghost*: the images hold its contents. A file that has another
//! name somewhere, or that was linked again through `/proc`, gets a *link remap*: a new name in
//! the directory of the old one. The restore removes it.

use std::{
    collections::HashMap,
    ffi::OsStr,
    fs::{self, File},
    io::{self, Write},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::{ffi::OsStrExt, fs::FileExt},
    },
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{AT_FDCWD, AtFlags, readlinkat},
    libc,
    sys::stat::{major, minor},
    unistd::{Whence, linkat, lseek},
};

use super::{Options, link_name};
use crate::{
    image::{
        ImageError, ImageWriter, Kind, SnapshotWriter,
        proto::{self, FdTypes, RemapType},
    },
    res::file::{Description, External, FileError, Intake, Result, descriptor},
    sys::{fds, root::Root, xattr},
    units::BLOCK_BYTES,
};

/// Ghosts of at least this size are stored as chunks, without their holes.
const CHUNKED_FROM_BYTES: u64 = 3 * 4096;

/// The bits of a minor number in the kernel's device numbers.
const MINOR_BITS: u32 = 20;

/// The size of the copy buffer.
const COPY_BYTES: usize = 1 << 20;

/// A file whose contents go into the images.
#[derive(Debug)]
struct Ghost {
    id: u32,
    file: OwnedFd,
    stat: libc::stat,
    name: Vec<u8>,
}

/// The deleted files of a tree.
#[derive(Debug, Default)]
pub struct DeletedFiles {
    options: Options,
    external: External,
    ghosts: Vec<Ghost>,
    known: HashMap<(u64, u64), u32>,
    remaps: Vec<proto::RemapFilePathEntry>,
    link_remaps: LinkRemaps,
}

/// Link remaps, which are removed when this is dropped.
#[derive(Debug, Default)]
struct LinkRemaps {
    /// With the root directories in which they are looked up.
    paths: Vec<(Root, PathBuf)>,
}

impl DeletedFiles {
    /// Returns an empty table.
    pub fn new(options: &Options, external: &External) -> Self {
        Self { options: *options, external: external.clone(), ..Self::default() }
    }

    /// Whether the user will provide this object for the restore.
    pub(in crate::res::file) fn is_external(&self, name: &str) -> bool {
        self.external.contains(name)
    }

    /// Whether a file, by `st_dev` and `st_ino`, is a ghost.
    pub(in crate::res::file) fn is_ghost(&self, key: (u64, u64)) -> bool {
        self.known.contains_key(&key)
    }

    /// Enters a ghost file, whose entry in `files.img` will have the number `id`.
    ///
    /// # Errors
    /// [`FileError::Unsupported`] if it exceeds `--ghost-limit`, or is a socket or block device.
    pub(in crate::res::file) fn ghost(
        &mut self,
        file: &Description,
        name: &[u8],
        id: u32,
    ) -> Result<()> {
        let key = (file.stat.st_dev, file.stat.st_ino);
        let ghost = match self.known.get(&key) {
            Some(ghost) => *ghost,
            None => self.add(file, name, key)?,
        };
        self.remap(id, ghost, RemapType::Ghost);
        Ok(())
    }

    fn add(&mut self, file: &Description, name: &[u8], key: (u64, u64)) -> Result<u32> {
        let bytes = file.stat.st_blocks.cast_unsigned() * BLOCK_BYTES;
        let shown = String::from_utf8_lossy(name);
        if file.is_type(libc::S_IFREG) && bytes > self.options.limit_bytes {
            let limit = self.options.limit_bytes;
            let what = format!(
                "the deleted file {shown}, whose {bytes} bytes exceed the limit of {limit}"
            );
            return Err(file.unsupported(what, "raise the limit with --ghost-limit"));
        }
        if file.is_type(libc::S_IFSOCK) || file.is_type(libc::S_IFBLK) {
            let what = format!("the deleted socket or block device {shown}");
            return Err(file.unsupported(what, "close it"));
        }
        if file.is_type(libc::S_IFREG) && file.has_write_lease() {
            let what = format!("the deleted file {shown} with a lease that reading would break");
            return Err(file.unsupported(what, "have the program release the lease"));
        }
        let id = u32::try_from(self.ghosts.len() + 1).expect("fewer than descriptors");
        let duplicate = file.fd.try_clone();
        self.ghosts.push(Ghost {
            id,
            file: duplicate.map_err(|_| file.failed("duplicate")(Errno::EMFILE))?,
            stat: file.stat,
            name: name.to_vec(),
        });
        self.known.insert(key, id);
        Ok(id)
    }

    fn remap(&mut self, orig_id: u32, remap_id: u32, kind: RemapType) {
        let remap_type = Some(kind.into());
        self.remaps.push(proto::RemapFilePathEntry { orig_id, remap_id, remap_type });
    }

    /// Writes the images of all deleted files. Reads the ghost files, so the tree must still be
    /// stopped.
    pub fn write(&self, images: &SnapshotWriter) -> Result<()> {
        for ghost in &self.ghosts {
            ghost.write(images)?;
        }
        if !self.remaps.is_empty() {
            images.write(Kind::RemapFpath, 0, &self.remaps)?;
        }
        Ok(())
    }

    /// Keeps the link remaps, which are otherwise removed when the table is dropped. Call it when
    /// the snapshot is complete and the tree does not resume.
    pub fn keep_link_remaps(&mut self) {
        self.link_remaps.paths.clear();
    }

    /// Warns about link remaps that a restore needs and that are about to be removed.
    pub fn warn_about_link_remaps(&self) {
        for (_, link) in &self.link_remaps.paths {
            log::warn!(
                "removing the link remap {} of a deleted file, because the tree resumes, although a \
                 restore of this snapshot needs it; copy the file system in a post-dump action, or \
                 dump without -R",
                link.display()
            );
        }
    }
}

impl Drop for LinkRemaps {
    fn drop(&mut self) {
        for (root, link) in &self.paths {
            let spelled = root.spell(link).map_err(io::Error::from);
            if let Err(error) = spelled.and_then(fs::remove_file) {
                log::warn!("cannot remove {}: {error}", link.display());
            }
        }
    }
}

/// Gives a deleted file that still has other names a link remap in the directory of `name`, or in
/// the nearest one above that exists.
///
/// # Errors
/// [`FileError::Unsupported`] without `--link-remap`.
pub(in crate::res::file) fn link(
    file: &Description,
    name: &[u8],
    id: u32,
    intake: &mut dyn Intake,
) -> Result<()> {
    if !intake.deleted_files().options.link_remap {
        let what =
            format!("the file {}, which no longer has this name", String::from_utf8_lossy(name));
        return Err(
            file.unsupported(what, "allow rcriu to link it under another name with --link-remap")
        );
    }
    let root = intake.root_of(file).clone();
    let mut dir = Path::new(OsStr::from_bytes(name)).parent();
    let (link_id, path) = loop {
        let Some(at) = dir else {
            return Err(file.failed("link a new name to")(Errno::ENOENT));
        };
        // Other dumps may have left link remaps there.
        let ids = std::iter::repeat_with(|| intake.new_id());
        let (link_id, path) = ids
            .map(|id| (id, at.join(link_name(id))))
            .find(|(_, path)| root.lstat(path).is_err())
            .expect("there are fewer files than numbers");
        // Like CRIU: link by the descriptor, which needs CAP_DAC_READ_SEARCH, or else through
        // /proc.
        let fd = file.fd.as_fd();
        let linked = root.make(|| {
            let path = root.spell(&path)?;
            let by_descriptor = linkat(fd, "", AT_FDCWD, &*path, AtFlags::AT_EMPTY_PATH);
            by_descriptor.or_else(|_| {
                let source = descriptor::path_of(fd);
                linkat(AT_FDCWD, source.as_str(), AT_FDCWD, &*path, AtFlags::AT_SYMLINK_FOLLOW)
            })
        });
        match linked {
            Ok(()) => break (link_id, path),
            // The directory is deleted as well; or on an overlay, the file itself is.
            Err(Errno::ENOENT) if root.stat(at).is_err() => dir = at.parent(),
            Err(Errno::ENOENT) => return intake.deleted_files().ghost(file, name, id),
            Err(errno) => return Err(file.failed("link a new name to")(errno)),
        }
    };
    let entry = proto::RegFileEntry {
        id: link_id,
        name: path.as_os_str().as_bytes().to_vec(),
        mnt_id: intake.mount_of(file),
        ..Default::default()
    };
    let deleted = intake.deleted_files();
    deleted.link_remaps.paths.push((root, path));
    deleted.remap(id, link_id, RemapType::Linked);
    intake.push(proto::FileEntry {
        r#type: FdTypes::Reg.into(),
        id: link_id,
        reg: Some(entry),
        ..Default::default()
    });
    Ok(())
}

/// Returns a device number in the kernel's own form (`linux/kdev_t.h`). The images use it for the
/// file system of a ghost, but not for a device file.
fn kernel_device(device: u64) -> u32 {
    let number = major(device) << MINOR_BITS | minor(device);
    u32::try_from(number).unwrap_or(u32::MAX)
}

/// Returns the nanoseconds of a time that its microseconds do not hold.
fn below_microsecond(nanoseconds: i64) -> Option<u32> {
    u32::try_from(nanoseconds % 1000).ok().filter(|rest| *rest != 0)
}

impl Ghost {
    fn write(&self, images: &SnapshotWriter) -> Result<()> {
        let format = self.stat.st_mode & libc::S_IFMT;
        let size = self.stat.st_size.cast_unsigned();
        let chunks = format == libc::S_IFREG && size >= CHUNKED_FROM_BYTES;
        let time = |seconds: i64, nanoseconds: i64| proto::Timeval {
            tv_sec: seconds.cast_unsigned(),
            tv_usec: (nanoseconds / 1000).cast_unsigned(),
        };
        let device = matches!(format, libc::S_IFCHR | libc::S_IFBLK);
        let low = |number: u64| u32::try_from(number & u64::from(u32::MAX)).expect("32 bits");
        let mut entry = proto::GhostFileEntry {
            uid: self.stat.st_uid,
            gid: self.stat.st_gid,
            mode: self.stat.st_mode,
            dev: Some(kernel_device(self.stat.st_dev)),
            ino: Some(self.stat.st_ino),
            rdev: device.then(|| low(self.stat.st_rdev)),
            atim: Some(time(self.stat.st_atime, self.stat.st_atime_nsec)),
            mtim: Some(time(self.stat.st_mtime, self.stat.st_mtime_nsec)),
            chunks: chunks.then_some(true),
            size: chunks.then_some(size),
            symlnk_target: None,
            rcriu_xattrs: Vec::new(),
            rcriu_atim_nsec: below_microsecond(self.stat.st_atime_nsec),
            rcriu_mtim_nsec: below_microsecond(self.stat.st_mtime_nsec),
        };
        if format != libc::S_IFLNK {
            let path = descriptor::path_of(self.file.as_fd());
            let all = xattr::all(Path::new(&path)).map_err(|errno| self.unreadable(errno))?;
            let attribute = |(name, value)| proto::RcriuXattr { name, value };
            entry.rcriu_xattrs = all.into_iter().map(attribute).collect();
        }
        if format == libc::S_IFLNK {
            let target = readlinkat(&self.file, "").map_err(|errno| self.unreadable(errno))?;
            entry.symlnk_target = Some(target.as_bytes().to_vec());
        }
        let mut image = images.create(Kind::GhostFile, self.id.into())?;
        image.message(&entry)?;
        if format == libc::S_IFREG {
            let path = format!("/proc/self/fd/{}", self.file.as_raw_fd());
            let file = fds::open_noatime(path)
                .map_err(|error| self.unreadable(crate::sys::errno(&error)))?;
            if chunks {
                self.write_chunks(&file, size, &mut image)?;
            } else {
                self.copy(&file, 0, size, &mut image)?;
            }
        }
        image.finish()?;
        Ok(())
    }

    fn write_chunks(
        &self,
        file: &File,
        size: u64,
        image: &mut ImageWriter<impl Write>,
    ) -> Result<()> {
        let seek = |offset: u64, whence| match lseek(file, offset.cast_signed(), whence) {
            Ok(found) => Ok(found.cast_unsigned().min(size)),
            Err(Errno::ENXIO) => Ok(size),
            Err(errno) => Err(self.unreadable(errno)),
        };
        let mut at = 0;
        while at < size {
            let data = seek(at, Whence::SeekData)?;
            if data == size {
                break;
            }
            let end = seek(data, Whence::SeekHole)?;
            image.message(&proto::GhostChunkEntry { len: end - data, off: data })?;
            self.copy(file, data, end - data, image)?;
            at = end;
        }
        Ok(())
    }

    fn copy(
        &self,
        file: &File,
        mut offset: u64,
        len: u64,
        image: &mut ImageWriter<impl Write>,
    ) -> Result<()> {
        let end = offset + len;
        let mut buffer = vec![0; COPY_BYTES];
        while offset < end {
            let wanted = usize::try_from(end - offset).unwrap_or(COPY_BYTES).min(COPY_BYTES);
            match file.read_at(&mut buffer[..wanted], offset) {
                // A process that is not stopped has truncated the file.
                Ok(0) => return Err(self.unreadable(Errno::ENODATA)),
                Ok(bytes) => {
                    image.raw(&buffer[..bytes])?;
                    offset += bytes as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    let errno = crate::sys::errno(&error);
                    return Err(self.unreadable(errno));
                }
            }
        }
        Ok(())
    }

    fn unreadable(&self, errno: Errno) -> FileError {
        let path = PathBuf::from(OsStr::from_bytes(&self.name));
        FileError::Images(ImageError::Read { path, offset: 0, source: errno.into() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_of_ghosts_are_in_the_form_of_the_kernel() {
        // /dev/vda is 254:0.
        assert_eq!(kernel_device(nix::sys::stat::makedev(254, 0)), 0x0fe0_0000);
        assert_eq!(kernel_device(nix::sys::stat::makedev(0, 300)), 300);
    }
}
