//! JSON output: brackets, commas, line breaks.

use std::io::{self, Write};

use serde_json::Value;

use super::Style;

/// The indentation of one level.
const INDENT: &[u8] = b"    ";

/// The nesting at which [`Style::Compact`] starts a new line: the entries of an image.
const ENTRY_DEPTH: usize = 2;

/// Writes a document value by value.
#[derive(Debug)]
pub(super) struct Output<W> {
    out: W,
    style: Style,
    open: Vec<Scope>,
}

/// An object or a list that is open.
#[derive(Clone, Copy, Debug)]
struct Scope {
    empty: bool,
    inline: bool,
}

impl<W: Write> Output<W> {
    pub(super) fn new(out: W, style: Style) -> Self {
        Self { out, style, open: Vec::new() }
    }

    pub(super) fn style(&self) -> Style {
        self.style
    }

    pub(super) fn open_object(&mut self) -> io::Result<()> {
        self.open(b"{", false)
    }

    pub(super) fn close_object(&mut self) -> io::Result<()> {
        self.close(b"}")
    }

    /// Opens a list; an `inline` list stays on one line.
    pub(super) fn open_list(&mut self, inline: bool) -> io::Result<()> {
        self.open(b"[", inline)
    }

    pub(super) fn close_list(&mut self) -> io::Result<()> {
        self.close(b"]")
    }

    /// Starts the next value of a list.
    pub(super) fn item(&mut self) -> io::Result<()> {
        let first = self.open.last_mut().is_none_or(|scope| std::mem::take(&mut scope.empty));
        if !first {
            self.out.write_all(b",")?;
        }
        let inline = self.open.last().is_some_and(|scope| scope.inline);
        if self.breaks_lines() {
            self.line()
        } else if inline && !first && self.style == Style::Pretty {
            self.out.write_all(b" ")
        } else {
            Ok(())
        }
    }

    /// Starts the value of `key` in an object.
    pub(super) fn key(&mut self, key: &str) -> io::Result<()> {
        self.item()?;
        serde_json::to_writer(&mut self.out, key)?;
        self.out.write_all(if self.style == Style::Pretty { b": " } else { b":" })
    }

    pub(super) fn scalar(&mut self, value: &Value) -> io::Result<()> {
        Ok(serde_json::to_writer(&mut self.out, value)?)
    }

    /// Writes a string that needs no escapes; `write` may produce it in pieces.
    pub(super) fn plain_string<E: From<io::Error>>(
        &mut self,
        write: impl FnOnce(&mut W) -> Result<(), E>,
    ) -> Result<(), E> {
        self.out.write_all(b"\"")?;
        write(&mut self.out)?;
        self.out.write_all(b"\"")?;
        Ok(())
    }

    /// Ends the document.
    pub(super) fn finish(&mut self) -> io::Result<()> {
        self.out.write_all(b"\n")?;
        self.out.flush()
    }

    fn open(&mut self, bracket: &[u8], inline: bool) -> io::Result<()> {
        self.open.push(Scope { empty: true, inline });
        self.out.write_all(bracket)
    }

    fn close(&mut self, bracket: &[u8]) -> io::Result<()> {
        let breaks = self.breaks_lines();
        let scope = self.open.pop();
        if breaks && scope.is_some_and(|scope| !scope.empty) {
            self.line()?;
        }
        self.out.write_all(bracket)
    }

    /// Whether the values in the innermost scope are on lines of their own.
    fn breaks_lines(&self) -> bool {
        let inline = self.open.last().is_some_and(|scope| scope.inline);
        match self.style {
            Style::Compact => self.open.len() == ENTRY_DEPTH,
            Style::Pretty => !inline,
        }
    }

    fn line(&mut self) -> io::Result<()> {
        self.out.write_all(b"\n")?;
        if self.style == Style::Pretty {
            for _ in &self.open {
                self.out.write_all(INDENT)?;
            }
        }
        Ok(())
    }
}
