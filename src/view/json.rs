//! Images as JSON text.

use std::{
    io::{self, Write},
    path::Path,
};

use super::{Result, ViewError, flat::MemoryFile};
use crate::{
    chain::Content,
    image::{
        Body, desc,
        json::{self, JsonError, Style},
    },
};

/// The suffix of an image's text.
pub(super) const SUFFIX: &str = ".json";

/// The longest text. It is held in memory while it is open; `rcriu show` prints images of any
/// size.
const LIMIT_BYTES: usize = 256 << 20;

/// Returns the name of an image's text; raw images have none.
pub(super) fn name(image: &str) -> Option<String> {
    let (desc, _) = desc::by_file_name(image)?;
    (desc.body != Body::Raw).then(|| format!("{image}{SUFFIX}"))
}

/// Decodes the image `path`.
pub(super) fn render(path: &Path, image: &dyn Content) -> Result<MemoryFile> {
    let mut text = Text(Vec::new());
    let input = io::BufReader::new(Reader { content: image, offset: 0 });
    match json::write_from(path, input, Style::Pretty, &mut text) {
        Ok(()) => Ok(MemoryFile::new(text.0)),
        Err(JsonError::Image(error)) => Err(error.into()),
        Err(JsonError::Output(_)) => {
            Err(ViewError::TooLong { path: path.to_owned(), limit: LIMIT_BYTES })
        }
    }
}

/// Text of limited length.
struct Text(Vec<u8>);

impl Write for Text {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.len() > LIMIT_BYTES - self.0.len() {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.0.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Reads a content sequentially.
struct Reader<'a> {
    content: &'a dyn Content,
    offset: u64,
}

impl io::Read for Reader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read =
            crate::chain::read_at(self.content, self.offset, buffer).map_err(io::Error::other)?;
        self.offset += read as u64;
        Ok(read)
    }
}
