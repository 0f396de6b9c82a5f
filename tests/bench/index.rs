//! How fast indexes are built, in pagemap entries per second, and how the time
//! relates to only reading the same pagemaps from the page cache.

use std::{
    error::Error,
    fs,
    os::unix::fs::symlink,
    path::Path,
    time::{Duration, Instant},
};

use rcriu::{
    chain::{Chain, Index},
    image::{
        ImageWriter, Kind, MemoryId, PagemapEntry, PagemapWriter, Presence, proto::InventoryEntry,
    },
    units::PageIndex,
};

const MEMORY: MemoryId = MemoryId::Shared(1);

/// Times that each chain is built; the median counts.
const RUNS: usize = 7;

/// Chains by number of layers and entries in each.
const SHAPES: [(u64, u64); 4] = [(1, 2_000_000), (10, 200_000), (1_000, 2_000), (1_000, 100)];

fn main() -> Result<(), Box<dyn Error>> {
    println!(
        "{:>7} {:>9} {:>9}  {:>12}  {:>9}",
        "layers", "entries", "extents", "entries/s", "x reading"
    );
    for (layers, entries) in SHAPES {
        let root = tempfile::tempdir()?;
        make(root.path(), layers, entries)?;
        let mut builds = Vec::new();
        let mut reads = Vec::new();
        let mut extents = 0;
        for _ in 0..RUNS {
            let start = Instant::now();
            let chain = Chain::open(root.path())?;
            extents = Index::build(&chain, chain.choose(None)?, MEMORY)?.extents().len();
            builds.push(start.elapsed());
            let start = Instant::now();
            read(root.path(), layers)?;
            reads.push(start.elapsed());
        }
        let (build, read) = (median(builds), median(reads));
        let total = layers * entries;
        println!(
            "{layers:>7} {total:>9} {extents:>9}  {:>12.0}  {:>9.1}",
            total as f64 / build.as_secs_f64(),
            build.as_secs_f64() / read.as_secs_f64(),
        );
    }
    Ok(())
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

fn read(root: &Path, layers: u64) -> Result<(), Box<dyn Error>> {
    for layer in 0..layers {
        std::hint::black_box(fs::read(root.join(layer.to_string()).join(MEMORY.pagemap_name()))?);
    }
    Ok(())
}

/// Makes a chain in which every layer but the base has every other page of a
/// stretch of its own, and leaves all others to its parent.
fn make(root: &Path, layers: u64, entries: u64) -> Result<(), Box<dyn Error>> {
    for layer in 0..layers {
        let dir = root.join(layer.to_string());
        fs::create_dir(&dir)?;
        if layer > 0 {
            symlink(format!("../{}", layer - 1), dir.join("parent"))?;
        }
        let mut inventory = ImageWriter::create(&dir.join("inventory.img"), Kind::Inventory)?;
        inventory.message(&InventoryEntry { img_version: 2, ..Default::default() })?;
        inventory.finish()?;
        let image = ImageWriter::create(&dir.join(MEMORY.pagemap_name()), Kind::ShmemPagemap)?;
        let mut pagemap = PagemapWriter::new(image, 1)?;
        let mut entry = |first, pages, presence| {
            let first = PageIndex(first);
            pagemap.entry(&PagemapEntry { first, pages, presence, lazy: false })
        };
        let end = layers * entries;
        let stretch = layer * entries..(layer + 1) * entries;
        if layer == 0 {
            for page in stretch.clone() {
                let presence =
                    if layers > 1 || page % 2 == 0 { Presence::Present } else { Presence::Absent };
                entry(page, 1, presence)?;
            }
            entry(stretch.end, end - stretch.end + 1, Presence::Present)?;
        } else {
            entry(0, stretch.start, Presence::Parent)?;
            for page in stretch.clone() {
                entry(page, 1, if page % 2 == 0 { Presence::Present } else { Presence::Parent })?;
            }
            entry(stretch.end, end - stretch.end + 1, Presence::Parent)?;
        }
        pagemap.into_image().finish()?;
    }
    Ok(())
}
