//! File systems in files, mounted for the time of a test.

use std::{fs::File, path::PathBuf, process::Command};

use nix::mount::{MntFlags, umount2};
use tempfile::TempDir;

use super::{Cap, require};

/// A file system of its own, gone when the test ends, however it ends.
#[derive(Debug)]
pub struct LoopMount {
    dir: TempDir,
}

impl LoopMount {
    /// Makes a file system of `mib` MiB with a program such as `mkfs.xfs` and mounts it.
    pub fn new(mkfs: &'static str, mib: u64) -> Self {
        require(Cap::Loop);
        require(Cap::Program(mkfs));
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image");
        File::create(&image).unwrap().set_len(mib << 20).unwrap();
        run(Command::new(mkfs).arg("-q").arg(&image));
        let mounted = Self { dir };
        std::fs::create_dir(mounted.path()).unwrap();
        run(Command::new("mount").args(["-o", "loop"]).arg(image).arg(mounted.path()));
        mounted
    }

    pub fn path(&self) -> PathBuf {
        self.dir.path().join("mnt")
    }

    /// Bytes that are free when everything is on disk.
    pub fn free_bytes(&self) -> u64 {
        let root = File::open(self.path()).unwrap();
        // What was freed counts when the transaction after that has ended.
        for _ in 0..2 {
            nix::unistd::syncfs(&root).unwrap();
        }
        let stat = nix::sys::statvfs::fstatvfs(&root).unwrap();
        stat.blocks_free() * stat.fragment_size()
    }
}

impl Drop for LoopMount {
    fn drop(&mut self) {
        let _ = umount2(&self.path(), MntFlags::MNT_DETACH);
    }
}

fn run(command: &mut Command) {
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {said}");
}
