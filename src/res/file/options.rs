//! What the user says of open files: a group of options for each kind that has some.
//!
//! The fields of a group are private to the kind that reads it, so that no other kind depends on
//! them, and the compiler warns of one that is never read.

use std::os::fd::OwnedFd;

use super::{
    ghost,
    sock::{inet, unix},
    tty,
    validation::Validation,
};
use crate::sys::fds;

/// The options of a dump.
#[derive(Clone, Debug, Default)]
#[cfg_attr(test, derive(PartialEq, Eq))]
pub struct DumpOptions {
    /// Those of terminals.
    pub(crate) terminals: tty::Options,
    /// Those of UNIX sockets.
    pub(crate) unix: unix::Options,
    /// Those of TCP connections.
    pub(crate) connections: inet::DumpOptions,
    /// Those of files that have lost their names.
    pub(crate) ghosts: ghost::Options,
    /// What is recorded to tell a file from another one.
    pub(crate) validation: Validation,
    /// What the restorer will provide.
    pub(crate) external: External,
}

/// The options of a restore.
#[derive(Clone, Debug, Default)]
#[cfg_attr(test, derive(PartialEq, Eq))]
pub struct RestoreOptions {
    /// Those of terminals.
    pub(crate) terminals: tty::Options,
    /// Those of UNIX sockets.
    pub(crate) unix: unix::Options,
    /// Those of TCP connections.
    pub(crate) connections: inet::RestoreOptions,
    /// What is compared to tell a file from another one.
    pub(crate) validation: Validation,
    /// What the caller provides.
    pub(crate) inherited: Inherited,
}

/// Resources that are not dumped (`--external`), in CRIU's words: `TYPE[ID]` or
/// `TYPE[ID]:VALUE`.
#[derive(Clone, Debug, Default)]
#[cfg_attr(test, derive(PartialEq, Eq))]
pub struct External(Vec<String>);

impl External {
    /// Takes the list that the user gave.
    pub fn new(resources: Vec<String>) -> Self {
        Self(resources)
    }

    /// Whether the user named this resource.
    pub(super) fn contains(&self, name: &str) -> bool {
        self.0.iter().any(|external| external == name)
    }
}

/// Open descriptors of this program that stand for resources of the images (`--inherit-fd`):
/// number and key, such as `pipe:[4711]`.
#[derive(Clone, Debug, Default)]
#[cfg_attr(test, derive(PartialEq, Eq))]
pub struct Inherited(Vec<(i32, String)>);

impl Inherited {
    /// Takes the list that the user gave.
    pub fn new(descriptors: Vec<(i32, String)>) -> Self {
        Self(descriptors)
    }

    /// Returns a duplicate of the descriptor that stands for a resource, if there is one.
    ///
    /// # Errors
    /// What `fcntl(2)` returns.
    pub(super) fn duplicate(&self, key: &[u8]) -> nix::Result<Option<OwnedFd>> {
        let found = self.0.iter().find(|(_, known)| known.as_bytes() == key);
        found.map(|(number, _)| fds::duplicate(*number)).transpose()
    }
}
