//! [`Scanner`]: cuts the arguments of opcodes out of a buffer, never past its end.

use super::PickleError;

/// A position in `src`. Every read is checked against the bytes left; nothing is copied.
pub(crate) struct Scanner<'a> {
    src: &'a [u8],
    pos: usize,
}

impl<'a> Scanner<'a> {
    pub(crate) fn new(src: &'a [u8]) -> Self {
        Self { src, pos: 0 }
    }

    pub(crate) fn position(&self) -> usize {
        self.pos
    }

    pub(crate) fn take(&mut self, count: usize) -> Result<&'a [u8], PickleError> {
        let rest = self.src.get(self.pos..).unwrap_or_default();
        let taken = rest.get(..count).ok_or(PickleError::Truncated { at: self.pos })?;
        self.pos += count;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], PickleError> {
        let at = self.pos;
        self.take(N)?.try_into().map_err(|_| PickleError::Truncated { at })
    }

    pub(crate) fn u8(&mut self) -> Result<u8, PickleError> {
        self.array::<1>().map(|[byte]| byte)
    }

    pub(crate) fn u16(&mut self) -> Result<u16, PickleError> {
        self.array().map(u16::from_le_bytes)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, PickleError> {
        self.array().map(u32::from_le_bytes)
    }

    pub(crate) fn i32(&mut self) -> Result<i32, PickleError> {
        self.array().map(i32::from_le_bytes)
    }

    pub(crate) fn f64_be(&mut self) -> Result<f64, PickleError> {
        self.array().map(f64::from_be_bytes)
    }

    /// Bytes behind a 1-byte length.
    pub(crate) fn short(&mut self) -> Result<&'a [u8], PickleError> {
        let count = self.u8()?;
        self.take(usize::from(count))
    }

    /// Bytes behind an unsigned 4-byte length.
    pub(crate) fn long(&mut self) -> Result<&'a [u8], PickleError> {
        let count = self.u32()?;
        self.take(count as usize)
    }

    /// Bytes behind a signed 4-byte length (`LONG4`, `BINSTRING`).
    pub(crate) fn long_signed(&mut self) -> Result<&'a [u8], PickleError> {
        let at = self.pos;
        let count = usize::try_from(self.i32()?).map_err(|_| PickleError::Number { at })?;
        self.take(count)
    }

    /// Bytes behind an 8-byte length.
    pub(crate) fn longest(&mut self) -> Result<&'a [u8], PickleError> {
        let at = self.pos;
        let count =
            usize::try_from(u64::from_le_bytes(self.array()?)).map_err(|_| PickleError::Truncated { at })?;
        self.take(count)
    }

    /// Bytes up to the next newline, which is consumed.
    pub(crate) fn line(&mut self) -> Result<&'a [u8], PickleError> {
        let rest = self.src.get(self.pos..).unwrap_or_default();
        let end = memchr::memchr(b'\n', rest).ok_or(PickleError::Truncated { at: self.pos })?;
        let line = rest.get(..end).unwrap_or_default();
        self.pos += end + 1;
        Ok(line)
    }
}

/// A decimal line that fits 64 bits.
pub(crate) fn decimal(line: &[u8], at: usize) -> Result<i64, PickleError> {
    std::str::from_utf8(line).ok().and_then(|text| text.trim().parse().ok()).ok_or(PickleError::Number { at })
}

/// The inside of a quoted `STRING` line, escapes undone as Python's `string_escape`.
pub(crate) fn unquote(line: &[u8], at: usize) -> Result<Vec<u8>, PickleError> {
    let line = line.trim_ascii_end();
    let ([b'\'', inner @ .., b'\''] | [b'"', inner @ .., b'"']) = line else {
        return Err(PickleError::Text { at });
    };
    let mut out = Vec::with_capacity(inner.len());
    let mut bytes = inner.iter().copied();
    while let Some(byte) = bytes.next() {
        if byte != b'\\' {
            out.push(byte);
            continue;
        }
        let escaped = bytes.next().ok_or(PickleError::Text { at })?;
        match escaped {
            b'\\' | b'\'' | b'"' => out.push(escaped),
            b'a' => out.push(7),
            b'b' => out.push(8),
            b't' => out.push(9),
            b'n' => out.push(10),
            b'v' => out.push(11),
            b'f' => out.push(12),
            b'r' => out.push(13),
            b'x' => {
                let pair = [bytes.next(), bytes.next()].map(|d| d.and_then(|d| char::from(d).to_digit(16)));
                let [Some(high), Some(low)] = pair else { return Err(PickleError::Text { at }) };
                out.push((high * 16 + low) as u8);
            }
            b'0'..=b'7' => {
                let mut code = u32::from(escaped - b'0');
                for _ in 0..2 {
                    let Some(digit @ b'0'..=b'7') = bytes.clone().next() else { break };
                    bytes.next();
                    code = code * 8 + u32::from(digit - b'0');
                }
                out.push(code as u8);
            }
            other => out.extend([b'\\', other]),
        }
    }
    Ok(out)
}

/// A `UNICODE` line (raw-unicode-escape: Latin-1 but for `\uXXXX` and `\UXXXXXXXX`).
pub(crate) fn raw_unicode(line: &[u8]) -> String {
    let mut out = String::with_capacity(line.len());
    let mut rest = line;
    while let [byte, tail @ ..] = rest {
        let digits = match (byte, tail.first()) {
            (b'\\', Some(b'u')) => 4,
            (b'\\', Some(b'U')) => 8,
            _ => 0,
        };
        let code = (digits > 0)
            .then(|| tail.get(1..=digits))
            .flatten()
            .and_then(|hex| std::str::from_utf8(hex).ok())
            .and_then(|hex| u32::from_str_radix(hex, 16).ok());
        match code {
            Some(code) => {
                out.push(char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER));
                rest = tail.get(1 + digits..).unwrap_or_default();
            }
            None => {
                out.push(char::from(*byte));
                rest = tail;
            }
        }
    }
    out
}
