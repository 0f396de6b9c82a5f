//! The bits of `vma_entry.status`: what kind of mapping it is.
//!
//! The values are part of the image format: `VMA_AREA_*`, `VMA_FILE_*` and `VMA_ANON_*` in
//! CRIU 4.2, `criu/include/image.h`. CRIU uses bits from 28 up while it runs; they mean
//! nothing in an image.

/// A mapping that is dumped and restored, unlike [`VSYSCALL`].
pub const REGULAR: u32 = 1 << 0;
/// A stack that grows down.
pub const STACK: u32 = 1 << 1;
/// The kernel's page at the top of the address space; never dumped.
pub const VSYSCALL: u32 = 1 << 2;
/// The vDSO; its pages are always dumped, to private memory.
pub const VDSO: u32 = 1 << 3;
/// The heap, whose end `brk(2)` moves.
pub const HEAP: u32 = 1 << 5;

/// A private mapping of a file: changed pages are in private memory.
/// `vma_entry.shmid` is the id of the file.
pub const FILE_PRIVATE: u32 = 1 << 6;
/// A shared mapping of a file: no pages are dumped, unless it is a [`MEMFD`].
/// `vma_entry.shmid` is the id of the file.
pub const FILE_SHARED: u32 = 1 << 7;
/// Anonymous shared memory. `vma_entry.shmid` names the shared object.
pub const ANON_SHARED: u32 = 1 << 8;
/// Private memory without a file.
pub const ANON_PRIVATE: u32 = 1 << 9;

/// Together with [`ANON_SHARED`]: a System V segment. `vma_entry.shmid` is its IPC id.
pub const SYSVIPC: u32 = 1 << 10;
/// The ring of a packet socket; its pages are not dumped.
pub const SOCKET: u32 = 1 << 11;
/// The data of the vDSO; its pages are not dumped.
pub const VVAR: u32 = 1 << 12;
/// A ring of asynchronous I/O; its pages are dumped, to private memory.
pub const AIORING: u32 = 1 << 13;
/// Together with [`FILE_PRIVATE`] or [`FILE_SHARED`]: the file is a memfd or
/// anonymous shared memory, and its pages are those of a shared object.
pub const MEMFD: u32 = 1 << 14;
/// A shadow stack; its pages are in private memory.
pub const SHSTK: u32 = 1 << 15;
/// Not a mapping, but a range of guard pages within mappings (`MADV_GUARD_INSTALL`). These
/// entries follow all mappings.
pub const GUARD: u32 = 1 << 16;

/// A mapping of a device, which a plugin of CRIU has dumped.
pub const PLUGIN: u32 = 1 << 27;
