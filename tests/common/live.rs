//! Live process trees: started, looked at, checkpointed, restored, and gone
//! when the test ends, however it ends.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsString,
    fmt::Write as _,
    fs,
    os::unix::{
        ffi::OsStrExt,
        fs::{MetadataExt, PermissionsExt},
    },
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    sync::OnceLock,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    sys::{
        prctl,
        signal::{Signal, kill},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::Pid,
};
use tempfile::TempDir;

use super::mounted::Mounted;

/// Bounds every wait; nothing that works takes as long.
pub const PATIENCE: Duration = Duration::from_secs(40);

/// How long a tree is looked at, at most, that is not as it was.
const QUIET_AFTER: Duration = Duration::from_secs(3);

/// Waits for a condition.
pub fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !condition() {
        assert!(begin.elapsed() < PATIENCE * super::slowness(), "waited in vain for: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// The program under test, or another one with the same command line, which
/// `RCRIU_TEST_PROGRAM` names, to hold the tests themselves against.
pub fn engine() -> OsString {
    std::env::var_os("RCRIU_TEST_PROGRAM").unwrap_or(env!("CARGO_BIN_EXE_rcriu").into())
}

/// The program that restores what the program under test has dumped:
/// `RCRIU_TEST_RESTORER`, else the same.
pub fn restorer() -> OsString {
    std::env::var_os("RCRIU_TEST_RESTORER").unwrap_or_else(engine)
}

/// Returns the program with the states, built if it is not there or too old.
pub fn workload() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| {
        if let Some(path) = std::env::var_os("RCRIU_TEST_WORKLOAD") {
            return path.into();
        }
        // target/TRIPLE/PROFILE/deps/live-HASH, or without TRIPLE. A run of one test by
        // name does not build the examples.
        let test = std::env::current_exe().expect("the test has a path");
        let profile = test.ancestors().nth(2).expect("the test is in a profile's directory");
        let mut build = Command::new(env!("CARGO"));
        build.args(["build", "--quiet", "--locked", "--example", "workload", "--manifest-path"]);
        build.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml"));
        let below = profile.parent().expect("it is in a target directory");
        // Cargo marks both.
        let is_target_dir = |dir: &&Path| dir.join("CACHEDIR.TAG").exists();
        build.arg("--target-dir").arg(below.parent().filter(is_target_dir).unwrap_or(below));
        match profile.file_name().map(OsStrExt::as_bytes) {
            Some(b"debug") => {}
            name => {
                build.arg("--profile").arg(std::ffi::OsStr::from_bytes(name.expect("a name")));
            }
        }
        let done = build.stdin(Stdio::null()).status().expect("cargo runs");
        assert!(done.success(), "the workloads cannot be built");
        profile.join("examples/workload")
    })
}

/// A process tree under test, its files, and every process that it had.
#[derive(Debug)]
pub struct Live {
    pub root: Pid,
    pub dir: TempDir,
    /// The directory below that its images are in.
    pub images_name: &'static str,
    /// What dumps it, and restores it.
    pub programs: (OsString, OsString),
    /// Where its next dump or restore is to fail (`RCRIU_FAULT`).
    pub fault: Option<String>,
    /// What its dumps and restores are to take the kernel not to have
    /// (`RCRIU_WITHOUT`).
    pub without: &'static str,
    status: PathBuf,
    /// Everything ever seen in the tree: what may be killed.
    pids: BTreeSet<i32>,
}

impl Live {
    /// Starts a state and waits until it is set up.
    pub fn workload(name: &str) -> Self {
        let dir = directory();
        let status = dir.path().join("status");
        let mut command = Command::new(workload());
        command.args(["--exec".as_ref(), workload().as_os_str(), name.as_ref()]).arg(&status);
        let live = Self::start(command, dir);
        live.wait_status("ready\n");
        live
    }

    /// Starts a program in a session of its own, without open files but
    /// /dev/null.
    pub fn program(program: &str, arguments: &[&str], dir: TempDir) -> Self {
        let mut command = Command::new(workload());
        command.args(["--exec", program]).args(arguments).current_dir(dir.path());
        Self::start(command, dir)
    }

    #[expect(clippy::zombie_processes, reason = "it is reaped by its pid, as what replaces it is")]
    fn start(mut command: Command, dir: TempDir) -> Self {
        prctl::set_child_subreaper(true).expect("orphans can be adopted");
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap_or_else(|error| panic!("{command:?}: {error}"));
        Self::adopt(i32::try_from(child.id()).expect("a pid"), dir)
    }

    /// Takes over a tree whose root exists already.
    pub fn adopt(root: i32, dir: TempDir) -> Self {
        let status = dir.path().join("status");
        Self {
            root: Pid::from_raw(root),
            dir,
            images_name: "images",
            programs: (engine(), restorer()),
            fault: None,
            without: "",
            status,
            pids: [root].into(),
        }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Waits until a program that keeps to the protocol of the states is ready.
    pub fn wait_ready(&self) {
        self.wait_status("ready\n");
    }

    /// Waits for a line of the state's, failing as soon as it says another.
    fn wait_status(&self, wanted: &str) {
        wait_for(&format!("{wanted:?} of {}", self.root), || {
            match fs::read_to_string(&self.status) {
                Ok(found) if found == wanted => true,
                Ok(found) if found != "ready\n" => match found.strip_prefix("needs ") {
                    Some(missing) => super::skip(missing.trim()),
                    None => panic!("the workload says: {found}"),
                },
                _ => {
                    let gone = !Path::new(&format!("/proc/{}", self.root)).exists()
                        || state_of(self.root.as_raw()) == Some('Z');
                    if gone && !self.status.exists() {
                        panic!("the workload is gone and has said nothing");
                    }
                    if gone && fs::read_to_string(&self.status).is_ok_and(|now| now == "ready\n") {
                        panic!("the workload ended without a verdict: {}", how_ended(self.root));
                    }
                    false
                }
            }
        });
    }

    /// The live descendants of the root and the root, in no order.
    pub fn tree(&mut self) -> Vec<i32> {
        let mut found = vec![self.root.as_raw()];
        let mut at = 0;
        while let Some(pid) = found.get(at).copied() {
            at += 1;
            let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
            for task in tasks {
                let text = fs::read_to_string(task.path().join("children")).unwrap_or_default();
                found.extend(text.split_whitespace().filter_map(|pid| pid.parse::<i32>().ok()));
            }
        }
        self.pids.extend(&found);
        found
    }

    /// Reads all that must not change of every process.
    pub fn state(&mut self) -> TreeState {
        let pids = self.tree();
        TreeState(pids.into_iter().map(|pid| (pid, TargetState::read(pid))).collect())
    }

    /// Reads the state once it is as `before`, or does not come to be. A thread that was
    /// stopped in a call makes it again, and its signal mask is another one meanwhile.
    pub fn state_after(&mut self, before: &TreeState) -> TreeState {
        self.state_like(|state| before.differences(state).is_empty())
    }

    /// The same after a restore.
    pub fn state_restored(&mut self, before: &TreeState) -> TreeState {
        let root = self.root;
        let before = before.clone().restored(root);
        self.state_like(|state| before.differences(&state.clone().restored(root)).is_empty())
    }

    fn state_like(&mut self, is_right: impl Fn(&TreeState) -> bool) -> TreeState {
        let begin = Instant::now();
        loop {
            let state = self.state();
            if is_right(&state) || begin.elapsed() > QUIET_AFTER * super::slowness() {
                return state;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub fn images(&self) -> PathBuf {
        self.path(self.images_name)
    }

    /// Runs `dump` of the tree into its images directory.
    pub fn try_dump(&mut self, arguments: &[&str]) -> Output {
        self.try_run("dump", arguments)
    }

    /// Runs a command of the program on the tree and its images directory.
    pub fn try_run(&mut self, name: &str, arguments: &[&str]) -> Output {
        self.tree();
        let images = self.images();
        fs::create_dir_all(&images).expect("the images directory is ours");
        let mut command = Command::new(&self.programs.0);
        command.arg(name).arg("-t").arg(self.root.to_string());
        command.arg("-D").arg(&images).args(["-v4", "-o", "dump.log"]).args(arguments);
        self.set_environment(&mut command);
        bounded(command, &self.path("dump.out"))
    }

    fn set_environment(&self, command: &mut Command) {
        command.envs(self.fault.iter().map(|fault| ("RCRIU_FAULT", fault)));
        if !self.without.is_empty() {
            command.env("RCRIU_WITHOUT", self.without);
        }
    }

    /// Dumps the tree and waits until it is gone.
    pub fn dump(&mut self, arguments: &[&str]) {
        let output = self.try_dump(arguments);
        assert!(output.status.success(), "dump: {}", self.complaint(&output, "dump.log"));
        // What was forked while the dump began.
        for entry in fs::read_dir(self.images()).expect("it is there").flatten() {
            let name = entry.file_name().into_string().unwrap_or_default();
            let id = name.strip_prefix("core-").and_then(|rest| rest.strip_suffix(".img"));
            self.pids.extend(id.and_then(|id| id.parse::<i32>().ok()));
        }
        self.wait_gone();
    }

    /// Dumps the tree, which goes on.
    pub fn dump_running(&mut self, arguments: &[&str]) {
        let output = self.try_dump(&[&["-R"], arguments].concat());
        assert!(output.status.success(), "dump -R: {}", self.complaint(&output, "dump.log"));
    }

    /// Kills the tree.
    pub fn kill(&mut self) {
        for pid in self.tree() {
            kill(Pid::from_raw(pid), Signal::SIGKILL).expect("it is ours");
        }
        self.wait_gone();
    }

    /// Checks that the images are a snapshot in which nothing is missing.
    pub fn check_images(&self) {
        let mut check = Command::new(env!("CARGO_BIN_EXE_imgfs"));
        let output = check.arg("check").arg(self.images()).output().expect("imgfs runs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    }

    /// Waits until no process of the tree is left, and reaps what comes here.
    pub fn wait_gone(&mut self) {
        let pids = self.pids.clone();
        wait_for("the end of the tree", || {
            pids.iter().all(|pid| {
                reap(*pid);
                !Path::new(&format!("/proc/{pid}")).exists()
            })
        });
    }

    /// Puts copies in the place of the files that the tree had open, so that nothing
    /// is left of the kernel's objects that were dumped but what the images and the disk
    /// have. Links to one file lead to one copy.
    pub fn replace_files(&self) {
        let images = std::ffi::OsStr::new(self.images_name);
        let entries = fs::read_dir(self.dir.path()).expect("it is ours").flatten();
        let names: Vec<_> = entries.map(|entry| entry.file_name()).collect();
        let names: Vec<_> = names.iter().filter(|name| *name != images).collect();
        if names.is_empty() {
            return;
        }
        let copies = self.path(".copies");
        fs::create_dir(&copies).expect("it is ours");
        let mut copy = Command::new("cp");
        copy.arg("-a").args(&names).arg(&copies).current_dir(self.dir.path());
        assert!(copy.status().expect("cp runs").success(), "{copy:?}");
        let mut remove = Command::new("rm");
        remove.arg("-rf").args(&names).current_dir(self.dir.path());
        assert!(remove.status().expect("rm runs").success(), "{remove:?}");
        for name in names {
            fs::rename(copies.join(name), self.dir.path().join(name)).expect("it is ours");
        }
        fs::remove_dir(copies).expect("it is empty");
    }

    /// Runs `restore` of the tree's images, detached.
    pub fn try_restore(&self, arguments: &[&str]) -> Output {
        self.try_restore_from(&self.images(), arguments)
    }

    /// Runs `restore` of the tree's images in another place.
    pub fn try_restore_from(&self, images: &Path, arguments: &[&str]) -> Output {
        let mut command = Command::new(&self.programs.1);
        command.arg("restore").arg("-D").arg(images);
        command.args(["-d", "-v4", "-o", "restore.log", "--pidfile"]).arg(self.path("pid"));
        command.args(arguments);
        self.set_environment(&mut command);
        bounded(command, &self.path("restore.out"))
    }

    /// Restores the tree from a mount of the chain that ends with its images.
    pub fn restore_from_mount(&self, arguments: &[&str]) {
        let point = self.path("mnt");
        fs::create_dir(&point).unwrap();
        let mounted = Mounted::new(&self.images(), &point, &[]);
        let work = self.images();
        let arguments = [arguments, &["-W", work.to_str().unwrap()]].concat();
        let output = self.try_restore_from(&point, &arguments);
        assert!(output.status.success(), "{}", self.complaint(&output, "restore.log"));
        drop(mounted);
    }

    /// Dumps the tree and leaves it running, dumps and kills it, and restores it from a mount of
    /// the chain of both. Calls `meanwhile` between the dumps.
    pub fn through_a_chain(&mut self, arguments: &[&str], meanwhile: impl FnOnce(&mut Self)) {
        self.images_name = "first";
        self.dump_running(arguments);
        meanwhile(self);
        self.images_name = "second";
        self.dump(&[arguments, &["--prev-images-dir", "../first"]].concat());
        self.restore_from_mount(arguments);
    }

    /// Restores the tree with its old pids.
    pub fn restore(&mut self, arguments: &[&str]) {
        let output = self.try_restore(arguments);
        assert!(output.status.success(), "restore: {}", self.complaint(&output, "restore.log"));
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!said.contains("not as it was"), "{said}");
        let pid = fs::read_to_string(self.path("pid")).expect("restore writes the pid file");
        assert_eq!(pid.trim(), self.root.to_string(), "pid file");
    }

    /// The program's messages and the end of its log.
    pub fn complaint(&self, output: &Output, log: &str) -> String {
        let log = fs::read(self.images().join(log)).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let mut text = format!("{}\n", output.status);
        text += &String::from_utf8_lossy(&output.stderr);
        let lines: Vec<_> = log
            .lines()
            .filter(|line| {
                line.contains("Error") || line.contains("rror:") || line.contains("fail")
            })
            .collect();
        for line in &lines[lines.len().saturating_sub(15)..] {
            let _ = writeln!(text, "{line}");
        }
        text
    }

    /// Tells a state that its checkpoint is behind it, and waits for its verdict.
    pub fn verdict(&self) {
        fs::write(self.path("status.go"), "").expect("a file of ours");
        self.wait_status("ok\n");
    }

    /// Sum over the tree of its proportional shares of memory that is not a
    /// file's, in KiB.
    pub fn proportional_kib(&mut self) -> u64 {
        let pids = self.tree();
        let mut sum = 0;
        for pid in pids {
            let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
            for line in text.lines() {
                if let Some(rest) =
                    line.strip_prefix("Pss_Anon:").or(line.strip_prefix("Pss_Shmem:"))
                {
                    let number = rest.trim().trim_end_matches(" kB");
                    sum += number.parse::<u64>().expect("a number of KiB");
                }
            }
        }
        sum
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        // Twice, for what was being forked.
        for _ in 0..2 {
            self.tree();
            for pid in &self.pids {
                // Only what is below this process is ours: a pid of ours that is free may
                // belong to another process by now.
                if is_below_us(*pid) {
                    let _ = kill(Pid::from_raw(*pid), Signal::SIGKILL);
                }
            }
        }
        let begin = Instant::now();
        while begin.elapsed() < Duration::from_secs(5) * super::slowness() {
            let alive = self.pids.iter().filter(|pid| {
                reap(**pid);
                is_below_us(**pid)
            });
            if alive.count() == 0 {
                break;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        if std::thread::panicking() && std::env::var_os("RCRIU_TEST_KEEP").is_some() {
            self.dir.disable_cleanup(true);
            eprintln!("kept {}", self.dir.path().display());
        }
    }
}

/// Runs the engine, its messages in a file since what is restored may keep
/// them open, and kills it if it does not end.
pub fn bounded(mut command: Command, messages: &Path) -> Output {
    let out = fs::File::create(messages).expect("a file of ours");
    let copy = out.try_clone().expect("a descriptor");
    let mut child = command
        .stdin(Stdio::null())
        .stdout(out)
        .stderr(copy)
        .spawn()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let begin = Instant::now();
    loop {
        if let Some(status) = child.try_wait().expect("it is our child") {
            let stderr = fs::read(messages).unwrap_or_default();
            return Output { status, stdout: Vec::new(), stderr };
        }
        if begin.elapsed() > 3 * PATIENCE * super::slowness() {
            let _ = child.kill();
            let _ = child.wait();
            panic!("{command:?} does not end");
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A terminal with its session, which a state runs in as a job.
///
/// The session's leader is a program beside the states (`workloads/shell.rs`).
#[derive(Debug)]
pub struct Shell {
    leader: Live,
    pub job: Live,
}

impl Shell {
    pub fn new(name: &str) -> Self {
        let dir = directory();
        let job_dir = directory();
        let mut command = Command::new(workload());
        command.arg("--shell").arg(dir.path()).arg(workload()).arg(name);
        command.arg(job_dir.path().join("status"));
        let leader = Live::start(command, dir);
        let path = leader.path("job");
        wait_for("the job", || path.exists());
        let pid = fs::read_to_string(path).expect("it is there").parse().expect("a pid");
        let job = Live::adopt(pid, job_dir);
        job.wait_status("ready\n");
        Self { leader, job }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.leader.path(name)
    }

    /// Restores the job from within the session.
    pub fn restore(&mut self) {
        let pid_file = self.job.path("pid");
        let mut words: Vec<OsString> = vec![restorer(), "restore".into(), "-D".into()];
        words.push(self.job.images().into());
        for word in ["-d", "-v4", "-o", "restore.log", "--shell-job", "--pidfile"] {
            words.push(word.into());
        }
        words.push(pid_file.into());
        let text = words.iter().map(|word| word.as_bytes()).collect::<Vec<_>>().join(&b"\n"[..]);
        let new = self.path("command.new");
        fs::write(&new, text).expect("a file of ours");
        fs::rename(&new, self.path("command")).expect("a file of ours");
        let done = self.path("done");
        wait_for("the restore in the session", || done.exists());
        let status = fs::read_to_string(done).expect("it is there");
        let log = read_text(&self.job.images().join("restore.log"));
        let errors: Vec<_> = log.lines().filter(|line| line.contains("Error")).collect();
        let screen = read_text(&self.path("screen"));
        assert_eq!(status, "0", "restore in the session: {}\n{screen}", errors.join("\n"));
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        let _ = fs::write(self.path("end"), "");
    }
}

/// A directory that processes of other users may write to.
pub fn directory() -> TempDir {
    let dir = TempDir::with_prefix("rcriu-live-").expect("a temporary directory");
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).expect("it is ours");
    dir
}

/// Reaps a process if it is a dead child of this one.
fn reap(pid: i32) {
    let _ = waitpid(Pid::from_raw(pid), Some(WaitPidFlag::WNOHANG));
}

fn how_ended(pid: Pid) -> String {
    match waitpid(pid, Some(WaitPidFlag::WNOHANG)) {
        Ok(WaitStatus::StillAlive) => "it is not reaped".to_owned(),
        Err(Errno::ECHILD) => "it is another's child".to_owned(),
        status => format!("{status:?}"),
    }
}

/// The fields of a process's stat line after its name.
fn stat_fields(pid: i32) -> Option<Vec<String>> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let rest = &text[text.rfind(')')? + 2..];
    Some(rest.split_whitespace().map(str::to_owned).collect())
}

/// The letter of a process's state.
pub fn state_of(pid: i32) -> Option<char> {
    stat_fields(pid)?.first()?.chars().next()
}

/// Whether this process is an ancestor of another.
fn is_below_us(pid: i32) -> bool {
    let us = std::process::id().to_string();
    let mut at = pid.to_string();
    for _ in 0..1000 {
        let Some(fields) = at.parse().ok().and_then(stat_fields) else { return false };
        at.clone_from(&fields[1]);
        if at == us {
            return true;
        }
    }
    false
}

/// The state of a tree, by pid.
#[derive(Clone, Debug, PartialEq)]
pub struct TreeState(BTreeMap<i32, TargetState>);

/// What of a process may not change by a dump, nor by a restore, by the file
/// it is read from.
#[derive(Clone, Debug, PartialEq)]
pub struct TargetState(BTreeMap<String, String>);

impl TreeState {
    /// Lists the differences to a later state of the same processes.
    pub fn differences(&self, later: &Self) -> Vec<String> {
        let mut found = Vec::new();
        for pid in self.0.keys().chain(later.0.keys()).collect::<BTreeSet<_>>() {
            match (self.0.get(pid), later.0.get(pid)) {
                (Some(before), Some(after)) => {
                    for line in before.differences(after) {
                        found.push(format!("process {pid}: {line}"));
                    }
                }
                (Some(_), None) => found.push(format!("process {pid} is gone")),
                (None, _) => found.push(format!("process {pid} is new")),
            }
        }
        found
    }

    /// Panics unless a later state is the same.
    pub fn assert_unchanged(&self, later: &Self) {
        let differences = self.differences(later);
        assert!(differences.is_empty(), "the tree has changed:\n{}", differences.join("\n"));
    }

    /// The same, without what the kernel numbers anew after a restore and what
    /// belongs to the new parent.
    pub fn restored(mut self, root: Pid) -> Self {
        for (pid, state) in &mut self.0 {
            state.0 = std::mem::take(&mut state.0)
                .into_iter()
                .map(|(key, value)| {
                    let value = if key.starts_with("fd ") || key.starts_with("map ") {
                        without_numbers(&value)
                    } else {
                        value
                    };
                    (key, value)
                })
                .collect();
            state.normalise_maps();
            if *pid == root.as_raw() {
                state.0.remove("status PPid");
            }
        }
        self
    }
}

/// Replaces the inode numbers of objects without a name, and the names of
/// memory objects that are shown by a number.
fn without_numbers(text: &str) -> String {
    let mut out = text.to_owned();
    // Files that never had a name are called after them. The position of the device is that of its last packet.
    let kinds =
        ["pipe:[", "socket:[", "net:[", "uts:[", "mnt:[", "inode=", "/#", "/dev/net/tun pos:"];
    for kind in kinds {
        if let Some(at) = out.find(kind) {
            let digits = at + kind.len();
            let end =
                out[digits..].find(|c: char| !c.is_ascii_digit()).map_or(out.len(), |n| digits + n);
            out.replace_range(digits..end, "N");
        }
    }
    out
}

impl TargetState {
    /// Reads the state of one process; of a dead one, what is left of it.
    pub fn read(pid: i32) -> Self {
        let mut found = BTreeMap::new();
        let proc = PathBuf::from(format!("/proc/{pid}"));
        let mut tasks: Vec<_> = fs::read_dir(proc.join("task"))
            .into_iter()
            .flatten()
            .flatten()
            .map(|task| task.file_name().into_string().expect("a tid"))
            .collect();
        tasks.sort();
        found.insert("threads".to_owned(), tasks.join(" "));
        for tid in &tasks {
            let text = read_text(&proc.join("task").join(tid).join("status"));
            let own = *tid == pid.to_string();
            for line in text.lines() {
                let Some((key, value)) = line.split_once(':') else { continue };
                let value = value.trim();
                let entry = match key {
                    // Whether it sleeps or runs at the moment does not matter.
                    "State" => match value.chars().next() {
                        Some('S' | 'R' | 'D') => "runs".to_owned(),
                        _ => value.to_owned(),
                    },
                    "PPid" | "Umask" | "Threads" if own => value.to_owned(),
                    "Name" | "TracerPid" | "Uid" | "Gid" | "Groups" | "SigBlk" | "SigIgn"
                    | "SigCgt" | "CapInh" | "CapPrm" | "CapEff" | "CapBnd" | "CapAmb"
                    | "NoNewPrivs" | "Seccomp" | "THP_enabled" => value.to_owned(),
                    _ => continue,
                };
                let prefix = if own { "status".to_owned() } else { format!("thread {tid}") };
                found.insert(format!("{prefix} {key}"), entry);
            }
        }
        let is_zombie = found.get("status State").is_some_and(|state| state.starts_with('Z'));
        let witness = witness(pid);
        if is_zombie && witness == pid {
            // A dead process shows nothing but its end and its place in the tree.
            found.retain(|key, _| {
                ["threads", "status State", "status PPid"].contains(&key.as_str())
            });
        } else if is_zombie {
            // What a thread blocks that has ended is no matter.
            found.remove("status SigBlk");
        }
        // Group, session, terminal, nice.
        if let Some(fields) = stat_fields(pid) {
            found.insert("stat".to_owned(), [&fields[2..5], &fields[16..17]].concat().join(" "));
        }
        if is_zombie && witness == pid {
            return Self(found);
        }
        let proc = PathBuf::from(format!("/proc/{witness}"));
        for name in ["cmdline", "environ", "auxv"] {
            let bytes = fs::read(proc.join(name)).unwrap_or_default();
            found.insert(name.to_owned(), String::from_utf8_lossy(&bytes).into_owned());
        }
        for name in ["limits", "oom_score_adj", "personality"] {
            found.insert(name.to_owned(), read_text(&proc.join(name)));
        }
        for name in ["exe", "cwd", "root"] {
            found.insert(name.to_owned(), read_link(&proc.join(name)));
        }
        let mut last = String::new();
        for line in read_text(&proc.join("smaps")).lines() {
            let fields: Vec<_> = line.split_whitespace().collect();
            if fields.first().is_some_and(|field| field.contains('-') && !field.ends_with(':')) {
                // Addresses, rights, offset; then device and inode, which no
                // object without a name keeps; then the name.
                last = format!("map {}", fields[0]);
                found.insert(
                    last.clone(),
                    format!("{} {} {}", fields[1], fields[2], fields[5..].join(" ")),
                );
            } else if let Some(flags) = line.strip_prefix("VmFlags:") {
                // Soft-dirty bits and watches of userfaultfd are the tracker's.
                let flags =
                    flags.split_whitespace().filter(|flag| !["sd", "um", "uw"].contains(flag));
                let flags: Vec<_> = flags.collect();
                let entry = found.get_mut(&last).expect("flags follow addresses");
                *entry += &format!(" [{}]", flags.join(" "));
            }
        }
        for fd in fs::read_dir(proc.join("fd")).into_iter().flatten().flatten() {
            let name = fd.file_name().into_string().expect("a number");
            let info = read_text(&proc.join("fdinfo").join(&name));
            if let Ok(of) = fs::metadata(fd.path()) {
                let owner = format!("{}:{} {:o}", of.uid(), of.gid(), of.mode());
                found.insert(format!("owner of fd {name}"), owner);
            }
            let kept: Vec<_> = info
                .lines()
                .filter(|line| line.starts_with("pos:") || line.starts_with("flags:"))
                .map(|line| line.split_whitespace().collect::<String>())
                .collect();
            found.insert(
                format!("fd {name}"),
                format!("{} {}", read_link(&fd.path()), kept.join(" ")),
            );
        }
        Self(found)
    }

    /// Leaves of the mappings what a program could notice: neighbours may have
    /// been joined, shared memory without a name has any of two names, private huge
    /// pages are somewhere in a file that is their own, and the kernel accounts for memory
    /// that was ever writable.
    fn normalise_maps(&mut self) {
        let (maps, mut rest): (Vec<_>, BTreeMap<_, _>) = {
            let (maps, rest): (Vec<_>, Vec<_>) = std::mem::take(&mut self.0)
                .into_iter()
                .partition(|(key, _)| key.starts_with("map "));
            (maps, rest.into_iter().collect())
        };
        // Begin, end, rights, offset in the object, name and flags.
        let mut areas: Vec<(u64, u64, String, u64, String)> = Vec::new();
        let number = |text: &str| u64::from_str_radix(text, 16).expect("a hexadecimal number");
        for (key, value) in maps {
            let (begin, end) = key["map ".len()..].split_once('-').expect("a range");
            let mut words = value.splitn(3, ' ');
            let mut word = || words.next().unwrap_or_default().to_owned();
            let (rights, offset, what) = (word(), number(&word()), word());
            let what = what.replace("/memfd:/dev/zero (deleted)", "/dev/zero (deleted)");
            let what = what.replace(" ac ", " ").replace(" ac]", "]");
            let own_file = what.starts_with("/anon_hugepage") && rights.ends_with('p');
            let (offset, what) =
                if own_file { (0, format!("huge pages, {what}")) } else { (offset, what) };
            areas.push((number(begin), number(end), rights, offset, what));
        }
        areas.sort();
        areas.dedup_by(|next, area| {
            let in_file = next.4.starts_with('/');
            let joined = area.1 == next.0
                && area.2 == next.2
                && area.4 == next.4
                && (!in_file || area.3 + (area.1 - area.0) == next.3);
            if joined {
                area.1 = next.1;
            }
            joined
        });
        for (begin, end, rights, offset, what) in areas {
            rest.insert(format!("map {begin:x}-{end:x}"), format!("{rights} {offset:x} {what}"));
        }
        self.0 = rest;
    }

    fn differences(&self, later: &Self) -> Vec<String> {
        let mut found = Vec::new();
        for key in self.0.keys().chain(later.0.keys()).collect::<BTreeSet<_>>() {
            let (before, after) = (self.0.get(key), later.0.get(key));
            if before != after {
                let none = "(none)".to_owned();
                let (before, after) = (before.unwrap_or(&none), after.unwrap_or(&none));
                found.push(format!("{key}: {before:?}, then {after:?}"));
            }
        }
        found
    }
}

/// Returns the thread by which the kernel shows what a process has: the first, or another
/// one if that has ended and others have not.
pub fn witness(pid: i32) -> i32 {
    if state_of(pid) != Some('Z') {
        return pid;
    }
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let mut tids = tasks.filter_map(|task| task.file_name().to_str()?.parse().ok());
    tids.find(|tid| *tid != pid).unwrap_or(pid)
}

fn read_text(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

fn read_link(path: &Path) -> String {
    fs::read_link(path).map(|link| link.display().to_string()).unwrap_or_default()
}
