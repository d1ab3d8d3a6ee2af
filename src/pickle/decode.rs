//! Pickle → [`Value`]: a stack machine whose classes and calls stay data.
//!
//! # Bounds
//! The machine keeps flat nodes that refer to each other by number, so shared and self-containing values cost nothing
//! until the tree is built at the end (`tree.rs`). Byte strings share the input's buffer. Lengths are checked against the
//! bytes left before anything is cut.

use bytes::Bytes;
use rustc_hash::FxHashMap;

use super::opcode as op;
use super::scanner::{Scanner, decimal, raw_unicode, unquote};
use super::tree::{self, Node, Ref};
use super::{PickleError, Value};
use crate::limits::{MAX_REQUEST_VALUES, MAX_VALUES};

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
    /// Values in one message or record.
    pub fn max_values(self) -> usize {
        if self == Self::Request { MAX_REQUEST_VALUES } else { MAX_VALUES }
    }

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
                    | b"dict"
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
    Ok((tree::build(&machine.nodes, root, src.len(), globals == Globals::Stored)?, used))
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
            // Room for a small message without growing.
            nodes: Vec::with_capacity(src.len().min(16)),
            stack: Vec::with_capacity(8),
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
        if self.nodes.len() >= self.globals.max_values() {
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
            _ if self.marks.last() == Some(&self.stack.len()) => {
                self.marks.pop();
            }
            _ => {
                self.pop()?;
            }
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
