//! The picture as SVG. A browser shows it in light or dark colours, as it prefers, and shows
//! the address and size of the cell below the mouse.

use std::{
    fmt::{self, Display, Write as _},
    ops::Range,
};

use super::{
    Limits,
    picture::{Drawn, LEVELS, Look, Picture, SHARES, bytes, level, meaning, shares, word},
    text::groups,
};
use crate::{
    chain::map::{Counts, Row, State},
    units::PageIndex,
};

/// The most cells of all memories together that a browser draws without delay.
const CELLS: usize = 60_000;

/// The number of memories that are drawn without `--all`.
const MEMORIES: usize = 24;

/// The most rows of one memory.
const ROWS: usize = 48;

/// The fewest and the most columns of one memory.
const COLUMNS: (usize, usize) = (48, 240);

/// The most columns of time.
const TIMES: usize = 240;

const WIDTH: f64 = 1200.0;
const LEFT: f64 = 190.0;
const RIGHT: f64 = 20.0;
const INNER: f64 = WIDTH - LEFT - RIGHT;

/// The space between two parts of the picture.
const GAP: f64 = 34.0;

/// The height of a line of text.
const LINE: f64 = 16.0;

/// The widest cell of time: few snapshots do not fill the picture.
const TIME_WIDTH: f64 = 56.0;

const BARS: f64 = 110.0;
const AMOUNTS: f64 = 80.0;
const HEAT: f64 = 16.0;

/// The height of the strip that shows how often addresses were stored anew.
const STRIP: f64 = 9.0;

/// The approximate width of a character of the small font.
const CHARACTER: f64 = 6.2;

pub(super) fn limits(memories: usize, snapshots: usize, all: bool) -> Limits {
    let memories = if all { memories } else { memories.min(MEMORIES) };
    let rows = snapshots.clamp(1, ROWS);
    let columns = (CELLS / (memories.max(1) * rows)).clamp(COLUMNS.0, COLUMNS.1);
    Limits { memories, columns, rows }
}

/// The style sheet of a picture: colours by the names of states.
pub(super) const STYLE: &str = "\
:root,svg{--paper:#fff;--ink:#1c2330;--faint:#697386;--line:#d5dae3;--panel:#f5f6f9;\
--here:#1d63d8;--twice:#e8890c;--parent:#c3d3f0;--freed:#d3262f;--missing:#a21caf;--file:#d5e6d3;--zero:#e6e7eb;--heat1:#fbe3b5;--heat2:#f8b863;--heat3:#ea7f35;--heat4:#c9432a;--heat5:#861d2a}\
@media(prefers-color-scheme:dark){:root,svg{--paper:#12151b;--ink:#e4e8f0;--faint:#95a0b4;--line:#343b48;\
--panel:#1a1e26;--here:#5b9bff;--twice:#f6a53a;--parent:#2b3d60;--freed:#f0555d;--missing:#d66be0;--file:#29402d;--zero:#2a2f39;--heat1:#4d2a2a;--heat2:#8a3a2c;--heat3:#c8592f;--heat4:#ef913f;--heat5:#ffd98a}}\
svg{background:var(--paper);font:12px system-ui,-apple-system,'Segoe UI','DejaVu Sans',sans-serif}\
text{fill:var(--ink)}.f{fill:var(--faint);font-size:11px}.t{font-size:20px;font-weight:600}.h{font-size:14px;font-weight:600}\
.e{text-anchor:end}.m{text-anchor:middle}.p{fill:var(--panel)}.l{stroke:var(--line)}\
.here{fill:var(--here)}.twice{fill:var(--twice)}.parent{fill:var(--parent)}.freed{fill:var(--freed)}\
.missing{fill:var(--missing)}.file{fill:var(--file)}.zero{fill:var(--zero)}\
.heat0{fill:var(--zero)}.heat1{fill:var(--heat1)}.heat2{fill:var(--heat2)}.heat3{fill:var(--heat3)}.heat4{fill:var(--heat4)}.heat5{fill:var(--heat5)}\
.v1{fill-opacity:.28}.v2{fill-opacity:.45}.v3{fill-opacity:.62}.v4{fill-opacity:.8}\
rect:hover:not(.p){stroke:var(--ink);stroke-width:1}";

/// Returns the class of a state that fills a cell to this level.
fn shade(state: State, level: usize) -> String {
    if level >= LEVELS { word(state).to_owned() } else { format!("{} v{level}", word(state)) }
}

/// Text in XML.
pub(super) struct Escaped<'a>(pub(super) &'a str);

impl Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for c in self.0.chars() {
            match c {
                '&' => f.write_str("&amp;")?,
                '<' => f.write_str("&lt;")?,
                '>' => f.write_str("&gt;")?,
                '"' => f.write_str("&quot;")?,
                '\n' => f.write_char(c)?,
                // XML cannot contain control characters.
                c if c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}') => {
                    f.write_char('\u{fffd}')?
                }
                c => f.write_char(c)?,
            }
        }
        Ok(())
    }
}

/// The drawn elements, and the position of the next one.
struct Sheet {
    body: String,
    y: f64,
}

impl Sheet {
    fn text(&mut self, x: f64, y: f64, class: &str, text: &str) {
        let _ = writeln!(
            self.body,
            "<text x='{x:.1}' y='{y:.1}' class='{class}'>{}</text>",
            Escaped(text)
        );
    }

    /// Draws a box; `title` is shown when the mouse points at it.
    fn cell(&mut self, at: [f64; 4], class: &str, title: &str) {
        let [x, y, width, height] = at;
        let _ = write!(
            self.body,
            "<rect x='{x:.1}' y='{y:.1}' width='{width:.1}' height='{height:.1}' class='{class}'"
        );
        let _ = match title {
            "" => writeln!(self.body, "/>"),
            title => writeln!(self.body, "><title>{}</title></rect>", Escaped(title)),
        };
    }

    fn heading(&mut self, title: &str, note: &str) {
        self.y += GAP;
        self.text(LEFT, self.y, "h", title);
        if !note.is_empty() {
            self.y += LINE;
            self.text(LEFT, self.y, "f", note);
        }
        self.y += 8.0;
    }
}

/// Returns a stand-alone SVG file.
pub(super) fn page(picture: &Picture) -> String {
    let (body, height) = draw(picture, true);
    format!(
        "<?xml version='1.0' encoding='UTF-8'?>\n{}",
        element(&body, height, &format!("Memory of {}", picture.chain))
    )
}

/// Returns the picture as an element of a page with its own title and summary.
pub(super) fn inline(picture: &Picture) -> String {
    let (body, height) = draw(picture, false);
    element(&body, height, "")
}

fn element(body: &str, height: f64, title: &str) -> String {
    let title = match title {
        "" => String::new(),
        title => format!("<title>{}</title>\n", Escaped(title)),
    };
    format!(
        "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {height:.0}' width='{WIDTH}' \
         height='{height:.0}' role='img'>\n{title}<style>{STYLE}</style>\n{body}</svg>\n"
    )
}

fn draw(picture: &Picture, titled: bool) -> (String, f64) {
    let mut sheet = Sheet { body: String::new(), y: 12.0 };
    if titled {
        sheet.y += 24.0;
        sheet.text(LEFT, sheet.y, "t", &format!("Memory of {}", picture.chain));
        sheet.y += 22.0;
        sheet.text(LEFT, sheet.y, "f", &picture.summary());
    }
    legend(picture, &mut sheet);
    let times = groups(picture.snapshots.len(), TIMES);
    bars(picture, &times, &mut sheet);
    if picture.snapshots.len() > 1 {
        heat(picture, &times, &mut sheet);
    }
    for drawn in &picture.memories {
        memory(picture, drawn, &mut sheet);
    }
    if let Some(rest) = picture.rest() {
        sheet.y += GAP;
        sheet.text(LEFT, sheet.y, "f", &rest);
    }
    (sheet.body, sheet.y + GAP)
}

fn legend(picture: &Picture, sheet: &mut Sheet) {
    const BOX: f64 = 12.0;
    sheet.y += 26.0;
    let mut x = LEFT;
    for state in picture.states() {
        let wide = BOX + 6.0 + 18.0 + meaning(state).len() as f64 * (CHARACTER + 0.3);
        if x + wide > WIDTH - RIGHT && x > LEFT {
            x = LEFT;
            sheet.y += LINE + 4.0;
        }
        sheet.cell([x, sheet.y - BOX + 2.0, BOX, BOX], word(state), "");
        sheet.text(x + BOX + 6.0, sheet.y, "", meaning(state));
        x += wide;
    }
}

/// Returns the horizontal position and the width of a group of snapshots.
fn time(groups: usize, at: usize) -> (f64, f64) {
    let width = (INNER / groups as f64).min(TIME_WIDTH);
    (LEFT + at as f64 * width, width)
}

/// Returns the width of a cell without the gap, if there is room for a gap.
fn inside(width: f64) -> f64 {
    if width > 6.0 { width - 1.0 } else { width }
}

/// Draws the memory of each snapshot by state, and below it how much each dump stored.
fn bars(picture: &Picture, times: &[Range<usize>], sheet: &mut Sheet) {
    sheet.heading("Memory of each snapshot", "");
    // The bar of several snapshots shows their mean.
    let sum = |group: &Range<usize>| {
        let mut sum = Counts::default();
        picture.snapshots[group.clone()].iter().for_each(|shot| sum += shot.totals);
        sum
    };
    let sums: Vec<Counts> = times.iter().map(sum).collect();
    let mean = |pages: u64, group: &Range<usize>| pages / group.len() as u64;
    let highest = sums.iter().zip(times).map(|(sum, group)| mean(sum.kept(), group));
    let highest = highest.max().unwrap_or(0).max(1);
    let rules = [(1.0, bytes(highest)), (0.5, bytes(highest / 2))];
    rule(times.len(), BARS, &rules, sheet);
    for (at, (sum, group)) in sums.iter().zip(times).enumerate() {
        let (x, width) = time(times.len(), at);
        let mut y = sheet.y;
        let title = title(picture, group, sum);
        // Stored pages are at the bottom, where small amounts can be compared.
        for state in [State::Here, State::Twice, State::Freed, State::Missing, State::Parent] {
            let height = mean(sum.get(state), group) as f64 / highest as f64 * BARS;
            if height > 0.0 {
                y -= height;
                sheet.cell([x, y, inside(width), height], word(state), &title);
            }
        }
    }
    dates(picture, times, sheet);
    if picture.snapshots.len() > 1 {
        amounts(picture, times, sheet);
    }
}

/// Draws how much each dump stored, on a scale that shows small amounts beside large ones.
fn amounts(picture: &Picture, times: &[Range<usize>], sheet: &mut Sheet) {
    sheet.heading(
        "Stored by each dump",
        "on a logarithmic scale; of several snapshots in one bar, the largest",
    );
    // The bar of several snapshots shows the largest.
    let most = |group: &Range<usize>| {
        let shots = group.clone().max_by_key(|at| picture.snapshots[*at].totals.stored());
        shots.unwrap_or(group.start)
    };
    let height = |pages: u64| (pages as f64 + 1.0).log2();
    let largest: Vec<usize> = times.iter().map(most).collect();
    let stored = |at: &usize| picture.snapshots[*at].totals.stored();
    let highest = height(largest.iter().map(stored).max().unwrap_or(0)).max(1.0);
    // A line for every factor of 16 or 256.
    let step = if highest > 12.0 { 8 } else { 4 };
    let lines = (0..64).step_by(step).skip(1).take_while(|power| f64::from(*power) < highest);
    let rules: Vec<(f64, String)> =
        lines.map(|power| (f64::from(power) / highest, bytes(1 << power))).collect();
    rule(times.len(), AMOUNTS, &rules, sheet);
    for (at, shot) in largest.iter().enumerate() {
        let (x, width) = time(times.len(), at);
        let pages = stored(shot);
        let high = height(pages) / highest * AMOUNTS;
        let title = format!("{}\n{} stored", named(picture, &(*shot..shot + 1)), bytes(pages));
        sheet.cell([x, sheet.y - high, inside(width), high], "here", &title);
    }
    dates(picture, times, sheet);
}

/// Draws lines at some heights of a chart and below it, and moves to its bottom.
fn rule(times: usize, height: f64, rules: &[(f64, String)], sheet: &mut Sheet) {
    let bottom = sheet.y + height;
    let right = LEFT + time(times, 0).1 * times as f64;
    let floor = (0.0, "0".to_owned());
    for (share, name) in rules.iter().chain([&floor]) {
        let y = bottom - share * height;
        let _ = writeln!(
            sheet.body,
            "<line x1='{LEFT}' x2='{right:.1}' y1='{y:.1}' y2='{y:.1}' class='l'/>"
        );
        sheet.text(LEFT - 8.0, y + 4.0, "f e", name);
    }
    sheet.y = bottom;
}

/// Writes the names of snapshots below a chart over time, as many as fit.
fn dates(picture: &Picture, times: &[Range<usize>], sheet: &mut Sheet) {
    sheet.y += LINE;
    let mut free = LEFT;
    let last = times.len() - 1;
    let wide = |name: &str| name.chars().count() as f64 * CHARACTER;
    let last_name = &picture.snapshots[times[last].start].name;
    let (last_x, last_width) = time(times.len(), last);
    let last_begins = last_x + last_width / 2.0 - wide(last_name) / 2.0;
    for (at, group) in times.iter().enumerate() {
        let name = &picture.snapshots[group.start].name;
        let (x, width) = time(times.len(), at);
        let middle = x + width / 2.0;
        let (begins, ends) = (middle - wide(name) / 2.0, middle + wide(name) / 2.0);
        let room = at == last || at == 0 || ends + 10.0 < last_begins;
        if room && (at == 0 || begins >= free) {
            sheet.text(middle, sheet.y, "f m", name);
            free = ends + 40.0;
            if at == last {
                break;
            }
        }
    }
}

/// Draws how much of each memory each dump stored.
fn heat(picture: &Picture, times: &[Range<usize>], sheet: &mut Sheet) {
    sheet.heading("Changes over time", "the share of each memory that a dump stored anew");
    scale(sheet);
    for drawn in &picture.memories {
        sheet.text(LEFT - 8.0, sheet.y + HEAT - 4.0, "f e", &cut(&drawn.label, LEFT - 16.0));
        for (at, group) in times.iter().enumerate() {
            let Some((pages, of)) = drawn.changed(group.clone()) else { continue };
            let (x, width) = time(times.len(), at);
            let class = format!("heat{}", if pages == 0 { 0 } else { level(pages, of) });
            let title = format!(
                "{}\n{}\n{} of {} stored anew",
                drawn.label,
                named(picture, group),
                bytes(pages),
                bytes(of)
            );
            sheet.cell([x, sheet.y, inside(width), HEAT - 1.0], &class, &title);
        }
        sheet.y += HEAT;
    }
    dates(picture, times, sheet);
}

/// Draws the legend of the colours of changes, to the right of the last heading.
fn scale(sheet: &mut Sheet) {
    const BOX: f64 = 12.0;
    let y = sheet.y - 8.0;
    let mut x = LEFT + 300.0;
    for (at, name) in SHARES.iter().enumerate() {
        sheet.cell([x, y - BOX + 2.0, BOX, BOX], &format!("heat{at}"), "");
        sheet.text(x + BOX + 5.0, y, "f", name);
        x += BOX + 5.0 + name.len() as f64 * CHARACTER + 16.0;
    }
}

/// Returns the names and dates of some snapshots.
fn named(picture: &Picture, group: &Range<usize>) -> String {
    let name = picture.named(group);
    let first = &picture.snapshots[group.start];
    match (&first.date, group.len()) {
        (Some(date), 1) => format!("snapshot {name}, {date}"),
        (Some(date), _) => format!("snapshots {name} together, from {date}"),
        (None, 1) => format!("snapshot {name}"),
        (None, _) => format!("snapshots {name} together"),
    }
}

fn title(picture: &Picture, group: &Range<usize>, counts: &Counts) -> String {
    format!("{}\n{}", named(picture, group), shares(counts).join("\n"))
}

/// Draws where one memory is stored: its addresses from left to right, its snapshots
/// downwards.
fn memory(picture: &Picture, drawn: &Drawn, sheet: &mut Sheet) {
    /// The largest height of all rows together.
    const ROOM: f64 = 240.0;
    let Some(first) = drawn.rows.first() else { return };
    let columns = first.cells.len();
    let last = drawn.surveyed.counts.iter().flatten().last();
    let note = format!(
        "{} in its last snapshot; all dumps together stored {}",
        bytes(last.map_or(0, Counts::kept)),
        bytes(drawn.surveyed.stored())
    );
    sheet.heading(&drawn.label, &note);
    let height = (ROOM / drawn.rows.len() as f64).clamp(5.0, 18.0);
    // A memory of a few pages has one narrow cell for each.
    let width = (INNER / columns.max(1) as f64).min(28.0);
    let above = sheet.y;
    if picture.snapshots.len() > 2 {
        strip(drawn, width, sheet);
    }
    let top = sheet.y;
    let whole = [LEFT, top, width * columns as f64, height * drawn.rows.len() as f64];
    sheet.cell(whole, "p", "");
    // The name of the strip stands beside the first rows if they are low.
    let mut free = if top > above { top } else { top - LINE };
    for row in &drawn.rows {
        let y = sheet.y;
        // A name needs the height of a line, whatever the height of the rows.
        if y + height / 2.0 - 5.0 >= free {
            let name = cut(&picture.named(&row.snapshots), LEFT - 16.0);
            sheet.text(LEFT - 8.0, y + height / 2.0 + 4.0, "f e", &name);
            free = y + height / 2.0 + 9.0;
        }
        cells(picture, drawn, row, [y, width, height], sheet);
        sheet.y += height;
    }
    ticks(drawn, columns, width, sheet);
}

/// Draws a row; runs of cells that look the same become one element.
fn cells(picture: &Picture, drawn: &Drawn, row: &Row, at: [f64; 3], sheet: &mut Sheet) {
    let [y, width, height] = at;
    let high = inside(height);
    let looks: Vec<Look> = row.cells.iter().map(Look::of).collect();
    let place = |run: &Range<usize>| {
        let x = LEFT + run.start as f64 * width;
        [x, y, run.len() as f64 * width, high]
    };
    let about = |run: &Range<usize>| {
        let mut sum = Counts::default();
        row.cells[run.clone()].iter().for_each(|cell| sum += *cell);
        let addresses = drawn.addresses(run.clone());
        let name = drawn.name_at(addresses.start);
        format!(
            "{}\n{:#x} to {:#x}{}\n{}",
            named(picture, &row.snapshots),
            addresses.start,
            addresses.end,
            name.map_or_else(String::new, |name| format!("\n{name}")),
            shares(&sum).join("\n")
        )
    };
    // Highlighted cells cover the others.
    for run in runs(&looks, |look| look.base) {
        if let Some(base) = looks[run.start].base {
            sheet.cell(place(&run), word(base), &about(&run));
        }
    }
    for run in runs(&looks, |look| look.over) {
        if let Some((state, level)) = looks[run.start].over {
            sheet.cell(place(&run), &shade(state, level), &about(&run));
        }
    }
}

/// Returns ranges of consecutive items that have the same `key`.
fn runs<T, K: PartialEq>(items: &[T], key: impl Fn(&T) -> K) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for (at, item) in items.iter().enumerate() {
        match runs.last_mut() {
            Some(run) if key(&items[run.start]) == key(item) => run.end = at + 1,
            _ => runs.push(at..at + 1),
        }
    }
    runs
}

/// Draws how much was stored anew at each address, in all snapshots except the first that has
/// the memory.
fn strip(drawn: &Drawn, width: f64, sheet: &mut Sheet) {
    let mut sums: Vec<(u64, u64)> = Vec::new();
    let rows = drawn.rows.iter().skip_while(|row| row.cells.iter().all(|cell| cell.pages() == 0));
    for row in rows.skip(1) {
        sums.resize(row.cells.len(), (0, 0));
        for (sum, cell) in sums.iter_mut().zip(&row.cells) {
            sum.0 += cell.stored();
            sum.1 += cell.pages();
        }
    }
    if sums.iter().all(|(stored, _)| *stored == 0) {
        return;
    }
    sheet.text(LEFT - 8.0, sheet.y + STRIP, "f e", "changed, in all");
    let levels: Vec<Option<usize>> =
        sums.iter().map(|(stored, of)| (*stored > 0).then(|| level(*stored, *of))).collect();
    for run in runs(&levels, |level| *level) {
        let Some(level) = levels[run.start] else { continue };
        let stored: u64 = sums[run.clone()].iter().map(|(stored, _)| stored).sum();
        let addresses = drawn.addresses(run.clone());
        let title = format!(
            "{:#x} to {:#x}\n{} stored after the first row",
            addresses.start,
            addresses.end,
            bytes(stored)
        );
        let x = LEFT + run.start as f64 * width;
        let at = [x, sheet.y, run.len() as f64 * width, STRIP];
        sheet.cell(at, &format!("heat{level}"), &title);
    }
    sheet.y += STRIP + 4.0;
}

/// Writes the names of mappings below the cells, or the first and the last address.
fn ticks(drawn: &Drawn, columns: usize, width: f64, sheet: &mut Sheet) {
    let axis = &drawn.surveyed.axis;
    let scale = width * columns as f64 / axis.drawn().max(1) as f64;
    let at = |page: u64| LEFT + axis.place(page) as f64 * scale;
    sheet.y += LINE - 2.0;
    let mut free = LEFT;
    let mut written = false;
    // Mappings of one file are adjacent.
    let mut named: Vec<(Range<u64>, &str)> = Vec::new();
    for (pages, name) in &drawn.names {
        let name = name.rsplit('/').next().unwrap_or(name);
        match named.last_mut() {
            Some((last, same)) if *same == name => last.end = pages.end,
            _ => named.push((pages.clone(), name)),
        }
    }
    for (pages, name) in named {
        let (start, end) = (at(pages.start), at(pages.end));
        let wide = name.chars().count() as f64 * CHARACTER;
        if start >= free && end - start > wide.min(80.0) && !name.is_empty() {
            let line = sheet.y - LINE + 4.0;
            let _ = writeln!(
                sheet.body,
                "<line x1='{start:.1}' x2='{start:.1}' y1='{line:.1}' y2='{:.1}' class='l'/>",
                sheet.y
            );
            let name = cut(name, end - start - 4.0);
            sheet.text(start + 4.0, sheet.y, "f", &name);
            free = start + 4.0 + wide.min(end - start) + 8.0;
            written = true;
        }
    }
    if !written {
        let all = drawn.addresses(0..columns);
        let first = PageIndex::holding(all.start).to_string();
        let last = format!("{:#x}", all.end);
        let right = LEFT + width * columns as f64;
        sheet.text(LEFT, sheet.y, "f", &first);
        if right - LEFT > (first.len() + last.len() + 4) as f64 * CHARACTER {
            sheet.text(right, sheet.y, "f e", &last);
        }
    }
}

/// Returns the beginning of a text that is wider than `width`.
fn cut(text: &str, room: f64) -> String {
    let fits = text.chars().count() as f64 * CHARACTER <= room;
    if fits {
        return text.to_owned();
    }
    let kept = text.char_indices().map(|(at, _)| at);
    let kept = kept.take_while(|at| (*at as f64 + 1.0) * CHARACTER <= room).last().unwrap_or(0);
    format!("{}\u{2026}", &text[..kept])
}
