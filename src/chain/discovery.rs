//! Finding the snapshots of a chain by their parent links.

use std::{
    cmp::Ordering,
    collections::{BTreeMap, HashMap, HashSet},
    ffi::OsString,
    path::{Path, PathBuf},
};

use super::{LinkError, Snapshot, SnapshotId, bonds};
use crate::image::{ImageStore, PARENT_LINK, Store, desc, store::BrokenLink};

/// The snapshots found so far, in order of discovery.
#[derive(Default)]
pub(super) struct Discovery {
    pub(super) snapshots: Vec<Snapshot>,
    /// By the names of their stores, as strings: those hash several times faster than
    /// paths.
    by_path: HashMap<OsString, usize>,
    /// The names of the parents' stores, where known.
    pub(super) links: Vec<Option<PathBuf>>,
    names: HashSet<String>,
}

impl Discovery {
    pub(super) fn reserve(&mut self, dirs: usize) {
        self.snapshots.reserve(dirs);
        self.by_path.reserve(dirs);
        self.links.reserve(dirs);
        self.names.reserve(dirs);
    }

    pub(super) fn enter(&mut self, images: Store) -> usize {
        let path = images.name();
        if let Some(known) = self.by_path.get(path.as_os_str()) {
            return *known;
        }
        let position = self.snapshots.len();
        let name = self.unused_name(path);
        self.names.insert(name.clone());
        self.by_path.insert(path.as_os_str().to_owned(), position);
        self.snapshots.push(Snapshot { name, images, parent: Ok(None) });
        self.links.push(None);
        position
    }

    /// Returns a name for a snapshot: that of its directory, with a number if another
    /// snapshot has that name.
    fn unused_name(&self, path: &Path) -> String {
        let name = path.file_name().map_or("root".into(), |name| name.to_string_lossy());
        if !self.names.contains(&*name) {
            return name.into_owned();
        }
        let mut numbered = (2..).map(|number: u32| format!("{name}~{number}"));
        numbered.find(|name| !self.names.contains(name)).expect("some number is free")
    }

    pub(super) fn follow_links(&mut self) {
        let (mut position, listed) = (0, self.snapshots.len());
        let mut originals = None;
        while position < self.snapshots.len() {
            let parent = match self.known_sibling(position) {
                Some(known) => Ok(Some(known)),
                None => self.snapshots[position].images.parent().map(|parent| {
                    let original = |parent: Store| match self.original(
                        position,
                        &*parent,
                        listed,
                        &mut originals,
                    ) {
                        Some(original) => original,
                        None => self.enter(parent),
                    };
                    parent.map(original)
                }),
            };
            let snapshot = &mut self.snapshots[position];
            snapshot.parent = match parent {
                Ok(parent) => Ok(parent.map(SnapshotId::at)),
                Err(BrokenLink { target, problem }) => {
                    Err(LinkError::Dangling { dir: snapshot.path().to_owned(), target, problem })
                }
            };
            position += 1;
        }
    }

    /// Returns the parent of a snapshot, if the name of its store is known and the snapshot
    /// was found. That halves the time for a chain of thousands, since links need not be
    /// resolved.
    fn known_sibling(&self, position: usize) -> Option<usize> {
        let path = self.links[position].as_ref()?;
        self.by_path.get(path.as_os_str()).copied()
    }

    /// Returns the snapshot among the first `listed` of which `parent` is a copy. `parent`
    /// is a directory, not a link, in the directory of the snapshot at `position`: programs
    /// that follow links when they copy a chain leave in each snapshot copies of all of its
    /// ancestors.
    fn original(
        &self,
        position: usize,
        parent: &dyn ImageStore,
        listed: usize,
        originals: &mut Option<HashMap<Vec<u8>, usize>>,
    ) -> Option<usize> {
        let is_inside = parent.name() == self.snapshots[position].images.path_of(PARENT_LINK);
        if !is_inside || listed < 2 {
            return None;
        }
        let originals = originals.get_or_insert_with(|| {
            let ids = self.snapshots[..listed].iter();
            let ids = ids.map(|snapshot| bonds::run_id(&*snapshot.images));
            ids.zip(0..).filter_map(|(id, position)| Some((id?, position))).collect()
        });
        let original = *originals.get(&bonds::run_id(parent)?)?;
        let same = original != position
            && sizes(parent)
                .is_some_and(|found| sizes(&*self.snapshots[original].images) == Some(found));
        same.then_some(original)
    }

    pub(super) fn break_circles(&mut self) {
        // 0 if not visited; otherwise the number of the walk that came first.
        let mut seen = vec![0; self.snapshots.len()];
        for start in 0..self.snapshots.len() {
            let mut position = start;
            while seen[position] == 0 {
                seen[position] = start + 1;
                match self.snapshots[position].parent {
                    Ok(Some(parent)) => position = parent.position(),
                    _ => break,
                }
            }
            if seen[position] == start + 1 && self.parent_of(position).is_some() {
                self.break_circle(position);
            }
        }
    }

    fn parent_of(&self, position: usize) -> Option<usize> {
        match self.snapshots[position].parent {
            Ok(Some(parent)) => Some(parent.position()),
            _ => None,
        }
    }

    fn break_circle(&mut self, start: usize) {
        let mut members = vec![start];
        let mut position = start;
        while let Some(parent) = self.parent_of(position) {
            position = parent;
            if position == start {
                break;
            }
            members.push(position);
        }
        let names = |members: &[usize]| {
            let dirs = members.iter().map(|m| self.snapshots[*m].path().display().to_string());
            dirs.collect::<Vec<_>>().join(" -> ")
        };
        let circle = format!("{} -> {}", names(&members), self.snapshots[start].path().display());
        for member in members {
            self.snapshots[member].parent = Err(LinkError::Circle { circle: circle.clone() });
        }
    }

    /// Returns the snapshots with parents first, and siblings ordered by name.
    pub(super) fn sorted(self) -> Vec<Snapshot> {
        let mut children = vec![Vec::new(); self.snapshots.len()];
        let mut roots = Vec::new();
        for position in 0..self.snapshots.len() {
            match self.parent_of(position) {
                Some(parent) => children[parent].push(position),
                None => roots.push(position),
            }
        }
        let by_name = |a: &usize, b: &usize| {
            natural(&self.snapshots[*b].name, &self.snapshots[*a].name).then(b.cmp(a))
        };
        let mut order = Vec::new();
        let mut stack = roots;
        stack.sort_by(by_name);
        while let Some(position) = stack.pop() {
            order.push(position);
            let next = &mut children[position];
            next.sort_by(by_name);
            stack.append(next);
        }
        let mut rank = vec![0; order.len()];
        for (place, position) in order.iter().enumerate() {
            rank[*position] = place;
        }
        let mut snapshots: Vec<Option<Snapshot>> = self.snapshots.into_iter().map(Some).collect();
        let mut sorted: Vec<Snapshot> =
            order.iter().filter_map(|position| snapshots[*position].take()).collect();
        for snapshot in &mut sorted {
            if let Ok(Some(parent)) = &mut snapshot.parent {
                *parent = SnapshotId::at(rank[parent.position()]);
            }
        }
        sorted
    }
}

/// Returns the names and sizes of the images of a snapshot.
fn sizes(images: &dyn ImageStore) -> Option<BTreeMap<String, u64>> {
    let names = images.list().ok()?.into_iter();
    let names = names.filter(|name| desc::by_file_name(name).is_some());
    names.map(|name| images.stat(&name).map(|stat| (name, stat.len)).ok()).collect()
}

/// Compares names in natural order: numbers in them by value.
fn natural(a: &str, b: &str) -> Ordering {
    let (mut a, mut b) = (a, b);
    while let (Some(x), Some(y)) = (a.chars().next(), b.chars().next()) {
        let (left, right) = (digits(a), digits(b));
        let ordering = if left.is_empty() || right.is_empty() {
            (a, b) = (&a[x.len_utf8()..], &b[y.len_utf8()..]);
            x.cmp(&y)
        } else {
            (a, b) = (&a[left.len()..], &b[right.len()..]);
            let (left, right) = (left.trim_start_matches('0'), right.trim_start_matches('0'));
            left.len().cmp(&right.len()).then_with(|| left.cmp(right))
        };
        if ordering.is_ne() {
            return ordering;
        }
    }
    a.len().cmp(&b.len())
}

fn digits(text: &str) -> &str {
    &text[..text.bytes().take_while(u8::is_ascii_digit).count()]
}
