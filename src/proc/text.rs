//! The syntax that files in `/proc` share: lines, keys, numbers, escapes.

/// How many bytes of a text an error quotes, at most.
const QUOTED_BYTES: usize = 80;

/// A defect in a text, before the file name is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Defect {
    /// The expected text.
    pub(crate) what: &'static str,
    /// The start of what was found.
    pub(crate) found: String,
}

impl Defect {
    /// Expected `what`, but found `found`.
    pub(super) fn new(what: &'static str, found: &[u8]) -> Self {
        let quoted = &found[..found.len().min(QUOTED_BYTES)];
        Self { what, found: String::from_utf8_lossy(quoted).into_owned() }
    }

    /// Expected `what`, but the text has nothing there.
    pub(super) const fn missing(what: &'static str) -> Self {
        Self { what, found: String::new() }
    }
}

/// The result of a parser.
pub(super) type Parsed<T> = Result<T, Defect>;

/// Returns the lines of `text`, except empty ones.
pub(super) fn lines(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    text.split(|&byte| byte == b'\n').filter(|line| !line.is_empty())
}

/// Returns the words of `text`, separated by blanks.
pub(super) fn words(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    text.split(u8::is_ascii_whitespace).filter(|word| !word.is_empty())
}

/// Splits `text` at the first `separator`.
pub(super) fn split_once(text: &[u8], separator: u8) -> Option<(&[u8], &[u8])> {
    let position = text.iter().position(|&byte| byte == separator)?;
    Some((&text[..position], &text[position + 1..]))
}

/// Returns `text` without a trailing line feed.
pub(super) fn without_line_feed(text: &[u8]) -> &[u8] {
    text.strip_suffix(b"\n").unwrap_or(text)
}

/// Parses `text`, without surrounding blanks, as a number in base `radix`, at most 16.
pub(super) fn unsigned<T>(text: &[u8], radix: u32, what: &'static str) -> Parsed<T>
where
    T: TryFrom<u64>,
{
    digits(text.trim_ascii(), radix)
        .and_then(|number| T::try_from(number).ok())
        .ok_or_else(|| Defect::new(what, text))
}

/// Parses `text`, without surrounding blanks, as a decimal number with an optional sign.
pub(super) fn signed<T>(text: &[u8], what: &'static str) -> Parsed<T>
where
    T: TryFrom<i64>,
{
    let trimmed = text.trim_ascii();
    let number = match trimmed.strip_prefix(b"-") {
        Some(magnitude) => {
            digits(magnitude, 10).and_then(|number| 0_i64.checked_sub_unsigned(number))
        }
        None => digits(trimmed, 10).and_then(|number| i64::try_from(number).ok()),
    };
    number.and_then(|number| T::try_from(number).ok()).ok_or_else(|| Defect::new(what, text))
}

/// Parses decimal numbers separated by blanks.
pub(super) fn numbers<T>(text: &[u8], what: &'static str) -> Parsed<Vec<T>>
where
    T: TryFrom<i64>,
{
    words(text).map(|word| signed(word, what)).collect()
}

/// Parses `text` as digits; `None` without any.
fn digits(text: &[u8], radix: u32) -> Option<u64> {
    if text.is_empty() {
        return None;
    }
    text.iter().try_fold(0_u64, |number, &byte| {
        let digit = char::from(byte).to_digit(radix)?;
        number.checked_mul(u64::from(radix))?.checked_add(u64::from(digit))
    })
}

/// Decodes the octal escapes, such as `\012`, that `seq_path` (`fs/seq_file.c`) writes for bytes
/// that would break the line.
///
/// In `maps`, only line feeds are escaped. So a name that contains a backslash and three octal
/// digits is ambiguous, and is decoded wrongly.
pub(super) fn undo_octal(text: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&first, after)) = rest.split_first() {
        let escaped = match after {
            [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', ..] if first == b'\\' => {
                Some(((a - b'0') << 6) | ((b - b'0') << 3) | (c - b'0'))
            }
            _ => None,
        };
        plain.push(escaped.unwrap_or(first));
        rest = if escaped.is_some() { &after[3..] } else { after };
    }
    plain
}

/// Decodes the escapes `\n` and `\\` in the name in `status` (`proc_task_name`, `fs/proc/array.c`).
pub(super) fn undo_name_escapes(text: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&first, after)) = rest.split_first() {
        let escaped = match after.first() {
            Some(b'n') if first == b'\\' => Some(b'\n'),
            Some(b'\\') if first == b'\\' => Some(b'\\'),
            _ => None,
        };
        plain.push(escaped.unwrap_or(first));
        rest = if escaped.is_some() { &after[1..] } else { after };
    }
    plain
}

/// The lines `key:<blank>value` of a file.
#[derive(Debug)]
pub(super) struct Fields<'a>(Vec<(&'a [u8], &'a [u8])>);

impl<'a> Fields<'a> {
    /// Splits `text` into keys and values, ignoring lines without a colon.
    pub(super) fn parse(text: &'a [u8]) -> Self {
        Self(lines(text).filter_map(field).collect())
    }

    /// Returns the value of the first line with this key.
    pub(super) fn get(&self, key: &str) -> Option<&'a [u8]> {
        self.0.iter().find(|(found, _)| *found == key.as_bytes()).map(|(_, value)| *value)
    }

    /// Returns the value of the first line with this key, or an error if there is none.
    pub(super) fn required(&self, key: &'static str) -> Parsed<&'a [u8]> {
        self.get(key).ok_or(Defect::missing(key))
    }
}

/// Splits a line into its key and its value, which follows the colon and one blank.
pub(super) fn field(line: &[u8]) -> Option<(&[u8], &[u8])> {
    let (key, value) = split_once(line, b':')?;
    let value = match value.split_first() {
        Some((b'\t' | b' ', rest)) => rest,
        _ => value,
    };
    Some((key, value))
}
