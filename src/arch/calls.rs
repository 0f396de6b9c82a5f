//! What this program and the code that it injects have in common.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::units::RemoteAddr;

/// The most arguments of a system call.
pub const ARGUMENTS: usize = 6;

/// One system call as the injected code sees it.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Entry {
    /// The call's number; `u64::MAX` after the last.
    pub number: u64,
    /// Its arguments.
    pub arguments: [u64; ARGUMENTS],
    /// Its result.
    pub result: u64,
    /// Bit 0: the call's failure ends the list.
    pub flags: u64,
    /// For arguments 0 to 5, a byte each: the distance in entries back to the
    /// call whose result is the argument, or 0.
    pub from_results: u64,
}

/// How a thread that walks a table comes home by itself.
#[derive(Clone, Copy, Debug)]
pub struct Return {
    /// The signal by which it stops, which the process ignores.
    pub signal: i32,
    /// The scratch memory that it unmaps then.
    pub scratch: RemoteAddr,
    /// The bytes of that.
    pub scratch_bytes: u32,
    /// An instruction that calls the kernel, with one that returns behind it.
    pub call: RemoteAddr,
    /// The frame that is returned to.
    pub frame: RemoteAddr,
}
