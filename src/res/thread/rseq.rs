//! Restartable sequences (`rseq(2)`).

use nix::libc;

use super::{Collect, Exited, Kind, Restored, Thread, own};
use crate::{
    image::proto::{CoreEntry, RseqEntry},
    inject::Script,
    res::{ResError, Result, calls::Calls},
    sys::{process, ptrace},
    units::{HostPid, NsPid, RemoteAddr},
};

pub(super) struct Rseq;

/// Returns the restartable sequences in a core, if it has any.
fn entry(core: &CoreEntry) -> Option<&RseqEntry> {
    core.thread_core.as_ref()?.rseq_entry.as_ref()
}

impl Kind for Rseq {
    fn ask(&self, _: Thread, _: &mut Script) -> Collect {
        Box::new(|of, _, core| {
            let rseq = of.thread.rseq;
            own(core).rseq_entry = (rseq.pointer != 0).then_some(RseqEntry {
                rseq_abi_pointer: rseq.pointer,
                rseq_abi_size: rseq.size,
                signature: rseq.signature,
                rseq_cs_pointer: (of.thread.rseq_cs != 0).then_some(of.thread.rseq_cs),
            });
            Ok(())
        })
    }

    fn exited(&self, _: &Exited<'_>, core: &mut CoreEntry) -> Result<()> {
        own(core).rseq_entry = None;
        Ok(())
    }

    fn set(&self, of: &Restored<'_>, calls: &mut Calls<'_>) -> Result<()> {
        if let Some(rseq) = entry(of.core).filter(|rseq| rseq.rseq_abi_pointer != 0) {
            let (pointer, size) = (rseq.rseq_abi_pointer, rseq.rseq_abi_size);
            let arguments = [pointer.into(), size.into(), 0.into(), rseq.signature.into()];
            calls.script.call("register restartable sequences", libc::SYS_rseq, &arguments);
        }
        Ok(())
    }

    fn set_resume_state(&self, core: &CoreEntry, _of: NsPid, tid: HostPid) -> Result<()> {
        if let Some(rseq) = entry(core)
            && let Some(section) = rseq.rseq_cs_pointer
        {
            let address = RemoteAddr(rseq.rseq_abi_pointer).plus(ptrace::RSEQ_CS_OFFSET);
            let step = "write the restartable sequence of";
            process::write_memory(tid, address, &section.to_le_bytes())
                .map_err(|source| ResError::Thread { tid, step, source })?;
        }
        Ok(())
    }
}
