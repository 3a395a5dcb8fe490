//! Reads a config key by key, so that keys that are left over can be rejected.
//!
//! An unknown key could change the math, and a model that ignored it would produce fluent but wrong text. So a reader
//! takes every key it knows and then states which of the rest are neutral; any other is an error. A key whose value is
//! `null` counts as absent.

use std::path::Path;

use serde_json::{Map, Value};

use super::json::{kind, shown};
use crate::error::{Error, Result, clip};
use crate::tensor::DType;

/// The unread keys of an object.
pub(super) struct Keys<'a> {
    path: &'a Path,
    /// Dotted path of the object; empty at the top level.
    within: String,
    object: Map<String, Value>,
}

impl<'a> Keys<'a> {
    /// All keys of `object`, the contents of `path`.
    pub(super) fn new(path: &'a Path, object: Map<String, Value>) -> Keys<'a> {
        Keys { path, within: String::new(), object }
    }

    /// The file.
    pub(super) fn path(&self) -> &'a Path {
        self.path
    }

    /// Returns true if the key is present, even as `null`.
    pub(super) fn present(&self, key: &str) -> bool {
        self.object.contains_key(key)
    }

    /// The key's value; `None` if it is absent or null.
    pub(super) fn take(&mut self, key: &str) -> Option<Value> {
        self.object.swap_remove(key).filter(|value| !value.is_null())
    }

    /// A whole number.
    pub(super) fn size(&mut self, key: &str) -> Result<Option<usize>> {
        self.read(key, "a whole number of at least 0", |value| usize::try_from(value.as_u64()?).ok())
    }

    /// A required whole number.
    pub(super) fn required_size(&mut self, key: &str) -> Result<usize> {
        self.size(key)?.ok_or_else(|| Error::format(self.path, format!("the key {} is missing", self.full(key))))
    }

    /// Any JSON number.
    pub(super) fn number(&mut self, key: &str) -> Result<Option<f64>> {
        self.read(key, "a number", Value::as_f64)
    }

    /// A whole number below 2^32.
    pub(super) fn count(&mut self, key: &str) -> Result<Option<u32>> {
        self.read(key, "a whole number of at least 0 and below 2^32", |value| u32::try_from(value.as_u64()?).ok())
    }

    /// `true` or `false`.
    pub(super) fn flag(&mut self, key: &str) -> Result<Option<bool>> {
        self.read(key, "true or false", Value::as_bool)
    }

    /// A string.
    pub(super) fn text(&mut self, key: &str) -> Result<Option<String>> {
        self.read(key, "a string", |value| value.as_str().map(str::to_owned))
    }

    /// An element type, by its torch name.
    pub(super) fn dtype(&mut self, key: &str) -> Result<Option<DType>> {
        let Some(name) = self.text(key)? else { return Ok(None) };
        match name.strip_prefix("torch.").unwrap_or(&name) {
            "float32" => Ok(Some(DType::F32)),
            "float16" => Ok(Some(DType::F16)),
            "bfloat16" => Ok(Some(DType::BF16)),
            _ => Err(self.unsupported(key, name, "\"float32\", \"float16\" or \"bfloat16\"")),
        }
    }

    /// The keys of a nested object.
    pub(super) fn object(&mut self, key: &str) -> Result<Option<Keys<'a>>> {
        match self.take(key) {
            None => Ok(None),
            Some(Value::Object(object)) => Ok(Some(Keys { path: self.path, within: self.full(key), object })),
            Some(value) => Err(self.wrong_kind(key, "an object or null", &value)),
        }
    }

    fn read<T>(&mut self, key: &str, expected: &str, convert: impl FnOnce(&Value) -> Option<T>) -> Result<Option<T>> {
        let Some(value) = self.take(key) else { return Ok(None) };
        match convert(&value) {
            Some(converted) => Ok(Some(converted)),
            None => Err(self.wrong_kind(key, expected, &value)),
        }
    }

    /// The value on which all of `names` agree, if any is present. Names paired with `None` are read from this object;
    /// the others were read before.
    pub(super) fn agreeing<T: Copy + PartialEq + std::fmt::Debug>(
        &mut self,
        names: impl IntoIterator<Item = (&'static str, Option<T>)>,
        read: impl Fn(&mut Self, &str) -> Result<Option<T>>,
    ) -> Result<Option<T>> {
        let mut agreed: Option<(&str, T)> = None;
        for (name, known) in names {
            let value = match known {
                Some(value) => Some(value),
                None => read(self, name)?,
            };
            match (agreed, value) {
                (Some((first, one)), Some(other)) if one != other => {
                    let detail =
                        format!("{first} is {one:?}, but {name} is {other:?}; they mean the same thing and must agree");
                    return Err(Error::format(self.path, detail));
                }
                (None, Some(value)) => agreed = Some((name, value)),
                _ => {}
            }
        }
        Ok(agreed.map(|(_, value)| value))
    }

    /// Rejects the key unless it is [off](is_off).
    pub(super) fn must_be_off(&mut self, key: &str) -> Result<()> {
        match self.take(key) {
            Some(value) if !is_off(&value) => {
                Err(self.unsupported(key, shown(&value), "it to be absent or off (null, false or empty)"))
            }
            _ => Ok(()),
        }
    }

    /// Rejects the first unread key that is neither null nor `neutral`.
    pub(super) fn refuse_rest(&self, neutral: impl Fn(&str, &Value) -> bool) -> Result<()> {
        match self.object.iter().find(|(key, value)| !value.is_null() && !neutral(key, value)) {
            None => Ok(()),
            Some((key, value)) => {
                let (key, value) = (self.full(&clip(key)), shown(value));
                let detail = format!(
                    "unknown key {key} = {value} might change the math; remove it if you know that it does not"
                );
                Err(Error::unsupported(self.path, detail))
            }
        }
    }

    /// The key's value, which remains unread.
    pub(super) fn peek(&self, key: &str) -> Option<&Value> {
        self.object.get(key)
    }

    /// The unread keys with an effect: not `neutral`, and with a value that is not `off`.
    pub(super) fn rest(self, neutral: &[&str], off: impl Fn(&Value) -> bool) -> Vec<String> {
        let carries = |(key, value): &(String, Value)| !off(value) && !neutral.contains(&key.as_str());
        self.object.into_iter().filter(carries).map(|(key, _)| clip(key)).collect()
    }

    fn full(&self, key: &str) -> String {
        if self.within.is_empty() { key.to_owned() } else { format!("{}.{key}", self.within) }
    }

    /// The error for a value that is not supported.
    pub(super) fn unsupported(&self, key: &str, value: impl std::fmt::Display, expected: &str) -> Error {
        Error::unsupported(self.path, format!("{} is {}, expected {expected}", self.full(key), clip(value)))
    }

    /// The error for a value that is not an `expected`.
    pub(super) fn wrong_kind(&self, key: &str, expected: &str, value: &Value) -> Error {
        let detail = format!("{} is {} ({}), expected {expected}", self.full(key), shown(value), kind(value));
        Error::format(self.path, detail)
    }
}

/// Returns true for values that turn a feature off: `null`, `false`, `{}` and `[]`.
pub(super) fn is_off(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Object(object) => object.is_empty(),
        Value::Array(list) => list.is_empty(),
        _ => false,
    }
}

/// A token id. `null` and -1, which tokenizers without such a token report, mean none.
pub(super) fn token_id(keys: &mut Keys, key: &'static str) -> Result<Option<u32>> {
    match keys.take(key) {
        None => Ok(None),
        Some(value) => one_token_id(keys, key, &value),
    }
}

/// Token ids: one, a list, or `null` for none.
pub(super) fn token_ids(keys: &mut Keys, key: &'static str) -> Result<Vec<u32>> {
    match keys.take(key) {
        None => Ok(Vec::new()),
        Some(Value::Array(ids)) => {
            let ids = ids.iter().map(|id| one_token_id(keys, key, id)).collect::<Result<Vec<_>>>()?;
            Ok(ids.into_iter().flatten().collect())
        }
        Some(value) => Ok(one_token_id(keys, key, &value)?.into_iter().collect()),
    }
}

fn one_token_id(keys: &Keys, key: &str, value: &Value) -> Result<Option<u32>> {
    match value.as_u64().and_then(|id| u32::try_from(id).ok()) {
        Some(id) => Ok(Some(id)),
        None if value.as_i64() == Some(-1) => Ok(None),
        None => Err(keys.wrong_kind(key, "token ids (whole numbers below 2^32)", value)),
    }
}
