//! Parses the pickles that torch writes as data: nothing in them is ever called.
//!
//! A pickle is a program for a stack machine that may import any function and call it. This reader supports the opcodes
//! of plain data, tensors, records and containers, and the few globals of the file's [`Dialect`] ([`Global`]); every
//! other opcode and global is an error. A call that would make a tensor becomes an [`Object::Tensor`], which keeps the
//! arguments, and one that would make a record an [`Object::Record`], which keeps the fields.
//!
//! Objects live in one table and refer to each other by index, so memory is bounded by the number of opcodes even if
//! objects are shared or contain themselves, and nothing here recurses.

use std::collections::HashMap;

use super::globals::{Class, Dialect, Global};
use crate::error::clip;

/// Index of an object in its [`Pickle`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Id(u32);

/// One value of a pickle; strings borrow from it.
#[derive(Debug)]
pub(super) enum Object<'p> {
    None,
    Bool,
    Int(i64),
    Str(&'p str),
    Tuple(Vec<Id>),
    List(Vec<Id>),
    /// A dict or an OrderedDict: keys and values in the order they were set.
    Dict(Vec<(Id, Id)>),
    /// An imported global.
    Global(Global),
    /// A call of [`Global::RebuildTensor`] with this tuple of arguments.
    Tensor(Id),
    /// A persistent id, which stands for an object outside the pickle: this value.
    Persistent(Id),
    /// An object of this class and its state: a dict of its fields, or a form of the class's own.
    Record(Class, Option<Id>),
    /// A value that tensors do not need: a float, bytes, a stream.
    Opaque(&'static str),
}

impl Object<'_> {
    /// The kind of object, with its article.
    pub fn kind(&self) -> &'static str {
        match self {
            Object::None => "None",
            Object::Bool => "a bool",
            Object::Int(_) => "an int",
            Object::Str(_) => "a string",
            Object::Tuple(_) => "a tuple",
            Object::List(_) => "a list",
            Object::Dict(_) => "a dict",
            Object::Global(_) => "a class or function",
            Object::Tensor(_) => "a tensor",
            Object::Persistent(_) => "a storage",
            Object::Record(class, _) => class.kind(),
            Object::Opaque(kind) => kind,
        }
    }
}

/// A pickle that has been read.
#[derive(Debug)]
pub(super) struct Pickle<'p> {
    objects: Vec<Object<'p>>,
    root: Id,
}

impl<'p> Pickle<'p> {
    /// Parses `bytes`, a whole pickle of this dialect.
    ///
    /// # Errors
    /// The problem (damaged, refused, or over a limit), with its offset; the caller prefixes the member's name.
    pub fn read(dialect: Dialect, bytes: &'p [u8]) -> Result<Pickle<'p>, String> {
        let limit = dialect.max_bytes();
        if bytes.len() > limit {
            return Err(format!("the pickle has {} bytes, more than the limit of {limit}", bytes.len()));
        }
        let mut machine = PickleMachine {
            dialect,
            bytes,
            at: 0,
            objects: Vec::new(),
            stack: Vec::new(),
            marks: Vec::new(),
            memo: HashMap::new(),
        };
        loop {
            let at = machine.at;
            match machine.step() {
                Ok(None) => {}
                Ok(Some(root)) => return Ok(Pickle { objects: machine.objects, root }),
                Err(detail) => return Err(format!("pickle at {at}: {detail}")),
            }
        }
    }

    /// The object that was pickled.
    pub fn root(&self) -> &Object<'p> {
        self.get(self.root)
    }

    /// The object at this index.
    pub fn get(&self, id: Id) -> &Object<'p> {
        // Every `Id` was made by `PickleMachine::push`, which put its object here, and none is ever removed.
        &self.objects[id.0 as usize]
    }
}

struct PickleMachine<'p> {
    dialect: Dialect,
    bytes: &'p [u8],
    at: usize,
    objects: Vec<Object<'p>>,
    stack: Vec<Id>,
    /// Length of `stack` at each mark.
    marks: Vec<usize>,
    memo: HashMap<u32, Id>,
}

const TRUNCATED: &str = "the pickle is truncated";

impl<'p> PickleMachine<'p> {
    /// Executes one opcode. Returns the result at STOP.
    fn step(&mut self) -> Result<Option<Id>, String> {
        let start = self.at;
        let opcode = self.u8()?;
        if start == 0 && opcode != 0x80 {
            let newest = self.dialect.max_protocol();
            return Err(format!("starts with byte {opcode:#04x}, expected 0x80 and a protocol from 2 to {newest}"));
        }
        match opcode {
            // PROTO
            0x80 => match (self.u8()?, self.dialect.max_protocol()) {
                _ if start != 0 => return Err("a second PROTO opcode".to_owned()),
                (protocol, newest) if !(2..=newest).contains(&protocol) => {
                    return Err(format!("protocol {protocol}, expected 2 to {newest}"));
                }
                _ => {}
            },
            // FRAME: a hint for readers that buffer
            0x95 => {
                let length = u64::from_le_bytes(self.array()?);
                if length > (self.bytes.len() - self.at) as u64 {
                    return Err(TRUNCATED.to_owned());
                }
            }
            // STOP
            b'.' => {
                let root = self.pop()?;
                let left = (self.stack.len() + self.marks.len(), self.bytes.len() - self.at);
                return match left {
                    (0, 0) => Ok(Some(root)),
                    (values, bytes) => Err(format!("STOP with {values} values and {bytes} bytes left over")),
                };
            }
            // GLOBAL, STACK_GLOBAL
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.import(module, name)?;
            }
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?);
                match (self.object(module), self.object(name)) {
                    (Object::Str(module), Object::Str(name)) => {
                        let (module, name) = (*module, *name);
                        self.import(module, name)?;
                    }
                    (module, name) => {
                        return Err(format!(
                            "a global named by {} and {}, expected two strings",
                            module.kind(),
                            name.kind()
                        ));
                    }
                }
            }
            // BINPUT, LONG_BINPUT, MEMOIZE
            b'q' => {
                let index = self.u8()?.into();
                self.remember(index)?;
            }
            b'r' => {
                let index = self.u32()?;
                self.remember(index)?;
            }
            0x94 => {
                let index = u32::try_from(self.memo.len()).map_err(|_| "the memo is too long".to_owned())?;
                self.remember(index)?;
            }
            // BINGET, LONG_BINGET
            b'h' => {
                let index = self.u8()?.into();
                self.recall(index)?;
            }
            b'j' => {
                let index = self.u32()?;
                self.recall(index)?;
            }
            // MARK
            b'(' => {
                self.check_room(self.marks.len(), "marks")?;
                self.marks.push(self.stack.len());
            }
            // EMPTY_TUPLE, TUPLE1 to TUPLE3, TUPLE
            b')' => self.push(Object::Tuple(Vec::new()))?,
            0x85..=0x87 => {
                let count = usize::from(opcode - 0x84);
                let mut items = Vec::with_capacity(count);
                for _ in 0..count {
                    items.push(self.pop()?);
                }
                items.reverse();
                self.push(Object::Tuple(items))?;
            }
            b't' => {
                let items = self.pop_to_mark()?;
                self.push(Object::Tuple(items))?;
            }
            // EMPTY_LIST, APPEND, APPENDS
            b']' => self.push(Object::List(Vec::new()))?,
            b'a' => {
                let item = self.pop()?;
                self.list()?.push(item);
            }
            b'e' => {
                let items = self.pop_to_mark()?;
                self.list()?.extend(items);
            }
            // EMPTY_DICT, SETITEM, SETITEMS
            b'}' => self.push(Object::Dict(Vec::new()))?,
            b's' => {
                let (value, key) = (self.pop()?, self.pop()?);
                self.dict()?.push((key, value));
            }
            b'u' => {
                let items = self.pop_to_mark()?;
                let (pairs, rest) = items.as_chunks::<2>();
                if !rest.is_empty() {
                    return Err("a key without a value".to_owned());
                }
                self.dict()?.extend(pairs.iter().map(|[key, value]| (*key, *value)));
            }
            // NONE, NEWTRUE, NEWFALSE
            b'N' => self.push(Object::None)?,
            0x88 | 0x89 => self.push(Object::Bool)?,
            // BININT, BININT1, BININT2, LONG1, BINFLOAT
            b'J' => {
                let value = i32::from_le_bytes(self.array()?);
                self.push(Object::Int(value.into()))?;
            }
            b'K' => {
                let value = self.u8()?;
                self.push(Object::Int(value.into()))?;
            }
            b'M' => {
                let value = u16::from_le_bytes(self.array()?);
                self.push(Object::Int(value.into()))?;
            }
            0x8a => {
                let length = self.u8()?;
                let value = long(self.take(length.into())?);
                self.push(value)?;
            }
            b'G' => {
                self.take(8)?;
                self.push(Object::Opaque("a float"))?;
            }
            // SHORT_BINUNICODE, BINUNICODE, BINUNICODE8, SHORT_BINSTRING
            0x8c | b'U' => {
                let length = self.u8()?;
                self.text(length.into())?;
            }
            b'X' => {
                let length = self.u32()?;
                self.text(length.into())?;
            }
            0x8d => {
                let length = u64::from_le_bytes(self.array()?);
                self.text(length)?;
            }
            // SHORT_BINBYTES, BINBYTES, BINBYTES8
            b'C' => {
                let length = self.u8()?;
                self.skip_bytes(length.into())?;
            }
            b'B' => {
                let length = self.u32()?;
                self.skip_bytes(length.into())?;
            }
            0x8e => {
                let length = u64::from_le_bytes(self.array()?);
                self.skip_bytes(length)?;
            }
            // BINPERSID
            b'Q' => {
                let description = self.pop()?;
                self.push(Object::Persistent(description))?;
            }
            // REDUCE, NEWOBJ
            b'R' | 0x81 => {
                let (arguments, function) = (self.pop()?, self.pop()?);
                self.call(function, arguments, opcode == 0x81)?;
            }
            // BUILD
            b'b' => {
                let state = self.pop()?;
                self.build(state)?;
            }
            _ => {
                let shown = clip(char::from(opcode));
                return Err(format!("opcode {opcode:#04x} (`{shown}`) is not supported: no checkpoint needs it"));
            }
        }
        Ok(None)
    }

    fn import(&mut self, module: &str, name: &str) -> Result<(), String> {
        let Some(global) = self.dialect.global(module, name) else {
            return Err(format!(
                "it imports `{}.{}`, which is not allowed: {}; nothing was executed",
                clip(module),
                clip(name),
                self.dialect.allowed()
            ));
        };
        self.push(Object::Global(global))
    }

    /// Pushes the known result of calling `function` with the tuple `arguments`; nothing is called.
    fn call(&mut self, function: Id, arguments: Id, new: bool) -> Result<(), String> {
        let (global, items) = match (self.object(function), self.object(arguments)) {
            (Object::Global(global), Object::Tuple(items)) => (*global, items.as_slice()),
            (function, arguments) => {
                let (function, arguments) = (function.kind(), arguments.kind());
                return Err(format!(
                    "it calls {function} with {arguments}, which is not supported; nothing was executed"
                ));
            }
        };
        match (global, items) {
            (Global::OrderedDict, []) => self.push(Object::Dict(Vec::new())),
            (Global::RebuildTensor, _) if !new => self.push(Object::Tensor(arguments)),
            // A parameter is its tensor; a size is its tuple.
            (Global::RebuildParameter, [tensor, ..]) if !new => self.push_again(*tensor),
            (Global::Size, [sizes]) => self.push_again(*sizes),
            (Global::BytesIo, _) => self.push(Object::Opaque("a stream of bytes")),
            (Global::Encode, _) if !new => self.push(Object::Opaque("bytes")),
            (Global::Record(class), []) if new => self.push(Object::Record(class, None)),
            (Global::Value(kind), _) if !new => self.push(Object::Opaque(kind)),
            (global, items) => Err(format!(
                "it calls {global:?} with {} arguments, which is not supported; nothing was executed",
                items.len()
            )),
        }
    }

    /// Sets the state of the topmost object. A dict's (a state dict's `_metadata`) is ignored.
    fn build(&mut self, state: Id) -> Result<(), String> {
        let target = self.top()?;
        match &mut self.objects[target.0 as usize] {
            Object::Dict(_) | Object::Opaque(_) => Ok(()),
            Object::Record(_, fields @ None) => {
                *fields = Some(state);
                Ok(())
            }
            Object::Record(class, Some(_)) => Err(format!("BUILD of {} that already has a state", class.kind())),
            other => Err(format!("BUILD of {}, which is not supported; nothing was executed", other.kind())),
        }
    }

    /// Limits the length of the tables, to bound memory.
    fn check_room(&self, length: usize, what: &str) -> Result<(), String> {
        match self.dialect.max_objects() {
            limit if length < limit => Ok(()),
            limit => Err(format!("more than {limit} {what}")),
        }
    }

    fn object(&self, id: Id) -> &Object<'p> {
        &self.objects[id.0 as usize]
    }

    fn push(&mut self, object: Object<'p>) -> Result<(), String> {
        self.check_room(self.objects.len(), "objects")?;
        let id = Id(u32::try_from(self.objects.len()).map_err(|_| "too many objects".to_owned())?);
        self.objects.push(object);
        self.push_again(id)
    }

    fn push_again(&mut self, id: Id) -> Result<(), String> {
        self.check_room(self.stack.len(), "values on the stack")?;
        self.stack.push(id);
        Ok(())
    }

    /// The topmost value above the last mark.
    fn top(&self) -> Result<Id, String> {
        let floor = self.marks.last().copied().unwrap_or(0);
        self.stack.get(floor..).and_then(|values| values.last()).copied().ok_or_else(|| "the stack is empty".to_owned())
    }

    fn pop(&mut self) -> Result<Id, String> {
        let top = self.top()?;
        self.stack.pop();
        Ok(top)
    }

    fn pop_to_mark(&mut self) -> Result<Vec<Id>, String> {
        let mark = self.marks.pop().ok_or("no mark on the stack")?;
        Ok(self.stack.split_off(mark.min(self.stack.len())))
    }

    fn list(&mut self) -> Result<&mut Vec<Id>, String> {
        let id = self.top()?;
        match &mut self.objects[id.0 as usize] {
            Object::List(items) => Ok(items),
            other => Err(format!("items appended to {}, expected a list", other.kind())),
        }
    }

    fn dict(&mut self) -> Result<&mut Vec<(Id, Id)>, String> {
        let id = self.top()?;
        match &mut self.objects[id.0 as usize] {
            Object::Dict(items) => Ok(items),
            other => Err(format!("keys set on {}, expected a dict", other.kind())),
        }
    }

    fn remember(&mut self, index: u32) -> Result<(), String> {
        let top = self.top()?;
        self.check_room(self.memo.len(), "entries in the memo")?;
        self.memo.insert(index, top);
        Ok(())
    }

    fn recall(&mut self, index: u32) -> Result<(), String> {
        let id = *self.memo.get(&index).ok_or_else(|| format!("the memo has no entry {index}"))?;
        self.push_again(id)
    }

    fn text(&mut self, bytes: u64) -> Result<(), String> {
        let bytes = self.take(bytes)?;
        let text = std::str::from_utf8(bytes).map_err(|_| "a string that is not UTF-8".to_owned())?;
        self.push(Object::Str(text))
    }

    fn skip_bytes(&mut self, bytes: u64) -> Result<(), String> {
        self.take(bytes)?;
        self.push(Object::Opaque("bytes"))
    }

    fn take(&mut self, count: u64) -> Result<&'p [u8], String> {
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        let taken = usize::try_from(count).ok().and_then(|count| rest.get(..count)).ok_or(TRUNCATED)?;
        self.at += taken.len();
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        self.take(N as u64)?.try_into().map_err(|_| TRUNCATED.to_owned())
    }

    fn u8(&mut self) -> Result<u8, String> {
        self.array().map(|[byte]| byte)
    }

    fn u32(&mut self) -> Result<u32, String> {
        self.array().map(u32::from_le_bytes)
    }

    /// The text up to the next line feed.
    fn line(&mut self) -> Result<&'p str, String> {
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        let length = rest.iter().position(|byte| *byte == b'\n').ok_or(TRUNCATED)?;
        self.at += length + 1;
        std::str::from_utf8(&rest[..length]).map_err(|_| "a name that is not UTF-8".to_owned())
    }
}

/// The integer whose two's complement, least significant byte first, is `bytes`.
fn long<'p>(bytes: &[u8]) -> Object<'p> {
    let negative = bytes.last().is_some_and(|byte| byte & 0x80 != 0);
    let mut value = [if negative { 0xff } else { 0 }; 8];
    match value.get_mut(..bytes.len()) {
        Some(low) => {
            low.copy_from_slice(bytes);
            Object::Int(i64::from_le_bytes(value))
        }
        None => Object::Opaque("an int of more than 64 bits"),
    }
}
