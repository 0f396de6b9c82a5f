use std::{error::Error, fs, os::unix::fs::PermissionsExt};

use flate2::{Compression, write::GzEncoder};
use tar::{Builder, EntryType, Header};

use super::*;
use crate::{
    chain::{Chain, read_at, testing::TestChain},
    image::store::{Cache, Opening},
    view::{NodeType, View, testing::image},
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
        add(tar, EntryType::Char, b"./null", b"", b"");
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
    let names = ["\\xffbad", "abs", "dir", "empty", "hard", "shm", "up"];
    assert_eq!(scene.names("files/tmpfs/run/t"), names);
    assert_eq!(scene.read("files/tmpfs/run/t/dir/file"), b"hello");
    assert_eq!(scene.read("files/tmpfs/run/t/hard"), b"hello");
    assert_eq!(scene.read("files/tmpfs/run/t/\\xffbad"), b"odd");
    assert!(scene.names("files/tmpfs/run/t/empty").is_empty());
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
