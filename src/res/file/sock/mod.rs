//! Sockets: one module for each kind, and what the kinds share.

mod attributes;
mod diag;
mod held;
pub(super) mod inet;
mod listed;
pub(super) mod netlink;
mod opts;
pub(super) mod packet;
mod queue;
mod skb;
#[cfg(test)]
mod testing;
pub(super) mod unix;
pub(super) mod unsupported;

/// Socket states (`net/tcp_states.h`).
mod state {
    pub(super) const ESTABLISHED: u32 = 1;
    pub(super) const SYN_SENT: u32 = 2;
    pub(super) const FIN_WAIT1: u32 = 4;
    pub(super) const FIN_WAIT2: u32 = 5;
    pub(super) const CLOSE: u32 = 7;
    pub(super) const CLOSE_WAIT: u32 = 8;
    pub(super) const LAST_ACK: u32 = 9;
    pub(super) const LISTEN: u32 = 10;
    pub(super) const CLOSING: u32 = 11;
}

/// The shutdown bits of a socket with both directions shut down.
const SHUT_BOTH: u8 = 3;
