//! UNIX sockets.
//!
//! A socket belongs to a dump if the socket it is connected to does, for neither can
//! be made alone. Which one that is `sock_diag(7)` tells, and which connections
//! wait to be accepted. What was sent into such a connection cannot be seen, so that
//! it is refused, as are sockets at whose other end is another program; datagram
//! sockets can be connected to a name again, which `--ext-unix-sk` allows.
//!
//! [`peer`] restores whose credentials they show.

mod dump;
mod name;
mod peer;
mod restore;
mod socket;

use nix::libc;

use crate::{
    image::proto,
    res::file::{FileKind, Usage},
};

/// The row of [`KINDS`](crate::res::file::KINDS).
pub(in crate::res::file) const KIND: FileKind = FileKind {
    name: "UNIX socket",
    types: &[proto::FdTypes::Unixsk],
    usage: Usage::Descriptor,
    collector: |options| Box::new(dump::UnixCollector::new(options.unix, &options.external)),
    opener: |options| Box::new(restore::UnixOpener::new(options.unix)),
};

/// What the user says of UNIX sockets.
#[derive(Clone, Copy, Debug, Default)]
#[cfg_attr(test, derive(PartialEq, Eq))]
pub struct Options {
    allow_external: bool,
}

impl Options {
    /// `allow_external`: they may be connected to sockets outside the tree (`--ext-unix-sk`).
    pub fn new(allow_external: bool) -> Self {
        Self { allow_external }
    }
}

/// `unix_sk_entry.uflags`: the socket is of a program that was not dumped.
const EXTERNAL: u32 = 1;

/// Returns what a type of sockets is called.
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
