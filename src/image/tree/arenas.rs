//! What processes of a tree share (`clone(2)`), according to the ids in the images.

use std::collections::HashMap;

use nix::libc;

use crate::image::proto;

/// What several processes can share.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Arena {
    /// The address space (`CLONE_VM`).
    Memory,
    /// The descriptor table (`CLONE_FILES`).
    Files,
    /// The root, the working directory and the umask (`CLONE_FS`).
    Fs,
    /// The actions of signals (`CLONE_SIGHAND`).
    Handlers,
}

impl Arena {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Memory, Self::Files, Self::Fs, Self::Handlers];

    /// Returns the name in messages.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Files => "descriptor table",
            Self::Fs => "working directory",
            Self::Handlers => "signal handlers",
        }
    }

    /// Returns the flag of `clone(2)` by which a child shares it with its maker.
    pub const fn clone_flag(self) -> u64 {
        let flag = match self {
            Self::Memory => libc::CLONE_VM,
            Self::Files => libc::CLONE_FILES,
            Self::Fs => libc::CLONE_FS,
            Self::Handlers => libc::CLONE_SIGHAND,
        };
        flag.cast_unsigned() as u64
    }
}

/// The numbers that the images give to what a process has; all 0 for a process that has
/// ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ArenaIds([u32; 4]);

impl ArenaIds {
    /// Returns the ids of an image.
    pub const fn of(ids: &proto::TaskKobjIdsEntry) -> Self {
        Self([ids.vm_id, ids.files_id, ids.fs_id, ids.sighand_id])
    }

    /// Sets one id.
    pub const fn set(&mut self, arena: Arena, id: u32) {
        self.0[arena as usize] = id;
    }

    /// Returns one id.
    pub const fn get(&self, arena: Arena) -> u32 {
        self.0[arena as usize]
    }

    /// Whether two processes share it.
    pub const fn share(&self, other: &Self, arena: Arena) -> bool {
        self.get(arena) != 0 && self.get(arena) == other.get(arena)
    }
}

/// Which processes share what, by the positions of the processes in their tree.
#[derive(Clone, Debug, Default)]
pub struct Arenas {
    ids: Vec<ArenaIds>,
    /// The first process that has it, by [`Arena`].
    owners: Vec<[usize; 4]>,
}

impl Arenas {
    /// Computes the owners from the ids.
    pub fn new(ids: Vec<ArenaIds>) -> Self {
        let mut first: HashMap<(Arena, u32), usize> = HashMap::new();
        let owners = ids.iter().enumerate().map(|(position, ids)| {
            Arena::ALL.map(|arena| match ids.get(arena) {
                0 => position,
                id => *first.entry((arena, id)).or_insert(position),
            })
        });
        let owners = owners.collect();
        Self { ids, owners }
    }

    /// Returns the first process that shares it with the process at `position`. A restore
    /// gives it to that process; the others then share it.
    pub fn owner(&self, arena: Arena, position: usize) -> usize {
        self.owners[position][arena as usize]
    }

    /// Whether the process at `position` is the first that has it.
    pub fn owns(&self, arena: Arena, position: usize) -> bool {
        self.owner(arena, position) == position
    }

    /// Returns all processes that share it, the one at `position` among them.
    pub fn sharers(&self, arena: Arena, position: usize) -> impl Iterator<Item = usize> + '_ {
        let owner = self.owner(arena, position);
        let all = owner..self.owners.len();
        all.filter(move |other| self.owner(arena, *other) == owner)
    }

    /// Whether another process shares it with the process at `position`.
    pub fn is_shared(&self, arena: Arena, position: usize) -> bool {
        self.sharers(arena, position).nth(1).is_some()
    }

    /// Whether any two processes share anything.
    pub fn any_shared(&self) -> bool {
        let mut all = (0..self.owners.len()).flat_map(|position| Arena::ALL.map(|a| (a, position)));
        all.any(|(arena, position)| !self.owns(arena, position))
    }

    /// Returns what two processes share, as flags of `clone(2)`.
    pub fn clone_flags(&self, maker: usize, child: usize) -> u64 {
        let common = Arena::ALL.into_iter().filter(|a| self.ids[maker].share(&self.ids[child], *a));
        common.fold(0, |flags, arena| flags | arena.clone_flag())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_of_a_number_owns_it_and_0_is_nobodys() {
        let ids = [[1, 1, 1, 1], [2, 1, 2, 2], [0; 4], [2, 3, 3, 2], [0; 4]].map(ArenaIds);
        let arenas = Arenas::new(ids.to_vec());
        let owners = |arena| -> Vec<usize> { (0..5).map(|at| arenas.owner(arena, at)).collect() };
        assert_eq!(owners(Arena::Memory), [0, 1, 2, 1, 4]);
        assert_eq!(owners(Arena::Files), [0, 0, 2, 3, 4]);
        assert_eq!(owners(Arena::Fs), [0, 1, 2, 3, 4]);
        assert_eq!(arenas.sharers(Arena::Memory, 3).collect::<Vec<_>>(), [1, 3]);
        assert!(arenas.is_shared(Arena::Files, 1) && !arenas.is_shared(Arena::Fs, 1));
        assert!(arenas.any_shared());
        let flags = (libc::CLONE_VM | libc::CLONE_SIGHAND).cast_unsigned();
        assert_eq!(arenas.clone_flags(1, 3), u64::from(flags));
        assert_eq!(arenas.clone_flags(2, 4), 0);
    }
}
