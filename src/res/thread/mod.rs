//! What each thread has for itself.

pub mod creds;

use nix::libc;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::{ResError, Result, signals};
use crate::{
    image::{proto, registers},
    inject::{Answers, Buffer, CallId, Script, Tracee, registers_to_resume},
    proc,
    sys::{
        process::{self, Scheduling},
        ptrace::{self, Registers},
        xsave,
    },
    units::{HostPid, RemoteAddr},
};

/// `stack_t` (`asm-generic/signal.h`).
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct AlternateStack {
    pointer: u64,
    flags: u32,
    padding: u32,
    size: u64,
}

/// Descriptors of thread-local storage that a 64-bit thread has for 32-bit code.
const TLS_ENTRIES: std::ops::Range<u32> = 12..15;

/// What a thread was asked.
#[derive(Clone, Copy, Debug)]
pub struct Asked {
    stack: Buffer,
    tid_address: (CallId, Buffer),
    death_signal: Buffer,
    creds: creds::Asked,
}

/// Adds the questions.
pub fn ask(script: &mut Script) -> Asked {
    let stack = script.space(size_of::<AlternateStack>());
    let arguments = [0.into(), stack.into()];
    script.call("read the alternate stack", libc::SYS_sigaltstack, &arguments);
    let address = script.space(size_of::<u64>());
    let tid_address =
        script.attempt(libc::SYS_prctl, &[libc::PR_GET_TID_ADDRESS.into(), address.into()]);
    let death_signal = script.space(size_of::<u32>());
    let arguments = [libc::PR_GET_PDEATHSIG.into(), death_signal.into()];
    script.call("read the parent-death signal", libc::SYS_prctl, &arguments);
    Asked { stack, tid_address: (tid_address, address), death_signal, creds: creds::ask(script) }
}

/// Fills in what an image says of a stopped thread of process `pid`.
///
/// # Errors
/// What keeps something from being read; registers that the format has no field
/// for.
pub fn collect(
    asked: &Asked,
    answers: &Answers,
    pid: HostPid,
    thread: &Tracee,
    core: &mut proto::CoreEntry,
) -> Result<()> {
    let tid = thread.tid;
    let failed = |step| move |source| ResError::Thread { tid, step, source };
    let area = ptrace::extended_registers(tid).map_err(failed("read the registers of"))?;
    let fpregs = registers::from_area(&area, &xsave::offset)
        .map_err(|problem| ResError::Unsupported { pid: tid, what: problem })?;
    let gpregs = general_registers(&thread.registers_to_restore());
    let unused_tls = |entry_number| proto::UserDescT {
        entry_number,
        read_exec_only: true,
        seg_not_present: true,
        ..Default::default()
    };
    let tid_address: u64 = match answers.result(asked.tid_address.0) {
        Ok(_) => answers.value(asked.tid_address.1),
        Err(_) => 0,
    };
    core.mtype = proto::core_entry::March::X8664.into();
    core.thread_info = Some(proto::ThreadInfoX86 {
        clear_tid_addr: tid_address,
        gpregs,
        fpregs,
        tls: TLS_ENTRIES.map(unused_tls).collect(),
    });
    let status = proc::thread_status(pid, tid)?;
    let scheduling = process::scheduling(tid).map_err(failed("read the scheduling of"))?;
    let (robust_list, robust_len) =
        process::robust_list(tid).map_err(failed("read the robust list of"))?;
    let stack: AlternateStack = answers.value(asked.stack);
    let pending = ptrace::queued_signals(tid, false).map_err(failed("read the signals of"))?;
    let death_signal: u32 = answers.value(asked.death_signal);
    let rseq = thread.rseq;
    let mut own = proto::ThreadCoreEntry {
        futex_rla: robust_list.0,
        futex_rla_len: u32::try_from(robust_len).unwrap_or(0),
        blk_sigset: Some(thread.signal_mask),
        sas: Some(proto::ThreadSasEntry {
            ss_sp: stack.pointer,
            ss_size: stack.size,
            ss_flags: stack.flags,
        }),
        pdeath_sig: (death_signal != 0).then_some(death_signal),
        signals_p: Some(signals::queue(pending)),
        creds: Some(creds::collect(asked.creds, answers, &status)),
        seccomp_mode: Some(proto::SeccompMode::Disabled.into()),
        comm: Some(proc::comm(pid, tid)?),
        rseq_entry: (rseq.pointer != 0).then_some(proto::RseqEntry {
            rseq_abi_pointer: rseq.pointer,
            rseq_abi_size: rseq.size,
            signature: rseq.signature,
            rseq_cs_pointer: (thread.rseq_cs != 0).then_some(thread.rseq_cs),
        }),
        ..Default::default()
    };
    set_scheduling(&scheduling, &mut own);
    core.thread_core = Some(own);
    Ok(())
}

/// Returns what an image says of a thread's general registers.
pub(in crate::res) fn general_registers(regs: &Registers) -> proto::UserX86RegsEntry {
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

/// Fills in what an image says of how a thread is scheduled.
pub(in crate::res) fn set_scheduling(scheduling: &Scheduling, core: &mut proto::ThreadCoreEntry) {
    core.sched_nice = Some(scheduling.nice);
    core.sched_policy = Some(match scheduling.flags & FLAG_RESET_ON_FORK {
        0 => scheduling.policy,
        _ => scheduling.policy | RESET_ON_FORK,
    });
    core.sched_prio = (scheduling.priority != 0).then_some(scheduling.priority);
}

/// Adds the calls that a thread makes for itself while it still has the
/// credentials of this program: name, robust list, thread id address, alternate
/// stack, restartable sequences.
pub fn apply(core: &proto::CoreEntry, script: &mut Script) {
    if let Some(info) = &core.thread_info {
        let address = info.clear_tid_addr;
        script.call("set the thread id address", libc::SYS_set_tid_address, &[address.into()]);
    }
    let Some(thread) = &core.thread_core else { return };
    if thread.futex_rla != 0 {
        script.call(
            "set the list of robust futexes",
            libc::SYS_set_robust_list,
            &[thread.futex_rla.into(), thread.futex_rla_len.into()],
        );
    }
    if let Some(stack) = &thread.sas {
        let stack = AlternateStack {
            pointer: stack.ss_sp,
            flags: stack.ss_flags,
            padding: 0,
            size: stack.ss_size,
        };
        let stack = script.bytes(stack.as_bytes());
        let arguments = [stack.into(), 0.into()];
        script.call("set the alternate stack", libc::SYS_sigaltstack, &arguments);
    }
    if let Some(rseq) = &thread.rseq_entry
        && rseq.rseq_abi_pointer != 0
    {
        script.call(
            "register restartable sequences",
            libc::SYS_rseq,
            &[
                rseq.rseq_abi_pointer.into(),
                rseq.rseq_abi_size.into(),
                0.into(),
                rseq.signature.into(),
            ],
        );
    }
    let comm = thread.comm.as_ref().or(core.tc.as_ref().map(|task| &task.comm));
    if let Some(comm) = comm {
        let mut name = comm.clone();
        name.push(0);
        let name = script.bytes(&name);
        script.call("set the name", libc::SYS_prctl, &[libc::PR_SET_NAME.into(), name.into()]);
    }
}

/// Adds the calls that give a thread its credentials.
pub fn apply_creds(core: &proto::CoreEntry, own: &creds::Own, script: &mut Script) {
    let Some(thread) = &core.thread_core else { return };
    if let Some(creds) = &thread.creds {
        creds::apply(creds, own, script);
    }
}

/// Adds the call that has a thread told when the thread ends that has made it, once those
/// have ended that had before.
pub fn apply_death_signal(core: &proto::CoreEntry, script: &mut Script) {
    // A new thread has none.
    let signal = core.thread_core.as_ref().and_then(|thread| thread.pdeath_sig).unwrap_or(0);
    if signal != 0 {
        let arguments = [libc::PR_SET_PDEATHSIG.into(), signal.into()];
        script.call("set the parent-death signal", libc::SYS_prctl, &arguments);
    }
}

/// `SCHED_RESET_ON_FORK`, `SCHED_DEADLINE` (`linux/sched.h`).
const RESET_ON_FORK: u32 = 0x4000_0000;
const DEADLINE: u32 = 6;

/// `SCHED_FLAG_RESET_ON_FORK` (`linux/sched.h`).
const FLAG_RESET_ON_FORK: u64 = 1;

/// Sets what can be set from outside: how the thread is scheduled.
///
/// # Errors
/// [`ResError::Thread`].
pub fn apply_outside(core: &proto::CoreEntry, tid: HostPid) -> Result<()> {
    let Some(thread) = &core.thread_core else { return Ok(()) };
    let step = "set the scheduling of";
    let failed = |source| ResError::Thread { tid, step, source };
    let now = process::scheduling(tid).map_err(failed)?;
    // CRIU keeps the flag with the policy, as sched_setscheduler(2) has it.
    let policy = thread.sched_policy.unwrap_or(0);
    let resets = policy & RESET_ON_FORK != 0;
    let policy = policy & !RESET_ON_FORK;
    if policy == DEADLINE {
        // It takes more than there is a place for: see the attributes.
        return Ok(());
    }
    let wanted = process::Scheduling {
        policy,
        flags: if resets { FLAG_RESET_ON_FORK } else { 0 },
        nice: thread.sched_nice.unwrap_or(0),
        priority: thread.sched_prio.unwrap_or(0),
        ..now
    };
    if wanted != now {
        process::set_scheduling(tid, &wanted).map_err(failed)?;
    }
    Ok(())
}

/// Sets the registers and the signal mask with which a stopped thread goes on.
///
/// # Errors
/// [`ResError::Thread`]; [`ResError::Image`] for registers that this processor does
/// not have.
pub fn apply_registers(core: &proto::CoreEntry, tid: HostPid) -> Result<()> {
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
        if let Some(rseq) = &thread.rseq_entry
            && let Some(section) = rseq.rseq_cs_pointer
        {
            let address = RemoteAddr(rseq.rseq_abi_pointer).plus(ptrace::RSEQ_CS_OFFSET);
            process::write_memory(tid, address, &section.to_le_bytes())
                .map_err(failed("write the restartable sequence of"))?;
        }
        let mask = thread.blk_sigset.or(core.tc.as_ref().map(|task| task.blk_sigset)).unwrap_or(0);
        ptrace::set_signal_mask(tid, mask).map_err(failed("set the signal mask of"))?;
    }
    Ok(())
}
