//! Looking at all that a view of a chain shows.

use rcriu::{
    chain::read_at,
    view::{Ino, NodeType, View, Whence, seek},
};

/// Looks at all nodes below a directory of a view; errors are fine.
pub fn look(view: &View, dir: Ino, buffer: &mut [u8]) {
    let Ok((_, entries)) = view.entries(dir) else { return };
    for entry in entries {
        if entry.kind == NodeType::Directory {
            look(view, entry.ino, buffer);
            continue;
        }
        let _ = view.lookup(dir, &entry.name);
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
