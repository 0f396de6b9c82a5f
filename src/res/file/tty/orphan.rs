//! Masters outside of the tree. The restore makes new ones and hands them over: the console of a
//! container belongs to its runtime.

use std::{
    fmt,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
};

/// Takes the masters of pseudoterminals whose slaves the tree has.
pub trait TakeMaster: fmt::Debug + Send + Sync {
    /// Takes a master. The restore closes its own descriptor of it afterwards.
    ///
    /// # Errors
    /// Why it could not be handed over.
    fn take(&self, master: BorrowedFd<'_>) -> Result<(), String>;
}

/// Who takes the masters, if someone does (`orphan_pts_master` of the service's protocol).
#[derive(Clone, Debug, Default)]
pub struct Orphans(Option<Arc<dyn TakeMaster>>);

impl Orphans {
    /// `taker`: takes them.
    pub fn new(taker: Option<Arc<dyn TakeMaster>>) -> Self {
        Self(taker)
    }

    /// Whether the caller takes none: then the restore makes none.
    pub(super) fn are_left(&self) -> bool {
        self.0.is_none()
    }

    /// Hands a master over.
    pub(super) fn give(&self, master: OwnedFd) -> Result<(), String> {
        self.0.as_ref().map_or(Ok(()), |taker| taker.take(master.as_fd()))
    }
}

#[cfg(test)]
impl PartialEq for Orphans {
    fn eq(&self, other: &Self) -> bool {
        self.are_left() == other.are_left()
    }
}

#[cfg(test)]
impl Eq for Orphans {}
