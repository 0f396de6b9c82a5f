//! What linking two full dumps costs that differ in one per cent of their pages, in
//! relation to what cmp(1) takes to read as much, in turn and with the page cache warm.
//!
//! `RCRIU_BENCH_MIB` is the size of a dump (1024 unless given), and `RCRIU_BENCH_DIR`
//! the directory for both and a copy (else the temporary directory).

#[path = "../common/mod.rs"]
mod common;

use std::{
    env, fs,
    fs::File,
    io::{BufWriter, Write},
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use common::live::engine;
use rcriu::{
    image::{ImageWriter, Kind, MemoryId, PagemapEntry, PagemapWriter, Presence, proto},
    units::PageIndex,
};

/// Times that each is done; the median counts.
const RUNS: usize = 5;

const MEMORY: MemoryId = MemoryId::Private(10);

const PAGES_ID: u32 = 1;

/// One page of so many differs.
const DIFFERS: u64 = 100;

fn pages_name() -> String {
    Kind::Pages.file_name(PAGES_ID.into())
}

/// Writes the pages of a dump; every hundredth depends on `salt`.
fn write_pages(path: &Path, pages: u64, salt: u64) {
    let mut out = BufWriter::with_capacity(1 << 20, File::create(path).unwrap());
    for page in 0..pages {
        let mut state = page << 8 | if page.is_multiple_of(DIFFERS) { salt } else { 0 };
        for _ in 0..512 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            out.write_all(&state.to_le_bytes()).unwrap();
        }
    }
    let file = out.into_inner().unwrap();
    // What is not on disk yet would be waited for.
    file.sync_all().unwrap();
}

/// Writes all of a dump but its pages, which are those of `from`.
fn snapshot(root: &Path, name: &str, pages: u64, from: &Path) -> PathBuf {
    let dir = root.join(name);
    if dir.exists() {
        fs::remove_dir_all(&dir).unwrap();
    }
    fs::create_dir(&dir).unwrap();
    let path = dir.join(Kind::Inventory.file_name(0));
    let mut image = ImageWriter::create(&path, Kind::Inventory).unwrap();
    image.message(&proto::InventoryEntry { img_version: 2, ..Default::default() }).unwrap();
    image.finish().unwrap();
    let image = ImageWriter::create(&dir.join(MEMORY.pagemap_name()), Kind::Pagemap).unwrap();
    let mut pagemap = PagemapWriter::new(image, PAGES_ID).unwrap();
    let first = PageIndex(0x10000);
    pagemap
        .entry(&PagemapEntry { first, pages, presence: Presence::Present, lazy: false })
        .unwrap();
    pagemap.into_image().finish().unwrap();
    fs::hard_link(from, dir.join(pages_name())).unwrap();
    dir
}

fn timed(command: &mut Command) -> Duration {
    let begin = Instant::now();
    let output = command.output().unwrap();
    let took = begin.elapsed();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    took
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

fn main() {
    let mib: u64 = env::var("RCRIU_BENCH_MIB").map_or(1024, |mib| mib.parse().unwrap());
    let above = env::var_os("RCRIU_BENCH_DIR").map_or_else(env::temp_dir, PathBuf::from);
    let root = tempfile::tempdir_in(above).unwrap();
    let pages = mib << 8;
    let file = |name: &str| root.path().join(name);
    write_pages(&file("old"), pages, 0);
    write_pages(&file("new"), pages, 1);
    // cmp(1) ends where two files differ: it reads two that do not.
    fs::copy(file("old"), file("copy")).unwrap();
    File::open(file("copy")).unwrap().sync_all().unwrap();
    let old = snapshot(root.path(), "1", pages, &file("old"));
    let (mut reading, mut linking) = (Vec::new(), Vec::new());
    for _ in 0..RUNS {
        reading.push(timed(Command::new("cmp").args([file("old"), file("copy")])));
        let new = snapshot(root.path(), "2", pages, &file("new"));
        let mut link = Command::new(engine());
        linking.push(timed(link.args(["dedup", "--link"]).args([&old, &new])));
        let left = fs::metadata(new.join(Kind::Pages.file_name(u64::from(PAGES_ID) + 1))).unwrap();
        assert_eq!(left.len(), pages.div_ceil(DIFFERS) * 4096);
    }
    let (reading, linking) = (median(reading), median(linking));
    println!(
        "two dumps of {mib} MiB: cmp {:.0} ms, dedup --link {:.0} ms, ratio {:.2}",
        reading.as_secs_f64() * 1e3,
        linking.as_secs_f64() * 1e3,
        reading.as_secs_f64() / linking.as_secs_f64()
    );
}
