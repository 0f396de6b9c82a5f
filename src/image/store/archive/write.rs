//! Writing archives.
//!
//! The bytes of an archive depend only on its members: these belong to root, have fixed modes and
//! no user names. Files keep their holes, because a hole in a pages file may be a freed page.
//! Sparse files have GNU tar's pax format 1.0, which all current tar programs read, including Go's
//! library.

use std::{
    fmt,
    fs::{self, File},
    io::{self, BufWriter, Write},
    ops::Range,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use flate2::{Compression, write::GzEncoder};
use nix::{
    errno::Errno,
    fcntl::{AT_FDCWD, Flock, FlockArg, OFlag, RenameFlags, renameat2},
};
use ruzstd::encoding::{CompressionLevel, compress_to_vec};
use tar::{Builder, EntryType, Header};

use super::{
    members::{BLOCK, BLOCK_BYTES},
    seekable::{WRITTEN_FRAME_BYTES, write_table},
};

/// Permissions of an archive, and of the files and directories in it: memory is secret.
const FILE_MODE: u32 = 0o600;
const FOLDER_MODE: u32 = 0o700;

/// Permissions of links, which have no effect.
const LINK_MODE: u32 = 0o777;

/// Bytes copied at a time.
const STEP_BYTES: usize = 1 << 20;

/// The compression of a new archive.
#[derive(Debug)]
enum Sink {
    Plain(BufWriter<File>),
    Gzip(GzEncoder<BufWriter<File>>),
    Zstd(Frames),
}

/// Frames of zstd with a table of them.
#[derive(Debug)]
struct Frames {
    output: BufWriter<File>,
    buffer: Vec<u8>,
    frames: Vec<(u32, u32)>,
}

impl Frames {
    fn write_frame(&mut self) -> io::Result<()> {
        let compressed = compress_to_vec(&self.buffer[..], CompressionLevel::Fastest);
        self.output.write_all(&compressed)?;
        let len = |bytes: &[u8]| u32::try_from(bytes.len()).expect("a frame is short");
        self.frames.push((len(&compressed), len(&self.buffer)));
        self.buffer.clear();
        Ok(())
    }
}

impl Write for Frames {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = bytes.len().min(WRITTEN_FRAME_BYTES - self.buffer.len());
        self.buffer.extend_from_slice(&bytes[..taken]);
        if self.buffer.len() == WRITTEN_FRAME_BYTES {
            self.write_frame()?;
        }
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Sink {
    /// Chooses the format by the name of the archive.
    fn new(file: File, name: &str) -> Option<Self> {
        let output = BufWriter::with_capacity(STEP_BYTES, file);
        let ends = |ends: [&str; 2]| ends.iter().any(|end| name.ends_with(end));
        if name.ends_with(".tar") {
            Some(Self::Plain(output))
        } else if ends([".tar.gz", ".tgz"]) {
            Some(Self::Gzip(GzEncoder::new(output, Compression::default())))
        } else if ends([".tar.zst", ".tzst"]) {
            Some(Self::Zstd(Frames { output, buffer: Vec::new(), frames: Vec::new() }))
        } else {
            None
        }
    }

    fn finish(self) -> io::Result<File> {
        let output = match self {
            Self::Plain(output) => output,
            Self::Gzip(encoder) => encoder.finish()?,
            Self::Zstd(mut frames) => {
                if !frames.buffer.is_empty() {
                    frames.write_frame()?;
                }
                write_table(&mut frames.output, &frames.frames)?;
                frames.output
            }
        };
        output.into_inner().map_err(io::IntoInnerError::into_error)
    }
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Plain(output) => output.write(bytes),
            Self::Gzip(output) => output.write(bytes),
            Self::Zstd(output) => output.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Why a member was not copied.
#[derive(Debug)]
pub enum CopyError<E> {
    /// Its bytes could not be read.
    Read(E),
    /// The archive could not be written.
    Write(io::Error),
}

/// An archive that is being written. It has a temporary name until it is complete, and is removed
/// if an error occurs before.
pub struct ArchiveWriter {
    tar: Option<Builder<Sink>>,
    path: PathBuf,
    unfinished: PathBuf,
    replace: bool,
    /// Prevents two processes from writing the same archive.
    _lock: Flock<File>,
}

impl ArchiveWriter {
    /// Starts the archive `path`, compressed according to its extension. An existing archive is an
    /// error, unless `replace` is set.
    ///
    /// # Errors
    /// A name with another extension; a failure to create the archive.
    pub fn create(path: &Path, replace: bool) -> io::Result<Self> {
        let invalid = |problem: &str| io::Error::new(io::ErrorKind::InvalidInput, problem);
        let name = path.file_name().and_then(|name| name.to_str());
        let name = name.ok_or_else(|| invalid("it is no name of an archive"))?;
        if !replace && path.symlink_metadata().is_ok() {
            let problem = "it exists\nhelp: -f replaces it";
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, problem));
        }
        let unfinished = path.with_file_name(format!(".{name}.unfinished"));
        let mut options = File::options();
        options.read(true).write(true).create(true).truncate(false).mode(FILE_MODE);
        let file = options.custom_flags(OFlag::O_NOFOLLOW.bits()).open(&unfinished)?;
        let lock = Flock::lock(file.try_clone()?, FlockArg::LockExclusiveNonblock);
        let lock = lock.map_err(|(_, errno)| match errno {
            Errno::EWOULDBLOCK => invalid("another process is writing it"),
            errno => errno.into(),
        })?;
        file.set_len(0)?;
        let Some(sink) = Sink::new(file, name) else {
            let _ = fs::remove_file(&unfinished);
            return Err(invalid("its name has to end in .tar, .tar.gz or .tar.zst"));
        };
        let path = path.to_owned();
        Ok(Self { tar: Some(Builder::new(sink)), path, unfinished, replace, _lock: lock })
    }

    fn tar(&mut self) -> &mut Builder<Sink> {
        self.tar.as_mut().expect("it is taken by commit alone")
    }

    /// Adds a directory.
    ///
    /// # Errors
    /// What keeps it from being written.
    pub fn folder(&mut self, name: &str, modified: SystemTime) -> io::Result<()> {
        let mut header = header(EntryType::Directory, FOLDER_MODE, modified);
        self.tar().append_data(&mut header, format!("{name}/"), io::empty())
    }

    /// Adds a symbolic link.
    ///
    /// # Errors
    /// What keeps it from being written.
    pub fn link(&mut self, name: &str, target: &str, modified: SystemTime) -> io::Result<()> {
        let mut header = header(EntryType::Symlink, LINK_MODE, modified);
        self.tar().append_link(&mut header, name, target)
    }

    /// Adds a file of `len` bytes. The ranges in `data` are stored, the others are holes. `read`
    /// fills a buffer from an offset.
    ///
    /// # Errors
    /// A failure of `read`; a failed write.
    pub fn file<E>(
        &mut self,
        name: &str,
        modified: SystemTime,
        len: u64,
        data: &[Range<u64>],
        mut read: impl FnMut(u64, &mut [u8]) -> Result<(), E>,
    ) -> Result<(), CopyError<E>> {
        let all = 0..len;
        let stored: u64 = data.iter().map(|range| range.end - range.start).sum();
        let (data, map) = if stored < len {
            self.begin_sparse(name, modified, len, data).map_err(CopyError::Write)?
        } else {
            let mut header = header(EntryType::Regular, FILE_MODE, modified);
            header.set_size(len);
            self.begin(&mut header, name).map_err(CopyError::Write)?;
            (std::slice::from_ref(&all), 0)
        };
        let mut written = map;
        let mut buffer = vec![0; STEP_BYTES];
        for range in data {
            let mut at = range.start;
            while at < range.end {
                let rest = usize::try_from(range.end - at).unwrap_or(usize::MAX);
                let piece = &mut buffer[..rest.min(STEP_BYTES)];
                read(at, piece).map_err(CopyError::Read)?;
                self.tar().get_mut().write_all(piece).map_err(CopyError::Write)?;
                at += piece.len() as u64;
                written += piece.len() as u64;
            }
        }
        self.pad(written).map_err(CopyError::Write)
    }

    /// Writes a header, and before it the name if that is too long for the header.
    fn begin(&mut self, header: &mut Header, name: &str) -> io::Result<()> {
        if header.set_path(name).is_err() {
            self.tar().append_pax_extensions([("path", name.as_bytes())])?;
            header.set_path("long-name")?;
        }
        header.set_cksum();
        self.tar().get_mut().write_all(header.as_bytes())
    }

    /// Writes the header and the map of a sparse file, and returns the length of the map.
    fn begin_sparse<'a>(
        &mut self,
        name: &str,
        modified: SystemTime,
        len: u64,
        data: &'a [Range<u64>],
    ) -> io::Result<(&'a [Range<u64>], u64)> {
        // An empty extent ends a hole at the end of the file.
        let end = data.last().is_none_or(|last| last.end < len).then_some(len..len);
        let extents = data.len() + usize::from(end.is_some());
        let mut map = format!("{extents}\n");
        for range in data.iter().chain(&end) {
            map += &format!("{}\n{}\n", range.start, range.end - range.start);
        }
        let mut map = map.into_bytes();
        map.resize(map.len().next_multiple_of(BLOCK_BYTES), 0);
        let stored: u64 = data.iter().map(|range| range.end - range.start).sum();
        let real_size = len.to_string();
        let size = map.len() as u64 + stored;
        let size_text = size.to_string();
        self.tar().append_pax_extensions([
            ("GNU.sparse.major", &b"1"[..]),
            ("GNU.sparse.minor", b"0"),
            ("GNU.sparse.name", name.as_bytes()),
            ("GNU.sparse.realsize", real_size.as_bytes()),
            ("size", size_text.as_bytes()),
        ])?;
        let mut header = header(EntryType::Regular, FILE_MODE, modified);
        header.set_size(size);
        if header.set_path(name).is_err() {
            header.set_path("long-name")?;
        }
        header.set_cksum();
        let tar = self.tar().get_mut();
        tar.write_all(header.as_bytes())?;
        tar.write_all(&map)?;
        Ok((data, map.len() as u64))
    }

    fn pad(&mut self, written: u64) -> io::Result<()> {
        let padding = written.next_multiple_of(BLOCK) - written;
        let padding = usize::try_from(padding).expect("less than a block");
        self.tar().get_mut().write_all(&[0; BLOCK_BYTES][..padding])
    }

    /// Syncs the archive and gives it its name.
    ///
    /// # Errors
    /// A failed write; an archive of that name that has been made meanwhile.
    pub fn commit(mut self) -> io::Result<()> {
        let sink = self.tar.take().expect("taken once").into_inner()?;
        sink.finish()?.sync_all()?;
        let renamed = if self.replace {
            fs::rename(&self.unfinished, &self.path)
        } else {
            let flags = RenameFlags::RENAME_NOREPLACE;
            match renameat2(AT_FDCWD, &self.unfinished, AT_FDCWD, &self.path, flags) {
                // The file system does not support the flag.
                Err(Errno::EINVAL | Errno::ENOSYS) => fs::rename(&self.unfinished, &self.path),
                renamed => Ok(renamed?),
            }
        };
        renamed?;
        let above = self.path.parent().filter(|above| !above.as_os_str().is_empty());
        File::open(above.unwrap_or(Path::new(".")))?.sync_all()?;
        // Nothing is left to remove.
        self.unfinished = PathBuf::new();
        Ok(())
    }
}

impl fmt::Debug for ArchiveWriter {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("ArchiveWriter").field("path", &self.path).finish_non_exhaustive()
    }
}

impl Drop for ArchiveWriter {
    fn drop(&mut self) {
        if !self.unfinished.as_os_str().is_empty() {
            let _ = fs::remove_file(&self.unfinished);
        }
    }
}

fn header(kind: EntryType, mode: u32, modified: SystemTime) -> Header {
    // GNU tar ignores pax records before a header of its own format.
    let mut header = Header::new_ustar();
    let seconds = modified.duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_mtime(seconds);
    header.set_uid(0);
    header.set_gid(0);
    header.set_size(0);
    header
}
