//! Doing the same with many things on all processors.

use std::thread;

/// Calls `work` with every item and its position, and returns what it returned
/// in the same order. A processor gets at least `worth` items, so that starting
/// a thread for them pays.
pub(super) fn map<T: Sync, R: Send>(
    items: &[T],
    worth: usize,
    work: impl Fn(usize, &T) -> R + Sync,
) -> Vec<R> {
    let threads = thread::available_parallelism().map_or(1, usize::from);
    let part = items.len().div_ceil(threads).max(worth).max(1);
    let all = |(first, items): (usize, &[T])| -> Vec<R> {
        (first..).zip(items).map(|(position, item)| work(position, item)).collect()
    };
    let all = &all;
    thread::scope(|scope| {
        let mut parts = (0..).step_by(part).zip(items.chunks(part));
        let Some(own) = parts.next() else { return Vec::new() };
        let others: Vec<_> = parts.map(|part| scope.spawn(move || all(part))).collect();
        let mut results = all(own);
        for other in others {
            results.extend(other.join().expect("the work does not panic"));
        }
        results
    })
}

#[cfg(test)]
mod tests {
    use super::map;

    #[test]
    fn results_are_in_the_order_of_the_items() {
        for count in [0, 1, 2, 7, 100] {
            let items: Vec<usize> = (0..count).map(|item| item * 3).collect();
            let expected: Vec<usize> = (0..count).map(|item| item * 4).collect();
            assert_eq!(map(&items, 2, |position, item| position + item), expected);
        }
    }
}
