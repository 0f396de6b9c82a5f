//! Clients that harm the service if they can: that vanish, that send anything, that are many, and that ask
//! for what they may not do.

mod common;

use std::{
    cell::Cell,
    fs::{self, File},
    os::{
        fd::AsRawFd,
        unix::{
            fs::{PermissionsExt, chown},
            process::CommandExt,
        },
    },
    path::Path,
    process::{Child, Command, Stdio},
    thread,
};

use common::{
    Cap,
    client::{Client, Service, of_type, task},
    live::{Live, directory, state_of, wait_for},
    require,
};
use proptest::{
    prelude::*,
    sample::Index,
    test_runner::{Config, TestRunner},
};
use prost::Message;
use rcriu::proto::rpc::{
    CgroupRoot, CriuOpts, CriuPageServerInfo, CriuReq, CriuReqType, CriuResp, CriuVethPair,
    ExtMountMap, InheritFd, JoinNamespace, UnixSk,
};

fn images(live: &Live) -> File {
    fs::create_dir_all(live.images()).unwrap();
    File::open(live.images()).unwrap()
}

/// A client that disagrees or vanishes at any stage: the tree runs on.
#[test]
fn privileged_a_client_that_vanishes_during_a_dump_harms_nobody() {
    require(Cap::Ptrace);
    let mut live = Live::workload("pipes");
    let dir = images(&live);
    let before = live.state();
    for stage in 0..4 {
        for vanishes in [false, true] {
            let client = Client::of_swrk();
            let opts = CriuOpts { pid: Some(live.root.as_raw()), ..CriuOpts::default() };
            client.send(&task(CriuReqType::Dump, &dir, opts));
            for _ in 0..stage {
                client.receive().unwrap();
                client.agree();
            }
            client.receive().unwrap();
            if !vanishes {
                client.send(&of_type(CriuReqType::Notify));
                let answer = loop {
                    match client.receive() {
                        Some(response) if response.r#type() == CriuReqType::Notify => {
                            client.agree();
                        }
                        answer => break answer,
                    }
                };
                assert!(!answer.unwrap().success);
            }
            assert_eq!(client.end(), Some(1), "stage {stage}");
            before.assert_unchanged(&live.state_after(&before));
            assert!(!live.images().join("inventory.img").exists() || stage == 3);
        }
    }
}

/// Takes part in a request up to a stage, and vanishes. Returns the exit code of the server.
fn vanish_at(stage: usize, request: &CriuReq) -> Option<i32> {
    let client = Client::of_swrk();
    client.send(request);
    for _ in 0..stage {
        client.receive().unwrap();
        client.agree();
    }
    client.receive().unwrap();
    client.end()
}

#[test]
fn privileged_a_client_that_vanishes_during_a_pre_dump_harms_nobody() {
    require(Cap::Ptrace);
    let mut live = Live::workload("pipes");
    let dir = images(&live);
    let before = live.state();
    let opts = CriuOpts { pid: Some(live.root.as_raw()), ..CriuOpts::default() };
    let request = task(CriuReqType::SinglePreDump, &dir, opts);
    let (stages, response) = Client::of_swrk().ask(&request);
    assert!(response.success, "{response:?}");
    before.assert_unchanged(&live.state_after(&before));
    for (at, stage) in stages.iter().enumerate() {
        assert_eq!(vanish_at(at, &request), Some(1), "stage {stage}");
        before.assert_unchanged(&live.state_after(&before));
    }
}

/// Nothing of the tree stays, and its images can be restored, until the restore is so far that it runs.
#[test]
fn privileged_a_client_that_vanishes_during_a_restore_leaves_no_part_of_a_tree() {
    require(Cap::Ptrace);
    let mut live = Live::workload("pipes");
    let before = live.state();
    let pids = live.tree();
    live.dump(&[]);
    let dir = images(&live);
    let request = task(CriuReqType::Restore, &dir, CriuOpts::default());
    let runs = || pids.iter().any(|pid| !matches!(state_of(*pid), None | Some('Z')));
    let stages = [
        "pre-restore",
        "setup-namespaces",
        "post-setup-namespaces",
        "post-restore",
        "network-unlock",
    ];
    for (at, stage) in stages.into_iter().enumerate() {
        assert_eq!(vanish_at(at, &request), Some(1), "stage {stage}");
        wait_for("the end of the half-restored tree", || !runs());
    }
    // As with CRIU, the next stage, pre-resume, is not asked for leave.
    assert_eq!(vanish_at(stages.len(), &request), Some(0));
    let root = live.root;
    let now = live.state_restored(&before).restored(root);
    before.restored(root).assert_unchanged(&now);
    live.verdict();
}

/// Whether a service still answers.
fn answers(service: &Service) -> bool {
    let client = Client::of_service(&service.address).unwrap();
    client.ask(&of_type(CriuReqType::Version)).1.success
}

/// Each type of request, from clients that send it and are gone, and from ones that stay and say nothing.
#[test]
fn privileged_a_service_survives_clients_that_vanish_after_each_request() {
    require(Cap::Ptrace);
    let service = Service::start();
    let mut live = Live::workload("pipes");
    let before = live.state();
    let dir = images(&live);
    let silent: Vec<_> = (0..20).map(|_| Client::of_service(&service.address).unwrap()).collect();
    // Page servers go on without the client that has asked for them, as it wants.
    let kinds = (0..=14).filter(|number| {
        ![CriuReqType::PageServer, CriuReqType::PageServerChld]
            .iter()
            .any(|kind| *kind as i32 == *number)
    });
    for number in kinds {
        for notify_scripts in [false, true] {
            let opts = CriuOpts {
                pid: Some(live.root.as_raw()),
                leave_running: Some(true),
                notify_scripts: Some(notify_scripts),
                ..CriuOpts::default()
            };
            // The tree runs: it is not restored a second time.
            let request = task(CriuReqType::Empty, &dir, opts);
            let request = CriuReq { r#type: number, pid: Some(1), ..request };
            let client = Client::of_service(&service.address).unwrap();
            client.send(&request);
            client.end();
            assert!(answers(&service), "after a request of type {number}");
        }
    }
    drop(silent);
    wait_for("the end of all requests", || {
        let children = format!("/proc/{0}/task/{0}/children", service.pid());
        let children = fs::read_to_string(children).unwrap();
        children
            .split_whitespace()
            .all(|pid| matches!(state_of(pid.parse().unwrap()), None | Some('Z')))
    });
    before.assert_unchanged(&live.state_after(&before));
    assert!(answers(&service));
}

/// A request with all fields, none of which does anything to this machine.
fn full_request() -> CriuReq {
    let text = |text: &str| Some(text.as_bytes().to_vec());
    let opts = CriuOpts {
        leave_running: Some(true),
        ext_unix_sk: Some(true),
        tcp_established: Some(true),
        shell_job: Some(true),
        log_level: Some(4),
        notify_scripts: Some(true),
        root: text("/"),
        parent_img: text("../parent"),
        veths: vec![CriuVethPair { if_in: b"in".to_vec(), if_out: b"out".to_vec() }],
        cpu_cap: Some(7),
        exec_cmd: vec![b"true".to_vec()],
        ext_mnt: vec![ExtMountMap { key: b"/key".to_vec(), val: b"value".to_vec() }],
        cg_root: vec![CgroupRoot { ctrl: text("memory"), path: b"/group".to_vec() }],
        inherit_fd: vec![InheritFd { key: b"pipe:[1]".to_vec(), fd: 0 }],
        unix_sk_ino: vec![UnixSk { inode: 7 }],
        manage_cgroups_mode: Some(3),
        external: vec![b"net[7]:name".to_vec()],
        empty_ns: Some(0x4000_0000),
        join_ns: vec![JoinNamespace {
            ns: b"net".to_vec(),
            ns_file: b"/proc/self/ns/net".to_vec(),
            extra_opt: None,
        }],
        cgroup_props: text("\"memory\":\n- \"strategy\": \"replace\"\n"),
        timeout: Some(1),
        orphan_pts_master: Some(true),
        network_lock: Some(2),
        ..CriuOpts::default()
    };
    CriuReq { opts: Some(opts), keep_open: Some(true), ..of_type(CriuReqType::Dump) }
}

/// A change of a packet: some of its bytes are replaced by others.
type Change = (Index, Index, Vec<u8>);

/// Returns a packet with changes.
fn changed(mut packet: Vec<u8>, changes: &[Change]) -> Vec<u8> {
    for (from, len, bytes) in changes {
        let from = from.index(packet.len() + 1);
        let end = (from + len.index(8)).min(packet.len());
        packet.splice(from..end, bytes.iter().copied());
    }
    packet
}

/// Returns a packet that, if it is a request, concerns no process, and no directory but `dir`; `None` if it
/// would start something that stays, or is the end of the connection.
fn harmless(packet: Vec<u8>, dir: &File) -> Option<Vec<u8>> {
    let Ok(request) = CriuReq::decode(packet.as_slice()) else { return Some(packet) };
    if matches!(request.r#type(), CriuReqType::PageServer | CriuReqType::PageServerChld) {
        return None;
    }
    let opts = request.opts.map(|opts| CriuOpts {
        pid: Some(i32::MAX),
        images_dir_fd: dir.as_raw_fd(),
        images_dir: None,
        work_dir_fd: None,
        log_file: None,
        config_file: None,
        status_fd: None,
        ps: None::<CriuPageServerInfo>,
        ..opts
    });
    Some(CriuReq { opts, pid: Some(u32::MAX), ..request }.encode_to_vec())
        .filter(|packet| !packet.is_empty())
}

/// Any bytes, and broken requests, get a response or the end of the connection.
#[test]
fn any_bytes_are_answered() {
    const CASES: u32 = 300;
    let service = Service::start();
    let dir = directory();
    let opened = File::open(dir.path()).unwrap();
    let change = (any::<Index>(), any::<Index>(), prop::collection::vec(any::<u8>(), 0..6));
    let kinds = prop::sample::select((0..=14).collect::<Vec<i32>>());
    let packets = prop_oneof![
        prop::collection::vec(any::<u8>(), 1..200),
        (kinds, prop::collection::vec(change, 0..5)).prop_map(|(kind, changes)| {
            let request = CriuReq { r#type: kind, ..full_request() };
            changed(request.encode_to_vec(), &changes)
        }),
    ];
    let case = Cell::new(0);
    let mut runner = TestRunner::new(Config { cases: CASES, ..Config::default() });
    let result = runner.run(&packets, |packet| {
        let Some(packet) = harmless(packet, &opened) else { return Ok(()) };
        let send = |client: Client| {
            client.send_bytes(&packet).unwrap();
            client.receive();
            client.end()
        };
        send(Client::of_service(&service.address).unwrap());
        case.set(case.get() + 1);
        // A process for each is slower.
        if case.get() % 8 == 0 {
            let code = send(Client::of_swrk());
            prop_assert!(matches!(code, Some(0 | 1)), "{:?}", code);
        }
        Ok(())
    });
    result.unwrap();
    assert!(answers(&service));
}

/// A process that does nothing, and ends with this.
struct Sleeper(Child);

impl Sleeper {
    fn start() -> Self {
        let mut command = Command::new("setsid");
        command.args(["sleep", "1000"]).current_dir("/");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        Self(command.spawn().unwrap())
    }

    fn pid(&self) -> i32 {
        self.0.id().try_into().unwrap()
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Has a program of another user send a request, and returns the response.
fn ask_as(uid: u32, address: &Path, request: &CriuReq, scratch: &Path) -> CriuResp {
    // Python, since a thread of this program cannot take another user's ids by itself.
    const SCRIPT: &str = "import socket, sys
client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
client.connect(sys.argv[1])
client.send(open(sys.argv[2], 'rb').read())
sys.stdout.buffer.write(client.recv(65536))";
    fs::write(scratch, request.encode_to_vec()).unwrap();
    fs::set_permissions(scratch, fs::Permissions::from_mode(0o644)).unwrap();
    let mut command = Command::new("/usr/bin/python3");
    command.args(["-c", SCRIPT]).arg(address).arg(scratch).uid(uid).gid(uid);
    let output = command.output().unwrap();
    CriuResp::decode(output.stdout.as_slice()).unwrap()
}

/// Fifty clients of root dump a process of theirs each; meanwhile, another user asks for the same fifty
/// processes, in vain.
#[test]
fn privileged_a_service_serves_those_who_may_and_not_those_who_may_not() {
    const NOBODY: u32 = 65534;
    const PROCESSES: usize = 50;
    require(Cap::Ptrace);
    let service = Service::start();
    let dir = directory();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let sleepers: Vec<Sleeper> = (0..PROCESSES).map(|_| Sleeper::start()).collect();
    let sleeps = |pid| {
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        name == "sleep\n" && state_of(pid) == Some('S')
    };
    thread::scope(|scope| {
        for (number, sleeper) in sleepers.iter().enumerate() {
            wait_for("a sleeping process", || sleeps(sleeper.pid()));
            let place = |name: &str| dir.path().join(format!("{number}.{name}"));
            let (own, others) = (place("own"), place("others"));
            let (address, scratch) = (&service.address, place("request"));
            fs::create_dir(&own).unwrap();
            fs::create_dir(&others).unwrap();
            chown(&others, Some(NOBODY), Some(NOBODY)).unwrap();
            let opts = move |dir: &Path| CriuOpts {
                images_dir_fd: -1,
                images_dir: Some(dir.as_os_str().as_encoded_bytes().to_vec()),
                pid: Some(sleeper.pid()),
                leave_running: Some(true),
                // Another dump may hold the process for a moment.
                timeout: Some(60),
                ..CriuOpts::default()
            };
            scope.spawn(move || {
                let request = of_type(CriuReqType::Dump);
                let request = CriuReq { opts: Some(opts(&own)), ..request };
                let client = Client::of_service(address).unwrap();
                let (_, response) = client.ask(&request);
                assert!(response.success, "{response:?}");
                assert!(own.join("inventory.img").exists());
            });
            scope.spawn(move || {
                let request = of_type(CriuReqType::Dump);
                let request = CriuReq { opts: Some(opts(&others)), ..request };
                let response = ask_as(NOBODY, address, &request, &scratch);
                assert!(!response.success && response.cr_errmsg.is_some(), "{response:?}");
                assert!(!others.join("inventory.img").exists());
            });
        }
    });
    assert!(sleepers.iter().all(|sleeper| sleeps(sleeper.pid())));
    assert!(answers(&service));
}
