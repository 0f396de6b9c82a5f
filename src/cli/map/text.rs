//! The picture in a terminal or a pipe.

use std::{io::Write, ops::Range};

use super::{
    Limits,
    picture::{Drawn, LEVELS, Look, Picture, SHARES, bytes, level, meaning},
};
use crate::chain::map::State;

/// The most rows of one memory; a row may show several snapshots.
const ROWS: usize = 16;

/// The number of memories that are drawn without `--all`.
const MEMORIES: usize = 12;

/// The widest column of names.
const NAMES: usize = 16;

/// The widest column of names of memories.
const LABELS: usize = 28;

/// The lowest level of a cell that is drawn as partly stored; below, it is hardly stored.
const SOME_LEVEL: usize = 3;

/// The colours of shares, in the palette of 256.
const HEAT: [u8; LEVELS + 1] = [240, 223, 215, 208, 202, 124];

/// Ends colours.
const PLAIN: &str = "\x1b[0m";

pub(super) fn limits(width: usize, all: bool) -> Limits {
    let columns = width.saturating_sub(NAMES + 2).max(16);
    Limits { memories: if all { usize::MAX } else { MEMORIES }, columns, rows: ROWS }
}

/// Returns the colour of a state, in the palette of 256.
fn color(state: State) -> u8 {
    match state {
        State::Here => 33,
        State::Twice => 214,
        State::Parent => 60,
        State::Freed => 160,
        State::Missing => 201,
        State::File => 65,
        State::Zero => 240,
    }
}

/// Returns the character that stands for a state without colours.
fn character(state: State, level: usize) -> char {
    match state {
        State::Here => match level {
            LEVELS => '#',
            SOME_LEVEL.. => '+',
            _ => '-',
        },
        State::Twice => '%',
        State::Parent => '=',
        State::Freed => 'x',
        State::Missing => '?',
        State::File => ':',
        State::Zero => '.',
    }
}

/// Writes a picture.
struct Pen<'a> {
    out: &'a mut dyn Write,
    colors: bool,
}

impl Pen<'_> {
    /// Writes a row of cells.
    fn cells(&mut self, looks: impl Iterator<Item = Look>) -> anyhow::Result<()> {
        let mut style = String::new();
        let mut line = String::new();
        for look in looks {
            let (wanted, glyph) =
                if self.colors { painted(look) } else { (String::new(), plain(look)) };
            if wanted != style {
                line += PLAIN;
                line += &wanted;
                style = wanted;
            }
            line.push(glyph);
        }
        if !style.is_empty() {
            line += PLAIN;
        }
        writeln!(self.out, "{}", line.trim_end())?;
        Ok(())
    }

    fn legend(&mut self, states: &[State]) -> anyhow::Result<()> {
        for state in states {
            let look = match state {
                State::Parent | State::File | State::Zero => {
                    Look { base: Some(*state), over: None }
                }
                _ => Look { base: None, over: Some((*state, LEVELS)) },
            };
            if self.colors {
                let (style, glyph) = painted(look);
                write!(self.out, "{style}{glyph}{glyph}{PLAIN} ")?;
            } else {
                write!(self.out, "{} ", plain(look))?;
            }
            let partly = match state {
                State::Here if self.colors => " (the denser, the more of it)",
                State::Here => " (+ a part of it, - below 5 %)",
                _ => "",
            };
            writeln!(self.out, "{}{partly}", meaning(*state))?;
        }
        Ok(())
    }
}

fn plain(look: Look) -> char {
    match (look.over, look.base) {
        (Some((state, level)), _) => character(state, level),
        (None, Some(base)) => character(base, LEVELS),
        (None, None) => ' ',
    }
}

/// Returns the escape sequence and the character of a look.
fn painted(look: Look) -> (String, char) {
    const SHADES: [char; LEVELS] = ['\u{2591}', '\u{2592}', '\u{2592}', '\u{2593}', '\u{2588}'];
    match (look.over, look.base) {
        (Some((state, level)), base) => {
            let below = base.map_or_else(String::new, |base| format!("\x1b[48;5;{}m", color(base)));
            (format!("\x1b[38;5;{}m{below}", color(state)), SHADES[level - 1])
        }
        (None, Some(base)) => (format!("\x1b[38;5;{}m", color(base)), '\u{2588}'),
        (None, None) => (String::new(), ' '),
    }
}

/// Draws a chain.
///
/// # Errors
/// A failed write of the output.
pub(super) fn print(
    picture: &Picture,
    width: usize,
    colors: bool,
    out: &mut dyn Write,
) -> anyhow::Result<()> {
    let mut pen = Pen { out, colors };
    writeln!(pen.out, "{}: {}", picture.chain, picture.summary())?;
    writeln!(pen.out)?;
    pen.legend(&picture.states())?;
    if picture.snapshots.len() > 1 {
        changes(picture, width, &mut pen)?;
    }
    for drawn in &picture.memories {
        memory(picture, drawn, &mut pen)?;
    }
    if let Some(rest) = picture.rest() {
        writeln!(pen.out, "\n{rest}")?;
    }
    Ok(())
}

/// Draws how much of each memory each dump stored.
fn changes(picture: &Picture, width: usize, pen: &mut Pen<'_>) -> anyhow::Result<()> {
    let labels = picture.memories.iter().map(|drawn| drawn.label.chars().count());
    let labels = labels.max().unwrap_or(0).min(LABELS);
    let groups = groups(picture.snapshots.len(), width.saturating_sub(labels + 2).max(8));
    let each = groups[0].len();
    writeln!(
        pen.out,
        "\nShare of the pages that each dump stored anew, in snapshots {}{}",
        picture.named(&(0..picture.snapshots.len())),
        if each > 1 { format!(", {each} in a column") } else { String::new() },
    )?;
    let scale = SHARES.iter().enumerate().map(|(level, name)| {
        if pen.colors {
            format!("\x1b[38;5;{}m\u{2588}\u{2588}{PLAIN} {name}", HEAT[level])
        } else {
            format!("{level} {name}")
        }
    });
    writeln!(pen.out, "{}", scale.collect::<Vec<_>>().join(", "))?;
    for drawn in &picture.memories {
        write!(pen.out, "{:<labels$}  ", cut(&drawn.label, labels))?;
        let shares = groups.iter().map(|group| drawn.changed(group.clone()));
        let mut line = String::new();
        for share in shares {
            match heat(share) {
                None => line.push(' '),
                Some(heat) if pen.colors => {
                    line += &format!("\x1b[38;5;{}m\u{2588}", HEAT[heat]);
                }
                Some(heat) => line += &heat.to_string(),
            }
        }
        let end = if pen.colors { PLAIN } else { "" };
        writeln!(pen.out, "{}{end}", line.trim_end())?;
    }
    Ok(())
}

/// Returns the level of a share, from 0; `None` if there are no pages.
fn heat(share: Option<(u64, u64)>) -> Option<usize> {
    let (pages, of) = share?;
    Some(if pages == 0 { 0 } else { level(pages, of) })
}

fn memory(picture: &Picture, drawn: &Drawn, pen: &mut Pen<'_>) -> anyhow::Result<()> {
    let last = drawn.surveyed.counts.iter().flatten().last();
    let columns = drawn.rows.first().map_or(0, |row| row.cells.len());
    let addresses = drawn.addresses(0..columns);
    writeln!(
        pen.out,
        "\n{}: {} in the last snapshot; {} stored in all; {:#x} to {:#x}",
        drawn.label,
        bytes(last.map_or(0, |counts| counts.kept())),
        bytes(drawn.surveyed.stored()),
        addresses.start,
        addresses.end,
    )?;
    let names: Vec<String> = drawn.rows.iter().map(|row| picture.named(&row.snapshots)).collect();
    let width = names.iter().map(|name| name.chars().count()).max().unwrap_or(0).min(NAMES);
    for (row, name) in drawn.rows.iter().zip(&names) {
        write!(pen.out, "{:>width$}  ", cut(name, width))?;
        pen.cells(row.cells.iter().map(Look::of))?;
    }
    Ok(())
}

/// Returns snapshots in groups of equal size, at most `limit`.
pub(super) fn groups(snapshots: usize, limit: usize) -> Vec<Range<usize>> {
    let each = snapshots.div_ceil(limit.max(1)).max(1);
    (0..snapshots).step_by(each).map(|first| first..(first + each).min(snapshots)).collect()
}

/// Returns the beginning of a text that is longer than `width`.
fn cut(text: &str, width: usize) -> String {
    if text.chars().count() <= width {
        return text.to_owned();
    }
    text.chars().take(width.saturating_sub(1)).chain(['~']).collect()
}
