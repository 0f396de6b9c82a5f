//! A quick check of a chain, without an index.

use super::{Chain, SnapshotId, overlay::LAYER_LIMIT};
use crate::{
    causes::with_sources,
    image::{ImageStore, Kind, MemoryId, tree},
    units::page_bytes,
};

/// Returns the visible defects of a snapshot and of the links to its ancestors. Reads only
/// its own images and the inventories of the others.
pub fn glance(chain: &Chain, id: SnapshotId) -> Vec<String> {
    let mut problems = Vec::new();
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
    let (_, found) = tree::read(images);
    problems
        .extend(found.into_iter().filter(|problem| problem.is_broken).map(|problem| problem.text));
    for memory in chain.memories(id).unwrap_or_default() {
        problems.extend(short_pages(images, memory));
    }
    problems
}

/// Returns what the pages file of a pagemap lacks.
fn short_pages(images: &dyn ImageStore, memory: MemoryId) -> Option<String> {
    let mut reader = match images.pagemap(memory) {
        Ok(reader) => reader,
        Err(error) => return Some(with_sources(&error)),
    };
    let pages = Kind::Pages.file_name(reader.pages_id().into());
    let path = images.path_of(&pages);
    let mut wanted = 0;
    for entry in reader.by_ref() {
        match entry {
            Ok(entry) => wanted += page_bytes(entry.pages_in_file()),
            Err(error) => return Some(with_sources(&error)),
        }
    }
    let found = match images.stat(&pages) {
        Ok(found) => found.len,
        Err(_) if wanted == 0 => return None,
        Err(error) => return Some(format!("{}: {error}", path.display())),
    };
    let path = path.display();
    (found < wanted)
        .then(|| format!("{path} is cut short: it has {found} bytes, expected {wanted}"))
}
