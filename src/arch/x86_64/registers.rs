//! The registers of a thread, laid out as the kernel hands them to debuggers.

use object::elf::NT_X86_XSTATE;

use crate::{
    arch::Notes,
    proto::{self, CoreEntry},
};

/// The end of the addresses that a process may have (`TASK_SIZE_MAX` with four
/// levels of page tables).
pub const ADDRESSES_END: u64 = 0x7fff_ffff_f000;

/// Bits of the control register of SSE that the processor refuses (`MXCSR`).
const NO_MXCSR: u32 = 0xfffd_0000;

/// Bytes in the kernel's `user_regs_struct` (`asm/user_64.h`): 27 registers.
const GENERAL_BYTES: usize = 27 * 8;

/// Bytes in the area that `FXSAVE` writes, and XSAVE's begins with.
const LEGACY_BYTES: usize = 512;

/// Where in the legacy area the kernel puts the mask of the features that may be
/// in the rest of it: in bytes that the processor leaves to software. Debuggers
/// tell the layout by it, and by the length.
const FEATURES_AT: usize = 464;

/// Where the XSAVE header is, which begins with the mask of the components that
/// are in use.
const HEADER_AT: usize = LEGACY_BYTES;

/// Bytes in the XSAVE header.
const HEADER_BYTES: usize = 64;

/// The x87 and SSE registers, which are in the legacy area.
const LEGACY_FEATURES: u64 = 0b11;

/// A component of the XSAVE area: its place in the standard format of Intel's
/// processors (Intel SDM, volume 1, section 13.5).
struct Component {
    name: &'static str,
    number: u32,
    offset: usize,
    bytes: usize,
}

impl Component {
    const fn feature(&self) -> u64 {
        1 << self.number
    }
}

const YMM: Component = component("ymmh_space", 2, 576, 256);
const BNDREGS: Component = component("bndreg_state", 3, 960, 64);
const BNDCSR: Component = component("bndcsr_state", 4, 1024, 64);
const OPMASK: Component = component("opmask_reg", 5, 1088, 64);
const ZMM_HI256: Component = component("zmm_upper", 6, 1152, 512);
const HI16_ZMM: Component = component("hi16_zmm", 7, 1664, 1024);
const PKRU: Component = component("pkru", 9, 2688, 8);

const fn component(name: &'static str, number: u32, offset: usize, bytes: usize) -> Component {
    Component { name, number, offset, bytes }
}

/// Where a processor has the components of its XSAVE area: the offset of the
/// component of this number, `None` if it has no such component.
#[cfg(any(test, target_arch = "x86_64"))]
type Offsets<'a> = &'a dyn Fn(u32) -> Option<usize>;

/// The components that the format has fields for, in the order of their numbers.
const COMPONENTS: [Component; 7] = [YMM, BNDREGS, BNDCSR, OPMASK, ZMM_HI256, HI16_ZMM, PKRU];

/// Returns the registers of a thread as the notes of a core file have them.
///
/// # Errors
/// What is wrong with the image: no registers, or those of 32-bit code.
pub(in crate::arch) fn notes(core: &CoreEntry) -> Result<Notes, String> {
    let info = core.thread_info.as_ref().ok_or("its image has no registers")?;
    if is_narrow(core) {
        return Err("it ran 32-bit code".into());
    }
    let others = extended(&info.fpregs)?.map(|area| (NT_X86_XSTATE, area));
    Ok(Notes {
        general: general(&info.gpregs).to_vec(),
        floating: legacy(&info.fpregs)?,
        others: others.into_iter().collect(),
    })
}

/// Whether a thread executed 32-bit code.
pub(in crate::arch) fn is_narrow(core: &CoreEntry) -> bool {
    let mode = core.thread_info.as_ref().and_then(|info| info.gpregs.mode);
    mode.is_some_and(|mode| mode != i32::from(proto::UserX86RegsMode::Native))
}

/// Reports registers that no thread can have: lengths, and what the kernel refuses of a
/// debugger (`putreg`, `arch/x86/kernel/ptrace.c`).
pub(in crate::arch) fn check_thread(core: &CoreEntry, wrong: &mut dyn FnMut(String)) {
    let Some(info) = &core.thread_info else {
        wrong("it has no registers".into());
        return;
    };
    if let Err(problem) = check(&info.fpregs) {
        wrong(problem);
    }
    if info.fpregs.mxcsr & NO_MXCSR != 0 {
        wrong(format!("its register mxcsr is {:#x}", info.fpregs.mxcsr));
    }
    check_general(&info.gpregs, wrong);
}

fn check_general(regs: &proto::UserX86RegsEntry, wrong: &mut dyn FnMut(String)) {
    /// Requested privilege level of user space; null is fine but for code and stack.
    const USER: u64 = 3;
    let selectors = [
        ("cs", regs.cs, true),
        ("ss", regs.ss, true),
        ("ds", regs.ds, false),
        ("es", regs.es, false),
        ("fs", regs.fs, false),
        ("gs", regs.gs, false),
    ];
    for (name, value, needed) in selectors {
        let user = value & USER == USER && value <= u64::from(u16::MAX);
        if !user && (needed || value != 0) {
            wrong(format!("its register {name} is {value:#x}"));
        }
    }
    for (name, value) in [("fs_base", regs.fs_base), ("gs_base", regs.gs_base)] {
        if value >= ADDRESSES_END {
            wrong(format!("its register {name} is {value:#x}"));
        }
    }
}

/// Returns the general registers as `user_regs_struct`.
fn general(regs: &proto::UserX86RegsEntry) -> [u8; GENERAL_BYTES] {
    let values: [u64; GENERAL_BYTES / 8] = [
        regs.r15,
        regs.r14,
        regs.r13,
        regs.r12,
        regs.bp,
        regs.bx,
        regs.r11,
        regs.r10,
        regs.r9,
        regs.r8,
        regs.ax,
        regs.cx,
        regs.dx,
        regs.si,
        regs.di,
        regs.orig_ax,
        regs.ip,
        regs.cs,
        regs.flags,
        regs.sp,
        regs.ss,
        regs.fs_base,
        regs.gs_base,
        regs.ds,
        regs.es,
        regs.fs,
        regs.gs,
    ];
    let mut bytes = [0; GENERAL_BYTES];
    for (place, value) in bytes.chunks_exact_mut(8).zip(values) {
        place.copy_from_slice(&value.to_le_bytes());
    }
    bytes
}

/// Returns the floating-point registers as `user_fpregs_struct`, which is the
/// legacy area.
///
/// # Errors
/// What is wrong with the entry: a set of registers of the wrong length.
fn legacy(regs: &proto::UserX86FpregsEntry) -> Result<Vec<u8>, String> {
    let mut area = vec![0; LEGACY_BYTES];
    for (offset, control) in [(0, regs.cwd), (2, regs.swd), (4, regs.twd), (6, regs.fop)] {
        put(&mut area, offset, &control.to_le_bytes()[..2]);
    }
    put(&mut area, 8, &regs.rip.to_le_bytes());
    put(&mut area, 16, &regs.rdp.to_le_bytes());
    put(&mut area, 24, &regs.mxcsr.to_le_bytes());
    put(&mut area, 28, &regs.mxcsr_mask.to_le_bytes());
    put(&mut area, 32, &exactly("st_space", 128, words(&regs.st_space))?);
    put(&mut area, 160, &exactly("xmm_space", 256, words(&regs.xmm_space))?);
    Ok(area)
}

/// Returns the XSAVE area in the standard format, without compaction; `None` if
/// the thread's processor had none.
///
/// Components are where Intel's processors have them; the format does not say
/// where the dumped one had them, and readers recognise this layout.
///
/// # Errors
/// As [`legacy`].
fn extended(regs: &proto::UserX86FpregsEntry) -> Result<Option<Vec<u8>>, String> {
    let Some(xsave) = &regs.xsave else { return Ok(None) };
    let mut area = legacy(regs)?;
    area.resize(LEGACY_BYTES + HEADER_BYTES, 0);
    let mut features = LEGACY_FEATURES;
    for (component, bytes) in components(xsave)? {
        features |= component.feature();
        area.resize(component.offset + component.bytes, 0);
        put(&mut area, component.offset, &bytes);
    }
    put(&mut area, FEATURES_AT, &features.to_le_bytes());
    // Components that are in use and were not dumped cannot be shown.
    put(&mut area, HEADER_AT, &(xsave.xstate_bv & features).to_le_bytes());
    Ok(Some(area))
}

/// Checks that every register has the bytes that the processor gives it.
///
/// # Errors
/// The first register that does not, and what was expected.
fn check(regs: &proto::UserX86FpregsEntry) -> Result<(), String> {
    legacy(regs)?;
    regs.xsave.as_ref().map_or(Ok(()), |xsave| components(xsave).map(drop))
}

/// Returns the components that were dumped, with their bytes.
fn components(xsave: &proto::UserX86XsaveEntry) -> Result<Vec<(Component, Vec<u8>)>, String> {
    let fields = [
        words(&xsave.ymmh_space),
        double_words(&xsave.bndreg_state),
        double_words(&xsave.bndcsr_state),
        double_words(&xsave.opmask_reg),
        double_words(&xsave.zmm_upper),
        double_words(&xsave.hi16_zmm),
        words(&xsave.pkru),
    ];
    let mut found = Vec::new();
    for (component, bytes) in COMPONENTS.into_iter().zip(fields) {
        // Empty: the processor did not have it.
        if !bytes.is_empty() {
            let bytes = exactly(component.name, component.bytes, bytes)?;
            found.push((component, bytes));
        }
    }
    Ok(found)
}

/// Puts dumped registers into an area that was read from a thread of this
/// processor, whose components are at `offsets`.
///
/// # Errors
/// As [`legacy`]; a component in use that this processor does not have.
#[cfg(any(test, target_arch = "x86_64"))]
pub(super) fn overwrite(
    area: &mut [u8],
    regs: &proto::UserX86FpregsEntry,
    offsets: Offsets,
) -> Result<(), String> {
    // The mask of what may be in the area is the processor's own.
    put(area, 0, &legacy(regs)?[..FEATURES_AT]);
    let mut used = LEGACY_FEATURES;
    if let Some(xsave) = &regs.xsave {
        used = xsave.xstate_bv;
        let mut known = LEGACY_FEATURES;
        for (component, bytes) in components(xsave)? {
            if used & component.feature() == 0 {
                continue;
            }
            known |= component.feature();
            let offset = offsets(component.number)
                .filter(|offset| offset + bytes.len() <= area.len())
                .ok_or_else(|| format!("this processor does not have {}", component.name))?;
            put(area, offset, &bytes);
        }
        used &= known;
    }
    if area.len() >= HEADER_AT + HEADER_BYTES {
        put(area, HEADER_AT, &used.to_le_bytes());
    }
    Ok(())
}

/// Components that may be in use without anything being lost if they are not
/// dumped: supervisor state that the kernel makes anew.
#[cfg(any(test, target_arch = "x86_64"))]
const SUPERVISOR: u64 = 1 << 8 | 1 << 10 | 1 << 11 | 1 << 12 | 1 << 13 | 1 << 15 | 1 << 16;

/// Returns what an area that was read from a thread of this processor says, for
/// an image.
///
/// # Errors
/// A component that is in use and that the format has no field for.
#[cfg(any(test, target_arch = "x86_64"))]
pub(super) fn from_area(
    area: &[u8],
    offsets: Offsets,
) -> Result<proto::UserX86FpregsEntry, String> {
    let word = |at: usize| u32::from_le_bytes(area[at..at + 4].try_into().expect("four bytes"));
    let double = |at: usize| u64::from_le_bytes(area[at..at + 8].try_into().expect("eight bytes"));
    let words = |at: usize, bytes: usize| (at..at + bytes).step_by(4).map(word).collect::<Vec<_>>();
    if area.len() < LEGACY_BYTES {
        return Err(format!("{} bytes of registers, {LEGACY_BYTES} expected", area.len()));
    }
    let mut entry = proto::UserX86FpregsEntry {
        cwd: word(0) & 0xffff,
        swd: word(0) >> 16,
        twd: word(4) & 0xffff,
        fop: word(4) >> 16,
        rip: double(8),
        rdp: double(16),
        mxcsr: word(24),
        mxcsr_mask: word(28),
        st_space: words(32, 128),
        xmm_space: words(160, 256),
        ..Default::default()
    };
    if area.len() < HEADER_AT + HEADER_BYTES {
        return Ok(entry);
    }
    let features = double(FEATURES_AT);
    let used = double(HEADER_AT);
    let mut xsave = proto::UserX86XsaveEntry::default();
    let mut known = LEGACY_FEATURES | SUPERVISOR;
    for component in COMPONENTS {
        let has = features & component.feature() != 0;
        let place = offsets(component.number)
            .filter(|offset| has && offset + component.bytes <= area.len());
        let Some(at) = place else { continue };
        known |= component.feature();
        // The kernel leaves what is not in use as it was.
        let mut bytes = area[at..at + component.bytes].to_vec();
        if used & component.feature() == 0 {
            bytes.fill(0);
        }
        let words: Vec<u32> = bytes
            .chunks_exact(4)
            .map(|word| u32::from_le_bytes(word.try_into().expect("four bytes")))
            .collect();
        let doubles: Vec<u64> = bytes
            .chunks_exact(8)
            .map(|word| u64::from_le_bytes(word.try_into().expect("eight bytes")))
            .collect();
        match component.name {
            "ymmh_space" => xsave.ymmh_space = words,
            "bndreg_state" => xsave.bndreg_state = doubles,
            "bndcsr_state" => xsave.bndcsr_state = doubles,
            "opmask_reg" => xsave.opmask_reg = doubles,
            "zmm_upper" => xsave.zmm_upper = doubles,
            "hi16_zmm" => xsave.hi16_zmm = doubles,
            _ => xsave.pkru = words,
        }
    }
    let unknown = used & !known;
    if unknown != 0 {
        return Err(format!("processor state {unknown:#x} (such as AMX tiles) is in use"));
    }
    xsave.xstate_bv = used & !SUPERVISOR;
    entry.xsave = Some(xsave);
    Ok(entry)
}

fn put(area: &mut [u8], offset: usize, bytes: &[u8]) {
    area[offset..offset + bytes.len()].copy_from_slice(bytes);
}

fn words(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn double_words(values: &[u64]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn exactly(name: &str, expected: usize, bytes: Vec<u8>) -> Result<Vec<u8>, String> {
    if bytes.len() == expected {
        Ok(bytes)
    } else {
        Err(format!("{name} has {} bytes, {expected} expected", bytes.len()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn registers() -> proto::UserX86FpregsEntry {
        proto::UserX86FpregsEntry {
            cwd: 0x37f,
            mxcsr: 0x1f80,
            st_space: (0..32).collect(),
            xmm_space: (100..164).collect(),
            ..Default::default()
        }
    }

    fn word(area: &[u8], offset: usize) -> u64 {
        u64::from_le_bytes(area[offset..offset + 8].try_into().unwrap())
    }

    #[test]
    fn the_area_is_as_long_as_the_processors_features_make_it() {
        let mut regs = registers();
        assert_eq!(extended(&regs).unwrap(), None);
        let mut xsave = proto::UserX86XsaveEntry { xstate_bv: 0x6_02ff, ..Default::default() };
        let mut length = |change: fn(&mut proto::UserX86XsaveEntry)| {
            change(&mut xsave);
            regs.xsave = Some(xsave.clone());
            let area = extended(&regs).unwrap().unwrap();
            assert_eq!(&area[..464], &legacy(&regs).unwrap()[..464]);
            assert_eq!(word(&area, 512), word(&area, 464));
            (area.len(), word(&area, 464))
        };
        assert_eq!(length(|_| ()), (576, 0x3));
        assert_eq!(length(|xsave| xsave.ymmh_space = vec![1; 64]), (832, 0x7));
        assert_eq!(length(|xsave| xsave.bndcsr_state = vec![1; 8]), (1088, 0x17));
        let avx512 = |xsave: &mut proto::UserX86XsaveEntry| {
            xsave.bndcsr_state = Vec::new();
            xsave.opmask_reg = vec![1; 8];
            xsave.zmm_upper = vec![1; 64];
            xsave.hi16_zmm = vec![1; 128];
        };
        assert_eq!(length(avx512), (2688, 0xe7));
        assert_eq!(length(|xsave| xsave.pkru = vec![1, 0]), (2696, 0x2e7));
    }

    #[test]
    fn areas_of_a_processor_are_read_and_written_back() {
        let places = |number: u32| match number {
            2 => Some(576),
            9 => Some(832),
            _ => None,
        };
        let mut area: Vec<u8> = (0..840_u32).map(|byte| byte.to_le_bytes()[0]).collect();
        put(&mut area, FEATURES_AT, &0x207_u64.to_le_bytes());
        put(&mut area, FEATURES_AT + 8, &[0; 40]);
        put(&mut area, HEADER_AT, &0x207_u64.to_le_bytes());
        put(&mut area, HEADER_AT + 8, &[0; 56]);
        put(&mut area, 416, &[0; 48]);
        let entry = from_area(&area, &places).unwrap();
        let mut written = vec![0; 840];
        put(&mut written, FEATURES_AT, &0x207_u64.to_le_bytes());
        overwrite(&mut written, &entry, &places).unwrap();
        assert_eq!(written, area);
        put(&mut area, HEADER_AT, &0x60207_u64.to_le_bytes());
        assert!(from_area(&area, &places).unwrap_err().contains("0x60000"));
        let wrong = overwrite(&mut written, &entry, &|_| None).unwrap_err();
        assert_eq!(wrong, "this processor does not have ymmh_space");
    }

    #[test]
    fn registers_of_another_length_are_errors() {
        let mut regs = registers();
        regs.st_space.pop();
        assert_eq!(legacy(&regs).unwrap_err(), "st_space has 124 bytes, 128 expected");
        let mut regs = registers();
        let ymmh_space = vec![0; 65];
        regs.xsave = Some(proto::UserX86XsaveEntry { ymmh_space, ..Default::default() });
        assert_eq!(extended(&regs).unwrap_err(), "ymmh_space has 260 bytes, 256 expected");
    }
}
