//! The messages in the queue of a socket, in the memory of the kernel
//! ([`kernel`](crate::res::kernel)), where no call shows them.

use std::{
    fs::File,
    io::{Read, Write},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::UnixStream,
    },
};

use crate::{
    res::kernel::{Kernel, KernelError, KernelResult},
    sys::kernel_memory::KernelAddr,
};

/// The most bytes of a message: far above what the kernel puts into one.
const MESSAGE_MAX_BYTES: u32 = 1 << 24;

/// `MAX_SKB_FRAGS` is at most this (`linux/skbuff.h`).
const FRAGMENTS_MAX: usize = 45;

/// The size of `skb_frag_t`: an address, a length, an offset.
const FRAGMENT_BYTES: usize = 16;

/// The number of random bytes that a message of rcriu's own repeats, and the message's length.
const KNOWN_BYTES: usize = 256;
const OWN_BYTES: usize = 16 << 10;

/// Returns the `struct socket` of a socket.
pub(super) fn socket(kernel: &mut Kernel, fd: BorrowedFd) -> KernelResult<KernelAddr> {
    let file = kernel.file(fd)?;
    kernel.pointer(file, "file", "private_data")
}

/// Returns the `struct sock` of a socket.
pub(super) fn sock(kernel: &mut Kernel, fd: BorrowedFd) -> KernelResult<KernelAddr> {
    let socket = socket(kernel, fd)?;
    kernel.pointer(socket, "socket", "sk")
}

/// Returns the messages in the receive queue of a `struct sock`, which may have at most `max`.
pub(super) fn queue(
    kernel: &mut Kernel,
    sock: KernelAddr,
    max: u32,
) -> KernelResult<Vec<KernelAddr>> {
    let head = kernel.member(sock, "sock", "sk_receive_queue")?;
    let count = kernel.word(head, "sk_buff_head", "qlen")?;
    if count > max {
        return Err(KernelError::Unexpected("a queue"));
    }
    let mut found = Vec::new();
    let mut at = kernel.pointer(head, "sk_buff_head", "next")?;
    while at != head {
        if found.len() >= count as usize {
            return Err(KernelError::Unexpected("a queue that changes"));
        }
        found.push(at);
        at = kernel.pointer(at, "sk_buff", "next")?;
    }
    Ok(found)
}

/// Returns the bytes of a message, a `struct sk_buff`.
pub(super) fn data(kernel: &mut Kernel, at: KernelAddr) -> KernelResult<Vec<u8>> {
    let bytes = kernel.word(at, "sk_buff", "len")?;
    let in_pages = kernel.word(at, "sk_buff", "data_len")?;
    if bytes > MESSAGE_MAX_BYTES || in_pages > bytes {
        return Err(KernelError::Unexpected("a message"));
    }
    let start = kernel.pointer(at, "sk_buff", "data")?;
    let mut data = kernel.bytes(start, (bytes - in_pages) as usize, "a message")?;
    if in_pages > 0 {
        for (page, offset, len) in fragments(kernel, at)? {
            if len > bytes {
                return Err(KernelError::Unexpected("the pages of a message"));
            }
            if !kernel.knows_pages() {
                find_pages(kernel)?;
            }
            let page = kernel.page(page)?.plus(offset.into());
            data.extend(kernel.bytes(page, len as usize, "the pages of a message")?);
        }
    }
    if data.len() != bytes as usize {
        return Err(KernelError::Unexpected("the length of a message"));
    }
    Ok(data)
}

/// Returns the pages of a message, each with an offset and a length.
fn fragments(kernel: &mut Kernel, at: KernelAddr) -> KernelResult<Vec<(KernelAddr, u32, u32)>> {
    let head = kernel.pointer(at, "sk_buff", "head")?;
    let info = head.plus(kernel.word(at, "sk_buff", "end")?.into());
    let count = kernel.member(info, "skb_shared_info", "nr_frags")?;
    let count = usize::from(kernel.bytes(count, 1, "a message")?[0]);
    let list = kernel.pointer(info, "skb_shared_info", "frag_list")?;
    if count > FRAGMENTS_MAX || !list.is_null() {
        return Err(KernelError::Unexpected("the pages of a message"));
    }
    let frags = kernel.member(info, "skb_shared_info", "frags")?;
    let frags = kernel.bytes(frags, count * FRAGMENT_BYTES, "the pages of a message")?;
    let word = |bytes: &[u8]| u32::from_ne_bytes(bytes.try_into().expect("4 bytes"));
    let fragment = |bytes: &[u8]| {
        let page = u64::from_ne_bytes(bytes[..8].try_into().expect("8 bytes"));
        (KernelAddr(page), word(&bytes[12..16]), word(&bytes[8..12]))
    };
    Ok(frags.chunks_exact(FRAGMENT_BYTES).map(fragment).collect())
}

/// Finds out where the kernel has mapped its memory, by a message of its own.
fn find_pages(kernel: &mut Kernel) -> KernelResult<()> {
    let failed = |_| KernelError::Unexpected("a message of its own");
    let mut random = [0; KNOWN_BYTES];
    File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut random)).map_err(failed)?;
    // All of it fits into one message, and its end into a page.
    let bytes: Vec<u8> = random.iter().copied().cycle().take(OWN_BYTES).collect();
    let (mut here, there) = UnixStream::pair().map_err(failed)?;
    here.write_all(&bytes).map_err(failed)?;
    let sock = sock(kernel, there.as_fd())?;
    let message = queue(kernel, sock, 1)?.first().copied();
    let message = message.ok_or(KernelError::Unexpected("a message of its own"))?;
    let before =
        kernel.word(message, "sk_buff", "len")? - kernel.word(message, "sk_buff", "data_len")?;
    let (page, offset, len) = fragments(kernel, message)?
        .first()
        .copied()
        .ok_or(KernelError::Unexpected("a message of its own"))?;
    let known = bytes.get(before as usize..).unwrap_or_default();
    let known = &known[..known.len().min(len as usize).min(KNOWN_BYTES)];
    kernel.find_pages(page, offset.into(), known)
}
