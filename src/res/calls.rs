//! What kinds of state share while a tree is restored.

use std::{cell::RefCell, fmt};

use super::{Result, attribute::Differences};
use crate::{
    inject::{Answers, InjectError, Script},
    proc::{self, Status},
    units::HostPid,
};

/// What this program has itself, which new processes begin with.
#[derive(Debug)]
pub struct Own {
    /// Its credentials.
    pub status: Status,
    /// Its limits, soft and hard, by their numbers.
    pub limits: Vec<(u64, u64)>,
    /// What the kinds have found not to be as it was.
    pub differences: RefCell<Differences>,
}

impl Own {
    /// Reads it.
    ///
    /// # Errors
    /// Those of reading `/proc`.
    pub fn read() -> Result<Self> {
        let pid = HostPid(nix::unistd::getpid().as_raw());
        let limits = proc::limits(pid)?.to_vec();
        Ok(Self { status: proc::status(pid)?, limits, differences: RefCell::default() })
    }
}

/// The calls of a new thread: kinds add theirs to one list, which is made at the end of a
/// phase, or when one of them needs answers.
pub struct Calls<'a> {
    /// Those that were not made yet.
    pub script: Script,
    make: &'a mut dyn FnMut(&Script) -> Result<Answers, InjectError>,
}

impl fmt::Debug for Calls<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Calls").field("script", &self.script).finish_non_exhaustive()
    }
}

impl<'a> Calls<'a> {
    /// Begins with an empty list; `make` lets the thread make one.
    pub fn new(make: &'a mut dyn FnMut(&Script) -> Result<Answers, InjectError>) -> Self {
        Self { script: Script::new(), make }
    }

    /// Lets the thread make these calls, after those of the list.
    ///
    /// # Errors
    /// The first call that fails and must not.
    pub fn make(&mut self, script: &Script) -> Result<Answers> {
        self.flush()?;
        Ok((self.make)(script)?)
    }

    /// Lets the thread make the calls of the list.
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
