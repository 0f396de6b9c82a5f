//! The peer credentials of UNIX sockets (`SO_PEERCRED`, `SO_PEERGROUPS`).
//!
//! The kernel records the pid, the effective ids and the groups of the process that calls
//! `socketpair(2)`, `listen(2)` or `connect(2)`. To its clients, a listening socket shows the
//! process that called `listen(2)` last. So the restore makes these calls in a helper process with
//! the recorded pid and ids, which exits before the processes of the tree are created. The kernel
//! keeps the pid, so that the socket names the process of the tree with that pid.
//! `SO_PEERPIDFD`, however, returns the helper, which is dead. For listening sockets, the living
//! process calls `listen(2)` itself ([`crate::res::file::Opener::prepare_process`]).
//!
//! CRIU's images do not record the credentials: the restore then uses those of the process that has
//! the other end. If another process uses the recorded pid by now, the socket names the process
//! that has the other end, and the log says so.

use std::{
    collections::{HashMap, HashSet},
    os::fd::{AsRawFd, BorrowedFd, OwnedFd},
};

use nix::{
    libc::{self, c_int},
    sys::socket::{AddressFamily, Backlog, SockFlag, SockType, listen, socketpair},
};

use super::name;
use crate::{
    causes::{tell, with_sources},
    image::proto::SkPeerEntry,
    inject::{Helper, Helpers, InjectError, Script},
    proc,
    res::file::{FileError, Opened, Result, owner::Holder, sock::opts::Subject},
    sys::{fds, socket},
    units::{HostPid, NsPid, PidMap},
};

/// The id that stands for no user, and for "unchanged" in arguments of calls.
const NO_ID: u32 = u32::MAX;

/// Returns the credentials that the kernel would record for a process of the tree.
pub(super) fn of_holder(holder: &Holder) -> SkPeerEntry {
    let creds = &holder.creds;
    let pid = holder.pid.raw();
    SkPeerEntry { pid, uid: creds.euid, gid: creds.egid, groups: creds.groups.clone() }
}

/// The credentials with which a call is made.
#[derive(Clone, Debug)]
pub(super) struct Caller {
    pub(super) peer: SkPeerEntry,
    /// The pid to use if another process has the first one.
    pub(super) instead: Option<NsPid>,
}

/// Returns the credentials of the restorer. In a user namespace of the tree, they are those of the first
/// process, whose helpers have the same.
fn own(pids: &PidMap, helpers: &Helpers) -> Result<SkPeerEntry> {
    let pid = HostPid::own();
    let like = helpers.first().filter(|_| !pids.ids().is_own_namespace());
    let status = proc::status(like.unwrap_or(pid))?.inside(pids.ids());
    let pid = pids.ns(pid).raw();
    let (uid, gid) = (status.uids.effective, status.gids.effective);
    Ok(SkPeerEntry { pid, uid, gid, groups: status.groups })
}

/// Adds the calls by which a process changes its effective ids from `own` to `peer`.
pub(super) fn become_peer(own: &SkPeerEntry, peer: &SkPeerEntry, script: &mut Script) {
    change(script, peer.groups != own.groups, peer);
}

/// Adds the calls by which it changes them back.
pub(super) fn become_own(own: &SkPeerEntry, peer: &SkPeerEntry, script: &mut Script) {
    let arguments = [NO_ID.into(), own.uid.into(), NO_ID.into()];
    script.call("set the effective user id", libc::SYS_setresuid, &arguments);
    change(script, peer.groups != own.groups, own);
}

fn change(script: &mut Script, with_groups: bool, to: &SkPeerEntry) {
    if with_groups {
        let groups: Vec<u8> = to.groups.iter().flat_map(|group| group.to_ne_bytes()).collect();
        let list = script.bytes(&groups);
        script.call("set groups", libc::SYS_setgroups, &[to.groups.len().into(), list.into()]);
    }
    let arguments = [NO_ID.into(), to.gid.into(), NO_ID.into()];
    script.call("set the effective group id", libc::SYS_setresgid, &arguments);
    let arguments = [NO_ID.into(), to.uid.into(), NO_ID.into()];
    script.call("set the effective user id", libc::SYS_setresuid, &arguments);
}

/// Makes the calls for which the kernel records credentials.
#[derive(Debug)]
pub(super) struct Callers {
    own: SkPeerEntry,
    /// Helper processes by pid, or why there cannot be one.
    helpers: HashMap<NsPid, Result<Helper, String>>,
    /// The pids of the tree.
    tree: HashSet<NsPid>,
    makers: Helpers,
    pids: PidMap,
}

impl Callers {
    pub(super) fn new(opened: &Opened) -> Result<Self> {
        let tree = opened.holders.values().map(|holder| holder.pid).collect();
        let makers = opened.helpers.clone();
        let pids = opened.pids.clone();
        Ok(Self { own: own(&pids, &makers)?, helpers: HashMap::new(), tree, makers, pids })
    }

    /// Whether a process of the tree will have this pid.
    pub(super) fn is_of_tree(&self, pid: NsPid) -> bool {
        self.tree.contains(&pid)
    }

    /// Ends the helpers, and returns the credentials of the restorer.
    pub(super) fn into_own(self) -> SkPeerEntry {
        self.own
    }

    /// Whether a helper can have this pid.
    pub(super) fn can_be(&mut self, pid: NsPid) -> bool {
        let place = self.helpers.entry(pid).or_insert_with(|| {
            if pid.raw() <= 0 {
                return Err("it belongs to another pid namespace".into());
            }
            if self.pids.below().is_some_and(|below| !below.numbers(pid).is_empty()) {
                let message = format!(
                    "processes in pid namespaces below that of the tree will be shown 0 as the pid of process \
                     {pid}, as the sender of waiting messages and the peer of sockets"
                );
                tell(log::Level::Warn, &message);
            }
            self.makers.spawn(pid).map_err(|error| with_sources(&error))
        });
        place.is_ok()
    }

    /// Has a helper with the caller's credentials make the calls that `add` adds. Returns their
    /// result; `None` if the restorer has to make the calls itself.
    fn call<T>(
        &mut self,
        caller: Option<&Caller>,
        restored: &Subject,
        step: &'static str,
        add: impl FnOnce(&mut Script) -> Box<dyn FnOnce(&crate::inject::Answers) -> T>,
    ) -> Result<Option<T>> {
        let Some(Caller { peer, instead }) = caller else { return Ok(None) };
        let shown = NsPid::of_image(peer.pid);
        let candidates = [Some(shown), *instead].into_iter().flatten();
        let found = candidates.clone().find(|pid| self.can_be(*pid));
        let Some(pid) = found else {
            // The restore needs the pids of the tree, so a failure to get one is an error.
            for pid in candidates.filter(|pid| self.is_of_tree(*pid)) {
                if let Some(Err(why)) = self.helpers.get(&pid) {
                    let problem = format!("no process {pid} can be created to {step} it: {why}");
                    return Err(restored.wrong(problem));
                }
            }
            warn_of_peer(restored, peer, NsPid::of_image(self.own.pid));
            return Ok(None);
        };
        if pid != shown {
            warn_of_peer(restored, peer, pid);
        }
        let helper = self.helpers.get_mut(&pid);
        let helper = helper.and_then(|helper| helper.as_mut().ok()).expect("it was found");
        let mut script = Script::new();
        become_peer(&self.own, peer, &mut script);
        if let Err(error) = helper.run(&script) {
            log::warn!(
                "{}: SO_PEERCRED will name user {} instead of {}: {}\nhelp: run rcriu as root",
                restored.object,
                self.own.uid,
                peer.uid,
                with_sources(&error)
            );
            // Its ids are undefined now: do not use it again.
            self.helpers.insert(pid, Err(with_sources(&error)));
            return Ok(None);
        }
        let mut script = Script::new();
        let result = add(&mut script);
        let answers = helper.run(&script);
        let mut script = Script::new();
        become_own(&self.own, peer, &mut script);
        let back = helper.run(&script);
        let failed = |error: InjectError| match error {
            InjectError::Call { source, .. } => restored.failed(step)(source),
            other => restored.wrong(format!("cannot {step} it in a helper process: {other}")),
        };
        let answers = answers.map_err(failed)?;
        back.map_err(failed)?;
        Ok(Some(result(&answers)))
    }

    /// Creates a pair of sockets.
    pub(super) fn pair(
        &mut self,
        caller: Option<&Caller>,
        kind: SockType,
        restored: &Subject,
    ) -> Result<(OwnedFd, OwnedFd)> {
        let step = "create";
        let made = self.call(caller, restored, step, |script| {
            let place = script.space(size_of::<[i32; 2]>());
            let arguments = [
                libc::AF_UNIX.into(),
                (kind as c_int | libc::SOCK_CLOEXEC).into(),
                0.into(),
                place.into(),
            ];
            script.call("create a pair of sockets", libc::SYS_socketpair, &arguments);
            Box::new(move |answers| answers.value::<[i32; 2]>(place))
        })?;
        let Some(numbers) = made else {
            return socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC)
                .map_err(restored.failed(step));
        };
        // The helper shares the descriptor table of the restorer.
        let own = |number| {
            let copy = fds::duplicate(number).map_err(restored.failed("duplicate"))?;
            nix::unistd::close(number).map_err(restored.failed("close a duplicate of"))?;
            Ok::<_, FileError>(copy)
        };
        Ok((own(numbers[0])?, own(numbers[1])?))
    }

    /// Makes a socket listen.
    pub(super) fn listen(
        &mut self,
        caller: Option<&Caller>,
        fd: BorrowedFd,
        backlog: u32,
        restored: &Subject,
    ) -> Result<()> {
        let number = fd.as_raw_fd();
        let done = self.call(caller, restored, "listen on", |script| {
            script.call("listen on a socket", libc::SYS_listen, &[number.into(), backlog.into()]);
            Box::new(|_| ())
        })?;
        if done.is_some() {
            return Ok(());
        }
        let backlog = backlog.cast_signed().clamp(0, i32::from(i16::MAX));
        listen(&fd, Backlog::new(backlog).unwrap_or(Backlog::MAXCONN))
            .map_err(restored.failed("listen on"))
    }

    /// Connects a socket to a listening one, like [`name::connect`].
    pub(super) fn connect(
        &mut self,
        caller: Option<&Caller>,
        fd: BorrowedFd,
        (name, file): (&[u8], Option<BorrowedFd>),
        restored: &Subject,
    ) -> Result<()> {
        let step = "connect";
        let through = file.map(name::path_of);
        let address = socket::unix_address(through.as_deref().unwrap_or(name));
        let address = address.map_err(restored.failed(step))?;
        let number = fd.as_raw_fd();
        let done = self.call(caller, restored, step, |script| {
            let bytes = script.bytes(&address);
            // With root's file system user id it may use any file. It has the restorer's descriptors.
            script.attempt(libc::SYS_setfsuid, &[0.into()]);
            let arguments = [number.into(), bytes.into(), address.len().into()];
            script.call("connect a socket", libc::SYS_connect, &arguments);
            Box::new(|_| ())
        })?;
        match done {
            Some(()) => Ok(()),
            None => name::connect(fd, name, file).map_err(restored.failed(step)),
        }
    }
}

fn warn_of_peer(restored: &Subject, peer: &SkPeerEntry, pid: NsPid) {
    log::warn!(
        "{}: SO_PEERCRED named process {}, which is not in the tree, and another process has \
         this pid now: it will name {pid}; restart programs that rely on the old pid",
        restored.object,
        peer.pid
    );
}
