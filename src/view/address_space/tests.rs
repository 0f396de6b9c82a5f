use std::fs;

use proptest::prelude::*;

use super::*;
use crate::{
    chain::{
        read_at,
        testing::{self, MEMORY, Model, PAGES, TestChain, entry},
    },
    image::{Kind, PagemapEntry, Presence, proto, vma},
    units::PAGE_SIZE,
    view::{
        Result, ViewError,
        testing::{PID, image, load, mapping, process, regular},
    },
};

const PRIVATE: MemoryId = MemoryId::Private(PID as u64);
const SHMID: u32 = 1024;

/// Bytes in the mapped file: 30 pages and a bit.
const FILE_BYTES: u64 = 30 * PAGE_SIZE + 100;

/// What tests map, besides memory.
const FILE: u32 = 1;
const GONE: u32 = 2;
const MEMFD: u32 = 3;

#[derive(Clone, Copy, Debug, PartialEq)]
enum What {
    Anonymous,
    FilePrivate,
    FileShared,
    GonePrivate,
    AnonShared,
    MemfdShared,
    MemfdPrivate,
    Vvar,
}

impl What {
    fn is_private(self) -> bool {
        !matches!(self, Self::FileShared | Self::AnonShared | Self::MemfdShared)
    }

    fn mapping(self, first: u64, pages: u64, offset: u64) -> proto::VmaEntry {
        let (status, shmid) = match self {
            Self::Anonymous => (vma::ANON_PRIVATE, 0),
            Self::FilePrivate => (vma::FILE_PRIVATE, FILE),
            Self::FileShared => (vma::FILE_SHARED, FILE),
            Self::GonePrivate => (vma::FILE_PRIVATE, GONE),
            Self::AnonShared => (vma::ANON_SHARED, SHMID),
            Self::MemfdShared => (vma::FILE_SHARED | vma::MEMFD, MEMFD),
            Self::MemfdPrivate => (vma::FILE_PRIVATE | vma::MEMFD, MEMFD),
            Self::Vvar => (vma::VVAR | vma::ANON_PRIVATE, 0),
        };
        let pgoff = offset * PAGE_SIZE;
        proto::VmaEntry { pgoff, shmid: shmid.into(), ..mapping(first, pages, status) }
    }
}

fn file_bytes() -> Vec<u8> {
    (0..FILE_BYTES).map(|byte| u8::try_from(byte % 251).unwrap()).collect()
}

/// Writes the images of open files, and the file.
fn tables(chain: &TestChain, layer: usize) {
    let path = chain.root.path().join("mapped");
    if !path.exists() {
        fs::write(&path, file_bytes()).unwrap();
    }
    let memfd = proto::MemfdFileEntry { id: MEMFD, inode_id: 5, ..Default::default() };
    let memfd = proto::FileEntry {
        r#type: proto::FdTypes::Memfd.into(),
        id: MEMFD,
        memfd: Some(memfd),
        ..Default::default()
    };
    let files =
        [regular(FILE, &path, Some(FILE_BYTES)), regular(GONE, &path, Some(FILE_BYTES + 1)), memfd];
    let dir = chain.dir(layer);
    image(&dir, Kind::Files, 0, &files);
    let inode = proto::MemfdInodeEntry { inode_id: 5, shmid: SHMID, ..Default::default() };
    image(&dir, Kind::MemfdInode, 0, &[inode]);
}

fn open(chain: &TestChain, layer: usize, vmas: Vec<proto::VmaEntry>) -> Result<AddressSpace> {
    tables(chain, layer);
    process(&chain.dir(layer), vmas);
    let chain = chain.open();
    let snapshot = chain.find(&layer.to_string()).unwrap();
    load(chain, snapshot).map(AddressSpace::new)
}

/// Returns the address space of a snapshot with these mappings and no memory.
fn with(vmas: Vec<proto::VmaEntry>) -> Result<AddressSpace> {
    let mut chain = TestChain::new();
    let layer = chain.push(&[]);
    open(&chain, layer, vmas)
}

/// One page of the model, and how many bytes of it are not in a hole; `None` if its contents are lost.
type Page = Option<(Vec<u8>, u64)>;

fn memory_page(model: &Model, number: u64) -> Option<Page> {
    let stored = |layer: usize| (testing::page(layer, number), PAGE_SIZE);
    model.get(&number).map(|layer| layer.map(stored))
}

fn file_page(number: u64) -> Page {
    let start = usize::try_from(number * PAGE_SIZE).unwrap();
    let mut page: Vec<u8> = file_bytes().into_iter().skip(start).take(4096).collect();
    let present = page.len() as u64;
    page.resize(4096, 0);
    Some((page, present))
}

/// Looks up the page of a mapping that shows `offset`.
fn naive(what: What, private: &Model, shared: &Model, address: u64, offset: u64) -> Page {
    let own = if what.is_private() { memory_page(private, address) } else { None };
    own.unwrap_or_else(|| match what {
        What::FilePrivate | What::FileShared => file_page(offset),
        What::AnonShared | What::MemfdShared | What::MemfdPrivate => {
            memory_page(shared, offset).unwrap_or_else(|| Some((vec![0; 4096], 0)))
        }
        What::Anonymous | What::GonePrivate | What::Vvar => Some((vec![0; 4096], 0)),
    })
}

fn areas() -> impl Strategy<Value = Vec<(u64, u64, What, u64)>> {
    let what = prop::sample::select(vec![
        What::Anonymous,
        What::FilePrivate,
        What::FileShared,
        What::GonePrivate,
        What::AnonShared,
        What::MemfdShared,
        What::MemfdPrivate,
        What::Vvar,
    ]);
    prop::collection::vec((0..4_u64, 1..16_u64, what, 0..40_u64), 1..12).prop_map(|drawn| {
        let mut next = 0;
        let place = |(gap, pages, what, offset)| {
            let first = next + gap;
            next = first + pages;
            (first, pages, what, offset)
        };
        drawn.into_iter().map(place).collect()
    })
}

fn models(layers: &[Vec<PagemapEntry>]) -> Model {
    let number = |below: Model, (layer, entries): (usize, &Vec<PagemapEntry>)| {
        testing::model(layer, entries, &below)
    };
    (1..).zip(layers).fold(Model::new(), number)
}

proptest! {
    #[test]
    fn bytes_are_those_of_a_page_by_page_model(
        mut private in testing::layers(),
        mut shared in testing::layers(),
        areas in areas(),
        reads in prop::collection::vec((0..PAGES * PAGE_SIZE, 1..20_000_usize), 20),
    ) {
        let depth = private.len().min(shared.len());
        private.truncate(depth);
        shared.truncate(depth);
        let mut chain = TestChain::new();
        for (private, shared) in private.iter().zip(&shared) {
            let layer = chain.push(shared);
            chain.memory(layer, PRIVATE, 8, private);
        }
        let (private, shared) = (models(&private), models(&shared));
        let vmas = areas.iter().rev().map(|(first, pages, what, offset)| {
            what.mapping(*first, *pages, *offset)
        });
        let space = open(&chain, depth, vmas.collect()).unwrap();

        let mut pages: Vec<Page> = Vec::new();
        let mut allocated = 0;
        for (first, count, what, offset) in areas {
            pages.resize(usize::try_from(first).unwrap(), Some((vec![0; 4096], 0)));
            for page in 0..count {
                let page = naive(what, &private, &shared, first + page, offset + page);
                allocated += page.as_ref().map_or(0, |page| page.1);
                pages.push(page);
            }
        }
        prop_assert_eq!(space.len(), pages.len() as u64 * PAGE_SIZE);
        prop_assert_eq!(space.allocated(), allocated);
        for (offset, len) in reads {
            let mut buffer = vec![0xaa; len];
            let result = read_at(&space, offset, &mut buffer);
            let start = usize::try_from(offset).unwrap().min(pages.len() * 4096);
            let end = (start + len).min(pages.len() * 4096);
            let touched = &pages[start / 4096..end.div_ceil(4096).max(start / 4096)];
            let touched: Option<Vec<u8>> =
                touched.iter().map(|page| page.clone().map(|page| page.0)).collect::<Option<Vec<_>>>()
                    .map(|pages| pages.concat());
            match touched {
                None => prop_assert!(matches!(result, Err(ChainError::Lost(_)))),
                Some(bytes) => {
                    let read = result.unwrap();
                    prop_assert_eq!(read, end - start);
                    prop_assert!(buffer[..read] == bytes[start % 4096..][..read]);
                }
            }
        }
    }
}

#[test]
fn mappings_that_cannot_be_are_errors_that_say_why() {
    let problem = |vmas| match with(vmas).unwrap_err() {
        ViewError::BadVma { pid: PID, start, problem, .. } => (start, problem),
        error => panic!("{error}"),
    };
    let anonymous = |first, pages| What::Anonymous.mapping(first, pages, 0);
    assert_eq!(problem(vec![anonymous(3, 2), anonymous(1, 3)]), (0x3000, "it overlaps another"));
    assert_eq!(problem(vec![anonymous(1, 0)]), (0x1000, "its end is not after its start"));
    let uneven = proto::VmaEntry { end: 0x2001, ..anonymous(1, 1) };
    assert_eq!(problem(vec![uneven]), (0x1000, "it is not made of whole pages"));
    let between = proto::VmaEntry { pgoff: 1, ..What::AnonShared.mapping(1, 1, 0) };
    assert_eq!(problem(vec![between]), (0x1000, "its offset is not that of a page"));
    let far =
        proto::VmaEntry { pgoff: 1_u64.wrapping_neg() << 12, ..What::AnonShared.mapping(1, 1, 0) };
    assert_eq!(problem(vec![far]), (0x1000, "its offset is beyond the end of all files"));
    let unknown = proto::VmaEntry { shmid: 99, ..What::FilePrivate.mapping(1, 1, 0) };
    let error = with(vec![unknown]).unwrap_err();
    assert!(matches!(error, ViewError::NoSuchFile { id: 99, start: 0x1000, .. }), "{error}");
}

#[test]
fn guards_and_the_kernels_half_are_no_mappings() {
    let guard = proto::VmaEntry { status: vma::GUARD, ..mapping(1, 1, 0) };
    let vsyscall = proto::VmaEntry {
        start: 0xffff_ffff_ff60_0000,
        end: 0xffff_ffff_ff60_1000,
        status: vma::VSYSCALL,
        ..Default::default()
    };
    let space = with(vec![What::Anonymous.mapping(1, 2, 0), vsyscall, guard]).unwrap();
    assert_eq!(space.len(), 0x3000);
}

#[test]
fn a_process_that_is_not_there_is_an_error() {
    let mut chain = TestChain::new();
    let layer = chain.push(&[]);
    let dir = chain.dir(layer);
    let entry = proto::PstreeEntry { pid: PID + 1, ..Default::default() };
    image(&dir, Kind::Pstree, 0, &[entry]);
    let snapshot = chain.open().choose(None).unwrap();
    let error = load(chain.open(), snapshot).unwrap_err();
    assert!(matches!(error, ViewError::NoSuchProcess { pid: PID, .. }), "{error}");
    fs::remove_file(dir.join("pstree.img")).unwrap();
    let entry = proto::PstreeEntry { pid: PID, ..Default::default() };
    image(&dir, Kind::Pstree, 0, &[entry]);
    let error = load(chain.open(), snapshot).unwrap_err();
    assert!(matches!(error, ViewError::NoAddressSpace { pid: PID, .. }), "{error}");
}

#[test]
fn memory_that_is_not_there_is_lost_and_the_rest_is_not() {
    let mut chain = TestChain::new();
    let layer = chain.push(&[entry(0, 1, Presence::Present)]);
    let shared = |first, shmid| proto::VmaEntry { shmid, ..What::AnonShared.mapping(first, 1, 0) };
    let vmas = vec![What::Anonymous.mapping(0, 1, 0), shared(1, 1024), shared(2, 1025)];
    let space = open(&chain, layer, vmas).unwrap();
    let mut page = vec![0; 4096];
    read_at(&space, 0x1000, &mut page).unwrap();
    assert_eq!(page, testing::page(layer, 0));
    for (address, memory) in [(0, PRIVATE), (0x2000, MemoryId::Shared(1025))] {
        let Err(ChainError::Lost(error)) = read_at(&space, address, &mut page) else { panic!() };
        assert!(matches!(*error, ChainError::NoMemory { memory: lost, .. } if lost == memory));
    }
    assert_eq!(space.allocated(), PAGE_SIZE);
    assert_eq!(MEMORY, MemoryId::Shared(SHMID.into()));
}

#[test]
fn files_without_a_name_are_read_from_their_ghosts() {
    let mut chain = TestChain::new();
    let layer = chain.push(&[]);
    let dir = chain.dir(layer);
    let remap = proto::RemapFilePathEntry {
        orig_id: FILE,
        remap_id: 0x1a,
        remap_type: Some(proto::RemapType::Ghost.into()),
    };
    image(&dir, Kind::RemapFpath, 0, &[remap]);
    let path = dir.join(Kind::GhostFile.file_name(0x1a));
    let mut writer = crate::image::ImageWriter::create(&path, Kind::GhostFile).unwrap();
    let head =
        proto::GhostFileEntry { chunks: Some(true), size: Some(12_000), ..Default::default() };
    writer.message(&head).unwrap();
    for (off, bytes) in [(0, b"begin"), (8190, b"later")] {
        writer.message(&proto::GhostChunkEntry { len: 5, off }).unwrap();
        writer.raw(bytes).unwrap();
    }
    writer.finish().unwrap();
    let space = open(&chain, layer, vec![What::FileShared.mapping(1, 3, 0)]).unwrap();
    let mut bytes = vec![0xaa; 0x4000];
    read_at(&space, 0, &mut bytes).unwrap();
    let mut expected = vec![0; 0x4000];
    expected[0x1000..0x1005].copy_from_slice(b"begin");
    expected[0x2ffe..0x3003].copy_from_slice(b"later");
    assert!(bytes == expected);
    assert_eq!(space.allocated(), 10);
}

#[test]
fn a_file_with_another_build_id_is_another_file() {
    let own = std::env::current_exe().unwrap();
    let bytes = fs::read(&own).unwrap();
    let size = bytes.len() as u64;
    let mut chain = TestChain::new();
    let first = with_build_id(&mut chain, &own, size, Vec::new());
    let mut start = vec![0; 4096];
    read_at(&first, 0x1000, &mut start).unwrap();
    assert!(start == bytes[..4096]);
    let other = with_build_id(&mut chain, &own, size, vec![0x0102_0304; 5]);
    read_at(&other, 0x1000, &mut start).unwrap();
    assert!(start == [0; 4096]);
    assert_eq!(other.allocated(), 0);
}

fn with_build_id(
    chain: &mut TestChain,
    path: &std::path::Path,
    size: u64,
    build_id: Vec<u32>,
) -> AddressSpace {
    let layer = chain.push(&[]);
    let mut file = regular(FILE, path, Some(size));
    file.reg.as_mut().unwrap().build_id = build_id;
    image(&chain.dir(layer), Kind::Files, 0, &[file]);
    process(&chain.dir(layer), vec![What::FileShared.mapping(1, 1, 0)]);
    let chain = chain.open();
    let snapshot = chain.find(&layer.to_string()).unwrap();
    AddressSpace::new(load(chain, snapshot).unwrap())
}
