//! The images of an IPC namespace, except for segments.

use super::{
    ImageError, ImageReader, ImageStore, Kind, Result,
    proto::{IpcDescEntry, IpcMsg, IpcMsgEntry, IpcSemEntry, IpcShmEntry, IpcVarEntry},
};

/// The highest id of an object and the highest value of a semaphore (`SEMVMX`, `linux/sem.h`).
const ID_MAX: u32 = i32::MAX.cast_unsigned();
const VALUE_MAX: u16 = 32767;

/// Returns the number of the memory of a segment: its `shmid` in mappings.
pub fn memory_of(segment: &IpcShmEntry) -> u64 {
    segment.rcriu_shmid.unwrap_or(segment.desc.id.into())
}

/// The objects and variables of a namespace.
#[derive(Clone, Debug, Default)]
pub struct Objects {
    /// Limits, and the POSIX message queues.
    pub variables: IpcVarEntry,
    /// System V message queues, with their messages in order.
    pub queues: Vec<(IpcMsgEntry, Vec<Message>)>,
    /// Sets of semaphores, with a value for each.
    pub semaphores: Vec<(IpcSemEntry, Vec<u16>)>,
}

/// A message of a queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Its type.
    pub kind: i64,
    /// Its text.
    pub text: Vec<u8>,
}

impl Objects {
    /// Reads the images of the namespace with this number.
    ///
    /// # Errors
    /// A missing or malformed image.
    pub fn read(images: &dyn ImageStore, number: u32) -> Result<Self> {
        Ok(Self {
            variables: images.message(Kind::IpcVar, number.into())?,
            queues: read_all(images, Kind::IpcnsMsg, number, read_queue)?,
            semaphores: read_all(images, Kind::IpcnsSem, number, read_semaphores)?,
        })
    }

    /// Returns a value that no kernel accepts, if there is one.
    pub fn problem(&self) -> Option<String> {
        let id = |desc: &IpcDescEntry, name: &str| {
            let id = desc.id;
            (id > ID_MAX).then(|| format!("{name} {id}: an id of at most {ID_MAX} expected"))
        };
        for (entry, messages) in &self.queues {
            let of_message = messages.iter().find(|message| message.kind <= 0).map(|message| {
                let (id, kind) = (entry.desc.id, message.kind);
                format!("message queue {id}: a message of type {kind}, a positive one expected")
            });
            if let Some(problem) = id(&entry.desc, "message queue").or(of_message) {
                return Some(problem);
            }
        }
        for (entry, values) in &self.semaphores {
            let of_value = values.iter().find(|value| **value > VALUE_MAX).map(|value| {
                let id = entry.desc.id;
                format!("semaphore set {id}: a value of {value}, at most {VALUE_MAX} expected")
            });
            if let Some(problem) = id(&entry.desc, "semaphore set").or(of_value) {
                return Some(problem);
            }
        }
        let is_wrong = |name: &[u8]| name.is_empty() || name.contains(&0) || name.contains(&b'/');
        let name = self.variables.rcriu_queues.iter().map(|queue| &queue.name);
        let name = name.into_iter().find(|name| is_wrong(name))?;
        Some(format!("a message queue with the name {:?}", String::from_utf8_lossy(name)))
    }
}

/// Reads an image of objects, if there is one. `read` reads an object.
fn read_all<T>(
    images: &dyn ImageStore,
    kind: Kind,
    number: u32,
    read: fn(&mut ImageReader) -> Result<Option<T>>,
) -> Result<Vec<T>> {
    let mut image = match images.image(kind, number.into()) {
        Err(error) if error.is_missing() => return Ok(Vec::new()),
        image => image?,
    };
    let mut found = Vec::new();
    while let Some(object) = read(&mut image)? {
        found.push(object);
    }
    Ok(found)
}

fn read_queue(image: &mut ImageReader) -> Result<Option<(IpcMsgEntry, Vec<Message>)>> {
    let Some(entry) = image.next_message::<IpcMsgEntry>()? else { return Ok(None) };
    let mut messages = Vec::new();
    for _ in 0..entry.qnum {
        let Some(message) = image.next_message::<IpcMsg>()? else {
            let path = image.path().to_owned();
            let (wanted, found) = (entry.qnum.into(), messages.len() as u64);
            let offset = image.offset();
            return Err(ImageError::Truncated { path, offset, what: "messages", wanted, found });
        };
        let text = read_bytes(image, message.msize.into())?;
        messages.push(Message { kind: message.mtype.cast_signed(), text });
    }
    Ok(Some((entry, messages)))
}

fn read_semaphores(image: &mut ImageReader) -> Result<Option<(IpcSemEntry, Vec<u16>)>> {
    let Some(entry) = image.next_message::<IpcSemEntry>()? else { return Ok(None) };
    let bytes = read_bytes(image, u64::from(entry.nsems) * size_of::<u16>() as u64)?;
    let (values, _) = bytes.as_chunks();
    Ok(Some((entry, values.iter().map(|value| u16::from_le_bytes(*value)).collect())))
}

/// Reads the bytes that follow a message, and skips their padding.
fn read_bytes(image: &mut ImageReader, len: u64) -> Result<Vec<u8>> {
    /// The alignment of what comes next.
    const ALIGN: u64 = 8;
    let mut bytes = Vec::new();
    image.append(len, "payload", &mut bytes)?;
    image.skip(len.next_multiple_of(ALIGN) - len, "padding")?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::{Directory, SnapshotWriter, proto::InventoryEntry};

    fn desc(id: u32) -> IpcDescEntry {
        IpcDescEntry { id, ..Default::default() }
    }

    /// Writes a queue with messages of these types, and a set with these values.
    fn images(dir: &std::path::Path, id: u32, kinds: &[i64], values: &[u16], qnum: u32) {
        let images = SnapshotWriter::begin(dir).unwrap();
        images.write(Kind::IpcVar, 11, &[IpcVarEntry::default()]).unwrap();
        let mut queues = images.create(Kind::IpcnsMsg, 11).unwrap();
        queues.message(&IpcMsgEntry { desc: desc(id), qbytes: 100, qnum }).unwrap();
        for kind in kinds {
            queues.message(&IpcMsg { mtype: kind.cast_unsigned(), msize: 5 }).unwrap();
            queues.raw(b"hello\0\0\0").unwrap();
        }
        queues.finish().unwrap();
        let mut sets = images.create(Kind::IpcnsSem, 11).unwrap();
        let nsems = u32::try_from(values.len()).unwrap();
        sets.message(&IpcSemEntry { desc: desc(7), nsems }).unwrap();
        let mut bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        sets.raw(&bytes).unwrap();
        sets.finish().unwrap();
        images.sync(|_| {}).unwrap();
        images.commit(&InventoryEntry::default()).unwrap();
    }

    #[test]
    fn objects_are_read_and_checked() {
        let dir = tempfile::tempdir().unwrap();
        let read = |id, kinds: &[i64], values: &[u16], qnum| {
            images(dir.path(), id, kinds, values, qnum);
            Objects::read(&Directory::at(dir.path()), 11)
        };
        let found = read(5, &[1, 9], &[3, 0, 32767], 2).unwrap();
        assert_eq!(found.problem(), None);
        let kinds: Vec<_> = found.queues[0].1.iter().map(|message| message.kind).collect();
        assert_eq!((kinds, &*found.queues[0].1[1].text), (vec![1, 9], &b"hello"[..]));
        assert_eq!(found.semaphores[0].1, [3, 0, 32767]);
        let problem = |id, kinds: &[i64], values: &[u16]| {
            read(id, kinds, values, 1).unwrap().problem().unwrap_or_default()
        };
        assert!(problem(1 << 31, &[1], &[]).contains("at most 2147483647 expected"));
        assert!(problem(1, &[0], &[]).contains("of type 0, a positive one expected"));
        assert!(problem(1, &[1], &[32768]).contains("a value of 32768, at most 32767 expected"));
        assert!(matches!(read(1, &[1], &[], 2), Err(ImageError::Truncated { found: 1, .. })));
        assert!(Objects::read(&Directory::at(dir.path()), 12).is_err());
    }
}
