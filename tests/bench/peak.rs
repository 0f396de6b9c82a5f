//! How much room images on tmpfs and restored memory take together at most, as a ratio
//! to the images alone, and how long the restore takes, with each way to free what is
//! restored.
//!
//! The `criu` that `RCRIU_BENCH_CRIU` names restores the same images beside it.
//! `RCRIU_BENCH_MIB` is how much private, and as much shared, memory there is (512).
//! Whatever else uses shared memory on the machine counts: it is to be idle.

#[path = "../common/mod.rs"]
mod common;

use std::{ffi::OsString, fs, path::Path, process::Command, time::Instant};

use common::{
    Cap,
    live::{Live, bounded, wait_for},
    mounted::Mounted,
    peak::{HOLDER, images_bytes, peak_beyond, shared_without},
    require,
};

/// How a restore sees the images, and what it is told.
struct Way {
    name: &'static str,
    mount: Option<&'static str>,
    options: &'static [&'static str],
}

const fn way(
    name: &'static str,
    mount: Option<&'static str>,
    options: &'static [&'static str],
) -> Way {
    Way { name, mount, options }
}

const OURS: [Way; 6] = [
    way("restore", None, &[]),
    way("restore --auto-dedup", None, &["--auto-dedup"]),
    way("restore --auto-dedup=now", None, &["--auto-dedup=now"]),
    way("restore --auto-dedup=now, mount --punch", Some("--punch"), &["--auto-dedup=now"]),
    way("restore, mount --punch=on-read", Some("--punch=on-read"), &[]),
    way("restore --auto-dedup, mount --punch=commit", Some("--punch=commit"), &["--auto-dedup"]),
];

const PEERS: [Way; 4] = [
    way("restore", None, &[]),
    way("restore --auto-dedup", None, &["--auto-dedup"]),
    way("restore --auto-dedup, mount --punch", Some("--punch"), &["--auto-dedup"]),
    way("restore, mount --punch=on-read", Some("--punch=on-read"), &[]),
];

fn main() {
    require(Cap::Fuse);
    require(Cap::Ptrace);
    let mib = std::env::var("RCRIU_BENCH_MIB").unwrap_or("512".to_owned());
    println!("{mib} MiB of private and {mib} MiB of shared memory; peak of images and memory");
    for way in &OURS {
        measure("rcriu", env!("CARGO_BIN_EXE_rcriu").into(), way, &mib);
    }
    if let Some(criu) = std::env::var_os("RCRIU_BENCH_CRIU") {
        for way in &PEERS {
            measure("criu", criu.clone(), way, &mib);
        }
    }
}

fn measure(name: &str, program: OsString, way: &Way, mib: &str) {
    let dir = tempfile::tempdir_in("/dev/shm").expect("there is a tmpfs");
    let path = dir.path().to_str().expect("our own path").to_owned();
    let mut live = Live::program("/usr/bin/python3", &["-c", HOLDER, mib, mib, &path], dir);
    let says = |live: &Live, word: &str| {
        fs::read_to_string(live.path("status")).is_ok_and(|text| text == word)
    };
    wait_for("the memory", || says(&live, "ready\n"));
    live.images_name = "chain/1";
    live.dump(&[]);
    let chain = live.path("chain");
    let images = images_bytes(&chain);
    let mounted = way.mount.map(|option| Mounted::new(&chain, &live.path("mnt"), &[option]));
    let seen = mounted.as_ref().map_or(live.images(), |mounted| mounted.point.clone());
    let work = live.path("work");
    fs::create_dir(&work).expect("our own directory");
    let base = shared_without(&chain);
    let begin = Instant::now();
    let restore = || run(program, &seen, &work, way.options);
    let ((), peak) = peak_beyond(base, live.root.as_raw(), restore);
    let seconds = begin.elapsed().as_secs_f64();
    fs::write(live.path("status.go"), "").expect("our own file");
    wait_for("the verdict", || says(&live, "ok\n"));
    let ratio = peak as f64 / images as f64;
    println!("{name} {:<42} {ratio:.2} times the images, {seconds:.2} s", way.name);
    drop(mounted);
}

fn run(program: OsString, images: &Path, work: &Path, options: &[&str]) {
    let mut command = Command::new(program);
    command.args(["restore", "-d", "-D"]).arg(images).arg("-W").arg(work);
    command.args(["-o", "restore.log"]).args(options);
    let output = bounded(command, &work.join("messages"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{options:?}: {said}");
}
