//! What the user says of the tracking of changes.

use super::Tracker;

/// What the user says of the tracking of changes.
#[derive(Clone, Copy, Debug, Default)]
#[cfg_attr(test, derive(PartialEq, Eq))]
pub struct Options {
    for_next: bool,
    tracker: Option<Tracker>,
}

impl Options {
    /// `for_next`: changes are tracked from now on, for the next dump (`--track-mem`).
    /// `tracker`: how they are tracked (`--tracker`); `None` chooses the best that works.
    pub fn new(for_next: bool, tracker: Option<Tracker>) -> Self {
        Self { for_next, tracker }
    }

    /// Whether changes are tracked from now on.
    pub(crate) fn for_next(self) -> bool {
        self.for_next
    }

    /// Returns the tracker that was asked for.
    pub(crate) fn tracker(self) -> Option<Tracker> {
        self.tracker
    }
}
