//! Checkpoints in archives, as users meet them.

mod common;

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use common::{
    Cap,
    mounted::{Mounted, imgfs},
    require,
};
use serde_json::Value;
use tempfile::TempDir;

/// A chain of three snapshots that CRIU wrote, of processes 293 and 295.
fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/criu42-chain/chain")
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[track_caller]
fn sh(script: &str) -> String {
    let output = Command::new("bash").args(["-euo", "pipefail", "-c", script]).output().unwrap();
    assert!(output.status.success(), "{script}: {}", said(&output));
    String::from_utf8(output.stdout).unwrap()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&[&output.stdout[..], &output.stderr].concat()).into_owned()
}

#[track_caller]
fn fine(output: &Output) -> String {
    assert!(output.status.success(), "{}", said(output));
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// The error of a command that fails.
#[track_caller]
fn problem(arguments: &[&str]) -> String {
    let output = imgfs(arguments);
    assert!(!output.status.success(), "{arguments:?}: {}", said(&output));
    assert_eq!(output.stdout, b"", "{arguments:?}");
    String::from_utf8(output.stderr).unwrap()
}

/// A checkpoint as Podman exports it: `pre-checkpoint` in one archive and `checkpoint`, whose
/// parent that is, in another.
struct Exported {
    dir: TempDir,
}

/// What Podman and CRI-O write beside the images.
const BESIDE: [&str; 4] = ["config.dump", "spec.dump", "stats-dump", "network.status"];

impl Exported {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let tree = dir.path().join("tree");
        fs::create_dir(&tree).unwrap();
        let copy = |from: &str, to: &str| {
            let (from, to) = (fixture().join(from), tree.join(to));
            sh(&format!("cp -a {} {}", text(&from), text(&to)));
            fs::remove_file(to.join("parent")).unwrap_or(());
        };
        copy("1", "pre-checkpoint");
        copy("2", "checkpoint");
        symlink("../pre-checkpoint", tree.join("checkpoint/parent")).unwrap();
        for name in BESIDE {
            fs::write(tree.join(name), format!("{{\"file\":\"{name}\"}}")).unwrap();
        }
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Makes an archive of some of the tree.
    fn pack(&self, name: &str, members: &str) -> PathBuf {
        let path = self.path(name);
        sh(&format!("tar -C {} -caf {} {members}", text(&self.path("tree")), text(&path)));
        path
    }

    /// The chain as it was before.
    fn directory(&self) -> PathBuf {
        self.path("tree")
    }
}

/// Commands that look at a chain, with what they are told besides.
const LOOKS: &[&[&str]] = &[
    &["check"],
    &["ls", "--duplicates"],
    &["ps"],
    &["ps", "--json"],
    &["fds"],
    &["maps", "293"],
    &["cat", "proc/293/status"],
    &["cat", "json/core-293.img.json"],
    &["cat", "pages-1.img"],
    &["cat", "mem/295/maps"],
];

/// Checks that every command answers for an archive as it does for the directory.
#[track_caller]
fn assert_same(directory: &Path, archive: &Path, options: &[&str], names: [&str; 2]) {
    let ask = |chain: &Path, words: &[&str], options: &[&str]| {
        let words = [&words[..1], &[text(chain)], &words[1..], options].concat();
        let output = imgfs(&words);
        (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let diff: &[&str] = &["diff", names[0], names[1]];
    for words in LOOKS.iter().chain([&diff]) {
        let expected = ask(directory, words, &[]);
        let found = ask(archive, words, options);
        assert_eq!(found, expected, "{words:?} {}", archive.display());
    }
    let listed = |chain: &Path, options: &[&str]| {
        let (_, json) = ask(chain, &["ls", "--json"], options);
        let document: Value = serde_json::from_str(&json).unwrap();
        // An archive has whole seconds.
        let field = |snapshot: &Value, name: &str| match name {
            "date" => snapshot[name].as_str().unwrap()[.."2026-11-30T06:23:57".len()].into(),
            _ => snapshot[name].clone(),
        };
        let fields = ["name", "parent", "date", "processes", "pages", "flat_bytes"];
        let rows = document["snapshots"].as_array().unwrap().iter();
        rows.map(|row| fields.map(|name| field(row, name))).collect::<Vec<_>>()
    };
    assert_eq!(listed(archive, options), listed(directory, &[]));
    assert!(ask(archive, &["info"], options).1.contains("Snapshot:"));
    let outs = [(directory, &[][..]), (archive, options)].map(|(chain, options)| {
        let out = tempfile::tempdir().unwrap();
        let words = [&["flatten", text(chain), text(out.path())], options].concat();
        fine(&imgfs(&words));
        out
    });
    sh(&format!("diff -r {} {}", text(outs[0].path()), text(outs[1].path())));
}

#[test]
fn an_archive_answers_every_command_as_the_directory_does() {
    let exported = Exported::new();
    let tree = exported.directory();
    let names = ["pre-checkpoint", "checkpoint"];
    assert_same(&tree, &exported.pack("a.tar", "."), &[], names);
    // With the directory's own name in front, and sparse.
    let outer = exported.path("outer.tar");
    sh(&format!("tar -C {} --format=posix -Scf {} tree", text(exported.dir.path()), text(&outer)));
    assert_same(&tree, &outer, &[], names);
}

#[test]
fn parents_are_found_in_another_archive() {
    let exported = Exported::new();
    let tree = exported.directory();
    let pre = exported.pack("pre.tar", "pre-checkpoint config.dump");
    let last = exported.pack("last.tar", "checkpoint config.dump");
    let previous = ["--previous", text(&pre)];
    assert_same(&tree, &last, &previous, ["pre-checkpoint", "checkpoint"]);

    let output = imgfs(&["ls", text(&last)]);
    assert_eq!(output.status.code(), Some(1));
    let said = said(&output);
    assert!(said.contains("leads to ../pre-checkpoint"), "{said}");
    assert!(said.contains("give it with --previous ARCHIVE"), "{said}");
    let problem = problem(&["ls", text(&tree), "--previous", text(&pre)]);
    assert!(problem.contains("only an archive takes"), "{problem}");
    let gone = exported.path("gone.tar");
    let problem = self::problem(&["ls", text(&last), "--previous", text(&gone)]);
    assert!(problem.contains("gone.tar: No such file"), "{problem}");

    // Archives of one image directory each.
    let alone = |name: &str| {
        let path = exported.path(&format!("{name}.tar"));
        sh(&format!("tar -C {}/{name} -cf {} .", text(&tree), text(&path)));
        path
    };
    let (base, tip) = (alone("pre-checkpoint"), alone("checkpoint"));
    let listed = fine(&imgfs(&["ls", text(&tip), "--previous", text(&base)]));
    assert!(listed.contains("pre-checkpoint.tar"), "{listed}");
    assert_eq!(imgfs(&["check", text(&tip), "--previous", text(&base)]).status.code(), Some(0));
}

#[test]
fn privileged_a_mounted_archive_is_the_mounted_directory() {
    require(Cap::Fuse);
    let exported = Exported::new();
    let (pre, last) = (exported.pack("pre.tar", "pre-checkpoint"), exported.pack("b.tar", "."));
    let directory = Mounted::new(&exported.directory(), &exported.path("m1"), &[]);
    let archive = Mounted::new(&last, &exported.path("m2"), &[]);
    let compare = |one: &Mounted, other: &Mounted| {
        sh(&format!("diff -r --no-dereference {} {}", text(&one.point), text(&other.point)));
    };
    compare(&directory, &archive);
    drop(archive);
    let alone = exported.pack("alone.tar", "checkpoint");
    let option = format!("previous={}", text(&pre));
    let archive = Mounted::new(&alone, &exported.path("m2"), &["-o", &option]);
    compare(&directory, &archive);
    // It can be read only.
    let point = exported.path("m3");
    fs::create_dir(&point).unwrap();
    assert!(
        problem(&["mount", text(&alone), text(&point), "--punch"]).contains("can only be read")
    );
    // The daemon leaves the working directory.
    let script = format!(
        "cd {} && {} mount alone.tar m3 --previous pre.tar && diff -r --no-dereference m1 m3; \
         {} umount m3",
        text(exported.dir.path()),
        env!("CARGO_BIN_EXE_imgfs"),
        env!("CARGO_BIN_EXE_imgfs"),
    );
    sh(&script);
}

#[test]
fn rcriu_says_how_an_archive_is_restored() {
    let exported = Exported::new();
    let archive = exported.pack("a.tar", ".");
    let output = Command::new(env!("CARGO_BIN_EXE_rcriu"))
        .args(["restore", "-D", text(&archive)])
        .current_dir(exported.dir.path())
        .output()
        .unwrap();
    assert!(!output.status.success());
    let said = said(&output);
    assert!(said.contains("imgfs mount ARCHIVE DIR"), "{said}");
}
