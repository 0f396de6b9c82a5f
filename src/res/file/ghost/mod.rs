//! Deleted files that the tree has open: `ghost-file-N.img` and `remap-fpath.img`.

mod dump;
mod restore;

pub use self::{
    dump::DeletedFiles,
    restore::{Recreated, remove_link_remaps},
};
pub(super) use self::{dump::link, restore::open};

/// The most bytes of a deleted file that are stored unless the user says otherwise, as with CRIU.
const LIMIT_BYTES: u64 = 1 << 20;

/// The user's options for deleted files.
#[derive(Clone, Copy, Debug)]
#[cfg_attr(test, derive(PartialEq, Eq))]
pub struct Options {
    link_remap: bool,
    limit_bytes: u64,
}

impl Options {
    /// `link_remap`: files that still have another name are given one again (`--link-remap`).
    /// `limit_bytes`: larger files are not copied into the images (`--ghost-limit`).
    pub fn new(link_remap: bool, limit_bytes: u64) -> Self {
        Self { link_remap, limit_bytes }
    }
}

impl Default for Options {
    fn default() -> Self {
        Self::new(false, LIMIT_BYTES)
    }
}

/// Returns the name of the link remap whose entry has the number `id`, as CRIU names it.
fn link_name(id: u32) -> String {
    format!("link_remap.{id}")
}
