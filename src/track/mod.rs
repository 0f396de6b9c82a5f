//! Tracking: which pages a process has written since a snapshot.
//!
//! The kernel's dirty bits let a dump read less memory. A dump trusts them only for one
//! fact: a page that is reported clean still holds what it held when tracking last
//! restarted. At that moment the process was stopped for the snapshot that its [keeper]
//! names. Everything else (other snapshots, new mappings, moved mappings, memory of files)
//! is compared with the parent. For shared memory the bits mean something only if all
//! writers are [known](shared).

mod error;
pub mod keeper;
mod options;
mod outside;
mod ranges;
mod record;
pub mod shared;
mod soft_dirty;
mod wp;

use std::{collections::BTreeMap, io, os::fd::OwnedFd, path::PathBuf};

use nix::errno::Errno;

use crate::{
    inject::{RunPaused, Scratch, TABLE_BYTES, Task, Tracee, with_session},
    proc::{self, Mapping, VmFlags},
    sys::{
        pagemap::{PagemapFile, Query, Region, category},
        userfaultfd::WriteProtect,
    },
    units::{HostPid, RemoteAddr},
};
pub use error::{Hindrance, TrackError};
use keeper::{Guard, Keeper};
pub use options::Options;
use shared::Sealed;

/// How changes to memory are tracked between two dumps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tracker {
    /// Write protection by userfaultfd, resolved by the kernel (Linux 6.7).
    Wp,
    /// The kernel's soft-dirty bits.
    SoftDirty,
    /// No tracking: every page is compared.
    None,
}

impl Tracker {
    /// Returns the name of the tracker on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Wp => "wp",
            Self::SoftDirty => "soft-dirty",
            Self::None => "none",
        }
    }

    /// Returns the tracker of this name.
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::Wp, Self::SoftDirty, Self::None].into_iter().find(|tracker| tracker.name() == name)
    }
}

/// What the caller wants tracked.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// The tracker; `None` chooses the best one available.
    pub tracker: Option<Tracker>,
    /// The snapshot since which changes are needed, by the id in its inventory.
    pub since: Option<&'a str>,
    /// Whether tracking restarts.
    pub restart: bool,
}

/// Smaller mappings are always protected, because that costs little.
const WORTH_LEAVING_BYTES: u64 = 4 << 20;

/// How much of a mapping is examined first, to see whether the process writes all of it.
const SAMPLE_BYTES: u64 = 1 << 20;

/// One dump in this many protects a mapping even if the process writes all of it.
const PROTECTED_ONCE_IN: u64 = 4;

/// Whether nine tenths of the pages or more were written.
fn is_written_all_over(regions: &[Region]) -> bool {
    let (mut written, mut all) = (0, 0);
    for region in regions {
        let bytes = region.end().0 - region.start().0;
        all += bytes;
        if region.categories & category::WRITTEN != 0 {
            written += bytes;
        }
    }
    all > 0 && written >= all / 10 * 9
}

/// What the tracker reports about a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Told {
    /// Which of its pages were written.
    Writes,
    /// Nothing: all pages are candidates.
    Nothing,
}

/// Makes the userfaultfd of the process.
type Make<'a> = dyn FnMut() -> Result<WriteProtect, TrackError> + 'a;

/// The tracking of one process during a dump.
#[derive(Debug)]
pub struct Watch {
    pid: HostPid,
    tracker: Tracker,
    /// The write protection; `None` for soft-dirty bits.
    protect: Option<WriteProtect>,
    keeper: Option<Keeper>,
    epoch: u64,
    /// Whether the bits report changes since the requested snapshot.
    trusted: bool,
    restart: bool,
    /// Tracked mappings by their start address, and whether they were tracked before this
    /// dump.
    mappings: BTreeMap<RemoteAddr, bool>,
    /// When the process started, which identifies it among processes of this pid.
    born: u64,
    /// Its threads; empty if they have not run yet.
    threads: Vec<HostPid>,
    /// The sum of the keeper's counters.
    count: Option<u64>,
    /// What the snapshot left for the tracking of shared memory.
    guard: Option<Guard>,
}

impl Watch {
    /// Finds the tracking of a stopped process, or starts it if requested. `None` if
    /// tracking helps neither this dump nor the next.
    ///
    /// # Errors
    /// [`TrackError`]; then no tracking can be trusted.
    pub fn begin(
        request: Request,
        task: &mut Task,
        mappings: &[Mapping],
    ) -> Result<Option<Self>, TrackError> {
        let pid = task.pid;
        if task.is_leaderless() {
            forget(pid)?;
            return Err(TrackError::Leaderless { pid });
        }
        let threads: Vec<_> = task.threads.iter().map(|thread| thread.tid).collect();
        Self::begin_with(request, pid, threads, mappings, &mut || {
            let mut made = None;
            with_session(&mut task.threads, mappings, &[], TABLE_BYTES, |session, threads| {
                made = Some(wp::make(pid, &mut |script, act| {
                    session.run_paused(threads, 0, script, act)
                }));
                Ok(())
            })?;
            made.expect("it ran")
        })
    }

    /// Starts the tracking of a process that has just been restored and has not run yet;
    /// one of its threads works in scratch memory.
    ///
    /// # Errors
    /// As [`Self::begin`].
    pub fn begin_restored(
        tracker: Option<Tracker>,
        pid: HostPid,
        mappings: &[Mapping],
        scratch: &Scratch,
        thread: &mut Tracee,
    ) -> Result<Option<Self>, TrackError> {
        let request = Request { tracker, since: None, restart: true };
        let run: &mut RunPaused<'_> = &mut |script, act| scratch.run_paused(thread, script, act);
        let make = &mut || wp::make(pid, run);
        let watch = Self::begin_with(request, pid, Vec::new(), mappings, make)?;
        let Some(watch) = watch else { return Ok(None) };
        let failed = |source| TrackError::Kernel { pid, step: "protect the memory", source };
        let path = PathBuf::from(format!("/proc/{pid}/pagemap"));
        let pagemap = PagemapFile::open(&path).map_err(failed)?;
        for mapping in mappings.iter().filter(|mapping| can_be_tracked(mapping)) {
            let query = Query::ANONYMOUS.without_guards();
            watch.scan(&pagemap, mapping, query, &mut Vec::new()).map_err(failed)?;
        }
        watch.scanned()?;
        Ok(Some(watch))
    }

    fn begin_with(
        request: Request,
        pid: HostPid,
        threads: Vec<HostPid>,
        mappings: &[Mapping],
        make: &mut Make,
    ) -> Result<Option<Self>, TrackError> {
        if request.tracker == Some(Tracker::None) {
            if request.restart {
                // No dump may trust the old tracking.
                forget(pid)?;
            }
            return Ok(None);
        }
        let unseen = if request.restart { unseen_writers(pid, mappings)? } else { None };
        let restart = request.restart && unseen.is_none();
        if let Some(what) = unseen {
            log::warn!(
                "{}; the next dump compares its memory in full",
                TrackError::Unseen { pid, what }
            );
        }
        let mut keeper = Keeper::find(pid)?;
        let mut kept = keeper.as_ref().map(Keeper::kept).transpose()?;
        let other = |kept: &keeper::Kept| request.tracker.is_some_and(|t| t != kept.tracker);
        if kept.as_ref().is_some_and(other) {
            kept = None;
            if restart && let Some(keeper) = keeper.take() {
                keeper.end()?;
            }
        }
        let since = kept.as_ref().and_then(|kept| kept.since.as_deref());
        let trusted = since.is_some() && since == request.since;
        if !trusted && !restart {
            return Ok(None);
        }
        let mut epoch = 0;
        if restart && let Some(keeper) = &keeper {
            // From here on, a failure must not leave tracking that a later dump would
            // trust.
            epoch = keeper.forget()?;
        }
        let tracker = match (&kept, request.tracker) {
            (Some(kept), _) => kept.tracker,
            (None, Some(tracker)) => tracker,
            (None, None) => choose()?,
        };
        let (mut fd, mut count, mut guard) = (None, None, None);
        if let Some(kept) = kept {
            (fd, count, guard) = (Some(kept.fd), kept.count, kept.guard.filter(|_| trusted));
        }
        let mut watch = Self {
            pid,
            tracker,
            protect: None,
            keeper,
            epoch,
            trusted,
            restart,
            mappings: BTreeMap::new(),
            born: proc::stat(pid)?.start_time,
            threads,
            count,
            guard,
        };
        match tracker {
            Tracker::Wp => watch.begin_wp(make, mappings, fd)?,
            Tracker::SoftDirty => watch.begin_soft_dirty(mappings)?,
            Tracker::None => return Ok(None),
        }
        log::debug!(
            "{pid}: {} tracks {} mappings, {}",
            tracker.name(),
            watch.mappings.len(),
            if watch.trusted { "since the parent" } else { "but not since the parent" },
        );
        Ok(Some(watch))
    }

    fn begin_soft_dirty(&mut self, mappings: &[Mapping]) -> Result<(), TrackError> {
        if !soft_dirty::is_there() {
            let help = "use a kernel with CONFIG_MEM_SOFT_DIRTY";
            return Err(TrackError::Missing { what: "this kernel has no soft-dirty bits", help });
        }
        for mapping in mappings.iter().filter(|mapping| can_be_tracked(mapping)) {
            self.mappings.insert(mapping.start, true);
        }
        Ok(())
    }

    fn begin_wp(
        &mut self,
        make: &mut Make,
        mappings: &[Mapping],
        kept: Option<OwnedFd>,
    ) -> Result<(), TrackError> {
        let tracked: Vec<_> = mappings.iter().filter(|mapping| can_be_tracked(mapping)).collect();
        if let Some(fd) = kept {
            let protect = WriteProtect::resume(fd);
            match self.register(&protect, &tracked) {
                // The memory that the userfaultfd belongs to is gone: the process executed
                // another program.
                Err(Errno::ENOMEM) => {
                    self.mappings.clear();
                    self.trusted = false;
                    self.count = None;
                    if self.restart
                        && let Some(keeper) = self.keeper.take()
                    {
                        keeper.end()?;
                        self.epoch = 0;
                    }
                }
                result => {
                    result.map_err(TrackError::kernel(self.pid, "track the memory"))?;
                    self.protect = Some(protect);
                    return Ok(());
                }
            }
        }
        if self.restart {
            let protect = make()?;
            self.register(&protect, &tracked)
                .map_err(TrackError::kernel(self.pid, "track the memory"))?;
            self.protect = Some(protect);
        }
        Ok(())
    }

    /// Registers mappings. A mapping that is already registered with this userfaultfd has
    /// been tracked since before; registering a mapping of another userfaultfd fails.
    fn register(&mut self, protect: &WriteProtect, mappings: &[&Mapping]) -> Result<(), Errno> {
        for mapping in mappings {
            let before = mapping.flags.contains(VmFlags::UFFD_WP);
            if !before && !self.restart {
                continue;
            }
            match protect.register(mapping.start, mapping.end) {
                Ok(()) => drop(self.mappings.insert(mapping.start, before)),
                Err(Errno::ENOMEM) => return Err(Errno::ENOMEM),
                Err(errno) => {
                    log::debug!("{}: {} is not tracked: {errno}", self.pid, mapping.start);
                }
            }
        }
        Ok(())
    }

    /// Returns the tracker in use.
    pub fn tracker(&self) -> Tracker {
        self.tracker
    }

    /// Appends the regions of a mapping that match `query`, each with whether it is known
    /// to be clean, and returns what the tracker reported. If tracking restarts, each page
    /// restarts as it is scanned.
    ///
    /// # Errors
    /// As [`PagemapFile::scan`].
    pub fn scan(
        &self,
        pagemap: &PagemapFile,
        mapping: &Mapping,
        query: Query,
        found: &mut Vec<(Region, bool)>,
    ) -> io::Result<Told> {
        let before = self.mappings.get(&mapping.start).copied();
        let told = match self.tracker {
            Tracker::SoftDirty => category::SOFT_DIRTY,
            Tracker::Wp | Tracker::None => category::WRITTEN,
        };
        let told = if before.is_some() { told } else { 0 };
        let asked = query.tell;
        let query = Query { tell: told | asked, ..query };
        let mut regions = Vec::new();
        let mut believed = self.trusted && before == Some(true);
        let (start, end) = (mapping.start, mapping.end);
        if believed && self.leaves_alone(pagemap, mapping, query, &mut regions) {
            log::debug!("{}: the process writes all of {start}, which stays unprotected", self.pid);
        } else if self.tracker == Tracker::Wp && self.restart && before.is_some() {
            regions.clear();
            if let Err(error) = pagemap.scan_and_protect(start, end, query, &mut regions) {
                log::debug!("{}: cannot protect {start}: {error}", self.pid);
                // Some pages were reported incompletely, so all of them are candidates.
                believed = false;
                regions.clear();
                pagemap.scan(start, end, Query { tell: asked, ..query }, &mut regions)?;
            }
        } else {
            let by_ioctl = pagemap.scan(start, end, query, &mut regions)?;
            believed &= by_ioctl || self.tracker == Tracker::SoftDirty;
        }
        found.extend(
            regions.into_iter().map(|region| (region, believed && region.categories & told == 0)),
        );
        Ok(if believed { Told::Writes } else { Told::Nothing })
    }

    /// Whether a mapping keeps its state although tracking restarts. The process writes all
    /// of it anyway, so protecting it would cost a fault for each page and save nothing. If
    /// so, appends its regions.
    ///
    /// Pages that lost their protection count as written in the next dump; pages that still
    /// have it were not written since an older snapshot. So the reports stay true. Every
    /// few dumps protect all pages, to find out whether the process still writes them.
    fn leaves_alone(
        &self,
        pagemap: &PagemapFile,
        mapping: &Mapping,
        query: Query,
        regions: &mut Vec<Region>,
    ) -> bool {
        if self.tracker != Tracker::Wp
            || !self.restart
            || self.epoch.is_multiple_of(PROTECTED_ONCE_IN)
            || mapping.len() < WORTH_LEAVING_BYTES
        {
            return false;
        }
        // For most mappings, the first pages already rule it out.
        for end in [mapping.start.plus(SAMPLE_BYTES), mapping.end] {
            regions.clear();
            let told = pagemap.scan(mapping.start, end, query, regions);
            if !told.unwrap_or(false) || !is_written_all_over(regions) {
                return false;
            }
        }
        true
    }

    /// Records that all mappings were scanned; the process is still stopped.
    ///
    /// # Errors
    /// [`TrackError::Kernel`].
    pub fn scanned(&self) -> Result<(), TrackError> {
        if self.tracker == Tracker::SoftDirty && self.restart {
            soft_dirty::clear(self.pid)?;
        }
        Ok(())
    }

    /// Lets changes count from the snapshot `id`, which is complete; `shared` is what the
    /// keepers hold for shared memory.
    ///
    /// # Errors
    /// [`TrackError::Keeper`]; [`TrackError::Overtaken`]. The next dump then compares all
    /// pages.
    pub fn commit(self, id: &str, shared: Option<&Sealed>) -> Result<(), TrackError> {
        if !self.restart {
            return Ok(());
        }
        let (keeper, epoch) = match self.keeper {
            Some(keeper) => (keeper, self.epoch),
            None => {
                let fd = match self.protect {
                    Some(protect) => protect.into(),
                    None => soft_dirty::nothing(self.pid)?,
                };
                (Keeper::start(self.pid, self.tracker, fd)?, 0)
            }
        };
        let guard = shared.and_then(|shared| shared.give(self.pid, &keeper));
        keeper.remember(epoch, id, guard)
    }
}

/// Returns why the memory of a process is not tracked if another process shares it. Makes
/// the keeper, if there is one, forget the snapshot.
pub fn refuse_shared(pid: HostPid) -> TrackError {
    forget(pid).err().unwrap_or(TrackError::SharedMemory { pid })
}

/// Makes the keeper of a process, if there is one, forget the snapshot.
fn forget(pid: HostPid) -> Result<(), TrackError> {
    match Keeper::find(pid)? {
        Some(keeper) => keeper.forget().map(drop),
        None => Ok(()),
    }
}

/// Returns the best tracker that this kernel has.
fn choose() -> Result<Tracker, TrackError> {
    if wp::is_there() {
        Ok(Tracker::Wp)
    } else if soft_dirty::is_there() {
        Ok(Tracker::SoftDirty)
    } else {
        let what =
            "this kernel can track changes neither by write protection nor by soft-dirty bits";
        let help = "use Linux 6.7 or newer, or a kernel with CONFIG_MEM_SOFT_DIRTY";
        Err(TrackError::Missing { what, help })
    }
}

/// Whether a mapping is private memory without a file, which can be tracked. In private
/// mappings of files, few pages are dirty, and a page of the file may replace one
/// unnoticed.
pub fn can_be_tracked(mapping: &Mapping) -> bool {
    let strange = VmFlags::HUGE_TLB
        | VmFlags::PFN_MAP
        | VmFlags::IO
        | VmFlags::MIXED_MAP
        | VmFlags::DROPPABLE;
    !mapping.shared
        && (mapping.inode, mapping.dev_major, mapping.dev_minor) == (0, 0, 0)
        && !mapping.flags.intersects(strange)
        && !mapping.name.starts_with(b"[v")
}

/// Returns what the process has that writes to memory by physical address, at any time
/// after looking the address up.
fn unseen_writers(pid: HostPid, mappings: &[Mapping]) -> Result<Option<&'static str>, TrackError> {
    if mappings.iter().any(|mapping| mapping.name.starts_with(b"/[aio]")) {
        return Ok(Some("has a ring of asynchronous I/O"));
    }
    if proc::status(pid)?.vm_pin_kib.unwrap_or(0) > 0 {
        return Ok(Some("has memory that a device or io_uring has pinned"));
    }
    let descriptors = proc::Descriptors::open(pid)?;
    for number in descriptors.numbers()? {
        if descriptors.link(number).is_ok_and(|link| link == b"anon_inode:[io_uring]") {
            return Ok(Some("has an io_uring"));
        }
    }
    Ok(None)
}
