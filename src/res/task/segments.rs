//! The local descriptor table of a process (`modify_ldt(2)`), which is not dumped.

use nix::libc;

use super::{Calling, Collect, Kind};
use crate::{
    inject::Script,
    res::{ResError, Result},
};

/// The function of `modify_ldt(2)` that reads the table, and the size of one entry.
const READ: u64 = 0;
const ENTRY_BYTES: usize = 8;

pub(super) struct Segments;

impl Kind for Segments {
    fn ask(&self, _: &Calling<'_>, script: &mut Script) -> Result<Collect> {
        let entry = script.space(ENTRY_BYTES);
        let arguments = [READ.into(), entry.into(), ENTRY_BYTES.into()];
        let call = script.attempt(libc::SYS_modify_ldt, &arguments);
        Ok(Box::new(move |of, answers, _| {
            // Without a table, the call reads 0 bytes.
            if answers.result(call).is_ok_and(|bytes| bytes > 0) {
                let what = "it has a local descriptor table (modify_ldt(2))".to_owned();
                return Err(ResError::Unsupported { pid: of.of.pid, what });
            }
            Ok(())
        }))
    }
}
