//! How much room images and restored memory take together while a restore runs.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

/// A program that holds as many MiB of private memory as its first argument says, and
/// of shared memory as its second, and compares them when the file `go` appears in the
/// directory that is its third.
pub const HOLDER: &str = "
import mmap, os, sys, time, zlib
private, shared, where = int(sys.argv[1]) << 20, int(sys.argv[2]) << 20, sys.argv[3]
held = [bytearray(os.urandom(1 << 20)) for _ in range(private >> 20)]
if shared:
    object = mmap.mmap(-1, shared)
    for at in range(0, shared, 1 << 20):
        object[at:at + (1 << 20)] = os.urandom(1 << 20)
def sums():
    found = [zlib.crc32(part) for part in held]
    return found + ([zlib.crc32(object)] if shared else [])
before = sums()
def say(word):
    with open(where + '/status.new', 'w') as file:
        file.write(word)
    os.rename(where + '/status.new', where + '/status')
say('ready\\n')
while not os.path.exists(where + '/status.go'):
    time.sleep(0.01)
say('ok\\n' if sums() == before else 'changed\\n')
time.sleep(1000)
";

/// Returns the bytes that the pages files in the directories within `chain` take.
pub fn images_bytes(chain: &Path) -> u64 {
    let mut bytes = 0;
    for dir in fs::read_dir(chain).into_iter().flatten().flatten() {
        for file in fs::read_dir(dir.path()).into_iter().flatten().flatten() {
            if file.file_name().to_string_lossy().starts_with("pages-") {
                bytes += file.metadata().map_or(0, |meta| meta.blocks() * 512);
            }
        }
    }
    bytes
}

/// Returns the bytes of anonymous memory that a process has; the kernel counts them as
/// they come, so that this takes no longer the more there are.
fn anonymous_bytes(pid: i32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    let kib = line.and_then(|rest| rest.trim().trim_end_matches(" kB").parse::<u64>().ok());
    kib.unwrap_or(0) << 10
}

/// Returns the bytes of all shared memory and of all files on tmpfs.
fn shared_bytes() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").expect("it is there");
    let line = text.lines().find_map(|line| line.strip_prefix("Shmem:"));
    let kib = line.and_then(|rest| rest.trim().trim_end_matches(" kB").parse::<u64>().ok());
    kib.expect("a number of KiB") << 10
}

/// Does `work`, and returns what it returned with the most bytes that the images in
/// `chain` and the anonymous memory of process `pid` took together meanwhile.
pub fn private_peak<T>(chain: &Path, pid: i32, work: impl FnOnce() -> T) -> (T, u64) {
    sampled(|| images_bytes(chain), || anonymous_bytes(pid), work)
}

/// Does `work`, and returns what it returned with the most bytes that anonymous memory
/// of process `pid`, and all shared memory beyond `base`, took together meanwhile.
/// Images on tmpfs are shared memory; whatever else is done on the machine counts, too.
pub fn peak_beyond<T>(base: u64, pid: i32, work: impl FnOnce() -> T) -> (T, u64) {
    sampled(|| shared_bytes().saturating_sub(base), || anonymous_bytes(pid), work)
}

/// Returns the bytes of shared memory that there are without the images in `chain`.
pub fn shared_without(chain: &Path) -> u64 {
    shared_bytes().saturating_sub(images_bytes(chain))
}

/// Does `work` while another thread looks. What was freed while it looked would make
/// too much of the sum: such a look does not count.
fn sampled<T>(
    images: impl Fn() -> u64 + Sync,
    memory: impl Fn() -> u64 + Sync,
    work: impl FnOnce() -> T,
) -> (T, u64) {
    let look = || {
        let before = images();
        let memory = memory();
        (images() >= before).then_some(before + memory)
    };
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let sampler = scope.spawn(|| {
            let mut peak = 0;
            while !done.load(Ordering::Relaxed) {
                peak = peak.max(look().unwrap_or(0));
                thread::yield_now();
            }
            peak.max(look().unwrap_or(0))
        });
        let result = work();
        done.store(true, Ordering::Relaxed);
        (result, sampler.join().expect("it does not panic"))
    })
}
