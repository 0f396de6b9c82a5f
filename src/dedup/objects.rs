//! Identifies the shared objects of a snapshot. The numbers in the images are those of
//! inodes, which may differ in another dump of the same object.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::Result;
use crate::{
    chain::{Chain, SnapshotId},
    image::{ImageError, Kind, proto, vma},
};

/// The kind of an object.
#[derive(Clone, Debug, PartialEq, Eq)]
enum ObjectKind {
    /// Anonymous shared memory.
    Anonymous,
    /// A memfd of this name.
    Memfd(Vec<u8>),
    /// A System V segment. Programs know its id.
    SystemV,
}

/// How a process uses an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Use {
    /// A mapping of the object from an offset on, at an address.
    Mapping { pid: u64, start: u64, offset: u64 },
    /// A descriptor.
    Descriptor { pid: u64, fd: u32 },
}

/// The kind and number of an image.
pub(super) type ImageName = (Kind, u64);

/// A shared object.
#[derive(Clone, Debug)]
struct Object {
    kind: ObjectKind,
    uses: BTreeSet<Use>,
    /// The images that refer to it by number, except pagemaps.
    named_by: Vec<ImageName>,
}

/// The shared objects of a snapshot by number.
#[derive(Clone, Debug, Default)]
pub(super) struct Objects(BTreeMap<u64, Object>);

impl Objects {
    /// Reads the objects from the images of a snapshot; a pre-dump has none.
    ///
    /// # Errors
    /// Unreadable images.
    pub(super) fn read(chain: &Chain, id: SnapshotId) -> Result<Self> {
        let mut reader = Reader { chain, id, objects: Self::default(), memfds: HashMap::new() };
        reader.memfds()?;
        for process in reader.all::<proto::PstreeEntry>(Kind::Pstree, 0)? {
            reader.mappings(process.pid.into())?;
            reader.descriptors(process.pid.into())?;
        }
        Ok(reader.objects)
    }

    /// Whether an image refers to this number.
    pub(super) fn has(&self, shmid: u64) -> bool {
        self.0.contains_key(&shmid)
    }

    /// Returns the images that refer to an object, if it may be renumbered.
    pub(super) fn renumbered_in(&self, shmid: u64) -> Option<&[ImageName]> {
        let object = self.0.get(&shmid)?;
        (object.kind != ObjectKind::SystemV).then_some(&object.named_by)
    }

    /// Matches each object with one of an older snapshot: of the same kind and name, and
    /// with the most uses in common; of several, the one with the same number. Returns
    /// pairs of numbers: here and there.
    pub(super) fn found_in(&self, older: &Self) -> BTreeMap<u64, u64> {
        let mut users: HashMap<Use, u64> = HashMap::new();
        for (shmid, object) in &older.0 {
            users.extend(object.uses.iter().map(|place| (*place, *shmid)));
        }
        let mut candidates = Vec::new();
        for (here, object) in &self.0 {
            let mut common: BTreeMap<u64, usize> = BTreeMap::new();
            for there in object.uses.iter().filter_map(|place| users.get(place)) {
                *common.entry(*there).or_default() += 1;
            }
            for (there, count) in common {
                if older.0[&there].kind == object.kind
                    && (object.kind != ObjectKind::SystemV || *here == there)
                {
                    candidates.push((count, *here == there, *here, there));
                }
            }
        }
        candidates.sort_by_key(|(count, same, here, there)| {
            (std::cmp::Reverse((*count, *same)), *here, *there)
        });
        let (mut found, mut taken) = (BTreeMap::new(), BTreeSet::new());
        for (_, _, here, there) in candidates {
            if !found.contains_key(&here) && taken.insert(there) {
                found.insert(here, there);
            }
        }
        found
    }
}

struct Reader<'a> {
    chain: &'a Chain,
    id: SnapshotId,
    objects: Objects,
    /// Numbers of memfds, by the ids of their open files.
    memfds: HashMap<u64, u64>,
}

impl Reader<'_> {
    /// Reads an optional image.
    fn all<M: prost::Message + prost::Name + Default>(
        &self,
        kind: Kind,
        number: u64,
    ) -> Result<Vec<M>, ImageError> {
        let entries = self.chain.images(self.id).messages_if_any(kind, number)?;
        Ok(entries.unwrap_or_default())
    }

    fn memfds(&mut self) -> Result<()> {
        let mut inodes = HashMap::new();
        for inode in self.all::<proto::MemfdInodeEntry>(Kind::MemfdInode, 0)? {
            let shmid = u64::from(inode.shmid);
            self.enter(shmid, &ObjectKind::Memfd(inode.name), None, (Kind::MemfdInode, 0));
            inodes.insert(inode.inode_id, shmid);
        }
        let files = self.all::<proto::FileEntry>(Kind::Files, 0)?;
        for file in files.into_iter().filter_map(|file| file.memfd) {
            if let Some(shmid) = inodes.get(&file.inode_id.into()) {
                self.memfds.insert(file.id.into(), *shmid);
            }
        }
        Ok(())
    }

    fn mappings(&mut self, pid: u64) -> Result<()> {
        let image = (Kind::Mm, pid);
        for mm in self.all::<proto::MmEntry>(image.0, image.1)? {
            for area in mm.vmas {
                let place = Use::Mapping { pid, start: area.start, offset: area.pgoff };
                let is = |bits| area.status & bits == bits;
                if area.status & vma::MEMFD != 0 {
                    self.use_memfd(area.shmid, place);
                } else if is(vma::ANON_SHARED | vma::SYSVIPC) {
                    self.enter(area.shmid, &ObjectKind::SystemV, Some(place), image);
                } else if is(vma::ANON_SHARED) {
                    self.enter(area.shmid, &ObjectKind::Anonymous, Some(place), image);
                }
            }
        }
        Ok(())
    }

    fn descriptors(&mut self, pid: u64) -> Result<()> {
        for ids in self.all::<proto::TaskKobjIdsEntry>(Kind::Ids, pid)? {
            for open in self.all::<proto::FdinfoEntry>(Kind::Fdinfo, ids.files_id.into())? {
                self.use_memfd(open.id.into(), Use::Descriptor { pid, fd: open.fd });
            }
        }
        Ok(())
    }

    /// Records a use of an open file, if it is a memfd.
    fn use_memfd(&mut self, file: u64, place: Use) {
        let object = self.memfds.get(&file).and_then(|shmid| self.objects.0.get_mut(shmid));
        if let Some(object) = object {
            object.uses.insert(place);
        }
    }

    fn enter(&mut self, shmid: u64, kind: &ObjectKind, place: Option<Use>, image: ImageName) {
        let new = || Object { kind: kind.clone(), uses: BTreeSet::new(), named_by: Vec::new() };
        let object = self.objects.0.entry(shmid).or_insert_with(new);
        object.uses.extend(place);
        if object.kind == ObjectKind::SystemV {
            return;
        }
        if object.kind != *kind {
            // Two objects with one number cannot be told apart, so the memory is left as it
            // is.
            object.kind = ObjectKind::SystemV;
        } else if !object.named_by.contains(&image) {
            object.named_by.push(image);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn objects(all: &[(u64, ObjectKind, &[Use])]) -> Objects {
        let object = |kind: &ObjectKind, uses: &[Use]| Object {
            kind: kind.clone(),
            uses: uses.iter().copied().collect(),
            named_by: Vec::new(),
        };
        Objects(all.iter().map(|(shmid, kind, uses)| (*shmid, object(kind, uses))).collect())
    }

    #[test]
    fn objects_are_found_by_what_they_are() {
        let at = |pid, start| Use::Mapping { pid, start, offset: 0 };
        let memfd = |name: &str| ObjectKind::Memfd(name.into());
        use ObjectKind::{Anonymous, SystemV};
        let older = objects(&[
            (1, Anonymous, &[at(7, 0x1000), at(8, 0x1000)]),
            (2, Anonymous, &[at(7, 0x2000)]),
            (3, memfd("a"), &[Use::Descriptor { pid: 7, fd: 3 }]),
            (4, SystemV, &[at(7, 0x4000)]),
            (5, SystemV, &[at(7, 0x5000)]),
        ]);
        let newer = objects(&[
            // Mostly used like 1 before, although its number is 2.
            (2, Anonymous, &[at(7, 0x1000), at(8, 0x1000), at(7, 0x2000)]),
            // Another name.
            (13, memfd("b"), &[Use::Descriptor { pid: 7, fd: 3 }]),
            // A segment is identified by its number.
            (4, SystemV, &[at(7, 0x4000)]),
            (15, SystemV, &[at(7, 0x5000)]),
            // In another process.
            (16, Anonymous, &[at(9, 0x1000)]),
        ]);
        assert_eq!(newer.found_in(&older), BTreeMap::from([(2, 1), (4, 4)]));
        assert_eq!(newer.renumbered_in(4), None);
        assert_eq!(newer.renumbered_in(2), Some(&[][..]));
    }
}
