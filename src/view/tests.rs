//! Compares the tree with the model of the chain's tests.

use std::{collections::BTreeMap, fs, sync::Arc};

use proptest::prelude::*;

use super::*;
use crate::{
    chain::{
        Chain, read_at,
        testing::{MEMORY, Model, PAGES, TestChain, entry, layers, model, page},
    },
    image::{ImageReader, MemoryId, PagemapReader, Presence, vma},
    units::PAGE_SIZE,
    view::testing::{PID, mapping, process},
};

fn view(disk: &TestChain) -> View {
    let chain = Arc::new(disk.open());
    let tip = chain.choose(None).unwrap();
    View::new(chain, tip)
}

/// Follows a path from the root.
fn find(view: &View, path: &str) -> Result<Attr> {
    let mut attr = view.attr(ROOT)?;
    for name in path.split('/') {
        attr = view.lookup(attr.ino, name)?;
    }
    Ok(attr)
}

fn open(view: &View, path: &str) -> Arc<dyn Content> {
    view.open(find(view, path).unwrap().ino).unwrap().content
}

fn bytes(content: &dyn Content) -> Vec<u8> {
    let mut bytes = vec![0xee; usize::try_from(content.len()).unwrap()];
    assert_eq!(read_at(content, 0, &mut bytes).unwrap(), bytes.len());
    bytes
}

fn names(view: &View, path: &str) -> Vec<String> {
    let ino = if path.is_empty() { ROOT } else { find(view, path).unwrap().ino };
    view.entries(ino).unwrap().1.into_iter().map(|entry| entry.name).collect()
}

/// Two layers: the tip has page 2 itself and pages 0 and 1 in its parent.
fn two_layers() -> TestChain {
    let mut disk = TestChain::new();
    disk.push(&[entry(0, 2, Presence::Present)]);
    disk.push(&[entry(0, 2, Presence::Parent), entry(2, 1, Presence::Present)]);
    disk
}

/// Podman dumps a container into the same directory each time.
#[test]
fn what_earlier_dumps_left_in_the_directory_does_no_harm() {
    let mut disk = TestChain::new();
    disk.push(&[]);
    let stale = [entry(3, 9, Presence::Present)];
    disk.memory(1, MemoryId::Private(6), 1, &stale);
    // The pages file was written anew, for another process, and is shorter.
    disk.memory(1, MemoryId::Private(PID.into()), 1, &[entry(3, 2, Presence::Present)]);
    process(&disk.dir(1), vec![mapping(3, 2, vma::ANON_PRIVATE)]);
    let view = view(&disk);
    assert_eq!(bytes(&*open(&view, "pages-1.img")), [page(1, 3), page(1, 4)].concat());
    let chain = disk.open();
    let findings = crate::chain::check(&chain, |_| true, &mut |_, _| ()).unwrap();
    let of_stale: Vec<_> =
        findings.iter().filter(|found| found.memory == Some(MemoryId::Private(6))).collect();
    let [found] = of_stale[..] else { panic!("{of_stale:?}") };
    assert_eq!(found.severity, crate::chain::Severity::Note);
    assert!(found.problem.contains("left over"), "{found}");
    assert!(!findings.iter().any(|found| found.problem.contains("pages-1.img")), "{findings:?}");
    let glance = crate::chain::glance(&chain, chain.choose(None).unwrap());
    assert!(!glance.problems.iter().any(|problem| problem.contains("pages-1")), "{glance:?}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn every_snapshot_is_shown_flat(layers in layers()) {
        let mut disk = TestChain::new();
        let mut models: Vec<Model> = Vec::new();
        for entries in &layers {
            let layer = disk.push(entries);
            let below = models.last().cloned().unwrap_or_default();
            models.push(model(layer, entries, &below));
        }
        let view = view(&disk);
        for (number, model) in (1..).zip(&models) {
            let root = format!("snapshots/{number}");
            // The pagemap has the same pages as the model.
            let pagemap = bytes(&*open(&view, &format!("{root}/pagemap-shmem-1024.img")));
            let name = MEMORY.pagemap_name();
            let image = ImageReader::new(name.as_ref(), pagemap.as_slice()).unwrap();
            let mut shown = BTreeMap::new();
            for entry in PagemapReader::new(image).unwrap() {
                let entry = entry.unwrap();
                for page in entry.first.0..entry.end().0 {
                    shown.insert(page, entry.presence);
                }
            }
            let expected = model.iter().map(|(page, layer)| {
                (*page, if layer.is_some() { Presence::Present } else { Presence::Absent })
            });
            prop_assert_eq!(shown, expected.collect());
            // The pages file has them in order.
            let stored = model.iter().filter_map(|(number, layer)| Some(page((*layer)?, *number)));
            let flat: Vec<u8> = stored.flatten().collect();
            let attr = find(&view, &format!("{root}/pages-7.img")).unwrap();
            prop_assert_eq!((attr.size, attr.blocks * 512), (flat.len() as u64, flat.len() as u64));
            prop_assert_eq!(bytes(&*open(&view, &format!("{root}/pages-7.img"))), flat);
            // There are holes where the memory has no pages.
            let shmem = open(&view, &format!("{root}/shmem/1024"));
            for number in 0..PAGES + 1 {
                let offset = number * PAGE_SIZE + 1;
                let len = shmem.len();
                let found = |whence| seek(&*shmem, offset, whence).unwrap();
                let later = |data: bool| {
                    let mut pages = number..len.div_ceil(PAGE_SIZE);
                    let next = pages.find(|page| model.contains_key(page) == data);
                    next.map(|page| (page * PAGE_SIZE).max(offset))
                };
                let end = (offset < len).then_some(len);
                prop_assert_eq!(found(Whence::Data), later(true));
                prop_assert_eq!(found(Whence::Hole), later(false).or(end));
            }
        }
    }
}

#[test]
fn parts_of_the_tree_are_left_out() {
    let disk = two_layers();
    let view = || View::new(Arc::new(disk.open()), disk.open().ids().last().unwrap());
    let text = |view: &View| String::from_utf8(view.readme()).unwrap();
    let all = view();
    assert!(text(&all).contains("\nproc/ ") && text(&all).contains("\nsnapshots/ "));
    let part = view().without([Part::Proc, Part::Shmem, Part::Core, Part::Json]);
    assert_eq!(
        names(&part, ""),
        [
            "README",
            "files",
            "inventory.img",
            "mem",
            "pagemap-shmem-1024.img",
            "pages-7.img",
            "snapshots"
        ]
    );
    assert!(!text(&part).contains("\nproc/ ") && text(&part).contains("\nmem/ "));
    assert!(text(&all).contains("\n                This is 2, made on 1. What"));
    assert!(text(&all).contains(" diff -rq snapshots/1/mem snapshots/2/mem\n"));
    assert!(!names(&part, "snapshots/1").iter().any(|name| name == "proc"));
    // The user may paste the lines into a shell.
    fs::rename(disk.dir(1), disk.root.path().join("1;reboot")).unwrap();
    fs::remove_file(disk.dir(2).join("parent")).unwrap();
    std::os::unix::fs::symlink("../1;reboot", disk.dir(2).join("parent")).unwrap();
    let last = View::new(Arc::new(disk.open()), disk.open().ids().last().unwrap());
    assert!(text(&last).contains("\nsnapshots/ ") && !text(&last).contains("reboot"));
    // A file of the snapshot's own is shown in place of ours.
    fs::write(disk.dir(2).join("README"), "theirs").unwrap();
    let view = view();
    let readme = view.open(view.lookup(ROOT, "README").unwrap().ino).unwrap();
    assert_eq!(readme.content.len(), 6);
}

#[test]
fn the_root_is_an_image_directory_without_a_parent() {
    let disk = two_layers();
    fs::write(disk.dir(2).join("stats-dump"), "12345678").unwrap();
    fs::create_dir(disk.dir(2).join("work")).unwrap();
    let view = view(&disk);
    assert_eq!(
        names(&view, ""),
        [
            "README",
            "core",
            "files",
            "inventory.img",
            "json",
            "mem",
            "pagemap-shmem-1024.img",
            "pages-7.img",
            "proc",
            "shmem",
            "shmem-by-name",
            "shmem-by-process",
            "snapshots",
            "stats-dump",
        ]
    );
    assert_eq!(names(&view, "snapshots"), ["1", "2"]);
    assert_eq!(
        names(&view, "json"),
        ["inventory.img.json", "pagemap-shmem-1024.img.json", "stats-dump.json"]
    );
    assert!(!names(&view, "snapshots/1").contains(&"snapshots".to_owned()));
    let pagemap =
        String::from_utf8(bytes(&*open(&view, "json/pagemap-shmem-1024.img.json"))).unwrap();
    assert!(pagemap.contains("PE_PRESENT") && !pagemap.contains("PE_PARENT"), "{pagemap}");
}

#[test]
fn files_that_are_one_file_on_disk_say_so() {
    let disk = two_layers();
    let view = view(&disk);
    let whole = |path: &str| view.open(find(&view, path).unwrap().ino).unwrap().whole.is_some();
    assert!(whole("inventory.img"));
    assert!(whole("snapshots/1/pages-7.img"));
    assert!(!whole("pages-7.img"));
    // A pages file with more pages than its pagemap is not shown as a whole.
    let pages = disk.dir(1).join("pages-7.img");
    fs::OpenOptions::new().write(true).open(pages).unwrap().set_len(3 * PAGE_SIZE).unwrap();
    assert!(!whole("snapshots/1/pages-7.img"));
}

#[test]
fn holes_of_backing_files_take_no_room() {
    let disk = two_layers();
    let pages = disk.dir(1).join("pages-7.img");
    fs::remove_file(&pages).unwrap();
    let sparse = fs::File::create(&pages).unwrap();
    sparse.set_len(2 * PAGE_SIZE).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&sparse, &page(1, 1), PAGE_SIZE).unwrap();
    let view = view(&disk);
    for path in ["pages-7.img", "shmem/1024"] {
        let attr = find(&view, path).unwrap();
        assert_eq!((attr.size, attr.blocks * 512), (3 * PAGE_SIZE, 2 * PAGE_SIZE), "{path}");
        let content = open(&view, path);
        assert_eq!(seek(&*content, 0, Whence::Data).unwrap(), Some(PAGE_SIZE));
        assert_eq!(seek(&*content, PAGE_SIZE, Whence::Hole).unwrap(), Some(3 * PAGE_SIZE));
    }
}

#[test]
fn numbers_and_attributes_stay_the_same() {
    let disk = two_layers();
    let (first, second) = (view(&disk), view(&disk));
    // The order of look-ups makes no difference.
    find(&second, "snapshots/1/shmem/1024").unwrap();
    let paths =
        ["pages-7.img", "shmem", "shmem/1024", "snapshots/1/shmem/1024", "json/inventory.img.json"];
    let mut inos = Vec::new();
    for path in paths {
        let (a, b) = (find(&first, path).unwrap(), find(&second, path).unwrap());
        assert_eq!(a, b);
        assert_eq!(first.attr(a.ino).unwrap(), a);
        inos.push(a.ino);
    }
    inos.sort_unstable();
    inos.dedup();
    assert_eq!(inos.len(), paths.len());
    assert_eq!(first.attr(ROOT).unwrap().nlink, 11);
    let pagemap = fs::metadata(disk.dir(2).join("pagemap-shmem-1024.img")).unwrap();
    let shown = find(&first, "pages-7.img").unwrap();
    assert_eq!(shown.mtime, pagemap.modified().unwrap());
    assert_eq!(shown.mode & 0o222, 0);
}

#[test]
fn what_is_not_there_is_an_error_with_its_name() {
    let disk = two_layers();
    let view = view(&disk);
    let problem = |result: Result<Attr>| result.unwrap_err().to_string();
    assert_eq!(problem(find(&view, "nothing")), "/ has no entry \"nothing\"");
    assert_eq!(problem(find(&view, "shmem/7")), "/shmem has no entry \"7\"");
    assert_eq!(problem(find(&view, "inventory.img/x")), "/inventory.img is not a directory");
    assert!(matches!(view.open(ROOT), Err(ViewError::IsADirectory { .. })));
    assert!(matches!(view.attr(12345), Err(ViewError::NoSuchNode { ino: 12345 })));
}

#[test]
fn pages_files_that_two_memories_claim_are_errors() {
    let disk = two_layers();
    disk.memory(2, MemoryId::Private(5), 7, &[entry(1, 1, Presence::Present)]);
    let view = view(&disk);
    let error = find(&view, "pages-7.img").unwrap_err();
    assert!(
        matches!(error, ViewError::Chain(crate::chain::ChainError::SharedPages { .. })),
        "{error}"
    );
}

#[test]
fn a_broken_chain_is_broken_only_where_it_is_needed() {
    let disk = two_layers();
    fs::remove_file(disk.dir(1).join("pagemap-shmem-1024.img")).unwrap();
    let view = view(&disk);
    assert!(find(&view, "inventory.img").is_ok());
    assert!(matches!(find(&view, "pages-7.img"), Err(ViewError::Chain(_))));
    let object = open(&view, "shmem/1024");
    let mut bytes = vec![0; usize::try_from(PAGE_SIZE).unwrap()];
    read_at(&*object, 2 * PAGE_SIZE, &mut bytes).unwrap();
    assert_eq!(bytes, page(2, 2));
    let error = read_at(&*object, PAGE_SIZE, &mut bytes).unwrap_err().to_string();
    assert!(error.contains("1/pagemap-shmem-1024.img has no entry"), "{error}");
    assert!(names(&view, "").contains(&"pages-7.img".to_owned()));
}

#[test]
fn a_flat_copy_is_a_chain_of_its_own_with_the_same_pages() {
    let disk = two_layers();
    let view = view(&disk);
    let place = tempfile::tempdir().unwrap();
    let out = place.path().join("flat");
    let mut told = Vec::new();
    flatten(&view, &out, &mut |done, total| told.push((done, total))).unwrap();
    assert!(told.windows(2).all(|pair| pair[0].0 <= pair[1].0));
    assert!(told.last().is_some_and(|(done, total)| done == total));
    let copy = Chain::open(&out).unwrap();
    assert!(crate::chain::check(&copy, |_| true, &mut |_, _| ()).unwrap().is_empty());
    let tip = copy.choose(None).unwrap();
    assert_eq!(copy.snapshots().len(), 1);
    let copy = View::new(Arc::new(copy), tip);
    assert_eq!(bytes(&*open(&copy, "shmem/1024")), bytes(&*open(&view, "shmem/1024")));
    // A second copy is not written into the first.
    let again = flatten(&view, &out, &mut |_, _| {}).unwrap_err();
    assert!(matches!(again, ViewError::NotEmpty { .. }), "{again}");
    assert!(out.join("inventory.img").exists());
}

#[test]
fn a_flat_copy_that_fails_leaves_nothing() {
    let disk = two_layers();
    let pages = disk.dir(1).join("pages-7.img");
    let view = view(&disk);
    find(&view, "pages-7.img").unwrap();
    fs::OpenOptions::new().write(true).open(pages).unwrap().set_len(PAGE_SIZE).unwrap();
    let place = tempfile::tempdir().unwrap();
    let out = place.path().join("flat");
    assert!(flatten(&view, &out, &mut |_, _| {}).is_err());
    assert!(!out.exists());
}
