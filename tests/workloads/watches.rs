//! Watches of files: inotify instances and fanotify groups.

use std::fs;

use crate::{
    Row,
    kit::{Checkpoint, Verdict, lacks, open, read_some, same, write_all},
};

pub const ROWS: &[Row] = &[
    ("inotify", inotify),
    ("inotify_deleted", inotify_deleted),
    ("inotify_own_files", inotify_own_files),
    ("inotify_epoll", inotify_epoll),
    ("inotify_many", inotify_many),
    ("fanotify", fanotify),
    ("fanotify_reports", fanotify_reports),
    ("fanotify_permissions", fanotify_permissions),
    ("inotify_unread", inotify_unread),
];

/// The lines that the kernel shows of an instance, in order.
fn shown(fd: i32) -> Result<Vec<String>, String> {
    let text = fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).map_err(text)?;
    let lines = text.lines().filter(|line| line.contains("notify "));
    // Files may be copied before the restore.
    let kept = |line: &str| {
        let words = line.split(' ').filter(|word| {
            !["ino:", "sdev:", "mnt_id:", "fhandle", "f_handle"]
                .iter()
                .any(|key| word.starts_with(key))
        });
        words.collect::<Vec<_>>().join(" ")
    };
    let mut found: Vec<String> = lines.map(kept).collect();
    found.sort();
    Ok(found)
}

fn text(error: std::io::Error) -> String {
    error.to_string()
}

fn instance() -> Result<i32, String> {
    sys!(inotify_init1(libc::IN_NONBLOCK | libc::IN_CLOEXEC))
}

fn add(fd: i32, checkpoint: &Checkpoint, name: &str, mask: u32) -> Result<i32, String> {
    sys!(inotify_add_watch(fd, checkpoint.c_path(name).as_ptr(), mask))
}

/// The bytes of the events that wait.
fn waiting(fd: i32) -> Result<Vec<u8>, String> {
    match read_some(fd, 8192) {
        Err(_) if std::io::Error::last_os_error().raw_os_error() == Some(libc::EAGAIN) => {
            Ok(Vec::new())
        }
        data => data,
    }
}

/// The events that wait: watch, mask, name.
fn events(fd: i32) -> Result<Vec<(i32, u32, String)>, String> {
    let mut found = Vec::new();
    let data = waiting(fd)?;
    let mut rest = &data[..];
    while rest.len() >= 16 {
        let word = |at: usize| u32::from_ne_bytes(rest[at..at + 4].try_into().expect("4 bytes"));
        let len = word(12) as usize;
        let name = String::from_utf8_lossy(&rest[16..16 + len]);
        found.push((word(0).cast_signed(), word(4), name.trim_end_matches('\0').to_owned()));
        rest = &rest[16 + len..];
    }
    Ok(found)
}

fn set_up(checkpoint: &Checkpoint) -> Verdict {
    fs::create_dir(checkpoint.path("dir")).map_err(text)?;
    for name in ["file", "once", "gone", "dir/inside"] {
        fs::write(checkpoint.path(name), "contents").map_err(text)?;
    }
    std::os::unix::fs::symlink("nowhere", checkpoint.path("link")).map_err(text)
}

fn inotify(checkpoint: &Checkpoint) -> Verdict {
    set_up(checkpoint)?;
    let fd = instance()?;
    let gone = add(fd, checkpoint, "gone", libc::IN_MODIFY)?;
    let dir = add(fd, checkpoint, "dir", libc::IN_ALL_EVENTS | libc::IN_EXCL_UNLINK)?;
    let file = add(fd, checkpoint, "file", libc::IN_MODIFY | libc::IN_ATTRIB)?;
    let once = add(fd, checkpoint, "once", libc::IN_OPEN | libc::IN_ONESHOT)?;
    let link = add(fd, checkpoint, "link", libc::IN_DELETE_SELF | libc::IN_DONT_FOLLOW)?;
    // A gap in the numbers.
    sys!(inotify_rm_watch(fd, gone))?;
    same("the last event", (gone, libc::IN_IGNORED, String::new()), events(fd)?.remove(0))?;
    let blocking = sys!(inotify_init1(0))?;
    let before =
        (shown(fd)?, shown(blocking)?, crate::files::flags(fd), crate::files::flags(blocking));
    same("watches", 4, before.0.len())?;
    checkpoint.wait();
    let after =
        (shown(fd)?, shown(blocking)?, crate::files::flags(fd), crate::files::flags(blocking));
    same("what the kernel shows", before, after)?;
    same("events that nobody caused", Vec::new(), events(fd)?)?;
    fs::write(checkpoint.path("dir/new"), "x").map_err(text)?;
    let found = events(fd)?;
    ensure!(
        found.first() == Some(&(dir, libc::IN_CREATE, "new".to_owned())),
        "events of the directory: {found:?}"
    );
    open(&checkpoint.c_path("once"), libc::O_RDONLY)?;
    let ended = vec![(once, libc::IN_OPEN, String::new()), (once, libc::IN_IGNORED, String::new())];
    same("events of the watch for one event", ended, events(fd)?)?;
    let writer = open(&checkpoint.c_path("file"), libc::O_WRONLY)?;
    write_all(writer, b"x")?;
    same("events of the file", vec![(file, libc::IN_MODIFY, String::new())], events(fd)?)?;
    fs::remove_file(checkpoint.path("link")).map_err(text)?;
    let deleted =
        vec![(link, libc::IN_DELETE_SELF, String::new()), (link, libc::IN_IGNORED, String::new())];
    same("events of the link", deleted, events(fd)?)?;
    // A new watch has a number that none had.
    let new = add(fd, checkpoint, "dir/new", libc::IN_MODIFY)?;
    ensure!(new > link, "a new watch has the number {new}");
    Ok(())
}

/// A watch on a file that was deleted.
fn inotify_deleted(checkpoint: &Checkpoint) -> Verdict {
    set_up(checkpoint)?;
    let file = open(&checkpoint.c_path("file"), libc::O_RDWR)?;
    fs::remove_file(checkpoint.path("file")).map_err(text)?;
    let fd = instance()?;
    let path = std::ffi::CString::new(format!("/proc/self/fd/{file}")).expect("no NUL");
    let wd = sys!(inotify_add_watch(fd, path.as_ptr(), libc::IN_MODIFY | libc::IN_DELETE_SELF))?;
    let before = shown(fd)?;
    checkpoint.wait();
    same("what the kernel shows", before, shown(fd)?)?;
    same("events that nobody caused", Vec::new(), events(fd)?)?;
    write_all(file, b"x")?;
    same("events", vec![(wd, libc::IN_MODIFY, String::new())], events(fd)?)?;
    sys!(close(file))?;
    let last = events(fd)?;
    same("the last event", Some(&(wd, libc::IN_IGNORED, String::new())), last.last())
}

/// A program that hears of every access to files that it has open or mapped itself.
fn inotify_own_files(checkpoint: &Checkpoint) -> Verdict {
    set_up(checkpoint)?;
    for name in ["dir/open", "dir/mapped", "alone"] {
        fs::write(checkpoint.path(name), [b'x'; 5000]).map_err(text)?;
    }
    let open_file = open(&checkpoint.c_path("dir/open"), libc::O_RDWR)?;
    let mapped = open(&checkpoint.c_path("dir/mapped"), libc::O_RDONLY)?;
    let alone = open(&checkpoint.c_path("alone"), libc::O_RDONLY)?;
    let (protection, sort) = (libc::PROT_READ, libc::MAP_PRIVATE);
    let area = sys!(mmap(std::ptr::null_mut(), 5000, protection, sort, mapped, 0))?;
    sys!(close(mapped))?;
    let fd = instance()?;
    let dir = add(fd, checkpoint, "dir", libc::IN_ALL_EVENTS)?;
    add(fd, checkpoint, "alone", libc::IN_ALL_EVENTS)?;
    let group = sys!(fanotify_init(libc::FAN_CLASS_NOTIF | libc::FAN_NONBLOCK, 0)).ok();
    if let Some(group) = group {
        let all = libc::FAN_OPEN | libc::FAN_ACCESS | libc::FAN_CLOSE | libc::FAN_EVENT_ON_CHILD;
        mark(group, libc::FAN_MARK_ADD, all, &checkpoint.c_path("dir"))?;
    }
    checkpoint.wait();
    same("events that nobody caused", Vec::new(), events(fd)?)?;
    if let Some(group) = group {
        same("events of the group", Vec::new(), masks(group)?)?;
    }
    // SAFETY: the page is mapped and readable.
    same("a mapped byte", b'x', unsafe { area.cast::<u8>().read_volatile() })?;
    same("bytes", &b"xx"[..], &read_some(open_file, 2)?[..])?;
    same("bytes of the other file", &b"xx"[..], &read_some(alone, 2)?[..])?;
    let first = events(fd)?;
    let accessed = Some(&(dir, libc::IN_ACCESS, "open".to_owned()));
    same("the event of reading", accessed, first.first())
}

/// Epolls that watch an instance by level and by edge, for one event only, ready or not.
fn inotify_epoll(checkpoint: &Checkpoint) -> Verdict {
    set_up(checkpoint)?;
    let quiet = instance()?;
    add(quiet, checkpoint, "file", libc::IN_MODIFY)?;
    let kinds = [0, libc::EPOLLET as u32, libc::EPOLLONESHOT as u32];
    let mut epolls = Vec::new();
    for kind in kinds {
        let epoll = sys!(epoll_create1(0))?;
        let mut event = libc::epoll_event { events: libc::EPOLLIN as u32 | kind, u64: 7 };
        sys!(epoll_ctl(epoll, libc::EPOLL_CTL_ADD, quiet, &raw mut event))?;
        epolls.push(epoll);
    }
    let ready = |epoll| {
        let mut event = libc::epoll_event { events: 0, u64: 0 };
        sys!(epoll_wait(epoll, &raw mut event, 1, 0))
    };
    same("before", vec![Ok(0); 3], epolls.iter().map(|epoll| ready(*epoll)).collect())?;
    checkpoint.wait();
    same("after", vec![Ok(0); 3], epolls.iter().map(|epoll| ready(*epoll)).collect())?;
    let writer = open(&checkpoint.c_path("file"), libc::O_WRONLY)?;
    write_all(writer, b"x")?;
    let state = || epolls.iter().map(|epoll| ready(*epoll)).collect::<Vec<_>>();
    same("with an event", vec![Ok(1); 3], state())?;
    same("once more", vec![Ok(1), Ok(0), Ok(0)], state())
}

/// Watches in number.
fn inotify_many(checkpoint: &Checkpoint) -> Verdict {
    let fd = instance()?;
    fs::create_dir(checkpoint.path("dir")).map_err(text)?;
    for number in 0..3000 {
        let name = format!("dir/{number}");
        fs::write(checkpoint.path(&name), "").map_err(text)?;
        match add(fd, checkpoint, &name, libc::IN_MODIFY) {
            Err(error) if error.contains("os error 28") => return lacks("3000 inotify watches"),
            wd => same("its number", number + 1, wd?)?,
        }
    }
    let before = shown(fd)?;
    checkpoint.wait();
    same("watches", before, shown(fd)?)?;
    let writer = open(&checkpoint.c_path("dir/2345"), libc::O_WRONLY)?;
    write_all(writer, b"x")?;
    same("an event", vec![(2346, libc::IN_MODIFY, String::new())], events(fd)?)
}

/// The masks of the events that wait for a group.
fn masks(fd: i32) -> Result<Vec<u64>, String> {
    let mut found = Vec::new();
    let data = waiting(fd)?;
    // `struct fanotify_event_metadata` (`linux/fanotify.h`).
    let mut rest = &data[..];
    while rest.len() >= 24 {
        let len = u32::from_ne_bytes(rest[..4].try_into().expect("4 bytes")) as usize;
        found.push(u64::from_ne_bytes(rest[8..16].try_into().expect("8 bytes")));
        let opened = i32::from_ne_bytes(rest[16..20].try_into().expect("4 bytes"));
        if opened >= 0 {
            sys!(close(opened))?;
        }
        rest = &rest[len..];
    }
    Ok(found)
}

fn mark(fd: i32, flags: u32, mask: u64, path: &std::ffi::CStr) -> Verdict {
    sys!(fanotify_mark(fd, flags, mask, libc::AT_FDCWD, path.as_ptr())).map(drop)
}

fn fanotify(checkpoint: &Checkpoint) -> Verdict {
    set_up(checkpoint)?;
    let event_flags = libc::O_RDONLY | libc::O_LARGEFILE | libc::O_CLOEXEC;
    let flags = libc::FAN_CLASS_NOTIF | libc::FAN_NONBLOCK;
    let Ok(fd) = sys!(fanotify_init(flags, event_flags as u32)) else {
        return lacks("fanotify and CAP_SYS_ADMIN");
    };
    let file = checkpoint.c_path("file");
    mark(fd, libc::FAN_MARK_ADD, libc::FAN_MODIFY | libc::FAN_CLOSE_WRITE, &file)?;
    let ignored = libc::FAN_MARK_ADD | libc::FAN_MARK_IGNORED_MASK;
    let survives = ignored | libc::FAN_MARK_IGNORED_SURV_MODIFY;
    mark(fd, survives, libc::FAN_CLOSE_WRITE, &file)?;
    let dir = checkpoint.c_path("dir");
    mark(
        fd,
        libc::FAN_MARK_ADD,
        libc::FAN_OPEN | libc::FAN_ONDIR | libc::FAN_EVENT_ON_CHILD,
        &dir,
    )?;
    // A mount that nothing writes to.
    mark(fd, libc::FAN_MARK_ADD | libc::FAN_MARK_MOUNT, libc::FAN_CLOSE_WRITE, c"/sys")?;
    let before = (shown(fd)?, crate::files::flags(fd));
    same("lines", 4, before.0.len())?;
    checkpoint.wait();
    same("what the kernel shows", before, (shown(fd)?, crate::files::flags(fd)))?;
    same("events that nobody caused", Vec::new(), masks(fd)?)?;
    fs::write(checkpoint.path("file"), "x").map_err(text)?;
    same("events of the file", vec![libc::FAN_MODIFY], masks(fd)?)?;
    fs::read(checkpoint.path("dir/inside")).map_err(text)?;
    same("events of the directory", vec![libc::FAN_OPEN], masks(fd)?)
}

/// A group whose events have handles of files, with a mark on a file system.
fn fanotify_reports(checkpoint: &Checkpoint) -> Verdict {
    set_up(checkpoint)?;
    let flags = libc::FAN_CLASS_NOTIF | libc::FAN_NONBLOCK | libc::FAN_CLOEXEC;
    let flags = flags | libc::FAN_REPORT_DFID_NAME | libc::FAN_UNLIMITED_MARKS;
    let Ok(fd) = sys!(fanotify_init(flags, libc::O_RDONLY as u32)) else {
        return lacks("fanotify with names");
    };
    let events = libc::FAN_CREATE | libc::FAN_DELETE | libc::FAN_ONDIR;
    mark(fd, libc::FAN_MARK_ADD | libc::FAN_MARK_EVICTABLE, events, &checkpoint.c_path("dir"))?;
    let whole = libc::FAN_MARK_ADD | libc::FAN_MARK_FILESYSTEM;
    mark(fd, whole, libc::FAN_DELETE_SELF, c"/dev/shm")?;
    let before = (shown(fd)?, crate::files::flags(fd));
    same("lines", 3, before.0.len())?;
    checkpoint.wait();
    same("what the kernel shows", before, (shown(fd)?, crate::files::flags(fd)))?;
    masks(fd)?;
    fs::create_dir(checkpoint.path("dir/new")).map_err(text)?;
    same("events", vec![libc::FAN_CREATE | libc::FAN_ONDIR], masks(fd)?)
}

/// A group that decides whether programs may open a file.
fn fanotify_permissions(checkpoint: &Checkpoint) -> Verdict {
    set_up(checkpoint)?;
    let Ok(fd) = sys!(fanotify_init(libc::FAN_CLASS_CONTENT, libc::O_RDONLY as u32)) else {
        return lacks("fanotify and CAP_SYS_ADMIN");
    };
    let file = checkpoint.c_path("dir/inside");
    if mark(fd, libc::FAN_MARK_ADD, libc::FAN_OPEN_PERM, &file).is_err() {
        return lacks("permission events of fanotify");
    }
    checkpoint.wait();
    Ok(())
}

/// An instance with events that the program has not read.
fn inotify_unread(checkpoint: &Checkpoint) -> Verdict {
    set_up(checkpoint)?;
    let fd = instance()?;
    let wd = add(fd, checkpoint, "dir", libc::IN_CREATE)?;
    for name in ["one", "two"] {
        fs::create_dir(checkpoint.path(&format!("dir/{name}"))).map_err(text)?;
    }
    checkpoint.wait();
    let mask = libc::IN_CREATE | libc::IN_ISDIR;
    if checkpoint.path("restored").exists() {
        let overflow = vec![(-1, libc::IN_Q_OVERFLOW, String::new())];
        same("events after a restore", overflow, events(fd)?)?;
        fs::create_dir(checkpoint.path("dir/three")).map_err(text)?;
        return same("a later event", vec![(wd, mask, "three".to_owned())], events(fd)?);
    }
    let expected = vec![(wd, mask, "one".to_owned()), (wd, mask, "two".to_owned())];
    same("events", expected, events(fd)?)
}
