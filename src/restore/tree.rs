//! Making the processes of a tree, each by the one that is to make it ([`crate::image::tree::Births`]).

use std::{
    collections::HashMap,
    thread,
    time::{Duration, Instant},
};

use nix::{errno::Errno, libc};

use super::{
    RestoreError, Result,
    free::Free,
    memory::{self, Layout},
    pids::Waiting,
    plan::{Body, Plan, TaskPlan},
};
use crate::{
    causes::tell,
    fault::{self, Point},
    image::{
        proto::VmaEntry,
        tree::{Birth, Births, Maker},
    },
    inject::{InjectError, Scratch, Script, Tracee},
    proc,
    res::{
        self,
        task::{leader, state, stop},
        tree::cgroup::Places,
    },
    sys::{
        process::{self, CloneArguments},
        ptrace::{self, Wait, options},
    },
    units::HostPid,
};

/// How long a process that is to be stopped may take for it.
const REST_PATIENCE: Duration = Duration::from_secs(1);

/// How long to sleep between two looks at it.
const REST_NAP: Duration = Duration::from_micros(100);

/// `CLONE_CLEAR_SIGHAND` (`linux/sched.h`, since Linux 5.5): all handlers at their
/// defaults.
const CLONE_CLEAR_SIGHAND: u64 = 1 << 32;

/// The new process is a child of its maker's parent.
const CLONE_PARENT: u64 = libc::CLONE_PARENT.cast_unsigned() as u64;

/// By which processes that are made for the restore tell their ends.
const SIGCHLD: u32 = libc::SIGCHLD.cast_unsigned();

/// A process while it is restored.
#[derive(Debug)]
pub(super) struct Puppet {
    /// Its threads that exist, the leader first.
    pub(super) threads: Vec<Tracee>,
    /// What it kept of the address space that it inherited.
    pub(super) layout: Layout,
    /// The task whose memory it inherited.
    inherited: Option<usize>,
}

/// A helper while it exists.
#[derive(Debug)]
struct Helper {
    pid: HostPid,
    maker: Maker,
}

/// The processes of a tree while it is restored. If it is dropped, they end.
#[derive(Debug)]
pub(super) struct Puppets<'a> {
    plan: &'a Plan,
    births: Births,
    /// In the order of the plan's tasks, as far as they were made.
    pub(super) tasks: Vec<Option<Puppet>>,
    helpers: Vec<Helper>,
    pub(super) scratch: Scratch,
    /// Where processes are put before they have memory.
    cgroups: &'a Places,
    leave_stopped: bool,
    released: bool,
    pub(super) filled: memory::Filled,
}

/// What making the processes needs besides the plan.
pub(super) struct Workshop<'a> {
    /// Where scratch memory is free in all processes.
    pub(super) place: u64,
    pub(super) table_bytes: usize,
    /// Returns the descriptor for a mapping of a file.
    pub(super) file: &'a dyn Fn(&VmaEntry) -> Result<i32>,
    pub(super) shell_job: bool,
    /// Who frees in the images what is in place.
    pub(super) free: Option<&'a Free>,
    /// The first process is to be a sibling of this program.
    pub(super) sibling: bool,
    /// All processes stay stopped.
    pub(super) leave_stopped: bool,
}

impl<'a> Puppets<'a> {
    /// Makes all processes of the plan, with their memory in place.
    ///
    /// # Errors
    /// Whatever fails; no process is left then.
    pub(super) fn make(plan: &'a Plan, cgroups: &'a Places, workshop: &Workshop) -> Result<Self> {
        let births = plan.births.clone();
        for helper in &births.helpers {
            Waiting::begin().until_free(helper.pid)?;
        }
        let scratch = Scratch {
            start: crate::units::RemoteAddr(workshop.place),
            table_bytes: workshop.table_bytes,
            instruction: crate::units::RemoteAddr(0),
        };
        let mut puppets = Self {
            plan,
            births,
            tasks: (0..plan.tasks.len()).map(|_| None).collect(),
            helpers: Vec::new(),
            scratch,
            cgroups,
            leave_stopped: workshop.leave_stopped,
            released: false,
            filled: memory::Filled::default(),
        };
        puppets.make_root(workshop)?;
        fault::hit(Point::RestoreRoot)?;
        // Tasks are in an order in which makers come before those they make.
        for position in 0..plan.tasks.len() {
            puppets.populate(position, workshop)?;
            puppets.make_children(position)?;
        }
        fault::hit(Point::RestoreForked)?;
        puppets.tell_of_exit_signals();
        puppets.set_groups(workshop.shell_job)?;
        Ok(puppets)
    }

    /// Makes the first process out of a copy of this program.
    fn make_root(&mut self, workshop: &Workshop) -> Result<()> {
        let birth = self.births.tasks[0].expect("all were planned");
        let (pid, flags) = match birth.maker {
            Maker::Helper(helper) => (self.births.helpers[helper].pid, CLONE_CLEAR_SIGHAND),
            _ => (
                self.plan.tasks[0].pid,
                CLONE_CLEAR_SIGHAND | if workshop.sibling { CLONE_PARENT } else { 0 },
            ),
        };
        let waiting = Waiting::begin();
        loop {
            match process::spawn_sleeper(pid, flags) {
                Ok(_) => break,
                // A session or group may still have it.
                Err(Errno::EEXIST) => waiting.nap(pid)?,
                Err(source) => return Err(RestoreError::Spawn { pid, source }),
            }
        }
        let mut first = adopt_sleeper(pid)?;
        // What this program's memory has to do with the thread would be in the way.
        let mappings = proc::maps(pid)?;
        let place = crate::units::RemoteAddr(workshop.place);
        let rseq = first.rseq;
        self.scratch =
            Scratch::map(&mut first, &mappings, place, workshop.table_bytes)?.on_its_own();
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
        self.scratch.run(&mut first, &script)?;
        if let Maker::Helper(helper) = birth.maker {
            let helper = self.births.helpers[helper];
            let mut script = Script::new();
            script.call("make a session", libc::SYS_setsid, &[]);
            self.scratch.run(&mut first, &script)?;
            self.helpers.push(Helper { pid: helper.pid, maker: Maker::Director });
            let root = self.plan.tasks[0].pid;
            let child = self.fork(&mut first, root, true, SIGCHLD)?;
            self.tasks[0] =
                Some(Puppet { threads: vec![child], layout: Layout::default(), inherited: None });
        } else {
            self.tasks[0] =
                Some(Puppet { threads: vec![first], layout: Layout::default(), inherited: None });
        }
        Ok(())
    }

    /// Gives a process its address space.
    fn populate(&mut self, position: usize, workshop: &Workshop) -> Result<()> {
        let task = &self.plan.tasks[position];
        let Some(body) = &task.body else { return Ok(()) };
        // Memory is charged to where the process is when it gets it.
        self.cgroups.put(task.core(), task.pid, task.pid)?;
        let puppet = self.tasks[position].as_mut().expect("its maker came before it");
        let parent: Option<&Body> =
            puppet.inherited.and_then(|parent| self.plan.tasks[parent].body.as_ref());
        let inherited = parent.map(|parent| parent.vmas.as_slice());
        let parent_memory = parent.and_then(|parent| parent.memory.as_ref());
        puppet.layout = Layout::new(inherited.unwrap_or_default(), parent_memory, body);
        let start = self.scratch.start.0;
        let scratch = start..start + self.scratch.len();
        let mut script = Script::new();
        memory::arrange(body, &puppet.layout, inherited, scratch, &mut script, workshop.file)?;
        self.scratch.run(&mut puppet.threads[0], &script)?;
        check_vdso(task.pid, body)?;
        let forked_from = puppet.inherited.zip(parent_memory);
        let forked_from = forked_from.map(|(parent, memory)| (self.plan.tasks[parent].pid, memory));
        fault::hit(Point::RestoreMemory)?;
        let filled = memory::fill(task.pid, body, &puppet.layout, forked_from, workshop.free)?;
        log::debug!("{}: {filled:?}", task.pid);
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
    fn make_children(&mut self, position: usize) -> Result<()> {
        let mut puppet = self.tasks[position].take().expect("it was populated");
        let inherited = puppet.inherited;
        let result = self.make_children_with(position, inherited, &mut puppet.threads[0]);
        self.tasks[position] = Some(puppet);
        result
    }

    fn make_children_with(
        &mut self,
        position: usize,
        inherited: Option<usize>,
        maker: &mut Tracee,
    ) -> Result<()> {
        let own = Maker::Task(position);
        // One that is to be dead keeps the memory that it has inherited until then.
        let memory = match self.plan.tasks[position].body {
            Some(_) => Some(position),
            None => inherited,
        };
        self.make_all(own, true, memory, maker)?;
        let task = &self.plan.tasks[position];
        if task.session == task.pid {
            let mut script = Script::new();
            script.call("make a session", libc::SYS_setsid, &[]);
            self.scratch.run(maker, &script)?;
        }
        for number in 0..self.births.helpers.len() {
            let helper = self.births.helpers[number];
            if helper.maker != own || !helper.session {
                continue;
            }
            let mut tracee = self.fork(maker, helper.pid, false, SIGCHLD)?;
            self.helpers.push(Helper { pid: helper.pid, maker: own });
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
            let tracee = self.fork(by, task.pid, birth.sibling, task.exit_signal())?;
            self.tasks[child] = Some(Puppet {
                threads: vec![tracee],
                layout: Layout::default(),
                inherited: memory,
            });
        }
        Ok(())
    }

    /// Makes a process with this pid.
    fn fork(
        &self,
        maker: &mut Tracee,
        pid: HostPid,
        sibling: bool,
        exit_signal: u32,
    ) -> Result<Tracee> {
        let arguments = CloneArguments {
            flags: if sibling { CLONE_PARENT } else { 0 },
            // A sibling's is that of who makes it.
            exit_signal: if sibling { 0 } else { exit_signal.into() },
            ..CloneArguments::default()
        };
        make(&self.scratch, maker, pid, arguments)
    }

    /// Says whose end will be told by another signal than before: a sibling's is that of
    /// who makes it, and that of the root is what its new parent waits for.
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
                    "the end of process {} will be told to its parent by signal {now}, not {before} \
                     (clone(2)), as that of the process that made it",
                    task.pid
                );
                tell(log::Level::Warn, &message);
            }
        }
    }

    /// Puts all processes into their groups.
    fn set_groups(&mut self, shell_job: bool) -> Result<()> {
        let plan = self.plan;
        let join = |scratch: &Scratch, tracee: &mut Tracee, group: i32| {
            let mut script = Script::new();
            let what = format!("join process group {group}");
            script.call(what, libc::SYS_setpgid, &[0.into(), group.into()]);
            scratch.run(tracee, &script).map(drop)
        };
        let scratch = self.scratch;
        for (task, puppet) in plan.tasks.iter().zip(&mut self.tasks) {
            let puppet = puppet.as_mut().expect("all were made");
            if task.group == task.pid && task.session != task.pid {
                join(&scratch, &mut puppet.threads[0], 0)?;
            }
        }
        let mut made = HashMap::new();
        for (position, task) in plan.tasks.iter().enumerate() {
            if task.group == task.pid {
                continue;
            }
            let outside = plan.is_outside(task.group);
            let has_helper = self.helpers.iter().any(|helper| helper.pid == task.group);
            if outside && shell_job && task.group == plan.tasks[0].group {
                continue; // that of this program, which all inherit
            }
            let mut puppet = self.tasks[position].take().expect("all were made");
            let result: Result<()> = (|| {
                if outside && !has_helper && !made.contains_key(&task.group) {
                    Waiting::begin().until_free(task.group)?;
                    let mut helper =
                        self.fork(&mut puppet.threads[0], task.group, false, SIGCHLD)?;
                    self.helpers.push(Helper { pid: task.group, maker: Maker::Task(position) });
                    join(&scratch, &mut helper, 0)?;
                    made.insert(task.group, position);
                }
                Ok(join(&scratch, &mut puppet.threads[0], task.group.0)?)
            })();
            self.tasks[position] = Some(puppet);
            result?;
        }
        Ok(())
    }

    /// Makes the other threads of a task.
    ///
    /// # Errors
    /// [`RestoreError::Inject`].
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
            let made = make(&self.scratch, &mut puppet.threads[0], thread.tid, arguments)?;
            puppet.threads.push(made);
            self.cgroups.put(&thread.core, self.plan.tasks[position].pid, thread.tid)?;
        }
        Ok(())
    }

    /// Lets the helpers end, and those processes that are dead in the images, and takes
    /// away the signs of it. All signals have their default actions still: a parent that
    /// ignores the deaths of its children would have no zombies.
    ///
    /// # Errors
    /// [`RestoreError::Inject`].
    pub(super) fn end_the_dead(&mut self) -> Result<()> {
        let scratch = self.scratch;
        // One that is to be dead may have made a helper, and has to wait for it.
        let helpers = std::mem::take(&mut self.helpers);
        for helper in &helpers {
            kill(helper.pid)?;
            await_end(helper.pid)?;
            let mut script = Script::new();
            script.call(
                "reap a helper",
                libc::SYS_wait4,
                &[helper.pid.0.into(), 0.into(), libc::__WALL.into(), 0.into()],
            );
            match helper.maker {
                Maker::Task(position) => {
                    let puppet = self.tasks[position].as_mut().expect("all were made");
                    scratch.run(&mut puppet.threads[0], &script)?;
                }
                // A child of ours was reaped when it was waited for.
                Maker::Director | Maker::Helper(_) => {}
            }
        }
        for (task, puppet) in self.plan.tasks.iter().zip(&mut self.tasks) {
            if task.body.is_some() {
                continue;
            }
            let Some(puppet) = puppet else { continue };
            let leader = &mut puppet.threads[0];
            let core = task.core().tc.as_ref();
            let status = core.map_or(0, |core| core.exit_code);
            let mut script = Script::new();
            if let Some(core) = core {
                let mut name = core.comm.clone();
                name.push(0);
                let name = script.bytes(&name);
                let arguments = [libc::PR_SET_NAME.into(), name.into()];
                script.call("set the name", libc::SYS_prctl, &arguments);
                // No core file is to be left of a death that has been.
                let arguments = [libc::PR_SET_DUMPABLE.into(), 0.into()];
                script.call("forbid core files", libc::SYS_prctl, &arguments);
            }
            scratch.run(leader, &script)?;
            end(&scratch, leader, status)?;
        }
        self.forget_deaths()
    }

    /// Takes away the signals by which processes were told of deaths.
    fn forget_deaths(&mut self) -> Result<()> {
        let scratch = self.scratch;
        for (task, puppet) in self.plan.tasks.iter().zip(&mut self.tasks) {
            let (Some(_), Some(puppet)) = (&task.body, puppet) else { continue };
            let dead = self.plan.tasks.iter().filter(|dead| {
                let parent = dead.parent.map(|parent| self.plan.tasks[parent].pid);
                dead.body.is_none() && parent == Some(task.pid)
            });
            let mut signals = vec![SIGCHLD];
            signals.extend(dead.map(TaskPlan::exit_signal).filter(|signal| *signal != 0));
            let mut script = Script::new();
            for signal in signals {
                stop::forget_signal(signal, &mut script);
            }
            scratch.run(&mut puppet.threads[0], &script)?;
        }
        Ok(())
    }

    /// Whether a task stays stopped.
    fn stays_stopped(&self, task: &TaskPlan) -> bool {
        task.body.is_some() && (self.leave_stopped || task.state() == state::STOPPED)
    }

    /// Whether children of a task are to be stopped when it goes on.
    pub(super) fn awaits_stops(&self, position: usize) -> bool {
        let mut tasks = self.plan.tasks.iter();
        tasks.any(|task| task.parent == Some(position) && self.stays_stopped(task))
    }

    /// Takes the scratch memory out of a task, and gives its threads their registers.
    ///
    /// # Errors
    /// [`RestoreError::Inject`], [`RestoreError::State`].
    pub(super) fn dress(&mut self, position: usize) -> Result<()> {
        let puppet = self.tasks[position].as_mut().expect("it lives");
        self.scratch.unmap(&mut puppet.threads[0])?;
        let lives = |tid| puppet.threads.iter().any(|thread| thread.tid == tid);
        for of in self.plan.tasks[position].threads.iter().filter(|of| lives(of.tid)) {
            res::thread::apply_registers(&of.core, of.tid)?;
        }
        Ok(())
    }

    /// Ends the first thread of a task, whose other threads live. This program lets go of it
    /// before: one that is traced is told of as ended to its tracer alone.
    ///
    /// # Errors
    /// [`RestoreError::Inject`], [`RestoreError::Process`].
    pub(super) fn end_leader(&mut self, position: usize, code: u32) -> Result<()> {
        let puppet = self.tasks[position].as_mut().expect("it lives");
        let mut script = Script::new();
        leader::end(code, &mut script);
        let leader = puppet.threads.remove(0);
        let pid = leader.tid;
        self.scratch.let_go(leader, &script)?;
        await_state(pid, |state| matches!(state, 'Z' | 'X'));
        Ok(())
    }

    /// Lets a task see that its children have stopped, as far as it was told before, and
    /// takes away the signals by which it is told again.
    fn tell_of_stops(&mut self, position: usize) -> Result<()> {
        let plan = self.plan;
        let task = &plan.tasks[position];
        let mut script = Script::new();
        let mut signals = vec![SIGCHLD];
        for child in plan.tasks.iter().filter(|child| child.parent == Some(position)) {
            if !self.stays_stopped(child) {
                continue;
            }
            signals.push(child.exit_signal());
            let told = child.core().tc.as_ref().and_then(|core| core.rcriu_stop_told);
            // CRIU's images do not say; most parents look at once.
            if child.state() != state::STOPPED || told != Some(false) {
                stop::tell(child.pid, &mut script);
            }
        }
        let pending = task.core().tc.as_ref().and_then(|core| core.signals_s.as_ref());
        let was_pending = |signal: u32| {
            let signal = signal.to_le_bytes();
            pending.is_some_and(|queue| {
                queue.signals.iter().any(|entry| entry.siginfo.starts_with(&signal))
            })
        };
        for signal in signals.into_iter().filter(|signal| *signal != 0 && !was_pending(*signal)) {
            stop::forget_signal(signal, &mut script);
        }
        let puppet = self.tasks[position].as_mut().expect("it lives");
        self.scratch.run(&mut puppet.threads[0], &script)?;
        Ok(())
    }

    /// Lets all processes go: children before their parents, and first those that stay
    /// stopped, so that their parents find them as they were.
    ///
    /// # Errors
    /// [`RestoreError::Process`]; processes that were let go by then run on.
    pub(super) fn release(mut self) -> Result<()> {
        self.released = true;
        let plan = self.plan;
        let mut go_on = Vec::new();
        for (position, task) in plan.tasks.iter().enumerate().rev() {
            if task.body.is_none() || self.tasks[position].is_none() {
                continue;
            }
            if self.awaits_stops(position) {
                self.tell_of_stops(position)?;
                self.dress(position)?;
            }
            if self.stays_stopped(task) {
                signal(task.pid, libc::SIGSTOP)?;
                self.let_go(position)?;
                let witness = self.tasks[position].as_ref().expect("it lives").threads[0].tid;
                await_state(witness, |state| matches!(state, 'T' | 'Z' | 'X'));
            } else {
                go_on.push(position);
            }
        }
        go_on.into_iter().try_for_each(|position| self.let_go(position))
    }

    fn let_go(&self, position: usize) -> Result<()> {
        for thread in self.tasks[position].iter().flat_map(|puppet| &puppet.threads) {
            ptrace::detach(thread.tid, 0).map_err(|source| RestoreError::Process {
                pid: thread.tid,
                step: "let go of",
                source,
            })?;
        }
        Ok(())
    }
}

/// Waits until a process or thread that was let go has come to rest, unless somebody makes
/// it go on.
fn await_state(tid: HostPid, rests: impl Fn(char) -> bool) {
    let deadline = Instant::now() + REST_PATIENCE;
    let runs = |stat: proc::Stat| !rests(stat.state);
    while proc::thread_stat(tid, tid).is_ok_and(runs) && Instant::now() < deadline {
        thread::sleep(REST_NAP);
    }
}

impl Drop for Puppets<'_> {
    /// Ends all processes, unless they were let go.
    fn drop(&mut self) {
        if self.released {
            return;
        }
        let mut pids: Vec<HostPid> = self.helpers.iter().map(|helper| helper.pid).collect();
        for (task, puppet) in self.plan.tasks.iter().zip(&self.tasks) {
            if puppet.is_some() {
                pids.push(task.pid);
            }
        }
        for pid in &pids {
            let _ = signal(*pid, libc::SIGKILL);
        }
        for pid in &pids {
            // The kernel tells of the end of a leader only after all its threads,
            // which are ours to wait for, are gone.
            for tid in proc::threads(*pid).unwrap_or_default() {
                if tid != *pid {
                    let _ = await_end(tid);
                }
            }
            let _ = await_end(*pid);
        }
        // Those whose parents have died with them are children of this program now,
        // which is a subreaper.
        for pid in &pids {
            let _ = await_end(*pid);
        }
    }
}

/// Takes over a process that was made by [`process::spawn_sleeper`].
fn adopt_sleeper(pid: HostPid) -> Result<Tracee> {
    let trace = |step| move |source| RestoreError::Process { pid, step, source };
    let adopted = (|| {
        let wanted = options::SYSGOOD | options::FOLLOW | options::EXITKILL;
        ptrace::seize(pid, wanted).map_err(trace("trace"))?;
        ptrace::interrupt(pid).map_err(trace("interrupt"))?;
        await_stop(pid)
    })();
    if adopted.is_err() {
        let _ = signal(pid, libc::SIGKILL);
        let _ = await_end(pid);
    }
    adopted
}

/// Waits until a new tracee has stopped.
fn await_stop(tid: HostPid) -> Result<Tracee> {
    loop {
        let wait = ptrace::wait(tid).map_err(|source| RestoreError::Process {
            pid: tid,
            step: "wait for",
            source,
        })?;
        match wait {
            Wait::Interrupted | Wait::Stopped(_) => return Ok(Tracee::new(tid, 0)?),
            Wait::Exited(_) | Wait::Killed(_) => {
                let what = format!("has ended ({wait:?})");
                return Err(InjectError::Lost { tid, what }.into());
            }
            _ => ptrace::resume(tid, 0).map_err(|source| RestoreError::Process {
                pid: tid,
                step: "resume",
                source,
            })?,
        }
    }
}

/// Lets a puppet make a process or thread of this number.
fn make(
    scratch: &Scratch,
    maker: &mut Tracee,
    pid: HostPid,
    arguments: CloneArguments,
) -> Result<Tracee> {
    use zerocopy::IntoBytes;
    let mut script = Script::new();
    let set_tid = script.bytes(&pid.0.to_le_bytes());
    let arguments = CloneArguments { set_tid_size: 1, ..arguments };
    let buffer = script.bytes(arguments.as_bytes());
    script.point(buffer, std::mem::offset_of!(CloneArguments, set_tid), set_tid);
    script.call(
        format!("make process {pid}"),
        libc::SYS_clone3,
        &[buffer.into(), size_of::<CloneArguments>().into()],
    );
    let mut born = None;
    let waiting = Waiting::begin();
    loop {
        let made = scratch.run_births(maker, &script, &mut |child| {
            born = Some(child);
            Ok(())
        });
        match made {
            Err(InjectError::Call { source: Errno::EEXIST, .. }) => waiting.nap(pid)?,
            Err(error) => return Err(error.into()),
            Ok(_) => return await_stop(born.unwrap_or(pid)),
        }
    }
}

/// Ends a puppet so that its parent finds this status (`wait(2)`).
fn end(scratch: &Scratch, leader: &mut Tracee, status: u32) -> Result<()> {
    let pid = leader.tid;
    let trace = |step| move |source| RestoreError::Process { pid, step, source };
    let number = (status & 0x7f).cast_signed();
    if number == 0 {
        let mut script = Script::new();
        script.call("exit", libc::SYS_exit_group, &[(status >> 8 & 0xff).into()]);
        scratch.start(leader, &script)?;
    } else {
        // It is stopped, and goes on with the signal that ended it.
        ptrace::set_signal_mask(pid, 0).map_err(trace("unblock the signals of"))?;
        ptrace::resume(pid, number).map_err(trace("resume"))?;
    }
    await_end(pid)
}

fn kill(pid: HostPid) -> Result<()> {
    signal(pid, libc::SIGKILL)
}

fn signal(pid: HostPid, number: i32) -> Result<()> {
    process::signal(pid, number).map_err(|source| RestoreError::Process {
        pid,
        step: "send a signal to",
        source,
    })
}

/// Waits until a tracee that was killed is gone.
fn await_end(pid: HostPid) -> Result<()> {
    loop {
        match ptrace::wait(pid) {
            Err(Errno::ECHILD) | Ok(Wait::Exited(_) | Wait::Killed(_)) => return Ok(()),
            Ok(_) => {}
            Err(source) => return Err(RestoreError::Process { pid, step: "wait for", source }),
        }
    }
}

/// Checks that the kernel has put the vDSO where the images have it.
fn check_vdso(pid: HostPid, body: &Body) -> Result<()> {
    use crate::image::vma;
    let wanted: Vec<(u64, u64)> = body
        .vmas
        .iter()
        .filter(|entry| entry.status & vma::VDSO != 0)
        .map(|entry| (entry.start, entry.end))
        .collect();
    if wanted.is_empty() {
        return Ok(());
    }
    let maps = proc::maps(pid)?;
    let found: Vec<(u64, u64)> = maps
        .iter()
        .filter(|mapping| mapping.name == b"[vdso]")
        .map(|mapping| (mapping.start.0, mapping.end.0))
        .collect();
    if found == wanted {
        return Ok(());
    }
    let problem = format!("it is at {found:x?}, expected {wanted:x?}");
    Err(RestoreError::OtherKernel { pid, problem })
}
