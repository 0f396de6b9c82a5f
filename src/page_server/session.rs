//! The conversation with a client. Nothing that it sends is trusted.

use std::{
    io::{self, IoSlice, Read, Write},
    path::{Path, PathBuf},
};

use super::{PageServerError, Result};
use crate::{
    chain::{self, Pagemaps},
    fault::{self, Point},
    image::{
        Directory, ImageError, ImageStore, Kind, MemoryId, PagemapEntry, Presence, SnapshotWriter,
    },
    pages::{
        FileSink, PageSink,
        tls::Secured,
        wire::{Command, DumpId, HEAD_BYTES, encode_memory},
    },
    sys::fds,
    units::{PAGE_LEN, PageIndex, PageRanges},
};

/// Pages that are received at a time.
const PIECE_PAGES: u64 = 256;

/// What the client has done at the end of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    /// It sends another message.
    Message,
    /// It has sent everything.
    Done,
}

/// A conversation over a connection.
pub(super) struct Session<S: Read + Write> {
    stream: Secured<S>,
    images: SnapshotWriter,
    dir: PathBuf,
    /// The directory of the previous dump; `None` if the parent link says which.
    parent: Option<PathBuf>,
    /// Whether the connection may stay open after the session.
    is_callers: bool,
    open: Option<Receiving>,
    /// The dump, if the client has said which it is.
    id: Option<DumpId>,
    memories: u32,
    messages: u64,
    buffer: Vec<u8>,
}

/// A memory that is being received.
struct Receiving {
    memory: MemoryId,
    number: u64,
    sink: FileSink,
    /// The pages that the parent has.
    held: Option<PageRanges>,
    last: Option<PagemapEntry>,
    stored: u64,
}

impl<S: Read + Write> Session<S> {
    pub(super) fn new(
        stream: Secured<S>,
        images: SnapshotWriter,
        (dir, parent): (PathBuf, Option<PathBuf>),
        is_callers: bool,
    ) -> Self {
        Self {
            stream,
            images,
            dir,
            parent,
            is_callers,
            open: None,
            id: None,
            memories: 0,
            messages: 0,
            buffer: Vec::new(),
        }
    }

    /// Receives everything, and makes it visible.
    ///
    /// # Errors
    /// As [`PageServer::serve`](super::PageServer::serve).
    pub(super) fn serve(mut self) -> Result<()> {
        while self.message()? == Next::Message {}
        let Self { mut stream, images, is_callers, id, memories, .. } = self;
        let kept = keep(images, id);
        // A client that gets no answer, or another one, does not count the pages as sent.
        let status: i32 = if kept.is_ok() { 0 } else { -1 };
        let answered = stream.write_all(&status.to_le_bytes()).and_then(|()| stream.flush());
        kept?;
        answered.map_err(|source| PageServerError::Connection {
            step: "tell the client that all pages are on disk",
            source,
        })?;
        log::info!("received {memories} memories");
        // The pages are safe, whether or not the client waits for this.
        let _ = stream.finish();
        // The side that ends the connection first keeps its address busy for a while.
        if !is_callers {
            let _ = stream.read(&mut [0]);
        }
        Ok(())
    }

    fn message(&mut self) -> Result<Next> {
        let mut head = [0; HEAD_BYTES];
        self.receive_head(&mut head)?;
        let number = self.messages;
        self.messages += 1;
        let command =
            Command::decode(&head).map_err(|source| PageServerError::Message { number, source })?;
        match command {
            Command::Open { memory, answered } => {
                let has_parent = self.open(memory, DumpId::of_head(&head))?;
                if answered {
                    self.answer(&[u8::from(has_parent)])?;
                }
            }
            Command::Parent(memory) => {
                let has_parent = self.held(memory)?.is_some();
                self.answer(&i32::from(has_parent).to_le_bytes())?;
            }
            Command::Add { memory, entry } => self.add(memory, &entry)?,
            Command::Get { .. } => return Err(PageServerError::Asked { number }),
            Command::Close { .. } => {
                self.finish()?;
                self.id = DumpId::of_head(&head);
                return Ok(Next::Done);
            }
        }
        Ok(Next::Message)
    }

    fn receive_head(&mut self, head: &mut [u8; HEAD_BYTES]) -> Result<()> {
        self.stream.read_exact(head).map_err(|source| match source.kind() {
            io::ErrorKind::UnexpectedEof => PageServerError::Cut,
            _ => PageServerError::Connection { step: "receive a message of the client", source },
        })
    }

    fn answer(&mut self, bytes: &[u8]) -> Result<()> {
        self.stream
            .write_all(bytes)
            .and_then(|()| self.stream.flush())
            .map_err(|source| PageServerError::Connection { step: "answer the client", source })
    }

    /// Begins a memory, and returns whether the parent has it. The parent must be the dump `expected`, if
    /// the client and the parent's directory say which they mean.
    fn open(&mut self, memory: MemoryId, expected: Option<DumpId>) -> Result<bool> {
        self.finish()?;
        let mut held = self.held(memory)?;
        if held.is_some()
            && let (Some(expected), Some(parent)) = (expected, self.parent()?)
            && id_of(&parent)?.is_some_and(|found| found != expected)
        {
            log::warn!(
                "{memory}: {} is not the previous dump of the client, so all pages are received",
                parent.display()
            );
            held = None;
        }
        let has_parent = held.is_some();
        self.memories += 1;
        let sink = FileSink::create(&self.images, memory, self.memories, true)?;
        let number = encode_memory(memory);
        self.open = Some(Receiving { memory, number, sink, held, last: None, stored: 0 });
        log::debug!("{memory}: begun, {} parent", if has_parent { "with a" } else { "without a" });
        Ok(has_parent)
    }

    /// Returns the directory of the previous dump.
    fn parent(&self) -> Result<Option<PathBuf>> {
        match &self.parent {
            Some(parent) => Ok(Some(parent.clone())),
            // A dump of CRIU into the same directory makes the link.
            None => Ok(chain::parent_of(&self.dir)?),
        }
    }

    /// Returns the pages of a memory in the parent, if it is there.
    fn held(&self, memory: MemoryId) -> Result<Option<PageRanges>> {
        match self.parent()? {
            Some(parent) => Ok(chain::held_pages(&parent, memory, Pagemaps::Stored)?),
            None => Ok(None),
        }
    }

    /// Enters pages of the memory that is open, and receives their bytes.
    fn add(&mut self, memory: u64, entry: &PagemapEntry) -> Result<()> {
        let open =
            self.open.as_ref().map_or("no memory".to_owned(), |open| open.memory.to_string());
        let Some(open) = self.open.as_mut().filter(|found| found.number == memory) else {
            return Err(PageServerError::NotOpen { memory, open });
        };
        let end = open.last.map_or(PageIndex(0), |last| last.end());
        if entry.first < end {
            return Err(PageServerError::Order { memory: open.memory, entry: *entry, end });
        }
        if entry.presence == Presence::Parent {
            let pages = entry.first.0..entry.end().0;
            let are_there = |held: &PageRanges| held.split(pages.clone()).all(|(_, held)| held);
            if !open.held.as_ref().is_some_and(are_there) {
                let (dir, memory) = (self.dir.clone(), open.memory);
                return Err(PageServerError::NotInParent { dir, memory, entry: *entry });
            }
        }
        if !open.last.as_mut().is_some_and(|last| last.join(entry))
            && let Some(last) = open.last.replace(*entry)
        {
            open.sink.enter(&last)?;
        }
        let mut left = entry.pages_in_file();
        while left > 0 {
            let pages = left.min(PIECE_PAGES);
            self.buffer.resize(usize::try_from(pages).expect("a few pages") * PAGE_LEN, 0);
            self.stream.read_exact(&mut self.buffer).map_err(|source| match source.kind() {
                io::ErrorKind::UnexpectedEof => PageServerError::Cut,
                _ => PageServerError::Connection { step: "receive pages", source },
            })?;
            fault::hit(Point::PageServerMemory)?;
            open.sink.store(open.stored, vec![IoSlice::new(&self.buffer)])?;
            open.stored += pages;
            left -= pages;
        }
        Ok(())
    }

    /// Completes the memory that is open.
    fn finish(&mut self) -> Result<()> {
        let Some(Receiving { memory, sink, last, stored, .. }) = self.open.take() else {
            return Ok(());
        };
        if let Some(last) = last {
            sink.enter(&last)?;
        }
        sink.finish()?;
        log::debug!("{memory}: received {stored} pages");
        Ok(())
    }
}

/// Returns which dump the pages in a directory are of, if that is known.
fn id_of(dir: &Path) -> Result<Option<DumpId>> {
    let images = Directory::at(dir);
    match images.open(&Kind::ReceivedId.file_name(0)) {
        Ok(file) => {
            let mut bytes = Vec::new();
            let path = || dir.join(Kind::ReceivedId.file_name(0));
            file.bytes
                .take(HEAD_BYTES as u64)
                .read_to_end(&mut bytes)
                .map_err(|source| ImageError::Open { path: path(), source })?;
            Ok(DumpId::of_bytes(&bytes))
        }
        Err(_) if images.stat(&Kind::Inventory.file_name(0)).is_err() => Ok(None),
        Err(_) => Ok(Some(DumpId::of_name(&chain::dump_name(&images)?))),
    }
}

/// Makes the images durable, and then visible.
fn keep(images: SnapshotWriter, id: Option<DumpId>) -> Result<()> {
    if let Some(id) = id {
        let mut file = images.create_raw(Kind::ReceivedId, 0)?;
        let path = images.path(Kind::ReceivedId, 0);
        file.write_all(id.bytes()).map_err(|source| ImageError::Write { path, source })?;
    }
    fault::hit(Point::PageServerWritten)?;
    images.sync(|file| fds::start_writeback(file, 0, 0))?;
    Ok(images.commit_pages()?)
}
