//! Work that several processors share: one pool of threads, and three ways to use it.
//!
//! [`on_threads`] runs the same work on all of them; [`map_until`] keeps the results in the
//! order of the items; [`try_each`] ends with the first error.
//!
//! A thread that cannot be started, since a limit is reached (`RLIMIT_NPROC`, `pids.max`),
//! is no failure: those that there are do the work.

use std::{
    sync::{
        Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
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

/// Locks what is never left half changed, though a thread may have panicked.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Returns how many processors there are for us and `parts` of work, at least one.
pub fn processors_for(parts: usize) -> usize {
    if parts <= 1 {
        return 1;
    }
    // To find out takes a dozen system calls.
    static PROCESSORS: OnceLock<usize> = OnceLock::new();
    let all = PROCESSORS.get_or_init(|| thread::available_parallelism().map_or(1, usize::from));
    parts.min(*all)
}

/// Does the work in so many threads, this one among them, and returns what each returned.
/// Each takes its share until nothing is left.
///
/// # Panics
/// If the work panics.
pub fn on_threads<T: Send>(threads: usize, work: &(impl Fn() -> T + Sync)) -> Vec<T> {
    thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map_while(|_| spawn(scope, work)).collect();
        let mut done = vec![work()];
        done.extend(
            others
                .into_iter()
                .map(|other| other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))),
        );
        done
    })
}

/// Calls `work` with every item and its position, and returns what it returned
/// in the same order. A processor takes `worth` items at a time, so that starting
/// a thread for them pays.
pub fn map<T: Sync, R: Send>(
    items: &[T],
    worth: usize,
    work: impl Fn(usize, &T) -> R + Sync,
) -> Vec<R> {
    map_until(items, worth, |(), position, item| work(position, item), |_| false)
}

/// As [`map`], up to the first item for whose result `is_last` holds; a few items
/// more may be worked on in vain. `work` is also given what its thread keeps
/// from item to item.
pub fn map_until<T: Sync, R: Send, S: Default>(
    items: &[T],
    worth: usize,
    work: impl Fn(&mut S, usize, &T) -> R + Sync,
    is_last: impl Fn(&R) -> bool + Sync,
) -> Vec<R> {
    let worth = worth.max(1);
    let (next, found_last) = (AtomicUsize::new(0), AtomicBool::new(false));
    // Parts are taken in order: if one is found to be the last, all before it
    // have been taken, and will be done.
    let take = || -> Vec<(usize, Vec<R>)> {
        let (mut kept, mut done) = (S::default(), Vec::new());
        while !found_last.load(Ordering::Relaxed) {
            let first = next.fetch_add(worth, Ordering::Relaxed);
            let Some(part) = items.get(first..items.len().min(first.saturating_add(worth))) else {
                break;
            };
            if part.is_empty() {
                break;
            }
            let mut results = Vec::with_capacity(part.len());
            for (position, item) in (first..).zip(part) {
                let result = work(&mut kept, position, item);
                let last = is_last(&result);
                results.push(result);
                if last {
                    found_last.store(true, Ordering::Relaxed);
                    break;
                }
            }
            done.push((first, results));
        }
        done
    };
    let threads = processors_for(items.len().div_ceil(worth));
    let mut done: Vec<_> = on_threads(threads, &take).into_iter().flatten().collect();
    done.sort_unstable_by_key(|(first, _)| *first);
    let mut results: Vec<R> = done.into_iter().flat_map(|(_, results)| results).collect();
    if let Some(last) = results.iter().position(is_last) {
        results.truncate(last + 1);
    }
    results
}

/// Calls `work` with every item; if there are at least `worth` of them, on all processors.
/// It is also given what its thread keeps from item to item.
///
/// # Errors
/// The first error of `work`; what was not begun by then is not done.
pub fn try_each<T: Sync, S: Default, E: Send>(
    items: &[T],
    worth: usize,
    work: impl Fn(&mut S, &T) -> Result<(), E> + Sync,
) -> Result<(), E> {
    let (next, stop, failure) = (AtomicUsize::new(0), AtomicBool::new(false), Mutex::new(None));
    let take = || {
        let mut kept = S::default();
        while !stop.load(Ordering::Relaxed)
            && let Some(item) = items.get(next.fetch_add(1, Ordering::Relaxed))
        {
            if let Err(error) = work(&mut kept, item) {
                stop.store(true, Ordering::Relaxed);
                lock(&failure).get_or_insert(error);
            }
        }
    };
    on_threads(if items.len() < worth { 1 } else { processors_for(items.len()) }, &take);
    failure.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU64;

    use super::*;

    #[test]
    fn results_are_in_the_order_of_the_items() {
        for count in [0, 1, 2, 7, 100] {
            let items: Vec<usize> = (0..count).map(|item| item * 3).collect();
            let expected: Vec<usize> = (0..count).map(|item| item * 4).collect();
            assert_eq!(map(&items, 2, |position, item| position + item), expected);
        }
    }

    #[test]
    fn results_end_with_the_first_that_is_last() {
        let items: Vec<usize> = (0..100).collect();
        for last in [0, 1, 9, 10, 99, 100] {
            let results = map_until(&items, 5, |(), _, item| *item, |item| *item >= last);
            assert_eq!(results, items[..100.min(last + 1)]);
        }
    }

    #[test]
    fn each_item_is_worked_on_once_up_to_an_error() {
        for (count, worth) in [(0, 1), (1, 1), (100, 1), (100, 1000)] {
            let items: Vec<u64> = (1..=count).collect();
            let sum = AtomicU64::new(0);
            let add = |(): &mut (), item: &u64| {
                sum.fetch_add(*item, Ordering::Relaxed);
                Ok::<_, u64>(())
            };
            assert_eq!(try_each(&items, worth, add), Ok(()));
            assert_eq!(sum.into_inner(), count * (count + 1) / 2);
            let fail = |(): &mut (), item: &u64| if *item == 7 { Err(*item) } else { Ok(()) };
            let expected = if count < 7 { Ok(()) } else { Err(7) };
            assert_eq!(try_each(&items, worth, fail), expected);
        }
    }
}
