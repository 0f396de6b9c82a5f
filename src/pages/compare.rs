//! Decides where each page goes: into this snapshot, to the parent, or nowhere.

use super::{Result, Stretch, stretch::len};
use crate::{
    chain::{MemoryBytes, Place, read_at},
    image::Presence,
    units::{PAGE_LEN, PageIndex},
};

/// Decides for each page of `runs`, whose contents are `bytes`, where it goes. `room` is a buffer for
/// the parent's contents.
///
/// # Errors
/// The parent chain cannot be read.
pub(super) fn compare(
    runs: &[Stretch],
    bytes: &[u8],
    parent: Option<&MemoryBytes>,
    room: &mut Vec<u8>,
    places: &mut Vec<Presence>,
) -> Result<()> {
    places.clear();
    if let Some(memory) = parent {
        room.resize(bytes.len(), 0);
        let mut at = 0;
        for run in runs {
            let end = at + len(run.pages);
            read_parent(memory, run, &mut room[at..end])?;
            at = end;
        }
    }
    let mut pages = bytes.chunks_exact(PAGE_LEN).enumerate();
    for run in runs {
        for (index, (number, page)) in run.range().zip(&mut pages) {
            let at = number * PAGE_LEN;
            let zero = is_zero(page);
            let is_in_parent = || match parent {
                Some(memory) if zero => has_zeros(memory, PageIndex(index)),
                Some(_) => *page == room[at..at + PAGE_LEN],
                None => false,
            };
            places.push(if zero && !run.zeros_stored {
                Presence::Absent
            } else if is_in_parent() {
                Presence::Parent
            } else {
                Presence::Present
            });
        }
    }
    Ok(())
}

/// Reads the parent chain's contents of a run. Pages that the chain does not have read as zeros; the
/// caller does not compare pages of zeros with them.
fn read_parent(memory: &MemoryBytes, run: &Stretch, target: &mut [u8]) -> Result<()> {
    if let Ok(count) = read_at(memory, run.first.address(), target) {
        target[count..].fill(0);
        return Ok(());
    }
    // Some page cannot be read, because it was punched, say: it counts as different.
    for (number, page) in (run.first.0..).zip(target.chunks_exact_mut(PAGE_LEN)) {
        if !read_stored(memory, PageIndex(number), page) {
            page.fill(0);
        }
    }
    Ok(())
}

/// Reads a page. Returns false if the parent chain does not have it, or cannot read it.
fn read_stored(memory: &MemoryBytes, page: PageIndex, target: &mut [u8]) -> bool {
    let extent = memory.index().find(page);
    extent.is_some_and(|extent| matches!(extent.place, Place::Stored { .. }))
        && read_at(memory, page.address(), target).is_ok_and(|count| count == target.len())
}

/// Whether the parent chain stores this page, all zeros, and can read it.
fn has_zeros(memory: &MemoryBytes, page: PageIndex) -> bool {
    let mut bytes = [0; PAGE_LEN];
    read_stored(memory, page, &mut bytes) && is_zero(&bytes)
}

/// Whether all bytes of a page are zero.
fn is_zero(page: &[u8]) -> bool {
    // Most pages with contents have some at the start.
    let (first, rest) = page.split_at(64);
    first.iter().all(|byte| *byte == 0)
        && rest.chunks_exact(64).all(|line| line.iter().fold(0, |sum, byte| sum | byte) == 0)
}
