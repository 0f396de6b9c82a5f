//! Keys of TCP-MD5 signatures (RFC 2385): `sk_state_entry.md5_keys`, an extension.
//!
//! Programs can only set them; `sock_diag(7)` shows them to processes with `CAP_NET_ADMIN`, except those of
//! a socket without a port.

use std::os::fd::BorrowedFd;

use nix::{errno::Errno, libc};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::{image::proto::SkMd5KeyEntry, sys::socket};

/// `linux/tcp.h`, since Linux 4.13.
const TCP_MD5SIG_EXT: libc::c_int = 32;
const TCP_MD5SIG_FLAG_PREFIX: u8 = 1;

/// `TCP_MD5SIG_MAXKEYLEN`, `linux/tcp.h`.
const KEY_BYTES: usize = 80;

/// `struct tcp_diag_md5sig`, `linux/tcp.h`, since Linux 4.14.
#[derive(Clone, Copy, FromBytes, Immutable)]
#[repr(C)]
struct Shown {
    family: u8,
    prefix_bits: u8,
    key_len: u16,
    address: [u8; 16],
    key: [u8; KEY_BYTES],
}

const _: () = assert!(size_of::<Shown>() == 100);

/// `struct tcp_md5sig`, `linux/tcp.h`, with the address as bytes.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Key {
    family: u16,
    /// `struct sockaddr_in` and `sockaddr_in6` have their addresses at different places.
    address: [u8; 126],
    flags: u8,
    prefix_bits: u8,
    key_len: u16,
    interface: u32,
    key: [u8; KEY_BYTES],
}

const _: () = assert!(size_of::<Key>() == 128 + 8 + KEY_BYTES);

/// Where an address begins in [`Key::address`], after a port (and a flow label).
const V4_OFFSET: usize = 2;
const V6_OFFSET: usize = 6;

/// Decodes the keys that `sock_diag(7)` shows of a socket.
pub(super) fn decode(mut shown: &[u8]) -> Vec<SkMd5KeyEntry> {
    let mut keys = Vec::new();
    while let Ok((key, rest)) = Shown::read_from_prefix(shown) {
        let bytes = usize::from(key.key_len).min(KEY_BYTES);
        let is_v4 = i32::from(key.family) == libc::AF_INET;
        keys.push(SkMd5KeyEntry {
            address: key.address[..if is_v4 { 4 } else { 16 }].to_vec(),
            prefix_bits: key.prefix_bits.into(),
            key: key.key[..bytes].to_vec(),
        });
        shown = rest;
    }
    keys
}

/// Sets keys.
///
/// # Errors
/// `EINVAL` for keys that no kernel has; the errors of the kernel.
pub(super) fn restore(fd: BorrowedFd, keys: &[SkMd5KeyEntry]) -> nix::Result<()> {
    for entry in keys {
        let (family, offset) = match entry.address.len() {
            4 => (libc::AF_INET, V4_OFFSET),
            16 => (libc::AF_INET6, V6_OFFSET),
            _ => return Err(Errno::EINVAL),
        };
        let mut key = Key {
            family: u16::try_from(family).map_err(|_| Errno::EINVAL)?,
            address: [0; 126],
            flags: TCP_MD5SIG_FLAG_PREFIX,
            prefix_bits: u8::try_from(entry.prefix_bits).map_err(|_| Errno::EINVAL)?,
            key_len: u16::try_from(entry.key.len()).map_err(|_| Errno::EINVAL)?,
            interface: 0,
            key: [0; KEY_BYTES],
        };
        key.address[offset..offset + entry.address.len()].copy_from_slice(&entry.address);
        key.key.get_mut(..entry.key.len()).ok_or(Errno::EINVAL)?.copy_from_slice(&entry.key);
        socket::set_option(fd, libc::SOL_TCP, TCP_MD5SIG_EXT, &key)?;
    }
    Ok(())
}
