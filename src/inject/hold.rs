//! What keeps a process from being stopped.

use std::{
    fs,
    path::{Path, PathBuf},
};

use super::{InjectError, Result};
use crate::{
    arch::native::waits_for_child,
    proc::{self, Cgroup},
    units::HostPid,
};

/// How a version of cgroups tells that one is frozen, and is told to let it go on.
struct Freezer {
    /// The type of its file system.
    fs_type: &'static str,
    /// What that is mounted with.
    option: &'static str,
    /// The controller in `/proc/PID/cgroup`.
    controller: &'static [u8],
    /// The file that shows the state, with what is in it of a cgroup that is frozen.
    state: (&'static str, &'static [&'static str]),
    /// The file that says that this very cgroup is to be frozen: it is 1 then.
    own: &'static str,
    /// What thaws it: a word and a file.
    thaw: (&'static str, &'static str),
}

const FREEZERS: [Freezer; 2] = [
    Freezer {
        fs_type: "cgroup2",
        option: "",
        controller: b"",
        state: ("cgroup.events", &["frozen 1"]),
        own: "cgroup.freeze",
        thaw: ("0", "cgroup.freeze"),
    },
    Freezer {
        fs_type: "cgroup",
        option: "freezer",
        controller: b"freezer",
        state: ("freezer.state", &["FROZEN", "FREEZING"]),
        own: "freezer.self_freezing",
        thaw: ("THAWED", "freezer.state"),
    },
];

/// Checks that a process in these cgroups is not frozen: it could be stopped in some of
/// them, but not work.
///
/// # Errors
/// [`InjectError::FrozenCgroup`].
pub(super) fn check_frozen(pid: HostPid, cgroups: &[Cgroup]) -> Result<()> {
    for freezer in &FREEZERS {
        let is_there = |(_, controllers, _): &&Cgroup| {
            controllers.split(|byte| *byte == b',').any(|name| name == freezer.controller)
        };
        let Some((_, _, path)) = cgroups.iter().find(is_there) else { continue };
        let path = String::from_utf8_lossy(path);
        // Every process is in some cgroup, and the root cannot be frozen.
        if path == "/" {
            continue;
        }
        let Some(top) = mount_of(freezer) else { continue };
        let dir = top.join(path.trim_start_matches('/'));
        let (file, frozen) = freezer.state;
        let state = fs::read_to_string(dir.join(file)).unwrap_or_default();
        if !state.lines().any(|line| frozen.contains(&line)) {
            continue;
        }
        let is_own = |dir: &&Path| {
            fs::read_to_string(dir.join(freezer.own)).is_ok_and(|text| text.trim() == "1")
        };
        let cgroup = dir.ancestors().take_while(|dir| *dir != top).find(is_own).unwrap_or(&dir);
        let (word, file) = freezer.thaw;
        return Err(InjectError::FrozenCgroup {
            pid,
            cgroup: cgroup.to_owned(),
            thaw: format!("echo {word} > {}", cgroup.join(file).display()),
        });
    }
    Ok(())
}

/// Returns where the file system of a freezer is mounted.
fn mount_of(freezer: &Freezer) -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
    mounts.lines().find_map(|line| {
        let mut words = line.split(' ').skip(1);
        let (place, fs_type, options) = (words.next()?, words.next()?, words.next()?);
        let has = freezer.option.is_empty() || options.split(',').any(|o| o == freezer.option);
        (fs_type == freezer.fs_type && has).then(|| place.into())
    })
}

/// Returns why a thread does not stop.
pub(super) fn why_running(pid: HostPid, tid: HostPid) -> InjectError {
    if let Ok(cgroups) = proc::thread_cgroups(pid, tid)
        && let Err(frozen) = check_frozen(pid, &cgroups)
    {
        return frozen;
    }
    let waits = proc::thread_stat(pid, tid).is_ok_and(|stat| stat.state == 'D');
    if waits && is_vfork(pid, tid) {
        return InjectError::Vfork { tid };
    }
    let what = if waits { "it waits for a device" } else { "the machine may be slow" };
    InjectError::Lost { tid, what: format!("does not stop in time ({what}; see --timeout)") }
}

/// Whether a thread that sleeps does so in a call that makes a process and waits for it.
fn is_vfork(pid: HostPid, tid: HostPid) -> bool {
    let Ok(text) = proc::syscall(pid, tid) else { return false };
    let text = String::from_utf8_lossy(&text).into_owned();
    let mut words = text.split_whitespace();
    let number: i64 = words.next().and_then(|word| word.parse().ok()).unwrap_or(-1);
    let first =
        words.next().and_then(|word| i32::from_str_radix(word.strip_prefix("0x")?, 16).ok());
    waits_for_child(number, first)
}
