//! Processes and threads by their numbers, which are others in each pid namespace.

use std::fmt;

/// A process, thread, group or session by its number in the pid namespace of this program:
/// what the kernel tells this program, and takes from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct HostPid(pub i32);

impl fmt::Display for HostPid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A process, thread, group or session by its number in the pid namespace of its tree: what
/// images say, and what the processes of the tree pass to system calls.
///
/// Only a [`PidMap`] tells which [`HostPid`] it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NsPid(i32);

impl NsPid {
    /// What the kernel shows of a process that is outside of the namespace, and images of
    /// one that there is not.
    pub const NONE: Self = Self(0);

    /// Returns the process of a number in an image, where some fields are signed. A number
    /// that no process can have is -1.
    pub fn of_image(number: impl TryInto<i32>) -> Self {
        Self(number.try_into().unwrap_or(-1))
    }

    /// Returns the number as images have it. A process that there is not is 0.
    pub const fn image(self) -> u32 {
        if self.0 < 0 { 0 } else { self.0.cast_unsigned() }
    }

    /// Returns the number as the kernel takes it from a process of the tree.
    pub const fn raw(self) -> i32 {
        self.0
    }
}

impl fmt::Display for NsPid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Which numbers in the images of a tree are which processes here.
///
/// A tree lives in the pid namespace of this program so far, so that both have the same
/// numbers, and so has what is outside of the tree.
#[derive(Clone, Debug)]
pub struct PidMap(());

impl PidMap {
    /// Returns the map of a tree in the pid namespace of this program.
    pub const fn of_own_namespace() -> Self {
        Self(())
    }

    /// Returns the number in the images for a number that the kernel told this program.
    pub const fn ns(&self, pid: HostPid) -> NsPid {
        NsPid(pid.0)
    }

    /// Returns the number here for a number of the images.
    pub const fn host(&self, pid: NsPid) -> HostPid {
        HostPid(pid.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_images_are_read_from_signed_and_unsigned_fields() {
        assert_eq!(NsPid::of_image(7_u32), NsPid::of_image(7_i32));
        assert_eq!(NsPid::of_image(u32::MAX).raw(), -1);
        assert_eq!(NsPid::of_image(u32::MAX).image(), 0);
        let pids = PidMap::of_own_namespace();
        assert_eq!(pids.host(pids.ns(HostPid(7))), HostPid(7));
    }
}
