//! The open files of a snapshot.

use std::collections::{BTreeMap, HashMap};

use super::{Result, Tables};
use crate::image::{Kind, Remap, proto, read_files};

/// The first major number of slaves of pseudoterminals (`linux/major.h`).
const PTS_MAJOR: u32 = 136;

/// The name of open anonymous shared memory, which images describe as a memfd.
pub(super) const ANONYMOUS: &[u8] = b"/dev/zero";

/// The open files of a snapshot, and what belongs to them, by their numbers in the images.
#[derive(Debug, Default)]
pub(super) struct OpenFiles {
    entries: BTreeMap<u32, proto::FileEntry>,
    /// How files without a name are restored, by number.
    remaps: BTreeMap<u32, proto::RemapFilePathEntry>,
    memfds: HashMap<u64, proto::MemfdInodeEntry>,
    /// Terminals by number.
    pub(super) terminals: HashMap<u32, proto::TtyInfoEntry>,
}

impl OpenFiles {
    /// Reads the files of a snapshot.
    pub(super) fn load(tables: &Tables) -> Result<Self> {
        let entries = read_files(&**tables.images())?.unwrap_or_default();
        let remaps: Option<Vec<proto::RemapFilePathEntry>> =
            tables.images().messages_if_any(Kind::RemapFpath, 0)?;
        let memfds: Option<Vec<proto::MemfdInodeEntry>> =
            tables.images().messages_if_any(Kind::MemfdInode, 0)?;
        let terminals: Option<Vec<proto::TtyInfoEntry>> =
            tables.images().messages_if_any(Kind::TtyInfo, 0)?;
        let remaps = remaps.unwrap_or_default().into_iter();
        let memfds = memfds.unwrap_or_default().into_iter();
        let terminals = terminals.unwrap_or_default().into_iter();
        Ok(Self {
            entries: entries.into_iter().map(|entry| (entry.id, entry)).collect(),
            remaps: remaps.map(|remap| (remap.orig_id, remap)).collect(),
            memfds: memfds.map(|memfd| (memfd.inode_id, memfd)).collect(),
            terminals: terminals.map(|terminal| (terminal.id, terminal)).collect(),
        })
    }

    /// Returns the open files in the order of their numbers.
    pub(super) fn entries(&self) -> impl Iterator<Item = &proto::FileEntry> {
        self.entries.values()
    }

    pub(super) fn entry(&self, id: u32) -> Option<&proto::FileEntry> {
        self.entries.get(&id)
    }

    /// Returns the ghost files: the number of the file, and that of its ghost image.
    pub(super) fn ghosts(&self) -> impl Iterator<Item = (u32, u32)> {
        self.remaps.values().filter_map(|remap| match Remap::of(remap) {
            Ok(Remap::Ghost(number)) => Some((remap.orig_id, number)),
            _ => None,
        })
    }

    /// Returns the path of a file, if it has one: of a regular file, directory or memfd.
    pub(super) fn path(&self, id: u32) -> Option<Vec<u8>> {
        let entry = self.entry(id)?;
        if let Some(reg) = &entry.reg {
            let gone: &[u8] = if self.remaps.contains_key(&id) { b" (deleted)" } else { b"" };
            return Some([&reg.name, gone].concat());
        }
        let memfd = entry.memfd.as_ref()?;
        let name = self.memfds.get(&memfd.inode_id.into()).map_or(&[][..], |inode| &inode.name);
        if name == ANONYMOUS {
            return Some([ANONYMOUS, b" (deleted)"].concat());
        }
        Some([b"/memfd:", name, b" (deleted)"].concat())
    }

    /// Returns the name of an open file as links in `/proc/PID/fd` show it.
    pub(super) fn target(&self, id: u32) -> Vec<u8> {
        let Some(entry) = self.entry(id) else { return format!("unknown:[{id}]").into_bytes() };
        if let Some(path) = self.path(id) {
            return path;
        }
        if let Some(path) = entry.fifo.as_ref().and_then(|fifo| self.path(fifo.regf_id?)) {
            return path;
        }
        if let Some(tty) = &entry.tty {
            return self.terminal(tty);
        }
        let socket = |ino: u32| format!("socket:[{ino}]");
        let text = if let Some(pipe) = &entry.pipe {
            format!("pipe:[{}]", pipe.pipe_id)
        } else if let Some(fifo) = &entry.fifo {
            format!("pipe:[{}]", fifo.pipe_id)
        } else if let Some(sk) = &entry.usk {
            socket(sk.ino)
        } else if let Some(sk) = &entry.isk {
            socket(sk.ino)
        } else if let Some(sk) = &entry.nlsk {
            socket(sk.ino)
        } else if let Some(sk) = &entry.psk {
            socket(sk.id)
        } else if entry.efd.is_some() {
            "anon_inode:[eventfd]".to_owned()
        } else if entry.epfd.is_some() {
            "anon_inode:[eventpoll]".to_owned()
        } else if entry.sgfd.is_some() {
            "anon_inode:[signalfd]".to_owned()
        } else if entry.tfd.is_some() {
            "anon_inode:[timerfd]".to_owned()
        } else if entry.ify.is_some() {
            "anon_inode:inotify".to_owned()
        } else if entry.ffy.is_some() {
            "anon_inode:[fanotify]".to_owned()
        } else if entry.pidfd.is_some() {
            "anon_inode:[pidfd]".to_owned()
        } else if entry.bpf.is_some() {
            "anon_inode:bpf-map".to_owned()
        } else if entry.tunf.is_some() {
            "/dev/net/tun".to_owned()
        } else if let Some(ns) = &entry.nsf {
            format!("ns:[{}]", ns.ns_id)
        } else {
            format!("unknown:[{id}]")
        };
        text.into_bytes()
    }

    fn terminal(&self, tty: &proto::TtyFileEntry) -> Vec<u8> {
        if let Some(path) = tty.regf_id.and_then(|id| self.path(id)) {
            return path;
        }
        let info = self.terminals.get(&tty.tty_info_id);
        let pty = info.and_then(|info| Some((info.rdev >> 8 & 0xfff, info.pty.as_ref()?.index)));
        match pty {
            Some((PTS_MAJOR, index)) => format!("/dev/pts/{index}").into_bytes(),
            Some(_) => b"/dev/ptmx".to_vec(),
            None => b"/dev/tty".to_vec(),
        }
    }
}
