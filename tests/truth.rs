//! What is resolved from a chain that CRIU wrote, against what its dumper saw.
//!
//! The chain and its truth are in `fixtures/criu42-chain`; its README says how
//! they were made.

use std::{fs, os::unix::fs::symlink, path::Path, sync::Arc};

use rcriu::{
    chain::{Chain, Content, read_at},
    view::{AddressSpace, CoreFile, Process, Tables},
};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

const PAGE: usize = 4096;

/// Returns the first 16 hexadecimal digits of the page's hash.
fn prefix(page: &[u8]) -> String {
    Sha256::digest(page)[..8].iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Returns a directory with the same images and with links to the parents,
/// which are in the fixture as files that say where the links lead.
fn linked(chain: &Path) -> TempDir {
    let linked = tempfile::tempdir().unwrap();
    for name in ["1", "2", "3"] {
        let dir = linked.path().join(name);
        fs::create_dir(&dir).unwrap();
        for image in fs::read_dir(chain.join(name)).unwrap() {
            let image = image.unwrap();
            let link = dir.join(image.file_name());
            if image.file_name() == "parent" && image.file_type().unwrap().is_file() {
                symlink(fs::read_to_string(image.path()).unwrap(), link).unwrap();
            } else if image.file_name() == "parent" {
                symlink(fs::read_link(image.path()).unwrap(), link).unwrap();
            } else {
                symlink(image.path(), link).unwrap();
            }
        }
    }
    linked
}

/// Compares every mapping of `pid` that no file is behind; returns how many
/// pages that were.
fn compare(tables: &Arc<Tables>, fixture: &Path, pid: u32) -> usize {
    let process = Arc::new(Process::load(tables, pid).unwrap());
    let space = Arc::new(AddressSpace::new(process));
    let truth = fs::read(fixture.join(format!("truth/mem-{pid}.json"))).unwrap();
    let truth: serde_json::Value = serde_json::from_slice(&truth).unwrap();
    let mut compared = 0;
    for (range, mapping) in truth.as_object().unwrap() {
        let name = mapping["name"].as_str().unwrap();
        if name.starts_with('/') && name != "/dev/zero" {
            continue;
        }
        let (start, end) = range.split_once('-').unwrap();
        let start = u64::from_str_radix(start, 16).unwrap();
        let end = u64::from_str_radix(end, 16).unwrap();
        let mut bytes = vec![0xaa; usize::try_from(end - start).unwrap()];
        assert_eq!(read_at(space.as_ref(), start, &mut bytes).unwrap(), bytes.len());
        let pages = mapping["page_sha8"].as_array().unwrap();
        assert_eq!(pages.len(), bytes.len() / PAGE);
        for (number, (page, expected)) in bytes.chunks(PAGE).zip(pages).enumerate() {
            assert_eq!(
                prefix(page),
                expected.as_str().unwrap(),
                "pid {pid}, {range}, page {number}"
            );
        }
        compared += pages.len();
    }
    assert!(space.allocated() > 0 && space.allocated() < space.len());
    let core = CoreFile::open(space).unwrap();
    let mut bytes = vec![0; usize::try_from(core.len()).unwrap()];
    assert_eq!(read_at(&core, 0, &mut bytes).unwrap(), bytes.len());
    assert!(bytes.starts_with(b"\x7fELF"));
    compared
}

#[test]
fn every_anonymous_page_is_as_it_was_dumped() {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/criu42-chain");
    let linked = linked(&fixture.join("chain"));
    let chain = Arc::new(Chain::open(linked.path()).unwrap());
    let tip = chain.choose(None).unwrap();
    assert_eq!(chain.snapshot(tip).name, "3");
    let tables = Arc::new(Tables::new(chain, tip));
    assert_eq!(compare(&tables, &fixture, 293), 267);
    assert_eq!(compare(&tables, &fixture, 295), 267);
}
