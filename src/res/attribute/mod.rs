//! Attributes of processes and threads that CRIU's images have no field for.
//!
//! Each kind is a file, or a row of `prctls`, with both directions, and a row of `KINDS`. The dump
//! records the attributes of every thread. The restore reads those of the new thread, sets the
//! ones that differ, reads them again, and warns about those that still differ.
//!
//! The images store them as an extension, `thread_core_entry.rcriu_attributes`, which CRIU
//! ignores. Images from CRIU do not have it; their threads inherit the attributes of `rcriu`.

mod affinity;
#[cfg(target_arch = "x86_64")]
mod arch;
mod autogroup;
mod core_cookie;
mod core_filter;
mod dispatch;
mod futex_hash;
mod io_flusher;
mod io_priority;
mod keyrings;
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
    task,
    thread::{self, Collect, Exited, Restored, Thread},
};
use crate::{
    causes::tell,
    image::proto,
    inject::{Answers, Buffer, CallId, Script},
    units::HostPid,
};

/// All kinds, in the order in which they are set.
const KINDS: &[&dyn Kind] = &[
    // Scheduling comes first: setting the policy changes other attributes.
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
    &futex_hash::FutexHash,
    &autogroup::Autogroup,
    &core_cookie::CoreCookie,
    &dispatch::Dispatch,
    &keyrings::OF_THREAD,
    &keyrings::OF_PROCESS,
];

/// The owner of an attribute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scope {
    /// Each thread.
    Thread,
    /// The process. The images store the attribute with its leader.
    Process,
}

/// The names of an attribute, and what has it.
#[derive(Clone, Copy, Debug)]
struct Label {
    /// Its name in the images.
    name: &'static str,
    /// Its name in messages, as in "... of thread 5".
    about: &'static str,
    scope: Scope,
}

impl Label {
    const fn of_thread(name: &'static str, about: &'static str) -> Self {
        Self { name, about, scope: Scope::Thread }
    }

    const fn of_process(name: &'static str, about: &'static str) -> Self {
        Self { name, about, scope: Scope::Process }
    }
}

/// The thread or process whose attributes are read or set.
#[derive(Clone, Copy, Debug)]
struct Owner {
    /// The process.
    pid: HostPid,
    /// The thread.
    tid: HostPid,
    /// Whether its session belongs to the tree. Otherwise it is the restorer's session.
    session_in_tree: bool,
}

/// The calls that a thread makes to report one attribute.
#[derive(Clone, Debug, Default)]
struct Asked {
    calls: Vec<CallId>,
    buffers: Vec<Buffer>,
}

impl Asked {
    /// One call, which returns the value.
    fn call(call: CallId) -> Self {
        Self { calls: vec![call], buffers: Vec::new() }
    }

    /// One call, which writes the value to a buffer.
    fn into(call: CallId, buffer: Buffer) -> Self {
        Self { calls: vec![call], buffers: vec![buffer] }
    }

    /// Returns the result of the first call.
    fn result(&self, answers: &Answers) -> Option<u64> {
        answers.result(*self.calls.first()?).ok()
    }

    /// Returns the buffer that the first call has filled, if the call succeeded.
    fn written<'a>(&self, answers: &'a Answers) -> Option<&'a [u8]> {
        self.result(answers)?;
        Some(answers.bytes(*self.buffers.first()?))
    }
}

/// A kind of attribute.
trait Kind: Sync {
    /// Names the attribute, and what has it.
    fn label(&self) -> Label;

    /// Adds the calls that only the thread can make.
    fn ask(&self, _script: &mut Script) -> Asked {
        Asked::default()
    }

    /// Returns the value; `None` if this kernel or machine does not have the attribute.
    fn read(&self, owner: Owner, asked: &Asked, answers: &Answers) -> Option<Vec<u64>>;

    /// Sets the value in a stopped thread, by calls that it makes or from outside. The caller
    /// reads the value again afterwards.
    ///
    /// # Errors
    /// A call from outside failed.
    fn set(&self, values: &[u64], owner: Owner, script: &mut Script) -> Result<(), Errno>;

    /// Whether no restore can set this value, so the dump warns about it.
    fn is_lost(&self, _values: &[u64]) -> bool {
        false
    }
}

/// The calls that a thread makes to report all its attributes: index in [`KINDS`], calls.
#[derive(Clone, Debug)]
struct Questions(Vec<(usize, Asked)>);

/// Returns the kinds that a thread reports; the leader also reports those of its process.
fn kinds(leader: bool) -> impl Iterator<Item = (usize, &'static dyn Kind)> {
    let all = KINDS.iter().copied().enumerate();
    all.filter(move |(_, kind)| leader || kind.label().scope == Scope::Thread)
}

/// Adds an attribute of a process.
pub(super) fn add(found: &mut Vec<proto::RcriuAttribute>, name: &str, values: Vec<u64>) {
    found.push(proto::RcriuAttribute { name: name.into(), values });
}

/// Returns the values of all attributes with a name.
pub(super) fn values<'a>(
    core: &'a proto::CoreEntry,
    name: &str,
) -> impl Iterator<Item = &'a [u64]> {
    let all = core.thread_core.iter().flat_map(|thread| &thread.rcriu_attributes);
    let name = name.as_bytes().to_vec();
    all.filter(move |of| of.name == name).map(|of| of.values.as_slice())
}

/// All attributes, as one kind of thread state.
pub(super) struct Attributes;

impl thread::Kind for Attributes {
    fn ask(&self, of: Thread, script: &mut Script) -> Collect {
        let questions = ask(of.is_first(), script);
        Box::new(move |of, answers, core| {
            let owner = Owner { pid: of.of.witness, tid: of.of.tid, session_in_tree: true };
            thread::own(core).rcriu_attributes = collect(&questions, answers, owner);
            Ok(())
        })
    }

    fn exited(&self, _: &Exited<'_>, core: &mut proto::CoreEntry) -> Result<()> {
        retain_of_process(&mut thread::own(core).rcriu_attributes);
        Ok(())
    }

    fn set(&self, of: &Restored<'_>, calls: &mut Calls<'_>) -> Result<()> {
        let owner =
            Owner { pid: of.host_pid, tid: of.host_tid, session_in_tree: of.session_in_tree };
        let mut differences = of.own.differences.borrow_mut();
        differences.restore(of.core, owner, &mut |script| calls.make(script))
    }
}

/// Adds the calls by which a thread reports its attributes.
fn ask(leader: bool, script: &mut Script) -> Questions {
    Questions(kinds(leader).map(|(at, kind)| (at, kind.ask(script))).collect())
}

/// Builds the image entries for the attributes of a thread.
fn collect(questions: &Questions, answers: &Answers, owner: Owner) -> Vec<proto::RcriuAttribute> {
    let read = |(at, asked): &(usize, Asked)| {
        let kind = KINDS[*at];
        let values = kind.read(owner, asked, answers)?;
        if kind.is_lost(&values) {
            let (tid, about) = (owner.tid, kind.label().about);
            let message = format!("thread {tid} has {about}: the restored thread will not have it");
            tell(log::Level::Warn, &message);
        }
        Some(proto::RcriuAttribute { name: kind.label().name.into(), values })
    };
    questions.0.iter().filter_map(read).collect()
}

/// Removes the attributes that do not belong to the process.
fn retain_of_process(attributes: &mut Vec<proto::RcriuAttribute>) {
    let of_thread = |name: &[u8]| {
        let mut kinds = KINDS.iter().filter(|kind| kind.label().scope == Scope::Thread);
        kinds.any(|kind| kind.label().name.as_bytes() == name)
    };
    attributes.retain(|attribute| !of_thread(&attribute.name));
}

/// Index in [`KINDS`], the recorded values, and the values that the thread has.
type Difference<'a> = (usize, &'a [u64], Option<Vec<u64>>);

/// Attributes that could not be restored, described, with the threads concerned.
#[derive(Debug, Default)]
pub struct Differences(BTreeMap<String, Vec<HostPid>>);

impl Differences {
    /// Gives a new thread the attributes in its core. `run` has the thread make calls.
    fn restore(
        &mut self,
        core: &proto::CoreEntry,
        owner: Owner,
        run: &mut dyn FnMut(&Script) -> Result<Answers>,
    ) -> Result<()> {
        let wanted = core.thread_core.iter().flat_map(|thread| &thread.rcriu_attributes);
        let wanted: BTreeMap<&[u8], &[u64]> =
            wanted.map(|one| (one.name.as_slice(), one.values.as_slice())).collect();
        if wanted.is_empty() {
            return Ok(());
        }
        let mut script = Script::new();
        let questions = ask(owner.pid == owner.tid, &mut script);
        let known = |name: &[u8]| {
            let of_tasks = task::KINDS.iter().flat_map(|kind| kind.attributes()).copied();
            let mut names = KINDS.iter().map(|kind| kind.label().name).chain(of_tasks);
            names.any(|known| known.as_bytes() == name)
        };
        for name in wanted.keys().filter(|name| !known(name)) {
            let name = String::from_utf8_lossy(name);
            self.add(
                format!("the attribute {name} of the images is unknown to this rcriu"),
                owner.tid,
            );
        }
        let differing = |answers: &Answers| -> Vec<Difference<'_>> {
            let one = |(at, asked): &(usize, Asked)| {
                let values = *wanted.get(KINDS[*at].label().name.as_bytes())?;
                let now = KINDS[*at].read(owner, asked, answers);
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
            if let Err(errno) = KINDS[*at].set(values, owner, &mut changes) {
                log::debug!("{}: {}: {errno}", owner.tid, KINDS[*at].label().about);
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
            self.add(format!("{} was {} but {now}", kind.label().about, show(values)), owner.tid);
        }
        Ok(())
    }

    pub(super) fn add(&mut self, what: String, tid: HostPid) {
        self.0.entry(what).or_default().push(tid);
    }

    /// Warns about attributes that could not be restored.
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
