//! Dumps message queues.

use std::{collections::HashSet, ffi::CString, os::fd::AsFd};

use nix::{
    errno::Errno,
    libc,
    sys::{
        stat::fstat,
        statfs::{FsType, fstatfs},
    },
};

use crate::{
    image::proto::{self, FdTypes},
    proc,
    res::{
        file::{Collector, Description, Intake, Result, descriptor},
        mqueue::{self, HELP_KERNEL, Reader},
    },
    sys::{
        mqueue as queues,
        visit::{Place, Visit},
    },
    units::HostPid,
};

/// `include/uapi/linux/magic.h`.
const MQUEUE_MAGIC: libc::__fsword_t = 0x1980_0202;

/// The suffix of links to deleted files.
const DELETED: &[u8] = b" (deleted)";

#[derive(Debug, Default)]
pub(super) struct Queues {
    reader: Reader,
    /// The inodes of queues whose messages were recorded.
    recorded: HashSet<u64>,
}

impl Collector for Queues {
    fn claims(&self, file: &Description) -> bool {
        file.is_type(libc::S_IFREG)
            && !descriptor::is_path(file.flags)
            && fstatfs(&file.fd).is_ok_and(|found| found.filesystem_type() == FsType(MQUEUE_MAGIC))
    }

    fn collect(&mut self, file: &Description, intake: &mut dyn Intake) -> Result<proto::FileEntry> {
        let fd = file.fd.as_fd();
        let shown = String::from_utf8_lossy(&file.link).into_owned();
        let unlinked = file.stat.st_nlink == 0;
        let name = file.link.rsplit(|byte| *byte == b'/').next().unwrap_or_default();
        let name = if unlinked { name.strip_suffix(DELETED).unwrap_or(name) } else { name };
        if !unlinked {
            check_place(file, name, &shown)?;
        }
        let size = queues::attributes(fd).map_err(file.failed("read the attributes of"))?;
        let what = || format!("the message queue {shown} with {} messages", size.messages);
        let found = self.reader.look(fd).map_err(|why| {
            let what = format!("{}, which cannot be read: {why}", what());
            file.unsupported(what, HELP_KERNEL)
        })?;
        if found.messages.len() as u64 != size.messages.cast_unsigned() {
            let what = format!("{}, which another process is using", what());
            return Err(file.unsupported(what, "dump that process as well, or try again"));
        }
        let mut notify = None;
        if let Some((pid, entry)) = found.notify {
            let pid = intake.pids().ns(HostPid(pid));
            if intake.has_process(pid) {
                if entry.kind == libc::SIGEV_THREAD {
                    let what = format!("{}, which starts a thread of process {pid}", what());
                    let help = "have the process take its notification back (mq_notify(3))";
                    return Err(file.unsupported(what, help));
                }
                notify = Some(proto::MqueueNotifyEntry { pid: pid.raw(), ..entry });
            }
        }
        let is_first = self.recorded.insert(file.stat.st_ino);
        let inode = proc::namespace(file.pid, Place::Ipc.file())?;
        let namespace = intake.namespaces().look_up(Place::Ipc.file(), inode);
        let state = proto::MqueueEntry {
            namespace: namespace.map(|(number, _)| number),
            messages: if is_first { found.messages } else { Vec::new() },
            notify: notify.filter(|_| is_first),
            ..mqueue::image(name, &file.stat, &size)
        };
        let entry = proto::RegFileEntry {
            id: file.id,
            flags: file.status(),
            pos: file.info.pos,
            fown: file.fown,
            name: [b"/dev/mqueue/", name].concat(),
            mode: Some(file.stat.st_mode),
            ..Default::default()
        };
        Ok(proto::FileEntry {
            r#type: FdTypes::Reg.into(),
            id: file.id,
            reg: Some(entry),
            mqueue: Some(state.into()),
            ..Default::default()
        })
    }
}

/// Checks that the name of a queue leads to it.
fn check_place(file: &Description, name: &[u8], shown: &str) -> Result<()> {
    let path = CString::new(name).map_err(|_| file.failed("open")(Errno::EINVAL))?;
    // A descriptor of another namespace's queue shows the same name.
    let visit = Visit::to(file.pid, Place::Ipc).map_err(|error| {
        let errno = crate::sys::errno(&error);
        file.failed("enter the IPC namespace of")(errno)
    })?;
    let found = queues::open(&path, libc::O_RDONLY | libc::O_NONBLOCK).and_then(fstat);
    drop(visit);
    match found {
        Ok(found) if (found.st_dev, found.st_ino) == (file.stat.st_dev, file.stat.st_ino) => Ok(()),
        _ => {
            let what = format!("the message queue {shown}, of another IPC namespace");
            Err(file.unsupported(what, "close it"))
        }
    }
}
