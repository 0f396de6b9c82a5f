//! What the images hold of a task, as text.

use std::fmt::Write;

use super::{Proc, Task, Who};
use crate::{image::tree::state, view::Result};

/// `sigaction` of signals that are handled by default, and of those that are ignored.
const SIG_DFL: u64 = 0;
const SIG_IGN: u64 = 1;

/// The signals that have no entry in `sigactions`: they cannot be handled (`signal(7)`).
const SIGKILL: u32 = 9;
const SIGSTOP: u32 = 19;

/// What there is a limit of, in the order of `RLIMIT_*` (`asm-generic/resource.h`), with
/// the unit; and the order in which the kernel lists them is the same.
const LIMITS: [(&str, &str); 16] = [
    ("Max cpu time", "seconds"),
    ("Max file size", "bytes"),
    ("Max data size", "bytes"),
    ("Max stack size", "bytes"),
    ("Max core file size", "bytes"),
    ("Max resident set", "bytes"),
    ("Max processes", "processes"),
    ("Max open files", "files"),
    ("Max locked memory", "bytes"),
    ("Max address space", "bytes"),
    ("Max file locks", "locks"),
    ("Max pending signals", "signals"),
    ("Max msgqueue size", "bytes"),
    ("Max nice priority", ""),
    ("Max realtime priority", ""),
    ("Max realtime timeout", "us"),
];

/// How wide units are, where there is one.
const UNIT_WIDTH: usize = 10;

/// `SIGEV_*` (`asm-generic/siginfo.h`): how a timer tells, and the bit that says to whom.
const NOTIFICATIONS: [&str; 3] = ["signal", "none", "thread"];
const NOTIFIES_THREAD: u32 = 4;

impl Task {
    /// Returns the name of the thread; that of the process where there is none of its own.
    pub(super) fn comm(&self) -> &[u8] {
        let own = self.thread.core.thread_core.as_ref().and_then(|thread| thread.comm.as_deref());
        let process = self.thread.core.tc.as_ref().map(|tc| tc.comm.as_slice());
        own.or(process).unwrap_or_default()
    }

    /// Returns the parent's pid. The parent of the first process is outside the tree, and no
    /// image tells it: the init of its pid namespace stands for it.
    pub(super) fn parent(&self) -> u32 {
        const INIT: u32 = 1;
        match self.entry.ppid {
            0 if self.entry.pid != INIT => INIT,
            parent => parent,
        }
    }

    /// Returns the letter of its state, and what it stands for. Images do not tell whether
    /// it was running.
    pub(super) fn state(&self) -> (char, &'static str) {
        match self.thread.core.tc.as_ref().map(|tc| tc.task_state) {
            Some(state::DEAD) => ('Z', "zombie"),
            Some(state::STOPPED) => ('T', "stopped"),
            _ => ('S', "sleeping"),
        }
    }

    /// Returns the first value of one of the attributes that this program records.
    pub(super) fn attribute(&self, name: &str) -> Option<u64> {
        let attributes = &self.thread.core.thread_core.as_ref()?.rcriu_attributes;
        let found = attributes.iter().find(|attribute| attribute.name == name.as_bytes())?;
        found.values.first().copied()
    }

    pub(super) fn attribute_text(&self, name: &str, text: impl Fn(u64) -> String) -> Vec<u8> {
        self.attribute(name).map_or_else(Vec::new, |value| text(value).into_bytes())
    }

    /// Returns the signals that the process ignores, and those that it handles.
    pub(super) fn handled(&self) -> (u64, u64) {
        let actions = self.thread.core.tc.iter().flat_map(|tc| &tc.sigactions);
        let numbers = (1..=u64::BITS).filter(|number| ![SIGKILL, SIGSTOP].contains(number));
        let (mut ignored, mut caught) = (0, 0);
        for (number, action) in numbers.zip(actions) {
            match action.sigaction {
                SIG_DFL => {}
                SIG_IGN => ignored |= 1 << (number - 1),
                _ => caught |= 1 << (number - 1),
            }
        }
        (ignored, caught)
    }

    pub(super) fn limits(&self) -> Vec<u8> {
        let mut text =
            format!("{:25} {:20} {:20} {:10}\n", "Limit", "Soft Limit", "Hard Limit", "Units");
        let limits = self.thread.core.tc.as_ref().and_then(|tc| tc.rlimits.as_ref());
        let number = |value: u64| match value {
            u64::MAX => "unlimited".to_owned(),
            value => value.to_string(),
        };
        for ((name, unit), limit) in LIMITS.iter().zip(limits.iter().flat_map(|all| &all.rlimits)) {
            let (soft, hard) = (number(limit.cur), number(limit.max));
            let width = if unit.is_empty() { 0 } else { UNIT_WIDTH };
            let _ = writeln!(text, "{name:25} {soft:20} {hard:20} {unit:width$}");
        }
        text.into_bytes()
    }

    /// Returns the process's POSIX timers.
    pub(super) fn timers(&self) -> Vec<u8> {
        let timers = self.thread.core.tc.as_ref().and_then(|tc| tc.timers.as_ref());
        let mut text = String::new();
        for timer in timers.iter().flat_map(|timers| &timers.posix) {
            let how = timer.it_sigev_notify & !NOTIFIES_THREAD;
            let how = NOTIFICATIONS.get(how as usize).unwrap_or(&"none");
            let whom = match timer.notify_thread_id {
                Some(tid) if timer.it_sigev_notify & NOTIFIES_THREAD != 0 => format!("tid.{tid}"),
                _ => format!("pid.{}", self.who.pid),
            };
            let _ = writeln!(text, "ID: {}", timer.it_id);
            let _ = writeln!(text, "signal: {}/{:016x}", timer.si_signo, timer.sival_ptr);
            let _ = writeln!(text, "notify: {how}/{whom}");
            let _ = writeln!(text, "ClockID: {}", timer.clock_id.cast_signed());
        }
        text.into_bytes()
    }
}

impl Proc<'_> {
    /// Returns the children of a process: all were forked by its first thread, as far as
    /// images tell.
    pub(super) fn child_list(&self, who: Who) -> Result<Vec<u8>> {
        let tree = self.tables.tree()?;
        let children = tree.iter().filter(|entry| entry.ppid == who.pid && who.tid == who.pid);
        let children: Vec<String> = children.map(|entry| format!("{} ", entry.pid)).collect();
        Ok(children.concat().into_bytes())
    }

    /// Returns the cgroups of a task; empty if they were not dumped.
    pub(super) fn cgroups(&self, task: &Task) -> Result<Vec<u8>> {
        let own = task.thread.core.thread_core.as_ref().and_then(|thread| thread.cg_set);
        let Some(set) = own.or(task.thread.core.tc.as_ref().and_then(|tc| tc.cg_set)) else {
            return Ok(Vec::new());
        };
        let sets = self.tables.cgroups()?;
        let members = sets.iter().filter(|known| known.id == set).flat_map(|known| &known.ctls);
        let mut text = Vec::new();
        for (position, member) in members.enumerate() {
            // Controllers of version 1 have numbers that images do not tell.
            let number = if member.name.is_empty() { 0 } else { position + 1 };
            let slash: &[u8] = if member.path.starts_with(b"/") { b"" } else { b"/" };
            text.extend(format!("{number}:").into_bytes());
            text.extend([&member.name, &b":"[..], slash, &member.path, b"\n"].concat());
        }
        Ok(text)
    }
}
