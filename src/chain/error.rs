//! What can be wrong with a chain.

use std::{io, path::PathBuf, sync::Arc};

use crate::{
    fault::Injected,
    image::{ImageError, MemoryId},
    units::PageIndex,
};

/// The result of asking a chain.
pub type Result<T, E = ChainError> = std::result::Result<T, E>;

/// Why a chain has no answer.
#[derive(Debug, thiserror::Error)]
pub enum ChainError {
    /// A directory could not be read.
    #[error("read directory {path}", path = .path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// An archive could not be read.
    #[error("read archive {path}", path = .path.display())]
    Archive {
        /// The archive.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Images are to be changed that are not in a directory.
    #[error("the images in {path} can only be read\nhelp: unpack them into a directory", path = .path.display())]
    ReadOnly {
        /// What the store is called.
        path: PathBuf,
    },
    /// There is no image directory where one should be.
    #[error(
        "no image directory at {path}: expected inventory.img in it or in one of its directories",
        path = .path.display()
    )]
    NoImages {
        /// Where it should be.
        path: PathBuf,
    },
    /// No snapshot has the name asked for.
    #[error("no snapshot is called {name:?}, there are: {known}")]
    NoSuchSnapshot {
        /// The name.
        name: String,
        /// Those that there are.
        known: String,
    },
    /// More than one snapshot has no children.
    #[error("the chain has several tips: {tips}\nhelp: choose one with --snapshot")]
    SeveralTips {
        /// Their names.
        tips: String,
    },
    /// The parent links lead in circles everywhere.
    #[error("the chain has no tip: every directory is the parent of another")]
    NoTip,
    /// A directory's link to its parent leads nowhere good.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// A snapshot is of a version of the format that is not known.
    #[error("{dir}: {problem}", dir = .dir.display())]
    Version {
        /// The image directory.
        dir: PathBuf,
        /// Which version was found, and which are known.
        problem: String,
    },
    /// An image could not be read.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A snapshot does not have the memory asked for.
    #[error("{dir} has no pagemap of {memory}", dir = .dir.display())]
    NoMemory {
        /// The image directory.
        dir: PathBuf,
        /// The memory.
        memory: MemoryId,
    },
    /// A snapshot has more ancestors than can be dealt with.
    #[error("{dir} is the end of a chain of more than {limit} directories", dir = .dir.display())]
    TooDeep {
        /// The directory where it was too much.
        dir: PathBuf,
        /// The most that is accepted.
        limit: usize,
    },
    /// A pagemap sends to the parent for pages that the parent does not have.
    #[error(
        "{dir}: {pages} pages of {memory} at {first} are said to be in the parent, but {reason}",
        dir = .dir.display()
    )]
    Unanswered {
        /// The directory whose pagemap sends to its parent.
        dir: PathBuf,
        /// The memory.
        memory: MemoryId,
        /// The first page that is missed.
        first: PageIndex,
        /// How many are missed in a row.
        pages: u64,
        /// What was found there.
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
    /// The bytes of these pages are in no image.
    #[error("{memory} at {first}: its pagemap says that no image holds the page", memory = .memory)]
    Absent {
        /// The memory.
        memory: MemoryId,
        /// The page.
        first: PageIndex,
    },
    /// The bytes of these pages were freed.
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
        /// How many there are in a row.
        pages: u64,
    },
    /// A file system cannot free parts of files.
    #[error(
        "the file system of {path} cannot free parts of a file (no hole punching)\nhelp: copy the \
         images to one that can, such as tmpfs, ext4, xfs or btrfs, or use rcriu dedup --rewrite",
        path = .path.display()
    )]
    NoPunching {
        /// A pages file.
        path: PathBuf,
    },
    /// Pages of one user would be freed for what another one has made.
    #[error(
        "nothing is freed in {dir}, which belongs to user {owner}: its descendant {child} belongs to \
         user {child_owner}\nhelp: if that is intended, give both to one user (chown -R)",
        dir = .dir.display(),
        child = .child.display()
    )]
    ForeignChild {
        /// The image directory that pages would be freed in.
        dir: PathBuf,
        /// The owner of its inventory.
        owner: u32,
        /// A directory that has it among its ancestors.
        child: PathBuf,
        /// The owner of that one's inventory.
        child_owner: u32,
    },
    /// Pages could not be freed.
    #[error("{step} {path}", path = .path.display())]
    Free {
        /// The pages file, or its directory.
        path: PathBuf,
        /// What was attempted, as a verb.
        step: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// A test asked for it.
    #[error(transparent)]
    Fault(#[from] Injected),
    /// Reading failed for a reason that was known before.
    #[error(transparent)]
    Lost(Arc<ChainError>),
    /// A file that bytes are read from could not be opened.
    #[error("open {path}", path = .path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file that bytes are read from could not be read.
    #[error("read {length:#x} bytes of {path} at offset {offset:#x}", path = .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Where reading began.
        offset: u64,
        /// How many bytes were wanted.
        length: u64,
        /// Why.
        source: io::Error,
    },
    /// A file ends before bytes that it should hold.
    #[error(
        "{path} is cut short: {wanted:#x} bytes expected at offset {offset:#x}, it ends at {end:#x}",
        path = .path.display()
    )]
    Truncated {
        /// The file.
        path: PathBuf,
        /// Where reading began.
        offset: u64,
        /// How many bytes were wanted.
        wanted: u64,
        /// Where the file ended.
        end: u64,
    },
    /// Another file has taken the place of one that was in use.
    #[error("{path} was replaced while it was in use", path = .path.display())]
    Replaced {
        /// The file.
        path: PathBuf,
    },
}

/// What is wrong with a directory's link to its parent.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LinkError {
    /// Another dump has taken the parent's place.
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
        /// What is there: the id of a dump.
        found: String,
        /// The id that the child recorded.
        expected: String,
    },
    /// The link leads to nothing.
    #[error("{dir}/parent leads to {target}: {problem}", dir = .dir.display(), target = .target.display())]
    Dangling {
        /// The image directory.
        dir: PathBuf,
        /// Where the link leads.
        target: PathBuf,
        /// What is there.
        problem: String,
    },
    /// The link is part of a circle.
    #[error("the parent links lead in a circle: {circle}")]
    Circle {
        /// The directories on it.
        circle: String,
    },
}
