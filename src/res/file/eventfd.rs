//! Eventfds.

use std::{
    fs::File,
    io::Write,
    os::fd::{AsFd, OwnedFd},
};

use nix::{errno::Errno, libc};

use super::{
    Collector, Description, FileError, Intake, Kind, Opened, Opener, Policy, Result, descriptor,
};
use crate::{
    image::proto::{self, FdTypes},
    proc::FdDetail,
    sys::fds,
};

/// The kind's row.
pub(super) const KIND: Kind = Kind {
    name: "eventfd",
    types: &[FdTypes::Eventfd],
    collector: |_: &Policy| Box::new(Eventfds),
    opener: |_: &Policy| Box::new(Eventfds),
};

/// Marks a semaphore in the flags of an entry. It is the bit of `O_WRONLY`, which
/// an eventfd never has; the format has no other place for it, and a reader that
/// does not know it sets only such flags as can be changed, which this cannot.
const SEMAPHORE: u32 = libc::EFD_SEMAPHORE.cast_unsigned();

struct Eventfds;

impl Collector for Eventfds {
    fn claims(&self, file: &Description) -> bool {
        file.is_anonymous("[eventfd]")
    }

    fn collect(&mut self, file: &Description, _: &mut dyn Intake) -> Result<proto::FileEntry> {
        let FdDetail::EventFd { count, semaphore, .. } = file.info.detail else {
            return Err(file.failed("read the counter of")(Errno::ENODATA));
        };
        let semaphore = if semaphore == Some(true) { SEMAPHORE } else { 0 };
        Ok(proto::FileEntry {
            r#type: FdTypes::Eventfd.into(),
            id: file.id,
            efd: Some(proto::EventfdFileEntry {
                id: file.id,
                flags: file.status() | semaphore,
                fown: file.fown,
                counter: count,
            }),
            ..Default::default()
        })
    }
}

impl Opener for Eventfds {
    fn open(&mut self, entries: &[proto::FileEntry], opened: &mut Opened) -> Result<()> {
        for entry in entries {
            let missing = || FileError::image(entry.id, "it is an eventfd without its entry");
            let event = entry.efd.as_ref().ok_or_else(missing)?;
            let fd = open(event).map_err(FileError::restore(entry.id, "make", "an eventfd"))?;
            opened.insert(entry.id, fd);
        }
        Ok(())
    }
}

fn open(entry: &proto::EventfdFileEntry) -> nix::Result<OwnedFd> {
    let fd = fds::eventfd((entry.flags & SEMAPHORE).cast_signed() | libc::EFD_CLOEXEC)?;
    let mut file = File::from(fd);
    if entry.counter != 0 {
        // The kernel alone can count to the largest number.
        let counter = entry.counter.min(u64::MAX - 1);
        file.write_all(&counter.to_ne_bytes())
            .map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)))?;
    }
    descriptor::set_status(file.as_fd(), entry.flags)?;
    Ok(file.into())
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;
    use crate::res::file::testing::Tree;

    #[test]
    fn counters_and_semaphores_are_as_they_were() {
        let mut tree = Tree::new();
        let plain = fds::eventfd(libc::EFD_NONBLOCK).unwrap();
        File::from(plain.try_clone().unwrap()).write_all(&(5_u64 << 40).to_ne_bytes()).unwrap();
        tree.add(1, plain);
        let semaphore = fds::eventfd(libc::EFD_SEMAPHORE).unwrap();
        File::from(semaphore.try_clone().unwrap()).write_all(&3_u64.to_ne_bytes()).unwrap();
        tree.add(2, semaphore);
        let restored = tree.restore();
        assert_eq!(
            restored.info(1).detail.without_id(),
            restored.before(1).info.detail.clone().without_id()
        );
        assert_eq!(
            restored.info(2).detail.without_id(),
            restored.before(2).info.detail.clone().without_id()
        );
        assert_eq!(restored.flags(1), restored.before(1).flags);
        assert_eq!(restored.flags(2), restored.before(2).flags);
        let mut value = [0; 8];
        File::from(restored.take(2)).read_exact(&mut value).unwrap();
        assert_eq!(u64::from_ne_bytes(value), 1);
    }

    trait WithoutId {
        fn without_id(self) -> Self;
    }
    impl WithoutId for FdDetail {
        fn without_id(self) -> Self {
            match self {
                Self::EventFd { count, semaphore, .. } => {
                    Self::EventFd { count, id: None, semaphore }
                }
                other => other,
            }
        }
    }
}
