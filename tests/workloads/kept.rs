//! Memory that would cost more if a dump touched it in the wrong way.

use std::fs;

use crate::{
    Row,
    kit::{Area, Checkpoint, Child, PAGE, Verdict, wait_until},
};

/// They need something of the machine, or room, so that they are not in the list.
pub const ROWS: &[Row] = &[
    ("forks_share", forks_share),
    ("forks_share_huge", forks_share_huge),
    ("forks_share_hugetlb", forks_share_hugetlb),
    ("merged", merged),
    ("swapped_out", swapped_out),
    ("swapped_object", swapped_object),
    ("full_cgroup", full_cgroup),
];

/// Forks children that verify an area after the checkpoint, as the caller does.
fn shared_with(checkpoint: &Checkpoint, children: usize, verify: impl Fn() -> Verdict) -> Verdict {
    let fork = |_| {
        checkpoint.fork(|child| {
            child.wait();
            verify()
        })
    };
    let children = (0..children).map(fork).collect::<Result<Vec<_>, _>>()?;
    checkpoint.wait();
    verify()?;
    children.into_iter().try_for_each(Child::join)
}

/// 64 MiB that six children have not written.
fn forks_share(checkpoint: &Checkpoint) -> Verdict {
    let area = Area::private(16384)?;
    area.advise(libc::MADV_NOHUGEPAGE)?;
    area.fill(1);
    shared_with(checkpoint, 6, || area.verify("memory shared by forks", 1))
}

/// 64 MiB of transparent huge pages, whole ones of which a child has not written.
fn forks_share_huge(checkpoint: &Checkpoint) -> Verdict {
    let area = Area::private(16384)?;
    area.advise(libc::MADV_HUGEPAGE)?;
    area.fill(1);
    shared_with(checkpoint, 1, || area.verify("huge pages shared by forks", 1))
}

/// All the huge pages that the machine has, which a child has not written.
fn forks_share_hugetlb(checkpoint: &Checkpoint) -> Verdict {
    let path = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";
    let free = || fs::read_to_string(path).ok()?.trim().parse::<usize>().ok();
    let pages = free().ok_or("no huge pages")?;
    ensure!(pages > 0, "no huge page is free");
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB | libc::MAP_HUGE_2MB;
    let area = Area::map(pages * 512, libc::PROT_READ | libc::PROT_WRITE, flags, -1)?;
    area.fill(1);
    ensure!(free() == Some(0), "{:?} huge pages are free", free());
    shared_with(checkpoint, 1, || area.verify("huge pages shared by forks", 1))
}

/// 16 MiB of equal pages, which the kernel has merged.
fn merged(checkpoint: &Checkpoint) -> Verdict {
    let area = Area::private(4096)?;
    for page in 0..area.pages() {
        area.page(page).fill(1);
    }
    area.advise(libc::MADV_MERGEABLE)?;
    wait_until("the kernel to merge pages", || {
        let text = fs::read_to_string("/proc/self/ksm_stat").unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("ksm_merging_pages "));
        line.and_then(|count| count.trim().parse::<usize>().ok()) == Some(area.pages())
    })?;
    checkpoint.wait();
    (0..area.pages()).try_for_each(|page| area.page(page).verify("merged page", 1))
}

/// KiB of this process that are in swap, in shared memory as well.
fn swapped_kib() -> Option<usize> {
    let text = fs::read_to_string("/proc/self/smaps_rollup").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("Swap:"))?;
    line.trim().strip_suffix(" kB")?.parse().ok()
}

/// 8 MiB that are in swap, and 1 MiB beside it that is not.
fn swapped_out(checkpoint: &Checkpoint) -> Verdict {
    let area = Area::private(2048 + 256)?;
    area.advise(libc::MADV_NOHUGEPAGE)?;
    area.fill(1);
    wait_until("8 MiB to be in swap", || {
        area.part(0, 2048).advise(libc::MADV_PAGEOUT).is_ok() && swapped_kib() >= Some(8 << 10)
    })?;
    checkpoint.wait();
    area.verify("memory that was in swap", 1)
}

/// 8 MiB of shared memory that are in swap.
fn swapped_object(checkpoint: &Checkpoint) -> Verdict {
    let area = Area::shared(2048)?;
    area.fill(1);
    wait_until("8 MiB to be in swap", || {
        area.advise(libc::MADV_PAGEOUT).is_ok() && swapped_kib() >= Some(8 << 10)
    })?;
    checkpoint.wait();
    area.verify("memory that was in swap", 1)
}

/// As much memory as its memory cgroup allows; the file beside the status says how many
/// KiB that are.
fn full_cgroup(checkpoint: &Checkpoint) -> Verdict {
    let path = checkpoint.path("kib");
    let text = fs::read_to_string(path).map_err(|error| error.to_string())?;
    let kib: usize = text.trim().parse().map_err(|_| format!("{text}: no number"))?;
    let area = Area::private(kib * 1024 / PAGE)?;
    area.advise(libc::MADV_NOHUGEPAGE)?;
    // One page after another, until there is no room.
    let usage = checkpoint.path("usage");
    let left = || -> Option<usize> {
        fs::read_to_string(fs::read_to_string(&usage).ok()?).ok()?.trim().parse().ok()
    };
    let mut filled = 0;
    while filled < area.pages() && left().is_some_and(|used| used + 6 * PAGE < kib * 1024) {
        area.page(filled).fill(filled as u64);
        filled += 1;
    }
    checkpoint.wait();
    (0..filled).try_for_each(|page| area.page(page).verify("page", page as u64))
}
