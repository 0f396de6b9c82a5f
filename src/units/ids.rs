//! Users and groups by their numbers, which are others in each user namespace.

use std::sync::Arc;

/// A user or group by its number in the user namespace of this program: what the kernel tells this
/// program, and takes from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostId(pub u32);

/// A user or group by its number in the user namespace of its tree: what images say, and what the
/// processes of the tree pass to system calls.
///
/// Only an [`IdMap`] tells which [`HostId`] it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NsId(pub u32);

impl NsId {
    /// What the processes see of an id that their namespace does not map (`fs.overflowuid`).
    pub const UNMAPPED: Self = Self(65534);
}

/// The number that stands for no user, and for "unchanged" in arguments of calls.
pub const NO_ID: u32 = u32::MAX;

/// A range of ids that a user namespace maps: a line of `/proc/PID/uid_map`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IdRange {
    /// The first id inside.
    pub inside: u32,
    /// The id outside that it is.
    pub outside: u32,
    /// How many ids there are.
    pub count: u32,
}

/// Which numbers in the images of a tree are which users and groups here.
///
/// A tree in the user namespace of this program has the same numbers there and here.
#[derive(Clone, Debug, Default)]
pub struct IdMap(Option<Arc<Ranges>>);

#[derive(Debug, PartialEq, Eq)]
struct Ranges {
    users: Vec<IdRange>,
    groups: Vec<IdRange>,
}

impl IdMap {
    /// Returns the map of a tree in the user namespace of this program.
    pub const fn of_own_namespace() -> Self {
        Self(None)
    }

    /// Returns the map of a tree in another user namespace.
    pub fn new(users: Vec<IdRange>, groups: Vec<IdRange>) -> Self {
        Self(Some(Arc::new(Ranges { users, groups })))
    }

    /// Whether the tree is in the user namespace of this program.
    pub const fn is_own_namespace(&self) -> bool {
        self.0.is_none()
    }

    /// Returns the number in the images for a user here; [`NsId::UNMAPPED`] if there is none.
    pub fn ns_user(&self, user: HostId) -> NsId {
        inside(self.0.as_ref().map(|ranges| &ranges.users), user)
    }

    /// Returns the number in the images for a group here; [`NsId::UNMAPPED`] if there is none.
    pub fn ns_group(&self, group: HostId) -> NsId {
        inside(self.0.as_ref().map(|ranges| &ranges.groups), group)
    }

    /// Returns the user here for a number of the images, if the namespace maps it.
    pub fn host_user(&self, user: NsId) -> Option<HostId> {
        outside(self.0.as_ref().map(|ranges| &ranges.users), user)
    }

    /// Returns the group here for a number of the images, if the namespace maps it.
    pub fn host_group(&self, group: NsId) -> Option<HostId> {
        outside(self.0.as_ref().map(|ranges| &ranges.groups), group)
    }

    /// Whether the namespace maps a user here.
    pub fn has_user(&self, user: HostId) -> bool {
        self.host_user(self.ns_user(user)) == Some(user)
    }

    /// Whether the namespace maps a group here.
    pub fn has_group(&self, group: HostId) -> bool {
        self.host_group(self.ns_group(group)) == Some(group)
    }

    /// Returns the lowest user and group inside: the root, if there is one. `None` if the tree is in the
    /// user namespace of this program.
    pub fn lowest(&self) -> Option<(u32, u32)> {
        let ranges = self.0.as_ref()?;
        let lowest = |ranges: &[IdRange]| ranges.iter().map(|range| range.inside).min();
        Some((lowest(&ranges.users)?, lowest(&ranges.groups)?))
    }

    /// Returns the user and the group here that [`Self::lowest`] are.
    pub fn lowest_here(&self) -> Option<(u32, u32)> {
        self.lowest().map(|lowest| self.host_owner(lowest))
    }

    /// Turns the owner of a file here into that of the images.
    pub fn ns_owner(&self, (user, group): (u32, u32)) -> (u32, u32) {
        (self.ns_user(HostId(user)).0, self.ns_group(HostId(group)).0)
    }

    /// Turns the owner of a file in the images into that here; [`NO_ID`], which `chown(2)` leaves
    /// alone, where the namespace maps none.
    pub fn host_owner(&self, (user, group): (u32, u32)) -> (u32, u32) {
        let number = |id: Option<HostId>| id.map_or(NO_ID, |id| id.0);
        (number(self.host_user(NsId(user))), number(self.host_group(NsId(group))))
    }
}

fn inside(ranges: Option<&Vec<IdRange>>, HostId(id): HostId) -> NsId {
    let Some(ranges) = ranges.filter(|_| id != NO_ID) else { return NsId(id) };
    let found = ranges.iter().find_map(|range| {
        let at = id.checked_sub(range.outside).filter(|at| *at < range.count)?;
        range.inside.checked_add(at)
    });
    found.map_or(NsId::UNMAPPED, NsId)
}

fn outside(ranges: Option<&Vec<IdRange>>, NsId(id): NsId) -> Option<HostId> {
    let Some(ranges) = ranges.filter(|_| id != NO_ID) else { return Some(HostId(id)) };
    let found = ranges.iter().find_map(|range| {
        let at = id.checked_sub(range.inside).filter(|at| *at < range.count)?;
        range.outside.checked_add(at)
    });
    found.map(HostId)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_go_both_ways_through_any_shape_of_map() {
        let range = |inside, outside, count| IdRange { inside, outside, count };
        let users = vec![range(0, 1000, 1), range(1, 100_000, 65535)];
        let ids = IdMap::new(users, vec![range(5, 0, u32::MAX - 5)]);
        for (here, there) in [(1000, 0), (100_000, 1), (165_534, 65535)] {
            assert_eq!(ids.ns_user(HostId(here)), NsId(there));
            assert_eq!(ids.host_user(NsId(there)), Some(HostId(here)));
            assert!(ids.has_user(HostId(here)));
        }
        assert_eq!(ids.ns_user(HostId(0)), NsId::UNMAPPED);
        assert!(!ids.has_user(HostId(0)));
        assert_eq!(ids.host_user(NsId(65536)), None);
        assert_eq!(ids.ns_group(HostId(0)), NsId(5));
        assert_eq!((ids.lowest(), IdMap::of_own_namespace().lowest()), (Some((0, 5)), None));
        assert_eq!(ids.host_group(NsId(4)), None);
        assert_eq!(ids.ns_user(HostId(NO_ID)), NsId(NO_ID));
        assert_eq!(ids.host_user(NsId(NO_ID)), Some(HostId(NO_ID)));
        let own = IdMap::of_own_namespace();
        assert_eq!((own.ns_user(HostId(7)), own.host_user(NsId(7))), (NsId(7), Some(HostId(7))));
        assert_eq!(own.ns_owner((1, 2)), (1, 2));
    }
}
