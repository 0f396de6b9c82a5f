//! Live process trees, one per kind of state: dumped, restored, and asked
//! whether they still have it.
//!
//! Each state is a workload (`tests/workloads`), a program that compares itself
//! after the checkpoint with what it remembers from before. It runs once through
//! a dump that ends it and a restore, and once through a dump that leaves it
//! running. Both times what the kernel shows of it is compared as well.
//!
//! All of it needs root.

mod common;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io::{BufWriter, Read},
    ops::Range,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use common::{
    Cap, data_of,
    live::{Live, bounded, directory, engine, restorer, wait_for, workload},
    mounted::Mounted,
    require, skip,
    untouched::Before,
};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use prost::Message;
use rcriu::image::{ImageWriter, Kind, proto, read_all};

/// States of which only the memory of the kernel shows a part.
const IN_KERNEL_MEMORY: &[&str] = &[
    "message_queues",
    "message_queue_notification",
    "ipc_namespace_queues",
    "aio_in_flight",
    "unix_pending_data",
    "unix_pending_order",
    "unix_pending_closed",
    "unix_pending_packets",
    "unix_pending_credentials",
    "undone_semaphores",
    "undone_semaphores_of_a_namespace",
];

/// Skips a test of a state that this machine does not let rcriu dump.
fn require_for(name: &str) {
    require(Cap::Ptrace);
    if IN_KERNEL_MEMORY.contains(&name) {
        require(Cap::Kernel("kernel_memory (rcriu check)", |f| f.kernel_memory));
    }
}

/// Dumps a state, which ends it, and restores it.
fn restored(name: &str, options: &[&str]) {
    restored_without(name, options, "");
}

/// The same, as on a kernel that does not have something (`rcriu::fault::Novelty`).
fn restored_without(name: &str, options: &[&str], without: &'static str) {
    require_for(name);
    let _numbers = terminal_numbers(name);
    let mut live = Live::workload(name);
    live.without = without;
    let before = live.state();
    live.dump(options);
    live.replace_files();
    live.restore(options);
    let after = live.state_restored(&before);
    live.verdict();
    // What it says of itself tells more, so this comes second.
    before.restored(live.root).assert_unchanged(&after.restored(live.root));
}

/// Dumps a state, which goes on as if nothing had happened.
fn running(name: &str, options: &[&str]) {
    running_without(name, options, "");
}

/// The same, as on a kernel that does not have something.
fn running_without(name: &str, options: &[&str], without: &'static str) {
    require_for(name);
    let _numbers = terminal_numbers(name);
    let mut live = Live::workload(name);
    live.without = without;
    let mut before = Before::of(&mut live);
    if options.contains(&"--link-remap") {
        before = before.but_for_names();
    }
    live.dump_running(options);
    before.assert_untouched(&mut live, "dump -R");
    live.verdict();
}

/// The numbers of pseudoterminals: what is to have its number again has all to itself.
fn terminal_numbers(name: &str) -> Option<MutexGuard<'static, ()>> {
    static NUMBERS: Mutex<()> = Mutex::new(());
    let lock = || NUMBERS.lock().unwrap_or_else(PoisonError::into_inner);
    name.starts_with("pty_").then(lock)
}

/// Two tests for each state.
macro_rules! states {
    ($($name:ident $([$($option:literal),*])? $(, elsewhere: $($how:ident)+)?;)*) => {
        mod privileged_restored {
            $(#[test]
            fn $name() {
                super::restored(stringify!($name), &[$($($option),*)?]);
            })*
        }

        mod privileged_running {
            $(#[test]
            fn $name() {
                super::running(stringify!($name), &[$($($option),*)?]);
            })*
        }

        /// The states that are tested here.
        const NAMES: &[&str] = &[$(stringify!($name)),*];

        /// The tests of states that are run on other kernels as well.
        const ELSEWHERE: &[&str] = &[$($($(
            concat!("privileged_", stringify!($how), "::", stringify!($name))
        ),+,)?)*];
    };
}

// Kernels differ in what they tell, so one state of each kind is tested `elsewhere`, on other
// kernels: restored, left running, or both.
states! {
    private_anon, elsewhere: restored;
    zero_and_holes;
    shared_anon;
    shared_anon_parts, elsewhere: restored;
    shared_file, elsewhere: restored;
    private_file, elsewhere: restored;
    deleted_file_mapping, elsewhere: restored;
    memfd_mapping, elsewhere: restored;
    sysv_shm, elsewhere: restored;
    mlocked, elsewhere: restored;
    madvised, elsewhere: restored;
    prot_none;
    growing_stack, elsewhere: restored;
    brk_heap;
    cow_tree, elsewhere: restored running;
    guard_pages, elsewhere: restored;
    mremapped, elsewhere: restored;
    huge_pages, elsewhere: restored;
    aio_contexts, elsewhere: restored running;
    many_areas;
    droppable;
    vast;
    on_demand;
    on_demand_moved;
    on_demand_forked;
    on_demand_threads;
    rounds, elsewhere: restored;
    vdso, elsewhere: restored;
    threads, elsewhere: restored running;
    thread_names;
    thread_scheduling, elsewhere: restored;
    thread_masks;
    thread_creds, elsewhere: restored;
    robust_mutex, elsewhere: restored;
    clear_tid;
    condition_variable;
    exited_leader;
    exited_leader_of_a_session;
    shared_descriptors;
    shared_directory;
    shared_address_space;
    shared_handlers;
    shared_everything;
    shared_by_siblings;
    registers_general, elsewhere: restored;
    registers_sse;
    registers_avx, elsewhere: restored running;
    registers_avx512;
    registers_x87, elsewhere: restored;
    segment_bases, elsewhere: restored;
    affinity;
    io_priorities;
    timer_slack;
    write_or_execute;
    time_stamp_counter;
    machine_checks;
    memory_policy;
    mapping_policies;
    memory_merging;
    huge_pages_where_asked;
    core_filter;
    futex_hash;
    nice_session;
    reset_on_fork;
    deadline;
    exit_signals;
    sealed;
    locked_later;
    locked_later_on_fault;
    tree;
    sessions, elsewhere: restored;
    dead_session_leader, elsewhere: restored;
    dead_group_leader;
    zombies, elsewhere: restored;
    orphaned_zombies;
    zombies_of_a_session;
    zombies_of_the_heedless;
    zombie_of_a_gone_group;
    stopped_child, elsewhere: restored;
    stops_told_and_untold;
    stopped_root;
    stopped_twice;
    subreaper, elsewhere: restored;
    parent_death_signal;
    chain_of_forks;
    two_hundred;
    other_user, elsewhere: restored running;
    other_user_threads, elsewhere: restored;
    effective_user;
    capabilities;
    ambient_capabilities, elsewhere: restored;
    securebits, elsewhere: restored;
    groups;
    no_new_privs;
    limits, elsewhere: restored;
    directory_and_umask;
    changed_root, elsewhere: restored;
    oom_score, elsewhere: restored;
    personality, elsewhere: restored;
    dumpable, elsewhere: restored;
    thp_disabled, elsewhere: restored;
    changed_arguments, elsewhere: restored;
    memory_layout;
    handlers, elsewhere: restored;
    pending_process;
    pending_thread, elsewhere: restored;
    pending_many;
    signal_mask;
    alternate_stack, elsewhere: restored;
    inside_handler;
    interval_timers, elsewhere: restored;
    interval_timer_idle;
    posix_timers, elsewhere: restored;
    posix_timer_ids, elsewhere: restored running;
    blocked_read, elsewhere: restored;
    blocked_write;
    blocked_futex;
    blocked_futex_timeout, elsewhere: restored;
    blocked_poll;
    blocked_poll_timeout;
    blocked_select;
    blocked_epoll;
    blocked_sleep, elsewhere: restored;
    blocked_sleep_until;
    blocked_wait, elsewhere: restored;
    blocked_sigsuspend, elsewhere: restored;
    blocked_pause;
    blocked_sigwait;
    blocked_accept, elsewhere: restored;
    blocked_receive;
    blocked_eventfd;
    blocked_fifo_open;
    busy_tree;
    no_ignored_signal;
    no_room_for_mappings;
    no_room_nor_signal;
    no_room_for_data;
    no_room_to_lock;
    pending_trap;
    regular_files, elsewhere: restored;
    shared_offsets, elsewhere: restored;
    descriptor_numbers;
    directories;
    devices;
    path_descriptors, elsewhere: restored;
    pipes, elsewhere: restored;
    pipe_across_tasks;
    pipe_packets, elsewhere: restored;
    pipe_packets_of_before;
    pipe_ends_reopened;
    fifo, elsewhere: restored;
    eventfds, elsewhere: restored running;
    memfds, elsewhere: restored;
    deleted_file, elsewhere: restored;
    deleted_linked_file ["--link-remap"], elsewhere: restored;
    deleted_directory;
    renamed_file;
    epoll, elsewhere: running;
    epoll_nested, elsewhere: restored;
    epoll_of_closed, elsewhere: restored;
    timerfds, elsewhere: restored;
    signalfd, elsewhere: restored;
    file_owner, elsewhere: restored;
    many_descriptors;
    proc_files;
    proc_directory;
    epoll_of_mounts;
    unix_queued_files;
    memfd_append;
    shared_anon_reopened;
    fifo_hangups;
    pty_masters;
    pty_hangups;
    pty_lines;
    pty_raw_bytes;
    pty_stopped_output;
    pty_speeds;
    pty_session, elsewhere: restored;
    tmpfile;
    deleted_attributes;
    locks_posix ["--file-locks"], elsewhere: restored running;
    locks_flock ["-l"], elsewhere: restored;
    locks_ofd ["-l"];
    locks_shared_table ["-l"];
    locks_many ["-l"];
    locks_queued ["-l"];
    leases ["-l"], elsewhere: restored;
    lease_breaking ["-l"];
    blocked_locks ["-l"];
    inotify, elsewhere: restored running;
    inotify_deleted;
    inotify_own_files;
    inotify_epoll;
    inotify_many;
    fanotify, elsewhere: restored;
    fanotify_reports;
    unix_stream_pair, elsewhere: restored;
    unix_datagram_pair;
    unix_seqpacket_pair;
    unix_pair_across_tasks;
    unix_shut_pair;
    unix_half_closed_pair;
    unix_queued_descriptors, elsewhere: restored running;
    unix_named, elsewhere: restored;
    unix_abstract;
    unix_accepted_name;
    unix_pending_connection, elsewhere: restored;
    unix_pending_data, elsewhere: restored;
    unix_pending_order, elsewhere: restored;
    unix_pending_closed;
    unix_pending_packets;
    unix_pending_credentials, elsewhere: restored;
    unix_queued_credentials, elsewhere: restored;
    unix_nested_descriptors;
    unix_urgent;
    message_queues, elsewhere: restored running;
    message_queue_notification, elsewhere: restored;
    unix_named_datagram;
    unix_options;
    tcp_listening, elsewhere: restored;
    tcp_unconnected;
    tcp6_listening, elsewhere: restored;
    udp, elsewhere: restored;
    unix_pending_errors;
    unix_reset_before_accept;
    unix_peek_offset;
    socket_options;
    tcp_connections ["--tcp-established"], elsewhere: restored;
    tcp_urgent ["--tcp-established"], elsewhere: restored;
    tcp_urgent_read ["--tcp-established"];
    tcp_urgent_inline ["--tcp-established"];
    tcp_urgent_alone ["--tcp-established"];
    tcp_urgent_unsent ["--tcp-established"];
    tcp_ended;
    tcp_pending_errors, elsewhere: restored;
    tcp_unaccepted ["--tcp-established", "--skip-in-flight"];
    tcp_connecting ["--tcp-established", "--skip-in-flight"];
    tcp_signed ["--tcp-established"];
    tcp_options ["--tcp-established"];
    udp_queued;
    raw_sockets;
    ping_sockets;
    multicast_groups;
    udp_corked;
    netlink_groups;
    packet_sockets;
    locked_filter;
    owners;
    owner_of_a_terminal;
    owner_of_a_shared_port;
    peer_credentials;
    credentials_of_a_pair;
    peer_credentials_of_the_dead;
    uts_namespace;
    uts_namespace_of_a_child;
    uts_namespaces;
    mount_namespace, elsewhere: restored;
    mount_namespace_of_a_child;
    mount_namespaces;
    mount_namespace_below_its_root;
    mount_namespace_sockets;
    mount_namespace_deleted;
    mount_namespace_hidden;
    mount_namespace_of_users, elsewhere: restored;
    time_namespace;
    pid_namespaces;
    pid_namespaces_of_users;
    pid_namespace_members;
    pid_namespace_mounts;
    ipc_namespace;
    ipc_namespace_segments;
    ipc_namespace_queues;
    ipc_namespace_forced;
    ipc_namespaces;
    ipc_namespace_of_a_child;
    cgroup_namespace_of_all;
    network_namespace ["--tcp-established"];
    network_namespace_down;
    network_namespace_of_a_child ["--tcp-established"];
    network_namespaces ["--tcp-established"];
    network_namespaces_connected ["--tcp-established"];
    network_devices;
    network_routes;
    network_settings;
    user_namespace;
    user_namespace_of_root_alone;
    user_namespace_with_threads;
    network_filters;
    network_filters_of_iptables;
    network_outside;
    network_on_top;
    tun_device;
    tap_queues;
    tap_of_nobody;
    seccomp_filters, elsewhere: restored running;
    seccomp_kills, elsewhere: restored running;
    seccomp_kills_returns;
    seccomp_kills_locked_later;
    seccomp_strict, elsewhere: restored;
    seccomp_shared, elsewhere: restored;
    seccomp_of_each_thread;
    seccomp_inherited;
    seccomp_without_privileges;
    seccomp_trap;
    pidfds, elsewhere: restored;
    pidfds_of_the_dead, elsewhere: restored;
    pidfds_of_threads;
    pidfds_watched;
    // Kernels before 6.4 show nothing of it.
    intercepted_system_calls;
    undone_semaphores, elsewhere: restored;
    undone_semaphores_of_a_namespace;
    namespace_descriptors, elsewhere: restored;
}

/// On kernels of before, some of what a dump needs is found in another way.
#[test]
fn privileged_old_kernels_hide_guard_pages() {
    restored_without("guard_pages", &[], "pagemap_scan_guards");
    running_without("guard_pages", &[], "pagemap_scan_guards");
}

#[test]
fn privileged_old_kernels_hide_semaphores() {
    restored_without("eventfds", &[], "eventfd_semaphore");
    running_without("eventfds", &[], "eventfd_semaphore");
}

#[test]
fn privileged_old_kernels_hide_locks_on_fault() {
    restored_without("mlocked", &[], "lock_on_fault");
}

#[test]
fn privileged_old_kernels_give_out_timer_ids_in_turn() {
    restored_without("posix_timer_ids", &[], "timer_cr_ids");
    restored_without("posix_timers", &[], "timer_cr_ids");
}

/// A test for each state of huge pages, which the kernel has to be given memory for.
macro_rules! huge_states {
    ($($name:ident;)*) => {
        mod privileged_huge_pages {
            use super::{Cap, require};

            $(#[test]
            fn $name() {
                require(Cap::HugePages);
                super::restored(stringify!($name), &[]);
                super::running(stringify!($name), &[]);
                super::restored_from_a_mount(stringify!($name), true);
            })*
        }

        const HUGE_NAMES: &[&str] = &[$(stringify!($name)),*];
    };
}

huge_states! {
    hugetlb_private;
    hugetlb_shared;
    hugetlb_memfd;
    hugetlb_sysv;
}

#[test]
fn tests_of_machines_exist() {
    let machines: &[&str] = &["6.1", "6.12"];
    let mut tests: Vec<_> = ELSEWHERE.iter().map(|name| (*name, machines)).collect();
    tests.extend([
        ("privileged_huge_pages::", machines),
        ("privileged_deleted_files_of_huge_pages_are_refused", machines),
        ("privileged_restored_from_a_mount_with_shared_memory", machines),
        ("privileged_shell_job", machines),
        ("privileged_failed_restore_leaves_no_process", machines),
        // What the kernel of this machine may lack.
        ("privileged_a_connection_with_tls_in_the_kernel_is_refused", &["6.12"]),
        // What the processor of this machine may lack.
        ("privileged_memory_with_a_protection_key_is_refused", &["6.12-max"]),
        ("privileged_restored::registers_", &["6.12-max"]),
    ]);
    common::machines::tell(&tests);
}

#[test]
fn every_workload_is_tested() {
    let output = Command::new(workload()).arg("--list").output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let there: BTreeSet<_> = text.lines().collect();
    let lost: Vec<_> = LOST.iter().map(|(name, _)| *name).collect();
    let refused: Vec<_> = REFUSED.iter().map(|(name, _)| *name).collect();
    let tested = [
        NAMES,
        HUGE_NAMES,
        &refused,
        &lost,
        &["udp_pending_error", "protection_keys", "local_descriptors", "aio_in_flight"],
        &["tcp_tls", "tcp_authenticated", "tcp_multipath"],
        // By tests/unpaused.rs.
        &["ordered_writes", "passing_memory"],
    ]
    .concat();
    let tested = tested.into_iter();
    assert_eq!(there, tested.collect());
}

#[test]
fn privileged_memory_shared_by_fork_is_shared_again() {
    require(Cap::Ptrace);
    let mut live = Live::workload("cow_tree");
    let before = live.proportional_kib();
    live.dump(&[]);
    live.restore(&[]);
    let after = live.proportional_kib();
    assert!(after * 100 <= before * 105, "{before} KiB before, {after} KiB after the restore");
    live.verdict();
}

/// Dumps a state twice into a chain, the second time for good, and restores it from
/// a mount of the chain, which nothing can be written to: what the restore writes
/// goes to the directory that `-W` names, or else to the current one.
fn restored_from_a_mount(name: &str, work_dir_given: bool) {
    require(Cap::Ptrace);
    require(Cap::Fuse);
    let mut live = Live::workload(name);
    let before = live.state();
    live.images_name = "chain/1";
    live.dump_running(&[]);
    live.images_name = "chain/2";
    live.dump(&["--prev-images-dir", "../1"]);
    let mounted = Mounted::new(&live.path("chain"), &live.path("mount"), &[]);
    let written = live.path("written");
    fs::create_dir(&written).unwrap();
    let mut restore = Command::new(restorer());
    restore.args(["restore", "-d", "-v4", "-o", "restore.log", "--pidfile", "pid", "-D"]);
    restore.arg(&mounted.point);
    if work_dir_given {
        restore.arg("-W").arg(&written);
    } else {
        restore.current_dir(&written);
    }
    let output = bounded(restore, &live.path("restore.out"));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(fs::read_to_string(written.join("pid")).unwrap(), live.root.to_string());
    for name in ["restore.log", "stats-restore"] {
        assert!(fs::metadata(written.join(name)).unwrap().len() > 0, "{name}");
    }
    // Nothing of what was restored needs the mount any more.
    drop(mounted);
    let after = live.state_restored(&before);
    live.verdict();
    before.restored(live.root).assert_unchanged(&after.restored(live.root));
}

#[test]
fn privileged_restored_from_a_mount_with_shared_memory() {
    restored_from_a_mount("shared_anon", true);
}

#[test]
fn privileged_restored_from_a_mount_with_several_mount_namespaces() {
    restored_from_a_mount("mount_namespaces", true);
}

#[test]
fn privileged_restored_from_a_mount_with_nested_pid_namespaces() {
    restored_from_a_mount("pid_namespace_mounts", true);
}

#[test]
fn privileged_restored_from_a_mount_with_forks() {
    restored_from_a_mount("cow_tree", false);
}

/// Puts the entries of `files.img` into images of one kind each, as old images have them.
fn split_files(images: &Path) {
    let path = images.join(Kind::Files.file_name(0));
    let entries: Vec<proto::FileEntry> = read_all(&path, Kind::Files).unwrap();
    let count = entries.len();
    fs::remove_file(path).unwrap();
    let mut left = entries;
    macro_rules! kinds {
        ($($field:ident $kind:ident),*) => {
            $(
                let these: Vec<_> = left.iter().filter_map(|entry| entry.$field.clone()).collect();
                if !these.is_empty() {
                    write_image(&images.join(Kind::$kind.file_name(0)), Kind::$kind, &these);
                    left.retain(|entry| entry.$field.is_none());
                }
            )*
        };
    }
    kinds!(
        reg RegFiles, pipe Pipes, fifo Fifo, isk Inetsk, usk Unixsk, efd EventfdFile,
        epfd EventpollFile, sgfd Signalfd, tfd Timerfd, tty TtyFiles
    );
    assert!(left.is_empty() && count > 0, "{left:?}");
}

#[test]
fn privileged_images_of_one_kind_each_are_restored() {
    require(Cap::Ptrace);
    for name in
        ["regular_files", "pipes", "fifo", "epoll", "eventfds", "timerfds", "unix_named", "udp"]
    {
        let mut live = Live::workload(name);
        live.dump(&[]);
        split_files(&live.images());
        live.restore(&[]);
        live.verdict();
    }
}

/// A job of a terminal's session, whose leader stays.
#[test]
fn privileged_shell_job() {
    require(Cap::Ptrace);
    let _numbers = terminal_numbers("pty_");
    let mut shell = common::live::Shell::new("terminal");
    let output = shell.job.try_dump(&[]);
    assert!(!output.status.success(), "a job was dumped without --shell-job");
    let before = shell.job.state();
    shell.job.dump(&["--shell-job"]);
    shell.restore();
    let after = shell.job.state_restored(&before);
    shell.job.verdict();
    let root = shell.job.root;
    before.restored(root).assert_unchanged(&after.restored(root));
    wait_for("the job's words on the screen", || {
        fs::read_to_string(shell.path("screen"))
            .is_ok_and(|text| text.contains("after the checkpoint"))
    });
}

/// A state that images cannot hold is refused by name, and nothing changes.
fn refused(name: &str, what: &str) {
    require(Cap::Ptrace);
    let mut live = Live::workload(name);
    refused_with(&mut live, &[], what);
    live.verdict();
}

/// States that are refused, and words of the message.
const REFUSED: &[(&str, &str)] = &[
    ("thread_own_descriptors", "with a descriptor table (CLONE_FILES) of its own"),
    ("thread_own_directory", "with a root, working directory and umask (CLONE_FS) of its own"),
    ("thread_own_undo", "with a list of semaphore operations to be undone (CLONE_SYSVSEM)"),
    ("thread_own_network", "with a network namespace of its own"),
    ("tun_of_the_machine", "which is in the network namespace of rcriu"),
    ("user_namespace_without_a_map", "which its user namespace does not map"),
    ("id_mapped_mount", "with a map of ids of its own"),
    ("child_in_another_cgroup_namespace", "that is not that of process"),
    ("pid_namespace_entered", "is not the first process of a namespace"),
    ("time_namespace_for_children", "has a time namespace for its children"),
    // Looking at packets takes the error that comes first.
    ("unix_packets_behind_an_error", "behind an unread error"),
    (
        "unix_queued_epoll",
        "is an epoll instance that is queued in a socket and watches descriptors",
    ),
    ("unix_queued_pidfd_senders", "asks for the pidfds of senders (SO_PASSPIDFD)"),
    ("message_queue_thread", "which starts a thread of process"),
    ("pty_of_another_devpts", "in another instance of devpts than /dev/pts"),
    ("descriptor_of_another_namespace", "a namespace that no process of the tree is in"),
    ("pidfd_of_another_tree", "is a pidfd of process 1, which is not in the tree"),
    ("seccomp_notifies", "has a seccomp filter that asks another process (SECCOMP_RET_USER_NOTIF)"),
    ("seccomp_listener", "is anon_inode:seccomp notify"),
    ("fanotify_permissions", "decides by fanotify (descriptor"),
    ("udp_held_back", "corked (UDP_CORK), with a datagram that it holds back"),
    ("tcp_unaccepted", "with 1 connection not accepted yet (from 127.0.0.1:"),
    ("aio_ring_of_a_parent", "but not the context, such as a child of its owner"),
    ("caught_system_calls", "has its system calls caught (PR_SET_SYSCALL_USER_DISPATCH)"),
];

#[test]
fn privileged_states_that_no_restore_gives_back_are_refused() {
    for (name, words) in REFUSED {
        refused(name, words);
    }
}

#[test]
fn privileged_aio_requests_in_flight_are_refused_or_warned_of() {
    require_for("aio_in_flight");
    refused("aio_in_flight", "has 1 AIO requests in flight, in the context with the ring at");
    let mut live = Live::workload("aio_in_flight");
    live.without = "kernel_memory";
    let output = live.try_dump(&["-R"]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success() && said.contains("requests in flight, if there are"), "{said}");
    live.verdict();
}

/// States that are lost, and words of the warnings.
const LOST: &[(&str, &[&str])] = &[
    ("keyrings", &["has a thread keyring", "has a process keyring"]),
    (
        "inotify_unread",
        &["is an inotify instance with 2 unread events (2 of /", ".dir): in their place"],
    ),
];

#[test]
fn privileged_states_that_are_lost_are_warned_of() {
    require(Cap::Ptrace);
    for (name, words) in LOST {
        let mut live = Live::workload(name);
        let output = live.try_dump(&["-R"]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{said}");
        for words in *words {
            assert!(said.contains(words), "{name}: {said}");
        }
        live.verdict();
    }
}

/// Events that were not read are lost, and the program is told so, as by the kernel.
#[test]
fn privileged_unread_events_become_an_overflow() {
    require(Cap::Ptrace);
    let mut live = Live::workload("inotify_unread");
    live.dump(&[]);
    live.restore(&[]);
    fs::write(live.path("status.restored"), "").unwrap();
    live.verdict();
    let mut live = Live::workload("inotify_unread");
    live.without = "kernel_memory";
    let output = live.try_dump(&["-R"]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success() && said.contains("64 bytes of unread events"), "{said}");
    live.verdict();
}

#[test]
fn privileged_semaphores_that_another_process_has_are_named() {
    require_for("undone_semaphores");
    let mut live = Live::workload("undone_semaphores");
    live.dump(&[]);
    let undo = fs::read_dir(live.images()).unwrap().find_map(|entry| {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let cores = name.starts_with("core-").then(|| read_all(&path, Kind::Core).unwrap());
        cores.iter().flatten().find_map(|core: &proto::CoreEntry| {
            core.tc.as_ref().and_then(|task| task.rcriu_undo.first().copied())
        })
    });
    let undo = undo.expect("the child has some");
    assert_eq!((undo.number, undo.adjust), (0, 2));
    let set_value = |value: i32| {
        // SAFETY: the call takes numbers.
        #[expect(unsafe_code, reason = "no crate has semctl(2)")]
        let result = unsafe { nix::libc::semctl(undo.set, 0, nix::libc::SETVAL, value) };
        assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    };
    set_value(1);
    let output = live.try_restore(&[]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let words = format!("it had changed semaphores of the System V set {}", undo.set);
    assert!(!output.status.success() && said.contains(&words), "{said}");
    set_value(5);
    live.restore(&[]);
    live.verdict();
}

#[test]
fn privileged_semaphores_that_cannot_be_read_are_warned_of() {
    require(Cap::Ptrace);
    let mut live = Live::workload("undone_semaphores");
    live.without = "kernel_memory";
    let output = live.try_dump(&["-R"]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let words = "may have semaphore operations to undo on exit (SEM_UNDO";
    assert!(output.status.success() && said.contains(words), "{said}");
    live.verdict();
}

fn refused_with(live: &mut Live, options: &[&str], what: &str) {
    let before = Before::of(live);
    let output = live.try_dump(options);
    let words = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success(), "it was dumped: {words}");
    assert!(words.contains(what), "{words}");
    before.assert_untouched(live, "a dump that was refused");
}

/// No call shows data in a connection that was not accepted, only the memory of the kernel.
/// Urgent data, and bytes behind it.
#[test]
fn privileged_urgent_data_of_tcp_is_refused_without_bpf() {
    require(Cap::Ptrace);
    for name in ["tcp_urgent", "tcp_urgent_read", "tcp_urgent_inline"] {
        let mut live = Live::workload(name);
        live.without = "kernel_memory";
        refused_with(&mut live, &["--tcp-established"], "with urgent data (load a BPF program");
        live.verdict();
    }
}

/// Only taking a pending error shows which one it is.
#[test]
fn privileged_a_pending_error_is_refused_without_bpf() {
    require(Cap::Ptrace);
    let mut live = Live::workload("tcp_pending_errors");
    live.without = "kernel_memory";
    refused_with(&mut live, &[], "with an unread error (load a BPF program");
    live.verdict();
}

#[test]
fn privileged_data_in_a_pending_connection_is_refused_without_bpf() {
    require(Cap::Ptrace);
    for (name, words) in [
        ("unix_pending_data", "whose data cannot be read: load a BPF program"),
        ("unix_pending_closed", "with a pending connection whose other end is closed"),
    ] {
        let mut live = Live::workload(name);
        live.without = "kernel_memory";
        refused_with(&mut live, &[], words);
        live.verdict();
    }
}

/// Writes an image, over one that is there.
fn write_image<M: Message>(path: &Path, kind: Kind, messages: &[M]) {
    let file = BufWriter::new(File::create(path).unwrap());
    let mut image = ImageWriter::new(path, file, kind).unwrap();
    messages.iter().for_each(|message| image.message(message).unwrap());
    image.finish().unwrap();
}

/// Takes out of images what only this program puts into entries of files.
fn without_extensions(images: &Path) {
    let path = images.join(Kind::Files.file_name(0));
    let mut entries: Vec<proto::FileEntry> = read_all(&path, Kind::Files).unwrap();
    for entry in &mut entries {
        (entry.owner, entry.sock) = (None, None);
    }
    write_image(&path, Kind::Files, &entries);
}

/// What CRIU's images do not tell of owners and peers is as if the processes that have the
/// sockets had made them.
#[test]
fn privileged_owners_are_found_without_being_recorded() {
    require(Cap::Ptrace);
    for name in ["owner_of_a_shared_port", "credentials_of_a_pair"] {
        let mut live = Live::workload(name);
        live.dump(&[]);
        without_extensions(&live.images());
        live.restore(&[]);
        live.verdict();
    }
}

/// Errors and datagrams of UDP are lost by a restore, with a word, and by nothing else.
#[test]
fn privileged_an_error_of_a_udp_socket_stays_and_is_warned_of() {
    require(Cap::Ptrace);
    let mut live = Live::workload("udp_pending_error");
    live.dump_running(&[]);
    let log = fs::read_to_string(live.images().join("dump.log")).unwrap();
    assert!(log.contains("has an unread error"), "{log}");
    live.verdict();
}

#[test]
fn privileged_a_connection_with_tls_in_the_kernel_is_refused() {
    refused_connection("tcp_tls", "with the protocol tls in the kernel (TCP_ULP)");
}

#[test]
fn privileged_a_connection_with_signed_packets_is_refused() {
    refused_connection("tcp_authenticated", "with packets that are signed (TCP-AO)");
}

#[test]
fn privileged_a_multipath_connection_is_refused() {
    refused_connection("tcp_multipath", "the multipath TCP socket [");
}

fn refused_connection(name: &str, what: &str) {
    require(Cap::Ptrace);
    let mut live = Live::workload(name);
    refused_with(&mut live, &["--tcp-established"], what);
    live.verdict();
}

/// Without its key memory would be open to all threads.
#[test]
fn privileged_memory_with_a_protection_key_is_refused() {
    refused("protection_keys", "memory with a protection key");
}

/// Unmounts a file system at the end.
struct Mount(PathBuf);

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

/// Starts a shell that runs `script`, says that it is ready, and waits.
fn shell(script: &str) -> Live {
    let script = format!(
        "{script}; mkfifo gate; echo ready >status.new; mv status.new status; read x <gate"
    );
    let mut live = Live::program("sh", &["-c", &script], directory());
    live.wait_ready();
    wait_for("the end of mv", || live.tree().len() == 1);
    live
}

#[test]
fn privileged_a_file_below_a_mount_is_refused_until_that_is_gone() {
    require(Cap::Ptrace);
    let mut live = shell("mkdir dir; exec 3>dir/file");
    let point = live.path("dir");
    mount(None::<&str>, &point, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
    let mounted = Mount(point);
    for options in [&[][..], &["--link-remap"]] {
        refused_with(&mut live, options, "another file system is mounted over it");
    }
    drop(mounted);
    live.dump(&[]);
    live.restore(&[]);
}

/// The main case of a log: the program runs on after the snapshot.
#[test]
fn privileged_a_file_that_has_grown_is_named_with_what_helps() {
    require(Cap::Ptrace);
    let mut live = shell("exec 3>log; echo begin >&3");
    live.dump_running(&[]);
    live.kill();
    let log = live.path("log");
    fs::write(&log, "begin and more\n").unwrap();
    let output = live.try_restore(&[]);
    let words = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success(), "restored with a file that has grown");
    let (root, log) = (live.root, log.display());
    for part in [
        &format!("descriptor 3 of process {root} ({log})"),
        "has 15 bytes, but had 6",
        &format!("truncate -s 6 {log}"),
    ] {
        assert!(words.contains(part), "{words}");
    }
    fs::write(live.path("log"), "begin\n").unwrap();
    live.restore(&[]);
}

/// Of several dumps of one tree, each can be restored that found its names taken.
#[test]
fn privileged_link_remaps_leave_names_alone_that_are_taken() {
    require(Cap::Ptrace);
    let mut live = shell("echo text >file; ln file other; exec 3<>file; rm file");
    live.dump_running(&["--link-remap"]);
    let log = fs::read_to_string(live.images().join("dump.log")).unwrap();
    assert!(log.contains("removing the link remap"), "{log}");
    for number in 0..40 {
        fs::write(live.path(&format!("link_remap.{number}")), "of another").unwrap();
    }
    fs::remove_dir_all(live.images()).unwrap();
    live.dump(&["--link-remap"]);
    live.restore(&["--link-remap"]);
    assert!(live.path("link_remap.7").exists());
    let left = fs::read_dir(live.dir.path()).unwrap().flatten();
    let left = left.filter(|entry| entry.file_name().to_string_lossy().contains("link_remap"));
    assert_eq!(left.count(), 40);
    // A tree that runs on keeps no such name.
    fs::remove_dir_all(live.images()).unwrap();
    live.dump_running(&["--link-remap"]);
    live.kill();
    let output = live.try_restore(&["--link-remap"]);
    let words = String::from_utf8_lossy(&output.stderr).into_owned();
    let place = format!("descriptor 3 of process {}", live.root);
    assert!(words.contains(&place) && words.contains("does not exist"), "{words}");
}

/// A restore could not write the bytes of such a file.
#[test]
fn privileged_deleted_files_of_huge_pages_are_refused() {
    require(Cap::Ptrace);
    let dir = directory();
    let point = dir.path().join("huge");
    fs::create_dir(&point).unwrap();
    mount(None::<&str>, &point, Some("hugetlbfs"), MsFlags::empty(), None::<&str>)
        .unwrap_or_else(|errno| skip(&format!("a kernel with hugetlbfs ({errno})")));
    let _mount = Mount(point);
    let script = "exec 3>huge/file; rm huge/file; mkfifo gate; echo ready >status.new; \
                  mv status.new status; read x <gate";
    let mut live = Live::program("sh", &["-c", script], dir);
    live.wait_ready();
    wait_for("the end of mv", || live.tree().len() == 1);
    refused_with(&mut live, &["--ghost-limit", "16M"], "huge/file of huge pages");
}

#[test]
fn privileged_a_local_descriptor_table_is_refused() {
    refused("local_descriptors", "local descriptor table");
}

/// Kills dumps of a tree that goes on, each after a while. One that was complete
/// by then is a snapshot, and the tree is restored from the last of these.
fn killed_dump(name: &str) {
    const ATTEMPTS: u32 = 30;
    require(Cap::Ptrace);
    let mut live = Live::workload(name);
    let before = live.state();
    let begin = Instant::now();
    live.dump_running(&[]);
    let whole_dump = begin.elapsed();
    let mut complete = 0;
    for attempt in 0..ATTEMPTS {
        fs::remove_dir_all(live.images()).unwrap();
        fs::create_dir(live.images()).unwrap();
        let mut dump = Command::new(engine())
            .args(["dump", "-R", "-t", &live.root.to_string(), "-o", "dump.log", "-D"])
            .arg(live.images())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // The moments are spread over a whole dump and a little more; the wait
        // is what is tested, not what is waited for.
        std::thread::sleep(whole_dump * (attempt + 1) / (ATTEMPTS - 2));
        dump.kill().unwrap();
        dump.wait().unwrap();
        // It has left a process behind that puts everything back. That one has the
        // other end of this, too.
        dump.stderr.take().unwrap().read_to_end(&mut Vec::new()).unwrap();
        // The kernel lets go of the traced in its own time.
        let differences = before.differences(&live.state_after(&before));
        assert!(differences.is_empty(), "killed dump {attempt}:\n{}", differences.join("\n"));
        assert!(!live.images().join(".unfinished").exists(), "killed dump {attempt}: images left");
        if live.images().join("inventory.img").exists() {
            complete += 1;
            live.check_images();
        } else {
            let left = fs::read_dir(live.images()).unwrap().flatten();
            let left: Vec<_> = left.map(|entry| entry.file_name()).collect();
            assert!(left.iter().all(|name| name == "dump.log"), "killed dump {attempt}: {left:?}");
        }
    }
    assert!(complete < ATTEMPTS, "no dump was killed before its end");
    if live.images().join("inventory.img").exists() {
        live.kill();
        live.restore(&[]);
        let after = live.state_restored(&before);
        before.clone().restored(live.root).assert_unchanged(&after.restored(live.root));
    } else {
        // It can still be dumped.
        live.dump_running(&[]);
        before.assert_unchanged(&live.state_after(&before));
    }
    live.verdict();
}

#[test]
fn privileged_killed_dump_leaves_threads_alone() {
    killed_dump("threads");
}

#[test]
fn privileged_killed_dump_leaves_a_tree_alone() {
    killed_dump("sessions");
}

#[test]
fn privileged_killed_dump_leaves_registers_alone() {
    // The widest that there are.
    let wide = Cap::Processor("avx512bw").is_here();
    killed_dump(if wide { "registers_avx512" } else { "registers_avx" });
}

/// What could fail after the work is done is no failure.
/// What is restored as a sibling of `rcriu` is the caller's own child.
#[test]
fn privileged_restored_as_a_sibling() {
    require(Cap::Ptrace);
    let mut live = Live::workload("tree");
    live.dump(&[]);
    live.restore(&["--restore-sibling"]);
    let stat = fs::read_to_string(format!("/proc/{}/stat", live.root)).unwrap();
    let fields: Vec<_> = stat[stat.rfind(')').unwrap() + 2..].split(' ').collect();
    assert_eq!(fields[1], std::process::id().to_string(), "the parent of the restored root");
    live.verdict();
    // The end is told as that of any child.
    let status = nix::sys::wait::waitpid(live.root, None).unwrap();
    assert_eq!(status, nix::sys::wait::WaitStatus::Exited(live.root, 0));
}

/// The stand-in for a session's leader would be left to the caller.
#[test]
fn privileged_a_sibling_in_another_session_is_refused() {
    require(Cap::Ptrace);
    let dir = directory();
    let script = "(mkfifo gate; echo ready >status.new; mv status.new status; read x <gate) & \
                  echo $! >pid.new; mv pid.new pid";
    let mut leader = Live::program("sh", &["-c", script], dir);
    wait_for("the job", || leader.path("pid").exists());
    let job = fs::read_to_string(leader.path("pid")).unwrap().trim().parse().unwrap();
    leader.wait_gone();
    let mut live = Live::adopt(job, directory());
    wait_for("the job alone", || leader.path("status").exists() && live.tree().len() == 1);
    live.dump(&[]);
    let output = live.try_restore(&["-S"]);
    let words = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && words.contains("--restore-sibling would make"), "{words}");
    live.restore(&[]);
}

#[test]
fn privileged_statistics_that_cannot_be_written_are_no_failure() {
    require(Cap::Ptrace);
    let mut live = Live::workload("tree");
    for name in ["stats-dump", "stats-restore"] {
        fs::create_dir_all(live.images().join(name)).unwrap();
    }
    live.dump(&[]);
    live.restore(&[]);
    live.verdict();
}

#[test]
fn privileged_failed_dump_leaves_the_target_alone() {
    require(Cap::Ptrace);
    let mut live = Live::workload("unix_named");
    let before = live.state();
    // A file where the images should go.
    fs::write(live.path("file"), "").unwrap();
    let output = Command::new(engine())
        .args(["dump", "-t", &live.root.to_string(), "-D"])
        .arg(live.path("file"))
        .output()
        .unwrap();
    assert!(!output.status.success());
    before.assert_unchanged(&live.state_after(&before));
    live.verdict();
}

#[test]
fn privileged_restore_onto_used_pids_names_one() {
    require(Cap::Ptrace);
    let mut live = Live::workload("tree");
    live.dump_running(&[]);
    let before = live.state();
    let output = live.try_restore(&[]);
    assert!(!output.status.success(), "restored onto pids that are in use");
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    let named = live.tree().iter().any(|pid| text.contains(&pid.to_string()));
    assert!(named, "the message names no pid: {text}");
    before.assert_unchanged(&live.state_after(&before));
    live.verdict();
}

/// A restore right after a tree was killed waits for processes that are still ending.
#[test]
fn privileged_restore_waits_for_what_is_on_its_way_out() {
    use nix::sys::{
        signal::{Signal, kill},
        wait::waitpid,
    };
    require(Cap::Ptrace);
    let mut live = Live::workload("threads");
    live.dump_running(&[]);
    kill(live.root, Signal::SIGKILL).unwrap();
    // Until they are reaped, dead processes keep their pids.
    let output = live.try_restore(&[]);
    let words = String::from_utf8_lossy(&output.stderr).into_owned();
    let by = format!("a zombie that its parent, process {}", std::process::id());
    assert!(!output.status.success() && words.contains(&by), "{words}");
    let root = live.root;
    let reaper = std::thread::spawn(move || {
        // The restore is looking at the numbers by then.
        std::thread::sleep(std::time::Duration::from_millis(100));
        waitpid(root, None).unwrap();
    });
    live.restore(&[]);
    reaper.join().unwrap();
    live.verdict();
}

/// A process whose first thread has exited loses nothing however often it is dumped, but
/// its changes are not tracked, which is said.
#[test]
fn privileged_an_exited_leader_is_dumped_again() {
    require(Cap::Ptrace);
    let mut live = Live::workload("exited_leader");
    let says_why = |output: &Output| {
        let words = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{words}");
        assert!(
            words.contains("the first thread of process") && words.contains("help: "),
            "{words}"
        );
    };
    let before = live.state();
    says_why(&live.try_run("pre-dump", &["--track-mem"]));
    before.assert_unchanged(&live.state_after(&before));
    live.images_name = "second";
    live.dump(&["--prev-images-dir", "../images"]);
    live.check_images();
    says_why(&live.try_restore(&["--track-mem"]));
    live.images_name = "third";
    live.dump(&[]);
    live.check_images();
    live.restore(&[]);
    let after = live.state_restored(&before);
    live.verdict();
    before.restored(live.root).assert_unchanged(&after.restored(live.root));
}

/// The stored bytes of a file of the mount, with their offsets.
fn stored(path: &Path) -> Vec<(i64, Vec<u8>)> {
    let file = File::open(path).unwrap();
    let read = |data: Range<i64>| {
        let mut bytes = vec![0; usize::try_from(data.end - data.start).unwrap()];
        file.read_exact_at(&mut bytes, data.start.cast_unsigned()).unwrap();
        (data.start, bytes)
    };
    data_of(&file).into_iter().map(read).collect()
}

/// Memory that several processes have is stored once and seen of each. Its changes are not
/// tracked, which is said, and nothing is lost however often it is dumped.
#[test]
fn privileged_memory_of_several_processes_is_dumped_again() {
    require(Cap::Ptrace);
    require(Cap::Fuse);
    let mut live = Live::workload("shared_everything");
    let says_why = |output: &Output| {
        let words = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{words}");
        assert!(words.contains("shares its memory with another one"), "{words}");
    };
    let before = live.state();
    says_why(&live.try_run("pre-dump", &["--track-mem"]));
    before.assert_unchanged(&live.state_after(&before));
    live.images_name = "second";
    live.dump(&["--prev-images-dir", "../images"]);
    live.check_images();
    let tree: Vec<proto::PstreeEntry> =
        read_all(&live.images().join("pstree.img"), Kind::Pstree).unwrap();
    let pagemap = |process: &&proto::PstreeEntry| {
        live.images().join(Kind::Pagemap.file_name(process.pid.into())).exists()
    };
    assert_eq!((tree.len(), tree.iter().filter(pagemap).count()), (3, 2));
    {
        let mounted = Mounted::new(&live.images(), &live.path("mount"), &[]);
        let memory = |process: &proto::PstreeEntry| {
            let dir = fs::read_dir(mounted.path(&format!("mem/{}", process.pid))).unwrap();
            let files = dir.flatten().map(|file| (file.file_name(), stored(&file.path())));
            files.collect::<BTreeMap<_, _>>()
        };
        let root = memory(&tree[0]);
        assert!(!root.is_empty() && root == memory(&tree[1]), "the memory of both is the same");
    }
    says_why(&live.try_restore(&["--track-mem"]));
    live.images_name = "third";
    live.dump(&[]);
    live.check_images();
    live.restore(&[]);
    let after = live.state_restored(&before);
    live.verdict();
    before.restored(live.root).assert_unchanged(&after.restored(live.root));
}

/// Before Linux 6.9 the files of the other threads cannot be reached.
#[test]
fn privileged_an_exited_leader_is_refused_by_older_kernels() {
    require(Cap::Ptrace);
    let mut live = Live::workload("exited_leader");
    live.without = "pidfd_thread";
    refused_with(&mut live, &[], "or use Linux 6.9");
    live.verdict();
}

/// Whose clocks have gone back is told so, and what helps.
#[test]
fn privileged_clocks_that_have_gone_back_are_told() {
    require(Cap::Ptrace);
    let mut live = Live::workload("tree");
    live.dump(&[]);
    let path = live.images().join(Kind::Inventory.file_name(0));
    let entries: Vec<proto::InventoryEntry> = read_all(&path, Kind::Inventory).unwrap();
    let later = entries[0].dump_uptime.map(|now| now + 5_000_000_000);
    let entry = proto::InventoryEntry { dump_uptime: later, ..entries[0].clone() };
    write_image(&path, Kind::Inventory, &[entry]);
    let output = live.try_restore(&[]);
    let words = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success() && words.contains("unshare -T --fork --monotonic"), "{words}");
    live.verdict();
}

#[test]
fn privileged_failed_restore_leaves_no_process() {
    require(Cap::Ptrace);
    let mut live = Live::workload("sessions");
    live.dump(&[]);
    let pages = live.images().join("pages-1.img");
    let length = fs::metadata(&pages).unwrap().len();
    fs::OpenOptions::new().write(true).open(&pages).unwrap().set_len(length / 2).unwrap();
    let output = live.try_restore(&[]);
    assert!(!output.status.success(), "restored from half of the pages");
    live.wait_gone();
}

/// Returns the option that has each stage, the tree's root and its state noted.
fn noting(live: &Live) -> (String, std::path::PathBuf) {
    let seen = live.path("stages");
    let state = r#"$(sed 's/.*) \(.\).*/\1/' /proc/${CRTOOLS_INIT_PID:-none}/stat 2>/dev/null)"#;
    let images = r#"$(ls $CRTOOLS_IMAGE_DIR/inventory.img >/dev/null 2>&1 && echo images)"#;
    let line = format!(
        "echo $CRTOOLS_SCRIPT_ACTION $CRTOOLS_INIT_PID {state} {images} >> {}",
        seen.display()
    );
    (line, seen)
}

#[test]
fn privileged_action_scripts_are_run_at_their_stages() {
    require(Cap::Ptrace);
    let mut live = Live::workload("sessions");
    let pid = live.root;
    let (line, seen) = noting(&live);
    live.dump_running(&["--action-script", &line]);
    let running = fs::read_to_string(&seen).unwrap();
    let (_, running) = running.split_once('\n').unwrap();
    assert_eq!(
        running.lines().collect::<Vec<_>>(),
        [
            format!("network-lock {pid} t"),
            format!("post-dump {pid} t images"),
            format!("network-unlock {pid} t images"),
        ]
    );
    fs::remove_file(&seen).unwrap();
    fs::remove_dir_all(live.images()).unwrap();
    live.dump(&["--action-script", &line]);
    live.restore(&["--action-script", &line]);
    live.verdict();
    let seen = fs::read_to_string(seen).unwrap();
    let mut stages: Vec<&str> = seen.lines().collect();
    // The running root may be doing anything.
    let resumed = stages.pop().unwrap();
    assert!(resumed.starts_with(&format!("post-resume {pid} ")), "{resumed}");
    let first = stages.remove(0);
    assert!(first.starts_with(&format!("pre-dump {pid} ")), "{first}");
    assert_eq!(
        stages,
        [
            format!("network-lock {pid} t"),
            format!("post-dump {pid} t images"),
            "pre-restore images".to_owned(),
            format!("setup-namespaces {pid} t images"),
            format!("post-setup-namespaces {pid} t images"),
            format!("post-restore {pid} t images"),
            format!("network-unlock {pid} t images"),
            format!("pre-resume {pid} t images"),
        ]
    );
}

#[test]
fn privileged_action_scripts_that_fail_stop_what_they_are_run_for() {
    require(Cap::Ptrace);
    let mut live = Live::workload("sessions");
    let before = live.state();
    let fails_at = |stage: &str| format!("test $CRTOOLS_SCRIPT_ACTION != {stage}");
    for (stage, complete) in [("pre-dump", false), ("post-dump", true)] {
        let output = live.try_dump(&["--action-script", &fails_at(stage)]);
        let messages = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && messages.contains(stage), "{messages}");
        before.assert_unchanged(&live.state());
        assert_eq!(live.images().join("inventory.img").exists(), complete, "at {stage}");
    }
    fs::remove_dir_all(live.images()).unwrap();
    live.dump(&[]);
    for stage in ["pre-restore", "setup-namespaces", "post-restore"] {
        let output = live.try_restore(&["--action-script", &fails_at(stage)]);
        let messages = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && messages.contains(stage), "{messages}");
        live.wait_gone();
    }
    // Too late to give up.
    live.restore(&["--action-script", &fails_at("pre-resume")]);
    live.verdict();
}
