//! Writes processes as images for tests.

use std::{os::unix::ffi::OsStrExt, path::Path, sync::Arc};

use prost::Message;

use super::{Process, Tables};
use crate::{
    chain::{Chain, SnapshotId},
    image::{ImageWriter, Kind, proto, vma},
    units::PAGE_SIZE,
};

/// The pid of the process in tests.
pub(super) const PID: u32 = 7;

/// Writes an image with these messages.
pub(super) fn image<M: Message>(dir: &Path, kind: Kind, number: u64, messages: &[M]) {
    let mut writer = ImageWriter::create(&dir.join(kind.file_name(number)), kind).expect("create");
    for message in messages {
        writer.message(message).expect("write a message");
    }
    writer.finish().expect("write an image");
}

/// Returns a mapping of `pages` pages at page `first`, readable and writable.
pub(super) fn mapping(first: u64, pages: u64, status: u32) -> proto::VmaEntry {
    proto::VmaEntry {
        start: first * PAGE_SIZE,
        end: (first + pages) * PAGE_SIZE,
        status: status | vma::REGULAR,
        prot: 3,
        fd: -1,
        ..Default::default()
    }
}

/// Returns an entry for a regular file, with the recorded `size`.
pub(super) fn regular(id: u32, name: &Path, size: Option<u64>) -> proto::FileEntry {
    let name = name.as_os_str().as_bytes().to_owned();
    let reg = proto::RegFileEntry { id, name, size, ..Default::default() };
    let r#type = proto::FdTypes::Reg.into();
    proto::FileEntry { r#type, id, reg: Some(reg), ..Default::default() }
}

/// Writes a process with these mappings.
pub(super) fn process(dir: &Path, vmas: Vec<proto::VmaEntry>) {
    let entry = proto::PstreeEntry { pid: PID, threads: vec![PID], ..Default::default() };
    image(dir, Kind::Pstree, 0, &[entry]);
    let mm = proto::MmEntry { vmas, ..Default::default() };
    image(dir, Kind::Mm, PID.into(), &[mm]);
}

/// Loads the process of a snapshot.
pub(super) fn load(chain: Chain, snapshot: SnapshotId) -> super::Result<Arc<Process>> {
    let tables = Arc::new(Tables::new(Arc::new(chain), snapshot));
    Process::load(&tables, PID).map(Arc::new)
}
