//! How errors and warnings are worded: what happened, why, and what the user can do.
//!
//! The first line of a message says what happened to what. A message that knows a remedy
//! says it in a second line, which begins with [`HELP`]. An error has that line in its
//! `Display`, so the remedy stands next to the problem in the source:
//!
//! ```text
//! #[error("{path} is in use by {holder}\nhelp: wait until it has ended")]
//! ```
//!
//! Standard error and log files show the lines apart, see [`told`] and [`lines`]; what
//! must fit in one line (JSON, syslog, a message in a message) uses [`with_sources`] or
//! [`one_line`].

use std::{io::Write, path::Path};

use nix::errno::Errno;

/// What the line with a remedy begins with, after the end of the line before it.
pub const HELP: &str = "\nhelp: ";

/// The log target of messages that `tell` has already written to standard error: a log
/// that goes to standard error skips them.
pub const TOLD: &str = "rcriu::told";

/// Writes a message to standard error and to the log.
pub fn tell(level: log::Level, message: &str) {
    let prefix = match level {
        log::Level::Error => "error: ",
        log::Level::Warn => "warning: ",
        log::Level::Info | log::Level::Debug | log::Level::Trace => "",
    };
    // A failed write to standard error cannot be reported anywhere.
    let _ = writeln!(std::io::stderr(), "{}: {prefix}{}", program(), indented(message));
    log::log!(target: TOLD, level, "{message}");
}

/// Returns the name that messages begin with: that by which the user called this program.
pub fn program() -> String {
    let path = std::env::args_os().next().unwrap_or_default();
    Path::new(&path).file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// Whether the user called this program `criu`.
pub fn is_called_criu() -> bool {
    program() == "criu"
}

/// Returns what an error and its causes say, and below it the remedies that they know,
/// each in a line that begins with [`HELP`].
pub fn told(error: &(dyn std::error::Error + 'static)) -> String {
    let (mut problem, mut help) = (String::new(), String::new());
    for cause in std::iter::successors(Some(error), |error| error.source()) {
        let text = cause.to_string();
        let (what, remedy) = text.split_at(text.find(HELP).unwrap_or(text.len()));
        if !problem.is_empty() {
            problem.push_str(": ");
        }
        problem.push_str(what);
        help.push_str(remedy);
    }
    problem + &help
}

/// Returns what an error and its causes say, and the remedies that they know, in one line.
pub fn with_sources(error: &(dyn std::error::Error + 'static)) -> String {
    one_line(&told(error))
}

/// Returns the error number of an error, without those of its causes.
pub fn errno(error: &(dyn std::error::Error + 'static)) -> Option<Errno> {
    let of_io = |error: &std::io::Error| error.raw_os_error().map(Errno::from_raw);
    error
        .downcast_ref::<Errno>()
        .copied()
        .or_else(|| error.downcast_ref::<std::io::Error>().and_then(of_io))
}

/// Returns a message with its remedies in the same line.
pub fn one_line(message: &str) -> String {
    message.replace(HELP, "; ")
}

/// Returns a message as a terminal shows it: each remedy in an indented line of its own.
pub fn indented(message: &str) -> String {
    message.replace(HELP, "\n  help: ")
}

/// Returns what a message says happened, and its remedies.
pub fn lines(message: &str) -> (&str, impl Iterator<Item = &str>) {
    let mut lines = message.split(HELP);
    (lines.next().unwrap_or_default(), lines)
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("read /images/core-7.img\nhelp: run as root")]
    struct Read(#[source] Device);

    #[derive(Debug, thiserror::Error)]
    #[error("the disk is gone\nhelp: plug it in")]
    struct Device(#[source] io::Error);

    #[test]
    fn remedies_follow_the_problem_and_all_its_causes() {
        let error = Read(Device(io::Error::other("no answer")));
        let expected = "read /images/core-7.img: the disk is gone: no answer\nhelp: run as root\n\
                        help: plug it in";
        assert_eq!(told(&error), expected);
        assert_eq!(
            with_sources(&error),
            "read /images/core-7.img: the disk is gone: no answer; run as root; plug it in"
        );
        assert_eq!(
            indented(&told(&error)),
            "read /images/core-7.img: the disk is gone: no answer\n  help: run as root\n  help: \
             plug it in"
        );
        let text = told(&error);
        let (problem, help) = lines(&text);
        assert_eq!(problem, "read /images/core-7.img: the disk is gone: no answer");
        assert_eq!(help.collect::<Vec<_>>(), ["run as root", "plug it in"]);
    }

    #[test]
    fn a_message_without_a_remedy_is_one_line() {
        let error = io::Error::other("no answer");
        assert_eq!(told(&error), "no answer");
        assert_eq!(lines("no answer").1.count(), 0);
    }
}
