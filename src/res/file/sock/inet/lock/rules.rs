//! The rules of iptables that drop the packets of connections, as CRIU has them.

use std::{
    io::{self, Write},
    net::SocketAddr,
    process::{Command, Stdio},
};

use super::{Ends, MARK};

/// A change of a rule, as an option of `iptables`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    Insert,
    Delete,
}

/// Rules that drop the packets of connections while this value exists.
#[derive(Debug, Default)]
pub(in super::super) struct Rules {
    held: Vec<Ends>,
}

impl Rules {
    /// Drops the packets of more connections.
    ///
    /// # Errors
    /// `iptables-restore` is missing, or has failed.
    pub(in super::super) fn hold(&mut self, ends: &[Ends]) -> io::Result<()> {
        // If it fails for the second family, the rules of the first one are there.
        self.held.extend(ends);
        change(Change::Insert, ends)
    }

    /// Leaves the rules to the restore ([`lift_rules`]).
    pub(in super::super) fn keep(&mut self) {
        self.held.clear();
    }
}

impl Drop for Rules {
    fn drop(&mut self) {
        if let Err(error) = lift_rules(&self.held) {
            log::error!("packets of the tree's connections are held back: {error}");
        }
    }
}

/// Removes the rules that rcriu or CRIU has inserted for connections. Warns about those that are
/// missing.
///
/// # Errors
/// `iptables` cannot be run.
pub(in super::super) fn lift_rules(ends: &[Ends]) -> io::Result<()> {
    // All at once, or, if one is missing, one by one.
    if ends.is_empty() || change(Change::Delete, ends).is_ok() {
        return Ok(());
    }
    for ends in ends {
        for (chain, (from, to)) in directions(*ends) {
            let mut command = Command::new(program(from));
            let words = rule(Change::Delete, chain, (from, to));
            command.args(["-w", "-t", "filter"]).args(words.split(' '));
            let output = command.stdin(Stdio::null()).output()?;
            if !output.status.success() {
                let said = String::from_utf8_lossy(&output.stderr);
                log::warn!("no rule of iptables drops {from} -> {to}: {}", said.trim());
            }
        }
    }
    Ok(())
}

/// Returns the chains with the packets that each drops.
fn directions((own, peer): Ends) -> [(&'static str, Ends); 2] {
    [("INPUT", (peer, own)), ("OUTPUT", (own, peer))]
}

fn is_v4(address: SocketAddr) -> bool {
    address.ip().to_canonical().is_ipv4()
}

fn program(address: SocketAddr) -> &'static str {
    if is_v4(address) { "iptables" } else { "ip6tables" }
}

/// Returns the words of a rule, in the order of CRIU.
fn rule(change: Change, chain: &str, (from, to): Ends) -> String {
    let option = match change {
        Change::Insert => "-I",
        Change::Delete => "-D",
    };
    format!(
        "{option} {chain} -p tcp -m mark ! --mark {MARK:#x} -s {} --sport {} -d {} --dport {} -j DROP",
        from.ip().to_canonical(),
        from.port(),
        to.ip().to_canonical(),
        to.port()
    )
}

/// Changes the rules of connections, those of a family in one transaction.
fn change(change: Change, ends: &[Ends]) -> io::Result<()> {
    for v4 in [true, false] {
        let of_family = ends.iter().filter(|(own, _)| is_v4(*own) == v4);
        let mut text = String::new();
        for (chain, ends) in of_family.flat_map(|ends| directions(*ends)) {
            text.push_str(&rule(change, chain, ends));
            text.push('\n');
        }
        if !text.is_empty() {
            let program = if v4 { "iptables-restore" } else { "ip6tables-restore" };
            run(program, &format!("*filter\n{text}COMMIT\n"))?;
        }
    }
    Ok(())
}

fn run(program: &str, text: &str) -> io::Result<()> {
    let mut command = Command::new(program);
    command.args(["-w", "--noflush"]).stdin(Stdio::piped());
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
    // It reports text that it could not read in full.
    let written = child.stdin.take().map_or(Ok(()), |mut input| input.write_all(text.as_bytes()));
    let output = child.wait_with_output()?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(io::Error::other(format!("{program}: {}", said.trim())));
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_those_of_criu() {
        let ends =
            ("[::ffff:10.0.0.1]:80".parse().unwrap(), "[::ffff:10.0.0.2]:90".parse().unwrap());
        let [(chain, ends), _] = directions(ends);
        assert_eq!(
            rule(Change::Delete, chain, ends),
            "-D INPUT -p tcp -m mark ! --mark 0xc114 -s 10.0.0.2 --sport 90 -d 10.0.0.1 --dport 80 \
             -j DROP"
        );
    }
}
