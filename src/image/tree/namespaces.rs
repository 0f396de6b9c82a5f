//! Checks of the namespaces that a tree has of its own.

use super::{Problems, Tree};
use crate::image::{ImageStore, Kind, ipc::Objects, proto};
use proto::{TaskKobjIdsEntry, TimensEntry, UidGidExtent, UsernsEntry, UtsnsEntry};

/// The longest name of a host or domain (`__NEW_UTS_LEN`, `linux/utsname.h`).
const LONGEST_NAME: usize = 64;

/// Returns what is wrong with the names of a UTS namespace, if anything.
pub fn uts_problem(entry: &UtsnsEntry) -> Option<String> {
    let longest = entry.nodename.len().max(entry.domainname.len());
    (longest > LONGEST_NAME).then(|| {
        format!("the host or domain name has {longest} bytes, at most {LONGEST_NAME} expected")
    })
}

/// The nanoseconds of a second.
const NANOSECONDS: u64 = 1_000_000_000;

/// The largest time that a clock of a time namespace can show, in seconds: half of what the kernel
/// can count in nanoseconds (`KTIME_SEC_MAX`, `linux/ktime.h`).
const LAST_SECOND: u64 = i64::MAX.cast_unsigned() / NANOSECONDS / 2;

/// Returns what is wrong with the clocks of a time namespace, if anything.
pub fn time_problem(entry: &TimensEntry) -> Option<String> {
    [&entry.monotonic, &entry.boottime].into_iter().find_map(|time| {
        if time.tv_nsec >= NANOSECONDS {
            Some(format!("a clock has {} nanoseconds, fewer than a second expected", time.tv_nsec))
        } else if time.tv_sec > LAST_SECOND {
            Some(format!("a clock shows {} seconds, at most {LAST_SECOND} expected", time.tv_sec))
        } else {
            None
        }
    })
}

/// The most ranges of a map (`UID_GID_MAP_MAX_EXTENTS`, `linux/user_namespace.h`).
const RANGES_MAX: usize = 340;

/// Returns what is wrong with the maps of a user namespace, if anything.
pub fn user_problem(entry: &UsernsEntry) -> Option<String> {
    [("users", &entry.uid_map), ("groups", &entry.gid_map)].into_iter().find_map(|(name, map)| {
        if map.is_empty() {
            return Some(format!("it maps no {name}, so that no process can have any"));
        }
        if map.len() > RANGES_MAX {
            let ranges = map.len();
            return Some(format!("{ranges} ranges of {name}, at most {RANGES_MAX} expected"));
        }
        map.iter().find_map(|range| {
            let ends = [range.first, range.lower_first].map(|at| at.checked_add(range.count));
            if range.count == 0 {
                Some(format!("a range of {name} from {} on maps no ids", range.first))
            } else if ends.contains(&None) {
                let UidGidExtent { first, lower_first, count } = range;
                Some(format!(
                    "a range of {name} has {count} ids from {first} and {lower_first} on, beyond \
                     the last one"
                ))
            } else {
                None
            }
        })
    })
}

/// Checks the namespaces of the tree: their images, and that all processes are in those of which a
/// tree can have only one.
pub(super) fn check(images: &dyn ImageStore, tree: &Tree, problems: &mut Problems) {
    for number in own(tree, problems, ("UTS", true), |ids| ids.uts_ns_id).0 {
        check_image(images, problems, (Kind::Utsns, number), uts_problem);
    }
    for number in own(tree, problems, ("IPC", true), |ids| ids.ipc_ns_id).0 {
        check_ipc(images, number, problems);
    }
    for number in own(tree, problems, ("user", false), |ids| ids.user_ns_id).0 {
        check_image(images, problems, (Kind::Userns, number), user_problem);
    }
    let (own, is_dumpers) = own(tree, problems, ("time", false), |ids| ids.time_ns_id);
    for number in own {
        check_image(images, problems, (Kind::Timens, number), time_problem);
    }
    if is_dumpers && !matches!(images.message_if_any::<TimensEntry>(Kind::Timens, 0), Ok(None)) {
        // The clocks of the dumper.
        check_image(images, problems, (Kind::Timens, 0), time_problem);
    }
}

/// Checks the image of a namespace.
fn check_image<M: prost::Message + prost::Name + Default>(
    images: &dyn ImageStore,
    problems: &mut Problems,
    (kind, number): (Kind, u32),
    problem: fn(&M) -> Option<String>,
) {
    let name = kind.file_name(number.into());
    let image = images.message::<M>(kind, number.into());
    if let Some(entry) = problems.own_image(&name, image)
        && let Some(problem) = problem(&entry)
    {
        problems.broken(format!("{name}: {problem}"));
    }
}

/// Returns the namespaces of a kind that the tree has for itself, and whether a process is in that of
/// the dumper. Checks that all processes are in the same one, unless a tree may have several.
fn own(
    tree: &Tree,
    problems: &mut Problems,
    (name, several): (&str, bool),
    field: fn(&TaskKobjIdsEntry) -> Option<u32>,
) -> (Vec<u32>, bool) {
    let dumper = tree.inventory.root_ids.and_then(|ids| field(&ids));
    let Some(dumper) = dumper else { return (Vec::new(), false) };
    let mut numbers = Vec::new();
    for task in &tree.tasks {
        let Some(number) = task.body.as_ref().and_then(|body| field(&body.ids)) else { continue };
        let first = *numbers.first().unwrap_or(&number);
        if number != first && !several {
            let pid = task.entry.pid;
            problems.not_restored(format!(
                "process {pid} is in the {name} namespace {number}, and others of the tree are in {first}"
            ));
        } else if !numbers.contains(&number) {
            numbers.push(number);
        }
    }
    let is_dumpers = numbers.contains(&dumper);
    numbers.retain(|number| *number != dumper);
    (numbers, is_dumpers)
}

fn check_ipc(images: &dyn ImageStore, number: u32, problems: &mut Problems) {
    let name = Kind::IpcVar.file_name(number.into());
    if let Some(objects) = problems.own_image(&name, Objects::read(images, number))
        && let Some(problem) = objects.problem()
    {
        problems.broken(format!("images of IPC namespace {number}: {problem}"));
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::image::{
        Directory, SnapshotWriter,
        tree::{ArenaIds, Body, Task},
    };

    fn ids(uts: u32) -> TaskKobjIdsEntry {
        TaskKobjIdsEntry { uts_ns_id: Some(uts), user_ns_id: Some(7), ..Default::default() }
    }

    /// Returns the problems of a tree in namespaces with these numbers.
    fn found(dir: &Path, numbers: &[TaskKobjIdsEntry]) -> Vec<String> {
        let inventory = proto::InventoryEntry { root_ids: Some(ids(4)), ..Default::default() };
        let images = SnapshotWriter::begin(dir).unwrap();
        let names = |len| UtsnsEntry { nodename: vec![b'x'; len], domainname: Vec::new() };
        images.write(Kind::Utsns, 12, &[names(LONGEST_NAME)]).unwrap();
        images.write(Kind::Utsns, 13, &[names(LONGEST_NAME + 1)]).unwrap();
        let mut tree = Tree { inventory, ..Tree::default() };
        for (pid, ids) in (1..).zip(numbers) {
            tree.tasks.push(Task {
                entry: proto::PstreeEntry { pid, ..Default::default() },
                parent: None,
                threads: Vec::new(),
                ids: ArenaIds::default(),
                body: Some(Body {
                    mm: proto::MmEntry::default(),
                    vmas: Vec::new(),
                    guards: Vec::new(),
                    fs: proto::FsEntry::default(),
                    fds: Vec::new(),
                    ids: *ids,
                }),
            });
        }
        images.sync(|_| {}).unwrap();
        images.commit(&tree.inventory).unwrap();
        let mut problems = Problems::default();
        check(&Directory::at(dir), &tree, &mut problems);
        problems.0.into_iter().map(|problem| problem.text).collect()
    }

    #[test]
    fn the_image_of_an_own_namespace_exists_and_has_names_that_fit() {
        let dir = tempfile::tempdir().unwrap();
        let found = |numbers: &[u32]| {
            let ids: Vec<_> = numbers.iter().map(|number| ids(*number)).collect();
            found(dir.path(), &ids)
        };
        assert_eq!(found(&[4, 4]), [""; 0]);
        assert_eq!(found(&[12, 12, 4]), [""; 0]);
        let long = "utsns-13.img: the host or domain name has 65 bytes, at most 64 expected";
        assert_eq!(found(&[12, 13]), [long]);
        assert_eq!(found(&[14]), ["there is no utsns-14.img"]);
    }

    #[test]
    fn all_processes_are_in_one_user_namespace() {
        let dir = tempfile::tempdir().unwrap();
        let other = TaskKobjIdsEntry { user_ns_id: Some(15), ..ids(4) };
        let apart = "process 2 is in the user namespace 15, and others of the tree are in 7";
        assert_eq!(found(dir.path(), &[ids(4), other]), [apart]);
    }
}
