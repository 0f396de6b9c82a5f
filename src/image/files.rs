//! The table of open files: one image of all kinds, or, in images of CRIU from before
//! there was such a one, an image for each kind.

use std::{collections::HashMap, path::Path};

use super::{Kind, Result, proto, read_all};
use proto::{FdTypes, FileEntry};

/// Reads each image of one kind: which, the type of its entries, where they go, and the
/// message that they are.
macro_rules! read_kinds {
    ($old:ident: $($kind:ident, $type:ident, $field:ident: $message:ident;)*) => {
        $($old.read::<proto::$message>(Kind::$kind, FdTypes::$type, |message, entry| {
            (entry.id, entry.$field) = (message.id, Some(message));
        })?;)*
    };
}

/// Reads the table of open files in an image directory; `None` if it has none.
///
/// # Errors
/// As [`read_all`].
pub fn read_files(dir: &Path) -> Result<Option<Vec<FileEntry>>> {
    if let Some(entries) = read_kind(dir, Kind::Files)? {
        return Ok(Some(entries));
    }
    let mut old = Old { dir, entries: Vec::new(), any: false };
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
    Ok(old.any.then_some(old.entries))
}

/// Reads an image that need not be there.
fn read_kind<M: prost::Message + prost::Name + Default>(
    dir: &Path,
    kind: Kind,
) -> Result<Option<Vec<M>>> {
    match read_all(&dir.join(kind.file_name(0)), kind) {
        Err(error) if error.is_missing() => Ok(None),
        messages => messages.map(Some),
    }
}

/// The images of one kind each.
struct Old<'a> {
    dir: &'a Path,
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
        let Some(messages) = read_kind(self.dir, kind)? else { return Ok(()) };
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
        let targets = read_kind::<proto::EventpollTfdEntry>(self.dir, Kind::EventpollTfd)?;
        let watches = read_kind::<proto::InotifyWdEntry>(self.dir, Kind::InotifyWd)?;
        let marks = read_kind::<proto::FanotifyMarkEntry>(self.dir, Kind::FanotifyMark)?;
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
    use std::fs;

    use super::*;
    use crate::image::ImageWriter;

    fn write<M: prost::Message>(dir: &Path, kind: Kind, messages: &[M]) {
        let mut image = ImageWriter::create(&dir.join(kind.file_name(0)), kind).unwrap();
        messages.iter().for_each(|message| image.message(message).unwrap());
        image.finish().unwrap();
    }

    #[test]
    fn images_of_one_kind_each_are_one_table() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        assert!(read_files(dir).unwrap().is_none());
        let reg = |id| proto::RegFileEntry { id, name: b"/a".to_vec(), ..Default::default() };
        write(dir, Kind::RegFiles, &[reg(1), reg(4)]);
        write(
            dir,
            Kind::EventpollFile,
            &[proto::EventpollFileEntry { id: 2, ..Default::default() }],
        );
        let target = |id, tfd| proto::EventpollTfdEntry { id, tfd, ..Default::default() };
        write(dir, Kind::EventpollTfd, &[target(2, 7), target(2, 8), target(99, 9)]);
        let entries = read_files(dir).unwrap().unwrap();
        let found: Vec<_> = entries.iter().map(|entry| (entry.id, entry.r#type())).collect();
        assert_eq!(found, [(1, FdTypes::Reg), (4, FdTypes::Reg), (2, FdTypes::Eventpoll)]);
        let watched = &entries[2].epfd.as_ref().unwrap().tfd;
        assert_eq!(watched.iter().map(|target| target.tfd).collect::<Vec<_>>(), [7, 8]);
        // The image of all kinds is the table, if it is there.
        write(dir, Kind::Files, &entries[..1]);
        assert_eq!(read_files(dir).unwrap().unwrap(), entries[..1]);
        fs::write(dir.join(Kind::Files.file_name(0)), b"what is no image").unwrap();
        read_files(dir).unwrap_err();
    }
}
