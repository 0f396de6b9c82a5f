//! Whether a file is a whole image of its kind.

use std::path::Path;

use super::{Document, ImageError, Kind, Result, desc::Body, document::Content};

/// Decodes an image to its end without keeping it.
///
/// # Errors
/// Whatever is wrong with it first, another kind than `kind` included.
pub fn verify(path: &Path, kind: Kind) -> Result<()> {
    let document = Document::read(path)?;
    if document.desc().magic != kind.desc().magic {
        return Err(ImageError::Magic {
            path: path.to_owned(),
            found: document.desc().magic,
            expected: format!("{:#010x} ({})", kind.desc().magic, kind.desc().name),
        });
    }
    match (&document.content, kind.desc().body) {
        (Content::Entries(entries), Body::One(_)) if entries.len() != 1 => {
            Err(ImageError::Count { path: path.to_owned(), found: entries.len().min(2) })
        }
        _ => Ok(()),
    }
}
