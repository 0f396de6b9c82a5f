//! Namespaces that exist already, in which the tree is restored (`--join-ns`).
//!
//! The first process enters them before anything else, and all others inherit them. What the images
//! have of a namespace of this kind is not restored, since the namespace has contents of its own; except for
//! IPC objects, which the processes need.

use std::{
    fs::File,
    os::fd::{AsRawFd, OwnedFd},
    path::PathBuf,
};

use nix::libc;

use super::{Building, Restoring, mnt, net, time};
use crate::{
    inject::Script,
    res::{ResError, Result},
    sys::namespace,
    units::{HostPid, IdMap},
};

/// The kinds that can be joined: their names in `/proc/PID/ns`, and their flags of `setns(2)`.
const KINDS: [(&str, i32); 5] = [
    ("net", libc::CLONE_NEWNET),
    ("ipc", libc::CLONE_NEWIPC),
    ("uts", libc::CLONE_NEWUTS),
    (time::FILE, time::CLONE_NEWTIME),
    (mnt::FILE, libc::CLONE_NEWNS),
];

/// What is wrong with a `--join-ns`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum JoinError {
    /// It has another form.
    #[error(
        "{0:?} names no namespace\nhelp: write KIND:PID or KIND:FILE, as in net:/run/netns/blue"
    )]
    Form(String),
    /// The kind is not one of those that can be joined.
    #[error(
        "{0:?} is not a kind of namespace that a tree can join\nhelp: use net, ipc, uts, time or mnt; for \
         others, run rcriu inside: nsenter -t PID -p (pid), -U (user), -C (cgroup)"
    )]
    Kind(String),
    /// A kind is given twice.
    #[error("two namespaces of the kind {0} are given, and a tree can join only one")]
    Twice(String),
}

/// A namespace that the user names.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Given {
    kind: &'static str,
    flag: i32,
    path: PathBuf,
}

/// The namespaces that the user names.
#[derive(Clone, Debug, Default)]
#[cfg_attr(test, derive(PartialEq, Eq))]
pub struct Options(Vec<Given>);

impl Options {
    /// Reads texts of the form `KIND:PID` or `KIND:FILE`.
    ///
    /// # Errors
    /// What is wrong with one of them.
    pub fn new(texts: &[String]) -> Result<Self, JoinError> {
        let mut found: Vec<Given> = Vec::new();
        for text in texts {
            let parts = text.split_once(':').filter(|(_, target)| !target.is_empty());
            let (name, target) = parts.ok_or_else(|| JoinError::Form(text.clone()))?;
            let kind = KINDS.into_iter().find(|(kind, _)| *kind == name);
            let (kind, flag) = kind.ok_or_else(|| JoinError::Kind(name.to_owned()))?;
            let path = match target.parse::<u32>() {
                Ok(pid) => PathBuf::from(format!("/proc/{pid}/ns/{kind}")),
                Err(_) => PathBuf::from(target),
            };
            if found.iter().any(|of| of.kind == kind) {
                return Err(JoinError::Twice(kind.to_owned()));
            }
            found.push(Given { kind, flag, path });
        }
        Ok(Self(found))
    }

    /// Whether the tree joins a namespace of a kind.
    pub fn has(&self, kind: &str) -> bool {
        self.0.iter().any(|given| given.kind == kind)
    }

    /// Returns the namespace of a kind to join, if there is one. `read` reads what the images have of
    /// such a namespace of the tree.
    ///
    /// # Errors
    /// It cannot be opened, or is of another kind; those of `read`.
    pub(super) fn of(
        &self,
        kind: &str,
        number: u32,
        read: impl FnOnce() -> Result<Option<Box<dyn Restoring>>>,
    ) -> Result<Option<Box<dyn Restoring>>> {
        let Some(given) = self.0.iter().find(|given| given.kind == kind) else { return Ok(None) };
        let path = || given.path.clone();
        let file = File::open(&given.path);
        let file = file.map_err(|source| ResError::Read { path: path(), source })?;
        if namespace::kind(&file) != Ok(given.flag) {
            let path = path();
            let path = path.display();
            let problem =
                format!("{path}, given with --join-ns, is no namespace of the kind {kind}");
            return Err(ResError::Namespace { number, problem });
        }
        let namespace = OwnedFd::from(file);
        if kind == "net" {
            return Ok(Some(net::entered(namespace)));
        }
        let contents = if kind == "ipc" { read()? } else { None };
        Ok(Some(Box::new(Joined { given: given.clone(), namespace, contents })))
    }
}

/// A namespace that the first process enters.
#[derive(Debug)]
struct Joined {
    given: Given,
    namespace: OwnedFd,
    /// Objects of the tree that come there.
    contents: Option<Box<dyn Restoring>>,
}

impl Restoring for Joined {
    fn is_made(&self) -> bool {
        false
    }

    fn translate(&mut self, ids: &IdMap) {
        self.contents.iter_mut().for_each(|contents| contents.translate(ids));
    }

    fn first_script(&self) -> Script {
        enter(self.given.kind, &self.namespace, self.given.flag)
    }

    fn build(&mut self, on: &Building<'_>) -> Result<()> {
        self.contents.iter_mut().try_for_each(|contents| contents.build(on))
    }

    fn finish(&mut self, root: HostPid) -> Result<()> {
        self.contents.iter_mut().try_for_each(|contents| contents.finish(root))
    }
}

/// Returns the call by which a process that shares the descriptors of rcriu enters a namespace.
pub(super) fn enter(kind: &str, namespace: &OwnedFd, flag: i32) -> Script {
    let mut script = Script::new();
    let arguments = [namespace.as_raw_fd().into(), flag.into()];
    script.call(format!("enter the {kind} namespace"), libc::SYS_setns, &arguments);
    script
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn namespaces_are_named_by_process_or_file() {
        let read = |texts: &[&str]| {
            Options::new(&texts.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>())
        };
        let options = read(&["net:/run/netns/a:b", "uts:12"]).unwrap();
        let paths: Vec<_> = options.0.iter().map(|given| given.path.to_str().unwrap()).collect();
        assert_eq!(paths, ["/run/netns/a:b", "/proc/12/ns/uts"]);
        assert!(options.has("uts") && !options.has("ipc"));
        assert_eq!(read(&["net"]), Err(JoinError::Form("net".into())));
        assert_eq!(read(&["net:"]), Err(JoinError::Form("net:".into())));
        assert_eq!(read(&["user:1"]), Err(JoinError::Kind("user".into())));
        assert_eq!(read(&["ipc:1", "ipc:2"]), Err(JoinError::Twice("ipc".into())));
    }

    #[test]
    fn a_file_that_is_no_such_namespace_is_named() {
        let none = || Ok(None);
        let options = |text: &str| Options::new(&[text.to_owned()]).unwrap();
        let own = HostPid::own().0;
        assert!(options(&format!("uts:{own}")).of("uts", 12, none).unwrap().is_some());
        assert!(options(&format!("uts:{own}")).of("ipc", 12, none).unwrap().is_none());
        let wrong = options(&format!("uts:/proc/{own}/ns/net")).of("uts", 12, none);
        assert!(wrong.unwrap_err().to_string().contains("is no namespace of the kind uts"));
        let absent = options("uts:/proc/none").of("uts", 12, none);
        assert!(matches!(absent, Err(ResError::Read { .. })));
    }
}
