//! From the flat nodes of the pickle machine to a tree of [`Value`]s, within bounds.
//!
//! A node may be used several times, or contain itself. Building stops at [`MAX_DEPTH`] levels and at a budget
//! proportional to the pickle's length, so that one that refers to a value over and over ("billion laughs") is refused.

use bytes::Bytes;

use super::{PickleError, Value};
use crate::limits::MAX_DEPTH;

/// Number of a node; there are never more than `MAX_VALUES`.
pub(super) type Ref = u32;

pub(super) enum Node {
    None,
    Bool(bool),
    Int(i64),
    BigInt(Bytes),
    Float(f64),
    Bytes(Bytes),
    /// Checked to be UTF-8.
    Str(Bytes),
    Text(String),
    Tuple(Vec<Ref>),
    List(Vec<Ref>),
    /// Keys and values alternate.
    Dict(Vec<Ref>),
    Set(Vec<Ref>),
    FrozenSet(Vec<Ref>),
    ByteArray(Bytes),
    Global {
        module: Bytes,
        name: Bytes,
    },
    Call {
        callable: Ref,
        args: Ref,
        state: Option<Ref>,
    },
}

/// Builds the value `root` of a pickle of `length` bytes. `lossy`: what nests too deep becomes text instead of an error.
pub(super) fn build(nodes: &[Node], root: Ref, length: usize, lossy: bool) -> Result<Value, PickleError> {
    let budget = 4096 + length.saturating_mul(16);
    Builder { nodes, budget, lossy }.value(root, 0)
}

struct Builder<'a> {
    nodes: &'a [Node],
    /// What may still be built: each value counts 1 and its text's length.
    budget: usize,
    lossy: bool,
}

impl Builder<'_> {
    fn value(&mut self, node: Ref, depth: usize) -> Result<Value, PickleError> {
        if depth > MAX_DEPTH {
            return if self.lossy { Ok(Value::from("...")) } else { Err(PickleError::TooDeep) };
        }
        self.spend(1)?;
        let Some(node) = self.nodes.get(node as usize) else { return Err(PickleError::TooMany) };
        Ok(match node {
            Node::None => Value::None,
            Node::Bool(flag) => Value::Bool(*flag),
            Node::Int(number) => Value::Int(*number),
            Node::BigInt(digits) => Value::BigInt(digits.clone()),
            Node::Float(number) => Value::Float(*number),
            Node::Bytes(bytes) => Value::Bytes(bytes.clone()),
            Node::Str(text) => Value::Str(self.text(text)?),
            Node::Text(text) => Value::Str(self.text(text.as_bytes())?),
            Node::Tuple(items) => Value::Tuple(self.items(items, depth)?),
            Node::List(items) => Value::List(self.items(items, depth)?),
            Node::Dict(items) => {
                let mut pairs = Vec::with_capacity(items.len() / 2);
                for pair in items.chunks_exact(2) {
                    if let [key, value] = pair {
                        pairs.push((self.value(*key, depth + 1)?, self.value(*value, depth + 1)?));
                    }
                }
                Value::Dict(pairs)
            }
            Node::Set(items) => Value::builtin_call("set", Value::List(self.items(items, depth)?)),
            Node::FrozenSet(items) => {
                Value::builtin_call("frozenset", Value::List(self.items(items, depth)?))
            }
            Node::ByteArray(bytes) => Value::builtin_call("bytearray", Value::Bytes(bytes.clone())),
            Node::Global { module, name } => {
                Value::Global { module: self.text(module)?, name: self.text(name)? }
            }
            Node::Call { callable, args, state } => {
                let callable = self.value(*callable, depth + 1)?;
                let args = self.value(*args, depth + 1)?;
                let state = match state {
                    Some(state) => Some(Box::new(self.value(*state, depth + 1)?)),
                    None => None,
                };
                plain_bytes(&callable, &args).unwrap_or_else(|| Value::Call {
                    callable: Box::new(callable),
                    args: Box::new(args),
                    state,
                })
            }
        })
    }

    fn items(&mut self, items: &[Ref], depth: usize) -> Result<Vec<Value>, PickleError> {
        items.iter().map(|item| self.value(*item, depth + 1)).collect()
    }

    fn text(&mut self, text: &[u8]) -> Result<String, PickleError> {
        self.spend(text.len())?;
        Ok(String::from_utf8_lossy(text).into_owned())
    }

    fn spend(&mut self, cost: usize) -> Result<(), PickleError> {
        self.budget = self.budget.checked_sub(cost).ok_or(PickleError::TooMany)?;
        Ok(())
    }
}

/// The calls by which Pythons without a bytes opcode spell bytes: `zodbpickle.binary(b)` and, in protocols 0 to 2,
/// `_codecs.encode(latin-1 text, 'latin1')` and `bytes()`.
fn plain_bytes(callable: &Value, args: &Value) -> Option<Value> {
    let (Value::Global { module, name }, Value::Tuple(args)) = (callable, args) else { return None };
    match (module.as_str(), name.as_str(), args.as_slice()) {
        ("zodbpickle", "binary", [Value::Bytes(bytes)]) => Some(Value::Bytes(bytes.clone())),
        ("zodbpickle", "binary", [Value::Str(text)]) => Some(Value::Bytes(text.clone().into_bytes().into())),
        ("_codecs", "encode", [Value::Str(text), Value::Str(codec)]) if codec == "latin1" => {
            let bytes: Option<Vec<u8>> = text.chars().map(|c| u8::try_from(u32::from(c)).ok()).collect();
            Some(Value::Bytes(bytes?.into()))
        }
        ("__builtin__" | "builtins", "bytes", []) => Some(Value::Bytes(Bytes::new())),
        _ => None,
    }
}
