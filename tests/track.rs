//! Incremental dumps, with each tracker of changes that the machine has.
//!
//! A program changes its memory in steps (`tests/workloads/steps.rs`). At each step
//! its processes are stopped, and it is dumped twice: into a chain that goes on, and
//! in full. What the two hold must be the same, page by page. In half of the steps a
//! pre-dump comes before, while the program runs.
//!
//! All of it needs root.

mod common;

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::Command,
    time::Instant,
};

use common::{
    Cap,
    live::{Live, engine, wait_for, workload},
    page_server::{Server, bring},
    require,
    same::assert_same,
    skip,
    swap::Swap,
};
use nix::{
    fcntl::{Flock, FlockArg},
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use rcriu::{sys::Features, track::Tracker};

/// What is no option of the engine: do not leave the program running.
const KILL: &str = "--kill";

/// What the directory of a page server has behind the name of that of the dump.
const RECEIVED: &str = "-received";

/// A program that goes through its steps, and the dumps of it.
struct Steps {
    live: Live,
    /// Images that were written, the newest last.
    chain: Vec<String>,
    tracker: Tracker,
    /// What dumps are to take the kernel not to have (`RCRIU_WITHOUT`).
    without: &'static str,
    /// Whether the pages of the chain go to page servers.
    through_servers: bool,
    _lock: Flock<File>,
}

/// Waits until the program may run. Some of what programs do is counted for the whole
/// machine, so that one whose counts are looked at runs alone.
fn lock(how: FlockArg) -> Flock<File> {
    let path = std::env::temp_dir().join("rcriu-test-steps");
    let file = File::create(path).unwrap();
    Flock::lock(file, how).map_err(|(_, errno)| errno).unwrap()
}

/// What a dump says of itself.
struct Said {
    text: String,
}

impl Said {
    /// Returns a number of the line that begins with `kind`.
    fn count(&self, kind: &str, what: &str) -> u64 {
        let line = self.text.lines().find(|line| line.starts_with(&format!("{kind} pages")));
        let line = line.unwrap_or_else(|| panic!("no {kind} pages in {}", self.text));
        let at = line.find(&format!(" {what}")).unwrap_or_else(|| panic!("no {what} in {line}"));
        let number = line[..at].rsplit(' ').next().expect("a word");
        number.parse().unwrap_or_else(|_| panic!("{number} in {line}"))
    }
}

impl Steps {
    fn start(name: &str, tracker: Tracker) -> Self {
        Self::start_with(name, tracker, FlockArg::LockShared)
    }

    fn start_with(name: &str, tracker: Tracker, how: FlockArg) -> Self {
        require(Cap::Ptrace);
        let lock = lock(how);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().to_str().unwrap().to_owned();
        let program = workload().to_str().unwrap();
        // The kernel writes to the area of restartable sequences whenever a thread has
        // run, and it runs for each dump.
        let no_rseq = "GLIBC_TUNABLES=glibc.pthread.rseq=0";
        let live = Live::program("env", &[no_rseq, program, "--steps", name, &path], dir);
        Self { live, chain: Vec::new(), tracker, without: "", through_servers: false, _lock: lock }
    }

    /// Waits for a step; returns whether there is one.
    fn await_step(&self, number: u32) -> bool {
        let path = self.live.path("at");
        let mut end = false;
        wait_for(&format!("step {number}"), || {
            let at = fs::read_to_string(&path).unwrap_or_default();
            assert!(!at.starts_with("failed"), "{at}");
            end = at == "end";
            end || at == number.to_string()
        });
        !end
    }

    fn go_on(&self, number: u32) {
        fs::write(self.live.path(&format!("go.{number}")), "").unwrap();
    }

    fn signal_all(&mut self, signal: Signal) {
        for pid in self.live.tree() {
            let _ = kill(Pid::from_raw(pid), signal);
        }
        if signal == Signal::SIGSTOP {
            for pid in self.live.tree() {
                wait_for("the stop", || {
                    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten();
                    tasks.flatten().all(|task| {
                        let stat = fs::read_to_string(task.path().join("stat")).unwrap_or_default();
                        let state = stat.rsplit(')').next().and_then(|rest| rest.chars().nth(1));
                        matches!(state, Some('T' | 'Z') | None)
                    })
                });
            }
        }
    }

    /// Writes images into the directory `name`.
    fn write(&mut self, command: &str, name: &str, options: &[&str]) -> Said {
        let output = self.try_write(command, name, options, &[]);
        assert!(output.1, "{command} {name}: {}", output.0.text);
        output.0
    }

    fn try_write(
        &mut self,
        command: &str,
        name: &str,
        options: &[&str],
        environment: &[(&str, &str)],
    ) -> (Said, bool) {
        self.live.tree();
        let dir = self.live.path(name);
        fs::create_dir_all(&dir).unwrap();
        let mut engine = Command::new(engine());
        engine.args([command, "-t", &self.live.root.to_string(), "-D"]).arg(&dir);
        engine.args(["--display-stats", "-v4", "-o", "log"]);
        engine.args(options.iter().filter(|option| **option != KILL));
        engine.env("RCRIU_WITHOUT", self.without).envs(environment.iter().copied());
        if command == "dump" && !options.contains(&KILL) {
            engine.arg("-R");
        }
        let output = engine.output().unwrap();
        let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
        text += &String::from_utf8_lossy(&output.stderr);
        (Said { text }, output.status.success())
    }

    /// Goes on with the chain.
    fn next(&mut self, command: &str, options: &[&str]) -> Said {
        let name = format!("{}-{}", self.chain.len(), command);
        let parent = self.chain.last().map(|last| format!("../{last}"));
        let mut all = vec!["--track-mem", "--tracker", self.tracker.name()];
        if let Some(parent) = &parent {
            all.extend(["--prev-images-dir", parent]);
        }
        all.extend(options);
        let said = if self.through_servers {
            let (received, previous) = (
                self.live.path(&format!("{name}{RECEIVED}")),
                parent.clone().map(|of| of + RECEIVED),
            );
            let of_server: Vec<&str> =
                previous.iter().flat_map(|of| ["--prev-images-dir", of]).collect();
            let server = Server::start(&received, &of_server);
            let of_dump = server.arguments();
            all.extend(of_dump.iter().map(String::as_str));
            let said = self.write(command, &name, &all);
            server.succeed();
            bring(&self.live.path(&name), &received);
            said
        } else {
            self.write(command, &name, &all)
        };
        self.chain.push(name);
        said
    }

    /// Dumps the stopped tree into the chain and in full, and compares.
    fn check(&mut self) -> Said {
        self.signal_all(Signal::SIGSTOP);
        let said = self.next("dump", &[]);
        self.write("dump", "full", &[]);
        let (tip, full) = (self.tip(), self.live.path("full"));
        assert_same(&tip, &full);
        fs::remove_dir_all(full).unwrap();
        self.signal_all(Signal::SIGCONT);
        said
    }

    fn tip(&self) -> PathBuf {
        let of_server = if self.through_servers { RECEIVED } else { "" };
        self.live.path(&format!("{}{of_server}", self.chain.last().unwrap()))
    }
}

/// Takes a program through all of its steps.
fn go_through(name: &str, tracker: Tracker) {
    go_through_with(name, tracker, false);
}

/// Takes a program through all of its steps, and returns how many private and shared pages were left to
/// parents.
fn go_through_with(name: &str, tracker: Tracker, through_servers: bool) -> (u64, u64) {
    if !has(tracker) {
        skip(&format!("a kernel with the tracker {}", tracker.name()));
    }
    let mut steps = Steps { through_servers, ..Steps::start(name, tracker) };
    let mut number = 1;
    let mut left = (0, 0);
    while steps.await_step(number) {
        if number % 2 == 0 {
            steps.next("pre-dump", &[]);
        }
        let said = steps.check();
        left.0 += said.count("private", "in parent");
        left.1 += said.count("shared", "in parent");
        steps.go_on(number);
        number += 1;
    }
    assert!(number > 3, "{name} has only {number} steps");
    left
}

/// The dump has no pages of its parents then: what its tracker and its records say decides.
#[test]
fn privileged_pages_are_left_to_parents_at_a_page_server() {
    let private = go_through_with("private_pages", best(), true);
    let shared = go_through_with("shared_pages", best(), true);
    if best() == Tracker::Wp {
        assert!(private.0 > 0 && shared.1 > 0, "{private:?}, {shared:?}");
    }
}

#[test]
fn privileged_no_change_is_lost_at_a_page_server() {
    common::slow();
    for name in [
        "zeroed",
        "discarded",
        "moved",
        "executed",
        "forks",
        "private_file",
        "huge",
        "random",
        "shared_in_part",
        "shared_exchanged",
        "shared_random",
    ] {
        go_through_with(name, best(), true);
    }
}

/// One test for each program and tracker.
macro_rules! programs {
    ($($name:ident $(, elsewhere: $($tracker:ident)+)?;)*) => {
        mod privileged_wp {
            $(#[test]
            fn $name() {
                super::go_through(stringify!($name), super::Tracker::Wp);
            })*
        }

        mod privileged_soft_dirty {
            $(#[test]
            fn $name() {
                super::go_through(stringify!($name), super::Tracker::SoftDirty);
            })*
        }

        mod privileged_none {
            $(#[test]
            fn $name() {
                super::go_through(stringify!($name), super::Tracker::None);
            })*
        }

        /// The tests of programs that are run on other kernels as well.
        const ELSEWHERE: &[&str] = &[$($($(
            concat!("privileged_", stringify!($tracker), "::", stringify!($name))
        ),+,)?)*];
    };
}

// A tracker depends on the kernel, so some programs are run `elsewhere` with it, on other
// kernels. Comparing everything is the same on all of them.
programs! {
    private_pages, elsewhere: wp soft_dirty;
    shared_pages, elsewhere: wp;
    child_that_ends;
    short_mapping, elsewhere: wp;
    written_memfd;
    written_by_others;
    read_into;
    outsider;
    zeroed;
    discarded, elsewhere: wp;
    moved, elsewhere: wp;
    protected;
    mapped_again;
    executed, elsewhere: wp;
    forks, elsewhere: wp soft_dirty;
    grow_and_shrink;
    huge, elsewhere: wp soft_dirty;
    heap_and_stack, elsewhere: wp;
    private_file;
    busy_threads;
    random, elsewhere: wp soft_dirty;
    shared_twice, elsewhere: wp;
    shared_from_afar;
    shared_read_into;
    shared_opened, elsewhere: wp;
    shared_handed_over, elsewhere: wp;
    shared_by_several;
    shared_in_part;
    shared_exchanged;
    shared_zeroed_unseen, elsewhere: wp;
    shared_executed;
    shared_memfd_closed;
    shared_by_new_threads;
    shared_huge;
    shared_random, elsewhere: wp;
}

#[test]
fn tests_of_machines_exist() {
    let both: &[&str] = &["6.1", "6.12"];
    // Linux 6.1 has no write protection that a tracker could use (6.7).
    let mut tests = vec![("privileged_soft_dirty::", &["6.1"][..])];
    tests.extend(ELSEWHERE.iter().map(|name| (*name, &["6.12"][..])));
    tests.extend(
        [
            "privileged_a_tracker_spares_looking",
            "privileged_a_restored_process_is_tracked_since_its_images",
            "privileged_memory_that_is_pinned_is_not_tracked",
            "privileged_tracking_of_another_chain_is_not_believed",
            "privileged_the_keeper_of_the_tracking_ends_with_the_process",
        ]
        .map(|name| (name, both)),
    );
    common::machines::tell(&tests);
}

/// Whether the kernel has a tracker.
fn has(tracker: Tracker) -> bool {
    let features = Features::probe_tracking();
    match tracker {
        Tracker::Wp => features.pagemap_scan && features.write_protect_private,
        Tracker::SoftDirty => features.soft_dirty,
        Tracker::None => true,
    }
}

/// The best tracker of the machine.
fn best() -> Tracker {
    let found = [Tracker::Wp, Tracker::SoftDirty].into_iter().find(|tracker| has(*tracker));
    found.unwrap_or_else(|| skip("a kernel with write protection (Linux 6.7) or soft-dirty bits"))
}

/// Returns the keepers of the tracking of a process.
fn keepers(pid: i32) -> Vec<i32> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Ok(keeper) = entry.file_name().to_string_lossy().parse::<i32>() else { continue };
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let words: Vec<_> = line.split(|byte| *byte == 0).collect();
        if words[0] == b"rcriu-keep" && words.get(1) == Some(&pid.to_string().as_bytes()) {
            found.push(keeper);
        }
    }
    found
}

#[test]
fn privileged_a_tracker_spares_looking() {
    a_tracker_spares_looking("");
}

#[test]
fn privileged_a_tracker_spares_looking_where_guard_pages_are_not_told() {
    a_tracker_spares_looking("pagemap_scan_guards");
}

fn a_tracker_spares_looking(without: &'static str) {
    let tracker = best();
    let mut steps = Steps::start("private_pages", tracker);
    steps.without = without;
    assert!(steps.await_step(1));
    steps.check();
    steps.go_on(1);
    assert!(steps.await_step(2));
    let said = steps.check();
    // 300 pages are the program's own, 8 of them written. Pages of private mappings
    // of files are always looked at.
    let (scanned, compared) = (said.count("private", "scanned"), said.count("private", "compared"));
    assert!(said.count("private", "in parent") >= compared + 250, "{}", said.text);
    assert!(scanned < 200, "{}", said.text);
}

/// Pages of shared memory that a dump has looked at, and those that it has left to the
/// parent without a look.
fn looks(said: &Said) -> (u64, u64) {
    let (scanned, compared) = (said.count("shared", "scanned"), said.count("shared", "compared"));
    (scanned, said.count("shared", "in parent").saturating_sub(compared))
}

/// For each program the steps whose dump looks only at what was written of shared
/// memory, since all of its writers are known.
const SPARED: [(&str, &[u32]); 8] = [
    ("shared_pages", &[2, 3, 4, 5]),
    // No mapping comes or goes before steps 2, 4, and 7.
    ("shared_twice", &[2, 4, 7]),
    ("shared_from_afar", &[2, 3, 4, 5]),
    ("shared_opened", &[]),
    ("shared_by_several", &[2, 3, 4, 6, 7]),
    // One thread begins others before the second, which do nothing special.
    ("shared_by_new_threads", &[2, 5]),
    ("shared_handed_over", &[]),
    // Another program is run before the fourth; the memory is another one in the sixth.
    ("shared_executed", &[2, 3, 4, 5, 7]),
];

/// The same for a memfd: open at first, and opened again later on. Whether another process
/// has it is only known where all processes can be looked at.
fn spared_of_memfd() -> (&'static str, &'static [u32]) {
    let all_are_seen = fs::read("/proc/1/maps").is_ok();
    ("shared_memfd_closed", if all_are_seen { &[3, 4] } else { &[] })
}

#[test]
fn privileged_a_tracker_spares_looking_at_shared_memory_if_all_writers_are_known() {
    require(Cap::Ptrace);
    // Soft-dirty bits of shared memory are not believed.
    require(Cap::Kernel("write protection of shared memory", |features| {
        features.pagemap_scan && features.write_protect_shared
    }));
    for (name, expected) in SPARED.into_iter().chain([spared_of_memfd()]) {
        // Some things are counted for the whole machine, and other programs do them, too.
        let mut texts = String::new();
        let spared = (0..ATTEMPTS).any(|_| {
            let (spared, text) = spared(name);
            let unsound = spared.iter().find(|number| !expected.contains(number));
            assert_eq!(unsound, None, "{name}: {text}");
            texts += &text;
            spared == expected
        });
        assert!(spared, "{name}: expected {expected:?}\n{texts}");
    }
}

/// How often a program is run at most until no other program disturbs it.
const ATTEMPTS: u32 = 12;

/// Takes a program through its steps, and returns those whose dump has looked at part of
/// the shared memory only.
fn spared(name: &str) -> (Vec<u32>, String) {
    let mut steps = Steps::start_with(name, Tracker::Wp, FlockArg::LockExclusive);
    let (mut number, mut spared, mut text) = (1, Vec::new(), String::new());
    while steps.await_step(number) {
        let (looked, left) = looks(&steps.check());
        text += &format!("{number}: {looked} looked at, {left} not\n");
        if left >= 80 && looked < 80 {
            spared.push(number);
        }
        steps.go_on(number);
        number += 1;
    }
    (spared, text)
}

/// Pages of private memory that are write-protected by userfaultfd (bit 57 of
/// `/proc/PID/pagemap`, Documentation/admin-guide/mm/pagemap.rst), and all that are present,
/// in mappings of 32 MiB or more.
fn protected_pages(pid: i32) -> (u64, u64) {
    use std::os::unix::fs::FileExt;
    const PROTECTED: u64 = 1 << 57;
    const PRESENT: u64 = 1 << 63;
    let pagemap = fs::File::open(format!("/proc/{pid}/pagemap")).unwrap();
    let (mut protected, mut present) = (0, 0);
    for line in fs::read_to_string(format!("/proc/{pid}/maps")).unwrap().lines() {
        let mut words = line.split_whitespace();
        let range = words.next().unwrap().split_once('-').unwrap();
        let address = |text| u64::from_str_radix(text, 16).unwrap() / 4096;
        let (start, end) = (address(range.0), address(range.1));
        if end - start < 32 << 8 || !words.next().unwrap().ends_with('p') {
            continue;
        }
        let mut entries = vec![0; usize::try_from(end - start).unwrap() * 8];
        pagemap.read_exact_at(&mut entries, start * 8).unwrap();
        for entry in entries.chunks_exact(8) {
            let entry = u64::from_ne_bytes(entry.try_into().unwrap());
            present += u64::from(entry & PRESENT != 0);
            protected += u64::from(entry & PRESENT != 0 && entry & PROTECTED != 0);
        }
    }
    (protected, present)
}

/// Memory that is written all over between two dumps is not protected each time, which
/// would cost a fault for each page and spare nothing; and nothing is lost by that.
#[test]
fn privileged_what_is_written_all_over_is_not_protected_each_time() {
    require(Cap::Ptrace);
    require(Cap::Kernel("write protection", |features| {
        features.pagemap_scan && features.write_protect_private
    }));
    let mut steps = Steps::start("big", Tracker::Wp);
    let pid = steps.live.root.as_raw();
    let mut free = Vec::new();
    // The steps change one per cent and all of the pages in turn.
    for number in 1..=6 {
        assert!(steps.await_step(number));
        if number < 6 {
            steps.next("dump", &[]);
        } else {
            steps.check();
        }
        let (protected, present) = protected_pages(pid);
        assert!(present > 16_000, "{present}");
        free.push(protected < present / 2);
        steps.go_on(number);
    }
    // The third dump finds all written; the fourth as well, since nothing was protected.
    // The fifth protects, to find out; by the sixth one per cent was written.
    assert_eq!(free, [false, false, true, true, false, false]);
}

/// What keeps shared memory from being tracked is said once, by name and with what helps,
/// and the statistics show what it costs.
#[test]
fn privileged_what_keeps_memory_from_being_tracked_is_said() {
    require(Cap::Ptrace);
    require(Cap::Kernel("write protection of shared memory", |features| {
        features.pagemap_scan && features.write_protect_shared
    }));
    let mut steps = Steps::start("shared_pages", Tracker::Wp);
    let environment = [("RCRIU_WITHOUT", "tracefs")];
    let mut parent: Option<String> = None;
    for number in 1..3 {
        assert!(steps.await_step(number));
        let name = format!("said{number}");
        let mut options = vec!["--track-mem"];
        options.extend(parent.as_deref().iter().flat_map(|parent| ["--prev-images-dir", parent]));
        let (said, done) = steps.try_write("dump", &name, &options, &environment);
        assert!(done, "{}", said.text);
        let what = "shared memory is not tracked: find the tracepoint cpuhp/cpuhp_enter in tracefs";
        assert_eq!(said.text.matches(what).count(), 1, "{}", said.text);
        assert_eq!(said.text.matches("\n  help: ").count(), 1, "{}", said.text);
        let untracked = said.count("shared", "not tracked");
        let expected = if number == 1 { 0 } else { said.count("shared", "compared") };
        assert!(untracked >= expected && (untracked > 0) == (number > 1), "{}", said.text);
        parent = Some(format!("../{name}"));
        steps.go_on(number);
    }
    let output = Command::new(engine()).arg("check").envs(environment).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("optional tracepoints "), "{text}");
}

#[test]
fn privileged_the_keeper_of_the_tracking_ends_with_the_process() {
    let tracker = best();
    let mut steps = Steps::start("private_pages", tracker);
    assert!(steps.await_step(1));
    steps.next("pre-dump", &[]);
    let pid = steps.live.root.as_raw();
    let [keeper] = keepers(pid)[..] else { panic!("{:?}", keepers(pid)) };
    // It has nothing but what it is for.
    let mut links: Vec<_> = fs::read_dir(format!("/proc/{keeper}/fd"))
        .unwrap()
        .flatten()
        .map(|entry| fs::read_link(entry.path()).unwrap().to_string_lossy().into_owned())
        .map(|link| link.split(['[', ']']).next().unwrap().to_owned())
        .collect();
    links.sort();
    assert!(links.len() <= 4, "{links:?}");
    let comm = fs::read_to_string(format!("/proc/{keeper}/comm")).unwrap();
    assert_eq!(comm.trim(), "rcriu-keep");
    assert_eq!(fs::read_link(format!("/proc/{keeper}/cwd")).unwrap(), Path::new("/"));
    // The process has no descriptor of it.
    for entry in fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten() {
        let link = fs::read_link(entry.path()).unwrap();
        assert!(!link.to_string_lossy().contains("userfaultfd"), "{link:?}");
    }
    steps.next("dump", &[]);
    assert_eq!(keepers(pid), [keeper]);
    kill(steps.live.root, Signal::SIGKILL).unwrap();
    wait_for("the end of the keeper", || {
        let stat = fs::read_to_string(format!("/proc/{keeper}/stat")).unwrap_or_default();
        stat.is_empty() || stat.contains(") Z ")
    });
}

#[test]
fn privileged_tracking_of_another_chain_is_not_believed() {
    let tracker = best();
    let name = tracker.name();
    let mut steps = Steps::start("private_pages", tracker);
    let track = ["--track-mem", "--tracker", name];
    assert!(steps.await_step(1));
    steps.write("dump", "a1", &track);
    steps.go_on(1);
    assert!(steps.await_step(2));
    steps.write("dump", "b1", &track);
    steps.go_on(2);
    assert!(steps.await_step(3));
    steps.signal_all(Signal::SIGSTOP);
    let on = |parent: &'static str| [&track[..], &["--prev-images-dir", parent]].concat();
    steps.write("dump", "a2", &on("../a1"));
    // The tracking is that of a2 now.
    steps.write("dump", "b2", &on("../b1"));
    steps.write("dump", "full", &[]);
    for name in ["a2", "b2"] {
        assert_same(&steps.live.path(name), &steps.live.path("full"));
    }
}

#[test]
fn privileged_a_dump_that_fails_leaves_no_tracking_to_believe() {
    let tracker = best();
    for fault in
        ["dump-injected", "dump-files", "dump-synced", "dump-synced:kill", "dump-commit:kill"]
    {
        let mut steps = Steps::start("private_pages", tracker);
        assert!(steps.await_step(1));
        steps.check();
        steps.go_on(1);
        assert!(steps.await_step(2));
        let parent = format!("../{}", steps.chain[0]);
        let options =
            ["--track-mem", "--tracker", tracker.name(), "--prev-images-dir", parent.as_str()];
        let environment = [("RCRIU_FAULT", fault)];
        let (said, done) = steps.try_write("dump", "failed", &options, &environment);
        assert!(!done, "{fault}: {}", said.text);
        steps.check();
        steps.go_on(2);
        assert!(steps.await_step(3));
        steps.check();
    }
}

#[test]
fn privileged_a_restored_process_has_another_ones_pid_and_not_its_tracking() {
    for tracker in [Tracker::Wp, Tracker::SoftDirty, Tracker::None] {
        if !has(tracker) {
            continue;
        }
        let mut steps = Steps::start("private_pages", tracker);
        assert!(steps.await_step(1));
        steps.next("pre-dump", &[]);
        steps.next("dump", &[KILL]);
        steps.live.wait_gone();
        restore(&steps, &[]);
        steps.go_on(1);
        assert!(steps.await_step(2));
        steps.check();
        steps.go_on(2);
        assert!(steps.await_step(3));
        steps.check();
    }
}

#[test]
fn privileged_a_restored_process_is_tracked_since_its_images() {
    for tracker in [Tracker::Wp, Tracker::SoftDirty, Tracker::None] {
        if !has(tracker) {
            continue;
        }
        for name in ["private_pages", "huge", "forks"] {
            let mut steps = Steps::start(name, tracker);
            assert!(steps.await_step(1));
            steps.go_on(1);
            assert!(steps.await_step(2));
            steps.next("dump", &[KILL]);
            steps.live.wait_gone();
            restore(&steps, &["--track-mem", "--tracker", tracker.name()]);
            let pid = steps.live.root.as_raw();
            assert_eq!(keepers(pid).len(), usize::from(tracker != Tracker::None), "keepers");
            steps.go_on(2);
            assert!(steps.await_step(3));
            let said = steps.check();
            if tracker != Tracker::None && name == "private_pages" {
                assert!(said.count("private", "scanned") < 250, "{}", said.text);
            }
            steps.go_on(3);
            assert!(steps.await_step(4));
            steps.check();
        }
    }
}

fn restore(steps: &Steps, options: &[&str]) {
    let mut engine = Command::new(engine());
    engine.args(["restore", "-d", "-v4", "-o", "restore.log", "-D"]).arg(steps.tip());
    let output = engine.args(options).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn privileged_memory_that_is_pinned_is_not_tracked() {
    for tracker in [Tracker::Wp, Tracker::SoftDirty, Tracker::None] {
        if !has(tracker) {
            continue;
        }
        let mut steps = Steps::start("uring", tracker);
        let ring = steps.live.path("ring");
        for number in 1..=3 {
            assert!(steps.await_step(number));
            steps.check();
            steps.go_on(number);
            wait_for("the ring", || ring.exists());
            steps.next("pre-dump", &[]);
            let log = fs::read_to_string(steps.tip().join("log")).unwrap();
            assert!(tracker == Tracker::None || log.contains("memory in full"), "{log}");
            fs::remove_file(&ring).unwrap();
        }
        assert!(steps.await_step(4));
        steps.check();
    }
}

#[test]
fn privileged_memory_that_is_swapped_out_is_not_lost() {
    require(Cap::Ptrace);
    let _swap = Swap::make();
    let before = Swap::pages_out();
    for tracker in [Tracker::Wp, Tracker::SoftDirty, Tracker::None] {
        if has(tracker) {
            go_through("swapped", tracker);
        }
    }
    assert!(Swap::pages_out() > before, "nothing was swapped out");
}

#[test]
fn privileged_pre_dumps_lead_to_a_dump_that_can_be_restored() {
    for name in ["private_anon", "shared_anon", "memfd_mapping", "cow_tree", "threads"] {
        require(Cap::Ptrace);
        let mut live = Live::workload(name);
        let mut parent: Option<String> = None;
        for round in 0..3 {
            let dir = live.path(&format!("pre{round}"));
            fs::create_dir(&dir).unwrap();
            let mut command = Command::new(engine());
            command.args(["pre-dump", "--track-mem", "-t", &live.root.to_string(), "-D"]);
            command.arg(&dir);
            if let Some(parent) = &parent {
                command.args(["--prev-images-dir", parent]);
            }
            let output = command.output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            parent = Some(format!("../pre{round}"));
        }
        live.dump(&["--prev-images-dir", &parent.unwrap()]);
        live.restore(&[]);
        live.verdict();
    }
}

#[test]
fn privileged_the_time_of_a_step_is_bounded() {
    // A chain of forty, with nothing else to do.
    let tracker = best();
    let mut steps = Steps::start("shared_pages", tracker);
    assert!(steps.await_step(1));
    let begin = Instant::now();
    for round in 0..40 {
        steps.next(if round % 3 == 2 { "dump" } else { "pre-dump" }, &[]);
    }
    steps.check();
    println!("41 snapshots in {:?}", begin.elapsed());
}
