//! Netlink requests whose messages go into images as the kernel has sent them, or come from there.
//!
//! For such messages the crate does the talking, and this module handles their bytes. The crate's own types
//! would decode them only to encode them again, and lose the attributes that they do not know.

use std::io;

use netlink_bindings::{
    builtin::NlmsgerrAttrs,
    traits::{NetlinkRequest, Protocol},
};
use netlink_socket2::{NetlinkSocket, ReplyError};
use nix::{errno::Errno, libc};
use zerocopy::FromBytes;

/// The size of `struct nlmsghdr`.
const HEADER_BYTES: usize = 16;

/// `NLM_F_MULTI`: the flag of each message of a list.
const OF_LIST: u16 = 2;

/// `NLM_F_DUMP`: asks for a list.
const LIST: u16 = 0x300;

/// `NLM_F_REPLACE`, `NLM_F_EXCL`, `NLM_F_CREATE`, `NLM_F_APPEND` (`linux/netlink.h`).
pub const REPLACE: u16 = 0x100;
/// See [`REPLACE`].
pub const EXCLUSIVE: u16 = 0x200;
/// See [`REPLACE`].
pub const CREATE: u16 = 0x400;
/// See [`REPLACE`].
pub const APPEND: u16 = 0x800;

/// `NLA_TYPE_MASK` and `NLA_F_NESTED`, `linux/netlink.h`.
const ATTRIBUTE_KIND: u16 = 0x3fff;
const NESTED: u16 = 0x8000;

/// A message without its header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Its type (`RTM_NEWADDR`, ...).
    pub kind: u16,
    /// The fixed part of the protocol, and attributes.
    pub body: Vec<u8>,
}

impl Message {
    /// Returns the attributes behind a fixed part of this size.
    pub fn attributes(&self, fixed: usize) -> Attributes<'_> {
        Attributes(self.body.get(fixed.next_multiple_of(4)..).unwrap_or_default())
    }

    /// Returns the first attribute of a kind.
    pub fn attribute(&self, fixed: usize, kind: u16) -> Option<&[u8]> {
        self.attributes(fixed).find(|(found, _)| *found == kind).map(|(_, value)| value)
    }

    /// Adds the message to the bytes of an image, with a header as in a list of the kernel.
    pub fn write(&self, image: &mut Vec<u8>) {
        let len = HEADER_BYTES + self.body.len();
        image.extend(u32::try_from(len).expect("messages are small").to_le_bytes());
        image.extend(self.kind.to_le_bytes());
        image.extend(OF_LIST.to_le_bytes());
        image.extend([0; 8]);
        image.extend(&self.body);
        image.resize(image.len().next_multiple_of(4), 0);
    }

    /// Reads all messages of an image.
    ///
    /// # Errors
    /// What is wrong with the bytes.
    pub fn read_all(mut image: &[u8]) -> Result<Vec<Self>, String> {
        let whole = image.len();
        let mut all = Vec::new();
        while !image.is_empty() {
            let at = whole - image.len();
            let short = || format!("the message at byte {at} is cut short");
            let (head, _) = <[u16; 3]>::read_from_prefix(image).map_err(|_| short())?;
            let len = usize::from(head[0]) | usize::from(head[1]) << 16;
            if len < HEADER_BYTES {
                return Err(format!(
                    "the message at byte {at} has {len} bytes, at least 16 expected"
                ));
            }
            let body = image.get(HEADER_BYTES..len).ok_or_else(short)?.to_vec();
            all.push(Self { kind: head[2], body });
            image = image.get(len.next_multiple_of(4)..).unwrap_or_default();
        }
        Ok(all)
    }
}

/// Iterates over netlink attributes: length, type and bytes, padded to a multiple of four.
#[derive(Clone, Copy, Debug)]
pub struct Attributes<'a>(pub &'a [u8]);

impl<'a> Iterator for Attributes<'a> {
    type Item = (u16, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let (head, _) = <[u16; 2]>::read_from_prefix(self.0).ok()?;
        let len = usize::from(head[0]);
        let value = self.0.get(size_of_val(&head)..len)?;
        self.0 = self.0.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some((head[1] & ATTRIBUTE_KIND, value))
    }
}

/// Returns a number in the native byte order; 0 beyond the end.
pub fn word(bytes: &[u8], position: usize) -> u32 {
    let at = position * size_of::<u32>();
    bytes.get(at..).and_then(|rest| u32::read_from_prefix(rest).ok()).map_or(0, |found| found.0)
}

/// Returns text without the zero at its end.
pub fn text(bytes: &[u8]) -> Vec<u8> {
    bytes.split(|byte| *byte == 0).next().unwrap_or_default().to_vec()
}

/// The body of a request.
#[derive(Clone, Debug, Default)]
pub struct Body(pub Vec<u8>);

impl Body {
    /// Begins with the fixed part of the protocol.
    pub fn new(fixed: &[u8]) -> Self {
        Self(fixed.to_vec())
    }

    /// Adds an attribute.
    #[must_use]
    pub fn with(mut self, kind: u16, value: &[u8]) -> Self {
        let len = u16::try_from(value.len() + 4).unwrap_or(u16::MAX);
        self.0.extend(len.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(&value[..usize::from(len) - 4]);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    /// Adds an attribute with a number.
    #[must_use]
    pub fn number(self, kind: u16, value: u32) -> Self {
        self.with(kind, &value.to_ne_bytes())
    }

    /// Adds an attribute with text, which ends with a zero.
    #[must_use]
    pub fn text(self, kind: u16, value: &[u8]) -> Self {
        self.with(kind, &[value, &[0]].concat())
    }

    /// Adds attributes within one.
    #[must_use]
    pub fn nested(self, kind: u16, inner: &Self) -> Self {
        self.with(kind | NESTED, &inner.0)
    }
}

/// A failed request.
#[derive(Debug, thiserror::Error)]
#[error("netlink: {errno}{said}")]
pub struct TalkError {
    /// The error number.
    pub errno: Errno,
    /// What the kernel says besides.
    said: String,
}

impl From<io::Error> for TalkError {
    fn from(error: io::Error) -> Self {
        let errno = crate::sys::errno(&error);
        Self { errno, said: String::new() }
    }
}

impl From<ReplyError> for TalkError {
    fn from(error: ReplyError) -> Self {
        let said = error.ext_ack().and_then(|attributes| {
            let text = attributes.flatten().find_map(|attribute| match attribute {
                NlmsgerrAttrs::Msg(text) => Some(text.to_string_lossy().into_owned()),
                _ => None,
            });
            text.map(|text| format!(" ({text})"))
        });
        Self { said: said.unwrap_or_default(), ..io::Error::from(error).into() }
    }
}

/// A conversation with the kernel in the network namespace that the calling thread is in at the first
/// request.
pub struct Talk {
    socket: NetlinkSocket,
    protocol: u16,
}

impl std::fmt::Debug for Talk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Talk").field("protocol", &self.protocol).finish_non_exhaustive()
    }
}

struct Request<'a> {
    protocol: u16,
    kind: u16,
    flags: u16,
    body: &'a [u8],
}

impl NetlinkRequest for Request<'_> {
    type ReplyType<'buf> = &'buf [u8];

    fn protocol(&self) -> Protocol {
        Protocol::Raw { protonum: self.protocol, request_type: self.kind }
    }

    fn flags(&self) -> u16 {
        self.flags
    }

    fn payload(&self) -> &[u8] {
        self.body
    }

    fn decode_reply(reply: &[u8]) -> &[u8] {
        reply
    }
}

impl Talk {
    /// Talks about devices, addresses and routes.
    pub fn about_routes() -> Self {
        Self::new(libc::NETLINK_ROUTE)
    }

    /// Talks about packet filters and connections that they track.
    pub fn about_filters() -> Self {
        Self::new(libc::NETLINK_NETFILTER)
    }

    /// Talks about IPsec (`xfrm`).
    pub fn about_ipsec() -> Self {
        Self::new(libc::NETLINK_XFRM)
    }

    fn new(protocol: libc::c_int) -> Self {
        let protocol = u16::try_from(protocol).expect("protocols are small");
        Self { socket: NetlinkSocket::new(), protocol }
    }

    /// Asks for a list. `answer` is the type that its messages have.
    ///
    /// # Errors
    /// The error of the kernel.
    pub fn list(&mut self, kind: u16, body: &Body, answer: u16) -> Result<Vec<Message>, TalkError> {
        self.ask(kind, LIST, body, answer)
    }

    /// Asks for one object.
    ///
    /// # Errors
    /// The error of the kernel.
    pub fn get(&mut self, kind: u16, body: &Body, answer: u16) -> Result<Vec<Message>, TalkError> {
        self.ask(kind, 0, body, answer)
    }

    fn ask(
        &mut self,
        kind: u16,
        flags: u16,
        body: &Body,
        answer: u16,
    ) -> Result<Vec<Message>, TalkError> {
        let request = Request { protocol: self.protocol, kind, flags, body: &body.0 };
        let mut replies = self.socket.request(&request)?;
        let mut found = Vec::new();
        while let Some(reply) = replies.recv() {
            found.push(Message { kind: answer, body: reply?.to_vec() });
        }
        Ok(found)
    }

    /// Changes something.
    ///
    /// # Errors
    /// The error of the kernel.
    pub fn change(&mut self, kind: u16, flags: u16, body: &[u8]) -> Result<(), TalkError> {
        let request = Request { protocol: self.protocol, kind, flags, body };
        let mut replies = self.socket.request(&request)?;
        while let Some(reply) = replies.recv() {
            reply?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_end_where_they_are_cut_short() {
        let bytes = [5, 0, 6, 0, 3, 0, 0, 0, 8, 0, 2, 0, 1, 2, 3, 4, 9, 0, 1, 0, 1];
        let found: Vec<_> = Attributes(&bytes).collect();
        assert_eq!(found, [(6, &[3][..]), (2, &[1, 2, 3, 4][..])]);
        assert_eq!(word(&[1, 0, 0, 0, 2, 0, 0, 0], 1), 2);
        assert_eq!(word(&[1, 0], 0), 0);
    }

    #[test]
    fn messages_come_back_from_an_image() {
        let body =
            Body::new(&[1, 2, 3, 4]).text(3, b"lo").nested(18, &Body::default().number(4, 7));
        let messages = [Message { kind: 20, body: body.0 }, Message { kind: 24, body: vec![9] }];
        assert_eq!(messages[0].attribute(4, 3), Some(&b"lo\0"[..]));
        let inner = messages[0].attribute(4, 18).unwrap();
        assert_eq!(Attributes(inner).next(), Some((4, &7_u32.to_ne_bytes()[..])));
        let mut image = Vec::new();
        messages.iter().for_each(|message| message.write(&mut image));
        assert_eq!(Message::read_all(&image).unwrap(), messages);
        let error = Message::read_all(&image[..image.len() - 5]).unwrap_err();
        assert!(error.contains("is cut short"), "{error}");
        let error = Message::read_all(&[3, 0, 0, 0, 1, 0]).unwrap_err();
        assert!(error.contains("at least 16"), "{error}");
    }
}
