//! Probes of the kernel's tracking of memory changes.
#![expect(unsafe_code, reason = "mappings, and ioctls of pagemap and userfaultfd")]

use std::{
    fs::{self, File},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::FileExt,
    },
    ptr::{self, NonNull},
};

use nix::{errno::Errno, libc};

use super::descriptor;
use crate::{
    fault::{self, Novelty},
    units::{PAGE_LEN, PAGE_SIZE},
};

/// One page of this process that no other code uses.
pub(super) struct Page {
    start: NonNull<u8>,
}

impl Page {
    /// Maps a page and writes to it.
    pub(super) fn map(sharing: libc::c_int) -> Option<Self> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = sharing | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping, where the kernel likes it, disturbs no other.
        let start = unsafe { libc::mmap(ptr::null_mut(), PAGE_LEN, protection, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return None;
        }
        let page = Self { start: NonNull::new(start.cast())? };
        page.write();
        Some(page)
    }

    fn write(&self) {
        // SAFETY: the page is mapped writable for as long as `self` lives.
        unsafe { self.start.write_volatile(1) };
    }

    fn address(&self) -> u64 {
        self.start.as_ptr().expose_provenance() as u64
    }

    /// Whether the page has all `categories`; `None` if the kernel does not know them.
    pub(super) fn scan(&self, categories: u64) -> Option<bool> {
        let pagemap = File::open("/proc/self/pagemap").ok()?;
        let mut region = PageRegion::default();
        let mut arg = PmScanArg {
            size: size_of::<PmScanArg>() as u64,
            start: self.address(),
            end: self.address() + PAGE_SIZE,
            vec: (&raw mut region).expose_provenance() as u64,
            vec_len: 1,
            category_mask: categories,
            return_mask: categories,
            ..PmScanArg::default()
        };
        // SAFETY: `arg` has the size that it tells, and `region` is the one element
        // that it points to; both outlive the call.
        let found = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut arg) };
        Errno::result(found).ok().map(|found| found > 0)
    }

    /// Whether the pagemap shows the page as soft-dirty.
    fn is_soft_dirty(&self) -> Option<bool> {
        /// `Documentation/admin-guide/mm/pagemap.rst`
        const SOFT_DIRTY: u64 = 1 << 55;
        let mut entry = [0; size_of::<u64>()];
        let pagemap = File::open("/proc/self/pagemap").ok()?;
        let offset = self.address() / PAGE_SIZE * entry.len() as u64;
        pagemap.read_exact_at(&mut entry, offset).ok()?;
        Some(u64::from_ne_bytes(entry) & SOFT_DIRTY != 0)
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours alone, and no reference to it is left.
        unsafe { libc::munmap(self.start.as_ptr().cast(), PAGE_LEN) };
    }
}

/// Whether the kernel reports a write after the bits were cleared.
pub(super) fn soft_dirty() -> bool {
    /// `Documentation/filesystems/proc.rst`
    const CLEAR_SOFT_DIRTY: &[u8] = b"4";
    let seen = || {
        let page = Page::map(libc::MAP_PRIVATE)?;
        fs::write("/proc/self/clear_refs", CLEAR_SOFT_DIRTY).ok()?;
        let before = page.is_soft_dirty()?;
        page.write();
        Some(!before && page.is_soft_dirty()?)
    };
    seen().unwrap_or(false)
}

/// Whether `smaps` shows memory that is locked on fault (`MLOCK_ONFAULT`) by the code for unknown
/// flags.
pub(super) fn hides_lock_on_fault() -> bool {
    let codes = || {
        let page = Page::map(libc::MAP_PRIVATE)?;
        // SAFETY: the page is mapped, and locking it changes nothing of it.
        let locked =
            unsafe { libc::mlock2(page.start.as_ptr().cast(), PAGE_LEN, libc::MLOCK_ONFAULT) };
        Errno::result(locked).ok()?;
        let smaps = fs::read_to_string("/proc/self/smaps").ok()?;
        let begin = format!("{:x}-", page.address());
        let own = smaps.lines().skip_while(|line| !line.starts_with(&begin));
        own.into_iter().find_map(|line| line.strip_prefix("VmFlags:")).map(str::to_owned)
    };
    let named = if fault::is_without(Novelty::LockOnFault) { "" } else { "lf" };
    let codes = codes().unwrap_or_default();
    let has = |wanted: &str| codes.split_whitespace().any(|code| code == wanted);
    has("lo") && !has(named) && (has("??") || named.is_empty())
}

/// `struct pm_scan_arg`, `linux/fs.h` (Linux 6.7)
#[repr(C)]
#[derive(Default)]
struct PmScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}
const _: () = assert!(size_of::<PmScanArg>() == 96);

/// `struct page_region`, `linux/fs.h` (Linux 6.7)
#[repr(C)]
#[derive(Default)]
pub(super) struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}
const _: () = assert!(size_of::<PageRegion>() == 24);

/// `PAGE_IS_WRITTEN`, `linux/fs.h`
const PAGE_IS_WRITTEN: u64 = 1 << 1;

/// `_IOWR('f', 16, struct pm_scan_arg)`
const PAGEMAP_SCAN: libc::c_ulong = iowr(b'f', 16, size_of::<PmScanArg>());
const _: () = assert!(PAGEMAP_SCAN == 0xc060_6610);

/// Returns the number of an ioctl that reads and writes a structure of `bytes`
/// (`asm-generic/ioctl.h`).
const fn iowr(kind: u8, number: u8, bytes: usize) -> libc::c_ulong {
    3 << 30
        | (bytes as libc::c_ulong) << 16
        | (kind as libc::c_ulong) << 8
        | number as libc::c_ulong
}

/// `struct uffdio_api`, `linux/userfaultfd.h`
#[repr(C)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}
const _: () = assert!(size_of::<UffdioApi>() == 24);

/// `struct uffdio_register`, `linux/userfaultfd.h`
#[repr(C)]
struct UffdioRegister {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}
const _: () = assert!(size_of::<UffdioRegister>() == 32);

/// `struct uffdio_writeprotect`, `linux/userfaultfd.h` (Linux 5.7)
#[repr(C)]
struct UffdioWriteprotect {
    start: u64,
    len: u64,
    mode: u64,
}
const _: () = assert!(size_of::<UffdioWriteprotect>() == 24);

const UFFDIO: u8 = 0xaa;
/// `_IO(0xaa, 0)`, of `/dev/userfaultfd` (Linux 6.1)
const USERFAULTFD_IOC_NEW: libc::c_ulong = 0xaa00;
const UFFDIO_API: libc::c_ulong = iowr(UFFDIO, 0x3f, size_of::<UffdioApi>());
const UFFDIO_REGISTER: libc::c_ulong = iowr(UFFDIO, 0x00, size_of::<UffdioRegister>());
const UFFDIO_WRITEPROTECT: libc::c_ulong = iowr(UFFDIO, 0x06, size_of::<UffdioWriteprotect>());
/// `UFFD_API`
const UFFD_API: u64 = 0xaa;
/// `UFFD_FEATURE_WP_HUGETLBFS_SHMEM` (Linux 5.19), `UFFD_FEATURE_WP_UNPOPULATED`
/// (Linux 6.4) and `UFFD_FEATURE_WP_ASYNC` (Linux 6.7)
const WRITE_PROTECT_FEATURES: u64 = 1 << 12 | 1 << 13 | 1 << 15;
/// `UFFDIO_REGISTER_MODE_WP`
const REGISTER_MODE_WP: u64 = 1 << 1;
/// `UFFDIO_WRITEPROTECT_MODE_WP`
const WRITEPROTECT_MODE_WP: u64 = 1;
/// `UFFD_USER_MODE_ONLY` (Linux 5.11)
const UFFD_USER_MODE_ONLY: libc::c_int = 1;

/// Creates a userfaultfd: by the device, or by the system call, with or without faults in the kernel.
pub(super) fn userfaultfd() -> Option<OwnedFd> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    if let Ok(device) = File::options().read(true).write(true).open("/dev/userfaultfd") {
        // SAFETY: plain integers; makes a descriptor.
        let made = unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, flags) };
        if let Some(made) = descriptor(made.into()) {
            return Some(made);
        }
    }
    [flags, flags | UFFD_USER_MODE_ONLY].into_iter().find_map(|flags| {
        // SAFETY: plain integers; makes a descriptor.
        descriptor(unsafe { libc::syscall(libc::SYS_userfaultfd, flags) })
    })
}

/// Whether a write to memory of this kind, after it was protected, passes and is recorded.
pub(super) fn write_protect(sharing: libc::c_int) -> bool {
    let seen = || {
        let page = Page::map(sharing)?;
        let fd = userfaultfd()?;
        let mut api = UffdioApi { api: UFFD_API, features: WRITE_PROTECT_FEATURES, ioctls: 0 };
        let (start, len) = (page.address(), PAGE_SIZE);
        let mut register = UffdioRegister { start, len, mode: REGISTER_MODE_WP, ioctls: 0 };
        let mut protect = UffdioWriteprotect { start, len, mode: WRITEPROTECT_MODE_WP };
        // SAFETY: each argument is what its ioctl expects, and outlives the call.
        // With WP_ASYNC a write to the page does not wait for us.
        let done = unsafe {
            libc::ioctl(fd.as_raw_fd(), UFFDIO_API, &raw mut api) == 0
                && libc::ioctl(fd.as_raw_fd(), UFFDIO_REGISTER, &raw mut register) == 0
                && libc::ioctl(fd.as_raw_fd(), UFFDIO_WRITEPROTECT, &raw mut protect) == 0
        };
        let before = done.then(|| page.scan(PAGE_IS_WRITTEN))??;
        page.write();
        Some(!before && page.scan(PAGE_IS_WRITTEN)?)
    };
    seen().unwrap_or(false)
}
