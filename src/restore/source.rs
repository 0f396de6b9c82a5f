//! Where the images are when they are seen through a mount.

use std::{
    ffi::OsString,
    fs,
    os::unix::ffi::OsStringExt,
    path::{Path, PathBuf},
};

use nix::sys::statfs::{FUSE_SUPER_MAGIC, statfs};

use crate::{
    chain::{DIRECTORY_XATTR, PUNCH_XATTR},
    image::Kind,
    sys::xattr,
};

/// Returns the image directory that `dir` shows, if it is one of a mount of `imgfs`
/// and the same snapshot is found where the mount says: its bytes need not go through
/// another process then.
///
/// The mount may be of another mount namespace, or served by somebody who says what
/// is not so: the inventories, in which the time of the dump is, must be the same.
pub(super) fn behind_mount(dir: &Path) -> Option<PathBuf> {
    if statfs(dir).ok()?.filesystem_type() != FUSE_SUPER_MAGIC {
        return None;
    }
    let value = xattr::get(dir, DIRECTORY_XATTR).ok()?;
    let behind = PathBuf::from(OsString::from_vec(value));
    let inventory = |dir: &Path| fs::read(dir.join(Kind::Inventory.file_name(0)));
    let same = behind.is_absolute()
        && inventory(dir).is_ok_and(|here| inventory(&behind).is_ok_and(|there| here == there));
    if !same {
        log::debug!("{}: read through the mount", dir.display());
        return None;
    }
    log::info!("{} shows {}, which is read instead", dir.display(), behind.display());
    Some(behind)
}

/// Whether `dir` is the root of a mount of `imgfs` that frees what is punched.
pub(super) fn frees_pages(dir: &Path) -> bool {
    statfs(dir).is_ok_and(|stat| stat.filesystem_type() == FUSE_SUPER_MAGIC)
        && xattr::get(dir, PUNCH_XATTR).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_mounts_of_ours_say_where_images_are() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("inventory.img"), "same").unwrap();
        assert_eq!(behind_mount(dir.path()), None);
        assert_eq!(behind_mount(Path::new("/nowhere")), None);
        assert!(!frees_pages(dir.path()));
    }
}
