//! Exit codes: those of CRIU 4.2 for a program that is called `criu`, as its callers expect them.

mod common;

use std::{
    os::unix::process::CommandExt,
    process::{Command, Stdio},
};

use common::live::{directory, engine};

/// Command lines with the exit codes that CRIU 4.2 was seen to end with, in an empty directory.
const LINES: &[(i32, &[&str])] = &[
    (
        0,
        &[
            "-h",
            "--hel",
            "dump --help",
            "-V",
            "--version",
            "--vers",
            "dump -V",
            "dump --vers --bogus",
            "check",
            "cpuinfo dump",
            // Levels of messages.
            "-v0 check",
            "--verbosity check",
            "-verbosity check",
            "-verbosity=0 check",
            // Options of other commands have no effect.
            "check --no-all -t 5 -M auto --status-fd 99",
            "cpuinfo dump -t 5 --leave-running",
        ],
    ),
    (
        1,
        &[
            // The command.
            "",
            "--",
            "bogus",
            "-- dump",
            "dump extra",
            "check extra",
            "restore extra",
            "service extra",
            "cpuinfo",
            "cpuinfo bogus",
            "cpuinfo dump check",
            "swrk",
            "swrk 1 2",
            "swrk -1",
            "exec ls",
            // Options that do not exist, or could be several.
            "--bogus",
            "dump --bogus -V",
            "dump -Z",
            "pre-dump --bogus",
            "restore --bogus",
            "check --bogus",
            "dedup --bogus",
            "cpuinfo --bogus",
            "service --bogus",
            "swrk --bogus",
            "exec --bogus",
            "lazy-pages --bogus",
            "page-server --bogus",
            "--ver",
            "dump --v",
            "dump --leave -t 99999999",
            "--tcp dump",
            "check --no-bogus",
            "restore --no-tree",
            // Values that are missing, or wrong.
            "dump -t",
            "dump -t abc",
            "dump -t 0",
            "dump -t -5",
            "service --address",
            "check --feature",
            "check --feature bogus",
            "dump -t 99999999 --manage-cgroups=bogus",
            "dump -t 99999999 --network-lock=bogus",
            "dump -t 99999999 --cpu-cap=bogus",
            "dump -t 99999999 --empty-ns bogus",
            "dump -t 99999999 --pre-dump-mode bogus",
            "dump -t 99999999 --timeout x",
            "dump -t 99999999 --ghost-limit x",
            "dump -t 99999999 --config nowhere",
            "restore --join-ns bogus",
            "restore --inherit-fd bogus",
            // Options that do not go together, or with the command.
            "restore -S",
            "restore --exec-cmd",
            "restore --exec-cmd -d -- true",
            "dump -t 99999999 --exec-cmd -- true",
            "check --exec-cmd",
            "check --inherit-fd fd[3]:x",
            // Processes, images and directories that do not exist.
            "dump",
            "pre-dump",
            "dump -t 99999999",
            "dump -t 99999999 -D nowhere",
            "pre-dump -t 99999999",
            "restore",
            "restore -D nowhere",
            "restore -W nowhere",
            "dedup",
            "dedup -D nowhere",
            "cpuinfo check",
            "cpuinfo dump -D nowhere",
            "check -D nowhere",
            "check -W nowhere",
            "check -o nowhere/log",
            "service -D nowhere",
            "service --address nowhere/socket",
        ],
    ),
    (255, &["exec", "exec -t 1", "swrk 99", "swrk 0"]),
];

#[test]
fn called_as_criu_it_ends_with_the_codes_of_criu() {
    let mut wrong = Vec::new();
    for (code, lines) in LINES {
        for line in *lines {
            let dir = directory();
            let mut command = Command::new(engine());
            command.arg0("criu").args(line.split_whitespace()).current_dir(dir.path());
            command.env("HOME", dir.path()).stdin(Stdio::null());
            let output = command.output().unwrap();
            if output.status.code() != Some(*code) {
                let said = String::from_utf8_lossy(&output.stderr);
                wrong.push(format!("{line}: {}, not {code}: {said}", output.status));
            }
            assert!(*code == 0 || !output.stderr.is_empty(), "{line}: no reason");
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// Under its own name it tells a wrong command line from a failure, and refuses options of other
/// commands.
#[test]
fn called_as_rcriu_it_ends_with_codes_of_its_own() {
    let dir = directory();
    for (line, code) in
        [("", 2), ("bogus", 2), ("dump", 2), ("dump --bogus", 2), ("check -t 5", 1), ("exec", 255)]
    {
        let mut command = Command::new(engine());
        command.args(line.split_whitespace()).current_dir(dir.path()).env("HOME", dir.path());
        assert_eq!(command.output().unwrap().status.code(), Some(code), "{line}");
    }
}
