//! Named points at which a test can make the programs fail or stop.
//!
//! `RCRIU_FAULT=NAME` makes the point `NAME` fail; `RCRIU_FAULT=NAME:kill` makes
//! the process kill itself there, as `kill -9` or a power cut would;
//! `NAME:kill:3` does so when it comes by for the third time, and `NAME:kill-both:3`
//! also kills the process that waits for it;
//! `NAME:stop` makes it stop (`SIGSTOP`), so that a test can look; `NAME:hold:PATH` makes the thread
//! wait there while a file PATH exists.
//! `RCRIU_WITHOUT=NAME,NAME` makes the programs take the kernel for an older one.
//! Compiled always, so that what is tested is what is shipped.

use std::{
    env, fs,
    path::PathBuf,
    sync::{
        OnceLock,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill, raise},
    unistd::{getppid, gettid},
};
use thiserror::Error;

macro_rules! named {
    ($(#[$meta:meta])* $of:ident { $($member:ident = $name:literal: $about:literal;)* }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum $of { $(#[doc = $about] $member,)* }

        impl $of {
            /// All values, in the order of the program.
            pub const ALL: &'static [Self] = &[$(Self::$member,)*];

            /// Returns the name that chooses it.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$member => $name,)* }
            }
        }
    };
}

named! {
    /// Points at which a test can cause a failure: in a dump, a restore, linking, freeing, reading
    /// through a mount, and a page server.
    Point {
        DumpSeize = "dump-seize": "After the first task of the tree was stopped.";
        DumpFrozen = "dump-frozen": "After the whole tree was stopped.";
        DumpInjected = "dump-injected": "While a task has scratch memory mapped.";
        DumpCallSet = "dump-call-set": "When a thread has the registers for one call.";
        DumpCall = "dump-call": "When it enters that call, and when it leaves it.";
        DumpMapped = "dump-mapped": "When a task has scratch memory, before it waits there.";
        DumpHanded = "dump-handed": "When one thread has scratch memory, before another has.";
        DumpListed = "dump-listed": "When a thread is to begin with a list of calls.";
        DumpWalking = "dump-walking": "While a thread makes a list of calls.";
        DumpWalked = "dump-walked": "When it is through with them.";
        DumpAsked = "dump-asked": "After the task made calls that show its state.";
        TerminalTaken = "terminal-taken": "After the dump has taken bytes queued in a terminal.";
        TerminalReturned = "terminal-returned": "After the dump has returned some of these bytes.";
        TcpRepairing = "tcp-repairing": "While the dump reads a TCP connection in repair mode.";
        DumpFiles = "dump-files": "After the descriptors were collected.";
        DumpMemory = "dump-memory": "In the middle of copying memory.";
        DumpWritten = "dump-written": "After all images were written, before they are synced.";
        DumpSynced = "dump-synced": "After all is on disk, before the directory counts as a snapshot.";
        DumpCommit = "dump-commit": "After the snapshot is complete, before the tree goes on or dies.";
        TcpParted = "tcp-parted": "When connections are set to end with the tree, without a packet.";
        LiveForked = "live-forked": "When a process has a shadow, before that is tied to rcriu's life.";
        LiveReleased = "live-released": "When the tree runs on, before its memory is copied.";
        LiveCopied = "live-copied": "When its memory is copied, before the shadows end.";
        RestorePlan = "restore-plan": "After the plan was made, before any process exists.";
        RestoreRoot = "restore-root": "After the first process was made.";
        RestoreMemory = "restore-memory": "In the middle of filling memory.";
        RestoreForked = "restore-forked": "After all processes were made.";
        RestoreFiles = "restore-files": "After the descriptors were installed.";
        RestoreThreads = "restore-threads": "After all threads were made.";
        RestoreLast = "restore-last": "Before the first process is let go.";
        PagerAhead = "pager-ahead": "After the pager of a lazy restore has read a part ahead.";
        DedupMade = "dedup-made": "After all new files were made, before any file is replaced.";
        DedupLinked = "dedup-linked": "After new pages and the link are in place, before any pagemap is.";
        DedupReplacing = "dedup-replacing": "After the first pagemap was replaced.";
        DedupReplaced = "dedup-replaced": "After all pagemaps were replaced.";
        DedupRenumbered = "dedup-renumbered": "After objects got other numbers.";
        DedupRemoved = "dedup-removed": "After the replaced files were removed.";
        FreeNoted = "free-noted": "After pages were noted to be freed, before a journal names them.";
        FreeAppended = "free-appended": "After journals name them, before the journals are on disk.";
        FreeJournalled = "free-journalled": "After the journals are on disk, before the first page is freed.";
        FreeHalf = "free-half": "After the first pages were freed.";
        FreeDone = "free-done": "After all were freed.";
        PageServerMemory = "page-server-memory": "When a page server has received some pages.";
        PageServerWritten = "page-server-written": "When it has all, before they are on disk.";
        ComposeHalf = "compose-half": "After the first blocks of a file that a mount composes.";
    }
}

named! {
    /// Features of newer kernels that a test can hide from the programs.
    Novelty {
        EventfdSemaphore = "eventfd_semaphore":
            "`/proc/PID/fdinfo` tells whether an eventfd is a semaphore (Linux 6.5).";
        LockOnFault = "lock_on_fault":
            "`/proc/PID/smaps` has a code for memory that is locked on fault (after Linux 6.1).";
        TimerIds = "timer_cr_ids": "`PR_TIMER_CREATE_RESTORE_IDS` (Linux 6.15).";
        ThreadPidfd = "pidfd_thread": "`pidfd_open(2)` of a thread, `PIDFD_THREAD` (Linux 6.9).";
        Tracefs = "tracefs": "Tracepoints have numbers that this program can read.";
        Reflink = "reflink": "`FICLONERANGE` (Linux 4.5, btrfs and XFS).";
        CacheStat = "cachestat": "`cachestat(2)` (Linux 6.5).";
        ScanGuards = "pagemap_scan_guards": "`PAGEMAP_SCAN` tells guard pages (Linux 6.18).";
        KernelMemory = "kernel_memory": "BPF programs may read memory of the kernel (Linux 5.14).";
    }
}

/// Whether a test wants the programs to do as if the kernel did not have this.
pub fn is_without(novelty: Novelty) -> bool {
    static MISSING: OnceLock<String> = OnceLock::new();
    let missing = MISSING.get_or_init(|| env::var("RCRIU_WITHOUT").unwrap_or_default());
    missing.split(',').any(|name| name == novelty.name())
}

/// A failure that `RCRIU_FAULT` asked for.
#[derive(Debug, Error)]
#[error("fault injected at {point}, as RCRIU_FAULT asks")]
pub struct Injected {
    point: &'static str,
}

enum Action {
    Fail,
    /// When it comes by for this time; and with `both`, the process that waits for this one
    /// is killed first.
    Kill {
        time: usize,
        both: bool,
    },
    Stop,
    /// The thread waits while this file exists.
    Hold(PathBuf),
}

/// The pause between two looks for the file of [`Action::Hold`].
const HOLD_NAP: Duration = Duration::from_millis(2);

fn chosen() -> Option<&'static (String, Action)> {
    static CHOSEN: OnceLock<Option<(String, Action)>> = OnceLock::new();
    let choose = || {
        let value = env::var("RCRIU_FAULT").ok()?;
        let (name, how) = value.split_once(':').unwrap_or((&value, ""));
        let (verb, time) = how.split_once(':').unwrap_or((how, "1"));
        let time = time.parse().unwrap_or(1);
        let action = match verb {
            "kill" => Action::Kill { time, both: false },
            "kill-both" => Action::Kill { time, both: true },
            "stop" => Action::Stop,
            "hold" => Action::Hold(how.split_once(':').map_or("", |(_, path)| path).into()),
            _ => Action::Fail,
        };
        Some((name.to_owned(), action))
    };
    CHOSEN.get_or_init(choose).as_ref()
}

static DISARMED: AtomicBool = AtomicBool::new(false);

/// Makes nothing fail in this process from now on: it sees to what has failed in another.
pub fn disarm() {
    DISARMED.store(true, Ordering::Relaxed);
}

/// Fails if this point was chosen.
///
/// # Errors
/// [`Injected`].
pub fn hit(point: Point) -> Result<(), Injected> {
    match chosen() {
        Some((name, action)) if name == point.name() && !DISARMED.load(Ordering::Relaxed) => {
            static TIMES: AtomicUsize = AtomicUsize::new(0);
            let time = TIMES.fetch_add(1, Ordering::Relaxed) + 1;
            log::warn!("{}: fault {name} injected", gettid());
            match action {
                Action::Fail => return Err(Injected { point: point.name() }),
                // Nothing is left to report a failure to.
                Action::Kill { time: wanted, both } if time == *wanted => {
                    if *both {
                        kill_parent();
                    }
                    let _ = raise(Signal::SIGKILL);
                }
                Action::Kill { .. } => {}
                Action::Stop => drop(raise(Signal::SIGSTOP)),
                Action::Hold(path) => {
                    while path.exists() {
                        thread::sleep(HOLD_NAP);
                    }
                }
            }
            Ok(())
        }
        _ => Ok(()),
    }
}

/// Kills the process that has started this one if it runs the same program.
fn kill_parent() {
    let parent = getppid();
    let programs = (fs::read_link("/proc/self/exe"), fs::read_link(format!("/proc/{parent}/exe")));
    if let (Ok(own), Ok(other)) = programs
        && own == other
    {
        let _ = kill(parent, Signal::SIGKILL);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn names_are_unique_and_nothing_fails_unasked() {
        let names: BTreeSet<_> = Point::ALL.iter().map(|point| point.name()).collect();
        assert_eq!(names.len(), Point::ALL.len());
        for point in Point::ALL {
            hit(*point).unwrap();
        }
        let names: BTreeSet<_> = Novelty::ALL.iter().map(|novelty| novelty.name()).collect();
        assert_eq!(names.len(), Novelty::ALL.len());
        assert!(!Novelty::ALL.iter().any(|novelty| is_without(*novelty)));
    }
}
