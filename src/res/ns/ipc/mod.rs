//! IPC namespaces: System V message queues, semaphores and limits, POSIX message queues.
//!
//! System V segments are memory, which the kind of the tree dumps and restores
//! ([`crate::res::tree`]), with the others of the namespace. All objects keep their ids, keys, owners,
//! creators and modes. Times, and which process was the last, are new.
//!
//! The restore creates the objects with the limits of the kernel, and sets those of the namespace last.

mod dump;
mod restore;
mod variables;

use nix::libc;

use super::{Dumped, Namespace, Options, Restoring};
use crate::{
    image::{ImageStore, SnapshotWriter},
    res::{ResError, Result, sysv::visit},
    sys::shm,
};

#[derive(Debug)]
pub(super) struct Ipc;

impl Namespace for Ipc {
    fn clone_flag(&self) -> u64 {
        u64::from(libc::CLONE_NEWIPC.cast_unsigned())
    }

    /// Refuses a namespace that removes segments once they are looked at.
    fn check(&self, of: &Dumped<'_>) -> Result<()> {
        let _visit = visit(Some(of.pid))?;
        if !variables::removes_segments() {
            return Ok(());
        }
        let detached = |id: &u32| shm::stat(*id).is_ok_and(|segment| segment.attached == 0);
        let segments = shm::segments().unwrap_or_default();
        let Some(id) = segments.into_iter().find(detached) else { return Ok(()) };
        Err(ResError::Refused {
            pid: of.pid,
            what: format!(
                "is in an IPC namespace with kernel.shm_rmid_forced, and no process has System V \
                 segment {id} attached: the dump would have to attach it, and then the kernel removes it"
            ),
            help: "attach the segment, or set kernel.shm_rmid_forced to 0 there",
        })
    }

    fn dump(&self, of: &Dumped<'_>, images: &SnapshotWriter) -> Result<()> {
        let _visit = visit(Some(of.pid))?;
        dump::all(of.number.into(), of.ids, images)
    }

    fn restore(
        &self,
        images: &dyn ImageStore,
        number: u32,
        _: &Options,
    ) -> Result<Box<dyn Restoring>> {
        Ok(Box::new(restore::Wanted::read(images, number)?))
    }
}
