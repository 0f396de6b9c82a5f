//! Dumps UNIX sockets.

use std::{
    collections::{HashMap, HashSet},
    os::fd::{AsFd, AsRawFd, BorrowedFd},
};

use nix::{
    errno::Errno,
    libc,
    sys::socket::{UnixAddr, getpeername},
};

use super::{
    Options, SERVICE, kind_name, name, outside,
    waiting::{self, Waiting},
};
use crate::{
    causes::with_sources,
    image::{SnapshotWriter, proto},
    res::{
        file::{
            Collector, Description, External, FileError, Intake, Result,
            sock::{
                SHUT_BOTH, attributes, diag,
                listed::inode,
                opts,
                queue::{self, Packet},
                state,
            },
        },
        kernel::Kernel,
    },
    sys::{fds, kernel_memory::KernelAddr},
    units::{HostPid, TargetFd},
};

const HELP_PEER: &str = "dump the program that has the other end as well, or close the connection";
const HELP_STREAM: &str = "dump the program that has it as well, or close the connection; or use \
    --external 'unix[N]', where N is the first of the numbers in brackets: then a restore with \
    --ext-unix-sk connects to its name again, and one with --inherit-fd 'fd[M]:socket:[N]' takes a \
    socket of the caller instead";
const HELP_EXTERNAL: &str = "dump the program that has it as well, or use --ext-unix-sk to connect to it \
    by name during the restore";
const HELP_ACCEPT: &str = "have the program accept its connections, then try again";
const HELP_WAITING: &str = "dump the program that has connected as well, or use --skip-in-flight, \
    which drops the connection";
const HELP_KERNEL: &str = "have the program accept its connections, or run rcriu with CAP_BPF and \
    CAP_PERFMON on a kernel with /sys/kernel/btf/vmlinux";

/// A socket that was collected.
#[derive(Debug)]
struct CollectedSocket {
    pid: HostPid,
    number: TargetFd,
    what: String,
    inode: u32,
    /// The inodes of the sockets that must be dumped with it.
    needs: Vec<u32>,
    /// The sockets in `needs` whose connections it has not accepted.
    pending: Vec<u32>,
    is_datagram: bool,
}

#[derive(Debug)]
pub(super) struct UnixCollector {
    options: Options,
    external: External,
    /// All sockets of the network namespaces that were listed, by inode.
    all: HashMap<u32, diag::UnixSocket>,
    /// The listening socket at which each connection waits to be accepted, by inode.
    waiting_at: HashMap<u32, u32>,
    collected: Vec<CollectedSocket>,
    queues: Vec<(u32, Vec<Packet>)>,
    states: attributes::AttributeReader,
    /// The memory of the kernel, once it was needed; or why it cannot be read.
    kernel: Option<Result<Kernel, String>>,
    /// Listening sockets with connections that wait.
    listeners: Vec<Listener>,
}

/// A listening socket with the connections that wait at it.
#[derive(Debug)]
struct Listener {
    file: Description,
    what: String,
    waiting: Vec<Waiting>,
}

impl UnixCollector {
    pub(super) fn new(options: Options, external: &External) -> Self {
        Self {
            options,
            external: external.clone(),
            all: HashMap::new(),
            waiting_at: HashMap::new(),
            collected: Vec::new(),
            queues: Vec::new(),
            states: attributes::AttributeReader::default(),
            kernel: None,
            listeners: Vec::new(),
        }
    }

    /// Returns the memory of the kernel, or why it cannot be read.
    fn kernel(&mut self) -> Result<&mut Kernel, &str> {
        let kernel =
            self.kernel.get_or_insert_with(|| Kernel::open().map_err(|error| with_sources(&error)));
        kernel.as_mut().map_err(|error| &**error)
    }

    /// Returns what `sock_diag(7)` reports of a socket.
    fn look_up(&mut self, file: &Description, inode: u32) -> Result<diag::UnixSocket> {
        if !self.all.contains_key(&inode) {
            let all =
                diag::unix_sockets().map_err(file.failed("list the sockets of the network for"))?;
            self.all.extend(all);
            self.waiting_at = self
                .all
                .values()
                .flat_map(|socket| socket.pending.iter().map(|peer| (*peer, socket.inode)))
                .collect();
        }
        let found = self.all.get(&inode);
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
        let Some(peer) = self.all.get(&socket.peer) else {
            return format!("the UNIX {kind} socket [{}] ({name})", socket.inode);
        };
        let peer_name = name::display(&peer.name);
        format!(
            "the UNIX {kind} socket [{}] ({name}), connected to the socket [{}] ({peer_name})",
            socket.inode, peer.inode
        )
    }

    /// Whether data that a socket has sent is still unread.
    fn has_sent(&self, inode: u32) -> bool {
        let socket = self.all.get(&inode);
        socket.is_some_and(|socket| socket.send_queue != 0)
    }

    /// Reads the connections that wait at a listening socket.
    fn look_at_waiting(
        &mut self,
        file: &Description,
        socket: &diag::UnixSocket,
        what: &str,
    ) -> Result<()> {
        if socket.pending.is_empty() {
            return Ok(());
        }
        let found = match self.kernel() {
            Ok(kernel) => waiting::read(kernel, file.fd.as_fd()).map_err(|e| with_sources(&e)),
            Err(why) => Err(why.to_owned()),
        };
        let waiting = match found {
            Ok(waiting) => waiting,
            Err(why) if socket.pending.contains(&0) => {
                let what = format!(
                    "{what}, with a pending connection whose other end is closed; what was sent \
                     into it cannot be read: {why}"
                );
                return Err(file.unsupported(what, HELP_KERNEL));
            }
            Err(why) if socket.pending.iter().any(|inode| self.has_sent(*inode)) => {
                let what =
                    format!("{what}, with a pending connection whose data cannot be read: {why}");
                return Err(file.unsupported(what, HELP_KERNEL));
            }
            // Connections without data need not be read.
            Err(why) => {
                log::debug!("{what}: cannot look at its pending connections: {why}");
                return Ok(());
            }
        };
        let copy = file.fd.try_clone().map_err(|_| file.failed("duplicate")(Errno::EMFILE))?;
        let (link, info) = (file.link.clone(), file.info.clone());
        let file = Description { fd: copy, link, info, network: file.network.clone(), ..*file };
        self.listeners.push(Listener { file, what: what.to_owned(), waiting });
        Ok(())
    }

    /// Records the connections that wait at listening sockets, with the data sent into them.
    fn record_waiting(&mut self, intake: &mut dyn Intake) -> Result<()> {
        let there: HashSet<u32> = self.collected.iter().map(|socket| socket.inode).collect();
        for Listener { file, what, waiting } in std::mem::take(&mut self.listeners) {
            let files = match self.kernel() {
                Ok(kernel) => kernel.own_files().unwrap_or_default(),
                Err(_) => HashMap::new(),
            };
            let mut entries = Vec::new();
            let pids = intake.pids().clone();
            for connection in waiting {
                // Connections of other programs are refused elsewhere, unless the user drops them.
                if connection.inode != 0 && !there.contains(&connection.inode) {
                    continue;
                }
                if connection.inode == 0 && connection.is_named {
                    warn_of_peer_name_of(&what);
                }
                let mut enter = |at: KernelAddr| -> Result<Option<u32>> {
                    let Some(number) = files.get(&at) else { return Ok(None) };
                    let copy = fds::duplicate(*number).map_err(file.failed("duplicate"))?;
                    intake.enter(copy, &file).map(Some)
                };
                let entry = connection.into_image(&pids, &mut enter)?.ok_or_else(|| {
                    let what = format!(
                        "{what}, with a pending connection whose data comes with a descriptor that \
                         no process has"
                    );
                    file.unsupported(what, HELP_ACCEPT)
                })?;
                entries.push(entry);
            }
            if let Some(state) = intake.entry(file.id).and_then(|entry| entry.sock.as_mut()) {
                state.waiting = entries;
            }
        }
        Ok(())
    }

    /// Returns the sockets that must be dumped with this one, and its peer in the images.
    fn peers(
        &mut self,
        file: &Description,
        socket: &diag::UnixSocket,
        what: &str,
    ) -> Result<(Vec<u32>, u32)> {
        let datagrams = i32::from(socket.kind) == libc::SOCK_DGRAM;
        if socket.peer != 0 {
            let peer = self.all.get(&socket.peer);
            if peer.is_some_and(|peer| peer.peer != socket.inode && peer.name.is_empty()) {
                let what = format!("{what}, which has no name and is not connected to it");
                return Err(file.unsupported(what, HELP_PEER));
            }
            return Ok((vec![socket.peer], socket.peer));
        }
        match u32::from(socket.state) {
            state::LISTEN => {
                self.look_at_waiting(file, socket, what)?;
                let open = socket.pending.iter().filter(|inode| **inode != 0);
                Ok((open.copied().collect(), 0))
            }
            state::ESTABLISHED if !datagrams => {
                if let Some(listener) = self.waiting_at.get(&socket.inode).copied() {
                    if socket.send_queue != 0
                        && let Err(why) = self.kernel()
                    {
                        let what = format!(
                            "{what}, waiting to be accepted by the socket [{listener}], with data \
                             in it that cannot be read: {why}"
                        );
                        return Err(file.unsupported(what, HELP_KERNEL));
                    }
                    return Ok((vec![listener], listener));
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

    /// Returns the entry that stands for a socket outside the tree. Returns `None` if the user did
    /// not allow the socket.
    fn external(&self, of: &CollectedSocket, inode: u32) -> Option<proto::UnixSkEntry> {
        let socket = self.all.get(&inode)?;
        let by_name = self.options.allow_external
            && i32::from(socket.kind) == libc::SOCK_DGRAM
            && !socket.name.is_empty();
        let is_peer = !of.pending.contains(&inode);
        let is_allowed = is_peer && self.external.contains(&format!("unix[{}]", of.inode));
        (by_name || is_allowed).then(|| outside::entry(socket, of.pid))
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

/// Warns of the name of a closed socket whose connection waits.
fn warn_of_peer_name_of(what: &str) {
    log::warn!(
        "{what}: a socket with a name has connected to it and is closed; after a restore, \
         getpeername(2) shows no name"
    );
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
        let inode = inode(file);
        let socket = self.look_up(file, inode)?;
        let what = self.describe(&socket);
        let is_service = socket.peer != 0 && self.options.service == Some(socket.peer);
        let (needs, peer) =
            if is_service { (Vec::new(), 0) } else { self.peers(file, &socket, &what)? };
        let is_datagram = i32::from(socket.kind) == libc::SOCK_DGRAM;
        let named = if name::is_path(&socket.name) {
            name::look_at_file(
                file,
                &socket.name,
                socket.file,
                (&what, intake.pids().ids(), intake.root_of(file)),
            )?
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
            pending: socket.pending.clone(),
            is_datagram,
        });
        let mut state = self.states.read(file, &what)?;
        state.peer = attributes::peer(fd, intake.pids())
            .map_err(file.failed("read the peer credentials of"))?;
        if !is_service && (is_datagram || u32::from(socket.state) == state::ESTABLISHED) {
            let pids = intake.pids().clone();
            let mut urgent = |fd: BorrowedFd| {
                let kernel = self.kernel().map_err(str::to_owned)?;
                waiting::read_urgent(kernel, fd, &pids).map_err(|error| with_sources(&error))
            };
            let (packets, error) =
                queue::peek(file, socket.kind.into(), &what, intake, &mut urgent)?;
            self.queues.push((file.id, packets));
            state.error = error.map(|error| (error as i32).cast_unsigned());
        }
        let entry = proto::UnixSkEntry {
            id: file.id,
            ino: inode,
            r#type: socket.kind.into(),
            state: if is_service { state::CLOSE } else { socket.state.into() },
            flags: file.flags,
            uflags: if is_service { SERVICE } else { 0 },
            backlog: socket.send_queue,
            peer,
            fown: file.fown,
            opts: opts::read(fd, libc::AF_UNIX).map_err(file.failed("read the options of"))?,
            name: socket.name,
            shutdown: opts::shutdown(socket.shutdown),
            file_perms: named.perms,
            name_dir: named.dir,
            deleted: named.deleted.then_some(true),
            ns_id: Some(file.network_number()),
            mnt_id: None,
        };
        Ok(proto::FileEntry {
            r#type: proto::FdTypes::Unixsk.into(),
            id: file.id,
            usk: Some(entry.into()),
            sock: Some(state.into()),
            ..proto::FileEntry::default()
        })
    }

    fn after_collect(&mut self, intake: &mut dyn Intake) -> Result<()> {
        let mut entries: HashMap<u32, proto::UnixSkEntry> = HashMap::new();
        if self.missing().iter().any(|(_, inode)| !self.all.contains_key(inode)) {
            // A connection may lead from a namespace of the tree to that of the dumper.
            self.all.extend(diag::unix_sockets().unwrap_or_default());
        }
        for (socket, inode) in self.missing() {
            if self.options.skip_in_flight && socket.pending.contains(&inode) {
                log::warn!(
                    "{}: its connection from the socket [{inode}], which another program has, is \
                     left out (--skip-in-flight)",
                    socket.what
                );
                continue;
            }
            match self.external(socket, inode) {
                Some(entry) => drop(entries.insert(inode, entry)),
                None => {
                    return Err(FileError::Unsupported {
                        pid: socket.pid,
                        fd: socket.number,
                        what: format!("{}; {}", socket.what, outside::place(inode)),
                        help: match socket.is_datagram {
                            true => HELP_EXTERNAL,
                            false if socket.pending.contains(&inode) => HELP_WAITING,
                            false => HELP_STREAM,
                        },
                    });
                }
            }
        }
        self.record_waiting(intake)?;
        for (_, mut entry) in entries {
            entry.id = intake.new_id();
            intake.push(proto::FileEntry {
                r#type: proto::FdTypes::Unixsk.into(),
                id: entry.id,
                usk: Some(entry.into()),
                ..proto::FileEntry::default()
            });
        }
        Ok(())
    }

    fn finish(&mut self, images: &SnapshotWriter) -> Result<()> {
        queue::write(images, &self.queues)
    }
}
