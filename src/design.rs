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
//! With `--chain DIR` (`src/dump/series.rs`), a dump records of which tree it is
//! (`rcriu_tree`, field 20002 of `inventory_entry`): the cgroup of the root process, unless
//! the dumper is in it as well, the pid of the root in its own namespace, and its program.
//! A runtime restores a container with all three. The parent is the newest dump in DIR that
//! records the same. If that was the dump of another tree after all, nothing is lost: a page
//! is left to the parent only after both were compared, or if the parent's own id is that of
//! the dump since which changes are tracked. A dump whose images are not in DIR is copied
//! into it, not linked: a program that frees pages in one of them, or writes over it, must
//! not change the other.
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
//! number of extents. What a restore reads needs a complete index; what only a person reads
//! is also shown if ancestors are broken ([`crate::chain::Chain::readable_index`]). Inode numbers are hashes of paths, so they are the same in every
//! mount.
//!
//! # The mount
//!
//! [`crate::fs`] hands the view to FUSE. It serves a file in one of four ways:
//!
//! - The kernel itself reads a file that is one backing file (pass-through).
//! - If the images' file system shares blocks, the kernel also reads files that lie in several
//!   images. When such a file is opened, root's mount makes a file of the same blocks without a
//!   name (`O_TMPFILE`), so that nothing is left of it, however the daemon ends. If that fails,
//!   the daemon answers as usual. The kernel does not know that the blocks are the same, and
//!   reads the new file from disk even if the images are in memory; in that case the daemon
//!   answers at the first open, and composes a file that is opened again. The daemon keeps 32
//!   such files, of up to 32,768 extents each.
//! - The daemon answers large reads of all other files with one `writev(2)` from mappings of the
//!   backing files; it does so without `fuser`, whose answers are one buffer. The kernel copies
//!   from the mappings to the reader. If a file has become shorter, the kernel finds no page and
//!   answers with an error itself. Since a mapping reads as zeros behind the end of a file that
//!   was cut within a page, the daemon checks the lengths of the files before each answer.
//! - The daemon copies small reads through a buffer.
//!
//! Reads by the daemon bypass the page cache, so that no byte is held twice. While a single
//! program reads, the daemon binds the answering threads to its processor (`fs/follow.rs`): the
//! reader sleeps until it has its answer, so two processors would only wake each other up. If
//! the daemon panics, it ends, and the kernel answers all waiting readers with an error.
//!
//! A reader gets only an errno. The daemon keeps its last warnings and errors, each once, and
//! shows them as an attribute of the root ([`crate::fs::recent`]), which `imgfs log` prints.
//!
//! A mount that frees pages (`--punch`) accepts requests to punch the flat pages files in its
//! root, and no other change; it locks the chain exclusively. A read holds a lock shared from
//! the lookup of its bytes until the answer, and pages are marked as gone before they are freed,
//! so that no read finds a hole. The kernel never reads such files by itself, and programs
//! cannot map them shared, because the kernel would refuse a write to the mapping too late for
//! the program to notice. When a range is punched, the kernel drops its cached pages.
//!
//! With `--punch=on-read`, the daemon frees a page only when a reader has received all of it. If
//! the reader called `read(2)`, the kernel names the reader in the request, and the daemon frees
//! the page at once. If the request is for the page cache, the daemon frees the page when the
//! last open file of the inode is closed (a mapping keeps it open), because the kernel may drop
//! a clean page and ask again. Readahead is off in such a mount, so that every cached page is
//! one that a program has touched.
//!
//! Only the owner of the images may read files in `mem/`, `core/` and `proc/`, whatever the mode
//! of the images. The mount shows nothing that its reader could not have read otherwise: an
//! image directory can name any file of the machine, by links, as its parent, or as a mapped
//! file. If only one user can have written to all directories of the chain
//! ([`crate::chain::Owner`]), the daemon reads the images with the rights of that user. Root's
//! mount assumes these rights (`setfsuid(2)`, in all threads except the one that unmounts); an
//! ordinary user has them. Otherwise every node belongs to the user who mounts, and no other
//! user may read it. The daemon opens files that the images only name if the images belong to
//! the user who mounts, or, on request, with the rights of their owner.
//!
//! # Work in other processes
//!
//! [`crate::inject`] stops threads with `PTRACE_SEIZE` and makes them execute a table of system
//! calls, with a few dozen instructions in a page of scratch memory. A dump maps that memory for
//! less than a millisecond in each process, asks for the state that only the process knows,
//! unmaps the memory, and restores registers and signal mask. While the dump reads memory, the
//! tree is only stopped.
//!
//! However rcriu ends, each thread returns to its own work without help. When its tracer dies,
//! the kernel lets a thread continue with its current registers. Therefore a thread always has
//! either its own registers, or registers with which it makes one system call and then, by the
//! program's own code, returns to a frame of `rt_sigreturn(2)` at the unused end of the main
//! thread's stack. The frame restores all registers and the mask at once. rcriu sets these
//! registers before it blocks signals, and restores the thread's own after it unblocks them.
//!
//! Only one thread executes a table at a time. It reports the end of a table not by a trap,
//! which would kill it without a tracer, but by a signal to itself that the process ignores;
//! then it unmaps the scratch memory and returns. While no thread executes a table, the thread
//! that mapped the memory is in a state in which it does the same; while the memory changes
//! hands, two threads are. If the process ignores no signal, or limits allow no mapping, rcriu
//! stops the thread at each call instead, and its data is on that stack, too. rcriu aborts a
//! critical section of restartable sequences, as the kernel does after a stop.
//!
//! This has two visible effects: up to three pages of the stack's unused end may be in memory
//! afterwards, zero again; and a call with a relative timeout starts again if the thread had to
//! return without rcriu. Until all threads have returned, no other dump may work in the process;
//! it recognizes the frames by a mark.
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
//! A thread in a frozen cgroup can be seized, but makes no call. So a dump first interrupts all threads
//! in the frozen cgroup, in those below it and in the frozen ones above, and then thaws these: each thread
//! stops before it executes an instruction of its own. The dump freezes the cgroups again while the
//! threads are still stopped, and then lets them go. Its supervisor knows the cgroups, and
//! freezes them if the dump is killed. A restore freezes them when all processes are ready to run.
//!
//! With `--live`, the tree runs on while its private memory is copied. While it is stopped, each process
//! forks. The child, its *shadow*, never runs, and keeps the memory as it is at that moment
//! (`src/inject/shadow.rs`). Redis makes its snapshots like that. Write protection with a handler
//! (userfaultfd) was measured against it. It stops the tree as long, since both touch each
//! entry of the page tables. Then it lets a process write a quarter to a third as many pages, because each first
//! write waits for another process; and the kernel tells the handler of `munmap(2)`, `execve(2)` and exit
//! only when the memory is gone, so that such a tree could not be dumped. A fork has no
//! effect on shared memory, which is therefore copied while the tree is stopped.
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
//!   is in swap (`cachestat(2)`). The kernel takes only pages that have left the queue of the
//!   CPU where they were swapped in, so a thread stays on its CPU from reading a page to
//!   sending it back, and at the end each CPU is asked for what is left;
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
//! For shared memory, rcriu trusts the bits only if it knows all writers of an object
//! ([`crate::track::shared`]): no process outside of the tree maps it or has a descriptor of it,
//! the mappings are the same as at the snapshot, and the kernel's counters show that none was
//! made or removed since. Otherwise it compares the whole object. These lead to a comparison:
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
//! rcriu cannot see two things. A descriptor may be in transit in a message when tracking
//! begins; memory other than a memfd has a descriptor only if a process has opened it in
//! `/proc/PID/map_files`. And rcriu may not look into some processes, such as the first one of
//! some machines; it assumes that such a process has no shared memory if the process is older
//! than a tree that has executed a program since.
//!
//! Page tables do not record writes by physical address. If a process has an io_uring, a ring of
//! asynchronous I/O or pinned memory, rcriu does not restart tracking. Before Linux 6.18, the
//! scan does not report guard pages, so rcriu looks for them among the pages that count as
//! swapped. rcriu can miss a write by `process_vm_writev(2)` from a process outside of the tree
//! if that process has looked up a page in the same microseconds in which the page is protected
//! again. Any program can clear soft-dirty bits, the tracker of older kernels: rcriu does not
//! notice if another program has made a dump in between.
//!
//! # A pre-dump
//!
//! A pre-dump stops the tree to list its memory and to restart tracking; the tree runs on while
//! rcriu reads the memory. Pages that change meanwhile are candidates next time. If memory has
//! gone before rcriu reads it, the pre-dump leaves it out; if it reappears, the next dump finds
//! that the parent does not have it. The images of a pre-dump contain no processes, so no
//! program can restore them.
//!
//! # A restore
//!
//! Before a restore makes anything, it reads all images of the tree and checks them against
//! each other and against what every kernel requires ([`crate::image::tree`]). Any defect
//! ends the restore there, and `imgfs check` reports the same. So later failures are caused
//! by the machine: a missing file, a pid in use.
//!
//! One thread directs the restore. It opens all files, above the descriptor numbers that the
//! tree uses. It fills the queues of sockets when files of all kinds are open, since a queue can
//! hold any of them. It opens files and directories in `/proc` of the tree itself when the
//! tree's processes and threads exist; these then take them from rcriu (`pidfd_getfd(2)`). The
//! director also creates shared memory, and other threads fill it.
//!
//! The first process is a copy of rcriu that sleeps, is traced, unmaps everything, and maps its
//! new memory. Each other process is forked by its true parent once the parent has its memory;
//! it keeps the mappings that both have, and gets only the pages that differ. Helpers lead the
//! sessions and groups whose leaders have ended; they end before the tree goes on. Until the
//! last step, the end of rcriu ends all new processes (`PTRACE_O_EXITKILL`).
//!
//! With `--lazy`, the restore leaves out the pages of private memory without a file. It registers
//! that memory with a userfaultfd of each process when all processes are made, before any system
//! call of a later step may touch it: such a call would otherwise find a page of zeros, which
//! then stays. From there on a pager supplies the pages ([`crate::lazy`]). A process does not keep
//! memory of its parent that waits in the images, since an inherited page would hide its own.
//!
//! State that processes share (`clone(2)`: memory, descriptors, directories, signal handlers)
//! has the same number in their images (`ids-PID.img`), and [`crate::image::tree::Arenas`] finds
//! the first process that has it. A dump asks that process; a restore sets the state in that
//! process, and the parent or a sibling makes the others so that they share it. Each process has
//! its own images, with two exceptions: the image of descriptors has the shared number, and only
//! the first process has the pages of memory.
//!
//! A process enters its cgroups when it is made, before it has memory, so that the kernel
//! charges the memory to them. As in CRIU's images, sets of cgroups have numbers
//! ([`crate::res::tree::cgroup`]): processes that were in the cgroup of the dumping program get
//! the cgroup of the restoring program.
//!
//! A file is the dumped one if it has the same type, size, mode and build-id. To find the
//! build-id, a dump reads each file once, at the notes of its ELF header. For a file without a
//! build-id, the images hold the time of modification (our field `rcriu_mtime_ns` of
//! `reg_file_entry`, which CRIU ignores). If a process maps the file privately, the restore
//! refuses another time, because the images lack the pages that the process has not changed. For
//! a descriptor, a different time is only a line in the log, since other programs may have
//! written to the file. rcriu looks at a file through a descriptor that only names it
//! (`O_PATH`), and opens it only if it is the right one; so it never opens a FIFO or a device in
//! its place.
//!
//! State without a field in CRIU's images is in fields of ours, from number 20001, which CRIU
//! ignores. They hold attributes of threads ([`crate::res::attribute`]): a restore reads each
//! attribute, sets it if it differs, and reads it again to report a remaining difference
//! ([`crate::docs::state`] lists all state, kept, refused or warned of). They also hold the exit
//! signal of a process, if it is not `SIGCHLD`, and whether the parent of a stopped process has
//! seen the stop. The restore releases children that stay stopped first; their parents, still
//! stopped themselves, wait for them if they had done so before the dump.
//!
//! If the first thread of a process has exited while others live, the kernel shows the state of
//! the process only through the other threads, and one of them is the witness. In the images,
//! the first thread is one whose next step is `exit(2)` (`res/task/leader.rs`), so that any
//! restore makes the other threads from it. rcriu lets it exit before children of the process
//! can wait for the death of a parent. Its exit code is a field of ours (`rcriu_leader_exited`
//! of `task_core_entry`).
//!
//! Fields of ours also keep small details of files: that a reader of a FIFO has not seen a
//! writer go (`rcriu_no_hangup` of `fifo_entry`), that a master has seen its slave close
//! (`rcriu_hung_up` of `tty_info_entry`), and the extended attributes and exact times of a
//! deleted file (`rcriu_xattrs`, `rcriu_atim_nsec` and `rcriu_mtim_nsec` of `ghost_file_entry`).
//! A restored file that was made without a name (`O_TMPFILE`) can be given one. If the number of
//! a pseudoterminal is taken, the restore uses another number, unless the pseudoterminal
//! controls a session or is open by name alone.
//!
//! With `--auto-dedup`, a restore first checks everything that could prevent freeing pages: the
//! journals, and whether the file system supports it. It frees pages once the tree runs, or
//! while it fills the tree. In the second case it compares pages that a child shares with its
//! parent with the parent's memory, so that it reads no page of the images twice. Through a
//! mount, the restore punches pages there, and the daemon writes the journals.
//!
//! A small dump or restore spends most of its time on startup. Therefore the build script
//! generates the table of required fields: decoding the descriptors of all messages would take
//! longer than everything else. If the images are in a mount, rcriu reads them from the
//! directory that the mount names ([`crate::chain::DIRECTORY_XATTR`]), provided that the
//! inventory there is the same.
//!
//! # Freed pages
//!
//! A hole in a pages file reads as zeros, so no reader can tell a freed page from a page of
//! zeros. Code that frees pages therefore names them first, in a journal beside the pages file
//! ([`crate::image::punched`] has the layout). It proceeds in this order: readers in this
//! program lose the pages, the journal names them, the journal is on disk, the pages are freed
//! ([`crate::chain::Freeing`]). A page that a journal names is gone, whether or not it was
//! freed: reading it is an error that names it. So code may add a page to a journal only if
//! another lasting place has the page, or no program needs it any more. A second run frees the
//! pages that a crash has left. A journal is bound to the pagemap and the inventory beside it,
//! because programs that do not know journals dump into the same directory.
//!
//! Freed pages keep their place in a pages file without parents. A restore, a flattening
//! and a comparison that need such a page report it before they start. A dump treats a page
//! that was freed in the parent as one that the parent does not have. Holes that no journal
//! names are zeros, as for CRIU, and `imgfs check` reports them.
//!
//! # Linking
//!
//! [`crate::dedup::link()`] compares the stored pages of a dump with the pages of the previous
//! snapshot. It replaces each pagemap that becomes smaller, with a new pages file that holds the
//! remaining pages. A pagemap names its pages file, so one rename changes a memory from one
//! whole state to another; the link to the parent is made before, and is harmless alone.
//!
//! The new files are made in a hidden directory that is itself an image directory. Before the
//! old files are replaced, the new directory is resolved through the chain and compared with the
//! old state, page by page: a page that was left to the parent must be found in exactly the
//! place with which it was compared, and a kept page is compared with its copy. A list in that
//! directory separates the files that a killed run leaves from files of the user.
//!
//! A page of the parent is looked up by pid, or by the number of the object. So if another
//! process has taken a pid, the two processes are compared; this is correct, but gains little.
//! The number of an object is an inode number, which differs in a restored tree. Objects are
//! therefore matched by kind, name and the places where processes map them. An object is
//! renumbered if its number in the parent is free, no other snapshot has this snapshot as its
//! parent, and only one image names the object, so that one rename changes it everywhere. Other
//! objects are compared by number, or stay in full; in a copy of a snapshot, any object can be
//! renumbered. A System V segment is never renumbered, because programs know its id. A memory
//! that has lost pages stays as it is.
//!
//! # Superseded pages
//!
//! A page that a snapshot holds itself hides the page of the same memory in all of its
//! ancestors, as far down as these have the memory without a gap ([`crate::dedup::free`]). rcriu
//! frees such pages as described for freed pages, after it has synced the snapshot's own images.
//! It first lists the ancestors that can then no longer be restored. It keeps all pages that any
//! other snapshot in the directories of the snapshot and its ancestors needs; if it cannot read
//! one of these, it frees nothing. A dump that is to free the pages which it supersedes checks
//! before it stops the tree whether it can do so; a failure after the dump is complete is only a
//! warning. If files cannot be punched, rcriu can rewrite a file in the same way as linking
//! does, with holes in the place of freed pages, and with the journal that names them beside it.
//!
//! # Equal pages
//!
//! [`crate::chain::duplicates`] and [`crate::dedup::reflink`] compare pages by their hashes
//! (XXH3), so that they read each page once. The former counts pages, and relies on 96 bits of
//! the hashes. The latter lets the kernel compare two places before they share a block
//! (`FIDEDUPERANGE`), joins pages that are contiguous on both sides, and ignores pages of zeros.
//! No byte of an image changes, so readers need not be locked out.
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
//! # Namespaces
//!
//! rcriu looks into a namespace of a tree by two ways. A process of the tree makes calls, as for
//! everything else that only a process can tell. Or one thread of rcriu enters the namespace
//! ([`crate::sys::visit`]) and comes back: a thread, rather than a process that serves requests,
//! since it executes nothing there, has all of rcriu's descriptors, and returns what it found
//! without a protocol. Only a process with one thread can enter a user namespace, so there the
//! visitor is a child that shares rcriu's memory and descriptors ([`crate::sys::process::beside`]).
//! It enters the user namespace to which a mount namespace belongs, since a copy that a more
//! privileged process makes of a mount namespace is locked, and to pack and unpack a tmpfs, whose
//! owners are numbers there. Everywhere else ids are translated ([`crate::units::PidMap`] has them
//! with the pids). Paths of a tree with a mount namespace are looked up below the root directory of
//! the tree, by `openat2(2)`, which never leaves it ([`crate::sys::root`]). File systems of a user
//! namespace take no files of users whom it does not map, so rcriu makes files as its root
//! ([`crate::sys::root::Root::make`]).
//!
//! A restore of a tree with namespaces makes the first process before it opens any file. The kernel
//! makes the namespaces with it, so that all of them belong to the tree's user namespace. The process
//! shares rcriu's descriptors: a socket that rcriu makes in the tree's network namespace, or a file
//! that it opens below the tree's root, is in its table. When all files are open it gets a copy of
//! the table (`unshare(CLONE_FILES)`), and its descendants inherit that.
//!
//! A tree may have several namespaces of some kinds (`Kind::has_others`). The namespaces that the
//! first process is in are its *home*; one that is the dumper's comes from the restorer. A restore
//! proceeds kind by kind ([`crate::res::ns`]). For each namespace beside home, the first process
//! leaves home (`unshare(2)`), so that the namespace belongs to the tree's user namespace, too; rcriu
//! restores its state just as that of home, and the first process returns (`setns(2)`). rcriu keeps a
//! descriptor of each namespace of such a kind, which all processes of the tree inherit: until their
//! own descriptors are installed, it has the same number everywhere. Each process, as soon as it
//! exists, enters those of its namespaces of which the tree has several, whichever namespaces its
//! maker is in. A process that shares its working directory with its maker (`CLONE_FS`) is in the same
//! mount namespace already, and the kernel would let it enter none.
//!
//! Mount namespaces depend on each other: a tmpfs may be mounted in several, and mounts of several may
//! be in one sharing group. Their mounts are decided, dumped and made together ([`crate::res::ns::mnt`]);
//! the numbers of file systems and groups in the images count for all. Each file of the images names its
//! mount, and thus the root directory below which its path is looked up ([`crate::res::ns::Roots`]);
//! what has no mount in the images, such as a watch, is looked up where a process has it open.
//!
//! The first process must be able to return home, so a tree that has a user namespace, but shares a
//! namespace with the dumper of which it has others, is refused. So are nested user namespaces: the
//! images have one number for each user.
//!
//! Pid namespaces are nested. Images have the numbers in that of the tree, and as an extension those in the
//! namespaces below ([`crate::units::PidMap::below`]). A process in such a namespace passes other numbers to
//! calls ([`crate::units::LocalPid`]). A namespace begins with its first process, which its maker makes with
//! `CLONE_NEWPID` and all its numbers (`set_tid`); then this process mounts the proc file systems that
//! show the namespace ([`crate::res::ns::mnt`]), since no other can. A process group that has no number
//! below is inherited: the maker joins it first.
//!
//! The first process of a pid namespace ends last: the kernel keeps it until all others have been
//! waited for. So code that kills a tree waits for its processes in whatever order they end.
//!
//! # The service
//!
//! A request of CRIU's protocol ([`crate::proto::rpc`]) becomes options of the command line, by their
//! names. So both have the same options, refusals and configuration files, and a new option is known
//! to clients as soon as its field is in the table of fields.
//!
//! # Invariants
//!
//! - Numbers of processes in images are those of the tree's own pid namespace
//!   ([`crate::units::NsPid`]); numbers in calls that processes of the tree make are those of the
//!   caller's pid namespace ([`crate::units::LocalPid`]); numbers that the kernel gives this
//!   program are [`crate::units::HostPid`]. Each dump and each restore has one
//!   [`crate::units::PidMap`], which alone converts between them.
//! - Image bytes are untrusted. Code relies on a length only once the file has supplied that
//!   many bytes, and any contradiction is an error that names file, memory and address. Only
//!   regular files are opened as images ([`crate::image::regular`]), and only their owner can
//!   read the files that are created there.
//! - Code writes through no link that another user could have made: it creates images relative
//!   to a descriptor of their directory, and opens logs and the like component by component
//!   ([`crate::sys::output`]).
//! - Code removes no file only because an image names it: it removes a name of `--link-remap`
//!   only if the name has the form that a dump gives to exactly that entry, and still leads to
//!   the restored file. It frees pages in regular files only, never through a link, and in no
//!   directory that a directory of another user has as its parent. It makes a ghost file under a
//!   free name, and fills and adjusts it by its descriptor.
//! - A read of a page never returns the bytes of another page, or zeros that were never
//!   stored: a page that cannot be found, or was freed, is an error.
//! - An image directory that is written has its inventory last, after everything
//!   else is on disk; a directory without one is not a snapshot.
//! - `image`, `chain` and `view` know neither FUSE nor privileges: they are
//!   built and tested as an ordinary user.
