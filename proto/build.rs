//! Compiles the image format's messages.
//!
//! A pure-Rust compiler is used so that a machine needs no `protoc`. The
//! descriptors are kept beside the generated code: they drive the dynamic
//! reader, which must show any image and keep the fields it does not know. What
//! every reader needs of them is a table, since taking them apart takes longer than
//! to restore a small process.

use std::{collections::BTreeMap, env, error::Error, fmt::Write, fs, path::PathBuf};

use prost_build::Config;
use prost_types::{
    DescriptorProto, FileDescriptorSet,
    field_descriptor_proto::{Label, Type},
};
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

/// The fields of `file_entry` that are boxed. A tree may have thousands of entries, most of them with
/// none of these fields, which would make each of them 1.7 KB larger.
const LARGE_FIELDS: [&str; 7] = ["bpf", "isk", "mqueue", "nlsk", "psk", "sock", "usk"];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=proto");
    let out = PathBuf::from(env::var("OUT_DIR")?);
    let mut descriptors = protox::compile(PROTOS, ["proto"])?;
    fs::write(out.join("descriptors.bin"), descriptors.encode_to_vec())?;
    fs::write(out.join("shapes.rs"), shapes(&descriptors)?)?;
    descriptors.file.iter_mut().flat_map(|file| &mut file.message_type).for_each(strings_to_bytes);
    let mut config = Config::new();
    config.enable_type_names().out_dir(&out);
    for field in LARGE_FIELDS {
        config.boxed(format!(".criu.file_entry.{field}"));
    }
    config.compile_fds(descriptors)?;
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

/// Returns the source of a table of all messages by full name, each with its required
/// fields and its fields that are messages (`Shape` in `src/image/wire.rs`).
fn shapes(descriptors: &FileDescriptorSet) -> Result<String, Box<dyn Error>> {
    let mut messages = BTreeMap::new();
    for file in &descriptors.file {
        for message in &file.message_type {
            collect(file.package(), message, &mut messages);
        }
    }
    let mut source = String::from("&[\n");
    for (full_name, message) in &messages {
        write!(source, "Shape {{ full_name: {full_name:?}, name: {:?}, ", message.name())?;
        write!(source, "required: &[")?;
        for field in message.field.iter().filter(|field| field.label() == Label::Required) {
            write!(source, "({}, {:?}), ", field.number(), field.name())?;
        }
        write!(source, "], messages: &[")?;
        for field in message.field.iter().filter(|field| field.r#type() == Type::Message) {
            let inner = field.type_name().trim_start_matches('.');
            let position = messages.keys().position(|name| name == inner);
            let position = position.ok_or_else(|| format!("{inner} is not defined"))?;
            write!(source, "({}, {position}), ", field.number())?;
        }
        writeln!(source, "] }},")?;
    }
    source.push(']');
    Ok(source)
}

fn collect<'a>(
    scope: &str,
    message: &'a DescriptorProto,
    messages: &mut BTreeMap<String, &'a DescriptorProto>,
) {
    let full_name = format!("{scope}.{}", message.name());
    for nested in &message.nested_type {
        collect(&full_name, nested, messages);
    }
    messages.insert(full_name, message);
}
