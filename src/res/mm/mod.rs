//! Address spaces: their mappings, and what belongs to an address space as a whole.

pub mod aio;
pub mod description;
pub mod mapping;
pub mod policies;
pub mod vdso;
