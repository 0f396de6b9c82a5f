//! The file `README` of a mount, which says what is where. It is the same wherever the chain lies,
//! so that `diff -r` finds no difference between mounts that show the same.

use super::{Part, View};

/// The name of the file.
pub(super) const README: &str = "README";

const INTRODUCTION: &str = "\
This directory shows processes as they were when they were checkpointed. Nothing here
runs, and looking changes nothing.

";

/// What is said of each part that is shown.
const PARTS: [(Part, &str); 7] = [
    (
        Part::Proc,
        "\
proc/           The processes, as /proc showed them. Which were running, their command
                lines, open files and memory:
                    cd proc; head */comm; tr '\\0' ' ' <PID/cmdline; ls -l PID/fd
                    cat PID/maps PID/status PID/environ
                Tools that read /proc show them, too, if they find this one there:
                    unshare -m sh -c 'mount --bind proc /proc; ps -efH; lsof -p PID'
",
    ),
    (
        Part::Mem,
        "\
mem/            The memory of each process, a file for each mapping: START-END-NAME. Of mapped
                files, also those in /dev/shm, the images hold only pages that are private
                and were written; the rest is read from the files as they are now.
                    grep -la 'some text' mem/PID/*; strings mem/PID/*heap*
",
    ),
    (
        Part::Shmem,
        "\
shmem/          Shared memory by its number; shmem-by-name/ and shmem-by-process/ have
                links to it by names, and by the processes that map it.
                    ls -l shmem-by-name; hexdump -C shmem-by-name/NAME | less
",
    ),
    (
        Part::Files,
        "\
files/          What was in deleted files that were still open, what waited to be read in
                pipes, sockets and terminals, and the files of each tmpfs (tmpfs/) with their
                owners, modes and times.
",
    ),
    (
        Part::Core,
        "\
core/           A core file for each process: gdb PROGRAM core/PID
",
    ),
    (
        Part::Json,
        "\
json/           The images as text.
",
    ),
    (
        Part::Snapshots,
        "\
snapshots/      All of this for each snapshot. What changed since the one before:
                    diff -rq --no-dereference snapshots/1/proc snapshots/2/proc
                    diff -rq snapshots/1/mem snapshots/2/mem
                    cmp -l snapshots/1/shmem/ID snapshots/2/shmem/ID
",
    ),
];

const IMAGES: &str = "\
*.img           Image files, complete and without a parent: `rcriu restore` and
                `criu restore` accept this directory.

`imgfs mounts` says which chain this is, `imgfs info CHAIN` when it was made, and
`imgfs map CHAIN` where its memory is stored.
";

impl View {
    /// Returns what `README` says.
    pub(super) fn readme(&self) -> Vec<u8> {
        let mut text = INTRODUCTION.to_owned();
        let shown = PARTS.iter().filter(|(part, _)| !self.without.contains(part));
        shown.for_each(|(_, about)| text.push_str(about));
        text.push_str(IMAGES);
        text.into_bytes()
    }
}
