//! JSON of bounded size with unique keys: a repeated key is an error, not an update.

use std::fmt;
use std::io::Read;
use std::path::Path;

use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

use crate::error::{Error, Result, clip};
use crate::mmap::open_regular;

/// Reads the object in `path`, a regular file of at most `limit_bytes` bytes.
///
/// # Errors
/// [`Error::Io`] if it cannot be read; [`Error::Format`] if it is longer, is not a JSON object, is nested deeper than
/// 128 levels or repeats a key of an object.
pub(super) fn read_object(path: &Path, limit_bytes: u64) -> Result<Map<String, Value>> {
    let mut bytes = Vec::new();
    open_regular(path)?.take(limit_bytes + 1).read_to_end(&mut bytes).map_err(Error::io("read", path))?;
    if bytes.len() as u64 > limit_bytes {
        return Err(Error::format(path, format!("longer than {limit_bytes} bytes, the limit for this file")));
    }
    parse_object(path, &bytes)
}

/// Parses the object in `bytes`, the contents of `path`.
pub(super) fn parse_object(path: &Path, bytes: &[u8]) -> Result<Map<String, Value>> {
    // serde_json itself stops at 128 levels of nesting.
    match serde_json::from_slice::<UniqueKeys>(bytes) {
        Ok(UniqueKeys(Value::Object(object))) => Ok(object),
        Ok(UniqueKeys(other)) => Err(Error::format(path, format!("expected a JSON object, found {}", kind(&other)))),
        Err(error) => Err(Error::format(path, format!("not valid JSON: {}", clip(error)))),
    }
}

/// A value for a message: its JSON, clipped.
pub(super) fn shown(value: &Value) -> String {
    clip(value)
}

/// The kind of a value, with its article.
pub(super) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// A [`Value`] whose objects have unique keys.
pub(super) struct UniqueKeys(pub(super) Value);

impl<'de> Deserialize<'de> for UniqueKeys {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<UniqueKeys, D::Error> {
        deserializer.deserialize_any(AnyValue).map(UniqueKeys)
    }
}

struct AnyValue;

impl<'de> Visitor<'de> for AnyValue {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any JSON value")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Value, A::Error> {
        let mut values = Vec::new();
        while let Some(UniqueKeys(value)) = list.next_element()? {
            values.push(value);
        }
        Ok(values.into())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut object = Map::new();
        while let Some(key) = map.next_key::<String>()? {
            if object.contains_key(&key) {
                return Err(A::Error::custom(format_args!("duplicate key `{}`", clip(&key))));
            }
            let UniqueKeys(value) = map.next_value()?;
            object.insert(key, value);
        }
        Ok(object.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Map<String, Value>> {
        parse_object(Path::new("x.json"), text.as_bytes())
    }

    #[test]
    fn keeps_every_kind_of_value() {
        let text = r#"{"a":null,"b":[true,-1,18446744073709551615,1.5,"x\n"],"c":{"d":{}}}"#;
        assert_eq!(serde_json::to_string(&parse(text).unwrap()).unwrap(), text);
    }

    #[test]
    fn refuses_what_is_not_one_object_with_unique_keys() {
        for (text, reason) in [
            ("", "not valid JSON"),
            ("[]", "found a list"),
            ("{} {}", "trailing characters"),
            (r#"{"a":1,"a":1}"#, "duplicate key `a`"),
            (r#"{"x":[{"a":1,"b":2,"a":3}]}"#, "duplicate key `a`"),
            (r#"{"a":NaN}"#, "not valid JSON"),
            ("{\"a\u{1}\":1}", "not valid JSON"),
        ] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.starts_with("x.json: ") && error.contains(reason), "{text}: {error}");
        }
        let deep = format!("{{\"a\":{}", "[".repeat(100_000));
        assert!(parse(&deep).unwrap_err().to_string().contains("recursion limit"));
    }

    #[test]
    fn refuses_a_file_over_the_limit() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("big.json");
        std::fs::write(&path, "{\"a\": 123}").unwrap();
        assert!(read_object(&path, 10).is_ok());
        let error = read_object(&path, 9).unwrap_err().to_string();
        assert!(error.contains("longer than 9 bytes"), "{error}");
    }
}
