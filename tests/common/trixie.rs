//! The root of Debian 13 that `tests/debian13` makes.

use std::path::{Path, PathBuf};

use super::skip;

/// Returns its directory. Skips the test if it has no such program.
pub fn with(program: &str) -> PathBuf {
    let root = Path::new("/var/cache/rcriu-tests/trixie");
    if !root.join(program).exists() {
        skip(&format!("Debian 13 with {program} (tests/debian13)"));
    }
    root.to_owned()
}
