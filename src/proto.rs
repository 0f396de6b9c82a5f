//! The messages of the format, generated at build time from `proto/`.

use std::sync::LazyLock;

use prost_reflect::{
    DescriptorPool,
    prost_types::{DescriptorProto, field_descriptor_proto::Type},
};

#[expect(missing_docs, reason = "the format's own names; proto/ says what they are")]
#[expect(clippy::doc_markdown, reason = "comments come from proto/")]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/criu.rs"));
}

pub use generated::*;

/// The messages of the service protocol.
#[expect(missing_docs, reason = "the protocol's own names; proto/ says what they are")]
#[expect(clippy::doc_markdown, reason = "comments come from proto/")]
pub mod rpc {
    include!(concat!(env!("OUT_DIR"), "/criu.rpc.rs"));
}

/// Returns the descriptors of all messages, for readers that keep the fields
/// they do not know.
pub fn pool() -> &'static DescriptorPool {
    static POOL: LazyLock<DescriptorPool> = LazyLock::new(|| {
        let bytes = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
        DescriptorPool::decode(bytes.as_slice()).expect("the build script wrote it")
    });
    &POOL
}

/// Returns [`pool`] with strings declared as bytes, which they are to the
/// kernel: the path of a file need not be UTF-8.
pub(crate) fn pool_without_strings() -> &'static DescriptorPool {
    static POOL: LazyLock<DescriptorPool> = LazyLock::new(|| {
        let mut pool = DescriptorPool::new();
        let files = pool_files_without_strings();
        pool.add_file_descriptor_protos(files).expect("types do not depend on one another");
        pool
    });
    &POOL
}

fn pool_files_without_strings() -> Vec<prost_reflect::prost_types::FileDescriptorProto> {
    let mut files: Vec<_> = pool().file_descriptor_protos().cloned().collect();
    for file in &mut files {
        file.message_type.iter_mut().for_each(declare_as_bytes);
    }
    files
}

fn declare_as_bytes(message: &mut DescriptorProto) {
    for field in &mut message.field {
        if field.r#type() == Type::String {
            field.set_type(Type::Bytes);
        }
    }
    message.nested_type.iter_mut().for_each(declare_as_bytes);
}
