//! Fanotify groups that decide whether other programs may open files (`FAN_OPEN_PERM`, ...).
//!
//! While such a program stands still, every program that opens a file it watches waits for it,
//! rcriu included. So the dump looks for these groups before it opens any file.

use crate::{
    inject::{Task, living},
    proc::{self, FdDetail},
    res::{ResError, Result},
};

/// `FAN_OPEN_PERM`, `FAN_ACCESS_PERM`, `FAN_OPEN_EXEC_PERM`, `FAN_PRE_ACCESS`
/// (`include/uapi/linux/fanotify.h`).
const PERMISSIONS: u32 = 0x0001_0000 | 0x0002_0000 | 0x0004_0000 | 0x0010_0000;

/// The link of a fanotify group.
const LINK: &[u8] = b"anon_inode:[fanotify]";

/// Refuses processes that have such a group.
///
/// # Errors
/// [`ResError::Refused`].
pub(super) fn check(tasks: &[Task]) -> Result<()> {
    for task in living(tasks) {
        let descriptors = proc::Descriptors::open(task.witness())?;
        for fd in descriptors.numbers()? {
            if descriptors.link(fd)? != LINK {
                continue;
            }
            let FdDetail::Fanotify(group) = descriptors.info(fd)?.detail else { continue };
            if group.marks.iter().any(|mark| mark.mask & PERMISSIONS != 0) {
                return Err(ResError::Refused {
                    pid: task.pid,
                    what: format!(
                        "decides by fanotify (descriptor {fd}) whether other programs may open files: they \
                         would wait until it is restored"
                    ),
                    help: "have it remove its marks for permission events",
                });
            }
        }
    }
    Ok(())
}
