//! Dumps message queues.

use std::{
    collections::HashSet,
    ffi::CString,
    os::fd::{AsFd, BorrowedFd},
};

use nix::{
    errno::Errno,
    libc,
    sys::{
        stat::fstat,
        statfs::{FsType, fstatfs},
    },
};

use crate::{
    causes::with_sources,
    image::proto::{self, FdTypes},
    res::file::{
        Collector, Description, Intake, Result, descriptor,
        kernel::{Kernel, KernelError, KernelResult},
    },
    sys::{kernel_memory::KernelAddr, mqueue},
    units::HostPid,
};

/// `include/uapi/linux/magic.h`.
const MQUEUE_MAGIC: libc::__fsword_t = 0x1980_0202;

/// The suffix of links to deleted files.
const DELETED: &[u8] = b" (deleted)";

/// Permission bits of a file's mode.
const PERMISSIONS: u32 = 0o7777;

/// The most messages in a queue (`HARD_MSGMAX`, `linux/ipc_namespace.h`), and the most bytes of a
/// queue that the images hold.
const MESSAGES_MAX: u64 = 1 << 16;
const MAX_BYTES: u64 = 64 << 20;

/// The size of a page: a message is in pieces of one page, each with a header.
const PAGE_BYTES: u64 = 4096;

const HELP_KERNEL: &str = "close it, or run rcriu with CAP_BPF and CAP_PERFMON on a kernel with \
    /sys/kernel/btf/vmlinux";

/// A queue in the memory of the kernel.
#[derive(Debug)]
struct Found {
    messages: Vec<proto::MqueueMessageEntry>,
    /// The process that is to be notified, and how.
    notify: Option<(i32, proto::MqueueNotifyEntry)>,
}

#[derive(Debug, Default)]
pub(super) struct Queues {
    kernel: Option<Result<Kernel, String>>,
    /// The inodes of queues whose messages were recorded.
    recorded: HashSet<u64>,
}

impl Queues {
    fn look(&mut self, fd: BorrowedFd) -> Result<Found, String> {
        let open = || Kernel::open().map_err(|error| with_sources(&error));
        let kernel = self.kernel.get_or_insert_with(open).as_mut().map_err(|why| why.clone())?;
        read(kernel, fd).map_err(|error| with_sources(&error))
    }
}

impl Collector for Queues {
    fn claims(&self, file: &Description) -> bool {
        file.is_type(libc::S_IFREG)
            && !descriptor::is_path(file.flags)
            && fstatfs(&file.fd).is_ok_and(|found| found.filesystem_type() == FsType(MQUEUE_MAGIC))
    }

    fn collect(&mut self, file: &Description, intake: &mut dyn Intake) -> Result<proto::FileEntry> {
        let fd = file.fd.as_fd();
        let shown = String::from_utf8_lossy(&file.link).into_owned();
        let unlinked = file.stat.st_nlink == 0;
        let name = file.link.rsplit(|byte| *byte == b'/').next().unwrap_or_default();
        let name = if unlinked { name.strip_suffix(DELETED).unwrap_or(name) } else { name };
        if !unlinked {
            check_place(file, name, &shown)?;
        }
        let size = mqueue::attributes(fd).map_err(file.failed("read the attributes of"))?;
        let what = || format!("the message queue {shown} with {} messages", size.messages);
        let found = self.look(fd).map_err(|why| {
            let what = format!("{}, which cannot be read: {why}", what());
            file.unsupported(what, HELP_KERNEL)
        })?;
        if found.messages.len() as u64 != size.messages.cast_unsigned() {
            let what = format!("{}, which another process is using", what());
            return Err(file.unsupported(what, "dump that process as well, or try again"));
        }
        let mut notify = None;
        if let Some((pid, entry)) = found.notify {
            let pid = intake.pids().ns(HostPid(pid));
            if intake.has_process(pid) {
                if entry.kind == libc::SIGEV_THREAD {
                    let what = format!("{}, which starts a thread of process {pid}", what());
                    let help = "have the process take its notification back (mq_notify(3))";
                    return Err(file.unsupported(what, help));
                }
                notify = Some(proto::MqueueNotifyEntry { pid: pid.raw(), ..entry });
            }
        }
        let is_first = self.recorded.insert(file.stat.st_ino);
        let state = proto::MqueueEntry {
            ino: file.stat.st_ino,
            name: name.to_owned(),
            unlinked,
            maxmsg: size.messages_max.cast_unsigned(),
            msgsize: size.message_bytes.cast_unsigned(),
            owner: proto::InodeOwnerEntry {
                uid: file.stat.st_uid,
                gid: file.stat.st_gid,
                mode: file.stat.st_mode & PERMISSIONS,
            },
            messages: if is_first { found.messages } else { Vec::new() },
            notify: notify.filter(|_| is_first),
        };
        let entry = proto::RegFileEntry {
            id: file.id,
            flags: file.status(),
            pos: file.info.pos,
            fown: file.fown,
            name: [b"/dev/mqueue/", name].concat(),
            mode: Some(file.stat.st_mode),
            ..Default::default()
        };
        Ok(proto::FileEntry {
            r#type: FdTypes::Reg.into(),
            id: file.id,
            reg: Some(entry),
            mqueue: Some(state),
            ..Default::default()
        })
    }
}

/// Checks that the name of a queue leads to it.
fn check_place(file: &Description, name: &[u8], shown: &str) -> Result<()> {
    let path = CString::new(name).map_err(|_| file.failed("open")(Errno::EINVAL))?;
    let found = mqueue::open(&path, libc::O_RDONLY | libc::O_NONBLOCK).and_then(fstat);
    match found {
        Ok(found) if (found.st_dev, found.st_ino) == (file.stat.st_dev, file.stat.st_ino) => Ok(()),
        _ => {
            let what = format!("the message queue {shown}, of another IPC namespace");
            Err(file.unsupported(what, "run rcriu in the namespace of the tree"))
        }
    }
}

/// Reads a queue from the memory of the kernel.
fn read(kernel: &mut Kernel, fd: BorrowedFd) -> KernelResult<Found> {
    const QUEUE: &str = "mqueue_inode_info";
    let file = kernel.file(fd)?;
    let inode = kernel.pointer(file, "file", "f_inode")?;
    let queue = kernel.containing(inode, QUEUE, "vfs_inode")?;
    let count = kernel.long(queue, QUEUE, "attr.mq_curmsgs")?;
    if count > MESSAGES_MAX {
        return Err(KernelError::Unexpected("a message queue"));
    }
    let root = kernel.pointer(queue, QUEUE, "msg_tree.rb_node")?;
    let mut lists = Vec::new();
    let mut left = vec![root];
    while let Some(node) = left.pop() {
        if node.is_null() {
            continue;
        }
        if lists.len() as u64 > count {
            return Err(KernelError::Unexpected("a message queue"));
        }
        lists.push(kernel.containing(node, LEAF, "rb_node")?);
        left.push(kernel.pointer(node, "rb_node", "rb_left")?);
        left.push(kernel.pointer(node, "rb_node", "rb_right")?);
    }
    let mut messages = Vec::new();
    let mut bytes = 0;
    for leaf in lists {
        read_list(kernel, leaf, count, &mut messages, &mut bytes)?;
    }
    // The order within a priority stays.
    messages.sort_by_key(|message| std::cmp::Reverse(message.priority));
    let owner = kernel.pointer(queue, QUEUE, "notify_owner")?;
    let notify = if owner.is_null() {
        None
    } else {
        let pid = kernel.pid(owner)?;
        let entry = proto::MqueueNotifyEntry {
            pid: 0,
            kind: kernel.word(queue, QUEUE, "notify.sigev_notify")?.cast_signed(),
            signo: kernel.word(queue, QUEUE, "notify.sigev_signo")?.cast_signed(),
            value: kernel.long(queue, QUEUE, "notify.sigev_value")?,
        };
        Some((pid, entry))
    };
    Ok(Found { messages, notify })
}

/// The structure with the messages of one priority.
const LEAF: &str = "posix_msg_tree_node";

/// Reads the messages of one priority.
fn read_list(
    kernel: &mut Kernel,
    leaf: KernelAddr,
    count: u64,
    messages: &mut Vec<proto::MqueueMessageEntry>,
    bytes: &mut u64,
) -> KernelResult<()> {
    let priority = kernel.word(leaf, LEAF, "priority")?;
    let head = kernel.member(leaf, LEAF, "msg_list")?;
    let mut at = kernel.pointer(head, "list_head", "next")?;
    while at != head {
        let message = kernel.containing(at, "msg_msg", "m_list")?;
        let len = kernel.long(message, "msg_msg", "m_ts")?;
        *bytes = bytes.saturating_add(len);
        if messages.len() as u64 >= count || *bytes > MAX_BYTES {
            return Err(KernelError::Unexpected("a message queue"));
        }
        messages
            .push(proto::MqueueMessageEntry { priority, data: read_data(kernel, message, len)? });
        at = kernel.pointer(at, "list_head", "next")?;
    }
    Ok(())
}

/// Reads the bytes of a message: behind its header, and in further pieces.
fn read_data(kernel: &mut Kernel, message: KernelAddr, len: u64) -> KernelResult<Vec<u8>> {
    let mut piece = message;
    let mut header = kernel.size("msg_msg")?;
    let mut next = kernel.pointer(message, "msg_msg", "next")?;
    let mut data = Vec::new();
    loop {
        let left = len - data.len() as u64;
        let here = left.min(PAGE_BYTES.saturating_sub(header));
        let here = usize::try_from(here).expect("less than a page");
        data.extend(kernel.bytes(piece.plus(header), here, "a message")?);
        if data.len() as u64 == len {
            return Ok(data);
        }
        if next.is_null() || here == 0 {
            return Err(KernelError::Unexpected("the length of a message"));
        }
        piece = next;
        header = kernel.size("msg_msgseg")?;
        next = kernel.pointer(piece, "msg_msgseg", "next")?;
    }
}
