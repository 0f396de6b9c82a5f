//! Which nodes a thread's memory is taken from.

use nix::{errno::Errno, libc};

use super::{Asked, Kind, Who};
use crate::inject::{Answers, Script};

/// Nodes that the kernel may know (`MAX_NUMNODES`, `linux/numa.h`).
const NODES: u64 = 1024;

/// Bytes of a set of them.
const MASK_BYTES: usize = 128;

/// `MPOL_*` with its flags, and a word for each 64 nodes.
pub(super) struct MemoryPolicy;

impl Kind for MemoryPolicy {
    fn name(&self) -> &'static str {
        "memory_policy"
    }

    fn about(&self) -> &'static str {
        "which nodes memory is taken from (set_mempolicy(2))"
    }

    fn ask(&self, script: &mut Script) -> Asked {
        let mode = script.space(size_of::<u32>());
        let mask = script.space(MASK_BYTES);
        // The kernel counts from one.
        let arguments = [mode.into(), mask.into(), (NODES + 1).into()];
        let call = script.attempt(libc::SYS_get_mempolicy, &arguments);
        Asked { calls: vec![call], buffers: vec![mask, mode] }
    }

    fn read(&self, _: Who, asked: &Asked, answers: &Answers) -> Option<Vec<u64>> {
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

    fn set(&self, values: &[u64], _: Who, script: &mut Script) -> Result<(), Errno> {
        let Some((mode, words)) = values.split_first() else { return Err(Errno::EINVAL) };
        let mut mask: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        mask.resize(MASK_BYTES, 0);
        let mask = script.bytes(&mask);
        let arguments = [(*mode).into(), mask.into(), (NODES + 1).into()];
        script.attempt(libc::SYS_set_mempolicy, &arguments);
        Ok(())
    }
}
