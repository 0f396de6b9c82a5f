//! Address spaces: their mappings, and what belongs to them as a whole.

pub mod description;
pub mod mapping;
pub mod vdso;
