use std::path::PathBuf;

use proptest::{prelude::*, sample};
use prost::Message;

use super::*;
use crate::image::{
    Desc, ImageWriter, Kind,
    desc::{KINDS, Number},
    proto,
};

fn show(name: &str, bytes: &[u8], style: Style) -> Result<String> {
    let mut out = Vec::new();
    write_from(&PathBuf::from(name), bytes, style, &mut out)?;
    Ok(String::from_utf8(out).unwrap())
}

/// Makes an image of these messages, each followed by these bytes.
fn image(kind: Kind, entries: &[(Vec<u8>, &[u8])]) -> Vec<u8> {
    let mut image = ImageWriter::new(&PathBuf::from("image"), Vec::new(), kind).unwrap();
    for (message, payload) in entries {
        image.message_bytes(message).unwrap();
        image.raw(payload).unwrap();
    }
    image.into_output()
}

fn shown(kind: Kind, entries: &[(Vec<u8>, &[u8])], style: Style) -> String {
    show(&kind.file_name(1), &image(kind, entries), style).unwrap()
}

#[test]
fn an_entry_is_a_line() {
    let entry = |pid| proto::PstreeEntry { pid, threads: vec![pid, 9], ..Default::default() };
    let entries = [1, 2].map(|pid| (entry(pid).encode_to_vec(), &[][..]));
    assert_eq!(
        shown(Kind::Pstree, &entries, Style::Compact),
        "{\"magic\":\"PSTREE\",\"entries\":[\n\
         {\"pid\":1,\"ppid\":0,\"pgid\":0,\"sid\":0,\"threads\":[1,9]},\n\
         {\"pid\":2,\"ppid\":0,\"pgid\":0,\"sid\":0,\"threads\":[2,9]}\n\
         ]}\n"
    );
    assert_eq!(shown(Kind::Pstree, &[], Style::Compact), "{\"magic\":\"PSTREE\",\"entries\":[]}\n");
}

#[test]
fn pretty_documents_are_indented_and_spelled_out() {
    let head = proto::PagemapHead { pages_id: 3 }.encode_to_vec();
    let entry = proto::PagemapEntry {
        vaddr: 0x7f00_0000_1000,
        compat_nr_pages: 2,
        flags: Some(6),
        ..Default::default()
    };
    assert_eq!(
        shown(Kind::Pagemap, &[(head, &[]), (entry.encode_to_vec(), &[])], Style::Pretty),
        r#"{
    "magic": "PAGEMAP",
    "entries": [
        {
            "pages_id": 3
        },
        {
            "vaddr": "0x7f0000001000",
            "compat_nr_pages": 2,
            "flags": "PE_LAZY | PE_PRESENT"
        }
    ]
}
"#
    );
}

/// Returns the line of the only entry.
fn line(kind: Kind, message: &impl Message, payload: &[u8]) -> String {
    let text = shown(kind, &[(message.encode_to_vec(), payload)], Style::Compact);
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(lines.len(), 3);
    lines[1].to_owned()
}

#[test]
fn payloads_stand_in_their_entries() {
    let pipe = proto::PipeDataEntry { pipe_id: 1, bytes: 4, size: None };
    assert_eq!(
        line(Kind::PipesData, &pipe, b"data"),
        r#"{"pipe_id":1,"bytes":4,"payload":"ZGF0YQ=="}"#
    );
    let bpf = proto::BpfmapDataEntry { map_id: 1, keys_bytes: 1, values_bytes: 2, count: 1 };
    assert_eq!(
        line(Kind::BpfmapData, &bpf, b"kvv"),
        r#"{"map_id":1,"keys_bytes":1,"values_bytes":2,"count":1,"keys":"aw==","values":"dnY="}"#
    );
    let tcp = proto::TcpStreamEntry { inq_len: 1, outq_len: 0, ..Default::default() };
    assert!(line(Kind::TcpStream, &tcp, b"i").ends_with(r#","inq":"aQ==","outq":""}"#));
    let shm = proto::IpcShmEntry { size: 3, ..Default::default() };
    assert!(line(Kind::IpcnsShm, &shm, b"shm\0").ends_with(r#""size":3,"payload":"c2ht"}"#));
    assert!(
        line(Kind::IpcnsShm, &shm, b"shm!")
            .ends_with(r#""size":3,"payload":"c2ht","padding":"IQ=="}"#)
    );
    let sem = proto::IpcSemEntry { nsems: 3, ..Default::default() };
    assert!(
        line(Kind::IpcnsSem, &sem, &[1, 0, 2, 1, 0xff, 0xff, 0, 0])
            .ends_with(r#""nsems":3,"semaphores":[1,258,65535]}"#)
    );
    let queue = proto::IpcMsgEntry { qnum: 1, ..Default::default() };
    let text = [&[4, 0, 0, 0, 8, 7, 16, 2][..], b"hi\0\0\0\0\0\0"].concat();
    assert!(
        line(Kind::IpcnsMsg, &queue, &text)
            .ends_with(r#""qnum":1,"messages":[{"mtype":7,"msize":2,"payload":"aGk="}]}"#)
    );
    let mut ghost = proto::GhostFileEntry::default();
    assert_eq!(
        line(Kind::GhostFile, &ghost, b"ghost"),
        r#"{"uid":0,"gid":0,"mode":0,"payload":"Z2hvc3Q="}"#
    );
    ghost.chunks = Some(true);
    let chunk = [&[5, 0, 0, 0, 8, 1, 16, 0x80, 0x20][..], b"x"].concat();
    assert_eq!(
        line(Kind::GhostFile, &ghost, &chunk),
        r#"{"uid":0,"gid":0,"mode":0,"chunks":true,"ghost_chunks":[{"len":1,"off":4096,"payload":"eA=="}]}"#
    );
}

#[test]
fn a_long_payload_is_encoded_without_seams() {
    let content: Vec<u8> = (0..=250).cycle().take(200_001).collect();
    let text = line(Kind::GhostFile, &proto::GhostFileEntry::default(), &content);
    assert!(text.ends_with(&format!("\"payload\":\"{}\"}}", STANDARD.encode(&content))));
}

#[test]
fn what_is_unknown_is_shown_as_it_is() {
    // fdinfo_entry with type 77, and fields 99 of each wire type
    let mut message = vec![8, 1, 16, 0, 24, 77, 32, 5];
    message.extend([0x98, 6, 5, 0x9a, 6, 1, b'x', 0x99, 6, 1, 0, 0, 0, 0, 0, 0, 0x80]);
    message.extend([0x9d, 6, 1, 0, 0, 0]);
    let text = shown(Kind::Fdinfo, &[(message, &[])], Style::Compact);
    assert_eq!(
        text.lines().nth(1).unwrap(),
        r#"{"id":1,"flags":0,"type":77,"fd":5,"unknown_fields":[{"number":99,"value":5},{"number":99,"value":"eA=="},{"number":99,"value":9223372036854775809},{"number":99,"value":1}]}"#
    );
}

#[test]
fn a_string_that_is_not_utf8_is_bytes() {
    let entry = proto::UtsnsEntry { nodename: "AB".into(), domainname: "C".into() };
    let mut message = entry.encode_to_vec();
    message[2] = 0xff;
    let text = shown(Kind::Utsns, &[(message, &[])], Style::Compact);
    assert_eq!(text.lines().nth(1).unwrap(), r#"{"nodename":{"base64":"/0I="},"domainname":"C"}"#);
}

#[test]
fn raw_images_have_a_size() {
    let text = show("pages-7.img", &[0; 8192], Style::Compact).unwrap();
    assert_eq!(text, "{\"magic\":\"PAGES\",\"raw\":true,\"bytes\":8192}\n");
    let old = [&Kind::BinfmtMiscOld.desc().magic.to_le_bytes()[..], b"old"].concat();
    let text = show("binfmt-misc-4.img", &old, Style::Compact).unwrap();
    assert_eq!(text, "{\"magic\":\"BINFMT_MISC_OLD\",\"raw\":true,\"bytes\":3}\n");
    let problem = show("notes.txt", b"some notes", Style::Compact).unwrap_err();
    assert_eq!(
        problem.to_string(),
        "image notes.txt begins with magic 0x656d6f73, expected the magic of an image"
    );
}

#[test]
fn output_that_fails_is_not_the_images_fault() {
    struct Full;
    impl io::Write for Full {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::StorageFull.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let bytes = image(Kind::Pstree, &[]);
    let problem = write_from(Path::new("pstree.img"), &*bytes, Style::Compact, &mut Full);
    let Err(JsonError::Output(source)) = problem else { panic!("{problem:?}") };
    assert_eq!(source.kind(), io::ErrorKind::StorageFull);
}

proptest! {
    #[test]
    fn arbitrary_bytes_do_no_harm(
        desc in sample::select(KINDS.iter().collect::<Vec<_>>()),
        messages: Vec<Vec<u8>>,
        tail: Vec<u8>,
    ) {
        let name = |desc: &Desc| {
            let word = if desc.number == Number::Word { "dump" } else { "" };
            desc.kind.file_name(5) + word
        };
        let entries: Vec<_> = messages.into_iter().map(|message| (message, &tail[..])).collect();
        let mut bytes = image(desc.kind, &entries);
        bytes.extend(&tail);
        for style in [Style::Compact, Style::Pretty] {
            if let Ok(text) = show(&name(desc), &bytes, style) {
                prop_assert!(serde_json::from_str::<Json>(&text).is_ok(), "{}", text);
            }
        }
    }
}
