//! A chain as one archive.

use std::{collections::HashSet, io::IoSliceMut, ops::Range, path::Path, time::SystemTime};

use super::{Chain, ChainError, Result, SnapshotId};
use crate::image::{
    Kind, PARENT_LINK,
    store::{ArchiveWriter, Beside, CopyError, StoredFile, Whence},
};

/// What the directory of a container's images is called by container engines.
pub const CHECKPOINT: &str = "checkpoint";

/// Writes a snapshot and its ancestors to an archive, with their links, as they are.
///
/// What a container engine exported beside the snapshot is kept, and the snapshot is called
/// [`CHECKPOINT`] then, so that the engine restores from the archive. `progress` gets the
/// bytes that are done, and their total.
///
/// # Errors
/// A broken link; what cannot be read; what keeps the archive from being written.
pub fn pack(
    chain: &Chain,
    tip: SnapshotId,
    out: &Path,
    replace: bool,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<()> {
    let failed = |source| ChainError::Pack { path: out.to_owned(), source };
    let mut ids = vec![tip];
    while let Some(parent) = chain.snapshot(ids[ids.len() - 1]).parent.clone()? {
        ids.push(parent);
    }
    ids.reverse();
    let mut total = 0;
    for id in &ids {
        let allocated = chain.images(*id).allocated();
        total += allocated.map_err(|source| ChainError::Open {
            path: chain.snapshot(*id).path().to_owned(),
            source,
        })?;
    }
    let mut done = 0;
    let mut step = |bytes| {
        done += bytes;
        progress(done.min(total), total);
    };
    let beside = beside(chain, tip)?;
    let mut archive = ArchiveWriter::create(out, replace).map_err(failed)?;
    let mut names: HashSet<String> = beside.iter().map(|beside| beside.name.clone()).collect();
    let tip_name = if beside.is_empty() { &chain.snapshot(tip).name } else { CHECKPOINT };
    names.insert(tip_name.to_owned());
    let mut parent: Option<String> = None;
    for id in ids {
        let name = match &chain.snapshot(id).name {
            _ if id == tip => tip_name.to_owned(),
            name => unused(name, &mut names),
        };
        let images = chain.images(id);
        let modified = |file: &str| images.stat(file).map(|stat| stat.modified);
        let date = modified(&Kind::Inventory.file_name(0)).unwrap_or(SystemTime::UNIX_EPOCH);
        archive.folder(&name, date).map_err(failed)?;
        if let Some(parent) = parent {
            let link = format!("{name}/{PARENT_LINK}");
            archive.link(&link, &format!("../{parent}"), date).map_err(failed)?;
        }
        let mut files = chain.list(id)?;
        files.sort_unstable();
        for file in files {
            let open = |source| ChainError::Open { path: images.path_of(&file), source };
            if file == PARENT_LINK || !images.stat(&file).map_err(open)?.is_file {
                continue;
            }
            let stored = images.open_at_random(&file).map_err(open)?;
            let path = images.path_of(&file);
            copy(&mut archive, out, &format!("{name}/{file}"), &*stored, &path, &mut step)?;
        }
        parent = Some(name);
    }
    copy_beside(&mut archive, out, &beside)?;
    archive.commit().map_err(failed)
}

/// Returns what a container engine exported beside a snapshot.
///
/// # Errors
/// [`ChainError::Open`].
pub fn beside(chain: &Chain, id: SnapshotId) -> Result<Vec<Beside>> {
    let path = || chain.snapshot(id).path().to_owned();
    chain.images(id).beside().map_err(|source| ChainError::Open { path: path(), source })
}

/// Copies these files into an archive.
///
/// # Errors
/// As [`pack`].
pub fn copy_beside(archive: &mut ArchiveWriter, out: &Path, beside: &[Beside]) -> Result<()> {
    for Beside { name, file } in beside {
        copy(archive, out, name, &**file, Path::new(name), &mut |_| {})?;
    }
    Ok(())
}

/// Returns a name that no snapshot in the archive has.
fn unused(name: &str, names: &mut HashSet<String>) -> String {
    let numbered = (2..).map(|number: u32| format!("{name}~{number}"));
    let mut candidates = std::iter::once(name.to_owned()).chain(numbered);
    candidates.find(|name| names.insert(name.clone())).expect("some number is free")
}

/// Copies a file, which messages call `path`, leaving its holes holes.
fn copy(
    archive: &mut ArchiveWriter,
    out: &Path,
    name: &str,
    file: &dyn StoredFile,
    path: &Path,
    step: &mut dyn FnMut(u64),
) -> Result<()> {
    let failed = |source| ChainError::Open { path: path.to_owned(), source };
    let stat = file.stat().map_err(failed)?;
    let data = data(file, stat.len).map_err(failed)?;
    let read = |offset, buffer: &mut [u8]| {
        let mut done = 0;
        while done < buffer.len() {
            let at = offset + done as u64;
            let length = buffer.len() as u64;
            let rest = IoSliceMut::new(&mut buffer[done..]);
            let path = path.to_owned();
            match file.read_vectored_at(&mut [rest], at) {
                Ok(0) => {
                    let end = at;
                    return Err(ChainError::Truncated { path, offset, wanted: length, end });
                }
                Ok(read) => done += read,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(source) => return Err(ChainError::Read { path, offset: at, length, source }),
            }
        }
        step(buffer.len() as u64);
        Ok(())
    };
    archive.file(name, stat.modified, stat.len, &data, read).map_err(|error| match error {
        CopyError::Read(error) => error,
        CopyError::Write(source) => ChainError::Pack { path: out.to_owned(), source },
    })
}

/// Returns where a file has data.
fn data(file: &dyn StoredFile, len: u64) -> std::io::Result<Vec<Range<u64>>> {
    let (mut ranges, mut at) = (Vec::new(), 0);
    while let Some(data) = file.seek(at, Whence::Data)?.filter(|data| *data < len) {
        at = file.seek(data, Whence::Hole)?.unwrap_or(len).clamp(data, len);
        if at == data {
            break;
        }
        ranges.push(data..at);
    }
    Ok(ranges)
}
