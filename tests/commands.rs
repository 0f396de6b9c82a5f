//! What a machine lacks is no failure, and nothing that was skipped has passed: the
//! commands that run the tests count what the test runner says (`tests/tally`).

mod common;

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    path::Path,
    process::{Command, Stdio},
};

use common::{Cap, require};

/// What cargo and the test runner print of three programs: one in which a test was
/// skipped and one has failed, one that a signal has ended, and one that is fine.
const LOG: &str = "
     Running tests/live.rs (target/debug/deps/live-0123456789abcdef)

running 4 tests
test fine ... ok
test keys ... FAILED
test wrong ... FAILED
test asked_for ... ignored, takes a day

failures:

---- keys stdout ----
SKIPPED
failures:
    misleading

---- wrong stdout ----
panicked

failures:
    keys
    wrong

test result: FAILED. 1 passed; 2 failed; 1 ignored; 0 measured; 3 filtered out; finished in 0.00s

error: test failed, to rerun pass `--test live`
     Running tests/killed.rs (target/debug/deps/killed-0123456789abcdef)

running 2 tests
test fine ... ok
     Running tests/core.rs (target/debug/deps/core-0123456789abcdef)

running 1 test
test keys ... ok

test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s
";

/// What is shown of it.
const SHOWN: &str = "
     Running tests/live.rs (target/debug/deps/live-0123456789abcdef)

running 4 tests
test fine ... ok
test keys ... skipped: a key
test wrong ... FAILED
test asked_for ... ignored, takes a day

failures:

---- wrong stdout ----
panicked

failures:
    wrong

test result: FAILED. 1 passed; 1 failed; 1 skipped; 1 ignored; 0 measured; 3 filtered out; finished in 0.00s

error: test failed, to rerun pass `--test live`
     Running tests/killed.rs (target/debug/deps/killed-0123456789abcdef)

running 2 tests
test fine ... ok
     Running tests/core.rs (target/debug/deps/core-0123456789abcdef)

running 1 test
test keys ... ok

test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s
";

/// A program in which a test was skipped and none has failed, and the end of the log.
const ONLY_SKIPPED: &str = "     Running tests/peer.rs (target/debug/deps/peer-0123456789abcdef)

running 1 test
test alone ... FAILED

failures:

---- alone stdout ----
SKIPPED

failures:
    alone

test result: FAILED. 0 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s

error: test failed, to rerun pass `--test peer`
error: 2 targets failed:
    `--test live`
    `--test peer`
";

/// What is shown of it.
const ONLY_SKIPPED_SHOWN: &str = "     Running tests/peer.rs (target/debug/deps/peer-0123456789abcdef)

running 1 test
test alone ... skipped: a peer

test result: ok. 0 passed; 0 failed; 1 skipped; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s

error: 1 target(s) failed:
    `--test live`
";

/// The same program where a key is there.
const ELSEWHERE: &str = "
     Running live (/target/debug/deps/live-0123456789abcdef)
test keys ... ok
test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 3 filtered out; finished in 0.00s
";

fn tally(arguments: &[&Path]) -> Command {
    let mut command = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/tally"));
    command.args(arguments).stdin(Stdio::null());
    command
}

/// Returns the records of a log, and whether nothing had failed.
fn records(log: &str, skipped: &str) -> (String, bool) {
    let dir = tempfile::tempdir().unwrap();
    let paths = ["log", "skipped"].map(|name| dir.path().join(name));
    fs::write(&paths[0], log).unwrap();
    fs::write(&paths[1], skipped).unwrap();
    let output = tally(&["read".as_ref(), &paths[0], &paths[1]]).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    (String::from_utf8(output.stdout).unwrap(), output.status.success())
}

/// Returns what is said of records, and whether that is success.
fn sum(records: &str) -> (String, bool) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("records");
    fs::write(&path, records).unwrap();
    let mut command = tally(&["sum".as_ref()]);
    let output = command.stdin(fs::File::open(path).unwrap()).output().unwrap();
    (String::from_utf8(output.stdout).unwrap(), output.status.success())
}

#[test]
fn what_was_skipped_is_neither_passed_nor_failed() {
    let (here, fine) = records(LOG, "live\tkeys\ta key\nother\twrong\tnothing\n");
    assert!(!fine);
    let (text, fine) = sum(&here);
    let expected = "
skipped, since this takes what is not here:
  live asked_for: takes a day
  live keys: a key

failed:
  live wrong
      panicked
  killed ended without a result

2 passed, 2 failed, 2 skipped
";
    assert_eq!((text.as_str(), fine), (expected, false));

    // What has failed among others and passed alone is named.
    let alone = here.replace("failed\tlive", "unsteady\tlive");
    let (text, _) = sum(&alone);
    let named =
        "\nfailed at first, and passed when repeated alone:\n  live wrong\n      panicked\n";
    assert!(text.contains(named), "{text}");
    assert!(text.ends_with("\n3 passed, 1 failed, 2 skipped\n"), "{text}");

    // What has passed elsewhere was not left out.
    let (there, fine) = records(ELSEWHERE, "");
    assert!(fine);
    let (text, _) = sum(&(here + &there));
    assert!(text.ends_with("\n3 passed, 2 failed, 1 skipped\n"), "{text}");
    assert_eq!(sum(&there), ("\n1 passed, 0 failed, 0 skipped\n".to_owned(), true));
}

#[test]
fn skipped_tests_are_shown_as_skipped() {
    let dir = tempfile::tempdir().unwrap();
    let skipped = dir.path().join("skipped");
    fs::write(&skipped, "live\tkeys\ta key\npeer\talone\ta peer\n").unwrap();
    let mut command = tally(&["show".as_ref(), &skipped]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut to = child.stdin.take().unwrap();
    let mut from = BufReader::new(child.stdout.take().unwrap());
    // Each line comes before the next is written.
    let mut shown = String::new();
    let (lines, rest) = LOG.split_at(LOG.find("\nfailures:").unwrap());
    for line in lines.split_inclusive('\n') {
        to.write_all(line.as_bytes()).unwrap();
        from.read_line(&mut shown).unwrap();
    }
    to.write_all(rest.as_bytes()).unwrap();
    to.write_all(ONLY_SKIPPED.as_bytes()).unwrap();
    drop(to);
    from.read_to_string(&mut shown).unwrap();
    assert_eq!(shown, [SHOWN, ONLY_SKIPPED_SHOWN].concat());
    assert!(child.wait().unwrap().success());
    // Of a section that does not end, nothing is lost.
    let output = Command::new("sh")
        .arg("-c")
        .arg("printf 'failures:\n\n---- keys stdout ----\n' | tests/tally show \"$0\"")
        .arg(&skipped)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(text, "failures:\n\n---- keys stdout ----\n");
}

#[test]
fn a_test_that_cannot_run_says_so_and_does_not_pass() {
    // Set when this test runs itself.
    const INNER: &str = "RCRIU_TEST_INNER";
    if std::env::var_os(INNER).is_some() {
        require(Cap::Processor("no-such-flag"));
    }
    let dir = tempfile::tempdir().unwrap();
    let list = dir.path().join("skipped");
    let name = "a_test_that_cannot_run_says_so_and_does_not_pass";
    for (threads, strict) in [("1", "0"), ("2", "0"), ("1", "1")] {
        let _ = fs::remove_file(&list);
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", name, "--test-threads", threads]).env(INNER, "1");
        command.env("RCRIU_TEST_SKIPPED", &list).env("RCRIU_TEST_STRICT", strict);
        let output = command.output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(!output.status.success(), "{text}");
        assert!(text.contains("SKIPPED, neither passed nor failed"), "{text}");
        let said = fs::read_to_string(&list).unwrap_or_default();
        let cause = "a processor with no-such-flag (flags in /proc/cpuinfo)";
        let line = format!("commands\t{name}\t{cause}\n");
        assert_eq!(said, if strict == "1" { String::new() } else { line });
    }
}
