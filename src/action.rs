//! Programs of the user that are run at certain stages of a dump or a restore
//! (`--action-script`): to copy images away while the tree is still stopped, to move a
//! network address before it runs again.
//!
//! Each is a command line for `/bin/sh`, as CRIU has it, and finds in its environment
//! what it is run for:
//!
//! - `CRTOOLS_SCRIPT_ACTION`: the stage;
//! - `CRTOOLS_IMAGE_DIR`: the images directory, an absolute path;
//! - `CRTOOLS_INIT_PID`: the root of the tree, once there is one.

use std::{
    io,
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Stdio},
};

use crate::{causes::with_sources, units::HostPid};

/// A stage at which programs are run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Before a tree is stopped, to be dumped or pre-dumped.
    PreDump,
    /// The images are complete, and the tree is still stopped.
    PostDump,
    /// Before anything is restored.
    PreRestore,
    /// The processes have been made and are empty.
    SetupNamespaces,
    /// The same: the tree has no namespaces of its own that would come in between.
    PostSetupNamespaces,
    /// All is restored, and the tree does not run.
    PostRestore,
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
            Self::PostDump => "post-dump",
            Self::PreRestore => "pre-restore",
            Self::SetupNamespaces => "setup-namespaces",
            Self::PostSetupNamespaces => "post-setup-namespaces",
            Self::PostRestore => "post-restore",
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
}

/// The programs that the user names (`--action-script`), in this order.
#[derive(Clone, Debug, Default)]
#[cfg_attr(test, derive(PartialEq, Eq))]
pub struct Options {
    scripts: Vec<PathBuf>,
}

impl Options {
    /// Takes the list that the user gave.
    pub fn new(scripts: Vec<PathBuf>) -> Self {
        Self { scripts }
    }
}

/// The programs of a dump or a restore.
#[derive(Debug)]
pub struct Actions<'a> {
    scripts: &'a [PathBuf],
    images_dir: &'a Path,
}

impl<'a> Actions<'a> {
    /// Returns the programs, which are told of `images_dir`, an absolute path.
    pub fn new(options: &'a Options, images_dir: &'a Path) -> Self {
        Self { scripts: &options.scripts, images_dir }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.scripts.is_empty()
    }

    /// Runs the programs one after another, up to the first that fails.
    ///
    /// # Errors
    /// [`ActionError`].
    pub fn run(&self, stage: Stage, root: Option<HostPid>) -> Result<(), ActionError> {
        for path in self.scripts {
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

    /// Runs the programs at a stage at which it is too late to give up.
    pub fn run_anyway(&self, stage: Stage, root: HostPid) {
        if let Err(error) = self.run(stage, Some(root)) {
            log::warn!("the tree is restored, but {}", with_sources(&error));
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
