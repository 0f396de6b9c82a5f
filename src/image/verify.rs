//! Checks that a file is a whole image of its kind.

use super::{
    ImageReader, Result,
    dynamic::EntryReader,
    payload::{Layout, Stretch},
};

/// Decodes an image to its end and discards it.
///
/// # Errors
/// The first defect.
pub fn verify(image: ImageReader) -> Result<()> {
    let Ok(mut reader) = EntryReader::new(image) else {
        return Ok(()); // no entries, only bytes
    };
    while let Some((_, layout)) = reader.next_entry()? {
        match layout {
            Layout::Rest => break,
            Layout::Stretches(stretches) => {
                for stretch in &stretches {
                    skip(&mut reader, stretch)?;
                }
            }
            Layout::Framed(framed) => {
                let mut read = 0;
                while reader.more_framed(&framed, read)? {
                    let message = reader.next_framed(&framed)?;
                    skip(&mut reader, &framed.stretch(&message))?;
                    read += 1;
                }
            }
        }
    }
    Ok(())
}

fn skip<R: std::io::BufRead>(reader: &mut EntryReader<R>, stretch: &Stretch) -> Result<()> {
    reader.image().skip(stretch.length, stretch.name)?;
    reader.image().skip(stretch.padding, "padding")
}
