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
    mounted::{Mounted, imgfs},
    require,
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
    // Nobody depends on the last.
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
