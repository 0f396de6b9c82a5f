//! Images that are broken at random, in bytes and in fields.

use std::{
    fs,
    path::{Path, PathBuf},
};

use prost_reflect::{DynamicMessage, FieldDescriptor, Kind as FieldKind, ReflectMessage, Value};
use rcriu::image::{
    Document, ImageWriter,
    desc::{Body, KINDS, Number},
    document::{Content, Entry},
    proto,
};

/// Numbers that are the same for the same seed (SplitMix64).
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x0123_4567_89ab_cdef)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut value = self.0;
        value = (value ^ value >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        value = (value ^ value >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        value ^ value >> 31
    }

    pub fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next() % end.max(1) as u64).unwrap()
    }
}

/// What strings and bytes are replaced by.
pub struct Values {
    pub texts: Vec<Vec<u8>>,
}

/// Numbers that are likely to be at some edge.
const NUMBERS: [u64; 14] = [
    0,
    1,
    2,
    3,
    0x7f,
    0xfff,
    0x1000,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    0x7fff_ffff_f000,
    0x7fff_ffff_ffff_f000,
    u64::MAX - 1,
    u64::MAX,
];

/// Breaks one file of the chain at `root`, and says how.
pub fn mutate(root: &Path, values: &Values, random: &mut Random) -> String {
    let mut all = Vec::new();
    for dir in fs::read_dir(root).unwrap().flatten().filter(|dir| dir.path().is_dir()) {
        for file in fs::read_dir(dir.path()).unwrap().flatten() {
            if file.file_type().unwrap().is_file() {
                all.push(file.path());
            }
        }
    }
    all.sort();
    // Rather an image with messages than pages.
    let named = |path: &&PathBuf| !path.to_str().unwrap().contains("/pages-");
    let interesting: Vec<&PathBuf> = all.iter().filter(named).collect();
    if interesting.is_empty() {
        return "nothing is left".to_owned();
    }
    let file = if random.below(12) == 0 {
        &all[random.below(all.len())]
    } else {
        interesting[random.below(interesting.len())]
    };
    let name = file.strip_prefix(root).unwrap().display().to_string();
    if random.below(4) > 0
        && let Ok(mut image) = Document::read(file)
        && let Some(what) = mutate_document(&mut image, values, random)
    {
        let mut bytes = Vec::new();
        if image.write(file, &mut bytes).is_ok() {
            fs::write(file, bytes).unwrap();
            return format!("{name}: {what}");
        }
    }
    format!("{name}: {}", mutate_bytes(file, &all, random))
}

fn mutate_bytes(file: &Path, all: &[PathBuf], random: &mut Random) -> String {
    let mut bytes = fs::read(file).unwrap();
    let at = random.below(bytes.len() + 1);
    let what = match random.below(9) {
        0 => {
            fs::remove_file(file).unwrap();
            return "removed".to_owned();
        }
        1 | 2 => {
            bytes.truncate(at);
            format!("cut at {at}")
        }
        3 => {
            bytes = fs::read(&all[random.below(all.len())]).unwrap();
            "replaced by another".to_owned()
        }
        4 => {
            let new = vec![0xff; 1 + random.below(10)];
            bytes.splice(at..at, new);
            format!("bytes inserted at {at}")
        }
        _ => {
            let at = random.below(bytes.len());
            if let Some(byte) = bytes.get_mut(at) {
                *byte ^= 1 << random.below(8);
            }
            format!("a bit of byte {at}")
        }
    };
    fs::write(file, bytes).unwrap();
    what
}

fn mutate_document(image: &mut Document, values: &Values, random: &mut Random) -> Option<String> {
    let Content::Entries(entries) = &mut image.content else { return None };
    if entries.is_empty() {
        return None;
    }
    let at = random.below(entries.len());
    match random.below(12) {
        0 => {
            entries.remove(at);
            Some(format!("entry {at} removed"))
        }
        1 => {
            let copy = entries[at].clone();
            entries.insert(random.below(entries.len() + 1), copy);
            Some(format!("entry {at} twice"))
        }
        2 => {
            let other = random.below(entries.len());
            entries.swap(at, other);
            Some(format!("entries {at} and {other} swapped"))
        }
        _ => {
            let numbers = numbers(entries);
            let entry = &mut entries[at];
            let message = entry.message.get_mut();
            let what = mutate_message(message, values, &numbers, random)?;
            Some(format!("entry {at}: {what}"))
        }
    }
}

/// Returns the numbers that the entries of an image have, for others to get.
fn numbers(entries: &[Entry]) -> Vec<u64> {
    let mut found = Vec::new();
    for entry in entries.iter().take(64) {
        collect(entry.message.get(), &mut found);
    }
    found
}

fn collect(message: &DynamicMessage, found: &mut Vec<u64>) {
    for (_, value) in message.fields() {
        match value {
            Value::U32(number) => found.push(u64::from(*number)),
            Value::U64(number) => found.push(*number),
            Value::Message(inner) => collect(inner, found),
            _ => {}
        }
    }
}

fn mutate_message(
    message: &mut DynamicMessage,
    values: &Values,
    numbers: &[u64],
    random: &mut Random,
) -> Option<String> {
    let fields: Vec<FieldDescriptor> = message.descriptor().fields().collect();
    let set: Vec<&FieldDescriptor> =
        fields.iter().filter(|field| message.has_field(field)).collect();
    let field = if random.below(10) > 0 && !set.is_empty() {
        set[random.below(set.len())].clone()
    } else {
        fields.get(random.below(fields.len()))?.clone()
    };
    let name = field.name().to_owned();
    if random.below(14) == 0 {
        message.clear_field(&field);
        return Some(format!("{name} removed"));
    }
    let number = if numbers.is_empty() || random.below(3) == 0 {
        NUMBERS[random.below(NUMBERS.len())]
    } else {
        numbers[random.below(numbers.len())]
    };
    if field.is_list() {
        let mut list = message.get_field(&field).as_list()?.to_vec();
        if list.is_empty() {
            let what = default_of(&field.kind(), number)?;
            list.push(what);
        } else {
            let at = random.below(list.len());
            match random.below(4) {
                0 => drop(list.remove(at)),
                1 => list.push(list[at].clone()),
                _ => {
                    let what = mutate_value(&mut list[at], number, values, numbers, random)?;
                    message.set_field(&field, Value::List(list));
                    return Some(format!("{name}[{at}] {what}"));
                }
            }
        }
        message.set_field(&field, Value::List(list));
        return Some(format!("{name} has another length"));
    }
    let value = message.get_field_mut(&field);
    let what = mutate_value(value, number, values, numbers, random)?;
    Some(format!("{name} {what}"))
}

fn default_of(kind: &FieldKind, number: u64) -> Option<Value> {
    #[expect(clippy::cast_possible_truncation, reason = "any number will do")]
    Some(match kind {
        FieldKind::Uint32 | FieldKind::Fixed32 => Value::U32(number as u32),
        FieldKind::Uint64 | FieldKind::Fixed64 => Value::U64(number),
        FieldKind::Bytes => Value::Bytes(vec![b'x'].into()),
        FieldKind::String => Value::String("x".to_owned()),
        FieldKind::Message(of) => Value::Message(DynamicMessage::new(of.clone())),
        _ => return None,
    })
}

fn mutate_value(
    value: &mut Value,
    number: u64,
    values: &Values,
    numbers: &[u64],
    random: &mut Random,
) -> Option<String> {
    #[expect(clippy::cast_possible_truncation, reason = "any number will do")]
    let small = number as u32;
    match value {
        Value::Bool(value) => *value = !*value,
        Value::I32(value) => *value = small.cast_signed(),
        Value::I64(value) => *value = number.cast_signed(),
        Value::U32(value) => *value = small,
        Value::U64(value) => *value = number,
        Value::EnumNumber(value) => *value = small.cast_signed(),
        Value::Message(message) => return mutate_message(message, values, numbers, random),
        Value::String(text) => {
            let cut: String = text.chars().take(random.below(text.len() + 1)).collect();
            *text = cut;
        }
        Value::Bytes(bytes) => {
            let mut new = bytes.to_vec();
            match random.below(4) {
                0 => new.truncate(random.below(new.len() + 1)),
                1 => new.extend_from_slice(b"/../.."),
                2 => new = vec![b'A'; 5000],
                _ => new = values.texts[random.below(values.texts.len())].clone(),
            }
            let text = new.escape_ascii().to_string();
            *bytes = new.into();
            return Some(format!("= {:.80}", text));
        }
        _ => return None,
    }
    Some(format!("= {number:#x}"))
}

/// Writes an image of every kind to a new directory, with all fields of two levels set.
pub fn every_kind(dir: &Path) {
    fs::create_dir(dir).unwrap();
    for (position, desc) in KINDS.iter().enumerate() {
        if desc.number == Number::Word {
            continue;
        }
        let id = if desc.number == Number::None { 0 } else { 1 };
        let path = dir.join(desc.kind.file_name(id));
        if path.exists() || desc.magic == 0 && desc.body != Body::Raw {
            continue;
        }
        let mut image = match ImageWriter::create(&path, desc.kind) {
            Ok(image) => image,
            Err(_) => continue,
        };
        let message = match desc.body {
            Body::One(name) | Body::Many(name) => name,
            Body::Pagemap => "pagemap_head",
            Body::Raw | Body::Opaque => {
                image.raw(&vec![1; 4096 * (position % 3)]).unwrap();
                image.finish().unwrap();
                continue;
            }
        };
        let of = proto::pool().all_messages().find(|of| of.name() == message).unwrap();
        let mut message = DynamicMessage::new(of);
        fill(&mut message, 2);
        image.message_bytes(&prost::Message::encode_to_vec(&message)).unwrap();
        image.finish().unwrap();
    }
}

fn fill(message: &mut DynamicMessage, depth: usize) {
    for field in message.descriptor().fields().collect::<Vec<_>>() {
        let value = match field.kind() {
            FieldKind::String => Value::String("/x".to_owned()),
            FieldKind::Bytes => Value::Bytes(vec![1, 2, 3].into()),
            FieldKind::Uint32 | FieldKind::Fixed32 => Value::U32(1),
            FieldKind::Uint64 | FieldKind::Fixed64 => Value::U64(1),
            FieldKind::Int32 | FieldKind::Sint32 | FieldKind::Sfixed32 => Value::I32(1),
            FieldKind::Int64 | FieldKind::Sint64 | FieldKind::Sfixed64 => Value::I64(1),
            FieldKind::Bool => Value::Bool(true),
            FieldKind::Enum(of) => Value::EnumNumber(of.values().next().unwrap().number()),
            FieldKind::Message(of) => {
                let mut inner = DynamicMessage::new(of);
                if depth > 0 {
                    fill(&mut inner, depth - 1);
                } else if !field.is_list()
                    && field.cardinality() != prost_reflect::Cardinality::Required
                {
                    continue;
                }
                Value::Message(inner)
            }
            _ => continue,
        };
        message.set_field(&field, if field.is_list() { Value::List(vec![value]) } else { value });
    }
}
