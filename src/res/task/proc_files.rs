//! State that `/proc/PID` both shows and sets: the OOM score adjustment and the login user id.

use super::{Calling, Collect, Kind, Restored};
use crate::{
    inject::Script,
    proc,
    res::{ResError, Result, calls::Calls},
    units::HostPid,
};

pub(super) struct ProcFiles;

impl Kind for ProcFiles {
    fn ask(&self, _: &Calling<'_>, _: &mut Script) -> Result<Collect> {
        Ok(Box::new(|of, _, images| {
            images.core.loginuid = proc::loginuid(of.of.witness)?;
            images.core.oom_score_adj = Some(proc::oom_score_adj(of.of.witness)?);
            Ok(())
        }))
    }

    fn set(&self, of: &Restored<'_>, _: &mut Calls<'_>) -> Result<()> {
        let Some(task) = &of.core.tc else { return Ok(()) };
        let pid = of.host;
        if let Some(adjustment) = task.oom_score_adj
            && proc::oom_score_adj(pid)? != adjustment
        {
            write(pid, "oom_score_adj", &adjustment.to_string())?;
        }
        if let Some(loginuid) = task.loginuid
            && proc::loginuid(pid)?.is_some_and(|now| now != loginuid)
        {
            write(pid, "loginuid", &loginuid.to_string())?;
        }
        Ok(())
    }
}

fn write(pid: HostPid, file: &str, value: &str) -> Result<()> {
    let path = format!("/proc/{pid}/{file}");
    std::fs::write(&path, value).map_err(|source| ResError::Write { path: path.into(), source })
}
