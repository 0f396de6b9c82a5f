//! `/proc/self/mountinfo`: the table of mounts.

use std::{
    ffi::OsString,
    os::unix::ffi::OsStringExt,
    path::{Path, PathBuf},
};

use super::text::{self, Defect, Parsed};

/// A mount in the caller's mount namespace (`proc_pid_mountinfo(5)`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Its number, unique among all mounts of the machine.
    pub id: i32,
    /// The mount on which it is; the reader of the table may not see that.
    pub parent: i32,
    /// The major and minor number of its device, as `stat(2)` returns them.
    pub device: (u32, u32),
    /// The directory of the file system that is mounted.
    pub root: PathBuf,
    /// The mount point.
    pub point: PathBuf,
    /// The options of the mount, separated by commas.
    pub flags: Vec<u8>,
    /// The group of mounts with which it shares events, or 0.
    pub shared: u32,
    /// The group of mounts from which it receives events, or 0.
    pub master: u32,
    /// Whether it cannot be bound elsewhere.
    pub unbindable: bool,
    /// The type of the file system.
    pub fs_type: Vec<u8>,
    /// The mounted device, as passed to `mount(2)`.
    pub source: PathBuf,
    /// The options of the file system, separated by commas.
    pub options: Vec<u8>,
}

/// The reason why a cgroup has no directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoCgroup {
    /// Its hierarchy is not mounted.
    NotMounted,
    /// It does not exist below a mount of its hierarchy.
    Absent,
}

/// Returns the directory of a cgroup, as `/proc/PID/cgroup` names it: the `controllers` of its
/// hierarchy, empty for version 2, and its `path` there.
///
/// # Errors
/// The reason why there is none.
pub fn cgroup_directory(
    controllers: &[u8],
    path: &[u8],
    mounts: &[Mount],
) -> Result<PathBuf, NoCgroup> {
    let is_it = |mount: &&Mount| match controllers {
        b"" => mount.fs_type == b"cgroup2",
        controllers => {
            let options: Vec<_> = mount.options.split(|byte| *byte == b',').collect();
            mount.fs_type == b"cgroup"
                && controllers.split(|byte| *byte == b',').all(|part| options.contains(&part))
        }
    };
    let path = String::from_utf8_lossy(path);
    let mut reason = NoCgroup::NotMounted;
    for mount in mounts.iter().filter(is_it) {
        reason = NoCgroup::Absent;
        if let Ok(below) = Path::new(&*path).strip_prefix(&mount.root) {
            let directory = mount.point.join(below);
            if !path.contains("/..") && directory.join("cgroup.procs").exists() {
                return Ok(directory);
            }
        }
    }
    Err(reason)
}

/// Parses the text of the file. Keeps the order: later mounts cover earlier ones.
pub(super) fn parse_mounts(text: &[u8]) -> Parsed<Vec<Mount>> {
    text::lines(text).map(parse_mount).collect()
}

fn parse_mount(line: &[u8]) -> Parsed<Mount> {
    let whole = || Defect::new("mount", line);
    let mut fields = text::words(line);
    let id = text::signed(fields.next().unwrap_or_default(), "id of a mount")?;
    let parent = text::signed(fields.next().unwrap_or_default(), "parent of a mount")?;
    let device = fields.next().and_then(device).ok_or_else(whole)?;
    let root = fields.next().ok_or_else(whole)?;
    let point = fields.next().ok_or_else(whole)?;
    let flags = fields.next().ok_or_else(whole)?.to_vec();
    let (mut shared, mut master, mut unbindable) = (0, 0, false);
    // Optional fields, which end with a hyphen.
    loop {
        let field = fields.next().ok_or_else(whole)?;
        let group = |name: &[u8]| {
            let number = std::str::from_utf8(field.strip_prefix(name)?).ok()?;
            number.parse::<u32>().ok()
        };
        match field {
            b"-" => break,
            b"unbindable" => unbindable = true,
            _ => {
                shared = group(b"shared:").unwrap_or(shared);
                master = group(b"master:").unwrap_or(master);
            }
        }
    }
    let fs_type = fields.next().ok_or_else(whole)?.to_vec();
    let source = path(fields.next().unwrap_or_default());
    let options = fields.next().unwrap_or_default().to_vec();
    Ok(Mount {
        id,
        parent,
        device,
        root: path(root),
        point: path(point),
        flags,
        shared,
        master,
        unbindable,
        fs_type,
        source,
        options,
    })
}

/// Parses `MAJOR:MINOR`.
fn device(field: &[u8]) -> Option<(u32, u32)> {
    let (major, minor) = std::str::from_utf8(field).ok()?.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// Decodes the kernel's `\ooo` escapes of blanks, tabs, line feeds and backslashes.
fn path(field: &[u8]) -> PathBuf {
    /// The digits of an escape.
    const DIGITS: usize = 3;
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, after)) = rest.split_first() {
        let digits = after.get(..DIGITS).filter(|_| *first == b'\\');
        let byte = digits
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        bytes.push(byte.unwrap_or(*first));
        rest = if byte.is_some() { &after[DIGITS..] } else { after };
    }
    OsString::from_vec(bytes).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn optional_fields_and_escapes_are_understood() {
        let text =
            b"33 32 0:30 /a /mnt/b\\040c rw,relatime shared:1 - cgroup none rw,cpu,cpuacct\n\
                     41 31 259:38 / /u\\134 rw - cgroup2 cgroup2 rw\n";
        let mounts = parse_mounts(text).unwrap();
        assert_eq!(
            mounts[0],
            Mount {
                id: 33,
                parent: 32,
                device: (0, 30),
                root: "/a".into(),
                point: "/mnt/b c".into(),
                flags: b"rw,relatime".to_vec(),
                shared: 1,
                master: 0,
                unbindable: false,
                fs_type: b"cgroup".to_vec(),
                source: "none".into(),
                options: b"rw,cpu,cpuacct".to_vec()
            }
        );
        assert_eq!(mounts[1].fs_type, b"cgroup2");
        assert_eq!((mounts[1].device, mounts[1].point.as_path()), ((259, 38), "/u\\".as_ref()));
        parse_mounts(b"33 32 0:30 / /x rw\n").unwrap_err();
        parse_mounts(b"33 32 0 / /x rw - proc proc rw\n").unwrap_err();
    }
}
