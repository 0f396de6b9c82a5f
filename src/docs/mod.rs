//! Long documents.

#[doc = include_str!("state.md")]
pub mod state {}
