//! Compiles the image format's messages.
//!
//! A pure-Rust compiler is used so that a machine needs no `protoc`. The
//! descriptors are kept beside the generated code: they drive the dynamic
//! reader, which must show any image and keep the fields it does not know.

use std::{env, error::Error, fs, path::PathBuf};

use prost_build::Config;
use prost_types::{DescriptorProto, field_descriptor_proto::Type};
use protox::prost::Message;

/// The files to compile; what they import comes along.
const PROTOS: [&str; 8] = [
    "common.proto",
    "files.proto",
    "memory.proto",
    "namespaces.proto",
    "rpc.proto",
    "service.proto",
    "sockets.proto",
    "task.proto",
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=proto");
    let out = PathBuf::from(env::var("OUT_DIR")?);
    let mut descriptors = protox::compile(PROTOS, ["proto"])?;
    fs::write(out.join("descriptors.bin"), descriptors.encode_to_vec())?;
    descriptors.file.iter_mut().flat_map(|file| &mut file.message_type).for_each(strings_to_bytes);
    Config::new().enable_type_names().out_dir(&out).compile_fds(descriptors)?;
    Ok(())
}

/// Gives the fields of a message that are strings the type of bytes, which looks
/// the same on the wire: names of files, tasks and sockets need not be UTF-8.
fn strings_to_bytes(message: &mut DescriptorProto) {
    for field in &mut message.field {
        if field.r#type() == Type::String {
            field.set_type(Type::Bytes);
        }
    }
    message.nested_type.iter_mut().for_each(strings_to_bytes);
}
