//! Chains on disk against a naive model of them.

use std::{
    fs::{self, File},
    os::unix::fs::symlink,
    sync::Arc,
};

use proptest::prelude::*;

use super::{
    testing::{MEMORY, Model, PAGES, TestChain, entry, layers, on_disk, page},
    *,
};
use crate::{
    image::{Directory, ImageWriter, Kind, MemoryId, Presence, proto},
    units::{PAGE_SIZE, PageIndex},
};

/// Returns the bytes of one page; `None` if it is in no image.
fn modelled(model: &Model, number: u64) -> Option<Vec<u8>> {
    match model.get(&number) {
        None => Some(vec![0; usize::try_from(PAGE_SIZE).unwrap()]),
        Some(None) => None,
        Some(Some(layer)) => Some(page(*layer, number)),
    }
}

fn read(content: &dyn Content, offset: u64, len: usize) -> Result<Vec<u8>> {
    let mut buffer = vec![0xee; len];
    let read = read_at(content, offset, &mut buffer)?;
    buffer.truncate(read);
    Ok(buffer)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn every_page_of_every_snapshot_is_what_the_model_says(
        layers in layers(),
        ranges in prop::collection::vec((0..PAGES * PAGE_SIZE, 1..100_000_usize), 20),
    ) {
        let (disk, models) = on_disk(&layers);
        let chain = Arc::new(disk.open());
        for (id, model) in chain.ids().zip(&models) {
            let index = chain.index(id, MEMORY).unwrap();
            let memory = MemoryBytes::new(Arc::clone(&chain), Arc::clone(&index), PAGES * PAGE_SIZE);
            let mut flat = Vec::new();
            for number in 0..PAGES {
                let expected = modelled(model, number);
                prop_assert_eq!(index.find(PageIndex(number)).is_some(), model.contains_key(&number));
                let found = read(&memory, number * PAGE_SIZE, 4096);
                prop_assert_eq!(found.as_ref().ok(), expected.as_ref());
                if model.get(&number).is_some_and(Option::is_some) {
                    flat.extend(expected.unwrap());
                }
            }
            let pages = FlatPages::new(Arc::clone(&chain), index);
            prop_assert_eq!(pages.len(), flat.len() as u64);
            prop_assert_eq!(&read(&pages, 0, flat.len()).unwrap(), &flat);
            for (offset, len) in &ranges {
                let start = usize::try_from(*offset).unwrap().min(flat.len());
                let end = (start + len).min(flat.len());
                prop_assert_eq!(&read(&pages, *offset, *len).unwrap(), &flat[start..end]);
            }
        }
    }

    #[test]
    fn a_broken_chain_shows_what_is_above_the_break(
        layers in layers(),
        at in any::<prop::sample::Index>(),
        how in 0..5_u8,
    ) {
        let (disk, models) = on_disk(&layers);
        // Layers from this one up are intact.
        let intact = 1 + at.index(layers.len());
        if intact == 1 {
            return Ok(());
        }
        let pagemap = disk.dir(intact - 1).join(MEMORY.pagemap_name());
        let link = disk.dir(intact).join("parent");
        match how {
            0 => fs::remove_file(link).unwrap(),
            1 => fs::remove_dir_all(disk.dir(intact - 1)).unwrap(),
            2 => fs::remove_file(pagemap).unwrap(),
            3 => {
                let bytes = fs::read(&pagemap).unwrap();
                fs::write(&pagemap, &bytes[..bytes.len() - 1]).unwrap();
            }
            _ => {
                let inventory = disk.dir(intact - 1).join("inventory.img");
                fs::remove_file(&inventory).unwrap();
                let mut image = ImageWriter::create(&inventory, Kind::Inventory).unwrap();
                let unknown = proto::InventoryEntry { img_version: 99, ..Default::default() };
                image.message(&unknown).unwrap();
                image.finish().unwrap();
            }
        }
        let chain = Arc::new(Chain::open(&disk.dir(layers.len())).unwrap());
        let tip = chain.choose(None).unwrap();
        let model = &models[layers.len() - 1];
        let index = chain.readable_index(tip, MEMORY).unwrap();
        let below = |page: u64| matches!(model.get(&page), Some(Some(layer)) if *layer < intact);
        let lacks = (0..PAGES).any(below);
        // An absent page is in no image, and it may be a lower layer that says so.
        if lacks {
            prop_assert!(chain.index(tip, MEMORY).is_err());
            prop_assert!(chain.first_gap().is_some());
        }
        let memory = MemoryBytes::new(Arc::clone(&chain), index, PAGES * PAGE_SIZE);
        for number in 0..PAGES {
            let expected = if below(number) { None } else { modelled(model, number) };
            let found = read(&memory, number * PAGE_SIZE, 4096);
            prop_assert_eq!(found.ok(), expected, "page {}", number);
        }
    }

    #[test]
    fn differences_are_those_of_the_models(layers in layers()) {
        let (disk, models) = on_disk(&layers);
        let chain = disk.open();
        let (first, last) = (SnapshotId::at(0), SnapshotId::at(models.len() - 1));
        let (a, b) = (&models[0], &models[models.len() - 1]);
        let pages = (0..PAGES).map(|number| (number, modelled(a, number), modelled(b, number)));
        let unknown = |a: &Option<Vec<u8>>, b: &Option<Vec<u8>>| a.is_none() != b.is_none();
        let pages: Vec<_> = pages.collect();
        let found = diff((&chain, first), (&chain, last), &mut |_, _| ());
        let other = disk.open();
        let apart = diff((&chain, first), (&other, last), &mut |_, _| ());
        let pages_of = |diffs: &[MemoryDiff]| -> Vec<_> {
            diffs.iter().map(|diff| diff.differences.clone()).collect()
        };
        prop_assert_eq!(found.as_deref().ok().map(pages_of), apart.as_deref().ok().map(pages_of));
        if pages.iter().any(|(_, a, b)| unknown(a, b)) {
            let absent = matches!(found, Err(ChainError::Absent { .. }));
            prop_assert!(absent);
        } else {
            let expected: Vec<u64> =
                pages.iter().filter(|(_, a, b)| a != b).map(|(number, ..)| *number).collect();
            let numbers = |difference: &Difference| {
                difference.first.0..difference.first.0 + difference.pages
            };
            let found = &found.unwrap()[0];
            let found: Vec<u64> = found.differences.iter().flat_map(numbers).collect();
            prop_assert_eq!(found, expected);
        }
    }

    #[test]
    fn unbroken_chains_have_no_errors(layers in layers()) {
        let (disk, models) = on_disk(&layers);
        let chain = disk.open();
        let errors = check(&chain, |_| true, &mut |_, _| ()).unwrap();
        let lost = errors.iter().filter(|finding| finding.problem.contains(" in no image"));
        let expected = layers.iter().flatten().any(|entry| entry.presence == Presence::Absent);
        prop_assert_eq!(lost.count() > 0, expected);
        let other = errors.iter().find(|finding| {
            !finding.problem.contains(" in no image") && !finding.problem.starts_with("and ")
        });
        prop_assert!(other.is_none(), "{}", other.unwrap());
        let summary = Summary::of(&chain, SnapshotId::at(models.len() - 1)).unwrap();
        let model = &models[models.len() - 1];
        let stored = model.values().flatten().count() as u64;
        let nowhere = model.len() as u64 - stored;
        let counts = summary.shared;
        prop_assert_eq!(counts.present + counts.in_parent + counts.absent, stored + nowhere);
    }
}

/// Two layers: the base has pages 0 to 9, the tip changed page 5 and keeps the
/// others.
fn two_layers() -> TestChain {
    let mut chain = TestChain::new();
    chain.push(&[entry(0, 10, Presence::Present)]);
    chain.push(&[
        entry(0, 5, Presence::Parent),
        entry(5, 1, Presence::Present),
        entry(6, 4, Presence::Parent),
    ]);
    chain
}

/// Returns what the index of the tip and `check` say.
fn problems(disk: &TestChain) -> (Result<()>, String) {
    let chain = disk.open();
    let tip = chain.choose(None).unwrap();
    let findings = check(&chain, |_| true, &mut |_, _| ()).unwrap();
    let lines: Vec<String> = findings.iter().map(ToString::to_string).collect();
    let root = disk.root.path().canonicalize().unwrap();
    let lines = lines.join("\n").replace(&format!("{}/", root.display()), "");
    (chain.index(tip, MEMORY).map(|_| ()), lines)
}

#[test]
fn a_whole_chain_has_nothing_wrong() {
    let (index, found) = problems(&two_layers());
    index.unwrap();
    assert_eq!(found, "");
}

#[test]
fn pages_that_the_parent_does_not_have_are_named() {
    let mut disk = two_layers();
    disk.push(&[entry(8, 4, Presence::Parent)]);
    let (index, found) = problems(&disk);
    let error = index.unwrap_err().to_string();
    assert!(
        error.contains("shmem 1024 at 0xa000: 2 pages are in the parent according to the pagemap"),
        "{error}"
    );
    assert!(error.contains("2/pagemap-shmem-1024.img has no entry for that page"), "{error}");
    assert!(found.starts_with(
        "error: 3: shmem 1024 at 0xa000: 2 pages are in the parent according to the pagemap"
    ));
    // A newer layer that has the pages does not miss them.
    disk.push(&[entry(8, 2, Presence::Parent), entry(10, 2, Presence::Present)]);
    problems(&disk).0.unwrap();
}

#[test]
fn a_base_that_asks_a_parent_it_does_not_have_is_named() {
    let disk = two_layers();
    fs::remove_file(disk.dir(2).join("parent")).unwrap();
    let chain = Chain::open(&disk.dir(2)).unwrap();
    let error = chain.index(chain.choose(None).unwrap(), MEMORY).unwrap_err().to_string();
    assert!(error.ends_with(
        "shmem 1024 at 0x0: 5 pages are in the parent according to the pagemap, but it has no parent"
    ));
    symlink("../gone", disk.dir(2).join("parent")).unwrap();
    let chain = Chain::open(&disk.dir(2)).unwrap();
    let error = chain.index(chain.choose(None).unwrap(), MEMORY).unwrap_err();
    assert!(matches!(error, ChainError::Link(LinkError::Dangling { .. })));
}

#[test]
fn a_parent_without_the_memory_is_named() {
    let disk = two_layers();
    fs::remove_file(disk.dir(1).join(MEMORY.pagemap_name())).unwrap();
    let (index, found) = problems(&disk);
    assert!(index.unwrap_err().to_string().contains("1/pagemap-shmem-1024.img has no entry"));
    assert_eq!(found.matches("has no entry for them").count(), 2, "{found}");
    assert!(found.contains("note: 1: no pagemap claims pages-7.img"));
}

#[test]
fn a_pages_file_that_is_cut_short_is_an_error_where_it_is_cut() {
    let disk = two_layers();
    let pages = File::options().write(true).open(disk.dir(1).join("pages-7.img")).unwrap();
    pages.set_len(8 * PAGE_SIZE + 100).unwrap();
    let (index, found) = problems(&disk);
    index.unwrap();
    assert_eq!(
        found,
        "error: 1: shmem 1024 at 0x8000: pages-7.img is cut short: it has 32868 bytes, expected 40960"
    );
    let chain = Arc::new(disk.open());
    let index = chain.index(chain.choose(None).unwrap(), MEMORY).unwrap();
    let memory = MemoryBytes::new(Arc::clone(&chain), index, 10 * PAGE_SIZE);
    assert_eq!(read(&memory, 0, 4096).unwrap(), page(1, 0));
    assert_eq!(read(&memory, 5 * PAGE_SIZE, 4096).unwrap(), page(2, 5));
    let error = read(&memory, 8 * PAGE_SIZE, 4096).unwrap_err();
    assert!(matches!(error, ChainError::Truncated { offset, .. } if offset >= 8 * PAGE_SIZE));
}

#[test]
fn files_that_vanish_or_are_replaced_are_errors() {
    let disk = two_layers();
    let chain = Arc::new(disk.open());
    let index = chain.index(chain.choose(None).unwrap(), MEMORY).unwrap();
    let memory = MemoryBytes::new(Arc::clone(&chain), index, 10 * PAGE_SIZE);
    assert!(read(&memory, 5 * PAGE_SIZE, 4096).is_ok());
    fs::remove_file(disk.dir(1).join("pages-7.img")).unwrap();
    assert!(matches!(read(&memory, 0, 4096), Err(ChainError::Open { .. })));
    // The tip's file is still open; a fresh look at the chain meets another one.
    let tip = disk.dir(2).join("pages-7.img");
    assert!(read(&memory, 5 * PAGE_SIZE, 4096).is_ok());
    let files = Files::new(std::num::NonZeroUsize::MIN);
    let images = Directory::at(disk.dir(2)).shared();
    let (kept, other) = (files.enter_path(&tip), files.enter(&images, "inventory.img"));
    assert_eq!(files.enter(&images, "pages-7.img"), kept);
    files.get(kept).unwrap();
    files.get(other).unwrap();
    assert_eq!(files.open_count(), 1);
    fs::rename(&tip, disk.dir(2).join("old")).unwrap();
    fs::write(&tip, page(3, 0)).unwrap();
    assert!(matches!(files.get(kept), Err(ChainError::Replaced { .. })));
}

#[test]
fn holes_unclaimed_files_and_claims_that_meet_are_told() {
    let disk = two_layers();
    let pages = disk.dir(1).join("pages-7.img");
    fs::remove_file(&pages).unwrap();
    File::create(&pages).unwrap().set_len(10 * PAGE_SIZE).unwrap();
    disk.memory(2, MemoryId::Private(5), 9, &[entry(1, 1, Presence::Present)]);
    disk.memory(2, MemoryId::Private(6), 9, &[entry(1, 2, Presence::Present)]);
    fs::write(disk.dir(2).join("pages-12.img"), "").unwrap();
    let (_, found) = problems(&disk);
    let expected = [
        "note: 1: shmem 1024 at 0x0: 10 pages are holes in pages-7.img, which read as zero",
        "error: 2: pid 5: pages-9.img has 8192 bytes, its pagemap accounts for 4096 only",
        "error: 2: pid 6: pid 5 claims pages-9.img as well",
        "note: 2: no pagemap claims pages-12.img",
    ];
    for (line, expected) in found.lines().zip(expected) {
        assert!(line.starts_with(expected), "{line}");
    }
    assert_eq!(found.lines().count(), expected.len(), "{found}");
}

#[test]
fn directories_without_inventory_are_unfinished_dumps() {
    let disk = two_layers();
    fs::create_dir(disk.dir(3)).unwrap();
    fs::write(disk.dir(3).join("core-1.img"), "").unwrap();
    fs::create_dir(disk.dir(4)).unwrap();
    let (_, found) = problems(&disk);
    assert_eq!(
        found,
        "error: 3: it holds images but no inventory.img: a dump that was not finished"
    );
}

#[test]
fn a_deep_chain_is_read_with_few_open_files() {
    let mut disk = TestChain::new();
    disk.push(&[entry(0, 2000, Presence::Present)]);
    for layer in 1..1000 {
        let others = [entry(0, layer, Presence::Parent), entry(layer, 1, Presence::Present)];
        disk.push(&[others[0], others[1], entry(layer + 1, 1999 - layer, Presence::Parent)]);
    }
    let chain = Arc::new(disk.open());
    let index = chain.index(chain.choose(None).unwrap(), MEMORY).unwrap();
    assert_eq!(index.extents().len(), 1001);
    let memory = MemoryBytes::new(Arc::clone(&chain), index, 2000 * PAGE_SIZE);
    let whole = read(&memory, 0, 2000 * 4096).unwrap();
    for (number, found) in (0..).zip(whole.chunks(4096)) {
        let layer = if (1..1000).contains(&number) { number + 1 } else { 1 };
        assert_eq!(found, page(layer, number as u64), "page {number}");
    }
    let few = Files::new(std::num::NonZeroUsize::new(16).unwrap());
    for layer in 1..100 {
        few.get(few.enter_path(&disk.dir(layer).join("pages-7.img"))).unwrap();
    }
    assert_eq!(few.open_count(), 16);
}

#[test]
fn a_chain_need_not_be_in_directories() {
    let disk = two_layers();
    let chain = Arc::new(Chain::of(disk.in_memory()));
    let tip = chain.choose(None).unwrap();
    assert_eq!(chain.snapshot(tip).name, "memory:2");
    assert_eq!(chain.snapshot(chain.base(tip)).path().to_str(), Some("memory:1"));
    let bytes = |chain: &Arc<Chain>| {
        let index = chain.index(chain.choose(None).unwrap(), MEMORY).unwrap();
        let memory = MemoryBytes::new(Arc::clone(chain), index, 10 * PAGE_SIZE);
        read(&memory, 0, 10 * 4096).unwrap()
    };
    assert_eq!(bytes(&chain), bytes(&Arc::new(disk.open())));
    assert_eq!(
        check(&chain, |_| true, &mut |_, _| ()).unwrap().len(),
        check(&disk.open(), |_| true, &mut |_, _| ()).unwrap().len()
    );
    Summary::of(&chain, tip).unwrap();
    // What cannot be done there is refused by name.
    let index = chain.index(tip, MEMORY).unwrap();
    let disk = Arc::new(crate::image::disk::Kernel);
    let error = Freeing::new(Arc::clone(&chain), disk).prepare_all(&index).unwrap_err();
    assert!(error.to_string().contains("memory:"), "{error}");
    assert!(matches!(error, ChainError::ReadOnly { .. }));
}
