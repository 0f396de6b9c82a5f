//! The service: `rcriu swrk` and `rcriu service`, which container runtimes and libraries call.
//!
//! A client sends requests over a UNIX socket, each a protobuf message in a packet. A request for a
//! dump or a restore is turned into the options of the command line ([`request`]); the client is
//! notified of the stages ([`crate::action`]) and answers before the work goes on.

mod answer;
mod channel;
mod daemon;
mod request;

use std::process::ExitCode;

use anyhow::Context;

pub(super) use self::daemon::service;
use self::{answer::Answerer, channel::Channel};
use super::{background::take, exit, report};

/// Answers the client behind a descriptor that this program has inherited.
pub(super) fn swrk(fd: i32) -> ExitCode {
    let channel = take(fd).and_then(Channel::new);
    match channel.with_context(|| format!("use descriptor {fd} as the socket of a client")) {
        Ok(channel) => ExitCode::from(Answerer::new(channel).serve()),
        Err(error) => {
            report(&error);
            ExitCode::from(exit::AS_CRIU_FAILS)
        }
    }
}
