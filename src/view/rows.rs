//! Tables of a snapshot's contents, for programs that read them without a mount.

use std::{collections::BTreeMap, time::Duration};

use super::{DescriptorRow, MappingRow, ProcessRow, Result, View, ViewError, proc::Proc};
use crate::image::{Kind, proto};

impl View {
    /// Returns the processes of the shown snapshot.
    pub fn processes(&self) -> Result<Vec<ProcessRow>> {
        self.require_tree()?;
        Proc::new(&self.tables(self.tip), &self.spaces).process_rows()
    }

    /// Returns the descriptors of one process of the shown snapshot, or of all processes.
    ///
    /// # Errors
    /// [`ViewError::NoSuchProcess`], [`ViewError::Image`].
    pub fn descriptors(&self, pid: Option<u32>) -> Result<Vec<DescriptorRow>> {
        self.require_tree()?;
        let tables = self.tables(self.tip);
        let proc = Proc::new(&tables, &self.spaces);
        let pids = match pid {
            Some(pid) => vec![pid],
            None => tables.tree()?.iter().map(|entry| entry.pid).collect(),
        };
        let mut rows = Vec::new();
        for pid in pids {
            rows.extend(proc.descriptor_rows(pid)?);
        }
        Ok(rows)
    }

    /// Returns the mappings of a process of the shown snapshot.
    ///
    /// # Errors
    /// [`ViewError::NoSuchProcess`], [`ViewError::Image`], [`ViewError::Chain`].
    pub fn mappings(&self, pid: u32) -> Result<Vec<MappingRow>> {
        self.require_tree()?;
        Proc::new(&self.tables(self.tip), &self.spaces).mapping_rows(pid)
    }

    /// Returns the names of the shared objects of the snapshot that is shown, by their
    /// shmids: of those that have one.
    ///
    /// # Errors
    /// [`ViewError::Image`], [`ViewError::Chain`].
    pub fn shared_names(&self) -> Result<BTreeMap<u64, String>> {
        let objects = self.tables(self.tip).shared()?;
        let named = objects.iter().filter_map(|(id, object)| Some((*id, object.name.clone()?)));
        Ok(named.collect())
    }

    /// Returns the uptime of the machine at the time of the dump, if the images have it.
    pub fn uptime(&self) -> Result<Option<Duration>> {
        let us = Proc::new(&self.tables(self.tip), &self.spaces).uptime_us()?;
        Ok((us != 0).then(|| Duration::from_micros(us)))
    }

    /// Returns the name of the host, if the images have it: only those of trees with their own UTS
    /// namespace do.
    pub fn host(&self) -> Result<Option<String>> {
        let tables = self.tables(self.tip);
        let inventory: Option<proto::InventoryEntry> =
            tables.images().message_if_any(Kind::Inventory, 0)?;
        let own = inventory.and_then(|inventory| inventory.root_ids);
        let Some(id) = own.and_then(|ids| ids.uts_ns_id) else { return Ok(None) };
        let names: Option<proto::UtsnsEntry> =
            tables.images().message_if_any(Kind::Utsns, id.into())?;
        Ok(names.map(|names| String::from_utf8_lossy(&names.nodename).into_owned()))
    }

    /// Checks that the shown snapshot has processes: a pre-dump has only memory.
    fn require_tree(&self) -> Result<()> {
        if self.chain.images(self.tip).has(Kind::Pstree, 0) {
            return Ok(());
        }
        let dir = self.chain.images(self.tip).name().to_owned();
        Err(ViewError::NoTree { dir })
    }
}
