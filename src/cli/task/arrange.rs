//! Command lines as getopt_long(3), and therefore CRIU, accepts them.
//!
//! Options may precede the command, be abbreviated, have their values attached (`-v4`,
//! `-x12,13`, `-Ddir`), and be cancelled (`--no-display-stats`). [`arrange`] brings them into
//! the order and spelling that clap reads.

use std::{
    ffi::{OsStr, OsString},
    os::unix::ffi::{OsStrExt, OsStringExt},
};

use clap::Command;

/// Whether an option has a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Takes {
    Nothing,
    /// An optional value, attached to the option.
    Attached,
    /// A value that is attached to the option, or the next word.
    Value,
}

/// The names of an option, and where its value ends.
#[derive(Debug)]
struct Spec {
    long: String,
    aliases: Vec<String>,
    short: Option<u8>,
    takes: Takes,
}

/// All options.
#[derive(Debug)]
pub(super) struct Specs(Vec<Spec>);

/// One option as it was given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::cli) struct Given {
    /// Its long name.
    pub name: String,
    /// Its value.
    pub value: Option<OsString>,
    /// Whether it comes from a configuration file instead of the command line.
    pub configured: bool,
}

/// A command line taken apart.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Arranged {
    /// Options with their full names, without those that were cancelled.
    pub given: Vec<Given>,
    /// Operands in their order; the first is the command.
    pub operands: Vec<OsString>,
    /// Words that clap answers: a request for help, an unknown option, a missing value.
    pub for_clap: Vec<OsString>,
}

/// The options that clap has by itself.
const OF_CLAP: [&str; 2] = ["help", "version"];

/// The option that is also known with one dash: CRIU takes `-verbosity=0` for `-v` with a value.
const ONE_DASH: &str = "verbosity";

/// The meaning of a long name.
enum Named<'a> {
    Option(&'a Spec),
    /// The option without the `no-` before it.
    TakenBack(&'a Spec),
    /// An option of clap's own.
    OfClap(&'static str),
    /// No option, or the beginning of several.
    Unknown,
}

impl Specs {
    /// Returns the options of a command.
    pub fn of(command: &Command) -> Self {
        let specs = command.get_arguments().filter_map(|arg| {
            let takes = match (arg.get_action().takes_values(), arg.is_require_equals_set()) {
                (false, _) => Takes::Nothing,
                (true, true) => Takes::Attached,
                (true, false) => Takes::Value,
            };
            Some(Spec {
                long: arg.get_long()?.to_owned(),
                aliases: arg
                    .get_all_aliases()
                    .unwrap_or_default()
                    .into_iter()
                    .map(str::to_owned)
                    .collect(),
                short: arg.get_short().and_then(|short| u8::try_from(short).ok()),
                takes,
            })
        });
        Self(specs.collect())
    }

    /// Returns the meaning of a name, or of an unambiguous abbreviation.
    fn named(&self, name: &str) -> Named<'_> {
        let names = || {
            self.0.iter().flat_map(|spec| {
                let own = std::iter::once(spec.long.as_str());
                own.chain(spec.aliases.iter().map(String::as_str)).map(move |name| (name, spec))
            })
        };
        let can_be_taken_back = |spec: &Spec| spec.takes != Takes::Value;
        let base = name.strip_prefix("no-");
        if let Some((_, spec)) = names().find(|(known, _)| *known == name) {
            return Named::Option(spec);
        }
        if let Some(base) = base
            && let Some((_, spec)) = names().find(|(known, _)| *known == base)
            && can_be_taken_back(spec)
        {
            return Named::TakenBack(spec);
        }
        if let Some(own) = OF_CLAP.into_iter().find(|own| *own == name) {
            return Named::OfClap(own);
        }
        let begun = names().filter(|(known, _)| known.starts_with(name));
        let mut found: Vec<_> = begun.map(|(_, spec)| Named::Option(spec)).collect();
        let of_clap = OF_CLAP.into_iter().filter(|own| own.starts_with(name));
        found.extend(of_clap.map(Named::OfClap));
        if let Some(base) = base {
            let begun = names().filter(|(known, spec)| {
                known.starts_with(base) && !base.is_empty() && can_be_taken_back(spec)
            });
            found.extend(begun.map(|(_, spec)| Named::TakenBack(spec)));
        }
        match found.pop() {
            Some(one) if found.is_empty() => one,
            _ => Named::Unknown,
        }
    }

    /// Reads the words of a command line, without the program's name, and appends them to
    /// `arranged`.
    pub fn arrange(&self, words: &[OsString], mut arranged: Arranged) -> Arranged {
        let mut words = words.iter();
        while let Some(word) = words.next() {
            let bytes = word.as_bytes();
            if bytes == b"--" {
                arranged.operands.extend(words.by_ref().cloned());
            } else if let Some(long) = bytes.strip_prefix(b"--").or_else(|| with_one_dash(bytes)) {
                let (name, value) = match long.iter().position(|byte| *byte == b'=') {
                    Some(at) => (&long[..at], Some(OsStr::from_bytes(&long[at + 1..]).to_owned())),
                    None => (long, None),
                };
                let named = std::str::from_utf8(name).map(|name| self.named(name));
                match named.unwrap_or(Named::Unknown) {
                    Named::Option(spec) => arranged.take(spec, value, &mut words),
                    Named::TakenBack(spec) if value.is_none() => {
                        arranged.take_back(&spec.long);
                    }
                    Named::OfClap(own) if value.is_none() => {
                        arranged.for_clap.push(format!("--{own}").into());
                    }
                    Named::TakenBack(_) | Named::OfClap(_) | Named::Unknown => {
                        arranged.for_clap.push(word.clone());
                    }
                }
            } else if bytes.len() > 1 && bytes[0] == b'-' {
                self.arrange_short(&bytes[1..], &mut words, &mut arranged);
            } else {
                arranged.operands.push(word.clone());
            }
        }
        arranged
    }

    /// Reads a word of short options, without its dash.
    fn arrange_short<'a>(
        &self,
        letters: &[u8],
        words: &mut impl Iterator<Item = &'a OsString>,
        arranged: &mut Arranged,
    ) {
        for (at, letter) in letters.iter().enumerate() {
            let rest = &letters[at + 1..];
            let Some(spec) = self.0.iter().find(|spec| spec.short == Some(*letter)) else {
                arranged.for_clap.push(OsString::from_vec([b"-", &letters[at..]].concat()));
                return;
            };
            if spec.takes == Takes::Nothing {
                arranged.take(spec, None, words);
                continue;
            }
            let value = (!rest.is_empty()).then(|| OsString::from_vec(rest.to_vec()));
            arranged.take(spec, value, words);
            return;
        }
    }

    /// Reads a line of a configuration file.
    ///
    /// # Errors
    /// The reason why the line is wrong.
    pub fn configured(
        &self,
        name: &str,
        value: Option<OsString>,
        arranged: &mut Arranged,
    ) -> Result<(), &'static str> {
        match (self.named(name), value) {
            (Named::Option(Spec { takes: Takes::Nothing, .. }), Some(_)) => {
                Err("this option has no value")
            }
            (Named::Option(Spec { takes: Takes::Value, .. }), None) => {
                Err("this option needs a value")
            }
            (Named::Option(spec), value) => {
                let name = spec.long.clone();
                arranged.given.push(Given { name, value, configured: true });
                Ok(())
            }
            (Named::TakenBack(spec), None) => {
                arranged.take_back(&spec.long);
                Ok(())
            }
            (Named::TakenBack(_), Some(_)) => Err("this option has no value"),
            (Named::OfClap(_) | Named::Unknown, _) => Err("there is no such option"),
        }
    }
}

/// Returns the name, and the value, of an option with one dash.
fn with_one_dash(word: &[u8]) -> Option<&[u8]> {
    let name = word.strip_prefix(b"-")?;
    let rest = name.strip_prefix(ONE_DASH.as_bytes())?;
    matches!(rest.first(), None | Some(b'=')).then_some(name)
}

impl Arranged {
    /// Whether the line asks for the version before anything else that clap answers.
    pub fn asks_version(&self) -> bool {
        let first = self.for_clap.first().map(|word| word.as_bytes());
        first.is_some_and(|word| word == b"--version" || word.starts_with(b"-V"))
    }

    fn take<'a>(
        &mut self,
        spec: &Spec,
        value: Option<OsString>,
        words: &mut impl Iterator<Item = &'a OsString>,
    ) {
        let name = spec.long.clone();
        let value = match (spec.takes, value) {
            (Takes::Value, None) => match words.next() {
                Some(word) => Some(word.clone()),
                None => return self.for_clap.push(format!("--{name}").into()),
            },
            (_, value) => value,
        };
        self.given.push(Given { name, value, configured: false });
    }

    fn take_back(&mut self, name: &str) {
        self.given.retain(|given| given.name != name);
    }

    /// Returns these options and operands as words for clap.
    pub fn words(&self) -> impl Iterator<Item = OsString> {
        let given = self.given.iter().map(|Given { name, value, .. }| {
            let mut word = OsString::from(format!("--{name}"));
            if let Some(value) = value {
                word.push("=");
                word.push(value);
            }
            word
        });
        let dashes = (!self.operands.is_empty()).then(|| OsString::from("--"));
        given
            .chain(self.for_clap.iter().cloned())
            .chain(dashes)
            .chain(self.operands.iter().cloned())
    }
}

#[cfg(test)]
mod tests {
    use clap::Args;

    use super::*;
    use crate::cli::task::options::TaskArgs;

    fn arranged(line: &str) -> String {
        let specs = Specs::of(&TaskArgs::augment_args(Command::new("task")));
        let words: Vec<OsString> = line.split_whitespace().map(OsString::from).collect();
        let arranged = specs.arrange(&words, Arranged::default());
        let words: Vec<_> = arranged.words().map(|word| word.into_string().unwrap()).collect();
        words.join(" ")
    }

    #[test]
    fn lines_are_brought_into_one_order_and_spelling() {
        for (line, expected) in [
            ("dump -t 7", "--tree=7 -- dump"),
            ("dump -t7 -Ddir", "--tree=7 --images-dir=dir -- dump"),
            ("-v4 -D dir dump", "--verbosity=4 --images-dir=dir -- dump"),
            ("-v -vvvv -v0", "--verbosity --verbosity=vvv --verbosity=0"),
            ("-verbosity=0 -verbosity", "--verbosity=0 --verbosity"),
            ("-verbosityx", "--verbosity=erbosityx"),
            ("-Rjv4", "--leave-running --shell-job --verbosity=4"),
            ("-Rt 7", "--leave-running --tree=7"),
            ("-x -x12,13", "--ext-unix-sk --ext-unix-sk=12,13"),
            ("--tree 7 --tree=8", "--tree=7 --tree=8"),
            ("--work-dir -W", "--work-dir=-W"),
            // Optional values are attached, or not there.
            ("--manage-cgroups ignore", "--manage-cgroups -- ignore"),
            ("--manage-cgroups=ignore", "--manage-cgroups=ignore"),
            // Beginnings of names, if there is only one.
            ("--leave-r --ver", "--leave-running --ver"),
            ("--vers", "--version"),
            ("--he", "--help"),
            ("--version=1", "--version=1"),
            ("--verb=3 --no-disp", "--verbosity=3"),
            ("--leave", "--leave"),
            ("--tcp", "--tcp"),
            // The last one wins.
            ("--link-remap --no-link-remap", ""),
            ("--no-link-remap --link-remap", "--link-remap"),
            ("--auto-dedup --no-auto-dedup", ""),
            ("-d --no-daemon", ""),
            // A value can't be taken back.
            ("--no-tree", "--no-tree"),
            ("--no-default-config", "--no-default-config"),
            // For clap.
            ("-h", "-h"),
            ("--help", "--help"),
            ("-Rq", "--leave-running -q"),
            ("--bogus=1", "--bogus=1"),
            ("-t", "--tree"),
            ("--no-link-remap=1", "--no-link-remap=1"),
            ("--leave-running=1", "--leave-running=1"),
            // Operands.
            ("restore --exec-cmd -- ls -l --", "--exec-cmd -- restore ls -l --"),
            ("- -d", "--restore-detached -- -"),
        ] {
            assert_eq!(arranged(line), expected, "{line}");
        }
    }
}
