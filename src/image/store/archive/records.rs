//! The fields of a member that precede its own header: long names of GNU tar and pax records.

use std::{
    collections::BTreeMap,
    str,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use tar::EntryType;

/// Before the name of an extended attribute in the key of a record, as GNU tar and star write it.
const XATTR: &[u8] = b"SCHILY.xattr.";

/// The fields of a member from the headers before its own.
#[derive(Default)]
pub(super) struct Records {
    pub(super) path: Option<Vec<u8>>,
    pub(super) link: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    pub(super) uid: Option<u64>,
    pub(super) gid: Option<u64>,
    pub(super) accessed: Option<SystemTime>,
    pub(super) modified: Option<SystemTime>,
    pub(super) changed: Option<SystemTime>,
    /// Extended attributes by name.
    pub(super) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    pub(super) sparse_major: Option<u64>,
    pub(super) sparse_minor: Option<u64>,
    pub(super) sparse_size: Option<u64>,
    pub(super) sparse_name: Option<Vec<u8>>,
    /// A map in the pax records themselves, as GNU tar once wrote it.
    pub(super) sparse_inline: bool,
}

impl Records {
    /// Adds the contents of a header of this kind.
    pub(super) fn take(&mut self, kind: EntryType, mut bytes: Vec<u8>) -> Result<(), &'static str> {
        if kind.is_gnu_longname() || kind.is_gnu_longlink() {
            let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
            bytes.truncate(end);
            let field = if kind.is_gnu_longname() { &mut self.path } else { &mut self.link };
            *field = Some(bytes);
            return Ok(());
        }
        if kind.is_pax_global_extensions() {
            // Comments, such as the commit in an archive from `git archive`.
            return Ok(());
        }
        let mut rest = &bytes[..];
        while let Some((key, value, next)) = record(rest)? {
            self.take_record(key, value)?;
            rest = next;
        }
        Ok(())
    }

    fn take_record(&mut self, key: &[u8], value: &[u8]) -> Result<(), &'static str> {
        let number = || {
            let digits = str::from_utf8(value).ok();
            digits.and_then(|digits| digits.parse().ok()).ok_or("a pax record is no number")
        };
        match key {
            b"path" => self.path = Some(value.to_owned()),
            b"linkpath" => self.link = Some(value.to_owned()),
            b"size" => self.size = Some(number()?),
            b"uid" => self.uid = Some(number()?),
            b"gid" => self.gid = Some(number()?),
            b"atime" => self.accessed = time(value),
            b"mtime" => self.modified = time(value),
            b"ctime" => self.changed = time(value),
            b"GNU.sparse.major" => self.sparse_major = Some(number()?),
            b"GNU.sparse.minor" => self.sparse_minor = Some(number()?),
            b"GNU.sparse.realsize" => self.sparse_size = Some(number()?),
            b"GNU.sparse.name" => self.sparse_name = Some(value.to_owned()),
            b"GNU.sparse.map" | b"GNU.sparse.numblocks" => self.sparse_inline = true,
            _ => {
                if let Some(name) = key.strip_prefix(XATTR) {
                    self.xattrs.insert(unquoted(name), value.to_owned());
                }
            }
        }
        Ok(())
    }
}

/// Splits the first record off: `LENGTH KEY=VALUE\n`, where the length is that of the whole record.
/// A value may contain any byte.
#[expect(clippy::type_complexity, reason = "a key, a value, and the rest")]
fn record(bytes: &[u8]) -> Result<Option<(&[u8], &[u8], &[u8])>, &'static str> {
    // GNU tar ends the records with a zero byte, others with the end of the data.
    if matches!(bytes, [] | [0, ..]) {
        return Ok(None);
    }
    let split = || {
        let space = bytes.iter().position(|byte| *byte == b' ')?;
        let len: usize = str::from_utf8(&bytes[..space]).ok()?.parse().ok()?;
        let (record, rest) = bytes.split_at_checked(len)?;
        let record = record.get(space + 1..)?.strip_suffix(b"\n")?;
        let equals = record.iter().position(|byte| *byte == b'=')?;
        Some((&record[..equals], &record[equals + 1..], rest))
    };
    split().map(Some).ok_or("the pax records before a member are malformed")
}

/// Decodes the name of an attribute: GNU tar writes `=` as `%3D`, and `%` as `%25`.
fn unquoted(name: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(name.len());
    let mut rest = name;
    while let [first, others @ ..] = rest {
        let (byte, next) = match rest {
            [b'%', b'3', b'D', next @ ..] => (b'=', next),
            [b'%', b'2', b'5', next @ ..] => (b'%', next),
            _ => (*first, others),
        };
        plain.push(byte);
        rest = next;
    }
    plain
}

/// Reads a time: seconds since 1970 in decimal with a fraction, whose digits after the ninth
/// are dropped.
fn time(value: &[u8]) -> Option<SystemTime> {
    /// Digits of nanoseconds.
    const DIGITS: usize = 9;
    let text = str::from_utf8(value).ok()?;
    let (is_before, digits) = match text.strip_prefix('-') {
        Some(digits) => (true, digits),
        None => (false, text),
    };
    let (seconds, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    if !fraction.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let nanoseconds = format!("{fraction:0<DIGITS$.DIGITS$}").parse().ok()?;
    let distance = Duration::new(seconds.parse().ok()?, nanoseconds);
    if is_before { UNIX_EPOCH.checked_sub(distance) } else { UNIX_EPOCH.checked_add(distance) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn records(bytes: &[u8]) -> Result<Records, &'static str> {
        let mut records = Records::default();
        records.take(EntryType::XHeader, bytes.to_owned()).map(|()| records)
    }

    /// Returns a record with its length, whose digits count, too.
    fn written(text: &[u8]) -> Vec<u8> {
        let rest = text.len() + 2;
        let mut len = rest + 1;
        while rest + len.to_string().len() != len {
            len += 1;
        }
        [len.to_string().as_bytes(), b" ", text, b"\n"].concat()
    }

    #[test]
    fn values_may_contain_any_byte() {
        let texts: [&[u8]; 3] =
            [b"path=a\nb", b"SCHILY.xattr.user.a=\n\0=\xff", b"SCHILY.xattr.user.%3D%25%41="];
        let mut bytes = texts.map(written).concat();
        let found = records(&bytes).unwrap();
        assert_eq!(found.path.as_deref(), Some(&b"a\nb"[..]));
        let expected = [(&b"user.=%%41"[..], &b""[..]), (b"user.a", b"\n\0=\xff")];
        let expected = expected.map(|(name, value)| (name.to_owned(), value.to_owned()));
        assert_eq!(found.xattrs, BTreeMap::from(expected));
        // Zero bytes may follow.
        bytes.extend([0; 3]);
        assert_eq!(records(&bytes).unwrap().xattrs.len(), 2);
    }

    #[test]
    fn malformed_records_are_errors() {
        for bad in [
            &b"path=a\n"[..],
            b"9 path=ab\n",
            b"8 path=ab\n",
            b"99999999999999999999 path=a\n",
            b"4294967295 path=a\n",
            b"7 path\n\n",
            b"0 path=a\n",
            b"1 path=a\n",
            b"2 ath=a\n",
            b"10 uid=-1a\n",
        ] {
            assert!(records(bad).is_err(), "{}", bad.escape_ascii());
        }
    }

    #[test]
    fn times_keep_their_nanoseconds() {
        let after = |seconds, nanoseconds| UNIX_EPOCH + Duration::new(seconds, nanoseconds);
        let cases = [
            ("1700000000.123456789", Some(after(1_700_000_000, 123_456_789))),
            ("1.5", Some(after(1, 500_000_000))),
            ("7", Some(after(7, 0))),
            ("7.", Some(after(7, 0))),
            ("0.0000000019", Some(after(0, 1))),
            ("-1.25", Some(UNIX_EPOCH - Duration::new(1, 250_000_000))),
            ("99999999999999999999", None),
            ("18446744073709551615", None),
            ("1.-5", None),
            ("1e9", None),
            ("", None),
        ];
        for (text, expected) in cases {
            assert_eq!(time(text.as_bytes()), expected, "{text}");
        }
    }
}
