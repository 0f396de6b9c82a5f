//! AIO contexts (`io_setup(2)`), with completions to be read.

use std::{mem, os::fd::RawFd, ptr};

use crate::{
    Row,
    kit::{Checkpoint, Verdict, bytes, same},
};

pub const ROWS: &[Row] = &[
    ("aio_contexts", contexts),
    ("aio_ring_of_a_parent", of_parent),
    ("aio_in_flight", in_flight),
];

/// `struct iocb` (`linux/aio_abi.h`).
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Request {
    data: u64,
    key: u32,
    flags: u32,
    opcode: u16,
    priority: i16,
    fd: RawFd,
    buffer: u64,
    bytes: u64,
    offset: u64,
    reserved: u64,
    more_flags: u32,
    eventfd: u32,
}

/// `struct io_event`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[repr(C)]
struct Event {
    data: u64,
    request: u64,
    result: i64,
    result2: i64,
}

/// Words of `struct aio_ring` (`fs/aio.c`).
const SIZE: usize = 1;
const HEAD: usize = 2;
const TAIL: usize = 3;

struct Context {
    id: u64,
    fd: RawFd,
    /// The requests so far, of which each reads bytes of its own.
    submitted: u64,
    read: u64,
}

impl Context {
    fn new(requests: u32, fd: RawFd) -> Result<Self, String> {
        let mut id = 0_u64;
        sys!(syscall(libc::SYS_io_setup, requests, &raw mut id))?;
        Ok(Self { id, fd, submitted: 0, read: 0 })
    }

    fn word(&self, at: usize) -> u32 {
        // SAFETY: the ring is mapped there, and its header has eight words.
        unsafe { ptr::with_exposed_provenance::<u32>(self.id as usize).add(at).read_volatile() }
    }

    fn words(&self) -> [u32; 3] {
        [SIZE, HEAD, TAIL].map(|at| self.word(at))
    }

    /// Reads bytes of the file, and leaves the completions.
    fn submit(&mut self, count: u64) -> Verdict {
        for _ in 0..count {
            let mut target = [0_u8; 8];
            let number = self.submitted;
            let mut request = Request {
                data: number,
                fd: self.fd,
                buffer: target.as_mut_ptr() as u64,
                bytes: 1 + number % 7,
                offset: number % 64,
                ..Request::default()
            };
            let mut list = [&raw mut request];
            let made = sys!(syscall(libc::SYS_io_submit, self.id, 1, list.as_mut_ptr()))?;
            same("submitted", 1, made)?;
            let wanted = &bytes(3, 128)[request.offset as usize..][..request.bytes as usize];
            same("bytes of the file", wanted, &target[..wanted.len()])?;
            self.submitted += 1;
        }
        Ok(())
    }

    /// Reads completions, and compares them with the requests.
    fn take(&mut self, count: u64) -> Verdict {
        for _ in 0..count {
            let mut event = Event::default();
            let none = ptr::null::<libc::timespec>();
            let got = sys!(syscall(libc::SYS_io_getevents, self.id, 1, 1, &raw mut event, none))?;
            same("events", 1, got)?;
            let found = (event.data, event.result, event.result2);
            same("event", (self.read, (1 + self.read % 7) as i64, 0), found)?;
            self.read += 1;
        }
        Ok(())
    }

    /// Whether there is nothing to be read.
    fn is_empty(&self) -> Verdict {
        let mut event = Event::default();
        // SAFETY: all zeros is a valid value.
        let now: libc::timespec = unsafe { mem::zeroed() };
        let got =
            sys!(syscall(libc::SYS_io_getevents, self.id, 0, 1, &raw mut event, &raw const now))?;
        same("events of an empty context", 0, got)
    }
}

/// New; with everything read; partly read; gone around, with unread events on both sides of the
/// end; full; larger than a page.
fn contexts(checkpoint: &Checkpoint) -> Verdict {
    let fd = sys!(memfd_create(c"aio".as_ptr(), 0))?;
    let data = bytes(3, 128);
    sys!(write(fd, data.as_ptr().cast(), data.len()))?;
    let mut all = Vec::new();
    for (requests, submit, take) in
        [(1, 0, 0), (1, 5, 5), (8, 40, 17), (8, 0, 0), (8, 0, 0), (1000, 900, 333)]
    {
        let mut context = Context::new(requests, fd)?;
        context.submit(submit)?;
        context.take(take)?;
        all.push(context);
    }
    let size = u64::from(all[3].word(SIZE));
    for _ in 0..2 {
        all[3].submit(size / 2)?;
        all[3].take(size / 2 - 2)?;
    }
    all[3].submit(10)?;
    let [_, head, tail] = all[3].words();
    ensure!(tail < head, "the ring has not gone around: {head}, {tail}");
    all[4].submit(size / 2)?;
    let before: Vec<_> = all.iter().map(Context::words).collect();
    checkpoint.wait();
    let after: Vec<_> = all.iter().map(Context::words).collect();
    same("sizes, heads and tails of the rings", before, after)?;
    for context in &mut all {
        context.take(context.submitted - context.read)?;
        context.is_empty()?;
        // Around once more.
        for _ in 0..4 {
            let size = u64::from(context.word(SIZE));
            context.submit(size / 2)?;
            context.take(size / 2)?;
        }
        context.is_empty()?;
        sys!(syscall(libc::SYS_io_destroy, context.id))?;
    }
    Ok(())
}

/// A child has the mapping, but not the context.
fn of_parent(checkpoint: &Checkpoint) -> Verdict {
    let context = Context::new(8, -1)?;
    let child = checkpoint.fork(|child| {
        child.wait();
        Ok(())
    })?;
    checkpoint.wait();
    child.join()?;
    context.is_empty()
}

/// `IOCB_CMD_POLL`.
const POLL: u16 = 5;

/// A request that waits for an empty pipe.
fn in_flight(checkpoint: &Checkpoint) -> Verdict {
    let mut ends = [0; 2];
    sys!(pipe(ends.as_mut_ptr()))?;
    let context = Context::new(8, ends[0])?;
    let mut request = Request {
        data: 5,
        opcode: POLL,
        fd: ends[0],
        buffer: libc::POLLIN as u64,
        ..Request::default()
    };
    let mut list = [&raw mut request];
    let made = sys!(syscall(libc::SYS_io_submit, context.id, 1, list.as_mut_ptr()))?;
    same("submitted", 1, made)?;
    checkpoint.wait();
    context.is_empty()?;
    sys!(write(ends[1], b"x".as_ptr().cast(), 1))?;
    let mut event = Event::default();
    let none = ptr::null::<libc::timespec>();
    sys!(syscall(libc::SYS_io_getevents, context.id, 1, 1, &raw mut event, none))?;
    same("event", (5, 1), (event.data, event.result & i64::from(libc::POLLIN)))
}
