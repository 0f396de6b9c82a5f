//! The contents of files and links, and where their attributes come from.

use std::{io, path::PathBuf, sync::Arc};

use super::{
    AddressSpace, CoreFile, NodeType, OpenFile, Result, View, ViewError, WholeFile,
    address_space::{MappingFile, ProcessMemory},
    flat::{self, MemoryFile},
    json,
    node::What,
    proc::{self, Proc},
};
use crate::{
    chain::{ChainError, Content, FlatPages, SnapshotId},
    image::{ImageStore, Kind, MemoryId, store::Stat},
};

impl View {
    /// Returns where a node gets its owner, mode and times from.
    pub(super) fn origin(&self, what: &What, name: &str) -> Origin<'_> {
        let whole = |id: SnapshotId| Origin { images: &**self.chain.images(id), file: None };
        let file = |id: SnapshotId, name: String| Origin { file: Some(name), ..whole(id) };
        match what {
            What::Snapshot(id) | What::Group(id, _) => whole(*id),
            What::Snapshots => whole(self.tip),
            What::Image(id) => file(*id, name.to_owned()),
            What::Json(_, image, name) => self.origin(image, name),
            What::Pagemap(id, memory) | What::Pages(id, memory) => file(*id, memory.pagemap_name()),
            What::Shmem(id, shmid) => {
                let pagemap = MemoryId::Shared(*shmid).pagemap_name();
                if self.chain.images(*id).stat(&pagemap).is_ok() {
                    file(*id, pagemap)
                } else {
                    file(*id, Kind::Inventory.file_name(0))
                }
            }
            What::Mem(id, _)
            | What::ShmemNames(id)
            | What::ShmemUsers(id)
            | What::ShmemUser(id, _) => whole(*id),
            What::Held(id, _, NodeType::Directory) => whole(*id),
            What::Held(id, ..) | What::ShmemLink(id, ..) | What::Readme(id) => {
                file(*id, Kind::Inventory.file_name(0))
            }
            What::Mapping(id, pid, ..) | What::Core(id, pid) => {
                file(*id, Kind::Mm.file_name((*pid).into()))
            }
            What::Proc(id, node) => match node.pid() {
                Some(pid) if node.kind() != NodeType::Directory => {
                    file(*id, Kind::Core.file_name(pid.into()))
                }
                _ => whole(*id),
            },
        }
    }

    /// Opens the file `name`.
    pub(super) fn open_what(&self, what: &What, name: &str) -> Result<OpenFile> {
        let chain = &self.chain;
        match what {
            What::Snapshot(_)
            | What::Group(..)
            | What::Snapshots
            | What::Mem(..)
            | What::Held(.., NodeType::Directory)
            | What::ShmemNames(_)
            | What::ShmemUsers(_)
            | What::ShmemUser(..) => Err(ViewError::IsADirectory { path: name.to_owned() }),
            What::Proc(_, node) if node.kind() == NodeType::Directory => {
                Err(ViewError::IsADirectory { path: name.to_owned() })
            }
            What::Proc(id, proc::Node::Memory(pid)) => {
                let content = Arc::new(ProcessMemory::new(self.address_space(*id, *pid)?));
                Ok(OpenFile { content, whole: None, pages: None })
            }
            What::Proc(id, node) => {
                let tables = self.tables(*id);
                let content = MemoryFile::new(Proc::new(&tables, &self.spaces).text(node)?);
                Ok(OpenFile { content: Arc::new(content), whole: None, pages: None })
            }
            What::Image(id) => {
                let file = chain.files().get(chain.files().enter(chain.images(*id), name))?;
                let content = Arc::new(WholeFile::new(Arc::clone(&file))?);
                Ok(OpenFile { content, whole: Some(file), pages: None })
            }
            What::Pagemap(id, memory) => {
                let index = chain.index(*id, *memory)?;
                let content = flat::pagemap(&self.origin(what, name).path(), &index)?;
                Ok(OpenFile { content: Arc::new(content), whole: None, pages: None })
            }
            What::Pages(id, memory) => {
                self.check_claims(*id, *memory)?;
                let pages = FlatPages::new(Arc::clone(chain), chain.index(*id, *memory)?);
                let whole = match pages.whole_file() {
                    Some(layer) => Some(chain.files().get(layer.file)?),
                    None => None,
                };
                let whole =
                    whole.filter(|file| file.stat().is_ok_and(|stat| stat.len == pages.len()));
                let pages = Arc::new(pages);
                let content = Arc::clone(&pages) as Arc<dyn Content>;
                Ok(OpenFile { content, whole, pages: Some(pages) })
            }
            What::Shmem(id, shmid) => {
                let content = flat::shmem(&self.tables(*id), *shmid)?;
                Ok(OpenFile { content, whole: None, pages: None })
            }
            What::Held(id, path, NodeType::File) => {
                let tables = self.tables(*id);
                let content = tables.held()?.open(&tables, path)?;
                Ok(OpenFile { content, whole: None, pages: None })
            }
            What::Readme(_) => {
                let content = MemoryFile::new(self.readme());
                Ok(OpenFile { content: Arc::new(content), whole: None, pages: None })
            }
            What::Held(..) | What::ShmemLink(..) => {
                Err(ViewError::NoSuchEntry { dir: name.to_owned(), name: name.to_owned() })
            }
            What::Mapping(id, pid, start, end) => {
                let space = self.address_space(*id, *pid)?;
                let content = Arc::new(MappingFile::new(space, *start..*end));
                Ok(OpenFile { content, whole: None, pages: None })
            }
            What::Core(id, pid) => {
                let space = self.address_space(*id, *pid)?;
                Ok(OpenFile { content: Arc::new(CoreFile::open(space)?), whole: None, pages: None })
            }
            What::Json(_, image, name) => {
                let open = self.open_what(image, name)?;
                let content = json::render(&self.origin(image, name).path(), &*open.content)?;
                Ok(OpenFile { content: Arc::new(content), whole: None, pages: None })
            }
        }
    }

    /// Returns the target of a link.
    pub(super) fn target(&self, what: &What) -> Result<Vec<u8>> {
        match what {
            What::Proc(id, node) => Proc::new(&self.tables(*id), &self.spaces).target(node),
            What::Held(id, path, NodeType::Link) => {
                let tables = self.tables(*id);
                Ok(tables.held()?.target(&tables, path)?.into_bytes())
            }
            What::ShmemLink(_, depth, shmid) => {
                Ok(format!("{}shmem/{shmid}", "../".repeat(*depth as usize)).into_bytes())
            }
            _ => Ok(Vec::new()),
        }
    }

    pub(super) fn address_space(&self, id: SnapshotId, pid: u32) -> Result<Arc<AddressSpace>> {
        self.spaces.get(&self.tables(id), pid)
    }

    /// Checks that no other memory of the snapshot uses the same pages file.
    fn check_claims(&self, id: SnapshotId, memory: MemoryId) -> Result<()> {
        let images = self.chain.images(id);
        let pages_id = |memory: MemoryId| images.pagemap(memory).map(|pagemap| pagemap.pages_id());
        let claimed = pages_id(memory)?;
        for other in self.chain.memories(id)? {
            if other != memory && pages_id(other).is_ok_and(|id| id == claimed) {
                return Err(ViewError::Chain(ChainError::SharedPages {
                    dir: images.name().to_owned(),
                    pages_id: claimed,
                    first: memory,
                    second: other,
                }));
            }
        }
        Ok(())
    }
}

/// A store, or a file in it.
pub(super) struct Origin<'a> {
    images: &'a dyn ImageStore,
    file: Option<String>,
}

impl Origin<'_> {
    pub(super) fn path(&self) -> PathBuf {
        match &self.file {
            Some(file) => self.images.path_of(file),
            None => self.images.name().to_owned(),
        }
    }

    pub(super) fn stat(&self) -> io::Result<Stat> {
        match &self.file {
            Some(file) => self.images.stat(file),
            None => self.images.stat_store(),
        }
    }
}
