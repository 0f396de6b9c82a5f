use std::{
    error::Error,
    fs,
    os::unix::fs::PermissionsExt,
    time::{Duration, UNIX_EPOCH},
};

use flate2::{Compression, write::GzEncoder};
use tar::{Builder, EntryType, Header};

use super::*;
use crate::{
    chain::{Chain, read_at, testing::TestChain},
    image::store::{Cache, Opening},
    view::{Attr, NodeType, View, testing::image},
};

type Tar = Builder<GzEncoder<Vec<u8>>>;

/// Adds a member as GNU tar names those of `.`.
fn add(tar: &mut Tar, kind: EntryType, name: &[u8], link: &[u8], bytes: &[u8]) {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_size(bytes.len() as u64);
    header.set_mode(0o600);
    header.as_old_mut().name[..name.len()].copy_from_slice(name);
    header.as_old_mut().linkname[..link.len()].copy_from_slice(link);
    header.set_cksum();
    tar.append(&header, bytes).unwrap();
}

/// Adds a character device.
fn add_device(tar: &mut Tar, name: &[u8], major: u32, minor: u32) {
    let mut header = Header::new_gnu();
    header.set_entry_type(EntryType::Char);
    header.set_size(0);
    header.as_old_mut().name[..name.len()].copy_from_slice(name);
    header.set_device_major(major).unwrap();
    header.set_device_minor(minor).unwrap();
    header.set_cksum();
    tar.append(&header, &[][..]).unwrap();
}

/// Adds a member with an owner, a mode and times, after records of pax.
fn add_described(tar: &mut Tar, kind: EntryType, name: &str, records: &[(&str, &[u8])]) {
    tar.append_pax_extensions(records.iter().copied()).unwrap();
    let mut header = Header::new_ustar();
    header.set_entry_type(kind);
    header.set_size(0);
    header.set_mode(0o7751);
    header.set_uid(1000);
    header.set_gid(100);
    header.set_mtime(7);
    header.set_path(name).unwrap();
    header.set_cksum();
    tar.append(&header, &[][..]).unwrap();
}

fn packed(members: impl FnOnce(&mut Tar)) -> Vec<u8> {
    let mut tar = Builder::new(GzEncoder::new(Vec::new(), Compression::fast()));
    members(&mut tar);
    tar.into_inner().unwrap().finish().unwrap()
}

fn mount(root_dev: u32, mnt_id: u32, root: &str, mountpoint: &str) -> proto::MntEntry {
    proto::MntEntry {
        fstype: 5,
        mnt_id,
        root_dev,
        root: root.into(),
        mountpoint: mountpoint.into(),
        ..Default::default()
    }
}

struct Scene {
    view: View,
    _disk: TestChain,
    cache: tempfile::TempDir,
}

impl Scene {
    /// Opens a snapshot with these mounts and images of tmpfs.
    fn new(mounts: &[proto::MntEntry], images: &[(&str, Vec<u8>)]) -> Self {
        Self::limited(mounts, images, Cache::default().limit)
    }

    /// Opens it with a cache that other users can get into, which is not used.
    fn without_cache(mounts: &[proto::MntEntry], images: &[(&str, Vec<u8>)]) -> Self {
        let scene = Self::new(mounts, images);
        let dir = scene.cache.path().join("cache");
        fs::create_dir(&dir).unwrap();
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o755)).unwrap();
        scene
    }

    fn limited(mounts: &[proto::MntEntry], images: &[(&str, Vec<u8>)], limit: u64) -> Self {
        let mut disk = TestChain::new();
        disk.push(&[]);
        let dir = disk.dir(1);
        image(&dir, Kind::Mnts, 10, mounts);
        images.iter().for_each(|(name, bytes)| fs::write(dir.join(name), bytes).unwrap());
        let cache = tempfile::tempdir().unwrap();
        let directory = Some(cache.path().join("cache"));
        let opening = Opening { cache: Cache { directory, limit }, ..Opening::default() };
        let chain = Arc::new(Chain::open_anywhere(&dir, &opening).unwrap());
        let tip = chain.choose(None).unwrap();
        Self { view: View::new(chain, tip), _disk: disk, cache }
    }

    fn names(&self, path: &str) -> Vec<String> {
        let dir = self.view.find(path).unwrap_or_else(|error| panic!("{path}: {error}"));
        self.view.entries(dir.ino).unwrap().1.into_iter().map(|entry| entry.name).collect()
    }

    fn attr(&self, path: &str) -> Attr {
        self.view.find(path).unwrap_or_else(|error| panic!("{path}: {error}"))
    }

    fn read(&self, path: &str) -> Vec<u8> {
        let found = self.view.find(path).unwrap_or_else(|error| panic!("{path}: {error}"));
        let content = self.view.open(found.ino).unwrap().content;
        let mut bytes = vec![0; usize::try_from(found.size).unwrap()];
        read_at(&*content, 0, &mut bytes).unwrap();
        bytes
    }

    fn link(&self, path: &str) -> String {
        let found = self.view.find(path).unwrap();
        assert_eq!(found.kind, NodeType::Link, "{path}");
        String::from_utf8(self.view.link(found.ino).unwrap()).unwrap()
    }

    fn problem(&self, path: &str) -> String {
        let failure = self.view.find(path).unwrap_err();
        let mut text = failure.to_string();
        let mut cause = failure.source();
        while let Some(error) = cause {
            text = format!("{text}: {error}");
            cause = error.source();
        }
        text
    }
}

#[test]
fn a_tmpfs_is_shown_as_it_was() {
    let files = packed(|tar| {
        add(tar, EntryType::Directory, b"./", b"", b"");
        add(tar, EntryType::Directory, b"./empty/", b"", b"");
        add(tar, EntryType::Regular, b"./dir/file", b"", b"hello");
        add(tar, EntryType::Link, b"./hard", b"./dir/file", b"");
        add(tar, EntryType::Symlink, b"./abs", b"/etc/passwd", b"");
        add(tar, EntryType::Symlink, b"./up", b"../../x", b"");
        add_device(tar, b"./null", 1, 0x12345);
        add(tar, EntryType::Fifo, b"./fifo", b"", b"");
        add(tar, EntryType::Link, b"./fifo2", b"./fifo", b"");
        add(tar, EntryType::Regular, b"./\xffbad", b"", b"odd");
        add(tar, EntryType::Directory, b"./shm/", b"", b"");
        add(tar, EntryType::Regular, b"./shm/below", b"", b"a mount hides it");
    });
    let shm = packed(|tar| add(tar, EntryType::Regular, b"./seg", b"", b"shared"));
    // A bind mount of a directory does not say where the file system is.
    let mounts =
        [mount(40, 1, "/dir", "/a"), mount(40, 2, "/", "./run/t"), mount(41, 3, "/", "/run/t/shm")];
    let images = [("tmpfs-dev-40.tar.gz.img", files), ("tmpfs-3.tar.gz.img", shm)];
    let scene = Scene::new(&mounts, &images);
    assert_eq!(scene.names("files"), ["tmpfs"]);
    assert_eq!(scene.names("files/tmpfs"), ["run"]);
    let names = ["\\xffbad", "abs", "dir", "empty", "fifo", "fifo2", "hard", "null", "shm", "up"];
    assert_eq!(scene.names("files/tmpfs/run/t"), names);
    assert_eq!(scene.read("files/tmpfs/run/t/dir/file"), b"hello");
    assert_eq!(scene.read("files/tmpfs/run/t/hard"), b"hello");
    assert_eq!(scene.read("files/tmpfs/run/t/\\xffbad"), b"odd");
    assert!(scene.names("files/tmpfs/run/t/empty").is_empty());
    let [fifo, fifo2, null] =
        ["fifo", "fifo2", "null"].map(|name| scene.attr(&format!("files/tmpfs/run/t/{name}")));
    assert_eq!((fifo.kind, fifo.nlink, fifo.ino), (NodeType::Pipe, 2, fifo2.ino));
    // As the kernel encodes it: the lower 8 bits of the minor number, then the major number.
    assert_eq!((null.kind, null.device), (NodeType::CharDevice, 0x1230_0145));
    assert_eq!(scene.link("files/tmpfs/run/t/abs"), "/etc/passwd");
    assert_eq!(scene.link("files/tmpfs/run/t/up"), "../../x");
    assert_eq!(scene.names("files/tmpfs/run/t/shm"), ["seg"]);
    assert_eq!(scene.read("files/tmpfs/run/t/shm/seg"), b"shared");
    // The image itself is there, too.
    assert_eq!(scene.read("tmpfs-3.tar.gz.img")[..2], [0x1f, 0x8b]);
}

#[test]
fn places_that_are_unknown_or_taken_get_names_of_their_own() {
    let of = |text: &'static [u8]| packed(|tar| add(tar, EntryType::Regular, b"./file", b"", text));
    let mounts = [mount(1, 1, "/", "/"), mount(2, 2, "/", "/x"), mount(3, 3, "/", "/./x")];
    let images = [
        ("tmpfs-dev-1.tar.gz.img", of(b"root")),
        ("tmpfs-dev-2.tar.gz.img", of(b"first")),
        ("tmpfs-dev-3.tar.gz.img", of(b"other")),
        ("tmpfs-dev-4.tar.gz.img", of(b"last")),
    ];
    let scene = Scene::new(&mounts, &images);
    assert_eq!(scene.names("files/tmpfs"), ["file", "unmounted-4", "x", "x.2"]);
    assert_eq!(scene.read("files/tmpfs/file"), b"root");
    assert_eq!(scene.read("files/tmpfs/x/file"), b"first");
    assert_eq!(scene.read("files/tmpfs/x.2/file"), b"other");
    assert_eq!(scene.read("files/tmpfs/unmounted-4/file"), b"last");
}

#[test]
fn what_is_damaged_or_hostile_is_an_error_of_that_file_system_alone() {
    let good = packed(|tar| add(tar, EntryType::Regular, b"./file", b"", b"good"));
    let bad = packed(|tar| add(tar, EntryType::Regular, b"../out", b"", b"bad"));
    let cut = good[..good.len() / 2].to_vec();
    let large = packed(|tar| {
        add(tar, EntryType::Regular, b"./large", b"", &[1; 3 << 20]);
    });
    let place = |device: u32| mount(device, device, "/", &format!("/{device}"));
    let mounts: Vec<_> = (1..=4).map(place).collect();
    let name = |device: u32| Kind::TmpfsDev.file_name(device.into());
    let names = [1, 2, 3, 4].map(name);
    let images = [(&*names[0], good), (&*names[1], bad), (&*names[2], cut), (&*names[3], large)];
    let scene = Scene::limited(&mounts, &images, 1 << 20);
    assert_eq!(scene.names("files/tmpfs"), ["1", "2", "3", "4"]);
    assert_eq!(scene.read("files/tmpfs/1/file"), b"good");
    assert!(scene.problem("files/tmpfs/2").contains("its name has \"..\" in it"));
    assert!(scene.problem("files/tmpfs/3").contains("unpack the archive"));
    let large = scene.problem("files/tmpfs/4");
    assert!(
        large.contains("more than 1048576 bytes") && large.contains("--cache-limit"),
        "{large}"
    );
    assert!(large.contains("tmpfs-dev-4.tar.gz.img"), "{large}");
}

#[test]
fn files_are_unpacked_elsewhere_if_the_cache_belongs_to_others() {
    let files = packed(|tar| add(tar, EntryType::Regular, b"./file", b"", b"hello"));
    let scene = Scene::without_cache(&[mount(40, 1, "/", "/t")], &[("tmpfs-1.tar.gz.img", files)]);
    assert_eq!(scene.read("files/tmpfs/t/file"), b"hello");
    assert!(fs::read_dir(scene.cache.path().join("cache")).unwrap().next().is_none());
}

#[test]
fn files_have_their_owners_modes_times_and_attributes() {
    let files = packed(|tar| {
        let xattr: (&str, &[u8]) = ("SCHILY.xattr.user.a", b"b\nc");
        let records = [xattr, ("mtime", b"1700000000.123456789"), ("uid", b"4000000000")];
        add_described(tar, EntryType::Directory, "./", &[]);
        add_described(tar, EntryType::Regular, "./file", &records);
        add_described(
            tar,
            EntryType::Symlink,
            "./link",
            &[("linkpath", b"file"), ("mtime", b"-1")],
        );
        add_described(tar, EntryType::Regular, "./implied/file", &[("atime", b"9")]);
        // The last header of a directory counts.
        add_described(tar, EntryType::Directory, "./", &[("gid", b"5")]);
    });
    let scene = Scene::new(&[mount(40, 1, "/", "/a/t")], &[("tmpfs-dev-40.tar.gz.img", files)]);
    let at = |seconds, nanoseconds| UNIX_EPOCH + Duration::new(seconds, nanoseconds);
    let root = scene.attr("files/tmpfs/a/t");
    assert_eq!((root.mode, root.uid, root.gid, root.mtime), (0o7751, 1000, 5, at(7, 0)));
    assert_eq!(root.nlink, 3);
    let file = scene.attr("files/tmpfs/a/t/file");
    assert_eq!((file.mode, file.uid, file.gid), (0o7751, 4_000_000_000, 100));
    assert_eq!(file.mtime, at(1_700_000_000, 123_456_789));
    assert_eq!((file.atime, file.ctime, file.nlink), (file.mtime, file.mtime, 1));
    let link = scene.attr("files/tmpfs/a/t/link");
    assert_eq!((link.mode, link.uid, link.size), (0o777, 1000, 4));
    assert_eq!(link.mtime, UNIX_EPOCH - Duration::from_secs(1));
    assert_eq!(scene.attr("files/tmpfs/a/t/implied/file").atime, at(9, 0));
    let xattrs = scene.view.xattrs(file.ino).unwrap();
    assert_eq!(xattrs, BTreeMap::from([(b"user.a".to_vec(), b"b\nc".to_vec())]));
    assert!(scene.view.xattrs(root.ino).unwrap().is_empty());
    // Directories that the archive does not describe belong to the owner of the images.
    let images = scene.attr("files");
    for path in ["files/tmpfs/a", "files/tmpfs/a/t/implied"] {
        let dir = scene.attr(path);
        assert_eq!((dir.uid, dir.mtime), (images.uid, images.mtime), "{path}");
    }
    // Only the owner may enter, whatever the modes inside.
    assert_eq!(scene.attr("files/tmpfs").mode & 0o077, 0);

    let Scene { view, _disk, cache: _cache } = scene;
    let view = view.without_owners();
    let found = view.find("files/tmpfs/a/t/file").unwrap();
    assert_eq!((found.uid, found.gid, found.mode), (images.uid, images.gid, 0o7751));
}

#[test]
fn names_of_one_file_have_one_number() {
    let files = packed(|tar| {
        add(tar, EntryType::Regular, b"./z/first", b"", b"hello");
        add(tar, EntryType::Link, b"./a/second", b"./z/first", b"");
        add(tar, EntryType::Link, b"./a/third", b"./a/second", b"");
        add(tar, EntryType::Regular, b"./hidden/first", b"", b"below");
        add(tar, EntryType::Link, b"./shown", b"./hidden/first", b"");
    });
    let over = packed(|tar| add(tar, EntryType::Regular, b"./first", b"", b"above"));
    let mounts = [mount(1, 1, "/", "/t"), mount(2, 2, "/", "/t/hidden")];
    let images = [("tmpfs-1.tar.gz.img", files), ("tmpfs-2.tar.gz.img", over)];
    let scene = Scene::new(&mounts, &images);
    let third = scene.attr("files/tmpfs/t/a/third");
    for path in ["z/first", "a/second", "a/third"] {
        let attr = scene.attr(&format!("files/tmpfs/t/{path}"));
        assert_eq!((attr.ino, attr.nlink), (third.ino, 3), "{path}");
        assert_eq!(scene.read(&format!("files/tmpfs/t/{path}")), b"hello");
    }
    assert_eq!(scene.read("files/tmpfs/t/shown"), b"below");
    assert_eq!(scene.read("files/tmpfs/t/hidden/first"), b"above");
    let inos =
        ["shown", "hidden/first"].map(|path| scene.attr(&format!("files/tmpfs/t/{path}")).ino);
    assert_ne!(inos[0], inos[1]);
    // The tree of a snapshot is another one.
    let snapshot = scene.names("snapshots").remove(0);
    let again = scene.attr(&format!("snapshots/{snapshot}/files/tmpfs/t/a/second"));
    assert_ne!(again.ino, third.ino);
}

#[test]
fn owners_and_attributes_that_no_file_has_are_errors() {
    let value = vec![b'v'; (1 << 16) + 1];
    let name = format!("SCHILY.xattr.user.{}", "n".repeat(255));
    let cases: [(&str, &[u8], &str); 4] = [
        ("uid", b"4294967296", "its owner is no user id"),
        ("gid", b"4294967295", "its group is no group id"),
        ("SCHILY.xattr.user.large", &value, "a name or value is too long"),
        (&name, b"v", "a name or value is too long"),
    ];
    let place = |device: u32| mount(device, device, "/", &format!("/{device}"));
    let mounts: Vec<_> = (1..=6).map(place).collect();
    let names: Vec<String> = (1..=6).map(|device| Kind::TmpfsDev.file_name(device)).collect();
    let mut images: Vec<Vec<u8>> = cases
        .iter()
        .map(|(key, value, _)| {
            packed(|tar| add_described(tar, EntryType::Regular, "./file", &[(key, value)]))
        })
        .collect();
    images.push(packed(|tar| add_device(tar, b"./device", 4096, 0)));
    // Each member is small enough, but all together are not.
    images.push(packed(|tar| {
        for number in 0..=1 << 10 {
            let records: [(&str, &[u8]); 1] = [("SCHILY.xattr.user.large", &value[1..])];
            add_described(tar, EntryType::Regular, &format!("./{number}"), &records);
        }
    }));
    let wanted = cases.iter().map(|(.., wanted)| *wanted);
    let wanted =
        wanted.chain(["Linux has no device of its number", "bytes in extended attributes"]);
    let images: Vec<_> = names.iter().map(String::as_str).zip(images).collect();
    let scene = Scene::new(&mounts, &images);
    for (device, wanted) in (1..).zip(wanted) {
        let problem = scene.problem(&format!("files/tmpfs/{device}"));
        assert!(problem.contains(wanted), "{wanted}: {problem}");
    }
}
