//! Memory that is swapped to.

use std::{fs, os::unix::fs::PermissionsExt, path::PathBuf, process::Command};

/// A file that memory is swapped to.
#[derive(Debug)]
pub struct Swap {
    path: PathBuf,
    _dir: tempfile::TempDir,
}

impl Swap {
    /// Makes one of 32 MiB, or skips the test on a file system that has no such files.
    pub fn make() -> Self {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let path = dir.path().join("swap");
        fs::write(&path, vec![0; 32 << 20]).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        let made = Command::new("mkswap").arg(&path).output().unwrap();
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        let made = Command::new("swapon").arg(&path).output().unwrap();
        let text = String::from_utf8_lossy(&made.stderr);
        let has_none = ["Invalid argument", "holes"].iter().any(|what| text.contains(what));
        assert!(made.status.success() || has_none, "{text}");
        if !made.status.success() {
            super::skip("a file system of the build that has files to swap to");
        }
        Self { path, _dir: dir }
    }

    /// Pages that were ever swapped out on this machine.
    pub fn pages_out() -> u64 {
        let text = fs::read_to_string("/proc/vmstat").unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix("pswpout "));
        line.expect("a kernel with swap").parse().unwrap()
    }
}

impl Drop for Swap {
    fn drop(&mut self) {
        // What was swapped out comes back.
        let _ = Command::new("swapoff").arg(&self.path).status();
    }
}
