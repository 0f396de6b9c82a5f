//! The pager: a process that supplies the pages of a tree until all are there.
//!
//! It consists of a watcher, which only waits, and its child, which works.

use std::{
    ffi::OsString,
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixListener,
    },
    process::ExitCode,
    sync::{
        Arc, Mutex, PoisonError, RwLock,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use nix::{
    errno::Errno,
    fcntl::OFlag,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        prctl,
        wait::{WaitStatus, waitpid},
    },
    unistd::{ForkResult, Pid, chdir, pipe2, setsid, write},
};

use super::{
    Handed, LazyError, Log, Result,
    client::Arguments,
    record::Touched,
    recorder::Recorder,
    rendezvous,
    space::{Heard, Space, Supplied},
    wire::{self, Order},
};
use crate::{
    causes::with_sources,
    chain::{Chain, ChainError, MemoryBytes, SnapshotId},
    fault::{self, Point},
    image::MemoryId,
    parallel, proc,
    sys::{
        daemon,
        dead_man::DeadMan,
        lock::{Access, DirectoryLocks},
        missing::MissingPages,
        process,
    },
    units::{HostPid, PageIndex},
};

/// The pause before pages are offered again that the kernel has refused.
const NAP: Duration = Duration::from_micros(200);

/// How long the parent of a forked child may take until the child can be found.
const BIRTH_TRIES: u32 = 200;

/// Runs the pager. The program calls this when its name is [`super::NAME`], with its other arguments.
/// `start_log` is called before anything is logged.
pub fn main(arguments: &[OsString], start_log: impl FnOnce(&Log)) -> ExitCode {
    let Some(arguments) = Arguments::of(arguments) else { return ExitCode::FAILURE };
    // Before the log opens a file.
    if daemon::close_inherited().is_err() {
        return ExitCode::FAILURE;
    }
    start_log(&arguments.log);
    match run(&arguments) {
        Ok(code) => code,
        Err(error) => {
            log::error!("{}", with_sources(&error));
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<ExitCode> {
    let failed = LazyError::pager::<io::Error>;
    // Fails only for a leader of a process group, which is harmless.
    let _ = setsid();
    chdir("/").map_err(LazyError::pager("change the directory"))?;
    let name = prctl::set_name(c"rcriu-pager").and_then(|()| prctl::set_dumpable(false));
    name.map_err(LazyError::pager("hide its memory"))?;
    let socket = io::stdin().as_fd().try_clone_to_owned().map_err(failed("take the socket"))?;
    daemon::forget_stdin().map_err(failed("take the socket"))?;
    let Some(processes) = receive(&socket)? else { return Ok(ExitCode::SUCCESS) };
    let mut names = Vec::new();
    for process in &processes {
        names.extend(rendezvous::offer(process.pid).map_err(failed("tell dumps of it"))?);
    }
    let pidfds: Vec<OwnedFd> =
        processes.iter().filter_map(|process| process::pidfd_open(process.pid).ok()).collect();
    match process::fork_alone().map_err(failed("start the process that works"))? {
        ForkResult::Parent { child } => {
            drop(socket);
            Ok(watch(child, &pidfds))
        }
        ForkResult::Child => {
            drop(pidfds);
            Ok(work(arguments, socket, processes, names))
        }
    }
}

/// Receives the processes; `None` if the restore has failed.
fn receive(socket: &OwnedFd) -> Result<Option<Vec<Handed>>> {
    let mut processes: Vec<Handed> = Vec::new();
    loop {
        match wire::receive(socket).map_err(LazyError::pager("receive the processes"))? {
            None => return Ok(None),
            Some(Order::Process(id, pid, fd)) => {
                let fd = MissingPages::resume(fd);
                processes.push(Handed { id, pid, fd, ranges: Vec::new() });
            }
            Some(Order::Ranges(ranges)) => {
                let Some(last) = processes.last_mut() else { continue };
                last.ranges.extend(ranges);
            }
            Some(Order::Begin) => return Ok(Some(processes)),
            Some(Order::Released) => {}
        }
    }
}

/// Waits for the process that works. If it fails, ends the tree.
fn watch(child: Pid, pidfds: &[OwnedFd]) -> ExitCode {
    let ended = loop {
        match waitpid(child, None) {
            Err(Errno::EINTR) => {}
            ended => break ended,
        }
    };
    if matches!(ended, Ok(WaitStatus::Exited(_, 0))) {
        return ExitCode::SUCCESS;
    }
    for pidfd in pidfds {
        // It may have ended.
        let _ = process::kill_pidfd(pidfd);
    }
    if let Ok(WaitStatus::Signaled(_, signal, _)) = ended {
        log::error!(
            "the pager (process {child}) was killed by {signal}; the restored tree was ended, since \
             its memory was not all there\nhelp: restore it again"
        );
    }
    ExitCode::FAILURE
}

/// Supplies all pages, and returns the exit code of the process.
fn work(
    arguments: &Arguments,
    socket: OwnedFd,
    processes: Vec<Handed>,
    names: Vec<UnixListener>,
) -> ExitCode {
    let begun = Worker::begin(arguments, processes, names);
    let answer = begun.as_ref().map_or_else(|error| with_sources(error), |_| wire::READY.into());
    if let Err(error) = wire::send_answer(socket.as_fd(), &answer) {
        log::error!("answer the restore: {error}");
        return ExitCode::FAILURE;
    }
    let Ok((worker, handle)) = begun else { return ExitCode::FAILURE };
    let handle = Mutex::new(handle);
    match worker.serve(socket, &handle) {
        Ok(()) => {
            let handle = handle.into_inner().unwrap_or_else(PoisonError::into_inner);
            handle.disarm();
            ExitCode::SUCCESS
        }
        Err(error) => {
            parallel::lock(&handle).kill();
            log::error!(
                "{}; the restored tree was ended, since its memory was not all there",
                with_sources(&error)
            );
            ExitCode::FAILURE
        }
    }
}

/// The process that works.
#[derive(Debug)]
struct Worker {
    spaces: RwLock<Vec<Arc<Space>>>,
    /// What made a thread give up.
    failure: Mutex<Option<LazyError>>,
    /// The threads that read ahead have ended, or one has failed.
    is_done: AtomicBool,
    /// Tells the thread that serves of that.
    done: (OwnedFd, OwnedFd),
    /// What is recorded, if it is.
    recorder: Option<Recorder>,
    _locks: DirectoryLocks,
    names: Mutex<Vec<UnixListener>>,
}

/// A page that a thread waits for.
#[derive(Clone, Debug)]
struct Fault {
    space: Arc<Space>,
    address: u64,
}

impl Worker {
    fn begin(
        arguments: &Arguments,
        processes: Vec<Handed>,
        names: Vec<UnixListener>,
    ) -> Result<(Self, DeadMan)> {
        let dir = &arguments.dir;
        let failed = |source| LazyError::Images { path: dir.clone(), source };
        let mut locks = DirectoryLocks::default();
        if arguments.lock {
            locks.take(dir, Access::Shared)?;
        }
        let chain = Arc::new(Chain::open(dir).map_err(failed)?);
        let none = || LazyError::Pager {
            step: "find the images that it is told of",
            source: io::ErrorKind::NotFound.into(),
        };
        let snapshot = chain.at(dir).ok_or_else(none)?;
        if let Some(base) = chain.snapshot(chain.base(snapshot)).directory()
            && arguments.lock
        {
            locks.take(base, Access::Shared)?;
        }
        let mut handle = DeadMan::new().map_err(LazyError::pager("make a pipe"))?;
        let mut spaces = Vec::new();
        for Handed { id, pid, fd, ranges } in processes {
            handle.arm(pid).map_err(|source| LazyError::Arm { pid, source })?;
            let memory = memory_of(&chain, snapshot, id).map_err(failed)?;
            let memory = memory.ok_or_else(|| LazyError::NoMemory { path: dir.clone(), id })?;
            spaces.push(Arc::new(Space::new((pid, id), fd, memory, &ranges)));
        }
        let flags = OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
        let done = pipe2(flags).map_err(LazyError::pager("make a pipe"))?;
        let worker = Self {
            spaces: RwLock::new(spaces),
            failure: Mutex::new(None),
            is_done: AtomicBool::new(false),
            done,
            recorder: arguments.record.as_deref().map(Recorder::open),
            _locks: locks,
            names: Mutex::new(names),
        };
        Ok((worker, handle))
    }

    /// Serves until all pages are there.
    fn serve(&self, socket: OwnedFd, handle: &Mutex<DeadMan>) -> Result<()> {
        let bytes: u64 = self.spaces().iter().map(|space| space.bytes()).sum();
        log::info!("{} KiB of memory wait in the images", bytes >> 10);
        let mut socket = Some(socket);
        let mut late: Vec<Fault> = Vec::new();
        let mut births = 0_u32;
        let mut buffer = Vec::new();
        let is_complete = thread::scope(|scope| {
            let outcome = loop {
                let pause = if late.is_empty() && births == 0 { None } else { Some(NAP) };
                let spaces = self.spaces();
                let ready = match self.poll(&spaces, socket.as_ref(), pause) {
                    Ok(ready) => ready,
                    Err(error) => break Err(error),
                };
                if self.is_done.load(Ordering::Acquire) {
                    break Ok(true);
                }
                if ready.socket {
                    let message = socket.as_ref().map(wire::receive).transpose();
                    socket = None;
                    match message.ok().flatten().flatten() {
                        Some(Order::Released) => {
                            for _ in 0..parallel::processors_for(usize::MAX) {
                                if parallel::spawn(scope, || self.read_ahead()).is_none() {
                                    break;
                                }
                            }
                            log::debug!("the tree runs");
                        }
                        // The restore has failed, and the kernel kills what is left of it.
                        _ => break Ok(false),
                    }
                }
                let mut faults = std::mem::take(&mut late);
                let listened = ready.spaces.iter().try_for_each(|space| {
                    let Heard { faults: heard, children } = space.listen()?;
                    let fault = |address| Fault { space: Arc::clone(space), address };
                    faults.extend(heard.into_iter().map(fault));
                    if !children.is_empty() {
                        births = BIRTH_TRIES;
                        let mut all = self.spaces.write().unwrap_or_else(PoisonError::into_inner);
                        all.extend(children.into_iter().map(Arc::new));
                    }
                    Ok(())
                });
                if let Err(error) = listened {
                    break Err(error);
                }
                if births > 0 {
                    births = if self.arm_children(handle) { 0 } else { births - 1 };
                }
                match self.serve_all(faults, &mut buffer) {
                    Ok(again) => late = again,
                    Err(error) => break Err(error),
                }
            };
            self.is_done.store(true, Ordering::Release);
            outcome
        })?;
        if let Some(error) = parallel::lock(&self.failure).take() {
            return Err(error);
        }
        if is_complete && let Some(recorder) = &self.recorder {
            recorder.save();
        }
        log::info!(
            "{}",
            if is_complete { "all memory is there" } else { "the restore has failed" }
        );
        Ok(())
    }

    fn spaces(&self) -> Vec<Arc<Space>> {
        self.spaces.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits until there is something to do, or for `pause`.
    fn poll(
        &self,
        spaces: &[Arc<Space>],
        socket: Option<&OwnedFd>,
        pause: Option<Duration>,
    ) -> Result<Ready> {
        let spaces: Vec<_> = spaces.iter().filter(|space| !space.is_gone()).collect();
        let mut fds = vec![PollFd::new(self.done.0.as_fd(), PollFlags::POLLIN)];
        fds.extend(spaces.iter().map(|space| PollFd::new(space.fd(), PollFlags::POLLIN)));
        fds.extend(socket.map(|socket| PollFd::new(socket.as_fd(), PollFlags::POLLIN)));
        let timeout = match pause {
            None => PollTimeout::NONE,
            Some(pause) => {
                thread::sleep(pause);
                PollTimeout::ZERO
            }
        };
        match poll(&mut fds, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(LazyError::pager("wait for faults")(errno)),
        }
        let is_ready = |fd: &PollFd| fd.any().unwrap_or(true);
        let of_spaces = &fds[1..=spaces.len()];
        let pairs = spaces.iter().zip(of_spaces).filter(|(_, fd)| is_ready(fd));
        let ready = pairs.map(|(space, _)| Arc::clone(space)).collect();
        Ok(Ready { spaces: ready, socket: fds.get(1 + spaces.len()).is_some_and(is_ready) })
    }

    /// Supplies pages that threads wait for, and returns those that are to be tried again.
    fn serve_all(&self, mut faults: Vec<Fault>, buffer: &mut Vec<u8>) -> Result<Vec<Fault>> {
        let mut again = Vec::new();
        let key = |fault: &Fault| (Arc::as_ptr(&fault.space).addr(), fault.address);
        faults.sort_unstable_by_key(key);
        faults.dedup_by_key(|fault| key(fault));
        for fault in faults {
            if fault.space.is_gone() {
                continue;
            }
            log::trace!("{}: waits at {:#x}", fault.space.pid, fault.address);
            let (supplied, origin) = fault.space.serve(fault.address, buffer)?;
            if let (Some(recorder), Some(range)) = (&self.recorder, origin) {
                recorder.note(Touched { id: fault.space.id, range });
            }
            if supplied == Supplied::Later {
                again.push(fault);
            }
        }
        Ok(again)
    }

    /// Lets new descendants of the tree end with this process. Returns whether there were any.
    fn arm_children(&self, handle: &Mutex<DeadMan>) -> bool {
        let mut handle = parallel::lock(handle);
        let known: Vec<HostPid> = handle.pids().collect();
        let mut left: Vec<HostPid> =
            known.iter().flat_map(|pid| proc::children(*pid).unwrap_or_default()).collect();
        let mut any = false;
        while let Some(pid) = left.pop() {
            if handle.is_armed(pid) {
                continue;
            }
            match handle.arm(pid) {
                Ok(()) => any = true,
                Err(error) => log::debug!("{pid}: does not end with the pager: {error}"),
            }
            match rendezvous::offer(pid) {
                Ok(name) => parallel::lock(&self.names).extend(name),
                Err(error) => log::debug!("{pid}: dumps do not find the pager: {error}"),
            }
            left.extend(proc::children(pid).unwrap_or_default());
        }
        any
    }

    /// Supplies pages that no thread waits for, until all are there.
    fn read_ahead(&self) {
        if let Err(error) = self.try_read_ahead() {
            parallel::lock(&self.failure).get_or_insert(error);
        }
        self.is_done.store(true, Ordering::Release);
        if let Err(errno) = write(&self.done.1, &[0]) {
            log::debug!("end the wait for faults: {errno}");
        }
    }

    fn try_read_ahead(&self) -> Result<()> {
        let mut buffer = Vec::new();
        while let Some(Touched { id, range }) = self.recorder.as_ref().and_then(Recorder::next) {
            if let Some(space) = self.spaces().iter().find(|space| space.id == id) {
                space.supply_early(&range, &mut buffer)?;
            }
        }
        while !self.is_done.load(Ordering::Acquire) {
            let spaces = self.spaces();
            let mut is_complete = true;
            for space in &spaces {
                match space.advance(&mut buffer)? {
                    None | Some(Supplied::Gone) => {}
                    Some(Supplied::Yes) => is_complete = false,
                    Some(Supplied::Later) => {
                        is_complete = false;
                        thread::sleep(NAP);
                    }
                }
                fault::hit(Point::PagerAhead).map_err(|error| LazyError::Pager {
                    step: "read ahead",
                    source: io::Error::other(error),
                })?;
            }
            // New children of complete spaces are complete.
            if is_complete && self.spaces().iter().all(|space| space.is_complete()) {
                return Ok(());
            }
        }
        Ok(())
    }
}

/// What there is to do.
#[derive(Debug)]
struct Ready {
    spaces: Vec<Arc<Space>>,
    socket: bool,
}

fn memory_of(
    chain: &Arc<Chain>,
    snapshot: SnapshotId,
    id: u64,
) -> Result<Option<Arc<MemoryBytes>>, ChainError> {
    match chain.index(snapshot, MemoryId::Private(id)) {
        Ok(index) => {
            let end = PageIndex::END.address();
            Ok(Some(Arc::new(MemoryBytes::new(Arc::clone(chain), index, end))))
        }
        Err(ChainError::NoMemory { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}
