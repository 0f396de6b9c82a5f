//! Dumps the cgroups that belong to a tree: their places, owners and properties.

use std::{
    fs,
    path::{Path, PathBuf},
};

use super::{Options, Selection, Set, properties};
use crate::{
    image::proto::{CgControllerEntry, CgroupDirEntry, CgroupPropEntry},
    proc,
};

/// The most cgroups of one hierarchy that the images hold, and the deepest nesting.
const MOST: usize = 4096;
const DEEPEST: usize = 64;

/// Returns the hierarchies with the cgroups of a tree. `known` are its sets, that of the dumper first.
///
/// A cgroup belongs to the tree if a thread of the tree is in it, or in one above it; but not the
/// root of a hierarchy, nor a cgroup that the dumper is in or below. The cgroups below that of the
/// root process belong to the tree, too. `frozen` are the cgroups that were frozen.
pub(super) fn controllers(
    known: &[Set],
    options: &Options,
    frozen: &[PathBuf],
) -> Vec<CgControllerEntry> {
    let mounts = options.mounts().unwrap_or_default();
    let (dumper, others) = known.split_first().expect("the dumper's own");
    let all = dumper.keys().filter(|name| options.dumps(name));
    all.map(|name| {
        let own = dumper.get(name).map_or(&b"/"[..], Vec::as_slice);
        let mut heads: Vec<&[u8]> = Vec::new();
        let mut paths: Vec<&[u8]> =
            others.iter().filter_map(|set| set.get(name)).map(Vec::as_slice).collect();
        let given = options.root_of(name);
        paths.extend(
            given
                .filter(|root| paths.iter().any(|path| is_below(path, root.as_bytes())))
                .map(str::as_bytes),
        );
        paths.sort_unstable();
        for path in paths {
            if !is_below(own, path) && !heads.iter().any(|head| is_below(path, head)) {
                heads.push(path);
            }
        }
        let mut left = MOST;
        let dirs: Vec<_> = heads
            .into_iter()
            .map(|path| {
                let place = proc::cgroup_directory(name, path, &mounts).ok();
                let short = path.strip_prefix(b"/").unwrap_or(path);
                let mut head = directory(
                    short,
                    place.as_deref(),
                    DEEPEST,
                    (&mut left, frozen, &options.selection),
                );
                // One that a cgroup above has frozen, which is not the tree's.
                let is_above = |of: &PathBuf| place.as_ref().is_some_and(|it| it.starts_with(of));
                head.rcriu_frozen = frozen.iter().any(is_above).then_some(true);
                if !name.is_empty() {
                    tell_criu(&mut head);
                }
                head
            })
            .collect();
        if left == 0 {
            log::warn!(
                "only {MOST} cgroups of a hierarchy are recorded: the others are not restored"
            );
        }
        let is_threaded = !name.is_empty() || dirs.iter().any(has_threaded);
        CgControllerEntry {
            cnames: name.split(|byte| *byte == b',').map(<[u8]>::to_vec).collect(),
            dirs,
            is_threaded: Some(is_threaded),
        }
    })
    .collect()
}

/// Whether a cgroup is another one, or below it.
pub(super) fn is_below(path: &[u8], above: &[u8]) -> bool {
    above == b"/"
        || path.strip_prefix(above).is_some_and(|rest| rest.is_empty() || rest.starts_with(b"/"))
}

/// Adds the property by which CRIU, in version 1, freezes a cgroup again.
fn tell_criu(entry: &mut CgroupDirEntry) {
    if entry.rcriu_frozen == Some(true) {
        entry.properties.push(CgroupPropEntry {
            name: b"freezer.state".to_vec(),
            value: b"FROZEN".to_vec(),
            perms: None,
        });
    }
    entry.children.iter_mut().for_each(tell_criu);
}

fn has_threaded(directory: &CgroupDirEntry) -> bool {
    let is_it = |property: &CgroupPropEntry| {
        property.name == b"cgroup.type" && property.value == b"threaded"
    };
    directory.properties.iter().any(is_it) || directory.children.iter().any(has_threaded)
}

/// Returns a cgroup with those below it. `place` is its directory, if its hierarchy is mounted.
fn directory(
    name: &[u8],
    place: Option<&Path>,
    depth: usize,
    (left, frozen, selection): (&mut usize, &[PathBuf], &Selection),
) -> CgroupDirEntry {
    *left = left.saturating_sub(1);
    let mut entry = CgroupDirEntry { dir_name: name.to_vec(), ..Default::default() };
    let Some(place) = place else { return entry };
    entry.rcriu_frozen = frozen.iter().any(|of| of == place).then_some(true);
    entry.properties = properties::read(place, selection);
    entry.dir_perms = properties::permissions(place);
    let Ok(below) = fs::read_dir(place) else { return entry };
    let mut below: Vec<_> = below
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|of| of.is_dir()))
        .map(|entry| entry.file_name())
        .collect();
    below.sort();
    for name in below {
        if *left == 0 || depth == 0 {
            break;
        }
        let bytes = std::os::unix::ffi::OsStrExt::as_bytes(&*name);
        entry.children.push(directory(
            bytes,
            Some(&place.join(&name)),
            depth - 1,
            (left, frozen, selection),
        ));
    }
    entry
}
