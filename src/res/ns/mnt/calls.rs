//! The calls about mounts that the first process of a tree makes, in the namespaces of the tree. It
//! shares the descriptors of rcriu.

use std::{
    ffi::{CStr, CString},
    os::{
        fd::{AsRawFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

use nix::{errno::Errno, libc, unistd};
use zerocopy::IntoBytes;

use crate::{
    causes::HELP,
    inject::{Arg, CallId, InjectError, Script},
    res::{ResError, Result, ns::Building},
    sys::{
        fds,
        mounts::{
            AT_RECURSIVE, CLOSE_ON_EXEC, COPY_AS_IT_IS, FSCONFIG_CMD_CREATE,
            FSCONFIG_CMD_RECONFIGURE, FSCONFIG_SET_FLAG, FSCONFIG_SET_STRING, FSPICK_EMPTY_PATH,
            MOVE_BY_DESCRIPTORS, MOVE_FROM_DESCRIPTOR, MOVE_MOUNT_SET_GROUP, MountAttributes,
            OPEN_TREE_CLOEXEC, OPEN_TREE_CLONE,
        },
    },
};

/// The flags of `open_tree(2)` and `mount_setattr(2)` for the mount of a descriptor.
const EMPTY_PATH: u32 = libc::AT_EMPTY_PATH.cast_unsigned();

/// A parameter of a file system: a name, with a value unless it is a flag.
pub(super) type Parameter = (Vec<u8>, Option<Vec<u8>>);

fn call(script: &mut Script, what: &str, number: libc::c_long, arguments: &[Arg]) -> CallId {
    script.call(what.to_owned(), number, arguments)
}

fn text(script: &mut Script, bytes: &[u8]) -> Result<Arg> {
    let invalid = |_| super::super::wrong(0, "a name of a mount has a NUL byte in it");
    Ok(script.string(&CString::new(bytes).map_err(invalid)?).into())
}

/// Takes a descriptor that the first process has opened: it is one of rcriu, too.
fn take(number: u64) -> nix::Result<OwnedFd> {
    let number = i32::try_from(number).map_err(|_| Errno::EBADF)?;
    let own = fds::duplicate(number)?;
    unistd::close(number)?;
    Ok(own)
}

fn opened(on: &Building<'_>, script: &Script, call: CallId) -> Result<OwnedFd> {
    let answers = (on.run)(script)?;
    let number = answers.result(call);
    let failed = |source| ResError::Process { pid: on.first, step: "take a mount from", source };
    number.and_then(take).map_err(failed)
}

/// Makes all mounts of the namespace private.
pub(super) fn isolate(on: &Building<'_>) -> Result<()> {
    let mut script = Script::new();
    let attributes =
        MountAttributes { propagation: libc::MS_PRIVATE, ..MountAttributes::default() };
    let buffer = script.bytes(attributes.as_bytes());
    let root = script.string(c"/");
    let size = size_of::<MountAttributes>();
    let arguments =
        [libc::AT_FDCWD.into(), root.into(), AT_RECURSIVE.into(), buffer.into(), size.into()];
    call(&mut script, "make the inherited mounts private", libc::SYS_mount_setattr, &arguments);
    (on.run)(&script).map(drop).map_err(ResError::from)
}

/// Mounts a file system anew, detached.
pub(super) fn make(
    on: &Building<'_>,
    name: &[u8],
    parameters: &[Parameter],
    what: &str,
) -> Result<OwnedFd> {
    let mut script = Script::new();
    let mount = ask_to_make(&mut script, name, parameters, what)?;
    opened(on, &script, mount)
}

/// Adds the calls that mount a file system anew, detached. The result is a descriptor.
pub(super) fn ask_to_make(
    script: &mut Script,
    name: &[u8],
    parameters: &[Parameter],
    what: &str,
) -> Result<CallId> {
    let name = text(script, name)?;
    let context = call(script, what, libc::SYS_fsopen, &[name, CLOSE_ON_EXEC.into()]);
    for (key, value) in parameters {
        let shown = format!("{what}: set {}", String::from_utf8_lossy(key));
        let key = text(script, key)?;
        let (command, value) = match value {
            None => (FSCONFIG_SET_FLAG, Arg::from(0)),
            Some(value) => (FSCONFIG_SET_STRING, text(script, value)?),
        };
        let arguments = [context.into(), command.into(), key, value, 0.into()];
        call(script, &shown, libc::SYS_fsconfig, &arguments);
    }
    let arguments = [context.into(), FSCONFIG_CMD_CREATE.into(), 0.into(), 0.into(), 0.into()];
    call(script, what, libc::SYS_fsconfig, &arguments);
    let arguments = [context.into(), CLOSE_ON_EXEC.into(), 0.into()];
    let mount = call(script, what, libc::SYS_fsmount, &arguments);
    call(script, what, libc::SYS_close, &[context.into()]);
    Ok(mount)
}

/// Adds the call that opens a file or directory of a mount, below its root, without following links. The
/// result is a descriptor (`O_PATH`).
pub(super) fn ask_to_open(
    script: &mut Script,
    mount: Arg,
    path: &Path,
    what: &str,
) -> Result<CallId> {
    let path = text(script, path.as_os_str().as_bytes())?;
    let flags = libc::O_PATH | libc::O_NOFOLLOW | libc::O_CLOEXEC;
    let resolve = libc::RESOLVE_BENEATH | libc::RESOLVE_NO_SYMLINKS | libc::RESOLVE_NO_MAGICLINKS;
    // `struct open_how` (`linux/openat2.h`): flags, mode, ways to resolve.
    let how = [u64::from(flags.cast_unsigned()), 0, resolve];
    let how: Vec<u8> = how.into_iter().flat_map(u64::to_ne_bytes).collect();
    let (size, how) = (how.len(), script.bytes(&how));
    Ok(call(script, what, libc::SYS_openat2, &[mount, path, how.into(), size.into()]))
}

/// Sets flags of the file system of a mount, such as `ro`.
pub(super) fn reconfigure(
    on: &Building<'_>,
    mount: BorrowedFd,
    flag: &[u8],
    what: &str,
) -> Result<()> {
    let mut script = Script::new();
    let empty = script.string(c"");
    let flags = FSPICK_EMPTY_PATH | CLOSE_ON_EXEC;
    let arguments = [mount.as_raw_fd().into(), empty.into(), flags.into()];
    let context = call(&mut script, what, libc::SYS_fspick, &arguments);
    let flag = text(&mut script, flag)?;
    let arguments = [context.into(), FSCONFIG_SET_FLAG.into(), flag, 0.into(), 0.into()];
    call(&mut script, what, libc::SYS_fsconfig, &arguments);
    let arguments = [context.into(), FSCONFIG_CMD_RECONFIGURE.into(), 0.into(), 0.into(), 0.into()];
    call(&mut script, what, libc::SYS_fsconfig, &arguments);
    call(&mut script, what, libc::SYS_close, &[context.into()]);
    (on.run)(&script).map(drop).map_err(ResError::from)
}

/// Returns a detached copy of the mount on which a path is that does not end with a symbolic link, with that
/// file or directory as its root.
pub(super) fn copy_from_path(on: &Building<'_>, path: &CStr, what: &str) -> Result<OwnedFd> {
    let mut script = Script::new();
    let path = script.string(path);
    let arguments = [libc::AT_FDCWD.into(), path.into(), COPY_AS_IT_IS.into()];
    let copy = call(&mut script, what, libc::SYS_open_tree, &arguments);
    opened(on, &script, copy).map_err(|error| match error {
        ResError::Inject(InjectError::Call { source: Errno::EINVAL, .. }) => {
            let problem = format!(
                "{what}: this user may not copy a mount without those on it \
                 (mount_namespaces(7)){HELP}run rcriu restore as root"
            );
            super::super::wrong(0, &problem)
        }
        error => error,
    })
}

/// Returns a detached copy of the mount of a descriptor, whose file or directory becomes its root. The
/// mount must be attached (Linux 6.15 also copies others).
pub(super) fn copy(on: &Building<'_>, of: BorrowedFd, what: &str) -> Result<OwnedFd> {
    let mut script = Script::new();
    let copy = ask_to_copy(&mut script, of.as_raw_fd().into(), what);
    opened(on, &script, copy)
}

/// Adds the call that copies the mount of a descriptor, see [`copy`]. The result is a descriptor.
pub(super) fn ask_to_copy(script: &mut Script, of: Arg, what: &str) -> CallId {
    let empty = script.string(c"");
    let flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | EMPTY_PATH;
    call(script, what, libc::SYS_open_tree, &[of, empty.into(), flags.into()])
}

/// Changes attributes or the propagation of a mount.
pub(super) fn set(
    on: &Building<'_>,
    mount: BorrowedFd,
    attributes: MountAttributes,
    what: &str,
) -> Result<()> {
    let mut script = Script::new();
    ask_to_set(&mut script, mount.as_raw_fd().into(), attributes, what);
    (on.run)(&script).map(drop).map_err(ResError::from)
}

/// Adds the call that changes attributes or the propagation of a mount.
pub(super) fn ask_to_set(script: &mut Script, mount: Arg, attributes: MountAttributes, what: &str) {
    let empty = script.string(c"");
    let buffer = script.bytes(attributes.as_bytes());
    let size = size_of::<MountAttributes>();
    let arguments = [mount, empty.into(), EMPTY_PATH.into(), buffer.into(), size.into()];
    call(script, what, libc::SYS_mount_setattr, &arguments);
}

/// Attaches a mount to a mount point.
pub(super) fn attach(
    on: &Building<'_>,
    mount: BorrowedFd,
    point: BorrowedFd,
    what: &str,
) -> Result<()> {
    move_mount(on, mount, point, MOVE_BY_DESCRIPTORS, what)
}

/// Puts a mount into the sharing groups of another one.
pub(super) fn join(
    on: &Building<'_>,
    mount: BorrowedFd,
    other: BorrowedFd,
    what: &str,
) -> Result<()> {
    move_mount(on, other, mount, MOVE_BY_DESCRIPTORS | MOVE_MOUNT_SET_GROUP, what)
}

fn move_mount(
    on: &Building<'_>,
    from: BorrowedFd,
    to: BorrowedFd,
    flags: u32,
    what: &str,
) -> Result<()> {
    let mut script = Script::new();
    ask_to_move(&mut script, from.as_raw_fd().into(), to.as_raw_fd().into(), flags, what);
    (on.run)(&script).map(drop).map_err(ResError::from)
}

/// Adds the call that attaches a mount to a mount point.
pub(super) fn ask_to_attach(script: &mut Script, mount: Arg, point: Arg, what: &str) {
    ask_to_move(script, mount, point, MOVE_BY_DESCRIPTORS, what);
}

fn ask_to_move(script: &mut Script, from: Arg, to: Arg, flags: u32, what: &str) {
    let empty = script.string(c"");
    let arguments = [from, empty.into(), to, empty.into(), flags.into()];
    call(script, what, libc::SYS_move_mount, &arguments);
}

/// Attaches a mount on top of the root directory of the first process.
pub(super) fn attach_to_root(on: &Building<'_>, mount: BorrowedFd, what: &str) -> Result<()> {
    let mut script = Script::new();
    ask_to_attach_to_root(&mut script, mount, what);
    (on.run)(&script).map(drop).map_err(ResError::from)
}

fn ask_to_attach_to_root(script: &mut Script, mount: BorrowedFd, what: &str) {
    let empty = script.string(c"");
    let slash = script.string(c"/");
    let arguments = [
        mount.as_raw_fd().into(),
        empty.into(),
        libc::AT_FDCWD.into(),
        slash.into(),
        MOVE_FROM_DESCRIPTOR.into(),
    ];
    call(script, what, libc::SYS_move_mount, &arguments);
}

/// Makes a detached mount the root of the namespace, in place of all mounts so far. So many were attached
/// to the root directory.
pub(super) fn replace_root(on: &Building<'_>, root: BorrowedFd, attached: usize) -> Result<()> {
    let mut script = Script::new();
    ask_to_attach_to_root(&mut script, root, "attach the root mount");
    let here = script.string(c".");
    let arguments = [root.as_raw_fd().into()];
    call(&mut script, "enter the new root directory", libc::SYS_fchdir, &arguments);
    let arguments = [here.into(), here.into()];
    call(&mut script, "change the root mount", libc::SYS_pivot_root, &arguments);
    (on.run)(&script)?;
    // The call takes the uppermost mount on the directory.
    for _ in 0..=attached {
        let mut script = Script::new();
        let here = script.string(c".");
        let arguments = [here.into(), libc::MNT_DETACH.into()];
        call(&mut script, "unmount the old root", libc::SYS_umount2, &arguments);
        (on.run)(&script)?;
    }
    let mut script = Script::new();
    let slash = script.string(c"/");
    call(&mut script, "enter the root directory", libc::SYS_chdir, &[slash.into()]);
    (on.run)(&script).map(drop).map_err(ResError::from)
}
