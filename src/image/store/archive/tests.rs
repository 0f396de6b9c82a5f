use std::{
    fs,
    io::{IoSliceMut, Read, Write},
    path::Path,
};

use proptest::prelude::*;
use tar::{Builder, EntryType, Header};
use tempfile::NamedTempFile;

use super::{super::Whence, *};
use crate::image::{ImageWriter, proto};

/// An image of a snapshot that holds nothing else.
pub(super) fn inventory() -> Vec<u8> {
    let name = Kind::Inventory.file_name(0);
    let mut image = ImageWriter::new(Path::new(&name), Vec::new(), Kind::Inventory).unwrap();
    image.message(&proto::InventoryEntry { img_version: 2, ..Default::default() }).unwrap();
    image.into_output()
}

fn header(kind: EntryType, size: u64) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_size(size);
    header.set_mode(0o600);
    header
}

/// Adds a member whose name is written as it is, whatever it is.
fn add(tar: &mut Builder<Vec<u8>>, kind: EntryType, name: &str, link: &str, bytes: &[u8]) {
    let mut header = header(kind, bytes.len() as u64);
    header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
    header.as_old_mut().linkname[..link.len()].copy_from_slice(link.as_bytes());
    header.set_cksum();
    tar.append(&header, bytes).unwrap();
}

fn file(tar: &mut Builder<Vec<u8>>, name: &str, bytes: &[u8]) {
    add(tar, EntryType::Regular, name, "", bytes);
}

fn archive(members: impl FnOnce(&mut Builder<Vec<u8>>)) -> Vec<u8> {
    let mut tar = Builder::new(Vec::new());
    members(&mut tar);
    tar.into_inner().unwrap()
}

fn found(bytes: &[u8]) -> Result<Vec<Store>, String> {
    let mut path = NamedTempFile::new().unwrap();
    path.write_all(bytes).unwrap();
    // The archive stays open.
    let archived = find(path.path(), &Opening::default());
    archived.map(|archived| archived.snapshots).map_err(|error| error.to_string())
}

fn problem(members: impl FnOnce(&mut Builder<Vec<u8>>)) -> String {
    found(&archive(members)).unwrap_err()
}

fn read(store: &Store, name: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    store.open(name).unwrap().bytes.read_to_end(&mut bytes).unwrap();
    bytes
}

#[test]
fn members_are_read_where_they_are() {
    let long = format!("{}/checkpoint", "long".repeat(40));
    let bytes = archive(|tar| {
        file(tar, "config.dump", b"{}");
        add(tar, EntryType::Directory, "./checkpoint/", "", b"");
        file(tar, "./checkpoint/inventory.img", &inventory());
        file(tar, "checkpoint/pages-1.img", b"pages");
        let mut header = header(EntryType::Regular, 6);
        tar.append_data(&mut header, format!("{long}/pages-2.img"), &b"behind"[..]).unwrap();
        file(tar, "pre-checkpoint/inventory.img", &inventory());
        add(tar, EntryType::Symlink, "checkpoint/parent", "../pre-checkpoint", b"");
        file(tar, "left/core-1.img", b"");
    });
    let mut path = NamedTempFile::new().unwrap();
    path.write_all(&bytes).unwrap();
    let found = find(path.path(), &Opening::default()).unwrap();
    let path = path.path();
    let names: Vec<_> = found.snapshots.iter().map(|store| store.name().to_owned()).collect();
    assert_eq!(names, [path.join("checkpoint"), path.join("pre-checkpoint")]);
    assert_eq!(found.unfinished, [path.join("left")]);
    let store = &found.snapshots[0];
    assert_eq!(read(store, "pages-1.img"), b"pages");
    assert_eq!(store.stat("pages-1.img").unwrap().len, 5);
    assert_eq!(store.parent().unwrap().unwrap().name(), path.join("pre-checkpoint"));
    assert!(found.snapshots[1].parent().unwrap().is_none());
    let gone = store.open("pages-7.img").unwrap_err();
    assert_eq!(gone.kind(), io::ErrorKind::NotFound);
    let pages = store.open_at_random("pages-1.img").unwrap();
    assert!(pages.file().is_none() && pages.within().is_some());
    let (mut head, mut tail) = ([0; 2], [7; 8]);
    let mut buffers = [IoSliceMut::new(&mut head), IoSliceMut::new(&mut tail)];
    assert_eq!(pages.read_vectored_at(&mut buffers, 1).unwrap(), 4);
    assert_eq!((&head, &tail), (b"ag", b"es\x07\x07\x07\x07\x07\x07"));
    assert_eq!(pages.read_vectored_at(&mut [IoSliceMut::new(&mut tail)], 5).unwrap(), 0);
}

#[test]
fn directories_that_names_imply_are_bounded() {
    // Each of these names is of 4 KiB, and implies 2,000 directories.
    let deep = |number: usize| format!("{number}{}/x", "/d".repeat(2000));
    let bomb = problem(|tar| {
        for number in 0..20 {
            let mut header = header(EntryType::Regular, 0);
            tar.append_data(&mut header, deep(number), &b""[..]).unwrap();
        }
    });
    assert!(bomb.starts_with("the archive has more than 67108864 bytes in paths"), "{bomb}");
}

#[test]
fn what_no_checkpoint_has_is_an_error() {
    let named = |name: &'static str| problem(|tar| file(tar, name, b""));
    assert!(named("../x").ends_with("member \"../x\" at offset 0x0: its name has \"..\" in it"));
    assert!(named("a/../../x").contains("\"..\""));
    assert!(named("/etc/passwd").ends_with("its name is absolute"));
    assert!(named("").ends_with("it has no name"));
    let twice = problem(|tar| {
        file(tar, "a/core-1.img", b"1");
        file(tar, "./a//core-1.img", b"2");
    });
    assert!(twice.starts_with("the archive holds \"./a//core-1.img\" more than once"), "{twice}");
    let below = problem(|tar| {
        file(tar, "a", b"");
        file(tar, "a/b", b"");
    });
    assert!(below.starts_with("the archive holds \"a\" more than once"), "{below}");
    let above = problem(|tar| {
        file(tar, "a/b", b"");
        file(tar, "a", b"");
    });
    assert!(above.starts_with("the archive holds \"a\" more than once"), "{above}");
    for (kind, words) in [
        (EntryType::Link, "is a hard link"),
        (EntryType::Char, "is a device"),
        (EntryType::Block, "is a device"),
        (EntryType::Fifo, "is a FIFO"),
        (EntryType::new(b'M'), "is of a type that is not read"),
    ] {
        let problem = problem(|tar| add(tar, kind, "x", "y", b""));
        assert!(problem.contains(words), "{problem}");
    }
    let link = |name: &'static str, target: &'static str| {
        found(&archive(|tar| {
            file(tar, "1/inventory.img", &inventory());
            add(tar, EntryType::Symlink, name, target, b"");
        }))
    };
    assert!(link("1/pages-1.img", "core-1.img").unwrap_err().contains("is a symbolic link, and"));
    assert!(link("1/x", "../../x").unwrap_err().contains("leads out of the archive"));
    assert!(link("1/x", "/etc").unwrap_err().contains("leads out of the archive, to \"/etc\""));
    assert_eq!(link("latest", "1").unwrap().len(), 1);
    // It may lead to another archive, by name.
    for target in ["../../2", "/2", "../2"] {
        let store = &link("1/parent", target).unwrap()[0];
        let broken = store.parent().unwrap_err();
        assert_eq!(broken.target, Path::new(target));
        assert!(broken.problem.contains("--previous"));
    }
}

#[test]
fn an_archive_that_is_cut_short_is_an_error_wherever_that_is() {
    let whole = archive(|tar| {
        file(tar, "1/inventory.img", &inventory());
        file(tar, "1/pages-1.img", &[1; 700]);
    });
    assert_eq!(found(&whole).unwrap().len(), 1);
    assert!(found(b"").unwrap_err().starts_with("it is empty; expected a directory"));
    assert!(found(&whole[..BLOCK_LEN - 1]).unwrap_err().starts_with("it is of another kind"));
    // One of the two blocks at the end suffices.
    for len in BLOCK_LEN..whole.len() - BLOCK_LEN {
        let problem = found(&whole[..len]).unwrap_err();
        assert!(problem.contains("cut short"), "{len}: {problem}");
    }
    for (at, byte) in [(0, b'x'), (148, b'9'), (600, b'\xff')] {
        let mut damaged = whole.clone();
        damaged[at] = byte;
        let damaged = found(&damaged);
        assert!(at > BLOCK_LEN || damaged.unwrap_err().starts_with("it is of another"));
    }
}

const BLOCK_LEN: usize = 512;

/// Makes a sparse member as GNU tar does, with the map `map`.
fn sparse(map: &[(u64, u64)], len: u64, bytes: &[u8]) -> Vec<u8> {
    let mut header = header(EntryType::GNUSparse, bytes.len() as u64);
    header.set_path("1/pages-1.img").unwrap();
    let gnu = header.as_gnu_mut().unwrap();
    gnu.set_real_size(len);
    let (own, more) = map.split_at(map.len().min(4));
    for ((start, len), entry) in own.iter().zip(&mut gnu.sparse) {
        entry.set_offset(*start);
        entry.set_length(*len);
    }
    gnu.set_is_extended(!more.is_empty());
    header.set_cksum();
    let mut member = header.as_bytes().to_vec();
    let mut chunks = more.chunks(21).peekable();
    while let Some(chunk) = chunks.next() {
        let mut block = tar::GnuExtSparseHeader::new();
        for ((start, len), entry) in chunk.iter().zip(block.sparse_mut()) {
            entry.set_offset(*start);
            entry.set_length(*len);
        }
        block.set_is_extended(chunks.peek().is_some());
        member.extend(block.as_bytes());
    }
    member.extend(bytes);
    member.resize(member.len().next_multiple_of(BLOCK_LEN), 0);
    member.extend(archive(|tar| file(tar, "1/inventory.img", &inventory())));
    member
}

#[test]
fn maps_of_sparse_members_that_lie_are_errors() {
    let problem = |map: &[(u64, u64)], len| found(&sparse(map, len, &[1; 20])).unwrap_err();
    assert!(problem(&[(0, 30)], 40).contains("its map names more or fewer bytes"));
    assert!(problem(&[(0, 10)], 40).contains("its map names more or fewer bytes"));
    assert!(problem(&[(10, 10), (5, 10)], 40).contains("its data is not in order"));
    assert!(problem(&[(30, 20)], 40).contains("data lies behind its end"));
    assert!(problem(&[(u64::MAX - 5, 20)], u64::MAX).contains("data lies behind its end"));
    assert!(problem(&[(0, 20)], u64::MAX).contains("longer than files can be"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_sparse_member_reads_as_the_file_was(
        pieces in prop::collection::vec((0..40_u64, 1..40_u64), 0..40),
        tail in 0..30_u64,
        reads in prop::collection::vec((0..2000_u64, 1..90_usize, 1..50_usize), 1..20),
    ) {
        let (mut map, mut bytes, mut expected) = (Vec::new(), Vec::new(), Vec::new());
        for (number, (gap, len)) in (1..).zip(&pieces) {
            expected.resize(expected.len() + usize::try_from(*gap).unwrap(), 0);
            map.push((expected.len() as u64, *len));
            bytes.resize(bytes.len() + usize::try_from(*len).unwrap(), number);
            expected.resize(expected.len() + usize::try_from(*len).unwrap(), number);
        }
        expected.resize(expected.len() + usize::try_from(tail).unwrap(), 0);
        let store = &found(&sparse(&map, expected.len() as u64, &bytes)).unwrap()[0];
        prop_assert_eq!(read(store, "pages-1.img"), &expected[..]);
        let file = store.open_at_random("pages-1.img").unwrap();
        for (offset, first, second) in reads {
            let (mut a, mut b) = (vec![9; first], vec![9; second]);
            let mut buffers = [IoSliceMut::new(&mut a), IoSliceMut::new(&mut b)];
            let count = file.read_vectored_at(&mut buffers, offset).unwrap();
            let at = usize::try_from(offset).unwrap().min(expected.len());
            let got = [a, b].concat();
            prop_assert_eq!(&got[..count], &expected[at..at + count]);
            prop_assert!(count > 0 || at == expected.len());
            prop_assert!(got[count..].iter().all(|byte| *byte == 9));
            let data = file.seek(offset, Whence::Data).unwrap();
            let next = (at..expected.len()).find(|at| expected[*at] != 0);
            prop_assert_eq!(data, next.map(|next| next as u64));
            let hole = file.seek(offset, Whence::Hole).unwrap().unwrap();
            if at < expected.len() {
                let next = (at..expected.len()).find(|at| expected[*at] == 0);
                prop_assert_eq!(hole, next.unwrap_or(expected.len()) as u64);
            }
        }
    }

    #[test]
    fn an_archive_of_any_bytes_is_an_error_or_is_read(
        changes in prop::collection::vec((0..6000_usize, any::<u8>()), 0..12),
        mend in any::<bool>(),
        cut in 0..7000_usize,
    ) {
        let map: Vec<_> = (0..30).map(|number| (number * 40, 20)).collect();
        let mut bytes = sparse(&map, 1200, &[5; 600]);
        bytes.extend(archive(|tar| {
            add(tar, EntryType::XHeader, "pax", "", b"15 size=00000 \n");
            file(tar, "1/core-1.img", &[3; 600]);
            add(tar, EntryType::Symlink, "1/parent", "../1", b"");
        }));
        damage(&mut bytes, &changes, mend);
        bytes.truncate(cut);
        let Ok(stores) = found(&bytes) else { return Ok(()) };
        for store in stores {
            let _ = store.parent();
            for name in store.list().unwrap() {
                let stat = store.stat(&name).unwrap();
                let Ok(file) = store.open_at_random(&name) else { continue };
                prop_assert!(stat.allocated <= bytes.len() as u64);
                let mut buffer = vec![0; 4096];
                let _ = file.read_vectored_at(&mut [IoSliceMut::new(&mut buffer)], stat.len / 2);
                let _ = file.seek(stat.len / 2, Whence::Data);
                let _ = file.seek(stat.len / 2, Whence::Hole);
            }
        }
    }

    #[test]
    fn a_file_system_of_any_bytes_is_an_error_or_is_read(
        changes in prop::collection::vec((0..6000_usize, any::<u8>()), 0..12),
        mend in any::<bool>(),
    ) {
        let mut bytes = archive(|tar| {
            add(tar, EntryType::Directory, "./", "", b"");
            let records = b"26 SCHILY.xattr.user.a=1\n\n12 mtime=-1\n13 uid=70000\n";
            add(tar, EntryType::XHeader, "pax", "", records);
            file(tar, "./dir/file", b"hello");
            add(tar, EntryType::Link, "./hard", "./dir/file", b"");
            add(tar, EntryType::Symlink, "./link", "/anywhere", b"");
            add(tar, EntryType::Fifo, "./fifo", "", b"");
            add(tar, EntryType::Char, "./null", "", b"");
        });
        damage(&mut bytes, &changes, mend);
        let mut path = NamedTempFile::new().unwrap();
        path.write_all(&bytes).unwrap();
        let Ok(members) = Members::read(path.as_file(), Rules::FileSystem) else {
            prop_assert!(!changes.is_empty());
            return Ok(());
        };
        // Each node has an inode, which knows how many names it has.
        let mut names = std::collections::HashMap::<&str, u32>::new();
        for (folder, entries) in members.folders() {
            for (name, node) in entries {
                let path = format!("{folder}/{name}");
                let inode = members.inode(path.trim_start_matches('/'));
                prop_assert!(inode.is_some() || matches!(node, Node::Folder), "{path}");
                if let Some(inode) = inode {
                    *names.entry(&inode.name).or_default() += 1;
                    prop_assert!(inode.links >= names[&*inode.name]);
                }
            }
        }
    }
}

/// Changes bytes; with `mend`, corrects the checksum of each header, so that more is looked at
/// than that.
fn damage(bytes: &mut [u8], changes: &[(usize, u8)], mend: bool) {
    for (at, byte) in changes {
        let at = at % bytes.len();
        bytes[at] = *byte;
        if mend {
            let start = at / BLOCK_LEN * BLOCK_LEN;
            let block = bytes[start..].first_chunk_mut::<BLOCK_LEN>().unwrap();
            let mut header = Header::new_old();
            header.as_mut_bytes().copy_from_slice(block);
            header.set_cksum();
            block.copy_from_slice(header.as_bytes());
        }
    }
}

#[test]
fn gnu_tar_and_this_agree_on_formats() {
    let dir = tempfile::tempdir().unwrap();
    let images = dir.path().join("1");
    fs::create_dir(&images).unwrap();
    fs::write(images.join("inventory.img"), inventory()).unwrap();
    let pages = fs::File::create(images.join("pages-1.img")).unwrap();
    pages.set_len(1 << 20).unwrap();
    for page in (0..=255).step_by(3) {
        std::os::unix::fs::FileExt::write_all_at(&pages, &[page; 4096], u64::from(page) << 12)
            .unwrap();
    }
    let expected = fs::read(images.join("pages-1.img")).unwrap();
    for format in ["gnu", "posix", "ustar", "oldgnu", "v7"] {
        for sparse in [true, false] {
            let tar = dir.path().join("a.tar");
            let mut command = std::process::Command::new("tar");
            command
                .arg("-C")
                .arg(dir.path())
                .arg("-cf")
                .arg(&tar)
                .arg(format!("--format={format}"));
            command.args(sparse.then_some("-S")).arg("1");
            if !command.output().unwrap().status.success() {
                assert!(sparse && ["ustar", "v7"].contains(&format), "{format}");
                continue;
            }
            let store = &find(&tar, &Opening::default()).unwrap().snapshots[0];
            assert_eq!(read(store, "pages-1.img"), expected, "{format} {sparse}");
            let is_dense = store.stat("pages-1.img").unwrap().is_dense();
            assert_eq!(is_dense, !sparse || ["ustar", "v7"].contains(&format));
        }
    }
}
