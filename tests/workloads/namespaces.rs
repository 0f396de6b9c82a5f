//! Namespaces that a tree has for itself.

use std::{ffi::CStr, fs, path::PathBuf};

use crate::{
    Row,
    kit::{Checkpoint, Verdict, same},
};

pub const ROWS: &[Row] =
    &[("uts_namespace", uts_namespace), ("child_in_another_uts_namespace", child_in_another)];

/// Returns the names of the host and of its domain.
fn names() -> Result<[String; 2], String> {
    // SAFETY: all zeros are a value of it.
    let mut names: libc::utsname = unsafe { std::mem::zeroed() };
    sys!(uname(&raw mut names))?;
    Ok([names.nodename, names.domainname].map(|name| {
        // SAFETY: the kernel ends each name with a zero.
        unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned()
    }))
}

/// Moves into a new namespace with these names.
fn enter(host: &str, domain: &str) -> Verdict {
    sys!(unshare(libc::CLONE_NEWUTS))?;
    sys!(sethostname(host.as_ptr().cast(), host.len()))?;
    sys!(setdomainname(domain.as_ptr().cast(), domain.len()))?;
    Ok(())
}

/// Returns which namespace a process is in.
fn namespace() -> Result<PathBuf, String> {
    fs::read_link("/proc/self/ns/uts").map_err(|error| format!("read the namespace: {error}"))
}

/// A tree with names of its own for host and domain, which its child has, too, and which
/// are not those of the machine.
fn uts_namespace(checkpoint: &Checkpoint) -> Verdict {
    let outside = namespace()?;
    enter("a-host-of-its-own", "a.domain.of.its.own")?;
    let expected = names()?;
    let wanted = expected.clone();
    let child = checkpoint.fork(move |child| {
        child.wait();
        same("names in the child", wanted, names()?)
    })?;
    checkpoint.wait();
    same("names", expected, names()?)?;
    child.join()?;
    if namespace()? == outside {
        return Err("it is in the namespace of the machine".to_owned());
    }
    // It is this tree's to change.
    sys!(sethostname(c"another".as_ptr(), 7))?;
    same("the new name", "another".to_owned(), names()?[0].clone())
}

/// A tree of which a part has another name for the host.
fn child_in_another(checkpoint: &Checkpoint) -> Verdict {
    let child = checkpoint.fork(|child| {
        enter("a-host-of-the-child", "")?;
        child.wait();
        Ok(())
    })?;
    checkpoint.wait();
    child.join()
}
