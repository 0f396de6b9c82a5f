//! Trees with thousands of one thing.

use std::{
    ffi::CString,
    fs::{self, File},
    net::{TcpListener, TcpStream},
    os::unix::ffi::OsStrExt,
    path::Path,
};

use nix::{
    libc,
    sys::resource::{Resource, getrlimit, setrlimit},
    unistd::{ForkResult, fork, pause},
};

/// Of what there are many.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Many {
    /// Open files of one process.
    Descriptors,
    /// Established TCP connections within one process.
    Connections,
    /// Processes that share open files.
    Processes,
    /// inotify watches of one process.
    Watches,
}

/// How many open files [`Many::Processes`] share.
const SHARED_FILES: usize = 20;
/// Descriptors that are not counted: standard streams, and what the programs need themselves.
const SPARE: u64 = 100;

impl Many {
    pub const ALL: [Self; 4] =
        [Self::Descriptors, Self::Connections, Self::Processes, Self::Watches];

    /// The word on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Descriptors => "descriptors",
            Self::Connections => "connections",
            Self::Processes => "processes",
            Self::Watches => "watches",
        }
    }

    pub fn by_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|many| many.name() == name)
    }

    /// How many there are: fewer than planned if this machine allows no more.
    pub fn count(self) -> usize {
        let watches = || fs::read_to_string("/proc/sys/fs/inotify/max_user_watches").unwrap();
        let (planned, limit) = match self {
            // A restore needs each descriptor twice.
            Self::Descriptors => (9900, (descriptors() - SPARE) / 2),
            Self::Connections => (1000, (descriptors() - SPARE) / 4),
            Self::Processes => (500, u64::MAX),
            Self::Watches => (20_000, watches().trim().parse::<u64>().unwrap() / 2),
        };
        planned.min(usize::try_from(limit).unwrap_or(usize::MAX))
    }

    /// How often each program dumps and restores. CRIU starts iptables for each connection, and
    /// takes minutes.
    pub fn runs(self) -> usize {
        if self == Self::Connections { 1 } else { 3 }
    }

    /// Options that a dump and a restore need.
    pub fn options(self) -> &'static [&'static str] {
        if self == Self::Connections { &["--tcp-established"] } else { &[] }
    }

    /// What the process does: it makes the many, says that it is ready, and waits.
    #[expect(unsafe_code, reason = "fork and inotify")]
    pub fn hold(self, status: &Path) {
        let own = std::env::current_exe().expect("it has a path");
        let open = |_| File::open(&own).unwrap();
        let count = self.count();
        let mut files = Vec::new();
        let mut streams = Vec::new();
        match self {
            Self::Descriptors => files.extend((0..count).map(open)),
            Self::Connections => {
                let listener = TcpListener::bind("127.0.0.1:0").unwrap();
                let address = listener.local_addr().unwrap();
                for _ in 0..count {
                    streams.push(TcpStream::connect(address).unwrap());
                    streams.push(listener.accept().unwrap().0);
                }
            }
            Self::Processes => {
                files.extend((0..SHARED_FILES).map(open));
                for _ in 1..count {
                    // SAFETY: this process has one thread.
                    if let ForkResult::Child = unsafe { fork() }.unwrap() {
                        loop {
                            pause();
                        }
                    }
                }
            }
            Self::Watches => {
                let dir = status.with_file_name("watched");
                fs::create_dir_all(&dir).unwrap();
                // SAFETY: the call takes a number.
                let inotify = unsafe { libc::inotify_init1(0) };
                for number in 0..count {
                    let path = dir.join(number.to_string());
                    File::create(&path).unwrap();
                    let path = CString::new(path.as_os_str().as_bytes()).unwrap();
                    // SAFETY: the path ends with a zero byte, and outlives the call.
                    let watch =
                        unsafe { libc::inotify_add_watch(inotify, path.as_ptr(), libc::IN_MODIFY) };
                    assert!(watch > 0, "{path:?}");
                }
            }
        }
        fs::write(status, "ready").unwrap();
        loop {
            pause();
        }
    }

    /// Panics unless a process, which has these children, still has all of them.
    pub fn verify(self, pid: i32, children: usize) {
        let proc = Path::new("/proc").join(pid.to_string());
        let links = || {
            let entries = fs::read_dir(proc.join("fd")).unwrap();
            entries.filter_map(|entry| fs::read_link(entry.unwrap().path()).ok())
        };
        let (found, expected) = match self {
            Self::Descriptors => {
                let own = std::env::current_exe().unwrap();
                (links().filter(|link| *link == own).count(), self.count())
            }
            // A connection has two ends; the listener is closed.
            Self::Connections => {
                let sockets = links().filter(|link| link.to_string_lossy().starts_with("socket:"));
                (sockets.count(), 2 * self.count())
            }
            Self::Processes => (children + 1, self.count()),
            Self::Watches => {
                let infos = fs::read_dir(proc.join("fdinfo")).unwrap();
                let texts =
                    infos.filter_map(|entry| fs::read_to_string(entry.unwrap().path()).ok());
                (texts.map(|text| text.matches("inotify wd:").count()).sum(), self.count())
            }
        };
        assert_eq!(found, expected, "{self:?} after the restore");
    }
}

/// Returns how many descriptors a process may have, after raising the limit as far as possible.
pub fn descriptors() -> u64 {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
    hard.min(libc::c_int::MAX.unsigned_abs().into())
}
