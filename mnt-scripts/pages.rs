//! Writes the man pages and the shell completions of both programs, from their own
//! definitions of commands and options:
//!
//!     cargo run --example pages -- OUT
//!
//! OUT gets `man1/`, with a page for each program and each command, and
//! `completions/bash`, `zsh` and `fish`.

use std::{
    env,
    fs::{self, File},
    path::Path,
    process::ExitCode,
};

use anyhow::{Context, Result};
use clap::{Command, CommandFactory};
use clap_complete::{Generator, generate_to, shells};
use clap_mangen::Man;
use rcriu::cli;

fn main() -> ExitCode {
    let Some(out) = env::args_os().nth(1) else {
        eprintln!("usage: pages OUT");
        return ExitCode::from(2);
    };
    match write_all(Path::new(&out)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("pages: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn write_all(out: &Path) -> Result<()> {
    let pages = out.join("man1");
    fs::create_dir_all(&pages).with_context(|| pages.display().to_string())?;
    for mut program in [cli::rcriu::Rcriu::command(), cli::imgfs::Imgfs::command()] {
        // Commands of rcriu define their options when they are built.
        program.build();
        write_pages(&program, &pages)?;
        complete(shells::Bash, &program, &out.join("completions/bash"))?;
        complete(shells::Zsh, &program, &out.join("completions/zsh"))?;
        complete(shells::Fish, &program, &out.join("completions/fish"))?;
    }
    Ok(())
}

/// Writes the page of a command, `rcriu-dump.1` for `rcriu dump`, and those of its own
/// commands.
fn write_pages(command: &Command, dir: &Path) -> Result<()> {
    let name = command.get_display_name().unwrap_or(command.get_name()).to_owned();
    let path = dir.join(format!("{name}.1"));
    let mut page = File::create(&path).with_context(|| path.display().to_string())?;
    Man::new(command.clone())
        .title(&name)
        .manual("rcriu manual")
        .render(&mut page)
        .with_context(|| path.display().to_string())?;
    for command in command.get_subcommands().filter(|command| command.get_name() != "help") {
        write_pages(command, dir)?;
    }
    Ok(())
}

fn complete(shell: impl Generator, program: &Command, dir: &Path) -> Result<()> {
    fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
    let mut program = program.clone();
    let name = program.get_name().to_owned();
    generate_to(shell, &mut program, name, dir).with_context(|| dir.display().to_string())?;
    Ok(())
}
