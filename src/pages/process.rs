//! Reads the memory of a process without leaving a trace in it.
//!
//! Only pages in memory or in swap are read: reading any other page would create it.
//! `process_vm_readv(2)` pins the pages that it reads. To pin a page that is shared copy-on-write or
//! merged by KSM, the kernel first copies it in the process, and splits huge pages to do so.
//! Reading `/proc/PID/mem` only takes references, but is half as fast. So rcriu pins pages only if
//! no other process has them.
//!
//! The page table of a process has pages of the vDSO only once the process has touched them. All
//! processes share the kernel's vDSO, so rcriu reads the other pages in its own.

use std::{fs::File, io::IoSliceMut, ops::Range, os::unix::fs::FileExt, sync::OnceLock};

use nix::{
    sys::uio::{RemoteIoVec, process_vm_readv},
    unistd::Pid,
};

use super::{
    PagesError, Result, Stretch,
    stretch::{for_each_run, len},
};
use crate::{
    proc::{self, Mapping, VmFlags},
    sys::process,
    units::{HostPid, PAGE_LEN, RemoteAddr, page_bytes},
};

/// The memory of a process.
#[derive(Debug)]
pub struct ProcessMemory {
    pid: HostPid,
    /// Its `/proc/PID/mem`.
    file: File,
    /// The start of its vDSO, and rcriu's own vDSO, if both have the same length.
    vdsos: Option<(RemoteAddr, &'static OwnVdso)>,
    /// For a shadow of the process (`inject/shadow.rs`): what that lacks, by address.
    lacking: Option<Vec<(RemoteAddr, Vec<u8>)>>,
}

/// The vDSO of rcriu itself.
#[derive(Debug)]
struct OwnVdso {
    start: RemoteAddr,
    len: u64,
    /// `/proc/self/mem`.
    memory: File,
}

/// Returns the vDSO of rcriu itself; `None` if it has none, or cannot read it.
fn own_vdso() -> Option<&'static OwnVdso> {
    static OWN: OnceLock<Option<OwnVdso>> = OnceLock::new();
    let find = || {
        let mappings = proc::maps(HostPid::own()).ok()?;
        let vdso = mappings.iter().find(|mapping| is_vdso(mapping))?;
        let memory = File::open("/proc/self/mem").ok()?;
        Some(OwnVdso { start: vdso.start, len: vdso.len(), memory })
    };
    OWN.get_or_init(find).as_ref()
}

impl ProcessMemory {
    /// Opens the memory of a process with these mappings.
    pub fn open(pid: HostPid, mappings: &[Mapping]) -> Result<Self> {
        let file = process::open_memory(pid).map_err(|source| {
            let path = format!("/proc/{pid}/mem").into();
            PagesError::Open { path, source }
        })?;
        let vdso = mappings.iter().find(|mapping| is_vdso(mapping));
        let vdsos = vdso.zip(own_vdso()).filter(|(theirs, own)| theirs.len() == own.len);
        let vdsos = vdsos.map(|(theirs, own)| (theirs.start, own));
        Ok(Self { pid, file, vdsos, lacking: None })
    }

    /// Opens the memory of a shadow of a process with these mappings. `lacking` is memory of the process
    /// that the shadow does not have.
    pub(super) fn of_shadow(
        shadow: HostPid,
        mappings: &[Mapping],
        lacking: Vec<(RemoteAddr, Vec<u8>)>,
    ) -> Result<Self> {
        Ok(Self { lacking: Some(lacking), ..Self::open(shadow, mappings)? })
    }

    /// Reads runs of pages. If the process is `running`, pages may disappear; they read as zeros.
    ///
    /// # Errors
    /// [`PagesError::ReadMemory`].
    pub(super) fn read(&self, runs: &[Stretch], bytes: &mut [u8], running: bool) -> Result<()> {
        // A running process may fork at any time, and then shares its pages.
        // A shadow shares all of its pages.
        let may_pin = !running && self.lacking.is_none();
        let pinned = may_pin && runs.iter().all(|run| run.pinnable) && self.pin(runs, bytes);
        if !pinned {
            for_each_run(runs, bytes, |run, target| {
                let address = RemoteAddr(run.first.address());
                if let Some(bytes) = self.lacking_at(address, target.len()) {
                    target.copy_from_slice(bytes);
                    return Ok(());
                }
                if run.of_kernel && self.read_own_vdso(address, target) {
                    return Ok(());
                }
                if running {
                    self.read_what_is_there(address, target);
                    return Ok(());
                }
                self.file.read_exact_at(target, address.0).map_err(|source| {
                    let (pid, len) = (self.pid, target.len() as u64);
                    PagesError::ReadMemory { pid, address, len, source }
                })
            })?;
        }
        self.page_out(runs.iter().filter(|run| run.swapped));
        Ok(())
    }

    /// Returns bytes that the shadow lacks.
    fn lacking_at(&self, address: RemoteAddr, len: usize) -> Option<&[u8]> {
        self.lacking.iter().flatten().find_map(|(start, bytes)| {
            let at = usize::try_from(address.0.checked_sub(start.0)?).ok()?;
            bytes.get(at..at.checked_add(len)?)
        })
    }

    /// Reads pages of the vDSO from rcriu's own; returns false if it differs.
    fn read_own_vdso(&self, address: RemoteAddr, target: &mut [u8]) -> bool {
        let Some((theirs, own)) = self.vdsos else { return false };
        let at = own.start.0 + (address.0 - theirs.0);
        own.memory.read_exact_at(target, at).is_ok()
    }

    /// Reads all runs by one call; returns false if it could not read all of them.
    fn pin(&self, runs: &[Stretch], bytes: &mut [u8]) -> bool {
        let remote: Vec<RemoteIoVec> = runs
            .iter()
            .map(|run| RemoteIoVec {
                base: usize::try_from(run.first.address()).expect("64-bit addresses"),
                len: len(run.pages),
            })
            .collect();
        let wanted = bytes.len();
        let pid = Pid::from_raw(self.pid.0);
        process_vm_readv(pid, &mut [IoSliceMut::new(bytes)], &remote) == Ok(wanted)
    }

    /// Reads memory of a running process. Pages that have disappeared read as zeros: a new mapping
    /// in their place has new pages, which the next dump reads.
    fn read_what_is_there(&self, address: RemoteAddr, target: &mut [u8]) {
        if self.file.read_exact_at(target, address.0).is_ok() {
            return;
        }
        for (number, page) in (0..).zip(target.chunks_exact_mut(PAGE_LEN)) {
            if self.file.read_exact_at(page, address.0 + page_bytes(number)).is_err() {
                page.fill(0);
            }
        }
    }

    /// Moves pages that were in swap back there, since resident memory counts against the limits of
    /// the process. The copies in swap are still valid, so nothing is written.
    pub(super) fn page_out<'a>(&self, swapped: impl Iterator<Item = &'a Stretch>) {
        let ranges: Vec<Range<RemoteAddr>> = swapped
            .map(|run| {
                let start = RemoteAddr(run.first.address());
                start..start.plus(page_bytes(run.pages))
            })
            .collect();
        // Nothing counts against limits for a shadow, which soon ends.
        if ranges.is_empty() || self.lacking.is_some() {
            return;
        }
        let done = process::pidfd_open(self.pid).and_then(|fd| process::page_out(&fd, &ranges));
        if let Err(errno) = done {
            log::debug!("{}: cannot move pages back to swap: {errno}", self.pid);
        }
    }
}

fn is_vdso(mapping: &Mapping) -> bool {
    mapping.name == b"[vdso]"
}

/// Whether a fork copies the memory of a mapping as it is, so that a shadow has it.
pub(super) fn is_forked(mapping: &Mapping) -> bool {
    // The parent may take huge pages of hugetlbfs away from its child.
    let unlike = VmFlags::DONT_COPY | VmFlags::WIPE_ON_FORK | VmFlags::HUGE_TLB;
    !mapping.flags.intersects(unlike) && !mapping.name.starts_with(b"/[aio]")
}

/// Whether pinning pages of a stopped process's mapping leaves no trace: it can read them, and does
/// not share them.
pub(super) fn is_pinnable(mapping: &Mapping) -> bool {
    let merged_at_any_time = mapping.flags.contains(VmFlags::MERGEABLE);
    let huge = mapping.flags.contains(VmFlags::HUGE_TLB);
    mapping.read
        && mapping.shared_rss_bytes == 0
        && mapping.swap_bytes == 0
        && !merged_at_any_time
        && !huge
}
