//! Dumps queues of the test process and restores them beside the originals.

use std::{ffi::CString, os::fd::AsFd};

use nix::libc;

use crate::{
    res::file::testing::Tree,
    skip::skip,
    sys::{
        kernel_memory::KernelMemory,
        mqueue::{self, QueueAttributes},
    },
};

const SIZE: QueueAttributes = QueueAttributes { messages_max: 7, message_bytes: 8000, messages: 0 };

/// Skips a test unless the machine lets it read the memory of the kernel.
fn require_kernel_memory() {
    if KernelMemory::open().is_err() {
        skip("CAP_BPF and CAP_PERFMON");
    }
}

#[test]
fn privileged_a_queue_that_is_gone_is_created_with_its_messages() {
    require_kernel_memory();
    let name = CString::new(format!("rcriu-unit-{}", std::process::id())).unwrap();
    let queue = mqueue::create(&name, &SIZE).unwrap();
    let large: Vec<u8> = (0..8000_u32).map(|n| (n % 251) as u8).collect();
    mqueue::send(queue.as_fd(), &large, 3).unwrap();
    mqueue::send(queue.as_fd(), b"first", 9).unwrap();
    mqueue::send(queue.as_fd(), b"", 3).unwrap();
    let reader = mqueue::open(&name, libc::O_RDONLY).unwrap();
    let mut tree = Tree::new();
    tree.add(0, queue);
    tree.add(1, reader);
    let dumped = tree.dump();
    assert_eq!(mqueue::open(&name, libc::O_RDONLY).map(|fd| messages(&fd)), Ok(3));
    mqueue::unlink(&name).unwrap();
    let restored = dumped.clone().restore();
    let found = mqueue::attributes(restored.get(1)).unwrap();
    assert_eq!(found, QueueAttributes { messages: 3, ..SIZE });
    assert_eq!(restored.flags(0), restored.before(0).flags);
    assert_eq!(restored.flags(1), restored.before(1).flags);
    // A second dump finds the same.
    let mut tree = Tree::new();
    tree.add(0, restored.take(0));
    let again = tree.dump();
    let state = |dumped: &crate::res::file::testing::Dumped| {
        dumped.entry(0).mqueue.as_ref().unwrap().messages.clone()
    };
    assert_eq!(state(&again), state(&dumped));
    let order: Vec<_> = state(&again).iter().map(|message| message.data.len()).collect();
    assert_eq!(order, [5, 8000, 0]);
    mqueue::unlink(&name).unwrap();
}

fn messages(fd: &std::os::fd::OwnedFd) -> i64 {
    mqueue::attributes(fd.as_fd()).unwrap().messages
}
