//! Files in `/proc` outside of processes that tools read, filled from the images.

use std::fmt::Write;

use super::{Node, Proc};
use crate::{
    image::{Kind, proto},
    view::Result,
};

/// Files outside of processes, by path.
const FILES: [&str; 17] = [
    "cpuinfo",
    "filesystems",
    "loadavg",
    "meminfo",
    "mounts",
    "net/netlink",
    "net/raw",
    "net/tcp",
    "net/tcp6",
    "net/udp",
    "net/udp6",
    "net/unix",
    "stat",
    "sys/kernel/osrelease",
    "sys/kernel/pid_max",
    "tty/drivers",
    "uptime",
];

/// Directories outside of processes, by path.
const DIRECTORIES: [&str; 4] = ["net", "sys", "sys/kernel", "tty"];

/// The largest pid on 64-bit machines (`PID_MAX_LIMIT`, `linux/threads.h`).
const PID_MAX: &str = "4194304\n";

/// The kernel's list of the terminal drivers that a tree may use.
const TTY_DRIVERS: &str = "\
/dev/tty             /dev/tty        5       0 system:/dev/tty
/dev/console         /dev/console    5       1 system:console
/dev/ptmx            /dev/ptmx       5       2 system
serial               /dev/ttyS       4      64 serial
pty_slave            /dev/pts      136 0-1048575 pty:slave
pty_master           /dev/ptm      128 0-1048575 pty:master
unknown              /dev/tty        4 1-63 console
";

/// The length of a clock tick in microseconds.
const TICK_US: u64 = 10_000;

/// The headings of addresses in `net/tcp` and `net/tcp6`, which programs parse.
const V4_HEADS: &str = "local_address rem_address  ";
const V6_HEADS: &str =
    "local_address                         remote_address                       ";

/// `AF_INET`, `AF_INET6`; `IPPROTO_*` (`linux/in.h`).
const INET: u32 = 2;
const INET6: u32 = 10;
const TCP: u32 = 6;
const UDP: u32 = 17;

/// Socket states (`net/tcp_states.h`), which images also use for UNIX sockets.
const LISTENING: u32 = 10;
const ESTABLISHED: u32 = 1;

/// `SS_*`: socket states in `net/unix` (`linux/net.h`), and the flag of a listening socket
/// (`__SO_ACCEPTCON`).
const SS_UNCONNECTED: u32 = 1;
const SS_CONNECTED: u32 = 3;
const ACCEPTS: u32 = 1 << 16;

/// Returns the entries of a directory outside of processes.
pub(super) fn children(path: &str) -> Vec<(String, Node)> {
    let inside = |candidate: &&'static str| {
        let name = match path {
            "" => Some(*candidate),
            path => candidate.strip_prefix(path).and_then(|rest| rest.strip_prefix('/')),
        };
        name.filter(|name| !name.contains('/')).map(|name| (name.to_owned(), *candidate))
    };
    let files = FILES.iter().filter_map(inside);
    let files = files.map(|(name, path)| (name, Node::SystemFile(path)));
    let directories = DIRECTORIES.iter().filter_map(inside);
    let directories = directories.map(|(name, path)| (name, Node::SystemDirectory(path)));
    files.chain(directories).collect()
}

impl Proc<'_> {
    /// Returns the contents of a file outside of processes.
    pub(super) fn system(&self, path: &str) -> Result<Vec<u8>> {
        let text = match path {
            // Images do not have the number of processors.
            "cpuinfo" => "processor\t: 0\n\n".to_owned(),
            "filesystems" => "nodev\tproc\nnodev\ttmpfs\n".to_owned(),
            "loadavg" => {
                let tree = self.tables.tree()?;
                let threads: usize = tree.iter().map(|entry| entry.threads.len().max(1)).sum();
                let last = tree.iter().map(|entry| entry.pid).max().unwrap_or(0);
                format!("0.00 0.00 0.00 0/{threads} {last}\n")
            }
            "meminfo" => self.meminfo()?,
            "net/netlink" => "sk               Eth Pid        Groups   Rmem     Wmem     Dump  Locks    Drops    Inode\n".to_owned(),
            "net/raw" => "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode ref pointer drops\n".to_owned(),
            "net/tcp" => self.internet(INET, TCP)?,
            "net/tcp6" => self.internet(INET6, TCP)?,
            "net/udp" => self.internet(INET, UDP)?,
            "net/udp6" => self.internet(INET6, UDP)?,
            "mounts" => return self.mounts(),
            "net/unix" => return self.unix(),
            "stat" => self.system_stat()?,
            // Images do not have it; programs expect a kernel that is recent enough.
            "sys/kernel/osrelease" => "6.0.0\n".to_owned(),
            "sys/kernel/pid_max" => PID_MAX.to_owned(),
            "tty/drivers" => TTY_DRIVERS.to_owned(),
            "uptime" => {
                let us = self.uptime_us()?;
                format!("{}.{:02} 0.00\n", us / 1_000_000, us / TICK_US % 100)
            }
            _ => String::new(),
        };
        Ok(text.into_bytes())
    }

    /// Returns the uptime of the machine in microseconds; 0 in older images.
    pub(in crate::view) fn uptime_us(&self) -> Result<u64> {
        let inventory: Option<proto::InventoryEntry> =
            self.tables.images().message_if_any(Kind::Inventory, 0)?;
        Ok(inventory.and_then(|inventory| inventory.dump_uptime).unwrap_or(0))
    }

    /// Returns `meminfo` for a machine that has exactly the memory of the tree.
    fn meminfo(&self) -> Result<String> {
        let mut bytes = 0;
        for entry in self.tables.tree()?.iter() {
            let resident = self.sizes(entry.pid)?.map_or(0, |sizes| sizes.resident());
            bytes = u64::saturating_add(bytes, resident);
        }
        let mut text = String::new();
        for (name, value) in [
            ("MemTotal", bytes >> 10),
            ("MemFree", 0),
            ("MemAvailable", 0),
            ("Buffers", 0),
            ("Cached", 0),
            ("SwapCached", 0),
            ("SwapTotal", 0),
            ("SwapFree", 0),
            ("Shmem", 0),
            ("Slab", 0),
            ("SReclaimable", 0),
        ] {
            let _ = writeln!(text, "{:15} {value:8} kB", format!("{name}:"));
        }
        Ok(text)
    }

    fn system_stat(&self) -> Result<String> {
        let us = self.uptime_us()?;
        let boot = self.tables.dumped_at().saturating_sub(us / 1_000_000);
        let processes = self.tables.tree()?.len();
        Ok(format!(
            "cpu  0 0 0 0 0 0 0 0 0 0\ncpu0 0 0 0 0 0 0 0 0 0 0\nintr 0\nctxt 0\nbtime {boot}\n\
             processes {processes}\nprocs_running 0\nprocs_blocked 0\n"
        ))
    }

    /// Returns `net/tcp` and the like (`proc_net(5)`).
    fn internet(&self, family: u32, protocol: u32) -> Result<String> {
        let pad = if family == INET { 8 } else { 32 };
        let heads = if family == INET { V4_HEADS } else { V6_HEADS };
        let mut text = format!(
            "  sl  {heads} st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
        );
        let files = self.tables.files()?;
        let sockets = files.entries().filter_map(|entry| Some((entry, entry.isk.as_ref()?)));
        let sockets = sockets.filter(|(_, sk)| sk.family == family && sk.proto == protocol);
        for (number, (entry, sk)) in sockets.enumerate() {
            let uid = entry.owner.as_ref().map_or(0, |owner| owner.uid);
            let local = address(&sk.src_addr, sk.src_port, pad);
            let remote = address(&sk.dst_addr, sk.dst_port, pad);
            let (state, ino) = (sk.state, sk.ino);
            let _ = writeln!(
                text,
                "{number:4}: {local} {remote} {state:02X} 00000000:00000000 00:00000000 00000000 \
                 {uid:5}        0 {ino} 1 0000000000000000 100 0 0 10 0"
            );
        }
        Ok(text)
    }

    /// Returns `net/unix`.
    fn unix(&self) -> Result<Vec<u8>> {
        let mut text = b"Num       RefCount Protocol Flags    Type St Inode Path\n".to_vec();
        let files = self.tables.files()?;
        for sk in files.entries().filter_map(|entry| entry.usk.as_ref()) {
            let flags = if sk.state == LISTENING { ACCEPTS } else { 0 };
            let connected = sk.state == ESTABLISHED || sk.peer != 0;
            let state = if connected { SS_CONNECTED } else { SS_UNCONNECTED };
            let (kind, ino) = (sk.r#type, sk.ino);
            let line = format!(
                "0000000000000000: 00000002 00000000 {flags:08X} {kind:04X} {state:02X} {ino:5}"
            );
            text.extend(line.into_bytes());
            if !sk.name.is_empty() {
                text.push(b' ');
                // Abstract names begin with a NUL byte, which the kernel shows as `@`.
                let name = match sk.name.strip_prefix(b"\0") {
                    Some(rest) => [b"@", rest].concat(),
                    None => sk.name.clone(),
                };
                let name = name.strip_suffix(b"\0").unwrap_or(&name).to_vec();
                text.extend(name.iter().map(|byte| if *byte == 0 { b'@' } else { *byte }));
            }
            text.push(b'\n');
        }
        Ok(text)
    }
}

/// Returns address and port as in `net/tcp`: native words, which images store.
fn address(words: &[u32], port: u32, digits: usize) -> String {
    let text: String = words.iter().map(|word| format!("{word:08X}")).collect();
    format!("{text:0>digits$}:{port:04X}")
}
