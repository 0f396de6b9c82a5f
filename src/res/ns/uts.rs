//! UTS namespaces: host name and domain name.

use nix::libc;

use super::{Collect, Namespace, Options, Restoring, wrong};
use crate::{
    image::{ImageStore, Kind, proto::UtsnsEntry, tree::uts_problem},
    inject::Script,
    res::Result,
};

/// The size of a name with its NUL byte (`__NEW_UTS_LEN`, `linux/utsname.h`).
const FIELD_BYTES: usize = 65;

/// The fields of `struct new_utsname`: system, host, release, version, machine, domain.
const FIELDS: usize = 6;
const HOST: usize = 1;
const DOMAIN: usize = 5;

#[derive(Debug)]
pub(super) struct Uts;

impl Namespace for Uts {
    fn clone_flag(&self) -> u64 {
        u64::from(libc::CLONE_NEWUTS.cast_unsigned())
    }

    fn ask(&self, script: &mut Script) -> Option<Collect> {
        let names = script.space(FIELDS * FIELD_BYTES);
        script.call("read the host name", libc::SYS_uname, &[names.into()]);
        Some(Box::new(move |answers, number, images| {
            let entry = entry(answers.bytes(names));
            images.write(Kind::Utsns, number.into(), &[entry])
        }))
    }

    fn restore(
        &self,
        images: &dyn ImageStore,
        number: u32,
        _: &Options,
    ) -> Result<Box<dyn Restoring>> {
        let entry: UtsnsEntry = images.message(Kind::Utsns, number.into())?;
        if let Some(problem) = uts_problem(&entry) {
            return Err(wrong(number, &problem));
        }
        Ok(Box::new(Names(entry)))
    }
}

/// The names of a namespace to be restored.
#[derive(Debug)]
struct Names(UtsnsEntry);

impl Restoring for Names {
    fn script(&self) -> Script {
        let Self(entry) = self;
        let mut script = Script::new();
        for (what, call, name) in [
            ("set the host name", libc::SYS_sethostname, &entry.nodename),
            ("set the domain name", libc::SYS_setdomainname, &entry.domainname),
        ] {
            let bytes = script.bytes(name);
            script.call(what, call, &[bytes.into(), name.len().into()]);
        }
        script
    }
}

/// Builds the image entry from the buffer that `uname(2)` has written.
fn entry(names: &[u8]) -> UtsnsEntry {
    let field = |number: usize| {
        let field = &names[number * FIELD_BYTES..(number + 1) * FIELD_BYTES];
        field.split(|byte| *byte == 0).next().unwrap_or_default().to_vec()
    };
    UtsnsEntry { nodename: field(HOST), domainname: field(DOMAIN) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::{SnapshotWriter, proto::InventoryEntry};

    #[test]
    fn names_come_back_from_their_image() {
        let mut names = vec![0; FIELDS * FIELD_BYTES];
        names[HOST * FIELD_BYTES..][..4].copy_from_slice(b"host");
        names[DOMAIN * FIELD_BYTES..][..6].copy_from_slice(b"domain");
        let entry = entry(&names);
        assert_eq!(
            (entry.nodename.as_slice(), entry.domainname.as_slice()),
            (&b"host"[..], &b"domain"[..])
        );
        let dir = tempfile::tempdir().unwrap();
        let images = SnapshotWriter::begin(dir.path()).unwrap();
        let long = UtsnsEntry { nodename: vec![b'x'; FIELD_BYTES], domainname: Vec::new() };
        images.write(Kind::Utsns, 12, &[entry]).unwrap();
        images.write(Kind::Utsns, 13, &[long]).unwrap();
        images.sync(|_| {}).unwrap();
        images.commit(&InventoryEntry::default()).unwrap();
        // Two calls, each with its name.
        let images = crate::image::Directory::at(dir.path());
        assert_eq!(Uts.restore(&images, 12, &Options::default()).unwrap().script().len(), 2);
        let error = Uts.restore(&images, 13, &Options::default()).unwrap_err();
        assert!(error.to_string().contains("65 bytes"), "{error}");
        assert!(Uts.restore(&images, 14, &Options::default()).is_err());
    }
}
