//! Texts about a task from its images.

use std::fmt::Write;

use super::{Proc, Task, Who};
use crate::{image::tree::state, view::Result};

/// The values of `sigaction` for default and ignored signals.
const SIG_DFL: u64 = 0;
const SIG_IGN: u64 = 1;

/// The signals without an entry in `sigactions`: they cannot be handled (`signal(7)`).
const SIGKILL: u32 = 9;
const SIGSTOP: u32 = 19;

/// The resources with a limit, in the order of `RLIMIT_*` (`asm-generic/resource.h`), and their units.
/// The kernel lists them in the same order.
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

/// The width of a unit, if there is one.
const UNIT_WIDTH: usize = 10;

/// `SIGEV_*` (`asm-generic/siginfo.h`): how a timer notifies, and the bit for a single thread.
const NOTIFICATIONS: [&str; 3] = ["signal", "none", "thread"];
const NOTIFIES_THREAD: u32 = 4;

impl Task {
    /// Returns the name of the thread; without one, that of the process.
    pub(super) fn comm(&self) -> &[u8] {
        let own = self.thread.core.thread_core.as_ref().and_then(|thread| thread.comm.as_deref());
        let process = self.thread.core.tc.as_ref().map(|tc| tc.comm.as_slice());
        own.or(process).unwrap_or_default()
    }

    /// Returns the pid of the parent. The parent of the root process is outside the tree, and images do
    /// not have it: the init process of the pid namespace stands for it.
    pub(super) fn parent(&self) -> u32 {
        const INIT: u32 = 1;
        match self.entry.ppid {
            0 if self.entry.pid != INIT => INIT,
            parent => parent,
        }
    }

    /// Returns the letter and the name of its state. Images do not tell whether it was running.
    pub(super) fn state(&self) -> (char, &'static str) {
        match self.thread.core.tc.as_ref().map(|tc| tc.task_state) {
            Some(state::DEAD) => ('Z', "zombie"),
            Some(state::STOPPED) => ('T', "stopped"),
            _ => ('S', "sleeping"),
        }
    }

    /// Returns the first value of a recorded attribute.
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
    /// Returns the children of a process. Images do not tell which thread has created a child, so all
    /// belong to the leader.
    pub(super) fn child_list(&self, who: Who) -> Result<Vec<u8>> {
        let tree = self.tables.tree()?;
        let children = tree.iter().filter(|entry| entry.ppid == who.pid && who.tid == who.pid);
        let children: Vec<String> = children.map(|entry| format!("{} ", entry.pid)).collect();
        Ok(children.concat().into_bytes())
    }

    /// Returns the cgroups of a task; empty if the images do not have them.
    pub(super) fn cgroups(&self, task: &Task) -> Result<Vec<u8>> {
        let own = task.thread.core.thread_core.as_ref().and_then(|thread| thread.cg_set);
        let Some(set) = own.or(task.thread.core.tc.as_ref().and_then(|tc| tc.cg_set)) else {
            return Ok(Vec::new());
        };
        let sets = self.tables.cgroups()?;
        let members = sets.iter().filter(|known| known.id == set).flat_map(|known| &known.ctls);
        let mut text = Vec::new();
        for (position, member) in members.enumerate() {
            // Images do not have the hierarchy ids of version 1.
            let number = if member.name.is_empty() { 0 } else { position + 1 };
            let slash: &[u8] = if member.path.starts_with(b"/") { b"" } else { b"/" };
            text.extend(format!("{number}:").into_bytes());
            text.extend([&member.name, &b":"[..], slash, &member.path, b"\n"].concat());
        }
        Ok(text)
    }
}
