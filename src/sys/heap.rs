//! How the C library's allocator gets memory from the kernel and gives it back.
#![expect(unsafe_code, reason = "mallopt(3)")]

use nix::libc;

/// Bytes that the heap is grown by beyond what is asked for: more than a small dump or
/// restore needs.
const PAD_BYTES: libc::c_int = 1 << 20;

/// Free bytes at the end of the heap from which on it is made smaller.
const TRIM_BYTES: libc::c_int = 16 << 20;

/// Makes the heap grow in few steps, and keeps what was freed for what is asked for next:
/// pages that went back come again as page faults. For programs that end soon, before they
/// have threads.
pub fn grow_in_few_steps() {
    for (option, bytes) in [(libc::M_TOP_PAD, PAD_BYTES), (libc::M_TRIM_THRESHOLD, TRIM_BYTES)] {
        // SAFETY: the call takes numbers. It is not for several threads at once, and is
        // made by the first one before there are others. Nothing is lost if it is refused.
        unsafe { libc::mallopt(option, bytes) };
    }
}
