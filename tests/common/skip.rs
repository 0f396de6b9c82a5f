//! Tests that cannot run on this machine. The library's own tests use this file, too.

use std::{fs::File, io::Write as _};

/// The file that lists the skipped tests, one per line: program, test and missing
/// requirement, separated by tabs. Set by `tests/run`.
const SKIPPED: &str = "RCRIU_TEST_SKIPPED";
/// If set, nothing may be skipped.
const STRICT: &str = "RCRIU_TEST_STRICT";

/// Ends a test that cannot run, and names the missing requirement.
///
/// Rust's test runner knows only passed and failed tests, so the test fails, and `cargo test` alone
/// cannot show it as passed. `tests/run` finds it in the list, and counts it as skipped.
pub fn skip(missing: &str) -> ! {
    let strict = std::env::var_os(STRICT).is_some_and(|value| value != "0");
    if let Some(path) = std::env::var_os(SKIPPED).filter(|_| !strict) {
        let program = std::env::current_exe().expect("the test has a path");
        let program = program.file_stem().expect("it has a name").to_string_lossy();
        let program = program.rsplit_once('-').map_or(&*program, |(name, _hash)| name);
        let thread = std::thread::current();
        let test = thread.name().expect("a test has a name");
        let line = format!("{program}\t{test}\t{missing}\n");
        let file = File::options().append(true).create(true).open(&path);
        file.and_then(|mut file| file.write_all(line.as_bytes())).unwrap_or_else(|error| {
            panic!("cannot write to {SKIPPED}={}: {error}", path.display())
        });
    }
    eprintln!("SKIPPED, neither passed nor failed: this test needs {missing}");
    // Without a backtrace: nothing is wrong.
    std::panic::resume_unwind(Box::new("skipped"));
}
