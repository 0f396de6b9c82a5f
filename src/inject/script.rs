//! Lists of system calls to be made by another process.
//!
//! The table that the injected code walks (`arch::native`) is an array of [`Entry`],
//! followed by bytes that arguments point to. Its layout is private to this
//! program: both ends of it are compiled together.

use std::{borrow::Cow, ffi::CStr};

use nix::{errno::Errno, libc};
use zerocopy::{FromBytes, IntoBytes};

use crate::{
    arch::{ARGUMENTS, Entry},
    units::{NsPid, RemoteAddr},
};

/// Results from here up are negated error numbers (`include/linux/err.h`).
const FIRST_ERROR: u64 = (-4095_i64).cast_unsigned();

/// What [`Entry::result`] is before the call was made.
const NOT_MADE: u64 = u64::MAX - 0xdead;

/// The call's failure ends the list.
const MUST_SUCCEED: u64 = 1;

/// What data is aligned to: enough for every kernel structure.
const ALIGN: usize = 16;

/// The number that ends a list.
pub(super) const END: u64 = u64::MAX;

/// The number of what is no call: the thread stops and lets this program act.
const PAUSE: i64 = -2;

/// One call of a script.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CallId(usize);

/// Bytes of a script that calls read or write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    offset: usize,
    len: usize,
}

/// An argument of a call.
#[derive(Clone, Copy, Debug)]
pub enum Arg {
    /// This value.
    Value(u64),
    /// The address of these bytes.
    Pointer(Buffer),
    /// What this earlier call returned.
    Result(CallId),
}

macro_rules! arg_from {
    ($($type:ty),*) => {
        $(impl From<$type> for Arg {
            fn from(value: $type) -> Self {
                Self::Value(i64::from(value).cast_unsigned())
            }
        })*
    };
}
arg_from!(i32, i64, u32);

impl From<u64> for Arg {
    fn from(value: u64) -> Self {
        Self::Value(value)
    }
}

impl From<usize> for Arg {
    fn from(value: usize) -> Self {
        Self::Value(value as u64)
    }
}

impl From<NsPid> for Arg {
    fn from(pid: NsPid) -> Self {
        Self::from(pid.raw())
    }
}

impl From<RemoteAddr> for Arg {
    fn from(address: RemoteAddr) -> Self {
        Self::Value(address.0)
    }
}

impl From<Buffer> for Arg {
    fn from(buffer: Buffer) -> Self {
        Self::Pointer(buffer)
    }
}

impl From<CallId> for Arg {
    fn from(call: CallId) -> Self {
        Self::Result(call)
    }
}

#[derive(Clone, Debug)]
struct Call {
    what: Cow<'static, str>,
    number: i64,
    arguments: [Arg; ARGUMENTS],
    must_succeed: bool,
}

/// A list of system calls, with the bytes that they need.
#[derive(Clone, Debug, Default)]
pub struct Script {
    calls: Vec<Call>,
    data: Vec<u8>,
    /// Places in the data that hold the address of other data.
    pointers: Vec<(usize, Buffer)>,
}

impl Script {
    /// Returns a list without calls.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.calls.is_empty()
    }

    /// Returns how many calls there are.
    pub fn len(&self) -> usize {
        self.calls.len()
    }

    /// Returns the bytes that the script takes in scratch memory.
    pub fn bytes_needed(&self) -> usize {
        (self.calls.len() + 1) * size_of::<Entry>() + self.data.len()
    }

    /// Adds a call whose failure ends the script and is an error that says
    /// `what` could not be done. Missing arguments are 0.
    ///
    /// # Panics
    /// With more than six arguments.
    pub fn call(
        &mut self,
        what: impl Into<Cow<'static, str>>,
        number: libc::c_long,
        arguments: &[Arg],
    ) -> CallId {
        self.push(what.into(), number, arguments, true)
    }

    /// Adds a call that may fail; [`Answers::result`] tells.
    ///
    /// # Panics
    /// With more than six arguments.
    pub fn attempt(&mut self, number: libc::c_long, arguments: &[Arg]) -> CallId {
        self.push("".into(), number, arguments, false)
    }

    /// Lets the thread stop, so that this program can act on what was done so far, and
    /// then go on. If this program is killed, it goes on by itself.
    pub fn pause(&mut self) {
        self.push("".into(), PAUSE, &[], false);
    }

    fn push(
        &mut self,
        what: Cow<'static, str>,
        number: i64,
        given: &[Arg],
        must_succeed: bool,
    ) -> CallId {
        let mut arguments = [Arg::Value(0); ARGUMENTS];
        arguments[..given.len()].copy_from_slice(given);
        self.calls.push(Call { what, number, arguments, must_succeed });
        CallId(self.calls.len() - 1)
    }

    /// Adds bytes for a call to read.
    pub fn bytes(&mut self, bytes: &[u8]) -> Buffer {
        let offset = self.data.len().next_multiple_of(ALIGN);
        self.data.resize(offset, 0);
        self.data.extend_from_slice(bytes);
        Buffer { offset, len: bytes.len() }
    }

    /// Adds a string with its closing zero.
    pub fn string(&mut self, text: &CStr) -> Buffer {
        self.bytes(text.to_bytes_with_nul())
    }

    /// Adds room for a call to write to, zeroed.
    pub fn space(&mut self, len: usize) -> Buffer {
        let offset = self.data.len().next_multiple_of(ALIGN);
        self.data.resize(offset + len, 0);
        Buffer { offset, len }
    }

    /// Makes the eight bytes at `offset` in `buffer` the address of `target`.
    ///
    /// # Panics
    /// If they are not within the buffer.
    pub fn point(&mut self, buffer: Buffer, offset: usize, target: Buffer) {
        assert!(offset + size_of::<u64>() <= buffer.len, "the pointer is within the buffer");
        self.pointers.push((buffer.offset + offset, target));
    }

    /// Writes the table for scratch memory that the other process has at
    /// `address`. The memory is at least [`Self::bytes_needed`] long.
    pub(super) fn write(&self, scratch: &mut [u8], address: RemoteAddr) {
        let data_at = (self.calls.len() + 1) * size_of::<Entry>();
        for (position, call) in self.calls.iter().enumerate() {
            let mut arguments = [0; ARGUMENTS];
            let mut from_results = 0;
            for (number, argument) in call.arguments.iter().enumerate() {
                arguments[number] = match *argument {
                    Arg::Value(value) => value,
                    Arg::Pointer(buffer) => address.plus((data_at + buffer.offset) as u64).0,
                    Arg::Result(CallId(earlier)) => {
                        let back = u8::try_from(position - earlier).expect("a recent call");
                        from_results |= u64::from(back) << (8 * number);
                        0
                    }
                };
            }
            put(
                scratch,
                position,
                &Entry {
                    number: call.number.cast_unsigned(),
                    arguments,
                    result: NOT_MADE,
                    flags: if call.must_succeed { MUST_SUCCEED } else { 0 },
                    from_results,
                },
            );
        }
        put(
            scratch,
            self.calls.len(),
            &Entry { number: END, arguments: [0; ARGUMENTS], result: 0, flags: 0, from_results: 0 },
        );
        let data = self.data(address.plus(data_at as u64));
        scratch[data_at..data_at + data.len()].copy_from_slice(&data);
    }

    /// Reads the table back after it was walked.
    ///
    /// # Errors
    /// The position of the first call that had to succeed and did not, and why.
    pub(super) fn read(&self, scratch: &[u8]) -> Result<Answers, (usize, Errno)> {
        let result = |position: usize| {
            let at = position * size_of::<Entry>();
            Entry::read_from_prefix(&scratch[at..]).expect("it was written").0.result
        };
        let results: Vec<_> = (0..self.calls.len()).map(result).collect();
        let data_at = (self.calls.len() + 1) * size_of::<Entry>();
        self.conclude(&results, scratch[data_at..data_at + self.data.len()].to_vec())
    }

    /// Makes the calls one after the other by `call`, which is given the numbers and the
    /// arguments; data is at `address`. Returns the results as a table would have them.
    ///
    /// # Errors
    /// What `call` and `at_pause` return.
    pub(super) fn walk<E>(
        &self,
        address: RemoteAddr,
        mut call: impl FnMut(i64, [u64; ARGUMENTS]) -> Result<Result<u64, Errno>, E>,
        mut at_pause: impl FnMut(&[u64]) -> Result<(), E>,
    ) -> Result<Vec<u64>, E> {
        let mut results = vec![NOT_MADE; self.calls.len()];
        for (position, wanted) in self.calls.iter().enumerate() {
            if wanted.number == PAUSE {
                at_pause(&results)?;
                continue;
            }
            let arguments = wanted.arguments.map(|argument| match argument {
                Arg::Value(value) => value,
                Arg::Pointer(buffer) => address.plus(buffer.offset as u64).0,
                Arg::Result(CallId(earlier)) => results[earlier],
            });
            let result = call(wanted.number, arguments)?;
            results[position] =
                result.unwrap_or_else(|errno| i64::from(-(errno as i32)).cast_unsigned());
            if wanted.must_succeed && result.is_err() {
                break;
            }
        }
        Ok(results)
    }

    /// Returns the data for memory that the other process has at `address`.
    pub(super) fn data(&self, address: RemoteAddr) -> Vec<u8> {
        let mut data = self.data.clone();
        for (place, target) in &self.pointers {
            let pointer = address.plus(target.offset as u64).0.to_le_bytes();
            data[*place..place + pointer.len()].copy_from_slice(&pointer);
        }
        data
    }

    /// Returns what came of calls with these results, and with this data afterwards.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub(super) fn conclude(
        &self,
        results: &[u64],
        data: Vec<u8>,
    ) -> Result<Answers, (usize, Errno)> {
        let mut outcomes = Vec::with_capacity(results.len());
        for (position, (call, result)) in self.calls.iter().zip(results).enumerate() {
            let result = outcome(*result);
            if call.must_succeed
                && let Err(errno) = result
            {
                return Err((position, errno));
            }
            outcomes.push(result);
        }
        Ok(Answers { results: outcomes, data })
    }

    /// Returns what the call at `position` is for.
    pub(super) fn what(&self, position: usize) -> &str {
        &self.calls[position].what
    }
}

fn put(scratch: &mut [u8], position: usize, entry: &Entry) {
    let at = position * size_of::<Entry>();
    scratch[at..at + size_of::<Entry>()].copy_from_slice(entry.as_bytes());
}

pub(super) fn outcome(result: u64) -> Result<u64, Errno> {
    if result == NOT_MADE {
        return Err(Errno::ECANCELED);
    }
    if result >= FIRST_ERROR {
        let number = i32::try_from(result.wrapping_neg()).expect("below 4096");
        return Err(Errno::from_raw(number));
    }
    Ok(result)
}

/// What came of a script.
#[derive(Clone, Debug)]
pub struct Answers {
    results: Vec<Result<u64, Errno>>,
    data: Vec<u8>,
}

impl Answers {
    /// Returns what a call returned.
    ///
    /// # Errors
    /// The call's error.
    pub fn result(&self, call: CallId) -> Result<u64, Errno> {
        self.results[call.0]
    }

    /// Returns the bytes of a buffer as the calls left them.
    pub fn bytes(&self, buffer: Buffer) -> &[u8] {
        &self.data[buffer.offset..buffer.offset + buffer.len]
    }

    /// Reads a value from a buffer of its size.
    ///
    /// # Panics
    /// If the buffer is smaller than the value.
    pub fn value<T: FromBytes>(&self, buffer: Buffer) -> T {
        T::read_from_prefix(self.bytes(buffer)).expect("the buffer has the value's size").0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_holds_calls_data_and_references() {
        let mut script = Script::new();
        let path = script.string(c"/tmp");
        let open = script.call("open", 2, &[path.into(), 0.into()]);
        let close = script.attempt(3, &[open.into()]);
        let pointer = script.space(8);
        script.point(pointer, 0, path);
        let mut scratch = vec![0xff; 4096];
        script.write(&mut scratch, RemoteAddr(0x1000));
        let entry = |position: usize| {
            Entry::read_from_prefix(&scratch[position * size_of::<Entry>()..]).unwrap().0
        };
        assert_eq!(entry(0).number, 2);
        assert_eq!(entry(0).arguments[0], 0x1000 + 3 * size_of::<Entry>() as u64);
        let data = &scratch[3 * size_of::<Entry>() + 16..][..8];
        assert_eq!(data, entry(0).arguments[0].to_le_bytes());
        assert_eq!(entry(1).from_results, 1);
        assert_eq!(entry(2).number, END);
        assert_eq!(script.read(&scratch).unwrap_err(), (0, Errno::ECANCELED));

        let result_at =
            |position: usize| position * size_of::<Entry>() + std::mem::offset_of!(Entry, result);
        let mut answered = scratch.clone();
        answered[result_at(0)..][..8].copy_from_slice(&5_u64.to_le_bytes());
        answered[result_at(1)..][..8].copy_from_slice(&(-9_i64).to_le_bytes());
        let answers = script.read(&answered).unwrap();
        assert_eq!(answers.result(open), Ok(5));
        assert_eq!(answers.result(close), Err(Errno::EBADF));
        assert_eq!(answers.bytes(path), b"/tmp\0");
    }
}
