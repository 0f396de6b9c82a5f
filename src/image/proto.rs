//! The messages of the format, generated at build time from `proto/`.

use std::sync::LazyLock;

use prost_reflect::DescriptorPool;

#[expect(missing_docs, reason = "the format's own names; proto/ says what they are")]
#[expect(clippy::doc_markdown, reason = "comments come from proto/")]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/criu.rs"));
}

pub use generated::*;

/// Returns the descriptors of all messages, for readers that keep the fields
/// they do not know.
pub fn pool() -> &'static DescriptorPool {
    static POOL: LazyLock<DescriptorPool> = LazyLock::new(|| {
        let bytes = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
        DescriptorPool::decode(bytes.as_slice()).expect("the build script wrote it")
    });
    &POOL
}
