//! Pipes and FIFOs, and their contents.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fs::File,
    io::{self, Read, Write},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, tee},
    libc,
    poll::PollFlags,
    unistd::pipe2,
};

use super::{
    Collector, Description, External, FileError, FileKind, Intake, Opened, Opener, Result, Usage,
    descriptor, error::errno, owner, path,
};
use crate::{
    image::{
        Kind, SnapshotWriter,
        proto::{self, FdTypes},
    },
    sys::fds,
    units::PAGE_SIZE,
};

pub(super) const KIND: FileKind = FileKind {
    name: "pipe",
    types: &[FdTypes::Pipe],
    usage: Usage::Descriptor,
    collector: |options| Box::new(Pipes::new(Kind::PipesData, &options.external)),
    opener: |_| Box::new(PipeOpener),
};

pub(super) const FIFO: FileKind = FileKind {
    name: "FIFO",
    types: &[FdTypes::Fifo],
    usage: Usage::Descriptor,
    collector: |options| Box::new(Pipes::new(Kind::FifoData, &options.external)),
    opener: |_| Box::new(FifoOpener),
};

/// The prefix of links to pipes.
const PREFIX: &[u8] = b"pipe:[";
/// The buffer size for reading a pipe; no packet exceeds one page.
const READ_BYTES: usize = 1 << 20;
const _: () = assert!(READ_BYTES as u64 >= PAGE_SIZE);

/// A pipe whose contents the dump reads at the end.
struct PipeToRead {
    /// A description of it, a readable one if possible.
    file: OwnedFd,
    readable: bool,
    packets: bool,
    /// Builds an error that names the description.
    error: Box<dyn Fn(&'static str, Errno) -> FileError>,
}

/// Dumps pipes or FIFOs, depending on the image of their contents.
struct Pipes {
    data: Kind,
    external: External,
    sources: BTreeMap<u32, PipeToRead>,
    fifos: HashMap<(u64, u64), u32>,
}

impl Pipes {
    fn new(data: Kind, external: &External) -> Self {
        let (sources, fifos) = (BTreeMap::new(), HashMap::new());
        Self { data, external: external.clone(), sources, fifos }
    }

    /// Returns a number for a FIFO: its inode number, as for a pipe, unless another file system
    /// has used that number, or it exceeds 32 bits.
    fn fifo_id(&mut self, file: &Description) -> u32 {
        let taken: HashSet<u32> = self.fifos.values().copied().collect();
        let key = (file.stat.st_dev, file.stat.st_ino);
        *self.fifos.entry(key).or_insert_with(|| {
            let first = u32::try_from(file.stat.st_ino).unwrap_or(1);
            let free = (first..=u32::MAX).chain(1..first).find(|id| !taken.contains(id));
            free.expect("there are fewer FIFOs than numbers")
        })
    }

    /// Remembers a pipe whose contents the dump needs.
    fn note(&mut self, pipe_id: u32, file: &Description) -> Result<()> {
        let readable = file.flags.cast_signed() & libc::O_ACCMODE != libc::O_WRONLY;
        let packets = file.flags.cast_signed() & libc::O_DIRECT != 0;
        if let Some(known) = self.sources.get_mut(&pipe_id) {
            known.packets |= packets;
            if known.readable || !readable {
                return Ok(());
            }
        }
        let duplicate = file.fd.try_clone();
        let duplicate = duplicate.map_err(|_| file.failed("duplicate")(Errno::EMFILE))?;
        let (pid, fd, link) =
            (file.pid, file.number, String::from_utf8_lossy(&file.link).into_owned());
        let error = Box::new(move |step, source| FileError::Dump {
            pid,
            fd,
            link: link.clone(),
            step,
            source,
        });
        let packets = packets || self.sources.get(&pipe_id).is_some_and(|known| known.packets);
        self.sources.insert(pipe_id, PipeToRead { file: duplicate, readable, packets, error });
        Ok(())
    }
}

/// Returns the number that a pipe has in images.
fn pipe_id(file: &Description) -> Result<u32> {
    u32::try_from(file.stat.st_ino).map_err(|_| {
        let what = format!("a pipe with the large inode number {}", file.stat.st_ino);
        file.unsupported(what, "images store it in 32 bits")
    })
}

impl Collector for Pipes {
    fn claims(&self, file: &Description) -> bool {
        let anonymous = file.link.starts_with(PREFIX);
        file.is_type(libc::S_IFIFO) && anonymous == (self.data == Kind::PipesData)
    }

    fn collect(&mut self, file: &Description, intake: &mut dyn Intake) -> Result<proto::FileEntry> {
        let mut entry = proto::FileEntry { id: file.id, ..Default::default() };
        let name = String::from_utf8_lossy(&file.link).into_owned();
        if self.data == Kind::PipesData {
            let pipe_id = pipe_id(file)?;
            entry.set_type(FdTypes::Pipe);
            entry.pipe = Some(proto::PipeEntry {
                id: file.id,
                pipe_id,
                flags: file.status(),
                fown: file.fown,
            });
            if !self.external.contains(&name) {
                self.note(pipe_id, file)?;
            }
            return Ok(entry);
        }
        let pipe_id = self.fifo_id(file);
        let path = intake.new_id();
        let file_entry = path::entry_with_id(file, path, intake)?;
        intake.push(file_entry);
        entry.set_type(FdTypes::Fifo);
        entry.fifo = Some(proto::FifoEntry {
            id: file.id,
            pipe_id,
            regf_id: Some(path),
            rcriu_no_hangup: has_no_hangup(file)?.then_some(true),
        });
        self.note(pipe_id, file)?;
        Ok(entry)
    }

    fn finish(&mut self, images: &SnapshotWriter) -> Result<()> {
        if self.sources.is_empty() {
            return Ok(());
        }
        let mut image = images.create(self.data, 0)?;
        for (pipe_id, source) in &self.sources {
            let failed = |step| move |errno| (source.error)(step, errno);
            let size = fcntl(&source.file, FcntlArg::F_GETPIPE_SZ)
                .map_err(failed("read the size of"))?
                .cast_unsigned();
            let mut packets = contents(source, size).map_err(failed("read the contents of"))?;
            if packets.is_empty() {
                packets.push(Vec::new());
            }
            for bytes in packets {
                let length = u32::try_from(bytes.len()).expect("at most the size of the pipe");
                image.message(&proto::PipeDataEntry {
                    pipe_id: *pipe_id,
                    bytes: length,
                    size: Some(size),
                })?;
                image.raw(&bytes)?;
            }
        }
        image.finish()?;
        Ok(())
    }
}

/// Whether a reader of a FIFO sees no hangup: either it has a writer, or none has connected since
/// it was opened.
fn has_no_hangup(file: &Description) -> Result<bool> {
    let flags = file.flags.cast_signed();
    if flags & libc::O_ACCMODE != libc::O_RDONLY {
        return Ok(false);
    }
    let events = descriptor::events(file.fd.as_fd()).map_err(file.failed("poll"))?;
    Ok(!events.contains(PollFlags::POLLHUP))
}

/// Returns the contents of a pipe without consuming them: packet by packet if there are packets,
/// otherwise in one piece. Packets stay packets when their writer has left packet mode.
///
/// The format allows one piece for each pipe. A list of several is rcriu's extension.
fn contents(source: &PipeToRead, size: u32) -> nix::Result<Vec<Vec<u8>>> {
    // Either end reports the size. Opening the pipe again could wake processes, so check first.
    if fds::readable_bytes(source.file.as_fd())? == 0 {
        return Ok(Vec::new());
    }
    let reopened;
    let file: BorrowedFd = if source.readable {
        source.file.as_fd()
    } else {
        reopened = descriptor::reopen(source.file.as_fd(), libc::O_NONBLOCK.cast_unsigned())?;
        reopened.as_fd()
    };
    // tee(2) shares the pages between both pipes, and keeps the packet boundaries.
    let (read, write) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
    fcntl(&write, FcntlArg::F_SETPIPE_SZ(size.cast_signed()))?;
    match tee(file, &write, size as usize, SpliceFFlags::SPLICE_F_NONBLOCK) {
        Err(Errno::EAGAIN) => return Ok(Vec::new()),
        result => drop(result?),
    }
    drop(write);
    let mut read = File::from(read);
    let mut packets: Vec<Vec<u8>> = Vec::new();
    let mut buffer = vec![0; READ_BYTES];
    let mut is_filled = false;
    loop {
        match read.read(&mut buffer) {
            Ok(0) => return Ok(packets),
            Ok(bytes) => {
                // A read ends before the buffer is full only after a packet, or at the end.
                match packets.last_mut().filter(|_| is_filled && !source.packets) {
                    Some(piece) => piece.extend_from_slice(&buffer[..bytes]),
                    None => packets.push(buffer[..bytes].to_vec()),
                }
                is_filled = bytes == buffer.len();
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(errno(&error)),
        }
    }
}

/// The contents of a pipe in the images.
#[derive(Default)]
struct PipeContents {
    size: Option<u32>,
    packets: Vec<Vec<u8>>,
}

/// Reads the contents of all pipes.
fn read_contents(opened: &Opened, kind: Kind) -> Result<HashMap<u32, PipeContents>> {
    let mut image = match opened.images.image(kind, 0) {
        Err(error) if error.is_missing() => return Ok(HashMap::new()),
        result => result?,
    };
    let mut found: HashMap<u32, PipeContents> = HashMap::new();
    while let Some(entry) = image.next_message::<proto::PipeDataEntry>()? {
        let mut bytes = Vec::new();
        image.append(entry.bytes.into(), "contents of a pipe", &mut bytes)?;
        let contents = found.entry(entry.pipe_id).or_default();
        contents.size = entry.size.or(contents.size);
        if !bytes.is_empty() {
            contents.packets.push(bytes);
        }
    }
    Ok(found)
}

/// Sets the size of a pipe and writes its contents. `write` is a writable description.
fn fill(write: BorrowedFd, contents: &PipeContents, packets: bool) -> nix::Result<()> {
    if let Some(size) = contents.size {
        let size = size.cast_signed();
        if fcntl(write, FcntlArg::F_GETPIPE_SZ)? != size {
            fcntl(write, FcntlArg::F_SETPIPE_SZ(size))?;
        }
    }
    let direct = if packets || contents.packets.len() > 1 { libc::O_DIRECT } else { 0 };
    let flags = (libc::O_WRONLY | libc::O_NONBLOCK | direct).cast_unsigned();
    let mut file = File::from(open_end(write, flags)?);
    for packet in &contents.packets {
        file.write_all(packet).map_err(|error| errno(&error))?;
    }
    Ok(())
}

/// Opens a new description of a pipe. Packet mode can only be set afterwards.
fn open_end(fd: BorrowedFd, flags: u32) -> nix::Result<OwnedFd> {
    let end = descriptor::reopen(fd, flags & !libc::O_DIRECT.cast_unsigned())?;
    descriptor::set_status(end.as_fd(), flags)?;
    Ok(end)
}

/// Whether `pipe(2)` created the description, rather than opening a path.
fn is_original(flags: u32) -> bool {
    flags & descriptor::LARGE_FILE == 0
}

struct PipeOpener;

impl Opener for PipeOpener {
    fn open(&mut self, entries: &[proto::FileEntry], opened: &mut Opened) -> Result<()> {
        if entries.is_empty() {
            return Ok(());
        }
        let contents = read_contents(opened, Kind::PipesData)?;
        let mut pipes: BTreeMap<u32, Vec<&proto::PipeEntry>> = BTreeMap::new();
        for entry in entries {
            let missing = || FileError::image(entry.id, "it is a pipe, but its entry is missing");
            let pipe = entry.pipe.as_ref().ok_or_else(missing)?;
            pipes.entry(pipe.pipe_id).or_default().push(pipe);
        }
        for (pipe_id, ends) in pipes {
            open_pipe(pipe_id, &ends, contents.get(&pipe_id), opened)?;
        }
        Ok(())
    }
}

fn open_pipe(
    pipe_id: u32,
    ends: &[&proto::PipeEntry],
    contents: Option<&PipeContents>,
    opened: &mut Opened,
) -> Result<()> {
    let name = format!("pipe:[{pipe_id}]");
    let id = ends[0].id;
    let failed = |id, step| FileError::restore(id, step, &name);
    let given = opened.inherited.duplicate(name.as_bytes());
    if let Some(given) = given.map_err(failed(id, "inherit"))? {
        for end in ends {
            let fd =
                open_end(given.as_fd(), end.flags).map_err(failed(end.id, "open the inherited"))?;
            opened.insert(end.id, fd);
        }
        return Ok(());
    }
    let (read, write) = pipe2(OFlag::O_CLOEXEC).map_err(failed(id, "create"))?;
    if let Some(contents) = contents {
        let packets = ends.iter().any(|end| end.flags.cast_signed() & libc::O_DIRECT != 0);
        fill(write.as_fd(), contents, packets).map_err(failed(id, "fill"))?;
    }
    owner::restore(id, &read, opened)?;
    let (mut unused_read, mut unused_write) = (Some(&read), Some(&write));
    for end in ends {
        let original = match end.flags.cast_signed() & libc::O_ACCMODE {
            libc::O_RDONLY if is_original(end.flags) => unused_read.take(),
            libc::O_WRONLY if is_original(end.flags) => unused_write.take(),
            _ => None,
        };
        let fd = match original {
            Some(original) => original
                .try_clone()
                .map_err(|error| errno(&error))
                .and_then(|fd| descriptor::set_status(fd.as_fd(), end.flags).map(|()| fd)),
            None => open_end(read.as_fd(), end.flags),
        };
        let fd = fd.map_err(failed(end.id, "open"))?;
        opened.insert(end.id, fd);
    }
    Ok(())
}

struct FifoOpener;

impl Opener for FifoOpener {
    fn open(&mut self, entries: &[proto::FileEntry], opened: &mut Opened) -> Result<()> {
        if entries.is_empty() {
            return Ok(());
        }
        let contents = read_contents(opened, Kind::FifoData)?;
        let mut fifos: BTreeMap<u32, Vec<FifoEnd>> = BTreeMap::new();
        for entry in entries {
            let missing = || FileError::image(entry.id, "it is a FIFO, but its entry is missing");
            let fifo = entry.fifo.as_ref().ok_or_else(missing)?;
            let path_id = fifo.regf_id.unwrap_or(entry.id);
            let path = opened.entries.get(&path_id).and_then(|entry| entry.reg.clone());
            let path = path.ok_or_else(|| {
                FileError::image(entry.id, "it is a FIFO, but its path is missing")
            })?;
            let no_hangup = fifo.rcriu_no_hangup();
            fifos.entry(fifo.pipe_id).or_default().push(FifoEnd { id: entry.id, path, no_hangup });
        }
        for (pipe_id, ends) in fifos {
            open_fifo(&ends, contents.get(&pipe_id), opened)?;
        }
        Ok(())
    }
}

/// A description of a FIFO in the images.
struct FifoEnd {
    id: u32,
    path: proto::RegFileEntry,
    no_hangup: bool,
}

impl FifoEnd {
    fn access(&self) -> i32 {
        self.path.flags.cast_signed() & libc::O_ACCMODE
    }

    fn open(&self, opened: &mut Opened) -> Result<()> {
        // Do not wait for the other end.
        let flags = self.path.flags.cast_signed() & !libc::O_DIRECT | libc::O_NONBLOCK;
        let fd = path::open_entry(&self.path, flags, opened)?;
        let failed = FileError::restore(self.id, "open the FIFO", &self.path.name);
        descriptor::set_status(fd.as_fd(), self.path.flags).map_err(failed)?;
        opened.insert(self.id, fd);
        Ok(())
    }
}

/// Opens all descriptions of a FIFO. Readers that must see no hangup come last, when all writers
/// have gone, unless the FIFO keeps a writer.
fn open_fifo(ends: &[FifoEnd], contents: Option<&PipeContents>, opened: &mut Opened) -> Result<()> {
    let first = &ends[0];
    let failed = |step| FileError::restore(first.id, step, &first.path.name);
    // Opening and filling need both ends, so hold them open.
    let both = path::open_entry(&first.path, libc::O_RDWR, opened)?;
    if let Some(contents) = contents
        // If it has contents, a process outside the tree has kept the FIFO open.
        && fds::readable_bytes(both.as_fd()) == Ok(0)
    {
        let packets = ends.iter().any(|end| end.path.flags.cast_signed() & libc::O_DIRECT != 0);
        fill(both.as_fd(), contents, packets).map_err(failed("fill the FIFO"))?;
    }
    let has_writer = ends.iter().any(|end| end.access() != libc::O_RDONLY);
    let (last, before): (Vec<_>, Vec<_>) =
        ends.iter().partition(|end| end.no_hangup && !has_writer);
    for end in before {
        end.open(opened)?;
    }
    // The FIFO keeps its contents while it is open.
    let held = path::open_entry(&first.path, libc::O_RDONLY | libc::O_NONBLOCK, opened)?;
    drop(both);
    for end in last {
        end.open(opened)?;
    }
    drop(held);
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use nix::{sys::stat::Mode, unistd::mkfifo};

    use super::*;
    use crate::res::file::{
        Inherited,
        testing::{Tree, stat},
    };

    fn drain(fd: OwnedFd) -> Vec<Vec<u8>> {
        descriptor::set_status(fd.as_fd(), libc::O_NONBLOCK.cast_unsigned()).unwrap();
        let mut file = File::from(fd);
        let mut buffer = vec![0; 1 << 20];
        let mut packets = Vec::new();
        while let Ok(bytes @ 1..) = file.read(&mut buffer) {
            packets.push(buffer[..bytes].to_vec());
        }
        packets
    }

    #[test]
    fn pipes_keep_contents_size_and_flags() {
        let mut tree = Tree::new();
        let (read, write) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).unwrap();
        fcntl(&write, FcntlArg::F_SETPIPE_SZ(1 << 18)).unwrap();
        let bytes: Vec<u8> = (0..200_000_u32).map(|n| (n % 251) as u8).collect();
        File::from(write.try_clone().unwrap()).write_all(&bytes).unwrap();
        let both = descriptor::reopen(read.as_fd(), libc::O_RDWR.cast_unsigned()).unwrap();
        tree.add(1, read.try_clone().unwrap());
        tree.add(2, write);
        tree.add(3, both);
        // One whose reader is elsewhere.
        let (_elsewhere, lonely) = pipe2(OFlag::O_CLOEXEC).unwrap();
        File::from(lonely.try_clone().unwrap()).write_all(b"left").unwrap();
        tree.add(4, lonely);
        let restored = tree.restore();
        // Dumping has taken nothing out.
        assert_eq!(drain(read).concat(), bytes);
        for id in 1..=4 {
            assert_eq!(restored.flags(id), restored.before(id).flags, "{id}");
        }
        assert_eq!(fcntl(restored.get(2), FcntlArg::F_GETPIPE_SZ).unwrap(), 1 << 18);
        assert_eq!(stat(&restored.get(1)).st_ino, stat(&restored.get(3)).st_ino);
        let again = descriptor::reopen(restored.get(4).as_fd(), 0o4000).unwrap();
        assert_eq!(drain(again).concat(), b"left");
        assert_eq!(drain(restored.take(1)).concat(), bytes);
    }

    #[test]
    fn packets_stay_apart() {
        let mut tree = Tree::new();
        let (read, write) = pipe2(OFlag::O_CLOEXEC | OFlag::O_DIRECT).unwrap();
        let mut writer = File::from(write.try_clone().unwrap());
        let sent: [&[u8]; 3] = [b"one", b"the second", &[7; 4096]];
        for packet in sent {
            writer.write_all(packet).unwrap();
        }
        tree.add(1, read);
        tree.add(2, write);
        drop(writer);
        let restored = tree.restore();
        assert_eq!(restored.flags(2), restored.before(2).flags);
        assert_eq!(drain(restored.take(1)), sent);
    }

    #[test]
    fn packets_of_a_writer_that_has_left_packet_mode_stay_apart() {
        let mut tree = Tree::new();
        let (read, write) = pipe2(OFlag::O_CLOEXEC | OFlag::O_DIRECT).unwrap();
        File::from(write.try_clone().unwrap()).write_all(b"one").unwrap();
        File::from(write.try_clone().unwrap()).write_all(b"two").unwrap();
        for end in [&read, &write] {
            descriptor::set_status(end.as_fd(), 0).unwrap();
        }
        tree.add(1, read);
        tree.add(2, write);
        // As much as a read takes.
        let (read, write) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).unwrap();
        fcntl(&write, FcntlArg::F_SETPIPE_SZ(1 << 20)).unwrap();
        let bytes = vec![7; READ_BYTES];
        File::from(write).write_all(&bytes).unwrap();
        tree.add(3, read);
        let restored = tree.restore();
        assert_eq!(restored.flags(2), restored.before(2).flags);
        assert_eq!(drain(restored.take(1)), [b"one", b"two"]);
        assert_eq!(drain(restored.take(3)).concat(), bytes);
    }

    #[test]
    fn an_inherited_pipe_takes_the_place() {
        let mut tree = Tree::new();
        let (_read, write) = pipe2(OFlag::O_CLOEXEC).unwrap();
        let name = format!("pipe:[{}]", stat(&write.as_fd()).st_ino);
        tree.add(1, write);
        let (theirs, ours) = pipe2(OFlag::O_CLOEXEC).unwrap();
        tree.inherited = Inherited::new(vec![(ours.as_raw_fd(), name)]);
        let restored = tree.restore();
        assert_eq!(stat(&restored.get(1)).st_ino, stat(&theirs.as_fd()).st_ino);
    }

    #[test]
    fn fifos_are_opened_by_path_with_their_contents() {
        let dir = tempfile::tempdir().unwrap();
        let (kept, deleted) = (dir.path().join("kept"), dir.path().join("deleted"));
        let mut tree = Tree::new();
        for (id, path) in [(1, &kept), (3, &deleted)] {
            mkfifo(path, Mode::S_IRWXU).unwrap();
            let path = path.to_str().unwrap().as_bytes();
            let both = descriptor::open(
                &crate::sys::root::Root::own(),
                path,
                libc::O_RDWR.cast_unsigned(),
            )
            .unwrap();
            File::from(both.try_clone().unwrap()).write_all(b"in the FIFO").unwrap();
            let read = descriptor::open(&crate::sys::root::Root::own(), path, 0).unwrap();
            descriptor::set_status(both.as_fd(), libc::O_DIRECT.cast_unsigned()).unwrap();
            tree.add(id, read);
            tree.add(id + 1, both);
        }
        std::fs::remove_file(&deleted).unwrap();
        let restored = tree.restore();
        for id in 1..=4 {
            assert_eq!(restored.flags(id), restored.before(id).flags);
            assert_eq!(restored.link(id), restored.before(id).link);
        }
        assert_eq!(drain(restored.take(1)).concat(), b"in the FIFO");
        assert_eq!(drain(restored.take(3)).concat(), b"in the FIFO");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
