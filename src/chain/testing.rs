//! Chains for tests: on disk, and as a naive model.

use std::{collections::BTreeMap, fs, os::unix::fs::symlink, path::PathBuf, sync::Arc};

use proptest::prelude::*;
use tempfile::TempDir;

use super::Chain;
use crate::{
    image::{
        ImageWriter, Kind, MemoryId, PagemapEntry, PagemapWriter, Presence, Store, proto,
        store::memory::InMemory,
    },
    units::{PAGE_SIZE, PageIndex},
};

/// The memory of test chains.
pub(crate) const MEMORY: MemoryId = MemoryId::Shared(1024);

/// The pages of random chains.
pub(crate) const PAGES: u64 = 100;

/// A chain in a temporary directory, with layers named 1, 2, ... from the base.
#[derive(Debug)]
pub(crate) struct TestChain {
    pub(crate) root: TempDir,
    layers: usize,
}

impl TestChain {
    pub(crate) fn new() -> Self {
        Self { root: tempfile::tempdir().expect("make a directory"), layers: 0 }
    }

    /// Returns the directory of layer `layer`, counted from 1.
    pub(crate) fn dir(&self, layer: usize) -> PathBuf {
        self.root.path().join(layer.to_string())
    }

    /// Adds a snapshot with one memory, whose bytes come from `page`.
    pub(crate) fn push(&mut self, entries: &[PagemapEntry]) -> usize {
        self.layers += 1;
        let dir = self.dir(self.layers);
        fs::create_dir(&dir).expect("make a directory");
        if self.layers > 1 {
            symlink(format!("../{}", self.layers - 1), dir.join("parent")).expect("link");
        }
        let inventory = dir.join(Kind::Inventory.file_name(0));
        let mut writer = ImageWriter::create(&inventory, Kind::Inventory).expect("create");
        writer
            .message(&proto::InventoryEntry { img_version: 2, ..Default::default() })
            .and_then(|()| writer.finish())
            .expect("write an inventory");
        self.memory(self.layers, MEMORY, 7, entries);
        self.layers
    }

    /// Adds a memory to a snapshot.
    pub(crate) fn memory(
        &self,
        layer: usize,
        memory: MemoryId,
        pages_id: u32,
        entries: &[PagemapEntry],
    ) {
        let dir = self.dir(layer);
        let pagemap = dir.join(memory.pagemap_name());
        let image = ImageWriter::create(&pagemap, Kind::ShmemPagemap).expect("create");
        let mut writer = PagemapWriter::new(image, pages_id).expect("write a pagemap");
        let mut pages = Vec::new();
        for entry in entries {
            writer.entry(entry).expect("write a pagemap");
            if entry.presence == Presence::Present {
                for number in entry.first.0..entry.end().0 {
                    pages.extend(page(layer, number));
                }
            }
        }
        writer.into_image().finish().expect("write a pagemap");
        fs::write(dir.join(Kind::Pages.file_name(pages_id.into())), pages).expect("write pages");
    }

    /// Returns the chain in a store that is not a directory.
    pub(crate) fn in_memory(&self) -> Store {
        let mut tip: Option<Store> = None;
        for layer in 1..=self.layers {
            let mut images = InMemory::new(&format!("memory:{layer}"));
            for entry in fs::read_dir(self.dir(layer)).expect("list").flatten() {
                if entry.file_type().expect("look at").is_file() {
                    let bytes = fs::read(entry.path()).expect("read");
                    images.put(&entry.file_name().to_string_lossy(), &bytes);
                }
            }
            tip = Some(match tip {
                Some(parent) => Arc::new(images.with_parent(parent)),
                None => Arc::new(images),
            });
        }
        tip.expect("a chain has layers")
    }

    pub(crate) fn open(&self) -> Chain {
        Chain::open(self.root.path()).expect("open the chain")
    }
}

/// Returns the bytes of a page in layer `layer`.
pub(crate) fn page(layer: usize, number: u64) -> Vec<u8> {
    let line = format!("layer {layer} page {number}\n");
    line.bytes().cycle().take(usize::try_from(PAGE_SIZE).expect("small")).collect()
}

pub(crate) fn entry(first: u64, pages: u64, presence: Presence) -> PagemapEntry {
    PagemapEntry { first: PageIndex(first), pages, presence, lazy: false }
}

/// The layer that has each page of a snapshot; `None` for a page that is in no image. A
/// page without an entry is zero.
pub(crate) type Model = BTreeMap<u64, Option<usize>>;

/// Random layers of an intact chain, from the base up.
pub(crate) fn layers() -> impl Strategy<Value = Vec<Vec<PagemapEntry>>> {
    let entry = (0..6_u64, 1..12_u64, 0..8_u8);
    let layer = prop::collection::vec(entry, 0..14);
    prop::collection::vec(layer, 1..7).prop_map(|drawn| {
        let mut layers = Vec::new();
        let mut below = Model::new();
        for drawn in drawn {
            let entries = entries(&drawn, &below);
            below = model(layers.len() + 1, &entries, &below);
            layers.push(entries);
        }
        layers
    })
}

/// Turns random values into entries that ask the layer below only for pages that it has.
fn entries(drawn: &[(u64, u64, u8)], below: &Model) -> Vec<PagemapEntry> {
    let mut entries: Vec<PagemapEntry> = Vec::new();
    let mut next = 0;
    for (gap, pages, what) in drawn {
        let first = next + gap;
        next = (first + pages).min(PAGES);
        for page in first..next {
            let presence = match what {
                0..4 if below.contains_key(&page) => Presence::Parent,
                7 => Presence::Absent,
                _ => Presence::Present,
            };
            match entries.last_mut() {
                Some(last) if last.end().0 == page && last.presence == presence => last.pages += 1,
                _ => entries.push(entry(page, 1, presence)),
            }
        }
    }
    entries
}

/// Returns the model after `layer` with these entries was added on top.
pub(crate) fn model(layer: usize, entries: &[PagemapEntry], below: &Model) -> Model {
    let mut model = Model::new();
    for entry in entries {
        for page in entry.first.0..entry.end().0 {
            let what = match entry.presence {
                Presence::Present => Some(layer),
                Presence::Parent => below[&page],
                Presence::Absent => None,
            };
            model.insert(page, what);
        }
    }
    model
}

/// Writes layers to disk, and returns the model of each snapshot.
pub(crate) fn on_disk(layers: &[Vec<PagemapEntry>]) -> (TestChain, Vec<Model>) {
    let mut chain = TestChain::new();
    let mut models = Vec::new();
    for entries in layers {
        let layer = chain.push(entries);
        let below = models.last().cloned().unwrap_or_default();
        models.push(model(layer, entries, &below));
    }
    (chain, models)
}
