//! How the programs are built, and what holds at all times.
//!
//! # Images and chains
//!
//! An image directory holds a *snapshot*: the state of a tree of processes. Its
//! link `parent` leads to the snapshot before it. A *memory* is the private
//! memory of a process or a shared object; its *pagemap* says of each page that
//! it is in the pages file of the same directory, in the parent, or in no image.
//! A page that no entry covers is zero.
//!
//! A pagemap is a partial function from pages to places in which `PARENT`
//! stands for the function below. Laying one over another is associative.
//! [`crate::chain::Index`] uses that: threads read and merge a stretch of layers
//! at a time, and then merge the stretches, one window of pages after another, so
//! that what is merged stays in a processor's cache. Every merge is one pass over
//! two sorted arrays, and neighbours are merged in pairs. So the cost is the number
//! of entries times a logarithm, and a thousand layers cost little more than what
//! one with the same entries does. A page that a layer sends to its
//! parent and that the parent does not account for is kept as *missing* while
//! merging, since a newer layer may have it; only if none has is it an error.
//!
//! # Bytes
//!
//! All that is shown is a [`crate::chain::Content`]: a function from a range to
//! *runs*, each in one file, in memory, a hole, or lost. Reading, seeking holes,
//! flattening and FUSE stand on that alone. Runs that lie in a row in one file
//! are read by one `preadv(2)`, however they are scattered over the buffer.
//! Nobody touches mapped bytes in user space: backing files are read instead, and
//! a file that shrinks is a short read and not a SIGBUS. Files are opened when
//! first needed and closed by an LRU bound; one that was replaced since it was
//! first opened is an error.
//!
//! # The view
//!
//! [`crate::view::View`] is the tree of a mount, without FUSE: names, attributes
//! and contents. Listing a directory reads names and pagemap heads. An index is
//! built at the first look at a file that needs it, and kept in an LRU cache
//! bounded by the number of extents. Inode numbers are hashes of paths, so that
//! they are the same in every mount.
//!
//! # The mount
//!
//! [`crate::fs`] hands the view to FUSE. A file that is one backing file is read
//! by the kernel itself (pass-through). All others are read without the page
//! cache, so that nothing is held twice: large reads are answered by one
//! `writev(2)` from mappings of the backing files, past `fuser`, whose answers
//! are one piece; the kernel copies from them to the reader, and where a file
//! has become shorter it finds no page and answers with an error itself. Small
//! reads go through a buffer. Before an answer from mappings, the lengths of
//! the files are looked at, as a mapping is zero behind the end of a file that
//! was cut within a page. A panic ends the daemon, and the kernel then answers
//! whoever waits.
//!
//! Files of `mem/` and `core/` are for the owner of the images alone, whatever
//! mode those have: mapped files are read with the rights of who mounts.
//!
//! # Work in other processes
//!
//! [`crate::inject`] stops threads by `PTRACE_SEIZE` and lets them walk a table of
//! system calls: a few dozen instructions in a page of scratch memory. A dump maps
//! that memory for less than a millisecond for each process, asks what only the
//! process knows, unmaps it and puts registers, signal mask and restartable sequences
//! back; memory is read while the tree merely stands still, so that whatever ends
//! this program then lets the tree go on. Dumps run in a process of their own: if
//! the one that the user started is killed, it puts everything back first.
//!
//! # A dump
//!
//! Stop the tree, check that it is one that can be dumped, ask each process, collect
//! descriptors by duplicates (`pidfd_getfd(2)`), copy memory, sync, commit. Images are
//! written to a hidden directory inside the one that was asked for, and moved when all
//! of them are on disk, the inventory last ([`crate::image::SnapshotWriter`]). Memory
//! is read in chunks that stay in the processor's cache; a page is stored only if it is
//! not zero and its bytes differ from those of the parent chain. The parent's content is
//! the truth, so that nobody needs to know who wrote to shared memory. A tree that is
//! not to run on has the disk begin with its images while they are written; for one that
//! is, they are first copied, which is what it waits for.
//!
//! # A restore
//!
//! One thread directs. All files are opened by it, above the numbers that the tree uses;
//! shared memory is made by it and filled by other threads. The first process is a copy
//! of this program that sleeps, is traced, unmaps everything, and maps what it is to
//! have; the others are forked by their true parents when those have their memory, keep
//! what both map the same way, and get only the pages that differ. Sessions and groups
//! whose leaders have ended are led by helpers, which end before the tree goes on.
//! Until the last step the end of this program ends them all (`PTRACE_O_EXITKILL`).
//!
//! What the images of a small process cost is mostly the time to begin: the table of
//! required fields is made by the build script, since the descriptors of all messages
//! take longer to decode than all else takes. Images that are seen through a mount are
//! read where the mount says that they are ([`crate::chain::DIRECTORY_XATTR`]), if the
//! inventory there is the same.
//!
//! # Invariants
//!
//! - Image bytes are untrusted: no length is believed before the file has shown
//!   that many bytes, and whatever contradicts itself is an error that names
//!   file, memory and address.
//! - A page is never answered with another page's bytes or with zeros that
//!   nobody stored: what cannot be found is an error.
//! - An image directory that is written has its inventory last, after everything
//!   else is on disk; a directory without one is not a snapshot.
//! - `image`, `chain` and `view` know neither FUSE nor privileges: they are
//!   built and tested as an ordinary user.
