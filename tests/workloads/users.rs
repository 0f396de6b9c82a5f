//! User namespaces.

use std::{
    fs::{self, File},
    io::Write,
    os::{
        fd::AsRawFd,
        unix::fs::{MetadataExt, PermissionsExt, chown},
    },
};

use crate::{
    Row,
    kit::{Checkpoint, Thread, Verdict, gettid, same},
};

pub const ROWS: &[Row] = &[
    ("user_namespace", user_namespace),
    ("user_namespace_of_root_alone", root_alone),
    ("user_namespace_with_threads", with_threads),
    ("user_namespace_without_a_map", without_a_map),
];

/// Moves into a user namespace with these maps, which a child outside writes.
pub fn enter(maps: [&str; 2], setgroups: Option<&str>) -> Verdict {
    let mut pipe = [0; 2];
    sys!(pipe(pipe.as_mut_ptr()))?;
    let own = std::process::id();
    // SAFETY: this process has one thread.
    let child = sys!(fork())?;
    if child == 0 {
        let mut byte = [0_u8; 1];
        let _ = sys!(read(pipe[0], byte.as_mut_ptr().cast(), 1));
        let write = |file: &str, text: &str| fs::write(format!("/proc/{own}/{file}"), text).is_ok();
        let done = setgroups.is_none_or(|text| write("setgroups", text))
            && write("uid_map", maps[0])
            && write("gid_map", maps[1]);
        // SAFETY: it only ends.
        unsafe { libc::_exit(i32::from(!done)) };
    }
    sys!(unshare(libc::CLONE_NEWUSER))?;
    sys!(write(pipe[1], c"x".as_ptr().cast(), 1))?;
    let mut status = 0;
    sys!(waitpid(child, &raw mut status, 0))?;
    same("the end of the child", 0, status)?;
    for fd in pipe {
        sys!(close(fd))?;
    }
    Ok(())
}

/// Lets any user report in the place of the status file.
pub fn open_up(checkpoint: &Checkpoint) -> Verdict {
    let path = checkpoint.path("any");
    let directory = path.parent().expect("it is in a directory");
    fs::set_permissions(directory, fs::Permissions::from_mode(0o777)).map_err(|e| e.to_string())
}

/// What a process sees of its own ids, and of its namespace.
fn seen() -> Result<Vec<String>, String> {
    let read = |file: &str| {
        fs::read_to_string(format!("/proc/self/{file}")).map_err(|error| format!("{file}: {error}"))
    };
    let status = read("status")?;
    let keys = ["Uid:", "Gid:", "Groups:", "Cap", "NoNewPrivs:"];
    let mut seen: Vec<String> = status
        .lines()
        .filter(|line| keys.iter().any(|key| line.starts_with(key)))
        .map(str::to_owned)
        .collect();
    for file in ["uid_map", "gid_map", "setgroups"] {
        seen.push(read(file)?);
    }
    // SAFETY: the call takes numbers.
    let number = |option| unsafe { libc::prctl(option, 0, 0, 0, 0) };
    seen.push(format!("securebits {:x}", number(libc::PR_GET_SECUREBITS)));
    seen.push(format!("dumpable {}", number(libc::PR_GET_DUMPABLE)));
    Ok(seen)
}

/// A map of many ids, as of a container; processes of several users inside; files that are theirs; a
/// directory of a process, which a restore opens late.
fn user_namespace(checkpoint: &Checkpoint) -> Verdict {
    open_up(checkpoint)?;
    enter(["0 100000 1000\n1000 201000 64536\n", "0 300000 65536\n"], None)?;
    sys!(setgroups(2, [5, 7].as_ptr()))?;
    sys!(setresgid(0, 0, 0))?;
    sys!(setresuid(0, 0, 0))?;
    sys!(prctl(libc::PR_SET_DUMPABLE, 1))?;
    let mut file = tempfile()?;
    chown(format!("/proc/self/fd/{}", file.as_raw_fd()), Some(1234), Some(77))
        .map_err(|error| format!("chown: {error}"))?;
    file.write_all(b"of user 1234").map_err(|error| error.to_string())?;
    let mut pair = [0; 2];
    sys!(socketpair(libc::AF_UNIX, libc::SOCK_STREAM, 0, pair.as_mut_ptr()))?;
    let owners = |file: &File| -> Result<_, String> {
        let stat = file.metadata().map_err(|error| error.to_string())?;
        let link = fs::metadata(format!("/proc/self/fd/{}", pair[0])).map_err(|e| e.to_string())?;
        let mut peer = [0_u32; 3];
        let mut len = libc::socklen_t::try_from(size_of_val(&peer)).expect("12");
        let (at, len) = (peer.as_mut_ptr(), &raw mut len);
        sys!(getsockopt(pair[0], libc::SOL_SOCKET, libc::SO_PEERCRED, at.cast(), len))?;
        Ok((stat.uid(), stat.gid(), link.uid(), link.gid(), peer[1], peer[2]))
    };
    let before = (seen()?, owners(&file)?);
    same("owners", (1234, 77, 0, 0, 0, 0), before.1)?;
    let child = checkpoint.fork(move |child| {
        let groups = [8_u32, 9, 10];
        sys!(setgroups(groups.len(), groups.as_ptr()))?;
        sys!(setresgid(20, 21, 22))?;
        sys!(setresuid(1000, 1001, 1002))?;
        let before = seen()?;
        child.wait();
        same("the child", before, seen()?)
    })?;
    std::env::set_current_dir(format!("/proc/{}", std::process::id()))
        .map_err(|e| e.to_string())?;
    checkpoint.wait();
    same("the process", before, (seen()?, owners(&file)?))?;
    fs::read("comm").map_err(|error| format!("its directory: {error}"))?;
    child.join()?;
    // It still has the power over its namespace.
    sys!(setresgid(3, 3, 3))?;
    sys!(setresuid(65535, 65535, 65535))?;
    Ok(())
}

/// Opens a file without a name.
fn tempfile() -> Result<File, String> {
    let fd = sys!(open(c"/tmp".as_ptr(), libc::O_TMPFILE | libc::O_RDWR, 0o600))?;
    // SAFETY: it was just opened.
    Ok(unsafe { std::os::fd::FromRawFd::from_raw_fd(fd) })
}

/// As `unshare -r` makes it: only root, who cannot change its groups.
fn root_alone(checkpoint: &Checkpoint) -> Verdict {
    open_up(checkpoint)?;
    enter(["0 0 1\n", "0 0 1\n"], Some("deny"))?;
    let before = seen()?;
    checkpoint.wait();
    same("the process", before, seen()?)
}

/// Threads, whose pids only the machine can choose; a map without a root.
fn with_threads(checkpoint: &Checkpoint) -> Verdict {
    open_up(checkpoint)?;
    enter(["40 100040 10\n", "50 100050 10\n"], None)?;
    sys!(setgroups(0, std::ptr::null()))?;
    sys!(setresgid(51, 51, 51))?;
    sys!(setresuid(41, 41, 41))?;
    sys!(prctl(libc::PR_SET_DUMPABLE, 1))?;
    let before = seen()?;
    let mut threads = Vec::new();
    for _ in 0..3 {
        threads.push(checkpoint.thread(|thread| {
            let tid = gettid();
            thread.wait();
            same("the thread", tid, gettid())
        })?);
    }
    checkpoint.wait();
    same("the process", before, seen()?)?;
    threads.into_iter().try_for_each(Thread::join)
}

/// Refused: no user of the machine is one inside.
fn without_a_map(checkpoint: &Checkpoint) -> Verdict {
    sys!(unshare(libc::CLONE_NEWUSER))?;
    checkpoint.wait();
    Ok(())
}
