//! What errors say, with what caused them, and what users are told of them.

use std::io::Write;

/// The target of messages that standard error gets in any case: logs that go there
/// leave them out.
pub const TOLD: &str = "rcriu::told";

/// Says something on standard error, and in the log.
pub fn tell(level: log::Level, message: &str) {
    // A failed write to standard error cannot be reported anywhere.
    let _ = writeln!(std::io::stderr(), "{message}");
    log::log!(target: TOLD, level, "{message}");
}

/// Returns what an error says, and what everything says that caused it.
pub fn with_sources(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
