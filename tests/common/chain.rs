//! Chains that are written by the library and resolved independently of it.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{BufWriter, Write},
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use rcriu::{
    image::{ImageWriter, Kind, MemoryId, PagemapEntry, PagemapWriter, Presence, proto},
    units::{PAGE_SIZE, PageIndex},
};

pub const PAGE: usize = 4096;
const _: () = assert!(PAGE_SIZE == 4096);

/// Pages in a row: the first, how many, and where they are.
pub type Entry = (u64, u64, Presence);

/// A chain under construction, and what was put into it.
#[derive(Debug)]
pub struct TestChain {
    root: PathBuf,
    layers: Vec<Layer>,
}

#[derive(Debug)]
struct Layer {
    name: String,
    parent: Option<usize>,
    memories: BTreeMap<MemoryId, Vec<Entry>>,
}

/// The bytes of a page as they are stored in a layer: recognisable, and
/// different in every page of every layer and memory.
pub fn page_bytes(layer: usize, memory: MemoryId, page: u64) -> [u8; PAGE] {
    let (kind, id) = match memory {
        MemoryId::Private(pid) => (1, pid),
        MemoryId::Shared(id) => (2, id),
    };
    let seed = (layer as u64) << 48 ^ (kind << 40) ^ (id << 24) ^ page;
    let mut value = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = [0; PAGE];
    for chunk in bytes.chunks_exact_mut(8) {
        value ^= value << 13;
        value ^= value >> 7;
        value ^= value << 17;
        chunk.copy_from_slice(&value.to_le_bytes());
    }
    bytes[..8].copy_from_slice(&page.to_le_bytes());
    bytes
}

impl TestChain {
    /// Begins a chain in a directory of its own.
    pub fn new(root: &Path) -> Self {
        fs::create_dir_all(root).unwrap();
        Self { root: root.to_owned(), layers: Vec::new() }
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    pub fn dir(&self, layer: usize) -> PathBuf {
        self.root.join(&self.layers[layer].name)
    }

    /// Adds an image directory whose parent is the one added before.
    pub fn layer(&mut self, name: &str) -> usize {
        let parent = self.layers.len().checked_sub(1);
        let dir = self.root.join(name);
        fs::create_dir(&dir).unwrap();
        if let Some(parent) = parent {
            symlink(format!("../{}", self.layers[parent].name), dir.join("parent")).unwrap();
        }
        let path = dir.join("inventory.img");
        let mut image = ImageWriter::create(&path, Kind::Inventory).unwrap();
        image.message(&proto::InventoryEntry { img_version: 1, ..Default::default() }).unwrap();
        image.finish().unwrap();
        self.layers.push(Layer { name: name.to_owned(), parent, memories: BTreeMap::new() });
        self.layers.len() - 1
    }

    /// Writes a pagemap into a layer, without pages.
    pub fn pagemap(&mut self, layer: usize, memory: MemoryId, pages_id: u32, entries: &[Entry]) {
        let path = self.dir(layer).join(memory.pagemap_name());
        let kind = match memory {
            MemoryId::Private(_) => Kind::Pagemap,
            MemoryId::Shared(_) => Kind::ShmemPagemap,
        };
        let image = ImageWriter::create(&path, kind).unwrap();
        let mut writer = PagemapWriter::new(image, pages_id).unwrap();
        for (first, pages, presence) in entries {
            let first = PageIndex(*first);
            writer
                .entry(&PagemapEntry { first, pages: *pages, presence: *presence, lazy: false })
                .unwrap();
        }
        writer.into_image().finish().unwrap();
        self.layers[layer].memories.insert(memory, entries.to_vec());
    }

    /// Returns the path of a pages file in a layer.
    pub fn pages_path(&self, layer: usize, pages_id: u32) -> PathBuf {
        self.dir(layer).join(Kind::Pages.file_name(pages_id.into()))
    }

    /// Writes a pagemap and its pages into a layer.
    pub fn memory(&mut self, layer: usize, memory: MemoryId, pages_id: u32, entries: &[Entry]) {
        self.pagemap(layer, memory, pages_id, entries);
        let path = self.pages_path(layer, pages_id);
        let mut out = BufWriter::new(File::create(path).unwrap());
        for (first, pages, presence) in entries {
            if *presence == Presence::Present {
                for page in *first..first + pages {
                    out.write_all(&page_bytes(layer, memory, page)).unwrap();
                }
            }
        }
        out.flush().unwrap();
    }

    /// Returns the pages that a layer's memory has, by asking every layer for
    /// every page: the layer that stores it, or none for those in no image.
    pub fn resolve(&self, layer: usize, memory: MemoryId) -> BTreeMap<u64, Option<usize>> {
        let mut pages = BTreeMap::new();
        for (first, count, _) in &self.layers[layer].memories[&memory] {
            for page in *first..first + count {
                let mut at = layer;
                let stored = loop {
                    let entries = &self.layers[at].memories[&memory];
                    let entry = entries.iter().find(|(f, n, _)| (*f..f + n).contains(&page));
                    match entry.expect("the chain accounts for the page").2 {
                        Presence::Present => break Some(at),
                        Presence::Absent => break None,
                        Presence::Parent => at = self.layers[at].parent.unwrap(),
                    }
                };
                pages.insert(page, stored);
            }
        }
        pages
    }

    /// Returns what the flat pages file of a layer's memory must hold.
    pub fn flat_pages(&self, layer: usize, memory: MemoryId) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (page, stored) in self.resolve(layer, memory) {
            if let Some(stored) = stored {
                bytes.extend(page_bytes(stored, memory, page));
            }
        }
        bytes
    }

    /// Returns what the object of a shared memory must look like, in place.
    pub fn in_place(&self, layer: usize, memory: MemoryId) -> Vec<u8> {
        let pages = self.resolve(layer, memory);
        let end = pages.last_key_value().map_or(0, |(page, _)| page + 1);
        let mut bytes = vec![0; usize::try_from(end).unwrap() * PAGE];
        for (page, stored) in pages {
            let from = usize::try_from(page).unwrap() * PAGE;
            let stored = stored.expect("no page of a test's object is absent");
            bytes[from..from + PAGE].copy_from_slice(&page_bytes(stored, memory, page));
        }
        bytes
    }
}
