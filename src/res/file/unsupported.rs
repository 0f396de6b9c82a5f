//! Files without a path, and devices, that rcriu does not dump: it reports each by its own name, with
//! a way out.

use super::{Collector, Description, FileKind, Intake, Opened, Opener, Result, Usage};
use crate::image::proto::FileEntry;

/// Comes after all other kinds, since it claims every anonymous inode that it knows.
pub(super) const KIND: FileKind = FileKind {
    name: "unsupported file",
    types: &[],
    usage: Usage::Descriptor,
    collector: |_| Box::new(Unsupported),
    opener: |_| Box::new(Unsupported),
};

/// How the link of a file begins, what the file is, and the remedy.
type Row = (&'static str, &'static str, &'static str);

/// Files without a path, by what follows `anon_inode:` in their links.
const ANONYMOUS: &[Row] = &[
    (
        "[userfaultfd]",
        "a userfaultfd, by which the program fills memory",
        "have the program close it (userfaultfd(2))",
    ),
    (
        "[io_uring]",
        "an io_uring instance, whose requests rcriu cannot see",
        "start the program without io_uring, which many programs can do: set kernel.io_uring_disabled \
         to 2",
    ),
    (
        "[perf_event]",
        "a performance counter, which counts for this kernel only (perf_event_open(2))",
        "end the measurement before the dump, and begin another one after the restore",
    ),
    ("bpf-map", "a BPF map", BPF),
    ("bpf-prog", "a BPF program", BPF),
    ("bpf_link", "a BPF link, which attaches a program to the kernel", BPF),
    ("bpf-link", "a BPF link, which attaches a program to the kernel", BPF),
    ("btf", "BPF type information", BPF),
    ("kvm-", "a virtual machine of KVM", KVM),
    (
        "[fscontext]",
        "a file system that the program is configuring (fsopen(2))",
        "dump the program when it has mounted the file system",
    ),
    (
        "[landlock-ruleset]",
        "a set of Landlock rules",
        "dump the program when it has applied the rules and closed the descriptor",
    ),
    (
        "landlock-ruleset",
        "a set of Landlock rules",
        "dump the program when it has applied the rules and closed the descriptor",
    ),
    ("dmabuf", "memory of a device (dma-buf)", GPU),
    ("sync_file", "a fence of a device (sync_file)", GPU),
];

/// Devices, by the beginning of their paths.
const DEVICES: &[Row] = &[
    (
        "/dev/fuse",
        "the connection of a FUSE server to its file system (/dev/fuse)",
        "unmount the file system before the dump, and mount it again after the restore",
    ),
    ("/dev/kvm", "a virtual machine monitor's access to KVM (/dev/kvm)", KVM),
    (
        "/dev/rtc",
        "the real-time clock",
        "have the program close it; another program can keep its alarm",
    ),
    ("/dev/dri/", "a graphics processor", GPU),
    ("/dev/kfd", "a graphics processor of AMD", GPU),
    ("/dev/nvidia", "a graphics processor of NVIDIA", "suspend it first: cuda-checkpoint --toggle"),
    ("/dev/snd/", "a sound device", "have the program close it, or play through a sound server"),
    ("/dev/input/", "an input device", "have the program close it"),
    (
        "/dev/watchdog",
        "a watchdog, which restarts the machine unless a program writes to it",
        "have the program stop the watchdog and close it",
    ),
    ("/dev/userfaultfd", "the device that creates userfaultfds", "have the program close it"),
    ("/dev/loop", "a loop device", "have the program close it"),
    ("/dev/mem", "the memory of the machine", "have the program close it"),
    ("/dev/vhost", "a device of virtual machines", KVM),
];

const BPF: &str = "have the program close it; objects that it has pinned below /sys/fs/bpf remain";
const KVM: &str =
    "save the virtual machine by its own means: `virsh save`, or a migration to a file";
const GPU: &str = "have the program release it: rcriu has no plugin for graphics processors";

/// Returns what a device is, with the remedy, if it has a row.
pub(super) fn device(path: &[u8]) -> Option<(String, &'static str)> {
    let row = DEVICES.iter().find(|(start, ..)| path.starts_with(start.as_bytes()))?;
    let path = String::from_utf8_lossy(path);
    let what =
        if row.1.contains(&*path) { row.1.to_owned() } else { format!("{} ({path})", row.1) };
    Some((what, row.2))
}

fn anonymous(link: &[u8]) -> Option<&'static Row> {
    let name = link.strip_prefix(b"anon_inode:")?;
    ANONYMOUS.iter().find(|(start, ..)| name.starts_with(start.as_bytes()))
}

#[derive(Debug)]
struct Unsupported;

impl Collector for Unsupported {
    fn claims(&self, file: &Description) -> bool {
        anonymous(&file.link).is_some()
    }

    fn collect(&mut self, file: &Description, _: &mut dyn Intake) -> Result<FileEntry> {
        let (what, help) =
            anonymous(&file.link).map_or(("unknown", "close it"), |(_, what, help)| (*what, *help));
        Err(file.unsupported(format!("{what} ({})", String::from_utf8_lossy(&file.link)), help))
    }
}

impl Opener for Unsupported {
    fn open(&mut self, _: &[FileEntry], _: &mut Opened) -> Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_named_with_a_way_out() {
        assert_eq!(
            device(b"/dev/rtc0").unwrap(),
            (
                "the real-time clock (/dev/rtc0)".to_owned(),
                "have the program close it; another program can keep its alarm"
            )
        );
        assert!(device(b"/dev/fuse").unwrap().0.ends_with("(/dev/fuse)"));
        assert_eq!(device(b"/dev/null"), None);
    }

    #[test]
    fn files_without_a_path_are_named_with_a_way_out() {
        for (link, words) in [
            ("anon_inode:[io_uring]", "io_uring"),
            ("anon_inode:bpf-map", "BPF map"),
            ("anon_inode:kvm-vcpu:0", "KVM"),
            ("anon_inode:[userfaultfd]", "userfaultfd"),
        ] {
            assert!(anonymous(link.as_bytes()).unwrap().1.contains(words), "{link}");
        }
        assert!(anonymous(b"anon_inode:[eventfd]").is_none());
        assert!(anonymous(b"/[io_uring]").is_none());
    }
}
