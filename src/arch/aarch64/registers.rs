//! The registers of a thread, laid out as the kernel hands them to debuggers
//! (`asm/ptrace.h`).

use object::elf::NT_ARM_TLS;

use crate::{
    arch::Notes,
    proto::{CoreEntry, ThreadInfoAarch64},
};

/// General registers beside the stack pointer, the program counter and the state.
const GENERAL_REGISTERS: usize = 31;

/// Halves of the 32 vector registers, the lower one first.
const VECTOR_HALVES: usize = 64;

/// Bytes of `struct user_fpsimd_state`.
const FLOATING_BYTES: usize = VECTOR_HALVES * 8 + 16;

/// The bit of `pstate` that says that the thread executed 32-bit code
/// (`PSR_MODE32_BIT`).
const NARROW: u64 = 0x10;

/// The bits of `pstate` that say at which level the thread ran: 0 in a program
/// (`PSR_MODE_MASK`), but for [`NARROW`].
const LEVEL: u64 = 0xf;

/// Returns the registers of a thread as the notes of a core file have them.
///
/// # Errors
/// What is wrong with the image: no registers, or the wrong number of them.
pub(in crate::arch) fn notes(core: &CoreEntry) -> Result<Notes, String> {
    let info = core.ti_aarch64.as_ref().ok_or("its image has no registers")?;
    if is_narrow(core) {
        return Err("it ran 32-bit code".into());
    }
    check_counts(info)?;
    let regs = &info.gpregs;
    let general = regs.regs.iter().chain([&regs.sp, &regs.pc, &regs.pstate]);
    let mut floating: Vec<u8> = bytes(info.fpsimd.vregs.iter());
    floating.extend(info.fpsimd.fpsr.to_le_bytes());
    floating.extend(info.fpsimd.fpcr.to_le_bytes());
    // Two reserved words.
    floating.resize(FLOATING_BYTES, 0);
    let others = vec![(NT_ARM_TLS, info.tls.to_le_bytes().to_vec())];
    Ok(Notes { general: bytes(general), floating, others })
}

fn bytes<'a>(words: impl Iterator<Item = &'a u64>) -> Vec<u8> {
    words.flat_map(|word| word.to_le_bytes()).collect()
}

fn check_counts(info: &ThreadInfoAarch64) -> Result<(), String> {
    let counts = [
        ("regs", info.gpregs.regs.len(), GENERAL_REGISTERS),
        ("vregs", info.fpsimd.vregs.len(), VECTOR_HALVES),
    ];
    match counts.iter().find(|(_, found, expected)| found != expected) {
        None => Ok(()),
        Some((name, found, expected)) => {
            Err(format!("{name} has {found} numbers, {expected} expected"))
        }
    }
}

/// Reports registers that no thread can have.
pub(in crate::arch) fn check_thread(core: &CoreEntry, wrong: &mut dyn FnMut(String)) {
    let Some(info) = &core.ti_aarch64 else {
        wrong("it has no registers".into());
        return;
    };
    if let Err(problem) = check_counts(info) {
        wrong(problem);
    }
    if info.gpregs.pstate & LEVEL != 0 {
        wrong(format!("its register pstate is {:#x}", info.gpregs.pstate));
    }
}

/// Whether a thread executed 32-bit code.
pub(in crate::arch) fn is_narrow(core: &CoreEntry) -> bool {
    core.ti_aarch64.as_ref().is_some_and(|info| info.gpregs.pstate & NARROW != 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::{UserAarch64FpsimdContextEntry, UserAarch64RegsEntry, core_entry::March};

    fn core() -> CoreEntry {
        let gpregs =
            UserAarch64RegsEntry { regs: (1..32).collect(), sp: 100, pc: 200, pstate: 0x6000_0000 };
        let fpsimd = UserAarch64FpsimdContextEntry {
            vregs: (1000..1064).collect(),
            fpsr: 0x1000_0000,
            fpcr: 0x0100_0000,
        };
        let info = ThreadInfoAarch64 {
            clear_tid_addr: 0x1000,
            tls: 0x2000,
            gpregs,
            fpsimd,
            pac_keys: None,
        };
        CoreEntry { mtype: March::Aarch64.into(), ti_aarch64: Some(info), ..Default::default() }
    }

    #[test]
    fn registers_are_where_debuggers_look_for_them() {
        let notes = notes(&core()).unwrap();
        let word =
            |bytes: &[u8], at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        assert_eq!(notes.general.len(), 34 * 8);
        let general = |number: usize| word(&notes.general, number * 8);
        assert_eq!([0, 30, 31, 32, 33].map(general), [1, 31, 100, 200, 0x6000_0000]);
        assert_eq!(notes.floating.len(), 528);
        assert_eq!([0, 63 * 8].map(|at| word(&notes.floating, at)), [1000, 1063]);
        assert_eq!(word(&notes.floating, 512), 0x0100_0000_1000_0000);
        assert_eq!(notes.others, [(NT_ARM_TLS, 0x2000_u64.to_le_bytes().to_vec())]);
    }

    #[test]
    fn wrong_registers_are_told() {
        let told = |change: fn(&mut ThreadInfoAarch64)| {
            let mut core = core();
            change(core.ti_aarch64.as_mut().unwrap());
            let mut told = Vec::new();
            check_thread(&core, &mut |problem| told.push(problem));
            (notes(&core).err().unwrap_or_default(), told.join("; "), is_narrow(&core))
        };
        let none = String::new;
        assert_eq!(told(|_| ()), (none(), none(), false));
        let problem = "regs has 30 numbers, 31 expected".to_owned();
        let short = told(|info| info.gpregs.regs.truncate(30));
        assert_eq!(short, (problem.clone(), problem, false));
        let problem = "vregs has 65 numbers, 64 expected".to_owned();
        assert_eq!(told(|info| info.fpsimd.vregs.push(1)), (problem.clone(), problem, false));
        let narrow = told(|info| info.gpregs.pstate = 0x10);
        assert_eq!(narrow, ("it ran 32-bit code".into(), none(), true));
        let kernel = told(|info| info.gpregs.pstate = 0x5);
        assert_eq!(kernel, (none(), "its register pstate is 0x5".into(), false));
    }
}
