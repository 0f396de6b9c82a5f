//! A worker process that outlives its supervisor.
#![expect(unsafe_code, reason = "fork")]

use std::{
    ffi::OsStr,
    fs,
    io::{self, Write},
    os::unix::ffi::OsStrExt,
    path::PathBuf,
    process,
    sync::atomic::{AtomicBool, AtomicPtr, AtomicU8, AtomicU64, Ordering},
};

use nix::{
    errno::Errno,
    libc,
    sys::{
        prctl::set_pdeathsig,
        signal::{SaFlags, SigAction, SigHandler, SigSet, SigmaskHow, Signal, kill, sigaction},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::{ForkResult, Pid, getpid, getppid, setsid},
};

use super::{cancel, loan, process::fork_alone};
use crate::units::{HostPid, RemoteAddr};

/// State that worker and supervisor share in memory.
#[derive(Debug)]
struct Ledger {
    /// The process that has scratch memory; 0 if none has.
    pid: AtomicU64,
    start: AtomicU64,
    bytes: AtomicU64,
    /// Whether sockets of the tree may be in repair mode (`TCP_REPAIR`).
    repairs: AtomicBool,
    /// `SO_REUSEADDR` of the one socket in repair mode, plus one; 0 if it is not known.
    reuse: AtomicU64,
    /// Whether rules of iptables drop packets of the tree's connections.
    rules: AtomicBool,
    /// Whether the tree is killed if the worker dies.
    doomed: AtomicBool,
    /// The halves of the number of the dump for which packets are dropped, or 0.
    packets: [AtomicU64; 2],
    /// The number of bytes in `frozen`.
    frozen_bytes: AtomicU64,
    /// Files and what to write there, each ended by a zero byte.
    frozen: Orders,
    /// The number of shadows in `shadows`.
    shadow_count: AtomicU64,
    /// For each shadow its pid, its parent, and its pid as the parent sees it.
    shadows: [[AtomicU64; 3]; MOST_SHADOWS],
}

/// The most shadows that a ledger has room for.
const MOST_SHADOWS: usize = 4096;

/// The most bytes that say which cgroups to freeze.
const ORDER_BYTES: usize = 16 << 10;

#[derive(Debug)]
struct Orders([AtomicU8; ORDER_BYTES]);

/// The ledger; null before [`split`].
static LEDGER: AtomicPtr<Ledger> = AtomicPtr::new(std::ptr::null_mut());

fn ledger() -> Option<&'static Ledger> {
    // SAFETY: what is there was set by `begin_ledger`, to memory that stays mapped and
    // consists of atomics; otherwise it is null.
    unsafe { LEDGER.load(Ordering::Acquire).as_ref() }
}

fn begin_ledger() -> nix::Result<()> {
    let access = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
    let (anywhere, len) = (std::ptr::null_mut(), size_of::<Ledger>());
    // SAFETY: a new mapping touches no other. It is aligned to a page, and zeros are a ledger.
    let memory = unsafe { libc::mmap(anywhere, len, access, flags, -1, 0) };
    if memory == libc::MAP_FAILED {
        return Err(Errno::last());
    }
    LEDGER.store(memory.cast(), Ordering::Release);
    Ok(())
}

/// Scratch memory in another process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leftover {
    /// The process.
    pub pid: HostPid,
    /// Its start address.
    pub start: RemoteAddr,
    /// Its length.
    pub bytes: u64,
}

/// Tells the supervisor that a process is about to get scratch memory. The supervisor unmaps it if
/// the worker is killed.
pub fn note_scratch(pid: HostPid, start: RemoteAddr, bytes: u64) {
    if let Some(ledger) = ledger() {
        ledger.start.store(start.0, Ordering::Relaxed);
        ledger.bytes.store(bytes, Ordering::Relaxed);
        ledger.pid.store(u64::from(pid.0.cast_unsigned()), Ordering::Release);
    }
}

/// Tells the supervisor that the scratch memory is unmapped.
pub fn clear_scratch() {
    if let Some(ledger) = ledger() {
        ledger.pid.store(0, Ordering::Release);
    }
}

/// Tells the supervisor that sockets of the tree are about to enter repair mode (`TCP_REPAIR`). The
/// supervisor ends it if the worker is killed. `reuse`: `SO_REUSEADDR` of the socket, which the mode
/// overwrites, if it is only one.
pub fn note_repair(reuse: Option<u32>) {
    if let Some(ledger) = ledger() {
        ledger.reuse.store(reuse.map_or(0, |reuse| u64::from(reuse) + 1), Ordering::Relaxed);
        ledger.repairs.store(true, Ordering::Release);
    }
}

/// Tells the supervisor whether rules of iptables drop packets of the tree's connections. The
/// supervisor removes them if the worker is killed.
pub fn note_rules(there: bool) {
    if let Some(ledger) = ledger() {
        ledger.rules.store(there, Ordering::Release);
    }
}

/// Tells the supervisor that no socket is in repair mode any more.
pub fn clear_repair() {
    if let Some(ledger) = ledger() {
        ledger.repairs.store(false, Ordering::Release);
    }
}

/// Tells the supervisor whether the kernel kills the tree if the worker dies, since the snapshot is
/// complete.
pub fn note_doom(doomed: bool) {
    if let Some(ledger) = ledger() {
        ledger.doomed.store(doomed, Ordering::Release);
    }
}

/// Tells the supervisor that packets are dropped for a dump, whose name is a UUID, while sockets
/// are in repair mode ([`note_repair`]).
pub fn note_packets(dump: &str) {
    let digits: String = dump.chars().filter(char::is_ascii_hexdigit).collect();
    let number = u128::from_str_radix(&digits, 16).unwrap_or_default();
    if let Some(ledger) = ledger() {
        for (half, shift) in ledger.packets.iter().zip([64, 0]) {
            let bits = number >> shift & u128::from(u64::MAX);
            half.store(u64::try_from(bits).expect("64 bits"), Ordering::Release);
        }
    }
}

/// Tells the supervisor which cgroups have to be frozen again: files, and what to write there. The
/// supervisor does so if the worker is killed. Returns whether it could be told. Later lists begin as
/// earlier ones, or are empty.
#[must_use]
pub fn note_frozen(orders: &[(PathBuf, &str)]) -> bool {
    let Some(ledger) = ledger() else { return true };
    let mut bytes = Vec::new();
    for (path, text) in orders {
        bytes.extend([path.as_os_str().as_bytes(), b"\0", text.as_bytes(), b"\0"].concat());
    }
    if bytes.len() > ORDER_BYTES {
        return false;
    }
    // Orders are only added at the end, so that those of before hold meanwhile.
    for (place, byte) in ledger.frozen.0.iter().zip(&bytes) {
        place.store(*byte, Ordering::Relaxed);
    }
    ledger.frozen_bytes.store(bytes.len() as u64, Ordering::Release);
    true
}

/// A child of a process of the tree that keeps its memory for the dump.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShadowPids {
    /// The shadow.
    pub pid: HostPid,
    /// Its parent.
    pub of: HostPid,
    /// Its pid in the pid namespace of the parent.
    pub number: i32,
}

/// Tells the supervisor of a new shadow. The kernel kills it if the worker is killed, and the
/// supervisor then has its parent reap it. Returns whether there is room to note it.
#[must_use]
pub fn note_shadow(shadow: ShadowPids) -> bool {
    let Some(ledger) = ledger() else { return true };
    let count = ledger.shadow_count.load(Ordering::Relaxed);
    let place = usize::try_from(count).ok().and_then(|count| ledger.shadows.get(count));
    let Some(place) = place else { return false };
    let numbers = [shadow.pid.0, shadow.of.0, shadow.number];
    for (cell, number) in place.iter().zip(numbers) {
        cell.store(number.cast_unsigned().into(), Ordering::Relaxed);
    }
    ledger.shadow_count.store(count + 1, Ordering::Release);
    true
}

/// Tells the supervisor that all shadows are gone.
pub fn clear_shadows() {
    if let Some(ledger) = ledger() {
        ledger.shadow_count.store(0, Ordering::Release);
    }
}

/// The remains of a killed worker's work on sockets.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LeftoverRepairs {
    /// `SO_REUSEADDR` of the socket in repair mode, if it is known.
    pub reuse: Option<u32>,
    /// Whether rules of iptables drop packets.
    pub rules: bool,
    /// The name of the dump for which a table of nftables drops packets.
    pub dump: Option<String>,
}

/// The two processes after [`split`].
#[derive(Debug)]
pub enum Side {
    /// The caller's process, which waits for the worker.
    Supervisor(Supervisor),
    /// The process that does the work.
    Worker,
}

/// The caller's process.
#[derive(Debug)]
pub struct Supervisor {
    worker: Pid,
    /// The signals that it waits for, all of them blocked.
    signals: SigSet,
}

/// How the worker has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// It exited with this code.
    Exited(i32),
    /// A signal killed it.
    Killed(Signal),
}

/// Forks into a worker, and a supervisor that waits for it and forwards requests to stop.
///
/// The worker has a session of its own, so that a signal to the caller's process group or session
/// does not kill both.
///
/// If the supervisor is killed, even by `SIGKILL`, the worker is asked to stop, by a flag ([`cancel`]).
/// So it can always undo what it has done to other processes. Ctrl-Z has no effect on the worker
/// either: it would stop while it has stopped other processes.
///
/// Call it before the program starts a thread. The worker must not change its user id: the kernel
/// would then cancel its parent-death signal.
///
/// # Errors
/// `EBUSY` if there is another thread.
pub fn split() -> io::Result<Side> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGCHLD);
    for signal in cancel::REQUESTS {
        if signal == Signal::SIGTERM || !cancel::is_ignored(signal)? {
            signals.add(signal);
        }
    }
    // If SIGCHLD is ignored, which is inherited, the kernel would reap the worker itself.
    set_action(Signal::SIGCHLD, SigHandler::SigDfl)?;
    begin_ledger()?;
    loan::prepare()?;
    let before = signals.thread_swap_mask(SigmaskHow::SIG_BLOCK)?;
    let supervisor = getpid();
    match fork_alone() {
        Ok(ForkResult::Parent { child }) => {
            Ok(Side::Supervisor(Supervisor { worker: child, signals }))
        }
        Ok(ForkResult::Child) => {
            cancel::install()?;
            set_action(Signal::SIGTSTP, SigHandler::Handler(stay))?;
            set_pdeathsig(Signal::SIGTERM)?;
            if getppid() != supervisor {
                // The supervisor was killed before the signal was set. No work has begun yet.
                process::exit(1);
            }
            setsid()?;
            before.thread_set_mask()?;
            Ok(Side::Worker)
        }
        Err(error) => {
            before.thread_set_mask()?;
            Err(error)
        }
    }
}

/// Runs `work` in a child, and has it exit with the code that `work` returns. Does not wait for it, but
/// reaps children of before. Returns its pid.
///
/// Call it while the program has one thread.
///
/// # Errors
/// `EBUSY` if there is another thread; `EAGAIN`.
pub fn apart(work: impl FnOnce() -> u8) -> io::Result<Pid> {
    let has_reaped = || {
        let reaped = waitpid(None, Some(WaitPidFlag::WNOHANG));
        reaped.is_ok_and(|status| status != WaitStatus::StillAlive)
    };
    while has_reaped() {}
    match fork_alone()? {
        ForkResult::Parent { child } => Ok(child),
        ForkResult::Child => process::exit(i32::from(work())),
    }
}

/// A signal handler that does nothing. Unlike ignoring the signal, programs that the worker executes
/// do not inherit it.
extern "C" fn stay(_signal: libc::c_int) {}

fn set_action(signal: Signal, handler: SigHandler) -> nix::Result<()> {
    let action = SigAction::new(handler, SaFlags::SA_RESTART, SigSet::empty());
    // SAFETY: the handler is the default, or does nothing.
    unsafe { sigaction(signal, &action) }.map(drop)
}

impl Supervisor {
    /// Returns the scratch memory that a killed worker has left behind.
    pub fn leftover(&self) -> Option<Leftover> {
        let ledger = ledger()?;
        let pid = ledger.pid.load(Ordering::Acquire);
        let pid = i32::try_from(pid).ok().filter(|pid| *pid != 0)?;
        Some(Leftover {
            pid: HostPid(pid),
            start: RemoteAddr(ledger.start.load(Ordering::Relaxed)),
            bytes: ledger.bytes.load(Ordering::Relaxed),
        })
    }

    /// Whether the tree was killed together with the worker.
    pub fn has_doomed(&self) -> bool {
        ledger().is_some_and(|ledger| ledger.doomed.load(Ordering::Acquire))
    }

    /// Returns the shadows that a killed worker has left behind.
    pub fn leftover_shadows(&self) -> Vec<ShadowPids> {
        let Some(ledger) = ledger() else { return Vec::new() };
        let count = usize::try_from(ledger.shadow_count.load(Ordering::Acquire)).unwrap_or(0);
        let number = |cell: &AtomicU64| i32::try_from(cell.load(Ordering::Relaxed)).unwrap_or(0);
        let noted = ledger.shadows.iter().take(count).map(|cells| cells.each_ref().map(number));
        noted
            .map(|[pid, of, number]| ShadowPids { pid: HostPid(pid), of: HostPid(of), number })
            .collect()
    }

    /// Freezes the cgroups again that a killed worker has thawed. Returns their files, with the
    /// outcome.
    pub fn freeze_again(&self) -> Vec<(PathBuf, io::Result<()>)> {
        let Some(ledger) = ledger() else { return Vec::new() };
        let len = usize::try_from(ledger.frozen_bytes.load(Ordering::Acquire)).unwrap_or(0);
        let bytes = ledger.frozen.0.iter().take(len).map(|byte| byte.load(Ordering::Relaxed));
        let bytes: Vec<u8> = bytes.collect();
        let words: Vec<&[u8]> = bytes.split(|byte| *byte == 0).collect();
        let freeze = |order: &[&[u8]]| {
            let path = PathBuf::from(OsStr::from_bytes(order[0]));
            let file = fs::OpenOptions::new().write(true).open(&path);
            let done = file.and_then(|mut file| file.write_all(order[1]));
            (path, done)
        };
        words.chunks_exact(2).rev().map(freeze).collect()
    }

    /// Returns the remains of a killed worker, if it was at work on sockets.
    pub fn leftover_repairs(&self) -> Option<LeftoverRepairs> {
        let ledger = ledger()?;
        let rules = ledger.rules.load(Ordering::Acquire);
        if !rules && !ledger.repairs.load(Ordering::Acquire) {
            return None;
        }
        let [high, low] = [0, 1].map(|at| u128::from(ledger.packets[at].load(Ordering::Acquire)));
        let digits = format!("{:032x}", high << 64 | low);
        let parts = [0..8, 8..12, 12..16, 16..20, 20..32].map(|range| &digits[range]);
        let reuse = ledger.reuse.load(Ordering::Relaxed).checked_sub(1);
        Some(LeftoverRepairs {
            reuse: reuse.and_then(|reuse| u32::try_from(reuse).ok()),
            rules,
            dump: (high | low != 0).then(|| parts.join("-")),
        })
    }

    /// Waits until the worker exits, and forwards `SIGINT`, `SIGTERM` and `SIGHUP` to it until then.
    pub fn wait(&self) -> io::Result<Ended> {
        loop {
            match waitpid(self.worker, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(_, code)) => return Ok(Ended::Exited(code)),
                Ok(WaitStatus::Signaled(_, signal, _)) => return Ok(Ended::Killed(signal)),
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
            match self.signals.wait()? {
                Signal::SIGCHLD => {}
                // If the worker has exited just now, the signal is lost.
                signal => drop(kill(self.worker, signal)),
            }
        }
    }
}
