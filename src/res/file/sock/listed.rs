//! Looks sockets up in the kernel's list of those of a family.

use std::collections::HashMap;

use crate::res::file::{Description, Result};

/// Returns the inode of a socket.
pub(super) fn inode(file: &Description) -> u32 {
    u32::try_from(file.stat.st_ino).expect("inodes of sockets have 32 bits")
}

/// The sockets of one family by inode, listed when the first is looked up.
#[derive(Debug)]
pub(super) struct Listed<T> {
    list: fn() -> nix::Result<HashMap<u32, T>>,
    all: Option<HashMap<u32, T>>,
}

impl<T> Listed<T> {
    pub(super) fn by(list: fn() -> nix::Result<HashMap<u32, T>>) -> Self {
        Self { list, all: None }
    }

    /// Returns a socket, if the kernel lists it.
    pub(super) fn find(&mut self, file: &Description) -> Result<Option<&T>> {
        let all = match self.all.take() {
            Some(all) => all,
            None => (self.list)().map_err(file.failed("list the sockets of the network for"))?,
        };
        Ok(self.all.insert(all).get(&inode(file)))
    }
}
