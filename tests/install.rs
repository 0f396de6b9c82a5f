//! `mnt-scripts/install` and the Debian package: what they install works, and all of it can
//! be removed again.
//!
//! The tests install below directories of their own. They build the programs in release
//! mode if that was not done before.

mod common;

use std::{
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

fn install(root: &Path, options: &[&str]) -> Output {
    Command::new("bash")
        .arg("mnt-scripts/install")
        .arg("--destdir")
        .arg(root)
        .args(["--prefix", "/opt/rcriu"])
        .args(options)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("bash is there")
}

fn files(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).expect("the directory can be listed") {
        let path = entry.expect("the entry can be read").path();
        if path.is_dir() && !path.is_symlink() {
            files(&path, found);
        } else {
            found.push(path);
        }
    }
}

fn version(program: &Path) -> String {
    let output = Command::new(program).arg("--version").output().expect("it can be run");
    assert!(output.status.success(), "{}: {output:?}", program.display());
    String::from_utf8(output.stdout).expect("it prints text")
}

#[test]
fn what_is_installed_works_and_can_be_removed() {
    let root = tempfile::tempdir().expect("a directory can be made");
    let prefix = root.path().join("opt/rcriu");
    let output = install(root.path(), &["--as-criu"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));

    assert!(version(&prefix.join("bin/rcriu")).starts_with("rcriu "));
    assert!(version(&prefix.join("bin/imgfs")).starts_with("imgfs "));
    version(&prefix.join("sbin/criu"));
    let page = |name: &str| fs::read_to_string(prefix.join("share/man").join(name)).expect(name);
    assert!(page("man1/rcriu-dump.1").contains("leave\\-running"));
    assert!(page("man1/imgfs-mount.1").contains("MOUNTPOINT"));
    assert!(page("man8/mount.imgfs.8").contains("fstab"));
    for command in ["rcriu", "rcriu-restore", "rcriu-check", "rcriu-dedup", "imgfs", "imgfs-ls"] {
        page(&format!("man1/{command}.1"));
    }
    for file in [
        "share/bash-completion/completions/rcriu",
        "share/zsh/site-functions/_imgfs",
        "share/fish/vendor_completions.d/rcriu.fish",
    ] {
        let text = fs::read_to_string(prefix.join(file)).expect(file);
        assert!(text.contains("restore") || text.contains("umount"), "{file} completes nothing");
    }
    assert!(prefix.join("lib/systemd/system/imgfs@.service").is_file());
    let helper = Command::new(root.path().join("usr/sbin/mount.imgfs"))
        .args(["chain", "dir", "-f"])
        .status()
        .expect("the helper can be run");
    assert!(helper.success());
    let completion = prefix.join("share/bash-completion/completions/imgfs");
    let loaded = Command::new("bash").arg("-n").arg(&completion).status().expect("bash is there");
    assert!(loaded.success(), "the completion is no bash");

    // Once more over it, and gone.
    assert!(install(root.path(), &[]).status.success());
    let output = install(root.path(), &["--uninstall"]);
    assert!(output.status.success(), "{output:?}");
    let mut left = Vec::new();
    files(root.path(), &mut left);
    assert_eq!(left, Vec::<PathBuf>::new());
    let output = install(root.path(), &["--uninstall"]);
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("is not there"), "{output:?}");
}

/// Under the name of CRIU, the program says what scripts look for, and reads CRIU's files.
#[test]
fn a_link_named_criu_behaves_as_criu() {
    let dir = tempfile::tempdir().expect("a directory can be made");
    let criu = dir.path().join("criu");
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_rcriu"), &criu).expect("a link can be made");
    let run = |words: &[&str]| {
        let mut command = Command::new(&criu);
        command.args(words).env("HOME", dir.path()).current_dir(dir.path());
        let output = command.output().expect("it can be run");
        let said = [output.stdout, output.stderr].concat();
        (output.status.code(), String::from_utf8(said).expect("it prints text"))
    };
    for words in [["-V"].as_slice(), &["--version"], &["--vers"], &["dump", "-V"]] {
        let (code, said) = run(words);
        assert!(code == Some(0) && said.starts_with("Version: 4.2\n"), "{words:?}: {said}");
    }
    assert_eq!(run(&["check", "--feature", "openat2"]).0, Some(0));
    assert_eq!(run(&["check", "--feature", "no-such-feature"]).0, Some(1));
    for (refused, expected) in [("exec", 255), ("lazy-pages", 1)] {
        let (code, said) = run(&[refused, "-t", "1"]);
        assert!(code == Some(expected) && said.contains(refused), "{refused}: {said}");
    }
    assert_eq!(run(&["cpuinfo", "dump"]).0, Some(0));
    assert_eq!(run(&["cpuinfo", "check", "-o", "log", "-v4"]).0, Some(0));
    assert!(dir.path().join("log").exists() && dir.path().join("cpuinfo.img").exists());
    for (home, is_read) in [(".rcriu", false), (".criu", true)] {
        fs::create_dir(dir.path().join(home)).expect("it can be made");
        fs::write(dir.path().join(home).join("default.conf"), "no-such-option\n")
            .expect("it can be written");
        let (code, said) = run(&["check", "--feature", "openat2"]);
        assert_eq!(code == Some(1) && said.contains("line 1"), is_read, "{said}");
    }
}

/// Runs dpkg on a root directory of the test's own.
fn dpkg(root: &Path, arguments: &[&OsStr]) -> Output {
    let mut command = Command::new("dpkg");
    command.arg(format!("--root={}", root.display())).args(arguments);
    command.output().expect("dpkg is there")
}

#[test]
fn privileged_the_debian_package_can_be_installed_and_removed() {
    common::require(common::Cap::Ptrace);
    common::require(common::Cap::Program("dpkg"));
    let cargo_deb = Command::new("cargo").args(["deb", "--version"]).output();
    if !cargo_deb.is_ok_and(|output| output.status.success()) {
        common::skip("cargo-deb (cargo install --locked cargo-deb)");
    }
    let dir = tempfile::tempdir().expect("a directory can be made");
    let output = Command::new("bash")
        .arg("mnt-scripts/deb")
        .arg(dir.path())
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("bash is there");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let package = String::from_utf8(output.stdout).expect("it prints a path");
    let package = Path::new(package.trim());

    let root = dir.path().join("root");
    let database = root.join("var/lib/dpkg");
    fs::create_dir_all(database.join("info")).expect("it can be made");
    fs::create_dir_all(database.join("updates")).expect("it can be made");
    fs::write(database.join("status"), "").expect("it can be written");
    let output = dpkg(&root, &["--install".as_ref(), package.as_os_str()]);
    assert!(output.status.success(), "{output:?}");
    let usr = root.join("usr");
    assert!(version(&usr.join("bin/rcriu")).starts_with("rcriu "));
    assert!(version(&usr.join("bin/imgfs")).starts_with("imgfs "));
    let helper = Command::new(usr.join("sbin/mount.imgfs"))
        .args(["chain", "dir", "-f"])
        .status()
        .expect("the helper can be run");
    assert!(helper.success());
    let page = |name: &str| {
        let page = usr.join("share/man").join(name);
        let output = Command::new("gzip").arg("-dc").arg(page).output().expect("gzip is there");
        String::from_utf8(output.stdout).expect(name)
    };
    assert!(page("man1/rcriu-dump.1.gz").contains("leave\\-running"));
    assert!(page("man1/imgfs-mount.1.gz").contains("MOUNTPOINT"));
    assert!(page("man8/mount.imgfs.8.gz").contains("fstab"));
    for (file, words) in [
        ("share/bash-completion/completions/rcriu", "restore"),
        ("share/zsh/vendor-completions/_imgfs", "umount"),
        ("share/fish/vendor_completions.d/rcriu.fish", "restore"),
        ("share/doc/rcriu/copyright", "Permission is hereby granted"),
        ("share/doc/rcriu/LICENSE-APACHE", "Apache License"),
        ("lib/systemd/system/imgfs@.service", "imgfs mount"),
    ] {
        let text = fs::read_to_string(usr.join(file)).expect(file);
        assert!(text.contains(words), "{file} does not contain {words}");
    }

    let output = dpkg(&root, &["--purge".as_ref(), "rcriu".as_ref()]);
    assert!(output.status.success(), "{output:?}");
    assert!(!usr.exists(), "dpkg has left files in {}", usr.display());
}

#[test]
fn another_criu_is_left_alone() {
    let root = tempfile::tempdir().expect("a directory can be made");
    let criu = root.path().join("opt/rcriu/sbin/criu");
    fs::create_dir_all(criu.parent().expect("it has one")).expect("it can be made");
    fs::write(&criu, "another program").expect("it can be written");
    let output = install(root.path(), &["--as-criu"]);
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("another program"), "{output:?}");
    assert_eq!(fs::read(&criu).expect("it is there"), b"another program");
}
