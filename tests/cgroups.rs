//! Trees in cgroups of their own: put back where these are, refused where they are not.
//!
//! On this machine's hierarchies, whatever they are: those of version 1 with a controller
//! each, that of version 2, or both. All of it needs root.

mod common;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Output,
};

use common::{
    Cap,
    live::{Live, directory, engine, state_of, wait_for, workload},
    require,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use rcriu::image::{Kind, proto, read_all};

/// A cgroup, removed at the end.
struct Group(PathBuf);

impl Group {
    /// Makes one in a hierarchy by the name of its controller; empty for version 2. `None`
    /// if that is not mounted.
    fn new(controller: &str, name: &str) -> Option<Self> {
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let point = table.lines().find_map(|line| {
            let (place, kind) = line.split_once(" - ")?;
            let words: Vec<_> = kind.split(' ').collect();
            let is_it = match controller {
                "" => words[0] == "cgroup2",
                _ => words[0] == "cgroup" && words[2].split(',').any(|word| word == controller),
            };
            is_it.then(|| place.split(' ').nth(4).unwrap().to_owned())
        })?;
        let path = Path::new(&point).join(format!("rcriu-test-{}-{name}", std::process::id()));
        fs::create_dir(&path).unwrap();
        Some(Self(path))
    }

    fn below(&self, name: &str) -> Self {
        let path = self.0.join(name);
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    fn write(&self, file: &str, text: &str) {
        let path = self.0.join(file);
        fs::write(&path, text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    }

    fn procs(&self) -> Vec<i32> {
        let text = fs::read_to_string(self.0.join("cgroup.procs")).unwrap();
        text.lines().map(|line| line.parse().unwrap()).collect()
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let begin = std::time::Instant::now();
        while fs::remove_dir(&self.0).is_err() && begin.elapsed() < common::live::PATIENCE {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    }
}

fn place(pid: i32, tid: i32) -> String {
    fs::read_to_string(format!("/proc/{pid}/task/{tid}/cgroup")).unwrap()
}

fn places(live: &mut Live) -> Vec<(i32, i32, String)> {
    let mut found = Vec::new();
    for pid in live.tree() {
        for task in fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten() {
            let tid = task.file_name().into_string().unwrap().parse().unwrap();
            found.push((pid, tid, place(pid, tid)));
        }
    }
    found.sort();
    found
}

/// Dumps and restores a tree; each thread is in its cgroups again.
fn come_back(live: &mut Live) {
    let before = places(live);
    live.dump(&[]);
    live.restore(&[]);
    assert_eq!(before, places(live));
}

fn words(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn privileged_a_tree_comes_back_into_its_cgroups() {
    require(Cap::Ptrace);
    let mut live = Live::workload("tree");
    let mut pids = live.tree();
    pids.sort_unstable();
    let mut groups = Vec::new();
    for controller in ["memory", "pids", "name=systemd", ""] {
        let Some(group) = Group::new(controller, "tree") else { continue };
        // All but the root, one of them in a group below.
        for pid in &pids[1..] {
            group.write("cgroup.procs", &pid.to_string());
        }
        let below = group.below("inner");
        below.write("cgroup.procs", &pids[2].to_string());
        groups.push(below);
        groups.push(group);
    }
    assert!(!groups.is_empty(), "this test needs a hierarchy of cgroups that is mounted");
    come_back(&mut live);
    live.verdict();
}

/// A root in a group of its own takes its children along; one of them is elsewhere.
#[test]
fn privileged_children_come_back_out_of_the_cgroup_of_their_parent() {
    require(Cap::Ptrace);
    let mut live = Live::workload("tree");
    let groups: Vec<_> = ["freezer", ""].iter().filter_map(|c| Group::new(c, "root")).collect();
    for group in &groups {
        group.write("cgroup.procs", &live.root.to_string());
    }
    come_back(&mut live);
    for group in &groups {
        assert_eq!(group.procs(), [live.root.as_raw()]);
    }
    live.verdict();
}

/// What is charged to the group is the memory of the process, not what is left of it.
#[test]
fn privileged_memory_is_charged_to_the_cgroup() {
    require(Cap::Ptrace);
    let Some(group) = Group::new("memory", "charged") else {
        eprintln!("no memory cgroup of version 1 here");
        return;
    };
    let mut live = Live::workload("private_anon");
    group.write("cgroup.procs", &live.root.to_string());
    live.dump(&[]);
    live.restore(&[]);
    let used = fs::read_to_string(group.0.join("memory.usage_in_bytes")).unwrap();
    let used: u64 = used.trim().parse().unwrap();
    assert!(used >= 64 << 10, "{used} bytes are charged to the cgroup of the restored process");
    live.verdict();
}

#[test]
fn privileged_threads_come_back_into_cgroups_of_their_own() {
    require(Cap::Ptrace);
    let mut live = Live::workload("threads");
    let pid = live.root.as_raw();
    let tid = fs::read_dir(format!("/proc/{pid}/task"))
        .unwrap()
        .flatten()
        .filter_map(|task| task.file_name().into_string().unwrap().parse::<i32>().ok())
        .max()
        .unwrap();
    let mut groups = Vec::new();
    if let Some(group) = Group::new("cpu", "thread") {
        group.write("tasks", &tid.to_string());
        groups.push(group);
    }
    if let Some(group) = Group::new("", "thread") {
        let below = group.below("inner");
        below.write("cgroup.type", "threaded");
        group.write("cgroup.procs", &pid.to_string());
        below.write("cgroup.threads", &tid.to_string());
        groups.push(below);
        groups.push(group);
    }
    assert!(!groups.is_empty(), "this test needs a hierarchy of cgroups that is mounted");
    come_back(&mut live);
    live.verdict();
    live.wait_gone();
}

/// Refused by name before any process is made, unless cgroups are ignored.
#[test]
fn privileged_a_cgroup_that_is_gone_is_named() {
    require(Cap::Ptrace);
    for controller in ["memory", ""] {
        let mut live = Live::workload("tree");
        let Some(group) = Group::new(controller, "gone") else { continue };
        group.write("cgroup.procs", &live.root.to_string());
        live.dump(&[]);
        let path = group.0.file_name().unwrap().to_str().unwrap().to_owned();
        drop(group);
        let output = live.try_restore(&[]);
        assert!(!output.status.success());
        let said = words(&output);
        assert!(
            said.contains(&path) && said.contains("does not exist\n  help: create it again"),
            "{said}"
        );
        live.restore(&["--manage-cgroups=ignore"]);
        assert_eq!(place(live.root.as_raw(), live.root.as_raw()), own_place());
        live.verdict();
    }
}

/// What a tree writes during a live dump takes memory. If its cgroup has no more, the kernel kills what
/// the dump has there, not the tree.
#[test]
fn privileged_a_live_dump_ends_before_the_tree_lacks_memory() {
    /// What the tree writes, half of it private memory.
    const WRITTEN_BYTES: u64 = 48 << 20;
    /// Less than that.
    const LEFT_BYTES: u64 = 6 << 20;
    require(Cap::Ptrace);
    let Some(group) = Group::new("memory", "live") else {
        eprintln!("no memory cgroup of version 1 here");
        return;
    };
    let dir = directory();
    let (status, procs) = (dir.path().join("status"), group.0.join("cgroup.procs"));
    let start = "echo $$ >\"$0\"; exec \"$@\"";
    let words = [
        "-c",
        start,
        procs.to_str().unwrap(),
        workload().to_str().unwrap(),
        "ordered_writes",
        status.to_str().unwrap(),
    ];
    let mut live = Live::program("sh", &words, dir);
    live.wait_ready();
    let used = || -> u64 {
        let text = fs::read_to_string(group.0.join("memory.usage_in_bytes")).unwrap();
        text.trim().parse().unwrap()
    };
    wait_for("all memory to be written", || used() > WRITTEN_BYTES);
    group.write("memory.limit_in_bytes", &(used() + LEFT_BYTES).to_string());
    live.tree();
    let images = live.images();
    fs::create_dir(&images).unwrap();
    // It stops when the tree has run on.
    let mut dump = std::process::Command::new(engine())
        .args(["dump", "-R", "--live", "-t", &live.root.to_string(), "-D"])
        .arg(&images)
        .env("RCRIU_FAULT", "live-released:stop")
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let front = i32::try_from(dump.id()).unwrap();
    let mut worker = None;
    wait_for("the dump to stop", || {
        assert_eq!(dump.try_wait().unwrap(), None, "it did not come that far");
        let path = format!("/proc/{front}/task/{front}/children");
        worker = fs::read_to_string(path).unwrap().trim().parse().ok();
        worker.is_some_and(|pid| state_of(pid) == Some('T'))
    });
    let events = || fs::read_to_string(group.0.join("memory.oom_control")).unwrap();
    wait_for("the kernel to kill a process", || !events().contains("oom_kill 0"));
    kill(Pid::from_raw(worker.unwrap()), Signal::SIGCONT).unwrap();
    let output = dump.wait_with_output().unwrap();
    let said = self::words(&output);
    assert!(said.contains("that --live reads was killed; the tree runs on"), "{said}");
    assert!(!images.join("inventory.img").exists());
    live.verdict();
}

fn own_place() -> String {
    let own = Pid::this().as_raw();
    place(own, own)
}

#[test]
fn privileged_a_frozen_cgroup_is_named() {
    require(Cap::Ptrace);
    for (controller, file, frozen, thawed) in
        [("freezer", "freezer.state", "FROZEN", "THAWED"), ("", "cgroup.freeze", "1", "0")]
    {
        let mut live = Live::workload("tree");
        let Some(group) = Group::new(controller, "frozen") else { continue };
        group.write("cgroup.procs", &live.root.to_string());
        live.dump(&[]);
        group.write(file, frozen);
        wait_for("the frozen group", || {
            fs::read_to_string(group.0.join(file)).unwrap().trim() == frozen
        });
        let output = live.try_restore(&["--manage-cgroups=none"]);
        let said = words(&output);
        assert!(
            !output.status.success() && said.contains("is frozen\n  help: thaw it (echo"),
            "{said}"
        );
        group.write(file, thawed);
        live.restore(&[]);
        live.verdict();
    }
}

/// A version of cgroups that freezes: its controller, the file, and the words that freeze and thaw.
type Freezer = (&'static str, &'static str, [&'static str; 2]);

const FREEZERS: [Freezer; 2] =
    [("freezer", "freezer.state", ["FROZEN", "THAWED"]), ("", "cgroup.freeze", ["1", "0"])];

/// A frozen group with a workload, and one above it with a process that is not of the tree.
struct Cold {
    live: Live,
    other: std::process::Child,
    /// The tree's, and the one above.
    groups: [Group; 2],
    freezer: Freezer,
}

impl Cold {
    fn new(freezer: Freezer, name: &str) -> Option<Self> {
        let mut live = Live::workload("tree");
        let above = Group::new(freezer.0, name)?;
        let own = above.below("own");
        for pid in live.tree() {
            own.write("cgroup.procs", &pid.to_string());
        }
        // It writes as long as it runs.
        let lines = fs::File::create(live.path("lines")).unwrap();
        let loops = ["-c", "while :; do echo; read -t 0.001 a <> <(:); done"];
        let other = std::process::Command::new("bash").args(loops).stdout(lines).spawn().unwrap();
        above.write("cgroup.procs", &other.id().to_string());
        Some(Self { live, other, groups: [own, above], freezer })
    }

    /// Freezes the tree's group, or the one above.
    fn freeze(&self, which: usize) {
        self.groups[which].write(self.freezer.1, self.freezer.2[0]);
        self.wait_frozen(which);
    }

    fn thaw(&self, which: usize) {
        self.groups[which].write(self.freezer.1, self.freezer.2[1]);
    }

    fn is_frozen(&self, which: usize) -> bool {
        let text = fs::read_to_string(self.groups[which].0.join(match self.freezer.0 {
            "" => "cgroup.events",
            _ => "freezer.state",
        }));
        text.unwrap().lines().any(|line| line == "frozen 1" || line == "FROZEN")
    }

    fn wait_frozen(&self, which: usize) {
        wait_for("the frozen group", || self.is_frozen(which));
    }

    fn lines(&self) -> u64 {
        fs::metadata(self.live.path("lines")).unwrap().len()
    }

    /// No program traces the processes, and the process outside of the tree has not run.
    fn assert_cold(&mut self, which: usize, lines: u64) {
        self.wait_frozen(which);
        let mut pids = self.live.tree();
        pids.push(self.other.id().cast_signed());
        for pid in pids {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
            assert!(status.contains("TracerPid:\t0\n"), "{pid}: {status}");
        }
        assert_eq!(self.lines(), lines, "the other process has run");
    }

    /// After it is thawed, the other process runs.
    fn assert_warm(&self, lines: u64) {
        wait_for("the other process", || self.lines() > lines);
    }
}

impl Drop for Cold {
    fn drop(&mut self) {
        for which in [0, 1] {
            let _ = fs::write(self.groups[which].0.join(self.freezer.1), self.freezer.2[1]);
        }
        self.other.kill().unwrap();
        self.other.wait().unwrap();
    }
}

/// A dump thaws the cgroup for a moment in which only the tree runs, and only for rcriu.
#[test]
fn privileged_a_frozen_tree_is_dumped_and_stays_frozen() {
    require(Cap::Ptrace);
    for (freezer, which) in FREEZERS.into_iter().flat_map(|of| [(of, 0), (of, 1)]) {
        let Some(mut cold) = Cold::new(freezer, "stays") else { continue };
        cold.freeze(1);
        if which == 0 {
            // The one above as well, at first.
            cold.freeze(0);
            cold.thaw(1);
            cold.wait_frozen(0);
            cold.assert_warm(cold.lines());
        }
        let lines = cold.lines();
        cold.live.dump_running(&[]);
        cold.wait_frozen(which);
        if which == 1 {
            cold.assert_cold(1, lines);
        }
        let said = words(&cold.live.try_dump(&["-R", "--live"]));
        assert!(said.contains("is frozen, so the tree would not run during the dump"), "{said}");
        cold.wait_frozen(which);
        assert!(cold.live.try_run("pre-dump", &[]).status.success());
        for (fault, killed) in [("dump-frozen", false), ("dump-injected", false)] {
            cold.live.fault = Some(fault.to_owned());
            assert_ne!(cold.live.try_dump(&[]).status.success(), !killed);
            cold.wait_frozen(which);
        }
        if which == 1 {
            cold.assert_cold(1, lines);
        }
        cold.live.fault = None;
        cold.thaw(which);
        cold.assert_warm(lines);
        cold.live.verdict();
        cold.live.wait_gone();
    }
}

/// The supervisor freezes the cgroup again, and says that it was thawed.
#[test]
fn privileged_a_killed_dump_leaves_a_frozen_tree_frozen() {
    require(Cap::Ptrace);
    for freezer in FREEZERS {
        for fault in ["dump-frozen:kill", "dump-injected:kill", "dump-files:kill"] {
            let Some(mut cold) = Cold::new(freezer, "killed") else { continue };
            cold.freeze(1);
            cold.live.fault = Some(fault.to_owned());
            let said = words(&cold.live.try_dump(&[]));
            assert!(said.contains("was killed by SIGKILL"), "{said}");
            assert!(said.contains("ran for a moment"), "{said}");
            cold.assert_cold(1, cold.lines());
            cold.thaw(1);
            cold.live.verdict();
            cold.live.wait_gone();
        }
    }
}

/// The cgroup stays frozen when the tree is gone; or it is gone as well.
#[test]
fn privileged_a_tree_that_was_frozen_is_restored_frozen() {
    require(Cap::Ptrace);
    for (freezer, mode) in FREEZERS.into_iter().flat_map(|of| [(of, "none"), (of, "soft")]) {
        let Some(mut cold) = Cold::new(freezer, "restored") else { continue };
        let pids = cold.live.tree().len();
        cold.freeze(0);
        let lines = cold.lines();
        cold.live.dump(&[]);
        assert!(cold.groups[0].procs().is_empty());
        if mode == "soft" {
            fs::remove_dir(&cold.groups[0].0).unwrap();
        } else {
            // A restore that fails leaves it frozen.
            let state = |cold: &Cold| value(&cold.groups[0].0, cold.freezer.1);
            let before = state(&cold);
            cold.live.fault = Some("restore-last".to_owned());
            assert!(!cold.live.try_restore(&[]).status.success());
            cold.live.fault = None;
            assert_eq!(state(&cold), before);
            assert_eq!(before, cold.freezer.2[0]);
        }
        cold.live.restore(&[&format!("--manage-cgroups={mode}")]);
        cold.wait_frozen(0);
        assert!(!cold.is_frozen(1));
        assert_eq!(cold.groups[0].procs().len(), pids);
        cold.assert_warm(lines);
        // It does not run: it would give its verdict.
        fs::write(cold.live.path("status.go"), "").unwrap();
        std::thread::sleep(std::time::Duration::from_millis(50));
        assert_eq!(fs::read_to_string(cold.live.path("status")).unwrap(), "ready\n");
        cold.thaw(0);
        cold.live.verdict();
        cold.live.wait_gone();
    }
}

/// A process that came meanwhile would be frozen with the tree. Without properties, the cgroup stays as it is:
/// container runtimes freeze a container for the dump only.
#[test]
fn privileged_other_processes_are_not_frozen_with_a_restored_tree() {
    require(Cap::Ptrace);
    for freezer in FREEZERS {
        let Some(mut cold) = Cold::new(freezer, "shared") else { continue };
        cold.freeze(0);
        cold.live.dump(&[]);
        cold.thaw(0);
        cold.groups[0].write("cgroup.procs", &cold.other.id().to_string());
        let said = words(&cold.live.try_restore(&["--manage-cgroups=full"]));
        assert!(said.contains(&format!("another process ({})", cold.other.id())), "{said}");
        cold.live.restore(&["--manage-cgroups=soft"]);
        assert!(!cold.is_frozen(0));
        cold.live.verdict();
        cold.live.wait_gone();
    }
}

/// A dump that ignores cgroups does not record them.
#[test]
fn privileged_ignored_cgroups_are_not_recorded() {
    require(Cap::Ptrace);
    let mut live = Live::workload("tree");
    let Some(group) = Group::new("memory", "ignored").or_else(|| Group::new("", "ignored")) else {
        panic!("this test needs a hierarchy of cgroups that is mounted");
    };
    group.write("cgroup.procs", &live.root.to_string());
    live.dump(&["--manage-cgroups=ignore"]);
    assert!(!live.images().join("cgroup.img").exists());
    drop(group);
    live.restore(&[]);
    live.verdict();
}

/// Returns groups with a limit each, the file with the limit, and the limit; one below another, where
/// version 2 has the controller.
fn limited(name: &str) -> Vec<(Group, &'static str, &'static str)> {
    let limits = [
        ("pids", "pids.max", "77"),
        ("memory", "memory.soft_limit_in_bytes", "1073741824"),
        ("cpu", "cpu.shares", "512"),
        ("cpuset", "cpuset.cpus", "0"),
        ("", "cgroup.max.depth", "7"),
    ];
    let mut found = Vec::new();
    for (controller, file, value) in limits {
        let Some(group) = Group::new(controller, name) else { continue };
        if controller == "cpuset" {
            group.write("cpuset.mems", "0");
        }
        group.write(file, value);
        found.push((group, file, value));
    }
    assert!(!found.is_empty(), "this test needs a hierarchy of cgroups that is mounted");
    found
}

fn value(path: &Path, file: &str) -> String {
    fs::read_to_string(path.join(file)).unwrap_or_default().trim().to_owned()
}

/// Makes the groups that are gone, with their limits, and those below that are empty.
#[test]
fn privileged_groups_that_are_gone_are_made_with_their_properties() {
    require(Cap::Ptrace);
    for mode in ["--manage-cgroups", "--manage-cgroups=full", "--manage-cgroups=strict"] {
        let mut live = Live::workload("tree");
        let groups = limited("made");
        let pids = live.tree();
        let mut below = Vec::new();
        for (group, ..) in &groups {
            below.push(group.below("empty"));
            for pid in &pids {
                group.write("cgroup.procs", &pid.to_string());
            }
        }
        live.dump(&[]);
        let paths: Vec<_> = groups.iter().map(|(group, ..)| group.0.clone()).collect();
        drop(below);
        for (group, ..) in &groups {
            fs::remove_dir(&group.0).unwrap();
        }
        // A failure leaves none of them.
        live.fault = Some("restore-last".to_owned());
        assert!(!live.try_restore(&[mode]).status.success());
        live.fault = None;
        live.wait_gone();
        for path in &paths {
            assert!(!path.exists(), "{}", path.display());
        }
        live.restore(&[mode]);
        let _below: Vec<_> = paths.iter().map(|path| Group(path.join("empty"))).collect();
        for (group, file, wanted) in &groups {
            assert_eq!(value(&group.0, file), *wanted, "{mode}: {file}");
            assert!(group.0.join("empty").is_dir());
            assert_eq!(group.procs().len(), pids.len());
        }
        live.verdict();
        live.wait_gone();
    }
}

/// A restore that was killed leaves groups; the next one finds that they are its own, in any mode.
#[test]
fn privileged_groups_of_a_killed_restore_are_used_by_the_next() {
    require(Cap::Ptrace);
    for mode in ["soft", "strict"] {
        let mut live = Live::workload("private_anon");
        let Some(group) = Group::new("pids", &format!("killed-{mode}")) else { return };
        group.write("pids.max", "77");
        group.write("cgroup.procs", &live.root.to_string());
        live.dump(&[]);
        fs::remove_dir(&group.0).unwrap();
        let mode = format!("--manage-cgroups={mode}");
        live.fault = Some("restore-last:kill".to_owned());
        assert!(!live.try_restore(&[&mode]).status.success());
        live.fault = None;
        live.wait_gone();
        assert!(group.0.is_dir() && group.procs().is_empty());
        group.write("pids.max", "max");
        live.restore(&[&mode]);
        assert_eq!(value(&group.0, "pids.max"), "77");
        assert!(rcriu::sys::xattr::get(&group.0, "user.rcriu.unfinished").is_err());
        live.verdict();
        live.wait_gone();
    }
}

/// Existing groups: their properties are set or left alone, or they are in the way.
#[test]
fn privileged_modes_differ_for_groups_that_exist() {
    require(Cap::Ptrace);
    let cases = [("none", false), ("soft", false), ("props", true), ("full", true)];
    for (mode, is_set) in cases {
        let mut live = Live::workload("private_anon");
        let Some(group) = Group::new("pids", mode) else { return };
        group.write("pids.max", "77");
        group.write("cgroup.procs", &live.root.to_string());
        live.dump(&[]);
        group.write("pids.max", "99");
        let output = live.try_restore(&["--manage-cgroups=strict"]);
        assert!(words(&output).contains("exists already"), "{}", words(&output));
        live.restore(&[&format!("--manage-cgroups={mode}")]);
        assert_eq!(value(&group.0, "pids.max"), if is_set { "77" } else { "99" }, "{mode}");
        live.verdict();
        live.wait_gone();
    }
}

/// Another group takes the place of the tree's, in one hierarchy.
#[test]
fn privileged_a_tree_moves_to_another_root() {
    require(Cap::Ptrace);
    let mut live = Live::workload("tree");
    let groups = [Group::new("pids", "old"), Group::new("memory", "old")];
    let [Some(pids), Some(memory)] = &groups else { return };
    let below = pids.below("below");
    pids.write("pids.max", "77");
    let tree = live.tree();
    for pid in &tree {
        pids.write("cgroup.procs", &pid.to_string());
        memory.write("cgroup.procs", &pid.to_string());
    }
    let inner = tree.iter().find(|pid| **pid != live.root.as_raw()).unwrap();
    below.write("cgroup.procs", &inner.to_string());
    live.dump(&[]);
    let name = format!("rcriu-test-{}-new", std::process::id());
    let new = Group(pids.0.with_file_name(&name));
    live.restore(&["--manage-cgroups", "--cgroup-root", &format!("pids:/{name}")]);
    let moved = Group(new.0.join("below"));
    assert_eq!(moved.procs(), [*inner]);
    assert_eq!(new.procs().len(), tree.len() - 1);
    assert_eq!(value(&new.0, "pids.max"), "77");
    assert_eq!(pids.procs(), [0; 0]);
    assert_eq!(memory.procs().len(), tree.len());
    live.verdict();
    live.wait_gone();
}

/// The images have no group of which the tree is only a part, and what has its default is not there.
#[test]
fn privileged_only_groups_of_the_tree_are_recorded() {
    require(Cap::Ptrace);
    let mut live = Live::workload("private_anon");
    let Some(group) = Group::new("pids", "only") else { return };
    group.write("pids.max", "77");
    group.write("cgroup.procs", &live.root.to_string());
    live.dump(&[]);
    let images = read_all::<proto::CgroupEntry>(&live.images().join("cgroup.img"), Kind::Cgroup);
    for controller in &images.unwrap()[0].controllers {
        let is_pids = controller.cnames == [b"pids".to_vec()];
        assert_eq!(controller.dirs.len(), usize::from(is_pids), "{:?}", controller.cnames);
        for dir in &controller.dirs {
            let names: Vec<_> = dir.properties.iter().map(|of| &*of.name).collect();
            assert_eq!(names, [b"pids.max"]);
        }
    }
    live.restore(&[]);
    live.verdict();
}

fn recorded(live: &Live, controller: &str) -> Vec<String> {
    let images = read_all::<proto::CgroupEntry>(&live.images().join("cgroup.img"), Kind::Cgroup);
    let images = images.unwrap();
    let of = |entry: &&proto::CgControllerEntry| entry.cnames == [controller.as_bytes().to_vec()];
    let found = images[0].controllers.iter().find(of).unwrap();
    let names = found.dirs[0].properties.iter();
    names.map(|of| String::from_utf8_lossy(&of.name).into_owned()).collect()
}

/// The user leaves out properties, or names others; a restore sets of the others those that it is told.
#[test]
fn privileged_the_user_chooses_properties() {
    require(Cap::Ptrace);
    let mut live = Live::workload("private_anon");
    let Some(group) = Group::new("pids", "chosen") else { return };
    group.write("pids.max", "77");
    group.write("notify_on_release", "1");
    group.write("cgroup.procs", &live.root.to_string());
    let rule = |strategy: &str, names: &str| {
        format!("\"pids\":\n - \"strategy\": \"{strategy}\"\n - \"properties\": [{names}]\n")
    };
    live.dump_running(&["--cgroup-props", &rule("merge", "\"pids.current\"")]);
    assert_eq!(recorded(&live, "pids"), ["notify_on_release", "pids.max", "pids.current"]);
    let file = live.path("rules");
    fs::write(&file, rule("replace", "\"pids.events\"")).unwrap();
    live.dump_running(&["--cgroup-props-file", file.to_str().unwrap()]);
    assert_eq!(recorded(&live, "pids"), ["notify_on_release", "pids.events"]);
    live.dump(&["--cgroup-props", &rule("merge", "\"pids.current\"")]);
    fs::remove_dir(&group.0).unwrap();
    let unset = live.try_restore(&["--manage-cgroups", "--cgroup-props", &rule("replace", "")]);
    assert!(unset.status.success(), "{}", words(&unset));
    assert!(words(&unset).contains("pids.current"), "{}", words(&unset));
    assert_eq!(
        (value(&group.0, "pids.max"), value(&group.0, "notify_on_release")),
        ("max".into(), "1".into())
    );
    live.verdict();
    live.wait_gone();
}

/// Hierarchies are found in another place, which is the only one that has them.
#[test]
fn privileged_cgroups_are_found_in_a_yard() {
    require(Cap::Ptrace);
    let mut live = Live::workload("private_anon");
    let yard = live.path("yard");
    let place = yard.join("pids");
    fs::create_dir_all(&place).unwrap();
    let Some(group) = Group::new("pids", "yard") else { return };
    group.write("pids.max", "77");
    group.write("cgroup.procs", &live.root.to_string());
    let yard = yard.to_str().unwrap().to_owned();
    let none = words(&live.try_dump(&["--cgroup-yard", &yard]));
    assert!(none.contains("no cgroup file system is mounted there"), "{none}");
    let run = |program: &str, arguments: &[&str]| {
        let status = std::process::Command::new(program).args(arguments).status();
        assert!(status.unwrap().success(), "{program} {arguments:?}");
    };
    run("mount", &["-t", "cgroup", "-o", "pids", "none", place.to_str().unwrap()]);
    let unmounted = Unmount(place);
    live.dump(&["--cgroup-yard", &yard]);
    assert_eq!(recorded(&live, "pids"), ["pids.max"]);
    fs::remove_dir(&group.0).unwrap();
    live.restore(&["--manage-cgroups", "--cgroup-yard", &yard]);
    assert_eq!(value(&group.0, "pids.max"), "77");
    assert_eq!(group.procs(), [live.root.as_raw()]);
    drop(unmounted);
    live.verdict();
    live.wait_gone();
}

struct Unmount(PathBuf);

impl Drop for Unmount {
    fn drop(&mut self) {
        let _ = nix::mount::umount(&self.0);
    }
}

/// What a process sees of its own place: `/proc/self/cgroup` in its cgroup namespace.
fn seen_by(pid: i32) -> String {
    let enter = std::process::Command::new("nsenter")
        .args(["-C", "-t", &pid.to_string(), "cat", &format!("/proc/{pid}/cgroup")])
        .output()
        .unwrap();
    String::from_utf8(enter.stdout).unwrap()
}

/// A namespace whose root is a cgroup of the tree, or one above; with and without these cgroups still
/// there; and one in the cgroups of rcriu.
#[test]
fn privileged_a_cgroup_namespace_keeps_its_root() {
    require(Cap::Ptrace);
    for (is_own, is_gone) in [(true, false), (true, true), (false, false)] {
        let mut live = Live::workload("cgroup_namespace");
        let mut groups = Vec::new();
        for controller in ["pids", "memory", ""] {
            let Some(group) = Group::new(controller, "root").filter(|_| is_own) else { continue };
            group.write("cgroup.procs", &live.root.to_string());
            groups.push(group);
        }
        let pid = live.root.as_raw();
        fs::write(live.path("status.enter"), "").unwrap();
        wait_for("the namespace", || live.path("status.entered").exists());
        let mut below = Vec::new();
        for group in &groups {
            let inner = group.below("inner");
            inner.write("cgroup.procs", &pid.to_string());
            below.push(inner);
        }
        let before = (place(pid, pid), seen_by(pid));
        assert_eq!(before.1.contains("pids:/inner"), is_own, "{}", before.1);
        live.dump(&[]);
        if is_gone {
            for group in below.iter().chain(&groups) {
                fs::remove_dir(&group.0).unwrap();
            }
        }
        live.restore(&["--manage-cgroups=soft"]);
        assert_eq!((place(pid, pid), seen_by(pid)), before);
        live.verdict();
        live.wait_gone();
    }
}
