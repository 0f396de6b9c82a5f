//! User namespaces: which users and groups there are inside, and who they are outside.
//!
//! All numbers of users and groups in the images are those inside; an [`IdMap`] translates them. The
//! first process is made in the new namespace, together with the other new namespaces, which then
//! belong to it. rcriu writes the maps, and the process becomes the root inside before anything else
//! happens to it.

use std::{
    collections::BTreeSet,
    fmt::Write,
    fs, io,
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    libc,
    unistd::{getegid, geteuid},
};

use super::{Building, Dumped, KINDS, Namespace, Options, Restoring, wrong};
use crate::{
    causes::tell,
    image::{
        ImageStore, Kind, SnapshotWriter,
        proto::{UidGidExtent, UsernsEntry},
        tree::user_problem,
    },
    inject::{Script, Task, living},
    proc::{self, Status},
    res::{ResError, Result},
    sys::namespace,
    units::{HostId, HostPid, IdMap, IdRange},
};

/// Its name in `/proc/PID/ns`.
pub(super) const FILE: &str = "user";

/// What `/proc/PID/setgroups` shows if processes cannot change their groups.
const DENY: &str = "deny";

#[derive(Debug)]
pub(super) struct User;

impl Namespace for User {
    fn clone_flag(&self) -> u64 {
        u64::from(libc::CLONE_NEWUSER.cast_unsigned())
    }

    fn check(&self, of: &Dumped<'_>) -> Result<()> {
        let (tasks, ids) = (of.tasks, of.ids);
        for task in living(tasks) {
            for thread in &task.threads {
                check_ids(task.pid, &proc::thread_status(task.pid, thread.tid)?, ids)?;
            }
        }
        living(tasks).next().map_or(Ok(()), check_owners)
    }

    fn dump(&self, of: &Dumped<'_>, images: &SnapshotWriter) -> Result<()> {
        let extents = |ranges: Vec<IdRange>| {
            let extent = |range: IdRange| UidGidExtent {
                first: range.inside,
                lower_first: range.outside,
                count: range.count,
            };
            ranges.into_iter().map(extent).collect()
        };
        let path = PathBuf::from(format!("/proc/{}/setgroups", of.pid));
        let setgroups =
            fs::read_to_string(&path).map_err(|source| ResError::Read { path, source })?;
        let entry = UsernsEntry {
            uid_map: extents(proc::user_map(of.pid)?),
            gid_map: extents(proc::group_map(of.pid)?),
            rcriu_setgroups_denied: (setgroups.trim_end() == DENY).then_some(true),
        };
        Ok(images.write(Kind::Userns, of.number.into(), &[entry])?)
    }

    fn restore(
        &self,
        images: &dyn ImageStore,
        number: u32,
        _: &Options,
    ) -> Result<Box<dyn Restoring>> {
        let entry: UsernsEntry = images.message(Kind::Userns, number.into())?;
        if let Some(problem) = user_problem(&entry) {
            return Err(wrong(number, &problem));
        }
        Ok(Box::new(Maps(entry)))
    }
}

/// Returns the map of the ids of a stopped tree.
pub(super) fn map(tasks: &[Task]) -> Result<IdMap> {
    let first = living(tasks).next().map(Task::witness);
    let Some(first) = first.filter(|first| proc::is_in_other_namespace(*first, FILE)) else {
        return Ok(IdMap::of_own_namespace());
    };
    Ok(IdMap::new(proc::user_map(first)?, proc::group_map(first)?))
}

/// Refuses a thread with ids that its namespace does not map: inside, there are no such numbers to
/// give it.
fn check_ids(pid: HostPid, status: &Status, ids: &IdMap) -> Result<()> {
    let four = |ids: crate::proc::Ids| [ids.real, ids.effective, ids.saved, ids.fs];
    let user = four(status.uids).into_iter().find(|id| !ids.has_user(HostId(*id)));
    let group = four(status.gids).into_iter().find(|id| !ids.has_group(HostId(*id)));
    let what = match (user, group) {
        (None, None) => return Ok(()),
        (Some(user), _) => format!("has user {user}"),
        (None, Some(group)) => format!("has group {group}"),
    };
    Err(ResError::Refused {
        pid,
        what: format!("{what}, which its user namespace does not map"),
        help: "map it (user_namespaces(7)), or give the process a user and a group that are mapped",
    })
}

/// Refuses namespaces of a tree that its user namespace does not own: all that a restore makes belong
/// to the new one.
fn check_owners(task: &Task) -> Result<()> {
    let first = task.witness();
    let users = proc::namespace(first, FILE)?;
    let ours = proc::namespace(HostPid::own(), FILE)?;
    if namespace::parent(Path::new(&format!("/proc/{first}/ns/{FILE}"))).ok() != Some(ours) {
        tell(
            log::Level::Warn,
            "the user namespace of the tree is nested in others below that of rcriu: a restore makes it \
             directly below that of rcriu restore, with the same ids",
        );
    }
    for kind in KINDS.iter().filter(|kind| kind.file != FILE) {
        if !proc::is_in_other_namespace(first, kind.file) {
            continue;
        }
        let path = PathBuf::from(format!("/proc/{first}/ns/{}", kind.file));
        let owner = namespace::owner(&path);
        if owner.as_ref().is_ok_and(|owner| *owner == users) {
            continue;
        }
        return Err(ResError::Refused {
            pid: task.pid,
            what: format!(
                "has {} that belongs to another user namespace than its own, {users}",
                kind.name
            ),
            help: "dump trees whose namespaces were made inside of their user namespace, as `unshare -U` \
                   with further options makes them",
        });
    }
    Ok(())
}

/// The maps of a namespace to be restored.
#[derive(Debug)]
struct Maps(UsernsEntry);

impl Maps {
    /// Writes the maps of the namespace of a process.
    fn write(&self, first: HostPid) -> io::Result<()> {
        let Self(entry) = self;
        let write = |file: &str, text: &str| fs::write(format!("/proc/{first}/{file}"), text);
        write("uid_map", &text(&entry.uid_map))?;
        if entry.rcriu_setgroups_denied == Some(true) {
            write("setgroups", DENY)?;
        }
        match write("gid_map", &text(&entry.gid_map)) {
            // An ordinary user may map a group only where groups cannot be changed.
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
                write("setgroups", DENY)?;
                write("gid_map", &text(&entry.gid_map))
            }
            result => result,
        }
    }
}

impl Restoring for Maps {
    fn ids(&self) -> Option<IdMap> {
        let ranges = |extents: &[UidGidExtent]| {
            let range = |extent: &UidGidExtent| IdRange {
                inside: extent.first,
                outside: extent.lower_first,
                count: extent.count,
            };
            extents.iter().map(range).collect()
        };
        Some(IdMap::new(ranges(&self.0.uid_map), ranges(&self.0.gid_map)))
    }

    fn build(&mut self, on: &Building<'_>) -> Result<()> {
        let first = on.first;
        self.write(first).map_err(|source| {
            if source.raw_os_error() != Some(libc::EPERM) {
                return ResError::Write { path: format!("/proc/{first}/uid_map").into(), source };
            }
            let ids = |extents: &[UidGidExtent]| {
                let of = |extent: &UidGidExtent| (extent.lower_first, extent.count);
                extents.iter().map(of).collect::<BTreeSet<_>>()
            };
            ResError::Maps {
                user: geteuid().as_raw(),
                group: getegid().as_raw(),
                users: list(&ids(&self.0.uid_map)),
                groups: list(&ids(&self.0.gid_map)),
                source: Errno::EPERM,
            }
        })
    }

    fn script(&self) -> Script {
        let mut script = Script::new();
        for (what, call, extents) in [
            ("become a group of the user namespace", libc::SYS_setresgid, &self.0.gid_map),
            ("become a user of the user namespace", libc::SYS_setresuid, &self.0.uid_map),
        ] {
            // The root inside, or any user there.
            let id = extents.iter().map(|extent| extent.first).min().unwrap_or(0);
            script.call(what, call, &[id.into(), id.into(), id.into()]);
        }
        // The change of ids has reset it. Processes of the tree duplicate descriptors of each other.
        let arguments = [libc::PR_SET_DUMPABLE.into(), 1.into()];
        script.call("become dumpable again", libc::SYS_prctl, &arguments);
        script
    }
}

/// Returns the text for `/proc/PID/uid_map` or `gid_map`, which takes all lines in one call.
fn text(extents: &[UidGidExtent]) -> String {
    extents.iter().fold(String::new(), |mut text, extent| {
        let UidGidExtent { first, lower_first, count } = extent;
        writeln!(text, "{first} {lower_first} {count}").expect("a string takes all");
        text
    })
}

/// Lists ranges of ids for messages.
fn list(ranges: &BTreeSet<(u32, u32)>) -> String {
    let one = |(first, count): &(u32, u32)| match count {
        1 => first.to_string(),
        _ => format!("{first}-{}", u64::from(*first) + u64::from(*count) - 1),
    };
    ranges.iter().map(one).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        image::{Directory, proto::InventoryEntry},
        units::NsId,
    };

    #[test]
    fn maps_come_back_from_their_image() {
        let extent = |first, lower_first, count| UidGidExtent { first, lower_first, count };
        let dir = tempfile::tempdir().unwrap();
        let images = SnapshotWriter::begin(dir.path()).unwrap();
        let entry = |uid_map| UsernsEntry {
            uid_map,
            gid_map: vec![extent(5, 0, 2)],
            rcriu_setgroups_denied: None,
        };
        let good = entry(vec![extent(0, 1000, 1), extent(1, 100_000, 65535)]);
        images.write(Kind::Userns, 15, &[good]).unwrap();
        images.write(Kind::Userns, 16, &[entry(vec![extent(9, 9, 0)])]).unwrap();
        images.write(Kind::Userns, 17, &[entry(vec![extent(0, 1, 1); 341])]).unwrap();
        images.write(Kind::Userns, 18, &[entry(Vec::new())]).unwrap();
        images.sync(|_| {}).unwrap();
        images.commit(&InventoryEntry::default()).unwrap();
        let images = Directory::at(dir.path());
        let maps = User.restore(&images, 15, &Options::default()).unwrap();
        assert_eq!(maps.ids().unwrap().host_user(NsId(1)), Some(HostId(100_000)));
        assert_eq!(maps.script().len(), 3);
        for (number, words) in
            [(16, "maps no ids"), (17, "341 ranges"), (18, "maps no users"), (19, "userns-19.img")]
        {
            let error = crate::causes::with_sources(
                &User.restore(&images, number, &Options::default()).unwrap_err(),
            );
            assert!(error.contains(words), "{error}");
        }
        assert_eq!(text(&[extent(0, 1, 2), extent(3, 4, 5)]), "0 1 2\n3 4 5\n");
        assert_eq!(list(&BTreeSet::from([(7, 1), (10, 3)])), "7, 10-12");
    }
}
