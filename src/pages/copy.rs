//! Copies memories, each into its sink.
//!
//! Each memory (the private memory of a process, or a shared object) is read in chunks that fit into
//! the processor's cache: the test for zeros, the comparison with the parent chain and the writing
//! then cost one trip to memory. Several threads share the work. They read and compare chunks in
//! parallel. Then they take turns to enter the pages of their chunks, so that pagemap entries are in
//! order. Finally they store the bytes in parallel.

use std::{
    io::IoSlice,
    sync::{
        Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use super::{Memory, PageSink, PagesError, Result, Stretch, compare::compare, stretch::len};
use crate::{
    fault::{self, Point},
    image::{MemoryId, PagemapEntry, Presence},
    parallel::{self, lock},
    sys::{
        cancel,
        task::{self, OnOneCpu},
    },
    units::{PAGE_LEN, PageIndex},
};

/// Pages in a chunk: 256 KiB, half of a usual second-level cache, as the parent's contents need the
/// other half.
const CHUNK_PAGES: u64 = 64;

/// How many pages went where.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Pages read.
    pub scanned: u64,
    /// Pages compared with the parent.
    pub compared: u64,
    /// Pages left to the parent.
    pub in_parent: u64,
    /// Pages of zeros, left out.
    pub zero: u64,
    /// Pages stored in this snapshot.
    pub stored: u64,
}

impl Counts {
    fn add(&mut self, other: Self) {
        self.scanned += other.scanned;
        self.compared += other.compared;
        self.in_parent += other.in_parent;
        self.zero += other.zero;
        self.stored += other.stored;
    }
}

/// The counts of a copy, for private memory and shared objects.
#[derive(Clone, Copy, Debug, Default)]
pub struct Copied {
    /// Private memory.
    pub private: Counts,
    /// Shared objects.
    pub shared: Counts,
}

impl Copied {
    /// Adds the counts of another copy.
    pub fn add(&mut self, other: Self) {
        self.private.add(other.private);
        self.shared.add(other.shared);
    }
}

/// Copies memories, each into its sink.
///
/// # Errors
/// A memory cannot be read, or a sink fails.
pub fn copy<S: PageSink>(memories: Vec<(&Memory, S)>) -> Result<Copied> {
    let to_read = memories.iter().flat_map(|(memory, _)| &memory.stretches);
    let total: u64 = to_read.filter(|stretch| !stretch.unwritten).map(|s| s.pages).sum();
    let jobs: Vec<Job<S>> =
        memories.into_iter().map(|(memory, sink)| Job::new(memory, sink)).collect();
    let failure = Mutex::new(None);
    let stop = AtomicBool::new(false);
    let work = || {
        let mut buffers = Buffers::default();
        while let Some(job) = next_job(&jobs)
            && !stop.load(Ordering::Relaxed)
        {
            if let Err(error) = job.work(&mut buffers, &stop) {
                stop.store(true, Ordering::Relaxed);
                jobs.iter().for_each(Job::wake);
                lock(&failure).get_or_insert(error);
            }
        }
    };
    let parts = if total < WORTH_A_THREAD_PAGES { 1 } else { usize::MAX };
    parallel::on_threads(parallel::processors_for(parts), &work);
    page_out_what_is_left(&jobs);
    if let Some(error) = lock(&failure).take() {
        return Err(error);
    }
    let mut copied = Copied::default();
    for job in jobs {
        let counts = match job.memory.id {
            MemoryId::Private(_) => &mut copied.private,
            MemoryId::Shared(_) => &mut copied.shared,
        };
        counts.add(job.finish()?);
    }
    Ok(copied)
}

/// Moves pages back to swap that a thread could not move: the kernel reads ahead, and another thread
/// than the reader's may have asked for them ([`Job::read`]).
fn page_out_what_is_left<S>(jobs: &[Job<S>]) {
    let swapped = |job: &&Job<S>| job.memory.stretches.iter().any(|stretch| stretch.swapped);
    let jobs: Vec<&Job<S>> = jobs.iter().filter(swapped).collect();
    if jobs.is_empty() {
        return;
    }
    let all = task::affinity(task::THIS_THREAD).unwrap_or_default();
    for cpu in task::cpus(&all) {
        let _there = OnOneCpu::on(cpu);
        jobs.iter().for_each(|job| job.memory.origin.page_out(&job.memory.stretches));
    }
}

/// The number of pages from which copying takes longer than starting a thread.
const WORTH_A_THREAD_PAGES: u64 = 1024;

/// Returns the memory with the most pages left per thread that copies it.
fn next_job<'a, 'b, S>(jobs: &'b [Job<'a, S>]) -> Option<&'b Job<'a, S>> {
    let weight = |job: &&Job<S>| {
        let plan = lock(&job.plan);
        plan.left / (plan.workers + 1)
    };
    jobs.iter().filter(|job| lock(&job.plan).left > 0).max_by_key(weight)
}

/// A memory that is being copied.
struct Job<'a, S> {
    memory: &'a Memory,
    sink: S,
    plan: Mutex<Plan>,
    turn: Mutex<Turn>,
    turned: Condvar,
}

/// Which chunks have been handed out.
struct Plan {
    stretch: usize,
    /// Pages of that stretch that have been handed out.
    taken: u64,
    /// Pages that have not been handed out.
    left: u64,
    next_chunk: u64,
    workers: u64,
}

/// The state that chunks update in order.
#[derive(Default)]
struct Turn {
    chunk: u64,
    last: Option<PagemapEntry>,
    file_pages: u64,
    counts: Counts,
}

/// The buffers of a thread.
#[derive(Default)]
struct Buffers {
    /// All pages of the chunk.
    runs: Vec<Stretch>,
    /// The pages of the chunk that are read.
    reads: Vec<Stretch>,
    bytes: Vec<u8>,
    parent: Vec<u8>,
    places: Vec<Presence>,
}

impl<'a, S: PageSink> Job<'a, S> {
    fn new(memory: &'a Memory, sink: S) -> Self {
        let left = memory.stretches.iter().map(|stretch| stretch.pages).sum();
        Self {
            memory,
            sink,
            plan: Mutex::new(Plan { stretch: 0, taken: 0, left, next_chunk: 0, workers: 0 }),
            turn: Mutex::new(Turn::default()),
            turned: Condvar::new(),
        }
    }

    /// Copies chunks until all are handed out.
    fn work(&self, buffers: &mut Buffers, stop: &AtomicBool) -> Result<()> {
        lock(&self.plan).workers += 1;
        let result = self.copy_chunks(buffers, stop);
        lock(&self.plan).workers -= 1;
        result
    }

    fn copy_chunks(&self, buffers: &mut Buffers, stop: &AtomicBool) -> Result<()> {
        while let Some(chunk) = self.take(buffers) {
            if cancel::is_cancelled() {
                return Err(PagesError::Cancelled);
            }
            if chunk == FAULT_CHUNK {
                fault::hit(Point::DumpMemory)?;
            }
            let read = self.read(buffers);
            // Take the turn even after an error: the chunks behind wait for it.
            let placed = self.await_turn(chunk, stop).map(|mut turn| {
                let placed = read.and_then(|()| self.place(&mut turn, buffers));
                turn.chunk += 1;
                self.turned.notify_all();
                placed
            });
            let Some(placed) = placed else { return Ok(()) };
            self.store(buffers, placed?)?;
        }
        Ok(())
    }

    /// Takes the next chunk and returns its number. Pages that are not read do not count towards
    /// the size of a chunk.
    fn take(&self, buffers: &mut Buffers) -> Option<u64> {
        let mut plan = lock(&self.plan);
        buffers.runs.clear();
        buffers.reads.clear();
        let mut room = CHUNK_PAGES;
        while room > 0
            && let Some(stretch) = self.memory.stretches.get(plan.stretch)
        {
            let rest = stretch.pages - plan.taken;
            let pages = if stretch.unwritten { rest } else { room.min(rest) };
            let first = PageIndex(stretch.first.0 + plan.taken);
            let run = Stretch { first, pages, ..*stretch };
            buffers.runs.push(run);
            if !run.unwritten {
                buffers.reads.push(run);
                room -= pages;
            }
            plan.left -= pages;
            plan.taken += pages;
            if plan.taken == stretch.pages {
                plan.stretch += 1;
                plan.taken = 0;
            }
        }
        let chunk = plan.next_chunk;
        plan.next_chunk += 1;
        (!buffers.runs.is_empty()).then_some(chunk)
    }

    /// Reads a chunk and decides where each of its pages goes.
    fn read(&self, buffers: &mut Buffers) -> Result<()> {
        let Buffers { reads, bytes, parent, places, .. } = buffers;
        let pages: u64 = reads.iter().map(|run| run.pages).sum();
        bytes.resize(len(pages), 0);
        // A page that was just swapped in waits for the LRU list of its CPU, and the kernel takes
        // only pages of a list back to swap: those of the CPU where it is asked.
        let _stays = reads.iter().any(|run| run.swapped).then(OnOneCpu::here);
        self.memory.origin.read(reads, bytes, self.memory.running)?;
        compare(reads, bytes, self.memory.parent.as_ref(), parent, places)
    }

    fn await_turn(&self, chunk: u64, stop: &AtomicBool) -> Option<MutexGuard<'_, Turn>> {
        let mut turn = lock(&self.turn);
        while turn.chunk != chunk {
            if stop.load(Ordering::Relaxed) {
                return None;
            }
            turn = self.turned.wait(turn).unwrap_or_else(PoisonError::into_inner);
        }
        Some(turn)
    }

    /// Wakes the threads that wait for a turn that will not come.
    fn wake(&self) {
        let _turn = lock(&self.turn);
        self.turned.notify_all();
    }

    /// Enters the pages of a chunk, and returns the number of pages stored before them.
    fn place(&self, turn: &mut Turn, buffers: &Buffers) -> Result<u64> {
        let begin = turn.file_pages;
        let mut places = buffers.places.iter();
        for run in &buffers.runs {
            if run.unwritten {
                turn.counts.in_parent += run.pages;
                self.enter(turn, run.first, run.pages, Presence::Parent)?;
                continue;
            }
            for number in 0..run.pages {
                let presence = *places.next().expect("one for each page");
                turn.counts.scanned += 1;
                match presence {
                    Presence::Absent => turn.counts.zero += 1,
                    Presence::Parent => turn.counts.in_parent += 1,
                    Presence::Present => {
                        turn.counts.stored += 1;
                        turn.file_pages += 1;
                    }
                }
                if presence != Presence::Absent {
                    turn.counts.compared += u64::from(self.memory.parent.is_some());
                    self.enter(turn, PageIndex(run.first.0 + number), 1, presence)?;
                }
            }
        }
        if S::ENTERED_FIRST
            && let Some(last) = turn.last.take()
        {
            self.sink.enter(&last)?;
        }
        Ok(begin)
    }

    /// Enters pages. They must come after all pages entered before.
    fn enter(
        &self,
        turn: &mut Turn,
        first: PageIndex,
        pages: u64,
        presence: Presence,
    ) -> Result<()> {
        let entry = PagemapEntry { first, pages, presence, lazy: false };
        if turn.last.as_mut().is_some_and(|last| last.join(&entry)) {
            return Ok(());
        }
        turn.last.replace(entry).map_or(Ok(()), |last| self.sink.enter(&last))
    }

    /// Stores the bytes of the chunk's pages that go into this snapshot. The first one is stored page
    /// number `begin`.
    fn store(&self, buffers: &Buffers, begin: u64) -> Result<()> {
        let mut slices: Vec<IoSlice> = Vec::new();
        let mut start = None;
        for number in 0..=buffers.places.len() {
            let stored = buffers.places.get(number) == Some(&Presence::Present);
            match (stored, start) {
                (true, None) => start = Some(number * PAGE_LEN),
                (false, Some(from)) => {
                    slices.push(IoSlice::new(&buffers.bytes[from..number * PAGE_LEN]));
                    start = None;
                }
                _ => {}
            }
        }
        self.sink.store(begin, slices)
    }

    fn finish(self) -> Result<Counts> {
        let turn = self.turn.into_inner().unwrap_or_else(PoisonError::into_inner);
        if let Some(last) = turn.last {
            self.sink.enter(&last)?;
        }
        self.sink.finish()?;
        log::debug!("{}: {:?}", self.memory.id, turn.counts);
        Ok(turn.counts)
    }
}

/// The chunk at which a test can inject a failure.
const FAULT_CHUNK: u64 = 1;
