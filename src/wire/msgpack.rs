//! msgpack → [`Value`], as `M5` uses it: arrays are tuples, `str` is text, `bin` is bytes, no extension types.

use bytes::Bytes;
use rmp::Marker;

use super::WireError;
use crate::limits::MAX_DEPTH;
use crate::pickle::Value;

/// Decodes the one value that `src` consists of. Byte strings share its buffer.
///
/// # Errors
/// [`WireError::Msgpack`], also for bytes behind the value, extension types, text that is no UTF-8, and beyond
/// [`MAX_DEPTH`] or `max_values`.
pub(super) fn decode(src: &Bytes, max_values: usize) -> Result<Value, WireError> {
    let mut reader = Reader { src, pos: 0, values: 0, max_values };
    let value = reader.value(0)?;
    if reader.pos != src.len() {
        return Err(reader.error("something follows the message"));
    }
    Ok(value)
}

struct Reader<'a> {
    src: &'a Bytes,
    pos: usize,
    values: usize,
    max_values: usize,
}

impl<'a> Reader<'a> {
    fn error(&self, problem: &'static str) -> WireError {
        WireError::Msgpack { at: self.pos, problem }
    }

    fn take(&mut self, count: usize) -> Result<&'a [u8], WireError> {
        let rest = self.src.get(self.pos..).unwrap_or_default();
        let taken = rest.get(..count).ok_or_else(|| self.error("it ends early"))?;
        self.pos += count;
        Ok(taken)
    }

    /// A big-endian unsigned number of `N` bytes.
    fn number<const N: usize>(&mut self) -> Result<u64, WireError> {
        let bytes = self.take(N)?;
        Ok(bytes.iter().fold(0, |number, byte| number << 8 | u64::from(*byte)))
    }

    /// A big-endian length of `N` bytes.
    fn length<const N: usize>(&mut self) -> Result<usize, WireError> {
        Ok(self.number::<N>()? as usize)
    }

    fn value(&mut self, depth: usize) -> Result<Value, WireError> {
        self.values += 1;
        if depth > MAX_DEPTH || self.values > self.max_values {
            return Err(self.error("too many values or too deep nesting"));
        }
        let marker = Marker::from_u8(self.number::<1>()? as u8);
        Ok(match marker {
            Marker::Null => Value::None,
            Marker::True => Value::Bool(true),
            Marker::False => Value::Bool(false),
            Marker::FixPos(number) => Value::Int(i64::from(number)),
            Marker::FixNeg(number) => Value::Int(i64::from(number)),
            Marker::U8 => Value::from(self.number::<1>()?),
            Marker::U16 => Value::from(self.number::<2>()?),
            Marker::U32 => Value::from(self.number::<4>()?),
            Marker::U64 => Value::from(self.number::<8>()?),
            Marker::I8 => Value::Int(i64::from(self.number::<1>()? as i8)),
            Marker::I16 => Value::Int(i64::from(self.number::<2>()? as i16)),
            Marker::I32 => Value::Int(i64::from(self.number::<4>()? as i32)),
            Marker::I64 => Value::Int(self.number::<8>()? as i64),
            Marker::F32 => Value::Float(f64::from(f32::from_bits(self.number::<4>()? as u32))),
            Marker::F64 => Value::Float(f64::from_bits(self.number::<8>()?)),
            Marker::FixStr(length) => self.text(usize::from(length))?,
            Marker::Str8 => self.length::<1>().and_then(|length| self.text(length))?,
            Marker::Str16 => self.length::<2>().and_then(|length| self.text(length))?,
            Marker::Str32 => self.length::<4>().and_then(|length| self.text(length))?,
            Marker::Bin8 => self.length::<1>().and_then(|length| self.bytes(length))?,
            Marker::Bin16 => self.length::<2>().and_then(|length| self.bytes(length))?,
            Marker::Bin32 => self.length::<4>().and_then(|length| self.bytes(length))?,
            Marker::FixArray(count) => self.array(usize::from(count), depth)?,
            Marker::Array16 => self.length::<2>().and_then(|count| self.array(count, depth))?,
            Marker::Array32 => self.length::<4>().and_then(|count| self.array(count, depth))?,
            Marker::FixMap(count) => self.map(usize::from(count), depth)?,
            Marker::Map16 => self.length::<2>().and_then(|count| self.map(count, depth))?,
            Marker::Map32 => self.length::<4>().and_then(|count| self.map(count, depth))?,
            _ => return Err(self.error("a type that ZEO does not use")),
        })
    }

    fn text(&mut self, length: usize) -> Result<Value, WireError> {
        let bytes = self.take(length)?;
        let text = std::str::from_utf8(bytes).map_err(|_| self.error("text that is no UTF-8"))?;
        Ok(Value::Str(text.to_owned()))
    }

    fn bytes(&mut self, length: usize) -> Result<Value, WireError> {
        let bytes = self.take(length)?;
        Ok(Value::Bytes(self.src.slice_ref(bytes)))
    }

    /// How many items may be expected: each has at least one byte.
    fn expected(&self, count: usize) -> Result<usize, WireError> {
        if count > self.src.len() - self.pos {
            return Err(self.error("it announces more items than it has bytes"));
        }
        Ok(count)
    }

    fn array(&mut self, count: usize, depth: usize) -> Result<Value, WireError> {
        let count = self.expected(count)?;
        (0..count).map(|_| self.value(depth + 1)).collect::<Result<_, _>>().map(Value::Tuple)
    }

    fn map(&mut self, count: usize, depth: usize) -> Result<Value, WireError> {
        let count = self.expected(count)?;
        (0..count)
            .map(|_| Ok((self.value(depth + 1)?, self.value(depth + 1)?)))
            .collect::<Result<_, WireError>>()
            .map(Value::Dict)
    }
}
