//! The table of open files: one image of all kinds, or, in images of CRIU from before
//! there was such a one, an image for each kind.
//!
//! A file of `/dev/net/tun` has two entries with one id there: its path (`REG`) and the network device that it is
//! attached to (`TUNF`). rcriu handles them as one.

use std::collections::HashMap;

use super::{ImageStore, Kind, Result, proto};
use proto::{FdTypes, FileEntry};

/// Reads each image of one kind: which, the type of its entries, where they go, and the
/// message that they are.
macro_rules! read_kinds {
    ($old:ident: $($kind:ident, $type:ident, $field:ident: $message:ident;)*) => {
        $($old.read::<proto::$message>(Kind::$kind, FdTypes::$type, |message, entry| {
            (entry.id, entry.$field) = (message.id, Some(message.into()));
        })?;)*
    };
}

/// Reads the table of open files of a snapshot; `None` if it has none.
///
/// # Errors
/// As [`crate::image::read_all`].
pub fn read_files(images: &dyn ImageStore) -> Result<Option<Vec<FileEntry>>> {
    if let Some(entries) = images.messages_if_any(Kind::Files, 0)? {
        return Ok(Some(join(entries)));
    }
    let mut old = Old { images, entries: Vec::new(), any: false };
    read_kinds! { old:
        RegFiles, Reg, reg: RegFileEntry;
        Pipes, Pipe, pipe: PipeEntry;
        Fifo, Fifo, fifo: FifoEntry;
        Inetsk, Inetsk, isk: InetSkEntry;
        Unixsk, Unixsk, usk: UnixSkEntry;
        EventfdFile, Eventfd, efd: EventfdFileEntry;
        EventpollFile, Eventpoll, epfd: EventpollFileEntry;
        InotifyFile, Inotify, ify: InotifyFileEntry;
        Signalfd, Signalfd, sgfd: SignalfdEntry;
        Packetsk, Packetsk, psk: PacketSockEntry;
        TtyFiles, Tty, tty: TtyFileEntry;
        FanotifyFile, Fanotify, ffy: FanotifyFileEntry;
        NetlinkSk, Netlinksk, nlsk: NetlinkSkEntry;
        NsFiles, Ns, nsf: NsFileEntry;
        Tunfile, Tunf, tunf: TunfileEntry;
        ExtFiles, Ext, ext: ExtFileEntry;
        Timerfd, Timerfd, tfd: TimerfdEntry;
    }
    old.add_targets()?;
    Ok(old.any.then(|| join(old.entries)))
}

/// Joins the two entries of each file of `/dev/net/tun`.
fn join(mut entries: Vec<FileEntry>) -> Vec<FileEntry> {
    let tun = i32::from(FdTypes::Tunf);
    let is_alone = |entry: &&FileEntry| entry.r#type == tun && entry.reg.is_none();
    let alone: Vec<u32> = entries.iter().filter(is_alone).map(|entry| entry.id).collect();
    for id in alone {
        let is_path = |entry: &FileEntry| entry.id == id && entry.r#type != tun;
        let Some(path) = entries.iter().position(is_path) else { continue };
        let reg = entries.remove(path).reg;
        let is_device = |entry: &&mut FileEntry| entry.id == id && entry.r#type == tun;
        if let Some(device) = entries.iter_mut().find(is_device) {
            device.reg = reg;
        }
    }
    entries
}

/// Returns the entries as images have them.
pub fn split_files(entries: Vec<FileEntry>) -> Vec<FileEntry> {
    let split = |mut entry: FileEntry| {
        let is_tun = entry.r#type == i32::from(FdTypes::Tunf);
        let reg = entry.reg.take_if(|_| is_tun);
        let path = reg.map(|reg| FileEntry {
            r#type: FdTypes::Reg.into(),
            id: entry.id,
            reg: Some(reg),
            ..Default::default()
        });
        path.into_iter().chain([entry])
    };
    entries.into_iter().flat_map(split).collect()
}

/// The images of one kind each.
struct Old<'a> {
    images: &'a dyn ImageStore,
    entries: Vec<FileEntry>,
    /// Whether there is any.
    any: bool,
}

impl Old<'_> {
    fn read<M: prost::Message + prost::Name + Default>(
        &mut self,
        kind: Kind,
        r#type: FdTypes,
        put: impl Fn(M, &mut FileEntry),
    ) -> Result<()> {
        let Some(messages) = self.images.messages_if_any(kind, 0)? else { return Ok(()) };
        self.any = true;
        self.entries.extend(messages.into_iter().map(|message| {
            let mut entry = FileEntry { r#type: r#type.into(), ..Default::default() };
            put(message, &mut entry);
            entry
        }));
        Ok(())
    }

    /// Adds what epolls watch, and inotify and fanotify, which had images of their own.
    fn add_targets(&mut self) -> Result<()> {
        let targets =
            self.images.messages_if_any::<proto::EventpollTfdEntry>(Kind::EventpollTfd, 0)?;
        let watches = self.images.messages_if_any::<proto::InotifyWdEntry>(Kind::InotifyWd, 0)?;
        let marks =
            self.images.messages_if_any::<proto::FanotifyMarkEntry>(Kind::FanotifyMark, 0)?;
        let mut entries: HashMap<u32, &mut FileEntry> =
            self.entries.iter_mut().map(|entry| (entry.id, entry)).collect();
        for target in targets.into_iter().flatten() {
            if let Some(epoll) = entries.get_mut(&target.id).and_then(|entry| entry.epfd.as_mut()) {
                epoll.tfd.push(target);
            }
        }
        for watch in watches.into_iter().flatten() {
            if let Some(inotify) = entries.get_mut(&watch.id).and_then(|entry| entry.ify.as_mut()) {
                inotify.wd.push(watch);
            }
        }
        for mark in marks.into_iter().flatten() {
            if let Some(fanotify) = entries.get_mut(&mark.id).and_then(|entry| entry.ffy.as_mut()) {
                fanotify.mark.push(mark);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::store::memory::InMemory;

    #[test]
    fn the_two_entries_of_a_file_of_a_network_device_are_one() {
        let mut images = InMemory::new("images");
        let reg =
            |id| proto::RegFileEntry { id, name: b"/dev/net/tun".to_vec(), ..Default::default() };
        let path = |id| FileEntry {
            r#type: FdTypes::Reg.into(),
            id,
            reg: Some(reg(id)),
            ..Default::default()
        };
        let tunf = Some(proto::TunfileEntry { id: 2, ..Default::default() });
        let device = FileEntry { r#type: FdTypes::Tunf.into(), id: 2, tunf, ..Default::default() };
        let all = [path(1), path(2), device.clone(), path(3)];
        images.write(Kind::Files, 0, &all);
        let joined = read_files(&images).unwrap().unwrap();
        assert_eq!(joined, [path(1), FileEntry { reg: Some(reg(2)), ..device.clone() }, path(3)]);
        assert_eq!(split_files(joined), all);
        // Whichever comes first; and one may be missing.
        images.write(Kind::Files, 0, &[device.clone(), path(2), path(2)]);
        assert_eq!(read_files(&images).unwrap().unwrap().len(), 2);
        images.write(Kind::Files, 0, std::slice::from_ref(&device));
        assert_eq!(read_files(&images).unwrap().unwrap(), [device]);
    }

    #[test]
    fn images_of_one_kind_each_are_one_table() {
        let mut images = InMemory::new("images");
        assert!(read_files(&images).unwrap().is_none());
        let reg = |id| proto::RegFileEntry { id, name: b"/a".to_vec(), ..Default::default() };
        images.write(Kind::RegFiles, 0, &[reg(1), reg(4)]);
        images.write(
            Kind::EventpollFile,
            0,
            &[proto::EventpollFileEntry { id: 2, ..Default::default() }],
        );
        let target = |id, tfd| proto::EventpollTfdEntry { id, tfd, ..Default::default() };
        images.write(Kind::EventpollTfd, 0, &[target(2, 7), target(2, 8), target(99, 9)]);
        let entries = read_files(&images).unwrap().unwrap();
        let found: Vec<_> = entries.iter().map(|entry| (entry.id, entry.r#type())).collect();
        assert_eq!(found, [(1, FdTypes::Reg), (4, FdTypes::Reg), (2, FdTypes::Eventpoll)]);
        let watched = &entries[2].epfd.as_ref().unwrap().tfd;
        assert_eq!(watched.iter().map(|target| target.tfd).collect::<Vec<_>>(), [7, 8]);
        // The image of all kinds is the table, if it is there.
        images.write(Kind::Files, 0, &entries[..1]);
        assert_eq!(read_files(&images).unwrap().unwrap(), entries[..1]);
        images.put(&Kind::Files.file_name(0), b"what is no image");
        read_files(&images).unwrap_err();
    }
}
