//! Checkpoints in archives, as users meet them.

mod common;

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use common::{
    Cap,
    mounted::{IMGFS, Mounted},
    require,
};
use serde_json::Value;
use tempfile::TempDir;

/// A chain of three snapshots that CRIU wrote, of processes 293 and 295.
fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/criu42-chain/chain")
}

/// Where compressed archives are unpacked, if a test does not say so.
fn cache() -> &'static Path {
    Path::new(env!("CARGO_TARGET_TMPDIR"))
}

fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(IMGFS);
    command.args(arguments).env("XDG_CACHE_HOME", cache());
    command
}

fn imgfs(arguments: &[&str]) -> Output {
    command(arguments).output().unwrap()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[track_caller]
fn sh(script: &str) -> String {
    let output = Command::new("bash").args(["-euo", "pipefail", "-c", script]).output().unwrap();
    assert!(output.status.success(), "{script}: {}", said(&output));
    String::from_utf8(output.stdout).unwrap()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&[&output.stdout[..], &output.stderr].concat()).into_owned()
}

#[track_caller]
fn fine(output: &Output) -> String {
    assert!(output.status.success(), "{}", said(output));
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// The error of a command that fails.
#[track_caller]
fn problem(arguments: &[&str]) -> String {
    let output = imgfs(arguments);
    assert!(!output.status.success(), "{arguments:?}: {}", said(&output));
    assert_eq!(output.stdout, b"", "{arguments:?}");
    String::from_utf8(output.stderr).unwrap()
}

/// A checkpoint as Podman exports it: `pre-checkpoint` in one archive and `checkpoint`, whose
/// parent that is, in another.
struct Exported {
    dir: TempDir,
}

/// What Podman and CRI-O write beside the images.
const BESIDE: [&str; 4] = ["config.dump", "spec.dump", "stats-dump", "network.status"];

impl Exported {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let tree = dir.path().join("tree");
        fs::create_dir(&tree).unwrap();
        let copy = |from: &str, to: &str| {
            let (from, to) = (fixture().join(from), tree.join(to));
            sh(&format!("cp -a {} {}", text(&from), text(&to)));
            fs::remove_file(to.join("parent")).unwrap_or(());
        };
        copy("1", "pre-checkpoint");
        copy("2", "checkpoint");
        symlink("../pre-checkpoint", tree.join("checkpoint/parent")).unwrap();
        for name in BESIDE {
            fs::write(tree.join(name), format!("{{\"file\":\"{name}\"}}")).unwrap();
        }
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Makes an archive of some of the tree.
    fn pack(&self, name: &str, members: &str) -> PathBuf {
        let path = self.path(name);
        sh(&format!("tar -C {} -caf {} {members}", text(&self.path("tree")), text(&path)));
        path
    }

    /// The chain as it was before.
    fn directory(&self) -> PathBuf {
        self.path("tree")
    }
}

/// Commands that look at a chain, with what they are told besides.
const LOOKS: &[&[&str]] = &[
    &["check"],
    &["ls", "--duplicates"],
    &["ps"],
    &["ps", "--json"],
    &["fds"],
    &["maps", "293"],
    &["cat", "proc/293/status"],
    &["cat", "json/core-293.img.json"],
    &["cat", "pages-1.img"],
    &["cat", "mem/295/maps"],
];

/// Checks that every command answers for an archive as it does for the directory.
#[track_caller]
fn assert_same(directory: &Path, archive: &Path, options: &[&str], names: [&str; 2]) {
    let ask = |chain: &Path, words: &[&str], options: &[&str]| {
        let words = [&words[..1], &[text(chain)], &words[1..], options].concat();
        let output = imgfs(&words);
        let printed = String::from_utf8_lossy(&output.stdout);
        (output.status.code(), printed.replace(text(chain), "CHAIN"))
    };
    let diff: &[&str] = &["diff", names[0], names[1]];
    for words in LOOKS.iter().chain([&diff]) {
        let expected = ask(directory, words, &[]);
        let found = ask(archive, words, options);
        assert_eq!(found, expected, "{words:?} {}", archive.display());
    }
    let listed = |chain: &Path, options: &[&str]| {
        let (_, json) = ask(chain, &["ls", "--json"], options);
        let document: Value = serde_json::from_str(&json).unwrap();
        // An archive has whole seconds.
        let field = |snapshot: &Value, name: &str| match name {
            "date" => snapshot[name].as_str().unwrap()[.."2026-11-30T06:23:57".len()].into(),
            _ => snapshot[name].clone(),
        };
        let fields = ["name", "parent", "date", "processes", "pages", "flat_bytes"];
        let rows = document["snapshots"].as_array().unwrap().iter();
        rows.map(|row| fields.map(|name| field(row, name))).collect::<Vec<_>>()
    };
    assert_eq!(listed(archive, options), listed(directory, &[]));
    assert!(ask(archive, &["info"], options).1.contains("Snapshot:"));
    let outs = [(directory, &[][..]), (archive, options)].map(|(chain, options)| {
        let out = tempfile::tempdir().unwrap();
        let words = [&["flatten", text(chain), text(out.path())], options].concat();
        fine(&imgfs(&words));
        out
    });
    sh(&format!("diff -r {} {}", text(outs[0].path()), text(outs[1].path())));
}

#[test]
fn an_archive_answers_every_command_as_the_directory_does() {
    let exported = Exported::new();
    let tree = exported.directory();
    let names = ["pre-checkpoint", "checkpoint"];
    assert_same(&tree, &exported.pack("a.tar", "."), &[], names);
    // With the directory's own name in front, and sparse.
    let outer = exported.path("outer.tar");
    sh(&format!("tar -C {} --format=posix -Scf {} tree", text(exported.dir.path()), text(&outer)));
    assert_same(&tree, &outer, &[], names);
}

#[test]
fn parents_are_found_in_another_archive() {
    let exported = Exported::new();
    let tree = exported.directory();
    let pre = exported.pack("pre.tar", "pre-checkpoint config.dump");
    let last = exported.pack("last.tar", "checkpoint config.dump");
    let previous = ["--previous", text(&pre)];
    assert_same(&tree, &last, &previous, ["pre-checkpoint", "checkpoint"]);

    let output = imgfs(&["ls", text(&last)]);
    assert_eq!(output.status.code(), Some(1));
    let said = said(&output);
    assert!(said.contains("leads to ../pre-checkpoint"), "{said}");
    assert!(said.contains("give it with --previous ARCHIVE"), "{said}");
    let problem = problem(&["ls", text(&tree), "--previous", text(&pre)]);
    assert!(problem.contains("only an archive takes"), "{problem}");
    let gone = exported.path("gone.tar");
    let problem = self::problem(&["ls", text(&last), "--previous", text(&gone)]);
    assert!(problem.contains("gone.tar: No such file"), "{problem}");

    // Archives of one image directory each.
    let alone = |name: &str| {
        let path = exported.path(&format!("{name}.tar"));
        sh(&format!("tar -C {}/{name} -cf {} .", text(&tree), text(&path)));
        path
    };
    let (base, tip) = (alone("pre-checkpoint"), alone("checkpoint"));
    let listed = fine(&imgfs(&["ls", text(&tip), "--previous", text(&base)]));
    assert!(listed.contains("pre-checkpoint.tar"), "{listed}");
    assert_eq!(imgfs(&["check", text(&tip), "--previous", text(&base)]).status.code(), Some(0));
}

#[test]
fn privileged_a_mounted_archive_is_the_mounted_directory() {
    require(Cap::Fuse);
    let exported = Exported::new();
    let (pre, last) = (exported.pack("pre.tar", "pre-checkpoint"), exported.pack("b.tar", "."));
    let directory = Mounted::new(&exported.directory(), &exported.path("m1"), &[]);
    let archive = Mounted::new(&last, &exported.path("m2"), &[]);
    let compare = |one: &Mounted, other: &Mounted| {
        sh(&format!("diff -r --no-dereference {} {}", text(&one.point), text(&other.point)));
    };
    compare(&directory, &archive);
    drop(archive);
    let alone = exported.pack("alone.tar", "checkpoint");
    let option = format!("previous={}", text(&pre));
    let archive = Mounted::new(&alone, &exported.path("m2"), &["-o", &option]);
    compare(&directory, &archive);
    // It can be read only.
    let point = exported.path("m3");
    fs::create_dir(&point).unwrap();
    assert!(
        problem(&["mount", text(&alone), text(&point), "--punch"]).contains("can only be read")
    );
    // The daemon leaves the working directory.
    let script = format!(
        "cd {} && {} mount alone.tar m3 --previous pre.tar && diff -r --no-dereference m1 m3; \
         {} umount m3",
        text(exported.dir.path()),
        env!("CARGO_BIN_EXE_imgfs"),
        env!("CARGO_BIN_EXE_imgfs"),
    );
    sh(&script);
}

#[test]
fn rcriu_says_how_an_archive_is_used() {
    let exported = Exported::new();
    let archive = exported.pack("a.tar", ".");
    let archive = text(&archive);
    let restore: &[&str] = &["restore", "-D", archive];
    for (arguments, remedy) in [
        (restore, "imgfs mount ARCHIVE DIR"),
        (&["dedup", "-D", archive], "help: unpack an archive"),
        (&["dedup", "--link", archive, archive], "help: unpack an archive"),
        (&["dedup", "--reflink", "-D", archive], "help: unpack an archive"),
    ] {
        let output = Command::new(env!("CARGO_BIN_EXE_rcriu"))
            .args(arguments)
            .current_dir(exported.dir.path())
            .output()
            .unwrap();
        assert!(!output.status.success());
        let said = said(&output);
        assert!(said.contains(remedy), "{arguments:?}: {said}");
    }
}

/// Returns the names in a directory, sorted.
fn names(dir: &Path) -> Vec<String> {
    let names = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name());
    let mut names: Vec<_> = names.map(|name| name.into_string().unwrap()).collect();
    names.sort();
    names
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

#[test]
fn compressed_archives_are_unpacked_once_for_their_user_alone() {
    let exported = Exported::new();
    let cache = exported.path("cache");
    let tree = exported.directory();
    for name in ["a.tar.gz", "a.tar.zst", "in-two-frames.tzst"] {
        let archive = exported.pack(name, ".");
        if name == "in-two-frames.tzst" {
            let (tar, archive) = (exported.pack("a.tar", "."), text(&archive));
            let (head, tail) = (exported.path("head"), exported.path("tail"));
            let [tar, head, tail] = [&tar, &head, &tail].map(|path| text(path));
            sh(&format!("head -c 99999 {tar} > {head}; tail -c +100000 {tar} > {tail}"));
            sh(&format!("zstd -qc {head} > {archive}; zstd -qc --no-check {tail} >> {archive}"));
        }
        let options = ["--cache-dir", text(&cache)];
        assert_same(&tree, &archive, &options, ["pre-checkpoint", "checkpoint"]);
        assert_eq!(mode(&cache), 0o700);
        let unpacked = names(&cache);
        let [unpacked] = &unpacked[..] else { panic!("{name}: {unpacked:?}") };
        let unpacked = cache.join(unpacked);
        assert_eq!(mode(&unpacked), 0o600);
        let inode = || fs::metadata(&unpacked).unwrap().ino();
        let before = inode();
        let list = || imgfs(&[&["ls", text(&archive)][..], &options].concat());
        fine(&list());
        assert_eq!(inode(), before, "it was unpacked again");

        // What a killed process has left is taken for nothing.
        let part = unpacked.with_extension("part");
        fs::rename(&unpacked, &part).unwrap();
        fs::write(&part, "junk").unwrap();
        fs::write(unpacked.with_extension("lock"), "").unwrap();
        fine(&list());
        assert_eq!(names(&cache).len(), 1);
        fs::remove_dir_all(&cache).unwrap();
    }
}

#[test]
fn processes_that_want_one_archive_at_a_time_unpack_it_once() {
    let exported = Exported::new();
    let (archive, cache) = (exported.pack("a.tar.gz", "."), exported.path("cache"));
    let start = |_| {
        let words = ["ls", text(&archive), "--cache-dir", text(&cache)];
        command(&words).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let children: Vec<_> = (0..6).map(start).collect();
    for child in children {
        fine(&child.wait_with_output().unwrap());
    }
    assert_eq!(names(&cache).len(), 1);
}

#[test]
fn the_cache_has_a_limit() {
    let exported = Exported::new();
    let cache = exported.path("cache");
    let list = |archive: &Path, limit: &str| {
        imgfs(&["ls", text(archive), "--cache-dir", text(&cache), "--cache-limit", limit])
    };
    let first = exported.pack("a.tar.gz", ".");
    let refused = list(&first, "100K");
    assert!(!refused.status.success());
    assert!(said(&refused).contains("more than 102400 bytes"), "{}", said(&refused));
    assert_eq!(names(&cache), [] as [&str; 0]);
    fine(&list(&first, "4M"));
    let one = names(&cache);
    // Room for one of them.
    let second = exported.pack("b.tar.zst", ".");
    let bytes = fs::metadata(cache.join(&one[0])).unwrap().len() * 3 / 2;
    fine(&list(&second, &bytes.to_string()));
    let two = names(&cache);
    assert!(two.len() == 1 && two != one, "{one:?} {two:?}");
    // A bomb: zeros are an empty archive.
    let bomb = exported.path("bomb.gz");
    sh(&format!("head -c 100M /dev/zero | gzip > {}", text(&bomb)));
    assert!(said(&list(&bomb, "8M")).contains("the archive unpacks to more than 8388608 bytes"));
    assert!(names(&cache).iter().all(|name| name.ends_with(".tar")));

    fs::set_permissions(&cache, fs::Permissions::from_mode(0o755)).unwrap();
    let open = said(&list(&first, "4M"));
    assert!(open.contains("is not a directory of this user alone"), "{open}");
}

#[test]
fn damaged_and_foreign_files_are_errors() {
    let exported = Exported::new();
    let bytes = |name: &str| fs::read(exported.pack(name, ".")).unwrap();
    let with = |name: &str, bytes: &[u8]| {
        let path = exported.path(name);
        fs::write(&path, bytes).unwrap();
        let cache = exported.path("cache");
        let problem = problem(&["ls", text(&path), "--cache-dir", text(&cache)]);
        assert!(problem.contains(text(&path)), "{problem}");
        assert!(!cache.exists() || names(&cache).is_empty());
        problem
    };
    for name in ["a.tar.gz", "a.tar.zst"] {
        let mut bytes = bytes(name);
        let len = bytes.len();
        let problem = with(name, &bytes[..len - 20]);
        assert!(problem.contains("unpack the archive at offset 0x"), "{problem}");
        bytes[len / 2] ^= 0xff;
        bytes[len / 2 + 1] ^= 0xff;
        let problem = with(name, &bytes);
        assert!(problem.contains("unpack the archive at offset 0x"), "{problem}");
    }
    assert!(with("a.tar.xz", &bytes("a.tar.xz")).contains("it is compressed with xz; expected"));
    assert!(with("text", b"# Not an archive\n").contains("it is of another kind; expected"));
    assert!(with("empty", b"").contains("it is empty; expected a directory, or an archive"));
    let path = exported.path("text.gz");
    sh(&format!("echo hello | gzip > {}", text(&path)));
    let text = with("text.gz", &fs::read(path).unwrap());
    assert!(text.contains("it is a compressed file, and no archive"), "{text}");
}

#[test]
fn a_packed_chain_is_the_same_chain() {
    let dir = tempfile::tempdir().unwrap();
    let chain = dir.path().join("chain");
    sh(&format!("cp -a {} {}", text(&fixture()), text(&chain)));
    // A file with a hole at its begin, in its middle and at its end.
    sh(&format!(
        "cd {}/2; truncate -s 300000 notes; printf x | dd of=notes bs=1 seek=100000 conv=notrunc \
         status=none; printf y | dd of=notes bs=1 seek=200000 conv=notrunc status=none",
        text(&chain)
    ));
    for end in ["tar", "tar.gz", "tar.zst"] {
        let [one, two] = ["one", "two"].map(|name| dir.path().join(name).with_extension(end));
        fine(&imgfs(&["pack", text(&chain), text(&one)]));
        assert_eq!(mode(&one), 0o600);
        let cache = dir.path().join("cache");
        assert_same(&chain, &one, &["--cache-dir", text(&cache)], ["1", "3"]);
        // Seekable zstd is read as it is.
        assert_eq!(cache.exists(), end == "tar.gz", "{end}");
        let _ = fs::remove_dir_all(&cache);

        fine(&imgfs(&["pack", text(&chain), text(&two)]));
        assert_eq!(fs::read(&one).unwrap(), fs::read(&two).unwrap());
        let exists = problem(&["pack", text(&chain), text(&two)]);
        assert!(exists.contains("it exists\n  help: -f replaces it"), "{exists}");
        fine(&imgfs(&["pack", "-f", text(&chain), text(&two)]));

        let out = dir.path().join("out");
        fs::create_dir(&out).unwrap();
        let unpack = if end == "tar.zst" { "zstd -qdc" } else { "cat" };
        sh(&format!(
            "{unpack} {} | tar -C {} -x{}f -",
            text(&one),
            text(&out),
            if end == "tar.gz" { "z" } else { "" }
        ));
        sh(&format!("diff -r {} {}", text(&chain), text(&out)));
        fs::remove_dir_all(&out).unwrap();
        assert!(names(dir.path()).iter().all(|name| !name.contains("unfinished")));
    }
    let sizes = ["tar", "tar.gz", "tar.zst"]
        .map(|end| fs::metadata(dir.path().join("one").with_extension(end)).unwrap().len());
    assert!(sizes[1] < sizes[0] && sizes[2] < sizes[0], "{sizes:?}");
    let other = problem(&["pack", text(&chain), text(&dir.path().join("x.zip"))]);
    assert!(other.contains("its name has to end in .tar, .tar.gz or .tar.zst"), "{other}");
    fs::remove_dir_all(chain.join("1")).unwrap();
    let broken = problem(&["pack", text(&chain), text(&dir.path().join("broken.tar"))]);
    assert!(broken.contains("leads to ../1"), "{broken}");
    assert_eq!(names(dir.path()).len(), 7);
}

#[test]
fn what_was_exported_with_a_container_stays_beside_its_images() {
    let exported = Exported::new();
    let tree = exported.directory();
    fs::create_dir(tree.join("volumes")).unwrap();
    fs::write(tree.join("volumes/v.tar"), "volume").unwrap();
    fs::write(tree.join("other"), "not Podman's").unwrap();
    let flat = exported.path("flat");
    fine(&imgfs(&["flatten", text(&tree), text(&flat)]));
    let sources = [tree.clone(), exported.pack("a.tar", ".")];
    for source in &sources {
        let out = exported.path("out");
        let unpack = |archive: &Path| {
            let _ = fs::remove_dir_all(&out);
            fs::create_dir(&out).unwrap();
            sh(&format!("tar -C {} -xf {}", text(&out), text(archive)));
            names(&out)
        };
        let beside = |name: &'static str| [&BESIDE[..], &["checkpoint", name, "volumes"]].concat();
        let sorted = |mut names: Vec<&str>| {
            names.retain(|name| !name.is_empty());
            names.sort_unstable();
            names.join(" ")
        };
        let archive = exported.path("new.tar");
        fine(&imgfs(&["flatten", "--archive", "-f", text(source), text(&archive)]));
        assert_eq!(unpack(&archive).join(" "), sorted(beside("")));
        sh(&format!("diff -r {} {}/checkpoint", text(&flat), text(&out)));
        assert_eq!(fs::read(out.join("volumes/v.tar")).unwrap(), b"volume");
        assert!(problem(&["flatten", "--archive", text(source), text(&archive)]).contains("-f"));

        fine(&imgfs(&["pack", "-f", text(source), text(&archive)]));
        assert_eq!(unpack(&archive).join(" "), sorted(beside("pre-checkpoint")));
        assert_eq!(
            fs::read_link(out.join("checkpoint/parent")).unwrap(),
            Path::new("../pre-checkpoint")
        );
    }
}

/// Makes an OCI image layout as Podman does (`--create-image`), of images with one layer each.
fn layout(dir: &Path, images: &[(&str, &Path)]) {
    let blobs = dir.join("blobs/sha256");
    fs::create_dir_all(&blobs).unwrap();
    fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    let add = |bytes: &[u8]| {
        let path = dir.join("new");
        fs::write(&path, bytes).unwrap();
        let sum = sh(&format!("sha256sum {}", text(&path)));
        let digest = sum.split(' ').next().unwrap();
        fs::rename(path, blobs.join(digest)).unwrap();
        serde_json::json!({ "digest": format!("sha256:{digest}"), "size": bytes.len() })
    };
    let manifests = images.iter().map(|(annotation, layer)| {
        let layer = add(&fs::read(layer).unwrap());
        let manifest = serde_json::json!({
            "schemaVersion": 2,
            "layers": [layer],
            "annotations": { *annotation: "counter" },
        });
        add(manifest.to_string().as_bytes())
    });
    let index = serde_json::json!({ "manifests": manifests.collect::<Vec<_>>() });
    fs::write(dir.join("index.json"), index.to_string()).unwrap();
}

#[test]
fn an_image_layout_answers_as_its_checkpoint_does() {
    let exported = Exported::new();
    let tree = exported.directory();
    let other = exported.path("other.tar");
    sh(&format!("tar -C {} -cf {} config.dump", text(&tree), text(&other)));
    for (annotation, name) in [
        ("io.podman.annotations.checkpoint.name", "a.tar"),
        ("io.kubernetes.cri-o.annotations.checkpoint.name", "a.tar.gz"),
        ("org.criu.checkpoint.container.name", "a.tar.zst"),
    ] {
        let dir = exported.path("layout");
        layout(&dir, &[("org.example", &other), (annotation, &exported.pack(name, "."))]);
        let packed = exported.path("layout.tar");
        sh(&format!("tar -C {} -cf {} .", text(&dir), text(&packed)));
        for source in [&dir, &packed] {
            let options = ["--cache-dir", text(&exported.path("cache"))].map(str::to_owned);
            let options = [&*options[0], &*options[1]];
            assert_same(&tree, source, &options, ["pre-checkpoint", "checkpoint"]);
        }
        fs::remove_dir_all(&dir).unwrap();
    }
    let dir = exported.path("layout");
    layout(&dir, &[("org.example", &other)]);
    let none = problem(&["ls", text(&dir)]);
    assert!(none.contains("has no image of a checkpoint"), "{none}");
    let index = |document: &str| {
        fs::write(dir.join("index.json"), document).unwrap();
        problem(&["ls", text(&dir)])
    };
    assert!(index("[").contains("index.json of the OCI image layout: it is no JSON object"));
    let digest = r#"{"manifests":[{"digest":"sha256:../../etc/passwd","size":1}]}"#;
    assert!(index(digest).contains("a digest that is not of SHA-256 or SHA-512"));
    let gone = format!(r#"{{"manifests":[{{"digest":"sha256:{}","size":1}}]}}"#, "0".repeat(64));
    assert!(index(&gone).contains("No such file"), "{}", index(&gone));
}

#[test]
fn a_layer_that_is_not_what_its_digest_says_is_an_error() {
    let exported = Exported::new();
    let cache = exported.path("cache");
    let dir = exported.path("layout");
    let podman = "io.podman.annotations.checkpoint.name";
    let check = || {
        let arguments = ["check", text(&dir), "--cache-dir", text(&cache)];
        let output = imgfs(&arguments);
        (output.status.code(), String::from_utf8(output.stdout).unwrap())
    };
    let damaged = "its bytes do not have the digest by which it is named";
    // A layer that is read in place: only a check reads all of it.
    layout(&dir, &[(podman, &exported.pack("a.tar", "."))]);
    let good = check();
    assert!(!good.1.contains(damaged), "{good:?}");
    let layer = largest(&dir.join("blobs/sha256"));
    let mut bytes = fs::read(&layer).unwrap();
    // Behind the end mark, where no other check looks.
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&layer, &bytes).unwrap();
    let (code, found) = check();
    assert_eq!(code, Some(1), "{found}");
    assert!(found.contains(damaged), "{found}");
    // One that is unpacked: nothing of it is shown.
    fs::remove_dir_all(&dir).unwrap();
    layout(&dir, &[(podman, &exported.pack("a.tar.gz", "."))]);
    let layer = largest(&dir.join("blobs/sha256"));
    let mut bytes = fs::read(&layer).unwrap();
    bytes[4] ^= 1; // the time in the header of gzip, which no decoder checks
    fs::write(&layer, &bytes).unwrap();
    let found = problem(&["ls", text(&dir), "--cache-dir", text(&cache)]);
    assert!(found.contains(damaged), "{found}");
    // A manifest.
    let manifest = smallest(&dir.join("blobs/sha256"));
    let document = fs::read_to_string(&manifest).unwrap();
    fs::write(&manifest, document.replace("counter", "cOunter")).unwrap();
    let found = problem(&["ls", text(&dir)]);
    assert!(found.contains(damaged), "{found}");
}

fn by_size(dir: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort_by_key(|path| fs::metadata(path).unwrap().len());
    files
}

fn largest(dir: &Path) -> PathBuf {
    by_size(dir).pop().unwrap()
}

fn smallest(dir: &Path) -> PathBuf {
    by_size(dir).swap_remove(0)
}
