//! How long the dump and the restore of a container take, as ratios to CRIU in the same run.
//!
//! The container has 30 mounts (ext4 or whatever the directory is on, tmpfs, bind mounts, read-only ones, a
//! sharing group with a slave, and file systems of the kernel), 20 processes, and namespaces of its own: mount,
//! pid, network, IPC and UTS. Its network has a veth to the host, addresses, routes, rules, and packet filters
//! if there is `iptables`. CRIU is the `criu` that `RCRIU_BENCH_CRIU` names, or that in `PATH`; without
//! one, only the times of `rcriu` are printed. The programs take turns, and medians are compared.
//!
//! `RCRIU_BENCH_DIR` is where images go (else `/dev/shm` and the temporary directory), `RCRIU_BENCH_RUNS`
//! how often each program dumps and restores there.

#[path = "../common/mod.rs"]
mod common;
#[path = "programs.rs"]
mod programs;

use std::{
    convert::Infallible,
    ffi::CString,
    fs::{self, File},
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Instant,
};

use common::{Cap, require};
use nix::{
    errno::Errno,
    libc,
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
    sys::{
        prctl::set_child_subreaper,
        signal::{Signal, kill},
        stat::{Mode, SFlag, makedev, mknod},
        wait::waitpid,
    },
    unistd::{
        ForkResult, Pid, chdir, dup2_stderr, dup2_stdin, dup2_stdout, execv, fork, pivot_root,
        setsid,
    },
};
use programs::{Program, Run, Times, await_that, enter_own_run};

const RUNS: usize = 15;

const PROCESSES: usize = 20;
const MOUNTS: usize = 30;
/// Numbers of mounts of one kind.
const FILLED: usize = 6;
const READ_ONLY: usize = 6;

/// The host's end of the veth, and the container's.
const OUTSIDE: &str = "rcriu-bench";
const INSIDE: &str = "eth0";

/// How the container's network is made, after the veth: commands in its namespace.
const NETWORK: &str = "ip link set lo up
    ip addr add 10.177.1.2/24 dev eth0
    ip addr add fd77::2/64 dev eth0 nodad
    ip link set eth0 up
    ip route add default via 10.177.1.1
    ip route add 10.178.0.0/16 via 10.177.1.1
    ip route add blackhole 10.179.0.0/16
    ip rule add from 10.177.1.2 lookup 100
    ! command -v iptables >/dev/null || {
        iptables -A INPUT -p tcp --dport 22 -j ACCEPT
        iptables -t nat -A POSTROUTING -o eth0 -j MASQUERADE
    }";

fn main() {
    let mut arguments = std::env::args_os().skip(1);
    if let (Some("--init"), Some(root)) =
        (arguments.next().and_then(|word| word.into_string().ok()).as_deref(), arguments.next())
    {
        return make_container(Path::new(&root));
    }
    require(Cap::Ptrace);
    for program in ["busybox", "ip", "nsenter"] {
        require(Cap::Program(program));
    }
    enter_own_run();
    set_child_subreaper(true).expect("it needs no privilege");
    let mut places = vec![PathBuf::from("/dev/shm"), std::env::temp_dir()];
    if let Some(place) = std::env::var_os("RCRIU_BENCH_DIR") {
        places = vec![place.into()];
    }
    let runs =
        std::env::var("RCRIU_BENCH_RUNS").map_or(RUNS, |runs| runs.parse().expect("a number"));
    let installed = tempfile::tempdir().unwrap();
    let (ours, peer) = Program::both(installed.path());
    if peer.is_none() {
        println!("no criu in PATH or RCRIU_BENCH_CRIU: there is nothing to compare with");
    }
    for place in &places {
        println!("\nimages in {}", place.display());
        let mut times = [[(); 2]; 2].map(|steps| steps.map(|()| Times::default()));
        for _ in 0..runs {
            for (program, times) in peer.iter().chain([&ours]).rev().zip(&mut times) {
                round(program, place, times);
            }
        }
        let [own, other] = &times;
        for (step, (own, other)) in ["dump", "restore"].iter().zip(own.iter().zip(other)) {
            print!("{step:<8} {:>8.1} ms", own.median() * 1e3);
            match peer {
                Some(_) => println!(
                    "; criu {:>8.1} ms; {:.2} times as fast, target 2",
                    other.median() * 1e3,
                    other.median() / own.median()
                ),
                None => println!(),
            }
        }
    }
}

/// Dumps and restores a container, and looks at it.
fn round(by: &Program, place: &Path, times: &mut [Times; 2]) {
    let dir = tempfile::tempdir_in(place).unwrap();
    let images = dir.path().join("images");
    fs::create_dir(&images).unwrap();
    let root = tempfile::tempdir().unwrap();
    let container = Container::start(root.path());
    let before = container.look();
    let veth = format!("veth[{INSIDE}]:{OUTSIDE}");
    let common = ["--root", root.path().to_str().expect("our own path"), "--external", &veth];
    let pid = container.0.to_string();

    let begin = Instant::now();
    let run = by.run(&[&["dump", "-t", &pid, "-o", "dump.log"], &common[..]].concat(), &images);
    waitpid(container.0, None).expect("it is our child");
    times[0].add(&Run { seconds: begin.elapsed().as_secs_f64(), ..run });
    // Its pid is free.
    std::mem::forget(container);
    await_network_end();

    let pid_file = dir.path().join("pid");
    let pid_file = pid_file.to_str().expect("our own path");
    let restore = ["restore", "-d", "-o", "restore.log", "--pidfile", pid_file];
    times[1].add(&by.run(&[&restore, &common[..]].concat(), &images));
    let pid = fs::read_to_string(pid_file).unwrap().trim().parse().expect("a pid");
    let container = Container(Pid::from_raw(pid));
    assert_eq!(container.look(), before, "after the restore by {}", by.name);
    drop(container);
}

/// The kernel removes a network namespace some time after the last process has left it.
fn await_network_end() {
    await_that(|| !Path::new("/sys/class/net").join(OUTSIDE).exists());
}

/// A container, by its first process.
struct Container(Pid);

impl Drop for Container {
    fn drop(&mut self) {
        kill(self.0, Signal::SIGKILL).expect("it is our child");
        waitpid(self.0, None).expect("it is our child, also if we have adopted it");
        await_network_end();
    }
}

impl Container {
    fn start(root: &Path) -> Self {
        for name in ["bin", "proc", "sys", "dev", "run", "tmp", "data", "old"] {
            fs::create_dir(root.join(name)).unwrap();
        }
        for number in 0..READ_ONLY {
            fs::create_dir(root.join(format!("data{number}"))).unwrap();
        }
        fs::write(root.join("data/file"), "data").unwrap();
        let busybox = ["/bin/busybox", "/usr/bin/busybox"].map(Path::new);
        let busybox = busybox.into_iter().find(|path| path.exists()).expect("it was looked for");
        fs::copy(busybox, root.join("bin/busybox")).unwrap();
        symlink("busybox", root.join("bin/sleep")).unwrap();
        let own = std::env::current_exe().expect("it has a path");
        let made = Command::new(own).arg("--init").arg(root).stdin(Stdio::null()).output().unwrap();
        let text = String::from_utf8(made.stdout).unwrap();
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        let container = Self(Pid::from_raw(text.trim().parse().expect("a pid")));
        await_that(|| {
            let is_ready = |pid: &i32| {
                fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name == "sleep\n")
            };
            let all = container.processes();
            all.len() == PROCESSES && all.iter().all(is_ready)
        });
        let pid = container.0.to_string();
        let veth = ["link", "add", OUTSIDE, "type", "veth", "peer", "name", INSIDE, "netns", &pid];
        run("ip", &veth);
        run("ip", &["address", "add", "10.177.1.1/24", "dev", OUTSIDE]);
        run("ip", &["link", "set", OUTSIDE, "up"]);
        container.inside("sh", &["-e", "-c", NETWORK]);
        container
    }

    /// Runs a program of the host in the container's network.
    fn inside(&self, program: &str, arguments: &[&str]) -> String {
        let pid = self.0.to_string();
        run("nsenter", &[&["-t", &pid, "-n", program], arguments].concat())
    }

    /// Returns its processes.
    fn processes(&self) -> Vec<i32> {
        let path = format!("/proc/{0}/task/{0}/children", self.0);
        let text = fs::read_to_string(path).unwrap_or_default();
        let children = text.split_whitespace().map(|pid| pid.parse().expect("a pid"));
        [self.0.as_raw()].into_iter().chain(children).collect()
    }

    /// Describes what a restore must bring back.
    fn look(&self) -> String {
        let proc = PathBuf::from(format!("/proc/{}", self.0));
        let mounts = fs::read_to_string(proc.join("mountinfo")).unwrap();
        assert_eq!(mounts.lines().count(), MOUNTS, "{mounts}");
        let mut points: Vec<String> = mounts
            .lines()
            .map(|line| line.split(' ').skip(3).take(3).collect::<Vec<_>>().join(" "))
            .collect();
        points.sort_unstable();
        let files: Vec<u64> = (0..FILLED)
            .map(|number| {
                let file = fs::read(proc.join(format!("root/run/filled{number}/file"))).unwrap();
                xxhash_rust::xxh3::xxh3_64(&file)
            })
            .collect();
        // CRIU leaves the host's end of the veth down, forgets tables of routes, and adds chains.
        let script = "ip -br address | sed 's/@[^ ]*//; s/  *[A-Z]*  */ /; s/fe80[^ ]*//'; ip rule; \
                      { ip route; ip -6 route; } | sed '/^fe80/d; s/ linkdown//'; \
                      ! command -v nft >/dev/null || nft list ruleset | grep 'dport\\|masquerade'";
        let network = self.inside("sh", &["-c", script]);
        let mut network: Vec<&str> = network.lines().map(str::trim).collect();
        network.sort_unstable();
        format!("{} {points:#?} {files:x?} {network:#?}", self.processes().len())
    }
}

fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {complaint}");
    String::from_utf8(output.stdout).unwrap()
}

/// Makes a container in `root` and prints the pid of its first process.
#[expect(unsafe_code, reason = "fork")]
fn make_container(root: &Path) {
    let spaces = [CloneFlags::CLONE_NEWNS, CloneFlags::CLONE_NEWPID, CloneFlags::CLONE_NEWNET]
        .into_iter()
        .chain([CloneFlags::CLONE_NEWIPC, CloneFlags::CLONE_NEWUTS]);
    unshare(spaces.collect()).unwrap();
    // SAFETY: this process has one thread.
    match unsafe { fork() }.unwrap() {
        ForkResult::Parent { child } => println!("{child}"),
        ForkResult::Child => match become_init(root) {
            Err(error) => panic!("making the container: {error}"),
        },
    }
}

#[expect(unsafe_code, reason = "fork and close_range")]
fn become_init(root: &Path) -> nix::Result<Infallible> {
    setsid()?;
    let cloexec = libc::CLOSE_RANGE_CLOEXEC.cast_signed();
    // SAFETY: the call takes numbers, and closes nothing before the exec.
    Errno::result(unsafe { libc::close_range(3, libc::c_uint::MAX, cloexec) })?;
    fs::write("/proc/sys/kernel/hostname", "bench").expect("it is our namespace");
    mount_all(root)?;
    chdir(root)?;
    pivot_root(".", "old")?;
    umount2("old", MntFlags::MNT_DETACH)?;
    mknod("/dev/null", SFlag::S_IFCHR, Mode::from_bits_truncate(0o666), makedev(1, 3))?;
    let null = File::options().read(true).write(true).open("/dev/null").expect("it is there");
    dup2_stdin(&null)?;
    dup2_stdout(&null)?;
    dup2_stderr(&null)?;
    drop(null);
    let words = ["sleep", "1000"].map(|word| CString::new(word).expect("without zero bytes"));
    for _ in 1..PROCESSES {
        // SAFETY: this process has one thread.
        if let ForkResult::Child = unsafe { fork() }? {
            setsid()?;
            return execv(c"/bin/sleep", &words);
        }
    }
    execv(c"/bin/sleep", &words)
}

/// Makes the mounts of the container, except `/`, at their places below `root`.
fn mount_all(root: &Path) -> nix::Result<()> {
    const NONE: Option<&str> = None;
    let bind = |from: &str, to: &str| {
        mount(Some(&root.join(from)), &root.join(to), NONE, MsFlags::MS_BIND, NONE)
    };
    let change = |at: &str, flags: MsFlags| mount(NONE, &root.join(at), NONE, flags, NONE);
    let new = |kind: &str, at: &str| {
        if !root.join(at).exists() {
            nix::unistd::mkdir(&root.join(at), Mode::from_bits_truncate(0o755))?;
        }
        let options = (kind == "devpts").then_some("newinstance,ptmxmode=0666");
        mount(Some(kind), &root.join(at), Some(kind), MsFlags::empty(), options)
    };
    let directory = |at: &str| nix::unistd::mkdir(&root.join(at), Mode::from_bits_truncate(0o755));
    mount(NONE, "/", NONE, MsFlags::MS_PRIVATE | MsFlags::MS_REC, NONE)?;
    bind("", "")?;
    for (kind, at) in [("proc", "proc"), ("sysfs", "sys"), ("tmpfs", "dev"), ("devpts", "dev/pts")]
        .into_iter()
        .chain([("tmpfs", "dev/shm"), ("mqueue", "dev/mqueue"), ("tmpfs", "run"), ("tmpfs", "tmp")])
    {
        new(kind, at)?;
    }
    for number in 0..FILLED {
        let (filled, bound) = (format!("run/filled{number}"), format!("run/bound{number}"));
        new("tmpfs", &filled)?;
        let text = format!("{number}").repeat(10_000);
        fs::write(root.join(&filled).join("file"), text).expect("it is a new directory");
        directory(&bound)?;
        bind(&filled, &bound)?;
    }
    for number in 0..READ_ONLY {
        let at = format!("data{number}");
        bind("data", &at)?;
        change(&at, MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY)?;
    }
    new("tmpfs", "run/read-only")?;
    change("run/read-only", MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY)?;
    new("tmpfs", "run/shared")?;
    change("run/shared", MsFlags::MS_SHARED)?;
    directory("run/slave")?;
    bind("run/shared", "run/slave")?;
    change("run/slave", MsFlags::MS_SLAVE)
}
