//! UNIX sockets.
//!
//! The dump needs both ends of a connection, since neither can be restored alone. It learns from
//! `sock_diag(7)` which sockets are connected and which connections wait to be accepted. It reads
//! data sent into a connection that waits from the memory of the kernel ([`waiting`]). It rejects
//! connections to sockets outside the tree, except for those that the user allows ([`outside`]).
//!
//! [`peer`] restores the peer credentials of sockets.

mod dump;
mod name;
mod outside;
mod peer;
mod restore;
mod socket;
mod waiting;

use nix::libc;

use crate::{
    image::proto,
    res::file::{FileKind, Usage},
};

pub(in crate::res::file) const KIND: FileKind = FileKind {
    name: "UNIX socket",
    types: &[proto::FdTypes::Unixsk],
    usage: Usage::Descriptor,
    collector: |options| Box::new(dump::UnixCollector::new(options.unix, &options.external)),
    opener: |options| Box::new(restore::UnixOpener::new(options.unix)),
};

/// The user's options for UNIX sockets.
#[derive(Clone, Copy, Debug, Default)]
#[cfg_attr(test, derive(PartialEq, Eq))]
pub struct Options {
    allow_external: bool,
    skip_in_flight: bool,
    /// The inode of the dumper's own end of its connection to the client, if a client dumps itself.
    service: Option<u32>,
}

impl Options {
    /// `allow_external`: they may be connected to sockets outside the tree (`--ext-unix-sk`).
    pub fn new(allow_external: bool) -> Self {
        Self { allow_external, ..Self::default() }
    }

    /// Allows the connection to the dumper, of which `inode` is the other end.
    pub fn service(self, inode: Option<u32>) -> Self {
        Self { service: inode, ..self }
    }

    /// Leaves out connections of other programs that were not accepted (`--skip-in-flight`).
    pub fn skip_in_flight(self, skip_in_flight: bool) -> Self {
        Self { skip_in_flight, ..self }
    }
}

/// `unix_sk_entry.uflags`: the socket is outside the tree.
const EXTERNAL: u32 = 1;

/// `unix_sk_entry.uflags`: the socket leads to the program that dumps its process (`USK_SERVICE` of CRIU). A
/// restored process receives the answer there, and then the end.
const SERVICE: u32 = 2;

/// Returns the name of a socket type.
fn kind_name(kind: u32) -> &'static str {
    match kind.cast_signed() {
        libc::SOCK_STREAM => "stream",
        libc::SOCK_DGRAM => "datagram",
        libc::SOCK_SEQPACKET => "seqpacket",
        _ => "unknown",
    }
}

#[cfg(test)]
mod tests;
