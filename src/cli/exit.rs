//! Exit codes of the programs.

/// The command has succeeded.
pub const OK: u8 = 0;
/// The command has failed; standard error has the reason.
pub const FAILED: u8 = 1;
/// The command line is wrong, and nothing was done.
pub const USAGE: u8 = 2;
/// `imgfs diff`: something differs.
pub const DIFFERENT: u8 = 1;
/// `imgfs diff`: the comparison failed.
pub const NOT_COMPARED: u8 = 2;
