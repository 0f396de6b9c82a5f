//! The user's choice of properties (`--cgroup-props`).

use std::collections::BTreeMap;

/// The longest text of a choice.
pub const MOST_BYTES: u64 = 1 << 20;

/// Where the text of a choice is wrong.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "line {line}: expected {expected}, found {found}\nhelp: write \"CONTROLLER\":, then on lines of their \
     own - \"strategy\": \"merge\" (or \"replace\") and - \"properties\": [\"NAME\", ...]"
)]
pub struct SelectionError {
    line: usize,
    expected: &'static str,
    found: String,
}

/// What the user says of one controller.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Rule {
    /// Whether the properties that rcriu knows are left out.
    replaces: bool,
    names: Vec<String>,
}

/// Which properties are dumped and restored.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selection(BTreeMap<String, Rule>);

impl Selection {
    /// Adds what a text says, in the form that CRIU takes: controllers with a strategy (`merge`,
    /// `replace`) and the names of properties.
    ///
    /// # Errors
    /// Where the text is wrong.
    pub fn add(&mut self, text: &str) -> Result<(), SelectionError> {
        let mut words = Words { text, line: 1 };
        while !words.is_over() {
            let controller = words.quoted("the name of a controller in quotes")?;
            words.sign(':')?;
            words.sign('-')?;
            words.key("strategy")?;
            let replaces = words.choice()?;
            words.sign('-')?;
            words.key("properties")?;
            words.sign('[')?;
            let mut names = Vec::new();
            while !words.takes(']') {
                if !names.is_empty() {
                    words.sign(',')?;
                }
                names.push(words.property()?);
            }
            let rule = self.0.entry(controller).or_default();
            if replaces {
                *rule = Rule { replaces, names };
            } else {
                rule.names.append(&mut names);
            }
        }
        Ok(())
    }

    /// Whether a property that rcriu knows is dumped and restored.
    pub(super) fn keeps(&self, property: &str) -> bool {
        let controller = property.split_once('.').map_or(property, |(controller, _)| controller);
        self.0.get(controller).is_none_or(|rule| !rule.replaces) || self.names(property)
    }

    /// Whether the user names a property.
    pub(super) fn names(&self, property: &str) -> bool {
        self.all_names().any(|name| name == property)
    }

    /// Returns the properties that the user names.
    pub(super) fn all_names(&self) -> impl Iterator<Item = &str> {
        self.0.values().flat_map(|rule| &rule.names).map(String::as_str)
    }
}

/// The rest of a text.
struct Words<'a> {
    text: &'a str,
    line: usize,
}

impl<'a> Words<'a> {
    fn skip_blanks(&mut self) {
        let rest = self.text.trim_start();
        let blanks = &self.text[..self.text.len() - rest.len()];
        self.line += blanks.matches('\n').count();
        self.text = rest;
    }

    fn is_over(&mut self) -> bool {
        self.skip_blanks();
        self.text.is_empty()
    }

    fn wrong(&self, expected: &'static str) -> SelectionError {
        let found = match self.text.split_whitespace().next() {
            None => "the end".to_owned(),
            Some(word) => format!("{:?}", word.chars().take(40).collect::<String>()),
        };
        SelectionError { line: self.line, expected, found }
    }

    fn takes(&mut self, sign: char) -> bool {
        self.skip_blanks();
        self.text.strip_prefix(sign).map(|rest| self.text = rest).is_some()
    }

    fn sign(&mut self, sign: char) -> Result<(), SelectionError> {
        let expected = match sign {
            ':' => "a colon",
            '-' => "a dash",
            '[' => "an opening bracket",
            _ => "a comma or a closing bracket",
        };
        if self.takes(sign) { Ok(()) } else { Err(self.wrong(expected)) }
    }

    fn quoted(&mut self, expected: &'static str) -> Result<String, SelectionError> {
        self.skip_blanks();
        let inner = self.text.strip_prefix('"').and_then(|rest| rest.split_once('"'));
        let found: Option<(&'a str, &'a str)> =
            inner.filter(|(word, _)| !word.is_empty() && !word.contains('\n'));
        let Some((word, rest)) = found else { return Err(self.wrong(expected)) };
        self.text = rest;
        Ok(word.to_owned())
    }

    fn key(&mut self, key: &'static str) -> Result<(), SelectionError> {
        self.skip_blanks();
        let quoted = format!("\"{key}\"");
        match self.text.strip_prefix(&quoted) {
            Some(rest) => self.text = rest,
            None if key == "strategy" => return Err(self.wrong("\"strategy\"")),
            None => return Err(self.wrong("\"properties\"")),
        }
        self.sign(':')
    }

    /// Reads a strategy; returns whether it is `replace`.
    fn choice(&mut self) -> Result<bool, SelectionError> {
        const EXPECTED: &str = "\"merge\" or \"replace\"";
        self.skip_blanks();
        let before = Words { ..*self };
        match &*self.quoted(EXPECTED)? {
            "merge" => Ok(false),
            "replace" => Ok(true),
            _ => Err(before.wrong(EXPECTED)),
        }
    }

    fn property(&mut self) -> Result<String, SelectionError> {
        const EXPECTED: &str = "the name of a property in quotes";
        self.skip_blanks();
        let before = Words { ..*self };
        let name = self.quoted(EXPECTED)?;
        if name.contains('/') || matches!(&*name, "." | "..") {
            return Err(before.wrong(EXPECTED));
        }
        Ok(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\"cpu\":\n - \"strategy\": \"replace\"\n - \"properties\": [\"cpu.shares\", \
                        \"cpu.new\"]\n\"memory\":\n - \"strategy\": \"merge\"\n - \"properties\": [\"memory.x\"]\n";

    #[test]
    fn known_properties_are_replaced_or_added_to() {
        let mut selection = Selection::default();
        assert!(selection.keeps("cpu.weight"));
        selection.add(TEXT).unwrap();
        assert!(selection.keeps("cpu.shares") && !selection.keeps("cpu.weight"));
        assert!(selection.keeps("memory.max") && selection.keeps("pids.max"));
        let names: Vec<_> = selection.all_names().collect();
        assert_eq!(names, ["cpu.shares", "cpu.new", "memory.x"]);
        selection
            .add("\"cpu\": - \"strategy\": \"merge\" - \"properties\": [ \"cpu.idle\" ]")
            .unwrap();
        assert!(selection.keeps("cpu.shares") && selection.keeps("cpu.idle"));
        selection.add("\"cpu\":\n - \"strategy\": \"replace\"\n - \"properties\": []").unwrap();
        assert!(!selection.keeps("cpu.shares") && !selection.keeps("cpu.weight"));
    }

    #[test]
    fn what_is_wrong_is_named_with_its_line() {
        for (text, words) in [
            ("cpu:\n", "line 1: expected the name of a controller in quotes, found \"cpu:\""),
            ("\"cpu\"", "line 1: expected a colon, found the end"),
            ("\"cpu\":\n - \"kind\"", "line 2: expected \"strategy\""),
            ("\"cpu\":\n - \"strategy\":\n\"mix\"", "line 3: expected \"merge\" or"),
            (
                "\"c\":\n-\"strategy\":\"merge\"\n-\"properties\":[\"a\" \"b\"]",
                "line 3: expected a comma",
            ),
            ("\"c\":\n-\"strategy\":\"merge\"\n-\"properties\":[\"../x\"]", "found \"\\\"../x"),
            (
                "\"c\":\n-\"strategy\":\"merge\"\n-\"properties\":[\"a",
                "expected the name of a property",
            ),
        ] {
            let error = Selection::default().add(text).unwrap_err().to_string();
            assert!(error.contains(words), "{text}: {error}");
        }
    }
}
