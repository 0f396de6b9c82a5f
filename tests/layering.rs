//! Which modules may use which: a wrong arrow fails.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

/// Each module of the library with those that it may use besides itself.
const ARROWS: &[(&str, &[&str])] = &[
    ("units", &[]),
    ("sys", &["units", "fault"]),
    ("image", &["causes", "units"]),
    ("chain", &["causes", "parallel", "image", "units", "fault"]),
    ("view", &["chain", "image", "units"]),
    ("fs", &["causes", "view", "chain", "image", "proc", "sys", "units"]),
    ("fault", &[]),
    ("causes", &[]),
    ("docs", &[]),
    ("parallel", &[]),
    ("action", &["units"]),
    ("proc", &["units"]),
    ("inject", &["sys", "proc", "units", "fault"]),
    ("res", &["causes", "inject", "proc", "sys", "image", "units", "fault"]),
    ("dedup", &["chain", "image", "sys", "units", "fault"]),
    (
        "dump",
        &[
            "causes", "parallel", "action", "dedup", "res", "inject", "proc", "chain", "image",
            "sys", "units", "fault",
        ],
    ),
    (
        "restore",
        &[
            "causes", "parallel", "action", "res", "inject", "proc", "chain", "image", "sys",
            "units", "fault",
        ],
    ),
    (
        "cli",
        &[
            "causes", "dump", "inject", "restore", "dedup", "res", "proc", "fs", "view", "chain",
            "image", "sys", "units", "fault",
        ],
    ),
    ("design", &[]),
    ("docs", &[]),
];

/// Crates that are used in one module only.
const CONFINED: [(&str, &str); 3] = [("clap", "cli"), ("fuser", "fs"), ("anyhow", "cli")];

fn sources(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

/// Returns the module at the top of the library that a file belongs to.
fn module(src: &Path, file: &Path) -> String {
    let inside = file.strip_prefix(src).unwrap();
    let first = inside.components().next().unwrap().as_os_str().to_str().unwrap();
    first.trim_end_matches(".rs").to_owned()
}

/// Returns the modules that `text` names after `crate::`.
fn uses(text: &str) -> BTreeSet<String> {
    let word = |text: &str| {
        text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>()
    };
    let code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
    let code: String = code.collect::<Vec<_>>().join("\n");
    let mut found = BTreeSet::new();
    for (position, _) in code.match_indices("crate::") {
        let rest = &code[position + "crate::".len()..];
        let Some(list) = rest.strip_prefix('{') else {
            found.insert(word(rest));
            continue;
        };
        // A list of paths: the first word of each item at its top level.
        let (mut depth, mut start) = (0, true);
        for (at, c) in list.char_indices() {
            match c {
                '{' => depth += 1,
                '}' if depth == 0 => break,
                '}' => depth -= 1,
                ',' if depth == 0 => start = true,
                c if start && depth == 0 && c.is_alphabetic() => {
                    found.insert(word(&list[at..]));
                    start = false;
                }
                _ => {}
            }
        }
    }
    found
}

#[test]
fn lists_of_paths_are_taken_apart() {
    let text =
        "use crate::{\n    chain::{self, Content},\n    image::Kind,\n};\nuse crate::units::X;";
    let found: Vec<String> = uses(text).into_iter().collect();
    assert_eq!(found, ["chain", "image", "units"]);
}

#[test]
fn arrows_point_downwards() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    sources(&src, &mut files);
    let mut wrong = Vec::new();
    for file in files {
        let module = module(&src, &file);
        let text = fs::read_to_string(&file).unwrap();
        for (name, home) in CONFINED {
            if module != home && module != "bin" && text.contains(&format!("{name}::")) {
                wrong.push(format!("{} uses {name}, which is for {home}", file.display()));
            }
        }
        if matches!(module.as_str(), "lib" | "bin") {
            continue;
        }
        let (_, allowed) = ARROWS
            .iter()
            .find(|(name, _)| *name == module)
            .unwrap_or_else(|| panic!("src/{module} is not in the table of this test"));
        for used in uses(&text) {
            if used != module && !allowed.contains(&used.as_str()) {
                wrong.push(format!("{} uses {used}", file.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
