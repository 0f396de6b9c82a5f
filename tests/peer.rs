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
    process::{Command, Output},
};

use common::{
    Cap,
    live::{Live, bounded, engine, wait_for},
    mounted::Mounted,
    require, stored_bytes,
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
fn peer(name: &'static str) -> PathBuf {
    require(Cap::Peer(name));
    common::peer(name).expect("it is there")
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
    let id = chain.at(&dir).unwrap();
    let summary = Summary::of(&chain, id).unwrap();
    InParent { private: summary.private.in_parent, shared: summary.shared.in_parent }
}

/// Dumps a state by one program and restores it by the other.
fn exchanged(name: &str, dumper: Program, restorer: Program) {
    require(Cap::Ptrace);
    require(Cap::Peer("criu"));
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
            fn $name() {
                super::exchanged(stringify!($name), super::Ours, super::Peer);
            })*
        }

        mod privileged_by_peer {
            $(#[test]
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
    udp
}

/// One link of a chain: the program that writes it, and how.
type Link = (Program, &'static str);

/// A dump that the kernel's tracking is not used for.
const UNTRACKED: &str = "dump untracked";

/// Takes a tree through a chain of dumps, its memory changing in between, the last of
/// which ends it. Returns it with the images.
fn chain(links: &[Link]) -> (Live, PathBuf) {
    require(Cap::Ptrace);
    require(Cap::Peer("criu"));
    let mut live = Live::workload("rounds");
    for number in 0..links.len() {
        if let Err(problem) = link(&mut live, links, number) {
            panic!("{problem}");
        }
    }
    live.wait_gone();
    let images = live.path(&format!("chain/{}", links.len() - 1));
    (live, images)
}

/// Adds a link to a chain.
fn link(live: &mut Live, links: &[Link], number: usize) -> Result<(), String> {
    let (program, how) = links[number];
    let command = how.split(' ').next().unwrap();
    if number > 0 {
        let round = live.path("status.round");
        fs::write(&round, "").unwrap();
        wait_for("a round", || !round.exists());
    }
    live.tree();
    let images = live.path(&format!("chain/{number}"));
    fs::create_dir_all(&images).unwrap();
    let mut dump = Command::new(program.path());
    dump.arg(command).args(["-t", &live.root.to_string(), "-v4", "-o", "log", "-D"]);
    dump.arg(&images);
    if how != UNTRACKED {
        dump.arg("--track-mem");
        if program == Ours {
            // What the other program tracks by: then each finds the other's changes.
            dump.args(["--tracker", "soft-dirty"]);
        }
    }
    if number > 0 {
        dump.args(["--prev-images-dir", &format!("../{}", number - 1)]);
    }
    if command == "dump" && number + 1 < links.len() {
        dump.arg("-R");
    }
    let output = bounded(dump, &live.path("dump.out"));
    if output.status.success() {
        return Ok(());
    }
    let log = fs::read(images.join("log")).unwrap_or_default();
    let log = String::from_utf8_lossy(&log).into_owned();
    let errors: Vec<_> = log.lines().filter(|line| line.contains("rror")).collect();
    let words = String::from_utf8_lossy(&output.stderr).into_owned();
    Err(format!("{program:?} {how} {number}: {} {words}\n{errors:#?}", output.status))
}

/// Restores the end of a chain by a program, from the images themselves or from a mount.
fn restored(live: Live, images: &Path, restorer: Program, mounted: bool) {
    let mount = mounted.then(|| mount(&live, images, &[]));
    let from = mount.as_ref().map_or(images, |mount| mount.point.as_path());
    let live = restore(live, from, restorer, &[]);
    drop(mount);
    live.verdict();
}

fn mount(live: &Live, images: &Path, options: &[&str]) -> Mounted {
    require(Cap::Fuse);
    Mounted::new(images, &live.path("mount"), options)
}

fn restore(mut live: Live, from: &Path, restorer: Program, options: &[&str]) -> Live {
    live.programs.1 = restorer.path();
    let written = live.path("written");
    fs::create_dir_all(&written).unwrap();
    let options = [&["-W", written.to_str().unwrap()], options].concat();
    let output = live.try_restore_from(from, &options);
    let log = fs::read_to_string(written.join("restore.log")).unwrap_or_default();
    let end: Vec<_> = log.lines().filter(|line| line.contains("rror")).collect();
    let words = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "restore by {restorer:?}: {words}\n{end:#?}");
    live
}

/// Each test goes through the chain anew: a tree can be restored once from it.
macro_rules! chains {
    ($($name:ident: $links:expr => $restorer:expr, $mounted:expr, $in_parent:expr;)*) => {
        mod privileged_chain {
            use super::{Link, Ours, Peer};

            $(#[test]
            fn $name() {
                let links: &[Link] = &$links;
                let (live, images) = super::chain(links);
                let counts = super::in_parent(&images);
                assert_eq!((counts.private > 0, counts.shared > 0), $in_parent, "{counts:?}");
                super::restored(live, &images, $restorer, $mounted);
            })*
        }
    };
}

// Last, whether private and shared pages are left to the parent. The other program stores
// shared memory in full in each dump.
chains! {
    by_peer: [(Peer, "pre-dump"), (Peer, "dump"), (Peer, "dump")] => Ours, false, (true, false);
    by_peer_mounted:
        [(Peer, "pre-dump"), (Peer, "dump"), (Peer, "dump")] => Ours, true, (true, false);
    by_peer_mounted_for_it: [(Peer, "dump"), (Peer, "dump")] => Peer, true, (true, false);
    for_peer: [(Ours, "pre-dump"), (Ours, "dump"), (Ours, "dump")] => Peer, false, (true, true);
    for_peer_mounted:
        [(Ours, "pre-dump"), (Ours, "dump"), (Ours, "dump")] => Peer, true, (true, true);
    continued_by_us:
        [(Peer, "dump"), (Peer, "dump"), (Ours, "dump")] => Ours, false, (true, true);
    continued_by_us_for_peer: [(Peer, "dump"), (Ours, "dump")] => Peer, false, (true, true);
    continued_by_peer: [(Ours, "dump"), (Peer, "dump")] => Ours, false, (true, false);
    continued_by_peer_for_it: [(Ours, "dump"), (Peer, "dump")] => Peer, false, (true, false);
    continued_by_peer_untracked:
        [(Ours, "dump"), (Ours, "dump"), (Peer, super::UNTRACKED)] => Ours, false, (false, false);
}

/// Returns the bytes on disk of all pages files of a chain.
fn room(chain: &Path) -> u64 {
    let directories = fs::read_dir(chain).unwrap().flatten();
    let files = directories.flat_map(|dir| fs::read_dir(dir.path()).unwrap().flatten());
    let pages = files.filter(|file| file.file_name().to_string_lossy().starts_with("pages-"));
    pages.map(|file| stored_bytes(&file.path())).sum()
}

fn imgfs(command: &str, path: &Path) -> Output {
    Command::new(env!("CARGO_BIN_EXE_imgfs")).arg(command).arg(path).output().unwrap()
}

/// What the other program frees as it restores is freed in whichever directory holds it.
fn freed(links: &[Link], mode: &str) {
    let (live, images) = chain(links);
    let chain = live.path("chain");
    let before = room(&chain);
    let mount = mount(&live, &images, &[mode]);
    let live = restore(live, &mount.point, Peer, &["--auto-dedup"]);
    live.verdict();
    if mode == "--punch=commit" {
        assert_eq!(room(&chain), before);
        let output = imgfs("commit", &mount.point);
        assert!(output.status.success(), "{output:?}");
    }
    drop(mount);
    let after = room(&chain);
    // What the last dump has superseded in the one before stays.
    assert!(after < before / 3, "{before} bytes of pages before, and {after} afterwards");
    let words = String::from_utf8(imgfs("check", &chain).stdout).unwrap();
    assert!(words.contains("freed"), "imgfs check tells what is gone: {words}");
}

#[test]
fn privileged_freed_by_peer_through_a_mount() {
    freed(&[(Ours, UNTRACKED), (Ours, UNTRACKED)], "--punch");
}

#[test]
fn privileged_freed_by_peer_through_a_mount_when_told() {
    freed(&[(Peer, "dump"), (Peer, "dump")], "--punch=commit");
}

/// What the README says of such chains: a page that has become zero is in no image of
/// ours, and the other program wants every page that it leaves to the parent to be there.
#[test]
fn privileged_a_page_that_became_zero_keeps_the_peer_from_going_on() {
    require(Cap::Ptrace);
    require(Cap::Peer("criu"));
    let mut live = Live::workload("rounds");
    let links = [(Ours, "dump"), (Ours, "dump"), (Peer, "dump")];
    for number in 0..2 {
        link(&mut live, &links, number).unwrap();
    }
    let problem = link(&mut live, &links, 2).unwrap_err();
    assert!(problem.contains("not found in parent"), "{problem}");
    live.verdict();
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
fn privileged_all_images_are_decoded_by_its_library() {
    require(Cap::Ptrace);
    require(Cap::Peer("criu"));
    for name in ["rounds", "unix_stream_pair"] {
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

/// What the peer restores is tried on one kernel, and what it dumps on the other.
#[test]
fn tests_of_machines_exist() {
    common::machines::tell(&[
        ("privileged_chain::", &["6.1", "6.12"]),
        ("privileged_for_peer::", &["6.1"]),
        ("privileged_by_peer::", &["6.12"]),
        ("privileged_freed_by_peer_", &["6.1", "6.12"]),
        ("privileged_a_page_that_became_zero_keeps_the_peer_from_going_on", &["6.1"]),
        ("privileged_all_images_are_decoded_by_its_library", &["6.1"]),
    ]);
}
