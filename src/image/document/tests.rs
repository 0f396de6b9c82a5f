use std::{fs, path::PathBuf};

use proptest::{prelude::*, sample};
use prost::{Message, Name};
use prost_reflect::{
    Cardinality, DynamicMessage, Kind as FieldKind, MessageDescriptor, ReflectMessage, Value,
};

use super::*;
use crate::image::{
    Kind,
    desc::{self, Body, KINDS},
    json::{self, Style},
    proto,
};

/// Files of the fixture that are images, with their kinds.
fn fixture() -> Vec<(PathBuf, &'static Desc)> {
    let chain = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/criu42-chain/chain");
    let mut images = Vec::new();
    for snapshot in ["1", "2", "3"] {
        for file in fs::read_dir(chain.join(snapshot)).unwrap() {
            let file = file.unwrap();
            let name = file.file_name().into_string().unwrap();
            match desc::by_file_name(&name) {
                Some((desc, _)) => images.push((file.path(), desc)),
                None => assert_eq!(name, "parent"),
            }
        }
    }
    assert_eq!(images.len(), 69);
    images
}

/// Decodes and encodes a message by its generated type.
fn through_its_type(name: &str, bytes: &[u8]) -> Vec<u8> {
    macro_rules! by_name {
        ($($type:ident)*) => {
            match name {
                $(proto::$type::NAME => proto::$type::decode(bytes).unwrap().encode_to_vec(),)*
                _ => panic!("no type is listed for {name}"),
            }
        };
    }
    by_name! {
        ApparmorEntry AutofsEntry BinfmtMiscEntry BpfmapDataEntry BpfmapFileEntry CgroupEntry
        CoreEntry CpuinfoEntry CredsEntry EventfdFileEntry EventpollFileEntry EventpollTfdEntry
        ExtFileEntry FanotifyFileEntry FanotifyMarkEntry FdinfoEntry FifoEntry FileEntry
        FileLockEntry FsEntry GhostFileEntry InetSkEntry InotifyFileEntry InotifyWdEntry
        InventoryEntry IpcMsgEntry IpcSemEntry IpcShmEntry IpcVarEntry IrmapCacheEntry ItimerEntry
        MemfdInodeEntry MmEntry MntEntry NetDeviceEntry NetlinkSkEntry NetnsEntry NsFileEntry
        PacketSockEntry PagemapEntry PagemapHead PidfdEntry PidnsEntry PipeDataEntry PipeEntry
        PosixTimerEntry PstreeEntry RegFileEntry RemapFilePathEntry RlimitEntry SaEntry
        SeccompEntry SiginfoEntry SignalfdEntry SkPacketEntry StatsEntry TaskKobjIdsEntry
        TcpStreamEntry TimensEntry TimerfdEntry TtyDataEntry TtyFileEntry TtyInfoEntry
        TunfileEntry UnixSkEntry UsernsEntry UtsnsEntry VmaEntry
    }
}

#[test]
fn images_of_criu_are_written_back_as_they_were() {
    for (path, desc) in fixture() {
        let bytes = fs::read(&path).unwrap();
        let document = Document::read(&path).unwrap();
        assert_eq!(document.desc().kind, desc.kind, "{}", path.display());
        assert_eq!(document.write(&path, Vec::new()).unwrap(), bytes, "{}", path.display());
        let Content::Entries(entries) = document.content else {
            assert_eq!(desc.kind, Kind::Pages);
            continue;
        };
        for entry in entries {
            let message = entry.message.encode();
            assert_eq!(entry.message.get().encode_to_vec(), message, "{}", path.display());
            let name = entry.message.get().descriptor().name().to_owned();
            assert_eq!(through_its_type(&name, &message), message, "{}", path.display());
        }
    }
}

#[test]
fn every_message_of_the_table_has_a_type() {
    for desc in KINDS {
        if let Body::One(name) | Body::Many(name) = desc.body {
            let full_name = format!("criu.{name}");
            let descriptor = proto::pool().get_message_by_name(&full_name).expect(name);
            through_its_type(descriptor.name(), &valid(name, 1));
        }
    }
}

/// Encodes a message of type `name`: every field that is not a message is
/// there and has a value made from `number`, and required messages too.
fn valid(name: &str, number: u32) -> Vec<u8> {
    filled_of(name, number).encode_to_vec()
}

fn filled(descriptor: MessageDescriptor, number: u32, depth: u32) -> DynamicMessage {
    let mut message = DynamicMessage::new(descriptor.clone());
    for field in descriptor.fields() {
        let value = match field.kind() {
            FieldKind::Message(_) if depth == 0 && field.cardinality() != Cardinality::Required => {
                continue;
            }
            FieldKind::Message(inner) => {
                Value::Message(filled(inner, number, depth.saturating_sub(1)))
            }
            FieldKind::Bool => Value::Bool(number % 2 == 1),
            FieldKind::Uint32 | FieldKind::Fixed32 => Value::U32(number),
            FieldKind::Uint64 | FieldKind::Fixed64 => Value::U64(number.into()),
            FieldKind::Int32 | FieldKind::Sint32 => Value::I32(number.cast_signed()),
            FieldKind::Int64 | FieldKind::Sint64 => Value::I64(number.into()),
            FieldKind::String => Value::String(format!("string {number}")),
            FieldKind::Bytes => Value::Bytes(number.to_le_bytes().to_vec().into()),
            FieldKind::Enum(values) => Value::EnumNumber(values.default_value().number()),
            other => panic!("the format has no fields of type {other:?}"),
        };
        let value = if field.is_list() { Value::List(vec![value.clone(), value]) } else { value };
        message.set_field(&field, value);
    }
    message
}

/// Makes an image of a kind with entries whose fields all have the value
/// `number`, and with the payloads that these announce.
fn document(desc: &'static Desc, number: u32) -> Document {
    let part = |stretch: &Stretch, message: Option<DynamicMessage>| Part {
        message: message.map(AnyMessage::from),
        bytes: vec![0xb0; usize::try_from(stretch.length).unwrap()],
        padding: vec![0; usize::try_from(stretch.padding).unwrap()],
    };
    let entry = |name: &str| {
        let message: AnyMessage = filled_of(name, number).into();
        let parts = match Layout::of(desc.payload, message.get()) {
            Layout::Rest => vec![Part { message: None, bytes: vec![7; 99], padding: Vec::new() }],
            Layout::Stretches(all) => all.iter().map(|stretch| part(stretch, None)).collect(),
            Layout::Framed(framed) => (0..framed.count.unwrap_or(3))
                .map(|_| filled_of(framed.message, number))
                .map(|inner| part(&framed.stretch(&inner), Some(inner)))
                .collect(),
        };
        Entry { message, parts }
    };
    let content = match desc.body {
        Body::Raw | Body::Opaque => Content::Bytes(b"bytes".to_vec()),
        Body::One(name) => Content::Entries(vec![entry(name)]),
        // The bytes of a ghost file reach to the end.
        Body::Many(name) if desc.kind == Kind::GhostFile => Content::Entries(vec![entry(name)]),
        Body::Many(name) => Content::Entries(vec![entry(name), entry(name)]),
        Body::Pagemap => Content::Entries(vec![entry("pagemap_head"), entry("pagemap_entry")]),
    };
    let prologue = match desc.common_magic() {
        Some(desc::IMAGE_MAGIC) => Prologue::Image,
        Some(_) => Prologue::Service,
        None => Prologue::Bare,
    };
    Document { desc, prologue, content }
}

fn filled_of(name: &str, number: u32) -> DynamicMessage {
    let descriptor = proto::pool().get_message_by_name(&format!("criu.{name}")).unwrap();
    filled(descriptor, number, 3)
}

/// Returns a name that files of the kind have, where it alone decides.
fn file_name(desc: &Desc) -> PathBuf {
    let word = if desc.number == desc::Number::Word { "dump" } else { "" };
    PathBuf::from(desc.kind.file_name(5) + word)
}

#[test]
fn images_of_every_kind_and_age_are_written_back_as_they_were() {
    for (desc, number) in KINDS.iter().flat_map(|desc| [0, 1, 2, 7, 36].map(|n| (desc, n))) {
        let mut written = document(desc, number);
        let path = file_name(desc);
        for prologue in [written.prologue, Prologue::Bare] {
            written.prologue = prologue;
            let bytes = written.write(&path, Vec::new()).unwrap();
            let read = Document::from_bytes(&path, &bytes).unwrap();
            assert_eq!((read.desc.kind, read.prologue), (desc.kind, prologue), "{}", desc.name);
            assert_eq!(read.content, written.content, "{}", desc.name);
            assert_eq!(read.write(&path, Vec::new()).unwrap(), bytes, "{}", desc.name);
        }
    }
}

#[test]
fn payloads_are_padded_as_the_format_has_it() {
    let size = |kind: Kind, number: u32| {
        let Content::Entries(entries) = document(kind.desc(), number).content else { panic!() };
        let parts = entries[0].parts.iter();
        parts.map(|part| (part.bytes.len(), part.padding.len())).collect::<Vec<_>>()
    };
    assert_eq!(size(Kind::PipesData, 5), [(5, 0)]);
    assert_eq!(size(Kind::SkQueues, 5), [(5, 0)]);
    assert_eq!(size(Kind::IpcnsShm, 6), [(6, 2)]);
    assert_eq!(size(Kind::IpcnsShm, 5), []); // in_pagemaps
    assert_eq!(size(Kind::IpcnsMsg, 3), [(3, 5); 3]);
    assert_eq!(size(Kind::IpcnsSem, 3), [(6, 2)]);
    assert_eq!(size(Kind::IpcnsSem, 4), [(8, 0)]);
    assert_eq!(size(Kind::GhostFile, 4), [(99, 0)]);
    assert_eq!(size(Kind::GhostFile, 5), [(5, 0); 3]);
    assert_eq!(size(Kind::TcpStream, 5), [(5, 0); 2]);
    assert_eq!(size(Kind::BpfmapData, 5), [(5, 0); 2]);
}

#[test]
fn pages_are_raw_unless_they_are_of_the_oldest_format() {
    let name = Path::new("pages-1.img");
    let magic = Kind::PagesOld.desc().magic.to_le_bytes();
    let mut page = vec![0; 4096];
    page[..4].copy_from_slice(&magic);
    assert_eq!(Document::from_bytes(name, &page).unwrap().desc.kind, Kind::Pages);
    page.extend([0; 12]);
    assert_eq!(Document::from_bytes(name, &page).unwrap().desc.kind, Kind::PagesOld);
    page[0] ^= 1;
    assert_eq!(Document::from_bytes(name, &page).unwrap().desc.kind, Kind::Pages);
}

#[test]
fn unusual_encodings_and_unknown_fields_are_kept() {
    // A pstree_entry with an unknown field 99 first, its fields in reverse
    // order, and threads packed.
    let fields = [0x98, 6, 5, 0x2a, 2, 8, 9, 0x20, 4, 0x18, 3, 0x10, 2, 8, 1];
    let path = file_name(Kind::Pstree.desc());
    let mut image = ImageWriter::new(&path, Vec::new(), Kind::Pstree).unwrap();
    image.message_bytes(&fields).unwrap();
    let bytes = image.into_output();
    let mut document = Document::from_bytes(&path, &bytes).unwrap();
    assert_eq!(document.write(&path, Vec::new()).unwrap(), bytes);
    let Content::Entries(entries) = &mut document.content else { panic!() };
    entries[0].message.get_mut().set_field_by_name("pid", Value::U32(3));
    let written = document.write(&path, Vec::new()).unwrap();
    let changed = [8, 3, 0x10, 2, 0x18, 3, 0x20, 4, 0x28, 8, 0x28, 9, 0x98, 6, 5];
    assert_eq!(written[12..], changed);
}

#[test]
fn a_path_that_is_not_utf8_is_kept() {
    let mut entry = filled_of("reg_file_entry", 3).encode_to_vec();
    let name = entry.windows(8).position(|bytes| bytes == b"string 3").unwrap();
    entry[name] = 0xff;
    let path = file_name(Kind::RegFiles.desc());
    let mut image = ImageWriter::new(&path, Vec::new(), Kind::RegFiles).unwrap();
    image.message_bytes(&entry).unwrap();
    let bytes = image.into_output();
    let document = Document::from_bytes(&path, &bytes).unwrap();
    assert_eq!(document.write(&path, Vec::new()).unwrap(), bytes);
}

#[test]
fn a_payload_that_its_message_does_not_announce_is_not_written() {
    let path = Path::new("pipes-data.img");
    let mut image = document(Kind::PipesData.desc(), 4);
    let Content::Entries(entries) = &mut image.content else { panic!() };
    entries[1].parts[0].bytes.push(0);
    let problem = image.write(path, Vec::new()).unwrap_err().to_string();
    assert_eq!(problem, "image pipes-data.img, entry 1: 5+0 bytes of payload, expected 4+0 bytes");
}

#[test]
fn wrong_numbers_of_messages_and_missing_fields_are_errors() {
    let read = |kind: Kind, messages: &[&[u8]]| {
        let path = file_name(kind.desc());
        let mut image = ImageWriter::new(&path, Vec::new(), kind).unwrap();
        messages.iter().for_each(|message| image.message_bytes(message).unwrap());
        Document::from_bytes(&path, &image.into_output()).map_err(|error| error.to_string())
    };
    let fs = valid("fs_entry", 1);
    assert!(read(Kind::Fs, &[&fs]).is_ok());
    let problem = read(Kind::Fs, &[]).unwrap_err();
    assert_eq!(problem, "image fs-5.img holds 0 messages, exactly one expected");
    let problem = read(Kind::Fs, &[&fs, &fs]).unwrap_err();
    assert_eq!(problem, "image fs-5.img holds 2 messages, exactly one expected");
    let problem = read(Kind::Pagemap, &[]).unwrap_err();
    assert_eq!(problem, "image pagemap-5.img holds 0 messages, exactly one expected");
    let problem = read(Kind::Fs, &[&fs[..2]]).unwrap_err();
    assert_eq!(
        problem,
        "image fs-5.img has a malformed fs_entry at offset 0x8: fs_entry lacks field root_id"
    );
    assert!(read(Kind::Pstree, &[]).is_ok());
}

#[test]
fn lengths_that_lie_are_errors() {
    for kind in [Kind::PipesData, Kind::SkQueues, Kind::TcpStream, Kind::BpfmapData] {
        let path = file_name(kind.desc());
        let mut image = ImageWriter::new(&path, Vec::new(), kind).unwrap();
        let (Body::One(name) | Body::Many(name)) = kind.desc().body else { panic!() };
        image.message_bytes(&valid(name, u32::MAX)).unwrap();
        image.raw(b"few").unwrap();
        let problem = Document::from_bytes(&path, &image.into_output()).unwrap_err();
        assert!(matches!(problem, ImageError::Truncated { wanted: 0xffff_ffff, found: 3, .. }));
    }
}

proptest! {
    #[test]
    fn arbitrary_bytes_do_no_harm(desc in sample::select(KINDS.iter().collect::<Vec<_>>()), tail: Vec<u8>) {
        let path = file_name(desc);
        let mut image = ImageWriter::new(&path, Vec::new(), desc.kind).unwrap();
        image.raw(&tail).unwrap();
        let bytes = image.into_output();
        if let Ok(document) = Document::from_bytes(&path, &bytes) {
            prop_assert_eq!(document.write(&path, Vec::new()).unwrap(), bytes);
        }
        let _ = Document::from_bytes(Path::new("-"), &tail);
    }

    #[test]
    fn mutated_images_do_no_harm(
        desc in sample::select(KINDS.iter().collect::<Vec<_>>()),
        number in 0_u32..20,
        changes in prop::collection::vec((any::<sample::Index>(), any::<u8>()), 1..6),
        cut: Option<sample::Index>,
    ) {
        let path = file_name(desc);
        let mut bytes = document(desc, number).write(&path, Vec::new()).unwrap();
        for (place, value) in changes {
            let place = place.index(bytes.len());
            bytes[place] = value;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        let read = Document::from_bytes(&path, &bytes);
        for style in [Style::Compact, Style::Pretty] {
            let mut text = Vec::new();
            let shown = json::write_from(&path, &*bytes, style, &mut text);
            prop_assert_eq!(shown.is_ok(), read.is_ok());
            let parsed = serde_json::from_slice::<serde_json::Value>(&text);
            prop_assert_eq!(parsed.is_ok(), read.is_ok());
        }
        if let Ok(document) = read {
            prop_assert_eq!(document.write(&path, Vec::new()).unwrap(), bytes);
        }
    }
}
