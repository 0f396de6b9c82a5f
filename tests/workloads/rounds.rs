//! Memory that changes on request, so that a chain of dumps has something in every link.
//!
//! Whenever the file STATUS.round is there, some pages are written, and one is made
//! zero, in memory of every kind, by the process and by its child; then the file is
//! removed. What the memory must hold after a restore follows from the number of rounds.

use std::fs;

use crate::{
    Row,
    kit::{Area, Checkpoint, PAGE, Verdict, give_back_zeros, nap, wait_until},
};

pub const ROWS: &[Row] = &[("rounds", rounds)];

/// Pages of each memory.
const PAGES: usize = 64;

/// Pages that a round writes in each.
const WRITTEN: usize = 5;

/// Words of the page by which parent and child talk.
const ROUND: usize = 0;
const DONE: usize = 1;

/// One memory: where it is, and what tells it from the others.
#[derive(Clone, Copy)]
struct Memory {
    area: Area,
    what: &'static str,
    number: u64,
}

impl Memory {
    fn new(area: Area, what: &'static str, number: u64) -> Self {
        let memory = Self { area, what, number };
        for page in 0..PAGES {
            area.page(page).fill(memory.seed(page, 0));
        }
        memory
    }

    fn seed(self, page: usize, round: u64) -> u64 {
        self.number << 32 | (page as u64) << 16 | round
    }

    /// The pages that a round writes, and the one that it makes zero.
    fn touched(self, round: u64) -> ([usize; WRITTEN], usize) {
        let start = (round * 11 + self.number * 5) as usize;
        let mut written = [0; WRITTEN];
        for (number, page) in written.iter_mut().enumerate() {
            *page = (start + number * 3) % PAGES;
        }
        (written, (start + 1) % PAGES)
    }

    fn write(self, round: u64) {
        let (written, zeroed) = self.touched(round);
        for page in written {
            self.area.page(page).fill(self.seed(page, round));
        }
        for word in 0..PAGE / 8 {
            self.area.page(zeroed).set(word, 0);
        }
    }

    fn verify(self, rounds: u64) -> Verdict {
        let mut seeds: Vec<_> = (0..PAGES).map(|page| Some(self.seed(page, 0))).collect();
        for round in 1..=rounds {
            let (written, zeroed) = self.touched(round);
            for page in written {
                seeds[page] = Some(self.seed(page, round));
            }
            seeds[zeroed] = None;
        }
        for (page, seed) in seeds.into_iter().enumerate() {
            let what = format!("page {page} of the {} after {rounds} rounds", self.what);
            match seed {
                Some(seed) => self.area.page(page).verify(&what, seed)?,
                None => self.area.page(page).verify_zero(&what)?,
            }
        }
        Ok(())
    }
}

fn rounds(checkpoint: &Checkpoint) -> Verdict {
    let fd = sys!(memfd_create(c"rounds".as_ptr(), libc::MFD_CLOEXEC))?;
    sys!(ftruncate(fd, (PAGES * PAGE) as i64))?;
    let file = Area::of_file(PAGES, fd, libc::MAP_SHARED)?;
    let control = Area::shared(1)?;
    let shared = Memory::new(Area::shared(PAGES)?, "shared memory", 1);
    let childs = Memory::new(Area::shared(PAGES)?, "shared memory that the child writes", 2);
    let memfd = Memory::new(file, "memfd", 3);
    let private = Memory::new(Area::private(PAGES)?, "private memory", 4);
    let copied = Memory::new(Area::private(PAGES)?, "memory that is copied on write", 5);
    let child = checkpoint.fork(|child| {
        give_back_zeros()?;
        child.announce();
        let mut round = 0;
        while !child.is_go() {
            if control.get(ROUND) > round {
                round += 1;
                childs.write(round);
                copied.write(round);
                control.set(DONE, round);
            }
            nap(2);
        }
        copied.verify(round)?;
        childs.verify(round)?;
        shared.verify(round)
    })?;
    give_back_zeros()?;
    checkpoint.announce();
    let (asked, mut round) = (checkpoint.path("round"), 0);
    while !checkpoint.is_go() {
        if asked.exists() {
            round += 1;
            for memory in [shared, memfd, private] {
                memory.write(round);
            }
            control.set(ROUND, round);
            wait_until("the child's round", || control.get(DONE) == round)?;
            fs::remove_file(&asked).map_err(|error| format!("the request: {error}"))?;
        }
        nap(2);
    }
    for memory in [shared, childs, memfd, private] {
        memory.verify(round)?;
    }
    // The child alone has written to its copy.
    copied.verify(0)?;
    child.join()
}
