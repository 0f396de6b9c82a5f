//! Hands memory that is restored on demand to a pager (`--lazy`).

use std::path::Path;

use log::{Level, LevelFilter};

use super::{RestoreError, Result, plan::Plan, tree::Puppets};
use crate::{
    causes::tell,
    image::{MemoryId, tree::Arena},
    inject,
    lazy::{Handed, Log, Options, Pager},
    sys::{
        missing::{MAKE_FLAGS, MissingPages},
        output::{self, Existing},
    },
};

/// Registers the memory that waits in the images, and starts its pager; `None` if none waits. All
/// processes have been made, but have not touched this memory yet. `lock`: the pager locks `images`.
///
/// # Errors
/// [`RestoreError::Userfault`], [`RestoreError::Lazy`].
pub(super) fn begin(
    options: &Options,
    (images, lock): (&Path, bool),
    plan: &Plan,
    puppets: &mut Puppets<'_>,
) -> Result<Option<Pager>> {
    let mut processes = Vec::new();
    for (position, task) in plan.tasks.iter().enumerate() {
        let Some(body) = task.body.as_ref() else { continue };
        let Some(memory) = body.memory.as_ref() else { continue };
        if !plan.arenas.owns(Arena::Memory, position) {
            continue;
        }
        let lazy = body.vmas.iter().filter(|entry| body.is_lazy(entry));
        let ranges: Vec<_> = lazy.map(|entry| entry.start..entry.end).collect();
        let pid = plan.host(task.pid);
        log::debug!(
            "{pid}: {} of {} mappings are restored on demand",
            ranges.len(),
            body.vmas.len()
        );
        if ranges.is_empty() {
            continue;
        }
        let scratch = puppets.scratch;
        let thread = &mut puppets.tasks[position].as_mut().expect("it lives").threads[0];
        let fd = inject::make_userfault(pid, MAKE_FLAGS, &mut |script, act| {
            scratch.run_paused(thread, script, act)
        })?;
        let failed = |step| move |source| RestoreError::Userfault { pid, step, source };
        let fd = fd.map_err(failed("make a userfaultfd"))?;
        let fd = MissingPages::set_up(fd).map_err(failed("set up the userfaultfd"))?;
        for range in &ranges {
            fd.register(range).map_err(failed("register memory with the userfaultfd"))?;
        }
        let MemoryId::Private(id) = memory.index().memory() else { continue };
        processes.push(Handed { id, pid, fd, ranges });
    }
    if processes.is_empty() {
        return Ok(None);
    }
    let options = Options { log: usable(&options.log), record: options.record.clone() };
    let pager = Pager::start((images, lock), &options, &processes)?;
    Ok(Some(pager))
}

/// Returns the log, with a new file, or without one if that cannot be made.
fn usable(log: &Log) -> Log {
    let Some(file) = &log.file else { return log.clone() };
    let Err(error) = output::create(file, Existing::Replaced) else { return log.clone() };
    let message = format!(
        "the pager cannot log to {}: {error}\nhelp: name another directory for the log with -W",
        file.display()
    );
    tell(Level::Warn, &message);
    Log { file: Some("/dev/null".into()), level: LevelFilter::Off }
}
