//! Mount namespaces.

use std::{
    collections::HashMap,
    ffi::CString,
    fs::{self, File},
    io::{Read, Seek, SeekFrom, Write},
    os::unix::{
        ffi::OsStrExt,
        fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink},
        net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
};

use crate::{
    Row,
    kit::{Checkpoint, Verdict, same},
};

pub const ROWS: &[Row] =
    &[("mount_namespace", mount_namespace), ("mount_namespace_sockets", mount_namespace_sockets)];

fn c(path: &Path) -> CString {
    CString::new(path.as_os_str().as_bytes()).expect("no NUL")
}

/// Calls `mount(2)`.
fn mount(source: &str, target: &Path, name: &str, flags: u64, options: &str) -> Verdict {
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

/// Moves into a mount namespace whose changes reach no other.
fn enter() -> Verdict {
    sys!(unshare(libc::CLONE_NEWNS))?;
    mount("none", Path::new("/"), "", libc::MS_PRIVATE | libc::MS_REC, "")
}

fn text(error: std::io::Error) -> String {
    error.to_string()
}

/// The table of mounts, without numbers that are new after each restore; groups are numbered in the
/// order of the table.
fn table() -> Result<Vec<String>, String> {
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

/// Puts files of all types into a directory.
fn populate(top: &Path) -> Verdict {
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
    sys!(mknod(device.as_ptr(), libc::S_IFCHR | 0o666, libc::makedev(1, 3)))?;
    let (file, name) = (c(&dir), c"trusted.of.the.test");
    let value = b"an attribute";
    sys!(setxattr(file.as_ptr(), name.as_ptr(), value.as_ptr().cast(), value.len(), 0))?;
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o1750)).map_err(text)
}

fn attribute(path: &Path) -> Result<Vec<u8>, String> {
    let (file, mut value) = (c(path), vec![0; 64]);
    let name = c"trusted.of.the.test";
    let len = sys!(getxattr(file.as_ptr(), name.as_ptr(), value.as_mut_ptr().cast(), value.len()))?;
    value.truncate(usize::try_from(len).expect("not negative"));
    Ok(value)
}

/// A tree that has changed its mounts: new file systems with files, stacked ones, mounts of single
/// directories and files, with flags of their own, and with all relations.
fn mount_namespace(checkpoint: &Checkpoint) -> Verdict {
    enter()?;
    let top = checkpoint.path("mounts");
    let at = |name: &str| -> Result<PathBuf, String> {
        let path = top.join(name);
        fs::create_dir_all(&path).map_err(text)?;
        Ok(path)
    };
    let tmpfs = at("tmpfs")?;
    mount("a source", &tmpfs, "tmpfs", libc::MS_NOSUID | libc::MS_NODEV, "size=4m,mode=751")?;
    populate(&tmpfs)?;
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
    mount("", &bound, "", libc::MS_BIND | libc::MS_REMOUNT | libc::MS_RDONLY, "")?;
    let file = top.join("file");
    fs::write(&file, "").map_err(text)?;
    mount(&tmpfs.join("another name").display().to_string(), &file, "", libc::MS_BIND, "")?;
    mount("proc", &at("proc")?, "proc", libc::MS_NOEXEC, "")?;
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
    let mut before = (table()?, files(&tmpfs)?, attribute(&inside)?);
    before.1.extend(files(&stacked)?);
    checkpoint.wait();
    let mut after = (table()?, files(&tmpfs)?, attribute(&inside)?);
    after.1.extend(files(&stacked)?);
    for (was, is) in before.0.iter().zip(&after.0) {
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
    let flags = fs::metadata(tmpfs.join("null")).map_err(text)?.file_type();
    ensure!(flags.is_char_device(), "not a device");
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
