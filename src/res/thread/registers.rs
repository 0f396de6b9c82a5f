//! The registers of a thread and the signals that it blocks: with what it goes on.

use super::{Collect, Kind, Thread, own};
use crate::{
    image::{
        proto::{self, CoreEntry},
        registers,
    },
    inject::{Script, registers_to_resume},
    res::{ResError, Result},
    sys::{
        ptrace::{self, Registers as Raw},
        xsave,
    },
    units::HostPid,
};

/// Descriptors of thread-local storage that a 64-bit thread has for 32-bit code.
const TLS_ENTRIES: std::ops::Range<u32> = 12..15;

/// The kind.
pub(super) struct Registers;

impl Kind for Registers {
    fn ask(&self, _: Thread, _: &mut Script) -> Collect {
        Box::new(|of, _, core| {
            let tid = of.of.tid;
            let step = "read the registers of";
            let area = ptrace::extended_registers(tid).map_err(|source| ResError::Thread {
                tid,
                step,
                source,
            })?;
            let info = core.thread_info.get_or_insert_default();
            info.fpregs = registers::from_area(&area, &xsave::offset)
                .map_err(|problem| ResError::Unsupported { pid: tid, what: problem })?;
            info.gpregs = general(&of.thread.registers_to_restore());
            info.tls = TLS_ENTRIES.map(unused_storage).collect();
            own(core).blk_sigset = Some(of.thread.signal_mask);
            Ok(())
        })
    }

    fn dress(&self, core: &CoreEntry, tid: HostPid) -> Result<()> {
        let failed = |step| move |source| ResError::Thread { tid, step, source };
        let wrong = |problem: String| ResError::Image { pid: tid, problem };
        let info = core.thread_info.as_ref().ok_or_else(|| wrong("it has no registers".into()))?;
        let mut area = ptrace::extended_registers(tid).map_err(failed("read the registers of"))?;
        registers::overwrite(&mut area, &info.fpregs, &xsave::offset).map_err(wrong)?;
        ptrace::set_extended_registers(tid, &area).map_err(failed("set the registers of"))?;
        let from = &info.gpregs;
        let mut regs = ptrace::registers(tid).map_err(failed("read the registers of"))?;
        regs.r15 = from.r15;
        regs.r14 = from.r14;
        regs.r13 = from.r13;
        regs.r12 = from.r12;
        regs.rbp = from.bp;
        regs.rbx = from.bx;
        regs.r11 = from.r11;
        regs.r10 = from.r10;
        regs.r9 = from.r9;
        regs.r8 = from.r8;
        regs.rax = from.ax;
        regs.rcx = from.cx;
        regs.rdx = from.dx;
        regs.rsi = from.si;
        regs.rdi = from.di;
        regs.orig_rax = from.orig_ax;
        regs.rip = from.ip;
        regs.cs = from.cs;
        regs.eflags = from.flags;
        regs.rsp = from.sp;
        regs.ss = from.ss;
        regs.fs_base = from.fs_base;
        regs.gs_base = from.gs_base;
        regs.ds = from.ds;
        regs.es = from.es;
        regs.fs = from.fs;
        regs.gs = from.gs;
        let regs = registers_to_resume(tid, &regs);
        ptrace::set_registers(tid, &regs).map_err(failed("set the registers of"))?;
        if let Some(thread) = &core.thread_core {
            let of_task = core.tc.as_ref().map(|task| task.blk_sigset);
            let mask = thread.blk_sigset.or(of_task).unwrap_or(0);
            ptrace::set_signal_mask(tid, mask).map_err(failed("set the signal mask of"))?;
        }
        Ok(())
    }
}

fn unused_storage(entry_number: u32) -> proto::UserDescT {
    proto::UserDescT {
        entry_number,
        read_exec_only: true,
        seg_not_present: true,
        ..Default::default()
    }
}

/// Returns what an image says of a thread's general registers.
pub(in crate::res) fn general(regs: &Raw) -> proto::UserX86RegsEntry {
    proto::UserX86RegsEntry {
        r15: regs.r15,
        r14: regs.r14,
        r13: regs.r13,
        r12: regs.r12,
        bp: regs.rbp,
        bx: regs.rbx,
        r11: regs.r11,
        r10: regs.r10,
        r9: regs.r9,
        r8: regs.r8,
        ax: regs.rax,
        cx: regs.rcx,
        dx: regs.rdx,
        si: regs.rsi,
        di: regs.rdi,
        orig_ax: regs.orig_rax,
        ip: regs.rip,
        cs: regs.cs,
        flags: regs.eflags,
        sp: regs.rsp,
        ss: regs.ss,
        fs_base: regs.fs_base,
        gs_base: regs.gs_base,
        ds: regs.ds,
        es: regs.es,
        fs: regs.fs,
        gs: regs.gs,
        mode: Some(proto::UserX86RegsMode::Native.into()),
    }
}
