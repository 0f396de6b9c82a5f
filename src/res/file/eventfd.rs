//! Eventfds.
//!
//! Since Linux 6.5, `fdinfo` tells whether an eventfd is a semaphore. On older kernels only a
//! read shows it: by the value that it returns, and by how much it lowers the counter. So the
//! dump reads the eventfd once and restores the counter at once, while the tree is stopped. It
//! does not touch an eventfd that a process outside the tree also has open.

use std::{
    collections::HashSet,
    fs::File,
    io::{self, Read, Write},
    os::fd::{AsFd, OwnedFd},
};

use nix::{errno::Errno, libc};

use super::{
    Collector, Description, FileError, FileKind, Intake, Opened, Opener, Result, Usage, descriptor,
    error::errno,
};
use crate::{
    fault::{self, Novelty},
    image::proto::{self, FdTypes},
    proc::{self, FdDetail},
    sys::fds,
    units::HostPid,
};

pub(super) const KIND: FileKind = FileKind {
    name: "eventfd",
    types: &[FdTypes::Eventfd],
    usage: Usage::Descriptor,
    collector: |_| Box::new(EventfdCollector::default()),
    opener: |_| Box::new(Eventfds),
};

/// The name of an eventfd's anonymous inode.
const NAME: &str = "[eventfd]";

/// Marks a semaphore in the flags of an entry, where the format has no field for it. The bit is
/// that of `O_WRONLY`, which an eventfd never has. A reader that does not know the mark ignores
/// it, since it sets only flags that can be changed.
const SEMAPHORE: u32 = libc::EFD_SEMAPHORE.cast_unsigned();

/// Dumps eventfds, and keeps those of which the kernel does not tell whether they are semaphores.
#[derive(Default)]
struct EventfdCollector {
    unknown: Vec<Unknown>,
}

struct Unknown {
    /// The number of its entry.
    entry: u32,
    pid: HostPid,
    fd: OwnedFd,
    count: u64,
    /// The kernel's id of the eventfd, since Linux 5.2.
    event: Option<u64>,
}

impl Collector for EventfdCollector {
    fn claims(&self, file: &Description) -> bool {
        file.is_anonymous(NAME)
    }

    fn collect(&mut self, file: &Description, _: &mut dyn Intake) -> Result<proto::FileEntry> {
        let FdDetail::EventFd { count, id, semaphore } = file.info.detail else {
            return Err(file.failed("read the counter of")(Errno::ENODATA));
        };
        let told = semaphore.filter(|_| !fault::is_without(Novelty::EventfdSemaphore));
        if told.is_none() {
            self.unknown.push(Unknown {
                entry: file.id,
                pid: file.pid,
                fd: file.fd.try_clone().map_err(|error| file.failed("duplicate")(errno(&error)))?,
                count,
                event: id,
            });
        }
        Ok(proto::FileEntry {
            r#type: FdTypes::Eventfd.into(),
            id: file.id,
            efd: Some(proto::EventfdFileEntry {
                id: file.id,
                flags: file.status() | if told == Some(true) { SEMAPHORE } else { 0 },
                fown: file.fown,
                counter: count,
            }),
            ..Default::default()
        })
    }

    // All files of the tree have a supported kind by now. So the tree has no file, such as a
    // virtual machine, that reacts to an eventfd by more than waking up.
    fn after_collect(&mut self, intake: &mut dyn Intake) -> Result<()> {
        if self.unknown.is_empty() {
            return Ok(());
        }
        let outside = held_by_others()?;
        for Unknown { entry, pid, fd, count, event } in self.unknown.drain(..) {
            if event.is_none_or(|event| outside.contains(&event)) || count == u64::MAX {
                log::warn!(
                    "process {pid}: this kernel does not tell whether an eventfd that other processes share \
                     is a semaphore; it is restored as a counter"
                );
                continue;
            }
            if is_semaphore(&File::from(fd), count).map_err(|source| FileError::Probe {
                pid,
                count,
                source,
            })? && let Some(event) = intake.entry(entry).and_then(|entry| entry.efd.as_mut())
            {
                event.flags |= SEMAPHORE;
            }
        }
        Ok(())
    }
}

/// Finds out whether an eventfd that holds `count` is a semaphore. The counter is the same
/// afterwards, but processes that poll the eventfd may wake up.
///
/// A read of a semaphore returns 1, a read of a counter returns all; so the counter must be at
/// least 2 for the answer to differ.
fn is_semaphore(fd: &File, count: u64) -> io::Result<bool> {
    const ENOUGH: u64 = 2;
    let (mut from, mut to) = (fd, fd);
    let mut add = |value: u64| if value == 0 { Ok(()) } else { to.write_all(&value.to_ne_bytes()) };
    let added = if count < ENOUGH { ENOUGH } else { 0 };
    add(added)?;
    let mut read = || {
        let mut value = [0; size_of::<u64>()];
        from.read_exact(&mut value).map(|()| u64::from_ne_bytes(value))
    };
    match read()? {
        1 => {
            if added == 0 {
                add(1)?;
            } else {
                // One of the two that were added is left.
                read()?;
            }
            Ok(true)
        }
        value if value == count + added => add(count).map(|()| false),
        value => {
            add(value - added.min(value))?;
            Err(io::Error::other("another process has changed the counter"))
        }
    }
}

/// Returns the ids of eventfds that processes not traced by rcriu have open.
fn held_by_others() -> Result<HashSet<u64>> {
    let own = HostPid::own();
    let mut found = HashSet::new();
    for pid in proc::pids()? {
        if pid == own || proc::status(pid).is_ok_and(|status| status.tracer_pid == own) {
            continue;
        }
        // A process that has exited has no descriptors left. One that rcriu may not examine
        // belongs to another user, and rcriu could not dump it either.
        for number in proc::fds(pid).unwrap_or_default() {
            if proc::fd_link(pid, number).is_ok_and(|link| is_event(&link))
                && let Ok(info) = proc::fdinfo(pid, number)
                && let FdDetail::EventFd { id: Some(id), .. } = info.detail
            {
                found.insert(id);
            }
        }
    }
    Ok(found)
}

fn is_event(link: &[u8]) -> bool {
    link.strip_prefix(b"anon_inode:") == Some(NAME.as_bytes())
}

struct Eventfds;

impl Opener for Eventfds {
    fn open(&mut self, entries: &[proto::FileEntry], opened: &mut Opened) -> Result<()> {
        for entry in entries {
            let missing = || FileError::image(entry.id, "it is an eventfd without its entry");
            let event = entry.efd.as_ref().ok_or_else(missing)?;
            let fd = open(event).map_err(FileError::restore(entry.id, "make", "an eventfd"))?;
            opened.insert(entry.id, fd);
        }
        Ok(())
    }
}

fn open(entry: &proto::EventfdFileEntry) -> nix::Result<OwnedFd> {
    let fd = fds::eventfd((entry.flags & SEMAPHORE).cast_signed() | libc::EFD_CLOEXEC)?;
    let mut file = File::from(fd);
    if entry.counter != 0 {
        // Only the kernel can raise the counter to its maximum.
        let counter = entry.counter.min(u64::MAX - 1);
        file.write_all(&counter.to_ne_bytes()).map_err(|error| errno(&error))?;
    }
    descriptor::set_status(file.as_fd(), entry.flags)?;
    Ok(file.into())
}

#[cfg(test)]
mod tests {
    use std::{
        os::fd::AsRawFd,
        process::{Command, Stdio},
    };

    use super::*;
    use crate::{res::file::testing::Tree, units::TargetFd};

    #[test]
    fn counters_and_semaphores_are_as_they_were() {
        let mut tree = Tree::new();
        let plain = fds::eventfd(libc::EFD_NONBLOCK).unwrap();
        File::from(plain.try_clone().unwrap()).write_all(&(5_u64 << 40).to_ne_bytes()).unwrap();
        tree.add(1, plain);
        let semaphore = fds::eventfd(libc::EFD_SEMAPHORE).unwrap();
        File::from(semaphore.try_clone().unwrap()).write_all(&3_u64.to_ne_bytes()).unwrap();
        tree.add(2, semaphore);
        let restored = tree.restore();
        assert_eq!(
            restored.info(1).detail.without_id(),
            restored.before(1).info.detail.clone().without_id()
        );
        assert_eq!(
            restored.info(2).detail.without_id(),
            restored.before(2).info.detail.clone().without_id()
        );
        assert_eq!(restored.flags(1), restored.before(1).flags);
        assert_eq!(restored.flags(2), restored.before(2).flags);
        let mut value = [0; 8];
        File::from(restored.take(2)).read_exact(&mut value).unwrap();
        assert_eq!(u64::from_ne_bytes(value), 1);
    }

    #[test]
    fn a_semaphore_is_told_by_reading_it_and_is_as_before() {
        for count in [0, 1, 2, 3, 100, u64::MAX - 1] {
            for flags in [0, libc::EFD_NONBLOCK] {
                for kind in [0, libc::EFD_SEMAPHORE] {
                    let file = File::from(fds::eventfd(flags | kind).unwrap());
                    if count > 0 {
                        (&file).write_all(&count.to_ne_bytes()).unwrap();
                    }
                    assert_eq!(is_semaphore(&file, count).unwrap(), kind != 0, "{count}");
                    let number = TargetFd(file.as_raw_fd());
                    let own = HostPid::own();
                    let FdDetail::EventFd { count: now, .. } =
                        proc::fdinfo(own, number).unwrap().detail
                    else {
                        panic!("it is an eventfd");
                    };
                    assert_eq!(now, count);
                }
            }
        }
    }

    #[test]
    fn an_eventfd_that_another_process_has_is_known() {
        let own = HostPid::own();
        let [shared, alone] = [(); 2].map(|()| fds::eventfd(libc::EFD_CLOEXEC).unwrap());
        let id = |fd: &OwnedFd| match proc::fdinfo(own, TargetFd(fd.as_raw_fd())).unwrap().detail {
            FdDetail::EventFd { id, .. } => id.unwrap(),
            other => panic!("{other:?}"),
        };
        let mut child = Command::new("cat")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::from(shared.try_clone().unwrap()))
            .spawn()
            .unwrap();
        let found = held_by_others().unwrap();
        drop(child.stdin.take());
        child.wait().unwrap();
        assert!(found.contains(&id(&shared)) && !found.contains(&id(&alone)), "{found:?}");
    }

    trait WithoutId {
        fn without_id(self) -> Self;
    }
    impl WithoutId for FdDetail {
        fn without_id(self) -> Self {
            match self {
                Self::EventFd { count, semaphore, .. } => {
                    Self::EventFd { count, id: None, semaphore }
                }
                other => other,
            }
        }
    }
}
