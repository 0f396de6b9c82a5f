//! Packet filters of a network namespace, and the connections that they track.
//!
//! Only `nft(8)` and `iptables(8)` know how their rules are written, so these programs read and write them. They
//! are those of the host, and run with its files, in the network namespace.

use std::{
    io::{self, Write},
    process::{Command, Stdio},
};

use super::{
    Problem, read_raw, warn, write_raw, wrong,
    xtables::{self, FAMILIES},
};
use crate::{
    image::{ImageStore, Kind, SnapshotWriter},
    res::{
        ResError, Result,
        netlink::{Attributes, Body, CREATE, Message, Talk},
    },
    units::HostPid,
};

/// `NFT_MSG_GETTABLE` and `NFT_MSG_NEWTABLE` of `NFNL_SUBSYS_NFTABLES` (`linux/netfilter/nf_tables.h`).
const GET_TABLES: u16 = 10 << 8 | 1;
const NEW_TABLE: u16 = 10 << 8;

/// `IPCTNL_MSG_CT_NEW` and `_GET` of `NFNL_SUBSYS_CTNETLINK`, and those of `_EXP`
/// (`linux/netfilter/nfnetlink_conntrack.h`).
const NEW_CONNECTION: u16 = 1 << 8;
const GET_CONNECTIONS: u16 = NEW_CONNECTION | 1;
const NEW_EXPECTATION: u16 = 2 << 8;
const GET_EXPECTATIONS: u16 = NEW_EXPECTATION | 1;

/// How many connections the network namespace of the calling thread tracks. Each expectation belongs to one.
const CONNECTIONS: &str = "/proc/sys/net/netfilter/nf_conntrack_count";

/// The size of `struct nfgenmsg`.
const FIXED_BYTES: usize = 4;

/// Writes the images. The calling thread is in the namespace, and so is process `pid`.
///
/// # Errors
/// A program fails, or shows rules that it cannot read again.
pub(super) fn dump(images: &SnapshotWriter, number: u32, pid: HostPid) -> Result<()> {
    let failed = |problem: String| ResError::Namespace { number, problem };
    let mut talk = Talk::about_filters();
    let list = Body::new(&[0; FIXED_BYTES]);
    let mut newer = [String::new(), String::new()];
    // A kernel without them has none.
    if talk.list(GET_TABLES, &list, NEW_TABLE).is_ok_and(|tables| !tables.is_empty()) {
        let rules = run(&["nft"], &["list", "ruleset"], None).map_err(failed)?;
        let mut rules = String::from_utf8_lossy(&rules).into_owned();
        newer = of_iptables(&mut talk, &mut rules);
        let is_foreign =
            |line: &str| ["xt match ", "xt target "].iter().any(|word| line.contains(word));
        if let Some(line) = rules.lines().find(|line| is_foreign(line)) {
            return Err(failed(format!(
                "nft(8) cannot write this rule of iptables-nft: {}\nhelp: remove it for the dump, install \
                 iptables-nft-save, or use iptables-legacy",
                line.trim()
            )));
        }
        if !rules.is_empty() {
            write_raw(images, Kind::Nftables, number, rules.as_bytes())?;
        }
    }
    for (family, newer) in FAMILIES.iter().zip(newer) {
        let tables = format!("/proc/{pid}/net/{}", family.tables);
        let tables = std::fs::read(tables).unwrap_or_default();
        let older = match tables.is_empty() {
            true => Vec::new(),
            false => run(&family.older_save, &["-c"], None).map_err(failed)?,
        };
        let rules = xtables::joined(&older, &newer);
        if !rules.is_empty() {
            write_raw(images, family.kind, number, &rules)?;
        }
    }
    // To list connections, the kernel looks at those of all namespaces.
    if std::fs::read(CONNECTIONS).is_ok_and(|count| count.trim_ascii() == b"0") {
        return Ok(());
    }
    for (kind, get, new) in [
        (Kind::NetnfCt, GET_CONNECTIONS, NEW_CONNECTION),
        (Kind::NetnfExp, GET_EXPECTATIONS, NEW_EXPECTATION),
    ] {
        let found = talk.list(get, &list, new).unwrap_or_default();
        if !found.is_empty() {
            let mut bytes = Vec::new();
            found.iter().for_each(|message| message.write(&mut bytes));
            write_raw(images, kind, number, &bytes)?;
        }
    }
    Ok(())
}

/// Takes the tables of iptables-nft out of the rules of nft, and returns them as iptables has them, by family.
/// Tables that iptables cannot read stay.
fn of_iptables(talk: &mut Talk, rules: &mut String) -> [String; 2] {
    let tables = xtables::tables(talk);
    FAMILIES.each_ref().map(|family| {
        let mut found = String::new();
        for table in xtables::of(&tables, family) {
            let mut others = rules.clone();
            let Some(shown) = xtables::take(&mut others, family, table) else { continue };
            match run(&[family.save], &["-c", "-t", table], None) {
                Ok(output) => {
                    let output = String::from_utf8_lossy(&output);
                    if let Some(saved) = xtables::saved(&output, table, &shown) {
                        found.push_str(&saved);
                        *rules = others;
                    }
                }
                Err(why) => warn(&format!(
                    "the rules of iptables in table {table} would come back as rules of nft: {why}"
                )),
            }
        }
        found
    })
}

/// Runs a program of the host, by the first of its names that exists, in the network namespace of the
/// calling thread. Returns its output.
fn run(names: &[&str], arguments: &[&str], input: Option<&[u8]>) -> Result<Vec<u8>, String> {
    let Some((name, others)) = names.split_first() else {
        return Err("no program was named".to_owned());
    };
    let failed = |error: io::Error| format!("run {name}: {error}\nhelp: install it");
    let stdin = if input.is_some() { Stdio::piped() } else { Stdio::null() };
    let child = Command::new(name)
        .args(arguments)
        .stdin(stdin)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut child = match child {
        Err(error) if error.kind() == io::ErrorKind::NotFound && !others.is_empty() => {
            return run(others, arguments, input);
        }
        child => child.map_err(failed)?,
    };
    if let (Some(input), Some(mut stdin)) = (input, child.stdin.take()) {
        // If it ends early, its message says more.
        let _ = stdin.write_all(input);
    }
    let output = child.wait_with_output().map_err(failed)?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(format!("{name} failed ({}): {}", output.status, said.trim()))
}

/// The images of packet filters.
#[derive(Debug, Default)]
pub(super) struct Filters {
    nftables: Option<Vec<u8>>,
    iptables: [Option<Vec<u8>>; 2],
    connections: Vec<Message>,
    expectations: Vec<Message>,
}

impl Filters {
    /// Reads them.
    pub(super) fn read(images: &dyn ImageStore, number: u32) -> Result<Self> {
        let text = |kind: Kind| -> Result<Option<Vec<u8>>> {
            let Some(text) = read_raw(images, kind, number)? else { return Ok(None) };
            if let Some(word) = forbidden(&text) {
                let name = kind.file_name(number.into());
                let problem =
                    format!("{name}: {word:?} is no part of a packet filter, but of the machine");
                return Err(wrong(number, &problem));
            }
            Ok((!text.trim_ascii().is_empty()).then_some(text))
        };
        let messages = |kind: Kind, wanted: u16| -> Result<Vec<Message>> {
            let bytes = read_raw(images, kind, number)?.unwrap_or_default();
            let problem =
                |what| wrong(number, &format!("{}: {what}", kind.file_name(number.into())));
            let messages = Message::read_all(&bytes).map_err(problem)?;
            match messages.iter().find(|message| message.kind != wanted) {
                Some(other) => {
                    let what =
                        format!("a message has type {:#x}, expected {wanted:#x}", other.kind);
                    Err(problem(what))
                }
                None => Ok(messages),
            }
        };
        Ok(Self {
            nftables: text(Kind::Nftables)?,
            iptables: [text(Kind::Iptables)?, text(Kind::Ip6tables)?]
                .map(|rules| rules.map(|rules| without_lock(&rules))),
            connections: messages(Kind::NetnfCt, NEW_CONNECTION)?,
            expectations: messages(Kind::NetnfExp, NEW_EXPECTATION)?,
        })
    }

    /// Restores them in the namespace of the calling thread.
    pub(super) fn restore(&self) -> Result<(), Problem> {
        for (family, rules) in FAMILIES.iter().zip(&self.iptables) {
            let (older, newer) = xtables::parted(rules.as_deref().unwrap_or_default());
            if !older.is_empty() {
                run(&family.older_restore, &["-w", "-c"], Some(older)).map_err(Problem)?;
            }
            if !newer.is_empty() {
                run(&[family.restore], &["-w", "-c"], Some(newer)).map_err(Problem)?;
            }
        }
        if let Some(rules) = &self.nftables {
            run(&["nft"], &["-f", "-"], Some(rules)).map_err(Problem)?;
            for table in tables_of_locks(rules) {
                run(&["nft"], &["delete", "table", "inet", &table], None).map_err(Problem)?;
            }
        }
        let mut talk = Talk::about_filters();
        let mut lost = 0;
        let mut why = None;
        let all = self.connections.iter().map(liberal).chain(self.expectations.iter().cloned());
        for message in all {
            if let Err(error) = talk.change(message.kind, CREATE, &message.body) {
                lost += 1;
                why = Some(error);
            }
        }
        if let Some(error) = why {
            warn(&format!("{lost} tracked connections of the packet filter are lost: {error}"));
        }
        Ok(())
    }
}

/// Returns the rules of iptables without those by which CRIU drops all packets while it dumps: they are in its
/// images.
fn without_lock(rules: &[u8]) -> Vec<u8> {
    let is_kept = |line: &&[u8]| {
        // Behind counters there may be a rule.
        let rule = line.strip_prefix(b"[").and_then(|rest| rest.splitn(2, |c| *c == b' ').nth(1));
        let rule = rule.unwrap_or(line).trim_ascii();
        !rule.starts_with(b":CRIU ")
            && !rule.starts_with(b"-A CRIU ")
            && !matches!(rule, b"-A INPUT -j CRIU" | b"-A OUTPUT -j CRIU")
    };
    rules.split_inclusive(|byte| *byte == b'\n').filter(is_kept).flatten().copied().collect()
}

/// Removes the rules of iptables by which a dump of CRIU has all packets of a namespace dropped, if they are
/// there. The calling thread is in the namespace.
pub(super) fn lift_lock() {
    for program in ["iptables", "ip6tables"] {
        if run(&[program], &["-w", "-S", "CRIU"], None).is_err() {
            continue;
        }
        for arguments in [
            ["-w", "-D", "INPUT", "-j", "CRIU"].as_slice(),
            &["-w", "-D", "OUTPUT", "-j", "CRIU"],
            &["-w", "-F", "CRIU"],
            &["-w", "-X", "CRIU"],
        ] {
            if let Err(error) = run(&[program], arguments, None) {
                warn(&format!("packets in the network namespace are held back: {error}"));
            }
        }
    }
}

/// Returns the names of the tables of nftables for that.
fn tables_of_locks(rules: &[u8]) -> Vec<String> {
    let text = String::from_utf8_lossy(rules);
    let names = text.lines().filter_map(|line| line.strip_prefix("table inet CRIU-"));
    names.filter_map(|rest| Some(format!("CRIU-{}", rest.split_once(' ')?.0))).collect()
}

/// Returns a word by which the rules of an image would do more than to filter packets: have the program
/// read another file, or run one (`iptables --modprobe`).
fn forbidden(rules: &[u8]) -> Option<String> {
    /// The shortest form that `getopt_long(3)` may take for the option.
    const SHORTEST: usize = "--mo".len();
    let is_separator =
        |byte: &u8| byte.is_ascii_whitespace() || matches!(byte, b'"' | b'\'' | b'=' | b';');
    let is_bad = |word: &&[u8]| {
        let is_option = word.len() >= SHORTEST && b"--modprobe".starts_with(word);
        let letters = word.strip_prefix(b"-").filter(|rest| rest.first() != Some(&b'-'));
        let is_short = letters.is_some_and(|letters| {
            let flags = letters.iter().take_while(|letter| b"nvxfch46".contains(letter)).count();
            letters.get(flags) == Some(&b'M')
        });
        is_option || is_short || *word == b"include"
    };
    let word = rules.split(is_separator).find(is_bad)?;
    Some(String::from_utf8_lossy(word).into_owned())
}

/// Returns the message of a tracked connection such that its window is not checked: what came while there was
/// no connection is not known.
fn liberal(message: &Message) -> Message {
    /// `CTA_PROTOINFO`, `CTA_PROTOINFO_TCP`, `CTA_PROTOINFO_TCP_FLAGS_ORIGINAL` and `_REPLY`.
    const PROTOCOL: u16 = 4;
    const TCP: u16 = 1;
    const FLAGS: [u16; 2] = [4, 5];
    /// `IP_CT_TCP_FLAG_BE_LIBERAL`.
    const LIBERAL: u8 = 8;
    let Some(fixed) = message.body.get(..FIXED_BYTES) else { return message.clone() };
    let of_tcp = |attributes: &[u8]| {
        let mut inner = Body::default();
        for (kind, value) in Attributes(attributes) {
            inner = match value {
                [flags, mask] if FLAGS.contains(&kind) => {
                    inner.with(kind, &[flags | LIBERAL, mask | LIBERAL])
                }
                _ => inner.with(kind, value),
            };
        }
        inner
    };
    let mut rest = message.body.get(FIXED_BYTES..).unwrap_or_default();
    let mut body = Body::new(fixed);
    while let Some((kind, value)) = Attributes(rest).next() {
        let whole = (value.len() + 4).next_multiple_of(4).min(rest.len());
        let tcp = Attributes(value).find(|(kind, _)| *kind == TCP).filter(|_| kind == PROTOCOL);
        match tcp {
            Some((_, tcp)) => {
                body = body.nested(PROTOCOL, &Body::default().nested(TCP, &of_tcp(tcp)));
            }
            None => body.0.extend(&rest[..whole]),
        }
        body.0.resize(body.0.len().next_multiple_of(4), 0);
        rest = &rest[whole..];
    }
    Message { kind: message.kind, body: body.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_locks_of_criu_are_left_out() {
        let rules = b"*filter\n:INPUT ACCEPT [0:0]\n:CRIU - [0:0]\n[1:2] -A INPUT -j CRIU\n-A OUTPUT -j CRIU\n\
            [0:0] -A INPUT -p tcp -j DROP\n-A CRIU -j DROP\nCOMMIT\n";
        let kept = b"*filter\n:INPUT ACCEPT [0:0]\n[0:0] -A INPUT -p tcp -j DROP\nCOMMIT\n";
        assert_eq!(without_lock(rules), kept);
        let rules = b"table inet t {\n}\ntable inet CRIU-1f-2 {\n}\n";
        assert_eq!(tables_of_locks(rules), ["CRIU-1f-2"]);
    }

    #[test]
    fn rules_can_neither_run_programs_nor_read_files() {
        let bad = |rules: &str| forbidden(rules.as_bytes());
        for rules in [
            "-A INPUT --modprobe=/tmp/x -j ACCEPT",
            "-A INPUT --modp /tmp/x",
            "-A INPUT -M /tmp/x",
            "-A INPUT -vM/tmp/x",
            "include \"/etc/shadow\"",
            "table ip a { }; include '/etc/shadow'",
        ] {
            assert!(bad(rules).is_some(), "{rules}");
        }
        for rules in [
            "*filter\n:INPUT ACCEPT [0:0]\n[1:2] -A INPUT -m mark --mark 0x1 -j MARK --set-xmark 0x1/0x2\n",
            "table inet a { chain b { type filter hook input priority 0; tcp dport 22 accept; } }",
        ] {
            assert_eq!(bad(rules), None, "{rules}");
        }
    }
}
