//! What the user has done at certain stages of a dump or a restore: to copy images away while the
//! tree is still stopped, to move a network address before it runs again.
//!
//! A client of the service is notified of each stage. A program (`--action-script`) is a command line for `/bin/sh`, as CRIU has it, and finds in its environment
//! what it is run for:
//!
//! - `CRTOOLS_SCRIPT_ACTION`: the stage;
//! - `CRTOOLS_IMAGE_DIR`: the images directory, an absolute path;
//! - `CRTOOLS_INIT_PID`: the root of the tree, once there is one.

use std::{
    io,
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Stdio},
    sync::Arc,
};

use crate::{causes::with_sources, units::HostPid};

/// A stage at which programs are run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Before a tree is stopped, to be dumped or pre-dumped.
    PreDump,
    /// The tree is stopped: nothing of it sends packets.
    NetworkLock,
    /// For clients only: the files of the tree are about to be dumped.
    QueryExtFiles,
    /// The images are complete, and the tree is still stopped.
    PostDump,
    /// Before anything is restored.
    PreRestore,
    /// The first process exists, in the namespaces of the tree.
    SetupNamespaces,
    /// All processes exist.
    PostSetupNamespaces,
    /// All is restored, and the tree does not run.
    PostRestore,
    /// The tree is about to send packets again: it is restored, or runs on after a dump.
    NetworkUnlock,
    /// Just before the tree runs, when nothing can fail any more.
    PreResume,
    /// The tree runs.
    PostResume,
}

impl Stage {
    /// Returns its name, as CRIU has it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::PreDump => "pre-dump",
            Self::NetworkLock => "network-lock",
            Self::QueryExtFiles => "query-ext-files",
            Self::PostDump => "post-dump",
            Self::PreRestore => "pre-restore",
            Self::SetupNamespaces => "setup-namespaces",
            Self::PostSetupNamespaces => "post-setup-namespaces",
            Self::PostRestore => "post-restore",
            Self::NetworkUnlock => "network-unlock",
            Self::PreResume => "pre-resume",
            Self::PostResume => "post-resume",
        }
    }
}

/// A program that did not do its part.
#[derive(Debug, thiserror::Error)]
pub enum ActionError {
    /// It could not be started.
    #[error("run the action script {script} at {stage}", stage = .stage.name())]
    Start {
        /// The command.
        script: String,
        /// The stage at which it was to run.
        stage: Stage,
        /// The cause.
        source: io::Error,
    },
    /// It says that it failed.
    #[error(
        "the action script {script} failed at {stage} ({status})\nhelp: see \
         what the script itself printed",
        stage = .stage.name()
    )]
    Failed {
        /// The command.
        script: String,
        /// The stage at which it was to run.
        stage: Stage,
        /// How it ended.
        status: ExitStatus,
    },
    /// The client of the service did not agree.
    #[error("the client of the service failed at {stage}: {problem}", stage = .stage.name())]
    Client {
        /// The stage of which it was notified.
        stage: Stage,
        /// What it said, or what happened to it.
        problem: String,
    },
}

/// A client of the service.
pub trait Client: std::fmt::Debug + Send + Sync {
    /// Notifies it of a stage, and waits until it has agreed. `root` is the root of the tree, if
    /// there is one.
    ///
    /// # Errors
    /// What it said, or what happened to it.
    fn notify(&self, stage: Stage, root: Option<HostPid>) -> Result<(), String>;
}

/// What is to be done at the stages.
#[derive(Clone, Debug, Default)]
pub struct Options {
    scripts: Vec<PathBuf>,
    client: Option<Arc<dyn Client>>,
}

impl Options {
    /// `scripts`: the programs that the user names (`--action-script`), in this order.
    pub fn new(scripts: Vec<PathBuf>) -> Self {
        Self { scripts, client: None }
    }

    /// `client`: is notified, before the programs are run.
    #[must_use]
    pub fn with_client(self, client: Option<Arc<dyn Client>>) -> Self {
        Self { client, ..self }
    }
}

#[cfg(test)]
impl PartialEq for Options {
    fn eq(&self, other: &Self) -> bool {
        self.scripts == other.scripts && self.client.is_some() == other.client.is_some()
    }
}

#[cfg(test)]
impl Eq for Options {}

/// The actions of a dump or a restore.
#[derive(Debug)]
pub struct Actions<'a> {
    options: &'a Options,
    images_dir: &'a Path,
}

impl<'a> Actions<'a> {
    /// Returns the actions, whose programs are told of `images_dir`, an absolute path.
    pub fn new(options: &'a Options, images_dir: &'a Path) -> Self {
        Self { options, images_dir }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.options.scripts.is_empty() && self.options.client.is_none()
    }

    /// Notifies the client, and runs the programs one after another, up to the first that fails.
    ///
    /// # Errors
    /// [`ActionError`].
    pub fn run(&self, stage: Stage, root: Option<HostPid>) -> Result<(), ActionError> {
        if let Some(client) = &self.options.client {
            client.notify(stage, root).map_err(|problem| ActionError::Client { stage, problem })?;
        }
        if stage == Stage::QueryExtFiles {
            return Ok(());
        }
        for path in &self.options.scripts {
            let script = || path.display().to_string();
            log::info!("{}: run {}", stage.name(), script());
            let mut command = Command::new("/bin/sh");
            command.arg("-c").arg(path).stdin(Stdio::null());
            command.env("CRTOOLS_SCRIPT_ACTION", stage.name());
            command.env("CRTOOLS_IMAGE_DIR", self.images_dir);
            match root {
                Some(pid) => command.env("CRTOOLS_INIT_PID", pid.to_string()),
                None => command.env_remove("CRTOOLS_INIT_PID"),
            };
            let status = command.status().map_err(|source| ActionError::Start {
                script: script(),
                stage,
                source,
            })?;
            if !status.success() {
                return Err(ActionError::Failed { script: script(), stage, status });
            }
        }
        Ok(())
    }

    /// Does the same at a stage at which it is too late to give up.
    pub fn run_anyway(&self, stage: Stage, root: HostPid) {
        if let Err(error) = self.run(stage, Some(root)) {
            log::warn!("{}", with_sources(&error));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_is_told_the_stage_and_its_failure_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let seen = dir.path().join("seen");
        let line = "echo $CRTOOLS_SCRIPT_ACTION $CRTOOLS_IMAGE_DIR $CRTOOLS_INIT_PID";
        let scripts = vec![
            PathBuf::from(format!("{line} >> {}", seen.display())),
            PathBuf::from("test $CRTOOLS_SCRIPT_ACTION != post-dump"),
            PathBuf::from(format!("echo again >> {}", seen.display())),
        ];
        let options = Options::new(scripts);
        let actions = Actions::new(&options, Path::new("/images"));
        actions.run(Stage::PreDump, None).unwrap();
        let error = actions.run(Stage::PostDump, Some(HostPid(7))).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the action script test $CRTOOLS_SCRIPT_ACTION != post-dump failed at post-dump \
             (exit status: 1)\nhelp: see what the script itself printed"
        );
        let seen = std::fs::read_to_string(seen).unwrap();
        assert_eq!(seen, "pre-dump /images\nagain\npost-dump /images 7\n");
    }
}
