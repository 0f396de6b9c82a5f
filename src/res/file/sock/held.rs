//! Addresses that a killed process holds for a moment longer.
//!
//! A socket that was queued in a UNIX socket is not freed by the end of its process, but
//! by a work queue of the kernel, later (`net/unix/garbage.c`). A restore that follows the
//! dump at once finds its address taken.

use std::{
    thread,
    time::{Duration, Instant},
};

use nix::errno::Errno;

/// How long to wait for an address.
const PATIENCE: Duration = Duration::from_secs(1);

/// How long to sleep between two attempts.
const NAP: Duration = Duration::from_millis(2);

/// Repeats an attempt to take an address until it is free.
///
/// # Errors
/// Those of `attempt`; `EADDRINUSE` only if the address stays taken for a second.
pub(super) fn retry<T>(mut attempt: impl FnMut() -> nix::Result<T>) -> nix::Result<T> {
    let begin = Instant::now();
    loop {
        match attempt() {
            Err(Errno::EADDRINUSE) if begin.elapsed() < PATIENCE => thread::sleep(NAP),
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_addresses_in_use_are_waited_for() {
        let mut results = [Err(Errno::EADDRINUSE), Err(Errno::EADDRINUSE), Ok(7)].into_iter();
        assert_eq!(retry(|| results.next().unwrap()), Ok(7));
        let mut results = [Err(Errno::EACCES), Ok(7)].into_iter();
        assert_eq!(retry(|| results.next().unwrap()), Err(Errno::EACCES));
    }
}
