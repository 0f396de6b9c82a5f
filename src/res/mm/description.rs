//! The layout of an address space that the kernel keeps: program, heap, stack, arguments, and
//! auxiliary vector; and whether transparent huge pages are disabled.

use nix::libc;

use crate::{
    image::{proto::MmEntry, tree::Arena},
    inject::Script,
    proc,
    res::{
        Result,
        file::{self, FileTable, Installer},
        task::{Calling, Collect, Images, Kind, Planned, Process, Restored},
    },
};

/// The size of `struct prctl_mm_map` (`linux/prctl.h`): eleven addresses, the address and the
/// size of the auxiliary vector, and the descriptor of the program.
const MM_MAP_BYTES: usize = 104;

/// The offset of the address of the auxiliary vector in it.
const AUXV_AT: usize = 88;

/// Other code fills in the mappings.
pub(in crate::res) struct Description;

impl Kind for Description {
    fn ask(&self, _: &Calling<'_>, script: &mut Script) -> Result<Collect> {
        let brk = script.attempt(libc::SYS_brk, &[0.into()]);
        Ok(Box::new(move |of, answers, images| {
            let witness = of.of.witness;
            let stat = proc::stat(witness)?;
            let mut auxv = proc::auxv(witness)?;
            while auxv.last() == Some(&0) {
                auxv.pop();
            }
            images.mm = MmEntry {
                mm_start_code: stat.start_code,
                mm_end_code: stat.end_code,
                mm_start_data: stat.start_data,
                mm_end_data: stat.end_data,
                mm_start_stack: stat.start_stack,
                mm_start_brk: stat.start_brk,
                mm_brk: answers.result(brk).unwrap_or(0),
                mm_arg_start: stat.arg_start,
                mm_arg_end: stat.arg_end,
                mm_env_start: stat.env_start,
                mm_env_end: stat.env_end,
                mm_saved_auxv: auxv,
                thp_disabled: Some(proc::status(witness)?.thp_enabled == Some(false)),
                ..std::mem::take(&mut images.mm)
            };
            Ok(())
        }))
    }

    fn enter(&self, of: Process, files: &mut FileTable, images: &mut Images) -> file::Result<()> {
        images.mm.exe_file_id = files.enter_path(of.witness, of.path("exe"))?;
        Ok(())
    }

    fn open(&self, of: &Planned<'_>, files: &mut Installer<'_>) -> file::Result<()> {
        files.need_program(of.mm.exe_file_id)
    }

    /// Since Linux 5.9, `PR_SET_MM_MAP` needs only `CAP_CHECKPOINT_RESTORE`.
    fn place(
        &self,
        of: &Restored<'_>,
        files: &Installer<'_>,
        script: &mut Script,
    ) -> file::Result<()> {
        // The kernel refuses to replace a program that is mapped, so it is set once.
        if !of.owns(Arena::Memory) {
            return Ok(());
        }
        let mm = of.mm;
        let program = files.program(mm.exe_file_id)?;
        let mut map = Vec::with_capacity(MM_MAP_BYTES);
        for address in [
            mm.mm_start_code,
            mm.mm_end_code,
            mm.mm_start_data,
            mm.mm_end_data,
            mm.mm_start_brk,
            mm.mm_brk,
            mm.mm_start_stack,
            mm.mm_arg_start,
            mm.mm_arg_end,
            mm.mm_env_start,
            mm.mm_env_end,
            0, // the auxiliary vector: `point` writes its address
        ] {
            map.extend_from_slice(&address.to_le_bytes());
        }
        let auxv: Vec<u8> = mm.mm_saved_auxv.iter().flat_map(|word| word.to_le_bytes()).collect();
        map.extend_from_slice(&u32::try_from(auxv.len()).unwrap_or(0).to_le_bytes());
        map.extend_from_slice(&program.to_le_bytes());
        debug_assert_eq!(map.len(), MM_MAP_BYTES);
        let auxv = script.bytes(&auxv);
        let buffer = script.bytes(&map);
        script.point(buffer, AUXV_AT, auxv);
        script.call(
            "set the layout of the address space",
            libc::SYS_prctl,
            &[
                libc::PR_SET_MM.into(),
                libc::PR_SET_MM_MAP.into(),
                buffer.into(),
                MM_MAP_BYTES.into(),
            ],
        );
        if mm.thp_disabled == Some(true) {
            let arguments = [libc::PR_SET_THP_DISABLE.into(), 1.into()];
            script.call("disable transparent huge pages", libc::SYS_prctl, &arguments);
        }
        Ok(())
    }
}
