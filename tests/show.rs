//! `rcriu show`, run as users run it, over a chain that CRIU wrote.

use std::{
    fs::{self, File},
    io::Read,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use serde_json::{Value, json};

fn chain() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/criu42-chain/chain")
}

fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_rcriu"));
    command.current_dir(chain()).arg("show").args(arguments);
    command
}

fn run(arguments: &[&str]) -> Output {
    command(arguments).output().expect("rcriu runs")
}

#[track_caller]
fn ends(output: &Output, code: i32, stdout: &str, stderr: &str) {
    assert_eq!(String::from_utf8_lossy(&output.stderr), stderr);
    assert_eq!(String::from_utf8_lossy(&output.stdout), stdout);
    assert_eq!(output.status.code(), Some(code));
}

#[test]
fn processes_are_shown() {
    let text = "{\"magic\":\"PSTREE\",\"entries\":[\n\
        {\"pid\":293,\"ppid\":0,\"pgid\":293,\"sid\":293,\"threads\":[293]},\n\
        {\"pid\":295,\"ppid\":293,\"pgid\":293,\"sid\":293,\"threads\":[295]}\n\
        ]}\n";
    ends(&run(&["1/pstree.img"]), 0, text, "");
    let mut piped = command(&["-"]);
    piped.stdin(File::open(chain().join("1/pstree.img")).unwrap());
    ends(&piped.output().unwrap(), 0, text, "");
}

#[test]
fn documents_follow_one_another_in_the_order_given() {
    ends(
        &run(&["3/pages-3.img", "1/fs-293.img"]),
        0,
        "{\"magic\":\"PAGES\",\"raw\":true,\"bytes\":36864}\n\
         {\"magic\":\"FS\",\"entries\":[\n{\"cwd_id\":5,\"root_id\":6,\"umask\":18}\n]}\n",
        "",
    );
}

#[test]
fn a_pagemap_has_its_head_and_its_entries() {
    let output = run(&["2/pagemap-shmem-1024.img"]);
    let document: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(document["magic"], "PAGEMAP");
    assert_eq!(
        document["entries"],
        json!([
            {"pages_id": 1},
            {"vaddr": 0, "compat_nr_pages": 0, "flags": 4, "nr_pages": 48},
            {"vaddr": 0x39000, "compat_nr_pages": 0, "flags": 4, "nr_pages": 1},
            {"vaddr": 0x46000, "compat_nr_pages": 0, "flags": 4, "nr_pages": 1},
            {"vaddr": 0x4b000, "compat_nr_pages": 0, "flags": 4, "nr_pages": 1},
        ])
    );
}

#[test]
fn pretty_numbers_are_for_people() {
    let pretty = run(&["--pretty", "2/mm-293.img"]);
    let document: Value = serde_json::from_slice(&pretty.stdout).unwrap();
    let mm = &document["entries"][0];
    assert_eq!(mm["mm_start_stack"], "0x7ffcbfc16b50");
    assert_eq!(
        mm["vmas"][7],
        json!({
            "start": "0x7fa1b7e94000",
            "end": "0x7fa1b7ef4000",
            "pgoff": "0x0",
            "shmid": 2,
            "prot": "PROT_READ | PROT_WRITE",
            "flags": "MAP_SHARED",
            "status": "VMA_AREA_REGULAR | VMA_FILE_SHARED | VMA_AREA_MEMFD",
            "fd": -1,
            "madv": "MADV_NOHUGEPAGE",
            "fdflags": "O_RDWR",
        })
    );
    let plain = run(&["2/mm-293.img"]);
    let document: Value = serde_json::from_slice(&plain.stdout).unwrap();
    assert_eq!(document["entries"][0]["vmas"][7]["status"], 0x4081);
    let core = run(&["--pretty", "2/core-293.img"]);
    let document: Value = serde_json::from_slice(&core.stdout).unwrap();
    assert_eq!(document["entries"][0]["mtype"], "X86_64");
    assert_eq!(document["entries"][0]["tc"]["task_state"], "TASK_ALIVE");
    assert_eq!(document["entries"][0]["thread_core"]["creds"]["cap_eff"][1], "0x1ff");
}

#[test]
fn every_image_of_the_chain_is_shown_in_both_styles() {
    for snapshot in ["1", "2", "3"] {
        let names: Vec<_> = fs::read_dir(chain().join(snapshot))
            .unwrap()
            .map(|file| format!("{snapshot}/{}", file.unwrap().file_name().display()))
            .filter(|name| !name.ends_with("/parent"))
            .collect();
        for style in [&[][..], &["--pretty"]] {
            let arguments: Vec<_> =
                style.iter().copied().chain(names.iter().map(String::as_str)).collect();
            let output = run(&arguments);
            assert_eq!(String::from_utf8_lossy(&output.stderr), "");
            assert_eq!(output.status.code(), Some(0));
            let documents = serde_json::Deserializer::from_slice(&output.stdout);
            let documents: Vec<_> = documents.into_iter::<Value>().map(Result::unwrap).collect();
            assert_eq!(documents.len(), names.len());
        }
    }
}

#[test]
fn what_cannot_be_shown_is_reported_and_the_rest_is_shown() {
    let shown = "{\"magic\":\"FS\",\"entries\":[\n{\"cwd_id\":5,\"root_id\":6,\"umask\":18}\n]}\n";
    ends(
        &run(&["1/gone.img", "1/fs-293.img"]),
        1,
        shown,
        "rcriu: open image 1/gone.img: No such file or directory (os error 2)\n",
    );
    ends(
        &run(&["../README.md", "1/fs-293.img"]),
        1,
        shown,
        "rcriu: image ../README.md begins with magic 0x20412023, expected the magic of an image\n",
    );
    let problem = "rcriu: open image 1: it is a directory, not a regular file\n";
    ends(&run(&["1"]), 1, "", problem);
}

#[test]
fn what_would_never_end_is_not_opened() {
    let directory = tempfile::tempdir().unwrap();
    let fifo = directory.path().join("pstree.img");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    for (path, name) in [(fifo.to_str().unwrap(), "a FIFO"), ("/dev/zero", "a device")] {
        let problem = format!(
            "rcriu: open image {path}: it is {name}, not a regular file\n  \
             help: pass it as standard input: rcriu show - < FILE\n"
        );
        ends(&run(&[path]), 1, "", &problem);
    }
    // A file that is one hole has no end of empty messages.
    let hole = directory.path().join("stats-dump");
    fs::copy(chain().join("1/stats-dump"), &hole).unwrap();
    fs::OpenOptions::new().append(true).open(&hole).unwrap().set_len(1 << 40).unwrap();
    let output = run(&[hole.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1));
}

#[test]
fn a_document_that_ends_early_ends_its_line() {
    let directory = tempfile::tempdir().unwrap();
    let whole = fs::read(chain().join("1/pstree.img")).unwrap();
    let cut = directory.path().join("pstree.img");
    fs::write(&cut, &whole[..whole.len() - 1]).unwrap();
    let output = command(&["pstree.img"]).current_dir(directory.path()).output().unwrap();
    ends(
        &output,
        1,
        "{\"magic\":\"PSTREE\",\"entries\":[\n\
         {\"pid\":293,\"ppid\":0,\"pgid\":293,\"sid\":293,\"threads\":[293]}\n",
        "rcriu: image pstree.img is cut short: 15 bytes of message expected at offset 0x1e, found 14\n",
    );
}

#[test]
fn a_wrong_command_line_is_another_exit_code() {
    for arguments in [&[][..], &["--unknown", "x"]] {
        let output = run(arguments);
        assert_eq!(output.status.code(), Some(2));
        assert!(output.stdout.is_empty());
        assert!(String::from_utf8_lossy(&output.stderr).contains("Usage: rcriu show"));
    }
    let help = run(&["--help"]);
    assert_eq!(help.status.code(), Some(0));
    assert!(String::from_utf8_lossy(&help.stdout).contains("Exit codes:"));
}

#[test]
fn a_reader_that_has_seen_enough_is_no_error() {
    let files = vec!["1/mm-293.img"; 500];
    let mut child =
        command(&files).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("rcriu runs");
    let mut start = [0; 8];
    child.stdout.take().unwrap().read_exact(&mut start).unwrap();
    assert_eq!(&start, b"{\"magic\"");
    let output = child.wait_with_output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    assert_eq!(output.status.code(), Some(0));
}
