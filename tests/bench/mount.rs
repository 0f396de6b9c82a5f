//! How fast a mount is read, as ratios to the same reads of the files behind it.
//!
//! All runs of a row are interleaved and their medians compared: the machine's
//! speed changes from one minute to the next, a ratio hardly does.
//!
//! `cargo bench --bench mount -- throughput` or `-- depth` runs one half.

#[path = "../common/mod.rs"]
mod common;

use std::{
    fs::{self, File},
    io::Write,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use common::{
    Cap,
    chain::{Entry, TestChain},
    mounted::{Detach, Mounted, imgfs},
    require,
};
use memmap2::{Mmap, MmapMut};
use rcriu::image::{MemoryId, Presence};

const MIB: usize = 1 << 20;
const TOTAL: usize = 1 << 30;
const PAGES: u64 = (TOTAL >> 12) as u64;

/// Reads of one page at random places.
const RANDOM_READS: u32 = 20_000;

/// Runs of every way of reading; odd, so that there is a median.
const RUNS: usize = 5;

fn main() {
    require(Cap::Fuse);
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    // Cargo adds `--bench`.
    let only = arguments.iter().find(|argument| !argument.starts_with('-'));
    let wanted = |half: &str| only.is_none_or(|only| only == half);
    // A file system on a disk, whose page cache is in large folios, and memory,
    // from which a restore without a disk reads.
    let mut places = vec![std::env::temp_dir(), PathBuf::from("/dev/shm")];
    if let Some(place) = std::env::var_os("IMGFS_BENCH_DIR") {
        places = vec![PathBuf::from(place)];
    }
    for place in places.iter().filter(|place| place.is_dir()) {
        let scratch = tempfile::tempdir_in(place).unwrap();
        println!("\ndata in {}", scratch.path().display());
        if wanted("throughput") {
            throughput(scratch.path());
        }
        if wanted("depth") {
            depth(scratch.path());
        }
    }
}

fn write_random(path: &Path, len: usize) {
    let mut file = File::create(path).unwrap();
    let mut block = vec![0; MIB];
    let mut value = 0x9e37_79b9_7f4a_7c15_u64;
    for _ in 0..len / MIB {
        for chunk in block.chunks_exact_mut(8) {
            value ^= value << 13;
            value ^= value >> 7;
            value ^= value << 17;
            chunk.copy_from_slice(&value.to_le_bytes());
        }
        file.write_all(&block).unwrap();
    }
}

/// Entries that alternate every `step` pages between a layer and its parent.
fn alternating(step: u64, own: bool) -> Vec<Entry> {
    (0..PAGES / step)
        .map(|i| {
            let here = i.is_multiple_of(2) == own;
            (i * step, step, if here { Presence::Present } else { Presence::Parent })
        })
        .filter(|(_, _, presence)| own || *presence == Presence::Present)
        .collect()
}

/// Files that are read one after the other, as one.
struct Files(Vec<(File, usize)>);

impl Files {
    fn open(paths: &[PathBuf]) -> Self {
        let open = |path: &PathBuf| {
            let file = File::open(path).unwrap();
            let len = usize::try_from(file.metadata().unwrap().len()).unwrap();
            (file, len)
        };
        Self(paths.iter().map(open).collect())
    }

    fn read_hot(&self) {
        let mut buffer = MmapMut::map_anon(MIB).unwrap();
        for (file, len) in &self.0 {
            for offset in (0..*len).step_by(MIB) {
                file.read_exact_at(&mut buffer, offset as u64).unwrap();
            }
        }
    }

    fn read_fresh(&self) {
        let mut memory = MmapMut::map_anon(TOTAL).unwrap();
        let mut rest = &mut memory[..];
        for (file, len) in &self.0 {
            for offset in (0..*len).step_by(MIB) {
                let (part, tail) = rest.split_at_mut(MIB);
                file.read_exact_at(part, offset as u64).unwrap();
                rest = tail;
            }
        }
    }

    /// Two threads read the whole at the same time.
    fn read_twice(&self) {
        thread::scope(|scope| {
            scope.spawn(|| self.read_hot());
            self.read_hot();
        });
    }

    #[expect(unsafe_code, reason = "mapping files")]
    fn read_mapped(&self) {
        let mut page = [0; 4096];
        for (file, _) in &self.0 {
            // SAFETY: no program changes the files while the benchmark runs.
            let mapping = unsafe { Mmap::map(file) }.unwrap();
            for bytes in mapping.chunks_exact(page.len()) {
                page.copy_from_slice(bytes);
                std::hint::black_box(&page);
            }
        }
    }

    fn read_random(&self) {
        let mut page = [0; 4096];
        let mut value = 88_172_645_463_325_252_u64;
        for _ in 0..RANDOM_READS {
            value ^= value << 13;
            value ^= value >> 7;
            value ^= value << 17;
            let (file, len) = &self.0[usize::try_from(value >> 60).unwrap() % self.0.len()];
            let offset = (value >> 8) % (*len as u64 / 4096) * 4096;
            file.read_exact_at(&mut page, offset).unwrap();
        }
    }
}

fn time(run: impl FnOnce()) -> Duration {
    let begin = Instant::now();
    run();
    begin.elapsed()
}

fn median(times: &mut [Duration]) -> f64 {
    times.sort_unstable();
    times[times.len() / 2].as_secs_f64()
}

/// Runs both in turn and returns the medians of their times in seconds.
fn compare(base: impl Fn(), mounted: impl Fn()) -> (f64, f64) {
    let (mut base_times, mut mounted_times) = (Vec::new(), Vec::new());
    base();
    mounted();
    for _ in 0..RUNS {
        base_times.push(time(&base));
        mounted_times.push(time(&mounted));
    }
    (median(&mut base_times), median(&mut mounted_times))
}

fn row(name: &str, way: &str, target: f64, (base, mounted): (f64, f64)) {
    println!(
        "{name:<16} {way:<22} {:>6.2} {:>6.2} GiB/s  ratio {:>5.2}  target {target}",
        1.0 / base,
        1.0 / mounted,
        base / mounted
    );
}

fn throughput(scratch: &Path) {
    let mut chain = TestChain::new(&scratch.join("chain"));
    let base = chain.layer("1");
    let tip = chain.layer("2");
    let whole = MemoryId::Private(1);
    chain.pagemap(base, whole, 1, &[(0, PAGES, Presence::Present)]);
    chain.pagemap(tip, whole, 1, &[(0, PAGES, Presence::Parent)]);
    write_random(&chain.pages_path(base, 1), TOTAL);
    File::create(chain.pages_path(tip, 1)).unwrap();
    for (layer, own) in [(base, false), (tip, true)] {
        write_random(&chain.pages_path(layer, 2), TOTAL / 2);
        fs::hard_link(chain.pages_path(layer, 2), chain.pages_path(layer, 3)).unwrap();
        chain.pagemap(layer, MemoryId::Private(2), 2, &alternating(256, own));
        chain.pagemap(layer, MemoryId::Private(3), 3, &alternating(1, own));
    }
    let mounted = Mounted::new(chain.root(), &scratch.join("mnt"), &[]);
    let rows = [
        ("whole file", 1, vec![chain.pages_path(base, 1)], [0.95, 0.95]),
        (
            "1 MiB extents",
            2,
            vec![chain.pages_path(base, 2), chain.pages_path(tip, 2)],
            [0.45, 0.8],
        ),
        (
            "4 KiB extents",
            3,
            vec![chain.pages_path(base, 3), chain.pages_path(tip, 3)],
            [0.35, 0.5],
        ),
    ];
    for (name, id, backing, [hot, fresh]) in rows {
        let backing = Files::open(&backing);
        let file = Files::open(&[mounted.path(&format!("pages-{id}.img"))]);
        row(name, "pread, hot buffer", hot, compare(|| backing.read_hot(), || file.read_hot()));
        row(
            name,
            "pread, fresh memory",
            fresh,
            compare(|| backing.read_fresh(), || file.read_fresh()),
        );
        row(name, "two readers", 0.0, compare(|| backing.read_twice(), || file.read_twice()));
        row(name, "mapped, forward", 0.0, compare(|| backing.read_mapped(), || file.read_mapped()));
        let (direct, through) = compare(|| backing.read_random(), || file.read_random());
        let micros = 1e6 / f64::from(RANDOM_READS);
        println!(
            "{name:<16} {:<22} {:>6.2} {:>6.2} us",
            "random 4 KiB pread",
            direct * micros,
            through * micros
        );
    }
    print_daemon("daemon", &mounted);
}

/// Prints what a daemon takes.
fn print_daemon(name: &str, mounted: &Mounted) {
    let status = fs::read_to_string(format!("/proc/{}/status", mounted.pid())).unwrap();
    let field = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() / 1024
    };
    println!(
        "{name}: {} MiB of its own, {} MiB of page cache mapped, {} descriptors",
        field("RssAnon:"),
        field("RssFile:"),
        fs::read_dir(format!("/proc/{}/fd", mounted.pid())).unwrap().count()
    );
}

const LAYERS: usize = 1000;
const EXTENTS: u64 = 100_000;
const DEEP: MemoryId = MemoryId::Private(1);

/// A chain of a thousand layers with a hundred extents each against one of two
/// layers that have as many extents between them, so that in both no two pages
/// in a row are in one file.
fn depth(scratch: &Path) {
    let mut deep = TestChain::new(&scratch.join("deep"));
    let layers = LAYERS as u64;
    deep.layer("0");
    deep.memory(0, DEEP, 1, &[(0, EXTENTS, Presence::Present)]);
    for layer in 1..layers {
        let number = deep.layer(&layer.to_string());
        let mut entries = Vec::new();
        let mut next = 0;
        for page in (layer..EXTENTS).step_by(LAYERS) {
            entries.push((next, page - next, Presence::Parent));
            entries.push((page, 1, Presence::Present));
            next = page + 1;
        }
        entries.push((next, EXTENTS - next, Presence::Parent));
        entries.retain(|(_, pages, _)| *pages > 0);
        deep.memory(number, DEEP, 1, &entries);
    }
    let mut shallow = TestChain::new(&scratch.join("shallow"));
    shallow.layer("0");
    shallow.memory(0, DEEP, 1, &[(0, EXTENTS, Presence::Present)]);
    shallow.layer("1");
    let entry = |page| (page, 1, if page % 2 == 0 { Presence::Present } else { Presence::Parent });
    shallow.memory(1, DEEP, 1, &(0..EXTENTS).map(entry).collect::<Vec<_>>());

    let point = scratch.join("once");
    fs::create_dir(&point).unwrap();
    let first_byte = |chain: &TestChain| {
        let _detach = Detach(point.clone());
        let arguments = ["mount", chain.root().to_str().unwrap(), point.to_str().unwrap()];
        assert!(imgfs(&arguments).status.success());
        File::open(point.join("pages-1.img")).unwrap().read_exact_at(&mut [0], 0).unwrap();
    };
    let (two, thousand) = compare(|| first_byte(&shallow), || first_byte(&deep));
    println!(
        "1000 layers      mount and first byte   {:>6.1} {:>6.1} ms     times {:>5.2}  target 2",
        two * 1e3,
        thousand * 1e3,
        thousand / two
    );
    let deep = Mounted::new(deep.root(), &scratch.join("mnt-deep"), &[]);
    let shallow = Mounted::new(shallow.root(), &scratch.join("mnt-shallow"), &[]);
    let open = |mounted: &Mounted| Files::open(&[mounted.path("pages-1.img")]);
    let (deep_file, shallow_file) = (open(&deep), open(&shallow));
    let (two, thousand) = compare(|| shallow_file.read_random(), || deep_file.read_random());
    let micros = 1e6 / f64::from(RANDOM_READS);
    println!(
        "1000 layers      random 4 KiB pread     {:>6.2} {:>6.2} us     times {:>5.2}  target 1.2",
        two * micros,
        thousand * micros,
        thousand / two
    );
    print_daemon("daemon of 2 layers", &shallow);
    print_daemon("daemon of 1000 layers", &deep);
}
