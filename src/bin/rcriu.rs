//! rcriu
fn main() {}
