//! The root directory, the working directory, and the umask.

use nix::libc;

use super::{Calling, Images, Kind, Planned, Process, Restored};
use crate::{
    image::{self, Kind as Image, SnapshotWriter, tree::Arena},
    inject::{Arg, Script},
    proc,
    res::{
        Result,
        file::{self, FileTable, Installer},
        task::Collect,
    },
};

/// The kind.
pub(super) struct Fs;

impl Kind for Fs {
    fn ask(&self, _: &Calling<'_>, _: &mut Script) -> Result<Collect> {
        Ok(Box::new(|of, _, images| {
            images.fs.umask = proc::status(of.of.witness)?.umask;
            Ok(())
        }))
    }

    fn enter(&self, of: Process, files: &mut FileTable, images: &mut Images) -> file::Result<()> {
        images.fs.cwd_id = files.enter_path(of.witness, of.path("cwd"))?;
        images.fs.root_id = files.enter_path(of.witness, of.path("root"))?;
        Ok(())
    }

    fn write(&self, images: &Images, number: u64, into: &SnapshotWriter) -> image::Result<()> {
        into.write(Image::Fs, number, std::slice::from_ref(&images.fs))
    }

    fn open(&self, of: &Planned<'_>, files: &mut Installer<'_>) -> file::Result<()> {
        files.need_directory(of.fs.root_id)?;
        files.need_directory(of.fs.cwd_id)
    }

    /// Processes that share their directories each enter the same ones.
    fn place(
        &self,
        of: &Restored<'_>,
        files: &Installer<'_>,
        script: &mut Script,
    ) -> file::Result<()> {
        let (root, cwd) = (of.fs.root_id, of.fs.cwd_id);
        if !files.is_path(root, b"/") && !files.is_deferred_directory(root) {
            change_root(files.directory(root)?.into(), script);
        }
        if !files.is_deferred_directory(cwd) {
            enter(files.directory(cwd)?.into(), script);
        }
        if let Some(umask) = of.fs.umask {
            script.call("set the umask", libc::SYS_umask, &[umask.into()]);
        }
        Ok(())
    }

    fn place_deferred(
        &self,
        of: &Restored<'_>,
        files: &Installer<'_>,
        script: &mut Script,
    ) -> file::Result<()> {
        if !of.owns(Arena::Fs) {
            return Ok(());
        }
        let (root, cwd) = (of.fs.root_id, of.fs.cwd_id);
        let is_root_deferred = files.is_deferred_directory(root);
        if is_root_deferred {
            files.take_directory(root, script, change_root)?;
        }
        // Changing the root also changes the working directory.
        if is_root_deferred || files.is_deferred_directory(cwd) {
            files.take_directory(cwd, script, enter)?;
        }
        Ok(())
    }
}

fn change_root(fd: Arg, script: &mut Script) {
    script.call("enter the root directory", libc::SYS_fchdir, &[fd]);
    let here = script.string(c".");
    script.call("change the root directory", libc::SYS_chroot, &[here.into()]);
}

fn enter(fd: Arg, script: &mut Script) {
    script.call("enter the working directory", libc::SYS_fchdir, &[fd]);
}
