//! Sockets of families that rcriu does not dump: it reports them by name.

use std::os::fd::AsFd;

use nix::libc;

use super::opts;
use crate::{
    image::proto,
    res::file::{
        Collector, Description, FileError, FileKind, Intake, Opened, Opener, Result, Usage,
    },
};

/// The row of [`KINDS`](crate::res::file::KINDS). Comes after all other sockets, since it claims
/// every socket.
pub(in crate::res::file) const KIND: FileKind = FileKind {
    name: "socket",
    types: &[proto::FdTypes::Packetsk],
    usage: Usage::Descriptor,
    collector: |_| Box::new(UnsupportedSockets),
    opener: |_| Box::new(UnsupportedSockets),
};

#[derive(Debug)]
struct UnsupportedSockets;

/// Returns the name of a family in messages.
fn family_name(family: i32) -> &'static str {
    match family {
        libc::AF_PACKET => "packet socket",
        libc::AF_VSOCK => "virtual machine socket (AF_VSOCK)",
        libc::AF_ALG => "kernel crypto socket (AF_ALG)",
        libc::AF_XDP => "AF_XDP socket",
        libc::AF_BLUETOOTH => "Bluetooth socket",
        libc::AF_CAN => "CAN bus socket",
        libc::AF_TIPC => "TIPC socket",
        _ => "socket of an unknown family",
    }
}

impl Collector for UnsupportedSockets {
    fn claims(&self, file: &Description) -> bool {
        file.is_type(libc::S_IFSOCK)
    }

    fn collect(&mut self, file: &Description, _: &mut dyn Intake) -> Result<proto::FileEntry> {
        let fd = file.fd.as_fd();
        let family = opts::family(fd).map_err(file.failed("ask for the family of"))?;
        let protocol = opts::protocol(fd).map_err(file.failed("ask for the protocol of"))?;
        let what = format!(
            "a {} [{}], family {family}, protocol {protocol:#x}",
            family_name(family),
            file.stat.st_ino
        );
        Err(file.unsupported(what, "only UNIX, TCP, UDP and netlink sockets are supported"))
    }
}

impl Opener for UnsupportedSockets {
    fn open(&mut self, entries: &[proto::FileEntry], _: &mut Opened) -> Result<()> {
        match entries.first() {
            None => Ok(()),
            Some(entry) => Err(FileError::Image {
                id: entry.id,
                problem: "it is a packet socket, which rcriu does not restore".into(),
            }),
        }
    }
}
