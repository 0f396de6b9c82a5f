//! Visits to the namespaces of other processes, by one thread of this program.
//!
//! A visitor executes nothing that it finds there, and its memory and descriptors stay those of this
//! program. Each thread has its own network, IPC and cgroup namespace; a thread that does not
//! share its working directory has its own mount namespace, too (`setns(2)`). Only a process with one
//! thread can visit a user namespace, and the mounts that belong to it: a child that shares the memory and
//! the descriptors of this program ([`process::beside`]).

use std::{
    fs::{self, File},
    io,
    marker::PhantomData,
    os::{fd::AsFd, unix::fs::MetadataExt},
    thread,
};

use nix::sched::{CloneFlags, setns, unshare};

use super::{namespace, process};
use crate::units::HostPid;

/// A kind of namespace that a thread can visit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Network devices, sockets, `/proc/sys/net`.
    Net,
    /// System V IPC and POSIX message queues.
    Ipc,
    /// The root of what `/proc/PID/cgroup` shows.
    Cgroup,
}

impl Place {
    /// Returns the name in `/proc/PID/ns`.
    pub fn file(self) -> &'static str {
        match self {
            Self::Net => "net",
            Self::Ipc => "ipc",
            Self::Cgroup => "cgroup",
        }
    }

    fn flag(self) -> CloneFlags {
        match self {
            Self::Net => CloneFlags::CLONE_NEWNET,
            Self::Ipc => CloneFlags::CLONE_NEWIPC,
            Self::Cgroup => CloneFlags::CLONE_NEWCGROUP,
        }
    }
}

/// A visit of the calling thread, which ends when this is dropped. What the thread creates meanwhile,
/// such as sockets, belongs to the visited namespace for good.
#[derive(Debug)]
pub struct Visit {
    back: File,
    flag: CloneFlags,
    /// Only the visitor itself can return.
    _here: PhantomData<*const ()>,
}

impl Visit {
    /// Enters a namespace of a process.
    ///
    /// # Errors
    /// `EPERM` without `CAP_SYS_ADMIN` there; `ENOENT` if the process is gone.
    pub fn to(pid: HostPid, place: Place) -> io::Result<Self> {
        let file = place.file();
        Self::with(&File::open(format!("/proc/{pid}/ns/{file}"))?, place)
    }

    /// Enters the namespace behind a descriptor of `/proc/PID/ns`.
    ///
    /// # Errors
    /// As [`Self::to`]; `EINVAL` if it is of another kind.
    pub fn with(namespace: impl AsFd, place: Place) -> io::Result<Self> {
        let back = way_back(place)?;
        setns(namespace, place.flag())?;
        Ok(Self { back, flag: place.flag(), _here: PhantomData })
    }
}

/// Checks that the calling thread may visit namespaces of a kind and return.
///
/// # Errors
/// `EPERM` without `CAP_SYS_ADMIN` in the user namespace that owns that of the thread.
pub fn may_return(place: Place) -> io::Result<()> {
    way_back(place).map(drop)
}

/// Opens the namespace of the calling thread, if the thread may return to it: in a user namespace of
/// its own, it may have no way back.
fn way_back(place: Place) -> io::Result<File> {
    let own = File::open(format!("/proc/thread-self/ns/{}", place.file()))?;
    setns(&own, place.flag())?;
    Ok(own)
}

impl Drop for Visit {
    fn drop(&mut self) {
        // A thread that cannot return must not go on: it would work in the wrong place.
        setns(&self.back, self.flag).expect("a thread may return to the namespace it came from");
    }
}

/// Calls `act` in the mount namespace of a process, with the root directory of that namespace, and in the
/// user namespace that owns it.
///
/// # Errors
/// `EPERM` without `CAP_SYS_ADMIN` and `CAP_SYS_CHROOT` there; `ENOENT` if the process is gone; what
/// `act` returns.
pub fn in_mounts<T: Send, E: From<io::Error> + Send>(
    pid: HostPid,
    act: impl FnOnce() -> Result<T, E> + Send,
) -> Result<T, E> {
    let mounts = File::open(format!("/proc/{pid}/ns/mnt"))?;
    let own = fs::metadata("/proc/self/ns/user")?.ino();
    // If the owner is not below the own user namespace, the kernel does not tell it.
    let owner = namespace::open_owner(&mounts).ok();
    let enter_mounts = move || setns(&mounts, CloneFlags::CLONE_NEWNS).map_err(io::Error::from);
    let owner = owner.filter(|owner| owner.metadata().is_ok_and(|found| found.ino() != own));
    if let Some(owner) = owner {
        return process::beside(move || {
            setns(&owner, CloneFlags::CLONE_NEWUSER).map_err(io::Error::from)?;
            enter_mounts()?;
            act()
        })?;
    }
    thread::scope(|scope| {
        let visitor = scope.spawn(move || {
            unshare(CloneFlags::CLONE_FS).map_err(io::Error::from)?;
            enter_mounts()?;
            act()
        });
        visitor.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Calls `act` in the user namespace of a process, with all capabilities there; as the user and group
/// `ids` inside, if any.
///
/// # Errors
/// `EPERM` without `CAP_SYS_ADMIN` there; `ENOENT` if the process is gone; what `act` returns.
pub fn in_users<T: Send, E: From<io::Error> + Send>(
    pid: HostPid,
    ids: Option<(u32, u32)>,
    act: impl FnOnce() -> Result<T, E> + Send,
) -> Result<T, E> {
    let users = File::open(format!("/proc/{pid}/ns/user"))?;
    process::beside(move || {
        setns(&users, CloneFlags::CLONE_NEWUSER).map_err(io::Error::from)?;
        if let Some((user, group)) = ids {
            process::set_ids(user, group).map_err(io::Error::from)?;
        }
        act()
    })?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_visit_to_the_own_namespace_changes_nothing() {
        let own = HostPid::own();
        for place in [Place::Net, Place::Ipc, Place::Cgroup] {
            let link = || std::fs::read_link(format!("/proc/thread-self/ns/{}", place.file()));
            let before = link().unwrap();
            match Visit::to(own, place) {
                Ok(visit) => {
                    assert_eq!(link().unwrap(), before);
                    drop(visit);
                    assert_eq!(link().unwrap(), before);
                }
                // Without privileges.
                Err(error) => assert_eq!(error.raw_os_error(), Some(nix::libc::EPERM)),
            }
        }
    }
}
