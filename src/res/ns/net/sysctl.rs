//! Settings of a network namespace (`/proc/sys/net`).
//!
//! CRIU's images have lists of some settings, without names: the order counts. All other settings that
//! differ from those of a new namespace are in an extension.

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    fs::{self, File},
    io::Read,
    os::unix::{
        ffi::{OsStrExt, OsStringExt},
        fs::PermissionsExt,
    },
    path::{Path, PathBuf},
    thread::{self, JoinHandle},
};

use nix::sched::{CloneFlags, unshare};

use super::warn;
use crate::{
    image::proto::{NetDeviceEntry, NetnsEntry, RcriuSysctl, SysctlEntry, SysctlType},
    res::{ResError, Result},
    units::HostPid,
};

const ROOT: &str = "/proc/sys/net";

/// The directories with a directory for each device. What is not in the lists below has the value of
/// `default` in a new device.
const OF_DEVICES: [&str; 4] = ["ipv4/conf", "ipv6/conf", "ipv4/neigh", "ipv6/neigh"];

/// The settings of each device in `ipv4/conf`, in the order of CRIU's images.
const IPV4: [&str; 30] = [
    "accept_local",
    "accept_redirects",
    "accept_source_route",
    "arp_accept",
    "arp_announce",
    "arp_filter",
    "arp_ignore",
    "arp_notify",
    "bootp_relay",
    "disable_policy",
    "disable_xfrm",
    "force_igmp_version",
    "forwarding",
    "igmpv2_unsolicited_report_interval",
    "igmpv3_unsolicited_report_interval",
    "log_martians",
    "medium_id",
    "promote_secondaries",
    "proxy_arp",
    "proxy_arp_pvlan",
    "route_localnet",
    "rp_filter",
    "secure_redirects",
    "send_redirects",
    "shared_media",
    "src_valid_mark",
    "tag",
    "ignore_routes_with_linkdown",
    "drop_gratuitous_arp",
    "drop_unicast_in_l2_multicast",
];

/// The same for `ipv6/conf`.
const IPV6: [&str; 42] = [
    "accept_dad",
    "accept_ra",
    "accept_ra_defrtr",
    "accept_ra_from_local",
    "accept_ra_min_hop_limit",
    "accept_ra_mtu",
    "accept_ra_pinfo",
    "accept_ra_rt_info_max_plen",
    "accept_ra_rtr_pref",
    "accept_redirects",
    "accept_source_route",
    "autoconf",
    "dad_transmits",
    "disable_ipv6",
    "drop_unicast_in_l2_multicast",
    "drop_unsolicited_na",
    "force_mld_version",
    "force_tllao",
    "forwarding",
    "hop_limit",
    "ignore_routes_with_linkdown",
    "keep_addr_on_down",
    "max_addresses",
    "max_desync_factor",
    "mldv1_unsolicited_report_interval",
    "mldv2_unsolicited_report_interval",
    MTU,
    "ndisc_notify",
    "optimistic_dad",
    "proxy_ndp",
    "regen_max_retry",
    "router_probe_interval",
    "router_solicitation_delay",
    "router_solicitation_interval",
    "router_solicitations",
    STABLE_SECRET,
    "suppress_frag_ndisc",
    "temp_prefered_lft",
    "temp_valid_lft",
    "use_oif_addrs_only",
    "use_optimistic",
    "use_tempaddr",
];

/// Follows the MTU of the device, unless it was set.
const MTU: &str = "mtu";

/// The only one of them that is no number.
const STABLE_SECRET: &str = "stable_secret";

/// Forwarding changes it, so that it must come last.
const ACCEPT_REDIRECTS: &str = "accept_redirects";

/// The other settings that CRIU's images have: numbers of UNIX sockets, text of IPv4.
const UNIX: [&str; 1] = ["max_dgram_qlen"];
const IPV4_TEXT: [&str; 1] = ["ping_group_range"];

/// The most bytes of a setting.
const LONGEST_VALUE: usize = 4096;

/// Settings of a namespace by their paths below [`ROOT`].
pub(super) type Settings = BTreeMap<PathBuf, Vec<u8>>;

fn read(path: &Path) -> Option<Vec<u8>> {
    let mut value = [0; LONGEST_VALUE + 1];
    // The kernel gives a whole setting to one call.
    let bytes = File::open(Path::new(ROOT).join(path)).and_then(|mut file| file.read(&mut value));
    let value = value.get(..bytes.ok()?)?.trim_ascii_end();
    (value.len() <= LONGEST_VALUE).then(|| value.to_vec())
}

/// Whether a setting can be read and changed.
fn is_state(path: &Path) -> bool {
    let data = fs::metadata(Path::new(ROOT).join(path));
    data.is_ok_and(|data| data.permissions().mode() & 0o600 == 0o600)
}

fn write(path: &Path, value: &[u8]) {
    // Tabs and spaces are the same to the kernel.
    let words = |value: &[u8]| -> Vec<Vec<u8>> {
        let words = value.split(u8::is_ascii_whitespace).filter(|word| !word.is_empty());
        words.map(<[u8]>::to_vec).collect()
    };
    if read(path).is_some_and(|found| words(&found) == words(value)) {
        return;
    }
    if let Err(error) = fs::write(Path::new(ROOT).join(path), value) {
        let name = Path::new("net").join(path);
        let value = String::from_utf8_lossy(value);
        warn(&format!("{}: it cannot be set to {value:?}: {error}", name.display()));
    }
}

/// Reads settings of one directory.
fn read_list(dir: &Path, names: &[&str]) -> Vec<SysctlEntry> {
    let entry = |name: &&str| {
        let value = read(&dir.join(name));
        let is_text = *name == STABLE_SECRET || IPV4_TEXT.contains(name);
        match is_text {
            true => SysctlEntry { r#type: SysctlType::CtlStr.into(), iarg: None, sarg: value },
            false => SysctlEntry {
                r#type: SysctlType::Ctl32.into(),
                iarg: value.and_then(|value| std::str::from_utf8(&value).ok()?.parse().ok()),
                sarg: None,
            },
        }
    };
    names.iter().map(entry).collect()
}

/// Writes those that the images have.
fn write_list(dir: &Path, names: &[&str], entries: &[SysctlEntry]) {
    let mut settings: Vec<_> = names.iter().zip(entries).collect();
    settings.sort_by_key(|(name, _)| **name == ACCEPT_REDIRECTS);
    for (name, entry) in settings {
        let number = entry.iarg.map(|number| number.to_string().into_bytes());
        if let Some(value) = number.as_ref().or(entry.sarg.as_ref()) {
            write(&dir.join(name), value);
        }
    }
}

fn conf(family: &str, device: impl AsRef<OsStr>) -> PathBuf {
    Path::new(family).join("conf").join(device.as_ref())
}

/// Reads what CRIU's images have for each device.
pub(super) fn read_device(entry: &mut NetDeviceEntry) {
    entry.conf4 = read_list(&conf("ipv4", OsStr::from_bytes(&entry.name)), &IPV4);
    entry.conf6 = read_list(&conf("ipv6", OsStr::from_bytes(&entry.name)), &IPV6);
}

/// Writes it.
pub(super) fn write_device(entry: &NetDeviceEntry) {
    write_list(&conf("ipv4", OsStr::from_bytes(&entry.name)), &IPV4, &entry.conf4);
    write_list(&conf("ipv6", OsStr::from_bytes(&entry.name)), &IPV6, &entry.conf6);
}

/// The settings of a new network namespace, which a thread of its own reads meanwhile.
#[derive(Debug)]
pub(super) struct OfNewNamespace(JoinHandle<nix::Result<Settings>>);

impl OfNewNamespace {
    /// Starts to read them. The new namespace belongs to that in which the calling thread is.
    pub(super) fn read() -> Self {
        Self(thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET)?;
            Ok(read_unlisted())
        }))
    }

    /// Returns them; `pid` is a process for messages.
    ///
    /// # Errors
    /// The namespace could not be made.
    pub(super) fn settings(self, pid: HostPid) -> Result<Settings> {
        let settings = self.0.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        let step = "make a network namespace to compare with that of";
        settings.map_err(|source| ResError::Process { pid, step, source })
    }
}

/// Reads all settings that CRIU's images lack.
fn read_unlisted() -> Settings {
    let mut found = Settings::new();
    let mut rest = vec![PathBuf::new()];
    while let Some(dir) = rest.pop() {
        let Ok(entries) = fs::read_dir(Path::new(ROOT).join(&dir)) else { continue };
        for entry in entries.flatten() {
            let path = dir.join(entry.file_name());
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                rest.push(path);
            } else if !is_listed(&path)
                && let Some(value) = read(&path)
            {
                found.insert(path, value);
            }
        }
    }
    found
}

/// Whether CRIU's images have a setting.
fn is_listed(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let is_in = |dir: &str| path.parent().is_some_and(|parent| parent == Path::new(dir));
    let is_of_device = |dir: &str| {
        path.parent().and_then(Path::parent).is_some_and(|parent| parent == Path::new(dir))
    };
    is_of_device("ipv4/conf") && IPV4.contains(&name)
        || is_of_device("ipv6/conf") && IPV6.contains(&name)
        || is_in("unix") && UNIX.contains(&name)
        || is_in("ipv4") && IPV4_TEXT.contains(&name)
}

/// Returns the path of the value that a new device has.
fn default_of(path: &Path) -> Option<PathBuf> {
    let dir = path.parent()?.parent()?;
    let is_of_device = OF_DEVICES.iter().any(|known| dir == Path::new(known));
    is_of_device.then(|| dir.join("default").join(path.file_name().expect("it has a parent")))
}

/// Reads the settings that belong to no device, and those that CRIU's images lack and that differ from
/// those of a new namespace; `pid` is a process for messages.
///
/// # Errors
/// As [`OfNewNamespace::settings`].
pub(super) fn read_common(fresh: OfNewNamespace, pid: HostPid) -> Result<NetnsEntry> {
    let lists =
        |family: &str, device: &str, names: &[&str]| read_list(&conf(family, device), names);
    let own = read_unlisted();
    let fresh = fresh.settings(pid)?;
    let expected = |path: &Path| fresh.get(path).or_else(|| fresh.get(&default_of(path)?));
    let others =
        own.into_iter().filter(|(path, value)| expected(path) != Some(value) && is_state(path));
    let mut entry = NetnsEntry {
        def_conf4: lists("ipv4", "default", &IPV4),
        all_conf4: lists("ipv4", "all", &IPV4),
        def_conf6: lists("ipv6", "default", &IPV6),
        all_conf6: lists("ipv6", "all", &IPV6),
        unix_conf: read_list(Path::new("unix"), &UNIX),
        ipv4_sysctl: read_list(Path::new("ipv4"), &IPV4_TEXT),
        ..NetnsEntry::default()
    };
    entry.rcriu_sysctls = others
        .map(|(path, value)| RcriuSysctl { name: path.into_os_string().into_vec(), value })
        .collect();
    Ok(entry)
}

/// Writes the settings that new devices take over. Runs before there are any.
pub(super) fn write_common(entry: &NetnsEntry) {
    for (family, device, names, list) in [
        ("ipv4", "all", &IPV4[..], &entry.all_conf4),
        ("ipv4", "default", &IPV4, &entry.def_conf4),
        ("ipv6", "all", &IPV6, &entry.all_conf6),
        ("ipv6", "default", &IPV6, &entry.def_conf6),
    ] {
        write_list(&conf(family, device), names, list);
    }
    write_list(Path::new("unix"), &UNIX, &entry.unix_conf);
    write_list(Path::new("ipv4"), &IPV4_TEXT, &entry.ipv4_sysctl);
}

/// Writes all other settings. Runs when everything else is there.
pub(super) fn write_others(entry: &NetnsEntry) {
    for RcriuSysctl { name, value } in &entry.rcriu_sysctls {
        let path = Path::new(OsStr::from_bytes(name));
        let is_inside =
            path.components().all(|part| matches!(part, std::path::Component::Normal(_)));
        if is_inside && value.len() <= LONGEST_VALUE {
            write(path, value);
        } else {
            warn(&format!("netns: the setting {} is not below /proc/sys/net", path.display()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listed_settings_and_defaults_are_told_by_their_paths() {
        for listed in ["ipv4/conf/eth0/rp_filter", "unix/max_dgram_qlen", "ipv4/ping_group_range"] {
            assert!(is_listed(Path::new(listed)), "{listed}");
        }
        for other in ["ipv4/conf/eth0/arp_evict_nocarrier", "ipv6/rp_filter", "core/somaxconn"] {
            assert!(!is_listed(Path::new(other)), "{other}");
        }
        let default = default_of(Path::new("ipv6/neigh/eth0/gc_stale_time"));
        assert_eq!(default.as_deref(), Some(Path::new("ipv6/neigh/default/gc_stale_time")));
        assert_eq!(default_of(Path::new("core/somaxconn")), None);
    }
}
