//! The filter `tojson` as transformers defines it: Python's `json.dumps` with `ensure_ascii=False`, not Jinja's own,
//! which escapes for HTML.

use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Error, ErrorKind, State, Value};

use super::jinja::{bounded_text, is_missing};

/// Deeper values are refused, as by the JSON reader.
const MAX_DEPTH: usize = 128;
/// Limit on the texts between items and in front of them.
const MAX_SEPARATOR_BYTES: usize = 64;

/// Formatting options of `json.dumps`.
struct JsonStyle {
    indent: Option<String>,
    between_items: String,
    after_key: String,
    ascii: bool,
    sorts_keys: bool,
}

/// Serializes `value`, with the keyword arguments of `json.dumps` that transformers passes on.
pub(super) fn dumps(state: &State, value: &Value, args: &Kwargs) -> Result<String, Error> {
    let indent = args.get::<Option<Value>>("indent")?.filter(|indent| !indent.is_none());
    let indent = match indent {
        None => None,
        Some(text) if text.kind() == ValueKind::String => Some(bounded_text(&text, MAX_SEPARATOR_BYTES)?),
        Some(count) => Some(" ".repeat(usize::try_from(count.as_i64().unwrap_or(0)).unwrap_or(0).min(64))),
    };
    let short = |text: &Value| bounded_text(text, MAX_SEPARATOR_BYTES);
    let separators = args.get::<Option<Value>>("separators")?.filter(|separators| !separators.is_none());
    let (between_items, after_key) = match separators {
        Some(pair) => (short(&pair.get_item_by_index(0)?)?, short(&pair.get_item_by_index(1)?)?),
        None if indent.is_some() => (",".to_owned(), ": ".to_owned()),
        None => (", ".to_owned(), ": ".to_owned()),
    };
    let style = JsonStyle {
        indent,
        between_items,
        after_key,
        ascii: args.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        sorts_keys: args.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
    };
    args.assert_all_used()?;
    let mut text = String::new();
    style.write(state, value, 0, &mut text)?;
    Ok(text)
}

/// A finite float as Python's `repr` writes it: the shortest digits that read back as the same number, with an exponent
/// below 1e-4 and from 1e16 on.
pub(super) fn python_float(number: f64) -> String {
    let scientific = format!("{number:e}");
    let exponent =
        scientific.split_once('e').and_then(|(digits, exponent)| Some((digits, exponent.parse::<i32>().ok()?)));
    match exponent {
        Some((digits, exponent)) if number != 0.0 && !(-4..16).contains(&exponent) => {
            let sign = if exponent < 0 { '-' } else { '+' };
            format!("{digits}e{sign}{:02}", exponent.unsigned_abs())
        }
        _ => format!("{number:?}"),
    }
}

impl JsonStyle {
    fn write(&self, state: &State, value: &Value, depth: usize, text: &mut String) -> Result<(), Error> {
        if depth > MAX_DEPTH {
            return Err(Error::new(ErrorKind::BadSerialization, format!("tojson: nested more than {MAX_DEPTH} deep")));
        }
        let before = text.len();
        match value.kind() {
            ValueKind::None => text.push_str("null"),
            ValueKind::Bool => text.push_str(if value.is_true() { "true" } else { "false" }),
            // minijinja formats numbers as Python does; only NaN and infinities are spelled out here.
            ValueKind::Number => match f64::try_from(value.clone()) {
                Ok(number) if number.is_nan() => text.push_str("NaN"),
                Ok(number) if number.is_infinite() => {
                    text.push_str(if number > 0.0 { "Infinity" } else { "-Infinity" });
                }
                Ok(number) if !value.is_integer() => text.push_str(&python_float(number)),
                _ => text.push_str(&value.to_string()),
            },
            ValueKind::String => self.quote(value.as_str().unwrap_or_default(), text),
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sorts_keys {
                    keys.sort_by_key(ToString::to_string);
                }
                self.list(state, "{", "}", depth, text, keys, |key, text| {
                    self.quote(&key_text(key), text);
                    text.push_str(&self.after_key);
                    self.write(state, &value.get_item(key)?, depth + 1, text)
                })?;
            }
            _ if is_missing(value) => {
                let detail = format!("tojson: a value of kind {} is not JSON", value.kind());
                return Err(Error::new(ErrorKind::BadSerialization, detail));
            }
            _ => {
                let items = value.try_iter()?.collect();
                self.list(state, "[", "]", depth, text, items, |item, text| self.write(state, item, depth + 1, text))?;
            }
        }
        state.consume_fuel(1 + (text.len().saturating_sub(before) / 64) as u64)
    }

    #[expect(clippy::too_many_arguments, reason = "one place for both brackets")]
    fn list(
        &self,
        state: &State,
        open: &str,
        close: &str,
        depth: usize,
        text: &mut String,
        items: Vec<Value>,
        mut write: impl FnMut(&Value, &mut String) -> Result<(), Error>,
    ) -> Result<(), Error> {
        text.push_str(open);
        let is_empty = items.is_empty();
        for (index, item) in items.iter().enumerate() {
            if index > 0 {
                text.push_str(&self.between_items);
            }
            self.new_line(state, depth + 1, text)?;
            write(item, text)?;
        }
        if !is_empty {
            self.new_line(state, depth, text)?;
        }
        text.push_str(close);
        Ok(())
    }

    fn new_line(&self, state: &State, depth: usize, text: &mut String) -> Result<(), Error> {
        if let Some(indent) = &self.indent {
            state.consume_fuel((indent.len() * depth / 64) as u64)?;
            text.push('\n');
            (0..depth).for_each(|_| text.push_str(indent));
        }
        Ok(())
    }

    fn quote(&self, content: &str, text: &mut String) {
        text.push('"');
        for character in content.chars() {
            match character {
                '"' => text.push_str("\\\""),
                '\\' => text.push_str("\\\\"),
                '\n' => text.push_str("\\n"),
                '\r' => text.push_str("\\r"),
                '\t' => text.push_str("\\t"),
                '\u{8}' => text.push_str("\\b"),
                '\u{c}' => text.push_str("\\f"),
                c if c < ' ' || self.ascii && !(' '..='~').contains(&c) => {
                    let mut units = [0; 2];
                    c.encode_utf16(&mut units).iter().for_each(|unit| text.push_str(&format!("\\u{unit:04x}")));
                }
                c => text.push(c),
            }
        }
        text.push('"');
    }
}

/// An object key as Python writes it: always a string.
fn key_text(key: &Value) -> String {
    match key.kind() {
        ValueKind::Bool => if key.is_true() { "true" } else { "false" }.to_owned(),
        ValueKind::None => "null".to_owned(),
        _ => key.to_string(),
    }
}
