//! The picture as JSON.

use serde_json::{Value, json};

use super::{
    Limits,
    picture::{Drawn, Picture, word},
};
use crate::{
    chain::map::{Counts, State},
    units::{PageIndex, page_bytes},
};

/// All memories, in cells for a picture of this size.
pub(super) const LIMITS: Limits = Limits { memories: usize::MAX, columns: 64, rows: usize::MAX };

pub(super) fn document(picture: &Picture) -> Value {
    let snapshots = picture.snapshots.iter().map(|shot| {
        json!({
            "name": shot.name,
            "date": shot.date,
            "parent": shot.parent,
            "bytes": counts(&shot.totals),
        })
    });
    json!({
        "chain": picture.chain,
        "compared": picture.twice,
        "snapshots": snapshots.collect::<Vec<_>>(),
        "memories": picture.memories.iter().map(|drawn| memory(picture, drawn)).collect::<Vec<_>>(),
    })
}

fn counts(counts: &Counts) -> Value {
    let there = State::ALL.into_iter().filter(|state| counts.get(*state) > 0);
    there.map(|state| (word(state).to_owned(), json!(page_bytes(counts.get(state))))).collect()
}

fn memory(picture: &Picture, drawn: &Drawn) -> Value {
    let ranges = drawn.surveyed.axis.segments().iter().map(|segment| {
        json!({
            "start": PageIndex(segment.first).address(),
            "end": PageIndex(segment.first + segment.pages).address(),
        })
    });
    let columns = drawn.rows.first().map_or(0, |row| row.cells.len());
    let starts = (0..columns).map(|column| drawn.addresses(column..column + 1).start);
    let all = picture.snapshots.iter().zip(&drawn.surveyed.counts).zip(&drawn.rows);
    let snapshots = all.filter_map(|((shot, found), row)| {
        let found = found.as_ref()?;
        Some(json!({
            "snapshot": shot.name,
            "bytes": counts(found),
            "cells": row.cells.iter().map(counts).collect::<Vec<_>>(),
        }))
    });
    json!({
        "memory": crate::cli::memory_document(drawn.surveyed.memory),
        "name": drawn.label,
        "ranges": ranges.collect::<Vec<_>>(),
        "columns": starts.collect::<Vec<_>>(),
        "snapshots": snapshots.collect::<Vec<_>>(),
    })
}
