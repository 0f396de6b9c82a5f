//! Checkpoints in an OCI image layout: images whose layer is an exported checkpoint (`podman
//! container checkpoint --create-image`, `checkpointctl build`).
//!
//! `index.json` names manifests or further indexes by their digests, and a manifest names its
//! layers; each is a file `blobs/ALGORITHM/DIGEST`. Annotations mark an image as a checkpoint: in
//! its manifest, or in the entry that names the manifest.

use std::{collections::HashSet, fmt::Write as _, io};

use serde_json::{Map, Value};
use sha2::{Sha256, Sha512};

use super::{
    ArchiveError,
    error::Result,
    slice::{Base, read_full},
};
use crate::image::store::StoredFile;

/// The files that make a directory an image layout.
pub(super) const MARK: &str = "oci-layout";
pub(super) const INDEX: &str = "index.json";

/// Prefixes of the annotations of checkpoints, by Podman, CRI-O and checkpointctl.
const ANNOTATIONS: [&str; 3] = [
    "io.podman.annotations.checkpoint.",
    "io.kubernetes.cri-o.annotations.checkpoint.",
    "org.criu.checkpoint.",
];

/// The longest document that is read.
const DOCUMENT_BYTES: u64 = 4 << 20;

/// The most documents that are read.
const DOCUMENTS: usize = 256;

/// Bytes hashed at a time.
const STEP_BYTES: usize = 1 << 20;

/// A layer of a checkpoint's image.
#[derive(Debug)]
pub(super) struct Layer {
    /// Its path in the layout.
    pub(super) path: String,
    pub(super) file: Base,
    pub(super) digest: Digest,
}

/// The digest by which a file is named.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Digest {
    algorithm: Algorithm,
    /// Lower case.
    digits: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Algorithm {
    Sha256,
    Sha512,
}

impl Algorithm {
    fn name(self) -> &'static str {
        match self {
            Self::Sha256 => "sha256",
            Self::Sha512 => "sha512",
        }
    }
}

impl Digest {
    fn parse(text: &str) -> Option<Self> {
        let (name, digits) = text.split_once(':')?;
        let all = [Algorithm::Sha256, Algorithm::Sha512];
        let algorithm = all.into_iter().find(|algorithm| algorithm.name() == name)?;
        let len = match algorithm {
            Algorithm::Sha256 => 2 * size_of::<sha2::digest::Output<Sha256>>(),
            Algorithm::Sha512 => 2 * size_of::<sha2::digest::Output<Sha512>>(),
        };
        let is_hex = |c: u8| c.is_ascii_digit() || (b'a'..=b'f').contains(&c);
        let valid = digits.len() == len && digits.bytes().all(is_hex);
        valid.then(|| Self { algorithm, digits: digits.to_owned() })
    }

    /// Returns the path of the file that has this digest.
    fn path(&self) -> String {
        format!("blobs/{}/{}", self.algorithm.name(), self.digits)
    }

    pub(super) fn digits(&self) -> &str {
        &self.digits
    }

    /// Reads a whole file and compares its digest. `progress` gets the number of bytes read.
    ///
    /// # Errors
    /// [`ArchiveError::Layout`] if it differs, [`ArchiveError::LayoutFile`].
    pub(super) fn verify(
        &self,
        file: &dyn StoredFile,
        progress: &mut dyn FnMut(u64),
    ) -> Result<()> {
        let failed = |source| ArchiveError::LayoutFile { file: self.path(), source };
        let found = match self.algorithm {
            Algorithm::Sha256 => hashed::<Sha256>(file, progress).map_err(failed)?,
            Algorithm::Sha512 => hashed::<Sha512>(file, progress).map_err(failed)?,
        };
        if found == self.digits {
            return Ok(());
        }
        let problem = "its bytes do not have the digest by which it is named: it is damaged";
        Err(ArchiveError::Layout { file: self.path(), problem })
    }
}

fn hashed<D: sha2::Digest>(
    file: &dyn StoredFile,
    progress: &mut dyn FnMut(u64),
) -> io::Result<String> {
    let mut hash = D::new();
    let mut buffer = vec![0; STEP_BYTES];
    let mut at = 0;
    loop {
        let read = read_full(file, &mut buffer, at)?;
        hash.update(&buffer[..read]);
        at += read as u64;
        progress(at);
        if read < buffer.len() {
            break;
        }
    }
    let mut digits = String::new();
    for byte in hash.finalize() {
        let _ = write!(digits, "{byte:02x}");
    }
    Ok(digits)
}

/// Finds the layers of all checkpoints' images in a layout, whose files `open` opens.
///
/// # Errors
/// [`ArchiveError::Layout`], [`ArchiveError::NoCheckpoint`].
pub(super) fn layers(open: &dyn Fn(&str) -> std::io::Result<Base>) -> Result<Vec<Layer>> {
    let mut layout = Layout { open, seen: HashSet::new(), layers: Vec::new() };
    let index = layout.document(INDEX, None)?;
    layout.take(&index, INDEX, false)?;
    if layout.layers.is_empty() {
        return Err(ArchiveError::NoCheckpoint);
    }
    Ok(layout.layers)
}

struct Layout<'a> {
    open: &'a dyn Fn(&str) -> std::io::Result<Base>,
    /// Paths of documents that were read, and of layers.
    seen: HashSet<String>,
    layers: Vec<Layer>,
}

impl Layout<'_> {
    /// Adds the layers of an index or a manifest; `known` if an annotation of the entry that names
    /// it marks it as a checkpoint.
    fn take(&mut self, document: &Map<String, Value>, path: &str, known: bool) -> Result<()> {
        let is_checkpoint = known || is_checkpoint(document);
        let list = |name: &str| document.get(name).and_then(Value::as_array);
        for descriptor in list("manifests").into_iter().flatten() {
            let descriptor = object(descriptor, path)?;
            let blob = blob(descriptor, path)?;
            if !self.seen.insert(blob.path.clone()) {
                continue;
            }
            let inner = self.document(&blob.path, Some(&blob))?;
            let known = is_checkpoint && path != INDEX || self::is_checkpoint(descriptor);
            self.take(&inner, &blob.path, known)?;
        }
        if !is_checkpoint {
            return Ok(());
        }
        for descriptor in list("layers").into_iter().flatten() {
            let blob = blob(object(descriptor, path)?, path)?;
            if self.seen.insert(blob.path.clone()) {
                let file = self.file(&blob.path, Some(&blob))?;
                self.layers.push(Layer { path: blob.path, file, digest: blob.digest });
            }
        }
        Ok(())
    }

    fn document(&mut self, path: &str, blob: Option<&Blob>) -> Result<Map<String, Value>> {
        let bad = |problem| ArchiveError::Layout { file: path.to_owned(), problem };
        if self.seen.len() > DOCUMENTS {
            return Err(ArchiveError::TooMany { what: "documents", limit: DOCUMENTS });
        }
        let file = self.file(path, blob)?;
        let failed = |source| ArchiveError::LayoutFile { file: path.to_owned(), source };
        let len = file.stat().map_err(failed)?.len;
        if len > DOCUMENT_BYTES {
            return Err(bad("it is too long for a document"));
        }
        if let Some(blob) = blob {
            blob.digest.verify(&*file, &mut |_| ())?;
        }
        let mut bytes = vec![0; usize::try_from(len).expect("limited above")];
        let read = read_full(&*file, &mut bytes, 0).map_err(failed)?;
        match serde_json::from_slice(&bytes[..read]) {
            Ok(Value::Object(document)) => Ok(document),
            _ => Err(bad("it is no JSON object")),
        }
    }

    fn file(&self, path: &str, blob: Option<&Blob>) -> Result<Base> {
        let failed = |source| ArchiveError::LayoutFile { file: path.to_owned(), source };
        let file = (self.open)(path).map_err(failed)?;
        let len = file.stat().map_err(failed)?.len;
        if blob.is_some_and(|blob| blob.size != len) {
            let problem = "it has another length than what names it says";
            return Err(ArchiveError::Layout { file: path.to_owned(), problem });
        }
        Ok(file)
    }
}

/// A file that a document names.
struct Blob {
    path: String,
    size: u64,
    digest: Digest,
}

fn blob(descriptor: &Map<String, Value>, document: &str) -> Result<Blob> {
    let bad = |problem| ArchiveError::Layout { file: document.to_owned(), problem };
    let digest = descriptor.get("digest").and_then(Value::as_str);
    let digest = digest.ok_or_else(|| bad("something in it has no digest"))?;
    let digest = Digest::parse(digest);
    let digest = digest
        .ok_or_else(|| bad("something in it has a digest that is not of SHA-256 or SHA-512"))?;
    let size = descriptor.get("size").and_then(Value::as_u64);
    let size = size.ok_or_else(|| bad("something in it has no size"))?;
    Ok(Blob { path: digest.path(), size, digest })
}

fn object<'a>(value: &'a Value, document: &str) -> Result<&'a Map<String, Value>> {
    let problem = "something in it is no object";
    value.as_object().ok_or_else(|| ArchiveError::Layout { file: document.to_owned(), problem })
}

fn is_checkpoint(document: &Map<String, Value>) -> bool {
    let annotations = document.get("annotations").and_then(Value::as_object);
    let is_ours = |name: &String| ANNOTATIONS.iter().any(|begin| name.starts_with(begin));
    annotations.is_some_and(|annotations| annotations.keys().any(is_ours))
}
