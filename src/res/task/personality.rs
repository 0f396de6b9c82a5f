//! The personality of a process (`personality(2)`).

use nix::libc;

use super::{Calling, Collect, Kind, Restored};
use crate::{
    inject::Script,
    proc,
    res::{Result, calls::Calls},
};

pub(super) struct Personality;

impl Kind for Personality {
    fn ask(&self, _: &Calling<'_>, _: &mut Script) -> Result<Collect> {
        Ok(Box::new(|of, _, images| {
            images.core.personality = proc::personality(of.of.witness)?;
            Ok(())
        }))
    }

    fn set(&self, of: &Restored<'_>, calls: &mut Calls<'_>) -> Result<()> {
        if let Some(task) = &of.core.tc {
            let personality = personality(task.personality);
            let arguments = [personality.into()];
            calls.script.call("set the personality", libc::SYS_personality, &arguments);
        }
        Ok(())
    }
}

/// Bits that no personality uses (`linux/personality.h`).
const NO_PERSONALITY: u32 = 0xff00;

/// Returns the personality that an image means.
///
/// CRIU parses the hexadecimal digits of `/proc/PID/personality` as decimal. Where all digits
/// are decimal, the result then has bits that no personality uses, which is how this function
/// recognizes it.
fn personality(stored: u32) -> u32 {
    if stored & NO_PERSONALITY == 0 {
        return stored;
    }
    let read = u32::from_str_radix(&stored.to_string(), 16);
    read.ok().filter(|read| read & NO_PERSONALITY == 0).unwrap_or(stored)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn personalities_of_criu_are_understood() {
        // PER_LINUX32, ADDR_NO_RANDOMIZE, UNAME26 with it, READ_IMPLIES_EXEC.
        for value in [8, 0x40000, 0x60000, 0x0040_0000] {
            assert_eq!(personality(value), value);
            let digits: u32 = format!("{value:08x}").parse().unwrap();
            assert_eq!(personality(digits), value, "{digits}");
        }
    }
}
