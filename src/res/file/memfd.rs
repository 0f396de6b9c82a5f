//! Shared memory objects with descriptors: memfds, and anonymous shared memory.
//!
//! `files.img` holds the descriptions, `memfd.img` the objects. The bytes of an object are pages of
//! shared memory; the restore fills the object, which it finds in [`Opened::objects`], elsewhere.
//! restores them finds the object in [`Opened::objects`].

use std::{
    collections::HashMap,
    ffi::CString,
    fs,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, SealFlag, fcntl},
    libc,
    sys::stat::{Mode, fchmod, fstat},
    unistd::{Gid, Uid, fchown, ftruncate},
};

use super::{
    Collector, Description, FileError, FileKind, Intake, Opened, Opener, Result, Usage, descriptor,
};
use crate::{
    image::{
        ImageStore, Kind, SnapshotWriter,
        proto::{self, FdTypes},
    },
    sys::{fds, process},
    units::HugeSize,
};

pub(super) const KIND: FileKind = FileKind {
    name: "memfd",
    types: &[FdTypes::Memfd],
    usage: Usage::Memory,
    collector: |_| Box::new(Memfds::probe()),
    opener: |_| Box::new(MemfdOpener::default()),
};

/// The kernel's names for anonymous shared memory, with normal and with huge pages.
const ANONYMOUS: [&[u8]; 2] = [b"/dev/zero", b"/anon_hugepage"];
/// The prefix of links to memfds.
const PREFIX: &[u8] = b"/memfd:";
/// The suffix of links to deleted files.
const DELETED: &[u8] = b" (deleted)";
/// Where the kernel lists the supported sizes of huge pages.
const HUGE_PAGES: &str = "/sys/kernel/mm/hugepages";
/// The mode bits that `fchmod(2)` sets.
const PERMISSIONS: u32 = 0o7777;
/// `F_SEAL_SEAL` (`include/uapi/linux/fcntl.h`): the only seal of a memfd created without
/// `MFD_ALLOW_SEALING`.
const SEAL_SEAL: u32 = 1;
/// `F_SEAL_EXEC` (Linux 6.3).
const SEAL_EXEC: u32 = 0x20;
/// `MFD_EXEC` (`include/uapi/linux/memfd.h`, Linux 6.3).
const MFD_EXEC: u32 = 0x10;

/// The devices of the kernel's internal file systems for memfds, with the flags that create a
/// memfd on each.
#[derive(Debug)]
struct Devices(HashMap<u64, u32>);

impl Devices {
    fn probe() -> Self {
        let mut devices = HashMap::new();
        let sizes = fs::read_dir(HUGE_PAGES).into_iter().flatten().flatten();
        let huge = sizes.filter_map(|entry| {
            let name = entry.file_name();
            let kib = name.to_str()?.strip_prefix("hugepages-")?.strip_suffix("kB")?;
            let bytes = kib.parse::<u64>().ok()?.checked_mul(1024)?;
            Some(libc::MFD_HUGETLB | HugeSize::of(bytes).flags())
        });
        for flags in std::iter::once(0).chain(huge) {
            if let Ok(fd) = fds::memfd(c"probe", flags)
                && let Ok(stat) = fstat(&fd)
            {
                devices.insert(stat.st_dev, flags);
            }
        }
        Self(devices)
    }
}

struct Memfds {
    devices: Devices,
    inodes: Vec<proto::MemfdInodeEntry>,
    known: HashMap<(u64, u64), u32>,
}

impl Memfds {
    fn probe() -> Self {
        Self { devices: Devices::probe(), inodes: Vec::new(), known: HashMap::new() }
    }

    /// Returns the number in `memfd.img` of the object behind a description.
    fn inode(&mut self, file: &Description) -> Result<u32> {
        let key = (file.stat.st_dev, file.stat.st_ino);
        if let Some(id) = self.known.get(&key) {
            return Ok(*id);
        }
        let shmid = u32::try_from(file.stat.st_ino).map_err(|_| {
            file.unsupported(
                format!("shared memory with the large inode number {}", file.stat.st_ino),
                "images store it in 32 bits; restart the program soon after booting",
            )
        })?;
        let id = u32::try_from(self.inodes.len() + 1).expect("fewer than descriptors");
        let huge = self.devices.0.get(&file.stat.st_dev).copied().filter(|flags| *flags != 0);
        let name = file.link.strip_suffix(DELETED).unwrap_or(&file.link);
        self.inodes.push(proto::MemfdInodeEntry {
            name: name.strip_prefix(PREFIX).unwrap_or(name).to_vec(),
            uid: file.stat.st_uid,
            gid: file.stat.st_gid,
            size: file.stat.st_size.cast_unsigned(),
            shmid,
            seals: seals(file)?,
            inode_id: id.into(),
            hugetlb_flag: huge,
            mode: Some(file.stat.st_mode),
        });
        self.known.insert(key, id);
        Ok(id)
    }
}

fn seals(file: &Description) -> Result<u32> {
    let get = |fd: BorrowedFd| fcntl(fd, FcntlArg::F_GET_SEALS).map(i32::cast_unsigned);
    let seals = if descriptor::is_path(file.flags) {
        descriptor::reopen(file.fd.as_fd(), 0).and_then(|fd| get(fd.as_fd()))
    } else {
        get(file.fd.as_fd())
    };
    match seals {
        // Other shared memory cannot be sealed, which F_SEAL_SEAL expresses.
        Err(Errno::EINVAL) => Ok(SEAL_SEAL),
        result => result.map_err(file.failed("read the seals of")),
    }
}

impl Collector for Memfds {
    fn claims(&self, file: &Description) -> bool {
        file.is_type(libc::S_IFREG) && self.devices.0.contains_key(&file.stat.st_dev)
    }

    fn collect(&mut self, file: &Description, _: &mut dyn Intake) -> Result<proto::FileEntry> {
        Ok(proto::FileEntry {
            r#type: FdTypes::Memfd.into(),
            id: file.id,
            memfd: Some(proto::MemfdFileEntry {
                id: file.id,
                flags: file.status(),
                pos: file.info.pos,
                fown: file.fown,
                inode_id: self.inode(file)?,
            }),
            ..Default::default()
        })
    }

    fn finish(&mut self, images: &SnapshotWriter) -> Result<()> {
        if !self.inodes.is_empty() {
            images.write(Kind::MemfdInode, 0, &self.inodes)?;
        }
        Ok(())
    }
}

/// Creates an object of its size, still empty. [`seal`] sets the seals later: they could forbid
/// filling it.
///
/// # Errors
/// `EINVAL` if the name has a NUL byte.
fn create(inode: &proto::MemfdInodeEntry) -> nix::Result<OwnedFd> {
    let name = CString::new(inode.name.as_slice()).map_err(|_| Errno::EINVAL)?;
    let mut flags = inode.hugetlb_flag.unwrap_or(0);
    if inode.seals != SEAL_SEAL {
        flags |= libc::MFD_ALLOW_SEALING;
    }
    let executable = inode.mode.is_some_and(|mode| mode & 0o111 != 0);
    let executable = executable && inode.seals & SEAL_EXEC == 0;
    let made = if executable { fds::memfd(&name, flags | MFD_EXEC) } else { Err(Errno::EINVAL) };
    let fd = match made {
        Err(Errno::EINVAL) => fds::memfd(&name, flags)?,
        result => result?,
    };
    if inode.size != 0 {
        let size = i64::try_from(inode.size).map_err(|_| Errno::EFBIG)?;
        ftruncate(&fd, size)?;
    }
    fchown(&fd, Some(Uid::from_raw(inode.uid)), Some(Gid::from_raw(inode.gid)))?;
    if let Some(mode) = inode.mode {
        fchmod(&fd, Mode::from_bits_truncate(mode & PERMISSIONS))?;
    }
    Ok(fd)
}

/// Seals an object, after all mappings of it were made.
fn seal(fd: BorrowedFd, inode: &proto::MemfdInodeEntry) -> nix::Result<()> {
    // A memfd created without MFD_ALLOW_SEALING already has F_SEAL_SEAL.
    if inode.seals == 0 || inode.seals == SEAL_SEAL {
        return Ok(());
    }
    let seals = SealFlag::from_bits_retain(inode.seals.cast_signed());
    fcntl(fd, FcntlArg::F_ADD_SEALS(seals)).map(drop)
}

/// Reads the entries of `memfd.img`.
fn inodes(images: &dyn ImageStore) -> Result<Vec<proto::MemfdInodeEntry>> {
    Ok(images.messages_if_any(Kind::MemfdInode, 0)?.unwrap_or_default())
}

/// Restores shared memory with descriptors.
#[derive(Debug, Default)]
struct MemfdOpener {
    /// The entries of `memfd.img`, once they were read.
    inodes: Option<Vec<proto::MemfdInodeEntry>>,
}

impl Opener for MemfdOpener {
    fn open(&mut self, entries: &[proto::FileEntry], opened: &mut Opened) -> Result<()> {
        if entries.is_empty() {
            return Ok(());
        }
        let inodes: HashMap<u64, &proto::MemfdInodeEntry> =
            self.inodes(opened)?.iter().map(|inode| (inode.inode_id, inode)).collect();
        let mut originals = HashMap::new();
        for entry in entries {
            let missing = || FileError::image(entry.id, "it is a memfd, but its entry is missing");
            let file = entry.memfd.as_ref().ok_or_else(missing)?;
            let inode = inodes.get(&file.inode_id.into()).ok_or_else(|| {
                let problem = format!("memfd.img has no object {}", file.inode_id);
                FileError::image(entry.id, problem)
            })?;
            let failed = |step| FileError::restore(entry.id, step, &inode.name);
            let name = [PREFIX, &inode.name].concat();
            if let Some(given) = opened.inherited.duplicate(&name).map_err(failed("inherit"))? {
                opened.insert(entry.id, given);
                continue;
            }
            let object = match opened.objects.entry(inode.shmid.into()) {
                std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
                std::collections::hash_map::Entry::Vacant(entry) => {
                    entry.insert(create(inode).map_err(failed("create the memfd"))?)
                }
            };
            // Only the description that memfd_create(2) returned can be executed. Nothing else
            // uses the position and the flags of the object's descriptor, so share it.
            let access = file.flags.cast_signed() & (libc::O_ACCMODE | libc::O_PATH);
            let fd = if access == libc::O_RDWR && originals.insert(inode.shmid, ()).is_none() {
                let copy = object.try_clone().map_err(|_| Errno::EMFILE);
                copy.and_then(|fd| descriptor::set_status(fd.as_fd(), file.flags).map(|()| fd))
            } else {
                descriptor::reopen(object.as_fd(), file.flags)
            };
            let fd = fd.map_err(failed("open the memfd"))?;
            descriptor::seek(fd.as_fd(), file.pos, file.flags).map_err(failed("position"))?;
            opened.insert(entry.id, fd);
        }
        Ok(())
    }

    fn reopen(
        &mut self,
        entry: &proto::FileEntry,
        flags: i32,
        opened: &mut Opened,
    ) -> Result<OwnedFd> {
        let wrong = |problem: &str| FileError::image(entry.id, problem);
        let file = entry.memfd.as_ref();
        let inode_id =
            file.ok_or_else(|| wrong("it is mapped as a memfd, but is not one"))?.inode_id;
        let inodes = self.inodes(opened)?;
        let inode = inodes
            .iter()
            .find(|inode| inode.inode_id == u64::from(inode_id))
            .ok_or_else(|| wrong("memfd.img has no entry for it"))?;
        let object = opened.objects.get(&inode.shmid.into());
        let object = object.ok_or_else(|| wrong("its memory was not created"))?;
        descriptor::reopen(object.as_fd(), flags.cast_unsigned()).map_err(FileError::restore(
            entry.id,
            "open",
            &inode.name,
        ))
    }

    fn make_memory(&mut self, opened: &mut Opened) -> Result<Vec<u64>> {
        let mut made = Vec::new();
        for inode in self.inodes(opened)? {
            let shmid = u64::from(inode.shmid);
            let huge = inode.hugetlb_flag.map(HugeSize::in_flags);
            let step = if huge.is_some() {
                "reserve huge pages (see vm.nr_hugepages) for"
            } else {
                "create"
            };
            let fd = if ANONYMOUS.contains(&inode.name.as_slice()) {
                process::shared_anonymous(inode.size, huge)
            } else {
                create(inode).map_err(Into::into)
            };
            let fd = fd.map_err(|source| FileError::Memory { shmid, step, source })?;
            opened.objects.insert(shmid, fd);
            made.push(shmid);
        }
        Ok(made)
    }

    fn seal(&mut self, opened: &Opened) -> Result<()> {
        for inode in self.inodes(opened)? {
            if let Some(fd) = opened.objects.get(&inode.shmid.into()) {
                seal(fd.as_fd(), inode).map_err(FileError::restore(0, "seal", &inode.name))?;
            }
        }
        Ok(())
    }
}

impl MemfdOpener {
    /// Returns the entries of `memfd.img`.
    fn inodes(&mut self, opened: &Opened) -> Result<&[proto::MemfdInodeEntry]> {
        if self.inodes.is_none() {
            let mut inodes = inodes(&*opened.images)?;
            for inode in &mut inodes {
                (inode.uid, inode.gid) = opened.pids.ids().host_owner((inode.uid, inode.gid));
            }
            self.inodes = Some(inodes);
        }
        Ok(self.inodes.as_deref().unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        io::{Seek, SeekFrom, Write},
    };

    use super::*;
    use crate::res::file::testing::{Tree, stat};

    #[test]
    fn a_memfd_comes_back_with_all_its_descriptions() {
        let mut tree = Tree::new();
        let fd = fds::memfd(c"a \xff name", libc::MFD_ALLOW_SEALING).unwrap();
        let mut file = File::from(fd.try_clone().unwrap());
        file.set_len(12345).unwrap();
        file.write_all(b"abc").unwrap();
        fchmod(&fd, Mode::from_bits_truncate(0o640)).unwrap();
        let other = descriptor::reopen(fd.as_fd(), libc::O_APPEND.cast_unsigned()).unwrap();
        let third = descriptor::reopen(fd.as_fd(), libc::O_RDWR.cast_unsigned()).unwrap();
        File::from(third.try_clone().unwrap()).seek(SeekFrom::Start(77)).unwrap();
        fcntl(&fd, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK)).unwrap();
        tree.add(1, fd);
        tree.add(2, other);
        tree.add(3, third);
        tree.add(4, fds::memfd(c"unsealed", 0).unwrap());
        let restored = tree.restore();
        let inodes = inodes(&crate::image::Directory::at(restored.images())).unwrap();
        assert_eq!(inodes.len(), 2);
        assert_eq!((inodes[0].seals, inodes[1].seals), (2, 1));
        let object = &restored.opened().objects[&inodes[0].shmid.into()];
        seal(object.as_fd(), &inodes[0]).unwrap();
        let number = |id| stat(&restored.get(id)).st_ino;
        assert!(number(1) == number(2) && number(1) == number(3) && number(1) != number(4));
        for id in 1..=4 {
            let before = restored.before(id);
            assert_eq!(restored.flags(id), before.flags, "{id}");
            assert_eq!(restored.info(id).pos, before.info.pos);
            assert_eq!(restored.link(id), before.link);
            let now = stat(&restored.get(id));
            assert_eq!((now.st_size, now.st_mode), (before.stat.st_size, before.stat.st_mode));
            let seals = fcntl(restored.get(id), FcntlArg::F_GET_SEALS).unwrap();
            assert_eq!(seals, if id == 4 { 1 } else { 2 });
        }
    }
}
