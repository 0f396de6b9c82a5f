//! Copying memory into pages files.
//!
//! Each memory (the private memory of a process, or a shared object) is read in
//! chunks that stay in the processor's cache: the test for zeros, the comparison
//! with the parent chain and the writing cost one trip to memory. Several threads
//! share the work. They read and compare chunks side by side, and take turns to
//! say where the chunk's pages go, so that pagemaps come out in order; then they
//! write side by side.

use std::{
    fs::File,
    io::{self, IoSlice},
    os::unix::fs::{FileExt, MetadataExt},
    path::PathBuf,
    sync::{
        Arc, Condvar, Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
};

use nix::{
    errno::Errno,
    sys::uio::pwritev,
    unistd::{Whence, lseek},
};

use super::{DumpError, Result, reading::ProcessMemory, track::marked};
use crate::{
    chain::{Content, MemoryBytes, Place, read_at},
    fault::{self, Point},
    image::{Kind, MemoryId, PagemapEntry, PagemapWriter, Presence, SnapshotWriter},
    parallel,
    sys::{cancel, fds, swap},
    units::{BLOCK_BYTES, PAGE_LEN, PAGE_SIZE, PageIndex, page_bytes},
};

/// Pages in a chunk: 256 KiB, half of a usual second-level cache, since the parent's
/// bytes are beside it.
const CHUNK_PAGES: u64 = 64;

/// A stretch of pages that may hold something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stretch {
    /// The first page: an address, or an offset in an object, in pages.
    pub(super) first: PageIndex,
    /// How many there are.
    pub(super) pages: u64,
    /// Whether reading may pin them; see [`super::reading`].
    pub(super) pinnable: bool,
    /// Whether they are of the vDSO, and the process has not looked at them yet; see
    /// [`super::reading`].
    pub(super) of_kernel: bool,
    /// Whether they are in swap.
    pub(super) swapped: bool,
    /// Whether zeros must be stored: without them a file would be seen, or another program
    /// would not go on with the chain.
    pub(super) zeros_stored: bool,
    /// Whether they are known to be in the parent as they are, without a look.
    pub(super) unwritten: bool,
}

/// Where the bytes of a memory are read.
#[derive(Debug)]
pub(super) enum Origin {
    /// In a process.
    Process(ProcessMemory),
    /// In the object itself.
    Object { file: File, name: String },
}

/// A memory to be dumped.
#[derive(Debug)]
pub(super) struct Memory {
    pub(super) id: MemoryId,
    pub(super) origin: Origin,
    /// Ascending.
    pub(super) stretches: Vec<Stretch>,
    /// The same memory in the parent chain.
    pub(super) parent: Option<MemoryBytes>,
    /// Whether the tree runs while it is read: pages may be gone, and are left out.
    pub(super) running: bool,
}

impl Memory {
    /// A shared object, with all that is no hole of it.
    ///
    /// # Errors
    /// What looking for holes returns.
    pub(super) fn of_object(shmid: u64, file: File, name: String, running: bool) -> Result<Self> {
        let mut stretches = data_of(&file).map_err(|source| {
            let name = name.clone();
            DumpError::ReadObject { name, offset: 0, source }
        })?;
        let (swap, free) = swap::bytes();
        if swap != free {
            match swap::swapped_pages(&file) {
                Ok(swapped) => {
                    stretches = marked(&stretches, &swapped, |pages| pages.swapped = true);
                }
                Err(error) => log::debug!("{name}: it is not known what is in swap: {error}"),
            }
        }
        let id = MemoryId::Shared(shmid);
        Ok(Self { id, origin: Origin::Object { file, name }, stretches, parent: None, running })
    }

    /// Whether it is a shared object.
    pub(super) fn is_shared(&self) -> bool {
        matches!(self.origin, Origin::Object { .. })
    }
}

/// How many pages were found to be what.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counts {
    /// Looked at.
    pub(super) scanned: u64,
    /// Compared with the parent.
    pub(super) compared: u64,
    /// Left to the parent.
    pub(super) in_parent: u64,
    /// All zero, and left out.
    pub(super) zero: u64,
    /// Written.
    pub(super) stored: u64,
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

/// What was copied: private memory and shared objects.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Copied {
    pub(super) private: Counts,
    pub(super) shared: Counts,
}

/// Dumps all memories into `images`; their pages files are numbered from 1. The disk
/// begins with them at once if `early`, which is for trees that are not to run on, and
/// for those that run already: it ends sooner, but copying takes longer.
///
/// # Errors
/// What keeps a memory from being read or an image from being written.
pub(super) fn dump(memories: &[Memory], images: &SnapshotWriter, early: bool) -> Result<Copied> {
    let mut jobs = Vec::new();
    for (number, memory) in (1..).zip(memories) {
        jobs.push(Job::new(memory, number, images, early)?);
    }
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
    let to_read = memories.iter().flat_map(|memory| &memory.stretches).filter(|s| !s.unwritten);
    let total: u64 = to_read.map(|stretch| stretch.pages).sum();
    if total < WORTH_A_THREAD_PAGES {
        work();
    } else {
        parallel::on_all_processors(&work);
    }
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

/// Bytes of a pages file that the disk is given at a time: large enough to lie in one
/// piece there.
const EARLY_BYTES: u64 = 32 << 20;

/// Pages that take longer to copy than a thread takes to start.
const WORTH_A_THREAD_PAGES: u64 = 1024;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Returns the memory with most left to do for each thread that is at it.
fn next_job<'a, 'b>(jobs: &'b [Job<'a>]) -> Option<&'b Job<'a>> {
    let weight = |job: &&Job| {
        let plan = lock(&job.plan);
        plan.left / (plan.workers + 1)
    };
    jobs.iter().filter(|job| lock(&job.plan).left > 0).max_by_key(weight)
}

/// One memory while it is copied.
struct Job<'a> {
    memory: &'a Memory,
    pages_file: File,
    pages_path: PathBuf,
    plan: Mutex<Plan>,
    turn: Mutex<Turn>,
    turned: Condvar,
    /// Held while writing: the kernel lets one thread write to a file at a time, and
    /// those that wait for it in the kernel burn time.
    writing: Mutex<()>,
    early: bool,
}

/// What is left to read.
struct Plan {
    stretch: usize,
    /// Pages of that stretch that were given out.
    taken: u64,
    /// Pages that were not given out.
    left: u64,
    next_chunk: u64,
    workers: u64,
}

/// What was decided so far, in the order of pages.
struct Turn {
    chunk: u64,
    pagemap: PagemapWriter<io::BufWriter<File>>,
    last: Option<PagemapEntry>,
    file_pages: u64,
    counts: Counts,
}

/// What each thread reads into.
#[derive(Default)]
struct Buffers {
    /// All of the chunk.
    runs: Vec<Stretch>,
    /// What of it is read.
    reads: Vec<Stretch>,
    bytes: Vec<u8>,
    parent: Vec<u8>,
    places: Vec<Presence>,
}

impl<'a> Job<'a> {
    fn new(
        memory: &'a Memory,
        pages_id: u32,
        images: &SnapshotWriter,
        early: bool,
    ) -> Result<Self> {
        let (kind, number) = match memory.id {
            MemoryId::Private(pid) => (Kind::Pagemap, pid),
            MemoryId::Shared(shmid) => (Kind::ShmemPagemap, shmid),
        };
        let pagemap = PagemapWriter::new(images.create(kind, number)?, pages_id)?;
        let left = memory.stretches.iter().map(|stretch| stretch.pages).sum();
        Ok(Self {
            memory,
            pages_file: images.create_raw(Kind::Pages, pages_id.into())?,
            pages_path: images.path(Kind::Pages, pages_id.into()),
            plan: Mutex::new(Plan { stretch: 0, taken: 0, left, next_chunk: 0, workers: 0 }),
            turn: Mutex::new(Turn {
                chunk: 0,
                pagemap,
                last: None,
                file_pages: 0,
                counts: Counts::default(),
            }),
            turned: Condvar::new(),
            writing: Mutex::new(()),
            early,
        })
    }

    /// Copies chunks until all are given out.
    fn work(&self, buffers: &mut Buffers, stop: &AtomicBool) -> Result<()> {
        lock(&self.plan).workers += 1;
        let result = self.copy_chunks(buffers, stop);
        lock(&self.plan).workers -= 1;
        result
    }

    fn copy_chunks(&self, buffers: &mut Buffers, stop: &AtomicBool) -> Result<()> {
        while let Some(chunk) = self.take(buffers) {
            if cancel::is_cancelled() {
                return Err(DumpError::Cancelled);
            }
            if chunk == FAULT_CHUNK {
                fault::hit(Point::DumpMemory)?;
            }
            let read = self.read(buffers);
            // The turn is taken in any case, or nobody behind would get theirs.
            let placed = self.await_turn(chunk, stop).map(|mut turn| {
                let placed = read.and_then(|()| self.place(&mut turn, buffers));
                turn.chunk += 1;
                self.turned.notify_all();
                placed
            });
            let Some(placed) = placed else { return Ok(()) };
            self.write(buffers, placed?)?;
        }
        Ok(())
    }

    /// Takes the next chunk and returns its number. What is not read takes no room in
    /// it.
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

    /// Reads the chunk and decides of each page where it is to be.
    fn read(&self, buffers: &mut Buffers) -> Result<()> {
        let Buffers { reads: runs, bytes, parent, places, .. } = buffers;
        let pages: u64 = runs.iter().map(|run| run.pages).sum();
        bytes.resize(len(pages), 0);
        self.read_runs(runs, bytes)?;
        places.clear();
        if let Some(memory) = &self.memory.parent {
            parent.resize(bytes.len(), 0);
            let mut at = 0;
            for run in runs.iter() {
                let end = at + len(run.pages);
                read_parent(memory, run, &mut parent[at..end])?;
                at = end;
            }
        }
        let mut pages = bytes.chunks_exact(PAGE_LEN).enumerate();
        for run in runs.iter() {
            for (index, (number, page)) in (run.first.0..run.first.0 + run.pages).zip(&mut pages) {
                let at = number * PAGE_LEN;
                let zero = is_zero(page);
                let is_in_parent = || match &self.memory.parent {
                    Some(memory) if zero => has_zeros(memory, PageIndex(index)),
                    Some(_) => *page == parent[at..at + PAGE_LEN],
                    None => false,
                };
                places.push(if zero && !run.zeros_stored {
                    Presence::Absent
                } else if is_in_parent() {
                    Presence::Parent
                } else {
                    Presence::Present
                });
            }
        }
        Ok(())
    }

    fn read_runs(&self, runs: &[Stretch], bytes: &mut [u8]) -> Result<()> {
        match &self.memory.origin {
            Origin::Process(process) => process.read(runs, bytes, self.memory.running),
            Origin::Object { file, name } => for_each_run(runs, bytes, |run, target| {
                let offset = run.first.address();
                read_object(file, offset, target).map_err(|source| DumpError::ReadObject {
                    name: name.clone(),
                    offset,
                    source,
                })?;
                if run.swapped
                    && let Err(errno) = swap::page_out(file, offset, target.len())
                {
                    log::debug!("{name}: memory that was in swap stays in memory: {errno}");
                }
                Ok(())
            }),
        }
    }

    fn await_turn(&self, chunk: u64, stop: &AtomicBool) -> Option<MutexGuard<'_, Turn>> {
        let mut turn = lock(&self.turn);
        while turn.chunk != chunk {
            if stop.load(Ordering::Relaxed) {
                return None;
            }
            turn = self.turned.wait(turn).unwrap_or_else(std::sync::PoisonError::into_inner);
        }
        Some(turn)
    }

    /// Wakes who waits for a turn that will not come.
    fn wake(&self) {
        let _turn = lock(&self.turn);
        self.turned.notify_all();
    }

    /// Enters a chunk into the pagemap and returns where in the pages file its
    /// pages begin.
    fn place(&self, turn: &mut Turn, buffers: &Buffers) -> Result<u64> {
        let begin = turn.file_pages;
        let mut places = buffers.places.iter();
        for run in &buffers.runs {
            if run.unwritten {
                turn.counts.in_parent += run.pages;
                turn.enter(run.first, run.pages, Presence::Parent)?;
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
                    turn.enter(PageIndex(run.first.0 + number), 1, presence)?;
                }
            }
        }
        Ok(begin)
    }

    /// Writes the pages of a chunk that are to be stored, from page `begin` of the
    /// pages file on.
    fn write(&self, buffers: &Buffers, begin: u64) -> Result<()> {
        let failed =
            |source: io::Error| DumpError::WritePages { path: self.pages_path.clone(), source };
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
        let mut offset = i64::try_from(page_bytes(begin)).expect("files are shorter than 2^63");
        let from = offset;
        let mut rest = slices.as_mut_slice();
        let writing = lock(&self.writing);
        while !rest.is_empty() {
            let count =
                pwritev(&self.pages_file, rest, offset).map_err(|errno| failed(errno.into()))?;
            if count == 0 {
                return Err(failed(io::ErrorKind::WriteZero.into()));
            }
            offset += i64::try_from(count).expect("at most a chunk");
            IoSlice::advance_slices(&mut rest, count);
        }
        drop(writing);
        let stretch = |offset: i64| offset.cast_unsigned() / EARLY_BYTES;
        if self.early && stretch(from) != stretch(offset) {
            let passed = stretch(from) * EARLY_BYTES;
            fds::begin_writing(&self.pages_file, passed, EARLY_BYTES);
        }
        Ok(())
    }

    fn finish(self) -> Result<Counts> {
        let mut turn = self.turn.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(last) = turn.last.take() {
            turn.pagemap.entry(&last)?;
        }
        turn.pagemap.into_image().finish()?;
        log::debug!("{}: {:?}", self.memory.id, turn.counts);
        Ok(turn.counts)
    }
}

/// The chunk in which a failure can be made to happen.
const FAULT_CHUNK: u64 = 1;

impl Turn {
    /// Enters pages, which come behind all that were entered before.
    fn enter(&mut self, first: PageIndex, pages: u64, presence: Presence) -> Result<()> {
        if let Some(last) = &mut self.last
            && last.end() == first
            && last.presence == presence
        {
            last.pages += pages;
            return Ok(());
        }
        let entry = PagemapEntry { first, pages, presence, lazy: false };
        if let Some(last) = self.last.replace(entry) {
            self.pagemap.entry(&last)?;
        }
        Ok(())
    }
}

pub(super) fn len(pages: u64) -> usize {
    usize::try_from(page_bytes(pages)).expect("at most a chunk")
}

/// Calls `read` with each run and its part of `bytes`.
pub(super) fn for_each_run(
    runs: &[Stretch],
    bytes: &mut [u8],
    mut read: impl FnMut(&Stretch, &mut [u8]) -> Result<()>,
) -> Result<()> {
    let mut rest = bytes;
    for run in runs {
        let target;
        (target, rest) = rest.split_at_mut(len(run.pages));
        read(run, target)?;
    }
    Ok(())
}

/// Reads a stretch of an object; what is behind its end is zero.
fn read_object(file: &File, offset: u64, target: &mut [u8]) -> io::Result<()> {
    let mut done = 0;
    while done < target.len() {
        match file.read_at(&mut target[done..], offset + done as u64) {
            Ok(0) => {
                target[done..].fill(0);
                return Ok(());
            }
            Ok(count) => done += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Reads what the parent chain has of a run. Pages that no image has are zero, and
/// pages of zeros are not compared with that.
fn read_parent(memory: &MemoryBytes, run: &Stretch, target: &mut [u8]) -> Result<()> {
    if let Ok(count) = read_at(memory, run.first.address(), target) {
        target[count..].fill(0);
        return Ok(());
    }
    // Some page cannot be read, such as one that was punched: it is not equal.
    for (number, page) in (run.first.0..).zip(target.chunks_exact_mut(PAGE_LEN)) {
        if !read_stored(memory, PageIndex(number), page) {
            page.fill(0);
        }
    }
    Ok(())
}

/// Reads a page, if the parent chain has it and it can be read.
fn read_stored(memory: &MemoryBytes, page: PageIndex, target: &mut [u8]) -> bool {
    let extent = memory.index().find(page);
    extent.is_some_and(|extent| matches!(extent.place, Place::Stored { .. }))
        && read_at(memory, page.address(), target).is_ok_and(|count| count == target.len())
}

/// Whether the parent chain has a page, all zero, and it can be read.
fn has_zeros(memory: &MemoryBytes, page: PageIndex) -> bool {
    let mut bytes = [0; PAGE_LEN];
    read_stored(memory, page, &mut bytes) && is_zero(&bytes)
}

/// Whether all bytes of a page are zero.
fn is_zero(page: &[u8]) -> bool {
    // A page with something in it most often shows it early.
    let (first, rest) = page.split_at(64);
    first.iter().all(|byte| *byte == 0)
        && rest.chunks_exact(64).all(|line| line.iter().fold(0, |sum, byte| sum | byte) == 0)
}

/// Returns the bytes of a memory of the parent chain, by address or offset.
pub(super) fn parent_memory(
    chain: &Arc<crate::chain::Chain>,
    id: crate::chain::SnapshotId,
    memory: MemoryId,
) -> Result<Option<MemoryBytes>> {
    match chain.index(id, memory) {
        Ok(index) => {
            let bytes = MemoryBytes::new(Arc::clone(chain), index, PageIndex::END.address());
            Ok((!bytes.is_empty()).then_some(bytes))
        }
        Err(crate::chain::ChainError::NoMemory { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// A stretch of an object, whose holes are zero.
fn of_object(first: PageIndex, pages: u64) -> Stretch {
    Stretch {
        first,
        pages,
        pinnable: false,
        of_kernel: false,
        swapped: false,
        zeros_stored: false,
        unwritten: false,
    }
}

/// Returns the stretches of an object that are not holes.
fn data_of(file: &File) -> io::Result<Vec<Stretch>> {
    let meta = file.metadata()?;
    // Looking for holes goes over all pages, so not where there is no room for any. Pages
    // behind the end make room for some that are not seen: those are read as zeros.
    if meta.len() > 0 && meta.blocks().saturating_mul(BLOCK_BYTES) >= meta.len() {
        let pages = meta.len().div_ceil(PAGE_SIZE);
        return Ok(vec![of_object(PageIndex(0), pages)]);
    }
    let len = i64::try_from(meta.len()).unwrap_or(i64::MAX);
    let mut stretches = Vec::new();
    let mut next = 0;
    while next < len {
        let data = match lseek(file, next, Whence::SeekData) {
            Err(Errno::ENXIO) => break,
            data => data?,
        };
        let hole = lseek(file, data, Whence::SeekHole)?.min(len);
        let first = PageIndex::holding(data.cast_unsigned());
        let end = hole.cast_unsigned().div_ceil(PAGE_SIZE);
        if end > first.0 {
            let pages = end - first.0;
            stretches.push(of_object(first, pages));
        }
        next = hole.max(data + 1);
    }
    Ok(stretches)
}

#[cfg(test)]
mod tests {
    use nix::{
        fcntl::{FallocateFlags, fallocate},
        sys::memfd::{MFdFlags, memfd_create},
    };

    use super::*;

    /// Returns the first page and the number of pages of each stretch of data.
    fn data(object: &File) -> Vec<(u64, u64)> {
        let stretches = data_of(object).unwrap();
        stretches.iter().map(|stretch| (stretch.first.0, stretch.pages)).collect()
    }

    #[test]
    fn stretches_hold_all_data_of_an_object() {
        let object = File::from(memfd_create(c"object", MFdFlags::empty()).unwrap());
        assert_eq!(data(&object), []);
        object.set_len(10 * PAGE_SIZE).unwrap();
        assert_eq!(data(&object), []);
        object.write_all_at(&[1; 4 * PAGE_LEN], 2 * PAGE_SIZE).unwrap();
        object.write_all_at(&[1], 9 * PAGE_SIZE).unwrap();
        assert_eq!(data(&object), [(2, 4), (9, 1)]);
        object.write_all_at(&[1; 10 * PAGE_LEN], 0).unwrap();
        assert_eq!(data(&object), [(0, 10)]);
        object.set_len(9 * PAGE_SIZE + 1).unwrap();
        assert_eq!(data(&object), [(0, 10)]);
        // As many pages as it has room for, but not all within it.
        let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(&object, hole, 3 * 4096, 4096).unwrap();
        assert_eq!(data(&object), [(0, 3), (4, 6)]);
        fallocate(&object, FallocateFlags::FALLOC_FL_KEEP_SIZE, 20 * 4096, 4096).unwrap();
        assert_eq!(data(&object), [(0, 10)]);
    }
}
