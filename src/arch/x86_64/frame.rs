//! The frame that `rt_sigreturn(2)` returns to, on x86-64.

use zerocopy::{Immutable, IntoBytes};

use super::{native::Registers, xsave};
use crate::units::RemoteAddr;

/// `struct rt_sigframe` without its `siginfo` (`arch/x86/include/asm/sigframe.h`).
#[derive(Clone, Copy, Debug, Default, IntoBytes, Immutable)]
#[repr(C)]
struct Frame {
    /// The address that the handler returns to.
    restorer: u64,
    /// `UC_*`.
    flags: u64,
    link: u64,
    stack: u64,
    stack_flags: u32,
    stack_padding: u32,
    stack_bytes: u64,
    /// r8 to r15, rdi, rsi, rbp, rbx, rdx, rax, rcx, rsp, rip, rflags.
    registers: [u64; 18],
    cs: u16,
    gs: u16,
    fs: u16,
    ss: u16,
    error: u64,
    trap: u64,
    old_mask: u64,
    cr2: u64,
    /// Where the XSAVE area is.
    area: u64,
    reserved: [u64; 8],
    mask: u64,
}

const _: () = assert!(size_of::<Frame>() == 312);

/// `UC_FP_XSTATE | UC_SIGCONTEXT_SS | UC_STRICT_RESTORE_SS` (`uapi/asm/ucontext.h`).
const FLAGS: u64 = 0x1 | 0x2 | 0x4;

/// Flags that no alternate stack has: the kernel refuses them, and leaves the thread the
/// stack that it has.
const NO_STACK: u32 = 0xdead;

/// How many bytes of a frame [`is_frame`] looks at.
pub const FRAME_MARK_BYTES: usize = std::mem::offset_of!(Frame, stack_flags) + size_of::<u32>();

/// Whether bytes begin a frame of this program's: the kernel gives no alternate stack such
/// flags.
pub fn is_frame(bytes: &[u8]) -> bool {
    let has = |at: usize, wanted: &[u8]| bytes.get(at..at + wanted.len()) == Some(wanted);
    has(std::mem::offset_of!(Frame, flags), &FLAGS.to_le_bytes())
        && has(std::mem::offset_of!(Frame, stack_flags), &NO_STACK.to_le_bytes())
}

/// Where the area is behind the frame: the processor wants it aligned to 64 bytes.
pub const FRAME_AREA_OFFSET: u64 = 320;

/// `FP_XSTATE_MAGIC1` and `FP_XSTATE_MAGIC2` (`uapi/asm/sigcontext.h`).
const MAGICS: (u32, u32) = (0x4650_5853, 0x4650_5845);

/// Offset of `struct _fpx_sw_bytes` in the area.
const SOFTWARE: usize = 464;

/// Offset of the header of the area, whose first word says which components are in use.
const HEADER: usize = 512;

/// Where the components behind the header begin: what is before is always there.
const COMPONENTS: usize = 576;

/// The components of the x87 and of SSE, which are before that.
const LEGACY: u64 = 0x3;

/// What `XSAVE` saves of a thread, in the form that a frame has.
#[derive(Clone, Debug)]
pub struct Area(Vec<u8>);

impl Area {
    /// Makes it of what `PTRACE_GETREGSET` returns (`sys::ptrace::extended_registers`);
    /// `None` if that is too short.
    ///
    /// Only what is in use is taken: the kernel initializes the rest, and refuses an area
    /// that is larger than this thread may have.
    pub fn new(mut bytes: Vec<u8>) -> Option<Self> {
        let word = |at: usize| Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
        let used = word(HEADER)? | LEGACY;
        let mut len = COMPONENTS;
        for number in 2..u64::BITS {
            if used & 1 << number != 0 {
                len = len.max(xsave::end(number)?);
            }
        }
        bytes.resize(len, 0);
        let total = u32::try_from(len + size_of::<u32>()).ok()?;
        let software = &mut bytes[SOFTWARE..HEADER];
        software.fill(0);
        software[..4].copy_from_slice(&MAGICS.0.to_le_bytes());
        software[4..8].copy_from_slice(&total.to_le_bytes());
        software[8..16].copy_from_slice(&used.to_le_bytes());
        software[16..20].copy_from_slice(&u32::try_from(len).ok()?.to_le_bytes());
        bytes.extend_from_slice(&MAGICS.1.to_le_bytes());
        Some(Self(bytes))
    }

    /// Returns the bytes in it.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none: never.
    pub fn is_empty(&self) -> bool {
        false
    }
}

/// Returns the bytes of a frame at `address`, which is a multiple of 64: the thread that
/// returns to it has these registers, these signals blocked, and what is in `area`;
/// without one, all registers but the general ones are as in a new program.
pub fn frame(
    address: RemoteAddr,
    restorer: RemoteAddr,
    registers: &Registers,
    mask: u64,
    area: Option<&Area>,
) -> Vec<u8> {
    let narrow = |selector: u64| u16::try_from(selector).unwrap_or(0);
    let r = registers;
    let frame = Frame {
        restorer: restorer.0,
        flags: FLAGS,
        stack_flags: NO_STACK,
        registers: [
            r.r8, r.r9, r.r10, r.r11, r.r12, r.r13, r.r14, r.r15, r.rdi, r.rsi, r.rbp, r.rbx,
            r.rdx, r.rax, r.rcx, r.rsp, r.rip, r.eflags,
        ],
        cs: narrow(r.cs),
        gs: narrow(r.gs),
        fs: narrow(r.fs),
        ss: narrow(r.ss),
        area: area.map_or(0, |_| address.plus(FRAME_AREA_OFFSET).0),
        mask,
        ..Frame::default()
    };
    let mut bytes = frame.as_bytes().to_vec();
    if let Some(area) = area {
        bytes.resize(usize::try_from(FRAME_AREA_OFFSET).expect("small"), 0);
        bytes.extend_from_slice(&area.0);
    }
    bytes
}
