//! Names for numbers of the kernel and of the format.
//!
//! The values are those of x86-64, from the uapi headers named at each table.

/// Some bits of a number, and the name of one value of them.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bits {
    mask: u64,
    value: u64,
    name: &'static str,
}

const fn bit(value: u64, name: &'static str) -> Bits {
    Bits { mask: value, value, name }
}

const fn field(mask: u64, value: u64, name: &'static str) -> Bits {
    Bits { mask, value, name }
}

/// Spells out the bits of `value`; bits without a name follow as one hexadecimal number.
pub(super) fn spell(value: u64, names: &[Bits]) -> String {
    let mut words = Vec::new();
    let mut left = value;
    for bits in names {
        if value & bits.mask == bits.value && (bits.value == 0 || left & bits.value == bits.value) {
            words.push(bits.name.to_owned());
            left &= !bits.mask;
        }
    }
    if left != 0 || words.is_empty() {
        words.push(format!("{left:#x}"));
    }
    words.join(" | ")
}

/// A value and its name.
pub(super) type Name = (u64, &'static str);

/// `PAGEMAP_ENTRY.flags`; defined by the image format.
pub(super) const PAGEMAP: &[Bits] = &[bit(1, "PE_PARENT"), bit(2, "PE_LAZY"), bit(4, "PE_PRESENT")];

/// `vma_entry.status`; defined by the image format.
pub(super) const VMA_STATUS: &[Bits] = &[
    bit(1, "VMA_AREA_REGULAR"),
    bit(1 << 1, "VMA_AREA_STACK"),
    bit(1 << 2, "VMA_AREA_VSYSCALL"),
    bit(1 << 3, "VMA_AREA_VDSO"),
    bit(1 << 5, "VMA_AREA_HEAP"),
    bit(1 << 6, "VMA_FILE_PRIVATE"),
    bit(1 << 7, "VMA_FILE_SHARED"),
    bit(1 << 8, "VMA_ANON_SHARED"),
    bit(1 << 9, "VMA_ANON_PRIVATE"),
    bit(1 << 10, "VMA_AREA_SYSVIPC"),
    bit(1 << 11, "VMA_AREA_SOCKET"),
    bit(1 << 12, "VMA_AREA_VVAR"),
    bit(1 << 13, "VMA_AREA_AIORING"),
    bit(1 << 14, "VMA_AREA_MEMFD"),
    bit(1 << 15, "VMA_AREA_SHSTK"),
    bit(1 << 16, "VMA_AREA_GUARD"),
    bit(1 << 17, "VMA_AREA_UPROBES"),
    bit(1 << 27, "VMA_EXT_PLUGIN"),
    bit(1 << 31, "VMA_UNSUPP"),
];

/// asm-generic/mman-common.h
pub(super) const PROT: &[Bits] = &[
    field(0xffff_ffff, 0, "PROT_NONE"),
    bit(1, "PROT_READ"),
    bit(2, "PROT_WRITE"),
    bit(4, "PROT_EXEC"),
    bit(8, "PROT_SEM"),
    bit(0x0100_0000, "PROT_GROWSDOWN"),
    bit(0x0200_0000, "PROT_GROWSUP"),
];

/// linux/mman.h, asm-generic/mman.h
pub(super) const MAP: &[Bits] = &[
    field(0xf, 1, "MAP_SHARED"),
    field(0xf, 2, "MAP_PRIVATE"),
    field(0xf, 3, "MAP_SHARED_VALIDATE"),
    field(0xf, 8, "MAP_DROPPABLE"),
    bit(0x10, "MAP_FIXED"),
    bit(0x20, "MAP_ANONYMOUS"),
    bit(0x40, "MAP_32BIT"),
    bit(0x100, "MAP_GROWSDOWN"),
    bit(0x800, "MAP_DENYWRITE"),
    bit(0x1000, "MAP_EXECUTABLE"),
    bit(0x2000, "MAP_LOCKED"),
    bit(0x4000, "MAP_NORESERVE"),
    bit(0x8000, "MAP_POPULATE"),
    bit(0x1_0000, "MAP_NONBLOCK"),
    bit(0x2_0000, "MAP_STACK"),
    bit(0x4_0000, "MAP_HUGETLB"),
    bit(0x8_0000, "MAP_SYNC"),
];

/// Bit numbers from asm-generic/mman-common.h
pub(super) const MADV: &[Bits] = &[
    bit(1 << 1, "MADV_RANDOM"),
    bit(1 << 2, "MADV_SEQUENTIAL"),
    bit(1 << 10, "MADV_DONTFORK"),
    bit(1 << 12, "MADV_MERGEABLE"),
    bit(1 << 14, "MADV_HUGEPAGE"),
    bit(1 << 15, "MADV_NOHUGEPAGE"),
    bit(1 << 16, "MADV_DONTDUMP"),
    bit(1 << 18, "MADV_WIPEONFORK"),
];

/// asm-generic/fcntl.h; both O_SYNC and O_TMPFILE include another flag.
pub(super) const OPEN: &[Bits] = &[
    field(3, 0, "O_RDONLY"),
    field(3, 1, "O_WRONLY"),
    field(3, 2, "O_RDWR"),
    bit(0o100, "O_CREAT"),
    bit(0o200, "O_EXCL"),
    bit(0o400, "O_NOCTTY"),
    bit(0o1000, "O_TRUNC"),
    bit(0o2000, "O_APPEND"),
    bit(0o4000, "O_NONBLOCK"),
    bit(0o4_010_000, "O_SYNC"),
    bit(0o10_000, "O_DSYNC"),
    bit(0o20_000, "O_ASYNC"),
    bit(0o40_000, "O_DIRECT"),
    bit(0o100_000, "O_LARGEFILE"),
    bit(0o20_200_000, "O_TMPFILE"),
    bit(0o200_000, "O_DIRECTORY"),
    bit(0o400_000, "O_NOFOLLOW"),
    bit(0o1_000_000, "O_NOATIME"),
    bit(0o2_000_000, "O_CLOEXEC"),
    bit(0o10_000_000, "O_PATH"),
];

/// asm-generic/fcntl.h
pub(super) const FD: &[Bits] = &[bit(1, "FD_CLOEXEC")];

/// linux/fcntl.h
pub(super) const SEALS: &[Bits] = &[
    bit(1, "F_SEAL_SEAL"),
    bit(2, "F_SEAL_SHRINK"),
    bit(4, "F_SEAL_GROW"),
    bit(8, "F_SEAL_WRITE"),
    bit(0x10, "F_SEAL_FUTURE_WRITE"),
    bit(0x20, "F_SEAL_EXEC"),
];

/// asm/signal.h
pub(super) const SIGACTION: &[Bits] = &[
    bit(1, "SA_NOCLDSTOP"),
    bit(2, "SA_NOCLDWAIT"),
    bit(4, "SA_SIGINFO"),
    bit(0x400, "SA_UNSUPPORTED"),
    bit(0x800, "SA_EXPOSE_TAGBITS"),
    bit(0x0400_0000, "SA_RESTORER"),
    bit(0x0800_0000, "SA_ONSTACK"),
    bit(0x1000_0000, "SA_RESTART"),
    bit(0x4000_0000, "SA_NODEFER"),
    bit(0x8000_0000, "SA_RESETHAND"),
];

/// asm-generic/signal-defs.h
pub(super) const HANDLERS: &[Name] = &[(0, "SIG_DFL"), (1, "SIG_IGN")];

/// linux/signal.h
pub(super) const SIGNAL_STACK: &[Bits] =
    &[bit(1, "SS_ONSTACK"), bit(2, "SS_DISABLE"), bit(1 << 31, "SS_AUTODISARM")];

/// asm/signal.h, from 1
pub(super) const SIGNALS: [&str; 31] = [
    "SIGHUP",
    "SIGINT",
    "SIGQUIT",
    "SIGILL",
    "SIGTRAP",
    "SIGABRT",
    "SIGBUS",
    "SIGFPE",
    "SIGKILL",
    "SIGUSR1",
    "SIGSEGV",
    "SIGUSR2",
    "SIGPIPE",
    "SIGALRM",
    "SIGTERM",
    "SIGSTKFLT",
    "SIGCHLD",
    "SIGCONT",
    "SIGSTOP",
    "SIGTSTP",
    "SIGTTIN",
    "SIGTTOU",
    "SIGURG",
    "SIGXCPU",
    "SIGXFSZ",
    "SIGVTALRM",
    "SIGPROF",
    "SIGWINCH",
    "SIGIO",
    "SIGPWR",
    "SIGSYS",
];

/// The last signal of x86-64.
pub(super) const SIGNAL_MAX: u64 = 64;

/// Returns the name of a signal; `None` for 0 and other invalid numbers.
pub(super) fn signal(number: u64) -> Option<String> {
    let name = usize::try_from(number).ok()?.checked_sub(1).and_then(|at| SIGNALS.get(at));
    match (name, number) {
        (Some(name), _) => Some((*name).to_owned()),
        // The C library reserves two.
        (None, 32..34) => Some(format!("SIG{number}")),
        (None, 34) => Some("SIGRTMIN".to_owned()),
        (None, 35..=SIGNAL_MAX) => Some(format!("SIGRTMIN+{}", number - 34)),
        (None, _) => None,
    }
}

/// linux/securebits.h
pub(super) const SECUREBITS: &[Bits] = &[
    bit(1, "SECBIT_NOROOT"),
    bit(2, "SECBIT_NOROOT_LOCKED"),
    bit(4, "SECBIT_NO_SETUID_FIXUP"),
    bit(8, "SECBIT_NO_SETUID_FIXUP_LOCKED"),
    bit(0x10, "SECBIT_KEEP_CAPS"),
    bit(0x20, "SECBIT_KEEP_CAPS_LOCKED"),
    bit(0x40, "SECBIT_NO_CAP_AMBIENT_RAISE"),
    bit(0x80, "SECBIT_NO_CAP_AMBIENT_RAISE_LOCKED"),
];

/// State of a task; defined by the image format.
pub(super) const TASK_STATE: &[Name] =
    &[(1, "TASK_ALIVE"), (2, "TASK_DEAD"), (3, "TASK_STOPPED"), (6, "TASK_ZOMBIE")];

/// linux/sched.h
pub(super) const SCHED: &[Name] = &[
    (0, "SCHED_OTHER"),
    (1, "SCHED_FIFO"),
    (2, "SCHED_RR"),
    (3, "SCHED_BATCH"),
    (5, "SCHED_IDLE"),
    (6, "SCHED_DEADLINE"),
    (7, "SCHED_EXT"),
];

/// linux/sched.h
pub(super) const NAMESPACES: &[Bits] = &[
    bit(0x80, "CLONE_NEWTIME"),
    bit(0x2_0000, "CLONE_NEWNS"),
    bit(0x0200_0000, "CLONE_NEWCGROUP"),
    bit(0x0400_0000, "CLONE_NEWUTS"),
    bit(0x0800_0000, "CLONE_NEWIPC"),
    bit(0x1000_0000, "CLONE_NEWUSER"),
    bit(0x2000_0000, "CLONE_NEWPID"),
    bit(0x4000_0000, "CLONE_NEWNET"),
];

/// asm-generic/resource.h
pub(super) const RLIMIT: &[Name] = &[(u64::MAX, "RLIM_INFINITY")];

/// linux/time.h
pub(super) const CLOCK: &[Name] = &[
    (0, "CLOCK_REALTIME"),
    (1, "CLOCK_MONOTONIC"),
    (2, "CLOCK_PROCESS_CPUTIME_ID"),
    (3, "CLOCK_THREAD_CPUTIME_ID"),
    (4, "CLOCK_MONOTONIC_RAW"),
    (5, "CLOCK_REALTIME_COARSE"),
    (6, "CLOCK_MONOTONIC_COARSE"),
    (7, "CLOCK_BOOTTIME"),
    (8, "CLOCK_REALTIME_ALARM"),
    (9, "CLOCK_BOOTTIME_ALARM"),
    (11, "CLOCK_TAI"),
];

/// asm-generic/siginfo.h
pub(super) const SIGEV: &[Name] =
    &[(0, "SIGEV_SIGNAL"), (1, "SIGEV_NONE"), (2, "SIGEV_THREAD"), (4, "SIGEV_THREAD_ID")];

/// linux/timerfd.h
pub(super) const TIMERFD: &[Bits] =
    &[bit(1, "TFD_TIMER_ABSTIME"), bit(2, "TFD_TIMER_CANCEL_ON_SET")];

/// linux/eventpoll.h
pub(super) const EPOLL: &[Bits] = &[
    bit(1, "EPOLLIN"),
    bit(2, "EPOLLPRI"),
    bit(4, "EPOLLOUT"),
    bit(8, "EPOLLERR"),
    bit(0x10, "EPOLLHUP"),
    bit(0x40, "EPOLLRDNORM"),
    bit(0x80, "EPOLLRDBAND"),
    bit(0x100, "EPOLLWRNORM"),
    bit(0x200, "EPOLLWRBAND"),
    bit(0x400, "EPOLLMSG"),
    bit(0x2000, "EPOLLRDHUP"),
    bit(1 << 28, "EPOLLEXCLUSIVE"),
    bit(1 << 29, "EPOLLWAKEUP"),
    bit(1 << 30, "EPOLLONESHOT"),
    bit(1 << 31, "EPOLLET"),
];

/// linux/inotify.h
pub(super) const INOTIFY: &[Bits] = &[
    bit(1, "IN_ACCESS"),
    bit(2, "IN_MODIFY"),
    bit(4, "IN_ATTRIB"),
    bit(8, "IN_CLOSE_WRITE"),
    bit(0x10, "IN_CLOSE_NOWRITE"),
    bit(0x20, "IN_OPEN"),
    bit(0x40, "IN_MOVED_FROM"),
    bit(0x80, "IN_MOVED_TO"),
    bit(0x100, "IN_CREATE"),
    bit(0x200, "IN_DELETE"),
    bit(0x400, "IN_DELETE_SELF"),
    bit(0x800, "IN_MOVE_SELF"),
    bit(0x2000, "IN_UNMOUNT"),
    bit(0x4000, "IN_Q_OVERFLOW"),
    bit(0x8000, "IN_IGNORED"),
    bit(0x0400_0000, "IN_EXCL_UNLINK"),
    bit(0x4000_0000, "IN_ISDIR"),
    bit(0x8000_0000, "IN_ONESHOT"),
];

/// linux/fanotify.h
pub(super) const FANOTIFY: &[Bits] = &[
    bit(1, "FAN_ACCESS"),
    bit(2, "FAN_MODIFY"),
    bit(4, "FAN_ATTRIB"),
    bit(8, "FAN_CLOSE_WRITE"),
    bit(0x10, "FAN_CLOSE_NOWRITE"),
    bit(0x20, "FAN_OPEN"),
    bit(0x40, "FAN_MOVED_FROM"),
    bit(0x80, "FAN_MOVED_TO"),
    bit(0x100, "FAN_CREATE"),
    bit(0x200, "FAN_DELETE"),
    bit(0x400, "FAN_DELETE_SELF"),
    bit(0x800, "FAN_MOVE_SELF"),
    bit(0x1000, "FAN_OPEN_EXEC"),
    bit(0x4000, "FAN_Q_OVERFLOW"),
    bit(0x8000, "FAN_FS_ERROR"),
    bit(0x1_0000, "FAN_OPEN_PERM"),
    bit(0x2_0000, "FAN_ACCESS_PERM"),
    bit(0x4_0000, "FAN_OPEN_EXEC_PERM"),
    bit(0x0800_0000, "FAN_EVENT_ON_CHILD"),
    bit(0x1000_0000, "FAN_RENAME"),
    bit(0x4000_0000, "FAN_ONDIR"),
];

/// Which call made a file lock; defined by the image format.
pub(super) const LOCK: &[Bits] =
    &[bit(1, "FL_POSIX"), bit(2, "FL_FLOCK"), bit(4, "FL_OFD"), bit(8, "FL_LEASE")];

/// asm-generic/fcntl.h
pub(super) const OWNER: &[Name] = &[(0, "F_OWNER_TID"), (1, "F_OWNER_PID"), (2, "F_OWNER_PGRP")];

/// linux/socket.h
pub(super) const FAMILY: &[Name] =
    &[(1, "AF_UNIX"), (2, "AF_INET"), (10, "AF_INET6"), (16, "AF_NETLINK"), (17, "AF_PACKET")];

/// linux/net.h
pub(super) const SOCKET: &[Name] = &[
    (1, "SOCK_STREAM"),
    (2, "SOCK_DGRAM"),
    (3, "SOCK_RAW"),
    (4, "SOCK_RDM"),
    (5, "SOCK_SEQPACKET"),
    (6, "SOCK_DCCP"),
    (10, "SOCK_PACKET"),
];

/// net/tcp_states.h
pub(super) const SOCKET_STATE: &[Name] = &[
    (1, "TCP_ESTABLISHED"),
    (2, "TCP_SYN_SENT"),
    (3, "TCP_SYN_RECV"),
    (4, "TCP_FIN_WAIT1"),
    (5, "TCP_FIN_WAIT2"),
    (6, "TCP_TIME_WAIT"),
    (7, "TCP_CLOSE"),
    (8, "TCP_CLOSE_WAIT"),
    (9, "TCP_LAST_ACK"),
    (10, "TCP_LISTEN"),
    (11, "TCP_CLOSING"),
    (12, "TCP_NEW_SYN_RECV"),
];

/// linux/in.h
pub(super) const PROTOCOL: &[Name] = &[
    (0, "IPPROTO_IP"),
    (1, "IPPROTO_ICMP"),
    (6, "IPPROTO_TCP"),
    (17, "IPPROTO_UDP"),
    (58, "IPPROTO_ICMPV6"),
    (136, "IPPROTO_UDPLITE"),
    (255, "IPPROTO_RAW"),
];

/// linux/tcp.h
pub(super) const TCP_OPTIONS: &[Bits] = &[
    bit(1, "TCPI_OPT_TIMESTAMPS"),
    bit(2, "TCPI_OPT_SACK"),
    bit(4, "TCPI_OPT_WSCALE"),
    bit(8, "TCPI_OPT_ECN"),
    bit(0x10, "TCPI_OPT_ECN_SEEN"),
    bit(0x20, "TCPI_OPT_SYN_DATA"),
];

/// linux/socket.h
pub(super) const CONTROL_MESSAGE: &[Name] = &[(1, "SCM_RIGHTS"), (2, "SCM_CREDENTIALS")];

/// linux/mount.h
pub(super) const MOUNT: &[Bits] = &[
    bit(1, "MS_RDONLY"),
    bit(2, "MS_NOSUID"),
    bit(4, "MS_NODEV"),
    bit(8, "MS_NOEXEC"),
    bit(0x10, "MS_SYNCHRONOUS"),
    bit(0x40, "MS_MANDLOCK"),
    bit(0x80, "MS_DIRSYNC"),
    bit(0x100, "MS_NOSYMFOLLOW"),
    bit(0x400, "MS_NOATIME"),
    bit(0x800, "MS_NODIRATIME"),
    bit(0x1000, "MS_BIND"),
    bit(0x2000, "MS_MOVE"),
    bit(0x4000, "MS_REC"),
    bit(0x8000, "MS_SILENT"),
    bit(1 << 16, "MS_POSIXACL"),
    bit(1 << 17, "MS_UNBINDABLE"),
    bit(1 << 18, "MS_PRIVATE"),
    bit(1 << 19, "MS_SLAVE"),
    bit(1 << 20, "MS_SHARED"),
    bit(1 << 21, "MS_RELATIME"),
    bit(1 << 24, "MS_STRICTATIME"),
    bit(1 << 25, "MS_LAZYTIME"),
];

/// linux/if.h
pub(super) const INTERFACE: &[Bits] = &[
    bit(1, "IFF_UP"),
    bit(2, "IFF_BROADCAST"),
    bit(4, "IFF_DEBUG"),
    bit(8, "IFF_LOOPBACK"),
    bit(0x10, "IFF_POINTOPOINT"),
    bit(0x20, "IFF_NOTRAILERS"),
    bit(0x40, "IFF_RUNNING"),
    bit(0x80, "IFF_NOARP"),
    bit(0x100, "IFF_PROMISC"),
    bit(0x200, "IFF_ALLMULTI"),
    bit(0x400, "IFF_MASTER"),
    bit(0x800, "IFF_SLAVE"),
    bit(0x1000, "IFF_MULTICAST"),
    bit(0x2000, "IFF_PORTSEL"),
    bit(0x4000, "IFF_AUTOMEDIA"),
    bit(0x8000, "IFF_DYNAMIC"),
    bit(1 << 16, "IFF_LOWER_UP"),
    bit(1 << 17, "IFF_DORMANT"),
    bit(1 << 18, "IFF_ECHO"),
];

/// linux/netlink.h
pub(super) const NETLINK: &[Name] = &[
    (0, "NETLINK_ROUTE"),
    (4, "NETLINK_SOCK_DIAG"),
    (6, "NETLINK_XFRM"),
    (7, "NETLINK_SELINUX"),
    (9, "NETLINK_AUDIT"),
    (10, "NETLINK_FIB_LOOKUP"),
    (11, "NETLINK_CONNECTOR"),
    (12, "NETLINK_NETFILTER"),
    (15, "NETLINK_KOBJECT_UEVENT"),
    (16, "NETLINK_GENERIC"),
    (21, "NETLINK_CRYPTO"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_spelled_out_and_none_is_lost() {
        let cases: [(u64, &[Bits], &str); 9] = [
            (3, PROT, "PROT_READ | PROT_WRITE"),
            (0, PROT, "PROT_NONE"),
            (0x22, MAP, "MAP_PRIVATE | MAP_ANONYMOUS"),
            (3, MAP, "MAP_SHARED_VALIDATE"),
            (0x8000_0000_0022, MAP, "MAP_PRIVATE | MAP_ANONYMOUS | 0x800000000000"),
            (0, OPEN, "O_RDONLY"),
            (0o4_110_002, OPEN, "O_RDWR | O_SYNC | O_LARGEFILE"),
            (0o10_003, OPEN, "O_DSYNC | 0x3"),
            (0, PAGEMAP, "0x0"),
        ];
        for (value, names, spelled) in cases {
            assert_eq!(spell(value, names), spelled);
        }
    }

    #[test]
    fn signals_have_the_names_that_kill_gives_them() {
        assert_eq!(signal(0), None);
        assert_eq!(signal(1).unwrap(), "SIGHUP");
        assert_eq!(signal(31).unwrap(), "SIGSYS");
        assert_eq!(signal(33).unwrap(), "SIG33");
        assert_eq!(signal(34).unwrap(), "SIGRTMIN");
        assert_eq!(signal(64).unwrap(), "SIGRTMIN+30");
        assert_eq!(signal(65), None);
    }
}
