//! Files that have lost their names: `ghost-file-N.img` and `remap-fpath.img`.

mod dump;
mod restore;

pub use self::{
    dump::Lost,
    restore::{Revived, remove_links},
};
pub(super) use self::{dump::link, restore::open};

/// Returns the name that a dump gives to a file which has lost its own, whose entry in the
/// images is to have the number `id`; the same as CRIU.
fn link_name(id: u32) -> String {
    format!("link_remap.{id}")
}
