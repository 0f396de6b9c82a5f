//! Work that several processors share.
//!
//! A thread that cannot be started, since a limit is reached (`RLIMIT_NPROC`, `pids.max`),
//! is no failure: those that there are do the work.

use std::{
    num::NonZeroUsize,
    thread::{self, Builder, Scope, ScopedJoinHandle},
};

/// Starts a thread; `None` if there can be no more.
pub fn spawn<'scope, T: Send + 'scope>(
    scope: &'scope Scope<'scope, '_>,
    work: impl FnOnce() -> T + Send + 'scope,
) -> Option<ScopedJoinHandle<'scope, T>> {
    let started = Builder::new().spawn_scoped(scope, work);
    started.inspect_err(|error| log::debug!("do without another thread: {error}")).ok()
}

/// Does the work in as many threads as there are processors, this one among them. Each
/// takes its share until nothing is left.
pub fn on_all_processors(work: &(impl Fn() + Sync)) {
    let processors = thread::available_parallelism().map_or(1, NonZeroUsize::get);
    thread::scope(|scope| {
        let others: Vec<_> = (1..processors).map_while(|_| spawn(scope, work)).collect();
        work();
        drop(others);
    });
}
