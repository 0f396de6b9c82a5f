//! Exit codes of the programs.

/// Everything that was asked for was done.
pub const OK: u8 = 0;
/// Something that was asked for failed; standard error says what.
pub const FAILED: u8 = 1;
/// The command line is wrong, nothing was done.
pub const USAGE: u8 = 2;
