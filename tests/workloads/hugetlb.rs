//! Huge pages that a program asked for by name (`MAP_HUGETLB`).

use std::ptr;

use crate::{
    Row,
    kit::{Area, Checkpoint, PAGE, Verdict, same},
};

pub const ROWS: &[Row] = &[
    ("hugetlb_private", hugetlb_private),
    ("hugetlb_shared", hugetlb_shared),
    ("hugetlb_memfd", hugetlb_memfd),
    ("hugetlb_sysv", hugetlb_sysv),
];

/// Small pages in a huge one of 2 MiB.
const HUGE: usize = 512;

/// Small pages that are written of a huge one.
const SOME: usize = 40;

const TWO_MIB: i32 = libc::MAP_HUGE_2MB;

fn map(huge_pages: usize, share: i32) -> Result<Area, String> {
    let flags = share | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB | TWO_MIB;
    Area::map(huge_pages * HUGE, libc::PROT_READ | libc::PROT_WRITE, flags, -1)
}

/// Whether the kernel has huge pages where an area begins.
fn is_huge(area: Area) -> Result<bool, String> {
    Ok(super::memory::flags_of(area)?.iter().any(|flag| flag == "ht"))
}

fn hugetlb_private(checkpoint: &Checkpoint) -> Verdict {
    let area = map(5, libc::MAP_PRIVATE)?;
    area.part(0, SOME).fill(1);
    area.part(2 * HUGE + 7, 1).fill(2);
    area.part(4 * HUGE, SOME).fill(3);
    area.part(4 * HUGE, HUGE).protect(libc::PROT_READ)?;
    let child = checkpoint.fork(|child| {
        // One huge page is its own by now, with a part that it has cleared, one is its
        // parent's, and one it has lost.
        area.set(0, 5);
        area.page(3).clear();
        area.part(2 * HUGE, HUGE).advise(libc::MADV_DONTNEED)?;
        child.wait();
        same("word of the child", 5, area.get(0))?;
        area.page(3).verify_zero("cleared page")?;
        ensure!(area.get(1) != 0, "the child has lost what it shares with its parent");
        area.part(2 * HUGE, SOME).verify_zero("dropped pages")?;
        area.part(4 * HUGE, SOME).verify("inherited pages", 3)
    })?;
    checkpoint.wait();
    area.part(0, SOME).verify("first huge page", 1)?;
    area.part(2 * HUGE, 7).verify_zero("below a written page")?;
    area.page(2 * HUGE + 7).verify("written page", 2)?;
    area.part(4 * HUGE, SOME).verify("read-only huge page", 3)?;
    same("huge pages", true, is_huge(area)?)?;
    area.part(HUGE, SOME).verify_zero("huge page never written")?;
    area.part(HUGE, SOME).fill(4);
    area.part(HUGE, SOME).verify("huge page written last", 4)?;
    child.join()
}

fn hugetlb_shared(checkpoint: &Checkpoint) -> Verdict {
    let object = map(4, libc::MAP_SHARED)?;
    object.part(0, SOME).fill(1);
    object.page(3 * HUGE + 9).fill(2);
    let child = checkpoint.fork(|child| {
        object.part(0, 2 * HUGE).unmap()?;
        child.wait();
        object.page(3 * HUGE + 9).verify("object in the child", 2)?;
        object.set((3 * HUGE) * PAGE / 8, 7);
        child.mark("written");
        Ok(())
    })?;
    checkpoint.wait();
    object.part(0, SOME).verify("object", 1)?;
    object.part(HUGE, SOME).verify_zero("huge page never written")?;
    checkpoint.wait_mark("written")?;
    same("word of the child", 7, object.get(3 * HUGE * PAGE / 8))?;
    same("huge pages", true, is_huge(object)?)?;
    child.join()
}

fn hugetlb_memfd(checkpoint: &Checkpoint) -> Verdict {
    let flags = libc::MFD_HUGETLB | libc::MFD_HUGE_2MB | libc::MFD_ALLOW_SEALING;
    let fd = sys!(memfd_create(c"huge".as_ptr(), flags))?;
    sys!(ftruncate(fd, (4 * HUGE * PAGE) as i64))?;
    sys!(fcntl(fd, libc::F_ADD_SEALS, libc::F_SEAL_SHRINK))?;
    let shared = Area::of_file(4 * HUGE, fd, libc::MAP_SHARED)?;
    shared.part(HUGE, SOME).fill(1);
    let private = Area::of_file(4 * HUGE, fd, libc::MAP_PRIVATE)?;
    private.page(3 * HUGE).fill(2);
    private.page(HUGE).clear();
    // One that no process has mapped, and one without a descriptor.
    let unmapped = sys!(memfd_create(c"unmapped".as_ptr(), libc::MFD_HUGETLB))?;
    sys!(ftruncate(unmapped, (HUGE * PAGE) as i64))?;
    let window = Area::of_file(HUGE, unmapped, libc::MAP_SHARED)?;
    window.page(5).fill(3);
    window.unmap()?;
    let closed = sys!(memfd_create(c"closed".as_ptr(), libc::MFD_HUGETLB))?;
    sys!(ftruncate(closed, (HUGE * PAGE) as i64))?;
    let nameless = Area::of_file(HUGE, closed, libc::MAP_SHARED)?;
    nameless.fill(4);
    sys!(close(closed))?;
    checkpoint.wait();
    shared.part(HUGE, SOME).verify("memfd", 1)?;
    private.page(HUGE).verify_zero("page of its own that was cleared")?;
    let word = (HUGE + 1) * PAGE / 8;
    same("word of the memfd, mapped privately", shared.get(word), private.get(word))?;
    private.page(3 * HUGE).verify("page of its own", 2)?;
    shared.part(3 * HUGE, SOME).verify_zero("page below that")?;
    nameless.verify("memfd without descriptor", 4)?;
    same("seals", libc::F_SEAL_SHRINK, sys!(fcntl(fd, libc::F_GET_SEALS))?)?;
    let window = Area::of_file(HUGE, unmapped, libc::MAP_SHARED)?;
    window.page(5).verify("memfd that was not mapped", 3)?;
    window.part(6, 10).verify_zero("the rest of it")?;
    for area in [shared, private, window, nameless] {
        same("huge pages", true, is_huge(area)?)?;
    }
    Ok(())
}

fn hugetlb_sysv(checkpoint: &Checkpoint) -> Verdict {
    let flags = 0o600 | libc::IPC_CREAT | libc::SHM_HUGETLB | TWO_MIB;
    let id = sys!(shmget(libc::IPC_PRIVATE, 2 * HUGE * PAGE, flags))?;
    let at = sys!(shmat(id, ptr::null(), 0))?;
    let area = Area { at: at.cast(), bytes: 2 * HUGE * PAGE };
    // It is removed when the last process detaches it.
    sys!(shmctl(id, libc::IPC_RMID, ptr::null_mut()))?;
    area.part(HUGE, SOME).fill(1);
    let child = checkpoint.fork(|child| {
        child.wait();
        area.part(HUGE, SOME).verify("segment in the child", 1)?;
        area.set(0, 5);
        child.mark("written");
        Ok(())
    })?;
    checkpoint.wait();
    area.part(HUGE, SOME).verify("segment", 1)?;
    checkpoint.wait_mark("written")?;
    same("word of the child", 5, area.get(0))?;
    same("huge pages", true, is_huge(area)?)?;
    child.join()?;
    sys!(shmdt(area.at.cast())).map(drop)
}
