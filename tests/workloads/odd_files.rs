//! Files with a state that hardly shows: of processes, queued, half closed, deleted.

use std::{ffi::CString, fs, ptr, sync::mpsc};

use crate::{
    Row,
    files::{flags, offset, ready, watch},
    kit::{Area, Checkpoint, PAGE, Verdict, gettid, open, read_some, same, write_all},
    sockets::{receive_descriptors, send_descriptors},
};

pub const ROWS: &[Row] = &[
    ("proc_files", proc_files),
    ("proc_directory", proc_directory),
    ("epoll_of_mounts", epoll_of_mounts),
    ("unix_queued_files", unix_queued_files),
    ("memfd_append", memfd_append),
    ("shared_anon_reopened", shared_anon_reopened),
    ("fifo_hangups", fifo_hangups),
    ("pty_masters", pty_masters),
    ("pty_hangups", pty_hangups),
    ("tmpfile", tmpfile),
    ("deleted_attributes", deleted_attributes),
];

fn text(error: std::io::Error) -> String {
    error.to_string()
}

fn own_pid() -> i32 {
    // SAFETY: getpid has no preconditions.
    unsafe { libc::getpid() }
}

fn c_string(text: impl Into<Vec<u8>>) -> CString {
    CString::new(text).expect("no NUL")
}

fn link_of(fd: i32) -> Result<String, String> {
    let link = fs::read_link(format!("/proc/self/fd/{fd}")).map_err(text)?;
    Ok(link.to_string_lossy().into_owned())
}

/// What poll(2) says now.
fn polled(fd: i32) -> Result<i16, String> {
    let events = libc::POLLIN | libc::POLLOUT;
    let mut poll = libc::pollfd { fd, events, revents: 0 };
    sys!(poll(&raw mut poll, 1, 0))?;
    Ok(poll.revents)
}

/// Files of the process, of its thread, of its child, and one that two processes share.
fn proc_files(checkpoint: &Checkpoint) -> Verdict {
    let (sender, receiver) = mpsc::channel();
    let thread = checkpoint.thread(move |thread| {
        sender.send(gettid()).map_err(|error| error.to_string())?;
        thread.wait();
        thread.wait_mark("looked")
    })?;
    let tid = receiver.recv().map_err(|error| error.to_string())?;
    let status = open(c"/proc/self/status", libc::O_RDONLY)?;
    same("bytes before", &b"Name:"[..], &read_some(status, 5)?[..])?;
    let child = checkpoint.fork(|child| {
        child.wait();
        child.wait_mark("read")?;
        same("bytes in the child", &b"ork"[..], &read_some(status, 3)?[..])
    })?;
    let paths = [
        "/proc/self/maps".to_owned(),
        format!("/proc/self/task/{tid}/schedstat"),
        format!("/proc/{}/status", child.pid),
        format!("/proc/{tid}/stat"),
    ];
    let mut all = Vec::new();
    for path in &paths {
        all.push(open(&c_string(path.as_str()), libc::O_RDONLY | libc::O_CLOEXEC)?);
    }
    all.push(open(c"/proc/self", libc::O_PATH | libc::O_DIRECTORY)?);
    all.push(open(c"/proc/self/mem", libc::O_RDWR)?);
    let state = || all.iter().map(|fd| (flags(*fd), link_of(*fd))).collect::<Vec<_>>();
    let before = state();
    checkpoint.wait();
    same("flags and links", before, state())?;
    same("bytes", &b"\tw"[..], &read_some(status, 2)?[..])?;
    checkpoint.mark("read");
    child.join()?;
    let maps = String::from_utf8_lossy(&read_some(all[0], 4000)?).into_owned();
    ensure!(maps.contains("workload"), "no maps of this program: {maps}");
    let times = String::from_utf8_lossy(&read_some(all[1], 100)?).into_owned();
    same("words of the times of a thread", 3, times.split_whitespace().count())?;
    let word = 0x1234_5678_u32;
    let mut found = [0_u8; 4];
    sys!(pread(all[5], found.as_mut_ptr().cast(), 4, (&raw const word).addr() as i64))?;
    same("memory through /proc/self/mem", word, u32::from_ne_bytes(found))?;
    let inner = sys!(openat(all[4], c"stat".as_ptr(), libc::O_RDONLY))?;
    let stat = String::from_utf8_lossy(&read_some(inner, 100)?).into_owned();
    ensure!(stat.starts_with(&own_pid().to_string()), "another's stat: {stat}");
    checkpoint.mark("looked");
    thread.join()
}

fn proc_directory(checkpoint: &Checkpoint) -> Verdict {
    let pid = own_pid();
    let here = || std::env::current_dir().map_err(text);
    let child = checkpoint.fork(|child| {
        sys!(chdir(c_string(format!("/proc/{pid}/task/{pid}")).as_ptr()))?;
        let before = here()?;
        child.wait();
        same("the child's directory", before, here()?)?;
        let stat = fs::read_to_string("stat").map_err(text)?;
        ensure!(stat.starts_with(&pid.to_string()), "another's stat: {stat}");
        Ok(())
    })?;
    sys!(chdir(c"/proc/self".as_ptr()))?;
    let before = here()?;
    checkpoint.wait();
    same("directory", before, here()?)?;
    let stat = fs::read_to_string("stat").map_err(text)?;
    ensure!(stat.starts_with(&pid.to_string()), "another's stat: {stat}");
    child.join()
}

/// What watches the mounts of its process, as many daemons do.
fn epoll_of_mounts(checkpoint: &Checkpoint) -> Verdict {
    let mounts = open(c"/proc/self/mountinfo", libc::O_RDONLY | libc::O_CLOEXEC)?;
    let epoll = sys!(epoll_create1(libc::EPOLL_CLOEXEC))?;
    watch(epoll, mounts, libc::EPOLLPRI, 9)?;
    checkpoint.wait();
    same("ready", Vec::new(), ready(epoll)?)?;
    ensure!(!read_some(mounts, 100)?.is_empty(), "there are no mounts");
    sys!(epoll_ctl(epoll, libc::EPOLL_CTL_DEL, mounts, ptr::null_mut())).map(drop)
}

/// Files of all kinds that are nowhere but in a queue, among them the queue's own socket.
fn unix_queued_files(checkpoint: &Checkpoint) -> Verdict {
    let mut ends = [0; 2];
    sys!(socketpair(libc::AF_UNIX, libc::SOCK_STREAM, 0, ends.as_mut_ptr()))?;
    let [a, b] = ends;
    let epoll = sys!(epoll_create1(0))?;
    let event = sys!(eventfd(5, 0))?;
    let server = sys!(socket(libc::AF_INET, libc::SOCK_STREAM, 0))?;
    sys!(listen(server, 1))?;
    let status = open(c"/proc/self/status", libc::O_RDONLY)?;
    same("bytes before", &b"Name:"[..], &read_some(status, 5)?[..])?;
    let memory = sys!(memfd_create(c"queued".as_ptr(), 0))?;
    write_all(memory, b"queued memory")?;
    let all = [epoll, event, server, status, memory, b];
    send_descriptors(a, b"x", &all)?;
    for fd in &all[..5] {
        sys!(close(*fd))?;
    }
    checkpoint.wait();
    let (data, got) = receive_descriptors(b)?;
    same("message", (&b"x"[..], all.len()), (&data[..], got.len()))?;
    watch(got[0], got[1], libc::EPOLLIN, 3)?;
    same("ready", vec![(3, libc::EPOLLIN as u32)], ready(got[0])?)?;
    same("events", &5_u64.to_le_bytes()[..], &read_some(got[1], 8)?[..])?;
    let mut accepts = 0;
    let mut len = size_of::<i32>() as u32;
    let (level, name) = (libc::SOL_SOCKET, libc::SO_ACCEPTCONN);
    sys!(getsockopt(got[2], level, name, (&raw mut accepts).cast(), &raw mut len))?;
    same("whether the queued socket listens", 1, accepts)?;
    same("bytes of the status", &b"\twork"[..], &read_some(got[3], 5)?[..])?;
    same("position of the memory", 13, offset(got[4])?)?;
    write_all(a, b"to itself")?;
    same("bytes of the socket", &b"to itself"[..], &read_some(got[5], 100)?[..])
}

/// Memory whose only description appends, or only writes, and sealed memory.
fn memfd_append(checkpoint: &Checkpoint) -> Verdict {
    let appending = sys!(memfd_create(c"appending".as_ptr(), 0))?;
    sys!(fcntl(appending, libc::F_SETFL, libc::O_APPEND))?;
    write_all(appending, b"hello")?;
    let first = sys!(memfd_create(c"written".as_ptr(), 0))?;
    let path = c_string(format!("/proc/self/fd/{first}"));
    let written = open(&path, libc::O_WRONLY | libc::O_APPEND)?;
    sys!(close(first))?;
    write_all(written, b"write-only")?;
    let sealed = sys!(memfd_create(c"sealed".as_ptr(), libc::MFD_ALLOW_SEALING))?;
    sys!(fcntl(sealed, libc::F_SETFL, libc::O_APPEND))?;
    write_all(sealed, b"sealed")?;
    sys!(fcntl(sealed, libc::F_ADD_SEALS, libc::F_SEAL_WRITE | libc::F_SEAL_GROW))?;
    let all = [appending, written, sealed];
    let before = all.map(flags);
    checkpoint.wait();
    same("flags", before, all.map(flags))?;
    let holds = |fd: i32, wanted: &[u8]| {
        let found = fs::read(format!("/proc/self/fd/{fd}")).map_err(text)?;
        same("bytes", wanted, &found[..])
    };
    holds(appending, b"hello")?;
    holds(written, b"write-only")?;
    holds(sealed, b"sealed")?;
    write_all(appending, b" again")?;
    holds(appending, b"hello again")?;
    ensure!(write_all(sealed, b"x").is_err(), "the seal is gone");
    Ok(())
}

/// Anonymous shared memory that was opened where it is mapped, and mapped again.
fn shared_anon_reopened(checkpoint: &Checkpoint) -> Verdict {
    let first = Area::shared(4)?;
    first.fill(1);
    let (start, end) = (first.at.addr(), first.at.addr() + first.bytes);
    let path = c_string(format!("/proc/self/map_files/{start:x}-{end:x}"));
    let fd = open(&path, libc::O_RDWR)?;
    let map = |share, protection, offset: usize| -> Result<Area, String> {
        let bytes = 2 * PAGE;
        let at = sys!(mmap(ptr::null_mut(), bytes, protection, share, fd, offset as i64))?;
        Ok(Area { at: at.cast(), bytes })
    };
    let both = libc::PROT_READ | libc::PROT_WRITE;
    let again = map(libc::MAP_SHARED, both, PAGE)?;
    let private = map(libc::MAP_PRIVATE, both, 2 * PAGE)?;
    private.set(0, 77);
    let reader = map(libc::MAP_PRIVATE, libc::PROT_READ, 0)?;
    checkpoint.wait();
    first.verify("the first mapping", 1)?;
    for (area, page) in [(again, 1), (private, 2), (reader, 0)] {
        for word in usize::from(page == 2)..area.bytes / 8 {
            let wanted = first.get(page * PAGE / 8 + word);
            same(&format!("word {word} of the mapping at page {page}"), wanted, area.get(word))?;
        }
    }
    same("the private word", 77, private.get(0))?;
    first.set(PAGE / 8, 1234);
    same("a word through the second mapping", 1234, again.get(0))?;
    first.set(0, 555);
    same("a word through a private mapping", 555, reader.get(0))?;
    first.set(3 * PAGE / 8, 99);
    same("a word through another private mapping", 99, private.get(PAGE / 8))?;
    let mut found = [0_u8; 8];
    sys!(pread(fd, found.as_mut_ptr().cast(), 8, PAGE as i64))?;
    same("a word through the descriptor", 1234, u64::from_ne_bytes(found))
}

/// Readers of FIFOs: one that has never seen a writer, one whose writer has gone, and one
/// that came after that.
fn fifo_hangups(checkpoint: &Checkpoint) -> Verdict {
    let make = |name| -> Result<CString, String> {
        let path = checkpoint.c_path(name);
        sys!(mkfifo(path.as_ptr(), 0o600))?;
        Ok(path)
    };
    let (quiet, left, kept) = (make("quiet")?, make("left")?, make("kept")?);
    let reader = libc::O_RDONLY | libc::O_NONBLOCK;
    let never = open(&quiet, reader)?;
    let early = open(&left, reader)?;
    let writer = open(&left, libc::O_WRONLY)?;
    write_all(writer, b"left behind")?;
    sys!(close(writer))?;
    let late = open(&left, reader)?;
    let listening = open(&kept, reader)?;
    let talking = open(&kept, libc::O_WRONLY)?;
    let all = [never, early, late, listening, talking];
    let state = || all.map(|fd| (polled(fd), flags(fd)));
    let before = state();
    same("events", [0, 0x11, 1, 0, 4].map(Ok), before.clone().map(|state| state.0))?;
    checkpoint.wait();
    same("events and flags", before, state())?;
    same("bytes", &b"left"[..], &read_some(late, 4)?[..])?;
    same("bytes", &b" behind"[..], &read_some(early, 100)?[..])?;
    let writer = open(&quiet, libc::O_WRONLY)?;
    sys!(close(writer))?;
    same("events once a writer has come and gone", libc::POLLHUP, polled(never)?)
}

fn master(mode: i32) -> Result<(i32, CString), String> {
    let master = open(c"/dev/ptmx", libc::O_RDWR | libc::O_NOCTTY | mode)?;
    let unlocked = 0;
    sys!(ioctl(master, libc::TIOCSPTLCK, &raw const unlocked))?;
    let mut number = 0;
    sys!(ioctl(master, libc::TIOCGPTN, &raw mut number))?;
    Ok((master, c_string(format!("/dev/pts/{number}"))))
}

/// Masters: of a slave that was closed, and of one that was never opened.
fn pty_masters(checkpoint: &Checkpoint) -> Verdict {
    let (closed, path) = master(libc::O_NONBLOCK)?;
    let slave = open(&path, libc::O_RDWR | libc::O_NOCTTY)?;
    sys!(close(slave))?;
    let (waiting, waiting_path) = master(libc::O_NONBLOCK)?;
    let state = || (polled(closed), polled(waiting), link_of(closed));
    let before = state();
    same("what the master sees", Ok(libc::POLLHUP | libc::POLLOUT), before.0.clone())?;
    let lost = read_some(closed, 10);
    checkpoint.wait();
    same("events", before, state())?;
    same("what reading says", lost, read_some(closed, 10))?;
    let slave = open(&waiting_path, libc::O_RDWR | libc::O_NOCTTY)?;
    write_all(slave, b"words")?;
    same("bytes of the slave", &b"words"[..], &read_some(waiting, 100)?[..])
}

/// A session whose terminal hangs up after the checkpoint, and one whose did before.
fn pty_hangups(checkpoint: &Checkpoint) -> Verdict {
    let lead = |path: &CString| -> Result<i32, String> {
        sys!(setsid())?;
        let slave = open(path, libc::O_RDWR)?;
        sys!(ioctl(slave, libc::TIOCSCTTY, 0))?;
        Ok(slave)
    };
    let ctty = || fs::File::open("/dev/tty").map(drop).map_err(text);
    let (first, path) = master(libc::O_CLOEXEC)?;
    let doomed = checkpoint.fork(|child| {
        sys!(close(first))?;
        // SAFETY: SIG_DFL is no function. nohup(1) would leave the signal ignored.
        unsafe { libc::signal(libc::SIGHUP, libc::SIG_DFL) };
        lead(&path)?;
        child.wait();
        // SIGHUP ends it.
        loop {
            crate::kit::nap(1000);
        }
    })?;
    // Its terminal hangs up as soon as it has one: the master is its own.
    let hung = checkpoint.fork(|child| {
        sys!(close(first))?;
        ignore_hangup()?;
        let (second, path) = master(libc::O_CLOEXEC)?;
        let slave = lead(&path)?;
        sys!(close(second))?;
        let state = || (polled(slave), read_some(slave, 10), write_all(slave, b"x"), ctty());
        let before = state();
        ensure!(before.3.is_err(), "the session still has a terminal");
        child.wait();
        same("what a hung-up terminal says", before, state())
    })?;
    checkpoint.wait();
    sys!(close(first))?;
    let mut status = 0;
    sys!(waitpid(doomed.pid, &raw mut status, 0))?;
    ensure!(
        libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGHUP,
        "the leader of the session ended with {status:#x}"
    );
    hung.join()
}

fn ignore_hangup() -> Verdict {
    // SAFETY: SIG_IGN is no function.
    let before = unsafe { libc::signal(libc::SIGHUP, libc::SIG_IGN) };
    ensure!(before != libc::SIG_ERR, "SIGHUP cannot be ignored");
    Ok(())
}

fn stat_of(fd: i32) -> Result<libc::stat, String> {
    // SAFETY: all zeros is a valid value.
    let mut stat: libc::stat = unsafe { std::mem::zeroed() };
    sys!(fstat(fd, &raw mut stat))?;
    Ok(stat)
}

/// A file that never had a name can be given one.
fn tmpfile(checkpoint: &Checkpoint) -> Verdict {
    let path = checkpoint.path("status");
    let dir = c_string(path.parent().ok_or("no directory")?.as_os_str().as_encoded_bytes());
    let fd = open(&dir, libc::O_TMPFILE | libc::O_RDWR)?;
    let reader = open(&c_string(format!("/proc/self/fd/{fd}")), libc::O_RDONLY)?;
    write_all(fd, b"without a name")?;
    let before = (flags(fd)?, offset(fd)?, stat_of(fd)?.st_mode);
    checkpoint.wait();
    same("flags, offset, mode", before, (flags(fd)?, offset(fd)?, stat_of(fd)?.st_mode))?;
    same("bytes", &b"without"[..], &read_some(reader, 7)?[..])?;
    let new = checkpoint.c_path("named");
    sys!(linkat(fd, c"".as_ptr(), libc::AT_FDCWD, new.as_ptr(), libc::AT_EMPTY_PATH))?;
    let found = fs::read(checkpoint.path("named")).map_err(text)?;
    same("bytes under the new name", &b"without a name"[..], &found[..])
}

/// Attributes and times of a deleted file.
fn deleted_attributes(checkpoint: &Checkpoint) -> Verdict {
    let fd = open(&checkpoint.c_path("file"), libc::O_RDWR | libc::O_CREAT)?;
    write_all(fd, b"contents")?;
    let names = [c"user.first", c"trusted.second"];
    for name in names {
        let value = name.to_bytes();
        sys!(fsetxattr(fd, name.as_ptr(), value.as_ptr().cast(), value.len(), 0))?;
    }
    // An access control list with a user of its own (`linux/posix_acl_xattr.h`): version,
    // then tag, permissions and id of each entry.
    let none = u32::MAX;
    let entries = [(1, 6, none), (2, 4, 65_534_u32), (4, 0, none), (16, 4, none), (32, 0, none)];
    let mut list = 2_u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        list.extend(u16::to_le_bytes(tag));
        list.extend(u16::to_le_bytes(permissions));
        list.extend(id.to_le_bytes());
    }
    let acl = c"system.posix_acl_access";
    let has_lists = sys!(fsetxattr(fd, acl.as_ptr(), list.as_ptr().cast(), list.len(), 0)).is_ok();
    sys!(fchown(fd, 65_534, 65_533))?;
    let time = |seconds, nanoseconds| libc::timespec { tv_sec: seconds, tv_nsec: nanoseconds };
    let times = [time(1_000_000_000, 123_456_789), time(1_100_000_000, 987_654_321)];
    sys!(futimens(fd, times.as_ptr()))?;
    fs::remove_file(checkpoint.path("file")).map_err(text)?;
    let get = |name: &std::ffi::CStr| -> Result<Vec<u8>, String> {
        let mut value = vec![0_u8; 200];
        let count = sys!(fgetxattr(fd, name.as_ptr(), value.as_mut_ptr().cast(), value.len()))?;
        value.truncate(count as usize);
        Ok(value)
    };
    let state = || -> Result<_, String> {
        let stat = stat_of(fd)?;
        let times = [stat.st_atime, stat.st_atime_nsec, stat.st_mtime, stat.st_mtime_nsec];
        Ok((times, stat.st_mode, stat.st_uid, stat.st_gid))
    };
    let before = state()?;
    checkpoint.wait();
    same("times, mode and owner", before, state()?)?;
    for name in names {
        same("attribute", name.to_bytes(), &get(name)?[..])?;
    }
    if has_lists {
        same("access control list", list, get(acl)?)?;
    }
    Ok(())
}
