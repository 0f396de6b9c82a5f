//! Restores message queues.

use std::{
    collections::BTreeMap,
    ffi::CString,
    os::fd::{AsFd, OwnedFd},
};

use nix::{errno::Errno, libc};

use crate::{
    image::proto,
    inject::Script,
    res::{
        file::{FileError, Opened, Opener, Result, descriptor},
        mqueue,
    },
    sys::{
        mqueue as queues,
        visit::{Place, Visit},
    },
    units::{NsPid, TargetFd},
};

/// The size of `struct sigevent` (`asm-generic/siginfo.h`).
const SIGEVENT_BYTES: usize = 64;

#[derive(Debug, Default)]
pub(super) struct Queues {
    /// Notifications that processes have to ask for, with the descriptions of the queue.
    notifications: Vec<(Vec<u32>, proto::MqueueNotifyEntry)>,
}

/// A description of a queue in the images.
struct End {
    file: proto::RegFileEntry,
    queue: proto::MqueueEntry,
}

impl Opener for Queues {
    fn open(&mut self, _: &[proto::FileEntry], opened: &mut Opened) -> Result<()> {
        let mut queues: BTreeMap<u64, Vec<End>> = BTreeMap::new();
        for entry in opened.entries.values() {
            if let (Some(file), Some(queue)) = (&entry.reg, &entry.mqueue) {
                let mut queue = (**queue).clone();
                let owner = (queue.owner.uid, queue.owner.gid);
                (queue.owner.uid, queue.owner.gid) = opened.pids.ids().host_owner(owner);
                let end = End { file: file.clone(), queue };
                queues.entry(end.queue.ino).or_default().push(end);
            }
        }
        for mut ends in queues.into_values() {
            ends.sort_by_key(|end| end.file.id);
            let visit = visit(&ends[0], opened)?;
            for (id, fd) in open_queue(&ends)? {
                opened.insert(id, fd);
            }
            let ids: Vec<u32> = ends.iter().map(|end| end.file.id).collect();
            let notify = ends.iter().find_map(|end| end.queue.notify);
            self.notifications.extend(notify.map(|notify| (ids, notify)));
            drop(visit);
        }
        Ok(())
    }

    // A process that closes any descriptor of a queue is not notified any more.
    fn finish_process(
        &mut self,
        pid: NsPid,
        at: &dyn Fn(u32) -> Option<TargetFd>,
        script: &mut Script,
    ) -> Result<()> {
        for (ids, notify) in &self.notifications {
            if NsPid::of_image(notify.pid) != pid {
                continue;
            }
            let Some(fd) = ids.iter().find_map(|id| at(*id)) else {
                log::warn!(
                    "process {pid} asked to be notified of messages in a queue that it does not have open"
                );
                continue;
            };
            let mut event = [0; SIGEVENT_BYTES];
            event[..8].copy_from_slice(&notify.value.to_ne_bytes());
            event[8..12].copy_from_slice(&notify.signo.to_ne_bytes());
            event[12..16].copy_from_slice(&notify.kind.to_ne_bytes());
            let event = script.bytes(&event);
            let arguments = [fd.0.into(), event.into()];
            script.call("ask to be notified of messages", libc::SYS_mq_notify, &arguments);
        }
        Ok(())
    }
}

/// Enters the IPC namespace of a queue: one of the tree, if it gets such.
fn visit(end: &End, opened: &Opened) -> Result<Option<Visit>> {
    let entrance = end.queue.namespace.and_then(|number| opened.ipc_namespaces.get(&number));
    let visit = match entrance {
        Some(entrance) => Some(Visit::with(entrance, Place::Ipc)),
        None => opened.helpers.first().map(|first| Visit::to(first, Place::Ipc)),
    };
    visit.transpose().map_err(|error| {
        let errno = crate::sys::errno(&error);
        FileError::restore(end.file.id, "enter the IPC namespace of", "a message queue")(errno)
    })
}

/// Removes the name of a queue that has none.
struct Unlink(Option<CString>);

impl Drop for Unlink {
    fn drop(&mut self) {
        if let Some(name) = &self.0 {
            let _ = queues::unlink(name);
        }
    }
}

/// Opens all descriptions of a queue.
fn open_queue(ends: &[End]) -> Result<Vec<(u32, OwnedFd)>> {
    let End { file, queue } = &ends[0];
    let shown = format!("the message queue /{}", String::from_utf8_lossy(&queue.name));
    let failed = |step| {
        let shown = &shown;
        move |source| FileError::Restore { id: file.id, step, object: shown.clone(), source }
    };
    let mut name = CString::new(queue.name.clone()).map_err(|_| {
        FileError::image(file.id, format!("the name of {shown} has a NUL byte in it"))
    })?;
    if queue.unlinked && queues::open(&name, libc::O_RDONLY | libc::O_NONBLOCK).is_ok() {
        log::warn!(
            "{shown}, whose name was removed: another queue has that name now, so the link \
             in /proc/PID/fd shows a different name"
        );
        let other = format!(".rcriu-{}-{}", std::process::id(), queue.ino);
        name = CString::new(other).expect("no NUL in it");
    }
    let mut unlink = Unlink(None);
    let messages: Vec<_> = ends.iter().flat_map(|end| &end.queue.messages).collect();
    match queues::open(&name, libc::O_RDWR | libc::O_NONBLOCK) {
        Ok(there) => check(&there, queue, messages.len(), &shown, file.id)?,
        Err(Errno::ENOENT) => {
            mqueue::create(&name, queue, messages.into_iter())
                .map_err(|(step, errno)| failed(step)(errno))?;
            unlink.0 = Some(name.clone());
        }
        Err(errno) => return Err(failed("open")(errno)),
    }
    let mut opened = Vec::new();
    for End { file, .. } in ends {
        let flags = file.flags.cast_signed() & (libc::O_ACCMODE | libc::O_NONBLOCK);
        let fd = queues::open(&name, flags).map_err(failed("open"))?;
        descriptor::set_status(fd.as_fd(), file.flags).map_err(failed("set the flags of"))?;
        descriptor::seek(fd.as_fd(), file.pos, file.flags).map_err(failed("position"))?;
        opened.push((file.id, fd));
    }
    if !queue.unlinked {
        unlink.0 = None;
    }
    Ok(opened)
}

/// Compares a queue that is there with the images.
fn check(
    there: &OwnedFd,
    queue: &proto::MqueueEntry,
    messages: usize,
    shown: &str,
    id: u32,
) -> Result<()> {
    let failed = FileError::restore(id, "read the attributes of", shown);
    let found = queues::attributes(there.as_fd()).map_err(failed)?;
    let (maxmsg, msgsize) =
        (found.messages_max.cast_unsigned(), found.message_bytes.cast_unsigned());
    if (maxmsg, msgsize) != (queue.maxmsg, queue.msgsize) {
        let problem = format!(
            "{shown} holds {maxmsg} messages of {msgsize} bytes, but held {} of {} when it was \
             dumped\nhelp: remove it (mq_unlink(3)): the restore creates it",
            queue.maxmsg, queue.msgsize
        );
        return Err(FileError::image(id, problem));
    }
    if found.messages.cast_unsigned() != messages as u64 {
        log::warn!(
            "{shown} still exists, and the restore does not change it: it has {} messages, and had \
             {messages} when it was dumped\nhelp: remove it (mq_unlink(3)), and the restore recreates the \
             old messages",
            found.messages
        );
    }
    Ok(())
}
