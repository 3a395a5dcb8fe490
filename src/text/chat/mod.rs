//! The chat format of a package: the single source of its template, of the ids and strings that end an answer, and of
//! whether whitespace around an answer is trimmed.

mod built_in;
mod check;
mod jinja;
mod marks;
mod message;
mod nemotron;
mod tojson;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::path::Path;

use chrono::{Local, NaiveDateTime};
use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use check::FormatProblems;
pub(crate) use check::{MAX_STOP_BYTES, MAX_STOP_STRINGS};
pub use jinja::JinjaTemplate;
pub(crate) use marks::PromptPart;
pub use message::{Message, Role};
pub use nemotron::NemotronMarkers;

use super::{Tokenizer, looks_like_marker};
use crate::checkpoint::read_template;
use crate::error::{Error, Result, clip};

/// The template that turns a conversation into a prompt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum ChatTemplate {
    /// The model card's template, with these markers.
    Nemotron(NemotronMarkers),
    /// A Jinja template, the checkpoint's or the user's.
    Jinja(JinjaTemplate),
    /// No template: the message contents concatenated, with nothing added.
    Raw,
}

impl ChatTemplate {
    /// Resolves a chat format by name or file: `nemotron`, `raw`, another built-in format, one of the checkpoint's
    /// `named` templates, or a Jinja template file whose name ends in `.jinja` or `.jinja2`.
    ///
    /// # Errors
    /// [`Error::Request`] with the known names; [`Error::Io`] and [`Error::Format`] for a file that cannot be read.
    pub fn choose(choice: &str, named: &BTreeMap<String, String>) -> Result<ChatTemplate> {
        let path = Path::new(choice);
        let template = match (built_in::find(choice), named.get(choice)) {
            // A checkpoint's template takes precedence over a built-in one of the same name, except that `nemotron` and
            // `raw` always mean the built-in formats.
            (Some(template), Some(_)) if !matches!(template, ChatTemplate::Jinja(_)) => template,
            (_, Some(source)) => ChatTemplate::Jinja(JinjaTemplate { name: choice.to_owned(), source: source.clone() }),
            (Some(template), None) => template,
            (None, None) if path.extension().is_some_and(|extension| extension == "jinja" || extension == "jinja2") => {
                let source = read_template(path)?;
                let name = path.file_name().map_or_else(|| choice.to_owned(), |name| name.to_string_lossy().into());
                ChatTemplate::Jinja(JinjaTemplate { name, source })
            }
            (None, None) => {
                let known: Vec<&str> = built_in::names().into_iter().chain(named.keys().map(String::as_str)).collect();
                return Err(Error::Request(format!(
                    "unknown chat format `{}`: name one of {}, or a file that ends in .jinja",
                    clip(choice),
                    known.join(", ")
                )));
            }
        };
        if let ChatTemplate::Jinja(jinja) = &template {
            jinja.check().map_err(|detail| Error::format(choice, format!("not a chat template: {detail}")))?;
        }
        Ok(template)
    }

    /// Names of the built-in formats that [`ChatTemplate::choose`] knows.
    pub fn built_in_names() -> Vec<&'static str> {
        built_in::names()
    }

    /// Pieces that have to be encoded whole in this template's prompts. In a text, special tokens are plain characters
    /// unless the tokenizer lists them; those that a template writes are intended. A Jinja template is the checkpoint's or
    /// the user's for use with transformers, which treats every special token and every control piece as one token.
    fn special_pieces(&self, special_tokens: &BTreeMap<String, String>, tokenizer: &Tokenizer) -> Vec<String> {
        match self {
            ChatTemplate::Nemotron(_) if tokenizer.sentencepiece().is_none() => Vec::new(),
            ChatTemplate::Nemotron(markers) => {
                markers.named().into_iter().map(|(_, marker, _)| marker.to_owned()).collect()
            }
            ChatTemplate::Jinja(_) => {
                tokenizer.unspelled_pieces().map(str::to_owned).chain(special_tokens.values().cloned()).collect()
            }
            ChatTemplate::Raw => Vec::new(),
        }
    }

    /// A short description for people.
    pub fn describe(&self) -> String {
        match self {
            ChatTemplate::Nemotron(markers) if *markers == NemotronMarkers::default() => "nemotron".to_owned(),
            ChatTemplate::Nemotron(NemotronMarkers { system_turn_start, turn_start, .. }) => {
                format!("nemotron with the markers {system_turn_start:?} and {turn_start:?}")
            }
            ChatTemplate::Jinja(jinja) => format!("jinja template `{}`", clip(&jinja.name)),
            ChatTemplate::Raw => "raw: no template".to_owned(),
        }
    }
}

/// A string that ends an answer because the template writes it after one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EndOfTurn {
    /// The text.
    pub text: String,
    /// Its id, where it is one token.
    pub id: Option<u32>,
}

/// A chat format as stored in a package.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChatFormat {
    /// The template that turns a conversation into a prompt.
    pub template: ChatTemplate,
    /// Ids that end every generation, with or without the template.
    pub eos_token_ids: Vec<u32>,
    /// Strings that end every generation, as set by the checkpoint.
    pub stop_strings: Vec<String>,
    /// The end-of-answer marker of the template itself.
    pub end_of_turn: Option<EndOfTurn>,
    /// The tokenizer's special tokens, under their template names: `bos_token`, `eos_token`.
    pub special_tokens: BTreeMap<String, String>,
    /// The checkpoint's templates by name, the alternatives to [`ChatFormat::template`].
    pub named_templates: BTreeMap<String, String>,
    /// Encodes markers and special tokens that occur in message contents as plain text. Off by default: then they act
    /// as markers, as in the model card's code.
    #[serde(skip)]
    pub escape_markers: bool,
}

impl ChatFormat {
    /// A format with this template; answers end at `eos_token_ids` or at the marker that the template writes after an
    /// answer.
    pub fn new(template: ChatTemplate, eos_token_ids: &[u32], tokenizer: &Tokenizer) -> ChatFormat {
        ChatFormat::raw(eos_token_ids).with_template(template, tokenizer)
    }

    /// The model card's format.
    pub fn nemotron(markers: NemotronMarkers, eos_token_ids: &[u32], tokenizer: &Tokenizer) -> ChatFormat {
        ChatFormat::new(ChatTemplate::Nemotron(markers), eos_token_ids, tokenizer)
    }

    /// No template; only `eos_token_ids` end a generation.
    pub fn raw(eos_token_ids: &[u32]) -> ChatFormat {
        ChatFormat {
            template: ChatTemplate::Raw,
            eos_token_ids: eos_token_ids.to_vec(),
            stop_strings: Vec::new(),
            end_of_turn: None,
            special_tokens: BTreeMap::new(),
            named_templates: BTreeMap::new(),
            escape_markers: false,
        }
    }

    /// This format with another template, and the end of an answer derived from it. `tokenizer` is prepared for that
    /// template, see [`ChatFormat::prepare`].
    pub fn with_template(&self, template: ChatTemplate, tokenizer: &Tokenizer) -> ChatFormat {
        let mut format = ChatFormat { template, ..self.clone() };
        format.end_of_turn = format.find_end_of_turn(tokenizer);
        format
    }

    /// This format with the template resolved by [`ChatTemplate::choose`], and the tokenizer for it. `tokenizer` is the
    /// checkpoint's, not one that another format has prepared.
    ///
    /// # Errors
    /// As [`ChatTemplate::choose`], and those of [`ChatFormat::prepare`].
    pub fn with_choice(&self, choice: &str, tokenizer: Tokenizer) -> Result<(ChatFormat, Tokenizer)> {
        let template = ChatTemplate::choose(choice, &self.named_templates)?;
        let chosen = ChatFormat { template, ..self.clone() };
        let tokenizer = chosen.prepare(tokenizer)?;
        let end_of_turn = chosen.find_end_of_turn(&tokenizer);
        Ok((ChatFormat { end_of_turn, ..chosen }, tokenizer))
    }

    /// The checkpoint's tokenizer, prepared to encode prompts in this format: the special tokens that the template
    /// writes are whole. So the ids of a conversation depend on nothing but the checkpoint and the format.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if the tokenizer rejects one of them.
    pub fn prepare(&self, tokenizer: Tokenizer) -> Result<Tokenizer> {
        Ok(self.prepare_and_list(tokenizer)?.0)
    }

    /// As [`ChatFormat::prepare`], with the list of pieces that were not whole before.
    pub(crate) fn prepare_and_list(&self, tokenizer: Tokenizer) -> Result<(Tokenizer, Vec<String>)> {
        let pieces = self.template.special_pieces(&self.special_tokens, &tokenizer);
        tokenizer.with_whole(&pieces)
    }

    /// Renders a conversation, ready for the assistant's next answer.
    ///
    /// # Errors
    /// [`Error::Request`] if the template rejects these messages, with the reason a Jinja template gives, if any.
    pub fn render(&self, messages: &[Message]) -> Result<String> {
        self.render_json(&json(messages))
    }

    /// As [`ChatFormat::render`], for messages with any roles and keys that the template supports.
    ///
    /// # Errors
    /// As [`ChatFormat::render`].
    pub fn render_json(&self, messages: &[Value]) -> Result<String> {
        self.render_at(messages, Local::now().naive_local())
    }

    fn render_at(&self, messages: &[Value], now: NaiveDateTime) -> Result<String> {
        match &self.template {
            ChatTemplate::Nemotron(markers) => markers.render(&typed(messages)?),
            ChatTemplate::Raw => Ok(typed(messages)?.into_iter().map(|message| message.content).collect()),
            ChatTemplate::Jinja(_) if messages.is_empty() => {
                Err(Error::Request("the conversation has no message".into()))
            }
            ChatTemplate::Jinja(template) => template.render(messages, &self.special_tokens, now),
        }
    }

    /// Renders and encodes a conversation, ready for the assistant's next answer.
    ///
    /// # Errors
    /// As [`ChatFormat::render`] and [`Tokenizer::encode`].
    pub fn prompt(&self, tokenizer: &Tokenizer, messages: &[Message]) -> Result<Vec<u32>> {
        self.prompt_of_json(tokenizer, &json(messages))
    }

    /// As [`ChatFormat::prompt`], for messages with any roles and keys that the template supports. Keys whose value is
    /// null count as absent.
    ///
    /// # Errors
    /// As [`ChatFormat::prompt`].
    pub fn prompt_of_json(&self, tokenizer: &Tokenizer, messages: &[Value]) -> Result<Vec<u32>> {
        self.encode_conversation(tokenizer, messages, false)
    }

    /// As [`ChatFormat::prompt_of_json`], for a conversation whose last message is the beginning of the assistant's next
    /// answer, which goes on from there: nothing ends that message. The text of the template is that of a new answer, with
    /// the beginning behind it.
    ///
    /// # Errors
    /// As [`ChatFormat::prompt`]; [`Error::Request`] if the last message is not the assistant's.
    pub fn prompt_to_continue(&self, tokenizer: &Tokenizer, messages: &[Value]) -> Result<Vec<u32>> {
        self.encode_conversation(tokenizer, messages, true)
    }

    fn encode_conversation(&self, tokenizer: &Tokenizer, messages: &[Value], continues: bool) -> Result<Vec<u32>> {
        let mut messages = messages.to_vec();
        messages.iter_mut().filter_map(Value::as_object_mut).for_each(|message| message.retain(|_, v| !v.is_null()));
        if !self.escape_markers {
            return tokenizer.encode(&self.render_begun(messages, continues)?);
        }
        let markers = self.markers(tokenizer);
        for message in messages.iter_mut().filter_map(Value::as_object_mut) {
            message.iter_mut().filter(|(key, _)| *key != "role").for_each(|(_, value)| marks::mark(value, &markers));
        }
        let text = self.render_begun(messages, continues).map_err(|error| match error {
            Error::Request(words) => Error::Request(marks::unmarked(&words)),
            other => other,
        })?;
        tokenizer.encode_parts(&marks::parts(&text, &markers))
    }

    /// Renders a conversation, whose last message is the beginning of the answer if it `continues`.
    fn render_begun(&self, mut messages: Vec<Value>, continues: bool) -> Result<String> {
        let begun = if continues { messages.pop() } else { None };
        let text = |message: &Value| {
            let is_answer = message.get("role").and_then(Value::as_str) == Some("assistant");
            message.get("content").and_then(Value::as_str).filter(|_| is_answer).map(str::to_owned)
        };
        let begun = match (continues, begun.as_ref().and_then(text)) {
            (true, None) => {
                return Err(Error::Request(
                    "only a text of the assistant, as the last message, can be continued".into(),
                ));
            }
            (_, begun) => begun.unwrap_or_default(),
        };
        Ok(self.render_json(&messages)? + &begun)
    }

    /// Ids that end an answer and are not shown, without duplicates.
    pub fn stop_ids(&self) -> Vec<u32> {
        let end_of_turn = self.end_of_turn.iter().filter_map(|end| end.id);
        let mut ids: Vec<u32> = self.eos_token_ids.iter().copied().chain(end_of_turn).collect();
        ids.sort_unstable();
        ids.dedup();
        ids
    }

    /// Strings that end a chat answer and are not shown.
    pub fn chat_stop_strings(&self) -> Vec<String> {
        let end_of_turn = self.end_of_turn.iter().map(|end| &end.text);
        let mut texts: Vec<String> = Vec::new();
        for text in end_of_turn.chain(&self.stop_strings) {
            if !texts.contains(text) {
                texts.push(text.clone());
            }
        }
        texts
    }

    /// Returns true if whitespace around an answer is trimmed, as the model card's code does.
    pub fn trims(&self) -> bool {
        self.template != ChatTemplate::Raw
    }

    /// Markers of the tokenizer and of the template.
    fn markers(&self, tokenizer: &Tokenizer) -> Vec<String> {
        let mut markers: Vec<String> = tokenizer.markers().into_iter().map(|(text, _)| text).collect();
        if let ChatTemplate::Nemotron(written) = &self.template {
            markers.extend(written.named().into_iter().map(|(_, marker, _)| marker.to_owned()));
        }
        markers.retain(|marker| !marker.trim().is_empty());
        markers
    }

    /// Finds the marker that the template writes between an answer and the next message: one of the tokenizer's markers
    /// or, failing that, text that looks like one.
    fn find_end_of_turn(&self, tokenizer: &Tokenizer) -> Option<EndOfTurn> {
        let jinja = match &self.template {
            ChatTemplate::Raw => return None,
            ChatTemplate::Nemotron(NemotronMarkers { turn_start, .. }) => {
                return Some(EndOfTurn { id: tokenizer.marker_id(turn_start), text: turn_start.clone() });
            }
            ChatTemplate::Jinja(jinja) => jinja,
        };
        const PROBES: [&str; 3] = ["firstquestion", "firstanswer", "secondquestion"];
        let [asked, answered, next] = PROBES;
        let conversation = [Message::user(asked), Message::assistant(answered), Message::user(next)];
        let text = jinja.render(&json(&conversation), &self.special_tokens, NaiveDateTime::default()).ok()?;
        let (_, after) = text.split_once(answered)?;
        let (between, _) = after.split_once(next)?;
        // A special token may be anything, also a line break or a letter, which ends no answer.
        let markers = tokenizer.markers().into_iter().filter(|(marker, _)| looks_like_marker(marker));
        let markers: Vec<(String, u32)> = markers.collect();
        let found = markers.iter().filter_map(|(marker, id)| Some((between.find(marker.as_str())?, marker, *id)));
        // The earliest match, and the longest of those.
        if let Some((_, text, id)) = found.min_by_key(|(at, marker, _)| (*at, usize::MAX - marker.len())) {
            return Some(EndOfTurn { text: text.clone(), id: Some(id) });
        }
        let looks = between.trim_start();
        let close = [('<', '>'), ('[', ']')].into_iter().find(|(open, _)| looks.starts_with(*open))?.1;
        let end = looks.find(close)? + close.len_utf8();
        let text = looks.get(..end).filter(|text| text.len() <= 64 && !text.contains(char::is_whitespace))?;
        Some(EndOfTurn { text: text.to_owned(), id: None })
    }
}

fn json(messages: &[Message]) -> Vec<Value> {
    let object = |message: &Message| serde_json::json!({"role": message.role.to_string(), "content": message.content});
    messages.iter().map(object).collect()
}

/// Messages for a template that only supports roles and contents.
fn typed(messages: &[Value]) -> Result<Vec<Message>> {
    let read = |(index, message): (usize, &Value)| {
        Message::deserialize(message).map_err(|error| {
            Error::Request(format!("message {}: {}; this chat format takes no others", index + 1, clip(error)))
        })
    };
    messages.iter().enumerate().map(read).collect()
}
