//! Seccomp filters in `seccomp.img`.
//!
//! A thread names the filter that it installed first; `prev` of each filter names the one that it
//! installed next.

use super::proto::{CoreEntry, SeccompEntry, SeccompFilter, SeccompMode};

/// Bytes of an instruction (`struct sock_filter`, `linux/filter.h`).
pub const INSTRUCTION_BYTES: usize = 8;

/// The most instructions of a filter (`BPF_MAXINSNS`, `linux/bpf_common.h`).
const MAX_INSTRUCTIONS: usize = 4096;

/// The most instructions in all filters of a thread, and the number that each filter adds to its
/// own (`MAX_INSNS_PER_PATH`, `kernel/seccomp.c`).
const MAX_ALL: usize = (1 << 18) / INSTRUCTION_BYTES;
const EACH: usize = 4;

/// Bits of [`SeccompFilter::flags`] (`linux/seccomp.h`).
pub mod flags {
    /// All threads of the process get the filter (`SECCOMP_FILTER_FLAG_TSYNC`). The format says so
    /// of filters of a leader whose other threads have no filters in the images.
    pub const SHARED: u32 = 1 << 0;
    /// Actions are logged (`SECCOMP_FILTER_FLAG_LOG`).
    pub const LOG: u32 = 1 << 1;
    /// Speculation stays as it is (`SECCOMP_FILTER_FLAG_SPEC_ALLOW`).
    pub const SPEC_ALLOW: u32 = 1 << 2;
}

/// The restriction of a thread's system calls.
#[derive(Clone, Debug, PartialEq)]
pub enum Confinement<'a> {
    /// Nothing.
    None,
    /// Strict mode: it can only read, write and exit.
    Strict,
    /// These filters, the oldest first.
    Filters(Vec<&'a SeccompFilter>),
}

/// Returns the restriction of each thread of a process, whose cores are `cores`, the leader first.
/// `entry` is that of `seccomp.img`, if there is one.
///
/// # Errors
/// A thread in an unknown mode; those of [`chain`].
pub fn of_process<'a>(
    entry: Option<&'a SeccompEntry>,
    cores: &[&CoreEntry],
) -> Result<Vec<Confinement<'a>>, String> {
    let nothing: &'static SeccompEntry = const { &SeccompEntry { seccomp_filters: Vec::new() } };
    let mut found: Vec<Confinement<'a>> = Vec::with_capacity(cores.len());
    for core in cores {
        let mut confinement = own(entry.unwrap_or(nothing), core, cores)?;
        if let (Confinement::None, Some(Confinement::Filters(of_leader))) =
            (&confinement, found.first())
        {
            let is_shared =
                |filter: &&&SeccompFilter| filter.flags.unwrap_or(0) & flags::SHARED != 0;
            let shared: Vec<_> = of_leader.iter().filter(is_shared).copied().collect();
            if !shared.is_empty() {
                confinement = Confinement::Filters(shared);
            }
        }
        found.push(confinement);
    }
    Ok(found)
}

/// Returns the restriction of one thread.
fn own<'a>(
    entry: &'a SeccompEntry,
    core: &CoreEntry,
    cores: &[&CoreEntry],
) -> Result<Confinement<'a>, String> {
    let thread = core.thread_core.as_ref();
    let (mode, filter) = match thread.and_then(|thread| thread.seccomp_mode) {
        Some(mode) => (mode, thread.and_then(|thread| thread.seccomp_filter)),
        // Before CRIU 3.9, the core of the leader had it for the whole process.
        None => {
            let task = cores.first().and_then(|leader| leader.tc.as_ref());
            let mode = task.and_then(|task| task.old_seccomp_mode).unwrap_or(0);
            (mode, task.and_then(|task| task.old_seccomp_filter))
        }
    };
    match SeccompMode::try_from(mode) {
        Ok(SeccompMode::Disabled) => Ok(Confinement::None),
        Ok(SeccompMode::Strict) => Ok(Confinement::Strict),
        Ok(SeccompMode::Filter) => chain(entry, filter.unwrap_or(0)).map(Confinement::Filters),
        Err(_) => Err(format!("its seccomp mode {mode} is unknown")),
    }
}

/// Returns the filters of a thread in the order in which it installed them. `first` is the number
/// in its core.
///
/// # Errors
/// A filter that is missing or malformed; more instructions than the kernel takes.
pub fn chain(entry: &SeccompEntry, first: u32) -> Result<Vec<&SeccompFilter>, String> {
    let mut found = Vec::new();
    let mut next = Some(first);
    let mut total = 0;
    while let Some(number) = next {
        let position = usize::try_from(number).unwrap_or(usize::MAX);
        let filter = entry.seccomp_filters.get(position);
        let filter = filter.ok_or_else(|| format!("seccomp.img has no filter {number}"))?;
        let len = filter.filter.len();
        let instructions = len / INSTRUCTION_BYTES;
        if !len.is_multiple_of(INSTRUCTION_BYTES) || !(1..=MAX_INSTRUCTIONS).contains(&instructions)
        {
            return Err(format!("filter {number} of seccomp.img has {len} bytes"));
        }
        let known = flags::SHARED | flags::LOG | flags::SPEC_ALLOW;
        let given = filter.flags.unwrap_or(0);
        if given & !known != 0 {
            return Err(format!("filter {number} of seccomp.img has the unknown flags {given:#x}"));
        }
        total += instructions + EACH;
        if total > MAX_ALL + EACH {
            return Err(format!(
                "the filters from number {first} of seccomp.img on have more than {MAX_ALL} \
                 instructions"
            ));
        }
        found.push(filter);
        next = filter.prev;
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter(bytes: usize, prev: Option<u32>) -> SeccompFilter {
        SeccompFilter { filter: vec![0; bytes], prev, flags: None }
    }

    #[test]
    fn filters_follow_one_another_to_the_last() {
        let seccomp_filters = vec![filter(8, None), filter(16, Some(0)), filter(24, Some(1))];
        let entry = SeccompEntry { seccomp_filters };
        let lengths = |first| {
            let chain = chain(&entry, first).unwrap();
            chain.iter().map(|filter| filter.filter.len()).collect::<Vec<_>>()
        };
        assert_eq!(lengths(2), [24, 16, 8]);
        assert_eq!(lengths(0), [8]);
    }

    fn core(mode: SeccompMode, first: Option<u32>) -> CoreEntry {
        let thread_core = Some(super::super::proto::ThreadCoreEntry {
            seccomp_mode: Some(mode.into()),
            seccomp_filter: first,
            ..Default::default()
        });
        CoreEntry { thread_core, ..Default::default() }
    }

    #[test]
    fn threads_without_filters_have_the_shared_ones_of_their_leader() {
        let mut seccomp_filters = vec![filter(8, None), filter(16, Some(0)), filter(24, None)];
        seccomp_filters[1].flags = Some(flags::SHARED);
        let entry = SeccompEntry { seccomp_filters };
        let leader = core(SeccompMode::Filter, Some(1));
        let none = core(SeccompMode::Disabled, None);
        let other = core(SeccompMode::Filter, Some(2));
        let strict = core(SeccompMode::Strict, None);
        let cores = [&leader, &none, &other, &strict];
        let all = &entry.seccomp_filters;
        let expected = [
            Confinement::Filters(vec![&all[1], &all[0]]),
            Confinement::Filters(vec![&all[1]]),
            Confinement::Filters(vec![&all[2]]),
            Confinement::Strict,
        ];
        assert_eq!(of_process(Some(&entry), &cores).unwrap(), expected);
        let missing = of_process(None, &cores).unwrap_err();
        assert_eq!(missing, "seccomp.img has no filter 1");
    }

    #[test]
    fn hostile_filters_are_errors() {
        let mut flagged = filter(8, None);
        flagged.flags = Some(8);
        let seccomp_filters = vec![
            filter(8, Some(0)),
            filter(7, None),
            filter(0, None),
            filter((MAX_INSTRUCTIONS + 1) * 8, None),
            filter(8, Some(9)),
            flagged,
        ];
        let entry = SeccompEntry { seccomp_filters };
        let rows = [
            (0, "the filters from number 0 of seccomp.img on have more than 32768 instructions"),
            (1, "filter 1 of seccomp.img has 7 bytes"),
            (2, "filter 2 of seccomp.img has 0 bytes"),
            (3, "filter 3 of seccomp.img has 32776 bytes"),
            (4, "seccomp.img has no filter 9"),
            (5, "filter 5 of seccomp.img has the unknown flags 0x8"),
            (6, "seccomp.img has no filter 6"),
        ];
        for (first, problem) in rows {
            assert_eq!(chain(&entry, first).unwrap_err(), problem);
        }
    }
}
