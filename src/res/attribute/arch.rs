//! Attributes that `arch_prctl(2)` sets on x86-64, other than segment bases.

use nix::{errno::Errno, libc};

use super::{Asked, Kind, Label, Owner};
use crate::inject::{Answers, Script};

/// `asm/prctl.h`.
const GET_CPUID: i32 = 0x1011;
const SET_CPUID: i32 = 0x1012;
const GET_XCOMP_PERM: i32 = 0x1022;
const REQ_XCOMP_PERM: i32 = 0x1023;
const GET_UNTAG_MASK: i32 = 0x4001;
const ENABLE_TAGGED_ADDR: i32 = 0x4002;

/// Whether a thread may execute `cpuid`; if 0, the instruction faults.
pub(super) struct CpuId;

impl Kind for CpuId {
    fn label(&self) -> Label {
        Label::of_thread("cpuid", "the cpuid permission (ARCH_SET_CPUID)")
    }

    fn ask(&self, script: &mut Script) -> Asked {
        Asked::call(script.attempt(libc::SYS_arch_prctl, &[GET_CPUID.into(), 0.into()]))
    }

    fn read(&self, _: Owner, asked: &Asked, answers: &Answers) -> Option<Vec<u64>> {
        Some(vec![asked.result(answers)?])
    }

    fn set(&self, values: &[u64], _: Owner, script: &mut Script) -> Result<(), Errno> {
        let &[value] = values else { return Err(Errno::EINVAL) };
        script.attempt(libc::SYS_arch_prctl, &[SET_CPUID.into(), value.into()]);
        Ok(())
    }
}

/// The extended register state that a process may use, such as AMX tiles, as bits of `XCR0`.
/// The kernel never withdraws a permission.
pub(super) struct LargeState;

impl Kind for LargeState {
    fn label(&self) -> Label {
        Label::of_process(
            "large_state",
            "the permission for extended registers (ARCH_REQ_XCOMP_PERM)",
        )
    }

    fn ask(&self, script: &mut Script) -> Asked {
        pointed(GET_XCOMP_PERM, script)
    }

    fn read(&self, _: Owner, asked: &Asked, answers: &Answers) -> Option<Vec<u64>> {
        /// `XFEATURE_XTILE_DATA` (`linux/fpu/types.h`); every process may use the others.
        const LARGE: u64 = 1 << 18;
        Some(vec![word(asked, answers)? & LARGE])
    }

    fn set(&self, values: &[u64], _: Owner, script: &mut Script) -> Result<(), Errno> {
        let &[value] = values else { return Err(Errno::EINVAL) };
        for bit in (0..u64::BITS).filter(|bit| value >> bit & 1 == 1) {
            script.attempt(libc::SYS_arch_prctl, &[REQ_XCOMP_PERM.into(), bit.into()]);
        }
        Ok(())
    }
}

/// The address bits of pointers: all, or all but the tag bits once a process has enabled tagged
/// addresses.
pub(super) struct TaggedAddresses;

impl Kind for TaggedAddresses {
    fn label(&self) -> Label {
        Label::of_process("untag_mask", "the untag mask of pointers (ARCH_ENABLE_TAGGED_ADDR)")
    }

    fn ask(&self, script: &mut Script) -> Asked {
        pointed(GET_UNTAG_MASK, script)
    }

    fn read(&self, _: Owner, asked: &Asked, answers: &Answers) -> Option<Vec<u64>> {
        Some(vec![word(asked, answers)?])
    }

    fn set(&self, values: &[u64], _: Owner, script: &mut Script) -> Result<(), Errno> {
        let &[mask] = values else { return Err(Errno::EINVAL) };
        let bits = mask.count_zeros();
        script.attempt(libc::SYS_arch_prctl, &[ENABLE_TAGGED_ADDR.into(), bits.into()]);
        Ok(())
    }
}

/// Adds a call that writes its answer, one word, to memory.
fn pointed(option: i32, script: &mut Script) -> Asked {
    let buffer = script.space(size_of::<u64>());
    let call = script.attempt(libc::SYS_arch_prctl, &[option.into(), buffer.into()]);
    Asked::into(call, buffer)
}

fn word(asked: &Asked, answers: &Answers) -> Option<u64> {
    Some(u64::from_le_bytes(*asked.written(answers)?.first_chunk()?))
}
