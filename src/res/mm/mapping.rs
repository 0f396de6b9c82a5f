//! Mappings: what `/proc/PID/smaps` says of one, what an image says of it, and the
//! calls that make it again.

use nix::libc;

use crate::{
    fault::{self, Novelty},
    image::{proto::VmaEntry, vma},
    proc::{Mapping, VmFlags},
    res::{ResError, Result},
    sys::Features,
    units::{HostPid, HugeSize, PAGE_SIZE},
};

/// Advice that is kept: the flag that shows it, and its number (`MADV_*`,
/// `asm-generic/mman-common.h`), which is its bit in `vma_entry.madv`.
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

/// What the kernel calls anonymous memory of huge pages: it is that of a file of its own.
const HUGE_ANONYMOUS: &[u8] = b"/anon_hugepage (deleted)";

/// Together with `MAP_LOCKED`: pages are locked as they are touched. `mmap(2)` ignores
/// the flag without `MAP_POPULATE`, so that other restorers lose nothing but this.
pub const LOCKED_ON_FAULT: u32 = libc::MAP_NONBLOCK.cast_unsigned();

/// What a mapping maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Object {
    /// Private memory without a file.
    Private,
    /// A regular file, or something else that has a name.
    File,
    /// Memory that is shared by inheritance, or a memfd.
    SharedMemory,
    /// A System V segment.
    SystemV,
    /// The code of the vDSO.
    Vdso,
    /// The data of the vDSO.
    Vvar,
    /// The page that is the same in all processes.
    Vsyscall,
}

/// Returns what a mapping maps.
///
/// # Errors
/// [`ResError::Unsupported`] for mappings of devices and the like.
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
    if flags.contains(VmFlags::SHADOW_STACK) {
        return refuse("a shadow stack");
    }
    // What can only be executed has one of the kernel's, which it gives again.
    let only_executed = mapping.execute && !mapping.read && !mapping.write;
    if mapping.protection_key != 0 && !only_executed {
        return refuse("memory with a protection key");
    }
    if name.starts_with(b"/[aio]") {
        return refuse("a ring of asynchronous I/O");
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
    // Also mapped privately, by a descriptor from /proc/PID/map_files.
    let anonymous = name == b"/dev/zero (deleted)" || name.starts_with(b"[anon_shmem:");
    if anonymous || name.starts_with(b"/memfd:") {
        return Ok(Object::SharedMemory);
    }
    Ok(Object::File)
}

/// Returns what an image says of a mapping of `object`; `shmid` is the number of
/// the file or segment.
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
    };
    let has_file = matches!(object, Object::File | Object::SharedMemory);
    let mut map = if mapping.shared {
        libc::MAP_SHARED
    } else if flags.contains(VmFlags::DROPPABLE) {
        libc::MAP_DROPPABLE
    } else {
        libc::MAP_PRIVATE
    };
    let conditions = [
        (!has_file, libc::MAP_ANONYMOUS),
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
        status: vma::REGULAR | kind,
        fd: -1,
        madv: (madv != 0).then_some(madv),
        fdflags: has_file
            .then_some(if write_back { libc::O_RDWR } else { libc::O_RDONLY }.cast_unsigned()),
    }
}

/// Returns the size of the huge pages that a mapping asked for by name, if it did.
pub fn huge_size(mapping: &Mapping) -> Option<HugeSize> {
    let huge = mapping.flags.contains(VmFlags::HUGE_TLB);
    huge.then(|| HugeSize::of(mapping.kernel_page_bytes))
}

/// Returns the bytes in a page of a mapping.
pub fn page_bytes(entry: &VmaEntry) -> u64 {
    if entry.flags & libc::MAP_HUGETLB.cast_unsigned() == 0 {
        PAGE_SIZE
    } else {
        HugeSize::in_flags(entry.flags).bytes()
    }
}

/// Whether a mapping is locked page by page as they are touched, also where the kernel
/// has no name for that.
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

/// Returns the advice that a mapping was given, as arguments of `madvise(2)`.
pub fn advice(entry: &VmaEntry) -> impl Iterator<Item = i32> + use<> {
    let bits = entry.madv.unwrap_or(0);
    ADVICE.into_iter().map(|(_, number)| number).filter(move |number| bits >> number & 1 == 1)
}

/// Whether pages of the mapping are in the private memory of the process.
pub fn is_private(entry: &VmaEntry) -> bool {
    entry.status & (vma::ANON_PRIVATE | vma::FILE_PRIVATE) != 0
        && entry.status & (vma::VVAR | vma::VSYSCALL | vma::GUARD) == 0
}

/// Whether a mapping goes on where the one before it ends, as one entry of the image.
///
/// The kernel shows the data of the vDSO in several mappings, but makes, moves and
/// removes them together. CRIU records them as one, and takes the vDSO for that of
/// another kernel, which it replaces, if the first is shorter than its own.
pub fn continues(before: &VmaEntry, next: &VmaEntry) -> bool {
    before.status & next.status & vma::VVAR != 0 && before.end == next.start
}

/// Whether the mapping is the page that all processes have at the same place.
pub fn is_vsyscall(entry: &VmaEntry) -> bool {
    entry.status & vma::VSYSCALL != 0
}

/// Whether the mapping is one that the kernel makes: the vDSO with its data.
pub fn is_vdso(entry: &VmaEntry) -> bool {
    entry.status & (vma::VDSO | vma::VVAR) != 0
}
