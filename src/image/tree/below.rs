//! The pid namespaces below that of a tree, which `pstree.img` describes as an extension.
//!
//! A process is in the namespace of its parent, or is the first one of a namespace directly below. The
//! `ids` of a process name its namespace; `rcriu_pids` and the like have its numbers, one for each
//! namespace on the way down.

use std::collections::{BTreeMap, BTreeSet};

use super::Task;
use crate::units::{Below, NsPid};

/// The number of the first process of a pid namespace.
const FIRST: u32 = 1;

/// Reads the numbers in the namespaces below that of the tree.
///
/// # Errors
/// The pid of a process, and what is wrong with its numbers.
pub fn below(tasks: &[Task]) -> Result<Below, (u32, String)> {
    let mut below = Below::default();
    // The namespaces of each process so far.
    let mut paths: Vec<Vec<u32>> = Vec::with_capacity(tasks.len());
    let space_of = |task: &Task| task.body.as_ref().and_then(|body| body.ids.pid_ns_id);
    let home = tasks.first().and_then(space_of);
    let mut taken: BTreeMap<u32, BTreeSet<u32>> = BTreeMap::new();
    for task in tasks {
        let entry = &task.entry;
        let above = task.parent.map_or(&[][..], |parent| paths[parent].as_slice());
        let here = above.last().copied().or(home);
        let mut path = above.to_vec();
        if let (Some(own), Some(here)) = (space_of(task), here)
            && own != here
        {
            let is_first = entry.rcriu_pids.len() == path.len() + 1
                && entry.rcriu_pids.last() == Some(&FIRST)
                && Some(own) != home
                && !taken.contains_key(&own);
            if !is_first {
                return Err((
                    entry.pid,
                    format!(
                        "it is in the pid namespace {own} and its parent in {here}, but it is not the \
                         first process of a namespace below that of its parent"
                    ),
                ));
            }
            path.push(own);
        }
        // Only the first process of a namespace can be dead while its parent is outside: then the
        // namespace is gone.
        let is_whole = |numbers: &[u32], threads: usize| {
            let expected = path.len() * threads;
            numbers.len() == expected || task.body.is_none() && numbers.len() > expected
        };
        let threads = entry.threads.len();
        let lists = [(&entry.rcriu_pids, 1), (&entry.rcriu_groups, 1), (&entry.rcriu_sessions, 1)];
        let lists = lists.into_iter().chain([(&entry.rcriu_tids, threads)]);
        if !lists.into_iter().all(|(numbers, threads)| is_whole(numbers, threads)) {
            let what = format!(
                "it does not have one number in each of the {} pid namespaces that it is in below that of \
                 the tree",
                path.len()
            );
            return Err((entry.pid, what));
        }
        let mut add = |pid: u32, numbers: &[u32]| {
            let known = numbers.iter().take_while(|number| **number != 0);
            let numbers = path.iter().zip(known).map(|(space, number)| {
                // A number that no process can have fails when it is chosen.
                (u64::from(*space), i32::try_from(*number).unwrap_or(-1))
            });
            let numbers: Vec<_> = numbers.collect();
            if !numbers.is_empty() {
                below.add(NsPid::of_image(pid), numbers);
            }
        };
        add(entry.pgid, &entry.rcriu_groups);
        add(entry.sid, &entry.rcriu_sessions);
        add(entry.pid, &entry.rcriu_pids);
        let depth = path.len().max(1);
        let of_threads = entry.threads.iter().zip(entry.rcriu_tids.chunks(depth));
        of_threads.clone().for_each(|(tid, numbers)| add(*tid, numbers));
        for (space, position) in path.iter().zip(0..) {
            let own = [entry.rcriu_pids[position]];
            let others = of_threads.clone().filter(|(tid, _)| **tid != entry.pid);
            let others = others.map(|(_, numbers)| numbers[position]);
            for number in own.into_iter().chain(others) {
                if number == 0 || !taken.entry(*space).or_default().insert(number) {
                    let what = format!(
                        "its number {number} in the pid namespace {space} is not one of its own there"
                    );
                    return Err((entry.pid, what));
                }
            }
        }
        paths.push(path);
    }
    check_children(tasks, &paths)?;
    Ok(below)
}

/// Checks the pid namespaces that the children of processes will be in: each has its first process in the
/// tree, and is below that of the process itself.
fn check_children(tasks: &[Task], paths: &[Vec<u32>]) -> Result<(), (u32, String)> {
    for (task, path) in tasks.iter().zip(paths) {
        let core = task.threads.first().and_then(|(_, core)| core.tc.as_ref());
        let Some(first) = core.and_then(|core| core.rcriu_children_pid_ns) else { continue };
        let is_first = |(other, below): (&Task, &Vec<u32>)| {
            other.entry.pid == first
                && other.body.is_some()
                && other.entry.rcriu_pids.last() == Some(&FIRST)
                && below.len() > path.len()
                && below.starts_with(path)
        };
        if !tasks.iter().zip(paths).any(is_first) {
            let what = format!(
                "its children are to be in the pid namespace of process {first}, which is not the first one \
                 of a namespace below that of the process"
            );
            return Err((task.entry.pid, what));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::{
        proto::{FsEntry, MmEntry, PstreeEntry, TaskKobjIdsEntry},
        tree::{ArenaIds, Body},
    };

    /// A process with this pid and parent, in this namespace, with these numbers below.
    fn task(pid: u32, parent: Option<usize>, space: u32, numbers: &[u32]) -> Task {
        let entry = PstreeEntry {
            pid,
            pgid: pid,
            sid: pid,
            threads: vec![pid],
            rcriu_pids: numbers.to_vec(),
            rcriu_groups: numbers.to_vec(),
            rcriu_sessions: vec![0; numbers.len()],
            rcriu_tids: numbers.to_vec(),
            ..Default::default()
        };
        let ids = TaskKobjIdsEntry { pid_ns_id: Some(space), ..Default::default() };
        let (mm, fs) = (MmEntry::default(), FsEntry::default());
        let body = Body { mm, vmas: Vec::new(), guards: Vec::new(), fs, fds: Vec::new(), ids };
        Task { entry, parent, threads: Vec::new(), ids: ArenaIds::default(), body: Some(body) }
    }

    #[test]
    fn numbers_below_are_read_and_checked() {
        let good = [
            task(7, None, 1, &[]),
            task(8, Some(0), 17, &[1]),
            task(9, Some(1), 17, &[2]),
            task(10, Some(1), 18, &[3, 1]),
        ];
        let found = below(&good).unwrap();
        assert_eq!(found.begun_by(NsPid::of_image(8)), Some(17));
        assert_eq!(found.begun_by(NsPid::of_image(9)), None);
        assert_eq!(found.numbers(NsPid::of_image(10)), [(17, 3), (18, 1)]);
        assert!(below(&good[..1]).unwrap().is_empty());
        let mut dead = task(11, Some(0), 17, &[1]);
        dead.body = None;
        assert!(below(&[good[0].clone(), dead]).unwrap().is_empty());
        for (last, expected) in [
            (task(11, Some(0), 17, &[4]), "not the first process"),
            (task(11, Some(0), 19, &[1, 1]), "not the first process"),
            (task(11, Some(1), 1, &[]), "not the first process"),
            (task(11, Some(1), 17, &[]), "each of the 1 pid namespaces"),
            (task(11, Some(1), 17, &[2]), "number 2 in the pid namespace 17"),
            (task(11, Some(1), 17, &[0]), "number 0 in the pid namespace 17"),
        ] {
            let tasks: Vec<Task> = good.iter().cloned().chain([last]).collect();
            let (pid, problem) = below(&tasks).unwrap_err();
            assert_eq!(pid, 11);
            assert!(problem.contains(expected), "{problem}");
        }
    }
}
