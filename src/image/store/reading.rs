//! Access to the images of a store, by kind and number.

use std::path::PathBuf;

use prost::{Message, Name};

use super::{ImageStore, Input};
use crate::image::{
    ImageError, ImageReader, Kind, MemoryId, Pagemap, PagemapReader, Result, framing::Lent,
};

impl dyn ImageStore + '_ {
    /// Returns the path of a file in messages.
    pub fn path_of(&self, file: &str) -> PathBuf {
        self.name().join(file)
    }

    /// Returns the path of an image in messages.
    pub fn path(&self, kind: Kind, number: u64) -> PathBuf {
        self.path_of(&kind.file_name(number))
    }

    /// Whether the store has the image.
    pub fn has(&self, kind: Kind, number: u64) -> bool {
        self.stat(&kind.file_name(number)).is_ok()
    }

    /// Opens an image.
    ///
    /// # Errors
    /// As [`ImageReader::open_kind`].
    pub fn image(&self, kind: Kind, number: u64) -> Result<ImageReader> {
        self.image_called(&kind.file_name(number), kind)
    }

    /// Opens an image by file name; it must be of kind `kind`.
    ///
    /// # Errors
    /// As [`ImageReader::open_kind`].
    pub fn image_called(&self, file: &str, kind: Kind) -> Result<ImageReader> {
        let (path, input) = self.input(file)?;
        let reader = ImageReader::from_input(&path, input)?;
        reader.require(kind)?;
        Ok(reader)
    }

    /// Reads all messages of an image that has no payloads.
    ///
    /// # Errors
    /// As [`crate::image::read_all`].
    pub fn messages<M: Message + Name + Default>(&self, kind: Kind, number: u64) -> Result<Vec<M>> {
        self.image(kind, number)?.all()
    }

    /// Reads the message of an image that must hold exactly one.
    ///
    /// # Errors
    /// As [`crate::image::read_one`].
    pub fn message<M: Message + Name + Default>(&self, kind: Kind, number: u64) -> Result<M> {
        self.image(kind, number)?.only()
    }

    /// Like `messages`, but `None` if the image does not exist.
    ///
    /// # Errors
    /// As `messages`.
    pub fn messages_if_any<M: Message + Name + Default>(
        &self,
        kind: Kind,
        number: u64,
    ) -> Result<Option<Vec<M>>> {
        if_any(self.messages(kind, number))
    }

    /// Like `message`, but `None` if the image does not exist.
    ///
    /// # Errors
    /// As `message`.
    pub fn message_if_any<M: Message + Name + Default>(
        &self,
        kind: Kind,
        number: u64,
    ) -> Result<Option<M>> {
        if_any(self.message(kind, number))
    }

    /// Opens a pagemap and reads its head.
    ///
    /// # Errors
    /// As [`PagemapReader::open`].
    pub fn pagemap(&self, memory: MemoryId) -> Result<PagemapReader> {
        PagemapReader::new(self.image_called(&memory.pagemap_name(), Kind::Pagemap)?)
    }

    /// Reads a whole pagemap.
    ///
    /// # Errors
    /// As [`Pagemap::read`].
    pub fn whole_pagemap(&self, memory: MemoryId) -> Result<Pagemap> {
        Pagemap::of(self.pagemap(memory)?)
    }

    /// Opens a pagemap by file name, with a buffer that the caller lends.
    ///
    /// # Errors
    /// As [`PagemapReader::open`].
    pub fn pagemap_through<'a>(
        &self,
        file: &str,
        buffer: &'a mut Vec<u8>,
    ) -> Result<PagemapReader<Lent<'a>>> {
        let (path, input) = self.input(file)?;
        PagemapReader::new(ImageReader::through(&path, input, buffer)?)
    }

    fn input(&self, file: &str) -> Result<(PathBuf, Input)> {
        let path = self.path_of(file);
        match self.open(file) {
            Ok(input) => Ok((path, input)),
            Err(source) => Err(ImageError::Open { path, source }),
        }
    }
}

/// Turns the error of a missing image into `None`.
pub(crate) fn if_any<T>(image: Result<T>) -> Result<Option<T>> {
    match image {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.is_missing() => Ok(None),
        Err(error) => Err(error),
    }
}
