//! Makes equal pages share blocks, where the file system supports that: `rcriu dedup
//! --reflink`.
//!
//! The images do not change, byte for byte. So the file system achieves what the format
//! cannot: it stores a page once for two processes, or for two places of one memory.

use std::{fs::File, os::fd::AsFd, path::Path};

use nix::{
    libc,
    sys::{statfs::fstatfs, statvfs::fstatvfs},
};

use super::{DedupError, Progress, Result, free::require_directory};
use crate::{
    chain::{BackingFile, Chain, ChainError, FileId, StoredPages, zero_hash},
    image::regular,
    sys::{
        lock::{Access, DirectoryLocks},
        reflink,
    },
    units::{PAGE_SIZE, page_bytes},
};

/// The result.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reflinked {
    /// Stored pages, without holes.
    pub stored: u64,
    /// Pages that now share blocks with another page, including those that did before.
    pub shared: u64,
    /// Equal pages that cannot share blocks, because the blocks of this file system are
    /// larger than pages.
    pub unaligned: u64,
}

/// Consecutive pages of one file that equal consecutive pages of another file, or of the
/// same one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Same {
    from: (FileId, u64),
    to: (FileId, u64),
    pages: u64,
}

/// Makes equal pages of a chain share blocks. This takes 32 bytes of memory for each stored
/// page, and 40 for each page that equals another.
///
/// # Errors
/// [`DedupError::NoSharing`] if the file system does not support it; directories that
/// another program is changing; unreadable images.
pub fn reflink(path: &Path, progress: &dyn Progress) -> Result<Reflinked> {
    require_directory(path)?;
    let chain = Chain::open(path)?;
    let mut locks = DirectoryLocks::default();
    // No byte changes, so other programs may read meanwhile.
    for base in chain.bases() {
        locks.take(chain.directory(base)?, Access::Shared)?;
    }
    let stored = StoredPages::of(&chain)?;
    progress.more(page_bytes(stored.pages));
    let mut pages: Vec<(u128, FileId, u64)> =
        Vec::with_capacity(usize::try_from(stored.pages).unwrap_or(0));
    stored.hash(&chain, &mut |page| {
        pages.push((page.hash, page.file, page.file_page));
        progress.done(PAGE_SIZE);
    })?;
    let mut done = Reflinked { stored: stored.pages, ..Reflinked::default() };
    let same = same(&mut pages);
    drop(pages);
    progress.more(same.iter().map(|same| page_bytes(same.pages)).sum());
    let mut target: Option<(FileId, Target)> = None;
    for same in same {
        let open = match target.take() {
            Some((id, open)) if id == same.to.0 => open,
            _ => Target::open(&*chain.files().get(same.to.0)?)?,
        };
        open.share(&*chain.files().get(same.from.0)?, &same, &mut done)?;
        progress.done(page_bytes(same.pages));
        target = Some((same.to.0, open));
    }
    Ok(done)
}

/// Finds pages with the same hash. The others will share the first one; consecutive pages
/// on both sides are joined.
fn same(pages: &mut [(u128, FileId, u64)]) -> Vec<Same> {
    pages.sort_unstable();
    let zero = zero_hash();
    let mut found: Vec<Same> = Vec::new();
    for group in pages.chunk_by(|one, other| one.0 == other.0) {
        // Pages of zeros are better stored as holes: a block that thousands of pages share
        // is slow to free.
        let Some(((hash, file, page), copies)) = group.split_first() else { continue };
        if *hash == zero {
            continue;
        }
        found.extend(copies.iter().map(|(_, other, at)| Same {
            from: (*file, *page),
            to: (*other, *at),
            pages: 1,
        }));
    }
    found.sort_unstable_by_key(|same| (same.to, same.from));
    found.dedup_by(|next, same| {
        let joins = same.to.0 == next.to.0
            && same.from.0 == next.from.0
            && same.to.1 + same.pages == next.to.1
            && same.from.1 + same.pages == next.from.1
            // A range must not overlap itself.
            && (same.to.0 != same.from.0 || same.from.1 + same.pages < same.to.1);
        if joins {
            same.pages += next.pages;
        }
        joins
    });
    found
}

/// A file whose pages will share blocks of others.
struct Target {
    file: File,
    path: std::path::PathBuf,
    /// Pages in a block; 1 if blocks are smaller.
    block_pages: u64,
}

impl Target {
    fn open(file: &BackingFile) -> Result<Self> {
        let path = file.path().to_owned();
        let failed =
            |source| DedupError::File { step: "open for writing", path: path.clone(), source };
        let (open, _) = regular::open_to_change(&path).map_err(failed)?;
        let stat = fstatvfs(open.as_fd()).map_err(|errno| DedupError::File {
            step: "look at the file system of",
            path: path.clone(),
            source: errno.into(),
        })?;
        let block_pages = (stat.block_size() / PAGE_SIZE).max(1);
        Ok(Self { file: open, path, block_pages })
    }

    /// Makes the whole blocks in a range share.
    fn share(&self, from: &BackingFile, same: &Same, done: &mut Reflinked) -> Result<()> {
        let read_only = || ChainError::ReadOnly { path: from.path().to_owned() };
        let source_file = from.file().ok_or_else(read_only)?;
        let block = self.block_pages;
        let skipped = (block - same.to.1 % block) % block;
        let aligned = (same.from.1 + skipped).is_multiple_of(block);
        let pages = if aligned { same.pages.saturating_sub(skipped) / block * block } else { 0 };
        done.unaligned += same.pages - pages;
        let mut at = skipped;
        while at < skipped + pages {
            let (source, target) = (page_bytes(same.from.1 + at), page_bytes(same.to.1 + at));
            let len = page_bytes(skipped + pages - at);
            let shared = reflink::share(source_file, source, &self.file, target, len)
                .map_err(|source| self.failed(source))?;
            match shared.map(|bytes| bytes / PAGE_SIZE) {
                // The pages have changed meanwhile, or have the same hash by chance.
                None | Some(0) => break,
                Some(count) => {
                    done.shared += count;
                    at += count;
                }
            }
        }
        Ok(())
    }

    fn failed(&self, source: std::io::Error) -> DedupError {
        match source.raw_os_error() {
            Some(libc::EOPNOTSUPP | libc::ENOTTY | libc::EXDEV | libc::ENOSYS) => {
                let name = fstatfs(self.file.as_fd()).map_or_else(
                    |_| "?".to_owned(),
                    |stat| format!("{:#x}", stat.filesystem_type().0),
                );
                DedupError::NoSharing { path: self.path.clone(), file_system: name }
            }
            _ => DedupError::File { step: "share blocks of", path: self.path.clone(), source },
        }
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;

    use super::*;
    use crate::chain::Files;

    #[test]
    fn equal_pages_are_joined_to_ranges() {
        let files = Files::new(NonZeroUsize::MIN);
        let [a, b] = ["a", "b"].map(|name| files.enter_path(Path::new(name)));
        // a: 1 2 3 4 4 4 4; b: 9 2 3 4 1 0
        let pages = |file, hashes: &[u128]| -> Vec<(u128, FileId, u64)> {
            (0..).zip(hashes).map(|(page, hash)| (*hash, file, page)).collect()
        };
        let mut all = pages(a, &[1, 2, 3, 4, 4, 4, 4]);
        all.extend(pages(b, &[9, 2, 3, 4, 1, zero_hash()]));
        all.push((zero_hash(), a, 7));
        let same = |from, to, pages| Same { from, to, pages };
        assert_eq!(
            super::same(&mut all),
            [
                same((a, 3), (a, 4), 1),
                same((a, 3), (a, 5), 1),
                same((a, 3), (a, 6), 1),
                same((a, 1), (b, 1), 3),
                same((a, 0), (b, 4), 1),
            ]
        );
    }
}
