//! Images as JSON, for people and scripts.
//!
//! An image becomes one document, which is written while the image is read, so that neither
//! a long pagemap nor a large file is held in memory. Fields have the names of the format.
//! Enum values are names, or numbers if they are unknown. Bytes are in base64; strings that
//! are not UTF-8 are in base64, too, in an object with the key `base64`. Fields that this
//! program does not know are in `unknown_fields`. What follows a message is in its object:
//! `payload`; `inq` and `outq` of a TCP connection; `keys` and `values` of a BPF map;
//! `semaphores`; `messages` of a queue and `ghost_chunks` of a file, each with its
//! `payload`.

mod fields;
mod names;
mod output;

use std::{
    io::{self, BufRead, Write},
    path::Path,
};

use base64::{Engine as _, engine::general_purpose::STANDARD, write::EncoderWriter};
use prost_reflect::{DynamicMessage, FieldDescriptor, Kind as FieldKind, ReflectMessage, Value};
use serde_json::Value as Json;

use self::{fields::Show, output::Output};
use super::{
    Desc, ImageError, ImageReader,
    desc::{self, Body},
    dynamic::EntryReader,
    payload::{self, Layout, SEMAPHORES, Stretch},
    proto,
    wire::{self, Value as Wire},
};

/// The style of a document.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Style {
    /// One line for each entry, and plain numbers.
    #[default]
    Compact,
    /// Indented; addresses, modes and flags in the usual notation.
    Pretty,
}

/// An error of showing an image.
#[derive(Debug, thiserror::Error)]
pub enum JsonError {
    /// The image is not valid.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The document could not be written.
    #[error("write JSON")]
    Output(#[from] io::Error),
}

/// The result of showing an image.
pub type Result<T> = std::result::Result<T, JsonError>;

/// Writes the image at `path` as one JSON document and a line break.
///
/// # Errors
/// [`JsonError::Output`]; [`JsonError::Image`], possibly after the beginning of the
/// document has been written.
pub fn write(path: &Path, style: Style, out: &mut impl Write) -> Result<()> {
    let (image, size) = ImageReader::open_any(path)?;
    write_image(image, Some(size), style, out)
}

/// Writes the image in `input` as [`write()`] does. Errors name `name`; it decides among
/// kinds that share a magic.
///
/// # Errors
/// As [`write()`].
pub fn write_from(
    name: &Path,
    input: impl BufRead,
    style: Style,
    out: &mut impl Write,
) -> Result<()> {
    write_image(ImageReader::of_any_kind(name, input, None)?, None, style, out)
}

fn write_image<R: BufRead>(
    image: ImageReader<R>,
    size: Option<u64>,
    style: Style,
    out: &mut impl Write,
) -> Result<()> {
    let mut json = Output::new(out, style);
    let written = write_document(image, size, &mut json);
    // A document that ends early ends with a line break, too.
    json.finish().map_err(JsonError::Output).and(written)
}

fn write_document<R: BufRead, W: Write>(
    image: ImageReader<R>,
    size: Option<u64>,
    json: &mut Output<W>,
) -> Result<()> {
    json.open_object()?;
    json.key("magic")?;
    json.scalar(&magic_name(image.desc()).into())?;
    match EntryReader::new(image) {
        Err(image) => write_raw(image, size, json)?,
        Ok(mut reader) => {
            json.key("entries")?;
            json.open_list(false)?;
            while let Some((message, layout)) = reader.next_entry()? {
                json.item()?;
                json.open_object()?;
                write_fields(&message, json)?;
                write_payload(&mut reader, &layout, json)?;
                json.close_object()?;
            }
            json.close_list()?;
        }
    }
    json.close_object()?;
    Ok(())
}

/// Returns the name of the image's magic, as `crit` expects it: that of the first kind with
/// this magic.
fn magic_name(desc: &Desc) -> &'static str {
    let first = desc::by_magic(desc.magic, "").filter(|_| desc.body != Body::Opaque);
    first.map_or(desc.name, |first| first.name)
}

/// Writes the length of an image that the format does not describe.
fn write_raw<R: BufRead, W: Write>(
    mut image: ImageReader<R>,
    size: Option<u64>,
    json: &mut Output<W>,
) -> Result<()> {
    let start = image.offset();
    let end = match size {
        Some(size) => size,
        None => {
            payload::pass(&mut image, None, "bytes", |_| Result::Ok(()))?;
            image.offset()
        }
    };
    json.key("raw")?;
    json.scalar(&true.into())?;
    json.key("bytes")?;
    json.scalar(&end.saturating_sub(start).into())?;
    Ok(())
}

/// Writes the fields of a message into the open object.
fn write_fields<W: Write>(message: &DynamicMessage, json: &mut Output<W>) -> Result<()> {
    let descriptor = message.descriptor();
    let pretty = json.style() == Style::Pretty;
    for (field, value) in message.fields() {
        json.key(field.name())?;
        let show = if pretty { fields::show(descriptor.name(), field.name()) } else { None };
        write_value(&field, value, show, json)?;
    }
    let mut unknown = message.unknown_fields().peekable();
    if unknown.peek().is_none() {
        return Ok(());
    }
    json.key("unknown_fields")?;
    json.open_list(false)?;
    for field in unknown {
        let mut bytes = Vec::with_capacity(field.encoded_len());
        field.encode(&mut bytes);
        let Some((number, value)) = wire::field(&mut bytes.as_slice()) else { continue };
        json.item()?;
        json.open_object()?;
        json.key("number")?;
        json.scalar(&number.into())?;
        json.key("value")?;
        match value {
            Wire::Varint(value) | Wire::Fixed64(value) => json.scalar(&value.into())?,
            Wire::Fixed32(value) => json.scalar(&value.into())?,
            Wire::Bytes(bytes) => write_bytes(bytes, json)?,
        }
        json.close_object()?;
    }
    json.close_list()?;
    Ok(())
}

fn write_value<W: Write>(
    field: &FieldDescriptor,
    value: &Value,
    show: Option<Show>,
    json: &mut Output<W>,
) -> Result<()> {
    match value {
        Value::Message(message) => {
            json.open_object()?;
            write_fields(message, json)?;
            json.close_object()?;
        }
        Value::List(values) => {
            json.open_list(!matches!(field.kind(), FieldKind::Message(_)))?;
            let numbers = show.map(|show| (show, values.iter().map_while(Value::as_u32).collect()));
            let one = numbers.and_then(|(show, all): (Show, Vec<_>)| show.numbers(&all));
            if let Some(one) = one {
                json.item()?;
                json.scalar(&one)?;
            } else {
                for value in values {
                    json.item()?;
                    write_value(field, value, show, json)?;
                }
            }
            json.close_list()?;
        }
        Value::Bytes(bytes) => match text(field, bytes).or_else(|| show?.bytes(bytes)) {
            Some(text) => json.scalar(&text)?,
            None if declared_as_string(field) => {
                json.open_object()?;
                json.key("base64")?;
                write_bytes(bytes, json)?;
                json.close_object()?;
            }
            None => write_bytes(bytes, json)?,
        },
        Value::EnumNumber(number) => json.scalar(&enum_value(field, *number))?,
        Value::String(text) => json.scalar(&text.as_str().into())?,
        Value::Bool(value) => json.scalar(&(*value).into())?,
        Value::U32(value) => json.scalar(&number(show, u64::from(*value)))?,
        Value::U64(value) => json.scalar(&number(show, *value))?,
        Value::I32(value) => json.scalar(&(*value).into())?,
        Value::I64(value) => json.scalar(&(*value).into())?,
        Value::F32(value) => json.scalar(&(*value).into())?,
        Value::F64(value) => json.scalar(&(*value).into())?,
        // The format uses no maps.
        Value::Map(_) => json.scalar(&Json::Null)?,
    }
    Ok(())
}

fn number(show: Option<Show>, value: u64) -> Json {
    show.map_or_else(|| value.into(), |show| show.number(value))
}

fn enum_value(field: &FieldDescriptor, number: i32) -> Json {
    let FieldKind::Enum(values) = field.kind() else { return number.into() };
    values.get_value(number).map_or_else(|| number.into(), |value| value.name().into())
}

/// Returns the text of a field that the format declares as a string, if its bytes are
/// UTF-8: it may be another string of the message that is not.
fn text(field: &FieldDescriptor, bytes: &[u8]) -> Option<Json> {
    let text = declared_as_string(field).then(|| std::str::from_utf8(bytes).ok()).flatten();
    text.map(Json::from)
}

/// Whether the format declares the field as a string, even if the descriptor in use says
/// bytes.
fn declared_as_string(field: &FieldDescriptor) -> bool {
    proto::pool()
        .get_message_by_name(field.parent_message().full_name())
        .and_then(|message| message.get_field(field.number()))
        .is_some_and(|field| field.kind() == FieldKind::String)
}

fn write_bytes<W: Write>(bytes: &[u8], json: &mut Output<W>) -> Result<()> {
    json.plain_string(|out| {
        let mut encoder = EncoderWriter::new(out, &STANDARD);
        encoder.write_all(bytes)?;
        encoder.finish()?;
        Ok(())
    })
}

/// Writes the payload of a message into the open object.
fn write_payload<R: BufRead, W: Write>(
    reader: &mut EntryReader<R>,
    layout: &Layout,
    json: &mut Output<W>,
) -> Result<()> {
    match layout {
        Layout::Rest => {
            json.key(payload::PAYLOAD)?;
            write_base64(reader.image(), None, payload::PAYLOAD, json)
        }
        Layout::Stretches(stretches) => {
            stretches.iter().try_for_each(|stretch| write_stretch(reader.image(), stretch, json))
        }
        Layout::Framed(framed) => {
            json.key(framed.name)?;
            json.open_list(false)?;
            let mut read = 0;
            while reader.more_framed(framed, read)? {
                let message = reader.next_framed(framed)?;
                json.item()?;
                json.open_object()?;
                write_fields(&message, json)?;
                write_stretch(reader.image(), &framed.stretch(&message), json)?;
                json.close_object()?;
                read += 1;
            }
            json.close_list()?;
            Ok(())
        }
    }
}

fn write_stretch<R: BufRead, W: Write>(
    image: &mut ImageReader<R>,
    stretch: &Stretch,
    json: &mut Output<W>,
) -> Result<()> {
    json.key(stretch.name)?;
    if stretch.name == SEMAPHORES {
        write_semaphores(image, stretch.length, json)?;
    } else {
        write_base64(image, Some(stretch.length), stretch.name, json)?;
    }
    let mut padding = Vec::new();
    image.append(stretch.padding, "padding", &mut padding)?;
    if padding.iter().any(|byte| *byte != 0) {
        json.key("padding")?;
        json.scalar(&STANDARD.encode(&padding).into())?;
    }
    Ok(())
}

fn write_base64<R: BufRead, W: Write>(
    image: &mut ImageReader<R>,
    length: Option<u64>,
    what: &'static str,
    json: &mut Output<W>,
) -> Result<()> {
    json.plain_string(|out| {
        let mut encoder = EncoderWriter::new(out, &STANDARD);
        payload::pass(image, length, what, |piece| {
            encoder.write_all(piece).map_err(JsonError::Output)
        })?;
        encoder.finish()?;
        Ok(())
    })
}

/// Writes 16-bit numbers as a list.
fn write_semaphores<R: BufRead, W: Write>(
    image: &mut ImageReader<R>,
    length: u64,
    json: &mut Output<W>,
) -> Result<()> {
    json.open_list(true)?;
    let mut low = None;
    payload::pass(image, Some(length), SEMAPHORES, |piece| {
        for byte in piece {
            match low.take() {
                None => low = Some(*byte),
                Some(low) => {
                    json.item()?;
                    json.scalar(&u16::from_le_bytes([low, *byte]).into())?;
                }
            }
        }
        Result::Ok(())
    })?;
    json.close_list()?;
    Ok(())
}

#[cfg(test)]
mod tests;
