//! The file system that is served, in the kernel's terms.

use std::{
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
    recent::{self, LOG_XATTR},
    reply::{self, MappedReply},
};
use crate::{
    causes::with_sources,
    chain::{self, Content, DIRECTORY_XATTR, GONE_XATTR, PUNCH_XATTR},
    view::{Attr, Ino, NodeType, OpenFile, ROOT, View, ViewError},
};

/// What `stat(2)` advises readers to read at a time: what one request can carry,
/// as every request costs two changes of process.
const READ_BYTES: u32 = 1 << 20;

/// The same for small files, which readers may take it as a buffer's size for.
pub(super) const SMALL_READ_BYTES: u32 = 4096;

/// The permission that a file has besides if it can be punched: its owner may.
const WRITABLE: u16 = 0o200;

/// The most that an attribute is long: as much as a path can be, which is what is asked
/// for (`PATH_MAX`, `linux/limits.h`).
const ATTRIBUTE_BYTES: usize = 4096;

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
    /// Shows `view`; `pass_through` lets the kernel read files that are one
    /// backing file by itself, where it can, and those that `composer` makes.
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

    /// Returns an extended attribute of a node: in the root, when pages are freed, and
    /// whether some of those that are shown are gone; where the images of a directory are,
    /// so that they need not be read through the mount. A restorer must not bypass a mount
    /// that frees pages.
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
            _ if name == GONE_XATTR && ino == ROOT => {
                let gone = chain.require_whole(self.view.tip()).err()?;
                let mut text = with_sources(&gone).into_bytes();
                text.truncate(ATTRIBUTE_BYTES);
                Some(text)
            }
            _ => None,
        }
    }

    /// Keeps pages from being freed until the guard is dropped; there is none where no
    /// pages are freed at all.
    pub(super) fn reading(&self) -> Option<RwLockReadGuard<'_, ()>> {
        self.punching.as_ref().map(|_| self.view.chain().reading())
    }

    /// Whether a file may be opened for writing, which is to be punched.
    pub(super) fn may_be_punched(&self, ino: u64) -> bool {
        self.punching.is_some() && self.view.is_shown_pages(ino)
    }

    /// Returns attributes as the kernel has them.
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

    /// Logs that a request makes no sense, and returns its errno.
    pub(super) fn nonsense(&self, operation: &str, ino: INodeNo, problem: &str) -> Errno {
        error!("{operation} {}: {problem} (EBADF)", self.view.path(ino.0));
        Errno::EBADF
    }

    /// Returns a file that is composed of the blocks of those that `file` lies in, to be
    /// read in its place. There is none of a file that is open already.
    pub(super) fn composed(&self, ino: Ino, file: &OpenFile) -> Option<Arc<File>> {
        // The kernel would read zeros where pages are freed.
        let wanted = self.pass_through && self.punching.is_none() && file.whole.is_none();
        let composer = self.composer.as_ref().filter(|_| wanted && !self.handles.is_open(ino))?;
        composer.file(ino, &*file.content, || self.view.path(ino))
    }

    /// Makes the file that `file` is, or was composed into, known to the kernel, so that it
    /// reads from it without asking.
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
    /// Answers a read, and returns how many bytes were read; `None` if it failed.
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

/// Returns how many file systems the mount lies on, counting itself.
///
/// The images may themselves be on an overlay, as in a container; otherwise, an
/// overlay may be put over the mount, which 2 would forbid.
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
        rdev: 0,
        blksize: if small { SMALL_READ_BYTES } else { READ_BYTES },
        flags: 0,
    }
}
