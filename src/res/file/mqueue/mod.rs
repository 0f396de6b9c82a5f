//! POSIX message queues (`mq_overview(7)`).
//!
//! A queue with a name stays where it is, with its messages, until the machine ends. The restore
//! opens it again; if it is not there, it creates it with the messages that the images hold. A queue
//! whose name was removed ends with its last descriptor, and is always created.
//!
//! Receiving takes messages out, so the dump reads them from the memory of the kernel.
//!
//! CRIU's images have no entry for queues. To CRIU they are files in `/dev/mqueue`, which it opens
//! if a queue has its name still and that file system is mounted there.

mod dump;
mod restore;

use super::{FileKind, Usage};

/// The row of [`KINDS`](super::KINDS). Its entries have the type of those with a path.
pub(super) const KIND: FileKind = FileKind {
    name: "message queue",
    types: &[],
    usage: Usage::Descriptor,
    collector: |_| Box::new(dump::Queues::default()),
    opener: |_| Box::new(restore::Queues::default()),
};

#[cfg(test)]
mod tests;
