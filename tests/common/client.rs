//! Clients of `rcriu swrk` and `rcriu service`, whose requests are made here.

use std::{
    fs::{self, File},
    os::fd::{AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use nix::sys::{
    signal::{Signal, kill},
    socket::{
        AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect, recv, send, socket,
        socketpair,
    },
};
use prost::Message;
use rcriu::proto::rpc::{CriuCgMode, CriuOpts, CriuReq, CriuReqType, CriuResp};

use super::live::{engine, state_of, wait_for};

/// The longest response, in bytes.
const LONGEST: usize = 1 << 16;

/// A client, with the program that serves it if it was started for that.
pub struct Client {
    socket: OwnedFd,
    server: Option<Child>,
}

impl Client {
    /// Starts `rcriu swrk`.
    pub fn of_swrk() -> Self {
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
                .unwrap();
        // As its standard input, no other program inherits the socket.
        let server = Command::new(engine())
            .args(["swrk", "0"])
            .stdin(theirs)
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        Self { socket: ours, server: Some(server) }
    }

    /// Connects to a service.
    pub fn of_service(address: &Path) -> nix::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC;
        let socket = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
        connect(socket.as_raw_fd(), &UnixAddr::new(address)?)?;
        Ok(Self { socket, server: None })
    }

    pub fn send(&self, request: &CriuReq) {
        self.send_bytes(&request.encode_to_vec()).unwrap();
    }

    pub fn send_bytes(&self, bytes: &[u8]) -> nix::Result<usize> {
        send(self.socket.as_raw_fd(), bytes, MsgFlags::MSG_NOSIGNAL)
    }

    /// Returns the next response; `None` at the end.
    pub fn receive(&self) -> Option<CriuResp> {
        let mut packet = vec![0; LONGEST];
        let read = recv(self.socket.as_raw_fd(), &mut packet, MsgFlags::empty()).unwrap_or(0);
        (read > 0).then(|| CriuResp::decode(&packet[..read]).unwrap())
    }

    /// Sends a request, agrees to all notifications, and returns these with the response.
    pub fn ask(&self, request: &CriuReq) -> (Vec<String>, CriuResp) {
        self.send(request);
        let mut stages = Vec::new();
        loop {
            let response = self.receive().expect("a response");
            if response.r#type() != CriuReqType::Notify {
                return (stages, response);
            }
            let stage = response.notify.and_then(|notify| notify.script).unwrap();
            stages.push(String::from_utf8(stage).unwrap());
            self.agree();
        }
    }

    pub fn agree(&self) {
        self.send(&CriuReq { notify_success: Some(true), ..of_type(CriuReqType::Notify) });
    }

    /// Waits until the server has ended, and returns its exit code.
    pub fn end(self) -> Option<i32> {
        let Self { socket, server } = self;
        drop(socket);
        server.and_then(|mut server| server.wait().unwrap().code())
    }
}

pub fn of_type(kind: CriuReqType) -> CriuReq {
    CriuReq { r#type: kind.into(), ..CriuReq::default() }
}

/// Returns a request for a task with the images in `dir`, which must stay open.
pub fn task(kind: CriuReqType, dir: &File, opts: CriuOpts) -> CriuReq {
    let opts = CriuOpts {
        images_dir_fd: dir.as_raw_fd(),
        log_level: Some(4),
        notify_scripts: Some(true),
        manage_cgroups_mode: Some(CriuCgMode::Ignore.into()),
        ..opts
    };
    CriuReq { opts: Some(opts), ..of_type(kind) }
}

/// A service in the background, which ends with this.
pub struct Service {
    pub address: PathBuf,
    pidfile: PathBuf,
    _dir: tempfile::TempDir,
}

impl Service {
    pub fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (address, pidfile) = (dir.path().join("socket"), dir.path().join("pid"));
        // Other users are to reach the socket.
        let open = <fs::Permissions as std::os::unix::fs::PermissionsExt>::from_mode(0o755);
        fs::set_permissions(dir.path(), open).unwrap();
        let mut command = Command::new(engine());
        command.args(["service", "-d", "--address"]).arg(&address);
        assert!(command.arg("--pidfile").arg(&pidfile).status().unwrap().success());
        Self { address, pidfile, _dir: dir }
    }

    pub fn pid(&self) -> nix::unistd::Pid {
        let text = fs::read_to_string(&self.pidfile).unwrap();
        nix::unistd::Pid::from_raw(text.trim().parse().unwrap())
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let pid = self.pid();
        kill(pid, Signal::SIGKILL).unwrap();
        // It is a child of the first process, or of the harness if that adopts orphans.
        let _ = nix::sys::wait::waitpid(pid, None);
        wait_for("the end of the service", || matches!(state_of(pid.as_raw()), None | Some('Z')));
    }
}
