//! Attributes of mappings and of address spaces, which the restore sets last.

use nix::libc;

use super::{add, values};
use crate::{
    causes::tell,
    inject::Script,
    proc::{Mapping, VmFlags},
    res::{
        Result,
        task::{Calling, Collect, Kind, Restored},
    },
};

/// Sealed ranges (`mseal(2)`): start and end of each.
const SEALED: &str = "sealed";

/// How the kernel locks future mappings: `MCL_*` of `mlockall(2)`.
const LOCK_LATER: &str = "lock_later";

/// `mseal(2)`, since Linux 6.10.
const SYS_MSEAL: libc::c_long = 462;

/// `MCL_ONFAULT` (`asm-generic/mman.h`).
const MCL_ONFAULT: u64 = 4;

/// How the process locks future mappings, as seen from the scratch memory mapped into it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LockLater {
    /// Future mappings are locked (`MCL_FUTURE`).
    pub locked: bool,
    /// Their pages are locked only when touched (`MCL_ONFAULT`).
    pub on_fault: bool,
}

/// How the process locks future mappings.
pub(in crate::res) struct LockedLater;

impl Kind for LockedLater {
    fn attributes(&self) -> &'static [&'static str] {
        &[LOCK_LATER]
    }

    fn ask(&self, _: &Calling<'_>, _: &mut Script) -> Result<Collect> {
        Ok(Box::new(|of, _, images| {
            if of.lock_later.locked {
                let on_fault = if of.lock_later.on_fault { MCL_ONFAULT } else { 0 };
                let flags = u64::from(libc::MCL_FUTURE.cast_unsigned()) | on_fault;
                add(&mut images.attributes, LOCK_LATER, vec![flags]);
            }
            Ok(())
        }))
    }

    /// Runs after all mappings are made, and before the credentials are set: a low limit makes
    /// it need a privilege.
    fn before_credentials(&self, of: &Restored<'_>, script: &mut Script) {
        for values in values(of.core, LOCK_LATER) {
            let flags = values.first().copied().unwrap_or_default();
            let what = "lock future mappings (MCL_FUTURE; see RLIMIT_MEMLOCK)";
            script.call(what, libc::SYS_mlockall, &[flags.into()]);
        }
    }
}

/// Sealed memory.
pub(in crate::res) struct Sealed;

impl Kind for Sealed {
    fn attributes(&self) -> &'static [&'static str] {
        &[SEALED]
    }

    fn ask(&self, _: &Calling<'_>, _: &mut Script) -> Result<Collect> {
        Ok(Box::new(|of, _, images| {
            for what in lost(of.mappings) {
                tell(log::Level::Warn, &format!("process {} {what}", of.of.pid));
            }
            let ranges = sealed(of.mappings);
            if !ranges.is_empty() {
                add(&mut images.attributes, SEALED, ranges);
            }
            Ok(())
        }))
    }

    /// Runs last: a sealed range can be neither mapped nor changed.
    fn last_calls(&self, of: &Restored<'_>, script: &mut Script) -> Result<()> {
        for range in values(of.core, SEALED).flat_map(|values| values.chunks_exact(2)) {
            let (start, end) = (range[0], range[1]);
            let what = format!("seal the memory {start:#x}-{end:#x} (mseal(2))");
            let len = end.saturating_sub(start);
            script.call(what, SYS_MSEAL, &[start.into(), len.into(), 0.into()]);
        }
        Ok(())
    }
}

/// Returns the sealed ranges: start and end of each.
fn sealed(mappings: &[Mapping]) -> Vec<u64> {
    let mut ranges: Vec<u64> = Vec::new();
    // The kernel seals its own mappings.
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
    ranges
}

/// Returns sentences about memory attributes that a process will lose, without their subject,
/// "process N".
fn lost(mappings: &[Mapping]) -> Vec<String> {
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
    found
}
