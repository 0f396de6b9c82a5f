//! Shares blocks between files (`FIDEDUPERANGE`, `ioctl_fideduperange(2)`, and
//! `FICLONERANGE`, `ioctl_ficlonerange(2)`, Linux 4.5).
#![expect(unsafe_code, reason = "ioctls that no crate of ours wraps")]

use std::{fs::File, io, os::fd::AsRawFd};

use nix::{errno::Errno, libc};

use crate::fault::{self, Novelty};

/// `FIDEDUPERANGE` (`include/uapi/linux/fs.h`): `_IOWR(0x94, 54, struct
/// file_dedupe_range)`.
const FIDEDUPERANGE: libc::Ioctl = 0xc018_9436;
const _: () =
    assert!(FIDEDUPERANGE == (3 << 30) | (size_of::<Head>() as libc::Ioctl) << 16 | 0x94 << 8 | 54);

/// `FILE_DEDUPE_RANGE_DIFFERS` (the same file).
const DIFFERS: i32 = 1;

/// The most bytes requested at a time: as many as btrfs handles in one call.
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

/// Makes `len` bytes of `to`, from `to_offset` on, share the blocks of as many bytes of `from`, if
/// they are equal. The kernel compares them, and prevents changes meanwhile. Returns how many bytes
/// it has shared, starting with the first; `None` if they differ.
///
/// # Errors
/// `EOPNOTSUPP`, `ENOTTY` or `EXDEV` if the files cannot share blocks; `EINVAL` for offsets that are
/// not aligned to blocks.
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

/// `FICLONERANGE` (`include/uapi/linux/fs.h`): `_IOW(0x94, 13, struct file_clone_range)`.
const FICLONERANGE: libc::Ioctl = 0x4020_940d;
const _: () =
    assert!(FICLONERANGE == (1 << 30) | (size_of::<Clone>() as libc::Ioctl) << 16 | 0x94 << 8 | 13);

/// `struct file_clone_range` (the same file).
#[derive(Debug)]
#[repr(C)]
struct Clone {
    src_fd: i64,
    src_offset: u64,
    src_length: u64,
    dest_offset: u64,
}
const _: () = assert!(size_of::<Clone>() == 32);

/// Makes `len` bytes of `to`, from `to_offset` on, the same blocks as those of `from`, which
/// are written to disk first if they are not there yet.
///
/// # Errors
/// What `ioctl(2)` returns: `EOPNOTSUPP`, `ENOTTY` or `EXDEV` where files cannot share
/// blocks; `EINVAL` for offsets that are not those of blocks, and where `from` ends before.
pub fn clone_range(
    from: &File,
    from_offset: u64,
    to: &File,
    to_offset: u64,
    len: u64,
) -> io::Result<()> {
    // The kernel takes 0 for all up to the end.
    if len == 0 {
        return Ok(());
    }
    if fault::is_without(Novelty::Reflink) {
        return Err(Errno::EOPNOTSUPP.into());
    }
    let request = Clone {
        src_fd: from.as_raw_fd().into(),
        src_offset: from_offset,
        src_length: len,
        dest_offset: to_offset,
    };
    // SAFETY: the kernel reads a `struct file_clone_range`, whose size is asserted.
    let result = unsafe { libc::ioctl(to.as_raw_fd(), FICLONERANGE, &raw const request) };
    Errno::result(result)?;
    Ok(())
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
        let error = clone_range(&file, 0, &file, 4096, 4096).unwrap_err();
        assert!(known.contains(&error.raw_os_error()), "{error}");
        clone_range(&file, 0, &file, 4096, 0).unwrap();
    }
}
