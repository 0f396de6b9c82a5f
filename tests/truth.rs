//! What is resolved from a chain that CRIU wrote, against what its dumper saw.
//!
//! The chain and its truth are in `fixtures/criu42-chain`; its README says how
//! they were made. In `fixtures/small` is one and the same program as two versions of CRIU
//! have dumped it, whose memory follows from its source.

mod common;

use std::{collections::BTreeMap, fs, os::unix::fs::FileExt, path::PathBuf, sync::Arc};

use common::{Cap, mounted::Mounted, require};
use rcriu::{
    chain::{Chain, Summary, read_at},
    image::{ImageReader, PagemapReader},
    view::{ROOT, View},
};
use sha2::{Digest, Sha256};

const PAGE: usize = 4096;

/// The processes of the fixture.
const PROCESSES: [u32; 2] = [293, 295];

/// The pages of private and shared mappings without a file, of each process.
const ANONYMOUS_PAGES: usize = 267;

/// Of these, the pages of the object that both share.
const SHARED_PAGES: usize = 96;

fn fixture() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/criu42-chain")
}

/// Reads so many bytes of a file in the flat directory, or up to its end.
type Read<'a> = &'a dyn Fn(&str, u64, usize) -> Vec<u8>;

/// Returns the first 16 hexadecimal digits of the page's hash.
fn prefix(page: &[u8]) -> String {
    Sha256::digest(page)[..8].iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What the dumper saw of one process: for every page of memory without a file
/// the beginning of its hash, and where in the shared object it is, if it is.
fn truth(pid: u32) -> BTreeMap<u64, (String, Option<u64>)> {
    let text = fs::read(fixture().join(format!("truth/mem-{pid}.json"))).unwrap();
    let truth: serde_json::Value = serde_json::from_slice(&text).unwrap();
    let mut pages = BTreeMap::new();
    for (range, mapping) in truth.as_object().unwrap() {
        let name = mapping["name"].as_str().unwrap();
        let shared = name.starts_with("/dev/zero");
        if name.starts_with('/') && !shared {
            continue;
        }
        let start = u64::from_str_radix(range.split_once('-').unwrap().0, 16).unwrap();
        for (number, hash) in (0..).zip(mapping["page_sha8"].as_array().unwrap()) {
            let offset = number * PAGE as u64;
            let hash = hash.as_str().unwrap().to_owned();
            pages.insert(start + offset, (hash, shared.then_some(offset)));
        }
    }
    assert_eq!(pages.len(), ANONYMOUS_PAGES);
    assert_eq!(pages.values().filter(|(_, shared)| shared.is_some()).count(), SHARED_PAGES);
    pages
}

/// Returns the pages of a flat memory by their addresses.
fn flat(read: Read, pagemap: &str) -> BTreeMap<u64, Vec<u8>> {
    let bytes = read(pagemap, 0, 1 << 20);
    let image = ImageReader::new(pagemap.as_ref(), bytes.as_slice()).unwrap();
    let reader = PagemapReader::new(image).unwrap();
    let pages = read(&format!("pages-{}.img", reader.pages_id()), 0, 1 << 20);
    let mut stored = pages.chunks(PAGE);
    let mut flat = BTreeMap::new();
    for entry in reader {
        let entry = entry.unwrap();
        for page in entry.first.0..entry.end().0 {
            flat.insert(page * PAGE as u64, stored.next().unwrap().to_owned());
        }
    }
    assert!(stored.next().is_none());
    flat
}

/// Compares all memory of both processes, whichever way it is shown.
fn compare(read: Read) {
    let zero = vec![0; PAGE];
    let shared = flat(read, "pagemap-shmem-1024.img");
    for pid in PROCESSES {
        let private = flat(read, &format!("pagemap-{pid}.img"));
        let mut left = private.clone();
        for (address, (expected, offset)) in truth(pid) {
            let page = read(&format!("proc/{pid}/mem"), address, PAGE);
            assert_eq!(prefix(&page), expected, "proc/{pid}/mem at {address:#x}");
            let stored = match offset {
                None => private.get(&address),
                Some(offset) => {
                    let page = read("shmem/1024", offset, PAGE);
                    assert_eq!(prefix(&page), expected, "shmem/1024 at {offset:#x}");
                    shared.get(&offset)
                }
            };
            left.remove(&address);
            assert_eq!(
                prefix(stored.unwrap_or(&zero)),
                expected,
                "flat pages of {pid} at {address:#x}"
            );
        }
        // What else is stored is what the process changed of mapped files.
        let maps = fs::read_to_string(fixture().join(format!("truth/maps-{pid}"))).unwrap();
        for address in left.keys() {
            let mapping = maps.lines().find(|line| {
                let (start, end) = line.split(' ').next().unwrap().split_once('-').unwrap();
                let number = |text| u64::from_str_radix(text, 16).unwrap();
                (number(start)..number(end)).contains(address)
            });
            assert!(mapping.is_some_and(|line| line.contains('/')), "{address:#x} of {pid}");
        }
    }
    assert_eq!(read("shmem/1024", 0, 1 << 20).len(), SHARED_PAGES * PAGE);
}

#[test]
fn every_anonymous_page_is_as_it_was_dumped() {
    let chain = Arc::new(Chain::open(&fixture().join("chain")).unwrap());
    let tip = chain.choose(None).unwrap();
    assert_eq!(chain.snapshot(tip).name, "3");
    let view = View::new(chain, tip);
    compare(&|path, offset, len| {
        let names = path.split('/');
        let ino = names.fold(ROOT, |dir, name| view.lookup(dir, name).unwrap().ino);
        let mut bytes = vec![0xaa; len];
        let read = read_at(&*view.open(ino).unwrap().content, offset, &mut bytes).unwrap();
        bytes.truncate(read);
        bytes
    });
}

#[test]
fn privileged_every_anonymous_page_is_so_in_a_mount() {
    require(Cap::Fuse);
    let place = tempfile::tempdir().unwrap();
    let mounted = Mounted::new(&fixture().join("chain"), &place.path().join("mnt"), &[]);
    compare(&|path, offset, len| {
        let file = fs::File::open(mounted.path(path)).unwrap();
        let mut bytes = vec![0xaa; len];
        let mut read = 0;
        loop {
            match file.read_at(&mut bytes[read..], offset + read as u64).unwrap() {
                0 => break,
                more => read += more,
            }
        }
        bytes.truncate(read);
        bytes
    });
}

/// Returns a page of the program of `fixtures/small` as it fills it.
fn filled(what: u64, page: u64, round: u64) -> Vec<u8> {
    let word = |word: u64| what << 48 | page << 32 | round << 16 | word;
    (0..PAGE as u64 / 8).flat_map(|number| word(number).to_le_bytes()).collect()
}

#[test]
fn two_versions_tell_the_same_of_the_same_program() {
    // Where it has its memory.
    const PRIVATE: u64 = 0x1000_0000;
    const SHARED: u64 = 0x2000_0000;
    let small = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/small");
    for (dir, rounds) in [("criu42/1", 1), ("criu3171/1", 0), ("criu3171/2", 1)] {
        let dir = small.join(dir);
        let chain = Arc::new(Chain::open(&dir).unwrap());
        let id = chain.at(&dir).unwrap();
        let summary = Summary::of(&chain, id).unwrap();
        assert_eq!(summary.private.in_parent > 0, dir.ends_with("criu3171/2"), "{summary:?}");
        let view = View::new(Arc::clone(&chain), id);
        let [parent, child] = summary.processes[..] else { panic!("{summary:?}") };
        for (pid, is_child) in [(parent, false), (child, true)] {
            let memory = view.find(&format!("proc/{pid}/mem")).unwrap();
            let open = view.open(memory.ino).unwrap();
            let page = |at: u64| {
                let mut bytes = vec![0xaa; PAGE];
                assert_eq!(read_at(&*open.content, at, &mut bytes).unwrap(), PAGE);
                bytes
            };
            for number in 0..4_u64 {
                let at = number * PAGE as u64;
                let private = match (rounds, number, is_child) {
                    (1, 3, _) => vec![0; PAGE],
                    (1, 2, false) => filled(1, 2, 1),
                    (1, 1, true) => filled(2, 1, 1),
                    _ => filled(1, number, 0),
                };
                assert_eq!(
                    page(PRIVATE + at),
                    private,
                    "private page {number} of {pid} in {dir:?}"
                );
                let shared = match (rounds, number) {
                    (1, 2) => filled(3, 2, 1),
                    (1, 1) => filled(4, 1, 1),
                    _ => filled(3, number, 0),
                };
                assert_eq!(page(SHARED + at), shared, "shared page {number} of {pid} in {dir:?}");
            }
        }
    }
}
