//! What differs between processors.

mod frame;
mod x86_64;

pub(super) use frame::{Area, FRAME_AREA_OFFSET, FRAME_MARK_BYTES, frame, is_frame};
pub(super) use x86_64::{
    CALL_AND_RETURN, CALL_BYTES, RESTORERS, Return, SYSCALL_INSTRUCTION, code, enter,
    enter_and_return, mended, restart, syscall_registers, told, uninterrupted,
};
