//! Sockets of families that rcriu does not dump: it reports them by name.

use std::os::fd::AsFd;

use nix::libc;

use super::opts;
use crate::{
    image::proto,
    res::file::{Collector, Description, FileKind, Intake, Opened, Opener, Result, Usage},
};

/// The row of [`KINDS`](crate::res::file::KINDS). Comes after all other sockets, since it claims
/// every socket.
pub(in crate::res::file) const KIND: FileKind = FileKind {
    name: "socket",
    types: &[],
    usage: Usage::Descriptor,
    collector: |_| Box::new(UnsupportedSockets),
    opener: |_| Box::new(UnsupportedSockets),
};

#[derive(Debug)]
struct UnsupportedSockets;

/// `linux/socket.h`; `libc` lacks them.
const AF_KCM: i32 = 41;
const AF_QIPCRTR: i32 = 42;
const AF_SMC: i32 = 43;
const AF_MCTP: i32 = 45;

/// Returns the name of a family in messages.
fn family_name(family: i32) -> &'static str {
    match family {
        libc::AF_VSOCK => "virtual machine socket (AF_VSOCK)",
        libc::AF_ALG => "kernel crypto socket (AF_ALG)",
        libc::AF_XDP => "AF_XDP socket",
        libc::AF_BLUETOOTH => "Bluetooth socket",
        libc::AF_CAN => "CAN bus socket",
        libc::AF_KEY => "IPsec key socket (AF_KEY)",
        libc::AF_PPPOX => "PPP socket (AF_PPPOX)",
        libc::AF_RDS => "RDS socket",
        libc::AF_IEEE802154 => "IEEE 802.15.4 socket",
        libc::AF_NFC => "NFC socket",
        AF_KCM => "connection multiplexer (AF_KCM)",
        AF_QIPCRTR => "Qualcomm IPC router socket",
        AF_SMC => "SMC socket",
        AF_MCTP => "MCTP socket",
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
        Err(file.unsupported(what, "have the program close it, then try again"))
    }
}

impl Opener for UnsupportedSockets {
    fn open(&mut self, _: &[proto::FileEntry], _: &mut Opened) -> Result<()> {
        Ok(())
    }
}
