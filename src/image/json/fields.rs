//! How [`Style::Pretty`](super::Style::Pretty) shows fields whose plain numbers would be
//! hard to read.

use std::{
    collections::HashMap,
    net::{Ipv4Addr, Ipv6Addr},
    sync::LazyLock,
};

use serde_json::Value as Json;

use super::names::{self, Bits, Name};
use crate::image::proto;

/// How a field is shown.
#[derive(Clone, Copy, Debug)]
pub(super) enum Show {
    /// Hexadecimal, such as addresses and masks.
    Hex,
    /// Octal, such as file modes.
    Octal,
    /// Names of the bits.
    Bits(&'static [Bits]),
    /// The name of the value, or the number.
    Name(&'static [Name]),
    /// The name of the value, or an address.
    NameOrAddress(&'static [Name]),
    /// The name in an enum that the field should have been declared as.
    Enum(&'static str),
    /// The name of a signal.
    Signal,
    /// A set of signals; bit 0 is signal 1.
    Signals,
    /// A device number in the kernel's internal form: 20 bits of minor number.
    KernelDevice,
    /// A device number in the form of `stat(2)`.
    StatDevice,
    /// An internet address: one or four words in network order.
    Internet,
    /// Bytes that are mostly text, such as the name of a socket.
    Text,
    /// A hardware address.
    Hardware,
}

/// Matches all fields of a message.
const ANY: &str = "*";

static FIELDS: &[(&str, &[(&str, Show)])] = {
    use Show::*;
    &[
        ("aio_ring_entry", &[("id", Hex)]),
        ("bpfmap_file_entry", &[("flags", Bits(names::OPEN)), ("map_flags", Hex)]),
        ("cgroup_perms", &[("mode", Octal)]),
        ("cpuinfo_ppc64_entry", &[("hwcap", Hex)]),
        ("cpuinfo_s390_entry", &[("hwcap", Hex)]),
        ("cpuinfo_x86_entry", &[("capability", Hex), ("xfeatures_mask", Hex)]),
        (
            "creds_entry",
            &[
                ("cap_inh", Hex),
                ("cap_prm", Hex),
                ("cap_eff", Hex),
                ("cap_bnd", Hex),
                ("cap_amb", Hex),
                ("secbits", Bits(names::SECUREBITS)),
            ],
        ),
        ("eventfd_file_entry", &[("flags", Bits(names::OPEN))]),
        ("eventpoll_file_entry", &[("flags", Bits(names::OPEN))]),
        (
            "eventpoll_tfd_entry",
            &[("events", Bits(names::EPOLL)), ("data", Hex), ("dev", KernelDevice)],
        ),
        (
            "fanotify_file_entry",
            &[("flags", Bits(names::OPEN)), ("faflags", Hex), ("evflags", Bits(names::OPEN))],
        ),
        (
            "fanotify_mark_entry",
            &[
                ("mflags", Hex),
                ("mask", Bits(names::FANOTIFY)),
                ("ignored_mask", Bits(names::FANOTIFY)),
                ("s_dev", KernelDevice),
            ],
        ),
        ("fdinfo_entry", &[("flags", Bits(names::FD))]),
        ("fh_entry", &[("handle", Hex)]),
        ("file_lock_entry", &[("flag", Bits(names::LOCK))]),
        ("file_perms_entry", &[("mode", Octal)]),
        ("fown_entry", &[("signum", Signal), ("pid_type", Name(names::OWNER))]),
        ("fs_entry", &[("umask", Octal)]),
        ("ghost_file_entry", &[("mode", Octal), ("dev", KernelDevice), ("rdev", StatDevice)]),
        (
            "inet_sk_entry",
            &[
                ("family", Name(names::FAMILY)),
                ("type", Name(names::SOCKET)),
                ("proto", Name(names::PROTOCOL)),
                ("state", Name(names::SOCKET_STATE)),
                ("flags", Bits(names::OPEN)),
                ("src_addr", Internet),
                ("dst_addr", Internet),
            ],
        ),
        ("inotify_file_entry", &[("flags", Bits(names::OPEN))]),
        (
            "inotify_wd_entry",
            &[
                ("mask", Bits(names::INOTIFY)),
                ("ignored_mask", Bits(names::INOTIFY)),
                ("s_dev", KernelDevice),
            ],
        ),
        ("inventory_entry", &[("pre_dump_mode", Enum("criu.criu_pre_dump_mode"))]),
        ("ipc_desc_entry", &[("key", Hex), ("mode", Octal)]),
        ("ipc_shm_entry", &[("hugetlb_flag", Hex)]),
        ("irmap_cache_entry", &[("dev", StatDevice)]),
        ("memfd_file_entry", &[("flags", Bits(names::OPEN))]),
        (
            "memfd_inode_entry",
            &[("seals", Bits(names::SEALS)), ("hugetlb_flag", Hex), ("mode", Octal)],
        ),
        (
            "mm_entry",
            &[
                ("mm_start_code", Hex),
                ("mm_end_code", Hex),
                ("mm_start_data", Hex),
                ("mm_end_data", Hex),
                ("mm_start_stack", Hex),
                ("mm_start_brk", Hex),
                ("mm_brk", Hex),
                ("mm_arg_start", Hex),
                ("mm_arg_end", Hex),
                ("mm_env_start", Hex),
                ("mm_env_end", Hex),
                ("mm_saved_auxv", Hex),
            ],
        ),
        (
            "mnt_entry",
            &[
                ("fstype", Enum("criu.fstype")),
                ("root_dev", KernelDevice),
                ("flags", Bits(names::MOUNT)),
                ("sb_flags", Bits(names::MOUNT)),
            ],
        ),
        ("net_device_entry", &[("flags", Bits(names::INTERFACE)), ("address", Hardware)]),
        ("netlink_sk_entry", &[("protocol", Name(names::NETLINK)), ("flags", Bits(names::OPEN))]),
        ("ns_file_entry", &[("ns_cflag", Bits(names::NAMESPACES)), ("flags", Bits(names::OPEN))]),
        ("packet_mclist", &[("addr", Hardware)]),
        (
            "packet_sock_entry",
            &[("type", Name(names::SOCKET)), ("protocol", Hex), ("flags", Bits(names::OPEN))],
        ),
        ("pagemap_entry", &[("vaddr", Hex), ("flags", Bits(names::PAGEMAP))]),
        ("pidfd_entry", &[("flags", Bits(names::OPEN))]),
        ("pipe_entry", &[("flags", Bits(names::OPEN))]),
        (
            "posix_timer_entry",
            &[
                ("clock_id", Name(names::CLOCK)),
                ("si_signo", Signal),
                ("it_sigev_notify", Name(names::SIGEV)),
                ("sival_ptr", Hex),
            ],
        ),
        (
            "reg_file_entry",
            &[("flags", Bits(names::OPEN)), ("mode", Octal), ("build_id", Hex), ("checksum", Hex)],
        ),
        ("rlimit_entry", &[("cur", Name(names::RLIMIT)), ("max", Name(names::RLIMIT))]),
        ("rseq_entry", &[("rseq_abi_pointer", Hex), ("signature", Hex), ("rseq_cs_pointer", Hex)]),
        (
            "sa_entry",
            &[
                ("sigaction", NameOrAddress(names::HANDLERS)),
                ("flags", Bits(names::SIGACTION)),
                ("restorer", Hex),
                ("mask", Signals),
                ("mask_extended", Hex),
            ],
        ),
        ("scm_entry", &[("type", Name(names::CONTROL_MESSAGE))]),
        ("seccomp_filter", &[("flags", Hex)]),
        ("signalfd_entry", &[("flags", Bits(names::OPEN)), ("sigmask", Signals)]),
        (
            "sit_entry",
            &[
                ("local", Internet),
                ("remote", Internet),
                ("rd_prefix", Internet),
                ("relay_prefix", Internet),
            ],
        ),
        ("sk_opts_entry", &[("so_mark", Hex), ("so_filter", Hex)]),
        (
            "task_core_entry",
            &[
                ("task_state", Name(names::TASK_STATE)),
                ("personality", Hex),
                ("flags", Hex),
                ("blk_sigset", Signals),
                ("blk_sigset_extended", Hex),
                ("stop_signo", Signal),
                ("membarrier_registration_mask", Hex),
            ],
        ),
        ("tcp_stream_entry", &[("opt_mask", Bits(names::TCP_OPTIONS))]),
        (
            "termios_entry",
            &[("c_iflag", Octal), ("c_oflag", Octal), ("c_cflag", Octal), ("c_lflag", Octal)],
        ),
        (
            "thread_core_entry",
            &[
                ("futex_rla", Hex),
                ("sched_policy", Name(names::SCHED)),
                ("blk_sigset", Signals),
                ("blk_sigset_extended", Hex),
                ("pdeath_sig", Signal),
            ],
        ),
        ("thread_info_aarch64", &[("clear_tid_addr", Hex)]),
        ("thread_info_x86", &[(ANY, Hex)]),
        ("thread_sas_entry", &[("ss_sp", Hex), ("ss_flags", Bits(names::SIGNAL_STACK))]),
        (
            "timerfd_entry",
            &[
                ("flags", Bits(names::OPEN)),
                ("clockid", Name(names::CLOCK)),
                ("settime_flags", Bits(names::TIMERFD)),
            ],
        ),
        ("tty_file_entry", &[("flags", Bits(names::OPEN))]),
        ("tty_info_entry", &[("rdev", StatDevice), ("dev", StatDevice)]),
        ("tun_link_entry", &[("flags", Hex)]),
        (
            "unix_sk_entry",
            &[
                ("type", Name(names::SOCKET)),
                ("state", Name(names::SOCKET_STATE)),
                ("flags", Bits(names::OPEN)),
                ("uflags", Hex),
                ("name", Text),
            ],
        ),
        ("user_desc_t", &[("base_addr", Hex), ("limit", Hex)]),
        ("user_aarch64_regs_entry", &[(ANY, Hex)]),
        ("user_x86_cet_entry", &[(ANY, Hex)]),
        ("user_x86_fpregs_entry", &[(ANY, Hex)]),
        ("user_x86_regs_entry", &[(ANY, Hex)]),
        ("user_x86_xsave_entry", &[(ANY, Hex)]),
        (
            "vma_entry",
            &[
                ("start", Hex),
                ("end", Hex),
                ("pgoff", Hex),
                ("prot", Bits(names::PROT)),
                ("flags", Bits(names::MAP)),
                ("status", Bits(names::VMA_STATUS)),
                ("madv", Bits(names::MADV)),
                ("fdflags", Bits(names::OPEN)),
            ],
        ),
    ]
};

/// Returns how a field is shown; `None` for the default.
pub(super) fn show(message: &str, field: &str) -> Option<Show> {
    type Table = HashMap<&'static str, HashMap<&'static str, Show>>;
    static TABLE: LazyLock<Table> = LazyLock::new(|| {
        let fields = |row: &[(&'static str, Show)]| row.iter().copied().collect();
        FIELDS.iter().map(|(message, row)| (*message, fields(row))).collect()
    });
    let fields = TABLE.get(message)?;
    fields.get(field).or_else(|| fields.get(ANY)).copied()
}

impl Show {
    /// Shows a number.
    pub(super) fn number(self, value: u64) -> Json {
        let text = match self {
            Self::Hex => Some(format!("{value:#x}")),
            Self::Octal if value == 0 => Some("0".to_owned()),
            Self::Octal => Some(format!("0{value:o}")),
            Self::Bits(names) => Some(names::spell(value, names)),
            Self::Name(names) => find(names, value),
            Self::NameOrAddress(names) => {
                find(names, value).or_else(|| Some(format!("{value:#x}")))
            }
            Self::Enum(name) => enum_name(name, value),
            Self::Signal => names::signal(value),
            Self::Signals => Some(signals(value)),
            Self::KernelDevice => Some(format!("{}:{}", value >> 20, value & 0xf_ffff)),
            // As `new_decode_dev()` in linux/kdev_t.h.
            Self::StatDevice => {
                let minor = value & 0xff | value >> 12 & 0xf_ff00;
                Some(format!("{}:{minor}", value >> 8 & 0xfff))
            }
            Self::Internet | Self::Text | Self::Hardware => None,
        };
        text.map_or_else(|| value.into(), Json::from)
    }

    /// Shows a list of numbers as one value, if possible.
    pub(super) fn numbers(self, values: &[u32]) -> Option<Json> {
        let Self::Internet = self else { return None };
        let octets = |number: u32| number.to_le_bytes();
        match *values {
            [address] => Some(Ipv4Addr::from(octets(address)).to_string().into()),
            [a, b, c, d] => {
                let mut address = [0; 16];
                for (to, number) in address.chunks_mut(4).zip([a, b, c, d]) {
                    to.copy_from_slice(&octets(number));
                }
                Some(Ipv6Addr::from(address).to_string().into())
            }
            _ => None,
        }
    }

    /// Shows bytes in a form other than base64, if there is one.
    pub(super) fn bytes(self, bytes: &[u8]) -> Option<Json> {
        match self {
            Self::Text => std::str::from_utf8(bytes).ok().map(Json::from),
            Self::Hardware => {
                let pairs: Vec<_> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
                Some(pairs.join(":").into())
            }
            _ => None,
        }
    }
}

fn find(names: &[Name], value: u64) -> Option<String> {
    names.iter().find(|name| name.0 == value).map(|name| name.1.to_owned())
}

fn enum_name(name: &str, value: u64) -> Option<String> {
    let values = proto::pool().get_enum_by_name(name)?;
    let value = values.get_value(i32::try_from(value).ok()?)?;
    Some(value.name().to_owned())
}

/// Lists the signals of a set; bit 0 is signal 1.
fn signals(set: u64) -> String {
    let members: Vec<_> = (1..=names::SIGNAL_MAX)
        .filter(|number| set >> (number - 1) & 1 == 1)
        .filter_map(names::signal)
        .collect();
    if members.is_empty() { "0x0".to_owned() } else { members.join(" | ") }
}

#[cfg(test)]
mod tests {
    use prost_reflect::Kind;

    use super::*;

    #[test]
    fn the_table_names_fields_that_exist_and_fit() {
        for (message, fields) in FIELDS {
            let descriptor = proto::pool().get_message_by_name(&format!("criu.{message}"));
            let descriptor = descriptor.unwrap_or_else(|| panic!("{message}"));
            for (field, show) in fields.iter().filter(|(field, _)| *field != ANY) {
                let field = descriptor.get_field_by_name(field).unwrap_or_else(|| {
                    panic!("{message} has no field {field}");
                });
                let bytes = matches!(show, Show::Text | Show::Hardware);
                assert_eq!(bytes, field.kind() == Kind::Bytes, "{message}.{}", field.name());
                assert!(!matches!(field.kind(), Kind::Enum(_) | Kind::Message(_)));
            }
        }
        let count: usize = FIELDS.iter().map(|(_, fields)| fields.len()).sum();
        let distinct: usize = FIELDS
            .iter()
            .flat_map(|(message, fields)| fields.iter().map(move |(field, _)| (message, field)))
            .collect::<std::collections::HashSet<_>>()
            .len();
        assert_eq!(count, distinct);
    }

    #[test]
    fn numbers_are_shown_as_people_write_them() {
        let cases = [
            (Show::Hex, 0x7f00_0000_1000, "\"0x7f0000001000\""),
            (Show::Octal, 0o100_644, "\"0100644\""),
            (Show::Name(names::CLOCK), 1, "\"CLOCK_MONOTONIC\""),
            (Show::Name(names::CLOCK), 99, "99"),
            (Show::NameOrAddress(names::HANDLERS), 1, "\"SIG_IGN\""),
            (Show::NameOrAddress(names::HANDLERS), 0x4000, "\"0x4000\""),
            (Show::Enum("criu.fstype"), 5, "\"TMPFS\""),
            (Show::Signal, 9, "\"SIGKILL\""),
            (Show::Signal, 0, "0"),
            (Show::Signals, 0x8000_0000_0000_0201, "\"SIGHUP | SIGUSR1 | SIGRTMIN+30\""),
            (Show::Signals, 0, "\"0x0\""),
            (Show::KernelDevice, 0x80_0003, "\"8:3\""),
            (Show::StatDevice, 0x0803, "\"8:3\""),
            (Show::StatDevice, 0x0010_0801, "\"8:257\""),
        ];
        for (show, value, shown) in cases {
            assert_eq!(show.number(value).to_string(), shown);
        }
        let address = |values| Show::Internet.numbers(values).map(|shown| shown.to_string());
        assert_eq!(address(&[0x0100_007f]).unwrap(), "\"127.0.0.1\"");
        assert_eq!(address(&[0, 0, 0, 0x0100_0000]).unwrap(), "\"::1\"");
        assert_eq!(address(&[1, 2]), None);
    }
}
