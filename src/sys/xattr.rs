//! Extended attributes of files.
#![expect(unsafe_code, reason = "getxattr and its like with buffers")]

use std::{ffi::CString, os::unix::ffi::OsStrExt, path::Path};

use nix::{errno::Errno, libc};

/// The longest value of an attribute (`XATTR_SIZE_MAX`, `linux/limits.h`).
const VALUE_BYTES: usize = 64 << 10;

/// The largest size of a value, and of all names together (`XATTR_SIZE_MAX`, `XATTR_LIST_MAX`,
/// `linux/limits.h`).
const MOST_BYTES: usize = 65536;

/// The name and the value of an extended attribute.
pub type Attribute = (Vec<u8>, Vec<u8>);

/// Returns an extended attribute of a file.
///
/// # Errors
/// `ENODATA` if the file does not have it; `EOPNOTSUPP` if the file system has no extended
/// attributes; `EINVAL` for a name with a NUL byte.
pub fn get(path: &Path, name: &str) -> Result<Vec<u8>, Errno> {
    value(path, name.as_bytes(), VALUE_BYTES)
}

/// Returns all extended attributes of a file; none if the file system does not support them.
pub fn all(path: &Path) -> Result<Vec<Attribute>, Errno> {
    let c_path = CString::new(path.as_os_str().as_bytes()).map_err(|_| Errno::EINVAL)?;
    let mut names = vec![0_u8; MOST_BYTES];
    // SAFETY: the string ends with a zero, and the kernel writes no more than
    // `names.len()` bytes to `names`; both live until it returns.
    let count = unsafe { libc::listxattr(c_path.as_ptr(), names.as_mut_ptr().cast(), names.len()) };
    match Errno::result(count) {
        Err(Errno::EOPNOTSUPP) => return Ok(Vec::new()),
        count => names.truncate(count?.unsigned_abs()),
    }
    let names = names.split(|byte| *byte == 0).filter(|name| !name.is_empty());
    names.map(|name| Ok((name.to_owned(), value(path, name, MOST_BYTES)?))).collect()
}

/// Removes an attribute of the file at `path`, which is not followed if it is a link.
///
/// # Errors
/// `ENODATA` if there is none; those of `lremovexattr(2)`.
pub fn remove(path: &Path, name: &[u8]) -> Result<(), Errno> {
    let path = CString::new(path.as_os_str().as_bytes()).map_err(|_| Errno::EINVAL)?;
    let name = CString::new(name).map_err(|_| Errno::EINVAL)?;
    // SAFETY: both strings end with a zero and outlive the call.
    Errno::result(unsafe { libc::lremovexattr(path.as_ptr(), name.as_ptr()) }).map(drop)
}

/// Sets an extended attribute of a file.
///
/// # Errors
/// `EINVAL` for a name with a NUL byte.
pub fn set(path: &Path, name: &[u8], value: &[u8]) -> Result<(), Errno> {
    let path = CString::new(path.as_os_str().as_bytes()).map_err(|_| Errno::EINVAL)?;
    let name = CString::new(name).map_err(|_| Errno::EINVAL)?;
    // SAFETY: both strings end with a zero, and the kernel reads `value.len()` bytes of
    // `value`; all of them live until it returns.
    let result = unsafe {
        libc::setxattr(path.as_ptr(), name.as_ptr(), value.as_ptr().cast(), value.len(), 0)
    };
    Errno::result(result).map(drop)
}

fn value(path: &Path, name: &[u8], most_bytes: usize) -> Result<Vec<u8>, Errno> {
    let path = CString::new(path.as_os_str().as_bytes()).map_err(|_| Errno::EINVAL)?;
    let name = CString::new(name).map_err(|_| Errno::EINVAL)?;
    let mut value = vec![0_u8; most_bytes];
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
