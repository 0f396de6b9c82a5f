//! Dumps terminals.

use std::{
    collections::{BTreeMap, BTreeSet},
    os::fd::{AsFd, OwnedFd},
    path::Path,
};

use nix::{
    errno::Errno,
    libc,
    poll::PollFlags,
    sys::statfs::{FsType, fstatfs},
};

use super::{
    DEVPTS, Options, PERMISSIONS, Role, Stopped, external_name, is_master,
    line::{self, Lines},
    loan, pack, peer, slave_path,
};
use crate::{
    image::{
        Kind, SnapshotWriter,
        proto::{self, FdTypes, TtyType},
    },
    proc,
    res::file::{
        Collector, Description, External, FileError, Intake, Result, descriptor,
        path::{self, DEVPTS_SUPER_MAGIC},
    },
    sys::{
        fds,
        root::Root,
        tty::{self, Question, Speeds, Termios},
    },
    units::{HostPid, TargetFd},
};

// CRIU's indices of terminals that are not part of a pair; those of pairs are lower.
const MAX_PTY_INDEX: u32 = 1000;
const CONSOLE_INDEX: u32 = 1002;
const VT_INDEX: u32 = 1004;
const CTTY_INDEX: u32 = 1006;
const SERIAL_INDEX: u32 = 1010;
const EXTERNAL_INDEX: u32 = 1013;
const EXTERNAL_INDEX_MAX: u32 = 1076;

/// `N_TTY` (`include/uapi/linux/tty.h`).
const USUAL_DISCIPLINE: i32 = 0;

/// The most bytes of complete lines that a dump reads: half of the line discipline's buffer.
const MOST_LINE_BYTES: usize = line::READ_BUFFER / 2;

/// The help for a terminal with bytes that the dump leaves there.
const READ_THEM: &str = "have its programs read them, then try again";

/// The help for a terminal outside the tree.
const SHELL_JOB: &str = "dump with --shell-job, and restore it on the terminal that rcriu runs on";

/// A process that has a terminal open, for messages.
struct OpenTerminal {
    pid: HostPid,
    fd: TargetFd,
    name: String,
    /// A duplicate of the descriptor of a master.
    master: Option<OwnedFd>,
}

impl OpenTerminal {
    fn unsupported(&self, what: &str, help: &'static str) -> FileError {
        let what = format!("the terminal {}, {what}", self.name);
        FileError::Unsupported { pid: self.pid, fd: self.fd, what, help }
    }

    fn failed(&self, step: &'static str) -> impl FnOnce(Errno) -> FileError {
        let (pid, fd, link) = (self.pid, self.fd, self.name.clone());
        move |source| FileError::Dump { pid, fd, link, step, source }
    }
}

/// Dumps terminals.
#[derive(Default)]
pub(super) struct Terminals {
    options: Options,
    external: External,
    infos: BTreeMap<u32, (proto::TtyInfoEntry, OpenTerminal)>,
    /// The terminals that send signals (`O_ASYNC`).
    signalling: BTreeSet<u32>,
    externals: u32,
}

impl Collector for Terminals {
    fn claims(&self, file: &Description) -> bool {
        !descriptor::is_path(file.flags) && is_terminal(file, &self.external)
    }

    fn collect(&mut self, file: &Description, intake: &mut dyn Intake) -> Result<proto::FileEntry> {
        let discipline = tty::ask(fd(file), Question::Discipline).unwrap_or(USUAL_DISCIPLINE);
        if discipline != USUAL_DISCIPLINE {
            let name = String::from_utf8_lossy(&file.link);
            let what = format!("the terminal {name}, with the line discipline {discipline}");
            let help =
                "rcriu keeps only the default one (0, N_TTY); end the program that has set another";
            return Err(file.unsupported(what, help));
        }
        let (info_id, tty_type, index) = self.number(file, intake.root_of(file))?;
        let mut entry = proto::TtyFileEntry {
            id: file.id,
            tty_info_id: info_id,
            flags: file.status(),
            fown: file.fown,
            regf_id: None,
        };
        if tty_type != TtyType::ExtTty {
            let path = intake.new_id();
            let path_entry = path::entry_with_id(file, path, intake)?;
            intake.push(path_entry);
            entry.regf_id = Some(path);
        }
        let [session, foreground] = session(file)?.map(|pid| intake.pids().ns(pid).image());
        match self.infos.get_mut(&info_id) {
            Some((info, _)) if info.sid == 0 => {
                (info.sid, info.pgrp) = (session, foreground);
            }
            Some(_) => {}
            None => {
                let mut info = info(file, info_id, tty_type, index)?;
                (info.sid, info.pgrp) = (session, foreground);
                let name = String::from_utf8_lossy(&file.link).into_owned();
                let is_master = tty_type == TtyType::Pty && is_master(info_id);
                let master = is_master.then(|| fd(file).try_clone_to_owned()).transpose();
                let master = master.map_err(|_| file.failed("duplicate")(Errno::EMFILE))?;
                let holder = OpenTerminal { pid: file.pid, fd: file.number, name, master };
                self.infos.insert(info_id, (info, holder));
            }
        }
        if file.flags & libc::O_ASYNC.cast_unsigned() != 0 {
            self.signalling.insert(info_id);
        }
        let is_master = tty_type == TtyType::Pty && is_master(info_id);
        Ok(proto::FileEntry {
            r#type: FdTypes::Tty.into(),
            id: file.id,
            tty: Some(entry),
            owner: is_master.then(|| slave_owner(file, index, &*intake)).flatten(),
            ..Default::default()
        })
    }

    fn finish(&mut self, images: &SnapshotWriter) -> Result<()> {
        self.check()?;
        let queued = self.read_queues()?;
        if !queued.is_empty() {
            images.write(Kind::TtyData, 0, &queued)?;
        }
        if !self.infos.is_empty() {
            let infos: Vec<_> = self.infos.values().map(|(info, _)| info.clone()).collect();
            images.write(Kind::TtyInfo, 0, &infos)?;
        }
        Ok(())
    }
}

impl Terminals {
    pub(super) fn new(options: Options, external: &External) -> Self {
        Self { options, external: external.clone(), ..Self::default() }
    }

    /// Returns the number, the type and the index of a terminal.
    fn number(&mut self, file: &Description, root: &Root) -> Result<(u32, TtyType, u32)> {
        if is_external(file, &self.external) {
            let index = EXTERNAL_INDEX + self.externals;
            if index > EXTERNAL_INDEX_MAX {
                return Err(file.unsupported(
                    "an external terminal beyond the number that images can hold",
                    "close some",
                ));
            }
            self.externals += 1;
            return Ok((index << 1, TtyType::ExtTty, index));
        }
        let role = Role::of(file.stat.st_rdev).expect("it was claimed");
        if role.tty_type() == TtyType::Pty {
            check_instance(file, root)?;
        }
        let index = match role {
            Role::Master => tty::ask(fd(file), Question::Index)
                .map_err(file.failed("read the index of"))?
                .cast_unsigned(),
            Role::Slave(index) => index,
            Role::Console => CONSOLE_INDEX,
            Role::Virtual => VT_INDEX,
            Role::Controlling => CTTY_INDEX,
            Role::Serial => SERIAL_INDEX,
        };
        if role.tty_type() == TtyType::Pty && index > MAX_PTY_INDEX {
            let what = format!("the pseudoterminal {index}; at most {MAX_PTY_INDEX} can be dumped");
            return Err(file.unsupported(what, "close others and start the program again"));
        }
        Ok((index << 1 | u32::from(role == Role::Master), role.tty_type(), index))
    }

    /// Rejects pairs whose other end is outside the tree, unless `--shell-job` allows one.
    fn check(&self) -> Result<()> {
        let is_pair = |info: &proto::TtyInfoEntry| info.pty.is_some();
        let is_alone = |info: &proto::TtyInfoEntry| {
            is_pair(info)
                && !is_master(info.id)
                && info.termios.is_some()
                && !self.infos.contains_key(&peer(info.id))
        };
        let mut alone = self.infos.values().filter(|(info, _)| is_alone(info));
        if let Some((_, holder)) = alone.next() {
            if !self.options.shell_job && !self.options.orphans {
                let what = "whose other end is outside the tree";
                return Err(holder.unsupported(what, SHELL_JOB));
            }
            if !self.options.orphans
                && let Some((_, holder)) = alone.next()
            {
                let what = "the second one whose other end is outside the tree";
                return Err(holder.unsupported(what, "at most one is supported: close the other"));
            }
        }
        let Some((info, holder)) = self.infos.get(&(CTTY_INDEX << 1)) else { return Ok(()) };
        let is_ours = self.infos.values().any(|(other, _)| {
            let is_kept = self.options.orphans || !is_alone(other);
            other.id != info.id && other.sid == info.sid && info.sid != 0 && is_kept
        });
        if !is_ours && !self.options.shell_job {
            let what = "which stands for a terminal that no process of the tree has open";
            return Err(holder.unsupported(what, SHELL_JOB));
        }
        Ok(())
    }
}

impl Terminals {
    /// Reads what is queued in pairs that the restore creates anew.
    ///
    /// # Errors
    /// [`FileError::Unsupported`], before anything is taken out, if it could not be put back.
    fn read_queues(&mut self) -> Result<Vec<proto::TtyDataEntry>> {
        let mut pairs = Vec::new();
        for (id, (info, holder)) in &self.infos {
            let Some(master) = &holder.master else { continue };
            let failed = |step| holder.failed(step);
            let slave_is_open = self.infos.contains_key(&peer(*id));
            if slave_is_open || info.rcriu_hung_up() {
                let slave = loan::open_slave(master.as_fd());
                let slave = slave.map_err(failed("open the other end of"))?;
                if self.check_queue(*id, info, holder, (master, &slave))? {
                    pairs.push((*id, master, slave));
                }
                continue;
            }
            // A slave that no process has opened yet would hang up if the dump did so.
            let bytes = descriptor::events(master.as_fd())
                .and_then(|_| fds::readable_bytes(master.as_fd()));
            let bytes = bytes.map_err(failed("count what is queued in"))?;
            if bytes > 0 {
                let what = format!(
                    "in which {bytes} bytes are queued, and whose other end no process of the \
                     tree has opened"
                );
                return Err(holder.unsupported(&what, READ_THEM));
            }
        }
        let mut entries = Vec::new();
        let mut stopped = BTreeMap::new();
        for (id, master, slave) in pairs {
            let (_, holder) = &self.infos[&id];
            let queued = loan::read(master.as_fd(), slave.as_fd());
            let queued = queued.map_err(holder.failed("read what is queued in"))?;
            log::debug!("{}: {queued:?}", holder.name);
            stopped.insert(id, queued.stopped);
            for (tty_id, data, ends) in
                [(id, queued.output, Vec::new()), (peer(id), queued.input, queued.ends)]
            {
                if !data.is_empty() || !ends.is_empty() {
                    entries.push(proto::TtyDataEntry { tty_id, data, rcriu_line_ends: ends });
                }
            }
        }
        for (id, stopped) in stopped {
            if let Some((info, _)) = self.infos.get_mut(&id) {
                info.rcriu_stopped = stopped.map(|stopped| proto::TtyStop::from(stopped).into());
            }
        }
        Ok(entries)
    }

    /// Whether to read the queues of a pair. They may be empty.
    fn check_queue(
        &self,
        id: u32,
        info: &proto::TtyInfoEntry,
        holder: &OpenTerminal,
        (master, slave): (&OwnedFd, &OwnedFd),
    ) -> Result<bool> {
        let seen = loan::look(master.as_fd(), slave.as_fd());
        let seen = seen.map_err(holder.failed("look into"))?;
        let modes = tty::termios(slave.as_fd(), false);
        let modes = modes.map_err(holder.failed("read the modes of"))?;
        let bytes = seen.output + seen.input;
        let is_delimited = Lines::of(&modes).are_delimited();
        let refuse = |why: &str, help| {
            let what = format!("in which {bytes} bytes are queued, {why}");
            Err(holder.unsupported(&what, help))
        };
        if info.packet_mode && seen.status {
            let what = "in packet mode, with a status that its program has not read";
            return Err(holder.unsupported(what, READ_THEM));
        }
        let signals = [id, peer(id)].iter().any(|end| self.signalling.contains(end));
        if signals && bytes > 0 {
            return refuse("and which sends signals (O_ASYNC)", READ_THEM);
        }
        if seen.stopped && seen.output > 0 {
            let help = "start it (^Q, or tcflow(3)), then try again";
            return refuse("and whose output is stopped", help);
        }
        // More may wait behind it that the line discipline has not processed.
        if is_delimited && usize::try_from(seen.input).is_ok_and(|lines| lines > MOST_LINE_BYTES) {
            return refuse("in lines that its program has not read", READ_THEM);
        }
        Ok(is_delimited || bytes > 0 || seen.stopped)
    }
}

impl From<Stopped> for proto::TtyStop {
    fn from(stopped: Stopped) -> Self {
        match stopped {
            Stopped::ByCharacter => Self::ByCharacter,
            Stopped::ByProgram => Self::ByProgram,
        }
    }
}

/// Returns the owner of the slave of a master, which no process may have open.
fn slave_owner(
    file: &Description,
    index: u32,
    intake: &dyn Intake,
) -> Option<proto::InodeOwnerEntry> {
    let stat = intake.root_of(file).stat(&slave_path(&file.link, index)).ok()?;
    let is_it = Role::of(stat.st_rdev) == Some(Role::Slave(index));
    let (uid, gid) = intake.pids().ids().ns_owner((stat.st_uid, stat.st_gid));
    is_it.then_some(proto::InodeOwnerEntry { uid, gid, mode: stat.st_mode & PERMISSIONS })
}

/// Whether a device is dumped as a terminal.
/// Rejects an end of a pair in another instance of devpts than the one at [`DEVPTS`], where a
/// restore creates pairs: indices are unique only within an instance.
fn check_instance(file: &Description, root: &Root) -> Result<()> {
    let file_system = fstatfs(&file.fd).map_err(file.failed("find the file system of"))?;
    // A master that was opened by /dev/ptmx is not on a devpts.
    if file_system.filesystem_type() != FsType(DEVPTS_SUPER_MAGIC) {
        return Ok(());
    }
    let usual = root.stat(Path::new(DEVPTS)).map_err(file.failed("find the devpts of"))?;
    if file.stat.st_dev == usual.st_dev {
        return Ok(());
    }
    let what = format!(
        "the terminal {}, in another instance of devpts than {DEVPTS}",
        String::from_utf8_lossy(&file.link)
    );
    Err(file.unsupported(what, "start the program with terminals of /dev/pts"))
}

fn is_terminal(file: &Description, external: &External) -> bool {
    let is_known = || Role::of(file.stat.st_rdev).is_some();
    file.is_type(libc::S_IFCHR) && (is_known() || is_external(file, external))
}

fn is_external(file: &Description, external: &External) -> bool {
    external.contains(&external_name(file.stat.st_rdev, file.stat.st_dev))
}

fn fd(file: &Description) -> std::os::fd::BorrowedFd<'_> {
    std::os::fd::AsFd::as_fd(&file.fd)
}

/// Returns the session that a terminal controls, and its foreground process group; 0 for none.
fn session(file: &Description) -> Result<[HostPid; 2]> {
    const NONE: HostPid = HostPid(0);
    let ask = |question| match tty::ask(fd(file), question) {
        Ok(answer) => Ok(HostPid(answer)),
        Err(Errno::ENOTTY | Errno::EIO) => Ok(NONE),
        Err(errno) => Err(file.failed("read the session of")(errno)),
    };
    let asked = ask(Question::Session)?;
    if asked.0 > 0 && Role::of(file.stat.st_rdev) == Some(Role::Master) {
        return Ok([asked, ask(Question::Foreground)?]);
    }
    // Other terminals tell it only to a process of the session: use the controlling terminal in
    // /proc/PID/stat.
    let stat = proc::stat(file.pid)?;
    let is_it = u64::from(stat.tty_nr) == file.stat.st_rdev
        || stat.tty_nr != 0 && Role::of(file.stat.st_rdev) == Some(Role::Controlling);
    if !is_it {
        return Ok([NONE; 2]);
    }
    Ok([stat.session, stat.tpgid])
}

fn info(file: &Description, id: u32, tty_type: TtyType, index: u32) -> Result<proto::TtyInfoEntry> {
    let low = |number: u64| u32::try_from(number & u64::from(u32::MAX)).expect("32 bits");
    let mut info = proto::TtyInfoEntry {
        id,
        r#type: tty_type.into(),
        rdev: low(file.stat.st_rdev),
        dev: Some(low(file.stat.st_dev)),
        uid: Some(file.stat.st_uid),
        gid: Some(file.stat.st_gid),
        pty: (tty_type == TtyType::Pty).then_some(proto::TtyPtyEntry { index }),
        ..Default::default()
    };
    match modes(file, &mut info) {
        // The terminal is hung up: the kernel reports nothing more.
        Err(Errno::EIO) => (info.termios, info.termios_locked, info.winsize) = (None, None, None),
        result => result.map_err(file.failed("read the modes of"))?,
    }
    if is_master(id) && tty_type == TtyType::Pty {
        let events = descriptor::events(fd(file)).map_err(file.failed("poll"))?;
        info.rcriu_hung_up = events.contains(PollFlags::POLLHUP).then_some(true);
    }
    Ok(info)
}

fn modes(file: &Description, info: &mut proto::TtyInfoEntry) -> nix::Result<()> {
    let fd = fd(file);
    let is_on = |question| match tty::ask(fd, question) {
        Err(Errno::ENOTTY) => Ok(false),
        result => result.map(|answer| answer != 0),
    };
    info.exclusive = is_on(Question::Exclusive)?;
    info.packet_mode = is_on(Question::Packet)?;
    info.locked = is_on(Question::Locked)?;
    info.termios = Some(termios_entry(&tty::termios(fd, false)?, tty::speeds(fd)?));
    info.termios_locked = Some(termios_entry(&tty::termios(fd, true)?, Speeds::default()));
    let size = tty::window_size(fd)?;
    info.winsize = Some(proto::WinsizeEntry {
        ws_row: size.rows.into(),
        ws_col: size.columns.into(),
        ws_xpixel: size.x_pixels.into(),
        ws_ypixel: size.y_pixels.into(),
    });
    Ok(())
}

fn termios_entry(modes: &Termios, speeds: Speeds) -> proto::TermiosEntry {
    proto::TermiosEntry {
        c_iflag: modes.input,
        c_oflag: modes.output,
        c_cflag: modes.control,
        c_lflag: modes.local,
        c_line: modes.line.into(),
        c_ispeed: speeds.input,
        c_ospeed: speeds.output,
        c_cc: pack(&modes.characters),
    }
}
