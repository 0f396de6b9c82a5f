//! Messages of any type, decoded by their descriptors.

use std::io::BufRead;

use prost::Message;
use prost_reflect::DynamicMessage;

use super::{
    Desc, ImageError, ImageReader, Result,
    desc::Body,
    payload::{Framed, Layout},
    proto,
    wire::{self, Shape},
};

/// Reads the entries of an image whose kind describes its messages.
#[derive(Debug)]
pub struct EntryReader<R> {
    image: ImageReader<R>,
    entries: usize,
    scratch: Vec<u8>,
}

impl<R: BufRead> EntryReader<R> {
    /// Reads the entries of `image`, which has just been opened. A raw or opaque image has
    /// no entries.
    ///
    /// # Errors
    /// The image, if it is raw or opaque.
    pub fn new(image: ImageReader<R>) -> Result<Self, ImageReader<R>> {
        match image.desc().body {
            Body::Raw | Body::Opaque => Err(image),
            Body::One(_) | Body::Many(_) | Body::Pagemap => {
                Ok(Self { image, entries: 0, scratch: Vec::new() })
            }
        }
    }

    /// Returns the row of the kind.
    pub fn desc(&self) -> &'static Desc {
        self.image.desc()
    }

    /// Reads the message of the next entry, and returns the layout of its payload, which
    /// the caller must read before the next entry; `None` at the end of the file.
    ///
    /// # Errors
    /// As [`ImageReader::next_bytes`], [`ImageError::Malformed`], and
    /// [`ImageError::Count`] for files with too few or too many messages.
    pub fn next_entry(&mut self) -> Result<Option<(DynamicMessage, Layout)>> {
        let start = self.image.offset();
        let body = self.image.desc().body;
        let more = self.image.next_bytes(&mut self.scratch)?;
        let complete = match body {
            Body::One(_) => self.entries == 1,
            Body::Pagemap => self.entries > 0,
            _ => true,
        };
        let excess = more && complete && matches!(body, Body::One(_));
        if excess || !more && !complete {
            let found = self.entries + usize::from(more);
            return Err(ImageError::Count { path: self.image.path().to_owned(), found });
        }
        if !more {
            return Ok(None);
        }
        let name = match body {
            Body::One(name) | Body::Many(name) => name,
            Body::Pagemap if self.entries == 0 => "pagemap_head",
            _ => "pagemap_entry",
        };
        let message = self.decode(name, start)?;
        self.entries += 1;
        let layout = Layout::of(self.desc().payload, &message);
        Ok(Some((message, layout)))
    }

    /// Whether a payload has more than the `read` messages read so far.
    ///
    /// # Errors
    /// [`ImageError::Read`].
    pub fn more_framed(&mut self, framed: &Framed, read: u64) -> Result<bool> {
        match framed.count {
            Some(count) => Ok(read < u64::from(count)),
            None => Ok(!self.image.at_end()?),
        }
    }

    /// Reads the next message of a payload.
    ///
    /// # Errors
    /// As [`EntryReader::next_entry`], and [`ImageError::Truncated`].
    pub fn next_framed(&mut self, framed: &Framed) -> Result<DynamicMessage> {
        let start = self.image.offset();
        let length = self.image.length()?;
        self.scratch.clear();
        self.image.append(u64::from(length), "message", &mut self.scratch)?;
        self.decode(framed.message, start)
    }

    /// Returns the bytes of the last message.
    pub fn bytes(&self) -> &[u8] {
        &self.scratch
    }

    /// Returns the image, for reading payloads.
    pub fn image(&mut self) -> &mut ImageReader<R> {
        &mut self.image
    }

    fn decode(&self, name: &'static str, start: u64) -> Result<DynamicMessage> {
        decode(name, &self.scratch).map_err(|problem| ImageError::Malformed {
            path: self.image.path().to_owned(),
            offset: start,
            message: name,
            problem,
        })
    }
}

/// Decodes a message of type `name`.
///
/// If a string in the message is not UTF-8, all its strings are decoded as bytes, see
/// [`proto::pool_without_strings`].
fn decode(name: &str, bytes: &[u8]) -> Result<DynamicMessage, String> {
    let full_name = format!("criu.{name}");
    let descriptor = proto::pool().get_message_by_name(&full_name).expect("the table has types");
    let shape = Shape::by_full_name(&full_name).expect("every type has a shape");
    wire::check_required(bytes, shape)?;
    DynamicMessage::decode(descriptor, bytes).or_else(|error| {
        proto::pool_without_strings()
            .get_message_by_name(&full_name)
            .and_then(|descriptor| DynamicMessage::decode(descriptor, bytes).ok())
            .ok_or_else(|| error.to_string())
    })
}

/// A message of any type. It keeps the bytes that it was read from if encoding it again
/// would produce others.
#[derive(Clone, Debug, PartialEq)]
pub struct AnyMessage {
    value: DynamicMessage,
    original: Option<Vec<u8>>,
}

impl AnyMessage {
    /// Returns the message that was decoded from `bytes`.
    pub(super) fn read(value: DynamicMessage, bytes: &[u8]) -> Self {
        let differs = value.encode_to_vec() != bytes;
        Self { value, original: differs.then(|| bytes.to_owned()) }
    }

    /// Returns the decoded message.
    pub fn get(&self) -> &DynamicMessage {
        &self.value
    }

    /// Returns the message for changing it. It is then encoded with its fields in the usual
    /// order.
    pub fn get_mut(&mut self) -> &mut DynamicMessage {
        self.original = None;
        &mut self.value
    }

    /// Encodes the message.
    pub fn encode(&self) -> Vec<u8> {
        self.original.clone().unwrap_or_else(|| self.value.encode_to_vec())
    }
}

impl From<DynamicMessage> for AnyMessage {
    fn from(value: DynamicMessage) -> Self {
        Self { value, original: None }
    }
}
