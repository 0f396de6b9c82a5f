//! System V shared memory (`shmctl(2)`, `shmget(2)`, `shmat(2)`).
#![expect(unsafe_code, reason = "calls that nix does not have")]

use std::{fs::File, io, mem::MaybeUninit, ptr};

use nix::{errno::Errno, libc};

/// A segment (`struct shmid_ds`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Its key; 0 for `IPC_PRIVATE`.
    pub key: u32,
    /// Its owner.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
    /// The user that created it.
    pub creator_uid: u32,
    /// The group of the user that created it.
    pub creator_gid: u32,
    /// Permissions, `SHM_DEST`, `SHM_LOCKED`.
    pub mode: u32,
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
        key: status.shm_perm.__key.cast_unsigned(),
        uid: status.shm_perm.uid,
        gid: status.shm_perm.gid,
        creator_uid: status.shm_perm.cuid,
        creator_gid: status.shm_perm.cgid,
        mode: u32::from(status.shm_perm.mode),
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

/// Sets the owner and the permissions of a segment.
pub fn set_owner(id: u32, uid: u32, gid: u32, mode: u32) -> Result<(), Errno> {
    let mut status = status(id)?;
    status.shm_perm.uid = uid;
    status.shm_perm.gid = gid;
    status.shm_perm.mode = mode.try_into().map_err(|_| Errno::EINVAL)?;
    // SAFETY: the structure outlives the call.
    let result = unsafe { libc::shmctl(number(id), libc::IPC_SET, &raw mut status) };
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
    // SAFETY: a mapping at a place of the kernel's choice touches no other.
    let start = unsafe { libc::shmat(number(id), ptr::null(), 0) };
    if start.addr() == usize::MAX {
        return Err(Errno::last().into());
    }
    let end = start.addr() as u64 + bytes.next_multiple_of(page_bytes);
    let path = format!("/proc/self/map_files/{:x}-{end:x}", start.addr());
    let file = File::options().read(true).write(true).open(path);
    // SAFETY: this function has made the mapping, and no other code has its address.
    unsafe { libc::shmdt(start) };
    file
}
