//! The limits of an IPC namespace, and other variables (`/proc/sys`).

use std::{fs, io, path::PathBuf};

use crate::{
    image::proto::IpcVarEntry,
    res::{ResError, Result},
};

/// A variable of the namespace that the reader is in.
struct Variable {
    /// Its file below `/proc/sys`.
    file: &'static str,
    /// Returns its numbers in an image; `None` if the image does not have it.
    get: fn(&IpcVarEntry) -> Option<Vec<u64>>,
    /// Enters its numbers into an image.
    set: fn(&mut IpcVarEntry, &[u64]),
    /// What it is while a restore creates objects; `None` if it makes no difference.
    widest: Option<&'static str>,
}

/// Returns a number of 32 bits. The kernel has no larger ones here.
fn small(numbers: &[u64]) -> u32 {
    numbers.first().map_or(0, |number| u32::try_from(*number).unwrap_or(u32::MAX))
}

macro_rules! variables {
    ($($file:literal, $field:ident, $kind:ident, $widest:expr;)*) => {
        [$(Variable {
            file: $file,
            get: variables!(@get $kind $field),
            set: variables!(@set $kind $field),
            widest: $widest,
        },)*]
    };
    (@get small $field:ident) => { |of| Some(vec![of.$field.into()]) };
    (@set small $field:ident) => { |of, numbers| of.$field = small(numbers) };
    (@get large $field:ident) => { |of| Some(vec![of.$field]) };
    (@set large $field:ident) => { |of, numbers| of.$field = numbers[0] };
    (@get optional $field:ident) => { |of| of.$field.map(|number| vec![number.into()]) };
    (@set optional $field:ident) => { |of, numbers| of.$field = Some(small(numbers)) };
    (@get several $field:ident) => { |of| Some(of.$field.iter().map(|n| (*n).into()).collect()) };
    (@set several $field:ident) => {
        |of, numbers| of.$field = numbers.iter().map(|number| small(&[*number])).collect()
    };
}

/// All variables. Limits that the kernel sets to their widest values in a new namespace need no others.
static VARIABLES: [Variable; 17] = variables! {
    "kernel/sem", sem_ctls, several, Some("2147483647 2147483647 2147483647 32768");
    "kernel/msgmax", msg_ctlmax, small, Some("2147483647");
    "kernel/msgmnb", msg_ctlmnb, small, Some("2147483647");
    "kernel/msgmni", msg_ctlmni, small, Some("32768");
    "kernel/auto_msgmni", auto_msgmni, small, None;
    "kernel/shmmax", shm_ctlmax, large, None;
    "kernel/shmall", shm_ctlall, large, None;
    "kernel/shmmni", shm_ctlmni, small, Some("32768");
    "kernel/shm_rmid_forced", shm_rmid_forced, small, None;
    "fs/mqueue/queues_max", mq_queues_max, small, Some("2147483647");
    "fs/mqueue/msg_max", mq_msg_max, small, Some("65536");
    "fs/mqueue/msgsize_max", mq_msgsize_max, small, Some("16777216");
    "fs/mqueue/msg_default", mq_msg_default, optional, None;
    "fs/mqueue/msgsize_default", mq_msgsize_default, optional, None;
    // Creating an object takes the number.
    "kernel/msg_next_id", msg_next_id, optional, None;
    "kernel/sem_next_id", sem_next_id, optional, None;
    "kernel/shm_next_id", shm_next_id, optional, None;
};

impl Variable {
    fn path(&self) -> PathBuf {
        PathBuf::from("/proc/sys").join(self.file)
    }

    /// Reads its numbers; `None` if the kernel does not have it, or if it is unset (-1).
    fn read(&self) -> Result<Option<Vec<u64>>> {
        let text = match fs::read_to_string(self.path()) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            text => text.map_err(|source| ResError::Read { path: self.path(), source })?,
        };
        Ok(text.split_ascii_whitespace().map(|word| word.parse().ok()).collect())
    }
}

/// Whether segments end with their last attachment (`shm_rmid_forced`).
pub(super) fn removes_segments() -> bool {
    fs::read("/proc/sys/kernel/shm_rmid_forced").is_ok_and(|text| text.trim_ascii() == b"1")
}

/// Reads all variables.
pub(super) fn read() -> Result<IpcVarEntry> {
    let mut entry = IpcVarEntry::default();
    for variable in &VARIABLES {
        if let Some(numbers) = variable.read()?.filter(|numbers| !numbers.is_empty()) {
            (variable.set)(&mut entry, &numbers);
        }
    }
    Ok(entry)
}

/// Widens the limits as far as the kernel allows.
pub(super) fn widen() {
    for variable in &VARIABLES {
        let Some(widest) = variable.widest else { continue };
        // A limit that cannot be widened may be wide enough.
        if let Err(error) = fs::write(variable.path(), widest) {
            log::debug!("{}: {error}", variable.path().display());
        }
    }
}

/// Sets all variables that have other values.
pub(super) fn write(entry: &IpcVarEntry) -> Result<()> {
    for variable in &VARIABLES {
        let Some(wanted) = (variable.get)(entry) else { continue };
        let found = variable.read()?;
        // 0 stands for a variable that the kernel of the dump did not have.
        let is_absent = found.is_none() && wanted.iter().all(|number| *number == 0);
        if is_absent || found.as_ref() == Some(&wanted) {
            continue;
        }
        let words: Vec<_> = wanted.iter().map(u64::to_string).collect();
        let path = variable.path();
        fs::write(&path, words.join(" ")).map_err(|source| ResError::Write { path, source })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_variable_has_a_place_of_its_own_in_the_image() {
        let mut entry = IpcVarEntry::default();
        for (number, variable) in (10..).zip(&VARIABLES) {
            (variable.set)(&mut entry, &[number]);
        }
        for (number, variable) in (10..).zip(&VARIABLES) {
            assert_eq!((variable.get)(&entry), Some(vec![number]), "{}", variable.file);
        }
        assert_eq!((VARIABLES[14].get)(&IpcVarEntry::default()), None);
    }

    #[test]
    fn variables_are_read() {
        let entry = read().unwrap();
        assert_eq!(entry.sem_ctls.len(), 4);
        assert!(entry.shm_ctlmax > 0 && entry.msg_ctlmax > 0);
    }
}
