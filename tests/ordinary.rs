//! What an ordinary user can dump and restore, and what such a user is told to be missing.
//!
//! The tests need root, to become that user.

mod common;

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::PathBuf,
    process::{Child, Command, Output, Stdio},
};

use common::{
    Cap,
    live::{Live, directory, engine, state_of, wait_for},
    require,
    untouched::Before,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// Makes `setpriv(1)` execute a program as that user.
const USER: [&str; 3] = ["--reuid=65534", "--regid=65534", "--clear-groups"];

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// A directory of the user with the program under test.
struct Home {
    dir: tempfile::TempDir,
}

impl Home {
    fn new() -> Self {
        let dir = directory();
        fs::copy(engine(), dir.path().join("rcriu")).unwrap();
        Self { dir }
    }

    /// Returns a directory for images.
    fn images(&self) -> PathBuf {
        let path = self.dir.path().join("1");
        if !path.exists() {
            fs::create_dir(&path).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o777)).unwrap();
        }
        path
    }

    /// Executes rcriu as the user.
    fn rcriu(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new("setpriv");
        command.args(USER).arg(self.dir.path().join("rcriu")).args(arguments);
        command.arg("-D").arg(self.images()).env("HOME", self.dir.path());
        command.stdin(Stdio::null()).output().unwrap()
    }
}

/// Waits until a process is `sleep`, and sleeps.
fn wait_asleep(pid: i32) {
    wait_for("a process that sleeps", || {
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        name.trim() == "sleep" && state_of(pid) == Some('S')
    });
}

/// The program is deleted, so that only a privileged rcriu can open it.
#[test]
fn privileged_an_ordinary_user_is_told_what_is_missing() {
    require(Cap::Ptrace);
    require(Cap::Program("setpriv"));
    let home = Home::new();
    let program = home.dir.path().join("sleep");
    fs::copy("/bin/sleep", &program).unwrap();
    let arguments = [&USER[..], &[program.to_str().unwrap(), "1000"]].concat();
    let mut live = Live::program("setpriv", &arguments, directory());
    wait_asleep(live.root.as_raw());
    fs::remove_file(&program).unwrap();
    let before = Before::of(&mut live);
    let output = home.rcriu(&["dump", "-R", "-t", &live.root.to_string()]);
    let words = said(&output);
    assert!(!output.status.success(), "it was dumped: {words}");
    assert!(words.contains("run rcriu as root, or give it CAP_CHECKPOINT_RESTORE"), "{words}");
    before.assert_untouched(&mut live, "a dump by an ordinary user");
}

#[test]
fn privileged_an_ordinary_user_dumps_a_process_but_cannot_choose_its_pid() {
    require(Cap::Ptrace);
    require(Cap::Program("setpriv"));
    let home = Home::new();
    let arguments = [&USER[..], &["sleep", "1000"]].concat();
    let mut live = Live::program("setpriv", &arguments, directory());
    wait_asleep(live.root.as_raw());
    let before = Before::of(&mut live);
    let output = home.rcriu(&["dump", "-R", "--shell-job", "-t", &live.root.to_string()]);
    assert!(output.status.success(), "{}", said(&output));
    before.assert_untouched(&mut live, "a dump by an ordinary user");
    live.kill();
    let output = home.rcriu(&["restore", "-d", "--shell-job"]);
    let words = said(&output);
    assert!(!output.status.success(), "it was restored: {words}");
    assert!(words.contains("with this pid") && words.contains("unshare -Urpf"), "{words}");
}

/// Ends and reaps a child, and a restored process, at the end of a test.
struct Ends(Child, Option<i32>);

impl Drop for Ends {
    fn drop(&mut self) {
        if let Some(pid) = self.1 {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Waits for the first child of a process.
fn child_of(pid: u32) -> i32 {
    let children = format!("/proc/{pid}/task/{pid}/children");
    let mut found = None;
    wait_for("a child", || {
        let text = fs::read_to_string(&children).unwrap_or_default();
        found = text.split_whitespace().next().map(|word| word.parse().unwrap());
        found.is_some()
    });
    found.unwrap()
}

/// A tree in a user and a pid namespace of its own: the user has all power over it.
#[test]
fn privileged_an_ordinary_user_restores_a_tree_in_its_own_namespaces() {
    require(Cap::Ptrace);
    for program in ["setpriv", "unshare", "setsid"] {
        require(Cap::Program(program));
    }
    let home = Home::new();
    let mut command = Command::new("setpriv");
    command.args(USER).args(["unshare", "-Urpf", "setsid", "sleep", "1000"]);
    // The working directory of the tests may be root's alone.
    command.current_dir("/");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut ends = Ends(command.spawn().unwrap(), None);
    let tree = child_of(ends.0.id());
    wait_asleep(tree);
    let output = home.rcriu(&["dump", "-t", &tree.to_string()]);
    assert!(output.status.success(), "{}", said(&output));
    ends.0.wait().unwrap();
    let pidfile = home.dir.path().join("pid");
    let output = home.rcriu(&["restore", "-d", "--pidfile", pidfile.to_str().unwrap()]);
    assert!(output.status.success(), "{}", said(&output));
    let restored: i32 = fs::read_to_string(&pidfile).unwrap().trim().parse().unwrap();
    ends.1 = Some(restored);
    wait_asleep(restored);
    let read = |file: &str| fs::read_to_string(format!("/proc/{restored}/{file}")).unwrap();
    let map: Vec<u32> =
        read("uid_map").split_whitespace().map(|word| word.parse().unwrap()).collect();
    assert_eq!(map, [0, 65534, 1]);
    assert_eq!(read("setgroups").trim(), "deny");
    let status = read("status");
    let line = |key: &str| status.lines().find_map(|line| line.strip_prefix(key)).unwrap().trim();
    assert!(line("NSpid:").ends_with("\t1"), "{status}");
    assert!(line("Uid:").starts_with("65534"), "{status}");
}

/// `tail -f`, which watches its file, and a program that watches directories by names that are
/// neither open nor arguments: only privileged users may open watched files by their handles.
#[test]
fn privileged_an_ordinary_user_dumps_and_restores_watches() {
    require(Cap::Ptrace);
    for program in ["setpriv", "unshare", "setsid", "tail", "inotifywait"] {
        require(Cap::Program(program));
    }
    for program in ["tail -f in", "inotifywait -q -m -r -e create,modify --format %w%f=%e ."] {
        let home = Home::new();
        let path = |name: &str| home.dir.path().join(name);
        let place = path("place");
        fs::create_dir_all(place.join("deep/below")).unwrap();
        let (input, out) = (place.join("in"), path("out"));
        fs::write(&input, "first\n").unwrap();
        fs::write(&out, "").unwrap();
        for path in [&place, &place.join("deep"), &place.join("deep/below"), &input, &out] {
            fs::set_permissions(path, fs::Permissions::from_mode(0o777)).unwrap();
        }
        let mut command = Command::new("setpriv");
        command.args(USER).args(["unshare", "-Urpf", "setsid", "sh", "-c"]);
        command.arg(format!("exec {program} >>../out 2>&1 </dev/null"));
        command.current_dir(&place);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut ends = Ends(command.spawn().unwrap(), None);
        let tree = child_of(ends.0.id());
        let shown = |words: &str| {
            wait_for(words, || fs::read_to_string(&out).unwrap().contains(words));
        };
        let watches = |pid: i32| {
            let infos = fs::read_dir(format!("/proc/{pid}/fdinfo")).into_iter().flatten().flatten();
            let texts = infos.map(|info| fs::read_to_string(info.path()).unwrap_or_default());
            texts.map(|text| text.matches("inotify wd:").count()).sum::<usize>()
        };
        let wanted = if program.starts_with("tail") { 1 } else { 3 };
        wait_for("the watches", || watches(tree) == wanted && state_of(tree) == Some('S'));
        let output = home.rcriu(&["dump", "-t", &tree.to_string()]);
        assert!(output.status.success(), "{program}: {}", said(&output));
        ends.0.wait().unwrap();
        let pidfile = path("pid");
        let output = home.rcriu(&["restore", "-d", "--pidfile", pidfile.to_str().unwrap()]);
        assert!(output.status.success(), "{program}: {}", said(&output));
        let restored: i32 = fs::read_to_string(&pidfile).unwrap().trim().parse().unwrap();
        ends.1 = Some(restored);
        assert_eq!(watches(restored), wanted, "{program}");
        if program.starts_with("tail") {
            shown("first\n");
            fs::write(&input, "first\nsecond\n").unwrap();
            shown("second\n");
        } else {
            fs::write(place.join("deep/below/new"), "").unwrap();
            shown("./deep/below/new=CREATE\n");
            fs::write(&input, "more").unwrap();
            shown("./in=MODIFY\n");
        }
    }
}

/// What the processes of a sandbox write about themselves, in turn with a number.
const SANDBOX: &str = "echo text >/tmp/file; mkdir /tmp/d; chmod 500 /tmp/d; exec 5<>/tmp/gone; \
    echo ghost >&5; rm /tmp/gone; i=0; while true; do i=$((i+1)); \
    { id; cat /proc/self/uid_map; cut -d' ' -f5- /proc/self/mountinfo | sort; \
    stat -c '%A %h %u %g %s %n' /tmp /tmp/*; cat /tmp/file; cat </proc/self/fd/5; \
    readlink /proc/1/fd/*; } >/out/new 2>&1; mv /out/new /out/seen; echo $i >/out/count; \
    sleep 0.1; done";

/// Runs `bwrap` of an ordinary user, and dumps and restores what is in it, as that user or as root.
fn sandbox(home: &Home, options: &[&str], is_user: bool) {
    require(Cap::Ptrace);
    require(Cap::Program("setpriv"));
    require(Cap::Program("bwrap"));
    let out = home.dir.path().join("out");
    fs::create_dir(&out).unwrap();
    fs::set_permissions(&out, fs::Permissions::from_mode(0o777)).unwrap();
    let mut command = Command::new("setpriv");
    command.args(USER).args([
        "setsid",
        "bwrap",
        "--new-session",
        "--unshare-user",
        "--unshare-pid",
    ]);
    for directory in ["/usr", "/bin", "/lib", "/lib64"] {
        command.args(["--ro-bind", directory, directory]);
    }
    command
        .args(["--proc", "/proc", "--tmpfs", "/tmp", "--bind"])
        .arg(&out)
        .arg("/out")
        .args(options);
    command.args(["/bin/sh", "-c", SANDBOX]).current_dir("/");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut ends = Ends(command.spawn().unwrap(), None);
    let count = || -> u64 {
        let text = fs::read_to_string(out.join("count")).unwrap_or_default();
        text.trim().parse().unwrap_or(0)
    };
    let counts_on = || {
        let from = count();
        wait_for("the sandbox to count", || count() > from + 1);
        count()
    };
    // What it counts is in the sizes of no file.
    let seen = || fs::read_to_string(out.join("seen")).unwrap();
    counts_on();
    let children = format!("/proc/{0}/task/{0}/children", ends.0.id());
    let inside = fs::read_to_string(children).unwrap();
    let (was, inside) = (seen(), inside.trim().to_owned());
    let run = |arguments: &[&str]| {
        if is_user {
            return home.rcriu(arguments);
        }
        let mut command = Command::new(engine());
        command.args(arguments).arg("-D").arg(home.images());
        command.stdin(Stdio::null()).output().unwrap()
    };
    let output = run(&["dump", "-t", &inside]);
    assert!(output.status.success(), "{}", said(&output));
    ends.0.wait().unwrap();
    let reached = count();
    let file = home.images().join("pid");
    let output = run(&["restore", "-d", "--pidfile", file.to_str().unwrap()]);
    assert!(output.status.success(), "{}", said(&output));
    ends.1 = fs::read_to_string(&file).unwrap().trim().parse().ok();
    assert!(counts_on() > reached);
    // The directory in which bwrap has put the root together is the whole file system now. A machine may
    // have hidden one tmpfs by another, for good.
    let comparable = |text: String| -> Vec<String> {
        let lines = text.lines().filter(|line| !line.starts_with("/dev/shm "));
        lines.map(|line| line.replace(" /newroot / ", " / / ")).collect()
    };
    assert_eq!(comparable(seen()), comparable(was));
}

#[test]
fn privileged_an_ordinary_user_dumps_and_restores_a_sandbox() {
    sandbox(&Home::new(), &["--dev-bind", "/dev/null", "/dev/null"], true);
}

#[test]
fn privileged_root_dumps_and_restores_the_sandbox_of_a_user() {
    sandbox(&Home::new(), &["--dev-bind", "/dev", "/dev", "--unshare-all"], false);
}

/// A tree of `unshare -Urm` has the mounts of the machine, which it cannot unmount. It can after a restore.
#[test]
fn privileged_locked_mounts_are_named_by_a_restore() {
    require(Cap::Ptrace);
    for program in ["unshare", "setsid"] {
        require(Cap::Program(program));
    }
    let images = tempfile::tempdir().unwrap();
    let rcriu = |arguments: &[&str]| {
        let mut command = Command::new(engine());
        command.args(arguments).arg("-D").arg(images.path()).output().unwrap()
    };
    let mut command = Command::new("unshare");
    command.args(["-Urmpf", "--mount-proc", "setsid", "sleep", "1000"]).current_dir("/");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut ends = Ends(command.spawn().unwrap(), None);
    let tree = child_of(ends.0.id());
    wait_asleep(tree);
    let output = rcriu(&["dump", "-t", &tree.to_string()]);
    assert!(output.status.success(), "{}", said(&output));
    ends.0.wait().unwrap();
    let pidfile = images.path().join("pid");
    let output = rcriu(&["restore", "-d", "--pidfile", pidfile.to_str().unwrap()]);
    assert!(output.status.success(), "{}", said(&output));
    ends.1 = Some(fs::read_to_string(&pidfile).unwrap().trim().parse().unwrap());
    let text = said(&output);
    let named = text.split_once("change their flags: ").unwrap_or_else(|| panic!("{text}")).1;
    // The tree itself has mounted the upper one of the two.
    assert_eq!(
        named.split([',', '\n']).filter(|point| point.trim() == "/proc").count(),
        1,
        "{text}"
    );
    assert!(named.contains("/sys"), "{text}");
}
