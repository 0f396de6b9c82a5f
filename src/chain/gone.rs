//! Finds the freed pages that snapshots of a chain still refer to.

use std::collections::HashMap;

use super::{
    Chain, ChainError, Result, SnapshotId,
    index::pieces,
    overlay::{self, Merged},
    piece::{self, Gaps, Piece, PiecePlace},
};
use crate::{
    image::{ImageStore, Kind, MemoryId, desc, punched},
    units::{PageIndex, PageRanges},
};

/// Freed pages of one memory of a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Gone {
    pub(super) memory: MemoryId,
    pub(super) first: PageIndex,
    pub(super) pages: u64,
    /// The snapshot whose pages file held them.
    pub(super) holder: SnapshotId,
    /// Whether a tip reads them, too: then no newer page has replaced them.
    pub(super) needed: bool,
}

/// The memories of a snapshot, resolved across its ancestors. The number of a layer is the
/// position of a snapshot in the chain.
type Resolved = HashMap<MemoryId, Vec<Piece>>;

/// Freed pages of a memory, and the position of their holder.
type Found = (MemoryId, Piece, u32);

/// Where freed pages were: the holder's position, and the memory.
type Places = HashMap<(u32, MemoryId), PageRanges>;

/// Returns, for each snapshot, the freed pages that it refers to, in order. Skips
/// unreadable images.
///
/// Each snapshot is overlaid on the result of its parent, so a chain needs as many merges
/// as it has snapshots.
///
/// # Errors
/// [`ChainError::Directory`], [`ChainError::TooDeep`].
pub(super) fn gone(chain: &Chain) -> Result<Vec<Vec<Gone>>> {
    let mut found: Vec<Vec<Found>> = vec![Vec::new(); chain.snapshots().len()];
    if !chain.snapshots().iter().any(|snapshot| has_journal(&*snapshot.images)) {
        return Ok(vec![Vec::new(); found.len()]);
    }
    if let Some(snapshot) = chain.snapshots().get(piece::LAYER_LIMIT) {
        let dir = snapshot.path().to_owned();
        return Err(ChainError::TooDeep { dir, limit: piece::LAYER_LIMIT });
    }
    let mut children = vec![0; found.len()];
    for snapshot in chain.snapshots() {
        if let Ok(Some(parent)) = snapshot.parent {
            children[parent.position()] += 1;
        }
    }
    let is_tip: Vec<bool> = children.iter().map(|count| *count == 0).collect();
    let mut resolved: HashMap<SnapshotId, Resolved> = HashMap::new();
    let mut needed = Places::new();
    for id in chain.ids() {
        let parent = chain.snapshot(id).parent.as_ref().ok().copied().flatten();
        let below = parent.and_then(|parent| resolved.get(&parent));
        let here = resolve(chain, id, below)?;
        for (memory, piece, holder) in freed(&here) {
            let position = id.position();
            if is_tip[position] {
                needed.entry((holder, memory)).or_default().insert(file_pages(piece));
            }
            found[position].push((memory, *piece, holder));
        }
        if let Some(parent) = parent {
            children[parent.position()] -= 1;
            if children[parent.position()] == 0 {
                resolved.remove(&parent);
            }
        }
        if !is_tip[id.position()] {
            resolved.insert(id, here);
        }
    }
    Ok(found.into_iter().map(|found| judge(found, &needed)).collect())
}

/// Whether a snapshot has a journal, so that pages of its files may have been freed.
fn has_journal(images: &dyn ImageStore) -> bool {
    let is_journal =
        |name: &str| desc::by_file_name(name).is_some_and(|(desc, _)| desc.kind == Kind::Punched);
    images.list().is_ok_and(|names| names.iter().any(|name| is_journal(name)))
}

/// Separates pages that a tip refers to, too, from the others.
fn judge(mut found: Vec<Found>, needed: &Places) -> Vec<Gone> {
    found.sort_unstable_by_key(|(memory, piece, _)| (*memory, piece.first()));
    let mut gone = Vec::new();
    let none = PageRanges::new();
    for (memory, piece, holder) in found {
        let pages = file_pages(&piece);
        let begin = pages.start;
        for (part, needed) in needed.get(&(holder, memory)).unwrap_or(&none).split(pages) {
            let first = PageIndex(piece.first().0 + (part.start - begin));
            let holder = SnapshotId::at(holder as usize);
            gone.push(Gone { memory, first, pages: part.end - part.start, holder, needed });
        }
    }
    gone
}

/// Returns the freed pieces, and the number of their layer.
fn freed(resolved: &Resolved) -> impl Iterator<Item = (MemoryId, &Piece, u32)> {
    resolved.iter().flat_map(|(memory, pieces)| {
        pieces.iter().filter_map(|piece| match piece.place() {
            PiecePlace::Punched { layer, .. } => Some((*memory, piece, layer)),
            _ => None,
        })
    })
}

fn file_pages(piece: &Piece) -> std::ops::Range<u64> {
    match piece.place() {
        PiecePlace::Stored { file_page, .. } | PiecePlace::Punched { file_page, .. } => {
            file_page..file_page + piece.pages()
        }
        _ => 0..0,
    }
}

fn resolve(chain: &Chain, id: SnapshotId, below: Option<&Resolved>) -> Result<Resolved> {
    let images = chain.images(id);
    let layer = u32::try_from(id.position()).expect("below the limit of layers");
    let mut resolved = Resolved::new();
    for memory in chain.memories(id)? {
        let Ok(mut reader) = images.pagemap(memory) else { continue };
        let gone = punched::read(&**images, &memory.pagemap_name(), reader.pages_id());
        let Ok(gone) = gone else { continue };
        let gone = gone.unwrap_or_default();
        let (mut own, mut present) = (Vec::new(), 0);
        for entry in reader.by_ref().map_while(|entry| entry.ok()) {
            pieces(layer, present, &entry, &gone, |piece| piece::push(&mut own, piece));
            present += entry.pages_in_file();
        }
        let map = |pieces| Merged { pieces, gaps: Gaps::Nothing, lowest: layer };
        let merged = match below.and_then(|below| below.get(&memory)) {
            Some(below) => overlay::merge(&[map(&own), map(below)]),
            None => own,
        };
        resolved.insert(memory, merged);
    }
    Ok(resolved)
}
