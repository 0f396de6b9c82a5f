//! Cgroups that are frozen, or are to be.
//!
//! A thread in a frozen cgroup can be stopped, but makes no call. So a dump thaws the cgroup while a
//! tracer has stopped all threads in it, and freezes it again before it lets them go.

use std::{
    fs::{self, OpenOptions},
    io::{self, Write},
    path::{Path, PathBuf},
};

use crate::{
    proc::{self, Cgroup, Mount},
    units::HostPid,
};

/// How one version of cgroups freezes.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Freezer {
    /// The controller in `/proc/PID/cgroup`.
    controller: &'static [u8],
    /// The file to write to, with the words that freeze and thaw.
    file: &'static str,
    frozen: &'static str,
    thawed: &'static str,
    /// The file that contains 1 if this cgroup itself, rather than an ancestor, was frozen.
    own: &'static str,
    /// The file that lists the threads.
    threads: &'static str,
}

static FREEZERS: [Freezer; 2] = [
    Freezer {
        controller: b"",
        file: "cgroup.freeze",
        frozen: "1",
        thawed: "0",
        own: "cgroup.freeze",
        threads: "cgroup.threads",
    },
    Freezer {
        controller: b"freezer",
        file: "freezer.state",
        frozen: "FROZEN",
        thawed: "THAWED",
        own: "freezer.self_freezing",
        threads: "tasks",
    },
];

/// A cgroup of a hierarchy that can freeze.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Freezable {
    directory: PathBuf,
    freezer: &'static Freezer,
}

impl Freezable {
    /// `hierarchy`: the controllers of the hierarchy, as `/proc/PID/cgroup` shows them. `None` if it
    /// cannot freeze.
    pub fn new(hierarchy: &[u8], directory: PathBuf) -> Option<Self> {
        let has = |freezer: &&Freezer| {
            hierarchy.split(|byte| *byte == b',').any(|name| name == freezer.controller)
        };
        let freezer = FREEZERS.iter().find(has)?;
        Some(Self { directory, freezer })
    }

    /// Returns its directory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Whether this cgroup itself, rather than one above, was frozen.
    pub fn is_frozen(&self) -> bool {
        fs::read(self.directory.join(self.freezer.own)).is_ok_and(|text| text.trim_ascii() == b"1")
    }

    /// Returns a shell command that thaws it.
    pub fn how_to_thaw(&self) -> String {
        format!("echo {} > {}", self.freezer.thawed, self.file().display())
    }

    fn file(&self) -> PathBuf {
        self.directory.join(self.freezer.file)
    }

    /// Returns the file and the text that freezes the cgroup when it is written there.
    pub(super) fn order(&self) -> (PathBuf, &'static str) {
        (self.file(), self.freezer.frozen)
    }

    /// Freezes it. The threads in it stop a little later.
    ///
    /// # Errors
    /// The errors of writing the file.
    pub fn freeze(&self) -> io::Result<()> {
        write(&self.file(), self.freezer.frozen)
    }

    /// Thaws it.
    ///
    /// # Errors
    /// The errors of writing the file.
    pub fn thaw(&self) -> io::Result<()> {
        write(&self.file(), self.freezer.thawed)
    }

    /// Returns this cgroup and those below it.
    fn with_those_below(&self) -> Vec<Self> {
        let mut found = vec![self.clone()];
        let mut next = 0;
        while next < found.len() {
            let entries = fs::read_dir(&found[next].directory).into_iter().flatten().flatten();
            let directories =
                entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
            let below = |entry: fs::DirEntry| Self { directory: entry.path(), ..self.clone() };
            found.extend(directories.map(below).collect::<Vec<_>>());
            next += 1;
        }
        found
    }

    /// Returns the threads in this cgroup and those below it.
    pub fn threads(&self) -> Vec<HostPid> {
        let lists = self.with_those_below().into_iter();
        let lists =
            lists.filter_map(|of| fs::read_to_string(of.directory.join(self.freezer.threads)).ok());
        let parse = |text: String| -> Vec<HostPid> {
            text.lines().filter_map(|line| Some(HostPid(line.parse().ok()?))).collect()
        };
        lists.flat_map(parse).filter(|tid| tid.0 > 0).collect()
    }
}

/// Writes to a file of a cgroup, which exists: `fs::write` would create one elsewhere.
fn write(path: &Path, text: &str) -> io::Result<()> {
    OpenOptions::new().write(true).open(path)?.write_all(text.as_bytes())
}

/// Returns the frozen cgroups that keep a process of the cgroups `of` from running: its own ones, and
/// those above; highest first.
pub(super) fn frozen_above(of: &[Cgroup]) -> Vec<Freezable> {
    let mut found = Vec::new();
    let mut mounts: Option<Vec<Mount>> = None;
    for (_, hierarchy, path) in of {
        // The root cgroup cannot be frozen.
        if path == b"/" || Freezable::new(hierarchy, PathBuf::new()).is_none() {
            continue;
        }
        let mounts = mounts.get_or_insert_with(|| proc::mounts().unwrap_or_default());
        let Ok(directory) = proc::cgroup_directory(hierarchy, path, mounts) else { continue };
        let above = directory.ancestors().map(Path::to_owned);
        let above = above.filter_map(|directory| Freezable::new(hierarchy, directory));
        let above = above.take_while(|group| group.directory.join(group.freezer.own).exists());
        found.extend(above.filter(Freezable::is_frozen));
    }
    found.sort();
    found
}

/// Returns those below the given cgroups, and these themselves, that were frozen; highest first.
pub(super) fn all_frozen(groups: &[Freezable]) -> Vec<Freezable> {
    let all = groups.iter().flat_map(Freezable::with_those_below);
    let mut frozen: Vec<_> = all.filter(Freezable::is_frozen).collect();
    frozen.sort();
    frozen.dedup();
    frozen
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_freezes_is_version_2_and_the_freezer_of_version_1() {
        let of = |hierarchy: &[u8]| Freezable::new(hierarchy, "/g".into());
        assert_eq!(of(b"").unwrap().order(), ("/g/cgroup.freeze".into(), "1"));
        assert_eq!(of(b"cpu,freezer").unwrap().how_to_thaw(), "echo THAWED > /g/freezer.state");
        assert_eq!(of(b"cpu"), None);
        assert_eq!(of(b"name=freezer"), None);
    }

    #[test]
    fn groups_below_and_their_threads_are_found() {
        let dir = tempfile::tempdir().unwrap();
        let inner = dir.path().join("a/b");
        fs::create_dir_all(&inner).unwrap();
        fs::write(dir.path().join("tasks"), "7\n8\n").unwrap();
        fs::write(inner.join("tasks"), "9\n0\n").unwrap();
        fs::write(inner.join("freezer.self_freezing"), "1\n").unwrap();
        let group = Freezable::new(b"freezer", dir.path().to_owned()).unwrap();
        assert_eq!(group.threads(), [HostPid(7), HostPid(8), HostPid(9)]);
        let frozen = all_frozen(std::slice::from_ref(&group));
        assert_eq!(frozen.iter().map(Freezable::directory).collect::<Vec<_>>(), [inner]);
    }
}
