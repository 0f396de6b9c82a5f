//! `imgfs ls`, `check`, `diff` and `flatten` as users meet them, on the chain
//! that CRIU wrote.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use serde_json::Value;

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/criu42-chain/chain")
}

fn imgfs(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_imgfs"))
        .args(arguments)
        .env("TZ", "UTC")
        .output()
        .expect("run imgfs")
}

fn chain() -> String {
    fixture().to_str().expect("a path in UTF-8").to_owned()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).expect("text")
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).expect("text")
}

fn json(arguments: &[&str]) -> Value {
    serde_json::from_slice(&imgfs(arguments).stdout).expect("JSON")
}

/// Copies the chain to where it may be damaged.
fn copy(to: &Path) {
    let status = Command::new("cp").arg("-a").arg(fixture()).arg(to).status().expect("run cp");
    assert!(status.success());
}

#[test]
fn ls_has_a_line_for_each_snapshot() {
    let output = imgfs(&["ls", &chain()]);
    assert_eq!(output.status.code(), Some(0));
    let text = stdout(&output);
    let mut lines = text.lines();
    assert_eq!(
        lines.next().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")),
        Some("NAME PARENT DATE PROCESSES PRESENT IN-PARENT PUNCHED ON-DISK FLAT".to_owned())
    );
    for (line, expected) in lines.zip(["1 - 2 176 0", "2 1 2 75 110", "3 2 2 83 108"]) {
        // Date and disk usage are those of this checkout.
        let words: Vec<&str> = line.split_whitespace().collect();
        assert_eq!([words[0], words[1], words[3], words[4], words[5]].join(" "), expected);
        assert!(words[2].ends_with("+00:00") && words[2].contains('T'), "RFC 3339: {}", words[2]);
    }
}

#[test]
fn ls_says_the_same_in_json() {
    let document = json(&["ls", "--json", &chain()]);
    let third = &document["snapshots"][2];
    assert_eq!(third["name"], "3");
    assert_eq!(third["parent"], "2");
    assert_eq!(third["pre_dump"], false);
    assert_eq!(third["processes"], serde_json::json!([293, 295]));
    assert_eq!(third["pages"]["private"]["present"], 29);
    assert_eq!(third["pages"]["private"]["in_parent"], 108);
    assert_eq!(third["pages"]["shared"]["present"], 54);
    assert_eq!(third["flat_bytes"], (29 + 108 + 54) * 4096);
    assert!(third["disk_bytes"].as_u64() > Some(83 * 4096 / 2));
}

#[test]
fn check_finds_nothing_wrong_with_a_whole_chain() {
    let output = imgfs(&["check", &chain()]);
    assert_eq!(output.status.code(), Some(0), "{}", stdout(&output));
    assert!(stdout(&output).ends_with("notes\n") || stdout(&output).ends_with("note\n"));
    assert_eq!(json(&["check", "--json", &chain()])["errors"], 0);
}

#[test]
fn check_names_directory_memory_and_address_of_what_is_wrong() {
    let place = tempfile::tempdir().expect("make a directory");
    copy(place.path());
    let chain = place.path().join("chain");
    let pages = chain.join("1/pages-1.img");
    fs::OpenOptions::new().write(true).open(pages).unwrap().set_len(3 * 4096 + 7).unwrap();
    fs::write(chain.join("2/core-293.img"), "garbage").unwrap();
    fs::remove_file(chain.join("3/core-295.img")).unwrap();
    fs::remove_file(chain.join("2/pagemap-295.img")).unwrap();
    let output = imgfs(&["check", chain.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1));
    let text = stdout(&output);
    for expected in [
        "/1: shmem 1024 at 0x3000: pages-1.img is cut short: it has 12295 bytes, expected 196608",
        "/2: image",
        "core-293.img begins with magic 0x62726167",
        "/3: images of process 295: there is no core-295.img",
        "2/pagemap-295.img has no entry for them",
        "3 snapshots: ",
    ] {
        assert!(text.contains(expected), "no {expected:?} in\n{text}");
    }
    let document = json(&["check", "--json", chain.to_str().unwrap()]);
    let findings = document["findings"].as_array().expect("a list");
    let cut = findings.iter().find(|finding| finding["address"] == "0x3000").expect("the cut");
    assert_eq!(cut["memory"], serde_json::json!({ "kind": "shared", "shmid": 1024 }));
    assert_eq!(cut["severity"], "error");
}

#[test]
fn diff_tells_which_pages_differ_and_exits_like_diff() {
    let output = imgfs(&["diff", &chain(), "1", "3"]);
    assert_eq!(output.status.code(), Some(1));
    let text = stdout(&output);
    assert!(
        text.ends_with("45 pages differ (102 are in the same place, 89 were compared)\n"),
        "{text}"
    );
    assert!(text.contains("shmem 1024: 1"), "{text}");
    assert!(text.contains("\n  0x5000-0x7000  2\n"), "{text}");
    let document = json(&["diff", "--json", &chain(), "1", "3"]);
    assert_eq!(document["pages"], 45);

    let same = imgfs(&["diff", &chain(), "2", "2"]);
    assert_eq!(same.status.code(), Some(0));
    assert!(stdout(&same).starts_with("0 pages differ"));

    let quiet = imgfs(&["diff", "-q", &chain(), "1", "2"]);
    assert_eq!((quiet.status.code(), quiet.stdout.len()), (Some(1), 0));

    // Without names, the newest with its parent; with one, that with the newest.
    let newest = json(&["diff", "--json", &chain()]);
    assert_eq!((&newest["a"], &newest["b"]), (&"2".into(), &"3".into()));
    assert_eq!(json(&["diff", "--json", &chain(), "1"])["pages"], 45);
    let first = imgfs(&["diff", &format!("{}/1", chain())]);
    assert_eq!(first.status.code(), Some(2));
    assert!(stderr(&first).contains("snapshot 1 has no parent"), "{}", stderr(&first));

    let paths = ["1", "3"].map(|name| format!("{}/{name}", chain()));
    let apart = json(&["diff", "--json", &paths[0], &paths[1]]);
    assert_eq!(apart["memories"], document["memories"], "two directories of one chain");
    assert_eq!(apart["a"], paths[0].as_str());

    let unknown = imgfs(&["diff", &chain(), "1", "9"]);
    assert_eq!(unknown.status.code(), Some(2));
    assert_eq!(
        stderr(&unknown),
        "imgfs: no snapshot is called \"9\"\n  help: choose one of 1, 2, 3\n"
    );
}

/// The sums of a map are those that ls counts, and its cells add up to them.
#[test]
fn map_counts_what_ls_counts() {
    let (map, ls) = (json(&["map", "--json", &chain()]), json(&["ls", "--json", &chain()]));
    let number = |value: &Value| value.as_u64().unwrap_or(0);
    let listed = ls["snapshots"].as_array().unwrap();
    for (drawn, listed) in map["snapshots"].as_array().unwrap().iter().zip(listed) {
        assert_eq!(drawn["name"], listed["name"]);
        let pages = |name: &str| {
            let kinds = ["private", "shared"].map(|kind| number(&listed["pages"][kind][name]));
            kinds.iter().sum::<u64>() * 4096
        };
        assert_eq!(number(&drawn["bytes"]["here"]), pages("present") - pages("punched"));
        assert_eq!(number(&drawn["bytes"]["parent"]), pages("in_parent"));
    }
    let memories = map["memories"].as_array().unwrap();
    assert_eq!(memories.len(), 3);
    for memory in memories {
        for snapshot in memory["snapshots"].as_array().unwrap() {
            for state in ["here", "parent"] {
                let cells = snapshot["cells"].as_array().unwrap().iter();
                let sum: u64 = cells.map(|cell| number(&cell[state])).sum();
                assert_eq!(sum, number(&snapshot["bytes"][state]), "{memory}");
            }
        }
    }
}

#[test]
fn map_draws_what_can_be_read_and_fails() {
    let dir = tempfile::tempdir().unwrap();
    copy(dir.path());
    fs::write(dir.path().join("chain/2/pagemap-293.img"), b"nothing").unwrap();
    let output = imgfs(&["map", dir.path().join("chain").to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("2/pagemap-293.img"), "{}", stderr(&output));
    assert!(stdout(&output).contains("\npid 293"), "{}", stdout(&output));
}

#[test]
fn a_look_at_a_snapshot_without_its_parent_shows_what_it_has() {
    let dir = tempfile::tempdir().unwrap();
    copy(dir.path());
    let whole = dir.path().join("chain/3").to_str().unwrap().to_owned();
    let alone = dir.path().join("3").to_str().unwrap().to_owned();
    let output = Command::new("cp").args(["-a", &whole, &alone]).status().unwrap();
    assert!(output.success());

    for command in [&["ps"][..], &["fds"], &["maps", "293"], &["info"]] {
        let look = |chain| imgfs(&[&command[..1], &[chain], &command[1..]].concat());
        let (of_whole, of_alone) = (look(&whole), look(&alone));
        assert_eq!(of_alone.status.code(), Some(0), "{}", stderr(&of_alone));
        let lines = |output| stdout(output).lines().count();
        assert_eq!(lines(&of_alone), lines(&of_whole), "{}", stdout(&of_alone));
        assert_eq!(stderr(&of_whole), "");
        let warned = stderr(&of_alone);
        // Descriptors need no memory.
        if command[0] != "fds" {
            assert!(warned.starts_with("imgfs: warning: memory of ancestors is missing: "));
            assert!(warned.contains("3/parent leads to ../2: No such file"), "{warned}");
        }
    }
    let stored = |chain: &str| {
        let tree = json(&["ps", "--json", chain]);
        let tree = tree["processes"].as_array().unwrap();
        tree.iter().map(|process| process["private_bytes"].as_u64().unwrap()).sum::<u64>()
    };
    assert_eq!((stored(&whole), stored(&alone)), ((29 + 108) * 4096, 29 * 4096));

    // A copy has what is there, and holes for the rest.
    let get = |chain: &str, to: &str| {
        let to = dir.path().join(to);
        (imgfs(&["get", chain, "mem/293", to.to_str().unwrap()]), to)
    };
    let (of_whole, whole_copy) = get(&whole, "whole-copy");
    assert_eq!((of_whole.status.code(), stderr(&of_whole)), (Some(0), String::new()));
    let (of_alone, alone_copy) = get(&alone, "alone-copy");
    assert_eq!(of_alone.status.code(), Some(1));
    let said = stderr(&of_alone);
    let (mut same, mut missing) = (0, 0);
    for entry in fs::read_dir(whole_copy).unwrap() {
        let entry = entry.unwrap();
        let (all, found) = (fs::read(entry.path()), fs::read(alone_copy.join(entry.file_name())));
        let (all, found) = (all.unwrap(), found.unwrap());
        assert_eq!(all.len(), found.len());
        let mut holes = 0;
        for (all, found) in all.chunks(4096).zip(found.chunks(4096)) {
            match found.iter().all(|byte| *byte == 0) {
                true => holes += u64::from(all != found),
                false => assert_eq!(all, found),
            }
        }
        let name = entry.file_name().into_string().unwrap();
        let is_told = said.contains(&format!("/alone-copy/{name} has a hole"));
        assert!(is_told || holes == 0, "{name}: {said}");
        if is_told { missing += 1 } else { same += 1 }
    }
    assert!(same > 0 && missing > 0, "{said}");
    let end = format!("the copy {} is incomplete: ", alone_copy.display());
    assert!(said.lines().last().unwrap().starts_with(&format!("imgfs: {end}")), "{said}");

    // What needs the parent fails.
    for path in ["pages-2.img", "pagemap-293.img"] {
        let output = imgfs(&["cat", &alone, path]);
        assert_eq!(output.status.code(), Some(1));
        assert!(stderr(&output).contains("3/parent leads to ../2"), "{}", stderr(&output));
    }
}

#[test]
fn flatten_writes_what_the_chain_resolves_to() {
    let place = tempfile::tempdir().expect("make a directory");
    for snapshot in ["1", "2", "3"] {
        let out = place.path().join(snapshot);
        let output = imgfs(&["flatten", "--snapshot", snapshot, &chain(), out.to_str().unwrap()]);
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        assert_eq!((output.stdout.len(), output.stderr.len()), (0, 0));
        assert!(!out.join("parent").exists());
        // The same names as before, and the same bytes but for the memory.
        let origin = fixture().join(snapshot);
        for entry in fs::read_dir(&origin).unwrap() {
            let name = entry.unwrap().file_name();
            let name = name.to_str().unwrap();
            if name == "parent" {
                continue;
            }
            let (old, new) =
                (fs::read(origin.join(name)).unwrap(), fs::read(out.join(name)).unwrap());
            if !name.starts_with("page") {
                assert_eq!(old, new, "{name}");
            }
        }
    }
    // Copies are snapshots like others: nothing differs from the originals.
    let chain = place.path().to_str().unwrap().to_owned();
    assert_eq!(imgfs(&["check", &chain]).status.code(), Some(0));
    let own = json(&["diff", "--json", &chain, "1", "3"]);
    assert_eq!(own["pages"], 45);

    let again = imgfs(&["flatten", &chain, &format!("{chain}/3"), "--snapshot", "3"]);
    assert_eq!(again.status.code(), Some(1));
    assert!(stderr(&again).contains("is not empty\n  help: choose another"), "{}", stderr(&again));
}

#[test]
fn long_work_shows_a_bar_on_a_terminal_only() {
    const BAR: [char; 2] = ['\u{2588}', '\u{2591}'];
    let dir = tempfile::tempdir().unwrap();
    copy(dir.path());
    let chain = dir.path().join("chain").to_str().unwrap().to_owned();
    let commands = [
        (env!("CARGO_BIN_EXE_imgfs"), format!("ls {chain}")),
        (env!("CARGO_BIN_EXE_imgfs"), format!("info {chain}")),
        (env!("CARGO_BIN_EXE_imgfs"), format!("check {chain}")),
        (env!("CARGO_BIN_EXE_rcriu"), format!("dedup -D {chain}/3")),
    ];
    for (program, arguments) in commands {
        let piped = || {
            let output = Command::new(program).args(arguments.split(' ')).output().unwrap();
            stdout(&output) + &stderr(&output)
        };
        let on_terminal = || {
            let line = format!("stty columns 80; {program} {arguments}");
            let mut script = Command::new("script");
            let output = script.args(["-qec", &line, "/dev/null"]).output().unwrap();
            assert!(output.status.success(), "{output:?}");
            stdout(&output)
        };
        // The last command works only once.
        let piped = if arguments.starts_with("dedup") { String::new() } else { piped() };
        assert!(!piped.contains(BAR), "{arguments}: {piped}");
        let shown = on_terminal();
        assert!(shown.contains(BAR), "{arguments}: {shown}");
        // It is removed at the end, and the result follows.
        let rest = shown.rsplit(BAR).next().unwrap();
        assert!(rest.contains("\x1b[2K") && rest.trim_end().len() > 20, "{arguments}: {rest:?}");
    }
}

#[test]
fn bad_input_is_told_from_bad_usage() {
    let place = tempfile::tempdir().expect("make a directory");
    let empty = place.path().to_str().unwrap();
    let output = imgfs(&["ls", empty]);
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(
        stderr(&output),
        format!(
            "imgfs: no image directory at {empty}: expected inventory.img in it or in one of its \
             directories\n  help: give the directory of a dump (`rcriu dump -D`), or one that holds \
             such directories\n"
        )
    );
    let missing = imgfs(&["ls", &format!("{empty}/none")]);
    assert!(stderr(&missing).contains("/none: No such file"), "{}", stderr(&missing));
    assert!(stderr(&missing).contains("\n  help: give an image directory"), "{}", stderr(&missing));
    assert_eq!(imgfs(&["ls"]).status.code(), Some(2));
    assert_eq!(imgfs(&["no-such-command"]).status.code(), Some(2));
    assert_eq!(imgfs(&["--help"]).status.code(), Some(0));
    copy(place.path());
    let chain = place.path().join("chain");
    fs::remove_file(chain.join("3/parent")).unwrap();
    let output = imgfs(&["flatten", chain.to_str().unwrap(), &format!("{empty}/out")]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("several tips: 2, 3\n  help: choose one with"));
    assert!(!place.path().join("out").exists());
}
