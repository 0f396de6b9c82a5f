//! The picture in an HTML page, with its numbers in tables.

use std::fmt::Write as _;

use super::{
    picture::{Picture, bytes},
    svg::{self, Escaped},
};
use crate::{chain::map::State, cli::times};

const STYLE: &str = "\
body{margin:24px auto;max-width:1200px;padding:0 16px;background:var(--paper);color:var(--ink);\
font:14px/1.45 system-ui,-apple-system,'Segoe UI','DejaVu Sans',sans-serif}\
h1{font-size:22px;margin:0 0 4px}h2{font-size:16px;margin:32px 0 8px}p{margin:0;color:var(--faint)}\
svg{width:100%;height:auto;display:block}\
.wide{overflow-x:auto;max-height:70vh}table{border-collapse:collapse;font-variant-numeric:tabular-nums}\
th,td{text-align:right;padding:3px 14px 3px 0;border-bottom:1px solid var(--line);white-space:nowrap}\
th{color:var(--faint);font-weight:500;position:sticky;top:0;background:var(--paper)}\
th:first-child,td:first-child{text-align:left}";

/// Returns a stand-alone HTML file.
pub(super) fn page(picture: &Picture) -> String {
    let mut page = String::new();
    let title = format!("Memory of {}", picture.chain);
    let _ = write!(
        page,
        "<!doctype html>\n<html lang='en'>\n<head>\n<meta charset='utf-8'>\n\
         <meta name='viewport' content='width=device-width'>\n\
         <meta name='color-scheme' content='light dark'>\n<title>{0}</title>\n\
         <style>{1}{STYLE}</style>\n</head>\n<body>\n<h1>{0}</h1>\n<p>{2}</p>\n",
        Escaped(&title),
        svg::STYLE,
        Escaped(&picture.summary()),
    );
    page += &svg::inline(picture);
    snapshots(picture, &mut page);
    memories(picture, &mut page);
    let _ = write!(
        page,
        "<p style='margin-top:24px'>Drawn {} by imgfs map; times are those of {}.</p>\n\
         </body>\n</html>\n",
        times::now(),
        Escaped(&times::zone()),
    );
    page
}

fn header(headings: &[&str], page: &mut String) {
    page.push_str("<div class='wide'><table>\n<tr>");
    headings.iter().for_each(|heading| {
        let _ = write!(page, "<th>{heading}</th>");
    });
    page.push_str("</tr>\n");
}

fn row(cells: &[String], page: &mut String) {
    page.push_str("<tr>");
    cells.iter().for_each(|cell| {
        let _ = write!(page, "<td>{}</td>", Escaped(cell));
    });
    page.push_str("</tr>\n");
}

fn snapshots(picture: &Picture, page: &mut String) {
    page.push_str("<h2>Snapshots</h2>\n");
    let mut headings = vec!["Name", "Parent", "Date", "Stored"];
    if picture.twice {
        headings.push("Copies");
    }
    headings.extend(["In a parent", "Freed", "In no image"]);
    header(&headings, page);
    for shot in &picture.snapshots {
        let size = |state| bytes(shot.totals.get(state));
        let mut cells = vec![
            shot.name.clone(),
            shot.parent.clone().unwrap_or_default(),
            shot.date.clone().unwrap_or_default(),
            bytes(shot.totals.get(State::Here) + shot.totals.get(State::Twice)),
        ];
        if picture.twice {
            cells.push(size(State::Twice));
        }
        cells.extend([size(State::Parent), size(State::Freed), size(State::Missing)]);
        row(&cells, page);
    }
    page.push_str("</table></div>\n");
}

fn memories(picture: &Picture, page: &mut String) {
    page.push_str("<h2>Memories</h2>\n");
    header(&["Memory", "Snapshots", "In the last", "Stored in all"], page);
    for drawn in &picture.memories {
        let there: Vec<_> = drawn.surveyed.counts.iter().flatten().collect();
        row(
            &[
                drawn.label.clone(),
                there.len().to_string(),
                bytes(there.last().map_or(0, |counts| counts.kept())),
                bytes(drawn.surveyed.stored()),
            ],
            page,
        );
    }
    page.push_str("</table></div>\n");
}
