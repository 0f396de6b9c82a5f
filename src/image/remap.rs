//! Files that lost their names before the dump (`remap-fpath.img`).

use super::proto::{RemapFilePathEntry, RemapType};

/// The bit that marks ghosts in images without `remap_type` (`REMAP_GHOST`,
/// `criu/include/image.h`).
const OLD_GHOST: u32 = 1 << 31;

/// What stands for a file that has lost its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Remap {
    /// The file of another entry, by the id of that entry.
    Linked(u32),
    /// A ghost file, by the number of the image that holds its contents.
    Ghost(u32),
    /// A file in `/proc` of a process that had ended, by the pid.
    Process(u32),
}

impl Remap {
    /// Decodes an entry.
    ///
    /// # Errors
    /// The defect: an unknown type.
    pub fn of(entry: &RemapFilePathEntry) -> Result<Self, String> {
        let id = entry.remap_id;
        match entry.remap_type.map(RemapType::try_from) {
            Some(Ok(RemapType::Linked)) => Ok(Self::Linked(id)),
            Some(Ok(RemapType::Ghost)) => Ok(Self::Ghost(id)),
            Some(Ok(RemapType::Procfs)) => Ok(Self::Process(id)),
            None if id & OLD_GHOST != 0 => Ok(Self::Ghost(id & !OLD_GHOST)),
            None => Ok(Self::Linked(id)),
            Some(Err(_)) => {
                Err(format!("its name was lost in an unknown way ({:?})", entry.remap_type))
            }
        }
    }
}
