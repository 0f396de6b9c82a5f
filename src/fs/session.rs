//! A mount, from mounting to unmounting.

use std::{
    fs, io,
    num::NonZeroUsize,
    panic,
    path::{Path, PathBuf},
    process,
    sync::Arc,
    thread,
};

use log::{debug, error, info, warn};
use nix::{
    sys::signal::{SigSet, Signal},
    unistd::geteuid,
};

use super::{
    Compose, FS_TYPE, ImageFs, MountError, Punch, Result,
    compose::Composer,
    mount::{check_mount_point, mount_device, mounted_at, unmount_device},
    punching::Punching,
};
use crate::{causes::with_sources, sys::reader::Reader, view::View};

/// Readahead of the kernel for mapped files: as much as one request carries, instead of 128
/// KiB.
const READ_AHEAD_KB: u32 = 1024;

/// Options of a mount.
#[derive(Clone, Debug)]
pub struct MountOptions {
    /// Whether all users may look at the mount, or only the user who mounts it.
    pub allow_other: bool,
    /// The number of threads that serve requests.
    pub threads: NonZeroUsize,
    /// Whether the kernel may itself read files that are one backing file.
    pub pass_through: bool,
    /// When files that lie in several images are composed of their blocks.
    pub compose: Compose,
    /// The directory in which files are composed, if not that of the shown snapshot.
    pub compose_dir: Option<PathBuf>,
    /// Whether and when pages of the shown snapshot are freed.
    pub punch: Option<Punch>,
    /// The user with whose rights files are opened, if not those of the process. The caller has
    /// already assumed them.
    pub reader: Option<Reader>,
}

impl Default for MountOptions {
    fn default() -> Self {
        let processors = thread::available_parallelism().map_or(1, NonZeroUsize::get);
        let threads = NonZeroUsize::new(processors.max(2)).expect("at least two");
        Self {
            allow_other: false,
            threads,
            pass_through: true,
            compose: Compose::default(),
            compose_dir: None,
            punch: None,
            reader: None,
        }
    }
}

/// A mounted chain, which is served by [`Session::run`].
#[derive(Debug)]
pub struct Session {
    fuse: fuser::Session<ImageFs>,
    mount_point: PathBuf,
    reader: Option<Reader>,
}

impl Session {
    /// Mounts `view` at `mount_point`, with `chain_path` as its source in the table of mounts.
    /// From then on, requests wait for [`Session::run`].
    ///
    /// # Errors
    /// What keeps the chain from being mounted, or its pages from being freed if they
    /// are to be; nothing is mounted then. SIGTERM,
    /// SIGINT and SIGHUP are blocked in this thread from here on.
    pub fn mount(
        view: Arc<View>,
        chain_path: &Path,
        mount_point: &Path,
        options: &MountOptions,
    ) -> Result<Self> {
        let punching = options.punch.map(|punch| Punching::new(&view, punch)).transpose()?;
        if options.reader.is_some() {
            rights(mount_point, Reader::put_off)?;
        }
        let mount_point = check_mount_point(mount_point, chain_path, view.chain())?;
        // Once the chain is mounted, a signal must not end us and leave the mount behind. It stays
        // pending until `run` waits for it.
        ending_signals().thread_block().map_err(|errno| MountError::Handshake {
            path: mount_point.clone(),
            source: errno.into(),
        })?;
        let source = chain_path.canonicalize().unwrap_or_else(|_| chain_path.to_owned());
        let device = mount_device(&mount_point, &source.to_string_lossy(), options)?;
        let failed = |source| {
            if let Err(error) = unmount_device(&mount_point, true) {
                warn!("{}", with_sources(&error));
            }
            MountError::Handshake { path: mount_point.clone(), source }
        };
        // Answers go through a duplicate of the descriptor.
        let answers = device.try_clone().map_err(failed)?;
        // Only root may tell the kernel which file to read.
        let composer = if geteuid().is_root() {
            let own = || view.chain().snapshot(view.tip()).directory().map(Path::to_owned);
            let dir = options.compose_dir.clone().or_else(own);
            dir.map(|dir| Composer::new(options.compose, dir))
        } else {
            None
        };
        let fs = ImageFs::new(view, answers, options.pass_through, composer, punching);
        let mut config = fuser::Config::default();
        config.n_threads = Some(options.threads.get());
        // Without this option, the kernel lets only the owner in.
        let acl = fuser::SessionACL::All;
        let fuse = fuser::Session::from_fd(fs, device, acl, config).map_err(failed)?;
        // A page from readahead has not reached the restore yet, so it must not be freed.
        let read_ahead = if options.punch == Some(Punch::OnRead) { 0 } else { READ_AHEAD_KB };
        set_read_ahead(&mount_point, read_ahead);
        if let Some(reader) = options.reader {
            rights(&mount_point, || reader.assume())?;
        }
        info!("mounted at {} with {} threads", mount_point.display(), options.threads);
        Ok(Self { fuse, mount_point, reader: options.reader })
    }

    /// Serves until the chain is unmounted, by this or another program.
    ///
    /// SIGTERM, SIGINT and SIGHUP unmount it. If it is in use, it is only detached:
    /// processes that have files open may go on reading them, and a second signal ends the
    /// daemon. To be called while the process has one thread, so that all threads leave
    /// these signals to the one that waits for them.
    ///
    /// A panic ends the process: the kernel then answers all readers with an error.
    /// Otherwise they would wait for ever.
    ///
    /// # Errors
    /// [`MountError::Serve`].
    pub fn run(self) -> Result<()> {
        abort_on_panic();
        let failed = |source| MountError::Serve { path: self.mount_point.clone(), source };
        let signals = ending_signals();
        let device = mounted_at(&self.mount_point)?.map(|mounted| mounted.device);
        let mount_point = self.mount_point.clone();
        let reader = self.reader;
        thread::Builder::new()
            .name("signals".to_owned())
            .spawn(move || {
                // The owner of the images may not be able to reach the mount point.
                if reader.is_some()
                    && let Err(error) = Reader::put_off()
                {
                    error!("take back the rights to unmount: {error}");
                }
                unmount_on(signals, &mount_point, device)
            })
            .map_err(failed)?;
        let result = self.fuse.run();
        let gone = !is_ours(&self.mount_point, device);
        info!("unmounted from {}", self.mount_point.display());
        match result {
            // The result of the last request does not matter once the mount has gone.
            Err(error) if gone => {
                debug!("the connection ended with: {error}");
                Ok(())
            }
            result => result.map_err(|source| MountError::Serve { path: self.mount_point, source }),
        }
    }
}

/// Changes the user with whose rights files are opened.
fn rights(mount_point: &Path, change: impl FnOnce() -> io::Result<()>) -> Result<()> {
    change().map_err(|source| MountError::Rights { path: mount_point.to_owned(), source })
}

/// Returns the signals that end the daemon.
fn ending_signals() -> SigSet {
    [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP].into_iter().collect()
}

/// Makes a panic in any thread end the process.
fn abort_on_panic() {
    let report = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        error!("{info}");
        report(info);
        process::abort();
    }));
}

/// Whether the mount of this device is still at `mount_point`.
fn is_ours(mount_point: &Path, device: Option<(u32, u32)>) -> bool {
    let mounted = mounted_at(mount_point).ok().flatten();
    mounted.is_some_and(|mounted| {
        mounted.fs_type == FS_TYPE.as_bytes() && Some(mounted.device) == device
    })
}

/// Unmounts at the first of `signals`, and ends the process at the second.
fn unmount_on(signals: SigSet, mount_point: &Path, device: Option<(u32, u32)>) {
    let mut detached = false;
    loop {
        let signal = match signals.wait() {
            Ok(signal) => signal,
            Err(errno) => return error!("wait for signals: {errno}"),
        };
        if detached || !is_ours(mount_point, device) {
            info!("{signal}: leaving");
            process::exit(0);
        }
        match unmount_device(mount_point, false) {
            Ok(()) => return,
            Err(MountError::Busy { .. }) => {
                warn!("{signal}: {} is in use, detaching it", mount_point.display());
                if let Err(error) = unmount_device(mount_point, true) {
                    error!("{}", with_sources(&error));
                }
                detached = true;
            }
            Err(error) => {
                error!("{signal}: {error}");
                process::exit(1);
            }
        }
    }
}

/// Sets the kernel's readahead of the mount, if this user may.
fn set_read_ahead(mount_point: &Path, read_ahead_kb: u32) {
    let Ok(Some(mounted)) = mounted_at(mount_point) else { return };
    let (major, minor) = mounted.device;
    let path = format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb");
    if let Err(error) = fs::write(&path, read_ahead_kb.to_string()) {
        debug!("write {path}: {error}");
    }
}
