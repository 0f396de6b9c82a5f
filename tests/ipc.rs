//! Trees in IPC namespaces of their own: chains, failures. All of it needs root.

mod common;

use std::{fs, process::Command};

use common::{
    Cap,
    live::{Live, engine},
    require,
};
use rcriu::image::{Directory, ImageStore, Kind, MemoryId, Presence};

/// Returns how many pages of shared memory a snapshot holds itself, and in how many memories.
fn stored(live: &Live) -> (u64, usize) {
    let images = Directory::at(live.images());
    let (mut pages, mut memories) = (0, 0);
    for name in images.list().unwrap() {
        let Some(memory @ MemoryId::Shared(_)) = MemoryId::of_pagemap(&name) else { continue };
        memories += 1;
        let pagemap = (&images as &dyn ImageStore).whole_pagemap(memory).unwrap();
        let entries = pagemap.entries.iter();
        let present = entries.filter(|entry| entry.presence == Presence::Present);
        pages += present.map(|entry| entry.pages).sum::<u64>();
    }
    (pages, memories)
}

/// Segments that did not change are stored once, attached or not; everything comes back from a mount.
#[test]
fn privileged_segments_are_stored_once_in_a_chain() {
    require(Cap::Ptrace);
    let mut live = Live::workload("ipc_namespace_segments");
    let mut first = (0, 0);
    live.through_a_chain(&[], |live| first = stored(live));
    // Three of 20,000 bytes, and an empty one.
    assert_eq!(first, (15, 4));
    assert_eq!(stored(&live), (0, 4));
    live.verdict();
}

/// The second life is like the first.
#[test]
fn privileged_a_namespace_comes_back_twice() {
    require(Cap::Ptrace);
    let mut live = Live::workload("ipc_namespace");
    live.dump(&[]);
    live.restore(&[]);
    live.images_name = "again";
    live.dump(&[]);
    live.restore(&[]);
    live.verdict();
}

/// A restore that fails late leaves no process, and so no namespace.
#[test]
fn privileged_a_failed_restore_leaves_nothing() {
    require(Cap::Ptrace);
    let mut live = Live::workload("ipc_namespace_segments");
    live.dump(&[]);
    for point in ["restore-root", "restore-files", "restore-last", "restore-last:kill"] {
        let mut command = Command::new(engine());
        command.env("RCRIU_FAULT", point).args(["restore", "-d", "-D"]).arg(live.images());
        assert!(!command.output().unwrap().status.success(), "{point}");
        live.wait_gone();
    }
    live.restore(&[]);
    live.verdict();
}

/// Broken images are named, and nothing is made.
#[test]
fn privileged_a_missing_image_is_named() {
    require(Cap::Ptrace);
    let mut live = Live::workload("ipc_namespace");
    live.dump(&[]);
    let name = Kind::IpcVar.file_name(11);
    let (image, aside) = (live.images().join(&name), live.path("aside"));
    fs::rename(&image, &aside).unwrap();
    let output = live.try_restore(&[]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains(&format!("there is no {name}")), "{said}");
    fs::rename(&aside, &image).unwrap();
    live.restore(&[]);
    live.verdict();
}
