//! Answers the requests of a client.

use std::{
    io::{self, Read, Write},
    sync::Arc,
};

use anyhow::Context;
use nix::{
    errno::Errno,
    sys::wait::{WaitStatus, waitpid},
    unistd::Pid,
};

use super::{channel::Channel, request};
use crate::{
    action::Client,
    causes::{self, with_sources},
    cli::{
        check_features, exit, report,
        task::{self, Requested, Task},
    },
    dump::DumpError,
    page_server::PageServer,
    proto::rpc::{
        CriuDumpResp, CriuFeatures, CriuPageServerInfo, CriuReq, CriuReqType, CriuResp,
        CriuRestoreResp, CriuVersion,
    },
    res::file::TakeMaster,
    restore::RestoreError,
    sys::{Features, daemon, supervise},
    units::HostPid,
};

/// The version of CRIU that a client finds: the one whose images and options rcriu has.
const VERSION: CriuVersion = CriuVersion {
    major_number: 4,
    minor_number: 2,
    gitid: None,
    sublevel: None,
    extra: None,
    name: None,
};

/// What a page server says first when it is ready; the port follows. No message begins with it.
const STARTED: u8 = 0;

/// Answers one client.
#[derive(Debug)]
pub(super) struct Answerer {
    channel: Arc<Channel>,
}

impl Answerer {
    pub(super) fn new(channel: Channel) -> Self {
        Self { channel: Arc::new(channel) }
    }

    /// Answers requests until the client has no more, and returns the exit code: that of the last
    /// task.
    pub(super) fn serve(&self) -> u8 {
        let mut code = exit::OK;
        loop {
            let request = match self.channel.receive() {
                Ok(None) => return code,
                Ok(Some(request)) => request,
                Err(error) => {
                    report(&error);
                    self.refuse(CriuReqType::Empty, &error);
                    return exit::FAILED;
                }
            };
            let kind = request.r#type();
            code = match self.handle(kind, &request) {
                Ok(code) => code,
                Err(error) => {
                    report(&error);
                    self.refuse(kind, &error);
                    exit::FAILED
                }
            };
            // A pre-dump is always followed by another one or by a dump.
            let goes_on = request.keep_open == Some(true) || kind == CriuReqType::PreDump;
            if !goes_on {
                return code;
            }
        }
    }

    fn handle(&self, kind: CriuReqType, request: &CriuReq) -> anyhow::Result<u8> {
        let yes = |response: CriuResp| {
            self.reply(CriuResp { r#type: kind.into(), success: true, ..response });
            Ok(exit::OK)
        };
        match kind {
            CriuReqType::Dump => Ok(self.task(kind, Task::Dump, request)),
            CriuReqType::PreDump | CriuReqType::SinglePreDump => {
                Ok(self.task(kind, Task::PreDump, request))
            }
            CriuReqType::Restore => Ok(self.task(kind, Task::Restore, request)),
            CriuReqType::Version => yes(CriuResp { version: Some(VERSION), ..CriuResp::default() }),
            CriuReqType::FeatureCheck => {
                let features = features(request.features.as_ref());
                yes(CriuResp { features: Some(features), ..CriuResp::default() })
            }
            CriuReqType::Check => {
                let mut found = Vec::new();
                if check_features::run(&check_features::Wanted::default(), &mut found)? {
                    return yes(CriuResp::default());
                }
                let found = String::from_utf8_lossy(&found);
                anyhow::bail!("the kernel lacks a feature: {}", found.lines().last().unwrap_or("?"))
            }
            CriuReqType::WaitPid => {
                let pid = request.pid.and_then(|pid| i32::try_from(pid).ok()).unwrap_or(0);
                let ended = loop {
                    match waitpid(Pid::from_raw(pid.max(1)), None) {
                        Err(Errno::EINTR) => {}
                        ended => break ended,
                    }
                };
                let status = match ended {
                    Ok(WaitStatus::Exited(_, code)) => code,
                    Ok(WaitStatus::Signaled(_, signal, _)) => signal as i32,
                    Ok(_) => 0,
                    Err(errno) => {
                        return Err(
                            anyhow::Error::new(errno).context(format!("wait for process {pid}"))
                        );
                    }
                };
                yes(CriuResp { status: Some(status), ..CriuResp::default() })
            }
            CriuReqType::CpuinfoDump | CriuReqType::CpuinfoCheck => {
                Ok(self.task(kind, Task::Cpuinfo, request))
            }
            CriuReqType::PageServer | CriuReqType::PageServerChld => {
                let ps = Some(self.page_server(kind, request)?);
                yes(CriuResp { ps, ..CriuResp::default() })
            }
            CriuReqType::Notify | CriuReqType::Empty => {
                anyhow::bail!(
                    "a request has the type {}, which asks for nothing",
                    kind.as_str_name()
                )
            }
        }
    }

    /// Runs a task, and answers when it is done.
    fn task(&self, kind: CriuReqType, task: Task, request: &CriuReq) -> u8 {
        let opts = request.opts.clone().unwrap_or_default();
        let dumps_itself = task == Task::Dump && opts.pid.is_none_or(|pid| pid <= 0);
        let survives = opts.leave_running == Some(true) || opts.leave_stopped == Some(true);
        let mut reply = |result: anyhow::Result<Option<HostPid>>| match result {
            // It receives an answer when it is restored.
            Ok(_) if dumps_itself && !survives => {}
            Ok(root) => self.reply(CriuResp {
                r#type: kind.into(),
                success: true,
                dump: (kind == CriuReqType::Dump).then_some(CriuDumpResp { restored: Some(false) }),
                restore: root.map(|root| CriuRestoreResp { pid: root.0 }),
                ..CriuResp::default()
            }),
            Err(error) => self.refuse(kind, &error),
        };
        let log = request::log_of(&opts, self.channel.peer);
        if dumps_itself && opts.notify_scripts == Some(true) {
            let error = anyhow::anyhow!(
                "a client that dumps itself cannot be notified: it stands still\nhelp: leave out \
                 notify_scripts"
            );
            return task::refuse_client(log.as_deref(), error, &mut reply);
        }
        let own_end = if dumps_itself { self.channel.inode().map(Some) } else { Ok(None) };
        let own_end = match own_end {
            Ok(own_end) => own_end,
            Err(error) => return task::refuse_client(log.as_deref(), error, &mut reply),
        };
        let words = match request::words(kind, task, &opts, self.channel.peer) {
            Ok(words) => words,
            Err(error) => return task::refuse_client(log.as_deref(), error, &mut reply),
        };
        let notified = opts.notify_scripts == Some(true);
        let client = notified.then(|| Arc::clone(&self.channel) as Arc<dyn Client>);
        let request::Words { options, config, operands } = words;
        let takes = opts.orphan_pts_master == Some(true);
        let taker = takes.then(|| Arc::clone(&self.channel) as Arc<dyn TakeMaster>);
        let requested = Requested { options, config, operands, log, client, taker, own_end };
        task::run_for_client(task, requested, &mut reply)
    }

    /// Starts a page server, and returns its pid and port. That of [`CriuReqType::PageServerChld`] stays a
    /// child, for which the client can wait.
    fn page_server(
        &self,
        kind: CriuReqType,
        request: &CriuReq,
    ) -> anyhow::Result<CriuPageServerInfo> {
        let opts = request.opts.clone().unwrap_or_default();
        let log = request::log_of(&opts, self.channel.peer);
        let words = request::words(kind, Task::PageServer, &opts, self.channel.peer)?;
        let request::Words { options, config, operands } = words;
        let requested =
            Requested { options, config, operands, log, client: None, taker: None, own_end: None };
        let (mut reader, mut writer) = io::pipe().context("make a pipe")?;
        let pid = supervise::apart(|| {
            let started = task::page_server_for_client(requested).and_then(|options| {
                let server = PageServer::start(&options)?;
                if kind == CriuReqType::PageServer {
                    daemon::leave_caller().context("go to the background")?;
                }
                Ok(server)
            });
            let said = match &started {
                Ok(server) => {
                    let port = server.address().map_or(0, |address| address.port());
                    writer.write_all(&[&[STARTED], &port.to_le_bytes()[..]].concat())
                }
                Err(error) => writer.write_all(with_sources(error.as_ref()).as_bytes()),
            };
            drop(writer);
            let served = started.and_then(|server| {
                said.context("tell the client the port")?;
                Ok(server.serve()?)
            });
            match served {
                Ok(()) => exit::OK,
                Err(error) => {
                    report(&error);
                    exit::FAILED
                }
            }
        })
        .context("start a process for the page server")?;
        let mut said = Vec::new();
        reader.read_to_end(&mut said).context("wait for the page server")?;
        match *said {
            [STARTED, low, high] => Ok(CriuPageServerInfo {
                pid: Some(pid.as_raw()),
                port: Some(u16::from_le_bytes([low, high]).into()),
                ..CriuPageServerInfo::default()
            }),
            [] => anyhow::bail!("the page server has ended before it was ready"),
            _ => anyhow::bail!(String::from_utf8_lossy(&said).into_owned()),
        }
    }

    fn reply(&self, response: CriuResp) {
        if let Err(error) = self.channel.send(&response) {
            log::warn!("cannot answer the client, process {}: {error}", self.channel.peer);
        }
    }

    fn refuse(&self, kind: CriuReqType, error: &anyhow::Error) {
        self.reply(CriuResp {
            r#type: kind.into(),
            success: false,
            cr_errno: errno(error),
            cr_errmsg: Some(with_sources(error.as_ref()).into_bytes()),
            ..CriuResp::default()
        });
    }
}

/// Returns the error number that a client gets, if there is one.
fn errno(error: &anyhow::Error) -> Option<i32> {
    let of_kind = error.chain().find_map(|cause| {
        match (cause.downcast_ref::<DumpError>(), cause.downcast_ref::<RestoreError>()) {
            (Some(DumpError::NoProcess { .. }), _) => Some(Errno::ESRCH),
            (_, Some(RestoreError::PidInUse { .. })) => Some(Errno::EEXIST),
            _ => None,
        }
    });
    of_kind.or_else(|| error.chain().find_map(causes::errno)).map(|errno| errno as i32)
}

/// Returns which of the features that a client asks for there are.
fn features(asked: Option<&CriuFeatures>) -> CriuFeatures {
    let found = Features::probe();
    let Some(asked) = asked else { return CriuFeatures::default() };
    CriuFeatures {
        mem_track: asked.mem_track.map(|_| found.write_protect_private || found.soft_dirty),
        lazy_pages: asked.lazy_pages.map(|_| false),
        pidfd_store: asked.pidfd_store.map(|_| found.pidfd_getfd),
    }
}
