//! Terminals.
#![expect(unsafe_code, reason = "ioctls of terminals")]

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, FdFlag, fcntl},
    libc,
};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The kernel's value (`include/uapi/asm-generic/fcntl.h`); in the C library it is 0.
const O_LARGEFILE: libc::c_int = 0o100_000;

/// `NCCS` (`include/uapi/asm-generic/termbits.h`).
pub const CONTROL_CHARACTERS: usize = 19;

/// The kernel's `struct termios` (`include/uapi/asm-generic/termbits.h`), which differs from the C
/// library's.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Termios {
    /// Input modes.
    pub input: u32,
    /// Output modes.
    pub output: u32,
    /// Control modes.
    pub control: u32,
    /// Local modes.
    pub local: u32,
    /// The line discipline.
    pub line: u8,
    /// Control characters.
    pub characters: [u8; CONTROL_CHARACTERS],
}
const _: () = assert!(size_of::<Termios>() == 36);

/// The kernel's `struct termios2` (`include/uapi/asm-generic/termbits.h`).
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
struct Termios2 {
    modes: Termios,
    speeds: Speeds,
}
const _: () = assert!(size_of::<Termios2>() == 0x2c);

/// The speeds of a line, in bits a second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Speeds {
    /// Of input.
    pub input: u32,
    /// Of output.
    pub output: u32,
}

/// `struct winsize` (`include/uapi/asm-generic/termios.h`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct WindowSize {
    /// Rows.
    pub rows: u16,
    /// Columns.
    pub columns: u16,
    /// Width in pixels.
    pub x_pixels: u16,
    /// Height in pixels.
    pub y_pixels: u16,
}
const _: () = assert!(size_of::<WindowSize>() == 8);

/// `_IOC` (`include/uapi/asm-generic/ioctl.h`) for terminals and an `int`.
const fn with_int(direction: libc::Ioctl, number: libc::Ioctl) -> libc::Ioctl {
    direction << 30 | 4 << 16 | (b'T' as libc::Ioctl) << 8 | number
}

// `include/uapi/asm-generic/ioctls.h`; those that get a state exist since Linux 3.16.
const TCGETS: libc::Ioctl = 0x5401;
const TCSETS: libc::Ioctl = 0x5402;
/// `_IOR('T', 0x2A, struct termios2)` and `_IOW('T', 0x2B, struct termios2)`, since Linux 2.6.20.
const TCGETS2: libc::Ioctl = 0x802c_542a;
const TCSETS2: libc::Ioctl = 0x402c_542b;
const TCXONC: libc::Ioctl = 0x540a;
/// Gives up the controlling terminal.
pub const TIOCNOTTY: libc::Ioctl = 0x5422;

/// Makes a terminal the controlling terminal.
pub const TIOCSCTTY: libc::Ioctl = 0x540e;
/// Sets the foreground process group.
pub const TIOCSPGRP: libc::Ioctl = 0x5410;
const TIOCEXCL: libc::Ioctl = 0x540c;
const TIOCGPGRP: libc::Ioctl = 0x540f;
const TIOCGWINSZ: libc::Ioctl = 0x5413;
const TIOCSWINSZ: libc::Ioctl = 0x5414;
const TIOCPKT: libc::Ioctl = 0x5420;
const TIOCSETD: libc::Ioctl = 0x5423;
const TIOCGETD: libc::Ioctl = 0x5424;
const TIOCGSID: libc::Ioctl = 0x5429;
const TIOCGLCKTRMIOS: libc::Ioctl = 0x5456;
const TIOCSLCKTRMIOS: libc::Ioctl = 0x5457;
const TIOCGPTN: libc::Ioctl = with_int(2, 0x30);
const TIOCSPTLCK: libc::Ioctl = with_int(1, 0x31);
const TIOCGPKT: libc::Ioctl = with_int(2, 0x38);
const TIOCGPTLCK: libc::Ioctl = with_int(2, 0x39);
const TIOCGEXCL: libc::Ioctl = with_int(2, 0x40);
/// Since Linux 4.13.
const TIOCGPTPEER: libc::Ioctl = 0x5441;
const _: () = assert!(TIOCGPTN == 0x8004_5430 && TIOCSPTLCK == 0x4004_5431);

/// A property of a terminal, an `int`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Question {
    /// The index of a pseudoterminal; only its master knows it.
    Index,
    /// The session that the terminal controls.
    Session,
    /// The foreground process group.
    Foreground,
    /// Whether exclusive mode keeps the terminal from being opened.
    Exclusive,
    /// Whether the master is in packet mode.
    Packet,
    /// Whether the slave is locked, so it cannot be opened.
    Locked,
    /// The line discipline; 0 is the usual one (`N_TTY`, `include/uapi/linux/tty.h`).
    Discipline,
}

/// Reads a property of a terminal.
///
/// # Errors
/// `ENOTTY` if this terminal does not have it; `EIO` if it is hung up.
pub fn ask(fd: BorrowedFd, question: Question) -> nix::Result<i32> {
    let request = match question {
        Question::Index => TIOCGPTN,
        Question::Session => TIOCGSID,
        Question::Foreground => TIOCGPGRP,
        Question::Exclusive => TIOCGEXCL,
        Question::Packet => TIOCGPKT,
        Question::Locked => TIOCGPTLCK,
        Question::Discipline => TIOCGETD,
    };
    let mut answer: libc::c_int = 0;
    // SAFETY: each of these requests writes one `int`.
    Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), request, &raw mut answer) })?;
    Ok(answer)
}

/// A mode of a master that can be switched on and off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Switch {
    /// Lock the slave, so it cannot be opened.
    Locked,
    /// Packet mode.
    Packet,
}

/// Switches a mode of a master on or off.
pub fn switch(fd: BorrowedFd, switch: Switch, on: bool) -> nix::Result<()> {
    let request = match switch {
        Switch::Locked => TIOCSPTLCK,
        Switch::Packet => TIOCPKT,
    };
    let value = libc::c_int::from(on);
    // SAFETY: both requests read one `int`.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), request, &raw const value) };
    Errno::result(result).map(drop)
}

/// Sets the line discipline of a terminal.
///
/// # Errors
/// `EINVAL` if the kernel does not have it.
pub fn set_discipline(fd: BorrowedFd, discipline: i32) -> nix::Result<()> {
    // SAFETY: the request reads one `int`.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), TIOCSETD, &raw const discipline) };
    Errno::result(result).map(drop)
}

/// Stops or starts the output of a terminal, as `tcflow(3)` does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// `TCOOFF`.
    Stop = 0,
    /// `TCOON`: has no effect on output that a character has stopped.
    Start = 1,
}

/// Stops or starts the output of a terminal.
pub fn flow(fd: BorrowedFd, flow: Flow) -> nix::Result<()> {
    // SAFETY: the request takes a number.
    Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), TCXONC, flow as libc::c_int) }).map(drop)
}

/// Sets exclusive mode: the terminal cannot be opened any more.
pub fn make_exclusive(fd: BorrowedFd) -> nix::Result<()> {
    // SAFETY: the request takes no argument.
    Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), TIOCEXCL) }).map(drop)
}

/// Opens the slave of a master, wherever devpts is mounted. It does not become the controlling
/// terminal.
///
/// # Errors
/// `EIO` if the slave is locked.
pub fn open_slave(master: BorrowedFd, flags: u32) -> nix::Result<OwnedFd> {
    // Passed here, O_CLOEXEC would stay in the status flags; set it on the descriptor instead.
    let flags = flags.cast_signed() & (libc::O_ACCMODE | libc::O_NONBLOCK | O_LARGEFILE);
    let flags = flags | libc::O_NOCTTY;
    // SAFETY: the request takes a number and returns a new descriptor.
    let fd = unsafe { libc::ioctl(master.as_raw_fd(), TIOCGPTPEER, flags) };
    let fd = Errno::result(fd)?;
    // SAFETY: the kernel has just created this descriptor for this process.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    fcntl(&fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    Ok(fd)
}

/// Returns the modes of a terminal; with `locked`, which modes are locked against changes.
pub fn termios(fd: BorrowedFd, locked: bool) -> nix::Result<Termios> {
    let mut modes = Termios::default();
    let request = if locked { TIOCGLCKTRMIOS } else { TCGETS };
    // SAFETY: both requests write a `struct termios`, whose size is asserted.
    Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), request, &raw mut modes) })?;
    Ok(modes)
}

/// Sets the modes of a terminal; with `locked`, which modes are locked against changes.
pub fn set_termios(fd: BorrowedFd, locked: bool, modes: &Termios) -> nix::Result<()> {
    let request = if locked { TIOCSLCKTRMIOS } else { TCSETS };
    let modes: *const Termios = modes;
    // SAFETY: both requests read a `struct termios`, whose size is asserted.
    Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), request, modes) }).map(drop)
}

/// Returns the speeds of a terminal.
pub fn speeds(fd: BorrowedFd) -> nix::Result<Speeds> {
    let mut modes = Termios2::default();
    // SAFETY: the request writes a `struct termios2`, whose size is asserted.
    Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), TCGETS2, &raw mut modes) })?;
    Ok(modes.speeds)
}

/// Sets the modes of a terminal, and its speeds, which the kernel uses if the control modes have
/// `BOTHER` (`include/uapi/asm-generic/termbits.h`).
pub fn set_modes_and_speeds(fd: BorrowedFd, modes: &Termios, speeds: Speeds) -> nix::Result<()> {
    let modes = Termios2 { modes: *modes, speeds };
    // SAFETY: the request reads a `struct termios2`, whose size is asserted.
    Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), TCSETS2, &raw const modes) }).map(drop)
}

/// Returns the window size of a terminal.
pub fn window_size(fd: BorrowedFd) -> nix::Result<WindowSize> {
    let mut size = WindowSize::default();
    // SAFETY: the request writes a `struct winsize`, whose size is asserted.
    Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), TIOCGWINSZ, &raw mut size) })?;
    Ok(size)
}

/// Sets the window size of a terminal.
pub fn set_window_size(fd: BorrowedFd, size: WindowSize) -> nix::Result<()> {
    // SAFETY: the request reads a `struct winsize`, whose size is asserted.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), TIOCSWINSZ, &raw const size) };
    Errno::result(result).map(drop)
}
