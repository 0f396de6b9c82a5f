//! What the README says of kernels, on the kernels that it names.

mod common;

use std::process::Command;

use common::{Cap, require};

/// Which of the features of `rcriu check` each kernel of Debian's has not, and what is
/// missing then is in the README's table.
const MISSING: [(&str, &[&str]); 2] = [
    (
        "6.1",
        &[
            "timer_cr_ids",
            "pagemap_scan",
            "uffd_wp_async",
            "uffd_wp_async_shmem",
            "fuse_passthrough",
        ],
    ),
    ("6.12", &["timer_cr_ids"]),
];

#[test]
fn privileged_check_says_what_the_readme_says() {
    require(Cap::DebianKernel);
    let kernel = std::env::var("RCRIU_VM").expect("tests/vm/run names the kernel");
    let (_, expected) = MISSING.iter().find(|(name, _)| *name == kernel).expect("a known kernel");
    let output = Command::new(env!("CARGO_BIN_EXE_rcriu")).arg("check").output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let missing: Vec<_> = text
        .lines()
        .filter_map(|line| line.strip_prefix("missing"))
        .map(|line| line.split_whitespace().next().unwrap())
        .collect();
    assert_eq!(missing, *expected, "{text}");
    assert!(output.status.success(), "nothing that every dump needs is missing: {text}");
}

#[test]
fn tests_of_machines_exist() {
    common::machines::tell(&[("privileged_", &["6.1", "6.12"])]);
}
