use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use super::*;
use crate::res::file::testing::Tree;

fn pair() -> (OwnedFd, OwnedFd) {
    let master = descriptor::open(b"/dev/ptmx", libc::O_RDWR.cast_unsigned()).unwrap();
    tty::switch(master.as_fd(), tty::Switch::Locked, false).unwrap();
    let index = tty::ask(master.as_fd(), Question::Index).unwrap();
    let path = format!("/dev/pts/{index}");
    (master, descriptor::open(path.as_bytes(), libc::O_RDWR.cast_unsigned()).unwrap())
}

#[test]
fn devices_are_told_apart() {
    let device = nix::sys::stat::makedev;
    assert_eq!(Role::of(device(5, 2)), Some(Role::Master));
    assert_eq!(Role::of(device(136, 300)), Some(Role::Slave(300)));
    assert_eq!(Role::of(device(4, 1)), Some(Role::Virtual));
    assert_eq!(Role::of(device(4, 64)), None);
    assert_eq!(Role::of(device(1, 3)), None);
    assert_eq!(Role::of(device(10, 229)), None);
}

#[test]
fn control_characters_are_packed_as_in_memory() {
    // As CRIU 4.2 writes them, the rest being whatever was there.
    let numbers =
        [360_651_779, 65540, 1_708_817, 370_609_938, 0, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 1, 2, 3, 4];
    let characters = unpack(&numbers).unwrap();
    assert_eq!(characters[..8], [3, 28, 127, 21, 4, 0, 1, 0]);
    assert_eq!(pack(&characters)[..4], numbers[..4]);
    assert_eq!(pack(&characters).len(), CONTROL_CHARACTERS);
    assert_eq!(unpack(&numbers[1..]), None);
}

#[test]
fn a_pair_is_restored_with_its_modes_and_number() {
    let (master, slave) = pair();
    let mut modes = tty::termios(slave.as_fd(), false).unwrap();
    modes.local &= !0x8;
    tty::set_termios(slave.as_fd(), false, &modes).unwrap();
    let size = tty::WindowSize { rows: 33, columns: 77, x_pixels: 1, y_pixels: 2 };
    tty::set_window_size(master.as_fd(), size).unwrap();
    tty::switch(master.as_fd(), tty::Switch::Packet, true).unwrap();
    let index = tty::ask(master.as_fd(), Question::Index).unwrap();
    let mut tree = Tree::new();
    let nonblocking = (libc::O_RDONLY | libc::O_NONBLOCK).cast_unsigned();
    let second = descriptor::reopen(slave.as_fd(), nonblocking).unwrap();
    tree.add(1, slave);
    tree.add(2, master);
    tree.add(3, second);
    let restored = tree.restore();
    for id in 1..=3 {
        assert_eq!(restored.flags(id), restored.before(id).flags, "{id}");
        assert_eq!(restored.link(id), restored.before(id).link);
    }
    let master = restored.get(2);
    assert_eq!(tty::ask(master, Question::Index), Ok(index));
    assert_eq!(tty::ask(master, Question::Packet), Ok(1));
    assert_eq!(tty::ask(master, Question::Locked), Ok(0));
    assert_eq!(tty::termios(restored.get(1), false), Ok(modes));
    assert_eq!(tty::window_size(restored.get(3)), Ok(size));
    assert!(controlling(restored.opened()).unwrap().is_empty());
    assert!(inherited(restored.opened()).unwrap().is_none());
}

#[test]
fn a_slave_alone_takes_the_shell_job_option() {
    let (_elsewhere, slave) = pair();
    let mut tree = Tree::new();
    tree.add(1, slave.try_clone().unwrap());
    let error = tree.collect_error().to_string();
    assert!(error.contains("--shell-job") && error.contains("/dev/pts/"), "{error}");

    let mut tree = Tree::new();
    tree.policy.shell_job = true;
    tree.add(1, slave);
    let mut dumped = tree.dump();
    dumped.policy.shell_job = false;
    let error = dumped.restore_error().to_string();
    assert!(error.contains("--shell-job"), "{error}");
}

#[test]
fn an_external_terminal_is_given_by_who_restores() {
    let (_theirs, slave) = pair();
    let stat = nix::sys::stat::fstat(&slave).unwrap();
    let name = external_name(stat.st_rdev, stat.st_dev);
    let (other_master, ours) = pair();
    let mut tree = Tree::new();
    tree.policy.external.push(name.clone());
    tree.add(1, slave);
    let mut dumped = tree.dump();
    dumped.policy.inherit_fds.push((ours.as_raw_fd(), name));
    let restored = dumped.restore();
    let given = nix::sys::stat::fstat(restored.get(1)).unwrap();
    assert_eq!(given.st_rdev, nix::sys::stat::fstat(&ours).unwrap().st_rdev);
    drop(other_master);
}

#[test]
fn a_slave_without_master_is_hung_up_again() {
    let (master, slave) = pair();
    drop(master);
    let mut tree = Tree::new();
    tree.add(1, slave);
    let restored = tree.restore();
    assert_eq!(tty::termios(restored.get(1), false), Err(Errno::EIO));
}
