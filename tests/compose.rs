//! Files that a mount composes of blocks of the images, where the file system shares blocks.
//!
//! All tests need root, `/dev/fuse` and loop devices.

mod common;

use std::{
    cell::Cell,
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::Command,
    sync::mpsc,
    thread,
};

use common::{
    Cap,
    chain::{PAGE, TestChain},
    loops::LoopMount,
    mounted::{IMGFS, Mounted, PATIENCE},
    require, slowness,
};
use memmap2::MmapOptions;
use nix::{
    errno::Errno,
    fcntl::{PosixFadviseAdvice, posix_fadvise},
    sys::signal::Signal,
    unistd::{Whence, lseek},
};
use rcriu::image::{MemoryId, Presence};
use tempfile::TempDir;

use Presence::{Parent, Present};

const APP: MemoryId = MemoryId::Private(7);
const OBJECT: MemoryId = MemoryId::Shared(1024);

/// Pages of an object between two stretches of data.
const GAP: u64 = 300;

/// More than a page of a page cache's larger folios.
const PAGES: u64 = 3000;

/// A chain of three snapshots on a file system of its own.
struct Scene {
    chain: TestChain,
    points: TempDir,
    /// Mounts so far: each has a place and a log of its own.
    mounts: Cell<u32>,
    disk: LoopMount,
}

impl Scene {
    fn new(mkfs: &'static str) -> Self {
        require(Cap::Fuse);
        let disk = LoopMount::new(mkfs, 320);
        let mut chain = TestChain::new(&disk.path().join("chain"));
        for layer in 0..3 {
            chain.layer(&(layer + 1).to_string());
            let own = |page: u64| page % 3 == layer || (page > 1000 && page < 1500 && layer == 1);
            let entry = |page| (page, 1, if own(page) || layer == 0 { Present } else { Parent });
            let entries: Vec<_> = (16..16 + PAGES).map(entry).collect();
            chain.memory(usize::try_from(layer).unwrap(), APP, 1, &entries);
        }
        chain.memory(0, OBJECT, 3, &[(0, 20, Present), (20 + GAP, 30, Present)]);
        chain.memory(1, OBJECT, 3, &[(0, 20, Parent), (20 + GAP, 30, Parent)]);
        let entries = [(0, 10, Parent), (10, 10, Present), (20 + GAP, 30, Parent)];
        chain.memory(2, OBJECT, 3, &entries);
        Self { chain, points: tempfile::tempdir().unwrap(), mounts: Cell::new(0), disk }
    }

    fn mount(&self, arguments: &[&str]) -> Mounted {
        self.mount_by(Command::new(IMGFS), arguments)
    }

    fn mount_by(&self, imgfs: Command, arguments: &[&str]) -> Mounted {
        let arguments: Vec<_> = arguments.iter().copied().chain(["-vvv"]).collect();
        self.mounts.set(self.mounts.get() + 1);
        let point = self.points.path().join(self.mounts.get().to_string());
        Mounted::by(imgfs, self.chain.root(), &point, &arguments)
    }

    fn pages(&self) -> Vec<u8> {
        self.chain.flat_pages(2, APP)
    }

    /// The names of all files of the chain.
    fn names(&self) -> Vec<PathBuf> {
        let dirs = fs::read_dir(self.chain.root()).unwrap().map(|dir| dir.unwrap().path());
        let files = |dir: PathBuf| fs::read_dir(dir).unwrap().map(|file| file.unwrap().path());
        let mut names: Vec<_> = dirs.flat_map(files).collect();
        names.sort();
        names
    }

    /// Lets the kernel forget the bytes of all pages files.
    fn forget(&self) {
        for path in self.names() {
            let file = File::open(path).unwrap();
            file.sync_all().unwrap();
            posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
        }
    }
}

fn read(file: &File) -> io::Result<Vec<u8>> {
    let len = usize::try_from(file.metadata()?.len()).unwrap();
    let mut bytes = vec![0; len];
    file.read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
}

/// Reads a file while the daemon is stopped, first by system calls and then mapped: only the
/// kernel can have done it.
fn read_without_daemon(mounted: &Mounted, file: &File, len: usize) -> [Vec<u8>; 2] {
    let file = file.try_clone().unwrap();
    let mapping = MmapOptions::new().len(len).map_raw_read_only(&file).unwrap();
    let (told, tell) = mpsc::channel();
    mounted.signal(Signal::SIGSTOP);
    let reader = thread::spawn(move || {
        let mut called = vec![0; len];
        file.read_exact_at(&mut called, 0).unwrap();
        let mut mapped = vec![0; len];
        let memory = File::open("/proc/self/mem").unwrap();
        memory.read_exact_at(&mut mapped, mapping.as_ptr() as u64).unwrap();
        told.send([called, mapped]).unwrap();
    });
    let bytes = tell.recv_timeout(PATIENCE * slowness());
    mounted.signal(Signal::SIGCONT);
    reader.join().unwrap();
    bytes.expect("the kernel reads the file without the daemon")
}

fn composes(mkfs: &'static str) {
    let scene = Scene::new(mkfs);
    let free = scene.disk.free_bytes();
    let names = scene.names();
    let mut mounted = scene.mount(&["--compose=always"]);
    for (name, expected) in [
        ("pages-1.img", scene.pages()),
        ("shmem/1024", scene.chain.in_place(2, OBJECT)),
        ("snapshots/2/pages-1.img", scene.chain.flat_pages(1, APP)),
    ] {
        let open = || File::open(mounted.path(name)).unwrap();
        let files: Vec<File> = thread::scope(|scope| {
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(open)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        for bytes in read_without_daemon(&mounted, &files[7], expected.len()) {
            assert!(bytes == expected, "{name}");
        }
        let meta = files[0].metadata().unwrap();
        assert_eq!(meta.len(), expected.len() as u64, "{name}");
        for file in &files {
            assert!(read(file).unwrap() == expected, "{name}");
        }
        drop(files);
        // It is composed once.
        let bytes = read_without_daemon(&mounted, &open(), expected.len());
        assert!(bytes[0] == expected, "{name}");
        let composed = format!("open /{name}: composed of ");
        assert_eq!(mounted.log_text().matches(&composed).count(), 1, "{name}");
    }
    let object = File::open(mounted.path("shmem/1024")).unwrap();
    let page = |number: i64| number * i64::try_from(PAGE).unwrap();
    let hole = lseek(&object, 0, Whence::SeekHole).unwrap();
    assert_eq!([hole, lseek(&object, hole, Whence::SeekData).unwrap()], [20, 320].map(page));
    assert_eq!(scene.names(), names);
    // A daemon that is killed leaves nothing.
    mounted.signal(Signal::SIGKILL);
    mounted.wait();
    drop(object);
    drop(mounted);
    assert_eq!(scene.names(), names);
    let left = free.saturating_sub(scene.disk.free_bytes());
    assert!(left < 1 << 20, "{left} bytes were left");
}

#[test]
fn privileged_the_kernel_reads_files_composed_on_btrfs() {
    composes("mkfs.btrfs");
}

#[test]
fn privileged_the_kernel_reads_files_composed_on_xfs() {
    composes("mkfs.xfs");
}

#[test]
fn privileged_what_is_in_memory_is_composed_when_it_is_opened_again() {
    let scene = Scene::new("mkfs.btrfs");
    let composed = |mounted: &Mounted| mounted.log_text().contains("/pages-1.img: composed of ");
    let mounted = scene.mount(&[]);
    assert!(mounted.read("pages-1.img") == scene.pages());
    assert!(mounted.log_text().contains("not composed, since most of it is in memory"));
    assert!(!composed(&mounted));
    let file = File::open(mounted.path("pages-1.img")).unwrap();
    let bytes = read_without_daemon(&mounted, &file, scene.pages().len());
    assert!(bytes[0] == scene.pages() && composed(&mounted));
    drop((file, mounted));

    scene.forget();
    let mounted = scene.mount(&[]);
    assert!(mounted.read("pages-1.img") == scene.pages() && composed(&mounted));
    drop(mounted);

    let mounted = scene.mount(&["-o", "compose=never"]);
    assert!(mounted.read("pages-1.img") == scene.pages());
    assert!(!mounted.log_text().contains("composed"));
    drop(mounted);

    // An older kernel does not tell what is in memory.
    let mut imgfs = Command::new(IMGFS);
    imgfs.env("RCRIU_WITHOUT", "cachestat");
    let mounted = scene.mount_by(imgfs, &[]);
    assert!(mounted.read("pages-1.img") == scene.pages() && composed(&mounted));
}

#[test]
fn privileged_where_nothing_can_be_composed_the_daemon_answers() {
    let scene = Scene::new("mkfs.xfs");
    let shm = tempfile::tempdir_in("/dev/shm").unwrap();
    let dir = format!("--compose-dir={}", shm.path().display());
    let answers = |(name, value), arguments: &[&str], why: &str| {
        let mut imgfs = Command::new(IMGFS);
        imgfs.env(name, value);
        let arguments: Vec<_> = arguments.iter().copied().chain(["--compose=always"]).collect();
        let mounted = scene.mount_by(imgfs, &arguments);
        let file = File::open(mounted.path("pages-1.img")).unwrap();
        assert!(read(&file).unwrap() == scene.pages(), "{why}");
        let object = mounted.read("shmem/1024");
        assert!(object == scene.chain.in_place(2, OBJECT), "{why}");
        let log = mounted.log_text();
        assert!(log.contains(why), "{why}: {log}");
        assert!(!log.contains(": composed of"), "{why}");
        log
    };
    let quiet = ("RCRIU_FAULT", "");
    let log = answers(("RCRIU_WITHOUT", "reflink"), &[], "Operation not supported");
    assert!(!log.to_lowercase().contains("warn"), "{log}");
    let log = answers(quiet, &[&dir], "Invalid cross-device link");
    assert!(!log.to_lowercase().contains("warn"), "{log}");
    answers(("RCRIU_FAULT", "compose-half"), &[], "fault injected at compose-half");
    answers(quiet, &["--punch"], "");
    // What is lost is told by its name, as without composing.
    let lower = scene.chain.pages_path(0, 1);
    OpenOptions::new().write(true).open(&lower).unwrap().set_len(100 * 4096).unwrap();
    let mounted = scene.mount(&["--compose=always"]);
    let failed = fs::read(mounted.path("pages-1.img")).unwrap_err();
    assert_eq!(failed.raw_os_error(), Some(Errno::EIO as i32));
    let log = mounted.log_text();
    assert!(log.contains("not composed") && log.contains(lower.to_str().unwrap()), "{log}");
}

#[test]
fn privileged_a_daemon_that_is_killed_while_it_composes_leaves_nothing() {
    let scene = Scene::new("mkfs.btrfs");
    let names = scene.names();
    let mut imgfs = Command::new(IMGFS);
    imgfs.env("RCRIU_FAULT", "compose-half:kill:100");
    let mut mounted = scene.mount_by(imgfs, &["--compose=always"]);
    assert!(File::open(mounted.path("pages-1.img")).is_err());
    mounted.wait();
    drop(mounted);
    assert_eq!(scene.names(), names);
    assert!(scene.mount(&[]).read("pages-1.img") == scene.pages());
}

#[test]
fn privileged_files_of_too_many_extents_are_not_composed() {
    require(Cap::Fuse);
    let disk = LoopMount::new("mkfs.xfs", 320);
    let mut chain = TestChain::new(&disk.path().join("chain"));
    // Claims that no file can keep are found before anything is looked up page by page.
    let (pages, huge) = (33_000, 1 << 40);
    for (layer, presence) in [(0, Present), (1, Parent)] {
        chain.layer(&layer.to_string());
        let own = |page: u64| if page % 2 == layer { Present } else { presence };
        let entries: Vec<_> = (0..pages).map(|page| (page, 1, own(page))).collect();
        let layer = usize::try_from(layer).unwrap();
        chain.pagemap(layer, APP, 1, &entries);
        chain.pagemap(layer, OBJECT, 2, &[(0, huge, presence)]);
        sparse(&chain.pages_path(layer, 1), pages * 4096);
        sparse(&chain.pages_path(layer, 2), 4096);
    }
    let arguments = ["--compose=always", "-vvv"];
    let mounted = Mounted::new(chain.root(), &disk.path().join("mnt"), &arguments);
    for name in ["pages-1.img", "pages-2.img", "shmem/1024"] {
        let file = File::open(mounted.path(name)).unwrap();
        let mut page = [1; PAGE];
        file.read_exact_at(&mut page, 0).unwrap();
        assert_eq!(page, [0; PAGE], "{name}");
    }
    assert!(!mounted.log_text().contains(": composed of"));
}

fn sparse(path: &Path, len: u64) {
    File::create(path).unwrap().set_len(len).unwrap();
}
