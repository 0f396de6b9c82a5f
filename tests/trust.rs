//! What is trusted, and what is not: files that are not those that were dumped, images that
//! belong to other users, and links that other users have placed.

mod common;

use std::{
    fs,
    os::unix::fs::{FileExt, MetadataExt, PermissionsExt},
    path::Path,
    process::Command,
    time::{Duration, SystemTime},
};

use common::{
    Cap,
    live::{Live, directory},
    mounted::Mounted,
    require, stored_bytes,
};

/// A program that calls a library, and says afterwards whether it is the one that it was.
const PROGRAM: &str = r#"
#include <stdio.h>
#include <string.h>
#include <unistd.h>
extern int answer(void);
static void say(const char *path, const char *word) {
    char name[4096];
    snprintf(name, sizeof name, "%s.new", path);
    FILE *file = fopen(name, "w");
    fputs(word, file);
    fclose(file);
    rename(name, path);
}
int main(int count, char **words) {
    char go[4096];
    snprintf(go, sizeof go, "%s.go", words[1]);
    say(words[1], "ready\n");
    while (access(go, F_OK)) usleep(2000);
    say(words[1], answer() == 42 ? "ok\n" : "another library\n");
    for (;;) pause();
}
"#;

fn compile(arguments: &[&str], source: &str, output: &Path) {
    let path = output.with_extension("c");
    fs::write(&path, source).unwrap();
    let mut build = Command::new("cc");
    let built = build.args(["-O1", "-o"]).args([output, &path]).args(arguments).status();
    assert!(built.unwrap().success(), "{source} cannot be compiled");
}

/// Builds a library that gives an answer, with this build-id or none.
fn library(path: &Path, answer: u32, build_id: Option<&str>) {
    let id = format!("-Wl,--build-id={}", build_id.unwrap_or("none"));
    let source = format!("int answer(void) {{ return {answer}; }}");
    compile(&["-shared", "-fPIC", &id], &source, path);
}

/// Starts the program with a library.
fn calling(answer: u32, build_id: Option<&str>) -> Live {
    let dir = directory();
    let (program, lib) = (dir.path().join("program"), dir.path().join("libanswer.so"));
    library(&lib, answer, build_id);
    let search = format!("-Wl,-rpath,{}", dir.path().display());
    compile(&[lib.to_str().unwrap(), &search], PROGRAM, &program);
    let status = dir.path().join("status").to_str().unwrap().to_owned();
    let live = Live::program(program.to_str().unwrap(), &[&status], dir);
    live.wait_ready();
    live
}

/// Puts another build of the library, of the same size, in the place of the first.
fn replace(live: &Live, build_id: Option<&str>) {
    let (old, new) = (live.path("libanswer.so"), live.path("libother.so"));
    library(&new, 43, build_id);
    assert_eq!(fs::metadata(&old).unwrap().len(), fs::metadata(&new).unwrap().len());
    fs::rename(&new, &old).unwrap();
}

const FIRST: &str = "0x00112233445566778899aabbccddeeff00112233";
const SECOND: &str = "0xffeeddccbbaa99887766554433221100ffeeddcc";

/// Reads an image as JSON.
fn document(path: &Path) -> serde_json::Value {
    let output = Command::new(env!("CARGO_BIN_EXE_rcriu")).arg("show").arg(path).output().unwrap();
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Where the code of the library is in the process's memory.
fn code(live: &Live) -> (u64, usize) {
    let files = document(&live.images().join("files.img"));
    let named = |entry: &&serde_json::Value| {
        entry["reg"]["name"].as_str().is_some_and(|name| name.ends_with("libanswer.so"))
    };
    let entries = files["entries"].as_array().unwrap();
    let id = entries.iter().find(named).unwrap()["id"].as_u64().unwrap();
    let mm = document(&live.images().join(format!("mm-{}.img", live.root)));
    let vmas = mm["entries"][0]["vmas"].as_array().unwrap();
    let code = vmas.iter().find(|vma| vma["shmid"] == id && vma["prot"] == 5).unwrap();
    let (start, end) = (code["start"].as_u64().unwrap(), code["end"].as_u64().unwrap());
    (start, usize::try_from(end - start).unwrap())
}

/// Returns what a restore says that is refused.
fn refusal(live: &Live) -> String {
    let refused = live.try_restore(&[]);
    assert!(!refused.status.success());
    String::from_utf8_lossy(&refused.stderr).into_owned()
}

/// Reads what a mount shows of the code of the library.
fn shown(live: &Live) -> Vec<u8> {
    let mounted = Mounted::new(&live.images(), &live.path("mount"), &[]);
    let (start, len) = code(live);
    let file = fs::File::open(mounted.path(&format!("proc/{}/mem", live.root))).unwrap();
    let mut bytes = vec![0xee; len];
    file.read_exact_at(&mut bytes, start).unwrap();
    bytes
}

#[test]
fn privileged_another_build_of_a_library_is_refused() {
    require(Cap::Ptrace);
    require(Cap::Fuse);
    require(Cap::Program("cc"));
    let mut live = calling(42, Some(FIRST));
    live.dump(&[]);
    assert!(shown(&live).iter().any(|byte| *byte != 0));
    let kept = live.path("kept");
    fs::copy(live.path("libanswer.so"), &kept).unwrap();
    replace(&live, Some(SECOND));
    let said = refusal(&live);
    for part in [&FIRST[2..], &SECOND[2..], "libanswer.so", "--file-validation=filesize"] {
        assert!(said.contains(part), "{part} in: {said}");
    }
    // What is not the code that ran is not shown as if it were.
    assert!(shown(&live).iter().all(|byte| *byte == 0));
    // The same build under its name again, another file.
    fs::copy(&kept, live.path("libanswer.so")).unwrap();
    assert!(shown(&live).iter().any(|byte| *byte != 0));
    live.restore(&[]);
    live.verdict();
}

#[test]
fn privileged_another_build_is_taken_if_only_sizes_are_to_be_compared() {
    require(Cap::Ptrace);
    require(Cap::Program("cc"));
    let mut live = calling(43, Some(FIRST));
    live.dump(&[]);
    replace(&live, Some(SECOND));
    assert!(!live.try_restore(&[]).status.success());
    live.restore(&["--file-validation=filesize"]);
}

#[test]
fn privileged_a_file_without_a_build_id_is_known_by_its_time() {
    require(Cap::Ptrace);
    require(Cap::Program("cc"));
    let mut live = calling(42, None);
    live.dump(&[]);
    let path = live.path("libanswer.so");
    let date = fs::metadata(&path).unwrap().modified().unwrap();
    let set = |date: SystemTime| fs::File::open(&path).unwrap().set_modified(date).unwrap();
    set(date + Duration::from_nanos(1));
    let said = refusal(&live);
    assert!(said.contains("libanswer.so was written at "), "{said}");
    set(date);
    live.restore(&[]);
    live.verdict();
}

#[test]
fn privileged_to_look_at_a_file_is_not_to_use_it() {
    require(Cap::Ptrace);
    require(Cap::Program("cc"));
    let mut live = calling(42, Some(FIRST));
    let path = live.path("libanswer.so");
    let long_ago = SystemTime::now() - Duration::from_secs(1_000_000);
    let times = fs::FileTimes::new().set_accessed(long_ago).set_modified(long_ago);
    fs::File::open(&path).unwrap().set_times(times).unwrap();
    let before = fs::metadata(&path).unwrap();
    live.dump_running(&[]);
    let after = fs::metadata(&path).unwrap();
    assert_eq!((before.atime(), before.atime_nsec()), (after.atime(), after.atime_nsec()));
    live.verdict();
}

/// A user who owns nothing.
const NOBODY: &str = "65534";

/// Runs a command as that user, and returns what it writes if it succeeds.
fn nobody_gets(words: &[&str]) -> Option<Vec<u8>> {
    let mut command = Command::new("setpriv");
    command.args(["--reuid", NOBODY, "--regid", NOBODY, "--clear-groups"]).args(words);
    let output = command.output().unwrap();
    output.status.success().then_some(output.stdout)
}

fn as_nobody(words: &[&str]) {
    assert!(nobody_gets(words).is_some(), "{words:?}");
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().mode() & 0o7777
}

#[test]
fn privileged_what_is_written_is_private_whatever_the_umask() {
    require(Cap::Ptrace);
    require(Cap::Fuse);
    let mut live = Live::workload("private_anon");
    // Of this process, and so of what it runs.
    let old = nix::sys::stat::umask(nix::sys::stat::Mode::empty());
    live.dump(&["-W", live.path("images").to_str().unwrap()]);
    let images = live.images();
    let mounted = Mounted::new(&images, &live.path("mount"), &[]);
    let log = mounted.log.clone();
    drop(mounted);
    live.restore(&[]);
    nix::sys::stat::umask(old);
    let written = fs::read_dir(&images).unwrap().map(|entry| entry.unwrap().path());
    for path in written.chain([live.path("pid"), log]) {
        assert_eq!(mode(&path), 0o600, "{}", path.display());
    }
    live.verdict();
}

#[test]
fn privileged_links_of_others_are_not_followed() {
    require(Cap::Ptrace);
    require(Cap::Fuse);
    require(Cap::Program("setpriv"));
    let mut live = Live::workload("private_anon");
    let public = live.path("public");
    fs::create_dir(&public).unwrap();
    fs::set_permissions(live.dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let victim = live.path("victim");
    fs::write(&victim, "precious").unwrap();
    let other = live.path("other");
    fs::create_dir(&other).unwrap();
    let (link, dir_link) = (public.join("link"), public.join("dir"));
    let (link, dir_link) = (link.to_str().unwrap(), dir_link.to_str().unwrap());
    // With the sticky bit, the kernel may be set to refuse as well.
    for bits in [0o1777, 0o777] {
        fs::set_permissions(&public, fs::Permissions::from_mode(bits)).unwrap();
        as_nobody(&["ln", "-sfn", victim.to_str().unwrap(), link]);
        as_nobody(&["ln", "-sfn", other.to_str().unwrap(), dir_link]);
        let through = format!("{dir_link}/dump.log");
        for arguments in [&["-o", link][..], &["-o", &through], &["-D", dir_link, "-o", "-"]] {
            let output = live.try_dump(&[arguments, &["-R"]].concat());
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(!output.status.success(), "{arguments:?}");
            assert!(said.contains("is a symbolic link of user 65534"), "{arguments:?}: {said}");
        }
        let mut mount = Command::new(env!("CARGO_BIN_EXE_imgfs"));
        mount.arg("mount").args([live.images(), live.path("public")]).args(["--log-file", link]);
        assert!(!mount.output().unwrap().status.success());
        assert_eq!(fs::read_to_string(&victim).unwrap(), "precious");
        assert_eq!(fs::read_dir(&other).unwrap().count(), 0);
    }
    // A file that another user can read, in the place of a log.
    let laid = public.join("laid");
    as_nobody(&["touch", laid.to_str().unwrap()]);
    let output = live.try_dump(&["-R", "-o", laid.to_str().unwrap()]);
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("belongs to user 65534"));
    // Links of one's own are followed, also there.
    fs::remove_file(link).unwrap();
    std::os::unix::fs::symlink(live.path("log"), link).unwrap();
    live.dump(&["-o", link]);
    assert!(fs::metadata(live.path("log")).unwrap().len() > 0);
    // And a pid file.
    as_nobody(&["ln", "-sfn", victim.to_str().unwrap(), public.join("pid").to_str().unwrap()]);
    let pid = public.join("pid").to_str().unwrap().to_owned();
    let output = live.try_restore(&["--pidfile", &pid]);
    assert!(!output.status.success());
    assert_eq!(fs::read_to_string(&victim).unwrap(), "precious");
    live.restore(&[]);
    live.verdict();
}

/// Gives a directory and all in it to that user.
fn give(dir: &Path) {
    let status = Command::new("chown").args(["-R", "-h", NOBODY]).arg(dir).status();
    assert!(status.unwrap().success());
}

#[test]
fn privileged_a_mount_shows_no_file_that_its_reader_could_not_read() {
    require(Cap::Ptrace);
    require(Cap::Fuse);
    require(Cap::Program("cc"));
    require(Cap::Program("setpriv"));
    let mut live = calling(42, Some(FIRST));
    live.dump(&[]);
    fs::set_permissions(live.dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let (library, images) = (live.path("libanswer.so"), live.images());
    let (start, len) = code(&live);
    let mem = format!("mount/proc/{}/mem", live.root);
    // Through dd, as a user would.
    let read = |nobody: bool| {
        let path = format!("if={}", live.path(&mem).display());
        let (skip, count) = (format!("skip={start}"), format!("count={len}"));
        let flags = "iflag=skip_bytes,count_bytes";
        let words = ["dd", &path, "status=none", &skip, &count, flags];
        if nobody {
            return nobody_gets(&words);
        }
        let output = Command::new(words[0]).args(&words[1..]).output().unwrap();
        output.status.success().then_some(output.stdout)
    };
    let has_code = |bytes: Option<Vec<u8>>| bytes.map(|bytes| bytes.iter().any(|byte| *byte != 0));
    let mount = |arguments: &[&str]| Mounted::new(&images, &live.path("mount"), arguments);

    // Root's images: root reads everything, other users nothing.
    let mounted = mount(&["--allow-other"]);
    assert_eq!((has_code(read(false)), has_code(read(true))), (Some(true), None));
    drop(mounted);

    // Another user's images: only their contents are shown, to any reader.
    give(&images);
    for secret in [0o600, 0o644] {
        fs::set_permissions(&library, fs::Permissions::from_mode(secret)).unwrap();
        let mounted = mount(&["--allow-other"]);
        assert_eq!((has_code(read(false)), has_code(read(true))), (Some(false), Some(false)));
        assert!(mounted.log_text().contains("belong to user 65534"));
        drop(mounted);
        // Unless that is wanted, and then with that user's rights.
        let mounted = mount(&["--allow-other", "--mapped-files=owner"]);
        let readable = Some(secret == 0o644);
        assert_eq!((has_code(read(false)), has_code(read(true))), (readable, readable));
        drop(mounted);
        let mounted = mount(&["--mapped-files=owner"]);
        assert_eq!((has_code(read(false)), has_code(read(true))), (readable, None));
        drop(mounted);
    }

    // In another user's directory, there may be any file.
    let status = Command::new("chown").args(["-R", "root"]).arg(&images).status();
    assert!(status.unwrap().success());
    std::os::unix::fs::chown(&images, Some(65534), None).unwrap();
    let mounted = mount(&["--allow-other", "--mapped-files=owner"]);
    assert_eq!((has_code(read(false)), has_code(read(true))), (Some(false), None));
    assert!(nobody_gets(&["ls", live.path("mount").to_str().unwrap()]).is_none());
    drop(mounted);
}

#[test]
fn privileged_links_in_images_of_others_lead_to_nothing_of_ours() {
    require(Cap::Ptrace);
    require(Cap::Fuse);
    require(Cap::Program("setpriv"));
    let mut live = Live::workload("private_anon");
    fs::set_permissions(live.dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    live.images_name = "1";
    live.dump_running(&[]);
    live.images_name = "2";
    live.dump(&["--prev-images-dir", "../1"]);
    let (first, second, mount) = (live.path("1"), live.path("2"), live.path("mount"));
    let pages = |dir: &Path| {
        let head = document(&dir.join(format!("pagemap-{}.img", live.root)));
        format!("pages-{}.img", head["entries"][0]["pages_id"])
    };
    let shown = mount.join(pages(&second));
    let read = || nobody_gets(&["cat", shown.to_str().unwrap()]);
    // The parent belongs to root: files that not all users can read are shown to no other
    // user.
    give(&second);
    let mounted = Mounted::new(&second, &mount, &["--allow-other"]);
    assert!(read().is_none());
    assert!(fs::read(&shown).is_ok());
    assert!(mounted.log_text().contains("more than one user"));
    drop(mounted);
    // All of it belongs to the user nobody, and is shown.
    give(&first);
    let mounted = Mounted::new(&second, &mount, &["--allow-other"]);
    assert!(read().is_some_and(|bytes| !bytes.is_empty()));
    drop(mounted);
    // But not what a link in it leads to.
    let (own, secret) = (first.join(pages(&first)), live.path("secret"));
    fs::rename(&own, &secret).unwrap();
    std::os::unix::fs::chown(&secret, Some(0), None).unwrap();
    as_nobody(&["ln", "-s", secret.to_str().unwrap(), own.to_str().unwrap()]);
    let mounted = Mounted::new(&second, &mount, &["--allow-other"]);
    assert!(read().is_none());
    drop(mounted);
}

#[test]
fn privileged_images_of_others_free_nothing_of_ours() {
    require(Cap::Ptrace);
    require(Cap::Program("setpriv"));
    let mut live = Live::workload("private_anon");
    fs::set_permissions(live.dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    live.images_name = "1";
    live.dump_running(&[]);
    live.images_name = "2";
    live.dump(&[]);
    let (first, second) = (live.path("1"), live.path("2"));
    let pages = first.join(format!(
        "pages-{}.img",
        document(&first.join(format!("pagemap-{}.img", live.root)))["entries"][0]["pages_id"]
    ));
    let stored = || stored_bytes(&pages);
    let before = stored();
    let dedup = || {
        let mut dedup = Command::new(env!("CARGO_BIN_EXE_rcriu"));
        let output = dedup.args(["dedup", "-D"]).arg(&second).output().unwrap();
        (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    // A full dump, which supersedes all that its parent has, if that is its parent.
    give(&second);
    as_nobody(&["ln", "-s", first.to_str().unwrap(), second.join("parent").to_str().unwrap()]);
    let (done, said) = dedup();
    assert!(!done && said.contains("which belongs to user 0: its descendant"), "{said}");
    assert_eq!(stored(), before);
    // Nor does a link in the place of pages.
    give(&first);
    let secret = live.path("secret");
    fs::rename(&pages, &secret).unwrap();
    std::os::unix::fs::chown(&secret, Some(0), None).unwrap();
    as_nobody(&["ln", "-s", secret.to_str().unwrap(), pages.to_str().unwrap()]);
    let (done, said) = dedup();
    assert!(!done && said.contains("it is a symbolic link"), "{said}");
    assert_eq!(stored(), before);
    // What is all of one user's is freed.
    fs::remove_file(&pages).unwrap();
    fs::rename(&secret, &pages).unwrap();
    give(&first);
    let (done, said) = dedup();
    assert!(done && stored() < before, "{said}");
}
