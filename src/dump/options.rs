//! The options of a dump: one group for each phase or kind that reads some of them.
//!
//! [`run`](super::run) takes the groups apart and hands each to its reader only.

use std::path::PathBuf;

use super::live;
use crate::{
    action, inject,
    inject::Outcome,
    pages::ServerOptions,
    res::{file, ns, tree},
    step::stats,
    track,
    units::HostPid,
};

/// The options of a dump.
///
/// Paths are as the user gave them, relative to the current directory unless the field says
/// otherwise.
#[derive(Clone, Debug)]
#[cfg_attr(test, derive(PartialEq, Eq))]
pub struct Options {
    /// The root of the tree.
    pub(crate) root: HostPid,
    pub(crate) goal: Goal,
    pub(crate) store: Store,
    pub(crate) freeze: inject::FreezeOptions,
    pub(crate) common: tree::DumpOptions,
    pub(crate) namespaces: ns::Options,
    pub(crate) files: file::DumpOptions,
    pub(crate) track: track::Options,
    /// How to dump without a pause, if that is wanted (`--live`).
    pub(crate) live: Option<live::Options>,
    pub(crate) actions: action::Options,
    pub(crate) stats: stats::Options,
}

/// What to dump, and what happens to the tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Goal {
    /// Only the memory, while the tree runs on (`pre-dump`).
    Memory,
    /// The whole state.
    Tree(Outcome),
}

impl Goal {
    /// Whether this is a pre-dump.
    pub(super) fn is_pre_dump(self) -> bool {
        self == Self::Memory
    }

    /// Whether the tree survives the dump, running or stopped.
    pub(super) fn spares(self) -> bool {
        self != Self::Tree(Outcome::Kill)
    }

    /// Whether the tree runs on after the dump.
    pub(super) fn runs_on(self) -> bool {
        matches!(self, Self::Memory | Self::Tree(Outcome::Run))
    }
}

/// Where the images go.
#[derive(Clone, Debug)]
#[cfg_attr(test, derive(PartialEq, Eq))]
pub struct Store {
    /// The directory of the images.
    pub(crate) images_dir: PathBuf,
    /// The directory of the previous dump, relative to `images_dir` (`--prev-images-dir`).
    pub(crate) parent: Option<PathBuf>,
    /// The directory in which the parent is found, unless it is named (`--chain`).
    pub(crate) chain: Option<PathBuf>,
    /// Free the pages in the parent that this dump supersedes (`--auto-dedup`).
    pub(crate) free_parent: bool,
    /// The page server that takes the pages.
    pub(crate) server: Option<ServerOptions>,
}
