//! Answering a reader on the processor that it runs on.
//!
//! A program that calls read(2) sleeps until it has its answer. If the thread that answers
//! runs on the same processor, the one goes on where the other stops. On another processor,
//! each has to wake up a processor that has gone idle meanwhile, which takes several times as
//! long as a small read. The kernel prefers the other one, since it does not know that the
//! waker is about to sleep.

use std::{
    cell::Cell,
    sync::atomic::{AtomicU32, Ordering},
};

use log::debug;

use crate::{proc, sys::task, units::HostPid};

/// The thread that calls the kernel (`sched_setaffinity(2)`).
const THIS_THREAD: HostPid = HostPid(0);

/// Requests in a row of one reader after which its processor is looked for, and again by each
/// thread after as many: looking takes 5 to 10 us, and readers seldom move.
const REQUESTS: u32 = 32;

/// The longest request for the page cache that its reader is likely to wait for. Longer ones
/// are read ahead, while the reader works on what it has.
const WAITED_FOR_BYTES: usize = 64 << 10;

thread_local! {
    /// The one processor that this thread runs on, if it is bound to one.
    static BOUND: Cell<Option<u32>> = const { Cell::new(None) };
    /// Requests that it has answered since it looked where the reader runs.
    static ANSWERED: Cell<u32> = const { Cell::new(0) };
}

/// Binds the threads that answer to the processor of the reader, while there is one.
#[derive(Debug)]
pub(super) struct Follower {
    /// The processors that the daemon may run on, a bit each; empty if that is not known.
    all: Vec<u64>,
    recent: Recent,
}

impl Follower {
    /// Starts with the processors that the caller may run on.
    pub(super) fn new() -> Self {
        let all = task::affinity(THIS_THREAD).unwrap_or_default();
        Self { all, recent: Recent::default() }
    }

    /// The thread `reader` reads `size` bytes, and waits for them unless they are for the
    /// page cache.
    pub(super) fn reads(&self, reader: u32, size: usize, for_page_cache: bool) {
        let waits = !for_page_cache || size <= WAITED_FOR_BYTES;
        if !self.recent.is_alone(reader, waits) {
            self.bind(None);
        } else if BOUND.get().is_none() || ANSWERED.get() >= REQUESTS {
            self.bind(self.processor_of(reader));
            ANSWERED.set(0);
        } else {
            ANSWERED.set(ANSWERED.get() + 1);
        }
    }

    /// Returns the processor that a thread runs on, or will when it wakes up.
    fn processor_of(&self, tid: u32) -> Option<u32> {
        // A reader outside the daemon's pid namespace has the number 0.
        let tid = i32::try_from(tid).ok().filter(|tid| *tid > 0)?;
        let processor = proc::stat(HostPid(tid)).ok()?.processor;
        let word = self.all.get((processor / u64::BITS) as usize)?;
        (word & one(processor) != 0).then_some(processor)
    }

    /// Binds this thread to a processor, or to none.
    fn bind(&self, processor: Option<u32>) {
        if BOUND.get() == processor || self.all.is_empty() {
            return;
        }
        let only = |processor: u32| {
            let mut words = vec![0; self.all.len()];
            words[(processor / u64::BITS) as usize] = one(processor);
            words
        };
        let words = processor.map_or_else(|| self.all.clone(), only);
        match task::set_affinity(THIS_THREAD, &words) {
            Ok(()) => BOUND.set(processor),
            Err(errno) => debug!("bind a thread to processor {processor:?}: {errno}"),
        }
    }
}

/// The bit of a processor in its word.
fn one(processor: u32) -> u64 {
    1 << (processor % u64::BITS)
}

/// Who has read recently. Threads that note at the same time may disturb each other's
/// counts, which does no harm.
#[derive(Debug, Default)]
struct Recent {
    reader: AtomicU32,
    /// Requests of this one in a row.
    requests: AtomicU32,
}

impl Recent {
    /// Whether a reader that reads now, and waits for it or not, has been the only one for
    /// a while.
    fn is_alone(&self, reader: u32, waits: bool) -> bool {
        if self.reader.swap(reader, Ordering::Relaxed) != reader || !waits {
            self.requests.store(0, Ordering::Relaxed);
            return false;
        }
        self.requests.fetch_add(1, Ordering::Relaxed) >= REQUESTS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_reader_is_followed_and_several_are_not() {
        let recent = Recent::default();
        for _ in 0..=REQUESTS {
            assert!(!recent.is_alone(7, true));
        }
        assert!(recent.is_alone(7, true));
        assert!(!recent.is_alone(8, true));
        for _ in 0..=REQUESTS {
            assert!(!recent.is_alone(7, true));
        }
        assert!(recent.is_alone(7, true));
        assert!(!recent.is_alone(7, false), "it reads ahead");
        assert!(!recent.is_alone(7, true));
    }

    #[test]
    fn a_thread_is_bound_and_let_go() {
        let follower = Follower::new();
        let own = u32::try_from(nix::unistd::gettid().as_raw()).unwrap();
        let processor = follower.processor_of(own).unwrap();
        follower.bind(Some(processor));
        let bits = |words: &[u64]| words.iter().map(|word| word.count_ones()).sum::<u32>();
        assert_eq!(bits(&task::affinity(THIS_THREAD).unwrap()), 1);
        follower.bind(None);
        assert_eq!(task::affinity(THIS_THREAD).unwrap(), follower.all);
        assert_eq!(follower.processor_of(0), None);
    }
}
