//! What the kinds of state share during a restore.

use std::{cell::RefCell, fmt};

use super::{Result, attribute::Differences};
use crate::{
    inject::{Answers, InjectError, Script},
    proc::{self, Status},
    units::{HostPid, IdMap},
};

/// The state of the restorer itself, which new processes inherit.
#[derive(Debug)]
pub struct OfRestorer {
    /// Credentials, as its tree sees them.
    pub status: Status,
    /// The user and group ids of the tree.
    pub ids: IdMap,
    /// Soft and hard limits, indexed by resource number.
    pub limits: Vec<(u64, u64)>,
    /// Attributes that the restore could not set as they were.
    pub differences: RefCell<Differences>,
}

impl OfRestorer {
    /// Reads the state of this process from `/proc`.
    pub fn read() -> Result<Self> {
        let pid = HostPid::own();
        let limits = proc::limits(pid)?.to_vec();
        let (ids, differences) = (IdMap::default(), RefCell::default());
        Ok(Self { status: proc::status(pid)?, ids, limits, differences })
    }

    /// Reads the state that new processes have when process `root` exists, which is one of them: in a
    /// user namespace of their own they have other credentials than this program.
    pub fn read_with(root: HostPid, ids: &IdMap) -> Result<Self> {
        let own = Self::read()?;
        if ids.is_own_namespace() {
            return Ok(own);
        }
        Ok(Self { status: proc::status(root)?.inside(ids), ids: ids.clone(), ..own })
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
