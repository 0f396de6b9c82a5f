//! Why a process cannot be stopped.

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

/// How one version of cgroups shows that a cgroup is frozen, and how to thaw it.
struct Freezer {
    /// The type of its file system.
    fs_type: &'static str,
    /// The mount option of the hierarchy that has the freezer.
    option: &'static str,
    /// The controller in `/proc/PID/cgroup`.
    controller: &'static [u8],
    /// The file with the state, and its lines for a frozen cgroup.
    state: (&'static str, &'static [&'static str]),
    /// The file that contains 1 if this cgroup itself, rather than an ancestor, was frozen.
    own: &'static str,
    /// The word to write to thaw it, and the file.
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

/// Checks that none of these cgroups is frozen: in some versions a process of a frozen cgroup can
/// be stopped, but it cannot make calls.
///
/// # Errors
/// [`InjectError::FrozenCgroup`].
/// [`InjectError::FrozenCgroup`].
pub(super) fn check_frozen(pid: HostPid, cgroups: &[Cgroup]) -> Result<()> {
    for freezer in &FREEZERS {
        let is_there = |(_, controllers, _): &&Cgroup| {
            controllers.split(|byte| *byte == b',').any(|name| name == freezer.controller)
        };
        let Some((_, _, path)) = cgroups.iter().find(is_there) else { continue };
        let path = String::from_utf8_lossy(path);
        // The root cgroup cannot be frozen.
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

/// Returns the mount point of a freezer's file system.
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
    let what = if waits { "it is in uninterruptible sleep" } else { "the machine may be slow" };
    InjectError::Lost { tid, what: format!("does not stop in time ({what}; see --timeout)") }
}

/// Whether a sleeping thread is in a call that creates a child and waits for it.
fn is_vfork(pid: HostPid, tid: HostPid) -> bool {
    let Ok(text) = proc::syscall(pid, tid) else { return false };
    let text = String::from_utf8_lossy(&text).into_owned();
    let mut words = text.split_whitespace();
    let number: i64 = words.next().and_then(|word| word.parse().ok()).unwrap_or(-1);
    let first =
        words.next().and_then(|word| i32::from_str_radix(word.strip_prefix("0x")?, 16).ok());
    waits_for_child(number, first)
}
