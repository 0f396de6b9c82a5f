//! Colours and width of the output.

use std::{
    env,
    io::{self, IsTerminal},
};

use clap::ValueEnum;
use terminal_size::{Width, terminal_size};

/// `--color`
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(super) enum ColorWhen {
    /// If standard output is a terminal and the environment has no NO_COLOR.
    #[default]
    Auto,
    /// Always.
    Always,
    /// Never.
    Never,
}

impl ColorWhen {
    /// Whether standard output is to have colours.
    pub(super) fn on_stdout(self) -> bool {
        match self {
            Self::Always => true,
            Self::Never => false,
            Self::Auto => {
                let is_set = |name| env::var_os(name).is_some_and(|value| !value.is_empty());
                let is_dumb = env::var_os("TERM").is_some_and(|term| term == "dumb");
                io::stdout().is_terminal() && !is_set("NO_COLOR") && !is_dumb
            }
        }
    }
}

/// Returns how many characters a line of the terminal has; 80 without one, unless the
/// environment has COLUMNS.
pub(super) fn line_width() -> usize {
    const USUAL: usize = 80;
    if let Some((Width(width), _)) = terminal_size() {
        return width.into();
    }
    let told = env::var("COLUMNS").ok().and_then(|columns| columns.parse().ok());
    told.unwrap_or(USUAL)
}
