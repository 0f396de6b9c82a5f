use std::{
    process::{Child, Command, Stdio},
    time::Duration,
};

use nix::{errno::Errno, libc};

use super::{FreezeOptions, Frozen, Outcome, Script, TABLE_BYTES, with_session};
use crate::{proc, units::HostPid};

/// A child process, which dies with the test.
struct Target(Child);

impl Target {
    fn start(command: &str) -> Self {
        let mut shell = Command::new("sh");
        let child = shell.args(["-c", command]).stdin(Stdio::null()).spawn().unwrap();
        Self(child)
    }

    fn pid(&self) -> HostPid {
        HostPid(i32::try_from(self.0.id()).unwrap())
    }

    /// Whether it sleeps, for the first time or again.
    fn is_asleep(&self) -> bool {
        let calls = [libc::SYS_clock_nanosleep, libc::SYS_restart_syscall];
        let line = std::fs::read_to_string(format!("/proc/{}/syscall", self.pid()));
        let number = line.ok().and_then(|line| line.split(' ').next()?.parse().ok());
        number.is_some_and(|number| calls.contains(&number))
    }

    /// What must be the same before and after.
    fn state(&self) -> (Vec<String>, u64, u64, u64, HostPid) {
        let maps = proc::maps(self.pid()).unwrap();
        let status = proc::status(self.pid()).unwrap();
        (
            maps.iter().map(|mapping| format!("{mapping:?}")).collect(),
            status.sig_ignored,
            status.sig_blocked,
            status.sig_caught,
            status.tracer_pid,
        )
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn wait_until(mut condition: impl FnMut() -> bool) {
    for _ in 0..1000 {
        if condition() {
            return;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    panic!("the condition did not come true");
}

#[test]
fn privileged_a_process_works_for_us_and_notices_nothing() {
    for ignore in ["", "trap '' TRAP; "] {
        let target = Target::start(&format!("{ignore}exec sleep 1000"));
        let pid = target.pid();
        // Wait until its libraries are mapped.
        wait_until(|| target.is_asleep());
        let before = target.state();
        let mut frozen = Frozen::freeze(pid, FreezeOptions::new(10)).unwrap();
        assert_eq!(proc::status(pid).unwrap().tracer_pid.0, nix::unistd::gettid().as_raw());
        let mappings = proc::maps(pid).unwrap();
        let mut script = Script::new();
        let getpid = script.call("getpid", libc::SYS_getpid, &[]);
        let fd = script.call("eventfd", libc::SYS_eventfd2, &[7.into(), 0.into()]);
        let buffer = script.space(8);
        script.call("read", libc::SYS_read, &[fd.into(), buffer.into(), 8.into()]);
        script.call("close", libc::SYS_close, &[fd.into()]);
        let bad = script.attempt(libc::SYS_close, &[fd.into()]);
        let answers = with_session(
            &mut frozen.tasks[0].threads,
            &mappings,
            &[],
            TABLE_BYTES,
            |session, threads| session.run(threads, 0, &script),
        )
        .unwrap();
        assert_eq!(answers.result(getpid), Ok(u64::try_from(pid.0).unwrap()));
        assert_eq!(answers.value::<u64>(buffer), 7);
        assert_eq!(answers.result(bad), Err(Errno::EBADF));

        let mut failing = Script::new();
        failing.call("close nothing", libc::SYS_close, &[(-1).into()]);
        let error = with_session(
            &mut frozen.tasks[0].threads,
            &mappings,
            &[],
            TABLE_BYTES,
            |session, threads| session.run(threads, 0, &failing),
        )
        .unwrap_err();
        assert_eq!(error.to_string(), format!("close nothing in process {pid}"));
        frozen.release(Outcome::Run).unwrap();
        wait_until(|| target.is_asleep());
        assert_eq!(target.state(), before);
    }
}

#[test]
fn privileged_a_tree_is_stopped_whole_and_goes_on() {
    let target = Target::start("(sleep 1000 & sleep 1000) & sleep 1000; true");
    let pid = target.pid();
    wait_until(|| proc::children(pid).unwrap().len() == 2);
    let frozen = Frozen::freeze(pid, FreezeOptions::new(10)).unwrap();
    assert!(frozen.tasks.len() >= 3, "{frozen:?}");
    assert_eq!(frozen.tasks[0].pid, pid);
    let pids: Vec<HostPid> = frozen.tasks.iter().map(|task| task.pid).collect();
    for pid in &pids {
        assert_eq!(proc::status(*pid).unwrap().state, 't');
    }
    frozen.release(Outcome::Kill).unwrap();
    for pid in pids {
        wait_until(|| proc::stat(pid).map_or(true, |stat| stat.state == 'Z'));
    }
}
