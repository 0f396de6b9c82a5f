//! What a request for a task says, as options of the command line.
//!
//! Both have the same options, so a request is turned into them, and everything behind is the same:
//! what is refused, with which words, what a configuration file may add.

use std::{ffi::OsString, fs, os::unix::ffi::OsStringExt, path::PathBuf};

use anyhow::{Context, bail};
use nix::libc;

use crate::{
    cli::task::Task,
    proto::rpc::{CriuCgMode, CriuNetworkLockMethod, CriuOpts, CriuReqType},
    units::HostPid,
};

/// An option by its long name, with its value.
pub(super) type Word = (&'static str, Option<OsString>);

/// The bits of `cpu_cap`, by the names that `--cpu-cap` has for them (`cr_options.h`).
const CPU_CAPS: [(u32, &str); 3] = [(1, ",fpu"), (2, ",cpu"), (4, ",ins")];

/// The options of a request.
#[derive(Debug)]
pub(super) struct Words {
    pub(super) options: Vec<Word>,
    /// A configuration file, which wins over the options.
    pub(super) config: Option<PathBuf>,
    /// The command of `--exec-cmd`.
    pub(super) operands: Vec<OsString>,
}

impl Words {
    fn flag(&mut self, name: &'static str, on: Option<bool>) {
        if on == Some(true) {
            self.options.push((name, None));
        }
    }

    fn value(&mut self, name: &'static str, value: impl Into<OsString>) {
        self.options.push((name, Some(value.into())));
    }

    fn bytes(&mut self, name: &'static str, value: Option<&Vec<u8>>) {
        if let Some(value) = value {
            self.value(name, OsString::from_vec(value.clone()));
        }
    }

    fn number(&mut self, name: &'static str, value: Option<impl ToString>) {
        if let Some(value) = value {
            self.value(name, value.to_string());
        }
    }
}

/// Returns the options of a request of `peer`, in whose descriptor table the numbers of directories
/// are.
///
/// # Errors
/// A request that contradicts itself, or names a descriptor that the client does not have.
pub(super) fn words(
    kind: CriuReqType,
    task: Task,
    opts: &CriuOpts,
    peer: HostPid,
) -> anyhow::Result<Words> {
    let mut words = Words {
        options: Vec::new(),
        config: opts.config_file.clone().map(OsString::from_vec).map(PathBuf::from),
        operands: Vec::new(),
    };
    let images = match (opts.images_dir_fd, &opts.images_dir) {
        (fd @ 0.., _) => directory(peer, fd, "images_dir_fd")?,
        (_, Some(path)) => PathBuf::from(OsString::from_vec(path.clone())),
        _ => bail!(
            "the request names no directory for the images: neither images_dir_fd nor images_dir"
        ),
    };
    words.value("images-dir", images);
    if let Some(fd) = opts.work_dir_fd.filter(|fd| *fd >= 0) {
        words.value("work-dir", directory(peer, fd, "work_dir_fd")?);
    }
    match kind {
        CriuReqType::CpuinfoDump => words.operands.push("dump".into()),
        CriuReqType::CpuinfoCheck => words.operands.push("check".into()),
        _ => {}
    }
    if matches!(task, Task::Dump | Task::PreDump) {
        words.number("tree", Some(opts.pid.filter(|pid| *pid > 0).unwrap_or(peer.0)));
    }
    if task == Task::Restore {
        words.options.push(("restore-detached", None));
        words.flag("restore-sibling", opts.rst_sibling);
        for inherited in &opts.inherit_fd {
            let key = String::from_utf8_lossy(&inherited.key);
            words.value("inherit-fd", format!("fd[{}]:{key}", inherited.fd));
        }
        if !opts.exec_cmd.is_empty() {
            words.options.push(("exec-cmd", None));
            words.operands = opts.exec_cmd.iter().cloned().map(OsString::from_vec).collect();
        }
    }
    tree(opts, &mut words);
    files(opts, &mut words);
    cgroups(opts, &mut words);
    namespaces(opts, &mut words)?;
    server(task, opts, &mut words);
    Ok(words)
}

/// Returns the log file of a request, if the client names one in a directory that it has.
pub(super) fn log_of(opts: &CriuOpts, peer: HostPid) -> Option<PathBuf> {
    let name = opts.log_file.as_ref().filter(|_| opts.log_to_stderr != Some(true))?;
    let fd = opts.work_dir_fd.filter(|fd| *fd >= 0).unwrap_or(opts.images_dir_fd);
    let dir = match &opts.images_dir {
        Some(path) if fd < 0 => PathBuf::from(OsString::from_vec(path.clone())),
        _ => directory(peer, fd, "work_dir_fd").ok()?,
    };
    Some(dir.join(OsString::from_vec(name.clone())))
}

/// Returns the path of a directory that a client has open.
fn directory(peer: HostPid, fd: i32, field: &str) -> anyhow::Result<PathBuf> {
    let link = PathBuf::from(format!("/proc/{peer}/fd/{fd}"));
    let of_link = fs::metadata(&link).with_context(|| {
        format!("{field} is {fd}, but process {peer}, the client, has no such descriptor")
    })?;
    if !of_link.is_dir() {
        bail!("{field} is {fd}, which is not a directory of process {peer}, the client");
    }
    // The name says more in messages. It may lead elsewhere here.
    let same = |path: &PathBuf| {
        use std::os::unix::fs::MetadataExt;
        fs::metadata(path)
            .is_ok_and(|found| (found.dev(), found.ino()) == (of_link.dev(), of_link.ino()))
    };
    Ok(fs::read_link(&link).ok().filter(same).unwrap_or(link))
}

fn tree(opts: &CriuOpts, words: &mut Words) {
    words.flag("leave-running", opts.leave_running);
    words.flag("leave-stopped", opts.leave_stopped);
    words.flag("shell-job", opts.shell_job);
    words.number("timeout", opts.timeout.filter(|seconds| *seconds > 0));
    words.bytes("root", opts.root.as_ref());
    words.bytes("prev-images-dir", opts.parent_img.as_ref());
    words.flag("track-mem", opts.track_mem);
    words.flag("auto-dedup", opts.auto_dedup);
    words.flag("display-stats", opts.display_stats);
    words.flag("unprivileged", opts.unprivileged);
    if let Some(bits) = opts.cpu_cap {
        let names = CPU_CAPS.iter().filter(|(bit, _)| bits & bit != 0).map(|(_, name)| *name);
        words.value("cpu-cap", format!("none{}", names.collect::<String>()));
    }
    words.bytes("lsm-profile", opts.lsm_profile.as_ref());
    words.bytes("lsm-mount-context", opts.lsm_mount_context.as_ref());
    words.number("verbosity", opts.log_level.filter(|level| *level >= 0));
    if opts.log_to_stderr != Some(true) {
        words.bytes("log-file", opts.log_file.as_ref());
    }
}

fn files(opts: &CriuOpts, words: &mut Words) {
    words.flag("file-locks", opts.file_locks);
    words.flag("link-remap", opts.link_remap);
    words.number("ghost-limit", opts.ghost_limit);
    words.flag("force-irmap", opts.force_irmap);
    for path in &opts.irmap_scan_paths {
        words.bytes("irmap-scan-path", Some(path));
    }
    words.flag("evasive-devices", opts.evasive_devices);
    words.flag("skip-file-rwx-check", opts.skip_file_rwx_check);
    words.flag("ext-unix-sk", opts.ext_unix_sk);
    for socket in &opts.unix_sk_ino {
        words.value("ext-unix-sk", socket.inode.to_string());
    }
    words.flag("tcp-established", opts.tcp_established);
    words.flag("tcp-close", opts.tcp_close);
    words.flag("skip-in-flight", opts.tcp_skip_in_flight);
    if opts.network_lock.is_some() {
        words.value(
            "network-lock",
            match opts.network_lock() {
                CriuNetworkLockMethod::Iptables => "iptables",
                CriuNetworkLockMethod::Nftables => "nftables",
                CriuNetworkLockMethod::Skip => "skip",
            },
        );
    }
    for external in &opts.external {
        words.bytes("external", Some(external));
    }
}

fn cgroups(opts: &CriuOpts, words: &mut Words) {
    let mode = opts.manage_cgroups_mode.map(|_| opts.manage_cgroups_mode());
    let mode = match mode {
        Some(CriuCgMode::Ignore) => Some("ignore"),
        Some(CriuCgMode::CgNone) => Some("none"),
        Some(CriuCgMode::Props) => Some("props"),
        Some(CriuCgMode::Soft | CriuCgMode::Default) => Some("soft"),
        Some(CriuCgMode::Full) => Some("full"),
        Some(CriuCgMode::Strict) => Some("strict"),
        None => (opts.manage_cgroups == Some(true)).then_some("soft"),
    };
    if let Some(mode) = mode {
        words.value("manage-cgroups", mode);
    }
    for root in &opts.cg_root {
        let mut text = root.ctrl.as_ref().map_or_else(Vec::new, |of| [of, &b":"[..]].concat());
        text.extend(&root.path);
        words.bytes("cgroup-root", Some(&text));
    }
    words.bytes("cgroup-props", opts.cgroup_props.as_ref());
    words.bytes("cgroup-props-file", opts.cgroup_props_file.as_ref());
    for controller in &opts.cgroup_dump_controller {
        words.bytes("cgroup-dump-controller", Some(controller));
    }
    words.bytes("cgroup-yard", opts.cgroup_yard.as_ref());
    words.bytes("freeze-cgroup", opts.freeze_cgroup.as_ref());
}

fn namespaces(opts: &CriuOpts, words: &mut Words) -> anyhow::Result<()> {
    const NEW_NET: u32 = libc::CLONE_NEWNET.cast_unsigned();
    match opts.empty_ns {
        None | Some(0) => {}
        Some(NEW_NET) => words.value("empty-ns", "net"),
        Some(other) => bail!(
            "empty_ns is {other:#x}, but only {NEW_NET:#x} (CLONE_NEWNET) can be left without contents"
        ),
    }
    for join in &opts.join_ns {
        let mut text = [&join.ns, &b":"[..], &join.ns_file].concat();
        if let Some(more) = &join.extra_opt {
            text.push(b',');
            text.extend(more);
        }
        words.bytes("join-ns", Some(&text));
    }
    for mount in &opts.ext_mnt {
        let text = [&mount.key, &b":"[..], &mount.val].concat();
        words.bytes("ext-mount-map", Some(&text));
    }
    if opts.auto_ext_mnt == Some(true) {
        words.value("ext-mount-map", "auto");
    }
    words.flag("enable-external-sharing", opts.ext_sharing);
    words.flag("enable-external-masters", opts.ext_masters);
    for path in &opts.skip_mnt {
        words.bytes("skip-mnt", Some(path));
    }
    for name in &opts.enable_fs {
        words.bytes("enable-fs", Some(name));
    }
    words.flag("mntns-compat-mode", opts.mntns_compat_mode);
    words.flag("weak-sysctls", opts.weak_sysctls);
    for veth in &opts.veths {
        let text = [&veth.if_in, &b"="[..], &veth.if_out].concat();
        words.bytes("veth-pair", Some(&text));
    }
    Ok(())
}

fn server(task: Task, opts: &CriuOpts, words: &mut Words) {
    words.flag("lazy-pages", opts.lazy_pages);
    words.number("status-fd", opts.status_fd);
    if let Some(server) = &opts.ps {
        if task != Task::PageServer {
            words.options.push(("page-server", None));
        }
        words.bytes("address", server.address.as_ref());
        words.number("port", server.port.filter(|port| *port != 0));
        words.number("ps-socket", server.fd);
    }
    words.flag("tls", opts.tls);
    words.bytes("tls-cacert", opts.tls_cacert.as_ref());
    words.bytes("tls-cacrl", opts.tls_cacrl.as_ref());
    words.bytes("tls-cert", opts.tls_cert.as_ref());
    words.bytes("tls-key", opts.tls_key.as_ref());
    words.flag("tls-no-cn-verify", opts.tls_no_cn_verify);
}
