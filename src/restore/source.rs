//! Finds the image directory behind a mount.

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

/// The largest inventory that is read: real ones are smaller than a page.
const INVENTORY_LIMIT_BYTES: u64 = 64 << 20;

/// Returns the image directory that `dir` shows, if `dir` belongs to a mount of `imgfs` and
/// the directory that the mount names has the same snapshot. Then the restore reads the
/// images directly, rather than through another process.
///
/// The mount may be from another mount namespace, or its daemon may lie. So the
/// inventories, which contain the time of the dump, must be equal.
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

/// What a mount of `imgfs` does with punched pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Punches {
    /// It frees them.
    Now,
    /// It records them, and frees them on `imgfs commit`.
    OnCommit,
}

/// Returns what happens to punched pages, if `dir` is the root of a mount of `imgfs` that
/// supports punching.
pub(super) fn punches(dir: &Path) -> Option<Punches> {
    let mode = attribute(dir, PUNCH_XATTR)?;
    Some(if mode == PUNCH_ON_COMMIT.as_bytes() { Punches::OnCommit } else { Punches::Now })
}

/// Checks that no page in a mount of `imgfs` was freed: its pagemaps do not show that.
///
/// # Errors
/// [`StepError::Directory`].
pub(super) fn require_whole(dir: &Path) -> Result<()> {
    let Some(gone) = attribute(dir, GONE_XATTR) else { return Ok(()) };
    let problem = String::from_utf8_lossy(&gone).into_owned();
    Err(StepError::Directory { path: dir.to_owned(), problem }.into())
}

/// Returns an extended attribute of the root of a mount.
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
