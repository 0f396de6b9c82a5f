//! Resource limits (`prlimit(2)`).

use nix::libc;

use super::{Calling, Collect, Kind, Restored};
use crate::{
    image::proto,
    inject::Script,
    proc,
    res::{Result, calls::Calls},
};

pub(super) struct Limits;

impl Kind for Limits {
    fn ask(&self, _: &Calling<'_>, _: &mut Script) -> Result<Collect> {
        Ok(Box::new(|of, _, images| {
            let limits = proc::limits(of.of.witness)?;
            images.core.rlimits = Some(proto::TaskRlimitsEntry {
                rlimits: limits.map(|(cur, max)| proto::RlimitEntry { cur, max }).to_vec(),
            });
            Ok(())
        }))
    }

    fn set(&self, of: &Restored<'_>, calls: &mut Calls<'_>) -> Result<()> {
        let limits = of.core.tc.iter().flat_map(|task| &task.rlimits);
        for (number, limit) in limits.flat_map(|limits| &limits.rlimits).enumerate() {
            if of.own.limits.get(number) == Some(&(limit.cur, limit.max)) {
                continue;
            }
            let mut bytes = limit.cur.to_le_bytes().to_vec();
            bytes.extend_from_slice(&limit.max.to_le_bytes());
            let buffer = calls.script.bytes(&bytes);
            let what =
                format!("set resource limit {number} to {} (hard limit {})", limit.cur, limit.max);
            let arguments = [0.into(), number.into(), buffer.into()];
            calls.script.call(what, libc::SYS_prlimit64, &arguments);
        }
        Ok(())
    }
}
