//! Tracking from the restore on, for a dump into the same chain.

use std::collections::BTreeMap;

use log::Level;

use super::{Result, plan::Plan, tree::Puppets};
use crate::{
    causes::{tell, with_sources},
    image::{Kind, proto, tree::Arena},
    proc,
    track::{Hindrance, Options, TrackError, Watch},
};

/// The tracking of all processes, from the snapshot `since` on.
#[derive(Debug)]
pub(super) struct Tracking {
    since: String,
    watches: Vec<Watch>,
}

/// Starts to track all processes; none has run yet. `None` if tracking is not requested, or
/// the snapshot has no id.
///
/// # Errors
/// An unreadable inventory. If memory cannot be tracked, the next dump only takes longer.
pub(super) fn begin(
    options: Options,
    plan: &Plan,
    puppets: &mut Puppets,
) -> Result<Option<Tracking>> {
    if !options.for_next() {
        return Ok(None);
    }
    let inventory: proto::InventoryEntry = plan.images().message(Kind::Inventory, 0)?;
    let Some(since) = inventory.dump_criu_run_id else {
        log::warn!("changes are not tracked: the inventory has no dump_criu_run_id");
        return Ok(None);
    };
    let since = String::from_utf8_lossy(&since).into_owned();
    let mut tracking = Tracking { since, watches: Vec::new() };
    let scratch = puppets.scratch;
    let mut hindrances = BTreeMap::new();
    let work_place = scratch.start..scratch.start.plus(scratch.len());
    for (position, task) in plan.tasks.iter().enumerate() {
        if task.body.is_none() {
            continue;
        }
        let pid = plan.host(task.pid);
        let mut mappings = proc::smaps(pid)?;
        mappings
            .retain(|mapping| mapping.end <= work_place.start || mapping.start >= work_place.end);
        let puppet = puppets.tasks[position].as_mut().expect("it lives");
        let thread = &mut puppet.threads[0];
        let begun = match task.is_leaderless() {
            _ if plan.arenas.is_shared(Arena::Memory, position) => {
                Err(TrackError::SharedMemory { pid })
            }
            true => Err(TrackError::Leaderless { pid }),
            false => Watch::begin_restored(options.tracker(), pid, &mappings, &scratch, thread),
        };
        match begun {
            Ok(watch) => tracking.watches.extend(watch),
            Err(error @ TrackError::Inject(_)) => return Err(error.into()),
            Err(error) if options.tracker().is_some() => return Err(error.into()),
            Err(error) => {
                let hindrance = Hindrance::of("changes are not tracked", &error);
                hindrances.entry(hindrance).or_insert(pid);
            }
        }
    }
    for (Hindrance { what, help }, pid) in hindrances {
        let text = format!("process {pid}: {what}\nhelp: {help}");
        tell(Level::Warn, &text);
    }
    Ok(Some(tracking))
}

impl Tracking {
    /// Lets changes count from the snapshot on; the processes run.
    pub(super) fn commit(self) {
        for watch in self.watches {
            if let Err(error) = watch.commit(&self.since, None) {
                log::warn!("the next dump compares all pages: {}", with_sources(&error));
            }
        }
    }
}
