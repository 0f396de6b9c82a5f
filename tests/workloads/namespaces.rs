//! Namespaces that a tree has for itself.

use std::{
    ffi::CStr,
    fs::{self, File},
    os::fd::AsRawFd,
    path::PathBuf,
};

use crate::{
    Row,
    kit::{Checkpoint, Verdict, same},
};

pub const ROWS: &[Row] = &[
    ("uts_namespace", uts_namespace),
    ("uts_namespace_of_a_child", of_a_child),
    ("uts_namespaces", uts_namespaces),
    ("child_in_another_cgroup_namespace", child_in_another_cgroup_namespace),
    ("namespace_descriptors", namespace_descriptors),
    ("descriptor_of_another_namespace", descriptor_of_another_namespace),
];

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

/// A tree in the namespace of the machine, of which a part has another name for the host.
fn of_a_child(checkpoint: &Checkpoint) -> Verdict {
    let outside = namespace()?;
    let machines = names()?;
    let child = checkpoint.fork(|child| {
        enter("a-host-of-the-child", "its.domain")?;
        child.wait();
        same(
            "names in the child",
            ["a-host-of-the-child", "its.domain"].map(str::to_owned),
            names()?,
        )
    })?;
    checkpoint.wait();
    same("names", machines, names()?)?;
    same("the namespace", outside, namespace()?)?;
    child.join()
}

/// A tree with three namespaces: a child has one of its own, a grandchild is in that of the root
/// again, and its child in a third one, with a thread.
fn uts_namespaces(checkpoint: &Checkpoint) -> Verdict {
    enter("a-host-of-the-root", "")?;
    let roots = File::open("/proc/self/ns/uts").map_err(|error| error.to_string())?;
    let is_named = |name: &str| same("names", [name, ""].map(str::to_owned), names()?);
    let child = checkpoint.fork(|child| {
        enter("a-host-of-the-child", "")?;
        let grandchild = child.fork(|grandchild| {
            sys!(setns(roots.as_raw_fd(), libc::CLONE_NEWUTS))?;
            let last = grandchild.fork(|last| {
                enter("a-host-of-the-last", "")?;
                last.wait();
                is_named("a-host-of-the-last")
            })?;
            grandchild.wait();
            is_named("a-host-of-the-root")?;
            last.join()
        })?;
        child.wait();
        is_named("a-host-of-the-child")?;
        grandchild.join()
    })?;
    checkpoint.wait();
    is_named("a-host-of-the-root")?;
    let found = inode(&format!("/proc/self/fd/{}", roots.as_raw_fd()))?;
    same("the namespace of the descriptor", inode("/proc/self/ns/uts")?, found)?;
    child.join()
}

/// Refused: a cgroup namespace of a child.
fn child_in_another_cgroup_namespace(checkpoint: &Checkpoint) -> Verdict {
    let child = checkpoint.fork(|child| {
        sys!(unshare(libc::CLONE_NEWCGROUP))?;
        child.wait();
        Ok(())
    })?;
    checkpoint.wait();
    child.join()
}

/// The inode of a namespace, by a path that leads to it.
fn inode(path: &str) -> Result<u64, String> {
    let stat = fs::metadata(path).map_err(|error| format!("{path}: {error}"))?;
    Ok(std::os::unix::fs::MetadataExt::ino(&stat))
}

/// Descriptors of all namespaces of the process, of which the machine has one as well, and of
/// the one that it has left.
fn namespace_descriptors(checkpoint: &Checkpoint) -> Verdict {
    let open = |name: &str| {
        let path = format!("/proc/self/ns/{name}");
        File::open(&path).map_err(|error| format!("{path}: {error}"))
    };
    let machines = open("uts")?;
    enter("a-host-of-its-own", "")?;
    let kinds = ["pid", "net", "ipc", "uts", "mnt", "user", "cgroup"];
    let files = kinds.iter().map(|name| open(name)).collect::<Result<Vec<_>, _>>()?;
    let check = || -> Verdict {
        for (name, file) in kinds.iter().zip(&files) {
            let fd = file.as_raw_fd();
            let found = inode(&format!("/proc/self/fd/{fd}"))?;
            same(name, inode(&format!("/proc/self/ns/{name}"))?, found)?;
            same("flags", libc::O_RDONLY, sys!(fcntl(fd, libc::F_GETFL))? & libc::O_ACCMODE)?;
        }
        Ok(())
    };
    check()?;
    checkpoint.wait();
    check()?;
    same("the name of the host", "a-host-of-its-own", &names()?[0])?;
    sys!(setns(machines.as_raw_fd(), libc::CLONE_NEWUTS))?;
    ensure!(names()?[0] != "a-host-of-its-own", "it is not back in the namespace of the machine");
    sys!(setns(files[3].as_raw_fd(), libc::CLONE_NEWUTS))?;
    same("the name of the host", "a-host-of-its-own", &names()?[0])
}

/// Refused: a namespace that only a descriptor keeps.
fn descriptor_of_another_namespace(checkpoint: &Checkpoint) -> Verdict {
    let own = File::open("/proc/self/ns/net").map_err(|error| error.to_string())?;
    sys!(unshare(libc::CLONE_NEWNET))?;
    let _other = File::open("/proc/self/ns/net").map_err(|error| error.to_string())?;
    sys!(setns(own.as_raw_fd(), libc::CLONE_NEWNET))?;
    drop(own);
    checkpoint.wait();
    Ok(())
}
