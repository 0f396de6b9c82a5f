//! Replaces pagemaps and pages files so that the snapshot reads the same at every moment,
//! and after a crash at any moment.
//!
//! Everything new is written to a hidden subdirectory of the snapshot, which is itself an
//! image directory: its contents are resolved and compared before anything is replaced. A
//! list in it says which files replace which, so that the remains of a killed run can be
//! told apart from files of the user. The steps are, each on disk before the next:
//!
//! 1. everything new is in the hidden directory and has been checked;
//! 2. the new pages files, with their journals, are in the snapshot, under numbers that no
//!    pagemap names, and so is the link to the parent, which no page needs yet;
//! 3. the new pagemaps replace the old ones, each by a rename: each names its pages file,
//!    so each memory is either old or new as a whole;
//! 4. images in which an object has a new number replace the old ones, each by a rename;
//!    the object's pagemap is there under both numbers;
//! 5. unused files are removed, and finally the hidden directory.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    fs::{self, DirBuilder, File},
    io::{self, BufWriter, Write as _},
    num::NonZeroUsize,
    os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, fchown, symlink},
    path::{Component, Path, PathBuf},
};

use prost_reflect::Value;

use super::{
    DedupError, Progress, Result, compare,
    objects::Objects,
    plan::{self, At, MemoryPlan, Plan},
};
use crate::{
    chain::{BackingFile, Chain, Files, SnapshotId, Whence, seek_file},
    fault::{self, Point},
    image::{
        Document, ImageWriter, Kind, MemoryId, PARENT_LINK, PagemapReader, PagemapWriter, desc,
        disk::Kernel,
        document::Content,
        punched::JournalWriter,
        regular,
        store::snapshot::{DEDUP_STAGE, DIRECTORY_MODE, names, sync, sync_all, write_error},
    },
    sys::fds,
    units::page_bytes,
};

/// The list in the hidden directory: lines `pages NUMBER` for new or replaced files, and
/// `shmem FROM TO` for renumbered objects.
const LIST: &str = "replaced";

/// The longest accepted list: 32 bytes for each of a million memories.
const LIST_LIMIT_BYTES: u64 = 32 << 20;

/// How many bytes are read at a time where the kernel cannot copy.
const BUFFER_BYTES: u64 = 1 << 20;

/// New images of a snapshot that are not in place yet.
#[derive(Debug)]
pub(super) struct Stage<'a> {
    /// The directory of the snapshot.
    dir: PathBuf,
    stage: PathBuf,
    plan: &'a Plan,
    /// The number of each memory's new pages file, in the order of the plan.
    pages_ids: Vec<u32>,
    published: bool,
}

impl<'a> Stage<'a> {
    /// Writes and checks everything new in `dir`, the directory of the snapshot or of a
    /// copy. `child` and `parent` are those of the plan.
    ///
    /// # Errors
    /// Files that cannot be read or written; a result that does not read as before.
    pub(super) fn make(
        dir: &Path,
        plan: &'a Plan,
        child: At,
        parent: Option<At>,
        progress: &dyn Progress,
    ) -> Result<Self> {
        let kept = plan.memories.iter().map(MemoryPlan::kept_pages).sum();
        progress.more(page_bytes(kept));
        let stage = dir.join(DEDUP_STAGE);
        DirBuilder::new()
            .mode(DIRECTORY_MODE)
            .create(&stage)
            .map_err(|source| write_error(&stage, source))?;
        let pages_ids = unused_numbers(child.dir(), plan.memories.len())?;
        let made = Self { dir: dir.to_owned(), stage, plan, pages_ids, published: false };
        made.list()?;
        if let Some(parent) = parent {
            link(&made.stage, parent.dir())?;
        }
        let inventory = Kind::Inventory.file_name(0);
        copy_file(&child.dir().join(&inventory), &made.stage.join(&inventory))?;
        for (memory, pages_id) in plan.memories.iter().zip(&made.pages_ids) {
            made.memory(memory, *pages_id, child, progress)?;
        }
        for (name, numbers) in &plan.renumbered {
            renumber(&child.dir().join(name), &made.stage.join(name), numbers)?;
        }
        made.check(child, parent)?;
        fault::hit(Point::DedupMade)?;
        sync_all(&made.stage, |file| fds::start_writeback(file, 0, 0))?;
        Ok(made)
    }

    /// Writes and syncs the list of replaced files. From here on, the remains of this run
    /// can be identified.
    fn list(&self) -> Result<()> {
        let mut text = String::new();
        let old = self.plan.memories.iter().map(|memory| memory.pages_id);
        for number in self.pages_ids.iter().copied().chain(old) {
            // Writing to a string does not fail.
            let _ = writeln!(text, "pages {number}");
        }
        for memory in &self.plan.memories {
            if let (MemoryId::Shared(from), MemoryId::Shared(to)) = (memory.memory, memory.becomes)
                && from != to
            {
                let _ = writeln!(text, "shmem {from} {to}");
            }
        }
        let path = self.stage.join(LIST);
        let written = regular::create(&path).and_then(|mut file| file.write_all(text.as_bytes()));
        written.map_err(|source| write_error(&path, source))?;
        sync(&path)?;
        sync(&self.stage)?;
        Ok(sync(&self.dir)?)
    }

    /// Writes the pagemap and the pages of a memory.
    fn memory(
        &self,
        memory: &MemoryPlan,
        pages_id: u32,
        child: At,
        progress: &dyn Progress,
    ) -> Result<()> {
        let from = memory.index.layers()[0].file;
        let path = self.stage.join(Kind::Pages.file_name(pages_id.into()));
        let target = regular::create(&path).map_err(|source| write_error(&path, source))?;
        let old = child.dir().join(Kind::Pages.file_name(memory.pages_id.into()));
        // Without pages, no pages file is needed.
        if !memory.kept.is_empty() {
            let from = child.chain.files().get(from)?;
            let mut offset = 0;
            for (file_page, pages) in &memory.kept {
                let (start, len) = (page_bytes(*file_page), page_bytes(*pages));
                if memory.gone.is_some() {
                    offset = start;
                }
                copy(&from, start, len, &target, &path, offset)?;
                offset += len;
                progress.done(len);
            }
        }
        if let Some(gone) = &memory.gone {
            let len = page_bytes(gone.total);
            target.set_len(len).map_err(|source| write_error(&path, source))?;
        }
        if old.exists() {
            resemble(&target, &path, &old)?;
        }
        let path = self.stage.join(memory.becomes.pagemap_name());
        let image = ImageWriter::create(&path, Kind::Pagemap)?;
        let mut pagemap = PagemapWriter::new(image, pages_id)?;
        for entry in &memory.entries {
            pagemap.entry(entry)?;
        }
        let file = pagemap.into_image().finish()?;
        resemble(&file, &path, &child.dir().join(memory.memory.pagemap_name()))?;
        if let Some(gone) = &memory.gone {
            // It belongs to the pagemap and inventory, which have their final contents.
            let name = memory.becomes.pagemap_name();
            let mut journal = JournalWriter::open(&self.stage, &name, pages_id)?;
            journal.append(&Kernel, &gone.pages)?;
            journal.sync(&Kernel)?;
        }
        Ok(())
    }

    /// Resolves the new images in their future chain, and compares them with the current
    /// ones.
    fn check(&self, child: At, parent: Option<At>) -> Result<()> {
        let chain = Chain::open(&self.stage)?;
        let id = snapshot_at(&chain, &self.stage)?;
        let staged = At { chain: &chain, id };
        for memory in &self.plan.memories {
            let resolved = chain.index(id, memory.becomes)?;
            let copies = plan::check(memory, &resolved, (child, parent, staged))?;
            let files = (child.chain.files(), chain.files());
            let equal = compare::equal(&copies, files.0, files.1, &|_| {})?;
            let mut equal = equal.iter();
            let mut rest = equal.next().copied();
            for copy in &copies {
                // Runs of equal pages include copies that follow each other.
                let covered = rest.is_some_and(|(first, pages)| {
                    first <= copy.first && copy.first.0 + copy.pages <= first.0 + pages
                });
                if !covered {
                    return Err(DedupError::Verify {
                        dir: child.dir().to_owned(),
                        memory: memory.memory,
                        first: copy.first,
                        problem: "its copy differs",
                    });
                }
                if let Some((first, pages)) = rest
                    && first.0 + pages == copy.first.0 + copy.pages
                {
                    rest = equal.next().copied();
                }
            }
        }
        Ok(())
    }

    /// Returns the new files with their destinations: pages files first, then pagemaps,
    /// then images with new numbers.
    pub(super) fn files(&self) -> [Vec<(PathBuf, String)>; 3] {
        let place = |name: String| (self.stage.join(&name), name);
        let pages = self.pages_ids.iter().zip(&self.plan.memories).flat_map(|(id, memory)| {
            let journal = memory.gone.as_ref().map(|_| Kind::Punched.file_name((*id).into()));
            [Some(Kind::Pages.file_name((*id).into())), journal]
        });
        let pages = pages.flatten().map(place);
        let pagemaps = self.plan.memories.iter().map(|memory| place(memory.becomes.pagemap_name()));
        let renumbered = self.plan.renumbered.keys().cloned().map(place);
        [pages.collect(), pagemaps.collect(), renumbered.collect()]
    }

    /// Puts everything into place, and removes the replaced files.
    ///
    /// # Errors
    /// Files that cannot be renamed or removed. At any such point the snapshot reads as
    /// before, and [`recover`] finishes the work.
    pub(super) fn publish(mut self, parent: Option<&Path>) -> Result<()> {
        self.published = true;
        let [pages, pagemaps, renumbered] = self.files();
        let put = |(path, name): &(PathBuf, String)| -> Result<()> {
            let target = self.dir.join(name);
            Ok(fs::rename(path, &target).map_err(|source| write_error(&target, source))?)
        };
        pages.iter().try_for_each(put)?;
        if let Some(parent) = parent {
            link(&self.dir, parent)?;
        }
        sync(&self.dir)?;
        fault::hit(Point::DedupLinked)?;
        for (position, pagemap) in pagemaps.iter().enumerate() {
            put(pagemap)?;
            if position == 0 {
                fault::hit(Point::DedupReplacing)?;
            }
        }
        sync(&self.dir)?;
        fault::hit(Point::DedupReplaced)?;
        renumbered.iter().try_for_each(put)?;
        sync(&self.dir)?;
        fault::hit(Point::DedupRenumbered)?;
        recover(&self.dir)?;
        Ok(())
    }

    /// Leaves the new files to the caller, which has moved them out of the hidden
    /// directory.
    pub(super) fn taken(mut self) -> Result<()> {
        self.published = true;
        fs::remove_dir_all(&self.stage).map_err(|source| write_error(&self.stage, source).into())
    }
}

impl Drop for Stage<'_> {
    /// Removes new files that were not used.
    fn drop(&mut self) {
        if !self.published
            && let Err(error) = fs::remove_dir_all(&self.stage)
        {
            log::warn!("cannot remove {}: {error}", self.stage.display());
        }
    }
}

/// Links a snapshot to its parent, unless it is linked.
pub(super) fn link(dir: &Path, parent: &Path) -> Result<()> {
    let path = dir.join(PARENT_LINK);
    match symlink(relative(dir, parent), &path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            Err(write_error(&path, error).into())
        }
        _ => Ok(()),
    }
}

/// Finishes or reverts interrupted work in a snapshot: removes files of that work that its
/// images do not refer to. Returns whether there was any.
///
/// # Errors
/// Images that cannot be read; files that cannot be removed.
pub(super) fn recover(dir: &Path) -> Result<bool> {
    let stage = dir.join(DEDUP_STAGE);
    if !stage.is_dir() {
        return Ok(false);
    }
    let path = stage.join(LIST);
    let list = match regular::read(&path, LIST_LIMIT_BYTES) {
        Ok(list) => String::from_utf8_lossy(&list).into_owned(),
        // The work had not begun, or only this step is left.
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        Err(source) => return Err(DedupError::File { step: "read", path, source }),
    };
    let (mut pages, mut objects) = (BTreeSet::new(), Vec::new());
    for line in list.lines() {
        let words: Vec<&str> = line.split(' ').collect();
        let number = |word: &str| word.parse::<u64>().ok();
        match words[..] {
            ["pages", id] => pages.extend(number(id)),
            ["shmem", from, to] => objects.extend(number(from).zip(number(to))),
            _ => {}
        }
    }
    let remove = |name: String| -> Result<()> {
        let path = dir.join(name);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(write_error(&path, error).into())
            }
            _ => Ok(()),
        }
    };
    if !objects.is_empty() {
        let chain = Chain::open(dir)?;
        let named = Objects::read(&chain, snapshot_at(&chain, dir)?)?;
        for (from, to) in objects {
            let unnamed = if named.has(to) { from } else { to };
            remove(MemoryId::Shared(unnamed).pagemap_name())?;
        }
        // Before the pages files that they name.
        sync(dir)?;
    }
    let mut claimed = BTreeSet::new();
    for name in names(dir)? {
        if name.to_str().and_then(MemoryId::of_pagemap).is_some() {
            claimed.insert(u64::from(PagemapReader::open(&dir.join(name))?.pages_id()));
        }
    }
    for unclaimed in pages.difference(&claimed) {
        remove(Kind::Pages.file_name(*unclaimed))?;
        remove(Kind::Punched.file_name(*unclaimed))?;
    }
    fault::hit(Point::DedupRemoved)?;
    sync(dir)?;
    fs::remove_dir_all(&stage).map_err(|source| write_error(&stage, source))?;
    sync(dir)?;
    Ok(true)
}

/// Returns the snapshot in this directory.
pub(super) fn snapshot_at(chain: &Chain, dir: &Path) -> Result<SnapshotId> {
    let canonical = dir.canonicalize().map_err(|source| DedupError::File {
        step: "find",
        path: dir.to_owned(),
        source,
    })?;
    chain.at(&canonical).ok_or_else(|| DedupError::NoSnapshot { dir: dir.to_owned() })
}

/// Returns numbers that no pages file of a directory has and no pagemap names.
fn unused_numbers(dir: &Path, count: usize) -> Result<Vec<u32>> {
    let mut highest = 0;
    for name in names(dir)? {
        let Some(name) = name.to_str() else { continue };
        if MemoryId::of_pagemap(name).is_some() {
            highest = highest.max(PagemapReader::open(&dir.join(name))?.pages_id());
        } else if let Some((desc, number)) = desc::by_file_name(name)
            && matches!(desc.kind, Kind::Pages | Kind::Punched)
        {
            highest = highest.max(u32::try_from(number).unwrap_or(u32::MAX));
        }
    }
    let numbers: Vec<u32> = (highest..=u32::MAX).skip(1).take(count).collect();
    if numbers.len() == count {
        Ok(numbers)
    } else {
        Err(DedupError::Numbers { dir: dir.to_owned() })
    }
}

/// Writes an image with other numbers for objects.
fn renumber(from: &Path, to: &Path, numbers: &BTreeMap<u64, u64>) -> Result<()> {
    let mut image = Document::read(from)?;
    if let Content::Entries(entries) = &mut image.content {
        for entry in entries {
            change_numbers(entry.message.get_mut(), numbers);
        }
    }
    let file = regular::create(to).map_err(|source| write_error(to, source))?;
    let mut file = image.write(to, BufWriter::new(file))?;
    file.flush().map_err(|source| write_error(to, source))?;
    resemble(file.get_ref(), to, from)
}

/// Gives a new file the permissions and the owner of the file that it replaces.
fn resemble(file: &File, path: &Path, old: &Path) -> Result<()> {
    let like = || {
        let meta = fs::metadata(old)?;
        match fchown(file, Some(meta.uid()), Some(meta.gid())) {
            // The file belongs to another user, and this program is not root.
            Err(error) if error.kind() != io::ErrorKind::PermissionDenied => Err(error),
            _ => file.set_permissions(meta.permissions()),
        }
    };
    like().map_err(|source| write_error(path, source).into())
}

/// Changes numbers in a `memfd_inode_entry`, or in those `vma_entry`s of an `mm_entry` that
/// are anonymous shared memory.
fn change_numbers(message: &mut prost_reflect::DynamicMessage, numbers: &BTreeMap<u64, u64>) {
    use crate::image::vma;
    if let Some(vmas) = message.get_field_by_name_mut("vmas").and_then(Value::as_list_mut) {
        for area in vmas.iter_mut().filter_map(Value::as_message_mut) {
            let status = area.get_field_by_name("status").and_then(|status| status.as_u32());
            let status = status.unwrap_or(0);
            if status & vma::ANON_SHARED != 0 && status & (vma::MEMFD | vma::SYSVIPC) == 0 {
                change_numbers(area, numbers);
            }
        }
        return;
    }
    let shmid = message.get_field_by_name("shmid").map(|value| value.into_owned());
    let changed = match shmid {
        Some(Value::U32(from)) => {
            numbers.get(&u64::from(from)).and_then(|to| u32::try_from(*to).ok()).map(Value::U32)
        }
        Some(Value::U64(from)) => numbers.get(&from).map(|to| Value::U64(*to)),
        _ => None,
    };
    if let Some(changed) = changed {
        message.set_field_by_name("shmid", changed);
    }
}

/// Copies a file with its permissions; shares blocks where possible.
pub(super) fn copy_file(from: &Path, to: &Path) -> Result<()> {
    let copy = || {
        let (mut source, _) = regular::open(from)?;
        let mut target = regular::create(to)?;
        target.set_permissions(source.metadata()?.permissions())?;
        io::copy(&mut source, &mut target)
    };
    copy().map(drop).map_err(|source| write_error(to, source).into())
}

/// Copies a pages file and keeps its holes.
pub(super) fn copy_pages(from: &Path, to: &Path) -> Result<()> {
    let files = Files::new(NonZeroUsize::MIN);
    let from = files.get(files.enter_path(from))?;
    let failed = |source| write_error(to, source);
    let target = regular::create(to).map_err(failed)?;
    let found = from.stat()?;
    let permissions = fs::Permissions::from_mode(found.mode.into());
    target.set_permissions(permissions).map_err(failed)?;
    target.set_len(found.len).map_err(failed)?;
    let mut next = 0;
    while let Some(data) = seek_file(&from, next, Whence::Data)? {
        next = seek_file(&from, data, Whence::Hole)?.unwrap_or(found.len);
        copy(&from, data, next - data, &target, to, data)?;
    }
    Ok(())
}

/// Copies `len` bytes from `start` on to `offset` in `target`.
fn copy(
    from: &BackingFile,
    start: u64,
    len: u64,
    target: &File,
    path: &Path,
    offset: u64,
) -> Result<()> {
    use std::os::unix::fs::FileExt;
    let failed = |source| write_error(path, source);
    let mut done = from.copy_in_kernel(start, len, target, offset).map_err(failed)?;
    let mut buffer = Vec::new();
    while done < len {
        let count = (len - done).min(BUFFER_BYTES);
        buffer.resize(usize::try_from(count).expect("at most a buffer"), 0);
        from.read_exact_at(&mut [io::IoSliceMut::new(&mut buffer)], start + done)?;
        target.write_all_at(&buffer, offset + done).map_err(failed)?;
        done += count;
    }
    Ok(())
}

/// Returns the relative path from one directory to another; both paths are absolute and
/// without links.
pub(super) fn relative(from: &Path, to: &Path) -> PathBuf {
    let (mut here, mut there) = (from.components().peekable(), to.components().peekable());
    while here.peek().is_some() && here.peek() == there.peek() {
        here.next();
        there.next();
    }
    let up = here.map(|_| Component::ParentDir);
    let way: PathBuf = up.chain(there).collect();
    if way.as_os_str().is_empty() { ".".into() } else { way }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ways_lead_from_one_directory_to_another() {
        for (from, to, way) in [
            ("/a/b", "/a/c", "../c"),
            ("/a/b/.dedup", "/a/c", "../../c"),
            ("/a/b", "/x/y/z", "../../x/y/z"),
            ("/a", "/a/b", "b"),
            ("/a/b", "/a", ".."),
            ("/a", "/a", "."),
        ] {
            assert_eq!(relative(Path::new(from), Path::new(to)), Path::new(way), "{from} {to}");
        }
    }

    #[test]
    fn numbers_change_where_they_name_the_object() {
        use crate::image::{proto, read_all, vma};
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("mm-7.img"), dir.path().join("new"));
        let area = |shmid, status| proto::VmaEntry { shmid, status, ..Default::default() };
        let mm = proto::MmEntry {
            vmas: vec![
                area(5, vma::ANON_SHARED),
                area(6, vma::ANON_SHARED),
                area(5, vma::ANON_SHARED | vma::SYSVIPC),
                area(5, vma::FILE_SHARED),
            ],
            ..Default::default()
        };
        let mut writer = ImageWriter::create(&from, Kind::Mm).unwrap();
        writer.message(&mm).unwrap();
        writer.finish().unwrap();
        renumber(&from, &to, &BTreeMap::from([(5, 1 << 40)])).unwrap();
        let found = read_all::<proto::MmEntry>(&to, Kind::Mm).unwrap();
        let numbers: Vec<u64> = found[0].vmas.iter().map(|area| area.shmid).collect();
        assert_eq!(numbers, [1 << 40, 6, 5, 5]);
    }
}
