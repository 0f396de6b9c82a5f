//! What gdb makes of a core file in a mount of the chain that CRIU wrote.

mod common;

use std::{
    path::Path,
    process::{Command, Stdio},
};

use common::{Cap, mounted::Mounted, require};
use rcriu::image::{Kind, proto, read_one};

const PID: u64 = 293;

fn gdb(core: &Path, commands: &[&str]) -> String {
    let mut gdb = Command::new("gdb");
    gdb.args(["-q", "-nx", "-batch", "-ex", "set pagination off"]);
    for command in commands {
        gdb.args(["-ex", command]);
    }
    let output = gdb.arg("--core").arg(core).stdin(Stdio::null()).output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    String::from_utf8_lossy(&text).into_owned()
}

#[test]
fn privileged_gdb_finds_threads_registers_mappings_and_memory() {
    require(Cap::Fuse);
    require(Cap::Program("gdb"));
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/criu42-chain");
    let place = tempfile::tempdir().unwrap();
    let mounted = Mounted::new(&fixture.join("chain"), &place.path().join("mnt"), &[]);

    let path = fixture.join("chain/3").join(Kind::Core.file_name(PID));
    let core: proto::CoreEntry = read_one(&path, Kind::Core).unwrap();
    let thread = core.thread_info.unwrap();
    let registers = &thread.gpregs;

    let text = gdb(
        &mounted.path(&format!("core/{PID}")),
        &[
            "info threads",
            "printf \"rip=%#lx rsp=%#lx fs=%#lx\\n\", $rip, $rsp, $fs_base",
            "info proc mappings",
            "info auxv",
            // The program's own header, from private memory over a file that is gone.
            "printf \"stack=%#lx\\n\", *(unsigned long *)$rsp",
            "p $xmm0",
        ],
    );
    let expected = [
        format!("LWP {PID}"),
        format!("rip={:#x} rsp={:#x} fs={:#x}", registers.ip, registers.sp, registers.fs_base),
        "/run/demo/mutator".to_owned(),
        "AT_PHDR".to_owned(),
        "stack=0x".to_owned(),
        "v4_float".to_owned(),
    ];
    for expected in expected {
        assert!(text.contains(&expected), "no {expected:?} in\n{text}");
    }
    assert!(!text.contains("Cannot access memory"), "{text}");
}
