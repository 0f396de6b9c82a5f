//! Copies files of a view without a mount.

use std::{
    ffi::OsStr,
    fs,
    os::unix::{
        ffi::OsStrExt,
        fs::{DirBuilderExt, symlink},
    },
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{
    Attr, Ino, NodeType, ROOT, Result, View, ViewError,
    flatten::{Target, copy},
};
use crate::{chain::ChainError, image::regular};

/// The most links on one path (`MAXSYMLINKS`, `linux/namei.h`).
const LINKS: u32 = 40;

impl View {
    /// Returns the node at a path from the root of the view: names separated by slashes. Follows
    /// symbolic links on the way, if they are relative, but not at the end.
    ///
    /// # Errors
    /// Like [`View::lookup`].
    pub fn find(&self, path: &str) -> Result<Attr> {
        self.walk(path, false)
    }

    /// Like [`Self::find`], but follows a relative link at the end, too.
    ///
    /// # Errors
    /// Like [`View::lookup`], also of the target of a link.
    pub fn follow(&self, path: &str) -> Result<Attr> {
        self.walk(path, true)
    }

    fn walk(&self, path: &str, to_the_end: bool) -> Result<Attr> {
        let parts = |path: &str| -> Vec<String> {
            let names = path.split('/').filter(|name| !["", "."].contains(name));
            names.rev().map(str::to_owned).collect()
        };
        let (mut above, mut here) = (Vec::new(), self.attr(ROOT)?);
        let (mut left, mut links) = (parts(path), 0);
        while let Some(name) = left.pop() {
            if name == ".." {
                here = above.pop().unwrap_or(here);
                continue;
            }
            let found = self.lookup(here.ino, &name)?;
            if found.kind == NodeType::Link && (to_the_end || !left.is_empty()) && links < LINKS {
                let target = String::from_utf8(self.link(found.ino)?).unwrap_or_default();
                if !target.is_empty() && !target.starts_with('/') {
                    left.append(&mut parts(&target));
                    links += 1;
                    continue;
                }
            }
            above.push(std::mem::replace(&mut here, found));
        }
        Ok(here)
    }
}

/// A file whose copy is not complete.
#[derive(Debug)]
pub struct Incomplete {
    /// The path of the copy.
    pub copy: PathBuf,
    /// How many bytes could not be read and are a hole in the copy; `None` if there is no copy.
    pub lost_bytes: Option<u64>,
    /// The first reason.
    pub error: ViewError,
}

/// Copies a file, a link or a whole directory to `to`, which must not exist. Copies of files keep
/// their holes, and only their owner may access them. Skips pipes, sockets
/// and devices, which have no contents. Passes files that cannot be read, or only in part, to
/// `incomplete`, and goes on.
///
/// # Errors
/// [`ViewError::Write`]; errors of reading a directory or a link.
pub fn extract(
    view: &View,
    from: &Attr,
    to: &Path,
    incomplete: &mut dyn FnMut(Incomplete),
) -> Result<()> {
    let failed = |source| ViewError::Write { path: to.to_owned(), source };
    match from.kind {
        NodeType::File => extract_file(view, from, to, incomplete),
        NodeType::Link => {
            let target = view.link(from.ino)?;
            symlink(OsStr::from_bytes(&target), to).map_err(failed)
        }
        NodeType::Directory => {
            fs::DirBuilder::new().mode(0o700).create(to).map_err(failed)?;
            extract_entries(view, from.ino, to, incomplete)
        }
        _ => Ok(()),
    }
}

fn extract_file(
    view: &View,
    from: &Attr,
    to: &Path,
    incomplete: &mut dyn FnMut(Incomplete),
) -> Result<()> {
    let failed = |source| ViewError::Write { path: to.to_owned(), source };
    let file = regular::create(to).map_err(failed)?;
    // An address space (`mem`) has size 0, as in procfs.
    if from.size == 0 {
        return Ok(());
    }
    let (mut lost_bytes, mut first) = (0, None);
    let mut lost = |error: &Arc<ChainError>, len| {
        lost_bytes += len;
        first.get_or_insert_with(|| Arc::clone(error));
        Ok(())
    };
    let target = Target::new(file, to);
    let copied =
        view.open(from.ino).and_then(|open| copy(&*open.content, &target, &mut |_| {}, &mut lost));
    match copied {
        Ok(()) => {
            if let Some(error) = first {
                let error = ChainError::Lost(error).into();
                incomplete(Incomplete { copy: to.to_owned(), lost_bytes: Some(lost_bytes), error });
            }
            Ok(())
        }
        Err(error @ ViewError::Write { .. }) => Err(error),
        Err(error) => {
            fs::remove_file(to).map_err(failed)?;
            incomplete(Incomplete { copy: to.to_owned(), lost_bytes: None, error });
            Ok(())
        }
    }
}

fn extract_entries(
    view: &View,
    dir: Ino,
    to: &Path,
    incomplete: &mut dyn FnMut(Incomplete),
) -> Result<()> {
    for entry in view.entries(dir)?.1 {
        let to = to.join(&entry.name);
        match view.lookup(dir, &entry.name) {
            Ok(found) => extract(view, &found, &to, incomplete)?,
            Err(error) => incomplete(Incomplete { copy: to, lost_bytes: None, error }),
        }
    }
    Ok(())
}
