//! The vDSO: code that the kernel maps into each process.

use crate::{
    image::{proto::VmaEntry, vma},
    proc,
    res::{ResError, Result, task::Kind},
    units::HostPid,
};

/// The kind.
pub(in crate::res) struct Vdso;

impl Kind for Vdso {
    /// Checks that the vDSO is mapped at its address in the images.
    fn check_mappings(&self, pid: HostPid, vmas: &[VmaEntry]) -> Result<()> {
        check(pid, vmas)
    }
}

fn check(pid: HostPid, vmas: &[VmaEntry]) -> Result<()> {
    let wanted: Vec<(u64, u64)> = vmas
        .iter()
        .filter(|entry| entry.status & vma::VDSO != 0)
        .map(|entry| (entry.start, entry.end))
        .collect();
    if wanted.is_empty() {
        return Ok(());
    }
    let maps = proc::maps(pid)?;
    let found: Vec<(u64, u64)> = maps
        .iter()
        .filter(|mapping| mapping.name == b"[vdso]")
        .map(|mapping| (mapping.start.0, mapping.end.0))
        .collect();
    if found == wanted {
        return Ok(());
    }
    let problem = format!("it is at {found:x?}, expected {wanted:x?}");
    Err(ResError::OtherKernel { pid, problem })
}
