//! Which pages a chain holds whose directories need not be snapshots.
//!
//! The directory of a page server has pages and pagemaps, but no inventory. The dump that sent the pages
//! has an inventory, but only a record of what it has sent. So neither end has a [`Chain`](super::Chain)
//! of these pages.

use std::{
    io,
    path::{Path, PathBuf},
};

use super::{ChainError, LinkError, Result, piece::LAYER_LIMIT};
use crate::{
    image::{
        ImageError, ImageStore, Kind, MemoryId, PagemapReader, Presence,
        store::{BrokenLink, Directory, Stat},
    },
    units::{PageIndex, PageRanges, page_bytes},
};

/// The images that say which pages there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pagemaps {
    /// Pagemaps, beside the pages.
    Stored,
    /// Records of what dumps have sent to a page server.
    Sent,
}

/// Returns the pages of a memory that the directory `dir` and its ancestors hold. `None` if `dir` does
/// not have the memory, or if pages may have been freed in one of the directories.
///
/// # Errors
/// [`ChainError::Image`] for a pagemap that cannot be read, [`ChainError::Link`] and
/// [`ChainError::TooDeep`] for a chain that is broken where the memory needs it.
pub fn held_pages(dir: &Path, memory: MemoryId, from: Pagemaps) -> Result<Option<PageRanges>> {
    let mut dir = Directory::at(dir);
    let mut asked = PageRanges::new();
    asked.insert(0..PageIndex::END.0);
    let mut held: Option<PageRanges> = None;
    for _ in 0..LAYER_LIMIT {
        let Some(mut pagemap) = open(dir.name(), memory, from)? else { return Ok(held) };
        let held = held.get_or_insert_default();
        let mut left = PageRanges::new();
        let mut stored = 0;
        for entry in pagemap.by_ref() {
            let entry = entry?;
            stored += entry.pages_in_file();
            let pages = asked.within(entry.first.0..entry.end().0);
            match entry.presence {
                Presence::Present => pages.for_each(|pages| held.insert(pages)),
                Presence::Parent => pages.for_each(|pages| left.insert(pages)),
                Presence::Absent => {}
            }
        }
        if from == Pagemaps::Stored && !is_whole(&dir, pagemap.pages_id(), stored)? {
            return Ok(None);
        }
        if left.is_empty() {
            return Ok(Some(std::mem::take(held)));
        }
        asked = left;
        dir = match parent_of(dir.name())? {
            Some(parent) => Directory::at(parent),
            None => return Ok(Some(std::mem::take(held))),
        };
    }
    Err(ChainError::TooDeep { dir: dir.name().to_owned(), limit: LAYER_LIMIT })
}

/// Returns the directory to which the parent link of `dir` leads, also if that is no snapshot.
///
/// # Errors
/// [`ChainError::Link`].
pub fn parent_of(dir: &Path) -> Result<Option<PathBuf>> {
    match Directory::at(dir).parent_of_pages() {
        Ok(parent) => Ok(parent.map(|parent| parent.name().to_owned())),
        Err(BrokenLink { target, problem }) => {
            Err(LinkError::Dangling { dir: dir.to_owned(), target, problem }.into())
        }
    }
}

fn open(dir: &Path, memory: MemoryId, from: Pagemaps) -> Result<Option<PagemapReader>> {
    let (kind, number) = match from {
        Pagemaps::Stored => memory.pagemap(),
        Pagemaps::Sent => memory.sent_pagemap(),
    };
    match PagemapReader::open(&dir.join(kind.file_name(number))) {
        Ok(pagemap) => Ok(Some(pagemap)),
        Err(ImageError::Open { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            Ok(None)
        }
        Err(error) => Err(error.into()),
    }
}

/// Whether a pages file has so many pages, none of which was freed.
fn is_whole(dir: &Directory, pages_id: u32, pages: u64) -> Result<bool> {
    let is_there = |kind: Kind| match dir.stat(&kind.file_name(pages_id.into())) {
        Ok(stat) => Ok(Some(stat)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => {
            let path: PathBuf = dir.name().join(kind.file_name(pages_id.into()));
            Err(ChainError::from(ImageError::Open { path, source }))
        }
    };
    if is_there(Kind::Punched)?.is_some() {
        return Ok(false);
    }
    Ok(is_there(Kind::Pages)?.is_some_and(|Stat { len, allocated, .. }| {
        len >= page_bytes(pages) && allocated >= page_bytes(pages)
    }))
}
