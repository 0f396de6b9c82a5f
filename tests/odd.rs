//! Processes that are odd to dump, and ends of rcriu itself that are odd: what cannot be
//! done is refused by name, and the process is as it was.
//!
//! All of it needs root.

mod common;

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Child, Command, Output, Stdio},
};

use common::{
    Cap,
    live::{Live, PATIENCE, bounded, directory, engine, state_of, wait_for},
    require, skip,
    untouched::Before,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Dumps a process that goes on, in vain; it says these words, and the process is as it was.
fn refused(live: &mut Live, options: &[&str], words: &[&str]) {
    let before = Before::of(live);
    let output = live.try_dump(&[&["-R"], options].concat());
    let text = said(&output);
    assert!(!output.status.success(), "it was dumped: {text}");
    for words in words {
        assert!(text.contains(words), "no {words:?} in: {text}");
    }
    before.assert_untouched(live, "a dump that was refused");
}

fn tracer_of(pid: Pid) -> i32 {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("TracerPid:"));
    line.and_then(|pid| pid.trim().parse().ok()).unwrap_or(0)
}

/// Begins with a dump of a tree that goes on.
fn begun(live: &Live, options: &[&str]) -> Child {
    fs::create_dir_all(live.images()).unwrap();
    let mut dump = Command::new(engine());
    dump.args(["dump", "-R", "-t", &live.root.to_string(), "-D"]).arg(live.images());
    dump.args(options).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    dump.spawn().unwrap()
}

/// A program waits in `clone(CLONE_VFORK)` until its child ends, which does as soon as there
/// is the file `go`, and it makes the file `done` then.
const VFORK: &str = "
    my $pid = syscall(56, 0x4011, 0, 0, 0, 0);
    if ($pid == 0) { until (-e 'go') { select(undef, undef, undef, 0.01) } exit 0 }
    waitpid($pid, 0);
    open(my $file, '>', 'done');
    sleep 1000;
";

#[test]
fn privileged_a_vfork_is_waited_for() {
    require(Cap::Ptrace);
    require(Cap::Program("perl"));
    let mut live = Live::program("perl", &["-e", VFORK], directory());
    let pid = live.root.as_raw();
    wait_for("the call", || state_of(pid) == Some('D') && live.tree().len() == 2);
    let output = live.try_dump(&["-R", "--timeout", "1"]);
    let text = said(&output);
    assert!(!output.status.success(), "it was dumped: {text}");
    assert!(text.contains("waits for its vfork(2) child") && text.contains("--timeout"), "{text}");
    assert_eq!(tracer_of(live.root), 0);

    let mut dump = begun(&live, &["--timeout", &PATIENCE.as_secs().to_string()]);
    wait_for("the dump", || tracer_of(live.root) != 0);
    fs::write(live.path("go"), "").unwrap();
    assert!(dump.wait().unwrap().success());
    wait_for("the end of the call", || live.path("done").exists());
}

/// A program for 32 bits: an ELF header, one segment, and `pause()` again and again.
fn narrow_program() -> Vec<u8> {
    const BASE: u32 = 0x0804_8000;
    const HEADERS: u32 = 52 + 32;
    // mov eax, 29; int 0x80; jmp to the first
    const CODE: [u8; 9] = [0xb8, 29, 0, 0, 0, 0xcd, 0x80, 0xeb, 0xf7];
    let total = HEADERS + u32::try_from(CODE.len()).unwrap();
    let mut bytes = b"\x7fELF\x01\x01\x01".to_vec();
    bytes.resize(16, 0);
    let mut push = |values: &[u32], width: usize| {
        for value in values {
            bytes.extend_from_slice(&value.to_le_bytes()[..width]);
        }
    };
    // ET_EXEC, EM_386; version, entry, program headers, section headers, flags; sizes.
    push(&[2, 3], 2);
    push(&[1, BASE + HEADERS, 52, 0, 0], 4);
    push(&[52, 32, 1, 0, 0, 0], 2);
    // PT_LOAD of all, readable and executable.
    push(&[1, 0, BASE, BASE, total, total, 5, 0x1000], 4);
    bytes.extend_from_slice(&CODE);
    bytes
}

#[test]
fn privileged_a_32_bit_process_is_named() {
    require(Cap::Ptrace);
    let dir = directory();
    let program = dir.path().join("narrow");
    fs::write(&program, narrow_program()).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let mut live = Live::program(program.to_str().unwrap(), &[], dir);
    let path = format!("/proc/{}/comm", live.root);
    wait_for("the program", || {
        if matches!(state_of(live.root.as_raw()), None | Some('Z')) {
            skip("a kernel that executes 32-bit programs (CONFIG_IA32_EMULATION)");
        }
        fs::read_to_string(&path).is_ok_and(|name| name.trim() == "narrow")
    });
    refused(&mut live, &[], &["executes 32-bit code"]);
}

#[test]
fn privileged_a_dump_of_the_own_tree_is_named() {
    require(Cap::Ptrace);
    let dir = directory();
    let mut shell = Command::new("sh");
    shell.args(["-c", "\"$0\" dump -t $$ -R -D . ; exit $?"]).arg(engine());
    shell.current_dir(dir.path());
    let output = bounded(shell, &dir.path().join("out"));
    let text = said(&output);
    assert!(!output.status.success(), "{text}");
    assert!(text.contains("rcriu itself is in the tree of process"), "{text}");
}

/// The first process of a pid namespace ignores what it does not handle, even SIGSTOP and
/// SIGKILL from inside.
fn first_process(prefix: &str, act: impl Fn(&dyn Fn(&[&str]) -> Output, &Path)) {
    require(Cap::Ptrace);
    require(Cap::Program("unshare"));
    require(Cap::Program("nsenter"));
    let script = format!(
        "{prefix} sh -c 'trap : USR1; echo > ready; until [ -e end ]; do sleep 0.01; echo > on; done'"
    );
    let arguments = ["--pid", "--fork", "--mount-proc", "sh", "-c", &format!("exec {script}")];
    let mut live = Live::program("unshare", &arguments, directory());
    wait_for("the first process", || live.path("ready").exists());
    let first = live.tree()[1];
    let enter = |options: &[&str]| {
        let mut command = Command::new("nsenter");
        command.args(["-t", &first.to_string(), "-p", "-m"]).arg(engine());
        command.args(["dump", "-t", "1", "-D"]).arg(live.path("images")).args(options);
        fs::create_dir_all(live.path("images")).unwrap();
        bounded(command, &live.path("out"))
    };
    act(&enter, live.dir.path());
    let on = live.path("on");
    let _ = fs::remove_file(&on);
    wait_for("what it does next", || on.exists());
    assert_eq!(tracer_of(Pid::from_raw(first)), 0);
    fs::write(live.path("end"), "").unwrap();
    wait_for("its end", || matches!(state_of(first), None | Some('Z')));
}

#[test]
fn privileged_the_first_process_of_a_namespace_is_dumped_if_it_goes_on() {
    first_process("setsid", |dump, _| {
        let output = dump(&[]);
        assert!(!output.status.success());
        assert!(
            said(&output).contains("the first process of this pid namespace"),
            "{}",
            said(&output)
        );
        let output = dump(&["-R"]);
        assert!(output.status.success(), "{}", said(&output));
    });
}

#[test]
fn privileged_a_session_from_outside_of_the_namespace_is_named() {
    first_process("", |dump, _| {
        let output = dump(&["-R"]);
        assert!(!output.status.success());
        let text = said(&output);
        assert!(text.contains("whose leader is outside of this pid namespace"), "{text}");
    });
}

#[test]
fn privileged_a_stopped_process_that_stays_stopped_is_restored_stopped() {
    require(Cap::Ptrace);
    let mut live = Live::workload("threads");
    let pid = live.root.as_raw();
    kill(live.root, Signal::SIGSTOP).unwrap();
    wait_for("the stop", || state_of(pid) == Some('T'));
    let output = live.try_dump(&["-s"]);
    assert!(output.status.success(), "{}", said(&output));
    wait_for("the stop after the dump", || state_of(pid) == Some('T'));
    live.kill();
    live.restore(&[]);
    wait_for("the stop after the restore", || state_of(pid) == Some('T'));
    kill(live.root, Signal::SIGCONT).unwrap();
    live.verdict();
}

/// Runs rcriu with limits of the shell's.
#[test]
fn privileged_limits_of_its_own_leave_the_target_as_it_was() {
    require(Cap::Ptrace);
    // How much memory is enough depends on how the program was built.
    for (limit, is_enough) in [
        ("ulimit -f 1", Some(false)),
        ("ulimit -v 16000", None),
        ("ulimit -v 22000", None),
        ("ulimit -v 26000", None),
        ("ulimit -n 8", Some(false)),
    ] {
        let mut live = Live::workload("threads");
        let before = Before::of(&mut live);
        fs::create_dir_all(live.images()).unwrap();
        let mut shell = Command::new("sh");
        shell.args(["-c", &format!("{limit}; exec \"$@\""), "sh"]).arg(engine());
        shell.args(["dump", "-R", "-t", &live.root.to_string(), "-D"]).arg(live.images());
        let output = bounded(shell, &live.path("out"));
        println!("{limit}: {}, {}", output.status, said(&output));
        assert!(is_enough.is_none_or(|enough| enough == output.status.success()), "{limit}");
        before.assert_untouched(&mut live, limit);
        live.verdict();
    }
}

/// Signals that end the process which does the work at any moment.
#[test]
fn privileged_signals_that_end_it_leave_the_target_as_it_was() {
    require(Cap::Ptrace);
    for signal in [Signal::SIGSEGV, Signal::SIGXFSZ, Signal::SIGABRT, Signal::SIGKILL] {
        let mut live = Live::workload("threads");
        let before = Before::of(&mut live);
        let mut ended = false;
        while !ended {
            let mut dump = begun(&live, &[]);
            // Again and again: Rust's runtime returns from the first SIGSEGV.
            while dump.try_wait().unwrap().is_none() {
                let tracer = tracer_of(live.root);
                if tracer != 0 && tracer != i32::try_from(dump.id()).unwrap() {
                    let _ = kill(Pid::from_raw(tracer), signal);
                }
                std::thread::yield_now();
            }
            // It may have been too late.
            ended = !dump.wait().unwrap().success();
        }
        before.assert_untouched(&mut live, signal.as_str());
        live.verdict();
    }
}
