//! Masters outside of the tree that a restore makes anew, for whoever restores it: the console of a
//! container belongs to its runtime.

use std::{
    fmt,
    os::fd::{BorrowedFd, OwnedFd},
    sync::Arc,
};

/// Takes the masters of pseudoterminals whose slaves the tree has.
pub trait TakeMaster: fmt::Debug + Send + Sync {
    /// Takes a master, which is closed here afterwards.
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

    /// Whether nobody takes them: then they are not made.
    pub(super) fn are_left(&self) -> bool {
        self.0.is_none()
    }

    /// Hands a master over.
    pub(super) fn give(&self, master: OwnedFd) -> Result<(), String> {
        use std::os::fd::AsFd;
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
