//! The page server: receives the memory of a dump on another machine.
//!
//! It speaks CRIU's protocol ([`crate::docs::page_server`]) with one client. Pages and pagemaps are written
//! in a hidden subdirectory, and appear in the image directory when the client has said that it has sent all
//! of them, and all are on disk. The other images of the dump stay with the client.

mod error;
mod session;

use std::{
    io,
    net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs},
    path::{Path, PathBuf},
};

use nix::sys::socket::{setsockopt, sockopt};

pub use error::{PageServerError, Result};
use session::Session;

use crate::{
    image::{self, Part, SnapshotWriter, store::Directory},
    pages::tls::{self, Secured, TlsOptions},
    sys::{
        fds,
        lock::{Access, DirectoryLocks},
        output,
    },
};

/// The options of a page server.
#[derive(Clone, Debug)]
#[cfg_attr(test, derive(PartialEq, Eq))]
pub struct Options {
    /// The directory of the images.
    pub(crate) images_dir: PathBuf,
    /// The directory of the previous dump, relative to `images_dir` (`--prev-images-dir`).
    pub(crate) parent: Option<PathBuf>,
    /// Where the client comes from.
    pub(crate) client: Place,
    /// How to encrypt the connection, if that is wanted.
    pub(crate) tls: Option<TlsOptions>,
}

/// Where the client of a page server comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// It connects to this address and port; without a port, the kernel chooses one.
    Address(String, u16),
    /// It is behind a connected socket with this descriptor.
    Socket(i32),
}

/// The address of a server that listens everywhere.
pub const EVERYWHERE: &str = "0.0.0.0";

/// A page server that is ready for its client.
#[derive(Debug)]
pub struct PageServer {
    dir: PathBuf,
    parent: Option<PathBuf>,
    client: Client,
    tls: Option<TlsOptions>,
    _locks: DirectoryLocks,
}

#[derive(Debug)]
enum Client {
    Coming(TcpListener),
    Here(TcpStream),
}

impl PageServer {
    /// Checks the directory, and begins to listen.
    ///
    /// # Errors
    /// The directory cannot be used, or holds a dump; the address cannot be listened on.
    pub fn start(options: &Options) -> Result<Self> {
        let Options { images_dir, parent, client, tls } = options;
        tls.as_ref().map_or(Ok(()), tls::check)?;
        let problem =
            |problem: String| PageServerError::Directory { path: images_dir.clone(), problem };
        let dir = images_dir.canonicalize().map_err(|error| problem(error.to_string()))?;
        output::check_directory(&dir).map_err(|error| problem(error.to_string()))?;
        let mut locks = DirectoryLocks::default();
        locks.take(&dir, Access::Exclusive)?;
        if let Some(name) = image::leftover(&dir, false)? {
            return Err(PageServerError::HasDump { dir, name });
        }
        if let Some(parent) = parent {
            lock_parents(&dir, parent, &mut locks)?;
        }
        let (parent, client) = (parent.clone(), Client::open(client)?);
        Ok(Self { dir, parent, client, tls: tls.clone(), _locks: locks })
    }

    /// Returns the address on which the server listens, if it does so.
    pub fn address(&self) -> Option<SocketAddr> {
        match &self.client {
            Client::Coming(listener) => listener.local_addr().ok(),
            Client::Here(_) => None,
        }
    }

    /// Waits for the client, and receives its pages.
    ///
    /// # Errors
    /// Why not all pages were received. None is left in the directory.
    pub fn serve(self) -> Result<()> {
        let Self { dir, parent, client, tls, _locks } = self;
        let is_callers = matches!(client, Client::Here(_));
        let stream = match client {
            Client::Here(stream) => stream,
            Client::Coming(listener) => {
                let (stream, address) = listener.accept().map_err(PageServerError::Accept)?;
                log::info!("a client has connected from {address}");
                stream
            }
        };
        // A client whose machine has gone must not keep the server for ever.
        let prepared = setsockopt(&stream, sockopt::KeepAlive, &true).map_err(io::Error::from);
        if let Err(error) = prepared.and_then(|()| stream.set_nodelay(true)) {
            log::debug!("the connection of the client: {error}");
        }
        let stream = match &tls {
            None => Secured::Plain(stream),
            Some(tls) => tls::accept(tls, stream)?,
        };
        let images = SnapshotWriter::begin_part(&dir, Part::Pages)?;
        if let Some(parent) = &parent {
            images.link_parent(parent)?;
        }
        let from = parent.map(|parent| dir.join(parent));
        Session::new(stream, images, (dir, from), is_callers).serve()
    }
}

impl Client {
    fn open(place: &Place) -> Result<Self> {
        match place {
            Place::Address(host, port) => {
                let address = format!("{host}:{port}");
                let found = (host.as_str(), *port).to_socket_addrs().map_err(|source| {
                    PageServerError::Address { address: address.clone(), source }
                })?;
                let listener = TcpListener::bind(&*found.collect::<Vec<_>>());
                let failed = |source| PageServerError::Listen { address, source };
                Ok(Self::Coming(listener.map_err(failed)?))
            }
            Place::Socket(fd) => {
                let failed = |errno: nix::errno::Errno| PageServerError::Socket {
                    fd: *fd,
                    source: errno.into(),
                };
                Ok(Self::Here(fds::duplicate(*fd).map_err(failed)?.into()))
            }
        }
    }
}

/// Locks the directory of the previous dump and its ancestors, whose pages must stay.
fn lock_parents(dir: &Path, parent: &Path, locks: &mut DirectoryLocks) -> Result<()> {
    /// More than a chain can have that can be restored.
    const MOST: usize = 1 << 16;
    let path = dir.join(parent);
    let problem = |problem: String| PageServerError::Directory { path: path.clone(), problem };
    let found = path
        .canonicalize()
        .map_err(|error| problem(format!("{error}\nhelp: --prev-images-dir is relative to -D")))?;
    if found == dir {
        return Err(problem("it cannot be its own parent".to_owned()));
    }
    let mut next = Some(Directory::at(found));
    for _ in 0..MOST {
        let Some(ancestor) = next else { return Ok(()) };
        locks.take(image::ImageStore::name(&ancestor), Access::Shared)?;
        // A memory that needs a parent that is not there is an error later.
        next = ancestor.parent_of_pages().unwrap_or_default();
    }
    Err(problem("its parent links form a cycle".to_owned()))
}
