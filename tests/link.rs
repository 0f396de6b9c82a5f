//! Full dumps that become a chain: every snapshot holds afterwards what it held before,
//! whatever happens meanwhile, and takes less room.

mod common;

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use common::{
    Cap,
    dumps::*,
    live::{Live, engine, state_of, wait_for, workload},
    mounted::imgfs,
    recorder::Recorder,
    require,
    same::{assert_same, assert_same_memory, bytes, open},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use proptest::prelude::*;
use rcriu::{
    dedup::{DedupError, LinkOptions, link},
    fault::Point,
    image::{ImageWriter, Kind, MemoryId, PagemapEntry, PagemapWriter, Presence},
    units::PageIndex,
};

#[test]
fn full_dumps_become_a_chain_that_holds_each_page_once() {
    let root = tempfile::tempdir().unwrap();
    let (dirs, models) = three(root.path());
    let before: Vec<u64> = dirs.iter().map(|dir| disk_bytes(dir)).collect();
    let modes = |dir: &Path| -> BTreeMap<bool, u32> {
        let pages = |name: &String| name.starts_with("pages-");
        let mode = |name: &String| fs::metadata(dir.join(name)).unwrap().permissions().mode();
        listing(dir).keys().map(|name| (pages(name), mode(name))).collect()
    };
    for name in listing(&dirs[1]).keys() {
        let mode = if name.starts_with("pages-") { 0o640 } else { 0o604 };
        fs::set_permissions(dirs[1].join(name), fs::Permissions::from_mode(mode)).unwrap();
    }
    let allowed = modes(&dirs[1]);
    let linked = link_all(&paths(&dirs)).unwrap();
    fs::remove_file(dirs[1].join("parent")).unwrap();
    assert_eq!(modes(&dirs[1]), allowed);
    symlink("../1", dirs[1].join("parent")).unwrap();
    for (dir, model) in dirs.iter().zip(&models) {
        assert_holds(dir, model);
    }
    assert_clean(root.path());
    // What the parent has: pages 1 and 3, and two of the object. Then pages 1 and 2,
    // and the same two; the second process was not there in between.
    let shared: Vec<u64> = linked.iter().map(|one| one.shared_pages).collect();
    assert_eq!(shared, [4, 4]);
    for (position, one) in linked.iter().enumerate() {
        assert_eq!(one.bytes_before, before[position + 1]);
        assert_eq!(one.bytes_after, disk_bytes(&one.dir));
        assert_eq!(one.bytes_before - one.bytes_after, one.shared_pages * 4096);
        assert_eq!(
            fs::read_link(dirs[position + 1].join("parent")).unwrap(),
            Path::new("..").join((position + 1).to_string())
        );
    }
    assert_eq!(disk_bytes(&dirs[0]), before[0]);
    // Once more, and there is nothing left to do.
    let listings: Vec<_> = dirs.iter().map(|dir| listing(dir)).collect();
    let again = link_all(&paths(&dirs)).unwrap();
    assert!(again.iter().all(|one| one.shared_pages == 0 && one.parent.is_some()), "{again:?}");
    assert_eq!(dirs.iter().map(|dir| listing(dir)).collect::<Vec<_>>(), listings);
}

#[test]
fn copies_are_linked_and_the_originals_stay() {
    let root = tempfile::tempdir().unwrap();
    let (dirs, models) = three(root.path());
    let listings: Vec<_> = dirs.iter().map(|dir| listing(dir)).collect();
    let names = paths(&dirs);
    let output = dedup(&["--link", "--keep-originals", "--json"], &names);
    assert!(output.status.success(), "{}", text(&output));
    let said: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(said["linked"][1]["shared_pages"], 4, "{said}");
    assert_eq!(dirs.iter().map(|dir| listing(dir)).collect::<Vec<_>>(), listings);
    for (dir, model) in dirs.iter().zip(&models).skip(1) {
        let copy = dir.with_extension("linked");
        assert_holds(&copy, model);
        assert!(disk_bytes(&copy) < disk_bytes(dir));
        let date =
            |dir: &Path| fs::metadata(dir.join("inventory.img")).unwrap().modified().unwrap();
        assert_eq!(date(&copy), date(dir));
    }
    assert_eq!(
        fs::read_link(root.path().join("3.linked/parent")).unwrap(),
        Path::new("../2.linked")
    );
    assert_eq!(fs::read_link(root.path().join("2.linked/parent")).unwrap(), Path::new("../1"));
    assert_clean(root.path());
    // Once more, and there is nothing left to do.
    let copies: Vec<_> = dirs[1..].iter().map(|dir| dir.with_extension("linked")).collect();
    let before: Vec<_> = copies.iter().map(|dir| listing(dir)).collect();
    let again = dedup(&["--link", "--keep-originals"], &names);
    assert!(again.status.success(), "{}", text(&again));
    assert_eq!(copies.iter().map(|dir| listing(dir)).collect::<Vec<_>>(), before);
    // What is not such a copy is left alone.
    fs::copy(dirs[2].join("inventory.img"), copies[0].join("inventory.img")).unwrap();
    let again = dedup(&["--link", "--keep-originals"], &names);
    assert!(!again.status.success() && text(&again).contains("2.linked already exists"));
}

#[test]
fn copies_that_were_not_finished_are_finished_by_the_next_run() {
    let words = ["--link", "--keep-originals"];
    for make in [|root: &Path| three(root).0, |root: &Path| renumbered(root).0] {
        for point in points() {
            for how in ["", ":kill"] {
                let root = tempfile::tempdir().unwrap();
                let dirs = make(root.path());
                let names = paths(&dirs);
                let fault = format!("{}{how}", point.name());
                let output = command(&words, &names).env("RCRIU_FAULT", &fault).output().unwrap();
                if output.status.success() {
                    continue; // a point of another way of linking
                }
                let output = dedup(&words, &names);
                assert!(output.status.success(), "{fault}: {}", text(&output));
                let undisturbed = tempfile::tempdir().unwrap();
                let others = make(undisturbed.path());
                assert!(dedup(&words, &paths(&others)).status.success());
                for (dir, other) in dirs.iter().zip(&others).skip(1) {
                    let linked = |dir: &Path| listing(&dir.with_extension("linked"));
                    assert_eq!(linked(dir), linked(other), "{fault}");
                }
                assert_clean(root.path());
            }
        }
        // Killed between two copies.
        let root = tempfile::tempdir().unwrap();
        let dirs = make(root.path());
        let names = paths(&dirs);
        assert!(dedup(&words, &names[..2]).status.success());
        if let Some(last) = dirs.get(2) {
            fs::create_dir(last.with_extension("linked")).unwrap();
        }
        assert!(dedup(&words, &names).status.success());
        assert_clean(root.path());
    }
}

#[test]
fn a_chain_is_linked_to_what_is_older() {
    let root = tempfile::tempdir().unwrap();
    let (dirs, models) = three(root.path());
    // The last two are a chain.
    link_all(&[&dirs[1], &dirs[2]]).unwrap();
    let linked = link_all(&paths(&dirs)).unwrap();
    assert_eq!(linked.iter().map(|one| one.shared_pages).collect::<Vec<_>>(), [4, 0]);
    for (dir, model) in dirs.iter().zip(&models) {
        assert_holds(dir, model);
    }
    assert_clean(root.path());
    // Not past the one in between.
    let error = link_all(&[&dirs[0], &dirs[2]]).unwrap_err();
    assert!(matches!(error, DedupError::OtherParent { .. }), "{error}");
}

#[test]
fn what_cannot_be_linked_is_refused_before_anything_is_changed() {
    let root = tempfile::tempdir().unwrap();
    let (dirs, _) = three(root.path());
    let other = snapshot(root.path(), "other", 9, &model(&[(MemoryId::Private(99), &[(1, 1)])]));
    let listings = || -> Vec<_> { dirs.iter().chain([&other]).map(|dir| listing(dir)).collect() };
    let before = listings();
    let said = |dirs: &[&Path]| link_all(dirs).unwrap_err().to_string();
    // The date of the second is not later, and its uptime is earlier.
    let date = |dir: &Path, seconds| {
        let inventory = fs::File::options().write(true).open(dir.join("inventory.img")).unwrap();
        inventory.set_modified(std::time::UNIX_EPOCH + Duration::from_secs(seconds)).unwrap();
    };
    date(&dirs[0], 1000);
    date(&dirs[1], 2000);
    let order = said(&[&dirs[1], &dirs[0]]);
    assert!(order.ends_with("by its date and its uptime\nhelp: name the oldest first"), "{order}");
    let different = said(&[&dirs[0], &other]);
    assert!(different.contains("dumps of different trees"), "{different}");
    assert!(said(&[&dirs[0]]).contains("two image directories"));
    assert!(said(&[&dirs[0], &dirs[0]]).ends_with("is named twice"));
    assert!(said(&[&dirs[0], root.path()]).contains("has no inventory.img"));
    assert_eq!(listings(), before);
    // Nothing in common is no error, and no reason for a link.
    let apart = snapshot(root.path(), "apart", 10, &model(&[(ONE, &[(1, 77)])]));
    let linked = link_all(&[&dirs[0], &apart]).unwrap();
    assert_eq!((linked[0].shared_pages, &linked[0].parent), (0, &None));
    assert!(!apart.join("parent").is_symlink());
    for (words, code) in
        [(&["--keep-originals"][..], 2), (&["a-directory"], 2), (&["--link", "--exec-cmd"], 1)]
    {
        let output = dedup(words, &[]);
        assert_eq!(output.status.code(), Some(code), "{words:?}: {}", text(&output));
    }
}

#[test]
fn objects_are_found_though_their_numbers_have_changed() {
    let shared = MemoryId::Shared;
    let anonymous = &[(0, 1), (1, 2), (2, 3)][..];
    let memfd = &[(0, 4), (3, 5)][..];
    for processes in [1, 2] {
        let root = tempfile::tempdir().unwrap();
        let old = model(&[(shared(7), anonymous), (shared(8), memfd)]);
        // The anonymous one has the number of another object now.
        let new = model(&[(shared(100), anonymous), (shared(200), memfd)]);
        let dirs = [snapshot(root.path(), "1", 1, &old), snapshot(root.path(), "2", 2, &new)];
        add_objects(&dirs[0], processes, 7, 8);
        add_objects(&dirs[1], processes, 100, 200);
        let linked = link(&LinkOptions { dirs: dirs.to_vec(), keep_originals: true }, &()).unwrap();
        assert_eq!((linked[0].renumbered, linked[0].shared_pages), (2, 5));
        assert_holds(&linked[0].dir, &old);
        assert_eq!(numbers(&linked[0].dir, processes), (vec![7; processes as usize], 8));
        assert_holds(&dirs[1], &new);

        // In place, numbers change in one image at a time.
        let linked = link_all(&paths(&dirs)).unwrap();
        assert_eq!(
            (linked[0].renumbered, linked[0].shared_pages),
            match processes {
                1 => (2, 5),
                _ => (1, 2),
            }
        );
        let there = if processes == 1 { 7 } else { 100 };
        assert_eq!(numbers(&dirs[1], processes), (vec![there; processes as usize], 8));
        assert_holds(&dirs[1], &model(&[(shared(there), anonymous), (shared(8), memfd)]));
        assert_clean(root.path());
    }
}

/// Random dumps: few different pages, so that many are equal.
fn models() -> impl Strategy<Value = Vec<Model>> {
    let memory = prop_oneof![Just(ONE), Just(TWO), Just(SHARED)];
    let pages = prop::collection::btree_map(0..90_u64, 0..4_u64, 0..80);
    let snapshot = prop::collection::btree_map(memory, pages, 1..4);
    prop::collection::vec(snapshot, 2..5)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn every_snapshot_holds_what_it_held(models in models(), first in 0..3_usize) {
        let root = tempfile::tempdir().unwrap();
        let dirs: Vec<PathBuf> = (1..)
            .zip(&models)
            .map(|(number, model)| snapshot(root.path(), &number.to_string(), number, model))
            .collect();
        // Some of them before the others.
        let first = first.min(dirs.len() - 2);
        for part in [&dirs[first..], &dirs[..]] {
            match link_all(&paths(part)) {
                Ok(_) | Err(DedupError::DifferentTrees { .. }) => {}
                Err(error) => return Err(TestCaseError::fail(error.to_string())),
            }
            for (dir, model) in dirs.iter().zip(&models) {
                assert_holds(dir, model);
            }
            assert_clean(root.path());
        }
        // No page is stored that the parent has at the same place.
        for position in 1..dirs.len() {
            let (chain, id) = open(&dirs[position]);
            if !matches!(chain.snapshot(id).parent, Ok(Some(_))) {
                continue;
            }
            for (memory, pages) in &models[position] {
                let index = chain.index(id, *memory).unwrap();
                let older = models[position - 1].get(memory);
                for (number, value) in pages {
                    let extent = index.find(PageIndex(*number)).unwrap();
                    let own = matches!(extent.place, rcriu::chain::Place::Stored { layer: 0, .. });
                    let equal = older.and_then(|older| older.get(number)) == Some(value);
                    prop_assert_eq!(own, !equal, "{} page {}", memory, number);
                }
            }
        }
    }
}

/// The points at which linking can be made to fail.
fn points() -> impl Iterator<Item = Point> {
    Point::ALL.iter().copied().filter(|point| point.name().starts_with("dedup-"))
}

#[test]
fn what_fails_or_is_killed_loses_nothing_and_is_finished_by_the_next() {
    let plain = |root: &Path| {
        let (dirs, models) = three(root);
        (dirs, models.into_iter().map(|model| [model.clone(), model]).collect::<Vec<_>>())
    };
    type Make = dyn Fn(&Path) -> (Vec<PathBuf>, Vec<[Model; 2]>);
    let kinds: [&Make; 2] = [&plain, &renumbered];
    for make in kinds {
        let undisturbed = tempfile::tempdir().unwrap();
        let (dirs, _) = make(undisturbed.path());
        link_all(&paths(&dirs)).unwrap();
        let finished: Vec<_> = dirs.iter().map(|dir| listing(dir)).collect();
        for point in points() {
            for how in ["", ":kill"] {
                let root = tempfile::tempdir().unwrap();
                let (dirs, models) = make(root.path());
                let fault = format!("{}{how}", point.name());
                let names = paths(&dirs);
                let output = command(&["--link"], &names).env("RCRIU_FAULT", &fault).output();
                let output = output.unwrap();
                assert!(!output.status.success(), "{fault} is never hit");
                for (dir, models) in dirs.iter().zip(&models) {
                    assert_left_whole(dir, models);
                }
                let mut told = false;
                for finding in findings(root.path()) {
                    let unfinished = finding.problem.contains("was interrupted here");
                    let stray = finding.problem.starts_with("no pagemap claims");
                    assert!(unfinished || stray, "{fault}: {finding}");
                    told |= unfinished;
                }
                let left = dirs.iter().any(|dir| dir.join(".dedup").exists());
                assert_eq!(told, left, "{fault}");
                let output = dedup(&["--link"], &names);
                assert!(output.status.success(), "{fault}: {}", text(&output));
                for (dir, [_, model]) in dirs.iter().zip(&models) {
                    assert_holds(dir, model);
                }
                assert_clean(root.path());
                let left: Vec<_> = dirs.iter().map(|dir| listing(dir)).collect();
                let names = |all: &[BTreeMap<String, u64>]| {
                    let sizes = |one: &BTreeMap<String, u64>| {
                        let mut sizes: Vec<u64> = one.values().copied().collect();
                        sizes.sort_unstable();
                        sizes
                    };
                    all.iter().map(sizes).collect::<Vec<_>>()
                };
                assert_eq!(names(&left), names(&finished), "{fault}: {left:?}");
            }
        }
    }
}

#[test]
fn linking_that_is_killed_at_any_moment_loses_nothing() {
    let make = |root: &Path| command(&["--link"], &paths(&renumbered(root).0));
    let elsewhere = tempfile::tempdir().unwrap();
    let (dirs, models) = renumbered(elsewhere.path());
    killed_at_any_moment(&make, &|root| {
        let dirs = moved(&dirs, root);
        for (dir, models) in dirs.iter().zip(&models) {
            assert_left_whole(dir, models);
        }
        let output = dedup(&["--link"], &paths(&dirs));
        assert!(output.status.success(), "{}", text(&output));
        for (dir, [_, model]) in dirs.iter().zip(&models) {
            assert_holds(dir, model);
        }
        assert_clean(root);
    });
}

/// A run that has stopped at a point, and goes on when this is dropped.
struct Stopped(Child);

impl Stopped {
    fn at(point: Point, arguments: &[&str], dirs: &[&Path]) -> Self {
        let fault = format!("{}:stop", point.name());
        let mut command = command(arguments, dirs);
        let mut child =
            Self(command.env("RCRIU_FAULT", fault).stdout(Stdio::null()).spawn().unwrap());
        wait_for(point.name(), || {
            assert_eq!(child.0.try_wait().unwrap(), None, "it is never hit");
            state_of(child.pid()) == Some('T')
        });
        child
    }

    fn pid(&self) -> i32 {
        i32::try_from(self.0.id()).unwrap()
    }

    fn go_on(mut self) {
        let mut status = None;
        wait_for("the end of the run", || {
            // Again and again: it comes by the point once for each snapshot.
            kill(Pid::from_raw(self.pid()), Signal::SIGCONT).unwrap();
            status = self.0.try_wait().unwrap();
            status.is_some()
        });
        assert!(status.unwrap().success());
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn the_second_of_two_is_refused_and_told_who_is_the_first() {
    let root = tempfile::tempdir().unwrap();
    let (dirs, models) = three(root.path());
    let names = paths(&dirs);
    let first = Stopped::at(Point::DedupLinked, &["--link"], &names);
    let pid = format!("is in use by rcriu (pid {})\n  help: wait until it has ended", first.pid());
    // One directory in common is enough.
    let others = [
        dedup(&["--link"], &names[..2]),
        dedup(&["--link", "--keep-originals"], &names[1..]),
        imgfs(&["flatten", names[2].to_str().unwrap(), root.path().join("out").to_str().unwrap()]),
        Command::new(engine()).args(["restore", "-D"]).arg(names[1]).output().unwrap(),
    ];
    for refused in others {
        assert!(!refused.status.success());
        assert!(text(&refused).contains(&pid), "{}", text(&refused));
    }
    first.go_on();
    for (dir, model) in dirs.iter().zip(&models) {
        assert_holds(dir, model);
    }
    assert!(dedup(&["--link"], &names).status.success());
}

/// Copies a snapshot to a directory without parents, to be compared with later.
fn flat(dir: &Path, out: &Path) {
    let output = imgfs(&["flatten", dir.to_str().unwrap(), out.to_str().unwrap()]);
    assert!(output.status.success(), "{}", text(&output));
}

/// Links dumps of a live tree and compares each with what it was.
fn link_live(live: &Live, names: &[&str]) -> serde_json::Value {
    let dirs: Vec<PathBuf> = names.iter().map(|name| live.path(name)).collect();
    let references: Vec<PathBuf> =
        names.iter().map(|name| live.path(&format!("{name}.before"))).collect();
    for (dir, reference) in dirs.iter().zip(&references) {
        flat(dir, reference);
    }
    let output = dedup(&["--link", "--json"], &paths(&dirs));
    assert!(output.status.success(), "{}", text(&output));
    let said: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    for (position, (dir, reference)) in dirs.iter().zip(&references).enumerate() {
        let renumbered =
            position.checked_sub(1).map(|at| &said["linked"][at]["renumbered_objects"]);
        if renumbered.is_none_or(|count| *count == 0) {
            assert_same(dir, reference);
        } else {
            let ((chain, id), (before, before_id)) = (open(dir), open(reference));
            for memory in chain.memories(id).unwrap() {
                if let MemoryId::Private(_) = memory {
                    let old = bytes(&before, before_id, memory);
                    assert_same_memory(memory, &bytes(&chain, id, memory), &old);
                }
            }
        }
        let checked = imgfs(&["check", dir.to_str().unwrap()]);
        assert!(checked.status.success(), "{}", text(&checked));
        fs::remove_dir_all(reference).unwrap();
    }
    said
}

#[test]
fn privileged_dumps_of_a_program_that_goes_on_become_a_chain() {
    require(Cap::Ptrace);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_str().unwrap().to_owned();
    let program = workload().to_str().unwrap();
    let mut live = Live::program(program, &["--steps", "random", &path], dir);
    let names = ["full-1", "full-2", "full-3", "full-4"];
    for (number, name) in (1..).zip(names) {
        wait_for(&format!("step {number}"), || {
            fs::read_to_string(live.path("at")).is_ok_and(|at| at == number.to_string())
        });
        live.images_name = name;
        live.dump_running(&[]);
        fs::write(live.path(&format!("go.{number}")), "").unwrap();
    }
    let said = link_live(&live, &names);
    for one in said["linked"].as_array().unwrap() {
        let number = |key: &str| one[key].as_u64().unwrap();
        assert!(number("shared_pages") > 100, "{said}");
        let saved = number("bytes_before") - number("bytes_after");
        assert!(saved * 10 >= number("shared_pages") * 4096 * 9, "{said}");
    }
    // It goes on from the last as if nothing had happened.
    live.kill();
    live.images_name = names[3];
    live.restore(&[]);
    let mut number = 5;
    let mut at = String::new();
    while at != "end" {
        wait_for(&format!("step {number}"), || {
            at = fs::read_to_string(live.path("at")).unwrap();
            assert!(!at.starts_with("failed"), "{at}");
            at == "end" || at == number.to_string()
        });
        fs::write(live.path(&format!("go.{number}")), "").unwrap();
        number += 1;
    }
}

/// Dumps a state in full, restores it, dumps it again, and restores it from the chain
/// of the two: its objects have other inode numbers then.
fn restored_between(state: &str, in_common: &[&str]) {
    require(Cap::Ptrace);
    let mut live = Live::workload(state);
    let before = live.state();
    live.images_name = "one";
    live.dump(&[]);
    live.restore(&[]);
    fs::remove_file(live.path("pid")).unwrap();
    live.images_name = "two";
    live.dump(&[]);
    let said = link_live(&live, &["one", "two"]);
    let (one, two) = (open(&live.path("one")), open(&live.path("two")));
    assert_eq!(one.0.memories(one.1).unwrap(), two.0.memories(two.1).unwrap(), "{said}");
    for key in in_common {
        assert!(said["linked"][0][key].as_u64().unwrap() > 0, "{key}: {said}");
    }
    live.restore(&[]);
    let after = live.state();
    live.verdict();
    before.restored(live.root).assert_unchanged(&after.restored(live.root));
}

#[test]
fn privileged_private_memory_is_restored_from_linked_dumps() {
    restored_between("cow_tree", &["shared_pages"]);
}

#[test]
fn privileged_shared_memory_is_restored_from_linked_dumps() {
    restored_between("shared_anon_parts", &["shared_pages", "renumbered_objects"]);
}

#[test]
fn privileged_memfds_are_restored_from_linked_dumps() {
    restored_between("memfd_mapping", &["shared_pages", "renumbered_objects"]);
}

#[test]
fn privileged_segments_are_restored_from_linked_dumps() {
    restored_between("sysv_shm", &["shared_pages"]);
}

#[test]
fn a_link_to_a_parent_that_is_gone_is_an_error() {
    let root = tempfile::tempdir().unwrap();
    let (dirs, _) = three(root.path());
    symlink("../nowhere", dirs[1].join("parent")).unwrap();
    let error = link_all(&paths(&dirs)).unwrap_err().to_string();
    assert!(error.contains("leads to ../nowhere"), "{error}");
}

#[test]
fn privileged_linking_survives_power_cuts() {
    let recorder = Recorder::mount();
    let (dirs, models) = renumbered(recorder.path());
    let check = |root: &Path| {
        for (dir, models) in moved(&dirs, root).iter().zip(&models) {
            assert_left_whole(dir, models);
        }
    };
    let again = |root: &Path| {
        let dirs = moved(&dirs, root);
        link_all(&paths(&dirs)).unwrap();
        for (dir, [_, model]) in dirs.iter().zip(&models) {
            assert_holds(dir, model);
        }
        assert_clean(root);
        assert!(!dirs[1].join(".dedup").exists());
    };
    recorder.begin();
    survives_power_cuts(&recorder, command(&["--link"], &paths(&dirs)), &check, &again);
}

#[test]
fn claims_of_more_pages_than_there_are_do_no_harm() {
    let root = tempfile::tempdir().unwrap();
    let (dirs, _) = three(root.path());
    let claim = PagemapEntry {
        first: PageIndex(1),
        pages: 1 << 50,
        presence: Presence::Present,
        lazy: false,
    };
    for dir in &dirs[..2] {
        let path = dir.join(ONE.pagemap_name());
        fs::remove_file(&path).unwrap();
        let image = ImageWriter::create(&path, Kind::Pagemap).unwrap();
        let mut pagemap = PagemapWriter::new(image, 1).unwrap();
        pagemap.entry(&claim).unwrap();
        pagemap.into_image().finish().unwrap();
    }
    let error = link_all(&[&dirs[0], &dirs[1]]).unwrap_err().to_string();
    assert!(error.contains("is cut short"), "{error}");
    let output = imgfs(&["ls", "--duplicates", root.path().to_str().unwrap()]);
    assert!(text(&output).contains("is cut short"), "{}", text(&output));
    let output = dedup(&["--reflink", "-D"], &[root.path()]);
    assert!(text(&output).contains("is cut short"), "{}", text(&output));
}
