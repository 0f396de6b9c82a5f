//! What the kinds of state share during a restore.

use std::{cell::RefCell, fmt};

use super::{Result, attribute::Differences};
use crate::{
    inject::{Answers, InjectError, Script},
    proc::{self, Status},
    units::HostPid,
};

/// The state of the restorer itself, which new processes inherit.
#[derive(Debug)]
pub struct OfRestorer {
    /// Credentials.
    pub status: Status,
    /// Soft and hard limits, indexed by resource number.
    pub limits: Vec<(u64, u64)>,
    /// Attributes that the restore could not set as they were.
    pub differences: RefCell<Differences>,
}

impl OfRestorer {
    /// Reads the state of this process from `/proc`.
    pub fn read() -> Result<Self> {
        let pid = HostPid(nix::unistd::getpid().as_raw());
        let limits = proc::limits(pid)?.to_vec();
        Ok(Self { status: proc::status(pid)?, limits, differences: RefCell::default() })
    }
}

/// The system calls of a new thread.
///
/// Kinds append to one list. The thread makes these calls at the end of a phase, or earlier
/// when a kind needs their results.
pub struct Calls<'a> {
    /// Calls that the thread has not made yet.
    pub script: Script,
    make: &'a mut dyn FnMut(&Script) -> Result<Answers, InjectError>,
}

impl fmt::Debug for Calls<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Calls").field("script", &self.script).finish_non_exhaustive()
    }
}

impl<'a> Calls<'a> {
    /// Starts with an empty list; `make` has the thread make the calls of a script.
    pub fn new(make: &'a mut dyn FnMut(&Script) -> Result<Answers, InjectError>) -> Self {
        Self { script: Script::new(), make }
    }

    /// Has the thread make the pending calls, then those of `script`, and returns the results.
    ///
    /// # Errors
    /// The first call that fails and is not optional.
    pub fn make(&mut self, script: &Script) -> Result<Answers> {
        self.flush()?;
        Ok((self.make)(script)?)
    }

    /// Has the thread make the pending calls.
    ///
    /// # Errors
    /// As [`Self::make`].
    pub fn flush(&mut self) -> Result<()> {
        let script = std::mem::take(&mut self.script);
        if !script.is_empty() {
            (self.make)(&script)?;
        }
        Ok(())
    }
}
