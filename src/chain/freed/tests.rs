//! Freed pages against a naive model of them.

use std::{
    collections::{BTreeSet, HashMap},
    fs,
    os::unix::fs::{MetadataExt, symlink},
    path::{Path, PathBuf},
    sync::Mutex,
};

use proptest::prelude::*;

use super::*;
use crate::{
    chain::{
        Content, FlatPages, MemoryBytes, PageCounts, Severity, Summary, check, diff, read_at,
        testing::{MEMORY, PAGES, TestChain, entry, layers, on_disk, page},
    },
    image::{
        Directory, Presence,
        disk::{DiskFile, Kernel},
    },
    units::{BLOCK_BYTES, PageIndex},
};

/// Writes down what is done and does it.
#[derive(Debug, Default)]
struct Recorder(Mutex<Vec<String>>);

impl Recorder {
    fn note(&self, what: &str, path: &Path) {
        let name = path.file_name().unwrap().to_string_lossy();
        self.0.lock().unwrap().push(format!("{what} {name}"));
    }
}

impl Disk for Recorder {
    fn write_at(&self, file: &DiskFile, bytes: &[u8], offset: u64) -> std::io::Result<()> {
        self.note("write", file.path());
        Kernel.write_at(file, bytes, offset)
    }

    fn sync(&self, file: &DiskFile) -> std::io::Result<()> {
        self.note("sync", file.path());
        Kernel.sync(file)
    }

    fn sync_dir(&self, dir: &Path) -> std::io::Result<()> {
        self.note("sync", dir);
        Kernel.sync_dir(dir)
    }

    fn rename(&self, from: &Path, to: &Path) -> std::io::Result<()> {
        self.note("rename", to);
        Kernel.rename(from, to)
    }

    fn punch(&self, file: &DiskFile, range: Range<u64>) -> std::io::Result<()> {
        self.note("punch", file.path());
        Kernel.punch(file, range)
    }
}

/// A disk whose files cannot be punched.
#[derive(Debug)]
struct Plain;

impl Disk for Plain {
    fn punch(&self, _: &DiskFile, _: Range<u64>) -> std::io::Result<()> {
        Err(nix::errno::Errno::EOPNOTSUPP.into())
    }
}

fn three_layers() -> TestChain {
    let mut chain = TestChain::new();
    chain.push(&[entry(0, 20, Presence::Present)]);
    chain.push(&[entry(0, 10, Presence::Parent), entry(10, 10, Presence::Present)]);
    chain.push(&[entry(0, 5, Presence::Present), entry(5, 15, Presence::Parent)]);
    chain
}

fn freeing(chain: &Arc<Chain>) -> Freeing {
    Freeing::new(Arc::clone(chain), Arc::new(Kernel))
}

/// Frees what snapshot `id` finds at `pages` of the memory.
fn free_pages(freeing: &mut Freeing, chain: &Chain, id: SnapshotId, pages: Range<u64>) {
    let index = chain.index(id, MEMORY).unwrap();
    freeing.prepare_all(&index).unwrap();
    for number in pages {
        let extent = index.find(PageIndex(number)).unwrap();
        let Place::Stored { layer, file_page } = extent.place else { continue };
        let at = file_page + (number - extent.first.0);
        freeing.note(MEMORY, &index.layers()[layer as usize], at..at + 1).unwrap();
    }
}

fn blocks(chain: &TestChain, layer: usize) -> u64 {
    fs::metadata(chain.dir(layer).join("pages-7.img")).unwrap().blocks() * BLOCK_BYTES
}

fn text(result: Result<()>) -> String {
    result.unwrap_err().to_string()
}

#[test]
fn pages_are_named_on_disk_before_they_are_freed() {
    let disk = three_layers();
    let chain = Arc::new(disk.open());
    let recorder = Arc::new(Recorder::default());
    let tip = chain.choose(None).unwrap();
    let mut freeing = Freeing::new(Arc::clone(&chain), Arc::clone(&recorder) as Arc<dyn Disk>);
    let index = chain.index(tip, MEMORY).unwrap();
    freeing.prepare_all(&index).unwrap();
    // To find out whether it can be done.
    assert_eq!(recorder.0.lock().unwrap().drain(..).collect::<Vec<_>>(), ["punch pages-7.img"; 3]);
    free_pages(&mut freeing, &chain, tip, 0..1);
    assert_eq!(freeing.noted_pages(), 1);
    assert!(recorder.0.lock().unwrap().is_empty());
    freeing.sync().unwrap();
    let done: Vec<_> = recorder.0.lock().unwrap().drain(..).collect();
    assert_eq!(
        done,
        [
            "write .punched-7.img.unfinished",
            "write .punched-7.img.unfinished",
            "sync .punched-7.img.unfinished",
            "rename punched-7.img",
            "sync 3",
            "write punched-7.img",
            "sync punched-7.img",
            "write punched-7.img",
        ]
    );
    assert_eq!(freeing.free(&mut |_| ()).unwrap(), 1);
    assert_eq!(recorder.0.lock().unwrap().drain(..).collect::<Vec<_>>(), ["punch pages-7.img"]);
    assert_eq!((freeing.noted_pages(), freeing.free(&mut |_| ()).unwrap()), (0, 0));
    assert!(recorder.0.lock().unwrap().is_empty());
}

#[test]
fn room_is_given_back_and_the_bytes_are_gone_at_once_and_later() {
    let disk = three_layers();
    let before: Vec<u64> = (1..=3).map(|layer| blocks(&disk, layer)).collect();
    let chain = Arc::new(disk.open());
    let tip = chain.choose(None).unwrap();
    let index = chain.index(tip, MEMORY).unwrap();
    let memory = MemoryBytes::new(Arc::clone(&chain), Arc::clone(&index), PAGES * PAGE_SIZE);
    let mut freeing = freeing(&chain);
    free_pages(&mut freeing, &chain, tip, 4..12);
    freeing.sync().unwrap();
    assert_eq!(freeing.free(&mut |_| ()).unwrap(), 8);
    let after: Vec<u64> = (1..=3).map(|layer| blocks(&disk, layer)).collect();
    // Pages 5 to 9 are in the first, 10 and 11 in the second, 4 in the third.
    assert_eq!(
        before.iter().zip(&after).map(|(b, a)| (b - a) / PAGE_SIZE).collect::<Vec<_>>(),
        [5, 2, 1]
    );
    let look = |memory: &MemoryBytes| {
        let mut buffer = vec![0; 4096];
        for number in 0..20 {
            let read = read_at(memory, number * PAGE_SIZE, &mut buffer);
            if (4..12).contains(&number) {
                let error = read.unwrap_err().to_string();
                let address = format!("{:#x}", number * PAGE_SIZE);
                assert!(error.contains(&address) && error.contains("pages-7.img"), "{error}");
            } else {
                read.unwrap();
                let layer = if number < 5 {
                    3
                } else if number < 10 {
                    1
                } else {
                    2
                };
                assert_eq!(buffer, page(layer, number));
            }
        }
    };
    look(&memory);
    assert!(text(chain.require_whole(tip)).contains("shmem 1024 from 0x4000 on"));
    let anew = Arc::new(disk.open());
    let index = anew.index(tip, MEMORY).unwrap();
    assert_eq!((index.stored_pages(), index.punched_pages()), (20, 8));
    look(&MemoryBytes::new(Arc::clone(&anew), Arc::clone(&index), PAGES * PAGE_SIZE));
    let flat = FlatPages::new(Arc::clone(&anew), index);
    assert_eq!((flat.len(), flat.allocated()), (20 * PAGE_SIZE, 12 * PAGE_SIZE));
    let error = text(anew.require_whole(tip));
    assert!(
        error.contains("pages of shmem 1024 from 0x4000 on were freed (1 in a row)"),
        "{error}"
    );
    let punched = |layer| Summary::of(&anew, SnapshotId::at(layer)).unwrap().total();
    assert_eq!(punched(0), PageCounts { present: 20, punched: 5, ..Default::default() });
    // The next program that frees takes up the named pages.
    let mut again = Freeing::new(Arc::clone(&anew), Arc::new(Kernel));
    again.prepare_all(&anew.index(tip, MEMORY).unwrap()).unwrap();
    again.sync().unwrap();
    assert_eq!(again.free(&mut |_| ()).unwrap(), 8);
}

#[test]
fn where_files_cannot_be_punched_nothing_is_changed() {
    let disk = three_layers();
    let chain = Arc::new(disk.open());
    let index = chain.index(chain.choose(None).unwrap(), MEMORY).unwrap();
    let mut freeing = Freeing::new(Arc::clone(&chain), Arc::new(Plain));
    let error = text(freeing.prepare_all(&index));
    assert!(error.contains("copy the images to one that can"), "{error}");
    for layer in 1..=3 {
        assert!(!disk.dir(layer).join("punched-7.img").exists());
    }
}

#[test]
fn check_tells_what_is_gone_from_what_was_superseded() {
    let disk = three_layers();
    let chain = Arc::new(disk.open());
    let base = SnapshotId::at(0);
    let mut freeing = freeing(&chain);
    // What the tip has stored anew, and what the second has.
    free_pages(&mut freeing, &chain, base, 0..3);
    free_pages(&mut freeing, &chain, base, 15..20);
    freeing.sync().unwrap();
    freeing.free(&mut |_| ()).unwrap();
    let told = || -> Vec<(Severity, String, String)> {
        let findings = check(&disk.open(), |_| true, &mut |_, _| ()).unwrap();
        let of = |finding: &crate::chain::Finding| {
            let dir = finding.dir.file_name().unwrap().to_string_lossy().into_owned();
            let at = format!("{} {}", dir, finding.first.unwrap());
            (finding.severity, at, finding.problem.clone())
        };
        findings.iter().map(of).collect()
    };
    let found = told();
    let places: Vec<_> = found.iter().map(|(severity, at, _)| (*severity, at.as_str())).collect();
    let note = Severity::Note;
    assert_eq!(places, [(note, "1 0x0"), (note, "1 0xf000"), (note, "2 0x0")], "{found:?}");
    assert!(found.iter().all(|(.., problem)| problem.ends_with("its descendants can")));
    let chain = disk.open();
    chain.require_whole(SnapshotId::at(2)).unwrap();
    chain.require_whole(SnapshotId::at(1)).unwrap_err();

    // And what all of them need.
    let chain = Arc::new(disk.open());
    let mut freeing = self::freeing(&chain);
    free_pages(&mut freeing, &chain, base, 7..9);
    freeing.sync().unwrap();
    let found = told();
    let needed: Vec<_> = found
        .iter()
        .filter(|(.., problem)| problem.ends_with("can no longer be restored"))
        .map(|(severity, at, problem)| {
            assert!(problem.contains("2 pages are gone, freed in"), "{problem}");
            (*severity, at.as_str())
        })
        .collect();
    // As for pages that were superseded, ancestors were given up; the tip was lost.
    let expected = [(note, "1 0x7000"), (note, "2 0x7000"), (Severity::Error, "3 0x7000")];
    assert_eq!(needed, expected);
    assert_eq!(found.len(), 6, "{found:?}");
}

#[test]
fn snapshots_that_share_pages_are_found() {
    let mut disk = TestChain::new();
    disk.push(&[entry(0, 4, Presence::Present)]);
    disk.push(&[entry(0, 4, Presence::Present)]);
    disk.push(&[entry(0, 2, Presence::Parent), entry(2, 2, Presence::Present)]);
    // Two branches beside it: one has all for itself, the other shares a page.
    for (name, entries) in [
        ("apart", vec![entry(0, 2, Presence::Present), entry(2, 2, Presence::Parent)]),
        ("beside", vec![entry(0, 1, Presence::Parent), entry(1, 3, Presence::Present)]),
    ] {
        let layer = disk.push(&entries);
        fs::remove_file(disk.dir(layer).join("parent")).unwrap();
        symlink("../2", disk.dir(layer).join("parent")).unwrap();
        fs::rename(disk.dir(layer), disk.root.path().join(name)).unwrap();
    }
    let chain = disk.open();
    let names = |id: &str| -> Vec<String> {
        let sharing = sharing(&chain, chain.find(id).unwrap()).unwrap();
        sharing.iter().map(|id| chain.snapshot(*id).name.clone()).collect()
    };
    assert_eq!(names("3"), ["2", "beside"]);
    assert_eq!(names("apart"), ["2"]);
    assert_eq!(names("2"), ["3", "apart", "beside"]);
    assert!(names("1").is_empty());
}

/// Forgets what was not synced, as a power cut would, and looks whether what is left
/// names the pages that are freed.
#[derive(Debug, Default)]
struct PowerCut(Mutex<Durable>);

#[derive(Debug, Default)]
struct Durable {
    /// The bytes of files by inode number, as they were when they were synced.
    bytes: HashMap<u64, Vec<u8>>,
    /// Names by directory, as they were when that was synced.
    names: HashMap<PathBuf, HashMap<String, u64>>,
    punches: usize,
}

impl PowerCut {
    /// Returns the pages that the journal of a pages file names on the disk.
    fn named(&self, pages_file: &Path) -> PageRanges {
        let durable = self.0.lock().unwrap();
        let dir = pages_file.parent().unwrap();
        let inode = durable.names.get(dir).and_then(|names| names.get("punched-7.img"));
        let Some(bytes) = inode.and_then(|inode| durable.bytes.get(inode)) else {
            return PageRanges::new();
        };
        let copy = tempfile::tempdir().unwrap();
        let pagemap = MEMORY.pagemap_name();
        for name in [&pagemap, "inventory.img"] {
            fs::copy(dir.join(name), copy.path().join(name)).unwrap();
        }
        fs::write(copy.path().join("punched-7.img"), bytes).unwrap();
        crate::image::punched::read(&Directory::at(copy.path()), &pagemap, 7).unwrap().unwrap()
    }
}

impl Disk for PowerCut {
    fn sync(&self, file: &DiskFile) -> std::io::Result<()> {
        let inode = file.file().metadata()?.ino();
        self.0.lock().unwrap().bytes.insert(inode, fs::read(file.path())?);
        Ok(())
    }

    fn sync_dir(&self, dir: &Path) -> std::io::Result<()> {
        let name = |entry: fs::DirEntry| {
            (entry.file_name().into_string().unwrap(), entry.metadata().unwrap().ino())
        };
        let names = fs::read_dir(dir)?.flatten().map(name).collect();
        self.0.lock().unwrap().names.insert(dir.to_owned(), names);
        Ok(())
    }

    fn punch(&self, file: &DiskFile, range: Range<u64>) -> std::io::Result<()> {
        let pages = range.start / PAGE_SIZE..range.end / PAGE_SIZE;
        // To find out whether it can be done, it is tried behind the end.
        if range.start < file.file().metadata()?.len() {
            let named = self.named(file.path());
            assert_eq!(named.within(pages.clone()).collect::<Vec<_>>(), [pages]);
            self.0.lock().unwrap().punches += 1;
        }
        Kernel.punch(file, range)
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn whatever_is_freed_is_named_by_what_a_power_cut_leaves(
        steps in prop::collection::vec(prop::collection::vec((0..20_u64, 1..5_u64), 1..4), 1..8),
        anew in any::<bool>(),
    ) {
        let disk = three_layers();
        let chain = Arc::new(disk.open());
        let tip = chain.choose(None).unwrap();
        let power_cut = Arc::new(PowerCut::default());
        let make = || Freeing::new(Arc::clone(&chain), Arc::clone(&power_cut) as Arc<dyn Disk>);
        let mut freeing = make();
        for ranges in steps {
            for (first, pages) in ranges {
                let range = first..(first + pages).min(20);
                free_pages(&mut freeing, &chain, tip, range);
            }
            freeing.sync().unwrap();
            freeing.free(&mut |_| ()).unwrap();
            if anew {
                freeing = make();
            }
        }
        prop_assert!(power_cut.0.lock().unwrap().punches > 0);
    }

    #[test]
    fn freed_pages_are_errors_and_all_others_what_they_were(
        layers in layers(),
        steps in prop::collection::vec((0..8_usize, 0..PAGES, 1..30_u64), 1..6),
        live in any::<bool>(),
    ) {
        let (disk, models) = on_disk(&layers);
        let chain = Arc::new(disk.open());
        // Built before anything is freed.
        let before: Vec<_> = chain.ids().map(|id| chain.index(id, MEMORY).unwrap()).collect();
        let mut freeing = freeing(&chain);
        let mut gone: BTreeSet<(usize, u64)> = BTreeSet::new();
        for (who, first, pages) in steps {
            let position = who % models.len();
            let range = first..(first + pages).min(PAGES);
            let held = |number: &u64| matches!(models[position].get(number), Some(Some(_)));
            for number in range.filter(held) {
                free_pages(&mut freeing, &chain, SnapshotId::at(position), number..number + 1);
                gone.insert((models[position][&number].unwrap(), number));
            }
            freeing.sync().unwrap();
            freeing.free(&mut |_| ()).unwrap();
        }
        let anew = Arc::new(disk.open());
        let chain = if live { &chain } else { &anew };
        for (id, model) in chain.ids().zip(&models) {
            let index = if live {
                Arc::clone(&before[id.position()])
            } else {
                chain.index(id, MEMORY).unwrap()
            };
            let memory =
                MemoryBytes::new(Arc::clone(chain), Arc::clone(&index), PAGES * PAGE_SIZE);
            let flat = FlatPages::new(Arc::clone(chain), Arc::clone(&index));
            let mut at = 0;
            let mut buffer = vec![0; 4096];
            for number in 0..PAGES {
                let read = read_at(&memory, number * PAGE_SIZE, &mut buffer);
                match model.get(&number) {
                    None => prop_assert!(read.is_ok() && buffer.iter().all(|byte| *byte == 0)),
                    Some(None) => prop_assert!(read.is_err()),
                    Some(Some(layer)) => {
                        let is_gone = gone.contains(&(*layer, number));
                        prop_assert_eq!(read.is_err(), is_gone);
                        prop_assert!(is_gone || buffer == page(*layer, number));
                        let read = read_at(&flat, at, &mut buffer);
                        prop_assert_eq!(read.is_err(), is_gone);
                        prop_assert!(is_gone || buffer == page(*layer, number));
                        at += PAGE_SIZE;
                    }
                }
            }
            prop_assert_eq!(flat.len(), at);
            // Reads of many pages at once, in the middle of them.
            for first in (0..PAGES).step_by(7) {
                let pages = 23.min(PAGES - first);
                let mut buffer = vec![0; usize::try_from(page_bytes(pages)).unwrap()];
                let fine = (first..first + pages).all(|number| match model.get(&number) {
                    Some(Some(layer)) => !gone.contains(&(*layer, number)),
                    Some(None) => false,
                    None => true,
                });
                let read = read_at(&memory, first * PAGE_SIZE + 100, &mut buffer[200..]);
                prop_assert_eq!(read.is_ok(), fine);
            }
            let held = |(number, layer): (&u64, &Option<usize>)| {
                layer.is_some_and(|layer| gone.contains(&(layer, *number)))
            };
            let lost = model.iter().any(held);
            prop_assert_eq!(chain.require_whole(id).is_err(), lost);
        }
        // What is gone for the newest is told from what it does not need, and is an error
        // for itself.
        let last_dir = anew.snapshots()[models.len() - 1].path();
        let last = &models[models.len() - 1];
        let tip: BTreeSet<(usize, u64)> = last
            .iter()
            .filter_map(|(number, layer)| layer.map(|layer| (layer, *number)))
            .collect();
        let findings = check(&anew, |_| true, &mut |_, _| ()).unwrap();
        for (model, snapshot) in models.iter().zip(anew.snapshots()) {
            let asked = |number: &u64| {
                let place = (model.get(number).copied().flatten()?, *number);
                gone.contains(&place).then_some(place)
            };
            let bad = (0..PAGES).filter_map(|number| asked(&number)).any(|p| tip.contains(&p));
            let told = findings.iter().any(|finding| {
                finding.dir == snapshot.path()
                    && finding.problem.ends_with("can no longer be restored")
            });
            prop_assert_eq!(bad, told);
            let error = findings.iter().any(|finding| {
                finding.severity == Severity::Error
                    && finding.dir == snapshot.path()
                    && finding.problem.contains("can no longer be restored")
            });
            prop_assert_eq!(error, bad && snapshot.path() == last_dir);
        }
        // Comparing a snapshot with itself needs no page.
        let id = SnapshotId::at(models.len() - 1);
        prop_assert!(diff((&anew, id), (&anew, id), &mut |_, _| ()).is_ok());
    }
}
