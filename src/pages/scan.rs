//! Finds pages whose contents may not be in the images yet.

use std::{fs::File, io, os::unix::fs::MetadataExt};

use nix::{
    errno::Errno,
    unistd::{Whence, lseek},
};

use super::{Stretch, process::is_pinnable, stretch::marked};
use crate::{
    proc::{Mapping, VmFlags},
    sys::{
        pagemap::{PagemapFile, Query, category},
        swap,
    },
    track::{self, Told, Watch},
    units::{BLOCK_BYTES, PAGE_SHIFT, PAGE_SIZE, PageIndex},
};

/// What a private mapping shows where the process has no page of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shown {
    /// Zeros.
    Zeros,
    /// A file, or shared memory.
    File,
    /// The code of the vDSO.
    Vdso,
    /// The ring of an AIO context, which is all pages of an object of the kernel.
    AioRing,
}

/// Appends the pages of a private mapping that must be dumped. Returns how many of them the tracker
/// knows nothing about, so that only a comparison with the parent can tell.
pub fn mapping(
    pagemap: &PagemapFile,
    watch: Option<&Watch>,
    mapping: &Mapping,
    shown: Shown,
    stretches: &mut Vec<Stretch>,
) -> io::Result<u64> {
    // The kernel may zero it at any time. C libraries that keep the state of random numbers
    // there (`vgetrandom`) rely on that: two restores must not continue with the same state.
    if mapping.flags.contains(VmFlags::DROPPABLE) {
        return Ok(0);
    }
    if shown == Shown::AioRing {
        // Few, and outside of what can be tracked: the kernel writes them by physical address.
        let pages = mapping.len() >> PAGE_SHIFT;
        let first = PageIndex::holding(mapping.start.0);
        stretches.push(Stretch { zeros_stored: true, ..of_object(first, pages) });
        return Ok(pages);
    }
    let query = if shown == Shown::Vdso {
        Query { all: category::PRESENT, ..Query::default() }
    } else if track::can_be_tracked(mapping) {
        Query::ANONYMOUS
    } else {
        Query::PRIVATE
    };
    let query = query.without_guards();
    // Without pages in swap, there is no point in asking for them.
    let tell = if mapping.swap_bytes > 0 { category::SWAPPED } else { 0 };
    let query = Query { tell, ..query };
    let mut found = Vec::new();
    let mut told = Told::Nothing;
    if let Some(watch) = watch {
        told = watch.scan(pagemap, mapping, query, &mut found)?;
    } else {
        let mut regions = Vec::new();
        pagemap.scan(mapping.start, mapping.end, query, &mut regions)?;
        found.extend(regions.into_iter().map(|region| (region, false)));
    }
    let pinnable = is_pinnable(mapping);
    // Where threads had their way home (`crate::inject`), the unused end of the stack has pages of
    // zeros. CRIU continues a chain only if every existing page was stored.
    let is_stack = mapping.name == b"[stack]";
    let zeros_stored = is_stack || shown == Shown::File;
    let mut untracked = 0;
    stretches.extend(found.iter().map(|(region, unwritten)| {
        let first = region.first();
        let pages = (region.end().0 >> PAGE_SHIFT) - first.0;
        untracked += if told == Told::Nothing { pages } else { 0 };
        let swapped = region.categories & category::SWAPPED != 0;
        let unwritten = *unwritten;
        Stretch { first, pages, pinnable, of_kernel: false, swapped, zeros_stored, unwritten }
    }));
    if shown == Shown::Vdso {
        add_rest(mapping, stretches);
    }
    Ok(untracked)
}

/// Adds the pages of the vDSO that the process has not touched, in order: other restorers read all of
/// it.
fn add_rest(mapping: &Mapping, stretches: &mut Vec<Stretch>) {
    let (start, end) = (mapping.start.0 >> PAGE_SHIFT, mapping.end.0 >> PAGE_SHIFT);
    let begin = stretches.partition_point(|stretch| stretch.first.0 < start);
    let present = stretches.split_off(begin);
    let rest = |first: u64, end: u64| Stretch {
        first: PageIndex(first),
        pages: end - first,
        pinnable: false,
        of_kernel: true,
        swapped: false,
        zeros_stored: false,
        unwritten: false,
    };
    let mut next = start;
    for stretch in present {
        if stretch.first.0 > next {
            stretches.push(rest(next, stretch.first.0));
        }
        next = stretch.first.0 + stretch.pages;
        stretches.push(stretch);
    }
    if next < end {
        stretches.push(rest(next, end));
    }
}

/// Returns a stretch of an object, whose pages of zeros need not be stored.
fn of_object(first: PageIndex, pages: u64) -> Stretch {
    Stretch {
        first,
        pages,
        pinnable: false,
        of_kernel: false,
        swapped: false,
        zeros_stored: false,
        unwritten: false,
    }
}

/// Returns the stretches of an object outside its holes, and marks those in swap.
pub(super) fn object(file: &File, name: &str) -> io::Result<Vec<Stretch>> {
    let stretches = data_of(file)?;
    let (swap, free) = swap::bytes();
    if swap == free {
        return Ok(stretches);
    }
    match swap::swapped_pages(file) {
        Ok(swapped) => Ok(marked(&stretches, &swapped, |pages| pages.swapped = true)),
        Err(error) => {
            log::debug!("{name}: cannot tell which pages are in swap: {error}");
            Ok(stretches)
        }
    }
}

/// Returns the stretches of an object outside its holes.
fn data_of(file: &File) -> io::Result<Vec<Stretch>> {
    let meta = file.metadata()?;
    // Searching for holes visits every page, so skip it if enough blocks are allocated to leave no
    // room for holes. There may be some nevertheless, if blocks after the end are allocated: pages
    // in them read as zeros.
    if meta.len() > 0 && meta.blocks().saturating_mul(BLOCK_BYTES) >= meta.len() {
        let pages = meta.len().div_ceil(PAGE_SIZE);
        return Ok(vec![of_object(PageIndex(0), pages)]);
    }
    let len = i64::try_from(meta.len()).unwrap_or(i64::MAX);
    let mut stretches = Vec::new();
    let mut next = 0;
    while next < len {
        let data = match lseek(file, next, Whence::SeekData) {
            Err(Errno::ENXIO) => break,
            data => data?,
        };
        let hole = lseek(file, data, Whence::SeekHole)?.min(len);
        let first = PageIndex::holding(data.cast_unsigned());
        let end = hole.cast_unsigned().div_ceil(PAGE_SIZE);
        if end > first.0 {
            let pages = end - first.0;
            stretches.push(of_object(first, pages));
        }
        next = hole.max(data + 1);
    }
    Ok(stretches)
}

#[cfg(test)]
mod tests {
    use nix::{
        fcntl::{FallocateFlags, fallocate},
        sys::memfd::{MFdFlags, memfd_create},
    };

    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::units::PAGE_LEN;

    /// Returns the first page and the number of pages of each stretch.
    fn data(object: &File) -> Vec<(u64, u64)> {
        let stretches = data_of(object).unwrap();
        stretches.iter().map(|stretch| (stretch.first.0, stretch.pages)).collect()
    }

    #[test]
    fn stretches_hold_all_data_of_an_object() {
        let object = File::from(memfd_create(c"object", MFdFlags::empty()).unwrap());
        assert_eq!(data(&object), []);
        object.set_len(10 * PAGE_SIZE).unwrap();
        assert_eq!(data(&object), []);
        object.write_all_at(&[1; 4 * PAGE_LEN], 2 * PAGE_SIZE).unwrap();
        object.write_all_at(&[1], 9 * PAGE_SIZE).unwrap();
        assert_eq!(data(&object), [(2, 4), (9, 1)]);
        object.write_all_at(&[1; 10 * PAGE_LEN], 0).unwrap();
        assert_eq!(data(&object), [(0, 10)]);
        object.set_len(9 * PAGE_SIZE + 1).unwrap();
        assert_eq!(data(&object), [(0, 10)]);
        // As many pages as the size has room for, but some of them after the end.
        let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(&object, hole, 3 * 4096, 4096).unwrap();
        assert_eq!(data(&object), [(0, 3), (4, 6)]);
        fallocate(&object, FallocateFlags::FALLOC_FL_KEEP_SIZE, 20 * 4096, 4096).unwrap();
        assert_eq!(data(&object), [(0, 10)]);
    }
}
