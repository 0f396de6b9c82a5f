//! IPC namespaces that a tree has for itself.

use std::{ffi::CString, fs, mem, ptr};

use crate::{
    Row,
    kit::{Checkpoint, Verdict, bytes, same},
};

pub const ROWS: &[Row] = &[
    ("ipc_namespace", ipc_namespace),
    ("ipc_namespace_segments", segments),
    ("ipc_namespace_queues", posix_queues),
    ("ipc_namespace_forced", forced),
    ("ipc_namespaces", namespaces),
    ("ipc_namespace_of_a_child", of_a_child),
];

/// The user that creates objects, and the one that then owns them.
const CREATOR: u32 = 1234;
const OWNER: u32 = 4321;

/// Owner, group, creator, its group, key, mode.
type Owner = (u32, u32, u32, u32, i32, u32);

fn owner(of: &libc::ipc_perm) -> Owner {
    (of.uid, of.gid, of.cuid, of.cgid, of.__key, of.mode.into())
}

fn enter() -> Verdict {
    sys!(unshare(libc::CLONE_NEWIPC)).map(drop)
}

fn variable(name: &str) -> Result<String, String> {
    let path = format!("/proc/sys/{name}");
    fs::read_to_string(&path).map_err(|error| format!("{path}: {error}"))
}

fn set_variable(name: &str, value: &str) -> Verdict {
    let path = format!("/proc/sys/{name}");
    fs::write(&path, value).map_err(|error| format!("{path}: {error}"))
}

fn send(queue: i32, kind: i64, text: &[u8]) -> Verdict {
    let message = [&kind.to_ne_bytes(), text].concat();
    sys!(msgsnd(queue, message.as_ptr().cast(), text.len(), libc::IPC_NOWAIT)).map(drop)
}

fn receive(queue: i32) -> Result<(i64, Vec<u8>), String> {
    let mut message = vec![0_u8; 1 << 16];
    let room = message.len() - 8;
    let len = sys!(msgrcv(queue, message.as_mut_ptr().cast(), room, 0, libc::IPC_NOWAIT))?;
    let kind = i64::from_ne_bytes(message[..8].try_into().expect("eight bytes"));
    Ok((kind, message[8..8 + len as usize].to_vec()))
}

fn queue_state(queue: i32) -> Result<(Owner, u64, u64), String> {
    // SAFETY: all zeros is a valid value.
    let mut found: libc::msqid_ds = unsafe { mem::zeroed() };
    sys!(msgctl(queue, libc::IPC_STAT, &raw mut found))?;
    Ok((owner(&found.msg_perm), found.msg_qbytes, found.msg_qnum))
}

fn set_state(set: i32) -> Result<(Owner, u64, Vec<u16>), String> {
    // SAFETY: all zeros is a valid value.
    let mut found: libc::semid_ds = unsafe { mem::zeroed() };
    sys!(semctl(set, 0, libc::IPC_STAT, &raw mut found))?;
    let mut values = vec![0_u16; found.sem_nsems as usize];
    sys!(semctl(set, 0, libc::GETALL, values.as_mut_ptr()))?;
    Ok((owner(&found.sem_perm), found.sem_nsems, values))
}

fn segment_state(segment: i32) -> Result<(Owner, usize, u64), String> {
    // SAFETY: all zeros is a valid value.
    let mut found: libc::shmid_ds = unsafe { mem::zeroed() };
    sys!(shmctl(segment, libc::IPC_STAT, &raw mut found))?;
    Ok((owner(&found.shm_perm), found.shm_segsz, found.shm_nattch))
}

/// Queues with messages, semaphores, limits; objects that were removed before leave gaps in the ids,
/// and one has another creator and another owner.
fn ipc_namespace(checkpoint: &Checkpoint) -> Verdict {
    enter()?;
    let gone = sys!(msgget(libc::IPC_PRIVATE, 0o600))?;
    set_variable("kernel/msgmnb", "100000")?;
    let queue = sys!(msgget(0x1234, 0o640 | libc::IPC_CREAT))?;
    let empty = sys!(msgget(libc::IPC_PRIVATE, 0o600))?;
    sys!(msgctl(gone, libc::IPC_RMID, ptr::null_mut()))?;
    let again = sys!(msgget(0x77, 0o600 | libc::IPC_CREAT))?;
    set_variable("kernel/msgmax", "16000")?;
    let large = bytes(3, 16_000);
    let messages = [(5, large.clone()), (1, b"text".to_vec()), (5, Vec::new()), (9, bytes(4, 7))];
    for (kind, text) in &messages {
        send(queue, *kind, text)?;
    }
    sys!(setegid(CREATOR))?;
    sys!(seteuid(CREATOR))?;
    let set = sys!(semget(0x4321, 5, 0o606 | libc::IPC_CREAT))?;
    sys!(seteuid(0))?;
    sys!(setegid(0))?;
    // SAFETY: all zeros is a valid value.
    let mut wanted: libc::semid_ds = unsafe { mem::zeroed() };
    sys!(semctl(set, 0, libc::IPC_STAT, &raw mut wanted))?;
    (wanted.sem_perm.uid, wanted.sem_perm.gid) = (OWNER, OWNER + 1);
    sys!(semctl(set, 0, libc::IPC_SET, &raw mut wanted))?;
    sys!(semctl(set, 0, libc::SETALL, [3_u16, 0, 32767, 1, 2].as_ptr()))?;
    // Limits below what is there already.
    let limits = [
        ("kernel/msgmax", "16000\n"),
        ("kernel/msgmnb", "2000\n"),
        ("kernel/msgmni", "3\n"),
        ("kernel/sem", "4\t40\t30\t3\n"),
        ("kernel/shmmax", "1000000\n"),
        ("kernel/shmall", "100000\n"),
        ("kernel/shmmni", "44\n"),
        ("kernel/msg_next_id", "-1\n"),
        ("kernel/sem_next_id", "98305\n"),
        ("fs/mqueue/queues_max", "11\n"),
        ("fs/mqueue/msg_max", "12\n"),
        ("fs/mqueue/msgsize_max", "2048\n"),
        ("fs/mqueue/msg_default", "5\n"),
        ("fs/mqueue/msgsize_default", "1024\n"),
    ];
    for (name, value) in limits.iter().filter(|(_, value)| !value.starts_with('-')) {
        set_variable(name, value)?;
    }
    let before = (queue_state(queue)?, queue_state(empty)?, queue_state(again)?, set_state(set)?);
    checkpoint.wait();
    let after = (queue_state(queue)?, queue_state(empty)?, queue_state(again)?, set_state(set)?);
    same("objects", before, after)?;
    for (name, value) in limits {
        same(name, value.to_owned(), variable(name)?)?;
    }
    for (kind, text) in messages {
        let found = receive(queue)?;
        ensure!(found == (kind, text), "message of type {kind}: found type {}", found.0);
    }
    ensure!(receive(queue).is_err(), "one message too many");
    ensure!(queue_state(gone).is_err(), "a queue that was removed is there");
    same("the set by its key", set, sys!(semget(0x4321, 0, 0))?)
}

/// Segments: attached, not attached, locked, and removed.
fn segments(checkpoint: &Checkpoint) -> Verdict {
    const BYTES: usize = 20_000;
    enter()?;
    let make = |key, bytes: usize| sys!(shmget(key, bytes, 0o640 | libc::IPC_CREAT));
    let attach = |id| sys!(shmat(id, ptr::null(), 0));
    let (first, detached, locked, removed) =
        (make(0, 100)?, make(0x55, BYTES)?, make(0x56, BYTES)?, make(0, BYTES)?);
    let empty = make(0x57, BYTES)?;
    sys!(shmctl(first, libc::IPC_RMID, ptr::null_mut()))?;
    let fill = |id, seed| -> Verdict {
        let at = attach(id)?;
        let data = bytes(seed, BYTES);
        // SAFETY: the segment has this many bytes.
        unsafe { ptr::copy_nonoverlapping(data.as_ptr(), at.cast(), BYTES) };
        sys!(shmdt(at)).map(drop)
    };
    fill(detached, 1)?;
    fill(locked, 2)?;
    sys!(shmctl(locked, libc::SHM_LOCK, ptr::null_mut()))?;
    let mapped = attach(removed)?;
    fill(removed, 3)?;
    sys!(shmctl(removed, libc::IPC_RMID, ptr::null_mut()))?;
    let state = || -> Result<Vec<_>, String> {
        [detached, locked, removed, empty].into_iter().map(segment_state).collect()
    };
    let before = state()?;
    checkpoint.wait();
    same("segments", before, state()?)?;
    let check = |name: &str, at: *mut libc::c_void, seed| {
        // SAFETY: the segment has this many bytes.
        let found = unsafe { std::slice::from_raw_parts(at.cast::<u8>(), BYTES) };
        ensure!(found == bytes(seed, BYTES), "{name}: other bytes");
        Ok(())
    };
    check("removed", mapped, 3)?;
    for (name, id, seed) in [("detached", detached, 1), ("locked", locked, 2)] {
        let at = attach(id)?;
        check(name, at, seed)?;
        sys!(shmdt(at))?;
    }
    sys!(shmdt(mapped))?;
    ensure!(segment_state(removed).is_err(), "the segment is still there");
    same("by its key", detached, sys!(shmget(0x55, 0, 0))?)
}

/// POSIX queues, open and not open, with limits of the namespace below their own.
fn posix_queues(checkpoint: &Checkpoint) -> Verdict {
    enter()?;
    let name = |what: &str| CString::new(format!("/{what}")).expect("no NUL");
    let make = |what: &str| {
        // SAFETY: all zeros is a valid value.
        let mut size: libc::mq_attr = unsafe { mem::zeroed() };
        (size.mq_maxmsg, size.mq_msgsize) = (9, 4000);
        let flags = libc::O_CREAT | libc::O_EXCL | libc::O_RDWR | libc::O_NONBLOCK;
        let fd = sys!(mq_open(name(what).as_ptr(), flags, 0o640, &raw mut size))?;
        for priority in [1, 7, 3] {
            let text = format!("{what} {priority}");
            sys!(mq_send(fd, text.as_ptr().cast(), text.len(), priority))?;
        }
        Ok::<_, String>(fd)
    };
    let (open, closed) = (make("open")?, make("closed")?);
    sys!(fchown(closed, OWNER, OWNER + 1))?;
    sys!(close(closed))?;
    let unlinked = make("unlinked")?;
    sys!(mq_unlink(name("unlinked").as_ptr()))?;
    set_variable("fs/mqueue/msg_max", "2")?;
    set_variable("fs/mqueue/queues_max", "1")?;
    checkpoint.wait();
    same("the limit", "2\n".to_owned(), variable("fs/mqueue/msg_max")?)?;
    let flags = libc::O_RDWR | libc::O_NONBLOCK;
    let closed = sys!(mq_open(name("closed").as_ptr(), flags))?;
    // SAFETY: all zeros is a valid value.
    let mut stat: libc::stat = unsafe { mem::zeroed() };
    sys!(fstat(closed, &raw mut stat))?;
    same("the owner", (OWNER, OWNER + 1, 0o100_640), (stat.st_uid, stat.st_gid, stat.st_mode))?;
    for (what, fd) in [("open", open), ("closed", closed), ("unlinked", unlinked)] {
        for expected in [7, 3, 1] {
            let (mut text, mut priority) = (vec![0_u8; 4000], 0);
            let at = text.as_mut_ptr().cast();
            let len = sys!(mq_receive(fd, at, text.len(), &raw mut priority))?;
            text.truncate(len as usize);
            same(what, format!("{what} {expected}").into_bytes(), text)?;
        }
    }
    ensure!(
        sys!(mq_open(name("unlinked").as_ptr(), flags)).is_err(),
        "an unlinked queue has a name"
    );
    Ok(())
}

/// Segments that end with their last attachment.
fn forced(checkpoint: &Checkpoint) -> Verdict {
    enter()?;
    let id = sys!(shmget(0x99, 5000, 0o600 | libc::IPC_CREAT))?;
    let at = sys!(shmat(id, ptr::null(), 0))?;
    set_variable("kernel/shm_rmid_forced", "1")?;
    checkpoint.wait();
    same("shm_rmid_forced", "1\n".to_owned(), variable("kernel/shm_rmid_forced")?)?;
    segment_state(id)?;
    sys!(shmdt(at))?;
    ensure!(segment_state(id).is_err(), "the segment is still there");
    Ok(())
}

/// Objects of a process in its IPC namespace. Processes in other namespaces have some with the same ids, keys and
/// names.
struct Objects {
    seed: u8,
    attached: *mut u8,
    segment: i32,
    detached: i32,
    queue: i32,
    set: i32,
    open: i32,
}

const SEGMENT_BYTES: usize = 3 * 4096;
const SHARED_KEY: i32 = 0x77;

impl Objects {
    fn make(seed: u8) -> Result<Self, String> {
        let value = i32::from(seed);
        let make = |key| sys!(shmget(key, SEGMENT_BYTES, 0o600 | libc::IPC_CREAT));
        let (segment, detached) = (make(SHARED_KEY)?, make(libc::IPC_PRIVATE)?);
        let attached = sys!(shmat(segment, ptr::null(), 0))?.cast::<u8>();
        let other = sys!(shmat(detached, ptr::null(), 0))?.cast::<u8>();
        for (at, seed) in [(attached, seed), (other, seed + 100)] {
            let content = bytes(seed, SEGMENT_BYTES);
            // SAFETY: the segment is that long.
            unsafe { ptr::copy_nonoverlapping(content.as_ptr(), at, SEGMENT_BYTES) };
        }
        sys!(shmdt(other.cast()))?;
        let queue = sys!(msgget(SHARED_KEY, 0o600 | libc::IPC_CREAT))?;
        send(queue, 1, &bytes(seed, 50))?;
        let set = sys!(semget(SHARED_KEY, 2, 0o600 | libc::IPC_CREAT))?;
        sys!(semctl(set, 0, libc::SETVAL, value))?;
        let undone = libc::sembuf { sem_num: 1, sem_op: 2, sem_flg: libc::SEM_UNDO as i16 };
        sys!(semop(set, (&raw const undone).cast_mut(), 1))?;
        let flags = libc::O_RDWR | libc::O_CREAT | libc::O_NONBLOCK;
        // SAFETY: all zeros is a valid value.
        let mut size: libc::mq_attr = unsafe { mem::zeroed() };
        (size.mq_maxmsg, size.mq_msgsize) = (4, 64);
        let open = sys!(mq_open(c"/queue".as_ptr(), flags, 0o600, &raw mut size))?;
        sys!(mq_send(open, bytes(seed, 9).as_ptr().cast(), 9, 3))?;
        Ok(Self { seed, attached, segment, detached, queue, set, open })
    }

    fn ids(&self) -> [i32; 4] {
        [self.segment, self.detached, self.queue, self.set]
    }

    fn check(&self) -> Verdict {
        let content = |at: *mut u8| {
            // SAFETY: the segment is that long.
            unsafe { std::slice::from_raw_parts(at, SEGMENT_BYTES) }.to_vec()
        };
        same("the attached segment", bytes(self.seed, SEGMENT_BYTES), content(self.attached))?;
        same("its users", 1, segment_state(self.segment)?.2)?;
        let other = sys!(shmat(self.detached, ptr::null(), 0))?.cast::<u8>();
        same("the other", bytes(self.seed + 100, SEGMENT_BYTES), content(other))?;
        let again = sys!(shmat(sys!(shmget(SHARED_KEY, 0, 0))?, ptr::null(), 0))?.cast::<u8>();
        // SAFETY: the segment is that long, and attached twice.
        unsafe { self.attached.write(7) };
        same("the segment by its key", 7, content(again)[0])?;
        same("a message", (1, bytes(self.seed, 50)), receive(self.queue)?)?;
        same("the semaphores", vec![u16::from(self.seed), 2], set_state(self.set)?.2)?;
        let mut text = [0_u8; 64];
        let len = sys!(mq_receive(self.open, text.as_mut_ptr().cast(), 64, ptr::null_mut()))?;
        same("a message of the open queue", bytes(self.seed, 9), text[..len as usize].to_vec())?;
        let named = sys!(mq_open(c"/queue".as_ptr(), libc::O_RDWR))?;
        sys!(mq_send(named, c"x".as_ptr(), 1, 0))?;
        let len = sys!(mq_receive(self.open, text.as_mut_ptr().cast(), 64, ptr::null_mut()))?;
        same("what was sent by its name", b"x".to_vec(), text[..len as usize].to_vec())
    }
}

/// A tree with three IPC namespaces.
fn namespaces(checkpoint: &Checkpoint) -> Verdict {
    enter()?;
    let roots = Objects::make(1)?;
    let ids = roots.ids();
    let child = |seed: u8| {
        checkpoint.fork(|child| {
            // What its parent has attached belongs to another namespace.
            sys!(shmdt(roots.attached.cast()))?;
            sys!(mq_close(roots.open))?;
            enter()?;
            set_variable("kernel/msgmax", &format!("{}\n", 9000 + u32::from(seed)))?;
            let objects = Objects::make(seed)?;
            same("the ids", ids, objects.ids())?;
            child.wait();
            objects.check()?;
            same("a limit", format!("{}\n", 9000 + u32::from(seed)), variable("kernel/msgmax")?)
        })
    };
    let (first, second) = (child(2)?, child(3)?);
    let limit = variable("kernel/msgmax")?;
    checkpoint.wait();
    roots.check()?;
    same("the limit", limit, variable("kernel/msgmax")?)?;
    first.join()?;
    second.join()
}

/// A tree in the IPC namespace of the machine, of which a part has one of its own.
fn of_a_child(checkpoint: &Checkpoint) -> Verdict {
    let segment = sys!(shmget(libc::IPC_PRIVATE, SEGMENT_BYTES, 0o600))?;
    let at = sys!(shmat(segment, ptr::null(), 0))?.cast::<u8>();
    sys!(shmctl(segment, libc::IPC_RMID, ptr::null_mut()))?;
    let child = checkpoint.fork(|child| {
        sys!(shmdt(at.cast()))?;
        enter()?;
        let objects = Objects::make(5)?;
        child.wait();
        objects.check()
    })?;
    // SAFETY: the segment is that long.
    unsafe { at.write(77) };
    checkpoint.wait();
    // SAFETY: as above.
    same("the segment of the machine", 77, unsafe { at.read() })?;
    child.join()
}
