//! System V shared memory (`shmctl(2)`, `shmget(2)`, `shmat(2)`).
#![expect(unsafe_code, reason = "calls that nix does not have")]

use std::{fs::File, io, mem::MaybeUninit, ptr};

use nix::{errno::Errno, libc};

use super::sysv::{self, Permissions};

/// `SHM_STAT`, `SHM_INFO` (`linux/shm.h`).
const SHM_STAT: i32 = 13;
const SHM_INFO: i32 = 14;

/// A segment (`struct shmid_ds`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Its owner and mode.
    pub permissions: Permissions,
    /// Its size.
    pub bytes: u64,
    /// The number of attachments.
    pub attached: u64,
    /// The process that last attached or detached it.
    pub last_pid: i32,
}

fn number(id: u32) -> i32 {
    id.cast_signed()
}

fn status(id: u32) -> Result<libc::shmid_ds, Errno> {
    let mut status = MaybeUninit::<libc::shmid_ds>::zeroed();
    // SAFETY: the kernel writes a structure of this size.
    let result = unsafe { libc::shmctl(number(id), libc::IPC_STAT, status.as_mut_ptr()) };
    Errno::result(result)?;
    // SAFETY: the structure is integers, for which all bytes are valid.
    Ok(unsafe { status.assume_init() })
}

/// Returns the attributes of a segment.
///
/// # Errors
/// `EINVAL` or `EIDRM` if the segment does not exist; `EACCES`.
pub fn stat(id: u32) -> Result<Segment, Errno> {
    let status = status(id)?;
    Ok(Segment {
        permissions: status.shm_perm.into(),
        bytes: status.shm_segsz as u64,
        attached: status.shm_nattch,
        last_pid: status.shm_lpid,
    })
}

/// Creates a segment and returns its id. `mode` holds the permissions and the flags for huge pages.
///
/// # Errors
/// `EEXIST` if a segment has this key.
pub fn create(key: u32, bytes: u64, mode: u32) -> Result<u32, Errno> {
    let bytes = usize::try_from(bytes).map_err(|_| Errno::ENOMEM)?;
    let flags = libc::IPC_CREAT | libc::IPC_EXCL | mode.cast_signed();
    // SAFETY: the call takes numbers.
    let result = unsafe { libc::shmget(key.cast_signed(), bytes, flags) };
    Errno::result(result).map(i32::cast_unsigned)
}

/// Returns the ids of all segments of the namespace.
pub fn segments() -> Result<Vec<u32>, Errno> {
    let call = |index, command| {
        let mut buffer = MaybeUninit::<libc::shmid_ds>::zeroed();
        // SAFETY: the kernel writes a `struct shm_info` or `struct shmid_ds`; the latter is the larger.
        unsafe { libc::shmctl(index, command, buffer.as_mut_ptr()) }
    };
    sysv::ids(|| call(0, SHM_INFO), |index| call(index, SHM_STAT))
}

/// Sets the owner and the permissions of a segment.
pub fn set_owner(id: u32, wanted: &Permissions) -> Result<(), Errno> {
    let mut status = status(id)?;
    sysv::set_owner(&mut status.shm_perm, wanted);
    // SAFETY: the structure outlives the call.
    let result = unsafe { libc::shmctl(number(id), libc::IPC_SET, &raw mut status) };
    Errno::result(result).map(drop)
}

/// Keeps the pages of a segment from being swapped out.
///
/// # Errors
/// `EPERM`, `ENOMEM`: beyond the user's limit of locked memory, without `CAP_IPC_LOCK`.
pub fn lock(id: u32) -> Result<(), Errno> {
    // SAFETY: the command takes no structure.
    let result = unsafe { libc::shmctl(number(id), libc::SHM_LOCK, ptr::null_mut()) };
    Errno::result(result).map(drop)
}

/// Removes a segment, either now or when the last process detaches it.
pub fn remove(id: u32) -> Result<(), Errno> {
    // SAFETY: the command takes no structure.
    let result = unsafe { libc::shmctl(number(id), libc::IPC_RMID, ptr::null_mut()) };
    Errno::result(result).map(drop)
}

/// Opens the memory of a segment with pages of `page_bytes` as a file.
pub fn open(id: u32, bytes: u64, page_bytes: u64) -> io::Result<File> {
    let attached = Attached::new(id, 0)?;
    File::options().read(true).write(true).open(attached.path(bytes, page_bytes))
}

/// Opens the memory of a segment as a file, to read it. Returns the size of its pages as well.
///
/// Sets the time of the last attachment and the last process of the segment.
pub fn open_to_read(id: u32, bytes: u64) -> io::Result<(File, u64)> {
    /// From the smallest pages to the largest of any architecture, 16 GiB.
    const SHIFTS: std::ops::RangeInclusive<u32> = 12..=34;
    let attached = Attached::new(id, libc::SHM_RDONLY)?;
    // The file has the end of the mapping in its name.
    for page_bytes in SHIFTS.map(|shift| 1 << shift) {
        match File::open(attached.path(bytes, page_bytes)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            result => return Ok((result?, page_bytes)),
        }
    }
    Err(io::ErrorKind::NotFound.into())
}

/// A segment that this process has attached, until this is dropped.
struct Attached(*mut libc::c_void);

impl Attached {
    fn new(id: u32, flags: i32) -> io::Result<Self> {
        // SAFETY: a mapping at a place of the kernel's choice touches no other.
        let start = unsafe { libc::shmat(number(id), ptr::null(), flags) };
        if start.addr() == usize::MAX {
            return Err(Errno::last().into());
        }
        Ok(Self(start))
    }

    /// Returns the path of the file behind the mapping.
    fn path(&self, bytes: u64, page_bytes: u64) -> String {
        let start = self.0.addr() as u64;
        let end = start.saturating_add(bytes.next_multiple_of(page_bytes));
        format!("/proc/self/map_files/{start:x}-{end:x}")
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        // SAFETY: this value has made the mapping, and no other code has its address.
        unsafe { libc::shmdt(self.0) };
    }
}
