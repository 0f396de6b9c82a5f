//! Events that a program has not read.
//!
//! No call shows them without taking them, so the dump counts them in the memory of the kernel, for
//! a warning. No call puts an event of a given watch into a queue either. But every program must
//! expect `IN_Q_OVERFLOW`, which tells that events are lost; so the restored instance has that in
//! their place.

use std::{
    collections::BTreeMap,
    fs,
    os::fd::{AsFd, BorrowedFd},
};

use nix::{
    errno::Errno,
    libc,
    sys::{
        memfd::{MFdFlags, memfd_create},
        uio::{pread, pwrite},
    },
    unistd::read,
};

use crate::{
    causes::with_sources,
    res::{
        file::descriptor,
        kernel::{Kernel, KernelError, KernelResult},
    },
    sys::{fds, watch},
};

/// How many events a queue holds, at most, before the kernel drops others.
const MAX_EVENTS: &str = "/proc/sys/fs/inotify/max_queued_events";

/// The longest queue that the dump reads, or that a restore fills.
const EVENTS_MAX: u32 = 1 << 18;

/// The size of an event without a name (`struct inotify_event`).
const EVENT_BYTES: u32 = 16;

/// The most watches that a message names.
const WATCHES_SHOWN: usize = 3;

/// Counts events.
#[derive(Debug, Default)]
pub(super) struct Reader {
    kernel: Option<Result<Kernel, String>>,
}

impl Reader {
    /// Returns the number of events of each watch of an inotify instance; `None` if the memory of
    /// the kernel cannot be read.
    pub(super) fn by_watch(&mut self, fd: BorrowedFd) -> Option<BTreeMap<i32, usize>> {
        let open = || Kernel::open().map_err(|error| with_sources(&error));
        let kernel = self.kernel.get_or_insert_with(open);
        let counted = kernel
            .as_mut()
            .map_err(|why| why.clone())
            .and_then(|kernel| count_by_watch(kernel, fd).map_err(|error| with_sources(&error)));
        counted.inspect_err(|why| log::debug!("unread events are not counted: {why}")).ok()
    }
}

/// Walks over the queue of an instance.
fn count_by_watch(kernel: &mut Kernel, fd: BorrowedFd) -> KernelResult<BTreeMap<i32, usize>> {
    let file = kernel.file(fd)?;
    let group = kernel.pointer(file, "file", "private_data")?;
    let count = kernel.word(group, "fsnotify_group", "q_len")?;
    if count > EVENTS_MAX {
        return Err(KernelError::Unexpected("a queue of events"));
    }
    let head = kernel.member(group, "fsnotify_group", "notification_list")?;
    let mut found = BTreeMap::new();
    let mut at = kernel.pointer(head, "list_head", "next")?;
    for _ in 0..count {
        if at == head {
            break;
        }
        let event = kernel.containing(at, "fsnotify_event", "list")?;
        let event = kernel.containing(event, "inotify_event_info", "fse")?;
        let wd = kernel.word(event, "inotify_event_info", "wd")?.cast_signed();
        *found.entry(wd).or_default() += 1;
        at = kernel.pointer(at, "list_head", "next")?;
    }
    Ok(found)
}

/// Returns in words which watches have unread events. `path` names the file of a watch.
pub(super) fn describe(
    counts: &BTreeMap<i32, usize>,
    path: impl Fn(i32) -> Option<String>,
) -> String {
    let all: usize = counts.values().sum();
    let events = |count: usize| if count == 1 { "event" } else { "events" };
    let one = |(wd, count): (&i32, &usize)| {
        let of = match path(*wd) {
            Some(path) => path,
            // The kernel gives this number to events of no watch.
            None if *wd < 0 => "a queue that was full".to_owned(),
            None => format!("the watch {wd}, which is removed"),
        };
        format!("{count} of {of}")
    };
    let shown: Vec<String> = counts.iter().take(WATCHES_SHOWN).map(one).collect();
    let more = if counts.len() > WATCHES_SHOWN { ", ..." } else { "" };
    format!("{all} unread {} ({}{more})", events(all), shown.join(", "))
}

/// Puts `IN_Q_OVERFLOW` into the queue of an instance without watches: fills it with events of a
/// file of our own, so that the kernel adds this one, and reads all others. Returns whether it is
/// there.
///
/// # Errors
/// The errors of the kernel.
pub(super) fn overflow(inotify: BorrowedFd) -> nix::Result<bool> {
    let limit = fs::read_to_string(MAX_EVENTS).map_err(|error| crate::sys::errno(&error))?;
    let limit: u32 = limit.trim().parse().map_err(|_| Errno::EINVAL)?;
    if limit > EVENTS_MAX {
        return Ok(false);
    }
    let memory = memfd_create(c"rcriu", MFdFlags::MFD_CLOEXEC)?;
    // The kernel tells nothing of what is done by the descriptor that has created it.
    let file = descriptor::reopen(memory.as_fd(), libc::O_RDWR.cast_unsigned())?;
    let wd = watch::add_watch(inotify, file.as_fd(), libc::IN_MODIFY | libc::IN_ACCESS)?;
    // The kernel merges an event with an equal one before it.
    for _ in 0..=limit / 2 {
        pwrite(&file, b"x", 0)?;
        pread(&file, &mut [0], 0)?;
    }
    // That the watch is removed is an event for which there is no room.
    watch::remove_watch(inotify, wd)?;
    let mut bytes = vec![0; 64 << 10];
    loop {
        let left = fds::readable_bytes(inotify)?;
        if left <= EVENT_BYTES {
            break;
        }
        let most = bytes.len().min((left - EVENT_BYTES) as usize);
        read(inotify, &mut bytes[..most])?;
    }
    Ok(fds::readable_bytes(inotify)? == EVENT_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_instance_overflows() {
        let inotify = watch::inotify().unwrap();
        assert!(overflow(inotify.as_fd()).unwrap());
        let mut bytes = [0; 64];
        assert_eq!(read(&inotify, &mut bytes), Ok(16));
        let word = |at: usize| u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap());
        assert_eq!((word(0).cast_signed(), word(4)), (-1, libc::IN_Q_OVERFLOW));
        assert_eq!(fds::readable_bytes(inotify.as_fd()), Ok(0));
    }

    #[test]
    fn unread_events_are_described() {
        let counts = BTreeMap::from([(-1, 1), (2, 5), (3, 1), (4, 1)]);
        let path = |wd| (wd == 2).then(|| "/file".to_owned());
        let expected = "8 unread events (1 of a queue that was full, 5 of /file, 1 of the watch 3, \
                        which is removed, ...)";
        assert_eq!(describe(&counts, path), expected);
        assert_eq!(describe(&BTreeMap::from([(2, 1)]), path), "1 unread event (1 of /file)");
    }
}
