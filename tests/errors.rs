//! What is said when a system call of the program's fails: an errno without a situation is
//! no message.
//!
//! A filter of system calls (`seccomp(2)`) makes all calls of one kind fail, as those of
//! containers do. For each there is what must be said, or that it must do without. In any
//! case the tree runs on after a dump.

mod common;

use std::{
    fs, io,
    os::unix::process::CommandExt,
    process::{Command, Output, Stdio},
};

use common::{Cap, live::Live, require};
use nix::libc;

/// What becomes of a dump or a restore.
#[derive(Clone, Copy, Debug)]
enum Then {
    /// It fails and says this, where PID is that of the tree's root.
    Says(&'static str),
    /// It is done without the call.
    Works,
}

use Then::{Says, Works};

/// System calls that fail during a dump.
const DUMPS: &[(&str, libc::c_long, Then)] = &[
    ("ptrace", libc::SYS_ptrace, Says(" PID: ")),
    ("pidfd_open", libc::SYS_pidfd_open, Says("open process PID")),
    ("pidfd_getfd", libc::SYS_pidfd_getfd, Says("duplicate descriptor 0 of process PID")),
    ("kcmp", libc::SYS_kcmp, Says("compare what processes share with")),
    ("pread64", libc::SYS_pread64, Says(" of process PID")),
    ("process_vm_readv", libc::SYS_process_vm_readv, Works),
    ("ioctl", libc::SYS_ioctl, Says(" of process PID ")),
    ("pwritev", libc::SYS_pwritev, Says("write ")),
    ("fsync", libc::SYS_fsync, Says("write image ")),
    ("flock", libc::SYS_flock, Says("lock directory ")),
    ("getdents64", libc::SYS_getdents64, Says("/proc/PID/task")),
    ("socket", libc::SYS_socket, Says("list the sockets of the network for descriptor ")),
    ("unlinkat", libc::SYS_unlinkat, Says("write image ")),
    ("renameat", libc::SYS_renameat, Says("write image ")),
    ("mkdirat", libc::SYS_mkdirat, Says("write image ")),
    // No thread can be started, as with RLIMIT_NPROC.
    ("clone3", libc::SYS_clone3, Works),
    ("perf_event_open", libc::SYS_perf_event_open, Works),
];

/// The same of a restore.
const RESTORES: &[(&str, libc::c_long, Then)] = &[
    ("ptrace", libc::SYS_ptrace, Says("process PID")),
    ("flock", libc::SYS_flock, Says("lock directory ")),
    ("getdents64", libc::SYS_getdents64, Says("read directory ")),
    ("preadv", libc::SYS_preadv, Says(".img at offset ")),
    ("socketpair", libc::SYS_socketpair, Says("create the UNIX stream socket ")),
    ("dup3", libc::SYS_dup3, Says("install descriptor 0 in process PID")),
    ("close_range", libc::SYS_close_range, Says("close other descriptors in process PID")),
    ("setsid", libc::SYS_setsid, Says("make a session in process PID")),
];

/// Makes all calls of a number fail in a command.
#[expect(unsafe_code, reason = "a filter of system calls")]
fn failing(command: &mut Command, number: libc::c_long, errno: i32) {
    let statement =
        |code: u32, jf, k| libc::sock_filter { code: u16::try_from(code).unwrap(), jt: 0, jf, k };
    let filter = [
        // The number is the first word of struct seccomp_data.
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0),
        statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 1, u32::try_from(number).unwrap()),
        statement(libc::BPF_RET | libc::BPF_K, 0, libc::SECCOMP_RET_ERRNO | errno.cast_unsigned()),
        statement(libc::BPF_RET | libc::BPF_K, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let install = move || {
        let program = libc::sock_fprog {
            len: u16::try_from(filter.len()).expect("four"),
            filter: filter.as_ptr().cast_mut(),
        };
        // SAFETY: the program points to statements that outlive the call, which only reads.
        let result = unsafe {
            libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program)
        };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    };
    // SAFETY: the closure makes one system call and nothing else.
    unsafe { command.pre_exec(install) };
}

fn said(output: &Output) -> String {
    [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes)).concat()
}

fn check(name: &str, errno: i32, then: Then, root: &str, output: &Output) {
    let text = said(output);
    let text = text.as_str();
    assert!(!text.contains("panicked"), "{name}: {text}");
    match then {
        Works => assert!(output.status.success(), "{name}: {text}"),
        Says(words) => {
            assert_eq!(output.status.code(), Some(1), "{name}: {text}");
            assert!(text.contains(&words.replace("PID", root)), "{name} {errno}: {text}");
        }
    }
}

#[test]
fn privileged_a_dump_says_what_it_could_not_do() {
    require(Cap::Ptrace);
    let mut live = Live::workload("unix_stream_pair");
    live.tree();
    let root = live.root.to_string();
    for (name, number, then) in DUMPS {
        for errno in [libc::EPERM, libc::ENOMEM] {
            let dir = live.path("images");
            let _ = fs::remove_dir_all(&dir);
            fs::create_dir(&dir).unwrap();
            let mut command = Command::new(env!("CARGO_BIN_EXE_rcriu"));
            command.args(["dump", "-R", "-t", &root, "-D"]).arg(&dir).stdin(Stdio::null());
            failing(&mut command, *number, errno);
            let output = command.output().unwrap();
            check(name, errno, *then, &root, &output);
        }
    }
    // And after all that it is what it was.
    live.dump(&[]);
    live.restore(&[]);
    live.verdict();
}

#[test]
fn privileged_a_restore_says_what_it_could_not_do() {
    require(Cap::Ptrace);
    let mut live = Live::workload("unix_stream_pair");
    let root = live.root.to_string();
    live.dump(&[]);
    for (name, number, then) in RESTORES {
        for errno in [libc::EPERM, libc::ENOMEM] {
            let mut command = Command::new(env!("CARGO_BIN_EXE_rcriu"));
            command.args(["restore", "-d", "-D"]).arg(live.images());
            failing(&mut command, *number, errno);
            let output = common::live::bounded(command, &live.path("said"));
            check(name, errno, *then, &root, &output);
            // Nothing is left of it.
            live.wait_gone();
        }
    }
    live.restore(&[]);
    live.verdict();
}
