//! What increments cost: time, time in which the program is stopped, and bytes, in
//! relation to a full dump, and to CRIU's if there is one (`CRIU`, or in the search
//! path), of the same process in the same minutes; and what tracking costs a program
//! that writes each page once a second. Beside the ratios stands what they are to be.
//!
//! `INCREMENTS_MIB` is the size of the private and of the shared memory each (1024
//! unless given), or `INCREMENTS_SHARED_MIB` of the latter; `INCREMENTS_DIR` is the
//! directory for images (`/dev/shm`).
#![expect(clippy::cast_precision_loss, reason = "ratios for people")]

#[path = "../common/mod.rs"]
mod common;

use std::{
    env, fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use common::live::{Live, engine, wait_for, workload};

/// Times that each kind of dump is made; the median counts.
const RUNS: usize = 3;

/// One dump.
#[derive(Clone, Copy, Debug)]
struct Cost {
    whole: Duration,
    stopped: Duration,
    bytes: u64,
}

struct Bench {
    live: Live,
    images: tempfile::TempDir,
    step: u32,
    dumps: u32,
}

impl Bench {
    fn start(private: &str, shared: &str, images: &Path) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().to_str().unwrap().to_owned();
        let private = format!("STEPS_PRIVATE_MIB={private}");
        let shared = format!("STEPS_SHARED_MIB={shared}");
        let program = workload().to_str().unwrap();
        let words = [&*private, &*shared, program, "--steps", "big", &*path];
        let live = Live::program("env", &words, dir);
        let images = tempfile::tempdir_in(images).unwrap();
        let mut bench = Self { live, images, step: 0, dumps: 0 };
        bench.await_step();
        bench
    }

    fn await_step(&mut self) {
        self.step += 1;
        let path = self.live.path("at");
        wait_for("a step", || {
            fs::read_to_string(&path).is_ok_and(|at| at == self.step.to_string())
        });
    }

    /// Lets one per cent of the pages change.
    fn change(&mut self) {
        fs::write(self.live.path(&format!("go.{}", self.step)), "").unwrap();
        self.await_step();
    }

    /// Lets every page be written and returns how long it took; then nothing is to
    /// change before the next step.
    fn write_all(&mut self) -> Duration {
        let time = self.live.path("time");
        let _ = fs::remove_file(&time);
        fs::write(self.live.path(&format!("go.{}", self.step)), "").unwrap();
        self.await_step();
        let micros = fs::read_to_string(time).unwrap().parse().unwrap();
        Duration::from_micros(micros)
    }

    fn dir(&mut self) -> PathBuf {
        self.dumps += 1;
        let dir = self.images.path().join(self.dumps.to_string());
        fs::create_dir(&dir).unwrap();
        dir
    }

    fn dump(&mut self, program: &Path, command: &str, options: &[&str]) -> (PathBuf, Cost) {
        let dir = self.dir();
        let mut dump = Command::new(program);
        dump.args([command, "-t", &self.live.root.to_string(), "-D"]).arg(&dir);
        dump.args(["--display-stats", "-o", "log"]).args(options);
        if command == "dump" {
            dump.arg("-R");
        }
        let begin = Instant::now();
        let output = dump.output().unwrap();
        let whole = begin.elapsed();
        let text = String::from_utf8_lossy(&output.stdout);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{program:?} {options:?}: {text}{errors}");
        let stopped = stopped(&text).unwrap_or_default();
        let bytes = fs::read_dir(&dir)
            .unwrap()
            .map(|entry| entry.unwrap().metadata().unwrap())
            .filter(fs::Metadata::is_file)
            .map(|meta| meta.blocks() * 512)
            .sum();
        (dir, Cost { whole, stopped, bytes })
    }
}

/// Reads from the statistics for how long the program was stopped.
fn stopped(text: &str) -> Option<Duration> {
    let line = text.lines().find(|line| line.to_lowercase().starts_with("frozen time"))?;
    let number = line.split_whitespace().find_map(|word| word.parse().ok())?;
    Some(Duration::from_micros(number))
}

fn median(mut costs: Vec<Cost>) -> Cost {
    costs.sort_by_key(|cost| cost.whole);
    costs[costs.len() / 2]
}

fn criu() -> Option<PathBuf> {
    if let Some(path) = env::var_os("CRIU") {
        return Some(path.into());
    }
    let path = env::var_os("PATH")?;
    env::split_paths(&path).map(|dir| dir.join("criu")).find(|path| path.is_file())
}

fn print(what: &str, cost: Cost) {
    println!(
        "{what:<44} {:>9.1} ms {:>9.1} ms stopped {:>9.1} MiB",
        cost.whole.as_secs_f64() * 1e3,
        cost.stopped.as_secs_f64() * 1e3,
        cost.bytes as f64 / f64::from(1 << 20),
    );
}

fn ratio(one: Cost, other: Cost) -> f64 {
    one.whole.as_secs_f64() / other.whole.as_secs_f64()
}

fn main() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("this needs root, to trace processes");
        return;
    }
    let mib = env::var("INCREMENTS_MIB").unwrap_or_else(|_| "1024".to_owned());
    let shared = env::var("INCREMENTS_SHARED_MIB").unwrap_or_else(|_| mib.clone());
    let place = env::var_os("INCREMENTS_DIR").map_or("/dev/shm".into(), PathBuf::from);
    let own = PathBuf::from(engine());
    println!("{mib} MiB private and {shared} MiB shared, 1% changed in between");

    // Pairs of what is compared, one after the other.
    let mut costs: [Vec<Cost>; 5] = Default::default();
    let mut bench = Bench::start(&mib, &shared, &place);
    let untracked_writes = {
        bench.change();
        bench.write_all()
    };
    let criu = criu();
    for _ in 0..RUNS {
        let (base, full) = bench.dump(&own, "dump", &[]);
        bench.change();
        let parent = format!("../{}", base.file_name().unwrap().to_str().unwrap());
        let (changed, cost) = bench.dump(&own, "dump", &["--prev-images-dir", &parent]);
        costs[0].push(full);
        costs[1].push(cost);
        if let Some(criu) = &criu {
            let (dir, cost) = bench.dump(criu, "dump", &[]);
            costs[2].push(cost);
            fs::remove_dir_all(dir).unwrap();
        }
        fs::remove_dir_all(changed).unwrap();
        bench.write_all();
        // The same with a tracker.
        let (tracked, _) = bench.dump(&own, "dump", &["--track-mem"]);
        bench.change();
        let parent = format!("../{}", tracked.file_name().unwrap().to_str().unwrap());
        let options = ["--track-mem", "--prev-images-dir", &parent];
        let (next, cost) = bench.dump(&own, "dump", &options);
        costs[3].push(cost);
        let parent = format!("../{}", next.file_name().unwrap().to_str().unwrap());
        let options = ["--track-mem", "--prev-images-dir", &parent];
        let (same, cost) = bench.dump(&own, "dump", &options);
        costs[4].push(cost);
        bench.write_all();
        for dir in [base, tracked, next, same] {
            fs::remove_dir_all(dir).unwrap();
        }
    }
    // The first writes to each page after the tracking has begun.
    let (_, _) = bench.dump(&own, "pre-dump", &["--track-mem"]);
    bench.change();
    let tracked_writes = bench.write_all();
    let mut medians = costs.map(|costs| (!costs.is_empty()).then(|| median(costs)));
    let peer = medians[2].take();
    let [Some(full), Some(changed), None, Some(tracked), Some(same)] = medians else {
        unreachable!("each kind was dumped")
    };
    print("in full", full);
    print("1% changed, all compared", changed);
    print("1% changed, tracked", tracked);
    print("nothing changed, tracked", same);
    println!();
    if let Some(peer) = peer {
        print("CRIU, in full", peer);
        let bytes = |cost: Cost| cost.bytes as f64 / peer.bytes as f64 * 100.0;
        judge("CRIU's time / that of all compared", ratio(peer, changed), "");
        judge("CRIU's time / that of tracked", ratio(peer, tracked), ">= 8");
        judge("bytes of all compared in % of CRIU's", bytes(changed), "<= 3");
        judge("bytes of tracked in % of CRIU's", bytes(tracked), "<= 3");
    }
    judge("time of all compared / that of tracked", ratio(changed, tracked), ">= 3");
    let total = number(&mib) + number(&shared);
    let stopped = same.stopped.as_secs_f64() * 1e3 * 4096.0 / total;
    judge("nothing changed, tracked: ms stopped for each 4 GiB", stopped, "<= 100");
    let more = tracked_writes.as_secs_f64() - untracked_writes.as_secs_f64();
    judge("us more for the first write to a page", more * 1e6 / (total * 256.0), "");
    judge("% slower, tracked anew and all written each second", more * 100.0, "");
}

fn number(mib: &str) -> f64 {
    mib.parse().expect("a number of MiB")
}

/// Prints a ratio beside what it is to be.
fn judge(what: &str, found: f64, wanted: &str) {
    println!("{what:<52} {found:>8.2} {wanted:>8}");
}
