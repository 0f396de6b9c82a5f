//! How the line discipline of a terminal delimits lines, and how to write bytes so that it does so
//! again.

use nix::libc;

use crate::sys::tty::Termios;

/// How many bytes the line discipline holds (`N_TTY_BUF_SIZE`, `drivers/tty/n_tty.c`). Those
/// beyond it have not been processed yet.
pub(super) const READ_BUFFER: usize = 4095;

/// The most bytes to write into a terminal at a time. The kernel keeps buffers for writes of this
/// size that it has used once (`MIN_TTYB_SIZE`, `drivers/tty/tty_buffer.c`), so a pair holds again
/// as many as it held. One holds two such writes.
pub(super) const PIECE_BYTES: usize = 256;

/// Where the second buffer begins, so that the line discipline, when it is full, has taken one byte
/// of a buffer. Then as many bytes as possible fit.
const SECOND_BUFFER: usize = 510;

/// Returns how many bytes to write next, after `done` of them.
pub(super) fn next_piece(done: usize) -> usize {
    if done < SECOND_BUFFER {
        let half = SECOND_BUFFER / 2;
        return half - done % half;
    }
    PIECE_BYTES - (done - SECOND_BUFFER) % PIECE_BYTES
}

/// Local modes (`include/uapi/asm-generic/termbits.h`).
const CANONICAL: u32 = 0x2;
const EXTENDED: u32 = 0x8000;
const EXTERNAL: u32 = 0x10000;
/// An input mode: a character stops output, and another one starts it.
const FLOW_CONTROL: u32 = 0x400;

/// The character that ends a line without being part of it, in bytes from [`Lines::encode`].
const END: u8 = 0xff;
/// The character before one that means itself.
const LITERAL: u8 = 0xfe;

/// The characters that stop and start output, in modes of [`Lines::plain`].
pub(super) const STOP: u8 = 0xfd;
pub(super) const START: u8 = 0xfc;

/// The characters that mean something in these modes, besides newline.
const SPECIAL: [u8; 4] = [END, LITERAL, STOP, START];

/// How a terminal delimits lines.
#[derive(Clone, Copy, Debug)]
pub(super) struct Lines {
    modes: Termios,
    /// Characters besides newline that end lines, and are part of them; 0 for none.
    ends: [u8; 2],
}

impl Lines {
    pub(super) fn of(modes: &Termios) -> Self {
        let end = |index: usize, is_on: bool| match modes.characters[index] {
            end if SPECIAL.contains(&end) => 0,
            end if is_on => end,
            _ => 0,
        };
        let extended = modes.local & EXTENDED != 0;
        Self { modes: *modes, ends: [end(libc::VEOL, true), end(libc::VEOL2, extended)] }
    }

    /// Whether programs read line by line (canonical mode).
    pub(super) fn are_delimited(&self) -> bool {
        self.modes.local & (CANONICAL | EXTERNAL) == CANONICAL
    }

    /// Returns modes in which bytes that [`Lines::encode`] returns are queued as they were. Nothing
    /// is echoed, and output passes unchanged. In canonical mode, [`STOP`] and [`START`] stop and
    /// start the output.
    pub(super) fn plain(&self) -> Termios {
        let mut characters = [0; crate::sys::tty::CONTROL_CHARACTERS];
        let mut local = self.modes.local & (CANONICAL | EXTERNAL);
        if self.are_delimited() {
            local |= EXTENDED;
            characters[libc::VEOF] = END;
            characters[libc::VLNEXT] = LITERAL;
            characters[libc::VEOL] = self.ends[0];
            characters[libc::VEOL2] = self.ends[1];
            characters[libc::VSTOP] = STOP;
            characters[libc::VSTART] = START;
        }
        // The kernel starts stopped output when flow control is switched off.
        let stays = if self.are_delimited() { FLOW_CONTROL } else { 0 };
        let input = self.modes.input & FLOW_CONTROL | stays;
        Termios { input, output: 0, local, characters, ..self.modes }
    }

    /// Returns [`Lines::plain`] without canonical mode.
    pub(super) fn undelimited(&self) -> Termios {
        let plain = self.plain();
        let local = plain.local & !CANONICAL;
        Termios { local, characters: [0; crate::sys::tty::CONTROL_CHARACTERS], ..plain }
    }

    /// Returns modes in which [`STOP`] stops the output.
    pub(super) fn stopping(&self) -> Termios {
        let mut modes = self.plain();
        modes.input |= FLOW_CONTROL;
        modes.characters[libc::VSTOP] = STOP;
        modes
    }

    /// Returns what queues these bytes; with `is_line`, as a complete line.
    pub(super) fn encode(&self, bytes: &[u8], is_line: bool) -> Vec<u8> {
        if !self.are_delimited() {
            return bytes.to_owned();
        }
        let is_end = |byte: u8| byte == b'\n' || byte != 0 && self.ends.contains(&byte);
        let (body, end) = match bytes.split_last() {
            Some((last, body)) if is_line && is_end(*last) => (body, Some(*last)),
            _ => (bytes, is_line.then_some(END)),
        };
        let mut encoded = Vec::with_capacity(bytes.len() + 1);
        for byte in body {
            if is_end(*byte) || SPECIAL.contains(byte) {
                encoded.push(LITERAL);
            }
            encoded.push(*byte);
        }
        encoded.extend(end);
        encoded
    }

    /// Returns what queues bytes with lines that end at `ends`, and then the beginning of a line.
    /// Ends beyond the bytes are ignored.
    pub(super) fn encode_all(&self, bytes: &[u8], ends: &[u32]) -> Vec<u8> {
        let mut encoded = Vec::with_capacity(bytes.len());
        let mut begin = 0;
        for end in ends {
            let end = usize::try_from(*end).unwrap_or(usize::MAX);
            if let Some(line) = bytes.get(begin..end) {
                encoded.append(&mut self.encode(line, true));
                begin = end;
            }
        }
        encoded.append(&mut self.encode(&bytes[begin..], false));
        encoded
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn canonical() -> Termios {
        let mut modes = Termios { local: CANONICAL | EXTENDED, ..Termios::default() };
        modes.characters[libc::VEOL] = b'|';
        modes
    }

    #[test]
    fn lines_keep_their_ends() {
        let lines = Lines::of(&canonical());
        assert_eq!(lines.encode(b"one\n", true), b"one\n");
        assert_eq!(lines.encode(b"one|", true), b"one|");
        assert_eq!(lines.encode(b"one", true), b"one\xff");
        assert_eq!(lines.encode(b"", true), b"\xff");
        assert_eq!(lines.encode(b"typ", false), b"typ");
        assert_eq!(lines.encode(b"a\nb|c\xff\n", true), b"a\xfe\nb\xfe|c\xfe\xff\n");
        assert_eq!(lines.encode(b"\xfe\n", false), b"\xfe\xfe\xfe\n");
        assert_eq!(lines.encode(b"\xfc\xfd", false), b"\xfe\xfc\xfe\xfd");
    }

    #[test]
    fn ends_out_of_range_are_ignored() {
        let lines = Lines::of(&canonical());
        assert_eq!(lines.encode_all(b"a\nbc", &[2, 3, 1, 400, u32::MAX]), b"a\nb\xffc");
        assert_eq!(lines.encode_all(b"", &[0, 0]), b"\xff\xff");
    }

    #[test]
    fn pieces_fill_buffers() {
        let mut ends = Vec::new();
        let mut done = 0;
        while done <= READ_BUFFER {
            done += next_piece(done);
            ends.push(done);
        }
        assert_eq!(ends[..4], [255, 510, 766, 1022]);
        assert!(ends.contains(&(READ_BUFFER - 1)));
        assert_eq!(next_piece(READ_BUFFER), PIECE_BYTES - 1);
    }

    #[test]
    fn raw_bytes_are_not_encoded() {
        let lines = Lines::of(&Termios::default());
        assert_eq!(lines.encode(b"a\n\xff\xfe", true), b"a\n\xff\xfe");
        assert_eq!(lines.plain(), Termios::default());
    }
}
