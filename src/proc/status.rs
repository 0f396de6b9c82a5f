//! `/proc/PID/status`: identity, signals and capabilities of a task.

use super::text::{self, Defect, Fields, Parsed};
use crate::units::{HostId, HostPid, IdMap, NsId};

/// The four user ids, or the four group ids, of a task.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Ids {
    /// The real id.
    pub real: u32,
    /// The effective id.
    pub effective: u32,
    /// The saved set-id.
    pub saved: u32,
    /// The file system id.
    pub fs: u32,
}

/// A task as `/proc/PID/status` shows it (`proc_pid_status`, `fs/proc/array.c`).
///
/// User and group ids are those of the caller's user namespace. In sets of signals, bit `N - 1`
/// stands for signal `N`; in sets of capabilities, bit `N` for capability `N`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// The name of the task, without escapes: at most 15 bytes, but more for a kernel thread.
    pub name: Vec<u8>,
    /// The umask, 0 to 0o777; since Linux 4.7, and not for zombies.
    pub umask: Option<u32>,
    /// The state: one of `RSDTtXZPI`.
    pub state: char,
    /// The pid of the process.
    pub tgid: HostPid,
    /// The tid of the task; for the leader, the pid of the process.
    pub pid: HostPid,
    /// The pid of the parent process; 0 if it is outside the pid namespace.
    pub ppid: HostPid,
    /// The pid of the tracer; 0 without one.
    pub tracer_pid: HostPid,
    /// The user ids.
    pub uids: Ids,
    /// The group ids.
    pub gids: Ids,
    /// The size of the descriptor table; 0 for zombies.
    pub fd_size: u32,
    /// The supplementary groups, in ascending order.
    pub groups: Vec<u32>,
    /// The pid of the process in the pid namespace of this `/proc` and in those nested inside;
    /// empty before Linux 4.1.
    pub ns_tgid: Vec<i32>,
    /// The tid of the task in each of these namespaces.
    pub ns_pid: Vec<i32>,
    /// The process group in each of these namespaces.
    pub ns_pgid: Vec<i32>,
    /// The session in each of these namespaces.
    pub ns_sid: Vec<i32>,
    /// The number of threads of the process; 0 if it has exited.
    pub threads: u32,
    /// The number of signals queued for the user, and its limit.
    pub sig_queued: (u64, u64),
    /// The signals pending for the task.
    pub sig_pending: u64,
    /// The signals pending for the process.
    pub shared_pending: u64,
    /// The signals that the task blocks.
    pub sig_blocked: u64,
    /// The signals that the process ignores.
    pub sig_ignored: u64,
    /// The signals that the process handles.
    pub sig_caught: u64,
    /// The inheritable capabilities.
    pub cap_inheritable: u64,
    /// The permitted capabilities.
    pub cap_permitted: u64,
    /// The effective capabilities.
    pub cap_effective: u64,
    /// The capability bounding set.
    pub cap_bounding: u64,
    /// The ambient capabilities; 0 before Linux 4.3.
    pub cap_ambient: u64,
    /// Whether `execve(2)` cannot grant privileges; false before Linux 4.10, which does not
    /// report it.
    pub no_new_privs: bool,
    /// The seccomp mode: 0 disabled, 1 strict, 2 filter; 0 on kernels without seccomp.
    pub seccomp: u32,
    /// The number of seccomp filters of the task; since Linux 5.9.
    pub seccomp_filters: Option<u32>,
    /// Whether the process may use transparent huge pages (`PR_SET_THP_DISABLE`); since Linux
    /// 5.0, and not for zombies.
    pub thp_enabled: Option<bool>,
    /// Whether the thread has a shadow stack (`x86_Thread_features`, since Linux 6.6).
    pub shadow_stack: bool,
    /// The resident memory in KiB; not for zombies and kernel threads.
    pub vm_rss_kib: Option<u64>,
    /// The page tables in KiB; not for zombies and kernel threads.
    pub vm_pte_kib: Option<u64>,
    /// The locked memory in KiB; not for zombies and kernel threads.
    pub vm_lck_kib: Option<u64>,
    /// The memory pinned by devices and io_uring in KiB; not for zombies and kernel threads.
    pub vm_pin_kib: Option<u64>,
}

impl Status {
    /// Returns it with the user and group ids of the images.
    pub fn inside(self, ids: &IdMap) -> Self {
        let of = |mut all: Ids, inside: &dyn Fn(HostId) -> NsId| {
            for id in [&mut all.real, &mut all.effective, &mut all.saved, &mut all.fs] {
                *id = inside(HostId(*id)).0;
            }
            all
        };
        let group = |id| ids.ns_group(id);
        Self {
            uids: of(self.uids, &|id| ids.ns_user(id)),
            gids: of(self.gids, &group),
            groups: self.groups.into_iter().map(|id| group(HostId(id)).0).collect(),
            ..self
        }
    }

    /// Parses the text of the file.
    pub(super) fn parse(text: &[u8]) -> Parsed<Self> {
        let fields = Fields::parse(text);
        let state = fields.required("State")?;
        let optional_u32 = |key| fields.get(key).map(|value| text::unsigned(value, 10, key));
        let namespaces = |key| text::numbers(fields.get(key).unwrap_or_default(), key);
        let bits = |key| text::unsigned(fields.required(key)?, 16, key);
        let pid = |key| text::signed(fields.required(key)?, key).map(HostPid);
        Ok(Self {
            name: text::undo_name_escapes(fields.required("Name")?),
            umask: fields
                .get("Umask")
                .map(|value| text::unsigned(value, 8, "Umask"))
                .transpose()?,
            state: text::words(state)
                .next()
                .and_then(<[u8]>::first)
                .map(|&letter| char::from(letter))
                .ok_or_else(|| Defect::new("State", state))?,
            tgid: pid("Tgid")?,
            pid: pid("Pid")?,
            ppid: pid("PPid")?,
            tracer_pid: pid("TracerPid")?,
            uids: ids(fields.required("Uid")?, "Uid")?,
            gids: ids(fields.required("Gid")?, "Gid")?,
            fd_size: text::unsigned(fields.required("FDSize")?, 10, "FDSize")?,
            groups: text::numbers(fields.required("Groups")?, "Groups")?,
            ns_tgid: namespaces("NStgid")?,
            ns_pid: namespaces("NSpid")?,
            ns_pgid: namespaces("NSpgid")?,
            ns_sid: namespaces("NSsid")?,
            threads: text::unsigned(fields.required("Threads")?, 10, "Threads")?,
            sig_queued: queued(fields.required("SigQ")?)?,
            sig_pending: bits("SigPnd")?,
            shared_pending: bits("ShdPnd")?,
            sig_blocked: bits("SigBlk")?,
            sig_ignored: bits("SigIgn")?,
            sig_caught: bits("SigCgt")?,
            cap_inheritable: bits("CapInh")?,
            cap_permitted: bits("CapPrm")?,
            cap_effective: bits("CapEff")?,
            cap_bounding: bits("CapBnd")?,
            cap_ambient: match fields.get("CapAmb") {
                Some(value) => text::unsigned(value, 16, "CapAmb")?,
                None => 0,
            },
            no_new_privs: optional_u32("NoNewPrivs")
                .transpose()?
                .is_some_and(|value: u32| value != 0),
            seccomp: optional_u32("Seccomp").transpose()?.unwrap_or(0),
            seccomp_filters: optional_u32("Seccomp_filters").transpose()?,
            thp_enabled: optional_u32("THP_enabled").transpose()?.map(|value: u32| value != 0),
            shadow_stack: fields
                .get("x86_Thread_features")
                .is_some_and(|value| text::words(value).any(|word| word == b"shstk")),
            vm_rss_kib: fields.get("VmRSS").map(|value| kib(value, "VmRSS")).transpose()?,
            vm_pte_kib: fields.get("VmPTE").map(|value| kib(value, "VmPTE")).transpose()?,
            vm_lck_kib: fields.get("VmLck").map(|value| kib(value, "VmLck")).transpose()?,
            vm_pin_kib: fields.get("VmPin").map(|value| kib(value, "VmPin")).transpose()?,
        })
    }
}

/// Parses the four ids in a line.
fn ids(value: &[u8], what: &'static str) -> Parsed<Ids> {
    match text::numbers(value, what)?[..] {
        [real, effective, saved, fs] => Ok(Ids { real, effective, saved, fs }),
        _ => Err(Defect::new(what, value)),
    }
}

/// Parses `QUEUED/LIMIT`.
fn queued(value: &[u8]) -> Parsed<(u64, u64)> {
    const WHAT: &str = "SigQ";
    let (queued, limit) = text::split_once(value, b'/').ok_or_else(|| Defect::new(WHAT, value))?;
    Ok((text::unsigned(queued, 10, WHAT)?, text::unsigned(limit, 10, WHAT)?))
}

/// Parses `  1728 kB`.
fn kib(value: &[u8], what: &'static str) -> Parsed<u64> {
    let number = value.trim_ascii().strip_suffix(b"kB").ok_or_else(|| Defect::new(what, value))?;
    text::unsigned(number, 10, what)
}
