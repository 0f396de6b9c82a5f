//! Broken images: whatever is asked of them is answered or an error, nothing panics,
//! hangs, takes memory without end or touches a file outside, and what `imgfs check` finds
//! nothing wrong with is restored.
//!
//! Case N is the same in every run. By hand, `RCRIU_FUZZ_CASES` says how many there are,
//! and `RCRIU_FUZZ_FIRST` which is the first.

mod common;

#[path = "common/mutate.rs"]
mod mutate;

use std::{
    collections::BTreeMap,
    env, fs,
    io::Read,
    os::unix::{fs::symlink, process::CommandExt},
    panic::{self, AssertUnwindSafe},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use common::{
    Cap,
    live::{Live, engine},
    look,
    mounted::{IMGFS, Mounted},
    require,
};
use mutate::{Random, Values, every_kind, mutate};
use nix::sys::resource::{Resource, setrlimit};
use rcriu::{
    chain::{Chain, check},
    dedup::{self, FreeOptions, LinkOptions},
    image::{
        Directory,
        disk::Kernel,
        json::{self, Style},
        tree,
    },
    res::file::is_restored,
};

/// Cases of each sort in a run without further ado.
const CASES: u64 = 2_000;
const RESTORES: u64 = 120;
const MOUNTS: u64 = 12;
const PROGRAMS: u64 = 16;

/// Bytes read of every file, at its beginning and at its end.
const LOOK_BYTES: usize = 16 << 10;

/// The most memory that a case may take, in addresses.
const MEMORY_BYTES: u64 = 8 << 30;

/// The longest that a case may take, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// Where cases are made: in memory, since many sync what they write.
fn scratch() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.unwrap()
}

fn count(usual: u64) -> std::ops::Range<u64> {
    let number = |name: &str| env::var(name).ok().and_then(|value| value.parse::<u64>().ok());
    let first = number("RCRIU_FUZZ_FIRST").unwrap_or(0);
    // The other sorts in proportion.
    let cases = number("RCRIU_FUZZ_CASES").map_or(usual, |cases| (cases * usual).div_ceil(CASES));
    first..first + cases
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(from).unwrap().flatten() {
        let target = to.join(entry.file_name());
        let kind = entry.file_type().unwrap();
        if kind.is_symlink() {
            symlink(fs::read_link(entry.path()).unwrap(), target).unwrap();
        } else if kind.is_dir() {
            copy(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), &target).unwrap();
        }
    }
}

fn files(root: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(root).into_iter().flatten().flatten() {
        let Ok(kind) = entry.file_type() else { continue };
        if kind.is_dir() {
            found.append(&mut files(&entry.path()));
        } else if kind.is_file() {
            found.push(entry.path());
        }
    }
    found.sort();
    found
}

/// Files that nothing may touch, though images name them.
struct Canary(tempfile::TempDir);

impl Canary {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("below")).unwrap();
        for name in ["file", "below/other"] {
            fs::write(dir.path().join(name), name).unwrap();
        }
        Self(dir)
    }

    fn values(&self, root: &Path) -> Values {
        let inside = |name: &str| self.0.path().join(name).to_str().unwrap().as_bytes().to_vec();
        let up = format!("{}/../../{}", root.display(), inside("file").escape_ascii());
        Values { texts: vec![inside("file"), inside("below"), inside("new"), up.into_bytes()] }
    }

    fn assert_untouched(&self, case: u64) {
        let all: Vec<_> = files(self.0.path());
        let names: Vec<_> =
            all.iter().map(|path| path.strip_prefix(self.0.path()).unwrap()).collect();
        assert_eq!(names, [Path::new("below/other"), Path::new("file")], "case {case}");
        for (path, name) in all.iter().zip(names) {
            assert_eq!(fs::read(path).unwrap(), name.to_str().unwrap().as_bytes(), "case {case}");
        }
    }
}

/// Asks everything of the chain at `root` that needs no process.
fn ask(root: &Path, random: &mut Random) {
    for file in files(root) {
        let _ = json::write(&file, Style::Compact, &mut std::io::sink());
    }
    let dirs: Vec<PathBuf> = fs::read_dir(root).unwrap().flatten().map(|e| e.path()).collect();
    for dir in dirs.iter().filter(|dir| dir.is_dir()) {
        let _ = tree::read(&Directory::at(dir), is_restored);
    }
    let Some(chain) = look::ask(root, LOOK_BYTES) else { return };
    // What changes images comes last.
    let mut named: Vec<PathBuf> =
        chain.snapshots().iter().map(|one| one.path().to_owned()).collect();
    match random.below(3) {
        0 => {
            let options = FreeOptions { dir: named.pop().unwrap(), rewrite: random.below(2) == 0 };
            let _ = dedup::free(&options, Arc::new(Kernel), &mut |_| {}, &());
        }
        1 => {
            let options = LinkOptions { dirs: named, keep_originals: random.below(2) == 0 };
            let _ = dedup::link(&options, &());
        }
        _ => {}
    }
}

/// Says which case hangs, and ends the program then.
fn watch(running: Arc<Mutex<BTreeMap<u64, Instant>>>) {
    thread::spawn(move || {
        loop {
            thread::sleep(Duration::from_secs(1));
            let running = running.lock().unwrap();
            if let Some((case, _)) = running.iter().find(|(_, begin)| begin.elapsed() > PATIENCE) {
                eprintln!("case {case} hangs");
                std::process::abort();
            }
        }
    });
}

#[test]
fn broken_images_are_answered_or_an_error() {
    setrlimit(Resource::RLIMIT_AS, MEMORY_BYTES, MEMORY_BYTES).unwrap();
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let kinds = tempfile::tempdir().unwrap();
    every_kind(&kinds.path().join("1"));
    let seeds = [
        fixtures.join("criu42-chain/chain"),
        fixtures.join("small/criu3171"),
        fixtures.join("small/criu42"),
        kinds.path().to_owned(),
    ];
    let canary = Canary::new();
    let cases = count(CASES);
    let next = AtomicU64::new(cases.start);
    let failed = Mutex::new(Vec::new());
    let running = Arc::new(Mutex::new(BTreeMap::new()));
    watch(Arc::clone(&running));
    let work = || {
        loop {
            let case = next.fetch_add(1, Ordering::Relaxed);
            if case >= cases.end {
                break;
            }
            running.lock().unwrap().insert(case, Instant::now());
            let mut random = Random::new(case);
            let parent = scratch();
            let root = parent.path().join("chain");
            copy(&seeds[random.below(seeds.len())], &root);
            let values = canary.values(&root);
            for _ in 0..=random.below(3) {
                mutate(&root, &values, &mut random);
            }
            let asked = panic::catch_unwind(AssertUnwindSafe(|| ask(&root, &mut random)));
            if let Err(why) = asked {
                let text = why.downcast_ref::<String>().cloned();
                let text = text.or(why.downcast_ref::<&str>().map(|text| (*text).to_owned()));
                failed.lock().unwrap().push((case, text.unwrap_or_default()));
            }
            let beside = fs::read_dir(parent.path()).unwrap().count();
            if beside != 1 {
                failed
                    .lock()
                    .unwrap()
                    .push((case, "something is left beside the chain".to_owned()));
            }
            running.lock().unwrap().remove(&case);
        }
    };
    thread::scope(|scope| {
        let threads = thread::available_parallelism().map_or(1, usize::from);
        (0..threads).for_each(|_| drop(scope.spawn(work)));
    });
    canary.assert_untouched(cases.end);
    let failed = failed.into_inner().unwrap();
    assert!(failed.is_empty(), "{} panics: {failed:#?}", failed.len());
}

/// Runs a program to its end and returns whether it succeeded and what it said; panics
/// if it hangs or dies of a signal.
fn bounded(mut command: Command, case: u64) -> (bool, String) {
    let (mut reader, writer) = std::io::pipe().unwrap();
    command.stdout(writer.try_clone().unwrap()).stderr(writer).stdin(Stdio::null());
    command.process_group(0);
    let mut child = command.spawn().unwrap();
    drop(command);
    let output = thread::spawn(move || {
        let mut said = Vec::new();
        let _ = reader.read_to_end(&mut said);
        String::from_utf8_lossy(&said).into_owned()
    });
    let begin = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if begin.elapsed() > PATIENCE {
            let group = nix::unistd::Pid::from_raw(i32::try_from(child.id()).unwrap());
            let _ = nix::sys::signal::killpg(group, nix::sys::signal::Signal::SIGKILL);
            panic!("case {case} hangs");
        }
        thread::sleep(Duration::from_millis(2));
    };
    let said = output.join().unwrap();
    let code = status.code();
    assert!(code.is_some_and(|code| code <= 2), "case {case}: {status}: {said}");
    assert!(!said.contains("panicked"), "case {case}: {said}");
    (status.success(), said)
}

#[test]
fn broken_images_do_no_harm_to_programs() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let canary = Canary::new();
    for case in count(PROGRAMS) {
        let mut random = Random::new(case ^ 1 << 40);
        let parent = scratch();
        let root = parent.path().join("chain");
        copy(&fixtures.join("criu42-chain/chain"), &root);
        let values = canary.values(&root);
        (0..=random.below(3)).for_each(|_| drop(mutate(&root, &values, &mut random)));
        let (chain, out) = (root.to_str().unwrap(), parent.path().join("out"));
        let out = out.to_str().unwrap();
        for arguments in [
            &["ls", "--pages", chain][..],
            &["ls", "--json", chain],
            &["ls", "--duplicates", chain],
            &["check", "--json", chain],
            &["diff", chain, "1", "3"],
            &["flatten", chain, out],
        ] {
            let mut command = Command::new(IMGFS);
            command.args(arguments);
            bounded(command, case);
        }
        let mut show = Command::new(engine());
        show.arg("show").args(files(&root));
        bounded(show, case);
        let mut dedup = Command::new(engine());
        dedup.args(["dedup", "-D"]).arg(root.join("3"));
        bounded(dedup, case);
    }
    canary.assert_untouched(0);
}

#[test]
fn privileged_broken_images_are_mounted_and_read() {
    require(Cap::Fuse);
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let canary = Canary::new();
    for case in count(MOUNTS) {
        let mut random = Random::new(case ^ 1 << 41);
        let parent = scratch();
        let root = parent.path().join("chain");
        copy(&fixtures.join("criu42-chain/chain"), &root);
        let values = canary.values(&root);
        (0..=random.below(2)).for_each(|_| drop(mutate(&root, &values, &mut random)));
        let mut probe = Command::new(IMGFS);
        probe.args(["ls", root.to_str().unwrap()]);
        let chosen = Chain::open(&root).is_ok_and(|chain| chain.choose(None).is_ok());
        if !bounded(probe, case).0 || !chosen {
            continue;
        }
        let mounted = Mounted::new(&root, &parent.path().join("mnt"), &[]);
        let mut buffer = vec![0; LOOK_BYTES];
        for file in files(&mounted.point) {
            if let Ok(mut file) = fs::File::open(file) {
                let _ = file.read(&mut buffer);
            }
        }
        // It is there still.
        assert!(fs::read_dir(&mounted.point).is_ok(), "case {case}");
    }
    canary.assert_untouched(0);
}

/// What a restore says if the reason is the machine, or a file that is not in the
/// images.
fn is_of_the_machine(said: &str) -> bool {
    [
        "restore what was there",
        "when it was dumped",
        "No such file or directory",
        "ENOENT",
        "ENOTDIR",
        "EISDIR",
        "ELOOP",
        "EACCES",
        "ENOMEM",
        "ENXIO",
        "ENAMETOOLONG",
        "E2BIG",
        "EFBIG",
        "ENOSPC",
        "is in use by",
        "the kernel that the process was dumped on",
        "this processor does not have",
    ]
    .iter()
    .any(|word| said.contains(word))
}

#[test]
fn privileged_broken_images_are_restored_or_check_has_said_why_not() {
    require(Cap::Ptrace);
    let canary = Canary::new();
    let mut seeds = Vec::new();
    for state in ["cow_tree", "threads", "pipes", "memfds", "pending_process", "epoll"] {
        let mut live = Live::workload(state);
        live.images_name = "chain/1";
        live.dump_running(&[]);
        live.images_name = "chain/2";
        live.dump(&["--prev-images-dir", "../1"]);
        seeds.push((state, live));
    }
    let restore = |dir: &Path, case: u64| {
        let mut command = Command::new("unshare");
        // It ends with the first process of its namespace, which the restore is.
        command.args(["-pmfin", "--kill-child", "--mount-proc", "--"]).arg(engine());
        command.args(["restore", "-d", "-s", "-D"]).arg(dir).arg("-W").arg(dir);
        bounded(command, case)
    };
    let clean = |root: &Path| {
        check(&Chain::open(root).unwrap(), is_restored, &mut |_, _| ()).unwrap().is_empty()
    };
    for (state, live) in &seeds {
        let root = live.path("chain");
        let (restored, said) = restore(&root.join("2"), 0);
        assert!(restored && clean(&root), "{state}: {said}");
    }
    let (mut restored_count, mut silent) = (0, Vec::new());
    for case in count(RESTORES) {
        let mut random = Random::new(case ^ 1 << 42);
        let (state, live) = &seeds[random.below(seeds.len())];
        let parent = scratch();
        let root = parent.path().join("chain");
        copy(&live.path("chain"), &root);
        let values = canary.values(&root);
        let what = mutate(&root, &values, &mut random);
        let findings = Chain::open(&root)
            .ok()
            .and_then(|chain| check(&chain, is_restored, &mut |_, _| ()).ok());
        let (restored, said) = restore(&root.join("2"), case);
        restored_count += u64::from(restored);
        let clean = findings.is_some_and(|findings| findings.is_empty());
        if clean && !restored && !is_of_the_machine(&said) {
            silent.push(format!("case {case}, {state}: {what}: {said}"));
        }
    }
    canary.assert_untouched(0);
    assert!(restored_count > 0, "nothing was restored at all");
    assert!(silent.is_empty(), "check says nothing of {}: {silent:#?}", silent.len());
}
