//! Images exchanged with another program, both ways: CRIU, as Debian has it.
//!
//! What one has dumped the other restores, from the images and from a mount of them,
//! and chains that one has begun the other goes on with. The trees are our own programs,
//! which look at themselves after the restore (`tests/workloads`).
//!
//! The other program is `criu` in the directory that `RCRIU_TEST_PEER` names, else that
//! which `tests/vm/fetch` has unpacked. It needs a kernel that it starts on.

mod common;

use std::{
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use common::{
    Cap,
    live::{Live, bounded, engine, wait_for},
    mounted::Mounted,
    require,
};
use rcriu::chain::{Chain, Summary};

/// A program that dumps and restores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Program {
    /// The one under test.
    Ours,
    /// The other one.
    Peer,
}

use Program::{Ours, Peer};

impl Program {
    fn path(self) -> OsString {
        match self {
            Ours => engine(),
            Peer => peer("criu").into(),
        }
    }
}

/// Returns a program of the other ones.
fn peer(name: &str) -> PathBuf {
    let dir = std::env::var_os("RCRIU_TEST_PEER").map(PathBuf::from).or_else(|| {
        let cache = PathBuf::from(std::env::var_os("RCRIU_VM_CACHE")?);
        Some(cache.join("criu/bin"))
    });
    let dir = dir.expect("RCRIU_TEST_PEER names the directory of criu; tests/vm/run sets the like");
    let path = dir.join(name);
    assert!(path.exists(), "{} is not there: tests/vm/run --fetch", path.display());
    path
}

/// Whether the pages of a memory's parents are used in the images of a tree.
#[derive(Clone, Copy, Debug)]
struct InParent {
    private: u64,
    shared: u64,
}

/// Counts the pages that images leave to their parents.
fn in_parent(images: &Path) -> InParent {
    let dir = images.canonicalize().unwrap();
    let chain = Chain::open(&dir).unwrap();
    let id = chain.ids().find(|id| chain.snapshot(*id).dir == dir).unwrap();
    let summary = Summary::of(&chain, id).unwrap();
    InParent { private: summary.private.in_parent, shared: summary.shared.in_parent }
}

/// Dumps a state by one program and restores it by the other.
fn exchanged(name: &str, dumper: Program, restorer: Program) {
    require(Cap::Ptrace);
    let mut live = Live::workload(name);
    live.programs = (dumper.path(), restorer.path());
    let before = live.state();
    live.dump(&[]);
    live.restore(&[]);
    let after = live.state_restored(&before);
    live.verdict();
    // The other program has other ideas of what a process may see of itself.
    if (dumper, restorer) == (Ours, Ours) {
        before.restored(live.root).assert_unchanged(&after.restored(live.root));
    }
}

/// Two tests for each state.
macro_rules! states {
    ($($name:ident)*) => {
        mod privileged_for_peer {
            $(#[test]
            #[ignore = "needs Debian's criu: tests/vm/run"]
            fn $name() {
                super::exchanged(stringify!($name), super::Ours, super::Peer);
            })*
        }

        mod privileged_by_peer {
            $(#[test]
            #[ignore = "needs Debian's criu: tests/vm/run"]
            fn $name() {
                super::exchanged(stringify!($name), super::Peer, super::Ours);
            })*
        }
    };
}

states! {
    private_anon
    shared_anon
    shared_anon_parts
    shared_file
    deleted_file_mapping
    memfd_mapping
    madvised
    cow_tree
    threads
    thread_masks
    robust_mutex
    registers_general
    registers_avx
    segment_bases
    sessions
    zombies
    stopped_child
    capabilities
    limits
    handlers
    pending_process
    signal_mask
    interval_timers
    posix_timers
    blocked_read
    blocked_futex
    regular_files
    shared_offsets
    pipes
    fifo
    epoll
    timerfds
    signalfd
    unix_stream_pair
    unix_named
    tcp_listening
}

/// One link of a chain: who writes it, and how.
type Link = (Program, &'static str);

/// Takes a tree through a chain of dumps, its memory changing in between, the last of
/// which ends it. Returns it with the images.
fn chain(links: &[Link]) -> (Live, PathBuf) {
    require(Cap::Ptrace);
    let mut live = Live::workload("rounds");
    for (number, (program, command)) in links.iter().enumerate() {
        if number > 0 {
            let round = live.path("status.round");
            fs::write(&round, "").unwrap();
            wait_for("a round", || !round.exists());
        }
        let last = number + 1 == links.len();
        live.tree();
        let images = live.path(&format!("chain/{number}"));
        fs::create_dir_all(&images).unwrap();
        let mut dump = Command::new(program.path());
        dump.arg(command).args(["-t", &live.root.to_string(), "-v4", "-o", "log", "-D"]);
        dump.arg(&images).arg("--track-mem");
        if *program == Ours {
            // What the other program tracks by: then each finds the other's changes.
            dump.args(["--tracker", "soft-dirty"]);
        }
        if number > 0 {
            dump.args(["--prev-images-dir", &format!("../{}", number - 1)]);
        }
        if *command == "dump" && !last {
            dump.arg("-R");
        }
        let output = bounded(dump, &live.path("dump.out"));
        let log = fs::read_to_string(images.join("log")).unwrap_or_default();
        let end: Vec<_> = log.lines().rev().take(15).collect();
        let words = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{program:?} {command} {number}: {words}\n{end:#?}");
    }
    live.wait_gone();
    let images = live.path(&format!("chain/{}", links.len() - 1));
    (live, images)
}

/// Restores the end of a chain by a program, from the images themselves or from a mount.
fn restored(mut live: Live, images: &Path, restorer: Program, mounted: bool) {
    live.programs.1 = restorer.path();
    let written = live.path("written");
    fs::create_dir_all(&written).unwrap();
    let mount = mounted.then(|| {
        require(Cap::Fuse);
        Mounted::new(images, &live.path("mount"), &[])
    });
    let from = mount.as_ref().map_or(images, |mount| mount.point.as_path());
    let output = live.try_restore_from(from, &["-W", written.to_str().unwrap()]);
    let log = fs::read_to_string(written.join("restore.log")).unwrap_or_default();
    let end: Vec<_> = log.lines().filter(|line| line.contains("rror")).collect();
    let words = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "restore by {restorer:?}: {words}\n{end:#?}");
    drop(mount);
    live.verdict();
}

/// Each test goes through the chain anew: a tree can be restored once from it.
macro_rules! chains {
    ($($name:ident: $links:expr => $restorer:expr, $mounted:expr, $shared:expr;)*) => {
        mod privileged_chain {
            use super::{Link, Ours, Peer};

            $(#[test]
            #[ignore = "needs Debian's criu: tests/vm/run"]
            fn $name() {
                let links: &[Link] = &$links;
                let (live, images) = super::chain(links);
                let counts = super::in_parent(&images);
                assert!(counts.private > 0, "nothing is left to the parent: {counts:?}");
                // The other program stores shared memory in full in each dump.
                assert_eq!(counts.shared > 0, $shared, "{counts:?}");
                super::restored(live, &images, $restorer, $mounted);
            })*
        }
    };
}

chains! {
    by_peer: [(Peer, "pre-dump"), (Peer, "dump"), (Peer, "dump")] => Ours, false, false;
    by_peer_mounted: [(Peer, "pre-dump"), (Peer, "dump"), (Peer, "dump")] => Ours, true, false;
    by_peer_mounted_for_it: [(Peer, "dump"), (Peer, "dump")] => Peer, true, false;
    for_peer: [(Ours, "pre-dump"), (Ours, "dump"), (Ours, "dump")] => Peer, false, true;
    for_peer_mounted: [(Ours, "pre-dump"), (Ours, "dump"), (Ours, "dump")] => Peer, true, true;
    continued_by_us: [(Peer, "dump"), (Peer, "dump"), (Ours, "dump")] => Ours, false, true;
    continued_by_us_for_peer: [(Peer, "dump"), (Ours, "dump")] => Peer, false, true;
    continued_by_peer: [(Ours, "dump"), (Ours, "dump"), (Peer, "dump")] => Ours, false, false;
    continued_by_peer_for_it: [(Ours, "dump"), (Peer, "dump")] => Peer, false, false;
}

/// Takes a directory of images and says what it cannot read. Pages are no images, and
/// what the other program's version does not know is no fault.
const DECODE: &str = r#"
import os, sys
import pycriu
count = 0
for name in sorted(os.listdir(sys.argv[1])):
    if not name.endswith(".img") or name.startswith("pages-"):
        continue
    with open(os.path.join(sys.argv[1], name), "rb") as image:
        try:
            pycriu.images.load(image, pretty=True)
        except Exception as error:
            sys.exit("%s: %r" % (name, error))
    count += 1
print(count)
"#;

/// What `crit decode` does, for all images by one start of Python.
#[test]
#[ignore = "needs Debian's criu: tests/vm/run"]
fn privileged_all_images_are_decoded_by_its_library() {
    require(Cap::Ptrace);
    for name in ["rounds", "regular_files", "unix_stream_pair", "threads", "tcp_listening"] {
        let mut live = Live::workload(name);
        live.dump_running(&[]);
        let images = live.images();
        let there = fs::read_dir(&images).unwrap().flatten();
        let there = there.filter(|entry| {
            let name = entry.file_name().into_string().unwrap();
            name.ends_with(".img") && !name.starts_with("pages-")
        });
        let libraries = peer("criu").parent().unwrap().join("../usr/lib/python3/dist-packages");
        let mut decode = Command::new("/usr/bin/python3");
        decode.env("PYTHONPATH", libraries).args(["-c", DECODE]).arg(&images);
        let output = decode.output().unwrap();
        let words = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{name}: {words}");
        let count: usize = String::from_utf8_lossy(&output.stdout).trim().parse().unwrap();
        assert!(count == there.count() && count > 8, "{name}: {count}");
        // The program itself, once.
        let mut crit = Command::new(peer("crit"));
        crit.args(["decode", "-i"]).arg(images.join("inventory.img"));
        let output = crit.output().unwrap();
        assert!(String::from_utf8_lossy(&output.stdout).contains("INVENTORY"), "{output:?}");
        live.verdict();
    }
}
