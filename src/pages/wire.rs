//! The messages of CRIU's page servers, in both directions ([the protocol](crate::docs::page_server)).
//!
//! A message is a head of [`HEAD_BYTES`], and the bytes of the pages if the head says so. A page that is
//! restored lazily is asked for with the plain pid ([`Command::Get`]); everywhere else the number of a
//! memory includes its kind.

use std::ops::Range;

use sha2::{Digest, Sha256};

use crate::{
    image::{MemoryId, PagemapEntry, Presence},
    units::PageIndex,
};

/// The length of the head of a message.
pub const HEAD_BYTES: usize = 32;

/// The length of the answer to [`Command::Open`]: not 0 if the server has the memory's parent.
pub const OPENED_BYTES: usize = 1;

/// The length of the answer to [`Command::Parent`], an `int`: not 0 if the server has the parent.
pub const PARENT_BYTES: usize = 4;

/// The length of the answer to [`Command::Close`], an `int`: 0 if the server has all pages.
pub const CLOSED_BYTES: usize = 4;

/// The numbers of commands (`PS_IOV_*` in `criu/page-xfer.c`), in the lower half of the first word.
mod number {
    pub(super) const ADD: u16 = 1;
    pub(super) const HOLE: u16 = 2;
    pub(super) const OPEN: u16 = 3;
    pub(super) const OPEN2: u16 = 4;
    pub(super) const PARENT: u16 = 5;
    pub(super) const ADD_F: u16 = 6;
    pub(super) const GET: u16 = 7;
    pub(super) const CLOSE: u16 = 0x1023;
    pub(super) const FORCE_CLOSE: u16 = 0x1024;
}

/// The kinds of memories (`PS_TYPE_*`), in the lowest byte of the number of a memory.
const KIND_BITS: u32 = 8;
const PRIVATE: u64 = 1;
const SHARED: u64 = 2;

/// A command to a page server, or a server's answer with pages, which is [`Command::Add`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Begin this memory. The entries that follow are its own.
    Open {
        /// The memory.
        memory: MemoryId,
        /// Whether the client waits for the answer, [`OPENED_BYTES`].
        answered: bool,
    },
    /// Say whether the parent directory has this memory. The answer has [`PARENT_BYTES`].
    Parent(MemoryId),
    /// Enter pages. Their bytes follow if they are [`Presence::Present`].
    Add {
        /// The number of the memory: see [`encode_memory`] and [`decode_memory`]. In an answer to
        /// [`Command::Get`], the number of that command.
        memory: u64,
        /// Which pages, and where they are.
        entry: PagemapEntry,
    },
    /// Send pages. The answer is [`Command::Add`] with the pages that the server has contiguously, at
    /// most as many as asked for.
    Get {
        /// The pid of the process.
        pid: u64,
        /// The first page.
        first: PageIndex,
        /// The number of pages.
        pages: u64,
    },
    /// End the session. The answer has [`CLOSED_BYTES`].
    Close {
        /// Whether the connection stays open elsewhere, so that its end does not tell the server.
        forced: bool,
    },
}

/// Why a head is not a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// The command is unknown.
    #[error("unknown command {0:#x}")]
    Command(u16),
    /// The kind of the memory is unknown.
    #[error(
        "unknown memory {0:#x}: the lowest byte is neither {PRIVATE} (a process) nor {SHARED} (shared memory)"
    )]
    Memory(u64),
    /// The pages are impossible.
    #[error("{pages} pages at {vaddr:#x}: {problem}")]
    Pages {
        /// The address of the first page.
        vaddr: u64,
        /// The number of pages.
        pages: u64,
        /// What is wrong with them.
        problem: &'static str,
    },
}

/// The bytes of [`DumpId`] in a head.
const ID: Range<usize> = 8..24;

/// Tells a dump from others, in the heads of [`Command::Open`] (the parent) and [`Command::Close`] (the
/// dump itself). It is an extension: CRIU sends zeros there, and does not look at what it receives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DumpId([u8; ID.end - ID.start]);

impl DumpId {
    /// Returns the id of the dump with this name ([`crate::chain::dump_name`]).
    pub fn of_name(name: &[u8]) -> Self {
        let hash = Sha256::digest(name);
        let mut id = [0; ID.end - ID.start];
        id.copy_from_slice(&hash[..ID.end - ID.start]);
        Self(id)
    }

    /// Returns the id with these bytes; `None` if they are not one.
    pub fn of_bytes(bytes: &[u8]) -> Option<Self> {
        let id: [u8; ID.end - ID.start] = bytes.try_into().ok()?;
        id.iter().any(|byte| *byte != 0).then_some(Self(id))
    }

    /// Returns the id in a head.
    pub fn of_head(head: &[u8; HEAD_BYTES]) -> Option<Self> {
        Self::of_bytes(&head[ID])
    }

    /// Returns the bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// Puts the id into a head.
    pub fn enter(&self, head: &mut [u8; HEAD_BYTES]) {
        head[ID].copy_from_slice(&self.0);
    }
}

/// Returns the number of a memory in messages.
///
/// Pids and the numbers of shared objects are inode numbers or smaller, and have at most 56 bits.
pub fn encode_memory(memory: MemoryId) -> u64 {
    match memory {
        MemoryId::Private(pid) => pid << KIND_BITS | PRIVATE,
        MemoryId::Shared(shmid) => shmid << KIND_BITS | SHARED,
    }
}

/// Returns the memory with a number.
///
/// # Errors
/// [`WireError::Memory`].
pub fn decode_memory(number: u64) -> Result<MemoryId, WireError> {
    let id = number >> KIND_BITS;
    match number & ((1 << KIND_BITS) - 1) {
        PRIVATE => Ok(MemoryId::Private(id)),
        SHARED => Ok(MemoryId::Shared(id)),
        _ => Err(WireError::Memory(number)),
    }
}

/// The fields of a head, of which each command uses some.
#[derive(Clone, Copy, Default)]
struct Head {
    command: u16,
    flags: u16,
    pages: u64,
    vaddr: u64,
    memory: u64,
}

impl Head {
    fn of_bytes(bytes: &[u8; HEAD_BYTES]) -> Self {
        let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let long = |at: usize| {
            let mut long = [0; 8];
            long.copy_from_slice(&bytes[at..at + 8]);
            u64::from_le_bytes(long)
        };
        // Bytes 4 to 7 are padding, which CRIU does not clear.
        Self { command: half(0), flags: half(2), pages: long(8), vaddr: long(16), memory: long(24) }
    }

    fn to_bytes(self) -> [u8; HEAD_BYTES] {
        let mut bytes = [0; HEAD_BYTES];
        bytes[..2].copy_from_slice(&self.command.to_le_bytes());
        bytes[2..4].copy_from_slice(&self.flags.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.pages.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.vaddr.to_le_bytes());
        bytes[24..].copy_from_slice(&self.memory.to_le_bytes());
        bytes
    }

    /// Returns the pages of the head with these flags.
    fn entry(&self, flags: u64) -> Result<PagemapEntry, WireError> {
        let Self { pages, vaddr, .. } = *self;
        PagemapEntry::checked(vaddr, pages, flags).map_err(|problem| WireError::Pages {
            vaddr,
            pages,
            problem,
        })
    }

    /// Returns the command that enters the pages of the head, which are there.
    fn add(&self, presence: Presence) -> Result<Command, WireError> {
        let entry = PagemapEntry { presence, ..self.entry(0)? };
        Ok(Command::Add { memory: self.memory, entry })
    }
}

impl Command {
    /// Returns the command that a head contains.
    ///
    /// # Errors
    /// [`WireError`].
    pub fn decode(bytes: &[u8; HEAD_BYTES]) -> Result<Self, WireError> {
        let head = Head::of_bytes(bytes);
        let memory = || decode_memory(head.memory);
        Ok(match head.command {
            number::OPEN => Self::Open { memory: memory()?, answered: false },
            number::OPEN2 => Self::Open { memory: memory()?, answered: true },
            number::PARENT => Self::Parent(memory()?),
            number::ADD => head.add(Presence::Present)?,
            number::HOLE => head.add(Presence::Parent)?,
            number::ADD_F => {
                Self::Add { memory: head.memory, entry: head.entry(head.flags.into())? }
            }
            number::GET => {
                let PagemapEntry { first, pages, .. } = head.entry(0)?;
                Self::Get { pid: head.memory, first, pages }
            }
            number::CLOSE => Self::Close { forced: false },
            number::FORCE_CLOSE => Self::Close { forced: true },
            unknown => return Err(WireError::Command(unknown)),
        })
    }

    /// Returns the head with the command.
    pub fn encode(&self) -> [u8; HEAD_BYTES] {
        let head = match *self {
            Self::Open { memory, answered } => Head {
                command: if answered { number::OPEN2 } else { number::OPEN },
                memory: encode_memory(memory),
                ..Head::default()
            },
            Self::Parent(memory) => {
                Head { command: number::PARENT, memory: encode_memory(memory), ..Head::default() }
            }
            Self::Add { memory, entry } => Head {
                command: number::ADD_F,
                flags: entry.flags(),
                pages: entry.pages,
                vaddr: entry.first.address(),
                memory,
            },
            Self::Get { pid, first, pages } => {
                Head { command: number::GET, flags: 0, pages, vaddr: first.address(), memory: pid }
            }
            Self::Close { forced } => Head {
                command: if forced { number::FORCE_CLOSE } else { number::CLOSE },
                ..Head::default()
            },
        };
        head.to_bytes()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn head(first_word: u32, pages: u64, vaddr: u64, memory: u64) -> [u8; HEAD_BYTES] {
        let mut bytes = Vec::from(first_word.to_le_bytes());
        // CRIU's padding has any contents.
        bytes.extend([0xa5; 4]);
        for long in [pages, vaddr, memory] {
            bytes.extend(long.to_le_bytes());
        }
        bytes.try_into().unwrap()
    }

    #[test]
    fn messages_of_criu_are_decoded() {
        let entry = |first, pages, presence, lazy| PagemapEntry {
            first: PageIndex(first),
            pages,
            presence,
            lazy,
        };
        let private = MemoryId::Private(4711);
        let (number, shared) = (4711 << 8 | 1, MemoryId::Shared(9));
        let add = |entry| Command::Add { memory: number, entry };
        for (bytes, command) in [
            (head(3, 0, 0, number), Command::Open { memory: private, answered: false }),
            (head(4, 0, 0, 9 << 8 | 2), Command::Open { memory: shared, answered: true }),
            (head(5, 0, 0, number), Command::Parent(private)),
            (head(1, 2, 0x1000, number), add(entry(1, 2, Presence::Present, false))),
            (head(2, 2, 0x1000, number), add(entry(1, 2, Presence::Parent, false))),
            (head(4 << 16 | 6, 2, 0x1000, number), add(entry(1, 2, Presence::Present, false))),
            (head(6 << 16 | 6, 2, 0x1000, number), add(entry(1, 2, Presence::Present, true))),
            (head(2 << 16 | 6, 2, 0x1000, number), add(entry(1, 2, Presence::Absent, true))),
            (head(1 << 16 | 6, 2, 0x1000, number), add(entry(1, 2, Presence::Parent, false))),
            (head(7, 3, 0x2000, 4711), Command::Get { pid: 4711, first: PageIndex(2), pages: 3 }),
            (head(0x1023, 0, 0, 0), Command::Close { forced: false }),
            (head(0x1024, 0, 0, 0), Command::Close { forced: true }),
        ] {
            assert_eq!(Command::decode(&bytes), Ok(command));
            assert_eq!(Command::decode(&command.encode()), Ok(command));
        }
    }

    #[test]
    fn other_messages_are_errors() {
        let decode = |bytes| Command::decode(&bytes).unwrap_err().to_string();
        assert_eq!(decode(head(8, 0, 0, 0)), "unknown command 0x8");
        assert!(decode(head(4, 0, 0, 0x303)).starts_with("unknown memory 0x303: "));
        for (bytes, problem) in [
            (head(1, 0, 0x1000, 1), "0 pages at 0x1000: it has no pages"),
            (head(2, 1, 0x1001, 1), "1 pages at 0x1001: the address is not page-aligned"),
            (
                head(7, u64::MAX, 0x1000, 1),
                "18446744073709551615 pages at 0x1000: it ends beyond the address space",
            ),
            (
                head(5 << 16 | 6, 1, 0x1000, 1),
                "1 pages at 0x1000: it is both present and in the parent",
            ),
        ] {
            assert_eq!(decode(bytes), problem);
        }
    }

    #[test]
    fn ids_are_where_commands_have_nothing() {
        let id = DumpId::of_name(b"name");
        let memory = MemoryId::Private(7);
        for command in [Command::Open { memory, answered: true }, Command::Close { forced: true }] {
            let mut head = command.encode();
            assert_eq!(DumpId::of_head(&head), None);
            id.enter(&mut head);
            assert_eq!((DumpId::of_head(&head), Command::decode(&head)), (Some(id), Ok(command)));
        }
        assert_ne!(id, DumpId::of_name(b"another"));
    }

    proptest! {
        #[test]
        fn what_is_decoded_is_encoded_again(bytes: [u8; HEAD_BYTES], known in 0..9_u16) {
            let mut bytes = bytes;
            bytes[..2].copy_from_slice(&known.to_le_bytes());
            if let Ok(command) = Command::decode(&bytes) {
                prop_assert_eq!(Command::decode(&command.encode()), Ok(command));
            }
        }
    }
}
