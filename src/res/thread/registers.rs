//! The registers and the signal mask of a thread.

use super::{Collect, Kind, Thread, own};
use crate::{
    arch::native,
    image::proto::CoreEntry,
    inject::{Script, registers_to_resume},
    res::{ResError, Result},
    sys::ptrace,
    units::{HostPid, NsPid},
};

pub(super) struct Registers;

impl Kind for Registers {
    fn ask(&self, _: Thread, _: &mut Script) -> Collect {
        Box::new(|of, _, core| {
            let tid = of.of.tid;
            let step = "read the registers of";
            let extended = ptrace::extended_registers(tid).map_err(|source| ResError::Thread {
                tid,
                step,
                source,
            })?;
            native::describe(core, &of.thread.registers_to_restore(), &extended)
                .map_err(|problem| ResError::Unsupported { pid: tid, what: problem })?;
            own(core).blk_sigset = Some(of.thread.signal_mask);
            Ok(())
        })
    }

    fn set_resume_state(&self, core: &CoreEntry, of: NsPid, tid: HostPid) -> Result<()> {
        let failed = |step| move |source| ResError::Thread { tid, step, source };
        let wrong = |problem: String| ResError::Image { pid: of, problem };
        let mut extended =
            ptrace::extended_registers(tid).map_err(failed("read the registers of"))?;
        let mut regs = ptrace::registers(tid).map_err(failed("read the registers of"))?;
        native::overwrite(core, &mut regs, &mut extended).map_err(wrong)?;
        ptrace::set_extended_registers(tid, &extended).map_err(failed("set the registers of"))?;
        let regs = registers_to_resume(tid, &regs);
        ptrace::set_registers(tid, &regs).map_err(failed("set the registers of"))?;
        if let Some(thread) = &core.thread_core {
            let of_task = core.tc.as_ref().map(|task| task.blk_sigset);
            let mask = thread.blk_sigset.or(of_task).unwrap_or(0);
            ptrace::set_signal_mask(tid, mask).map_err(failed("set the signal mask of"))?;
        }
        Ok(())
    }
}
