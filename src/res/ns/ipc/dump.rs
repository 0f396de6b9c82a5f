//! Dumps the IPC namespace that the calling thread is in.

use std::{io, os::fd::AsFd};

use nix::{errno::Errno, libc, sys::stat::fstat};

use super::variables;
use crate::{
    image::{
        Kind, SnapshotWriter,
        proto::{IpcMsg, IpcMsgEntry, IpcSemEntry, IpcVarEntry, MqueueEntry},
    },
    res::{
        ResError, Result, mqueue,
        sysv::{QUEUE, SEMAPHORES, desc},
    },
    sys::{mqueue as queues, sysv},
    units::IdMap,
};

/// The alignment of what follows a message in the images.
const ALIGN: usize = 8;

/// Writes the images of the namespace, except for segments.
pub(super) fn all(number: u64, ids: &IdMap, images: &SnapshotWriter) -> Result<()> {
    let mut variables = variables::read()?;
    variables.rcriu_queues = posix_queues(ids)?;
    message_queues(number, &variables, ids, images)?;
    images.write(Kind::IpcVar, number, &[variables])?;
    semaphores(number, ids, images)
}

/// Returns why the kernel copies no message that is longer than the limit of the namespace.
fn too_long(variables: &IpcVarEntry) -> io::Error {
    io::Error::other(format!(
        "it is longer than kernel.msgmax ({} bytes), which was lowered after the message was sent\n\
         help: receive the message, or raise kernel.msgmax in the IPC namespace of the tree",
        variables.msg_ctlmax
    ))
}

fn message_queues(
    number: u64,
    variables: &IpcVarEntry,
    ids: &IdMap,
    images: &SnapshotWriter,
) -> Result<()> {
    let mut image = images.create(Kind::IpcnsMsg, number)?;
    for id in sysv::queues().map_err(QUEUE.failed(0, "list"))? {
        let queue = sysv::queue(id).map_err(QUEUE.failed(id, "look at"))?;
        let small = |number: u64| u32::try_from(number).unwrap_or(u32::MAX);
        let entry = IpcMsgEntry {
            desc: desc(id, &queue.permissions, ids),
            qbytes: small(queue.bytes_max),
            qnum: small(queue.messages),
        };
        image.message(&entry)?;
        let bytes_max = usize::try_from(queue.bytes).unwrap_or(usize::MAX);
        for position in 0..entry.qnum {
            let copied = sysv::copy_message(id, position.into(), bytes_max);
            let (kind, mut text) = copied.map_err(|errno| match errno {
                Errno::EINVAL => QUEUE.failed(id, "copy a message of")(too_long(variables)),
                Errno::ENOSYS => QUEUE.failed(id, "copy a message of")(io::Error::other(
                    "the kernel cannot (CONFIG_CHECKPOINT_RESTORE)\nhelp: receive all messages first",
                )),
                _ => QUEUE.failed(id, "copy a message of")(errno),
            })?;
            let msize = u32::try_from(text.len()).expect("an int in the kernel");
            image.message(&IpcMsg { mtype: kind.cast_unsigned(), msize })?;
            text.resize(text.len().next_multiple_of(ALIGN), 0);
            image.raw(&text)?;
        }
    }
    Ok(image.finish().map(drop)?)
}

fn semaphores(number: u64, ids: &IdMap, images: &SnapshotWriter) -> Result<()> {
    let mut image = images.create(Kind::IpcnsSem, number)?;
    for id in sysv::semaphore_sets().map_err(SEMAPHORES.failed(0, "list"))? {
        let set = sysv::semaphores(id).map_err(SEMAPHORES.failed(id, "look at"))?;
        let values = sysv::semaphore_values(id, set.count)
            .map_err(SEMAPHORES.failed(id, "read the values of"))?;
        image.message(&IpcSemEntry { desc: desc(id, &set.permissions, ids), nsems: set.count })?;
        let mut bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        bytes.resize(bytes.len().next_multiple_of(ALIGN), 0);
        image.raw(&bytes)?;
    }
    Ok(image.finish().map(drop)?)
}

/// Returns the POSIX queues that have names.
fn posix_queues(ids: &IdMap) -> Result<Vec<MqueueEntry>> {
    let mut reader = mqueue::Reader::default();
    let mut found = Vec::new();
    let names = match queues::names() {
        // A kernel without them.
        Err(Errno::ENODEV) => return Ok(found),
        names => names.map_err(|errno| ResError::Ipc {
            object: "the POSIX message queues of the IPC namespace".into(),
            step: "list",
            source: errno.into(),
        })?,
    };
    for name in names {
        let object = format!("the message queue /{}", name.to_string_lossy());
        let failed = |step| {
            let object = object.clone();
            move |errno: Errno| ResError::Ipc { object, step, source: errno.into() }
        };
        let flags = libc::O_RDONLY | libc::O_NONBLOCK;
        let queue = queues::open(&name, flags).map_err(failed("open"))?;
        let size = queues::attributes(queue.as_fd()).map_err(failed("look at"))?;
        let mut stat = fstat(&queue).map_err(failed("look at"))?;
        (stat.st_uid, stat.st_gid) = ids.ns_owner((stat.st_uid, stat.st_gid));
        let mut image = mqueue::image(name.to_bytes(), &stat, &size);
        if size.messages != 0 {
            let all = reader.look(queue.as_fd()).map_err(|why| ResError::Ipc {
                object,
                step: "read the messages of",
                source: io::Error::other(format!("{why}\nhelp: {}", mqueue::HELP_KERNEL)),
            })?;
            image.messages = all.messages;
        }
        found.push(image);
    }
    Ok(found)
}
