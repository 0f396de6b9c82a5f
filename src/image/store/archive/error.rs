//! What can be wrong with an archive.

use std::io;

/// Why an archive is not read.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// The archive's bytes could not be read.
    #[error("read the archive at offset {offset:#x}")]
    Read {
        /// The offset in the unpacked archive.
        offset: u64,
        /// Why.
        source: io::Error,
    },
    /// What should be a header is none.
    #[error("no tar header at offset {offset:#x}: {problem}")]
    Header {
        /// Where it should be.
        offset: u64,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// The archive ends inside a member.
    #[error(
        "the archive is cut short: {member} needs its bytes up to offset {wanted:#x}, the \
         archive ends at {end:#x}"
    )]
    CutShort {
        /// The member.
        member: String,
        /// Where its bytes should end.
        wanted: u64,
        /// Where the archive does.
        end: u64,
    },
    /// The archive has no block of zeros at its end.
    #[error(
        "the archive is cut short: expected another member or the end mark at offset {offset:#x}"
    )]
    NoEnd {
        /// Where they should be.
        offset: u64,
    },
    /// A name that a checkpoint's archive does not have.
    #[error("member {member:?} at offset {offset:#x}: {problem}")]
    Name {
        /// The name.
        member: String,
        /// Where its header is.
        offset: u64,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// A member that is neither a file nor a directory.
    #[error("member {member:?} at offset {offset:#x} is {what}")]
    Type {
        /// The name.
        member: String,
        /// Where its header is.
        offset: u64,
        /// What it is, and what to do.
        what: String,
    },
    /// Two members have one name.
    #[error("the archive holds {member:?} more than once; the second is at offset {offset:#x}")]
    Twice {
        /// The name.
        member: String,
        /// Where the second one's header is.
        offset: u64,
    },
    /// A member that is said to be sparse, with a map that makes no sense.
    #[error("sparse member {member:?}: {problem}")]
    Sparse {
        /// The name.
        member: String,
        /// What is wrong with its map.
        problem: &'static str,
    },
    /// The archive has more of something than is read.
    #[error("the archive has more than {limit} {what}")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// How many are read.
        limit: usize,
    },
    /// The archive unpacks to more than the cache may hold.
    #[error(
        "the archive unpacks to more than {limit} bytes, which is the limit of the cache\n\
         help: raise it with --cache-limit"
    )]
    TooLarge {
        /// The limit.
        limit: u64,
    },
    /// A document of an OCI image layout makes no sense.
    #[error("{file} of the OCI image layout: {problem}")]
    Layout {
        /// Its path in the layout.
        file: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// A file of an OCI image layout could not be read.
    #[error("read {file} of the OCI image layout")]
    LayoutFile {
        /// Its path in the layout.
        file: String,
        /// Why.
        source: io::Error,
    },
    /// An OCI image layout has no image of a checkpoint.
    #[error(
        "the OCI image layout has no image of a checkpoint: no manifest has an annotation of \
         Podman, CRI-O or checkpointctl"
    )]
    NoCheckpoint,
    /// The file is something else.
    #[error("it is {found}; expected a directory, or an archive: tar, tar.gz or tar.zst")]
    Format {
        /// What it is.
        found: &'static str,
    },
}

/// The result of reading an archive.
pub type Result<T, E = ArchiveError> = std::result::Result<T, E>;

impl From<ArchiveError> for io::Error {
    fn from(error: ArchiveError) -> Self {
        Self::new(io::ErrorKind::InvalidData, error)
    }
}
