//! Restores an IPC namespace.

use std::{ffi::CString, io};

use super::{super::wrong, variables};
use crate::{
    image::{
        ImageStore,
        ipc::{Message, Objects},
        proto::{InodeOwnerEntry, IpcMsgEntry, IpcSemEntry},
    },
    res::{
        ResError, Result, mqueue,
        ns::{Building, Restoring},
        sysv::{QUEUE, SEMAPHORES, permissions, to_host, visit},
    },
    sys::sysv::{self as calls, Queue},
    units::{HostPid, IdMap},
};

/// The permission bits of `ipc_perm.mode`.
const PERMISSIONS: u32 = 0o777;

/// A namespace to be restored.
#[derive(Debug)]
pub(super) struct Wanted(Objects);

impl Wanted {
    /// Reads and checks the images of a namespace.
    ///
    /// # Errors
    /// A malformed image.
    pub(super) fn read(images: &dyn ImageStore, number: u32) -> Result<Self> {
        let objects = Objects::read(images, number)?;
        match objects.problem() {
            Some(problem) => Err(wrong(number, &problem)),
            None => Ok(Self(objects)),
        }
    }

    fn create(&self) -> Result<()> {
        for (entry, messages) in &self.0.queues {
            create_queue(entry, messages)?;
        }
        for (entry, values) in &self.0.semaphores {
            create_semaphores(entry, values)?;
        }
        for queue in &self.0.variables.rcriu_queues {
            let name = CString::new(queue.name.clone()).expect("checked above");
            mqueue::create(&name, queue, queue.messages.iter()).map_err(|(step, errno)| {
                let object = format!("the message queue /{}", name.to_string_lossy());
                ResError::Ipc { object, step, source: errno.into() }
            })?;
        }
        Ok(())
    }
}

impl Restoring for Wanted {
    fn translate(&mut self, ids: &IdMap) {
        let Objects { queues, semaphores, variables, .. } = &mut self.0;
        queues.iter_mut().for_each(|(entry, _)| to_host(&mut entry.desc, ids));
        semaphores.iter_mut().for_each(|(entry, _)| to_host(&mut entry.desc, ids));
        for InodeOwnerEntry { uid, gid, .. } in
            variables.rcriu_queues.iter_mut().map(|queue| &mut queue.owner)
        {
            (*uid, *gid) = ids.host_owner((*uid, *gid));
        }
    }

    fn build(&mut self, on: &Building<'_>) -> Result<()> {
        let first = on.first;
        let _visit = visit(Some(first))?;
        variables::widen();
        self.create()
    }

    fn finish(&mut self, root: HostPid) -> Result<()> {
        let _visit = visit(Some(root))?;
        variables::write(&self.0.variables)
    }
}

fn create_queue(entry: &IpcMsgEntry, messages: &[Message]) -> Result<()> {
    let desc = &entry.desc;
    let make = || calls::create_queue(desc.key, desc.mode & PERMISSIONS);
    QUEUE
        .create(desc, make, calls::remove_queue)
        .map_err(|problem| QUEUE.failed(desc.id, "create")(io::Error::other(problem)))?;
    for message in messages {
        calls::send_message(desc.id, message.kind, &message.text)
            .map_err(QUEUE.failed(desc.id, "fill"))?;
    }
    let queue = Queue {
        permissions: permissions(desc),
        bytes_max: entry.qbytes.into(),
        bytes: 0,
        messages: 0,
    };
    calls::set_queue(desc.id, &queue).map_err(QUEUE.failed(desc.id, "set the attributes of"))
}

fn create_semaphores(entry: &IpcSemEntry, values: &[u16]) -> Result<()> {
    let desc = &entry.desc;
    let make = || calls::create_semaphores(desc.key, entry.nsems, desc.mode & PERMISSIONS);
    SEMAPHORES
        .create(desc, make, calls::remove_semaphores)
        .map_err(|problem| SEMAPHORES.failed(desc.id, "create")(io::Error::other(problem)))?;
    calls::set_semaphores(desc.id, &permissions(desc), values)
        .map_err(SEMAPHORES.failed(desc.id, "set the values of"))
}
