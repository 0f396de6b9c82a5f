//! AIO contexts (`io_setup(2)`), with the completions that the program has not read.
//!
//! The id of a context is the address of its ring, which the kernel and the process share: the
//! process reads completions from `head` on, the kernel appends at `tail`. The images store the
//! ring with the private memory. The restore fills ordinary memory at its address, makes a new
//! context, and moves the new ring there: `mremap(2)` changes the id as well.
//!
//! The kernel has a `tail` of its own, which begins at 0 and only moves by completions. So the
//! restore submits as many requests as it takes, which read an eventfd without a value and
//! complete at once.

mod in_flight;

use std::{
    fs, thread,
    time::{Duration, Instant},
};

use nix::{errno::Errno, libc};

use crate::{
    causes::{tell, with_sources},
    image::{proto::AioRingEntry, tree::Arena},
    inject::Script,
    proc::{self, Mapping},
    res::{
        ResError, Result,
        calls::Calls,
        kernel::KernelResult,
        task::{Calling, Checked, Collect, Kind, Restored},
    },
    sys::process,
    units::{HostPid, RemoteAddr},
};

/// The header of `struct aio_ring` (`fs/aio.c`): id, size, head, tail, magic number, features,
/// incompatible features, and its own length.
const HEADER_BYTES: usize = 32;

/// The size of `struct io_event` (`linux/aio_abi.h`).
const EVENT_BYTES: u64 = 32;

/// `AIO_RING_MAGIC`.
const MAGIC: u32 = 0xa10a_10a1;

/// The offset of the head in the header.
const HEAD_AT: u64 = 8;

/// `IOCB_CMD_PREAD`.
const READ: u16 = 0;

/// The size of `struct iocb`.
const REQUEST_BYTES: usize = 64;

/// The most requests of one call.
const BATCH: u32 = 256;

/// How often a context is made before the restore fails: its free requests are distributed over
/// the processors, so a thread that moves may find none left.
const ATTEMPTS: u32 = 16;

/// How long a dump waits for requests in flight, and how often it looks.
const PATIENCE: Duration = Duration::from_millis(500);
const INTERVAL: Duration = Duration::from_millis(1);

/// For how many requests all contexts of this kernel have room.
const ROOM_OF_ALL: &str = "/proc/sys/fs/aio-nr";

/// The kind.
pub(in crate::res) struct Contexts;

/// The header of a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Header {
    /// How many events it has room for.
    events: u32,
    /// Where the next event is read.
    head: u32,
    /// Where the next event is written.
    tail: u32,
}

impl Header {
    /// Reads the header of a ring of `len` bytes; `None` if it is not one.
    fn parse(bytes: &[u8; HEADER_BYTES], len: u64) -> Option<Self> {
        let word = |at: usize| u32::from_le_bytes(bytes.as_chunks().0[at]);
        let (events, head, tail) = (word(1), word(2), word(3));
        let fits = len.checked_sub(HEADER_BYTES as u64).map(|rest| rest / EVENT_BYTES);
        let is_known = word(4) == MAGIC && word(6) == 0 && word(7) as usize == HEADER_BYTES;
        let is_sane = fits == Some(events.into()) && head < events && tail < events;
        (is_known && is_sane).then_some(Self { events, head, tail })
    }

    fn read(pid: HostPid, address: RemoteAddr, len: u64) -> Result<Option<Self>> {
        let mut bytes = [0; HEADER_BYTES];
        process::read_memory(pid, address, &mut bytes)
            .map_err(failed(pid, "read an AIO ring of"))?;
        Ok(Self::parse(&bytes, len))
    }

    /// Returns how many requests have completed in a new context with this head and tail, in
    /// which no more events are unread than fit.
    fn completions(self) -> u32 {
        // Where the tail is below the head, it has gone around once.
        if self.tail < self.head { self.events.saturating_add(self.tail) } else { self.tail }
    }
}

fn failed(pid: HostPid, step: &'static str) -> impl Fn(Errno) -> ResError {
    move |source| ResError::Process { pid, step, source }
}

/// Waits until no requests are in flight; otherwise returns how many are, and the ring of their
/// context.
fn pending(witness: HostPid, rings: &[Mapping]) -> KernelResult<Option<(u32, RemoteAddr)>> {
    let begin = Instant::now();
    let mut contexts = in_flight::Contexts::open(witness)?;
    for ring in rings.iter().map(|mapping| mapping.start) {
        // A completion moves requests from one count to another, so one look may miss them.
        let mut last = None;
        loop {
            let late = begin.elapsed() > PATIENCE;
            match contexts.requests(ring) {
                Ok(None) => break,
                Ok(Some(0)) if last == Some(0) => break,
                Ok(Some(count)) if count > 0 && late => return Ok(Some((count, ring))),
                Err(error) if late => return Err(error),
                found => last = found.ok().flatten(),
            }
            thread::sleep(INTERVAL);
        }
    }
    Ok(None)
}

/// Whether any process of this kernel may have an AIO context. The kernel counts the requests for
/// which all contexts have room, in one number for all namespaces.
fn any_contexts() -> bool {
    // A container may hide the file.
    fs::read_to_string(ROOM_OF_ALL).map_or(true, |count| count.trim() != "0")
}

fn is_ring(mapping: &Mapping) -> bool {
    mapping.name.starts_with(b"/[aio]")
}

/// Returns the number of requests by which `io_setup(2)` makes a ring for `events` events: the
/// kernel doubles it, adds two, and fills the last page.
fn requests(events: u32) -> u32 {
    events.saturating_sub(2) / 2
}

impl Kind for Contexts {
    /// Disk requests complete while the process is stopped, so the dump waits for them.
    fn check(&self, of: &Checked<'_>) -> Result<()> {
        let (pid, witness) = (of.task.pid, of.task.witness());
        if of.memory_only || !any_contexts() {
            return Ok(());
        }
        let rings: Vec<_> = proc::maps(witness)?.into_iter().filter(is_ring).collect();
        if rings.is_empty() {
            return Ok(());
        }
        match pending(witness, &rings) {
            Ok(None) => Ok(()),
            Ok(Some((count, ring))) => Err(ResError::Refused {
                pid,
                what: format!(
                    "has {count} AIO requests in flight, in the context with the ring at {ring}"
                ),
                help: "dump it when they have completed; those that poll (IOCB_CMD_POLL) wait for \
                       their descriptor",
            }),
            Err(error) => {
                let why = with_sources(&error);
                let lost = format!(
                    "process {pid} has AIO contexts, such as at {}: requests in flight, if there \
                     are any, are lost (they cannot be seen: {why})",
                    rings[0].start
                );
                tell(log::Level::Warn, &lost);
                Ok(())
            }
        }
    }

    fn ask(&self, of: &Calling<'_>, script: &mut Script) -> Result<Collect> {
        let mut asked = Vec::new();
        for mapping in of.mappings.iter().filter(|mapping| is_ring(mapping)) {
            // Reads no events, but tells whether the context exists.
            let now = script.space(size_of::<libc::timespec>());
            let none = 0.into();
            let arguments = [mapping.start.into(), none, none, none, now.into()];
            asked.push((script.attempt(libc::SYS_io_getevents, &arguments), mapping.clone()));
        }
        Ok(Box::new(move |of, answers, images| {
            let pid = of.of.pid;
            for (call, mapping) in asked {
                let refused = |what: &str, help| ResError::Refused {
                    pid,
                    what: format!("has the ring of an AIO context at {}, {what}", mapping.start),
                    help,
                };
                if answers.result(call).is_err() {
                    let help = "have the program unmap it (munmap(2)), or exec after fork(2)";
                    return Err(refused("but not the context, such as a child of its owner", help));
                }
                let (len, start) = (mapping.len(), mapping.start);
                let header = Header::read(of.of.witness, start, len)?;
                let (Some(header), Ok(ring_len)) = (header, u32::try_from(len)) else {
                    let help = "have the program destroy it (io_destroy(2))";
                    return Err(refused("which the program has changed", help));
                };
                images.mm.aios.push(AioRingEntry {
                    id: start.0,
                    nr_req: requests(header.events),
                    ring_len,
                });
            }
            Ok(())
        }))
    }

    fn set(&self, of: &Restored<'_>, calls: &mut Calls<'_>) -> Result<()> {
        if !of.owns(Arena::Memory) {
            return Ok(());
        }
        of.mm.aios.iter().try_for_each(|entry| restore(of, entry, calls))
    }
}

/// Replaces the memory that holds the contents of a ring by the ring of a new context.
fn restore(of: &Restored<'_>, entry: &AioRingEntry, calls: &mut Calls<'_>) -> Result<()> {
    let address = RemoteAddr(entry.id);
    let image = |problem: String| ResError::Image { pid: of.pid, problem };
    let wanted = Header::read(of.host, address, entry.ring_len.into())?
        .ok_or_else(|| image(format!("the AIO ring at {address} has no valid header")))?;
    let mut script = Script::new();
    let flags = libc::EFD_NONBLOCK | libc::EFD_CLOEXEC;
    let arguments = [0.into(), flags.into()];
    let eventfd = script.call("create an eventfd", libc::SYS_eventfd2, &arguments);
    let eventfd =
        calls.make(&script)?.result(eventfd).map_err(failed(of.host, "read answers of"))?;
    let mut left = ATTEMPTS;
    let context = loop {
        let context = create(of, entry, wanted, calls)?;
        match advance(of.host, context, wanted, eventfd, calls) {
            Ok(()) => break context,
            Err(Failed::NoRequests) if left > 1 => left -= 1,
            Err(Failed::NoRequests) => {
                return Err(failed(of.host, "submit AIO requests of")(Errno::EAGAIN));
            }
            Err(Failed::Other(error)) => return Err(error),
        }
        calls.script.call("destroy an AIO context", libc::SYS_io_destroy, &[context.into()]);
        calls.flush()?;
    };
    let mut events = vec![0; entry.ring_len as usize - HEADER_BYTES];
    let after_header = HEADER_BYTES as u64;
    process::read_memory(of.host, address.plus(after_header), &mut events)
        .and_then(|()| process::write_memory(of.host, context.plus(after_header), &events))
        .map_err(failed(of.host, "copy an AIO ring of"))?;
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    let len = entry.ring_len;
    calls.script.call(
        format!("move an AIO ring to {address}"),
        libc::SYS_mremap,
        &[context.into(), len.into(), len.into(), flags.into(), address.into()],
    );
    calls.script.call("close an eventfd", libc::SYS_close, &[eventfd.into()]);
    calls.flush()
}

/// Makes a context whose ring has the wanted size.
fn create(
    of: &Restored<'_>,
    entry: &AioRingEntry,
    wanted: Header,
    calls: &mut Calls<'_>,
) -> Result<RemoteAddr> {
    let mut script = Script::new();
    let id = script.space(size_of::<u64>());
    let call = script.attempt(libc::SYS_io_setup, &[entry.nr_req.into(), id.into()]);
    let answers = calls.make(&script)?;
    match answers.result(call) {
        Ok(_) => {}
        Err(Errno::EAGAIN) => {
            return Err(ResError::Refused {
                pid: of.host,
                what: format!(
                    "needs an AIO context of {} requests, and fs.aio-max-nr allows no more",
                    entry.nr_req
                ),
                help: "raise it (sysctl fs.aio-max-nr=1048576)",
            });
        }
        Err(source) => return Err(failed(of.host, "create an AIO context of")(source)),
    }
    let context = RemoteAddr(answers.value(id));
    let found = Header::read(of.host, context, entry.ring_len.into())?;
    if found == Some(Header { head: 0, tail: 0, ..wanted }) {
        return Ok(context);
    }
    Err(ResError::Refused {
        pid: of.host,
        what: format!(
            "has an AIO ring for {} events, and this machine makes one of another size for {} \
             requests",
            wanted.events, entry.nr_req
        ),
        help: "restore it on a machine with as many processors",
    })
}

/// Why the tail could not be moved.
enum Failed {
    /// There are no free requests for the processor on which the thread runs.
    NoRequests,
    /// Another reason.
    Other(ResError),
}

impl From<ResError> for Failed {
    fn from(error: ResError) -> Self {
        Self::Other(error)
    }
}

/// Moves head and tail of a new context to where they are wanted, by requests that read the
/// eventfd.
fn advance(
    pid: HostPid,
    context: RemoteAddr,
    wanted: Header,
    eventfd: u64,
    calls: &mut Calls<'_>,
) -> Result<(), Failed> {
    let all = wanted.completions();
    let mut done: u32 = 0;
    while done < all {
        let count = (all - done).min(BATCH);
        let mut script = Script::new();
        let target = script.space(size_of::<u64>());
        let mut request = [0; REQUEST_BYTES];
        request[16..18].copy_from_slice(&READ.to_le_bytes());
        let fd = u32::try_from(eventfd).unwrap_or(u32::MAX);
        request[20..24].copy_from_slice(&fd.to_le_bytes());
        request[32..40].copy_from_slice(&8_u64.to_le_bytes());
        let request = script.bytes(&request);
        script.point(request, 24, target);
        let list = script.space(count as usize * size_of::<u64>());
        for number in 0..count as usize {
            script.point(list, number * size_of::<u64>(), request);
        }
        let arguments = [context.into(), count.into(), list.into()];
        let call = script.attempt(libc::SYS_io_submit, &arguments);
        match calls.make(&script)?.result(call) {
            Ok(submitted) => {
                done = done.saturating_add(u32::try_from(submitted).unwrap_or(u32::MAX));
            }
            Err(Errno::EAGAIN) => return Err(Failed::NoRequests),
            Err(source) => return Err(failed(pid, "submit AIO requests of")(source).into()),
        }
        // What the program has read is read again: that makes requests free.
        let head = done.min(wanted.head).to_le_bytes();
        process::write_memory(pid, context.plus(HEAD_AT), &head)
            .map_err(failed(pid, "move the head of an AIO ring of"))?;
    }
    let len = HEADER_BYTES as u64 + u64::from(wanted.events) * EVENT_BYTES;
    if Header::read(pid, context, len)? == Some(wanted) {
        return Ok(());
    }
    Err(failed(pid, "move the tail of an AIO ring of")(Errno::EIO).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(words: [u32; 8]) -> [u8; HEADER_BYTES] {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        bytes.try_into().unwrap()
    }

    #[test]
    fn headers_fit_their_rings() {
        let good = [0, 127, 100, 3, MAGIC, 1, 0, 32];
        let wanted = Header { events: 127, head: 100, tail: 3 };
        assert_eq!(Header::parse(&header(good), 4096), Some(wanted));
        assert_eq!(wanted.completions(), 130);
        assert_eq!(Header { head: 2, ..wanted }.completions(), 3);
        assert_eq!(Header { events: u32::MAX, head: 9, tail: 8 }.completions(), u32::MAX);
        assert_eq!(requests(127), 62);
        assert_eq!(requests(0), 0);
        for (at, value) in [(1, 126), (2, 127), (3, 127), (4, 0), (6, 1), (7, 64)] {
            let mut bad = good;
            bad[at] = value;
            assert_eq!(Header::parse(&header(bad), 4096), None, "word {at}");
        }
        for len in [0, 31, 8192] {
            assert_eq!(Header::parse(&header(good), len), None, "{len} bytes");
        }
    }
}
