//! Writing images: the reverse of [`super::framing`].

use std::{
    fs::File,
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
};

use prost::Message;

use super::{
    ImageError, Kind, Result,
    desc::{IMAGE_MAGIC, SERVICE_MAGIC},
    framing::Prologue,
    regular,
};

/// Writes one image, message by message.
#[derive(Debug)]
pub struct ImageWriter<W: Write = BufWriter<File>> {
    output: W,
    path: PathBuf,
}

impl ImageWriter {
    /// Creates an image file that must not exist yet, and writes its magics.
    ///
    /// # Errors
    /// [`ImageError::Write`].
    pub fn create(path: &Path, kind: Kind) -> Result<Self> {
        let file = regular::create(path)
            .map_err(|source| ImageError::Write { path: path.to_owned(), source })?;
        Self::new(path, BufWriter::new(file), kind)
    }
}

impl<W: Write> ImageWriter<BufWriter<W>> {
    /// Flushes the output and returns it, for example to sync it.
    ///
    /// # Errors
    /// [`ImageError::Write`].
    pub fn finish(self) -> Result<W> {
        let path = self.path;
        self.output
            .into_inner()
            .map_err(|error| ImageError::Write { path, source: error.into_error() })
    }
}

impl<W: Write> ImageWriter<W> {
    /// Writes the magics of `kind` to `output`; errors name `path`.
    ///
    /// # Errors
    /// [`ImageError::Write`].
    pub fn new(path: &Path, output: W, kind: Kind) -> Result<Self> {
        let desc = kind.desc();
        let prologue = match desc.common_magic() {
            Some(SERVICE_MAGIC) => Prologue::Service,
            Some(_) => Prologue::Image,
            None => Prologue::Bare,
        };
        Self::with_prologue(path, output, kind, prologue)
    }

    /// Like [`ImageWriter::new`], but with another prologue than usual, to write back an
    /// image of another format version.
    ///
    /// # Errors
    /// [`ImageError::Write`].
    pub fn with_prologue(path: &Path, output: W, kind: Kind, prologue: Prologue) -> Result<Self> {
        let mut writer = Self { output, path: path.to_owned() };
        let common = match prologue {
            Prologue::Bare => None,
            Prologue::Image => Some(IMAGE_MAGIC),
            Prologue::Service => Some(SERVICE_MAGIC),
        };
        let own = kind.desc().magic;
        for magic in common.into_iter().chain((own != 0).then_some(own)) {
            writer.raw(&magic.to_le_bytes())?;
        }
        Ok(writer)
    }

    /// Writes a message.
    ///
    /// # Errors
    /// [`ImageError::Write`]; also for a message of 4 GiB or more, which no length prefix
    /// can express.
    pub fn message<M: Message>(&mut self, message: &M) -> Result<()> {
        self.message_bytes(&message.encode_to_vec())
    }

    /// Writes the bytes of a message.
    ///
    /// # Errors
    /// As [`ImageWriter::message`].
    pub fn message_bytes(&mut self, bytes: &[u8]) -> Result<()> {
        let length = u32::try_from(bytes.len()).map_err(|_| ImageError::Write {
            path: self.path.clone(),
            source: io::ErrorKind::FileTooLarge.into(),
        })?;
        self.raw(&length.to_le_bytes())?;
        self.raw(bytes)
    }

    /// Writes bytes without framing, such as a payload.
    ///
    /// # Errors
    /// [`ImageError::Write`].
    pub fn raw(&mut self, bytes: &[u8]) -> Result<()> {
        self.output
            .write_all(bytes)
            .map_err(|source| ImageError::Write { path: self.path.clone(), source })
    }

    /// Returns the output.
    pub fn into_output(self) -> W {
        self.output
    }
}
