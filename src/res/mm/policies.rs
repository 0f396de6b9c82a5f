//! NUMA policies of mappings (`mbind(2)`).

use crate::{
    causes::tell,
    inject::Script,
    res::{
        Result,
        task::{Collect, Kind, Process},
    },
};

/// The kind.
pub(in crate::res) struct Policies;

impl Kind for Policies {
    fn ask(&self, _: Process, _: &mut Script) -> Result<Collect> {
        Ok(Box::new(|of, _, _| {
            // On a machine with a single node, policies have no effect.
            let nodes = std::fs::read_to_string("/sys/devices/system/node/online");
            if matches!(nodes.unwrap_or_default().trim(), "" | "0") {
                return Ok(());
            }
            let text = std::fs::read_to_string(of.of.path("numa_maps")).unwrap_or_default();
            let policies = text.lines().filter_map(|line| line.split(' ').nth(1));
            if let Some(policy) = policies.into_iter().find(|policy| *policy != "default") {
                let message = format!(
                    "process {} has memory with the NUMA policy {policy}: policies of single \
                     mappings (mbind(2)) are lost",
                    of.of.pid
                );
                tell(log::Level::Warn, &message);
            }
            Ok(())
        }))
    }
}
