//! `stat`, `statm` and `status`.

use std::fmt::Write;

use super::{Proc, Task, memory::Sizes};
use crate::{
    image::{Kind, proto},
    units::PAGE_SIZE,
    view::Result,
};

/// The priority of a task with nice value 0 in `stat`.
const PRIORITY: i64 = 20;

/// The real-time policies (`SCHED_FIFO`, `SCHED_RR`), for which `stat` shows negative priorities.
const REAL_TIME: [u32; 2] = [1, 2];

impl Proc<'_> {
    /// Returns `stat`: 52 fields (`proc_pid_stat(5)`). Those that images do not have are 0.
    pub(super) fn stat(&self, task: &Task) -> Result<Vec<u8>> {
        let entry = &task.entry;
        let mm = self.tables.mm(task.who.pid)?.unwrap_or_default();
        let sizes = self.sizes(task.who.pid)?.unwrap_or_default();
        let (tty, foreground) = self.terminal(entry.sid)?.unwrap_or((0, -1));
        let tc = task.thread.core.tc.as_ref();
        let thread = task.thread.core.thread_core.as_ref();
        let nice = thread.and_then(|thread| thread.sched_nice).unwrap_or(0);
        let policy = thread.and_then(|thread| thread.sched_policy).unwrap_or(0);
        let real_time = thread.and_then(|thread| thread.sched_prio).unwrap_or(0);
        let priority = if REAL_TIME.contains(&policy) {
            -1 - i64::from(real_time)
        } else {
            PRIORITY + i64::from(nice)
        };
        let (pending, blocked) = (task.thread.pending().0, task.thread.blocked());
        let (ignored, caught) = task.handled();
        let registers = task.thread.core.thread_info.as_ref().map(|info| &info.gpregs);
        let (sp, ip) = registers.map_or((0, 0), |registers| (registers.sp, registers.ip));
        let limits = tc.and_then(|tc| tc.rlimits.as_ref());
        let resident_limit =
            limits.and_then(|limits| limits.rlimits.get(5)).map_or(u64::MAX, |limit| limit.cur);
        let exit_signal = tc.and_then(|tc| tc.rcriu_exit_signal).unwrap_or(17);
        let exit_code = tc.map_or(0, |tc| tc.exit_code);
        let mut text = format!("{} (", task.who.tid).into_bytes();
        text.extend(task.comm());
        let mut rest =
            format!(") {} {} {} {}", task.state().0, task.parent(), entry.pgid, entry.sid);
        let _ = write!(rest, " {tty} {foreground} {}", tc.map_or(0, |tc| tc.flags));
        // Page faults and times, of the process and of its children.
        let _ = write!(rest, " 0 0 0 0 0 0 0 0");
        let _ = write!(rest, " {priority} {nice} {} 0 0", entry.threads.len().max(1));
        let _ = write!(rest, " {} {} {resident_limit}", sizes.mapped, sizes.resident() / PAGE_SIZE);
        let _ = write!(rest, " {} {} {}", mm.mm_start_code, mm.mm_end_code, mm.mm_start_stack);
        let low = |set: u64| set & u64::from(u32::MAX >> 1);
        let (pending, blocked) = (low(pending), low(blocked));
        let _ = write!(rest, " {sp} {ip} {pending} {blocked} {} {}", low(ignored), low(caught));
        let _ = write!(rest, " 0 0 0 {exit_signal} 0 {real_time} {policy} 0 0 0");
        let _ = write!(rest, " {} {} {}", mm.mm_start_data, mm.mm_end_data, mm.mm_start_brk);
        let _ = write!(rest, " {} {}", mm.mm_arg_start, mm.mm_arg_end);
        let _ = writeln!(rest, " {} {} {exit_code}", mm.mm_env_start, mm.mm_env_end);
        text.extend(rest.into_bytes());
        Ok(text)
    }

    /// Returns `statm`, in pages.
    pub(super) fn statm(&self, pid: u32) -> Result<Vec<u8>> {
        let sizes = self.sizes(pid)?.unwrap_or_default();
        let pages = |bytes: u64| bytes / PAGE_SIZE;
        let Sizes { mapped, shared, code, data, stack, .. } = sizes;
        let text = format!(
            "{} {} {} {} 0 {} 0\n",
            pages(mapped),
            pages(sizes.resident()),
            pages(shared),
            pages(code),
            pages(data.saturating_add(stack))
        );
        Ok(text.into_bytes())
    }

    /// Returns `status`.
    pub(super) fn status(&self, task: &Task) -> Result<Vec<u8>> {
        let entry = &task.entry;
        let tc = task.thread.core.tc.as_ref();
        let thread = task.thread.core.thread_core.as_ref();
        let mut text = b"Name:\t".to_vec();
        text.extend(super::escaped(task.comm(), b"\n\\"));
        let mut rest = String::from("\n");
        let fs: Option<proto::FsEntry> =
            self.tables.images().message_if_any(Kind::Fs, task.who.pid.into())?;
        if let Some(umask) = fs.and_then(|fs| fs.umask) {
            let _ = writeln!(rest, "Umask:\t{umask:04o}");
        }
        let (letter, state) = task.state();
        let _ = writeln!(rest, "State:\t{letter} ({state})");
        let (tid, pid) = (task.who.tid, task.who.pid);
        let _ = writeln!(rest, "Tgid:\t{pid}\nNgid:\t0\nPid:\t{tid}\nPPid:\t{}", task.parent());
        let _ = writeln!(rest, "TracerPid:\t0");
        if let Some(creds) = &task.thread.creds {
            let proto::CredsEntry { uid, euid, suid, fsuid, gid, egid, sgid, fsgid, .. } = creds;
            let _ = writeln!(rest, "Uid:\t{uid}\t{euid}\t{suid}\t{fsuid}");
            let _ = writeln!(rest, "Gid:\t{gid}\t{egid}\t{sgid}\t{fsgid}");
        }
        let fds = self.descriptors(pid)?;
        let highest = fds.iter().map(|fd| u64::from(fd.fd) + 1).max().unwrap_or(0);
        let _ = writeln!(rest, "FDSize:\t{}", highest.next_multiple_of(u64::BITS.into()));
        let groups = task.thread.creds.iter().flat_map(|creds| &creds.groups);
        let groups: String = groups.map(|group| format!("{group} ")).collect();
        let _ = writeln!(rest, "Groups:\t{groups}");
        let (pgid, sid) = (entry.pgid, entry.sid);
        let _ = writeln!(rest, "NStgid:\t{pid}\nNSpid:\t{tid}\nNSpgid:\t{pgid}\nNSsid:\t{sid}");
        if let Some(sizes) = self.sizes(pid)? {
            sizes.write(&mut rest);
        }
        let _ = writeln!(rest, "Threads:\t{}", entry.threads.len().max(1));
        let (own, shared) = task.thread.pending();
        let (ignored, caught) = task.handled();
        for (name, set) in [
            ("SigPnd", own),
            ("ShdPnd", shared),
            ("SigBlk", task.thread.blocked()),
            ("SigIgn", ignored),
            ("SigCgt", caught),
        ] {
            let _ = writeln!(rest, "{name}:\t{set:016x}");
        }
        if let Some(creds) = &task.thread.creds {
            for (name, words) in [
                ("CapInh", &creds.cap_inh),
                ("CapPrm", &creds.cap_prm),
                ("CapEff", &creds.cap_eff),
                ("CapBnd", &creds.cap_bnd),
                ("CapAmb", &creds.cap_amb),
            ] {
                let word = |at: usize| u64::from(words.get(at).copied().unwrap_or(0));
                let _ = writeln!(rest, "{name}:\t{:016x}", word(1) << u32::BITS | word(0));
            }
            let _ = writeln!(rest, "NoNewPrivs:\t{}", creds.no_new_privs.unwrap_or(0));
        }
        let seccomp = thread.and_then(|thread| thread.seccomp_mode);
        let seccomp = seccomp.or(tc.and_then(|tc| tc.old_seccomp_mode)).unwrap_or(0);
        let _ = writeln!(rest, "Seccomp:\t{seccomp}");
        if let Some(processors) = task.attribute("affinity") {
            let _ = writeln!(rest, "Cpus_allowed:\t{processors:x}");
        }
        text.extend(rest.into_bytes());
        Ok(text)
    }

    /// Returns the device number of a session's terminal as in `stat`, and its foreground process group;
    /// `None` if the images have none.
    fn terminal(&self, sid: u32) -> Result<Option<(u32, i64)>> {
        let files = self.tables.files()?;
        let infos = files.terminals.values();
        let controls = |info: &&proto::TtyInfoEntry| info.sid == sid && info.sid != 0;
        // Prefer the slave if both ends are in the tree.
        let slave = |info: &&proto::TtyInfoEntry| info.rdev >> 8 & 0xfff == PTS_MAJOR;
        let mut found: Vec<_> = infos.filter(controls).collect();
        found.sort_by_key(|info| (!slave(info), info.id));
        Ok(found.first().map(|info| (info.rdev, i64::from(info.pgrp))))
    }
}

/// The first major number of the slaves of pseudoterminals (`linux/major.h`).
const PTS_MAJOR: u32 = 136;
