//! Looking at all that a view of a chain shows.

use std::{fs, path::Path, sync::Arc};

use rcriu::{
    chain::{Chain, Summary, check, diff, read_at},
    res::file::is_restored,
    view::{Ino, NodeType, ROOT, View, Whence, flatten, seek},
};

/// Asks everything of the chain at `root` that needs no process, and reads `look_bytes` at
/// both ends of every file; errors are fine. `None` if there is no chain.
pub fn ask(root: &Path, look_bytes: usize) -> Option<Arc<Chain>> {
    let chain = Chain::open(root).ok()?;
    let _ = check(&chain, is_restored, &mut |_, _| ());
    let ids: Vec<_> = chain.ids().collect();
    for id in &ids {
        let _ = Summary::of(&chain, *id);
        let _ = diff((&chain, ids[0]), (&chain, *id), &mut |_, _| ());
    }
    let chain = Arc::new(chain);
    if let Ok(tip) = chain.choose(None) {
        let view = View::new(Arc::clone(&chain), tip);
        look(&view, ROOT, &mut vec![0; look_bytes]);
        let out = root.join("flat");
        let flattened = flatten(&view, &out, &mut |_, _| {});
        assert_eq!(flattened.is_ok(), out.exists(), "a flat directory that is not complete");
        let _ = fs::remove_dir_all(&out);
    }
    Some(chain)
}

/// Looks at all nodes below a directory of a view; errors are fine.
pub fn look(view: &View, dir: Ino, buffer: &mut [u8]) {
    let Ok((_, entries)) = view.entries(dir) else { return };
    for entry in entries {
        if entry.kind == NodeType::Directory {
            look(view, entry.ino, buffer);
            continue;
        }
        let _ = view.lookup(dir, &entry.name);
        if entry.kind == NodeType::Link {
            let _ = view.link(entry.ino);
        }
        let Ok(open) = view.open(entry.ino) else { continue };
        let content = &*open.content;
        let _ = read_at(content, 0, buffer);
        let _ = read_at(content, content.len().saturating_sub(100), buffer);
        let _ = content.allocated();
        for whence in [Whence::Data, Whence::Hole] {
            let _ = seek(content, content.len() / 2, whence);
        }
    }
}
