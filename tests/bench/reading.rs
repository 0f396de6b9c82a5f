//! Two ways to read the memory of a process, and what each costs the process.
//!
//! `process_vm_readv(2)` pins what it reads: where pages are shared copy-on-write, the
//! kernel copies them first. Reading `/proc/PID/mem` takes references only. Both read 256
//! KiB at a time, as a dump does; the numbers are of one thread. The shared memory is read
//! through its file first, since it is another one afterwards.
//!
//! `cargo bench --bench reading`; `RCRIU_BENCH_MIB` is how much there is to be read.
#![expect(unsafe_code, reason = "fork")]

use std::{
    fs::{self, File},
    hint::black_box,
    io::IoSliceMut,
    os::unix::fs::FileExt,
    time::Instant,
};

use nix::{
    sys::{
        signal::{Signal, kill, raise},
        uio::{RemoteIoVec, process_vm_readv},
        wait::{WaitPidFlag, waitpid},
    },
    unistd::{ForkResult, Pid, fork},
};

const CHUNK: usize = 256 << 10;
const PAGE: usize = 4096;
const ROUNDS: usize = 5;

fn main() {
    let mib = std::env::var("RCRIU_BENCH_MIB").map_or(512, |mib| mib.parse().expect("a number"));
    println!("{mib} MiB in small pages; GiB/s, and the PSS of both processes together");
    for shared in [false, true] {
        measure(mib << 20, shared);
    }
}

fn measure(bytes: usize, shared: bool) {
    let mut memory = memmap2::MmapMut::map_anon(bytes).expect("memory");
    memory.advise(memmap2::Advice::NoHugePage).expect("it is there");
    let mut fill = || memory.chunks_mut(PAGE).for_each(|page| page.fill(7));
    if shared {
        fill();
    }
    // SAFETY: there is one thread.
    let child = match unsafe { fork() }.expect("a child") {
        ForkResult::Child => {
            if !shared {
                fill();
            }
            let _ = raise(Signal::SIGSTOP);
            std::process::exit(0);
        }
        ForkResult::Parent { child } => child,
    };
    waitpid(child, Some(WaitPidFlag::WUNTRACED)).expect("it stops");
    let (start, file) = (memory.as_ptr().addr(), File::open(format!("/proc/{child}/mem")).unwrap());
    let mut buffer = vec![0; CHUNK];
    let by_file = |buffer: &mut [u8], at: usize| file.read_exact_at(buffer, at as u64).unwrap();
    let by_call = |buffer: &mut [u8], at: usize| {
        let remote = [RemoteIoVec { base: at, len: CHUNK }];
        let read = process_vm_readv(child, &mut [IoSliceMut::new(buffer)], &remote);
        assert_eq!(read, Ok(CHUNK));
    };
    let before = pss_mib(child);
    let mut rate = |read: &dyn Fn(&mut [u8], usize)| {
        let mut rounds = [0.0; ROUNDS];
        for round in &mut rounds {
            let begin = Instant::now();
            for at in (start..start + bytes).step_by(CHUNK) {
                read(&mut buffer, at);
                black_box(&buffer);
            }
            *round = bytes as f64 / begin.elapsed().as_secs_f64() / f64::from(1 << 30);
        }
        // The first read is the one that counts: a restorer reads each page once.
        let first = rounds[0];
        rounds.sort_by(f64::total_cmp);
        (first, rounds[ROUNDS / 2], pss_mib(child))
    };
    let (first, median, after) = rate(&by_file);
    let (other_first, other_median, other_after) = rate(&by_call);
    println!("{}:", if shared { "shared with the parent" } else { "its own" });
    println!(
        "  /proc/PID/mem     first {first:5.2}, median {median:5.2}, PSS {before} -> {after} MiB"
    );
    println!(
        "  process_vm_readv  first {other_first:5.2}, median {other_median:5.2}, PSS {after} -> \
         {other_after} MiB"
    );
    println!(
        "  ratio             first {:5.2}, median {:5.2}",
        first / other_first,
        median / other_median
    );
    kill(child, Signal::SIGKILL).expect("it is ours");
    waitpid(child, None).expect("it ends");
}

fn pss_mib(child: Pid) -> u64 {
    let own = std::process::id();
    let of = |pid: String| -> u64 {
        let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).expect("it is there");
        let line = text.lines().find_map(|line| line.strip_prefix("Pss:")).expect("a line");
        line.trim().trim_end_matches(" kB").parse().expect("a number")
    };
    (of(own.to_string()) + of(child.to_string())) >> 10
}
