//! The processor of the dump (`cpuinfo.img`), if the user wants it to be compared at the restore.
//!
//! A program finds out once what its processor can do, and may then use instructions that another
//! processor lacks. The kernel gives no notice of that, so the restore does.

use super::{Begun, Collector, Plan, Restorer};
pub use crate::arch::processor::Aspects;
use crate::{
    arch::native,
    image::{self, ImageStore, Kind, SnapshotWriter, proto::CpuinfoEntry},
    res::{ResError, Result},
};

/// The user's options: what is compared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options(Option<Aspects>);

impl Options {
    /// Records the processor in a dump, and compares these aspects of it at a restore.
    pub const fn new(aspects: Option<Aspects>) -> Self {
        Self(aspects)
    }
}

/// Returns the contents of the image.
///
/// # Errors
/// [`ResError::Processor`]: the images do not know such a processor.
pub fn entry() -> Result<CpuinfoEntry> {
    let here = native::processor().map_err(unknown)?;
    Ok(CpuinfoEntry { x86_entry: here.into_iter().collect(), ..CpuinfoEntry::default() })
}

/// Compares the processor with that of the image.
///
/// # Errors
/// They differ, or there is no image.
pub fn compare(images: &dyn ImageStore, aspects: Aspects) -> Result<()> {
    let Some(image) = images.message_if_any::<CpuinfoEntry>(Kind::Cpuinfo, 0)? else {
        return Err(ResError::Processor {
            problem:
                "there is no cpuinfo.img\nhelp: use --cpu-cap when you dump, or rcriu cpuinfo dump"
                    .to_owned(),
        });
    };
    let Some(here) = native::processor().map_err(unknown)? else {
        return Ok(());
    };
    let [there] = image.x86_entry.as_slice() else {
        let problem = format!("cpuinfo.img has {} x86_entry, expected 1", image.x86_entry.len());
        return Err(ResError::Processor { problem });
    };
    let found = crate::arch::processor::differences(there, &here, aspects)
        .map_err(|problem| ResError::Processor { problem: format!("cpuinfo.img: {problem}") })?;
    if found.is_empty() {
        return Ok(());
    }
    let name = there.model_id.as_deref().map_or("unnamed".into(), String::from_utf8_lossy);
    Err(ResError::Processor {
        problem: format!(
            "it is not as good as that of the dump ({name}): {}\nhelp: restore on such a processor; \
             --cpu-cap=none compares nothing",
            found.join("; ")
        ),
    })
}

fn unknown(problem: String) -> ResError {
    ResError::Processor { problem }
}

pub(super) fn collector(options: Options) -> Begun<dyn Collector> {
    let entry = options.0.map(|_| entry()).transpose()?;
    Ok(Box::new(Recorded(entry)))
}

/// The image, if it is wanted.
#[derive(Debug)]
struct Recorded(Option<CpuinfoEntry>);

impl Collector for Recorded {
    fn write(&self, images: &SnapshotWriter) -> image::Result<()> {
        self.0
            .as_ref()
            .map_or(Ok(()), |entry| images.write(Kind::Cpuinfo, 0, std::slice::from_ref(entry)))
    }
}

pub(super) fn restorer(plan: &Plan<'_>, options: Options) -> Begun<dyn Restorer> {
    options.0.map_or(Ok(()), |aspects| compare(plan.images, aspects))?;
    Ok(Box::new(Compared))
}

/// Nothing is to be restored.
#[derive(Debug)]
struct Compared;

impl Restorer for Compared {}
