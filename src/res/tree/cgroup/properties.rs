//! The properties of cgroups that are dumped and restored.

use std::{fs, io, path::Path};

use super::selection::Selection;
use crate::{
    causes::tell,
    image::proto::{CgroupPerms, CgroupPropEntry},
};

/// When a restore sets a property.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum When {
    /// When the cgroup is made: with processes in it, the kernel refuses.
    Empty,
    /// When the root process is in its cgroup, and in its cgroup namespace: in version 2, a cgroup whose
    /// controllers are given to its children takes no process, so the namespace could not begin there.
    Placed,
    /// When the processes have been made: before, a limit could be in the way.
    Full,
}

/// How a property is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    /// As it is read.
    Whole,
    /// Each line by itself.
    Lines,
    /// Each line by itself; those that end with `max` say nothing.
    Limits,
    /// As words to be added.
    Words,
    /// The value of the word `oom_kill_disable`.
    OomControl,
    /// Allowed devices, after all have been denied.
    Devices,
}

/// A property.
#[derive(Clone, Copy, Debug)]
struct Property {
    name: &'static str,
    /// Its value in a new cgroup.
    default: &'static str,
    when: When,
    form: Form,
}

const fn limit(name: &'static str, default: &'static str) -> Property {
    Property { name, default, when: When::Full, form: Form::Whole }
}

const fn lines(name: &'static str) -> Property {
    Property { name, default: "", when: When::Full, form: Form::Lines }
}

const fn early(name: &'static str, default: &'static str) -> Property {
    Property { name, default, when: When::Empty, form: Form::Whole }
}

/// No limit, in memory cgroups of version 1.
const UNLIMITED: &str = "9223372036854771712";

/// Properties that are not set here: a restore moves processes, and freezes the tree at its end.
const UNSET: [&str; 5] =
    ["cgroup.procs", "cgroup.threads", "tasks", "cgroup.freeze", "freezer.state"];

/// Properties of both versions, in the order in which they are set: a hard limit of memory comes
/// before that of memory with swap.
static PROPERTIES: [Property; 64] = [
    early("cgroup.type", "domain"),
    early("cpuset.cpus", ""),
    early("cpuset.mems", ""),
    Property { name: "cgroup.subtree_control", default: "", when: When::Empty, form: Form::Words },
    Property { name: "devices.list", default: "a *:* rwm", when: When::Empty, form: Form::Devices },
    early("memory.use_hierarchy", "1"),
    early("memory.kmem.limit_in_bytes", UNLIMITED),
    early("memory.swappiness", "60"),
    Property {
        name: "memory.oom_control",
        default: "0",
        when: When::Empty,
        form: Form::OomControl,
    },
    limit("cgroup.max.descendants", "max"),
    limit("cgroup.max.depth", "max"),
    limit("cgroup.pressure", "1"),
    limit("cgroup.clone_children", "0"),
    limit("notify_on_release", "0"),
    limit("cpu.weight", "100"),
    limit("cpu.max", "max 100000"),
    limit("cpu.max.burst", "0"),
    limit("cpu.uclamp.min", "0.00"),
    limit("cpu.uclamp.max", "max"),
    limit("cpu.idle", "0"),
    limit("cpu.shares", "1024"),
    limit("cpu.cfs_period_us", "100000"),
    limit("cpu.cfs_quota_us", "-1"),
    limit("cpu.cfs_burst_us", "0"),
    limit("cpu.rt_period_us", "1000000"),
    limit("cpu.rt_runtime_us", "0"),
    limit("cpuset.cpus.partition", "member"),
    limit("cpuset.memory_migrate", "0"),
    limit("cpuset.cpu_exclusive", "0"),
    limit("cpuset.mem_exclusive", "0"),
    limit("cpuset.mem_hardwall", "0"),
    limit("cpuset.memory_spread_page", "0"),
    limit("cpuset.memory_spread_slab", "0"),
    limit("cpuset.sched_load_balance", "1"),
    limit("cpuset.sched_relax_domain_level", "-1"),
    limit("memory.min", "0"),
    limit("memory.low", "0"),
    limit("memory.high", "max"),
    limit("memory.max", "max"),
    limit("memory.swap.high", "max"),
    limit("memory.swap.max", "max"),
    limit("memory.zswap.max", "max"),
    limit("memory.zswap.writeback", "1"),
    limit("memory.oom.group", "0"),
    limit("memory.limit_in_bytes", UNLIMITED),
    limit("memory.memsw.limit_in_bytes", UNLIMITED),
    limit("memory.soft_limit_in_bytes", UNLIMITED),
    limit("memory.move_charge_at_immigrate", "0"),
    limit("memory.kmem.tcp.limit_in_bytes", UNLIMITED),
    limit("blkio.weight", "500"),
    limit("blkio.bfq.weight", "100"),
    lines("io.max"),
    lines("io.weight"),
    lines("io.bfq.weight"),
    lines("io.latency"),
    limit("io.prio.class", "no-change"),
    lines("blkio.throttle.read_bps_device"),
    lines("blkio.throttle.write_bps_device"),
    lines("blkio.throttle.read_iops_device"),
    lines("blkio.throttle.write_iops_device"),
    lines("net_prio.ifpriomap"),
    limit("net_cls.classid", "0"),
    limit("pids.max", "max"),
    Property { name: "misc.max", default: "", when: When::Full, form: Form::Limits },
];

impl Property {
    /// Reads the value of a cgroup; `None` if the cgroup does not have the property.
    fn read(&self, directory: &Path) -> Option<String> {
        let text = fs::read_to_string(directory.join(self.name)).ok()?;
        Some(match self.form {
            Form::OomControl => {
                let line = text.lines().find_map(|line| line.strip_prefix("oom_kill_disable "));
                line?.trim().to_owned()
            }
            // Interfaces without a priority, and the default.
            Form::Lines => {
                let is_set = |line: &&str| !line.ends_with(" 0") && *line != "default 100";
                text.lines().filter(is_set).collect::<Vec<_>>().join("\n")
            }
            Form::Limits => {
                let is_set = |line: &&str| !line.ends_with(" max");
                text.lines().filter(is_set).collect::<Vec<_>>().join("\n")
            }
            _ => text.trim_end().to_owned(),
        })
    }

    /// Whether two values mean the same.
    fn is_same(&self, a: &str, b: &str) -> bool {
        // The other types follow from those of the cgroups around.
        if self.name == "cgroup.type" {
            let is_threaded = |value: &str| value.trim_end() == "threaded";
            return is_threaded(a) == is_threaded(b);
        }
        let unlimited =
            |value: &str| self.default == UNLIMITED && matches!(value, "-1" | UNLIMITED);
        let sorted = |value: &str| {
            let mut words: Vec<_> = value.split_whitespace().map(str::to_owned).collect();
            words.sort();
            words
        };
        let is_set = self.form == Form::Words && sorted(a) == sorted(b);
        a.trim_end() == b.trim_end() || unlimited(a) && unlimited(b) || is_set
    }

    fn write(&self, directory: &Path, value: &str) -> io::Result<()> {
        // `fs::write` would create a file, elsewhere than in a cgroup.
        let write = |name: &str, text: &str| {
            let file = fs::OpenOptions::new().write(true).open(directory.join(name));
            file.and_then(|mut file| io::Write::write_all(&mut file, text.as_bytes()))
        };
        match self.form {
            Form::Whole | Form::OomControl => write(self.name, value),
            Form::Lines | Form::Limits => value.lines().try_for_each(|line| write(self.name, line)),
            Form::Words => {
                value.split_whitespace().try_for_each(|word| write(self.name, &format!("+{word}")))
            }
            Form::Devices => {
                write("devices.deny", "a")?;
                value.lines().try_for_each(|line| write("devices.allow", line))
            }
        }
    }
}

/// Returns the properties that the user names and rcriu does not know.
fn others(selection: &Selection) -> impl Iterator<Item = &str> {
    selection.all_names().filter(|name| {
        !UNSET.contains(name) && !PROPERTIES.iter().any(|property| property.name == *name)
    })
}

/// Returns the properties of a cgroup that do not have their default, and the owners of those that
/// another user than root owns; and those that only the user knows.
pub(super) fn read(directory: &Path, selection: &Selection) -> Vec<CgroupPropEntry> {
    let known = PROPERTIES.iter().filter(|property| selection.keeps(property.name));
    let own = known.filter_map(|property| {
        let value = property.read(directory)?;
        (!property.is_same(&value, property.default)).then_some((property.name, value))
    });
    let others = others(selection).filter_map(|name| {
        Some((name, fs::read_to_string(directory.join(name)).ok()?.trim_end().to_owned()))
    });
    let mut found: Vec<_> = own
        .chain(others)
        .map(|(name, value)| CgroupPropEntry {
            name: name.into(),
            value: value.into(),
            perms: None,
        })
        .collect();
    for name in ["cgroup.procs", "cgroup.threads", "tasks", "cgroup.subtree_control"] {
        let Some(perms) =
            permissions(&directory.join(name)).filter(|of| of.uid != 0 || of.gid != 0)
        else {
            continue;
        };
        match found.iter_mut().find(|entry| entry.name == name.as_bytes()) {
            Some(entry) => entry.perms = Some(perms),
            None => found.push(CgroupPropEntry {
                name: name.into(),
                value: Vec::new(),
                perms: Some(perms),
            }),
        }
    }
    found
}

/// Returns the owner and the mode of a file.
pub(super) fn permissions(path: &Path) -> Option<CgroupPerms> {
    use std::os::unix::fs::MetadataExt;
    let stat = fs::symlink_metadata(path).ok()?;
    Some(CgroupPerms { mode: stat.mode(), uid: stat.uid(), gid: stat.gid() })
}

/// A property that could not be set.
#[derive(Debug)]
pub(super) struct Unset {
    pub(super) name: String,
    pub(super) value: String,
    pub(super) source: io::Error,
}

/// Sets the properties of a cgroup that have other values. Ignores those that neither rcriu nor the user
/// knows: an image must not write to every file.
///
/// # Errors
/// The first property that cannot be set.
pub(super) fn set(
    directory: &Path,
    wanted: &[CgroupPropEntry],
    selection: &Selection,
    when: When,
) -> Result<(), Unset> {
    let is_unified = directory.join("cgroup.controllers").exists();
    let of_time = |property: &&Property| match property.when {
        When::Empty if is_unified && property.name != "cgroup.type" => when == When::Placed,
        of_property => of_property == when,
    };
    let known = PROPERTIES.iter().filter(|property| selection.keeps(property.name));
    for property in known.filter(of_time) {
        let entry = wanted.iter().find(|entry| entry.name == property.name.as_bytes());
        let Some(entry) = entry else { continue };
        let value = String::from_utf8_lossy(&entry.value).into_owned();
        let found = property.read(directory);
        // A kernel without the property cannot have another value than the default.
        let found = found.as_deref().unwrap_or(property.default);
        if property.is_same(found, &value) || value.is_empty() && property.form != Form::Whole {
            continue;
        }
        property.write(directory, &value).map_err(|source| Unset {
            name: property.name.to_owned(),
            value,
            source,
        })?;
    }
    if when == When::Full {
        set_others(directory, wanted, selection)?;
        set_owners(directory, wanted, selection);
    }
    Ok(())
}

/// Sets the properties that only the user knows, as they were read.
fn set_others(
    directory: &Path,
    wanted: &[CgroupPropEntry],
    selection: &Selection,
) -> Result<(), Unset> {
    for name in others(selection) {
        let Some(entry) = wanted.iter().find(|entry| entry.name == name.as_bytes()) else {
            continue;
        };
        let now = fs::read(directory.join(name)).unwrap_or_default();
        if now.trim_ascii_end() == entry.value.trim_ascii_end() {
            continue;
        }
        let file = fs::OpenOptions::new().write(true).open(directory.join(name));
        let written = file.and_then(|mut file| io::Write::write_all(&mut file, &entry.value));
        written.map_err(|source| Unset {
            name: name.to_owned(),
            value: String::from_utf8_lossy(&entry.value).into_owned(),
            source,
        })?;
    }
    Ok(())
}

/// Sets the owners of the files of properties.
fn set_owners(directory: &Path, wanted: &[CgroupPropEntry], selection: &Selection) {
    for entry in wanted {
        let name = String::from_utf8_lossy(&entry.name);
        let is_known = UNSET.contains(&&*name)
            || PROPERTIES.iter().any(|of| of.name == name)
            || selection.names(&name);
        if !is_known {
            let place = directory.display();
            let message = format!(
                "the property {name} of the cgroup {place} is not restored: rcriu does not know it\n\
                 help: name it with --cgroup-props"
            );
            tell(log::Level::Warn, &message);
            continue;
        }
        let Some(perms) = &entry.perms else { continue };
        let path = directory.join(&*name);
        if permissions(&path).is_some_and(|found| (found.uid, found.gid) != (perms.uid, perms.gid))
            && let Err(error) = std::os::unix::fs::lchown(&path, Some(perms.uid), Some(perms.gid))
        {
            log::warn!("set the owner of {}: {error}", path.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_compared_by_their_meaning() {
        let of = |name: &str| PROPERTIES.iter().find(|of| of.name == name).unwrap();
        assert!(of("memory.limit_in_bytes").is_same("-1", UNLIMITED));
        assert!(!of("cpu.cfs_quota_us").is_same("-1", UNLIMITED));
        assert!(of("cgroup.subtree_control").is_same("pids memory", "memory pids\n"));
        assert!(!of("cpu.max").is_same("10000 100000", "max 100000"));
    }

    #[test]
    fn properties_that_have_their_default_are_not_dumped_and_unknown_ones_not_written() {
        let dir = tempfile::tempdir().unwrap();
        let put = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
        put("pids.max", "17\n");
        put("cpu.max", "max 100000\n");
        put("memory.oom_control", "oom_kill_disable 1\nunder_oom 0\n");
        put("release_agent", "old");
        let found = read(dir.path(), &Selection::default());
        let names: Vec<_> = found.iter().filter(|entry| entry.perms.is_none()).collect();
        let names: Vec<_> = names.iter().map(|entry| (&*entry.name, &*entry.value)).collect();
        assert_eq!(
            names,
            [(&b"memory.oom_control"[..], &b"1"[..]), (&b"pids.max"[..], &b"17"[..])]
        );
        put("pids.max", "max\n");
        let mut wanted = found;
        wanted.push(CgroupPropEntry {
            name: b"release_agent".to_vec(),
            value: b"/bin/sh".to_vec(),
            perms: None,
        });
        set(dir.path(), &wanted, &Selection::default(), When::Full).unwrap();
        let text = |name: &str| fs::read_to_string(dir.path().join(name)).unwrap();
        // A file, not a property: the end of the old value stays.
        assert_eq!((&text("pids.max")[..2], text("release_agent")), ("17", "old".to_owned()));
        // Those that the user names.
        let mut selection = Selection::default();
        selection
            .add("\"pids\": - \"strategy\": \"replace\" - \"properties\": [\"release_agent\"]")
            .unwrap();
        put("pids.max", "99\n");
        set(dir.path(), &wanted, &selection, When::Full).unwrap();
        assert_eq!((text("pids.max"), text("release_agent")), ("99\n".into(), "/bin/sh".into()));
        let found = read(dir.path(), &selection);
        let names: Vec<_> = found.iter().filter(|entry| entry.perms.is_none()).collect();
        let names: Vec<_> = names.iter().map(|entry| &*entry.name).collect();
        assert_eq!(names, [&b"memory.oom_control"[..], b"release_agent"]);
    }
}
