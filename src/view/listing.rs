//! The entries of the directories of a view.

use super::{
    NodeType, Part, Result, View, held, json,
    mapped::Mapped,
    node::{Group, What},
    proc::{self, Proc},
    process::Below,
    readme::README,
    shortened,
};
use crate::{
    chain::SnapshotId,
    image::{Kind, desc},
};

/// The directories with links to shared objects by names other than their shmids. They are not in
/// `shmem`, which contains files only.
const BY_NAME: &str = "shmem-by-name";
const BY_PROCESS: &str = "shmem-by-process";

impl View {
    /// Returns the entries of a snapshot's directory.
    pub(super) fn snapshot_children(
        &self,
        id: SnapshotId,
        root: bool,
    ) -> Result<Vec<(String, What)>> {
        let images = self.chain.images(id);
        let directory = |part| match part {
            Part::Core => What::Group(id, Group::Core),
            Part::Files => What::Held(id, String::new(), NodeType::Directory),
            Part::Json => What::Group(id, Group::Json),
            Part::Mem => What::Group(id, Group::Mem),
            Part::Proc => What::Proc(id, proc::Node::Root),
            Part::Shmem => What::Group(id, Group::Shmem),
            Part::Snapshots => What::Snapshots,
        };
        let shown =
            |part: &Part| !self.without.contains(part) && (root || *part != Part::Snapshots);
        let parts = Part::ALL.into_iter().filter(shown);
        let mut children: Vec<(String, What)> =
            parts.map(|part| (part.name().to_owned(), directory(part))).collect();
        if shown(&Part::Shmem) {
            children.push((BY_NAME.to_owned(), What::ShmemNames(id)));
            children.push((BY_PROCESS.to_owned(), What::ShmemUsers(id)));
        }
        // Files that belong to a memory take precedence over stored files of the same name.
        for memory in self.chain.memories(id)? {
            children.push((memory.pagemap_name(), What::Pagemap(id, memory)));
            // If the head of the pagemap cannot be read, reading the pagemap reports it.
            if let Ok(reader) = images.pagemap(memory) {
                let pages = Kind::Pages.file_name(reader.pages_id().into());
                children.push((pages, What::Pages(id, memory)));
            }
        }
        for name in self.chain.list(id)? {
            // The journal describes the stored pages file, which differs from the one shown here.
            let kind = desc::by_file_name(&name).map(|(desc, _)| desc.kind);
            let journal = kind == Some(Kind::Punched);
            // Show a file with the name of an image even if it is not a regular file, so that
            // reading it fails. Otherwise a copy of the directory would look complete.
            let is_file = || images.stat(&name).is_ok_and(|stat| stat.is_file);
            if (kind.is_some() || is_file()) && !journal {
                children.push((name, What::Image(id)));
            }
        }
        // A file of that name comes first.
        if root {
            children.push((README.to_owned(), What::Readme(id)));
        }
        Ok(children)
    }

    pub(super) fn shmem_children(&self, id: SnapshotId) -> Result<Vec<(String, What)>> {
        let objects = self.tables(id).shared()?;
        let objects = objects.keys().map(|shmid| (shmid.to_string(), What::Shmem(id, *shmid)));
        Ok(objects.collect())
    }

    /// Returns links by the names of memfds and by the keys of System V segments. If several objects
    /// have the same name, all but the first get a suffix.
    pub(super) fn shmem_names(&self, id: SnapshotId) -> Result<Vec<(String, What)>> {
        let tables = self.tables(id);
        let mut children: Vec<(String, What)> = Vec::new();
        for (shmid, object) in tables.shared()?.iter() {
            let Some(name) = &object.name else { continue };
            let taken = |name: &str| children.iter().any(|(other, _)| other == name);
            let name = if taken(name) { format!("{name}.{shmid}") } else { name.clone() };
            children.push((name, What::ShmemLink(id, 1, *shmid)));
        }
        Ok(children)
    }

    /// Returns a link for each mapping of a shared object.
    pub(super) fn shmem_of(&self, id: SnapshotId, pid: u32) -> Result<Vec<(String, What)>> {
        let space = self.address_space(id, pid)?;
        let areas = space.process().areas().iter();
        let shared = areas.filter_map(|area| match &area.below {
            Below::Mapped(Mapped::Shared(shmid)) => Some((area.start, area.end, *shmid)),
            _ => None,
        });
        let link = |(start, end, shmid)| {
            (format!("{start:012x}-{end:012x}"), What::ShmemLink(id, 2, shmid))
        };
        Ok(shared.map(link).collect())
    }

    pub(super) fn held_children(&self, id: SnapshotId, path: &str) -> Result<Vec<(String, What)>> {
        let tables = self.tables(id);
        let children = tables.held()?.children(&tables, path)?.into_iter();
        let child = |(name, entry): (String, held::Entry)| {
            let slash = if entry.kind == NodeType::Directory { "/" } else { "" };
            let path = entry.first.unwrap_or_else(|| format!("{path}{name}{slash}"));
            (name, What::Held(id, path, entry.kind))
        };
        Ok(children.map(child).collect())
    }

    /// Returns an entry for each process of a snapshot that has memory.
    pub(super) fn processes_with_memory(
        &self,
        id: SnapshotId,
        what: impl Fn(SnapshotId, u32) -> What,
    ) -> Result<Vec<(String, What)>> {
        let images = self.chain.images(id);
        // A pre-dump has memory but no process tree.
        if !images.has(Kind::Pstree, 0) {
            return Ok(Vec::new());
        }
        let tree = self.tables(id).tree()?;
        let pids = tree.iter().map(|process| process.pid);
        let alive = pids.filter(|pid| images.has(Kind::Mm, (*pid).into()));
        Ok(alive.map(|pid| (pid.to_string(), what(id, pid))).collect())
    }

    pub(super) fn json_children(&self, id: SnapshotId) -> Result<Vec<(String, What)>> {
        let images = self.snapshot_children(id, false)?.into_iter();
        let text = |(image, what): (String, What)| {
            let name = json::name(&image)?;
            (what.kind() == NodeType::File).then(|| (name, What::Json(id, Box::new(what), image)))
        };
        Ok(images.filter_map(text).collect())
    }

    pub(super) fn proc_children(
        &self,
        id: SnapshotId,
        node: &proc::Node,
    ) -> Result<Vec<(String, What)>> {
        // A pre-dump has no process tree.
        if !self.chain.images(id).has(Kind::Pstree, 0) {
            return Ok(Vec::new());
        }
        let tables = self.tables(id);
        let children = Proc::new(&tables, &self.spaces).children(node)?.into_iter();
        Ok(children.map(|(name, node)| (name, What::Proc(id, node))).collect())
    }

    /// Returns a file for each mapping of a process whose contents are in images or files.
    pub(super) fn mapping_children(&self, id: SnapshotId, pid: u32) -> Result<Vec<(String, What)>> {
        let tables = self.tables(id);
        let space = self.address_space(id, pid)?;
        let names = Proc::new(&tables, &self.spaces).names(space.process())?;
        let mut children = Vec::new();
        for area in space.process().areas() {
            // Omit areas that the process could not read, unless it has written to them before.
            let visible = area.prot != 0 && !matches!(area.below, Below::Unknown);
            if !visible && space.resident(area)? == (0, 0) {
                continue;
            }
            let position = names.partition_point(|(start, ..)| *start < area.start);
            let name = names.get(position).map_or(&[][..], |(.., name)| name);
            let (start, end) = (area.start, area.end);
            let name = format!("{start:012x}-{end:012x}-{}", mapping_name(name));
            children.push((name, What::Mapping(id, pid, start, end)));
        }
        Ok(children)
    }
}

/// Returns the file name of a mapping, from its name in `maps`.
fn mapping_name(name: &[u8]) -> String {
    /// With the two addresses before it, the name fits into `NAME_MAX`.
    const LIMIT: usize = 200;
    let name = name.strip_suffix(b" (deleted)").unwrap_or(name);
    let name = name.rsplit(|byte| *byte == b'/').next().unwrap_or_default();
    let name = String::from_utf8_lossy(name);
    let name = name.trim_matches(['[', ']']);
    match name {
        "" => "anon".to_owned(),
        "zero" => "shared".to_owned(),
        name => {
            let name = shortened(name, LIMIT);
            name.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
        }
    }
}
