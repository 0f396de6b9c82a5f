//! Images in memory, for tests.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Cursor, IoSlice, IoSliceMut, Write},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, OnceLock},
    time::UNIX_EPOCH,
};

use prost::Message;

use super::{BrokenLink, ImageStore, Input, Output, Stat, Store, StoreWriter, StoredFile};
use crate::image::{ImageWriter, Kind, Result as ImageResult};

/// A snapshot in memory, which has no path and no descriptor.
#[derive(Clone, Debug)]
pub(crate) struct InMemory {
    name: PathBuf,
    files: BTreeMap<String, Arc<[u8]>>,
    parent: Option<Store>,
}

impl InMemory {
    pub(crate) fn new(name: &str) -> Self {
        Self { name: name.into(), files: BTreeMap::new(), parent: None }
    }

    pub(crate) fn with_parent(mut self, parent: Store) -> Self {
        self.parent = Some(parent);
        self
    }

    pub(crate) fn put(&mut self, file: &str, bytes: &[u8]) {
        self.files.insert(file.to_owned(), bytes.into());
    }

    pub(crate) fn write<M: Message>(&mut self, kind: Kind, number: u64, messages: &[M]) {
        let name = kind.file_name(number);
        let mut image = ImageWriter::new(Path::new(&name), Vec::new(), kind).unwrap();
        messages.iter().for_each(|message| image.message(message).unwrap());
        self.put(&name, &image.into_output());
    }

    fn file(&self, file: &str) -> io::Result<&Arc<[u8]>> {
        self.files.get(file).ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

fn stat(bytes: &[u8]) -> Stat {
    let len = bytes.len() as u64;
    Stat {
        is_file: true,
        len,
        allocated: len,
        mode: 0o600,
        uid: 0,
        gid: 0,
        accessed: UNIX_EPOCH,
        modified: UNIX_EPOCH,
        changed: UNIX_EPOCH,
        identity: (0, bytes.as_ptr().addr() as u64),
    }
}

impl ImageStore for InMemory {
    fn name(&self) -> &Path {
        &self.name
    }

    fn open(&self, file: &str) -> io::Result<Input> {
        let bytes = Arc::clone(self.file(file)?);
        let len = bytes.len() as u64;
        Ok(Input { bytes: Box::new(Cursor::new(bytes)), len, allocated: len })
    }

    fn open_at_random(&self, file: &str) -> io::Result<Box<dyn StoredFile>> {
        Ok(Box::new(InMemoryFile(Arc::clone(self.file(file)?))))
    }

    fn stat(&self, file: &str) -> io::Result<Stat> {
        Ok(stat(self.file(file)?))
    }

    fn stat_store(&self) -> io::Result<Stat> {
        Ok(Stat { is_file: false, mode: 0o700, ..stat(&[]) })
    }

    fn list(&self) -> io::Result<Vec<String>> {
        Ok(self.files.keys().cloned().collect())
    }

    fn allocated(&self) -> io::Result<u64> {
        Ok(self.files.values().map(|bytes| bytes.len() as u64).sum())
    }

    fn parent(&self) -> Result<Option<Store>, BrokenLink> {
        Ok(self.parent.clone())
    }

    fn owner(&self) -> Option<u32> {
        Some(0)
    }

    fn directory(&self) -> Option<&Path> {
        None
    }
}

#[derive(Debug)]
struct InMemoryFile(Arc<[u8]>);

impl StoredFile for InMemoryFile {
    fn stat(&self) -> io::Result<Stat> {
        Ok(stat(&self.0))
    }

    fn read_vectored_at(&self, buffers: &mut [IoSliceMut<'_>], offset: u64) -> io::Result<usize> {
        let offset = usize::try_from(offset).unwrap_or(usize::MAX).min(self.0.len());
        io::Read::read_vectored(&mut &self.0[offset..], buffers)
    }

    fn file(&self) -> Option<&File> {
        None
    }
}

/// The bytes of a file that is being written.
type Shared = Arc<Mutex<Vec<u8>>>;

/// A snapshot in memory that is being written; `commit` puts the result into `done`.
#[derive(Debug, Default)]
pub(crate) struct InMemoryWriter {
    name: PathBuf,
    files: Mutex<BTreeMap<String, Shared>>,
    done: Arc<OnceLock<InMemory>>,
}

impl InMemoryWriter {
    pub(crate) fn new(name: &str, done: &Arc<OnceLock<InMemory>>) -> Self {
        Self { name: name.into(), done: Arc::clone(done), ..Self::default() }
    }
}

impl StoreWriter for InMemoryWriter {
    fn name(&self) -> &Path {
        &self.name
    }

    fn create(&self, file: &str) -> io::Result<Box<dyn Output>> {
        let mut files = self.files.lock().unwrap();
        if files.contains_key(file) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let bytes = Shared::default();
        files.insert(file.to_owned(), Arc::clone(&bytes));
        Ok(Box::new(InMemoryOutput(bytes)))
    }

    fn link_parent(&self, _: &Path) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn sync(&self, _: &dyn Fn(&File)) -> ImageResult<()> {
        Ok(())
    }

    fn commit(self: Box<Self>) -> ImageResult<()> {
        let mut images = InMemory { name: self.name, files: BTreeMap::new(), parent: None };
        for (name, bytes) in self.files.into_inner().unwrap() {
            images.put(&name, &bytes.lock().unwrap());
        }
        self.done.set(images).expect("committed once");
        Ok(())
    }
}

#[derive(Debug)]
struct InMemoryOutput(Shared);

impl Write for InMemoryOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Output for InMemoryOutput {
    fn write_vectored_at(&self, buffers: &[IoSlice<'_>], offset: u64) -> io::Result<usize> {
        let mut bytes = self.0.lock().unwrap();
        let mut at = Cursor::new(&mut *bytes);
        at.set_position(offset);
        at.write_vectored(buffers)
    }

    fn file(&self) -> Option<&File> {
        None
    }
}
