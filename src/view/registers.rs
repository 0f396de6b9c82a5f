//! The registers of a thread, laid out as the kernel hands them to debuggers.

use crate::image::proto;

/// Bytes in the kernel's `user_regs_struct` (`asm/user_64.h`): 27 registers.
pub(super) const GENERAL_BYTES: usize = 27 * 8;

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
    feature: u64,
    offset: usize,
    bytes: usize,
}

const YMM: Component = component("ymmh_space", 2, 576, 256);
const BNDREGS: Component = component("bndreg_state", 3, 960, 64);
const BNDCSR: Component = component("bndcsr_state", 4, 1024, 64);
const OPMASK: Component = component("opmask_reg", 5, 1088, 64);
const ZMM_HI256: Component = component("zmm_upper", 6, 1152, 512);
const HI16_ZMM: Component = component("hi16_zmm", 7, 1664, 1024);
const PKRU: Component = component("pkru", 9, 2688, 8);

const fn component(name: &'static str, bit: u32, offset: usize, bytes: usize) -> Component {
    Component { name, feature: 1 << bit, offset, bytes }
}

/// Returns the general registers as `user_regs_struct`.
pub(super) fn general(regs: &proto::UserX86RegsEntry) -> [u8; GENERAL_BYTES] {
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
pub(super) fn legacy(regs: &proto::UserX86FpregsEntry) -> Result<Vec<u8>, String> {
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
pub(super) fn extended(regs: &proto::UserX86FpregsEntry) -> Result<Option<Vec<u8>>, String> {
    let Some(xsave) = &regs.xsave else { return Ok(None) };
    let components = [
        (YMM, words(&xsave.ymmh_space)),
        (BNDREGS, double_words(&xsave.bndreg_state)),
        (BNDCSR, double_words(&xsave.bndcsr_state)),
        (OPMASK, double_words(&xsave.opmask_reg)),
        (ZMM_HI256, double_words(&xsave.zmm_upper)),
        (HI16_ZMM, double_words(&xsave.hi16_zmm)),
        (PKRU, words(&xsave.pkru)),
    ];
    let mut area = legacy(regs)?;
    area.resize(LEGACY_BYTES + HEADER_BYTES, 0);
    let mut features = LEGACY_FEATURES;
    for (component, bytes) in components {
        if bytes.is_empty() {
            continue; // the processor did not have it
        }
        let bytes = exactly(component.name, component.bytes, bytes)?;
        features |= component.feature;
        area.resize(component.offset + component.bytes, 0);
        put(&mut area, component.offset, &bytes);
    }
    put(&mut area, FEATURES_AT, &features.to_le_bytes());
    // Components that are in use and were not dumped cannot be shown.
    put(&mut area, HEADER_AT, &(xsave.xstate_bv & features).to_le_bytes());
    Ok(Some(area))
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
