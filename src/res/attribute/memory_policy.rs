//! The NUMA policy of a thread: the nodes from which the kernel allocates its memory.

use nix::{errno::Errno, libc};

use super::{Asked, Kind, Label, Owner};
use crate::inject::{Answers, Script};

/// The most nodes that a kernel supports (`MAX_NUMNODES`, `linux/numa.h`).
const NODES: u64 = 1024;

/// The size of a node set.
const MASK_BYTES: usize = 128;

/// `MPOL_*` with its flags, followed by one word for each 64 nodes.
pub(super) struct MemoryPolicy;

impl Kind for MemoryPolicy {
    fn label(&self) -> Label {
        Label::of_thread("memory_policy", "the NUMA policy (set_mempolicy(2))")
    }

    fn ask(&self, script: &mut Script) -> Asked {
        let mode = script.space(size_of::<u32>());
        let mask = script.space(MASK_BYTES);
        // The kernel takes one bit less than it is told.
        let arguments = [mode.into(), mask.into(), (NODES + 1).into()];
        let call = script.attempt(libc::SYS_get_mempolicy, &arguments);
        Asked { calls: vec![call], buffers: vec![mask, mode] }
    }

    fn read(&self, _: Owner, asked: &Asked, answers: &Answers) -> Option<Vec<u64>> {
        let mask = asked.written(answers)?;
        let mode: u32 = answers.value(asked.buffers[1]);
        let (words, _) = mask.as_chunks();
        let mut values = vec![mode.into()];
        values.extend(words.iter().map(|word| u64::from_le_bytes(*word)));
        while values.len() > 1 && values.last() == Some(&0) {
            values.pop();
        }
        Some(values)
    }

    fn set(&self, values: &[u64], _: Owner, script: &mut Script) -> Result<(), Errno> {
        let Some((mode, words)) = values.split_first() else { return Err(Errno::EINVAL) };
        let mut mask: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        mask.resize(MASK_BYTES, 0);
        let mask = script.bytes(&mask);
        let arguments = [(*mode).into(), mask.into(), (NODES + 1).into()];
        script.attempt(libc::SYS_set_mempolicy, &arguments);
        Ok(())
    }
}
