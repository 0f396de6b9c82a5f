//! Checks of how processes are related.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::{Arena, Arenas, Births, Kin, Problems, Task, below, state};
use crate::image::proto;

/// The highest possible pid on any machine (`PID_MAX_LIMIT`, `linux/threads.h`).
const HIGHEST_PID: u32 = 1 << 22;

fn is_pid(number: u32) -> bool {
    (1..=HIGHEST_PID).contains(&number)
}

/// Sorts processes so that parents come before their children, and returns each with the
/// position of its parent.
pub(super) fn order(
    entries: Vec<proto::PstreeEntry>,
) -> Result<Vec<(proto::PstreeEntry, Option<usize>)>, String> {
    let known: BTreeSet<u32> = entries.iter().map(|entry| entry.pid).collect();
    if known.len() != entries.len() {
        return Err("pstree.img names a process twice".into());
    }
    if let Some(bad) = entries.iter().find(|entry| !is_pid(entry.pid)) {
        return Err(format!("pstree.img names a process {}", bad.pid));
    }
    let roots = entries.iter().filter(|entry| !known.contains(&entry.ppid)).count();
    if roots != 1 {
        return Err(format!("pstree.img has {roots} processes without a parent, one expected"));
    }
    let mut children: HashMap<u32, Vec<proto::PstreeEntry>> = HashMap::new();
    let mut ordered: Vec<(proto::PstreeEntry, Option<usize>)> = Vec::new();
    for entry in entries {
        if known.contains(&entry.ppid) {
            children.entry(entry.ppid).or_default().push(entry);
        } else {
            ordered.push((entry, None));
        }
    }
    let mut next = 0;
    while next < ordered.len() {
        for child in children.remove(&ordered[next].0.pid).unwrap_or_default() {
            ordered.push((child, Some(next)));
        }
        next += 1;
    }
    if children.is_empty() {
        Ok(ordered)
    } else {
        Err("the parents in pstree.img form a circle".into())
    }
}

/// Checks threads, groups and sessions against each other.
pub(super) fn check(tasks: &[Task], problems: &mut Problems) {
    let mut owners: BTreeMap<u32, u32> = BTreeMap::new();
    for task in tasks {
        let pid = task.entry.pid;
        for (tid, _) in &task.threads {
            if !is_pid(*tid) {
                problems.broken(format!("images of process {pid}: it has a thread {tid}"));
            }
            if let Some(other) = owners.insert(*tid, pid) {
                problems.broken(format!(
                    "images of process {pid}: thread {tid} is also a thread of process {other}"
                ));
            }
        }
    }
    let of: BTreeMap<u32, &Task> = tasks.iter().map(|task| (task.entry.pid, task)).collect();
    if tasks.first().is_some_and(is_dead) {
        problems.broken("the first process of the tree is dead, so nothing can be restored");
    }
    // The session of each group: the kernel allows only one.
    let mut sessions: BTreeMap<u32, u32> = BTreeMap::new();
    for task in tasks {
        let (pid, group, session) = (task.entry.pid, task.entry.pgid, task.entry.sid);
        let mut wrong =
            |problem: String| problems.broken(format!("images of process {pid}: {problem}"));
        if session == pid && group != pid {
            wrong(format!("it leads its session, but is in the process group {group}"));
        }
        for (what, number) in [("process group", group), ("session", session)] {
            // 0 stands for a leader outside of the tree's pid namespace.
            if number > HIGHEST_PID {
                wrong(format!("its {what} is {number}"));
            } else if owners.contains_key(&number) && !of.contains_key(&number) {
                wrong(format!("its {what}, {number}, is the tid of a thread"));
            }
        }
        if *sessions.entry(group).or_insert(session) != session {
            wrong(format!("its process group {group} spans two sessions"));
        }
        if let Some(leader) = of.get(&session)
            && leader.entry.sid != session
        {
            wrong(format!("it is in the session of process {session}, which leads no session"));
        }
        if let Some(leader) = of.get(&group)
            && leader.entry.pgid != group
        {
            problems.not_restored(format!(
                "process {pid} cannot be restored: process {group}, whose process group it is in, \
                 has left that group"
            ));
        }
    }
    let arenas = Arenas::new(tasks.iter().map(|task| task.ids).collect());
    for (position, task) in tasks.iter().enumerate() {
        let other = arenas.owner(Arena::Handlers, position);
        if arenas.owner(Arena::Memory, position) != arenas.owner(Arena::Memory, other) {
            let (pid, other) = (task.entry.pid, tasks[other].entry.pid);
            problems.broken(format!(
                "images of process {pid}: it shares its signal handlers with process {other}, but \
                 not its memory"
            ));
        }
    }
    if let Err((pid, problem)) = Births::plan(&Kin::of(tasks), true, false) {
        problems.not_restored(format!("process {pid} cannot be restored: {problem}"));
    }
    if let Err((pid, problem)) = below(tasks) {
        problems.not_restored(format!("process {pid} cannot be restored: {problem}"));
    }
}

fn is_dead(task: &Task) -> bool {
    let state = |core: &proto::CoreEntry| core.tc.as_ref().map(|task| task.task_state);
    task.threads.first().is_some_and(|(_, core)| state(core) == Some(state::DEAD))
}

#[cfg(test)]
mod tests {
    use super::{super::ArenaIds, *};

    #[test]
    fn parents_come_first_and_nonsense_is_refused() {
        let entry = |pid, ppid| proto::PstreeEntry { pid, ppid, ..Default::default() };
        let pids = |entries| {
            order(entries)
                .map(|ordered| ordered.iter().map(|(e, p)| (e.pid, *p)).collect::<Vec<_>>())
        };
        assert_eq!(
            pids(vec![entry(3, 2), entry(1, 0), entry(2, 1)]).unwrap(),
            [(1, None), (2, Some(0)), (3, Some(1))]
        );
        assert!(pids(vec![entry(1, 0), entry(2, 0)]).unwrap_err().contains("2 processes"));
        assert!(pids(vec![entry(1, 0), entry(2, 3), entry(3, 2)]).unwrap_err().contains("circle"));
        assert!(pids(vec![entry(1, 0), entry(1, 0)]).unwrap_err().contains("twice"));
        assert!(pids(vec![entry(0, 7)]).unwrap_err().contains("process 0"));
        assert!(pids(vec![entry(1 << 30, 7)]).unwrap_err().contains("process 1073741824"));
    }

    #[test]
    fn groups_sessions_and_threads_that_cannot_be_are_told() {
        let told = |entries: &[(u32, u32, u32, u32, &[u32])]| {
            let entries =
                entries.iter().map(|(pid, ppid, pgid, sid, threads)| proto::PstreeEntry {
                    pid: *pid,
                    ppid: *ppid,
                    pgid: *pgid,
                    sid: *sid,
                    threads: threads.to_vec(),
                    ..Default::default()
                });
            let ordered = order(entries.collect()).unwrap();
            let tasks: Vec<Task> = ordered
                .into_iter()
                .map(|(entry, parent)| {
                    let core = |tid: &u32| (*tid, proto::CoreEntry::default());
                    let threads = entry.threads.iter().map(core).collect();
                    Task { entry, parent, threads, ids: ArenaIds::default(), body: None }
                })
                .collect();
            let mut problems = Problems::default();
            check(&tasks, &mut problems);
            problems.0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
        };
        assert_eq!(told(&[(5, 0, 5, 5, &[5, 6]), (7, 5, 7, 5, &[7]), (8, 5, 7, 5, &[8])]), "");
        for (entries, expected) in [
            (
                &[(5, 0, 5, 5, &[5, 6][..]), (7, 5, 7, 5, &[7, 6])][..],
                "is also a thread of process 5",
            ),
            (&[(5, 0, 4, 5, &[5])], "leads its session, but"),
            (&[(5, 0, 6, 5, &[5, 6])], "is the tid of a thread"),
            (&[(5, 0, 5, 5, &[5]), (7, 5, 7, 7, &[7]), (8, 5, 7, 5, &[8])], "spans two sessions"),
            (&[(5, 0, 5, 5, &[5]), (7, 5, 7, 5, &[7]), (8, 5, 8, 7, &[8])], "leads no session"),
            (&[(5, 0, 5, 5, &[5]), (7, 5, 5, 5, &[7]), (8, 5, 7, 5, &[8])], "has left that group"),
            (&[(5, 0, 5, 5, &[5, 0])], "has a thread 0"),
        ] {
            let told = told(entries);
            assert!(told.contains(expected), "{expected}: {told}");
        }
    }
}
