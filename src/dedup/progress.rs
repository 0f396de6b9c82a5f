//! How far the work is.

/// Receives the progress in bytes, of all steps that take long: comparing, copying, freeing.
pub trait Progress: Sync {
    /// Adds bytes that will be worked on.
    fn more(&self, bytes: u64);
    /// Adds bytes that have been worked on.
    fn done(&self, bytes: u64);
}

/// Shows nothing.
impl Progress for () {
    fn more(&self, _bytes: u64) {}

    fn done(&self, _bytes: u64) {}
}
