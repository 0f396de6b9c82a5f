//! Connections that a listening socket has not accepted, in their order, with the data sent into
//! them.
//!
//! No call shows such data without accepting the connection, so the dump reads the memory of the
//! kernel ([`kernel`](crate::res::kernel)). The socket that has connected may be closed
//! already: then the restore connects another one, sends the data, and closes it.

use std::{
    collections::HashMap,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use nix::libc;

use super::{
    peer::{Caller, Callers},
    socket::{Link, Socket},
};
use crate::{
    image::proto,
    res::{
        file::{
            Opened, Result,
            error::errno,
            sock::{
                attributes,
                opts::{self, Subject},
                queue::{self, Packet},
                skb, state,
            },
        },
        kernel::{Credentials, Kernel, KernelError, KernelResult},
    },
    sys::kernel_memory::KernelAddr,
    units::{HostId, HostPid, PidMap},
};

/// The most connections that wait, and the most messages in one of them. The first is that of the
/// kernel's `net.core.somaxconn` at its largest; the second is far above what fits into a buffer.
const CONNECTIONS_MAX: u32 = 1 << 16;
const MESSAGES_MAX: u32 = 1 << 16;

/// The most descriptors in a message (`SCM_MAX_FD`, `net/scm.h`).
const RIGHTS_MAX: usize = 253;

/// The id of no user.
const NO_ID: u32 = u32::MAX;

/// A connection that was not accepted.
#[derive(Debug)]
pub(super) struct Waiting {
    /// The socket that has connected; 0 if it is closed.
    pub(super) inode: u32,
    /// The credentials that the accepting end will show.
    caller: Credentials,
    /// Whether the socket has a name.
    pub(super) is_named: bool,
    packets: Vec<Message>,
}

/// A message in a queue.
#[derive(Debug)]
struct Message {
    data: Vec<u8>,
    /// The files that were sent with it.
    files: Vec<KernelAddr>,
    sender: Option<Credentials>,
}

/// Reads the connections that wait at a listening socket.
pub(super) fn read(kernel: &mut Kernel, listener: BorrowedFd) -> KernelResult<Vec<Waiting>> {
    let sock = skb::sock(kernel, listener)?;
    let mut found = Vec::new();
    for message in skb::queue(kernel, sock, CONNECTIONS_MAX)? {
        let end = kernel.pointer(message, "sk_buff", "sk")?;
        let peer = kernel.pointer(end, "unix_sock", "peer")?;
        let (mut inode, mut is_named) = (0, false);
        if !peer.is_null() {
            is_named = !kernel.pointer(peer, "unix_sock", "addr")?.is_null();
            let socket = kernel.pointer(peer, "sock", "sk_socket")?;
            if !socket.is_null() {
                let both = kernel.containing(socket, "socket_alloc", "socket")?;
                let number = kernel.member(both, "socket_alloc", "vfs_inode")?;
                let number = kernel.long(number, "inode", "i_ino")?;
                inode = u32::try_from(number).map_err(|_| KernelError::Unexpected("an inode"))?;
            }
        }
        let oob = kernel.pointer(end, "unix_sock", "oob_skb");
        // Kernels without out-of-band data lack the member.
        if oob.is_ok_and(|oob| !oob.is_null()) {
            return Err(KernelError::Unexpected("an urgent byte in a connection"));
        }
        let pid = kernel.pointer(end, "sock", "sk_peer_pid")?;
        let cred = kernel.pointer(end, "sock", "sk_peer_cred")?;
        let caller = kernel.credentials(pid, cred)?;
        let messages = skb::queue(kernel, end, MESSAGES_MAX)?;
        let packets = messages.into_iter().map(|at| read_message(kernel, at));
        let packets = packets.collect::<KernelResult<_>>()?;
        found.push(Waiting { inode, caller, is_named, packets });
    }
    Ok(found)
}

/// Reads the queue of a stream, with an out-of-band byte but without descriptors.
pub(super) fn read_urgent(
    kernel: &mut Kernel,
    fd: BorrowedFd,
    pids: &PidMap,
) -> KernelResult<Vec<Packet>> {
    let sock = skb::sock(kernel, fd)?;
    let marked = kernel.pointer(sock, "unix_sock", "oob_skb")?;
    let mut packets: Vec<Packet> = Vec::new();
    for at in skb::queue(kernel, sock, MESSAGES_MAX)? {
        let mut message = read_message(kernel, at)?;
        let control = kernel.member(at, "sk_buff", "cb")?;
        let consumed = kernel.word(control, "unix_skb_parms", "consumed")? as usize;
        let data = message.data.split_off(consumed.min(message.data.len()));
        if !message.files.is_empty() {
            return Err(KernelError::Unexpected("descriptors near an urgent byte"));
        }
        let sender = message.sender.filter(|sender| sender.pid != 0);
        let sender = sender.map(|sender| to_image(sender, pids));
        let urgent = at == marked;
        match packets.last_mut() {
            _ if data.is_empty() => {}
            Some(last) if !last.urgent && !urgent && last.sender == sender => {
                last.data.extend(data);
            }
            _ => packets.push(Packet { data, rights: Vec::new(), sender, urgent }),
        }
    }
    Ok(packets)
}

/// Reads a `struct sk_buff` of a UNIX socket.
fn read_message(kernel: &mut Kernel, at: KernelAddr) -> KernelResult<Message> {
    let data = skb::data(kernel, at)?;
    let control = kernel.member(at, "sk_buff", "cb")?;
    let pid = kernel.pointer(control, "unix_skb_parms", "pid")?;
    let [uid, gid] = [
        kernel.word(control, "unix_skb_parms", "uid")?,
        kernel.word(control, "unix_skb_parms", "gid")?,
    ];
    let sender = if pid.is_null() && uid == NO_ID {
        None
    } else {
        Some(Credentials { pid: kernel.pid(pid)?, uid, gid, groups: Vec::new() })
    };
    let rights = kernel.pointer(control, "unix_skb_parms", "fp")?;
    let files = if rights.is_null() { Vec::new() } else { read_rights(kernel, rights)? };
    Ok(Message { data, files, sender })
}

/// Reads a `struct scm_fp_list`.
fn read_rights(kernel: &mut Kernel, at: KernelAddr) -> KernelResult<Vec<KernelAddr>> {
    let count = kernel.member(at, "scm_fp_list", "count")?;
    let count = kernel.bytes(count, 2, "descriptors in a message")?;
    let count = usize::from(u16::from_ne_bytes(count.try_into().expect("2 bytes")));
    if count > RIGHTS_MAX {
        return Err(KernelError::Unexpected("descriptors in a message"));
    }
    let list = kernel.member(at, "scm_fp_list", "fp")?;
    let bytes = kernel.bytes(list, count * 8, "descriptors in a message")?;
    let addresses = bytes.chunks_exact(8);
    Ok(addresses
        .map(|bytes| KernelAddr(u64::from_ne_bytes(bytes.try_into().expect("chunks of 8"))))
        .collect())
}

/// Returns credentials in the form of the images.
fn to_image(found: Credentials, pids: &PidMap) -> proto::SkPeerEntry {
    let pid = if found.pid == 0 { 0 } else { pids.ns(HostPid(found.pid)).raw() };
    let (uid, gid) = pids.ids().ns_owner((found.uid, found.gid));
    let groups = found.groups.into_iter().map(|group| pids.ids().ns_group(HostId(group)).0);
    proto::SkPeerEntry { pid, uid, gid, groups: groups.collect() }
}

impl Waiting {
    /// Builds the entry in the images. `enter` returns the number of a file in the images; `None`
    /// if the dump has no descriptor of it.
    pub(super) fn into_image(
        self,
        pids: &PidMap,
        enter: &mut dyn FnMut(KernelAddr) -> Result<Option<u32>>,
    ) -> Result<Option<proto::SkWaitingEntry>> {
        let mut packets = Vec::new();
        for Message { data, files, sender } in self.packets {
            let mut rights = Vec::new();
            for file in files {
                let Some(id) = enter(file)? else { return Ok(None) };
                rights.push(id);
            }
            let sender = sender.map(|sender| to_image(sender, pids));
            packets.push(proto::SkWaitingPacketEntry { data, rights, sender });
        }
        Ok(Some(proto::SkWaitingEntry {
            ino: (self.inode != 0).then_some(self.inode),
            caller: Some(to_image(self.caller, pids)),
            packets,
        }))
    }
}

/// Data to send into a connection that a restore has made.
#[derive(Debug)]
pub(super) struct Unsent {
    /// The socket that sends it.
    from: OwnedFd,
    packets: Vec<proto::SkWaitingPacketEntry>,
    restored: Subject,
}

impl Unsent {
    /// Sends the data. Closes a socket that was closed.
    pub(super) fn send(self, opened: &Opened) -> Result<()> {
        let packets = self.packets.into_iter().map(|packet| Packet {
            data: packet.data,
            rights: packet.rights,
            sender: packet.sender,
            urgent: false,
        });
        queue::send(self.from.as_fd(), packets, &self.restored, opened)
    }
}

/// Makes the connections that wait to be accepted, in their order. Returns the data to send.
pub(super) fn connect(all: &mut [Socket], callers: &mut Callers) -> Result<Vec<Unsent>> {
    let mut unsent = Vec::new();
    let by_inode: HashMap<u32, usize> =
        all.iter().enumerate().map(|(at, socket)| (socket.entry.ino, at)).collect();
    let mut made = vec![false; all.len()];
    for at in 0..all.len() {
        if all[at].entry.state != state::LISTEN || all[at].is_external() {
            continue;
        }
        let waiting = std::mem::take(&mut all[at].state.waiting);
        if !waiting.is_empty() {
            all[at].set_what_is_inherited()?;
        }
        for waiting in waiting {
            let client = waiting.ino.and_then(|ino| by_inode.get(&ino).copied());
            let listener = &all[at];
            let caller = waiting.caller.map(|peer| Caller { peer, instead: None });
            let from = match client {
                Some(client) if all[client].link == Link::Waiting(at) => {
                    if std::mem::replace(&mut made[client], true) {
                        let problem = "two connections of it wait to be accepted";
                        return Err(all[client].restored.wrong(problem));
                    }
                    let client = &all[client];
                    let caller = caller.or_else(|| client.caller());
                    listener.let_in(client.fd()?, caller, client, callers)?;
                    let copy = client.fd()?.try_clone_to_owned();
                    copy.map_err(|error| client.restored.failed("duplicate")(errno(&error)))?
                }
                Some(client) => {
                    let problem = "it does not wait to be accepted where the images say so";
                    return Err(all[client].restored.wrong(problem));
                }
                None => {
                    let fd = listener.make()?;
                    listener.let_in(fd.as_fd(), caller, listener, callers)?;
                    fd
                }
            };
            let restored = all[at].restored.clone();
            unsent.push(Unsent { from, packets: waiting.packets, restored });
        }
    }
    // CRIU's images do not tell the order.
    for (at, socket) in all.iter().enumerate() {
        let Link::Waiting(listener) = socket.link else { continue };
        if !made[at] {
            let listener = &all[listener];
            listener.let_in(socket.fd()?, socket.caller(), socket, callers)?;
        }
    }
    Ok(unsent)
}

impl Socket {
    /// Sets the options that the end of a connection takes over from a listening socket.
    fn set_what_is_inherited(&self) -> Result<()> {
        let (fd, options) = (self.fd()?, &self.entry.opts);
        for (name, value) in
            [(libc::SO_PASSCRED, options.so_passcred), (libc::SO_PASSSEC, options.so_passsec)]
        {
            if let Some(value) = value {
                opts::ensure(fd, libc::SOL_SOCKET, name, value.into())
                    .map_err(self.restored.failed("set an option of"))?;
            }
        }
        attributes::restore_options(fd, Some(&self.state), &self.restored)
    }

    /// Connects `fd` to this listening socket, with the credentials that `client` shows of it.
    fn let_in(
        &self,
        fd: BorrowedFd,
        caller: Option<Caller>,
        client: &Self,
        callers: &mut Callers,
    ) -> Result<()> {
        let listens = self.caller_shown_by(client);
        callers.listen(listens.as_ref(), self.fd()?, self.entry.backlog, &self.restored)?;
        callers.connect(caller.as_ref(), fd, self.address(), &client.restored)
    }
}
