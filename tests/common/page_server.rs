//! Page servers under test.

use std::{
    fs,
    io::{BufRead, BufReader},
    net::TcpStream,
    path::Path,
    process::{Child, Command, Output, Stdio},
};

use super::live::engine;

/// A page server with its directory.
pub struct Server {
    child: Child,
    port: u16,
}

impl Server {
    /// Starts our page server, which chooses its port.
    pub fn start(dir: &Path, arguments: &[&str]) -> Self {
        Self::start_faulty(dir, arguments, None)
    }

    pub fn start_faulty(dir: &Path, arguments: &[&str], fault: Option<&str>) -> Self {
        fs::create_dir_all(dir).unwrap();
        let mut command = Command::new(engine());
        command.args(["page-server", "--address", "127.0.0.1", "-D"]).arg(dir).args(arguments);
        command.envs(fault.map(|fault| ("RCRIU_FAULT", fault)));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let Ok(port) = line.trim().parse() else {
            let output = child.wait_with_output().unwrap();
            panic!("no port: {line:?}, {}", String::from_utf8_lossy(&output.stderr))
        };
        Self { child, port }
    }

    /// The arguments of a dump to it.
    pub fn arguments(&self) -> [String; 5] {
        let port = self.port.to_string();
        ["--page-server", "--address", "127.0.0.1", "--port", &port].map(str::to_owned)
    }

    pub fn connect(&self) -> TcpStream {
        TcpStream::connect(("127.0.0.1", self.port)).unwrap()
    }

    /// Waits for its end.
    pub fn end(self) -> Output {
        self.child.wait_with_output().unwrap()
    }

    pub fn succeed(self) {
        let output = self.end();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    /// Waits for its end, and returns what it says.
    pub fn fail(self) -> String {
        let output = self.end();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && !said.contains("panicked"), "{said}");
        said
    }
}

/// Brings the images of a dump to the pages of the server, as the user does.
pub fn bring(from: &Path, to: &Path) {
    for entry in fs::read_dir(from).unwrap().flatten() {
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_file() && !target.exists() {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}
