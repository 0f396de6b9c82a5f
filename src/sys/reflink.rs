//! Letting files share blocks (`FIDEDUPERANGE`, `ioctl_fideduperange(2)`, Linux 4.5).
#![expect(unsafe_code, reason = "an ioctl that no crate of ours wraps")]

use std::{fs::File, io, os::fd::AsRawFd};

use nix::{errno::Errno, libc};

/// `FIDEDUPERANGE` (`include/uapi/linux/fs.h`): `_IOWR(0x94, 54, struct
/// file_dedupe_range)`.
const FIDEDUPERANGE: libc::Ioctl = 0xc018_9436;
const _: () =
    assert!(FIDEDUPERANGE == (3 << 30) | (size_of::<Head>() as libc::Ioctl) << 16 | 0x94 << 8 | 54);

/// `FILE_DEDUPE_RANGE_DIFFERS` (the same file).
const DIFFERS: i32 = 1;

/// The most that is asked for at a time: what btrfs does in one call.
pub const MOST_BYTES: u64 = 16 << 20;

/// `struct file_dedupe_range` without its array.
#[derive(Debug)]
#[repr(C)]
struct Head {
    src_offset: u64,
    src_length: u64,
    dest_count: u16,
    reserved1: u16,
    reserved2: u32,
}
const _: () = assert!(size_of::<Head>() == 24);

/// `struct file_dedupe_range_info`.
#[derive(Debug)]
#[repr(C)]
struct Info {
    dest_fd: i64,
    dest_offset: u64,
    bytes_deduped: u64,
    status: i32,
    reserved: u32,
}
const _: () = assert!(size_of::<Info>() == 32);

#[derive(Debug)]
#[repr(C)]
struct Request {
    head: Head,
    info: Info,
}
const _: () = assert!(size_of::<Request>() == 56);

/// Makes `len` bytes of `to`, from `to_offset` on, share the blocks of as many bytes of
/// `from`, if they are equal. The kernel compares them, and keeps them from being changed
/// meanwhile. Returns how many bytes it has shared, from the first on; `None` if they
/// differ.
///
/// # Errors
/// What `ioctl(2)` returns: `EOPNOTSUPP`, `ENOTTY` or `EXDEV` where files cannot share
/// blocks, `EINVAL` for offsets that are not those of blocks.
pub fn share(
    from: &File,
    from_offset: u64,
    to: &File,
    to_offset: u64,
    len: u64,
) -> io::Result<Option<u64>> {
    let mut request = Request {
        head: Head {
            src_offset: from_offset,
            src_length: len.min(MOST_BYTES),
            dest_count: 1,
            reserved1: 0,
            reserved2: 0,
        },
        info: Info {
            dest_fd: to.as_raw_fd().into(),
            dest_offset: to_offset,
            bytes_deduped: 0,
            status: 0,
            reserved: 0,
        },
    };
    // SAFETY: the kernel reads and writes a `struct file_dedupe_range` with one
    // `file_dedupe_range_info` behind it, as `dest_count` says; their sizes are asserted.
    Errno::result(unsafe { libc::ioctl(from.as_raw_fd(), FIDEDUPERANGE, &raw mut request) })?;
    match request.info.status {
        0 => Ok(Some(request.info.bytes_deduped)),
        DIFFERS => Ok(None),
        negative => Err(io::Error::from_raw_os_error(negative.wrapping_neg())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_that_cannot_share_say_so() {
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.set_len(8192).unwrap();
        let error = share(&file, 0, &file, 4096, 4096).unwrap_err();
        let known = [libc::EOPNOTSUPP, libc::ENOTTY].map(Some);
        assert!(known.contains(&error.raw_os_error()), "{error}");
    }
}
