//! Files that container engines export beside the images of a container.

use super::StoredFile;

/// A file beside the images.
#[derive(Debug)]
pub struct Beside {
    /// Its name, which may have a directory in front.
    pub name: String,
    /// Its bytes.
    pub file: Box<dyn StoredFile>,
}

/// The file by which exports of container engines are recognized.
pub(super) const CONFIG: &str = "config.dump";

/// Files that Podman and CRI-O write beside the images, [`CONFIG`] among them.
pub(super) const FILES: [&str; 10] = [
    "bind.mounts",
    CONFIG,
    "ctr.log",
    "deleted.files",
    "devshm-checkpoint.tar",
    "network.status",
    "rootfs-diff.tar",
    "spec.dump",
    "stats-dump",
    "status.dump",
];

/// Directories that they write beside the images.
pub(super) const FOLDERS: [&str; 2] = ["artifacts", "volumes"];
