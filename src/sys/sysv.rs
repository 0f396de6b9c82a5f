//! System V message queues and semaphores (`sysvipc(7)`), and what all three kinds of objects share.
#![expect(unsafe_code, reason = "calls that nix does not have")]

use std::{ffi::c_ulong, mem::MaybeUninit, ptr};

use nix::{errno::Errno, libc};

/// `MSG_STAT`, `MSG_INFO` (`linux/msg.h`).
const MSG_STAT: i32 = 11;
const MSG_INFO: i32 = 12;
/// `SEM_STAT`, `SEM_INFO` (`linux/sem.h`).
const SEM_STAT: i32 = 18;
const SEM_INFO: i32 = 19;
/// `MSG_COPY` (`linux/msg.h`): leaves the message in the queue. Since Linux 3.8.
const MSG_COPY: i32 = 0o40000;

/// `SECBIT_NO_SETUID_FIXUP` (`linux/securebits.h`): capabilities stay when the user changes.
const NO_SETUID_FIXUP: i32 = 1 << 2;

/// Owner, creator and mode of an object (`struct ipc_perm`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Permissions {
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
    /// Permissions and, of a segment, `SHM_DEST` and `SHM_LOCKED`.
    pub mode: u32,
}

impl From<libc::ipc_perm> for Permissions {
    fn from(found: libc::ipc_perm) -> Self {
        Self {
            key: found.__key.cast_unsigned(),
            uid: found.uid,
            gid: found.gid,
            creator_uid: found.cuid,
            creator_gid: found.cgid,
            mode: u32::from(found.mode),
        }
    }
}

/// A message queue (`struct msqid_ds`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Queue {
    /// Its owner and mode.
    pub permissions: Permissions,
    /// The most bytes of all its messages.
    pub bytes_max: u64,
    /// The bytes of its messages.
    pub bytes: u64,
    /// The number of its messages.
    pub messages: u64,
}

/// A set of semaphores (`struct semid_ds`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Semaphores {
    /// Its owner and mode.
    pub permissions: Permissions,
    /// The number of semaphores.
    pub count: u32,
}

// Commands that describe a namespace write a `struct msginfo` or `struct seminfo` instead.
const _: () = assert!(size_of::<libc::msqid_ds>() >= size_of::<[i32; 8]>());
const _: () = assert!(size_of::<libc::semid_ds>() >= size_of::<[i32; 10]>());

fn number(id: u32) -> i32 {
    id.cast_signed()
}

/// Collects the ids of all objects of a kind. `info` returns the highest index in use, `stat` the id
/// of the object at an index.
pub(super) fn ids(
    info: impl FnOnce() -> i32,
    stat: impl Fn(i32) -> i32,
) -> Result<Vec<u32>, Errno> {
    let highest = Errno::result(info())?;
    let mut found = Vec::new();
    for index in 0..=highest {
        match Errno::result(stat(index)) {
            Ok(id) => found.push(id.cast_unsigned()),
            // An unused index.
            Err(Errno::EINVAL | Errno::EIDRM) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(found)
}

/// Returns the ids of all message queues of the namespace.
pub fn queues() -> Result<Vec<u32>, Errno> {
    let call = |index, command| {
        // The largest structure of these commands.
        let mut buffer = MaybeUninit::<libc::msqid_ds>::zeroed();
        // SAFETY: the kernel writes a `struct msginfo` or `struct msqid_ds`; the latter is the larger.
        unsafe { libc::msgctl(index, command, buffer.as_mut_ptr()) }
    };
    ids(|| call(0, MSG_INFO), |index| call(index, MSG_STAT))
}

fn queue_status(id: u32) -> Result<libc::msqid_ds, Errno> {
    let mut status = MaybeUninit::<libc::msqid_ds>::zeroed();
    // SAFETY: the kernel writes a structure of this size.
    Errno::result(unsafe { libc::msgctl(number(id), libc::IPC_STAT, status.as_mut_ptr()) })?;
    // SAFETY: the structure is integers, for which all bytes are valid.
    Ok(unsafe { status.assume_init() })
}

/// Returns the attributes of a queue.
///
/// # Errors
/// `EINVAL` or `EIDRM` if the queue does not exist; `EACCES`.
pub fn queue(id: u32) -> Result<Queue, Errno> {
    let status = queue_status(id)?;
    Ok(Queue {
        permissions: status.msg_perm.into(),
        bytes_max: status.msg_qbytes,
        bytes: status.__msg_cbytes,
        messages: status.msg_qnum,
    })
}

/// Returns the type and the text of the message at a position of a queue, and leaves it there. `bytes_max` bounds its text.
///
/// # Errors
/// `ENOMSG` behind the last one; `E2BIG`; `ENOSYS` on kernels without `CONFIG_CHECKPOINT_RESTORE`.
pub fn copy_message(id: u32, position: i64, bytes_max: usize) -> Result<(i64, Vec<u8>), Errno> {
    const HEAD: usize = size_of::<libc::c_long>();
    let mut buffer = vec![0_u8; HEAD + bytes_max];
    let flags = MSG_COPY | libc::IPC_NOWAIT;
    // SAFETY: the buffer has room for the type and `bytes_max` bytes.
    let len = Errno::result(unsafe {
        libc::msgrcv(number(id), buffer.as_mut_ptr().cast(), bytes_max, position, flags)
    })?;
    let text = buffer.split_off(HEAD);
    let kind = i64::from_ne_bytes(buffer.try_into().expect("the size of the type"));
    let len = len.cast_unsigned();
    Ok((kind, text[..len].to_vec()))
}

/// Creates a queue and returns its id.
///
/// # Errors
/// `EEXIST` if a queue has this key.
pub fn create_queue(key: u32, mode: u32) -> Result<u32, Errno> {
    let flags = libc::IPC_CREAT | libc::IPC_EXCL | mode.cast_signed();
    // SAFETY: the call takes numbers.
    Errno::result(unsafe { libc::msgget(key.cast_signed(), flags) }).map(i32::cast_unsigned)
}

/// Sends a message without waiting.
///
/// # Errors
/// `EAGAIN` if the queue is full; `EINVAL` for a type that is not positive, or a text too long.
pub fn send_message(id: u32, kind: i64, text: &[u8]) -> Result<(), Errno> {
    let buffer = [&kind.to_ne_bytes(), text].concat();
    // SAFETY: the buffer has the type and the text.
    Errno::result(unsafe {
        libc::msgsnd(number(id), buffer.as_ptr().cast(), text.len(), libc::IPC_NOWAIT)
    })
    .map(drop)
}

/// Sets owner, mode and the most bytes of a queue.
///
/// # Errors
/// `EPERM` for more bytes than the limit of the namespace (`msgmnb`), without `CAP_SYS_RESOURCE`.
pub fn set_queue(id: u32, wanted: &Queue) -> Result<(), Errno> {
    let mut status = queue_status(id)?;
    set_owner(&mut status.msg_perm, &wanted.permissions);
    status.msg_qbytes = wanted.bytes_max;
    // SAFETY: the structure outlives the call.
    Errno::result(unsafe { libc::msgctl(number(id), libc::IPC_SET, &raw mut status) }).map(drop)
}

/// Sets what `IPC_SET` can set of an object.
pub(super) fn set_owner(of: &mut libc::ipc_perm, wanted: &Permissions) {
    /// The permission bits of `ipc_perm.mode`.
    const BITS: u32 = 0o777;
    of.uid = wanted.uid;
    of.gid = wanted.gid;
    of.mode = (wanted.mode & BITS).try_into().expect("nine bits");
}

/// Removes a queue.
pub fn remove_queue(id: u32) -> Result<(), Errno> {
    // SAFETY: the command takes no structure.
    Errno::result(unsafe { libc::msgctl(number(id), libc::IPC_RMID, ptr::null_mut()) }).map(drop)
}

/// Returns the ids of all sets of semaphores of the namespace.
pub fn semaphore_sets() -> Result<Vec<u32>, Errno> {
    let call = |index, command| {
        let mut buffer = MaybeUninit::<libc::semid_ds>::zeroed();
        // SAFETY: the kernel writes a `struct seminfo` or `struct semid_ds`; the latter is the larger.
        unsafe { libc::semctl(index, 0, command, buffer.as_mut_ptr()) }
    };
    ids(|| call(0, SEM_INFO), |index| call(index, SEM_STAT))
}

fn set_status(id: u32) -> Result<libc::semid_ds, Errno> {
    let mut status = MaybeUninit::<libc::semid_ds>::zeroed();
    // SAFETY: the kernel writes a structure of this size.
    Errno::result(unsafe { libc::semctl(number(id), 0, libc::IPC_STAT, status.as_mut_ptr()) })?;
    // SAFETY: the structure is integers, for which all bytes are valid.
    Ok(unsafe { status.assume_init() })
}

/// Returns the attributes of a set of semaphores.
///
/// # Errors
/// `EINVAL` or `EIDRM` if the set does not exist; `EACCES`.
pub fn semaphores(id: u32) -> Result<Semaphores, Errno> {
    let status = set_status(id)?;
    let count = u32::try_from(status.sem_nsems).map_err(|_| Errno::ERANGE)?;
    Ok(Semaphores { permissions: status.sem_perm.into(), count })
}

/// Returns the values of a set of `count` semaphores.
pub fn semaphore_values(id: u32, count: u32) -> Result<Vec<u16>, Errno> {
    let mut values = vec![0_u16; count as usize];
    // SAFETY: the number of semaphores of a set never changes, and the vector has room for all.
    Errno::result(unsafe { libc::semctl(number(id), 0, libc::GETALL, values.as_mut_ptr()) })?;
    Ok(values)
}

/// Creates a set of semaphores and returns its id.
///
/// # Errors
/// `EEXIST` if a set has this key; `ENOSPC`.
pub fn create_semaphores(key: u32, count: u32, mode: u32) -> Result<u32, Errno> {
    let count = i32::try_from(count).map_err(|_| Errno::EINVAL)?;
    let flags = libc::IPC_CREAT | libc::IPC_EXCL | mode.cast_signed();
    // SAFETY: the call takes numbers.
    Errno::result(unsafe { libc::semget(key.cast_signed(), count, flags) }).map(i32::cast_unsigned)
}

/// Sets owner and mode of a set, and the values of its semaphores, one for each.
///
/// # Errors
/// `ERANGE` for a value above 32767.
pub fn set_semaphores(id: u32, wanted: &Permissions, values: &[u16]) -> Result<(), Errno> {
    let mut status = set_status(id)?;
    if status.sem_nsems != values.len() as c_ulong {
        return Err(Errno::EINVAL);
    }
    set_owner(&mut status.sem_perm, wanted);
    // SAFETY: the structure outlives the call.
    Errno::result(unsafe { libc::semctl(number(id), 0, libc::IPC_SET, &raw mut status) })?;
    // SAFETY: there is a value for each semaphore, see above.
    Errno::result(unsafe { libc::semctl(number(id), 0, libc::SETALL, values.as_ptr()) }).map(drop)
}

/// Removes a set of semaphores.
pub fn remove_semaphores(id: u32) -> Result<(), Errno> {
    // SAFETY: the command takes no structure.
    Errno::result(unsafe { libc::semctl(number(id), 0, libc::IPC_RMID) }).map(drop)
}

/// Calls `create` in a thread that is the user and the group that the object is to have as its
/// creator. The capabilities stay.
///
/// # Errors
/// `EPERM` if the thread may not become that user; what `create` returns.
pub fn as_creator<T: Send>(
    of: &Permissions,
    create: impl FnOnce() -> Result<T, Errno> + Send,
) -> Result<T, Errno> {
    // SAFETY: the calls take and return numbers.
    let own = unsafe { (libc::geteuid(), libc::getegid()) };
    let (uid, gid) = (of.creator_uid, of.creator_gid);
    if own == (uid, gid) {
        return create();
    }
    // A change of the user makes the memory of this program undumpable, and that of processes that
    // it makes.
    // SAFETY: the call takes numbers.
    let dumpable = Errno::result(unsafe { libc::prctl(libc::PR_GET_DUMPABLE) })?;
    let keep = libc::uid_t::MAX;
    let done = std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            // The functions of libc would change all threads.
            // SAFETY: the calls take numbers, and change this thread alone, which ends then.
            let results = unsafe {
                [
                    libc::prctl(libc::PR_SET_SECUREBITS, NO_SETUID_FIXUP).into(),
                    libc::syscall(libc::SYS_setresgid, keep, gid, keep),
                    libc::syscall(libc::SYS_setresuid, keep, uid, keep),
                ]
            };
            results.into_iter().try_for_each(|result| Errno::result(result).map(drop))?;
            create()
        });
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    });
    // SAFETY: the call takes numbers.
    unsafe { libc::prctl(libc::PR_SET_DUMPABLE, dumpable) };
    done
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn looking_at_a_queue_leaves_its_messages() {
        let Ok(id) = create_queue(0, 0o600) else { return };
        send_message(id, 7, b"some text").unwrap();
        let before = queue(id).unwrap();
        assert_eq!(copy_message(id, 0, 9), Ok((7, b"some text".to_vec())));
        assert_eq!(copy_message(id, 0, 8), Err(Errno::E2BIG));
        assert_eq!(copy_message(id, 1, 9), Err(Errno::ENOMSG));
        assert_eq!(queue(id), Ok(before));
        assert!(queues().unwrap().contains(&id));
        remove_queue(id).unwrap();
        assert_eq!(queue(id), Err(Errno::EINVAL));
    }

    #[test]
    fn values_of_semaphores_come_back() {
        let Ok(id) = create_semaphores(0, 3, 0o600) else { return };
        let set = semaphores(id).unwrap();
        assert_eq!(set.count, 3);
        assert_eq!(set_semaphores(id, &set.permissions, &[1, 2]), Err(Errno::EINVAL));
        set_semaphores(id, &set.permissions, &[1, 0, 32767]).unwrap();
        assert_eq!(semaphore_values(id, 3), Ok(vec![1, 0, 32767]));
        assert!(semaphore_sets().unwrap().contains(&id));
        remove_semaphores(id).unwrap();
    }
}
