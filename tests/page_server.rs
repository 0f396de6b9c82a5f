//! Page servers: memory of dumps that another machine takes, cut connections, and clients that send anything.

mod common;

use std::{
    collections::BTreeSet,
    fs,
    io::{Read, Write},
    net::{Shutdown, TcpStream},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use common::{
    Cap,
    live::{Live, directory, engine},
    page_server::{Server, bring},
    peer, require,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use proptest::test_runner::{Config, TestRunner};
use rcriu::{
    chain::{Chain, Summary},
    image::{MemoryId, Pagemap, PagemapEntry, Presence},
    pages::wire::{Command as Message, encode_memory},
    units::{PAGE_LEN, PageIndex},
};

/// Dumps a tree to a server.
fn dump_to(live: &mut Live, server: &Server, command: &str, arguments: &[&str]) -> Output {
    let of_server = server.arguments();
    let all: Vec<&str> =
        of_server.iter().map(String::as_str).chain(arguments.iter().copied()).collect();
    live.try_run(command, &all)
}

/// The images in a directory that a page server writes.
fn images_of_pages(dir: &Path) -> BTreeSet<String> {
    let names = fs::read_dir(dir).unwrap().flatten();
    let names = names.map(|entry| entry.file_name().into_string().unwrap());
    names.filter(|name| name.starts_with("page")).collect()
}

/// The private and shared pages that images leave to their parents.
fn in_parent(images: &Path) -> (u64, u64) {
    let dir = images.canonicalize().unwrap();
    let chain = Chain::open(&dir).unwrap();
    let summary = Summary::of(&chain, chain.at(&dir).unwrap()).unwrap();
    (summary.private.in_parent, summary.shared.in_parent)
}

fn restore_from(live: &mut Live, dir: &Path) {
    let output = live.try_restore_from(dir, &["-W", live.dir.path().to_str().unwrap()]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn privileged_a_tree_is_restored_from_pages_that_were_sent() {
    require(Cap::Ptrace);
    for state in ["cow_tree", "shared_anon", "sysv_shm", "memfd_mapping", "private_file"] {
        let mut live = Live::workload(state);
        let before = live.state();
        let received = live.path("received");
        let server = Server::start(&received, &[]);
        live.images_name = "sent";
        let arguments = server.arguments();
        live.dump(&arguments.each_ref().map(String::as_str));
        server.succeed();
        assert!(images_of_pages(&live.images()).is_empty(), "{state}");
        // Its pages are not zeros.
        let output = live.try_restore(&[]);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && said.contains("to a page server"), "{state}: {said}");
        bring(&live.images(), &received);
        restore_from(&mut live, &received);
        assert!(before.differences(&live.state_restored(&before)).is_empty(), "{state}");
        live.verdict();
    }
}

/// The parents' pages are at the server alone. What the trackers know is enough to leave pages to
/// them.
#[test]
fn privileged_a_chain_grows_at_the_server() {
    require(Cap::Ptrace);
    for state in ["cow_tree", "shared_anon", "private_file"] {
        let mut live = Live::workload(state);
        for (number, command, arguments) in [
            (1, "pre-dump", &["--track-mem"][..]),
            (2, "dump", &["--track-mem", "-R", "--prev-images-dir", "../sent1"]),
            (3, "dump", &["--prev-images-dir", "../sent2"]),
        ] {
            let received = live.path(&format!("received{number}"));
            let parent = format!("../received{}", number - 1);
            let parent: &[&str] =
                if number == 1 { &[] } else { &["--prev-images-dir", parent.as_str()] };
            let server = Server::start(&received, parent);
            live.images_name = ["", "sent1", "sent2", "sent3"][number];
            let output = dump_to(&mut live, &server, command, arguments);
            assert!(output.status.success(), "{state}: {}", live.complaint(&output, "dump.log"));
            server.succeed();
            bring(&live.images(), &received);
        }
        live.wait_gone();
        let received = live.path("received3");
        // tests/track.rs has larger ones.
        assert!(in_parent(&received).0 > 0, "{state}");
        restore_from(&mut live, &received);
        live.verdict();
    }
}

/// A server that lacks the parent gets all pages, and a parent that the dump has itself is compared.
#[test]
fn privileged_a_parent_counts_only_if_both_have_it() {
    require(Cap::Ptrace);
    let mut live = Live::workload("cow_tree");
    live.images_name = "first";
    live.dump_running(&["--track-mem"]);
    let received = live.path("without");
    let server = Server::start(&received, &[]);
    live.images_name = "second";
    let arguments = ["-R", "--track-mem", "--prev-images-dir", "../first"];
    let output = dump_to(&mut live, &server, "dump", &arguments);
    assert!(output.status.success(), "{}", live.complaint(&output, "dump.log"));
    server.succeed();
    bring(&live.images(), &received);
    assert_eq!(in_parent(&received), (0, 0));
    let received = live.path("with");
    let server = Server::start(&received, &["--prev-images-dir", "../first"]);
    live.images_name = "third";
    let output = dump_to(&mut live, &server, "dump", &["--prev-images-dir", "../first"]);
    assert!(output.status.success(), "{}", live.complaint(&output, "dump.log"));
    server.succeed();
    live.wait_gone();
    bring(&live.images(), &received);
    assert!(in_parent(&received).0 > 0);
    restore_from(&mut live, &received);
    live.verdict();
}

/// The wrong directory at the server costs room, and nothing else.
#[test]
fn privileged_a_parent_of_another_dump_does_not_count() {
    require(Cap::Ptrace);
    let mut live = Live::workload("cow_tree");
    for (name, images) in [("received1", "sent1"), ("received2", "sent2")] {
        let server = Server::start(&live.path(name), &[]);
        live.images_name = images;
        let output = dump_to(&mut live, &server, "dump", &["-R", "--track-mem"]);
        assert!(output.status.success(), "{}", live.complaint(&output, "dump.log"));
        server.succeed();
    }
    for (images, parent, counts) in
        [("sent3", "../received1", false), ("sent4", "../received2", true)]
    {
        let received = live.path(&format!("for-{images}"));
        let server = Server::start(&received, &["--prev-images-dir", parent]);
        live.images_name = images;
        let output = dump_to(&mut live, &server, "dump", &["-R", "--prev-images-dir", "../sent2"]);
        assert!(output.status.success(), "{}", live.complaint(&output, "dump.log"));
        server.succeed();
        let holes = images_of_pages(&received)
            .iter()
            .filter(|name| MemoryId::of_pagemap(name).is_some())
            .flat_map(|name| Pagemap::read(&received.join(name)).unwrap().entries)
            .filter(|entry| entry.presence == Presence::Parent)
            .count();
        assert_eq!(holes > 0, counts, "{images}: {holes}");
    }
    live.verdict();
}

/// Whichever end fails, the tree runs on, and neither end has anything that counts as pages.
#[test]
fn privileged_a_cut_connection_leaves_nothing() {
    require(Cap::Ptrace);
    let mut live = Live::workload("cow_tree");
    let before = live.state();
    let received = live.path("received");
    live.images_name = "sent";
    for how in ["", ":kill"] {
        for (of_server, of_dump) in [
            (Some("page-server-memory"), None),
            (Some("page-server-written"), None),
            (None, Some("dump-memory")),
            (None, Some("dump-written")),
            (None, Some("dump-synced")),
        ] {
            let named = |name: &str| format!("{name}{how}");
            let fault = of_server.map(named);
            let server = Server::start_faulty(&received, &[], fault.as_deref());
            live.fault = of_dump.map(named);
            let output = dump_to(&mut live, &server, "dump", &[]);
            live.fault = None;
            let case = format!("{of_server:?} {of_dump:?} {how}");
            assert!(!output.status.success(), "{case}");
            let output = server.end();
            assert!(!output.status.success(), "{case}");
            assert!(images_of_pages(&received).is_empty(), "{case}");
            assert!(!live.images().join("inventory.img").exists(), "{case}");
            assert!(before.differences(&live.state_after(&before)).is_empty(), "{case}");
        }
    }
    let server = Server::start(&received, &[]);
    let arguments = server.arguments();
    live.dump(&arguments.each_ref().map(String::as_str));
    server.succeed();
    bring(&live.images(), &received);
    restore_from(&mut live, &received);
    live.verdict();
}

#[test]
fn privileged_connected_sockets_are_used() {
    require(Cap::Ptrace);
    let mut live = Live::workload("shared_anon");
    let received = live.path("received");
    fs::create_dir(&received).unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut command = Command::new(engine());
    command.args(["page-server", "--ps-socket", "0", "-D"]).arg(&received);
    let server = command.stdin(std::os::fd::OwnedFd::from(theirs)).spawn().unwrap();
    live.images_name = "sent";
    fs::create_dir(live.images()).unwrap();
    live.tree();
    let mut command = Command::new(engine());
    command.args(["dump", "--page-server", "--ps-socket", "0", "-t"]).arg(live.root.to_string());
    // Our own end stays open, so that only a message ends the session.
    let end = ours.try_clone().unwrap();
    command.arg("-D").arg(live.images()).stdin(std::os::fd::OwnedFd::from(end));
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let output = server.wait_with_output().unwrap();
    assert!(output.status.success());
    drop(ours);
    live.wait_gone();
    bring(&live.images(), &received);
    restore_from(&mut live, &received);
    live.verdict();
}

#[test]
fn directories_with_other_images_are_refused() {
    let dir = directory();
    fs::write(dir.path().join("inventory.img"), "").unwrap();
    let run = |arguments: &[&str]| {
        let output = Command::new(engine()).args(arguments).output().unwrap();
        assert!(!output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    let said = run(&["page-server", "-D", text(dir.path())]);
    assert!(said.contains("holds inventory.img, which belongs to another dump"), "{said}");
    fs::remove_file(dir.path().join("inventory.img")).unwrap();
    let said = run(&["page-server", "-D", text(dir.path()), "--prev-images-dir", "absent"]);
    assert!(said.contains("--prev-images-dir is relative to -D"), "{said}");
    // Two servers.
    let server = Server::start(dir.path(), &[]);
    let said = run(&["page-server", "-D", text(dir.path())]);
    assert!(said.contains("is in use by"), "{said}");
    drop(server.connect());
    assert!(server.fail().contains("has ended the connection before"));
}

/// A dump that ends in a directory that has pages would be mixed with them.
#[test]
fn privileged_pages_of_another_dump_are_not_mixed_in() {
    require(Cap::Ptrace);
    let mut live = Live::workload("private_anon");
    let server = Server::start(&live.path("received"), &[]);
    fs::create_dir(live.images()).unwrap();
    fs::write(live.images().join("pages-1.img"), "").unwrap();
    let output = dump_to(&mut live, &server, "dump", &[]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("holds pages-1.img"), "{said}");
    drop(server.connect());
    server.fail();
    live.verdict();
}

fn add(memory: MemoryId, first: u64, pages: u64, presence: Presence) -> Vec<u8> {
    let entry = PagemapEntry { first: PageIndex(first), pages, presence, lazy: false };
    Message::Add { memory: encode_memory(memory), entry }.encode().to_vec()
}

/// Sends bytes to a server and returns what it says when it has ended.
fn say(dir: &Path, arguments: &[&str], bytes: &[u8]) -> String {
    let server = Server::start(dir, arguments);
    let mut stream = server.connect();
    // It may end before it has read all.
    let _ = stream.write_all(bytes);
    let _ = stream.shutdown(Shutdown::Write);
    let _ = stream.read_to_end(&mut Vec::new());
    let said = server.fail();
    assert!(images_of_pages(dir).is_empty(), "{said}");
    assert!(!dir.join(".received").exists(), "{said}");
    said
}

#[test]
fn clients_that_break_the_protocol_are_refused() {
    let dir = directory();
    let memory = MemoryId::Private(7);
    let open = Message::Open { memory, answered: true }.encode().to_vec();
    let page = vec![1; PAGE_LEN];
    let huge = add(memory, 1, 1 << 50, Presence::Present);
    let mut beyond = huge.clone();
    beyond[8..16].copy_from_slice(&(u64::MAX >> 12).to_le_bytes());
    let get = Message::Get { pid: 7, first: PageIndex(1), pages: 1 }.encode().to_vec();
    let one = add(memory, 2, 1, Presence::Present);
    let two = add(memory, 2, 2, Presence::Present);
    let hole = add(memory, 1, 1, Presence::Parent);
    let shared = add(MemoryId::Shared(7), 1, 1, Presence::Present);
    let cases: [(&[&[u8]], &str); 10] = [
        (&[], "has ended the connection before"),
        (&[&open], "has ended the connection before"),
        (&[&open[..20]], "has ended the connection before"),
        (&[&open, &two, &page], "has ended the connection before"),
        (&[&open, &huge, &page], "has ended the connection before"),
        (
            &[&open, &beyond, &page],
            "message 1 of the client: 4503599627370495 pages at 0x1000: it ends",
        ),
        (&[&one, &page], "while no memory is open"),
        (&[&open, &shared, &page], "of memory 0x702 while pid 7 is open"),
        (&[&open, &one, &page, &one, &page], "has sent 1 pages at 0x2000 after pages up to 0x3000"),
        (&[&open, &hole], "does not have them all"),
    ];
    for (messages, expected) in cases {
        let said = say(dir.path(), &[], &messages.concat());
        assert!(said.contains(expected), "{said}");
    }
    let said = say(dir.path(), &[], &get);
    assert!(said.contains("asks for pages, but this server only takes them"), "{said}");
    let said = say(dir.path(), &[], b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n");
    assert!(said.contains("message 0 of the client: unknown command 0x4547"), "{said}");
}

#[test]
fn any_bytes_do_no_harm() {
    let dir = directory();
    let config = Config { cases: 24, failure_persistence: None, ..Config::default() };
    let strategy = proptest::collection::vec(
        (0..10_u16, 0..3_u16, 0..3_u64, 0..4_u64, 0..4_u64, 0..5000_usize),
        0..6,
    );
    TestRunner::new(config)
        .run(&strategy, |messages| {
            let mut bytes = Vec::new();
            for (command, flags, pages, page, memory, extra) in messages {
                bytes.extend(command.to_le_bytes());
                bytes.extend((flags * 2).to_le_bytes());
                bytes.extend([0; 4]);
                for long in [pages, page * 4096, memory << 8 | 1] {
                    bytes.extend(long.to_le_bytes());
                }
                bytes.extend(vec![0x55; extra]);
            }
            say(dir.path(), &[], &bytes);
            Ok(())
        })
        .unwrap();
}

/// Holes are compared with what the parent has.
#[test]
fn holes_must_be_in_the_parent() {
    let dir = directory();
    let (base, next) = (dir.path().join("base"), dir.path().join("next"));
    let memory = MemoryId::Private(7);
    let open = Message::Open { memory, answered: true }.encode().to_vec();
    let server = Server::start(&base, &[]);
    let mut stream = server.connect();
    let mut bytes = [&open[..], &add(memory, 4, 2, Presence::Present)].concat();
    bytes.extend(vec![7; 2 * PAGE_LEN]);
    bytes.extend(Message::Close { forced: false }.encode());
    stream.write_all(&bytes).unwrap();
    let mut answers = [9; 5];
    stream.read_exact(&mut answers).unwrap();
    assert_eq!(answers, [0; 5], "no parent, and all is well");
    drop(stream);
    server.succeed();
    assert_eq!(images_of_pages(&base), ["pagemap-7.img", "pages-1.img"].map(str::to_owned).into());
    let parent = ["--prev-images-dir", "../base"];
    for (first, pages) in [(3, 1), (3, 2), (5, 2), (6, 1)] {
        let bytes = [&open[..], &add(memory, first, pages, Presence::Parent)].concat();
        let said = say(&next, &parent, &bytes);
        assert!(said.contains("does not have them all"), "{first}, {pages}: {said}");
    }
    // Pages that may have been freed do not count.
    let pages = fs::read(base.join("pages-1.img")).unwrap();
    fs::write(base.join("pages-1.img"), &pages[..PAGE_LEN]).unwrap();
    let said = say(&next, &parent, &[&open[..], &add(memory, 4, 1, Presence::Parent)].concat());
    assert!(said.contains("does not have them all"), "{said}");
    fs::write(base.join("pages-1.img"), &pages).unwrap();
    let server = Server::start(&next, &parent);
    let mut stream = server.connect();
    let ask = Message::Parent(memory).encode();
    let close = Message::Close { forced: false }.encode();
    let hole = add(memory, 4, 2, Presence::Parent);
    stream.write_all(&[&ask[..], &open, &hole, &close].concat()).unwrap();
    let mut answers = [9; 9];
    stream.read_exact(&mut answers).unwrap();
    assert_eq!(answers, [1, 0, 0, 0, 1, 0, 0, 0, 0]);
    drop(stream);
    server.succeed();
    assert_eq!(fs::read_link(next.join("parent")).unwrap(), Path::new("../base"));
}

/// Certificates of an authority for both ends, and of another authority for a stranger.
struct Certificates(tempfile::TempDir);

impl Certificates {
    fn make() -> Self {
        require(Cap::Program("openssl"));
        let script = "set -e
            new='-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 3'
            for ca in ca other; do
                openssl req -x509 $new -subj /CN=$ca -keyout $ca.key -out $ca.pem
            done
            sign() {
                openssl req $new -subj /CN=$1 -keyout $1.key -out $1.csr
                printf 'basicConstraints=CA:FALSE\\nsubjectAltName=%s\\n' $3 > $1.ext
                openssl x509 -req -in $1.csr -CA $2.pem -CAkey $2.key -CAcreateserial -days 3 \\
                    -extfile $1.ext -out $1.pem
            }
            sign server ca IP:127.0.0.1
            sign elsewhere ca DNS:elsewhere.example
            sign client ca IP:127.0.0.1
            sign stranger other IP:127.0.0.1
            touch index
            printf '[ca]\\ndefault_ca=a\\n[a]\\ndatabase=index\\ndefault_md=sha256\\n' > config
            openssl ca -config config -keyfile ca.key -cert ca.pem -revoke client.pem
            openssl ca -config config -keyfile ca.key -cert ca.pem -gencrl -crldays 3 -out revoked.pem";
        let dir = directory();
        let mut command = Command::new("sh");
        let output = command.args(["-c", script]).current_dir(dir.path()).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Self(dir)
    }

    /// The options of an end with a certificate.
    fn of(&self, name: &str, authority: &str, more: &[&str]) -> Vec<String> {
        let path = |file: String| self.0.path().join(file).to_str().unwrap().to_owned();
        let mut options = vec!["--tls".to_owned()];
        for (option, file) in [
            ("--tls-cacert", format!("{authority}.pem")),
            ("--tls-cert", format!("{name}.pem")),
            ("--tls-key", format!("{name}.key")),
        ] {
            options.extend([option.to_owned(), path(file)]);
        }
        for word in more {
            options.push(if word.ends_with(".pem") {
                path((*word).to_owned())
            } else {
                (*word).to_owned()
            });
        }
        options
    }
}

fn words(options: &[String]) -> Vec<&str> {
    options.iter().map(String::as_str).collect()
}

#[test]
fn privileged_both_ends_of_an_encrypted_connection_know_each_other() {
    require(Cap::Ptrace);
    let certificates = Certificates::make();
    let mut live = Live::workload("cow_tree");
    let before = live.state();
    let received = live.path("received");
    live.images_name = "sent";
    let server = certificates.of("server", "ca", &[]);
    let client = certificates.of("client", "ca", &[]);
    let revoking = certificates.of("server", "ca", &["--tls-cacrl", "revoked.pem"]);
    let stranger = certificates.of("stranger", "ca", &[]);
    let of_other = certificates.of("client", "other", &[]);
    let elsewhere = certificates.of("elsewhere", "ca", &[]);
    let any_name = certificates.of("client", "ca", &["--tls-no-cn-verify"]);
    let nothing = Vec::new();
    for (of_server, of_dump, problem) in [
        (&server, &stranger, ""),
        (&server, &of_other, "invalid peer certificate: UnknownIssuer"),
        (&elsewhere, &client, "invalid peer certificate: certificate not valid for name"),
        (&revoking, &client, ""),
        (&server, &nothing, ""),
        (&nothing, &client, "agree on TLS"),
    ] {
        let server = Server::start(&received, &words(of_server));
        let output = dump_to(&mut live, &server, "dump", &words(of_dump));
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && said.contains(problem), "{problem}: {said}");
        let said = server.fail();
        assert!(images_of_pages(&received).is_empty(), "{said}");
        assert!(before.differences(&live.state_after(&before)).is_empty(), "{said}");
    }
    // A key that belongs to another certificate is refused before anything listens.
    let mut wrong = certificates.of("server", "ca", &[]);
    wrong.pop();
    wrong.push("/dev/null".to_owned());
    let mut command = Command::new(engine());
    let output =
        command.args(["page-server", "-D", text(&received)]).args(&wrong).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("(--tls-key)"), "{said}");
    let server = Server::start(&received, &words(&elsewhere));
    let output = dump_to(&mut live, &server, "dump", &words(&any_name));
    assert!(output.status.success(), "{}", live.complaint(&output, "dump.log"));
    server.succeed();
    live.wait_gone();
    bring(&live.images(), &received);
    restore_from(&mut live, &received);
    live.verdict();
}

/// The other program, if it speaks the same protocol: `criu` of version 4.2, or newer.
fn criu() -> PathBuf {
    require(Cap::Peer("criu"));
    let path = peer("criu").unwrap();
    let output = Command::new(&path).arg("--version").output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let version = said.split_whitespace().nth(1).unwrap_or_default();
    let mut numbers = version.split('.').map(|number| number.parse().unwrap_or(0));
    let version: (u32, u32) = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version < (4, 2) {
        common::skip("CRIU 4.2 (its protocol has longer heads than that of older ones)");
    }
    path
}

/// Dumps by one program to the server of another one, encrypted or not, and a restore by both.
#[test]
fn privileged_pages_go_to_and_from_criu() {
    require(Cap::Ptrace);
    let criu = criu();
    let certificates = Certificates::make();
    for (dumps, serves) in [(true, false), (false, true)] {
        for (restores, encrypted) in [(true, false), (false, false), (false, true)] {
            let of = |name| {
                if encrypted { certificates.of(name, "ca", &[]) } else { Vec::new() }
            };
            let program = |is_criu: bool| if is_criu { criu.clone().into() } else { engine() };
            let mut live = Live::workload("cow_tree");
            live.programs = (program(dumps), program(restores));
            let received = live.path("received");
            fs::create_dir(&received).unwrap();
            let port = free_port();
            let mut command = Command::new(program(serves));
            command.args(["page-server", "--address", "127.0.0.1", "--port", &port, "-D"]);
            let messages = fs::File::create(live.path("server.log")).unwrap();
            let (ready, status) = std::io::pipe().unwrap();
            // The shell's descriptor 1 becomes that of the status.
            command.arg(&received).args(["--status-fd", "1", "-o", "server.log"]);
            command.args(of("server"));
            let server = command.stdin(Stdio::null()).stdout(status).stderr(messages).spawn();
            let mut server = server.unwrap();
            drop(command);
            let mut byte = [1];
            { ready }.read_exact(&mut byte).unwrap();
            live.images_name = "sent";
            let arguments = ["--page-server", "--address", "127.0.0.1", "--port", &port];
            live.dump(&[&arguments[..], &words(&of("client"))].concat());
            assert!(server.wait().unwrap().success(), "dumps {dumps}, restores {restores}");
            bring(&live.images(), &received);
            restore_from(&mut live, &received);
            live.verdict();
        }
    }
}

/// A port that was free just now.
fn free_port() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port().to_string()
}

/// The server in the background is found by its pid file.
#[test]
fn a_server_goes_to_the_background() {
    let dir = directory();
    let images = dir.path().join("images");
    fs::create_dir(&images).unwrap();
    let mut command = Command::new(engine());
    command.args(["page-server", "-d", "--pidfile", "pid", "-v4", "-o", "log", "-D"]).arg(&images);
    let output = command.args(["--address", "127.0.0.1"]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let port: u16 = String::from_utf8(output.stdout).unwrap().trim().parse().unwrap();
    let pid: i32 = fs::read_to_string(images.join("pid")).unwrap().parse().unwrap();
    drop(TcpStream::connect(("127.0.0.1", port)).unwrap());
    common::live::wait_for("the end of the server", || {
        let state = common::live::state_of(pid);
        state.is_none_or(|state| state == 'Z') || kill(Pid::from_raw(pid), None::<Signal>).is_err()
    });
    let log = fs::read_to_string(images.join("log")).unwrap();
    assert!(log.contains("has ended the connection before"), "{log}");
}

/// The tree runs on while its private memory is sent.
#[test]
fn privileged_a_dump_without_a_pause_goes_to_a_server() {
    require(Cap::Ptrace);
    let mut live = Live::workload("cow_tree");
    let received = live.path("received");
    let server = Server::start(&received, &[]);
    live.images_name = "sent";
    let output = dump_to(&mut live, &server, "dump", &["-R", "--live"]);
    assert!(output.status.success(), "{}", live.complaint(&output, "dump.log"));
    server.succeed();
    live.kill();
    bring(&live.images(), &received);
    let output = live.try_restore_from(&received, &["-W", text(live.dir.path()), "--lazy"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    live.verdict();
}
