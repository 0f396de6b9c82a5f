//! Databases and other programs that lock files or watch them, dumped in the middle of their work.
//! Clients stay connected, and lose nothing.
//!
//! All of it needs root.

mod common;

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::{Ipv4Addr, TcpStream},
    os::unix::fs::{PermissionsExt, chown},
    path::Path,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    time::Duration,
};

use common::{
    Cap,
    live::{Live, directory, wait_for},
    net::port,
    require,
};

const PYTHON: &str = "/usr/bin/python3";

/// Which connections and locks are kept.
const OPTIONS: [&str; 2] = ["--tcp-established", "--file-locks"];

/// A user that is not root, which PostgreSQL insists on.
const NOBODY: u32 = 65_534;

/// Makes `setpriv(1)` execute a program as that user.
const USER: [&str; 3] = ["--reuid=65534", "--regid=65534", "--clear-groups"];

/// A transaction that has written, with either journal: no other process can write until it ends.
#[test]
fn privileged_sqlite_in_a_transaction() {
    require(Cap::Ptrace);
    require(Cap::Fuse);
    require(Cap::Program(PYTHON));
    require(Cap::Program("sqlite3"));
    for journal in ["delete", "wal"] {
        let dir = directory();
        let script = dir.path().join("transaction.py");
        fs::write(&script, include_str!("programs/transaction.py")).unwrap();
        let base = dir.path().join("base.db");
        let status = dir.path().join("status");
        let words = [&script, &status, &base].map(|path| path.to_str().unwrap());
        let mut live = Live::program(PYTHON, &[&words[..], &[journal]].concat(), dir);
        live.wait_ready();
        let sql_within = |patience: &str, text: &str| {
            let mut sqlite = Command::new("sqlite3");
            sqlite.args(["-cmd", &format!(".timeout {patience}")]).arg(&base).arg(text);
            let output = sqlite.output().unwrap();
            let [said, failed] = [output.stdout, output.stderr].map(String::from_utf8);
            (output.status.success(), said.unwrap() + &failed.unwrap())
        };
        // At its end, the program writes the journal back, and locks out all others meanwhile.
        let sql = |text| sql_within("20000", text);
        let insert = "insert into t values (1000)";
        let (done, said) = sql_within("0", insert);
        assert!(!done && said.contains("database is locked"), "{journal}: {said}");
        live.through_a_chain(&OPTIONS, |_| {});
        let (done, said) = sql_within("0", insert);
        assert!(!done && said.contains("database is locked"), "{journal}: {said}");
        live.verdict();
        assert_eq!(sql("select count(*), sum(n) from t").1, "100|4950\n", "{journal}");
        assert!(sql(insert).0, "{journal}");
        assert_eq!(sql("pragma integrity_check").1, "ok\n", "{journal}");
    }
}

/// A client of PostgreSQL, in as much of its protocol as this test needs.
struct Client(TcpStream);

impl Client {
    fn connect(port: u16) -> Option<Self> {
        let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).ok()?;
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let mut client = Self(stream);
        let words = b"user\0postgres\0database\0postgres\0\0";
        let mut hello = 196_608_u32.to_be_bytes().to_vec();
        hello.extend(words);
        let len = u32::try_from(hello.len() + 4).unwrap();
        client.0.write_all(&[&len.to_be_bytes()[..], &hello].concat()).unwrap();
        // While the server starts, it answers with an error.
        let answer = client.answer()?;
        (!answer.starts_with("error")).then_some(client)
    }

    fn send(&mut self, sql: &str) {
        let len = u32::try_from(sql.len() + 5).unwrap();
        let message = [b"Q", &len.to_be_bytes()[..], sql.as_bytes(), b"\0"].concat();
        self.0.write_all(&message).unwrap();
    }

    /// Returns the rows, notifications and errors up to the next prompt, one a line.
    fn answer(&mut self) -> Option<String> {
        let mut lines = String::new();
        loop {
            let mut head = [0; 5];
            self.0.read_exact(&mut head).ok()?;
            let len = u32::from_be_bytes(head[1..].try_into().unwrap());
            let mut body = vec![0; len as usize - 4];
            self.0.read_exact(&mut body).ok()?;
            // A pid or a length may not be text.
            let from = |at: usize| String::from_utf8_lossy(body.get(at..).unwrap_or_default());
            match head[0] {
                b'Z' => return Some(lines),
                // The count of columns, then the length and the bytes of each.
                b'D' => lines += &format!("{}\n", from(6)),
                // The pid of the sender, then the channel and the message.
                b'A' => {
                    lines += &format!("notification {}\n", from(4).replace('\0', " ").trim());
                }
                b'E' => lines += &format!("error {}\n", from(0).replace('\0', " ")),
                _ => {}
            }
        }
    }

    fn query(&mut self, sql: &str) -> String {
        self.send(sql);
        self.answer().unwrap_or_else(|| panic!("no answer to {sql}"))
    }
}

/// Starts a server in a directory of its own, as another user. `setup` creates the data directory,
/// whose path is appended to its last argument, and to that of the server.
fn server(setup: &[&str], arguments: &[&str]) -> Live {
    let dir = directory();
    let data = dir.path().join("data");
    fs::create_dir(&data).unwrap();
    chown(&data, Some(NOBODY), Some(NOBODY)).unwrap();
    fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o755)).unwrap();
    let with_place = |words: &[&str]| {
        let (last, first) = words.split_last().unwrap();
        let last = format!("{last}{}", data.display());
        let words = USER.iter().chain(first).map(ToString::to_string);
        words.chain([last]).collect::<Vec<_>>()
    };
    let output =
        Command::new("setpriv").args(with_place(setup)).current_dir(&data).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let words = with_place(arguments);
    let words: Vec<_> = words.iter().map(String::as_str).collect();
    Live::program("setpriv", &words, dir)
}

/// Starts PostgreSQL.
fn postgres() -> (Live, u16) {
    let setup = ["initdb", "--no-sync", "-A", "trust", "-U", "postgres", "--locale=C", "--pgdata="];
    let port = port();
    let number = port.to_string();
    let words = ["postgres", "-p", &number, "-k", "", "-c", "fsync=off", "-D"];
    (server(&setup, &words), port)
}

/// A transaction with a lock and a cursor half read, a client that waits for the lock, one that
/// listens; and a login afterwards.
#[test]
fn privileged_postgresql_with_clients() {
    require(Cap::Ptrace);
    require(Cap::Fuse);
    require(Cap::Program("postgres"));
    require(Cap::Program("initdb"));
    require(Cap::Program("setpriv"));
    let (mut live, port) = postgres();
    let mut buyer = None;
    wait_for("the server", || {
        buyer = Client::connect(port);
        buyer.is_some()
    });
    let mut buyer = buyer.unwrap();
    let [mut waiter, mut listener, mut other] = [(); 3].map(|()| Client::connect(port).unwrap());
    buyer.query("create table stock (name text, count int)");
    buyer.query("insert into stock values ('apples', 10)");
    buyer.query("begin");
    buyer.query("update stock set count = count - 3");
    buyer.query("declare numbers cursor for select generate_series(1, 10)");
    assert_eq!(buyer.query("fetch 3 from numbers"), "1\n2\n3\n");
    listener.query("listen news");
    waiter.send("update stock set count = count * 2 returning count");
    wait_for("a client that waits for a lock", || {
        let waiting = "select count(*) from pg_stat_activity where wait_event_type = 'Lock'";
        other.query(waiting) == "1\n"
    });
    live.through_a_chain(&OPTIONS, |_| {
        assert_eq!(other.query("select count from stock"), "10\n");
    });
    assert_eq!(buyer.query("fetch 3 from numbers"), "4\n5\n6\n");
    assert_eq!(buyer.query("select count from stock"), "7\n");
    assert_eq!(other.query("select count from stock"), "10\n");
    buyer.query("commit");
    assert_eq!(waiter.answer().unwrap(), "14\n");
    let mut late = Client::connect(port).expect("a login after the restore");
    late.query("notify news, 'all is well'");
    assert!(listener.query("select 1").contains("notification news all is well"));
    assert_eq!(late.query("checkpoint; select count from stock"), "14\n");
}

/// MariaDB's own client, which sends the lines that it reads.
struct Talker {
    client: Child,
    says: ChildStdin,
    hears: BufReader<ChildStdout>,
}

impl Talker {
    fn connect(port: u16) -> Option<Self> {
        let mut command = Command::new("mariadb");
        command.args(["--no-defaults", "-NBnf", "-h127.0.0.1", "-uroot", "-P", &port.to_string()]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut client = command.spawn().unwrap();
        let says = client.stdin.take().unwrap();
        let hears = BufReader::new(client.stdout.take().unwrap());
        let mut talker = Self { client, says, hears };
        // It ends if there is no server yet.
        let sent = talker.says.write_all(b"select 'here';\n").is_ok();
        (sent && talker.answer() == "here").then_some(talker)
    }

    fn send(&mut self, sql: &str) {
        self.says.write_all(format!("{sql};\n").as_bytes()).unwrap();
    }

    /// Waits for a row.
    fn answer(&mut self) -> String {
        let mut line = String::new();
        self.hears.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    /// Sends a statement with a result of one row.
    fn query(&mut self, sql: &str) -> String {
        self.send(sql);
        self.answer()
    }

    /// Sends a statement without a result, and waits until it is done.
    fn run(&mut self, sql: &str) {
        assert_eq!(self.query(&format!("{sql}; select 'done'")), "done", "{sql}");
    }
}

impl Drop for Talker {
    fn drop(&mut self) {
        let _ = self.client.kill();
        let _ = self.client.wait();
    }
}

/// A transaction, a lock by name and clients that wait for both, a table half read, what belongs to
/// a session; and a login afterwards.
#[test]
fn privileged_mariadb_with_clients() {
    require(Cap::Ptrace);
    require(Cap::Fuse);
    for program in ["mariadbd", "mariadb", "mariadb-install-db", "setpriv"] {
        require(Cap::Program(program));
    }
    let auth = "--auth-root-authentication-method=normal";
    let setup = ["mariadb-install-db", "--no-defaults", auth, "--skip-test-db", "--datadir="];
    let port = port();
    let number = format!("--port={port}");
    // rcriu refuses io_uring by its name.
    let words = [
        "mariadbd",
        "--no-defaults",
        "--innodb-use-native-aio=0",
        "--bind-address=127.0.0.1",
        "--socket=mariadb.sock",
        "--pid-file=mariadb.pid",
        &number,
        "--datadir=",
    ];
    let mut live = server(&setup, &words);
    let mut buyer = None;
    wait_for("the server", || {
        buyer = Talker::connect(port);
        buyer.is_some()
    });
    let mut buyer = buyer.unwrap();
    let connect = || {
        let mut talker = Talker::connect(port).unwrap();
        talker.run("use shop");
        talker
    };
    buyer.run("create database shop; use shop");
    buyer.run("create table stock (name varchar(20) primary key, count int) engine=InnoDB");
    buyer.run("create table pages (n int primary key) engine=Aria");
    buyer.run("insert into stock values ('apples', 10)");
    buyer.run("insert into pages values (1), (2), (3), (4)");
    let [mut waiter, mut keeper, mut guest, mut other] = [(); 4].map(|()| connect());
    buyer.run("start transaction");
    buyer.run("update stock set count = count - 3");
    buyer.run("set @answer = 42");
    buyer.run("create temporary table basket (n int); insert into basket values (7)");
    buyer.run("prepare twice from 'select 2 * ?'");
    waiter.send("update stock set count = count * 2; select count from stock");
    assert_eq!(keeper.query("select get_lock('door', 0)"), "1");
    keeper.run("handler pages open");
    assert_eq!(keeper.query("handler pages read `PRIMARY` first"), "1");
    guest.send("select get_lock('door', 600)");
    let waiting = "select count(*) from information_schema.processlist where state = 'User lock' or \
                   (info like 'update stock%' and state = 'Updating')";
    wait_for("clients that wait for locks", || other.query(waiting) == "2");
    live.through_a_chain(&OPTIONS, |_| {
        assert_eq!(other.query("select count from stock"), "10");
        assert_eq!(keeper.query("handler pages read `PRIMARY` next"), "2");
    });
    assert_eq!(other.query(waiting), "2");
    assert_eq!(other.query("select count from stock"), "10");
    assert_eq!(buyer.query("select count from stock"), "7");
    assert_eq!(buyer.query("select @answer + n from basket"), "49");
    assert_eq!(buyer.query("execute twice using @answer"), "84");
    buyer.run("commit");
    assert_eq!(waiter.answer(), "14");
    assert_eq!(keeper.query("handler pages read `PRIMARY` next"), "3");
    assert_eq!(other.query("select get_lock('door', 0)"), "0");
    assert_eq!(keeper.query("select release_lock('door')"), "1");
    assert_eq!(guest.answer(), "1");
    let mut late = connect();
    assert_eq!(late.query("select count from stock"), "14");
    assert_eq!(late.query("check table stock").split('\t').next_back(), Some("OK"));
    // It writes everything to its files, and ends.
    late.send("shutdown");
    live.wait_gone();
}

/// Runs a program whose output goes to a file.
fn printing(command: &str) -> Live {
    let dir = directory();
    fs::write(dir.path().join("in"), "first\n").unwrap();
    fs::create_dir(dir.path().join("watched")).unwrap();
    Live::program("sh", &["-c", &format!("exec {command} > out 2>&1")], dir)
}

fn has(path: &Path, words: &str) -> bool {
    fs::read_to_string(path).is_ok_and(|text| text.contains(words))
}

#[test]
fn privileged_tail_follows_a_file() {
    require(Cap::Ptrace);
    require(Cap::Fuse);
    let mut live = printing("tail -f in");
    let (out, input) = (live.path("out"), live.path("in"));
    wait_for("the first line", || has(&out, "first"));
    let append = |line: &str| {
        let mut file = fs::OpenOptions::new().append(true).open(&input).unwrap();
        writeln!(file, "{line}").unwrap();
    };
    live.through_a_chain(&OPTIONS, |_| {
        append("second");
        wait_for("the second line", || has(&out, "second"));
    });
    let links = fs::read_dir(format!("/proc/{}/fd", live.root)).unwrap().flatten();
    let mut links = links.filter_map(|link| fs::read_link(link.path()).ok());
    assert!(links.any(|link| link.ends_with("anon_inode:inotify")), "tail polls");
    append("third");
    wait_for("the third line", || has(&out, "third"));
}

#[test]
fn privileged_inotifywait_goes_on() {
    require(Cap::Ptrace);
    require(Cap::Fuse);
    require(Cap::Program("inotifywait"));
    let mut live = printing("inotifywait -m -r -e create,delete watched");
    let (out, watched) = (live.path("out"), live.path("watched"));
    wait_for("the watch", || has(&out, "Watches established"));
    live.through_a_chain(&OPTIONS, |_| {
        fs::create_dir(watched.join("one")).unwrap();
        wait_for("the first event", || has(&out, "watched/ CREATE,ISDIR one"));
    });
    // It has watched the new directory by itself.
    fs::write(watched.join("one/two"), "").unwrap();
    wait_for("the second event", || has(&out, "watched/one/ CREATE two"));
    fs::remove_file(watched.join("one/two")).unwrap();
    wait_for("the third event", || has(&out, "watched/one/ DELETE two"));
    assert_eq!(fs::read_to_string(&out).unwrap().matches("CREATE").count(), 2);
}
