//! Dumps sockets of the test itself, and restores them beside.

use std::{
    collections::HashMap,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

use nix::{
    fcntl::{FcntlArg, fcntl},
    libc,
    sys::{socket::sockopt, stat::fstat},
};

use super::{
    BuildIds, Collector, Description, FileError, Intake, KINDS, Lost, Opened, Opener, Policy,
    Result, Validation,
};
use crate::{
    image::{Kind, SnapshotWriter, proto, read_all},
    proc,
    sys::socket,
    units::{HostPid, TargetFd},
};

/// The first number of what is found in queues, and of entries without descriptions.
const FIRST_FOUND_ID: u32 = 1000;

fn own_pid() -> HostPid {
    HostPid(std::process::id().cast_signed())
}

fn describe(id: u32, fd: OwnedFd) -> Description {
    let number = TargetFd(fd.as_raw_fd());
    Description {
        id,
        pid: own_pid(),
        number,
        stat: fstat(&fd).unwrap(),
        flags: fcntl(&fd, FcntlArg::F_GETFL).unwrap().cast_unsigned(),
        link: proc::fd_link(own_pid(), number).unwrap(),
        info: proc::fdinfo(own_pid(), number).unwrap(),
        fown: proto::FownEntry::default(),
        fd,
    }
}

/// Descriptors that were found in queues, and entries.
struct TestIntake {
    lost: Lost,
    build_ids: BuildIds,
    files: Vec<(u32, OwnedFd)>,
    found: usize,
    next: u32,
    entries: Vec<proto::FileEntry>,
}

impl Intake for TestIntake {
    fn enter(&mut self, fd: OwnedFd, _: &Description) -> Result<u32> {
        // Good enough for the tests: an inode is open once in each access mode.
        let key = |fd: &OwnedFd| (fstat(fd).unwrap().st_ino, fcntl(fd, FcntlArg::F_GETFL).unwrap());
        if let Some((id, _)) = self.files.iter().find(|(_, known)| key(known) == key(&fd)) {
            return Ok(*id);
        }
        let id = self.new_id();
        self.files.push((id, fd));
        Ok(id)
    }

    fn new_id(&mut self) -> u32 {
        self.next += 1;
        FIRST_FOUND_ID + self.next
    }

    fn push(&mut self, entry: proto::FileEntry) {
        self.entries.push(entry);
    }

    fn has_process(&self, pid: i32) -> bool {
        pid == std::process::id().cast_signed()
    }

    fn entry(&mut self, id: u32) -> Option<&mut proto::FileEntry> {
        self.entries.iter_mut().find(|entry| entry.id == id)
    }

    fn lost(&mut self) -> &mut Lost {
        &mut self.lost
    }

    fn build_ids(&mut self) -> (&mut BuildIds, Validation) {
        (&mut self.build_ids, Validation::BuildId)
    }
}

/// What was written, and what it is to be opened with.
pub(super) struct Dumped {
    pub(super) dir: tempfile::TempDir,
    pub(super) entries: Vec<proto::FileEntry>,
    pub(super) policy: Policy,
}

/// Dumps these descriptors, which get the numbers 0, 1, ..., and closes them.
pub(super) fn dump<T: Into<OwnedFd>>(fds: Vec<T>, policy: &Policy) -> Result<Dumped> {
    let dir = tempfile::tempdir().unwrap();
    let images = SnapshotWriter::begin(dir.path()).unwrap();
    let mut intake = TestIntake {
        lost: Lost::new(&Policy::default()),
        build_ids: BuildIds::default(),
        files: Vec::new(),
        found: 0,
        next: 0,
        entries: Vec::new(),
    };
    for (id, fd) in fds.into_iter().enumerate() {
        intake.files.push((u32::try_from(id).unwrap(), fd.into()));
    }
    let mut collectors: Vec<Box<dyn Collector>> =
        KINDS.iter().map(|kind| (kind.collector)(policy)).collect();
    while let Some((id, fd)) = intake.files.get(intake.found) {
        let file = describe(*id, fd.try_clone().unwrap());
        intake.found += 1;
        // Other kinds than sockets are none of the tests' business.
        let Some(collector) = collectors.iter_mut().find(|collector| collector.claims(&file))
        else {
            continue;
        };
        let entry = collector.collect(&file, &mut intake)?;
        intake.entries.push(entry);
    }
    for collector in &mut collectors {
        collector.settle(&mut intake)?;
        collector.finish(&images)?;
    }
    images.write(Kind::Files, 0, &intake.entries).unwrap();
    images.commit(&proto::InventoryEntry::default()).unwrap();
    Ok(Dumped { dir, entries: intake.entries, policy: policy.clone() })
}

/// Returns the message of what keeps these from being dumped.
pub(super) fn refused<T: Into<OwnedFd>>(fds: Vec<T>, policy: &Policy) -> String {
    match dump(fds, policy) {
        Ok(_) => panic!("it was dumped"),
        Err(error @ FileError::Unsupported { .. }) => error.to_string(),
        Err(error) => panic!("{error:?}"),
    }
}

impl Dumped {
    /// Restores all sockets, beside `given`.
    pub(super) fn open_with(&self, given: Vec<(u32, OwnedFd)>) -> Result<Restored> {
        let path = self.dir.path().join(Kind::Files.file_name(0));
        let entries: Vec<proto::FileEntry> = read_all(&path, Kind::Files)?;
        let mut opened = Opened::new(self.dir.path(), self.policy.clone(), entries.clone());
        for (id, fd) in given {
            opened.insert(id, fd);
        }
        let mut openers = Vec::new();
        for kind in KINDS {
            let of_kind: Vec<_> = entries
                .iter()
                .filter(|entry| kind.types.iter().any(|of| i32::from(*of) == entry.r#type))
                .cloned()
                .collect();
            let mut opener: Box<dyn Opener> = (kind.opener)(&self.policy);
            opener.open(&of_kind, &mut opened)?;
            openers.push(opener);
        }
        for opener in &mut openers {
            opener.fill(&opened)?;
        }
        Ok(Restored { opened })
    }

    /// As [`Self::open_with`], with nothing else.
    pub(super) fn open(&self) -> Result<Restored> {
        self.open_with(Vec::new())
    }

    /// Returns the UNIX socket of this number.
    pub(super) fn unix(&self, id: u32) -> &proto::UnixSkEntry {
        let entry = self.entries.iter().find(|entry| entry.id == id).unwrap();
        entry.usk.as_ref().unwrap()
    }

    /// Returns the internet socket of this number.
    pub(super) fn inet(&self, id: u32) -> &proto::InetSkEntry {
        let entry = self.entries.iter().find(|entry| entry.id == id).unwrap();
        entry.isk.as_ref().unwrap()
    }
}

/// What was restored.
#[derive(Debug)]
pub(super) struct Restored {
    opened: Opened,
}

impl Restored {
    pub(super) fn get(&self, id: u32) -> BorrowedFd<'_> {
        self.opened.get(id).unwrap()
    }

    /// Returns a duplicate as a type of the standard library.
    pub(super) fn take<T: From<OwnedFd>>(&self, id: u32) -> T {
        self.get(id).try_clone_to_owned().unwrap().into()
    }
}

/// Returns the value of an option of a socket of nix.
pub(super) fn option<T: nix::sys::socket::GetSockOpt>(fd: &impl AsFd, option: T) -> T::Val {
    nix::sys::socket::getsockopt(fd, option).unwrap()
}

/// Returns what is in a socket: messages, at most `len` bytes long.
pub(super) fn receive_all(fd: BorrowedFd, len: usize) -> Vec<Vec<u8>> {
    use nix::sys::socket::{MsgFlags, recv};
    let mut messages = Vec::new();
    let mut buffer = vec![0; len];
    while let Ok(received) = recv(fd.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
        if received == 0 {
            break;
        }
        messages.push(buffer[..received].to_owned());
    }
    messages
}

/// The options that all sockets of a test are given, which are no defaults.
pub(super) fn set_odd_options(fd: &impl AsFd) {
    use nix::sys::{socket::setsockopt, time::TimeVal};
    setsockopt(fd, sockopt::SndBuf, &40_000).unwrap();
    setsockopt(fd, sockopt::RcvBuf, &50_000).unwrap();
    setsockopt(fd, sockopt::SendTimeout, &TimeVal::new(3, 500_000)).unwrap();
    setsockopt(fd, sockopt::ReceiveTimeout, &TimeVal::new(0, 250_000)).unwrap();
    setsockopt(fd, sockopt::KeepAlive, &true).unwrap();
    setsockopt(fd, sockopt::Broadcast, &true).unwrap();
    socket::set_option(fd.as_fd(), libc::SOL_SOCKET, libc::SO_PRIORITY, &3).unwrap();
    setsockopt(fd, sockopt::Linger, &libc::linger { l_onoff: 1, l_linger: 5 }).unwrap();
}

/// Returns these options for a comparison.
pub(super) fn odd_options(fd: &impl AsFd) -> HashMap<&'static str, String> {
    HashMap::from([
        ("SO_SNDBUF", format!("{:?}", option(fd, sockopt::SndBuf))),
        ("SO_RCVBUF", format!("{:?}", option(fd, sockopt::RcvBuf))),
        ("SO_SNDTIMEO", format!("{:?}", option(fd, sockopt::SendTimeout))),
        ("SO_RCVTIMEO", format!("{:?}", option(fd, sockopt::ReceiveTimeout))),
        ("SO_KEEPALIVE", format!("{:?}", option(fd, sockopt::KeepAlive))),
        ("SO_BROADCAST", format!("{:?}", option(fd, sockopt::Broadcast))),
        (
            "SO_PRIORITY",
            format!("{:?}", {
                socket::option::<u32>(fd.as_fd(), libc::SOL_SOCKET, libc::SO_PRIORITY)
            }),
        ),
        ("SO_LINGER", format!("{:?}", option(fd, sockopt::Linger))),
    ])
}
