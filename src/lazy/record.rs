//! What a tree touches first after a restore (`--record`): the next restore supplies that first.
//!
//! The file has a line [`HEAD`], and then a line for each part, in the order in which threads have waited
//! for them: `ID START-END`, the number of the process in the images and two hexadecimal addresses
//! there. It is a hint only: pages that it names and the images lack are skipped.

use std::{fmt::Write as _, ops::Range};

use crate::units::{PAGE_SIZE, PageIndex};

/// The first line, with the version of the layout.
const HEAD: &str = "rcriu-record 1";

/// The longest file that is read, in bytes: 500,000 parts.
pub(super) const LIMIT_BYTES: u64 = 16 << 20;

/// A part of a memory that threads waited for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Touched {
    /// The number of the process in the images.
    pub(super) id: u64,
    /// The addresses in the images.
    pub(super) range: Range<u64>,
}

/// Reads a file.
///
/// # Errors
/// The number of the line that is wrong, and what it says.
pub(super) fn parse(text: &str) -> Result<Vec<Touched>, (usize, String)> {
    let mut lines = (1..).zip(text.lines());
    match lines.next() {
        Some((_, HEAD)) => {}
        other => return Err((1, other.map(|(_, line)| line.to_owned()).unwrap_or_default())),
    }
    let parsed = lines.map(|(number, line)| line_of(line).ok_or((number, line.to_owned())));
    parsed.collect()
}

fn line_of(line: &str) -> Option<Touched> {
    let (id, range) = line.split_once(' ')?;
    let (start, end) = range.split_once('-')?;
    let address = |text| u64::from_str_radix(text, 16).ok();
    let range = address(start)?..address(end)?;
    let is_sound = range.start < range.end
        && range.end <= PageIndex::END.address()
        && range.start.is_multiple_of(PAGE_SIZE)
        && range.end.is_multiple_of(PAGE_SIZE);
    is_sound.then_some(Touched { id: id.parse().ok()?, range })
}

/// Returns the contents of a file.
pub(super) fn format(parts: &[Touched]) -> String {
    let mut text = format!("{HEAD}\n");
    for Touched { id, range } in parts {
        // A string takes everything.
        let _ = writeln!(text, "{id} {:x}-{:x}", range.start, range.end);
    }
    text
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn files_are_read_as_they_were_written(
            parts in prop::collection::vec((any::<u64>(), 0_u64..1 << 30, 1_u64..64), 0..20),
        ) {
            let touched = |(id, first, pages): (u64, u64, u64)| {
                let range = first * PAGE_SIZE..(first + pages) * PAGE_SIZE;
                Touched { id, range }
            };
            let parts: Vec<_> = parts.into_iter().map(touched).collect();
            prop_assert_eq!(parse(&format(&parts)), Ok(parts));
        }

        #[test]
        fn no_text_panics(text in ".*") {
            let _ = parse(&text);
            let _ = parse(&format!("{HEAD}\n{text}"));
        }
    }

    #[test]
    fn wrong_lines_are_named() {
        assert_eq!(parse(""), Err((1, String::new())));
        assert_eq!(parse("rcriu-record 2\n"), Err((1, "rcriu-record 2".to_owned())));
        for wrong in ["1 1000", "1 2000-1000", "1 1001-2000", "x 1000-2000", "1 0-ffffffffffffffff"]
        {
            assert_eq!(
                parse(&format!("{HEAD}\n7 1000-2000\n{wrong}\n")),
                Err((3, wrong.to_owned()))
            );
        }
    }
}
