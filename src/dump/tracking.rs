//! The tracking of changes during a dump: what it spares, and its new beginning.

use std::{
    collections::{BTreeMap, BTreeSet},
    rc::Rc,
};

use log::Level;

use super::{DumpError, Goal, Result};
use crate::{
    causes::{tell, with_sources},
    chain::{Chain, SnapshotId},
    image::{Kind, proto},
    inject::Task,
    pages::{Memory, Origin, marked},
    proc::{Mapping, VmFlags},
    track::{
        self, Hindrance, Request, Tracker, Watch,
        shared::{self, Key, Next},
    },
    units::HostPid,
};

/// The tracking of all processes of a tree.
#[derive(Debug)]
pub(super) struct Tracking {
    tracker: Option<Tracker>,
    since: Option<String>,
    restart: bool,
    watches: Vec<Rc<Watch>>,
    /// By which mappings the tree can write to which shared memory.
    writers: BTreeMap<Key, Vec<(HostPid, Mapping)>>,
    /// What is to be kept for shared memory.
    next: Option<Next>,
    /// What keeps changes from being tracked, and the processes where it does; none if
    /// it is not about one.
    hindrances: BTreeMap<Hindrance, Vec<HostPid>>,
    /// Pages of which nothing was known but what the parent has.
    pub(super) untracked: Untracked,
}

/// Pages that are compared with the parent for want of tracking.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Untracked {
    pub(super) private: u64,
    pub(super) shared: u64,
}

impl Tracking {
    /// Prepares it; `parent` is the snapshot that changes are asked since.
    ///
    /// # Errors
    /// An inventory that cannot be read.
    pub(super) fn new(
        options: track::Options,
        goal: Goal,
        parent: Option<(&Chain, SnapshotId)>,
    ) -> Result<Self> {
        let since = parent.map(|(chain, id)| {
            let inventory: proto::InventoryEntry = chain.images(id).message(Kind::Inventory, 0)?;
            let id = inventory.dump_criu_run_id;
            Ok::<_, DumpError>(id.map(|id| String::from_utf8_lossy(&id).into_owned()))
        });
        Ok(Self {
            tracker: options.tracker(),
            since: since.transpose()?.flatten(),
            restart: options.for_next() && goal.spares(),
            watches: Vec::new(),
            writers: BTreeMap::new(),
            next: None,
            hindrances: BTreeMap::new(),
            untracked: Untracked::default(),
        })
    }

    /// Takes up the tracking of a stopped process, and begins it anew if that is
    /// wanted. Without any, `None` says that all is to be compared. Memory that another
    /// process has, too, is not tracked.
    ///
    /// # Errors
    /// What keeps the tracker that was asked for from working. If it was for this
    /// program to choose one, none will do.
    pub(super) fn begin(
        &mut self,
        task: &mut Task,
        mappings: &[Mapping],
        is_alone: bool,
    ) -> Result<Option<Rc<Watch>>> {
        if !self.restart && self.since.is_none() {
            return Ok(None);
        }
        let request =
            Request { tracker: self.tracker, since: self.since.as_deref(), restart: self.restart };
        let begun = if is_alone {
            Watch::begin(request, task, mappings)
        } else {
            Err(track::refuse_shared(task.pid))
        };
        match begun {
            Ok(Some(watch)) => {
                let watch = Rc::new(watch);
                self.watches.push(Rc::clone(&watch));
                Ok(Some(watch))
            }
            Ok(None) => Ok(None),
            Err(error) if self.restart && self.tracker.is_some() => Err(error.into()),
            Err(error) => {
                let hindrance = Hindrance::of("changes are not tracked", &error);
                self.hindrances.entry(hindrance).or_default().push(task.pid);
                Ok(None)
            }
        }
    }

    /// Notes a mapping of shared memory, which is no System V segment.
    pub(super) fn note(&mut self, pid: HostPid, mapping: &Mapping) {
        // A process cannot write through a mapping without that permission.
        let may_write = mapping.write || mapping.flags.contains(VmFlags::MAY_WRITE);
        if mapping.shared && may_write {
            let writers = self.writers.entry(Key::of_mapping(mapping)).or_default();
            writers.push((pid, mapping.clone()));
        }
    }

    /// Finds out which pages of shared memory are unwritten, after all mappings of the
    /// stopped tree were noted.
    pub(super) fn look_at_shared(&mut self, tree: &[HostPid], memories: &mut [Memory]) {
        if self.watches.is_empty() {
            let writers: BTreeSet<_> =
                self.writers.values().flatten().map(|(pid, _)| *pid).collect();
            if let Err(error) = shared::excuse(writers) {
                log::debug!("shared memory is no longer tracked: {}", with_sources(&error));
            }
            self.untracked.shared += memories.iter().map(data_pages).sum::<u64>();
            return;
        }
        let mut objects = Vec::new();
        for memory in &*memories {
            let Origin::Object { file, .. } = &memory.origin else { continue };
            let key = file.metadata().ok().map(|metadata| Key::of_file(&metadata));
            let mappings = key.and_then(|key| self.writers.get(&key));
            let mappings = mappings.map_or(&[][..], Vec::as_slice);
            let data = memory.stretches.iter();
            let data = data.map(|data| data.first.0..data.first.0 + data.pages).collect();
            objects.push(shared::Object { file, mappings, data });
        }
        let survey = shared::survey(&self.watches, tree, &objects, self.restart);
        self.next = survey.next;
        self.hindrances.extend(survey.hindrances.into_iter().map(|hindrance| (hindrance, vec![])));
        let shared = memories.iter_mut().filter(|memory| memory.is_shared());
        for (memory, unwritten) in shared.zip(survey.unwritten) {
            match unwritten {
                Some(unwritten) => {
                    memory.stretches =
                        marked(&memory.stretches, &unwritten, |pages| pages.unwritten = true);
                }
                None => self.untracked.shared += data_pages(memory),
            }
        }
    }

    /// Notes shared memory that is never tracked.
    pub(super) fn note_untracked(&mut self, memory: &Memory) {
        self.untracked.shared += data_pages(memory);
    }

    /// Says what keeps changes from being tracked, though that was asked for.
    fn tell(&self) {
        for (Hindrance { what, help }, pids) in &self.hindrances {
            let whose = match pids.as_slice() {
                [] => String::new(),
                [pid] => format!("process {pid}: "),
                [pid, ..] => format!("process {pid} and {} others: ", pids.len() - 1),
            };
            tell(Level::Warn, &format!("{whose}{what}\nhelp: {help}"));
        }
    }

    /// Makes changes count from the snapshot `id` on, which is complete. What fails
    /// costs the next dump time and nothing else.
    pub(super) fn commit(self, id: &str) {
        if self.restart {
            self.tell();
        }
        let shared = self.next.and_then(Next::seal);
        for watch in self.watches.into_iter().filter_map(Rc::into_inner) {
            if let Err(error) = watch.commit(id, shared.as_ref()) {
                log::warn!("the next dump compares all pages: {}", with_sources(&error));
            }
        }
    }
}

/// Pages that a memory may have stored.
fn data_pages(memory: &Memory) -> u64 {
    memory.stretches.iter().map(|stretch| stretch.pages).sum()
}
