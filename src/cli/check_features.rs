//! `rcriu check`: the features of this kernel, and the cost of each that is missing.

use std::{env, fs, io::Write};

use anyhow::bail;

use crate::sys::{self, Features, features::named};

/// Selects the features to check.
#[derive(Debug, Default)]
pub(super) struct Wanted {
    /// Features that only some trees need.
    pub extra: bool,
    /// Features that make rcriu faster.
    pub experimental: bool,
    /// These only, by CRIU's names or ours; `list` lists them.
    pub names: Vec<String>,
}

/// What needs a feature.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Need {
    /// Every dump and restore.
    Always,
    /// Some trees, or some users.
    Sometimes,
    /// Nothing; it saves time or space.
    Speed,
    /// Nothing: rcriu lacks what CRIU does with it, or does without it. Only those who name it are told.
    Named,
}

/// A feature.
struct Row {
    /// Our name, followed by CRIU's if there is one.
    names: &'static [&'static str],
    need: Need,
    has: fn(&Features) -> bool,
    /// What rcriu cannot do without it.
    cost: &'static str,
}

use Need::{Always, Named, Sometimes, Speed};

const ROWS: &[Row] = &[
    row(&["ptrace_seize"], Always, |f| f.ptrace_seize, "no process can be stopped for a dump"),
    row(&["ptrace_signals"], Always, |f| f.ptrace_signals, "pending signals can't be dumped"),
    row(&["pidfd_getfd", "pidfd_store"], Always, |f| f.pidfd_getfd, "open files can't be dumped"),
    row(&["kcmp"], Always, |f| f.kcmp, "shared open files can't be told from separate ones"),
    row(
        &["process_vm_readv"],
        Always,
        |f| f.process_vm_readv,
        "processes can't be made to tell their state, nor can memory be restored",
    ),
    row(&["proc_mem"], Always, |f| f.proc_mem, "memory can't be dumped"),
    row(
        &["map_files"],
        Always,
        |f| f.map_files,
        "mapped files that were deleted, and shared memory, can't be dumped; \
         it takes CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN",
    ),
    row(
        &["proc_children"],
        Always,
        |f| f.proc_children,
        "the children of a process can't be found (CONFIG_PROC_CHILDREN)",
    ),
    row(&["mnt_id"], Always, |f| f.fdinfo_mnt_id, "the mount of a file can't be found"),
    row(&["memfd"], Always, |f| f.memfd, "shared memory can't be restored"),
    row(&["mm_map"], Always, |f| f.mm_map, "command line and heap can't be restored in place"),
    row(
        &["set_tid", "clone3_set_tid"],
        Always,
        |f| f.clone3_set_tid,
        "processes can't be restored with their pids; \
         it takes CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN",
    ),
    row(&["sock_diag_unix"], Always, |f| f.sock_diag_unix, "unix sockets can't be dumped"),
    row(
        &["sock_diag_inet"],
        Always,
        |f| f.sock_diag_inet,
        "TCP and UDP sockets can't be told from established connections",
    ),
    row(
        &["rseq_configuration", "get_rseq_conf"],
        Always,
        |f| f.rseq_configuration,
        "a program of a recent C library loses its restartable sequences",
    ),
    row(
        &["kcmp_epoll"],
        Sometimes,
        |f| f.kcmp_epoll,
        "an epoll can't be dumped whose descriptors were closed or reused",
    ),
    row(
        &["timer_cr_ids"],
        Sometimes,
        |f| f.timer_restore_ids,
        "POSIX timers with high numbers take long to restore",
    ),
    row(
        &["cap_checkpoint_restore"],
        Sometimes,
        |f| f.cap_checkpoint_restore,
        "only processes of one's own user, without deleted files, and with new pids",
    ),
    row(
        &["cap_sys_ptrace"],
        Sometimes,
        |f| f.cap_sys_ptrace,
        "processes of other users can't be dumped",
    ),
    row(
        &["cap_sys_resource"],
        Sometimes,
        |f| f.cap_sys_resource,
        "limits above one's own can't be restored",
    ),
    row(
        &["openat2"],
        Sometimes,
        |f| f.openat2,
        "trees with a root directory of their own can't be restored",
    ),
    row(
        &["seccomp_suspend", "seccomp_filters"],
        Sometimes,
        |f| f.seccomp_suspend,
        "processes with seccomp filters can't be dumped; this needs CAP_SYS_ADMIN, and an \
         rcriu without a filter of its own",
    ),
    row(
        &["kernel_memory"],
        Sometimes,
        |f| f.kernel_memory,
        "POSIX message queues, and UNIX connections with data that wait to be accepted, can't be \
         dumped; this needs CAP_BPF, CAP_PERFMON and CONFIG_DEBUG_INFO_BTF",
    ),
    row(&["timens"], Sometimes, |f| f.time_namespaces, "no trees with a time namespace"),
    row(&["aio_remap"], Sometimes, |_| named::aio_remap(), "AIO contexts can't be restored"),
    row(&["timerfd"], Sometimes, |_| named::timerfd(), "timerfds can't be dumped"),
    row(&["fdinfo_lock"], Sometimes, |_| named::fdinfo_lock(), "file locks can't be dumped"),
    row(
        &["memfd_hugetlb"],
        Sometimes,
        |_| named::memfd_hugetlb(),
        "shared memory of huge pages can't be restored",
    ),
    row(
        &["can_map_vdso"],
        Sometimes,
        |_| named::can_map_vdso(),
        "processes can't be restored whose vDSO is not where a new one has it",
    ),
    row(
        &["sk_unix_file"],
        Sometimes,
        |_| named::unix_file(),
        "UNIX sockets whose files were renamed can't be dumped",
    ),
    row(
        &["sk_ns"],
        Sometimes,
        |_| named::socket_namespace(),
        "sockets of other network namespaces can't be recognized; it takes CAP_NET_ADMIN",
    ),
    row(
        &["sockopt_buf_lock"],
        Sometimes,
        |_| named::buffer_lock(),
        "restored sockets no longer adapt the sizes of their buffers",
    ),
    row(
        &["ipv6_freebind"],
        Sometimes,
        |_| named::ipv6_freebind(),
        "IPv6 sockets with addresses that are not there can't be restored",
    ),
    row(&["net_diag_raw"], Sometimes, |_| named::raw_sockets(), "raw sockets can't be dumped"),
    row(
        &["tcp_half_closed"],
        Sometimes,
        |_| named::half_closed(),
        "half-closed TCP connections can't be dumped; this needs CAP_NET_ADMIN and CAP_NET_RAW",
    ),
    row(
        &["nftables", "network_lock_nftables"],
        Sometimes,
        |_| named::nftables(),
        "packets of TCP connections can't be held back without --network-lock=iptables; this needs \
         CAP_NET_ADMIN and CONFIG_NF_TABLES",
    ),
    row(
        &["nsid"],
        Sometimes,
        |_| named::namespace_numbers(),
        "devices that lead to another network namespace can't be dumped",
    ),
    row(
        &["move_mount_set_group"],
        Sometimes,
        |_| named::mount_groups(),
        "mounts that share what is mounted below them can't be restored",
    ),
    row(&["ns_pid"], Sometimes, |_| named::pids_in_namespaces(), "no trees with a pid namespace"),
    row(
        &["loginuid"],
        Sometimes,
        |_| fs::metadata("/proc/self/loginuid").is_ok(),
        "login ids can't be restored (CONFIG_AUDIT)",
    ),
    row(&["userns"], Sometimes, |f| f.user_namespaces, "no trees with a user namespace"),
    row(&["cgroupns"], Sometimes, |f| f.cgroup_namespaces, "no trees with a cgroup namespace"),
    row(&["fuse"], Sometimes, |f| f.fuse, "imgfs can't mount a chain; restore from it directly"),
    row(
        &["mem_dirty_track"],
        Speed,
        |f| f.soft_dirty || f.write_protect_private,
        "changes can't be tracked; every dump reads all memory and compares it",
    ),
    row(
        &["uffd", "uffd-noncoop"],
        Speed,
        |f| f.userfaultfd,
        "changes can't be tracked by write protection",
    ),
    row(
        &["pagemap_scan"],
        Speed,
        |f| f.pagemap_scan,
        "pages are found one by one, which is slow in large sparse memory",
    ),
    row(
        &["uffd_wp_async"],
        Speed,
        |f| f.write_protect_private,
        "changes of private memory are tracked by soft-dirty bits, or not at all",
    ),
    row(
        &["uffd_wp_async_shmem"],
        Speed,
        |f| f.write_protect_shared,
        "all shared memory is compared in each dump",
    ),
    row(
        &["tracepoints"],
        Speed,
        |f| f.tracepoints,
        "shared memory is not tracked, and is compared in each dump; it takes CAP_PERFMON, and \
         tracefs (CAP_SYS_ADMIN, unless it is mounted)",
    ),
    row(
        &["fanotify"],
        Speed,
        |f| f.openings,
        "shared memory is not tracked, and is compared in each dump; it takes CAP_SYS_ADMIN and \
         Linux 5.19",
    ),
    row(
        &["all_processes"],
        Speed,
        |f| f.all_processes,
        "shared memory is not tracked, and is compared in each dump; it takes the first pid \
         namespace and CAP_SYS_PTRACE",
    ),
    row(
        &["soft_dirty"],
        Speed,
        |f| f.soft_dirty,
        "changes are tracked by userfaultfd, or not at all (CONFIG_MEM_SOFT_DIRTY)",
    ),
    row(
        &["fuse_passthrough"],
        Speed,
        |f| f.fuse_passthrough,
        "images of a mount that are one file are read through imgfs, which is slower",
    ),
    row(
        &["pagemap_scan_guard_pages"],
        Named,
        |_| named::scan_of_guards(),
        "guard pages are found one by one",
    ),
    // rcriu does these on every kernel that it supports.
    row(&["overlayfs_maps"], Named, |f| f.map_files, "mapped files of an overlay can't be found"),
    row(&["external_net_ns"], Named, |_| true, ""),
    row(&["newifindex"], Named, |_| true, ""),
    // CRIU stops threads by debug registers; rcriu does not.
    row(&["breakpoints"], Named, |f| f.ptrace_seize, "no process can be stopped for a dump"),
    row(
        &["link_nsid"],
        Named,
        |_| named::devices_of_others(),
        "the kernel is older than Linux 4.16",
    ),
    row(
        &["has_ipt_legacy"],
        Named,
        |_| has_program("iptables-legacy-save"),
        "rules of iptables can be dumped only if iptables-save is that of iptables-legacy",
    ),
    row(
        &["tun", "tun_ns"],
        Named,
        |_| sys::tun::is_there(),
        "trees with network devices of their own cannot be dumped",
    ),
    row(&["autofs"], Named, |_| false, "rcriu refuses automounts"),
    row(&["compat_cr"], Named, |_| false, "rcriu refuses 32-bit programs"),
    row(&["apparmor_stacking"], Named, |_| false, "rcriu restores no security profiles"),
];

const fn row(
    names: &'static [&'static str],
    need: Need,
    has: fn(&Features) -> bool,
    cost: &'static str,
) -> Row {
    Row { names, need, has, cost }
}

/// Whether a program is in the search path.
fn has_program(name: &str) -> bool {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path).any(|dir| dir.join(name).is_file())
}

/// Prints which features are present and which are missing; false if a required one is
/// missing.
///
/// # Errors
/// An unknown name; a failed write of the output.
pub(super) fn run(wanted: &Wanted, out: &mut dyn Write) -> anyhow::Result<bool> {
    if wanted.names.iter().any(|name| name == "list") {
        let names: Vec<&str> = ROWS.iter().flat_map(|row| row.names).copied().collect();
        writeln!(out, "{}", names.join(" "))?;
        return Ok(true);
    }
    // Unknown names are reported before any feature is probed.
    let rows = wanted.rows()?;
    wanted.print(&rows, &Features::probe(), out)
}

impl Wanted {
    /// Returns the selected features: all of them unless some are named.
    fn rows(&self) -> anyhow::Result<Vec<&'static Row>> {
        if self.names.is_empty() {
            return Ok(ROWS.iter().filter(|row| row.need != Named).collect());
        }
        let find = |name: &String| match ROWS.iter().find(|row| row.names.contains(&name.as_str()))
        {
            Some(row) => Ok(row),
            None => bail!("{name} is not a feature that is checked; --feature list names them"),
        };
        self.names.iter().map(find).collect()
    }

    /// Whether a missing feature of this kind makes the check fail.
    fn is_required(&self, need: Need) -> bool {
        !self.names.is_empty()
            || match need {
                Always => true,
                Sometimes => self.extra,
                Speed => self.experimental,
                Named => false,
            }
    }

    fn print(
        &self,
        rows: &[&Row],
        features: &Features,
        out: &mut dyn Write,
    ) -> anyhow::Result<bool> {
        let width = rows.iter().map(|row| row.names[0].len()).max().unwrap_or(0);
        let mut missing = Vec::new();
        for row in rows {
            let name = row.names[0];
            let has = (row.has)(features);
            log::debug!("{name} is {}", if has { "there" } else { "missing" });
            if has {
                writeln!(out, "ok       {name}")?;
                continue;
            }
            let required = self.is_required(row.need);
            let state = if required { "missing" } else { "optional" };
            writeln!(out, "{state:8} {name:width$}  {}", row.cost)?;
            if required {
                missing.push(name);
            }
        }
        if missing.is_empty() {
            writeln!(out, "Looks good.")?;
        } else {
            writeln!(out, "Does not look good: {} missing.", missing.join(", "))?;
        }
        Ok(missing.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn printed(wanted: &Wanted, features: &Features) -> (bool, Vec<String>) {
        let mut out = Vec::new();
        let yes = wanted.print(&wanted.rows().unwrap(), features, &mut out).unwrap();
        (yes, String::from_utf8(out).unwrap().lines().map(str::to_owned).collect())
    }

    fn named(names: &[&str]) -> Wanted {
        Wanted { names: names.iter().map(ToString::to_string).collect(), ..Wanted::default() }
    }

    #[test]
    fn the_last_line_says_what_is_missing() {
        let (yes, lines) = printed(&Wanted::default(), &Features::default());
        assert!(!yes);
        let listed = ROWS.iter().filter(|row| row.need != Named).count();
        assert_eq!(lines.len(), listed + 1);
        let last = lines.last().unwrap();
        assert!(last.starts_with("Does not look good: ptrace_seize, "), "{last}");
        assert!(!last.contains("soft_dirty"), "{last}");

        let features = Features { memfd: true, ..Features::default() };
        assert_eq!(
            printed(&named(&["memfd"]), &features),
            (true, vec!["ok       memfd".to_owned(), "Looks good.".to_owned()])
        );
        assert!(!printed(&named(&["memfd", "soft_dirty"]), &features).0);
    }

    #[test]
    fn a_missing_optional_feature_fails_only_the_check_that_asks_for_it() {
        let features = Features { soft_dirty: false, ..Features::probe() };
        let rows: Vec<&Row> = ROWS.iter().filter(|row| row.names[0] == "soft_dirty").collect();
        let print = |wanted: Wanted| wanted.print(&rows, &features, &mut Vec::new()).unwrap();
        assert!(print(Wanted::default()));
        let (_, lines) = printed(&named(&["memfd"]), &Features::default());
        assert!(lines[0].starts_with("missing  memfd "), "{lines:?}");
        assert!(print(Wanted { extra: true, ..Wanted::default() }));
        assert!(!print(Wanted { experimental: true, ..Wanted::default() }));
    }

    #[test]
    fn features_have_the_names_of_criu() {
        // All that `criu check --help` of 4.2 lists.
        const OF_CRIU: &str = "mnt_id mem_dirty_track aio_remap timerfd tun tun_ns userns fdinfo_lock \
            seccomp_suspend seccomp_filters loginuid cgroupns autofs tcp_half_closed compat_cr uffd \
            uffd-noncoop can_map_vdso sk_ns sk_unix_file net_diag_raw nsid link_nsid kcmp_epoll timens \
            external_net_ns clone3_set_tid newifindex nftables has_ipt_legacy pidfd_store ns_pid \
            apparmor_stacking network_lock_nftables sockopt_buf_lock memfd_hugetlb move_mount_set_group \
            openat2 get_rseq_conf ipv6_freebind pagemap_scan timer_cr_ids overlayfs_maps breakpoints \
            pagemap_scan_guard_pages";
        let features = Features::probe();
        for name in OF_CRIU.split_whitespace() {
            let (has, lines) = printed(&named(&[name]), &features);
            assert_eq!(lines.last().unwrap() == "Looks good.", has, "{name}: {lines:?}");
            assert_eq!(named(&[name]).rows().unwrap().len(), 1, "{name}");
        }
        let error = named(&["bogus"]).rows().err().unwrap().to_string();
        assert_eq!(error, "bogus is not a feature that is checked; --feature list names them");
    }
}
