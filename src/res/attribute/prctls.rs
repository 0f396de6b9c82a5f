//! Attributes that one option of `prctl(2)` gets and another sets.

use nix::{errno::Errno, libc};

use super::{Asked, Kind, Label, Owner};
use crate::inject::{Answers, Script};

/// `linux/prctl.h`.
const GET_MEMORY_MERGE: i32 = 68;
const SET_MEMORY_MERGE: i32 = 67;
const GET_MDWE: i32 = 66;
const SET_MDWE: i32 = 65;

/// How the getting option reports the value.
enum Answer {
    /// As the return value.
    Returned,
    /// As a 32-bit number in memory.
    Pointed,
}

/// A getting and a setting option.
pub(super) struct Prctl {
    label: Label,
    get: i32,
    answer: Answer,
    /// Returns the arguments that set a value; `None` for a value that needs no call.
    set: fn(u64) -> Option<[u64; 3]>,
}

const fn option(number: i32) -> u64 {
    number.cast_unsigned() as u64
}

/// Nanoseconds; 0 for real-time policies, where timers have no slack.
pub(super) const TIMER_SLACK: Prctl = Prctl {
    label: Label::of_thread("timer_slack", "the timer slack in nanoseconds (PR_SET_TIMERSLACK)"),
    get: libc::PR_GET_TIMERSLACK,
    answer: Answer::Returned,
    set: |value| (value != 0).then_some([option(libc::PR_SET_TIMERSLACK), value, 0]),
};

pub(super) const TIME_STAMP_COUNTER: Prctl = Prctl {
    label: Label::of_thread("tsc", "the permission to read the time stamp counter (PR_SET_TSC)"),
    get: libc::PR_GET_TSC,
    answer: Answer::Pointed,
    set: |value| Some([option(libc::PR_SET_TSC), value, 0]),
};

pub(super) const MACHINE_CHECKS: Prctl = Prctl {
    label: Label::of_thread("mce_kill", "the machine check policy (PR_MCE_KILL)"),
    get: libc::PR_MCE_KILL_GET,
    answer: Answer::Returned,
    set: |value| Some([option(libc::PR_MCE_KILL), option(libc::PR_MCE_KILL_SET), value]),
};

/// 1 if huge pages are disabled; 3 if they are disabled except where a mapping asks for them.
pub(super) const HUGE_PAGES: Prctl = Prctl {
    label: Label::of_process(
        "thp_disable",
        "the transparent huge page setting (PR_SET_THP_DISABLE)",
    ),
    get: libc::PR_GET_THP_DISABLE,
    answer: Answer::Returned,
    set: |value| Some([option(libc::PR_SET_THP_DISABLE), value & 1, value & !1]),
};

pub(super) const MEMORY_MERGING: Prctl = Prctl {
    label: Label::of_process("memory_merge", "the page merging setting (PR_SET_MEMORY_MERGE)"),
    get: GET_MEMORY_MERGE,
    answer: Answer::Returned,
    set: |value| Some([option(SET_MEMORY_MERGE), value, 0]),
};

/// Bits, which a process cannot clear once they are set.
pub(super) const WRITE_OR_EXECUTE: Prctl = Prctl {
    label: Label::of_process("mdwe", "the write-or-execute restriction (PR_SET_MDWE)"),
    get: GET_MDWE,
    answer: Answer::Returned,
    set: |bits| (bits != 0).then_some([option(SET_MDWE), bits, 0]),
};

impl Kind for Prctl {
    fn label(&self) -> Label {
        self.label
    }

    fn ask(&self, script: &mut Script) -> Asked {
        match self.answer {
            Answer::Returned => Asked::call(script.attempt(libc::SYS_prctl, &[self.get.into()])),
            Answer::Pointed => {
                let buffer = script.space(size_of::<u32>());
                let arguments = [self.get.into(), buffer.into()];
                Asked::into(script.attempt(libc::SYS_prctl, &arguments), buffer)
            }
        }
    }

    fn read(&self, _: Owner, asked: &Asked, answers: &Answers) -> Option<Vec<u64>> {
        Some(vec![match self.answer {
            Answer::Returned => asked.result(answers)?,
            Answer::Pointed => u32::from_le_bytes(*asked.written(answers)?.first_chunk()?).into(),
        }])
    }

    fn set(&self, values: &[u64], _: Owner, script: &mut Script) -> Result<(), Errno> {
        let &[value] = values else { return Err(Errno::EINVAL) };
        if let Some(arguments) = (self.set)(value) {
            script.attempt(libc::SYS_prctl, &arguments.map(Into::into));
        }
        Ok(())
    }
}
