//! Checks a chain for defects.

use std::{collections::BTreeMap, fmt, path::PathBuf};

use super::{
    Chain, ChainError, Result, SnapshotId,
    error::are,
    gone::{Gone, gone},
    holes,
    index::pieces,
    overlay::{self, Merged},
    piece::{self, Gaps, Piece, PiecePlace},
};
use crate::{
    causes::with_sources,
    image::{
        Body, ImageError, Kind, MemoryId, Store, desc, punched,
        store::snapshot::DEDUP_STAGE,
        tree::{self, IsRestored},
        verify,
    },
    units::{PAGE_SIZE, PageIndex, PageRanges, page_bytes},
};

/// How many findings of one sort are reported for one memory; the others are counted.
const TOLD: usize = 8;

/// The severity of a finding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// Nothing is lost, but the user should know.
    Note,
    /// A snapshot cannot be restored, or cannot be trusted.
    Error,
}

/// A defect of a chain.
#[derive(Clone, Debug)]
pub struct Finding {
    /// Its severity.
    pub severity: Severity,
    /// The image directory.
    pub dir: PathBuf,
    /// The memory that it concerns, if any.
    pub memory: Option<MemoryId>,
    /// The first page that it concerns, if it concerns pages.
    pub first: Option<PageIndex>,
    /// The message.
    pub problem: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let severity = match self.severity {
            Severity::Note => "note",
            Severity::Error => "error",
        };
        write!(f, "{severity}: {}", self.dir.display())?;
        if let Some(memory) = self.memory {
            write!(f, ": {memory}")?;
        }
        if let Some(first) = self.first {
            write!(f, " at {first}")?;
        }
        write!(f, ": {}", self.problem)
    }
}

/// Checks every file of every snapshot of a chain, and returns the findings by snapshot.
/// `is_restored` says which types of files a restore supports. Calls `progress` with the number
/// of files that are done, and their total.
///
/// # Errors
/// Only errors that prevent the check; defects are findings.
pub fn check(
    chain: &Chain,
    is_restored: IsRestored,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Vec<Finding>> {
    let mut findings = Vec::new();
    for dir in chain.unfinished() {
        findings.push(Finding {
            severity: Severity::Error,
            dir: dir.clone(),
            memory: None,
            first: None,
            problem: "it holds images but no inventory.img: a dump that was not finished"
                .to_owned(),
        });
    }
    let tips = chain.tips();
    let files = chain.ids().map(|id| Ok(chain.list(id)?.len() as u64));
    let files: Vec<u64> = files.collect::<Result<_>>()?;
    let (mut before, total) = (0, files.iter().sum());
    for ((id, gone), files) in chain.ids().zip(gone(chain)?).zip(files) {
        let is_tip = tips.contains(&id);
        let mut done = 0;
        let mut one_more = || {
            // The directory may grow meanwhile.
            done = files.min(done + 1);
            progress(before + done, total);
        };
        let findings = &mut findings;
        let mut check = Check { chain, id, is_tip, is_restored, findings, one_more: &mut one_more };
        check.snapshot()?;
        check.gone(&gone);
        before += files;
        progress(before, total);
    }
    Ok(findings)
}

struct Check<'a> {
    chain: &'a Chain,
    id: SnapshotId,
    is_tip: bool,
    is_restored: IsRestored,
    findings: &'a mut Vec<Finding>,
    /// Counts a file that is done.
    one_more: &'a mut dyn FnMut(),
}

impl Check<'_> {
    fn images(&self) -> &Store {
        self.chain.images(self.id)
    }

    fn tell(
        &mut self,
        severity: Severity,
        memory: Option<MemoryId>,
        first: Option<PageIndex>,
        problem: String,
    ) {
        let dir = self.images().name().to_owned();
        self.findings.push(Finding { severity, dir, memory, first, problem });
    }

    fn error(&mut self, problem: String) {
        self.tell(Severity::Error, None, None, problem);
    }

    fn snapshot(&mut self) -> Result<()> {
        if let Err(link) = &self.chain.snapshot(self.id).parent {
            self.error(with_sources(link));
        }
        if let Err(link) = self.chain.require_bond(self.id) {
            self.error(with_sources(&link));
        } else if self.chain.is_older_than_parent(self.id) {
            let problem = "it seems older than its parent, by date and time since boot: if \
                           another dump has replaced the parent, the pages that this snapshot takes \
                           from it are wrong";
            self.tell(Severity::Note, None, None, problem.to_owned());
        }
        if self.images().stat(DEDUP_STAGE).is_ok_and(|stat| !stat.is_file) {
            let problem = "a deduplication was interrupted here; running it again finishes it";
            self.tell(Severity::Note, None, None, problem.to_owned());
        }
        if let Err(problem) = self.images().verify() {
            self.error(problem);
        }
        self.all_images()?;
        self.processes();
        let mut claims = BTreeMap::new();
        for memory in self.chain.memories(self.id)? {
            (self.one_more)();
            if let Some(pages_id) = self.memory(memory)
                && let Some(other) = claims.insert(pages_id, memory)
            {
                let problem = format!("{other} claims {} as well", Kind::Pages.file_name(pages_id));
                self.tell(Severity::Error, Some(memory), None, problem);
            }
        }
        for memory in self.chain.leftovers(self.id)? {
            let problem = "no process of the tree has this memory: it is left over from an earlier \
                           dump into the same directory";
            self.tell(Severity::Note, Some(memory), None, problem.to_owned());
            if let Ok(pagemap) = self.images().pagemap(memory) {
                claims.entry(pagemap.pages_id().into()).or_insert(memory);
            }
        }
        for kind in [Kind::Pages, Kind::Punched] {
            for stray in self.numbers(kind)?.into_iter().filter(|id| !claims.contains_key(id)) {
                let problem = format!("no pagemap claims {}", kind.file_name(stray));
                self.tell(Severity::Note, None, None, problem);
            }
        }
        Ok(())
    }

    /// Returns the names of the files, sorted.
    fn file_names(&self) -> Result<Vec<String>> {
        let mut names = self.chain.list(self.id)?;
        names.sort_unstable();
        Ok(names)
    }

    /// Returns the numbers of the files of a kind.
    fn numbers(&self, kind: Kind) -> Result<Vec<u64>> {
        let number = |name: &String| match desc::by_file_name(name)? {
            (desc, number) if desc.kind == kind => Some(number),
            _ => None,
        };
        Ok(self.file_names()?.iter().filter_map(number).collect())
    }

    /// Decodes every image to its end, except pagemaps, which are checked separately.
    fn all_images(&mut self) -> Result<()> {
        for name in self.file_names()? {
            let Some((desc, _)) = desc::by_file_name(&name) else { continue };
            if matches!(desc.body, Body::Raw | Body::Pagemap) {
                continue;
            }
            (self.one_more)();
            if let Err(error) = self.images().image_called(&name, desc.kind).and_then(verify) {
                self.error(with_sources(&error));
            }
        }
        Ok(())
    }

    /// Reports why the processes of the snapshot cannot be restored, apart from their
    /// memory.
    fn processes(&mut self) {
        let (_, problems) = tree::read(&**self.images(), self.is_restored);
        for problem in problems {
            // Images that cannot be read have been reported already.
            let severity = if problem.is_broken { Severity::Error } else { Severity::Note };
            let here = self.chain.snapshot(self.id).path();
            let is_told = self.findings.iter().any(|finding| {
                finding.dir == here && problem.text.ends_with(finding.problem.as_str())
            });
            if !is_told {
                self.tell(severity, None, None, problem.text);
            }
        }
    }

    /// Checks one memory and returns the number of its pages file.
    fn memory(&mut self, memory: MemoryId) -> Option<u64> {
        let tell = |check: &mut Self, error: &ImageError| {
            check.tell(Severity::Error, Some(memory), None, with_sources(error));
        };
        let mut reader = match self.images().pagemap(memory) {
            Ok(reader) => reader,
            Err(error) => {
                tell(self, &error);
                return None;
            }
        };
        let name = memory.pagemap_name();
        let journal = punched::read(&**self.images(), &name, reader.pages_id());
        let gone = journal.unwrap_or_else(|error| {
            tell(self, &error);
            None
        });
        let gone = gone.unwrap_or_default();
        let mut own = Vec::new();
        let mut present = 0;
        for entry in reader.by_ref() {
            match entry {
                Ok(entry) => {
                    pieces(0, present, &entry, &gone, |piece| piece::push(&mut own, piece));
                    present += entry.pages_in_file();
                }
                Err(error) => {
                    tell(self, &error);
                    break;
                }
            }
        }
        let pages_id = u64::from(reader.pages_id());
        self.pages_file(memory, pages_id, &own, present, &gone);
        self.absent(memory, &own);
        self.parents(memory, own);
        Some(pages_id)
    }

    fn absent(&mut self, memory: MemoryId, pieces: &[Piece]) {
        let absent = pieces.iter().filter(|piece| piece.place() == PiecePlace::Absent);
        let absent: Vec<&Piece> = absent.collect();
        self.some(memory, &absent, |piece| {
            format!("{} in no image: the dump left them at its source", are(piece.pages()))
        });
    }

    /// Checks that the parent has every page that the snapshot asks of it. Pages that the
    /// parent asks of its own parent are checked with the parent.
    fn parents(&mut self, memory: MemoryId, own: Vec<Piece>) {
        if own.iter().all(|piece| piece.place() != PiecePlace::Parent) {
            return;
        }
        let parent = match self.chain.snapshot(self.id).parent {
            Ok(Some(parent)) => parent,
            Ok(None) => {
                let asking = own.into_iter().filter(|piece| piece.place() == PiecePlace::Parent);
                let asking: Vec<Piece> = asking.collect();
                self.some(memory, &asking.iter().collect::<Vec<_>>(), |piece| {
                    format!(
                        "{} in the parent according to the pagemap, but there is no parent",
                        are(piece.pages())
                    )
                });
                return;
            }
            Err(_) => return, // told already
        };
        let path = self.chain.images(parent).path_of(&memory.pagemap_name());
        let mut below = Vec::new();
        match self.chain.images(parent).pagemap(memory) {
            Ok(reader) => {
                // The pages before a defect; the defect is reported with that pagemap.
                let none = PageRanges::new();
                for entry in reader.map_while(|entry| entry.ok()) {
                    pieces(1, 0, &entry, &none, |piece| piece::push(&mut below, piece));
                }
            }
            Err(error) if error.is_missing() => {}
            Err(_) => return,
        }
        let merged = overlay::merge(&[
            Merged { pieces: &own, gaps: Gaps::Nothing, lowest: 0 },
            Merged { pieces: &below, gaps: Gaps::Nothing, lowest: 1 },
        ]);
        let missing =
            merged.iter().filter(|piece| matches!(piece.place(), PiecePlace::Missing { .. }));
        self.some(memory, &missing.collect::<Vec<_>>(), |piece| {
            let path = path.display();
            format!(
                "{} in the parent according to the pagemap, but {path} has no entry for them",
                are(piece.pages())
            )
        });
    }

    /// Reports the first of many findings, and the number of the others.
    fn some(&mut self, memory: MemoryId, pieces: &[&Piece], problem: impl Fn(&Piece) -> String) {
        for piece in pieces.iter().take(TOLD) {
            self.tell(Severity::Error, Some(memory), Some(piece.first()), problem(piece));
        }
        if let Some(more @ 1..) = pieces.len().checked_sub(TOLD) {
            let first = pieces.get(TOLD).map(|piece| piece.first());
            self.tell(Severity::Error, Some(memory), first, format!("and {more} more of these"));
        }
    }

    /// Reports freed pages of the snapshot.
    fn gone(&mut self, gone: &[Gone]) {
        // Of one memory and of the same severity.
        for same in gone.chunk_by(|a, b| (a.memory, a.needed) == (b.memory, b.needed)) {
            let (memory, needed) = (same[0].memory, same[0].needed);
            // Freeing pages of an ancestor sacrifices it on purpose, so only a tip must be
            // restorable.
            let severity = if self.is_tip { Severity::Error } else { Severity::Note };
            let rest = if needed { "" } else { "; its descendants can" };
            for gone in same.iter().take(TOLD) {
                let holder = self.chain.snapshot(gone.holder).path().display();
                let problem = format!(
                    "{} gone, freed in {holder}: this snapshot can no longer be restored{rest}",
                    are(gone.pages)
                );
                self.tell(severity, Some(memory), Some(gone.first), problem);
            }
            if let Some(next) = same.get(TOLD) {
                let pages: u64 = same[TOLD..].iter().map(|gone| gone.pages).sum();
                let problem =
                    format!("and {} more places, where {} gone", same.len() - TOLD, are(pages));
                self.tell(severity, Some(memory), Some(next.first), problem);
            }
        }
    }

    /// Checks that a pages file holds exactly the pages of its pagemap; `gone` are its
    /// freed pages.
    fn pages_file(
        &mut self,
        memory: MemoryId,
        pages_id: u64,
        pieces: &[Piece],
        present: u64,
        gone: &PageRanges,
    ) {
        let name = Kind::Pages.file_name(pages_id);
        let wanted = page_bytes(present);
        let address = |file_page: u64| {
            pieces.iter().find_map(|piece| match piece.place() {
                PiecePlace::Stored { file_page: start, .. }
                | PiecePlace::Punched { file_page: start, .. }
                    if (start..start + piece.pages()).contains(&file_page) =>
                {
                    Some(PageIndex(piece.first().0 + (file_page - start)))
                }
                _ => None,
            })
        };
        let found = (|| {
            let file = self.chain.files().get(self.chain.files().enter(self.images(), &name))?;
            let len = file.stat()?.len;
            Ok::<_, ChainError>((len, holes::in_file(&file, 0, wanted)?))
        })();
        let (len, holes) = match found {
            Ok(found) => found,
            Err(ChainError::Open { source, .. })
                if present == 0 && source.kind() == std::io::ErrorKind::NotFound =>
            {
                return; // nothing is asked of it
            }
            Err(error) => {
                self.tell(Severity::Error, Some(memory), address(0), with_sources(&error));
                return;
            }
        };
        if len < wanted {
            let problem = format!("{name} is cut short: it has {len} bytes, expected {wanted}");
            self.tell(Severity::Error, Some(memory), address(len / PAGE_SIZE), problem);
        } else if len > wanted {
            let problem = format!("{name} has {len} bytes, its pagemap accounts for {wanted} only");
            self.tell(Severity::Error, Some(memory), None, problem);
        }
        let holes: PageRanges =
            holes.iter().map(|hole| hole.start.div_ceil(PAGE_SIZE)..hole.end / PAGE_SIZE).collect();
        // Pages in the journal are reported for every snapshot that needs them.
        let mut unnamed = holes;
        gone.iter().for_each(|range| unnamed.remove(range));
        if let Some(first) = unnamed.iter().next() {
            let pages = unnamed.pages();
            let problem = format!(
                "{} holes in {name}, which read as zero: if a deduplication freed them, this \
                 snapshot can no longer be restored; its descendants can",
                are(pages)
            );
            self.tell(Severity::Note, Some(memory), address(first.start), problem);
        }
    }
}
