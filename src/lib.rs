//! Checkpoint and restore of Linux process trees, and a view of their images.
//!
//! The programs `rcriu` and `imgfs` are thin shells over this library. The
//! modules depend on one another in one direction only, which `tests/layering.rs`
//! holds them to. [`design`] is the project's account of itself.

pub mod action;
pub mod arch;
pub mod causes;
pub mod chain;
pub mod cli;
pub mod dedup;
pub mod design;
pub mod docs;
pub mod dump;
pub mod fault;
pub mod fs;
pub mod image;
pub mod inject;
pub mod lazy;
pub mod page_server;
pub mod pages;
pub mod parallel;
pub mod proc;
pub mod proto;
pub mod res;
pub mod restore;
pub mod step;
pub mod sys;
pub mod track;
pub mod units;
pub mod view;

#[cfg(test)]
#[path = "../tests/common/skip.rs"]
mod skip;
