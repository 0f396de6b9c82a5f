//! Exit codes of the programs.

use crate::causes::is_called_criu;

/// The command has succeeded.
pub const OK: u8 = 0;
/// The command has failed; standard error has the reason.
pub const FAILED: u8 = 1;
/// The command line is wrong, and nothing was done.
pub const USAGE: u8 = 2;
/// `exec`, which CRIU has dropped, and a `swrk` without a socket: CRIU ends with -1.
pub const AS_CRIU_FAILS: u8 = 255;
/// `imgfs diff`: something differs.
pub const DIFFERENT: u8 = 1;
/// `imgfs diff`: the comparison failed.
pub const NOT_COMPARED: u8 = 2;

/// Returns the exit code for a wrong command line. CRIU does not tell it from other failures.
pub fn usage() -> u8 {
    if is_called_criu() { FAILED } else { USAGE }
}
