//! The table of mounts.

use std::{
    ffi::OsString,
    fs,
    os::unix::ffi::OsStringExt,
    path::{Path, PathBuf},
};

use super::{MountError, Result};

/// The type of our mounts in the table.
pub const FS_TYPE: &str = "fuse.imgfs";

/// The line of a mount in `/proc/self/mountinfo`, as far as it matters here
/// (proc_pid_mountinfo(5)).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mounted {
    /// The minor number of the device that `stat(2)` tells; the major is 0.
    pub device: u32,
    /// Where it is mounted.
    pub mount_point: PathBuf,
    /// The type, such as `fuse.imgfs`.
    pub fs_type: String,
}

impl Mounted {
    /// Returns what is mounted at `mount_point`, the uppermost if there are
    /// several mounts.
    ///
    /// # Errors
    /// [`MountError::MountTable`].
    pub fn at(mount_point: &Path) -> Result<Option<Self>> {
        let text =
            fs::read("/proc/self/mountinfo").map_err(|source| MountError::MountTable { source })?;
        // Later mounts are further down, and lie over the earlier ones.
        Ok(parse(&text).filter(|mounted| mounted.mount_point == mount_point).last())
    }
}

/// Parses the table; lines of another form are left out.
fn parse(text: &[u8]) -> impl Iterator<Item = Mounted> {
    text.split(|byte| *byte == b'\n').filter_map(parse_line)
}

fn parse_line(line: &[u8]) -> Option<Mounted> {
    let mut fields = line.split(|byte| *byte == b' ');
    let device = std::str::from_utf8(fields.nth(2)?).ok()?;
    let mount_point = PathBuf::from(unescape(fields.nth(1)?));
    // Some optional fields, then a hyphen.
    fields.by_ref().find(|field| *field == b"-")?;
    let fs_type = String::from_utf8_lossy(fields.next()?).into_owned();
    let device = device.split_once(':')?.1.parse().ok()?;
    Some(Mounted { device, mount_point, fs_type })
}

/// Undoes the kernel's `\ooo` for blanks, tabs, line ends and backslashes.
fn unescape(field: &[u8]) -> OsString {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, tail)) = rest.split_first() {
        let octal = (*first == b'\\').then(|| tail.get(..3)).flatten();
        let value = octal
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        if let Some(value) = value {
            bytes.push(value);
            rest = &tail[3..];
        } else {
            bytes.push(*first);
            rest = tail;
        }
    }
    OsString::from_vec(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_parsed_with_and_without_optional_fields() {
        let text = b"22 1 0:20 / /proc rw,nosuid shared:5 master:1 - proc proc rw\n\
            nonsense\n\
            99 1 0:77 / /mnt/a\\040b\\134 ro,nosuid,nodev - fuse.imgfs /chain ro,user_id=0\n";
        let mounted: Vec<Mounted> = parse(text).collect();
        let expected = |device, path: &str, fs_type: &str| Mounted {
            device,
            mount_point: path.into(),
            fs_type: fs_type.into(),
        };
        assert_eq!(
            mounted,
            [expected(20, "/proc", "proc"), expected(77, "/mnt/a b\\", "fuse.imgfs")]
        );
    }
}
