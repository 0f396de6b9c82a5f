//! A chain that CRIU wrote, damaged at random: whatever is asked of it is
//! answered or an error, and nothing panics, hangs or takes memory without end.

#[path = "common/look.rs"]
mod look;

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    sync::Arc,
};

use look::look;
use proptest::{prelude::*, sample::Index};
use rcriu::{
    chain::{Chain, check, diff},
    res::file::is_restored,
    view::{ROOT, View, flatten},
};

/// Bytes read of every file, at its beginning and at its end.
const LOOK_BYTES: usize = 64 << 10;

/// What is done to one file.
#[derive(Clone, Debug)]
enum Damage {
    Remove,
    Truncate(Index),
    Overwrite(Index, Vec<u8>),
    Insert(Index, Vec<u8>),
    SwapWith(Index),
}

fn damage() -> impl Strategy<Value = Damage> {
    let bytes = prop_oneof![
        prop::collection::vec(any::<u8>(), 1..8),
        Just(vec![0xff; 4]),
        Just(vec![0xff; 10]),
        Just(vec![0; 16]),
    ];
    prop_oneof![
        1 => Just(Damage::Remove),
        2 => any::<Index>().prop_map(Damage::Truncate),
        6 => (any::<Index>(), bytes.clone()).prop_map(|(at, bytes)| Damage::Overwrite(at, bytes)),
        2 => (any::<Index>(), bytes).prop_map(|(at, bytes)| Damage::Insert(at, bytes)),
        1 => any::<Index>().prop_map(Damage::SwapWith),
    ]
}

/// The fixtures, and the snapshots in them.
const CHAINS: [(&str, &[&str]); 2] =
    [("criu42-chain/chain", &["1", "2", "3"]), ("small/criu3171", &["1", "2"])];

/// Copies a fixture and returns its files.
fn copy((chain, names): (&str, &[&str]), to: &Path) -> Vec<PathBuf> {
    let chain = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(chain);
    let mut files = Vec::new();
    for name in names {
        let dir = to.join(name);
        fs::create_dir(&dir).unwrap();
        for entry in fs::read_dir(chain.join(name)).unwrap() {
            let entry = entry.unwrap();
            let target = dir.join(entry.file_name());
            if entry.file_type().unwrap().is_symlink() {
                symlink(fs::read_link(entry.path()).unwrap(), target).unwrap();
            } else {
                fs::copy(entry.path(), &target).unwrap();
                files.push(target);
            }
        }
    }
    files.sort();
    files
}

fn apply(files: &[PathBuf], file: &Path, damage: &Damage) {
    // An earlier damage may have removed it.
    let Ok(mut bytes) = fs::read(file) else { return };
    let at = |index: &Index| if bytes.is_empty() { 0 } else { index.index(bytes.len()) };
    match damage {
        Damage::Remove => return fs::remove_file(file).unwrap(),
        Damage::Truncate(index) => bytes.truncate(at(index)),
        Damage::Overwrite(index, new) => {
            let start = at(index);
            let end = (start + new.len()).min(bytes.len());
            bytes[start..end].copy_from_slice(&new[..end - start]);
        }
        Damage::Insert(index, new) => {
            let start = at(index);
            bytes.splice(start..start, new.iter().copied());
        }
        Damage::SwapWith(other) => match fs::read(other.get(files)) {
            Ok(other) => bytes = other,
            Err(_) => return,
        },
    }
    fs::write(file, bytes).unwrap();
}

/// No length is believed: a pagemap of 1 TiB, all but its beginning a hole, is an error
/// that names it.
#[test]
fn a_sparse_pagemap_is_an_error_and_takes_no_memory() {
    let root = tempfile::tempdir().unwrap();
    copy(CHAINS[0], root.path());
    let sparse = root.path().join("3/pagemap-293.img");
    fs::File::options().write(true).open(&sparse).unwrap().set_len(1 << 40).unwrap();
    let chain = Chain::open(root.path()).unwrap();
    let ids: Vec<_> = chain.ids().collect();
    let names_it = |problem: String| assert!(problem.contains("3/pagemap-293.img"), "{problem}");
    assert!(
        check(&chain, is_restored, &mut |_, _| ())
            .unwrap()
            .iter()
            .any(|finding| format!("{finding:?}").contains("293"))
    );
    names_it(diff((&chain, ids[0]), (&chain, ids[2]), &mut |_, _| ()).unwrap_err().to_string());
    let chain = Arc::new(chain);
    let view = View::new(Arc::clone(&chain), chain.choose(None).unwrap());
    names_it(flatten(&view, &root.path().join("flat"), &mut |_, _| {}).unwrap_err().to_string());
    look(&view, ROOT, &mut vec![0; LOOK_BYTES]);
}

/// A copy that lacks an image which is there, but is not to be opened, is no copy.
#[test]
fn what_is_no_file_under_an_images_name_is_not_left_out() {
    let root = tempfile::tempdir().unwrap();
    copy(CHAINS[0], root.path());
    let core = root.path().join("3/core-293.img");
    fs::remove_file(&core).unwrap();
    let refused = || {
        let chain = Arc::new(Chain::open(root.path()).unwrap());
        let tip = chain.choose(None).unwrap();
        let view = View::new(chain, tip);
        look(&view, ROOT, &mut vec![0; LOOK_BYTES]);
        let problem = flatten(&view, &root.path().join("flat"), &mut |_, _| {}).unwrap_err();
        assert!(problem.to_string().contains("3/core-293.img"), "{problem}");
        assert!(!root.path().join("flat").exists());
    };
    nix::unistd::mkfifo(&core, nix::sys::stat::Mode::S_IRWXU).unwrap();
    refused();
    fs::remove_file(&core).unwrap();
    symlink("nowhere", &core).unwrap();
    refused();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn a_damaged_chain_is_answered_or_an_error(
        chain in prop::sample::select(&CHAINS[..]),
        damages in prop::collection::vec((any::<Index>(), damage()), 1..4),
    ) {
        let root = tempfile::tempdir().unwrap();
        let files = copy(chain, root.path());
        for (file, damage) in &damages {
            let file: &PathBuf = file.get(&files);
            apply(&files, file, damage);
        }
        look::ask(root.path(), LOOK_BYTES);
    }
}
