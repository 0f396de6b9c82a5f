//! Answering a reader on the processor that it runs on.
//!
//! A program that calls read(2) sleeps until it has its answer. If the answering thread runs on
//! the same processor, each continues when the other stops. On different processors, each must
//! wake up a processor that has gone idle, which takes several times as long as a small read. The
//! kernel prefers a different processor, because it does not know that the waker is about to
//! sleep.

use std::{
    cell::Cell,
    sync::atomic::{AtomicU32, Ordering},
};

use log::debug;

use crate::{
    proc,
    sys::task::{self, THIS_THREAD},
    units::HostPid,
};

/// Consecutive requests of one reader before its processor is looked up.
const REQUESTS: u32 = 32;

/// Requests before the next lookup: it takes 5 to 10 us, and readers seldom move.
const LOOK_AGAIN: u32 = 256;

/// No processor.
const NONE: u32 = u32::MAX;

/// The longest request for the page cache for which a reader is likely to wait. Longer ones are
/// readahead, while the reader works on earlier bytes.
const WAITED_FOR_BYTES: usize = 64 << 10;

thread_local! {
    /// The one processor that this thread runs on, if it is bound to one.
    static BOUND: Cell<Option<u32>> = const { Cell::new(None) };
}

/// Binds the threads that answer to the processor of the reader, while there is one.
#[derive(Debug)]
pub(super) struct Follower {
    /// The processors that the daemon may run on, a bit each; empty if that is not known.
    all: Vec<u64>,
    recent: Recent,
    /// The reader's processor at the last lookup.
    processor: AtomicU32,
}

impl Follower {
    /// Starts with the processors on which the caller may run.
    pub(super) fn new() -> Self {
        let all = task::affinity(THIS_THREAD).unwrap_or_default();
        Self { all, recent: Recent::default(), processor: AtomicU32::new(NONE) }
    }

    /// Notes that the thread `reader` reads `size` bytes; it waits for them unless they are for
    /// the page cache.
    pub(super) fn reads(&self, reader: u32, size: usize, for_page_cache: bool) {
        let waits = !for_page_cache || size <= WAITED_FOR_BYTES;
        let Some(requests) = self.recent.note(reader, waits) else { return self.bind(None) };
        if requests % LOOK_AGAIN == REQUESTS {
            let processor = self.processor_of(reader).unwrap_or(NONE);
            self.processor.store(processor, Ordering::Relaxed);
        }
        if requests >= REQUESTS {
            let processor = self.processor.load(Ordering::Relaxed);
            self.bind((processor != NONE).then_some(processor));
        }
    }

    /// Returns the processor on which a thread runs, or will run when it wakes up.
    fn processor_of(&self, tid: u32) -> Option<u32> {
        // A reader outside the daemon's pid namespace has the number 0.
        let tid = i32::try_from(tid).ok().filter(|tid| *tid > 0)?;
        let processor = proc::stat(HostPid(tid)).ok()?.processor;
        task::cpus(&self.all).find(|cpu| *cpu == processor)
    }

    /// Binds this thread to a processor, or to none.
    fn bind(&self, processor: Option<u32>) {
        if BOUND.get() == processor || self.all.is_empty() {
            return;
        }
        let only = processor.and_then(|processor| task::only(processor, self.all.len()));
        match task::set_affinity(THIS_THREAD, only.as_ref().unwrap_or(&self.all)) {
            Ok(()) => BOUND.set(processor),
            Err(errno) => debug!("bind a thread to processor {processor:?}: {errno}"),
        }
    }
}

/// The most recent reader. Threads that update it at the same time may spoil the count, which does
/// no harm.
#[derive(Debug, Default)]
struct Recent {
    reader: AtomicU32,
    /// Consecutive requests of this reader.
    requests: AtomicU32,
}

impl Recent {
    /// Notes a request, and returns the number of consecutive requests of this reader before it;
    /// `None` if the last one was of another reader, or if the reader does not wait.
    fn note(&self, reader: u32, waits: bool) -> Option<u32> {
        if self.reader.swap(reader, Ordering::Relaxed) != reader || !waits {
            self.requests.store(0, Ordering::Relaxed);
            return None;
        }
        Some(self.requests.fetch_add(1, Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_of_one_reader_are_counted() {
        let recent = Recent::default();
        assert_eq!(recent.note(7, true), None);
        assert_eq!([(); 3].map(|()| recent.note(7, true)), [0, 1, 2].map(Some));
        assert_eq!(recent.note(8, true), None);
        assert_eq!(recent.note(7, true), None);
        assert_eq!(recent.note(7, true), Some(0));
        assert_eq!(recent.note(7, false), None, "it reads ahead");
        assert_eq!(recent.note(7, true), Some(0));
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
