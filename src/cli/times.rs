//! Printed times: RFC 3339 with the offset of the local time zone.

use std::time::SystemTime;

use anyhow::Context as _;
use jiff::{Zoned, tz::TimeZone};

/// Formats a time, such as `2026-03-01T12:00:00+01:00`.
///
/// # Errors
/// A time outside the calendar's range.
pub(super) fn shown(time: SystemTime) -> anyhow::Result<String> {
    let zoned = Zoned::try_from(time).context("convert the time of an inventory")?;
    Ok(text(&zoned))
}

/// Formats the current time like [`shown`].
pub(super) fn now() -> String {
    text(&Zoned::now())
}

fn text(zoned: &Zoned) -> String {
    zoned.strftime("%Y-%m-%dT%H:%M:%S%:z").to_string()
}

/// Returns the name of the local time zone, such as `Europe/Berlin`.
pub(super) fn zone() -> String {
    let zone = TimeZone::system();
    match zone.iana_name() {
        Some(name) => name.to_owned(),
        None => Zoned::now().strftime("%Z").to_string(),
    }
}
