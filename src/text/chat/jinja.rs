//! A checkpoint's own chat template: Jinja, in the environment that transformers gives it.
//!
//! That is Jinja2 with `trim_blocks` and `lstrip_blocks`, loop controls, the functions `raise_exception` and
//! `strftime_now`, a `tojson` that is Python's `json.dumps`, and Python's methods of strings and dictionaries; templates
//! get `messages`, `tools`, `documents`, `add_generation_prompt` and the tokenizer's special tokens by their names. The
//! tags of `{% generation %}`, which mark what the model wrote for training, are read and change nothing.
//!
//! A template is a program from a file that is not trusted. It reaches nothing but its input, and a budget of fuel
//! bounds its time and memory.

use std::collections::BTreeMap;
use std::fmt;

use chrono::NaiveDateTime;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Environment, ErrorKind, State, Value};
use serde::{Deserialize, Serialize};

use super::tojson::dumps;
use crate::checkpoint::MAX_TEMPLATE_BYTES;
use crate::error::{Error, Result, clip};

/// One unit is about an instruction, or 64 bytes of text made.
const FUEL: u64 = 256 << 10;
/// A unit more for so many bytes of messages: room for eight copies of them.
const BYTES_PER_FUEL: usize = 8;
/// More is refused: a million tokens have about so many bytes.
const MAX_MESSAGE_BYTES: usize = 4 << 20;
/// Values within values are dropped one within the other, which takes stack, and each level costs a template a unit at
/// least. The stack is reserved, and is memory only as far as it is used.
const STACK_BYTES_PER_FUEL: usize = 640;
/// A template within templates, a macro that calls itself: each takes a few of these.
const RECURSION: usize = 200;

/// A template's name and text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JinjaTemplate {
    /// A checkpoint's name for it, `default` if it has one alone; or the file it was read from.
    pub name: String,
    /// The template.
    pub source: String,
}

/// Carries the words of `raise_exception` through the engine's error.
#[derive(Debug)]
struct Raised(String);

impl fmt::Display for Raised {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Raised {}

impl JinjaTemplate {
    /// Checks that the template can be read.
    ///
    /// # Errors
    /// The line and the reason where it cannot.
    pub fn check(&self) -> Result<(), String> {
        if self.source.len() > MAX_TEMPLATE_BYTES {
            return Err(format!("{} bytes; a chat template has at most {MAX_TEMPLATE_BYTES}", self.source.len()));
        }
        let source = without_generation_tags(&self.source);
        let environment = environment(NaiveDateTime::default());
        environment.template_from_named_str("chat_template", &source).map(|_| ()).map_err(|error| reason(&error))
    }

    /// The prompt of `messages`, a list of objects; `special_tokens` become variables, and `now` is the time.
    ///
    /// # Errors
    /// [`Error::Request`] with the words of `raise_exception`, or with the line where the template fails.
    pub(super) fn render(
        &self,
        messages: &[serde_json::Value],
        special_tokens: &BTreeMap<String, String>,
        now: NaiveDateTime,
    ) -> Result<String> {
        let message_bytes: usize = messages.iter().map(text_bytes).sum();
        if message_bytes > MAX_MESSAGE_BYTES {
            let detail = format!("the messages have {message_bytes} bytes; a chat template takes {MAX_MESSAGE_BYTES}");
            return Err(Error::Request(detail));
        }
        let fuel = FUEL + (message_bytes / BYTES_PER_FUEL) as u64;
        let stack_bytes = usize::try_from(fuel).unwrap_or(usize::MAX).saturating_mul(STACK_BYTES_PER_FUEL);
        let outcome = std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().name("chat template".into()).stack_size(stack_bytes);
            let thread = thread
                .spawn_scoped(scope, || self.render_here(messages, special_tokens, now, fuel))
                .map_err(|error| format!("there is no thread to run it on: {error}"))?;
            thread.join().unwrap_or_else(|_| Err("its engine gave up on it".to_owned()))
        });
        outcome.map_err(|detail| Error::Request(format!("the chat template `{}` {detail}", clip(&self.name))))
    }

    fn render_here(
        &self,
        messages: &[serde_json::Value],
        special_tokens: &BTreeMap<String, String>,
        now: NaiveDateTime,
        fuel: u64,
    ) -> Result<String, String> {
        let failed = |error: minijinja::Error| match raised(&error) {
            Some(words) => format!("says: {}", clip(words)),
            None => format!("failed: {}", reason(&error)),
        };
        let source = without_generation_tags(&self.source);
        let mut environment = environment(now);
        environment.set_fuel(Some(fuel));
        let template = environment.template_from_named_str("chat_template", &source).map_err(failed)?;
        let tokens = special_tokens.iter().map(|(name, token)| (name.as_str(), Value::from(token.as_str())));
        let input = [
            ("messages", messages.iter().map(value_of).collect::<Vec<Value>>().into()),
            ("tools", Value::from(())),
            ("documents", Value::from(())),
            ("add_generation_prompt", Value::from(true)),
        ];
        template.render(Value::from_pairs(tokens.chain(input))).map_err(failed)
    }
}

fn environment(now: NaiveDateTime) -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().unwrap_or_default());
    environment.set_recursion_limit(RECURSION);
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_unknown_method_callback(methods);
    environment.add_function("raise_exception", |words: &Value| -> Result<Value, minijinja::Error> {
        let words = words.to_string();
        Err(minijinja::Error::new(ErrorKind::InvalidOperation, words.clone()).with_source(Raised(words)))
    });
    environment.add_function("strftime_now", move |format: &str| -> Result<String, minijinja::Error> {
        use fmt::Write;
        let mut text = String::new();
        write!(text, "{}", now.format(format)).map_err(|_| {
            let detail = format!("strftime_now does not know the format `{}`", clip(format));
            minijinja::Error::new(ErrorKind::InvalidOperation, detail)
        })?;
        Ok(text)
    });
    environment.add_filter("tojson", |state: &State, value: &Value, args: Kwargs| dumps(state, value, &args));
    environment
}

/// Python's methods: those of `minijinja-contrib`, and a few that templates use beside them.
fn methods(state: &mut State, value: &Value, method: &str, args: &[Value]) -> Result<Value, minijinja::Error> {
    if let (Some(text), [arg]) = (value.as_str(), args)
        && let Some(arg) = arg.as_str()
    {
        let parts = |split: Option<(&str, &str)>, whole: [&str; 3]| {
            let parts = split.map_or(whole, |(before, after)| [before, arg, after]);
            Ok(Value::from(parts.map(Value::from).to_vec()))
        };
        match method {
            "removeprefix" => return Ok(text.strip_prefix(arg).unwrap_or(text).into()),
            "removesuffix" => return Ok(text.strip_suffix(arg).unwrap_or(text).into()),
            "partition" if !arg.is_empty() => return parts(text.split_once(arg), [text, "", ""]),
            "rpartition" if !arg.is_empty() => return parts(text.rsplit_once(arg), ["", "", text]),
            _ => {}
        }
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, method, args)
}

/// A value of JSON, as a template sees it; the order of keys stays.
fn value_of(json: &serde_json::Value) -> Value {
    use serde_json::Value as Json;
    match json {
        Json::Null => Value::from(()),
        Json::Bool(flag) => Value::from(*flag),
        Json::Number(number) => match (number.as_i64(), number.as_u64(), number.as_f64()) {
            (Some(whole), ..) => Value::from(whole),
            (_, Some(whole), _) => Value::from(whole),
            (.., float) => Value::from(float.unwrap_or(f64::NAN)),
        },
        Json::String(text) => Value::from(text.as_str()),
        Json::Array(items) => items.iter().map(value_of).collect::<Vec<Value>>().into(),
        Json::Object(object) => Value::from_pairs(object.iter().map(|(key, value)| (key.as_str(), value_of(value)))),
    }
}

/// Bytes of all texts in a value.
fn text_bytes(json: &serde_json::Value) -> usize {
    use serde_json::Value as Json;
    match json {
        Json::String(text) => text.len(),
        Json::Array(items) => items.iter().map(text_bytes).sum(),
        Json::Object(object) => object.iter().map(|(key, value)| key.len() + text_bytes(value)).sum(),
        _ => 1,
    }
}

/// Reads `{% generation %}` and `{% endgeneration %}` as a block that is always taken.
fn without_generation_tags(source: &str) -> String {
    let mut text = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start);
        text.push_str(before);
        let end = tag.find("%}").unwrap_or(tag.len());
        let inside = tag.get(2..end).unwrap_or_default();
        let name = inside.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+');
        match name {
            "generation" => text.push_str(&format!("{{%{}", inside.replacen("generation", "if true", 1))),
            "endgeneration" => text.push_str(&format!("{{%{}", inside.replacen("endgeneration", "endif", 1))),
            // The next tag may open inside of this one, if it is a text in quotes.
            _ => {
                text.push_str("{%");
                rest = tag.get(2..).unwrap_or_default();
                continue;
            }
        }
        rest = tag.get(end..).unwrap_or_default();
    }
    text.push_str(rest);
    text
}

/// The words of `raise_exception`, if it was that.
fn raised(error: &minijinja::Error) -> Option<&str> {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(one) = cause {
        if let Some(Raised(words)) = one.downcast_ref() {
            return Some(words);
        }
        cause = one.source();
    }
    None
}

/// One line about an error of the engine.
fn reason(error: &minijinja::Error) -> String {
    let line = error.line().map_or(String::new(), |line| format!("line {line}: "));
    match error.kind() {
        ErrorKind::OutOfFuel => format!("{line}it runs longer, or makes more text, than a chat template may"),
        kind => format!("{line}{}", error.detail().map_or_else(|| kind.to_string(), clip)),
    }
}

/// The kinds of value that JSON has no word for.
pub(super) fn is_missing(value: &Value) -> bool {
    matches!(value.kind(), ValueKind::Undefined | ValueKind::Invalid | ValueKind::Plain)
}
