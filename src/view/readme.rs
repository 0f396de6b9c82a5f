//! The file `README` of a mount, which says what is where. It is the same wherever the chain lies,
//! so that `diff -r` finds no difference between mounts that show the same snapshot.

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
                    head proc/*/comm; tr '\\0' ' ' <proc/PID/cmdline; ls -l proc/PID/fd
                    cat proc/PID/maps proc/PID/status proc/PID/environ
                Tools that read /proc show them, too, if they find this one there:
                    unshare -m sh -c 'mount --bind proc /proc; ps -efH; lsof -p PID'
                (unshare -rm unless you are root). Images have no times of start.
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
                    grep -a 'some text' shmem/*
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
snapshots/      All of this for each snapshot.
",
    ),
];

/// How to see what changed from one snapshot to the next.
const CHANGES: &str = "                This is {TIP}, made on {PARENT}. What changed in between:
                    diff -rq --no-dereference snapshots/{PARENT}/proc snapshots/{TIP}/proc
                    diff -rq snapshots/{PARENT}/mem snapshots/{TIP}/mem
                    cmp -l snapshots/{PARENT}/shmem/ID snapshots/{TIP}/shmem/ID
";

const IMAGES: &str = "\
*.img           Image files, complete and without a parent: `rcriu restore` and
                `criu restore` accept this directory.

`imgfs mounts` says which chain this is, `imgfs info CHAIN` when it was made, and
`imgfs map CHAIN` where its memory is stored.
";

/// Whether a shell takes a name as it is: the user may paste the lines.
fn is_word(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    !name.starts_with('-') && name.bytes().all(plain)
}

impl View {
    /// Returns what `README` says.
    pub(super) fn readme(&self) -> Vec<u8> {
        let mut text = INTRODUCTION.to_owned();
        let shown = PARTS.iter().filter(|(part, _)| !self.without.contains(part));
        for (part, about) in shown {
            text.push_str(about);
            let tip = self.chain.snapshot(self.tip);
            if let (Part::Snapshots, Ok(Some(parent))) = (part, &tip.parent) {
                let (parent, tip) = (&self.chain.snapshot(*parent).name, &tip.name);
                if is_word(parent) && is_word(tip) {
                    text.push_str(&CHANGES.replace("{PARENT}", parent).replace("{TIP}", tip));
                }
            }
        }
        text.push_str(IMAGES);
        text.into_bytes()
    }
}
