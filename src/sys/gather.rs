//! Writes from mapped files without touching the mapping.
#![expect(unsafe_code, reason = "writev from addresses")]

use std::os::fd::{AsRawFd, BorrowedFd};

use memmap2::MmapRaw;
use nix::{errno::Errno, libc};

/// The most pieces that one `writev(2)` accepts (`UIO_MAXIOV`, `linux/uio.h`).
pub const MAX_PIECES: usize = 1024;

/// Bytes to write.
#[derive(Debug)]
pub enum Piece<'a> {
    /// The given bytes.
    Bytes(&'a [u8]),
    /// The bytes that a mapped file has at the time of the write.
    Mapped {
        /// The file's mapping.
        mapping: &'a MmapRaw,
        /// The offset of the first byte in the mapping.
        offset: usize,
        /// The number of bytes.
        len: usize,
    },
}

/// Writes `pieces` by one `writev(2)`. Returns the number of bytes written.
///
/// # Errors
/// `EFAULT` if a mapping lacks pages, because the file was truncated; `EINVAL` for more than
/// [`MAX_PIECES`].
///
/// # Panics
/// If a piece is not inside its mapping.
pub fn write_gathered(fd: BorrowedFd, pieces: &[Piece]) -> nix::Result<usize> {
    let vector: Vec<libc::iovec> = pieces.iter().map(address).collect();
    let count = libc::c_int::try_from(vector.len()).map_err(|_| Errno::EINVAL)?;
    // SAFETY: `vector` has `count` elements. Each is bytes that are borrowed
    // until after the call, or addresses within a mapping that lives as long;
    // the kernel only reads them, and where a mapping has no page it returns
    // EFAULT rather than to kill us.
    let written = unsafe { libc::writev(fd.as_raw_fd(), vector.as_ptr(), count) };
    Errno::result(written).map(isize::cast_unsigned)
}

fn address(piece: &Piece) -> libc::iovec {
    match piece {
        Piece::Bytes(bytes) => {
            libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() }
        }
        Piece::Mapped { mapping, offset, len } => {
            assert!(
                offset.checked_add(*len).is_some_and(|end| end <= mapping.len()),
                "a piece lies within its mapping"
            );
            libc::iovec {
                iov_base: mapping.as_ptr().wrapping_add(*offset).cast_mut().cast(),
                iov_len: *len,
            }
        }
    }
}
