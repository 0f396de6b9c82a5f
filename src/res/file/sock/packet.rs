//! Packet sockets (`packet(7)`), which see the packets of interfaces.
//!
//! The restore receives nothing before the filter is attached: it creates the socket without a
//! protocol, and binds it last. Packets in a queue or a ring are lost. A ring that is mapped is
//! refused, since the mapping is.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::{
    errno::Errno,
    libc::{self, c_int},
    poll::PollFlags,
};
use zerocopy::{Immutable, IntoBytes};

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
    name: "packet socket",
    types: &[proto::FdTypes::Packetsk],
    usage: Usage::Descriptor,
    collector: |_| Box::new(PacketCollector::default()),
    opener: |_| Box::new(PacketOpener),
};

/// Options (`linux/if_packet.h`).
const ADD_MEMBERSHIP: c_int = 1;
const RX_RING: c_int = 5;
const COPY_THRESH: c_int = 7;
const AUXDATA: c_int = 8;
const ORIGDEV: c_int = 9;
const VERSION: c_int = 10;
const RESERVE: c_int = 12;
const TX_RING: c_int = 13;
const LOSS: c_int = 14;
const VNET_HDR: c_int = 15;
const TIMESTAMP: c_int = 17;
const FANOUT: c_int = 18;

/// Ways to choose a socket of a group that need a program (`PACKET_FANOUT_CBPF`, `PACKET_FANOUT_EBPF`).
const FANOUT_PROGRAMS: [u32; 2] = [6, 7];

/// `PDI_*`, `linux/packet_diag.h`.
const FLAG_AUXDATA: u32 = 2;
const FLAG_ORIGDEV: u32 = 4;
const FLAG_VNET_HDR: u32 = 8;
const FLAG_LOSS: u32 = 16;

/// The longest address of an interface (`MAX_ADDR_LEN`, `linux/netdevice.h`).
const ADDRESS_BYTES: usize = 32;

const HELP: &str = "have the program close it, then try again";

/// `struct packet_mreq`, with room for the longest address.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Membership {
    index: u32,
    kind: u16,
    address_len: u16,
    address: [u8; ADDRESS_BYTES],
}

#[derive(Debug)]
struct PacketCollector {
    all: Listed<diag::PacketSocket>,
    states: attributes::AttributeReader,
}

impl Default for PacketCollector {
    fn default() -> Self {
        let states = attributes::AttributeReader::default();
        Self { all: Listed::by(diag::packet_sockets), states }
    }
}

impl Collector for PacketCollector {
    fn claims(&self, file: &Description) -> bool {
        file.is_type(libc::S_IFSOCK) && opts::family(file.fd.as_fd()) == Ok(libc::AF_PACKET)
    }

    fn collect(&mut self, file: &Description, _: &mut dyn Intake) -> Result<proto::FileEntry> {
        let fd = file.fd.as_fd();
        let what = format!("the packet socket [{}]", inode(file));
        let kind = opts::kind(fd).map_err(file.failed("ask for the type of"))?;
        if !matches!(kind, libc::SOCK_RAW | libc::SOCK_DGRAM) {
            return Err(file.unsupported(format!("{what} of an old type (SOCK_PACKET)"), HELP));
        }
        let found = self.all.find(file)?;
        let found =
            found.ok_or_else(|| file.failed("find in the list of sockets")(Errno::ENOENT))?;
        let fanout = fanout(fd).map_err(file.failed("ask for the group (PACKET_FANOUT) of"))?;
        if fanout.is_some_and(|value| FANOUT_PROGRAMS.contains(&(value >> 16 & 0xff))) {
            let what = format!("{what}, in a group with a program (PACKET_FANOUT_DATA)");
            return Err(file.unsupported(what, HELP));
        }
        let seen = descriptor::events_among(fd, PollFlags::POLLIN).map_err(file.failed("poll"))?;
        if seen.contains(PollFlags::POLLERR) {
            log::warn!("{what} has an unread error: it will be lost");
        }
        if seen.contains(PollFlags::POLLIN) {
            log::warn!("{what} has packets in its queue: they will be lost");
        }
        let state = self.states.read(file, &what)?;
        let has = |flag| found.info.flags & flag != 0;
        let entry = proto::PacketSockEntry {
            id: file.id,
            r#type: kind.cast_unsigned(),
            protocol: found.protocol.to_be().into(),
            flags: file.flags,
            ifindex: found.info.index,
            fown: file.fown,
            opts: opts::read(fd, libc::AF_PACKET).map_err(file.failed("read the options of"))?,
            version: found.info.version,
            reserve: found.info.reserve,
            aux_data: has(FLAG_AUXDATA),
            orig_dev: has(FLAG_ORIGDEV),
            vnet_hdr: has(FLAG_VNET_HDR),
            loss: has(FLAG_LOSS),
            timestamp: found.info.timestamp,
            copy_thresh: found.info.copy_thresh,
            mclist: found.memberships.iter().flat_map(memberships).collect(),
            fanout,
            rx_ring: found.receive_ring.map(ring),
            tx_ring: found.send_ring.map(ring),
            ns_id: Some(file.network_number()),
        };
        Ok(proto::FileEntry {
            r#type: proto::FdTypes::Packetsk.into(),
            id: file.id,
            psk: Some(entry.into()),
            sock: Some(state.into()),
            ..proto::FileEntry::default()
        })
    }
}

/// Returns the group of sockets that share packets, with how they do; `None` without one.
fn fanout(fd: BorrowedFd) -> nix::Result<Option<u32>> {
    let value: u32 = socket::option(fd, libc::SOL_PACKET, FANOUT)?;
    Ok((value != 0).then_some(value))
}

/// Returns a membership as often as the program has joined.
fn memberships(found: &diag::PacketMembership) -> Vec<proto::PacketMclist> {
    let len = usize::from(found.address_len).min(ADDRESS_BYTES);
    let one = proto::PacketMclist {
        index: found.index,
        r#type: found.kind.into(),
        addr: found.address[..len].to_vec(),
    };
    vec![one; found.count as usize]
}

fn ring(found: diag::PacketRing) -> proto::PacketRing {
    proto::PacketRing {
        block_size: found.block_size,
        block_nr: found.block_nr,
        frame_size: found.frame_size,
        frame_nr: found.frame_nr,
        retire_tmo: found.retire_tmo,
        sizeof_priv: found.sizeof_priv,
        features: found.features,
    }
}

#[derive(Debug)]
struct PacketOpener;

impl Opener for PacketOpener {
    fn open(&mut self, entries: &[proto::FileEntry], opened: &mut Opened) -> Result<()> {
        for file in entries {
            let problem = "it is a packet socket, but its packet_sock_entry is missing".to_owned();
            let entry = file.psk.as_ref().ok_or(FileError::Image { id: file.id, problem })?;
            if !opened.contains(entry.id) {
                let fd = open(entry, file.sock.as_deref(), opened)?;
                opened.insert(entry.id, fd);
            }
        }
        Ok(())
    }
}

fn open(
    entry: &proto::PacketSockEntry,
    state: Option<&proto::SkStateEntry>,
    opened: &Opened,
) -> Result<OwnedFd> {
    let object = format!("the packet socket of protocol {:#x}", entry.protocol);
    let restored = Subject { id: entry.id, object };
    let kind = entry.r#type.cast_signed();
    if !matches!(kind, libc::SOCK_RAW | libc::SOCK_DGRAM) {
        return Err(restored.wrong("rcriu does not restore sockets of this type"));
    }
    let _visit = opened.networks.visit(entry.ns_id)?;
    let make = || socket::create(libc::AF_PACKET, kind, 0);
    let socket = owner::as_owner(entry.id, opened, make).map_err(restored.failed("create"))?;
    owner::restore(entry.id, &socket, opened)?;
    let fd = socket.as_fd();
    let numbers = [
        (VERSION, entry.version, "set PACKET_VERSION of"),
        (RESERVE, entry.reserve, "set PACKET_RESERVE of"),
        (TIMESTAMP, entry.timestamp, "set PACKET_TIMESTAMP of"),
        (AUXDATA, entry.aux_data.into(), "set PACKET_AUXDATA of"),
        (ORIGDEV, entry.orig_dev.into(), "set PACKET_ORIGDEV of"),
        (VNET_HDR, entry.vnet_hdr.into(), "set PACKET_VNET_HDR of"),
        (LOSS, entry.loss.into(), "set PACKET_LOSS of"),
    ];
    for (name, value, step) in numbers {
        opts::ensure(fd, libc::SOL_PACKET, name, value).map_err(restored.failed(step))?;
    }
    let set = |name, value: &[u8], step| {
        socket::set_option(fd, libc::SOL_PACKET, name, value).map_err(restored.failed(step))
    };
    if entry.copy_thresh != 0 {
        set(COPY_THRESH, entry.copy_thresh.as_bytes(), "set PACKET_COPY_THRESH of")?;
    }
    opts::restore(fd, &entry.opts, &restored)?;
    opts::restore_reuse(fd, (entry.opts.reuseaddr, entry.opts.so_reuseport), &restored)?;
    attributes::restore_options(fd, state, &restored)?;
    for (name, ring) in [(RX_RING, &entry.rx_ring), (TX_RING, &entry.tx_ring)] {
        if let Some(ring) = ring {
            set(name, request(ring).as_bytes(), "make a ring of")?;
        }
    }
    for one in &entry.mclist {
        let membership =
            membership(one).ok_or_else(|| restored.wrong("a membership is invalid"))?;
        set(ADD_MEMBERSHIP, membership.as_bytes(), "join a group of an interface with")?;
    }
    if entry.protocol != 0 || entry.ifindex != 0 {
        let protocol = u16::try_from(entry.protocol)
            .map_err(|_| restored.wrong(format!("its protocol is {:#x}", entry.protocol)))?;
        socket::bind_packet(fd, protocol, entry.ifindex).map_err(restored.failed("bind"))?;
    }
    if let Some(fanout) = entry.fanout.filter(|fanout| *fanout != u32::MAX) {
        set(FANOUT, fanout.as_bytes(), "add to a group (PACKET_FANOUT)")?;
    }
    attributes::lock_filter(fd, state, &restored)?;
    opts::restore_flags(fd, entry.flags, &restored)?;
    Ok(socket)
}

fn membership(entry: &proto::PacketMclist) -> Option<Membership> {
    let mut membership = Membership {
        index: entry.index,
        kind: u16::try_from(entry.r#type).ok()?,
        address_len: u16::try_from(entry.addr.len()).ok()?,
        address: [0; ADDRESS_BYTES],
    };
    membership.address.get_mut(..entry.addr.len())?.copy_from_slice(&entry.addr);
    Some(membership)
}

/// Returns `struct tpacket_req3` for a ring.
fn request(ring: &proto::PacketRing) -> [u32; 7] {
    [
        ring.block_size,
        ring.block_nr,
        ring.frame_size,
        ring.frame_nr,
        ring.retire_tmo,
        ring.sizeof_priv,
        ring.features,
    ]
}
