//! Programs that people run, dumped in the middle of their work and restored;
//! each is asked afterwards what it still knows.
//!
//! All of it needs root. Servers listen on the loopback device, on ports below
//! those that the kernel gives out, with directories of their own.

mod common;

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    path::Path,
    process::Command,
};

use common::{
    Cap,
    live::{Live, directory, wait_for},
    net::{connect, port},
    redis::{open_sockets, redis},
    require,
};
use nix::sys::signal::{Signal, kill};

/// Debian's own Python: the first one in the search path may be a script of a version manager.
const PYTHON: &str = "/usr/bin/python3";

/// Dumps and restores a program that keeps to the protocol of the states.
fn round_trip(live: &mut Live) {
    live.wait_ready();
    let before = live.tree().len();
    live.dump(&[]);
    live.restore(&[]);
    assert_eq!(live.tree().len(), before, "processes");
    live.verdict();
}

/// Starts a script of an interpreter; its argument is the status file.
fn script(program: &str, arguments: &[&str], name: &str, text: &str) -> Live {
    let dir = directory();
    let path = dir.path().join(name);
    fs::write(&path, text).unwrap();
    let status = dir.path().join("status");
    let words = [arguments, &[path.to_str().unwrap(), status.to_str().unwrap()]].concat();
    Live::program(program, &words, dir)
}

#[test]
fn privileged_python() {
    require(Cap::Ptrace);
    assert!(Path::new(PYTHON).exists(), "this test needs {PYTHON}");
    let mut live = script(PYTHON, &[], "script.py", include_str!("programs/compute.py"));
    round_trip(&mut live);
}

/// As the JVM does with its performance data.
#[test]
fn privileged_a_lock_that_only_a_mapping_holds_is_warned_about() {
    require(Cap::Ptrace);
    let text = "import fcntl, mmap, os, sys, time
status = sys.argv[1]
file = open(status + '.locked', 'w+')
file.write('x' * 4096)
file.flush()
fcntl.flock(file, fcntl.LOCK_EX)
memory = mmap.mmap(file.fileno(), 4096)
file.close()
for fd in range(3, 64):
    try:
        os.close(fd)
    except OSError:
        pass
def say(text):
    with open(status + '.new', 'w') as out:
        out.write(text)
    os.rename(status + '.new', status)
say('ready\\n')
while not os.path.exists(status + '.go'):
    time.sleep(0.02)
say('ok\\n' if memory[:4] == b'xxxx' else 'other bytes\\n')
";
    let mut live = script(PYTHON, &[], "locked.py", text);
    live.wait_ready();
    let output = live.try_dump(&["-R"]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
    assert!(said.contains("holds a write lock of flock(2)"), "{said}");
    fs::remove_dir_all(live.images()).unwrap();
    round_trip(&mut live);
}

#[test]
fn privileged_bash_pipeline() {
    require(Cap::Ptrace);
    require(Cap::Program("bash"));
    let mut live = script("bash", &[], "script.sh", include_str!("programs/pipeline.sh"));
    live.wait_ready();
    live.dump(&[]);
    live.restore(&[]);
    live.verdict();
}

#[test]
fn privileged_node() {
    require(Cap::Ptrace);
    require(Cap::Program("node"));
    round_trip(&mut script("node", &[], "script.js", include_str!("programs/compute.js")));
}

#[test]
fn privileged_java() {
    require(Cap::Ptrace);
    require(Cap::Program("java"));
    let text = include_str!("programs/Compute.java");
    round_trip(&mut script("java", &["-Xmx128m"], "Compute.java", text));
}

#[test]
fn privileged_c_threads() {
    require(Cap::Ptrace);
    require(Cap::Program("cc"));
    let dir = directory();
    let (source, program) = (dir.path().join("threads.c"), dir.path().join("threads"));
    fs::write(&source, include_str!("programs/threads.c")).unwrap();
    let built =
        Command::new("cc").args(["-O1", "-pthread", "-o"]).args([&program, &source]).status();
    assert!(built.unwrap().success(), "the program cannot be compiled");
    let status = dir.path().join("status").to_str().unwrap().to_owned();
    let mut live = Live::program(program.to_str().unwrap(), &[&status], dir);
    round_trip(&mut live);
}

/// Before a user is authenticated, sshd reads from the network in a process that a seccomp filter
/// kills for most system calls.
#[test]
fn privileged_sshd_in_its_sandbox() {
    require(Cap::Ptrace);
    require(Cap::Program("sshd"));
    let dir = directory();
    let key = dir.path().join("key");
    let mut keys = Command::new("ssh-keygen");
    keys.args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(&key);
    assert!(keys.status().unwrap().success(), "no key can be made");
    // Debian's service makes it at its start.
    fs::create_dir_all("/run/sshd").unwrap();
    let (key, port) = (key.to_str().unwrap().to_owned(), port());
    let options = ["ListenAddress=127.0.0.1", "PidFile=none", "LoginGraceTime=0"];
    let number = port.to_string();
    let mut words = vec!["-D", "-f", "/dev/null", "-h", &key, "-p", &number];
    options.iter().for_each(|option| words.extend(["-o", option]));
    let mut live = Live::program("/usr/sbin/sshd", &words, dir);
    let mut client = connect(port);
    let confined = |live: &mut Live| -> Vec<i32> {
        let mut pids = live.tree();
        pids.retain(|pid| {
            let status = fs::read_to_string(format!("/proc/{pid}/status"));
            status.is_ok_and(|text| text.contains("\nSeccomp:\t2\n"))
        });
        pids
    };
    let mut banner = String::new();
    BufReader::with_capacity(1, &client).read_line(&mut banner).unwrap();
    client.write_all(b"SSH-2.0-test\r\n").unwrap();
    let mut bytes = [0; 4];
    client.read_exact(&mut bytes).unwrap();
    let mut algorithms = vec![0; usize::try_from(u32::from_be_bytes(bytes)).unwrap()];
    client.read_exact(&mut algorithms).unwrap();
    let before = confined(&mut live);
    assert_eq!(before.len(), 1, "the process in the sandbox");
    live.dump(&["--tcp-established"]);
    live.restore(&["--tcp-established"]);
    assert_eq!(confined(&mut live), before);
    // A packet of an impossible type, which the process in the sandbox answers.
    client.write_all(&[&[0, 0, 0, 12, 10][..], &[0; 20]].concat()).unwrap();
    let mut answer = Vec::new();
    client.read_to_end(&mut answer).unwrap();
    let answer = String::from_utf8_lossy(&answer).into_owned();
    assert!(answer.contains("Invalid ssh2 packet type: 0"), "{answer:?}");
    let mut again = String::new();
    BufReader::new(connect(port)).read_line(&mut again).unwrap();
    assert_eq!(again, banner);
}

#[test]
fn privileged_four_gib() {
    require(Cap::Ptrace);
    let mut live = Live::workload("four_gib");
    live.dump(&[]);
    live.restore(&[]);
    // The pages have been read; room for the next.
    fs::remove_dir_all(live.images()).unwrap();
    live.verdict();
}

fn redis_value(number: usize) -> String {
    format!("value {number} ").repeat(number % 50 + 1)
}

/// Adds a list of numbers in redis itself.
fn redis_sum(stream: &mut BufReader<TcpStream>) -> String {
    let program = "local s = 0 for _, v in ipairs(redis.call('lrange', KEYS[1], 0, -1)) do \
                   s = s + tonumber(v) end return tostring(s)";
    redis(stream, &["EVAL", program, "1", "numbers"])
}

#[test]
fn privileged_redis() {
    const KEYS: usize = 2000;
    require(Cap::Ptrace);
    require(Cap::Program("redis-server"));
    let (dir, port) = (directory(), port());
    let (place, number) = (dir.path().to_str().unwrap().to_owned(), port.to_string());
    let arguments = ["--port", &number, "--bind", "127.0.0.1", "--dir", &place, "--save", ""];
    let mut live = Live::program("redis-server", &arguments, dir);
    let mut client = BufReader::new(connect(port));
    for number in 0..KEYS {
        let (key, value) = (format!("key:{number}"), redis_value(number));
        assert_eq!(redis(&mut client, &["SET", &key, &value]), "OK");
        redis(&mut client, &["RPUSH", "numbers", &number.to_string()]);
    }
    assert_eq!(redis(&mut client, &["SET", "passing", "x", "EX", "1000"]), "OK");
    let sum = redis_sum(&mut client);
    assert_eq!(sum, (KEYS * (KEYS - 1) / 2).to_string());
    drop(client);
    // Idle is when the server has seen the end of its client.
    wait_for("the server to be idle", || open_sockets(live.root.as_raw()) == 1);

    live.dump(&[]);
    live.restore(&[]);

    let mut client = BufReader::new(connect(port));
    assert_eq!(redis(&mut client, &["DBSIZE"]), format!(":{}", KEYS + 2));
    for number in 0..KEYS {
        let found = redis(&mut client, &["GET", &format!("key:{number}")]);
        assert_eq!(found, redis_value(number));
    }
    assert_eq!(redis_sum(&mut client), sum);
    let left = redis(&mut client, &["TTL", "passing"]);
    let left: i32 = left.trim_start_matches(':').parse().unwrap();
    assert!((1..=1000).contains(&left), "{left} s left");
    assert_eq!(redis(&mut client, &["SET", "new", "value"]), "OK");
    // A fork of its own, and threads.
    assert_eq!(redis(&mut client, &["SAVE"]), "OK");
    assert!(live.path("dump.rdb").exists());
    assert!(redis(&mut client, &["BGSAVE"]).contains("started"));
    wait_for("the child's snapshot", || {
        redis(&mut client, &["INFO", "persistence"]).contains("rdb_bgsave_in_progress:0")
    });
    assert!(redis(&mut client, &["INFO", "persistence"]).contains("rdb_last_bgsave_status:ok"));
    assert_eq!(redis(&mut client, &["FLUSHALL", "ASYNC"]), "OK");
}

/// Clients that hold on: one has subscribed, one has begun a transaction, one waits for a list.
#[test]
fn privileged_redis_with_clients() {
    const ESTABLISHED: &str = "--tcp-established";
    require(Cap::Ptrace);
    require(Cap::Program("redis-server"));
    require(Cap::Fuse);
    let (dir, port) = (directory(), port());
    let (place, number) = (dir.path().to_str().unwrap().to_owned(), port.to_string());
    let arguments = ["--port", &number, "--bind", "127.0.0.1", "--dir", &place, "--save", ""];
    let mut live = Live::program("redis-server", &arguments, dir);
    let client = || BufReader::new(connect(port));
    let [mut subscriber, mut buyer, mut waiter, mut other] =
        [client(), client(), client(), client()];
    let lines = |stream: &mut BufReader<TcpStream>, count: usize| {
        let mut text = String::new();
        (0..count).for_each(|_| assert!(stream.read_line(&mut text).unwrap() > 0));
        text
    };
    // An array: what it is, the channel, and how many there are.
    redis(&mut subscriber, &["SUBSCRIBE", "news"]);
    assert!(lines(&mut subscriber, 5).contains("news"));
    assert_eq!(redis(&mut buyer, &["MULTI"]), "OK");
    assert_eq!(redis(&mut buyer, &["INCRBY", "stock", "5"]), "QUEUED");
    waiter.get_mut().write_all(b"*3\r\n$5\r\nBLPOP\r\n$5\r\nqueue\r\n$1\r\n0\r\n").unwrap();
    wait_for("a blocked client", || {
        redis(&mut other, &["INFO", "clients"]).contains("blocked_clients:1")
    });
    live.through_a_chain(&[ESTABLISHED], |_| {
        assert_eq!(redis(&mut other, &["SET", "key", "value"]), "OK");
    });

    assert_eq!(redis(&mut other, &["GET", "key"]), "value");
    assert_eq!(redis(&mut other, &["PUBLISH", "news", "all is well"]), ":1");
    assert!(lines(&mut subscriber, 7).ends_with("all is well\r\n"));
    assert_eq!(redis(&mut buyer, &["INCRBY", "stock", "2"]), "QUEUED");
    redis(&mut buyer, &["EXEC"]);
    assert_eq!(lines(&mut buyer, 2), ":5\r\n:7\r\n");
    assert_eq!(redis(&mut other, &["RPUSH", "queue", "work"]), ":1");
    assert!(lines(&mut waiter, 5).ends_with("work\r\n"));
    assert_eq!(redis(&mut other, &["DBSIZE"]), ":2");
}

fn http_get(port: u16, path: &str) -> String {
    let mut stream = connect(port);
    write!(stream, "GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}

#[test]
fn privileged_nginx() {
    require(Cap::Ptrace);
    require(Cap::Program("nginx"));
    let (dir, port) = (directory(), port());
    let page = "what the server serves\n".repeat(1000);
    fs::write(dir.path().join("page.txt"), &page).unwrap();
    fs::create_dir(dir.path().join("tmp")).unwrap();
    let place = dir.path().to_str().unwrap().to_owned();
    let text = include_str!("programs/nginx.conf");
    let text = text.replace("@DIR@", &place).replace("@PORT@", &port.to_string());
    fs::write(dir.path().join("nginx.conf"), text).unwrap();
    let config = format!("{place}/nginx.conf");
    let log = format!("{place}/error.log");
    let mut live = Live::program("nginx", &["-e", &log, "-p", &place, "-c", &config], dir);
    let answer = http_get(port, "/page.txt");
    assert!(answer.ends_with(&page), "{answer:.300}");
    wait_for("two workers", || live.tree().len() == 3);
    let workers = live.tree();
    // Idle is when no worker has a client.
    wait_for("the workers to be idle", || http_idle(&workers));

    live.dump(&[]);
    live.restore(&[]);

    let mut restored = live.tree();
    restored.sort_unstable();
    let mut before = workers.clone();
    before.sort_unstable();
    assert_eq!(restored, before);
    for _ in 0..20 {
        assert!(http_get(port, "/page.txt").ends_with(&page));
    }
    assert!(http_get(port, "/missing").starts_with("HTTP/1.1 404"));
    // The master still rules its workers.
    kill(live.root, Signal::SIGHUP).unwrap();
    wait_for("new workers", || {
        let tree = live.tree();
        tree.len() == 3 && tree.iter().filter(|pid| workers.contains(pid)).count() == 1
    });
    assert!(http_get(port, "/page.txt").ends_with(&page));
    kill(live.root, Signal::SIGQUIT).unwrap();
    live.wait_gone();
}

/// Whether none of some processes has a connection of TCP.
fn http_idle(pids: &[i32]) -> bool {
    let table = fs::read_to_string("/proc/net/tcp").unwrap();
    let established = table.lines().skip(1).filter_map(|line| {
        let fields: Vec<_> = line.split_whitespace().collect();
        (fields[3] == "01").then(|| format!("socket:[{}]", fields[9]))
    });
    let established: Vec<_> = established.collect();
    pids.iter().all(|pid| {
        let links = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
        links
            .filter_map(|link| fs::read_link(link.path()).ok())
            .all(|link| !established.iter().any(|socket| link.as_os_str() == socket.as_str()))
    })
}

fn git(dir: &Path, arguments: &[&str]) -> String {
    let mut git = Command::new("git");
    git.args(["-c", "user.name=a", "-c", "user.email=a@b", "-C"]).arg(dir).args(arguments);
    let output = git.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Five processes and four pipes; the other side stands still after the first MiB.
#[test]
fn privileged_git_in_the_middle_of_a_clone() {
    require(Cap::Ptrace);
    require(Cap::Program("git"));
    require(Cap::Program(PYTHON));
    require(Cap::Fuse);
    let dir = directory();
    let place = dir.path().to_owned();
    let origin = place.join("origin");
    fs::create_dir(&origin).unwrap();
    git(&origin, &["init", "--quiet"]);
    for file in 0..8 {
        let mut noise = vec![0; 1 << 20];
        fs::File::open("/dev/urandom").unwrap().read_exact(&mut noise).unwrap();
        fs::write(origin.join(format!("file{file}")), noise).unwrap();
    }
    git(&origin, &["add", "."]);
    git(&origin, &["commit", "--quiet", "--message", "all of it"]);
    let script = place.join("halting.py");
    fs::write(&script, include_str!("programs/halting.py")).unwrap();
    let (halted, go) = (place.join("halted"), place.join("go"));
    let upload = format!(
        "{PYTHON} {} {} {} git-upload-pack",
        script.display(),
        halted.display(),
        go.display()
    );
    let from = format!("file://{}", origin.display());
    let clone = ["clone", "--quiet", "--no-local", "--upload-pack", &upload, &from, "clone"];
    let mut live = Live::program("git", &clone, dir);
    wait_for("the first MiB", || halted.exists());

    live.through_a_chain(&[], |_| ());
    fs::write(&go, "").unwrap();
    live.wait_gone();

    let clone = place.join("clone");
    git(&clone, &["fsck", "--full"]);
    assert_eq!(git(&clone, &["rev-parse", "HEAD"]), git(&origin, &["rev-parse", "HEAD"]));
    assert_eq!(git(&clone, &["status", "--porcelain"]), "");
}
