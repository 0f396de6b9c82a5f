//! Makes the processes of a tree, each by its maker ([`crate::image::tree::Births`]).

use std::{
    cell::RefCell,
    fs::File,
    os::fd::{AsFd, OwnedFd},
    path::PathBuf,
};

use nix::{errno::Errno, libc};

use super::{
    Relations, RestoreError, Result,
    free::Free,
    memory::{self, Layout, Sources},
    pids::Waiting,
    plan::{Body, Plan},
    tracees::make,
};
use crate::{
    causes::tell,
    fault::{self, Point},
    image::{
        proto::VmaEntry,
        tree::{Arena, Birth, Births, Maker},
    },
    inject::{First, Helpers, Lender, Scratch, Script, Tracee, adopt_sleeper},
    proc,
    res::{ResError, task},
    sys::{
        process::{self, CloneArguments},
        ptrace,
    },
    units::{NsId, NsPid},
};

/// `CLONE_CLEAR_SIGHAND` (`linux/sched.h`, since Linux 5.5): resets all handlers to the
/// defaults.
const CLONE_CLEAR_SIGHAND: u64 = 1 << 32;

/// The new process is a child of its maker's parent.
const CLONE_PARENT: u64 = libc::CLONE_PARENT.cast_unsigned() as u64;

/// The new process shares the descriptors of its maker.
const CLONE_FILES: u64 = libc::CLONE_FILES.cast_unsigned() as u64;

/// The new process is the first one of a new pid namespace.
const CLONE_NEWPID: u64 = libc::CLONE_NEWPID.cast_unsigned() as u64;

/// The exit signal of processes that are made for the restore.
const SIGCHLD: u32 = libc::SIGCHLD.cast_unsigned();

/// A process during the restore.
#[derive(Debug)]
pub(super) struct Puppet {
    /// The threads that exist, the leader first.
    pub(super) threads: Vec<Tracee>,
    /// Whether its threads have the registers to run with.
    pub(super) is_dressed: bool,
    /// What it keeps of the inherited address space.
    pub(super) layout: Layout,
    /// The task from which it inherited its memory.
    inherited: Option<usize>,
}

impl Puppet {
    fn new(leader: Tracee, inherited: Option<usize>) -> Self {
        Self { threads: vec![leader], is_dressed: false, layout: Layout::default(), inherited }
    }
}

/// A helper process that exists.
#[derive(Debug)]
pub(super) struct Helper {
    pub(super) pid: NsPid,
    pub(super) maker: Maker,
}

/// The processes of a tree during the restore. Dropping this kills them.
#[derive(Debug)]
pub(super) struct Puppets<'a> {
    pub(super) plan: &'a Plan,
    births: Births,
    /// Has the process that this program has made, until it is a task or a helper of the restore.
    pub(super) makers: Helpers,
    /// In the order of the plan's tasks; `None` until made.
    pub(super) tasks: Vec<Option<Puppet>>,
    pub(super) helpers: Vec<Helper>,
    pub(super) scratch: Scratch,
    /// Masters of pseudoterminals that are open already.
    pub(super) masters: Vec<OwnedFd>,
    shell_job: bool,
    pub(super) leave_stopped: bool,
    pub(super) released: bool,
    pub(super) filled: memory::Filled,
}

/// What making the first process needs besides the plan.
#[derive(Clone, Copy)]
pub(super) struct Ground {
    /// Where scratch memory is free in all processes.
    pub(super) place: u64,
    pub(super) table_bytes: usize,
    pub(super) relations: Relations,
    /// All processes stay stopped.
    pub(super) leave_stopped: bool,
}

/// What making the other processes needs besides the plan.
pub(super) struct Workshop<'a> {
    /// Returns the descriptor for a mapping of a file.
    pub(super) file: &'a dyn Fn(&VmaEntry) -> Result<i32>,
    /// Adds the calls of a process that has become the leader of a session.
    pub(super) begin_session: &'a dyn Fn(NsPid, &mut Script),
    /// Frees the restored pages in the images.
    pub(super) free: Option<&'a Free>,
}

impl<'a> Puppets<'a> {
    /// Makes the first process of a plan, a copy of this program, in the new namespaces of the tree,
    /// and restores these. It shares the descriptors of this program.
    ///
    /// # Errors
    /// The first failure; then no process is left.
    pub(super) fn begin(plan: &'a Plan, ground: Ground) -> Result<Self> {
        let births = plan.births.clone();
        for helper in &births.helpers {
            Waiting::begin().until_free(plan.host(helper.pid))?;
        }
        let scratch = Scratch {
            start: crate::units::RemoteAddr(ground.place),
            table_bytes: ground.table_bytes,
            instruction: crate::units::RemoteAddr(0),
        };
        let mut puppets = Self {
            plan,
            births,
            makers: Helpers::default(),
            tasks: (0..plan.tasks.len()).map(|_| None).collect(),
            helpers: Vec::new(),
            scratch,
            masters: Vec::new(),
            shell_job: ground.relations.shell_job,
            leave_stopped: ground.leave_stopped,
            released: false,
            filled: memory::Filled::default(),
        };
        puppets.make_first(&ground)?;
        Ok(puppets)
    }

    /// Makes all other processes of the plan, with the memory of all in place.
    ///
    /// # Errors
    /// The first failure.
    pub(super) fn make(&mut self, workshop: &Workshop) -> Result<()> {
        self.make_root()?;
        fault::hit(Point::RestoreRoot)?;
        // The plan has makers before the processes that they make.
        for position in 0..self.plan.tasks.len() {
            self.populate(position, workshop)?;
            self.make_children(position, workshop)?;
        }
        fault::hit(Point::RestoreForked)?;
        self.tell_of_exit_signals();
        self.set_groups(self.shell_job)
    }

    /// Makes the first process from a copy of this program, with its namespaces.
    fn make_first(&mut self, ground: &Ground) -> Result<()> {
        let birth = self.births.tasks[0].expect("all were planned");
        let (pid, flags) = match birth.maker {
            Maker::Helper(helper) => (self.births.helpers[helper].pid, CLONE_CLEAR_SIGHAND),
            _ => (
                self.plan.tasks[0].pid,
                CLONE_CLEAR_SIGHAND | if ground.relations.sibling { CLONE_PARENT } else { 0 },
            ),
        };
        let mut namespaces = self.plan.namespaces.borrow_mut();
        let flags = flags | CLONE_FILES | namespaces.clone_flags();
        let waiting = Waiting::begin();
        let tid = loop {
            let spawn = || process::spawn_sleeper(Some(pid.raw()), flags);
            let made = match self.groups() {
                Some(groups) => process::with_groups(&groups, spawn).and_then(|made| made),
                None => spawn(),
            };
            match made {
                Ok(tid) => break tid,
                // A session or group may still have this id.
                Err(Errno::EEXIST) => waiting.nap(self.plan.host(pid))?,
                Err(source) => {
                    return Err(match namespaces.names() {
                        Some(what) => RestoreError::SpawnInside { pid, what, source },
                        None => RestoreError::Spawn { pid: self.plan.host(pid), source },
                    });
                }
            }
        };
        let of_kinds = self.plan.common.iter().map(|kind| kind.trace_options());
        let options = of_kinds.fold(ptrace::options::FOLLOW, |all, options| all | options);
        let tracee = adopt_sleeper(tid, options)?;
        self.plan.pids.learn(pid, tid);
        let rseq = tracee.rseq;
        let in_own_namespace = self.plan.pids.is_own_namespace();
        self.makers =
            Helpers::of_first(First { tracee, pid, in_own_namespace, scratch: self.scratch });
        // Memory that belongs to this program's thread would be in the way.
        let mappings = proc::maps(tid)?;
        let place = crate::units::RemoteAddr(ground.place);
        self.scratch = self.makers.with_first(|first| {
            let scratch = Scratch::map(&mut first.tracee, &mappings, place, ground.table_bytes)?;
            first.scratch = scratch.on_its_own();
            Ok(first.scratch)
        })?;
        let mut script = Script::new();
        if rseq.pointer != 0 {
            /// `RSEQ_FLAG_UNREGISTER` (`linux/rseq.h`).
            const UNREGISTER: i32 = 1;
            script.call(
                "unregister restartable sequences",
                libc::SYS_rseq,
                &[rseq.pointer.into(), rseq.size.into(), UNREGISTER.into(), rseq.signature.into()],
            );
        }
        let arguments = [libc::PR_SET_PDEATHSIG.into(), 0.into()];
        script.call("reset the parent-death signal", libc::SYS_prctl, &arguments);
        let helpers = &self.makers;
        helpers.run_first(&script)?;
        let run = |script: &Script| helpers.run_first(script);
        let masters = RefCell::default();
        namespaces.build(tid, &run, self.plan.images(), &masters)?;
        self.masters = masters.into_inner();
        Ok(())
    }

    /// Makes the process that lends descriptors to the tree, if it has a user namespace of its own.
    ///
    /// # Errors
    /// [`RestoreError`].
    pub(super) fn lender(&self) -> Result<Option<Lender>> {
        let ids = self.plan.pids.ids();
        let Some(first) = self.makers.first().filter(|_| !ids.is_own_namespace()) else {
            return Ok(None);
        };
        let path = PathBuf::from(format!("/proc/{first}/ns/user"));
        let failed = |source| ResError::Read { path: path.clone(), source };
        let namespace = File::open(&path).map_err(failed)?;
        let status = proc::status(first)?.inside(ids);
        let ids = (status.uids.effective, status.gids.effective);
        let make = || Lender::beside(first, namespace.as_fd(), ids);
        let mut lender = make()?;
        let mut others = Vec::new();
        let threads = || self.plan.tasks.iter().flat_map(|task| &task.threads);
        while threads().any(|thread| self.plan.host(thread.tid) == lender.pid()) {
            others.push(std::mem::replace(&mut lender, make()?));
        }
        Ok(Some(lender))
    }

    /// Returns the supplementary groups, here, to make the first process with, if it gets a user
    /// namespace of its own: those of rcriu are not the tree's, and inside it may be forbidden to
    /// change them.
    fn groups(&self) -> Option<Vec<u32>> {
        let ids = self.plan.pids.ids();
        if ids.is_own_namespace() {
            return None;
        }
        let core = self.plan.tasks[0].core().thread_core.as_ref();
        let groups = core.and_then(|core| core.creds.as_ref()).map(|creds| creds.groups.as_slice());
        let here = groups.unwrap_or_default().iter().filter_map(|id| ids.host_group(NsId(*id)));
        Some(here.map(|id| id.0).collect())
    }

    /// Makes the root of the tree of the first process, or lets the first process make it.
    fn make_root(&mut self) -> Result<()> {
        let mut first = self.makers.take_first().expect("it was made").tracee;
        let mut script = Script::new();
        script.call("get its own descriptors", libc::SYS_unshare, &[CLONE_FILES.into()]);
        let result = self.scratch.run(&mut first, &script);
        let birth = self.births.tasks[0].expect("all were planned");
        let Maker::Helper(helper) = birth.maker else {
            self.tasks[0] = Some(Puppet::new(first, None));
            result?;
            return Ok(());
        };
        self.helpers.push(Helper { pid: self.births.helpers[helper].pid, maker: Maker::Director });
        result?;
        let mut script = Script::new();
        script.call("make a session", libc::SYS_setsid, &[]);
        self.scratch.run(&mut first, &script)?;
        let child = self.fork(&mut first, self.plan.tasks[0].pid, true, SIGCHLD, 0)?;
        self.tasks[0] = Some(Puppet::new(child, None));
        Ok(())
    }

    /// Gives a process its address space.
    fn populate(&mut self, position: usize, workshop: &Workshop) -> Result<()> {
        let task = &self.plan.tasks[position];
        let Some(body) = &task.body else { return Ok(()) };
        let pid = self.plan.host(task.pid);
        for kind in &self.plan.common {
            kind.born(task.core(), pid, pid)?;
        }
        if !self.plan.arenas.owns(Arena::Memory, position) {
            return Ok(()); // it was made with that of its maker
        }
        let puppet = self.tasks[position].as_mut().expect("its maker came before it");
        let parent: Option<&Body> =
            puppet.inherited.and_then(|parent| self.plan.tasks[parent].body.as_ref());
        let inherited = parent.map(|parent| parent.vmas.as_slice());
        let parent_memory = parent.and_then(|parent| parent.memory.as_ref());
        puppet.layout = Layout::new(inherited.unwrap_or_default(), parent_memory, body);
        let start = self.scratch.start.0;
        let scratch = start..start + self.scratch.len();
        let mut script = Script::new();
        let sources = Sources { file: workshop.file, common: &self.plan.common };
        memory::arrange(body, &puppet.layout, inherited, scratch, &mut script, sources)?;
        self.scratch.run(&mut puppet.threads[0], &script)?;
        task::KINDS.iter().try_for_each(|kind| kind.check_mappings(pid, &body.vmas))?;
        let forked_from = puppet.inherited.zip(parent_memory);
        let forked_from = forked_from
            .map(|(parent, memory)| (self.plan.host(self.plan.tasks[parent].pid), memory));
        fault::hit(Point::RestoreMemory)?;
        let filled = memory::fill(pid, body, &puppet.layout, forked_from, workshop.free)?;
        log::debug!("{pid}: {filled:?}");
        self.filled.compared += filled.compared;
        self.filled.equal += filled.equal;
        self.filled.written += filled.written;
        let mut script = Script::new();
        memory::drop_pages(body, &puppet.layout, parent_memory, &mut script);
        if !script.is_empty() {
            self.scratch.run(&mut puppet.threads[0], &script)?;
        }
        Ok(())
    }

    /// Makes all processes that a task makes, and its session, if it leads one.
    fn make_children(&mut self, position: usize, workshop: &Workshop) -> Result<()> {
        let mut puppet = self.tasks[position].take().expect("it was populated");
        let inherited = puppet.inherited;
        let maker = &mut puppet.threads[0];
        let result = self.make_children_with(position, inherited, maker, workshop);
        self.tasks[position] = Some(puppet);
        result
    }

    fn make_children_with(
        &mut self,
        position: usize,
        inherited: Option<usize>,
        maker: &mut Tracee,
        workshop: &Workshop,
    ) -> Result<()> {
        let own = Maker::Task(position);
        // A process that is to be dead keeps the inherited memory until then.
        let memory = match self.plan.tasks[position].body {
            Some(_) => Some(self.plan.arenas.owner(Arena::Memory, position)),
            None => inherited,
        };
        self.make_all(own, true, memory, maker)?;
        let task = &self.plan.tasks[position];
        if task.session == task.pid {
            let mut script = Script::new();
            script.call("make a session", libc::SYS_setsid, &[]);
            (workshop.begin_session)(task.pid, &mut script);
            self.scratch.run(maker, &script)?;
        }
        for number in 0..self.births.helpers.len() {
            let helper = self.births.helpers[number];
            if helper.maker != own || !helper.session {
                continue;
            }
            let mut tracee = self.fork_helper(maker, helper.pid, position)?;
            let mut script = Script::new();
            script.call("make a session", libc::SYS_setsid, &[]);
            self.scratch.run(&mut tracee, &script)?;
            self.make_all(Maker::Helper(number), false, memory, &mut tracee)?;
        }
        self.make_all(own, false, memory, maker)
    }

    fn make_all(
        &mut self,
        maker: Maker,
        early: bool,
        memory: Option<usize>,
        by: &mut Tracee,
    ) -> Result<()> {
        for child in 1..self.plan.tasks.len() {
            let birth = self.births.tasks[child].expect("all were planned");
            if birth.maker != maker || birth.early != early {
                continue;
            }
            let task = &self.plan.tasks[child];
            let shared = match maker {
                Maker::Task(maker) => self.plan.arenas.clone_flags(maker, child),
                Maker::Director | Maker::Helper(_) => 0,
            };
            let begins = self.plan.pids.below().and_then(|below| below.begun_by(task.pid));
            let shared = match begins {
                Some(_) => {
                    self.join_group_of_child(maker, task, by)?;
                    shared | CLONE_NEWPID
                }
                None => shared,
            };
            let tracee = self.fork(by, task.pid, birth.sibling, task.exit_signal(), shared)?;
            // From here on, a failure ends it.
            self.tasks[child] = Some(Puppet::new(tracee, memory));
            let shares_fs = shared & Arena::Fs.clone_flag() != 0;
            let namespaces = self.plan.namespaces.borrow();
            let enter = namespaces.enter(task.pid, shares_fs);
            let begin = begins.map(|space| namespaces.begin_pids(task.pid, space)).transpose()?;
            for script in [enter, begin.unwrap_or_default()] {
                if !script.is_empty() {
                    let puppet = self.tasks[child].as_mut().expect("it was made");
                    self.scratch.run(&mut puppet.threads[0], &script)?;
                }
            }
        }
        Ok(())
    }

    /// Makes a helper as a child of the task at a position.
    pub(super) fn fork_helper(
        &mut self,
        by: &mut Tracee,
        pid: NsPid,
        position: usize,
    ) -> Result<Tracee> {
        let (pids, maker) = (&self.plan.pids, self.plan.tasks[position].pid);
        if pids.chosen(pid).len() != pids.chosen(maker).len() {
            let problem = format!(
                "process {pid}, which has ended, led the session or process group of a child of it, in another \
                 pid namespace than its own"
            );
            return Err(RestoreError::Relation { pid: maker, problem });
        }
        let helper = self.fork(by, pid, false, SIGCHLD, 0)?;
        self.helpers.push(Helper { pid, maker: Maker::Task(position) });
        Ok(helper)
    }

    /// Makes a process with this pid; `shared` are the flags of `clone(2)` for what it
    /// shares with its maker.
    fn fork(
        &self,
        maker: &mut Tracee,
        pid: NsPid,
        sibling: bool,
        exit_signal: u32,
        shared: u64,
    ) -> Result<Tracee> {
        let arguments = CloneArguments {
            flags: shared | if sibling { CLONE_PARENT } else { 0 },
            // The kernel gives a sibling the exit signal of its maker.
            exit_signal: if sibling { 0 } else { exit_signal.into() },
            ..CloneArguments::default()
        };
        make(&self.scratch, maker, (pid, &self.plan.pids), arguments)
    }

    /// Warns of processes whose exit signal changes: a sibling gets that of its maker, and
    /// the root gets the one that its new parent waits for.
    fn tell_of_exit_signals(&self) {
        for (task, birth) in self.plan.tasks.iter().zip(&self.births.tasks) {
            let now = match birth {
                Some(Birth { maker: Maker::Task(maker), sibling: true, .. }) => {
                    self.plan.tasks[*maker].exit_signal()
                }
                Some(Birth { maker: Maker::Task(_), .. }) => continue,
                _ => SIGCHLD,
            };
            let before = task.exit_signal();
            if before != now {
                let message = format!(
                    "the exit signal of process {} will be {now} instead of {before}, like that of the \
                     process that makes it (clone(2))",
                    task.pid
                );
                tell(log::Level::Warn, &message);
            }
        }
    }

    /// Makes the other threads of a task.
    ///
    /// # Errors
    /// [`StepError::Inject`](crate::step::StepError::Inject).
    pub(super) fn make_threads(&mut self, position: usize) -> Result<()> {
        let flags = libc::CLONE_VM
            | libc::CLONE_FS
            | libc::CLONE_FILES
            | libc::CLONE_SIGHAND
            | libc::CLONE_THREAD
            | libc::CLONE_SYSVSEM;
        let puppet = self.tasks[position].as_mut().expect("all were made");
        for thread in &self.plan.tasks[position].threads[1..] {
            let flags = u64::from(flags.cast_unsigned());
            let arguments = CloneArguments { flags, ..CloneArguments::default() };
            let numbers = (thread.tid, &self.plan.pids);
            let made = make(&self.scratch, &mut puppet.threads[0], numbers, arguments)?;
            let tid = made.tid;
            puppet.threads.push(made);
            let pid = self.plan.host(self.plan.tasks[position].pid);
            for kind in &self.plan.common {
                kind.born(&thread.core, pid, tid)?;
            }
        }
        Ok(())
    }
}
