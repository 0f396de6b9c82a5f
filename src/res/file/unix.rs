//! UNIX sockets.
//!
//! A socket belongs to a dump if the socket it is connected to does, for neither can
//! be made alone. Which one that is `sock_diag(7)` tells, and which connections
//! wait to be accepted. What was sent into such a connection cannot be seen, so that
//! it is refused, as are sockets at whose other end is another program; datagram
//! sockets can be connected to a name again, which `--ext-unix-sk` allows.
//!
//! [`super::unix_open`] restores them, [`super::unix_peer`] whose credentials they show.

use std::{
    collections::{HashMap, HashSet},
    os::fd::{AsFd, AsRawFd},
};

use nix::{
    libc,
    sys::socket::{UnixAddr, getpeername},
};

use super::{
    Collector, Description, FileError, FileKind, Intake, Policy, Result, Usage, sock_diag,
    sock_opts::{self, NET_NS_ID},
    sock_queue::{self, Packet},
    sock_state, unix_name, unix_open,
};
use crate::{
    image::{SnapshotWriter, proto},
    units::{HostPid, TargetFd},
};

/// `unix_sk_entry.uflags`: the socket is of a program that was not dumped.
pub(super) const EXTERNAL: u32 = 1;

/// States of sockets (`net/tcp_states.h`).
pub(super) mod state {
    pub(in crate::res::file) const ESTABLISHED: u32 = 1;
    pub(in crate::res::file) const CLOSE: u32 = 7;
    pub(in crate::res::file) const LISTEN: u32 = 10;
}

/// Both directions are shut down.
pub(super) const SHUT_BOTH: u8 = 3;

const HELP_PEER: &str = "dump the program that has the other end as well, or end the connection";
const HELP_EXTERNAL: &str = "dump the program that has it as well, or use --ext-unix-sk to connect \
    to its name again when restoring";
const HELP_ACCEPT: &str = "let the program accept its connections, then try again";

/// The row of [`super::KINDS`].
pub(super) const KIND: FileKind = FileKind {
    name: "UNIX socket",
    types: &[proto::FdTypes::Unixsk],
    usage: Usage::Descriptor,
    collector: |policy| Box::new(UnixCollector::new(policy)),
    opener: |_| Box::<unix_open::UnixOpener>::default(),
};

/// Returns what a type of sockets is called.
pub(super) fn kind_name(kind: u32) -> &'static str {
    match kind.cast_signed() {
        libc::SOCK_STREAM => "stream",
        libc::SOCK_DGRAM => "datagram",
        libc::SOCK_SEQPACKET => "seqpacket",
        _ => "unknown",
    }
}

/// A socket that was collected.
#[derive(Debug)]
struct Collected {
    pid: HostPid,
    number: TargetFd,
    what: String,
    inode: u32,
    /// The inodes of the sockets that have to be dumped with it.
    needs: Vec<u32>,
    is_datagram: bool,
}

/// Dumps UNIX sockets.
#[derive(Debug)]
struct UnixCollector {
    policy: Policy,
    /// All sockets of the network namespace.
    all: Option<HashMap<u32, sock_diag::UnixSocket>>,
    /// Which listening socket a connection waits at that was not accepted.
    waiting_at: HashMap<u32, u32>,
    collected: Vec<Collected>,
    queues: Vec<(u32, Vec<Packet>)>,
    states: sock_state::Reader,
}

impl UnixCollector {
    fn new(policy: &Policy) -> Self {
        Self {
            policy: policy.clone(),
            all: None,
            waiting_at: HashMap::new(),
            collected: Vec::new(),
            queues: Vec::new(),
            states: sock_state::Reader::default(),
        }
    }

    /// Returns what the kernel says of a socket.
    fn look_up(&mut self, file: &Description, inode: u32) -> Result<sock_diag::UnixSocket> {
        if self.all.as_ref().is_none_or(|all| !all.contains_key(&inode)) {
            let all = sock_diag::unix_sockets()
                .map_err(file.failed("list the sockets of the network for"))?;
            self.waiting_at = all
                .values()
                .flat_map(|socket| socket.pending.iter().map(|peer| (*peer, socket.inode)))
                .collect();
            self.all = Some(all);
        }
        let found = self.all.as_ref().and_then(|all| all.get(&inode));
        found.cloned().ok_or_else(|| {
            let what = format!("the UNIX socket [{inode}], which is in another network namespace");
            file.unsupported(what, "run rcriu in the namespace of the tree")
        })
    }

    /// Returns a socket for messages.
    fn describe(&self, socket: &sock_diag::UnixSocket) -> String {
        let kind = kind_name(socket.kind.into());
        let name = unix_name::display(&socket.name);
        let Some(peer) = self.all.as_ref().and_then(|all| all.get(&socket.peer)) else {
            return format!("the UNIX {kind} socket [{}] ({name})", socket.inode);
        };
        let peer_name = unix_name::display(&peer.name);
        format!(
            "the UNIX {kind} socket [{}] ({name}), connected to the socket [{}] ({peer_name})",
            socket.inode, peer.inode
        )
    }

    /// Returns the sockets that have to be dumped with this one, and the one that
    /// the images are to have as its peer.
    fn peers(
        &self,
        file: &Description,
        socket: &sock_diag::UnixSocket,
        what: &str,
    ) -> Result<(Vec<u32>, u32)> {
        let datagrams = i32::from(socket.kind) == libc::SOCK_DGRAM;
        if socket.peer != 0 {
            let peer = self.all.as_ref().and_then(|all| all.get(&socket.peer));
            if peer.is_some_and(|peer| peer.peer != socket.inode && peer.name.is_empty()) {
                let what = format!("{what}, which has no name and is not connected back");
                return Err(file.unsupported(what, HELP_PEER));
            }
            return Ok((vec![socket.peer], socket.peer));
        }
        match u32::from(socket.state) {
            state::LISTEN => {
                if socket.pending.contains(&0) {
                    let what = format!(
                        "{what}, at which a connection waits that its other end has closed"
                    );
                    return Err(file.unsupported(what, HELP_ACCEPT));
                }
                Ok((socket.pending.clone(), 0))
            }
            state::ESTABLISHED if !datagrams => {
                if let Some(listener) = self.waiting_at.get(&socket.inode) {
                    if socket.send_queue != 0 {
                        let what = format!(
                            "{what}, waiting to be accepted by the socket [{listener}] with data \
                             in it that cannot be seen"
                        );
                        return Err(file.unsupported(what, HELP_ACCEPT));
                    }
                    return Ok((vec![*listener], *listener));
                }
                if socket.shutdown == SHUT_BOTH {
                    warn_of_peer_name(file, what);
                    return Ok((Vec::new(), 0));
                }
                let what = format!("{what}, connected to a socket that nobody has open");
                Err(file.unsupported(what, HELP_PEER))
            }
            _ => Ok((Vec::new(), 0)),
        }
    }

    /// Returns the entry that stands for a socket of a program that is not dumped,
    /// if it may be left out.
    fn external(&self, of: &Collected, inode: u32) -> Option<Option<proto::UnixSkEntry>> {
        if self.policy.external.contains(&format!("unix[{}]", of.inode)) {
            return Some(None);
        }
        let socket = self.all.as_ref()?.get(&inode)?;
        let named = i32::from(socket.kind) == libc::SOCK_DGRAM && !socket.name.is_empty();
        (self.policy.ext_unix_sk && named).then(|| {
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

    /// Returns what is needed and was not collected: of whom, and which inode.
    fn missing(&self) -> Vec<(&Collected, u32)> {
        let there: HashSet<u32> = self.collected.iter().map(|socket| socket.inode).collect();
        let needed = |socket: &Collected| socket.needs.clone();
        self.collected
            .iter()
            .flat_map(|socket| needed(socket).into_iter().map(move |inode| (socket, inode)))
            .filter(|(_, inode)| !there.contains(inode))
            .collect()
    }
}

/// Warns of the name that a socket shows of a peer that is gone.
fn warn_of_peer_name(file: &Description, what: &str) {
    let peer: nix::Result<UnixAddr> = getpeername(file.fd.as_raw_fd());
    if peer.is_ok_and(|peer| peer.path().is_some() || peer.as_abstract().is_some()) {
        log::warn!("{what}: its peer is gone; after a restore, getpeername(2) shows no name of it");
    }
}

impl Collector for UnixCollector {
    fn claims(&self, file: &Description) -> bool {
        file.is_type(libc::S_IFSOCK) && sock_opts::family(file.fd.as_fd()) == Ok(libc::AF_UNIX)
    }

    fn collect(&mut self, file: &Description, intake: &mut dyn Intake) -> Result<proto::FileEntry> {
        let fd = file.fd.as_fd();
        let inode = u32::try_from(file.stat.st_ino).expect("inodes of sockets have 32 bits");
        let socket = self.look_up(file, inode)?;
        let what = self.describe(&socket);
        let (needs, peer) = self.peers(file, &socket, &what)?;
        let is_datagram = i32::from(socket.kind) == libc::SOCK_DGRAM;
        let named = if unix_name::is_path(&socket.name) {
            unix_name::look_at_file(file, &socket.name, socket.file, &what)?
        } else {
            unix_name::NamedFile::default()
        };
        // It is known before its queue is looked at, where it may be itself.
        self.collected.push(Collected {
            pid: file.pid,
            number: file.number,
            what: what.clone(),
            inode,
            needs,
            is_datagram,
        });
        let mut state = self.states.read(file, &what)?;
        if is_datagram || u32::from(socket.state) == state::ESTABLISHED {
            let (packets, error) = sock_queue::peek(file, socket.kind.into(), &what, intake)?;
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
            opts: sock_opts::read(fd, libc::AF_UNIX).map_err(file.failed("read the options of"))?,
            name: socket.name,
            shutdown: sock_opts::shutdown(socket.shutdown),
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

    fn settle(&mut self, intake: &mut dyn Intake) -> Result<()> {
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
        sock_queue::write(images, &self.queues)
    }
}

#[cfg(test)]
mod tests;
