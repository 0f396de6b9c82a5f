//! Writes a snapshot as an image directory without parents.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{NodeType, ROOT, Result, View, ViewError, Whence, seek};
use crate::{
    chain::{CHECKPOINT, ChainError, Content, Run, Source, beside, copy_beside, read_at},
    image::{
        Kind, regular,
        store::{ArchiveWriter, CopyError},
    },
    units::BLOCK_BYTES,
};

/// How many bytes are copied between two progress reports.
const STEP_BYTES: u64 = 64 << 20;

/// The buffer size where the kernel cannot copy.
const BUFFER_BYTES: usize = 1 << 20;

/// The mode of a new image directory: memory is confidential.
const DIRECTORY_MODE: u32 = 0o700;

/// The name of the inventory until everything else is on disk.
const UNFINISHED_INVENTORY: &str = ".inventory.img.unfinished";

/// Writes the flat image directory at the root of `view` to `out`, which must not exist or be empty.
/// `progress` receives the bytes copied so far, and their total.
///
/// The inventory appears only when everything else is on disk. So even after a crash, `out` is either
/// complete or not an image directory. On file systems that can share blocks between files (btrfs,
/// xfs), the copies share blocks.
///
/// # Errors
/// If pages of the snapshot were freed, fails before writing anything. After any other error,
/// removes what was written.
pub fn flatten(view: &View, out: &Path, progress: &mut dyn FnMut(u64, u64)) -> Result<()> {
    view.chain().require_whole(view.tip())?;
    let made = match fs::DirBuilder::new().mode(DIRECTORY_MODE).create(out) {
        Ok(()) => true,
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && is_empty(out)? => false,
        Err(source) => return Err(ViewError::Write { path: out.to_owned(), source }),
    };
    let mut written = Vec::new();
    let result = write_all(view, out, &mut written, progress);
    if result.is_err() {
        // Report the first error, not those of cleaning up.
        for path in written {
            let _ = fs::remove_file(path);
        }
        if made {
            let _ = fs::remove_dir(out);
        }
    }
    result
}

fn is_empty(dir: &Path) -> Result<bool> {
    let failed = |source| ViewError::Write { path: dir.to_owned(), source };
    if fs::read_dir(dir).map_err(failed)?.next().is_none() {
        return Ok(true);
    }
    Err(ViewError::NotEmpty { path: dir.to_owned() })
}

/// Writes all files, and lists those created in `written`.
fn write_all(
    view: &View,
    out: &Path,
    written: &mut Vec<PathBuf>,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<()> {
    let (_, entries) = view.entries(ROOT)?;
    let files: Vec<_> = entries.iter().filter(|entry| entry.kind == NodeType::File).collect();
    let mut total = 0;
    for file in &files {
        total += view.attr(file.ino)?.blocks * BLOCK_BYTES;
    }
    let mut done = 0;
    let mut step = |bytes| {
        done += bytes;
        progress(done.min(total), total);
    };
    let inventory = Kind::Inventory.file_name(0);
    let unfinished = out.join(UNFINISHED_INVENTORY);
    for file in files {
        let path = if file.name == inventory { unfinished.clone() } else { out.join(&file.name) };
        let failed = |source| ViewError::Write { path: path.clone(), source };
        let target = regular::create(&path);
        let target = Target::new(target.map_err(failed)?, &path);
        written.push(path.clone());
        // Only the owner may read it, whatever the mode of the images: it holds memory.
        let mut lost = |error: &Arc<ChainError>, _| Err(ChainError::Lost(Arc::clone(error)).into());
        copy(&*view.open(file.ino)?.content, &target, &mut step, &mut lost)?;
    }
    // Sync all at the end: a journalling file system then commits at most once.
    let sync = |path: &Path| {
        let synced = File::open(path).and_then(|file| file.sync_all());
        synced.map_err(|source| ViewError::Write { path: path.to_owned(), source })
    };
    for path in written.iter() {
        sync(path)?;
    }
    sync(out)?;
    let failed = |source| ViewError::Write { path: out.to_owned(), source };
    let inventory = out.join(inventory);
    written.push(inventory.clone());
    fs::rename(&unfinished, &inventory).map_err(failed)?;
    sync(out)?;
    let above = out.parent().filter(|path| !path.as_os_str().is_empty());
    sync(above.unwrap_or(Path::new(".")))?;
    progress(total, total);
    Ok(())
}

/// Writes the flat image directory that is the root of `view` to an archive, as the directory
/// `checkpoint`, beside what a container engine exported with the snapshot; one that is there
/// is an error unless it is to be replaced. `progress` as for [`flatten`].
///
/// # Errors
/// As [`flatten`].
pub fn flatten_to_archive(
    view: &View,
    out: &Path,
    replace: bool,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<()> {
    view.chain().require_whole(view.tip())?;
    let failed = |source| ViewError::Write { path: out.to_owned(), source };
    let beside = beside(view.chain(), view.tip())?;
    let (_, entries) = view.entries(ROOT)?;
    let files: Vec<_> = entries.iter().filter(|entry| entry.kind == NodeType::File).collect();
    let mut total = 0;
    for file in &files {
        total += view.attr(file.ino)?.blocks * BLOCK_BYTES;
    }
    let mut archive = ArchiveWriter::create(out, replace).map_err(failed)?;
    let inventory = Kind::Inventory.file_name(0);
    let inventory = files.iter().find(|file| file.name == inventory);
    let date = inventory.map_or(Ok(ROOT), |file| Ok(file.ino)).and_then(|ino| view.attr(ino))?;
    archive.folder(CHECKPOINT, date.mtime).map_err(failed)?;
    let mut done = 0;
    for file in files {
        let content = view.open(file.ino)?.content;
        let (mut data, mut next) = (Vec::new(), 0);
        while let Some(start) = seek(&*content, next, Whence::Data)? {
            next = seek(&*content, start, Whence::Hole)?.unwrap_or(content.len());
            data.push(start..next);
        }
        let name = format!("{CHECKPOINT}/{}", file.name);
        let modified = view.attr(file.ino)?.mtime;
        let read = |offset, buffer: &mut [u8]| -> Result<()> {
            read_at(&*content, offset, buffer)?;
            done += buffer.len() as u64;
            progress(done.min(total), total);
            Ok(())
        };
        let copied = archive.file(&name, modified, content.len(), &data, read);
        copied.map_err(|error| match error {
            CopyError::Read(error) => error,
            CopyError::Write(source) => failed(source),
        })?;
    }
    copy_beside(&mut archive, out, &beside)?;
    archive.commit().map_err(failed)
}

/// The file that is being written.
pub(super) struct Target<'a> {
    file: File,
    path: &'a Path,
}

impl<'a> Target<'a> {
    pub(super) fn new(file: File, path: &'a Path) -> Self {
        Self { file, path }
    }

    fn failed(&self, source: io::Error) -> ViewError {
        ViewError::Write { path: self.path.to_owned(), source }
    }
}

/// Copies `content`, and keeps its holes. Calls `lost` for bytes that cannot be read, with their
/// number; they are a hole in the copy if it returns no error.
pub(super) fn copy(
    content: &dyn Content,
    target: &Target,
    step: &mut impl FnMut(u64),
    lost: &mut impl FnMut(&Arc<ChainError>, u64) -> Result<()>,
) -> Result<()> {
    target.file.set_len(content.len()).map_err(|source| target.failed(source))?;
    let mut runs = Vec::new();
    let mut next = 0;
    while let Some(data) = seek(content, next, Whence::Data)? {
        let end = seek(content, data, Whence::Hole)?.unwrap_or(content.len());
        next = data;
        while next < end {
            let len = STEP_BYTES.min(end - next);
            runs.clear();
            content.runs(next, len, &mut runs)?;
            for run in &runs {
                match &run.source {
                    Source::Lost(error) => lost(error, run.len)?,
                    _ => copy_run(content, run, next, target)?,
                }
                next += run.len;
            }
            step(len);
        }
    }
    Ok(())
}

fn copy_run(content: &dyn Content, run: &Run, offset: u64, target: &Target) -> Result<()> {
    match &run.source {
        Source::Zero => Ok(()),
        Source::File(file, start) => {
            let copied = file
                .copy_in_kernel(*start, run.len, &target.file, offset)
                .map_err(|source| target.failed(source))?;
            copy_through_buffer(content, offset + copied, run.len - copied, target)
        }
        Source::Bytes(..) | Source::Lost(_) => {
            copy_through_buffer(content, offset, run.len, target)
        }
    }
}

fn copy_through_buffer(
    content: &dyn Content,
    offset: u64,
    len: u64,
    target: &Target,
) -> Result<()> {
    use std::os::unix::fs::FileExt;
    let mut buffer = Vec::new();
    let mut done = 0;
    while done < len {
        let count = usize::try_from(len - done).unwrap_or(usize::MAX).min(BUFFER_BYTES);
        buffer.resize(count, 0);
        read_at(content, offset + done, &mut buffer)?;
        target.file.write_all_at(&buffer, offset + done).map_err(|source| target.failed(source))?;
        done += count as u64;
    }
    Ok(())
}
