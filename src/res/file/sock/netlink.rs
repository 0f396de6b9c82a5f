//! Netlink sockets with empty queues.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use nix::{
    errno::Errno,
    libc,
    poll::PollFlags,
    sys::socket::{NetlinkAddr, bind, connect},
};

use super::{
    attributes, diag,
    listed::{Listed, inode},
    opts::{self, Subject},
};
use crate::{
    image::proto,
    res::file::{
        Collector, Description, FileError, FileKind, Intake, Opened, Opener, Result, Usage,
        descriptor, owner,
    },
    sys::socket,
};

/// The row of [`KINDS`](crate::res::file::KINDS).
pub(in crate::res::file) const KIND: FileKind = FileKind {
    name: "netlink socket",
    types: &[proto::FdTypes::Netlinksk],
    usage: Usage::Descriptor,
    collector: |_| Box::new(NetlinkCollector::default()),
    opener: |_| Box::new(NetlinkOpener),
};

/// `NETLINK_CONNECTED`, `net/netlink/af_netlink.c`.
const CONNECTED: u32 = 1;

/// `NETLINK_ADD_MEMBERSHIP` and, since Linux 4.2, `NETLINK_LIST_MEMBERSHIPS` (`linux/netlink.h`).
const ADD_MEMBERSHIP: libc::c_int = 1;
const LIST_MEMBERSHIPS: libc::c_int = 9;

/// Groups that `bind(2)` can join: those with a bit in `struct sockaddr_nl`.
const GROUPS_OF_AN_ADDRESS: u32 = 32;

/// More bytes than the groups of any protocol take.
const GROUPS_BYTES: usize = 1024;

const HELP: &str = "have the program read it or leave the groups, then try again";

#[derive(Debug)]
struct NetlinkCollector {
    all: Listed<diag::NetlinkSocket>,
    states: attributes::AttributeReader,
}

impl Default for NetlinkCollector {
    fn default() -> Self {
        let states = attributes::AttributeReader::default();
        Self { all: Listed::by(diag::netlink_sockets), states }
    }
}

impl Collector for NetlinkCollector {
    fn claims(&self, file: &Description) -> bool {
        file.is_type(libc::S_IFSOCK) && opts::family(file.fd.as_fd()) == Ok(libc::AF_NETLINK)
    }

    fn collect(&mut self, file: &Description, _: &mut dyn Intake) -> Result<proto::FileEntry> {
        let fd = file.fd.as_fd();
        let inode = inode(file);
        let protocol = opts::protocol(fd).map_err(file.failed("ask for the protocol of"))?;
        let what = format!("the netlink socket [{inode}] of protocol {protocol}");
        let seen = descriptor::events_among(fd, PollFlags::POLLIN).map_err(file.failed("poll"))?;
        if seen.contains(PollFlags::POLLERR) {
            let what = format!("{what}, with an error that its program has not read");
            return Err(file.unsupported(what, HELP));
        }
        if seen.contains(PollFlags::POLLIN) {
            return Err(file.unsupported(format!("{what}, with messages in its queue"), HELP));
        }
        // The kernel lists no socket without an address.
        let bound = self.all.find(file)?.filter(|bound| bound.port != 0);
        let mut groups = bound.map(|bound| bound.groups.clone()).unwrap_or_default();
        // The list above lacks groups of sockets without an address, and some of those above 32.
        if let Ok(joined) = memberships(fd) {
            groups = joined;
        }
        while groups.last() == Some(&0) {
            groups.pop();
        }
        let state = self.states.read(file, &what)?;
        let entry = proto::NetlinkSkEntry {
            id: file.id,
            ino: inode,
            protocol: protocol.cast_unsigned(),
            state: bound.map_or(0, |bound| bound.state.into()),
            flags: file.flags,
            portid: bound.map_or(0, |bound| bound.port),
            // A socket without groups may still have the first word.
            groups,
            dst_portid: bound.map_or(0, |bound| bound.peer_port),
            dst_group: bound.map_or(0, |bound| bound.peer_group),
            fown: file.fown,
            opts: opts::read(fd, libc::AF_NETLINK).map_err(file.failed("read the options of"))?,
            ns_id: Some(file.network_number()),
        };
        Ok(proto::FileEntry {
            r#type: proto::FdTypes::Netlinksk.into(),
            id: file.id,
            nlsk: Some(entry.into()),
            sock: Some(state.into()),
            ..proto::FileEntry::default()
        })
    }
}

/// Returns the groups that a socket has joined, 32 in a word.
fn memberships(fd: BorrowedFd) -> nix::Result<Vec<u32>> {
    let mut bytes = vec![0; GROUPS_BYTES];
    let len = socket::option_bytes(fd, libc::SOL_NETLINK, LIST_MEMBERSHIPS, &mut bytes)?;
    let words = bytes.get(..len).ok_or(Errno::EOVERFLOW)?.chunks_exact(size_of::<u32>());
    Ok(words.map(|word| u32::from_ne_bytes(word.try_into().expect("chunks of 4"))).collect())
}

/// Returns the bits of words, the lowest of each first.
fn bits(words: &[u32]) -> impl Iterator<Item = bool> {
    words.iter().flat_map(|word| (0..u32::BITS).map(move |bit| word >> bit & 1 == 1))
}

#[derive(Debug)]
struct NetlinkOpener;

impl Opener for NetlinkOpener {
    fn open(&mut self, entries: &[proto::FileEntry], opened: &mut Opened) -> Result<()> {
        for file in entries {
            let problem = "it is a netlink socket, but its netlink_sk_entry is missing".to_owned();
            let entry = file.nlsk.as_ref().ok_or(FileError::Image { id: file.id, problem })?;
            if opened.contains(entry.id) {
                continue;
            }
            let object =
                format!("the netlink socket [{}] of protocol {}", entry.ino, entry.protocol);
            let restored = Subject { id: entry.id, object };
            let protocol = entry.protocol.cast_signed();
            let _visit = opened.networks.visit(entry.ns_id)?;
            let make = || socket::create(libc::AF_NETLINK, libc::SOCK_RAW, protocol);
            let fd = owner::as_owner(file.id, opened, make).map_err(restored.failed("create"))?;
            owner::restore(file.id, &fd, opened)?;
            let groups = entry.groups.first().copied().unwrap_or(0);
            if entry.portid != 0 {
                // The kernel usually chooses the pid as the port, so any other port will do.
                let address = |port| NetlinkAddr::new(port, groups);
                if bind(fd.as_raw_fd(), &address(entry.portid)).is_err() {
                    bind(fd.as_raw_fd(), &address(0)).map_err(restored.failed("bind"))?;
                    log::warn!(
                        "{} gets another port: it cannot be bound to port {}",
                        restored.object,
                        entry.portid
                    );
                }
            }
            for group in
                (1..).zip(bits(&entry.groups)).filter_map(|(number, on)| on.then_some(number))
            {
                if entry.portid == 0 || group > GROUPS_OF_AN_ADDRESS {
                    socket::set_option(fd.as_fd(), libc::SOL_NETLINK, ADD_MEMBERSHIP, &group)
                        .map_err(restored.failed("join a group of"))?;
                }
            }
            if entry.state == CONNECTED {
                let group = entry.dst_group.checked_sub(1).map_or(0, |bit| 1_u32.wrapping_shl(bit));
                connect(fd.as_raw_fd(), &NetlinkAddr::new(entry.dst_portid, group))
                    .map_err(restored.failed("connect"))?;
            }
            opts::restore(fd.as_fd(), &entry.opts, &restored)?;
            attributes::restore_options(fd.as_fd(), file.sock.as_deref(), &restored)?;
            attributes::lock_filter(fd.as_fd(), file.sock.as_deref(), &restored)?;
            opts::restore_flags(fd.as_fd(), entry.flags, &restored)?;
            opened.insert(entry.id, fd);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use nix::sys::socket::getsockname;

    use super::*;
    use crate::res::file::{
        DumpOptions,
        sock::testing::{dump, refused},
    };

    fn netlink(protocol: i32) -> std::os::fd::OwnedFd {
        socket::create(libc::AF_NETLINK, libc::SOCK_RAW, protocol).unwrap()
    }

    #[test]
    fn bound_and_unbound_sockets_are_restored() {
        let [plain, bound] = [netlink(libc::NETLINK_ROUTE), netlink(libc::NETLINK_KOBJECT_UEVENT)];
        bind(bound.as_raw_fd(), &NetlinkAddr::new(0, 1)).unwrap();
        let name = |fd: i32| getsockname::<NetlinkAddr>(fd).unwrap();
        let before = name(bound.as_raw_fd());
        let restored = dump(vec![plain, bound], &DumpOptions::default()).unwrap().open().unwrap();
        assert_eq!(name(restored.get(0).as_raw_fd()).pid(), 0);
        let after = name(restored.get(1).as_raw_fd());
        assert_eq!((after.pid(), after.groups()), (before.pid(), before.groups()));
    }

    #[test]
    fn a_queue_with_messages_is_refused() {
        let socket = netlink(libc::NETLINK_ROUTE);
        // Any request has an answer, if only an error.
        let request = [16_u8, 0, 0, 0, 0xff, 0, 5, 0, 1, 0, 0, 0, 0, 0, 0, 0];
        nix::sys::socket::send(socket.as_raw_fd(), &request, nix::sys::socket::MsgFlags::empty())
            .unwrap();
        let message = refused(vec![socket], &DumpOptions::default());
        assert!(message.contains("with messages in its queue"), "{message}");
    }
}
