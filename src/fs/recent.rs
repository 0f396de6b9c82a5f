//! The last messages of a mount, with the causes of failed reads.
//!
//! A reader gets only an errno, and not every machine has a system log. So the daemon keeps
//! its last messages, and shows them as an attribute of the root of the mount
//! ([`LOG_XATTR`]).

use std::{
    collections::VecDeque,
    sync::{Mutex, OnceLock, PoisonError},
};

use log::Level;

/// The extended attribute of a mount's root that holds its last messages, one per line.
pub const LOG_XATTR: &str = "user.imgfs.log";

/// The extended attribute of a mount's root that says where all messages go.
pub const PLACE_XATTR: &str = "user.imgfs.log-place";

/// The most bytes of all messages: less than an attribute can hold (`XATTR_SIZE_MAX`,
/// `linux/limits.h`).
const KEPT_BYTES: usize = 48 << 10;

/// The most bytes of one message.
const LINE_BYTES: usize = 4 << 10;

static RECENT: Mutex<Recent> = Mutex::new(Recent { lines: VecDeque::new(), bytes: 0 });

/// Where all messages go.
static PLACE: OnceLock<String> = OnceLock::new();

/// Remembers where all messages go, for the users of the mount.
pub fn set_place(place: &str) {
    // The first one stays: a process logs to one place.
    let _ = PLACE.set(place.to_owned());
}

/// Returns where all messages go; empty if that was never said.
pub(super) fn place() -> &'static str {
    PLACE.get().map_or("", String::as_str)
}

#[derive(Debug)]
struct Recent {
    lines: VecDeque<Line>,
    bytes: usize,
}

#[derive(Debug)]
struct Line {
    /// When it was logged first.
    time: String,
    text: String,
    /// The number of consecutive times it was logged.
    times: u64,
}

impl Recent {
    fn note(&mut self, time: String, mut text: String) {
        // A reader that retries would push out all other messages.
        if let Some(same) = self.lines.iter_mut().find(|line| line.text == text) {
            same.times += 1;
            return;
        }
        let mut end = text.len().min(LINE_BYTES);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        text.truncate(end);
        self.bytes += time.len() + text.len();
        self.lines.push_back(Line { time, text, times: 1 });
        while self.bytes > KEPT_BYTES
            && let Some(oldest) = self.lines.pop_front()
        {
            self.bytes -= oldest.time.len() + oldest.text.len();
        }
    }

    fn text(&self) -> String {
        let mut text = String::new();
        for line in &self.lines {
            text.push_str(&format!("{} {}", line.time, line.text));
            if line.times > 1 {
                text.push_str(&format!(" ({} times)", line.times));
            }
            text.push('\n');
        }
        text
    }
}

/// Keeps a message, if it is a warning or worse; `time` is when it was logged.
pub fn note(level: Level, time: impl FnOnce() -> String, text: impl FnOnce() -> String) {
    if level <= Level::Warn {
        let level = if level == Level::Error { "error" } else { "warning" };
        let text = format!("{level}: {}", text());
        let mut recent = RECENT.lock().unwrap_or_else(PoisonError::into_inner);
        recent.note(time(), text);
    }
}

/// Returns the kept messages.
pub(super) fn text() -> String {
    RECENT.lock().unwrap_or_else(PoisonError::into_inner).text()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_messages_are_kept_and_repeated_ones_counted() {
        let mut recent = Recent { lines: VecDeque::new(), bytes: 0 };
        for number in 0..3000 {
            recent.note("12:00".to_owned(), format!("error: read {number}"));
        }
        recent.note("12:01".to_owned(), "error: read 2999".to_owned());
        recent.note("12:02".to_owned(), "\u{e4}".repeat(5000));
        let text = recent.text();
        assert!(text.len() < 64 << 10 && text.len() > 32 << 10);
        assert!(!text.contains("read 17\n") && text.contains("12:00 error: read 2998\n"));
        assert!(text.contains("12:00 error: read 2999 (2 times)\n12:02 \u{e4}"));
    }
}
