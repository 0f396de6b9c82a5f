//! Type information of the running kernel (`/sys/kernel/btf/vmlinux`, BTF,
//! `Documentation/bpf/btf.rst`): where members of structures are.

use std::collections::HashMap;

/// The first two bytes.
const MAGIC: u16 = 0xeb9f;

/// Kinds of types (`BTF_KIND_*`, `linux/btf.h`).
mod kind {
    pub(super) const INT: u32 = 1;
    pub(super) const ARRAY: u32 = 3;
    pub(super) const STRUCT: u32 = 4;
    pub(super) const UNION: u32 = 5;
    pub(super) const ENUM: u32 = 6;
    pub(super) const TYPEDEF: u32 = 8;
    pub(super) const RESTRICT: u32 = 11;
    pub(super) const FUNC_PROTO: u32 = 13;
    pub(super) const VAR: u32 = 14;
    pub(super) const DATASEC: u32 = 15;
    pub(super) const DECL_TAG: u32 = 17;
    pub(super) const TYPE_TAG: u32 = 18;
    pub(super) const ENUM64: u32 = 19;
}

/// The bytes of `struct btf_type`, and of each member of a structure.
const HEAD_BYTES: usize = 12;
const MEMBER_BYTES: usize = 12;

/// The section of variables that each processor has.
const PER_CPU_SECTION: &[u8] = b".data..percpu";

/// How deep structures may be nested in another one.
const DEPTH_MAX: u32 = 16;

/// The structures of a kernel.
#[derive(Debug)]
pub struct Btf {
    bytes: Vec<u8>,
    strings: usize,
    /// Where each type begins in `bytes`. Types are numbered from 1.
    types: Vec<usize>,
    /// The numbers of the structures.
    structures: HashMap<Vec<u8>, u32>,
}

impl Btf {
    /// Parses type information; `None` if it is malformed.
    pub fn parse(bytes: Vec<u8>) -> Option<Self> {
        let header = word(&bytes, 0)?;
        if header & 0xffff != u32::from(MAGIC) {
            return None;
        }
        let [header_len, types_at, types_len, strings_at] =
            [word(&bytes, 4)?, word(&bytes, 8)?, word(&bytes, 12)?, word(&bytes, 16)?]
                .map(|number| number as usize);
        let strings = header_len.checked_add(strings_at)?;
        let mut at = header_len.checked_add(types_at)?;
        let end = at.checked_add(types_len)?;
        if end > bytes.len() || strings > bytes.len() {
            return None;
        }
        let mut found = Self { bytes, strings, types: Vec::new(), structures: HashMap::new() };
        while at < end {
            found.types.push(at);
            let info = word(&found.bytes, at + 4)?;
            let (kind, count) = (info >> 24 & 0x1f, (info & 0xffff) as usize);
            if kind == kind::STRUCT
                && let Some(name) = found.text(word(&found.bytes, at)?)
                && !name.is_empty()
            {
                let number = u32::try_from(found.types.len()).ok()?;
                let name = name.to_owned();
                found.structures.insert(name, number);
            }
            at += HEAD_BYTES
                + match kind {
                    kind::INT | kind::VAR | kind::DECL_TAG => 4,
                    kind::ARRAY => 12,
                    kind::STRUCT | kind::UNION | kind::DATASEC | kind::ENUM64 => count * 12,
                    kind::ENUM | kind::FUNC_PROTO => count * 8,
                    _ => 0,
                };
        }
        Some(found)
    }

    /// Returns the offset in bytes of a member of a structure. `path` may lead through structures
    /// inside it (`a.b`); names of unnamed ones are left out.
    pub fn offset(&self, structure: &str, path: &str) -> Option<u64> {
        let mut number = *self.structures.get(structure.as_bytes())?;
        let mut offset = 0;
        for name in path.split('.') {
            let (bits, inner) = self.member(number, name.as_bytes(), 0)?;
            offset += u64::from(bits / 8);
            number = inner;
        }
        Some(offset)
    }

    /// Returns the size in bytes of a structure.
    pub fn size(&self, structure: &str) -> Option<u64> {
        let at = self.at(*self.structures.get(structure.as_bytes())?)?;
        word(&self.bytes, at + 8).map(u64::from)
    }

    /// Returns the offset in bytes of a variable that each processor has, in the section of these.
    pub fn per_cpu_variable(&self, name: &str) -> Option<u64> {
        for at in &self.types {
            let info = word(&self.bytes, at + 4)?;
            if info >> 24 & 0x1f != kind::DATASEC
                || self.text(word(&self.bytes, *at)?)? != PER_CPU_SECTION
            {
                continue;
            }
            for position in 0..(info & 0xffff) as usize {
                let entry = at + HEAD_BYTES + position * MEMBER_BYTES;
                let variable = self.at(word(&self.bytes, entry)?)?;
                if self.text(word(&self.bytes, variable)?)? == name.as_bytes() {
                    return word(&self.bytes, entry + 4).map(u64::from);
                }
            }
        }
        None
    }

    /// Returns the position in bits and the type of a member.
    fn member(&self, number: u32, name: &[u8], depth: u32) -> Option<(u32, u32)> {
        if depth > DEPTH_MAX {
            return None;
        }
        let at = self.at(number)?;
        let info = word(&self.bytes, at + 4)?;
        match info >> 24 & 0x1f {
            kind::STRUCT | kind::UNION => {}
            kind::TYPEDEF..=kind::RESTRICT | kind::TYPE_TAG => {
                return self.member(word(&self.bytes, at + 8)?, name, depth + 1);
            }
            _ => return None,
        }
        let has_bitfields = info >> 31 != 0;
        for position in 0..(info & 0xffff) as usize {
            let at = at + HEAD_BYTES + position * MEMBER_BYTES;
            let [text, inner, mut bits] =
                [word(&self.bytes, at)?, word(&self.bytes, at + 4)?, word(&self.bytes, at + 8)?];
            if has_bitfields {
                bits &= 0x00ff_ffff;
            }
            let found = self.text(text)?;
            if found == name {
                return Some((bits, inner));
            }
            if found.is_empty()
                && let Some((more, inner)) = self.member(inner, name, depth + 1)
            {
                return Some((bits + more, inner));
            }
        }
        None
    }

    fn at(&self, number: u32) -> Option<usize> {
        self.types.get((number as usize).checked_sub(1)?).copied()
    }

    fn text(&self, at: u32) -> Option<&[u8]> {
        self.bytes.get(self.strings + at as usize..)?.split(|byte| *byte == 0).next()
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `struct outer { u32 first; struct { u32 a; struct inner b; }; }`, `struct inner { u32 x, y; }`.
    fn sample() -> Vec<u8> {
        let strings = b"\0u32\0outer\0first\0a\0b\0inner\0x\0y\0.data..percpu\0";
        let name = |text: &str| {
            let text = [b"\0", text.as_bytes(), b"\0"].concat();
            let at = strings.windows(text.len()).position(|found| found == text).unwrap();
            u32::try_from(at + 1).unwrap()
        };
        let structure = |count: u32| kind::STRUCT << 24 | count;
        let types: Vec<u32> = [
            vec![name("u32"), kind::INT << 24, 4, 32],
            vec![name("inner"), structure(2), 8, name("x"), 1, 0, name("y"), 1, 32],
            vec![0, structure(2), 12, name("a"), 1, 0, name("b"), 2, 32],
            vec![name("outer"), structure(2), 16, name("first"), 1, 0, 0, 3, 32],
            vec![name("y"), kind::VAR << 24, 1, 0],
            vec![name(".data..percpu"), kind::DATASEC << 24 | 1, 64, 5, 24, 4],
        ]
        .concat();
        let len = u32::try_from(types.len() * 4).unwrap();
        let header =
            [u32::from(MAGIC) | 1 << 16, 24, 0, len, len, strings.len().try_into().unwrap()];
        let words = header.iter().chain(&types).flat_map(|word| word.to_le_bytes());
        words.chain(strings.iter().copied()).collect()
    }

    #[test]
    fn members_are_found_through_structures_with_and_without_names() {
        let btf = Btf::parse(sample()).unwrap();
        assert_eq!(btf.offset("outer", "first"), Some(0));
        assert_eq!(btf.offset("outer", "a"), Some(4));
        assert_eq!(btf.offset("outer", "b.y"), Some(12));
        assert_eq!(btf.offset("outer", "y"), None);
        assert_eq!(btf.offset("nothing", "y"), None);
        assert_eq!(btf.size("outer"), Some(16));
        assert_eq!(btf.per_cpu_variable("y"), Some(24));
        assert_eq!(btf.per_cpu_variable("x"), None);
    }

    #[test]
    fn malformed_information_is_no_panic() {
        let whole = sample();
        for len in 0..whole.len() {
            let _ = Btf::parse(whole[..len].to_vec()).map(|btf| btf.offset("outer", "b.y"));
        }
        for at in 0..whole.len() {
            for byte in [0, 0x7f, 0xff] {
                let mut bytes = whole.clone();
                bytes[at] = byte;
                let _ = Btf::parse(bytes).map(|btf| btf.offset("outer", "b.y"));
            }
        }
    }
}
