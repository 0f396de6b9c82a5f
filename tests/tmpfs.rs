//! The files of a tmpfs in a mount, compared with those that GNU tar unpacks from the same image.

mod common;

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use common::{
    Cap,
    chain::TestChain,
    live::{engine, wait_for},
    mounted::{IMGFS, Mounted},
    require,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use rcriu::image::{ImageWriter, Kind, proto};

/// The options of tar with which CRIU packs a tmpfs.
const PACK: &str = "--create --gzip --no-unquote --no-wildcards --one-file-system --check-links \
                    --preserve-permissions --sparse --numeric-owner";

/// The options with which tar also keeps fractions of times, and extended attributes.
const PACK_ALL: &str = "--create --gzip --format=posix --xattrs --numeric-owner --sparse";

/// Fills a directory with one of each thing that a file system can hold.
const FILL: &str = r"
import os, socket
def put(name, data=b'', mode=0o644, uid=0, gid=0):
    with open(name, 'wb') as file: file.write(data)
    os.chown(name, uid, gid); os.chmod(name, mode)
os.umask(0)
put('plain', b'hello'); put('secret', b's3cret', 0o600, 1000, 100); put('closed', b'x', 0, 7, 8)
put('setuid', b'', 0o6755, 33, 33); put('empty'); put('large-id', b'', 0o640, 4000000000, 3000000)
os.makedirs('dir/deep/er'); os.chmod('dir', 0o1777); os.chown('dir/deep', 1000, 100); os.mkdir('bare', 0o700)
put('dir/deep/er/' + 'n' * 200, b'long name'); put('dir/new\nline', b'odd'); put(b'not-utf8-\xff'.decode('utf8', 'surrogateescape'))
os.symlink('plain', 'link'); os.symlink('/no/such/' + 'd/' * 100, 'far'); os.lchown('link', 5, 6)
os.link('plain', 'dir/again'); os.link('plain', 'once-more'); os.link('link', 'dir/link2')
os.mkfifo('fifo', 0o620); os.chown('fifo', 1, 2); os.link('fifo', 'dir/fifo2')
os.mknod('null', 0o20666, os.makedev(1, 3)); os.mknod('disk', 0o60640, os.makedev(259, 70000))
with open('sparse', 'wb') as file:
    for at in (0, 5 << 20, 9 << 20): file.seek(at); file.write(b'data')
    file.truncate(16 << 20)
s = socket.socket(socket.AF_UNIX); s.bind('socket')
names = [os.path.join(d, n) for d, ds, ns in os.walk('.', topdown=False) for n in ds + ns] + ['.']
for at, name in enumerate(sorted(names, reverse=True)):
    os.utime(name, ns=(0, (1600000000 + at) * 10**9 + 123456789), follow_symlinks=False)
os.utime('empty', (-5, -5))
os.setxattr('plain', 'user.note', b'line\nzero\0'); os.setxattr('dir', 'user.a=b%', b'1'); os.setxattr('dir', 'user.empty', b'')
os.utime('dir', ns=(0, 1600000100 * 10**9 + 5))
";

/// Prints all extended attributes.
const ATTRIBUTES: &str = r"
import os
for d, ds, ns in os.walk('.'):
    for n in [os.path.join(d, n) for n in ds + ns]:
        if os.path.isfile(n) or os.path.isdir(n):
            print(n, {a: os.getxattr(n, a) for a in sorted(os.listxattr(n, follow_symlinks=False))})
";

struct Scene {
    dir: tempfile::TempDir,
    chain: TestChain,
}

impl Scene {
    /// Packs a tmpfs as these options say, and unpacks it below `unpacked`.
    fn new(options: &str) -> Self {
        for program in ["python3", "tar", "find"] {
            require(Cap::Program(program));
        }
        require(Cap::Fuse);
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let mut chain = TestChain::new(&dir.path().join("chain"));
        let layer = chain.layer("1");
        let mut image =
            ImageWriter::create(&chain.dir(layer).join("mountpoints-12.img"), Kind::Mnts).unwrap();
        let mount = proto::MntEntry {
            fstype: 5,
            mnt_id: 3,
            root_dev: 40,
            root: "/".into(),
            mountpoint: "/run/t".into(),
            ..Default::default()
        };
        image.message(&mount).unwrap();
        image.finish().unwrap();
        let scene = Self { dir, chain };
        let packed = scene.chain.dir(layer).join(Kind::TmpfsDev.file_name(40));
        let [was, unpacked] = ["was", "unpacked"].map(|name| scene.path(name));
        fs::create_dir(&was).unwrap();
        fs::create_dir(&unpacked).unwrap();
        run(Command::new("python3").args(["-c", FILL]).current_dir(&was));
        let pack =
            format!("tar {options} --directory {} . 2>/dev/null >{}", show(&was), show(&packed));
        run(Command::new("sh").args(["-c", &pack]));
        let xattrs = if options == PACK_ALL { "--xattrs --xattrs-include=*" } else { "" };
        let unpack = format!("tar -xzpf {} {xattrs} -C {}", show(&packed), show(&unpacked));
        run(Command::new("sh").args(["-f", "-c", &unpack]));
        scene
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn mount(&self, arguments: &[&str]) -> Mounted {
        Mounted::new(self.chain.root(), &self.path("mnt"), arguments)
    }
}

fn show(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Runs a command, which must succeed, and returns its output.
fn run(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {errors}");
    // A name that is not UTF-8 is shown in this form.
    String::from_utf8_lossy(&output.stdout).replace('\u{fffd}', "\\xff")
}

/// Lists names, types, modes, owners, sizes (not of directories), times, link counts and targets.
fn listed(dir: &Path) -> Vec<String> {
    let format = "%P %y %#m %U %G %T@ %n %l";
    let text = run(Command::new("find").current_dir(dir).args([
        ".",
        "-type",
        "d",
        "-printf",
        &format!("{format}\\0"),
        "-o",
        "-printf",
        &format!("{format} %s\\0"),
    ]));
    let mut lines: Vec<String> = text.split('\0').map(str::to_owned).collect();
    lines.sort();
    lines
}

/// Returns, for each file with several names, its names.
fn names_of_one(dir: &Path) -> Vec<Vec<String>> {
    let arguments = [".", "!", "-type", "d", "-links", "+1", "-printf", "%i %P\\0"];
    let text = run(Command::new("find").current_dir(dir).args(arguments));
    let mut groups = std::collections::BTreeMap::<String, Vec<String>>::new();
    for (number, name) in text.split('\0').filter_map(|line| line.split_once(' ')) {
        groups.entry(number.to_owned()).or_default().push(name.to_owned());
    }
    groups.values_mut().for_each(|names| names.sort());
    let mut groups: Vec<_> = groups.into_values().collect();
    groups.sort();
    groups
}

/// Returns the devices' numbers as `stat` prints them.
fn devices(dir: &Path) -> String {
    run(Command::new("stat").current_dir(dir).args(["-c", "%n %t:%T", "null", "disk"]))
}

#[test]
fn privileged_a_mount_shows_what_tar_unpacks() {
    for options in [PACK, PACK_ALL] {
        let scene = Scene::new(options);
        let mounted = scene.mount(&[]);
        let (shown, unpacked) = (mounted.path("files/tmpfs/run/t"), scene.path("unpacked"));
        let lines = listed(&shown);
        assert_eq!(lines, listed(&unpacked), "{options}");
        assert!(lines.len() > 20, "{lines:?}");
        let groups = names_of_one(&shown);
        assert_eq!(groups, names_of_one(&unpacked));
        // GNU tar packs each name of a FIFO as a file of its own.
        assert_eq!(groups.len(), 2, "{groups:?}");
        assert_eq!(devices(&shown), devices(&unpacked));
        for (name, len) in [("plain", 5), ("dir/again", 5), ("sparse", 16 << 20)] {
            let bytes = fs::read(shown.join(name)).unwrap();
            assert!(
                bytes.len() == len && bytes == fs::read(unpacked.join(name)).unwrap(),
                "{name}"
            );
        }
        let attributes =
            |dir: &Path| run(Command::new("python3").args(["-c", ATTRIBUTES]).current_dir(dir));
        let sorted = |text: String| {
            let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
            lines.sort();
            lines
        };
        let found = sorted(attributes(&shown));
        assert_eq!(found, sorted(attributes(&unpacked)), "{options}");
        let with_note = found.iter().any(|line| line.contains("user.note"));
        assert_eq!(with_note, options == PACK_ALL, "{found:?}");
        // A copy is the same again.
        let copy = scene.path("copy");
        run(Command::new("cp").args(["-a", show(&shown), show(&copy)]));
        assert_eq!(listed(&copy), lines);
        // No device can be opened.
        let open = fs::read(shown.join("null")).unwrap_err();
        assert_eq!(open.kind(), std::io::ErrorKind::PermissionDenied);
    }
}

#[test]
fn privileged_an_ordinary_user_can_read_all_and_others_nothing() {
    require(Cap::Program("setpriv"));
    require(Cap::Program("fusermount3"));
    let scene = Scene::new(PACK);
    let [program, point, cache] = ["imgfs", "mnt", "cache"].map(|name| scene.path(name));
    fs::copy(IMGFS, &program).unwrap();
    let nobody = || {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups", "env"]);
        command
    };
    {
        // Files of root, which others may look at, are root's alone in a mount.
        let mounted = scene.mount(&["--allow-other"]);
        let mut list = nobody();
        let output = list.arg("ls").arg(mounted.path("files/tmpfs/run/t")).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && said.contains("Permission denied"), "{said}");
    }
    // The log is beside the mount.
    fs::remove_file(scene.path("mnt.log")).unwrap();
    fs::set_permissions(scene.dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
    run(Command::new("chown").args(["-R", "65534:65534"]).arg(scene.chain.root()).arg(&point));
    let mut command = nobody();
    command.arg(format!("XDG_CACHE_HOME={}", show(&cache))).arg(&program);
    let mounted = Mounted::by(command, scene.chain.root(), &point, &[]);
    let shown = mounted.path("files/tmpfs/run/t");
    let read = format!(
        "cd {} && cat secret closed && echo && find . -printf '%U %G\\n' | sort -u \
         && find . -type f,d ! -readable && stat -c %a closed",
        show(&shown)
    );
    let text = run(nobody().args(["sh", "-c", &read]));
    assert_eq!(text, "s3cretx\n65534 65534\n400\n");
}

/// Returns the images of file systems in memory, the largest last.
fn packed(images: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(images).unwrap().map(|entry| entry.unwrap().path());
    let mut found: Vec<PathBuf> = entries
        .filter(|path| path.file_name().unwrap().to_string_lossy().starts_with("tmpfs-dev-"))
        .collect();
    found.sort_by_key(|path| fs::metadata(path).unwrap().len());
    found
}

/// Kills and reaps what is left of a tree.
struct Tree {
    above: Child,
    restored: Option<i32>,
}

impl Drop for Tree {
    fn drop(&mut self) {
        if let Some(pid) = self.restored {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        let _ = self.above.kill();
        let _ = self.above.wait();
    }
}

#[test]
fn privileged_a_tmpfs_that_did_not_change_is_not_stored_again() {
    require(Cap::Ptrace);
    for program in ["unshare", "setsid", "tar"] {
        require(Cap::Program(program));
    }
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    for name in ["1", "2", "large", "small"] {
        fs::create_dir(path(name)).unwrap();
    }
    let script = "cd \"$0\"; for name in large small; do mount -t tmpfs $name $name; done
        head -c 1000000 /dev/urandom >large/file; echo 1 >small/file; cd /; exec setsid sleep 1000";
    let mut command = Command::new("unshare");
    command.args(["-mpf", "--kill-child", "--mount-proc", "sh", "-c", script]).arg(dir.path());
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut tree = Tree { above: command.spawn().unwrap(), restored: None };
    let children = format!("/proc/{0}/task/{0}/children", tree.above.id());
    let mut first = 0;
    wait_for("the tree", || {
        let text = fs::read_to_string(&children).unwrap_or_default();
        first = text.trim().parse().unwrap_or(0);
        fs::read_to_string(format!("/proc/{first}/comm")).is_ok_and(|name| name == "sleep\n")
    });
    let inside = |pid: i32, name: &str| {
        let below = path(name);
        Path::new(&format!("/proc/{pid}/root")).join(below.strip_prefix("/").unwrap())
    };
    let file = fs::read(inside(first, "large/file")).unwrap();
    let rcriu = |arguments: &[&str]| {
        run(Command::new(engine()).args(arguments).stdin(Stdio::null()));
    };
    let pid = first.to_string();
    rcriu(&["dump", "-t", &pid, "-D", show(&path("1")), "-R"]);
    fs::write(inside(first, "small/file"), "2\n").unwrap();
    rcriu(&["dump", "-t", &pid, "-D", show(&path("2")), "--prev-images-dir", "../1"]);
    let (before, after) = (packed(&path("1")), packed(&path("2")));
    let inode = |path: &PathBuf| fs::metadata(path).unwrap().ino();
    // The machine may have others.
    let known: Vec<u64> = before.iter().map(inode).collect();
    let new = after.iter().filter(|path| !known.contains(&inode(path))).count();
    assert_eq!((before.len(), new), (after.len(), 1), "{before:?} {after:?}");
    let large = after.last().unwrap();
    assert_eq!(Some(inode(large)), before.last().map(inode));
    // As CRIU reads it.
    let unpacked = Command::new("tar").args(["-xzOf", show(large), "file"]).output().unwrap();
    assert!(unpacked.stdout == file);
    let pid_file = path("pid");
    rcriu(&["restore", "-d", "-D", show(&path("2")), "--pidfile", show(&pid_file)]);
    let restored = fs::read_to_string(&pid_file).unwrap().trim().parse().unwrap();
    tree.restored = Some(restored);
    assert!(fs::read(inside(restored, "large/file")).unwrap() == file);
    assert_eq!(fs::read_to_string(inside(restored, "small/file")).unwrap(), "2\n");
}
