//! The long documents: for users, and for the engineers of this project.
//!
//! [`crate::design`] says how the programs are built and what holds at all times.

/// One document of this folder as a module that rustdoc shows.
macro_rules! documents {
    ($($name:ident = $file:literal;)*) => { $(#[doc = include_str!($file)] pub mod $name {})* };
}

documents! {
    chains = "chains.md";
    compatibility = "compatibility.md";
    kernels = "kernels.md";
    limits = "limits.md";
    state = "state.md";
    extensions = "extensions.md";
    security = "security.md";
    speed = "speed.md";
    map = "map.md";
    phases = "phases.md";
    page_server = "page_server.md";
    glossary = "glossary.md";
    adding_a_kind = "adding_a_kind.md";
    testing = "testing.md";
    debugging = "debugging.md";
}
