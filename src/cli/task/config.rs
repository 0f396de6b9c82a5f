//! Configuration files: options, one a line.

use std::{
    env,
    ffi::OsString,
    fs, io,
    path::{Path, PathBuf},
};

use anyhow::{Context, anyhow};

use super::arrange::{Arranged, Specs};
use crate::causes::is_called_criu;

/// The default files: for all users, and of one user in the home directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Defaults {
    of_all: &'static str,
    of_user: &'static str,
}

/// Our own.
const OWN: Defaults =
    Defaults { of_all: "/etc/rcriu/default.conf", of_user: ".rcriu/default.conf" };

/// Those of CRIU.
const OF_CRIU: Defaults =
    Defaults { of_all: "/etc/criu/default.conf", of_user: ".criu/default.conf" };

/// The variable that names a file to read after those two, as with CRIU.
const VARIABLE: &str = "CRIU_CONFIG_FILE";

/// The configuration files of a command line, in the order in which they are read. Later files
/// win.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Sources {
    /// Files that may be missing.
    optional: Vec<PathBuf>,
    /// A file that must exist.
    required: Option<PathBuf>,
}

impl Sources {
    /// Returns the files for a command line, in this environment.
    pub fn of(line: &Arranged) -> Self {
        let defaults = if is_called_criu() { OF_CRIU } else { OWN };
        Self::find(line, defaults, |name| env::var_os(name))
    }

    /// Returns the default files of the requests of clients, which know CRIU.
    pub fn of_clients() -> Self {
        Self::find(&Arranged::default(), OF_CRIU, |name| env::var_os(name))
    }

    fn find(
        line: &Arranged,
        defaults: Defaults,
        variable: impl Fn(&str) -> Option<OsString>,
    ) -> Self {
        let last = |name| line.given.iter().rfind(|given| given.name == name);
        let required = last("config").and_then(|given| given.value.clone()).map(PathBuf::from);
        let mut optional = Vec::new();
        // As with CRIU, the file of --config replaces the default ones.
        if required.is_none() && last("no-default-config").is_none() {
            optional.push(PathBuf::from(defaults.of_all));
            let home = variable("HOME");
            optional.extend(home.map(|home| Path::new(&home).join(defaults.of_user)));
        }
        optional.extend(variable(VARIABLE).filter(|path| !path.is_empty()).map(PathBuf::from));
        Self { optional, required }
    }

    /// Returns a file that may be missing: container runtimes always name one.
    pub fn only(path: PathBuf) -> Self {
        Self { optional: vec![path], required: None }
    }

    /// Reads the files.
    ///
    /// # Errors
    /// A file that cannot be read; a line with an unknown or wrong option, with its number.
    pub fn read(&self, specs: &Specs) -> anyhow::Result<Arranged> {
        let mut arranged = Arranged::default();
        self.add(specs, &mut arranged)?;
        Ok(arranged)
    }

    /// Reads the files, and adds their options to others.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn add(&self, specs: &Specs, arranged: &mut Arranged) -> anyhow::Result<()> {
        for path in &self.optional {
            match fs::read_to_string(path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                    let what = format!(
                        "read configuration file {}\nhelp: use --no-default-config to do without",
                        path.display()
                    );
                    return Err(anyhow::Error::new(error).context(what));
                }
                text => apply(path, text, specs, arranged)?,
            }
        }
        if let Some(path) = &self.required {
            apply(path, fs::read_to_string(path), specs, arranged)?;
        }
        Ok(())
    }
}

fn apply(
    path: &Path,
    text: io::Result<String>,
    specs: &Specs,
    arranged: &mut Arranged,
) -> anyhow::Result<()> {
    let text = text.with_context(|| format!("read configuration file {}", path.display()))?;
    for (number, line) in (1..).zip(text.lines()) {
        let result = parse(line).and_then(|parsed| match parsed {
            Some((name, value)) => specs.configured(name, value.map(OsString::from), arranged),
            None => Ok(()),
        });
        result.map_err(|why| anyhow!("{} line {number}: {why}", path.display()))?;
    }
    Ok(())
}

/// Splits a line into the name of an option and its value: `name`, `name value`, or
/// `name "value"`, in which `\"` is a quote. A `#` outside of quotes starts a comment.
fn parse(line: &str) -> Result<Option<(&str, Option<String>)>, &'static str> {
    let line = line.trim();
    let name_end = line.find(|c: char| c.is_whitespace() || c == '#').unwrap_or(line.len());
    let (name, rest) = (&line[..name_end], line[name_end..].trim_start());
    if name.is_empty() {
        return Ok(None);
    }
    if rest.is_empty() || rest.starts_with('#') {
        return Ok(Some((name, None)));
    }
    let (value, behind) = match rest.strip_prefix('"') {
        Some(quoted) => unquote(quoted)?,
        None => {
            let end = rest.find(|c: char| c.is_whitespace() || c == '#').unwrap_or(rest.len());
            (rest[..end].to_owned(), &rest[end..])
        }
    };
    let behind = behind.trim_start();
    if behind.is_empty() || behind.starts_with('#') {
        Ok(Some((name, Some(value))))
    } else {
        Err("there is more than one value; one with spaces needs quotes")
    }
}

/// Reads up to the quote that ends a value; returns the value and the rest of the text.
fn unquote(text: &str) -> Result<(String, &str), &'static str> {
    let mut value = String::new();
    let mut chars = text.char_indices().peekable();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return Ok((value, &text[at + 1..])),
            '\\' if chars.next_if(|(_, next)| *next == '"').is_some() => value.push('"'),
            c => value.push(c),
        }
    }
    Err("a quote is not closed")
}

#[cfg(test)]
mod tests {
    use clap::{Args, Command};

    use super::*;
    use crate::cli::task::{arrange::Given, options::TaskArgs};

    fn specs() -> Specs {
        Specs::of(&TaskArgs::augment_args(Command::new("task")))
    }

    #[test]
    fn lines_are_taken_apart() {
        let some = |name, value: &str| Ok(Some((name, Some(value.to_owned()))));
        for (line, expected) in [
            ("", Ok(None)),
            ("  # comment", Ok(None)),
            ("tcp-close", Ok(Some(("tcp-close", None)))),
            ("  tcp-close\t# comment", Ok(Some(("tcp-close", None)))),
            ("tcp-close#comment", Ok(Some(("tcp-close", None)))),
            ("verbosity 4", some("verbosity", "4")),
            ("verbosity\t4   # much", some("verbosity", "4")),
            (r#"work-dir "/a b""#, some("work-dir", "/a b")),
            (r#"work-dir "/a \"b\" #c" # d"#, some("work-dir", r#"/a "b" #c"#)),
            (r#"work-dir "a\b""#, some("work-dir", r"a\b")),
            (r#"work-dir """#, some("work-dir", "")),
            ("work-dir a b", Err("there is more than one value; one with spaces needs quotes")),
            (
                r#"work-dir "a" b"#,
                Err("there is more than one value; one with spaces needs quotes"),
            ),
            (r#"work-dir "a\""#, Err("a quote is not closed")),
        ] {
            assert_eq!(parse(line), expected, "{line}");
        }
    }

    #[test]
    fn files_are_found_in_the_order_of_criu() {
        let line = |words: &[&str]| {
            let words: Vec<OsString> = words.iter().map(OsString::from).collect();
            specs().arrange(&words, Arranged::default())
        };
        let variable = |name: &str| match name {
            "HOME" => Some("/home/u".into()),
            VARIABLE => Some("/v".into()),
            _ => None,
        };
        let found = |words| Sources::find(&line(words), OWN, variable);
        let paths = |paths: &[&str]| paths.iter().map(PathBuf::from).collect::<Vec<_>>();
        let defaults = paths(&[OWN.of_all, "/home/u/.rcriu/default.conf", "/v"]);
        assert_eq!(found(&["dump"]), Sources { optional: defaults, required: None });
        let of_criu = paths(&["/etc/criu/default.conf", "/home/u/.criu/default.conf", "/v"]);
        let expected = Sources { optional: of_criu, required: None };
        assert_eq!(Sources::find(&line(&["dump"]), OF_CRIU, variable), expected);
        assert_eq!(
            found(&["dump", "--no-default-config"]),
            Sources { optional: paths(&["/v"]), required: None }
        );
        assert_eq!(
            found(&["dump", "--config", "a", "--config=b"]),
            Sources { optional: paths(&["/v"]), required: Some("b".into()) }
        );
    }

    #[test]
    fn the_command_line_wins_over_files_and_later_files_over_earlier_ones() {
        let dir = tempfile::tempdir().unwrap();
        let [first, second] = ["1", "2"].map(|name| dir.path().join(name));
        fs::write(&first, "# one\ntcp-close\nlink-remap\nwork-dir \"a b\"\n").unwrap();
        fs::write(&second, "no-tcp-close\nmanage-cgroups ignore\n").unwrap();
        let absent = dir.path().join("absent");
        let sources = Sources { optional: vec![absent.clone(), first], required: Some(second) };
        let from_files = sources.read(&specs()).unwrap();
        let line = ["--no-link-remap".into(), "-Wc".into()];
        let given = |name: &str, value: &str, configured| Given {
            name: name.to_owned(),
            value: Some(OsString::from(value)),
            configured,
        };
        assert_eq!(
            specs().arrange(&line, from_files).given,
            [
                given("work-dir", "a b", true),
                given("manage-cgroups", "ignore", true),
                given("work-dir", "c", false)
            ]
        );

        let missing = Sources { optional: Vec::new(), required: Some(absent.clone()) };
        let error = missing.read(&specs()).unwrap_err();
        assert_eq!(error.to_string(), format!("read configuration file {}", absent.display()));
    }

    #[test]
    fn wrong_lines_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("conf");
        for (text, why) in [
            ("\nbogus", "line 2: there is no such option"),
            ("tree", "line 1: this option needs a value"),
            ("tcp-close 1", "line 1: this option has no value"),
            ("work-dir a b", "line 1: there is more than one value; one with spaces needs quotes"),
        ] {
            fs::write(&path, text).unwrap();
            let sources = Sources { optional: Vec::new(), required: Some(path.clone()) };
            let error = sources.read(&specs()).unwrap_err().to_string();
            assert_eq!(error, format!("{} {why}", path.display()));
        }
    }
}
