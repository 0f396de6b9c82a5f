//! The kinds of image files: names, magics, messages and payloads, in one table.

use std::fmt::Write as _;

/// First magic of every image but the inventory, which has only its own.
pub const IMAGE_MAGIC: u32 = 0x5456_4319;

/// First magic of files that CRIU writes for itself rather than for a restore: statistics
/// and caches.
pub const SERVICE_MAGIC: u32 = 0x5510_5940;

/// What a file of a kind holds after its magics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Body {
    /// Bytes, without a magic.
    Raw,
    /// A magic, then bytes that the format does not describe.
    Opaque,
    /// Exactly one message of this name.
    One(&'static str),
    /// Messages of this name until the end of the file.
    Many(&'static str),
    /// One `pagemap_head`, then `pagemap_entry` until the end of the file.
    Pagemap,
}

/// The bytes that follow a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Payload {
    /// None.
    None,
    /// As many bytes as the field `bytes` of the message says.
    Bytes,
    /// As many bytes as the field `length` of the message says.
    Length,
    /// The segment, unless its pages are in a pagemap.
    IpcShm,
    /// `qnum` messages, each with its text.
    IpcMsg,
    /// `nsems` 16-bit values.
    IpcSem,
    /// The file's bytes, whole or in chunks.
    Ghost,
    /// Receive queue, then send queue.
    TcpStream,
    /// Keys, then values.
    BpfMap,
}

/// The variable part of a file name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Number {
    /// None: the kind has one file.
    None,
    /// A decimal number.
    Decimal,
    /// A hexadecimal number without prefix.
    Hex,
    /// `dump` or `restore`.
    Word,
}

/// One row of the table of kinds.
#[derive(Clone, Copy, Debug)]
pub struct Desc {
    /// The kind that the row describes.
    pub kind: Kind,
    /// The kind's name in the format, as `crit` prints it.
    pub name: &'static str,
    /// What file names begin with.
    pub prefix: &'static str,
    /// What comes after the prefix.
    pub number: Number,
    /// What file names end with.
    pub suffix: &'static str,
    /// The kind's own magic; 0 for raw files.
    pub magic: u32,
    /// What follows the magic.
    pub body: Body,
    /// What follows each message.
    pub payload: Payload,
}

macro_rules! kinds {
    ($($kind:ident = $name:literal: $prefix:literal, $number:ident, $suffix:literal, $magic:literal,
       $body:ident $(($message:literal))?, $payload:ident;)*) => {
        /// The kinds of image files.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Kind {
            $(#[doc = concat!("`", $prefix, "*", $suffix, "`")] $kind,)*
        }

        /// All kinds, in the order of [`Kind`].
        pub static KINDS: &[Desc] = &[
            $(Desc {
                kind: Kind::$kind,
                name: $name,
                prefix: $prefix,
                number: Number::$number,
                suffix: $suffix,
                magic: $magic,
                body: Body::$body $(($message))?,
                payload: Payload::$payload,
            },)*
        ];
    };
}

kinds! {
    Inventory = "INVENTORY": "inventory", None, ".img", 0x58313116, One("inventory_entry"), None;
    Fdinfo = "FDINFO": "fdinfo-", Decimal, ".img", 0x56213732, Many("fdinfo_entry"), None;
    Pagemap = "PAGEMAP": "pagemap-", Decimal, ".img", 0x56084025, Pagemap, None;
    ShmemPagemap = "SHMEM_PAGEMAP": "pagemap-shmem-", Decimal, ".img", 0x56084025, Pagemap, None;
    RegFiles = "REG_FILES": "reg-files", None, ".img", 0x50363636, Many("reg_file_entry"), None;
    ExtFiles = "EXT_FILES": "ext-files", None, ".img", 0x59255641, Many("ext_file_entry"), None;
    NsFiles = "NS_FILES": "ns-files", None, ".img", 0x61394011, Many("ns_file_entry"), None;
    EventfdFile = "EVENTFD_FILE": "eventfd", None, ".img", 0x44523722, Many("eventfd_file_entry"), None;
    EventpollFile = "EVENTPOLL_FILE": "eventpoll", None, ".img", 0x45023858, Many("eventpoll_file_entry"), None;
    EventpollTfd = "EVENTPOLL_TFD": "eventpoll-tfd", None, ".img", 0x44433746, Many("eventpoll_tfd_entry"), None;
    Signalfd = "SIGNALFD": "signalfd", None, ".img", 0x57323820, Many("signalfd_entry"), None;
    InotifyFile = "INOTIFY_FILE": "inotify", None, ".img", 0x48424431, Many("inotify_file_entry"), None;
    InotifyWd = "INOTIFY_WD": "inotify-wd", None, ".img", 0x54562009, Many("inotify_wd_entry"), None;
    FanotifyFile = "FANOTIFY_FILE": "fanotify", None, ".img", 0x55096122, Many("fanotify_file_entry"), None;
    FanotifyMark = "FANOTIFY_MARK": "fanotify-mark", None, ".img", 0x56506035, Many("fanotify_mark_entry"), None;
    Core = "CORE": "core-", Decimal, ".img", 0x55053847, One("core_entry"), None;
    Ids = "IDS": "ids-", Decimal, ".img", 0x54432030, One("task_kobj_ids_entry"), None;
    Mm = "MM": "mm-", Decimal, ".img", 0x57492820, One("mm_entry"), None;
    Vmas = "VMAS": "vmas-", Decimal, ".img", 0x54123737, Many("vma_entry"), None;
    Pipes = "PIPES": "pipes", None, ".img", 0x56513555, Many("pipe_entry"), None;
    PipesData = "PIPES_DATA": "pipes-data", None, ".img", 0x56453709, Many("pipe_data_entry"), Bytes;
    Fifo = "FIFO": "fifo", None, ".img", 0x58364939, Many("fifo_entry"), None;
    FifoData = "FIFO_DATA": "fifo-data", None, ".img", 0x59333054, Many("pipe_data_entry"), Bytes;
    Pstree = "PSTREE": "pstree", None, ".img", 0x50273030, Many("pstree_entry"), None;
    Sigact = "SIGACT": "sigacts-", Decimal, ".img", 0x55344201, Many("sa_entry"), None;
    Unixsk = "UNIXSK": "unixsk", None, ".img", 0x54373943, Many("unix_sk_entry"), None;
    Inetsk = "INETSK": "inetsk", None, ".img", 0x56443851, Many("inet_sk_entry"), None;
    Packetsk = "PACKETSK": "packetsk", None, ".img", 0x60454618, Many("packet_sock_entry"), None;
    NetlinkSk = "NETLINK_SK": "netlinksk", None, ".img", 0x58005614, Many("netlink_sk_entry"), None;
    SkQueues = "SK_QUEUES": "sk-queues", None, ".img", 0x56264026, Many("sk_packet_entry"), Length;
    Itimers = "ITIMERS": "itimers-", Decimal, ".img", 0x57464056, Many("itimer_entry"), None;
    PosixTimers = "POSIX_TIMERS": "posix-timers-", Decimal, ".img", 0x52603957, Many("posix_timer_entry"), None;
    Creds = "CREDS": "creds-", Decimal, ".img", 0x54023547, One("creds_entry"), None;
    Utsns = "UTSNS": "utsns-", Decimal, ".img", 0x54473203, One("utsns_entry"), None;
    IpcVar = "IPC_VAR": "ipcns-var-", Decimal, ".img", 0x53115007, One("ipc_var_entry"), None;
    IpcnsShm = "IPCNS_SHM": "ipcns-shm-", Decimal, ".img", 0x46283044, Many("ipc_shm_entry"), IpcShm;
    IpcnsMsg = "IPCNS_MSG": "ipcns-msg-", Decimal, ".img", 0x55453737, Many("ipc_msg_entry"), IpcMsg;
    IpcnsSem = "IPCNS_SEM": "ipcns-sem-", Decimal, ".img", 0x59573019, Many("ipc_sem_entry"), IpcSem;
    Fs = "FS": "fs-", Decimal, ".img", 0x51403912, One("fs_entry"), None;
    RemapFpath = "REMAP_FPATH": "remap-fpath", None, ".img", 0x59133954, Many("remap_file_path_entry"), None;
    GhostFile = "GHOST_FILE": "ghost-file-", Hex, ".img", 0x52583605, Many("ghost_file_entry"), Ghost;
    MemfdInode = "MEMFD_INODE": "memfd", None, ".img", 0x48453499, Many("memfd_inode_entry"), None;
    TcpStream = "TCP_STREAM": "tcp-stream-", Hex, ".img", 0x51465506, One("tcp_stream_entry"), TcpStream;
    Mnts = "MNTS": "mountpoints-", Decimal, ".img", 0x55563928, Many("mnt_entry"), None;
    Netdev = "NETDEV": "netdev-", Decimal, ".img", 0x57373951, Many("net_device_entry"), None;
    Netns = "NETNS": "netns-", Decimal, ".img", 0x55933752, One("netns_entry"), None;
    Ifaddr = "IFADDR": "ifaddr-", Decimal, ".img", 0x00000000, Raw, None;
    Route = "ROUTE": "route-", Decimal, ".img", 0x00000000, Raw, None;
    Route6 = "ROUTE6": "route6-", Decimal, ".img", 0x00000000, Raw, None;
    Rule = "RULE": "rule-", Decimal, ".img", 0x00000000, Raw, None;
    Iptables = "IPTABLES": "iptables-", Decimal, ".img", 0x00000000, Raw, None;
    Ip6tables = "IP6TABLES": "ip6tables-", Decimal, ".img", 0x00000000, Raw, None;
    Nftables = "NFTABLES": "nftables-", Decimal, ".img", 0x00000000, Raw, None;
    TmpfsImg = "TMPFS_IMG": "tmpfs-", Decimal, ".tar.gz.img", 0x00000000, Raw, None;
    TmpfsDev = "TMPFS_DEV": "tmpfs-dev-", Decimal, ".tar.gz.img", 0x00000000, Raw, None;
    Autofs = "AUTOFS": "autofs-", Decimal, ".img", 0x49353943, Many("autofs_entry"), None;
    BinfmtMiscOld = "BINFMT_MISC_OLD": "binfmt-misc-", Decimal, ".img", 0x67343323, Opaque, None;
    BinfmtMisc = "BINFMT_MISC": "binfmt-misc", None, ".img", 0x67343323, Many("binfmt_misc_entry"), None;
    TtyFiles = "TTY_FILES": "tty", None, ".img", 0x59433025, Many("tty_file_entry"), None;
    TtyInfo = "TTY_INFO": "tty-info", None, ".img", 0x59453036, Many("tty_info_entry"), None;
    TtyData = "TTY_DATA": "tty-data", None, ".img", 0x59413026, Many("tty_data_entry"), None;
    FileLocks = "FILE_LOCKS": "filelocks", None, ".img", 0x54323616, Many("file_lock_entry"), None;
    Rlimit = "RLIMIT": "rlimit-", Decimal, ".img", 0x57113925, Many("rlimit_entry"), None;
    Pages = "PAGES": "pages-", Decimal, ".img", 0x00000000, Raw, None;
    PagesOld = "PAGES_OLD": "pages-", Decimal, ".img", 0x56084025, Opaque, None;
    ShmPagesOld = "SHM_PAGES_OLD": "pages-shmem-", Decimal, ".img", 0x56084025, Opaque, None;
    Signal = "SIGNAL": "signal-s-", Decimal, ".img", 0x59255647, Many("siginfo_entry"), None;
    Psignal = "PSIGNAL": "signal-p-", Decimal, ".img", 0x59255647, Many("siginfo_entry"), None;
    Tunfile = "TUNFILE": "tunfile", None, ".img", 0x57143751, Many("tunfile_entry"), None;
    Cgroup = "CGROUP": "cgroup", None, ".img", 0x59383330, One("cgroup_entry"), None;
    Timerfd = "TIMERFD": "timerfd", None, ".img", 0x50493712, Many("timerfd_entry"), None;
    Cpuinfo = "CPUINFO": "cpuinfo", None, ".img", 0x61404013, One("cpuinfo_entry"), None;
    Seccomp = "SECCOMP": "seccomp", None, ".img", 0x64413049, One("seccomp_entry"), None;
    Userns = "USERNS": "userns-", Decimal, ".img", 0x55474906, One("userns_entry"), None;
    NetnfCt = "NETNF_CT": "netns-ct-", Decimal, ".img", 0x00000000, Raw, None;
    NetnfExp = "NETNF_EXP": "netns-exp-", Decimal, ".img", 0x00000000, Raw, None;
    Files = "FILES": "files", None, ".img", 0x56303138, Many("file_entry"), None;
    Timens = "TIMENS": "timens-", Decimal, ".img", 0x43114433, One("timens_entry"), None;
    Pidns = "PIDNS": "pidns-", Decimal, ".img", 0x61157326, One("pidns_entry"), None;
    BpfmapFile = "BPFMAP_FILE": "bpfmap-file", None, ".img", 0x57506142, Many("bpfmap_file_entry"), None;
    BpfmapData = "BPFMAP_DATA": "bpfmap-data", None, ".img", 0x64324033, Many("bpfmap_data_entry"), BpfMap;
    Apparmor = "APPARMOR": "apparmor", None, ".img", 0x59423047, One("apparmor_entry"), None;
    Pidfd = "PIDFD": "pidfd", None, ".img", 0x54435556, Many("pidfd_entry"), None;
    Punched = "PUNCHED": "punched-", Decimal, ".img", 0x00000000, Raw, None;
    SentPagemap = "SENT_PAGEMAP": "sent-pagemap-", Decimal, ".img", 0x56084025, Pagemap, None;
    SentShmemPagemap = "SENT_SHMEM_PAGEMAP": "sent-pagemap-shmem-", Decimal, ".img", 0x56084025, Pagemap, None;
    ReceivedId = "RECEIVED_ID": "received-id", None, ".img", 0x00000000, Raw, None;
    DeletedMount = "DELETED_MOUNT": "deleted-mount-", Decimal, ".tar.gz.img", 0x00000000, Raw, None;
    Stats = "STATS": "stats-", Word, "", 0x57093306, One("stats_entry"), None;
    IrmapCache = "IRMAP_CACHE": "irmap-cache", None, ".img", 0x57004059, Many("irmap_cache_entry"), None;
}

impl Kind {
    /// Returns the row of this kind.
    pub fn desc(self) -> &'static Desc {
        &KINDS[self as usize]
    }

    /// Returns the name of the file of this kind with number `id`. Kinds with a single file
    /// ignore the number.
    pub fn file_name(self, id: u64) -> String {
        let desc = self.desc();
        let mut name = String::from(desc.prefix);
        match desc.number {
            Number::None | Number::Word => Ok(()),
            Number::Decimal => write!(name, "{id}"),
            Number::Hex => write!(name, "{id:x}"),
        }
        .expect("writing to a string does not fail");
        name.push_str(desc.suffix);
        name
    }
}

impl Desc {
    /// Returns the magic before the kind's own, if there is one.
    pub fn common_magic(&self) -> Option<u32> {
        match self.kind {
            Kind::Inventory => None,
            Kind::Stats | Kind::IrmapCache => Some(SERVICE_MAGIC),
            _ if self.magic == 0 => None,
            _ => Some(IMAGE_MAGIC),
        }
    }

    /// Returns the number in `file_name` if a file of this kind can have that name; 0 for
    /// kinds without numbers.
    pub fn matches(&self, file_name: &str) -> Option<u64> {
        let middle = file_name.strip_prefix(self.prefix)?.strip_suffix(self.suffix)?;
        match self.number {
            Number::None => middle.is_empty().then_some(0),
            Number::Word => matches!(middle, "dump" | "restore").then_some(0),
            Number::Decimal => canonical(middle, 10),
            Number::Hex => canonical(middle, 16),
        }
    }
}

/// Parses a number, but only in the spelling that the format uses: no leading zeros, lower
/// case.
fn canonical(digits: &str, radix: u32) -> Option<u64> {
    let plain = digits.bytes().all(|b| b.is_ascii_digit() || matches!(b, b'a'..=b'f'))
        && (digits == "0" || !digits.starts_with('0'));
    plain.then(|| u64::from_str_radix(digits, radix).ok()).flatten()
}

/// Finds the kind that a file name belongs to, and the number in the name.
pub fn by_file_name(file_name: &str) -> Option<(&'static Desc, u64)> {
    KINDS.iter().find_map(|desc| Some((desc, desc.matches(file_name)?)))
}

/// Finds the kind with this magic. Among kinds that share a magic, `file_name` decides; if
/// it fits none of them, the first kind that the format describes is returned.
pub fn by_magic(magic: u32, file_name: &str) -> Option<&'static Desc> {
    let sharing = || KINDS.iter().filter(|desc| desc.magic == magic && magic != 0);
    sharing()
        .find(|desc| desc.matches(file_name).is_some())
        .or_else(|| sharing().find(|desc| desc.body != Body::Opaque))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_is_found_by_a_name_of_its_own() {
        // Kinds of the oldest format use the names of newer ones.
        let shadowed = [Kind::PagesOld];
        for (position, desc) in KINDS.iter().enumerate() {
            assert_eq!(desc.kind as usize, position);
            if desc.number == Number::Word || shadowed.contains(&desc.kind) {
                continue;
            }
            let id = if desc.number == Number::None { 0 } else { 0x2a };
            let (found, number) = by_file_name(&desc.kind.file_name(id)).expect(desc.name);
            assert_eq!((found.kind, number), (desc.kind, id));
        }
    }

    #[test]
    fn names_that_only_look_alike_are_not_images() {
        for name in [
            "pagemap-.img",
            "pagemap-01.img",
            "pagemap-1.img~",
            "core--1.img",
            "stats-x",
            "pages-1",
        ] {
            assert!(by_file_name(name).is_none(), "{name}");
        }
        assert_eq!(by_file_name("stats-dump").map(|found| found.0.kind), Some(Kind::Stats));
        assert_eq!(by_file_name("ghost-file-1a.img").map(|found| found.1), Some(0x1a));
    }
}
