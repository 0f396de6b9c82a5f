//! The protobuf wire format, as far as `prost` does not cover it.
//!
//! `prost` decodes a missing required field as zero. But zero is a valid address, pid and
//! file id. So [`check_required`] compares a message with its [`Shape`] first.

/// How deep messages may be nested; the format itself nests fewer than 8 levels.
const DEPTH_LIMIT: u32 = 32;

/// The value of a field on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Value<'a> {
    Varint(u64),
    Fixed64(u64),
    Bytes(&'a [u8]),
    Fixed32(u32),
}

/// Takes the next field off `bytes`; `None` if they are not a valid field.
#[inline]
pub(super) fn field<'a>(bytes: &mut &'a [u8]) -> Option<(u32, Value<'a>)> {
    let key = varint(bytes)?;
    let number = u32::try_from(key >> 3).ok().filter(|number| *number != 0)?;
    let value = match key & 7 {
        0 => Value::Varint(varint(bytes)?),
        1 => {
            let (head, tail) = bytes.split_first_chunk()?;
            *bytes = tail;
            Value::Fixed64(u64::from_le_bytes(*head))
        }
        2 => {
            let length = varint(bytes)?;
            Value::Bytes(take(bytes, length)?)
        }
        5 => {
            let (head, tail) = bytes.split_first_chunk()?;
            *bytes = tail;
            Value::Fixed32(u32::from_le_bytes(*head))
        }
        _ => return None,
    };
    Some((number, value))
}

/// Takes a base-128 varint off `bytes`.
#[inline]
pub(super) fn varint(bytes: &mut &[u8]) -> Option<u64> {
    // Fast path: most varints are keys, flags and small counts of one byte.
    if let [byte @ 0..0x80, rest @ ..] = *bytes {
        *bytes = rest;
        return Some(u64::from(*byte));
    }
    long_varint(bytes)
}

fn long_varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for (position, byte) in bytes.iter().enumerate().take(10) {
        if position == 9 && *byte > 1 {
            return None;
        }
        value |= u64::from(byte & 0x7f) << (7 * position);
        if byte & 0x80 == 0 {
            *bytes = &bytes[position + 1..];
            return Some(value);
        }
    }
    None
}

fn take<'a>(bytes: &mut &'a [u8], length: u64) -> Option<&'a [u8]> {
    let (head, tail) = bytes.split_at_checked(usize::try_from(length).ok()?)?;
    *bytes = tail;
    Some(head)
}

/// What the checks need to know of a message type, without its descriptor.
#[derive(Debug)]
pub(super) struct Shape {
    full_name: &'static str,
    name: &'static str,
    /// The required fields: number and name.
    required: &'static [(u32, &'static str)],
    /// The submessages: number of the field, and position of its type in [`SHAPES`].
    messages: &'static [(u32, usize)],
}

/// The shapes of all message types by full name, from the build script.
static SHAPES: &[Shape] = include!(concat!(env!("OUT_DIR"), "/shapes.rs"));

impl Shape {
    /// Returns the shape of a type, such as `criu.pagemap_entry`.
    pub(super) fn by_full_name(full_name: &str) -> Option<&'static Self> {
        let position = SHAPES.binary_search_by(|shape| shape.full_name.cmp(full_name)).ok()?;
        Some(&SHAPES[position])
    }

    fn inner(&self, number: u32) -> Option<&'static Self> {
        let (_, position) = self.messages.iter().find(|(field, _)| *field == number)?;
        Some(&SHAPES[*position])
    }
}

/// Checks that `bytes` are a sequence of fields, and that `message` and all messages in it
/// have their required fields.
pub(super) fn check_required(bytes: &[u8], message: &Shape) -> Result<(), String> {
    check(bytes, message, DEPTH_LIMIT)
}

fn check(mut bytes: &[u8], message: &Shape, depth: u32) -> Result<(), String> {
    if depth == 0 {
        return Err(format!("{} is nested too deeply", message.name));
    }
    let mut seen = 0_u128;
    while !bytes.is_empty() {
        let Some((number, value)) = field(&mut bytes) else {
            return Err(format!("{} is not a sequence of fields", message.name));
        };
        seen |= 1_u128.checked_shl(number).unwrap_or(0);
        if let Value::Bytes(inner) = value
            && let Some(inner_type) = message.inner(number)
        {
            check(inner, inner_type, depth - 1)?;
        }
    }
    for (number, name) in message.required {
        if 1_u128.checked_shl(*number).is_some_and(|bit| seen & bit == 0) {
            return Err(format!("{} lacks field {name}", message.name));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_required_field_is_named() {
        let shape = |name: &str| Shape::by_full_name(name).expect(name);
        let entry = shape("criu.pagemap_entry");
        assert_eq!(check_required(&[0x08, 0x00, 0x10, 0x01], entry), Ok(()));
        let problem = check_required(&[0x08, 0x00], entry).unwrap_err();
        assert_eq!(problem, "pagemap_entry lacks field compat_nr_pages");
        // mm_entry.vmas is field 14: an empty vma lacks everything.
        let problem = check_required(&[0x72, 0x00], shape("criu.mm_entry")).unwrap_err();
        assert_eq!(problem, "vma_entry lacks field start");
    }

    #[test]
    fn shapes_are_those_of_the_descriptors() {
        use crate::image::proto;
        use prost_reflect::{Cardinality, Kind};
        assert!(SHAPES.is_sorted_by_key(|shape| shape.full_name));
        assert_eq!(SHAPES.len(), proto::pool().all_messages().count());
        for descriptor in proto::pool().all_messages() {
            let shape = Shape::by_full_name(descriptor.full_name()).expect("one of each type");
            for field in descriptor.fields() {
                let required = shape.required.contains(&(field.number(), field.name()));
                assert_eq!(required, field.cardinality() == Cardinality::Required);
                let inner = shape.inner(field.number()).map(|inner| inner.full_name);
                match field.kind() {
                    Kind::Message(of) => assert_eq!(inner, Some(of.full_name())),
                    _ => assert_eq!(inner, None),
                }
            }
        }
    }

    #[test]
    fn varints_are_read_to_their_ends() {
        let read = |mut bytes: &[u8]| varint(&mut bytes).map(|value| (value, bytes.len()));
        assert_eq!(read(&[0x7f, 1]), Some((0x7f, 1)));
        assert_eq!(read(&[0x80, 0x02]), Some((0x100, 0)));
        let mut longest = [0xff; 10];
        longest[9] = 1;
        assert_eq!(read(&longest), Some((u64::MAX, 0)));
        longest[9] = 2;
        assert_eq!(read(&longest), None);
        assert_eq!(read(&[0x80]), None);
    }
}
