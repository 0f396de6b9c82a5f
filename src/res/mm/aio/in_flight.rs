//! Counts the requests of an AIO context that have not completed, which no call shows.
//!
//! A context has a fixed number of requests. The kernel counts free ones in the context itself and
//! for each processor, and completions whose requests it has not freed yet. The others are in
//! flight.

use std::{
    fs::{self, File},
    os::fd::AsFd,
    path::Path,
};

use crate::{
    res::kernel::{Kernel, KernelError, KernelResult},
    sys::{kernel_memory::KernelAddr, process, task},
    units::{HostPid, RemoteAddr},
};

/// The most contexts of a process that are looked at.
const CONTEXTS_MAX: u32 = 1 << 16;

/// Where the kernel lists processors.
const PROCESSORS: &str = "/sys/devices/system/cpu";

/// The most processors of a kernel (`NR_CPUS_RANGE_END`, `arch/x86/Kconfig`).
const PROCESSORS_MAX: u32 = 8192;

/// The contexts of a process, in the memory of the kernel.
#[derive(Debug)]
pub(super) struct Contexts {
    kernel: Kernel,
    /// The `mm_struct`.
    memory: KernelAddr,
    /// What is added to the address of a variable of all processors to get that of each.
    offsets: Vec<u64>,
    /// Holds `memory`.
    _file: File,
}

impl Contexts {
    /// Prepares for counting. Changes nothing.
    pub(super) fn open(pid: HostPid) -> KernelResult<Self> {
        let mut kernel = Kernel::open()?;
        let file = process::open_memory(pid).map_err(KernelError::Open)?;
        let of_file = kernel.file(file.as_fd())?;
        let memory = kernel.pointer(of_file, "file", "private_data")?;
        let offsets = per_cpu_offsets(&mut kernel)?;
        Ok(Self { kernel, memory, offsets, _file: file })
    }

    /// Returns how many requests of the context with this ring are in flight; `None` if the process
    /// has only the ring.
    pub(super) fn requests(&mut self, ring: RemoteAddr) -> KernelResult<Option<u32>> {
        const TABLE: &str = "kioctx_table";
        let table = self.kernel.pointer(self.memory, "mm_struct", "ioctx_table")?;
        if table.is_null() {
            return Ok(None);
        }
        let count = self.kernel.word(table, TABLE, "nr")?.min(CONTEXTS_MAX);
        let list = self.kernel.member(table, TABLE, "table")?;
        for position in 0..u64::from(count) {
            let at = KernelAddr(self.kernel.long_at(list.plus(position * 8), TABLE)?);
            if !at.is_null() && self.kernel.long(at, "kioctx", "user_id")? == ring.0 {
                return self.of_context(at).map(Some);
            }
        }
        Ok(None)
    }

    fn of_context(&mut self, at: KernelAddr) -> KernelResult<u32> {
        const CONTEXT: &str = "kioctx";
        // One place in the ring stays empty.
        let all = self.kernel.word(at, CONTEXT, "nr_events")?.saturating_sub(1);
        let mut free = u64::from(self.kernel.word(at, CONTEXT, "reqs_available")?)
            + u64::from(self.kernel.word(at, CONTEXT, "completed_events")?);
        let each = self.kernel.pointer(at, CONTEXT, "cpu")?;
        for offset in &self.offsets {
            let at = each.plus(*offset);
            free += u64::from(self.kernel.word(at, "kioctx_cpu", "reqs_available")?);
        }
        u64::from(all)
            .checked_sub(free)
            .and_then(|count| u32::try_from(count).ok())
            .ok_or(KernelError::Unexpected("the free requests of an AIO context"))
    }
}

/// Returns what the kernel adds to the address of a variable that each processor has, for each
/// processor.
///
/// The kernel shows where such variables are only relative to their section. But a thread leads to
/// the run queue of the processor that it runs on, which is such a variable. So this thread runs
/// on each of them once.
fn per_cpu_offsets(kernel: &mut Kernel) -> KernelResult<Vec<u64>> {
    let read = |file: &str| {
        fs::read_to_string(Path::new(PROCESSORS).join(file)).map_err(KernelError::Processors)
    };
    let online = read("online")?;
    // One that is offline may have free requests.
    let numbers = numbers(&online).filter(|_| read("present").is_ok_and(|all| all == online));
    let numbers = numbers.ok_or(KernelError::Unexpected("processors that are offline"))?;
    let own = HostPid(0);
    let before = task::affinity(own).map_err(KernelError::Run)?;
    let mut look = |number: u32| {
        let mut words = vec![0; number as usize / 64 + 1];
        words[number as usize / 64] = 1 << (number % 64);
        task::set_affinity(own, &words).map_err(KernelError::Run)?;
        of_processor(kernel, number)
    };
    let found = numbers.into_iter().map(&mut look).collect();
    task::set_affinity(own, &before).map_err(KernelError::Run)?;
    found
}

/// Returns what the kernel adds for the processor that this thread runs on.
fn of_processor(kernel: &mut Kernel, number: u32) -> KernelResult<u64> {
    let task = kernel.task()?;
    let runnable = kernel.pointer(task, "task_struct", "se.cfs_rq")?;
    let queue = kernel.pointer(runnable, "cfs_rq", "rq")?;
    if kernel.word(queue, "rq", "cpu")? != number {
        return Err(KernelError::Unexpected("the run queue of a processor"));
    }
    let section = queue.minus(kernel.per_cpu_variable("runqueues")?);
    let at = section.plus(kernel.per_cpu_variable("this_cpu_off")?);
    kernel.long_at(at, "the offset of a processor")
}

/// Parses a list such as `0-3,7`; `None` if it is malformed.
fn numbers(list: &str) -> Option<Vec<u32>> {
    let mut found = Vec::new();
    for part in list.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
        if last >= PROCESSORS_MAX {
            return None;
        }
        found.extend(first..=last);
    }
    Some(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_processors_are_parsed() {
        assert_eq!(numbers("0\n"), Some(vec![0]));
        assert_eq!(numbers("0-2,7\n"), Some(vec![0, 1, 2, 7]));
        for bad in ["", "x", "0-", "0-4294967295"] {
            assert_eq!(numbers(bad), None, "{bad}");
        }
    }
}
