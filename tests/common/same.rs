//! Whether two snapshots hold the same memory.

use std::{path::Path, sync::Arc};

use rcriu::{
    chain::{Chain, MemoryBytes, SnapshotId, read_at},
    image::MemoryId,
    units::{PageIndex, PageRanges},
};

/// Opens the last snapshot of a chain.
pub fn open(dir: &Path) -> (Arc<Chain>, SnapshotId) {
    let dir = dir.canonicalize().unwrap();
    let chain = Chain::open(&dir).unwrap();
    let id = chain.at(&dir).unwrap();
    (Arc::new(chain), id)
}

/// Compares all memories of two snapshots.
pub fn assert_same(one: &Path, other: &Path) {
    let ((one, one_id), (other, other_id)) = (open(one), open(other));
    let mut memories = one.memories(one_id).unwrap();
    let mut others = other.memories(other_id).unwrap();
    memories.sort();
    others.sort();
    assert_eq!(memories, others, "memories");
    for memory in memories {
        assert_same_memory(memory, &bytes(&one, one_id, memory), &bytes(&other, other_id, memory));
    }
}

pub fn bytes(chain: &Arc<Chain>, id: SnapshotId, memory: MemoryId) -> MemoryBytes {
    let index = chain.index(id, memory).unwrap();
    MemoryBytes::new(Arc::clone(chain), index, PageIndex::END.address())
}

pub fn assert_same_memory(memory: MemoryId, one: &MemoryBytes, other: &MemoryBytes) {
    const PAGE: usize = 4096;
    let mut differing = Vec::new();
    for (this, that) in [(one, other), (other, one)] {
        for extent in this.index().extents() {
            let mut bytes = vec![0; usize::try_from(extent.pages).unwrap() * PAGE];
            let mut others = bytes.clone();
            let address = extent.first.address();
            let read = |from: &MemoryBytes, to: &mut [u8]| {
                let mut done = 0;
                while done < to.len() {
                    done += read_at(from, address + done as u64, &mut to[done..]).unwrap();
                }
            };
            read(this, &mut bytes);
            read(that, &mut others);
            let pages = bytes.chunks(PAGE).zip(others.chunks(PAGE));
            for (page, (found, expected)) in (extent.first.0..).zip(pages) {
                if found != expected {
                    differing.push(page << 12);
                }
            }
        }
    }
    differing.sort_unstable();
    differing.dedup();
    // A page that is not there is what is below it, which need not be zero.
    let has = |bytes: &MemoryBytes| -> PageRanges {
        bytes.index().extents().map(|extent| extent.first.0..extent.end().0).collect()
    };
    assert_eq!(has(one), has(other), "pages of {memory}");
    assert!(differing.is_empty(), "{memory} differs at {differing:x?}");
}
