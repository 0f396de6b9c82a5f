//! Keeps the record of what a tree touches first.

use std::{
    collections::{HashSet, VecDeque},
    fs::File,
    io::{self, Read, Write},
    path::{Path, PathBuf},
    sync::Mutex,
};

use super::record::{LIMIT_BYTES, Touched, format, parse};
use crate::{
    parallel,
    sys::output::{self, Existing},
};

/// The most parts that are recorded.
const LIMIT_PARTS: usize = 500_000;

/// The record of a restore, and of those before it.
#[derive(Debug)]
pub(super) struct Recorder {
    path: PathBuf,
    /// What earlier restores have recorded, and is still to be supplied.
    first: Mutex<VecDeque<Touched>>,
    all: Mutex<All>,
}

/// All parts, in their order, each once.
#[derive(Debug, Default)]
struct All {
    parts: Vec<Touched>,
    /// By process and start.
    known: HashSet<(u64, u64)>,
}

impl All {
    fn push(&mut self, part: Touched) {
        if self.parts.len() < LIMIT_PARTS && self.known.insert((part.id, part.range.start)) {
            self.parts.push(part);
        }
    }
}

impl Recorder {
    /// Reads a record. One that cannot be read is begun anew, with a warning.
    pub(super) fn open(path: &Path) -> Self {
        let parts = match read(path) {
            Ok(parts) => parts,
            Err(problem) => {
                log::warn!("{}: {problem}; the record is begun anew", path.display());
                Vec::new()
            }
        };
        log::info!("{}: {} parts are supplied first", path.display(), parts.len());
        let mut all = All::default();
        parts.iter().cloned().for_each(|part| all.push(part));
        Self { path: path.to_owned(), first: Mutex::new(parts.into()), all: Mutex::new(all) }
    }

    /// Takes the next part that is to be supplied first.
    pub(super) fn next(&self) -> Option<Touched> {
        parallel::lock(&self.first).pop_front()
    }

    /// Notes a part that a thread has waited for.
    pub(super) fn note(&self, part: Touched) {
        parallel::lock(&self.all).push(part);
    }

    /// Writes the record.
    pub(super) fn save(&self) {
        let text = format(&parallel::lock(&self.all).parts);
        let written = output::create(&self.path, Existing::Replaced)
            .and_then(|mut file| file.write_all(text.as_bytes()));
        if let Err(error) = written {
            log::warn!("{}: write the record: {error}", self.path.display());
        }
    }
}

/// Reads a record; empty if there is none.
fn read(path: &Path) -> Result<Vec<Touched>, String> {
    let mut text = String::new();
    match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        file => file
            .and_then(|file| file.take(LIMIT_BYTES + 1).read_to_string(&mut text))
            .map_err(|error| format!("read the record: {error}"))?,
    };
    if text.len() as u64 > LIMIT_BYTES {
        return Err(format!("it is no record: it has more than {LIMIT_BYTES} bytes"));
    }
    parse(&text).map_err(|(line, found)| format!("line {line} is not one of a record: {found:?}"))
}
