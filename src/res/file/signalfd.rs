//! Signalfds.

use std::os::fd::{AsFd, OwnedFd};

use nix::errno::Errno;

use super::{
    Collector, Description, FileError, FileKind, Intake, Opened, Opener, Result, Usage, descriptor,
};
use crate::{
    image::proto::{self, FdTypes},
    proc::FdDetail,
    sys::fds,
};

pub(super) const KIND: FileKind = FileKind {
    name: "signalfd",
    types: &[FdTypes::Signalfd],
    usage: Usage::Descriptor,
    collector: |_| Box::new(Signalfds),
    opener: |_| Box::new(Signalfds),
};

struct Signalfds;

impl Collector for Signalfds {
    fn claims(&self, file: &Description) -> bool {
        file.is_anonymous("[signalfd]")
    }

    fn collect(&mut self, file: &Description, _: &mut dyn Intake) -> Result<proto::FileEntry> {
        let FdDetail::SignalFd { mask } = file.info.detail else {
            return Err(file.failed("read the signals of")(Errno::ENODATA));
        };
        Ok(proto::FileEntry {
            r#type: FdTypes::Signalfd.into(),
            id: file.id,
            sgfd: Some(proto::SignalfdEntry {
                id: file.id,
                flags: file.status(),
                fown: file.fown,
                sigmask: mask,
            }),
            ..Default::default()
        })
    }
}

impl Opener for Signalfds {
    fn open(&mut self, entries: &[proto::FileEntry], opened: &mut Opened) -> Result<()> {
        for entry in entries {
            let missing =
                || FileError::image(entry.id, "it is a signalfd, but its entry is missing");
            let signals = entry.sgfd.as_ref().ok_or_else(missing)?;
            let fd = open(signals).map_err(FileError::restore(entry.id, "create", "a signalfd"))?;
            opened.insert(entry.id, fd);
        }
        Ok(())
    }
}

fn open(entry: &proto::SignalfdEntry) -> nix::Result<OwnedFd> {
    let fd = fds::signalfd(entry.sigmask)?;
    descriptor::set_status(fd.as_fd(), entry.flags)?;
    Ok(fd)
}

#[cfg(test)]
mod tests {
    use nix::libc;

    use super::*;
    use crate::res::file::testing::Tree;

    #[test]
    fn a_signalfd_takes_the_same_signals() {
        let mut tree = Tree::new();
        let fd = fds::signalfd(1 << 9 | 1 << 40).unwrap();
        descriptor::set_status(fd.as_fd(), libc::O_NONBLOCK.cast_unsigned()).unwrap();
        tree.add(7, fd);
        let restored = tree.restore();
        assert_eq!(restored.info(7).detail, FdDetail::SignalFd { mask: 1 << 9 | 1 << 40 });
        assert_eq!(restored.flags(7), restored.before(7).flags);
    }
}
