//! Makes the chain that the demonstration mounts: three snapshots of a process
//! that keeps a journal in shared memory and rewrites a little of it in between.
//!
//! Beside the chain it writes the journal as it was at each snapshot, the way
//! that the process itself saw it.

use std::{
    env, fs, io,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use rcriu::{
    image::{
        ImageWriter, Kind, MemoryId, PagemapEntry, PagemapWriter, Presence,
        proto::{InventoryEntry, MemfdInodeEntry},
    },
    units::{PAGE_SIZE, PageIndex},
};

/// The journal's number, as the process's memory map would name it.
const JOURNAL: MemoryId = MemoryId::Shared(1024);

/// Pages of the journal.
const PAGES: u64 = 64;

/// The pages that are written before each snapshot.
const WRITTEN: [std::ops::Range<u64>; 3] = [0..48, 10..12, 47..50];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let root = PathBuf::from(env::args_os().nth(1).ok_or("usage: make_chain DIRECTORY")?);
    let page_len = usize::try_from(PAGE_SIZE)?;
    let mut journal = vec![0; usize::try_from(PAGES * PAGE_SIZE)?];
    for (number, written) in (1..).zip(WRITTEN) {
        for page in written.clone() {
            let start = usize::try_from(page)? * page_len;
            journal[start..start + page_len].copy_from_slice(&text(number, page));
        }
        fs::write(root.join(format!("seen-by-the-process-{number}")), &journal)?;
        let dir = root.join("chain").join(number.to_string());
        fs::create_dir_all(&dir)?;
        snapshot(&dir, number, written, &journal)?;
    }
    Ok(())
}

/// A page of the journal as it was written before snapshot `number`.
fn text(number: u32, page: u64) -> Vec<u8> {
    let line = format!("page {page}, written before snapshot {number}\n");
    let mut text = line.into_bytes();
    text.resize(4096, 0);
    text
}

fn snapshot(
    dir: &Path,
    number: u32,
    written: std::ops::Range<u64>,
    journal: &[u8],
) -> Result<(), Box<dyn std::error::Error>> {
    let mut entries = vec![(written.clone(), Presence::Present)];
    if number > 1 {
        symlink(format!("../{}", number - 1), dir.join("parent"))?;
        // What was written earlier and not since is in the parent.
        let known = WRITTEN[..usize::try_from(number)? - 1].iter().map(|range| range.end).max();
        entries.insert(0, (0..written.start, Presence::Parent));
        entries.push((written.end..known.unwrap_or(0), Presence::Parent));
    }
    let path = dir.join(JOURNAL.pagemap_name());
    let mut pagemap = PagemapWriter::new(ImageWriter::create(&path, Kind::ShmemPagemap)?, 1)?;
    for (range, presence) in entries.into_iter().filter(|(range, _)| !range.is_empty()) {
        let pages = range.end - range.start;
        let first = PageIndex(range.start);
        pagemap.entry(&PagemapEntry { first, pages, presence, lazy: false })?;
    }
    pagemap.into_image().finish()?.sync_all()?;
    let bytes = |page: u64| usize::try_from(page * PAGE_SIZE).map_err(io::Error::other);
    let pages = &journal[bytes(written.start)?..bytes(written.end)?];
    fs::write(dir.join(Kind::Pages.file_name(1)), pages)?;
    // How long the journal is, its unwritten end included.
    let mut memfds = ImageWriter::create(&dir.join("memfd.img"), Kind::MemfdInode)?;
    memfds.message(&MemfdInodeEntry {
        name: "journal".into(),
        size: PAGES * PAGE_SIZE,
        shmid: 1024,
        inode_id: 1,
        ..Default::default()
    })?;
    memfds.finish()?;
    let mut inventory = ImageWriter::create(&dir.join("inventory.img"), Kind::Inventory)?;
    inventory.message(&InventoryEntry { img_version: 2, ..Default::default() })?;
    inventory.finish()?;
    Ok(())
}
