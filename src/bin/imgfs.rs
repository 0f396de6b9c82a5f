//! imgfs
fn main() {}
