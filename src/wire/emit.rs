//! [`Emitter`]: one way to write the parts of a message, in either encoding.

use bytes::buf::Writer as IoWriter;
use bytes::{BufMut, BytesMut};

use super::{Encoding, WireError};
use crate::ids::{Oid, Tid};
use crate::limits::MAX_DEPTH;
use crate::pickle::encode::Writer;
use crate::pickle::{PickleError, Value};

/// What to do with values that the receiver could not read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Foreign {
    /// Calls (client to server): send classes and calls in `Z5`, refuse what `M5` has no form for.
    Keep,
    /// Replies: send readable text instead, because a Python client that cannot decode a reply hangs forever.
    Text,
}

/// Appends values to `out`.
///
/// Cost: one bounds check of `out` for each part; no intermediate buffer.
pub(super) struct Emitter<'a> {
    encoding: Encoding,
    foreign: Foreign,
    out: &'a mut BytesMut,
    depth: usize,
}

type Emitted = Result<(), WireError>;

impl<'a> Emitter<'a> {
    pub(super) fn new(encoding: Encoding, foreign: Foreign, out: &'a mut BytesMut) -> Self {
        Self { encoding, foreign, out, depth: 0 }
    }

    fn pickle(&mut self) -> Writer<'_> {
        Writer::without_memo(self.out)
    }

    fn msgpack(&mut self) -> IoWriter<&mut BytesMut> {
        (&mut *self.out).writer()
    }

    pub(super) fn none(&mut self) -> Emitted {
        match self.encoding {
            Encoding::Pickle => self.pickle().none(),
            Encoding::Msgpack => rmp::encode::write_nil(&mut self.msgpack()).map_err(unwritable)?,
        }
        Ok(())
    }

    pub(super) fn bool(&mut self, flag: bool) -> Emitted {
        match self.encoding {
            Encoding::Pickle => self.pickle().bool(flag),
            Encoding::Msgpack => rmp::encode::write_bool(&mut self.msgpack(), flag).map_err(unwritable)?,
        }
        Ok(())
    }

    pub(super) fn int(&mut self, number: i64) -> Emitted {
        match self.encoding {
            Encoding::Pickle => self.pickle().int(number),
            Encoding::Msgpack => {
                rmp::encode::write_sint(&mut self.msgpack(), number).map_err(unwritable)?;
            }
        }
        Ok(())
    }

    pub(super) fn float(&mut self, number: f64) -> Emitted {
        match self.encoding {
            Encoding::Pickle => self.pickle().float(number),
            Encoding::Msgpack => rmp::encode::write_f64(&mut self.msgpack(), number).map_err(unwritable)?,
        }
        Ok(())
    }

    pub(super) fn bytes(&mut self, bytes: &[u8]) -> Emitted {
        match self.encoding {
            Encoding::Pickle => self.pickle().bytes(bytes).map_err(unencodable)?,
            Encoding::Msgpack => {
                let count = msgpack_length(bytes.len())?;
                rmp::encode::write_bin_len(&mut self.msgpack(), count).map_err(unwritable)?;
                self.out.put_slice(bytes);
            }
        }
        Ok(())
    }

    pub(super) fn str(&mut self, text: &str) -> Emitted {
        match self.encoding {
            Encoding::Pickle => self.pickle().str(text).map_err(unencodable)?,
            Encoding::Msgpack => {
                let count = msgpack_length(text.len())?;
                rmp::encode::write_str_len(&mut self.msgpack(), count).map_err(unwritable)?;
                self.out.put_slice(text.as_bytes());
            }
        }
        Ok(())
    }

    pub(super) fn oid(&mut self, oid: Oid) -> Emitted {
        self.bytes(&oid.to_bytes())
    }

    pub(super) fn tid(&mut self, tid: Tid) -> Emitted {
        self.bytes(&tid.to_bytes())
    }

    /// `None`, or what `write` writes.
    pub(super) fn optional<T>(
        &mut self,
        value: Option<T>,
        write: impl FnOnce(&mut Self, T) -> Emitted,
    ) -> Emitted {
        match value {
            Some(value) => write(self, value),
            None => self.none(),
        }
    }

    /// A tuple of `count` items, which `write` writes.
    pub(super) fn tuple(&mut self, count: usize, write: impl FnOnce(&mut Self) -> Emitted) -> Emitted {
        match self.encoding {
            Encoding::Pickle => {
                self.pickle().open_tuple(count);
                self.deeper(write)?;
                self.pickle().close_tuple(count);
            }
            Encoding::Msgpack => {
                self.array(count)?;
                self.deeper(write)?;
            }
        }
        Ok(())
    }

    fn deeper(&mut self, write: impl FnOnce(&mut Self) -> Emitted) -> Emitted {
        self.depth += 1;
        let written = write(self);
        self.depth -= 1;
        written
    }

    fn array(&mut self, count: usize) -> Emitted {
        let count = msgpack_length(count)?;
        rmp::encode::write_array_len(&mut self.msgpack(), count).map_err(unwritable)?;
        Ok(())
    }

    /// A list (in `M5` the same as a tuple).
    pub(super) fn list<T>(
        &mut self,
        items: &[T],
        mut write: impl FnMut(&mut Emitter<'_>, &T) -> Emitted,
    ) -> Emitted {
        match self.encoding {
            Encoding::Pickle => {
                let (foreign, depth) = (self.foreign, self.depth + 1);
                self.pickle().list(items, |writer, item| {
                    let mut item_emitter =
                        Emitter { encoding: Encoding::Pickle, foreign, out: writer.out(), depth };
                    write(&mut item_emitter, item)
                })
            }
            Encoding::Msgpack => {
                self.array(items.len())?;
                self.deeper(|emitter| items.iter().try_for_each(|item| write(emitter, item)))
            }
        }
    }

    fn dict(&mut self, pairs: &[(Value, Value)]) -> Emitted {
        match self.encoding {
            Encoding::Pickle => {
                let (foreign, depth) = (self.foreign, self.depth + 1);
                self.pickle().dict(pairs, |writer, (key, value)| {
                    let mut emitter =
                        Emitter { encoding: Encoding::Pickle, foreign, out: writer.out(), depth };
                    emitter.value(key)?;
                    emitter.value(value)
                })
            }
            Encoding::Msgpack => {
                let count = msgpack_length(pairs.len())?;
                rmp::encode::write_map_len(&mut self.msgpack(), count).map_err(unwritable)?;
                self.deeper(|emitter| {
                    pairs.iter().try_for_each(|(key, value)| {
                        emitter.msgpack_key(key)?;
                        emitter.value(value)
                    })
                })
            }
        }
    }

    /// Python's msgpack reads maps with keys of text or bytes only.
    fn msgpack_key(&mut self, key: &Value) -> Emitted {
        match key {
            Value::Str(_) | Value::Bytes(_) => self.value(key),
            _ if self.foreign == Foreign::Text => self.str(&key.to_string()),
            _ => Err(WireError::Unencodable(format!(
                "the key {key} of a dict; in M5 it must be text or bytes"
            ))),
        }
    }

    /// Any value.
    ///
    /// Errors: nesting beyond [`MAX_DEPTH`], lengths beyond 32 bits, what [`Foreign`] says.
    pub(super) fn value(&mut self, value: &Value) -> Emitted {
        if self.depth > MAX_DEPTH {
            return Err(unencodable(PickleError::TooDeep));
        }
        match value {
            Value::None => self.none(),
            Value::Bool(flag) => self.bool(*flag),
            Value::Int(number) => self.int(*number),
            Value::BigInt(_) => self.big_int(value),
            Value::Float(number) => self.float(*number),
            Value::Bytes(bytes) => self.bytes(bytes),
            Value::Str(text) => self.str(text),
            Value::Tuple(items) => {
                self.tuple(items.len(), |emitter| items.iter().try_for_each(|item| emitter.value(item)))
            }
            Value::List(items) => self.list(items, |emitter, item| emitter.value(item)),
            Value::Dict(pairs) => self.dict(pairs),
            Value::Global { .. } | Value::Call { .. } => self.object(value),
        }
    }

    fn big_int(&mut self, value: &Value) -> Emitted {
        match (self.encoding, value.as_u64()) {
            (Encoding::Pickle, _) => self.pickled(value).map_err(unencodable),
            (Encoding::Msgpack, Some(number)) => {
                rmp::encode::write_uint(&mut self.msgpack(), number).map_err(unwritable)?;
                Ok(())
            }
            (Encoding::Msgpack, None) => self.object(value),
        }
    }

    fn pickled(&mut self, value: &Value) -> Result<(), PickleError> {
        let depth = self.depth;
        self.pickle().value(value, depth)
    }

    fn object(&mut self, value: &Value) -> Emitted {
        match (self.foreign, self.encoding) {
            (Foreign::Text, _) => self.str(&value.to_string()),
            (Foreign::Keep, Encoding::Pickle) => self.pickled(value).map_err(unencodable),
            (Foreign::Keep, Encoding::Msgpack) => {
                Err(WireError::Unencodable(format!("{value} has no form in M5")))
            }
        }
    }
}

fn msgpack_length(length: usize) -> Result<u32, WireError> {
    u32::try_from(length).map_err(|_| PickleError::TooLong).map_err(unencodable)
}

fn unencodable(error: PickleError) -> WireError {
    WireError::Unencodable(error.to_string())
}

/// Writing to memory does not fail.
fn unwritable(error: impl std::fmt::Debug) -> WireError {
    WireError::Unencodable(format!("{error:?}"))
}
