//! Pidfds: descriptors of processes and threads (`pidfd_open(2)`).
//!
//! The restore opens a pidfd of a process of the tree once that process exists. A pidfd of a process
//! that is gone has no number: the restore creates a process that ends in the same way, and opens
//! the pidfd before it ends. Pidfds of one process have the same inode (Linux 6.9), by which the
//! images group them. The restored inode is a different one.

use std::{
    collections::BTreeMap,
    os::fd::{AsFd, OwnedFd},
};

use nix::{errno::Errno, libc};

use super::{
    Collector, Deferred, Description, FileError, FileKind, Intake, Opened, Opener, Result, Usage,
    deferred, descriptor,
};
use crate::{
    image::proto::{self, FdTypes, PidfdEntry},
    proc::FdDetail,
    sys::process::{self, End},
    units::{HostPid, NsPid},
};

pub(super) const KIND: FileKind = FileKind {
    name: "pidfd",
    types: &[FdTypes::Pidfd],
    usage: Usage::Descriptor,
    collector: |_| Box::new(Pidfds),
    opener: |_| Box::new(Pidfds),
};

/// The pid that the kernel and the images give to a process that was reaped.
const GONE: i32 = -1;

/// The pid that the kernel shows for a process in another pid namespace.
const ELSEWHERE: i32 = 0;

/// `PIDFD_THREAD` (`linux/pidfd.h`, since Linux 6.9).
const THREAD: u32 = libc::O_EXCL.cast_unsigned();

struct Pidfds;

impl Collector for Pidfds {
    fn claims(&self, file: &Description) -> bool {
        file.is_anonymous("[pidfd]")
    }

    fn collect(&mut self, file: &Description, intake: &mut dyn Intake) -> Result<proto::FileEntry> {
        let FdDetail::PidFd { pid, .. } = file.info.detail else {
            return Err(file.failed("read the pid of")(Errno::ENODATA));
        };
        let mut status = None;
        let nspid = match pid {
            GONE => {
                status = process::end(&file.fd).status();
                GONE
            }
            ELSEWHERE => {
                let what = "a pidfd of a process in another pid namespace";
                return Err(file.unsupported(what, "have the program close it"));
            }
            pid => {
                let of = intake.pids().ns(HostPid(pid));
                if !intake.has_process(of) {
                    let what = format!("a pidfd of process {pid}, which is not in the tree");
                    let help = "dump a tree that has both processes, or have the program close it";
                    return Err(file.unsupported(what, help));
                }
                of.raw()
            }
        };
        // Inodes have 64 bits; the format has room for what tells those of one machine apart.
        let ino = file.info.ino.unwrap_or(0) & u64::from(u32::MAX);
        let access = libc::O_RDWR.cast_unsigned();
        Ok(proto::FileEntry {
            r#type: FdTypes::Pidfd.into(),
            id: file.id,
            pidfd: Some(PidfdEntry {
                id: file.id,
                ino: u32::try_from(ino).expect("32 bits"),
                flags: file.status() & !access,
                nspid,
                fown: file.fown,
                rcriu_status: status,
            }),
            ..Default::default()
        })
    }
}

impl Opener for Pidfds {
    fn open(&mut self, entries: &[proto::FileEntry], opened: &mut Opened) -> Result<()> {
        let mut gone: BTreeMap<u32, Vec<&PidfdEntry>> = BTreeMap::new();
        for entry in entries {
            let pidfd = inner(entry)?;
            if pidfd.nspid == GONE {
                gone.entry(pidfd.ino).or_default().push(pidfd);
            } else {
                process_of(pidfd, opened)?;
                let fd = deferred::placeholder(entry.id, Deferred::ByPath, opened)?;
                opened.insert(entry.id, fd);
            }
        }
        for pidfds in gone.values() {
            let status = pidfds.iter().find_map(|pidfd| pidfd.rcriu_status);
            let end = status.map_or(End::Unknown, |status| End::of_status(status.cast_signed()));
            let failed = FileError::restore(pidfds[0].id, "create", "a process that ends at once");
            let fds = process::with_brief_child(end, |pid| {
                pidfds.iter().map(|pidfd| open(pidfd, pid)).collect::<Result<Vec<_>>>()
            });
            for (pidfd, fd) in pidfds.iter().zip(fds.map_err(failed)??) {
                opened.insert(pidfd.id, fd);
            }
        }
        Ok(())
    }

    fn open_deferred(&mut self, entry: &proto::FileEntry, opened: &mut Opened) -> Result<OwnedFd> {
        let pidfd = inner(entry)?;
        open(pidfd, opened.pids.host(process_of(pidfd, opened)?))
    }
}

/// Returns the process or thread of a pidfd that is not gone.
fn process_of(entry: &PidfdEntry, opened: &Opened) -> Result<NsPid> {
    let pid = u32::try_from(entry.nspid).ok().map(NsPid::of_image);
    pid.filter(|pid| opened.processes.contains(pid)).ok_or_else(|| {
        let problem = format!("it is a pidfd of process {}, which is not in the tree", entry.nspid);
        FileError::image(entry.id, problem)
    })
}

fn open(entry: &PidfdEntry, pid: HostPid) -> Result<OwnedFd> {
    let failed = || FileError::restore(entry.id, "open", format!("a pidfd of process {pid}"));
    let is_thread = entry.flags & THREAD != 0;
    let fd = if is_thread { process::pidfd_open_thread(pid) } else { process::pidfd_open(pid) };
    let fd = fd.map_err(failed())?;
    descriptor::set_status(fd.as_fd(), entry.flags).map_err(failed())?;
    Ok(fd)
}

fn inner(entry: &proto::FileEntry) -> Result<&PidfdEntry> {
    let missing = || FileError::image(entry.id, "it is a pidfd, but its entry is missing");
    entry.pidfd.as_ref().ok_or_else(missing)
}
