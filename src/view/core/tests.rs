use std::{fs, path::Path};

use object::{
    elf::{EM_AARCH64, EM_X86_64},
    read::elf::{FileHeader, ProgramHeader},
};
use proptest::prelude::*;

use super::*;
use crate::{
    chain::{
        read_at,
        testing::{TestChain, entry, page},
    },
    image::{Kind, MemoryId, Presence, proto, vma},
    units::PAGE_SIZE,
    view::testing::{PID, image, load, mapping, regular},
};

/// The path of a mapped file that does not exist.
const GONE: &str = "/nonexistent/program";

/// The kernel's names of notes, by type.
const NAMES: [(u32, &str); 6] = [
    (1, "PRSTATUS"),
    (2, "FPREGSET"),
    (3, "PRPSINFO"),
    (6, "AUXV"),
    (0x4649_4c45, "FILE"),
    (0x202, "XSTATE"),
];

fn thread(mark: u64) -> proto::CoreEntry {
    let gpregs = proto::UserX86RegsEntry { r15: mark, gs: mark + 26, ..Default::default() };
    let fpregs = proto::UserX86FpregsEntry {
        st_space: vec![0; 32],
        xmm_space: vec![0; 64],
        xsave: Some(proto::UserX86XsaveEntry::default()),
        ..Default::default()
    };
    let thread_core = proto::ThreadCoreEntry {
        blk_sigset: Some(mark << 8),
        signals_p: Some(proto::SignalQueueEntry {
            signals: vec![proto::SiginfoEntry { siginfo: vec![10, 0, 0, 0, 9, 9] }],
        }),
        creds: Some(proto::CredsEntry { uid: 1000, gid: 100, ..Default::default() }),
        ..Default::default()
    };
    proto::CoreEntry {
        mtype: proto::core_entry::March::X8664.into(),
        thread_info: Some(proto::ThreadInfoX86 { gpregs, fpregs, ..Default::default() }),
        thread_core: Some(thread_core),
        tc: None,
        ..Default::default()
    }
}

fn leader() -> proto::CoreEntry {
    let comm = "a name of more than 15".into();
    let tc = proto::TaskCoreEntry { task_state: 3, flags: 0x40, comm, ..Default::default() };
    proto::CoreEntry { tc: Some(tc), ..thread(1) }
}

/// Writes a process with these threads, the leader first, and these mappings, and opens its core file.
fn open(
    chain: &TestChain,
    vmas: Vec<proto::VmaEntry>,
    threads: &[proto::CoreEntry],
) -> Result<CoreFile> {
    let dir = chain.dir(1);
    let tids: Vec<u32> = (PID..).take(threads.len()).collect();
    for (tid, core) in tids.iter().zip(threads) {
        image(&dir, Kind::Core, (*tid).into(), std::slice::from_ref(core));
    }
    let tree = proto::PstreeEntry {
        pid: PID,
        ppid: 1,
        pgid: 5,
        sid: 4,
        threads: tids,
        ..Default::default()
    };
    image(&dir, Kind::Pstree, 0, &[tree]);
    let mm = proto::MmEntry {
        vmas,
        mm_arg_start: 0x2000,
        mm_arg_end: 0x2008,
        mm_saved_auxv: vec![6, 4096, 9, 0x1234],
        ..Default::default()
    };
    image(&dir, Kind::Mm, PID.into(), &[mm]);
    image(&dir, Kind::Files, 0, &[regular(1, Path::new(GONE), Some(9000))]);
    let chain = chain.open();
    let snapshot = chain.choose(None).unwrap();
    CoreFile::open(Arc::new(AddressSpace::new(load(chain, snapshot)?)))
}

/// Returns a chain whose process has pages 2 and 12.
fn chain() -> TestChain {
    let mut chain = TestChain::new();
    chain.push(&[entry(3, 2, Presence::Present)]);
    let entries = [entry(2, 1, Presence::Present), entry(12, 1, Presence::Present)];
    chain.memory(1, MemoryId::Private(PID.into()), 8, &entries);
    chain
}

fn vmas() -> Vec<proto::VmaEntry> {
    vec![
        mapping(2, 3, vma::ANON_PRIVATE),
        // the file does not exist, but one page of its mapping was changed
        proto::VmaEntry { shmid: 1, pgoff: 0x1000, prot: 5, ..mapping(10, 4, vma::FILE_PRIVATE) },
        proto::VmaEntry { prot: 0, ..mapping(20, 100, vma::ANON_PRIVATE) },
        // it cannot be read, but pages 3 and 4 of the object are stored
        proto::VmaEntry {
            prot: 0,
            shmid: 1024,
            pgoff: 0x2000,
            ..mapping(150, 9, vma::ANON_SHARED)
        },
        proto::VmaEntry { prot: 1, ..mapping(200, 1, vma::VVAR | vma::ANON_PRIVATE) },
    ]
}

fn bytes(core: &CoreFile) -> Vec<u8> {
    let mut bytes = vec![0xaa; usize::try_from(core.len()).unwrap()];
    assert_eq!(read_at(core, 0, &mut bytes).unwrap(), bytes.len());
    bytes
}

/// The type and the contents of a note.
type Note = (u32, Vec<u8>);

/// Returns address, length and flags of the segments, after comparing their contents with the address
/// space; and the notes with their types.
fn parse(core: &CoreFile) -> (Vec<(u64, u64, u32)>, Vec<Note>) {
    let bytes = bytes(core);
    let data = bytes.as_slice();
    let header = FileHeader64::<LE>::parse(data).unwrap();
    let machine = header.e_machine.get(LE);
    assert!(header.e_type.get(LE) == ET_CORE && [EM_X86_64, EM_AARCH64].contains(&machine));
    let (mut loads, mut notes) = (Vec::new(), Vec::new());
    for segment in header.program_headers(LE, data).unwrap() {
        let len = segment.p_filesz.get(LE);
        if let Some(mut found) = segment.notes(LE, data).unwrap() {
            while let Some(note) = found.next().unwrap() {
                notes.push((note.n_type(LE).0, note.desc().to_owned()));
            }
            continue;
        }
        let address = segment.p_vaddr.get(LE);
        let mut expected = vec![0; usize::try_from(len).unwrap()];
        read_at(core.space().as_ref(), address, &mut expected).unwrap();
        assert!(segment.data(LE, data).unwrap() == expected, "segment at {address:#x}");
        assert_eq!(segment.p_offset.get(LE) % PAGE_SIZE, 0);
        loads.push((address, len, segment.p_flags.get(LE).0));
    }
    (loads, notes)
}

fn word(bytes: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(bytes[offset..offset + 4].try_into().unwrap())
}

#[test]
fn segments_are_what_is_known_and_notes_are_in_the_kernels_order() {
    let chain = chain();
    let core = open(&chain, vmas(), &[leader(), thread(2)]).unwrap();
    let (loads, notes) = parse(&core);
    assert_eq!(loads, [(0x2000, 0x3000, 6), (0xc000, 0x1000, 5), (0x97000, 0x2000, 0)]);
    assert_eq!(core.allocated(), core.len() - 0x2000);
    let name = |kind| NAMES.iter().find(|(known, _)| *known == kind).unwrap().1;
    let names: Vec<&str> = notes.iter().map(|(kind, _)| name(*kind)).collect();
    assert_eq!(
        names,
        [
            "PRSTATUS", "PRPSINFO", "AUXV", "FILE", "FPREGSET", "XSTATE", "PRSTATUS", "FPREGSET",
            "XSTATE"
        ]
    );
    for (position, mark) in [(0, 1), (6, 2)] {
        let status = &notes[position].1;
        assert_eq!(status.len(), 336);
        assert_eq!(word(status, 16), 1 << 9, "signal 10 is pending");
        assert_eq!(word(status, 24), mark << 8);
        let ids = [32, 36, 40, 44].map(|offset| word(status, offset));
        assert_eq!(ids, [PID + mark - 1, 1, 5, 4]);
        assert_eq!((word(status, 112), word(status, 112 + 26 * 8)), (mark, mark + 26));
        assert_eq!(word(status, 328), 1);
    }
    let description = &notes[1].1;
    assert_eq!(description.len(), 136);
    assert_eq!(description[..4], [3, b'T', 0, 0]);
    assert_eq!([16, 20, 24].map(|offset| word(description, offset)), [1000, 100, PID]);
    assert_eq!(&description[40..56], b"a name of more \0");
    assert_eq!(&description[56..65], b"layer 1 \0", "the beginning of page 2");
    let words = |note: &[u8]| -> Vec<u64> {
        note.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word)).collect()
    };
    assert_eq!(words(&notes[2].1), [6, 4096, 9, 0x1234, 0, 0]);
    let files = &notes[3].1;
    assert_eq!(words(&files[..40]), [1, 4096, 0xa000, 0xe000, 1]);
    assert_eq!(&files[40..], format!("{GONE}\0").as_bytes());
}

#[test]
fn too_many_segments_to_count_are_counted_in_a_section() {
    let mut chain = TestChain::new();
    chain.push(&[]);
    chain.memory(1, MemoryId::Private(PID.into()), 8, &[]);
    for segments in [65533, 65534, 65535, 70000] {
        for image in ["core-7.img", "pstree.img", "mm-7.img", "files.img"] {
            let _ = fs::remove_file(chain.dir(1).join(image));
        }
        let vmas = (0..segments).map(|number| mapping(number * 2, 1, vma::ANON_PRIVATE));
        let core = open(&chain, vmas.collect(), &[leader()]).unwrap();
        let mut head = vec![0; usize::try_from(core.len() - segments * PAGE_SIZE).unwrap()];
        read_at(&core, 0, &mut head).unwrap();
        let header = FileHeader64::<LE>::parse(head.as_slice()).unwrap();
        let extended = segments + 1 >= 0xffff;
        let count = if extended { 0xffff } else { u16::try_from(segments + 1).unwrap() };
        assert_eq!(header.e_phnum.get(LE), count);
        assert_eq!(header.e_shnum.get(LE), u16::from(extended));
        let found = header.program_headers(LE, head.as_slice()).unwrap();
        assert_eq!(found.len() as u64, segments + 1);
        let notes = found[0].notes(LE, head.as_slice()).unwrap().unwrap().next().unwrap();
        assert_eq!(notes.unwrap().n_type(LE).0, 1);
    }
}

#[test]
fn threads_of_other_processors_are_errors() {
    let problem = |change: fn(&mut proto::CoreEntry)| {
        let chain = chain();
        let mut other = thread(2);
        change(&mut other);
        match open(&chain, vmas(), &[leader(), other]).unwrap_err() {
            ViewError::BadThread { tid, problem, .. } if tid == PID + 1 => problem,
            error => panic!("{error}"),
        }
    };
    assert_eq!(problem(|core| core.thread_info = None), "its image has no registers");
    assert_eq!(
        problem(|core| core.set_mtype(proto::core_entry::March::Aarch64)),
        "it ran on aarch64, and its process on x86-64"
    );
    assert_eq!(
        problem(|core| core.set_mtype(proto::core_entry::March::S390)),
        "it ran on a machine whose registers are not known (S390)"
    );
    assert_eq!(
        problem(|core| {
            let info = core.thread_info.as_mut().unwrap();
            info.gpregs.set_mode(proto::UserX86RegsMode::Compat);
        }),
        "it ran 32-bit code"
    );
    assert_eq!(
        problem(|core| core.thread_info.as_mut().unwrap().fpregs.xmm_space.clear()),
        "xmm_space has 0 bytes, 256 expected"
    );
}

/// A thread of aarch64.
fn arm(mark: u64) -> proto::CoreEntry {
    let gpregs = proto::UserAarch64RegsEntry {
        regs: (mark..mark + 31).collect(),
        sp: 0x7000,
        pc: 0x2004,
        pstate: 0,
    };
    let fpsimd =
        proto::UserAarch64FpsimdContextEntry { vregs: vec![mark; 64], ..Default::default() };
    proto::CoreEntry {
        mtype: proto::core_entry::March::Aarch64.into(),
        thread_info: None,
        ti_aarch64: Some(proto::ThreadInfoAarch64 {
            clear_tid_addr: 0,
            tls: mark << 16,
            gpregs,
            fpsimd,
            pac_keys: None,
        }),
        ..thread(mark)
    }
}

#[test]
fn larger_pages_are_not_taken_for_others() {
    let chain = chain();
    let dir = chain.dir(1);
    let tree = proto::PstreeEntry { pid: PID, threads: vec![PID], ..Default::default() };
    image(&dir, Kind::Pstree, 0, &[tree]);
    let mm = proto::MmEntry { mm_saved_auxv: vec![6, 65536, 0, 0], ..Default::default() };
    image(&dir, Kind::Mm, PID.into(), &[mm]);
    let chain = chain.open();
    let snapshot = chain.choose(None).unwrap();
    let error = load(chain, snapshot).unwrap_err();
    assert!(matches!(error, ViewError::PageSize { size: 65536, .. }), "{error}");
}

#[test]
fn a_core_of_aarch64_has_the_notes_of_that_machine() {
    let chain = chain();
    let leader = proto::CoreEntry { tc: leader().tc, ..arm(1) };
    let core = open(&chain, vmas(), &[leader, arm(2)]).unwrap();
    let head = bytes(&core);
    let header = FileHeader64::<LE>::parse(head.as_slice()).unwrap();
    assert_eq!(header.e_machine.get(LE), EM_AARCH64);
    let (_, notes) = parse(&core);
    let kinds: Vec<u32> = notes.iter().map(|(kind, _)| *kind).collect();
    // The last of each thread is NT_ARM_TLS.
    assert_eq!(kinds, [1, 3, 6, 0x4649_4c45, 2, 0x401, 1, 2, 0x401]);
    for (position, mark) in [(0, 1), (6, 2)] {
        let status = &notes[position].1;
        assert_eq!(status.len(), 392);
        assert_eq!((word(status, 112), word(status, 112 + 30 * 8)), (mark, mark + 30));
        assert_eq!((word(status, 112 + 32 * 8), word(status, 112 + 34 * 8)), (0x2004, 1));
    }
    assert_eq!((notes[4].1.len(), word(&notes[4].1, 0)), (528, 1));
    assert_eq!(notes[8].1, (2_u64 << 16).to_le_bytes());
}

#[test]
fn the_last_page_is_the_last_that_is_known() {
    let chain = chain();
    let core = open(&chain, vmas(), &[leader()]).unwrap();
    let bytes = bytes(&core);
    assert!(bytes[bytes.len() - 4096..] == page(1, 4));
}

/// Any mapping that forged images might contain.
fn any_vma() -> impl Strategy<Value = proto::VmaEntry> {
    let status = prop_oneof![
        Just(vma::ANON_PRIVATE),
        Just(vma::FILE_PRIVATE),
        Just(vma::FILE_SHARED | vma::MEMFD),
        Just(vma::ANON_SHARED),
        any::<u32>(),
    ];
    let high = prop_oneof![0..20_u64, 0..1_u64 << 52];
    let low = prop_oneof![9 => Just(0), 1 => 0..4096_u64];
    let address = (high, low).prop_map(|(high, low)| high << 12 | low);
    let pgoff = prop_oneof![address.clone(), any::<u64>().prop_map(|offset| !0xfff & offset)];
    (address.clone(), address, pgoff, status, any::<u32>()).prop_map(
        |(start, end, pgoff, status, prot)| proto::VmaEntry {
            start,
            end,
            pgoff,
            shmid: 1024,
            status: status | vma::REGULAR,
            prot,
            ..Default::default()
        },
    )
}

proptest! {
    #[test]
    fn whatever_images_say_does_no_harm(
        vmas in prop::collection::vec(any_vma(), 1..3),
        words in prop::collection::vec(any::<u32>(), 0..70),
    ) {
        let chain = chain();
        let mut leader = leader();
        leader.thread_info.as_mut().unwrap().fpregs.xsave.as_mut().unwrap().ymmh_space = words;
        leader.tc.as_mut().unwrap().task_state = 77;
        if let Ok(core) = open(&chain, vmas, &[leader]) {
            let _ = core.allocated();
            let mut buffer = vec![0; 20_000];
            for offset in [0, 4096, core.len() / 2, core.len().saturating_sub(9000)] {
                let _ = read_at(&core, offset, &mut buffer);
            }
        }
    }

    #[test]
    fn bytes_are_the_same_however_they_are_read(reads in prop::collection::vec((0..30_000_u64, 1..9000_usize), 50)) {
        let chain = chain();
        let core = open(&chain, vmas(), &[leader(), thread(2)]).unwrap();
        let bytes = bytes(&core);
        for (offset, len) in reads {
            let mut buffer = vec![0; len];
            let read = read_at(&core, offset, &mut buffer).unwrap();
            let start = usize::try_from(offset).unwrap().min(bytes.len());
            prop_assert_eq!(read, len.min(bytes.len() - start));
            prop_assert!(buffer[..read] == bytes[start..start + read]);
        }
    }
}
