//! `rcriu page-server`.

use std::{io::Write, process::ExitCode};

use anyhow::Context;

use super::{
    background::{self, Begun, write_pidfile},
    exit, report,
    task::PageServerOptions,
};
use crate::page_server::{PageServer, Place};

/// Receives the pages of one client. Starts its log by `start_log`.
pub(super) fn run(
    args: &PageServerOptions,
    start_log: impl FnOnce() -> anyhow::Result<()>,
) -> ExitCode {
    match serve(args, start_log) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            report(&error);
            ExitCode::from(exit::FAILED)
        }
    }
}

fn serve(
    args: &PageServerOptions,
    start_log: impl FnOnce() -> anyhow::Result<()>,
) -> anyhow::Result<u8> {
    let starting = match background::begin(args.daemon, args.status_fd, "the page server")? {
        Begun::Caller(code) => return Ok(code),
        Begun::Server(starting) => starting,
    };
    start_log()?;
    let server = PageServer::start(&args.server)?;
    write_pidfile(args.pidfile.as_deref())?;
    if let Some(address) = server.address() {
        log::info!("waiting for a dump at {address}");
        if matches!(args.server.client, Place::Address(_, 0)) {
            // Only now is there a port that the user can give to the dump.
            let mut out = std::io::stdout();
            writeln!(out, "{}", address.port())
                .and_then(|()| out.flush())
                .context("print the port")?;
        }
    }
    starting.ready()?;
    server.serve()?;
    Ok(exit::OK)
}
