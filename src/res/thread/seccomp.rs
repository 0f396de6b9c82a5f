//! The seccomp mode of a thread (`seccomp(2)`). The dump refuses filters that rcriu cannot keep;
//! [`crate::res::tree::seccomp`] keeps the others.

use nix::errno::Errno;

use super::{Collect, Exited, Kind, Stopped, Thread, own};
use crate::{
    image::{
        proto::{CoreEntry, SeccompMode},
        seccomp::INSTRUCTION_BYTES,
    },
    inject::{Script, try_to_suspend_filters},
    res::{Result, seccomp},
    sys::ptrace,
};

/// Values of `Seccomp` in `status` (`linux/seccomp.h`).
const DISABLED: u32 = 0;
const STRICT: u32 = 1;
const FILTER: u32 = 2;

/// The kind.
pub(super) struct Seccomp;

impl Kind for Seccomp {
    fn check(&self, of: &Stopped<'_>) -> Result<()> {
        let tid = of.of.tid;
        match of.status.seccomp {
            DISABLED => return Ok(()),
            STRICT => {}
            FILTER => check_filters(of)?,
            other => {
                let what = format!("the seccomp mode {other}");
                return Err(of.refused(&what, "such threads are not dumped"));
            }
        }
        try_to_suspend_filters(tid)?;
        ptrace::set_options(tid, ptrace::options::SYSGOOD).map_err(|source| {
            crate::res::ResError::Thread { tid, step: "set the options of", source }
        })
    }

    fn ask(&self, _: Thread, _: &mut Script) -> Collect {
        Box::new(|of, _, core| {
            let mode = match of.status.seccomp {
                STRICT => SeccompMode::Strict,
                FILTER => SeccompMode::Filter,
                _ => SeccompMode::Disabled,
            };
            own(core).seccomp_mode = Some(mode.into());
            Ok(())
        })
    }

    fn exited(&self, _: &Exited<'_>, core: &mut CoreEntry) -> Result<()> {
        own(core).seccomp_mode = Some(SeccompMode::Disabled.into());
        own(core).seccomp_filter = None;
        Ok(())
    }
}

/// Refuses filters that rcriu cannot read, or that need a process to answer.
fn check_filters(of: &Stopped<'_>) -> Result<()> {
    let what = "seccomp filters";
    let filters = match seccomp::filters(of.of.tid) {
        Ok(filters) if filters.is_empty() => {
            return Err(
                of.refused(what, "use a kernel with CONFIG_CHECKPOINT_RESTORE, which shows them")
            );
        }
        Ok(filters) => filters,
        Err(Errno::EACCES) => {
            let help = "run rcriu with CAP_SYS_ADMIN outside of user namespaces, and without a \
                        seccomp filter of its own";
            return Err(of.refused(what, help));
        }
        Err(errno) => {
            let what = format!("seccomp filters that cannot be read ({})", errno.desc());
            return Err(of.refused(&what, "dump it before it installs them"));
        }
    };
    if filters.iter().any(|filter| notifies(&filter.filter)) {
        let what = "a seccomp filter that asks another process (SECCOMP_RET_USER_NOTIF)";
        let help = "install a filter that decides by itself: no restore can connect it to the process \
                    that answers";
        return Err(of.refused(what, help));
    }
    Ok(())
}

/// Whether a filter can return `SECCOMP_RET_USER_NOTIF` as a constant, which is how programs are
/// written.
fn notifies(program: &[u8]) -> bool {
    /// `BPF_RET | BPF_K` (`linux/bpf_common.h`).
    const RETURN: u16 = 0x06;
    const ACTION: u32 = 0xffff_0000;
    const USER_NOTIF: u32 = 0x7fc0_0000;
    program.chunks_exact(INSTRUCTION_BYTES).any(|instruction| {
        let code = u16::from_le_bytes([instruction[0], instruction[1]]);
        let [.., a, b, c, d] = *instruction else { return false };
        code == RETURN && u32::from_le_bytes([a, b, c, d]) & ACTION == USER_NOTIF
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_that_ask_another_process_are_found() {
        let allow = [6, 0, 0, 0, 0, 0, 0xff, 0x7f];
        let notify = [6, 0, 0, 0, 3, 0, 0xc0, 0x7f];
        // The same number, but it is only compared with.
        let compare = [0x15, 0, 0, 0, 0, 0, 0xc0, 0x7f];
        assert!(!notifies(&[allow, compare].concat()));
        assert!(notifies(&[compare, notify, allow].concat()));
    }
}
