//! Makes the cgroups of a tree, and sets their properties.

use std::{
    fs, io,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use super::{
    CgroupError, Mode, Options,
    collect::is_below,
    hierarchy,
    properties::{self, When},
    selection::Selection,
};
use crate::{
    image::proto::{CgControllerEntry, CgroupDirEntry, CgroupEntry},
    proc::{self, Mount},
    sys::xattr,
    units::HostPid,
};

/// The most cgroups that a restore makes.
const MOST: usize = 4096;

/// The cgroups that the images describe, in which the restore has a hand.
#[derive(Debug, Default)]
pub(super) struct Made {
    /// Those whose properties are still to be set.
    waiting: Vec<(PathBuf, CgroupDirEntry)>,
    /// Those that the restore has made; they are removed again if it fails.
    new: Vec<PathBuf>,
    selection: Selection,
}

impl Made {
    /// Makes the cgroups, or finds them, as the mode says, and sets the properties that processes in
    /// them would be in the way of.
    ///
    /// # Errors
    /// [`CgroupError`]; what was made is removed again.
    pub(super) fn make(
        entry: &CgroupEntry,
        options: &Options,
        mounts: &[Mount],
    ) -> Result<Self, CgroupError> {
        let mut made = Self::default();
        made.selection.clone_from(&options.selection);
        if options.mode == Mode::None {
            return Ok(made);
        }
        for controller in &entry.controllers {
            let name = controller.cnames.join(&b","[..]);
            for head in &controller.dirs {
                let path = [b"/", head.dir_name.as_slice()].concat();
                // A root of a hierarchy is not the tree's.
                if head.dir_name.iter().all(|byte| *byte == b'/') {
                    continue;
                }
                let place = place(&name, &path, mounts)?;
                // The one that the user names may exist.
                let is_given = options.root_of(&name).is_some();
                made.directory(head, &place, &name, (options.mode, is_given))?;
            }
        }
        Ok(made)
    }

    fn directory(
        &mut self,
        entry: &CgroupDirEntry,
        place: &Path,
        name: &[u8],
        (mode, may_exist): (Mode, bool),
    ) -> Result<(), CgroupError> {
        let failed = |step: &'static str| {
            let path = place.to_owned();
            move |source| CgroupError::Make { step, path, source }
        };
        let is_left = is_left(place);
        if is_left {
            // Of a restore that was killed: it is removed again if this one fails.
            self.begin(place);
        }
        if mode == Mode::Strict && !may_exist && !is_left && place.is_dir() {
            return Err(CgroupError::Exists { path: place.to_owned() });
        }
        let mut is_new = is_left;
        if !place.is_dir() {
            if mode == Mode::Props {
                return Err(CgroupError::Absent {
                    path: place.display().to_string(),
                    hierarchy: hierarchy(name),
                    problem: "does not exist".into(),
                });
            }
            self.make_all(place).map_err(failed("make"))?;
            is_new = true;
            if let Some(perms) = &entry.dir_perms {
                let owner = (Some(perms.uid), Some(perms.gid));
                std::os::unix::fs::lchown(place, owner.0, owner.1).map_err(failed("own"))?;
            }
        }
        if is_new || mode != Mode::Soft {
            set(place, entry, &self.selection, When::Empty)?;
            self.waiting
                .push((place.to_owned(), CgroupDirEntry { children: Vec::new(), ..entry.clone() }));
        }
        for child in &entry.children {
            let child_name = child.dir_name.as_slice();
            if child_name.contains(&b'/') || matches!(child_name, b"" | b"." | b"..") {
                return Err(CgroupError::Name {
                    name: String::from_utf8_lossy(child_name).into_owned(),
                });
            }
            let below = place.join(std::ffi::OsStr::from_bytes(child_name));
            self.directory(child, &below, name, (mode, false))?;
        }
        Ok(())
    }

    /// Makes a cgroup, and those above it.
    fn make_all(&mut self, place: &Path) -> io::Result<()> {
        let missing: Vec<_> = place.ancestors().take_while(|above| !above.is_dir()).collect();
        if missing.len() > 1 {
            log::warn!(
                "{}: the cgroups above it that were missing have no limits: they are not the tree's, so \
                 the images do not have them",
                place.display()
            );
        }
        for path in missing.into_iter().rev() {
            if self.new.len() >= MOST {
                return Err(io::Error::other(format!("the images have more than {MOST} cgroups")));
            }
            fs::create_dir(path)?;
            self.begin(path);
            for file in ["cpuset.cpus", "cpuset.mems"] {
                inherit(path, file)?;
            }
        }
        Ok(())
    }

    /// Marks a cgroup as one of a restore that is not complete, and remembers it.
    fn begin(&mut self, path: &Path) {
        self.new.push(path.to_owned());
        // Where that is not possible, the next restore finds a cgroup like any other.
        let _ = xattr::set(path, UNFINISHED.as_bytes(), own_mark().as_bytes());
    }

    /// Sets the properties of this time.
    ///
    /// # Errors
    /// [`CgroupError::Property`].
    pub(super) fn set(&self, when: When) -> Result<(), CgroupError> {
        // Parents first: what children may have depends on them.
        self.waiting.iter().try_for_each(|(place, entry)| set(place, entry, &self.selection, when))
    }

    /// Keeps the cgroups: the tree is restored.
    pub(super) fn keep(&mut self) {
        for path in self.new.drain(..) {
            let _ = xattr::remove(&path, UNFINISHED.as_bytes());
        }
    }
}

/// The attribute of a cgroup that names the restore which has made it, until that is complete.
const UNFINISHED: &str = "user.rcriu.unfinished";

/// Returns what names this program among all that ever ran.
fn own_mark() -> String {
    mark_of(HostPid::own()).unwrap_or_default()
}

fn mark_of(pid: HostPid) -> Option<String> {
    Some(format!("{pid} {}", proc::stat(pid).ok()?.start_time))
}

/// Whether a cgroup was made by a restore that was killed, and is empty.
fn is_left(place: &Path) -> bool {
    let Ok(mark) = xattr::get(place, UNFINISHED) else { return false };
    let mark = String::from_utf8_lossy(&mark).into_owned();
    let maker = mark.split_once(' ').and_then(|(pid, _)| pid.parse().ok()).map(HostPid);
    let is_over = maker.is_some_and(|pid| mark_of(pid).is_none_or(|now| now != mark));
    is_over && fs::read(place.join("cgroup.procs")).is_ok_and(|list| list.is_empty())
}

impl Drop for Made {
    fn drop(&mut self) {
        for path in self.new.drain(..).rev() {
            // Its last processes have just been killed.
            let begin = std::time::Instant::now();
            while let Err(error) = fs::remove_dir(&path) {
                if begin.elapsed() > std::time::Duration::from_secs(2) {
                    log::warn!("remove the cgroup {}: {error}", path.display());
                    break;
                }
                std::thread::sleep(std::time::Duration::from_millis(2));
            }
        }
    }
}

/// Gives a new cgroup of version 1 the processors or nodes of its parent: it has none, and takes no
/// process.
fn inherit(path: &Path, file: &str) -> io::Result<()> {
    // Version 2 has no need.
    if path.join("cgroup.controllers").exists() || !path.join(file).exists() {
        return Ok(());
    }
    let above = path.parent().map(|above| fs::read(above.join(file))).transpose()?;
    above.map_or(Ok(()), |text| fs::write(path.join(file), text))
}

fn set(
    place: &Path,
    entry: &CgroupDirEntry,
    selection: &Selection,
    when: When,
) -> Result<(), CgroupError> {
    properties::set(place, &entry.properties, selection, when).map_err(|unset| {
        CgroupError::Property {
            path: place.join(unset.name),
            value: unset.value,
            source: unset.source,
        }
    })
}

/// Returns the directory that a cgroup has or will have.
pub(super) fn place(name: &[u8], path: &[u8], mounts: &[Mount]) -> Result<PathBuf, CgroupError> {
    let text = String::from_utf8_lossy(path);
    let absent = |problem: &str| CgroupError::Absent {
        path: text.clone().into_owned(),
        hierarchy: hierarchy(name),
        problem: problem.into(),
    };
    let below = Path::new(&*text);
    if text.split('/').any(|part| part == ".." || part == ".") {
        return Err(CgroupError::Name { name: text.into_owned() });
    }
    for above in below.ancestors() {
        let bytes = above.as_os_str().as_bytes();
        if let Ok(directory) = proc::cgroup_directory(name, bytes, mounts) {
            let rest = below.strip_prefix(above).expect("an ancestor of it");
            return Ok(directory.join(rest));
        }
    }
    Err(absent("is not mounted"))
}

/// Puts the cgroups of the images below the roots that the user gives (`--cgroup-root`). `root` is the
/// number of the set that the root process is in. A root for all hierarchies leaves out those in which the
/// tree `stays` where it is.
pub(super) fn move_roots(
    entry: &mut CgroupEntry,
    options: &Options,
    root: Option<u32>,
    stays: impl Fn(&[u8], &[u8]) -> bool,
) {
    let members = entry.sets.iter().find(|set| Some(set.id) == root).map(|set| set.ctls.clone());
    for member in members.into_iter().flatten() {
        let is_it = |of: &&mut CgControllerEntry| of.cnames.join(&b","[..]) == member.name;
        let Some(new) = options.root_of(&member.name) else { continue };
        if !options.names(&member.name) && stays(&member.name, &member.path) {
            continue;
        }
        let new = new.trim_end_matches('/').as_bytes().to_vec();
        let controller = entry.controllers.iter_mut().find(is_it);
        let heads: Vec<Vec<u8>> = controller.as_ref().map_or_else(Vec::new, |of| {
            of.dirs.iter().map(|head| [b"/", head.dir_name.as_slice()].concat()).collect()
        });
        // In a namespace, the path up to the root of the namespace is replaced.
        let prefix = member.cgns_prefix.and_then(|len| member.path.get(..len as usize));
        let old = match prefix {
            Some(prefix) => prefix.to_vec(),
            None => {
                let head = heads.iter().find(|head| is_below(&member.path, head));
                head.unwrap_or(&member.path).clone()
            }
        };
        // Its own cgroup was the root of the hierarchy: it has none.
        if old == b"/" || old.is_empty() {
            continue;
        }
        let moved =
            |path: &[u8]| is_below(path, &old).then(|| [&*new, &path[old.len()..]].concat());
        for set in &mut entry.sets {
            for of in set.ctls.iter_mut().filter(|of| of.name == member.name) {
                if let Some(path) = moved(&of.path) {
                    of.path = if path.is_empty() { b"/".to_vec() } else { path };
                    of.cgns_prefix = of.cgns_prefix.map(|_| u32::try_from(new.len()).unwrap_or(0));
                }
            }
        }
        for head in controller.into_iter().flat_map(|of| &mut of.dirs) {
            if let Some(path) = moved(&[b"/", head.dir_name.as_slice()].concat()) {
                head.dir_name = path.strip_prefix(b"/").unwrap_or(&path).to_vec();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::proto::{CgMemberEntry, CgSetEntry};

    #[test]
    fn a_new_root_takes_the_place_of_the_old_one_in_one_hierarchy() {
        let member = |name: &str, path: &str| CgMemberEntry {
            name: name.into(),
            path: path.into(),
            cgns_prefix: None,
        };
        let controller = |name: &str, head: &str| CgControllerEntry {
            cnames: vec![name.into()],
            dirs: vec![CgroupDirEntry { dir_name: head.into(), ..Default::default() }],
            is_threaded: None,
        };
        let set = |id, path: &str| CgSetEntry {
            id,
            ctls: vec![member("pids", path), member("memory", "/c/1"), member("cpu", "/")],
        };
        let mut entry = CgroupEntry {
            sets: vec![set(2, "/c/1"), set(3, "/c/1/below"), set(4, "/c/12")],
            controllers: vec![controller("pids", "c/1"), controller("memory", "c/1")],
        };
        let roots = vec![(Some("pids".into()), "/new".into()), (Some("cpu".into()), "/x".into())];
        let options = Options::new(Mode::Soft).roots(roots);
        move_roots(&mut entry, &options, Some(2), |_, _| true);
        let pids: Vec<_> = entry.sets.iter().map(|set| &*set.ctls[0].path).collect();
        assert_eq!(pids, [&b"/new"[..], b"/new/below", b"/c/12"]);
        assert_eq!(entry.sets[0].ctls[1].path, b"/c/1");
        assert_eq!(entry.sets[0].ctls[2].path, b"/");
        let heads: Vec<_> = entry.controllers.iter().map(|of| &*of.dirs[0].dir_name).collect();
        assert_eq!(heads, [&b"new"[..], b"c/1"]);

        // One root for all.
        let options = Options::new(Mode::Soft).roots(vec![(None, "/all".into())]);
        move_roots(&mut entry, &options, Some(2), |name, _| name == b"memory");
        let paths: Vec<_> = entry.sets[0].ctls.iter().map(|of| &*of.path).collect();
        assert_eq!(paths, [&b"/all"[..], b"/c/1", b"/"]);
    }
}
