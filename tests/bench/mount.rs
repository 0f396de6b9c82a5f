//! How fast a mount is read, as ratios to the same reads of a plain file of the same size
//! on the same file system.
//!
//! All runs of a row are interleaved and their medians compared: the machine's
//! speed changes from one minute to the next, a ratio hardly does. Processor times are
//! those of the reader and the daemon together.
//!
//! `cargo bench --bench mount -- throughput`, `-- archive` (a tar archive, as a ratio to the same chain
//! in directories), `-- shared` (file systems that share blocks) or `-- depth` runs one part.

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
    loops::LoopMount,
    mounted::{Detach, Mounted, imgfs},
    require,
};
use memmap2::{Mmap, MmapMut};
use nix::{
    fcntl::{PosixFadviseAdvice, posix_fadvise},
    sys::{
        resource::{UsageWho, getrusage},
        time::TimeValLike,
    },
    unistd::{Pid, SysconfVar, sysconf},
};
use rcriu::{
    image::{MemoryId, Presence},
    sys::reflink,
};

const MIB: usize = 1 << 20;
const TOTAL: usize = 1 << 30;
const PAGES: u64 = (TOTAL >> 12) as u64;

/// Reads of one page at random places.
const RANDOM_READS: u32 = 20_000;

/// Size of a file system made for a run.
const DISK_MIB: u64 = 4096;

/// Runs of every way of reading; odd, so that there is a median.
const RUNS: usize = 5;

fn main() {
    require(Cap::Fuse);
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    // Cargo adds `--bench`.
    let only = arguments.iter().find(|argument| !argument.starts_with('-'));
    let wanted = |part: &str| only.is_none_or(|only| only == part);
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
            throughput(scratch.path(), false);
        }
        if wanted("archive") {
            archive(scratch.path());
        }
        if wanted("depth") {
            depth(scratch.path());
        }
    }
    if wanted("shared") {
        for mkfs in ["mkfs.btrfs", "mkfs.xfs"] {
            let disk = LoopMount::new(mkfs, DISK_MIB);
            println!("\ndata on {mkfs}");
            throughput(&disk.path(), true);
            once(&disk.path());
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

    /// A file without a name in `dir` of the blocks of files, `step` pages of each in turn: what
    /// the kernel reads if it reads a composed file without FUSE.
    fn composed(dir: &Path, parts: &[PathBuf], step: u64) -> Self {
        let composed = tempfile::tempfile_in(dir).unwrap();
        let parts: Vec<File> = parts.iter().map(|path| File::open(path).unwrap()).collect();
        let (len, others) = (step * 4096, parts.len() as u64);
        for (turn, part) in (0..PAGES / step).zip(parts.iter().cycle()) {
            let from = turn / others * len;
            reflink::clone_range(part, from, &composed, turn * len, len).unwrap();
        }
        Self(vec![(composed, TOTAL)])
    }

    /// Reads all bytes of several files of one length, a MiB of each in turn.
    ///
    /// How large the folios are that the kernel reads into, and with that the speed of all reads
    /// from memory, depends on how much memory is free in one piece. A file that is read after
    /// another gets smaller ones: on a busy machine up to half of its pages are single, and reads
    /// take twice as long.
    fn read_in_turn(all: &[&Self]) {
        let mut buffer = vec![0; MIB];
        for offset in (0..TOTAL).step_by(MIB) {
            for files in all {
                let (file, _) = &files.0[0];
                file.read_exact_at(&mut buffer, offset as u64).unwrap();
            }
        }
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

/// Seconds that this process and a daemon have had of processors.
fn processor_time(daemon: Pid) -> f64 {
    let own = getrusage(UsageWho::RUSAGE_SELF).unwrap();
    let seconds = |time: nix::sys::time::TimeVal| time.num_microseconds() as f64 / 1e6;
    let ticks = sysconf(SysconfVar::CLK_TCK).unwrap().unwrap() as f64;
    let stat = fs::read_to_string(format!("/proc/{daemon}/stat")).unwrap();
    // The program's name may have spaces in it; the times are fields 14 and 15.
    let fields = stat.rsplit_once(')').unwrap().1.split_whitespace().skip(11).take(2);
    let daemon: f64 = fields.map(|field| field.parse::<f64>().unwrap()).sum();
    seconds(own.user_time()) + seconds(own.system_time()) + daemon / ticks
}

/// Ways to read a file, and what part of a plain file's speed is to be reached.
type Way<'a> = (&'a str, fn(&Files), f64);

/// Prints what a plain file costs, a file that is read through a mount, and, if there is a third,
/// the ratio of a file that is the limit.
fn row(name: &str, (way, read, target): Way, unit: (f64, &str), files: &[&Files], daemon: Pid) {
    let mut times = vec![Vec::new(); files.len()];
    let mut processor = vec![0.0; files.len()];
    files.iter().for_each(|files| read(files));
    for _ in 0..RUNS {
        for (which, file) in files.iter().enumerate() {
            let before = processor_time(daemon);
            times[which].push(time(|| read(file)));
            processor[which] += processor_time(daemon) - before;
        }
    }
    let medians: Vec<f64> = times.iter_mut().map(|times| median(times)).collect();
    let (scale, unit) = unit;
    print!(
        "{name:<16} {way:<22} {:>7.2} {:>7.2} {unit:<5}  ratio {:>5.2}  target {target:<4}  processor {:>5.2}",
        scale * medians[0],
        scale * medians[1],
        medians[0] / medians[1],
        processor[0] / processor[1],
    );
    match medians.get(2) {
        Some(limit) => println!("  composed without FUSE {:>5.2}", medians[0] / limit),
        None => println!(),
    }
}

/// Reads one file after another; with `from_disk`, nothing is in memory before.
fn throughput(scratch: &Path, from_disk: bool) {
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
        for (id, step) in [(2, 256), (3, 1), (4, 16)] {
            if id != 2 {
                fs::hard_link(chain.pages_path(layer, 2), chain.pages_path(layer, id)).unwrap();
            }
            chain.pagemap(layer, MemoryId::Private(id.into()), id, &alternating(step, own));
        }
    }
    if from_disk {
        for layer in [base, tip] {
            forget(&chain.pages_path(layer, 2));
        }
    }
    let mounted = Mounted::new(chain.root(), &scratch.join("mnt"), &[]);
    let plain = Files::open(&[chain.pages_path(base, 1)]);
    for (name, id, step, targets) in [
        ("whole file", 1, PAGES, [0.95, 0.95, 0.95, 0.95]),
        ("1 MiB extents", 2, 256, [0.7, 0.9, 0.7, 0.12]),
        ("64 KiB extents", 4, 16, [0.7, 0.9, 0.7, 0.12]),
        ("4 KiB extents", 3, 1, [0.6, 0.8, 0.7, 0.12]),
    ] {
        if from_disk {
            forget(&chain.pages_path(base, 1));
        }
        let path = mounted.path(&format!("pages-{id}.img"));
        let begin = Instant::now();
        let file = Files::open(&[path]);
        let opened = begin.elapsed();
        let limit = from_disk.then(|| {
            let parts = if id == 1 {
                vec![chain.pages_path(base, 1)]
            } else {
                vec![chain.pages_path(tip, id), chain.pages_path(base, id)]
            };
            Files::composed(scratch, &parts, step)
        });
        let mut files = vec![&plain, &file];
        files.extend(&limit);
        if from_disk {
            Files::read_in_turn(&files);
        }
        // The kernel reads what was composed as it reads a plain file.
        let targets = if from_disk && name != "4 KiB extents" { [0.95; 4] } else { targets };
        let [hot, fresh, forward, random] = targets;
        let per_gib = (1e3, "ms");
        let per_read = (1e6 / f64::from(RANDOM_READS), "us");
        let ways: [(Way, _); 5] = [
            (("pread, hot buffer", Files::read_hot, hot), per_gib),
            (("pread, fresh memory", Files::read_fresh, fresh), per_gib),
            (("two readers", Files::read_twice, hot), per_gib),
            (("mapped, forward", Files::read_mapped, forward), per_gib),
            (("random 4 KiB pread", Files::read_random, random), per_read),
        ];
        for (way, unit) in ways {
            row(name, way, unit, &files, mounted.pid());
        }
        println!("{name:<16} first open             {:>7.2} ms", opened.as_secs_f64() * 1e3);
    }
    print_daemon("daemon", &mounted);
}

/// Reads files of a mounted archive, and the same files of the mounted directories.
fn archive(scratch: &Path) {
    let mut chain = TestChain::new(&scratch.join("packed"));
    let base = chain.layer("1");
    let tip = chain.layer("2");
    chain.pagemap(base, MemoryId::Private(1), 1, &[(0, PAGES, Presence::Present)]);
    chain.pagemap(tip, MemoryId::Private(1), 1, &[(0, PAGES, Presence::Parent)]);
    write_random(&chain.pages_path(base, 1), TOTAL);
    File::create(chain.pages_path(tip, 1)).unwrap();
    for (layer, own) in [(base, false), (tip, true)] {
        for (id, step) in [(2, 256), (3, 1)] {
            write_random(&chain.pages_path(layer, id), TOTAL / 2);
            chain.pagemap(layer, MemoryId::Private(id.into()), id, &alternating(step, own));
        }
    }
    let tar = scratch.join("packed.tar");
    let arguments = ["pack", chain.root().to_str().unwrap(), tar.to_str().unwrap()];
    assert!(imgfs(&arguments).status.success());
    let directories = Mounted::new(chain.root(), &scratch.join("mnt-directories"), &[]);
    let packed = Mounted::new(&tar, &scratch.join("mnt-packed"), &[]);
    println!("each row: of the directories, of a tar archive");
    for (name, id) in [("whole file", 1), ("1 MiB extents", 2), ("4 KiB extents", 3)] {
        let open = |mounted: &Mounted| Files::open(&[mounted.path(&format!("pages-{id}.img"))]);
        let files = [&open(&directories), &open(&packed)];
        let per_gib = (1e3, "ms");
        let per_read = (1e6 / f64::from(RANDOM_READS), "us");
        let ways: [(Way, _); 4] = [
            (("pread, hot buffer", Files::read_hot, 0.95), per_gib),
            (("pread, fresh memory", Files::read_fresh, 0.95), per_gib),
            (("mapped, forward", Files::read_mapped, 0.95), per_gib),
            (("random 4 KiB pread", Files::read_random, 0.95), per_read),
        ];
        for (way, unit) in ways {
            row(name, way, unit, &files, packed.pid());
        }
    }
    drop(packed);
    let (directory, tar) = compare(
        || drop(Mounted::new(chain.root(), &scratch.join("mnt-again"), &[])),
        || drop(Mounted::new(&tar, &scratch.join("mnt-again"), &[])),
    );
    println!("mount            {:>7.2} {:>7.2} ms", directory * 1e3, tar * 1e3);
}

/// Lets the kernel forget the bytes of a file.
fn forget(path: &Path) {
    let file = File::open(path).unwrap();
    file.sync_all().unwrap();
    posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
}

/// Prints how long it takes to read a file once, whose bytes are in memory, as the daemon
/// answers and composed of blocks: these are read from disk.
fn once(scratch: &Path) {
    let read = |how: &str| {
        let mounted = Mounted::new(&scratch.join("chain"), &scratch.join("mnt"), &[how]);
        time(|| Files::open(&[mounted.path("pages-2.img")]).read_hot()).as_secs_f64() * 1e3
    };
    read("--compose=never");
    println!(
        "read once, in memory: {:.0} ms by the daemon, {:.0} ms composed",
        read("--compose=never"),
        read("--compose=always")
    );
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

/// Opens and reads the files of each layer once, as any program must that reads the chain, and
/// makes nothing of them.
fn read_layers(chain: &Path) {
    let mut pages = Vec::with_capacity(LAYERS);
    for layer in 0..LAYERS {
        let dir = chain.join(layer.to_string());
        for name in ["inventory.img", "pagemap-1.img"] {
            fs::read(dir.join(name)).unwrap();
        }
        let _ = fs::read_link(dir.join("parent"));
        // It stays open, for reads of pages.
        pages.push(File::open(dir.join("pages-1.img")).unwrap().metadata().unwrap().len());
    }
    assert_eq!(pages.len(), LAYERS);
}

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
    let (more, _) = compare(|| read_layers(deep.root()), || ());
    println!(
        "1000 layers      mount and first byte   {:>6.1} {:>6.1} ms     times {:>5.2}  target 1.5, at \
         least {:.2} (a loop that opens and reads the files: {:.1} ms)",
        two * 1e3,
        thousand * 1e3,
        thousand / two,
        (two + more) / two,
        more * 1e3
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
