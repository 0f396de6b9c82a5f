//! Errors of archives.

use std::io;

/// Errors of reading an archive.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// The archive's bytes could not be read.
    #[error("read the archive at offset {offset:#x}")]
    Read {
        /// The offset in the unpacked archive.
        offset: u64,
        /// The cause.
        source: io::Error,
    },
    /// No header at an offset where one must be.
    #[error("no tar header at offset {offset:#x}: {problem}")]
    Header {
        /// Its offset.
        offset: u64,
        /// The defect.
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
        /// The end of its bytes.
        wanted: u64,
        /// The end of the archive.
        end: u64,
    },
    /// The archive has no block of zeros at its end.
    #[error(
        "the archive is cut short: expected another member or the end mark at offset {offset:#x}"
    )]
    NoEnd {
        /// Their offset.
        offset: u64,
    },
    /// A name that no archive of a checkpoint has.
    #[error("member {member:?} at offset {offset:#x}: {problem}")]
    Name {
        /// The name.
        member: String,
        /// The offset of its header.
        offset: u64,
        /// The defect.
        problem: &'static str,
    },
    /// A member that is neither a file nor a directory.
    #[error("member {member:?} at offset {offset:#x} is {what}")]
    Type {
        /// The name.
        member: String,
        /// The offset of its header.
        offset: u64,
        /// Its type, and a remedy.
        what: String,
    },
    /// Two members have one name.
    #[error("the archive holds {member:?} more than once; the second is at offset {offset:#x}")]
    Twice {
        /// The name.
        member: String,
        /// The offset of the second header.
        offset: u64,
    },
    /// A sparse member with an invalid map.
    #[error("sparse member {member:?}: {problem}")]
    Sparse {
        /// The name.
        member: String,
        /// What is wrong with its map.
        problem: &'static str,
    },
    /// The archive exceeds a limit.
    #[error("the archive has more than {limit} {what}")]
    TooMany {
        /// The objects.
        what: &'static str,
        /// The largest number.
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
    /// A document of an OCI image layout is malformed.
    #[error("{file} of the OCI image layout: {problem}")]
    Layout {
        /// Its path in the layout.
        file: String,
        /// The defect.
        problem: &'static str,
    },
    /// A file of an OCI image layout could not be read.
    #[error("read {file} of the OCI image layout")]
    LayoutFile {
        /// Its path in the layout.
        file: String,
        /// The cause.
        source: io::Error,
    },
    /// An OCI image layout has no image of a checkpoint.
    #[error(
        "the OCI image layout has no image of a checkpoint: no manifest has an annotation of \
         Podman, CRI-O or checkpointctl"
    )]
    NoCheckpoint,
    /// The file has another type or format.
    #[error("it is {found}; expected a directory, or an archive: tar, tar.gz or tar.zst")]
    Format {
        /// Its type.
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
