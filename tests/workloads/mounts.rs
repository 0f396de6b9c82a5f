//! Mount namespaces.

use std::{
    collections::HashMap,
    ffi::{CStr, CString},
    fs::{self, File},
    io::{Read, Seek, SeekFrom, Write},
    os::{
        fd::AsRawFd,
        unix::{
            ffi::OsStrExt,
            fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink},
            net::{UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
};

use crate::{
    Row,
    kit::{Checkpoint, Verdict, same, wait_until},
    users,
};

pub const ROWS: &[Row] = &[
    ("mount_namespace", mount_namespace),
    ("mount_namespace_of_users", mount_namespace_of_users),
    ("id_mapped_mount", id_mapped_mount),
    ("mount_namespace_sockets", mount_namespace_sockets),
    ("mount_namespace_of_a_child", of_a_child),
    ("mount_namespaces", mount_namespaces),
    ("mount_namespace_below_its_root", below_its_root),
    ("mount_namespace_deleted", mount_namespace_deleted),
    ("mount_namespace_hidden", mount_namespace_hidden),
];

/// `linux/mount.h`, since Linux 5.10.
const MS_NOSYMFOLLOW: u64 = 1 << 8;

/// What may be mounted twice on a machine.
const HIDDEN: [&str; 2] = ["/ /dev/shm ", "/ /dev/pts "];

fn c(path: &Path) -> CString {
    CString::new(path.as_os_str().as_bytes()).expect("no NUL")
}

/// Calls `mount(2)`.
pub fn mount(source: &str, target: &Path, name: &str, flags: u64, options: &str) -> Verdict {
    let words = [source, name, options].map(|word| CString::new(word).expect("no NUL"));
    let target = c(target);
    sys!(mount(
        words[0].as_ptr(),
        target.as_ptr(),
        words[1].as_ptr(),
        flags,
        words[2].as_ptr().cast()
    ))?;
    Ok(())
}

/// Moves into a mount namespace whose changes reach no other, without the mounts of other tests.
pub fn enter() -> Verdict {
    sys!(unshare(libc::CLONE_NEWNS))?;
    mount("none", Path::new("/"), "", libc::MS_PRIVATE | libc::MS_REC, "")?;
    let whole = fs::read_to_string("/proc/self/mountinfo").map_err(text)?;
    let points = whole.lines().filter_map(|line| line.split(' ').nth(4));
    for point in points.filter(|point| point.starts_with("/tmp/")) {
        // One that is below another is gone already.
        let _ = sys!(umount2(c(Path::new(point)).as_ptr(), libc::MNT_DETACH));
    }
    Ok(())
}

fn text(error: std::io::Error) -> String {
    error.to_string()
}

/// The table of mounts, without numbers that are new after each restore; groups are numbered in the
/// order of the table.
pub fn table() -> Result<Vec<String>, String> {
    let whole = fs::read_to_string("/proc/self/mountinfo").map_err(text)?;
    let mut lines: Vec<Vec<&str>> = whole.lines().map(|line| line.split(' ').collect()).collect();
    // The table is in the order in which mounts were made.
    lines.sort_by_key(|fields| (fields[4].to_owned(), fields[3].to_owned(), fields[8..].join(" ")));
    let mut groups = HashMap::new();
    let mut shown = Vec::new();
    for fields in lines {
        let mut line = Vec::new();
        for field in &fields[3..] {
            line.push(match field.split_once(':') {
                Some((kind @ ("shared" | "master"), group)) => {
                    let next = groups.len();
                    format!("{kind}:{}", groups.entry(group.to_owned()).or_insert(next))
                }
                _ => (*field).to_owned(),
            });
        }
        shown.push(line.join(" "));
    }
    Ok(shown)
}

/// All files below a directory, with what `lstat(2)` and their contents show.
fn files(top: &Path) -> Result<Vec<String>, String> {
    let mut found = Vec::new();
    let mut pending = vec![top.to_owned()];
    while let Some(path) = pending.pop() {
        let stat = fs::symlink_metadata(&path).map_err(text)?;
        let kind = stat.file_type();
        let content = if kind.is_file() {
            let bytes = fs::read(&path).map_err(text)?;
            format!(
                "{:x}",
                bytes
                    .iter()
                    .fold(7_u64, |sum, byte| { sum.wrapping_mul(31).wrapping_add((*byte).into()) })
            )
        } else if kind.is_symlink() {
            fs::read_link(&path).map_err(text)?.display().to_string()
        } else {
            format!("{}", stat.rdev())
        };
        if kind.is_dir() {
            for entry in fs::read_dir(&path).map_err(text)? {
                pending.push(entry.map_err(text)?.path());
            }
        }
        let size = if kind.is_dir() { 0 } else { stat.size() };
        found.push(format!(
            "{} {:o} {}:{} {size} {} {}.{} {content}",
            path.display(),
            stat.mode(),
            stat.uid(),
            stat.gid(),
            stat.nlink(),
            stat.mtime(),
            stat.mtime_nsec(),
        ));
    }
    found.sort();
    Ok(found)
}

/// Puts files of all types into a directory; with `privileged`, also those that only root makes.
fn populate(top: &Path, privileged: bool) -> Verdict {
    let dir = top.join("directory");
    fs::create_dir(&dir).map_err(text)?;
    fs::write(dir.join("file"), "the contents of a file").map_err(text)?;
    fs::hard_link(dir.join("file"), top.join("another name")).map_err(text)?;
    symlink("/etc/passwd", top.join("link")).map_err(text)?;
    let long = top.join("x".repeat(200));
    fs::write(&long, vec![3; 100_000]).map_err(text)?;
    fs::set_permissions(&long, fs::Permissions::from_mode(0o4711)).map_err(text)?;
    std::os::unix::fs::chown(&long, Some(12), Some(34)).map_err(text)?;
    let sparse = File::create(top.join("sparse")).map_err(text)?;
    sparse.set_len(1 << 20).map_err(text)?;
    let (fifo, device) = (c(&top.join("fifo")), c(&top.join("null")));
    sys!(mkfifo(fifo.as_ptr(), 0o640))?;
    if privileged {
        sys!(mknod(device.as_ptr(), libc::S_IFCHR | 0o666, libc::makedev(1, 3)))?;
    }
    let (file, name) = (c(&dir), attribute_name(privileged));
    let value = b"an attribute";
    sys!(setxattr(file.as_ptr(), name.as_ptr(), value.as_ptr().cast(), value.len(), 0))?;
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o1750)).map_err(text)
}

fn attribute_name(privileged: bool) -> &'static CStr {
    // tmpfs has no `user.` attributes before Linux 6.6.
    if privileged { c"trusted.of.the.test" } else { c"security.of.the.test" }
}

fn attribute(path: &Path, privileged: bool) -> Result<Vec<u8>, String> {
    let (file, mut value) = (c(path), vec![0; 64]);
    let name = attribute_name(privileged);
    let len = sys!(getxattr(file.as_ptr(), name.as_ptr(), value.as_mut_ptr().cast(), value.len()))?;
    value.truncate(usize::try_from(len).expect("not negative"));
    Ok(value)
}

/// A tree that has changed its mounts: new file systems with files, stacked ones, mounts of single
/// directories and files, with flags of their own, and with all relations.
fn mount_namespace(checkpoint: &Checkpoint) -> Verdict {
    enter()?;
    all_kinds(checkpoint, true)
}

/// The same in a user namespace, to which the mounts belong.
fn mount_namespace_of_users(checkpoint: &Checkpoint) -> Verdict {
    users::open_up(checkpoint)?;
    users::enter(["0 100000 65536\n", "0 300000 65536\n"], None)?;
    sys!(setgroups(0, std::ptr::null()))?;
    sys!(setresgid(0, 0, 0))?;
    sys!(setresuid(0, 0, 0))?;
    sys!(prctl(libc::PR_SET_DUMPABLE, 1))?;
    enter()?;
    all_kinds(checkpoint, false)
}

fn all_kinds(checkpoint: &Checkpoint, privileged: bool) -> Verdict {
    let top = checkpoint.path("mounts");
    let at = |name: &str| -> Result<PathBuf, String> {
        let path = top.join(name);
        fs::create_dir_all(&path).map_err(text)?;
        Ok(path)
    };
    let tmpfs = at("tmpfs")?;
    let options = "size=4m,mode=751,uid=7,gid=8";
    mount("a source", &tmpfs, "tmpfs", libc::MS_NOSUID | libc::MS_NODEV, options)?;
    populate(&tmpfs, privileged)?;
    let stacked = at("stacked")?;
    mount("below", &stacked, "tmpfs", 0, "size=64k")?;
    fs::write(stacked.join("hidden"), "below").map_err(text)?;
    mount("above", &stacked, "tmpfs", 0, "size=64k")?;
    fs::write(stacked.join("shown"), "above").map_err(text)?;
    let read_only = at("read only")?;
    mount("x", &read_only, "tmpfs", 0, "size=64k")?;
    fs::write(read_only.join("file"), "for good").map_err(text)?;
    mount("x", &read_only, "tmpfs", libc::MS_REMOUNT | libc::MS_RDONLY, "")?;
    let bound = at("bound")?;
    let inside = tmpfs.join("directory");
    mount(&inside.display().to_string(), &bound, "", libc::MS_BIND, "")?;
    let flags = libc::MS_RDONLY | MS_NOSYMFOLLOW;
    mount("", &bound, "", libc::MS_BIND | libc::MS_REMOUNT | flags, "")?;
    let file = top.join("file");
    fs::write(&file, "").map_err(text)?;
    mount(&tmpfs.join("another name").display().to_string(), &file, "", libc::MS_BIND, "")?;
    if privileged {
        mount("proc", &at("proc")?, "proc", libc::MS_NOEXEC, "")?;
        // Without files.
        mount("huge", &at("huge")?, "hugetlbfs", 0, "size=4m,mode=750")?;
        mount("bpf", &at("bpf")?, "bpf", libc::MS_NODEV, "mode=700")?;
    }
    let terminals = at("terminals")?;
    mount("devpts", &terminals, "devpts", 0, "newinstance,ptmxmode=666,mode=620,gid=5")?;
    // Two mounts that share events, one that receives them, one that does both.
    let shared = at("shared")?;
    mount("s", &shared, "tmpfs", 0, "size=64k")?;
    mount("", &shared, "", libc::MS_SHARED, "")?;
    let name = shared.display().to_string();
    for (place, flags) in [
        ("peer", vec![]),
        ("slave", vec![libc::MS_SLAVE]),
        ("both", vec![libc::MS_SLAVE, libc::MS_SHARED]),
    ] {
        let place = at(place)?;
        mount(&name, &place, "", libc::MS_BIND, "")?;
        flags.into_iter().try_for_each(|flag| mount("", &place, "", flag, ""))?;
    }
    fs::create_dir(shared.join("event")).map_err(text)?;
    let mut open = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(tmpfs.join("open"))
        .map_err(text)?;
    open.write_all(b"0123456789").map_err(text)?;
    open.seek(SeekFrom::Start(4)).map_err(text)?;
    let mut deleted = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(shared.join("deleted"))
        .map_err(text)?;
    deleted.write_all(b"a ghost").map_err(text)?;
    fs::remove_file(shared.join("deleted")).map_err(text)?;
    std::env::set_current_dir(tmpfs.join("directory")).map_err(text)?;
    let mut before = (table()?, files(&tmpfs)?, attribute(&inside, privileged)?);
    before.1.extend(files(&stacked)?);
    checkpoint.wait();
    let mut after = (table()?, files(&tmpfs)?, attribute(&inside, privileged)?);
    after.1.extend(files(&stacked)?);
    // One that another hides for good comes back empty, and as the tree's own.
    let is_hidden =
        |line: &String| !privileged && HIDDEN.iter().any(|point| line.starts_with(point));
    for (was, is) in before.0.iter().zip(&after.0).filter(|(was, _)| !is_hidden(was)) {
        same("a mount", was, is)?;
    }
    same("mounts", before.0.len(), after.0.len())?;
    for (was, is) in before.1.iter().zip(&after.1) {
        same("a file", was, is)?;
    }
    same("an attribute", before.2, after.2)?;
    let mut rest = String::new();
    open.read_to_string(&mut rest).map_err(text)?;
    same("the rest of an open file", "456789", rest.as_str())?;
    let mut ghost = String::new();
    deleted.seek(SeekFrom::Start(0)).map_err(text)?;
    deleted.read_to_string(&mut ghost).map_err(text)?;
    same("a deleted file", "a ghost", ghost.as_str())?;
    let here = fs::read_to_string("file").map_err(text)?;
    same("a file in the current directory", "the contents of a file", here.as_str())?;
    if privileged {
        let flags = fs::metadata(tmpfs.join("null")).map_err(text)?.file_type();
        ensure!(flags.is_char_device(), "not a device");
    }
    // Events reach the same mounts as before.
    mount("e", &shared.join("event"), "tmpfs", 0, "size=4k")?;
    let shown = table()?.iter().filter(|line| line.contains("/event ")).count();
    same("mounts of an event", 4, shown)?;
    // Of stacked mounts, the lower one shows when the upper one goes.
    let stacked_c = c(&stacked);
    sys!(umount2(stacked_c.as_ptr(), 0))?;
    let hidden = fs::read_to_string(stacked.join("hidden")).map_err(text)?;
    same("a hidden file", "below", hidden.as_str())
}

/// Sockets whose names lead by absolute links to files of the namespace, as `/var/run` does. Outside,
/// the same links lead to other files.
fn mount_namespace_sockets(checkpoint: &Checkpoint) -> Verdict {
    enter()?;
    let (run, link) = (checkpoint.path("run"), checkpoint.path("link"));
    fs::create_dir(&run).map_err(text)?;
    mount("run", &run, "tmpfs", 0, "size=64k")?;
    symlink(&run, &link).map_err(text)?;
    std::env::set_current_dir(link.parent().expect("a directory above")).map_err(text)?;
    let relative = Path::new(link.file_name().expect("a name")).join("relative");
    let names = [link.join("absolute"), relative];
    let mut open = Vec::new();
    for name in &names {
        let listener = UnixListener::bind(name).map_err(text)?;
        let client = UnixStream::connect(name).map_err(text)?;
        open.push((listener.accept().map_err(text)?, client, listener));
    }
    // The files are new after a restore, so their times are, too.
    let file = |name: &PathBuf| -> Result<_, String> {
        let found = fs::metadata(name).map_err(text)?;
        Ok((found.mode(), found.uid(), found.gid()))
    };
    let before = names.iter().map(file).collect::<Result<Vec<_>, _>>()?;
    checkpoint.wait();
    same("files of sockets", before, names.iter().map(file).collect::<Result<Vec<_>, _>>()?)?;
    for (name, ((mut server, _), mut client, listener)) in names.iter().zip(open) {
        let address = listener.local_addr().map_err(text)?;
        same("the name of a socket", Some(name.as_path()), address.as_pathname())?;
        client.write_all(b"on the old connection").map_err(text)?;
        drop(client);
        let mut heard = String::new();
        server.read_to_string(&mut heard).map_err(text)?;
        same("what a client says", "on the old connection", heard.as_str())?;
        let mut client = UnixStream::connect(name).map_err(text)?;
        client.write_all(b"on a new one").map_err(text)?;
        drop(client);
        heard.clear();
        listener.accept().map_err(text)?.0.read_to_string(&mut heard).map_err(text)?;
        same("what a new client says", "on a new one", heard.as_str())?;
    }
    Ok(())
}

/// A file of a process, which has read a part of it.
struct Opened {
    file: File,
    path: PathBuf,
    content: &'static str,
}

impl Opened {
    /// Creates a file and opens it.
    fn create(path: PathBuf, content: &'static str) -> Result<Self, String> {
        fs::write(&path, content).map_err(text)?;
        let mut file = File::open(&path).map_err(text)?;
        file.seek(SeekFrom::Start(4)).map_err(text)?;
        Ok(Self { file, path, content })
    }

    /// Reads the rest by the descriptor, and all by the path.
    fn check(mut self) -> Verdict {
        let mut rest = String::new();
        self.file.read_to_string(&mut rest).map_err(text)?;
        same("the rest of an open file", &self.content[4..], rest.as_str())?;
        let all = fs::read_to_string(&self.path).map_err(text)?;
        same("a file by its path", self.content, all.as_str())?;
        let inode = |stat: &fs::Metadata| (stat.dev(), stat.ino());
        let (opened, named) = (self.file.metadata(), fs::metadata(&self.path));
        let (opened, named) = (opened.map_err(text)?, named.map_err(text)?);
        same("the file at the path", inode(&opened), inode(&named))
    }
}

/// A tree in the mount namespace of the machine, of which a part has a directory of its own in place of
/// one that the others see, as services with `PrivateTmp` have.
fn of_a_child(checkpoint: &Checkpoint) -> Verdict {
    let dir = checkpoint.path("directory");
    fs::create_dir(&dir).map_err(text)?;
    let outside = Opened::create(dir.join("file"), "outside of the namespace")?;
    let child = checkpoint.fork(|child| {
        enter()?;
        mount("t", &dir, "tmpfs", 0, "size=64k")?;
        mount("proc", Path::new("/proc"), "proc", libc::MS_NOEXEC, "")?;
        let inside = Opened::create(dir.join("file"), "inside of the namespace")?;
        std::env::set_current_dir(&dir).map_err(text)?;
        let before = table()?;
        let grandchild = child.fork(|grandchild| {
            grandchild.wait();
            same(
                "the file in a grandchild",
                inside.content,
                fs::read_to_string("file").map_err(text)?.as_str(),
            )
        })?;
        child.wait();
        let after = table()?;
        for (was, is) in before.iter().zip(&after) {
            same("a mount", was, is)?;
        }
        same("mounts", before.len(), after.len())?;
        grandchild.join()?;
        inside.check()
    })?;
    checkpoint.wait();
    let point = dir.display().to_string();
    ensure!(
        !table()?.iter().any(|line| line.contains(&point)),
        "the child's mount is the machine's"
    );
    child.join()?;
    outside.check()
}

/// Says that the mounts below a common directory are as before, and waits until an event has come there.
fn await_event(common: &Path, name: &str) -> Verdict {
    fs::write(common.join(name), "").map_err(text)?;
    wait_until("the event", || common.join("sent").exists())?;
    let shown = fs::read_to_string(common.join("event/inside")).map_err(text)?;
    same("a file of a mount that came as an event", "news", shown.as_str())
}

/// A tree with three mount namespaces: those of its children begin as copies of that of its root, share
/// file systems and events with it, and differ.
fn mount_namespaces(checkpoint: &Checkpoint) -> Verdict {
    enter()?;
    let top = checkpoint.path("mounts");
    let at = |name: &str| -> Result<PathBuf, String> {
        let path = top.join(name);
        fs::create_dir_all(&path).map_err(text)?;
        Ok(path)
    };
    let common = at("common")?;
    mount("common", &common, "tmpfs", 0, "size=1m,mode=751")?;
    fs::create_dir(common.join("point")).map_err(text)?;
    fs::create_dir(common.join("event")).map_err(text)?;
    mount("", &common, "", libc::MS_SHARED, "")?;
    let place = at("place")?;
    let roots = Opened::create(common.join("of the root"), "a file that all see")?;
    let home = File::open("/proc/self/ns/mnt").map_err(text)?;
    let before = table()?;
    let first = checkpoint.fork(|child| {
        // Its mounts are peers of those of the root, but it sends nothing to them.
        sys!(unshare(libc::CLONE_NEWNS))?;
        mount("", &common, "", libc::MS_SLAVE, "")?;
        mount("own", &place, "tmpfs", 0, "size=64k")?;
        mount("over", &common.join("point"), "tmpfs", 0, "size=64k")?;
        let own = Opened::create(place.join("file"), "a file of the first child")?;
        let over = Opened::create(common.join("point/file"), "a file over a common directory")?;
        let shared = Opened::create(common.join("of the child"), "a file made by the child")?;
        std::env::set_current_dir(&place).map_err(text)?;
        let back = child.fork(|back| {
            // In the namespace of the root again.
            sys!(setns(home.as_raw_fd(), libc::CLONE_NEWNS))?;
            let before = table()?;
            back.wait();
            same("mounts of the one that is back", before, table()?)?;
            ensure!(!place.join("file").exists(), "it sees a file of the first child");
            Ok(())
        })?;
        let before = table()?;
        child.wait();
        same("mounts of the first child", before, table()?)?;
        back.join()?;
        await_event(&common, "first")?;
        own.check()?;
        over.check()?;
        shared.check()?;
        ensure!(fs::exists("file").map_err(text)?, "the current directory is another one");
        Ok(())
    })?;
    let second = checkpoint.fork(|child| {
        sys!(unshare(libc::CLONE_NEWNS))?;
        // A root of its own, of which the tree of the others is not a part.
        let root = place.join("");
        mount("root", &root, "tmpfs", 0, "size=64k")?;
        for dir in ["old", "proc", "bound"] {
            fs::create_dir(root.join(dir)).map_err(text)?;
        }
        mount("proc", &root.join("proc"), "proc", 0, "")?;
        // Where it looks for the end of the checkpoint.
        let dir = top.parent().expect("a directory");
        let seen = root.join(dir.strip_prefix("/").map_err(|error| error.to_string())?);
        fs::create_dir_all(&seen).map_err(text)?;
        mount(&dir.display().to_string(), &seen, "", libc::MS_BIND, "")?;
        mount(&common.display().to_string(), &root.join("bound"), "", libc::MS_BIND, "")?;
        std::env::set_current_dir(&root).map_err(text)?;
        // SAFETY: both strings outlive the call.
        let moved = unsafe { libc::syscall(libc::SYS_pivot_root, c".".as_ptr(), c"old".as_ptr()) };
        ensure!(moved == 0, "pivot_root: {}", std::io::Error::last_os_error());
        std::env::set_current_dir("/").map_err(text)?;
        sys!(umount2(c"/old".as_ptr(), libc::MNT_DETACH))?;
        let own = Opened::create("/file".into(), "a file of the second child")?;
        let shared = Opened::create("/bound/of the second".into(), "seen from below another root")?;
        let before = table()?;
        child.wait();
        same("mounts of the second child", before, table()?)?;
        await_event(Path::new("/bound"), "second")?;
        own.check()?;
        shared.check()
    })?;
    checkpoint.wait();
    same("mounts of the root", before, table()?)?;
    for name in ["of the child", "of the second"] {
        ensure!(common.join(name).exists(), "no file {name}");
    }
    roots.check()?;
    wait_until("the children", || {
        ["first", "second"].iter().all(|name| common.join(name).exists())
    })?;
    let event = common.join("event");
    mount("event", &event, "tmpfs", 0, "size=64k")?;
    fs::write(event.join("inside"), "news").map_err(text)?;
    fs::write(common.join("sent"), "").map_err(text)?;
    first.join()?;
    second.join()
}

/// A tree of which a part has a root that is a directory of a file system which is mounted nowhere else,
/// as bubblewrap makes it.
fn below_its_root(checkpoint: &Checkpoint) -> Verdict {
    let top = checkpoint.path("mounts");
    fs::create_dir(&top).map_err(text)?;
    let child = checkpoint.fork(|child| {
        enter()?;
        mount("t", &top, "tmpfs", libc::MS_NOSUID, "size=64k")?;
        let new = top.join("new");
        let dir = top.parent().expect("a directory");
        let seen = new.join(dir.strip_prefix("/").map_err(|error| error.to_string())?);
        for path in
            [&new.join("old"), &new.join("proc"), &new.join("bound"), &new.join("a/b"), &seen]
        {
            fs::create_dir_all(path).map_err(text)?;
        }
        mount(&new.display().to_string(), &new, "", libc::MS_BIND, "")?;
        mount("proc", &new.join("proc"), "proc", 0, "")?;
        mount(&dir.display().to_string(), &seen, "", libc::MS_BIND, "")?;
        mount(&new.join("a/b").display().to_string(), &new.join("bound"), "", libc::MS_BIND, "")?;
        std::env::set_current_dir(&new).map_err(text)?;
        // SAFETY: both strings outlive the call.
        let moved = unsafe { libc::syscall(libc::SYS_pivot_root, c".".as_ptr(), c"old".as_ptr()) };
        ensure!(moved == 0, "pivot_root: {}", std::io::Error::last_os_error());
        std::env::set_current_dir("/").map_err(text)?;
        sys!(umount2(c"/old".as_ptr(), libc::MNT_DETACH))?;
        let file = Opened::create("/a/b/file".into(), "a file below the root")?;
        let points = || {
            Ok::<_, String>(
                table()?
                    .iter()
                    .filter_map(|line| line.split(' ').nth(1).map(str::to_owned))
                    .collect::<Vec<_>>(),
            )
        };
        let before = points()?;
        child.wait();
        same("mount points", before, points()?)?;
        let bound = fs::read_to_string("/bound/file").map_err(text)?;
        same("a file of a mount of the root", "a file below the root", bound.as_str())?;
        file.check()
    })?;
    checkpoint.wait();
    ensure!(fs::read_dir(&top).map_err(text)?.next().is_none(), "it sees the root of the child");
    child.join()
}

fn bind(from: &Path, to: &Path) -> Verdict {
    mount(&from.display().to_string(), to, "", libc::MS_BIND, "")
}

/// Mounts of files that are deleted, as systemd-nspawn makes them over files of `/proc`: a file that two
/// mounts show, a FIFO and a directory.
fn mount_namespace_deleted(checkpoint: &Checkpoint) -> Verdict {
    enter()?;
    let top = checkpoint.path("mounts");
    let from = top.join("from");
    fs::create_dir_all(&from).map_err(text)?;
    mount("from", &from, "tmpfs", 0, "size=1m")?;
    fs::write(from.join("file"), "of a deleted file").map_err(text)?;
    let fifo = c(&from.join("fifo"));
    sys!(mkfifo(fifo.as_ptr(), 0o640))?;
    fs::create_dir_all(from.join("above/directory")).map_err(text)?;
    let points = ["file", "again", "fifo", "directory"].map(|name| top.join(name));
    let [file, again, fifo, directory] = &points;
    for point in [file, again, fifo] {
        fs::write(point, "").map_err(text)?;
    }
    fs::create_dir(directory).map_err(text)?;
    for (name, point) in
        [("file", file), ("file", again), ("fifo", fifo), ("above/directory", directory)]
    {
        bind(&from.join(name), point)?;
    }
    mount("", again, "", libc::MS_BIND | libc::MS_REMOUNT | libc::MS_RDONLY, "")?;
    for name in ["file", "fifo"] {
        fs::remove_file(from.join(name)).map_err(text)?;
    }
    fs::remove_dir(from.join("above/directory")).map_err(text)?;
    let mut open = File::open(file).map_err(text)?;
    let seen = || -> Result<_, String> {
        let mut all = files(&from)?;
        for point in &points {
            let found = fs::metadata(point).map_err(text)?;
            let (kind, owner) = (found.mode(), (found.uid(), found.gid()));
            all.push(format!("{kind:o} {owner:?} {} {}", found.mtime(), found.mtime_nsec()));
        }
        all.extend(table()?);
        Ok(all)
    };
    let before = seen()?;
    checkpoint.wait();
    same("files and mounts", before, seen()?)?;
    let mut content = String::new();
    open.read_to_string(&mut content).map_err(text)?;
    same("an open file", "of a deleted file", content.as_str())?;
    // Both mounts and the descriptor show the same file.
    fs::write(file, "written").map_err(text)?;
    same("the other mount", "written", fs::read_to_string(again).map_err(text)?.as_str())?;
    open.seek(SeekFrom::Start(0)).map_err(text)?;
    content.clear();
    open.read_to_string(&mut content).map_err(text)?;
    same("the open file", "written", content.as_str())
}

/// A tmpfs on a mount that another one hides, and mounts of a group none of which shows what the others
/// show, as systemd-nspawn makes them for `/sys`.
fn mount_namespace_hidden(checkpoint: &Checkpoint) -> Verdict {
    enter()?;
    let top = checkpoint.path("top");
    let inner = top.join("inner");
    fs::create_dir(&top).map_err(text)?;
    mount("lower", &top, "tmpfs", 0, "size=1m")?;
    fs::create_dir(&inner).map_err(text)?;
    mount("inner", &inner, "tmpfs", 0, "size=1m")?;
    fs::write(inner.join("file"), "hidden").map_err(text)?;
    mount("upper", &top, "tmpfs", 0, "size=1m")?;
    fs::create_dir(&inner).map_err(text)?;
    let whole = checkpoint.path("whole");
    fs::create_dir(&whole).map_err(text)?;
    mount("whole", &whole, "tmpfs", 0, "size=1m")?;
    mount("", &whole, "", libc::MS_SHARED, "")?;
    for name in ["one", "two"] {
        let (part, point) = (whole.join(name), checkpoint.path(name));
        fs::create_dir(&part).map_err(text)?;
        fs::create_dir(&point).map_err(text)?;
        bind(&part, &point)?;
    }
    // A slave of that group.
    let slave = checkpoint.path("slave");
    fs::create_dir(&slave).map_err(text)?;
    bind(&whole.join("two"), &slave)?;
    mount("", &slave, "", libc::MS_SLAVE, "")?;
    mount("", &whole, "", libc::MS_PRIVATE, "")?;
    let before = table()?;
    checkpoint.wait();
    same("mounts", before, table()?)?;
    let two = checkpoint.path("two").join("event");
    fs::create_dir(&two).map_err(text)?;
    mount("event", &two, "tmpfs", 0, "size=4k")?;
    let shown = table()?.iter().filter(|line| line.contains("/event ")).count();
    same("mounts of an event", 2, shown)?;
    let top_c = c(&top);
    sys!(umount2(top_c.as_ptr(), 0))?;
    let hidden = fs::read_to_string(inner.join("file")).map_err(text)?;
    same("a hidden file", "hidden", hidden.as_str())
}

/// Refused: the kernel does not tell how the mount maps ids.
fn id_mapped_mount(checkpoint: &Checkpoint) -> Verdict {
    const OPEN_TREE_CLONE: libc::c_long = 1;
    const MOUNT_ATTR_IDMAP: u64 = 0x10_0000;
    const MOVE_MOUNT_F_EMPTY_PATH: libc::c_long = 4;
    enter()?;
    // SAFETY: this process has one thread.
    let child = sys!(fork())?;
    if child == 0 {
        let entered = sys!(unshare(libc::CLONE_NEWUSER)).and_then(|_| sys!(raise(libc::SIGSTOP)));
        // SAFETY: it only ends.
        unsafe { libc::_exit(i32::from(entered.is_err())) };
    }
    let mut status = 0;
    sys!(waitpid(child, &raw mut status, libc::WUNTRACED))?;
    for map in ["uid_map", "gid_map"] {
        fs::write(format!("/proc/{child}/{map}"), "0 1000 10").map_err(text)?;
    }
    let users = File::open(format!("/proc/{child}/ns/user")).map_err(text)?;
    sys!(kill(child, libc::SIGKILL))?;
    sys!(waitpid(child, &raw mut status, 0))?;
    let point = checkpoint.path("mapped");
    fs::create_dir(&point).map_err(text)?;
    let (path, here) = (c(&point), libc::c_long::from(libc::AT_FDCWD));
    let tree = sys!(syscall(libc::SYS_open_tree, here, path.as_ptr(), OPEN_TREE_CLONE))?;
    let users = u64::try_from(users.as_raw_fd()).expect("a descriptor");
    let attributes = [MOUNT_ATTR_IDMAP, 0, 0, users];
    let empty = c"".as_ptr();
    sys!(syscall(
        libc::SYS_mount_setattr,
        tree,
        empty,
        libc::AT_EMPTY_PATH,
        attributes.as_ptr(),
        size_of_val(&attributes)
    ))?;
    let flags = MOVE_MOUNT_F_EMPTY_PATH;
    sys!(syscall(libc::SYS_move_mount, tree, empty, here, path.as_ptr(), flags))?;
    sys!(close(i32::try_from(tree).expect("a descriptor")))?;
    checkpoint.wait();
    Ok(())
}
