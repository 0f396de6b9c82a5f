//! Dumps without a pause (`--live`): the tree runs on while its memory is copied.
//!
//! While the tree is stopped, each process gets a [shadow](crate::inject::Shadows), which keeps its
//! private memory as it is. Shared memory has no shadow, so it is copied at once, as is private memory
//! that a fork leaves out. A limit says how much that may be. Then the tree runs on, and the rest is
//! copied from the shadows.
//!
//! Write protection by userfaultfd with a handler would need no second process, but it cannot keep what
//! a process unmaps: the kernel reports `munmap(2)`, `execve(2)` and the end of a process only when
//! the memory is gone. It stops a tree as long as the fork does, and lets a process write a quarter to a
//! third as many pages per second while it is copied (`src/docs/speed.md`).

use super::{
    DumpError, Goal, Result,
    stats::Stats,
    target::{self, Target},
};
use crate::{
    fault::{self, Point},
    image::{MemoryId, SnapshotWriter},
    inject::{Frozen, Outcome, Shadows, Task, living},
    pages::{Memory, Origin, PageServer},
    proc::{self, Mapping},
    units::{HostPid, RemoteAddr},
};

/// The number of the first pages file.
const FIRST: u32 = 1;

/// What the user says of dumps without a pause.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    stopped_bytes: u64,
}

impl Options {
    /// `stopped_bytes`: how much memory may be copied while the tree is stopped (`--live-stopped`).
    pub const fn new(stopped_bytes: u64) -> Self {
        Self { stopped_bytes }
    }
}

/// An address space of the tree.
#[derive(Debug)]
pub(super) struct AddressSpace {
    /// The first process that has it.
    pub(super) pid: HostPid,
    /// Its memory.
    pub(super) id: MemoryId,
    /// Its mappings.
    pub(super) mappings: Vec<Mapping>,
    /// The stack pointers of all threads of all processes that have it.
    pub(super) stacks: Vec<RemoteAddr>,
}

/// A dump without a pause.
#[derive(Debug)]
pub(super) struct Live {
    options: Options,
    shadows: Shadows,
    /// The private memory, which is copied when the tree runs on.
    rest: Vec<Memory>,
}

impl Live {
    /// Prepares one. Drop it only when the tree runs.
    pub(super) fn new(options: Options) -> Self {
        Self { options, shadows: Shadows::default(), rest: Vec::new() }
    }

    /// Refuses a stopped tree that cannot be dumped like that.
    ///
    /// # Errors
    /// [`DumpError::LiveFrozen`].
    pub(super) fn check(frozen: &Frozen, goal: Goal) -> Result<()> {
        debug_assert_eq!(goal, Goal::Tree(Outcome::Run), "the command line was checked");
        match frozen.cgroups().into_iter().next() {
            Some(group) => Err(DumpError::LiveFrozen { group }),
            None => Ok(()),
        }
    }

    /// Returns how much memory the kernel needs for the shadows at once: their page tables.
    pub(super) fn bytes_needed(tasks: &[Task]) -> Result<u64> {
        let mut kib = 0;
        for task in living(tasks) {
            kib += proc::status(task.witness())?.vm_pte_kib.unwrap_or(0);
        }
        Ok(kib << 10)
    }

    /// Makes the shadows of a stopped tree, and copies what they do not have.
    ///
    /// # Errors
    /// [`DumpError::LiveLimit`]; a shadow cannot be made; memory cannot be copied.
    pub(super) fn begin(
        &mut self,
        tasks: &mut [Task],
        spaces: &[AddressSpace],
        mut memories: Vec<Memory>,
        to: (&SnapshotWriter, Option<&mut PageServer>),
        stats: &mut Stats,
    ) -> Result<()> {
        let space_of = |memory: &Memory| spaces.iter().find(|space| space.id == memory.id);
        let first = |memory: &Memory| {
            let mappings = space_of(memory).map_or(&[][..], |space| &space.mappings);
            memory.bytes_to_copy_first(mappings)
        };
        let (bytes, limit) = (memories.iter().map(first).sum(), self.options.stopped_bytes);
        if bytes > limit {
            let largest = memories.iter().max_by_key(|memory| first(memory));
            let largest = largest.map_or(String::new(), name);
            return Err(DumpError::LiveLimit { bytes, limit, largest });
        }
        for memory in &mut memories {
            let Some(space) = space_of(memory) else { continue };
            let task = tasks.iter_mut().find(|task| task.pid == space.pid);
            let task = task.expect("the space of a process of the tree");
            let shadow = self.shadows.make(task, &space.mappings, &space.stacks)?;
            memory.turn_to_shadow(shadow, &space.mappings)?;
        }
        // They are sorted: private memory comes first.
        let first = memories.partition_point(|memory| !memory.is_shared());
        let mut objects = memories.split_off(first);
        let number = FIRST + u32::try_from(first).expect("at most one for each process");
        stats.copied = stats.copying(|| target::copy(&mut objects, number, to, true))?;
        self.rest = memories;
        Ok(())
    }

    /// Copies the rest, while the tree runs, and ends the shadows.
    ///
    /// # Errors
    /// [`DumpError::LiveLost`]; memory cannot be copied.
    pub(super) fn finish(&mut self, target: &mut Target, stats: &mut Stats) -> Result<()> {
        fault::hit(Point::LiveReleased)?;
        let to = (&target.images, target.server.as_mut());
        let copied = stats.copying(|| target::copy(&mut self.rest, FIRST, to, true));
        let copied = copied.map_err(|error| match (self.shadows.lost(), error) {
            (Some(pid), DumpError::Pages(_)) => DumpError::LiveLost { pid },
            (_, error) => error,
        })?;
        stats.copied.add(copied);
        fault::hit(Point::LiveCopied)?;
        self.rest.clear();
        self.shadows.end();
        Ok(())
    }
}

/// Returns the name of a memory in messages.
fn name(memory: &Memory) -> String {
    match &memory.origin {
        Origin::Object { name, .. } => name.clone(),
        Origin::Process(_) => memory.id.to_string(),
    }
}
