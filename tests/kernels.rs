//! What src/docs/kernels.md says of kernels, on the kernels that it names.

mod common;

use std::process::Command;

use common::{Cap, require};

/// The features of `rcriu check` that each of Debian's kernels lacks. The table in
/// src/docs/kernels.md says what they cost.
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
fn privileged_check_agrees_with_the_documents() {
    require(Cap::DebianKernel);
    let kernel = std::env::var("RCRIU_VM").expect("tests/vm/run names the kernel");
    let (_, expected) = MISSING.iter().find(|(name, _)| *name == kernel).expect("a known kernel");
    let output = Command::new(env!("CARGO_BIN_EXE_rcriu")).arg("check").output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let missing: Vec<_> = text
        .lines()
        .filter_map(|line| line.strip_prefix("missing ").or(line.strip_prefix("optional ")))
        .map(|line| line.split_whitespace().next().unwrap())
        .collect();
    assert_eq!(missing, *expected, "{text}");
    assert!(output.status.success(), "no feature that every dump needs may be missing: {text}");
}

#[test]
fn tests_of_machines_exist() {
    common::machines::tell(&[("privileged_", &["6.1", "6.12"])]);
}
