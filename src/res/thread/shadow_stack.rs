//! Shadow stacks of return addresses (x86).

use super::{Kind, Stopped};
use crate::res::Result;

const HELP: &str = "start the program without it (GLIBC_TUNABLES=glibc.cpu.x86_shstk=off)";

/// The kind.
pub(super) struct ShadowStack;

impl Kind for ShadowStack {
    fn check(&self, of: &Stopped<'_>) -> Result<()> {
        if of.status.shadow_stack { Err(of.refused("a shadow stack", HELP)) } else { Ok(()) }
    }
}
