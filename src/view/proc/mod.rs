//! The processes of a snapshot, as `proc(5)` showed them.
//!
//! [`Node`] lists the files, [`Proc`] produces their contents. All contents are in the kernel's
//! format, so tools that read `/proc` can read them. Values that images do not have, such as
//! processor times, start times and page faults, are left out, or 0 where a line needs a number.

mod files;
mod list;
mod memory;
mod mounts;
mod status;
mod system;
mod task;

use std::sync::Arc;

pub use list::{DescriptorRow, MappingRow, ProcessRow};

use super::{
    AddressSpace, NodeType, Result, Tables, ViewError, address_space::Spaces, thread::Thread,
};
use crate::image::{Kind, proto};

/// A node below the directory `proc` of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Node {
    /// The directory itself.
    Root,
    /// A directory of the system, by its path.
    SystemDirectory(&'static str),
    /// A file of the system, by its path.
    SystemFile(&'static str),
    /// The directory of a process.
    Process(u32),
    /// A file of a process or of one of its threads.
    File(Who, TaskFile),
    /// A link of a process.
    Link(u32, ProcessLink),
    /// A directory of a process.
    Directory(u32, ProcessDirectory),
    /// The directory of a thread.
    Thread(Who),
    /// The target of a descriptor.
    Descriptor(u32, u32),
    /// The `fdinfo` file of a descriptor.
    DescriptorInfo(u32, u32),
    /// The file that is mapped at these addresses.
    MappedFile(u32, u64, u64),
    /// A namespace, by its name in `ns`.
    Namespace(u32, &'static str),
    /// The address space (`mem`).
    Memory(u32),
    /// `self`: leads to the root process of the tree.
    Itself,
    /// A pipe, by the number in links of descriptors; no listing has it.
    Pipe(u32),
    /// A socket, likewise.
    Socket(u32),
}

/// A thread of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Who {
    pub(super) pid: u32,
    pub(super) tid: u32,
}

/// Defines an enumeration with a file name for each member.
macro_rules! names {
    ($(#[$meta:meta])* $of:ident { $($member:ident = $name:literal,)* }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(super) enum $of { $($member,)* }

        impl $of {
            const ALL: &'static [(&'static str, Self)] = &[$(($name, Self::$member),)*];
        }
    };
}

names! {
    /// Files of a process. Some of them each thread has as well.
    TaskFile {
        Auxv = "auxv",
        Cgroup = "cgroup",
        Children = "children",
        Cmdline = "cmdline",
        Comm = "comm",
        CoredumpFilter = "coredump_filter",
        Environ = "environ",
        Limits = "limits",
        LoginUid = "loginuid",
        Maps = "maps",
        Mountinfo = "mountinfo",
        OomScoreAdj = "oom_score_adj",
        Personality = "personality",
        Smaps = "smaps",
        SmapsRollup = "smaps_rollup",
        Stat = "stat",
        Statm = "statm",
        Status = "status",
        Timers = "timers",
        TimerSlack = "timerslack_ns",
    }
}

names! {
    /// Links of a process.
    ProcessLink {
        Cwd = "cwd",
        Exe = "exe",
        Root = "root",
    }
}

names! {
    /// Directories of a process.
    ProcessDirectory {
        Descriptors = "fd",
        DescriptorInfos = "fdinfo",
        MappedFiles = "map_files",
        Namespaces = "ns",
        Threads = "task",
    }
}

impl TaskFile {
    /// Whether each thread has its own.
    fn is_of_threads(self) -> bool {
        matches!(self, Self::Children | Self::Comm | Self::Stat | Self::Status)
    }
}

impl Node {
    /// Returns the type of the node.
    pub(super) fn kind(&self) -> NodeType {
        match self {
            Self::Root
            | Self::SystemDirectory(_)
            | Self::Process(_)
            | Self::Directory(..)
            | Self::Thread(_) => NodeType::Directory,
            Self::Link(..)
            | Self::Descriptor(..)
            | Self::MappedFile(..)
            | Self::Namespace(..)
            | Self::Itself => NodeType::Link,
            Self::SystemFile(_) | Self::File(..) | Self::DescriptorInfo(..) | Self::Memory(_) => {
                NodeType::File
            }
            Self::Pipe(_) => NodeType::Pipe,
            Self::Socket(_) => NodeType::Socket,
        }
    }

    /// Returns the process that the node belongs to, if any.
    pub(super) fn pid(&self) -> Option<u32> {
        match self {
            Self::Root
            | Self::SystemDirectory(_)
            | Self::SystemFile(_)
            | Self::Itself
            | Self::Pipe(_)
            | Self::Socket(_) => None,
            Self::Process(pid)
            | Self::Link(pid, _)
            | Self::Directory(pid, _)
            | Self::Descriptor(pid, _)
            | Self::DescriptorInfo(pid, _)
            | Self::MappedFile(pid, ..)
            | Self::Namespace(pid, _)
            | Self::Memory(pid) => Some(*pid),
            Self::File(who, _) | Self::Thread(who) => Some(who.pid),
        }
    }
}

/// The processes of a snapshot.
#[derive(Debug)]
pub(super) struct Proc<'a> {
    tables: &'a Arc<Tables>,
    spaces: &'a Spaces,
}

/// The images of a thread.
#[derive(Debug)]
struct Task {
    who: Who,
    entry: proto::PstreeEntry,
    thread: Thread,
}

impl<'a> Proc<'a> {
    pub(super) fn new(tables: &'a Arc<Tables>, spaces: &'a Spaces) -> Self {
        Self { tables, spaces }
    }

    /// Returns the entries of a directory, in no particular order.
    ///
    /// # Errors
    /// [`ViewError::Image`].
    pub(super) fn children(&self, node: &Node) -> Result<Vec<(String, Node)>> {
        match node {
            Node::Root => {
                let mut children = system::children("");
                let tree = self.tables.tree()?;
                if !tree.is_empty() {
                    children.push(("self".to_owned(), Node::Itself));
                }
                let pids = tree.iter().map(|entry| entry.pid);
                children.extend(pids.map(|pid| (pid.to_string(), Node::Process(pid))));
                Ok(children)
            }
            Node::SystemDirectory(path) => Ok(system::children(path)),
            Node::Process(pid) => self.process_children(*pid),
            Node::Thread(who) => {
                let files = TaskFile::ALL.iter().filter(|(_, file)| file.is_of_threads());
                Ok(files
                    .map(|(name, file)| ((*name).to_owned(), Node::File(*who, *file)))
                    .collect())
            }
            Node::Directory(pid, ProcessDirectory::Threads) => {
                let entry = self.entry(*pid)?;
                let thread = |tid: &u32| {
                    let who = Who { pid: *pid, tid: *tid };
                    (tid.to_string(), Node::Thread(who))
                };
                let mut threads: Vec<_> = entry.threads.iter().map(thread).collect();
                if !entry.threads.contains(pid) {
                    threads.push(thread(pid));
                }
                Ok(threads)
            }
            Node::Directory(pid, ProcessDirectory::Descriptors) => {
                let fds = self.descriptors(*pid)?.into_iter();
                Ok(fds.map(|fd| (fd.fd.to_string(), Node::Descriptor(*pid, fd.fd))).collect())
            }
            Node::Directory(pid, ProcessDirectory::DescriptorInfos) => {
                let fds = self.descriptors(*pid)?.into_iter();
                Ok(fds.map(|fd| (fd.fd.to_string(), Node::DescriptorInfo(*pid, fd.fd))).collect())
            }
            Node::Directory(pid, ProcessDirectory::MappedFiles) => self.mapped_children(*pid),
            Node::Directory(pid, ProcessDirectory::Namespaces) => {
                let ids = self.ids(*pid)?;
                let known = NAMESPACES.iter().filter(|(_, id)| id(&ids).is_some());
                Ok(known
                    .map(|(name, _)| ((*name).to_owned(), Node::Namespace(*pid, name)))
                    .collect())
            }
            _ => Ok(Vec::new()),
        }
    }

    fn process_children(&self, pid: u32) -> Result<Vec<(String, Node)>> {
        let who = Who { pid, tid: pid };
        let lives = self.tables.mm(pid)?.is_some();
        let task = self.task(who)?;
        let is_known = |file: TaskFile| match file {
            TaskFile::Children => false,
            TaskFile::Cgroup => self.cgroups(&task).is_ok_and(|lines| !lines.is_empty()),
            TaskFile::CoredumpFilter => task.attribute("core_filter").is_some(),
            TaskFile::TimerSlack => task.attribute("timer_slack").is_some(),
            TaskFile::LoginUid => {
                task.thread.core.tc.as_ref().is_some_and(|tc| tc.loginuid.is_some())
            }
            TaskFile::Mountinfo => self.mount_entries(pid).is_ok_and(|mounts| mounts.is_some()),
            _ => true,
        };
        let files = TaskFile::ALL.iter().filter(|(_, file)| is_known(*file));
        let mut children: Vec<(String, Node)> =
            files.map(|(name, file)| ((*name).to_owned(), Node::File(who, *file))).collect();
        let directories = ProcessDirectory::ALL.iter();
        children.extend(
            directories.map(|(name, dir)| ((*name).to_owned(), Node::Directory(pid, *dir))),
        );
        if lives {
            children.push(("mem".to_owned(), Node::Memory(pid)));
            let links = ProcessLink::ALL.iter();
            let links = links
                .filter(|(_, link)| self.process_link(pid, *link).is_ok_and(|to| to.is_some()));
            children.extend(links.map(|(name, link)| ((*name).to_owned(), Node::Link(pid, *link))));
        }
        Ok(children)
    }

    /// Returns a node that no listing has. The kernel looks up the targets of descriptor links, such
    /// as `pipe:[1]`, in the directory of the link.
    ///
    /// # Errors
    /// [`ViewError::Image`]; [`ViewError::NoSuchProcess`].
    pub(super) fn hidden(&self, dir: &Node, name: &str) -> Result<Option<Node>> {
        let Node::Directory(pid, ProcessDirectory::Descriptors) = dir else { return Ok(None) };
        let number = |kind: &str| {
            let inside = name.strip_prefix(kind)?.strip_prefix(":[")?.strip_suffix(']')?;
            inside.parse().ok()
        };
        let node = match (number("pipe"), number("socket")) {
            (Some(number), _) => Node::Pipe(number),
            (_, Some(number)) => Node::Socket(number),
            _ => return Ok(None),
        };
        let files = self.tables.files()?;
        let fds = self.descriptors(*pid)?;
        let is_open = fds.iter().any(|fd| files.target(fd.id) == name.as_bytes());
        Ok(is_open.then_some(node))
    }

    /// Returns the process that `self` leads to.
    ///
    /// # Errors
    /// [`ViewError::Image`].
    pub(super) fn itself(&self) -> Result<Option<u32>> {
        Ok(self.tables.tree()?.first().map(|entry| entry.pid))
    }

    /// Returns the contents of a file.
    ///
    /// # Errors
    /// [`ViewError::Image`]; [`ViewError::NoSuchProcess`].
    pub(super) fn text(&self, node: &Node) -> Result<Vec<u8>> {
        match node {
            Node::SystemFile(path) => self.system(path),
            Node::DescriptorInfo(pid, fd) => self.descriptor_info(*pid, *fd),
            Node::File(who, file) => self.task_file(*who, *file),
            _ => Ok(Vec::new()),
        }
    }

    /// Returns the target of a link.
    ///
    /// # Errors
    /// [`ViewError::Image`]; [`ViewError::NoSuchProcess`].
    pub(super) fn target(&self, node: &Node) -> Result<Vec<u8>> {
        let target = match node {
            Node::Itself => self.itself()?.map(|pid| pid.to_string().into_bytes()),
            Node::Link(pid, link) => self.process_link(*pid, *link)?,
            Node::Descriptor(pid, fd) => self.descriptor_target(*pid, *fd)?,
            Node::MappedFile(pid, start, end) => self.mapped_target(*pid, *start, *end)?,
            Node::Namespace(pid, name) => {
                let ids = self.ids(*pid)?;
                let id = NAMESPACES.iter().find(|(known, _)| known == name);
                let id = id.and_then(|(_, id)| id(&ids));
                let kind = name.strip_suffix("_for_children").unwrap_or(name);
                id.map(|id| format!("{kind}:[{id}]").into_bytes())
            }
            _ => None,
        };
        // A link without a target is not listed.
        Ok(target.unwrap_or_default())
    }

    fn task_file(&self, who: Who, file: TaskFile) -> Result<Vec<u8>> {
        let task = self.task(who)?;
        Ok(match file {
            TaskFile::Auxv => self.auxv(who.pid)?,
            TaskFile::Cgroup => self.cgroups(&task)?,
            TaskFile::Children => self.child_list(who)?,
            TaskFile::Cmdline => self.memory_text(who.pid, memory::Text::Arguments)?,
            TaskFile::Comm => [task.comm(), b"\n"].concat(),
            TaskFile::CoredumpFilter => {
                task.attribute_text("core_filter", |value| format!("{value:08x}\n"))
            }
            TaskFile::Environ => self.memory_text(who.pid, memory::Text::Environment)?,
            TaskFile::Limits => task.limits(),
            TaskFile::LoginUid => {
                let id = task.thread.core.tc.as_ref().and_then(|tc| tc.loginuid);
                id.map_or_else(Vec::new, |id| id.to_string().into_bytes())
            }
            TaskFile::Maps => self.maps(who.pid)?,
            TaskFile::Mountinfo => self.mountinfo(who.pid)?.unwrap_or_default(),
            TaskFile::OomScoreAdj => {
                let adjusted = task.thread.core.tc.as_ref().and_then(|tc| tc.oom_score_adj);
                format!("{}\n", adjusted.unwrap_or(0)).into_bytes()
            }
            TaskFile::Personality => {
                let bits = task.thread.core.tc.as_ref().map_or(0, |tc| tc.personality);
                format!("{bits:08x}\n").into_bytes()
            }
            TaskFile::Smaps => self.smaps(who.pid)?,
            TaskFile::SmapsRollup => self.smaps_rollup(who.pid)?,
            TaskFile::Stat => self.stat(&task)?,
            TaskFile::Statm => self.statm(who.pid)?,
            TaskFile::Status => self.status(&task)?,
            TaskFile::Timers => task.timers(),
            TaskFile::TimerSlack => {
                task.attribute_text("timer_slack", |value| format!("{value}\n"))
            }
        })
    }

    fn entry(&self, pid: u32) -> Result<proto::PstreeEntry> {
        let tree = self.tables.tree()?;
        let entry = tree.iter().find(|entry| entry.pid == pid).cloned();
        entry.ok_or_else(|| ViewError::NoSuchProcess { dir: self.tables.path().to_owned(), pid })
    }

    /// Returns the images of a thread. Those of exited threads, and of zombies in older images, have
    /// little more than a name.
    fn task(&self, who: Who) -> Result<Task> {
        let entry = self.entry(who.pid)?;
        let core: Option<proto::CoreEntry> =
            self.tables.images().message_if_any(Kind::Core, who.tid.into())?;
        let thread = Thread::new(self.tables, who.pid, who.tid, core.unwrap_or_default())?;
        Ok(Task { who, entry, thread })
    }

    fn ids(&self, pid: u32) -> Result<proto::TaskKobjIdsEntry> {
        if let Some(ids) = self.tables.images().message_if_any(Kind::Ids, pid.into())? {
            return Ok(ids);
        }
        let core: Option<proto::CoreEntry> =
            self.tables.images().message_if_any(Kind::Core, pid.into())?;
        Ok(core.and_then(|core| core.ids).unwrap_or_default())
    }

    /// Returns the address space of a process; `None` for a zombie.
    fn space(&self, pid: u32) -> Result<Option<Arc<AddressSpace>>> {
        match self.spaces.get(self.tables, pid) {
            Ok(space) => Ok(Some(space)),
            Err(ViewError::NoAddressSpace { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// Returns the id of one namespace of a task.
type NamespaceId = fn(&proto::TaskKobjIdsEntry) -> Option<u32>;

/// The names in `ns`, and the fields with their ids.
const NAMESPACES: [(&str, NamespaceId); 8] = [
    ("cgroup", |ids| ids.cgroup_ns_id),
    ("ipc", |ids| ids.ipc_ns_id),
    ("mnt", |ids| ids.mnt_ns_id),
    ("net", |ids| ids.net_ns_id),
    ("pid", |ids| ids.pid_ns_id),
    ("time", |ids| ids.time_ns_id),
    ("user", |ids| ids.user_ns_id),
    ("uts", |ids| ids.uts_ns_id),
];

/// Escapes a path like the kernel, which writes the bytes in `set` as octal numbers.
fn escaped(path: &[u8], set: &[u8]) -> Vec<u8> {
    let mut text = Vec::with_capacity(path.len());
    for byte in path {
        if set.contains(byte) {
            text.extend(format!("\\{byte:03o}").into_bytes());
        } else {
            text.push(*byte);
        }
    }
    text
}

#[cfg(test)]
mod tests;
