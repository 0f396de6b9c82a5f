//! How the programs are built, and what holds at all times.
//!
//! # Images and chains
//!
//! An image directory holds a *snapshot*: the state of a tree of processes. Its
//! link `parent` leads to the snapshot before it. A *memory* is the private
//! memory of a process or a shared object; its *pagemap* says of each page that
//! it is in the pages file of the same directory, in the parent, or in no image.
//! A page that no entry covers is zero, or that of the file which a private mapping has
//! below it.
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
//! Directories are only names, so a child records the dump that it was made on
//! ([`crate::chain::dump_name`]): `rcriu_parent_run_id` in its inventory, field 20001 of
//! `inventory_entry` which is the parent's `dump_criu_run_id`, or a hash of its inventory.
//! Code that resolves pages across that link compares them first. Of children without it,
//! which CRIU writes, only dates tell, and `imgfs check` notes a parent that is younger. A
//! dump replaces no snapshot that a directory beside it has as its parent.
//!
//! # Stores
//!
//! Readers ask a [`crate::image::ImageStore`] for images by kind and number, never for a path
//! or a descriptor: [`crate::image::Directory`] is one store among others to come, such as an
//! archive that is read in place. A store opens images to be read in a row or at any place,
//! lists them, says whose they are, and opens the store of the parent. Each request for bytes
//! is for a run, not for a page. What only files of this machine can (to be mapped, passed
//! through, punched, linked, locked, or to share blocks) is asked of
//! [`ImageStore::directory`](crate::image::ImageStore::directory) and
//! [`StoredFile::file`](crate::image::store::StoredFile::file): a reader that gets `None` takes
//! the way that always works, and a writer fails with the name of the store. Names of stores
//! are unique, and paths of directories; messages name images by them.
//!
//! A dump hands files to a [`crate::image::store::StoreWriter`]: images in a row, pages by
//! offset. It syncs, and commits once; what is dropped before leaves no snapshot.
//!
//! # Bytes
//!
//! All that is shown is a [`crate::chain::Content`]: a function from a range to *runs*,
//! each in one file, in memory, a hole, or lost. Reading, seeking holes, flattening and
//! FUSE stand on that alone. Runs that lie in a row in one file are read by one
//! `preadv(2)`, however they are scattered over the buffer. No code reads mapped bytes in
//! user space: backing files are read instead, and a file that shrinks is a short read and
//! not a SIGBUS. Files are opened when first needed and closed by an LRU bound; one that
//! was replaced since it was first opened is an error.
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
//! A reader gets an errno and no more. The daemon keeps its last warnings and errors, each
//! once, and shows them as an attribute of the root ([`crate::fs::recent`]), which
//! `imgfs log` prints.
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
//! Files of `mem/`, `core/` and `proc/` are for the owner of the images alone, whatever mode
//! those have. Nothing is shown that its reader could not have read: an image directory can name
//! any file, by links, as its parent, or as a file that was mapped. If all directories of
//! the chain are such that one user alone can have put images there
//! ([`crate::chain::Owner`]), these are read with the rights of that user, which root's
//! mount assumes (`setfsuid(2)`, in all threads but the one that unmounts), and an ordinary
//! user has. Otherwise every node belongs to the user who mounts, and no other user may
//! read it. Files that the images only name are opened if the images are the mounter's, or,
//! when asked for, with the rights of their owner.
//!
//! # Work in other processes
//!
//! [`crate::inject`] stops threads by `PTRACE_SEIZE` and lets them walk a table of
//! system calls: a few dozen instructions in a page of scratch memory. A dump maps
//! that memory for less than a millisecond for each process, asks what only the
//! process knows, unmaps it and puts registers and signal mask back; memory is read while
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
//! Dumps run in a process of their own, in a session of its own: if the one that the user
//! started is killed, it puts everything back first. If the worker is killed, the other
//! one looks into the process that was worked in, by what the two share, waits until its
//! threads are home, removes scratch memory that was left, and says so.
//!
//! # A dump
//!
//! Stop the tree, check that it is one that can be dumped, ask each process, collect
//! descriptors by duplicates (`pidfd_getfd(2)`), copy memory, sync, commit. Images are
//! written to a hidden directory inside the one that was asked for, and moved when all of
//! them are on disk, the inventory last ([`crate::image::store::DirectoryWriter`]). Memory is read
//! in chunks that stay in the processor's cache; a page is stored only if it is not zero
//! and its bytes differ from those of the parent chain. Zeros of a private mapping of a
//! file are stored like other bytes: without them the file would be seen. The parent's
//! content is the truth, so the writers of shared memory need not be known. A tree that is
//! not to run on has the disk begin with its images while they are written; for one that
//! is, they are first copied, which is what it waits for.
//!
//! # No trace
//!
//! A dump changes nothing in its target: not what it is, and not what it costs. So
//!
//! - only pages that the kernel says are in memory or in swap are read: reading another
//!   one would make it;
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
//! With `--track-mem` the first write to a huge page splits it: the kernel marks single
//! pages.
//!
//! A process that dies while its tree is dumped makes the dump fail by its name
//! (`src/dump/census.rs`). In a tree that runs during a pre-dump, processes may exit, but
//! not be killed.
//!
//! `tests/common/untouched.rs` compares targets before and after each kind of dump.
//!
//! # Sockets
//!
//! To receive from a socket, even with `MSG_PEEK`, takes a pending error if there is no
//! more to see. So `poll(2)` is asked whether there is one, and never more is asked for
//! than is there. The kernel shows which error a TCP socket has only by taking it, so such
//! a socket is refused. What else CRIU's entries have no place for is in two messages of
//! `file_entry`, which CRIU passes over: `owner` (50001), of pipes and sockets, and `sock`
//! (50002), whose kinds and what becomes of them [`crate::docs::state`] lists. Credentials
//! that sockets show of their makers (`SO_PEERCRED`) come from calls of helper processes
//! that have the pid and the ids in question; they share this program's descriptors, and
//! end before the tree is made.
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
//! What a kernel does not tell is found out in another way, or the dump fails; nothing
//! is left out without a word. Each such thing is a [`crate::fault::Novelty`], which a
//! test can take away on any kernel, and Debian's own kernels are tested in emulated
//! machines. The one thing that is tried on the target's own objects is whether an
//! eventfd is a semaphore: its counter is read and put back while the tree stands still,
//! after all else was found to be such as is dumped, and not if a process outside of the
//! tree has it, too. A thread of the kernel's, such as a worker of io_uring, is no
//! thread of the process.
//!
//! Programs of the user ([`crate::action`]) are run between the steps. One that is to see
//! complete images of a stopped tree costs it the time of the disk, which a tree that
//! runs on is spared otherwise.
//!
//! # Changes
//!
//! A tracker ([`crate::track`]) lets a dump look at less. The best that the kernel
//! has is a userfaultfd with asynchronous write protection, which needs no privilege: it
//! is made inside the process by one injected call, taken out by `pidfd_getfd(2)`, and
//! kept open between dumps by a process of its own (`rcriu-keep`), which ends with the
//! tracked one. `PAGEMAP_SCAN` tells what was written and protects it again in one step,
//! while the tree is stopped and before anything is read.
//!
//! A mapping of 4 MiB or more whose pages were nearly all written since the snapshot before
//! stays as it is in three dumps of four: to protect it would cost the process a fault for
//! each page, 0.4 to 0.9 microseconds, and spare nothing. What has lost its protection counts
//! as written.
//!
//! A page is left to the parent without a look only if all of this holds: the keeper
//! says that tracking began with this very parent (`dump_criu_run_id` in the
//! inventory); the mapping is private memory without a file, registered since then with
//! this userfaultfd; the page is present and unwritten; and the parent has stored it, in
//! a file that was never punched. Whatever begins tracking anew makes the keeper forget
//! the snapshot first, and tells it the new one after the commit. So after a dump that
//! failed, `execve(2)`, `mremap(2)`, a fork, another chain or a reboot, everything
//! is compared.
//!
//! Of shared memory the bits are believed only if all of its writers are known
//! ([`crate::track::shared`]): no process outside the tree has it or a descriptor of
//! it, the same mappings are there as at the snapshot, and the kernel's counters say that
//! none was made or removed since. What leads to a comparison of the whole object is
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
//! What keeps memory from being tracked is said once for each dump that was asked to
//! ([`crate::track::Hindrance`]), and what was compared for want of it is in the
//! statistics; `stats-dump` has it in fields of our own, 1001 and 1002.
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
//! The tree is stopped to list its memory and begin the tracking anew, and runs on
//! while the memory is read. What changes meanwhile is a candidate next time; what is
//! gone when it is read is left out, and if it should turn up again the next dump finds
//! that the parent does not have it. There are no processes in the images of a
//! pre-dump, so it cannot be restored.
//!
//! # A restore
//!
//! Before anything is made, all images of the tree are read and held against each other and
//! against what any kernel takes ([`crate::image::tree`]): what is wrong with them ends a
//! restore there, and `imgfs check` tells the same. So what fails later is the machine's
//! doing: a file that is not there, a number that is taken.
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
//! What processes have in common (`clone(2)`: memory, descriptors, directories, signal
//! handlers) has the same number in their images (`ids-PID.img`), and
//! [`crate::image::tree::Arenas`] tells the first that has it: a dump asks that one, a
//! restore gives it to that one, and the others are made with it by their parent or a
//! sibling. Each has images of its own but for descriptors, which are numbered so, and for
//! the pages of memory, which only the first has.
//!
//! A process is put into its cgroups when it is made, before it has memory, so that this
//! is charged to them. The images number the sets of cgroups ([`crate::res::tree::cgroup`]) as
//! CRIU does: what was where the dumper was is left where the restorer is.
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
//! With `--auto-dedup` everything that could keep pages from being freed is found out
//! first: the journals, and whether the file system can do it. Pages are freed when the
//! tree runs, or as it is filled; so what a child shares with its parent is compared with
//! the parent's memory, and no page of the images is read twice. Through a mount the pages
//! are punched there, and the daemon that serves it keeps the journals.
//!
//! What the images of a small process cost is mostly the time to begin: the table of
//! required fields is made by the build script, since the descriptors of all messages
//! take longer to decode than all else takes. Images that are seen through a mount are
//! read where the mount says that they are ([`crate::chain::DIRECTORY_XATTR`]), if the
//! inventory there is the same.
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
//! Freed pages keep their place in a pages file without parents. What needs one says so
//! before it begins: a restore, flattening, a comparison. A dump takes the page of a
//! parent that was freed for one that the parent does not have. Holes that no journal
//! names are zeros, as for CRIU, and `imgfs check` tells of them.
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
//! Locks are those of `flock(2)` on directories, so that they end with their holder and
//! leave nothing behind ([`crate::sys::lock`]). A chain is locked at its base, the
//! directory without a parent, which all of its snapshots have in common: one lock for a
//! chain of any depth. Programs that read a chain share the lock; a program that changes a
//! complete chain has it alone. Besides, each locks the directory that it was given: a dump
//! has the one it makes alone, and shares that of its parent, so that several may dump on
//! top of one. A restore from a mount locks nothing, since the daemon of the mount has done
//! so. Programs that only look, such as `imgfs ls` and `check`, lock nothing, and CRIU
//! knows nothing of these locks.
//!
//! # Invariants
//!
//! - Numbers of processes in images, and in calls that processes of the tree make, are those
//!   of the tree's own pid namespace ([`crate::units::NsPid`]); those that the kernel gives
//!   this program are [`crate::units::HostPid`]. One [`crate::units::PidMap`] for each dump
//!   and each restore leads from one to the other, and nothing else does.
//! - Image bytes are untrusted: no length is believed before the file has shown
//!   that many bytes, and whatever contradicts itself is an error that names
//!   file, memory and address. Only regular files are opened as images
//!   ([`crate::image::regular`]), and what is created there is for its owner alone.
//! - Nothing is written through a link that others have laid: images are created by
//!   descriptors of their directory, logs and the like by a way that is gone component
//!   after component ([`crate::sys::output`]). Nothing is removed because an image names
//!   it: a name of `--link-remap` only if it is of the form that a dump gives to that very
//!   entry, and still leads to the file that was restored. Pages are freed in regular files
//!   alone, never through a link, and in no directory of which one of another user calls
//!   itself a child; a ghost is made under a name that
//!   is free, and filled and adjusted by its descriptor.
//! - A page is never answered with another page's bytes or with zeros that were never
//!   stored: what cannot be found, or was freed, is an error.
//! - An image directory that is written has its inventory last, after everything
//!   else is on disk; a directory without one is not a snapshot.
//! - `image`, `chain` and `view` know neither FUSE nor privileges: they are
//!   built and tested as an ordinary user.
