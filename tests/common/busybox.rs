//! A root file system of busybox, for containers.

use std::{fs, os::unix::fs::symlink, path::Path};

/// The commands of busybox that the containers use.
const COMMANDS: &[&str] =
    &["sh", "sort", "sleep", "cat", "ps", "nc", "ip", "head", "tr", "cut", "grep", "ls", "mkfifo"];

/// Makes a root file system of busybox.
pub fn root_file_system(at: &Path) {
    for dir in ["bin", "proc", "sys", "dev", "etc", "tmp", "root"] {
        fs::create_dir_all(at.join(dir)).unwrap();
    }
    fs::copy("/bin/busybox", at.join("bin/busybox")).unwrap();
    for command in COMMANDS {
        symlink("busybox", at.join("bin").join(command)).unwrap();
    }
}
