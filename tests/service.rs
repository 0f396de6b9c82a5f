//! The service: what container runtimes and libraries ask of `rcriu swrk` and `rcriu service`, by
//! requests that are made here.

mod common;

use std::{
    fs::{self, File},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::Command,
    thread,
};

use common::{
    Cap,
    client::{Client, Service, of_type, task},
    live::{Live, engine, wait_for},
    require,
};
use prost::Message;
use rcriu::proto::rpc::{
    CriuFeatures, CriuOpts, CriuPageServerInfo, CriuReq, CriuReqType, CriuResp,
};

fn images(live: &Live) -> File {
    fs::create_dir_all(live.images()).unwrap();
    File::open(live.images()).unwrap()
}

/// The order and the numbers are those that runc and crun were seen to rely on.
#[test]
fn privileged_a_client_dumps_and_restores_a_tree() {
    require(Cap::Ptrace);
    let mut live = Live::workload("pipes");
    let dir = images(&live);
    let pid = live.root.as_raw();
    let dump = |running| CriuOpts {
        pid: Some(pid),
        leave_running: Some(running),
        log_file: Some(b"dump.log".to_vec()),
        ..CriuOpts::default()
    };
    let before = live.state();
    let client = Client::of_swrk();
    let (stages, response) = client.ask(&task(CriuReqType::Dump, &dir, dump(true)));
    assert!(response.success, "{response:?}");
    assert_eq!(response.dump.unwrap().restored, Some(false));
    let wanted = ["pre-dump", "network-lock", "query-ext-files", "post-dump", "network-unlock"];
    assert_eq!(stages, wanted);
    assert_eq!(client.end(), Some(0));
    before.assert_unchanged(&live.state_after(&before));

    let client = Client::of_swrk();
    let (stages, response) = client.ask(&task(CriuReqType::Dump, &dir, dump(false)));
    assert!(response.success, "{response:?}");
    assert_eq!(stages, wanted[..4]);
    assert_eq!(client.end(), Some(0));
    live.wait_gone();

    let client = Client::of_swrk();
    let opts = CriuOpts {
        rst_sibling: Some(true),
        evasive_devices: Some(true),
        log_file: Some(b"restore.log".to_vec()),
        ..CriuOpts::default()
    };
    let (stages, response) = client.ask(&task(CriuReqType::Restore, &dir, opts));
    assert!(response.success, "{response:?}");
    assert_eq!(response.restore.unwrap().pid, pid);
    assert_eq!(
        stages,
        [
            "pre-restore",
            "setup-namespaces",
            "post-setup-namespaces",
            "post-restore",
            "network-unlock",
            "pre-resume",
            "post-resume",
        ]
    );
    assert_eq!(client.end(), Some(0));
    // A sibling of the server is a child of the client.
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let parent = stat.rsplit(')').next().unwrap().split_whitespace().nth(1).unwrap().to_owned();
    assert_eq!(parent, std::process::id().to_string());
    let root = live.root;
    let now = live.state_restored(&before).restored(root);
    before.restored(root).assert_unchanged(&now);
    live.verdict();
    let log = fs::read_to_string(live.images().join("restore.log")).unwrap();
    assert!(log.lines().all(|line| line.starts_with("(00.") || line.starts_with('(')), "{log}");
}

#[test]
fn privileged_pre_dumps_of_one_connection_are_the_parents_of_a_dump() {
    require(Cap::Ptrace);
    let mut live = Live::workload("pipes");
    let pid = Some(live.root.as_raw());
    let [first, second] = ["1", "2"].map(|name| live.path(name));
    [&first, &second].into_iter().for_each(|dir| fs::create_dir(dir).unwrap());
    let open = |dir: &PathBuf| File::open(dir).unwrap();
    let client = Client::of_swrk();
    let opts = CriuOpts { pid, track_mem: Some(true), ..CriuOpts::default() };
    let (_, response) = client.ask(&task(CriuReqType::PreDump, &open(&first), opts));
    assert!(response.success, "{response:?}");
    let opts = CriuOpts { pid, parent_img: Some(b"../1".to_vec()), ..CriuOpts::default() };
    let (_, response) = client.ask(&task(CriuReqType::Dump, &open(&second), opts));
    assert!(response.success, "{response:?}");
    assert_eq!(client.end(), Some(0));
    live.wait_gone();
    assert_eq!(fs::read_link(second.join("parent")).unwrap(), Path::new("../1"));
}

#[test]
fn privileged_what_a_client_asks_for_in_vain_is_named() {
    require(Cap::Ptrace);
    let live = Live::workload("pipes");
    let dir = images(&live);
    let pid = live.root.as_raw();
    let cases: [(CriuOpts, &str, Option<i32>); 5] = [
        (CriuOpts { pid: Some(i32::MAX), ..CriuOpts::default() }, "there is no process", Some(3)),
        (CriuOpts::default(), "cannot be notified", None),
        (
            CriuOpts { pid: Some(pid), lazy_pages: Some(true), ..CriuOpts::default() },
            "--lazy-pages is not supported yet",
            None,
        ),
        (
            CriuOpts { pid: Some(pid), empty_ns: Some(1), ..CriuOpts::default() },
            "empty_ns is 0x1",
            None,
        ),
        (
            CriuOpts {
                pid: Some(pid),
                config_file: Some(live.path("").into_os_string().into_encoded_bytes()),
                ..CriuOpts::default()
            },
            "read configuration file",
            Some(nix::libc::EISDIR),
        ),
    ];
    for (opts, wanted, errno) in cases {
        let _ = fs::remove_file(live.images().join("dump.log"));
        let opts = CriuOpts { log_file: Some(b"dump.log".to_vec()), ..opts };
        let client = Client::of_swrk();
        let (_, response) = client.ask(&task(CriuReqType::Dump, &dir, opts));
        let said = String::from_utf8(response.cr_errmsg.unwrap()).unwrap();
        assert!(!response.success && said.contains(wanted), "{said}");
        assert_eq!(response.cr_errno, errno, "{said}");
        assert_eq!(client.end(), Some(1));
        // Runtimes show the lines with errors.
        let log = fs::read_to_string(live.images().join("dump.log")).unwrap_or_default();
        let errors = log.lines().filter(|line| line.contains("Error ("));
        assert!(errors.clone().any(|line| line.contains(wanted)), "{log}");
    }
    for kind in [CriuReqType::PageServer, CriuReqType::CpuinfoDump] {
        let client = Client::of_swrk();
        // The processor would be described in a directory that is not named.
        let (_, response) = client.ask(&of_type(kind));
        assert!(!response.success && response.r#type() == kind, "{response:?}");
        assert_eq!(client.end(), Some(1));
    }
}

#[test]
fn privileged_a_client_starts_a_page_server_and_dumps_to_it() {
    require(Cap::Ptrace);
    let mut live = Live::workload("pipes");
    for (kind, name) in
        [(CriuReqType::PageServer, "received"), (CriuReqType::PageServerChld, "of-child")]
    {
        let received = live.path(name);
        fs::create_dir(&received).unwrap();
        let opened = File::open(&received).unwrap();
        let client = Client::of_swrk();
        let place = CriuPageServerInfo {
            address: Some(b"127.0.0.1".to_vec()),
            ..CriuPageServerInfo::default()
        };
        let opts = CriuOpts {
            ps: Some(place.clone()),
            log_file: Some(b"server.log".to_vec()),
            ..CriuOpts::default()
        };
        let request = CriuReq { keep_open: Some(true), ..task(kind, &opened, opts) };
        let (_, response) = client.ask(&request);
        assert!(response.success && response.r#type() == kind, "{response:?}");
        let server = response.ps.unwrap();
        live.images_name = if kind == CriuReqType::PageServer { "sent" } else { "sent-to-child" };
        let dir = images(&live);
        let opts = CriuOpts {
            pid: Some(live.root.as_raw()),
            leave_running: Some(true),
            ps: Some(CriuPageServerInfo { port: server.port, ..place }),
            notify_scripts: None,
            ..CriuOpts::default()
        };
        let dumper = Client::of_swrk();
        let (_, response) = dumper.ask(&task(CriuReqType::Dump, &dir, opts));
        assert!(response.success, "{response:?}");
        assert_eq!(dumper.end(), Some(0));
        if kind == CriuReqType::PageServerChld {
            let pid = server.pid.map(i32::cast_unsigned);
            let (_, response) = client.ask(&CriuReq { pid, ..of_type(CriuReqType::WaitPid) });
            assert!(response.success && response.status == Some(0), "{response:?}");
        }
        assert!(received.join("pages-1.img").exists() && received.join("server.log").exists());
        assert!(!live.images().join("pages-1.img").exists());
        assert_eq!(client.end(), Some(0));
    }
    live.verdict();
}

#[test]
fn a_client_describes_and_compares_the_processor() {
    let dir = tempfile::tempdir().unwrap();
    let opened = File::open(dir.path()).unwrap();
    let ask = |kind, bits| {
        let client = Client::of_swrk();
        let opts = CriuOpts { cpu_cap: bits, ..CriuOpts::default() };
        let (stages, response) = client.ask(&task(kind, &opened, opts));
        assert!(stages.is_empty(), "{stages:?}");
        client.end();
        response.success
    };
    assert!(!ask(CriuReqType::CpuinfoCheck, None));
    assert!(ask(CriuReqType::CpuinfoDump, None));
    let whole = fs::read(dir.path().join("cpuinfo.img")).unwrap();
    for bits in [None, Some(0), Some(4), Some(u32::MAX)] {
        assert!(ask(CriuReqType::CpuinfoCheck, bits), "{bits:?}");
    }
    fs::write(dir.path().join("cpuinfo.img"), &whole[..whole.len() - 1]).unwrap();
    assert!(!ask(CriuReqType::CpuinfoCheck, None));
}

/// Each task has the log that its request names.
#[test]
fn privileged_each_task_of_a_connection_has_its_own_log() {
    require(Cap::Ptrace);
    let live = Live::workload("pipes");
    let pid = Some(live.root.as_raw());
    let client = Client::of_swrk();
    for name in ["1", "2"] {
        fs::create_dir(live.path(name)).unwrap();
        let dir = File::open(live.path(name)).unwrap();
        let opts = CriuOpts { pid, log_file: Some(b"dump.log".to_vec()), ..CriuOpts::default() };
        let (_, response) = client.ask(&task(CriuReqType::PreDump, &dir, opts));
        assert!(response.success, "{response:?}");
    }
    client.end();
    for name in ["1", "2"] {
        let log = fs::read_to_string(live.path(name).join("dump.log")).unwrap();
        assert_eq!(log.matches("stopped").count(), 1, "{name}: {log}");
    }
}

#[test]
fn versions_and_features_are_told() {
    let client = Client::of_swrk();
    // As libcriu and go-criu ask.
    let opts = Some(CriuOpts { images_dir_fd: -1, ..CriuOpts::default() });
    for opts in [None, opts] {
        let request = CriuReq { opts, keep_open: Some(true), ..of_type(CriuReqType::Version) };
        let (_, response) = client.ask(&request);
        let version = response.version.unwrap();
        assert_eq!((version.major_number, version.minor_number), (4, 2));
    }
    let asked = CriuFeatures { mem_track: Some(true), ..CriuFeatures::default() };
    let request = CriuReq { features: Some(asked), ..of_type(CriuReqType::FeatureCheck) };
    let (_, response) = client.ask(&request);
    let found = response.features.unwrap();
    assert!(found.mem_track.is_some() && found.lazy_pages.is_none());
    assert_eq!(client.end(), Some(0));
}

#[test]
fn a_service_serves_many_clients_at_once_and_one_at_a_name() {
    let service = Service::start();
    thread::scope(|scope| {
        for _ in 0..100 {
            scope.spawn(|| {
                let client = Client::of_service(&service.address).unwrap();
                let (_, response) = client.ask(&of_type(CriuReqType::Version));
                assert!(response.success);
            });
        }
    });
    let second = Command::new(engine())
        .args(["service", "--address"])
        .arg(&service.address)
        .output()
        .unwrap();
    let said = String::from_utf8(second.stderr).unwrap();
    assert!(!second.status.success() && said.contains("in use by another service"), "{said}");
}

/// As libcriu and pycriu do it: the answer to the client that was killed waits in the restored one.
#[test]
fn privileged_a_client_dumps_itself_and_is_told_when_it_is_restored() {
    const SCRIPT: &str = "import socket, sys
client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
client.connect(sys.argv[1])
client.send(open(sys.argv[2], 'rb').read())
answer = client.recv(65536)
assert client.recv(1) == b''
open(sys.argv[3] + '.new', 'wb').write(answer)
import os
os.rename(sys.argv[3] + '.new', sys.argv[3])";
    require(Cap::Ptrace);
    let service = Service::start();
    let dir = tempfile::tempdir().unwrap();
    let [request, answer, images] =
        ["request", "answer", "images"].map(|name| dir.path().join(name));
    fs::create_dir(&images).unwrap();
    let opts = CriuOpts {
        images_dir_fd: -1,
        images_dir: Some(images.as_os_str().as_encoded_bytes().to_vec()),
        ..CriuOpts::default()
    };
    for leave_running in [true, false] {
        let opts = CriuOpts { leave_running: Some(leave_running), ..opts.clone() };
        let bytes = CriuReq { opts: Some(opts), ..of_type(CriuReqType::Dump) }.encode_to_vec();
        fs::write(&request, bytes).unwrap();
        let null = || File::options().read(true).write(true).open("/dev/null").unwrap();
        let mut client = Command::new("setsid")
            .args(["/usr/bin/python3", "-c", SCRIPT])
            .args([&service.address, &request, &answer])
            .stdin(null())
            .stdout(null())
            .stderr(null())
            .spawn()
            .unwrap();
        let ended = client.wait().unwrap();
        if leave_running {
            assert!(ended.success(), "{ended}");
        } else {
            assert_eq!(std::os::unix::process::ExitStatusExt::signal(&ended), Some(9), "{ended}");
            assert!(!answer.exists() && images.join("inventory.img").exists());
            let mut restore = Command::new(engine());
            restore.args(["restore", "-d", "-D"]).arg(&images).arg("-W").arg(dir.path());
            let output = common::live::bounded(restore, &dir.path().join("said"));
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(output.status.success(), "{said}");
            wait_for("the answer to the restored client", || answer.exists());
        }
        let response = CriuResp::decode(&*fs::read(&answer).unwrap()).unwrap();
        assert!(response.success && response.r#type() == CriuReqType::Dump, "{response:?}");
        assert_eq!(response.dump.unwrap().restored, Some(!leave_running));
        fs::remove_file(&answer).unwrap();
    }
}

/// A user gets what he could do himself: a process of root's is not his.
#[test]
fn privileged_a_service_does_no_more_for_a_user_than_he_could_himself() {
    const NOBODY: u32 = 65534;
    require(Cap::Ptrace);
    let service = Service::start();
    let mut live = Live::workload("pipes");
    let before = live.state();
    let dir = tempfile::tempdir().unwrap();
    std::os::unix::fs::chown(dir.path(), Some(NOBODY), Some(NOBODY)).unwrap();
    let opts = CriuOpts {
        images_dir_fd: -1,
        images_dir: Some(dir.path().as_os_str().as_encoded_bytes().to_vec()),
        pid: Some(live.root.as_raw()),
        ..CriuOpts::default()
    };
    let request = CriuReq { opts: Some(opts), ..of_type(CriuReqType::Dump) };
    fs::write(dir.path().join("request"), request.encode_to_vec()).unwrap();
    // Python, since a thread of this program cannot take another user's ids by itself.
    const SCRIPT: &str = "import socket, sys
client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
client.connect(sys.argv[1])
client.send(open(sys.argv[2], 'rb').read())
sys.stdout.buffer.write(client.recv(65536))";
    let output = Command::new("/usr/bin/python3")
        .args(["-c", SCRIPT])
        .arg(&service.address)
        .arg(dir.path().join("request"))
        .uid(NOBODY)
        .gid(NOBODY)
        .output()
        .unwrap();
    let response = CriuResp::decode(output.stdout.as_slice()).unwrap();
    assert!(!response.success, "{response:?}");
    assert!(!dir.path().join("inventory.img").exists());
    before.assert_unchanged(&live.state_after(&before));
}
