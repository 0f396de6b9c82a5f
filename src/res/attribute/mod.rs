//! Attributes of processes and threads that the images of CRIU have no place for.
//!
//! Each kind is a file (or a row of `prctls`) with both directions, and a row of
//! `KINDS`. A dump records what every thread has; a restore looks at what the new
//! thread has, sets what differs, looks again, and says what is not as it was. In the
//! images they are an extension, `thread_core_entry.rcriu_attributes`, which CRIU passes
//! over; in its own images they are not, and threads have then what `rcriu` has.

mod affinity;
#[cfg(target_arch = "x86_64")]
mod arch;
mod autogroup;
mod core_cookie;
mod core_filter;
mod io_flusher;
mod io_priority;
mod keyrings;
pub mod lost;
pub mod memory;
mod memory_policy;
mod prctls;
mod scheduling;
mod speculation;

use std::collections::BTreeMap;

use nix::errno::Errno;

use super::{
    Result,
    calls::Calls,
    thread::{self, Collect, Restored, Thread},
};
use crate::{
    causes::tell,
    image::proto,
    inject::{Answers, Buffer, CallId, Script},
    units::HostPid,
};

/// Every kind, in the order in which they are set.
const KINDS: &[&dyn Kind] = &[
    // What follows from the policy comes after it.
    &scheduling::Scheduling,
    &affinity::Affinity,
    &io_priority::IoPriority,
    &prctls::TIMER_SLACK,
    &prctls::TIME_STAMP_COUNTER,
    &prctls::MACHINE_CHECKS,
    &prctls::HUGE_PAGES,
    &prctls::MEMORY_MERGING,
    &prctls::WRITE_OR_EXECUTE,
    &memory_policy::MemoryPolicy,
    &io_flusher::IoFlusher,
    &speculation::STORE_BYPASS,
    &speculation::INDIRECT_BRANCH,
    &speculation::CACHE_FLUSH,
    #[cfg(target_arch = "x86_64")]
    &arch::CpuId,
    #[cfg(target_arch = "x86_64")]
    &arch::LargeState,
    #[cfg(target_arch = "x86_64")]
    &arch::TaggedAddresses,
    &core_filter::CoreFilter,
    &autogroup::Autogroup,
    &core_cookie::CoreCookie,
    &keyrings::OF_THREAD,
    &keyrings::OF_PROCESS,
];

/// Whom an attribute belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scope {
    /// Each thread.
    Thread,
    /// The process: its leader has it in the images.
    Process,
}

/// A thread that has attributes.
#[derive(Clone, Copy, Debug)]
struct Who {
    /// The process.
    pid: HostPid,
    /// The thread.
    tid: HostPid,
    /// Whether its session is one of the tree, and not that of who restores.
    own_session: bool,
}

/// What was asked of a thread.
#[derive(Clone, Debug, Default)]
struct Asked {
    calls: Vec<CallId>,
    buffers: Vec<Buffer>,
}

impl Asked {
    /// One call, whose result is the answer.
    fn call(call: CallId) -> Self {
        Self { calls: vec![call], buffers: Vec::new() }
    }

    /// One call that writes the answer to a buffer.
    fn into(call: CallId, buffer: Buffer) -> Self {
        Self { calls: vec![call], buffers: vec![buffer] }
    }

    /// Returns the result of the first call.
    fn result(&self, answers: &Answers) -> Option<u64> {
        answers.result(*self.calls.first()?).ok()
    }

    /// Returns what the first call has written, if it succeeded.
    fn written<'a>(&self, answers: &'a Answers) -> Option<&'a [u8]> {
        self.result(answers)?;
        Some(answers.bytes(*self.buffers.first()?))
    }
}

/// A kind of attribute.
trait Kind: Sync {
    /// Its name in the images.
    fn name(&self) -> &'static str;

    /// What people call it, as in "... of thread 5".
    fn about(&self) -> &'static str;

    /// Whom it belongs to.
    fn scope(&self) -> Scope {
        Scope::Thread
    }

    /// Adds the questions that only the thread can answer.
    fn ask(&self, _script: &mut Script) -> Asked {
        Asked::default()
    }

    /// Returns what the thread has; `None` where the kernel or the machine has no such
    /// thing.
    fn read(&self, who: Who, asked: &Asked, answers: &Answers) -> Option<Vec<u64>>;

    /// Gives a thread that is stopped something else, by calls that it makes or from
    /// outside. What comes of it is looked at afterwards.
    ///
    /// # Errors
    /// Why it cannot be set from outside.
    fn set(&self, values: &[u64], who: Who, script: &mut Script) -> Result<(), Errno>;

    /// Whether it cannot be set at all, so that a dump warns of it.
    fn is_lost(&self, _values: &[u64]) -> bool {
        false
    }
}

/// What was asked of a thread about all kinds.
#[derive(Clone, Debug)]
struct Questions(Vec<(usize, Asked)>);

/// Returns the kinds that a thread has.
fn kinds(leader: bool) -> impl Iterator<Item = (usize, &'static dyn Kind)> {
    let all = KINDS.iter().copied().enumerate();
    all.filter(move |(_, kind)| leader || kind.scope() == Scope::Thread)
}

/// All attributes: a kind of state of a thread.
pub(super) struct Attributes;

impl thread::Kind for Attributes {
    fn ask(&self, of: Thread, script: &mut Script) -> Collect {
        let questions = ask(of.is_first(), script);
        Box::new(move |of, answers, core| {
            let who = Who { pid: of.of.witness, tid: of.of.tid, own_session: true };
            thread::own(core).rcriu_attributes = collect(&questions, answers, who);
            Ok(())
        })
    }

    fn set(&self, of: &Restored<'_>, calls: &mut Calls<'_>) -> Result<()> {
        let who = Who { pid: of.host_pid, tid: of.host_tid, own_session: of.own_session };
        let mut differences = of.own.differences.borrow_mut();
        differences.restore(of.core, who, &mut |script| calls.make(script))
    }
}

/// Adds the questions to a thread, or to the leader of its process.
fn ask(leader: bool, script: &mut Script) -> Questions {
    Questions(kinds(leader).map(|(at, kind)| (at, kind.ask(script))).collect())
}

/// Returns what an image says of the attributes of a thread.
fn collect(questions: &Questions, answers: &Answers, who: Who) -> Vec<proto::RcriuAttribute> {
    let read = |(at, asked): &(usize, Asked)| {
        let kind = KINDS[*at];
        let values = kind.read(who, asked, answers)?;
        if kind.is_lost(&values) {
            let (tid, about) = (who.tid, kind.about());
            let message = format!("thread {tid} has {about}: the restored one will not have it");
            tell(log::Level::Warn, &message);
        }
        Some(proto::RcriuAttribute { name: kind.name().into(), values })
    };
    questions.0.iter().filter_map(read).collect()
}

/// Leaves of the attributes in a core those that belong to the process.
pub(super) fn retain_of_process(attributes: &mut Vec<proto::RcriuAttribute>) {
    let of_thread = |name: &[u8]| {
        let mut kinds = KINDS.iter().filter(|kind| kind.scope() == Scope::Thread);
        kinds.any(|kind| kind.name().as_bytes() == name)
    };
    attributes.retain(|attribute| !of_thread(&attribute.name));
}

/// A kind by its place, the values that are wanted, and those that a thread has.
type Difference<'a> = (usize, &'a [u64], Option<Vec<u64>>);

/// What is not as it was, by what it is and how it differs: the threads.
#[derive(Debug, Default)]
pub struct Differences(BTreeMap<String, Vec<HostPid>>);

impl Differences {
    /// Gives a new thread the attributes of its core. `run` lets it make calls.
    ///
    /// # Errors
    /// What `run` returns.
    fn restore(
        &mut self,
        core: &proto::CoreEntry,
        who: Who,
        run: &mut dyn FnMut(&Script) -> Result<Answers>,
    ) -> Result<()> {
        let wanted = core.thread_core.iter().flat_map(|thread| &thread.rcriu_attributes);
        let wanted: BTreeMap<&[u8], &[u64]> =
            wanted.map(|one| (one.name.as_slice(), one.values.as_slice())).collect();
        if wanted.is_empty() {
            return Ok(());
        }
        let mut script = Script::new();
        let questions = ask(who.pid == who.tid, &mut script);
        let known = |name: &[u8]| {
            let mut names = KINDS.iter().map(|kind| kind.name()).chain(memory::NAMES);
            names.any(|known| known.as_bytes() == name)
        };
        for name in wanted.keys().filter(|name| !known(name)) {
            let name = String::from_utf8_lossy(name);
            self.add(format!("{name} of the images is unknown to this program"), who.tid);
        }
        let differing = |answers: &Answers| -> Vec<Difference<'_>> {
            let one = |(at, asked): &(usize, Asked)| {
                let values = *wanted.get(KINDS[*at].name().as_bytes())?;
                let now = KINDS[*at].read(who, asked, answers);
                (now.as_deref() != Some(values)).then_some((*at, values, now))
            };
            questions.0.iter().filter_map(one).collect()
        };
        let answers = run(&script)?;
        let to_set = differing(&answers);
        if to_set.is_empty() {
            return Ok(());
        }
        let mut changes = Script::new();
        for (at, values, _) in &to_set {
            if let Err(errno) = KINDS[*at].set(values, who, &mut changes) {
                log::debug!("{}: {}: {errno}", who.tid, KINDS[*at].about());
            }
        }
        if !changes.is_empty() {
            run(&changes)?;
        }
        let answers = run(&script)?;
        for (at, values, now) in differing(&answers) {
            let kind = KINDS[at];
            let now =
                now.map_or("does not exist here".to_owned(), |now| format!("is {}", show(&now)));
            self.add(format!("{} was {} and {now}", kind.about(), show(values)), who.tid);
        }
        Ok(())
    }

    fn add(&mut self, what: String, tid: HostPid) {
        self.0.entry(what).or_default().push(tid);
    }

    /// Says what is not as it was.
    pub fn tell(&self) {
        for (what, threads) in &self.0 {
            let others = match threads.len() - 1 {
                0 => String::new(),
                more => format!(" and {more} more"),
            };
            let message = format!(
                "not as it was: in thread {}{others}, {what}; the program may notice",
                threads[0]
            );
            tell(log::Level::Warn, &message);
        }
    }
}

fn show(values: &[u64]) -> String {
    let texts: Vec<_> = values.iter().map(|value| format!("{value:#x}")).collect();
    texts.join(",")
}
