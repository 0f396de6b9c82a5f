//! Extended attributes of files.
#![expect(unsafe_code, reason = "getxattr with a buffer")]

use std::{ffi::CString, os::unix::ffi::OsStrExt, path::Path};

use nix::{errno::Errno, libc};

/// The longest value that is asked for: that of a path (`PATH_MAX`, `linux/limits.h`).
const VALUE_BYTES: usize = 4096;

/// Returns an extended attribute of a file.
///
/// # Errors
/// What `getxattr(2)` returns: `ENODATA` if the file does not have it, `EOPNOTSUPP`
/// if no file there has any, `ERANGE` if it is longer than a path. `EINVAL` for names
/// with a zero in them.
pub fn get(path: &Path, name: &str) -> Result<Vec<u8>, Errno> {
    let path = CString::new(path.as_os_str().as_bytes()).map_err(|_| Errno::EINVAL)?;
    let name = CString::new(name).map_err(|_| Errno::EINVAL)?;
    let mut value = vec![0_u8; VALUE_BYTES];
    // SAFETY: both strings end with a zero, and the kernel writes no more than
    // `value.len()` bytes to `value`; all of them live until it returns.
    let count = unsafe {
        libc::getxattr(path.as_ptr(), name.as_ptr(), value.as_mut_ptr().cast(), value.len())
    };
    value.truncate(Errno::result(count)?.unsigned_abs());
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_without_attributes_has_none() {
        let error = get(Path::new("/proc/self/status"), "user.nothing").unwrap_err();
        assert!(matches!(error, Errno::ENODATA | Errno::EOPNOTSUPP), "{error}");
        assert_eq!(get(Path::new("/"), "user.a\0b"), Err(Errno::EINVAL));
    }
}
