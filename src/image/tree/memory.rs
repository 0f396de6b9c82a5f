//! Checks of an address space.

use nix::libc;

use super::Problems;
use crate::{
    arch::Machine,
    image::{proto, vma},
    units::{HugeSize, PAGE_SIZE},
};

/// The longest auxiliary vector, in words (`AT_VECTOR_SIZE`, `linux/mm_types.h`).
const AUXV_WORDS: usize = 52;

/// The bits of a mapping's status that say what it maps.
const KINDS: [u32; 4] = [vma::FILE_PRIVATE, vma::FILE_SHARED, vma::ANON_SHARED, vma::ANON_PRIVATE];

/// The valid protection bits in an image: read, write, execute.
const PROTECTION: u32 = 0x7;

/// Checks the mappings of a process on `machine`, and everything that they refer to.
pub(super) fn check(
    mm: &proto::MmEntry,
    vmas: &[proto::VmaEntry],
    guards: &[proto::VmaEntry],
    machine: Machine,
    problems: &mut Problems,
) {
    let addresses_end = machine.addresses_end();
    check_order(vmas, addresses_end, problems);
    check_order(guards, addresses_end, problems);
    for entry in vmas {
        check_mapping(entry, problems);
    }
    if vmas.iter().all(is_vdso) {
        problems.broken("it has no memory");
    }
    let inside = |guard: &proto::VmaEntry| {
        vmas.iter().any(|entry| entry.start <= guard.start && guard.end <= entry.end)
    };
    if let Some(guard) = guards.iter().find(|guard| !inside(guard)) {
        let range = range(guard);
        problems.broken(format!("guard pages at {range} are outside of its mappings"));
    }
    check_rings(mm, vmas, problems);
    let addresses = [
        ("code", mm.mm_start_code, mm.mm_end_code, true),
        ("data", mm.mm_start_data, mm.mm_end_data, false),
        ("heap", mm.mm_start_brk, mm.mm_brk, false),
        ("arguments", mm.mm_arg_start, mm.mm_arg_end, false),
        ("environment", mm.mm_env_start, mm.mm_env_end, false),
        ("stack", mm.mm_start_stack, mm.mm_start_stack, false),
    ];
    for (what, start, end, some) in addresses {
        // Nothing can be mapped below (`vm.mmap_min_addr`).
        let fine = start >= PAGE_SIZE && end < addresses_end && start <= end;
        if !fine || some && start == end {
            problems.broken(format!("its {what} is at {start:#x}-{end:#x}, which is impossible"));
        }
    }
    if mm.mm_saved_auxv.len() > AUXV_WORDS {
        let words = mm.mm_saved_auxv.len();
        problems.broken(format!(
            "its auxiliary vector has {words} words, at most {AUXV_WORDS} expected"
        ));
    }
}

fn is_vdso(entry: &proto::VmaEntry) -> bool {
    entry.status & (vma::VDSO | vma::VVAR) != 0
}

fn range(entry: &proto::VmaEntry) -> String {
    format!("{:#x}-{:#x}", entry.start, entry.end)
}

fn check_order(vmas: &[proto::VmaEntry], addresses_end: u64, problems: &mut Problems) {
    let mut end = 0;
    for entry in vmas {
        let aligned = entry.start.is_multiple_of(PAGE_SIZE) && entry.end.is_multiple_of(PAGE_SIZE);
        let what = if !aligned {
            "is not page-aligned"
        } else if entry.start >= entry.end {
            "is empty"
        } else if entry.end > addresses_end {
            "is above the highest address of a process"
        } else if entry.start < end {
            "overlaps the mapping before it"
        } else {
            end = entry.end;
            continue;
        };
        problems.broken(format!("the mapping {} {what}", range(entry)));
        end = end.max(entry.end);
    }
}

/// Checks that each AIO context has its ring, and each ring its context.
fn check_rings(mm: &proto::MmEntry, vmas: &[proto::VmaEntry], problems: &mut Problems) {
    let mut contexts: Vec<_> =
        mm.aios.iter().map(|of| (of.id, of.id.saturating_add(of.ring_len.into()))).collect();
    contexts.sort_unstable();
    let rings = vmas.iter().filter(|entry| entry.status & vma::AIORING != 0);
    let rings: Vec<_> = rings.map(|entry| (entry.start, entry.end)).collect();
    if contexts != rings {
        problems.broken(format!(
            "its AIO contexts are at {contexts:x?}, but the rings of such contexts at {rings:x?}"
        ));
    }
}

fn check_mapping(entry: &proto::VmaEntry, problems: &mut Problems) {
    if is_vdso(entry) {
        return;
    }
    let place = range(entry);
    let unrestored = [
        (vma::SOCKET, "the ring of a packet socket"),
        (vma::SHSTK, "a shadow stack"),
        (vma::PLUGIN, "a device"),
    ];
    if let Some((_, what)) = unrestored.iter().find(|(bit, _)| entry.status & bit != 0) {
        problems.not_restored(format!("the mapping {place} is {what}, which is not restored"));
        return;
    }
    if entry.status & vma::AIORING != 0 {
        return; // `check_rings` compares it with its context.
    }
    let mut wrong = |problem: String| problems.broken(format!("the mapping {place} {problem}"));
    if KINDS.iter().filter(|kind| entry.status & **kind != 0).count() != 1 {
        wrong(format!("has no kind or several kinds: its status is {:#x}", entry.status));
        return;
    }
    let is_shared = entry.status & (vma::FILE_SHARED | vma::ANON_SHARED) != 0;
    let how = entry.flags & libc::MAP_TYPE.cast_unsigned();
    let fits = match how.cast_signed() {
        libc::MAP_SHARED | libc::MAP_SHARED_VALIDATE => is_shared,
        libc::MAP_PRIVATE => !is_shared,
        libc::MAP_DROPPABLE => entry.status & vma::ANON_PRIVATE != 0,
        _ => false,
    };
    if !fits {
        wrong(format!(
            "has flags {:#x}, which its status {:#x} contradicts",
            entry.flags, entry.status
        ));
    }
    if entry.prot & !PROTECTION != 0 {
        wrong(format!("has the unknown protection {:#x}", entry.prot));
    }
    let has_object = entry.status & vma::ANON_PRIVATE == 0;
    if has_object {
        let len = entry.end.saturating_sub(entry.start);
        let fits = entry.pgoff.is_multiple_of(PAGE_SIZE)
            && entry.pgoff.checked_add(len).is_some_and(|end| i64::try_from(end).is_ok());
        if !fits {
            wrong(format!("begins at offset {:#x} of its file", entry.pgoff));
        }
    }
    if entry.status & vma::SYSVIPC != 0 && entry.pgoff > entry.start {
        wrong(format!(
            "begins at offset {:#x} of a segment that would begin below address 0",
            entry.pgoff
        ));
    }
    if entry.flags & libc::MAP_HUGETLB.cast_unsigned() != 0 {
        let bytes = HugeSize::in_flags(entry.flags).bytes();
        if !entry.start.is_multiple_of(bytes) || !entry.end.is_multiple_of(bytes) {
            wrong(format!("is not aligned to huge pages of {bytes} bytes"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mm() -> proto::MmEntry {
        proto::MmEntry {
            mm_start_code: 0x1000,
            mm_end_code: 0x2000,
            mm_start_data: 0x2000,
            mm_end_data: 0x2000,
            mm_start_stack: 0x4000,
            mm_start_brk: 0x2000,
            mm_brk: 0x3000,
            mm_arg_start: 0x4000,
            mm_arg_end: 0x4000,
            mm_env_start: 0x4000,
            mm_env_end: 0x4000,
            mm_saved_auxv: vec![0, 0],
            ..Default::default()
        }
    }

    fn private(start: u64, end: u64) -> proto::VmaEntry {
        let status = vma::REGULAR | vma::ANON_PRIVATE;
        let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS).cast_unsigned();
        proto::VmaEntry { start, end, status, flags, prot: 3, ..Default::default() }
    }

    fn told(mm: &proto::MmEntry, vmas: &[proto::VmaEntry]) -> String {
        let mut problems = Problems::default();
        check(mm, vmas, &[], Machine::X86_64, &mut problems);
        problems.0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
    }

    #[test]
    fn mappings_that_cannot_be_are_told() {
        let first = private(0x1000, 0x2000);
        assert_eq!(told(&mm(), &[first, private(0x2000, 0x4000)]), "");
        let with = |change: fn(&mut proto::VmaEntry)| {
            let mut entry = private(0x4000, 0x6000);
            change(&mut entry);
            entry
        };
        for (bad, expected) in [
            (private(0x1800, 0x3000), "not page-aligned"),
            (private(0x3000, 0x3000), "is empty"),
            (private(0x1000, 0x3000), "overlaps"),
            (private(0x4000, 1 << 60), "above the highest address"),
            (with(|entry| entry.status = vma::REGULAR), "has no kind"),
            (with(|entry| entry.flags = 0), "contradicts"),
            (with(|entry| entry.prot = 0x1000), "unknown protection"),
            (with(|entry| entry.flags |= libc::MAP_HUGETLB.cast_unsigned()), "huge pages"),
            (
                with(|entry| {
                    entry.status = vma::FILE_PRIVATE;
                    entry.pgoff = 0x7fff_ffff_ffff_f000;
                }),
                "of its file",
            ),
            (with(|entry| entry.status |= vma::PLUGIN), "a device, which is not restored"),
        ] {
            let told = told(&mm(), &[first, bad]);
            assert!(told.contains(expected), "{expected}: {told}");
        }
        let ring = with(|entry| {
            entry.status = vma::AIORING;
            entry.flags = libc::MAP_SHARED.cast_unsigned();
        });
        let context = proto::AioRingEntry { id: 0x4000, nr_req: 1, ring_len: 0x2000 };
        let has = |context| proto::MmEntry { aios: vec![context], ..mm() };
        assert_eq!(told(&has(context), &[first, ring]), "");
        for (mm, vmas) in [
            (mm(), &[first, ring][..]),
            (has(context), &[first]),
            (has(proto::AioRingEntry { ring_len: 0x1000, ..context }), &[first, ring]),
            (has(proto::AioRingEntry { id: u64::MAX, ..context }), &[first, ring]),
        ] {
            let told = told(&mm, vmas);
            assert!(told.contains("its AIO contexts are at"), "{told}");
        }
        let broken = proto::MmEntry { mm_end_code: 0, ..mm() };
        assert!(told(&broken, &[first]).contains("its code is at"));
    }
}
