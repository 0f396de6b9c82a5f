//! Helper processes, which make system calls with the ids of another process and then exit.

use std::{
    cell::RefCell,
    os::fd::{AsRawFd, BorrowedFd},
    rc::Rc,
};

use nix::libc;

use super::{
    Answers, InjectError, Result, Scratch, Script, TABLE_BYTES, Tracee, Wanted, adopt_sleeper,
    await_end, await_stop, session::free_place,
};
use crate::{
    causes::with_sources,
    proc,
    sys::process::{self, CloneArguments},
    units::{HostPid, LocalPid, NsPid},
};

/// `CLONE_CLEAR_SIGHAND` (`linux/sched.h`, since Linux 5.5).
const CLONE_CLEAR_SIGHAND: u64 = 1 << 32;

/// What a helper shares with rcriu.
const CLONE_FILES: u64 = libc::CLONE_FILES.cast_unsigned() as u64;

/// The first process of a tree that is being restored, while it shares the descriptors of rcriu.
#[derive(Debug)]
pub struct First {
    /// Its only thread.
    pub tracee: Tracee,
    /// Its pid in its namespace.
    pub pid: NsPid,
    /// Whether that is the pid namespace of rcriu.
    pub in_own_namespace: bool,
    /// Its scratch memory.
    pub scratch: Scratch,
}

/// Makes helpers in the pid namespace of a tree: in that of rcriu itself, or by the first process of
/// the tree.
#[derive(Clone, Debug, Default)]
pub struct Helpers(Option<Rc<RefCell<Option<First>>>>);

impl Helpers {
    /// Returns the helpers of a tree whose first process exists already.
    pub fn of_first(first: First) -> Self {
        Self(Some(Rc::new(RefCell::new(Some(first)))))
    }

    /// Returns the thread of the first process, if there is one.
    pub fn first(&self) -> Option<HostPid> {
        self.0.as_ref()?.borrow().as_ref().map(|first| first.tracee.tid)
    }

    /// Calls `act` with the first process.
    ///
    /// # Errors
    /// Those of `act`; [`InjectError::Lost`] if there is no first process.
    pub fn with_first<T>(&self, act: impl FnOnce(&mut First) -> Result<T>) -> Result<T> {
        let missing = || InjectError::Lost { tid: HostPid::NONE, what: GONE.to_owned() };
        let mut place = self.0.as_ref().ok_or_else(missing)?.borrow_mut();
        act(place.as_mut().ok_or_else(missing)?)
    }

    /// Has the first process make the calls of a script.
    ///
    /// # Errors
    /// Those of [`Scratch::run`] and [`Self::with_first`].
    pub fn run_first(&self, script: &Script) -> Result<Answers> {
        self.with_first(|first| first.scratch.run(&mut first.tracee, script))
    }

    /// Takes the first process, which helps no longer.
    pub fn take_first(&self) -> Option<First> {
        self.0.as_ref()?.borrow_mut().take()
    }

    /// Creates a helper with this pid. If it is that of the first process, that process helps.
    ///
    /// # Errors
    /// [`InjectError::Trace`] or [`InjectError::Call`], with `EEXIST` if the pid is in use.
    pub fn spawn(&self, pid: NsPid) -> Result<Helper> {
        if self.0.is_none() {
            return Helper::spawn(HostPid(pid.raw()));
        }
        self.with_first(|first| {
            if first.pid == pid {
                return Ok(Helper(Body::First(self.clone())));
            }
            let arguments = CloneArguments {
                // A child: the first process of a pid namespace cannot have siblings (clone(2)).
                flags: CLONE_CLEAR_SIGHAND | CLONE_FILES,
                ..CloneArguments::default()
            };
            let chosen = vec![pid.raw()];
            let wanted = Wanted { chosen, in_own_namespace: first.in_own_namespace, arguments };
            let tid = wanted.make(&first.scratch, &mut first.tracee)?;
            // It has a copy of the memory of its maker.
            let tracee = Box::new(await_stop(tid)?);
            let maker = Some((self.clone(), pid));
            Ok(Helper(Body::Own { tracee, scratch: first.scratch, maker }))
        })
    }
}

/// What [`InjectError::Lost`] says of a first process that helps no longer.
const GONE: &str = "is the first process of the tree, and has its own descriptors by now";

/// A process with a chosen pid that shares rcriu's descriptors. Dropping it kills the process and
/// frees the pid, unless it is the first process of the tree.
#[derive(Debug)]
pub struct Helper(Body);

#[derive(Debug)]
enum Body {
    Own {
        tracee: Box<Tracee>,
        scratch: Scratch,
        /// The process that has to reap it, unless rcriu does, and its pid there.
        maker: Option<(Helpers, NsPid)>,
    },
    First(Helpers),
}

/// A process that lends descriptors of rcriu to processes in a user namespace (`pidfd_getfd(2)`): they
/// have power over it, which they have not over rcriu. Dropping it kills it.
#[derive(Debug)]
pub struct Lender(Helper);

impl Lender {
    /// Creates one in the user namespace of a process. It shares rcriu's descriptors, and becomes the
    /// user and group `ids` inside, which `pidfd_getfd` compares.
    ///
    /// # Errors
    /// [`InjectError::Trace`] or [`InjectError::Call`].
    pub fn beside(pid: HostPid, namespace: BorrowedFd, (user, group): (u32, u32)) -> Result<Self> {
        let mut helper = Helper::spawn_anywhere(pid)?;
        let mut script = Script::new();
        let arguments = [namespace.as_raw_fd().into(), libc::CLONE_NEWUSER.into()];
        script.call("enter the user namespace", libc::SYS_setns, &arguments);
        let all = |id: u32| [id.into(), id.into(), id.into()];
        script.call("become a group of the user namespace", libc::SYS_setresgid, &all(group));
        script.call("become a user of the user namespace", libc::SYS_setresuid, &all(user));
        let arguments = [libc::PR_SET_DUMPABLE.into(), 1.into()];
        script.call("become dumpable again", libc::SYS_prctl, &arguments);
        helper.run(&script)?;
        Ok(Self(helper))
    }

    /// Returns its pid.
    pub fn pid(&self) -> HostPid {
        match &self.0.0 {
            Body::Own { tracee, .. } => tracee.tid,
            Body::First(_) => HostPid::NONE,
        }
    }
}

/// Kills a child when dropped.
struct Kill(HostPid);

impl Drop for Kill {
    fn drop(&mut self) {
        let _ = process::signal(self.0, libc::SIGKILL);
        let _ = await_end(self.0);
    }
}

impl Helper {
    /// Creates a helper with this pid in the pid namespace of rcriu.
    ///
    /// # Errors
    /// [`InjectError::Trace`], with `EEXIST` if the pid is in use.
    pub fn spawn(pid: HostPid) -> Result<Self> {
        let flags = CLONE_CLEAR_SIGHAND | CLONE_FILES;
        process::spawn_sleeper(Some(pid.0), flags).map_err(InjectError::trace(pid, "make"))?;
        Self::adopt(pid)
    }

    /// Creates a helper with any pid, for a tree of which `of` is a process.
    fn spawn_anywhere(of: HostPid) -> Result<Self> {
        let flags = CLONE_CLEAR_SIGHAND | CLONE_FILES;
        let made = process::spawn_sleeper(None, flags);
        Self::adopt(made.map_err(InjectError::trace(of, "make a helper for"))?)
    }

    fn adopt(pid: HostPid) -> Result<Self> {
        let mut tracee = adopt_sleeper(pid, 0)?;
        let kill = Kill(pid);
        let mappings = proc::maps(pid)?;
        let scratch = Scratch::map(&mut tracee, &mappings, free_place(&mappings), TABLE_BYTES)?;
        std::mem::forget(kill);
        Ok(Self(Body::Own { tracee: Box::new(tracee), scratch, maker: None }))
    }

    /// Has the helper make the calls of a script, like [`Scratch::run`].
    pub fn run(&mut self, script: &Script) -> Result<Answers> {
        match &mut self.0 {
            Body::Own { tracee, scratch, .. } => scratch.run(tracee, script),
            Body::First(helpers) => helpers.run_first(script),
        }
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        let Body::Own { tracee, maker, .. } = &self.0 else { return };
        drop(Kill(tracee.tid));
        if let Some((maker, pid)) = maker {
            let mut script = Script::new();
            let pid_there = LocalPid::in_tree(*pid);
            let arguments = [pid_there.into(), 0.into(), libc::__WALL.into(), 0.into()];
            script.call("reap a helper", libc::SYS_wait4, &arguments);
            if let Err(error) = maker.run_first(&script) {
                log::warn!("helper {pid}: {}", with_sources(&error));
            }
        }
    }
}
