//! Freezes the cgroups of a tree that was dumped frozen.

use std::{
    ffi::OsStr,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use super::{CgroupError, Mode, make::place};
use crate::{
    causes::tell,
    image::proto::{CgroupDirEntry, CgroupEntry},
    inject::Freezable,
    proc::Mount,
};

/// The deepest nesting of cgroups.
const DEEPEST: usize = 64;

/// The cgroups that are to be frozen.
#[derive(Debug, Default)]
pub(super) struct Freezing {
    groups: Vec<Freezable>,
    /// Those that were frozen, and are so again when this is dropped.
    thawed: Vec<Freezable>,
}

impl Freezing {
    /// Finds the cgroups that the images describe as frozen. They may not exist yet. One that exists stays as
    /// it is now, frozen or not, unless the mode sets its properties: container runtimes freeze a container for
    /// the dump only, and make its cgroup before the restore.
    ///
    /// # Errors
    /// [`CgroupError`] for a name that is none, or a hierarchy that is not mounted.
    pub(super) fn of(
        entry: &CgroupEntry,
        mode: Mode,
        mounts: &[Mount],
    ) -> Result<Self, CgroupError> {
        let mut found = Self::default();
        for controller in &entry.controllers {
            let name = controller.cnames.join(&b","[..]);
            for head in controller.dirs.iter().filter(|head| has_frozen(head, DEEPEST)) {
                let path = [b"/", head.dir_name.as_slice()].concat();
                let directory = place(&name, &path, mounts)?;
                found.find(head, &directory, &name, DEEPEST)?;
            }
        }
        if matches!(mode, Mode::None | Mode::Soft) {
            found.groups.retain(|group| {
                let stays = group.directory().exists() && !group.is_frozen();
                if stays {
                    let path = group.directory().display();
                    log::info!(
                        "{path}, which was frozen at the dump, exists and is not: it stays so"
                    );
                }
                !stays
            });
        }
        Ok(found)
    }

    fn find(
        &mut self,
        entry: &CgroupDirEntry,
        directory: &Path,
        hierarchy: &[u8],
        depth: usize,
    ) -> Result<(), CgroupError> {
        if is_frozen(entry) {
            self.groups.extend(Freezable::new(hierarchy, directory.to_owned()));
        }
        for child in entry.children.iter().filter(|_| depth > 0) {
            let name = Path::new(OsStr::from_bytes(&child.dir_name));
            if name.file_name() != Some(name.as_os_str()) {
                let name = name.display().to_string();
                return Err(CgroupError::Name { name });
            }
            self.find(child, &directory.join(name), hierarchy, depth - 1)?;
        }
        Ok(())
    }

    /// Thaws those that exist, so that processes can be made in them.
    ///
    /// # Errors
    /// [`CgroupError::Shared`] if a process is in one; the errors of writing the file.
    pub(super) fn thaw(&mut self) -> Result<(), CgroupError> {
        for group in &self.groups {
            let path = || -> PathBuf { group.directory().to_owned() };
            if let Some(pid) = group.threads().first() {
                return Err(CgroupError::Shared { path: path(), pid: *pid });
            }
        }
        for group in self.groups.iter().filter(|group| group.is_frozen()) {
            let failed = |source| CgroupError::Make {
                step: "thaw",
                path: group.directory().to_owned(),
                source,
            };
            group.thaw().map_err(failed)?;
            self.thawed.push(group.clone());
        }
        Ok(())
    }

    /// Freezes all. The processes in them are stopped.
    pub(super) fn freeze(&mut self) {
        self.thawed.clear();
        for group in self.groups.drain(..).rev() {
            if let Err(error) = group.freeze() {
                let path = group.directory().display();
                let message =
                    format!("the tree was frozen, and runs now: freeze the cgroup {path}: {error}");
                tell(log::Level::Error, &message);
            }
        }
    }
}

impl Drop for Freezing {
    fn drop(&mut self) {
        for group in self.thawed.drain(..).rev() {
            if let Err(error) = group.freeze() {
                log::warn!("{}: freeze the cgroup again: {error}", group.directory().display());
            }
        }
    }
}

/// Whether the images say that a cgroup was frozen: CRIU does so in version 1.
fn is_frozen(entry: &CgroupDirEntry) -> bool {
    let says = |name: &[u8], value: &[u8]| {
        entry.properties.iter().any(|of| of.name == name && of.value.trim_ascii() == value)
    };
    entry.rcriu_frozen == Some(true)
        || says(b"freezer.state", b"FROZEN")
        || says(b"cgroup.freeze", b"1")
}

fn has_frozen(entry: &CgroupDirEntry, depth: usize) -> bool {
    is_frozen(entry) || depth > 0 && entry.children.iter().any(|child| has_frozen(child, depth - 1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::proto::CgroupPropEntry;

    #[test]
    fn frozen_groups_are_found_at_any_depth_but_not_outside() {
        let entry = |name: &str, children: Vec<CgroupDirEntry>| CgroupDirEntry {
            dir_name: name.into(),
            children,
            ..Default::default()
        };
        let state = |value: &str| CgroupPropEntry {
            name: b"freezer.state".to_vec(),
            value: value.into(),
            perms: None,
        };
        let mut inner = entry("inner", Vec::new());
        inner.properties.push(state("FROZEN\n"));
        let mut thawed = entry("thawed", Vec::new());
        thawed.properties.push(state("THAWED"));
        let head = entry("head", vec![inner, thawed]);
        let mut found = Freezing::default();
        found.find(&head, Path::new("/top/head"), b"freezer", DEEPEST).unwrap();
        let groups: Vec<_> = found.groups.iter().map(Freezable::directory).collect();
        assert_eq!(groups, [Path::new("/top/head/inner")]);
        for name in ["..", "a/b", "", ".", "/"] {
            let head = entry("head", vec![entry(name, Vec::new())]);
            found.find(&head, Path::new("/top/head"), b"freezer", DEEPEST).unwrap_err();
        }
    }
}
