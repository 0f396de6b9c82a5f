//! The programs of iptables, and tables of nftables that iptables-nft has written.
//!
//! In their rules the kernel runs matches and targets of iptables. nft(8) shows some of these as expressions of
//! its own, which iptables does not recognize afterwards, and cannot write the others. So iptables-nft reads and
//! writes such tables. In an image they follow the rules of the older iptables, behind [`MARK`].

use std::collections::BTreeSet;

use crate::{
    image::Kind,
    res::netlink::{Attributes, Body, Message, Talk, text},
};

/// The line behind which the rules of iptables-nft are in an image; to iptables it is a comment.
const MARK: &str = "# iptables-nft\n";

/// `NFT_MSG_GETRULE` and `NFT_MSG_NEWRULE` of `NFNL_SUBSYS_NFTABLES` (`linux/netfilter/nf_tables.h`).
const GET_RULES: u16 = 10 << 8 | 7;
const NEW_RULE: u16 = 10 << 8 | 6;

/// Attributes of rules and expressions (`linux/netfilter/nf_tables.h`).
const RULE_TABLE: u16 = 1;
const RULE_EXPRESSIONS: u16 = 4;
const LIST_ELEMENT: u16 = 1;
const EXPRESSION_NAME: u16 = 1;

/// The names of expressions that run matches and targets of iptables (`net/netfilter/nft_compat.c`).
const FOREIGN: [&[u8]; 2] = [b"match", b"target"];

/// The size of `struct nfgenmsg`, whose first byte is the family.
const FIXED_BYTES: usize = 4;

/// A family of packets that iptables filters.
#[derive(Debug)]
pub(super) struct Family {
    /// `NFPROTO_IPV4`, `NFPROTO_IPV6` (`linux/netfilter.h`).
    number: u8,
    /// Its name in rules of nft.
    word: &'static str,
    pub(super) kind: Kind,
    /// The file in `/proc/PID/net` with the tables of the older iptables that are in use.
    pub(super) tables: &'static str,
    /// The programs of the older iptables, which may have the second name only.
    pub(super) older_save: [&'static str; 2],
    pub(super) older_restore: [&'static str; 2],
    /// Those of iptables-nft.
    pub(super) save: &'static str,
    pub(super) restore: &'static str,
}

pub(super) const FAMILIES: [Family; 2] = [
    Family {
        number: 2,
        word: "ip",
        kind: Kind::Iptables,
        tables: "ip_tables_names",
        older_save: ["iptables-legacy-save", "iptables-save"],
        older_restore: ["iptables-legacy-restore", "iptables-restore"],
        save: "iptables-nft-save",
        restore: "iptables-nft-restore",
    },
    Family {
        number: 10,
        word: "ip6",
        kind: Kind::Ip6tables,
        tables: "ip6_tables_names",
        older_save: ["ip6tables-legacy-save", "ip6tables-save"],
        older_restore: ["ip6tables-legacy-restore", "ip6tables-restore"],
        save: "ip6tables-nft-save",
        restore: "ip6tables-nft-restore",
    },
];

impl Family {
    /// Returns the first line of a table in the rules of nft.
    fn head(&self, table: &str) -> String {
        format!("table {} {table} {{", self.word)
    }
}

/// The tables with matches or targets of iptables, by family and name.
pub(super) type Tables = BTreeSet<(u8, String)>;

/// Finds these tables in the network namespace of the calling thread.
pub(super) fn tables(talk: &mut Talk) -> Tables {
    let all = talk.list(GET_RULES, &Body::new(&[0; FIXED_BYTES]), NEW_RULE).unwrap_or_default();
    all.iter().filter_map(table_of_foreign).collect()
}

/// Returns the family and the table of a rule with a match or target of iptables.
fn table_of_foreign(rule: &Message) -> Option<(u8, String)> {
    let (fixed, attributes) = rule.body.split_at_checked(FIXED_BYTES)?;
    let find = |wanted| Attributes(attributes).find(|(kind, _)| *kind == wanted);
    let (_, expressions) = find(RULE_EXPRESSIONS)?;
    let elements = Attributes(expressions).filter(|(kind, _)| *kind == LIST_ELEMENT);
    let mut names = elements
        .flat_map(|(_, element)| Attributes(element))
        .filter(|(kind, _)| *kind == EXPRESSION_NAME)
        .map(|(_, name)| text(name));
    names.any(|name| FOREIGN.contains(&name.as_slice())).then_some(())?;
    let (_, table) = find(RULE_TABLE)?;
    Some((fixed[0], String::from_utf8(text(table)).ok()?))
}

/// Returns the names of the tables of a family.
pub(super) fn of<'a>(tables: &'a Tables, family: &Family) -> impl Iterator<Item = &'a str> {
    let number = family.number;
    tables.iter().filter(move |(of, _)| *of == number).map(|(_, name)| name.as_str())
}

/// Takes a table out of the rules of nft (`nft list ruleset`), and returns it.
pub(super) fn take(rules: &mut String, family: &Family, table: &str) -> Option<String> {
    let head = family.head(table);
    let start = rules
        .split_inclusive('\n')
        .scan(0, |at, line| {
            let start = *at;
            *at += line.len();
            Some((start, line))
        })
        .find_map(|(start, line)| (line.trim_end() == head).then_some(start))?;
    // Only the end of a table is at the beginning of a line.
    let len = rules[start..].find("\n}\n").map_or(rules.len() - start, |at| at + "\n}\n".len());
    Some(rules.drain(start..start + len).collect())
}

/// Returns the rules that `iptables-nft-save` has shown of a table, for the image; `None` if it cannot read the
/// table. `shown` is the table as nft shows it: the program also shows chains that the table does not have.
pub(super) fn saved(output: &str, table: &str, shown: &str) -> Option<String> {
    let is_there = |chain: &str| {
        shown.lines().any(|line| line.trim().strip_prefix("chain ") == Some(&format!("{chain} {{")))
    };
    let is_kept = |line: &str| {
        let chain = line.strip_prefix(':').and_then(|rest| rest.split(' ').next());
        chain.is_none_or(is_there) && !line.starts_with('#')
    };
    output.lines().any(|line| line == format!("*{table}")).then_some(())?;
    Some(output.split_inclusive('\n').filter(|line| is_kept(line.trim_end())).collect())
}

/// Returns the image with rules of the older iptables, and of iptables-nft.
pub(super) fn joined(older: &[u8], rules: &str) -> Vec<u8> {
    if rules.is_empty() {
        return older.to_vec();
    }
    [older, MARK.as_bytes(), rules.as_bytes()].concat()
}

/// Returns the rules of the older iptables in an image, and those of iptables-nft.
pub(super) fn parted(image: &[u8]) -> (&[u8], &[u8]) {
    let mark = MARK.as_bytes();
    let mut starts = (0..image.len()).filter(|at| *at == 0 || image[at - 1] == b'\n');
    match starts.find(|at| image[*at..].starts_with(mark)) {
        Some(at) => (&image[..at], &image[at + mark.len()..]),
        None => (image, &[]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHOWN: &str = "table ip nat {\n\tchain POSTROUTING {\n\t\tmasquerade\n\t}\n}\n";

    #[test]
    fn tables_are_taken_out_of_the_rules() {
        let other = "table ip nat2 {\n\tset a {\n\t\ttype mark\n\t}\n}\n";
        let mut rules = format!("{other}{SHOWN}{other}");
        assert_eq!(take(&mut rules, &FAMILIES[0], "nat").as_deref(), Some(SHOWN));
        assert_eq!(rules, format!("{other}{other}"));
        assert_eq!(take(&mut rules, &FAMILIES[1], "nat2"), None);
    }

    #[test]
    fn chains_that_a_table_lacks_are_left_out() {
        let output = "# Generated\n*nat\n:INPUT ACCEPT [0:0]\n:POSTROUTING ACCEPT [1:2]\n[3:4] -A POSTROUTING \
                      -j MASQUERADE\nCOMMIT\n# Completed\n";
        let kept = "*nat\n:POSTROUTING ACCEPT [1:2]\n[3:4] -A POSTROUTING -j MASQUERADE\nCOMMIT\n";
        assert_eq!(saved(output, "nat", SHOWN).as_deref(), Some(kept));
        assert_eq!(saved("# Table `nat' is incompatible, use 'nft' tool.\n", "nat", SHOWN), None);
    }

    #[test]
    fn the_rules_of_both_are_in_one_image() {
        let older = b"*filter\nCOMMIT\n";
        for rules in ["", "*nat\nCOMMIT\n"] {
            for older in [&b""[..], older] {
                assert_eq!(parted(&joined(older, rules)), (older, rules.as_bytes()));
            }
        }
    }
}
