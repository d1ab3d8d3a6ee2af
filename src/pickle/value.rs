//! [`Value`]: the plain values of ZEO messages, transaction extensions and index files, in either encoding.

use std::fmt;

use bytes::Bytes;

use crate::ids::{Oid, Tid};

/// A decoded value. Classes and calls are kept as data.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    None,
    Bool(bool),
    Int(i64),
    /// Beyond `i64`: two's complement, little-endian, minimal.
    BigInt(Bytes),
    Float(f64),
    Bytes(Bytes),
    Str(String),
    Tuple(Vec<Self>),
    List(Vec<Self>),
    /// Pairs in order of appearance.
    Dict(Vec<(Self, Self)>),
    /// `set`, `frozenset` and the like stay calls.
    Global {
        module: String,
        name: String,
    },
    /// `callable(*args)`, then `state` applied (REDUCE, NEWOBJ, BUILD).
    Call {
        callable: Box<Self>,
        args: Box<Self>,
        state: Option<Box<Self>>,
    },
}

impl Value {
    /// A dict with text keys, in this order.
    pub fn dict<'k>(pairs: impl IntoIterator<Item = (&'k str, Self)>) -> Self {
        Self::Dict(pairs.into_iter().map(|(key, value)| (Self::from(key), value)).collect())
    }

    /// A list of oids.
    pub fn oids(oids: &[Oid]) -> Self {
        Self::List(oids.iter().map(|oid| Self::from(*oid)).collect())
    }

    /// A copy of `bytes`.
    pub fn bytes(bytes: &[u8]) -> Self {
        Self::Bytes(Bytes::copy_from_slice(bytes))
    }

    pub(crate) fn builtin_call(name: &str, arg: Self) -> Self {
        let callable = Self::Global { module: "builtins".into(), name: name.into() };
        Self::Call { callable: Box::new(callable), args: Box::new(Self::Tuple(vec![arg])), state: None }
    }

    pub fn as_bytes(&self) -> Option<&Bytes> {
        if let Self::Bytes(bytes) = self { Some(bytes) } else { None }
    }

    pub fn as_str(&self) -> Option<&str> {
        if let Self::Str(text) = self { Some(text) } else { None }
    }

    /// An integer that fits; a bool counts as one, as in Python.
    pub fn as_int(&self) -> Option<i64> {
        match self {
            Self::Int(number) => Some(*number),
            Self::Bool(flag) => Some(i64::from(*flag)),
            _ => None,
        }
    }

    /// Any number.
    pub fn as_float(&self) -> Option<f64> {
        match self {
            Self::Float(number) => Some(*number),
            _ => self.as_int().map(|number| number as f64),
        }
    }

    /// The items of a tuple or list (encoding `M5` does not tell them apart).
    pub fn as_items(&self) -> Option<&[Self]> {
        match self {
            Self::Tuple(items) | Self::List(items) => Some(items),
            _ => None,
        }
    }

    pub fn as_dict(&self) -> Option<&[(Self, Self)]> {
        if let Self::Dict(pairs) = self { Some(pairs) } else { None }
    }

    /// 8 bytes that are an oid.
    pub fn as_oid(&self) -> Option<Oid> {
        self.as_bytes().and_then(|bytes| Oid::from_slice(bytes))
    }

    /// 8 bytes that are a tid.
    pub fn as_tid(&self) -> Option<Tid> {
        self.as_bytes().and_then(|bytes| Tid::from_slice(bytes))
    }

    /// The value of a text key of a dict (the last one, as Python builds dicts).
    pub fn get(&self, key: &str) -> Option<&Self> {
        self.as_dict()?.iter().rev().find(|(name, _)| name.as_str() == Some(key)).map(|(_, value)| value)
    }

    /// Python's truth of the value.
    pub fn is_truthy(&self) -> bool {
        match self {
            Self::None => false,
            Self::Bool(flag) => *flag,
            Self::Int(number) => *number != 0,
            Self::Float(number) => *number != 0.0,
            Self::Bytes(bytes) => !bytes.is_empty(),
            Self::Str(text) => !text.is_empty(),
            Self::Tuple(items) | Self::List(items) => !items.is_empty(),
            Self::Dict(pairs) => !pairs.is_empty(),
            Self::BigInt(_) | Self::Global { .. } | Self::Call { .. } => true,
        }
    }

    /// The integer of little-endian two's complement digits (none: 0).
    pub(crate) fn from_le_digits(digits: &[u8]) -> Self {
        let digits = Self::minimal_digits(digits);
        let negative = digits.last().is_some_and(|top| top & 0x80 != 0);
        let mut word = [if negative { 0xff } else { 0 }; 8];
        match word.get_mut(..digits.len()) {
            Some(low) => {
                low.copy_from_slice(digits);
                Self::Int(i64::from_le_bytes(word))
            }
            None => Self::BigInt(Bytes::copy_from_slice(digits)),
        }
    }

    /// Without the bytes that only repeat the sign.
    pub(crate) fn minimal_digits(mut digits: &[u8]) -> &[u8] {
        while let [rest @ .., below, top] = digits {
            let redundant = if below & 0x80 == 0 { *top == 0 } else { *top == 0xff };
            if !redundant {
                break;
            }
            digits = digits.get(..rest.len() + 1).unwrap_or_default();
        }
        if digits == [0] { &[] } else { digits }
    }

    /// As a `u64`, for integers of 64 bits without sign (`id()` of a Python object, msgpack).
    pub fn as_u64(&self) -> Option<u64> {
        match self {
            Self::Int(number) => u64::try_from(*number).ok(),
            Self::BigInt(digits) => match &digits[..] {
                [low @ .., 0] => Some(u64::from_le_bytes(low.try_into().ok()?)),
                _ => None,
            },
            _ => None,
        }
    }
}

impl From<u64> for Value {
    fn from(number: u64) -> Self {
        match i64::try_from(number) {
            Ok(number) => Self::Int(number),
            Err(_) => Self::BigInt(number.to_le_bytes().into_iter().chain([0]).collect()),
        }
    }
}

impl From<i64> for Value {
    fn from(number: i64) -> Self {
        Self::Int(number)
    }
}

impl From<f64> for Value {
    fn from(number: f64) -> Self {
        Self::Float(number)
    }
}

impl From<bool> for Value {
    fn from(flag: bool) -> Self {
        Self::Bool(flag)
    }
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Self::Str(text.to_owned())
    }
}

impl From<String> for Value {
    fn from(text: String) -> Self {
        Self::Str(text)
    }
}

impl From<Bytes> for Value {
    fn from(bytes: Bytes) -> Self {
        Self::Bytes(bytes)
    }
}

impl From<Oid> for Value {
    fn from(oid: Oid) -> Self {
        Self::bytes(&oid.to_bytes())
    }
}

impl From<Tid> for Value {
    fn from(tid: Tid) -> Self {
        Self::bytes(&tid.to_bytes())
    }
}

/// `None` becomes Python's `None`.
impl<T: Into<Self>> From<Option<T>> for Value {
    fn from(value: Option<T>) -> Self {
        value.map_or(Self::None, Into::into)
    }
}

impl fmt::Display for Value {
    /// Readable text in Python's spelling: for messages, and in place of values that a peer cannot read.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("None"),
            Self::Bool(flag) => f.write_str(if *flag { "True" } else { "False" }),
            Self::Int(number) => write!(f, "{number}"),
            Self::BigInt(digits) => {
                f.write_str("0x")?;
                digits.iter().rev().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
            Self::Float(number) => write!(f, "{number:?}"),
            Self::Bytes(bytes) => write!(f, "b'{}'", bytes.escape_ascii()),
            Self::Str(text) => write!(f, "'{}'", text.escape_debug()),
            Self::Tuple(items) => write_items(f, "(", items, if items.len() == 1 { ",)" } else { ")" }),
            Self::List(items) => write_items(f, "[", items, "]"),
            Self::Dict(pairs) => {
                f.write_str("{")?;
                for (index, (key, value)) in pairs.iter().enumerate() {
                    let comma = if index == 0 { "" } else { ", " };
                    write!(f, "{comma}{key}: {value}")?;
                }
                f.write_str("}")
            }
            Self::Global { module, name } => write!(f, "{module}.{name}"),
            Self::Call { callable, args, .. } => match args.as_ref() {
                Self::Tuple(items) => {
                    write!(f, "{callable}")?;
                    write_items(f, "(", items, ")")
                }
                other => write!(f, "{callable}(*{other})"),
            },
        }
    }
}

fn write_items(f: &mut fmt::Formatter<'_>, open: &str, items: &[Value], close: &str) -> fmt::Result {
    f.write_str(open)?;
    for (index, item) in items.iter().enumerate() {
        let comma = if index == 0 { "" } else { ", " };
        write!(f, "{comma}{item}")?;
    }
    f.write_str(close)
}
