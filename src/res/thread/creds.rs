//! Credentials of threads: user and group ids, capabilities, securebits.

use nix::libc;

use super::{Collect, Exited, Kind, Restored, Thread, own};
use crate::{
    image::proto::{self, CoreEntry},
    inject::Script,
    proc::{Ids, Status},
    res::{
        Result,
        calls::{Calls, OfRestorer},
    },
    units::{IdMap, NsId},
};

/// `_LINUX_CAPABILITY_VERSION_3` (`linux/capability.h`).
const CAPABILITY_VERSION: u32 = 0x2008_0522;

/// `SECBIT_NO_SETUID_FIXUP` (`linux/securebits.h`): changing user ids does not change
/// capabilities.
const NO_SETUID_FIXUP: u32 = 1 << 2;

/// `PR_CAP_AMBIENT_RAISE`, `PR_CAP_AMBIENT_CLEAR_ALL` (`linux/prctl.h`).
const AMBIENT_RAISE: i32 = 2;
const AMBIENT_CLEAR_ALL: i32 = 4;

/// Bits of capability sets.
const CAPABILITIES: u32 = 64;

/// The label of a thread without an AppArmor profile, and the value of `--lsm-profile` that leaves the labels as they
/// come.
const UNCONFINED: &str = "unconfined";
const NO_PROFILE: &str = "none";

pub(super) struct Creds;

impl Kind for Creds {
    fn ask(&self, _: Thread, script: &mut Script) -> Collect {
        // /proc shows the rest.
        let call = script.attempt(libc::SYS_prctl, &[libc::PR_GET_SECUREBITS.into()]);
        Box::new(move |of, answers, core| {
            let securebits = u32::try_from(answers.result(call).unwrap_or(0)).unwrap_or(0);
            own(core).creds = Some(entry(securebits, of.status));
            Ok(())
        })
    }

    fn exited(&self, of: &Exited<'_>, core: &mut CoreEntry) -> Result<()> {
        let securebits = own(core).creds.as_ref().map_or(0, |creds| creds.secbits);
        own(core).creds = Some(entry(securebits, of.status));
        Ok(())
    }

    fn set(&self, of: &Restored<'_>, _: &mut Calls<'_>) -> Result<()> {
        let creds = of.core.thread_core.as_ref().and_then(|core| core.creds.as_ref());
        let lost = creds.and_then(|creds| label_lost(creds, &own_label()));
        for what in lost.into_iter().chain(creds.and_then(|creds| groups_lost(creds, of.own))) {
            of.own.differences.borrow_mut().add(what, of.host_tid);
        }
        Ok(())
    }

    fn set_credentials(&self, of: &Restored<'_>, script: &mut Script) {
        if let Some(creds) = of.core.thread_core.as_ref().and_then(|core| core.creds.as_ref()) {
            apply(creds, &of.own.status, &of.own.ids, script);
        }
    }
}

/// Returns the security label of this process; empty if no security module uses labels.
fn own_label() -> String {
    let label = std::fs::read_to_string("/proc/self/attr/current").unwrap_or_default();
    label.trim_end_matches(['\n', '\0']).to_owned()
}

/// A security profile that a restore does not set.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the tree gets the security label of rcriu, {own}, instead of {wanted:?}\nhelp: start rcriu itself under that \
     profile, which the tree inherits"
)]
pub struct ProfileError {
    own: String,
    wanted: String,
}

/// Checks that a restored tree has the security profile `TYPE:NAME`, or `none`, without anything being done.
///
/// # Errors
/// rcriu has another label.
pub fn check_profile(profile: &str) -> std::result::Result<(), ProfileError> {
    check_label(profile, &own_label())
}

fn check_label(profile: &str, own: &str) -> std::result::Result<(), ProfileError> {
    let is_it = match profile.split_once(':') {
        None => profile == NO_PROFILE,
        // Without AppArmor, nothing is confined.
        Some(("apparmor", UNCONFINED)) if own.is_empty() => true,
        Some(("apparmor" | "selinux", wanted)) => has_name(own, wanted),
        _ => false,
    };
    let described = || if own.is_empty() { "none".to_owned() } else { format!("{own:?}") };
    is_it.then_some(()).ok_or_else(|| ProfileError { own: described(), wanted: profile.to_owned() })
}

/// Whether a label is that of a profile. AppArmor shows the mode after the name, and neither images nor
/// options have it.
fn has_name(label: &str, profile: &str) -> bool {
    label == profile || label.split_once(" (").is_some_and(|(name, _)| name == profile)
}

/// Describes the security label that a thread had, which CRIU stores for AppArmor and SELinux, if
/// the restorer has another one.
fn label_lost(creds: &proto::CredsEntry, own: &str) -> Option<String> {
    let stored = creds.lsm_profile.as_deref().map(String::from_utf8_lossy)?;
    (!has_name(own, &stored) && !stored.is_empty()).then(|| {
        let now = if own.is_empty() { "no label".to_owned() } else { format!("{own:?}") };
        format!("the security label was {stored:?} but is that of rcriu: {now}")
    })
}

/// Describes the groups that a thread had of which its user namespace maps none, unless it has them from
/// the restorer.
fn groups_lost(creds: &proto::CredsEntry, own: &OfRestorer) -> Option<String> {
    let is_unmapped = |group: &&u32| own.ids.host_group(NsId(**group)).is_none();
    let unmapped = creds.groups.iter().filter(is_unmapped).count();
    (unmapped > 0 && creds.groups != own.status.groups).then(|| {
        format!("{unmapped} supplementary groups that its user namespace does not map are lost")
    })
}

/// Builds the image entry for the credentials of a thread.
fn entry(securebits: u32, status: &Status) -> proto::CredsEntry {
    proto::CredsEntry {
        uid: status.uids.real,
        euid: status.uids.effective,
        suid: status.uids.saved,
        fsuid: status.uids.fs,
        gid: status.gids.real,
        egid: status.gids.effective,
        sgid: status.gids.saved,
        fsgid: status.gids.fs,
        cap_inh: halves(status.cap_inheritable),
        cap_prm: halves(status.cap_permitted),
        cap_eff: halves(status.cap_effective),
        cap_bnd: halves(status.cap_bounding),
        cap_amb: halves(status.cap_ambient),
        secbits: securebits,
        groups: status.groups.clone(),
        no_new_privs: status.no_new_privs.then_some(1),
        ..Default::default()
    }
}

fn halves(set: u64) -> Vec<u32> {
    let [a, b, c, d, e, f, g, h] = set.to_le_bytes();
    vec![u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h])]
}

fn whole(halves: &[u32]) -> u64 {
    halves.iter().take(2).rev().fold(0, |set, half| set << 32 | u64::from(*half))
}

/// Whether the restorer has these credentials, which new processes inherit.
fn has(own: &Status, entry: &proto::CredsEntry) -> bool {
    let ids = |real, effective, saved, fs| Ids { real, effective, saved, fs };
    own.uids == ids(entry.uid, entry.euid, entry.suid, entry.fsuid)
        && own.gids == ids(entry.gid, entry.egid, entry.sgid, entry.fsgid)
        && own.groups == entry.groups
        && own.cap_inheritable == whole(&entry.cap_inh)
        && own.cap_permitted == whole(&entry.cap_prm)
        && own.cap_effective == whole(&entry.cap_eff)
        && own.cap_bounding == whole(&entry.cap_bnd)
        && own.cap_ambient == whole(&entry.cap_amb)
        && entry.secbits == 0
        && own.no_new_privs == (entry.no_new_privs == Some(1))
}

/// Adds the calls that give a thread its credentials, starting from those of the restorer.
///
/// The thread may have few privileges afterwards. The calls also reset its parent-death signal
/// and its dumpable attribute.
fn apply(entry: &proto::CredsEntry, own: &Status, ids: &IdMap, script: &mut Script) {
    if has(own, entry) {
        return;
    }
    let prctl = |script: &mut Script, what: &'static str, option: i32, value: u64| {
        script.call(what, libc::SYS_prctl, &[option.into(), value.into()]);
    };
    let bits = u64::from(entry.secbits | NO_SETUID_FIXUP);
    prctl(script, "set securebits", libc::PR_SET_SECUREBITS, bits);
    // Where setgroups(2) is forbidden, the groups are those that the first process was made with.
    if own.groups != entry.groups {
        let mapped = entry.groups.iter().filter(|group| ids.host_group(NsId(**group)).is_some());
        let groups: Vec<u8> = mapped.flat_map(|group| group.to_le_bytes()).collect();
        let list = script.bytes(&groups);
        let count = groups.len() / size_of::<u32>();
        script.call("set groups", libc::SYS_setgroups, &[count.into(), list.into()]);
    }
    script.call(
        "set group ids",
        libc::SYS_setresgid,
        &[entry.gid.into(), entry.egid.into(), entry.sgid.into()],
    );
    script.attempt(libc::SYS_setfsgid, &[entry.fsgid.into()]);
    script.call(
        "set user ids",
        libc::SYS_setresuid,
        &[entry.uid.into(), entry.euid.into(), entry.suid.into()],
    );
    script.attempt(libc::SYS_setfsuid, &[entry.fsuid.into()]);
    // The inheritable set may exceed the bounding set, so set it before dropping from the latter.
    set_capabilities(script, own.cap_effective, own.cap_permitted, whole(&entry.cap_inh));
    let bounding = whole(&entry.cap_bnd);
    for capability in 0..CAPABILITIES {
        if own.cap_bounding >> capability & 1 == 1 && bounding >> capability & 1 == 0 {
            let what = "drop a capability from the bounding set";
            prctl(script, what, libc::PR_CAPBSET_DROP, capability.into());
        }
    }
    let permitted = whole(&entry.cap_prm);
    set_capabilities(
        script,
        own.cap_effective,
        permitted | own.cap_effective,
        whole(&entry.cap_inh),
    );
    prctl(
        script,
        "clear the ambient set",
        libc::PR_CAP_AMBIENT,
        u64::from(AMBIENT_CLEAR_ALL.cast_unsigned()),
    );
    let ambient = whole(&entry.cap_amb);
    for capability in (0..CAPABILITIES).filter(|capability| ambient >> capability & 1 == 1) {
        script.call(
            "raise an ambient capability",
            libc::SYS_prctl,
            &[libc::PR_CAP_AMBIENT.into(), AMBIENT_RAISE.into(), capability.into()],
        );
    }
    prctl(script, "set securebits", libc::PR_SET_SECUREBITS, entry.secbits.into());
    set_capabilities(script, whole(&entry.cap_eff), permitted, whole(&entry.cap_inh));
    if entry.no_new_privs == Some(1) {
        prctl(script, "forbid new privileges", libc::PR_SET_NO_NEW_PRIVS, 1);
    }
}

fn set_capabilities(script: &mut Script, effective: u64, permitted: u64, inheritable: u64) {
    let mut header = CAPABILITY_VERSION.to_le_bytes().to_vec();
    header.extend([0; 4]);
    let mut data = Vec::new();
    for half in 0..2 {
        for set in [effective, permitted, inheritable] {
            data.extend_from_slice(&halves(set)[half].to_le_bytes());
        }
    }
    let header = script.bytes(&header);
    let data = script.bytes(&data);
    script.call("set capabilities", libc::SYS_capset, &[header.into(), data.into()]);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::IdRange;

    #[test]
    fn groups_that_no_map_has_are_named_unless_they_are_inherited() {
        let mut own = OfRestorer::read().unwrap();
        let one = |at| vec![IdRange { inside: at, outside: at, count: 1 }];
        let creds = proto::CredsEntry { groups: vec![5, 65534], ..Default::default() };
        assert_eq!(groups_lost(&creds, &own), None);
        own.ids = IdMap::new(one(0), one(5));
        own.status.groups = vec![5];
        let lost = groups_lost(&creds, &own).unwrap();
        assert_eq!(lost, "1 supplementary groups that its user namespace does not map are lost");
        own.status.groups = vec![5, 65534];
        assert_eq!(groups_lost(&creds, &own), None);
    }

    #[test]
    fn a_security_label_that_is_lost_is_named() {
        let lost = |stored: Option<&str>, own: &str| {
            let lsm_profile = stored.map(|label| label.as_bytes().to_vec());
            label_lost(&proto::CredsEntry { lsm_profile, ..Default::default() }, own)
        };
        assert_eq!(lost(None, "unconfined"), None);
        assert_eq!(lost(Some("profile"), "profile (enforce)"), None);
        assert_eq!(lost(Some("a:b:c:s0"), "a:b:c:s0"), None);
        let words = "the security label was \"profile\" but is that of rcriu: ";
        assert_eq!(lost(Some("profile"), "unconfined"), Some(format!("{words}\"unconfined\"")));
        assert_eq!(lost(Some("profile"), ""), Some(format!("{words}no label")));
    }

    #[test]
    fn a_profile_that_the_tree_has_anyway_is_taken() {
        for (profile, own) in [
            ("none", "confined (enforce)"),
            ("apparmor:unconfined", ""),
            ("apparmor:unconfined", "unconfined"),
            ("apparmor:lxc-container-default", "lxc-container-default (enforce)"),
            ("selinux:system_u:system_r:x_t:s0", "system_u:system_r:x_t:s0"),
        ] {
            assert_eq!(check_label(profile, own), Ok(()), "{profile} {own}");
        }
        for (profile, own) in [
            ("apparmor:lxc-container-default", ""),
            ("apparmor:unconfined", "confined (enforce)"),
            ("selinux:unconfined", ""),
            ("unconfined", "unconfined"),
            ("smack:a", "a"),
        ] {
            let message = check_label(profile, own).unwrap_err().to_string();
            assert!(message.contains(profile), "{message}");
        }
    }
}
