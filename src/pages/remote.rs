//! Sends memory to a page server.
//!
//! The protocol has one memory at a time, and its pages in ascending order. Several threads still read and
//! compare a memory; then they take turns to send.

use std::{
    collections::VecDeque,
    io::{self, IoSlice, Read, Write},
    net::{SocketAddr, TcpStream, ToSocketAddrs},
    sync::{Condvar, Mutex, PoisonError},
    time::{Duration, Instant},
};

use super::{
    Copied, Memory, PageSink, PagesError, Result, copy,
    stretch::require_stored,
    tls::{self, Secured, TlsOptions},
    wire::{CLOSED_BYTES, Command, DumpId, HEAD_BYTES, OPENED_BYTES, encode_memory},
};
use crate::{
    image::{MemoryId, PagemapEntry, PagemapWriter, Presence, SnapshotWriter, store::StoredOutput},
    parallel::lock,
    sys::{cancel, fds},
    units::page_bytes,
};

/// How long a system call of the connection waits, before rcriu looks whether it was asked to stop.
const TICK: Duration = Duration::from_millis(500);

/// How long a page server may take no data and send no answer. The tree may stand still meanwhile.
const PATIENCE: Duration = Duration::from_secs(120);

/// How long a page server may take to write all that it has received to its disk.
const PATIENCE_AT_END: Duration = Duration::from_secs(1200);

/// Where a page server is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ServerPlace {
    /// At an address, by name or number, and a port.
    Address(String, u16),
    /// Behind a connected socket with this descriptor.
    Socket(i32),
}

/// Where a page server is, and how to speak with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerOptions {
    /// Where it is.
    pub place: ServerPlace,
    /// How to encrypt the connection, if that is wanted.
    pub tls: Option<TlsOptions>,
}

/// A connection to a page server.
#[derive(Debug)]
pub struct PageServer {
    name: String,
    connection: Secured<Connection>,
    /// Whether the caller may keep the socket, so that its end does not tell the server.
    is_callers: bool,
    /// The previous dump, which the server's parent must be.
    parent: Option<DumpId>,
}

impl PageServer {
    /// Connects to a page server, for a dump on `parent`.
    ///
    /// # Errors
    /// [`PagesError::NoServer`], [`PagesError::Server`], [`PagesError::Tls`].
    pub fn connect(
        ServerOptions { place, tls }: &ServerOptions,
        parent: Option<DumpId>,
    ) -> Result<Self> {
        let (name, connected) = match place {
            ServerPlace::Address(host, port) => {
                let name = format!("{host}:{port}");
                let addresses = (host.as_str(), *port)
                    .to_socket_addrs()
                    .map_err(|source| PagesError::NoServer { name: name.clone(), source })?;
                (name, connect_to_any(addresses))
            }
            ServerPlace::Socket(fd) => {
                let socket = fds::duplicate(*fd).map(TcpStream::from);
                (format!("behind descriptor {fd}"), socket.map_err(io::Error::from))
            }
        };
        let is_callers = matches!(place, ServerPlace::Socket(_));
        let connection = connected.and_then(Connection::new);
        let connection = connection.map_err(|source| PagesError::Server {
            name: name.clone(),
            step: "connect",
            source,
        })?;
        let host = match place {
            ServerPlace::Address(host, _) => Some(host.as_str()),
            ServerPlace::Socket(_) => None,
        };
        let connection = match tls {
            None => Secured::Plain(connection),
            Some(tls) => tls::connect(tls, host, connection)
                .map_err(|source| PagesError::Tls { name: name.clone(), source })?,
        };
        Ok(Self { name, connection, is_callers, parent })
    }

    /// Sends memories, one after the other, and records in `images` which pages were sent, from number
    /// `first` on. Forgets the
    /// parents that the server does not have.
    ///
    /// # Errors
    /// A memory cannot be read; a parent chain cannot be read; the server does not do its part; the record
    /// cannot be written.
    pub fn send(
        &mut self,
        memories: &mut [Memory],
        first: u32,
        images: &SnapshotWriter,
    ) -> Result<Copied> {
        let mut copied = Copied::default();
        for (number, memory) in (first..).zip(memories) {
            if !self.open(memory.id)? {
                memory.parent = None;
                require_stored(&mut memory.stretches, None);
            }
            let (kind, id) = memory.id.sent_pagemap();
            let record = PagemapWriter::new(images.create(kind, id)?, number)?;
            copied.add(copy(vec![(&*memory, ServerSink::new(self, memory.id, record))])?);
        }
        Ok(copied)
    }

    /// Ends the session of the dump `id`, and waits until the server has made all pages durable, if it does that.
    ///
    /// # Errors
    /// [`PagesError::Server`].
    pub fn close(mut self, id: Option<DumpId>) -> Result<()> {
        self.connection.socket().patience = PATIENCE_AT_END;
        self.command(&Command::Close { forced: self.is_callers }, id)?;
        let answer = self.answer::<CLOSED_BYTES>("receive its word that it has all pages")?;
        match i32::from_le_bytes(answer) {
            0 => {
                // The pages are safe, whether or not the server waits for this.
                let _ = self.connection.finish();
                Ok(())
            }
            status => {
                let problem = format!("it reports status {status}, expected 0");
                Err(self.failed("write the pages", io::Error::other(problem)))
            }
        }
    }

    /// Begins a memory, and returns whether the server has it in the parent.
    fn open(&mut self, memory: MemoryId) -> Result<bool> {
        self.command(&Command::Open { memory, answered: true }, self.parent)?;
        Ok(self.answer::<OPENED_BYTES>("receive the answer about a memory")? != [0])
    }

    fn command(&mut self, command: &Command, id: Option<DumpId>) -> Result<()> {
        let mut head = command.encode();
        if let Some(id) = id {
            id.enter(&mut head);
        }
        let sent = self.connection.write_all(&head);
        sent.map_err(|source| self.failed("send a command", source))
    }

    fn answer<const LENGTH: usize>(&mut self, step: &'static str) -> Result<[u8; LENGTH]> {
        let mut answer = [0; LENGTH];
        let read = self.connection.flush().and_then(|()| self.connection.read_exact(&mut answer));
        read.map_err(|source| self.failed(step, source)).map(|()| answer)
    }

    /// Returns the error of a step.
    fn failed(&self, step: &'static str, source: io::Error) -> PagesError {
        if cancel::is_cancelled() {
            return PagesError::Cancelled;
        }
        PagesError::Server { name: self.name.clone(), step, source }
    }
}

/// Connects to the first address that answers.
fn connect_to_any(addresses: impl Iterator<Item = SocketAddr>) -> io::Result<TcpStream> {
    let mut result = Err(io::Error::new(io::ErrorKind::NotFound, "it has no address"));
    for address in addresses {
        result = TcpStream::connect_timeout(&address, PATIENCE);
        if result.is_ok() {
            break;
        }
    }
    result
}

/// A connection that does not wait for ever.
#[derive(Debug)]
struct Connection {
    socket: TcpStream,
    patience: Duration,
}

impl Connection {
    fn new(socket: TcpStream) -> io::Result<Self> {
        socket.set_read_timeout(Some(TICK))?;
        socket.set_write_timeout(Some(TICK))?;
        // Every write is a whole message; a socket of the caller may be a local one.
        if let Err(error) = socket.set_nodelay(true) {
            log::debug!("the connection to the page server: {error}");
        }
        Ok(Self { socket, patience: PATIENCE })
    }

    /// Repeats a transfer until some bytes are through.
    fn patiently(
        &mut self,
        mut transfer: impl FnMut(&mut TcpStream) -> io::Result<usize>,
    ) -> io::Result<usize> {
        let begin = Instant::now();
        loop {
            match transfer(&mut self.socket) {
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                    ) => {}
                done => return done,
            }
            if cancel::is_cancelled() {
                return Err(io::Error::other("asked to stop"));
            }
            if begin.elapsed() > self.patience {
                let problem = format!("nothing came through for {:?}", self.patience);
                return Err(io::Error::new(io::ErrorKind::TimedOut, problem));
            }
        }
    }
}

impl Read for Connection {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.patiently(|socket| socket.read(bytes))
    }
}

impl Write for Connection {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.patiently(|socket| socket.write(bytes))
    }

    fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        self.patiently(|socket| socket.write_vectored(slices))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Sends one memory.
#[derive(Debug)]
struct ServerSink<'a> {
    memory: u64,
    entered: Mutex<Entered>,
    sending: Mutex<Sending<'a>>,
    turned: Condvar,
}

/// The entries of the memory.
#[derive(Debug)]
struct Entered {
    /// Those that were not sent yet.
    waiting: VecDeque<PagemapEntry>,
    record: PagemapWriter<StoredOutput>,
    /// The last entry, not recorded yet.
    last: Option<PagemapEntry>,
}

/// The state that threads update in turn.
#[derive(Debug)]
struct Sending<'a> {
    server: &'a mut PageServer,
    /// The number of the page that is sent next.
    next: u64,
    failed: bool,
}

impl<'a> ServerSink<'a> {
    fn new(
        server: &'a mut PageServer,
        memory: MemoryId,
        record: PagemapWriter<StoredOutput>,
    ) -> Self {
        let entered = Entered { waiting: VecDeque::new(), record, last: None };
        Self {
            memory: encode_memory(memory),
            entered: Mutex::new(entered),
            sending: Mutex::new(Sending { server, next: 0, failed: false }),
            turned: Condvar::new(),
        }
    }

    /// Takes the entries up to the last that has some of `pages` pages.
    fn take(&self, mut pages: u64) -> Vec<PagemapEntry> {
        let mut entered = lock(&self.entered);
        let mut taken = Vec::new();
        while pages > 0
            && let Some(entry) = entered.waiting.pop_front()
        {
            pages = pages.saturating_sub(entry.pages_in_file());
            taken.push(entry);
        }
        taken
    }
}

impl PageSink for ServerSink<'_> {
    const ENTERED_FIRST: bool = true;

    fn enter(&self, entry: &PagemapEntry) -> Result<()> {
        let mut entered = lock(&self.entered);
        entered.waiting.push_back(*entry);
        if entered.last.as_mut().is_some_and(|last| last.join(entry)) {
            return Ok(());
        }
        match entered.last.replace(*entry) {
            Some(last) => Ok(entered.record.entry(&last)?),
            None => Ok(()),
        }
    }

    fn store(&self, first: u64, slices: Vec<IoSlice<'_>>) -> Result<()> {
        let bytes: u64 = slices.iter().map(|slice| slice.len() as u64).sum();
        let pages = bytes / page_bytes(1);
        if pages == 0 {
            return Ok(());
        }
        let mut sending = lock(&self.sending);
        while sending.next != first && !sending.failed {
            sending = self.turned.wait(sending).unwrap_or_else(PoisonError::into_inner);
        }
        if sending.failed {
            let lost = io::Error::from(io::ErrorKind::BrokenPipe);
            return Err(sending.server.failed("send pages", lost));
        }
        let sent = sending.server.send_pages(self.memory, &self.take(pages), &slices);
        sending.next += pages;
        sending.failed = sent.is_err();
        self.turned.notify_all();
        sent
    }

    fn finish(self) -> Result<()> {
        let sending = self.sending.into_inner().unwrap_or_else(PoisonError::into_inner);
        let Entered { waiting, mut record, last } =
            self.entered.into_inner().unwrap_or_else(PoisonError::into_inner);
        // All that have bytes were sent.
        sending.server.send_pages(self.memory, &Vec::from(waiting), &[])?;
        if let Some(last) = last {
            record.entry(&last)?;
        }
        record.into_image().finish()?;
        Ok(())
    }
}

impl PageServer {
    /// Sends entries, with their bytes, which are those of `slices` in order.
    fn send_pages(
        &mut self,
        memory: u64,
        entries: &[PagemapEntry],
        slices: &[IoSlice<'_>],
    ) -> Result<()> {
        let heads: Vec<[u8; HEAD_BYTES]> =
            entries.iter().map(|entry| Command::Add { memory, entry: *entry }.encode()).collect();
        let mut message: Vec<IoSlice> = Vec::new();
        let mut bytes = slices.iter();
        let mut rest: &[u8] = &[];
        for (entry, head) in entries.iter().zip(&heads) {
            message.push(IoSlice::new(head));
            if entry.presence != Presence::Present {
                continue;
            }
            let mut needed = usize::try_from(page_bytes(entry.pages)).expect("at most a chunk");
            while needed > 0 {
                if rest.is_empty() {
                    rest = bytes.next().expect("entries are entered chunk by chunk");
                }
                let part;
                (part, rest) = rest.split_at(needed.min(rest.len()));
                message.push(IoSlice::new(part));
                needed -= part.len();
            }
        }
        let sent = write_all(&mut self.connection, &mut message);
        sent.map_err(|source| self.failed("send pages", source))
    }
}

/// Writes all bytes of `slices`.
fn write_all(target: &mut impl Write, mut slices: &mut [IoSlice]) -> io::Result<()> {
    while !slices.is_empty() {
        match target.write_vectored(slices)? {
            0 => return Err(io::ErrorKind::WriteZero.into()),
            count => IoSlice::advance_slices(&mut slices, count),
        }
    }
    Ok(())
}
