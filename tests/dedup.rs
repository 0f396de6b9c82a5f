//! Deduplication of dumps that exist: every snapshot holds afterwards what it held
//! before, whatever happens meanwhile, and takes less room.

mod common;

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::Duration,
};

use common::{
    Cap,
    live::{Live, engine, state_of, wait_for, workload},
    loops::LoopMount,
    mounted::{Mounted, imgfs},
    recorder::Recorder,
    require,
    same::{assert_same, assert_same_memory, bytes, open},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use proptest::prelude::*;
use rcriu::{
    chain::{Severity, check, disk_bytes},
    dedup::{DedupError, LinkOptions, Linked, Progress, link},
    fault::Point,
    image::{
        ImageWriter, Kind, MemoryId, PagemapEntry, PagemapWriter, Presence, proto, read_all, vma,
    },
    units::PageIndex,
};

const PAGE: usize = 4096;

/// What a memory holds: a number for each page, from which its bytes are made.
type Pages = BTreeMap<u64, u64>;

/// What a snapshot holds.
type Model = BTreeMap<MemoryId, Pages>;

fn page(value: u64) -> Vec<u8> {
    let mut state = value;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        state.to_le_bytes()
    };
    if value == 0 { vec![0; PAGE] } else { (0..PAGE / 8).flat_map(|_| next()).collect() }
}

fn write<M: prost::Message>(dir: &Path, kind: Kind, number: u64, messages: &[M]) {
    let mut image = ImageWriter::create(&dir.join(kind.file_name(number)), kind).unwrap();
    messages.iter().for_each(|message| image.message(message).unwrap());
    image.finish().unwrap();
}

/// Writes a full dump.
fn snapshot(root: &Path, name: &str, uptime: u64, memories: &Model) -> PathBuf {
    let dir = root.join(name);
    fs::create_dir_all(&dir).unwrap();
    let uptime = Some(uptime);
    let inventory =
        proto::InventoryEntry { img_version: 2, dump_uptime: uptime, ..Default::default() };
    write(&dir, Kind::Inventory, 0, &[inventory]);
    for (pages_id, (memory, pages)) in (1_u32..).zip(memories) {
        let path = dir.join(memory.pagemap_name());
        let image = ImageWriter::create(&path, Kind::Pagemap).unwrap();
        let mut pagemap = PagemapWriter::new(image, pages_id).unwrap();
        for number in pages.keys() {
            let first = PageIndex(*number);
            let presence = Presence::Present;
            pagemap.entry(&PagemapEntry { first, pages: 1, presence, lazy: false }).unwrap();
        }
        pagemap.into_image().finish().unwrap();
        let stored: Vec<u8> = pages.values().flat_map(|value| page(*value)).collect();
        fs::write(dir.join(Kind::Pages.file_name(pages_id.into())), stored).unwrap();
    }
    dir
}

/// Checks that a snapshot holds just this, whatever its objects are called.
fn assert_holds(dir: &Path, expected: &Model) {
    let (chain, id) = open(dir);
    assert_eq!(
        chain.memories(id).unwrap(),
        expected.keys().copied().collect::<Vec<_>>(),
        "{}",
        dir.display()
    );
    for (memory, pages) in expected {
        let content = bytes(&chain, id, *memory);
        let there: Vec<u64> =
            content.index().extents().flat_map(|extent| extent.first.0..extent.end().0).collect();
        assert_eq!(there, pages.keys().copied().collect::<Vec<_>>(), "{} {memory}", dir.display());
        for (number, value) in pages {
            let mut found = vec![0; PAGE];
            let at = PageIndex(*number).address();
            rcriu::chain::read_at(&content, at, &mut found).unwrap();
            assert!(found == page(*value), "{} {memory} page {number}", dir.display());
        }
    }
}

/// Checks that nothing is wrong with the chains in a directory.
fn assert_clean(root: &Path) {
    let chain = rcriu::chain::Chain::open(root).unwrap();
    let findings = check(&chain).unwrap();
    assert!(findings.is_empty(), "{findings:?}");
}

/// The names of all files below a directory, and how long they are.
fn listing(dir: &Path) -> BTreeMap<String, u64> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(dir).unwrap().flatten() {
        let name = entry.file_name().into_string().unwrap();
        found.insert(name, entry.metadata().unwrap().len());
    }
    found
}

struct Silent;

impl Progress for Silent {
    fn more(&self, _: u64) {}
    fn done(&self, _: u64) {}
}

fn link_all(dirs: &[&Path]) -> Result<Vec<Linked>, DedupError> {
    let dirs = dirs.iter().map(|dir| (*dir).to_owned()).collect();
    link(&LinkOptions { dirs, keep_originals: false }, &Silent)
}

/// `rcriu dedup` with these arguments.
fn command(arguments: &[&str], dirs: &[&Path]) -> Command {
    let mut command = Command::new(engine());
    command.arg("dedup").args(arguments).args(dirs).env_remove("RCRIU_FAULT");
    command
}

fn dedup(arguments: &[&str], dirs: &[&Path]) -> Output {
    command(arguments, dirs).output().unwrap()
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout)
}

const ONE: MemoryId = MemoryId::Private(10);
const TWO: MemoryId = MemoryId::Private(11);
const SHARED: MemoryId = MemoryId::Shared(7);

fn model(memories: &[(MemoryId, &[(u64, u64)])]) -> Model {
    memories.iter().map(|(memory, pages)| (*memory, pages.iter().copied().collect())).collect()
}

/// Three dumps of a tree with private and shared memory.
fn three(root: &Path) -> (Vec<PathBuf>, Vec<Model>) {
    let models = vec![
        model(&[
            (ONE, &[(1, 1), (2, 2), (3, 3), (9, 9)]),
            (TWO, &[(1, 1), (5, 5)]),
            (SHARED, &[(0, 10), (1, 11), (4, 0)]),
        ]),
        // One page changed, one new, one gone; a process that is new and one that ended.
        model(&[
            (ONE, &[(1, 1), (2, 20), (3, 3), (4, 4)]),
            (MemoryId::Private(12), &[(1, 1)]),
            (SHARED, &[(0, 10), (1, 21), (4, 0)]),
        ]),
        // One as in the second, one as in the first.
        model(&[
            (ONE, &[(1, 1), (2, 20), (3, 30), (9, 9)]),
            (TWO, &[(1, 1), (5, 5)]),
            (SHARED, &[(0, 10), (1, 11), (4, 0)]),
        ]),
    ];
    let dirs = (1..)
        .zip(&models)
        .map(|(number, model)| snapshot(root, &number.to_string(), number, model));
    (dirs.collect(), models)
}

fn paths(dirs: &[PathBuf]) -> Vec<&Path> {
    dirs.iter().map(PathBuf::as_path).collect()
}

#[test]
fn full_dumps_become_a_chain_that_holds_each_page_once() {
    let root = tempfile::tempdir().unwrap();
    let (dirs, models) = three(root.path());
    let before: Vec<u64> = dirs.iter().map(|dir| disk_bytes(dir).unwrap()).collect();
    let linked = link_all(&paths(&dirs)).unwrap();
    for (dir, model) in dirs.iter().zip(&models) {
        assert_holds(dir, model);
    }
    assert_clean(root.path());
    // What the parent has: pages 1 and 3, and two of the object. Then pages 1 and 2,
    // and the same two; the second process was not there in between.
    let shared: Vec<u64> = linked.iter().map(|one| one.shared_pages).collect();
    assert_eq!(shared, [4, 4]);
    for (position, one) in linked.iter().enumerate() {
        assert_eq!(one.bytes_before, before[position + 1]);
        assert_eq!(one.bytes_after, disk_bytes(&one.dir).unwrap());
        assert_eq!(one.bytes_before - one.bytes_after, one.shared_pages * 4096);
        assert_eq!(
            fs::read_link(dirs[position + 1].join("parent")).unwrap(),
            Path::new("..").join((position + 1).to_string())
        );
    }
    assert_eq!(disk_bytes(&dirs[0]).unwrap(), before[0]);
    // Once more, and there is nothing left to do.
    let listings: Vec<_> = dirs.iter().map(|dir| listing(dir)).collect();
    let again = link_all(&paths(&dirs)).unwrap();
    assert!(again.iter().all(|one| one.shared_pages == 0 && one.parent.is_some()), "{again:?}");
    assert_eq!(dirs.iter().map(|dir| listing(dir)).collect::<Vec<_>>(), listings);
}

#[test]
fn copies_are_linked_and_the_originals_stay() {
    let root = tempfile::tempdir().unwrap();
    let (dirs, models) = three(root.path());
    let listings: Vec<_> = dirs.iter().map(|dir| listing(dir)).collect();
    let names = paths(&dirs);
    let output = dedup(&["--link", "--keep-originals", "--json"], &names);
    assert!(output.status.success(), "{}", text(&output));
    let said: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(said["linked"][1]["shared_pages"], 4, "{said}");
    assert_eq!(dirs.iter().map(|dir| listing(dir)).collect::<Vec<_>>(), listings);
    for (dir, model) in dirs.iter().zip(&models).skip(1) {
        let copy = dir.with_extension("linked");
        assert_holds(&copy, model);
        assert!(disk_bytes(&copy).unwrap() < disk_bytes(dir).unwrap());
        let date =
            |dir: &Path| fs::metadata(dir.join("inventory.img")).unwrap().modified().unwrap();
        assert_eq!(date(&copy), date(dir));
    }
    assert_eq!(
        fs::read_link(root.path().join("3.linked/parent")).unwrap(),
        Path::new("../2.linked")
    );
    assert_eq!(fs::read_link(root.path().join("2.linked/parent")).unwrap(), Path::new("../1"));
    assert_clean(root.path());
    let again = dedup(&["--link", "--keep-originals"], &names);
    assert!(!again.status.success() && text(&again).contains("2.linked exists already"));
}

#[test]
fn a_chain_is_linked_to_what_is_older() {
    let root = tempfile::tempdir().unwrap();
    let (dirs, models) = three(root.path());
    // The last two are a chain.
    link_all(&[&dirs[1], &dirs[2]]).unwrap();
    let linked = link_all(&paths(&dirs)).unwrap();
    assert_eq!(linked.iter().map(|one| one.shared_pages).collect::<Vec<_>>(), [4, 0]);
    for (dir, model) in dirs.iter().zip(&models) {
        assert_holds(dir, model);
    }
    assert_clean(root.path());
    // Not past the one in between.
    let error = link_all(&[&dirs[0], &dirs[2]]).unwrap_err();
    assert!(matches!(error, DedupError::OtherParent { .. }), "{error}");
}

#[test]
fn what_cannot_be_linked_is_refused_before_anything_is_changed() {
    let root = tempfile::tempdir().unwrap();
    let (dirs, _) = three(root.path());
    let other = snapshot(root.path(), "other", 9, &model(&[(MemoryId::Private(99), &[(1, 1)])]));
    let listings = || -> Vec<_> { dirs.iter().chain([&other]).map(|dir| listing(dir)).collect() };
    let before = listings();
    let said = |dirs: &[&Path]| link_all(dirs).unwrap_err().to_string();
    // The date of the second is not later, and its uptime is earlier.
    let date = |dir: &Path, seconds| {
        let inventory = fs::File::options().write(true).open(dir.join("inventory.img")).unwrap();
        inventory.set_modified(std::time::UNIX_EPOCH + Duration::from_secs(seconds)).unwrap();
    };
    date(&dirs[0], 1000);
    date(&dirs[1], 2000);
    let order = said(&[&dirs[1], &dirs[0]]);
    assert!(order.ends_with("by its date and its uptime: name the oldest first"), "{order}");
    let different = said(&[&dirs[0], &other]);
    assert!(different.contains("dumps of different trees"), "{different}");
    assert!(said(&[&dirs[0]]).contains("two image directories"));
    assert!(said(&[&dirs[0], &dirs[0]]).ends_with("is named twice"));
    assert!(said(&[&dirs[0], root.path()]).contains("holds no inventory.img"));
    assert_eq!(listings(), before);
    // Nothing in common is no error, and no reason for a link.
    let apart = snapshot(root.path(), "apart", 10, &model(&[(ONE, &[(1, 77)])]));
    let linked = link_all(&[&dirs[0], &apart]).unwrap();
    assert_eq!((linked[0].shared_pages, &linked[0].parent), (0, &None));
    assert!(!apart.join("parent").is_symlink());
    for words in [&["--keep-originals"][..], &["a-directory"], &["--link", "--exec-cmd"]] {
        let output = dedup(words, &[]);
        assert_eq!(output.status.code(), Some(2), "{words:?}: {}", text(&output));
    }
}

/// Adds the images that say what the objects of a snapshot are: one of anonymous
/// shared memory, mapped by so many processes, and a memfd.
fn add_objects(dir: &Path, processes: u32, anonymous: u64, memfd: u32) {
    let pids: Vec<u32> = (10..10 + processes).collect();
    let process = |pid: &u32| proto::PstreeEntry { pid: *pid, ..Default::default() };
    write(dir, Kind::Pstree, 0, &pids.iter().map(process).collect::<Vec<_>>());
    for pid in pids {
        let area = |start, shmid, status| proto::VmaEntry {
            start,
            end: start + 0x10000,
            shmid,
            status,
            ..Default::default()
        };
        let vmas = vec![
            area(0x10000, anonymous, vma::REGULAR | vma::ANON_SHARED),
            area(0x30000, 3, vma::REGULAR | vma::FILE_SHARED | vma::MEMFD),
        ];
        let mm = proto::MmEntry { vmas, ..Default::default() };
        write(dir, Kind::Mm, pid.into(), &[mm]);
        write(dir, Kind::Core, pid.into(), &[proto::CoreEntry::default()]);
    }
    let name = b"object".to_vec();
    let inode = proto::MemfdInodeEntry { name, shmid: memfd, inode_id: 1, ..Default::default() };
    write(dir, Kind::MemfdInode, 0, &[inode]);
    let file = proto::MemfdFileEntry { id: 3, inode_id: 1, ..Default::default() };
    let file = proto::FileEntry {
        r#type: proto::FdTypes::Memfd.into(),
        id: 3,
        memfd: Some(file),
        ..Default::default()
    };
    write(dir, Kind::Files, 0, &[file]);
}

/// The numbers of the objects that the images of a snapshot name.
fn numbers(dir: &Path, processes: u32) -> (Vec<u64>, u32) {
    let read = |pid: u32| {
        let path = dir.join(Kind::Mm.file_name(pid.into()));
        read_all::<proto::MmEntry>(&path, Kind::Mm).unwrap()[0].vmas[0].shmid
    };
    let path = dir.join(Kind::MemfdInode.file_name(0));
    let memfds: Vec<proto::MemfdInodeEntry> = read_all(&path, Kind::MemfdInode).unwrap();
    ((10..10 + processes).map(read).collect(), memfds[0].shmid)
}

#[test]
fn objects_are_found_though_their_numbers_have_changed() {
    let shared = MemoryId::Shared;
    let anonymous = &[(0, 1), (1, 2), (2, 3)][..];
    let memfd = &[(0, 4), (3, 5)][..];
    for processes in [1, 2] {
        let root = tempfile::tempdir().unwrap();
        let old = model(&[(shared(7), anonymous), (shared(8), memfd)]);
        // The anonymous one has the number of another object now.
        let new = model(&[(shared(100), anonymous), (shared(200), memfd)]);
        let dirs = [snapshot(root.path(), "1", 1, &old), snapshot(root.path(), "2", 2, &new)];
        add_objects(&dirs[0], processes, 7, 8);
        add_objects(&dirs[1], processes, 100, 200);
        let linked =
            link(&LinkOptions { dirs: dirs.to_vec(), keep_originals: true }, &Silent).unwrap();
        assert_eq!((linked[0].renumbered, linked[0].shared_pages), (2, 5));
        assert_holds(&linked[0].dir, &old);
        assert_eq!(numbers(&linked[0].dir, processes), (vec![7; processes as usize], 8));
        assert_holds(&dirs[1], &new);

        // In place, numbers change in one image at a time.
        let linked = link_all(&paths(&dirs)).unwrap();
        assert_eq!(
            (linked[0].renumbered, linked[0].shared_pages),
            match processes {
                1 => (2, 5),
                _ => (1, 2),
            }
        );
        let there = if processes == 1 { 7 } else { 100 };
        assert_eq!(numbers(&dirs[1], processes), (vec![there; processes as usize], 8));
        assert_holds(&dirs[1], &model(&[(shared(there), anonymous), (shared(8), memfd)]));
        assert_clean(root.path());
    }
}

/// Random dumps: few different pages, so that many are equal.
fn models() -> impl Strategy<Value = Vec<Model>> {
    let memory = prop_oneof![Just(ONE), Just(TWO), Just(SHARED)];
    let pages = prop::collection::btree_map(0..90_u64, 0..4_u64, 0..80);
    let snapshot = prop::collection::btree_map(memory, pages, 1..4);
    prop::collection::vec(snapshot, 2..5)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn every_snapshot_holds_what_it_held(models in models(), first in 0..3_usize) {
        let root = tempfile::tempdir().unwrap();
        let dirs: Vec<PathBuf> = (1..)
            .zip(&models)
            .map(|(number, model)| snapshot(root.path(), &number.to_string(), number, model))
            .collect();
        // Some of them before the others.
        let first = first.min(dirs.len() - 2);
        for part in [&dirs[first..], &dirs[..]] {
            match link_all(&paths(part)) {
                Ok(_) | Err(DedupError::DifferentTrees { .. }) => {}
                Err(error) => return Err(TestCaseError::fail(error.to_string())),
            }
            for (dir, model) in dirs.iter().zip(&models) {
                assert_holds(dir, model);
            }
            assert_clean(root.path());
        }
        // No page is stored that the parent has at the same place.
        for position in 1..dirs.len() {
            let (chain, id) = open(&dirs[position]);
            if !matches!(chain.snapshot(id).parent, Ok(Some(_))) {
                continue;
            }
            for (memory, pages) in &models[position] {
                let index = chain.index(id, *memory).unwrap();
                let older = models[position - 1].get(memory);
                for (number, value) in pages {
                    let extent = index.find(PageIndex(*number)).unwrap();
                    let own = matches!(extent.place, rcriu::chain::Place::Stored { layer: 0, .. });
                    let equal = older.and_then(|older| older.get(number)) == Some(value);
                    prop_assert_eq!(own, !equal, "{} page {}", memory, number);
                }
            }
        }
    }
}

/// The points at which linking can be made to fail.
fn points() -> impl Iterator<Item = Point> {
    Point::ALL.iter().copied().filter(|point| point.name().starts_with("dedup-"))
}

/// Dumps in which objects get other numbers, and what they hold before and after.
fn renumbered(root: &Path) -> (Vec<PathBuf>, Vec<[Model; 2]>) {
    let shared = MemoryId::Shared;
    let pages = &[(0, 1), (1, 2), (2, 3)][..];
    let private = &[(5, 5), (6, 6)][..];
    let old = model(&[(ONE, private), (shared(7), pages), (shared(8), pages)]);
    let new = model(&[(ONE, private), (shared(100), pages), (shared(200), pages)]);
    let dirs = vec![snapshot(root, "1", 1, &old), snapshot(root, "2", 2, &new)];
    add_objects(&dirs[0], 1, 7, 8);
    add_objects(&dirs[1], 1, 100, 200);
    (dirs, vec![[old.clone(), old.clone()], [new, old]])
}

/// Checks that a snapshot that a run has left holds what it held: the objects that its
/// images name, each by the old or the new number.
fn assert_left_whole(dir: &Path, [old, new]: &[Model; 2]) {
    let (chain, id) = open(dir);
    let there = chain.memories(id).unwrap();
    let named: Vec<MemoryId> = if dir.join("mm-10.img").exists() {
        let (anonymous, memfd) = numbers(dir, 1);
        vec![ONE, MemoryId::Shared(anonymous[0]), MemoryId::Shared(memfd.into())]
    } else {
        there.clone()
    };
    assert_eq!(named.len(), old.len(), "{there:?}");
    for memory in named {
        assert!(there.contains(&memory), "{memory} is named, but there are {there:?}");
        let pages = old.get(&memory).or(new.get(&memory)).unwrap();
        let content = bytes(&chain, id, memory);
        for (number, value) in pages {
            let mut found = vec![0; PAGE];
            let at = PageIndex(*number).address();
            rcriu::chain::read_at(&content, at, &mut found).unwrap();
            assert!(found == page(*value), "{} {memory} page {number}", dir.display());
        }
    }
}

#[test]
fn what_fails_or_is_killed_loses_nothing_and_is_finished_by_the_next() {
    let plain = |root: &Path| {
        let (dirs, models) = three(root);
        (dirs, models.into_iter().map(|model| [model.clone(), model]).collect::<Vec<_>>())
    };
    type Make = dyn Fn(&Path) -> (Vec<PathBuf>, Vec<[Model; 2]>);
    let kinds: [&Make; 2] = [&plain, &renumbered];
    for make in kinds {
        let undisturbed = tempfile::tempdir().unwrap();
        let (dirs, _) = make(undisturbed.path());
        link_all(&paths(&dirs)).unwrap();
        let finished: Vec<_> = dirs.iter().map(|dir| listing(dir)).collect();
        for point in points() {
            for how in ["", ":kill"] {
                let root = tempfile::tempdir().unwrap();
                let (dirs, models) = make(root.path());
                let fault = format!("{}{how}", point.name());
                let names = paths(&dirs);
                let output = command(&["--link"], &names).env("RCRIU_FAULT", &fault).output();
                let output = output.unwrap();
                assert!(!output.status.success(), "{fault} is never hit");
                for (dir, models) in dirs.iter().zip(&models) {
                    assert_left_whole(dir, models);
                }
                let chain = rcriu::chain::Chain::open(root.path()).unwrap();
                let mut told = false;
                for finding in check(&chain).unwrap() {
                    let unfinished = finding.problem.contains("was not finished here");
                    let stray = finding.problem.starts_with("no pagemap claims");
                    assert!(unfinished || stray, "{fault}: {finding}");
                    told |= unfinished;
                }
                let left = dirs.iter().any(|dir| dir.join(".dedup").exists());
                assert_eq!(told, left, "{fault}");
                let output = dedup(&["--link"], &names);
                assert!(output.status.success(), "{fault}: {}", text(&output));
                for (dir, [_, model]) in dirs.iter().zip(&models) {
                    assert_holds(dir, model);
                }
                assert_clean(root.path());
                let left: Vec<_> = dirs.iter().map(|dir| listing(dir)).collect();
                let names = |all: &[BTreeMap<String, u64>]| {
                    let sizes = |one: &BTreeMap<String, u64>| {
                        let mut sizes: Vec<u64> = one.values().copied().collect();
                        sizes.sort_unstable();
                        sizes
                    };
                    all.iter().map(sizes).collect::<Vec<_>>()
                };
                assert_eq!(names(&left), names(&finished), "{fault}: {left:?}");
            }
        }
    }
}

/// Kills a command after each part of the time that it takes, and looks at what is left.
fn killed_at_any_moment(make: &dyn Fn(&Path) -> Command, look: &dyn Fn(&Path)) {
    const STEPS: u32 = 24;
    let mut whole = Duration::ZERO;
    for step in 0..=STEPS {
        let root = tempfile::tempdir().unwrap();
        let mut command = make(root.path());
        let begin = std::time::Instant::now();
        let mut child = command.stdout(Stdio::null()).spawn().unwrap();
        if step > 0 {
            std::thread::sleep(whole * step / STEPS);
            // It may have ended, and is not reaped.
            child.kill().unwrap();
        }
        child.wait().unwrap();
        if step == 0 {
            whole = begin.elapsed();
        }
        look(root.path());
    }
}

#[test]
fn linking_that_is_killed_at_any_moment_loses_nothing() {
    let make = |root: &Path| command(&["--link"], &paths(&renumbered(root).0));
    let elsewhere = tempfile::tempdir().unwrap();
    let (dirs, models) = renumbered(elsewhere.path());
    killed_at_any_moment(&make, &|root| {
        let dirs = moved(&dirs, root);
        for (dir, models) in dirs.iter().zip(&models) {
            assert_left_whole(dir, models);
        }
        let output = dedup(&["--link"], &paths(&dirs));
        assert!(output.status.success(), "{}", text(&output));
        for (dir, [_, model]) in dirs.iter().zip(&models) {
            assert_holds(dir, model);
        }
        assert_clean(root);
    });
}

#[test]
fn freeing_that_is_killed_at_any_moment_names_what_is_gone() {
    let make = |root: &Path| free(&branched(root).0[2], &[]);
    let elsewhere = tempfile::tempdir().unwrap();
    let (dirs, models) = branched(elsewhere.path());
    killed_at_any_moment(&make, &|root| {
        let dirs = moved(&dirs, root);
        assert_eq!(restorable(&dirs, &models)[2..], [true, true]);
        assert_eq!(errors(root), "");
        let output = free(&dirs[2], &[]).output().unwrap();
        assert!(output.status.success(), "{}", text(&output));
        assert_eq!(restorable(&dirs, &models), [false, false, true, true]);
    });
}

/// A run that has stopped at a point, and goes on when this is dropped.
struct Stopped(Child);

impl Stopped {
    fn at(point: Point, arguments: &[&str], dirs: &[&Path]) -> Self {
        let fault = format!("{}:stop", point.name());
        let mut command = command(arguments, dirs);
        let mut child =
            Self(command.env("RCRIU_FAULT", fault).stdout(Stdio::null()).spawn().unwrap());
        wait_for(point.name(), || {
            assert_eq!(child.0.try_wait().unwrap(), None, "it is never hit");
            state_of(child.pid()) == Some('T')
        });
        child
    }

    fn pid(&self) -> i32 {
        i32::try_from(self.0.id()).unwrap()
    }

    fn go_on(mut self) {
        let mut status = None;
        wait_for("the end of the run", || {
            // Again and again: it comes by the point once for each snapshot.
            kill(Pid::from_raw(self.pid()), Signal::SIGCONT).unwrap();
            status = self.0.try_wait().unwrap();
            status.is_some()
        });
        assert!(status.unwrap().success());
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn the_second_of_two_is_refused_and_told_who_is_the_first() {
    let root = tempfile::tempdir().unwrap();
    let (dirs, models) = three(root.path());
    let names = paths(&dirs);
    let first = Stopped::at(Point::DedupLinked, &["--link"], &names);
    let pid = format!("is in use by rcriu (pid {}); wait for its end", first.pid());
    // One directory in common is enough.
    let others = [
        dedup(&["--link"], &names[..2]),
        dedup(&["--link", "--keep-originals"], &names[1..]),
        imgfs(&["flatten", names[2].to_str().unwrap(), root.path().join("out").to_str().unwrap()]),
        Command::new(engine()).args(["restore", "-D"]).arg(names[1]).output().unwrap(),
    ];
    for refused in others {
        assert!(!refused.status.success());
        assert!(text(&refused).contains(&pid), "{}", text(&refused));
    }
    first.go_on();
    for (dir, model) in dirs.iter().zip(&models) {
        assert_holds(dir, model);
    }
    assert!(dedup(&["--link"], &names).status.success());
}

/// Copies a snapshot to a directory without parents, to be compared with later.
fn flat(dir: &Path, out: &Path) {
    let output = imgfs(&["flatten", dir.to_str().unwrap(), out.to_str().unwrap()]);
    assert!(output.status.success(), "{}", text(&output));
}

/// Links dumps of a live tree and compares each with what it was.
fn link_live(live: &Live, names: &[&str]) -> serde_json::Value {
    let dirs: Vec<PathBuf> = names.iter().map(|name| live.path(name)).collect();
    let references: Vec<PathBuf> =
        names.iter().map(|name| live.path(&format!("{name}.before"))).collect();
    for (dir, reference) in dirs.iter().zip(&references) {
        flat(dir, reference);
    }
    let output = dedup(&["--link", "--json"], &paths(&dirs));
    assert!(output.status.success(), "{}", text(&output));
    let said: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    for (position, (dir, reference)) in dirs.iter().zip(&references).enumerate() {
        let renumbered =
            position.checked_sub(1).map(|at| &said["linked"][at]["renumbered_objects"]);
        if renumbered.is_none_or(|count| *count == 0) {
            assert_same(dir, reference);
        } else {
            let ((chain, id), (before, before_id)) = (open(dir), open(reference));
            for memory in chain.memories(id).unwrap() {
                if let MemoryId::Private(_) = memory {
                    let old = bytes(&before, before_id, memory);
                    assert_same_memory(memory, &bytes(&chain, id, memory), &old);
                }
            }
        }
        let checked = imgfs(&["check", dir.to_str().unwrap()]);
        assert!(checked.status.success(), "{}", text(&checked));
        fs::remove_dir_all(reference).unwrap();
    }
    said
}

#[test]
fn privileged_dumps_of_a_program_that_goes_on_become_a_chain() {
    require(Cap::Ptrace);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_str().unwrap().to_owned();
    let program = workload().to_str().unwrap();
    let mut live = Live::program(program, &["--steps", "random", &path], dir);
    let names = ["full-1", "full-2", "full-3", "full-4"];
    for (number, name) in (1..).zip(names) {
        wait_for(&format!("step {number}"), || {
            fs::read_to_string(live.path("at")).is_ok_and(|at| at == number.to_string())
        });
        live.images_name = name;
        live.dump_running(&[]);
        fs::write(live.path(&format!("go.{number}")), "").unwrap();
    }
    let said = link_live(&live, &names);
    for one in said["linked"].as_array().unwrap() {
        let number = |key: &str| one[key].as_u64().unwrap();
        assert!(number("shared_pages") > 100, "{said}");
        let saved = number("bytes_before") - number("bytes_after");
        assert!(saved * 10 >= number("shared_pages") * 4096 * 9, "{said}");
    }
    // It goes on from the last as if nothing had happened.
    live.kill();
    live.images_name = names[3];
    live.restore(&[]);
    let mut number = 5;
    let mut at = String::new();
    while at != "end" {
        wait_for(&format!("step {number}"), || {
            at = fs::read_to_string(live.path("at")).unwrap();
            assert!(!at.starts_with("failed"), "{at}");
            at == "end" || at == number.to_string()
        });
        fs::write(live.path(&format!("go.{number}")), "").unwrap();
        number += 1;
    }
}

/// Dumps a state in full, restores it, dumps it again, and restores it from the chain
/// of the two: its objects have other inode numbers then.
fn restored_between(state: &str, in_common: &[&str]) {
    require(Cap::Ptrace);
    let mut live = Live::workload(state);
    let before = live.state();
    live.images_name = "one";
    live.dump(&[]);
    live.restore(&[]);
    fs::remove_file(live.path("pid")).unwrap();
    live.images_name = "two";
    live.dump(&[]);
    let said = link_live(&live, &["one", "two"]);
    let (one, two) = (open(&live.path("one")), open(&live.path("two")));
    assert_eq!(one.0.memories(one.1).unwrap(), two.0.memories(two.1).unwrap(), "{said}");
    for key in in_common {
        assert!(said["linked"][0][key].as_u64().unwrap() > 0, "{key}: {said}");
    }
    live.restore(&[]);
    let after = live.state();
    live.verdict();
    before.restored(live.root).assert_unchanged(&after.restored(live.root));
}

#[test]
fn privileged_private_memory_is_restored_from_linked_dumps() {
    restored_between("cow_tree", &["shared_pages"]);
}

#[test]
fn privileged_shared_memory_is_restored_from_linked_dumps() {
    restored_between("shared_anon_parts", &["shared_pages", "renumbered_objects"]);
}

#[test]
fn privileged_memfds_are_restored_from_linked_dumps() {
    restored_between("memfd_mapping", &["shared_pages", "renumbered_objects"]);
}

#[test]
fn privileged_segments_are_restored_from_linked_dumps() {
    restored_between("sysv_shm", &["shared_pages"]);
}

#[test]
fn a_link_to_a_parent_that_is_gone_is_an_error() {
    let root = tempfile::tempdir().unwrap();
    let (dirs, _) = three(root.path());
    symlink("../nowhere", dirs[1].join("parent")).unwrap();
    let error = link_all(&paths(&dirs)).unwrap_err().to_string();
    assert!(error.contains("leads to ../nowhere"), "{error}");
}

/// A chain of three dumps with a branch: 4 comes after 2, too. Every snapshot that is not
/// on the way to 3 keeps what it has.
fn branched(root: &Path) -> (Vec<PathBuf>, Vec<Model>) {
    let (mut dirs, mut models) = three(root);
    link_all(&paths(&dirs)).unwrap();
    // One page as in the first, one as in the second, one of its own.
    let branch =
        model(&[(ONE, &[(1, 1), (2, 20), (3, 33), (4, 4)]), (SHARED, &[(0, 10), (1, 21), (4, 0)])]);
    dirs.push(snapshot(root, "4", 4, &branch));
    models.push(branch);
    link_all(&[&dirs[0], &dirs[1], &dirs[3]]).unwrap();
    (dirs, models)
}

/// `rcriu dedup -D` with these arguments.
fn free(dir: &Path, arguments: &[&str]) -> Command {
    let mut command = command(arguments, &[]);
    command.arg("-D").arg(dir);
    command
}

/// Returns which snapshots hold what they held; every other one must say what it lacks,
/// and all that it does not lack must be what it was.
fn restorable(dirs: &[PathBuf], models: &[Model]) -> Vec<bool> {
    let whole = dirs.iter().zip(models).map(|(dir, model)| {
        let (chain, id) = open(dir);
        let whole = chain.require_whole(id).is_ok();
        if whole {
            assert_holds(dir, model);
        }
        for (memory, pages) in model {
            let content = bytes(&chain, id, *memory);
            for (number, value) in pages {
                let mut found = vec![0; PAGE];
                let at = PageIndex(*number).address();
                let read = rcriu::chain::read_at(&content, at, &mut found);
                assert!(read.is_err() || found == page(*value), "{} {memory}", dir.display());
            }
        }
        whole
    });
    whole.collect()
}

#[test]
fn what_a_snapshot_holds_is_freed_in_its_ancestors_but_not_for_others() {
    let root = tempfile::tempdir().unwrap();
    let (dirs, models) = branched(root.path());
    let before: Vec<u64> = dirs.iter().map(|dir| disk_bytes(dir).unwrap()).collect();
    let output = free(&dirs[2], &["--json"]).output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    let said: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    // The third holds pages 3 and 9 of the first process, both pages of the second, and
    // page 1 of the object, all of them anew. In the second, page 3 is left to the first
    // and page 1 is needed by the fourth. In the first, 3 and 9, and page 1 of the object;
    // the second process is not in the second snapshot, so its pages are of another one.
    assert_eq!(said["freed_pages"], 3, "{said}");
    let path = |dir: &PathBuf| serde_json::json!(dir.to_str().unwrap());
    assert_eq!(said["no_longer_restorable"], serde_json::json!([path(&dirs[0]), path(&dirs[1])]));
    let kept = serde_json::json!([{ "directory": path(&dirs[3]), "pages": 1 }]);
    assert_eq!(said["kept_for"], kept, "{said}");
    assert_eq!(restorable(&dirs, &models), [false, false, true, true]);
    let after: Vec<u64> = dirs.iter().map(|dir| disk_bytes(dir).unwrap()).collect();
    // Three pages less, and the journals of two files, each of which takes a block.
    assert_eq!(before[0] - after[0], 4096);
    assert_eq!(before[1..], after[1..]);
    let listed = imgfs(&["ls", root.path().to_str().unwrap()]);
    assert!(listed.status.success(), "{}", text(&listed));
    let checked = imgfs(&["check", root.path().to_str().unwrap()]);
    assert!(checked.status.success(), "{}", text(&checked));
    assert!(text(&checked).contains("only its descendants"), "{}", text(&checked));
    // Again, and there is nothing left to do.
    let again = free(&dirs[2], &[]).output().unwrap();
    assert!(again.status.success(), "{}", text(&again));
    assert!(!text(&again).contains("can no longer be restored"), "{}", text(&again));
    let base = free(&dirs[0], &[]).output().unwrap();
    assert!(text(&base).contains("has no parent"), "{}", text(&base));
}

#[test]
fn what_was_freed_stays_gone_and_takes_no_room_in_a_copy() {
    let root = tempfile::tempdir().unwrap();
    let (dirs, models) = branched(root.path());
    assert!(free(&dirs[2], &[]).output().unwrap().status.success());
    // An older dump, equal to the first.
    let older = snapshot(root.path(), "0", 0, &models[0]);
    let output = dedup(&["--link", "--keep-originals", "--json"], &[&older, &dirs[0]]);
    let said: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    // The one memory that has lost nothing.
    assert_eq!(said["linked"][0]["shared_pages"], 2, "{}", text(&output));
    let copy = dirs[0].with_extension("linked");
    let ((chain, id), (copied, copied_id)) = (open(&dirs[0]), open(&copy));
    for memory in [ONE, SHARED] {
        let (index, there) =
            (chain.index(id, memory).unwrap(), copied.index(copied_id, memory).unwrap());
        assert!(index.punched_pages() > 0);
        assert_eq!(index.punched_pages(), there.punched_pages());
        let pages = |dir: &Path| blocks(&dir.join(Kind::Pages.file_name(index.pages_id().into())));
        assert_eq!(pages(&copy), pages(&dirs[0]));
    }
}

#[test]
fn nothing_is_freed_while_it_cannot_be_told_who_needs_it() {
    let root = tempfile::tempdir().unwrap();
    let (dirs, models) = branched(root.path());
    let pagemap = dirs[3].join(SHARED.pagemap_name());
    let whole = fs::read(&pagemap).unwrap();
    fs::write(&pagemap, &whole[..whole.len() - 1]).unwrap();
    let output = free(&dirs[2], &[]).output().unwrap();
    assert!(!output.status.success());
    assert!(text(&output).contains("may need pages that would be freed"), "{}", text(&output));
    fs::write(&pagemap, whole).unwrap();
    assert_eq!(restorable(&dirs, &models), [true; 4]);
    // Nor if the snapshot has lost something itself.
    let pages = fs::File::options().write(true).open(dirs[2].join("pages-4.img")).unwrap();
    pages.set_len(100).unwrap();
    let output = free(&dirs[2], &[]).output().unwrap();
    assert!(text(&output).contains("is cut short"), "{}", text(&output));
    assert_eq!(restorable(&dirs[..2], &models[..2]), [true; 2]);
}

#[test]
fn freeing_that_fails_or_is_killed_names_what_is_gone_and_is_finished_by_the_next() {
    let points = Point::ALL.iter().filter(|point| point.name().starts_with("free-"));
    for point in points {
        for how in ["", ":kill"] {
            let root = tempfile::tempdir().unwrap();
            let (dirs, models) = branched(root.path());
            let fault = format!("{}{how}", point.name());
            let output = free(&dirs[2], &[]).env("RCRIU_FAULT", &fault).output().unwrap();
            assert!(!output.status.success(), "{fault} is never hit");
            let whole = restorable(&dirs, &models);
            assert_eq!(whole[2..], [true, true], "{fault}");
            assert_eq!(errors(root.path()), "", "{fault}");
            let output = free(&dirs[2], &[]).output().unwrap();
            assert!(output.status.success(), "{fault}: {}", text(&output));
            assert_eq!(restorable(&dirs, &models), [false, false, true, true], "{fault}");
            let holes = |dir: &Path| {
                let pages = listing(dir).into_keys().filter(|name| name.starts_with("pages-"));
                pages.map(|name| blocks(&dir.join(name))).sum::<u64>()
            };
            // Ten pages were stored, one of them zero, and three are gone.
            assert_eq!(holes(&dirs[0]), 6 * 4096, "{fault}");
        }
    }
}

/// The bytes that a file takes.
fn blocks(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    fs::metadata(path).unwrap().blocks() * 512
}

/// Returns the errors of which a check of the chains in a directory tells.
fn errors(root: &Path) -> String {
    let chain = rcriu::chain::Chain::open(root).unwrap();
    let findings = check(&chain).unwrap();
    let errors = findings.iter().filter(|finding| finding.severity == Severity::Error);
    errors.map(ToString::to_string).collect::<Vec<_>>().join("\n")
}

#[test]
fn privileged_a_chain_that_is_mounted_is_not_changed() {
    require(Cap::Fuse);
    let root = tempfile::tempdir().unwrap();
    let (dirs, models) = branched(root.path());
    let points = tempfile::tempdir().unwrap();
    let mounted = Mounted::new(root.path(), &points.path().join("mnt"), &["--snapshot", "3"]);
    for output in [free(&dirs[2], &[]).output().unwrap(), dedup(&["--link"], &paths(&dirs[..2]))] {
        let pid = format!("is in use by imgfs (pid {})", mounted.pid());
        assert!(text(&output).contains(&pid), "{}", text(&output));
    }
    drop(mounted);
    assert_eq!(restorable(&dirs, &models), [true; 4]);
    assert!(free(&dirs[2], &[]).output().unwrap().status.success());
}

#[test]
fn privileged_a_dump_frees_what_it_supersedes() {
    let mut program = Program::start();
    let mut stored = Vec::new();
    for number in 1..5 {
        let name = ["chain/1", "chain/2", "chain/3", "chain/4"][number - 1];
        program.step();
        program.live.images_name = name;
        let parent = format!("../{}", number - 1);
        let options = ["--auto-dedup", "--prev-images-dir", &parent];
        program.live.dump_running(if number == 1 { &options[..1] } else { &options });
        program.assert_holds_now(name);
        stored.push(disk_bytes(&program.live.path("chain/1")).unwrap());
    }
    // The first becomes smaller with every dump.
    assert!(stored.windows(2).all(|pair| pair[1] < pair[0]), "{stored:?}");
    program.live.images_name = "chain/4";
    program.live.check_images();
    assert_eq!(errors(&program.live.path("chain")), "");
    program.live.kill();
    program.live.restore(&[]);
}

/// Sends a signal to all processes of a tree, and waits until they stand still if it is
/// to stop them.
fn signal_all(live: &mut Live, signal: Signal) {
    for pid in live.tree() {
        let _ = kill(Pid::from_raw(pid), signal);
    }
    for pid in live.tree() {
        wait_for("the stop", || {
            signal != Signal::SIGSTOP || matches!(state_of(pid), Some('T' | 'Z') | None)
        });
    }
}

/// Pages of two snapshots that share all blocks but those of one memory.
fn shares_blocks(mkfs: &'static str) {
    let mount = LoopMount::new(mkfs, 320);
    let numbered = |from: u64| -> Pages { (0..800).map(|page| (page, from + page)).collect() };
    let models = [
        Model::from([(ONE, numbered(1)), (TWO, numbered(1)), (SHARED, numbered(10_000))]),
        // The shared memory is the same, in the same order; the private one is another.
        Model::from([(ONE, numbered(20_000)), (SHARED, numbered(10_000))]),
    ];
    let root = mount.path();
    let dirs = [snapshot(&root, "1", 1, &models[0]), snapshot(&root, "2", 2, &models[1])];
    let before = mount.free_bytes();
    let run = || {
        let mut command = command(&["--reflink", "--json"], &[]);
        let output = command.arg("-D").arg(&root).output().unwrap();
        assert!(output.status.success(), "{}", text(&output));
        serde_json::from_slice::<serde_json::Value>(&output.stdout).unwrap()
    };
    // One memory of a process is the other's, and one of an object the older one's.
    let said = run();
    assert_eq!((&said["stored_pages"], &said["shared_pages"]), (&4000.into(), &1600.into()));
    let freed = mount.free_bytes() - before;
    assert!(freed > 1500 * 4096, "{freed} bytes were freed");
    for (dir, model) in dirs.iter().zip(&models) {
        assert_holds(dir, model);
    }
    assert_eq!(run()["shared_pages"], 1600);
    // What is linked needs no sharing any more.
    link_all(&paths(&dirs)).unwrap();
    assert_eq!(run()["shared_pages"], 800);
    // The holder of a lock is found on every file system.
    let mut locks = rcriu::sys::lock::DirectoryLocks::default();
    locks.take(&dirs[1], rcriu::sys::lock::Access::Shared).unwrap();
    let refused = dedup(&["--link"], &paths(&dirs));
    assert!(
        text(&refused).contains(&format!("(pid {})", std::process::id())),
        "{}",
        text(&refused)
    );
}

#[test]
fn privileged_equal_pages_share_blocks_on_btrfs() {
    shares_blocks("mkfs.btrfs");
}

#[test]
fn privileged_equal_pages_share_blocks_on_xfs() {
    shares_blocks("mkfs.xfs");
}

#[test]
fn where_blocks_cannot_be_shared_nothing_is_changed() {
    let root = tempfile::tempdir_in("/dev/shm").unwrap();
    let (dirs, models) = three(root.path());
    let output = command(&["--reflink"], &[]).arg("-D").arg(root.path()).output().unwrap();
    assert!(!output.status.success());
    assert!(text(&output).contains("cannot share blocks; btrfs can"), "{}", text(&output));
    assert_eq!(restorable(&dirs, &models), [true; 3]);
}

#[test]
fn duplicates_are_listed_where_they_are() {
    let root = tempfile::tempdir().unwrap();
    let (dirs, _) = three(root.path());
    let path = root.path().to_str().unwrap();
    let counts = |document: &serde_json::Value| {
        ["stored", "zero", "same_memory", "same_snapshot", "older_snapshot"]
            .map(|key| document[key].as_u64().unwrap())
    };
    let list = || -> serde_json::Value {
        let output = imgfs(&["ls", "--duplicates", "--json", path]);
        assert!(output.status.success(), "{}", text(&output));
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let of = |list: &serde_json::Value, at: usize| counts(&list["snapshots"][at]["pages"]);
    let all = list();
    // Page 1 of both processes. Then 1 again (twice), 3, 10. Then 1 twice, 9, 5, 10, 11,
    // and 20 as in the second.
    assert_eq!(of(&all, 0), [9, 1, 0, 1, 0]);
    assert_eq!(of(&all, 1), [8, 1, 0, 1, 3]);
    assert_eq!(of(&all, 2), [9, 1, 0, 1, 6]);
    assert_eq!(counts(&all["total"]), [26, 3, 0, 3, 9]);
    assert_eq!(all["total"]["duplicate_bytes"], 15 * 4096);
    link_all(&paths(&dirs)).unwrap();
    assert_eq!(counts(&list()["total"])[0], 26 - 8);
    let table = text(&imgfs(&["ls", "--duplicates", path]));
    assert!(table.starts_with("NAME "), "{table}");
    assert_eq!(table.lines().count(), 5, "{table}");
}

/// Checks every state that a power cut during `command`, or since the recorder began,
/// could leave, and that in some of them running it again finishes.
fn survives_power_cuts(
    recorder: &Recorder,
    mut command: Command,
    check: &dyn Fn(&Path),
    again: &dyn Fn(&Path),
) {
    // Of so many states, one is gone on from.
    const AGAIN: usize = 5;
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    let states = recorder.states();
    assert!(states.len() > 20, "{} states", states.len());
    for (number, state) in states.iter().enumerate() {
        let root = tempfile::tempdir_in("/dev/shm").unwrap();
        state.write(root.path());
        check(root.path());
        if number % AGAIN == 0 || number + 1 == states.len() {
            again(root.path());
        }
    }
}

/// The same directories in another place.
fn moved(dirs: &[PathBuf], root: &Path) -> Vec<PathBuf> {
    dirs.iter().map(|dir| root.join(dir.file_name().unwrap())).collect()
}

#[test]
fn privileged_linking_survives_power_cuts() {
    let recorder = Recorder::mount();
    let (dirs, models) = renumbered(recorder.path());
    let check = |root: &Path| {
        for (dir, models) in moved(&dirs, root).iter().zip(&models) {
            assert_left_whole(dir, models);
        }
    };
    let again = |root: &Path| {
        let dirs = moved(&dirs, root);
        link_all(&paths(&dirs)).unwrap();
        for (dir, [_, model]) in dirs.iter().zip(&models) {
            assert_holds(dir, model);
        }
        assert_clean(root);
        assert!(!dirs[1].join(".dedup").exists());
    };
    recorder.begin();
    survives_power_cuts(&recorder, command(&["--link"], &paths(&dirs)), &check, &again);
}

/// Checks that freeing in a branched chain survives power cuts.
fn freeing_survives_power_cuts(
    recorder: &Recorder,
    (dirs, models): (&[PathBuf], &[Model]),
    arguments: &[&str],
) {
    let check = |root: &Path| {
        let whole = restorable(&moved(dirs, root), models);
        assert_eq!(whole[2..], [true, true]);
        assert_eq!(errors(root), "");
    };
    let again = |root: &Path| {
        let dirs = moved(dirs, root);
        let output = free(&dirs[2], arguments).output().unwrap();
        assert!(output.status.success(), "{}", text(&output));
        assert_eq!(restorable(&dirs, models), [false, false, true, true]);
        assert!(!dirs[0].join(".dedup").exists());
    };
    recorder.begin();
    survives_power_cuts(recorder, free(&dirs[2], arguments), &check, &again);
}

#[test]
fn privileged_freeing_survives_power_cuts() {
    let recorder = Recorder::mount();
    let (dirs, models) = branched(recorder.path());
    freeing_survives_power_cuts(&recorder, (&dirs, &models), &[]);
}

#[test]
fn privileged_what_supersedes_is_on_disk_before_anything_is_freed() {
    let recorder = Recorder::mount();
    let (dirs, models) = three(recorder.path());
    fs::remove_dir_all(&dirs[2]).unwrap();
    link_all(&paths(&dirs[..2])).unwrap();
    recorder.begin();
    // Written as other programs do, without a sync.
    snapshot(recorder.path(), "3", 3, &models[2]);
    symlink("../2", dirs[2].join("parent")).unwrap();
    let check = |root: &Path| {
        let dirs = moved(&dirs, root);
        if restorable(&dirs[..2], &models[..2]) != [true, true] {
            assert_eq!(restorable(&dirs[2..], &models[2..]), [true]);
        }
    };
    survives_power_cuts(&recorder, free(&dirs[2], &[]), &check, &|_| {});
}

#[test]
fn privileged_files_that_cannot_be_punched_are_rewritten_if_asked_for() {
    let recorder = Recorder::mount_with(false);
    let (dirs, models) = branched(recorder.path());
    let listings = || dirs.iter().map(|dir| listing(dir)).collect::<Vec<_>>();
    let before = listings();
    let refused = free(&dirs[2], &[]).output().unwrap();
    assert!(!refused.status.success());
    assert!(text(&refused).contains("use rcriu dedup --rewrite"), "{}", text(&refused));
    assert_eq!(listings(), before);

    let stored = |dir: &Path| -> u64 {
        let pages = listing(dir).into_keys().filter(|name| name.starts_with("pages-"));
        pages.map(|name| blocks(&dir.join(name))).sum()
    };
    let before = stored(&dirs[0]);
    freeing_survives_power_cuts(&recorder, (&dirs, &models), &["--rewrite"]);
    assert_eq!(restorable(&dirs, &models), [false, false, true, true]);
    assert_eq!(before - stored(&dirs[0]), 3 * 4096);
    // Again, and there is nothing left to do.
    let left = listings();
    let output = free(&dirs[2], &["--rewrite", "--json"]).output().unwrap();
    let said: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&said["freed_pages"], listings()), (&0.into(), left), "{said}");
}

/// A program that waits between its steps, for dumps into a chain.
struct Program {
    live: Live,
    step: u32,
}

impl Program {
    fn start() -> Self {
        require(Cap::Ptrace);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().to_str().unwrap().to_owned();
        let program = workload().to_str().unwrap();
        // The kernel writes to the area of restartable sequences whenever a thread has
        // run, and it runs for each dump.
        let no_rseq = "GLIBC_TUNABLES=glibc.pthread.rseq=0";
        let live = Live::program("env", &[no_rseq, program, "--steps", "random", &path], dir);
        Self { live, step: 0 }
    }

    /// Goes on to the next step, and stands still there.
    fn step(&mut self) {
        if self.step > 0 {
            signal_all(&mut self.live, Signal::SIGCONT);
            fs::write(self.live.path(&format!("go.{}", self.step)), "").unwrap();
        }
        self.step += 1;
        wait_for(&format!("step {}", self.step), || {
            fs::read_to_string(self.live.path("at")).is_ok_and(|at| at == self.step.to_string())
        });
        signal_all(&mut self.live, Signal::SIGSTOP);
    }

    /// Checks that a snapshot holds what the program does now.
    fn assert_holds_now(&mut self, name: &str) {
        self.live.images_name = "full";
        self.live.fault = None;
        self.live.dump_running(&[]);
        assert_same(&self.live.path(name), &self.live.path("full"));
        fs::remove_dir_all(self.live.path("full")).unwrap();
    }
}

#[test]
fn privileged_a_dump_is_complete_whatever_becomes_of_freeing() {
    let mut program = Program::start();
    program.step();
    program.live.images_name = "chain/base";
    program.live.dump_running(&[]);
    for point in Point::ALL.iter().filter(|point| point.name().starts_with("free-")) {
        for how in ["", ":kill"] {
            program.step();
            let fault = format!("{}{how}", point.name());
            let copy = program.live.path("chain");
            let (base, tip) = (copy.join("base"), copy.join("tip"));
            program.live.images_name = "chain/tip";
            program.live.fault = Some(fault.clone());
            let options = ["-R", "--auto-dedup", "--prev-images-dir", "../base"];
            let output = program.live.try_dump(&options);
            // What fails after the dump is complete is not the dump.
            assert_eq!(output.status.success(), how.is_empty(), "{fault}: {}", text(&output));
            program.assert_holds_now("chain/tip");
            let (chain, id) = open(&tip);
            chain.require_whole(id).unwrap();
            assert_eq!(errors(&copy), "", "{fault}");
            let output = free(&tip, &[]).output().unwrap();
            assert!(output.status.success(), "{fault}: {}", text(&output));
            program.assert_holds_now("chain/tip");
            // The next one anew.
            fs::remove_dir_all(&tip).unwrap();
            fs::remove_dir_all(&base).unwrap();
            program.live.images_name = "chain/base";
            program.live.dump_running(&[]);
        }
    }
}

#[test]
fn privileged_a_pre_dump_frees_what_it_supersedes() {
    let mut program = Program::start();
    program.step();
    program.live.images_name = "chain/base";
    program.live.dump_running(&[]);
    let base = program.live.path("chain/base");
    let before = disk_bytes(&base).unwrap();
    program.step();
    let before_dump = program.live.path("chain/pre");
    fs::create_dir(&before_dump).unwrap();
    let root = program.live.root.to_string();
    let mut pre_dump = Command::new(engine());
    pre_dump.args(["pre-dump", "-t", &root, "--auto-dedup", "--prev-images-dir", "../base", "-D"]);
    let output = pre_dump.arg(&before_dump).output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    let after = disk_bytes(&base).unwrap();
    assert!(after < before, "{before} bytes before, {after} after");
    program.step();
    program.live.images_name = "chain/tip";
    program.live.dump_running(&["--auto-dedup", "--prev-images-dir", "../pre"]);
    assert!(disk_bytes(&base).unwrap() < after);
    program.assert_holds_now("chain/tip");
    assert_eq!(errors(&program.live.path("chain")), "");
}

#[test]
fn privileged_two_dumps_do_not_share_a_directory() {
    let mut program = Program::start();
    program.step();
    let dir = program.live.path("images");
    fs::create_dir(&dir).unwrap();
    let root = program.live.root.to_string();
    let dump = || {
        let mut command = Command::new(engine());
        command.args(["dump", "-R", "-t", &root, "-D"]).arg(&dir).stdout(Stdio::null());
        command
    };
    let mut first = dump();
    let mut first = first.env("RCRIU_FAULT", "dump-written:stop").spawn().unwrap();
    let children = format!("/proc/{0}/task/{0}/children", first.id());
    let mut worker = 0;
    wait_for("a dump to stop", || {
        assert_eq!(first.try_wait().unwrap(), None, "it is never hit");
        worker = fs::read_to_string(&children).unwrap().trim().parse().unwrap_or(0);
        worker > 0 && state_of(worker) == Some('T')
    });
    let second = dump().env_remove("RCRIU_FAULT").output().unwrap();
    let mut ended = None;
    wait_for("the end of the first", || {
        kill(Pid::from_raw(worker), Signal::SIGCONT).unwrap_or_default();
        ended = first.try_wait().unwrap();
        ended.is_some()
    });
    assert!(ended.unwrap().success());
    assert!(!second.status.success());
    let said = text(&second);
    assert!(said.contains(&format!("is in use by rcriu (pid {worker})")), "{said}");
    program.assert_holds_now("images");
}
