//! Targets of descriptors.

use std::fmt::Write;

use super::{Proc, ProcessLink};
use crate::{
    image::{Kind, proto},
    view::Result,
};

/// `FD_CLOEXEC` as images have it; `O_CLOEXEC`, as `fdinfo` shows it.
const FD_CLOEXEC: u32 = 1;
const O_CLOEXEC: u32 = 0o2_000_000;

impl Proc<'_> {
    /// Returns the descriptors of a process.
    pub(super) fn descriptors(&self, pid: u32) -> Result<Vec<proto::FdinfoEntry>> {
        if self.tables.mm(pid)?.is_none() {
            return Ok(Vec::new());
        }
        let id = self.ids(pid)?.files_id;
        if let Some(entries) = self.tables.images().messages_if_any(Kind::Fdinfo, id.into())? {
            return Ok(entries);
        }
        // Older images have one `fdinfo` image for each process.
        Ok(self.tables.images().messages_if_any(Kind::Fdinfo, pid.into())?.unwrap_or_default())
    }

    fn descriptor(&self, pid: u32, fd: u32) -> Result<Option<proto::FdinfoEntry>> {
        Ok(self.descriptors(pid)?.into_iter().find(|entry| entry.fd == fd))
    }

    /// Returns the target of a descriptor.
    pub(super) fn descriptor_target(&self, pid: u32, fd: u32) -> Result<Option<Vec<u8>>> {
        let Some(entry) = self.descriptor(pid, fd)? else { return Ok(None) };
        Ok(Some(self.tables.files()?.target(entry.id)))
    }

    /// Returns the target of a link of a process.
    pub(super) fn process_link(&self, pid: u32, link: ProcessLink) -> Result<Option<Vec<u8>>> {
        let fs: Option<proto::FsEntry> =
            self.tables.images().message_if_any(Kind::Fs, pid.into())?;
        let id = match link {
            ProcessLink::Cwd => fs.map(|fs| fs.cwd_id),
            ProcessLink::Root => fs.map(|fs| fs.root_id),
            ProcessLink::Exe => self.tables.mm(pid)?.map(|mm| mm.exe_file_id),
        };
        let files = self.tables.files()?;
        Ok(id.and_then(|id| files.path(id)))
    }

    /// Returns the `fdinfo` text of a descriptor.
    pub(super) fn descriptor_info(&self, pid: u32, fd: u32) -> Result<Vec<u8>> {
        let Some(entry) = self.descriptor(pid, fd)? else { return Ok(Vec::new()) };
        let files = self.tables.files()?;
        let Some(file) = files.entry(entry.id) else { return Ok(Vec::new()) };
        let own = if entry.flags & FD_CLOEXEC != 0 { O_CLOEXEC } else { 0 };
        let mut text = String::new();
        let _ = writeln!(text, "pos:\t{}", position(file));
        let _ = writeln!(text, "flags:\t0{:o}", flags(file) | own);
        if let Some(mount) = file.reg.as_ref().and_then(|reg| reg.mnt_id).filter(|id| *id >= 0) {
            let _ = writeln!(text, "mnt_id:\t{mount}");
        }
        if let Some(eventfd) = &file.efd {
            let _ = writeln!(text, "eventfd-count: {:16x}", eventfd.counter);
        }
        if let Some(signalfd) = &file.sgfd {
            let _ = writeln!(text, "sigmask:\t{:016x}", signalfd.sigmask);
        }
        for target in file.epfd.iter().flat_map(|epoll| &epoll.tfd) {
            let (fd, events, data) = (target.tfd, target.events, target.data);
            let _ = writeln!(text, "tfd: {fd:8} events: {events:8x} data: {data:16x}");
        }
        if let Some(timer) = &file.tfd {
            let _ = writeln!(text, "clockid: {}\nticks: {}", timer.clockid, timer.ticks);
            let _ = writeln!(text, "settime flags: 0{:o}", timer.settime_flags);
            let _ = writeln!(text, "it_value: ({}, {})", timer.vsec, timer.vnsec);
            let _ = writeln!(text, "it_interval: ({}, {})", timer.isec, timer.insec);
        }
        for watch in file.ify.iter().flat_map(|inotify| &inotify.wd) {
            let (wd, ino, dev, mask) = (watch.wd, watch.i_ino, watch.s_dev, watch.mask);
            let _ = writeln!(
                text,
                "inotify wd:{wd:x} ino:{ino:x} sdev:{dev:x} mask:{mask:x} ignored_mask:0"
            );
        }
        if let Some(pidfd) = &file.pidfd {
            let _ = writeln!(text, "Pid:\t{0}\nNSpid:\t{0}", pidfd.nspid);
        }
        Ok(text.into_bytes())
    }
}

/// Returns the position of an open file; 0 if it has none.
pub(super) fn position(file: &proto::FileEntry) -> u64 {
    let reg = file.reg.as_ref().map(|reg| reg.pos);
    reg.or(file.memfd.as_ref().map(|memfd| memfd.pos)).unwrap_or(0)
}

/// Returns the flags of an open file (`O_*`).
pub(super) fn flags(file: &proto::FileEntry) -> u32 {
    let all = [
        file.reg.as_ref().map(|entry| entry.flags),
        file.memfd.as_ref().map(|entry| entry.flags),
        file.pipe.as_ref().map(|entry| entry.flags),
        file.isk.as_ref().map(|entry| entry.flags),
        file.usk.as_ref().map(|entry| entry.flags),
        file.psk.as_ref().map(|entry| entry.flags),
        file.nlsk.as_ref().map(|entry| entry.flags),
        file.efd.as_ref().map(|entry| entry.flags),
        file.epfd.as_ref().map(|entry| entry.flags),
        file.sgfd.as_ref().map(|entry| entry.flags),
        file.tfd.as_ref().map(|entry| entry.flags),
        file.ify.as_ref().map(|entry| entry.flags),
        file.ffy.as_ref().map(|entry| entry.flags),
        file.tty.as_ref().map(|entry| entry.flags),
        file.nsf.as_ref().map(|entry| entry.flags),
        file.pidfd.as_ref().map(|entry| entry.flags),
    ];
    all.into_iter().flatten().next().unwrap_or(0)
}
