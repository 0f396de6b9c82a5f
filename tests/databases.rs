//! Databases and other programs that lock files or watch them, dumped in the middle of their work.
//! Clients stay connected, and lose nothing.
//!
//! All of it needs root.

mod common;

use std::{
    fs,
    io::{Read, Write},
    net::{Ipv4Addr, TcpStream},
    os::unix::fs::{PermissionsExt, chown},
    path::Path,
    process::Command,
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

/// Starts PostgreSQL in a directory of its own, as another user.
fn postgres() -> (Live, u16) {
    let dir = directory();
    let data = dir.path().join("data");
    fs::create_dir(&data).unwrap();
    chown(&data, Some(NOBODY), Some(NOBODY)).unwrap();
    fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o755)).unwrap();
    let user = ["--reuid=65534", "--regid=65534", "--clear-groups"];
    let mut setup = Command::new("setpriv");
    setup.args(user).args(["initdb", "--no-sync", "-A", "trust", "-U", "postgres", "--locale=C"]);
    let output = setup.arg("-D").arg(&data).current_dir(&data).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let port = port();
    let (place, number) = (data.to_str().unwrap().to_owned(), port.to_string());
    let arguments = ["postgres", "-D", &place, "-p", &number, "-k", "", "-c", "fsync=off"];
    (Live::program("setpriv", &[&user[..], &arguments].concat(), dir), port)
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
