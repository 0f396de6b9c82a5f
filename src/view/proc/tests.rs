use std::{fs, path::Path};

use super::*;
use crate::{
    chain::testing::{TestChain, entry},
    image::{MemoryId, Presence, vma},
    units::PAGE_SIZE,
    view::{
        View,
        testing::{PID, image, mapping, regular},
    },
};

/// Writes a process with a mapped program, a heap, a stack, an open file, a pipe and two threads; and
/// a child that is a zombie.
fn write(dir: &Path) {
    let mut program = mapping(0x400, 2, vma::FILE_PRIVATE);
    (program.shmid, program.pgoff, program.prot) = (1, PAGE_SIZE, 5);
    let mut shared = mapping(0x700, 4, vma::ANON_SHARED);
    (shared.shmid, shared.flags) = (1024, 1);
    let stack = mapping(0x7ff0, 3, vma::ANON_PRIVATE);
    let heap = mapping(0x500, 8, vma::ANON_PRIVATE | vma::HEAP);
    let mm = proto::MmEntry {
        vmas: vec![program, heap, shared, stack],
        mm_start_brk: heap.start,
        mm_brk: heap.end,
        mm_start_stack: stack.start + PAGE_SIZE,
        mm_start_code: program.start,
        exe_file_id: 1,
        mm_saved_auxv: vec![6, 4096, 0, 0],
        ..Default::default()
    };
    let process = |pid, ppid, threads: &[u32]| proto::PstreeEntry {
        pid,
        ppid,
        pgid: PID,
        sid: PID,
        threads: threads.to_vec(),
        ..Default::default()
    };
    image(dir, Kind::Pstree, 0, &[process(PID, 0, &[PID, 8]), process(9, PID, &[9])]);
    image(dir, Kind::Mm, PID.into(), &[mm]);
    let task = |comm: &str, task_state| proto::TaskCoreEntry {
        comm: comm.into(),
        task_state,
        blk_sigset: 2,
        sigactions: [1, 0, 0x1000].map(action).to_vec(),
        ..Default::default()
    };
    let creds = proto::CredsEntry {
        uid: 1,
        euid: 2,
        groups: vec![3, 4],
        cap_eff: vec![1, 2],
        ..Default::default()
    };
    let thread = |comm: &str| proto::ThreadCoreEntry {
        comm: Some(comm.into()),
        sched_nice: Some(5),
        creds: Some(creds.clone()),
        ..Default::default()
    };
    let core = |tc, thread| proto::CoreEntry { tc, thread_core: thread, ..Default::default() };
    image(dir, Kind::Core, PID.into(), &[core(Some(task("a) b\n", 1)), Some(thread("main")))]);
    image(dir, Kind::Core, 8, &[core(None, Some(thread("worker")))]);
    image(dir, Kind::Core, 9, &[core(Some(task("gone", 2)), None)]);
    let ids = proto::TaskKobjIdsEntry {
        files_id: 3,
        pid_ns_id: Some(1),
        mnt_ns_id: Some(4),
        ..Default::default()
    };
    image(dir, Kind::Ids, PID.into(), &[ids]);
    let fd = |fd, id, flags| proto::FdinfoEntry { fd, id, flags, ..Default::default() };
    image(dir, Kind::Fdinfo, 3, &[fd(0, 1, 0), fd(5, 2, 1), fd(6, 4, 0)]);
    let pipe = proto::PipeEntry { id: 2, pipe_id: 77, flags: 1, ..Default::default() };
    let pipe = proto::FileEntry { id: 2, pipe: Some(pipe), ..Default::default() };
    let files =
        [regular(1, Path::new("/bin/program"), None), pipe, regular(4, Path::new("/gone"), None)];
    image(dir, Kind::Files, 0, &files);
    let remap = proto::RemapFilePathEntry {
        orig_id: 4,
        remap_id: 0x10,
        remap_type: Some(proto::RemapType::Ghost.into()),
    };
    image(dir, Kind::RemapFpath, 0, &[remap]);
    let ghost = proto::GhostFileEntry { mode: 0o100_644, ..Default::default() };
    image(dir, Kind::GhostFile, 0x10, &[ghost]);
    let path = dir.join(Kind::GhostFile.file_name(0x10));
    let mut bytes = fs::read(&path).unwrap();
    bytes.extend(b"what it held");
    fs::write(&path, bytes).unwrap();
    let fs_entry = proto::FsEntry { cwd_id: 1, root_id: 1, umask: Some(0o27) };
    image(dir, Kind::Fs, PID.into(), &[fs_entry]);
}

fn action(sigaction: u64) -> proto::SaEntry {
    proto::SaEntry { sigaction, ..Default::default() }
}

fn view() -> (TestChain, View) {
    let mut disk = TestChain::new();
    // Two pages of the shared object, one of the heap.
    disk.push(&[entry(1, 2, Presence::Present)]);
    disk.memory(1, MemoryId::Private(PID.into()), 8, &[entry(0x501, 1, Presence::Present)]);
    write(&disk.dir(1));
    let chain = Arc::new(disk.open());
    let tip = chain.choose(None).unwrap();
    (disk, View::new(chain, tip))
}

fn text(view: &View, path: &str) -> String {
    let found = view.find(path).unwrap_or_else(|error| panic!("{path}: {error}"));
    let content = view.open(found.ino).unwrap().content;
    let mut bytes = vec![0; usize::try_from(content.len()).unwrap()];
    crate::chain::read_at(&*content, 0, &mut bytes).unwrap();
    String::from_utf8(bytes).unwrap()
}

fn link(view: &View, path: &str) -> String {
    String::from_utf8(view.link(view.find(path).unwrap().ino).unwrap()).unwrap()
}

fn names(view: &View, path: &str) -> Vec<String> {
    let dir = view.find(path).unwrap();
    view.entries(dir.ino).unwrap().1.into_iter().map(|entry| entry.name).collect()
}

#[test]
fn a_process_is_what_proc_showed() {
    let (_disk, view) = view();
    assert_eq!(text(&view, "proc/7/comm"), "main\n");
    assert_eq!(link(&view, "proc/7/exe"), "/bin/program");
    assert_eq!(link(&view, "proc/7/cwd"), "/bin/program");
    assert_eq!(link(&view, "proc/self"), "7");
    assert_eq!(names(&view, "proc/7/ns"), ["mnt", "pid"]);
    assert_eq!(link(&view, "proc/7/ns/pid"), "pid:[1]");
    assert_eq!(names(&view, "proc/7/task"), ["7", "8"]);
    assert_eq!(text(&view, "proc/7/task/8/comm"), "worker\n");
    assert_eq!(text(&view, "proc/7/task/7/children"), "9 ");
    assert_eq!(text(&view, "proc/7/auxv").as_bytes()[..9], [6, 0, 0, 0, 0, 0, 0, 0, 0]);
    // A zombie has a name, a state, and little more.
    assert_eq!(text(&view, "proc/9/comm"), "gone\n");
    assert_eq!(text(&view, "proc/9/maps"), "");
    assert!(text(&view, "proc/9/stat").starts_with("9 (gone) Z 7 7 7 "));
    assert!(!names(&view, "proc/9").iter().any(|name| ["exe", "mem", "cwd"].contains(&&**name)));
}

#[test]
fn status_and_stat_are_the_kernels() {
    let (_disk, view) = view();
    let status = text(&view, "proc/7/status");
    let has = |line: &str| assert!(status.lines().any(|found| found == line), "{line}: {status}");
    has("Name:\tmain");
    has("Umask:\t0027");
    has("State:\tS (sleeping)");
    has("PPid:\t1");
    has("Uid:\t1\t2\t0\t0");
    has("Groups:\t3 4 ");
    has("FDSize:\t64");
    has("VmSize:\t      68 kB");
    has("RssAnon:\t       4 kB");
    has("RssShmem:\t       8 kB");
    has("VmStk:\t      12 kB");
    has("VmExe:\t       8 kB");
    has("VmData:\t      32 kB");
    has("Threads:\t2");
    has("SigBlk:\t0000000000000002");
    has("SigIgn:\t0000000000000001");
    has("SigCgt:\t0000000000000004");
    has("CapEff:\t0000000200000001");
    let stat = text(&view, "proc/7/stat");
    let (name, rest) = stat.trim_end().rsplit_once(") ").unwrap();
    assert_eq!(name, "7 (main");
    let fields: Vec<&str> = rest.split(' ').collect();
    assert_eq!(fields.len() + 2, 52, "{stat}");
    // state, ppid, pgrp, session; nice; threads; vsize, rss.
    assert_eq!(fields[..4], ["S", "1", "7", "7"]);
    assert_eq!((fields[16], fields[17]), ("5", "2"));
    assert_eq!((fields[20], fields[21]), ("69632", "3"));
    assert_eq!(text(&view, "proc/7/statm"), "17 3 2 2 0 11 0\n");
    let limits = text(&view, "proc/7/limits");
    assert!(limits.starts_with("Limit                     Soft Limit           Hard"), "{limits}");
}

#[test]
fn mappings_are_named_and_counted() {
    let (_disk, view) = view();
    let maps = text(&view, "proc/7/maps");
    let lines: Vec<&str> = maps.lines().collect();
    let pad = |head: &str, name: &str| format!("{head:<73}{name}");
    assert_eq!(lines[0], pad("00400000-00402000 r-xp 00001000 00:00 0 ", "/bin/program"));
    assert_eq!(lines[1], pad("00500000-00508000 rw-p 00000000 00:00 0 ", "[heap]"));
    assert_eq!(lines[2], pad("00700000-00704000 rw-s 00000000 00:00 0 ", "/dev/zero (deleted)"));
    assert_eq!(lines[3], pad("07ff0000-07ff3000 rw-p 00000000 00:00 0 ", "[stack]"));
    let smaps = text(&view, "proc/7/smaps");
    let rss: Vec<&str> = smaps.lines().filter(|line| line.starts_with("Rss:")).collect();
    let line = |kib| format!("Rss:            {kib:8} kB");
    assert_eq!(rss, [line(0), line(4), line(8), line(0)]);
    assert!(text(&view, "proc/7/smaps_rollup").contains(&line(12)));
    assert_eq!(
        names(&view, "mem/7"),
        [
            "000000400000-000000402000-program",
            "000000500000-000000508000-heap",
            "000000700000-000000704000-shared",
            "000007ff0000-000007ff3000-stack",
        ]
    );
    let shared = text(&view, "mem/7/000000700000-000000704000-shared");
    assert_eq!(shared.len(), 4 * 4096);
    assert!(shared[4096..].starts_with("layer 1 page 1\n"));
    assert_eq!(link(&view, "shmem-by-process/7/000000700000-000000704000"), "../../shmem/1024");
}

#[test]
fn linear_memory_ends_where_nothing_is_mapped() {
    let (_disk, view) = view();
    let memory = view.find("proc/7/mem").unwrap();
    assert_eq!(memory.size, 0);
    let content = view.open(memory.ino).unwrap().content;
    let mut bytes = vec![0; 3 * 4096];
    let mut read = |offset| crate::chain::read_at(&*content, offset, &mut bytes).unwrap();
    assert_eq!(read(0), 0);
    assert_eq!(read(0x70_3000), 4096);
    assert_eq!(read(0x70_4000), 0);
    assert_eq!(read(0x70_1000), 3 * 4096);
}

#[test]
fn descriptors_lead_to_what_is_open() {
    let (_disk, view) = view();
    assert_eq!(names(&view, "proc/7/fd"), ["0", "5", "6"]);
    assert_eq!(link(&view, "proc/7/fd/0"), "/bin/program");
    assert_eq!(link(&view, "proc/7/fd/5"), "pipe:[77]");
    assert_eq!(link(&view, "proc/7/fd/6"), "/gone (deleted)");
    assert_eq!(text(&view, "proc/7/fdinfo/5"), "pos:\t0\nflags:\t02000001\n");
    // The kernel looks up the target of a link to a pipe by name.
    let pipe = view.find("proc/7/fd/pipe:[77]").unwrap();
    assert_eq!((pipe.kind, pipe.ino), (NodeType::Pipe, 77));
    view.find("proc/7/fd/pipe:[78]").unwrap_err();
    assert_eq!(text(&view, "files/deleted/gone"), "what it held");
    let rows = view.descriptors(Some(PID)).unwrap();
    let shown: Vec<_> = rows.iter().map(|row| (row.fd, row.access, &*row.target)).collect();
    assert_eq!(
        shown,
        [(0, 'r', "/bin/program"), (5, 'w', "pipe:[77]"), (6, 'r', "/gone (deleted)")]
    );
}

#[test]
fn a_reader_is_shown_itself() {
    let (_disk, view) = view();
    let proc = view.find("proc").unwrap().ino;
    let first = view.lookup(proc, "7").unwrap();
    let reader = view.lookup_for(proc, "4711", 4711).unwrap();
    assert_ne!(reader.ino, first.ino);
    assert_eq!(reader.ino, view.lookup_for(proc, "4712", 4712).unwrap().ino);
    view.lookup_for(proc, "4711", 4712).unwrap_err();
    assert_eq!(view.lookup_for(proc, "7", 7).unwrap().ino, first.ino);
    let comm = view.lookup(reader.ino, "comm").unwrap();
    assert_eq!(view.attr(comm.ino).unwrap().size, 5);
}

#[test]
fn mounts_are_listed_as_the_kernel_lists_them() {
    let mut disk = TestChain::new();
    disk.push(&[]);
    let dir = disk.dir(1);
    write(&dir);
    let ids = proto::TaskKobjIdsEntry { files_id: 3, mnt_ns_id: Some(4), ..Default::default() };
    fs::remove_file(dir.join(Kind::Ids.file_name(PID.into()))).unwrap();
    image(&dir, Kind::Ids, PID.into(), &[ids]);
    let mount = proto::MntEntry {
        mnt_id: 30,
        parent_mnt_id: 29,
        root_dev: 254 << 20 | 300,
        root: "/".into(),
        mountpoint: "./a b".into(),
        source: "/dev/vda".into(),
        fsname: Some("ext4".into()),
        ..Default::default()
    };
    image(&dir, Kind::Mnts, 4, &[mount]);
    let chain = Arc::new(disk.open());
    let tip = chain.choose(None).unwrap();
    let view = View::new(chain, tip);
    let text = text(&view, "proc/7/mountinfo");
    assert!(text.starts_with("30 29 254:300 / /a\\040b rw - ext4 /dev/vda "), "{text}");
}
