//! The file system of a mount.

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    fs::File,
    io,
    os::{fd::OwnedFd, unix::ffi::OsStrExt},
    process,
    sync::{Arc, RwLockReadGuard},
};

use fuser::{Errno, FileAttr, FileType, INodeNo, ReplyData, ReplyOpen, Request};
use log::error;
use nix::sys::statfs::{OVERLAYFS_SUPER_MAGIC, statfs};

use super::{
    buffer,
    compose::Composer,
    errno::failed,
    follow::Follower,
    handles::Handles,
    mount::DAEMON_XATTR,
    punching::{Punch, Punching},
    recent::{self, LOG_XATTR, PLACE_XATTR},
    reply::{self, MappedReply},
};
use crate::{
    causes::with_sources,
    chain::{self, Content, DIRECTORY_XATTR, GONE_XATTR, PUNCH_XATTR},
    view::{Attr, Ino, NodeType, OpenFile, ROOT, View, ViewError},
};

/// The read size that `stat(2)` recommends: as much as one request can carry, since every
/// request takes two context switches.
const READ_BYTES: u32 = 1 << 20;

/// The recommended size for small files, which some readers use as the size of a buffer.
pub(super) const SMALL_READ_BYTES: u32 = 4096;

/// The additional permission of a file that can be punched: its owner can write to it.
const WRITABLE: u16 = 0o200;

/// The longest value of an attribute: as long as a path can be (`PATH_MAX`,
/// `linux/limits.h`).
const ATTRIBUTE_BYTES: usize = 4096;

/// How the names of the attributes begin that describe the mount.
const OWN_XATTRS: &[u8] = b"user.imgfs.";

/// A chain of images as a file system.
#[derive(Debug)]
pub struct ImageFs {
    pub(super) view: Arc<View>,
    pub(super) handles: Handles,
    pub(super) pass_through: bool,
    mapped: MappedReply,
    composer: Option<Composer>,
    pub(super) follower: Follower,
    pub(super) punching: Option<Punching>,
}

impl ImageFs {
    /// Shows `view`. With `pass_through`, the kernel itself reads, if it can, files that are one
    /// backing file and files that `composer` makes.
    pub(super) fn new(
        view: Arc<View>,
        device: OwnedFd,
        pass_through: bool,
        composer: Option<Composer>,
        punching: Option<Punching>,
    ) -> Self {
        let mapped = MappedReply::new(device);
        Self {
            view,
            handles: Handles::default(),
            pass_through,
            mapped,
            composer,
            follower: Follower::new(),
            punching,
        }
    }

    pub(super) fn punches_on_read(&self) -> bool {
        self.punching.as_ref().is_some_and(|punching| punching.mode() == Punch::OnRead)
    }

    /// Returns an extended attribute of a node. The attributes of the root say when pages are
    /// freed, and whether some of the shown pages are gone. Those of a directory name the
    /// directory of its images, so that a restore need not read them through the mount; a mount
    /// that frees pages does not have this attribute, because a restore must not bypass it.
    pub(super) fn attribute(&self, ino: Ino, name: &OsStr) -> Option<Vec<u8>> {
        let chain = self.view.chain();
        match &self.punching {
            None if name == DIRECTORY_XATTR => {
                self.view.image_dir(ino).map(|dir| dir.as_os_str().as_bytes().to_vec())
            }
            Some(punching) if name == PUNCH_XATTR && ino == ROOT => {
                Some(punching.mode().name().into())
            }
            _ if name == DAEMON_XATTR && ino == ROOT => Some(process::id().to_string().into()),
            _ if name == LOG_XATTR && ino == ROOT => Some(recent::text().into_bytes()),
            _ if name == PLACE_XATTR && ino == ROOT => Some(recent::place().into()),
            _ if name == GONE_XATTR && ino == ROOT => {
                let gone = chain.require_whole(self.view.tip()).err()?;
                let mut text = with_sources(&gone).into_bytes();
                text.truncate(ATTRIBUTE_BYTES);
                Some(text)
            }
            _ => None,
        }
    }

    /// Returns the extended attributes that a file of a tmpfs had. Those of imgfs's own names are
    /// never among them: restorers trust them.
    pub(super) fn xattrs(&self, ino: Ino) -> Result<BTreeMap<Vec<u8>, Vec<u8>>, ViewError> {
        let mut all = self.view.xattrs(ino)?;
        all.retain(|name, _| !name.starts_with(OWN_XATTRS));
        Ok(all)
    }

    /// Keeps pages from being freed until the guard is dropped; `None` if the mount frees
    /// no pages.
    pub(super) fn reading(&self) -> Option<RwLockReadGuard<'_, ()>> {
        self.punching.as_ref().map(|_| self.view.chain().reading())
    }

    /// Whether a file may be opened for writing, in order to punch it.
    pub(super) fn may_be_punched(&self, ino: u64) -> bool {
        self.punching.is_some() && self.view.is_shown_pages(ino)
    }

    /// Converts attributes to the form of `fuser`.
    pub(super) fn file_attr(&self, attr: &Attr) -> FileAttr {
        let mut attr = file_attr(attr);
        if self.may_be_punched(attr.ino.0) {
            attr.perm |= WRITABLE;
        }
        attr
    }

    pub(super) fn failed(
        &self,
        operation: &str,
        ino: INodeNo,
        failure: impl Into<ViewError>,
    ) -> Errno {
        failed(operation, &self.view.path(ino.0), &failure.into())
    }

    /// Logs an invalid request, and returns its errno.
    pub(super) fn nonsense(&self, operation: &str, ino: INodeNo, problem: &str) -> Errno {
        error!("{operation} {}: {problem} (EBADF)", self.view.path(ino.0));
        Errno::EBADF
    }

    /// Returns a file to read instead of `file`, composed of the same blocks; `None` if `file` is
    /// already open.
    pub(super) fn composed(&self, ino: Ino, file: &OpenFile) -> Option<Arc<File>> {
        // The kernel would read zeros where pages are freed.
        let wanted = self.pass_through && self.punching.is_none() && file.whole.is_none();
        let composer = self.composer.as_ref().filter(|_| wanted && !self.handles.is_open(ino))?;
        composer.file(ino, &*file.content, || self.view.path(ino))
    }

    /// Registers the backing file of `file`, or its composed file, with the kernel, which then
    /// reads it without asking the daemon.
    pub(super) fn register(
        &self,
        file: &OpenFile,
        composed: Option<&File>,
        reply: &ReplyOpen,
    ) -> io::Result<Option<fuser::BackingId>> {
        if let Some(composed) = composed {
            let backing = reply.open_backing(composed);
            if let (Err(_), Some(composer)) = (&backing, &self.composer) {
                composer.give_up();
            }
            return backing.map(Some);
        }
        match &file.whole {
            // The kernel would read zeros where pages are freed.
            Some(_) if self.punching.is_some() && file.pages.is_some() => Ok(None),
            Some(whole)
                if self.pass_through
                    && let Some(file) = whole.file() =>
            {
                reply.open_backing(file).map(Some)
            }
            _ => Ok(None),
        }
    }
}

impl ImageFs {
    /// Answers a read, and returns the number of bytes; `None` if it failed.
    pub(super) fn answer_read(
        &self,
        req: &Request,
        ino: INodeNo,
        content: &dyn Content,
        offset: u64,
        size: usize,
        reply: ReplyData,
    ) -> Option<u64> {
        let reply = if reply::SIZES.contains(&size) {
            let path = || self.view.path(ino.0);
            match self.mapped.answer(req.unique(), content, offset, size, path, reply) {
                Ok(read) => return read,
                Err(reply) => reply,
            }
        } else {
            reply
        };
        buffer::with(size, |buffer| match chain::read_at(content, offset, buffer) {
            Ok(read) => {
                reply.data(&buffer[..read]);
                Some(read as u64)
            }
            Err(error) => {
                reply.error(self.failed("read", ino, error));
                None
            }
        })
    }
}

/// Returns the number of stacked file systems at the mount, including itself.
///
/// The images may be on an overlay, as in a container. Otherwise an overlay may be mounted
/// on top, which a depth of 2 would forbid.
pub(super) fn stack_depth(view: &View) -> u32 {
    let dir = view.chain().snapshot(view.tip()).directory();
    let stacked = dir
        .and_then(|dir| statfs(dir).ok())
        .is_some_and(|stat| stat.filesystem_type() == OVERLAYFS_SUPER_MAGIC);
    if stacked { 2 } else { 1 }
}

pub(super) fn file_type(kind: NodeType) -> FileType {
    match kind {
        NodeType::Directory => FileType::Directory,
        NodeType::File => FileType::RegularFile,
        NodeType::Link => FileType::Symlink,
        NodeType::Pipe => FileType::NamedPipe,
        NodeType::Socket => FileType::Socket,
        NodeType::CharDevice => FileType::CharDevice,
        NodeType::BlockDevice => FileType::BlockDevice,
    }
}

fn file_attr(attr: &Attr) -> FileAttr {
    let small = attr.size < u64::from(READ_BYTES);
    FileAttr {
        ino: INodeNo(attr.ino),
        size: attr.size,
        blocks: attr.blocks,
        atime: attr.atime,
        mtime: attr.mtime,
        ctime: attr.ctime,
        crtime: attr.ctime,
        kind: file_type(attr.kind),
        perm: attr.mode,
        nlink: attr.nlink,
        uid: attr.uid,
        gid: attr.gid,
        rdev: attr.device,
        blksize: if small { SMALL_READ_BYTES } else { READ_BYTES },
        flags: 0,
    }
}
