//! The image format: files of length-prefixed protobuf messages.
//!
//! Every byte read here is untrusted. No length is believed before the file has shown that
//! many bytes, and any defect is an [`ImageError`] that names the file and the offset.

pub mod build_id;
pub mod desc;
pub mod disk;
pub mod document;
pub mod dynamic;
mod error;
mod files;
mod framing;
pub mod ipc;
pub mod json;
pub mod pagemap;
pub mod payload;
pub mod punched;
pub mod regular;
mod remap;
pub mod seccomp;
pub mod store;
pub mod tree;
mod verify;
pub mod vma;
mod wire;
mod writing;

pub use crate::proto;
pub use desc::{Body, Desc, Kind};
pub use disk::Disk;
pub use document::Document;
pub use error::{ImageError, Result};
pub use files::{read_files, split_files};
pub use framing::{ImageReader, Prologue, read_all, read_one};
pub use pagemap::{MemoryId, Pagemap, PagemapEntry, PagemapReader, PagemapWriter, Presence};
pub use remap::Remap;
pub use store::{Directory, ImageStore, PARENT_LINK, Part, SnapshotWriter, Store, leftover};
pub use verify::verify;
pub use writing::ImageWriter;
