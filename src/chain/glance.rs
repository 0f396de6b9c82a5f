//! A quick check of a chain, without an index.

use super::{Chain, SnapshotId, piece::LAYER_LIMIT};
use crate::{
    causes::with_sources,
    image::{ImageStore, Kind, MemoryId, Presence, tree},
    units::page_bytes,
};

/// What a quick look at a snapshot tells.
#[derive(Clone, Debug, Default)]
pub struct Glance {
    /// What is wrong with it and with the links to its ancestors.
    pub problems: Vec<String>,
    /// The names of its processes, parents first; none in a pre-dump.
    pub processes: Vec<String>,
    /// Pages of private memory that it has, in whichever snapshot.
    pub private: u64,
    /// Pages of shared objects.
    pub shared: u64,
}

/// Looks at a snapshot, and reads no more than its own images and the inventories of its
/// ancestors.
pub fn glance(chain: &Chain, id: SnapshotId) -> Glance {
    let mut glance = Glance::default();
    let problems = &mut glance.problems;
    let mut path = vec![id];
    while let Ok(Some(parent)) = chain.snapshot(path[path.len() - 1]).parent
        && path.len() < LAYER_LIMIT
    {
        path.push(parent);
    }
    if let Err(error) = chain.require_layers(&path) {
        problems.push(with_sources(&error));
    }
    if let Err(link) = &chain.snapshot(path[path.len() - 1]).parent {
        problems.push(link.to_string());
    }
    let images = &**chain.images(id);
    // Only defects count here, and a type of file is none.
    let (tree, found) = tree::read(images, |_| true);
    problems
        .extend(found.into_iter().filter(|problem| problem.is_broken).map(|problem| problem.text));
    for memory in chain.memories(id).unwrap_or_default() {
        let pages = match memory {
            MemoryId::Private(_) => &mut glance.private,
            MemoryId::Shared(_) => &mut glance.shared,
        };
        problems.extend(short_pages(images, memory, pages));
    }
    let name = |task: &tree::Task| {
        let core = task.threads.first().and_then(|(_, core)| core.tc.as_ref());
        core.map_or_else(|| "?".to_owned(), |core| String::from_utf8_lossy(&core.comm).into_owned())
    };
    glance.processes = tree.tasks.iter().map(name).collect();
    glance
}

/// Says what is missing of the pages file that a pagemap claims, and adds up the pages that
/// are there or in an ancestor.
fn short_pages(images: &dyn ImageStore, memory: MemoryId, pages: &mut u64) -> Option<String> {
    let mut reader = match images.pagemap(memory) {
        Ok(reader) => reader,
        Err(error) => return Some(with_sources(&error)),
    };
    let file = Kind::Pages.file_name(reader.pages_id().into());
    let path = images.path_of(&file);
    let mut wanted = 0;
    for entry in reader.by_ref() {
        match entry {
            Ok(entry) => {
                wanted += page_bytes(entry.pages_in_file());
                if entry.presence != Presence::Absent {
                    *pages = pages.saturating_add(entry.pages);
                }
            }
            Err(error) => return Some(with_sources(&error)),
        }
    }
    let found = match images.stat(&file) {
        Ok(found) => found.len,
        Err(_) if wanted == 0 => return None,
        Err(error) => return Some(format!("{}: {error}", path.display())),
    };
    let path = path.display();
    (found < wanted)
        .then(|| format!("{path} is cut short: it has {found} bytes, expected {wanted}"))
}
