//! Signal actions (`sigaction(2)`).

use nix::libc;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::{Calling, Collect, Kind, Restored};
use crate::{image::proto::SaEntry, inject::Script, res::Result};

/// Signals on Linux: 1 to 64.
const SIGNALS: i32 = 64;

/// Bytes of a kernel signal set.
const SIGSET_BYTES: i32 = 8;

/// `struct kernel_sigaction` (`include/linux/signal_types.h`) on x86-64.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Action {
    handler: u64,
    flags: u64,
    restorer: u64,
    mask: u64,
}

const _: () = assert!(size_of::<Action>() == 32);

/// The signals whose action can be set, in the order of the images.
fn settable() -> impl Iterator<Item = i32> {
    (1..=SIGNALS).filter(|signal| !matches!(*signal, libc::SIGKILL | libc::SIGSTOP))
}

pub(super) struct Handlers;

impl Kind for Handlers {
    fn ask(&self, _: &Calling<'_>, script: &mut Script) -> Result<Collect> {
        let mut buffers = Vec::new();
        for signal in settable() {
            let buffer = script.space(size_of::<Action>());
            script.call(
                "read the action of a signal",
                libc::SYS_rt_sigaction,
                &[signal.into(), 0.into(), buffer.into(), SIGSET_BYTES.into()],
            );
            buffers.push(buffer);
        }
        Ok(Box::new(move |_, answers, images| {
            let entries = buffers.into_iter().map(|buffer| {
                let action: Action = answers.value(buffer);
                SaEntry {
                    sigaction: action.handler,
                    flags: action.flags,
                    restorer: action.restorer,
                    mask: action.mask,
                    compat_sigaction: Some(false),
                    mask_extended: None,
                }
            });
            images.core.sigactions = entries.collect();
            Ok(())
        }))
    }

    /// A new process has default actions. The zombies of the tree have exited by now, so no handler
    /// runs for them.
    fn before_credentials(&self, of: &Restored<'_>, script: &mut Script) {
        let entries = of.core.tc.iter().flat_map(|task| &task.sigactions);
        for (signal, entry) in settable().zip(entries) {
            let action = Action {
                handler: entry.sigaction,
                flags: entry.flags,
                restorer: entry.restorer,
                mask: entry.mask,
            };
            if action.as_bytes().iter().all(|byte| *byte == 0) {
                continue;
            }
            let buffer = script.bytes(action.as_bytes());
            script.call(
                format!("set the action of signal {signal}"),
                libc::SYS_rt_sigaction,
                &[signal.into(), buffer.into(), 0.into(), SIGSET_BYTES.into()],
            );
        }
    }
}
