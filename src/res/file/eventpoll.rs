//! Epoll instances.

use std::{collections::HashMap, os::fd::AsFd};

use nix::{errno::Errno, libc};

use super::{
    Collector, Description, FileError, FileKind, Intake, Opened, Opener, Result, Usage, descriptor,
};
use crate::{
    image::{
        Kind,
        proto::{self, FdTypes},
    },
    inject::Script,
    proc::{self, EpollTarget, FdDetail},
    sys::fds::{self, EpollSlot},
    units::TargetFd,
};

pub(super) const KIND: FileKind = FileKind {
    name: "epoll",
    types: &[FdTypes::Eventpoll],
    usage: Usage::Descriptor,
    collector: |_| Box::new(Epolls::default()),
    opener: |_| Box::new(Epolls::default()),
};

#[derive(Default)]
struct Epolls {
    /// Targets of older images, which store them in a separate image.
    separate: HashMap<u32, Vec<proto::EventpollTfdEntry>>,
}

impl Collector for Epolls {
    fn claims(&self, file: &Description) -> bool {
        file.is_anonymous("[eventpoll]")
    }

    fn collect(&mut self, file: &Description, _: &mut dyn Intake) -> Result<proto::FileEntry> {
        let targets = match &file.info.detail {
            FdDetail::EventPoll { targets } => targets.as_slice(),
            _ => &[],
        };
        Ok(proto::FileEntry {
            r#type: FdTypes::Eventpoll.into(),
            id: file.id,
            epfd: Some(proto::EventpollFileEntry {
                id: file.id,
                flags: file.status(),
                fown: file.fown,
                tfd: watched(file, targets)?,
            }),
            ..Default::default()
        })
    }
}

/// Builds the entries for the targets of an epoll, with descriptor numbers that still refer to
/// the targets.
fn watched(file: &Description, targets: &[EpollTarget]) -> Result<Vec<proto::EventpollTfdEntry>> {
    let mut entries = Vec::with_capacity(targets.len());
    if file.number.0 < 0 && !targets.is_empty() {
        return Err(file.unsupported(
            "an epoll instance that is queued in a socket and watches descriptors",
            "have the program receive it first",
        ));
    }
    let mut seen: HashMap<i32, u32> = HashMap::new();
    let mut all = None;
    for target in targets {
        let offset = seen.entry(target.tfd).or_default();
        let slot = EpollSlot {
            epoll: file.number.0.cast_unsigned(),
            target: target.tfd.cast_unsigned(),
            offset: *offset,
        };
        *offset += 1;
        entries.push(proto::EventpollTfdEntry {
            id: file.id,
            tfd: number(file, target, slot, &mut all)?.cast_unsigned(),
            events: target.events,
            data: target.data,
            // The kernel prints its own device number, of 32 bits.
            dev: u32::try_from(target.dev).ok(),
            inode: Some(target.ino),
            pos: Some(target.pos.cast_unsigned()),
        });
    }
    Ok(entries)
}

/// Returns a descriptor of the process that refers to a target: the one that the process added,
/// or a duplicate if it has closed that one since.
fn number(
    file: &Description,
    target: &EpollTarget,
    slot: EpollSlot,
    all: &mut Option<Vec<TargetFd>>,
) -> Result<i32> {
    let leads_there = |fd: i32| match fds::is_epoll_target(file.pid, fd, slot) {
        // The descriptor is not open, or the epoll has dropped the target with its last descriptor.
        Err(Errno::EBADF | Errno::ENOENT) => Ok(false),
        result => result.map_err(file.failed("find the targets of")),
    };
    match fds::is_epoll_target(file.pid, target.tfd, slot) {
        Ok(true) => return Ok(target.tfd),
        Ok(false) | Err(Errno::EBADF | Errno::ENOENT) => {}
        // Without kcmp(2), compare the inode number instead.
        Err(Errno::ENOSYS | Errno::EOPNOTSUPP | Errno::EINVAL) => {
            let info = proc::fdinfo(file.pid, TargetFd(target.tfd));
            if info.is_ok_and(|info| info.ino.is_none_or(|inode| inode == target.ino)) {
                return Ok(target.tfd);
            }
            return Err(escaped(file, target));
        }
        Err(errno) => return Err(file.failed("find the targets of")(errno)),
    }
    if all.is_none() {
        *all = Some(proc::fds(file.pid)?);
    }
    for fd in all.as_deref().unwrap_or_default() {
        if leads_there(fd.0)? {
            return Ok(fd.0);
        }
    }
    Err(escaped(file, target))
}

fn escaped(file: &Description, target: &EpollTarget) -> FileError {
    let what = format!(
        "an epoll instance that watches a file (inode {}); this process added it as descriptor {} \
         and has closed it, but another process still has it open",
        target.ino, target.tfd
    );
    file.unsupported(what, "remove descriptors from an epoll instance before closing them")
}

impl Opener for Epolls {
    fn open(&mut self, entries: &[proto::FileEntry], opened: &mut Opened) -> Result<()> {
        let targets =
            opened.images.messages_if_any::<proto::EventpollTfdEntry>(Kind::EventpollTfd, 0)?;
        for target in targets.into_iter().flatten() {
            self.separate.entry(target.id).or_default().push(target);
        }
        for entry in entries {
            let epoll = inner(entry)?;
            let failed = || FileError::restore(entry.id, "make", "an epoll instance");
            let fd = fds::epoll().map_err(failed())?;
            descriptor::set_status(fd.as_fd(), epoll.flags).map_err(failed())?;
            opened.insert(entry.id, fd);
        }
        Ok(())
    }

    fn watch(&mut self, entry: &proto::FileEntry, fd: TargetFd, script: &mut Script) -> Result<()> {
        let separate = self.separate.get(&entry.id);
        for target in inner(entry)?.tfd.iter().chain(separate.into_iter().flatten()) {
            // `struct epoll_event` (`include/uapi/linux/eventpoll.h`) is packed.
            let mut event = target.events.to_ne_bytes().to_vec();
            event.extend_from_slice(&target.data.to_ne_bytes());
            let event = script.bytes(&event);
            script.call(
                format!("watch descriptor {} with epoll {fd}", target.tfd),
                libc::SYS_epoll_ctl,
                &[fd.0.into(), libc::EPOLL_CTL_ADD.into(), target.tfd.into(), event.into()],
            );
        }
        Ok(())
    }
}

fn inner(entry: &proto::FileEntry) -> Result<&proto::EventpollFileEntry> {
    let missing =
        || FileError::image(entry.id, "it is an epoll instance, but its entry is missing");
    entry.epfd.as_ref().ok_or_else(missing)
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsRawFd, OwnedFd};

    use super::*;
    use crate::res::file::testing::{Tree, watch};

    #[test]
    fn what_is_watched_is_written_down_also_if_it_was_closed() {
        let mut tree = Tree::new();
        let epoll = fds::epoll().unwrap();
        let event = fds::eventfd(0).unwrap();
        watch(&epoll, event.as_raw_fd(), 1, 0xdead_beef_0000_0001);
        let closed = fds::duplicate_from(event.as_fd(), 900).unwrap();
        let closed_number = closed.as_raw_fd();
        watch(&epoll, closed_number, 4, 2);
        drop(closed);
        // Another file under the same number.
        let other = fds::eventfd(0).unwrap();
        let other: OwnedFd = fds::duplicate_from(other.as_fd(), 900).unwrap();
        assert_eq!(other.as_raw_fd(), closed_number);
        watch(&epoll, closed_number, 1, 3);
        tree.add(5, epoll);
        let restored = tree.restore();
        let entry = restored.entry(5).epfd.clone().unwrap();
        let mut told: Vec<_> = entry.tfd.iter().map(|t| (t.data, t.tfd.cast_signed())).collect();
        told.sort_unstable();
        assert_eq!(told[0], (2, event.as_raw_fd()));
        assert_eq!(told[1], (3, closed_number));
        assert_eq!(told[2], (0xdead_beef_0000_0001, event.as_raw_fd()));

        let mut script = Script::new();
        Epolls::default().watch(restored.entry(5), TargetFd(9), &mut script).unwrap();
        assert_eq!(script.len(), 3);
        assert_eq!(restored.flags(5) & 3, restored.before(5).flags & 3);
    }
}
