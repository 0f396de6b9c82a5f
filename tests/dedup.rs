//! Freeing and sharing pages that another image has: nothing that any snapshot needs is
//! lost, and what is gone is named, whatever happens meanwhile.

mod common;

use std::{
    fs,
    io::Read,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use common::{
    Cap,
    dumps::*,
    live::{Live, engine, state_of, wait_for, workload},
    loops::LoopMount,
    mounted::{Mounted, imgfs},
    recorder::Recorder,
    require,
    same::{assert_same, open},
    stored_bytes,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use rcriu::{fault::Point, image::Kind};

#[test]
fn freeing_that_is_killed_at_any_moment_names_what_is_gone() {
    let make = |root: &Path| free(&branched(root).0[2], &[]);
    let elsewhere = tempfile::tempdir().unwrap();
    let (dirs, models) = branched(elsewhere.path());
    killed_at_any_moment(&make, &|root| {
        let dirs = moved(&dirs, root);
        assert_eq!(restorable(&dirs, &models)[2..], [true, true]);
        assert_eq!(errors(root), "");
        let output = free(&dirs[2], &[]).output().unwrap();
        assert!(output.status.success(), "{}", text(&output));
        assert_eq!(restorable(&dirs, &models), [false, false, true, true]);
    });
}

#[test]
fn what_a_snapshot_holds_is_freed_in_its_ancestors_but_not_for_others() {
    let root = tempfile::tempdir().unwrap();
    let (dirs, models) = branched(root.path());
    let before: Vec<u64> = dirs.iter().map(|dir| disk_bytes(dir)).collect();
    let output = free(&dirs[2], &["--json"]).output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    let said: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    // The third holds pages 3 and 9 of the first process, both pages of the second, and
    // page 1 of the object, all of them anew. In the second, page 3 is left to the first
    // and page 1 is needed by the fourth. In the first, 3 and 9, and page 1 of the object;
    // the second process is not in the second snapshot, so its pages are of another one.
    assert_eq!(said["freed_pages"], 3, "{said}");
    let path = |dir: &PathBuf| serde_json::json!(dir.to_str().unwrap());
    assert_eq!(said["no_longer_restorable"], serde_json::json!([path(&dirs[0]), path(&dirs[1])]));
    let kept = serde_json::json!([{ "directory": path(&dirs[3]), "pages": 1 }]);
    assert_eq!(said["kept_for"], kept, "{said}");
    assert_eq!(restorable(&dirs, &models), [false, false, true, true]);
    let after: Vec<u64> = dirs.iter().map(|dir| disk_bytes(dir)).collect();
    // Three pages less, and the journals of two files, each of which takes a block.
    assert_eq!(before[0] - after[0], 4096);
    assert_eq!(before[1..], after[1..]);
    let listed = imgfs(&["ls", root.path().to_str().unwrap()]);
    assert!(listed.status.success(), "{}", text(&listed));
    let checked = imgfs(&["check", root.path().to_str().unwrap()]);
    assert!(checked.status.success(), "{}", text(&checked));
    assert!(text(&checked).contains("its descendants can"), "{}", text(&checked));
    // Again, and there is nothing left to do.
    let again = free(&dirs[2], &[]).output().unwrap();
    assert!(again.status.success(), "{}", text(&again));
    assert!(!text(&again).contains("can no longer be restored"), "{}", text(&again));
    let base = free(&dirs[0], &[]).output().unwrap();
    assert!(text(&base).contains("has no parent"), "{}", text(&base));
}

#[test]
fn what_was_freed_stays_gone_and_takes_no_room_in_a_copy() {
    let root = tempfile::tempdir().unwrap();
    let (dirs, models) = branched(root.path());
    assert!(free(&dirs[2], &[]).output().unwrap().status.success());
    // An older dump, equal to the first.
    let older = snapshot(root.path(), "0", 0, &models[0]);
    let output = dedup(&["--link", "--keep-originals", "--json"], &[&older, &dirs[0]]);
    let said: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    // The one memory that has lost nothing.
    assert_eq!(said["linked"][0]["shared_pages"], 2, "{}", text(&output));
    let copy = dirs[0].with_extension("linked");
    let ((chain, id), (copied, copied_id)) = (open(&dirs[0]), open(&copy));
    for memory in [ONE, SHARED] {
        let (index, there) =
            (chain.index(id, memory).unwrap(), copied.index(copied_id, memory).unwrap());
        assert!(index.punched_pages() > 0);
        assert_eq!(index.punched_pages(), there.punched_pages());
        let pages =
            |dir: &Path| stored_bytes(&dir.join(Kind::Pages.file_name(index.pages_id().into())));
        assert_eq!(pages(&copy), pages(&dirs[0]));
    }
}

#[test]
fn nothing_is_freed_while_it_cannot_be_told_who_needs_it() {
    let root = tempfile::tempdir().unwrap();
    let (dirs, models) = branched(root.path());
    let pagemap = dirs[3].join(SHARED.pagemap_name());
    let whole = fs::read(&pagemap).unwrap();
    fs::write(&pagemap, &whole[..whole.len() - 1]).unwrap();
    let output = free(&dirs[2], &[]).output().unwrap();
    assert!(!output.status.success());
    assert!(text(&output).contains("may need pages that would be freed"), "{}", text(&output));
    fs::write(&pagemap, whole).unwrap();
    assert_eq!(restorable(&dirs, &models), [true; 4]);
    // Nor if the snapshot has lost something itself.
    let pages = fs::File::options().write(true).open(dirs[2].join("pages-4.img")).unwrap();
    pages.set_len(100).unwrap();
    let output = free(&dirs[2], &[]).output().unwrap();
    assert!(text(&output).contains("is cut short"), "{}", text(&output));
    assert_eq!(restorable(&dirs[..2], &models[..2]), [true; 2]);
}

#[test]
fn freeing_that_fails_or_is_killed_names_what_is_gone_and_is_finished_by_the_next() {
    let points = Point::ALL.iter().filter(|point| point.name().starts_with("free-"));
    for point in points {
        for how in ["", ":kill"] {
            let root = tempfile::tempdir().unwrap();
            let (dirs, models) = branched(root.path());
            let fault = format!("{}{how}", point.name());
            let output = free(&dirs[2], &[]).env("RCRIU_FAULT", &fault).output().unwrap();
            assert!(!output.status.success(), "{fault} is never hit");
            let whole = restorable(&dirs, &models);
            assert_eq!(whole[2..], [true, true], "{fault}");
            assert_eq!(errors(root.path()), "", "{fault}");
            let output = free(&dirs[2], &[]).output().unwrap();
            assert!(output.status.success(), "{fault}: {}", text(&output));
            assert_eq!(restorable(&dirs, &models), [false, false, true, true], "{fault}");
            let holes = |dir: &Path| {
                let pages = listing(dir).into_keys().filter(|name| name.starts_with("pages-"));
                pages.map(|name| stored_bytes(&dir.join(name))).sum::<u64>()
            };
            // Ten pages were stored, one of them zero, and three are gone.
            assert_eq!(holes(&dirs[0]), 6 * 4096, "{fault}");
        }
    }
}

#[test]
fn privileged_a_chain_that_is_mounted_is_not_changed() {
    require(Cap::Fuse);
    let root = tempfile::tempdir().unwrap();
    let (dirs, models) = branched(root.path());
    let points = tempfile::tempdir().unwrap();
    let mounted = Mounted::new(root.path(), &points.path().join("mnt"), &["--snapshot", "3"]);
    for output in [free(&dirs[2], &[]).output().unwrap(), dedup(&["--link"], &paths(&dirs[..2]))] {
        let pid = format!("is in use by imgfs (pid {})", mounted.pid());
        assert!(text(&output).contains(&pid), "{}", text(&output));
    }
    drop(mounted);
    assert_eq!(restorable(&dirs, &models), [true; 4]);
    assert!(free(&dirs[2], &[]).output().unwrap().status.success());
}

#[test]
fn privileged_a_dump_frees_what_it_supersedes() {
    let mut program = Program::start();
    let mut stored = Vec::new();
    for number in 1..5 {
        let name = ["chain/1", "chain/2", "chain/3", "chain/4"][number - 1];
        program.step();
        program.live.images_name = name;
        let parent = format!("../{}", number - 1);
        let options = ["--auto-dedup", "--prev-images-dir", &parent];
        program.live.dump_running(if number == 1 { &options[..1] } else { &options });
        program.assert_holds_now(name);
        stored.push(disk_bytes(&program.live.path("chain/1")));
    }
    // The first becomes smaller with every dump.
    assert!(stored.windows(2).all(|pair| pair[1] < pair[0]), "{stored:?}");
    program.live.images_name = "chain/4";
    program.live.check_images();
    assert_eq!(errors(&program.live.path("chain")), "");
    program.live.kill();
    program.live.restore(&[]);
}

/// Sends a signal to all processes of a tree, and waits until they stand still if it is
/// to stop them.
fn signal_all(live: &mut Live, signal: Signal) {
    for pid in live.tree() {
        let _ = kill(Pid::from_raw(pid), signal);
    }
    for pid in live.tree() {
        wait_for("the stop", || {
            signal != Signal::SIGSTOP || matches!(state_of(pid), Some('T' | 'Z') | None)
        });
    }
}

/// Pages of two snapshots that share all blocks but those of one memory.
fn shares_blocks(mkfs: &'static str) {
    let mount = LoopMount::new(mkfs, 320);
    let numbered = |from: u64| -> Pages { (0..800).map(|page| (page, from + page)).collect() };
    let models = [
        Model::from([(ONE, numbered(1)), (TWO, numbered(1)), (SHARED, numbered(10_000))]),
        // The shared memory is the same, in the same order; the private one is another.
        Model::from([(ONE, numbered(20_000)), (SHARED, numbered(10_000))]),
    ];
    let root = mount.path();
    let dirs = [snapshot(&root, "1", 1, &models[0]), snapshot(&root, "2", 2, &models[1])];
    let before = mount.free_bytes();
    let run = || {
        let mut command = command(&["--reflink", "--json"], &[]);
        let output = command.arg("-D").arg(&root).output().unwrap();
        assert!(output.status.success(), "{}", text(&output));
        serde_json::from_slice::<serde_json::Value>(&output.stdout).unwrap()
    };
    // One memory of a process is the other's, and one of an object the older one's.
    let said = run();
    assert_eq!((&said["stored_pages"], &said["shared_pages"]), (&4000.into(), &1600.into()));
    let freed = mount.free_bytes() - before;
    assert!(freed > 1500 * 4096, "{freed} bytes were freed");
    for (dir, model) in dirs.iter().zip(&models) {
        assert_holds(dir, model);
    }
    assert_eq!(run()["shared_pages"], 1600);
    // What is linked needs no sharing any more.
    link_all(&paths(&dirs)).unwrap();
    assert_eq!(run()["shared_pages"], 800);
    // The holder of a lock is found on every file system.
    let mut locks = rcriu::sys::lock::DirectoryLocks::default();
    locks.take(&dirs[1], rcriu::sys::lock::Access::Shared).unwrap();
    let refused = dedup(&["--link"], &paths(&dirs));
    assert!(
        text(&refused).contains(&format!("(pid {})", std::process::id())),
        "{}",
        text(&refused)
    );
}

#[test]
fn privileged_equal_pages_share_blocks_on_btrfs() {
    shares_blocks("mkfs.btrfs");
}

#[test]
fn privileged_equal_pages_share_blocks_on_xfs() {
    shares_blocks("mkfs.xfs");
}

#[test]
fn where_blocks_cannot_be_shared_nothing_is_changed() {
    let root = tempfile::tempdir_in("/dev/shm").unwrap();
    let (dirs, models) = three(root.path());
    let output = command(&["--reflink"], &[]).arg("-D").arg(root.path()).output().unwrap();
    assert!(!output.status.success());
    assert!(
        text(&output).contains("cannot share blocks\n  help: move the images to btrfs"),
        "{}",
        text(&output)
    );
    assert_eq!(restorable(&dirs, &models), [true; 3]);
}

#[test]
fn duplicates_are_listed_where_they_are() {
    let root = tempfile::tempdir().unwrap();
    let (dirs, _) = three(root.path());
    let path = root.path().to_str().unwrap();
    let counts = |document: &serde_json::Value| {
        ["stored", "zero", "same_memory", "same_snapshot", "older_snapshot"]
            .map(|key| document[key].as_u64().unwrap())
    };
    let list = || -> serde_json::Value {
        let output = imgfs(&["ls", "--duplicates", "--json", path]);
        assert!(output.status.success(), "{}", text(&output));
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let of = |list: &serde_json::Value, at: usize| counts(&list["snapshots"][at]["pages"]);
    let all = list();
    // Page 1 of both processes. Then 1 again (twice), 3, 10. Then 1 twice, 9, 5, 10, 11,
    // and 20 as in the second.
    assert_eq!(of(&all, 0), [9, 1, 0, 1, 0]);
    assert_eq!(of(&all, 1), [8, 1, 0, 1, 3]);
    assert_eq!(of(&all, 2), [9, 1, 0, 1, 6]);
    assert_eq!(counts(&all["total"]), [26, 3, 0, 3, 9]);
    assert_eq!(all["total"]["duplicate_bytes"], 15 * 4096);
    link_all(&paths(&dirs)).unwrap();
    assert_eq!(counts(&list()["total"])[0], 26 - 8);
    let table = text(&imgfs(&["ls", "--duplicates", path]));
    assert!(table.starts_with("NAME "), "{table}");
    assert_eq!(table.lines().count(), 5, "{table}");
}

/// Checks that freeing in a branched chain survives power cuts.
fn freeing_survives_power_cuts(
    recorder: &Recorder,
    (dirs, models): (&[PathBuf], &[Model]),
    arguments: &[&str],
) {
    let check = |root: &Path| {
        let whole = restorable(&moved(dirs, root), models);
        assert_eq!(whole[2..], [true, true]);
        assert_eq!(errors(root), "");
    };
    let again = |root: &Path| {
        let dirs = moved(dirs, root);
        let output = free(&dirs[2], arguments).output().unwrap();
        assert!(output.status.success(), "{}", text(&output));
        assert_eq!(restorable(&dirs, models), [false, false, true, true]);
        assert!(!dirs[0].join(".dedup").exists());
    };
    recorder.begin();
    survives_power_cuts(recorder, free(&dirs[2], arguments), &check, &again);
}

#[test]
fn privileged_freeing_survives_power_cuts() {
    let recorder = Recorder::mount();
    let (dirs, models) = branched(recorder.path());
    freeing_survives_power_cuts(&recorder, (&dirs, &models), &[]);
}

#[test]
fn privileged_what_supersedes_is_on_disk_before_anything_is_freed() {
    let recorder = Recorder::mount();
    let (dirs, models) = three(recorder.path());
    fs::remove_dir_all(&dirs[2]).unwrap();
    link_all(&paths(&dirs[..2])).unwrap();
    recorder.begin();
    // Written as other programs do, without a sync.
    snapshot(recorder.path(), "3", 3, &models[2]);
    symlink("../2", dirs[2].join("parent")).unwrap();
    let check = |root: &Path| {
        let dirs = moved(&dirs, root);
        if restorable(&dirs[..2], &models[..2]) != [true, true] {
            assert_eq!(restorable(&dirs[2..], &models[2..]), [true]);
        }
    };
    survives_power_cuts(&recorder, free(&dirs[2], &[]), &check, &|_| {});
}

#[test]
fn privileged_files_that_cannot_be_punched_are_rewritten_if_asked_for() {
    let recorder = Recorder::mount_with(false);
    let (dirs, models) = branched(recorder.path());
    let listings = || dirs.iter().map(|dir| listing(dir)).collect::<Vec<_>>();
    let before = listings();
    let refused = free(&dirs[2], &[]).output().unwrap();
    assert!(!refused.status.success());
    assert!(text(&refused).contains("use rcriu dedup --rewrite"), "{}", text(&refused));
    assert_eq!(listings(), before);

    let stored = |dir: &Path| -> u64 {
        let pages = listing(dir).into_keys().filter(|name| name.starts_with("pages-"));
        pages.map(|name| stored_bytes(&dir.join(name))).sum()
    };
    let before = stored(&dirs[0]);
    freeing_survives_power_cuts(&recorder, (&dirs, &models), &["--rewrite"]);
    assert_eq!(restorable(&dirs, &models), [false, false, true, true]);
    assert_eq!(before - stored(&dirs[0]), 3 * 4096);
    // Again, and there is nothing left to do.
    let left = listings();
    let output = free(&dirs[2], &["--rewrite", "--json"]).output().unwrap();
    let said: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&said["freed_pages"], listings()), (&0.into(), left), "{said}");
}

/// A program that waits between its steps, for dumps into a chain.
struct Program {
    live: Live,
    step: u32,
}

impl Program {
    fn start() -> Self {
        require(Cap::Ptrace);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().to_str().unwrap().to_owned();
        let program = workload().to_str().unwrap();
        // The kernel writes to the area of restartable sequences whenever a thread has
        // run, and it runs for each dump.
        let no_rseq = "GLIBC_TUNABLES=glibc.pthread.rseq=0";
        let live = Live::program("env", &[no_rseq, program, "--steps", "random", &path], dir);
        Self { live, step: 0 }
    }

    /// Goes on to the next step, and stands still there.
    fn step(&mut self) {
        if self.step > 0 {
            signal_all(&mut self.live, Signal::SIGCONT);
            fs::write(self.live.path(&format!("go.{}", self.step)), "").unwrap();
        }
        self.step += 1;
        wait_for(&format!("step {}", self.step), || {
            fs::read_to_string(self.live.path("at")).is_ok_and(|at| at == self.step.to_string())
        });
        signal_all(&mut self.live, Signal::SIGSTOP);
    }

    /// Checks that a snapshot holds what the program does now.
    fn assert_holds_now(&mut self, name: &str) {
        self.live.images_name = "full";
        self.live.fault = None;
        self.live.dump_running(&[]);
        assert_same(&self.live.path(name), &self.live.path("full"));
        fs::remove_dir_all(self.live.path("full")).unwrap();
    }
}

#[test]
fn privileged_a_dump_is_complete_whatever_becomes_of_freeing() {
    let mut program = Program::start();
    program.step();
    program.live.images_name = "chain/base";
    program.live.dump_running(&[]);
    for point in Point::ALL.iter().filter(|point| point.name().starts_with("free-")) {
        for how in ["", ":kill"] {
            program.step();
            let fault = format!("{}{how}", point.name());
            let copy = program.live.path("chain");
            let (base, tip) = (copy.join("base"), copy.join("tip"));
            program.live.images_name = "chain/tip";
            program.live.fault = Some(fault.clone());
            let options = ["-R", "--auto-dedup", "--prev-images-dir", "../base"];
            let output = program.live.try_dump(&options);
            // What fails after the dump is complete is not the dump.
            assert_eq!(output.status.success(), how.is_empty(), "{fault}: {}", text(&output));
            program.assert_holds_now("chain/tip");
            let (chain, id) = open(&tip);
            chain.require_whole(id).unwrap();
            assert_eq!(errors(&copy), "", "{fault}");
            let output = free(&tip, &[]).output().unwrap();
            assert!(output.status.success(), "{fault}: {}", text(&output));
            program.assert_holds_now("chain/tip");
            // The next one anew.
            fs::remove_dir_all(&tip).unwrap();
            fs::remove_dir_all(&base).unwrap();
            program.live.images_name = "chain/base";
            program.live.dump_running(&[]);
        }
    }
}

#[test]
fn privileged_a_dump_that_frees_is_killed_at_any_moment_and_nothing_is_lost() {
    const MOMENTS: u32 = 24;
    let mut whole = Duration::ZERO;
    let (mut complete, mut freed) = (0, 0);
    for moment in 0..=MOMENTS {
        let mut program = Program::start();
        let chain = program.live.path("chain");
        program.step();
        program.live.images_name = "chain/base";
        program.live.dump_running(&[]);
        program.step();
        let tip = program.live.path("chain/tip");
        fs::create_dir(&tip).unwrap();
        let root = program.live.root.to_string();
        let mut dump = Command::new(engine());
        dump.args(["dump", "-R", "-t", &root, "--auto-dedup", "--prev-images-dir", "../base"]);
        let begin = Instant::now();
        let mut dump = dump.arg("-D").arg(&tip).stderr(Stdio::piped()).spawn().unwrap();
        if moment > 0 {
            // The moments are spread over a whole dump; the wait is what is tested.
            std::thread::sleep(whole * moment / MOMENTS);
            dump.kill().unwrap();
        }
        dump.wait().unwrap();
        // The process that does the work has the other end of this, too.
        dump.stderr.take().unwrap().read_to_end(&mut Vec::new()).unwrap();
        if moment == 0 {
            whole = begin.elapsed();
        }
        let (base, id) = open(&chain.join("base"));
        let lost = base.require_whole(id).is_err();
        if tip.join("inventory.img").exists() {
            complete += 1;
            program.assert_holds_now("chain/tip");
        } else {
            assert!(!lost, "moment {moment}: pages were freed for a dump that is not there");
        }
        freed += u32::from(lost);
        assert_eq!(errors(&chain), "", "moment {moment}");
    }
    assert!(complete > 0 && freed > 0, "{complete} complete, {freed} freed");
    assert!(complete <= MOMENTS, "no dump was killed before its end");
}

#[test]
fn privileged_a_pre_dump_frees_what_it_supersedes() {
    let mut program = Program::start();
    program.step();
    program.live.images_name = "chain/base";
    program.live.dump_running(&[]);
    let base = program.live.path("chain/base");
    let before = disk_bytes(&base);
    program.step();
    let before_dump = program.live.path("chain/pre");
    fs::create_dir(&before_dump).unwrap();
    let root = program.live.root.to_string();
    let mut pre_dump = Command::new(engine());
    pre_dump.args(["pre-dump", "-t", &root, "--auto-dedup", "--prev-images-dir", "../base", "-D"]);
    let output = pre_dump.arg(&before_dump).output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    let after = disk_bytes(&base);
    assert!(after < before, "{before} bytes before, {after} after");
    program.step();
    program.live.images_name = "chain/tip";
    program.live.dump_running(&["--auto-dedup", "--prev-images-dir", "../pre"]);
    assert!(disk_bytes(&base) < after);
    program.assert_holds_now("chain/tip");
    assert_eq!(errors(&program.live.path("chain")), "");
}

#[test]
fn privileged_two_dumps_do_not_share_a_directory() {
    let mut program = Program::start();
    program.step();
    let dir = program.live.path("images");
    fs::create_dir(&dir).unwrap();
    let root = program.live.root.to_string();
    let dump = || {
        let mut command = Command::new(engine());
        command.args(["dump", "-R", "-t", &root, "-D"]).arg(&dir).stdout(Stdio::null());
        command
    };
    let mut first = dump();
    let mut first = first.env("RCRIU_FAULT", "dump-written:stop").spawn().unwrap();
    let children = format!("/proc/{0}/task/{0}/children", first.id());
    let mut worker = 0;
    wait_for("a dump to stop", || {
        assert_eq!(first.try_wait().unwrap(), None, "it is never hit");
        worker = fs::read_to_string(&children).unwrap().trim().parse().unwrap_or(0);
        worker > 0 && state_of(worker) == Some('T')
    });
    let second = dump().env_remove("RCRIU_FAULT").output().unwrap();
    let mut ended = None;
    wait_for("the end of the first", || {
        kill(Pid::from_raw(worker), Signal::SIGCONT).unwrap_or_default();
        ended = first.try_wait().unwrap();
        ended.is_some()
    });
    assert!(ended.unwrap().success());
    assert!(!second.status.success());
    let said = text(&second);
    assert!(said.contains(&format!("is in use by rcriu (pid {worker})")), "{said}");
    program.assert_holds_now("images");
}
