//! The way home of a thread that makes calls for rcriu.
//!
//! If rcriu is killed, the kernel detaches from the thread, which resumes with whatever registers
//! and signal mask it has. So rcriu only gives it registers from which it finds home without help.
//! Its stack pointer points to a frame like the one that the kernel builds for a signal handler.
//! All that the thread executes is one system call, `ret`, and then, in the program's own code,
//! `rt_sigreturn(2)`, which restores all registers and the mask at once.
//!
//! The frames are at the low end of the main thread's stack, far below the part in use, where
//! the process keeps nothing else. They need not be mapped yet.

use std::{
    collections::HashMap,
    fs::File,
    io,
    os::unix::fs::FileExt,
    sync::{Mutex, PoisonError},
};

use memchr::memmem;
use nix::{errno::Errno, libc};

use super::{
    InjectError, Result,
    tracee::{SEARCH_BYTES, Tracee, find_syscall},
};
use crate::{
    arch::native::{self as arch, Area},
    proc::Mapping,
    sys::{
        process,
        ptrace::{self, Registers},
    },
    units::{HostPid, PAGE_SIZE, RemoteAddr},
};

/// The size of a slot: one frame, and below it room for a signal handler. The largest register areas
/// of today's processors have 11 KiB.
const SLOT_BYTES: u64 = 20 << 10;

/// The offset in a slot of the frame that leads to one more call (see [`Home::detour`]).
const DETOUR_AT: u64 = PAGE_SIZE;

/// The offset in a slot of the frame that leads home. It is above the other one, so that a signal
/// handler that runs before that one is reached does not overwrite this one.
const FRAME_AT: u64 = DETOUR_AT + 512;

const _: () =
    assert!(FRAME_AT - DETOUR_AT >= arch::FRAME_AREA_OFFSET && FRAME_AT.is_multiple_of(64));

/// The number of slots: one for the thread that keeps the scratch memory, one for another thread.
const SLOTS: u64 = 2;

/// The size of the area after the slots that holds the data of calls without scratch memory.
const DATA_BYTES: u64 = 32 << 10;

/// The minimum distance between the frames and the stack pointers of all threads.
const DISTANCE_BYTES: u64 = 16 << 10;

/// Which slot a thread uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Slot {
    /// The thread that has mapped the scratch memory.
    Keeper,
    /// Another thread, which makes calls.
    Worker,
}

/// Where threads of a process make calls, and how they come home.
#[derive(Debug)]
pub(super) struct Home {
    pid: HostPid,
    /// A system call instruction, followed by `ret` if there is a way home.
    pub(super) call: RemoteAddr,
    way: Option<Way>,
    /// Overwritten bytes, in the order of writing.
    before: Vec<(RemoteAddr, Vec<u8>)>,
}

#[derive(Clone, Copy, Debug)]
struct Way {
    restorer: RemoteAddr,
    /// The low end of the stack.
    start: RemoteAddr,
}

impl Home {
    /// Looks for a way home for the threads of a stopped process. Without one, they are lost if
    /// rcriu is killed while they make calls. `in_use` are the stack pointers of threads of other
    /// processes that share the memory.
    ///
    /// # Errors
    /// [`InjectError::NoSyscall`].
    pub(super) fn find(
        threads: &[Tracee],
        mappings: &[Mapping],
        in_use: &[RemoteAddr],
    ) -> Result<Self> {
        let pid = threads[0].tid;
        let instructions = find_instructions(pid, mappings);
        let way = instructions.zip(find_room(threads, mappings, in_use));
        let (call, way) = match way {
            Some(((call, restorer), start)) => (call, Some(Way { restorer, start })),
            None => {
                log::debug!("{pid}: its threads have no way home if rcriu is killed");
                (find_syscall(pid, mappings)?, None)
            }
        };
        Ok(Self { pid, call, way, before: Vec::new() })
    }

    /// Writes the frame that leads a thread home. Returns the stack pointer that the thread needs
    /// for it; `None` if there is no way home.
    pub(super) fn prepare(&mut self, slot: Slot, tracee: &Tracee) -> Result<Option<RemoteAddr>> {
        let Some(way) = self.way else { return Ok(None) };
        let address = way.start.plus(slot as u64 * SLOT_BYTES + FRAME_AT);
        let area = ptrace::extended_registers(tracee.tid)
            .map_err(InjectError::trace(tracee.tid, "read the registers of"))?;
        let area = Area::new(area)
            .filter(|area| arch::FRAME_AREA_OFFSET + area.len() as u64 <= SLOT_BYTES - FRAME_AT);
        let Some(area) = area else {
            log::debug!("{}: its registers do not fit into a frame", tracee.tid);
            return Ok(None);
        };
        let (registers, mask) = (tracee.registers_to_come_home(), tracee.signal_mask);
        let frame = arch::frame(address, way.restorer, &registers, mask, Some(&area));
        self.lend(address, &frame)?;
        Ok(Some(address))
    }

    /// Writes a frame that leads a thread from one call to the next: when the first call returns,
    /// `rt_sigreturn(2)` sets `registers`, which make the second call. That one leads home by the
    /// frame of `slot`, which must be prepared. Returns the stack pointer for the first call.
    pub(super) fn detour(
        &mut self,
        slot: Slot,
        registers: &Registers,
        mask: u64,
    ) -> Result<Option<RemoteAddr>> {
        let Some(way) = self.way else { return Ok(None) };
        let address = way.start.plus(slot as u64 * SLOT_BYTES + DETOUR_AT);
        let frame = arch::frame(address, way.restorer, registers, mask, None);
        self.lend(address, &frame)?;
        Ok(Some(address))
    }

    /// Returns the address and the size of the area for data of calls, if there is one.
    pub(super) fn room(&self) -> Option<(RemoteAddr, usize)> {
        let data = self.way?.start.plus(SLOTS * SLOT_BYTES);
        Some((data, usize::try_from(DATA_BYTES).expect("small")))
    }

    /// Overwrites memory of the process until [`Self::clear`] is called.
    pub(super) fn lend(&mut self, address: RemoteAddr, bytes: &[u8]) -> Result<()> {
        let is_kept = |(at, old): &(_, Vec<u8>)| *at == address && old.len() >= bytes.len();
        if !self.before.iter().any(is_kept) {
            let mut old = vec![0; bytes.len()];
            process::read_memory(self.pid, address, &mut old)
                .map_err(|source| self.failed("read", address, bytes.len(), source))?;
            self.before.push((address, old));
        }
        process::write_memory(self.pid, address, bytes)
            .map_err(|source| self.failed("write", address, bytes.len(), source))
    }

    fn failed(
        &self,
        step: &'static str,
        address: RemoteAddr,
        len: usize,
        source: Errno,
    ) -> InjectError {
        InjectError::Memory { tid: self.pid, step, address, len: len as u64, source }
    }

    /// Restores all overwritten memory in a copy of the process, which never runs. The copy may lack the
    /// stack (`MADV_DONTFORK`).
    pub(super) fn restore_in(&self, copy: HostPid) -> Result<()> {
        for (address, old) in self.before.iter().rev() {
            match process::write_memory(copy, *address, old) {
                Ok(()) | Err(Errno::EFAULT) => {}
                Err(source) => {
                    let (address, len) = (*address, old.len() as u64);
                    let step = "write";
                    return Err(InjectError::Memory { tid: copy, step, address, len, source });
                }
            }
        }
        Ok(())
    }

    /// Restores all overwritten memory. No thread may need its way home any more.
    pub(super) fn clear(&mut self) -> Result<()> {
        while let Some((address, old)) = self.before.pop() {
            process::write_memory(self.pid, address, &old)
                .map_err(|source| self.failed("write", address, old.len(), source))?;
        }
        Ok(())
    }
}

fn stack_of(mappings: &[Mapping]) -> Option<&Mapping> {
    mappings.iter().find(|mapping| mapping.name == b"[stack]")
}

/// Whether a thread is still on its way home by a frame: its stack pointer points to the frame, or
/// just after its first word, which the thread pops on the way.
pub(super) fn is_returning(thread: &Tracee) -> bool {
    const POPPED: u64 = size_of::<u64>() as u64;
    let mut bytes = [0; arch::FRAME_MARK_BYTES + size_of::<u64>()];
    let before = RemoteAddr(arch::stack_pointer(&thread.registers).wrapping_sub(POPPED));
    let readable = process::read_memory(thread.tid, before, &mut bytes).is_ok();
    readable && (arch::is_frame(&bytes) || arch::is_frame(&bytes[size_of::<u64>()..]))
}

/// Returns the low end of the stack, if there is room for frames and data below the part in use.
fn find_room(
    threads: &[Tracee],
    mappings: &[Mapping],
    in_use: &[RemoteAddr],
) -> Option<RemoteAddr> {
    let stack = stack_of(mappings)?;
    let needed = SLOTS * SLOT_BYTES + DATA_BYTES + DISTANCE_BYTES;
    let is_clear = |used: u64| {
        !(stack.start.0..=stack.end.0).contains(&used) || used - stack.start.0 >= needed
    };
    let own = threads.iter().map(|thread| arch::stack_pointer(&thread.registers));
    let mut used = own.chain(in_use.iter().map(|pointer| pointer.0));
    let usable = stack.read && stack.write && !stack.shared && stack.len() >= needed;
    (usable && used.all(is_clear)).then_some(stack.start)
}

/// Returns the registers with which a stopped thread would call `exit(2)`. They use the program's own
/// code, which is the same after a restore.
///
/// # Errors
/// [`InjectError::NoSyscall`].
pub fn registers_to_exit(tracee: &Tracee, mappings: &[Mapping], code: u8) -> Result<Registers> {
    let call = match find_instructions(tracee.tid, mappings) {
        Some((call, _)) => call,
        None => find_syscall(tracee.tid, mappings)?,
    };
    let arguments = [code.into(), 0, 0, 0, 0, 0];
    Ok(tracee.registers_to_call(call, None, libc::SYS_exit, arguments))
}

/// The length of the longest restorer.
const RESTORER_BYTES: usize = {
    let (mut longest, mut next) = (0, 0);
    while next < arch::RESTORERS.len() {
        let bytes = arch::RESTORERS[next].len();
        longest = if bytes > longest { bytes } else { longest };
        next += 1;
    }
    longest
};

/// The instructions found in file mappings, by device, inode, offset and length.
type Known = HashMap<(u32, u32, u64, u64, u64), Offsets>;

/// The offsets in a mapping of `syscall; ret` and of a restorer.
type Offsets = (Option<u64>, Option<u64>);

/// Returns the addresses of `syscall; ret` and of a restorer in a process.
fn find_instructions(pid: HostPid, mappings: &[Mapping]) -> Option<(RemoteAddr, RemoteAddr)> {
    static KNOWN: Mutex<Option<Known>> = Mutex::new(None);
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    let known = known.get_or_insert_with(Known::new);
    let mut files: Vec<_> =
        mappings.iter().filter(|mapping| mapping.execute && mapping.inode != 0).collect();
    // The C library has both, if there is one.
    files.sort_by_key(|mapping| {
        let name = mapping.name.rsplit(|byte| *byte == b'/').next().unwrap_or_default();
        let likely: [&[u8]; 3] = [b"ld-", b"ld.", b"libc"];
        !likely.iter().any(|start| name.starts_with(start))
    });
    let mut found: (Option<RemoteAddr>, Option<RemoteAddr>) = (None, None);
    for mapping in files {
        let Mapping { dev_major, dev_minor, inode, offset, .. } = *mapping;
        let key = (dev_major, dev_minor, inode, offset, mapping.len());
        let (call, restorer) =
            *known.entry(key).or_insert_with(|| search(pid, mapping).unwrap_or_default());
        // The file may have changed, or the process may have modified its copy.
        let check = |offset: Option<u64>, wanted: &[&[u8]]| {
            let address = mapping.start.plus(offset?);
            let mut there = vec![0; wanted.iter().map(|bytes| bytes.len()).max()?];
            process::read_memory(pid, address, &mut there).ok()?;
            wanted.iter().any(|bytes| there.starts_with(bytes)).then_some(address)
        };
        found.0 = found.0.or_else(|| check(call, &[arch::CALL_AND_RETURN]));
        found.1 = found.1.or_else(|| check(restorer, arch::RESTORERS));
        if let (Some(call), Some(restorer)) = found {
            return Some((call, restorer));
        }
    }
    None
}

/// Searches the file of a mapping, so that the process gets no new pages.
fn search(pid: HostPid, mapping: &Mapping) -> Option<Offsets> {
    let (start, end) = (mapping.start.0, mapping.end.0);
    let file = File::open(format!("/proc/{pid}/map_files/{start:x}-{end:x}")).ok()?;
    let len = usize::try_from(mapping.len()).ok()?;
    search_in(len, |bytes, at| file.read_at(bytes, mapping.offset + at as u64)).ok()
}

/// Searches `len` bytes that `read` returns, from the start until both are found. In C libraries
/// they are near the start.
fn search_in(
    len: usize,
    mut read: impl FnMut(&mut [u8], usize) -> io::Result<usize>,
) -> io::Result<Offsets> {
    let mut found: Offsets = (None, None);
    let mut buffer = vec![0; len.min(SEARCH_BYTES)];
    let mut at = 0;
    // An instruction may span two pieces.
    let overlap = RESTORER_BYTES - 1;
    while at < len && (found.0.is_none() || found.1.is_none()) {
        let wanted = buffer.len().min(len - at);
        let mut filled = 0;
        while filled < wanted {
            match read(&mut buffer[filled..wanted], at + filled)? {
                0 => break,
                count => filled += count,
            }
        }
        let bytes = &buffer[..filled];
        let position =
            |wanted: &[u8]| memmem::find(bytes, wanted).map(|offset| (at + offset) as u64);
        found.0 = found.0.or_else(|| position(arch::CALL_AND_RETURN));
        found.1 =
            found.1.or_else(|| arch::RESTORERS.iter().find_map(|restorer| position(restorer)));
        if filled < wanted || at + filled == len {
            break;
        }
        at += filled - overlap;
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Searches `bytes` in pieces of `piece` bytes; also returns how many bytes were read.
    fn searched(bytes: &[u8], piece: usize) -> (Offsets, usize) {
        let mut end = 0;
        let found = search_in(bytes.len(), |buffer, at| {
            let len = buffer.len().min(piece).min(bytes.len() - at);
            buffer[..len].copy_from_slice(&bytes[at..at + len]);
            end = end.max(at + len);
            Ok(len)
        });
        (found.unwrap(), end)
    }

    #[test]
    fn instructions_are_found_wherever_they_are() {
        let mut places: Vec<usize> = vec![0, 1, 5 * SEARCH_BYTES - RESTORER_BYTES];
        for edge in [SEARCH_BYTES, 2 * SEARCH_BYTES] {
            places.extend(edge - 2 * RESTORER_BYTES..edge + 2);
        }
        for restorer in arch::RESTORERS {
            for place in &places {
                let mut bytes = vec![0x90; 5 * SEARCH_BYTES];
                bytes[*place..*place + restorer.len()].copy_from_slice(restorer);
                let (found, _) = searched(&bytes, 1000);
                assert_eq!(found, (None, Some(*place as u64)));
            }
        }
    }

    #[test]
    fn no_more_is_read_than_needed() {
        let mut bytes = vec![0x90; 5 * SEARCH_BYTES];
        let restorer = arch::RESTORERS[0];
        bytes[100..100 + restorer.len()].copy_from_slice(restorer);
        bytes[200..200 + arch::CALL_AND_RETURN.len()].copy_from_slice(arch::CALL_AND_RETURN);
        assert_eq!(searched(&bytes, usize::MAX), ((Some(200), Some(100)), SEARCH_BYTES));
    }
}
