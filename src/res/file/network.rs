//! Network namespaces of sockets.
//!
//! A socket belongs to the network namespace of the thread that created it, and stays there. The dump
//! lists the sockets of each such namespace by entering it, and the restore creates each socket in its
//! own.

use std::{
    cell::RefCell,
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    rc::Rc,
};

use nix::{errno::Errno, sys::stat::fstat};

use super::{FileError, Result, error::errno};
use crate::{
    image::proto::FileEntry,
    proc,
    res::ns::{HeldDevice, OfTree},
    sys::{
        socket,
        visit::{Place, Visit},
    },
    units::HostPid,
};

/// Its name in `/proc/PID/ns`.
pub(super) const NAME: &str = "net";

/// A network namespace that sockets of the tree belong to, during a dump.
#[derive(Debug)]
pub struct Network {
    /// Its number in the images.
    pub number: u32,
    /// A process in it.
    pub pid: HostPid,
    inode: u64,
    /// `None` for the namespace of the dumper.
    entrance: Option<OwnedFd>,
}

impl Network {
    /// Moves the calling thread into the namespace, if it is not that of the dumper.
    ///
    /// # Errors
    /// The errors of `setns(2)`.
    pub fn visit(&self) -> nix::Result<Option<Visit>> {
        let visit = self.entrance.as_ref().map(|entrance| Visit::with(entrance, Place::Net));
        visit.transpose().map_err(|error| errno(&error))
    }

    /// Whether it is the namespace with this inode.
    pub(super) fn is(&self, inode: u64) -> bool {
        self.inode == inode
    }

    /// Whether it is the namespace of the dumper.
    pub fn is_dumpers(&self) -> bool {
        self.entrance.is_none()
    }
}

/// The network namespaces of the sockets found so far.
#[derive(Debug, Default)]
pub struct Seen(Vec<Rc<Network>>);

impl Seen {
    /// Returns the namespace of a socket that a process has; the inode of the namespace if it is neither
    /// the dumper's nor that of a process of the tree.
    ///
    /// # Errors
    /// The errors of looking at the namespaces.
    pub fn of(
        &mut self,
        fd: BorrowedFd<'_>,
        pid: HostPid,
        of_tree: &OfTree,
    ) -> nix::Result<Result<Rc<Network>, u64>> {
        // Without CAP_NET_ADMIN in the namespace, it is taken to be that of the process.
        let found = socket::network(fd).ok();
        let inode = match &found {
            Some(namespace) => fstat(namespace)?.st_ino,
            None => proc::namespace(pid, NAME).map_err(|_| Errno::ESRCH)?,
        };
        if let Some(known) = self.0.iter().find(|known| known.inode == inode) {
            return Ok(Ok(Rc::clone(known)));
        }
        let Some((number, pid)) = of_tree.look_up(NAME, inode) else { return Ok(Err(inode)) };
        let is_dumpers = pid == HostPid::own();
        let entrance = || match found {
            Some(namespace) => Ok(namespace),
            None => File::open(format!("/proc/{pid}/ns/{NAME}")).map(OwnedFd::from),
        };
        let entrance = if is_dumpers { None } else { Some(entrance().map_err(|e| errno(&e))?) };
        let network = Rc::new(Network { number, pid, inode, entrance });
        self.0.push(Rc::clone(&network));
        Ok(Ok(network))
    }
}

/// The network namespaces that the restore has made for the tree.
#[derive(Debug, Default)]
pub struct Made {
    /// The number of that of the first process, if it is none of the restorer.
    home: Option<u32>,
    all: Vec<(u32, File)>,
    /// Descriptors by which the restorer holds devices of programs, by namespace and name.
    held: RefCell<Vec<(u32, HeldDevice)>>,
}

/// The number of a network namespace in the images; older ones of CRIU lack some. Then it is that of
/// the first process.
pub type Number = Option<u32>;

impl Made {
    /// Adds the namespace with this number, which the first process is in.
    ///
    /// # Errors
    /// `ENOENT` if the process is gone.
    pub fn set_home(&mut self, number: u32, pid: HostPid) -> io::Result<()> {
        self.home = Some(number);
        self.add(number, File::open(format!("/proc/{pid}/ns/{NAME}"))?);
        Ok(())
    }

    /// Adds a namespace by its number and its file in `/proc/PID/ns`.
    pub fn add(&mut self, number: u32, entrance: File) {
        self.all.push((number, entrance));
    }

    /// Adds devices of the namespace with this number, which the restorer holds.
    pub fn hold(&mut self, number: u32, devices: Vec<HeldDevice>) {
        self.held.get_mut().extend(devices.into_iter().map(|device| (number, device)));
    }

    /// Lets go of a device, to make room for a file of the tree.
    pub(super) fn release(&self, number: Number, name: &[u8]) {
        let number = self.number(number);
        let is_other =
            |(of, device): &(u32, HeldDevice)| Some(*of) != number || device.name != name;
        self.held.borrow_mut().retain(is_other);
    }

    /// Lets go of all devices.
    pub(super) fn release_all(&self) {
        self.held.borrow_mut().clear();
    }

    /// Returns the number of the namespace, in the images, that a number of a file means.
    pub(super) fn number(&self, number: Number) -> Option<u32> {
        number.or(self.home)
    }

    fn entrance(&self, number: Number) -> Option<&File> {
        let number = self.number(number)?;
        self.all.iter().find(|known| known.0 == number).map(|(_, entrance)| entrance)
    }

    /// Whether the namespace is the one of the restorer.
    pub fn is_restorers(&self, number: Number) -> bool {
        self.entrance(number).is_none()
    }

    /// Whether two numbers mean the same namespace.
    pub fn are_same(&self, one: Number, other: Number) -> bool {
        let at = |number| self.entrance(number).map(AsRawFd::as_raw_fd);
        at(one) == at(other)
    }

    /// Moves the calling thread into a namespace, if it is not that of the restorer.
    ///
    /// # Errors
    /// [`FileError::Network`].
    pub fn visit(&self, number: Number) -> Result<Option<Visit>> {
        let visit = self.entrance(number).map(|entrance| Visit::with(entrance.as_fd(), Place::Net));
        visit.transpose().map_err(|source| FileError::Network { source })
    }

    /// Sorts entries by their namespaces.
    pub fn sort(
        &self,
        entries: &[FileEntry],
        number: impl Fn(&FileEntry) -> Number,
    ) -> Vec<(Number, Vec<FileEntry>)> {
        let mut sorted: Vec<(Number, Vec<FileEntry>)> = Vec::new();
        for entry in entries {
            // Without a namespace of the tree, all are in that of the restorer.
            let number = number(entry).or(self.home).filter(|_| !self.all.is_empty());
            match sorted.iter_mut().find(|(known, _)| *known == number) {
                Some((_, entries)) => entries.push(entry.clone()),
                None => sorted.push((number, vec![entry.clone()])),
            }
        }
        sorted
    }
}
