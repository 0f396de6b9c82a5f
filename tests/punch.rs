//! Pages that are freed once they are restored: through a mount, by a restore, and
//! what is left when either is interrupted.
//!
//! All of it needs root and `/dev/fuse`.

mod common;

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::{FileExt, PermissionsExt},
    path::Path,
    process::{Command, Stdio},
    sync::Arc,
};

use common::{
    Cap,
    chain::{PAGE, TestChain, page_bytes},
    live::{Live, engine, wait_for as wait_for_large},
    mounted::{Mounted, imgfs, wait_for},
    peak::{HOLDER, images_bytes, private_peak},
    require, stored_bytes,
};
use memmap2::MmapOptions;
use nix::{
    errno::Errno,
    fcntl::{FallocateFlags, fallocate},
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::signal::{Signal, kill},
    unistd::{Pid, Whence, lseek},
};
use rcriu::{
    chain::{Chain, MemoryBytes, Summary, read_at},
    fault::Point,
    image::{MemoryId, Presence},
    units::PageIndex,
};
use tempfile::TempDir;

use Presence::{Parent, Present};

const APP: MemoryId = MemoryId::Private(7);
const OBJECT: MemoryId = MemoryId::Shared(1024);

/// Pages of the private memory, from this address on.
const PAGES: u64 = 1200;
const FIRST: u64 = 16;

/// A chain of three snapshots, and a place to mount it.
struct Scene {
    dir: TempDir,
    chain: TestChain,
}

impl Scene {
    /// On tmpfs, where a file takes as much room as it has pages.
    fn new() -> Self {
        Self::within(tempfile::tempdir_in("/dev/shm").unwrap())
    }

    fn within(dir: TempDir) -> Self {
        let mut chain = TestChain::new(&dir.path().join("chain"));
        let base = chain.layer("1");
        chain.memory(base, APP, 1, &[(FIRST, PAGES, Present)]);
        chain.memory(base, OBJECT, 2, &[(0, 50, Present)]);
        let middle = chain.layer("2");
        let alternating: Vec<_> = (FIRST..FIRST + PAGES)
            .map(|page| (page, 1, if page % 2 == 0 { Present } else { Parent }))
            .collect();
        chain.memory(middle, APP, 1, &alternating);
        chain.memory(middle, OBJECT, 2, &[(0, 50, Parent)]);
        let tip = chain.layer("3");
        chain.memory(tip, APP, 1, &[(FIRST, 100, Present), (FIRST + 100, PAGES - 100, Parent)]);
        chain.memory(tip, OBJECT, 2, &[(0, 50, Parent)]);
        Self { dir, chain }
    }

    fn mount(&self, arguments: &[&str]) -> Mounted {
        Mounted::new(self.chain.root(), &self.dir.path().join("mnt"), arguments)
    }

    /// Returns the bytes of a page of the shown snapshot's private memory.
    fn page(&self, number: u64) -> Vec<u8> {
        let layer = match number {
            0..100 => 2,
            _ if (FIRST + number).is_multiple_of(2) => 1,
            _ => 0,
        };
        page_bytes(layer, APP, FIRST + number).to_vec()
    }

    /// Returns the bytes that all pages files of the chain hold.
    fn room(&self) -> u64 {
        let files = (0..3).flat_map(|layer| [1, 2].map(|id| self.chain.pages_path(layer, id)));
        files.map(|path| stored_bytes(&path)).sum()
    }

    fn check(&self) -> (bool, String) {
        let output = imgfs(&["check", text(self.chain.root())]);
        (output.status.success(), String::from_utf8(output.stdout).unwrap())
    }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn writable(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open(path)
}

fn punch(file: &File, offset: u64, len: u64) -> nix::Result<()> {
    let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    let number = |number: u64| i64::try_from(number).unwrap();
    fallocate(file, mode, number(offset), number(len))
}

fn punch_pages(file: &File, pages: std::ops::Range<u64>) {
    punch(file, pages.start * PAGE as u64, (pages.end - pages.start) * PAGE as u64).unwrap();
}

/// Reads a page of a file; `None` for an input/output error.
#[track_caller]
fn read_page(file: &File, page: u64) -> Option<Vec<u8>> {
    let mut buffer = vec![0; PAGE];
    match file.read_exact_at(&mut buffer, page * PAGE as u64) {
        Ok(()) => Some(buffer),
        Err(error) => {
            assert_eq!(error.raw_os_error(), Some(Errno::EIO as i32), "{error}");
            None
        }
    }
}

fn errno<T: std::fmt::Debug>(result: io::Result<T>) -> Errno {
    Errno::from_raw(result.unwrap_err().raw_os_error().unwrap())
}

#[test]
fn privileged_punched_pages_are_freed_where_they_are_and_never_read_as_zeros() {
    require(Cap::Fuse);
    let scene = Scene::new();
    let before = scene.room();
    let mounted = scene.mount(&["--punch"]);
    let path = mounted.path("pages-1.img");
    let len = path.metadata().unwrap().len();
    let file = writable(&path).unwrap();
    // Only whole pages within the range: 150 to 249, in two layers.
    punch(&file, 149 * PAGE as u64 + 1, 102 * PAGE as u64 - 2).unwrap();
    assert_eq!(before - scene.room(), 100 * PAGE as u64);
    // In the third.
    punch_pages(&file, 0..10);
    assert_eq!(before - scene.room(), 110 * PAGE as u64);
    assert_eq!(path.metadata().unwrap().len(), len);

    let gone = |page: u64| page < 10 || (150..250).contains(&page);
    let look = |file: &File| {
        for page in 0..PAGES {
            let expected = (!gone(page)).then(|| scene.page(page));
            assert_eq!(read_page(file, page), expected, "page {page}");
        }
        // Large reads go another way.
        let mut large = vec![0; 128 << 10];
        let error = file.read_exact_at(&mut large, 140 * PAGE as u64);
        assert_eq!(errno(error), Errno::EIO);
        file.read_exact_at(&mut large, 260 * PAGE as u64).unwrap();
    };
    look(&file);
    look(&File::open(&path).unwrap());
    // A freed page is no hole: a reader that skips holes would take it for zeros.
    let hole = lseek(&file, 0, Whence::SeekHole).unwrap();
    assert_eq!(hole.cast_unsigned(), len);
    // The same pages elsewhere in the mount.
    let beside = File::open(mounted.path("snapshots/2/pages-1.img")).unwrap();
    assert_eq!(read_page(&beside, 200), None);
    assert_eq!(read_page(&beside, 0).unwrap(), page_bytes(1, APP, FIRST));
    let said = mounted.log_text();
    assert!(said.contains("pages of pid 7 from 0x10000 on were freed"), "{said}");
    drop((file, beside, mounted));

    let mounted = scene.mount(&[]);
    look(&File::open(mounted.path("pages-1.img")).unwrap());
    drop(mounted);
    let (clean, found) = scene.check();
    assert!(!clean, "{found}");
    for part in
        ["chain/3: pid 7 at 0x10000: 10 pages are gone", "chain/2: pid 7 at 0xa6000", "chain/1"]
    {
        assert!(found.contains(part), "{part}: {found}");
    }
    let flat = imgfs(&["flatten", text(scene.chain.root()), text(&scene.dir.path().join("out"))]);
    let why = String::from_utf8(flat.stderr).unwrap();
    assert!(!flat.status.success() && why.contains("were freed"), "{why}");
    assert!(!scene.dir.path().join("out").exists());
    let diff = imgfs(&["diff", text(scene.chain.root()), "1", "3"]);
    assert_eq!(diff.status.code(), Some(2));
}

#[test]
fn privileged_a_mount_that_frees_pages_refuses_every_other_change() {
    require(Cap::Fuse);
    let scene = Scene::new();
    let before = scene.room();
    let mounted = scene.mount(&["--punch"]);
    let path = mounted.path("pages-1.img");
    let file = writable(&path).unwrap();
    assert_eq!(errno(file.write_at(b"x", 0)), Errno::EROFS);
    assert_eq!(errno(file.set_len(0)), Errno::EROFS);
    for mode in [
        FallocateFlags::empty(),
        FallocateFlags::FALLOC_FL_ZERO_RANGE,
        FallocateFlags::FALLOC_FL_COLLAPSE_RANGE,
        FallocateFlags::FALLOC_FL_KEEP_SIZE,
    ] {
        assert_eq!(fallocate(&file, mode, 0, 4096), Err(Errno::EOPNOTSUPP), "{mode:?}");
    }
    assert_eq!(errno(OpenOptions::new().write(true).truncate(true).open(&path)), Errno::EROFS);
    assert_eq!(errno(fs::set_permissions(&path, fs::Permissions::from_mode(0o777))), Errno::EROFS);
    assert_eq!(errno(fs::remove_file(&path)), Errno::EROFS);
    assert_eq!(errno(fs::rename(&path, mounted.path("x"))), Errno::EROFS);
    assert_eq!(errno(File::create(mounted.path("new"))), Errno::EROFS);
    assert_eq!(errno(fs::create_dir(mounted.path("new"))), Errno::EROFS);
    for other in ["inventory.img", "pagemap-7.img", "snapshots/2/pages-1.img", "shmem/1024"] {
        assert_eq!(errno(writable(&mounted.path(other))), Errno::EROFS, "{other}");
    }
    // What is written to a shared mapping would be lost.
    let shared = MmapOptions::new().map_raw(&file);
    assert_eq!(errno(shared.map(drop)), Errno::ENODEV);
    drop(file);
    // A file that was not opened for it.
    let file = File::open(&path).unwrap();
    assert_eq!(punch(&file, 0, 4096), Err(Errno::EBADF));
    assert_eq!(read_page(&file, 0).unwrap(), scene.page(0));
    assert_eq!(scene.room(), before);
    drop((file, mounted));
    // Nothing is free to be punched in a mount that is not for it.
    let mounted = scene.mount(&[]);
    assert_eq!(errno(writable(&mounted.path("pages-1.img"))), Errno::EROFS);
    let output = imgfs(&["commit", text(&mounted.point)]);
    let why = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && why.contains("mount the chain with --punch"), "{why}");
}

#[test]
fn privileged_a_restore_from_a_mount_that_frees_pages_logs_elsewhere() {
    require(Cap::Fuse);
    let scene = Scene::new();
    let mounted = scene.mount(&["--punch"]);
    // Root may write to it, as far as permissions go. There is nothing to restore in it.
    let here = scene.dir.path().join("here");
    fs::create_dir(&here).unwrap();
    let output = Command::new(engine())
        .args(["restore", "-o", "log", "-D"])
        .arg(&mounted.point)
        .current_dir(&here)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && !said.contains("Read-only"), "{said}");
    assert!(fs::read_to_string(here.join("log")).unwrap().contains("is it a pre-dump"));
}

#[test]
fn privileged_who_frees_pages_is_alone_and_says_whose_they_are() {
    require(Cap::Fuse);
    let scene = Scene::new();
    let reader = scene.mount(&[]);
    let other = scene.dir.path().join("other");
    fs::create_dir(&other).unwrap();
    let refused = imgfs(&["mount", "--punch", text(scene.chain.root()), text(&other)]);
    let why = String::from_utf8(refused.stderr).unwrap();
    let pid = format!("(pid {})", reader.pid());
    assert!(!refused.status.success() && why.contains(&pid), "{why}");
    drop(reader);
    let output = imgfs(&["mount", "--punch", text(scene.chain.root()), text(&other)]);
    let _detach = common::mounted::Detach(other.clone());
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{said}");
    let warning = "restored once its pages are freed: 1, 2";
    assert_eq!(said.matches(warning).count(), 1, "{said}");
    let out = scene.dir.path().join("out");
    let refused = imgfs(&["flatten", text(scene.chain.root()), text(&out)]);
    assert!(!refused.status.success());
    assert!(imgfs(&["umount", text(&other)]).status.success());
    wait_for("the end of the daemon's lock", || {
        imgfs(&["flatten", text(scene.chain.root()), text(&out)]).status.success()
    });
}

#[test]
fn privileged_where_files_cannot_be_punched_nothing_is_begun() {
    require(Cap::Fuse);
    let ramfs = InMemory::new("ramfs");
    let scene = Scene::within(tempfile::tempdir_in(ramfs.0.path()).unwrap());
    let point = scene.dir.path().join("mnt");
    fs::create_dir(&point).unwrap();
    let refused = imgfs(&["mount", "--punch", text(scene.chain.root()), text(&point)]);
    let why = String::from_utf8(refused.stderr).unwrap();
    assert!(!refused.status.success() && why.contains("no hole punching"), "{why}");
    assert!(!common::is_mounted(&point));
    assert_eq!(journal_bytes(&scene), 0);
    assert!(scene.check().0);
}

#[test]
fn privileged_on_read_frees_what_was_read_and_nothing_else() {
    require(Cap::Fuse);
    let scene = Scene::new();
    let before = scene.room();
    let mounted = scene.mount(&["--punch=on-read"]);
    let path = mounted.path("pages-1.img");
    let read = |file: &File, first: u64, buffer: &mut [u8]| {
        file.read_exact_at(buffer, first * PAGE as u64).unwrap();
        for (page, bytes) in (first..).zip(buffer.chunks(PAGE)) {
            assert_eq!(bytes, scene.page(page), "page {page}");
        }
    };
    let file = File::open(&path).unwrap();
    let mut buffer = vec![0; 200 * PAGE];
    read(&file, 0, &mut buffer);
    // Twice a half of a page; half of one; and the end of a page and its neighbour.
    let mut half = vec![0; PAGE / 2];
    for offset in [300 * PAGE, 300 * PAGE + PAGE / 2, 310 * PAGE] {
        file.read_exact_at(&mut half, offset as u64).unwrap();
    }
    let mut across = vec![0; PAGE + 8];
    file.read_exact_at(&mut across, 320 * PAGE as u64 - 8).unwrap();
    // A buffer that begins between two pages makes the kernel cut elsewhere.
    let mut large = vec![0; 600 * PAGE + 24];
    read(&file, 400, &mut large[24..]);
    drop(file);
    // 0 to 199, 300, 320, 400 to 999.
    wait_for("the pages that were read", || before - scene.room() == 802 * PAGE as u64);
    let file = File::open(&path).unwrap();
    for page in [199, 300, 320, 999] {
        assert_eq!(read_page(&file, page), None, "page {page}");
    }
    for page in [200, 310, 319, 399, 1000] {
        assert_eq!(read_page(&file, page).unwrap(), scene.page(page), "page {page}");
    }
    drop(file);
    wait_for("these pages, too", || before - scene.room() == 807 * PAGE as u64);
    // Looking at other files frees nothing.
    mounted.read("snapshots/3/pages-2.img");
    mounted.read("shmem/1024");
    drop(mounted);
    assert_eq!(before - scene.room(), 807 * PAGE as u64);
}

#[test]
fn privileged_on_read_keeps_mapped_pages_until_the_file_is_closed() {
    require(Cap::Fuse);
    let scene = Scene::new();
    let before = scene.room();
    let mounted = scene.mount(&["--punch=on-read"]);
    let path = mounted.path("pages-1.img");
    let program = "
import mmap, os, sys
path, pages = sys.argv[1], [int(page) for page in sys.argv[2].split(',')]
file = os.open(path, os.O_RDONLY)
mapped = mmap.mmap(file, 0, mmap.MAP_PRIVATE, mmap.PROT_READ)
os.close(file)
for page in pages:
    sys.stdout.buffer.write(mapped[page * 4096:(page + 1) * 4096])
sys.stdout.flush()
sys.stdin.read()
";
    let touched = [0, 7, 500, 1100];
    let mut reader = Command::new("/usr/bin/python3")
        .args(["-c", program, text(&path), "0,7,500,1100"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut bytes = vec![0; touched.len() * PAGE];
    reader.stdout.as_mut().unwrap().read_exact(&mut bytes).unwrap();
    for (bytes, page) in bytes.chunks(PAGE).zip(touched) {
        assert_eq!(bytes, scene.page(page));
    }
    // The kernel may ask for them again as long as they are mapped.
    assert_eq!(scene.room(), before);
    let second = File::open(&path).unwrap();
    assert_eq!(read_page(&second, 7).unwrap(), scene.page(7));
    drop(reader.stdin.take());
    assert!(reader.wait().unwrap().success());
    drop(second);
    // Nothing that was not touched was read ahead and lost.
    wait_for("the pages", || before - scene.room() == 4 * PAGE as u64);
    let file = File::open(&path).unwrap();
    for page in touched {
        assert_eq!(read_page(&file, page), None);
        assert_eq!(read_page(&file, page + 1).unwrap(), scene.page(page + 1));
    }
}

#[test]
fn privileged_mapped_pages_that_are_punched_are_no_longer_there() {
    require(Cap::Fuse);
    let scene = Scene::new();
    let mounted = scene.mount(&["--punch"]);
    let path = mounted.path("pages-1.img");
    // Reads a page, and again when it is told to.
    let program = "
import mmap, os, sys
file = os.open(sys.argv[1], os.O_RDONLY)
mapped = mmap.mmap(file, 0, mmap.MAP_PRIVATE, mmap.PROT_READ)
for line in sys.stdin:
    page = int(line)
    sys.stdout.buffer.write(mapped[page * 4096:(page + 1) * 4096])
    sys.stdout.flush()
";
    let mut reader = Command::new("/usr/bin/python3")
        .args(["-c", program, text(&path)])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut ask = |page: u64| {
        writeln!(reader.stdin.as_mut().unwrap(), "{page}").unwrap();
        let mut bytes = vec![0; PAGE];
        reader.stdout.as_mut().unwrap().read_exact(&mut bytes).map(|()| bytes)
    };
    assert_eq!(ask(600).unwrap(), scene.page(600));
    let file = writable(&path).unwrap();
    punch_pages(&file, 600..601);
    assert_eq!(ask(601).unwrap(), scene.page(601));
    // Neither what the page cache had, nor zeros.
    ask(600).unwrap_err();
    let end = reader.wait().unwrap();
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&end), Some(libc::SIGBUS));
}

#[test]
fn privileged_commit_frees_what_was_noted_and_an_end_without_it_nothing() {
    require(Cap::Fuse);
    let scene = Scene::new();
    let before = scene.room();
    let mounted = scene.mount(&["--punch=commit"]);
    let file = writable(&mounted.path("pages-1.img")).unwrap();
    punch_pages(&file, 0..500);
    assert_eq!(read_page(&file, 3).unwrap(), scene.page(3));
    assert_eq!(scene.room(), before);
    drop((file, mounted));
    assert_eq!(scene.room(), before);
    assert!(scene.check().0);

    let mounted = scene.mount(&["--punch=commit"]);
    let file = writable(&mounted.path("pages-1.img")).unwrap();
    let object = writable(&mounted.path("pages-2.img")).unwrap();
    punch_pages(&file, 100..200);
    punch_pages(&object, 0..50);
    let commit = || {
        let output = imgfs(&["commit", text(&mounted.point)]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    assert_eq!(commit(), "freed 150 pages, 600.00 KiB\n");
    assert_eq!(before - scene.room(), 150 * PAGE as u64);
    assert_eq!(read_page(&file, 100), None);
    assert_eq!(read_page(&object, 49), None);
    assert_eq!(read_page(&file, 99).unwrap(), scene.page(99));
    assert_eq!(commit(), "freed 0 pages, 0 B\n");
    // No other user may.
    let stranger = Command::new("setpriv")
        .args(["--reuid=65534", "--regid=65534", "--clear-groups", "--"])
        .args([common::mounted::IMGFS, "commit", text(&mounted.point)])
        .output()
        .unwrap();
    assert!(!stranger.status.success());
}

#[test]
fn privileged_an_interrupted_punch_leaves_no_zeros() {
    require(Cap::Fuse);
    for point in ["free-noted", "free-appended", "free-journalled", "free-half", "free-done"] {
        let scene = Scene::new();
        let before = scene.room();
        let mut daemon = Command::new(common::mounted::IMGFS);
        daemon.env("RCRIU_FAULT", format!("{point}:kill"));
        let mnt = scene.dir.path().join("mnt");
        let mut mounted = Mounted::by(daemon, scene.chain.root(), &mnt, &["--punch"]);
        let file = writable(&mounted.path("pages-1.img")).unwrap();
        punch(&file, 0, 300 * PAGE as u64).unwrap_err();
        assert!(!mounted.wait().success(), "{point} is never hit");
        drop((file, mounted));
        assert_consistent(&scene, 0..300, point);
        // Running again finishes.
        let mounted = scene.mount(&["--punch"]);
        let file = writable(&mounted.path("pages-1.img")).unwrap();
        punch_pages(&file, 0..300);
        drop((file, mounted));
        assert_eq!(before - scene.room(), 300 * PAGE as u64, "{point}");
    }
}

#[test]
fn privileged_a_daemon_killed_at_any_moment_leaves_no_zeros() {
    require(Cap::Fuse);
    for round in 0..12_u64 {
        // On a disk, where the journal is waited for.
        let scene = Scene::within(tempfile::tempdir().unwrap());
        let mounted = scene.mount(&["--punch"]);
        let path = mounted.path("pages-1.img");
        let file = writable(&path).unwrap();
        std::thread::scope(|scope| {
            let puncher = scope.spawn(|| {
                let mut page = 0;
                while punch(&file, page * PAGE as u64, 3 * PAGE as u64).is_ok() && page < PAGES {
                    page += 3;
                }
            });
            // After some pages, and whatever it is at then.
            let some = before_room(round);
            wait_for("some pages", || journal_bytes(&scene) > some || puncher.is_finished());
            mounted.signal(Signal::SIGKILL);
        });
        drop((file, mounted));
        assert_consistent(&scene, 0..PAGES, "kill -9");
    }
}

/// Bytes of the journals after which round `round` kills.
fn before_room(round: u64) -> u64 {
    100 + round * 377
}

fn journal_bytes(scene: &Scene) -> u64 {
    let journal = |layer| scene.chain.dir(layer).join("punched-1.img");
    (0..3).map(|layer| fs::metadata(journal(layer)).map_or(0, |meta| meta.len())).sum()
}

/// Checks that each page of the shown snapshot is what it was or is an error, which
/// only pages in `allowed` may be, and that `imgfs check` agrees.
fn assert_consistent(scene: &Scene, allowed: std::ops::Range<u64>, what: &str) {
    let mounted = scene.mount(&[]);
    let file = File::open(mounted.path("pages-1.img")).unwrap();
    let mut gone = 0;
    for page in 0..PAGES {
        match read_page(&file, page) {
            Some(bytes) => assert_eq!(bytes, scene.page(page), "{what}: page {page}"),
            None => {
                assert!(allowed.contains(&page), "{what}: page {page}");
                gone += 1;
            }
        }
    }
    drop((file, mounted));
    let (clean, found) = scene.check();
    assert_eq!(clean, gone == 0, "{what}: {gone} gone: {found}");
    let out = scene.dir.path().join("whole");
    let flat = imgfs(&["flatten", text(scene.chain.root()), text(&out)]);
    assert_eq!(flat.status.success(), gone == 0, "{what}");
    if gone == 0 {
        fs::remove_dir_all(&out).unwrap();
    }
}

/// How a restore sees the images.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Direct,
    Mounted(&'static str),
}

const WAYS: [Way; 4] = [
    Way::Direct,
    Way::Mounted("--punch"),
    Way::Mounted("--punch=on-read"),
    Way::Mounted("--punch=commit"),
];

/// A tree that was dumped, in one layer or two.
struct Dumped {
    live: Live,
    mounted: Option<Mounted>,
    /// Unmounted when all else is gone.
    _memory: Option<InMemory>,
}

/// A file system in memory, as large as need be.
struct InMemory(TempDir);

impl InMemory {
    /// `kind` is `tmpfs`, or `ramfs`, whose files cannot be punched.
    fn new(kind: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let options = Some("mode=0777");
        mount(Some(kind), dir.path(), Some(kind), MsFlags::empty(), options).unwrap();
        Self(dir)
    }
}

impl Drop for InMemory {
    fn drop(&mut self) {
        let _ = umount2(self.0.path(), MntFlags::MNT_DETACH);
    }
}

impl Dumped {
    fn new(state: &str) -> Self {
        let mut live = Live::workload(state);
        live.images_name = "chain/1";
        live.dump_running(&[]);
        live.images_name = "chain/2";
        live.dump(&["--prev-images-dir", "../1"]);
        Self { live, mounted: None, _memory: None }
    }

    /// Lets the restores that come see the images this way.
    fn see(&mut self, way: Way) {
        self.live.images_name = "chain/2";
        if let Way::Mounted(option) = way {
            let mnt = self.live.path("mnt");
            self.mounted = Some(Mounted::new(&self.live.path("chain"), &mnt, &[option]));
            self.live.images_name = "mnt";
        }
    }

    /// Ends the mount, if there is one.
    fn unmount(&mut self) {
        let chain = self.live.path("chain");
        drop(self.mounted.take());
        self.live.images_name = "chain/2";
        // The daemon was killed, and so is its lock gone.
        Chain::open(&chain).unwrap();
    }

    fn log(&self, name: &str) -> [String; 2] {
        ["-W".to_owned(), text(&self.live.path(name)).to_owned()]
    }

    /// Returns how many pages of all layers are there, and how many of them are gone.
    fn pages(&self) -> (u64, u64) {
        let chain = Chain::open(&self.live.path("chain")).unwrap();
        let totals = chain.ids().map(|id| Summary::of(&chain, id).unwrap().total());
        totals.fold((0, 0), |(present, punched), total| {
            (present + total.present, punched + total.punched)
        })
    }

    /// Returns how many pages the newest snapshot finds.
    fn found(&self) -> u64 {
        let chain = Chain::open(&self.live.path("chain/2")).unwrap();
        let tip = chain.choose(None).unwrap();
        let memories = chain.memories(tip).unwrap();
        memories.iter().map(|memory| chain.index(tip, *memory).unwrap().stored_pages()).sum()
    }
}

#[test]
fn privileged_restores_free_what_they_restore_and_nothing_else() {
    require(Cap::Fuse);
    require(Cap::Ptrace);
    // Private memory, a tree that shares pages copy-on-write, and all kinds of shared
    // memory.
    for state in ["private_anon", "cow_tree", "shared_anon_parts", "memfd_mapping", "sysv_shm"] {
        for way in WAYS {
            for when in ["--auto-dedup", "--auto-dedup=now"] {
                // What frees by itself, or later, does so whenever it is punched.
                let itself = matches!(way, Way::Mounted("--punch=on-read" | "--punch=commit"));
                if itself && when == "--auto-dedup=now" && state != "cow_tree" {
                    continue;
                }
                let what = format!("{state} {way:?} {when}");
                let mut dumped = Dumped::new(state);
                let found = dumped.found();
                let (_, before) = dumped.pages();
                dumped.see(way);
                fs::create_dir(dumped.live.path("log")).unwrap();
                let log = dumped.log("log");
                let arguments = [when, &log[0], &log[1]];
                let output = dumped.live.try_restore(&arguments);
                let said = String::from_utf8_lossy(&output.stderr).into_owned();
                assert!(output.status.success(), "{what}: {said}");
                if way == Way::Direct {
                    assert!(
                        said.contains("restored once its pages are freed: 1"),
                        "{what}: {said}"
                    );
                }
                dumped.live.verdict();
                if way == Way::Mounted("--punch=commit") {
                    assert!(said.contains("`imgfs commit"), "{what}: {said}");
                    assert_eq!(dumped.pages().1, before, "{what}");
                    let commit = imgfs(&["commit", text(&dumped.live.path("mnt"))]);
                    assert!(commit.status.success(), "{what}");
                }
                dumped.unmount();
                assert_eq!(dumped.pages().1 - before, found, "{what}");
                let chain = Chain::open(&dumped.live.path("chain/2")).unwrap();
                chain.require_whole(chain.choose(None).unwrap()).unwrap_err();
                dumped.live.kill();
                // From the chain, and from a mount, whose pagemaps do not tell.
                for again in [Way::Direct, way] {
                    dumped.see(again);
                    let output = dumped.live.try_restore(&[&log[0], &log[1]]);
                    let why = String::from_utf8_lossy(&output.stderr);
                    assert!(
                        !output.status.success() && why.contains("were freed"),
                        "{what}: {why}"
                    );
                    dumped.unmount();
                }
            }
        }
    }
}

#[test]
fn privileged_restores_that_fail_leave_images_that_restore() {
    require(Cap::Fuse);
    require(Cap::Ptrace);
    for way in [Way::Direct, Way::Mounted("--punch"), Way::Mounted("--punch=commit")] {
        let mut dumped = Dumped::new("cow_tree");
        let pages = dumped.pages();
        let points = Point::ALL.iter().map(|point| point.name());
        for point in points.filter(|name| name.starts_with("restore-")) {
            dumped.see(way);
            let _ = fs::create_dir(dumped.live.path("log"));
            let log = dumped.log("log");
            dumped.live.fault = Some(point.to_owned());
            let output = dumped.live.try_restore(&["--auto-dedup", &log[0], &log[1]]);
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(!output.status.success(), "{way:?} {point}: {said}");
            assert!(said.contains(&format!("fault injected at {point}")), "{way:?}: {said}");
            dumped.live.wait_gone();
            dumped.unmount();
            assert_eq!(dumped.pages(), pages, "{way:?} {point}");
        }
        dumped.live.fault = None;
        dumped.live.restore(&[]);
        dumped.live.verdict();
    }
}

/// A process with as much private memory as this, dumped onto tmpfs.
fn holder(mib: u32) -> Dumped {
    let tmpfs = InMemory::new("tmpfs");
    let dir = tempfile::tempdir_in(tmpfs.0.path()).unwrap();
    let path = text(dir.path()).to_owned();
    let arguments = ["-c", HOLDER, &mib.to_string(), "0", &path];
    let mut live = Live::program("/usr/bin/python3", &arguments, dir);
    wait_for_large("its memory", || {
        fs::read_to_string(live.path("status")).is_ok_and(|text| text == "ready\n")
    });
    live.images_name = "chain/2";
    live.dump(&[]);
    Dumped { live, mounted: None, _memory: Some(tmpfs) }
}

#[test]
fn privileged_a_restore_that_fails_after_it_has_freed_says_so() {
    require(Cap::Ptrace);
    let mut dumped = holder(40);
    dumped.live.fault = Some("restore-last".to_owned());
    let output = dumped.live.try_restore(&["--auto-dedup=now"]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let lost = "pages were freed in the images before the restore failed";
    assert!(!output.status.success() && said.contains(lost), "{said}");
    assert!(said.contains("fault injected at restore-last"), "{said}");
    dumped.live.wait_gone();
    dumped.live.fault = None;
    let output = dumped.live.try_restore(&[]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains("were freed"), "{said}");
}

#[test]
fn privileged_what_cannot_be_freed_after_a_restore_is_told_and_the_tree_runs() {
    require(Cap::Ptrace);
    let mut dumped = Dumped::new("private_anon");
    dumped.live.fault = Some("free-half".to_owned());
    let output = dumped.live.try_restore(&["--auto-dedup"]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
    assert!(said.contains("is restored, but not all of its pages were freed"), "{said}");
    dumped.live.verdict();
}

/// Memory that is restored where it must not be there twice.
const PEAK_MIB: u32 = 384;

#[test]
fn privileged_a_restore_that_frees_as_it_goes_does_not_need_the_memory_twice() {
    require(Cap::Fuse);
    require(Cap::Ptrace);
    let ways = [
        (Way::Direct, "--auto-dedup"),
        (Way::Direct, "--auto-dedup=now"),
        (Way::Mounted("--punch"), "--auto-dedup=now"),
        (Way::Mounted("--punch=on-read"), "--auto-dedup"),
    ];
    for (way, when) in ways {
        let mut dumped = holder(PEAK_MIB);
        let chain = dumped.live.path("chain");
        let images = images_bytes(&chain);
        assert!(images >= u64::from(PEAK_MIB) << 20);
        dumped.see(way);
        fs::create_dir(dumped.live.path("log")).unwrap();
        let log = dumped.log("log");
        let arguments = [when, &log[0], &log[1]];
        let pid = dumped.live.root.as_raw();
        let (output, peak) = private_peak(&chain, pid, || dumped.live.try_restore(&arguments));
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{way:?}: {said}");
        if (way, when) == (Way::Direct, "--auto-dedup") {
            // Which shows that it is seen.
            assert!(peak * 10 >= images * 19, "{way:?}: {peak} bytes for {images}");
        } else {
            // A tenth more than what is restored.
            assert!(peak * 10 <= images * 11, "{way:?}: {peak} bytes for {images}");
        }
        fs::write(dumped.live.path("status.go"), "").unwrap();
        wait_for_large("the verdict", || {
            fs::read_to_string(dumped.live.path("status")).is_ok_and(|text| text == "ok\n")
        });
        dumped.unmount();
        assert!(images_bytes(&chain) * 10 < images, "{way:?}");
    }
}

#[test]
fn privileged_an_interrupted_restore_leaves_no_zeros() {
    require(Cap::Ptrace);
    let free = Point::ALL.iter().map(|point| point.name()).filter(|name| name.starts_with("free-"));
    for point in free {
        let mut dumped = Dumped::new("shared_anon_parts");
        let bytes = everything(&dumped.live.path("chain/2"));
        dumped.live.fault = Some(format!("{point}:kill"));
        let output = dumped.live.try_restore(&["--auto-dedup"]);
        assert!(!output.status.success(), "{point} is never hit");
        // The tree runs: its images are of no account, but do not lie.
        dumped.live.verdict();
        for (memory, page, expected) in &bytes {
            let chain = Arc::new(Chain::open(&dumped.live.path("chain/2")).unwrap());
            let tip = chain.choose(None).unwrap();
            let index = chain.index(tip, *memory).unwrap();
            let memory = MemoryBytes::new(chain, index, PageIndex::END.address());
            let mut found = vec![0; PAGE];
            if read_at(&memory, page.address(), &mut found).is_ok() {
                assert_eq!(&found, expected, "{point} at {page}");
            }
        }
    }
}

/// Returns every stored page of a snapshot.
fn everything(dir: &Path) -> Vec<(MemoryId, PageIndex, Vec<u8>)> {
    let chain = Arc::new(Chain::open(dir).unwrap());
    let tip = chain.choose(None).unwrap();
    let mut pages = Vec::new();
    for id in chain.memories(tip).unwrap() {
        let index = chain.index(tip, id).unwrap();
        let memory = MemoryBytes::new(Arc::clone(&chain), Arc::clone(&index), u64::MAX);
        for extent in index.extents() {
            for page in (extent.first.0..extent.end().0).map(PageIndex) {
                let mut bytes = vec![0; PAGE];
                read_at(&memory, page.address(), &mut bytes).unwrap();
                pages.push((id, page, bytes));
            }
        }
    }
    pages
}

#[test]
fn privileged_a_dump_on_top_of_freed_pages_stores_them() {
    require(Cap::Fuse);
    require(Cap::Ptrace);
    for track in [false, true] {
        let track: &[&str] = if track { &["--track-mem"] } else { &[] };
        let mut live = Live::workload("cow_tree");
        live.images_name = "chain/1";
        live.dump_running(track);
        // Half of everything, at once.
        let chain = live.path("chain");
        let mounted = Mounted::new(&chain, &live.path("mnt"), &["--punch=commit"]);
        let mut punched = 0;
        for entry in fs::read_dir(&mounted.point).unwrap().flatten() {
            if entry.file_name().to_str().unwrap().starts_with("pages-") {
                let file = writable(&entry.path()).unwrap();
                let pages = file.metadata().unwrap().len() / PAGE as u64;
                for page in (0..pages).step_by(256) {
                    let end = pages.min(page + 128);
                    punch_pages(&file, page..end);
                    punched += end - page;
                }
            }
        }
        assert!(imgfs(&["commit", text(&mounted.point)]).status.success());
        drop(mounted);
        live.images_name = "chain/2";
        live.dump(&[&["--prev-images-dir", "../1"], track].concat());
        let chain = Chain::open(&chain).unwrap();
        let tip = chain.choose(None).unwrap();
        chain.require_whole(tip).unwrap();
        let counts = Summary::of(&chain, tip).unwrap().total();
        // What is not gone is still left to the parent.
        assert!(counts.in_parent > 0 && counts.present >= punched / 2, "{counts:?}");
        live.restore(&[]);
        live.verdict();
    }
}

#[test]
fn privileged_a_restore_killed_at_any_moment_leaves_no_zeros() {
    require(Cap::Ptrace);
    for round in 0..6_u64 {
        let mut dumped = holder(96);
        let chain = dumped.live.path("chain");
        let bytes = everything(&dumped.live.path("chain/2"));
        let begun = images_bytes(&chain);
        let mut command = Command::new(engine());
        command.arg("restore").arg("-D").arg(dumped.live.images()).args(["-d", "--auto-dedup=now"]);
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        // After some pages were freed, and whatever it is at then.
        let some = round * (12 << 20);
        wait_for("some pages", || {
            begun - images_bytes(&chain) >= some || child.try_wait().unwrap().is_some()
        });
        child.kill().unwrap();
        child.wait().unwrap();
        for pid in dumped.live.tree() {
            // What was not let go yet ends with the restore.
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        dumped.live.wait_gone();
        let mut gone = 0;
        let opened = Arc::new(Chain::open(&dumped.live.path("chain/2")).unwrap());
        let tip = opened.choose(None).unwrap();
        for (memory, page, expected) in &bytes {
            let index = opened.index(tip, *memory).unwrap();
            let memory = MemoryBytes::new(Arc::clone(&opened), index, PageIndex::END.address());
            let mut found = vec![0; PAGE];
            match read_at(&memory, page.address(), &mut found) {
                Ok(_) => assert_eq!(&found, expected, "{round}: {page}"),
                Err(_) => gone += 1,
            }
        }
        let check = imgfs(&["check", text(&chain)]);
        assert_eq!(check.status.success(), gone == 0, "{round}: {gone} are gone");
        let output = dumped.live.try_restore(&[]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.success(), gone == 0, "{round}: {gone} are gone: {said}");
    }
}
