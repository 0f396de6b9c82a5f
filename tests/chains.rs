//! Chains stay what they were when they were made: nothing that others need is replaced,
//! and what was replaced all the same is noticed.

mod common;

use std::{
    fs,
    os::unix::fs::symlink,
    path::Path,
    process::{Command, Output},
};

use common::{
    Cap,
    live::{Live, engine},
    mounted::{Detach, Mounted, imgfs},
    require,
};
use rcriu::image::{
    Document, ImageWriter, Kind,
    document::Content,
    proto::{InventoryEntry, PstreeEntry},
    read_all, read_one,
};

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&[&output.stdout[..], &output.stderr].concat()).into_owned()
}

fn check(chain: &Path) -> Output {
    imgfs(&["check", chain.to_str().unwrap()])
}

/// A tree that was dumped three times, each on top of the one before, and runs.
fn chain_of_three() -> Live {
    let mut live = Live::workload("cow_tree");
    let parents: [&[&str]; 3] =
        [&[], &["--prev-images-dir", "../1"], &["--prev-images-dir", "../2"]];
    for (name, parent) in ["chain/1", "chain/2", "chain/3"].into_iter().zip(parents) {
        live.images_name = name;
        live.dump_running(parent);
    }
    live
}

#[test]
fn privileged_a_dump_into_a_parent_is_refused_and_one_into_a_tip_replaces_it() {
    require(Cap::Ptrace);
    let mut live = chain_of_three();
    let chain = live.path("chain");
    let root = live.root.to_string();
    let inventory = |name: &str| fs::read(chain.join(name).join("inventory.img")).unwrap();
    let before: Vec<_> = ["1", "2", "3"].map(inventory).into();
    for (command, name, parent, child) in [
        ("dump", "1", None, "2"),
        ("pre-dump", "1", None, "2"),
        ("dump", "2", Some("../1"), "3"),
        // Its own ancestor.
        ("dump", "1", Some("../3"), "2"),
    ] {
        let mut dump = Command::new(engine());
        dump.args([command, "-t", &root, "-D"]).arg(chain.join(name));
        if command == "dump" {
            dump.arg("-R");
        }
        dump.args(parent.into_iter().flat_map(|parent| ["--prev-images-dir", parent]));
        let output = dump.output().unwrap();
        let why = said(&output);
        assert!(!output.status.success(), "{command} {name}: {why}");
        assert!(why.contains(&format!("is the parent of {child}")), "{command} {name}: {why}");
        assert!(why.contains("-D"), "{why}");
    }
    assert_eq!(before, ["1", "2", "3"].map(inventory));
    // No snapshot depends on the last.
    live.images_name = "chain/3";
    live.dump(&["--prev-images-dir", "../2"]);
    assert_ne!(before[2], inventory("3"));
    let output = check(&chain);
    assert!(output.status.success(), "{}", said(&output));
    live.restore(&[]);
    live.verdict();
}

#[test]
fn privileged_a_parent_that_was_replaced_is_noticed_by_all_who_read_it() {
    require(Cap::Ptrace);
    require(Cap::Fuse);
    let mut live = chain_of_three();
    let chain = live.path("chain");
    // Another dump of the same tree, such as a program makes that knows no chains.
    live.images_name = "other";
    live.dump(&[]);
    fs::rename(chain.join("2"), live.path("old")).unwrap();
    fs::rename(live.path("other"), chain.join("2")).unwrap();
    let why = "is not the snapshot that";
    let output = check(&chain);
    assert!(!output.status.success() && said(&output).contains(why), "{}", said(&output));
    live.images_name = "chain/3";
    let output = live.try_restore(&[]);
    let text = live.complaint(&output, "restore.log");
    assert!(!output.status.success() && text.contains(why), "{text}");
    let (tip, out) = (chain.join("3"), live.path("flat"));
    let output = imgfs(&["flatten", tip.to_str().unwrap(), out.to_str().unwrap()]);
    assert!(!output.status.success() && said(&output).contains(why), "{}", said(&output));
    assert!(!out.exists());
    let mounted = Mounted::new(&tip, &live.path("mnt"), &[]);
    let pages = fs::read_dir(&mounted.point).unwrap().flatten().map(|entry| entry.path());
    let pages = pages.filter(|path| path.to_str().unwrap().contains("/pages-"));
    let failed = pages.filter(|path| fs::read(path).is_err()).count();
    assert!(failed > 0);
    drop(mounted);
    // The right one, elsewhere, by an absolute link.
    fs::remove_file(chain.join("3/parent")).unwrap();
    symlink(live.path("old"), chain.join("3/parent")).unwrap();
    // Its own parent is where its link says from there.
    fs::remove_file(live.path("old/parent")).unwrap();
    symlink(chain.join("1"), live.path("old/parent")).unwrap();
    live.restore(&[]);
    live.verdict();
}

/// Copies the fixture, a chain of three that CRIU wrote, and returns it with its parts.
fn fixture() -> (tempfile::TempDir, [std::path::PathBuf; 3]) {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/criu42-chain/chain");
    let root = tempfile::tempdir().unwrap();
    let dirs = ["1", "2", "3"].map(|name| root.path().join(name));
    for dir in &dirs {
        let from = from.join(dir.file_name().unwrap());
        fs::create_dir(dir).unwrap();
        for entry in fs::read_dir(from).unwrap().flatten() {
            let target = dir.join(entry.file_name());
            if entry.file_type().unwrap().is_symlink() {
                symlink(fs::read_link(entry.path()).unwrap(), target).unwrap();
            } else {
                fs::copy(entry.path(), target).unwrap();
            }
        }
    }
    (root, dirs)
}

fn write<M: prost::Message>(path: &Path, kind: Kind, messages: &[M]) {
    fs::remove_file(path).unwrap();
    let mut image = ImageWriter::create(path, kind).unwrap();
    messages.iter().for_each(|message| image.message(message).unwrap());
    image.finish().unwrap();
}

#[test]
fn privileged_a_mount_says_what_is_broken_and_why_a_read_failed() {
    require(Cap::Fuse);
    let (root, dirs) = fixture();
    let chain = root.path().to_str().unwrap();
    let point = tempfile::tempdir().unwrap();
    let mnt = point.path().to_str().unwrap();
    let detach = || Detach(point.path().to_owned());
    let whole = imgfs(&["mount", chain, mnt]);
    let mounted = detach();
    assert!(whole.status.success() && !said(&whole).contains("warning:"), "{}", said(&whole));
    assert_eq!(said(&imgfs(&["log", mnt])), "");
    drop(mounted);
    // What a glance tells: the snapshot itself. What only a read finds: the base.
    let cut = |path: &Path, len: u64| {
        fs::File::options().write(true).open(path).unwrap().set_len(len).unwrap();
    };
    cut(&dirs[2].join("pages-1.img"), 8192);
    cut(&dirs[0].join("pages-1.img"), 8192);
    let output = imgfs(&["mount", chain, mnt]);
    let mounted = detach();
    let text = said(&output);
    assert!(output.status.success(), "{text}");
    assert!(text.contains("3/pages-1.img is cut short: it has 8192 bytes"), "{text}");
    assert!(
        text.contains("`imgfs check") && text.contains(&format!("`imgfs log {mnt}`")),
        "{text}"
    );
    for name in ["pages-1.img", "pages-2.img", "pages-3.img"] {
        let _ = fs::read(point.path().join(name));
        let _ = fs::read(point.path().join("snapshots/1").join(name));
    }
    let log = said(&imgfs(&["log", mnt]));
    assert!(log.contains("error: read /") && log.contains("pages-1.img is cut short"), "{log}");
    assert!(log.contains(dirs[0].to_str().unwrap()), "{log}");
    // It is for the user who mounted, and for root.
    let stranger = Command::new("setpriv")
        .args(["--reuid=65534", "--regid=65534", "--clear-groups", "--"])
        .args([common::mounted::IMGFS, "log", mnt])
        .output()
        .unwrap();
    assert!(!stranger.status.success());
    drop(mounted);
    let not_mounted = imgfs(&["log", mnt]);
    assert!(said(&not_mounted).contains("nothing is mounted"), "{}", said(&not_mounted));
}

#[test]
fn versions_that_are_not_known_are_refused_and_named() {
    let (root, dirs) = fixture();
    let chain = root.path().to_str().unwrap();
    let path = dirs[0].join("inventory.img");
    let mut inventory: InventoryEntry = read_one(&path, Kind::Inventory).unwrap();
    assert_eq!(inventory.img_version, 2);
    for (version, known) in [(1, true), (0, false), (3, false)] {
        inventory.img_version = version;
        write(&path, Kind::Inventory, &[inventory.clone()]);
        let out = root.path().join(format!("flat{version}"));
        let flatten = imgfs(&["flatten", "--snapshot", "3", chain, out.to_str().unwrap()]);
        let restore = Command::new(engine()).args(["restore", "-D"]).arg(&dirs[0]).output();
        let why = format!("have format version {version}");
        for (output, can_be_whole) in
            [(check(root.path()), true), (flatten, true), (restore.unwrap(), false)]
        {
            let text = said(&output);
            assert_eq!(text.contains(&why), !known, "{text}");
            assert!(!can_be_whole || output.status.success() == known, "{text}");
        }
        let _ = fs::remove_dir_all(&out);
    }
}

#[test]
fn what_a_restore_refuses_is_what_check_tells() {
    type Break = fn(&Path);
    fn pstree(dir: &Path, change: impl Fn(&mut Vec<PstreeEntry>)) {
        let path = dir.join("pstree.img");
        let mut entries: Vec<PstreeEntry> = read_all(&path, Kind::Pstree).unwrap();
        change(&mut entries);
        write(&path, Kind::Pstree, &entries);
    }
    fn field(path: &Path, entry: usize, change: impl Fn(&mut prost_reflect::DynamicMessage)) {
        let mut image = Document::read(path).unwrap();
        let Content::Entries(entries) = &mut image.content else { panic!("it has entries") };
        change(entries[entry].message.get_mut());
        let mut bytes = Vec::new();
        image.write(path, &mut bytes).unwrap();
        fs::write(path, bytes).unwrap();
    }
    fn area(dir: &Path, change: impl Fn(&mut rcriu::image::proto::MmEntry)) {
        let path = dir.join("mm-293.img");
        let mut mm = read_one(&path, Kind::Mm).unwrap();
        change(&mut mm);
        write(&path, Kind::Mm, &[mm]);
    }
    let breaks: [(Break, &str); 9] = [
        (|dir| pstree(dir, |tree| tree.push(tree[0].clone())), "names a process twice"),
        (|dir| pstree(dir, |tree| tree[0].ppid = tree[1].pid), "0 processes without a parent"),
        (
            |dir| pstree(dir, |tree| tree[1].threads = vec![tree[1].pid, tree[0].pid]),
            "is also a thread of process",
        ),
        (|dir| area(dir, |mm| mm.vmas[1].start = mm.vmas[0].start), "overlaps the mapping before"),
        (|dir| area(dir, |mm| mm.vmas[1].end += 1), "is not page-aligned"),
        (|dir| area(dir, |mm| mm.vmas[1].end = 1 << 60), "above the highest address"),
        (|dir| area(dir, |mm| mm.exe_file_id = 77), "its program is file 0x4d, which has no path"),
        (
            |dir| {
                field(&dir.join("fdinfo-2.img"), 0, |fd| {
                    fd.set_field_by_name("id", prost_reflect::Value::U32(77));
                });
            },
            "is file 0x4d, which files.img does not have",
        ),
        (
            |dir| {
                let path = dir.join("core-293.img");
                let mut core: rcriu::image::proto::CoreEntry = read_one(&path, Kind::Core).unwrap();
                core.thread_info.as_mut().unwrap().fpregs.st_space.truncate(31);
                write(&path, Kind::Core, &[core]);
            },
            "st_space has 124 bytes, 128 expected",
        ),
    ];
    for (damage, why) in breaks {
        let (root, dirs) = fixture();
        damage(&dirs[2]);
        let output = check(root.path());
        assert!(
            !output.status.success() && said(&output).contains(why),
            "{why}: {}",
            said(&output)
        );
        let output = Command::new(engine()).args(["restore", "-D"]).arg(&dirs[2]).output().unwrap();
        assert!(!output.status.success(), "{why}");
        assert!(said(&output).contains(why), "{why}: {}", said(&output));
    }
}
