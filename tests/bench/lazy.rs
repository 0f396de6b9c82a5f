//! Compares restores on demand with full ones: the time until redis answers its first request, until
//! the command returns, and until all memory is there.
//!
//! `cargo bench --bench lazy` prints medians and ratios of both, restored in turn from the same images.
//! `RCRIU_BENCH_KEYS` is the number of keys of 1000 bytes; usually a million.

#[path = "../common/mod.rs"]
mod common;

use std::{
    env, fs,
    io::BufReader,
    net::TcpStream,
    time::{Duration, Instant},
};

use common::{
    Cap,
    live::{Live, wait_for},
    redis::{digest, populated, redis, wait_idle},
    require,
};

/// How often each is restored.
const RUNS: usize = 3;

/// The keys, unless the environment says how many.
const KEYS: usize = 1_000_000;

/// The times of a restore, from its start.
#[derive(Clone, Copy, Debug)]
struct Times {
    returned: Duration,
    answered: Duration,
    complete: Duration,
}

/// One of the times.
type Of = fn(&Times) -> Duration;

fn main() {
    require(Cap::Ptrace);
    require(Cap::Program("redis-server"));
    let keys = env::var("RCRIU_BENCH_KEYS").ok().and_then(|keys| keys.parse().ok());
    let (mut live, port) = populated(keys.unwrap_or(KEYS));
    let before = digest(port);
    wait_idle(&live);
    live.dump(&[]);
    let mut times: [Vec<Times>; 2] = Default::default();
    for _ in 0..RUNS {
        for (options, times) in [&[][..], &["--lazy"]].into_iter().zip(&mut times) {
            times.push(restored(&mut live, port, options));
            assert_eq!(digest(port), before, "{options:?}");
            live.kill();
        }
    }
    let [full, lazy] = times;
    let rows: [(&str, Of); 3] = [
        ("the command has returned", |times| times.returned),
        ("the first answer", |times| times.answered),
        ("all memory is there", |times| times.complete),
    ];
    for (what, of) in rows {
        let (full, lazy) = (median(&full, of), median(&lazy, of));
        println!(
            "{what}: full {:.3} s, lazy {:.3} s, ratio {:.2}",
            full.as_secs_f64(),
            lazy.as_secs_f64(),
            full.as_secs_f64() / lazy.as_secs_f64()
        );
    }
}

fn restored(live: &mut Live, port: u16, options: &[&str]) -> Times {
    let begin = Instant::now();
    live.restore(options);
    let returned = begin.elapsed();
    let stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    let mut client = BufReader::new(stream);
    assert!(redis(&mut client, &["GET", "key:4711"]).starts_with("value:4711"));
    let answered = begin.elapsed();
    if options.is_empty() {
        return Times { returned, answered, complete: returned };
    }
    let log = live.images().join("pager.log");
    wait_for("all memory", || {
        fs::read_to_string(&log).is_ok_and(|log| log.contains("all memory is there"))
    });
    Times { returned, answered, complete: begin.elapsed() }
}

fn median(times: &[Times], of: Of) -> Duration {
    let mut all: Vec<Duration> = times.iter().map(of).collect();
    all.sort_unstable();
    all[all.len() / 2]
}
