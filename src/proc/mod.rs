//! Reads `/proc`: pure parsers, and thin readers that use them.
//!
//! Every reader opens its file anew. Two results about a process are consistent only if the process
//! is stopped, and describe the same process only if it is known to have existed all the time.
//! All readers fail with [`ProcError::Vanished`] if the process does not exist, with
//! [`ProcError::Denied`] if the caller may not examine it, and with [`ProcError::Malformed`] if the
//! text is not in the kernel's format. Source files named here are those of Linux 6.18.

mod btf;
mod descriptors;
mod error;
mod fdinfo;
mod flags;
mod locks;
mod maps;
mod mounts;
mod net;
mod stat;
mod status;
mod tables;
mod tasks;
#[cfg(test)]
mod tests;
mod text;
mod watches;

use std::{
    fs::{self, File},
    io::Read,
    os::unix::ffi::OsStringExt,
    path::{Path, PathBuf},
};

pub(crate) use self::fdinfo::parse_fdinfo;
use self::text::Parsed;
pub use self::{
    btf::Btf,
    descriptors::Descriptors,
    error::{ProcError, Result},
    fdinfo::{EpollTarget, FdDetail, FdInfo},
    flags::VmFlags,
    locks::{FileLock, LockKind, LockMode},
    maps::Mapping,
    mounts::{Mount, NoCgroup, cgroup_directory},
    net::{MulticastGroup, RawSocket, multicast_groups, raw_sockets},
    stat::Stat,
    status::{Ids, Status},
    tables::{Cgroup, LIMITS, Notify, PosixTimer, UNLIMITED},
    tasks::{children, fds, pids, threads},
    watches::{
        FanotifyGroup, FanotifyMark, FanotifyObject, FileHandle, InotifyWatch, WatchedInode,
    },
};
use crate::units::{HostPid, IdRange, TargetFd};

/// The audit login id that means "not set".
const NO_LOGINUID: u32 = u32::MAX;

/// Returns the clock ticks per second of [`Stat::start_time`]: `USER_HZ`
/// (`include/asm-generic/param.h`), which is part of the ABI of x86-64.
pub const fn clock_ticks_per_second() -> u64 {
    100
}

/// Reads `/proc/PID/status`.
///
/// # Errors
///
/// See the [module](self).
pub fn status(pid: HostPid) -> Result<Status> {
    read(of_process(pid, "status"), Status::parse)
}

/// Reads `/proc/PID/task/TID/status`.
///
/// # Errors
///
/// See the [module](self).
pub fn thread_status(pid: HostPid, tid: HostPid) -> Result<Status> {
    read(of_thread(pid, tid, "status"), Status::parse)
}

/// Reads `/proc/PID/stat`.
///
/// # Errors
///
/// See the [module](self).
pub fn stat(pid: HostPid) -> Result<Stat> {
    read(of_process(pid, "stat"), Stat::parse)
}

/// Reads `/proc/PID/task/TID/stat`.
///
/// # Errors
///
/// See the [module](self).
pub fn thread_stat(pid: HostPid, tid: HostPid) -> Result<Stat> {
    read(of_thread(pid, tid, "stat"), Stat::parse)
}

/// Reads `/proc/PID/smaps`: the mappings with their flags and sizes, by address.
/// Empty for zombies and kernel threads.
///
/// The kernel walks the page tables for this: [`maps`] is much cheaper.
///
/// # Errors
///
/// See the [module](self).
pub fn smaps(pid: HostPid) -> Result<Vec<Mapping>> {
    read(of_process(pid, "smaps"), maps::parse_smaps)
}

/// Reads `/proc/PID/maps`: the mappings without flags and sizes, by address.
/// Empty for zombies and kernel threads.
///
/// # Errors
///
/// See the [module](self).
pub fn maps(pid: HostPid) -> Result<Vec<Mapping>> {
    read(of_process(pid, "maps"), maps::parse_maps)
}

/// Reads `/proc/PID/fdinfo/FD`.
///
/// # Errors
///
/// See the [module](self).
pub fn fdinfo(pid: HostPid, fd: TargetFd) -> Result<FdInfo> {
    read(of_process(pid, "fdinfo").join(fd.to_string()), parse_fdinfo)
}

/// Reads the link `/proc/PID/fd/FD`: a path, or a name such as `pipe:[43554]` or
/// `anon_inode:[eventfd]`.
///
/// # Errors
///
/// See the [module](self).
pub fn fd_link(pid: HostPid, fd: TargetFd) -> Result<Vec<u8>> {
    read_link(&of_process(pid, "fd").join(fd.to_string()))
}

/// Returns the metadata of the file behind a descriptor.
///
/// # Errors
///
/// See the [module](self).
pub fn fd_metadata(pid: HostPid, fd: TargetFd) -> Result<fs::Metadata> {
    let path = of_process(pid, "fd").join(fd.to_string());
    fs::metadata(&path).map_err(|source| ProcError::from_io(&path, source))
}

/// Reads `/proc/PID/limits`: the soft and the hard limit of each `RLIMIT_*`, by number, or
/// [`UNLIMITED`]. Units are those of `setrlimit(2)`.
///
/// # Errors
///
/// See the [module](self).
pub fn limits(pid: HostPid) -> Result<[(u64, u64); LIMITS]> {
    read(of_process(pid, "limits"), tables::parse_limits)
}

/// Reads `/proc/PID/timers`: the timers that the process has created with `timer_create(2)`.
///
/// # Errors
///
/// See the [module](self). Kernels without `CONFIG_CHECKPOINT_RESTORE` lack this file, so the error
/// is [`ProcError::Vanished`].
pub fn timers(pid: HostPid) -> Result<Vec<PosixTimer>> {
    read(of_process(pid, "timers"), tables::parse_timers)
}

/// Reads `/proc/PID/auxv`: the words of the auxiliary vector, alternating keys and values, including
/// the pair of zeros at the end. Empty for zombies.
///
/// # Errors
///
/// See the [module](self).
pub fn auxv(pid: HostPid) -> Result<Vec<u64>> {
    read(of_process(pid, "auxv"), tables::parse_auxv)
}

/// Reads `/proc/PID/cmdline`: the arguments, each with its NUL byte unless the process has overwritten
/// them. Empty for zombies and kernel threads.
///
/// # Errors
///
/// See the [module](self).
pub fn cmdline(pid: HostPid) -> Result<Vec<u8>> {
    read_bytes(&of_process(pid, "cmdline"))
}

/// Reads `/proc/PID/task/TID/comm`: the name of the thread, unescaped.
///
/// # Errors
///
/// See the [module](self).
pub fn comm(pid: HostPid, tid: HostPid) -> Result<Vec<u8>> {
    read(of_thread(pid, tid, "comm"), |text| Ok(text::without_line_feed(text).to_vec()))
}

/// Reads `/proc/PID/oom_score_adj`: -1000 to 1000.
///
/// # Errors
///
/// See the [module](self).
pub fn oom_score_adj(pid: HostPid) -> Result<i32> {
    read(of_process(pid, "oom_score_adj"), |text| text::signed(text, "oom_score_adj"))
}

/// Reads `/proc/PID/personality`: the bits of `personality(2)`.
///
/// # Errors
///
/// See the [module](self).
pub fn personality(pid: HostPid) -> Result<u32> {
    read(of_process(pid, "personality"), |text| text::unsigned(text, 16, "personality"))
}

/// Reads `/proc/PID/loginuid`: the audit user id; `None` if it was never set or the kernel has no
/// audit.
///
/// # Errors
///
/// See the [module](self).
pub fn loginuid(pid: HostPid) -> Result<Option<u32>> {
    let path = of_process(pid, "loginuid");
    match read(path, |text| text::unsigned(text, 10, "loginuid")) {
        Ok(uid) => Ok(Some(uid).filter(|&uid| uid != NO_LOGINUID)),
        Err(error) if error.is_vanished() => {
            // A kernel without audit lacks the file. Check that the process exists.
            stat(pid)?;
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// Reads `/proc/PID/sessionid`: the number of the audit session; 4294967295 if there is none.
///
/// # Errors
///
/// See the [module](self).
pub fn session_id(pid: HostPid) -> Result<u32> {
    read(of_process(pid, "sessionid"), |text| text::unsigned(text, 10, "sessionid"))
}

/// Reads the link `/proc/PID/ns/KIND` and returns the inode of the namespace.
///
/// `kind` is `mnt`, `pid`, `net`, `user` and so on. For a kind that the kernel does not have, the
/// error is [`ProcError::Vanished`].
///
/// # Errors
///
/// See the [module](self).
pub fn namespace(pid: HostPid, kind: &str) -> Result<u64> {
    let path = of_process(pid, "ns").join(kind);
    parse(&path, &read_link(&path)?, tables::parse_namespace)
}

/// Like [`namespace`], for one thread.
///
/// # Errors
///
/// See the [module](self).
pub fn thread_namespace(pid: HostPid, tid: HostPid, kind: &str) -> Result<u64> {
    let path = of_thread(pid, tid, "ns").join(kind);
    parse(&path, &read_link(&path)?, tables::parse_namespace)
}

/// Whether a process is in another namespace of a kind than this program. It is not if the kernel does
/// not have the kind, or if the process is gone.
pub fn is_in_other_namespace(pid: HostPid, kind: &str) -> bool {
    let pair = [HostPid::own(), pid].map(|pid| namespace(pid, kind).ok());
    matches!(pair, [Some(ours), Some(theirs)] if ours != theirs)
}

/// Reads `/proc/PID/timens_offsets`: how far the clocks of the time namespace for the children of a
/// process are ahead of those of the first one, in nanoseconds: `CLOCK_MONOTONIC`, then
/// `CLOCK_BOOTTIME`. Since Linux 5.6.
///
/// # Errors
///
/// See the [module](self).
pub fn time_offsets(pid: HostPid) -> Result<[i64; 2]> {
    read(of_process(pid, "timens_offsets"), tables::parse_time_offsets)
}

/// Reads `/proc/PID/uid_map`: the users of the user namespace of a process. The ids outside are those of
/// the user namespace of this program, or of the parent of that of the process if both share it; -1 if there is none.
///
/// # Errors
///
/// See the [module](self).
pub fn user_map(pid: HostPid) -> Result<Vec<IdRange>> {
    read(of_process(pid, "uid_map"), tables::parse_id_map)
}

/// Reads `/proc/PID/gid_map`: the groups, as in [`user_map`].
///
/// # Errors
///
/// See the [module](self).
pub fn group_map(pid: HostPid) -> Result<Vec<IdRange>> {
    read(of_process(pid, "gid_map"), tables::parse_id_map)
}

/// Reads a link of `/proc/PID`: `exe`, `cwd` or `root`. Zombies and kernel threads have none.
///
/// The path is relative to the caller's root. ` (deleted)` follows the path of a deleted file.
///
/// # Errors
///
/// See the [module](self).
pub fn link(pid: HostPid, what: &str) -> Result<Vec<u8>> {
    read_link(&of_process(pid, what))
}

/// Reads `/proc/PID/cgroup`.
///
/// # Errors
///
/// See the [module](self).
pub fn cgroups(pid: HostPid) -> Result<Vec<Cgroup>> {
    read(of_process(pid, "cgroup"), tables::parse_cgroups)
}

/// Reads `/proc/PID/task/TID/cgroup`.
///
/// # Errors
///
/// See the [module](self).
pub fn thread_cgroups(pid: HostPid, tid: HostPid) -> Result<Vec<Cgroup>> {
    read(of_thread(pid, tid, "cgroup"), tables::parse_cgroups)
}

/// Reads `/proc/locks`: the locks of all processes that the pid namespace of `/proc` shows.
///
/// # Errors
///
/// See the [module](self).
pub fn locks() -> Result<Vec<FileLock>> {
    read(PathBuf::from("/proc/locks"), locks::parse_locks)
}

/// Reads `/proc/self/mountinfo`.
///
/// # Errors
///
/// See the [module](self).
pub fn mounts() -> Result<Vec<Mount>> {
    read("/proc/self/mountinfo".into(), mounts::parse_mounts)
}

/// Reads `/proc/PID/mountinfo`: the mounts that a process can reach.
///
/// # Errors
///
/// See the [module](self).
pub fn mounts_of(pid: HostPid) -> Result<Vec<Mount>> {
    read(of_process(pid, "mountinfo"), mounts::parse_mounts)
}

/// Parses the text of a `mountinfo` file.
///
/// # Errors
///
/// See the [module](self).
pub fn mounts_in(text: &[u8]) -> Result<Vec<Mount>> {
    mounts::parse_mounts(text)
        .map_err(|defect| ProcError::malformed(Path::new("mountinfo"), defect))
}

/// Reads `/proc/PID/task/TID/syscall`, unparsed: `running`, or the number of the system call (-1
/// outside of one), its six arguments, the stack pointer and the instruction pointer.
///
/// # Errors
///
/// See the [module](self).
pub fn syscall(pid: HostPid, tid: HostPid) -> Result<Vec<u8>> {
    read_bytes(&of_thread(pid, tid, "syscall"))
}

/// Returns a path to open the file of a mapping by.
pub fn map_file(pid: HostPid, mapping: &Mapping) -> PathBuf {
    let (start, end) = (mapping.start.0, mapping.end.0);
    of_process(pid, &format!("map_files/{start:x}-{end:x}"))
}

/// Returns the path of a file of a process.
fn of_process(pid: HostPid, file: &str) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}/{file}"))
}

/// Returns the path of a file of a thread.
fn of_thread(pid: HostPid, tid: HostPid, file: &str) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}/task/{tid}/{file}"))
}

/// Reads and parses a file.
fn read<T>(path: PathBuf, parser: impl FnOnce(&[u8]) -> Parsed<T>) -> Result<T> {
    parse(&path, &read_bytes(&path)?, parser)
}

/// Parses the text that was read from `path`.
fn parse<T>(path: &Path, bytes: &[u8], parser: impl FnOnce(&[u8]) -> Parsed<T>) -> Result<T> {
    parser(bytes).map_err(|defect| ProcError::malformed(path, defect))
}

fn read_bytes(path: &Path) -> Result<Vec<u8>> {
    File::open(path).and_then(read_all).map_err(|source| ProcError::from_io(path, source))
}

fn read_all(file: File) -> std::io::Result<Vec<u8>> {
    // Most files have less than a page.
    let mut bytes = Vec::with_capacity(4096);
    // A plain file would be asked for its size first, which is 0 here.
    file.take(u64::MAX).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn read_link(path: &Path) -> Result<Vec<u8>> {
    let target = fs::read_link(path).map_err(|source| ProcError::from_io(path, source))?;
    Ok(target.into_os_string().into_vec())
}
