//! Restores deleted files.
//!
//! The restore creates a ghost file under its old name, opens it once for each description, and
//! deletes the name at once, so that no file is left behind if rcriu is killed. A ghost that
//! never had a name (`O_TMPFILE`) gets none.

use std::{
    collections::HashMap,
    ffi::{OsStr, OsString},
    fs::{self, DirBuilder, File},
    io::Write,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::{
            ffi::{OsStrExt, OsStringExt},
            fs::{DirBuilderExt, FileExt, OpenOptionsExt, symlink},
        },
    },
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{AT_FDCWD, AtFlags},
    libc,
    sys::{
        stat::{FchmodatFlags, Mode, SFlag, UtimensatFlags, fchmodat, fstat, mknod, utimensat},
        time::TimeSpec,
    },
    unistd::{Gid, Uid, fchownat, linkat},
};

use super::link_name;
use crate::{
    image::{ImageReader, ImageStore, Kind, Remap, payload, proto},
    res::file::{FileError, Opened, Result, descriptor},
    sys::{
        root::{Root, Spelled},
        xattr,
    },
};

/// The mode without the file type.
const PERMISSIONS: u32 = 0o7777;

/// The mode of directories that exist only while a name in them does.
const DIRECTORY_MODE: u32 = 0o700;

/// A ghost file that the restore has recreated.
#[derive(Debug)]
struct RecreatedGhost {
    /// An `O_PATH` descriptor.
    object: OwnedFd,
    /// Its device, as the kernel encodes it, and its inode number when it was dumped.
    was: (Option<u32>, Option<u64>),
    is_link: bool,
    /// Descriptions not handed out yet, by the numbers of their entries.
    unused: HashMap<u32, OwnedFd>,
}

/// The deleted files that the restore has recreated.
#[derive(Debug, Default)]
pub struct Recreated {
    remaps: Option<HashMap<u32, Remap>>,
    ghosts: HashMap<u32, RecreatedGhost>,
    /// Device and inode of the files found under their link remaps, by the number of the entry
    /// with the link remap.
    linked: HashMap<u32, (u64, u64)>,
}

impl Recreated {
    /// Returns an `O_PATH` descriptor of the ghost that had this device, as the kernel encodes it, and
    /// this inode number when it was dumped.
    pub(in crate::res::file) fn ghost_of(&self, device: u32, inode: u64) -> Option<BorrowedFd<'_>> {
        let was = (Some(device), Some(inode));
        self.ghosts.values().find(|ghost| ghost.was == was).map(|ghost| ghost.object.as_fd())
    }
}

/// Reads the remap of each deleted file.
fn read(images: &dyn ImageStore) -> Result<HashMap<u32, Remap>> {
    let entries = images.messages_if_any::<proto::RemapFilePathEntry>(Kind::RemapFpath, 0)?;
    let mut remaps = HashMap::new();
    for entry in entries.into_iter().flatten() {
        let remap = Remap::of(&entry).map_err(|what| FileError::image(entry.orig_id, what))?;
        remaps.insert(entry.orig_id, remap);
    }
    Ok(remaps)
}

fn remaps(opened: &mut Opened) -> Result<&HashMap<u32, Remap>> {
    if opened.recreated.remaps.is_none() {
        opened.recreated.remaps = Some(read(&*opened.images)?);
    }
    Ok(opened.recreated.remaps.as_ref().expect("it was read"))
}

/// Opens the file of an entry if it was deleted; returns `None` if it was not.
pub(in crate::res::file) fn open(
    entry: &proto::RegFileEntry,
    flags: u32,
    opened: &mut Opened,
) -> Result<Option<OwnedFd>> {
    let failed = |step| FileError::restore(entry.id, step, &entry.name);
    match remaps(opened)?.get(&entry.id).copied() {
        None => Ok(None),
        Some(Remap::Process(pid)) => {
            let problem = format!(
                "it is {}, but process {pid} had exited before the dump and is not restored",
                String::from_utf8_lossy(&entry.name)
            );
            Err(FileError::image(entry.id, problem))
        }
        Some(Remap::Linked(other)) => {
            let (root, source) = linked(opened, entry.id, other)?;
            if root.lstat(&source) == Err(Errno::ENOENT) {
                let problem = format!(
                    "{}, the link remap of the file, does not exist; a dump removes its link remaps if \
                     the tree resumes\nhelp: restore from a copy of the file system that a post-dump \
                     action made while it existed",
                    source.display()
                );
                return Err(FileError::image(entry.id, problem));
            }
            let source = root.spell(&source).map_err(failed("link"))?;
            let link = |path: &Path| linkat(AT_FDCWD, &*source, AT_FDCWD, path, AtFlags::empty());
            let name = TemporaryName::give(&root, &entry.name, ".cr_link", link)
                .map_err(failed("link"))?;
            let fd = descriptor::open(&root, name.bytes(), flags).map_err(failed("open"))?;
            let stat = fstat(&fd).map_err(failed("examine"))?;
            opened.recreated.linked.insert(other, (stat.st_dev, stat.st_ino));
            Ok(Some(fd))
        }
        Some(Remap::Ghost(ghost)) => {
            if !opened.recreated.ghosts.contains_key(&ghost) {
                let made = make(ghost, entry, opened)?;
                opened.recreated.ghosts.insert(ghost, made);
            }
            let ghost = opened.recreated.ghosts.get_mut(&ghost).expect("it was just made");
            if flags == entry.flags
                && let Some(fd) = ghost.unused.remove(&entry.id)
            {
                return Ok(Some(fd));
            }
            if ghost.is_link {
                let copy = ghost.object.try_clone().map_err(|_| Errno::EMFILE);
                return copy.map(Some).map_err(failed("open"));
            }
            descriptor::reopen(ghost.object.as_fd(), flags).map(Some).map_err(failed("open"))
        }
    }
}

fn linked(opened: &Opened, id: u32, other: u32) -> Result<(Root, PathBuf)> {
    let entry = opened.entries.get(&other).and_then(|entry| entry.reg.as_ref());
    let missing = || {
        FileError::image(
            id,
            format!("its link remap is file {other:#x}, which files.img does not have"),
        )
    };
    let entry = entry.ok_or_else(missing)?;
    Ok((opened.root_of(entry).clone(), PathBuf::from(OsStr::from_bytes(&entry.name))))
}

/// Removes the link remaps. Call it when the restore has succeeded: a second restore would find
/// no link remaps.
///
/// Images are untrusted, so a file is removed only if its name is that of the link remap of its
/// entry, and if it still is the file that was restored. Link remaps that no longer exist are
/// not an error.
pub fn remove_link_remaps(opened: &mut Opened) -> Result<()> {
    let linked_to: Vec<(u32, u32)> = remaps(opened)?
        .iter()
        .filter_map(|(id, remap)| match remap {
            Remap::Linked(other) => Some((*id, *other)),
            _ => None,
        })
        .collect();
    for (id, other) in linked_to {
        let (root, path) = linked(opened, id, other)?;
        let found = match root.lstat(&path) {
            Err(Errno::ENOENT) => continue,
            found => {
                found.map_err(FileError::restore(id, "examine", path.as_os_str().as_bytes()))?
            }
        };
        let restored = opened.recreated.linked.get(&other);
        let is_given = path.file_name() == Some(OsStr::new(&link_name(other)));
        if !is_given || restored != Some(&(found.st_dev, found.st_ino)) {
            log::warn!(
                "not removing {}, which the images call a link remap: it is another file\nhelp: remove it if \
                 no program needs it",
                path.display()
            );
            continue;
        }
        match root.spell(&path).map_err(std::io::Error::from).and_then(fs::remove_file) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                log::warn!("cannot remove {}: {error}", path.display());
            }
            _ => {}
        }
    }
    Ok(())
}

/// A name that a file has until this is dropped, with the directories created for it.
struct TemporaryName {
    /// Where the paths are looked up.
    root: Root,
    path: PathBuf,
    directories: Vec<PathBuf>,
    is_directory: bool,
}

impl TemporaryName {
    /// Has `make` create a file at `path` or, if that exists, at `path` with `suffix`.
    fn give(
        root: &Root,
        path: &[u8],
        suffix: &str,
        make: impl Fn(&Path) -> nix::Result<()> + Sync,
    ) -> nix::Result<Self> {
        root.make(|| Self::give_here(root, path, suffix, &make))
    }

    fn give_here(
        root: &Root,
        path: &[u8],
        suffix: &str,
        make: &dyn Fn(&Path) -> nix::Result<()>,
    ) -> nix::Result<Self> {
        let path = PathBuf::from(OsString::from_vec(path.to_vec()));
        let mut name = Self {
            root: root.clone(),
            path: PathBuf::new(),
            directories: Vec::new(),
            is_directory: false,
        };
        for dir in path.ancestors().skip(1).collect::<Vec<_>>().into_iter().rev() {
            match DirBuilder::new().mode(DIRECTORY_MODE).create(&*root.spell(dir)?) {
                Ok(()) => name.directories.push(dir.to_owned()),
                Err(error) => match error.raw_os_error() {
                    Some(libc::EEXIST | libc::EISDIR | libc::EROFS | libc::EACCES) => {}
                    other => return Err(other.map_or(Errno::EIO, Errno::from_raw)),
                },
            }
        }
        match make(&root.spell(&path)?) {
            Err(Errno::EEXIST) => {
                let mut other = path.into_os_string();
                other.push(suffix);
                make(&root.spell(Path::new(&other))?)?;
                name.path = other.into();
            }
            result => {
                result?;
                name.path = path;
            }
        }
        Ok(name)
    }

    fn bytes(&self) -> &[u8] {
        self.path.as_os_str().as_bytes()
    }
}

impl Drop for TemporaryName {
    fn drop(&mut self) {
        let warn = |path: &Path, error| log::warn!("cannot remove {}: {error}", path.display());
        let spell = |path: &Path| self.root.spell(path).map_err(std::io::Error::from);
        if !self.path.as_os_str().is_empty() {
            let remove =
                if self.is_directory { fs::remove_dir::<Spelled> } else { fs::remove_file };
            if let Err(error) = spell(&self.path).and_then(remove) {
                warn(&self.path, error);
            }
        }
        for dir in self.directories.iter().rev() {
            if let Err(error) = spell(dir).and_then(fs::remove_dir) {
                warn(dir, error);
            }
        }
    }
}

/// Creates a ghost file and opens it for all its entries; `first` is one of them.
fn make(ghost: u32, first: &proto::RegFileEntry, opened: &mut Opened) -> Result<RecreatedGhost> {
    let mut image = opened.images.image(Kind::GhostFile, ghost.into())?;
    let Some(mut entry) = image.next_message::<proto::GhostFileEntry>()? else {
        return Err(FileError::image(first.id, format!("{} is empty", image.path().display())));
    };
    (entry.uid, entry.gid) = opened.pids.ids().host_owner((entry.uid, entry.gid));
    let failed = |step| FileError::restore(first.id, step, &first.name);

    if let Some(made) = make_linkable(ghost, &entry, first, &mut image, opened)? {
        return Ok(made);
    }
    let suffix = format!(".cr.{ghost:x}.{}.ghost", std::process::id());
    let root = opened.root_of(first);
    let mut name = TemporaryName::give(root, &first.name, &suffix, |path| make_node(path, &entry))
        .map_err(failed("make"))?;
    let format = entry.mode & libc::S_IFMT;
    name.is_directory = format == libc::S_IFDIR;
    let only_name = (libc::O_PATH | libc::O_NOFOLLOW).cast_unsigned();
    let object = descriptor::open(root, name.bytes(), only_name).map_err(failed("open"))?;
    // Another process may be able to write to the directory: check the file.
    let found = fstat(&object).map_err(failed("examine"))?;
    let is_new = format != libc::S_IFREG || (found.st_size, found.st_nlink) == (0, 1);
    if found.st_mode & libc::S_IFMT != format || !is_new {
        return Err(failed("make")(Errno::ESTALE));
    }
    if format == libc::S_IFREG {
        fill(object.as_fd(), &entry, &mut image, first)?;
    }
    adjust(object.as_fd(), &entry, &first.name).map_err(failed("adjust"))?;

    let mut unused = HashMap::new();
    if matches!(format, libc::S_IFREG | libc::S_IFDIR) {
        for user in users(ghost, opened) {
            if let Some(fd) = open_as(&name, user, format).map_err(failed("open"))? {
                unused.insert(user.id, fd);
            }
        }
    }
    let was = (entry.dev, entry.ino);
    Ok(RecreatedGhost { object, was, is_link: format == libc::S_IFLNK, unused })
}

/// Returns the entries of the descriptions of a ghost file.
fn users(ghost: u32, opened: &Opened) -> impl Iterator<Item = &proto::RegFileEntry> {
    let remaps = opened.recreated.remaps.as_ref();
    let is_of_it = move |id| remaps.and_then(|remaps| remaps.get(id)) == Some(&Remap::Ghost(ghost));
    let entries = opened.entries.values().filter(move |entry| is_of_it(&entry.id));
    entries.filter_map(|entry| entry.reg.as_ref())
}

/// Creates a ghost that never had a name (`O_TMPFILE`) and may be given one. Returns `None` for any
/// other ghost, and on a file system without `O_TMPFILE`.
fn make_linkable(
    ghost: u32,
    entry: &proto::GhostFileEntry,
    first: &proto::RegFileEntry,
    image: &mut ImageReader,
    opened: &Opened,
) -> Result<Option<RecreatedGhost>> {
    let Some(user) = users(ghost, opened).find(|user| descriptor::is_tmpfile(user.flags)) else {
        return Ok(None);
    };
    let failed = |step| FileError::restore(first.id, step, &first.name);
    let dir = first.name.iter().rposition(|byte| *byte == b'/').map_or(0, |at| at + 1);
    let own = match descriptor::open_tmpfile(opened.root_of(first), &first.name[..dir], user.flags)
    {
        Ok(own) => own,
        Err(errno) => {
            let name = String::from_utf8_lossy(&first.name);
            log::warn!(
                "the unnamed file {name} can no longer be given a name (linkat(2)): O_TMPFILE: \
                 {errno}"
            );
            return Ok(None);
        }
    };
    fill(own.as_fd(), entry, image, first)?;
    adjust(own.as_fd(), entry, &first.name).map_err(failed("adjust"))?;
    let only_name = libc::O_PATH.cast_unsigned();
    let object = descriptor::reopen(own.as_fd(), only_name).map_err(failed("open"))?;
    Ok(Some(RecreatedGhost {
        object,
        was: (entry.dev, entry.ino),
        is_link: false,
        unused: HashMap::from([(user.id, own)]),
    }))
}

/// Opens a ghost file, now at `name`, under the name of the entry `user`.
fn open_as(
    name: &TemporaryName,
    user: &proto::RegFileEntry,
    format: u32,
) -> nix::Result<Option<OwnedFd>> {
    if name.bytes() == user.name || format == libc::S_IFDIR {
        return descriptor::open(&name.root, name.bytes(), user.flags).map(Some);
    }
    let source = name.root.spell(&name.path)?;
    let link = |path: &Path| linkat(AT_FDCWD, &*source, AT_FDCWD, path, AtFlags::empty());
    match TemporaryName::give(&name.root, &user.name, ".cr_link", link) {
        Ok(other) => descriptor::open(&name.root, other.bytes(), user.flags).map(Some),
        // That name may be on another file system: then the description shows the first one.
        Err(_) => Ok(None),
    }
}

fn make_node(path: &Path, entry: &proto::GhostFileEntry) -> nix::Result<()> {
    let errno = |error: std::io::Error| crate::sys::errno(&error);
    let mode = Mode::S_IRUSR | Mode::S_IWUSR;
    match entry.mode & libc::S_IFMT {
        libc::S_IFREG => {
            let mut options = File::options();
            let file = options.write(true).create_new(true).mode(mode.bits()).open(path);
            file.map(drop).map_err(errno)
        }
        libc::S_IFDIR => DirBuilder::new().mode(DIRECTORY_MODE).create(path).map_err(errno),
        libc::S_IFLNK => {
            let target = entry.symlnk_target.as_deref().ok_or(Errno::EINVAL)?;
            symlink(OsStr::from_bytes(target), path).map_err(errno)
        }
        libc::S_IFIFO => mknod(path, SFlag::S_IFIFO, mode, 0),
        libc::S_IFCHR => {
            let device = entry.rdev.ok_or(Errno::EINVAL)?;
            mknod(path, SFlag::S_IFCHR, mode, device.into())
        }
        _ => Err(Errno::EOPNOTSUPP),
    }
}

fn fill(
    object: BorrowedFd,
    entry: &proto::GhostFileEntry,
    image: &mut ImageReader,
    first: &proto::RegFileEntry,
) -> Result<()> {
    let failed = |error: std::io::Error| {
        let errno = crate::sys::errno(&error);
        FileError::restore(first.id, "write", &first.name)(errno)
    };
    let written = descriptor::reopen(object, libc::O_WRONLY.cast_unsigned());
    let mut file = File::from(written.map_err(|errno| failed(errno.into()))?);
    if entry.chunks != Some(true) {
        return payload::pass(image, None, "deleted file", |bytes| {
            file.write_all(bytes).map_err(failed)
        });
    }
    let size = entry.size.ok_or_else(|| {
        FileError::image(first.id, "it is a deleted file in chunks, but its size is missing")
    })?;
    file.set_len(size).map_err(failed)?;
    while let Some(chunk) = image.next_message::<proto::GhostChunkEntry>()? {
        if chunk.off.checked_add(chunk.len).is_none_or(|end| end > size) {
            let problem = format!(
                "its bytes from {:#x} to {:#x} are beyond its end, {size:#x}",
                chunk.off,
                chunk.off.saturating_add(chunk.len)
            );
            return Err(FileError::image(first.id, problem));
        }
        let mut offset = chunk.off;
        payload::pass(image, Some(chunk.len), "deleted file", |bytes| {
            file.write_all_at(bytes, offset).map_err(failed)?;
            offset += bytes.len() as u64;
            Ok::<(), FileError>(())
        })?;
    }
    Ok(())
}

/// Sets owner, mode, extended attributes and times of a ghost file; `name` is its old name.
fn adjust(object: BorrowedFd, entry: &proto::GhostFileEntry, name: &[u8]) -> nix::Result<()> {
    let (uid, gid) = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
    fchownat(object, "", Some(uid), Some(gid), AtFlags::AT_EMPTY_PATH)?;
    // The path in /proc leads to the object itself, even if it is a symbolic link.
    let path = descriptor::path_of(object);
    if entry.mode & libc::S_IFMT != libc::S_IFLNK {
        let mode = Mode::from_bits_truncate(entry.mode & PERMISSIONS);
        fchmodat(AT_FDCWD, path.as_str(), mode, FchmodatFlags::FollowSymlink)?;
    }
    for attribute in &entry.rcriu_xattrs {
        if let Err(errno) = xattr::set(Path::new(&path), &attribute.name, &attribute.value) {
            log::warn!(
                "the extended attribute {} of the deleted file {} is lost: {errno}",
                String::from_utf8_lossy(&attribute.name),
                String::from_utf8_lossy(name)
            );
        }
    }
    if let (Some(access), Some(change)) = (&entry.atim, &entry.mtim) {
        let time = |time: &proto::Timeval, rest: Option<u32>| {
            let nanoseconds =
                (time.tv_usec % 1_000_000) * 1000 + u64::from(rest.unwrap_or(0) % 1000);
            TimeSpec::new(time.tv_sec.cast_signed(), nanoseconds.cast_signed())
        };
        let flag = UtimensatFlags::FollowSymlink;
        let access = time(access, entry.rcriu_atim_nsec);
        let change = time(change, entry.rcriu_mtim_nsec);
        utimensat(AT_FDCWD, path.as_str(), &access, &change, flag)?;
    }
    Ok(())
}
