//! A terminal with a shell's session around a job that is checkpointed alone.
//!
//! `workload --shell DIRECTORY PROGRAM ARGUMENT...` makes a terminal, leads its
//! session, and runs the program in it as a job of its own group. It then
//! executes, in the same session, each command that appears in the file
//! DIRECTORY/command (one word a line), and writes its status to
//! DIRECTORY/done. What the terminal shows goes to DIRECTORY/screen; it ends
//! when the file DIRECTORY/end is there.

use std::{
    ffi::{CString, OsString},
    fs,
    io::Write,
    os::{fd::FromRawFd, unix::ffi::OsStrExt},
    path::Path,
    process::ExitCode,
};

use crate::{
    kit::{Checkpoint, Verdict, nap, same, write_all},
    publish,
};

/// The state of a job: its terminal is standard input, output and error.
pub fn terminal(checkpoint: &Checkpoint) -> Verdict {
    let state = || -> Result<_, String> {
        // SAFETY: all zeros is a valid value.
        let mut size: libc::winsize = unsafe { std::mem::zeroed() };
        sys!(ioctl(0, libc::TIOCGWINSZ, &raw mut size))?;
        // SAFETY: as above.
        let mut modes: libc::termios = unsafe { std::mem::zeroed() };
        sys!(tcgetattr(1, &raw mut modes))?;
        let modes = (modes.c_iflag, modes.c_oflag, modes.c_lflag, modes.c_cc);
        // SAFETY: these have no preconditions.
        let ids = unsafe { [libc::getpid(), libc::getpgrp(), libc::getsid(0)] };
        Ok((size.ws_row, size.ws_col, modes, ids, sys!(tcgetpgrp(0))?))
    };
    let child = checkpoint.fork(|child| {
        let before = state()?;
        child.wait();
        same("terminal of the child", before, state()?)
    })?;
    let before = state()?;
    write_all(1, b"before the checkpoint\n")?;
    checkpoint.wait();
    same("terminal", before, state()?)?;
    let controlling = super::kit::open(c"/dev/tty", libc::O_RDWR)?;
    write_all(controlling, b"after the checkpoint\n")?;
    child.join()
}

pub fn main(directory: &Path, job: &[OsString]) -> ExitCode {
    match run(directory, job) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = fs::write(directory.join("error"), error);
            ExitCode::FAILURE
        }
    }
}

fn run(directory: &Path, job: &[OsString]) -> Verdict {
    sys!(setsid())?;
    // SAFETY: signals are ignored, descriptors of this process closed.
    unsafe {
        libc::signal(libc::SIGTTOU, libc::SIG_IGN);
        libc::signal(libc::SIGHUP, libc::SIG_IGN);
        libc::close_range(0, u32::MAX, 0);
    }
    // Not among the first three, which are the job's.
    let null = sys!(open(c"/dev/null".as_ptr(), libc::O_RDWR))?;
    sys!(dup2(null, 1))?;
    sys!(dup2(null, 2))?;
    let terminal =
        sys!(open(c"/dev/ptmx".as_ptr(), libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC))?;
    sys!(grantpt(terminal))?;
    sys!(unlockpt(terminal))?;
    let mut name = [0_u8; 64];
    sys!(ptsname_r(terminal, name.as_mut_ptr().cast(), name.len()))?;
    let name = std::ffi::CStr::from_bytes_until_nul(&name).map_err(|error| error.to_string())?;
    // The first terminal that the leader of a session opens controls it.
    let slave = sys!(open(name.as_ptr(), libc::O_RDWR | libc::O_CLOEXEC))?;
    let size = libc::winsize { ws_row: 33, ws_col: 77, ws_xpixel: 0, ws_ypixel: 0 };
    sys!(ioctl(slave, libc::TIOCSWINSZ, &raw const size))?;
    let flags = sys!(fcntl(terminal, libc::F_GETFL))?;
    sys!(fcntl(terminal, libc::F_SETFL, flags | libc::O_NONBLOCK))?;
    let words: Vec<_> = job.iter().map(|word| word.as_bytes().to_vec()).collect();
    let pid = start(slave, &words)?;
    publish(&directory.join("job"), &pid.to_string());
    let screen = fs::File::create(directory.join("screen")).map_err(|error| error.to_string())?;
    while !directory.join("end").exists() {
        drain(terminal, &screen);
        let mut status = 0;
        let _ = sys!(waitpid(pid, &raw mut status, libc::WNOHANG));
        let path = directory.join("command");
        if let Ok(text) = fs::read(&path) {
            let _ = fs::remove_file(&path);
            let lines = text.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
            let words: Vec<_> = lines.map(<[u8]>::to_vec).collect();
            let command = start(slave, &words)?;
            let mut status = 0;
            while sys!(waitpid(command, &raw mut status, libc::WNOHANG))? == 0 {
                drain(terminal, &screen);
                nap(2);
            }
            publish(&directory.join("done"), &status.to_string());
        }
        nap(2);
    }
    Ok(())
}

/// Copies what the terminal shows.
fn drain(terminal: i32, mut screen: &fs::File) {
    if let Ok(data) = super::kit::read_some(terminal, 4096) {
        let _ = screen.write_all(&data);
    }
}

/// Starts a command as the terminal's foreground job.
fn start(slave: i32, words: &[Vec<u8>]) -> Result<i32, String> {
    let words: Vec<_> =
        words.iter().map(|word| CString::new(word.as_slice()).expect("no NUL")).collect();
    let mut pointers: Vec<_> = words.iter().map(|word| word.as_ptr()).collect();
    pointers.push(std::ptr::null());
    let pid = sys!(fork())?;
    if pid == 0 {
        // SAFETY: the vector is terminated and its strings outlive the calls.
        unsafe {
            libc::setpgid(0, 0);
            libc::tcsetpgrp(slave, libc::getpid());
            libc::signal(libc::SIGTTOU, libc::SIG_DFL);
            libc::signal(libc::SIGHUP, libc::SIG_DFL);
            for fd in 0..3 {
                libc::dup2(slave, fd);
            }
            libc::execvp(pointers[0], pointers.as_ptr());
            let mut out = fs::File::from_raw_fd(2);
            let _ = writeln!(out, "cannot execute {words:?}");
            libc::_exit(127);
        }
    }
    Ok(pid)
}
