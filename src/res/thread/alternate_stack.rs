//! The alternate stack of signal handlers (`sigaltstack(2)`).

use nix::libc;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::{Collect, Exited, Kind, Restored, Thread, own};
use crate::{
    image::proto::{CoreEntry, ThreadSasEntry},
    inject::Script,
    res::{Result, calls::Calls},
};

pub(super) struct AlternateStack;

/// `stack_t` (`asm-generic/signal.h`).
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Stack {
    pointer: u64,
    flags: u32,
    padding: u32,
    size: u64,
}

impl Kind for AlternateStack {
    fn ask(&self, _: Thread, script: &mut Script) -> Collect {
        let stack = script.space(size_of::<Stack>());
        let arguments = [0.into(), stack.into()];
        script.call("read the alternate stack", libc::SYS_sigaltstack, &arguments);
        Box::new(move |_, answers, core| {
            let stack: Stack = answers.value(stack);
            own(core).sas = Some(ThreadSasEntry {
                ss_sp: stack.pointer,
                ss_size: stack.size,
                ss_flags: stack.flags,
            });
            Ok(())
        })
    }

    fn exited(&self, _: &Exited<'_>, core: &mut CoreEntry) -> Result<()> {
        own(core).sas = None;
        Ok(())
    }

    fn set(&self, of: &Restored<'_>, calls: &mut Calls<'_>) -> Result<()> {
        if let Some(stack) = of.core.thread_core.as_ref().and_then(|thread| thread.sas.as_ref()) {
            let stack = Stack {
                pointer: stack.ss_sp,
                flags: stack.ss_flags,
                padding: 0,
                size: stack.ss_size,
            };
            let stack = calls.script.bytes(stack.as_bytes());
            let arguments = [stack.into(), 0.into()];
            calls.script.call("set the alternate stack", libc::SYS_sigaltstack, &arguments);
        }
        Ok(())
    }
}
