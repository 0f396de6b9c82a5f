//! The tracking of changes during a dump: what it spares, and its new beginning.

use std::rc::Rc;

use super::{DumpError, Options, Result, memory::Stretch};
use crate::{
    chain::{Chain, Index, Place, SnapshotId},
    image::{Kind, proto, read_one},
    inject::Task,
    proc::Mapping,
    res::track::{Request, Tracker, Watch},
    units::PageIndex,
};

/// The tracking of all processes of a tree.
#[derive(Debug)]
pub(super) struct Tracking {
    tracker: Option<Tracker>,
    since: Option<String>,
    restart: bool,
    watches: Vec<Rc<Watch>>,
}

impl Tracking {
    /// Prepares it; `parent` is the snapshot that changes are asked since.
    ///
    /// # Errors
    /// An inventory that cannot be read.
    pub(super) fn new(options: &Options, parent: Option<(&Chain, SnapshotId)>) -> Result<Self> {
        let goes_on = options.pre_dump || options.leave_running || options.leave_stopped;
        let since = parent.map(|(chain, id)| {
            let path = chain.image_path(id, Kind::Inventory, 0);
            let inventory: proto::InventoryEntry = read_one(&path, Kind::Inventory)?;
            let id = inventory.dump_criu_run_id;
            Ok::<_, DumpError>(id.map(|id| String::from_utf8_lossy(&id).into_owned()))
        });
        Ok(Self {
            tracker: options.tracker,
            since: since.transpose()?.flatten(),
            restart: options.track_mem && goes_on,
            watches: Vec::new(),
        })
    }

    /// Takes up the tracking of a stopped process, and begins it anew if that is
    /// wanted. Without any, `None` says that all is to be compared.
    ///
    /// # Errors
    /// What keeps the tracker that was asked for from working. If it was for this
    /// program to choose one, none will do.
    pub(super) fn begin(
        &mut self,
        task: &mut Task,
        mappings: &[Mapping],
    ) -> Result<Option<Rc<Watch>>> {
        if !self.restart && self.since.is_none() {
            return Ok(None);
        }
        let request =
            Request { tracker: self.tracker, since: self.since.as_deref(), restart: self.restart };
        match Watch::begin(request, task, mappings) {
            Ok(Some(watch)) => {
                let watch = Rc::new(watch);
                self.watches.push(Rc::clone(&watch));
                Ok(Some(watch))
            }
            Ok(None) => Ok(None),
            Err(error) if self.restart && self.tracker.is_some() => Err(error.into()),
            Err(error) => {
                log::warn!("{}: changes are not tracked: {}", task.pid, with_causes(&error));
                Ok(None)
            }
        }
    }

    /// Makes changes count from the snapshot `id` on, which is complete. What fails
    /// costs the next dump time and nothing else.
    pub(super) fn commit(self, id: &str) {
        for watch in self.watches.into_iter().filter_map(Rc::into_inner) {
            if let Err(error) = watch.commit(id) {
                log::warn!("the next dump compares everything: {}", with_causes(&error));
            }
        }
    }
}

fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text += &format!(": {error}");
        cause = error.source();
    }
    text
}

/// Of stretches that are unwritten since the parent, leaves those so that it has
/// stored. The others are looked at: they are new to it, or cannot be read there.
pub(super) fn settle(stretches: &mut Vec<Stretch>, parent: Option<&Index>) {
    if !stretches.iter().any(|stretch| stretch.unwritten) {
        return;
    }
    let mut settled = Vec::with_capacity(stretches.len());
    for stretch in stretches.drain(..) {
        match parent {
            Some(parent) if stretch.unwritten => split(stretch, parent, &mut settled),
            _ => settled.push(Stretch { unwritten: false, ..stretch }),
        }
    }
    *stretches = settled;
}

fn split(stretch: Stretch, parent: &Index, settled: &mut Vec<Stretch>) {
    let end = stretch.first.0 + stretch.pages;
    let mut next = stretch.first.0;
    let mut position = parent.position(stretch.first);
    let mut push = |first: u64, end: u64, unwritten| {
        if end > first {
            settled.push(Stretch {
                first: PageIndex(first),
                pages: end - first,
                unwritten,
                ..stretch
            });
        }
    };
    while next < end
        && let Some(extent) = parent.extent(position)
        && extent.first.0 < end
    {
        position += 1;
        // Only a file that was never punched has them for certain.
        let stored = matches!(extent.place, Place::Stored { layer, .. }
            if parent.layers()[layer as usize].dense);
        let (from, to) = (extent.first.0.max(next), extent.end().0.min(end));
        push(next, from, false);
        push(from, to, stored);
        next = to;
    }
    push(next, end, false);
}
