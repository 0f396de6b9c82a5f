//! Which pages a process has written since a snapshot.
//!
//! The kernel's bits are a way to look at less of the memory, and nothing is believed
//! of them but this: a page that is told to be unwritten holds what it held when
//! tracking was last restarted. That is the moment in which the process was stopped
//! for the snapshot that its [keeper] names. All else (other snapshots, new mappings,
//! mappings that were moved, memory of files) is compared with the parent. Of shared
//! memory they tell something only if all writers are [known](shared).

pub mod keeper;
mod options;
mod outside;
mod record;
pub mod shared;
mod soft_dirty;
mod wp;

use std::{collections::BTreeMap, io, os::fd::OwnedFd, path::PathBuf};

use nix::errno::Errno;

use crate::{
    causes::with_sources,
    inject::{InjectError, Scratch, TABLE_BYTES, Task, Tracee, with_session},
    proc::{self, Mapping, ProcError, VmFlags},
    sys::{
        pagemap::{PagemapFile, Query, Region, category},
        tracepoint::CountError,
        userfaultfd::WriteProtect,
    },
    units::{HostPid, RemoteAddr},
};
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
    /// Not at all: every page is compared.
    None,
}

impl Tracker {
    /// Returns the tracker's name on the command line.
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

/// Why changes are not tracked; everything is compared then.
#[derive(Debug, thiserror::Error)]
pub enum TrackError {
    /// The keeper cannot be reached, or is not one.
    #[error("keep the tracking of process {pid}")]
    Keeper {
        /// The process.
        pid: HostPid,
        /// Why.
        source: io::Error,
    },
    /// Somebody else has restarted the tracking in the meantime.
    #[error("the tracking of process {pid} was restarted by another dump")]
    Overtaken {
        /// The process.
        pid: HostPid,
    },
    /// A system call failed.
    #[error("{step} of process {pid}")]
    Kernel {
        /// The process.
        pid: HostPid,
        /// What was attempted, as a verb.
        step: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The kernel does not do it, or not for this program.
    #[error("this program has no {what} here")]
    Missing {
        /// What is missing.
        what: &'static str,
        /// What helps.
        help: &'static str,
    },
    /// Something writes to the memory without the kernel's page tables.
    #[error("process {pid} {what}, which writes to memory without being seen")]
    Unseen {
        /// The process.
        pid: HostPid,
        /// What it has, beginning with a verb.
        what: &'static str,
    },
    /// The kernel shows nothing of a process by a thread that has ended.
    #[error("the first thread of process {pid} has exited while others live")]
    Leaderless {
        /// The process.
        pid: HostPid,
    },
    /// Another process has the same memory: what it does is not watched.
    #[error("process {pid} shares its memory with another one")]
    SharedMemory {
        /// The process.
        pid: HostPid,
    },
    /// It cannot be known who opens shared memory.
    #[error("{step}")]
    Openings {
        /// What was attempted, as a verb.
        step: &'static str,
        /// Why.
        source: io::Error,
    },
    /// Nobody counts what is done to shared memory.
    #[error(transparent)]
    Count(#[from] CountError),
    /// The process could not be made to work for this program.
    #[error(transparent)]
    Inject(#[from] InjectError),
    /// Something in `/proc` could not be read.
    #[error(transparent)]
    Proc(#[from] ProcError),
}

/// What keeps changes from being tracked, and what helps.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Hindrance {
    /// What is not tracked, and why not.
    pub what: String,
    /// What helps.
    pub help: String,
}

impl Hindrance {
    /// Says of something why it is not tracked.
    pub fn of(what: &str, error: &TrackError) -> Self {
        Self { what: format!("{what}: {}", with_sources(error)), help: error.help().to_owned() }
    }
}

impl TrackError {
    /// Says what helps.
    pub fn help(&self) -> &'static str {
        match self {
            Self::Keeper { .. } => {
                "end the rcriu-keep of this process; the next dump starts another one"
            }
            Self::Overtaken { .. } => "let one program at a time dump a process",
            Self::Missing { help, .. } => help,
            Self::Unseen { .. } => "nothing; such memory is always compared",
            Self::SharedMemory { .. } => "nothing; such memory is always compared",
            Self::Leaderless { .. } => "let main wait for its threads (pthread_join(3))",
            Self::Openings { .. } => {
                "run rcriu with CAP_SYS_ADMIN outside of user namespaces, on Linux 5.19 or newer"
            }
            Self::Count(error) => error.help(),
            Self::Kernel { .. } | Self::Inject(_) | Self::Proc(_) => {
                "nothing is known to; the log at -v4 tells more"
            }
        }
    }

    fn kernel(pid: HostPid, step: &'static str) -> impl Fn(Errno) -> Self {
        move |errno| Self::Kernel { pid, step, source: errno.into() }
    }
}

/// What is to be tracked.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// How; `None` chooses what works.
    pub tracker: Option<Tracker>,
    /// The snapshot that changes are asked since, by the id in its inventory.
    pub since: Option<&'a str>,
    /// Whether tracking is to begin anew.
    pub restart: bool,
}

/// Mappings that are smaller are protected in any case: that costs little.
const WORTH_LEAVING_BYTES: u64 = 4 << 20;

/// What is looked at first, to find out whether a mapping is written all over.
const SAMPLE_BYTES: u64 = 1 << 20;

/// Of so many dumps in a row, one protects what is written all over as well.
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

/// What is known of the pages of a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Told {
    /// Which of them were written.
    Writes,
    /// Nothing: all are looked at.
    Nothing,
}

/// Makes the userfaultfd of the process.
type Make<'a> = dyn FnMut() -> Result<WriteProtect, TrackError> + 'a;

/// The tracking of one process while it is dumped.
#[derive(Debug)]
pub struct Watch {
    pid: HostPid,
    tracker: Tracker,
    /// What holds the write protection; for soft-dirty bits, nothing does.
    protect: Option<WriteProtect>,
    keeper: Option<Keeper>,
    epoch: u64,
    /// Whether the bits tell of changes since the snapshot that was asked for.
    trusted: bool,
    restart: bool,
    /// Mappings that are tracked, by their beginnings: whether they have been since
    /// before.
    mappings: BTreeMap<RemoteAddr, bool>,
    /// When the process began, which no other process of its pid has.
    born: u64,
    /// Its threads; empty if they have not run yet.
    threads: Vec<HostPid>,
    /// What the keeper's counters have counted.
    count: Option<u64>,
    /// What the snapshot has left about shared memory.
    guard: Option<Guard>,
}

impl Watch {
    /// Looks for the tracking of a stopped process, and starts it if it is to be.
    /// `None` if there is nothing that helps this dump or the next.
    ///
    /// # Errors
    /// [`TrackError`]; there is no tracking to be believed then.
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

    /// Starts the tracking of a process that was just restored and has not run yet; a
    /// thread of it works in scratch memory.
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
        let run: &mut wp::Run = &mut |script, act| scratch.run_paused(thread, script, act);
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
                // Nobody is to believe what is there.
                forget(pid)?;
            }
            return Ok(None);
        }
        let unseen = if request.restart { unseen_writers(pid, mappings)? } else { None };
        let restart = request.restart && unseen.is_none();
        if let Some(what) = unseen {
            log::warn!("{}; it is compared in full next time", TrackError::Unseen { pid, what });
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
            // From here on a failure must not leave what others would believe.
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
            let help = "it takes a kernel with CONFIG_MEM_SOFT_DIRTY";
            return Err(TrackError::Missing { what: "soft-dirty bits", help });
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
                // The memory that it was made for is gone: another program runs.
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

    /// Registers mappings. What was registered before by this descriptor has been
    /// tracked since before; that somebody else's is not among it, registering
    /// shows.
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

    /// Returns what tracks.
    pub fn tracker(&self) -> Tracker {
        self.tracker
    }

    /// Appends the regions of a mapping that `query` asks for, and with each whether
    /// it is known to be unwritten; returns what was told of them. If tracking begins
    /// anew, it does so for each page as it is looked at.
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
            log::debug!("{}: {start} is written all over, and stays unprotected", self.pid);
        } else if self.tracker == Tracker::Wp && self.restart && before.is_some() {
            regions.clear();
            if let Err(error) = pagemap.scan_and_protect(start, end, query, &mut regions) {
                log::debug!("{}: cannot protect {start}: {error}", self.pid);
                // What was protected was not told in full: all of it is looked at.
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

    /// Whether a mapping is left as it is although tracking begins anew, since its process
    /// writes all of it in any case: to protect it would cost a fault for each page and
    /// spare nothing. If so, its regions are appended.
    ///
    /// Pages that have lost their protection count as written in the next dump, and those
    /// that still have it were not written since an older one, so what is told stays true.
    /// Once in a while all is protected, to find out whether it is still written.
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
        // The first pages tell already of most that it is not so.
        for end in [mapping.start.plus(SAMPLE_BYTES), mapping.end] {
            regions.clear();
            let told = pagemap.scan(mapping.start, end, query, regions);
            if !told.unwrap_or(false) || !is_written_all_over(regions) {
                return false;
            }
        }
        true
    }

    /// Notes that all mappings were looked at; the process is still stopped.
    ///
    /// # Errors
    /// [`TrackError::Kernel`].
    pub fn scanned(&self) -> Result<(), TrackError> {
        if self.tracker == Tracker::SoftDirty && self.restart {
            soft_dirty::clear(self.pid)?;
        }
        Ok(())
    }

    /// Makes changes count from the snapshot `id`, which is complete; for shared memory
    /// `shared` says what is to be kept.
    ///
    /// # Errors
    /// [`TrackError::Keeper`]; [`TrackError::Overtaken`]. The next dump compares all.
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

/// Says why the memory of a process is not tracked that another one has, too. Its keeper, if
/// there is one, forgets the snapshot.
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
        let what = "tracking of changes, neither by write protection nor by soft-dirty bits";
        let help = "it takes Linux 6.7, or a kernel with CONFIG_MEM_SOFT_DIRTY";
        Err(TrackError::Missing { what, help })
    }
}

/// Whether a mapping is private memory without a file, which can be tracked. Pages of
/// private mappings of files are few, and a page of the file may come in their place
/// unseen.
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

/// Returns what the process has that writes to memory by its physical address, at
/// any time after it has looked it up.
fn unseen_writers(pid: HostPid, mappings: &[Mapping]) -> Result<Option<&'static str>, TrackError> {
    if mappings.iter().any(|mapping| mapping.name.starts_with(b"/[aio]")) {
        return Ok(Some("has a ring of asynchronous I/O"));
    }
    if proc::status(pid)?.vm_pin_kib.unwrap_or(0) > 0 {
        return Ok(Some("has memory that a device or io_uring has pinned"));
    }
    for number in proc::fds(pid)? {
        if proc::fd_link(pid, number).is_ok_and(|link| link == b"anon_inode:[io_uring]") {
            return Ok(Some("has an io_uring"));
        }
    }
    Ok(None)
}
