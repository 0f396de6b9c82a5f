//! Open files of every kind but sockets.

use std::{fs, os::unix::fs::MetadataExt, ptr};

use crate::{
    Row,
    kit::{Checkpoint, Verdict, bytes, nap, open, read_some, same, wait_until, write_all},
    threads::{bit, block},
};

pub const ROWS: &[Row] = &[
    ("regular_files", regular_files),
    ("shared_offsets", shared_offsets),
    ("descriptor_numbers", descriptor_numbers),
    ("directories", directories),
    ("devices", devices),
    ("path_descriptors", path_descriptors),
    ("pipes", pipes),
    ("pipe_across_tasks", pipe_across_tasks),
    ("pipe_packets", pipe_packets),
    ("pipe_packets_of_before", pipe_packets_of_before),
    ("pipe_ends_reopened", pipe_ends_reopened),
    ("fifo", fifo),
    ("eventfds", eventfds),
    ("memfds", memfds),
    ("deleted_file", deleted_file),
    ("deleted_linked_file", deleted_linked_file),
    ("deleted_directory", deleted_directory),
    ("renamed_file", renamed_file),
    ("epoll", epoll),
    ("epoll_nested", epoll_nested),
    ("epoll_of_closed", epoll_of_closed),
    ("timerfds", timerfds),
    ("signalfd", signalfd),
    ("file_owner", file_owner),
    ("many_descriptors", many_descriptors),
];

pub fn offset(fd: i32) -> Result<i64, String> {
    sys!(lseek(fd, 0, libc::SEEK_CUR))
}

pub fn flags(fd: i32) -> Result<(i32, i32), String> {
    Ok((sys!(fcntl(fd, libc::F_GETFL))?, sys!(fcntl(fd, libc::F_GETFD))?))
}

fn create(checkpoint: &Checkpoint, name: &str, contents: &[u8]) -> Verdict {
    fs::write(checkpoint.path(name), contents).map_err(|error| error.to_string())
}

fn contents(checkpoint: &Checkpoint, name: &str) -> Result<Vec<u8>, String> {
    fs::read(checkpoint.path(name)).map_err(|error| error.to_string())
}

fn regular_files(checkpoint: &Checkpoint) -> Verdict {
    create(checkpoint, "file", b"0123456789")?;
    create(checkpoint, "log", b"begin ")?;
    let path = checkpoint.c_path("file");
    let reader = open(&path, libc::O_RDONLY)?;
    same("bytes before", &b"0123"[..], &read_some(reader, 4)?[..])?;
    let writer = open(&path, libc::O_RDWR | libc::O_CLOEXEC)?;
    sys!(lseek(writer, 7, libc::SEEK_SET))?;
    let log = open(&checkpoint.c_path("log"), libc::O_WRONLY | libc::O_APPEND | libc::O_NONBLOCK)?;
    let far = open(&path, libc::O_RDONLY | libc::O_NOFOLLOW)?;
    sys!(lseek(far, 1 << 40, libc::SEEK_SET))?;
    let all = [reader, writer, log, far];
    let state = || all.map(|fd| (flags(fd), offset(fd)));
    let before = state();
    checkpoint.wait();
    same("flags and offsets", before, state())?;
    same("bytes after", &b"456"[..], &read_some(reader, 3)?[..])?;
    write_all(writer, b"X")?;
    write_all(log, b"end")?;
    same("file", &b"0123456X89"[..], &contents(checkpoint, "file")?[..])?;
    same("log", &b"begin end"[..], &contents(checkpoint, "log")?[..])
}

fn shared_offsets(checkpoint: &Checkpoint) -> Verdict {
    create(checkpoint, "file", b"abcdefghijklmnop")?;
    let path = checkpoint.c_path("file");
    let first = open(&path, libc::O_RDONLY)?;
    let copy = sys!(dup(first))?;
    let apart = open(&path, libc::O_RDONLY)?;
    sys!(lseek(first, 2, libc::SEEK_SET))?;
    let child = checkpoint.fork(|child| {
        child.wait();
        child.wait_mark("parent")?;
        same("bytes in the child", &b"ef"[..], &read_some(copy, 2)?[..])?;
        child.mark("child");
        Ok(())
    })?;
    checkpoint.wait();
    same("bytes", &b"cd"[..], &read_some(first, 2)?[..])?;
    checkpoint.mark("parent");
    checkpoint.wait_mark("child")?;
    same("bytes after the child's", &b"gh"[..], &read_some(copy, 2)?[..])?;
    same("bytes of a description of its own", &b"ab"[..], &read_some(apart, 2)?[..])?;
    // Status flags are the description's as well.
    sys!(fcntl(first, libc::F_SETFL, libc::O_APPEND))?;
    ensure!(flags(copy)?.0 & libc::O_APPEND != 0, "the copy has flags of its own");
    ensure!(flags(apart)?.0 & libc::O_APPEND == 0, "the other description has these flags");
    child.join()
}

fn descriptor_numbers(checkpoint: &Checkpoint) -> Verdict {
    create(checkpoint, "file", b"abc")?;
    let fd = open(&checkpoint.c_path("file"), libc::O_RDONLY)?;
    let high = [77, 500, 1000];
    for number in high {
        sys!(dup3(fd, number, if number == 500 { libc::O_CLOEXEC } else { 0 }))?;
    }
    sys!(close(0))?;
    let list = || -> Result<Vec<String>, String> {
        let mut found = Vec::new();
        for number in 0..1100 {
            if let Ok(flags) = flags(number) {
                found.push(format!("{number}: {flags:?}"));
            }
        }
        Ok(found)
    };
    let before = list()?;
    checkpoint.wait();
    same("descriptors", before, list()?)?;
    sys!(lseek(77, 1, libc::SEEK_SET))?;
    same("bytes", &b"bc"[..], &read_some(1000, 10)?[..])
}

/// The next entries of a directory: places and names.
fn entries(fd: i32) -> Result<Vec<(u64, Vec<u8>)>, String> {
    let mut data = vec![0_u8; 200];
    let count = sys!(syscall(libc::SYS_getdents64, fd, data.as_mut_ptr(), data.len()))?;
    // `struct linux_dirent64`: inode, place of the next, length, type, name.
    let mut rest = &data[..count as usize];
    let mut found = Vec::new();
    while let Some((head, name)) = rest.split_at_checked(19) {
        let place = u64::from_le_bytes(head[8..16].try_into().map_err(|_| "a short entry")?);
        let len = usize::from(u16::from_le_bytes([head[16], head[17]]));
        let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
        found.push((place, name.to_owned()));
        rest = &rest[len..];
    }
    Ok(found)
}

fn directories(checkpoint: &Checkpoint) -> Verdict {
    let path = checkpoint.path("directory");
    fs::create_dir(&path).map_err(|error| error.to_string())?;
    for number in 0..40 {
        fs::write(path.join(format!("entry-{number}")), "").map_err(|error| error.to_string())?;
    }
    let open_it = || open(&checkpoint.c_path("directory"), libc::O_RDONLY | libc::O_DIRECTORY);
    let (read, reference) = (open_it()?, open_it()?);
    entries(read)?;
    entries(reference)?;
    let mut rest = Vec::new();
    loop {
        let more = entries(reference)?;
        if more.is_empty() {
            break;
        }
        rest.push(more);
    }
    checkpoint.wait();
    for expected in rest {
        same("entries", expected, entries(read)?)?;
    }
    same("entries at the end", 0, entries(read)?.len())?;
    let found = sys!(openat(read, c"entry-7".as_ptr(), libc::O_RDONLY))?;
    sys!(close(found)).map(drop)
}

fn devices(checkpoint: &Checkpoint) -> Verdict {
    let null = open(c"/dev/null", libc::O_RDWR)?;
    let zero = open(c"/dev/zero", libc::O_RDONLY)?;
    let random = open(c"/dev/urandom", libc::O_RDONLY)?;
    let full = open(c"/dev/full", libc::O_WRONLY | libc::O_CLOEXEC)?;
    let state = || [null, zero, random, full].map(flags);
    let before = state();
    checkpoint.wait();
    same("flags", before, state())?;
    same("bytes of null", 0, read_some(null, 10)?.len())?;
    same("bytes of zero", vec![0; 10], read_some(zero, 10)?)?;
    ensure!(read_some(random, 64)? != read_some(random, 64)?, "random bytes twice");
    ensure!(write_all(full, b"x").is_err(), "the full device has room");
    Ok(())
}

fn path_descriptors(checkpoint: &Checkpoint) -> Verdict {
    create(checkpoint, "file", b"abc")?;
    let directory = checkpoint.path("directory");
    fs::create_dir(&directory).map_err(|error| error.to_string())?;
    fs::write(directory.join("inside"), "inner").map_err(|error| error.to_string())?;
    let file = open(&checkpoint.c_path("file"), libc::O_PATH | libc::O_CLOEXEC)?;
    let directory = open(&checkpoint.c_path("directory"), libc::O_PATH | libc::O_DIRECTORY)?;
    let before = (flags(file)?, flags(directory)?);
    checkpoint.wait();
    same("flags", before, (flags(file)?, flags(directory)?))?;
    ensure!(read_some(file, 1).is_err(), "a path descriptor can be read");
    let inner = sys!(openat(directory, c"inside".as_ptr(), libc::O_RDONLY))?;
    same("bytes", &b"inner"[..], &read_some(inner, 10)?[..])?;
    let again = fs::read(format!("/proc/self/fd/{file}")).map_err(|error| error.to_string())?;
    same("bytes of the file", &b"abc"[..], &again[..])
}

fn pipe(flags: i32) -> Result<[i32; 2], String> {
    let mut ends = [0; 2];
    sys!(pipe2(ends.as_mut_ptr(), flags))?;
    Ok(ends)
}

fn pipes(checkpoint: &Checkpoint) -> Verdict {
    let empty = pipe(libc::O_CLOEXEC)?;
    let filled = pipe(libc::O_NONBLOCK)?;
    let large = pipe(0)?;
    sys!(fcntl(large[1], libc::F_SETPIPE_SZ, 1 << 18))?;
    let data = bytes(1, 200_000);
    write_all(filled[1], b"a few bytes")?;
    write_all(large[1], &data)?;
    let writerless = pipe(0)?;
    write_all(writerless[1], b"left")?;
    sys!(close(writerless[1]))?;
    let readerless = pipe(0)?;
    sys!(close(readerless[0]))?;
    let state = || -> Result<_, String> {
        let size = |fd| sys!(fcntl(fd, libc::F_GETPIPE_SZ));
        let sizes = [size(empty[0])?, size(filled[0])?, size(large[0])?];
        Ok((sizes, empty.map(flags), filled.map(flags), large.map(flags)))
    };
    let before = state()?;
    checkpoint.wait();
    same("sizes and flags", before, state()?)?;
    same("bytes", &b"a few bytes"[..], &read_some(filled[0], 100)?[..])?;
    ensure!(read_some(filled[0], 100).is_err(), "the pipe has more");
    let found = read_some(large[0], 300_000)?;
    ensure!(found == data, "{} bytes of the large pipe have become {}", data.len(), found.len());
    write_all(empty[1], b"now")?;
    same("bytes sent afterwards", &b"now"[..], &read_some(empty[0], 100)?[..])?;
    same("bytes left", &b"left"[..], &read_some(writerless[0], 100)?[..])?;
    same("bytes at the end", 0, read_some(writerless[0], 100)?.len())?;
    ensure!(write_all(readerless[1], b"x").is_err(), "a pipe without reader takes bytes");
    Ok(())
}

fn pipe_across_tasks(checkpoint: &Checkpoint) -> Verdict {
    let down = pipe(0)?;
    let up = pipe(0)?;
    let child = checkpoint.fork(|child| {
        sys!(close(down[1]))?;
        sys!(close(up[0]))?;
        let below = child.fork(|grandchild| {
            sys!(close(down[0]))?;
            grandchild.wait();
            grandchild.wait_mark("echoed")?;
            write_all(up[1], b" and the grandchild's")
        })?;
        child.wait();
        let data = read_some(down[0], 100)?;
        write_all(up[1], &data)?;
        child.mark("echoed");
        below.join()
    })?;
    sys!(close(down[0]))?;
    sys!(close(up[1]))?;
    write_all(down[1], b"the parent's")?;
    checkpoint.wait();
    let mut found = Vec::new();
    loop {
        let more = read_some(up[0], 100)?;
        if more.is_empty() {
            break;
        }
        found.extend(more);
    }
    same("echo", &b"the parent's and the grandchild's"[..], &found[..])?;
    child.join()
}

fn pipe_packets(checkpoint: &Checkpoint) -> Verdict {
    let ends = pipe(libc::O_DIRECT)?;
    for data in [&b"one"[..], b"three", b"x"] {
        write_all(ends[1], data)?;
    }
    let before = ends.map(flags);
    checkpoint.wait();
    same("flags", before, ends.map(flags))?;
    for data in [&b"one"[..], b"three", b"x"] {
        same("packet", data, &read_some(ends[0], 100)?[..])?;
    }
    write_all(ends[1], b"la")?;
    write_all(ends[1], b"st")?;
    same("packet sent afterwards", &b"la"[..], &read_some(ends[0], 100)?[..])
}

/// Packets in a pipe whose writer is no longer in packet mode.
fn pipe_packets_of_before(checkpoint: &Checkpoint) -> Verdict {
    let [read, write] = pipe(libc::O_DIRECT)?;
    for packet in [&b"one"[..], b"second"] {
        write_all(write, packet)?;
    }
    for end in [read, write] {
        sys!(fcntl(end, libc::F_SETFL, 0))?;
    }
    checkpoint.wait();
    same("first", &b"one"[..], &read_some(read, 100)?[..])?;
    same("second", &b"second"[..], &read_some(read, 100)?[..])
}

/// A pipe that one descriptor can both read and write.
fn pipe_ends_reopened(checkpoint: &Checkpoint) -> Verdict {
    let ends = pipe(0)?;
    let path = std::ffi::CString::new(format!("/proc/self/fd/{}", ends[0])).expect("no NUL");
    let both = open(&path, libc::O_RDWR)?;
    write_all(both, b"round")?;
    let before = (flags(both)?, ends.map(flags));
    checkpoint.wait();
    same("flags", before, (flags(both)?, ends.map(flags)))?;
    same("bytes", &b"round"[..], &read_some(ends[0], 100)?[..])?;
    write_all(ends[1], b"trip")?;
    same("bytes", &b"trip"[..], &read_some(both, 100)?[..])
}

fn fifo(checkpoint: &Checkpoint) -> Verdict {
    let path = checkpoint.c_path("fifo");
    sys!(mkfifo(path.as_ptr(), 0o600))?;
    let reader = open(&path, libc::O_RDONLY | libc::O_NONBLOCK)?;
    let writer = open(&path, libc::O_WRONLY | libc::O_CLOEXEC)?;
    let both = open(&path, libc::O_RDWR)?;
    write_all(writer, b"in the queue")?;
    let all = [reader, writer, both];
    let before = all.map(flags);
    checkpoint.wait();
    same("flags", before, all.map(flags))?;
    same("bytes", &b"in the "[..], &read_some(reader, 7)?[..])?;
    write_all(both, b" now")?;
    same("bytes", &b"queue now"[..], &read_some(reader, 100)?[..])
}

fn eventfds(checkpoint: &Checkpoint) -> Verdict {
    let counter = sys!(eventfd(7, libc::EFD_CLOEXEC))?;
    let semaphore = sys!(eventfd(3, libc::EFD_SEMAPHORE | libc::EFD_NONBLOCK))?;
    let zero = sys!(eventfd(0, libc::EFD_NONBLOCK))?;
    let large = sys!(eventfd(0, libc::EFD_NONBLOCK))?;
    write_all(large, &(u64::MAX - 1).to_le_bytes())?;
    let all = [counter, semaphore, zero, large];
    let before = all.map(flags);
    checkpoint.wait();
    same("flags", before, all.map(flags))?;
    let read = |fd| -> Result<u64, String> {
        let data = read_some(fd, 8)?;
        Ok(u64::from_le_bytes(data.try_into().map_err(|_| "a short read")?))
    };
    same("counter", 7, read(counter)?)?;
    for _ in 0..3 {
        same("semaphore", 1, read(semaphore)?)?;
    }
    ensure!(read(semaphore).is_err(), "the semaphore counts further");
    ensure!(read(zero).is_err(), "an event that was never sent");
    same("large counter", u64::MAX - 1, read(large)?)
}

fn memfds(checkpoint: &Checkpoint) -> Verdict {
    let fd = sys!(memfd_create(c"first".as_ptr(), libc::MFD_CLOEXEC))?;
    write_all(fd, &bytes(1, 10_000))?;
    sys!(lseek(fd, 5000, libc::SEEK_SET))?;
    let sparse = sys!(memfd_create(c"sparse".as_ptr(), libc::MFD_ALLOW_SEALING))?;
    sys!(ftruncate(sparse, 1 << 30))?;
    sys!(pwrite(sparse, b"far".as_ptr().cast(), 3, 1 << 29))?;
    // The same object through a second description, read-only.
    let path = std::ffi::CString::new(format!("/proc/self/fd/{fd}")).expect("no NUL");
    let second = open(&path, libc::O_RDONLY)?;
    let link =
        |fd: i32| fs::read_link(format!("/proc/self/fd/{fd}")).map_err(|error| error.to_string());
    let state = || -> Result<_, String> {
        Ok((flags(fd)?, offset(fd)?, link(fd)?, flags(second)?, offset(second)?, link(sparse)?))
    };
    let before = state()?;
    checkpoint.wait();
    same("flags, offsets, names", before, state()?)?;
    same("bytes", &bytes(1, 10_000)[5000..], &read_some(fd, 10_000)?[..])?;
    same("bytes of the second", bytes(1, 10_000), read_some(second, 20_000)?)?;
    sys!(pwrite(fd, b"new".as_ptr().cast(), 3, 0))?;
    sys!(lseek(second, 0, libc::SEEK_SET))?;
    same("the same object", &b"new"[..], &read_some(second, 3)?[..])?;
    let mut found = [0_u8; 5];
    sys!(pread(sparse, found.as_mut_ptr().cast(), 5, (1 << 29) - 1))?;
    same("bytes of the sparse one", b"\0far\0", &found)?;
    // SAFETY: all zeros is a valid value.
    let mut stat: libc::stat = unsafe { std::mem::zeroed() };
    sys!(fstat(sparse, &raw mut stat))?;
    same("size of the sparse one", 1 << 30, stat.st_size)?;
    ensure!(stat.st_blocks < 2000, "the sparse one has {} blocks", stat.st_blocks);
    Ok(())
}

fn deleted_file(checkpoint: &Checkpoint) -> Verdict {
    create(checkpoint, "ghost", &bytes(1, 30_000))?;
    let path = checkpoint.path("ghost");
    let fd = open(&checkpoint.c_path("ghost"), libc::O_RDWR)?;
    let second = open(&checkpoint.c_path("ghost"), libc::O_RDONLY)?;
    sys!(fchmod(fd, 0o640))?;
    sys!(lseek(fd, 20_000, libc::SEEK_SET))?;
    fs::remove_file(&path).map_err(|error| error.to_string())?;
    let child = checkpoint.fork(|child| {
        child.wait();
        child.wait_mark("written")?;
        same("bytes in the child", &b"new"[..], &read_some(second, 3)?[..])
    })?;
    checkpoint.wait();
    same("bytes", &bytes(1, 30_000)[20_000..], &read_some(fd, 30_000)?[..])?;
    // SAFETY: all zeros is a valid value.
    let mut stat: libc::stat = unsafe { std::mem::zeroed() };
    sys!(fstat(fd, &raw mut stat))?;
    same("links, mode", (0, 0o100_640), (stat.st_nlink, stat.st_mode))?;
    ensure!(!path.exists(), "the deleted file has come back");
    sys!(pwrite(fd, b"new".as_ptr().cast(), 3, 0))?;
    checkpoint.mark("written");
    child.join()
}

/// Deleted under the name it was opened by, alive under another.
fn deleted_linked_file(checkpoint: &Checkpoint) -> Verdict {
    create(checkpoint, "first", b"linked file")?;
    let (first, second) = (checkpoint.path("first"), checkpoint.path("second"));
    fs::hard_link(&first, &second).map_err(|error| error.to_string())?;
    let fd = open(&checkpoint.c_path("first"), libc::O_RDWR)?;
    fs::remove_file(&first).map_err(|error| error.to_string())?;
    checkpoint.wait();
    same("bytes", &b"linked file"[..], &read_some(fd, 100)?[..])?;
    write_all(fd, b", longer")?;
    same("the other name", &b"linked file, longer"[..], &contents(checkpoint, "second")?[..])?;
    ensure!(!first.exists(), "the deleted name has come back");
    Ok(())
}

fn deleted_directory(checkpoint: &Checkpoint) -> Verdict {
    let path = checkpoint.path("directory");
    fs::create_dir(&path).map_err(|error| error.to_string())?;
    let fd = open(&checkpoint.c_path("directory"), libc::O_RDONLY | libc::O_DIRECTORY)?;
    fs::remove_dir(&path).map_err(|error| error.to_string())?;
    checkpoint.wait();
    // SAFETY: all zeros is a valid value.
    let mut stat: libc::stat = unsafe { std::mem::zeroed() };
    sys!(fstat(fd, &raw mut stat))?;
    same("kind", libc::S_IFDIR, stat.st_mode & libc::S_IFMT)?;
    ensure!(!path.exists(), "the deleted directory has come back");
    Ok(())
}

fn renamed_file(checkpoint: &Checkpoint) -> Verdict {
    create(checkpoint, "old", b"renamed file")?;
    let fd = open(&checkpoint.c_path("old"), libc::O_RDWR)?;
    let (old, new) = (checkpoint.path("old"), checkpoint.path("new name"));
    fs::rename(&old, &new).map_err(|error| error.to_string())?;
    fs::write(&old, "another file").map_err(|error| error.to_string())?;
    checkpoint.wait();
    let inode = fs::metadata(&new).map_err(|error| error.to_string())?.ino();
    same("bytes", &b"renamed file"[..], &read_some(fd, 100)?[..])?;
    // SAFETY: all zeros is a valid value.
    let mut stat: libc::stat = unsafe { std::mem::zeroed() };
    sys!(fstat(fd, &raw mut stat))?;
    same("inode", inode, stat.st_ino)
}

pub fn watch(epoll: i32, fd: i32, events: i32, data: u64) -> Verdict {
    let mut event = libc::epoll_event { events: events as u32, u64: data };
    sys!(epoll_ctl(epoll, libc::EPOLL_CTL_ADD, fd, &raw mut event)).map(drop)
}

/// Ready events, sorted by the values of their watchers.
pub fn ready(epoll: i32) -> Result<Vec<(u64, u32)>, String> {
    let mut events = [libc::epoll_event { events: 0, u64: 0 }; 16];
    let count = sys!(epoll_wait(epoll, events.as_mut_ptr(), 16, 0))?;
    let mut found: Vec<_> =
        events[..count as usize].iter().map(|event| (event.u64, event.events)).collect();
    found.sort_unstable();
    Ok(found)
}

const IN: i32 = libc::EPOLLIN;
const IN_BITS: u32 = libc::EPOLLIN as u32;

fn epoll(checkpoint: &Checkpoint) -> Verdict {
    let epoll = sys!(epoll_create1(libc::EPOLL_CLOEXEC))?;
    let quiet = pipe(0)?;
    let loud = pipe(0)?;
    let event = sys!(eventfd(1, 0))?;
    let timer = sys!(timerfd_create(libc::CLOCK_MONOTONIC, 0))?;
    let mut pair = [0; 2];
    sys!(socketpair(libc::AF_UNIX, libc::SOCK_STREAM, 0, pair.as_mut_ptr()))?;
    write_all(loud[1], b"x")?;
    watch(epoll, quiet[0], IN, 0xdead_beef_0000_0001)?;
    watch(epoll, loud[0], IN, 2)?;
    watch(epoll, event, IN | libc::EPOLLET, 3)?;
    watch(epoll, timer, IN, 4)?;
    watch(epoll, pair[0], IN | libc::EPOLLOUT | libc::EPOLLRDHUP, u64::MAX)?;
    let once = sys!(eventfd(1, 0))?;
    watch(epoll, once, IN | libc::EPOLLONESHOT, 6)?;
    let child = checkpoint.fork(|child| {
        child.wait();
        child.wait_mark("sent")?;
        let found = ready(epoll)?;
        let wanted = (0xdead_beef_0000_0001, IN_BITS);
        ensure!(found.contains(&wanted), "the child sees {found:x?}");
        Ok(())
    })?;
    checkpoint.wait();
    let out = libc::EPOLLOUT as u32;
    let expected = vec![(2, IN_BITS), (3, IN_BITS), (6, IN_BITS), (u64::MAX, out)];
    same("ready", expected, ready(epoll)?)?;
    same("ready again", vec![(2, IN_BITS), (u64::MAX, out)], ready(epoll)?)?;
    same("close-on-exec", libc::FD_CLOEXEC, flags(epoll)?.1)?;
    write_all(quiet[1], b"x")?;
    checkpoint.mark("sent");
    child.join()?;
    sys!(epoll_ctl(epoll, libc::EPOLL_CTL_DEL, timer, ptr::null_mut())).map(drop)
}

fn epoll_nested(checkpoint: &Checkpoint) -> Verdict {
    let inner = sys!(epoll_create1(0))?;
    let outer = sys!(epoll_create1(0))?;
    let ends = pipe(0)?;
    watch(inner, ends[0], IN, 1)?;
    watch(outer, inner, IN, 2)?;
    // The same file under two numbers.
    let copy = sys!(dup(ends[0]))?;
    watch(outer, copy, IN, 3)?;
    checkpoint.wait();
    same("ready", Vec::new(), ready(outer)?)?;
    write_all(ends[1], b"x")?;
    same("ready outside", vec![(2, IN_BITS), (3, IN_BITS)], ready(outer)?)?;
    same("ready inside", vec![(1, IN_BITS)], ready(inner)?)
}

/// A descriptor that is watched has another number now.
fn epoll_of_closed(checkpoint: &Checkpoint) -> Verdict {
    let epoll = sys!(epoll_create1(0))?;
    let ends = pipe(0)?;
    watch(epoll, ends[0], IN, 5)?;
    let moved = sys!(fcntl(ends[0], libc::F_DUPFD, 100))?;
    sys!(close(ends[0]))?;
    checkpoint.wait();
    write_all(ends[1], b"x")?;
    same("ready", vec![(5, IN_BITS)], ready(epoll)?)?;
    same("bytes", &b"x"[..], &read_some(moved, 10)?[..])
}

fn set_timerfd(fd: i32, first_ms: i64, interval_ms: i64) -> Verdict {
    let time = |ms: i64| libc::timespec { tv_sec: ms / 1000, tv_nsec: ms % 1000 * 1_000_000 };
    let value = libc::itimerspec { it_interval: time(interval_ms), it_value: time(first_ms) };
    sys!(timerfd_settime(fd, 0, &raw const value, ptr::null_mut())).map(drop)
}

/// Milliseconds to the next expiry, and of the interval.
fn timerfd(fd: i32) -> Result<(i64, i64), String> {
    let none = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    let mut found = libc::itimerspec { it_interval: none, it_value: none };
    sys!(timerfd_gettime(fd, &raw mut found))?;
    let ms = |time: libc::timespec| time.tv_sec * 1000 + time.tv_nsec / 1_000_000;
    Ok((ms(found.it_value), ms(found.it_interval)))
}

fn timerfds(checkpoint: &Checkpoint) -> Verdict {
    let make = |clock| sys!(timerfd_create(clock, libc::TFD_NONBLOCK));
    let running = make(libc::CLOCK_MONOTONIC)?;
    let far = make(libc::CLOCK_REALTIME)?;
    let expired = make(libc::CLOCK_BOOTTIME)?;
    let idle = make(libc::CLOCK_MONOTONIC)?;
    set_timerfd(far, 1_000_000, 5000)?;
    set_timerfd(expired, 1, 0)?;
    wait_until("the timer", || timerfd(expired).is_ok_and(|(value, _)| value == 0))?;
    nap(2);
    set_timerfd(running, 30, 20)?;
    let all = [running, far, expired, idle];
    let before = all.map(flags);
    checkpoint.wait();
    same("flags", before, all.map(flags))?;
    same("idle timer", (0, 0), timerfd(idle)?)?;
    ensure!(read_some(idle, 8).is_err(), "the idle timer has expired");
    let (value, interval) = timerfd(far)?;
    same("interval of the far timer", 5000, interval)?;
    ensure!((800_000..=1_000_000).contains(&value), "the far timer expires in {value} ms");
    same("expiries of the expired timer", &1_u64.to_le_bytes()[..], &read_some(expired, 8)?[..])?;
    same("interval of the running timer", 20, timerfd(running)?.1)?;
    let mut count = 0;
    wait_until("two expiries", || {
        if let Ok(data) = read_some(running, 8) {
            count += data[0];
        }
        count >= 2
    })
}

fn signalfd(checkpoint: &Checkpoint) -> Verdict {
    let mask = bit(libc::SIGUSR1) | bit(libc::SIGUSR2) | bit(40);
    block(mask)?;
    let create = |flags: i32| {
        sys!(syscall(libc::SYS_signalfd4, -1, &raw const mask, 8, flags)).map(|fd| fd as i32)
    };
    let fd = create(libc::SFD_NONBLOCK | libc::SFD_CLOEXEC)?;
    // SAFETY: getpid has no preconditions.
    sys!(kill(libc::getpid(), libc::SIGUSR2))?;
    let before = flags(fd)?;
    checkpoint.wait();
    same("flags", before, flags(fd)?)?;
    let signal = |data: &[u8]| u32::from_le_bytes([data[0], data[1], data[2], data[3]]);
    same("signal", libc::SIGUSR2 as u32, signal(&read_some(fd, 128)?))?;
    ensure!(read_some(fd, 128).is_err(), "one signal too many");
    sys!(raise(40))?;
    same("signal", 40, signal(&read_some(fd, 128)?))
}

/// From uapi/asm-generic/fcntl.h.
const F_SETSIG: i32 = 10;
const F_GETSIG: i32 = 11;

fn file_owner(checkpoint: &Checkpoint) -> Verdict {
    let ends = pipe(0)?;
    // SAFETY: getpid has no preconditions.
    let pid = unsafe { libc::getpid() };
    sys!(fcntl(ends[0], libc::F_SETOWN, pid))?;
    sys!(fcntl(ends[0], F_SETSIG, 44))?;
    let state = || -> Result<_, String> {
        let owner = sys!(fcntl(ends[0], libc::F_GETOWN))?;
        Ok((owner, sys!(fcntl(ends[0], F_GETSIG))?, flags(ends[0])?))
    };
    let before = state()?;
    checkpoint.wait();
    same("owner, signal, flags", before, state()?)
}

fn many_descriptors(checkpoint: &Checkpoint) -> Verdict {
    create(checkpoint, "file", &bytes(1, 1000))?;
    let path = checkpoint.c_path("file");
    let mut all = Vec::new();
    for number in 0..800 {
        let fd = open(&path, libc::O_RDONLY)?;
        sys!(lseek(fd, number, libc::SEEK_SET))?;
        all.push((fd, number));
    }
    checkpoint.wait();
    for (fd, number) in all {
        same(&format!("offset of {fd}"), number, offset(fd)?)?;
    }
    Ok(())
}
