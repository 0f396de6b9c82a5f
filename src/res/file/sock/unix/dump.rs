//! Dumps UNIX sockets.

use std::{
    collections::{HashMap, HashSet},
    os::fd::{AsFd, AsRawFd},
};

use nix::{
    libc,
    sys::socket::{UnixAddr, getpeername},
};

use super::{EXTERNAL, Options, kind_name, name};
use crate::{
    image::{SnapshotWriter, proto},
    res::file::{
        Collector, Description, External, FileError, Intake, Result,
        sock::{
            SHUT_BOTH, attributes, diag,
            opts::{self, NET_NS_ID},
            queue::{self, Packet},
            state,
        },
    },
    units::{HostPid, TargetFd},
};

const HELP_PEER: &str = "dump the program that has the other end as well, or close the connection";
const HELP_EXTERNAL: &str = "dump the program that has it as well, or use --ext-unix-sk to connect to it \
    by name during the restore";
const HELP_ACCEPT: &str = "have the program accept its connections, then try again";

/// A socket that was collected.
#[derive(Debug)]
struct CollectedSocket {
    pid: HostPid,
    number: TargetFd,
    what: String,
    inode: u32,
    /// The inodes of the sockets that must be dumped with it.
    needs: Vec<u32>,
    is_datagram: bool,
}

#[derive(Debug)]
pub(super) struct UnixCollector {
    options: Options,
    external: External,
    /// All sockets of the network namespace.
    all: Option<HashMap<u32, diag::UnixSocket>>,
    /// The listening socket at which each connection waits to be accepted, by inode.
    waiting_at: HashMap<u32, u32>,
    collected: Vec<CollectedSocket>,
    queues: Vec<(u32, Vec<Packet>)>,
    states: attributes::AttributeReader,
}

impl UnixCollector {
    pub(super) fn new(options: Options, external: &External) -> Self {
        Self {
            options,
            external: external.clone(),
            all: None,
            waiting_at: HashMap::new(),
            collected: Vec::new(),
            queues: Vec::new(),
            states: attributes::AttributeReader::default(),
        }
    }

    /// Returns what `sock_diag(7)` reports of a socket.
    fn look_up(&mut self, file: &Description, inode: u32) -> Result<diag::UnixSocket> {
        if self.all.as_ref().is_none_or(|all| !all.contains_key(&inode)) {
            let all =
                diag::unix_sockets().map_err(file.failed("list the sockets of the network for"))?;
            self.waiting_at = all
                .values()
                .flat_map(|socket| socket.pending.iter().map(|peer| (*peer, socket.inode)))
                .collect();
            self.all = Some(all);
        }
        let found = self.all.as_ref().and_then(|all| all.get(&inode));
        found.cloned().ok_or_else(|| {
            let what =
                format!("the UNIX socket [{inode}], which belongs to another network namespace");
            file.unsupported(what, "run rcriu in the namespace of the tree")
        })
    }

    /// Returns the name of a socket in messages.
    fn describe(&self, socket: &diag::UnixSocket) -> String {
        let kind = kind_name(socket.kind.into());
        let name = name::display(&socket.name);
        let Some(peer) = self.all.as_ref().and_then(|all| all.get(&socket.peer)) else {
            return format!("the UNIX {kind} socket [{}] ({name})", socket.inode);
        };
        let peer_name = name::display(&peer.name);
        format!(
            "the UNIX {kind} socket [{}] ({name}), connected to the socket [{}] ({peer_name})",
            socket.inode, peer.inode
        )
    }

    /// Returns the sockets that must be dumped with this one, and its peer in the images.
    fn peers(
        &self,
        file: &Description,
        socket: &diag::UnixSocket,
        what: &str,
    ) -> Result<(Vec<u32>, u32)> {
        let datagrams = i32::from(socket.kind) == libc::SOCK_DGRAM;
        if socket.peer != 0 {
            let peer = self.all.as_ref().and_then(|all| all.get(&socket.peer));
            if peer.is_some_and(|peer| peer.peer != socket.inode && peer.name.is_empty()) {
                let what = format!("{what}, which has no name and is not connected to it");
                return Err(file.unsupported(what, HELP_PEER));
            }
            return Ok((vec![socket.peer], socket.peer));
        }
        match u32::from(socket.state) {
            state::LISTEN => {
                if socket.pending.contains(&0) {
                    let what =
                        format!("{what}, with a pending connection whose other end is closed");
                    return Err(file.unsupported(what, HELP_ACCEPT));
                }
                Ok((socket.pending.clone(), 0))
            }
            state::ESTABLISHED if !datagrams => {
                if let Some(listener) = self.waiting_at.get(&socket.inode) {
                    if socket.send_queue != 0 {
                        let what = format!(
                            "{what}, waiting to be accepted by the socket [{listener}], with data \
                             in it that cannot be read"
                        );
                        return Err(file.unsupported(what, HELP_ACCEPT));
                    }
                    return Ok((vec![*listener], *listener));
                }
                if socket.shutdown == SHUT_BOTH {
                    warn_of_peer_name(file, what);
                    return Ok((Vec::new(), 0));
                }
                let what = format!("{what}, connected to a socket that no process has open");
                Err(file.unsupported(what, HELP_PEER))
            }
            _ => Ok((Vec::new(), 0)),
        }
    }

    /// Returns the entry that stands for a socket outside the tree, or `Some(None)` for one that
    /// needs no entry. Returns `None` if the user did not allow the socket.
    fn external(&self, of: &CollectedSocket, inode: u32) -> Option<Option<proto::UnixSkEntry>> {
        if self.external.contains(&format!("unix[{}]", of.inode)) {
            return Some(None);
        }
        let socket = self.all.as_ref()?.get(&inode)?;
        let named = i32::from(socket.kind) == libc::SOCK_DGRAM && !socket.name.is_empty();
        (self.options.allow_external && named).then(|| {
            Some(proto::UnixSkEntry {
                ino: inode,
                r#type: libc::SOCK_DGRAM.cast_unsigned(),
                state: state::LISTEN,
                name: socket.name.clone(),
                uflags: EXTERNAL,
                ..proto::UnixSkEntry::default()
            })
        })
    }

    /// Returns the inodes of sockets that are needed but were not collected, each with the socket
    /// that needs it.
    fn missing(&self) -> Vec<(&CollectedSocket, u32)> {
        let there: HashSet<u32> = self.collected.iter().map(|socket| socket.inode).collect();
        let needed = |socket: &CollectedSocket| socket.needs.clone();
        self.collected
            .iter()
            .flat_map(|socket| needed(socket).into_iter().map(move |inode| (socket, inode)))
            .filter(|(_, inode)| !there.contains(inode))
            .collect()
    }
}

/// Warns if a socket shows the name of a peer that is closed.
fn warn_of_peer_name(file: &Description, what: &str) {
    let peer: nix::Result<UnixAddr> = getpeername(file.fd.as_raw_fd());
    if peer.is_ok_and(|peer| peer.path().is_some() || peer.as_abstract().is_some()) {
        log::warn!("{what}: its peer is closed; after a restore, getpeername(2) shows no name");
    }
}

impl Collector for UnixCollector {
    fn claims(&self, file: &Description) -> bool {
        file.is_type(libc::S_IFSOCK) && opts::family(file.fd.as_fd()) == Ok(libc::AF_UNIX)
    }

    fn collect(&mut self, file: &Description, intake: &mut dyn Intake) -> Result<proto::FileEntry> {
        let fd = file.fd.as_fd();
        let inode = u32::try_from(file.stat.st_ino).expect("inodes of sockets have 32 bits");
        let socket = self.look_up(file, inode)?;
        let what = self.describe(&socket);
        let (needs, peer) = self.peers(file, &socket, &what)?;
        let is_datagram = i32::from(socket.kind) == libc::SOCK_DGRAM;
        let named = if name::is_path(&socket.name) {
            name::look_at_file(file, &socket.name, socket.file, &what)?
        } else {
            name::NamedFile::default()
        };
        // Enter it before reading its queue, which may contain the socket itself.
        self.collected.push(CollectedSocket {
            pid: file.pid,
            number: file.number,
            what: what.clone(),
            inode,
            needs,
            is_datagram,
        });
        let mut state = self.states.read(file, &what)?;
        state.peer = attributes::peer(fd, intake.pids())
            .map_err(file.failed("read the peer credentials of"))?;
        if is_datagram || u32::from(socket.state) == state::ESTABLISHED {
            let (packets, error) = queue::peek(file, socket.kind.into(), &what, intake)?;
            self.queues.push((file.id, packets));
            state.error = error.map(|error| (error as i32).cast_unsigned());
        }
        let entry = proto::UnixSkEntry {
            id: file.id,
            ino: inode,
            r#type: socket.kind.into(),
            state: socket.state.into(),
            flags: file.flags,
            uflags: 0,
            backlog: socket.send_queue,
            peer,
            fown: file.fown,
            opts: opts::read(fd, libc::AF_UNIX).map_err(file.failed("read the options of"))?,
            name: socket.name,
            shutdown: opts::shutdown(socket.shutdown),
            file_perms: named.perms,
            name_dir: named.dir,
            deleted: named.deleted.then_some(true),
            ns_id: Some(NET_NS_ID),
            mnt_id: None,
        };
        Ok(proto::FileEntry {
            r#type: proto::FdTypes::Unixsk.into(),
            id: file.id,
            usk: Some(entry),
            sock: Some(state),
            ..proto::FileEntry::default()
        })
    }

    fn after_collect(&mut self, intake: &mut dyn Intake) -> Result<()> {
        let mut entries: HashMap<u32, proto::UnixSkEntry> = HashMap::new();
        for (socket, inode) in self.missing() {
            match self.external(socket, inode) {
                Some(entry) => entries.extend(entry.map(|entry| (inode, entry))),
                None => {
                    return Err(FileError::Unsupported {
                        pid: socket.pid,
                        fd: socket.number,
                        what: format!(
                            "{}; the socket [{inode}] is not open in the tree",
                            socket.what
                        ),
                        help: if socket.is_datagram { HELP_EXTERNAL } else { HELP_PEER },
                    });
                }
            }
        }
        for (_, mut entry) in entries {
            entry.id = intake.new_id();
            intake.push(proto::FileEntry {
                r#type: proto::FdTypes::Unixsk.into(),
                id: entry.id,
                usk: Some(entry),
                ..proto::FileEntry::default()
            });
        }
        Ok(())
    }

    fn finish(&mut self, images: &SnapshotWriter) -> Result<()> {
        queue::write(images, &self.queues)
    }
}
