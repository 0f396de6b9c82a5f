//! The kinds of machines that images come from.

use object::elf::{self, NoteType};

use super::{aarch64, native, x86_64};
use crate::proto::{CoreEntry, core_entry::March};

/// `AT_PAGESZ` (`linux/auxvec.h`): the size of pages, in an auxiliary vector.
const AT_PAGESZ: u64 = 6;

/// Returns the bytes in a page of a process with this auxiliary vector, if that says so.
pub fn told_page_size(auxv: &[u64]) -> Option<u64> {
    let (pairs, _) = auxv.as_chunks::<2>();
    pairs.iter().find(|[kind, _]| *kind == AT_PAGESZ).map(|[_, size]| *size)
}

/// A kind of machine whose images can be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Machine {
    /// x86-64.
    X86_64,
    /// 64-bit Arm.
    Aarch64,
}

/// An image is of a machine whose registers are not known here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("it ran on a machine whose registers are not known ({0:?})")]
pub struct UnknownMachine(pub March);

/// The registers of a thread as the notes of a core file have them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notes {
    /// `pr_reg` of `NT_PRSTATUS`.
    pub general: Vec<u8>,
    /// `NT_FPREGSET`.
    pub floating: Vec<u8>,
    /// Others, in the order in which the kernel writes them.
    pub others: Vec<(NoteType, Vec<u8>)>,
}

impl Machine {
    /// The kind of machine that this program is built for.
    pub const NATIVE: Self = native::MACHINE;

    /// Returns the machine that a thread ran on.
    ///
    /// # Errors
    /// [`UnknownMachine`].
    pub fn of(core: &CoreEntry) -> Result<Self, UnknownMachine> {
        match core.mtype() {
            March::X8664 => Ok(Self::X86_64),
            March::Aarch64 => Ok(Self::Aarch64),
            other => Err(UnknownMachine(other)),
        }
    }

    /// Returns the machine's number in images.
    pub const fn march(self) -> March {
        match self {
            Self::X86_64 => March::X8664,
            Self::Aarch64 => March::Aarch64,
        }
    }

    /// Returns the machine's usual name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::X86_64 => "x86-64",
            Self::Aarch64 => "aarch64",
        }
    }

    /// Returns the machine's number in ELF files.
    pub const fn elf(self) -> elf::Machine {
        match self {
            Self::X86_64 => elf::EM_X86_64,
            Self::Aarch64 => elf::EM_AARCH64,
        }
    }

    /// Returns the end of the addresses that a process may have, whatever it asks for.
    pub const fn addresses_end(self) -> u64 {
        match self {
            Self::X86_64 => x86_64::registers::ADDRESSES_END,
            // 52 bits (`CONFIG_ARM64_VA_BITS`).
            Self::Aarch64 => 1 << 52,
        }
    }

    /// Returns the sizes of pages that kernels for the machine can have, ascending.
    pub const fn page_sizes(self) -> &'static [u64] {
        match self {
            Self::X86_64 => &[4 << 10],
            Self::Aarch64 => &[4 << 10, 16 << 10, 64 << 10],
        }
    }

    /// Returns the bytes in a page of a process with this auxiliary vector; the smallest
    /// that there are if the vector does not say.
    ///
    /// # Errors
    /// A size that no kernel for the machine has.
    pub fn page_size(self, auxv: &[u64]) -> Result<u64, u64> {
        match told_page_size(auxv) {
            None => Ok(self.page_sizes()[0]),
            Some(size) if self.page_sizes().contains(&size) => Ok(size),
            Some(size) => Err(size),
        }
    }

    /// Returns the registers of a thread of this machine.
    ///
    /// # Errors
    /// A defect of the image.
    pub fn notes(self, core: &CoreEntry) -> Result<Notes, String> {
        match self {
            Self::X86_64 => x86_64::registers::notes(core),
            Self::Aarch64 => aarch64::registers::notes(core),
        }
    }

    /// Reports registers that no thread of this machine can have.
    pub fn check_registers(self, core: &CoreEntry, wrong: &mut dyn FnMut(String)) {
        match self {
            Self::X86_64 => x86_64::registers::check_thread(core, wrong),
            Self::Aarch64 => aarch64::registers::check_thread(core, wrong),
        }
    }

    /// Whether a thread executed 32-bit code.
    pub fn is_narrow(self, core: &CoreEntry) -> bool {
        match self {
            Self::X86_64 => x86_64::registers::is_narrow(core),
            Self::Aarch64 => aarch64::registers::is_narrow(core),
        }
    }

    /// Returns where the kernel clears a thread's id at its end; `None` without registers.
    pub fn tid_address(self, core: &CoreEntry) -> Option<u64> {
        match self {
            Self::X86_64 => core.thread_info.as_ref().map(|info| info.clear_tid_addr),
            Self::Aarch64 => core.ti_aarch64.as_ref().map(|info| info.clear_tid_addr),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_machine_is_found_by_its_number() {
        for machine in [Machine::X86_64, Machine::Aarch64] {
            let core = CoreEntry { mtype: machine.march().into(), ..Default::default() };
            assert_eq!(Machine::of(&core), Ok(machine));
            assert_eq!(machine.tid_address(&core), None);
            assert!(machine.notes(&core).is_err());
        }
        let core = CoreEntry { mtype: March::S390.into(), ..Default::default() };
        let told = Machine::of(&core).unwrap_err().to_string();
        assert_eq!(told, "it ran on a machine whose registers are not known (S390)");
    }

    #[test]
    fn the_auxiliary_vector_tells_the_size_of_pages() {
        let size = |machine: Machine, auxv: &[u64]| machine.page_size(auxv);
        assert_eq!(size(Machine::X86_64, &[3, 64, AT_PAGESZ, 4096, 0, 0]), Ok(4096));
        assert_eq!(size(Machine::X86_64, &[AT_PAGESZ, 65536]), Err(65536));
        assert_eq!(size(Machine::Aarch64, &[AT_PAGESZ, 65536, 0, 0]), Ok(65536));
        assert_eq!(size(Machine::Aarch64, &[AT_PAGESZ, 16384]), Ok(16384));
        assert_eq!(size(Machine::Aarch64, &[AT_PAGESZ, 8192]), Err(8192));
        // Not a kind, but the value of another one.
        assert_eq!(size(Machine::Aarch64, &[3, AT_PAGESZ, 5]), Ok(4096));
    }
}
