//! The ids and the rights of a process.

use std::{fs, path::PathBuf, ptr};

use crate::{
    Row,
    kit::{Area, Checkpoint, Verdict, nap, same},
};

pub const ROWS: &[Row] = &[
    ("other_user", other_user),
    ("other_user_threads", other_user_threads),
    ("effective_user", effective_user),
    ("capabilities", capabilities),
    ("ambient_capabilities", ambient_capabilities),
    ("securebits", securebits),
    ("groups", groups),
    ("no_new_privs", no_new_privs),
    ("limits", limits),
    ("directory_and_umask", directory_and_umask),
    ("changed_root", changed_root),
    ("oom_score", oom_score),
    ("personality", personality),
    ("dumpable", dumpable),
    ("thp_disabled", thp_disabled),
    ("changed_arguments", changed_arguments),
    ("memory_layout", memory_layout),
];

const NOBODY: u32 = 65534;

fn text(path: &str) -> Result<String, String> {
    fs::read_to_string(path).map_err(|error| format!("{path}: {error}"))
}

/// The lines of the status file with the identity of the process.
fn credentials() -> Result<Vec<String>, String> {
    let text = text("/proc/self/status")?;
    let wanted = ["Uid:", "Gid:", "Groups:", "Cap", "NoNewPrivs:"];
    let lines = text.lines().filter(|line| wanted.iter().any(|word| line.starts_with(word)));
    Ok(lines.map(str::to_owned).collect())
}

/// Keeps what a function shows.
fn keep<T: PartialEq + std::fmt::Debug>(
    checkpoint: &Checkpoint,
    what: &str,
    read: impl Fn() -> Result<T, String>,
) -> Verdict {
    let before = read()?;
    checkpoint.wait();
    same(what, before, read()?)
}

fn become_nobody() -> Verdict {
    sys!(setgroups(0, ptr::null()))?;
    sys!(setresgid(NOBODY, NOBODY, NOBODY))?;
    sys!(setresuid(NOBODY, NOBODY, NOBODY)).map(drop)
}

fn other_user(checkpoint: &Checkpoint) -> Verdict {
    become_nobody()?;
    let area = Area::shared(4)?;
    area.fill(1);
    let child = checkpoint.fork(|child| {
        keep(child, "credentials of the child", credentials)?;
        area.verify("memory in the child", 1)
    })?;
    let dumpable = || sys!(prctl(libc::PR_GET_DUMPABLE));
    let before = (credentials()?, dumpable()?);
    checkpoint.wait();
    same("credentials, dumpable", before, (credentials()?, dumpable()?))?;
    area.verify("memory", 1)?;
    ensure!(sys!(setuid(0)).is_err(), "root again");
    child.join()
}

/// The signal by which the C library has each thread set its ids.
const SIGSETXID: i32 = 33;

/// Whether any thread of this process blocks a signal.
fn any_blocks(signal: i32) -> bool {
    fs::read_dir("/proc/self/task").into_iter().flatten().flatten().any(|task| {
        let text = fs::read_to_string(task.path().join("status")).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("SigBlk:"));
        let mask = line.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok());
        mask.is_none_or(|mask| mask >> (signal - 1) & 1 == 1)
    })
}

fn other_user_threads(checkpoint: &Checkpoint) -> Verdict {
    let mut threads = Vec::new();
    for _ in 0..3 {
        threads.push(checkpoint.thread(|thread| {
            thread.announce();
            thread.wait_go();
            // SAFETY: getuid has no preconditions.
            same("user of a thread", NOBODY, unsafe { libc::getuid() })?;
            ensure!(sys!(setuid(0)).is_err(), "root again");
            Ok(())
        })?);
    }
    // The C library sets the ids of all threads.
    become_nobody()?;
    sys!(prctl(libc::PR_SET_DUMPABLE, 1))?;
    super::kit::wait_until("the threads' return from that", || !any_blocks(SIGSETXID))?;
    let limits = libc::rlimit { rlim_cur: 100, rlim_max: 200 };
    sys!(setrlimit(libc::RLIMIT_NOFILE, &raw const limits))?;
    keep(checkpoint, "credentials, dumpable, limit", || {
        let mut found = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        sys!(getrlimit(libc::RLIMIT_NOFILE, &raw mut found))?;
        let found = (found.rlim_cur, found.rlim_max);
        Ok((credentials()?, sys!(prctl(libc::PR_GET_DUMPABLE))?, found))
    })?;
    threads.into_iter().try_for_each(super::kit::Thread::join)
}

fn effective_user(checkpoint: &Checkpoint) -> Verdict {
    sys!(setresgid(5, 6, 7))?;
    sys!(setresuid(0, 1000, 2000))?;
    keep(checkpoint, "credentials", credentials)
}

const CAP_CHOWN: u32 = 0;
const CAP_KILL: u32 = 5;
const CAP_NET_BIND_SERVICE: u32 = 10;
const CAP_SYS_CHROOT: u32 = 18;

/// Sets effective, permitted and inheritable capabilities by a function of
/// those that are permitted.
fn set_capabilities(choose: impl Fn(u64) -> [u64; 3]) -> Verdict {
    const VERSION: u32 = 0x2008_0522; // uapi/linux/capability.h: _LINUX_CAPABILITY_VERSION_3
    let header = [VERSION, 0];
    let mut data = [0_u32; 6];
    sys!(syscall(libc::SYS_capget, header.as_ptr(), data.as_mut_ptr()))?;
    let sets = choose(u64::from(data[1]) | u64::from(data[4]) << 32);
    for (at, set) in sets.into_iter().enumerate() {
        data[at] = set as u32;
        data[at + 3] = (set >> 32) as u32;
    }
    sys!(syscall(libc::SYS_capset, header.as_ptr(), data.as_ptr())).map(drop)
}

fn capabilities(checkpoint: &Checkpoint) -> Verdict {
    sys!(prctl(libc::PR_CAPBSET_DROP, CAP_SYS_CHROOT))?;
    set_capabilities(|permitted| {
        let permitted = permitted & !(1 << CAP_SYS_CHROOT);
        [permitted & !(1 << CAP_CHOWN), permitted, 1 << CAP_NET_BIND_SERVICE | 1 << CAP_KILL]
    })?;
    keep(checkpoint, "credentials", credentials)
}

fn ambient_capabilities(checkpoint: &Checkpoint) -> Verdict {
    sys!(prctl(libc::PR_SET_KEEPCAPS, 1))?;
    become_nobody()?;
    set_capabilities(|_| {
        let set = 1 << CAP_NET_BIND_SERVICE | 1 << CAP_KILL;
        [set, set, set]
    })?;
    let raise = libc::PR_CAP_AMBIENT_RAISE;
    sys!(prctl(libc::PR_CAP_AMBIENT, raise, CAP_NET_BIND_SERVICE, 0, 0))?;
    sys!(prctl(libc::PR_SET_DUMPABLE, 1))?;
    keep(checkpoint, "credentials", credentials)
}

fn securebits(checkpoint: &Checkpoint) -> Verdict {
    // uapi/linux/securebits.h: NOROOT, NO_SETUID_FIXUP and its lock.
    sys!(prctl(libc::PR_SET_SECUREBITS, 0b1101))?;
    keep(checkpoint, "securebits and credentials", || {
        Ok((sys!(prctl(libc::PR_GET_SECUREBITS))?, credentials()?))
    })
}

fn groups(checkpoint: &Checkpoint) -> Verdict {
    let groups: Vec<u32> = (0..300).map(|at| 10_000 + at * 3).collect();
    sys!(setgroups(groups.len(), groups.as_ptr()))?;
    keep(checkpoint, "groups", || {
        let mut found = vec![0; 400];
        let count = sys!(getgroups(400, found.as_mut_ptr()))?;
        found.truncate(count as usize);
        Ok(found)
    })
}

fn no_new_privs(checkpoint: &Checkpoint) -> Verdict {
    let child = checkpoint.fork(|child| {
        sys!(prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))?;
        keep(child, "no_new_privs in the child", || {
            sys!(prctl(libc::PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0))
        })
    })?;
    keep(checkpoint, "no_new_privs", || sys!(prctl(libc::PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0)))?;
    child.join()
}

fn limits(checkpoint: &Checkpoint) -> Verdict {
    let rows = [
        (libc::RLIMIT_CORE, 0, 1 << 20),
        (libc::RLIMIT_NOFILE, 123, 345),
        (libc::RLIMIT_STACK, 4 << 20, 16 << 20),
        (libc::RLIMIT_CPU, 5000, 6000),
        (libc::RLIMIT_FSIZE, 1 << 30, 1 << 31),
        (libc::RLIMIT_AS, 1 << 36, 1 << 37),
        (libc::RLIMIT_MEMLOCK, 1 << 16, 1 << 16),
        (libc::RLIMIT_SIGPENDING, 100, 1000),
        (libc::RLIMIT_NICE, 0, 0),
    ];
    for (resource, soft, hard) in rows {
        let limit = libc::rlimit { rlim_cur: soft, rlim_max: hard };
        // Raising a limit may be forbidden here; lowering never is.
        let _ = sys!(setrlimit(resource, &raw const limit));
    }
    let child = checkpoint.fork(|child| {
        let limit = libc::rlimit { rlim_cur: 20, rlim_max: 30 };
        sys!(setrlimit(libc::RLIMIT_NOFILE, &raw const limit))?;
        keep(child, "limits of the child", || text("/proc/self/limits"))
    })?;
    keep(checkpoint, "limits", || text("/proc/self/limits"))?;
    child.join()
}

fn directory_and_umask(checkpoint: &Checkpoint) -> Verdict {
    let path = checkpoint.path("directory");
    fs::create_dir(&path).map_err(|error| error.to_string())?;
    std::env::set_current_dir(&path).map_err(|error| error.to_string())?;
    // SAFETY: umask has no preconditions.
    unsafe { libc::umask(0o137) };
    let child = checkpoint.fork(|child| {
        sys!(chdir(c"/".as_ptr()))?;
        child.wait();
        let found = std::env::current_dir().map_err(|error| error.to_string())?;
        same("directory of the child", PathBuf::from("/"), found)
    })?;
    checkpoint.wait();
    let found = std::env::current_dir().map_err(|error| error.to_string())?;
    same("directory", path, found)?;
    // SAFETY: as above.
    same("umask", 0o137, unsafe { libc::umask(0) })?;
    child.join()
}

fn changed_root(checkpoint: &Checkpoint) -> Verdict {
    let path = checkpoint.path("root");
    fs::create_dir_all(path.join("inside")).map_err(|error| error.to_string())?;
    fs::write(path.join("inside/file"), "in the new root").map_err(|error| error.to_string())?;
    let root = checkpoint.c_path("root");
    let pid = sys!(fork())?;
    if pid == 0 {
        let verdict = crate::judged(|| {
            sys!(chroot(root.as_ptr()))?;
            sys!(chdir(c"/inside".as_ptr()))?;
            // The protocol's files are out of sight: the parent says when.
            let fd = sys!(open(c"file".as_ptr(), libc::O_RDONLY))?;
            // SAFETY: the path is terminated. Without a message each time, which takes memory.
            while unsafe { libc::access(c"/go".as_ptr(), libc::F_OK) } != 0 {
                nap(2);
            }
            let mut here = [0_u8; 64];
            // SAFETY: the buffer outlives the call.
            let cwd = unsafe { libc::getcwd(here.as_mut_ptr().cast(), 64) };
            ensure!(!cwd.is_null(), "no current directory");
            same("directory inside", &b"/inside\0"[..], &here[..8])?;
            let bytes = super::kit::read_some(fd, 100)?;
            same("file inside", &b"in the new root"[..], &bytes[..])
        });
        let _ = fs::write("/verdict", format!("{verdict:?}"));
        // SAFETY: nothing needs to be unwound.
        unsafe { libc::_exit(i32::from(verdict.is_err())) };
    }
    super::kit::wait_until("the child in its new root", || {
        fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd.ends_with("inside"))
    })?;
    super::kit::wait_blocked(pid, libc::SYS_clock_nanosleep)?;
    checkpoint.wait();
    fs::write(path.join("go"), "").map_err(|error| error.to_string())?;
    let mut status = 0;
    sys!(waitpid(pid, &raw mut status, 0))?;
    let verdict = fs::read_to_string(path.join("verdict")).unwrap_or_default();
    ensure!(status == 0, "the child in the new root: status {status:#x}, {verdict}");
    Ok(())
}

fn oom_score(checkpoint: &Checkpoint) -> Verdict {
    let child = checkpoint.fork(|child| {
        fs::write("/proc/self/oom_score_adj", "700").map_err(|error| error.to_string())?;
        keep(child, "oom score of the child", || text("/proc/self/oom_score_adj"))
    })?;
    fs::write("/proc/self/oom_score_adj", "500").map_err(|error| error.to_string())?;
    keep(checkpoint, "oom score", || text("/proc/self/oom_score_adj"))?;
    child.join()
}

fn personality(checkpoint: &Checkpoint) -> Verdict {
    let flags = (libc::ADDR_NO_RANDOMIZE | libc::UNAME26) as libc::c_ulong;
    sys!(personality(flags))?;
    keep(checkpoint, "personality", || sys!(personality(0xffff_ffff)))
}

fn dumpable(checkpoint: &Checkpoint) -> Verdict {
    sys!(prctl(libc::PR_SET_DUMPABLE, 0))?;
    keep(checkpoint, "dumpable", || sys!(prctl(libc::PR_GET_DUMPABLE)))
}

fn thp_disabled(checkpoint: &Checkpoint) -> Verdict {
    sys!(prctl(libc::PR_SET_THP_DISABLE, 1, 0, 0, 0))?;
    keep(checkpoint, "huge pages disabled", || sys!(prctl(libc::PR_GET_THP_DISABLE, 0, 0, 0, 0)))
}

fn changed_arguments(checkpoint: &Checkpoint) -> Verdict {
    sys!(prctl(libc::PR_SET_NAME, c"renamed (prog".as_ptr()))?;
    // As servers do it: write over the arguments where the kernel put them.
    let stat = text("/proc/self/stat")?;
    let after_name = &stat[stat.rfind(')').unwrap_or(0) + 2..];
    let fields: Vec<&str> = after_name.split(' ').collect();
    let at: usize = fields[45].parse().map_err(|_| format!("no arg_start: {stat}"))?;
    let title = b"a changed title\0";
    // SAFETY: the arguments of the process are longer than that, and are not read any more.
    unsafe {
        ptr::copy_nonoverlapping(title.as_ptr(), ptr::with_exposed_provenance_mut(at), title.len())
    };
    // SAFETY: no other thread reads the environment.
    unsafe { std::env::set_var("LATER", "value") };
    keep(checkpoint, "name, arguments, environment, auxiliary vector", || {
        let bytes = |path| fs::read(path).map_err(|error| format!("{path}: {error}"));
        Ok((
            text("/proc/self/comm")?,
            bytes("/proc/self/cmdline")?,
            bytes("/proc/self/environ")?,
            bytes("/proc/self/auxv")?,
            fs::read_link("/proc/self/exe").map_err(|error| error.to_string())?,
            std::env::var("LATER").unwrap_or_default(),
        ))
    })
}

/// The addresses the kernel keeps of a process's memory.
fn memory_layout(checkpoint: &Checkpoint) -> Verdict {
    keep(checkpoint, "addresses in /proc/self/stat", || {
        let stat = text("/proc/self/stat")?;
        let after_name = &stat[stat.rfind(')').unwrap_or(0) + 2..];
        let fields: Vec<&str> = after_name.split(' ').collect();
        // Code, stack begin; data, brk, arguments, environment.
        Ok([&fields[23..26], &fields[42..49]].concat().join(" "))
    })
}
