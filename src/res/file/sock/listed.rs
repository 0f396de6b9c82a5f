//! Looks sockets up in the kernel's list of those of a family.

use std::collections::{HashMap, hash_map::Entry};

use crate::res::file::{Description, Result};

/// Returns the inode of a socket.
pub(super) fn inode(file: &Description) -> u32 {
    u32::try_from(file.stat.st_ino).expect("inodes of sockets have 32 bits")
}

/// The sockets of one family by inode, listed when the first of a network namespace is looked up.
#[derive(Debug)]
pub(super) struct Listed<T> {
    list: fn() -> nix::Result<HashMap<u32, T>>,
    /// Those of each network namespace, by its number.
    all: HashMap<u32, HashMap<u32, T>>,
}

impl<T> Listed<T> {
    pub(super) fn by(list: fn() -> nix::Result<HashMap<u32, T>>) -> Self {
        Self { list, all: HashMap::new() }
    }

    /// Returns a socket, if the kernel lists it. The calling thread is in the network namespace of the
    /// socket.
    pub(super) fn find(&mut self, file: &Description) -> Result<Option<&T>> {
        let all = match self.all.entry(file.network_number()) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(place) => {
                let all = (self.list)();
                place.insert(all.map_err(file.failed("list the sockets of the network for"))?)
            }
        };
        Ok(all.get(&inode(file)))
    }
}
