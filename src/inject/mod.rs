//! Work inside other processes: lists of system calls that they execute.

mod script;

pub use script::{Answers, Arg, Buffer, CallId, Script};
