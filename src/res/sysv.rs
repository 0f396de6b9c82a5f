//! What the kinds of System V objects share: segments, message queues, sets of semaphores.

use std::{fs, io};

use nix::errno::Errno;

use super::{ResError, Result, enter};
use crate::{
    image::proto::IpcDescEntry,
    sys::{
        sysv::{self, Permissions},
        visit::{Place, Visit},
    },
    units::{HostPid, IdMap},
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
pub(super) fn desc(id: u32, of: &Permissions, ids: &IdMap) -> IpcDescEntry {
    let (uid, gid) = ids.ns_owner((of.uid, of.gid));
    let (cuid, cgid) = ids.ns_owner((of.creator_uid, of.creator_gid));
    IpcDescEntry { key: of.key, uid, gid, cuid, cgid, mode: of.mode, id }
}

/// Turns the owner and the creator of an object into those here.
pub(super) fn to_host(desc: &mut IpcDescEntry, ids: &IdMap) {
    (desc.uid, desc.gid) = ids.host_owner((desc.uid, desc.gid));
    (desc.cuid, desc.cgid) = ids.host_owner((desc.cuid, desc.cgid));
}

/// The reverse of [`desc`], after [`to_host`].
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
    pid.map(|pid| enter(pid, Place::Ipc)).transpose()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::IdRange;

    #[test]
    fn owners_in_images_are_those_inside() {
        let ids = |inside, outside| vec![IdRange { inside, outside, count: 10 }];
        let ids = IdMap::new(ids(0, 1000), ids(20, 2000));
        let (uid, gid, creator_uid, creator_gid) = (1001, 2002, 1003, 0);
        let of = Permissions { key: 7, uid, gid, creator_uid, creator_gid, mode: 0o600 };
        let mut desc = desc(5, &of, &ids);
        assert_eq!((desc.uid, desc.gid, desc.cuid, desc.cgid), (1, 22, 3, 65534));
        to_host(&mut desc, &ids);
        assert_eq!((desc.uid, desc.gid, desc.cuid), (1001, 2002, 1003));
    }
}
