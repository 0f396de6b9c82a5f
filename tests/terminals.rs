//! Terminals: bytes that wait in them, however a dump ends, and the programs of a user's session.
//!
//! All of it needs root. `tmux` stands for the user: it types, and reads the screens.

mod common;

use std::{
    fs,
    io::{Read, Write},
    os::unix::fs::PermissionsExt,
    path::PathBuf,
    process::{Command, Stdio},
    sync::{Mutex, MutexGuard, PoisonError},
};

use common::{
    Cap,
    live::{Live, directory, wait_for},
    net::port,
    require,
    untouched::Before,
};
use rcriu::fault::Point;

/// Debian's own Python: the first one in the search path may be a script of a version manager.
const PYTHON: &str = "/usr/bin/python3";

/// The tests of this program take turns: some pairs are to have their numbers again.
fn numbers() -> MutexGuard<'static, ()> {
    static NUMBERS: Mutex<()> = Mutex::new(());
    NUMBERS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// States with bytes that wait.
const STATES: [&str; 3] = ["pty_lines", "pty_raw_bytes", "pty_stopped_output"];

/// A dump that fails while it holds bytes of a terminal returns them. If it is killed, its supervisor
/// returns them, whatever the moment.
#[test]
fn privileged_bytes_stay_in_terminals_whatever_ends_a_dump() {
    require(Cap::Ptrace);
    let _numbers = numbers();
    for state in STATES {
        let mut ended = 0;
        let mut live = Live::workload(state);
        let before = Before::of(&mut live);
        for point in [Point::TerminalTaken, Point::TerminalReturned] {
            for (how, most) in [("", 1), ("kill:", usize::MAX)] {
                for time in 1..=most.min(12) {
                    let number = if how.is_empty() { String::new() } else { time.to_string() };
                    let fault = format!("{}:{how}{number}", point.name());
                    live.fault = Some(fault.trim_end_matches(':').to_owned());
                    let output = live.try_dump(&["-R"]);
                    let said = String::from_utf8_lossy(&output.stderr).into_owned();
                    assert!(!said.contains("lost"), "{state}, {fault}: {said}");
                    before.assert_untouched(&mut live, &format!("a dump that ends at {fault}"));
                    if output.status.success() {
                        break;
                    }
                    ended += 1;
                }
            }
        }
        assert!(ended > 1 || state == "pty_stopped_output", "{state}: {ended} dumps ended");
        live.fault = None;
        live.dump_running(&[]);
        live.verdict();
        println!("{state}: {ended} dumps ended early");
    }
}

/// `tmux` with windows, each with a program.
struct Tmux {
    live: Live,
    socket: PathBuf,
}

impl Tmux {
    fn start() -> Self {
        let words = ["-D", "-u", "-S", "tmux", "-f", "/dev/null"];
        Self::started(Live::program("tmux", &words, directory()))
    }

    /// Waits for a server that listens in the directory of its tree.
    fn started(live: Live) -> Self {
        let tmux = Self { socket: live.path("tmux"), live };
        wait_for("the server", || {
            let mut ask = Command::new("tmux");
            ask.arg("-S").arg(&tmux.socket).args(["show-options", "-s"]);
            ask.output().is_ok_and(|output| output.status.success())
        });
        tmux.run(&["set-option", "-g", "default-shell", "/bin/bash"]);
        tmux.run(&["set-option", "-g", "history-limit", "5000"]);
        tmux
    }

    fn run(&self, words: &[&str]) -> String {
        let mut command = Command::new("tmux");
        command.arg("-u").arg("-S").arg(&self.socket).args(words);
        command.current_dir(self.live.dir.path()).env_remove("TMUX");
        command.env("HOME", self.live.dir.path()).env("HISTFILE", "/dev/null");
        let output = command.output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "tmux {words:?}: {said}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Starts a command in a window of its own, and waits until its screen has some words.
    fn open(&self, name: &str, command: &str, words: &str) {
        let place = self.live.dir.path().to_str().unwrap().to_owned();
        let is_first = Command::new("tmux")
            .arg("-S")
            .arg(&self.socket)
            .args(["has-session", "-t", "=main"])
            .output()
            .is_ok_and(|output| !output.status.success());
        let how: &[&str] = if is_first {
            &["new-session", "-d", "-s", "main", "-x", "100", "-y", "30"]
        } else {
            &["new-window", "-d", "-t", "main"]
        };
        self.run(&[how, &["-c", &place, "-n", name, command]].concat());
        self.wait(name, words);
    }

    /// The screen of a window with its history and colors.
    fn screen(&self, name: &str) -> String {
        self.run(&["capture-pane", "-p", "-e", "-S", "-", "-t", &format!("main:{name}")])
    }

    fn cursor(&self, name: &str) -> String {
        let what = "#{cursor_x},#{cursor_y} #{pane_mode} #{alternate_on} #{pane_current_command}";
        self.run(&["display-message", "-p", "-t", &format!("main:{name}"), what])
    }

    fn type_in(&self, name: &str, keys: &[&str]) {
        self.run(&[&["send-keys", "-t", &format!("main:{name}")], keys].concat());
    }

    fn wait(&self, name: &str, words: &str) {
        let mut screen = String::new();
        let begin = std::time::Instant::now();
        while !screen.contains(words) {
            screen = self.run(&["capture-pane", "-p", "-S", "-", "-t", &format!("main:{name}")]);
            let is_late = begin.elapsed() > common::live::PATIENCE * common::slowness();
            assert!(!is_late, "window {name} never shows {words:?}:\n{}", screen.trim_end());
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    }

    /// All windows, but for those that change by themselves.
    fn screens(&self) -> Vec<(String, String, String)> {
        let names = self.run(&["list-windows", "-t", "main", "-F", "#{window_name}"]);
        let still = names.lines().filter(|name| *name != "top");
        still.map(|name| (name.to_owned(), self.screen(name), self.cursor(name))).collect()
    }

    fn assert_same(&self, before: &[(String, String, String)]) {
        for (before, after) in before.iter().zip(self.screens()) {
            assert_eq!(before.0, after.0);
            assert!(
                before.1 == after.1 && before.2 == after.2,
                "window {} was\n{}{}\nand is\n{}{}",
                before.0,
                before.1.trim_end(),
                before.2,
                after.1.trim_end(),
                after.2
            );
        }
    }
}

/// A user's windows in tmux: an editor, a stopped editor, a pager, logs, an interpreter, and running
/// commands with words typed ahead.
fn session() -> Tmux {
    let tmux = Tmux::start();
    let path = |name: &str| tmux.live.path(name);
    let lines: String = (1..=1000).map(|number| format!("line {number} of the book\n")).collect();
    fs::write(path("book"), lines).unwrap();
    fs::write(path("log"), "begin of the log\n").unwrap();
    let bash = "PS1='$ ' bash --norc --noprofile";
    tmux.open("shell", bash, "$");
    tmux.type_in("shell", &["sleep 1000 &", "Enter"]);
    tmux.wait("shell", "[1] ");
    tmux.type_in("shell", &["for i in $(seq 200); do echo history $i; done", "Enter"]);
    tmux.wait("shell", "history 200");
    tmux.type_in("shell", &["vim -u NONE -N stopped", "Enter"]);
    tmux.wait("shell", "~");
    tmux.type_in("shell", &["i", "words of a stopped editor", "Escape", "C-z"]);
    tmux.wait("shell", "Stopped");
    tmux.open("editor", "vim -u NONE -N edited", "~");
    tmux.type_in("editor", &["i", "first line", "Enter", "second", "Escape", "yyp", "A", " again"]);
    tmux.wait("editor", "second again");
    tmux.open("log", "tail -f log", "begin of the log");
    tmux.open("pager", "less book", "line 1 of");
    tmux.type_in("pager", &["/line 500 ", "Enter"]);
    tmux.wait("pager", "line 520");
    tmux.open("python", &format!("{PYTHON} -q -i"), ">>>");
    tmux.type_in("python", &["answer = 6 * 7", "Enter", "print(answer", ")", "Enter"]);
    tmux.wait("python", "\n42");
    tmux.type_in("python", &["print('half"]);
    tmux.wait("python", "('half");
    tmux.open("top", "top -d 0.3", "PID");
    tmux.open("script", "script -q -c 'bash --norc --noprofile' typescript", "bash-");
    tmux.type_in("script", &["echo recorded $((3 * 5))", "Enter"]);
    tmux.wait("script", "recorded 15");
    tmux.open("cat", "cat", "");
    tmux.type_in("cat", &["whole", "Enter"]);
    tmux.wait("cat", "whole\nwhole");
    tmux.type_in("cat", &["half a l"]);
    tmux.wait("cat", "whole\nwhole\nhalf a l");
    tmux.open("ahead", bash, "$");
    tmux.type_in("ahead", &["until [ -e go ]; do sleep 0.05; done", "Enter"]);
    tmux.type_in("ahead", &["echo typed $((40 + 2)) ahead", "Enter"]);
    tmux.wait("ahead", "$((40 + 2)) ahead");
    tmux
}

/// Types on in every window.
fn go_on(tmux: &Tmux, round: usize) {
    tmux.type_in("editor", &[&format!(" and again {round}")]);
    tmux.wait("editor", &format!("and again {round}"));
    let log = tmux.live.path("log");
    let mut text = fs::read_to_string(&log).unwrap();
    text += &format!("round {round}\n");
    let mut file = fs::File::options().append(true).open(&log).unwrap();
    file.write_all(format!("round {round}\n").as_bytes()).unwrap();
    tmux.wait("log", &text);
    let line = 600 + 10 * round;
    tmux.type_in("pager", &[&format!("/line {line} "), "Enter"]);
    tmux.wait("pager", &format!("line {} of", line + 20));
    tmux.type_in("python", &["' * 1)", "Enter", "print(answer + 1)", "Enter", "Up", "Up", "Enter"]);
    tmux.wait("python", "\nhalf\n>>> print(answer + 1)\n43\n>>> print('half' * 1)\nhalf\n>>>");
    tmux.type_in("python", &["print('half"]);
    tmux.wait("python", "\nhalf\n>>> print('half");
    tmux.type_in("script", &[&format!("echo recorded $(({round} + 100))"), "Enter"]);
    tmux.wait("script", &format!("recorded {}\nbash-", round + 100));
    tmux.type_in("cat", &["BSpace", &format!("line{round}"), "Enter"]);
    let line = format!("half a line{round}\n");
    tmux.wait("cat", &line.repeat(2));
    tmux.type_in("cat", &["half a l"]);
    tmux.wait("cat", &format!("{line}half a l"));
}

#[test]
fn privileged_tmux_and_all_in_it() {
    require(Cap::Ptrace);
    require(Cap::Fuse);
    for program in ["tmux", "vim", "less", "top", "script", "bash"] {
        require(Cap::Program(program));
    }
    let _numbers = numbers();
    let mut tmux = session();
    let before = tmux.screens();
    tmux.live.images_name = "first";
    tmux.live.dump_running(&["--track-mem"]);
    tmux.assert_same(&before);
    go_on(&tmux, 1);

    let before = tmux.screens();
    tmux.live.images_name = "second";
    tmux.live.dump(&["--track-mem", "--prev-images-dir", "../first"]);
    tmux.live.restore_from_mount(&[]);
    tmux.assert_same(&before);
    go_on(&tmux, 2);

    fs::write(tmux.live.path("go"), "").unwrap();
    tmux.wait("ahead", "\ntyped 42 ahead");
    tmux.type_in("editor", &["Escape", ":wq", "Enter"]);
    let edited = tmux.live.path("edited");
    wait_for("the editor to write", || edited.exists());
    wait_for("its end", || !tmux.run(&["list-windows", "-t", "main"]).contains("editor"));
    let text = fs::read_to_string(edited).unwrap();
    assert_eq!(text, "first line\nsecond\nsecond again and again 1 and again 2\n");
    tmux.type_in("shell", &["jobs", "Enter"]);
    tmux.wait("shell", "Running                 sleep 1000");
    tmux.type_in("shell", &["fg", "Enter"]);
    tmux.wait("shell", "words of a stopped editor\n~");
    tmux.type_in("shell", &[":wq", "Enter"]);
    wait_for("the stopped editor to write", || {
        fs::read_to_string(tmux.live.path("stopped"))
            .is_ok_and(|text| text == "words of a stopped editor\n")
    });
    // The shell still controls its terminal: ^C ends the program in the foreground.
    tmux.wait("shell", "$ fg\nvim -u NONE -N stopped\n$");
    tmux.type_in("shell", &["fg", "Enter"]);
    tmux.wait("shell", "$ fg\nsleep 1000\n");
    // bash shows the name first, and then puts the job into the foreground.
    let leader = format!(
        "/proc/{}/stat",
        tmux.run(&["display-message", "-p", "-t", "main:shell", "#{pane_pid}"]).trim()
    );
    wait_for("another foreground group", || {
        let stat = fs::read_to_string(&leader).unwrap();
        let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
        // Group and foreground group.
        fields[2] != fields[5]
    });
    tmux.type_in("shell", &["C-c"]);
    tmux.wait("shell", "^C\n$");
    tmux.type_in("shell", &["echo status $?", "Enter"]);
    tmux.wait("shell", "status 130");
    let moving = tmux.screen("top");
    wait_for("top to go on", || tmux.screen("top") != moving);
    tmux.type_in("script", &["exit", "Enter"]);
    wait_for("the record", || {
        fs::read_to_string(tmux.live.path("typescript")).is_ok_and(|text| {
            ["15", "101", "102"].iter().all(|n| text.contains(&format!("recorded {n}\r\n")))
        })
    });
    // A client attaches anew, and the windows get its size.
    tmux.run(&["resize-window", "-t", "main:ahead", "-x", "60", "-y", "20"]);
    tmux.type_in("ahead", &["clear; stty size", "Enter"]);
    tmux.wait("ahead", "20 60");
}

/// A server with a client in the same tree: the server has the terminal of the client, which it has
/// received over their connection.
#[test]
fn privileged_tmux_with_a_client() {
    const COMMAND: &str = "tmux -D -u -S tmux -f /dev/null &
        until [ -e attach ]; do sleep 0.05; done
        script -q -f -c 'stty rows 30 cols 100; TERM=xterm exec tmux -u -S tmux attach' shown <>keys
        wait";
    require(Cap::Ptrace);
    require(Cap::Fuse);
    for program in ["tmux", "vim", "script"] {
        require(Cap::Program(program));
    }
    let _numbers = numbers();
    let dir = directory();
    nix::unistd::mkfifo(&dir.path().join("keys"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let mut tmux = Tmux::started(Live::program("sh", &["-c", COMMAND], dir));
    tmux.open("editor", "vim -u NONE -N edited", "~");
    // It takes keys that arrive at once for pasted text, in which its own have no meaning.
    tmux.run(&["set-option", "-g", "assume-paste-time", "0"]);
    fs::write(tmux.live.path("attach"), "").unwrap();
    let clients = "#{client_tty} #{client_width}x#{client_height} #{client_session}";
    wait_for("the client", || tmux.run(&["list-clients", "-F", clients]).contains("100x30 main"));
    let (keys, shown) = (tmux.live.path("keys"), tmux.live.path("shown"));
    let mut keys = fs::File::options().read(true).write(true).open(keys).unwrap();
    let mut exchange = |typed: &[u8], answer: &str| {
        keys.write_all(typed).unwrap();
        wait_for(answer, || String::from_utf8_lossy(&fs::read(&shown).unwrap()).contains(answer));
    };
    exchange(b"ifirst line\r", "first line");
    let before = tmux.run(&["list-clients", "-F", clients]);
    tmux.live.through_a_chain(&[], |_| exchange(b"second line\r", "second line"));
    tmux.wait("editor", "second line");
    assert_eq!(tmux.run(&["list-clients", "-F", clients]), before);
    exchange(b"third line\x1bk0", "third line");
    exchange(b"A again", "again");
    // The keys of tmux itself: a window that is split, a shell in it, and the end of the client.
    exchange(b"\x02\"echo in $(tput cols) columns\r", "in 100 columns");
    tmux.type_in("editor.0", &["Escape", ":wq", "Enter"]);
    let edited = tmux.live.path("edited");
    wait_for("the editor to write", || {
        fs::read_to_string(&edited)
            .is_ok_and(|text| text == "first line\nsecond line again\nthird line\n")
    });
    exchange(b"\x02d", "[detached (from session main)]");
    assert_eq!(tmux.run(&["list-clients"]), "");
}

#[test]
fn privileged_screen() {
    require(Cap::Ptrace);
    require(Cap::Program("screen"));
    let _numbers = numbers();
    let dir = directory();
    let sockets = dir.path().join("sockets");
    fs::create_dir(&sockets).unwrap();
    fs::set_permissions(&sockets, fs::Permissions::from_mode(0o700)).unwrap();
    let place = format!("SCREENDIR={}", sockets.display());
    let words = [&place, "TERM=xterm", "screen", "-D", "-m", "-S", "one", "bash", "--norc"];
    let mut live = Live::program("env", &words, dir);
    let ask = |words: &[&str]| {
        let mut command = Command::new("screen");
        command.args(["-S", "one", "-X"]).args(words).env("SCREENDIR", &sockets);
        command.output().is_ok_and(|output| output.status.success())
    };
    let copy = sockets.join("copy");
    // The server writes the copy after it has answered.
    let wait = |words: &[&str]| {
        wait_for(words[0], || {
            let asked = ask(&["hardcopy", copy.to_str().unwrap()]);
            let text = fs::read(&copy).unwrap_or_default();
            let text = String::from_utf8_lossy(&text);
            asked && words.iter().all(|word| text.contains(word))
        });
    };
    wait_for("the server", || ask(&["stuff", "echo in $((5 * 5))\n"]));
    wait(&["in 25"]);
    live.dump_running(&[]);
    assert!(ask(&["stuff", "echo then $((6 * 5))\n"]));
    wait(&["then 30"]);
    live.dump(&[]);
    live.restore(&[]);
    assert!(ask(&["stuff", "echo again $((7 * 5))\n"]));
    wait(&["again 35", "in 25", "then 30"]);
}

/// Whether a process is sleep(1) and belongs to the foreground group of its terminal.
fn is_sleep_in_foreground(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let Some((name, rest)) = stat.rsplit_once(')') else { return false };
    let fields: Vec<&str> = rest.split_whitespace().collect();
    // State, parent, group, session, terminal, foreground group.
    name.ends_with("(sleep") && fields[2] == fields[5]
}

/// A user's ssh session continues after a dump and a restore of sshd.
#[test]
fn privileged_sshd_and_a_session() {
    const ESTABLISHED: &str = "--tcp-established";
    require(Cap::Ptrace);
    for program in ["/usr/sbin/sshd", "ssh", "ssh-keygen"] {
        require(Cap::Program(program));
    }
    let _numbers = numbers();
    let dir = directory();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    for key in ["host", "user"] {
        let words = ["-q", "-t", "ed25519", "-N", "", "-f", &path(key)];
        assert!(Command::new("ssh-keygen").args(words).status().unwrap().success());
    }
    let port = port();
    let text = format!(
        "Port {port}\nListenAddress 127.0.0.1\nHostKey {}\nAuthorizedKeysFile {}\nStrictModes no\n\
         UsePAM no\nPermitRootLogin yes\nPrintMotd no\nPrintLastLog no\nPidFile none\n",
        path("host"),
        path("user.pub"),
    );
    fs::write(path("config"), text).unwrap();
    // Without this directory, which Debian's service creates, sshd does not start.
    let made = fs::create_dir("/run/sshd").is_ok();
    let (config, key, log) = (path("config"), path("user"), path("ssh.log"));
    let mut live = Live::program("/usr/sbin/sshd", &["-D", "-f", &config], dir);
    wait_for("the server", || std::net::TcpStream::connect(("127.0.0.1", port)).is_ok());
    let mut ssh = Command::new("ssh");
    ssh.args(["-tt", "-F", "none", "-E", &log, "-i", &key, "-p", &port.to_string()]);
    ssh.args(["-o", "UserKnownHostsFile=/dev/null", "-o", "StrictHostKeyChecking=no"]);
    ssh.args(["root@127.0.0.1", "bash --norc --noprofile"]);
    let mut client = ssh.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut keys = client.stdin.take().unwrap();
    let screen = std::sync::Arc::new(Mutex::new(String::new()));
    let mut shown = client.stdout.take().unwrap();
    let copy = std::sync::Arc::clone(&screen);
    let reader = std::thread::spawn(move || {
        let mut bytes = [0; 4096];
        while let Ok(count @ 1..) = shown.read(&mut bytes) {
            *copy.lock().unwrap() += &String::from_utf8_lossy(&bytes[..count]);
        }
    });
    let mut exchange = |words: &str, answer: &str| {
        keys.write_all(words.as_bytes()).unwrap();
        wait_for(answer, || screen.lock().unwrap().contains(answer));
    };
    exchange("echo first $((6 * 7)); stty size\n", "first 42");
    live.dump_running(&[ESTABLISHED]);
    exchange("echo second $((6 * 8)); variable=kept\n", "second 48");
    live.dump(&[ESTABLISHED]);
    live.restore(&[ESTABLISHED]);
    exchange("echo third $((6 * 9)) $variable\n", "third 54 kept");
    // ^C ends the program in the foreground.
    exchange("sleep 1000\n", "sleep 1000");
    wait_for("sleep in the foreground", || live.tree().into_iter().any(is_sleep_in_foreground));
    exchange("\x03echo fourth $((6 * 10)) $?\n", "fourth 60 130");
    exchange("exit\n", "exit");
    assert!(client.wait().unwrap().success());
    reader.join().unwrap();
    if made {
        fs::remove_dir("/run/sshd").unwrap();
    }
}
