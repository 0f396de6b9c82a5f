//! Time namespaces: what the clocks that start at boot show.
//!
//! The images have what `CLOCK_MONOTONIC` and `CLOCK_BOOTTIME` showed at the dump, and the restored
//! clocks go on from there. CRIU writes the clocks of a tree without a time namespace of its own, too,
//! as the namespace number 0, and so does rcriu. The restore uses these only if the clocks of this
//! machine are behind: clocks that went back would make the tree wait.
//!
//! The first process creates the namespace. Its clocks can be set until a process enters it, and the
//! first process enters it when rcriu has set them.

use std::{
    fs::{self, File},
    os::fd::AsRawFd,
};

use nix::{
    libc,
    sys::time::TimeSpec,
    time::{ClockId, clock_gettime},
};

use super::{Building, Collect, Namespace, Options, Restoring, wrong};
use crate::{
    image::{
        ImageStore, Kind, SnapshotWriter,
        proto::{TimensEntry, Timespec},
        tree::time_problem,
    },
    inject::Script,
    proc,
    res::{ResError, Result},
    units::HostPid,
};

/// `CLONE_NEWTIME` (`linux/sched.h`, since Linux 5.6).
pub(super) const CLONE_NEWTIME: i32 = 0x80;

/// The number that images give to the clocks of a tree without a time namespace of its own.
pub(super) const OF_DUMPER: u32 = 0;

/// Its name in `/proc/PID/ns`.
pub(super) const FILE: &str = "time";

/// `CAP_SYS_ADMIN` (`linux/capability.h`).
const CAP_SYS_ADMIN: u32 = 21;

/// Nanoseconds in a second.
const NANOSECONDS: i128 = 1_000_000_000;

/// `struct timespec`.
const TIMESPEC_BYTES: usize = 16;

/// The clocks of a time namespace.
const CLOCKS: [i32; 2] = [libc::CLOCK_MONOTONIC, libc::CLOCK_BOOTTIME];

#[derive(Debug)]
pub(super) struct Time;

impl Namespace for Time {
    fn clone_flag(&self) -> u64 {
        0 // `clone(2)` would leave no moment for setting the clocks
    }

    fn ask(&self, script: &mut Script) -> Option<Collect> {
        let times = CLOCKS.map(|clock| {
            let time = script.space(TIMESPEC_BYTES);
            let arguments = [clock.into(), time.into()];
            script.call("read a clock", libc::SYS_clock_gettime, &arguments);
            time
        });
        Some(Box::new(move |answers, number, images| {
            let [monotonic, boottime] = times.map(|time| timespec(answers.bytes(time)));
            images.write(Kind::Timens, number.into(), &[TimensEntry { monotonic, boottime }])
        }))
    }

    fn restore(
        &self,
        images: &dyn ImageStore,
        number: u32,
        _: &Options,
    ) -> Result<Box<dyn Restoring>> {
        let entry: TimensEntry = images.message(Kind::Timens, number.into())?;
        Ok(Box::new(clocks(&entry, number)?))
    }
}

/// Returns the clocks in an image.
fn clocks(entry: &TimensEntry, number: u32) -> Result<Clocks> {
    if let Some(problem) = time_problem(entry) {
        return Err(wrong(number, &problem));
    }
    let wanted = [&entry.monotonic, &entry.boottime]
        .map(|time| i128::from(time.tv_sec) * NANOSECONDS + i128::from(time.tv_nsec));
    Ok(Clocks { wanted, entered: None })
}

/// Writes the clocks of this program, for a tree `pid` that has the same.
pub(super) fn dump_dumpers(pid: HostPid, images: &SnapshotWriter) -> Result<()> {
    let read = |clock| {
        let time = now(clock, pid)?;
        let part = |number: i64| u64::try_from(number).unwrap_or(0);
        Ok::<_, ResError>(Timespec { tv_sec: part(time.tv_sec()), tv_nsec: part(time.tv_nsec()) })
    };
    let [monotonic, boottime] = CLOCKS.map(read);
    let entry = TimensEntry { monotonic: monotonic?, boottime: boottime? };
    Ok(images.write(Kind::Timens, OF_DUMPER.into(), &[entry])?)
}

/// Returns a namespace for a tree that had none of its own, if one of the clocks here is behind what
/// the image says and rcriu may make namespaces.
pub(super) fn if_behind(images: &dyn ImageStore) -> Result<Option<Box<dyn Restoring>>> {
    let image = images.message_if_any::<TimensEntry>(Kind::Timens, OF_DUMPER.into())?;
    let Some(entry) = image else { return Ok(None) };
    let clocks = clocks(&entry, OF_DUMPER)?;
    let is_behind = |(clock, wanted): (&i32, i128)| {
        clock_gettime(ClockId::from_raw(*clock)).is_ok_and(|now| nanoseconds(now) < wanted)
    };
    if !CLOCKS.iter().zip(clocks.wanted).any(is_behind) {
        return Ok(None);
    }
    let own = proc::status(HostPid::own())?;
    let may = own.cap_effective >> CAP_SYS_ADMIN & 1 == 1;
    Ok(may.then(|| Box::new(clocks) as _))
}

/// Reads a clock of this program, for process `pid`.
fn now(clock: i32, pid: HostPid) -> Result<TimeSpec> {
    let step = "read the clocks for";
    let time = clock_gettime(ClockId::from_raw(clock));
    time.map_err(|source| ResError::Process { pid, step, source })
}

fn nanoseconds(time: TimeSpec) -> i128 {
    i128::from(time.tv_sec()) * NANOSECONDS + i128::from(time.tv_nsec())
}

/// Parses a `struct timespec`.
fn timespec(bytes: &[u8]) -> Timespec {
    let word = |at: usize| {
        u64::from_ne_bytes(bytes[at..at + 8].try_into().expect("a range of eight bytes"))
    };
    Timespec { tv_sec: word(0), tv_nsec: word(8) }
}

/// The clocks of a namespace to be restored.
#[derive(Debug)]
struct Clocks {
    /// What each of [`CLOCKS`] is to show, in nanoseconds.
    wanted: [i128; 2],
    /// The new namespace, which the first process enters.
    entered: Option<File>,
}

impl Restoring for Clocks {
    fn first_script(&self) -> Script {
        let mut script = Script::new();
        script.call("make a time namespace", libc::SYS_unshare, &[CLONE_NEWTIME.into()]);
        script
    }

    fn build(&mut self, on: &Building<'_>) -> Result<()> {
        let first = on.first;
        // Offsets are relative to the first time namespace, in which this program need not be.
        let own = proc::time_offsets(HostPid::own())?;
        let mut text = String::new();
        for ((clock, wanted), own) in CLOCKS.iter().zip(self.wanted).zip(own) {
            let offset = wanted - (nanoseconds(now(*clock, first)?) - i128::from(own));
            let (seconds, rest) = (offset.div_euclid(NANOSECONDS), offset.rem_euclid(NANOSECONDS));
            text.push_str(&format!("{clock} {seconds} {rest}\n"));
        }
        let path = format!("/proc/{first}/timens_offsets");
        let failed = |path: &str, source| ResError::Write { path: path.into(), source };
        fs::write(&path, text).map_err(|source| failed(&path, source))?;
        let path = format!("/proc/{first}/ns/time_for_children");
        self.entered = Some(File::open(&path).map_err(|source| failed(&path, source))?);
        Ok(())
    }

    fn script(&self) -> Script {
        let mut script = Script::new();
        // It shares the descriptors of this program.
        if let Some(namespace) = &self.entered {
            let arguments = [namespace.as_raw_fd().into(), CLONE_NEWTIME.into()];
            script.call("enter the time namespace", libc::SYS_setns, &arguments);
        }
        script
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::{Directory, proto::InventoryEntry};

    #[test]
    fn clocks_of_images_have_sane_values() {
        let entry = |tv_sec, tv_nsec| {
            let monotonic = Timespec { tv_sec, tv_nsec };
            TimensEntry { monotonic, boottime: Timespec { tv_sec: 7, tv_nsec: 5 } }
        };
        assert_eq!(clocks(&entry(3, 4), 9).unwrap().wanted, [3_000_000_004, 7_000_000_005]);
        let error = clocks(&entry(3, 1_000_000_000), 9).unwrap_err();
        assert!(error.to_string().contains("namespace 9: a clock has 1000000000 nanoseconds"));
        assert!(clocks(&entry(u64::MAX, 0), 9).is_err());
    }

    #[test]
    fn a_tree_gets_a_namespace_only_if_clocks_are_behind() {
        let dir = tempfile::tempdir().unwrap();
        let dump = |later| {
            let images = SnapshotWriter::begin(dir.path()).unwrap();
            let now = |clock| {
                let now = clock_gettime(ClockId::from_raw(clock)).unwrap();
                Timespec { tv_sec: now.tv_sec().cast_unsigned() + later, tv_nsec: 0 }
            };
            let [monotonic, boottime] = CLOCKS.map(now);
            let entry = TimensEntry { monotonic, boottime };
            images.write(Kind::Timens, 0, &[entry]).unwrap();
            images.sync(|_| {}).unwrap();
            images.commit(&InventoryEntry::default()).unwrap();
            if_behind(&Directory::at(dir.path())).unwrap().is_some()
        };
        assert!(!dump(0));
        let status = proc::status(HostPid::own()).unwrap();
        assert_eq!(dump(1000), status.cap_effective >> CAP_SYS_ADMIN & 1 == 1);
    }
}
