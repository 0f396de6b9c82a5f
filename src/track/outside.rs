//! Other possible writers of shared memory: processes outside of the tree that map it, and
//! processes that have a descriptor of it.
//!
//! Descriptors in flight cannot be seen: in a message that no process has received yet, or
//! among the files of an io_uring. Memory without a name has descriptors only if a process
//! opened it in `/proc/PID/map_files`.

use std::collections::BTreeSet;

use super::{TrackError, record::Key};
use crate::{
    proc::{self, ProcError},
    sys::process::{self, Shared},
    units::HostPid,
};

/// `CAP_SYS_PTRACE` (`linux/capability.h`): the program sees all processes.
const CAP_SYS_PTRACE: u64 = 1 << 19;

/// How often the processes are listed until a list shows no new one.
const ROUNDS: usize = 16;

/// The suffix that the kernel gives to names of files without a name, such as shared
/// memory.
const DELETED: &[u8] = b" (deleted)";

/// `PF_FORKNOEXEC` (`linux/sched.h`): the process has not executed a program since it was
/// forked.
const FORKED_ONLY: u32 = 0x40;

/// What a search for other writers has found.
#[derive(Debug, Default)]
pub(super) struct Outside {
    /// Objects that a process could write to other than by a mapping of the tree.
    pub(super) written: BTreeSet<Key>,
    /// Whether some processes may not be inspected, but cannot have inherited memory of the
    /// tree: they started before its root, which has executed a program since. They can have
    /// got the memory by a descriptor, but not by a fork.
    pub(super) hidden: bool,
}

/// Looks for writers of `objects` other than the mappings of the stopped `tree`, whose root
/// comes first.
///
/// # Errors
/// Why the writers cannot be determined.
pub(super) fn look(objects: &BTreeSet<Key>, tree: &[HostPid]) -> Result<Outside, TrackError> {
    let own = HostPid::own();
    let namespace = proc::namespace(own, "pid")?;
    let capabilities = proc::status(own)?.cap_effective;
    if namespace != process::FIRST_PID_NAMESPACE || capabilities & CAP_SYS_PTRACE == 0 {
        return Err(TrackError::Missing {
            what: "rcriu cannot see all processes",
            help: "run rcriu in the first pid namespace, with CAP_SYS_PTRACE",
        });
    }
    let root = tree.first().map(|root| proc::stat(*root)).transpose()?;
    let began = root.filter(|root| root.flags & FORKED_ONLY == 0).map(|root| root.start_time);
    let mut found = Outside::default();
    let mut known: BTreeSet<HostPid> = [own].into();
    for _ in 0..ROUNDS {
        let pids: Vec<_> = proc::pids()?.into_iter().filter(|pid| known.insert(*pid)).collect();
        if pids.is_empty() {
            return Ok(found);
        }
        for pid in pids {
            match look_at(pid, tree.contains(&pid), objects, &mut found.written) {
                Err(TrackError::Proc(error)) if error.is_vanished() => {}
                Err(TrackError::Proc(ProcError::Denied { .. }))
                    if began > Some(proc::stat(pid)?.start_time) =>
                {
                    found.hidden = true;
                }
                looked => looked?,
            }
        }
    }
    Err(TrackError::Missing {
        what: "new processes start all the time",
        help: "dump when fewer processes start",
    })
}

fn look_at(
    pid: HostPid,
    in_tree: bool,
    objects: &BTreeSet<Key>,
    found: &mut BTreeSet<Key>,
) -> Result<(), TrackError> {
    let unknown = || TrackError::Unseen { pid, what: "cannot be inspected completely" };
    if !in_tree {
        let mappings = proc::maps(pid)?;
        if mappings.is_empty() && proc::stat(pid)?.threads > 1 {
            // Its first thread has ended, so the kernel shows nothing of what the others
            // have.
            return Err(unknown());
        }
        let shared = mappings.iter().filter(|mapping| mapping.shared).map(Key::of_mapping);
        found.extend(shared.filter(|key| objects.contains(key)));
    }
    let descriptors = proc::Descriptors::open(pid)?;
    for number in descriptors.numbers()? {
        let link = match descriptors.link(number) {
            Err(error) if error.is_vanished() => continue,
            link => link?,
        };
        if link.ends_with(DELETED) {
            let key = match proc::fd_metadata(pid, number) {
                Err(error) if error.is_vanished() => continue,
                metadata => Key::of_file(&metadata?),
            };
            if objects.contains(&key) {
                found.insert(key);
            }
        }
    }
    for tid in proc::threads(pid)?.into_iter().filter(|tid| *tid != pid) {
        match process::kcmp(pid, tid, Shared::Files) {
            Ok(std::cmp::Ordering::Equal) | Err(nix::errno::Errno::ESRCH) => {}
            // The thread has descriptors of its own.
            _ => return Err(unknown()),
        }
    }
    Ok(())
}
