//! The owners of a process's nameless files, and the credentials that its sockets show.

use std::{
    fs, mem,
    os::unix::fs::{MetadataExt, PermissionsExt},
};

use crate::{
    Row,
    kit::{Checkpoint, Verdict, open, same, write_all},
    sockets::{
        Address, accept, connected, listening, option, own_port, pair, path_name,
        receive_descriptors, send_descriptors, set_option, socket,
    },
};

pub const ROWS: &[Row] = &[
    ("owners", owners),
    ("owner_of_a_terminal", owner_of_a_terminal),
    ("owner_of_a_shared_port", owner_of_a_shared_port),
    ("peer_credentials", peer_credentials),
    ("credentials_of_a_pair", credentials_of_a_pair),
    ("peer_credentials_of_the_dead", peer_credentials_of_the_dead),
];

const NOBODY: u32 = 65534;
const OTHER: u32 = 1234;

/// Becomes another user, and stays dumpable.
fn become_user(id: u32) -> Verdict {
    let groups = [id, id + 1];
    sys!(setgroups(2, groups.as_ptr()))?;
    sys!(setresgid(id, id, id))?;
    sys!(setresuid(id, id, id))?;
    sys!(prctl(libc::PR_SET_DUMPABLE, 1)).map(drop)
}

/// Owner and mode of a descriptor.
fn owner(fd: i32) -> Result<(u32, u32, u32), String> {
    // SAFETY: all zeros is a valid value.
    let mut stat: libc::stat = unsafe { mem::zeroed() };
    sys!(fstat(fd, &raw mut stat))?;
    Ok((stat.st_uid, stat.st_gid, stat.st_mode))
}

/// Opens what a descriptor leads to once more.
fn opens_again(fd: i32, flags: i32) -> Verdict {
    let path = std::ffi::CString::new(format!("/proc/self/fd/{fd}")).expect("no NUL");
    sys!(close(open(&path, flags | libc::O_NONBLOCK)?)).map(drop)
}

fn owners(checkpoint: &Checkpoint) -> Verdict {
    let directory = checkpoint.path("directory");
    fs::create_dir(&directory).map_err(|error| error.to_string())?;
    let everybody = fs::Permissions::from_mode(0o777);
    fs::set_permissions(&directory, everybody).map_err(|error| error.to_string())?;
    let mut roots = [0; 2];
    sys!(pipe2(roots.as_mut_ptr(), 0))?;
    become_user(NOBODY)?;
    let mut ends = [0; 2];
    sys!(pipe2(ends.as_mut_ptr(), 0))?;
    let [shared, other] = pair(libc::SOCK_STREAM)?;
    sys!(fchmod(ends[0], 0o640))?;
    sys!(fchmod(shared, 0o644))?;
    let datagrams = pair(libc::SOCK_DGRAM)?;
    let tcp = socket(libc::AF_INET, libc::SOCK_STREAM)?;
    let udp = socket(libc::AF_INET6, libc::SOCK_DGRAM)?;
    let netlink = socket(libc::AF_NETLINK, libc::SOCK_RAW)?;
    let unbound = socket(libc::AF_UNIX, libc::SOCK_SEQPACKET)?;
    let name = format!("{}/fifo", directory.display());
    let name = std::ffi::CString::new(name).expect("no NUL");
    sys!(mkfifo(name.as_ptr(), 0o620))?;
    let fifo = open(&name, libc::O_RDWR)?;
    sys!(unlink(name.as_ptr()))?;
    let memory = sys!(memfd_create(c"memory".as_ptr(), 0))?;
    let all = [
        roots[0],
        ends[0],
        ends[1],
        shared,
        other,
        datagrams[0],
        datagrams[1],
        tcp,
        udp,
        netlink,
        unbound,
        fifo,
        memory,
    ];
    let of_all = || all.iter().map(|fd| owner(*fd)).collect::<Result<Vec<_>, _>>();
    let before = of_all()?;
    checkpoint.wait();
    same("owners and modes", before, of_all()?)?;
    for fd in [ends[0], fifo] {
        opens_again(fd, libc::O_RDONLY)?;
        opens_again(fd, libc::O_WRONLY)?;
    }
    opens_again(memory, libc::O_RDWR)
}

/// The user who has opened a master can open its slave, which no process had open.
fn owner_of_a_terminal(checkpoint: &Checkpoint) -> Verdict {
    become_user(NOBODY)?;
    let terminal = || -> Result<(i32, std::ffi::CString), String> {
        let master = open(c"/dev/ptmx", libc::O_RDWR | libc::O_NOCTTY)?;
        let mut number = 0;
        sys!(ioctl(master, libc::TIOCGPTN, &raw mut number))?;
        let unlocked = 0;
        sys!(ioctl(master, libc::TIOCSPTLCK, &raw const unlocked))?;
        let name = format!("/dev/pts/{number}");
        Ok((master, std::ffi::CString::new(name).expect("no NUL")))
    };
    let (_lone, name) = terminal()?;
    let (_master, other) = terminal()?;
    let slave = open(&other, libc::O_RDWR | libc::O_NOCTTY)?;
    sys!(chmod(name.as_ptr(), 0o640))?;
    let of_path = || {
        let path = std::str::from_utf8(name.to_bytes()).expect("it is text");
        let stat = fs::metadata(path).map_err(|error| error.to_string())?;
        Ok::<_, String>((stat.uid(), stat.gid(), stat.mode()))
    };
    let before = (of_path()?, owner(slave)?);
    same("owner", NOBODY, before.0.0)?;
    checkpoint.wait();
    same("owners and modes", before, (of_path()?, owner(slave)?))?;
    sys!(close(open(&name, libc::O_RDWR | libc::O_NOCTTY)?)).map(drop)
}

/// A second socket is bound by the owner of the first.
fn owner_of_a_shared_port(checkpoint: &Checkpoint) -> Verdict {
    become_user(NOBODY)?;
    let name = Address::ip4(own_port(0));
    let share = |kind: i32| -> Result<i32, String> {
        let fd = socket(libc::AF_INET, kind)?;
        set_option(fd, libc::SOL_SOCKET, libc::SO_REUSEPORT, 1)?;
        name.bind(fd)?;
        if kind == libc::SOCK_STREAM {
            sys!(listen(fd, 3))?;
        }
        Ok(fd)
    };
    let kinds = [libc::SOCK_STREAM, libc::SOCK_DGRAM];
    for kind in kinds {
        share(kind)?;
    }
    checkpoint.wait();
    for kind in kinds {
        share(kind)?;
    }
    Ok(())
}

/// Whom a socket names as its peer: process, user, group, and the first of its groups.
fn peer(fd: i32) -> Result<(i32, u32, u32, u32), String> {
    let mut who = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut length = size_of::<libc::ucred>() as u32;
    let at = (&raw mut who).cast();
    sys!(getsockopt(fd, libc::SOL_SOCKET, libc::SO_PEERCRED, at, &raw mut length))?;
    let mut groups = [u32::MAX; 64];
    let mut length = size_of_val(&groups) as u32;
    let at = groups.as_mut_ptr().cast();
    // There are none of sockets without a peer.
    let _ = sys!(getsockopt(fd, libc::SOL_SOCKET, libc::SO_PEERGROUPS, at, &raw mut length));
    Ok((who.pid, who.uid, who.gid, groups[0]))
}

fn peer_credentials(checkpoint: &Checkpoint) -> Verdict {
    let name = path_name(checkpoint, "socket");
    let server = listening(&name, libc::SOCK_STREAM)?;
    let path = checkpoint.path("socket");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o777)).map_err(|e| e.to_string())?;
    let child = checkpoint.fork(|child| {
        become_user(NOBODY)?;
        let old = connected(&name, libc::SOCK_STREAM)?;
        let before = peer(old)?;
        let [one, other] = pair(libc::SOCK_SEQPACKET)?;
        let pair_before = (peer(one)?, peer(other)?);
        same("creator of the pair", std::process::id().cast_signed(), pair_before.0.0)?;
        child.wait();
        same("who listened", before, peer(old)?)?;
        same("creator of the pair", pair_before, (peer(one)?, peer(other)?))?;
        let new = connected(&name, libc::SOCK_STREAM)?;
        same("who listens", before, peer(new)?)?;
        child.mark("connected");
        child.wait_mark("accepted")
    })?;
    let accepted = accept(server)?;
    let waiting = connected(&name, libc::SOCK_STREAM)?;
    let datagrams = pair(libc::SOCK_DGRAM)?;
    let own = peer(server)?;
    same("own pid", std::process::id().cast_signed(), own.0)?;
    become_user(OTHER)?;
    let fds = [server, accepted, waiting, datagrams[0], datagrams[1]];
    let of_all = || fds.iter().map(|fd| peer(*fd)).collect::<Result<Vec<_>, _>>();
    let before = of_all()?;
    checkpoint.wait();
    same("peers", before.clone(), of_all()?)?;
    let first = accept(server)?;
    let (pid, ..) = peer(first)?;
    same("who waited", std::process::id().cast_signed(), pid)?;
    checkpoint.wait_mark("connected")?;
    let second = accept(server)?;
    same("who called", before[1], peer(second)?)?;
    checkpoint.mark("accepted");
    same("listening", 1, option(server, libc::SOL_SOCKET, libc::SO_ACCEPTCONN)?)?;
    child.join()
}

/// A process that is gone has made the sockets.
fn peer_credentials_of_the_dead(checkpoint: &Checkpoint) -> Verdict {
    let [mine, theirs] = pair(libc::SOCK_DGRAM)?;
    let name = path_name(checkpoint, "socket");
    let child = checkpoint.fork(|child| {
        let server = socket(libc::AF_UNIX, libc::SOCK_STREAM)?;
        name.bind(server)?;
        become_user(NOBODY)?;
        sys!(listen(server, 7))?;
        let [one, other] = pair(libc::SOCK_STREAM)?;
        write_all(one, b"from the grave")?;
        send_descriptors(theirs, b"x", &[server, one, other])?;
        child.announce();
        Ok(())
    })?;
    child.join()?;
    let (_, fds) = receive_descriptors(mine)?;
    let of_all = || fds.iter().map(|fd| peer(*fd)).collect::<Result<Vec<_>, _>>();
    let before = of_all()?;
    same("user", NOBODY, before[0].1)?;
    checkpoint.wait();
    same("peers", before.clone(), of_all()?)?;
    let client = connected(&name, libc::SOCK_STREAM)?;
    same("who listened", before[0], peer(client)?)
}

/// A process is what it was when it made its sockets.
fn credentials_of_a_pair(checkpoint: &Checkpoint) -> Verdict {
    become_user(NOBODY)?;
    let stream = pair(libc::SOCK_STREAM)?;
    let packets = pair(libc::SOCK_SEQPACKET)?;
    let name = crate::sockets::abstract_name(&format!("rcriu-owner-{}", std::process::id()));
    let server = listening(&name, libc::SOCK_STREAM)?;
    let client = connected(&name, libc::SOCK_STREAM)?;
    let accepted = accept(server)?;
    let fds = [stream[0], stream[1], packets[0], packets[1], server, client, accepted];
    let of_all = || fds.iter().map(|fd| peer(*fd)).collect::<Result<Vec<_>, _>>();
    let before = of_all()?;
    let own = (std::process::id().cast_signed(), NOBODY, NOBODY, NOBODY);
    ensure!(before.iter().all(|peer| *peer == own), "others than {own:?}: {before:?}");
    checkpoint.wait();
    same("peers", before, of_all()?)
}
