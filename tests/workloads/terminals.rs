//! Pseudoterminals: queued bytes, and modes that have little visible effect.

use std::ffi::CString;

use crate::{
    Row,
    kit::{Checkpoint, Verdict, open, read_some, same, wait_until, write_all},
};

pub const ROWS: &[Row] = &[
    ("pty_lines", pty_lines),
    ("pty_raw_bytes", pty_raw_bytes),
    ("pty_stopped_output", pty_stopped_output),
    ("pty_speeds", pty_speeds),
    ("pty_session", pty_session),
];

/// `TCGETS2` and `TCSETS2` (`include/uapi/asm-generic/ioctls.h`).
const TCGETS2: libc::Ioctl = 0x802c_542a;
const TCSETS2: libc::Ioctl = 0x402c_542b;

/// A pair whose slave is the controlling terminal of no session.
fn pair() -> Result<(i32, i32), String> {
    let master = open(c"/dev/ptmx", libc::O_RDWR | libc::O_NOCTTY)?;
    let unlocked = 0;
    sys!(ioctl(master, libc::TIOCSPTLCK, &raw const unlocked))?;
    let mut number = 0;
    sys!(ioctl(master, libc::TIOCGPTN, &raw mut number))?;
    let path = CString::new(format!("/dev/pts/{number}")).expect("no NUL");
    Ok((master, open(&path, libc::O_RDWR | libc::O_NOCTTY)?))
}

fn modes(fd: i32) -> Result<libc::termios, String> {
    // SAFETY: all zeros is a valid value.
    let mut modes: libc::termios = unsafe { std::mem::zeroed() };
    sys!(tcgetattr(fd, &raw mut modes))?;
    Ok(modes)
}

fn set_modes(fd: i32, modes: &libc::termios) -> Verdict {
    sys!(tcsetattr(fd, libc::TCSANOW, modes)).map(drop)
}

fn polled(fd: i32) -> Result<i16, String> {
    let events = libc::POLLIN | libc::POLLOUT;
    let mut poll = libc::pollfd { fd, events, revents: 0 };
    sys!(poll(&raw mut poll, 1, 0))?;
    Ok(poll.revents)
}

fn is_ready(fd: i32, event: i16) -> bool {
    polled(fd).is_ok_and(|events| events & event != 0)
}

/// A session with a controlling terminal: its leader, a child that has the terminal without a
/// descriptor, and one that has given it up.
fn pty_session(checkpoint: &Checkpoint) -> Verdict {
    let (master, slave) = pair()?;
    let terminal = || -> Result<_, String> {
        let stat = std::fs::read_to_string("/proc/self/stat").map_err(|e| e.to_string())?;
        let fields = stat.rsplit_once(')').ok_or("a line without a name")?.1.split_whitespace();
        // Terminal and foreground group, fields 7 and 8.
        let fields: Vec<String> = fields.skip(4).take(2).map(str::to_owned).collect();
        Ok((fields, std::fs::File::open("/dev/tty").map(drop).map_err(|error| error.kind())))
    };
    let leader = checkpoint.fork(|leader| {
        sys!(close(master))?;
        sys!(setsid())?;
        sys!(ioctl(slave, libc::TIOCSCTTY, 0))?;
        let member = |has_it: bool| {
            leader.fork(move |child| {
                if !has_it {
                    sys!(ioctl(slave, libc::TIOCNOTTY, 0))?;
                }
                sys!(close(slave))?;
                let before = terminal()?;
                same("whether it has the terminal", has_it, before.1.is_ok())?;
                child.wait();
                same("its controlling terminal", before, terminal()?)
            })
        };
        let members = [member(true)?, member(false)?];
        let before = terminal()?;
        leader.wait();
        same("the leader's controlling terminal", before, terminal()?)?;
        members.into_iter().try_for_each(crate::kit::Child::join)
    })?;
    checkpoint.wait();
    leader.join()
}

/// Lines of all kinds typed ahead, the beginning of one, and words on the screen. The slave is the
/// controlling terminal of a child, which reads.
fn pty_lines(checkpoint: &Checkpoint) -> Verdict {
    let (master, slave) = pair()?;
    let shown = modes(slave)?;
    let mut silent = shown;
    silent.c_lflag &= !libc::ECHO;
    silent.c_cc[libc::VEOL] = b'|';
    set_modes(slave, &silent)?;
    // ^D after a word, and alone; ^V before a newline; backspace.
    write_all(master, b"one\nwo\x04\x04e|\x16\nnd\nth\xc3\xbf\xff\xfex\x7fr")?;
    write_all(slave, b"shown\n")?;
    wait_until("the bytes to be delivered", || {
        is_ready(master, libc::POLLIN) && is_ready(slave, libc::POLLIN)
    })?;
    let child = checkpoint.fork(|child| {
        sys!(close(master))?;
        sys!(setsid())?;
        sys!(ioctl(slave, libc::TIOCSCTTY, 0))?;
        child.wait();
        for line in [&b"one\n"[..], b"wo", b"", b"e|", b"\nnd\n"] {
            same("line", line, &read_some(slave, 100)?[..])?;
        }
        child.wait_mark("typed")?;
        same("the line that was typed later", "thÿ", &text(&read_some(slave, 100)?))?;
        child.wait_mark("echoed")?;
        same("the line with an echo", &b"again\n"[..], &read_some(slave, 100)?[..])
    })?;
    let before = (modes(slave)?.c_lflag, modes(slave)?.c_cc, polled(master)?);
    checkpoint.wait();
    same("modes and events", before, (modes(slave)?.c_lflag, modes(slave)?.c_cc, polled(master)?))?;
    same("the screen", &b"shown\r\n"[..], &read_some(master, 100)?[..])?;
    // The beginning of the line can still be edited: backspace takes the r and two odd bytes.
    write_all(master, b"\x7f\x7f\x7f\n")?;
    checkpoint.mark("typed");
    wait_until("the child to read", || !is_ready(slave, libc::POLLIN))?;
    set_modes(slave, &shown)?;
    write_all(master, b"again\n")?;
    checkpoint.mark("echoed");
    child.join()?;
    let mut echo = Vec::new();
    while echo.len() < 7 {
        echo.extend(read_some(master, 100)?);
    }
    same("echo", &b"again\r\n"[..], &echo[..])
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).trim_end().to_owned()
}

/// Fills one end without blocking; returns the bytes that fit.
fn fill(fd: i32, reader: i32, first: u8) -> Result<Vec<u8>, String> {
    let flags = sys!(fcntl(fd, libc::F_GETFL))?;
    sys!(fcntl(fd, libc::F_SETFL, flags | libc::O_NONBLOCK))?;
    let mut all = Vec::new();
    let more = |all: &mut Vec<u8>| -> bool {
        let at = all.len();
        let piece: Vec<u8> = (0..100).map(|n| first.wrapping_add(((at + n) % 251) as u8)).collect();
        // SAFETY: the bytes outlive the call.
        let count = unsafe { libc::write(fd, piece.as_ptr().cast(), piece.len()) };
        all.extend_from_slice(&piece[..count.max(0) as usize]);
        count > 0
    };
    wait_until("the pair to be full", || {
        while more(&mut all) {}
        let mut count = 0;
        let counted = sys!(ioctl(reader, libc::FIONREAD, &raw mut count)).is_ok();
        counted && count == 4095 && !is_ready(fd, libc::POLLOUT)
    })?;
    sys!(fcntl(fd, libc::F_SETFL, flags))?;
    Ok(all)
}

/// A pair in raw mode, full both ways.
fn pty_raw_bytes(checkpoint: &Checkpoint) -> Verdict {
    let (master, slave) = pair()?;
    let mut raw = modes(slave)?;
    // SAFETY: the structure outlives the call.
    unsafe { libc::cfmakeraw(&raw mut raw) };
    set_modes(slave, &raw)?;
    let typed = fill(master, slave, 0)?;
    let shown = fill(slave, master, 7)?;
    checkpoint.wait();
    for (what, fd, expected) in [("input", slave, typed), ("output", master, shown)] {
        let mut found = Vec::new();
        while found.len() < expected.len() {
            found.extend(read_some(fd, 1 << 16)?);
        }
        ensure!(found == expected, "the {what} of {} bytes differs", expected.len());
        ensure!(!is_ready(fd, libc::POLLIN), "there is more {what}");
    }
    Ok(())
}

/// Output stopped by ^S, and by `tcflow(3)`.
fn pty_stopped_output(checkpoint: &Checkpoint) -> Verdict {
    let (typed, typed_slave) = pair()?;
    let (called, called_slave) = pair()?;
    write_all(typed, b"\x13")?;
    wait_until("^S to work", || !is_ready(typed_slave, libc::POLLOUT))?;
    sys!(tcflow(called_slave, libc::TCOOFF))?;
    let state = || [typed, typed_slave, called, called_slave].map(polled);
    let before = state();
    checkpoint.wait();
    same("events", before, state())?;
    sys!(tcflow(typed_slave, libc::TCOON))?;
    ensure!(!is_ready(typed_slave, libc::POLLOUT), "tcflow(3) has started what ^S has stopped");
    write_all(typed, b"\x11")?;
    wait_until("^Q to work", || is_ready(typed_slave, libc::POLLOUT))?;
    sys!(tcflow(called_slave, libc::TCOON))?;
    ensure!(is_ready(called_slave, libc::POLLOUT), "tcflow(3) does not start the output");
    write_all(called_slave, b"words")?;
    same("the screen", &b"words"[..], &read_some(called, 100)?[..])
}

/// A speed that has no constant, another one for input, and the modes of a line.
fn pty_speeds(checkpoint: &Checkpoint) -> Verdict {
    let (_master, slave) = pair()?;
    let state = || -> Result<_, String> {
        // SAFETY: all zeros is a valid value.
        let mut modes: libc::termios2 = unsafe { std::mem::zeroed() };
        sys!(ioctl(slave, TCGETS2, &raw mut modes))?;
        Ok(modes)
    };
    let mut modes = state()?;
    modes.c_cflag &= !(libc::CBAUD | libc::CBAUD << 16);
    modes.c_cflag |= libc::BOTHER | libc::BOTHER << 16 | libc::CSTOPB;
    (modes.c_ispeed, modes.c_ospeed) = (12_345, 250_000);
    sys!(ioctl(slave, TCSETS2, &raw const modes))?;
    let of = |modes: libc::termios2| (modes.c_ispeed, modes.c_ospeed, modes.c_cflag, modes.c_iflag);
    let before = of(state()?);
    same("speeds", (12_345, 250_000), (before.0, before.1))?;
    checkpoint.wait();
    same("speeds and modes", before, of(state()?))
}
