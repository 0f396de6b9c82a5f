//! Restores a tree of processes: the order of the phases.
//!
//! One thread of this program, the director, directs everything. The new processes only
//! execute lists of system calls: no code of this program runs in them, and none waits for
//! another. Until they are released, they die when this program ends.

mod apply;
mod error;
mod free;
mod groups;
mod lazy;
mod memory;
mod objects;
mod options;
mod pids;
mod plan;
mod release;
mod source;
mod stats;
mod tracees;
mod tracking;
mod tree;

use std::{io::Write, ops::Range, path::Path, thread};

pub use error::{RestoreError, Result};
pub use options::{AutoDedup, Options, Relations, Release, Store, Then};

use crate::{
    action::{Actions, Stage},
    arch,
    causes::{tell, with_sources},
    fault::{self, Point},
    lazy::{Options as LazyOptions, Pager},
    parallel, proc,
    res::{calls::OfRestorer, file::RestoreOptions},
    step::StepError,
    sys::{
        lock::{Access, DirectoryLocks},
        output::{self, Existing},
        process, ptrace,
    },
    track,
    units::HostPid,
};
use free::Free;
use plan::Plan;
use stats::Stats;
use tree::{Ground, Puppets, Workshop};

/// Scratch memory for each mapping, descriptor and thread of a process.
const TABLE_BYTES_EACH: usize = 512;

/// Scratch memory for everything else that a process executes.
const TABLE_BYTES: usize = 256 << 10;

/// Restores a tree of processes, and returns the pid of its root. Waits until that has ended, unless
/// the restore is detached.
///
/// # Errors
/// Why the tree was not restored; no process of it is left.
pub fn run(options: &Options) -> Result<HostPid> {
    let Options {
        store,
        relations,
        release,
        common,
        namespaces,
        files,
        lazy,
        track,
        actions,
        stats,
    } = options;
    let Store { images_dir, free } = store;
    let stats_options = stats;
    arch::check_built()?;
    let mut stats = Stats::begin();
    process::raise_descriptor_limit();
    let images = images_dir.canonicalize().map_err(|error| StepError::Directory {
        path: images_dir.clone(),
        problem: format!("{error}\nhelp: name another one with -D"),
    })?;
    let actions = Actions::new(actions, &images);
    actions.run(Stage::PreRestore, None)?;
    source::require_whole(&images)?;
    let mut locks = DirectoryLocks::default();
    // The directory to read, and whether to lock it.
    let mut place = (images.clone(), true);
    let mut plan = match source::behind_mount(&images) {
        Some(behind) if free.is_some() => {
            return Err(RestoreError::MountedReadOnly { path: images.clone(), behind });
        }
        // The daemon of the mount has locked them.
        Some(behind) => {
            place = (behind, false);
            Plan::read(&place.0, *relations, namespaces, None)?
        }
        None => {
            let changes = free.is_some();
            let access = if changes { Access::Exclusive } else { Access::Shared };
            Plan::read(&images, *relations, namespaces, Some((&mut locks, access)))?
        }
    };
    plan.parent_exits = release.then == Then::Exit && !relations.sibling;
    plan.chain.require_whole(plan.snapshot)?;
    if lazy.is_some() {
        plan.make_lazy();
    }
    let free = free.map(|when| Free::prepare(when, &images, &plan)).transpose()?;
    if let Some(lost) = plan.clocks_lost() {
        let message = format!(
            "the clocks that start at boot (CLOCK_MONOTONIC, CLOCK_BOOTTIME) are {} seconds behind \
             those of the dump, so timeouts of the tree expire that much later\nhelp: restore it \
             in a time namespace: unshare -T --fork --monotonic {0} --boottime {0} rcriu restore ...",
            lost.as_secs() + 1
        );
        tell(log::Level::Warn, &message);
    }
    plan.find_common(common, &OfRestorer::read()?)?;
    fault::hit(Point::RestorePlan)?;
    let subreaper = |on: bool| {
        ptrace::set_subreaper(on).map_err(|source| StepError::Process {
            pid: HostPid::own(),
            step: "make a subreaper of",
            source,
        })
    };
    // If the restore fails, this program reaps what is left.
    subreaper(true)?;
    let lazy = lazy.as_ref().map(|lazy| (lazy, (place.0.as_path(), place.1)));
    let groups = Groups { relations: *relations, release, files, lazy, track: *track };
    let restored = restore(groups, &actions, &plan, free.as_ref(), &mut stats);
    subreaper(false)?;
    let restored = restored.map_err(|error| error.located(|id| plan.place_of(id)));
    restored.map_err(|source| match free.as_ref().map(Free::freed_pages) {
        Some(pages @ 1..) => RestoreError::Spent { pages, source: Box::new(source) },
        _ => source,
    })?;
    if let Some(free) = free {
        free_all(&free, &plan);
    }
    drop(locks);
    let root = plan.host(plan.tasks[0].pid);
    log::info!("restored {} processes", plan.tasks.len());
    // From here on, the tree runs.
    actions.run_anyway(Stage::PostResume, root);
    stats.finish(stats_options);
    if release.then == Then::Wait {
        // The exit code of the root does not concern the restore.
        let _ = ptrace::wait(root);
    }
    Ok(root)
}

/// Frees the pages that are still to be freed. The tree runs, even if that fails.
fn free_all(free: &Free, plan: &Plan) {
    match free.all(plan) {
        Ok(0) => {}
        Ok(pages) => log::info!("freed {pages} pages in the images"),
        Err(error) => {
            let why = with_sources(&error);
            let message = format!(
                "the tree is restored, but not all of its pages were freed in the images: {why}"
            );
            tell(log::Level::Error, &message);
        }
    }
}

/// The options for making the tree, once the plan is known.
#[derive(Clone, Copy)]
struct Groups<'a> {
    relations: Relations,
    release: &'a Release,
    files: &'a RestoreOptions,
    /// How memory is restored on demand; the directory that the pager reads, and whether it locks that.
    lazy: Option<(&'a LazyOptions, (&'a Path, bool))>,
    track: track::Options,
}

fn restore(
    Groups { relations, release, files: file_options, lazy, track }: Groups<'_>,
    actions: &Actions<'_>,
    plan: &Plan,
    free: Option<&Free>,
    stats: &mut Stats,
) -> Result<()> {
    let table_bytes = table_bytes(plan);
    let place = scratch_place(plan, table_bytes)?;
    let ground = Ground { place, table_bytes, relations, leave_stopped: release.stopped };
    // Files of namespaces that are still to be made can only be opened once these are there. Without
    // such, the files come first: if one is missing, no process was made.
    let mut puppets = None;
    if !plan.namespaces.borrow().is_empty() {
        puppets = Some(Puppets::begin(plan, ground)?);
    }
    let mut files = plan.installer(file_options);
    if let Some(puppets) = &mut puppets {
        files.opened.masters.get_mut().append(&mut puppets.masters);
        files.opened.helpers = puppets.makers.clone();
        files.lender = puppets.lender()?;
        if let Some(first) = puppets.makers.first() {
            files.opened.set_namespaces(&mut plan.namespaces.borrow_mut(), first)?;
        }
    }
    let objects = objects::create(plan, &mut files)?;
    for body in plan.tasks.iter().filter_map(|task| task.body.as_ref()) {
        body.planned().open_files(&mut files)?;
        body.vmas.iter().try_for_each(|entry| files.need_mapped(entry))?;
    }
    files.move_objects()?;
    files.open_descriptions()?;
    files.opened.build_ids.log();
    thread::scope(|scope| {
        let fill = || objects::fill(&objects, free);
        let mut filling = None;
        if objects::any_filled(&objects) {
            filling = parallel::spawn(scope, fill);
            if filling.is_none() {
                fill()?;
            }
        }
        let workshop = Workshop {
            file: &|entry| Ok(files.for_mapping(entry)?),
            begin_session: &|pid, script| files.begin_session(pid, script),
            free,
        };
        let mut puppets = match puppets {
            Some(puppets) => puppets,
            None => Puppets::begin(plan, ground)?,
        };
        let first = puppets.makers.first();
        actions.run(Stage::SetupNamespaces, first)?;
        puppets.make(&workshop)?;
        stats.forked(puppets.filled);
        let pager = match lazy {
            Some((options, place)) => lazy::begin(options, place, plan, &mut puppets)?,
            None => None,
        };
        let root = plan.host(plan.tasks[0].pid);
        actions.run(Stage::PostSetupNamespaces, Some(root))?;
        let own = OfRestorer::read_with(root, plan.pids.ids())?;
        apply::all(plan, &mut puppets, &mut files, &own)?;
        if let Some(filling) = filling {
            filling.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        }
        files.seal()?;
        plan.common.iter().try_for_each(|kind| kind.finish())?;
        plan.namespaces.borrow_mut().finish(&|pid| plan.host(pid))?;
        let tracking = tracking::begin(track, plan, &mut puppets)?;
        apply::finish(plan, &mut puppets, &mut files, &own)?;
        write_pidfile(release, plan)?;
        actions.run(Stage::PostRestore, Some(root))?;
        actions.run(Stage::NetworkUnlock, Some(root))?;
        actions.run_anyway(Stage::PreResume, root);
        if let Some(pager) = &pager {
            pager.check()?;
        }
        files.reconnect()?;
        puppets.release()?;
        pager.map_or(Ok(()), Pager::release)?;
        plan.common.iter().for_each(|kind| kind.keep());
        if let Some(tracking) = tracking {
            tracking.commit();
        }
        files.finish();
        stats.restored();
        Ok(())
    })
}

fn write_pidfile(release: &Release, plan: &Plan) -> Result<()> {
    let Some(path) = &release.pidfile else { return Ok(()) };
    output::create(path, Existing::Replaced)
        .and_then(|mut file| file.write_all(plan.host(plan.tasks[0].pid).to_string().as_bytes()))
        .map_err(|source| RestoreError::Write { path: path.clone(), source })
}

/// Returns how much memory the longest list of calls needs.
fn table_bytes(plan: &Plan) -> usize {
    let each = |task: &plan::TaskPlan| {
        task.body.as_ref().map_or(0, |body| {
            body.vmas.len() * 4 + body.guards.len() + body.fds.len() * 2 + task.threads.len()
        })
    };
    TABLE_BYTES + plan.tasks.iter().map(each).max().unwrap_or(0) * TABLE_BYTES_EACH
}

/// Returns an address where scratch memory is free in all processes of the tree and in this
/// program, of which the first process is a copy.
fn scratch_place(plan: &Plan, table_bytes: usize) -> Result<u64> {
    let own = HostPid::own();
    let own: Vec<Range<u64>> =
        proc::maps(own)?.iter().map(|mapping| mapping.start.0..mapping.end.0).collect();
    let bodies = plan.tasks.iter().filter_map(|task| task.body.as_ref());
    let vmas = bodies.flat_map(|body| &body.vmas);
    let len = table_bytes as u64 + (1 << 20);
    memory::free_place(vmas, own.into_iter(), len).ok_or_else(|| RestoreError::Images {
        pid: plan.tasks[0].pid,
        problem: "its processes leave no address range free for the restore".into(),
    })
}
