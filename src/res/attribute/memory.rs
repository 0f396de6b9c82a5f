//! What belongs to mappings, or to all of a process's memory, and is set last.

use nix::libc;

use super::proto;
use crate::{
    inject::Script,
    proc::{Mapping, VmFlags},
    units::HostPid,
};

/// Ranges that may not be changed any more (`mseal(2)`): begins and ends in turn.
const SEALED: &str = "sealed";

/// How memory that is mapped later is locked: `MCL_*` of `mlockall(2)`.
const LOCK_LATER: &str = "lock_later";

/// The names of all attributes of memory.
pub(super) const NAMES: [&str; 2] = [SEALED, LOCK_LATER];

/// `mseal(2)`, since Linux 6.10.
const SYS_MSEAL: libc::c_long = 462;

/// `MCL_ONFAULT` (`asm-generic/mman.h`).
const MCL_ONFAULT: u64 = 4;

/// How memory that is mapped later is locked, as the memory tells that was mapped to ask.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LockLater {
    /// It is (`MCL_FUTURE`).
    pub locked: bool,
    /// Only as pages are touched (`MCL_ONFAULT`).
    pub on_fault: bool,
}

/// Returns what an image says of the memory of a process.
pub fn collect(mappings: &[Mapping], later: LockLater) -> Vec<proto::RcriuAttribute> {
    let mut ranges: Vec<u64> = Vec::new();
    // The kernel seals its own by itself.
    let sealed = |mapping: &&Mapping| {
        let own = mapping.name.starts_with(b"[v") || mapping.name == b"[uprobes]";
        mapping.flags.contains(VmFlags::SEALED) && !own
    };
    for mapping in mappings.iter().filter(sealed) {
        match ranges.last_mut() {
            Some(end) if *end == mapping.start.0 => *end = mapping.end.0,
            _ => ranges.extend([mapping.start.0, mapping.end.0]),
        }
    }
    let mut found = Vec::new();
    let mut add = |name: &str, values: Vec<u64>| {
        found.push(proto::RcriuAttribute { name: name.into(), values });
    };
    if !ranges.is_empty() {
        add(SEALED, ranges);
    }
    if later.locked {
        let on_fault = if later.on_fault { MCL_ONFAULT } else { 0 };
        add(LOCK_LATER, vec![u64::from(libc::MCL_FUTURE.cast_unsigned()) | on_fault]);
    }
    found
}

fn attributes_of(core: &proto::CoreEntry) -> impl Iterator<Item = &proto::RcriuAttribute> {
    core.thread_core.iter().flat_map(|thread| &thread.rcriu_attributes)
}

/// Adds the call by which what is mapped later is locked. It takes a privilege if the limit
/// is low, so it comes before the credentials; and after everything that is mapped.
pub fn lock_later(core: &proto::CoreEntry, script: &mut Script) {
    for attribute in attributes_of(core).filter(|of| of.name == LOCK_LATER.as_bytes()) {
        let flags = attribute.values.first().copied().unwrap_or_default();
        let what = "lock what is mapped later (MCL_FUTURE; see RLIMIT_MEMLOCK)";
        script.call(what, libc::SYS_mlockall, &[flags.into()]);
    }
}

/// Adds the last calls of a process that are about its memory: nothing of the images can
/// be mapped afterwards as it is to be.
pub fn finish(core: &proto::CoreEntry, script: &mut Script) {
    for attribute in attributes_of(core).filter(|of| of.name == SEALED.as_bytes()) {
        for range in attribute.values.chunks_exact(2) {
            let (start, end) = (range[0], range[1]);
            let what = format!("seal the memory {start:#x}-{end:#x} (mseal(2))");
            let len = end.saturating_sub(start);
            script.call(what, SYS_MSEAL, &[start.into(), len.into(), 0.into()]);
        }
    }
}

/// Returns what a process will lose of its memory, as the ends of sentences that begin
/// with "process N".
pub fn lost(pid: HostPid, mappings: &[Mapping]) -> Vec<String> {
    let mut found = Vec::new();
    let named = mappings.iter().find(|mapping| {
        mapping.name.starts_with(b"[anon:") || mapping.name.starts_with(b"[anon_shmem:")
    });
    if let Some(mapping) = named {
        found.push(format!(
            "has names for anonymous memory (PR_SET_VMA), such as {} at {}: they are lost",
            String::from_utf8_lossy(&mapping.name),
            mapping.start
        ));
    }
    // Where there is one node, all policies are the same.
    let nodes = std::fs::read_to_string("/sys/devices/system/node/online").unwrap_or_default();
    if !matches!(nodes.trim(), "" | "0") {
        let text = std::fs::read_to_string(format!("/proc/{pid}/numa_maps")).unwrap_or_default();
        let policies = text.lines().filter_map(|line| line.split(' ').nth(1));
        if let Some(policy) = policies.into_iter().find(|policy| *policy != "default") {
            found.push(format!(
                "has memory with the NUMA policy {policy}: that of single mappings (mbind(2)) is \
                 lost"
            ));
        }
    }
    found
}
