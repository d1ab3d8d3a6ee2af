//! Straight-line codec of the messages that make up most traffic: `loadBefore` and its answer, `storea`, blob chunks; in
//! `M5` also invalidations.
//!
//! Decoding compares the frame with the exact bytes that ZEO's Python client and server and this crate write, and cuts
//! the variable parts; anything that differs in any byte is left (`None`) to the general path, which gives the same
//! result for frames that both understand. Encoding writes the same bytes as the general path.
//!
//! Cost of a load: its request 25 to 40 ns to write and 60 to 70 to read, its answer 35 to write (and a copy of its data)
//! and 50 to 60 to read (`benches/codec.rs`); no allocation but growth of the output buffer.

use bytes::{BufMut, Bytes, BytesMut};

use super::{Call, Encoding, MessageId, Notice, Request, ServerMessage};
use crate::ids::{Oid, Tid};
use crate::pickle::Value;

/// The constant parts of the messages, in one encoding. `E` is what stands before 8 bytes.
struct Template {
    eight: [u8; 2],
    /// Before the id of a load.
    load_id: &'static [u8],
    /// Between the id of a load and its arguments.
    load_name: &'static [u8],
    load_end: &'static [u8],
    /// Between the id of a load and its answer.
    loaded: &'static [u8],
    loaded_none: u8,
    loaded_end: &'static [u8],
    store: &'static [u8],
    store_end: &'static [u8],
    upload: &'static [u8],
    upload_end: &'static [u8],
    download: &'static [u8],
    download_end: &'static [u8],
}

const PICKLE: Template = Template {
    eight: *b"C\x08",
    load_id: b"\x80\x03(",
    load_name: b"\x86\x89X\x0a\0\0\0loadBefore",
    load_end: b"\x86t.",
    loaded: b"\x86K\0X\x06\0\0\0.reply",
    loaded_none: b'N',
    loaded_end: b"\x87t.",
    store: b"\x80\x03(K\0\x88X\x06\0\0\0storea(",
    store_end: b"tt.",
    upload: b"\x80\x03(K\0\x88X\x0e\0\0\0storeBlobChunk",
    upload_end: b"\x85t.",
    download: b"\x80\x03(K\0\x88X\x10\0\0\0receiveBlobChunk",
    download_end: b"\x87t.",
};

const MSGPACK: Template = Template {
    eight: *b"\xc4\x08",
    load_id: b"\x94\x92",
    load_name: b"\xc2\xaaloadBefore\x92",
    load_end: b"",
    loaded: b"\0\xa6.reply\x93",
    loaded_none: 0xc0,
    loaded_end: b"",
    store: b"\x94\0\xc3\xa6storea\x94",
    store_end: b"",
    upload: b"\x94\0\xc3\xaestoreBlobChunk\x91",
    upload_end: b"",
    download: b"\x94\0\xc3\xb0receiveBlobChunk\x93",
    download_end: b"",
};

impl Template {
    const fn of(encoding: Encoding) -> &'static Self {
        match encoding {
            Encoding::Pickle => &PICKLE,
            Encoding::Msgpack => &MSGPACK,
        }
    }
}

pub(super) fn request(encoding: Encoding, frame: &Bytes) -> Option<Request> {
    let template = Template::of(encoding);
    let cut = || Cut { encoding, template, frame, pos: 0 };
    // The id tells the kinds apart within the first few bytes.
    load_before(cut()).or_else(|| store(cut())).or_else(|| upload(cut()))
}

fn load_before(mut cut: Cut<'_>) -> Option<Request> {
    cut.literal(cut.template.load_id)?;
    let (oid, before) = (Oid(cut.eight()?), Tid(cut.eight()?));
    cut.literal(cut.template.load_name)?;
    let call = Call::LoadBefore { oid: Oid(cut.eight()?), before: Tid(cut.eight()?) };
    cut.end(cut.template.load_end)?;
    Some(Request { id: MessageId::Load { oid, before }, is_async: false, call: Ok(call) })
}

fn store(mut cut: Cut<'_>) -> Option<Request> {
    cut.literal(cut.template.store)?;
    let (oid, serial) = (Oid(cut.eight()?), Tid(cut.eight()?));
    let data = cut.bytes()?;
    let txn = Value::Int(cut.int()?);
    cut.end(cut.template.store_end)?;
    Some(one_way(Call::Storea { oid, serial, data, txn }))
}

fn upload(mut cut: Cut<'_>) -> Option<Request> {
    cut.literal(cut.template.upload)?;
    let chunk = cut.bytes()?;
    cut.end(cut.template.upload_end)?;
    Some(one_way(Call::StoreBlobChunk { chunk }))
}

fn one_way(call: Call) -> Request {
    Request { id: MessageId::Seq(0), is_async: true, call: Ok(call) }
}

pub(super) fn server_message(encoding: Encoding, frame: &Bytes) -> Option<ServerMessage> {
    let template = Template::of(encoding);
    let cut = || Cut { encoding, template, frame, pos: 0 };
    loaded(cut()).or_else(|| invalidation(cut())).or_else(|| download(cut()))
}

fn loaded(mut cut: Cut<'_>) -> Option<ServerMessage> {
    cut.literal(cut.template.load_id)?;
    let (oid, before) = (Oid(cut.eight()?), Tid(cut.eight()?));
    cut.literal(cut.template.loaded)?;
    let (data, tid) = (cut.bytes()?, Tid(cut.eight()?));
    let end_tid = match cut.literal(&[cut.template.loaded_none]) {
        Some(()) => None,
        None => Some(Tid(cut.eight()?)),
    };
    cut.end(cut.template.loaded_end)?;
    Some(ServerMessage::Loaded { oid, before, loaded: Some((data, tid, end_tid)) })
}

/// `M5` only: as a pickle a list has several forms.
fn invalidation(mut cut: Cut<'_>) -> Option<ServerMessage> {
    if cut.encoding != Encoding::Msgpack {
        return None;
    }
    cut.literal(b"\x94\0\xc3\xb5invalidateTransaction\x92")?;
    let tid = Tid(cut.eight()?);
    let [kind] = cut.number()?;
    let count = match kind {
        0x90..=0x9f => usize::from(kind & 0xf),
        0xdc => usize::from(u16::from_be_bytes(cut.number()?)),
        0xdd => u32::from_be_bytes(cut.number()?) as usize,
        _ => return None,
    };
    // Nothing is allocated for oids that are not there.
    if cut.frame.len() - cut.pos != count.checked_mul(10)? {
        return None;
    }
    let oids = (0..count).map(|_| cut.eight().map(Oid)).collect::<Option<Vec<_>>>()?;
    Some(ServerMessage::Notice(Notice::InvalidateTransaction { tid, oids }))
}

fn download(mut cut: Cut<'_>) -> Option<ServerMessage> {
    cut.literal(cut.template.download)?;
    let (oid, serial) = (Oid(cut.eight()?), Tid(cut.eight()?));
    let chunk = cut.bytes()?;
    cut.end(cut.template.download_end)?;
    Some(ServerMessage::Notice(Notice::ReceiveBlobChunk { oid, serial, chunk }))
}

/// A position in a frame that is being compared.
struct Cut<'a> {
    encoding: Encoding,
    template: &'static Template,
    frame: &'a Bytes,
    pos: usize,
}

impl<'a> Cut<'a> {
    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let taken = self.frame.get(self.pos..)?.get(..count)?;
        self.pos += count;
        Some(taken)
    }

    fn number<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.take(N)?.try_into().ok()
    }

    /// Steps over `expected`, or stays.
    fn literal(&mut self, expected: &[u8]) -> Option<()> {
        self.frame.get(self.pos..)?.starts_with(expected).then(|| self.pos += expected.len())
    }

    fn end(&mut self, expected: &[u8]) -> Option<()> {
        self.literal(expected)?;
        (self.pos == self.frame.len()).then_some(())
    }

    /// A byte string of 8 bytes, as a number.
    fn eight(&mut self) -> Option<u64> {
        let [kind, length, digits @ ..] = self.number::<10>()?;
        ([kind, length] == self.template.eight).then_some(u64::from_be_bytes(digits))
    }

    fn bytes(&mut self) -> Option<Bytes> {
        let [kind] = self.number()?;
        let count = match (self.encoding, kind) {
            (Encoding::Pickle, b'C') | (Encoding::Msgpack, 0xc4) => {
                usize::from(u8::from_be_bytes(self.number()?))
            }
            (Encoding::Pickle, b'B') => u32::from_le_bytes(self.number()?) as usize,
            (Encoding::Msgpack, 0xc5) => usize::from(u16::from_be_bytes(self.number()?)),
            (Encoding::Msgpack, 0xc6) => u32::from_be_bytes(self.number()?) as usize,
            _ => return None,
        };
        let start = self.pos;
        self.take(count)?;
        Some(self.frame.slice(start..self.pos))
    }

    /// A non-negative integer, as `id()` gives it.
    fn int(&mut self) -> Option<i64> {
        let [kind] = self.number()?;
        match (self.encoding, kind) {
            (Encoding::Pickle, b'K') => self.number().map(|[byte]| i64::from(byte)),
            (Encoding::Pickle, b'M') => self.number().map(|digits| i64::from(u16::from_le_bytes(digits))),
            (Encoding::Pickle, b'J') => self.number().map(|digits| i64::from(i32::from_le_bytes(digits))),
            (Encoding::Pickle, 0x8a) => {
                let [count] = self.number()?;
                match Value::from_le_digits(self.take(usize::from(count))?) {
                    Value::Int(number) => Some(number),
                    _ => None,
                }
            }
            (Encoding::Msgpack, 0..0x80) => Some(i64::from(kind)),
            (Encoding::Msgpack, 0xcc) => self.number().map(|[byte]| i64::from(byte)),
            (Encoding::Msgpack, 0xcd) => self.number().map(|digits| i64::from(u16::from_be_bytes(digits))),
            (Encoding::Msgpack, 0xce) => self.number().map(|digits| i64::from(u32::from_be_bytes(digits))),
            (Encoding::Msgpack, 0xcf) => i64::try_from(u64::from_be_bytes(self.number()?)).ok(),
            _ => None,
        }
    }
}

/// Appends `(oid, before)` twice: as id and as arguments.
pub(super) fn put_load_before(encoding: Encoding, oid: Oid, before: Tid, out: &mut BytesMut) {
    let template = Template::of(encoding);
    let length = template.load_id.len() + template.load_name.len() + template.load_end.len() + 40;
    out.reserve(4 + length);
    out.put_u32(length as u32);
    out.put_slice(template.load_id);
    put_pair(template, oid, before, out);
    out.put_slice(template.load_name);
    put_pair(template, oid, before, out);
    out.put_slice(template.load_end);
}

/// Appends the answer to a load; `false` if its data is too long for this path (1 GiB).
pub(super) fn put_loaded(
    encoding: Encoding,
    oid: Oid,
    before: Tid,
    data: &[u8],
    tid: Tid,
    end_tid: Option<Tid>,
    out: &mut BytesMut,
) -> bool {
    let template = Template::of(encoding);
    let Some((head, head_length)) = bytes_head(encoding, data.len()) else { return false };
    let Some(head) = head.get(..head_length) else { return false };
    let end_length = if end_tid.is_some() { 10 } else { 1 };
    let constant = template.load_id.len() + template.loaded.len() + template.loaded_end.len();
    let length = constant + 30 + end_length + head_length + data.len();
    out.reserve(4 + length);
    out.put_u32(length as u32);
    out.put_slice(template.load_id);
    put_pair(template, oid, before, out);
    out.put_slice(template.loaded);
    out.put_slice(head);
    out.put_slice(data);
    out.put_slice(&template.eight);
    out.put_u64(tid.0);
    match end_tid {
        Some(end_tid) => {
            out.put_slice(&template.eight);
            out.put_u64(end_tid.0);
        }
        None => out.put_u8(template.loaded_none),
    }
    out.put_slice(template.loaded_end);
    true
}

/// Appends a `storeBlobChunk` up to its `length` bytes, which must follow, and then [`upload_end`].
pub(super) fn put_upload_head(encoding: Encoding, length: usize, out: &mut BytesMut) -> bool {
    let template = Template::of(encoding);
    let Some((head, head_length)) = bytes_head(encoding, length) else { return false };
    let Some(head) = head.get(..head_length) else { return false };
    let frame = template.upload.len() + head_length + length + template.upload_end.len();
    out.put_u32(frame as u32);
    out.put_slice(template.upload);
    out.put_slice(head);
    true
}

/// What follows the bytes of a `storeBlobChunk`.
pub(super) fn upload_end(encoding: Encoding) -> &'static [u8] {
    Template::of(encoding).upload_end
}

fn put_pair(template: &Template, oid: Oid, before: Tid, out: &mut BytesMut) {
    out.put_slice(&template.eight);
    out.put_u64(oid.0);
    out.put_slice(&template.eight);
    out.put_u64(before.0);
}

/// What stands before a byte string of this length, and how many of the bytes returned that is.
fn bytes_head(encoding: Encoding, length: usize) -> Option<([u8; 5], usize)> {
    let length = u32::try_from(length).ok().filter(|length| *length <= 1 << 30)?;
    let [a, b, c, d] = length.to_be_bytes();
    Some(match (encoding, length) {
        (Encoding::Pickle, 0..=0xff) => ([b'C', d, 0, 0, 0], 2),
        (Encoding::Pickle, _) => ([b'B', d, c, b, a], 5),
        (Encoding::Msgpack, 0..=0xff) => ([0xc4, d, 0, 0, 0], 2),
        (Encoding::Msgpack, 0x100..=0xffff) => ([0xc5, c, d, 0, 0], 3),
        (Encoding::Msgpack, _) => ([0xc6, a, b, c, d], 5),
    })
}
