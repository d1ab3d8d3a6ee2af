//! Pickle → [`Value`]: a stack machine whose classes and calls stay data.
//!
//! # Bounds
//! The machine keeps flat nodes that refer to each other by number, so shared and self-containing values cost nothing
//! until the tree is built at the end; building stops at [`MAX_DEPTH`] levels and at a budget proportional to the
//! input, so a pickle that refers to one value over and over ("billion laughs") is refused. Byte strings share the
//! input's buffer. Lengths are checked against the bytes left before anything is cut.

use bytes::Bytes;
use rustc_hash::FxHashMap;

use super::opcode as op;
use super::scanner::{Scanner, decimal, raw_unicode, unquote};
use super::{PickleError, Value};
use crate::limits::{MAX_DEPTH, MAX_VALUES};

/// Which globals (classes and functions, by name) a pickle may mention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Globals {
    /// Those that legitimately occur in a client's message: `ZopeUndo.Prefix`, `zodbpickle.binary` and builtin data
    /// types in a transaction extension. Anything else is an error that names it.
    Request,
    /// Any, as data: replies of a server (its exceptions).
    Any,
    /// Any; also tolerates what only a file may contain: text that is no UTF-8 and too deep nesting become
    /// replacement text. For transaction extensions written by any application in any Python.
    Stored,
}

impl Globals {
    fn allows(self, module: &[u8], name: &[u8]) -> bool {
        if self != Self::Request {
            return true;
        }
        match module {
            b"ZopeUndo.Prefix" => name == b"Prefix",
            b"zodbpickle" => name == b"binary",
            b"builtins" | b"__builtin__" => matches!(
                name,
                b"set"
                    | b"frozenset"
                    | b"bytes"
                    | b"bytearray"
                    | b"complex"
                    | b"object"
                    | b"slice"
                    | b"range"
            ),
            b"copy_reg" => name == b"_reconstructor",
            _ => false,
        }
    }
}

/// Decodes the pickle at the start of `src`; what follows its end is ignored, as Python does.
pub fn decode(src: &Bytes, globals: Globals) -> Result<Value, PickleError> {
    decode_first(src, globals).map(|(value, _)| value)
}

/// Decodes the pickle at the start of `src` and tells how many bytes it had: for files that are a row of pickles.
pub fn decode_first(src: &Bytes, globals: Globals) -> Result<(Value, usize), PickleError> {
    let mut machine = Machine::new(src, globals);
    let root = machine.run()?;
    let used = machine.scan.position();
    let budget = 4096 + src.len().saturating_mul(16);
    let mut builder = Builder { nodes: &machine.nodes, budget, lossy: globals == Globals::Stored };
    Ok((builder.value(root, 0)?, used))
}

/// Decodes the extension of a transaction as stored: empty bytes are an empty dict.
///
/// # Errors
/// Only for bytes that are no pickle; classes and calls of any kind are kept as data.
pub fn decode_extension(stored: &[u8]) -> Result<Value, PickleError> {
    if stored.is_empty() {
        return Ok(Value::Dict(Vec::new()));
    }
    decode(&Bytes::copy_from_slice(stored), Globals::Stored)
}

/// Number of a node; `Machine::nodes` never outgrows [`MAX_VALUES`].
type Ref = u32;

enum Node {
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

struct Machine<'a> {
    src: &'a Bytes,
    scan: Scanner<'a>,
    globals: Globals,
    nodes: Vec<Node>,
    stack: Vec<Ref>,
    /// Heights of the stack.
    marks: Vec<usize>,
    memo: FxHashMap<u32, Ref>,
    /// Position and code of the opcode being executed, for errors.
    at: usize,
    opcode: u8,
}

impl<'a> Machine<'a> {
    fn new(src: &'a Bytes, globals: Globals) -> Self {
        Self {
            src,
            scan: Scanner::new(src),
            globals,
            nodes: Vec::new(),
            stack: Vec::new(),
            marks: Vec::new(),
            memo: FxHashMap::default(),
            at: 0,
            opcode: 0,
        }
    }

    /// Executes opcodes up to and including `STOP`.
    fn run(&mut self) -> Result<Ref, PickleError> {
        loop {
            self.at = self.scan.position();
            self.opcode = self.scan.u8()?;
            match self.opcode {
                op::STOP => return self.pop(),
                op::MARK => self.marks.push(self.stack.len()),
                op::POP | op::POP_MARK | op::DUP => self.shuffle()?,
                op::PROTO => {
                    let version = self.scan.u8()?;
                    if version > 5 {
                        return Err(PickleError::Protocol { at: self.at, version });
                    }
                }
                op::FRAME => {
                    self.scan.take(8)?;
                }
                op::NONE => self.push(Node::None)?,
                op::NEWTRUE => self.push(Node::Bool(true))?,
                op::NEWFALSE => self.push(Node::Bool(false))?,
                op::BININT | op::BININT1 | op::BININT2 | op::INT | op::LONG | op::LONG1 | op::LONG4 => {
                    let number = self.integer()?;
                    self.push(number)?;
                }
                op::BINFLOAT => {
                    let number = self.scan.f64_be()?;
                    self.push(Node::Float(number))?;
                }
                op::FLOAT => {
                    let line = std::str::from_utf8(self.scan.line()?).ok();
                    let number = line.and_then(|text| text.trim().parse().ok());
                    self.push(Node::Float(number.ok_or(PickleError::Number { at: self.at })?))?;
                }
                op::BINBYTES | op::SHORT_BINBYTES | op::BINBYTES8 | op::BYTEARRAY8 => self.byte_string()?,
                op::BINUNICODE | op::SHORT_BINUNICODE | op::BINUNICODE8 | op::UNICODE => self.text()?,
                op::STRING | op::BINSTRING | op::SHORT_BINSTRING => self.python2_string()?,
                op::EMPTY_TUPLE => self.push(Node::Tuple(Vec::new()))?,
                op::TUPLE1 => self.tuple_of(1)?,
                op::TUPLE2 => self.tuple_of(2)?,
                op::TUPLE3 => self.tuple_of(3)?,
                op::TUPLE => self.collect(Node::Tuple)?,
                op::EMPTY_LIST => self.push(Node::List(Vec::new()))?,
                op::LIST => self.collect(Node::List)?,
                op::EMPTY_DICT => self.push(Node::Dict(Vec::new()))?,
                op::DICT => self.collect(Node::Dict)?,
                op::EMPTY_SET => self.push(Node::Set(Vec::new()))?,
                op::FROZENSET => self.collect(Node::FrozenSet)?,
                op::APPEND | op::APPENDS | op::SETITEM | op::SETITEMS | op::ADDITEMS => self.extend()?,
                op::GLOBAL | op::STACK_GLOBAL | op::INST => self.global()?,
                op::REDUCE | op::NEWOBJ | op::OBJ | op::NEWOBJ_EX => self.call()?,
                op::BUILD => self.build()?,
                op::PUT | op::BINPUT | op::LONG_BINPUT | op::MEMOIZE => self.put()?,
                op::GET | op::BINGET | op::LONG_BINGET => self.get()?,
                // No persistent ids, extension registry or out-of-band buffers: nothing decoded here has them.
                opcode => return Err(PickleError::Opcode { at: self.at, opcode }),
            }
        }
    }

    fn misfit(&self) -> PickleError {
        PickleError::Stack { at: self.at, opcode: self.opcode }
    }

    fn add(&mut self, node: Node) -> Result<Ref, PickleError> {
        if self.nodes.len() >= MAX_VALUES {
            return Err(PickleError::TooMany);
        }
        self.nodes.push(node);
        Ok((self.nodes.len() - 1) as Ref)
    }

    fn push(&mut self, node: Node) -> Result<(), PickleError> {
        let added = self.add(node)?;
        self.stack.push(added);
        Ok(())
    }

    /// Pops one value, but never one below the last mark.
    fn pop(&mut self) -> Result<Ref, PickleError> {
        if self.marks.last().is_some_and(|mark| self.stack.len() <= *mark) {
            return Err(self.misfit());
        }
        self.stack.pop().ok_or_else(|| self.misfit())
    }

    fn top(&self) -> Result<Ref, PickleError> {
        self.stack.last().copied().ok_or_else(|| self.misfit())
    }

    fn pop_mark(&mut self) -> Result<Vec<Ref>, PickleError> {
        let mark = self.marks.pop().ok_or_else(|| self.misfit())?;
        Ok(self.stack.split_off(mark.min(self.stack.len())))
    }

    fn shuffle(&mut self) -> Result<(), PickleError> {
        match self.opcode {
            op::POP_MARK => drop(self.pop_mark()?),
            op::DUP => {
                let top = self.top()?;
                self.stack.push(top);
            }
            _ if self.marks.last() == Some(&self.stack.len()) => drop(self.marks.pop()),
            _ => drop(self.pop()?),
        }
        Ok(())
    }

    fn integer(&mut self) -> Result<Node, PickleError> {
        let at = self.at;
        Ok(match self.opcode {
            op::BININT => Node::Int(i64::from(self.scan.i32()?)),
            op::BININT1 => Node::Int(i64::from(self.scan.u8()?)),
            op::BININT2 => Node::Int(i64::from(self.scan.u16()?)),
            op::LONG1 => self.long(Scanner::short)?,
            op::LONG4 => self.long(Scanner::long_signed)?,
            op::INT => match self.scan.line()? {
                b"00" => Node::Bool(false),
                b"01" => Node::Bool(true),
                line => Node::Int(decimal(line, at)?),
            },
            _ => {
                let line = self.scan.line()?;
                Node::Int(decimal(line.strip_suffix(b"L").unwrap_or(line), at)?)
            }
        })
    }

    fn long(
        &mut self,
        cut: fn(&mut Scanner<'a>) -> Result<&'a [u8], PickleError>,
    ) -> Result<Node, PickleError> {
        let digits = cut(&mut self.scan)?;
        Ok(match Value::from_le_digits(digits) {
            Value::Int(number) => Node::Int(number),
            _ => Node::BigInt(self.src.slice_ref(Value::minimal_digits(digits))),
        })
    }

    fn byte_string(&mut self) -> Result<(), PickleError> {
        let bytes = match self.opcode {
            op::BINBYTES => self.scan.long()?,
            op::SHORT_BINBYTES => self.scan.short()?,
            _ => self.scan.longest()?,
        };
        let shared = self.src.slice_ref(bytes);
        self.push(if self.opcode == op::BYTEARRAY8 { Node::ByteArray(shared) } else { Node::Bytes(shared) })
    }

    fn text(&mut self) -> Result<(), PickleError> {
        let bytes = match self.opcode {
            op::BINUNICODE => self.scan.long()?,
            op::SHORT_BINUNICODE => self.scan.short()?,
            op::BINUNICODE8 => self.scan.longest()?,
            _ => {
                let text = raw_unicode(self.scan.line()?);
                return self.push(Node::Text(text));
            }
        };
        self.push(match std::str::from_utf8(bytes) {
            Ok(_) => Node::Str(self.src.slice_ref(bytes)),
            Err(_) if self.globals == Globals::Stored => {
                Node::Text(String::from_utf8_lossy(bytes).into_owned())
            }
            Err(_) => return Err(PickleError::Text { at: self.at }),
        })
    }

    /// Python 2's `str`: text if ASCII, else bytes (ZODB's `encoding='ASCII', errors='bytes'`).
    fn python2_string(&mut self) -> Result<(), PickleError> {
        let bytes = match self.opcode {
            op::STRING => Bytes::from(unquote(self.scan.line()?, self.at)?),
            op::BINSTRING => self.src.slice_ref(self.scan.long_signed()?),
            _ => self.src.slice_ref(self.scan.short()?),
        };
        self.push(if bytes.is_ascii() { Node::Str(bytes) } else { Node::Bytes(bytes) })
    }

    fn tuple_of(&mut self, count: usize) -> Result<(), PickleError> {
        let floor = self.marks.last().copied().unwrap_or(0);
        let start = self.stack.len().checked_sub(count).filter(|start| *start >= floor);
        let items = self.stack.split_off(start.ok_or_else(|| self.misfit())?);
        self.push(Node::Tuple(items))
    }

    fn collect(&mut self, container: fn(Vec<Ref>) -> Node) -> Result<(), PickleError> {
        let items = self.pop_mark()?;
        if self.opcode == op::DICT && items.len() % 2 != 0 {
            return Err(self.misfit());
        }
        self.push(container(items))
    }

    /// `APPEND(S)`, `SETITEM(S)`, `ADDITEMS`: moves values into the container below them.
    fn extend(&mut self) -> Result<(), PickleError> {
        let items = match self.opcode {
            op::APPEND => vec![self.pop()?],
            op::SETITEM => {
                let value = self.pop()?;
                vec![self.pop()?, value]
            }
            _ => self.pop_mark()?,
        };
        let target = self.top()?;
        let (misfit, added) = (self.misfit(), self.nodes.len());
        match (self.nodes.get_mut(target as usize), self.opcode) {
            (Some(Node::List(held)), op::APPEND | op::APPENDS) | (Some(Node::Set(held)), op::ADDITEMS) => {
                held.extend(items);
            }
            (Some(Node::Dict(held)), op::SETITEM | op::SETITEMS) if items.len() % 2 == 0 => {
                held.extend(items)
            }
            // Items of an instance of a list or dict subclass: shown as its state.
            (Some(Node::Call { state, .. }), _) if self.globals != Globals::Request => {
                let container = match self.opcode {
                    op::SETITEM | op::SETITEMS if items.len() % 2 == 0 => Node::Dict(items),
                    _ => Node::List(items),
                };
                *state = Some(added as Ref);
                self.add(container)?;
            }
            _ => return Err(misfit),
        }
        Ok(())
    }

    fn global(&mut self) -> Result<(), PickleError> {
        let (module, name) = if self.opcode == op::STACK_GLOBAL {
            let (name, module) = (self.pop()?, self.pop()?);
            match (self.nodes.get(module as usize), self.nodes.get(name as usize)) {
                (Some(Node::Str(module)), Some(Node::Str(name))) => (module.clone(), name.clone()),
                _ => return Err(self.misfit()),
            }
        } else {
            let module = self.scan.line()?;
            (self.src.slice_ref(module), self.src.slice_ref(self.scan.line()?))
        };
        if !self.globals.allows(&module, &name) {
            let [module, name] = [module, name].map(|part| String::from_utf8_lossy(&part).into_owned());
            return Err(PickleError::Global { module, name });
        }
        if self.opcode != op::INST {
            return self.push(Node::Global { module, name });
        }
        let args = self.pop_mark()?;
        let args = self.add(Node::Tuple(args))?;
        let callable = self.add(Node::Global { module, name })?;
        self.push(Node::Call { callable, args, state: None })
    }

    fn call(&mut self) -> Result<(), PickleError> {
        let (callable, args) = match self.opcode {
            op::OBJ => {
                let mut items = self.pop_mark()?;
                if items.is_empty() {
                    return Err(self.misfit());
                }
                let callable = items.remove(0);
                (callable, self.add(Node::Tuple(items))?)
            }
            op::NEWOBJ_EX => {
                let (keywords, args) = (self.pop()?, self.pop()?);
                (self.pop()?, self.add(Node::Tuple(vec![args, keywords]))?)
            }
            _ => {
                let args = self.pop()?;
                (self.pop()?, args)
            }
        };
        self.push(Node::Call { callable, args, state: None })
    }

    fn build(&mut self) -> Result<(), PickleError> {
        let given = self.pop()?;
        let target = self.top()?;
        let misfit = self.misfit();
        match self.nodes.get_mut(target as usize) {
            Some(Node::Call { state, .. }) => *state = Some(given),
            _ => return Err(misfit),
        }
        Ok(())
    }

    fn put(&mut self) -> Result<(), PickleError> {
        let index = match self.opcode {
            op::MEMOIZE => self.memo.len() as u32,
            _ => self.memo_index()?,
        };
        self.memo.insert(index, self.top()?);
        Ok(())
    }

    fn get(&mut self) -> Result<(), PickleError> {
        let index = self.memo_index()?;
        let value = self.memo.get(&index).copied();
        self.stack.push(value.ok_or(PickleError::Memo { at: self.at, index })?);
        Ok(())
    }

    fn memo_index(&mut self) -> Result<u32, PickleError> {
        match self.opcode {
            op::BINPUT | op::BINGET => self.scan.u8().map(u32::from),
            op::LONG_BINPUT | op::LONG_BINGET => self.scan.u32(),
            _ => {
                let index = decimal(self.scan.line()?, self.at)?;
                u32::try_from(index).map_err(|_| PickleError::Number { at: self.at })
            }
        }
    }
}

/// Builds the tree of values from the machine's nodes.
struct Builder<'a> {
    nodes: &'a [Node],
    /// What may still be built: each value counts 1 and its text's length.
    budget: usize,
    /// Replace what nests too deep instead of failing.
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
