//! Kinds of state that processes have, one file each, with both directions in it.

pub mod file;
