//! The two-letter codes in the line `VmFlags:` of `smaps`.

use std::{fmt, ops};

use super::text;

/// The flags of a mapping: a set of codes of `show_smap_vma_flags` (`fs/proc/task_mmu.c`). The
/// numbers of the bits are rcriu's own.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct VmFlags(u64);

/// Defines a constant for each code, in the order of [`CODES`]. The position there is the number of
/// the bit.
macro_rules! vm_flags {
    ($($bit:literal $name:ident $code:literal $doc:literal;)*) => {
        impl VmFlags {
            $(
                #[doc = concat!("`", $code, "`: ", $doc, ".")]
                pub const $name: Self = Self(1 << $bit);
            )*
        }

        /// Each bit with its code.
        const CODES: &[(u32, &[u8; 2])] = &[$(($bit, as_code($code)),)*];
    };
}

/// Returns the two bytes of a code.
const fn as_code(code: &str) -> &[u8; 2] {
    match code.as_bytes().first_chunk() {
        Some(bytes) if code.len() == 2 => bytes,
        _ => panic!("codes have two letters"),
    }
}

vm_flags! {
    0 READ "rd" "may be read";
    1 WRITE "wr" "may be written";
    2 EXEC "ex" "may be executed";
    3 SHARED "sh" "is shared";
    4 MAY_READ "mr" "may be made readable";
    5 MAY_WRITE "mw" "may be made writable";
    6 MAY_EXEC "me" "may be made executable";
    7 MAY_SHARE "ms" "may be shared";
    8 GROWS_DOWN "gd" "grows downwards, like a stack";
    9 PFN_MAP "pf" "maps page frames without `struct page`";
    10 LOCKED "lo" "is locked in memory";
    11 IO "io" "maps device memory";
    12 SEQ_READ "sr" "is read sequentially (`MADV_SEQUENTIAL`)";
    13 RAND_READ "rr" "is read in random order (`MADV_RANDOM`)";
    14 DONT_COPY "dc" "is not inherited by children (`MADV_DONTFORK`)";
    15 DONT_EXPAND "de" "cannot grow by `mremap`";
    16 ACCOUNT "ac" "counts as committed memory";
    17 NO_RESERVE "nr" "has no swap space reserved (`MAP_NORESERVE`)";
    18 HUGE_TLB "ht" "uses pages of hugetlbfs";
    19 SYNC "sf" "has synchronous page faults (`MAP_SYNC`)";
    20 NON_LINEAR "nl" "is nonlinear; until Linux 3.19";
    21 ARCH_1 "ar" "has an architecture-specific flag";
    22 WIPE_ON_FORK "wf" "is zeroed in children (`MADV_WIPEONFORK`)";
    23 DONT_DUMP "dd" "is not in core dumps (`MADV_DONTDUMP`)";
    24 SOFT_DIRTY "sd" "is new since soft-dirty tracking was reset";
    25 MIXED_MAP "mm" "maps page frames with and without `struct page`";
    26 HUGE_PAGE "hg" "should have huge pages (`MADV_HUGEPAGE`)";
    27 NO_HUGE_PAGE "nh" "should have no huge pages (`MADV_NOHUGEPAGE`)";
    28 MERGEABLE "mg" "may have equal pages merged (`MADV_MERGEABLE`)";
    29 UFFD_MISSING "um" "reports missing pages to userfaultfd";
    30 UFFD_WP "uw" "reports writes to protected pages to userfaultfd";
    31 UFFD_MINOR "ui" "reports minor faults to userfaultfd; since Linux 5.13";
    32 BTI "bt" "has branch target identification; arm64";
    33 MTE "mt" "has memory tags; arm64";
    34 SHADOW_STACK "ss" "is a shadow stack; since Linux 6.6";
    35 SEALED "sl" "is sealed (`mseal`); since Linux 6.10";
    36 LOCK_ON_FAULT "lf" "has pages locked when touched (`MLOCK_ONFAULT`)";
    37 DROPPABLE "dp" "may lose its pages (`MAP_DROPPABLE`); since Linux 6.11";
    38 MPX "mp" "holds MPX bounds; until Linux 5.5";
    39 DENY_WRITE "dw" "denies writing to its file; until Linux 5.15";
    40 GUARD "gu" "may have guard regions (`MADV_GUARD_INSTALL`); since Linux 6.19";
    41 UFFD_RWP "ur" "reports accesses to protected pages to userfaultfd; after Linux 6.19";
}

impl VmFlags {
    /// A code that is not in this list.
    pub const UNKNOWN: Self = Self(1 << 63);

    /// Whether the set has all of `flags`.
    #[must_use]
    pub const fn contains(self, flags: Self) -> bool {
        self.0 & flags.0 == flags.0
    }

    /// Whether the set has any of `flags`.
    #[must_use]
    pub const fn intersects(self, flags: Self) -> bool {
        self.0 & flags.0 != 0
    }

    /// Returns the union of two sets.
    #[must_use]
    pub const fn union(self, flags: Self) -> Self {
        Self(self.0 | flags.0)
    }

    /// Whether the set is empty, as it is for mappings read from `maps`.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Parses codes separated by blanks.
    pub(super) fn parse(codes: &[u8]) -> Self {
        text::words(codes).fold(Self::default(), |flags, code| flags.union(Self::of_code(code)))
    }

    fn of_code(code: &[u8]) -> Self {
        CODES
            .iter()
            .find(|(_, known)| known.as_slice() == code)
            .map_or(Self::UNKNOWN, |(bit, _)| Self(1 << bit))
    }
}

impl ops::BitOr for VmFlags {
    type Output = Self;

    fn bitor(self, flags: Self) -> Self {
        self.union(flags)
    }
}

impl fmt::Display for VmFlags {
    /// Writes the codes as the kernel does, and `??` for unknown ones.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let known = CODES.iter().filter(|(bit, _)| self.intersects(Self(1 << bit)));
        let codes = known.map(|(_, code)| String::from_utf8_lossy(code.as_slice()));
        let unknown = self.contains(Self::UNKNOWN).then_some("??".into());
        f.write_str(&codes.chain(unknown).collect::<Vec<_>>().join(" "))
    }
}

impl fmt::Debug for VmFlags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VmFlags({self})")
    }
}
