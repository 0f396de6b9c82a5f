//! A process as a core file for debuggers.

use std::sync::{Arc, OnceLock};

use object::{
    LittleEndian as LE, U16, U32, U64,
    elf::{
        ELFCLASS64, ELFDATA2LSB, ELFMAG, ELFOSABI_NONE, ET_CORE, EV_CURRENT, FileFlags,
        FileHeader64, Ident, PF_R, PF_W, PF_X, PN_XNUM, PT_LOAD, PT_NOTE, ProgramFlags,
        ProgramHeader64, SHN_UNDEF, SHT_NULL, SectionFlags, SectionHeader64,
    },
    pod,
};

use super::{
    AddressSpace, Result, ViewError,
    notes::{Description, describe},
    process::{PROT_EXEC, PROT_READ, PROT_WRITE},
};
use crate::{
    arch::Machine,
    chain::{self, Content, Run, Source},
};

/// A process as an ELF core file of the machine that it ran on.
///
/// ```text
/// file header
/// program headers      one for the notes, then those of the memory
/// section header       only if there are too many program headers to count
/// notes                threads, registers, auxiliary vector, mapped files
/// padding              up to the next page
/// memory               the mappings whose contents are known, in ascending order
/// ```
///
/// The kernel writes the parts in this order, except the section header. Everything up to the
/// padding is built when the core file is opened; memory is resolved when it is read, and is not
/// copied.
///
/// A mapping has a program header for each range whose contents are known, in most cases one. Ranges
/// with unknown contents have none: pages of a file that is missing or has changed, memory of the
/// kernel, guard areas. The kernel writes empty segments for those. A debugger would read zeros
/// there (seen with gdb 13) and conclude that the process ran another program; without a segment, it
/// reads its own copy of the file.
#[derive(Debug)]
pub struct CoreFile {
    space: Arc<AddressSpace>,
    head: Arc<[u8]>,
    segments: Vec<Segment>,
    len: u64,
    allocated: OnceLock<u64>,
}

/// A range of a mapping that the core file contains.
#[derive(Clone, Copy, Debug)]
struct Segment {
    offset: u64,
    address: u64,
    len: u64,
    prot: u32,
}

impl CoreFile {
    /// Lays out the core file of a process: resolves its private memory, examines the files that it
    /// maps, and reads the images of its threads.
    ///
    /// # Errors
    /// [`ViewError::BadThread`] for threads of an unknown machine and for 32-bit threads;
    /// [`ViewError::Chain`] and [`ViewError::Image`] for images that cannot be read;
    /// [`ViewError::CoreTooLarge`].
    pub fn open(space: Arc<AddressSpace>) -> Result<Self> {
        let mut segments = segments(&space)?;
        let Description { machine, page_size, notes } = describe(&space)?;
        let too_large = || ViewError::CoreTooLarge {
            dir: space.process().tables().path().to_owned(),
            pid: space.process().pid(),
        };
        let headers = u32::try_from(segments.len() + 1).map_err(|_| too_large())?;
        let extended = headers >= u32::from(PN_XNUM);
        let notes_at = size_of::<FileHeader64<LE>>()
            + size_of::<ProgramHeader64<LE>>() * (segments.len() + 1)
            + if extended { size_of::<SectionHeader64<LE>>() } else { 0 };
        let page_bytes = usize::try_from(page_size).expect("pages are small");
        let head_len = (notes_at + notes.len()).next_multiple_of(page_bytes);

        let mut head = Vec::with_capacity(head_len);
        head.extend(pod::bytes_of(&file_header(machine, headers, extended)));
        head.extend(pod::bytes_of(&note_header(notes_at as u64, notes.len() as u64)));
        let mut len = head_len as u64;
        for segment in &mut segments {
            segment.offset = len;
            head.extend(pod::bytes_of(&load_header(segment, page_size)));
            len = len
                .checked_add(segment.len)
                .filter(|len| i64::try_from(*len).is_ok())
                .ok_or_else(too_large)?;
        }
        if extended {
            head.extend(pod::bytes_of(&section_header(headers)));
        }
        head.extend(notes);
        head.resize(head_len, 0);
        Ok(Self { space, head: head.into(), segments, len, allocated: OnceLock::new() })
    }

    /// Returns the address space that the memory comes from.
    pub fn space(&self) -> &Arc<AddressSpace> {
        &self.space
    }
}

/// Returns the segments of a process, still without offsets.
fn segments(space: &AddressSpace) -> chain::Result<Vec<Segment>> {
    let mut segments = Vec::new();
    for area in space.process().areas() {
        let known = space.known(area)?.into_iter();
        segments.extend(known.map(|known| Segment {
            offset: 0,
            address: known.start,
            len: known.end - known.start,
            prot: area.prot,
        }));
    }
    Ok(segments)
}

fn file_header(machine: Machine, headers: u32, extended: bool) -> FileHeader64<LE> {
    let size = |bytes| U16::new(LE, u16::try_from(bytes).expect("headers are small"));
    let table = size_of::<FileHeader64<LE>>();
    let header = size_of::<ProgramHeader64<LE>>();
    let section_at = if extended { table as u64 + header as u64 * u64::from(headers) } else { 0 };
    FileHeader64 {
        e_ident: Ident {
            magic: ELFMAG,
            class: ELFCLASS64,
            data: ELFDATA2LSB,
            version: EV_CURRENT,
            os_abi: ELFOSABI_NONE,
            abi_version: 0,
            padding: [0; 7],
        },
        e_type: U16::new(LE, ET_CORE),
        e_machine: U16::new(LE, machine.elf()),
        e_version: U32::new(LE, EV_CURRENT.0.into()),
        e_entry: U64::new(LE, 0),
        e_phoff: U64::new(LE, table as u64),
        e_shoff: U64::new(LE, section_at),
        e_flags: U32::new(LE, FileFlags(0)),
        e_ehsize: size(table),
        e_phentsize: size(header),
        e_phnum: U16::new(LE, u16::try_from(headers).unwrap_or(PN_XNUM)),
        e_shentsize: size(if extended { size_of::<SectionHeader64<LE>>() } else { 0 }),
        e_shnum: U16::new(LE, extended.into()),
        e_shstrndx: U16::new(LE, SHN_UNDEF),
    }
}

fn note_header(offset: u64, len: u64) -> ProgramHeader64<LE> {
    ProgramHeader64 {
        p_type: U32::new(LE, PT_NOTE),
        p_flags: U32::new(LE, ProgramFlags(0)),
        p_offset: U64::new(LE, offset),
        p_vaddr: U64::new(LE, 0),
        p_paddr: U64::new(LE, 0),
        p_filesz: U64::new(LE, len),
        p_memsz: U64::new(LE, 0),
        p_align: U64::new(LE, 4),
    }
}

fn load_header(segment: &Segment, page_size: u64) -> ProgramHeader64<LE> {
    let prots = [(PROT_READ, PF_R), (PROT_WRITE, PF_W), (PROT_EXEC, PF_X)];
    let flags = prots.iter().filter(|(prot, _)| segment.prot & prot != 0);
    let flags = flags.fold(0, |flags, (_, flag)| flags | flag.0);
    ProgramHeader64 {
        p_type: U32::new(LE, PT_LOAD),
        p_flags: U32::new(LE, ProgramFlags(flags)),
        p_offset: U64::new(LE, segment.offset),
        p_vaddr: U64::new(LE, segment.address),
        p_paddr: U64::new(LE, 0),
        p_filesz: U64::new(LE, segment.len),
        p_memsz: U64::new(LE, segment.len),
        p_align: U64::new(LE, page_size),
    }
}

/// Returns the section header that holds the number of program headers if the file header cannot.
fn section_header(headers: u32) -> SectionHeader64<LE> {
    SectionHeader64 {
        sh_name: U32::new(LE, 0),
        sh_type: U32::new(LE, SHT_NULL),
        sh_flags: U64::new(LE, SectionFlags(0)),
        sh_addr: U64::new(LE, 0),
        sh_offset: U64::new(LE, 0),
        sh_size: U64::new(LE, 1), // the number of section headers
        sh_link: U32::new(LE, 0),
        sh_info: U32::new(LE, headers),
        sh_addralign: U64::new(LE, 0),
        sh_entsize: U64::new(LE, 0),
    }
}

impl Content for CoreFile {
    fn len(&self) -> u64 {
        self.len
    }

    /// Returns the allocated bytes of the segments, plus the size of everything before them.
    ///
    /// The first call resolves all memories of the process.
    fn allocated(&self) -> u64 {
        *self.allocated.get_or_init(|| {
            let segments = self.segments.iter();
            let memory = segments.map(|s| self.space.allocated_in(s.address..s.address + s.len));
            self.head.len() as u64 + memory.sum::<u64>()
        })
    }

    fn runs(&self, offset: u64, len: u64, runs: &mut Vec<Run>) -> chain::Result<()> {
        let end = offset + len;
        let head = self.head.len() as u64;
        let mut next = offset;
        if next < head {
            let len = head.min(end) - next;
            runs.push(Run { len, source: Source::Bytes(Arc::clone(&self.head), next) });
            next += len;
        }
        let first = self.segments.partition_point(|segment| segment.offset + segment.len <= next);
        for segment in self.segments[first..].iter().take_while(|segment| segment.offset < end) {
            let skipped = next - segment.offset;
            let len = (segment.len - skipped).min(end - next);
            self.space.runs(segment.address + skipped, len, runs)?;
            next += len;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
