//! What a processor can do, as images record it (`cpuinfo.img`).

use crate::proto::CpuinfoX86Entry;

/// The layout of `capability`: version 1 has fewer words.
const VERSION: u32 = 2;
const WORDS: [(u32, usize); 2] = [(1, 12), (VERSION, 19)];

/// The words of `capability`, in the order of the images.
mod word {
    pub const BASE_EDX: usize = 0;
    pub const EXTENDED_EDX: usize = 1;
    pub const LINUX: usize = 3;
    pub const BASE_ECX: usize = 4;
    pub const EXTENDED_ECX: usize = 6;
    pub const SEVEN_EBX: usize = 9;
    pub const XSAVE_EAX: usize = 10;
    pub const SEVEN_ECX: usize = 11;
    pub const SIZES_EBX: usize = 13;
    pub const SEVEN_EDX: usize = 18;
}

/// A bit of a word, and its name in the `flags` of `/proc/cpuinfo`.
type Flag = (u32, &'static str);

const FPU: Flag = (0, "fpu");
const FXSR: Flag = (24, "fxsr");
const OSXSAVE: Flag = (27, "osxsave");
const XSAVES: Flag = (3, "xsaves");

/// Instructions that programs may have found out about.
const INSTRUCTIONS: &[(usize, &[Flag])] = &[
    (
        word::BASE_EDX,
        &[
            FPU,
            (4, "tsc"),
            (8, "cx8"),
            (11, "sep"),
            (15, "cmov"),
            (19, "clflush"),
            (23, "mmx"),
            FXSR,
            (25, "sse"),
            (26, "sse2"),
        ],
    ),
    (
        word::EXTENDED_EDX,
        &[(11, "syscall"), (22, "mmxext"), (27, "rdtscp"), (30, "3dnowext"), (31, "3dnow")],
    ),
    (word::LINUX, &[(16, "rep_good"), (20, "nopl")]),
    (
        word::BASE_ECX,
        &[
            (0, "sse3"),
            (1, "pclmulqdq"),
            (3, "monitor"),
            (9, "ssse3"),
            (12, "fma"),
            (13, "cx16"),
            (19, "sse4_1"),
            (20, "sse4_2"),
            (22, "movbe"),
            (23, "popcnt"),
            (25, "aes"),
            (26, "xsave"),
            OSXSAVE,
            (28, "avx"),
            (29, "f16c"),
            (30, "rdrand"),
        ],
    ),
    (
        word::EXTENDED_ECX,
        &[
            (5, "abm"),
            (6, "sse4a"),
            (7, "misalignsse"),
            (8, "3dnowprefetch"),
            (11, "xop"),
            (16, "fma4"),
            (21, "tbm"),
        ],
    ),
    (
        word::SEVEN_EBX,
        &[
            (0, "fsgsbase"),
            (3, "bmi1"),
            (4, "hle"),
            (5, "avx2"),
            (8, "bmi2"),
            (9, "erms"),
            (11, "rtm"),
            (14, "mpx"),
            (16, "avx512f"),
            (17, "avx512dq"),
            (18, "rdseed"),
            (19, "adx"),
            (21, "avx512ifma"),
            (23, "clflushopt"),
            (24, "clwb"),
            (26, "avx512pf"),
            (27, "avx512er"),
            (28, "avx512cd"),
            (29, "sha_ni"),
            (30, "avx512bw"),
            (31, "avx512vl"),
        ],
    ),
    (word::XSAVE_EAX, &[(0, "xsaveopt"), (1, "xsavec"), (2, "xgetbv1")]),
    (
        word::SEVEN_ECX,
        &[
            (1, "avx512vbmi"),
            (6, "avx512_vbmi2"),
            (8, "gfni"),
            (9, "vaes"),
            (10, "vpclmulqdq"),
            (11, "avx512_vnni"),
            (12, "avx512_bitalg"),
            (14, "avx512_vpopcntdq"),
            (22, "rdpid"),
        ],
    ),
    (word::SIZES_EBX, &[(0, "clzero")]),
    (word::SEVEN_EDX, &[(2, "avx512_4vnniw"), (3, "avx512_4fmaps")]),
];

/// What is compared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Aspects {
    /// The registers that the kernel saves, and their sizes.
    pub registers: bool,
    /// The instructions.
    pub instructions: bool,
    /// Every feature, also one that only a kernel uses.
    pub everything: bool,
}

/// Returns how a processor differs from that of an image, as far as the processes may notice; none if
/// they cannot.
///
/// # Errors
/// A defect of the image.
pub fn differences(
    image: &CpuinfoX86Entry,
    here: &CpuinfoX86Entry,
    aspects: Aspects,
) -> Result<Vec<String>, String> {
    let version = image.capability_ver;
    let Some((_, words)) = WORDS.iter().find(|(known, _)| *known == version) else {
        return Err(format!("capability_ver is {version}, expected 1 or {VERSION}"));
    };
    if image.capability.len() != *words {
        let found = image.capability.len();
        return Err(format!("capability has {found} words, expected {words}"));
    }
    let known = image.capability.iter().zip(&here.capability);
    let lacks: Vec<u32> = known.clone().map(|(there, here)| there & !here).collect();
    let lacks_flag =
        |word: usize, (bit, _): &Flag| lacks.get(word).is_some_and(|lacks| lacks & (1 << bit) != 0);
    let mut found = Vec::new();
    if aspects.registers {
        for (word, flag) in [
            (word::BASE_EDX, FPU),
            (word::BASE_EDX, FXSR),
            (word::BASE_ECX, OSXSAVE),
            (word::XSAVE_EAX, XSAVES),
        ] {
            if lacks_flag(word, &flag) {
                found.push(format!("it lacks {}", flag.1));
            }
        }
        let mask = image.xfeatures_mask.unwrap_or(0) & !here.xfeatures_mask.unwrap_or(0);
        if mask != 0 {
            found.push(format!("it lacks the registers {mask:#x} of XSAVE"));
        }
        for (what, there, here) in [
            ("the area of XSAVE", image.xsave_size, here.xsave_size),
            ("the largest area of XSAVE", image.xsave_size_max, here.xsave_size_max),
        ] {
            if there.is_some_and(|there| Some(there) != here) {
                let (there, here) = (there.unwrap_or(0), here.unwrap_or(0));
                found.push(format!("{what} has {here} bytes, not {there}"));
            }
        }
    }
    if aspects.instructions {
        let names = INSTRUCTIONS.iter().flat_map(|(word, flags)| {
            flags.iter().filter(|flag| lacks_flag(*word, flag)).map(|(_, name)| *name)
        });
        let names: Vec<&str> = names.collect();
        if !names.is_empty() {
            found.push(format!("it lacks {}", names.join(", ")));
        }
    }
    if aspects.everything {
        let words: Vec<String> = known
            .enumerate()
            .filter(|(_, (there, here))| there != here)
            .map(|(at, (there, here))| format!("{at} ({here:#x}, not {there:#x})"))
            .collect();
        if !words.is_empty() {
            found.push(format!("words of its features differ: {}", words.join(", ")));
        }
    }
    Ok(found)
}

#[cfg(target_arch = "x86_64")]
pub use here::describe;

#[cfg(target_arch = "x86_64")]
mod here {
    use std::arch::x86_64::{__cpuid, __cpuid_count};

    use super::{FXSR, VERSION, word};
    use crate::proto::{CpuinfoX86Entry, cpuinfo_x86_entry::Vendor};

    /// `CPUID.(EAX=0DH)`: the area of XSAVE.
    const XSAVE: u32 = 0xd;

    /// Bits 3 of word 3 that are always there on x86-64: `rep_good`, `nopl`, `cpuid`.
    const REP_GOOD: u32 = 1 << 16;
    const NOPL_AND_CPUID: u32 = 1 << 20 | 1 << 25;

    /// Components of XSAVE that a program may use, with the word and the bit by which the processor has
    /// them (`asm/fpu/types.h`).
    const COMPONENTS: [(u32, usize, u32); 9] = [
        (0, word::BASE_EDX, 0),
        (1, word::BASE_EDX, 25),
        (2, word::BASE_ECX, 28),
        (3, word::SEVEN_EBX, 14),
        (4, word::SEVEN_EBX, 14),
        (5, word::SEVEN_EBX, 16),
        (6, word::SEVEN_EBX, 16),
        (7, word::SEVEN_EBX, 16),
        (9, word::SEVEN_ECX, 3),
    ];

    /// Components that CRIU 4.2 leaves out, and whose presence in an image it takes for a difference.
    const LEFT_OUT: u64 = 1 << 1 | 1 << 3;

    /// The last plain leaf with a word of its own, which is of use only with the bit before it.
    const QUALITY: u32 = 0xf;
    const QUALITY_OF_CACHE: u32 = 1 << 1;

    /// Describes the processor that this thread runs on.
    ///
    /// # Errors
    /// It is one that the images do not know.
    pub fn describe() -> Result<CpuinfoX86Entry, String> {
        let first = __cpuid(0);
        let name = [first.ebx, first.edx, first.ecx].map(u32::to_le_bytes).concat();
        let vendor = match name.as_slice() {
            b"GenuineIntel" => Vendor::Intel,
            b"AuthenticAMD" | b"HygonGenuine" => Vendor::Amd,
            other => {
                let name = String::from_utf8_lossy(other);
                return Err(format!("the images know processors of Intel and AMD, not {name}"));
            }
        };
        let base = __cpuid(1);
        let [stepping, model, family] = [0, 4, 8].map(|at| base.eax >> at & 0xf);
        let model = if family >= 6 { model + ((base.eax >> 16 & 0xf) << 4) } else { model };
        let family = if family == 0xf { family + (base.eax >> 20 & 0xff) } else { family };
        let plain = |leaf: u32| (leaf <= first.eax).then(|| __cpuid_count(leaf, 0));
        let last = __cpuid(0x8000_0000).eax;
        let extended = |leaf: u32| (leaf <= last).then(|| __cpuid(leaf));
        let seven = plain(7);
        let quality = plain(QUALITY).map_or(0, |leaf| leaf.edx);
        let of_cache =
            if quality & QUALITY_OF_CACHE != 0 { __cpuid_count(QUALITY, 1).edx } else { 0 };
        let xsave = (first.eax >= XSAVE).then(|| __cpuid_count(XSAVE, 1).eax);
        let is_amd = vendor == Vendor::Amd;
        let has_rep = if is_amd { family >= 0x10 } else { family == 6 };
        let mut capability = vec![
            base.edx,
            extended(0x8000_0001).map_or(0, |leaf| leaf.edx),
            0,
            NOPL_AND_CPUID | if has_rep { REP_GOOD } else { 0 },
            base.ecx,
            0,
            extended(0x8000_0001).map_or(0, |leaf| leaf.ecx),
            0,
            0,
            seven.map_or(0, |leaf| leaf.ebx),
            xsave.unwrap_or(0),
            seven.map_or(0, |leaf| leaf.ecx),
            of_cache,
            extended(0x8000_0008).map_or(0, |leaf| leaf.ebx),
            plain(6).map_or(0, |leaf| leaf.eax),
            extended(0x8000_000a).map_or(0, |leaf| leaf.edx),
            quality,
            extended(0x8000_0007).map_or(0, |leaf| leaf.ebx),
            seven.map_or(0, |leaf| leaf.edx),
        ];
        if is_amd {
            // There, bit 31 means something else.
            capability[word::BASE_EDX] &= !(1 << 31);
        }
        debug_assert!(capability[word::BASE_EDX] & (1 << FXSR.0) != 0, "every x86-64 has it");
        let has = |word: usize, bit: u32| capability[word] & (1 << bit) != 0;
        let area = __cpuid_count(XSAVE, 0);
        let enabled = u64::from(area.edx) << 32 | u64::from(area.eax);
        let components = COMPONENTS.iter().filter(|(_, word, bit)| has(*word, *bit));
        let known = components.fold(0, |mask, (number, ..)| mask | 1_u64 << number);
        Ok(CpuinfoX86Entry {
            vendor_id: vendor.into(),
            cpu_family: family,
            model,
            stepping,
            capability_ver: VERSION,
            model_id: model_name(last),
            xfeatures_mask: Some(enabled & known & !LEFT_OUT),
            xsave_size: Some(area.ebx),
            xsave_size_max: Some(area.ecx),
            capability,
        })
    }

    /// Returns the name of the processor, which some have.
    fn model_name(last: u32) -> Option<Vec<u8>> {
        const LEAVES: std::ops::RangeInclusive<u32> = 0x8000_0002..=0x8000_0004;
        if last < *LEAVES.end() {
            return None;
        }
        let bytes: Vec<u8> = LEAVES
            .flat_map(|leaf| {
                let leaf = __cpuid(leaf);
                [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx].map(u32::to_le_bytes).concat()
            })
            .take_while(|byte| *byte != 0)
            .collect();
        let name = bytes.trim_ascii_start();
        (!name.is_empty()).then(|| name.to_vec())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: Aspects = Aspects { registers: true, instructions: true, everything: true };

    fn some() -> CpuinfoX86Entry {
        let mut capability = vec![0; 19];
        capability[word::BASE_EDX] = 1 << 25 | 1;
        capability[word::BASE_ECX] = 1 << 27 | 1 << 28;
        capability[word::SEVEN_EBX] = 1 << 16;
        CpuinfoX86Entry {
            capability_ver: 2,
            capability,
            xfeatures_mask: Some(0xe5),
            xsave_size: Some(2432),
            xsave_size_max: Some(2432),
            ..CpuinfoX86Entry::default()
        }
    }

    #[test]
    fn each_aspect_has_its_differences() {
        let (image, mut here) = (some(), some());
        assert_eq!(differences(&image, &here, ALL), Ok(vec![]));
        // More is no difference, except for everything.
        here.capability[word::SEVEN_EBX] |= 1;
        let but = Aspects { everything: false, ..ALL };
        assert_eq!(differences(&image, &here, but), Ok(vec![]));
        assert_eq!(
            differences(&image, &here, ALL),
            Ok(vec!["words of its features differ: 9 (0x10001, not 0x10000)".to_owned()])
        );
        here.capability[word::SEVEN_EBX] = 0;
        here.capability[word::BASE_ECX] = 1 << 28;
        here.xfeatures_mask = Some(5);
        here.xsave_size = Some(832);
        let registers = Aspects { registers: true, ..Aspects::default() };
        assert_eq!(
            differences(&image, &here, registers).unwrap(),
            [
                "it lacks osxsave",
                "it lacks the registers 0xe0 of XSAVE",
                "the area of XSAVE has 832 bytes, not 2432"
            ]
        );
        let instructions = Aspects { instructions: true, ..Aspects::default() };
        assert_eq!(
            differences(&image, &here, instructions).unwrap(),
            ["it lacks osxsave, avx512f"]
        );
        assert_eq!(differences(&image, &here, Aspects::default()), Ok(vec![]));
    }

    #[test]
    fn images_of_older_versions_have_fewer_words() {
        let mut image = some();
        image.capability_ver = 1;
        image.capability.truncate(12);
        assert_eq!(differences(&image, &some(), ALL), Ok(vec![]));
        image.capability.pop();
        assert!(differences(&image, &some(), ALL).unwrap_err().contains("11 words, expected 12"));
        image.capability_ver = 7;
        assert!(differences(&image, &some(), ALL).unwrap_err().contains("capability_ver is 7"));
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn this_processor_has_what_the_kernel_says() {
        let here = describe().unwrap();
        let info = std::fs::read_to_string("/proc/cpuinfo").unwrap();
        let value = |name: &str| {
            let line = info.lines().find(|line| line.starts_with(name)).unwrap();
            line.split(": ").nth(1).unwrap().to_owned()
        };
        assert_eq!(value("cpu family\t"), here.cpu_family.to_string());
        assert_eq!(value("model\t"), here.model.to_string());
        assert_eq!(value("stepping\t"), here.stepping.to_string());
        let flags = value("flags\t");
        for flag in flags.split_whitespace() {
            let known = INSTRUCTIONS.iter().find_map(|(word, flags)| {
                flags.iter().find(|(_, name)| *name == flag).map(|(bit, _)| (*word, *bit))
            });
            let Some((word, bit)) = known else { continue };
            assert!(here.capability[word] & (1 << bit) != 0, "{flag}");
        }
        assert_eq!(differences(&here, &here, ALL), Ok(vec![]));
    }
}
