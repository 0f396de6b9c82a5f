//! Scripts: lists of system calls for another process to make.
//!
//! The injected code (`arch::native`) walks a table: an array of [`Entry`], followed by the bytes
//! that arguments point to. The layout is private to rcriu, which contains both sides of it.

use std::{borrow::Cow, ffi::CStr};

use nix::{errno::Errno, libc};
use zerocopy::{FromBytes, IntoBytes};

use crate::{
    arch::{ARGUMENTS, Entry},
    units::{LocalPid, RemoteAddr},
};

/// Results from this value on are negated error numbers (`include/linux/err.h`).
const FIRST_ERROR: u64 = (-4095_i64).cast_unsigned();

/// The value of [`Entry::result`] before the call is made.
const NOT_MADE: u64 = u64::MAX - 0xdead;

/// The flag for a call whose failure ends the script.
const MUST_SUCCEED: u64 = 1;

/// The alignment of data: enough for every kernel structure.
const ALIGN: usize = 16;

/// The call number that ends the table.
pub(super) const END: u64 = u64::MAX;

/// The call number of a pause: the thread stops and rcriu acts.
const PAUSE: i64 = -2;

/// A call of a script.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CallId(usize);

/// A piece of a script's data, which calls read or write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    offset: usize,
    len: usize,
}

/// An argument of a call.
#[derive(Clone, Copy, Debug)]
pub enum Arg {
    /// A number.
    Value(u64),
    /// The address of these bytes.
    Pointer(Buffer),
    /// The result of an earlier call.
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

impl From<LocalPid> for Arg {
    fn from(pid: LocalPid) -> Self {
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

/// A list of system calls, with their data.
#[derive(Clone, Debug, Default)]
pub struct Script {
    calls: Vec<Call>,
    data: Vec<u8>,
    /// Offsets in the data that will hold the address of other data.
    pointers: Vec<(usize, Buffer)>,
}

impl Script {
    /// Returns an empty script.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether the script has no calls.
    pub fn is_empty(&self) -> bool {
        self.calls.is_empty()
    }

    /// Returns the number of calls.
    pub fn len(&self) -> usize {
        self.calls.len()
    }

    /// Returns the size of the script's table in bytes.
    pub fn bytes_needed(&self) -> usize {
        (self.calls.len() + 1) * size_of::<Entry>() + self.data.len()
    }

    /// Adds a call that must succeed: its failure ends the script and returns an error with the
    /// purpose `what`. Missing arguments are 0.
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

    /// Adds a call that may fail; see [`Answers::result`].
    ///
    /// # Panics
    /// With more than six arguments.
    pub fn attempt(&mut self, number: libc::c_long, arguments: &[Arg]) -> CallId {
        self.push("".into(), number, arguments, false)
    }

    /// Adds a pause: the thread stops, so that rcriu can act on the answers so far, and then
    /// continues. If rcriu is killed, the thread continues by itself.
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

    /// Adds a string with its NUL byte.
    pub fn string(&mut self, text: &CStr) -> Buffer {
        self.bytes(text.to_bytes_with_nul())
    }

    /// Adds zeroed space for a call to write to.
    pub fn space(&mut self, len: usize) -> Buffer {
        let offset = self.data.len().next_multiple_of(ALIGN);
        self.data.resize(offset + len, 0);
        Buffer { offset, len }
    }

    /// Stores the address of `target` in the eight bytes at `offset` in `buffer`.
    ///
    /// # Panics
    /// If they are not inside the buffer.
    pub fn point(&mut self, buffer: Buffer, offset: usize, target: Buffer) {
        assert!(offset + size_of::<u64>() <= buffer.len, "the pointer is within the buffer");
        self.pointers.push((buffer.offset + offset, target));
    }

    /// Writes the table to `scratch`, which will be at `address` in the other process and has at
    /// least [`Self::bytes_needed`] bytes.
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

    /// Reads the answers from a table that was walked.
    ///
    /// # Errors
    /// The position and the error of the first failed call that must succeed.
    pub(super) fn read(&self, scratch: &[u8]) -> Result<Answers, (usize, Errno)> {
        let result = |position: usize| {
            let at = position * size_of::<Entry>();
            Entry::read_from_prefix(&scratch[at..]).expect("it was written").0.result
        };
        let results: Vec<_> = (0..self.calls.len()).map(result).collect();
        let data_at = (self.calls.len() + 1) * size_of::<Entry>();
        self.conclude(&results, scratch[data_at..data_at + self.data.len()].to_vec())
    }

    /// Makes the calls one by one through `call`, which receives number and arguments. The data
    /// is at `address`. Returns the results in the form of the table.
    ///
    /// # Errors
    /// Those of `call` and `at_pause`.
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

    /// Returns the data, with its pointers set for the `address` that it will have.
    pub(super) fn data(&self, address: RemoteAddr) -> Vec<u8> {
        let mut data = self.data.clone();
        for (place, target) in &self.pointers {
            let pointer = address.plus(target.offset as u64).0.to_le_bytes();
            data[*place..place + pointer.len()].copy_from_slice(&pointer);
        }
        data
    }

    /// Combines the results of all calls and the data into answers.
    ///
    /// # Errors
    /// Like [`Self::read`].
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

    /// Returns the purpose of a call.
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

/// The results of a script's calls, and its data afterwards.
#[derive(Clone, Debug)]
pub struct Answers {
    results: Vec<Result<u64, Errno>>,
    data: Vec<u8>,
}

impl Answers {
    /// Returns the result of a call.
    ///
    /// # Errors
    /// The call's error.
    pub fn result(&self, call: CallId) -> Result<u64, Errno> {
        self.results[call.0]
    }

    /// Returns the bytes of a buffer after the calls.
    pub fn bytes(&self, buffer: Buffer) -> &[u8] {
        &self.data[buffer.offset..buffer.offset + buffer.len]
    }

    /// Reads a value from a buffer.
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
