//! Restores on demand (`restore --lazy`): the states of `tests/workloads` look at memory that is
//! missing still, and pagers fail.
//!
//! All of it needs root.

mod common;

use std::{
    fs,
    io::BufReader,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use common::{
    Cap,
    live::{Live, bounded, engine, wait_for},
    mounted::Mounted,
    net::connect,
    redis, require,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// A tree that was dumped and is restored on demand.
struct Lazy {
    live: Live,
}

impl Lazy {
    /// Dumps a state, which ends it.
    fn dumped(name: &str, options: &[&str]) -> Self {
        require(Cap::Ptrace);
        let mut live = Live::workload(name);
        live.dump(options);
        Self { live }
    }

    /// The file while which pagers read nothing ahead.
    fn held(&self) -> PathBuf {
        self.live.path("held")
    }

    /// Restores it. Its pager supplies only what threads wait for.
    fn restore_held(&mut self, options: &[&str]) {
        fs::write(self.held(), "").unwrap();
        self.live.fault = Some(format!("pager-ahead:hold:{}", self.held().display()));
        self.live.restore(&[&["--lazy"], options].concat());
        self.live.fault = None;
        assert_eq!(self.pagers().len(), 2, "{}", self.log());
    }

    /// Lets the pager go on.
    fn let_go(&self) {
        fs::remove_file(self.held()).unwrap();
    }

    /// Returns the processes of the pager, the watcher first.
    fn pagers(&self) -> Vec<Pid> {
        pagers_of(&self.live.images())
    }

    /// Waits until the pager has ended.
    fn await_complete(&self) {
        wait_for("the end of the pager", || self.pagers().is_empty());
        assert!(self.log().contains("all memory is there"), "{}", self.log());
    }

    fn log(&self) -> String {
        fs::read_to_string(self.live.images().join("pager.log")).unwrap_or_default()
    }
}

impl Drop for Lazy {
    fn drop(&mut self) {
        for pid in self.pagers() {
            let _ = kill(pid, Signal::SIGKILL);
        }
    }
}

/// Returns the processes of pagers that read the images in `dir`, in ascending order.
fn pagers_of(dir: &Path) -> Vec<Pid> {
    let dir = dir.canonicalize().unwrap();
    let start = [b"rcriu-pager\0", dir.as_os_str().as_bytes(), b"\0"].concat();
    let pids = fs::read_dir("/proc").unwrap().flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let is_pager = |pid: &i32| {
        fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line.starts_with(&start))
    };
    let mut pids: Vec<i32> = pids.filter(is_pager).collect();
    pids.sort_unstable();
    pids.into_iter().map(Pid::from_raw).collect()
}

/// A state looks at itself while its memory is missing, and again when all
/// is there.
fn restored(name: &str, options: &[&str]) {
    let mut lazy = Lazy::dumped(name, options);
    lazy.restore_held(options);
    lazy.live.verdict();
    lazy.let_go();
    lazy.await_complete();
    let mut lazy = Lazy::dumped(name, options);
    lazy.live.restore(&[&["--lazy"], options].concat());
    lazy.await_complete();
    lazy.live.verdict();
}

macro_rules! states {
    ($($name:ident $([$($option:literal),*])?;)*) => {
        mod privileged_restored {
            $(#[test]
            fn $name() {
                super::restored(stringify!($name), &[$($($option),*)?]);
            })*
        }
    };
}

states! {
    on_demand;
    on_demand_moved;
    on_demand_forked;
    on_demand_threads;
    private_anon;
    zero_and_holes;
    private_file;
    mlocked;
    prot_none;
    growing_stack;
    brk_heap;
    cow_tree;
    guard_pages;
    mremapped;
    huge_pages;
    droppable;
    threads;
    robust_mutex;
    aio_contexts;
    shared_address_space;
    memory_policy;
    memory_merging;
}

/// The kernel shows of memory that it is missing, until it is not.
#[test]
fn privileged_mappings_are_as_they_were_in_the_end() {
    for name in ["madvised", "prot_none", "many_areas"] {
        let mut lazy = Lazy::dumped(name, &[]);
        lazy.live.restore(&["--lazy"]);
        lazy.await_complete();
        lazy.live.verdict();
    }
}

/// What one restore has touched, the next supplies first.
#[test]
fn privileged_what_was_touched_comes_first() {
    let record = ["--record", "touched"];
    let mut lazy = Lazy::dumped("on_demand_moved", &[]);
    lazy.restore_held(&record);
    lazy.live.verdict();
    lazy.let_go();
    lazy.await_complete();
    let path = lazy.live.images().join("touched");
    let touched = fs::read_to_string(&path).unwrap();
    let count = touched.lines().count() - 1;
    assert!(count > 16 && touched.starts_with("rcriu-record 1\n"), "{touched}");
    // The state has ended, but its images are still there.
    lazy.live.wait_gone();
    fs::remove_file(lazy.live.path("status.go")).unwrap();
    fs::write(lazy.live.path("status"), "ready\n").unwrap();
    lazy.restore_held(&record);
    assert!(lazy.log().contains(&format!("{count} parts are supplied first")), "{}", lazy.log());
    lazy.live.verdict();
    lazy.let_go();
    lazy.await_complete();
    let again = fs::read_to_string(&path).unwrap();
    assert!(again.starts_with(&touched), "{again}");
}

/// A server answers while its memory is missing, forks, and has all of it in the end.
#[test]
fn privileged_redis() {
    require(Cap::Ptrace);
    require(Cap::Program("redis-server"));
    let (mut live, port) = redis::populated(100_000);
    let before = redis::digest(port);
    redis::wait_idle(&live);
    live.dump(&[]);
    let mut lazy = Lazy { live };
    lazy.restore_held(&[]);
    let mut client = BufReader::new(connect(port));
    assert!(redis::redis(&mut client, &["GET", "key:4711"]).starts_with("value:4711"));
    assert!(redis::redis(&mut client, &["BGSAVE"]).contains("started"));
    assert_eq!(redis::digest(port), before);
    lazy.let_go();
    lazy.await_complete();
    wait_for("the child's snapshot", || {
        redis::redis(&mut client, &["INFO", "persistence"]).contains("rdb_bgsave_in_progress:0")
    });
    let said = redis::redis(&mut client, &["INFO", "persistence"]);
    assert!(said.contains("rdb_last_bgsave_status:ok"), "{said}");
    assert_eq!(redis::digest(port), before);
}

/// Waits until the tree has ended, and returns the log of its pager.
fn ended(lazy: &mut Lazy) -> String {
    lazy.live.wait_gone();
    wait_for("the end of the pager", || lazy.pagers().is_empty());
    lazy.log()
}

#[test]
fn privileged_a_tree_ends_with_its_pager() {
    let mut lazy = Lazy::dumped("on_demand", &[]);
    lazy.restore_held(&[]);
    let worker = lazy.pagers()[1];
    kill(worker, Signal::SIGKILL).unwrap();
    let log = ended(&mut lazy);
    let said = format!("the pager (process {worker}) was killed by SIGKILL");
    assert!(log.contains(&said), "{log}");
}

/// No process is left that could kill the tree: the kernel does.
#[test]
fn privileged_a_tree_ends_with_both_processes_of_its_pager() {
    for name in ["on_demand", "cow_tree"] {
        let mut lazy = Lazy::dumped(name, &[]);
        lazy.restore_held(&[]);
        lazy.live.tree();
        let pagers = lazy.pagers();
        for pid in &pagers {
            kill(*pid, Signal::SIGKILL).unwrap();
        }
        ended(&mut lazy);
    }
}

/// Without its watcher a pager goes on.
#[test]
fn privileged_a_watcher_may_die() {
    let mut lazy = Lazy::dumped("on_demand_moved", &[]);
    lazy.restore_held(&[]);
    kill(lazy.pagers()[0], Signal::SIGKILL).unwrap();
    lazy.live.verdict();
    lazy.let_go();
    lazy.await_complete();
}

#[test]
fn privileged_pages_that_cannot_be_read_end_the_tree() {
    let mut lazy = Lazy::dumped("on_demand", &[]);
    lazy.restore_held(&[]);
    let files = fs::read_dir(lazy.live.images()).unwrap().flatten();
    for file in files.filter(|file| file.file_name().as_bytes().starts_with(b"pages-")) {
        fs::File::options().write(true).open(file.path()).unwrap().set_len(0).unwrap();
    }
    lazy.let_go();
    let log = ended(&mut lazy);
    assert!(log.contains("read the pages of process"), "{log}");
    assert!(log.contains("the restored tree was ended"), "{log}");
}

#[test]
fn privileged_a_dump_waits_for_the_pager() {
    let mut lazy = Lazy::dumped("on_demand", &[]);
    lazy.restore_held(&["--track-mem"]);
    let again = lazy.live.path("again");
    fs::create_dir(&again).unwrap();
    let mut dump = Command::new(engine());
    dump.args(["dump", "-t", &lazy.live.root.to_string(), "-D"]).arg(&again);
    dump.args(["--prev-images-dir", "../images"]);
    let output = lazy.live.path("again.out");
    let held = lazy.held();
    let output: Output = std::thread::scope(|scope| {
        let dumping = scope.spawn(|| bounded(dump, &output));
        wait_for("a dump that waits", || {
            let sockets = fs::read_to_string("/proc/net/unix").unwrap();
            let name = "@rcriu-pager/";
            let root = format!("/{}/", lazy.live.root);
            // One that listens, and one of the dump.
            sockets.lines().filter(|line| line.contains(name) && line.contains(&root)).count() > 1
        });
        assert!(!dumping.is_finished());
        fs::remove_file(&held).unwrap();
        dumping.join().unwrap()
    });
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains("until the pager"), "{said}");
    lazy.live.wait_gone();
    lazy.live.images_name = "again";
    lazy.live.check_images();
    lazy.live.restore(&["--lazy"]);
    lazy.live.verdict();
}

/// From a mount of a chain of two, which the pager keeps busy until it has all.
#[test]
fn privileged_restored_on_demand_from_a_mount() {
    require(Cap::Ptrace);
    require(Cap::Fuse);
    let mut live = Live::workload("on_demand_forked");
    live.images_name = "first";
    live.dump_running(&["--track-mem"]);
    live.images_name = "second";
    live.dump(&["--prev-images-dir", "../first"]);
    let point = live.path("mnt");
    let mounted = Mounted::new(&live.images(), &point, &[]);
    let work = live.images();
    let output = live.try_restore_from(&point, &["--lazy", "-W", work.to_str().unwrap()]);
    assert!(output.status.success(), "{}", live.complaint(&output, "restore.log"));
    live.verdict();
    let lazy = Lazy { live };
    lazy.await_complete();
    drop(mounted);
}

/// A restore that fails leaves neither tree nor pager.
#[test]
fn privileged_a_failed_restore_ends_its_pager() {
    for fault in ["restore-files", "restore-threads", "restore-last"] {
        let mut lazy = Lazy::dumped("on_demand", &[]);
        lazy.live.fault = Some(fault.to_owned());
        let output = lazy.live.try_restore(&["--lazy"]);
        assert!(!output.status.success(), "{fault}");
        let log = ended(&mut lazy);
        assert!(log.contains("the restore has failed"), "{fault}: {log}");
    }
}
