//! What the kinds of System V objects share: segments, message queues, sets of semaphores.

use std::{fs, io};

use nix::errno::Errno;

use super::{ResError, Result};
use crate::{
    image::proto::IpcDescEntry,
    sys::{
        sysv::{self, Permissions},
        visit::{Place, Visit},
    },
    units::HostPid,
};

/// A kind of objects.
#[derive(Clone, Copy, Debug)]
pub(super) struct Kind {
    /// Its name in messages.
    pub(super) name: &'static str,
    /// The file that chooses the id of the next object.
    next_id: &'static str,
}

/// Shared memory.
pub(super) const SEGMENT: Kind = kind("System V segment", "/proc/sys/kernel/shm_next_id");
/// Message queues.
pub(super) const QUEUE: Kind = kind("System V message queue", "/proc/sys/kernel/msg_next_id");
/// Sets of semaphores.
pub(super) const SEMAPHORES: Kind = kind("System V semaphore set", "/proc/sys/kernel/sem_next_id");

const fn kind(name: &'static str, next_id: &'static str) -> Kind {
    Kind { name, next_id }
}

impl Kind {
    /// Returns a constructor of the error for a failed step with an object.
    pub(super) fn failed<E: Into<io::Error>>(
        self,
        id: u32,
        step: &'static str,
    ) -> impl Fn(E) -> ResError {
        move |source| ResError::Ipc {
            object: format!("{} {id}", self.name),
            step,
            source: source.into(),
        }
    }

    /// Creates an object by `create`, which returns its id, with the id and the creator in `desc`.
    ///
    /// # Errors
    /// What failed, for a message that names the object.
    pub(super) fn create(
        self,
        desc: &IpcDescEntry,
        create: impl FnOnce() -> Result<u32, Errno> + Send,
        remove: impl FnOnce(u32) -> Result<(), Errno>,
    ) -> Result<(), String> {
        fs::write(self.next_id, desc.id.to_string())
            .map_err(|error| format!("write {}: {error}", self.next_id))?;
        let made = sysv::as_creator(&permissions(desc), create)
            .map_err(|errno| format!("create it with key {:#x}: {errno}", desc.key))?;
        if made == desc.id {
            return Ok(());
        }
        let _ = remove(made);
        Err(format!("the kernel created number {made} instead of {}", desc.id))
    }
}

/// Returns the image of what all objects have.
pub(super) fn desc(id: u32, of: &Permissions) -> IpcDescEntry {
    IpcDescEntry {
        key: of.key,
        uid: of.uid,
        gid: of.gid,
        cuid: of.creator_uid,
        cgid: of.creator_gid,
        mode: of.mode,
        id,
    }
}

/// The reverse of [`desc`].
pub(super) fn permissions(desc: &IpcDescEntry) -> Permissions {
    Permissions {
        key: desc.key,
        uid: desc.uid,
        gid: desc.gid,
        creator_uid: desc.cuid,
        creator_gid: desc.cgid,
        mode: desc.mode,
    }
}

/// Enters the IPC namespace of a process; without one, stays in that of rcriu.
pub(super) fn visit(pid: Option<HostPid>) -> Result<Option<Visit>> {
    let enter = |pid| {
        Visit::to(pid, Place::Ipc).map_err(|source| ResError::Process {
            pid,
            step: "enter the IPC namespace of",
            source: Errno::from_raw(source.raw_os_error().unwrap_or_default()),
        })
    };
    pid.map(enter).transpose()
}
