//! Tests parsers with texts of Linux 6.18, and readers with this process.

use std::{
    io::Read,
    os::fd::AsRawFd,
    process::{Child, Command, Stdio},
    thread,
};

use nix::{
    fcntl::{Flock, FlockArg},
    sys::signal::Signal,
};
use proptest::prelude::*;

use super::{
    stat::Stat,
    status::Status,
    tables,
    tasks::children_by_parent,
    text::{self, Defect},
    *,
};
use crate::units::RemoteAddr;

const STATUS: &[u8] = b"Name:\ta\\nb\\\\c \nUmask:\t0022\nState:\tR (running)\nTgid:\t23167\n\
    Ngid:\t0\nPid:\t23168\nPPid:\t23165\nTracerPid:\t7\nUid:\t0\t1\t2\t4294967295\n\
    Gid:\t4\t5\t6\t7\nFDSize:\t256\nGroups:\t4 24 27 \nNStgid:\t23167\t3\nNSpid:\t23168\t4\n\
    NSpgid:\t23165\t0\nNSsid:\t21974\t0\nKthread:\t0\nVmPeak:\t    3060 kB\n\
    VmPin:\t       8 kB\nVmRSS:\t    1728 kB\nTHP_enabled:\t1\nuntag_mask:\t0xffffffffffffffff\nThreads:\t2\n\
    SigQ:\t3/96365\nSigPnd:\t0000000000000001\nShdPnd:\t0000000000000002\n\
    SigBlk:\t0000000000000003\nSigIgn:\t0000000000000004\nSigCgt:\t8000000000000005\n\
    CapInh:\t0000000000000006\nCapPrm:\t000001fffeffffff\nCapEff:\t0000000000000007\n\
    CapBnd:\t0000000000000008\nCapAmb:\t0000000000000009\nNoNewPrivs:\t1\nSeccomp:\t2\n\
    Seccomp_filters:\t3\n";

const STAT: &[u8] = b"23168 (a) b (c) R 23165 23166 21974 34816 -1 4194304 101 0 0 0 0 0 0 0 20 \
    -5 1 0 89761 3133440 390 18446744073709551615 94106389868544 94106389888425 140723478989840 \
    0 0 0 0 0 0 0 0 0 17 1 9 2 0 0 0 94106389904432 94106389906048 94107446476800 \
    140723478993634 140723478993654 140723478993655 140723478994923 256\n";

const SMAPS: &[u8] = b"561220355000-561220358000 r-xp 00008000 fe:100 247282                     \
    /tmp/a \\012b  (deleted)\nSize:                 12 kB\nKernelPageSize:        4 kB\n\
    Rss:                  8 kB\nSwap:                 4 kB\nSwapPss:              2 kB\n\
    VmFlags: rd ex mr mw me de \n\
    7f0000000000-7f0000200000 rw-s 00000000 00:00 0 \nKernelPageSize:     2048 kB\n\
    ProtectionKey:         3\nVmFlags: rd wr sh zz \nffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  \
    [vsyscall]\nVmFlags: ex \n";

const LIMITS_TEXT: &[u8] = b"Limit                     Soft Limit           Hard Limit           \
    Units     \nMax cpu time              unlimited            unlimited            seconds   \n\
    Max file size             1 11 bytes\nMax data size             2 12 bytes\n\
    Max stack size            8388608              unlimited            bytes     \n\
    Max core file size 4 14 bytes\nMax resident set 5 15 bytes\nMax processes 6 16 processes\n\
    Max open files 7 17 files\nMax locked memory 8 18 bytes\nMax address space 9 19 bytes\n\
    Max file locks 10 20 locks\nMax pending signals 11 21 signals\n\
    Max msgqueue size 12 22 bytes\nMax nice priority 13 23\nMax realtime priority 14 24\n\
    Max realtime timeout 15 25 us\n";

const TIMERS: &[u8] = b"ID: 2\nsignal: 60/00007fff86e452a8\nnotify: signal/tid.2634\nClockID: 0\n\
    ID: 1\nsignal: 0/0000000000000000\nnotify: none/pid.2635\nClockID: 1\n\
    ID: 0\nsignal: 14/00000000deadbeef\nnotify: thread/pid.0\nClockID: -6\n";

fn myself() -> HostPid {
    HostPid(i32::try_from(std::process::id()).unwrap())
}

/// A child that exits when its input ends, or when this is dropped.
struct Kid(Child);

impl Kid {
    fn start() -> Self {
        Self(Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap())
    }

    fn pid(&self) -> HostPid {
        HostPid(i32::try_from(self.0.id()).unwrap())
    }
}

impl Drop for Kid {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn status_is_read() {
    let status = Status::parse(STATUS).unwrap();
    let expected = Status {
        name: b"a\nb\\c ".to_vec(),
        umask: Some(0o22),
        state: 'R',
        tgid: HostPid(23167),
        pid: HostPid(23168),
        ppid: HostPid(23165),
        tracer_pid: HostPid(7),
        uids: Ids { real: 0, effective: 1, saved: 2, fs: u32::MAX },
        gids: Ids { real: 4, effective: 5, saved: 6, fs: 7 },
        fd_size: 256,
        groups: vec![4, 24, 27],
        ns_tgid: vec![23167, 3],
        ns_pid: vec![23168, 4],
        ns_pgid: vec![23165, 0],
        ns_sid: vec![21974, 0],
        threads: 2,
        sig_queued: (3, 96365),
        sig_pending: 1,
        shared_pending: 2,
        sig_blocked: 3,
        sig_ignored: 4,
        sig_caught: 0x8000_0000_0000_0005,
        cap_inheritable: 6,
        cap_permitted: 0x1ff_feff_ffff,
        cap_effective: 7,
        cap_bounding: 8,
        cap_ambient: 9,
        no_new_privs: true,
        seccomp: 2,
        seccomp_filters: Some(3),
        thp_enabled: Some(true),
        shadow_stack: false,
        vm_rss_kib: Some(1728),
        vm_pte_kib: None,
        vm_lck_kib: None,
        vm_pin_kib: Some(8),
    };
    assert_eq!(status, expected);
}

/// Returns `STATUS` without the line that begins with `key`.
fn status_without(key: &str) -> Vec<u8> {
    let lines = text::lines(STATUS).filter(|line| !line.starts_with(key.as_bytes()));
    lines.collect::<Vec<_>>().join(&b'\n')
}

#[test]
fn status_may_lack_what_old_kernels_and_zombies_lack() {
    for (key, is_optional) in [
        ("Umask:", true),
        ("NSpid:", true),
        ("VmPin:", true),
        ("VmRSS:", true),
        ("THP_enabled:", true),
        ("CapAmb:", true),
        ("NoNewPrivs:", true),
        ("Seccomp:", true),
        ("Seccomp_filters:", true),
        ("Name:", false),
        ("Uid:", false),
        ("SigCgt:", false),
        ("Threads:", false),
    ] {
        let found = Status::parse(&status_without(key));
        assert_eq!(found.is_ok(), is_optional, "{key}: {found:?}");
    }
}

#[test]
fn stat_is_read_after_the_last_parenthesis() {
    let expected = Stat {
        comm: b"a) b (c".to_vec(),
        state: 'R',
        ppid: HostPid(23165),
        pgrp: HostPid(23166),
        session: HostPid(21974),
        tty_nr: 34816,
        tpgid: HostPid(-1),
        flags: 4_194_304,
        nice: -5,
        threads: 1,
        start_time: 89761,
        start_code: 94_106_389_868_544,
        end_code: 94_106_389_888_425,
        start_stack: 140_723_478_989_840,
        exit_signal: 17,
        processor: 1,
        rt_priority: 9,
        policy: 2,
        start_data: 94_106_389_904_432,
        end_data: 94_106_389_906_048,
        start_brk: 94_107_446_476_800,
        arg_start: 140_723_478_993_634,
        arg_end: 140_723_478_993_654,
        env_start: 140_723_478_993_655,
        env_end: 140_723_478_994_923,
        exit_code: 256,
    };
    assert_eq!(Stat::parse(STAT).unwrap(), expected);
    assert!(Stat::parse(b"1 ) x ( R 2").is_err());
}

#[test]
fn smaps_are_read() {
    let none = Mapping {
        start: RemoteAddr(0),
        end: RemoteAddr(0),
        read: false,
        write: false,
        execute: false,
        shared: false,
        offset: 0,
        dev_major: 0,
        dev_minor: 0,
        inode: 0,
        name: Vec::new(),
        flags: VmFlags::default(),
        rss_bytes: 0,
        shared_rss_bytes: 0,
        swap_bytes: 0,
        kernel_page_bytes: 0,
        protection_key: 0,
    };
    let expected = [
        Mapping {
            start: RemoteAddr(0x5612_2035_5000),
            end: RemoteAddr(0x5612_2035_8000),
            read: true,
            execute: true,
            offset: 0x8000,
            dev_major: 0xfe,
            dev_minor: 0x100,
            inode: 247_282,
            name: b"/tmp/a \nb  (deleted)".to_vec(),
            flags: VmFlags::READ
                | VmFlags::EXEC
                | VmFlags::MAY_READ
                | VmFlags::MAY_WRITE
                | VmFlags::MAY_EXEC
                | VmFlags::DONT_EXPAND,
            rss_bytes: 8192,
            swap_bytes: 4096,
            kernel_page_bytes: 4096,
            ..none.clone()
        },
        Mapping {
            start: RemoteAddr(0x7f00_0000_0000),
            end: RemoteAddr(0x7f00_0020_0000),
            read: true,
            write: true,
            shared: true,
            flags: VmFlags::READ | VmFlags::WRITE | VmFlags::SHARED | VmFlags::UNKNOWN,
            kernel_page_bytes: 2 << 20,
            protection_key: 3,
            ..none.clone()
        },
        Mapping {
            start: RemoteAddr(0xffff_ffff_ff60_0000),
            end: RemoteAddr(0xffff_ffff_ff60_1000),
            execute: true,
            name: b"[vsyscall]".to_vec(),
            flags: VmFlags::EXEC,
            ..none
        },
    ];
    let found = maps::parse_smaps(SMAPS).unwrap();
    assert_eq!(found, expected);
    assert!(found[0].is_deleted() && !found[2].is_deleted());
    assert_eq!(found[1].len(), 2 << 20);
    assert_eq!(found[1].flags.to_string(), "rd wr sh ??");
}

#[test]
fn wrong_mappings_are_refused() {
    for (text, what) in [
        (&b"Rss: 8 kB\n"[..], "mapping before its fields"),
        (b"2000-1000 r--p 0 0:0 0", "end of mapping after its start"),
        (b"1000-2000 r--", "permissions of mapping"),
        (b"1000-2000 r--p 0 00 0", "device of mapping"),
        (b"1000-2000 r--p 0 0:0", "inode of mapping"),
        (b"1000-2000 r--p 0 0:0 0\nRss: 18446744073709551615 kB", "Rss"),
    ] {
        assert_eq!(maps::parse_smaps(text).unwrap_err().what, what);
    }
}

#[test]
fn limits_are_read_by_number() {
    let found = tables::parse_limits(LIMITS_TEXT).unwrap();
    for (number, limit) in (0..).zip(found) {
        let expected = match number {
            0 => (UNLIMITED, UNLIMITED),
            3 => (8_388_608, UNLIMITED),
            _ => (number, number + 10),
        };
        assert_eq!(limit, expected, "{number}");
    }
    let missing = tables::parse_limits(b"").unwrap_err();
    assert_eq!(missing, Defect::missing("Max cpu time"));
}

#[test]
fn timers_are_read() {
    let timer = |id, signal, value, notify, notify_pid, clock| PosixTimer {
        id,
        signal,
        value,
        notify: Notify(notify),
        notify_pid,
        clock,
    };
    let expected = [
        timer(2, 60, 0x7fff_86e4_52a8, 4, Some(HostPid(2634)), 0),
        timer(1, 0, 0, 1, Some(HostPid(2635)), 1),
        timer(0, 14, 0xdead_beef, 2, None, -6),
    ];
    assert_eq!(tables::parse_timers(TIMERS).unwrap(), expected);
    assert!(expected[0].notify.is_for_thread());
    assert!(tables::parse_timers(b"ID: 2\nsignal: 60/0\n").is_err());
}

#[test]
fn small_texts_are_read() {
    let found = tables::parse_cgroups(b"9:name=systemd:/\n4:cpu,cpuacct:/a:b\n0::/\n").unwrap();
    let expected: [(u32, &[u8], &[u8]); 3] =
        [(9, b"name=systemd", b"/"), (4, b"cpu,cpuacct", b"/a:b"), (0, b"", b"/")];
    assert_eq!(found, expected.map(|(id, sorts, path)| (id, sorts.to_vec(), path.to_vec())));
    assert_eq!(tables::parse_namespace(b"mnt:[4026531841]"), Ok(4_026_531_841));
    assert!(tables::parse_namespace(b"pipe[1]").is_err());
    assert_eq!(tables::parse_auxv(&6_u64.to_ne_bytes()), Ok(vec![6]));
    assert!(tables::parse_auxv(b"short").is_err());
}

#[test]
fn numbers_keep_to_their_types() {
    for (text, expected) in
        [(&b" -128 "[..], Some(-128_i8)), (b"127", Some(127)), (b"128", None), (b"-129", None)]
    {
        assert_eq!(text::signed(text, "x").ok(), expected);
    }
    for (text, radix, expected) in [
        (&b"ff"[..], 16, Some(255_u8)),
        (b"100", 16, None),
        (b"0377", 8, Some(255)),
        (b"8", 8, None),
        (b"", 10, None),
        (b"-1", 10, None),
        (b"99999999999999999999", 10, None),
    ] {
        assert_eq!(text::unsigned(text, radix, "x").ok(), expected);
    }
    assert_eq!(text::undo_octal(b"a\\012\\134\\9\\01"), b"a\n\\\\9\\01");
}

#[test]
fn details_of_descriptors_are_read() {
    const HEAD: &[u8] = b"pos:\t0\nflags:\t02000002\nmnt_id:\t17\nino:\t1038\n";
    let target = EpollTarget { tfd: 3, events: 0x19, data: 0xab, pos: -1, ino: 0x40e, dev: 0x10 };
    let second = EpollTarget { tfd: 12, events: 0x8000_001f, data: u64::MAX, pos: 0, ..target };
    let timer = FdDetail::TimerFd {
        clockid: 7,
        ticks: 2,
        settime_flags: 0o3,
        value_sec: 4,
        value_nsec: 999_999_999,
        interval_sec: 5,
        interval_nsec: 6,
    };
    let watch = "inotify wd:1 ino:3c4a7 sdev:fe00000 mask:2 ignored_mask:0 fhandle-bytes:8 \
                 fhandle-type:1 f_handle:a7c4030000000000";
    for (rest, detail) in [
        ("", FdDetail::None),
        (
            "eventfd-count:               1f\neventfd-id: 1\neventfd-semaphore: 1\n",
            FdDetail::EventFd { count: 0x1f, id: Some(1), semaphore: Some(true) },
        ),
        (
            "eventfd-count: ffffffffffffffff\n",
            FdDetail::EventFd { count: u64::MAX, id: None, semaphore: None },
        ),
        (
            "tfd:        3 events:       19 data:               ab  pos:-1 ino:40e sdev:10\n\
             tfd:       12 events: 8000001f data: ffffffffffffffff  pos:0 ino:40e sdev:10\n",
            FdDetail::EventPoll { targets: vec![target, second] },
        ),
        ("sigmask:\t0000000000000200\n", FdDetail::SignalFd { mask: 0x200 }),
        (
            "clockid: 7\nticks: 2\nsettime flags: 03\nit_value: (4, 999999999)\n\
             it_interval: (5, 6)\n",
            timer,
        ),
        (
            watch,
            FdDetail::Inotify(vec![InotifyWatch {
                wd: 1,
                file: WatchedInode {
                    inode: 0x3c4a7,
                    device: 0x0fe0_0000,
                    handle: Some(FileHandle { kind: 1, bytes: vec![0xa7, 0xc4, 3, 0, 0, 0, 0, 0] }),
                },
                mask: 2,
                ignored_mask: 0,
            }]),
        ),
        (
            "fanotify flags:0 event-flags:8000\n",
            FdDetail::Fanotify(FanotifyGroup { event_flags: 0x8000, ..Default::default() }),
        ),
        ("Pid:\t23179\nNSpid:\t23179\t5\n", FdDetail::PidFd { pid: 23179, nspid: vec![23179, 5] }),
        ("tty-index:\t3\n", FdDetail::Master { index: 3 }),
        ("Pid:\t-1\n", FdDetail::PidFd { pid: -1, nspid: Vec::new() }),
    ] {
        let expected = FdInfo {
            pos: 0,
            flags: 0o2_000_002,
            mnt_id: 17,
            ino: Some(1038),
            detail,
            locks: Vec::new(),
        };
        assert_eq!(parse_fdinfo(&[HEAD, rest.as_bytes()].concat()).unwrap(), expected);
    }
    assert_eq!(parse_fdinfo(b"pos:\t1\nflags:\t0\n"), Err(Defect::missing("mnt_id")));
}

proptest! {
    #[test]
    fn no_parser_panics(
        bytes in proptest::collection::vec(any::<u8>(), 0..200),
        sample in 0_usize..5,
        cut in 0_usize..900,
        at in 0_usize..900,
        len in 0_usize..40,
    ) {
        let mut damaged = [STATUS, STAT, SMAPS, LIMITS_TEXT, TIMERS][sample].to_vec();
        let at = at.min(damaged.len());
        damaged.splice(at..(at + len).min(damaged.len()), bytes.iter().copied().take(len));
        damaged.truncate(damaged.len().saturating_sub(cut));
        for text in [&bytes, &damaged] {
            let _ = Status::parse(text);
            let _ = Stat::parse(text);
            let _ = maps::parse_maps(text);
            let _ = maps::parse_smaps(text);
            let _ = parse_fdinfo(text);
            let _ = tables::parse_limits(text);
            let _ = tables::parse_timers(text);
            let _ = tables::parse_cgroups(text);
            let _ = tables::parse_namespace(text);
            let _ = tables::parse_auxv(text);
        }
    }

    #[test]
    fn fdinfo_survives_lines_with_any_value(
        key in 0_usize..16,
        value in proptest::collection::vec(any::<u8>(), 0..60),
    ) {
        let keys = [
            "pos", "flags", "mnt_id", "ino", "lock", "tfd", "sigmask", "clockid", "ticks",
            "settime flags", "it_value", "it_interval", "Pid", "NSpid", "eventfd-count",
            "eventfd-id",
        ];
        let _ = parse_fdinfo(&[keys[key].as_bytes(), b":", &value].concat());
    }
}

#[test]
fn this_process_is_read() {
    let pid = myself();
    let status = status(pid).unwrap();
    assert_eq!((status.tgid, status.pid), (pid, pid));
    let stat = stat(pid).unwrap();
    assert_eq!(stat.ppid, status.ppid);
    assert!(stat.start_time > 0 && stat.start_stack > stat.start_brk);
    assert_eq!(comm(pid, pid).unwrap(), stat.comm);
    assert!(cmdline(pid).unwrap().ends_with(b"\0"));
    let auxv = auxv(pid).unwrap();
    let clktck = auxv.chunks_exact(2).find(|pair| pair[0] == 17).unwrap()[1]; // AT_CLKTCK
    assert_eq!(clktck, clock_ticks_per_second());
    assert_eq!(auxv[auxv.len() - 2..], [0, 0]);
    let exe = std::env::current_exe().unwrap().into_os_string().into_vec();
    assert_eq!(link(pid, "exe").unwrap(), exe);
    assert!(namespace(pid, "mnt").unwrap() > 0);
    assert_eq!(timers(pid).unwrap(), []);
    assert_eq!(personality(pid).unwrap(), 0);
    assert!((-1000..=1000).contains(&oom_score_adj(pid).unwrap()));
    loginuid(pid).unwrap();
    assert!(!cgroups(pid).unwrap().is_empty());
    assert!(limits(pid).unwrap().iter().all(|(soft, hard)| soft <= hard));
    assert!(pids().unwrap().contains(&pid));
}

#[test]
fn mappings_of_this_process_hold_its_stack_and_code() {
    let pid = myself();
    let here = 0_u8;
    let stack = u64::try_from(std::ptr::from_ref(&here).addr()).unwrap();
    let code = u64::try_from((myself as fn() -> HostPid as *const ()).addr()).unwrap();
    let holding = |mappings: Vec<Mapping>, address: u64| {
        let mut mappings = mappings.into_iter();
        mappings.find(|one| (one.start.0..one.end.0).contains(&address)).unwrap()
    };
    let stack = holding(smaps(pid).unwrap(), stack);
    assert!(stack.read && stack.write && !stack.shared && stack.rss_bytes > 0);
    assert!(stack.flags.contains(VmFlags::READ | VmFlags::WRITE));
    let code = holding(maps(pid).unwrap(), code);
    assert!(code.execute && code.flags.is_empty());
    assert_eq!(code.name, link(pid, "exe").unwrap());
    let all = smaps(pid).unwrap();
    assert!(all.iter().all(|one| !one.flags.contains(VmFlags::UNKNOWN)), "{all:?}");
}

#[test]
fn threads_of_this_process_are_listed_and_read() {
    let pid = myself();
    let tid = HostPid(nix::unistd::gettid().as_raw());
    let threads = threads(pid).unwrap();
    assert_eq!(threads[0], pid);
    assert!(threads[1..].is_sorted() && threads.contains(&tid));
    let status = thread_status(pid, tid).unwrap();
    assert_eq!((status.tgid, status.pid), (pid, tid));
    assert_eq!(status.name, thread_stat(pid, tid).unwrap().comm);
    // The thread is in `read`, whose number is 0.
    assert!(syscall(pid, tid).unwrap().starts_with(b"0 0x"));
}

#[test]
fn children_are_those_of_every_thread() {
    let pid = myself();
    let first = Kid::start();
    let second = thread::spawn(Kid::start).join().unwrap();
    for found in [children(pid).unwrap(), children_by_parent(pid).unwrap()] {
        assert!(found.contains(&first.pid()) && found.contains(&second.pid()), "{found:?}");
        assert!(!found.contains(&pid));
    }
}

#[test]
fn zombies_are_read_and_gone_processes_have_vanished() {
    let mut kid = Kid::start();
    let pid = kid.pid();
    kid.0.kill().unwrap();
    while stat(pid).unwrap().state != 'Z' {
        thread::yield_now();
    }
    let status = status(pid).unwrap();
    assert_eq!((status.state, status.vm_rss_kib), ('Z', None));
    assert_eq!(stat(pid).unwrap().exit_code, Signal::SIGKILL as i32);
    assert_eq!(smaps(pid).unwrap(), []);
    assert!(link(pid, "exe").unwrap_err().is_vanished());
    assert!(children(pid).unwrap().is_empty());
    kid.0.wait().unwrap();
    for error in [
        super::status(pid).unwrap_err(),
        smaps(pid).unwrap_err(),
        children(pid).unwrap_err(),
        fds(pid).unwrap_err(),
        loginuid(pid).unwrap_err(),
        fdinfo(pid, TargetFd(0)).unwrap_err(),
    ] {
        assert!(error.is_vanished(), "{error:?}");
    }
}

#[test]
fn a_file_that_is_locked_is_read() {
    let mut file = tempfile::tempfile().unwrap();
    std::io::Write::write_all(&mut file, b"12345").unwrap();
    assert_eq!(file.read(&mut [0]).unwrap(), 0);
    let file = Flock::lock(file, FlockArg::LockExclusive).unwrap();
    let fd = TargetFd(file.as_raw_fd());
    let info = fdinfo(myself(), fd).unwrap();
    let expected = u32::try_from(nix::libc::O_CLOEXEC | nix::libc::O_RDWR).unwrap();
    assert_eq!((info.pos, info.flags & expected), (5, expected));
    assert_eq!(info.detail, FdDetail::None);
    let [lock] = &info.locks[..] else { panic!("{:?}", info.locks) };
    assert_eq!((lock.kind, lock.mode, lock.last), (LockKind::Flock, LockMode::Write, None));
    assert_eq!(lock.pid.unsigned_abs(), std::process::id());
    assert!(locks().unwrap().contains(lock));
    assert!(fd_link(myself(), fd).unwrap().ends_with(b" (deleted)"));
    let fds = fds(myself()).unwrap();
    assert!(fds.is_sorted() && fds.contains(&fd));
    let descriptors = Descriptors::open(myself()).unwrap();
    assert!(descriptors.numbers().unwrap().contains(&fd));
    assert_eq!(descriptors.link(fd).unwrap(), fd_link(myself(), fd).unwrap());
    assert_eq!(descriptors.info(fd).unwrap(), info);
    let error = descriptors.info(TargetFd(i32::MAX)).unwrap_err();
    assert!(error.is_vanished() && error.to_string().contains("/fdinfo/2147483647"), "{error}");
}

/// A program that opens one file of each kind and then waits for the end of its input.
const OPENER: &str = "
import ctypes, os, select, sys
c = ctypes.CDLL(None, use_errno=True)
event = c.eventfd(31, 1)
poll = select.epoll()
poll.register(event, select.EPOLLIN)
mask = ctypes.c_uint64(1 << 9)
signal = c.signalfd(-1, ctypes.byref(mask), 0)
timer = c.timerfd_create(1, 0)
spec = (ctypes.c_int64 * 4)(5, 6, 1000, 8)
c.timerfd_settime(timer, 1, ctypes.byref(spec), None)
notify = c.inotify_init1(0)
c.inotify_add_watch(notify, b'/tmp', 2)
process = c.syscall(434, os.getpid(), 0)
print(event, poll.fileno(), signal, timer, notify, process, flush=True)
sys.stdin.read()
";

#[test]
fn descriptors_of_all_kinds_are_read_as_the_kernel_writes_them() {
    let child = Command::new("python3")
        .args(["-c", OPENER])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("python3 opens the descriptors");
    let mut kid = Kid(child);
    let mut line = String::new();
    let mut output = std::io::BufReader::new(kid.0.stdout.take().unwrap());
    std::io::BufRead::read_line(&mut output, &mut line).unwrap();
    let numbers: Vec<i32> = line.split_whitespace().map(|word| word.parse().unwrap()).collect();
    let detail = |index: usize| fdinfo(kid.pid(), TargetFd(numbers[index])).unwrap().detail;

    let FdDetail::EventFd { count: 31, id: Some(_), semaphore: Some(true) } = detail(0) else {
        panic!("{:?}", detail(0))
    };
    let FdDetail::EventPoll { targets } = detail(1) else { panic!("{:?}", detail(1)) };
    let [target] = targets[..] else { panic!("{targets:?}") };
    assert_eq!((target.tfd, target.events & 1), (numbers[0], 1));
    assert_eq!(detail(2), FdDetail::SignalFd { mask: 1 << 9 });
    let FdDetail::TimerFd {
        clockid: 1,
        ticks: 0..,
        settime_flags: 1,
        interval_sec: 5,
        interval_nsec: 6,
        ..
    } = detail(3)
    else {
        panic!("{:?}", detail(3))
    };
    let FdDetail::Inotify(watches) = detail(4) else { panic!("{:?}", detail(4)) };
    assert!(watches.len() == 1 && (watches[0].wd, watches[0].mask) == (1, 2));
    let pid = kid.pid().0;
    assert_eq!(detail(5), FdDetail::PidFd { pid, nspid: vec![pid] });
}

#[test]
#[ignore = "measures: run with --release --nocapture"]
fn a_hundred_thousand_mappings_take_little_time() {
    let one = SMAPS.repeat(33_334);
    let begin = std::time::Instant::now();
    assert_eq!(maps::parse_smaps(&one).unwrap().len(), 100_002);
    println!("{:?} for {} bytes", begin.elapsed(), one.len());
}

#[test]
fn time_offsets_are_in_nanoseconds() {
    let text = b"monotonic       -1000         5\nboottime          2000         0\n";
    assert_eq!(tables::parse_time_offsets(text), Ok([-999_999_999_995, 2_000_000_000_000]));
    assert!(tables::parse_time_offsets(b"monotonic 1 0\n").is_err());
    assert!(tables::parse_time_offsets(b"monotonic 1 0 0\nboottime 1 0\n").is_err());
    let huge = b"monotonic 9223372036854775807 0\nboottime 1 0\n";
    assert!(tables::parse_time_offsets(huge).is_err());
}
