//! Tracking of shared memory: which pages no process has written since a snapshot.
//!
//! The bits of a mapping report writes through that mapping, but not writes through
//! mappings that have come and gone. So a dump trusts them for an object only if there can
//! have been no other writers. At the snapshot, the tree was stopped and
//!
//! - no process outside of the tree mapped the object or had a descriptor of it
//!   (`outside`), and all mappings through which the tree could write to it were protected;
//!
//! and since then
//!
//! - each of these mappings has stayed in place, in the same process;
//! - there is no new one: every mapping now was protected then, the tree has not forked a
//!   process with a copy of the memory, and no mapping was duplicated;
//! - no pages were removed through a mapping (`MADV_REMOVE`): they would come back as zeros
//!   without a write. An io_uring could do that, so none was made;
//! - no process has opened the object through `/proc/PID/map_files` ([`Openings`]), and its
//!   length is the same.
//!
//! The kernel counts these operations ([`tracepoint`]): the frequent ones in each thread
//! that matters, the rare ones on the whole machine.
//!
//! Otherwise the dump compares the whole object, and tracking restarts. A memfd is tracked
//! once all of its descriptors are closed. Soft-dirty bits are never trusted here: a shared
//! page that was written and then dropped from the page table comes back clean.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io,
    ops::Range,
    os::fd::{AsFd, OwnedFd},
    path::Path,
    rc::Rc,
};

use super::{
    Hindrance, TrackError, Tracker, Watch,
    keeper::{Guard, Keeper},
    outside::{self, Outside},
    ranges::{covers, stretches, without},
    record::{Place, Record, Tracked, Writer},
};
use crate::{
    causes::with_sources,
    proc::{Mapping, VmFlags},
    sys::{
        fanotify::Openings,
        pagemap::{PagemapFile, Query, category},
        tracepoint::{self, Event, Scope},
    },
    units::{HostPid, PageIndex, RemoteAddr, page_bytes},
};

pub use super::record::Key;

/// Smaller objects are always compared: tracking would cost the tree more than it saves the
/// dump.
const WORTH_TRACKING_PAGES: u64 = 64;

/// An object with more mappings is not tracked. To protect a page that a process has not
/// touched takes an entry in its page tables: 8 bytes for each page of 4096.
const MAPPINGS: usize = 8;

/// A process with more threads is not tracked: its threads are counted one by one.
const THREADS: usize = 512;

/// Addresses that 32-bit system calls can name. Those calls are not counted.
const NARROW_ADDRESSES: u64 = 1 << 32;

/// A shared object.
#[derive(Debug)]
pub struct Object<'a> {
    /// The object.
    pub file: &'a File,
    /// Its shared mappings in the tree.
    pub mappings: &'a [(HostPid, Mapping)],
    /// Its pages that are not holes, ascending.
    pub data: Vec<Range<u64>>,
}

impl Object<'_> {
    /// Returns how many pages are not holes.
    fn data_pages(&self) -> u64 {
        self.data.iter().map(|data| data.end - data.start).sum()
    }

    /// Whether a process can have got a descriptor only from `/proc`: the object is not a
    /// memfd.
    fn is_nameless(&self) -> bool {
        self.mappings.iter().all(|(_, mapping)| !mapping.name.starts_with(b"/memfd:"))
    }
}

/// The result of a survey of the tree's shared memory.
#[derive(Debug)]
pub struct Survey {
    /// The pages of each object that are known to be clean, ascending; `None` if nothing is
    /// known about the object.
    pub unwritten: Vec<Option<Vec<Range<u64>>>>,
    /// What the keepers will hold until the next dump.
    pub next: Option<Next>,
    /// Reasons why some memory is not tracked from now on, although it would benefit.
    pub hindrances: Vec<Hindrance>,
}

/// The reason why an object is not tracked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Unfit {
    /// Tracking would gain little; or its processes are not tracked, which was reported.
    Silent,
    Unmapped,
    ManyMappings,
    LowAddress,
    HugePages,
    ManyThreads,
    OtherWriters,
}

impl Unfit {
    /// Returns the reason and the remedy.
    const fn words(self) -> Option<(&'static str, &'static str)> {
        Some(match self {
            Self::Silent => return None,
            Self::Unmapped => (
                "the tree has a descriptor of it, but no writable mapping",
                "map the memory, and close its descriptors",
            ),
            Self::ManyMappings => ("it has more than 8 mappings", "map it less often"),
            Self::LowAddress => ("it is mapped below 4 GiB", "map it elsewhere"),
            Self::HugePages => ("it consists of huge pages", "use other pages"),
            Self::ManyThreads => (
                "a process that maps it has more than 512 threads",
                "map it in a process with fewer threads",
            ),
            Self::OtherWriters => (
                "a process outside of the tree maps it, has a descriptor of it, or may not be \
                 inspected",
                "dump a tree with all processes that have this memory, and close its descriptors",
            ),
        })
    }
}

/// What the keepers will hold until the next dump.
#[derive(Debug)]
pub struct Next {
    record: Record,
    openings: Openings,
    /// Counters that the keepers do not have yet.
    counters: BTreeMap<HostPid, Vec<OwnedFd>>,
}

/// Surveys the shared memory of a stopped `tree`, whose root comes first. This process has
/// opened each object before, and will not open it again. If tracking restarts, it does so
/// for all scanned pages. Memory about which nothing can be known is compared, so this
/// cannot fail.
pub fn survey(
    watches: &[Rc<Watch>],
    tree: &[HostPid],
    objects: &[Object],
    restart: bool,
) -> Survey {
    let mut surveyor = Surveyor::new(watches, restart);
    let known: Vec<_> = objects.iter().map(|object| surveyor.is_watched(object)).collect();
    if restart && let Err(error) = surveyor.begin(tree, objects, &known) {
        surveyor.hindrances.push(Hindrance::of("shared memory is not tracked", &error));
    }
    let looked = objects.iter().zip(known);
    let unwritten = looked.map(|(object, known)| surveyor.look_at(object, known)).collect();
    Survey {
        unwritten,
        next: surveyor.next.filter(|next| !next.record.objects.is_empty()),
        hindrances: surveyor.hindrances,
    }
}

/// Keeps the tracking of shared memory valid while processes are dumped without it: the
/// process that opened the memory was this one.
///
/// # Errors
/// [`TrackError`]; then the tracking is lost.
pub fn excuse(pids: impl IntoIterator<Item = HostPid>) -> Result<(), TrackError> {
    let (mut keepers, mut guard) = (Vec::new(), None);
    for pid in pids {
        if let Some(keeper) = Keeper::find(pid)?
            && let Some(kept) = keeper.kept()?.guard
        {
            keepers.push(keeper);
            guard = Some(kept);
        }
    }
    let keepers: Vec<_> = keepers.iter().collect();
    guard.map_or(Ok(()), |guard| is_quiet(&guard, &keepers).map(drop))
}

/// Whether only this process has opened tracked memory. Asking consumes the answer; so if
/// the answer is yes, the keepers get the guard back.
fn is_quiet(guard: &Guard, keepers: &[&Keeper]) -> Result<bool, TrackError> {
    for keeper in keepers {
        keeper.unguard()?;
    }
    let failed = unwatched("ask which processes have opened shared memory");
    let openings = Openings::from(guard.openings.try_clone().map_err(&failed)?);
    let quiet = openings.only_by(HostPid::own()).map_err(&failed)?;
    if quiet {
        for keeper in keepers {
            keeper.guard(guard)?;
        }
    } else {
        log::debug!("another process has opened shared memory that was tracked");
    }
    Ok(quiet)
}

struct Surveyor<'a> {
    watches: BTreeMap<HostPid, &'a Watch>,
    /// The record of the previous dump, if it can be trusted.
    past: Option<Record>,
    next: Option<Next>,
    openings: Option<Openings>,
    hindrances: Vec<Hindrance>,
}

impl<'a> Surveyor<'a> {
    fn new(watches: &'a [Rc<Watch>], restart: bool) -> Self {
        let wp = watches.iter().filter(|watch| watch.tracker == Tracker::Wp);
        let watches: BTreeMap<_, _> = wp.map(|watch| (watch.pid, &**watch)).collect();
        let hindrances = Vec::new();
        let mut surveyor = Self { watches, past: None, next: None, openings: None, hindrances };
        let guards = surveyor.watches.values().filter(|watch| watch.trusted);
        if let Some(guard) = guards.filter_map(|watch| watch.guard.as_ref()).next()
            && let Err(error) = surveyor.believe(guard, restart)
        {
            log::debug!(
                "nothing is known about shared memory since the parent: {}",
                with_sources(&error)
            );
        }
        surveyor
    }

    fn believe(&mut self, guard: &Guard, restart: bool) -> Result<(), TrackError> {
        // If tracking restarts, the keepers have forgotten it already.
        let keepers = self.watches.values().filter_map(|watch| watch.keeper.as_ref());
        let keepers: Vec<_> = if restart { Vec::new() } else { keepers.collect() };
        let quiet = is_quiet(guard, &keepers)?;
        let failed = unwatched("read what is known of shared memory");
        let copy = |fd: &OwnedFd| fd.try_clone().map_err(&failed);
        if quiet {
            self.past = Some(Record::read(copy(&guard.record)?).map_err(&failed)?);
        }
        self.openings = Some(Openings::from(copy(&guard.openings)?));
        Ok(())
    }

    /// Whether all writes to an object since the snapshot were made through its current
    /// mappings, which were protected then.
    fn is_watched(&self, object: &Object) -> bool {
        let Some(past) = &self.past else { return false };
        let Ok(metadata) = object.file.metadata() else { return false };
        let tracked = past.objects.get(&Key::of_file(&metadata));
        let Some(tracked) = tracked.filter(|tracked| tracked.bytes == metadata.len()) else {
            return false;
        };
        let writers: BTreeSet<_> = tracked.places.iter().map(|place| place.pid).collect();
        writers.iter().all(|pid| self.is_writer_known(past, *pid))
            && object.mappings.iter().all(|(pid, mapping)| {
                writers.contains(pid)
                    && mapping.flags.contains(VmFlags::UFFD_WP)
                    && self.register(*pid, mapping)
            })
            && tracked.places.iter().all(|place| covers(object.mappings, *place))
    }

    /// Whether a process has been tracked since the snapshot and has done nothing that
    /// creates other writers.
    fn is_writer_known(&self, past: &Record, pid: HostPid) -> bool {
        self.watches.get(&pid).zip(past.writers.get(&pid)).is_some_and(|(watch, writer)| {
            watch.trusted && watch.born == writer.born && watch.count == Some(writer.count)
        })
    }

    /// Registers a mapping with the userfaultfd of its process, unless it is registered
    /// already; false if it is registered with another one.
    fn register(&self, pid: HostPid, mapping: &Mapping) -> bool {
        let protect = self.watches.get(&pid).and_then(|watch| watch.protect.as_ref());
        protect.is_some_and(|protect| protect.register(mapping.start, mapping.end).is_ok())
    }

    /// Chooses what to track from now on, and starts to watch it and its writers.
    fn begin(
        &mut self,
        tree: &[HostPid],
        objects: &[Object],
        known: &[bool],
    ) -> Result<(), TrackError> {
        let (mut chosen, mut new) = (BTreeMap::new(), BTreeSet::new());
        let mut unfit = BTreeMap::<_, Vec<_>>::new();
        for (object, known) in objects.iter().zip(known) {
            let Ok(metadata) = object.file.metadata() else { continue };
            if let Some(why) = self.unfit(object) {
                unfit.entry(why).or_default().push(object.data_pages());
                continue;
            }
            let key = Key::of_file(&metadata);
            chosen.insert(key, (object, metadata.len()));
            if !known {
                new.insert(key);
            }
        }
        if chosen.is_empty() {
            self.tell(&unfit);
            return Ok(());
        }
        let openings = self.openings.take().map_or_else(Openings::new, Ok);
        let openings = openings.map_err(|errno| unwatched("make an fanotify")(errno.into()))?;
        for (object, _) in chosen.values() {
            openings.watch(object.file.as_fd()).map_err(|errno| {
                unwatched("watch which processes open shared memory")(errno.into())
            })?;
        }
        // From here on, every opening is reported.
        if !new.is_empty() {
            let mut all_hidden = false;
            let found = outside::look(&new, tree).unwrap_or_else(|error| {
                let what = "shared memory is not tracked, since its writers cannot be known";
                self.hindrances.push(Hindrance::of(what, &error));
                all_hidden = true;
                Outside { written: new.clone(), hidden: true }
            });
            chosen.retain(|key, (object, _)| {
                let hidden = found.hidden && new.contains(key) && !object.is_nameless();
                let others = hidden || found.written.contains(key);
                if others && !all_hidden {
                    log::debug!("{key} can have other writers than the mappings of the tree");
                    unfit.entry(Unfit::OtherWriters).or_default().push(object.data_pages());
                }
                !others
            });
        }
        self.tell(&unfit);
        let (mut record, mut counters) = (Record::default(), BTreeMap::new());
        for (key, (object, bytes)) in chosen {
            let places = object.mappings.iter().map(|(pid, mapping)| Place::of(*pid, mapping));
            record.objects.insert(key, Tracked { bytes, places: places.collect() });
        }
        self.count(&mut record, &mut counters)?;
        self.next = Some(Next { record, openings, counters });
        Ok(())
    }

    /// Starts to count the operations of the processes that can write to the objects in
    /// `record`, unless their keepers count already.
    fn count(
        &self,
        record: &mut Record,
        counters: &mut BTreeMap<HostPid, Vec<OwnedFd>>,
    ) -> Result<(), TrackError> {
        let places = record.objects.values().flat_map(|tracked| &tracked.places);
        let writers: BTreeSet<_> = places.map(|place| place.pid).collect();
        let is_new = |pid: &&HostPid| self.watches[*pid].count.is_none();
        let seldom = if writers.iter().any(|pid| is_new(&pid)) { count_seldom()? } else { vec![] };
        for pid in writers.iter().filter(is_new) {
            let mut all = count_common(&self.watches[pid].threads)?;
            for counter in &seldom {
                all.push(counter.try_clone().map_err(unwatched("duplicate a counter"))?);
            }
            counters.insert(*pid, all);
        }
        for pid in writers {
            let Watch { born, count, .. } = *self.watches[&pid];
            record.writers.insert(pid, Writer { born, count: count.unwrap_or(0) });
        }
        Ok(())
    }

    /// Records which objects are not tracked, and their pages.
    fn tell(&mut self, unfit: &BTreeMap<Unfit, Vec<u64>>) {
        for (why, pages) in unfit {
            let Some((words, help)) = why.words() else { continue };
            let (count, kib) = (pages.len(), page_bytes(pages.iter().sum()) >> 10);
            let what = match count {
                1 => format!("{kib} KiB of shared memory are not tracked: {words}"),
                _ => format!(
                    "{kib} KiB of shared memory in {count} objects are not tracked: {words}"
                ),
            };
            self.hindrances.push(Hindrance { what, help: help.to_owned() });
        }
    }

    /// Returns why an object cannot be tracked; `None` if all of its mappings can be.
    fn unfit(&self, object: &Object) -> Option<Unfit> {
        if object.data_pages() < WORTH_TRACKING_PAGES {
            return Some(Unfit::Silent);
        }
        if object.mappings.is_empty() {
            return Some(Unfit::Unmapped);
        }
        if object.mappings.len() > MAPPINGS {
            return Some(Unfit::ManyMappings);
        }
        object.mappings.iter().find_map(|(pid, mapping)| {
            if mapping.start.0 < NARROW_ADDRESSES {
                return Some(Unfit::LowAddress);
            }
            if mapping.flags.contains(VmFlags::HUGE_TLB) {
                return Some(Unfit::HugePages);
            }
            match self.watches.get(pid) {
                Some(watch) if watch.threads.len() > THREADS => Some(Unfit::ManyThreads),
                Some(watch) if watch.restart && watch.protect.is_some() => None,
                _ => Some(Unfit::Silent),
            }
        })
    }

    /// Returns which pages of an object are clean. If the object is to be tracked, protects
    /// all scanned pages.
    fn look_at(&mut self, object: &Object, known: bool) -> Option<Vec<Range<u64>>> {
        let key = object.file.metadata().ok().map(|metadata| Key::of_file(&metadata));
        let objects = self.next.as_mut().map(|next| &mut next.record.objects);
        let tracked = objects.zip(key).and_then(|(objects, key)| objects.remove_entry(&key));
        if !known && tracked.is_none() {
            return None;
        }
        match self.scan(object, known, tracked.is_some()) {
            Ok(unwritten) => {
                if let (Some(next), Some((key, tracked))) = (&mut self.next, tracked) {
                    next.record.objects.insert(key, tracked);
                }
                known.then_some(unwritten)
            }
            Err(error) => {
                self.hindrances.push(Hindrance {
                    what: format!("shared memory is compared in full: scan its pages: {error}"),
                    help: "see the log at -v4".to_owned(),
                });
                None
            }
        }
    }

    fn scan(&self, object: &Object, known: bool, protect: bool) -> io::Result<Vec<Range<u64>>> {
        let (mut unwritten, mut written) = (Vec::new(), Vec::new());
        let told = category::WRITTEN | category::PRESENT | category::SWAPPED;
        let query = Query { tell: told, ..Query::default() };
        let mut regions = Vec::new();
        for (pid, mapping) in object.mappings {
            if protect && !self.register(*pid, mapping) {
                return Err(io::ErrorKind::ResourceBusy.into());
            }
            let pagemap = PagemapFile::open(Path::new(&format!("/proc/{pid}/pagemap")))?;
            for (start, end) in stretches(&object.data, mapping) {
                regions.clear();
                if protect {
                    pagemap.scan_and_protect(start, end, query, &mut regions)?;
                } else if !pagemap.scan(start, end, query, &mut regions)? {
                    return Err(io::ErrorKind::Unsupported.into());
                }
                let offset = |address: RemoteAddr| {
                    PageIndex::holding(address.0 - mapping.start.0 + mapping.offset).0
                };
                for region in &regions {
                    // An empty entry may have been dropped from the page table after a
                    // write.
                    let is_protected = region.categories & category::WRITTEN == 0
                        && region.categories & (category::PRESENT | category::SWAPPED) != 0;
                    let pages = offset(region.start())..offset(region.end());
                    if is_protected { &mut unwritten } else { &mut written }.push(pages);
                }
            }
        }
        Ok(if known { without(unwritten, written) } else { Vec::new() })
    }
}

impl Next {
    /// Prepares it for the keepers, after this process has opened the objects for the last
    /// time; `None` if another process has opened one since.
    pub fn seal(self) -> Option<Sealed> {
        let guard = || {
            let openings = self.openings.as_fd().try_clone_to_owned()?;
            let record = self.record.seal()?;
            Ok::<_, io::Error>(
                self.openings.only_by(HostPid::own())?.then_some(Guard { record, openings }),
            )
        };
        let guard = guard().unwrap_or_else(|error| {
            log::warn!("shared memory is not tracked: {error}");
            None
        });
        let writers = self.record.writers.into_keys().collect();
        Some(Sealed { writers, counters: self.counters, guard: guard? })
    }
}

/// What keepers get for the next dump.
#[derive(Debug)]
pub struct Sealed {
    writers: BTreeSet<HostPid>,
    counters: BTreeMap<HostPid, Vec<OwnedFd>>,
    guard: Guard,
}

impl Sealed {
    /// Gives the keeper of a process its counters. Returns the guard for it, if the process
    /// can write to tracked memory.
    pub(super) fn give(&self, pid: HostPid, keeper: &Keeper) -> Option<&Guard> {
        if !self.writers.contains(&pid) {
            return None;
        }
        let counters = self.counters.get(&pid).map_or(&[][..], Vec::as_slice);
        match keeper.count(counters) {
            Ok(()) => Some(&self.guard),
            Err(error) => {
                log::warn!("shared memory is not tracked: {error}");
                None
            }
        }
    }
}

/// Returns the error that it is unknown which processes open shared memory.
fn unwatched(step: &'static str) -> impl Fn(io::Error) -> TrackError {
    move |source| TrackError::Openings { step, source }
}

/// Starts to count the operations of a process's threads that create other writers.
fn count_common(threads: &[HostPid]) -> Result<Vec<OwnedFd>, TrackError> {
    let scopes: Vec<_> = threads.iter().map(|thread| Scope::Thread(*thread)).collect();
    Ok(tracepoint::count(&Event::COMMON, &scopes)?)
}

/// Starts to count, on the whole machine, the rare operations that change shared memory
/// unseen.
fn count_seldom() -> Result<Vec<OwnedFd>, TrackError> {
    if tracepoint::has_unseen_calls() {
        return Err(TrackError::Missing {
            what: "the kernel does not count calls of the x32 interface",
            help: "boot the kernel without it (syscall.x32=n)",
        });
    }
    let now = tracepoint::processors()?;
    let scopes: Vec<_> = now.iter().map(|number| Scope::Processor(*number)).collect();
    let counters = tracepoint::count(&Event::SELDOM, &scopes)?;
    // A processor that comes online later is counted.
    if tracepoint::processors()? == now {
        Ok(counters)
    } else {
        Err(TrackError::Missing {
            what: "processors came online meanwhile",
            help: "dump when no processors come and go",
        })
    }
}
