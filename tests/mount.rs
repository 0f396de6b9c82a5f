//! A mount as programs see it.
//!
//! All tests but those of the command line need root and `/dev/fuse`.

mod common;

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Seek, SeekFrom, Write},
    os::unix::{
        ffi::OsStringExt,
        fs::{FileExt, MetadataExt, PermissionsExt},
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::mpsc,
    time::Duration,
};

use common::{
    Cap,
    chain::{Entry, PAGE, TestChain, page_bytes},
    is_mounted,
    mounted::{Detach, IMGFS, Mounted, PATIENCE, imgfs, wait_for},
    require,
};
use memmap2::{MmapOptions, MmapRaw};
use nix::{
    errno::Errno,
    sys::signal::Signal,
    unistd::{Whence, lseek},
};
use rcriu::{
    chain::DIRECTORY_XATTR,
    image::{MemoryId, Pagemap, Presence},
};
use tempfile::TempDir;

const APP: MemoryId = MemoryId::Private(7);
const LONE: MemoryId = MemoryId::Private(8);
const OBJECT: MemoryId = MemoryId::Shared(1024);

/// Pages of an object between two stretches of data.
const GAP: u64 = 300;

use Presence::{Parent, Present};

/// A directory with a chain of three snapshots and a place to mount it.
struct Scene {
    dir: TempDir,
    chain: TestChain,
}

impl Scene {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut chain = TestChain::new(&dir.path().join("chain"));
        let base = chain.layer("1");
        chain.memory(base, APP, 1, &[(16, 600, Present), (1000, 40, Present)]);
        chain.memory(base, LONE, 2, &[(1, 700, Present)]);
        chain.memory(base, OBJECT, 3, &[(0, 20, Present), (20 + GAP, 30, Present)]);
        let middle = chain.layer("2");
        let alternating: Vec<_> =
            (16..616).map(|page| (page, 1, if page % 2 == 0 { Present } else { Parent })).collect();
        chain.memory(middle, APP, 1, &alternating);
        chain.memory(middle, LONE, 2, &[(1, 700, Parent)]);
        chain.memory(middle, OBJECT, 3, &[(0, 20, Parent), (20 + GAP, 30, Parent)]);
        let tip = chain.layer("3");
        chain.memory(tip, APP, 1, &[(16, 100, Parent), (116, 300, Present), (416, 200, Parent)]);
        chain.memory(tip, LONE, 2, &[(1, 700, Parent)]);
        chain.memory(tip, OBJECT, 3, &[(0, 10, Parent), (10, 10, Present), (20 + GAP, 30, Parent)]);
        Self { dir, chain }
    }

    fn point(&self) -> PathBuf {
        let point = self.dir.path().join("mnt");
        fs::create_dir_all(&point).unwrap();
        point
    }

    fn mount(&self) -> Mounted {
        self.mount_with(&[])
    }

    fn mount_with(&self, arguments: &[&str]) -> Mounted {
        Mounted::new(self.chain.root(), &self.point(), arguments)
    }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Runs a shell command and returns what it prints, or fails with its errors.
#[track_caller]
fn sh(script: &str) -> String {
    let output = Command::new("bash").args(["-euo", "pipefail", "-c", script]).output().unwrap();
    assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn errno<T: std::fmt::Debug>(result: io::Result<T>) -> Errno {
    Errno::from_raw(result.unwrap_err().raw_os_error().unwrap())
}

#[test]
fn privileged_files_are_flat_and_have_the_bytes_of_the_chain() {
    require(Cap::Fuse);
    let scene = Scene::new();
    let mounted = scene.mount();
    for (layer, name) in [(2, ""), (0, "snapshots/1/"), (1, "snapshots/2/"), (2, "snapshots/3/")] {
        for (memory, pages) in [(APP, 1), (LONE, 2), (OBJECT, 3)] {
            let path = mounted.path(&format!("{name}{}", memory.pagemap_name()));
            let pagemap = Pagemap::read(&path).unwrap();
            assert_eq!(pagemap.pages_id, pages);
            assert!(pagemap.entries.iter().all(|entry| entry.presence == Present));
            let listed: Vec<u64> = pagemap
                .entries
                .iter()
                .flat_map(|entry| entry.first.0..entry.first.0 + entry.pages)
                .collect();
            let resolved = scene.chain.resolve(layer, memory);
            assert_eq!(listed, resolved.keys().copied().collect::<Vec<_>>());
            assert!(
                mounted.read(&format!("{name}pages-{pages}.img"))
                    == scene.chain.flat_pages(layer, memory),
                "{name}{memory}"
            );
        }
        let object = mounted.read(&format!("{name}shmem/1024"));
        assert!(object == scene.chain.in_place(layer, OBJECT), "{name}");
        let inventory = mounted.read(&format!("{name}inventory.img"));
        assert_eq!(inventory, fs::read(scene.chain.dir(layer).join("inventory.img")).unwrap());
        assert_eq!(errno(fs::read_link(mounted.path(&format!("{name}parent")))), Errno::ENOENT);
    }
    let chosen =
        Mounted::new(scene.chain.root(), &scene.dir.path().join("other"), &["--snapshot", "1"]);
    assert!(chosen.read("pages-1.img") == scene.chain.flat_pages(0, APP));
}

#[test]
fn privileged_reads_of_all_sizes_and_places_agree() {
    require(Cap::Fuse);
    let scene = Scene::new();
    let mounted = scene.mount_with(&["--threads", "3"]);
    for (name, expected) in [
        ("pages-1.img", scene.chain.flat_pages(2, APP)),
        ("pages-2.img", scene.chain.flat_pages(2, LONE)),
        ("shmem/1024", scene.chain.in_place(2, OBJECT)),
    ] {
        let file = File::open(mounted.path(name)).unwrap();
        let mut buffer = vec![0xa5; 3 << 20];
        for length in [1, 511, 4096, 65_535, 65_536, 70_001, 1 << 20, (1 << 20) + 1, 3 << 20] {
            for offset in [0, 1, 4095, 4096, 100_000, 409_600, expected.len() - 1, expected.len()] {
                let read = file.read_at(&mut buffer[..length], offset as u64).unwrap();
                let end = expected.len().min(offset + length);
                assert!(buffer[..read] == expected[offset..end], "{name} {length} at {offset}");
            }
        }
        let mut whole = Vec::new();
        File::open(mounted.path(name)).unwrap().read_to_end(&mut whole).unwrap();
        assert!(whole == expected);
    }
}

#[test]
fn privileged_a_file_can_be_mapped_shared_and_private() {
    require(Cap::Fuse);
    let scene = Scene::new();
    let mounted = scene.mount();
    for (name, expected) in [
        ("pages-1.img", scene.chain.flat_pages(2, APP)),
        ("pages-2.img", scene.chain.flat_pages(2, LONE)),
    ] {
        let file = File::open(mounted.path(name)).unwrap();
        // Reading goes on beside the mapping, and a second handle is opened.
        let shared = MmapOptions::new().map_raw_read_only(&file).unwrap();
        let again = File::open(mounted.path(name)).unwrap();
        let mut copied = vec![0; expected.len()];
        again.read_exact_at(&mut copied, 0).unwrap();
        assert!(copied == expected);
        assert!(mapped_bytes(&shared) == expected);
        let private = sh(&format!(
            "python3 -c '
import mmap, sys
f = open(sys.argv[1], \"rb\")
m = mmap.mmap(f.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
m[0] = m[0] ^ 0xff
sys.stdout.write(str(m[0] ^ 0xff))' {}",
            mounted.path(name).display()
        ));
        assert_eq!(private, expected[0].to_string());
        assert_eq!(fs::read(mounted.path(name)).unwrap()[0], expected[0]);
    }
}

/// Copies a mapping's bytes by a system call, which needs no `unsafe`.
fn mapped_bytes(mapping: &MmapRaw) -> Vec<u8> {
    let (address, len) = (mapping.as_ptr() as u64, mapping.len());
    let mut bytes = vec![0; len];
    File::open("/proc/self/mem").unwrap().read_exact_at(&mut bytes, address).unwrap();
    bytes
}

#[test]
fn privileged_sizes_holes_and_copies_are_true() {
    require(Cap::Fuse);
    require(Cap::Program("rsync"));
    let scene = Scene::new();
    let mounted = scene.mount();
    let object = scene.chain.in_place(2, OBJECT);
    let path = mounted.path("shmem/1024");
    let meta = fs::metadata(&path).unwrap();
    assert_eq!(meta.len(), object.len() as u64);
    assert_eq!(meta.blocks(), 50 * 8, "fifty pages are stored");

    let file = File::open(&path).unwrap();
    let page = |number: i64| number * 4096;
    let hole = lseek(&file, 0, Whence::SeekHole).unwrap();
    let data = lseek(&file, hole, Whence::SeekData).unwrap();
    assert_eq!([hole, data], [page(20), page(20 + 300)]);
    assert_eq!(lseek(&file, data, Whence::SeekHole).unwrap(), page(350));
    assert_eq!(lseek(&file, page(350), Whence::SeekData).unwrap_err(), Errno::ENXIO);
    // The file that the kernel reads by itself is asked about here as well.
    let whole = File::open(mounted.path("pages-2.img")).unwrap();
    assert_eq!(lseek(&whole, 0, Whence::SeekHole).unwrap(), page(700));

    let out = scene.dir.path().join("out");
    fs::create_dir(&out).unwrap();
    let (from, to) = (mounted.point.display(), out.display());
    sh(&format!("cp --sparse=always {from}/shmem/1024 {to}/copy"));
    assert!(fs::read(out.join("copy")).unwrap() == object);
    assert!(fs::metadata(out.join("copy")).unwrap().blocks() < 60 * 8);
    sh(&format!(
        "tar -C {from} -cSf {to}/images.tar . && mkdir {to}/x && tar -C {to}/x -xf {to}/images.tar"
    ));
    sh(&format!("diff -r {from} {to}/x"));
    assert_eq!(sh(&format!("du -k {from}/shmem/1024")).split_once('\t').unwrap().0, "200");
    let listed = sh(&format!("ls -ls {from}/shmem/1024"));
    let fields: Vec<&str> = listed.split_whitespace().collect();
    assert_eq!((fields[0], fields[5]), ("200", object.len().to_string().as_str()));
    sh(&format!("rsync -aS --exclude=mem {from}/ {to}/y && diff -r {from}/shmem {to}/y/shmem"));
    assert_ne!(sh(&format!("df --output=size {from} | tail -1")).trim(), "0");
}

#[test]
fn privileged_restorers_are_told_where_the_images_are() {
    require(Cap::Fuse);
    let scene = Scene::new();
    let mount = scene.mount();
    let told = |name: &str| rcriu::sys::xattr::get(&mount.path(name), DIRECTORY_XATTR);
    let dir = |layer| scene.chain.dir(layer).canonicalize().unwrap().into_os_string().into_vec();
    assert_eq!(told("."), Ok(dir(2)));
    assert_eq!(told("snapshots/1"), Ok(dir(0)));
    for other in ["snapshots", "mem", "inventory.img"] {
        assert_eq!(told(other), Err(Errno::ENODATA), "{other}");
    }
    assert_eq!(rcriu::sys::xattr::get(&mount.path("."), "user.other"), Err(Errno::ENODATA));
}

#[test]
fn privileged_inode_numbers_outlive_the_mount() {
    require(Cap::Fuse);
    let scene = Scene::new();
    let list = |mounted: &Mounted| {
        sh(&format!("cd {} && find . -printf '%i %p\\n' | sort -k 2", mounted.point.display()))
    };
    let mut first = scene.mount();
    let before = list(&first);
    assert!(imgfs(&["umount", text(&first.point)]).status.success());
    assert!(first.wait().success());
    drop(first);
    assert_eq!(list(&scene.mount()), before);
    assert!(before.lines().count() > 30);
}

#[test]
fn privileged_nothing_can_be_written() {
    require(Cap::Fuse);
    let scene = Scene::new();
    let mounted = scene.mount();
    let image = mounted.path("pages-1.img");
    assert_eq!(errno(OpenOptions::new().write(true).open(&image)), Errno::EROFS);
    assert_eq!(errno(File::create(mounted.path("new"))), Errno::EROFS);
    assert_eq!(errno(fs::create_dir(mounted.path("new"))), Errno::EROFS);
    assert_eq!(errno(fs::remove_file(&image)), Errno::EROFS);
    assert_eq!(errno(fs::rename(&image, mounted.path("new"))), Errno::EROFS);
    assert_eq!(errno(fs::hard_link(&image, mounted.path("new"))), Errno::EROFS);
    assert_eq!(errno(fs::set_permissions(&image, fs::Permissions::from_mode(0o600))), Errno::EROFS);
    assert_eq!(fs::metadata(&image).unwrap().mode() & 0o222, 0);
    assert_eq!(errno(fs::metadata(mounted.path("none"))), Errno::ENOENT);
    let options = sh(&format!("findmnt -no OPTIONS,FSTYPE,SOURCE {}", mounted.point.display()));
    for expected in ["ro,nosuid,nodev", "fuse.imgfs", text(scene.chain.root())] {
        assert!(options.contains(expected), "{options}");
    }
    assert!(!options.contains("allow_other"));
}

/// What `cat` says as a user without rights.
fn as_nobody(path: &Path) -> (bool, String) {
    let output = Command::new("setpriv")
        .args(["--reuid=65534", "--regid=65534", "--clear-groups", "cat"])
        .arg(path)
        .output()
        .unwrap();
    (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn privileged_mounts_are_listed_and_none_lies_over_another() {
    require(Cap::Fuse);
    let scene = Scene::new();
    let listed = || {
        let output = imgfs(&["mounts", "--json"]);
        let document: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        let here = scene.point().canonicalize().ok();
        let mounts = document["mounts"].as_array().unwrap().clone();
        let ours = mounts.into_iter().find(|mount| {
            here.as_ref().is_some_and(|here| mount["mount_point"] == here.to_str().unwrap())
        });
        ours.map(|mount| ["chain", "daemon", "log"].map(|field| mount[field].clone()))
    };
    assert_eq!(listed(), None);
    let mounted = scene.mount();
    let chain = scene.chain.root().canonicalize().unwrap();
    let log = mounted.log.to_str().unwrap();
    let expected = [chain.to_str().unwrap().into(), mounted.pid().as_raw().into(), log.into()];
    assert_eq!(listed(), Some(expected));
    let point = scene.point();
    let again = imgfs(&["mount", chain.to_str().unwrap(), point.to_str().unwrap()]);
    let words = String::from_utf8_lossy(&again.stderr).into_owned();
    assert!(!again.status.success() && words.contains("\n  help: run `imgfs umount"), "{words}");
    drop(mounted);
    assert_eq!(listed(), None);
}

/// What an ordinary user lacks is named, with what to do about it.
#[test]
fn privileged_an_ordinary_user_is_told_what_to_do() {
    require(Cap::Fuse);
    require(Cap::Program("setpriv"));
    require(Cap::Program("fusermount3"));
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let mut chain = TestChain::new(&dir.path().join("chain"));
    let layer = chain.layer("1");
    chain.memory(layer, APP, 1, &[(16, 4, Presence::Present)]);
    let [program, point, roots] = ["imgfs", "mnt", "roots"].map(|name| dir.path().join(name));
    fs::copy(IMGFS, &program).unwrap();
    fs::create_dir(&point).unwrap();
    fs::create_dir(&roots).unwrap();
    sh(&format!("chown -R 65534:65534 {} {}", text(chain.root()), text(&point)));
    let _detach = Detach(point.clone());
    let nobody = "setpriv --reuid=65534 --regid=65534 --clear-groups env";
    let mount = format!("{} mount {}", text(&program), text(chain.root()));
    let run = |before: &str, path: &str, rest: &str| {
        let line = format!("{before} exec {nobody} PATH={path} {mount} {rest}");
        let output = Command::new("unshare").args(["-m", "sh", "-c", &line]).output().unwrap();
        let said = [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes));
        (output.status.success(), said.concat())
    };
    // Images that the user cannot read are not shown as empty ones.
    let inventory = chain.dir(layer).join("inventory.img");
    sh(&format!("chown root {0} && chmod 600 {0}", text(&inventory)));
    let (mounted, said) = run("", "/usr/bin:/bin", text(&point));
    assert!(
        !mounted && said.contains("help: run imgfs as root, or as the user who owns"),
        "{said}"
    );
    sh(&format!("chown 65534 {}", text(&inventory)));
    let tmpfs = "mount -t tmpfs none /dev &&";
    let own = text(&point);
    let allowed = fs::read_to_string("/etc/fuse.conf")
        .is_ok_and(|conf| conf.lines().any(|line| line.trim() == "user_allow_other"));
    let others = format!("{own} --allow-other");
    for (before, path, rest, wanted) in [
        (tmpfs, "/usr/bin:/bin", own, "help: load the kernel module: `modprobe fuse`"),
        ("", "/nowhere", own, "install fusermount3: `apt-get install fuse3`"),
        ("", "/usr/bin:/bin", text(&roots), "help: choose a directory of your own"),
        ("", "/usr/bin:/bin", &others, "add the line user_allow_other to /etc/fuse.conf"),
    ] {
        if allowed && rest == others {
            continue;
        }
        let (mounted, said) = run(before, path, rest);
        assert!(!mounted && said.contains(wanted), "{wanted}: {said}");
        assert!(!is_mounted(&point), "{wanted}");
    }
}

#[test]
fn privileged_only_the_owner_gets_in_unless_others_are_allowed() {
    require(Cap::Fuse);
    require(Cap::Program("setpriv"));
    let scene = Scene::new();
    fs::set_permissions(scene.dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let mounted = scene.mount();
    let (read, message) = as_nobody(&mounted.path("inventory.img"));
    assert!(!read && message.contains("Permission denied"), "{message}");
    drop(mounted);

    // New images are their owner's alone.
    for entry in fs::read_dir(scene.chain.dir(2)).unwrap() {
        let path = entry.unwrap().path();
        if !path.is_symlink() {
            fs::set_permissions(path, fs::Permissions::from_mode(0o644)).unwrap();
        }
    }
    let secret = scene.chain.dir(2).join("pagemap-8.img");
    fs::set_permissions(secret, fs::Permissions::from_mode(0o600)).unwrap();
    let mounted = scene.mount_with(&["--allow-other"]);
    assert!(as_nobody(&mounted.path("inventory.img")).0);
    assert!(as_nobody(&mounted.path("pages-1.img")).0);
    // Images that are their owner's alone stay so.
    assert!(!as_nobody(&mounted.path("pages-2.img")).0);
}

#[test]
fn privileged_the_command_returns_when_the_mount_can_be_used() {
    require(Cap::Fuse);
    let scene = Scene::new();
    let point = scene.point();
    let _detach = Detach(point.clone());
    // A pipe that the daemon kept open would keep the shell waiting.
    let (chain, at) = (scene.chain.root().display(), point.display());
    let script =
        format!("exec 7> >(cat); said=$({IMGFS} mount {chain} {at} 2>&1); echo \"[$said]\"");
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || sender.send(sh(&script)));
    let said = receiver.recv_timeout(PATIENCE).expect("the command returns");
    assert!(said.starts_with("[mounted ") && !said.contains("warning: "), "{said}");
    assert!(fs::read(point.join("pages-1.img")).unwrap() == scene.chain.flat_pages(2, APP));
    let again = imgfs(&["umount", text(&point)]);
    assert!(again.status.success(), "{again:?}");
    assert!(!is_mounted(&point));
    let none = imgfs(&["umount", text(&point)]);
    assert_eq!(none.status.code(), Some(1));
    assert_eq!(
        String::from_utf8_lossy(&none.stderr),
        format!("imgfs: nothing is mounted at {}\n", point.display())
    );
}

#[test]
fn what_cannot_be_mounted_is_said_by_the_command() {
    let scene = Scene::new();
    let (point, chain) = (scene.point(), text(scene.chain.root()).to_owned());
    let refused = |chain: &str, point: &str, code: i32, message: &str| {
        let output = imgfs(&["mount", chain, point]);
        assert_eq!(output.status.code(), Some(code));
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(said.contains(message), "{said}");
        assert!(!is_mounted(Path::new(point)));
    };
    refused(&format!("{chain}/none"), text(&point), 1, "No such file or directory");
    refused(text(&point), text(&point), 1, "no image directory at");
    refused(&chain, &format!("{chain}/none"), 1, "does not exist\n  help: make it: `mkdir ");
    refused(&chain, &format!("{chain}/1/inventory.img"), 1, "is not a directory");
    for hiding in [chain.clone(), format!("{chain}/2"), text(scene.dir.path()).to_owned()] {
        refused(&chain, &hiding, 1, "would hide");
    }
    let output = imgfs(&["mount", "-o", "ro,nope", &chain, text(&point)]);
    assert_eq!(output.status.code(), Some(2));
    assert_eq!(String::from_utf8_lossy(&output.stderr), "imgfs: unknown mount option nope\n");
    let foreign = imgfs(&["umount", "/proc"]);
    assert_eq!(foreign.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&foreign.stderr).contains("is a mount of type proc"));
}

#[test]
fn privileged_signals_and_others_unmount() {
    require(Cap::Fuse);
    let scene = Scene::new();
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let mut mounted = scene.mount();
        mounted.signal(signal);
        assert_eq!(mounted.wait().code(), Some(0));
        assert!(!is_mounted(&mounted.point));
    }
    let mut mounted = scene.mount();
    sh(&format!("umount {}", mounted.point.display()));
    assert_eq!(mounted.wait().code(), Some(0));
}

#[test]
fn privileged_a_mount_in_use_is_detached_and_served_to_the_end() {
    require(Cap::Fuse);
    let scene = Scene::new();
    let expected = scene.chain.flat_pages(2, APP);
    for lazily in [true, false] {
        let mut mounted = scene.mount();
        let mut file = File::open(mounted.path("pages-1.img")).unwrap();
        let busy = imgfs(&["umount", text(&mounted.point)]);
        assert_eq!(busy.status.code(), Some(1));
        assert!(String::from_utf8_lossy(&busy.stderr).contains("is busy\n  help: `fuser -vm"));
        assert!(is_mounted(&mounted.point));
        if lazily {
            assert!(imgfs(&["umount", "--lazy", text(&mounted.point)]).status.success());
        } else {
            mounted.signal(Signal::SIGTERM);
        }
        wait_for("the unmount", || !is_mounted(&mounted.point));
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).unwrap();
        assert!(bytes == expected);
        drop(file);
        assert_eq!(mounted.wait().code(), Some(0));
    }
    let mut mounted = scene.mount();
    let file = File::open(mounted.path("pages-1.img")).unwrap();
    mounted.signal(Signal::SIGTERM);
    wait_for("the unmount", || !is_mounted(&mounted.point));
    mounted.signal(Signal::SIGTERM);
    assert_eq!(mounted.wait().code(), Some(0), "the second signal ends it at once");
    assert_eq!(errno(file.read_at(&mut [0; 16], 0)), Errno::ENOTCONN);
}

#[test]
fn privileged_a_killed_daemon_fails_readers_and_can_be_unmounted() {
    require(Cap::Fuse);
    let scene = Scene::new();
    let mut mounted = scene.mount();
    let file = File::open(mounted.path("pages-1.img")).unwrap();
    // A reader whose request is not answered, as the daemon is stopped.
    mounted.signal(Signal::SIGSTOP);
    wait_for("all threads to stand still", || {
        let tasks = fs::read_dir(format!("/proc/{}/task", mounted.pid())).unwrap();
        let stat = |task: io::Result<fs::DirEntry>| {
            fs::read_to_string(task.unwrap().path().join("stat")).unwrap()
        };
        tasks.map(stat).all(|stat| stat.contains(") T "))
    });
    let (sender, receiver) = mpsc::channel();
    let path = mounted.path("inventory.img");
    std::thread::spawn(move || sender.send(errno(fs::read(path))));
    let blocked = receiver.recv_timeout(Duration::from_millis(200));
    assert_eq!(blocked, Err(mpsc::RecvTimeoutError::Timeout), "the daemon is stopped");
    mounted.signal(Signal::SIGKILL);
    mounted.wait();
    let failed = receiver.recv_timeout(PATIENCE).expect("the reader gets an answer");
    assert!([Errno::ENOTCONN, Errno::ECONNABORTED].contains(&failed), "{failed}");
    assert_eq!(errno(file.read_at(&mut [0; 16], 0)), Errno::ENOTCONN);
    assert!(is_mounted(&mounted.point));
    drop(file);
    let output = imgfs(&["umount", text(&mounted.point)]);
    assert!(output.status.success(), "{output:?}");
    assert!(!is_mounted(&mounted.point));
}

#[test]
fn privileged_missing_bytes_are_errors_with_a_reason() {
    require(Cap::Fuse);
    let scene = Scene::new();
    let mounted = scene.mount();
    let expected = scene.chain.flat_pages(2, APP);
    let file = File::open(mounted.path("pages-1.img")).unwrap();
    let mut buffer = vec![0; expected.len()];
    file.read_exact_at(&mut buffer, 0).unwrap();
    assert!(buffer == expected);

    // The middle layer ends in the middle of a page, under a mapping of it.
    let cut = scene.chain.pages_path(1, 1);
    let whole = fs::metadata(&cut).unwrap().len();
    OpenOptions::new().write(true).open(&cut).unwrap().set_len(whole - 1000).unwrap();
    assert_eq!(errno(file.read_exact_at(&mut buffer, 0)), Errno::EIO);
    for page in 0..expected.len() / PAGE {
        let bytes = &mut buffer[..PAGE];
        match file.read_exact_at(bytes, (page * PAGE) as u64) {
            Ok(()) => assert!(bytes == &expected[page * PAGE..][..PAGE], "page {page}"),
            Err(error) => assert_eq!(errno::<()>(Err(error)), Errno::EIO),
        }
    }
    let log = mounted.log_text();
    assert!(log.contains("read /pages-1.img: ") && log.contains("is cut short: "), "{log}");
    assert!(log.contains("(EIO)"), "{log}");

    // A file that is gone before it was ever opened.
    fs::remove_file(scene.chain.pages_path(0, 3)).unwrap();
    assert_eq!(errno(fs::read(mounted.path("shmem/1024"))), Errno::EIO);
    let log = mounted.log_text();
    assert!(log.contains("/shmem/1024: open ") && log.contains("No such file"), "{log}");
}

#[test]
fn privileged_a_file_that_shrinks_under_a_reader_gives_no_wrong_bytes() {
    require(Cap::Fuse);
    let scene = Scene::new();
    let mounted = scene.mount();
    let expected = scene.chain.flat_pages(2, APP);
    let path = scene.chain.pages_path(1, 1);
    let original = fs::read(&path).unwrap();
    let file = File::open(mounted.path("pages-1.img")).unwrap();
    let mut buffer = vec![0; expected.len()];
    let (mut read, mut failed) = (0, 0);
    for round in 0..200_usize {
        let writer = OpenOptions::new().write(true).open(&path).unwrap();
        let shrink = std::thread::spawn({
            let len = original.len() - round % 50 * PAGE;
            move || writer.set_len(len as u64).map(|()| writer).unwrap()
        });
        match file.read_exact_at(&mut buffer, 0) {
            Ok(()) => {
                assert!(buffer == expected, "round {round}");
                read += 1;
            }
            Err(error) => {
                assert_eq!(errno::<()>(Err(error)), Errno::EIO);
                failed += 1;
            }
        }
        let mut writer = shrink.join().unwrap();
        writer.seek(SeekFrom::Start(0)).unwrap();
        writer.write_all(&original).unwrap();
    }
    assert!(read > 0 && failed > 0, "{read} reads, {failed} failures");
}

#[test]
fn privileged_a_thousand_layers_take_few_descriptors() {
    const LAYERS: usize = 1000;
    require(Cap::Fuse);
    require(Cap::Program("prlimit"));
    let dir = tempfile::tempdir().unwrap();
    let mut chain = TestChain::new(&dir.path().join("chain"));
    for layer in 0..LAYERS {
        chain.layer(&layer.to_string());
        // Every layer has a page of its own, and asks its parent for the rest.
        let page = layer as u64;
        let mut entries = vec![(page, 1, Present)];
        if page > 0 {
            entries.insert(0, (0, page, Parent));
        }
        chain.memory(layer, APP, 1, &entries);
    }
    let mut limited = Command::new("prlimit");
    limited.args(["--nofile=1024", IMGFS]);
    let mounted = Mounted::by(limited, chain.root(), &dir.path().join("mnt"), &[]);
    let bytes = mounted.read("pages-1.img");
    assert_eq!(bytes.len(), LAYERS * PAGE);
    for (layer, page) in bytes.chunks_exact(PAGE).enumerate() {
        assert!(page == page_bytes(layer, APP, layer as u64), "layer {layer}");
    }
    let file = File::open(mounted.path("pages-1.img")).unwrap();
    let mut large = vec![0; 1 << 20];
    for offset in (0..bytes.len() - large.len()).step_by(PAGE * 9) {
        file.read_exact_at(&mut large, offset as u64).unwrap();
        assert!(large == bytes[offset..][..large.len()]);
    }
    let descriptors = fs::read_dir(format!("/proc/{}/fd", mounted.pid())).unwrap().count();
    assert!(descriptors < 600, "{descriptors} are open");
}

#[test]
fn privileged_mount_finds_its_helper() {
    const HELPER: &str = "/sbin/mount.imgfs";
    struct Remove;
    impl Drop for Remove {
        fn drop(&mut self) {
            let _ = fs::remove_file(HELPER);
        }
    }
    require(Cap::Fuse);
    require(Cap::Program("mount"));
    assert!(fs::symlink_metadata(HELPER).is_err(), "{HELPER} is installed: not overwriting it");
    let scene = Scene::new();
    let point = scene.point();
    let _detach = Detach(point.clone());
    // imgfs lies beside the helper, as it does when both are installed.
    let beside = scene.dir.path().join("bin");
    fs::create_dir(&beside).unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("mnt-scripts/mount.imgfs");
    fs::copy(script, beside.join("mount.imgfs")).unwrap();
    std::os::unix::fs::symlink(IMGFS, beside.join("imgfs")).unwrap();
    std::os::unix::fs::symlink(beside.join("mount.imgfs"), HELPER).unwrap();
    let _remove = Remove;

    let (chain, at) = (scene.chain.root().display(), point.display());
    sh(&format!("mount -t imgfs -o snapshot=2 {chain} {at}"));
    assert!(fs::read(point.join("pages-1.img")).unwrap() == scene.chain.flat_pages(1, APP));
    sh(&format!("umount {at}"));
    let table = scene.dir.path().join("fstab");
    fs::write(&table, format!("{chain} {at} imgfs noauto,nofail,x-test=1,snapshot=1 0 0\n"))
        .unwrap();
    sh(&format!("mount --fstab {} {at}", table.display()));
    assert!(fs::read(point.join("pages-1.img")).unwrap() == scene.chain.flat_pages(0, APP));
    sh(&format!("umount {at}"));
    let refused = Command::new("mount")
        .args(["-t", "imgfs", "-o", "nope"])
        .args([scene.chain.root(), &point])
        .output()
        .unwrap();
    assert_eq!(refused.status.code(), Some(32));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("unknown mount option nope"));
}

#[test]
fn privileged_a_restorer_is_run_on_a_mount() {
    require(Cap::Fuse);
    let scene = Scene::new();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("mnt-scripts/restore-from-mount");
    let programs = Path::new(IMGFS).parent().unwrap();
    let path = format!("{}:{}", programs.display(), std::env::var("PATH").unwrap());
    let run = |arguments: &[&str]| {
        Command::new(&script)
            .env("PATH", &path)
            .env("TMPDIR", scene.dir.path())
            .args(arguments)
            .stdin(Stdio::null())
            .output()
            .unwrap()
    };
    let chain = text(scene.chain.root());
    let output =
        run(&["--snapshot", "1", chain, "bash", "-c", "cat \"$1\"/pages-1.img", "x", "{}"]);
    assert!(output.status.success(), "{output:?}");
    assert!(output.stdout == scene.chain.flat_pages(0, APP));
    let output = run(&[chain, "bash", "-c", "echo \"$1\"; exit 7", "x"]);
    assert_eq!((output.status.code(), output.stdout.as_slice()), (Some(7), b"-D\n".as_slice()));
    let left: Vec<_> = fs::read_dir(scene.dir.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .filter(|name| name.to_string_lossy().starts_with("restore-from"))
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn privileged_a_chain_of_ten_thousand_snapshots_is_mounted() {
    require(Cap::Fuse);
    const LAYERS: u64 = 10_000;
    const PAGES: u64 = 100;
    let dir = tempfile::tempdir().unwrap();
    let mut chain = TestChain::new(&dir.path().join("chain"));
    // Page N is in layer N * 100, and asked for through all above.
    let holder = |page: u64| usize::try_from(page * (LAYERS / PAGES)).unwrap();
    for layer in 0..LAYERS {
        let number = chain.layer(&layer.to_string());
        let page = layer / (LAYERS / PAGES);
        let entries = match number {
            0 => vec![(0, PAGES, Present)],
            _ if holder(page) == number => {
                vec![(0, page, Parent), (page, 1, Present), (page + 1, PAGES - page - 1, Parent)]
            }
            _ => vec![(0, PAGES, Parent)],
        };
        let entries: Vec<Entry> = entries.into_iter().filter(|(_, pages, _)| *pages > 0).collect();
        chain.memory(number, APP, 1, &entries);
    }
    let mounted = Mounted::new(chain.root(), &dir.path().join("mnt"), &[]);
    let expected: Vec<u8> =
        (0..PAGES).flat_map(|page| page_bytes(holder(page), APP, page)).collect();
    assert!(mounted.read("pages-1.img") == expected);
    let middle = fs::read(mounted.path("snapshots/4999/pages-1.img")).unwrap();
    let holder = |page| if page < 50 { holder(page) } else { 0 };
    let expected: Vec<u8> =
        (0..PAGES).flat_map(|page| page_bytes(holder(page), APP, page)).collect();
    assert!(middle == expected);
    let open = fs::read_dir(format!("/proc/{}/fd", mounted.pid())).unwrap().count();
    assert!(open < 2048 + 64, "{open} descriptors are open");
}

/// The processors that the threads of a daemon which answer may run on.
fn processors_of(mounted: &Mounted) -> Vec<String> {
    let tasks = fs::read_dir(format!("/proc/{}/task", mounted.pid())).unwrap();
    let of = |task: fs::DirEntry| {
        let status = fs::read_to_string(task.path().join("status")).unwrap();
        let field = |name| status.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim();
        field("Name:").starts_with("fuser").then(|| field("Cpus_allowed_list:").to_owned())
    };
    tasks.filter_map(|task| of(task.unwrap())).collect()
}

#[test]
fn privileged_one_reader_is_answered_on_its_processor() {
    require(Cap::Fuse);
    let scene = Scene::new();
    let mounted = scene.mount_with(&["--threads", "2"]);
    wait_for("the threads", || processors_of(&mounted).len() == 2);
    let free = processors_of(&mounted);
    let path = mounted.path("pages-1.img");
    let read = |file: &File| file.read_exact_at(&mut [0; PAGE], 0).unwrap();
    let own = nix::sched::sched_getaffinity(nix::unistd::Pid::from_raw(0)).unwrap();
    for processor in (0..64).filter(|processor| own.is_set(*processor).unwrap()).take(2) {
        let mut one = nix::sched::CpuSet::new();
        one.set(processor).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &one).unwrap();
                let file = File::open(&path).unwrap();
                (0..300).for_each(|_| read(&file));
                assert!(processors_of(&mounted).contains(&processor.to_string()));
            });
        });
    }
    // Of several, each may be on another processor.
    let file = File::open(&path).unwrap();
    wait_for("the threads to run anywhere", || {
        std::thread::scope(|scope| drop(scope.spawn(|| read(&file))));
        processors_of(&mounted) == free
    });
}
