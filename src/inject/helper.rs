//! Helper processes, which make system calls with the ids of another process and then exit.

use std::{cell::RefCell, mem::offset_of, rc::Rc};

use nix::libc;
use zerocopy::IntoBytes;

use super::{
    Answers, InjectError, Result, Scratch, Script, TABLE_BYTES, Tracee, adopt_sleeper, await_end,
    await_stop, session::free_place,
};
use crate::{
    proc,
    sys::process::{self, CloneArguments},
    units::{HostPid, NsPid},
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

    /// Has the first process make the calls of a script.
    ///
    /// # Errors
    /// Those of [`Scratch::run`]; [`InjectError::Lost`] if there is no first process.
    pub fn run_first(&self, script: &Script) -> Result<Answers> {
        let missing = || InjectError::Lost { tid: HostPid::NONE, what: GONE.to_owned() };
        let mut place = self.0.as_ref().ok_or_else(missing)?.borrow_mut();
        let First { tracee, scratch, .. } = place.as_mut().ok_or_else(missing)?;
        scratch.run(tracee, script)
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
        let Some(place) = &self.0 else { return Helper::spawn(HostPid(pid.raw())) };
        let mut place = place.borrow_mut();
        let Some(first) = place.as_mut() else {
            return Err(InjectError::Lost { tid: HostPid::NONE, what: GONE.to_owned() });
        };
        if first.pid == pid {
            return Ok(Helper(Body::First(self.clone())));
        }
        let mut script = Script::new();
        let set_tid = script.bytes(&pid.raw().to_le_bytes());
        let arguments = CloneArguments {
            flags: CLONE_CLEAR_SIGHAND
                | CLONE_FILES
                | u64::from(libc::CLONE_PARENT.cast_unsigned()),
            set_tid_size: 1,
            ..CloneArguments::default()
        };
        let buffer = script.bytes(arguments.as_bytes());
        script.point(buffer, offset_of!(CloneArguments, set_tid), set_tid);
        let size = size_of::<CloneArguments>();
        let what = format!("make helper {pid}");
        script.call(what, libc::SYS_clone3, &[buffer.into(), size.into()]);
        let mut born = None;
        first.scratch.run_births(&mut first.tracee, &script, &mut |child| {
            born = Some(child);
            Ok(())
        })?;
        let what = format!("has made no helper {pid}");
        let tid = born.ok_or(InjectError::Lost { tid: first.tracee.tid, what })?;
        // It has a copy of the memory of its maker.
        Ok(Helper(Body::Own { tracee: Box::new(await_stop(tid)?), scratch: first.scratch }))
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
    Own { tracee: Box<Tracee>, scratch: Scratch },
    First(Helpers),
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
        process::spawn_sleeper(pid.0, flags).map_err(InjectError::trace(pid, "make"))?;
        let mut tracee = adopt_sleeper(pid, 0)?;
        let kill = Kill(pid);
        let mappings = proc::maps(pid)?;
        let scratch = Scratch::map(&mut tracee, &mappings, free_place(&mappings), TABLE_BYTES)?;
        std::mem::forget(kill);
        Ok(Self(Body::Own { tracee: Box::new(tracee), scratch }))
    }

    /// Has the helper make the calls of a script, like [`Scratch::run`].
    pub fn run(&mut self, script: &Script) -> Result<Answers> {
        match &mut self.0 {
            Body::Own { tracee, scratch } => scratch.run(tracee, script),
            Body::First(helpers) => helpers.run_first(script),
        }
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        if let Body::Own { tracee, .. } = &self.0 {
            drop(Kill(tracee.tid));
        }
    }
}
