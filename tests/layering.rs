//! Which modules may use which: a wrong arrow fails.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

/// Each module of the library with those that it may use besides itself.
const ARROWS: &[(&str, &[&str])] = &[
    ("units", &[]),
    ("proto", &[]),
    ("arch", &["proto", "units"]),
    ("sys", &["arch", "units", "fault"]),
    ("image", &["causes", "parallel", "arch", "proto", "units"]),
    ("chain", &["causes", "parallel", "image", "units", "fault"]),
    ("view", &["chain", "image", "arch", "units"]),
    ("fs", &["causes", "view", "chain", "image", "proc", "sys", "units", "fault"]),
    ("fault", &[]),
    ("causes", &[]),
    ("docs", &[]),
    ("parallel", &[]),
    ("action", &["causes", "units"]),
    ("proc", &["units"]),
    ("inject", &["causes", "sys", "arch", "proc", "units", "fault"]),
    ("track", &["causes", "inject", "proc", "sys", "units"]),
    ("res", &["causes", "inject", "proc", "sys", "arch", "image", "units", "fault"]),
    ("pages", &["parallel", "track", "proc", "chain", "image", "sys", "units", "fault"]),
    ("lazy", &["causes", "parallel", "proc", "chain", "image", "res", "sys", "units", "fault"]),
    ("dedup", &["parallel", "chain", "image", "sys", "units", "fault"]),
    ("page_server", &["pages", "chain", "image", "sys", "units", "fault"]),
    (
        "step",
        &[
            "action", "res", "track", "inject", "proc", "chain", "arch", "image", "sys", "units",
            "fault",
        ],
    ),
    (
        "dump",
        &[
            "causes", "action", "step", "dedup", "lazy", "pages", "res", "track", "inject", "proc",
            "chain", "arch", "image", "sys", "units", "fault",
        ],
    ),
    (
        "restore",
        &[
            "causes", "parallel", "action", "step", "lazy", "pages", "res", "track", "inject",
            "proc", "chain", "arch", "image", "sys", "units", "fault",
        ],
    ),
    (
        "cli",
        &[
            "causes",
            "action",
            "step",
            "dump",
            "inject",
            "lazy",
            "restore",
            "dedup",
            "page_server",
            "pages",
            "res",
            "track",
            "proc",
            "fs",
            "view",
            "chain",
            "image",
            "sys",
            "proto",
            "units",
            "fault",
        ],
    ),
    ("design", &[]),
    ("docs", &[]),
];

/// A module of the library's tests, which all of them may use.
const OF_TESTS: &str = "skip";

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
            if used != module && used != OF_TESTS && !allowed.contains(&used.as_str()) {
                wrong.push(format!("{} uses {used}", file.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Takes a tree of `use` apart: `a::{b, c::D}` is `a::b` and `a::c::D`. Returns the paths, and
/// how many bytes the tree has.
fn expand(tree: &str) -> (Vec<Vec<String>>, usize) {
    let mut path = Vec::new();
    let mut at = 0;
    loop {
        let rest = &tree[at..];
        if let Some(list) = rest.strip_prefix('{') {
            let mut found = Vec::new();
            let mut inside = 0;
            while let Some(item) = list.get(inside..).filter(|item| !item.starts_with('}')) {
                if item.is_empty() {
                    break;
                }
                let (paths, len) = expand(item);
                found.extend(paths.into_iter().map(|tail| [path.clone(), tail].concat()));
                inside += len.max(1);
            }
            return (found, at + inside + 2);
        }
        let word: String = rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
        at += word.len();
        if word.is_empty() {
            return (if path.is_empty() { Vec::new() } else { vec![path] }, at);
        }
        path.push(word);
        match tree[at..].strip_prefix("::") {
            Some(_) => at += 2,
            None => return (vec![path], at),
        }
    }
}

/// A module below `src/res/file`, as a path: `sock/unix/peer`.
type Inner = Vec<String>;

/// Returns the modules of `src/res/file` with those that each uses. A folder's `mod.rs` is what
/// the modules in it share, and the row that names them.
fn file_modules(root: &Path) -> BTreeMap<Inner, BTreeSet<Inner>> {
    let mut files = Vec::new();
    sources(root, &mut files);
    let mut texts: BTreeMap<Inner, String> = BTreeMap::new();
    for file in files {
        let name = file.file_stem().unwrap().to_str().unwrap().to_owned();
        let inside = file.parent().unwrap().strip_prefix(root).unwrap();
        let mut module: Inner =
            inside.iter().map(|part| part.to_str().unwrap().to_owned()).collect();
        match name.as_str() {
            "tests" | "testing" => continue,
            "mod" => {}
            _ => module.push(name),
        }
        let text = fs::read_to_string(&file).unwrap();
        let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap();
        let code = code.lines().filter(|line| !line.trim_start().starts_with("//"));
        // Without white space, but for that between words.
        let code = code.collect::<Vec<_>>().join("\n").replace(",\n", ",");
        let code: String = code.split_whitespace().collect::<Vec<_>>().join(" ");
        let code = code.replace("{ ", "{").replace(", ", ",").replace(" }", "}");
        texts.insert(module, code);
    }
    let folders: BTreeSet<Inner> =
        texts.keys().filter(|module| root.join(module.join("/")).is_dir()).cloned().collect();
    let home = ["res", "file"].map(str::to_owned);
    let mut uses = BTreeMap::new();
    for (module, code) in texts.iter().filter(|(module, _)| !module.is_empty()) {
        let mut used = BTreeSet::new();
        let own = if folders.contains(module) { module.clone() } else { parent(module) };
        let above = |levels: usize| module[..module.len().saturating_sub(levels)].to_vec();
        let bases = [
            ("super::super::", above(2)),
            ("super::", above(1)),
            ("self::", own),
            ("crate::", Inner::new()),
        ];
        for (prefix, base) in bases {
            for (at, _) in code.match_indices(prefix) {
                let before = code[..at].chars().next_back();
                if before.is_some_and(|c| c == ':' || c.is_alphanumeric()) {
                    continue;
                }
                for path in expand(&code[at + prefix.len()..]).0 {
                    let full = [base.clone(), path].concat();
                    let full = match (prefix, full.strip_prefix(&home[..])) {
                        ("crate::", Some(inside)) => inside.to_vec(),
                        ("crate::", None) => continue,
                        _ => full,
                    };
                    // The longest beginning of the path that is a module.
                    let found = (1..=full.len()).rev().map(|len| full[..len].to_vec());
                    used.extend(found.into_iter().find(|found| texts.contains_key(found)));
                }
            }
        }
        // What is in a folder stands on its `mod.rs`.
        used.retain(|other| !other.starts_with(module) && !module.starts_with(other));
        uses.insert(module.clone(), used);
    }
    uses
}

fn parent(module: &Inner) -> Inner {
    module[..module.len() - 1].to_vec()
}

#[test]
fn trees_of_paths_are_taken_apart() {
    let (found, _) = expand("{a,b::{self,C},d::E::{f,G}};");
    let found: Vec<String> = found.iter().map(|path| path.join("::")).collect();
    assert_eq!(found, ["a", "b::self", "b::C", "d::E::f", "d::E::G"]);
}

#[test]
fn modules_of_open_files_use_each_other_in_no_circle() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/res/file");
    let mut left = file_modules(&src);
    let sock = |name: &str| vec!["sock".to_owned(), name.to_owned()];
    assert!(left[&sock("queue")].contains(&sock("opts")), "{left:#?}");
    // Those that use none of the others, or that none uses, are taken away, as long as there
    // are any.
    loop {
        let is_used = |module: &Inner| left.values().any(|used| used.contains(module));
        let free: Vec<Inner> = left
            .iter()
            .filter(|(module, used)| {
                !is_used(module) || used.iter().all(|other| !left.contains_key(other))
            })
            .map(|(module, _)| module.clone())
            .collect();
        if free.is_empty() {
            break;
        }
        left.retain(|module, _| !free.contains(module));
    }
    assert!(left.is_empty(), "in a circle: {left:#?}");
}

#[test]
fn no_kind_of_files_uses_another() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/res/file");
    let text = fs::read_to_string(src.join("mod.rs")).unwrap();
    let table = text.split("pub static KINDS").nth(1).expect("the table of kinds");
    let table = table.split('[').nth(2).and_then(|rows| rows.split(']').next()).unwrap();
    let rows = table.split(',').map(str::trim).filter(|row| !row.is_empty());
    let kind = |row: &str| parent(&row.split("::").map(str::to_owned).collect());
    let kinds: BTreeSet<Inner> = rows.map(kind).collect();
    assert!(kinds.len() > 10, "{kinds:?}");
    let kind_of = |module: &Inner| kinds.iter().find(|kind| module.starts_with(kind));
    for (module, used) in file_modules(&src) {
        let Some(own) = kind_of(&module) else { continue };
        let other = used.iter().filter_map(&kind_of).find(|other| *other != own);
        assert!(other.is_none(), "{module:?} uses {other:?}");
    }
}

/// The modules inside a scope that a dump and a restore may name, besides types and functions: they
/// describe memory for all kinds.
const SHARED: [&str; 1] = ["mm::mapping"];

/// Returns the modules of kinds below `src/res`, such as `tree::cgroup`, by scope.
fn kinds_of_scopes(res: &Path) -> BTreeSet<Inner> {
    let mut files = Vec::new();
    sources(res, &mut files);
    let mut found = BTreeSet::new();
    for file in files {
        let inside = file.strip_prefix(res).unwrap().with_extension("");
        let parts: Inner = inside.iter().map(|part| part.to_str().unwrap().to_owned()).collect();
        if parts.len() > 1 && parts[1] != "mod" {
            found.insert(parts[..2].to_vec());
        }
    }
    found
}

/// Returns the paths below `crate::res` that a file names, without its tests.
fn paths_into_res(file: &Path) -> Vec<Inner> {
    let text = fs::read_to_string(file).unwrap();
    let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap();
    let code = code.lines().filter(|line| !line.trim_start().starts_with("//"));
    let code = code.collect::<Vec<_>>().join("\n").replace(",\n", ",");
    let code: String = code.split_whitespace().collect::<Vec<_>>().join(" ");
    let code = code.replace("{ ", "{").replace(", ", ",").replace(" }", "}");
    let paths = code.match_indices("crate::").flat_map(|(at, start)| {
        let (paths, _) = expand(&code[at + start.len()..]);
        paths
    });
    paths.filter_map(|path| Some(path.strip_prefix(&["res".to_owned()][..])?.to_vec())).collect()
}

#[test]
fn a_dump_and_a_restore_know_phases_and_scopes_and_no_kind() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let kinds = kinds_of_scopes(&src.join("res"));
    let kind = |parts: [&str; 2]| parts.map(str::to_owned).to_vec();
    assert!(kinds.contains(&kind(["tree", "stops"])) && kinds.contains(&kind(["file", "tty"])));
    let mut files = Vec::new();
    sources(&src.join("dump"), &mut files);
    sources(&src.join("restore"), &mut files);
    let mut wrong = Vec::new();
    let mut seen = 0;
    for file in files {
        for path in paths_into_res(&file) {
            seen += 1;
            let head = &path[..path.len().min(2)];
            if kinds.contains(head) && !SHARED.contains(&&*head.join("::")) {
                wrong.push(format!("{} uses res::{}", file.display(), path.join("::")));
            }
        }
    }
    assert!(seen > 20, "the paths were not found");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn no_kind_uses_a_kind_of_another_scope() {
    let res = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/res");
    let kinds = kinds_of_scopes(&res);
    let mut wrong = Vec::new();
    for own in kinds.iter().filter(|own| ["task", "thread", "tree", "ns"].contains(&&*own[0])) {
        let mut files = vec![res.join(own.join("/")).with_extension("rs")];
        files.retain(|file| file.exists());
        let folder = res.join(own.join("/"));
        if folder.is_dir() {
            sources(&folder, &mut files);
        }
        for path in files.iter().flat_map(|file| paths_into_res(file)) {
            let head = &path[..path.len().min(2)];
            if kinds.contains(head) && head[0] != own[0] && !SHARED.contains(&&*head.join("::")) {
                wrong.push(format!("res::{} uses res::{}", own.join("::"), path.join("::")));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
