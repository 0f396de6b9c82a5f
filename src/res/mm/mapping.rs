//! Mappings: reads them from `/proc/PID/smaps`, builds their image entries, and recreates them.

use nix::libc;

use crate::{
    fault::{self, Novelty},
    image::{proto::VmaEntry, vma},
    proc::{Mapping, VmFlags},
    res::{ResError, Result},
    sys::Features,
    units::{HostPid, HugeSize, PAGE_SIZE},
};

/// The advice that is dumped: the flag in `smaps`, and the `MADV_*` number
/// (`asm-generic/mman-common.h`), which is also the bit in `vma_entry.madv`.
const ADVICE: [(VmFlags, i32); 8] = [
    (VmFlags::RAND_READ, libc::MADV_RANDOM),
    (VmFlags::SEQ_READ, libc::MADV_SEQUENTIAL),
    (VmFlags::DONT_COPY, libc::MADV_DONTFORK),
    (VmFlags::MERGEABLE, libc::MADV_MERGEABLE),
    (VmFlags::HUGE_PAGE, libc::MADV_HUGEPAGE),
    (VmFlags::NO_HUGE_PAGE, libc::MADV_NOHUGEPAGE),
    (VmFlags::DONT_DUMP, libc::MADV_DONTDUMP),
    (VmFlags::WIPE_ON_FORK, libc::MADV_WIPEONFORK),
];

/// The name of the file behind anonymous memory of huge pages.
const HUGE_ANONYMOUS: &[u8] = b"/anon_hugepage (deleted)";

/// With `MAP_LOCKED`, marks a mapping whose pages the kernel locks when they are touched
/// (`MLOCK_ONFAULT`). `mmap(2)` ignores this flag without `MAP_POPULATE`, so another restorer
/// only loses the mark.
pub const LOCKED_ON_FAULT: u32 = libc::MAP_NONBLOCK.cast_unsigned();

/// The object behind a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Object {
    /// Private anonymous memory.
    Private,
    /// A file with a name.
    File,
    /// Anonymous shared memory, or a memfd.
    SharedMemory,
    /// A System V segment.
    SystemV,
    /// The ring of an AIO context (`io_setup(2)`).
    AioRing,
    /// The code of the vDSO.
    Vdso,
    /// The data of the vDSO.
    Vvar,
    /// The vsyscall page, which all processes have at the same address.
    Vsyscall,
}

/// Returns the object behind a mapping.
///
/// # Errors
/// [`ResError::Unsupported`] or [`ResError::Refused`] for objects that rcriu does not dump, such as
/// devices.
pub fn object(pid: HostPid, mapping: &Mapping) -> Result<Object> {
    let name = mapping.name.as_slice();
    let flags = mapping.flags;
    if name == b"[vsyscall]" {
        return Ok(Object::Vsyscall);
    }
    if name == b"[vdso]" {
        return Ok(Object::Vdso);
    }
    if name.starts_with(b"[vvar") {
        return Ok(Object::Vvar);
    }
    let refuse = |what: &str| {
        let name = String::from_utf8_lossy(name);
        let what = format!("it maps {what} at {} ({name})", mapping.start);
        Err(ResError::Unsupported { pid, what })
    };
    if flags.contains(VmFlags::UFFD_MISSING) {
        let what = format!(
            "pages of its memory at {} are supplied on demand (userfaultfd), and may not be there \
             yet\nhelp: dump it when the program that supplies them has ended",
            mapping.start
        );
        return Err(ResError::Unsupported { pid, what });
    }
    if flags.contains(VmFlags::SHADOW_STACK) {
        return refuse("a shadow stack");
    }
    // The kernel gives execute-only memory a protection key, and will do so again.
    let only_executed = mapping.execute && !mapping.read && !mapping.write;
    if mapping.protection_key != 0 && !only_executed {
        return refuse("memory with a protection key");
    }
    if name.starts_with(b"/[aio]") {
        return Ok(Object::AioRing);
    }
    if flags.intersects(VmFlags::IO | VmFlags::PFN_MAP) {
        return refuse("a device");
    }
    if name.starts_with(b"anon_inode:") || name.starts_with(b"socket:") {
        return refuse("a file without a name");
    }
    if flags.contains(VmFlags::HUGE_TLB) && name == HUGE_ANONYMOUS {
        return Ok(if mapping.shared { Object::SharedMemory } else { Object::Private });
    }
    if mapping.inode == 0 && mapping.dev_major == 0 && mapping.dev_minor == 0 {
        return if mapping.shared {
            refuse("shared memory of an unknown kind")
        } else {
            Ok(Object::Private)
        };
    }
    if name.starts_with(b"/SYSV") && name.ends_with(b" (deleted)") {
        return Ok(Object::SystemV);
    }
    // A process maps such an object privately by opening /proc/PID/map_files.
    let anonymous = name == b"/dev/zero (deleted)" || name.starts_with(b"[anon_shmem:");
    if anonymous || name.starts_with(b"/memfd:") {
        return Ok(Object::SharedMemory);
    }
    Ok(Object::File)
}

/// Builds the image entry for a mapping of `object`; `shmid` is the number of its file or
/// shared memory object.
pub fn entry(mapping: &Mapping, object: Object, shmid: u64) -> VmaEntry {
    let flags = mapping.flags;
    let kind = match object {
        Object::Private if mapping.name == b"[heap]" => vma::HEAP | vma::ANON_PRIVATE,
        Object::Private => vma::ANON_PRIVATE,
        Object::File if mapping.shared => vma::FILE_SHARED,
        Object::File => vma::FILE_PRIVATE,
        Object::SharedMemory if mapping.shared => vma::FILE_SHARED | vma::MEMFD,
        Object::SharedMemory => vma::FILE_PRIVATE | vma::MEMFD,
        Object::SystemV => vma::ANON_SHARED | vma::SYSVIPC,
        Object::Vdso => vma::VDSO | vma::ANON_PRIVATE,
        Object::Vvar => vma::VVAR | vma::ANON_PRIVATE,
        Object::Vsyscall => vma::VSYSCALL,
        Object::AioRing => vma::AIORING,
    };
    // CRIU gives a ring no other bit.
    let regular = if object == Object::AioRing { 0 } else { vma::REGULAR };
    let has_file = matches!(object, Object::File | Object::SharedMemory);
    let mut map = if mapping.shared {
        libc::MAP_SHARED
    } else if flags.contains(VmFlags::DROPPABLE) {
        libc::MAP_DROPPABLE
    } else {
        libc::MAP_PRIVATE
    };
    let conditions = [
        (!has_file && object != Object::AioRing, libc::MAP_ANONYMOUS),
        (flags.contains(VmFlags::GROWS_DOWN), libc::MAP_GROWSDOWN),
        (flags.contains(VmFlags::LOCKED), libc::MAP_LOCKED),
        (flags.contains(VmFlags::NO_RESERVE), libc::MAP_NORESERVE),
        (flags.contains(VmFlags::HUGE_TLB), libc::MAP_HUGETLB),
    ];
    for (_, flag) in conditions.iter().filter(|(condition, _)| *condition) {
        map |= flag;
    }
    let mut flag_bits = map.cast_unsigned();
    if is_locked_on_fault(flags) {
        flag_bits |= LOCKED_ON_FAULT;
    }
    flag_bits |= huge_size(mapping).map_or(0, HugeSize::flags);
    let protection = [
        (mapping.read, libc::PROT_READ),
        (mapping.write, libc::PROT_WRITE),
        (mapping.execute, libc::PROT_EXEC),
    ];
    let prot: i32 = protection.iter().filter(|(has, _)| *has).map(|(_, bit)| bit).sum();
    let advice = ADVICE.iter().filter(|(flag, _)| flags.contains(*flag));
    let madv = advice.fold(0, |bits, (_, number)| bits | 1_u64 << number);
    let write_back = mapping.shared && may_write(mapping);
    VmaEntry {
        start: mapping.start.0,
        end: mapping.end.0,
        pgoff: mapping.offset,
        shmid,
        prot: prot.cast_unsigned(),
        flags: flag_bits,
        status: regular | kind,
        fd: -1,
        madv: (madv != 0).then_some(madv),
        fdflags: has_file
            .then_some(if write_back { libc::O_RDWR } else { libc::O_RDONLY }.cast_unsigned()),
    }
}

/// Returns the size of the huge pages of a mapping with `MAP_HUGETLB`.
pub fn huge_size(mapping: &Mapping) -> Option<HugeSize> {
    let huge = mapping.flags.contains(VmFlags::HUGE_TLB);
    huge.then(|| HugeSize::of(mapping.kernel_page_bytes))
}

/// Returns the page size of a mapping.
pub fn page_bytes(entry: &VmaEntry) -> u64 {
    if entry.flags & libc::MAP_HUGETLB.cast_unsigned() == 0 {
        PAGE_SIZE
    } else {
        HugeSize::in_flags(entry.flags).bytes()
    }
}

/// Whether the kernel locks pages of the mapping when they are touched. Kernels that do not name
/// this flag in `smaps` show it as unknown.
fn is_locked_on_fault(flags: VmFlags) -> bool {
    let named = flags.contains(VmFlags::LOCK_ON_FAULT);
    if named && !fault::is_without(Novelty::LockOnFault) {
        return true;
    }
    (named || flags.contains(VmFlags::UNKNOWN))
        && flags.contains(VmFlags::LOCKED)
        && Features::hides_lock_on_fault()
}

/// Whether the file of a mapping was opened for writing.
fn may_write(mapping: &Mapping) -> bool {
    mapping.write || mapping.flags.contains(VmFlags::MAY_WRITE)
}

/// Returns the advice of a mapping, as arguments of `madvise(2)`.
pub fn advice(entry: &VmaEntry) -> impl Iterator<Item = i32> + use<> {
    let bits = entry.madv.unwrap_or(0);
    ADVICE.into_iter().map(|(_, number)| number).filter(move |number| bits >> number & 1 == 1)
}

/// Whether a mapping belongs to anonymous shared memory.
pub fn is_anonymous_object(entry: &VmaEntry) -> bool {
    entry.status & vma::ANON_SHARED != 0 && entry.status & vma::SYSVIPC == 0
}

/// Whether the pages of the mapping belong to the private memory of the process.
pub fn is_private(entry: &VmaEntry) -> bool {
    entry.status & (vma::ANON_PRIVATE | vma::FILE_PRIVATE | vma::AIORING) != 0
        && entry.status & (vma::VVAR | vma::VSYSCALL | vma::GUARD) == 0
}

/// Whether `next` directly follows `before` and belongs to the same image entry.
///
/// The kernel shows the data of the vDSO as several mappings, but creates, moves and removes
/// them together. CRIU records them as one. If its first mapping were shorter than CRIU's own,
/// CRIU would take the vDSO for another kernel's and replace it.
pub fn continues(before: &VmaEntry, next: &VmaEntry) -> bool {
    before.status & next.status & vma::VVAR != 0 && before.end == next.start
}

/// Whether the mapping is the vsyscall page.
pub fn is_vsyscall(entry: &VmaEntry) -> bool {
    entry.status & vma::VSYSCALL != 0
}

/// Whether the mapping is the ring of an AIO context. Its pages are in the private memory, and a
/// restore puts them into private memory first.
pub fn is_aio_ring(entry: &VmaEntry) -> bool {
    entry.status & vma::AIORING != 0
}

/// Whether the mapping is part of the vDSO: its code or its data.
pub fn is_vdso(entry: &VmaEntry) -> bool {
    entry.status & (vma::VDSO | vma::VVAR) != 0
}
