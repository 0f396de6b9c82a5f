//! Registers, the extended ones included, in threads that never leave user
//! mode around the checkpoint.

use std::{
    arch::asm,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use crate::{
    Row,
    kit::{Checkpoint, Verdict, lacks, nap, same},
};

pub const ROWS: &[Row] = &[
    ("registers_general", general),
    ("registers_sse", sse),
    ("registers_avx", avx),
    ("registers_avx512", avx512),
    ("registers_x87", x87),
    ("segment_bases", segment_bases),
    ("local_descriptors", local_descriptors),
];

/// What a spinning thread and its starter share.
#[repr(C, align(64))]
#[derive(Debug)]
struct Spin {
    /// Set by the thread as soon as its registers are loaded.
    loaded: AtomicU32,
    /// Set by the starter after the checkpoint.
    stop: AtomicU32,
}

/// Runs a body that loads registers, spins and compares them, around the
/// checkpoint.
fn spinning(
    checkpoint: &Checkpoint,
    body: impl FnOnce(&Spin) -> Verdict + Send + 'static,
) -> Verdict {
    let spin = Arc::new(Spin { loaded: AtomicU32::new(0), stop: AtomicU32::new(0) });
    let shared = spin.clone();
    let thread = checkpoint.thread(move |thread| {
        thread.announce();
        body(&shared)
    })?;
    super::kit::wait_until("the registers", || spin.loaded.load(Ordering::SeqCst) == 1)?;
    checkpoint.wait();
    // Long enough for a few switches of context.
    nap(20);
    spin.stop.store(1, Ordering::SeqCst);
    thread.join()
}

/// Bytes for registers, different in each.
fn contents<const N: usize>(seed: u64) -> Vec<[u64; N]> {
    let word = |at: usize| (seed + at as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (0..32).map(|register| std::array::from_fn(|lane| word(register * N + lane))).collect()
}

fn general(checkpoint: &Checkpoint) -> Verdict {
    spinning(checkpoint, |spin| {
        let mut values: [u64; 12] = std::array::from_fn(|at| 0x1111_2222_3333_0000 + at as u64);
        let before = values;
        let flags: u64;
        // SAFETY: the loop only reads and writes the two words of `spin`; rbx
        // and rbp are put back.
        unsafe {
            asm!(
                "push rbx",
                "push rbp",
                "mov rbx, 0x7777666655554444",
                "mov rbp, 0x0123456789abcdef",
                "mov dword ptr [rdi], 1",
                "2:",
                "pause",
                "cmp dword ptr [rdi + 4], 0",
                "je 2b",
                // The direction and carry flags are the ones nothing above changes.
                "mov rax, 0x7777666655554444",
                "cmp rbx, rax",
                "jne 3f",
                "mov rax, 0x0123456789abcdef",
                "cmp rbp, rax",
                "jne 3f",
                "xor eax, eax",
                "jmp 4f",
                "3:",
                "mov eax, 1",
                "4:",
                "pop rbp",
                "pop rbx",
                in("rdi") spin,
                out("rax") flags,
                inout("rcx") values[0], inout("rdx") values[1], inout("rsi") values[2],
                inout("r8") values[3], inout("r9") values[4], inout("r10") values[5],
                inout("r11") values[6], inout("r12") values[7], inout("r13") values[8],
                inout("r14") values[9], inout("r15") values[10],
            );
        }
        same("rbx and rbp", 0, flags)?;
        same("general registers", before, values)
    })
}

/// Loads the registers of one kind, spins, and stores them.
macro_rules! vector {
    ($spin:expr, $table:expr, $found:expr, $mov:literal, $name:literal, $size:literal,
     [$($number:literal)*], $clobber:tt) => {
        // SAFETY: the processor has the registers; the tables have room for
        // 32 of them; only those and the words of `spin` are touched.
        unsafe {
            asm!(
                $(concat!($mov, " ", $name, $number, ", [rsi + ", $number, " * ", $size, "]"),)*
                "mov dword ptr [rdi], 1",
                "2:",
                "pause",
                "cmp dword ptr [rdi + 4], 0",
                "je 2b",
                $(concat!($mov, " [rdx + ", $number, " * ", $size, "], ", $name, $number),)*
                in("rdi") $spin,
                in("rsi") $table.as_ptr(),
                in("rdx") $found.as_mut_ptr(),
                out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _,
                out("xmm5") _, out("xmm6") _, out("xmm7") _, out("xmm8") _, out("xmm9") _,
                out("xmm10") _, out("xmm11") _, out("xmm12") _, out("xmm13") _,
                out("xmm14") _, out("xmm15") _,
            );
        }
    };
}

fn sse(checkpoint: &Checkpoint) -> Verdict {
    spinning(checkpoint, |spin| {
        let table = contents::<2>(1);
        let mut found = vec![[0_u64; 2]; 32];
        let (control, mut after) = (0x5f80_u32 | 0x40, 0_u32);
        let mut old = 0_u32;
        // SAFETY: the words outlive the instructions; the value only rounds
        // otherwise and masks exceptions.
        unsafe {
            asm!("stmxcsr [{}]", in(reg) &raw mut old);
            asm!("ldmxcsr [{}]", in(reg) &raw const control);
        }
        vector!(spin, table, found, "movups", "xmm", "16",
            ["0" "1" "2" "3" "4" "5" "6" "7" "8" "9" "10" "11" "12" "13" "14" "15"], ());
        // SAFETY: as above.
        unsafe {
            asm!("stmxcsr [{}]", in(reg) &raw mut after);
            asm!("ldmxcsr [{}]", in(reg) &raw const old);
        }
        same("mxcsr", control, after)?;
        same("xmm0 to xmm15", &table[..16], &found[..16])
    })
}

fn avx(checkpoint: &Checkpoint) -> Verdict {
    if !std::arch::is_x86_feature_detected!("avx") {
        return lacks("a processor with AVX");
    }
    spinning(checkpoint, |spin| {
        let table = contents::<4>(2);
        let mut found = vec![[0_u64; 4]; 32];
        vector!(spin, table, found, "vmovups", "ymm", "32",
            ["0" "1" "2" "3" "4" "5" "6" "7" "8" "9" "10" "11" "12" "13" "14" "15"], ());
        same("ymm0 to ymm15", &table[..16], &found[..16])
    })
}

fn avx512(checkpoint: &Checkpoint) -> Verdict {
    if !std::arch::is_x86_feature_detected!("avx512bw") {
        return lacks("a processor with AVX-512");
    }
    spinning(checkpoint, |spin| {
        let table = contents::<8>(3);
        let mut found = vec![[0_u64; 8]; 32];
        let masks: [u64; 8] = std::array::from_fn(|at| 0x0101_0101_0101_0101 << at);
        let mut masks_found = [0_u64; 8];
        masked(spin, &table, &mut found, &masks, &mut masks_found);
        same("zmm0 to zmm31", &table[..], &found[..])?;
        same("k0 to k7", masks, masks_found)
    })
}

#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn masked_inner(
    spin: &Spin,
    table: &[[u64; 8]],
    found: &mut [[u64; 8]],
    masks: &[u64; 8],
    masks_found: &mut [u64; 8],
) {
    macro_rules! body {
        ([$($number:literal)*], [$($mask:literal)*]) => {
            // SAFETY: the tables have 32 and 8 entries; only the registers
            // named and the words of `spin` are touched.
            unsafe {
                asm!(
                    $(concat!("vmovups zmm", $number, ", [rsi + ", $number, " * 64]"),)*
                    $(concat!("kmovq k", $mask, ", [r8 + ", $mask, " * 8]"),)*
                    "mov dword ptr [rdi], 1",
                    "2:",
                    "pause",
                    "cmp dword ptr [rdi + 4], 0",
                    "je 2b",
                    $(concat!("vmovups [rdx + ", $number, " * 64], zmm", $number),)*
                    $(concat!("kmovq [r9 + ", $mask, " * 8], k", $mask),)*
                    "vzeroupper",
                    in("rdi") spin,
                    in("rsi") table.as_ptr(),
                    in("rdx") found.as_mut_ptr(),
                    in("r8") masks.as_ptr(),
                    in("r9") masks_found.as_mut_ptr(),
                    out("zmm0") _, out("zmm1") _, out("zmm2") _, out("zmm3") _, out("zmm4") _,
                    out("zmm5") _, out("zmm6") _, out("zmm7") _, out("zmm8") _, out("zmm9") _,
                    out("zmm10") _, out("zmm11") _, out("zmm12") _, out("zmm13") _,
                    out("zmm14") _, out("zmm15") _, out("zmm16") _, out("zmm17") _,
                    out("zmm18") _, out("zmm19") _, out("zmm20") _, out("zmm21") _,
                    out("zmm22") _, out("zmm23") _, out("zmm24") _, out("zmm25") _,
                    out("zmm26") _, out("zmm27") _, out("zmm28") _, out("zmm29") _,
                    out("zmm30") _, out("zmm31") _,
                    out("k1") _, out("k2") _, out("k3") _, out("k4") _, out("k5") _,
                    out("k6") _, out("k7") _,
                );
            }
        };
    }
    body!(
        ["0" "1" "2" "3" "4" "5" "6" "7" "8" "9" "10" "11" "12" "13" "14" "15" "16" "17" "18"
         "19" "20" "21" "22" "23" "24" "25" "26" "27" "28" "29" "30" "31"],
        ["0" "1" "2" "3" "4" "5" "6" "7"]
    );
}

fn masked(
    spin: &Spin,
    table: &[[u64; 8]],
    found: &mut [[u64; 8]],
    masks: &[u64; 8],
    masks_found: &mut [u64; 8],
) {
    // SAFETY: the caller has looked whether the processor has AVX-512.
    unsafe { masked_inner(spin, table, found, masks, masks_found) }
}

fn x87(checkpoint: &Checkpoint) -> Verdict {
    spinning(checkpoint, |spin| {
        let (value, other) = (1234.5_f64, -0.125_f64);
        let (mut out, mut out_other) = (0.0_f64, 0.0_f64);
        let (control, mut after) = (0x0c7f_u16, 0_u16);
        // SAFETY: the words outlive the instructions, the register stack is
        // left as empty as it was, and the control word is put back.
        unsafe {
            asm!(
                "fninit",
                "fldcw [{control}]",
                "fld qword ptr [{value}]",
                "fld qword ptr [{other}]",
                "mov dword ptr [{spin}], 1",
                "2:",
                "pause",
                "cmp dword ptr [{spin} + 4], 0",
                "je 2b",
                "fstp qword ptr [{out_other}]",
                "fstp qword ptr [{out}]",
                "fnstcw [{after}]",
                "fninit",
                control = in(reg) &raw const control,
                value = in(reg) &raw const value,
                other = in(reg) &raw const other,
                spin = in(reg) spin,
                out = in(reg) &raw mut out,
                out_other = in(reg) &raw mut out_other,
                after = in(reg) &raw mut after,
                out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
                out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _,
            );
        }
        same("x87 control word", control, after)?;
        same("x87 stack", (value, other), (out, out_other))
    })
}

fn segment_bases(checkpoint: &Checkpoint) -> Verdict {
    const ARCH_SET_GS: i32 = 0x1001; // uapi/asm/prctl.h
    const ARCH_GET_FS: i32 = 0x1003;
    const ARCH_GET_GS: i32 = 0x1004;
    let bases = || -> Result<(u64, u64), String> {
        let (mut fs, mut gs) = (0_u64, 0_u64);
        sys!(syscall(libc::SYS_arch_prctl, ARCH_GET_FS, &raw mut fs))?;
        sys!(syscall(libc::SYS_arch_prctl, ARCH_GET_GS, &raw mut gs))?;
        Ok((fs, gs))
    };
    let mut threads = Vec::new();
    for number in 0..4_u64 {
        threads.push(checkpoint.thread(move |thread| {
            sys!(syscall(libc::SYS_arch_prctl, ARCH_SET_GS, 0x7000_0000_0000 + number * 16))?;
            let before = bases()?;
            thread.wait();
            same("fs and gs bases", before, bases()?)
        })?);
    }
    checkpoint.wait();
    threads.into_iter().try_for_each(super::kit::Thread::join)
}

/// A segment of the process's own, which no image has a place for.
fn local_descriptors(checkpoint: &Checkpoint) -> Verdict {
    // Entry 0: base 0, 4 GiB, of 32 bits, in pages, usable (`struct user_desc`).
    let mut entry = [0_u32, 0, 0xf_ffff, 0x51];
    sys!(syscall(libc::SYS_modify_ldt, 1, entry.as_mut_ptr(), size_of_val(&entry)))?;
    checkpoint.wait();
    let mut read = 0_u64;
    let bytes = sys!(syscall(libc::SYS_modify_ldt, 0, &raw mut read, size_of_val(&read)))?;
    same("bytes of the table", 8, bytes)?;
    ensure!(read != 0, "the entry has gone");
    Ok(())
}
