//! Dumps with contents that are known, whole and linked, and what is left of them.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    time::Duration,
};

use rcriu::{
    chain::{self, Finding, Severity, check},
    dedup::{DedupError, LinkOptions, Linked, link},
    image::{
        Directory, ImageWriter, Kind, MemoryId, PagemapEntry, PagemapWriter, Presence, proto,
        read_all, tree::state, vma,
    },
    res::file::is_restored,
    units::PageIndex,
};

use super::{
    live::engine,
    recorder::Recorder,
    same::{bytes, open},
};

pub const PAGE: usize = 4096;

/// What a memory holds: a number for each page, from which its bytes are made.
pub type Pages = BTreeMap<u64, u64>;

/// What a snapshot holds.
pub type Model = BTreeMap<MemoryId, Pages>;

pub fn page(value: u64) -> Vec<u8> {
    let mut state = value;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        state.to_le_bytes()
    };
    if value == 0 { vec![0; PAGE] } else { (0..PAGE / 8).flat_map(|_| next()).collect() }
}

pub fn write<M: prost::Message>(dir: &Path, kind: Kind, number: u64, messages: &[M]) {
    let mut image = ImageWriter::create(&dir.join(kind.file_name(number)), kind).unwrap();
    messages.iter().for_each(|message| image.message(message).unwrap());
    image.finish().unwrap();
}

/// Returns how many bytes the files of an image directory take.
pub fn disk_bytes(dir: &Path) -> u64 {
    chain::disk_bytes(&Directory::at(dir)).unwrap()
}

/// Writes a full dump.
pub fn snapshot(root: &Path, name: &str, uptime: u64, memories: &Model) -> PathBuf {
    let dir = root.join(name);
    fs::create_dir_all(&dir).unwrap();
    let uptime = Some(uptime);
    let inventory = proto::InventoryEntry {
        img_version: 2,
        fdinfo_per_id: Some(true),
        dump_uptime: uptime,
        ..Default::default()
    };
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
pub fn assert_holds(dir: &Path, expected: &Model) {
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

/// Returns what is wrong with the chains in a directory, but that all their processes have
/// ended.
pub fn findings(root: &Path) -> Vec<Finding> {
    let chain = rcriu::chain::Chain::open(root).unwrap();
    let mut findings = check(&chain, is_restored, &mut |_, _| ()).unwrap();
    findings
        .retain(|finding| !finding.problem.starts_with("the first process of the tree is dead"));
    findings
}

/// Checks that nothing else is wrong with the chains in a directory.
pub fn assert_clean(root: &Path) {
    let findings = findings(root);
    assert!(findings.is_empty(), "{findings:?}");
}

/// The names of all files below a directory, and how long they are.
pub fn listing(dir: &Path) -> BTreeMap<String, u64> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(dir).unwrap().flatten() {
        let name = entry.file_name().into_string().unwrap();
        found.insert(name, entry.metadata().unwrap().len());
    }
    found
}

pub fn link_all(dirs: &[&Path]) -> Result<Vec<Linked>, DedupError> {
    let dirs = dirs.iter().map(|dir| (*dir).to_owned()).collect();
    link(&LinkOptions { dirs, keep_originals: false }, &())
}

/// `rcriu dedup` with these arguments.
pub fn command(arguments: &[&str], dirs: &[&Path]) -> Command {
    let mut command = Command::new(engine());
    command.arg("dedup").args(arguments).args(dirs).env_remove("RCRIU_FAULT");
    command
}

pub fn dedup(arguments: &[&str], dirs: &[&Path]) -> Output {
    command(arguments, dirs).output().unwrap()
}

pub fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout)
}

pub const ONE: MemoryId = MemoryId::Private(10);
pub const TWO: MemoryId = MemoryId::Private(11);
pub const SHARED: MemoryId = MemoryId::Shared(7);

pub fn model(memories: &[(MemoryId, &[(u64, u64)])]) -> Model {
    memories.iter().map(|(memory, pages)| (*memory, pages.iter().copied().collect())).collect()
}

/// Three dumps of a tree with private and shared memory.
pub fn three(root: &Path) -> (Vec<PathBuf>, Vec<Model>) {
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

pub fn paths(dirs: &[PathBuf]) -> Vec<&Path> {
    dirs.iter().map(PathBuf::as_path).collect()
}

/// Adds the images that say what the objects of a snapshot are: one of anonymous
/// shared memory, mapped by so many processes, and a memfd.
pub fn add_objects(dir: &Path, processes: u32, anonymous: u64, memfd: u32) {
    let pids: Vec<u32> = (10..10 + processes).collect();
    let ppid = |pid: u32| if pid == pids[0] { 0 } else { pids[0] };
    let process =
        |pid: &u32| proto::PstreeEntry { pid: *pid, ppid: ppid(*pid), ..Default::default() };
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
        // Nothing but its memory is looked at: it has ended.
        let tc = proto::TaskCoreEntry { task_state: state::DEAD, ..Default::default() };
        write(
            dir,
            Kind::Core,
            pid.into(),
            &[proto::CoreEntry { tc: Some(tc), ..Default::default() }],
        );
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
pub fn numbers(dir: &Path, processes: u32) -> (Vec<u64>, u32) {
    let read = |pid: u32| {
        let path = dir.join(Kind::Mm.file_name(pid.into()));
        read_all::<proto::MmEntry>(&path, Kind::Mm).unwrap()[0].vmas[0].shmid
    };
    let path = dir.join(Kind::MemfdInode.file_name(0));
    let memfds: Vec<proto::MemfdInodeEntry> = read_all(&path, Kind::MemfdInode).unwrap();
    ((10..10 + processes).map(read).collect(), memfds[0].shmid)
}

/// Dumps in which objects get other numbers, and what they hold before and after.
pub fn renumbered(root: &Path) -> (Vec<PathBuf>, Vec<[Model; 2]>) {
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
pub fn assert_left_whole(dir: &Path, [old, new]: &[Model; 2]) {
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

/// Kills a command after each part of the time that it takes, and looks at what is left.
pub fn killed_at_any_moment(make: &dyn Fn(&Path) -> Command, look: &dyn Fn(&Path)) {
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

/// A chain of three dumps with a branch: 4 comes after 2, too. Every snapshot that is not
/// on the way to 3 keeps what it has.
pub fn branched(root: &Path) -> (Vec<PathBuf>, Vec<Model>) {
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
pub fn free(dir: &Path, arguments: &[&str]) -> Command {
    let mut command = command(arguments, &[]);
    command.arg("-D").arg(dir);
    command
}

/// Returns which snapshots hold what they held; every other one must say what it lacks,
/// and all that it does not lack must be what it was.
pub fn restorable(dirs: &[PathBuf], models: &[Model]) -> Vec<bool> {
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

/// Returns the errors of which a check of the chains in a directory tells.
pub fn errors(root: &Path) -> String {
    let findings = findings(root);
    let errors = findings.iter().filter(|finding| finding.severity == Severity::Error);
    errors.map(ToString::to_string).collect::<Vec<_>>().join("\n")
}

/// Checks every state that a power cut during `command`, or since the recorder began,
/// could leave, and that in some of them running it again finishes.
pub fn survives_power_cuts(
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
pub fn moved(dirs: &[PathBuf], root: &Path) -> Vec<PathBuf> {
    dirs.iter().map(|dir| root.join(dir.file_name().unwrap())).collect()
}
