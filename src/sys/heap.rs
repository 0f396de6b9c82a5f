//! Tunes how the C library's allocator takes memory from the kernel and returns it.
#![expect(unsafe_code, reason = "mallopt(3)")]

use nix::libc;

/// How many more bytes than requested the heap grows by: more than a small dump or restore needs.
const PAD_BYTES: libc::c_int = 1 << 20;

/// The number of free bytes at the end of the heap from which on it shrinks.
const TRIM_BYTES: libc::c_int = 16 << 20;

/// Makes the heap grow in few steps, and keeps freed memory for later use, since memory that goes
/// back to the kernel causes page faults when it is used again. For programs that exit soon; call
/// it before there are threads.
pub fn grow_in_few_steps() {
    for (option, bytes) in [(libc::M_TOP_PAD, PAD_BYTES), (libc::M_TRIM_THRESHOLD, TRIM_BYTES)] {
        // SAFETY: the call takes numbers. It is not for several threads at once, and is
        // made by the first one before there are others. Nothing is lost if it is refused.
        unsafe { libc::mallopt(option, bytes) };
    }
}
