//! What is in memory, and how it is mapped.

use std::{fs, ptr};

use crate::{
    Row,
    kit::{Area, Checkpoint, PAGE, Verdict, lacks, open, same, wait_until},
};

pub const ROWS: &[Row] = &[
    ("private_anon", private_anon),
    ("zero_and_holes", zero_and_holes),
    ("shared_anon", shared_anon),
    ("shared_anon_parts", shared_anon_parts),
    ("shared_file", shared_file),
    ("private_file", private_file),
    ("deleted_file_mapping", deleted_file_mapping),
    ("memfd_mapping", memfd_mapping),
    ("sysv_shm", sysv_shm),
    ("mlocked", mlocked),
    ("madvised", madvised),
    ("prot_none", prot_none),
    ("growing_stack", growing_stack),
    ("brk_heap", brk_heap),
    ("cow_tree", cow_tree),
    ("guard_pages", guard_pages),
    ("mremapped", mremapped),
    ("huge_pages", huge_pages),
    ("many_areas", many_areas),
    ("vdso", vdso),
    ("protection_keys", protection_keys),
    ("droppable", droppable),
    ("vast", vast),
];

fn private_anon(checkpoint: &Checkpoint) -> Verdict {
    let plain = Area::private(64)?;
    plain.fill(1);
    let read_only = Area::private(8)?;
    read_only.fill(2);
    read_only.protect(libc::PROT_READ)?;
    let code = Area::private(2)?;
    code.fill(3);
    // mov eax, 4711; ret
    for (at, byte) in [0xb8, 0x67, 0x12, 0, 0, 0xc3].into_iter().enumerate() {
        // SAFETY: the area is mapped and longer than that.
        unsafe { code.at.add(at).write(byte) };
    }
    code.protect(libc::PROT_READ | libc::PROT_EXEC)?;
    checkpoint.wait();
    plain.verify("plain area", 1)?;
    read_only.verify("read-only area", 2)?;
    code.page(1).get(0);
    // SAFETY: the bytes at the address are a function without arguments.
    let function: extern "C" fn() -> u32 = unsafe { std::mem::transmute(code.at) };
    same("value of the function in the code area", 4711, function())?;
    plain.fill(4);
    plain.verify("plain area, written again", 4)
}

fn zero_and_holes(checkpoint: &Checkpoint) -> Verdict {
    let sparse = Area::private(16384)?;
    for page in (0..sparse.pages()).step_by(7) {
        sparse.page(page).fill(page as u64);
    }
    let read_only_zeros = Area::private(256)?;
    read_only_zeros.verify_zero("zeros before")?;
    let written_zeros = Area::private(16)?;
    written_zeros.fill(5);
    for word in 0..written_zeros.bytes / 8 {
        written_zeros.set(word, 0);
    }
    let dropped = Area::private(16)?;
    dropped.fill(6);
    dropped.part(4, 8).advise(libc::MADV_DONTNEED)?;
    checkpoint.wait();
    for page in 0..sparse.pages() {
        if page.is_multiple_of(7) {
            sparse.page(page).verify("page with data", page as u64)?;
        } else {
            sparse.page(page).verify_zero("page in a hole")?;
        }
    }
    read_only_zeros.verify_zero("zeros that were read")?;
    written_zeros.verify_zero("zeros that were written")?;
    dropped.part(4, 8).verify_zero("dropped pages")?;
    let whole = Area::private(16)?;
    whole.fill(6);
    for word in (0..4 * PAGE / 8).chain(12 * PAGE / 8..16 * PAGE / 8) {
        same("word beside the dropped pages", whole.get(word), dropped.get(word))?;
    }
    Ok(())
}

fn shared_anon(checkpoint: &Checkpoint) -> Verdict {
    let object = Area::shared(32)?;
    object.part(0, 24).fill(1);
    let other = Area::shared(4)?;
    other.fill(2);
    let mut children = Vec::new();
    for number in 0..2_usize {
        children.push(checkpoint.fork(|child| {
            object.page(24 + number).fill(10 + number as u64);
            child.wait();
            object.part(0, 24).verify("shared object in a child", 1)?;
            object.page(24).verify("page of child 0", 10)?;
            object.page(25).verify("page of child 1", 11)?;
            object.set((30 + number) * PAGE / 8, 77);
            child.mark(&format!("written{number}"));
            wait_until("the parent's word", || other.get(0) == 99)
        })?);
    }
    checkpoint.wait();
    object.part(0, 24).verify("shared object", 1)?;
    object.page(24).verify("page of child 0", 10)?;
    for number in 0..2 {
        checkpoint.wait_mark(&format!("written{number}"))?;
        same("word of a child", 77, object.get((30 + number) * PAGE / 8))?;
    }
    object.part(26, 4).verify_zero("pages never written")?;
    other.set(0, 99);
    children.into_iter().try_for_each(super::kit::Child::join)
}

/// One object, mapped by different tasks in different parts at other places,
/// its writer gone.
fn shared_anon_parts(checkpoint: &Checkpoint) -> Verdict {
    let object = Area::shared(64)?;
    let writer = checkpoint.fork(|child| {
        object.part(40, 8).fill(3);
        child.announce();
        Ok(())
    })?;
    writer.join()?;
    object.part(0, 4).fill(1);
    let child = checkpoint.fork(|child| {
        object.part(0, 32).unmap()?;
        let at = sys!(mremap(
            object.part(32, 32).at.cast(),
            32 * PAGE,
            32 * PAGE,
            libc::MREMAP_MAYMOVE | libc::MREMAP_DONTUNMAP
        ));
        // Old kernels move only private memory like that.
        let upper = match at {
            Ok(at) => Area { at: at.cast(), bytes: 32 * PAGE },
            Err(_) => object.part(32, 32),
        };
        child.wait();
        upper.part(8, 8).verify("upper half in the child", 3)?;
        upper.set(20 * PAGE / 8, 4);
        child.mark("upper");
        Ok(())
    })?;
    let tail = object.part(60, 4);
    tail.fill(9);
    object.part(48, 12).unmap()?;
    checkpoint.wait();
    object.part(0, 4).verify("lower end", 1)?;
    object.part(4, 36).verify_zero("pages never written")?;
    object.part(40, 8).verify("pages of a writer that has gone", 3)?;
    tail.verify("tail", 9)?;
    checkpoint.wait_mark("upper")?;
    child.join()
}

fn shared_file(checkpoint: &Checkpoint) -> Verdict {
    let path = checkpoint.path("file");
    fs::write(&path, vec![0; 16 * PAGE]).map_err(|error| error.to_string())?;
    let fd = open(&checkpoint.c_path("file"), libc::O_RDWR)?;
    let area = Area::of_file(16, fd, libc::MAP_SHARED)?;
    let at = sys!(mmap(
        ptr::null_mut(),
        4 * PAGE,
        libc::PROT_READ,
        libc::MAP_SHARED,
        fd,
        8 * PAGE as i64
    ))?;
    let upper = Area { at: at.cast(), bytes: 4 * PAGE };
    sys!(close(fd))?;
    area.fill(1);
    checkpoint.wait();
    area.verify("file mapping", 1)?;
    same("word through the second mapping", area.get(8 * PAGE / 8), upper.get(0))?;
    area.set(8 * PAGE / 8, 5);
    same("word through the second mapping, written again", 5, upper.get(0))?;
    sys!(msync(area.at.cast(), area.bytes, libc::MS_SYNC))?;
    let bytes = fs::read(&path).map_err(|error| error.to_string())?;
    same("word in the file", &5_u64.to_le_bytes()[..], &bytes[8 * PAGE..8 * PAGE + 8])
}

fn private_file(checkpoint: &Checkpoint) -> Verdict {
    let path = checkpoint.path("file");
    fs::write(&path, vec![7; 16 * PAGE]).map_err(|error| error.to_string())?;
    let fd = open(&checkpoint.c_path("file"), libc::O_RDWR)?;
    let area = Area::of_file(16, fd, libc::MAP_PRIVATE)?;
    sys!(close(fd))?;
    area.part(3, 2).fill(1);
    area.page(15).fill(2);
    area.page(7).clear();
    checkpoint.wait();
    area.page(7).verify_zero("page of zeros over the file")?;
    area.part(3, 2).verify("changed pages", 1)?;
    area.page(15).verify("changed last page", 2)?;
    for word in (0..3 * PAGE / 8).chain(8 * PAGE / 8..15 * PAGE / 8) {
        same("word of the file", 0x0707_0707_0707_0707, area.get(word))?;
    }
    let bytes = fs::read(&path).map_err(|error| error.to_string())?;
    ensure!(bytes.iter().all(|byte| *byte == 7), "the file has changed");
    // What is not ours yet still follows the file.
    fs::write(&path, vec![8; 16 * PAGE]).map_err(|error| error.to_string())?;
    same("word of the changed file", 0x0808_0808_0808_0808, area.get(10 * PAGE / 8))
}

fn deleted_file_mapping(checkpoint: &Checkpoint) -> Verdict {
    let path = checkpoint.path("file");
    fs::write(&path, vec![7; 8 * PAGE]).map_err(|error| error.to_string())?;
    let fd = open(&checkpoint.c_path("file"), libc::O_RDWR)?;
    let shared = Area::of_file(8, fd, libc::MAP_SHARED)?;
    let private = Area::of_file(8, fd, libc::MAP_PRIVATE)?;
    sys!(close(fd))?;
    private.page(2).fill(2);
    shared.page(1).fill(1);
    fs::remove_file(&path).map_err(|error| error.to_string())?;
    checkpoint.wait();
    shared.page(1).verify("page of a deleted file", 1)?;
    private.page(1).verify("page of a deleted file, private", 1)?;
    private.page(2).verify("changed page over a deleted file", 2)?;
    same("page never written", 0x0707_0707_0707_0707, shared.get(5 * PAGE / 8))?;
    shared.set(6 * PAGE / 8, 5);
    same("the same object", 5, private.get(6 * PAGE / 8))?;
    ensure!(!path.exists(), "the deleted file has come back");
    Ok(())
}

fn memfd_mapping(checkpoint: &Checkpoint) -> Verdict {
    let fd = sys!(memfd_create(c"a memory".as_ptr(), libc::MFD_ALLOW_SEALING | libc::MFD_CLOEXEC))?;
    sys!(ftruncate(fd, 16 * PAGE as i64))?;
    let area = Area::of_file(16, fd, libc::MAP_SHARED)?;
    area.part(2, 8).fill(1);
    let own = Area::of_file(16, fd, libc::MAP_PRIVATE)?;
    own.page(3).clear();
    let seals = libc::F_SEAL_GROW | libc::F_SEAL_SHRINK;
    sys!(fcntl(fd, libc::F_ADD_SEALS, seals))?;
    let unmapped = sys!(memfd_create(c"unmapped".as_ptr(), libc::MFD_ALLOW_SEALING))?;
    sys!(write(unmapped, b"some bytes".as_ptr().cast(), 10))?;
    sys!(fcntl(unmapped, libc::F_ADD_SEALS, libc::F_SEAL_WRITE | libc::F_SEAL_SEAL))?;
    // Mapped, and its descriptor closed.
    let closed = sys!(memfd_create(c"closed".as_ptr(), 0))?;
    sys!(ftruncate(closed, 4 * PAGE as i64))?;
    let nameless = Area::of_file(4, closed, libc::MAP_SHARED)?;
    nameless.fill(4);
    sys!(close(closed))?;
    let child = checkpoint.fork(|child| {
        child.wait();
        area.part(2, 8).verify("memfd in a child", 1)?;
        area.set(0, 6);
        child.mark("written");
        nameless.verify("memfd without descriptor in a child", 4)
    })?;
    checkpoint.wait();
    area.part(2, 8).verify("memfd", 1)?;
    own.page(3).verify_zero("page of zeros over the memfd")?;
    same("word of the memfd, mapped privately", area.get(4 * PAGE / 8), own.get(4 * PAGE / 8))?;
    nameless.verify("memfd without descriptor", 4)?;
    checkpoint.wait_mark("written")?;
    same("word of the child", 6, area.get(0))?;
    same("seals", seals, sys!(fcntl(fd, libc::F_GET_SEALS))?)?;
    same("close-on-exec", libc::FD_CLOEXEC, sys!(fcntl(fd, libc::F_GETFD))?)?;
    let mut word = 0_u64;
    sys!(pread(fd, (&raw mut word).cast(), 8, 0))?;
    same("word by pread", 6, word)?;
    ensure!(sys!(ftruncate(fd, 0)).is_err(), "a sealed memfd was truncated");
    let found = sys!(fcntl(unmapped, libc::F_GET_SEALS))?;
    same("seals of the other", libc::F_SEAL_WRITE | libc::F_SEAL_SEAL, found)?;
    same("offset of the other", 10, sys!(lseek(unmapped, 0, libc::SEEK_CUR))?)?;
    let mut bytes = [0; 10];
    sys!(pread(unmapped, bytes.as_mut_ptr().cast(), 10, 0))?;
    same("bytes of the other", b"some bytes", &bytes)?;
    child.join()
}

fn sysv_shm(checkpoint: &Checkpoint) -> Verdict {
    // A private key in this IPC namespace; removed when the last process detaches it.
    let id = sys!(shmget(libc::IPC_PRIVATE, 8 * PAGE, 0o600 | libc::IPC_CREAT))?;
    let at = sys!(shmat(id, ptr::null(), 0))?;
    let area = Area { at: at.cast(), bytes: 8 * PAGE };
    area.fill(1);
    let child = checkpoint.fork(|child| {
        child.wait();
        area.verify("segment in a child", 1)?;
        area.set(0, 5);
        child.mark("written");
        Ok(())
    })?;
    checkpoint.wait();
    checkpoint.wait_mark("written")?;
    same("word of the child", 5, area.get(0))?;
    child.join()?;
    sys!(shmdt(area.at.cast()))?;
    let _ = sys!(shmctl(id, libc::IPC_RMID, ptr::null_mut()));
    Ok(())
}

/// Returns the flags the kernel shows for the mapping at an address.
pub fn flags_of(area: Area) -> Result<Vec<String>, String> {
    let text = fs::read_to_string("/proc/self/smaps").map_err(|error| error.to_string())?;
    let begin = format!("{:x}-", area.at.addr());
    let mut lines = text.lines().skip_while(|line| !line.starts_with(&begin));
    let flags = lines.find_map(|line| line.strip_prefix("VmFlags:"));
    let flags = flags.ok_or(format!("no mapping begins at {begin}"))?;
    // Soft-dirty bits and write protection are the tracker's, not the program's.
    Ok(flags
        .split_whitespace()
        .filter(|flag| !["sd", "uw"].contains(flag))
        .map(str::to_owned)
        .collect())
}

fn mlocked(checkpoint: &Checkpoint) -> Verdict {
    let area = Area::apart(8)?;
    area.fill(1);
    sys!(mlock(area.at.cast(), area.bytes))?;
    let lazy = Area::apart(8)?;
    lazy.page(0).fill(2);
    sys!(mlock2(lazy.at.cast(), lazy.bytes, libc::MLOCK_ONFAULT))?;
    let before = (flags_of(area)?, flags_of(lazy)?);
    checkpoint.wait();
    area.verify("locked area", 1)?;
    lazy.page(0).verify("area locked on fault", 2)?;
    ensure!(before.0.iter().any(|flag| flag == "lo"), "mlock does nothing here");
    same("flags", before, (flags_of(area)?, flags_of(lazy)?))
}

fn madvised(checkpoint: &Checkpoint) -> Verdict {
    let advices = [
        libc::MADV_DONTFORK,
        libc::MADV_MERGEABLE,
        libc::MADV_HUGEPAGE,
        libc::MADV_NOHUGEPAGE,
        libc::MADV_DONTDUMP,
        libc::MADV_WIPEONFORK,
        libc::MADV_RANDOM,
        libc::MADV_SEQUENTIAL,
    ];
    let mut areas = Vec::new();
    for (number, advice) in advices.into_iter().enumerate() {
        let area = Area::apart(8)?;
        area.fill(number as u64);
        // The kernel may be built without one or the other.
        if area.advise(advice).is_ok() {
            areas.push((advice, number as u64, area, flags_of(area)?));
        }
    }
    ensure!(areas.len() >= 6, "only {} advices are known here", areas.len());
    checkpoint.wait();
    for (advice, seed, area, flags) in areas {
        area.verify(&format!("area with advice {advice}"), seed)?;
        same(&format!("flags after advice {advice}"), flags, flags_of(area)?)?;
    }
    Ok(())
}

fn prot_none(checkpoint: &Checkpoint) -> Verdict {
    let private = Area::private(8)?;
    private.fill(1);
    private.part(2, 3).protect(libc::PROT_NONE)?;
    let write_only = Area::private(4)?;
    write_only.fill(2);
    write_only.protect(libc::PROT_WRITE)?;
    let shared = Area::shared(4)?;
    shared.fill(3);
    shared.protect(libc::PROT_NONE)?;
    checkpoint.wait();
    ensure!(faults(private.page(2)), "an area without access can be read");
    ensure!(faults(shared), "a shared area without access can be read");
    for area in [private, write_only, shared] {
        area.protect(libc::PROT_READ | libc::PROT_WRITE)?;
    }
    private.verify("area that had no access", 1)?;
    write_only.verify("area that could be written", 2)?;
    shared.verify("shared area that had no access", 3)
}

/// Whether the kernel cannot read at an area on behalf of the program.
fn faults(area: Area) -> bool {
    sys!(access(area.at.cast(), libc::F_OK)).is_err()
        && std::io::Error::last_os_error().raw_os_error() == Some(libc::EFAULT)
}

fn growing_stack(checkpoint: &Checkpoint) -> Verdict {
    #[inline(never)]
    fn deep(level: u32) -> u64 {
        let mut frame = [u64::from(level); 512];
        std::hint::black_box(&mut frame);
        let below = if level == 0 { 0 } else { deep(level - 1) };
        below + frame[std::hint::black_box(511)]
    }
    // An own mapping that grows down, with room below it: the kernel wants 256 pages to
    // stay free between it and whatever is there (`stack_guard_gap`).
    let room = Area::private(512)?;
    room.unmap()?;
    let at = room.part(504, 8).at;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_GROWSDOWN | libc::MAP_FIXED;
    sys!(mmap(at.cast(), 8 * PAGE, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0))?;
    let own = room.part(504, 8);
    own.fill(1);
    let grown = room.part(500, 4);
    for page in (0..4).rev() {
        grown.page(page).fill(2);
    }
    let sum = (0..=200_u64).sum::<u64>();
    same("sum before", sum, deep(200))?;
    checkpoint.wait();
    own.verify("top of the stack", 1)?;
    for page in 0..4 {
        grown.page(page).verify("grown part of the stack", 2)?;
    }
    for page in (490..500).rev() {
        room.page(page).fill(3);
    }
    for page in 490..500 {
        room.page(page).verify("stack grown afterwards", 3)?;
    }
    // Four MiB: further down than the stack has been.
    same("sum after", (0..=1000_u64).sum::<u64>(), deep(1000))
}

fn brk_heap(checkpoint: &Checkpoint) -> Verdict {
    let begin = sys!(sbrk(0))?;
    sys!(sbrk(40 * PAGE as isize))?;
    let heap = Area { at: begin.cast(), bytes: 40 * PAGE };
    heap.fill(1);
    let end = sys!(sbrk(0))?;
    checkpoint.wait();
    same("end of the heap", end, sys!(sbrk(0))?)?;
    heap.verify("heap", 1)?;
    sys!(sbrk(100 * PAGE as isize))?;
    let more = Area { at: end.cast(), bytes: 100 * PAGE };
    more.verify_zero("new part of the heap")?;
    more.fill(2);
    more.verify("new part of the heap", 2)?;
    heap.verify("heap, grown", 1)?;
    sys!(sbrk(-100 * PAGE as isize))?;
    same("end of the shrunk heap", end, sys!(sbrk(0))?)
}

/// Three children that share most of 64 MiB with their parent by fork.
///
/// The test compares the proportional set size of the tree.
fn cow_tree(checkpoint: &Checkpoint) -> Verdict {
    const PAGES: usize = 16384;
    let area = Area::private(PAGES)?;
    for page in 0..PAGES {
        area.page(page).fill(page as u64);
    }
    let verify = |area: Area, changed: Option<usize>| -> Verdict {
        for page in 0..PAGES {
            let own = changed.is_some_and(|first| (first..first + 256).contains(&page));
            let seed = if own { page + 1_000_000 } else { page };
            area.page(page).verify(&format!("page {page} (changed {changed:?})"), seed as u64)?;
        }
        Ok(())
    };
    let mut children = Vec::new();
    for number in 0..3_usize {
        let first = 1000 * (number + 1);
        children.push(checkpoint.fork(|child| {
            for page in first..first + 256 {
                area.page(page).fill((page + 1_000_000) as u64);
            }
            child.wait();
            verify(area, Some(first))?;
            area.page(5).fill(number as u64);
            area.page(5).verify("own page", number as u64)
        })?);
    }
    checkpoint.wait();
    verify(area, None)?;
    area.page(6).fill(3);
    children.into_iter().try_for_each(super::kit::Child::join)?;
    area.page(5).verify("page that children wrote", 5)
}

/// Four GiB without a page like another.
pub fn four_gib(checkpoint: &Checkpoint) -> Verdict {
    let private = Area::private(3 << 18)?;
    private.fill(1);
    let shared = Area::shared(1 << 18)?;
    shared.fill(2);
    checkpoint.wait();
    private.verify("private memory", 1)?;
    shared.verify("shared memory", 2)
}

fn guard_pages(checkpoint: &Checkpoint) -> Verdict {
    const MADV_GUARD_INSTALL: i32 = 102; // uapi/asm-generic/mman-common.h, 6.13
    let area = Area::private(16)?;
    area.fill(1);
    let guard = area.part(4, 2);
    if guard.advise(MADV_GUARD_INSTALL).is_err() {
        return lacks("a kernel with guard pages (Linux 6.13)");
    }
    checkpoint.wait();
    let whole = Area::private(16)?;
    whole.fill(1);
    for word in (0..4 * PAGE / 8).chain(6 * PAGE / 8..16 * PAGE / 8) {
        same("word beside the guard", whole.get(word), area.get(word))?;
    }
    for page in 0..2 {
        ensure!(faults(guard.page(page)), "guard page {page} can be read");
    }
    Ok(())
}

fn mremapped(checkpoint: &Checkpoint) -> Verdict {
    let moved = Area::private(8)?;
    moved.fill(1);
    let target = Area::private(32)?;
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    let at = target.part(8, 8).at;
    sys!(mremap(moved.at.cast(), moved.bytes, 8 * PAGE, flags, at))?;
    let grown = Area::private(4)?;
    grown.fill(2);
    let at = sys!(mremap(grown.at.cast(), grown.bytes, 64 * PAGE, libc::MREMAP_MAYMOVE))?;
    let grown = Area { at: at.cast(), bytes: 64 * PAGE };
    // Two halves, exchanged.
    let halves = Area::private(8)?;
    halves.part(0, 4).fill(3);
    halves.part(4, 4).fill(4);
    let spare = Area::private(4)?;
    sys!(mremap(halves.at.cast(), 4 * PAGE, 4 * PAGE, flags, spare.at))?;
    sys!(mremap(halves.part(4, 4).at.cast(), 4 * PAGE, 4 * PAGE, flags, halves.at))?;
    sys!(mremap(spare.at.cast(), 4 * PAGE, 4 * PAGE, flags, halves.part(4, 4).at))?;
    checkpoint.wait();
    target.part(8, 8).verify("moved area", 1)?;
    target.part(0, 8).verify_zero("below the moved area")?;
    grown.part(0, 4).verify("grown area", 2)?;
    grown.part(4, 60).verify_zero("new part of the grown area")?;
    halves.part(0, 4).verify("lower half", 4)?;
    halves.part(4, 4).verify("upper half", 3)
}

fn huge_pages(checkpoint: &Checkpoint) -> Verdict {
    let area = Area::private(4096)?;
    area.advise(libc::MADV_HUGEPAGE)?;
    for page in (0..area.pages()).step_by(3) {
        area.page(page).fill(page as u64);
    }
    checkpoint.wait();
    for page in 0..area.pages() {
        if page.is_multiple_of(3) {
            area.page(page).verify("page with data", page as u64)?;
        } else {
            area.page(page).verify_zero("page without")?;
        }
    }
    Ok(())
}

fn many_areas(checkpoint: &Checkpoint) -> Verdict {
    let area = Area::private(4000)?;
    for page in 0..area.pages() {
        area.page(page).fill(page as u64);
        let protection = match page % 4 {
            0 => libc::PROT_READ,
            1 => libc::PROT_READ | libc::PROT_WRITE,
            2 => libc::PROT_READ | libc::PROT_EXEC,
            _ => continue,
        };
        area.page(page).protect(protection)?;
    }
    for page in (3..area.pages()).step_by(4) {
        area.page(page).unmap()?;
    }
    checkpoint.wait();
    for page in (0..area.pages()).filter(|page| page % 4 != 3) {
        area.page(page).verify(&format!("page {page}"), page as u64)?;
    }
    Ok(())
}

fn vdso(checkpoint: &Checkpoint) -> Verdict {
    let times = || -> Result<[i64; 4], String> {
        let clocks =
            [libc::CLOCK_REALTIME, libc::CLOCK_MONOTONIC, libc::CLOCK_BOOTTIME, libc::CLOCK_TAI];
        let mut nanoseconds = [0; 4];
        for (clock, ns) in clocks.into_iter().zip(&mut nanoseconds) {
            let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
            sys!(clock_gettime(clock, &raw mut time))?;
            *ns = time.tv_sec * 1_000_000_000 + time.tv_nsec;
        }
        Ok(nanoseconds)
    };
    let address = || {
        // SAFETY: getauxval has no preconditions.
        unsafe { libc::getauxval(libc::AT_SYSINFO_EHDR) }
    };
    let (begin, vdso) = (times()?, address());
    checkpoint.wait();
    same("address of the vdso", vdso, address())?;
    for _ in 0..1000 {
        for (before, after) in begin.into_iter().zip(times()?) {
            let passed = after - before;
            ensure!((0..600_000_000_000).contains(&passed), "{passed} ns have passed");
        }
    }
    // SAFETY: the pointer may be null; sched_getcpu has no preconditions.
    let (seconds, cpu) = unsafe { (libc::time(ptr::null_mut()), libc::sched_getcpu()) };
    ensure!(cpu >= 0, "no processor");
    let (vdso, system) = (seconds, times()?[0] / 1_000_000_000);
    ensure!((system - 1..=system + 1).contains(&vdso), "time {vdso} against {system}");
    Ok(())
}

/// Memory of which each thread says by itself whether it may be written.
fn protection_keys(checkpoint: &Checkpoint) -> Verdict {
    let area = Area::private(8)?;
    area.fill(1);
    let disable_write = 2;
    let Ok(key) = sys!(syscall(libc::SYS_pkey_alloc, 0, disable_write)) else {
        return lacks("a processor with protection keys (ospke in /proc/cpuinfo)");
    };
    let both = libc::PROT_READ | libc::PROT_WRITE;
    sys!(syscall(libc::SYS_pkey_mprotect, area.at, area.bytes, both, key))?;
    checkpoint.wait();
    area.verify("memory with a key", 1)
}

/// Memory that the kernel may take back, and that comes back as zeros.
fn droppable(checkpoint: &Checkpoint) -> Verdict {
    let flags = libc::MAP_DROPPABLE | libc::MAP_ANONYMOUS;
    let Ok(area) = Area::map(8, libc::PROT_READ | libc::PROT_WRITE, flags, -1) else {
        return lacks("a kernel with droppable memory (Linux 6.11)");
    };
    area.fill(1);
    let before = flags_of(area)?;
    ensure!(before.iter().any(|flag| flag == "dp"), "the kernel does not show it");
    let child = checkpoint.fork(|child| {
        child.wait();
        area.verify_zero("droppable memory in the child")
    })?;
    checkpoint.wait();
    same("flags", before, flags_of(area)?)?;
    for page in 0..area.pages() {
        let words = (page * PAGE / 8..(page + 1) * PAGE / 8).map(|word| area.get(word));
        let zeros = words.filter(|word| *word == 0).count();
        ensure!(zeros == 0 || zeros == PAGE / 8, "page {page} was dropped in part");
    }
    area.fill(2);
    area.verify("droppable memory, written again", 2)?;
    child.join()
}

/// Mappings that are larger than the machine's memory, with little in them.
fn vast(checkpoint: &Checkpoint) -> Verdict {
    const PAGES: usize = (1 << 40) / PAGE;
    let map = |sharing| {
        let flags = sharing | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        Area::map(PAGES, libc::PROT_READ | libc::PROT_WRITE, flags, -1)
    };
    let (private, shared) = (map(libc::MAP_PRIVATE)?, map(libc::MAP_SHARED)?);
    let places = [0, 1, 77_777, PAGES / 2, PAGES - 1];
    for (area, seed) in [(private, 1), (shared, 2)] {
        places.iter().for_each(|page| area.page(*page).fill(seed));
    }
    checkpoint.wait();
    for (area, seed) in [(private, 1), (shared, 2)] {
        for page in places {
            area.page(page).verify("page of a vast mapping", seed)?;
        }
        area.page(2).verify_zero("page never written")?;
    }
    Ok(())
}
