//! The socket of a client: one message a packet.

use std::{
    fmt,
    io::{self, IoSlice},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
    sync::Mutex,
};

use anyhow::{Context, bail};
use nix::{
    errno::Errno,
    sys::socket::{
        AddressFamily, ControlMessage, MsgFlags, SockType, SockaddrLike, SockaddrStorage,
        getsockname, getsockopt, recv, sendmsg, sockopt,
    },
};
use prost::Message;

use crate::{
    action::{Client, Stage},
    proto::rpc::{CriuNotify, CriuReq, CriuReqType, CriuResp},
    res::file::TakeMaster,
    units::HostPid,
};

/// The longest request that is read, in bytes. A request with thousands of mounts has less.
const LONGEST: usize = 4 << 20;

/// A connected client.
#[derive(Debug)]
pub(super) struct Channel {
    socket: OwnedFd,
    /// The process at the other end, as `SO_PEERCRED` says.
    pub(super) peer: HostPid,
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// One question at a time: its answer must not go to another thread.
    asking: Mutex<()>,
}

impl Channel {
    /// Takes a socket that a client or the user has passed.
    ///
    /// # Errors
    /// It is no connected UNIX socket that keeps packets apart.
    pub(super) fn new(socket: OwnedFd) -> anyhow::Result<Self> {
        let kind = getsockopt(&socket, sockopt::SockType).context("examine the socket")?;
        let family = getsockname::<SockaddrStorage>(socket.as_raw_fd())
            .ok()
            .and_then(|name| SockaddrLike::family(&name));
        if kind != SockType::SeqPacket || family != Some(AddressFamily::Unix) {
            bail!("the descriptor is a socket of another kind\nhelp: use AF_UNIX, SOCK_SEQPACKET");
        }
        let peer = getsockopt(&socket, sockopt::PeerCredentials).context("find the client")?;
        Ok(Self {
            socket,
            peer: HostPid(peer.pid()),
            uid: peer.uid(),
            gid: peer.gid(),
            asking: Mutex::new(()),
        })
    }

    /// Waits for a request; `None` if the client has closed the socket.
    ///
    /// # Errors
    /// A malformed or too long request.
    pub(super) fn receive(&self) -> anyhow::Result<Option<CriuReq>> {
        let len = self.packet(&mut [], MsgFlags::MSG_PEEK | MsgFlags::MSG_TRUNC)?;
        if len > LONGEST {
            bail!("a request has {len} bytes, at most {LONGEST} expected");
        }
        let mut packet = vec![0; len];
        let read = self.packet(&mut packet, MsgFlags::empty())?;
        // An empty message has no type, so no client sends one.
        if read == 0 {
            return Ok(None);
        }
        packet.truncate(read);
        CriuReq::decode(packet.as_slice()).context("read a request").map(Some)
    }

    fn packet(&self, buffer: &mut [u8], flags: MsgFlags) -> io::Result<usize> {
        loop {
            match recv(self.socket.as_raw_fd(), buffer, flags) {
                Err(Errno::EINTR) => {}
                Err(Errno::ECONNRESET) => return Ok(0),
                result => return Ok(result?),
            }
        }
    }

    /// Sends a response.
    ///
    /// # Errors
    /// The client is gone.
    pub(super) fn send(&self, response: &CriuResp) -> io::Result<()> {
        self.send_with(response, &[])
    }

    fn send_with(&self, response: &CriuResp, fds: &[RawFd]) -> io::Result<()> {
        let packet = response.encode_to_vec();
        let rights = [ControlMessage::ScmRights(fds)];
        let rights = if fds.is_empty() { &[] } else { &rights[..] };
        let bytes = [IoSlice::new(&packet)];
        let socket = self.socket.as_raw_fd();
        sendmsg::<()>(socket, &bytes, rights, MsgFlags::MSG_NOSIGNAL, None)?;
        Ok(())
    }

    /// Returns the inode of our end of the connection.
    pub(super) fn inode(&self) -> anyhow::Result<u32> {
        let found = nix::sys::stat::fstat(&self.socket).context("examine the socket")?;
        u32::try_from(found.st_ino).context("the number of the socket")
    }

    /// Returns the groups of the client, in addition to that in its credentials.
    pub(super) fn groups(&self) -> io::Result<Vec<u32>> {
        Ok(crate::sys::socket::peer_groups(self.socket.as_fd())?)
    }
}

/// The notification that comes with the master of a pseudoterminal.
const ORPHAN_MASTER: &str = "orphan-pts-master";

impl Client for Channel {
    fn notify(&self, stage: Stage, root: Option<HostPid>) -> Result<(), String> {
        self.ask(stage.name(), root, &[])
    }
}

impl TakeMaster for Channel {
    fn take(&self, master: BorrowedFd<'_>) -> Result<(), String> {
        self.ask(ORPHAN_MASTER, None, &[master.as_raw_fd()])
    }
}

impl Channel {
    /// Notifies the client, which also gets descriptors, and waits until it has agreed.
    fn ask(&self, script: &str, root: Option<HostPid>, fds: &[RawFd]) -> Result<(), String> {
        let _asking = self.asking.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let failed = |error: &dyn fmt::Display| error.to_string();
        let response = CriuResp {
            r#type: CriuReqType::Notify.into(),
            success: true,
            notify: Some(CriuNotify {
                script: Some(script.as_bytes().to_vec()),
                pid: root.map(|root| root.0),
            }),
            ..CriuResp::default()
        };
        self.send_with(&response, fds).map_err(|error| failed(&error))?;
        let answer = self.receive().map_err(|error| failed(&format!("{error:#}")))?;
        match answer {
            None => Err("it has closed the socket instead of an answer".to_owned()),
            Some(answer) if answer.r#type() != CriuReqType::Notify => {
                Err(format!("it has answered with a request {:?}", answer.r#type()))
            }
            Some(answer) if answer.notify_success != Some(true) => {
                Err("its answer is not that it succeeded".to_owned())
            }
            Some(_) => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use nix::sys::socket::{SockFlag, send, socketpair};

    use super::*;

    fn pair() -> (Channel, OwnedFd) {
        let (a, b) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
                .unwrap();
        (Channel::new(a).unwrap(), b)
    }

    fn answer(to: &OwnedFd, request: &CriuReq) {
        send(to.as_raw_fd(), &request.encode_to_vec(), MsgFlags::empty()).unwrap();
    }

    #[test]
    fn a_client_is_notified_and_answers() {
        let (channel, client) = pair();
        assert_eq!(channel.peer.0, nix::unistd::getpid().as_raw());
        let notify = CriuReq { r#type: CriuReqType::Notify.into(), ..CriuReq::default() };
        answer(&client, &CriuReq { notify_success: Some(true), ..notify.clone() });
        channel.notify(Stage::PostDump, Some(HostPid(7))).unwrap();
        let mut packet = [0; 100];
        let len = recv(client.as_raw_fd(), &mut packet, MsgFlags::empty()).unwrap();
        let seen = CriuResp::decode(&packet[..len]).unwrap();
        assert_eq!(
            seen.notify,
            Some(CriuNotify { script: Some("post-dump".into()), pid: Some(7) })
        );
        answer(&client, &CriuReq { notify_success: Some(false), ..notify.clone() });
        assert!(channel.notify(Stage::PostDump, None).unwrap_err().contains("not that it"));
        answer(&client, &CriuReq { r#type: CriuReqType::Dump.into(), ..notify });
        assert!(channel.notify(Stage::PostDump, None).unwrap_err().contains("request Dump"));
        drop(client);
        assert!(channel.notify(Stage::PostDump, None).is_err());
    }

    #[test]
    fn what_is_no_request_is_an_error() {
        let (channel, client) = pair();
        send(client.as_raw_fd(), b"\xff\xff\xff", MsgFlags::empty()).unwrap();
        assert!(channel.receive().is_err());
        send(client.as_raw_fd(), b"", MsgFlags::empty()).unwrap();
        assert_eq!(channel.receive().unwrap(), None);
        drop(client);
        assert_eq!(channel.receive().unwrap(), None);
        let (stream, _other) =
            socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::SOCK_CLOEXEC)
                .unwrap();
        assert!(Channel::new(stream).is_err());
    }
}
