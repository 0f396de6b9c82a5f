//! How the programs work, and which invariants hold.
//!
//! # Images and chains
//!
//! An image directory holds a *snapshot*: the state of a tree of processes. Its link
//! `parent` leads to the snapshot before it. A *memory* is the private memory of a process,
//! or a shared object. Its *pagemap* says of each page whether it is in the pages file of
//! the same directory, in the parent, or in no image. A page without an entry is zero, or,
//! in a private mapping of a file, the page of the file.
//!
//! A pagemap is a partial function from pages to places in which `PARENT` stands for the
//! function below. Overlaying such functions is associative. [`crate::chain::Index`] uses
//! that: threads read and merge stretches of layers, and then merge the stretches, one
//! window of pages after another, so that the data stays in a processor's cache. Every
//! merge is one pass over two sorted arrays, and neighbours are merged in pairs. So the
//! cost is the number of entries times a logarithm, and a thousand layers cost little more
//! than one layer with the same entries. A page that a layer leaves to a parent which does
//! not have it counts as *missing* during the merge, since a newer layer may have it; only
//! if none has, it is an error.
//!
//! Directories are only names, so a child records the dump that it was made on
//! ([`crate::chain::dump_name`]): `rcriu_parent_run_id` in its inventory (field 20001 of
//! `inventory_entry`) is the parent's `dump_criu_run_id`, or a hash of its inventory. Code
//! that resolves pages across a parent link compares the two first. Children that CRIU
//! wrote have no such field; for them, only dates give a hint, and `imgfs check` notes a
//! parent that is younger. A dump never replaces a snapshot that is the parent of a
//! directory beside it.
//!
//! # Stores
//!
//! Readers ask a [`crate::image::ImageStore`] for images by kind and number, never for a
//! path or a descriptor. [`crate::image::Directory`] is one store; an archive that is read
//! in place is another. A store opens images for reading in order or at any offset, lists
//! them, names their owner, and opens the store of the parent. Each request for bytes is
//! for a run, not for a page. Some operations need real files: mapping, pass-through,
//! punching, linking, locking, sharing blocks. For these, code asks
//! [`ImageStore::directory`](crate::image::ImageStore::directory) and
//! [`StoredFile::file`](crate::image::store::StoredFile::file). A reader that gets `None`
//! takes the way that always works; a writer fails with the name of the store. Names of
//! stores are unique; that of a directory is its path. Messages name images by them.
//!
//! A dump passes files to a [`crate::image::store::StoreWriter`]: images in order, pages by
//! offset. The writer syncs them and commits once; a writer that is dropped before leaves
//! no snapshot.
//!
//! # Bytes
//!
//! Everything that the view shows is a [`crate::chain::Content`]: a function from a range
//! to *runs*, each of which is in one file, in memory, a hole, or lost. Reading, seeking
//! holes, flattening and FUSE need nothing else. Runs that are contiguous in one file are
//! read with one `preadv(2)`, even if they are scattered over the buffer. No code reads
//! mapped bytes in user space: it reads the backing files, so that a file that shrinks is a
//! short read and not a SIGBUS. Files are opened when first needed, and the least recently
//! used are closed; a file that was replaced since it was first opened is an error.
//!
//! # The view
//!
//! [`crate::view::View`] is the tree of a mount, without FUSE: names, attributes and
//! contents. Listing a directory reads names and the heads of pagemaps. An index is built
//! when a file that needs it is first used, and kept in an LRU cache that is bounded by the
//! number of extents. Inode numbers are hashes of paths, so they are the same in every
//! mount.
//!
//! # The mount
//!
//! [`crate::fs`] hands the view to FUSE. A file that is one backing file is read by the
//! kernel itself (pass-through). Where the images' file system shares blocks, so is one
//! that lies in several: when it is opened, root's mount makes a file of the same blocks, which
//! has no name from the beginning (`O_TMPFILE`), so that nothing is left of it whatever
//! ends the daemon. Whatever keeps it from being made, the daemon answers as it would
//! without. The kernel does not know that blocks are the same, so this file is read from
//! disk even if the images are in memory: then, the daemon answers at the first open, and
//! a file that is opened again is taken to be read often. 32 such files are kept, of up to
//! 32,768 extents each. All others are read without the page cache, so that
//! nothing is held twice: large reads are answered by one `writev(2)` from mappings of the
//! backing files, past `fuser`, whose answers are one piece; the kernel copies from them to
//! the reader, and where a file has become shorter it finds no page and answers with an
//! error itself. Small reads go through a buffer. Before an answer from mappings, the
//! lengths of the files are looked at, as a mapping is zero behind the end of a file that
//! was cut within a page. While one program alone reads, the threads that answer are bound to
//! its processor (`fs/follow.rs`): it sleeps until it has its answer, so that two processors
//! would only wake up each other. A panic ends the daemon, and the kernel then answers all
//! waiting readers.
//!
//! A reader gets only an errno. The daemon keeps its last warnings and errors, each once,
//! and shows them as an attribute of the root ([`crate::fs::recent`]), which `imgfs log`
//! prints.
//!
//! A mount that frees pages (`--punch`) takes requests to punch the flat pages files in
//! its root, and nothing else; it has the chain for itself. Reads hold a lock shared
//! from the question where bytes are until they were answered, and pages are gone
//! before they are freed, so that no read finds a hole. Such files are never passed
//! through, nor mapped shared, since what is written to a mapping is refused too late
//! to be noticed; the kernel drops what its page cache had of a punched range. Pages
//! are freed on read only when the whole of them was handed to a reader: at once if it
//! called `read(2)`, which the kernel asks for in its name; and otherwise, for the page
//! cache, when the last open file of the inode is closed, which a mapping keeps open,
//! since the kernel may drop a clean page and ask again. Read-ahead is off there, so
//! that a page which the cache was given is one that was touched.
//!
//! Only the owner of the images may read files in `mem/`, `core/` and `proc/`, whatever the
//! mode of the images. The mount shows nothing that its reader could not have read: an
//! image directory can name any file, by links, as its parent, or as a mapped file. If only
//! one user can have written to all directories of the chain ([`crate::chain::Owner`]), the
//! images are read with the rights of that user. Root's mount takes these rights
//! (`setfsuid(2)`, in all threads but the one that unmounts); an ordinary user has them.
//! Otherwise every node belongs to the user who mounts, and no other user may read it.
//! Files that the images only name are opened if the images belong to the user who mounts,
//! or, on request, with the rights of their owner.
//!
//! # Work in other processes
//!
//! [`crate::inject`] stops threads with `PTRACE_SEIZE` and makes them walk a table of
//! system calls, by a few dozen instructions in a page of scratch memory. A dump maps that
//! memory for less than a millisecond in each process, asks for what only the process
//! knows, unmaps it, and restores registers and signal mask. The dump reads memory while
//! the tree merely stands still.
//!
//! Whatever ends this program, each thread finds home alone. The kernel lets a thread go on
//! with the registers that it has when its tracer dies, so it never has any but its own, or
//! such as make one system call and return, by the program's own code, to a frame of
//! `rt_sigreturn(2)` at the unused end of the main thread's stack, which gives it back all
//! registers and the mask at once. The registers are set before signals are blocked, and
//! put back after they are unblocked. One thread at a time works; it tells of the end of a
//! table not by a trap, which would kill it without a tracer, but by a signal to itself
//! that the process ignores, and then unmaps the scratch memory and goes home. While no
//! thread works, the one that has mapped the memory is in a state in which it does the same;
//! while the memory changes hands, two are.
//! Where no signal is ignored, or limits allow for no mapping, a thread is stopped at each
//! call instead, and its data is on that stack, too. A critical section of restartable
//! sequences is aborted, as the kernel does after a stop. What this changes: up to three
//! pages of the stack's unused end may be in memory afterwards, zero again; and a
//! call with a relative timeout begins anew if the thread had to come home alone. Until it
//! is home, no other dump may work in its process: frames are told by a mark.
//!
//! A dump runs in a process of its own, in its own session. If a signal kills the process
//! that the user started, the other one restores the tree first. If the worker is killed,
//! its supervisor finds the process in which it worked, by memory that the two share, waits
//! until the threads of that process are home, unmaps scratch memory that is left, and
//! reports it.
//!
//! # A dump
//!
//! A dump stops the tree, checks that it can be dumped, asks each process, collects
//! descriptors through duplicates (`pidfd_getfd(2)`), copies memory, syncs and commits.
//! Images are written to a hidden directory inside the image directory, and moved up when
//! all of them are on disk, the inventory last ([`crate::image::store::DirectoryWriter`]).
//! Memory is read in chunks that fit into a processor's cache; a page is stored only if it
//! is not zero and differs from the page of the parent chain. Zero pages of a private file
//! mapping must be stored explicitly: otherwise the file would show through. Pages are
//! compared with the contents of the parent, so the writers of shared memory need not be
//! known. If the tree does not run on, write-back starts while the images are written; if
//! it does, they are first copied, because that is what the tree waits for.
//!
//! # No trace
//!
//! A dump changes nothing in its target, neither its state nor its costs:
//!
//! - it reads only pages that are in memory or in swap: reading another page would create
//!   it;
//! - pages that another process has, too, or that were merged with their like, are read
//!   through `/proc/PID/mem`. `process_vm_readv(2)` reads twice as fast, but pins pages,
//!   and to pin one that is shared copy-on-write the kernel first copies it in the target,
//!   splits huge pages, and kills by SIGBUS where there is no huge page for the copy. So
//!   it is for memory that is a process's own, as `smaps` tells while the tree stands
//!   still, and never for a pre-dump, whose tree may fork at any time;
//! - what was in swap is sent back there as soon as it was read (`MADV_PAGEOUT`), which
//!   costs no writing; of shared memory since Linux 6.5, where the kernel tells what of it
//!   is in swap (`cachestat(2)`);
//! - files without names and shared memory are read by a description of their own, with
//!   `O_NOATIME`;
//! - a process whose memory cgroup has no room for scratch memory is refused before
//!   anything is changed: the kernel would not let the call fail, but kill a process of the
//!   group;
//! - a call that the kernel lets fail with `EINTR` although no handler was run is made to
//!   go on, if it has no timeout that would begin anew: `semop`, `sigwaitinfo`,
//!   `epoll_wait` ([`crate::inject`]). Those with timeouts, and those that have done a part
//!   of their work, return as signal(7) says of any stop; the README lists them, and a test
//!   holds the list.
//!
//! With `--track-mem`, the first write to a huge page splits it, because the kernel marks
//! single pages.
//!
//! If a process dies during the dump, the dump fails and names it (`src/dump/census.rs`).
//! During a pre-dump, while the tree runs, processes may exit but must not be killed.
//!
//! `tests/common/untouched.rs` compares targets before and after each kind of dump.
//!
//! # Sockets
//!
//! Receiving from a socket, even with `MSG_PEEK`, consumes a pending error if the queue is
//! empty. So the dump asks `poll(2)` whether there is an error, and never receives more
//! than the queue holds. For a TCP socket, the kernel shows which error is pending only by
//! consuming it, so such a socket is refused. State for which CRIU's entries have no field
//! is in two messages of `file_entry`, which CRIU ignores: `owner` (50001), of pipes and
//! sockets, and `sock` (50002); [`crate::docs::state`] lists the kinds. The credentials
//! that a socket shows of its maker (`SO_PEERCRED`) are made by helper processes with the
//! right pid and ids; they share the descriptors of rcriu, and end before the tree is made.
//!
//! # Connections
//!
//! A peer notices nothing but a pause. From the moment at which a dump reads a TCP connection
//! until a restore has made it again, no socket answers the peer, and none may say that the
//! connection is gone: nftables drops its packets. Whatever kills the dump, nothing stays
//! dropped in front of a tree that lives, since the table belongs to the dump's netlink socket.
//! A dump with `-R` drops nothing; it reads again until the counts of bytes have not changed.
//!
//! The kernel shows the queues of a socket only while it is being repaired (`TCP_REPAIR`), when
//! calls of its program fail. So this takes microseconds, with the program stopped, and the supervisor
//! ends it if the dump is killed. For the end of the tree the sockets are repaired once more, so that
//! they go without a packet; from there on the tree dies with the dump, whose snapshot is complete.
//!
//! A restore makes the connections, and completes what may fail, before it lets the first packet
//! pass. If it fails, the next restore finds everything as it was.
//!
//! # Older kernels
//!
//! If an older kernel does not report something, the dump finds it out in another way, or
//! fails; it never omits anything silently. Each such thing is a [`crate::fault::Novelty`],
//! which a test can disable on any kernel; tests also run on Debian's kernels in emulated
//! machines. Only one thing is tried on objects of the target: whether an eventfd is a
//! semaphore. Its counter is read and restored while the tree stands still, after
//! everything else was found to be dumpable, and never if a process outside of the tree has
//! the eventfd, too. A kernel thread, such as a worker of io_uring, does not count as a
//! thread of the process.
//!
//! Action scripts ([`crate::action`]) run between the steps. A script that needs complete
//! images of a stopped tree makes the tree wait for the disk, which a tree that runs on
//! otherwise need not.
//!
//! # Changes
//!
//! A tracker ([`crate::track`]) lets a dump read less memory. The best one is a userfaultfd
//! with asynchronous write protection, which needs no privilege: one injected call makes it
//! inside the process, `pidfd_getfd(2)` takes it out, and a separate process (`rcriu-keep`)
//! keeps it open between dumps and ends with the tracked process. `PAGEMAP_SCAN` reports
//! the dirty pages and protects them again in one step, while the tree is stopped and
//! before anything is read.
//!
//! A mapping of 4 MiB or more, of which nearly all pages were written since the previous
//! snapshot, stays unprotected in three dumps of four: protecting it would cost the process
//! a fault for each page, 0.4 to 0.9 microseconds, and save nothing. Unprotected pages
//! count as written.
//!
//! A page is left to the parent without being read only if all of this holds: the keeper
//! says that tracking began with this very parent (`dump_criu_run_id` in the inventory);
//! the mapping is private memory without a file, registered with this userfaultfd since
//! then; the page is present and clean; and the parent has stored it, in a file that was
//! never punched. A dump that restarts tracking makes the keeper forget the snapshot first,
//! and tells it the new one after the commit. So after a failed dump, `execve(2)`,
//! `mremap(2)`, a fork, another chain or a reboot, everything is compared.
//!
//! For shared memory, the bits are trusted only if all of its writers are known
//! ([`crate::track::shared`]): no process outside of the tree maps it or has a descriptor
//! of it, the mappings are the same as at the snapshot, and the kernel's counters show that
//! none was made or removed since. These lead to a comparison of the whole object:
//!
//! - a process that was forked, exited or executed another program while it had the
//!   object mapped; `vfork(2)` and `posix_spawn(3)` do no harm;
//! - a mapping that was made, removed, moved or cut; `mremap(2)` with an old size of 0 and
//!   `MADV_REMOVE` by any process, which are counted for the whole machine;
//! - a descriptor: a memfd is compared as long as any process has it open;
//! - an object of more than eight mappings, or of less than 64 pages; System V segments;
//!   memory of a process that has more than 512 threads or was just restored;
//! - a kernel without asynchronous write protection. A shared page that was written and
//!   taken from the page table comes back without its soft-dirty bit;
//! - a program that may not see all processes, count by tracepoints (`CAP_PERFMON`, and
//!   tracefs, which it opens itself if it is not mounted) or watch which files are opened
//!   (`CAP_SYS_ADMIN`).
//!
//! If memory cannot be tracked, each dump with `--track-mem` reports the cause once
//! ([`crate::track::Hindrance`]). The statistics count the pages that were compared for
//! that reason; `stats-dump` has them in fields of our own, 1001 and 1002.
//!
//! Two things cannot be seen. A descriptor may be on its way in a message when tracking
//! begins; memory other than a memfd has one only if a process opened it in
//! `/proc/PID/map_files` before. And a process that may not be looked at, as the first one
//! of some machines, is taken to have nothing if it is older than a tree that has executed
//! a program since.
//!
//! What writes to memory by its physical address is seen by no page table. Where there is
//! an io_uring, a ring of asynchronous I/O or pinned memory, tracking does not begin anew.
//! Where the scan does not know guard pages (before Linux 6.18), they are looked for among
//! what counts as swapped. A process outside the tree that writes by `process_vm_writev(2)`
//! in the very microseconds in which a page is protected again, having looked it up before,
//! can be missed. Any program can clear soft-dirty bits, the tracker of older kernels: a
//! dump by another program in between is not noticed.
//!
//! # A pre-dump
//!
//! A pre-dump stops the tree to list its memory and to restart tracking; the tree runs on
//! while the memory is read. Pages that change meanwhile are candidates next time. Memory
//! that is gone when it would be read is left out; if it reappears, the next dump finds
//! that the parent does not have it. The images of a pre-dump contain no processes, so it
//! cannot be restored.
//!
//! # A restore
//!
//! Before a restore makes anything, it reads all images of the tree and checks them against
//! each other and against what every kernel requires ([`crate::image::tree`]). Any defect
//! ends the restore there, and `imgfs check` reports the same. So later failures are caused
//! by the machine: a missing file, a pid in use.
//!
//! One thread directs. All files are opened by it, above the numbers that the tree uses;
//! queues of sockets are filled when all kinds are open, since they may hold any of them.
//! Files and directories in `/proc` of the tree itself are opened when its processes and
//! threads are there, which then take them from this program (`pidfd_getfd(2)`).
//! shared memory is made by it and filled by other threads. The first process is a copy
//! of this program that sleeps, is traced, unmaps everything, and maps what it is to
//! have; the others are forked by their true parents when those have their memory, keep
//! what both map the same way, and get only the pages that differ. Sessions and groups
//! whose leaders have ended are led by helpers, which end before the tree goes on.
//! Until the last step the end of this program ends them all (`PTRACE_O_EXITKILL`).
//!
//! What processes share (`clone(2)`: memory, descriptors, directories, signal handlers) has
//! the same number in their images (`ids-PID.img`), and [`crate::image::tree::Arenas`]
//! finds the first process that has it. A dump asks that process; a restore gives it to
//! that process, and the others are made with it by their parent or a sibling. Each process
//! has its own images, except for descriptors, whose image has the shared number, and for
//! the pages of memory, which only the first one has.
//!
//! A process enters its cgroups when it is made, before it has memory, so that the memory
//! is charged to them. The images number the sets of cgroups ([`crate::res::tree::cgroup`])
//! like CRIU: processes that were in the cgroup of the dumping program get that of the
//! restoring program.
//!
//! A file is the one that was dumped if its type, size and mode are the same, and its
//! build-id, for which each file is read once, at the notes of its ELF header. A file
//! without a build-id has its time of modification in the images (our field
//! `rcriu_mtime_ns` of `reg_file_entry`, which CRIU passes over): another time is refused
//! where the file is mapped privately, since what the process has not changed of such
//! memory is not in the images, and is a line in the log for a descriptor, whose file may
//! well have been written by others. A file is looked at by a descriptor that only names
//! it (`O_PATH`), and opened only if it is the one: a FIFO or a device in its place never
//! is.
//!
//! What CRIU's images have no place for is kept in fields of ours, from number 20001 on,
//! which CRIU passes over: attributes of threads ([`crate::res::attribute`]), which a restore
//! reads, sets where they differ, and reads again, so that it can say what is not as it was
//! ([`crate::docs::state`] lists all state, kept, refused or warned of);
//! the signal by which a process tells its end, if it is not `SIGCHLD`; and whether the
//! parent of a stopped process was told so. Children that stay stopped are let go first, and
//! their parents, still stopped, wait for them if they had.
//!
//! Of a process whose first thread has exited while others live, the kernel shows everything
//! by the others alone, and one of them is its witness. In the images the first thread is one
//! that calls `exit(2)` as its next step (`res/task/leader.rs`), so that any restore makes
//! the others by it; this program ends it before children of it wait for the death of a
//! parent. Its exit code is a field of ours (`rcriu_leader_exited` of `task_core_entry`).
//!
//! Files keep what hardly shows, in fields of ours: a reader of a FIFO that it has seen no
//! writer go (`rcriu_no_hangup` of `fifo_entry`), a master that its slave was closed
//! (`rcriu_hung_up` of `tty_info_entry`), a deleted file its extended attributes and its
//! times to the nanosecond (`rcriu_xattrs`, `rcriu_atim_nsec` and `rcriu_mtim_nsec` of
//! `ghost_file_entry`); one that was made without a name (`O_TMPFILE`) can be given one.
//! A pseudoterminal whose number is taken gets another, unless it controls a session or
//! is open by name alone.
//!
//! With `--auto-dedup`, a restore first checks everything that could prevent freeing pages:
//! the journals, and whether the file system supports it. Pages are freed once the tree
//! runs, or while it is filled. So pages that a child shares with its parent are compared
//! with the parent's memory, and no page of the images is read twice. Through a mount,
//! pages are punched there, and the daemon keeps the journals.
//!
//! A small dump or restore spends most of its time on startup. So the build script
//! generates the table of required fields, since decoding the descriptors of all messages
//! would take longer than everything else. Images behind a mount are read where the mount
//! says that they are ([`crate::chain::DIRECTORY_XATTR`]), if the inventory there is the
//! same.
//!
//! # Freed pages
//!
//! A hole in a pages file reads as zeros, so no reader can tell a page that was freed from
//! a page of zeros. Code that frees pages therefore names them first, in a journal beside
//! the pages file ([`crate::image::punched`] has the layout), and in this order: readers in
//! this program lose them, the journal names them, the journal is on disk, they are freed
//! ([`crate::chain::Freeing`]). What a journal names is gone, freed or not: reading it is
//! an error that names it. So a page may be noted only when another lasting place has it,
//! or it is no longer needed; and running again frees what a crash has left. A journal is
//! bound to the pagemap and the inventory beside it, since programs that do not know it
//! dump into the same directory.
//!
//! Freed pages keep their place in a pages file without parents. A restore, a flattening
//! and a comparison that need such a page report it before they start. A dump treats a page
//! that was freed in the parent as one that the parent does not have. Holes that no journal
//! names are zeros, as for CRIU, and `imgfs check` reports them.
//!
//! # Linking
//!
//! [`crate::dedup::link()`] compares what a dump stores with what the snapshot before it
//! resolves to, and replaces each pagemap that gains by it, with a pages file that holds
//! what is left. A pagemap names its pages file, so one rename changes a memory from
//! one whole state to another; the link to the parent comes before and is harmless
//! alone. Everything new is made in a hidden directory that is an image directory
//! itself, resolved through the chain, and compared with the old state, page by page,
//! before anything is replaced: pages left to the parent must be found in the very place
//! that they were compared with, and those that are kept are compared with their copies.
//! A list in that directory tells what a killed run leaves from what is the user's.
//!
//! A page of the parent is asked for by the same pid or number of an object. So a process
//! whose pid was taken by another is compared with that one, which is as right and gains
//! little. An object's number is an inode number, which a restored tree does not keep:
//! objects are matched by kind, name and the places where processes have them, and
//! renumbered if their number in the parent is free, no other snapshot has the snapshot as
//! its parent, and one image alone names them, so that one rename changes all. Others are
//! compared by number, or stay in full; a copy of a snapshot can be renumbered in any case.
//! A System V segment is never renumbered: programs know its id. A memory that has lost
//! pages stays as it is.
//!
//! # Superseded pages
//!
//! A page that a snapshot holds itself hides the page of the same memory in all of its
//! ancestors, as far down as these have the memory without a gap ([`crate::dedup::free`]).
//! Such pages are freed as described for freed pages, after the snapshot's own images
//! were synced. Ancestors lose by it what only they need, which is said first.
//! Any other snapshot in the directories of the snapshot and its ancestors keeps all
//! that it finds in them; if one of these cannot be read, nothing is freed. A dump
//! that is asked to free what it will supersede finds out before it stops the tree
//! whether that can be done; if it fails after the dump is complete, that is a warning.
//! Where files cannot be punched, a file can be written anew in the way of linking, with
//! holes where pages are gone, and with the journal that names them beside it.
//!
//! # Equal pages
//!
//! [`crate::chain::duplicates`] and [`crate::dedup::reflink`] tell pages apart by their
//! hashes (XXH3), so that each is read once. The former counts, and believes 96 bits of
//! them; the latter leaves it to the kernel to compare before two places share a block
//! (`FIDEDUPERANGE`), joins pages that are in a row on both sides, and leaves pages of
//! zeros alone. No byte of an image changes, so readers need not be kept away.
//!
//! # Locks
//!
//! Locks are taken with `flock(2)` on directories, so they end with their holder and leave
//! nothing behind ([`crate::sys::lock`]). A chain is locked at its base, the directory
//! without a parent, which all of its snapshots have in common: one lock for a chain of any
//! depth. Programs that read a chain share the lock; a program that changes a complete
//! chain holds it exclusively. In addition, each program locks the directory that it was
//! given: a dump locks its new directory exclusively and shares the lock of the parent, so
//! that several dumps may have the same parent. A restore from a mount locks nothing, since
//! the daemon of the mount has done so. Commands that only read, such as `imgfs ls` and
//! `check`, lock nothing, and CRIU does not know these locks.
//!
//! # Invariants
//!
//! - Numbers of processes in images, and in calls that processes of the tree make, are those
//!   of the tree's own pid namespace ([`crate::units::NsPid`]); those that the kernel gives
//!   this program are [`crate::units::HostPid`]. One [`crate::units::PidMap`] for each dump
//!   and each restore leads from one to the other, and nothing else does.
//! - Image bytes are untrusted: no length is believed before the file has shown that many
//!   bytes, and any contradiction is an error that names file, memory and address. Only
//!   regular files are opened as images ([`crate::image::regular`]), and only their owner
//!   can read the files that are created there.
//! - Nothing is written through a link that others have laid: images are created by
//!   descriptors of their directory, logs and the like by a way that is gone component
//!   after component ([`crate::sys::output`]). Nothing is removed because an image names
//!   it: a name of `--link-remap` only if it is of the form that a dump gives to that very
//!   entry, and still leads to the file that was restored. Pages are freed in regular files
//!   alone, never through a link, and in no directory of which one of another user calls
//!   itself a child; a ghost is made under a name that
//!   is free, and filled and adjusted by its descriptor.
//! - A read of a page never returns the bytes of another page, or zeros that were never
//!   stored: a page that cannot be found, or was freed, is an error.
//! - An image directory that is written has its inventory last, after everything
//!   else is on disk; a directory without one is not a snapshot.
//! - `image`, `chain` and `view` know neither FUSE nor privileges: they are
//!   built and tested as an ordinary user.
