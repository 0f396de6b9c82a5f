use std::{
    fs::File,
    io::{BufWriter, Read, Write},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    sync::{Mutex, MutexGuard, PoisonError},
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, fcntl},
    libc,
    poll::PollFlags,
};

use super::*;
use crate::{
    image::{ImageWriter, Kind, proto},
    res::file::{External, Inherited, descriptor, testing::Tree},
    sys::tty::{self, Question, Termios},
};

/// Serializes the tests that rely on a free index.
fn numbers() -> MutexGuard<'static, ()> {
    static NUMBERS: Mutex<()> = Mutex::new(());
    NUMBERS.lock().unwrap_or_else(PoisonError::into_inner)
}

fn pair() -> (OwnedFd, OwnedFd) {
    let master = descriptor::open(
        &crate::sys::root::Root::own(),
        b"/dev/ptmx",
        libc::O_RDWR.cast_unsigned(),
    )
    .unwrap();
    tty::switch(master.as_fd(), tty::Switch::Locked, false).unwrap();
    let index = tty::ask(master.as_fd(), Question::Index).unwrap();
    let path = format!("/dev/pts/{index}");
    (
        master,
        descriptor::open(
            &crate::sys::root::Root::own(),
            path.as_bytes(),
            libc::O_RDWR.cast_unsigned(),
        )
        .unwrap(),
    )
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
    assert!(controlling::controlling(restored.opened(), true).unwrap().is_empty());
    assert!(controlling::inherited(restored.opened()).unwrap().is_none());
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
            let named = descriptor::open(
                &crate::sys::root::Root::own(),
                path.as_bytes(),
                libc::O_PATH.cast_unsigned(),
            )
            .unwrap();
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
    let named = descriptor::open(
        &crate::sys::root::Root::own(),
        path.as_bytes(),
        libc::O_PATH.cast_unsigned(),
    )
    .unwrap();
    let mut tree = Tree::new();
    tree.add(3, named);
    tree.add(1, master);
    drop(slave);
    let restored = tree.restore();
    assert_eq!(restored.link(3), path.as_bytes());
    assert_eq!(restored.flags(3), restored.before(3).flags);
}

/// The bytes that both ends can read: the result of each read, and last the line being typed.
fn read_all(master: BorrowedFd, slave: BorrowedFd) -> (Vec<u8>, Vec<Vec<u8>>) {
    let reads = |fd: BorrowedFd| {
        let mut found = Vec::new();
        while descriptor::events(fd).unwrap().contains(PollFlags::POLLIN) {
            let mut bytes = vec![0; 8192];
            let count = nix::unistd::read(fd, &mut bytes).unwrap();
            bytes.truncate(count);
            found.push(bytes);
        }
        found
    };
    let output = reads(master).concat();
    let mut input = reads(slave);
    let mut modes = tty::termios(slave, false).unwrap();
    modes.local &= !CANONICAL;
    tty::set_termios(slave, false, &modes).unwrap();
    input.extend(reads(slave));
    (output, input)
}

fn write(fd: &OwnedFd, bytes: &[u8]) {
    File::from(fd.try_clone().unwrap()).write_all(bytes).unwrap();
}

/// `ICANON` and `ECHO`.
const CANONICAL: u32 = 0x2;
const ECHO: u32 = 0x8;

/// Queues bytes in a pair, dumps it, and returns what is read there and in the restored pair.
#[expect(clippy::type_complexity, reason = "both ends, twice")]
fn kept(
    local: u32,
    fill: impl Fn(&OwnedFd, &OwnedFd),
) -> [(Termios, u32, (Vec<u8>, Vec<Vec<u8>>)); 2] {
    let (master, slave) = pair();
    let mut modes = tty::termios(slave.as_fd(), false).unwrap();
    modes.local = modes.local & !(CANONICAL | ECHO) | local;
    modes.characters[libc::VEOL] = b'|';
    tty::set_termios(slave.as_fd(), false, &modes).unwrap();
    fill(&master, &slave);
    descriptor::events(slave.as_fd()).unwrap();
    let mut tree = Tree::new();
    tree.add(1, master.try_clone().unwrap());
    tree.add(2, slave.try_clone().unwrap());
    let restored = tree.restore();
    let state = |master: BorrowedFd, slave: BorrowedFd| {
        let modes = tty::termios(slave, false).unwrap();
        let flags = fcntl(master, FcntlArg::F_GETFL).unwrap().cast_unsigned();
        (modes, flags, read_all(master, slave))
    };
    let after = state(restored.get(1), restored.get(2));
    let before = state(master.as_fd(), slave.as_fd());
    assert_eq!(before.0, modes);
    [before, after]
}

fn lines(lines: &[&[u8]]) -> Vec<Vec<u8>> {
    lines.iter().map(|line| line.to_vec()).collect()
}

#[test]
fn lines_that_wait_are_kept_as_they_are_delimited() {
    let _numbers = numbers();
    // ^D after a word, ^D alone, and ^V before a newline and a tab.
    let typed = b"one\nwo\x04\x04e|\x16\nnd\nt\xc3\xbf\xff\xfe\x16\x09yp\x7fped";
    let [before, after] = kept(CANONICAL, |master, slave| {
        write(master, typed);
        write(slave, b"shown\n");
    });
    assert_eq!(before, after);
    let (output, input) = after.2;
    assert_eq!(output, b"shown\r\n");
    // Backspace has taken one p.
    let typing = b"t\xc3\xbf\xff\xfe\typed";
    assert_eq!(input, lines(&[b"one\n", b"wo", b"", b"e|", b"\nnd\n", typing]));
}

#[test]
fn raw_bytes_that_wait_are_kept() {
    let _numbers = numbers();
    let all: Vec<u8> = (0..=u8::MAX).cycle().take(3000).collect();
    let raw = |master: &OwnedFd, slave: &OwnedFd| {
        let mut modes = tty::termios(slave.as_fd(), false).unwrap();
        (modes.input, modes.output, modes.local) = (0, 0, 0);
        tty::set_termios(slave.as_fd(), false, &modes).unwrap();
        write(master, &all);
        write(slave, &all);
    };
    let (master, slave) = pair();
    raw(&master, &slave);
    let mut tree = Tree::new();
    tree.add(1, master.try_clone().unwrap());
    tree.add(2, slave.try_clone().unwrap());
    let restored = tree.restore();
    for (master, slave) in [(master.as_fd(), slave.as_fd()), (restored.get(1), restored.get(2))] {
        let (output, input) = read_all(master, slave);
        assert!(output == all && input.concat() == all);
    }
}

/// More than the line discipline holds: the rest waits in the driver.
#[test]
fn a_full_pair_is_kept() {
    let _numbers = numbers();
    let fill = |fd: &OwnedFd| {
        let flags = fcntl(fd, FcntlArg::F_GETFL).unwrap().cast_unsigned();
        descriptor::set_status(fd.as_fd(), flags | libc::O_NONBLOCK.cast_unsigned()).unwrap();
        let (mut count, mut left) = (0, 1000);
        while left > 0 {
            match nix::unistd::write(fd, &[b'a' + u8::try_from(count % 26).unwrap(); 100]) {
                Ok(more) => count += more,
                // The kernel may be about to take some over.
                Err(_) => left -= 1,
            }
            descriptor::events(fd.as_fd()).unwrap();
        }
        descriptor::set_status(fd.as_fd(), flags).unwrap();
        count
    };
    let counts = Mutex::new((0, 0));
    let [before, after] = kept(0, |master, slave| {
        *counts.lock().unwrap() = (fill(master), fill(slave));
    });
    let (typed, shown) = *counts.lock().unwrap();
    assert!(typed > 10_000 && shown > 10_000, "{typed} {shown}");
    assert_eq!((before.2.0.len(), before.2.1.concat().len()), (shown, typed));
    assert!(before.2.0 == after.2.0 && before.2.1.concat() == after.2.1.concat());
    assert_eq!((before.0, before.1), (after.0, after.1));
}

#[test]
fn a_pair_in_packet_mode_keeps_its_bytes_and_no_status() {
    let _numbers = numbers();
    let (master, slave) = pair();
    tty::switch(master.as_fd(), tty::Switch::Packet, true).unwrap();
    write(&slave, b"shown");
    write(&master, b"half a line");
    let mut tree = Tree::new();
    tree.add(1, master.try_clone().unwrap());
    tree.add(2, slave.try_clone().unwrap());
    let restored = tree.restore();
    for (master, slave) in [(master.as_fd(), slave.as_fd()), (restored.get(1), restored.get(2))] {
        let (output, input) = read_all(master, slave);
        // Each read begins with a byte that stands for data.
        assert_eq!(output, b"\0shownhalf a line");
        assert_eq!(input, lines(&[b"half a line"]));
    }
}

#[test]
fn a_status_that_waits_is_refused() {
    let _numbers = numbers();
    let (master, slave) = pair();
    tty::switch(master.as_fd(), tty::Switch::Packet, true).unwrap();
    tty::flow(slave.as_fd(), tty::Flow::Stop).unwrap();
    let mut tree = Tree::new();
    tree.add(1, master.try_clone().unwrap());
    tree.add(2, slave);
    let error = tree.collect_error().to_string();
    assert!(error.contains("in packet mode, with a status"), "{error}");
    let mut status = [0; 10];
    // `TIOCPKT_STOP` (`include/uapi/asm-generic/ioctls.h`).
    assert_eq!((nix::unistd::read(&master, &mut status), status[0]), (Ok(1), 4));
}

#[test]
fn another_line_discipline_is_refused() {
    let _numbers = numbers();
    let (_master, slave) = pair();
    // The only other one that every kernel has (`N_NULL`, `include/uapi/linux/tty.h`).
    let discipline = 27;
    if tty::set_discipline(slave.as_fd(), discipline).is_err() {
        return;
    }
    let mut tree = Tree::new();
    tree.options.terminals = Options::new(true);
    tree.add(1, slave);
    let error = tree.collect_error().to_string();
    assert!(error.contains("with the line discipline 27"), "{error}");
}

#[test]
fn stopped_output_stays_stopped() {
    let _numbers = numbers();
    let writable = |fd: BorrowedFd| descriptor::events(fd).unwrap().contains(PollFlags::POLLOUT);
    for by_program in [false, true] {
        let (master, slave) = pair();
        write(&master, b"typed");
        drop(read_output(master.as_fd()));
        if by_program {
            tty::flow(slave.as_fd(), tty::Flow::Stop).unwrap();
        } else {
            write(&master, b"\x13");
        }
        descriptor::events(slave.as_fd()).unwrap();
        let mut tree = Tree::new();
        tree.add(1, master.try_clone().unwrap());
        tree.add(2, slave.try_clone().unwrap());
        let restored = tree.restore();
        for (master, slave) in [(master.as_fd(), slave.as_fd()), (restored.get(1), restored.get(2))]
        {
            assert!(!writable(slave), "the output is not stopped");
            tty::flow(slave, tty::Flow::Start).unwrap();
            assert_eq!(writable(slave), by_program, "after tcflow(3)");
            write(&master.try_clone_to_owned().unwrap(), b"\x11");
            descriptor::events(slave).unwrap();
            assert!(writable(slave), "after ^Q");
            let (_, input) = read_all(master, slave);
            assert_eq!(input, lines(&[b"typed"]));
        }
    }
}

fn read_output(master: BorrowedFd) -> Vec<u8> {
    let mut bytes = vec![0; 100];
    descriptor::events(master).unwrap();
    let count = nix::unistd::read(master, &mut bytes).unwrap();
    bytes.truncate(count);
    bytes
}

#[test]
fn bytes_that_cannot_be_kept_are_refused_and_stay() {
    let _numbers = numbers();
    // The output of the terminal was stopped afterwards.
    let (master, slave) = pair();
    write(&slave, b"shown");
    tty::flow(slave.as_fd(), tty::Flow::Stop).unwrap();
    let mut tree = Tree::new();
    tree.add(1, master.try_clone().unwrap());
    tree.add(2, slave.try_clone().unwrap());
    let error = tree.collect_error().to_string();
    assert!(error.contains("5 bytes are queued, and whose output is stopped"), "{error}");
    assert_eq!(read_output(master.as_fd()), b"shown");
    // No process has opened the slave.
    let other = descriptor::open(
        &crate::sys::root::Root::own(),
        b"/dev/ptmx",
        libc::O_RDWR.cast_unsigned(),
    )
    .unwrap();
    write(&other, b"typed");
    while !descriptor::events(other.as_fd()).unwrap().contains(PollFlags::POLLIN) {
        // The kernel echoes it in its own time.
        std::thread::yield_now();
    }
    let mut tree = Tree::new();
    tree.add(1, other.try_clone().unwrap());
    let error = tree.collect_error().to_string();
    assert!(error.contains("5 bytes are queued, and whose other end no process"), "{error}");
    assert!(!descriptor::events(other.as_fd()).unwrap().contains(PollFlags::POLLHUP));
    // The terminal sends signals.
    let (master, slave) = pair();
    write(&slave, b"shown");
    let flags = OFlag::O_ASYNC | OFlag::O_RDWR;
    fcntl(&slave, FcntlArg::F_SETFL(flags)).unwrap();
    let mut tree = Tree::new();
    tree.add(1, master);
    tree.add(2, slave);
    let error = tree.collect_error().to_string();
    assert!(error.contains("5 bytes are queued, and which sends signals"), "{error}");
}

/// Programs have written before they closed the slave.
#[test]
fn output_of_a_slave_that_was_closed_is_kept() {
    let _numbers = numbers();
    let (master, slave) = pair();
    write(&slave, b"last words");
    drop(slave);
    let mut tree = Tree::new();
    tree.add(1, master.try_clone().unwrap());
    let restored = tree.restore();
    for master in [master.as_fd(), restored.get(1)] {
        assert!(descriptor::events(master).unwrap().contains(PollFlags::POLLHUP));
        assert_eq!(read_output(master), b"last words");
        assert_eq!(nix::unistd::read(master, &mut [0; 10]), Err(Errno::EIO));
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
        let entry = proto::TtyDataEntry { tty_id, data: data.to_owned(), ..Default::default() };
        image.message(&entry).unwrap();
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
