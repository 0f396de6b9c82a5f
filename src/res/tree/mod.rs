//! What a tree has in common: its control groups, its System V segments.

pub mod cgroup;
pub mod sysv;
