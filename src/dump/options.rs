//! What a dump is asked to do: a group of options for each phase or kind that reads some.
//!
//! [`run`](super::run) takes them apart and hands each group to its reader, and nothing else.

use std::path::PathBuf;

use super::check;
use crate::{
    action, inject,
    inject::Outcome,
    res::{file, tree},
    step::stats,
    track,
    units::HostPid,
};

/// What a dump is asked to do.
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
    pub(crate) check: check::Options,
    pub(crate) common: tree::Options,
    pub(crate) files: file::DumpOptions,
    pub(crate) track: track::Options,
    pub(crate) actions: action::Options,
    pub(crate) stats: stats::Options,
}

/// What is dumped, and what becomes of the tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Goal {
    /// Its memory alone, while it runs on (`pre-dump`).
    Memory,
    /// All of it.
    Tree(Outcome),
}

impl Goal {
    /// Whether this is a pre-dump.
    pub(super) fn is_pre_dump(self) -> bool {
        self == Self::Memory
    }

    /// Whether the tree lives on afterwards, running or stopped.
    pub(super) fn spares(self) -> bool {
        self != Self::Tree(Outcome::Kill)
    }

    /// Whether the tree runs on afterwards.
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
    /// That of the previous dump, relative to `images_dir` (`--prev-images-dir`).
    pub(crate) parent: Option<PathBuf>,
    /// Free in the parent what this dump supersedes (`--auto-dedup`).
    pub(crate) free_parent: bool,
}
