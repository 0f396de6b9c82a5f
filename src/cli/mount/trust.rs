//! The rights with which a mount reads images of other users.

use nix::unistd::{getegid, geteuid};

use super::args::MappedFiles;
use crate::{
    chain::{Chain, Owner},
    sys::reader::Reader,
    view::View,
};

/// How images that may belong to another user are read.
///
/// A user who can write to an image directory can make it name any file of this machine: by
/// links, by its parent, or as a file that a process had mapped. So files are read with the
/// rights of the images' owner, if that is one user and we may assume them; otherwise only
/// the user who mounts sees the result, and that user could have read the files anyway.
pub(super) struct Trust {
    pub(super) reader: Option<Reader>,
    shown_to: Option<(u32, u32)>,
    mapped_files: bool,
    pub(super) warning: Option<String>,
}

impl Trust {
    pub(super) fn of(chain: &Chain, mapped_files: MappedFiles) -> Self {
        let me = geteuid();
        let own = (me.as_raw(), getegid().as_raw());
        match Owner::of(chain) {
            Owner::One(owner) if owner == own.0 => Self {
                reader: None,
                shown_to: None,
                mapped_files: mapped_files != MappedFiles::Never,
                warning: None,
            },
            Owner::One(owner) if me.is_root() => {
                let left_out = format!(
                    "the images belong to user {owner} and are read with that user's rights; mem/ and \
                     core/ have holes for the files that processes had mapped\nhelp: \
                     --mapped-files=owner reads these files with the same rights"
                );
                Self {
                    reader: Some(Reader(owner)),
                    shown_to: None,
                    mapped_files: mapped_files == MappedFiles::Owner,
                    warning: (mapped_files == MappedFiles::Own).then_some(left_out),
                }
            }
            other => {
                let why = match other {
                    Owner::One(owner) => format!("the images belong to user {owner}"),
                    Owner::Several { dir } => {
                        format!("more than one user could have put images into {}", dir.display())
                    }
                };
                let warning = format!(
                    "{why}; the mount is for user {} alone, and mem/ and core/ have holes for the \
                     files that processes had mapped\nhelp: give the directories and all files in them \
                     to one user (chown -R), and let only that user write there",
                    own.0
                );
                Self {
                    reader: None,
                    shown_to: Some(own),
                    mapped_files: false,
                    warning: Some(warning),
                }
            }
        }
    }

    pub(super) fn apply(&self, mut view: View) -> View {
        if !self.mapped_files {
            view = view.without_mapped_files();
        }
        if let Some((uid, gid)) = self.shown_to {
            view = view.shown_to(uid, gid);
        }
        if !geteuid().is_root() {
            view = view.without_owners();
        }
        view
    }
}
