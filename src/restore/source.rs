//! Where the images are when they are seen through a mount.

use std::{
    ffi::OsString,
    os::unix::ffi::OsStringExt,
    path::{Path, PathBuf},
};

use nix::sys::statfs::{FUSE_SUPER_MAGIC, statfs};

use super::Result;
use crate::{
    chain::{DIRECTORY_XATTR, GONE_XATTR, PUNCH_ON_COMMIT, PUNCH_XATTR},
    image::{Kind, regular},
    step::StepError,
    sys::xattr,
};

/// The largest inventory that is read: real ones have less than a page.
const INVENTORY_LIMIT_BYTES: u64 = 64 << 20;

/// Returns the image directory that `dir` shows, if it is one of a mount of `imgfs`
/// and the same snapshot is found where the mount says: its bytes need not go through
/// another process then.
///
/// The mount may be of another mount namespace, or served by somebody who says what
/// is not so: the inventories, in which the time of the dump is, must be the same.
pub(super) fn behind_mount(dir: &Path) -> Option<PathBuf> {
    let value = attribute(dir, DIRECTORY_XATTR)?;
    let behind = PathBuf::from(OsString::from_vec(value));
    let inventory =
        |dir: &Path| regular::read(&dir.join(Kind::Inventory.file_name(0)), INVENTORY_LIMIT_BYTES);
    let same = behind.is_absolute()
        && inventory(dir).is_ok_and(|here| inventory(&behind).is_ok_and(|there| here == there));
    if !same {
        log::debug!("{}: read through the mount", dir.display());
        return None;
    }
    log::info!("{} shows {}, which is read instead", dir.display(), behind.display());
    Some(behind)
}

/// What a mount of `imgfs` does with pages that are punched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Punches {
    /// It frees them.
    Now,
    /// It notes them, and frees them when `imgfs commit` says so.
    OnCommit,
}

/// Returns what becomes of pages that are punched, if `dir` is the root of a mount of
/// `imgfs` that takes such requests.
pub(super) fn punches(dir: &Path) -> Option<Punches> {
    let mode = attribute(dir, PUNCH_XATTR)?;
    Some(if mode == PUNCH_ON_COMMIT.as_bytes() { Punches::OnCommit } else { Punches::Now })
}

/// Checks that no page of what a mount of `imgfs` shows was freed, which cannot be seen
/// in its pagemaps.
///
/// # Errors
/// [`StepError::Directory`].
pub(super) fn require_whole(dir: &Path) -> Result<()> {
    let Some(gone) = attribute(dir, GONE_XATTR) else { return Ok(()) };
    let problem = String::from_utf8_lossy(&gone).into_owned();
    Err(StepError::Directory { path: dir.to_owned(), problem }.into())
}

/// Returns an attribute of the root of a mount.
fn attribute(dir: &Path, name: &str) -> Option<Vec<u8>> {
    (statfs(dir).ok()?.filesystem_type() == FUSE_SUPER_MAGIC).then_some(())?;
    xattr::get(dir, name).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_mounts_of_ours_say_where_images_are() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("inventory.img"), "same").unwrap();
        assert_eq!(behind_mount(dir.path()), None);
        assert_eq!(behind_mount(Path::new("/nowhere")), None);
        assert_eq!(punches(dir.path()), None);
        require_whole(dir.path()).unwrap();
    }
}
