//! The memory of one process, as the pager sees it.

use std::{
    ops::Range,
    os::fd::{AsFd, BorrowedFd},
    sync::{
        Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard,
        atomic::{AtomicBool, Ordering},
    },
};

use nix::errno::Errno;

use super::{
    LazyError, Result,
    waiting::{Part, Waiting, page},
};
use crate::{
    chain::{MemoryBytes, read_at},
    parallel,
    sys::missing::{Message, MissingPages},
    units::{HostPid, PAGE_SIZE, PageIndex, RemoteAddr},
};

/// How much is read around a page that a thread waits for: 64 KiB.
const AROUND_BYTES: u64 = 64 << 10;

/// How much is read at a time of pages that no thread waits for: 256 KiB.
const AHEAD_BYTES: u64 = 256 << 10;

/// The memory of one process.
///
/// What changes the address space is noted before the process goes on: the messages of the kernel are
/// read and noted under a write lock of [`Self::waiting`], and pages are supplied under a read lock,
/// after a look whether they still wait. In between the kernel refuses pages (`EAGAIN`).
#[derive(Debug)]
pub(super) struct Space {
    /// The process that this memory, or that of its ancestors, was restored for.
    pub(super) pid: HostPid,
    /// Its number in the images.
    pub(super) id: u64,
    fd: MissingPages,
    memory: Arc<MemoryBytes>,
    waiting: RwLock<Waiting>,
    /// Where the next pages ahead are looked for.
    next: Mutex<u64>,
    is_gone: AtomicBool,
}

/// What became of an attempt to supply pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Supplied {
    /// They are there.
    Yes,
    /// Messages come first, or the pages have moved meanwhile.
    Later,
    /// The memory no longer exists.
    Gone,
}

/// What messages said, except for what was noted.
#[derive(Debug, Default)]
pub(super) struct Heard {
    /// Pages that threads wait for.
    pub(super) faults: Vec<u64>,
    /// The memory of new children.
    pub(super) children: Vec<Space>,
}

impl Space {
    pub(super) fn new(
        (pid, id): (HostPid, u64),
        fd: MissingPages,
        memory: Arc<MemoryBytes>,
        ranges: &[Range<u64>],
    ) -> Self {
        let mut waiting = Waiting::default();
        let pages =
            |range: &Range<u64>| PageIndex::holding(range.start)..PageIndex::holding(range.end);
        for range in ranges {
            for stored in memory.index().stored_within(pages(range)) {
                waiting.add(stored.start.address()..stored.end.address());
            }
        }
        let is_gone = AtomicBool::new(false);
        Self { pid, id, fd, memory, waiting: RwLock::new(waiting), next: Mutex::new(0), is_gone }
    }

    /// Returns the descriptor, to wait for messages.
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    fn read(&self) -> RwLockReadGuard<'_, Waiting> {
        self.waiting.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Waiting> {
        self.waiting.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the memory no longer exists: the process has ended, or has executed another program.
    pub(super) fn is_gone(&self) -> bool {
        self.is_gone.load(Ordering::Relaxed)
    }

    /// Whether no page waits any more.
    pub(super) fn is_complete(&self) -> bool {
        self.is_gone() || self.read().is_empty()
    }

    /// Returns the number of bytes that wait.
    pub(super) fn bytes(&self) -> u64 {
        self.read().bytes()
    }

    /// Reads and notes the messages of the kernel.
    pub(super) fn listen(&self) -> Result<Heard> {
        let mut heard = Heard::default();
        let mut waiting = self.write();
        loop {
            let messages = self.fd.messages().map_err(|source| {
                let (pid, step) = (self.pid, "read messages of userfaultfd");
                LazyError::Kernel { pid, step, source }
            })?;
            if messages.is_empty() {
                return Ok(heard);
            }
            for message in messages {
                match message {
                    Message::Fault(address) => heard.faults.push(page(address).start),
                    Message::Forked(fd) => heard.children.push(Self {
                        pid: self.pid,
                        id: self.id,
                        fd,
                        memory: Arc::clone(&self.memory),
                        waiting: RwLock::new(waiting.clone()),
                        next: Mutex::new(0),
                        is_gone: AtomicBool::new(false),
                    }),
                    Message::Moved(from, to, len) => waiting.relocate(from, to, len),
                    Message::Removed(range) | Message::Unmapped(range) => {
                        drop(waiting.take(&range));
                    }
                }
            }
        }
    }

    /// Supplies a page that a thread waits for, and pages around it. Returns which these are in the
    /// images, if they are there.
    pub(super) fn serve(
        &self,
        address: u64,
        buffer: &mut Vec<u8>,
    ) -> Result<(Supplied, Option<Range<u64>>)> {
        let part = self.read().around(address, AROUND_BYTES);
        let Some(part) = part else { return Ok((self.serve_zeros(address)?, None)) };
        *parallel::lock(&self.next) = part.range.end;
        self.read_part(&part, buffer)?;
        let origin = part.origin..part.origin + (part.range.end - part.range.start);
        Ok((self.supply(&part, buffer)?, Some(origin)))
    }

    /// Supplies what waits in a range, if the process has not moved it.
    pub(super) fn supply_early(&self, range: &Range<u64>, buffer: &mut Vec<u8>) -> Result<()> {
        let mut next = range.start;
        while next < range.end {
            let part = self.read().next(next, AHEAD_BYTES.min(range.end - next));
            let Some(part) = part.filter(|part| part.range.start < range.end) else { break };
            next = part.range.end;
            self.read_part(&part, buffer)?;
            // What fails now comes later.
            let _ = self.supply(&part, buffer)?;
        }
        Ok(())
    }

    /// Supplies pages that no thread waits for. `None` if none is left, else whether pages were
    /// supplied.
    pub(super) fn advance(&self, buffer: &mut Vec<u8>) -> Result<Option<Supplied>> {
        if self.is_gone() {
            return Ok(None);
        }
        let part = {
            let mut next = parallel::lock(&self.next);
            let waiting = self.read();
            let part = waiting.next(*next, AHEAD_BYTES).or_else(|| waiting.next(0, AHEAD_BYTES));
            let Some(part) = part else { return Ok(None) };
            *next = part.range.end;
            part
        };
        self.read_part(&part, buffer)?;
        self.supply(&part, buffer).map(Some)
    }

    fn read_part(&self, part: &Part, buffer: &mut Vec<u8>) -> Result<()> {
        let len = usize::try_from(part.range.end - part.range.start).expect("a few pages");
        buffer.resize(len, 0);
        read_at(&*self.memory, part.origin, buffer).map(drop).map_err(|source| LazyError::Read {
            pid: self.pid,
            address: RemoteAddr(part.origin),
            source,
        })
    }

    /// Supplies the bytes of a part, unless it has moved since it was looked up.
    fn supply(&self, part: &Part, bytes: &[u8]) -> Result<Supplied> {
        let (start, end) = (part.range.start, part.range.end);
        let waiting = self.read();
        if !waiting.has(part) {
            return Ok(Supplied::Later);
        }
        let mut outcome = Supplied::Yes;
        let mut next = start;
        // Pages of several mappings are refused together.
        let mut limit = end - start;
        while next < end {
            let offset = usize::try_from(next - start).expect("a few pages");
            let len = usize::try_from(limit.min(end - next)).expect("a few pages");
            match self.fd.supply(next, &bytes[offset..offset + len]) {
                Ok(supplied) => next += supplied,
                // It is there, or no longer mapped.
                Err(Errno::ENOENT) if limit > PAGE_SIZE => limit = PAGE_SIZE,
                Err(Errno::EEXIST | Errno::ENOENT) => {
                    self.wake(next);
                    next += PAGE_SIZE;
                }
                Err(Errno::EAGAIN) => {
                    outcome = Supplied::Later;
                    break;
                }
                Err(Errno::ESRCH) => return Ok(self.note_gone()),
                Err(source) => return Err(self.refused(next, source)),
            }
        }
        drop(waiting);
        self.write().supplied(&Part { range: start..next, origin: part.origin });
        Ok(outcome)
    }

    /// Supplies a page of zeros.
    fn serve_zeros(&self, address: u64) -> Result<Supplied> {
        let page = page(address);
        let waiting = self.read();
        if waiting.at(address, PAGE_SIZE).is_some() {
            return Ok(Supplied::Later);
        }
        match self.fd.supply_zeros(&page) {
            Ok(_) => Ok(Supplied::Yes),
            Err(Errno::EEXIST | Errno::ENOENT) => {
                self.wake(address);
                Ok(Supplied::Yes)
            }
            Err(Errno::EAGAIN) => Ok(Supplied::Later),
            Err(Errno::ESRCH) => Ok(self.note_gone()),
            Err(source) => Err(self.refused(address, source)),
        }
    }

    /// Lets threads that wait for a page look again.
    fn wake(&self, address: u64) {
        if let Err(errno) = self.fd.wake(&page(address)) {
            log::debug!("{}: wake the threads that wait at {address:#x}: {errno}", self.pid);
        }
    }

    fn note_gone(&self) -> Supplied {
        self.is_gone.store(true, Ordering::Relaxed);
        Supplied::Gone
    }

    fn refused(&self, address: u64, source: Errno) -> LazyError {
        LazyError::Supply { pid: self.pid, address: RemoteAddr(address), source }
    }
}
