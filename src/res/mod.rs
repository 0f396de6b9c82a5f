//! Kinds of process state.
//!
//! Each kind has one file, which both dumps and restores it. Folders group the kinds by what
//! owns the state: a namespace, the tree, an address space, a task, a thread, or a file.

pub mod attribute;
pub mod calls;
mod cgroups;
mod error;
pub mod file;
mod kernel;
pub mod mm;
mod mqueue;
mod netlink;
pub mod ns;
pub mod seccomp;
pub mod signals;
mod sysv;
pub mod task;
pub mod thread;
pub mod tree;

pub use error::{ResError, Result};

use crate::{
    sys::{
        self,
        visit::{Place, Visit},
    },
    units::HostPid,
};

/// Moves the calling thread into a namespace of a process, until the visit ends.
///
/// # Errors
/// [`ResError::Process`].
fn enter(pid: HostPid, place: Place) -> Result<Visit> {
    let step = match place {
        Place::Net => "enter the network namespace of",
        Place::Ipc => "enter the IPC namespace of",
        Place::Cgroup => "enter the cgroup namespace of",
    };
    Visit::to(pid, place).map_err(|error| ResError::Process {
        pid,
        step,
        source: sys::errno(&error),
    })
}
