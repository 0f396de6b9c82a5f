//! Ordinary tools on a mounted checkpoint: those that read `/proc` show the dumped tree,
//! and those that walk directories come to an end. All of it needs root and FUSE.

mod common;

use std::{
    fs::{self, File},
    os::unix::fs::{FileExt, FileTypeExt},
    path::Path,
    process::{Command, Output},
};

use common::{
    Cap,
    live::{Live, directory},
    mounted::{Mounted, imgfs},
    require,
};

/// A tree of two processes with one of each thing that tools show. It writes its address of
/// shared memory when it is ready.
const PROGRAM: &str = r#"
import ctypes, mmap, os, socket, sys, time
memory = mmap.mmap(-1, 1 << 20)
memory[4096:4096 + 13] = b"seen by tools"
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
memfd = os.memfd_create("journal")
os.write(memfd, b"a line of the journal")
gone = open("gone", "w+"); gone.write("what it held"); gone.flush(); os.unlink("gone")
log = open("log", "w"); log.write("12345"); log.flush()
reader, writer = os.pipe()
os.write(writer, b"waits in the pipe")
listener = socket.socket(socket.AF_UNIX); listener.bind("\0rcriu-tools-%d" % os.getpid()); listener.listen()
web = socket.socket(); web.bind(("127.0.0.1", 0)); web.listen()
if os.fork() == 0:
    os.execv(sys.executable, ["child-of-tools", "-c", "import time\nwhile True: time.sleep(1)"])
while not open("/proc/%d/cmdline" % os.getpid()): pass
with open("ready.tmp", "w") as ready:
    ready.write("%d %d %d" % (address, web.getsockname()[1], memfd))
os.rename("ready.tmp", "ready")
while True: time.sleep(1)
"#;

/// The tree, dumped and mounted.
struct Scene {
    live: Live,
    mounted: Mounted,
    pid: i32,
    address: u64,
    port: u16,
}

impl Scene {
    fn new() -> Self {
        require(Cap::Ptrace);
        require(Cap::Fuse);
        require(Cap::Program("/usr/bin/python3"));
        let dir = directory();
        let place = dir.path().to_owned();
        let program = format!("import os; os.chdir({place:?})\n{PROGRAM}");
        let mut live = Live::program("/usr/bin/python3", &["-c", &program], dir);
        let ready = live.path("ready");
        common::live::wait_for("the tree", || ready.exists());
        let child = "child-of-tools";
        common::live::wait_for("its child", || {
            let tree = live.tree();
            tree.iter().any(|pid| {
                let words = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
                words.starts_with(child.as_bytes())
            })
        });
        let told = fs::read_to_string(&ready).unwrap();
        let numbers: Vec<u64> = told.split(' ').map(|number| number.parse().unwrap()).collect();
        live.dump_running(&[]);
        let mounted = Mounted::new(&live.images(), &live.path("mount"), &[]);
        let (pid, port) = (live.root.as_raw(), u16::try_from(numbers[1]).unwrap());
        Self { live, mounted, pid, address: numbers[0], port }
    }

    /// Runs a command of the shell with the mount's processes as `/proc`.
    fn shown(&self, command: &str) -> String {
        let proc = self.mounted.path("proc");
        let script = format!("mount --bind {} /proc && {command}", proc.display());
        let output = Command::new("unshare").args(["-m", "sh", "-c", &script]).output().unwrap();
        said(command, &output)
    }
}

fn said(command: &str, output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command}: {}: {text}{errors}", output.status);
    text
}

#[test]
fn privileged_tools_that_read_proc_show_the_tree() {
    for program in ["ps", "pstree", "pmap", "lsof", "top", "ss"] {
        require(Cap::Program(program));
    }
    let scene = Scene::new();
    let pid = scene.pid;
    let has = |text: &str, wanted: &str| assert!(text.contains(wanted), "{wanted}: {text}");

    let ps = scene.shown("ps -efH");
    has(&ps, "child-of-tools -c import time");
    let lines = ps.lines().map(|line| line.split_whitespace().collect::<Vec<&str>>());
    let child = lines.into_iter().find(|fields| fields[7] == "child-of-tools").unwrap();
    assert_eq!(child[2], pid.to_string(), "{ps}");
    assert_eq!(ps.lines().count(), 3, "nothing but the tree is there: {ps}");
    let sizes = scene.shown(&format!("ps -o vsz=,rss=,nlwp= -p {pid}"));
    let sizes: Vec<u64> = sizes.split_whitespace().map(|size| size.parse().unwrap()).collect();
    assert!(sizes[0] > 4096 && sizes[1] > 1024 && sizes[2] == 1, "{sizes:?}");
    has(&scene.shown("pstree -p"), &format!("({pid})---python3"));
    let pmap = scene.shown(&format!("pmap -x {pid}"));
    has(&pmap, "[ stack ]");
    has(&pmap, "total kB");
    let top = scene.shown("top -bn1");
    has(&top, &format!("{pid} root"));
    let unix = scene.shown("PROC_ROOT=/proc ss -xl");
    has(&unix, &format!("@rcriu-tools-{pid}"));
    let tcp = scene.shown("PROC_ROOT=/proc ss -tln");
    has(&tcp, &format!("127.0.0.1:{}", scene.port));

    let lsof = scene.shown(&format!("lsof -n -P -w -p {pid}"));
    has(&lsof, "FIFO");
    has(&lsof, &format!("@rcriu-tools-{pid} type=STREAM"));
    has(&lsof, &format!("127.0.0.1:{} (LISTEN)", scene.port));
    has(&lsof, &format!("{}/log", scene.live.dir.path().display()));
}

/// The line that people are told to run, as it is.
#[test]
fn privileged_one_line_shows_the_tree_with_all_tools() {
    for program in ["ps", "pstree", "pmap", "lsof", "top", "ss"] {
        require(Cap::Program(program));
    }
    let scene = Scene::new();
    let pid = scene.pid;
    let proc = scene.mounted.path("proc");
    let line = format!(
        "mount --bind {} /proc; ps -efH; pstree -p; pmap -x {pid}; lsof -p {pid}; top -bn1; ss -xl",
        proc.display()
    );
    let output = Command::new("unshare").args(["-m", "sh", "-c", &line]).output().unwrap();
    let text = said(&line, &output);
    for wanted in [
        "child-of-tools -c import time".to_owned(),
        format!("({pid})---python3"),
        "[ stack ]".to_owned(),
        "(LISTEN)".to_owned(),
        format!("{pid} root"),
        format!("@rcriu-tools-{pid}"),
    ] {
        assert!(text.contains(&wanted), "{wanted}: {text}");
    }
}

/// A debugger finds values in a core file, and any program in `/proc/PID/mem`.
#[test]
fn privileged_values_are_found_in_core_files_and_in_memory() {
    require(Cap::Program("gdb"));
    require(Cap::Program("dd"));
    let scene = Scene::new();
    let (pid, address) = (scene.pid, scene.address + 4096);
    let core = scene.mounted.path(&format!("core/{pid}"));
    let mut gdb = Command::new("gdb");
    gdb.args(["-q", "-nx", "-batch", "-ex", "info threads", "-ex"]);
    gdb.arg(format!("x/s {address:#x}")).arg("/usr/bin/python3").arg(&core);
    let text = said("gdb", &gdb.output().unwrap());
    assert!(text.contains(&format!("{address:#x}:\t\"seen by tools\"")), "{text}");
    assert!(text.contains(&format!("LWP {pid}")), "{text}");

    let read = scene.shown(&format!(
        "dd if=/proc/{pid}/mem bs=1 count=13 skip={address} iflag=skip_bytes status=none"
    ));
    assert_eq!(read, "seen by tools");
}

#[test]
fn privileged_files_are_those_that_the_kernel_had() {
    let scene = Scene::new();
    let (pid, proc) = (scene.pid, scene.mounted.path(&format!("proc/{}", scene.pid)));
    let kernel = format!("/proc/{pid}");
    // The tree still runs: what the kernel says now is what it was.
    for file in ["cmdline", "environ", "comm", "auxv", "limits", "personality", "oom_score_adj"] {
        let (shown, real) = (fs::read(proc.join(file)), fs::read(format!("{kernel}/{file}")));
        let (shown, real) = (shown.unwrap(), real.unwrap());
        assert_eq!(String::from_utf8_lossy(&shown), String::from_utf8_lossy(&real), "{file}");
    }
    for link in ["exe", "cwd", "root"] {
        let (shown, real) =
            (fs::read_link(proc.join(link)), fs::read_link(format!("{kernel}/{link}")));
        assert_eq!(shown.unwrap(), real.unwrap(), "{link}");
    }
    let fds = |dir: &Path| {
        let mut links: Vec<_> = fs::read_dir(dir.join("fd"))
            .unwrap()
            .flatten()
            .map(|entry| (entry.file_name(), fs::read_link(entry.path()).unwrap()))
            .collect();
        links.sort();
        links
    };
    assert_eq!(fds(&proc), fds(Path::new(&kernel)));
    // Addresses, protections and names; the kernel tells devices and inodes besides.
    let maps = |text: String| -> Vec<String> {
        // Images have [vvar] and [vvar_vclock] as one.
        let fixed = ["[vsyscall]", "[vvar]", "[vvar_vclock]"];
        let lines = text.lines().filter(|line| !fixed.iter().any(|name| line.ends_with(name)));
        let fields = lines.map(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let name = fields.get(5..).unwrap_or_default().join(" ");
            format!("{} {} {} {name}", fields[0], fields[1], fields[2])
        });
        fields.collect()
    };
    let read = |path: &Path| maps(fs::read_to_string(path).unwrap());
    let (shown, real) = (read(&proc.join("maps")), read(&Path::new(&kernel).join("maps")));
    for (shown, real) in shown.iter().zip(&real) {
        assert_eq!(shown, real);
    }
    assert_eq!(shown.len(), real.len());
    let status = fs::read_to_string(proc.join("status")).unwrap();
    let real = fs::read_to_string(format!("{kernel}/status")).unwrap();
    for name in [
        "Name",
        "Umask",
        "Tgid",
        "Uid",
        "Gid",
        "Groups",
        "VmSize",
        "VmData",
        "VmStk",
        "VmExe",
        "Threads",
        "SigBlk",
        "SigIgn",
        "SigCgt",
        "CapEff",
        "CapBnd",
        "NoNewPrivs",
        "Seccomp",
    ] {
        let line = |text: &str| {
            text.lines()
                .find(|line| line.starts_with(&format!("{name}:")))
                .map(|line| line.trim_end().to_owned())
        };
        assert_eq!(line(&status), line(&real), "{name}");
    }
    for fd in fs::read_dir(proc.join("fdinfo")).unwrap().flatten() {
        let shown = fs::read_to_string(fd.path()).unwrap();
        let real =
            fs::read_to_string(format!("{kernel}/fdinfo/{}", fd.file_name().display())).unwrap();
        let head = |text: &str| text.lines().take(2).map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(head(&shown), head(&real), "{}", fd.path().display());
    }

    // The linear address space, the mapping's own file, and the object are the same bytes.
    let memory = File::open(proc.join("mem")).unwrap();
    let mut bytes = [0; 13];
    memory.read_exact_at(&mut bytes, scene.address + 4096).unwrap();
    assert_eq!(&bytes, b"seen by tools");
    assert_eq!(memory.read_at(&mut bytes, 0).unwrap(), 0, "nothing is mapped there");
    let dir = scene.mounted.path(&format!("mem/{pid}"));
    let start = format!("{:012x}-", scene.address);
    let mapping = fs::read_dir(&dir).unwrap().flatten();
    let mapping =
        mapping.into_iter().find(|entry| entry.file_name().to_string_lossy().starts_with(&start));
    let mapping = fs::read(mapping.unwrap().path()).unwrap();
    assert_eq!((mapping.len(), &mapping[4096..4109]), (1 << 20, &b"seen by tools"[..]));

    // What waits in files that no other tool can see.
    let held = |path: &str| fs::read(scene.mounted.path(&format!("files/{path}"))).unwrap();
    let gone = format!("deleted{}/gone", scene.live.dir.path().display());
    assert_eq!(held(&gone), b"what it held");
    let pipes: Vec<_> =
        fs::read_dir(scene.mounted.path("files/pipes")).unwrap().flatten().collect();
    let waits = pipes.iter().map(|pipe| fs::read(pipe.path()).unwrap());
    assert!(waits.into_iter().any(|bytes| bytes == b"waits in the pipe"));
    let journal = scene.mounted.path("shmem-by-name/memfd:journal");
    assert_eq!(fs::read(journal).unwrap(), b"a line of the journal");
    // A link to a pipe leads to a pipe.
    let types = fs::read_dir(proc.join("fd")).unwrap().flatten();
    let pipes =
        types.filter(|fd| fs::metadata(fd.path()).is_ok_and(|meta| meta.file_type().is_fifo()));
    assert_eq!(pipes.count(), 2);
}

#[test]
fn privileged_a_whole_mount_can_be_walked() {
    for program in ["rsync", "tar", "diff", "find", "du", "grep"] {
        require(Cap::Program(program));
    }
    let scene = Scene::new();
    let other = Mounted::new(&scene.live.images(), &scene.live.path("other"), &[]);
    let place = scene.live.dir.path();
    for (command, status) in [
        ("find mount", 0),
        ("du -a mount", 0),
        ("cp -a mount copied", 0),
        ("tar -cSf archive.tar mount", 0),
        ("rsync -aS mount/ synced", 0),
        ("grep -r 'seen by tools' mount", 0),
        ("grep -r 'in no image at all' mount", 1),
        ("diff -r --no-dereference mount other", 0),
        ("diff -r --no-dereference mount copied", 0),
    ] {
        let script = format!("cd {} && exec timeout 600 {command}", place.display());
        let output = Command::new("sh").args(["-c", &script]).output().unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(status), "{command}: {errors}");
    }
    // Copies are as sparse as what they were made of: not much larger than the images.
    let kib = |name: &str| -> u64 {
        let path = place.join(name);
        let du = Command::new("du").args(["-sk"]).arg(path).output().unwrap();
        let text = said("du", &du);
        text.split_whitespace().next().unwrap().parse().unwrap()
    };
    assert!(kib("copied") < 2 * kib("mount") + 1024);
    drop(other);
}

/// What a person finds who has never read our documents.
#[test]
fn privileged_the_readme_says_what_is_there() {
    let scene = Scene::new();
    let readme = String::from_utf8(scene.mounted.read("README")).unwrap();
    let first = |line: &str| line.split(' ').next().unwrap().trim_end_matches('/').to_owned();
    let parts =
        readme.lines().filter(|line| line.split(' ').next().is_some_and(|w| w.ends_with('/')));
    let parts: Vec<String> = parts.map(first).collect();
    assert!(parts.len() >= 7, "{readme}");
    for part in parts {
        assert!(scene.mounted.path(&part).is_dir(), "{part}");
    }
    assert!(!readme.contains("diff -rq"), "there is one snapshot: {readme}");
}

/// Someone who knows only the mount asks what the README says can be asked, with its own lines.
#[test]
fn privileged_the_lines_of_the_readme_answer_questions() {
    for program in ["lsof", "strings", "hexdump"] {
        require(Cap::Program(program));
    }
    let mut scene = Scene::new();
    let pid = scene.pid;
    let memory = File::options().write(true).open(format!("/proc/{pid}/mem")).unwrap();
    memory.write_all_at(b"changed since", scene.address + 4096).unwrap();
    let chain = scene.live.dir.path().join("chain");
    fs::create_dir(&chain).unwrap();
    assert!(!scene.mounted.read("README").is_empty());
    drop(scene.mounted);
    fs::rename(scene.live.images(), chain.join("before")).unwrap();
    scene.live.dump_running(&["--prev-images-dir", "../chain/before"]);
    fs::rename(scene.live.images(), chain.join("after")).unwrap();
    fs::remove_file(chain.join("after/parent")).unwrap();
    std::os::unix::fs::symlink("../before", chain.join("after/parent")).unwrap();
    let mounted = Mounted::new(&chain, &scene.live.path("mount-of-two"), &[]);
    let readme = String::from_utf8(mounted.read("README")).unwrap();
    let shmem = fs::read_dir(mounted.path("shmem")).unwrap();
    let ids: Vec<String> =
        shmem.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    let is_line = |line: &&str| line.starts_with("                    ") && !line.contains("gdb");
    let said: String = readme
        .lines()
        .filter(is_line)
        .flat_map(|line| {
            let line = line.replace("PID", &pid.to_string()).replace("some text", "changed since");
            let line = line.replace("NAME | less", "memfd:journal");
            if line.contains("ID") {
                ids.iter().map(|id| line.replace("ID", id)).collect()
            } else {
                vec![line]
            }
        })
        .map(|line| {
            let output =
                Command::new("sh").args(["-c", &line]).current_dir(mounted.path(".")).output();
            let output = output.unwrap();
            // Differences are no errors, and grep looks where nothing is, too.
            assert!(matches!(output.status.code(), Some(0 | 1)), "{line}: {output:?}");
            format!("$ {}\n{}", line.trim(), String::from_utf8_lossy(&output.stdout))
        })
        .collect();
    for answer in [
        "/comm <==\npython3\n",
        "child-of-tools -c import time",
        " -> /memfd:journal (deleted)",
        "a line of the j",
        "-shared\n",
        "changed since",
        "-shared differ",
    ] {
        assert!(said.contains(answer), "{answer}: {said}");
    }
}

#[test]
fn privileged_a_look_without_a_mount_shows_the_same() {
    let scene = Scene::new();
    let images = scene.live.images();
    let images = images.to_str().unwrap();
    let pid = scene.pid.to_string();
    let run = |arguments: &[&str]| said(&arguments.join(" "), &imgfs(arguments));
    let ps = run(&["ps", images]);
    assert!(ps.lines().any(|line| line.trim_start().starts_with(&pid)), "{ps}");
    let document: serde_json::Value =
        serde_json::from_str(&run(&["ps", images, "--json"])).unwrap();
    assert_eq!(document["processes"].as_array().unwrap().len(), 2);
    assert_eq!(document["processes"][0]["pid"], scene.pid);
    let fds = run(&["fds", images, &pid]);
    assert!(fds.contains("/memfd:journal (deleted)"), "{fds}");
    assert!(run(&["maps", images, &pid]).contains("[stack]"));
    let shown = fs::read_to_string(scene.mounted.path(&format!("proc/{pid}/status"))).unwrap();
    assert_eq!(run(&["cat", images, &format!("proc/{pid}/status")]), shown);
    // Links in the mount are followed, those to files of this machine are not.
    assert_eq!(run(&["cat", images, "proc/self/status"]), shown);
    assert_eq!(run(&["cat", images, "shmem-by-name/memfd:journal"]), "a line of the journal");
    let exe = imgfs(&["cat", images, &format!("proc/{pid}/exe")]);
    assert!(String::from_utf8_lossy(&exe.stderr).contains("is a link to /usr/bin/python3"));
    let info = run(&["info", images]);
    assert!(info.contains("Processes:  2, with 2 threads"), "{info}");
    let copy = scene.live.path("fetched");
    run(&["get", images, &format!("proc/{pid}"), copy.to_str().unwrap()]);
    assert_eq!(fs::read_to_string(copy.join("status")).unwrap(), shown);
    assert_eq!(
        fs::read_link(copy.join("cwd")).unwrap(),
        fs::canonicalize(scene.live.dir.path()).unwrap()
    );
    // Nothing is overwritten.
    let again = imgfs(&["get", images, &format!("proc/{pid}"), copy.to_str().unwrap()]);
    assert!(!again.status.success());
    assert!(String::from_utf8_lossy(&again.stderr).contains("exists already"));
}
