//! Tests that are run on other kernels as well: in machines, by `tests/vm/ci`.

use std::{collections::BTreeSet, fs, process::Command};

/// If set, the file that is given the tests for machines, a line each: machine, test, with
/// a tab between. Set by `tests/vm/ci`, which runs the test `tests_of_machines_exist` of each
/// program that has one.
const MACHINES: &str = "RCRIU_TEST_MACHINES";
/// The machines of `tests/vm/ci`.
const NAMES: [&str; 3] = ["6.1", "6.12", "6.12-max"];

/// Tells which tests of this program are run in which machines. A name that ends with `:` or
/// `_` stands for all tests that begin with it.
///
/// # Panics
///
/// If there is no such test or machine.
pub fn tell(tests: &[(&str, &[&str])]) {
    let program = std::env::current_exe().expect("the test has a path");
    let output = Command::new(program).args(["--list", "--format", "terse"]).output().unwrap();
    let listed = String::from_utf8(output.stdout).unwrap();
    let listed: Vec<_> = listed.lines().filter_map(|line| line.strip_suffix(": test")).collect();
    let mut lines = BTreeSet::new();
    for (name, machines) in tests {
        let many = name.ends_with([':', '_']);
        let chosen = |test: &str| test == *name || many && test.starts_with(name);
        let chosen: Vec<_> = listed.iter().filter(|test| chosen(test)).collect();
        assert!(!chosen.is_empty(), "there is no test {name}");
        for machine in *machines {
            assert!(NAMES.contains(machine), "there is no machine {machine}");
            lines.extend(chosen.iter().map(|test| format!("{machine}\t{test}\n")));
        }
    }
    if let Some(path) = std::env::var_os(MACHINES) {
        fs::write(path, String::from_iter(lines)).unwrap();
    }
}
