//! [`Value`] → pickle protocol 3, byte for byte as `zodbpickle`'s C pickler writes it.
//!
//! Two modes: without memo (`Pickler.fast`, the messages of encoding `Z5`) and with memo entries behind everything that
//! Python memoizes (the extension that ZODB stores in a transaction record, index files).

use bytes::{BufMut, Bytes, BytesMut};

use super::opcode as op;
use super::{PickleError, Value};
use crate::limits::MAX_DEPTH;

/// Python's picklers write at most this many items behind one `APPENDS` or `SETITEMS`.
const BATCH: usize = 1000;

/// Appends the pickle of `value` without memo, as in messages.
///
/// # Errors
/// Nesting beyond [`MAX_DEPTH`], or a length beyond 32 bits. `out` then holds a part of the pickle.
pub fn encode(value: &Value, out: &mut BytesMut) -> Result<(), PickleError> {
    out.put_slice(&[op::PROTO, 3]);
    Writer::without_memo(out).value(value, 0)?;
    out.put_u8(op::STOP);
    Ok(())
}

/// Appends the pickle of `value` with memo entries, as `zodbpickle.dumps(value, 3)` does.
///
/// # Errors
/// As [`encode()`].
pub fn encode_with_memo(value: &Value, out: &mut BytesMut) -> Result<(), PickleError> {
    out.put_slice(&[op::PROTO, 3]);
    Writer { out, memo: Some(Memo::default()) }.value(value, 0)?;
    out.put_u8(op::STOP);
    Ok(())
}

/// The extension of a transaction as ZODB stores it: the pickled dict, or nothing for an empty one.
///
/// # Errors
/// As [`encode()`].
pub fn encode_extension(extension: &Value) -> Result<Bytes, PickleError> {
    if !extension.is_truthy() {
        return Ok(Bytes::new());
    }
    let mut out = BytesMut::new();
    encode_with_memo(extension, &mut out)?;
    Ok(out.freeze())
}

/// What the pickler has memoized.
#[derive(Default)]
struct Memo {
    next: u32,
    /// Values of which Python has only one instance (classes, empty and one-character Latin-1 text, empty and
    /// one-byte bytes): after the first, the pickler writes a reference.
    singletons: Vec<(Value, u32)>,
}

/// Writes the opcodes of single values.
pub(crate) struct Writer<'a> {
    out: &'a mut BytesMut,
    memo: Option<Memo>,
}

impl<'a> Writer<'a> {
    pub(crate) fn without_memo(out: &'a mut BytesMut) -> Self {
        Self { out, memo: None }
    }

    /// Where it writes to, for a caller that writes the items of a list or dict.
    pub(crate) fn out(&mut self) -> &mut BytesMut {
        self.out
    }

    pub(crate) fn none(&mut self) {
        self.out.put_u8(op::NONE);
    }

    pub(crate) fn bool(&mut self, flag: bool) {
        self.out.put_u8(if flag { op::NEWTRUE } else { op::NEWFALSE });
    }

    pub(crate) fn int(&mut self, number: i64) {
        if let Ok(small) = u8::try_from(number) {
            self.out.put_slice(&[op::BININT1, small]);
        } else if let Ok(short) = u16::try_from(number) {
            self.out.put_u8(op::BININT2);
            self.out.put_u16_le(short);
        } else if let Ok(word) = i32::try_from(number) {
            self.out.put_u8(op::BININT);
            self.out.put_i32_le(word);
        } else {
            let digits = number.to_le_bytes();
            let digits = Value::minimal_digits(&digits);
            self.out.put_slice(&[op::LONG1, digits.len() as u8]);
            self.out.put_slice(digits);
        }
    }

    fn big_int(&mut self, digits: &[u8]) -> Result<(), PickleError> {
        if let Ok(count) = u8::try_from(digits.len()) {
            self.out.put_slice(&[op::LONG1, count]);
        } else {
            self.out.put_u8(op::LONG4);
            self.out.put_i32_le(i32::try_from(digits.len()).map_err(|_| PickleError::TooLong)?);
        }
        self.out.put_slice(digits);
        Ok(())
    }

    pub(crate) fn float(&mut self, number: f64) {
        self.out.put_u8(op::BINFLOAT);
        self.out.put_f64(number);
    }

    pub(crate) fn bytes(&mut self, bytes: &[u8]) -> Result<(), PickleError> {
        if let Ok(count) = u8::try_from(bytes.len()) {
            self.out.put_slice(&[op::SHORT_BINBYTES, count]);
        } else {
            self.out.put_u8(op::BINBYTES);
            self.out.put_u32_le(u32::try_from(bytes.len()).map_err(|_| PickleError::TooLong)?);
        }
        self.out.put_slice(bytes);
        Ok(())
    }

    pub(crate) fn str(&mut self, text: &str) -> Result<(), PickleError> {
        self.out.put_u8(op::BINUNICODE);
        self.out.put_u32_le(u32::try_from(text.len()).map_err(|_| PickleError::TooLong)?);
        self.out.put_slice(text.as_bytes());
        Ok(())
    }

    /// To be written before the items of a tuple of `count`.
    pub(crate) fn open_tuple(&mut self, count: usize) {
        if count > 3 {
            self.out.put_u8(op::MARK);
        }
    }

    /// To be written behind the items of a tuple of `count`.
    pub(crate) fn close_tuple(&mut self, count: usize) {
        self.out.put_u8(match count {
            0 => op::EMPTY_TUPLE,
            1 => op::TUPLE1,
            2 => op::TUPLE2,
            3 => op::TUPLE3,
            _ => op::TUPLE,
        });
    }

    /// A list whose items `write` writes.
    pub(crate) fn list<T, E>(
        &mut self,
        items: &[T],
        write: impl FnMut(&mut Self, &T) -> Result<(), E>,
    ) -> Result<(), E> {
        self.out.put_u8(op::EMPTY_LIST);
        self.put();
        self.batches(items, op::APPEND, op::APPENDS, write)
    }

    /// A dict whose pairs `write` writes.
    pub(crate) fn dict<T, E>(
        &mut self,
        pairs: &[T],
        write: impl FnMut(&mut Self, &T) -> Result<(), E>,
    ) -> Result<(), E> {
        self.out.put_u8(op::EMPTY_DICT);
        self.put();
        self.batches(pairs, op::SETITEM, op::SETITEMS, write)
    }

    fn batches<T, E>(
        &mut self,
        items: &[T],
        single: u8,
        several: u8,
        mut write: impl FnMut(&mut Self, &T) -> Result<(), E>,
    ) -> Result<(), E> {
        if let [only] = items {
            write(self, only)?;
            self.out.put_u8(single);
            return Ok(());
        }
        for batch in items.chunks(BATCH) {
            self.out.put_u8(op::MARK);
            for item in batch {
                write(self, item)?;
            }
            self.out.put_u8(several);
        }
        Ok(())
    }

    /// Any value, classes and calls as such, at this depth of nesting.
    pub(crate) fn value(&mut self, value: &Value, depth: usize) -> Result<(), PickleError> {
        if depth > MAX_DEPTH {
            return Err(PickleError::TooDeep);
        }
        if self.refer(value) {
            return Ok(());
        }
        match value {
            Value::None => self.none(),
            Value::Bool(flag) => self.bool(*flag),
            Value::Int(number) => self.int(*number),
            Value::BigInt(digits) => self.big_int(digits)?,
            Value::Float(number) => self.float(*number),
            Value::Bytes(bytes) => {
                self.bytes(bytes)?;
                self.put_singleton(value, bytes.len() < 2);
            }
            Value::Str(text) => {
                self.str(text)?;
                self.put_singleton(value, is_singleton_text(text));
            }
            Value::Tuple(items) => {
                self.open_tuple(items.len());
                for item in items {
                    self.value(item, depth + 1)?;
                }
                self.close_tuple(items.len());
                if !items.is_empty() {
                    self.put();
                }
            }
            Value::List(items) => self.list(items, |writer, item| writer.value(item, depth + 1))?,
            Value::Dict(pairs) => self.dict(pairs, |writer, (key, value)| {
                writer.value(key, depth + 1)?;
                writer.value(value, depth + 1)
            })?,
            Value::Global { module, name } => {
                // A line break cannot be part of a name here: it would change what follows.
                if module.contains('\n') || name.contains('\n') {
                    return Err(PickleError::Global { module: module.clone(), name: name.clone() });
                }
                self.out.put_u8(op::GLOBAL);
                for line in [module, name] {
                    self.out.put_slice(line.as_bytes());
                    self.out.put_u8(b'\n');
                }
                self.put_singleton(value, true);
            }
            Value::Call { callable, args, state } => {
                self.value(callable, depth + 1)?;
                self.value(args, depth + 1)?;
                self.out.put_u8(call_opcode(callable, args));
                self.put();
                if let Some(state) = state {
                    self.value(state, depth + 1)?;
                    self.out.put_u8(op::BUILD);
                }
            }
        }
        Ok(())
    }

    /// Writes a reference if `value` is a singleton written before.
    fn refer(&mut self, value: &Value) -> bool {
        let Some(memo) = &self.memo else { return false };
        let Some((_, index)) = memo.singletons.iter().find(|(seen, _)| seen == value) else { return false };
        match u8::try_from(*index) {
            Ok(index) => self.out.put_slice(&[op::BINGET, index]),
            Err(_) => {
                self.out.put_u8(op::LONG_BINGET);
                self.out.put_u32_le(*index);
            }
        }
        true
    }

    fn put_singleton(&mut self, value: &Value, is_singleton: bool) {
        if let (Some(memo), true) = (&mut self.memo, is_singleton) {
            memo.singletons.push((value.clone(), memo.next));
        }
        self.put();
    }

    /// Gives what was just written the next memo entry.
    fn put(&mut self) {
        let Some(memo) = &mut self.memo else { return };
        match u8::try_from(memo.next) {
            Ok(index) => self.out.put_slice(&[op::BINPUT, index]),
            Err(_) => {
                self.out.put_u8(op::LONG_BINPUT);
                self.out.put_u32_le(memo.next);
            }
        }
        memo.next += 1;
    }
}

fn is_singleton_text(text: &str) -> bool {
    let mut chars = text.chars();
    match (chars.next(), chars.next()) {
        (None, _) => true,
        (Some(only), None) => u32::from(only) < 256,
        _ => false,
    }
}

/// Instances of classes are made by `NEWOBJ`, everything else by `REDUCE`. Among what a message may contain only
/// `ZopeUndo.Prefix.Prefix` is a class whose instances Python pickles so.
fn call_opcode(callable: &Value, args: &Value) -> u8 {
    match (callable, args) {
        (Value::Global { module, .. }, Value::Tuple(args))
            if module == "ZopeUndo.Prefix" && args.is_empty() =>
        {
            op::NEWOBJ
        }
        _ => op::REDUCE,
    }
}
