//! NUMA policies of mappings (`mbind(2)`).
//!
//! `numa_maps` shows the policy by which the kernel chooses nodes for a mapping, which may be that
//! of the thread. So the process is asked for the mapping's own wherever it is not the default.

use nix::libc;

use crate::{
    inject::Script,
    res::{
        Result,
        attribute::{add, values},
        calls::Calls,
        task::{Calling, Collect, Kind, Restored},
    },
    units::RemoteAddr,
};

/// The attribute: start and end of a mapping, `MPOL_*` with its flags, and a word for each 64
/// nodes.
const NAME: &str = "mapping_policy";

/// Nodes that the kernel may know (`MAX_NUMNODES`, `linux/numa.h`).
const NODES: u64 = 1024;

/// Bytes of a set of nodes.
const MASK_BYTES: usize = 128;

/// `MPOL_F_ADDR` (`linux/mempolicy.h`): of the mapping at an address.
const AT_ADDRESS: u64 = 1 << 1;

/// `MPOL_DEFAULT`: the mapping has no policy of its own.
const DEFAULT: u32 = 0;

/// The kind.
pub(in crate::res) struct Policies;

impl Kind for Policies {
    fn attributes(&self) -> &'static [&'static str] {
        &[NAME]
    }

    fn ask(&self, of: &Calling<'_>, script: &mut Script) -> Result<Collect> {
        // Kernels without NUMA have no such file.
        let text = std::fs::read_to_string(of.of.path("numa_maps")).unwrap_or_default();
        let mut asked = Vec::new();
        for start in candidates(&text) {
            let mode = script.space(size_of::<u32>());
            let mask = script.space(MASK_BYTES);
            // The kernel counts from one.
            let arguments =
                [mode.into(), mask.into(), (NODES + 1).into(), start.0.into(), AT_ADDRESS.into()];
            asked.push((start, script.attempt(libc::SYS_get_mempolicy, &arguments), mode, mask));
        }
        Ok(Box::new(move |of, answers, images| {
            for (start, call, mode, mask) in asked {
                let mapping = of.mappings.iter().find(|mapping| mapping.start == start);
                let (Some(mapping), Ok(_)) = (mapping, answers.result(call)) else { continue };
                let mode: u32 = answers.value(mode);
                if mode == DEFAULT {
                    continue;
                }
                let mut found = vec![start.0, mapping.end.0, mode.into()];
                let words = answers.bytes(mask).as_chunks().0.iter();
                found.extend(words.map(|word| u64::from_le_bytes(*word)));
                while found.len() > 3 && found.last() == Some(&0) {
                    found.pop();
                }
                add(&mut images.attributes, NAME, found);
            }
            Ok(())
        }))
    }

    fn set(&self, of: &Restored<'_>, calls: &mut Calls<'_>) -> Result<()> {
        let mut script = Script::new();
        let mut made = Vec::new();
        for values in values(of.core, NAME) {
            let [start, end, mode, words @ ..] = values else { continue };
            let mut mask: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            mask.resize(MASK_BYTES, 0);
            let mask = script.bytes(&mask);
            let len = end.saturating_sub(*start);
            let arguments =
                [(*start).into(), len.into(), (*mode).into(), mask.into(), (NODES + 1).into()];
            made.push((*start, script.attempt(libc::SYS_mbind, &arguments)));
        }
        if made.is_empty() {
            return Ok(());
        }
        let answers = calls.make(&script)?;
        for (start, call) in made {
            if let Err(errno) = answers.result(call) {
                let what =
                    format!("the NUMA policy of the mapping at {start:#x} is lost ({errno})");
                of.own.differences.borrow_mut().add(what, of.host);
            }
        }
        Ok(())
    }
}

/// Returns where the mappings begin whose pages do not come from nodes by default.
fn candidates(numa_maps: &str) -> impl Iterator<Item = RemoteAddr> + '_ {
    numa_maps.lines().filter_map(|line| {
        let mut words = line.split(' ');
        let start = u64::from_str_radix(words.next()?, 16).ok()?;
        (words.next()? != "default").then_some(RemoteAddr(start))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn candidates_are_mappings_with_another_policy() {
        let text = "7f00 default file=/lib/x mapped=3 N0=3\n\
                    7f10 bind:0 anon=1 dirty=1 N0=1 kernelpagesize_kB=4\n\
                    zz bind:0\n7f20\n7f30 interleave=static:0-1\n";
        assert!(candidates(text).eq([RemoteAddr(0x7f10), RemoteAddr(0x7f30)]));
        assert_eq!(candidates("").count(), 0);
    }
}
