//! What descriptors of POSIX message queues and IPC namespaces share: reading a queue, and creating
//! one with its messages.

use std::{
    ffi::CString,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use nix::{
    errno::Errno,
    libc,
    sys::stat::{Mode, fchmod},
    unistd::{Gid, Uid, fchown},
};

use super::kernel::{Kernel, KernelError, KernelResult};
use crate::{
    causes::with_sources,
    image::proto,
    sys::{
        kernel_memory::KernelAddr,
        mqueue::{self, QueueAttributes},
    },
};

/// The most messages in a queue (`HARD_MSGMAX`, `linux/ipc_namespace.h`), and the most bytes of a
/// queue that the images hold.
const MESSAGES_MAX: u64 = 1 << 16;
const MAX_BYTES: u64 = 64 << 20;

/// The size of a page: a message is in pieces of one page, each with a header.
const PAGE_BYTES: u64 = 4096;

/// Permission bits of a file's mode.
const PERMISSIONS: u32 = 0o7777;

/// What the user can do if the memory of the kernel cannot be read.
pub(super) const HELP_KERNEL: &str = "close it, or run rcriu with CAP_BPF and CAP_PERFMON on a kernel \
    with /sys/kernel/btf/vmlinux";

/// A queue in the memory of the kernel.
#[derive(Debug)]
pub(super) struct Found {
    /// In the order in which they are received.
    pub(super) messages: Vec<proto::MqueueMessageEntry>,
    /// The process that is to be notified, and how.
    pub(super) notify: Option<(i32, proto::MqueueNotifyEntry)>,
}

/// Reads queues.
#[derive(Debug, Default)]
pub(super) struct Reader {
    kernel: Option<Result<Kernel, String>>,
}

impl Reader {
    /// Reads the messages of a queue, which stay there.
    ///
    /// # Errors
    /// Why that is impossible.
    pub(super) fn look(&mut self, fd: BorrowedFd) -> Result<Found, String> {
        let open = || Kernel::open().map_err(|error| with_sources(&error));
        let kernel = self.kernel.get_or_insert_with(open).as_mut().map_err(|why| why.clone())?;
        read(kernel, fd).map_err(|error| with_sources(&error))
    }
}

/// Returns the image of a queue, without its messages.
pub(super) fn image(name: &[u8], stat: &libc::stat, size: &QueueAttributes) -> proto::MqueueEntry {
    proto::MqueueEntry {
        ino: stat.st_ino,
        name: name.to_owned(),
        unlinked: stat.st_nlink == 0,
        maxmsg: size.messages_max.cast_unsigned(),
        msgsize: size.message_bytes.cast_unsigned(),
        owner: proto::InodeOwnerEntry {
            uid: stat.st_uid,
            gid: stat.st_gid,
            mode: stat.st_mode & PERMISSIONS,
        },
        messages: Vec::new(),
        notify: None,
        namespace: None,
    }
}

/// Creates a queue with messages. If a step fails, no queue is left.
///
/// # Errors
/// The failed step, as a verb, and its cause.
pub(super) fn create<'a>(
    name: &CString,
    queue: &proto::MqueueEntry,
    messages: impl Iterator<Item = &'a proto::MqueueMessageEntry>,
) -> Result<OwnedFd, (&'static str, Errno)> {
    let number = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
    let attributes = QueueAttributes {
        messages_max: number(queue.maxmsg),
        message_bytes: number(queue.msgsize),
        messages: 0,
    };
    let failed = |step: &'static str| move |errno| (step, errno);
    let made = mqueue::create(name, &attributes).map_err(failed("create"))?;
    let finish = || {
        for message in messages {
            mqueue::send(made.as_fd(), &message.data, message.priority).map_err(failed("fill"))?;
        }
        let owner = &queue.owner;
        fchown(&made, Some(Uid::from_raw(owner.uid)), Some(Gid::from_raw(owner.gid)))
            .map_err(failed("set the owner of"))?;
        fchmod(&made, Mode::from_bits_truncate(owner.mode)).map_err(failed("set the mode of"))
    };
    if let Err(error) = finish() {
        let _ = mqueue::unlink(name);
        return Err(error);
    }
    Ok(made)
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
