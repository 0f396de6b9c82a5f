//! What the kernel does when a thread exits: it clears the word at the thread's
//! `set_tid_address(2)`, and releases its robust futexes.

use nix::libc;

use super::{Collect, Exited, Kind, Restored, Thread, own};
use crate::{
    arch::{Machine, native},
    image::proto::CoreEntry,
    inject::Script,
    res::{ResError, Result, calls::Calls},
    sys::process,
};

pub(super) struct Futexes;

impl Kind for Futexes {
    fn ask(&self, _: Thread, script: &mut Script) -> Collect {
        let address = script.space(size_of::<u64>());
        let arguments = [libc::PR_GET_TID_ADDRESS.into(), address.into()];
        let call = script.attempt(libc::SYS_prctl, &arguments);
        Box::new(move |of, answers, core| {
            let tid = of.of.tid;
            // Kernels without CONFIG_CHECKPOINT_RESTORE do not report it.
            let address = answers.result(call).map_or(0, |_| answers.value(address));
            native::set_tid_address(core, address);
            let (list, len) = process::robust_list(tid).map_err(|source| ResError::Thread {
                tid,
                step: "read the robust list of",
                source,
            })?;
            own(core).futex_rla = list.0;
            own(core).futex_rla_len = u32::try_from(len).unwrap_or(0);
            Ok(())
        })
    }

    fn exited(&self, _: &Exited<'_>, core: &mut CoreEntry) -> Result<()> {
        (own(core).futex_rla, own(core).futex_rla_len) = (0, 0);
        Ok(())
    }

    fn set(&self, of: &Restored<'_>, calls: &mut Calls<'_>) -> Result<()> {
        if let Some(address) = Machine::NATIVE.tid_address(of.core) {
            let arguments = [address.into()];
            calls.script.call("set the thread id address", libc::SYS_set_tid_address, &arguments);
        }
        if let Some(thread) = of.core.thread_core.as_ref().filter(|thread| thread.futex_rla != 0) {
            calls.script.call(
                "set the list of robust futexes",
                libc::SYS_set_robust_list,
                &[thread.futex_rla.into(), thread.futex_rla_len.into()],
            );
        }
        Ok(())
    }
}
