//! Reads memory of the kernel.
//!
//! No system call shows some state of a process without changing it, such as the data in a
//! connection that was not accepted yet. A small BPF program copies the bytes
//! (`bpf_probe_read_kernel`). It changes nothing; an address without memory is an error.
#![expect(unsafe_code, reason = "bpf(2) and a mapping of its map")]

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use memmap2::{MmapMut, MmapOptions};
use nix::{
    errno::Errno,
    libc::{self, c_long},
};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::fault::{self, Novelty};

/// The kernel's type information. Only it says where the members of the kernel's structures are.
pub const TYPES: &str = "/sys/kernel/btf/vmlinux";

/// Commands of `bpf(2)` (`enum bpf_cmd`, `linux/bpf.h`).
const MAP_CREATE: c_long = 0;
const PROG_LOAD: c_long = 5;
const PROG_RUN: c_long = 10;

/// `BPF_MAP_TYPE_ARRAY` and `BPF_F_MMAPABLE`, since Linux 5.5.
const ARRAY: u32 = 2;
const MAPPABLE: u32 = 1 << 10;

/// `BPF_PROG_TYPE_SYSCALL`, since Linux 5.14, and `BPF_F_SLEEPABLE`, which it needs.
const SYSCALL: u32 = 31;
const SLEEPABLE: u32 = 1 << 4;

/// Functions of the kernel (`enum bpf_func_id`).
const MAP_LOOKUP: i32 = 1;
const CURRENT_TASK: i32 = 35;
const READ_KERNEL: i32 = 113;

/// The most bytes of one read: one page.
const CHUNK_BYTES: u32 = 4096;

/// An address in the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KernelAddr(pub u64);

impl KernelAddr {
    /// Whether it is the null pointer.
    pub fn is_null(self) -> bool {
        self.0 == 0
    }

    /// Returns the address `bytes` after it.
    pub fn plus(self, bytes: u64) -> Self {
        Self(self.0.wrapping_add(bytes))
    }

    /// Returns the address `bytes` before it.
    pub fn minus(self, bytes: u64) -> Self {
        Self(self.0.wrapping_sub(bytes))
    }
}

/// `struct bpf_insn`.
#[derive(Clone, Copy, IntoBytes, Immutable)]
#[repr(C)]
struct Step {
    code: u8,
    /// The target in the lower half, the source in the upper half.
    registers: u8,
    offset: i16,
    operand: i32,
}

/// The part of `union bpf_attr` for `BPF_MAP_CREATE`.
#[derive(Default, IntoBytes, Immutable)]
#[repr(C)]
struct MapAttr {
    kind: u32,
    key_bytes: u32,
    value_bytes: u32,
    entries: u32,
    flags: u32,
}

/// The part for `BPF_PROG_LOAD`.
#[derive(Default, IntoBytes, Immutable)]
#[repr(C)]
struct LoadAttr {
    kind: u32,
    count: u32,
    steps: u64,
    license: u64,
    log_level: u32,
    log_bytes: u32,
    log: u64,
    version: u32,
    flags: u32,
}

/// The part for `BPF_PROG_RUN`.
#[derive(Default, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct RunAttr {
    program: u32,
    result: u32,
    in_bytes: u32,
    out_bytes: u32,
    input: u64,
    output: u64,
    repeat: u32,
    duration: u32,
    context_bytes: u32,
    context_out_bytes: u32,
    context: u64,
    context_out: u64,
}

const _: () = assert!(size_of::<Step>() == 8 && size_of::<MapAttr>() == 20);
const _: () = assert!(size_of::<LoadAttr>() == 48 && size_of::<RunAttr>() == 64);

/// The argument of the program.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Wanted {
    /// The address; 0 asks for the address of the current task.
    address: u64,
    bytes: u64,
}

/// Calls `bpf(2)`.
///
/// # Safety
/// All addresses in `attr` must be valid for the command.
unsafe fn bpf<T: IntoBytes + Immutable>(command: c_long, attr: &mut T) -> nix::Result<i32> {
    let at = (&raw mut *attr).cast::<u8>();
    // SAFETY: `attr` is exclusively borrowed and has the given size; the caller vouches for the
    // addresses in it.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, at, size_of::<T>()) };
    Errno::result(result).map(|result| i32::try_from(result).expect("a descriptor or 0"))
}

/// Returns the program: it copies `Wanted::bytes` at `Wanted::address` into the only value of the
/// map.
fn program(map: i32) -> [Step; 24] {
    let step = |code: u8, target: u8, source: u8, offset: i16, operand: i32| Step {
        code,
        registers: target | source << 4,
        offset,
        operand,
    };
    let (copy, set, add, call, exit) = (0xbf, 0xb7, 0x07, 0x85, 0x95);
    let (load, store, store_number) = (0x79, 0x7b, 0x7a);
    let (if_not, if_at_most) = (0x55, 0xb5);
    let failed = -libc::EINVAL;
    [
        step(copy, 6, 1, 0, 0),
        // The key of the map, on the stack.
        step(store_number, 10, 0, -8, 0),
        // A pseudo-step of two, with the map.
        step(0x18, 1, 1, 0, map),
        step(0, 0, 0, 0, 0),
        step(copy, 2, 10, 0, 0),
        step(add, 2, 0, 0, -8),
        step(call, 0, 0, 0, MAP_LOOKUP),
        step(if_not, 0, 0, 2, 0),
        step(set, 0, 0, 0, failed),
        step(exit, 0, 0, 0, 0),
        step(copy, 7, 0, 0, 0),
        step(load, 3, 6, 0, 0),
        step(load, 2, 6, 8, 0),
        step(if_not, 3, 0, 4, 0),
        step(call, 0, 0, 0, CURRENT_TASK),
        step(store, 7, 0, 0, 0),
        step(set, 0, 0, 0, 0),
        step(exit, 0, 0, 0, 0),
        // The verifier wants a bound.
        step(if_at_most, 2, 0, 2, CHUNK_BYTES.cast_signed()),
        step(set, 0, 0, 0, failed),
        step(exit, 0, 0, 0, 0),
        step(copy, 1, 7, 0, 0),
        step(call, 0, 0, 0, READ_KERNEL),
        step(exit, 0, 0, 0, 0),
    ]
}

/// Access to the memory of the kernel.
#[derive(Debug)]
pub struct KernelMemory {
    program: OwnedFd,
    value: MmapMut,
}

impl KernelMemory {
    /// Loads the program.
    ///
    /// # Errors
    /// `EPERM` without `CAP_BPF` and `CAP_PERFMON`, or if the kernel is locked down; `ENOSYS` or
    /// `EINVAL` from a kernel that lacks such programs.
    pub fn open() -> nix::Result<Self> {
        if fault::is_without(Novelty::KernelMemory) {
            return Err(Errno::EPERM);
        }
        let mut attr = MapAttr {
            kind: ARRAY,
            key_bytes: 4,
            value_bytes: CHUNK_BYTES,
            entries: 1,
            flags: MAPPABLE,
        };
        // SAFETY: there are no addresses in it. The kernel has just created the descriptor.
        let map = unsafe { OwnedFd::from_raw_fd(bpf(MAP_CREATE, &mut attr)?) };
        // SAFETY: this process alone has the map, and only the program writes to it, while no
        // reference to its bytes exists.
        let value = unsafe { MmapOptions::new().len(CHUNK_BYTES as usize).map_mut(&map) };
        let value = value.map_err(|error| super::errno(&error))?;
        let steps = program(map.as_raw_fd());
        let license = c"GPL";
        let mut attr = LoadAttr {
            kind: SYSCALL,
            count: u32::try_from(steps.len()).expect("there are a few"),
            steps: steps.as_ptr() as u64,
            license: license.as_ptr() as u64,
            flags: SLEEPABLE,
            ..LoadAttr::default()
        };
        // SAFETY: the steps and the license outlive the call, which only reads them.
        let program = unsafe { OwnedFd::from_raw_fd(bpf(PROG_LOAD, &mut attr)?) };
        Ok(Self { program, value })
    }

    fn run(&mut self, mut wanted: Wanted) -> nix::Result<()> {
        let mut attr = RunAttr {
            program: self.program.as_raw_fd().cast_unsigned(),
            context_bytes: u32::try_from(size_of::<Wanted>()).expect("16"),
            context: (&raw mut wanted) as u64,
            ..RunAttr::default()
        };
        // SAFETY: `wanted` outlives the call, which reads it and writes it back.
        unsafe { bpf(PROG_RUN, &mut attr)? };
        match attr.result.cast_signed() {
            0 => Ok(()),
            error => Err(Errno::from_raw(error.saturating_neg())),
        }
    }

    /// Returns the `task_struct` of the calling thread.
    ///
    /// # Errors
    /// The errors of `bpf(2)`.
    pub fn current_task(&mut self) -> nix::Result<KernelAddr> {
        self.run(Wanted { address: 0, bytes: 8 })?;
        let bytes = self.value[..8].try_into().expect("8 bytes");
        Ok(KernelAddr(u64::from_ne_bytes(bytes)))
    }

    /// Reads the bytes at `address`.
    ///
    /// # Errors
    /// `EFAULT` if there is no memory of the kernel.
    pub fn read(&mut self, address: KernelAddr, bytes: &mut [u8]) -> nix::Result<()> {
        if address.is_null() {
            return Err(Errno::EFAULT);
        }
        let mut at = address;
        for chunk in bytes.chunks_mut(CHUNK_BYTES as usize) {
            self.run(Wanted { address: at.0, bytes: chunk.len() as u64 })?;
            chunk.copy_from_slice(&self.value[..chunk.len()]);
            at = at.plus(chunk.len() as u64);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::skip::skip;

    #[test]
    fn privileged_the_current_task_is_read_and_nothing_is_an_error() {
        let memory = KernelMemory::open();
        let mut memory = memory.unwrap_or_else(|_| skip("CAP_BPF and CAP_PERFMON"));
        let task = memory.current_task().unwrap();
        assert!(!task.is_null());
        let mut bytes = vec![0; 3 * 1024];
        memory.read(task, &mut bytes).unwrap();
        assert!(bytes.iter().any(|byte| *byte != 0));
        assert!(memory.read(KernelAddr(0), &mut bytes).is_err());
        assert!(memory.read(KernelAddr(0x1000), &mut bytes).is_err());
    }
}
