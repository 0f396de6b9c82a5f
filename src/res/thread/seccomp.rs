//! System call filters (`seccomp(2)`).

use super::{Kind, Stopped};
use crate::res::Result;

/// The kind.
pub(super) struct Seccomp;

impl Kind for Seccomp {
    fn check(&self, of: &Stopped<'_>) -> Result<()> {
        if of.status.seccomp != 0 {
            return Err(of.refused("a seccomp filter", "seccomp is not dumped yet"));
        }
        Ok(())
    }
}
