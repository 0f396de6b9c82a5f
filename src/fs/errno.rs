//! The errno of each failure.

use std::io;

use fuser::Errno;
use log::{error, trace};

use crate::{causes::with_sources, chain::ChainError, image::ImageError, view::ViewError};

/// Logs a failure with the chain of its causes, and returns its errno for the kernel.
///
/// Look-ups of missing names are common and are not logged.
pub(super) fn failed(operation: &str, path: &str, failure: &ViewError) -> Errno {
    let errno = errno(failure);
    let reasons = with_sources(failure);
    let code = nix::errno::Errno::from_raw(errno.code());
    if matches!(failure, ViewError::NoSuchEntry { .. }) {
        trace!("{operation} {path}: {reasons} ({code:?})");
    } else {
        error!("{operation} {path}: {reasons} ({code:?})");
    }
    errno
}

/// Returns the errno of a failure: EIO for all defects of the images.
fn errno(error: &ViewError) -> Errno {
    match error {
        ViewError::Chain(error) => chain_errno(error),
        ViewError::Image(error) => image_errno(error),
        // The kernel uses only inode numbers that we returned.
        ViewError::NoSuchNode { .. } => Errno::ESTALE,
        ViewError::NoSuchEntry { .. } => Errno::ENOENT,
        ViewError::NotADirectory { .. } => Errno::ENOTDIR,
        ViewError::IsADirectory { .. } => Errno::EISDIR,
        ViewError::NotALink { .. } => Errno::EINVAL,
        ViewError::Attributes { source, .. }
        | ViewError::Tmpfs { source, .. }
        | ViewError::Write { source, .. } => io_errno(source),
        ViewError::NotEmpty { .. } => Errno::ENOTEMPTY,
        ViewError::TooLong { .. } | ViewError::CoreTooLarge { .. } => Errno::EFBIG,
        ViewError::PageSize { .. } => Errno::EOPNOTSUPP,
        ViewError::NoSuchProcess { .. }
        | ViewError::NoTree { .. }
        | ViewError::NoAddressSpace { .. }
        | ViewError::BadVma { .. }
        | ViewError::NoSuchFile { .. }
        | ViewError::BadThread { .. } => Errno::EIO,
    }
}

fn chain_errno(error: &ChainError) -> Errno {
    match error {
        ChainError::Missing { source, .. }
        | ChainError::Archive { source, .. }
        | ChainError::Pack { source, .. }
        | ChainError::Directory { source, .. }
        | ChainError::Open { source, .. }
        | ChainError::Read { source, .. }
        | ChainError::Free { source, .. } => io_errno(source),
        ChainError::NoPunching { .. } => Errno::EOPNOTSUPP,
        ChainError::ForeignChild { .. } => Errno::EPERM,
        ChainError::ReadOnly { .. } => Errno::EROFS,
        ChainError::Image(error) => image_errno(error),
        ChainError::Lost(error) => chain_errno(error),
        ChainError::NoImages { .. }
        | ChainError::NoSuchSnapshot { .. }
        | ChainError::SeveralTips { .. }
        | ChainError::NoTip
        | ChainError::Link(_)
        | ChainError::Version { .. }
        | ChainError::NoMemory { .. }
        | ChainError::PagesElsewhere { .. }
        | ChainError::TooDeep { .. }
        | ChainError::Unanswered { .. }
        | ChainError::SharedPages { .. }
        | ChainError::Absent { .. }
        | ChainError::Punched { .. }
        | ChainError::Fault(_)
        | ChainError::Truncated { .. }
        | ChainError::Replaced { .. } => Errno::EIO,
    }
}

fn image_errno(error: &ImageError) -> Errno {
    match error {
        ImageError::Open { source, .. }
        | ImageError::Read { source, .. }
        | ImageError::Write { source, .. } => io_errno(source),
        ImageError::Magic { .. }
        | ImageError::Truncated { .. }
        | ImageError::Oversized { .. }
        | ImageError::Malformed { .. }
        | ImageError::Count { .. }
        | ImageError::Pagemap { .. }
        | ImageError::Foreign { .. }
        | ImageError::Journal { .. }
        | ImageError::Payload { .. } => Errno::EIO,
    }
}

/// Returns the errno for an error of a backing file.
///
/// A missing backing file does not mean that the name is missing in the mount, so ENOENT and
/// similar errors become EIO. Errors of this system, rather than of the images, are passed on.
fn io_errno(error: &io::Error) -> Errno {
    match error.raw_os_error().map(nix::errno::Errno::from_raw) {
        Some(nix::errno::Errno::EACCES | nix::errno::Errno::EPERM) => Errno::EACCES,
        Some(nix::errno::Errno::ENOMEM) => Errno::ENOMEM,
        // A journal takes disk space.
        Some(nix::errno::Errno::ENOSPC | nix::errno::Errno::EDQUOT) => Errno::ENOSPC,
        Some(nix::errno::Errno::EMFILE | nix::errno::Errno::ENFILE) => Errno::ENFILE,
        _ => Errno::EIO,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn a_missing_backing_file_is_an_input_output_error() {
        let open = |kind: nix::errno::Errno| ChainError::Open {
            path: "pages-1.img".into(),
            source: kind.into(),
        };
        let of = |error: ChainError| errno(&error.into()).code();
        assert_eq!(of(open(nix::errno::Errno::ENOENT)), nix::libc::EIO);
        assert_eq!(of(open(nix::errno::Errno::EACCES)), nix::libc::EACCES);
        assert_eq!(of(ChainError::Lost(Arc::new(open(nix::errno::Errno::ENOENT)))), nix::libc::EIO);
        let entry = ViewError::NoSuchEntry { dir: String::new(), name: "x".into() };
        assert_eq!(errno(&entry).code(), nix::libc::ENOENT);
    }
}
