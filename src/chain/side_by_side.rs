//! Doing the same with many things on all processors.

use std::{
    sync::{
        OnceLock,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
};

use crate::parallel;

/// Returns how many processors there are for us and `parts` of work, at least one.
pub(super) fn processors_for(parts: usize) -> usize {
    if parts <= 1 {
        return 1;
    }
    // To find out takes a dozen system calls.
    static PROCESSORS: OnceLock<usize> = OnceLock::new();
    let all = PROCESSORS.get_or_init(|| thread::available_parallelism().map_or(1, usize::from));
    parts.min(*all)
}

/// Calls `work` with every item and its position, and returns what it returned
/// in the same order. A processor takes `worth` items at a time, so that starting
/// a thread for them pays.
pub(crate) fn map<T: Sync, R: Send>(
    items: &[T],
    worth: usize,
    work: impl Fn(usize, &T) -> R + Sync,
) -> Vec<R> {
    map_until(items, worth, |(), position, item| work(position, item), |_| false)
}

/// Does so up to the first item for whose result `is_last` holds; a few items
/// more may be worked on in vain. `work` is also given what its thread keeps
/// from item to item.
pub(crate) fn map_until<T: Sync, R: Send, S: Default>(
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
    let others = processors_for(items.len().div_ceil(worth)) - 1;
    let mut done = thread::scope(|scope| {
        let others: Vec<_> = (0..others).map_while(|_| parallel::spawn(scope, take)).collect();
        let mut done = take();
        for other in others {
            done.extend(other.join().expect("the work does not panic"));
        }
        done
    });
    done.sort_unstable_by_key(|(first, _)| *first);
    let mut results: Vec<R> = done.into_iter().flat_map(|(_, results)| results).collect();
    if let Some(last) = results.iter().position(is_last) {
        results.truncate(last + 1);
    }
    results
}

#[cfg(test)]
mod tests {
    use super::{map, map_until};

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
}
