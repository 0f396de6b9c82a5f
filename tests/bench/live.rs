//! What a dump without a pause costs a server under load: redis, whose client does nothing but write.
//! For `dump -R` and `dump -R --live` in turn: how long the tree is stopped, the longest time that the client
//! waits for an answer, and the client's rate during the dump in relation to that before it.
//!
//! `LIVE_MIB` is the size of the server's memory (1024 unless given); `LIVE_DIR` is the directory for images
//! (`/dev/shm`). The goals are a stop of at most 100 ms and half of the usual rate.
#![expect(clippy::cast_precision_loss, reason = "ratios for people")]

#[path = "../common/mod.rs"]
mod common;

use std::{
    env, fs,
    io::{Read, Write},
    net::{Ipv4Addr, TcpStream},
    path::Path,
    process::Command,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use common::{
    live::{Live, directory, engine, wait_for},
    net::port,
};

/// Times that each kind of dump is made.
const RUNS: usize = 3;

/// How long the usual rate is measured.
const USUAL: Duration = Duration::from_secs(2);

/// Bytes of a value.
const VALUE_BYTES: usize = 1000;

/// Bytes that redis needs for each value.
const ENTRY_BYTES: usize = 1150;

/// Commands that the client sends before it waits for their answers.
const BATCH: usize = 8;

const ANSWER: &[u8] = b"+OK\r\n";

/// What the client has seen since it was last asked.
#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    answers: u64,
    longest: Duration,
}

/// Writes values of random keys, until `end`.
fn load(port: u16, keys: usize, seen: &Mutex<Seen>, end: &AtomicBool) {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
    stream.set_nodelay(true).unwrap();
    let value = "v".repeat(VALUE_BYTES);
    let mut random = 1_u64;
    while !end.load(Ordering::Relaxed) {
        let mut commands = Vec::new();
        for _ in 0..BATCH {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let key = usize::try_from(random >> 33).unwrap() % keys;
            write!(commands, "SET key:{key} {value}\r\n").unwrap();
        }
        let begin = Instant::now();
        stream.write_all(&commands).unwrap();
        stream.read_exact(&mut [0; BATCH * ANSWER.len()]).unwrap();
        let mut seen = seen.lock().unwrap();
        seen.answers += BATCH as u64;
        seen.longest = seen.longest.max(begin.elapsed());
    }
}

/// Dumps into a new directory; returns how long the tree was stopped.
fn dump(live: &Live, images: &Path, options: &[&str]) -> Duration {
    let dir = tempfile::tempdir_in(images).unwrap();
    let mut command = Command::new(engine());
    command.args(["dump", "-R", "--tcp-close", "--display-stats"]).args(options);
    command.args(["-t", &live.root.to_string(), "-o", "log", "-D"]).arg(dir.path());
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{options:?}: {text}{errors}");
    let line = text.lines().find(|line| line.starts_with("frozen time")).unwrap();
    let micros = line.split_whitespace().find_map(|word| word.parse().ok()).unwrap();
    Duration::from_micros(micros)
}

fn main() {
    let mib = env::var("LIVE_MIB").ok().and_then(|text| text.parse().ok()).unwrap_or(1024);
    let images = env::var("LIVE_DIR").unwrap_or_else(|_| "/dev/shm".to_owned());
    let (keys, port, dir) = ((mib << 20) / ENTRY_BYTES, port(), directory());
    let (number, path) = (port.to_string(), dir.path().to_str().unwrap().to_owned());
    let arguments =
        ["--port", &number, "--save", "", "--dir", &path, "--enable-debug-command", "yes"];
    let live = Live::program("redis-server", &arguments, dir);
    wait_for("redis", || TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_ok());
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
    write!(stream, "DEBUG POPULATE {keys} key {VALUE_BYTES}\r\n").unwrap();
    stream.read_exact(&mut [0; ANSWER.len()]).unwrap();
    let status = fs::read_to_string(format!("/proc/{}/status", live.root)).unwrap();
    let resident = status.lines().find(|line| line.starts_with("VmRSS")).unwrap();
    println!("redis with {keys} keys; {resident}");
    let (seen, end) = (Arc::new(Mutex::new(Seen::default())), Arc::new(AtomicBool::new(false)));
    let client = {
        let (seen, end) = (Arc::clone(&seen), Arc::clone(&end));
        thread::spawn(move || load(port, keys, &seen, &end))
    };
    let rate = |begin: Instant, seen: Seen| seen.answers as f64 / begin.elapsed().as_secs_f64();
    for _ in 0..RUNS {
        for options in [&[][..], &["--live"]] {
            let begin = Instant::now();
            *seen.lock().unwrap() = Seen::default();
            thread::sleep(USUAL);
            let usual = *seen.lock().unwrap();
            let usual_rate = rate(begin, usual);
            let begin = Instant::now();
            *seen.lock().unwrap() = Seen::default();
            let stopped = dump(&live, Path::new(&images), options);
            let during = *seen.lock().unwrap();
            let ratio = rate(begin, during) / usual_rate;
            println!(
                "dump -R {:<7} {:>7.0} ms, {:>6.1} ms stopped; the client waits at most {:>6.1} ms \
                 (before: {:.1}), and has {:.2} of its rate ({:.0}/s)",
                options.concat(),
                begin.elapsed().as_secs_f64() * 1e3,
                stopped.as_secs_f64() * 1e3,
                during.longest.as_secs_f64() * 1e3,
                usual.longest.as_secs_f64() * 1e3,
                ratio,
                usual_rate,
            );
        }
    }
    end.store(true, Ordering::Relaxed);
    client.join().unwrap();
}
