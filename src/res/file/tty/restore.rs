//! Restores terminals.

use std::{
    collections::{BTreeMap, HashSet},
    fs::{Permissions, set_permissions},
    io::IsTerminal,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::{ffi::OsStrExt, fs::PermissionsExt},
    },
};

use nix::{
    errno::Errno,
    fcntl::{AtFlags, FcntlArg, OFlag, fcntl},
    libc,
    sys::stat::{Mode, fchmod, fstat},
    unistd::{Gid, Uid, fchown, fchownat},
};

use super::{
    Options, Orphans, PERMISSIONS, Role,
    controlling::{Controlling, controlling, inherited, set_foreground, take_control},
    external_name, index, is_master, path_of, peer, queue, read_infos, slave_path, unpack,
};
use crate::{
    image::proto::{self, TtyType},
    inject::Script,
    res::file::{Deferred, FileError, Opened, Opener, Result, deferred, descriptor},
    sys::{
        root::Root,
        tty::{self, Question, Speeds, Switch, Termios, WindowSize},
    },
    units::{LocalPid, NO_ID, NsPid, TargetFd},
};

/// How many pseudoterminals the restore opens, at most, to get one with a given index: the kernel
/// returns the lowest free index.
const ATTEMPTS: usize = 256;

/// The controlling terminal of rcriu.
const OWN_TERMINAL: &[u8] = b"/dev/tty";

/// Restores terminals.
#[derive(Default)]
pub(super) struct TerminalOpener {
    options: Options,
    orphans: Orphans,
    /// New masters outside of the tree, by the numbers of their terminals.
    outside: BTreeMap<u32, OwnedFd>,
    deferred: HashSet<u32>,
    paths: BTreeMap<u32, proto::RegFileEntry>,
    /// The first description of each master that was opened.
    masters: BTreeMap<u32, u32>,
    /// With the foreground group as the leader of the session passes it to calls.
    controlling: Vec<(Controlling, Option<LocalPid>)>,
    /// The terminal of rcriu, if the root process of the tree leads its group, which becomes the
    /// foreground group.
    inherited: Option<OwnedFd>,
}

/// A description of a terminal in the images.
struct Wanted<'a> {
    file: &'a proto::TtyFileEntry,
    path: Option<proto::RegFileEntry>,
}

impl Wanted<'_> {
    fn path(&self) -> Result<&proto::RegFileEntry> {
        let missing =
            || FileError::image(self.file.id, "it is a terminal, but its path is missing");
        self.path.as_ref().ok_or_else(missing)
    }
}

impl Opener for TerminalOpener {
    fn open(&mut self, entries: &[proto::FileEntry], opened: &mut Opened) -> Result<()> {
        if entries.is_empty() {
            return Ok(());
        }
        let infos = read_infos(opened)?;
        let mut wanted: BTreeMap<u32, Vec<Wanted>> = BTreeMap::new();
        for entry in entries {
            let missing =
                || FileError::image(entry.id, "it is a terminal, but its entry is missing");
            let file = entry.tty.as_ref().ok_or_else(missing)?;
            let path = path_of(file, opened);
            wanted.entry(file.tty_info_id).or_default().push(Wanted { file, path });
        }
        let (masters, others): (Vec<_>, Vec<_>) =
            wanted.into_iter().partition(|(info_id, _)| is_master(*info_id));
        for (info_id, files) in masters.iter().chain(&others) {
            let missing = || {
                let problem = format!("tty-info.img has no terminal {info_id:#x}");
                FileError::image(files[0].file.id, problem)
            };
            let info = infos.get(info_id).ok_or_else(missing)?;
            for (position, file) in files.iter().enumerate() {
                let fd = self.open_one(info, file, &infos, position == 0, opened)?;
                opened.insert(file.file.id, fd);
            }
            if is_master(*info_id) {
                self.masters.insert(*info_id, files[0].file.id);
            }
        }
        queue::restore(&self.masters, &infos, opened)?;
        for (info_id, files) in masters.iter().chain(&others) {
            finish(&infos[info_id], files[0].file.id, opened)?;
        }
        Ok(())
    }

    fn open_extra(
        &mut self,
        opened: &Opened,
        keep: &dyn Fn(BorrowedFd) -> Result<OwnedFd>,
    ) -> Result<()> {
        for mut terminal in controlling(opened, self.orphans.are_left())? {
            terminal.fd = keep(terminal.fd.as_fd())?;
            // A shell that runs command after command may be between two of them.
            if let Some(group) = terminal.foreground
                && !opened.groups.contains(&group)
            {
                log::warn!(
                    "no process is left in the foreground group {group} of the session {}; its \
                     leader's group takes its place",
                    terminal.session
                );
                terminal.foreground = None;
            }
            let group = terminal.foreground;
            let group = group.and_then(|group| opened.pids.local(group, terminal.session));
            self.controlling.push((terminal, group));
        }
        if self.orphans.are_left()
            && let Some(terminal) = inherited(opened)?
            && opened.root_leads_group
        {
            self.inherited = Some(keep(terminal)?);
        }
        Ok(())
    }

    // A process gets the controlling terminal of its session from its parent, or not at all.
    fn begin_session(&self, pid: NsPid, script: &mut Script) {
        for (terminal, _) in self.controlling.iter().filter(|(of, _)| of.session == pid) {
            take_control(TargetFd(terminal.fd.as_raw_fd()), script);
        }
    }

    fn prepare_process(
        &mut self,
        pid: NsPid,
        _at: &dyn Fn(u32) -> Result<TargetFd>,
        script: &mut Script,
    ) -> Result<()> {
        for (terminal, group) in &self.controlling {
            if let Some(group) = group
                && terminal.session == pid
            {
                set_foreground(TargetFd(terminal.fd.as_raw_fd()), *group, script);
            }
        }
        if let Some(fd) = self.inherited.take() {
            // Like a shell that puts its job in the foreground.
            set_foreground(TargetFd(fd.as_raw_fd()), LocalPid::in_tree(pid), script);
        }
        Ok(())
    }

    fn install(
        &mut self,
        entry: &proto::FileEntry,
        fd: TargetFd,
        script: &mut Script,
    ) -> Result<()> {
        if self.deferred.contains(&entry.id)
            && let Some(path) = self.paths.get(&entry.id)
        {
            deferred::install(entry.id, &path.name, path.flags, fd, script)?;
        }
        Ok(())
    }

    fn start(&mut self, _: &Opened) -> Result<()> {
        for (info_id, master) in std::mem::take(&mut self.outside) {
            self.orphans.give(master).map_err(|problem| {
                let index = info_id >> 1;
                let what = format!("the master of pseudoterminal {index} is not taken: {problem}");
                FileError::image(0, what)
            })?;
        }
        Ok(())
    }
}

impl TerminalOpener {
    pub(super) fn new(options: Options, orphans: Orphans) -> Self {
        Self { options, orphans, ..Self::default() }
    }

    fn open_one(
        &mut self,
        info: &proto::TtyInfoEntry,
        wanted: &Wanted,
        infos: &BTreeMap<u32, proto::TtyInfoEntry>,
        is_first: bool,
        opened: &mut Opened,
    ) -> Result<OwnedFd> {
        let id = wanted.file.id;
        let flags = wanted.file.flags;
        match info.r#type() {
            TtyType::Pty if is_master(info.id) => {
                let path = wanted.path()?;
                let fixed = needs_its_number(info, infos, opened);
                let fd = open_master(
                    id,
                    (opened.root_of(path), &path.name),
                    index(info, id)?,
                    flags,
                    fixed,
                    opened,
                )?;
                let failed = || FileError::restore(id, "adjust the terminal", &path.name);
                tty::switch(fd.as_fd(), Switch::Locked, false).map_err(failed())?;
                set_modes(fd.as_fd(), info, true).map_err(failed())?;
                own_slave(id, path, fd.as_fd(), opened).map_err(failed())?;
                if info.packet_mode {
                    tty::switch(fd.as_fd(), Switch::Packet, true).map_err(failed())?;
                }
                Ok(fd)
            }
            TtyType::Pty => {
                let path = wanted.path()?;
                let failed = |step| FileError::restore(id, step, &path.name);
                if info.termios.is_none() {
                    return open_hung(id, info, path, flags, opened);
                }
                if !infos.contains_key(&peer(info.id)) {
                    if self.orphans.are_left() {
                        return self.inherit(id, info, flags, is_first);
                    }
                    self.make_outside(info, path, opened)?;
                }
                let fd = self.open_slave(info, path, flags, opened)?;
                if is_first {
                    set_owner(fd.as_fd(), info, opened).map_err(failed("adjust the terminal"))?;
                    set_modes(fd.as_fd(), info, true).map_err(failed("adjust the terminal"))?;
                }
                Ok(fd)
            }
            TtyType::Ctty => {
                let path = wanted.path()?;
                // Processes in the session of rcriu have this same terminal.
                if self.options.shell_job
                    && let Ok(fd) = descriptor::open(opened.root_of(path), &path.name, flags)
                {
                    return Ok(fd);
                }
                self.deferred.insert(id);
                let mut path = path.clone();
                path.flags = flags;
                self.paths.insert(id, path);
                deferred::placeholder(id, Deferred::Inside, opened)
            }
            TtyType::Console | TtyType::Vt | TtyType::Serial => {
                let path = wanted.path()?;
                let failed = |step| FileError::restore(id, step, &path.name);
                let fd = descriptor::open(opened.root_of(path), &path.name, flags)
                    .map_err(failed("open the terminal"))?;
                if is_first {
                    set_modes(fd.as_fd(), info, true).map_err(failed("adjust the terminal"))?;
                }
                Ok(fd)
            }
            TtyType::ExtTty => {
                let name = external_name(info.rdev.into(), info.dev.unwrap_or(0).into());
                let failed = |step| FileError::restore(id, step, &name);
                let given =
                    opened.inherited.duplicate(name.as_bytes()).map_err(failed("inherit"))?;
                let fd = given.ok_or_else(|| {
                    let problem =
                        format!("it is external; provide it with --inherit-fd 'fd[N]:{name}'");
                    FileError::image(id, problem)
                })?;
                set_modes(fd.as_fd(), info, true).map_err(failed("adjust"))?;
                Ok(fd)
            }
            TtyType::Unknown => Err(FileError::image(id, "the type of the terminal is unknown")),
        }
    }
}

impl TerminalOpener {
    /// Makes the master of a slave, which was outside the tree, if it is not there yet.
    fn make_outside(
        &mut self,
        info: &proto::TtyInfoEntry,
        path: &proto::RegFileEntry,
        opened: &Opened,
    ) -> Result<()> {
        if self.outside.contains_key(&info.id) {
            return Ok(());
        }
        let ptmx = ptmx_beside(&path.name);
        let read_write = libc::O_RDWR.cast_unsigned();
        let master = open_master(
            path.id,
            (opened.root_of(path), &ptmx),
            index(info, path.id)?,
            read_write,
            true,
            opened,
        )?;
        let step = "make the other end of the terminal";
        tty::switch(master.as_fd(), Switch::Locked, false)
            .map_err(FileError::restore(path.id, step, &path.name))?;
        self.outside.insert(info.id, master);
        Ok(())
    }

    /// Opens the terminal of rcriu in place of one that was outside the tree (`--shell-job`).
    fn inherit(
        &self,
        id: u32,
        info: &proto::TtyInfoEntry,
        flags: u32,
        is_first: bool,
    ) -> Result<OwnedFd> {
        if !self.options.shell_job {
            let problem = "its terminal was outside the tree\nhelp: use --shell-job to give it the \
                           terminal of rcriu";
            return Err(FileError::image(id, problem));
        }
        let failed = || FileError::restore(id, "take over", "the terminal of rcriu");
        let stdin = std::io::stdin();
        let fd = if stdin.is_terminal() {
            descriptor::reopen(stdin.as_fd(), flags)
                .or_else(|_| stdin.as_fd().try_clone_to_owned().map_err(|_| Errno::EMFILE))
        } else {
            descriptor::open(&Root::own(), OWN_TERMINAL, flags)
        };
        let fd = fd.map_err(failed())?;
        if is_first {
            // Keep the current size of the window.
            set_modes(fd.as_fd(), info, false).map_err(failed())?;
        }
        Ok(fd)
    }

    /// Opens a slave and sets its mode.
    fn open_slave(
        &self,
        info: &proto::TtyInfoEntry,
        path: &proto::RegFileEntry,
        flags: u32,
        opened: &Opened,
    ) -> Result<OwnedFd> {
        let failed = |step| FileError::restore(path.id, step, &path.name);
        let master = self.masters.get(&peer(info.id)).map(|id| opened.get(*id)).transpose()?;
        let number = master.map(|master| tty::ask(master, Question::Index)).transpose();
        let number = number.map_err(failed("find the other end of"))?;
        let fd = match (master, number) {
            // The pair has another index than in the images.
            (Some(master), Some(number)) if number.cast_unsigned() != index(info, path.id)? => {
                tty::open_slave(master, flags)
            }
            _ => descriptor::open(opened.root_of(path), &path.name, flags),
        };
        let fd = fd.map_err(failed("open the terminal"))?;
        if let Some(mode) = path.mode {
            let mode = Mode::from_bits_truncate(mode & PERMISSIONS);
            fchmod(&fd, mode).map_err(failed("adjust the terminal"))?;
        }
        Ok(fd)
    }
}

/// Whether a process relies on the index of a pair: a session knows its controlling terminal by it,
/// and a file of the tree may refer to the slave by path.
fn needs_its_number(
    info: &proto::TtyInfoEntry,
    infos: &BTreeMap<u32, proto::TtyInfoEntry>,
    opened: &Opened,
) -> bool {
    let other = infos.get(&peer(info.id));
    if info.sid != 0 || other.is_some_and(|other| other.sid != 0) {
        return true;
    }
    let terminals = opened.entries.values().filter_map(|entry| entry.tty.as_ref());
    let own_paths: HashSet<u32> = terminals.filter_map(|file| file.regf_id).collect();
    let number = info.pty.as_ref().map_or(0, |pty| pty.index);
    let slave = format!("/pts/{number}");
    let mut others = opened.entries.values().filter_map(|entry| entry.reg.as_ref());
    others.any(|file| !own_paths.contains(&file.id) && file.name.ends_with(slave.as_bytes()))
}

/// Opens the master of the pseudoterminal with this index. If another program has taken the index,
/// opens one with another index, unless it is `fixed`.
fn open_master(
    id: u32,
    (root, path): (&Root, &[u8]),
    index: u32,
    flags: u32,
    fixed: bool,
    opened: &Opened,
) -> Result<OwnedFd> {
    let failed = || FileError::restore(id, "open the terminal", path);
    let mut premade = opened.masters.borrow_mut();
    let is_it = |fd: &OwnedFd| {
        tty::ask(fd.as_fd(), Question::Index).is_ok_and(|found| found.cast_unsigned() == index)
    };
    if let Some(at) = premade.iter().position(is_it) {
        let fd = premade.remove(at);
        let flags = OFlag::from_bits_truncate(flags.cast_signed()) - OFlag::O_ACCMODE;
        fcntl(&fd, FcntlArg::F_SETFL(flags)).map_err(failed())?;
        return Ok(fd);
    }
    drop(premade);
    let mut others = Vec::new();
    for _ in 0..ATTEMPTS {
        let fd = descriptor::open(root, path, flags).map_err(failed())?;
        let found = tty::ask(fd.as_fd(), Question::Index).map_err(failed())?.cast_unsigned();
        if found == index {
            return Ok(fd);
        }
        if found > index {
            if fixed {
                break;
            }
            log::warn!(
                "pseudoterminal {index} has the index {found} now: another program has taken \
                 the old index, and no process of the tree is known to rely on it"
            );
            return Ok(fd);
        }
        others.push(fd);
    }
    let problem = format!(
        "another program has taken the index of pseudoterminal {index}, which is the \
         controlling terminal of a session or open by name; end that program, or restore where \
         another devpts is mounted"
    );
    Err(FileError::image(id, problem))
}

/// Returns the path of the file that makes masters, for a slave with this path: each devpts has one.
fn ptmx_beside(slave: &[u8]) -> Vec<u8> {
    let dir = slave.iter().rposition(|byte| *byte == b'/').map_or(0, |at| at + 1);
    [&slave[..dir], b"ptmx"].concat()
}

/// Opens a slave whose master is closed.
fn open_hung(
    id: u32,
    info: &proto::TtyInfoEntry,
    path: &proto::RegFileEntry,
    flags: u32,
    opened: &Opened,
) -> Result<OwnedFd> {
    let master = ptmx_beside(&path.name);
    let read_write = libc::O_RDWR.cast_unsigned();
    let master = open_master(
        id,
        (opened.root_of(path), &master),
        index(info, id)?,
        read_write,
        false,
        opened,
    )?;
    tty::switch(master.as_fd(), Switch::Locked, false)
        .and_then(|()| tty::open_slave(master.as_fd(), flags))
        .map_err(FileError::restore(id, "open the terminal", &path.name))
}

/// Sets the owner of the slave of a master: the kernel has given it to rcriu, which has opened the
/// master.
fn own_slave(
    id: u32,
    entry: &proto::RegFileEntry,
    master: BorrowedFd,
    opened: &Opened,
) -> nix::Result<()> {
    let recorded = opened.entries.get(&id).and_then(|entry| entry.owner.as_ref());
    let (uid, gid, mode) = match (recorded, opened.holder(id)) {
        (Some(owner), _) => (owner.uid, owner.gid, Some(owner.mode)),
        (None, Some(holder)) => (holder.creds.fsuid, NO_ID, None),
        (None, None) => return Ok(()),
    };
    let (uid, gid) = opened.pids.ids().host_owner((uid, gid));
    let index = tty::ask(master, Question::Index)?.cast_unsigned();
    let slave = slave_path(&entry.name, index);
    let path = slave.as_os_str().as_bytes();
    let fd = match descriptor::open(opened.root_of(entry), path, libc::O_PATH.cast_unsigned()) {
        // Another devpts is mounted there: the entry of the slave, if any, sets its owner.
        Err(Errno::ENOENT) => return Ok(()),
        fd => fd?,
    };
    // Any other file there belongs to another program.
    if Role::of(fstat(&fd)?.st_rdev) != Some(Role::Slave(index)) {
        return Ok(());
    }
    let (uid, gid) = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
    fchownat(&fd, "", uid, gid, AtFlags::AT_EMPTY_PATH)?;
    if let Some(mode) = mode {
        let mode = Permissions::from_mode(mode);
        set_permissions(descriptor::path_of(fd.as_fd()), mode)
            .map_err(|error| crate::sys::errno(&error))?;
    }
    Ok(())
}

fn set_owner(fd: BorrowedFd, info: &proto::TtyInfoEntry, opened: &Opened) -> nix::Result<()> {
    let owner = (info.uid.unwrap_or(NO_ID), info.gid.unwrap_or(NO_ID));
    let (uid, gid) = opened.pids.ids().host_owner(owner);
    fchown(fd, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))
}

fn set_modes(fd: BorrowedFd, info: &proto::TtyInfoEntry, with_size: bool) -> nix::Result<()> {
    if let Some(locked) = &info.termios_locked {
        let locked = termios(locked)?;
        // Setting it needs CAP_SYS_ADMIN.
        if tty::termios(fd, true)? != locked {
            tty::set_termios(fd, true, &locked)?;
        }
    }
    if let Some(entry) = &info.termios {
        let modes = termios(entry)?;
        let speeds = Speeds { input: entry.c_ispeed, output: entry.c_ospeed };
        // CRIU leaves the speeds out. The control modes have all those with a constant.
        let has_speeds = speeds != Speeds::default() && tty::speeds(fd)? != speeds;
        // Setting anything from a background process would stop rcriu.
        if has_speeds {
            tty::set_modes_and_speeds(fd, &modes, speeds)?;
        } else if tty::termios(fd, false)? != modes {
            tty::set_termios(fd, false, &modes)?;
        }
    }
    if let Some(size) = info.winsize.as_ref().filter(|_| with_size) {
        let small = |number: u32| u16::try_from(number).map_err(|_| Errno::EINVAL);
        let size = WindowSize {
            rows: small(size.ws_row)?,
            columns: small(size.ws_col)?,
            x_pixels: small(size.ws_xpixel)?,
            y_pixels: small(size.ws_ypixel)?,
        };
        tty::set_window_size(fd, size)?;
    }
    Ok(())
}

fn termios(entry: &proto::TermiosEntry) -> nix::Result<Termios> {
    Ok(Termios {
        input: entry.c_iflag,
        output: entry.c_oflag,
        control: entry.c_cflag,
        local: entry.c_lflag,
        line: u8::try_from(entry.c_line).map_err(|_| Errno::EINVAL)?,
        characters: unpack(&entry.c_cc).ok_or(Errno::EINVAL)?,
    })
}

/// Sets locks and exclusive mode, which would have kept the other end from being opened.
fn finish(info: &proto::TtyInfoEntry, id: u32, opened: &Opened) -> Result<()> {
    if info.pty.is_none() || !is_master(info.id) && !info.exclusive {
        return Ok(());
    }
    let fd = opened.get(id)?;
    let locked = if info.locked { tty::switch(fd, Switch::Locked, true) } else { Ok(()) };
    let exclusive = if info.exclusive { tty::make_exclusive(fd) } else { Ok(()) };
    locked.and(exclusive).map_err(FileError::restore(id, "lock", "a terminal"))
}
