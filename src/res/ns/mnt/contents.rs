//! The contents of a tmpfs: packed into an image by a dump, as `tar` and `gzip` do, and unpacked by a
//! restore.

use std::{
    collections::HashMap,
    ffi::OsStr,
    fs::{self, File},
    io::{self, Read, Write},
    os::{
        fd::{AsRawFd, BorrowedFd, OwnedFd},
        unix::{
            ffi::OsStrExt,
            fs::{
                FileExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt, lchown, symlink,
            },
        },
    },
    path::{Component, Path, PathBuf},
};

use flate2::{Compression, read::MultiGzDecoder, write::GzEncoder};
use nix::{
    errno::Errno,
    libc,
    sys::stat::{Mode, SFlag, UtimensatFlags, major, makedev, minor, mknod, utimensat},
    sys::time::TimeSpec,
};
use tar::{Archive, Builder, Entry, EntryType, Header};

use crate::{
    image::{ImageError, ImageStore, ImageWriter, Kind, SnapshotWriter},
    proc::Mount,
    res::{ResError, Result},
    sys::{fds, root, visit, xattr},
    units::HostPid,
};

/// The prefix of the names of records of extended attributes in archives.
const XATTR: &str = "SCHILY.xattr.";

/// The size of the buffer for file contents: blocks of zeros of this size become holes.
const BLOCK_BYTES: usize = 64 << 10;

/// The name of a single file in an archive.
const SINGLE: &str = "file";

/// The permissions of a mode.
const PERMISSIONS: u32 = 0o7777;

/// Packs the files of a tmpfs, or a single deleted file or directory, into the image of this kind with this
/// number. In the user namespace of
/// process `users`, if it is given: the owners are numbers there. The archive is empty if there is no
/// `tree`.
pub(super) fn pack(
    tree: Option<&OwnedFd>,
    mount: &Mount,
    (kind, number): (Kind, u32),
    images: &SnapshotWriter,
    users: Option<HostPid>,
) -> Result<()> {
    let image = images.create(kind, number.into())?;
    let pack = || pack_into(image, tree);
    let packed = match users {
        Some(users) => visit::in_users(users, None, pack),
        None => pack(),
    };
    let image = packed.map_err(|source| ResError::Mount {
        point: mount.point.clone(),
        step: "pack the files of",
        source,
    })?;
    image.finish()?;
    Ok(())
}

fn pack_into<W: Write>(
    image: ImageWriter<W>,
    tree: Option<&OwnedFd>,
) -> io::Result<ImageWriter<W>> {
    let packed = GzEncoder::new(Sink(image), Compression::fast());
    let mut packer = Packer { archive: Builder::new(packed), links: HashMap::new() };
    if let Some(tree) = tree {
        let top = PathBuf::from(format!("/proc/self/fd/{}", tree.as_raw_fd()));
        let mut pending = vec![PathBuf::new()];
        while let Some(name) = pending.pop() {
            packer.add(&top, &name, &mut pending)?;
        }
    }
    let Sink(image) = packer.archive.into_inner().and_then(GzEncoder::finish)?;
    Ok(image)
}

/// Writes into an image.
struct Sink<W: Write>(ImageWriter<W>);

impl<W: Write> Write for Sink<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.raw(bytes).map_err(io::Error::other)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Packer<W: Write> {
    archive: Builder<GzEncoder<W>>,
    /// The first names of files with several, by inode number.
    links: HashMap<u64, PathBuf>,
}

impl<W: Write> Packer<W> {
    /// Adds a file. The names in a directory become `pending`.
    fn add(&mut self, top: &Path, name: &Path, pending: &mut Vec<PathBuf>) -> io::Result<()> {
        let is_top = name.as_os_str().is_empty();
        // The top is a descriptor's link.
        let is_single = is_top && !fs::metadata(top)?.is_dir();
        let path = match (is_top, is_single) {
            (_, true) => top.to_owned(),
            (true, false) => top.join("."),
            (false, false) => top.join(name),
        };
        let found = if is_top { fs::metadata(&path) } else { fs::symlink_metadata(&path) }?;
        let shown = Path::new(".").join(if is_single { Path::new(SINGLE) } else { name });
        let mut header = Header::new_gnu();
        header.set_metadata(&found);
        header.set_uid(found.uid().into());
        header.set_gid(found.gid().into());
        header.set_mode(found.mode() & PERMISSIONS);
        header.set_size(0);
        let kind = found.file_type();
        if kind.is_socket() {
            log::debug!("{}: not packing a socket", name.display());
            return Ok(());
        }
        if !found.is_dir() && found.nlink() > 1 {
            if let Some(first) = self.links.get(&found.ino()) {
                header.set_entry_type(EntryType::Link);
                let first = Path::new(".").join(first);
                return self.archive.append_link(&mut header, &shown, &first);
            }
            self.links.insert(found.ino(), name.to_owned());
        }
        self.add_attributes(&path, &found)?;
        if kind.is_dir() {
            header.set_entry_type(EntryType::Directory);
            let mut names = Vec::new();
            for entry in fs::read_dir(&path)? {
                names.push(name.join(entry?.file_name()));
            }
            names.sort_unstable_by(|a, b| b.cmp(a));
            pending.append(&mut names);
            return self.archive.append_data(&mut header, &shown, io::empty());
        }
        if kind.is_symlink() {
            header.set_entry_type(EntryType::Symlink);
            return self.archive.append_link(&mut header, &shown, fs::read_link(&path)?);
        }
        if kind.is_file() {
            header.set_entry_type(EntryType::Regular);
            header.set_size(found.len());
            let file = fds::open_noatime(&path)?;
            return self.archive.append_data(&mut header, &shown, file);
        }
        header.set_entry_type(if kind.is_fifo() {
            EntryType::Fifo
        } else if kind.is_char_device() {
            EntryType::Char
        } else {
            EntryType::Block
        });
        let low =
            |number: u64| u32::try_from(number).map_err(|_| io::Error::from(Errno::EOVERFLOW));
        header.set_device_major(low(major(found.rdev()))?)?;
        header.set_device_minor(low(minor(found.rdev()))?)?;
        self.archive.append_data(&mut header, &shown, io::empty())
    }

    /// Adds the records for what the header of a file has no room for.
    fn add_attributes(&mut self, path: &Path, found: &fs::Metadata) -> io::Result<()> {
        let mut records = Vec::new();
        if found.mtime_nsec() != 0 {
            let time = format!("{}.{:09}", found.mtime(), found.mtime_nsec());
            records.push(("mtime".to_owned(), time.into_bytes()));
        }
        // The call follows links.
        let all = if found.is_symlink() { Vec::new() } else { xattr::all(path)? };
        for (name, value) in all {
            // POSIX ACLs and the labels of security modules are attributes, too.
            if let Ok(name) = String::from_utf8(name) {
                records.push((format!("{XATTR}{name}"), value));
            }
        }
        let records = records.iter().map(|(name, value)| (name.as_str(), value.as_slice()));
        self.archive.append_pax_extensions(records)
    }
}

/// Unpacks the files of the mount `point`, if an image has them, into `tree`. Returns whether one has.
/// In the user namespace of a process and with these ids inside, if they are given: such a file system
/// takes no files of users whom the namespace does not map.
pub(super) fn unpack(
    images: &dyn ImageStore,
    (device, mount): (u32, u32),
    point: &Path,
    tree: BorrowedFd,
    users: Option<(HostPid, (u32, u32))>,
) -> Result<bool> {
    let names = [Kind::TmpfsDev.file_name(device.into()), Kind::TmpfsImg.file_name(mount.into())];
    let stored = images.list().map_err(|source| unreadable(images, "", source))?;
    let Some(name) = names.into_iter().find(|name| stored.contains(name)) else {
        return Ok(false);
    };
    let input = images.open(&name).map_err(|source| unreadable(images, &name, source))?;
    let failed = |source| ResError::Mount { point: point.to_owned(), step: "unpack", source };
    let unpack = || unpack_from(input.bytes, tree);
    let unpacked = match users {
        Some((pid, ids)) => visit::in_users(pid, Some(ids), unpack),
        None => unpack(),
    };
    unpacked.map(|()| true).map_err(failed)
}

/// Unpacks the deleted file or directory with this number, if an image has it, as `name` in `tree`. Users are as
/// for [`unpack`]. Returns whether one has it.
pub(super) fn unpack_deleted(
    images: &dyn ImageStore,
    number: u32,
    (point, name): (&Path, &Path),
    tree: BorrowedFd,
    users: Option<(HostPid, (u32, u32))>,
) -> Result<bool> {
    let image = Kind::DeletedMount.file_name(number.into());
    let stored = images.list().map_err(|source| unreadable(images, "", source))?;
    if !stored.contains(&image) {
        return Ok(false);
    }
    let input = images.open(&image).map_err(|source| unreadable(images, &image, source))?;
    let failed = |source| ResError::Mount { point: point.to_owned(), step: "unpack", source };
    let unpack = || -> io::Result<()> {
        let mut archive = Archive::new(MultiGzDecoder::new(input.bytes));
        let mut unpacker = Unpacker { tree, directories: Vec::new() };
        let entry = archive.entries()?.next();
        let mut entry = entry.unwrap_or(Err(io::ErrorKind::UnexpectedEof.into()))?;
        unpacker.make_as(name.to_owned(), &mut entry)?;
        unpacker.finish()
    };
    let unpacked = match users {
        Some((pid, ids)) => visit::in_users(pid, Some(ids), unpack),
        None => unpack(),
    };
    unpacked.map(|()| true).map_err(failed)
}

fn unpack_from(packed: impl Read, tree: BorrowedFd) -> io::Result<()> {
    let mut archive = Archive::new(MultiGzDecoder::new(packed));
    let mut unpacker = Unpacker { tree, directories: Vec::new() };
    for entry in archive.entries()? {
        unpacker.make(&mut entry?)?;
    }
    unpacker.finish()
}

fn unreadable(images: &dyn ImageStore, name: &str, source: io::Error) -> ResError {
    ImageError::Read { path: images.name().join(name), offset: 0, source }.into()
}

/// What an archive says of a file besides its contents.
struct Attributes {
    uid: u32,
    gid: u32,
    mode: u32,
    modified: TimeSpec,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

struct Unpacker<'a> {
    tree: BorrowedFd<'a>,
    /// Directories, whose attributes are set once they have their files.
    directories: Vec<(PathBuf, Attributes)>,
}

impl Unpacker<'_> {
    fn make(&mut self, entry: &mut Entry<'_, impl Read>) -> io::Result<()> {
        let name = inside(&entry.path_bytes())?;
        self.make_as(name, entry)
    }

    fn make_as(&mut self, name: PathBuf, entry: &mut Entry<'_, impl Read>) -> io::Result<()> {
        let attributes = attributes(entry)?;
        let kind = entry.header().entry_type();
        if name.as_os_str().is_empty() {
            if kind == EntryType::Directory {
                self.directories.push((name, attributes));
            }
            return Ok(());
        }
        let (_directory, path) = self.spell(&name)?;
        let private = Mode::S_IRUSR | Mode::S_IWUSR;
        let device = || -> io::Result<u64> {
            let (major, minor) = (entry.header().device_major()?, entry.header().device_minor()?);
            Ok(makedev(major.unwrap_or(0).into(), minor.unwrap_or(0).into()))
        };
        match kind {
            EntryType::Directory => {
                match fs::create_dir(&path) {
                    Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                    made => made?,
                }
                self.directories.push((name, attributes));
                return Ok(());
            }
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
                let mut options = File::options();
                let mut file = options.write(true).create_new(true).mode(0o600).open(&path)?;
                copy(entry, &mut file)?;
            }
            EntryType::Symlink => {
                let target = entry.link_name_bytes().ok_or(Errno::EINVAL)?;
                symlink(OsStr::from_bytes(&target), &path)?;
            }
            EntryType::Link => {
                let target = inside(&entry.link_name_bytes().ok_or(Errno::EINVAL)?)?;
                let (_directory, target) = self.spell(&target)?;
                return fs::hard_link(target, &path);
            }
            EntryType::Fifo => mknod(&path, SFlag::S_IFIFO, private, 0)?,
            EntryType::Char => mknod(&path, SFlag::S_IFCHR, private, device()?)?,
            EntryType::Block => mknod(&path, SFlag::S_IFBLK, private, device()?)?,
            other => {
                let what = format!("{} has the unknown type {other:?}", name.display());
                return Err(io::Error::new(io::ErrorKind::InvalidData, what));
            }
        }
        set(&path, &attributes, kind == EntryType::Symlink)
    }

    /// Returns a path for calls that do not follow links at its end, valid as long as the directory is
    /// open. No link on the way is followed.
    fn spell(&self, name: &Path) -> io::Result<(OwnedFd, PathBuf)> {
        let above = name.parent().unwrap_or(Path::new(""));
        let directory = root::name_on_mount(self.tree, above.as_os_str().as_bytes())?;
        let path = format!("/proc/self/fd/{}", directory.as_raw_fd());
        let last = name.file_name().unwrap_or(OsStr::new("."));
        Ok((directory, Path::new(&path).join(last)))
    }

    fn finish(self) -> io::Result<()> {
        for (name, attributes) in self.directories.iter().rev() {
            let (_directory, path) = self.spell(name)?;
            set(&path, attributes, false)?;
        }
        Ok(())
    }
}

/// Returns a name in an archive, relative to its root.
fn inside(name: &[u8]) -> io::Result<PathBuf> {
    let mut path = PathBuf::new();
    for part in Path::new(OsStr::from_bytes(name)).components() {
        match part {
            Component::Normal(part) => path.push(part),
            Component::CurDir | Component::RootDir => {}
            Component::ParentDir | Component::Prefix(_) => {
                let what = format!(
                    "the name {} leads out of the file system",
                    String::from_utf8_lossy(name)
                );
                return Err(io::Error::new(io::ErrorKind::InvalidData, what));
            }
        }
    }
    Ok(path)
}

fn attributes(entry: &mut Entry<'_, impl Read>) -> io::Result<Attributes> {
    let id = |number: u64| u32::try_from(number).map_err(|_| io::Error::from(Errno::EOVERFLOW));
    let header = entry.header();
    let seconds = i64::try_from(header.mtime()?).unwrap_or(i64::MAX);
    let mut found = Attributes {
        uid: id(header.uid()?)?,
        gid: id(header.gid()?)?,
        mode: header.mode()? & PERMISSIONS,
        modified: TimeSpec::new(seconds, 0),
        xattrs: Vec::new(),
    };
    for record in entry.pax_extensions()?.into_iter().flatten() {
        let record = record?;
        let Ok(key) = record.key() else { continue };
        if let Some(name) = key.strip_prefix(XATTR) {
            found.xattrs.push((name.as_bytes().to_vec(), record.value_bytes().to_vec()));
        } else if key == "mtime"
            && let Ok(value) = record.value()
            && let Some((seconds, rest)) = value.split_once('.')
            && let (Ok(seconds), Ok(rest)) = (seconds.parse(), format!("{rest:0<9.9}").parse())
        {
            found.modified = TimeSpec::new(seconds, rest);
        }
    }
    Ok(found)
}

/// Writes the contents of a file, with holes for blocks of zeros.
fn copy(from: &mut impl Read, to: &mut File) -> io::Result<()> {
    let mut buffer = vec![0; BLOCK_BYTES];
    let mut offset = 0;
    loop {
        let mut filled = 0;
        while filled < buffer.len() {
            match from.read(&mut buffer[filled..])? {
                0 => break,
                bytes => filled += bytes,
            }
        }
        if filled == 0 {
            return to.set_len(offset);
        }
        if buffer[..filled].iter().any(|byte| *byte != 0) {
            to.write_all_at(&buffer[..filled], offset)?;
        }
        offset += filled as u64;
    }
}

fn set(path: &Path, attributes: &Attributes, is_link: bool) -> io::Result<()> {
    match lchown(path, Some(attributes.uid), Some(attributes.gid)) {
        // The user namespace has no such ids.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => log::warn!(
            "{}: no user {} or no group {} in the user namespace: not set",
            path.display(),
            attributes.uid,
            attributes.gid
        ),
        result => result?,
    }
    if !is_link {
        fs::set_permissions(path, fs::Permissions::from_mode(attributes.mode))?;
        for (name, value) in &attributes.xattrs {
            xattr::set(path, name, value)?;
        }
    }
    let now = TimeSpec::new(0, libc::UTIME_OMIT);
    utimensat(
        nix::fcntl::AT_FDCWD,
        path,
        &now,
        &attributes.modified,
        UtimensatFlags::NoFollowSymlink,
    )?;
    Ok(())
}
