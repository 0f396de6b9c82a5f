use std::{
    ffi::OsStr,
    fs::{self, File},
    io::{Read, Seek, SeekFrom, Write},
    os::{
        fd::AsRawFd,
        unix::{
            ffi::OsStrExt,
            fs::{FileExt, MetadataExt, PermissionsExt, symlink},
        },
    },
    path::{Path, PathBuf},
};

use nix::sys::stat::Mode;

use super::*;
use crate::{
    image::Directory,
    res::file::{
        GhostOptions, Inherited, RestoreOptions, ghost,
        testing::{Tree, stat},
    },
    units::{NsPid, PidMap},
};

fn bytes(path: &Path) -> &[u8] {
    path.as_os_str().as_bytes()
}

fn open(path: &Path, flags: i32) -> OwnedFd {
    descriptor::open(&crate::sys::root::Root::own(), bytes(path), flags.cast_unsigned()).unwrap()
}

fn count(dir: &Path) -> usize {
    fs::read_dir(dir).unwrap().count()
}

#[test]
fn files_are_opened_again_where_they_were() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(OsStr::from_bytes(b"a \xff (deleted)"));
    fs::write(&path, b"0123456789").unwrap();
    let link = dir.path().join("link");
    symlink("nowhere", &link).unwrap();
    let mut tree = Tree::new();
    let file = open(&path, libc::O_RDWR | libc::O_APPEND | libc::O_NONBLOCK | libc::O_NOFOLLOW);
    File::from(file.try_clone().unwrap()).seek(SeekFrom::Start(1 << 33)).unwrap();
    tree.add(1, file);
    tree.add(2, open(dir.path(), libc::O_DIRECTORY));
    tree.add(3, open(&link, libc::O_PATH | libc::O_NOFOLLOW));
    tree.add(4, open(&path, libc::O_PATH));
    for (id, device) in (5..).zip(["/dev/null", "/dev/zero", "/dev/full", "/dev/urandom"]) {
        tree.add(id, open(Path::new(device), libc::O_RDWR));
    }
    tree.add(9, open(&path, libc::O_WRONLY | libc::O_SYNC));
    tree.add(10, open(Path::new("/proc/self/status"), 0));
    let restored = tree.restore();
    for id in 1..=10 {
        let before = restored.before(id);
        assert_eq!(restored.flags(id), before.flags, "{id}");
        assert_eq!(restored.link(id), before.link);
        assert_eq!(restored.info(id).pos, before.info.pos);
        assert_eq!(stat(&restored.get(id)).st_ino, before.stat.st_ino);
    }
    assert!(restored.opened().deferred.is_empty());
}

#[test]
fn a_deleted_file_comes_back_with_its_bytes_and_holes() {
    let dir = tempfile::tempdir().unwrap();
    let gone = dir.path().join("gone");
    fs::create_dir(&gone).unwrap();
    let (sparse, small) = (gone.join("sparse"), gone.join("small"));
    fs::write(&sparse, b"").unwrap();
    fs::set_permissions(&sparse, PermissionsExt::from_mode(0o4751)).unwrap();
    let mut tree = Tree::new();
    let file = open(&sparse, libc::O_RDWR | libc::O_NOFOLLOW);
    let file = File::from(file);
    file.write_all_at(b"data", 1 << 20).unwrap();
    file.set_len(8 << 20).unwrap();
    let other_name = gone.join("other");
    fs::hard_link(&sparse, &other_name).unwrap();
    tree.add(1, file.into());
    tree.add(2, open(&other_name, libc::O_RDONLY));
    fs::write(&small, b"small").unwrap();
    tree.add(3, open(&small, libc::O_WRONLY));
    tree.add(4, open(&gone, libc::O_DIRECTORY));
    fs::remove_dir_all(&gone).unwrap();
    let restored = tree.restore();
    for id in 1..=4 {
        let (before, now) = (restored.before(id), stat(&restored.get(id)));
        assert_eq!(restored.flags(id), before.flags, "{id}");
        assert_eq!(restored.link(id), before.link);
        assert_eq!(now.st_nlink, 0);
        if id != 4 {
            assert_eq!((now.st_mode, now.st_size), (before.stat.st_mode, before.stat.st_size));
            assert_eq!(now.st_mtime, before.stat.st_mtime);
        }
    }
    assert_eq!(stat(&restored.get(1)).st_ino, stat(&restored.get(2)).st_ino);
    assert!(stat(&restored.get(1)).st_blocks < 1000);
    let mut read = [0; 6];
    File::from(restored.take(2)).read_exact_at(&mut read, (1 << 20) - 1).unwrap();
    assert_eq!(&read, b"\0data\0");
    assert_eq!(count(dir.path()), 0);

    // A mapping of the file shows the same inode.
    let entry = restored.entry(3).reg.clone().unwrap();
    let inode = stat(&restored.get(3)).st_ino;
    let mut opened = restored.into_opened();
    let mapped = path::open_entry(&entry, libc::O_RDWR, &mut opened).unwrap();
    assert_eq!(stat(&mapped.as_fd()).st_ino, inode);
    let mut text = String::new();
    File::from(mapped).read_to_string(&mut text).unwrap();
    assert_eq!(text, "small");
}

#[test]
fn what_is_there_instead_of_a_file_is_not_opened() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    for (mode, was) in [(Some(libc::S_IFREG | 0o600), "a regular file"), (None, "a regular file")] {
        let _ = fs::remove_file(&path);
        nix::unistd::mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR).unwrap();
        let entry =
            proto::RegFileEntry { id: 7, name: bytes(&path).to_vec(), mode, ..Default::default() };
        let mut opened = Opened::new(
            &Directory::at(dir.path()).shared(),
            &RestoreOptions::default(),
            Vec::new(),
            PidMap::of_own_namespace(),
        );
        let problem =
            path::open_entry(&entry, libc::O_RDONLY, &mut opened).unwrap_err().to_string();
        let expected = format!("{} is a FIFO, but was {was}", path.display());
        assert!(problem.contains(&expected), "{problem}");
    }
}

#[test]
fn a_deleted_file_may_be_too_large() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("large");
    fs::write(&path, vec![1; 1 << 16]).unwrap();
    let mut tree = Tree::new();
    tree.options.ghosts = GhostOptions::new(false, 1 << 15);
    tree.add(1, open(&path, 0));
    fs::remove_file(&path).unwrap();
    let error = tree.collect_error().to_string();
    assert!(error.contains("--ghost-limit") && error.contains("large"), "{error}");
}

#[test]
fn a_file_with_another_name_is_linked_and_the_link_removed() {
    let dir = tempfile::tempdir().unwrap();
    let (path, other) = (dir.path().join("name"), dir.path().join("elsewhere"));
    let make = |allowed| {
        fs::write(&path, b"bytes").unwrap();
        let _ = fs::remove_file(&other);
        fs::hard_link(&path, &other).unwrap();
        let mut tree = Tree::new();
        tree.options.ghosts = GhostOptions::new(allowed, 1 << 20);
        tree.add(1, open(&path, libc::O_RDWR));
        fs::remove_file(&path).unwrap();
        tree
    };
    let error = make(false).collect_error().to_string();
    assert!(error.contains("--link-remap"), "{error}");

    for replaced in [false, true] {
        let tree = make(true);
        if replaced {
            fs::write(&path, b"another").unwrap();
        }
        let restored = tree.restore();
        let inode = fs::metadata(&other).unwrap().ino();
        assert_eq!(stat(&restored.get(1)).st_ino, inode);
        assert_eq!(restored.flags(1), restored.before(1).flags);
        if !replaced {
            assert_eq!(restored.link(1), restored.before(1).link);
        }
        let mut opened = restored.into_opened();
        assert_eq!(count(dir.path()), 2 + usize::from(replaced));
        ghost::remove_link_remaps(&mut opened).unwrap();
        assert_eq!(count(dir.path()), 1 + usize::from(replaced));
        let _ = fs::remove_file(&path);
    }

    // The restore removes a link remap only if a dump can have created it for this very file.
    let keepsake = dir.path().join("keepsake");
    for renamed in [true, false] {
        let restored = make(true).restore();
        let mut opened = restored.into_opened();
        let entry = opened.entries.values_mut().find(|entry| entry.id != 1).unwrap();
        let reg = entry.reg.as_mut().unwrap();
        let given = PathBuf::from(OsStr::from_bytes(&reg.name));
        if renamed {
            fs::write(&keepsake, b"precious").unwrap();
            reg.name = bytes(&keepsake).to_vec();
        } else {
            fs::remove_file(&given).unwrap();
            fs::write(&given, b"another file").unwrap();
        }
        ghost::remove_link_remaps(&mut opened).unwrap();
        assert!(given.exists() && keepsake.exists());
        fs::remove_file(&given).unwrap();
    }
    fs::remove_file(&keepsake).unwrap();

    // A dump that fails leaves no link remap.
    let tree = make(true);
    tree.collect_and_drop();
    assert_eq!(count(dir.path()), 1);
}

#[test]
fn a_file_that_has_changed_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    let change: [fn(&PathBuf); 3] = [
        |path| fs::write(path, b"longer than it was").unwrap(),
        |path| fs::set_permissions(path, PermissionsExt::from_mode(0o600)).unwrap(),
        |path| fs::remove_file(path).unwrap(),
    ];
    for change in change {
        fs::write(&path, b"bytes").unwrap();
        fs::set_permissions(&path, PermissionsExt::from_mode(0o644)).unwrap();
        let mut tree = Tree::new();
        tree.add(1, open(&path, 0));
        let dumped = tree.dump();
        change(&path);
        let error = dumped.restore_error().to_string();
        assert!(error.contains("file"), "{error}");
    }
    // A log may grow.
    fs::write(&path, b"bytes").unwrap();
    let mut tree = Tree::new();
    tree.add(1, open(&path, libc::O_WRONLY | libc::O_APPEND));
    let dumped = tree.dump();
    File::options().append(true).open(&path).unwrap().write_all(b"more").unwrap();
    dumped.restore();
}

#[test]
fn devices_are_refused_by_name() {
    if let Ok(fuse) =
        descriptor::open(&crate::sys::root::Root::own(), b"/dev/fuse", libc::O_RDWR.cast_unsigned())
    {
        let mut tree = Tree::new();
        tree.add(1, fuse);
        let error = tree.collect_error().to_string();
        assert!(error.contains("/dev/fuse"), "{error}");
    }
    let mut tree = Tree::new();
    tree.add(1, open(Path::new("/dev/kmsg"), libc::O_WRONLY));
    let error = tree.collect_error().to_string();
    assert!(error.contains("/dev/kmsg"), "{error}");
}

#[test]
fn processes_in_proc_are_opened_when_they_are_there() {
    assert_eq!(path::process_of(b"/proc/12/maps"), Some(NsPid::of_image(12)));
    assert_eq!(path::process_of(b"/proc/12"), Some(NsPid::of_image(12)));
    assert_eq!(path::process_of(b"/proc/12x"), None);
    assert_eq!(path::process_of(b"/proc/sys"), None);

    let name = b"/proc/4194304/status".to_vec();
    let reg = proto::RegFileEntry { id: 1, name, ..Default::default() };
    let entry = proto::FileEntry { id: 1, reg: Some(reg), ..Default::default() };
    let dir = tempfile::tempdir().unwrap();
    let mut opened = Opened::new(
        &Directory::at(dir.path()).shared(),
        &RestoreOptions::default(),
        vec![entry.clone()],
        PidMap::of_own_namespace(),
    );
    let mut files = RegularFiles;
    let error = files.open(std::slice::from_ref(&entry), &mut opened).unwrap_err().to_string();
    assert!(
        error.contains("process 4194304, which was not part of the tree, does not exist"),
        "{error}"
    );
    opened.processes.insert(NsPid::of_image(4_194_304));
    files.open(std::slice::from_ref(&entry), &mut opened).unwrap();
    assert!(opened.contains(1) && opened.deferred.get(&1) == Some(&Deferred::ByPath));
}

#[test]
fn inherited_files_take_the_place() {
    let dir = tempfile::tempdir().unwrap();
    let (path, given) = (dir.path().join("log"), dir.path().join("given"));
    fs::write(&path, b"").unwrap();
    fs::write(&given, b"").unwrap();
    let mut tree = Tree::new();
    tree.add(1, open(&path, libc::O_WRONLY));
    let ours = open(&given, libc::O_WRONLY);
    let key = path.to_str().unwrap()[1..].to_owned();
    tree.inherited = Inherited::new(vec![(ours.as_raw_fd(), key)]);
    let restored = tree.restore();
    assert_eq!(stat(&restored.get(1)).st_ino, stat(&ours.as_fd()).st_ino);
}
