//! I/O ports, and thread-local storage of 32-bit code.

use super::{Kind, Stopped};
use crate::{
    res::Result,
    sys::ptrace::{self, Rare},
};

/// I/O ports.
pub(super) struct Ports;

impl Kind for Ports {
    fn check(&self, of: &Stopped<'_>) -> Result<()> {
        refuse(of, Rare::Ports, "ports of the machine (ioperm(2))")
    }
}

/// Segment descriptors for thread-local storage.
pub(super) struct LocalStorage;

impl Kind for LocalStorage {
    fn check(&self, of: &Stopped<'_>) -> Result<()> {
        let what = "thread-local storage for 32-bit code (set_thread_area(2))";
        refuse(of, Rare::LocalStorage, what)
    }
}

fn refuse(of: &Stopped<'_>, which: Rare, what: &str) -> Result<()> {
    if ptrace::has_rare(of.of.tid, which) == Ok(true) {
        return Err(of.refused(what, "such threads are not dumped"));
    }
    Ok(())
}
