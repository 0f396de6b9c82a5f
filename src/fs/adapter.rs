//! Answers the kernel's FUSE requests from the view.

use std::{
    ffi::OsStr,
    io,
    os::unix::ffi::OsStrExt,
    path::Path,
    time::{Duration, SystemTime},
};

use fuser::{
    AccessFlags, BsdFileFlags, CopyFileRangeFlags, Errno, FileHandle, Filesystem, FopenFlags,
    Generation, INodeNo, InitFlags, IoctlFlags, KernelConfig, LockOwner, OpenAccMode, OpenFlags,
    RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry,
    ReplyIoctl, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow,
    WriteFlags,
};
use log::{debug, trace};
use nix::{libc, sys::statvfs::statvfs, unistd::getuid};

use super::{
    errno::failed,
    handles::OpenDir,
    image_fs::{ImageFs, SMALL_READ_BYTES, file_type, stack_depth},
    recent::LOG_XATTR,
};
use crate::{
    sys::commit,
    view::{self, DirEntry, NodeType, OpenFile, ROOT, ViewError, Whence},
};

/// How long the kernel may answer from its cache. Images do not change, but new ones should appear
/// soon.
const TTL: Duration = Duration::from_secs(1);

/// Inode numbers are never reused.
const GENERATION: Generation = Generation(0);

/// The longest file name that is accepted anywhere (`NAME_MAX`, `linux/limits.h`).
const NAME_BYTES: u32 = 255;

/// Whether the request comes from root or from the user who mounted the chain.
fn is_owner(req: &Request) -> bool {
    req.uid() == 0 || req.uid() == getuid().as_raw()
}

/// Answers a request for at most `size` bytes of attributes; 0 asks for their number.
fn reply_xattr(bytes: &[u8], size: u32, reply: ReplyXattr) {
    match u32::try_from(bytes.len()) {
        Ok(len) if size == 0 => reply.size(len),
        Ok(len) if len <= size => reply.data(bytes),
        _ => reply.error(Errno::ERANGE),
    }
}

impl Filesystem for ImageFs {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // Without it, files that are read without the page cache cannot be mapped shared. A mount
        // whose files can be opened for writing must not allow that: the kernel would refuse a
        // write to a shared mapping too late for the writer to notice.
        let shared = InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP;
        let wanted = [
            if self.punching.is_none() { shared } else { InitFlags::empty() },
            // Threads answer the parts of a large read by io_uring or aio in parallel.
            InitFlags::FUSE_ASYNC_DIO,
            InitFlags::FUSE_PARALLEL_DIROPS,
        ];
        for capability in wanted {
            if config.add_capabilities(capability).is_err() {
                debug!("the kernel has no {capability:?}");
            }
        }
        if self.punches_on_read() {
            // Any value below one page disables readahead; the kernel rejects 0.
            let set = config.set_max_readahead(1);
            debug!("nothing is read ahead: {}", set.is_ok());
        }
        if self.pass_through {
            self.pass_through = config.add_capabilities(InitFlags::FUSE_PASSTHROUGH).is_ok();
            debug!("the kernel passes reads through: {}", self.pass_through);
        }
        if self.pass_through {
            let depth = stack_depth(&self.view);
            config.set_max_stack_depth(depth).expect("at most the kernel's limit, 2");
        }
        Ok(())
    }

    fn lookup(&self, req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        // All names in the view are UTF-8.
        let found = name.to_str().ok_or_else(|| ViewError::NoSuchEntry {
            dir: self.view.path(parent.0),
            name: name.to_string_lossy().into_owned(),
        });
        let _reading = self.reading();
        match found.and_then(|name| self.view.lookup_for(parent.0, name, req.pid())) {
            Ok(attr) => reply.entry(&TTL, &self.file_attr(&attr), GENERATION),
            Err(error) => {
                let dir = self.view.path(parent.0);
                let path = format!("{}/{}", dir.trim_end_matches('/'), name.display());
                reply.error(failed("lookup", &path, &error));
            }
        }
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        let _reading = self.reading();
        match self.view.attr(ino.0) {
            Ok(attr) => reply.attr(&TTL, &self.file_attr(&attr)),
            Err(error) => reply.error(self.failed("getattr", ino, error)),
        }
    }

    fn readlink(&self, _req: &Request, ino: INodeNo, reply: ReplyData) {
        match self.view.link(ino.0) {
            Ok(target) => reply.data(&target),
            Err(error) => reply.error(self.failed("readlink", ino, error)),
        }
    }

    fn open(&self, _req: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        if flags.acc_mode() != OpenAccMode::O_RDONLY && !self.may_be_punched(ino.0) {
            return reply.error(Errno::EROFS);
        }
        let _reading = self.reading();
        let file = match self.view.open(ino.0) {
            Ok(file) => file,
            Err(error) => return reply.error(self.failed("open", ino, error)),
        };
        let composed = self.composed(ino.0, &file);
        let register = |file: &OpenFile| self.register(file, composed.as_deref(), &reply);
        let (number, backing) = self.handles.enter_file(ino.0, file, register);
        let direct = FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_NOFLUSH;
        match backing {
            Ok(Some(backing)) => {
                trace!("open {}: passed through", self.view.path(ino.0));
                reply.opened_passthrough(FileHandle(number), FopenFlags::FOPEN_NOFLUSH, &backing);
            }
            Ok(None) => reply.opened(FileHandle(number), direct),
            Err(error) => {
                debug!("open {}: not passed through: {error}", self.view.path(ino.0));
                reply.opened(FileHandle(number), direct);
            }
        }
    }

    fn read(
        &self,
        req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let Some(file) = self.handles.file(fh.0) else {
            return reply.error(self.nonsense("read", ino, "the handle is not open"));
        };
        let size = size as usize;
        // Requests of the page cache have no lock owner.
        let mapped = lock_owner.is_none();
        self.follower.reads(req.pid(), size, mapped);
        let answered = {
            // No page is freed between lookup and read.
            let _reading = self.reading();
            self.answer_read(req, ino, &*file.content, offset, size, reply)
        };
        if let (Some(read), Some(punching), Some(pages)) = (answered, &self.punching, &file.pages)
            && self.may_be_punched(ino.0)
        {
            punching.was_read(ino.0, fh.0, pages, offset..offset + read, mapped);
            // The reader has its answer, and may have closed the file meanwhile.
            if self.handles.file(fh.0).is_none() {
                punching.closed(ino.0, fh.0, pages, !self.handles.is_open(ino.0));
            }
        }
    }

    fn lseek(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        let Some(file) = self.handles.file(fh.0) else {
            return reply.error(self.nonsense("lseek", ino, "the handle is not open"));
        };
        let whence = match whence {
            libc::SEEK_DATA => Whence::Data,
            libc::SEEK_HOLE => Whence::Hole,
            _ => return reply.error(Errno::EINVAL),
        };
        let Ok(from) = u64::try_from(offset) else { return reply.error(Errno::ENXIO) };
        // A page that is freed during the call would be a hole.
        let _reading = self.reading();
        match view::seek(&*file.content, from, whence) {
            Ok(Some(found)) => match i64::try_from(found) {
                Ok(found) => reply.offset(found),
                Err(_) => reply.error(Errno::EOVERFLOW),
            },
            Ok(None) => reply.error(Errno::ENXIO),
            Err(error) => reply.error(self.failed("lseek", ino, error)),
        }
    }

    fn release(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        let closed = self.handles.close_file(ino.0, fh.0);
        if let (Some((file, last)), Some(punching)) = (closed, &self.punching)
            && let Some(pages) = file.pages.as_ref().filter(|_| self.may_be_punched(ino.0))
        {
            punching.closed(ino.0, fh.0, pages, last);
        }
        reply.ok();
    }

    fn opendir(&self, _req: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let (parent, mut below) = match self.view.entries(ino.0) {
            Ok(entries) => entries,
            Err(error) => return reply.error(self.failed("opendir", ino, error)),
        };
        let dots = [(ino.0, "."), (parent, "..")].map(|(ino, name)| DirEntry {
            ino,
            kind: NodeType::Directory,
            name: name.to_owned(),
        });
        let mut entries = Vec::from(dots);
        entries.append(&mut below);
        let number = self.handles.enter_dir(OpenDir { entries });
        reply.opened(FileHandle(number), FopenFlags::empty());
    }

    /// Lists names and types. There is no `readdirplus`, with which an `ls` would build the index
    /// of every memory.
    fn readdir(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let Some(dir) = self.handles.dir(fh.0) else {
            return reply.error(self.nonsense("readdir", ino, "the handle is not open"));
        };
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        for (next, entry) in (offset + 1..).zip(dir.entries.iter().skip(from)) {
            if reply.add(INodeNo(entry.ino), next, file_type(entry.kind), &entry.name) {
                break;
            }
        }
        reply.ok();
    }

    fn releasedir(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        reply: ReplyEmpty,
    ) {
        self.handles.close_dir(fh.0);
        reply.ok();
    }

    /// Returns the sizes of the file system that holds the images.
    fn statfs(&self, _req: &Request, ino: INodeNo, reply: ReplyStatfs) {
        let Some(dir) = self.view.chain().snapshot(self.view.tip()).directory() else {
            // Only a directory has a file system with sizes.
            return reply.statfs(0, 0, 0, 0, 0, SMALL_READ_BYTES, NAME_BYTES, SMALL_READ_BYTES);
        };
        match statvfs(dir) {
            Ok(stat) => {
                let size = |bytes: u64| u32::try_from(bytes).unwrap_or(SMALL_READ_BYTES);
                reply.statfs(
                    stat.blocks(),
                    stat.blocks_free(),
                    0, // nothing can be written here
                    stat.files(),
                    stat.files_free(),
                    size(stat.block_size()),
                    NAME_BYTES,
                    size(stat.fragment_size()),
                );
            }
            Err(errno) => {
                let source = io::Error::from(errno);
                let error = ViewError::Attributes { path: dir.to_owned(), source };
                reply.error(self.failed("statfs", ino, error));
            }
        }
    }

    /// The kernel checks permissions (`default_permissions`).
    fn access(&self, _req: &Request, _ino: INodeNo, mask: AccessFlags, reply: ReplyEmpty) {
        if mask.contains(AccessFlags::W_OK) {
            return reply.error(Errno::EROFS);
        }
        reply.ok();
    }

    /// Returns extended attributes that describe the mount to restorers, and those of files of a
    /// tmpfs.
    fn getxattr(&self, req: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        // The log may name memory of other users' processes.
        if name == LOG_XATTR && !is_owner(req) {
            return reply.error(Errno::EACCES);
        }
        let own = self.attribute(ino.0, name).map(Ok);
        let value = own
            .or_else(|| self.xattrs(ino.0).map(|mut all| all.remove(name.as_bytes())).transpose());
        match value {
            Some(Ok(value)) => reply_xattr(&value, size, reply),
            Some(Err(error)) => reply.error(self.failed("getxattr", ino, error)),
            None => reply.error(Errno::ENODATA),
        }
    }

    fn listxattr(&self, _req: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        match self.xattrs(ino.0) {
            Ok(all) => {
                let names: Vec<u8> =
                    all.into_keys().flat_map(|name| name.into_iter().chain([0])).collect();
                reply_xattr(&names, size, reply);
            }
            Err(error) => reply.error(self.failed("listxattr", ino, error)),
        }
    }

    // Operations that a mount does not support. After ENOSYS the kernel does not ask again.

    fn flush(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _lock_owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::ENOSYS);
    }

    fn fsync(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::ENOSYS);
    }

    fn fsyncdir(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::ENOSYS);
    }

    /// Frees the recorded pages, for root and for the user who mounted the chain.
    fn ioctl(
        &self,
        req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        _flags: IoctlFlags,
        cmd: u32,
        _in_data: &[u8],
        _out_size: u32,
        reply: ReplyIoctl,
    ) {
        let Some(punching) =
            self.punching.as_ref().filter(|_| ino.0 == ROOT && cmd == commit::REQUEST)
        else {
            return reply.error(Errno::ENOTTY);
        };
        if !is_owner(req) {
            return reply.error(Errno::EPERM);
        }
        match punching.commit() {
            Ok(pages) => reply.ioctl(0, &pages.to_ne_bytes()),
            Err(error) => reply.error(self.failed("commit", ino, error)),
        }
    }

    /// Frees pages of a flat pages file.
    fn fallocate(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let Some(punching) = &self.punching else { return reply.error(Errno::EROFS) };
        let Some(file) = self.handles.file(fh.0) else {
            return reply.error(self.nonsense("fallocate", ino, "the handle is not open"));
        };
        let Some(pages) = file.pages.as_ref().filter(|_| self.may_be_punched(ino.0)) else {
            return reply.error(Errno::EROFS);
        };
        if mode != libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE {
            return reply.error(Errno::EOPNOTSUPP);
        }
        match punching.punch(ino.0, pages, offset, length) {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(self.failed("fallocate", ino, error)),
        }
    }

    // Operations that would change a file. The kernel sends hardly any of them to a read-only
    // mount; a mount that frees pages also refuses them.

    fn setattr(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _mode: Option<u32>,
        _uid: Option<u32>,
        _gid: Option<u32>,
        _size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        reply.error(Errno::EROFS);
    }

    fn mknod(
        &self,
        _req: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _mode: u32,
        _umask: u32,
        _rdev: u32,
        reply: ReplyEntry,
    ) {
        reply.error(Errno::EROFS);
    }

    fn mkdir(
        &self,
        _req: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _mode: u32,
        _umask: u32,
        reply: ReplyEntry,
    ) {
        reply.error(Errno::EROFS);
    }

    fn unlink(&self, _req: &Request, _parent: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EROFS);
    }

    fn rmdir(&self, _req: &Request, _parent: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EROFS);
    }

    fn symlink(
        &self,
        _req: &Request,
        _parent: INodeNo,
        _link_name: &OsStr,
        _target: &Path,
        reply: ReplyEntry,
    ) {
        reply.error(Errno::EROFS);
    }

    fn rename(
        &self,
        _req: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _newparent: INodeNo,
        _newname: &OsStr,
        _flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::EROFS);
    }

    fn link(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _newparent: INodeNo,
        _newname: &OsStr,
        reply: ReplyEntry,
    ) {
        reply.error(Errno::EROFS);
    }

    fn create(
        &self,
        _req: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _mode: u32,
        _umask: u32,
        _flags: i32,
        reply: ReplyCreate,
    ) {
        reply.error(Errno::EROFS);
    }

    fn write(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _offset: u64,
        _data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        reply.error(Errno::EROFS);
    }

    fn setxattr(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _name: &OsStr,
        _value: &[u8],
        _flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::EROFS);
    }

    fn removexattr(&self, _req: &Request, _ino: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EROFS);
    }

    fn copy_file_range(
        &self,
        _req: &Request,
        _ino_in: INodeNo,
        _fh_in: FileHandle,
        _offset_in: u64,
        _ino_out: INodeNo,
        _fh_out: FileHandle,
        _offset_out: u64,
        _len: u64,
        _flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        reply.error(Errno::EROFS);
    }
}
