//! Which process of a tree makes which others, so that each has its true parent and
//! session.
//!
//! A process can share something (`clone(2)`) only with the process that makes it. That is
//! its parent, or a sibling if the parent does not share it.
//!
//! A session is inherited: a process of session S must be made by a process that is in S at
//! that time. Usually that is its parent, before or after the parent starts a session of
//! its own. If the parent is in another session, because it has adopted the process,
//! another member of S makes the process as its own sibling (`CLONE_PARENT`). If the leader
//! of a session or group has ended, a helper process takes its place as a placeholder, and
//! ends before the tree runs.

use super::{Arena, ArenaIds, Task};
use crate::units::NsPid;

/// What decides which process makes a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kin {
    /// Its pid.
    pub pid: NsPid,
    /// The position of its parent; `None` for the root.
    pub parent: Option<usize>,
    /// Its session.
    pub session: NsPid,
    /// What it may share with others.
    pub ids: ArenaIds,
    /// Its pid namespace. One in another namespace than its parent is the first process there.
    pub space: u64,
}

impl Kin {
    /// Returns what decides how these processes are made.
    pub fn of(tasks: &[Task]) -> Vec<Self> {
        let mut all: Vec<Self> = Vec::with_capacity(tasks.len());
        for Task { entry, parent, ids, body, .. } in tasks {
            let own = body.as_ref().and_then(|body| body.ids.pid_ns_id).map(u64::from);
            // That of a dead process is not known, and does not matter.
            let above = parent.map_or(0, |parent| all[parent].space);
            let (pid, session) = (NsPid::of_image(entry.pid), NsPid::of_image(entry.sid));
            let space = own.unwrap_or(above);
            all.push(Self { pid, parent: *parent, session, ids: *ids, space });
        }
        all
    }
}

/// Whether the leader of a session or group is not a process of the tree.
fn is_outside(tasks: &[Kin], leader: NsPid) -> bool {
    !tasks.iter().any(|task| task.pid == leader)
}

/// Returns what a process shares with processes before it, and the first of those.
fn shared(tasks: &[Kin], position: usize) -> Vec<(Arena, usize)> {
    let task = &tasks[position];
    let with = |arena| tasks[..position].iter().position(|other| other.ids.share(&task.ids, arena));
    Arena::ALL.into_iter().filter_map(|arena| Some((arena, with(arena)?))).collect()
}

/// The maker of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Maker {
    /// This program.
    Director,
    /// The task at this position.
    Task(usize),
    /// The helper at this position.
    Helper(usize),
}

/// How a process is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Birth {
    /// Who makes it.
    pub maker: Maker,
    /// The maker makes it as its own sibling (`CLONE_PARENT`).
    pub sibling: bool,
    /// The maker makes it before it starts a session of its own.
    pub early: bool,
}

/// A process that exists only during the restore.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HelperPlan {
    /// Its pid.
    pub pid: NsPid,
    /// The process that makes it, which becomes its parent.
    pub maker: Maker,
    /// Whether it leads a session, or only a group.
    pub session: bool,
}

/// Which process makes which.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Births {
    /// By position of the process; complete once planned.
    pub tasks: Vec<Option<Birth>>,
    /// Processes that exist only during the restore.
    pub helpers: Vec<HelperPlan>,
}

impl Births {
    /// Decides which process makes which.
    ///
    /// # Errors
    /// A process that cannot be restored, and why.
    pub fn plan(tasks: &[Kin], shell_job: bool, sibling: bool) -> Result<Self, (NsPid, String)> {
        let mut births = Self { tasks: vec![None; tasks.len()], helpers: Vec::new() };
        let Some(root) = tasks.first() else { return Ok(births) };
        let led_by_another =
            root.session != root.pid && !(shell_job && is_outside(tasks, root.session));
        if sibling && led_by_another {
            let problem = format!(
                "the leader of its session, {}, has ended, and --restore-sibling would make the \
                 placeholder a child of rcriu's parent\nhelp: leave that option out",
                root.session
            );
            return Err((root.pid, problem));
        }
        for (position, task) in tasks.iter().enumerate() {
            let birth = births.of(tasks, position, task, shell_job)?;
            births.tasks[position] = Some(birth);
        }
        Ok(births)
    }

    fn of(
        &mut self,
        tasks: &[Kin],
        position: usize,
        task: &Kin,
        shell_job: bool,
    ) -> Result<Birth, (NsPid, String)> {
        let natural = |maker| Birth { maker, sibling: false, early: false };
        let Some(parent) = task.parent else {
            let own_session = task.session == task.pid;
            if own_session || shell_job && is_outside(tasks, task.session) {
                return Ok(natural(Maker::Director));
            }
            let helper = self.helper(task.session, Maker::Director);
            return Ok(Birth { maker: helper, sibling: true, early: false });
        };
        let above = &tasks[parent];
        let shared = shared(tasks, position);
        let fits = |maker: &Kin| shared.iter().all(|(arena, _)| maker.ids.share(&task.ids, *arena));
        let own_session = task.session == task.pid;
        if fits(above) {
            if own_session || task.session == above.session {
                return Ok(natural(Maker::Task(parent)));
            }
            if above.session == above.pid
                && self.session_at_birth(tasks, parent) == Some(task.session)
            {
                return Ok(Birth { maker: Maker::Task(parent), sibling: false, early: true });
            }
        }
        // A sibling of the same session that has been made already, preferably the session
        // leader.
        let sibling = (0..position)
            .filter(|other| {
                let other = &tasks[*other];
                let same_session = own_session || other.session == task.session;
                // The first process of a pid namespace has no siblings there (clone(2)).
                let same_space = other.space == above.space;
                other.parent == Some(parent) && same_session && same_space && fits(other)
            })
            .min_by_key(|other| tasks[*other].pid != task.session);
        if let Some(sibling) = sibling {
            return Ok(Birth { maker: Maker::Task(sibling), sibling: true, early: false });
        }
        if let Some((arena, other)) = shared.first() {
            let problem = format!(
                "it shares its {} with process {}, but no parent or sibling of its session could \
                 make it so",
                arena.name(),
                tasks[*other].pid
            );
            return Err((task.pid, problem));
        }
        if !is_outside(tasks, task.session) {
            let problem = format!(
                "it is in the session of process {}, which is neither its parent nor a child of its parent",
                task.session
            );
            return Err((task.pid, problem));
        }
        let helper = self.helper(task.session, Maker::Task(parent));
        Ok(Birth { maker: helper, sibling: true, early: false })
    }

    /// Returns the helper that leads a session; adds one under `maker` if there is none
    /// yet.
    fn helper(&mut self, pid: NsPid, maker: Maker) -> Maker {
        let found = self.helpers.iter().position(|helper| helper.pid == pid);
        Maker::Helper(found.unwrap_or_else(|| {
            self.helpers.push(HelperPlan { pid, maker, session: true });
            self.helpers.len() - 1
        }))
    }

    /// Returns the session in which a task is made; `None` for that of rcriu.
    fn session_at_birth(&self, tasks: &[Kin], position: usize) -> Option<NsPid> {
        let birth = self.tasks[position]?;
        match birth.maker {
            Maker::Director => None,
            Maker::Helper(helper) => Some(self.helpers[helper].pid),
            Maker::Task(maker) if birth.early => self.session_at_birth(tasks, maker),
            Maker::Task(maker) => Some(tasks[maker].session),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Processes with these pids, parents, sessions and descriptor tables.
    fn kin<const N: usize>(tasks: [(i32, Option<usize>, i32, u32); N]) -> [Kin; N] {
        tasks.map(|(pid, parent, session, files)| {
            let mut ids = ArenaIds::default();
            ids.set(Arena::Files, files);
            let (pid, session) = (NsPid::of_image(pid), NsPid::of_image(session));
            Kin { pid, parent, session, ids, space: 0 }
        })
    }

    #[test]
    fn the_first_process_of_a_pid_namespace_makes_no_siblings() {
        let mut tasks = kin([(5, None, 5, 1), (6, Some(0), 5, 2), (7, Some(0), 5, 2)]);
        let maker = |tasks: &[Kin]| Births::plan(tasks, false, false).map(|births| births.tasks[2]);
        tasks[2].space = 9;
        let by_sibling = Birth { maker: Maker::Task(1), sibling: true, early: false };
        assert_eq!(maker(&tasks), Ok(Some(by_sibling)));
        tasks[1].space = 8;
        assert!(maker(&tasks).is_err());
    }

    #[test]
    fn who_shares_is_made_by_who_has_it() {
        let maker = |tasks: &[Kin]| {
            let births = Births::plan(tasks, false, false)?;
            let last = births.tasks.last().copied().flatten().expect("all are there");
            Ok::<_, (NsPid, String)>((last.maker, last.sibling))
        };
        let by_parent = kin([(5, None, 5, 1), (6, Some(0), 5, 2), (7, Some(0), 5, 1)]);
        assert_eq!(maker(&by_parent), Ok((Maker::Task(0), false)));
        let by_sibling = kin([(5, None, 5, 1), (6, Some(0), 5, 2), (7, Some(0), 5, 2)]);
        assert_eq!(maker(&by_sibling), Ok((Maker::Task(1), true)));
        let leader = kin([(5, None, 5, 1), (6, Some(0), 5, 2), (7, Some(0), 7, 2)]);
        assert_eq!(maker(&leader), Ok((Maker::Task(1), true)));
        let by_nobody = kin([(5, None, 5, 1), (6, Some(0), 5, 2), (7, Some(1), 5, 1)]);
        let (pid, problem) = maker(&by_nobody).unwrap_err();
        assert_eq!(pid.raw(), 7);
        assert!(problem.contains("shares its descriptor table with process 5"), "{problem}");
    }
}
