//! A complete stored file.

use std::sync::Arc;

use crate::{
    chain::{BackingFile, Content, Result, Run, Source},
    image::store::Stat,
};

/// A complete stored file.
#[derive(Debug)]
pub struct WholeFile {
    file: Arc<BackingFile>,
    len: u64,
    allocated: u64,
}

impl WholeFile {
    /// Returns `file` with its current length.
    ///
    /// # Errors
    /// [`crate::chain::ChainError::Open`] if its attributes cannot be read.
    pub fn new(file: Arc<BackingFile>) -> Result<Self> {
        let Stat { len, allocated, .. } = file.stat()?;
        Ok(Self { file, len, allocated })
    }
}

impl Content for WholeFile {
    fn len(&self) -> u64 {
        self.len
    }

    fn allocated(&self) -> u64 {
        self.allocated
    }

    fn runs(&self, offset: u64, len: u64, runs: &mut Vec<Run>) -> Result<()> {
        runs.push(Run { len, source: Source::File(Arc::clone(&self.file), offset) });
        Ok(())
    }
}
