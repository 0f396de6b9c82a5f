//! Processes that keep a journal in shared memory, for the demonstration.
//!
//! `journal DIR` makes a tree of a keeper and its writers, with pipes in between. A file `DIR/work`
//! makes each writer add a round of entries; the keeper then writes the journal
//! as the tree sees it to `DIR/seen-ROUND`. A file `DIR/verify` makes all of them
//! compare the journal and their own memory with what must be there; the verdict
//! goes to `DIR/verdict`, and the tree ends.
//!
//! `journal --adopt COMMAND...` runs a command and reaps what its processes leave behind:
//! the first process of a container may not do so, and the pid of a process that is not
//! reaped cannot be restored.
#![expect(unsafe_code, reason = "processes that share memory")]

use std::{
    env,
    error::Error,
    ffi::{OsStr, OsString},
    fs,
    io::{self, PipeReader, PipeWriter, Read, Write},
    ops::Range,
    path::Path,
    process::{self, ExitCode},
    thread,
    time::Duration,
};

use nix::sys::{
    prctl,
    wait::{WaitStatus, wait},
};

const WRITERS: usize = 3;
const PAGE: usize = 4096;

/// Pages of the journal that belong to each writer.
const PAGES: usize = 512;

/// Bytes of its own that each writer keeps.
const OWN: usize = 4 << 20;

/// Orders to a writer; it answers with [`GOOD`] or [`BAD`].
const WORK: u8 = b'w';
const VERIFY: u8 = b'v';
const GOOD: u8 = b'y';
const BAD: u8 = b'n';

fn main() -> ExitCode {
    let arguments: Vec<_> = env::args_os().skip(1).collect();
    let done = match arguments.as_slice() {
        [flag, program, arguments @ ..] if flag == "--adopt" => adopt(program, arguments),
        [dir] => keep(Path::new(dir)).map(|()| true),
        _ => Err("usage: journal DIR, or journal --adopt COMMAND...".into()),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("journal: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Runs a command as the parent of all orphans below it, and tells whether it
/// succeeded.
fn adopt(program: &OsStr, arguments: &[OsString]) -> Result<bool, Box<dyn Error>> {
    prctl::set_child_subreaper(true)?;
    let child = process::Command::new(program).args(arguments).spawn()?;
    let child = i32::try_from(child.id())?;
    loop {
        match wait()? {
            WaitStatus::Exited(pid, code) if pid.as_raw() == child => return Ok(code == 0),
            WaitStatus::Signaled(pid, ..) if pid.as_raw() == child => return Ok(false),
            _ => {}
        }
    }
}

/// The keeper of the journal.
fn keep(dir: &Path) -> Result<(), Box<dyn Error>> {
    let journal = Shared::new(WRITERS * PAGES * PAGE)?;
    let mut writers = Vec::new();
    for number in 0..WRITERS {
        writers.push(Writer::start(number, &journal)?);
    }
    let mut rounds = 0;
    loop {
        if taken(&dir.join("work")) {
            rounds += 1;
            for writer in &mut writers {
                writer.order(WORK)?;
            }
            publish(dir, &format!("seen-{rounds}"), journal.bytes())?;
        }
        if taken(&dir.join("verify")) {
            let mut verdict = String::new();
            for (number, writer) in writers.iter_mut().enumerate() {
                match writer.order(VERIFY) {
                    Ok(true) => {}
                    Ok(false) => verdict += &format!("writer {number} finds its memory changed\n"),
                    Err(error) => verdict += &format!("writer {number}: {error}\n"),
                }
                if !is_expected(journal.part(number), number, rounds) {
                    verdict += &format!("the keeper finds the part of writer {number} changed\n");
                }
            }
            if verdict.is_empty() {
                verdict = format!("ok: {rounds} rounds of {WRITERS} writers are all there\n");
            }
            publish(dir, "verdict", verdict.as_bytes())?;
            return Ok(());
        }
        thread::sleep(Duration::from_millis(2));
    }
}

/// Whether there was such a file, which is gone now.
fn taken(path: &Path) -> bool {
    fs::remove_file(path).is_ok()
}

/// Writes a file that is complete as soon as it has its name.
fn publish(dir: &Path, name: &str, bytes: &[u8]) -> io::Result<()> {
    let new = dir.join("new");
    fs::write(&new, bytes)?;
    fs::rename(new, dir.join(name))
}

/// The pages of its part that a writer fills in a round: most of it at first, and
/// then a little.
fn pages_of(number: usize, round: usize) -> Range<usize> {
    if round == 1 {
        return 0..PAGES - 16 * number;
    }
    let first = (round * 97 + number * 11) % (PAGES - 4);
    first..first + 2
}

fn entry(number: usize, page: usize, round: usize) -> Vec<u8> {
    let line = format!("page {page} of writer {number}, written in round {round}\n");
    let mut bytes = line.into_bytes();
    bytes.resize(PAGE, 0);
    bytes
}

/// Whether a writer's part of the journal is as after so many rounds.
fn is_expected(part: &[u8], number: usize, rounds: usize) -> bool {
    part.chunks(PAGE).enumerate().all(|(page, bytes)| {
        match (1..=rounds).rev().find(|round| pages_of(number, *round).contains(&page)) {
            Some(round) => bytes == entry(number, page, round),
            None => bytes.iter().all(|byte| *byte == 0),
        }
    })
}

/// A byte of a writer's own memory.
fn own_byte(number: usize, at: usize) -> u8 {
    u8::try_from((at / PAGE * 7 + at + number) % 251).expect("less than 251")
}

/// A writer as the keeper sees it.
struct Writer {
    orders: PipeWriter,
    answers: PipeReader,
}

impl Writer {
    fn start(number: usize, journal: &Shared) -> io::Result<Self> {
        let (orders, to_writer) = io::pipe()?;
        let (from_writer, answers) = io::pipe()?;
        // SAFETY: there is one thread, so that the child inherits no lock of another.
        match unsafe { libc::fork() } {
            -1 => Err(io::Error::last_os_error()),
            0 => {
                drop((to_writer, from_writer));
                let result = write(number, journal, orders, answers);
                process::exit(i32::from(result.is_err()));
            }
            _ => Ok(Self { orders: to_writer, answers: from_writer }),
        }
    }

    /// Gives an order and returns whether the writer finds everything as it was.
    fn order(&mut self, order: u8) -> io::Result<bool> {
        self.orders.write_all(&[order])?;
        let mut answer = [0];
        self.answers.read_exact(&mut answer)?;
        Ok(answer == [GOOD])
    }
}

/// The life of a writer.
fn write(
    number: usize,
    journal: &Shared,
    mut orders: PipeReader,
    mut answers: PipeWriter,
) -> io::Result<()> {
    let own: Vec<u8> = (0..OWN).map(|at| own_byte(number, at)).collect();
    let mut rounds = 0;
    let mut order = [0];
    loop {
        orders.read_exact(&mut order)?;
        if order == [WORK] {
            rounds += 1;
            for page in pages_of(number, rounds) {
                journal.write(number, page, &entry(number, page, rounds));
            }
        }
        let good = is_expected(journal.part(number), number, rounds)
            && own.iter().enumerate().all(|(at, byte)| *byte == own_byte(number, at));
        answers.write_all(&[if good { GOOD } else { BAD }])?;
    }
}

/// Memory that all processes share.
struct Shared {
    start: *mut u8,
    len: usize,
}

impl Shared {
    fn new(len: usize) -> io::Result<Self> {
        let (rights, kind) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping wherever the kernel likes.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), len, rights, kind, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { start: start.cast(), len })
    }

    fn bytes(&self) -> &[u8] {
        // SAFETY: it stays mapped. Writers write only on the keeper's order, and the keeper
        // awaits their answers before it looks.
        unsafe { std::slice::from_raw_parts(self.start, self.len) }
    }

    fn part(&self, number: usize) -> &[u8] {
        &self.bytes()[number * PAGES * PAGE..][..PAGES * PAGE]
    }

    fn write(&self, number: usize, page: usize, bytes: &[u8]) {
        assert!(number < WRITERS && page < PAGES && bytes.len() == PAGE, "it is in the journal");
        let offset = (number * PAGES + page) * PAGE;
        // SAFETY: the page is in the mapping, and no other process has to do with it
        // before it gets the answer.
        unsafe { self.start.add(offset).copy_from_nonoverlapping(bytes.as_ptr(), PAGE) };
    }
}
