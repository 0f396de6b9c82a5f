//! `/proc/PID/stat`: values of a task that `status` lacks.

use super::text::{self, Defect, Parsed};
use crate::units::HostPid;

/// A task as `/proc/PID/stat` shows it (`do_task_stat`, `fs/proc/array.c`).
///
/// Ids are those of the pid namespace of this `/proc`. Callers that may not trace the process get
/// 0 for addresses, or 1 for those of the code.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stat {
    /// The name of the task, unescaped.
    pub comm: Vec<u8>,
    /// The state: one of `RSDTtXZPI`.
    pub state: char,
    /// The pid of the parent process; 0 if it is outside the pid namespace.
    pub ppid: HostPid,
    /// The process group.
    pub pgrp: HostPid,
    /// The session.
    pub session: HostPid,
    /// The device number of the controlling terminal (`new_encode_dev`); 0 without one.
    pub tty_nr: u32,
    /// The foreground process group of the terminal; -1 without one.
    pub tpgid: HostPid,
    /// The `PF_*` flags of the task (`include/linux/sched.h`).
    pub flags: u32,
    /// The nice value, -20 to 19.
    pub nice: i32,
    /// The number of threads of the process.
    pub threads: u32,
    /// The start time of the task, in clock ticks since boot.
    pub start_time: u64,
    /// The start address of the program's code.
    pub start_code: u64,
    /// The end address of the program's code.
    pub end_code: u64,
    /// The address of the bottom of the stack.
    pub start_stack: u64,
    /// The signal sent to the parent on exit; -1 for a thread other than the leader.
    pub exit_signal: i32,
    /// The processor that it runs on, or has run on last.
    pub processor: u32,
    /// The real-time priority, 1 to 99; 0 under other policies.
    pub rt_priority: u32,
    /// The scheduling policy: a `SCHED_*` number.
    pub policy: u32,
    /// The start address of the program's data.
    pub start_data: u64,
    /// The end address of the program's data.
    pub end_data: u64,
    /// The start address of the heap, which `brk(2)` grows.
    pub start_brk: u64,
    /// The start address of the command line.
    pub arg_start: u64,
    /// The end address of the command line.
    pub arg_end: u64,
    /// The start address of the environment.
    pub env_start: u64,
    /// The end address of the environment.
    pub env_end: u64,
    /// The wait status of a zombie, as `waitpid(2)` returns it.
    pub exit_code: i32,
}

/// `PF_EXITING` in [`Stat::flags`] (`include/linux/sched.h`).
const EXITING: u32 = 0x4;

/// The number of the field after the name in `proc_pid_stat(5)`.
const FIRST_FIELD: usize = 3;

/// The fields after the name.
#[derive(Debug)]
struct Columns<'a>(Vec<&'a [u8]>);

impl<'a> Columns<'a> {
    /// Returns the field with this number in `proc_pid_stat(5)`.
    fn text(&self, number: usize, what: &'static str) -> Parsed<&'a [u8]> {
        self.0.get(number - FIRST_FIELD).copied().ok_or(Defect::missing(what))
    }

    fn unsigned<T: TryFrom<u64>>(&self, number: usize, what: &'static str) -> Parsed<T> {
        text::unsigned(self.text(number, what)?, 10, what)
    }

    fn signed<T: TryFrom<i64>>(&self, number: usize, what: &'static str) -> Parsed<T> {
        text::signed(self.text(number, what)?, what)
    }
}

impl Stat {
    /// Whether the task is dead or exiting.
    pub fn has_ended(&self) -> bool {
        matches!(self.state, 'Z' | 'X') || self.flags & EXITING != 0
    }

    /// Parses the text of the file.
    pub(super) fn parse(text: &[u8]) -> Parsed<Self> {
        let name = "name in parentheses";
        let open = text.iter().position(|&byte| byte == b'(');
        // The name may contain parentheses and blanks; the fields after it do not.
        let close = text.iter().rposition(|&byte| byte == b')');
        let (Some(open), Some(close)) = (open, close) else {
            return Err(Defect::new(name, text));
        };
        let comm = text.get(open + 1..close).ok_or_else(|| Defect::new(name, text))?.to_vec();
        let columns = Columns(text::words(&text[close + 1..]).collect());
        let [state] = columns.text(3, "state")? else {
            return Err(Defect::new("state", columns.text(3, "state")?));
        };
        Ok(Self {
            comm,
            state: char::from(*state),
            ppid: HostPid(columns.signed(4, "ppid")?),
            pgrp: HostPid(columns.signed(5, "pgrp")?),
            session: HostPid(columns.signed(6, "session")?),
            // The kernel prints it as a signed number.
            tty_nr: columns.signed::<i32>(7, "tty_nr")?.cast_unsigned(),
            tpgid: HostPid(columns.signed(8, "tpgid")?),
            flags: columns.unsigned(9, "flags")?,
            nice: columns.signed(19, "nice")?,
            threads: columns.unsigned(20, "num_threads")?,
            start_time: columns.unsigned(22, "starttime")?,
            start_code: columns.unsigned(26, "startcode")?,
            end_code: columns.unsigned(27, "endcode")?,
            start_stack: columns.unsigned(28, "startstack")?,
            exit_signal: columns.signed(38, "exit_signal")?,
            processor: columns.unsigned(39, "processor")?,
            rt_priority: columns.unsigned(40, "rt_priority")?,
            policy: columns.unsigned(41, "policy")?,
            start_data: columns.unsigned(45, "start_data")?,
            end_data: columns.unsigned(46, "end_data")?,
            start_brk: columns.unsigned(47, "start_brk")?,
            arg_start: columns.unsigned(48, "arg_start")?,
            arg_end: columns.unsigned(49, "arg_end")?,
            env_start: columns.unsigned(50, "env_start")?,
            env_end: columns.unsigned(51, "env_end")?,
            exit_code: columns.signed(52, "exit_code")?,
        })
    }
}
