//! How long dumps and restores take, as ratios to another program in the same run.
//!
//! The other program is the `criu` that `RCRIU_BENCH_CRIU` names, or the one in `PATH`; without it,
//! dumps are held against `cp` of the same images to the same place. Runs alternate, and
//! medians are compared. Free memory is touched before every run: on a virtual machine
//! the first touch is the host's work and takes longer than the copying.
//!
//! `cargo bench --bench tasks -- small`, `large`, `mount`, or `descriptors`, `connections`,
//! `processes` or `watches` (thousands of these) runs one part.
//! `RCRIU_BENCH_DIR` is where images go (else `/dev/shm` and the temporary directory),
//! `RCRIU_BENCH_MIB` how much memory of each kind the large process has.

#[path = "../common/mod.rs"]
mod common;
#[path = "programs.rs"]
mod programs;
#[path = "scale.rs"]
mod scale;

use std::{
    fs,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use common::{Cap, mounted::Mounted, require};
use nix::{
    sys::{
        prctl::set_child_subreaper,
        signal::{Signal, kill},
        wait::waitpid,
    },
    unistd::Pid,
};
use programs::{Program, Run, Times, await_that, enter_own_run};
use scale::Many;

/// Runs of a small process, and of a large one, by each program.
const SMALL_RUNS: usize = 15;
const LARGE_RUNS: usize = 5;

const MIB: usize = 1 << 20;

/// Memory that is touched beyond that of the process.
const SPARE_MIB: usize = 256;

fn main() {
    let mut arguments = std::env::args().skip(1);
    match (arguments.next().as_deref(), arguments.next()) {
        (Some("--hold"), Some(status)) => return hold(Path::new(&status), mib()),
        (Some("--many"), Some(name)) => {
            let status = arguments.next().expect("a path");
            return Many::by_name(&name).expect("a name").hold(Path::new(&status));
        }
        (Some("--touch"), Some(mib)) => return touch(mib.parse().expect("a number")),
        _ => {}
    }
    require(Cap::Ptrace);
    scale::descriptors();
    enter_own_run();
    set_child_subreaper(true).expect("it needs no privilege");
    let words: Vec<String> = std::env::args().skip(1).collect();
    let only = words.iter().find(|word| !word.starts_with('-'));
    let wanted = |part: &str| only.is_none_or(|only| only == part);
    let mut places = vec![PathBuf::from("/dev/shm"), std::env::temp_dir()];
    if let Some(place) = std::env::var_os("RCRIU_BENCH_DIR") {
        places = vec![place.into()];
    }
    let installed = tempfile::tempdir().unwrap();
    let (ours, peer) = Program::both(installed.path());
    for place in &places {
        println!("\nimages in {}", place.display());
        let bench = Bench { ours: &ours, peer: peer.as_ref(), place };
        if wanted("small") {
            bench.tasks(Load::Sleep);
        }
        if wanted("large") {
            bench.tasks(Load::Memory);
        }
        if wanted("mount") {
            bench.mount();
        }
        for many in Many::ALL.into_iter().filter(|many| wanted(many.name())) {
            bench.tasks(Load::Many(many));
        }
    }
}

fn mib() -> usize {
    std::env::var("RCRIU_BENCH_MIB").map_or(1024, |mib| mib.parse().expect("a number"))
}

/// What a process has.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Load {
    Sleep,
    Memory,
    Many(Many),
}

impl Load {
    /// How often each program dumps and restores it.
    fn runs(self) -> usize {
        match self {
            Self::Sleep => SMALL_RUNS,
            Self::Memory => LARGE_RUNS,
            Self::Many(many) => many.runs(),
        }
    }

    fn name(self) -> String {
        match self {
            Self::Sleep => "small".to_owned(),
            Self::Memory => "large".to_owned(),
            Self::Many(many) => format!("{} {}", many.count(), many.name()),
        }
    }

    /// The least ratio to aim at.
    fn target(self) -> u32 {
        if let Self::Many(_) = self { 1 } else { 2 }
    }

    /// Options that a dump and a restore need.
    fn options(self) -> &'static [&'static str] {
        if let Self::Many(many) = self { many.options() } else { &[] }
    }
}

impl Program {
    /// Dumps and kills a process. The time is that until it is gone, which rcriu waits for
    /// and others leave to the next caller.
    fn dump(&self, target: &Target, images: &Path) -> Run {
        let pid = target.pid.to_string();
        let children = target.children();
        let begin = Instant::now();
        let arguments = [&["dump", "-t", &pid, "-o", "dump.log"], target.load.options()].concat();
        let run = self.run(&arguments, images);
        target.await_end(&children);
        Run { seconds: begin.elapsed().as_secs_f64(), ..run }
    }

    fn restore(&self, target: &Target, images: &Path, work: &Path) -> Run {
        let work = work.to_str().expect("our own path");
        let arguments = ["restore", "-d", "-W", work, "-o", "restore.log"];
        self.run(&[&arguments, target.load.options()].concat(), images)
    }
}

/// A process to be dumped, with its children.
struct Target {
    pid: i32,
    load: Load,
    status: PathBuf,
}

impl Target {
    /// Starts a process in a session of its own.
    #[expect(unsafe_code, reason = "work between fork and exec")]
    #[expect(clippy::zombie_processes, reason = "waited for by its pid")]
    fn start(load: Load, dir: &Path) -> Self {
        let status = dir.join("status");
        let own = || Command::new(std::env::current_exe().expect("it has a path"));
        let mut command = match load {
            Load::Sleep => Command::new("sleep"),
            _ => own(),
        };
        match load {
            Load::Sleep => command.arg("1000"),
            Load::Memory => command.arg("--hold").arg(&status),
            Load::Many(many) => command.arg("--many").arg(many.name()).arg(&status),
        };
        let become_target = || {
            nix::unistd::setsid()?;
            let cloexec = libc::CLOSE_RANGE_CLOEXEC.cast_signed();
            // SAFETY: the call takes numbers, and closes nothing before the exec.
            match unsafe { libc::close_range(3, libc::c_uint::MAX, cloexec) } {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            }
        };
        // SAFETY: it makes two system calls, neither of which takes a lock.
        unsafe { command.pre_exec(become_target) };
        for stream in [Command::stdin, Command::stdout, Command::stderr] {
            stream(&mut command, Stdio::null());
        }
        let child = command.current_dir("/").spawn().expect("sleep is everywhere");
        let target = Self { pid: child.id().cast_signed(), load, status };
        match load {
            Load::Sleep => await_that(|| {
                fs::read_to_string(format!("/proc/{}/comm", target.pid)).unwrap() == "sleep\n"
            }),
            _ => target.await_word("ready"),
        }
        target
    }

    fn await_word(&self, word: &str) {
        await_that(|| fs::read_to_string(&self.status).is_ok_and(|text| text == word));
    }

    /// Lets the process look at its memory, or looks at what it has.
    fn verify(&self) {
        match self.load {
            Load::Sleep => {}
            Load::Memory => {
                fs::write(self.status.with_extension("go"), "").unwrap();
                self.await_word("ok");
                fs::write(&self.status, "ready").unwrap();
            }
            Load::Many(many) => many.verify(self.pid, self.children().len()),
        }
    }

    /// Returns the children of the process.
    fn children(&self) -> Vec<Pid> {
        let path = format!("/proc/{0}/task/{0}/children", self.pid);
        let text = fs::read_to_string(path).unwrap_or_default();
        text.split_whitespace().map(|pid| Pid::from_raw(pid.parse().expect("a pid"))).collect()
    }

    /// Waits until the process has ended, and its children, which are this program's by then.
    fn await_end(&self, children: &[Pid]) {
        for pid in [Pid::from_raw(self.pid)].iter().chain(children) {
            waitpid(*pid, None).expect("it is our child, if adopted");
        }
    }

    fn end(&self) {
        let children = self.children();
        for pid in [Pid::from_raw(self.pid)].iter().chain(&children) {
            kill(*pid, Signal::SIGKILL).unwrap();
        }
        self.await_end(&children);
    }
}

/// What the large process does: it holds memory, and looks at it whenever it is told to.
#[expect(unsafe_code, reason = "mapping memory")]
fn hold(status: &Path, mib: usize) {
    let len = mib * MIB;
    let map = |sharing| {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_ANONYMOUS | sharing;
        // SAFETY: a new mapping at an address that the kernel chooses.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), len, protection, flags, -1, 0) };
        assert_ne!(start, libc::MAP_FAILED);
        // SAFETY: the mapping is new, `len` bytes long, readable and writable, and is
        // never unmapped.
        unsafe { std::slice::from_raw_parts_mut(start.cast::<u64>(), len / size_of::<u64>()) }
    };
    let (private, shared) = (map(libc::MAP_PRIVATE), map(libc::MAP_SHARED));
    let word = |number: u64| (number + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    for memory in [&mut *private, &mut *shared] {
        memory.iter_mut().zip(0..).for_each(|(place, number)| *place = word(number));
    }
    let go = status.with_extension("go");
    let answer = |text: &str| {
        let unfinished = status.with_extension("new");
        fs::write(&unfinished, text).and_then(|()| fs::rename(&unfinished, status)).unwrap();
    };
    answer("ready");
    loop {
        if fs::remove_file(&go).is_ok() {
            let right = |memory: &[u64]| memory.iter().zip(0..).all(|(place, n)| *place == word(n));
            answer(if right(private) && right(shared) { "ok" } else { "wrong" });
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// Touches memory and gives it back.
fn touch(mib: usize) {
    let mut memory = vec![0_u8; mib * MIB];
    memory.iter_mut().step_by(4096).for_each(|byte| *byte = 1);
    std::hint::black_box(&memory);
}

/// Touches memory in another process, whose peak is not counted as ours.
fn touch_free_memory(large: bool) {
    if large {
        let program = std::env::current_exe().expect("it has a path");
        let mib = (2 * mib() + SPARE_MIB).to_string();
        assert!(Command::new(program).args(["--touch", &mib]).status().unwrap().success());
    }
}

struct Bench<'a> {
    ours: &'a Program,
    peer: Option<&'a Program>,
    place: &'a Path,
}

impl Bench<'_> {
    /// Dumps and restores processes by both programs in turn.
    fn tasks(&self, load: Load) {
        let (mut ours, mut theirs) =
            ([Times::default(), Times::default()], [Times::default(), Times::default()]);
        for _ in 0..load.runs() {
            if let Some(peer) = self.peer {
                self.round(peer, load, &mut theirs, None);
            }
            let copy = self.peer.is_none().then_some(&mut theirs[0]);
            self.round(self.ours, load, &mut ours, copy);
        }
        let what = load.name();
        let peer = self.peer.map_or("cp", |peer| peer.name);
        for (step, (ours, theirs)) in ["dump", "restore"].iter().zip(ours.iter().zip(&theirs)) {
            print!(
                "{what} {step:<8} {:>8.1} ms, peak {} MiB",
                ours.median() * 1e3,
                ours.peak_kib >> 10
            );
            if theirs.seconds.is_empty() {
                println!();
                continue;
            }
            let speed = theirs.median() / ours.median();
            println!(
                "; {peer} {:>8.1} ms; {speed:.2} times as fast, target {}",
                theirs.median() * 1e3,
                load.target()
            );
        }
    }

    /// Dumps, restores and verifies a process; `copy` is told how long `cp` takes for
    /// the images.
    fn round(&self, by: &Program, load: Load, times: &mut [Times; 2], copy: Option<&mut Times>) {
        let large = load == Load::Memory;
        let dir = tempfile::tempdir_in(self.place).unwrap();
        let images = dir.path().join("images");
        fs::create_dir(&images).unwrap();
        let target = Target::start(load, dir.path());
        touch_free_memory(large);
        times[0].add(&by.dump(&target, &images));
        if let Some(copy) = copy {
            touch_free_memory(large);
            let begin = Instant::now();
            let status =
                Command::new("cp").arg("-r").arg(&images).arg(dir.path().join("copy")).status();
            assert!(status.unwrap().success());
            copy.add(&Run { seconds: begin.elapsed().as_secs_f64(), peak_kib: 0 });
            fs::remove_dir_all(dir.path().join("copy")).unwrap();
        }
        touch_free_memory(large);
        times[1].add(&by.restore(&target, &images, dir.path()));
        target.verify();
        target.end();
    }

    /// Restores from a mount and from the chain in turn.
    fn mount(&self) {
        require(Cap::Fuse);
        let dir = tempfile::tempdir_in(self.place).unwrap();
        let images = dir.path().join("images");
        let point = dir.path().join("mount");
        fs::create_dir(&images).and_then(|()| fs::create_dir(&point)).unwrap();
        let target = Target::start(Load::Memory, dir.path());
        self.ours.dump(&target, &images);
        let mount = Mounted::new(&images, &point, &[]);
        let (mut direct, mut mounted) = (Times::default(), Times::default());
        for _ in 0..LARGE_RUNS {
            for (from, times) in [(&images, &mut direct), (&point, &mut mounted)] {
                touch_free_memory(true);
                times.add(&self.ours.restore(&target, from, dir.path()));
                target.verify();
                target.end();
            }
        }
        drop(mount);
        println!(
            "restore from the chain {:.1} ms, from its mount {:.1} ms: {:.2} times as long, target 1.15",
            direct.median() * 1e3,
            mounted.median() * 1e3,
            mounted.median() / direct.median()
        );
    }
}
