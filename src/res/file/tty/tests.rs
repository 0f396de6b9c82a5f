use std::{
    fs::File,
    io::{BufWriter, Read, Write},
    os::fd::{AsFd, AsRawFd, OwnedFd},
    sync::{Mutex, MutexGuard, PoisonError},
};

use nix::{errno::Errno, libc, poll::PollFlags};

use super::*;
use crate::{
    image::{ImageWriter, Kind, proto},
    res::file::{External, Inherited, descriptor, testing::Tree},
    sys::tty::{self, Question},
};

/// Serializes the tests that rely on a free index.
fn numbers() -> MutexGuard<'static, ()> {
    static NUMBERS: Mutex<()> = Mutex::new(());
    NUMBERS.lock().unwrap_or_else(PoisonError::into_inner)
}

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
    // CRIU 4.2 writes them like this; the numbers behind them are arbitrary.
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
    let _numbers = numbers();
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
    assert!(restore::controlling(restored.opened()).unwrap().is_empty());
    assert!(restore::inherited(restored.opened()).unwrap().is_none());
}

#[test]
fn a_slave_alone_takes_the_shell_job_option() {
    let _numbers = numbers();
    let (_elsewhere, slave) = pair();
    let mut tree = Tree::new();
    tree.add(1, slave.try_clone().unwrap());
    let error = tree.collect_error().to_string();
    assert!(error.contains("--shell-job") && error.contains("/dev/pts/"), "{error}");

    let mut tree = Tree::new();
    tree.options.terminals = Options::new(true);
    tree.add(1, slave);
    let mut dumped = tree.dump();
    dumped.options.terminals = Options::new(false);
    let error = dumped.restore_error().to_string();
    assert!(error.contains("--shell-job"), "{error}");
}

#[test]
fn an_external_terminal_is_given_by_who_restores() {
    let _numbers = numbers();
    let (_theirs, slave) = pair();
    let stat = nix::sys::stat::fstat(&slave).unwrap();
    let name = external_name(stat.st_rdev, stat.st_dev);
    let (other_master, ours) = pair();
    let mut tree = Tree::new();
    tree.options.external = External::new(vec![name.clone()]);
    tree.add(1, slave);
    let mut dumped = tree.dump();
    dumped.options.inherited = Inherited::new(vec![(ours.as_raw_fd(), name)]);
    let restored = dumped.restore();
    let given = nix::sys::stat::fstat(restored.get(1)).unwrap();
    assert_eq!(given.st_rdev, nix::sys::stat::fstat(&ours).unwrap().st_rdev);
    drop(other_master);
}

#[test]
fn a_slave_without_master_is_hung_up_again() {
    let _numbers = numbers();
    let (master, slave) = pair();
    drop(master);
    let mut tree = Tree::new();
    tree.add(1, slave);
    let restored = tree.restore();
    assert_eq!(tty::termios(restored.get(1), false), Err(Errno::EIO));
}

/// Opens masters until one has an index above `index`.
fn take_numbers(index: i32) -> Vec<OwnedFd> {
    let mut taken = Vec::new();
    loop {
        let (master, _) = pair();
        let number = tty::ask(master.as_fd(), Question::Index).unwrap();
        taken.push(master);
        if number > index {
            return taken;
        }
    }
}

#[test]
fn a_pair_takes_another_number_unless_somebody_relies_on_it() {
    let _numbers = numbers();
    for relied_on in [false, true] {
        let (master, slave) = pair();
        let index = tty::ask(master.as_fd(), Question::Index).unwrap();
        let mut tree = Tree::new();
        if relied_on {
            let path = format!("/dev/pts/{index}");
            let named = descriptor::open(path.as_bytes(), libc::O_PATH.cast_unsigned()).unwrap();
            tree.add(3, named);
        }
        tree.add(1, master);
        tree.add(2, slave);
        let dumped = tree.dump();
        let taken = take_numbers(index);
        if relied_on {
            let error = dumped.restore_error().to_string();
            assert!(error.contains("has taken the index"), "{error}");
            continue;
        }
        let restored = dumped.restore();
        let now = tty::ask(restored.get(1), Question::Index).unwrap();
        assert!(now > index, "{now} is not above {index}");
        for id in 1..=2 {
            assert_eq!(restored.flags(id), restored.before(id).flags);
        }
        File::from(restored.take(2)).write_all(b"words").unwrap();
        let mut found = [0; 5];
        File::from(restored.take(1)).read_exact(&mut found).unwrap();
        assert_eq!(&found, b"words");
        drop(taken);
    }
}

#[test]
fn a_slave_that_is_only_named_is_found() {
    let _numbers = numbers();
    let (master, slave) = pair();
    let index = tty::ask(master.as_fd(), Question::Index).unwrap();
    let path = format!("/dev/pts/{index}");
    let named = descriptor::open(path.as_bytes(), libc::O_PATH.cast_unsigned()).unwrap();
    let mut tree = Tree::new();
    tree.add(3, named);
    tree.add(1, master);
    drop(slave);
    let restored = tree.restore();
    assert_eq!(restored.link(3), path.as_bytes());
    assert_eq!(restored.flags(3), restored.before(3).flags);
}

#[test]
fn bytes_that_wait_are_not_dumped_and_stay_where_they_are() {
    let _numbers = numbers();
    for from_slave in [false, true] {
        let (master, slave) = pair();
        let (from, to) = if from_slave { (&slave, &master) } else { (&master, &slave) };
        File::from(from.try_clone().unwrap()).write_all(b"some\n").unwrap();
        let mut tree = Tree::new();
        tree.add(1, master.try_clone().unwrap());
        tree.add(2, slave.try_clone().unwrap());
        let error = tree.collect_error().to_string();
        assert!(error.contains("bytes are queued"), "{error}");
        let mut found = [0; 5];
        File::from(to.try_clone().unwrap()).read_exact(&mut found).unwrap();
        assert!(found.starts_with(b"some"), "{found:?}");
    }
}

/// CRIU dumps queued bytes.
#[test]
fn what_is_queued_in_images_is_queued_again() {
    let _numbers = numbers();
    let (master, slave) = pair();
    let index = tty::ask(master.as_fd(), Question::Index).unwrap().cast_unsigned();
    let modes = tty::termios(slave.as_fd(), false).unwrap();
    let mut tree = Tree::new();
    tree.add(1, master);
    tree.add(2, slave);
    let dumped = tree.dump();
    let path = dumped.images().join(Kind::TtyData.file_name(0));
    let file = BufWriter::new(File::create(&path).unwrap());
    let mut image = ImageWriter::new(&path, file, Kind::TtyData).unwrap();
    let output = b"on the screen\r\nand on";
    let input = b"typed\nand typed\n";
    for (tty_id, data) in [(index << 1 | 1, &output[..]), (index << 1, &input[..])] {
        image.message(&proto::TtyDataEntry { tty_id, data: data.to_owned() }).unwrap();
    }
    image.finish().unwrap();
    let restored = dumped.restore();
    let read = |id| {
        let fd = restored.take(id);
        descriptor::events(fd.as_fd()).unwrap();
        let mut found = vec![0; 100];
        let count = File::from(fd).read(&mut found).unwrap();
        found.truncate(count);
        found
    };
    // The terminal has echoed and translated nothing, and still delimits lines.
    assert_eq!(read(1), output);
    assert_eq!(read(2), b"typed\n");
    assert_eq!(read(2), b"and typed\n");
    assert_eq!(tty::termios(restored.get(2), false), Ok(modes));
    assert!(!descriptor::events(restored.get(1)).unwrap().contains(PollFlags::POLLIN));
}
