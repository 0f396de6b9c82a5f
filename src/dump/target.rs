//! Where a dump writes to: its images, and the page server that takes its pages.

use std::{fs::File, path::Path};

use super::{DumpError, Parent, Result, Store, parent_name};
use crate::{
    chain::{self, Pagemaps},
    fault::{self, Point},
    image::{self, Part, SnapshotWriter, proto},
    pages::{self, Copied, Memory, PageServer, wire::DumpId},
    sys::{cancel, fds},
};

/// The target of a dump.
#[derive(Debug)]
pub(super) struct Target {
    pub(super) images: SnapshotWriter,
    /// Takes the pages.
    pub(super) server: Option<PageServer>,
}

/// Connects to the page server, before the dump touches the tree.
///
/// # Errors
/// The server does not answer, or the directory holds a dump, whose pages would be taken for those of the
/// new one.
pub(super) fn connect(store: &Store, parent: Option<&Parent>) -> Result<Option<PageServer>> {
    let Some(server) = &store.server else { return Ok(None) };
    if let Some(name) = image::leftover(&store.images_dir, true)? {
        let dir = store.images_dir.clone();
        return Err(DumpError::HasPages { dir, name: name.to_string_lossy().into_owned() });
    }
    if store.free_parent {
        log::warn!(
            "--auto-dedup has no effect: the page server has the pages; rcriu dedup frees those of \
             ancestors when all images are in one place"
        );
    }
    let parent = parent_name(parent)?.map(|name| DumpId::of_name(&name));
    Ok(Some(PageServer::connect(server, parent)?))
}

impl Target {
    /// Begins to write images.
    ///
    /// # Errors
    /// As [`SnapshotWriter::begin`].
    pub(super) fn begin(dir: &Path, server: Option<PageServer>) -> Result<Self> {
        let part = if server.is_some() { Part::WithoutPages } else { Part::Whole };
        Ok(Self { images: SnapshotWriter::begin_part(dir, part)?, server })
    }

    /// Syncs the images and makes them a snapshot. Calls `check` just before that.
    ///
    /// # Errors
    /// Why they are no snapshot.
    pub(super) fn commit(
        self,
        inventory: &proto::InventoryEntry,
        check: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        fault::hit(Point::DumpWritten)?;
        self.images.sync(|file: &File| fds::start_writeback(file, 0, 0))?;
        fault::hit(Point::DumpSynced)?;
        if cancel::is_cancelled() {
            return Err(DumpError::Cancelled);
        }
        check()?;
        if let Some(server) = self.server {
            server.close(inventory.dump_criu_run_id.as_deref().map(DumpId::of_name))?;
        }
        self.images.commit(inventory)?;
        Ok(fault::hit(Point::DumpCommit)?)
    }
}

/// Copies memories into the images, or to a page server. `first` is the number of the first pages file,
/// `early` is as for [`pages::write`].
///
/// # Errors
/// A memory cannot be read, or not be written.
pub(super) fn copy(
    memories: &mut [Memory],
    first: u32,
    (images, server): (&SnapshotWriter, Option<&mut PageServer>),
    early: bool,
) -> Result<Copied> {
    Ok(match server {
        Some(server) => server.send(memories, first, images)?,
        None => pages::write(memories, first, images, early)?,
    })
}

/// Looks up each memory in the parent chain. If a page server has that chain, the records of what was sent
/// tell which pages it has.
///
/// # Errors
/// The parent chain cannot be read.
pub(super) fn find_parents(
    memories: &mut [Memory],
    parent: Option<&Parent>,
    server: Option<&PageServer>,
) -> Result<()> {
    for memory in memories {
        let Some((chain, snapshot)) = parent else {
            pages::require_stored(&mut memory.stretches, None);
            continue;
        };
        memory.parent = pages::parent_memory(chain, *snapshot, memory.id)?;
        let sent = match (&memory.parent, server) {
            (None, Some(_)) => {
                let dir = chain.directory(*snapshot)?;
                chain::held_pages(dir, memory.id, Pagemaps::Sent)?
            }
            _ => None,
        };
        match sent {
            Some(sent) => pages::require_held(&mut memory.stretches, &sent),
            None => {
                let index = memory.parent.as_ref().map(|parent| parent.index().as_ref());
                pages::require_stored(&mut memory.stretches, index);
            }
        }
    }
    Ok(())
}
