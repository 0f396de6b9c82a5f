//! The bytes that follow messages.
//!
//! A [`Layout`] says which bytes follow a message. It is computed from fields of that
//! message, which are as untrusted as any: no memory is allocated for a length before the
//! file has shown the bytes.

use std::io::BufRead;

use prost_reflect::{DynamicMessage, Value};

use super::{ImageError, ImageReader, desc::Payload};

/// The bytes that follow a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Layout {
    /// Stretches of bytes, one after the other.
    Stretches(Vec<Stretch>),
    /// All bytes until the end of the file.
    Rest,
    /// Messages with a length prefix, each followed by its own bytes.
    Framed(Framed),
}

/// A stretch of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stretch {
    /// What messages call the bytes.
    pub name: &'static str,
    /// How many there are.
    pub length: u64,
    /// How many bytes of padding follow.
    pub padding: u64,
}

/// A sequence of messages in a payload, each with its own bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Framed {
    /// What errors call the messages.
    pub name: &'static str,
    /// Their type.
    pub message: &'static str,
    /// How many there are; `None` means that they continue to the end of the file.
    pub count: Option<u32>,
    /// The field that says how many bytes follow one of them.
    length_field: &'static str,
    /// The alignment of these bytes.
    align: u64,
}

/// The name of a payload that has a single part.
pub(super) const PAYLOAD: &str = "payload";
/// Bytes of one semaphore's value.
pub(super) const SEMAPHORE_BYTES: u64 = 2;
/// The name of the semaphores' values.
pub(super) const SEMAPHORES: &str = "semaphores";

impl Layout {
    /// No bytes at all.
    pub const NONE: Self = Self::Stretches(Vec::new());

    /// `length` bytes, after a `pipe_data_entry` or `sk_packet_entry`.
    pub fn bytes(length: u64) -> Self {
        Self::Stretches(vec![Stretch::padded(PAYLOAD, length, 1)])
    }

    /// What follows an `ipc_shm_entry`.
    pub fn ipc_shm(size: u64, in_pagemaps: bool) -> Self {
        if in_pagemaps {
            return Self::NONE;
        }
        Self::Stretches(vec![Stretch::padded(PAYLOAD, size, 4)])
    }

    /// What follows an `ipc_msg_entry`.
    pub fn ipc_msg(qnum: u32) -> Self {
        Self::Framed(Framed {
            name: "messages",
            message: "ipc_msg",
            count: Some(qnum),
            length_field: "msize",
            align: 8,
        })
    }

    /// What follows an `ipc_sem_entry`.
    pub fn ipc_sem(nsems: u32) -> Self {
        let length = u64::from(nsems) * SEMAPHORE_BYTES;
        Self::Stretches(vec![Stretch::padded(SEMAPHORES, length, 8)])
    }

    /// What follows a `ghost_file_entry`.
    pub fn ghost(chunks: bool) -> Self {
        if !chunks {
            return Self::Rest;
        }
        Self::Framed(Framed {
            name: "ghost_chunks",
            message: "ghost_chunk_entry",
            count: None,
            length_field: "len",
            align: 1,
        })
    }

    /// What follows a `tcp_stream_entry`.
    pub fn tcp_stream(inq_len: u32, outq_len: u32) -> Self {
        Self::Stretches(vec![
            Stretch::padded("inq", inq_len.into(), 1),
            Stretch::padded("outq", outq_len.into(), 1),
        ])
    }

    /// What follows a `bpfmap_data_entry`.
    pub fn bpf_map(keys_bytes: u32, values_bytes: u32) -> Self {
        Self::Stretches(vec![
            Stretch::padded("keys", keys_bytes.into(), 1),
            Stretch::padded("values", values_bytes.into(), 1),
        ])
    }

    /// Returns the layout of the bytes after `message`.
    pub fn of(payload: Payload, message: &DynamicMessage) -> Self {
        let number = |field| number(message, field);
        // These fields are 32 bits wide, so nothing is cut off.
        let small = |field| u32::try_from(number(field)).unwrap_or(u32::MAX);
        match payload {
            Payload::None => Self::NONE,
            Payload::Bytes => Self::bytes(number("bytes")),
            Payload::Length => Self::bytes(number("length")),
            Payload::IpcShm => Self::ipc_shm(number("size"), number("in_pagemaps") != 0),
            Payload::IpcMsg => Self::ipc_msg(small("qnum")),
            Payload::IpcSem => Self::ipc_sem(small("nsems")),
            Payload::Ghost => Self::ghost(number("chunks") != 0),
            Payload::TcpStream => Self::tcp_stream(small("inq_len"), small("outq_len")),
            Payload::BpfMap => Self::bpf_map(small("keys_bytes"), small("values_bytes")),
        }
    }
}

impl Stretch {
    /// A stretch of `length` bytes, padded to a multiple of `align`.
    const fn padded(name: &'static str, length: u64, align: u64) -> Self {
        Self { name, length, padding: (align - length % align) % align }
    }
}

impl Framed {
    /// Returns the stretch of bytes that follows `message`, one of the sequence.
    pub fn stretch(&self, message: &DynamicMessage) -> Stretch {
        Stretch::padded(PAYLOAD, number(message, self.length_field), self.align)
    }
}

/// Returns the value of a number or a boolean; 0 if the field is absent.
fn number(message: &DynamicMessage, field: &str) -> u64 {
    match message.get_field_by_name(field).as_deref() {
        Some(Value::U32(value)) => u64::from(*value),
        Some(Value::U64(value)) => *value,
        Some(Value::Bool(value)) => u64::from(*value),
        _ => 0,
    }
}

/// Passes the next `length` bytes of `image` to `sink` in pieces; without a length, all
/// bytes that are left.
///
/// # Errors
/// [`ImageError::Read`], [`ImageError::Truncated`], and those of `sink`.
pub fn pass<R: BufRead, E: From<ImageError>>(
    image: &mut ImageReader<R>,
    length: Option<u64>,
    what: &'static str,
    mut sink: impl FnMut(&[u8]) -> Result<(), E>,
) -> Result<(), E> {
    let offset = image.offset();
    loop {
        let found = image.offset() - offset;
        let left = length.map_or(u64::MAX, |length| length - found);
        if left == 0 {
            return Ok(());
        }
        let ahead = image.peek()?;
        let piece = &ahead[..usize::try_from(left).unwrap_or(usize::MAX).min(ahead.len())];
        if piece.is_empty() {
            return match length {
                None => Ok(()),
                Some(wanted) => {
                    let path = image.path().to_owned();
                    Err(ImageError::Truncated { path, offset, what, wanted, found }.into())
                }
            };
        }
        sink(piece)?;
        let taken = piece.len();
        image.consume(taken);
    }
}
