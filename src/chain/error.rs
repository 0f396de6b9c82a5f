//! Errors of chains.

use std::{io, path::PathBuf, sync::Arc};

use crate::{
    fault::Injected,
    image::{ImageError, MemoryId},
    units::PageIndex,
};

/// The result of a request to a chain.
pub type Result<T, E = ChainError> = std::result::Result<T, E>;

/// Why a chain cannot answer.
#[derive(Debug, thiserror::Error)]
pub enum ChainError {
    /// A directory could not be read.
    #[error("read directory {path}", path = .path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// Nothing is at the path of a chain.
    #[error(
        "open {path}\nhelp: give an image directory, a directory of image directories, or an archive",
        path = .path.display()
    )]
    Missing {
        /// The path.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// An archive could not be read.
    #[error("read archive {path}", path = .path.display())]
    Archive {
        /// The archive.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// An archive could not be written.
    #[error("write archive {path}", path = .path.display())]
    Pack {
        /// The archive.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The images cannot be changed, because they are not in a directory.
    #[error("the images in {path} can only be read\nhelp: unpack them into a directory", path = .path.display())]
    ReadOnly {
        /// The name of the store.
        path: PathBuf,
    },
    /// The path leads to no images.
    #[error(
        "no image directory at {path}: expected inventory.img in it or in one of its \
         directories\nhelp: give the directory of a dump (`rcriu dump -D`), or one that holds such directories",
        path = .path.display()
    )]
    NoImages {
        /// The path.
        path: PathBuf,
    },
    /// No snapshot has this name.
    #[error("no snapshot is called {name:?}\nhelp: choose one of {known}")]
    NoSuchSnapshot {
        /// The name.
        name: String,
        /// The names of all snapshots.
        known: String,
    },
    /// More than one snapshot has no children, and none was chosen.
    #[error("the chain has several tips: {tips}\nhelp: choose one with --snapshot")]
    SeveralTips {
        /// Their names.
        tips: String,
    },
    /// Every snapshot is the parent of another.
    #[error("the chain has no tip: every directory is the parent of another")]
    NoTip,
    /// The parent link of a directory is broken.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// A snapshot has an unknown format version.
    #[error("{dir}: {problem}", dir = .dir.display())]
    Version {
        /// The image directory.
        dir: PathBuf,
        /// The version found, and the known ones.
        problem: String,
    },
    /// An image could not be read.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A snapshot does not have this memory.
    #[error("{dir} has no pagemap of {memory}", dir = .dir.display())]
    NoMemory {
        /// The image directory.
        dir: PathBuf,
        /// The memory.
        memory: MemoryId,
    },
    /// The pages of a memory were sent to a page server, and are not here.
    #[error(
        "{dir} has no pagemap of {memory}: the dump has sent its pages to a page server\nhelp: copy the \
         images of this directory into that of the page server", dir = .dir.display()
    )]
    PagesElsewhere {
        /// The image directory.
        dir: PathBuf,
        /// The memory.
        memory: MemoryId,
    },
    /// A snapshot has too many ancestors.
    #[error("{dir} is the end of a chain of more than {limit} directories", dir = .dir.display())]
    TooDeep {
        /// The directory at which the limit was exceeded.
        dir: PathBuf,
        /// The limit.
        limit: usize,
    },
    /// A pagemap refers to pages of the parent that the parent does not have.
    #[error(
        "{dir}: {memory} at {first}: {are} in the parent according to the pagemap, but {reason}",
        dir = .dir.display(), are = are(*.pages)
    )]
    Unanswered {
        /// The directory with that pagemap.
        dir: PathBuf,
        /// The memory.
        memory: MemoryId,
        /// The first missing page.
        first: PageIndex,
        /// The number of missing pages.
        pages: u64,
        /// What the parent has instead.
        reason: String,
    },
    /// Two pagemaps of a directory claim the same pages file.
    #[error("{dir}: {first} and {second} both claim pages-{pages_id}.img", dir = .dir.display())]
    SharedPages {
        /// The image directory.
        dir: PathBuf,
        /// The number of the pages file.
        pages_id: u32,
        /// A memory that claims it.
        first: MemoryId,
        /// Another.
        second: MemoryId,
    },
    /// No image has the page.
    #[error("{memory} at {first}: its pagemap says that no image holds the page", memory = .memory)]
    Absent {
        /// The memory.
        memory: MemoryId,
        /// The page.
        first: PageIndex,
    },
    /// The pages were freed.
    #[error(
        "{path}: pages of {memory} from {first} on were freed ({pages} in a row), after a restore or \
         as superseded; no image holds them any more",
        path = .path.display()
    )]
    Punched {
        /// The pages file that held them.
        path: PathBuf,
        /// The memory.
        memory: MemoryId,
        /// The first page.
        first: PageIndex,
        /// The number of pages.
        pages: u64,
    },
    /// The file system cannot punch holes.
    #[error(
        "the file system of {path} cannot free parts of a file (no hole punching)\nhelp: copy the \
         images to one that can, such as tmpfs, ext4, xfs or btrfs, or use rcriu dedup --rewrite",
        path = .path.display()
    )]
    NoPunching {
        /// A pages file.
        path: PathBuf,
    },
    /// Pages of one user would be freed for a snapshot of another.
    #[error(
        "nothing is freed in {dir}, which belongs to user {owner}: its descendant {child} belongs to \
         user {child_owner}\nhelp: if that is intended, give both to one user (chown -R)",
        dir = .dir.display(),
        child = .child.display()
    )]
    ForeignChild {
        /// The image directory with these pages.
        dir: PathBuf,
        /// The owner of its inventory.
        owner: u32,
        /// The directory of a descendant.
        child: PathBuf,
        /// The owner of the descendant's inventory.
        child_owner: u32,
    },
    /// Pages could not be freed.
    #[error("{step} {path}", path = .path.display())]
    Free {
        /// The pages file, or its directory.
        path: PathBuf,
        /// The attempted step, as a verb.
        step: &'static str,
        /// The cause.
        source: io::Error,
    },
    /// A test asked for it.
    #[error(transparent)]
    Fault(#[from] Injected),
    /// An earlier failure of the same read.
    #[error(transparent)]
    Lost(Arc<ChainError>),
    /// A file that holds bytes could not be opened.
    #[error("open {path}", path = .path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// A file that holds bytes could not be read.
    #[error("read {length:#x} bytes of {path} at offset {offset:#x}", path = .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The offset of the read.
        offset: u64,
        /// How many bytes were wanted.
        length: u64,
        /// The cause.
        source: io::Error,
    },
    /// A file is shorter than expected.
    #[error(
        "{path} is cut short: {wanted:#x} bytes expected at offset {offset:#x}, it ends at {end:#x}",
        path = .path.display()
    )]
    Truncated {
        /// The file.
        path: PathBuf,
        /// The offset of the read.
        offset: u64,
        /// How many bytes were wanted.
        wanted: u64,
        /// The length of the file.
        end: u64,
    },
    /// Another file has replaced one that was in use.
    #[error("{path} was replaced while it was in use", path = .path.display())]
    Replaced {
        /// The file.
        path: PathBuf,
    },
}

/// Returns the subject and verb of a sentence about pages.
pub(super) fn are(pages: u64) -> String {
    if pages == 1 { "1 page is".to_owned() } else { format!("{pages} pages are") }
}

/// What is wrong with the parent link of a directory.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LinkError {
    /// Another dump has replaced the parent.
    #[error(
        "{parent} is not the snapshot that {dir} was dumped on: found the dump {found}, expected \
         {expected}\nhelp: put that one back, or dump without this parent",
        dir = .dir.display(), parent = .parent.display()
    )]
    Replaced {
        /// The image directory.
        dir: PathBuf,
        /// Its parent.
        parent: PathBuf,
        /// The id of the dump that is there now.
        found: String,
        /// The id that the child recorded.
        expected: String,
    },
    /// The link leads to no snapshot.
    #[error("{dir}/parent leads to {target}: {problem}", dir = .dir.display(), target = .target.display())]
    Dangling {
        /// The image directory.
        dir: PathBuf,
        /// The target of the link.
        target: PathBuf,
        /// What is wrong with the target.
        problem: String,
    },
    /// The link is part of a cycle.
    #[error("the parent links form a cycle: {circle}")]
    Circle {
        /// The directories of the cycle.
        circle: String,
    },
}
