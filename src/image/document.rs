//! A whole image of any kind in memory.

use std::{
    io::{BufRead, Write},
    path::Path,
};

use super::{
    Desc, ImageError, ImageReader, ImageWriter, Prologue, Result,
    dynamic::{AnyMessage, EntryReader},
    payload::{self, Framed, Layout, Stretch},
};

/// An image of any kind, which can be changed and written back. An unchanged image is
/// written back byte by byte.
#[derive(Clone, Debug)]
pub struct Document {
    desc: &'static Desc,
    prologue: Prologue,
    /// The contents of the image.
    pub content: Content,
}

/// The part of an image that follows the magics.
#[derive(Clone, Debug, PartialEq)]
pub enum Content {
    /// Bytes that the format does not describe.
    Bytes(Vec<u8>),
    /// Messages and payloads.
    Entries(Vec<Entry>),
}

/// A message and the bytes that follow it.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// The message.
    pub message: AnyMessage,
    /// The payload's parts, in the order of the message's [`Layout`].
    pub parts: Vec<Part>,
}

/// A part of a payload.
#[derive(Clone, Debug, PartialEq)]
pub struct Part {
    /// The message before the bytes, in payloads that consist of messages.
    pub message: Option<AnyMessage>,
    /// The bytes.
    pub bytes: Vec<u8>,
    /// Padding after the bytes, up to an alignment.
    pub padding: Vec<u8>,
}

impl Document {
    /// Reads the image at `path`.
    ///
    /// # Errors
    /// As [`ImageReader::open`] and [`EntryReader::next_entry`].
    pub fn read(path: &Path) -> Result<Self> {
        let (image, _) = ImageReader::open_any(path)?;
        Self::read_from(image)
    }

    /// Reads an image from `bytes`. Errors name `path`; its name decides among kinds that
    /// share a magic.
    ///
    /// # Errors
    /// As [`Document::read`].
    pub fn from_bytes(path: &Path, bytes: &[u8]) -> Result<Self> {
        Self::read_from(ImageReader::of_any_kind(path, bytes, Some(bytes.len() as u64))?)
    }

    /// Reads the rest of an image that has just been opened.
    ///
    /// # Errors
    /// As [`EntryReader::next_entry`].
    pub fn read_from<R: BufRead>(image: ImageReader<R>) -> Result<Self> {
        let (desc, prologue) = (image.desc(), image.prologue());
        let content = match EntryReader::new(image) {
            Err(mut image) => Content::Bytes(read_rest(&mut image)?),
            Ok(mut reader) => {
                let mut entries = Vec::new();
                while let Some((message, layout)) = reader.next_entry()? {
                    let message = AnyMessage::read(message, reader.bytes());
                    entries.push(Entry { message, parts: read_parts(&mut reader, &layout)? });
                }
                Content::Entries(entries)
            }
        };
        Ok(Self { desc, prologue, content })
    }

    /// Returns the row of the kind.
    pub fn desc(&self) -> &'static Desc {
        self.desc
    }

    /// Writes the image to `output`; errors name `path`.
    ///
    /// # Errors
    /// [`ImageError::Write`]; [`ImageError::Payload`] for an entry whose payload has
    /// another length than its message announces.
    pub fn write<W: Write>(&self, path: &Path, output: W) -> Result<W> {
        let mut writer = ImageWriter::with_prologue(path, output, self.desc.kind, self.prologue)?;
        match &self.content {
            Content::Bytes(bytes) => writer.raw(bytes)?,
            Content::Entries(entries) => {
                for (position, entry) in entries.iter().enumerate() {
                    entry.check(self.desc).map_err(|problem| ImageError::Payload {
                        path: path.to_owned(),
                        entry: position,
                        problem,
                    })?;
                    writer.message_bytes(&entry.message.encode())?;
                    for part in &entry.parts {
                        if let Some(message) = &part.message {
                            writer.message_bytes(&message.encode())?;
                        }
                        writer.raw(&part.bytes)?;
                        writer.raw(&part.padding)?;
                    }
                }
            }
        }
        Ok(writer.into_output())
    }
}

impl Entry {
    /// Checks that the payload has the parts that the message announces.
    fn check(&self, desc: &Desc) -> Result<(), String> {
        let parts = self.parts.len();
        let expect = |wanted: usize| {
            if parts == wanted { Ok(()) } else { Err(format!("{parts} parts, expected {wanted}")) }
        };
        match Layout::of(desc.payload, self.message.get()) {
            Layout::Rest => expect(1),
            Layout::Stretches(stretches) => {
                expect(stretches.len())?;
                self.parts.iter().zip(&stretches).try_for_each(|(part, wanted)| part.check(wanted))
            }
            Layout::Framed(framed) => {
                if let Some(count) = framed.count {
                    expect(usize::try_from(count).unwrap_or(usize::MAX))?;
                }
                for part in &self.parts {
                    let Some(message) = &part.message else {
                        return Err(format!("a part without its {}", framed.message));
                    };
                    part.check(&framed.stretch(message.get()))?;
                }
                Ok(())
            }
        }
    }
}

impl Part {
    fn check(&self, wanted: &Stretch) -> Result<(), String> {
        let lengths = |bytes: u64, padding: u64| format!("{bytes}+{padding} bytes");
        let (bytes, padding) = (self.bytes.len() as u64, self.padding.len() as u64);
        if (bytes, padding) == (wanted.length, wanted.padding) {
            return Ok(());
        }
        let expected = lengths(wanted.length, wanted.padding);
        Err(format!("{} of {}, expected {expected}", lengths(bytes, padding), wanted.name))
    }
}

fn read_rest<R: BufRead>(image: &mut ImageReader<R>) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    payload::pass(image, None, "bytes", |piece| {
        bytes.extend_from_slice(piece);
        Result::<()>::Ok(())
    })?;
    Ok(bytes)
}

fn read_parts<R: BufRead>(reader: &mut EntryReader<R>, layout: &Layout) -> Result<Vec<Part>> {
    match layout {
        Layout::Rest => {
            let bytes = read_rest(reader.image())?;
            Ok(vec![Part { message: None, bytes, padding: Vec::new() }])
        }
        Layout::Stretches(stretches) => {
            stretches.iter().map(|stretch| read_part(reader.image(), None, stretch)).collect()
        }
        Layout::Framed(framed) => read_framed(reader, framed),
    }
}

fn read_framed<R: BufRead>(reader: &mut EntryReader<R>, framed: &Framed) -> Result<Vec<Part>> {
    let mut parts = Vec::new();
    while reader.more_framed(framed, parts.len() as u64)? {
        let message = reader.next_framed(framed)?;
        let stretch = framed.stretch(&message);
        let message = AnyMessage::read(message, reader.bytes());
        parts.push(read_part(reader.image(), Some(message), &stretch)?);
    }
    Ok(parts)
}

fn read_part<R: BufRead>(
    image: &mut ImageReader<R>,
    message: Option<AnyMessage>,
    stretch: &Stretch,
) -> Result<Part> {
    let mut part = Part { message, bytes: Vec::new(), padding: Vec::new() };
    image.append(stretch.length, stretch.name, &mut part.bytes)?;
    image.append(stretch.padding, "padding", &mut part.padding)?;
    Ok(part)
}

#[cfg(test)]
mod tests;
