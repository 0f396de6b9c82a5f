//! Bytes that a worker takes out of a device for a moment, kept where its supervisor finds them.
//!
//! A read takes the bytes that wait in a terminal. The worker may be killed at any moment, and the
//! supervisor must then know every byte that it has taken. So the worker moves bytes by `splice(2)`
//! into a pipe that the supervisor has open as well: even a killed process completes such a call.
//! Shared memory holds the bytes taken before, and the number of those returned. A socket holds
//! the descriptors of the device.
#![expect(unsafe_code, reason = "memory that two processes share")]

use std::{
    fs::File,
    io::{IoSlice, Read, Write},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    sync::{
        Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering},
    },
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, SpliceFFlags, tee},
    libc,
    sys::socket::{ControlMessage, MsgFlags, UnixAddr, sendmsg},
    unistd::pipe2,
};

use super::{descriptors::receive_fd, fds};

/// The most bytes that can be on loan: far more than the buffers of a pair hold (4 KiB and some
/// 8 KiB, `drivers/tty/n_tty.c`, `drivers/tty/pty.c`), even if each byte takes two.
pub const CAPACITY: usize = 128 << 10;

/// The most bytes that describe a loan.
const TERMS_BYTES: usize = 128;

/// The number of descriptors of a device.
const ENDS: usize = 2;

/// The stage of a [`Loan`] that does not exist. All others are the caller's.
const NONE: u32 = 0;

#[derive(Debug)]
#[repr(C)]
struct Shared {
    stage: AtomicU32,
    /// Twice the number of bytes that are kept here, plus one while the pipe holds the last of
    /// them, too.
    kept: AtomicU64,
    /// The number of bytes that are certainly back.
    returned: AtomicU64,
    /// The number of bytes that are back, or in the pipe on their way back.
    sent: AtomicU64,
    terms: [AtomicU8; TERMS_BYTES],
    bytes: [AtomicU8; CAPACITY],
}

/// The memory, pipes and sockets that worker and supervisor share.
#[derive(Debug)]
struct Desk {
    shared: &'static Shared,
    read: OwnedFd,
    write: OwnedFd,
    /// Messages sent into the second one wait in the first one.
    socket: (UnixStream, UnixStream),
}

static DESK: OnceLock<Desk> = OnceLock::new();

/// Creates the shared memory, pipes and sockets. Must be called before the supervisor forks.
///
/// # Errors
/// `EMFILE`, `ENOMEM`.
pub(super) fn prepare() -> nix::Result<()> {
    desk().map(drop)
}

fn desk() -> nix::Result<&'static Desk> {
    if let Some(desk) = DESK.get() {
        return Ok(desk);
    }
    let access = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
    let (anywhere, len) = (std::ptr::null_mut(), size_of::<Shared>());
    // SAFETY: a new mapping touches no other.
    let memory = unsafe { libc::mmap(anywhere, len, access, flags, -1, 0) };
    if memory == libc::MAP_FAILED {
        return Err(Errno::last());
    }
    // SAFETY: the mapping is aligned to a page, has room for a `Shared`, whose fields are all
    // atomics, for which zeros are a value, and is never unmapped.
    let shared = unsafe { &*memory.cast::<Shared>() };
    let (read, write) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
    let socket = UnixStream::pair().map_err(|_| Errno::EMFILE)?;
    Ok(DESK.get_or_init(|| Desk { shared, read, write, socket }))
}

/// Bytes of a device that are on loan. There is one at a time.
#[derive(Debug)]
pub struct Loan {
    desk: &'static Desk,
    _only: MutexGuard<'static, ()>,
}

/// The loan of a process that was killed.
#[derive(Debug)]
pub struct Inherited {
    /// The loan.
    pub loan: Loan,
    /// The descriptors of the device.
    pub ends: [OwnedFd; ENDS],
    /// The state in which to leave it.
    pub terms: Vec<u8>,
}

fn only() -> MutexGuard<'static, ()> {
    static ONLY: Mutex<()> = Mutex::new(());
    ONLY.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Loan {
    /// Begins a loan: notes the descriptors of the device, at most 128 bytes that say how to leave
    /// it, and the first stage, which is not 0.
    ///
    /// # Errors
    /// The errors of `sendmsg(2)`.
    pub fn open(ends: [BorrowedFd; ENDS], terms: &[u8], stage: u32) -> nix::Result<Self> {
        let only = only();
        let desk = desk()?;
        for (place, byte) in desk.shared.terms.iter().zip(terms) {
            place.store(*byte, Ordering::Relaxed);
        }
        for end in ends {
            let numbers = [end.as_raw_fd()];
            let rights = [ControlMessage::ScmRights(&numbers)];
            let data = [IoSlice::new(&[0])];
            let to = desk.socket.1.as_raw_fd();
            sendmsg::<UnixAddr>(to, &data, &rights, MsgFlags::empty(), None)?;
        }
        let loan = Self { desk, _only: only };
        loan.drain();
        loan.begin(stage);
        Ok(loan)
    }

    /// Takes over the loan of a process that was killed, with the descriptors and the terms.
    ///
    /// # Errors
    /// The errors of `recvmsg(2)`.
    pub fn inherit() -> nix::Result<Option<Inherited>> {
        let only = only();
        let Some(desk) = DESK.get() else { return Ok(None) };
        if desk.shared.stage.load(Ordering::Acquire) == NONE {
            return Ok(None);
        }
        let terms = desk.shared.terms.iter().map(|byte| byte.load(Ordering::Relaxed)).collect();
        let ends = [loan_end(desk)?, loan_end(desk)?];
        Ok(Some(Inherited { loan: Self { desk, _only: only }, ends, terms }))
    }

    /// Ends the loan: everything is as the terms say.
    pub fn close(self) {
        self.desk.shared.stage.store(NONE, Ordering::Release);
        // An inherited loan has received them.
        let _ = self.desk.socket.0.set_nonblocking(true);
        while let Ok(Some(end)) = receive_fd(&self.desk.socket.0) {
            drop(end);
        }
        let _ = self.desk.socket.0.set_nonblocking(false);
    }

    /// Returns the stage.
    pub fn stage(&self) -> u32 {
        self.desk.shared.stage.load(Ordering::Acquire)
    }

    /// Goes to another stage.
    pub fn set_stage(&self, stage: u32) {
        self.desk.shared.stage.store(stage, Ordering::Release);
    }

    /// Goes to another stage, with nothing on loan.
    pub fn begin(&self, stage: u32) {
        for count in [&self.desk.shared.kept, &self.desk.shared.returned, &self.desk.shared.sent] {
            count.store(0, Ordering::Release);
        }
        self.set_stage(stage);
    }

    /// Returns the end of the pipe that bytes are spliced into, to take them.
    pub fn entrance(&self) -> BorrowedFd<'_> {
        self.desk.write.as_fd()
    }

    /// Returns the end of the pipe that bytes are spliced out of, to return them.
    pub fn exit(&self) -> BorrowedFd<'_> {
        self.desk.read.as_fd()
    }

    /// Returns how many bytes are on loan.
    pub fn kept_bytes(&self) -> usize {
        let kept = self.desk.shared.kept.load(Ordering::Acquire) >> 1;
        usize::try_from(kept).unwrap_or(CAPACITY).min(CAPACITY)
    }

    /// Returns the bytes that were taken into the pipe since the last call of [`Loan::keep`].
    pub fn taken(&self) -> nix::Result<Vec<u8>> {
        if self.desk.shared.kept.load(Ordering::Acquire) & 1 != 0 {
            // It is kept already.
            self.drain();
            self.mark(self.kept_bytes(), false);
        }
        let (read, write) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
        match tee(&self.desk.read, &write, CAPACITY, SpliceFFlags::SPLICE_F_NONBLOCK) {
            Err(Errno::EAGAIN) => return Ok(Vec::new()),
            result => result?,
        };
        drop(write);
        let mut bytes = Vec::new();
        let read = File::from(read).read_to_end(&mut bytes);
        read.map_err(|error| super::errno(&error))?;
        Ok(bytes)
    }

    /// Keeps bytes that are to be returned in place of what [`Loan::taken`] has returned.
    ///
    /// # Errors
    /// `ENOBUFS` if they are too many.
    pub fn keep(&self, bytes: &[u8]) -> nix::Result<()> {
        let kept = self.kept_bytes();
        let room = &self.desk.shared.bytes[kept..];
        if room.len() < bytes.len() {
            return Err(Errno::ENOBUFS);
        }
        for (place, byte) in room.iter().zip(bytes) {
            place.store(*byte, Ordering::Relaxed);
        }
        self.mark(kept + bytes.len(), true);
        self.drain();
        self.mark(kept + bytes.len(), false);
        Ok(())
    }

    fn mark(&self, kept: usize, in_pipe: bool) {
        let kept = u64::try_from(kept).expect("at most the capacity");
        self.desk.shared.kept.store(kept << 1 | u64::from(in_pipe), Ordering::Release);
    }

    fn drain(&self) {
        let mut bytes = [0; 4096];
        while matches!(nix::unistd::read(&self.desk.read, &mut bytes), Ok(1..)) {}
    }

    /// Finds out how much is back, after a process that returned bytes was killed.
    pub fn settle(&self) -> nix::Result<()> {
        let shared = self.desk.shared;
        let sent = shared.sent.load(Ordering::Acquire);
        if sent > shared.returned.load(Ordering::Acquire) {
            let left = u64::from(fds::readable_bytes(self.desk.read.as_fd())?);
            shared.returned.store(sent.saturating_sub(left), Ordering::Release);
        }
        self.drain();
        Ok(())
    }

    /// Puts the next bytes to be returned into the pipe: at most `most`, of the first `limit`.
    /// Returns how many. The caller splices them out of the pipe, and calls [`Loan::has_returned`].
    pub fn send(&self, most: usize, limit: usize) -> nix::Result<usize> {
        let shared = self.desk.shared;
        let from = self.returned_bytes();
        let end = self.kept_bytes().min(limit).min(from + most);
        if from >= end {
            return Ok(0);
        }
        let bytes: Vec<u8> =
            shared.bytes[from..end].iter().map(|byte| byte.load(Ordering::Relaxed)).collect();
        let pipe = self.desk.write.try_clone().map_err(|_| Errno::EMFILE)?;
        let written = File::from(pipe).write_all(&bytes);
        written.map_err(|error| super::errno(&error))?;
        let sent = u64::try_from(end).expect("at most the capacity");
        shared.sent.store(sent, Ordering::Release);
        Ok(end - from)
    }

    /// Notes that the pipe is empty: its bytes are back in the device.
    pub fn has_returned(&self) {
        let shared = self.desk.shared;
        shared.returned.store(shared.sent.load(Ordering::Acquire), Ordering::Release);
    }

    /// Returns how many bytes are back.
    pub fn returned_bytes(&self) -> usize {
        let returned = self.desk.shared.returned.load(Ordering::Acquire);
        usize::try_from(returned).unwrap_or(CAPACITY).min(CAPACITY)
    }

    /// Returns how many bytes are not back.
    pub fn missing(&self) -> usize {
        self.kept_bytes().saturating_sub(self.returned_bytes())
    }
}

fn loan_end(desk: &Desk) -> nix::Result<OwnedFd> {
    receive_fd(&desk.socket.0).map_err(|error| super::errno(&error))?.ok_or(Errno::EBADF)
}
