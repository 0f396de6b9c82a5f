//! The notes of a core file: the identity of the process, and the state of its threads.
//!
//! Layouts are those of the kernel for 64-bit machines (`linux/elfcore.h`, `uapi/linux/elf.h`,
//! `fs/binfmt_elf.c`), which debuggers expect. [`crate::arch`] has what differs between machines.

use std::sync::Arc;

use object::{
    LittleEndian as LE, U32,
    elf::{
        ELF_NOTE_CORE, ELF_NOTE_LINUX, NT_AUXV, NT_FILE, NT_FPREGSET, NT_PRPSINFO, NT_PRSTATUS,
        NoteHeader32, NoteType,
    },
    pod,
};

use super::{
    AddressSpace, Process, Result, ViewError, mapped::Mapped, process::Below, thread::Thread,
};
use crate::{
    arch::{self, Machine},
    chain::read_at,
    image::{proto, tree::state},
};

/// The size of the kernel's `elf_prstatus` up to the registers.
const PRSTATUS_HEAD_BYTES: usize = 112;

/// The alignment of `elf_prstatus`.
const PRSTATUS_ALIGN: usize = 8;

/// The size of the kernel's `elf_prpsinfo`.
const PRPSINFO_BYTES: usize = 136;

/// The size of a command's name with its NUL byte (`TASK_COMM_LEN`).
const COMM_BYTES: usize = 16;

/// The size of a command line with its NUL byte (`ELF_PRARGSZ`).
const ARGS_BYTES: usize = 80;

/// The largest note about mapped files. Like the kernel, omit a larger one (`MAX_FILE_NOTE_SIZE`,
/// `fs/binfmt_elf.c`).
const FILES_LIMIT_BYTES: usize = 4 << 20;

/// The alignment of notes and of their parts.
const ALIGN: usize = 4;

/// The description of a process in its core file.
#[derive(Debug)]
pub(super) struct Description {
    /// The machine that it ran on.
    pub(super) machine: Machine,
    /// The page size of that machine.
    pub(super) page_size: u64,
    /// The notes.
    pub(super) notes: Vec<u8>,
}

/// Describes a process. The notes are in the kernel's order: the leader's status, the process, its
/// auxiliary vector, its mapped files, the leader's other registers; then the other threads'
/// registers.
///
/// There is no `NT_SIGINFO`, and no signal in the status, because no signal has killed the process.
///
/// # Errors
/// [`ViewError::BadThread`], [`ViewError::Image`].
pub(super) fn describe(space: &AddressSpace) -> Result<Description> {
    let process = space.process();
    let threads = process.threads()?;
    let bad_thread = |tid| {
        move |problem| ViewError::BadThread {
            dir: process.tables().path().to_owned(),
            tid,
            problem,
        }
    };
    let leader = threads.first().expect("a process has a leader");
    let machine =
        Machine::of(&leader.core).map_err(|unknown| bad_thread(leader.tid)(unknown.to_string()))?;
    let page_size = machine.page_size(&process.mm().mm_saved_auxv).map_err(|size| {
        let problem = format!("{} has no pages of {size} bytes", machine.name());
        bad_thread(leader.tid)(problem)
    })?;
    let mut notes = Notes::default();
    for (position, thread) in threads.iter().enumerate() {
        let bad = bad_thread(thread.tid);
        let registers = registers(thread, machine).map_err(bad)?;
        let status = status(process.entry(), thread, &registers.general);
        notes.push(ELF_NOTE_CORE, NT_PRSTATUS, &status);
        if position == 0 {
            notes.push(ELF_NOTE_CORE, NT_PRPSINFO, &prpsinfo(space, thread));
            notes.push(ELF_NOTE_CORE, NT_AUXV, &process.auxiliary_vector());
            if let Some(files) = files(process, page_size) {
                notes.push(ELF_NOTE_CORE, NT_FILE, &files);
            }
        }
        notes.push(ELF_NOTE_CORE, NT_FPREGSET, &registers.floating);
        for (kind, bytes) in &registers.others {
            notes.push(ELF_NOTE_LINUX, *kind, bytes);
        }
    }
    Ok(Description { machine, page_size, notes: notes.0 })
}

#[derive(Default)]
struct Notes(Vec<u8>);

impl Notes {
    fn push(&mut self, name: &[u8], kind: NoteType, description: &[u8]) {
        let length = |bytes: usize| {
            U32::new(LE, u32::try_from(bytes).expect("images have no messages of 4 GiB"))
        };
        let header = NoteHeader32 {
            n_namesz: length(name.len() + 1),
            n_descsz: length(description.len()),
            n_type: U32::new(LE, kind),
        };
        self.0.extend(pod::bytes_of(&header));
        self.0.extend(name);
        self.0.push(0);
        self.align();
        self.0.extend(description);
        self.align();
    }

    fn align(&mut self) {
        self.0.resize(self.0.len().next_multiple_of(ALIGN), 0);
    }
}

/// Returns the registers of a thread, whose process ran on `machine`.
fn registers(thread: &Thread, machine: Machine) -> Result<arch::Notes, String> {
    let own = Machine::of(&thread.core).map_err(|unknown| unknown.to_string())?;
    if own != machine {
        let (own, machine) = (own.name(), machine.name());
        return Err(format!("it ran on {own}, and its process on {machine}"));
    }
    machine.notes(&thread.core)
}

/// Returns an `elf_prstatus`.
///
/// ```text
///   0  si_signo, si_code, si_errno  i32 each: none
///  12  pr_cursig                    i16: none
///  16  pr_sigpend                   u64: signals pending for the thread
///  24  pr_sighold                   u64: signals blocked
///  32  pr_pid, ppid, pgrp, sid      i32 each
///  48  four times of 16 bytes       not dumped: zero
/// 112  pr_reg                       general registers
///      pr_fpvalid                   i32: floating-point registers follow
/// ```
fn status(entry: &proto::PstreeEntry, thread: &Thread, registers: &[u8]) -> Vec<u8> {
    let mut status = vec![0; PRSTATUS_HEAD_BYTES];
    put(&mut status, 16, &thread.pending().0.to_le_bytes());
    put(&mut status, 24, &thread.blocked().to_le_bytes());
    let ids = [thread.tid, entry.ppid, entry.pgid, entry.sid];
    for (offset, id) in (32..).step_by(4).zip(ids) {
        put(&mut status, offset, &id.to_le_bytes());
    }
    status.extend(registers);
    status.extend(1_u32.to_le_bytes());
    status.resize(status.len().next_multiple_of(PRSTATUS_ALIGN), 0);
    status
}

/// Returns an `elf_prpsinfo`.
///
/// ```text
///   0  pr_state, pr_sname, pr_zomb, pr_nice  1 byte each
///   8  pr_flag                               u64
///  16  pr_uid, pr_gid                        u32 each: the real ones
///  24  pr_pid, pr_ppid, pr_pgrp, pr_sid      i32 each
///  40  pr_fname                              16 bytes
///  56  pr_psargs                             80 bytes
/// ```
fn prpsinfo(space: &AddressSpace, leader: &Thread) -> [u8; PRPSINFO_BYTES] {
    let process = space.process();
    let entry = process.entry();
    let mut description = [0; PRPSINFO_BYTES];
    let task = leader.core.tc.as_ref();
    let (number, letter) = match task.map(|task| task.task_state) {
        Some(state::STOPPED) => (3, b'T'),
        _ => (0, b'R'),
    };
    let nice = leader.core.thread_core.as_ref().and_then(|own| own.sched_nice);
    put(&mut description, 0, &[number, letter, 0, nice.unwrap_or(0).to_le_bytes()[0]]);
    put(&mut description, 8, &task.map_or(0, |task| u64::from(task.flags)).to_le_bytes());
    let (uid, gid) = leader.creds.as_ref().map_or((0, 0), |creds| (creds.uid, creds.gid));
    let ids = [uid, gid, entry.pid, entry.ppid, entry.pgid, entry.sid];
    for (offset, id) in (16..).step_by(4).zip(ids) {
        put(&mut description, offset, &id.to_le_bytes());
    }
    let comm = task.map_or(&[][..], |task| task.comm.as_slice());
    let comm = &comm[..comm.len().min(COMM_BYTES - 1)];
    put(&mut description, 40, comm);
    match arguments(space) {
        Some(arguments) => put(&mut description, 56, &arguments),
        None => put(&mut description, 56, comm),
    }
    description
}

/// Reads the start of the process's command line from its memory.
fn arguments(space: &AddressSpace) -> Option<Vec<u8>> {
    let mm = space.process().mm();
    let length = mm.mm_arg_end.checked_sub(mm.mm_arg_start).filter(|length| *length > 0)?;
    let length = usize::try_from(length).unwrap_or(usize::MAX).min(ARGS_BYTES - 1);
    let mut arguments = vec![0; length];
    let read = read_at(space, mm.mm_arg_start, &mut arguments).ok().filter(|read| *read > 0)?;
    arguments.truncate(read);
    for byte in arguments.iter_mut().filter(|byte| **byte == 0) {
        *byte = b' ';
    }
    Some(arguments)
}

/// Returns the note about mapped files: a count, the unit of offsets, one triple of start, end and
/// offset for each mapping, then the names. `None` if it would be too large.
///
/// The kernel also lists shared objects, under names such as `/dev/zero (deleted)`. They are omitted
/// here: a debugger cannot open such a file, and would warn about each.
fn files(process: &Process, page_size: u64) -> Option<Vec<u8>> {
    let mapped = process.areas().iter().filter_map(|area| match &area.below {
        Below::Mapped(Mapped::File(file)) => Some((area, Arc::as_ref(file))),
        _ => None,
    });
    let mut places = Vec::new();
    let mut names = Vec::new();
    let mut count = 0_u64;
    for (area, file) in mapped {
        places.extend([area.start, area.end, area.offset / page_size]);
        names.extend(file.name().bytes());
        names.push(0);
        count += 1;
        if names.len() + size_of_val(&places[..]) > FILES_LIMIT_BYTES {
            return None;
        }
    }
    let words = [count, page_size].into_iter().chain(places);
    let mut note: Vec<u8> = words.flat_map(u64::to_le_bytes).collect();
    note.extend(names);
    Some(note)
}

fn put(note: &mut [u8], offset: usize, bytes: &[u8]) {
    note[offset..offset + bytes.len()].copy_from_slice(bytes);
}
