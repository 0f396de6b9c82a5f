//! Programs that remember a state and, after a checkpoint, look whether they
//! still have it.
//!
//! `workload NAME STATUS` sets the state up, writes `ready` to the file STATUS,
//! waits for the file STATUS.go, compares itself with what it remembers, and
//! writes `ok` or `failed: ...` to STATUS. No descriptor stays open for that.
//!
//! `workload --exec PROGRAM ARGUMENT...` becomes another program in a session
//! of its own without stray descriptors, `workload --list` names the states.
//! `workload --steps NAME DIRECTORY` changes memory step by step (`steps.rs`).
#![expect(unsafe_code, reason = "the states are made by system calls without a safe form")]
#![expect(clippy::cast_possible_truncation, reason = "lengths and flags of C's many integer types")]

#[macro_use]
mod kit;
mod aio;
mod attributes;
mod blocked;
mod busy;
mod cgroups;
mod clocks;
mod confined;
mod cut;
mod files;
mod hugetlb;
mod identity;
mod inet;
mod interrupted;
mod ipc;
mod kept;
mod leaderless;
mod locks;
mod memory;
mod mounts;
mod mqueues;
mod namespaces;
mod networks;
mod odd_files;
mod on_demand;
mod owners;
mod pid_namespaces;
mod pidfds;
mod refused;
mod registers;
mod rounds;
mod shared;
mod shell;
mod signals;
mod socket_ends;
mod sockets;
mod steps;
mod tcp;
mod terminals;
mod threads;
mod tree;
mod tun;
mod unix_waiting;
mod users;
mod watches;

use std::{
    ffi::CString,
    fs,
    os::unix::ffi::OsStrExt,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    process::ExitCode,
};

use kit::{Checkpoint, Verdict};

/// A state by name.
type Row = (&'static str, fn(&Checkpoint) -> Verdict);

const GROUPS: &[&[Row]] = &[
    memory::ROWS,
    on_demand::ROWS,
    aio::ROWS,
    hugetlb::ROWS,
    rounds::ROWS,
    threads::ROWS,
    leaderless::ROWS,
    shared::ROWS,
    registers::ROWS,
    tree::ROWS,
    tun::ROWS,
    identity::ROWS,
    signals::ROWS,
    blocked::ROWS,
    busy::ROWS,
    cut::ROWS,
    files::ROWS,
    odd_files::ROWS,
    locks::ROWS,
    watches::ROWS,
    terminals::ROWS,
    sockets::ROWS,
    socket_ends::ROWS,
    unix_waiting::ROWS,
    mqueues::ROWS,
    tcp::ROWS,
    inet::ROWS,
    owners::ROWS,
    clocks::ROWS,
    users::ROWS,
    mounts::ROWS,
    namespaces::ROWS,
    pid_namespaces::ROWS,
    ipc::ROWS,
    cgroups::ROWS,
    networks::ROWS,
    confined::ROWS,
    pidfds::ROWS,
    refused::ROWS,
    attributes::ROWS,
];

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    let words: Vec<_> = arguments.iter().map(|word| word.to_string_lossy()).collect();
    match words.first().map(AsRef::as_ref) {
        Some("--list") => {
            for (name, _) in GROUPS.iter().copied().flatten() {
                println!("{name}");
            }
            return ExitCode::SUCCESS;
        }
        Some("--exec") => return exec(&arguments[1..]),
        Some("--steps") => return steps::main(&words[1], Path::new(&arguments[2])),
        Some("--shell") => return shell::main(Path::new(&arguments[1]), &arguments[2..]),
        _ => {}
    }
    let [name, status] = words.as_slice() else {
        eprintln!("usage: workload NAME STATUS | --exec PROGRAM ARGUMENT... | --list");
        return ExitCode::from(2);
    };
    // In a shell's session, and by itself: not in the list.
    let apart: &[Row] = &[("terminal", shell::terminal), ("four_gib", memory::four_gib)];
    let apart = [apart, kept::ROWS, interrupted::ROWS, cgroups::APART].into_iter().flatten();
    let mut rows = GROUPS.iter().copied().flatten().chain(apart);
    let Some((_, run)) = rows.find(|(row, _)| row == name) else {
        eprintln!("there is no state {name}");
        return ExitCode::from(2);
    };
    let checkpoint = Checkpoint::new(Path::new(status.as_ref()));
    let verdict = judged(|| run(&checkpoint));
    checkpoint.conclude(&verdict);
    if verdict.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Turns a panic into a verdict.
fn judged(run: impl FnOnce() -> Verdict) -> Verdict {
    catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or(panic.downcast_ref::<&str>().copied());
        Err(format!("panic: {}", text.unwrap_or("?")))
    })
}

fn exec(arguments: &[std::ffi::OsString]) -> ExitCode {
    let words: Vec<CString> =
        arguments.iter().map(|word| CString::new(word.as_bytes()).expect("no NUL")).collect();
    let mut pointers: Vec<_> = words.iter().map(|word| word.as_ptr()).collect();
    pointers.push(std::ptr::null());
    // SAFETY: the vector is terminated and its strings outlive the calls.
    unsafe {
        libc::setsid();
        libc::close_range(3, u32::MAX, 0);
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
        libc::execvp(pointers[0], pointers.as_ptr());
    }
    eprintln!("cannot execute {words:?}: {}", std::io::Error::last_os_error());
    ExitCode::from(127)
}

/// Puts a line where another process looks for it, whole or not at all.
fn publish(path: &Path, text: &str) {
    // Processes in several pid namespaces may have one pid.
    let mut new = path.as_os_str().to_owned();
    new.push(format!(".new{}", std::process::id()));
    if fs::write(&new, text).is_ok() {
        let _ = fs::rename(&new, path);
    }
}
