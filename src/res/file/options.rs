//! The user's options for open files: a group for each kind that has options.
//!
//! The fields of a group are private to the kind that reads it. So no other kind depends on them,
//! and the compiler warns about an unused one.

use std::os::fd::OwnedFd;

use super::{
    ghost, lock,
    sock::{inet, unix},
    tty,
    validation::Validation,
    watch,
};
use crate::sys::fds;

/// The options of a dump.
#[derive(Clone, Debug, Default)]
#[cfg_attr(test, derive(PartialEq, Eq))]
pub struct DumpOptions {
    /// Options for terminals.
    pub(crate) terminals: tty::Options,
    /// Options for UNIX sockets.
    pub(crate) unix: unix::Options,
    /// Options for TCP connections.
    pub(crate) connections: inet::DumpOptions,
    /// Options for deleted files.
    pub(crate) ghosts: ghost::Options,
    /// Options for file locks.
    pub(crate) locks: lock::Options,
    /// Options for watches.
    pub(crate) watches: watch::Options,
    /// How the dump identifies a file.
    pub(crate) validation: Validation,
    /// The resources that the user provides at the restore.
    pub(crate) external: External,
}

/// The options of a restore.
#[derive(Clone, Debug, Default)]
#[cfg_attr(test, derive(PartialEq, Eq))]
pub struct RestoreOptions {
    /// Options for terminals.
    pub(crate) terminals: tty::Options,
    /// Who takes masters that are made for slaves of the tree.
    pub(crate) orphans: tty::Orphans,
    /// Options for UNIX sockets.
    pub(crate) unix: unix::Options,
    /// Options for TCP connections.
    pub(crate) connections: inet::RestoreOptions,
    /// How the restore checks that a file is the one that was dumped.
    pub(crate) validation: Validation,
    /// The resources that the caller provides.
    pub(crate) inherited: Inherited,
}

/// Resources that the dump leaves out (`--external`), in CRIU's syntax: `TYPE[ID]` or
/// `TYPE[ID]:VALUE`.
#[derive(Clone, Debug, Default)]
#[cfg_attr(test, derive(PartialEq, Eq))]
pub struct External(Vec<String>);

impl External {
    /// Creates it from the list of the user.
    pub fn new(resources: Vec<String>) -> Self {
        Self(resources)
    }

    /// Whether the user named this resource.
    pub(super) fn contains(&self, name: &str) -> bool {
        self.0.iter().any(|external| external == name)
    }
}

/// Open descriptors of the restorer that replace resources of the images (`--inherit-fd`): number
/// and key, such as `pipe:[4711]`.
#[derive(Clone, Debug, Default)]
#[cfg_attr(test, derive(PartialEq, Eq))]
pub struct Inherited(Vec<(i32, String)>);

impl Inherited {
    /// Creates it from the list of the user.
    pub fn new(descriptors: Vec<(i32, String)>) -> Self {
        Self(descriptors)
    }

    /// Returns a duplicate of the descriptor that replaces a resource, if there is one.
    ///
    /// # Errors
    /// The error of `fcntl(2)`.
    pub(in crate::res) fn duplicate(&self, key: &[u8]) -> nix::Result<Option<OwnedFd>> {
        let found = self.0.iter().find(|(_, known)| known.as_bytes() == key);
        found.map(|(number, _)| fds::duplicate(*number)).transpose()
    }
}
