//! What differs between processors.

mod x86_64;

pub(super) use x86_64::{
    CALL_BYTES, SYSCALL_INSTRUCTION, code, enter, mended, restart, syscall_registers, uninterrupted,
};
