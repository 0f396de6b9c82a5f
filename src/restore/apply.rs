//! What new processes do to become the ones of the images, once they exist.

use nix::libc;

use super::{
    Result, memory,
    plan::{Body, Plan},
    tree::Puppets,
};
use crate::{
    fault::{self, Point},
    inject::{Answers, Script},
    res::{
        ResError,
        attribute::{Differences, Who, memory as memory_attributes},
        file::Installer,
        signals,
        task::{self, leader},
        thread::{self, creds},
    },
    units::HostPid,
};

/// Bytes of `struct prctl_mm_map` (`linux/prctl.h`): eleven addresses, the auxiliary
/// vector's address and size, the program's descriptor.
const MM_MAP_BYTES: usize = 104;

/// Where in it the address of the auxiliary vector is.
const AUXV_AT: usize = 88;

/// Gives all processes their files, threads and attributes.
///
/// # Errors
/// Whatever fails.
pub(super) fn all(plan: &Plan, puppets: &mut Puppets, files: &mut Installer<'_>) -> Result<()> {
    let own = creds::Own::read()?;
    let mut differences = Differences::default();
    let limits = crate::proc::limits(HostPid(nix::unistd::getpid().as_raw()))?;
    for (position, planned) in plan.tasks.iter().enumerate() {
        let Some(body) = &planned.body else { continue };
        let mut script = Script::new();
        files.stand(&body.fs, &mut script)?;
        memory_map(body, files.program(body.mm.exe_file_id)?, &mut script);
        files.install(planned.pid, &body.fds, &mut script)?;
        run(puppets, position, 0, &script)?;
    }
    fault::hit(Point::RestoreFiles)?;
    for (position, _) in plan.tasks.iter().enumerate().filter(|(_, task)| task.body.is_some()) {
        puppets.make_threads(position)?;
    }
    files.open_late()?;
    for (position, planned) in plan.tasks.iter().enumerate() {
        let Some(body) = &planned.body else { continue };
        let mut script = Script::new();
        files.install_late(planned.pid, &body.fds, &body.fs, &mut script)?;
        if !script.is_empty() {
            run(puppets, position, 0, &script)?;
        }
    }
    for (position, planned) in plan.tasks.iter().enumerate() {
        let Some(body) = &planned.body else { continue };
        for (number, of) in planned.threads.iter().enumerate() {
            if number == 0 {
                for script in task::timers(planned.core(), planned.pid)? {
                    run(puppets, position, number, &script)?;
                }
            }
            let mut script = Script::new();
            thread::apply(&of.core, &mut script);
            if number == 0 {
                task::apply(planned.core(), &limits, &mut script);
                let layout = &puppets.tasks[position].as_ref().expect("it lives").layout;
                memory::finish(body, layout, &mut script);
            }
            run(puppets, position, number, &script)?;
            thread::apply_outside(&of.core, of.tid)?;
            let who = Who {
                pid: planned.pid,
                tid: of.tid,
                own_session: !plan.is_outside(planned.session),
            };
            differences
                .restore(&of.core, who, &mut |script| run(puppets, position, number, script))?;
        }
        task::apply_outside(planned.core(), planned.pid)?;
    }
    fault::hit(Point::RestoreThreads)?;
    puppets.end_the_dead()?;
    for (position, planned) in plan.tasks.iter().enumerate() {
        let Some(body) = &planned.body else { continue };
        // The leader last: what it sets is reset by others' changes of credentials.
        for (number, of) in planned.threads.iter().enumerate().rev() {
            let mut script = Script::new();
            if number == 0 {
                task::apply_actions(planned.core(), &mut script);
                memory_attributes::lock_later(planned.core(), &mut script);
            }
            thread::apply_creds(&of.core, &own, &mut script);
            if number == 0 {
                let dumpable = body.mm.dumpable.unwrap_or(1);
                // 2 cannot be set, but is what changing credentials leads to.
                if matches!(dumpable, 0 | 1) {
                    let arguments = [libc::PR_SET_DUMPABLE.into(), dumpable.into()];
                    script.call("set whether it can be dumped", libc::SYS_prctl, &arguments);
                }
                files.own(&body.fds, &mut script);
            }
            run(puppets, position, number, &script)?;
        }
    }
    differences.tell();
    Ok(())
}

/// Gives all threads their registers and what waits for them. After this they can
/// only be let go.
///
/// # Errors
/// Whatever fails.
pub(super) fn finish(plan: &Plan, puppets: &mut Puppets, files: &mut Installer<'_>) -> Result<()> {
    for (position, planned) in plan.tasks.iter().enumerate() {
        if planned.body.is_none() {
            continue;
        }
        for (number, of) in planned.threads.iter().enumerate() {
            let mut script = Script::new();
            thread::apply_death_signal(&of.core, &mut script);
            if let Some(queue) =
                of.core.thread_core.as_ref().and_then(|core| core.signals_p.as_ref())
            {
                signals::requeue(queue, planned.pid, Some(of.tid), &mut script).map_err(|_| {
                    ResError::Image {
                        pid: of.tid,
                        problem: "a signal in its queue is malformed".into(),
                    }
                })?;
            }
            if number == 0 {
                task::finish(planned.core(), planned.pid, &mut script)?;
                memory_attributes::finish(planned.core(), &mut script);
            }
            if !script.is_empty() {
                let scratch = puppets.scratch;
                let puppet = puppets.tasks[position].as_mut().expect("it lives");
                // Signals wait from now on, maybe those of traps.
                scratch.run_without_traps(&mut puppet.threads[number], &script)?;
            }
        }
        // Parents come before their children, which then do not hear of this end.
        if let Some(code) = leader::has_exited(planned.core()) {
            puppets.end_leader(position, code)?;
        }
    }
    files.start()?;
    fault::hit(Point::RestoreLast)?;
    for (position, planned) in plan.tasks.iter().enumerate() {
        if planned.body.is_none() {
            continue;
        }
        // One with children that stop waits for them first.
        if !puppets.awaits_stops(position) {
            puppets.dress(position)?;
        }
    }
    Ok(files.position_late()?)
}

fn run(puppets: &mut Puppets, position: usize, number: usize, script: &Script) -> Result<Answers> {
    let scratch = puppets.scratch;
    let puppet = puppets.tasks[position].as_mut().expect("it lives");
    Ok(scratch.run(&mut puppet.threads[number], script)?)
}

/// Adds the call that tells the kernel what the parts of the address space are for
/// (`PR_SET_MM_MAP`, which needs no more than `CAP_CHECKPOINT_RESTORE` since Linux
/// 5.9), and what switches huge pages off.
fn memory_map(body: &Body, program: i32, script: &mut Script) {
    let mm = &body.mm;
    let mut map = Vec::with_capacity(MM_MAP_BYTES);
    for address in [
        mm.mm_start_code,
        mm.mm_end_code,
        mm.mm_start_data,
        mm.mm_end_data,
        mm.mm_start_brk,
        mm.mm_brk,
        mm.mm_start_stack,
        mm.mm_arg_start,
        mm.mm_arg_end,
        mm.mm_env_start,
        mm.mm_env_end,
        0, // the address of the auxiliary vector
    ] {
        map.extend_from_slice(&address.to_le_bytes());
    }
    let auxv: Vec<u8> = mm.mm_saved_auxv.iter().flat_map(|word| word.to_le_bytes()).collect();
    map.extend_from_slice(&u32::try_from(auxv.len()).unwrap_or(0).to_le_bytes());
    map.extend_from_slice(&program.to_le_bytes());
    debug_assert_eq!(map.len(), MM_MAP_BYTES);
    let auxv = script.bytes(&auxv);
    let buffer = script.bytes(&map);
    script.point(buffer, AUXV_AT, auxv);
    script.call(
        "describe the address space",
        libc::SYS_prctl,
        &[libc::PR_SET_MM.into(), libc::PR_SET_MM_MAP.into(), buffer.into(), MM_MAP_BYTES.into()],
    );
    if mm.thp_disabled == Some(true) {
        let arguments = [libc::PR_SET_THP_DISABLE.into(), 1.into()];
        script.call("switch huge pages off", libc::SYS_prctl, &arguments);
    }
}
