//! Tests that every store must pass.

use std::{
    fs,
    io::{self, IoSlice, IoSliceMut},
    os::unix::fs::symlink,
    path::Path,
    sync::{Arc, OnceLock},
};

use super::{
    memory::{InMemory, InMemoryWriter},
    *,
};
use crate::image::{ImageError, Kind, proto};

/// Tests a store that holds an inventory, seven bytes as `pages-1.img`, and a parent.
fn ask(store: &dyn ImageStore) {
    let inventory: proto::InventoryEntry = store.message(Kind::Inventory, 0).unwrap();
    assert_eq!(inventory.img_version, 2);
    assert!(store.has(Kind::Inventory, 0) && !store.has(Kind::Pstree, 0));
    assert_eq!(store.messages_if_any::<proto::PstreeEntry>(Kind::Pstree, 0).unwrap(), None);
    let missing = store.messages::<proto::PstreeEntry>(Kind::Pstree, 0).unwrap_err();
    assert!(missing.is_missing());
    let name = format!("open image {}/pstree.img", store.name().display());
    assert_eq!(missing.to_string(), name);

    let pages = store.open_at_random("pages-1.img").unwrap();
    let (mut head, mut tail) = ([0; 2], [0; 9]);
    let mut read = |offset| {
        let mut buffers = [IoSliceMut::new(&mut head), IoSliceMut::new(&mut tail)];
        pages.read_vectored_at(&mut buffers, offset).unwrap()
    };
    assert_eq!([read(7), read(1 << 40), read(1)], [0, 0, 6]);
    assert_eq!((&head, &tail[..4]), (b"23", b"4567".as_slice()));
    assert_eq!(pages.seek(3, Whence::Data).unwrap(), Some(3));
    assert_eq!(pages.seek(3, Whence::Hole).unwrap(), Some(7));
    assert_eq!(pages.seek(7, Whence::Data).unwrap(), None);
    assert_eq!(pages.stat().unwrap().len, 7);
    assert_eq!(pages.stat().unwrap().identity, store.stat("pages-1.img").unwrap().identity);
    let absent = store.open_at_random("pages-2.img").unwrap_err();
    assert_eq!(absent.kind(), io::ErrorKind::NotFound);
    assert_eq!(store.stat("pages-2.img").unwrap_err().kind(), io::ErrorKind::NotFound);

    let mut names = store.list().unwrap();
    names.retain(|name| name != "parent");
    names.sort_unstable();
    assert_eq!(names, ["inventory.img", "pages-1.img"]);
    assert!(!store.stat_store().unwrap().is_file);
    let parent = store.parent().unwrap().unwrap();
    assert!(parent.has(Kind::Inventory, 0));
    assert!(parent.parent().unwrap().is_none());
}

fn images(name: &str) -> InMemory {
    let mut images = InMemory::new(name);
    let inventory = proto::InventoryEntry { img_version: 2, ..Default::default() };
    images.write(Kind::Inventory, 0, &[inventory]);
    images.put("pages-1.img", b"1234567");
    images
}

#[test]
fn stores_answer_alike() {
    let parent = Arc::new(images("memory:1"));
    ask(&images("memory:2").with_parent(parent));

    let root = tempfile::tempdir().unwrap();
    for name in ["1", "2"] {
        let dir = root.path().join(name);
        fs::create_dir(&dir).unwrap();
        let images = images(name);
        for file in images.list().unwrap() {
            let mut bytes = Vec::new();
            images.open(&file).unwrap().bytes.read_to_end(&mut bytes).unwrap();
            fs::write(dir.join(file), bytes).unwrap();
        }
    }
    symlink("../1", root.path().join("2/parent")).unwrap();
    ask(&Directory::at(root.path().join("2")));
}

#[test]
fn what_is_no_regular_file_is_not_opened() {
    let root = tempfile::tempdir().unwrap();
    fs::create_dir(root.path().join("pages-1.img")).unwrap();
    fs::create_dir(root.path().join("inventory.img")).unwrap();
    let directory = Directory::at(root.path());
    let store: &dyn ImageStore = &directory;
    let error = store.open_at_random("pages-1.img").unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    let error = store.message::<proto::InventoryEntry>(Kind::Inventory, 0).unwrap_err();
    assert!(matches!(error, ImageError::Open { .. }), "{error}");
}

#[test]
fn a_directory_says_what_it_holds() {
    let root = tempfile::tempdir().unwrap();
    for (name, file) in
        [("done", "inventory.img"), ("failed", "core-1.img"), ("other", "inventory.txt")]
    {
        fs::create_dir(root.path().join(name)).unwrap();
        fs::write(root.path().join(name).join(file), "").unwrap();
    }
    symlink("../failed", root.path().join("done/parent")).unwrap();
    let probe = |name: &str| Directory::at(root.path().join(name)).probe();
    assert_eq!(probe("done"), Probe::Snapshot { parent: Some(root.path().join("failed")) });
    assert_eq!(probe("failed"), Probe::Unfinished);
    assert_eq!(probe("other"), Probe::Nothing);
    let broken = Directory::at(root.path().join("done")).parent().unwrap_err();
    assert_eq!(broken.target, Path::new("../failed"));
}

#[test]
fn a_snapshot_is_written_to_any_store() {
    let done = Arc::new(OnceLock::new());
    let dir = tempfile::tempdir().unwrap();
    let inventory = proto::InventoryEntry { img_version: 2, ..Default::default() };
    let in_memory = InMemoryWriter::new("memory:1", &done);
    let writers =
        [SnapshotWriter::to(Box::new(in_memory)), SnapshotWriter::begin(dir.path()).unwrap()];
    for images in writers {
        // Threads write in any order.
        let pages = images.create_raw(Kind::Pages, 1).unwrap();
        pages.write_vectored_at(&[IoSlice::new(b"6"), IoSlice::new(b"7")], 5).unwrap();
        pages.write_vectored_at(&[IoSlice::new(b"12345")], 0).unwrap();
        images.write(Kind::Pstree, 0, &[proto::PstreeEntry::default()]).unwrap();
        let again = images.create(Kind::Pstree, 0).unwrap_err().to_string();
        assert!(again.starts_with("write image ") && again.ends_with("/pstree.img"), "{again}");
        images.sync(|_| {}).unwrap();
        images.commit(&inventory).unwrap();
    }
    let directory = Directory::at(dir.path());
    for store in [done.get().unwrap() as &dyn ImageStore, &directory] {
        assert_eq!(store.messages::<proto::PstreeEntry>(Kind::Pstree, 0).unwrap().len(), 1);
        assert_eq!(store.message::<proto::InventoryEntry>(Kind::Inventory, 0).unwrap(), inventory);
        let mut bytes = Vec::new();
        store.open("pages-1.img").unwrap().bytes.read_to_end(&mut bytes).unwrap();
        assert_eq!(bytes, b"1234567");
    }
}
