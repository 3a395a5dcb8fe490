//! A checkpoint's own chat template: Jinja, in the environment that transformers provides.
//!
//! That is Jinja2 with `trim_blocks` and `lstrip_blocks`, loop controls, the functions `raise_exception` and
//! `strftime_now`, a `tojson` equivalent to Python's `json.dumps`, and Python's string and dictionary methods.
//! Templates receive `messages`, `tools`, `documents`, `add_generation_prompt` and the tokenizer's special tokens by
//! name. The tags of `{% generation %}`, which mark assistant text for training, are accepted and have no effect.
//!
//! A template is an untrusted program. It can access nothing but its input, and a fuel budget bounds its time and
//! memory.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use chrono::NaiveDateTime;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Environment, ErrorKind, State, Value};
use serde::{Deserialize, Serialize};

use super::tojson::{dumps, python_float};
use crate::checkpoint::MAX_TEMPLATE_BYTES;
use crate::error::{Error, Result, clip};

/// One unit is roughly one instruction, or 64 bytes of output.
const FUEL: u64 = 256 << 10;
/// One extra unit for this many bytes of messages, enough to output them eight times.
const BYTES_PER_FUEL: usize = 8;
/// Longer conversations are refused; this is about a million tokens.
const MAX_MESSAGE_BYTES: usize = 4 << 20;
/// Nested values are dropped recursively, which takes stack, and each level costs a template at least one unit of fuel.
/// The stack is only reserved: untouched pages take no memory.
const STACK_BYTES_PER_FUEL: usize = 640;
/// The parser recurses once for an operator, which takes at least one byte of the template and less stack than this.
const STACK_BYTES_PER_SOURCE_BYTE: usize = 1 << 10;
/// What one template may take. Fuel bounds instructions and output, but an instruction may visit a value that holds itself
/// many times over, which fuel does not see; templates of real checkpoints take milliseconds.
const DEADLINE: Duration = Duration::from_secs(5);
/// Threads that may run past their deadline at the same time; each keeps a core busy and holds its memory.
const MAX_OVERDUE: usize = 2;
/// The largest number in the pattern of `str.format`: a width or a precision beyond it is an allocation, not a layout.
const MAX_FORMAT_NUMBER: usize = 10_000;
/// Bytes that all calls of `str.format` in one rendering may make.
const MAX_FORMATTED_BYTES: usize = 16 << 20;
/// A longer value is not turned into text outside the template's output, whose length fuel bounds.
const MAX_VALUE_BYTES: usize = 1 << 20;
/// Limit on nested templates and recursive macros; each level takes a few of these.
const RECURSION: usize = 200;

/// A Jinja template and its name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JinjaTemplate {
    /// The checkpoint's name for it (`default` if there is only one), or the file it was read from.
    pub name: String,
    /// The template text.
    pub source: String,
}

/// Carries the message of `raise_exception` through minijinja's error.
#[derive(Debug)]
struct Raised(String);

impl fmt::Display for Raised {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Raised {}

impl JinjaTemplate {
    /// Checks that the template parses.
    ///
    /// # Errors
    /// The line and the reason.
    pub fn check(&self) -> Result<(), String> {
        self.check_size()?;
        let source = without_generation_tags(&self.source).to_string();
        // Parsing ends; it is not kept waiting by a rendering that does not.
        static OVERDUE: AtomicUsize = AtomicUsize::new(0);
        let stack_bytes = source.len().saturating_mul(STACK_BYTES_PER_SOURCE_BYTE);
        run_until(DEADLINE, &OVERDUE, stack_bytes, move || {
            let environment = environment(NaiveDateTime::default());
            environment.template_from_named_str("chat_template", &source).map(|_| ()).map_err(|error| reason(&error))
        })
    }

    fn check_size(&self) -> Result<(), String> {
        match self.source.len() {
            bytes if bytes > MAX_TEMPLATE_BYTES => {
                Err(format!("{bytes} bytes; a chat template has at most {MAX_TEMPLATE_BYTES}"))
            }
            _ => Ok(()),
        }
    }

    /// Renders `messages`, a list of objects. `special_tokens` become variables, and `now` is the current time.
    ///
    /// # Errors
    /// [`Error::Request`] with the message of `raise_exception`, or with the line where the template fails.
    pub(super) fn render(
        &self,
        messages: &[serde_json::Value],
        special_tokens: &BTreeMap<String, String>,
        now: NaiveDateTime,
    ) -> Result<String> {
        let message_bytes: usize = messages.iter().map(text_bytes).sum();
        if message_bytes > MAX_MESSAGE_BYTES {
            let detail =
                format!("the messages have {message_bytes} bytes; a chat template accepts at most {MAX_MESSAGE_BYTES}");
            return Err(Error::Request(detail));
        }
        let fuel = FUEL + (message_bytes / BYTES_PER_FUEL) as u64;
        let stack_bytes = usize::try_from(fuel).unwrap_or(usize::MAX).saturating_mul(STACK_BYTES_PER_FUEL);
        let stack_bytes = stack_bytes.saturating_add(self.source.len().saturating_mul(STACK_BYTES_PER_SOURCE_BYTE));
        let (template, messages, tokens) = (self.clone(), messages.to_vec(), special_tokens.clone());
        let outcome = self
            .check_size()
            .map_err(|detail| format!("has {detail}"))
            .and_then(|()| on_own_thread(stack_bytes, move || template.render_here(&messages, &tokens, now, fuel)));
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

/// Runs `work` on a thread with a stack of that size and some more, and waits for it until [`DEADLINE`].
fn on_own_thread<T: Send + 'static>(
    stack_bytes: usize,
    work: impl FnOnce() -> Result<T, String> + Send + 'static,
) -> Result<T, String> {
    static OVERDUE: AtomicUsize = AtomicUsize::new(0);
    run_until(DEADLINE, &OVERDUE, stack_bytes, work)
}

/// Runs `work` on a thread, and waits for it until the deadline. A thread that is not done by then is left to itself,
/// because nothing can end it; `overdue` counts those that still run, and beyond [`MAX_OVERDUE`] of them nothing starts.
fn run_until<T: Send + 'static>(
    deadline: Duration,
    overdue: &'static AtomicUsize,
    stack_bytes: usize,
    work: impl FnOnce() -> Result<T, String> + Send + 'static,
) -> Result<T, String> {
    if overdue.load(Ordering::SeqCst) >= MAX_OVERDUE {
        return Err(format!("cannot run: {MAX_OVERDUE} earlier runs have taken too long and have not ended yet"));
    }
    // Without a buffer, `send` succeeds exactly if the outcome was received in time.
    let (sender, receiver) = mpsc::sync_channel(0);
    let thread = std::thread::Builder::new().name("chat template".into());
    thread
        .stack_size(stack_bytes.saturating_add(1 << 20))
        .spawn(move || {
            if sender.send(work()).is_err() {
                overdue.fetch_sub(1, Ordering::SeqCst);
            }
        })
        .map_err(|error| format!("cannot run, because a thread could not be started: {error}"))?;
    match receiver.recv_timeout(deadline) {
        Ok(outcome) => outcome,
        Err(RecvTimeoutError::Timeout) => {
            overdue.fetch_add(1, Ordering::SeqCst);
            Err(format!("takes more than {} seconds", deadline.as_secs_f32()))
        }
        Err(RecvTimeoutError::Disconnected) => Err("crashed the template engine".to_owned()),
    }
}

fn environment(now: NaiveDateTime) -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().unwrap_or_default());
    environment.set_recursion_limit(RECURSION);
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_formatter(|out, state, value| match f64::try_from(value.clone()) {
        Ok(number) if value.is_number() && !value.is_integer() && number.is_finite() => {
            Ok(out.write_str(&python_float(number))?)
        }
        _ => minijinja::escape_formatter(out, state, value),
    });
    let formatted = AtomicUsize::new(0);
    environment.set_unknown_method_callback(move |state, value, method, args| {
        if let ("format", Some(pattern)) = (method, value.as_str()) {
            check_format(pattern, args, &formatted)?;
        }
        methods(state, value, method, args)
    });
    environment.add_function("raise_exception", |words: &Value| -> Result<Value, minijinja::Error> {
        let words = bounded_text(words, MAX_VALUE_BYTES)?;
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

/// Checks a call of `str.format` before it allocates: fuel sees neither widths nor how often a pattern has a field.
/// `formatted` counts the bytes that the calls of one rendering may make.
fn check_format(pattern: &str, args: &[Value], formatted: &AtomicUsize) -> Result<(), minijinja::Error> {
    let numbers = pattern.split(|c: char| !c.is_ascii_digit()).filter(|number| !number.is_empty());
    let mut bytes = pattern.len();
    for number in numbers {
        match number.parse::<usize>() {
            Ok(number) if number <= MAX_FORMAT_NUMBER => bytes = bytes.saturating_add(number),
            _ => {
                let detail = format!("str.format takes widths and precisions up to {MAX_FORMAT_NUMBER}");
                return Err(minijinja::Error::new(ErrorKind::InvalidOperation, detail));
            }
        }
    }
    let fields = pattern.matches('{').count();
    for arg in args {
        let arg_bytes = match arg.as_str() {
            Some(text) => text.len(),
            None => bounded_text(arg, MAX_VALUE_BYTES)?.len(),
        };
        bytes = bytes.saturating_add(arg_bytes.saturating_mul(fields));
    }
    if formatted.fetch_add(bytes.min(MAX_FORMATTED_BYTES), Ordering::Relaxed).saturating_add(bytes)
        > MAX_FORMATTED_BYTES
    {
        let detail = format!("str.format may make up to {MAX_FORMATTED_BYTES} bytes in one prompt");
        return Err(minijinja::Error::new(ErrorKind::InvalidOperation, detail));
    }
    Ok(())
}

/// A value as text, unless that is longer than `limit`: a value that holds itself many times over has no end.
pub(super) fn bounded_text(value: &Value, limit: usize) -> Result<String, minijinja::Error> {
    struct Bounded(String, usize);
    impl fmt::Write for Bounded {
        fn write_str(&mut self, text: &str) -> fmt::Result {
            if self.0.len() + text.len() > self.1 {
                return Err(fmt::Error);
            }
            self.0.push_str(text);
            Ok(())
        }
    }
    let mut text = Bounded(String::new(), limit);
    match fmt::write(&mut text, format_args!("{value}")) {
        Ok(()) => Ok(text.0),
        Err(fmt::Error) => {
            let detail = format!("a value has more than {limit} bytes as text");
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, detail))
        }
    }
}

/// Python's methods: those of `minijinja-contrib` and a few more that templates use.
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

/// Converts a JSON value, keeping the order of keys.
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

/// Total bytes of all strings in a value.
fn text_bytes(json: &serde_json::Value) -> usize {
    use serde_json::Value as Json;
    match json {
        Json::String(text) => text.len(),
        Json::Array(items) => items.iter().map(text_bytes).sum(),
        Json::Object(object) => object.iter().map(|(key, value)| key.len() + text_bytes(value)).sum(),
        _ => 1,
    }
}

/// Replaces `{% generation %}` and `{% endgeneration %}` by a block that is always taken.
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
            // The next tag may start inside this one, within a quoted string.
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

/// The message of `raise_exception`, if that was the error.
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

/// One line about an error from minijinja.
fn reason(error: &minijinja::Error) -> String {
    let line = error.line().map_or(String::new(), |line| format!("line {line}: "));
    match error.kind() {
        ErrorKind::OutOfFuel => format!("{line}it exceeds the time and output limits of a chat template"),
        kind => format!("{line}{}", error.detail().map_or_else(|| kind.to_string(), clip)),
    }
}

/// Returns true for the kinds of value that JSON cannot represent.
pub(super) fn is_missing(value: &Value) -> bool {
    matches!(value.kind(), ValueKind::Undefined | ValueKind::Invalid | ValueKind::Plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_so_many_runs_are_overdue_at_once() {
        static OVERDUE: AtomicUsize = AtomicUsize::new(0);
        let run = |gate: mpsc::Receiver<()>| {
            run_until(Duration::from_millis(20), &OVERDUE, 0, move || Ok(gate.recv().is_err()))
        };
        let (gates, blocked): (Vec<_>, Vec<_>) = (0..MAX_OVERDUE).map(|_| mpsc::channel::<()>()).unzip();
        for receiver in blocked {
            assert!(run(receiver).unwrap_err().contains("takes more than 0.02 seconds"));
        }
        let (_, open) = mpsc::channel();
        assert!(run(open).unwrap_err().contains("2 earlier runs"));
        drop(gates);
        while OVERDUE.load(Ordering::SeqCst) > 0 {
            std::thread::yield_now();
        }
        let (sender, open) = mpsc::channel();
        drop(sender);
        assert!(run(open).unwrap());
    }
}
