//! Finds out whether a tokenizer can express a chat format.

use std::collections::HashSet;

use super::{ChatFormat, ChatTemplate, Message, NemotronMarkers};
use crate::checkpoint::MAX_TEMPLATE_BYTES;
use crate::error::{Error, Result, list_some};
use crate::text::Tokenizer;

/// Reasons to doubt that a model would understand a chat format, one per line.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct FormatProblems {
    /// Likely mistakes.
    pub warnings: Vec<String>,
    /// Reasons not to use the format at all.
    pub refusals: Vec<String>,
}

impl FormatProblems {
    /// # Errors
    /// [`Error::Request`] with all refusals, if there are any.
    pub fn refuse(&self) -> Result<()> {
        match &self.refusals[..] {
            [] => Ok(()),
            reasons => Err(Error::Request(format!("{}; choose another chat format", reasons.join("; ")))),
        }
    }
}

/// Limit on the stop strings of one request.
pub(crate) const MAX_STOP_STRINGS: usize = 64;
/// Limit on the length of a stop string, in bytes.
pub(crate) const MAX_STOP_BYTES: usize = 1024;
/// Limits on what a package's manifest may hold; a checkpoint of the largest known formats has a tenth of each.
const MAX_TEMPLATES: usize = 64;
const MAX_NAME_BYTES: usize = 256;
const MAX_MARKER_BYTES: usize = 1 << 10;
const MAX_SPECIAL_TOKENS: usize = 256;
const MAX_STOP_IDS: usize = 1 << 10;
/// Longer substrings of a prompt do not look like markers.
const MAX_WORD_BYTES: usize = 64;

impl ChatFormat {
    /// Checks a format that was read from a file: sizes, ids below `vocab_size`, and that the template can be parsed.
    pub(crate) fn validate(&self, vocab_size: usize) -> Result<(), String> {
        let at_most = |what: &str, found: usize, limit: usize| match found > limit {
            true => Err(format!("{found} {what}; at most {limit} are accepted")),
            false => Ok(()),
        };
        at_most("stop strings", self.stop_strings.len(), MAX_STOP_STRINGS)?;
        at_most("stop ids", self.eos_token_ids.len(), MAX_STOP_IDS)?;
        at_most("special tokens", self.special_tokens.len(), MAX_SPECIAL_TOKENS)?;
        at_most("named templates", self.named_templates.len(), MAX_TEMPLATES)?;
        let end_of_turn = self.end_of_turn.iter();
        let stops = self.stop_strings.iter().chain(end_of_turn.clone().map(|end| &end.text));
        if let Some(stop) = stops.clone().find(|stop| stop.is_empty() || stop.len() > MAX_STOP_BYTES) {
            return Err(format!("a stop string of {} bytes; expected 1 to {MAX_STOP_BYTES}", stop.len()));
        }
        let ids = self.eos_token_ids.iter().copied().chain(end_of_turn.filter_map(|end| end.id));
        if let Some(id) = ids.clone().find(|id| *id as usize >= vocab_size) {
            return Err(format!("stop id {id}; the last id is {}", vocab_size.saturating_sub(1)));
        }
        let names =
            self.special_tokens.iter().flat_map(|(name, token)| [name, token]).chain(self.named_templates.keys());
        for name in names {
            at_most("bytes in the name of a token or template", name.len(), MAX_NAME_BYTES)?;
        }
        for source in self.named_templates.values() {
            at_most("bytes in a template", source.len(), MAX_TEMPLATE_BYTES)?;
        }
        match &self.template {
            ChatTemplate::Raw => Ok(()),
            ChatTemplate::Nemotron(markers) => {
                let NemotronMarkers { system_turn_start, turn_start, end_of_turn, end_of_name } = markers;
                if turn_start.trim().is_empty() {
                    return Err("turn_start is empty".into());
                }
                [system_turn_start, turn_start, end_of_turn, end_of_name]
                    .into_iter()
                    .try_for_each(|marker| at_most("bytes in a marker", marker.len(), MAX_MARKER_BYTES))
            }
            ChatTemplate::Jinja(jinja) => {
                at_most("bytes in the name of a template", jinja.name.len(), MAX_NAME_BYTES)?;
                jinja.check().map_err(|detail| format!("the template cannot be read: {detail}"))
            }
        }
    }

    /// Checks how `tokenizer`, prepared for this format, encodes the markers that the template writes.
    pub fn problems(&self, tokenizer: &Tokenizer) -> FormatProblems {
        let mut problems = FormatProblems::default();
        let prompt = match &self.template {
            ChatTemplate::Raw => Ok(String::new()),
            _ => self.render(&[Message::user("Hi")]),
        };
        match (&self.template, prompt) {
            (ChatTemplate::Nemotron(markers), Ok(text)) => {
                problems.refusals = broken_markers(markers, &text, tokenizer)
            }
            (ChatTemplate::Jinja(_), Ok(text)) => {
                let markers: HashSet<String> = tokenizer.markers().into_iter().map(|(marker, _)| marker).collect();
                let mut seen: HashSet<&str> = HashSet::new();
                let letters: Vec<&str> =
                    angled(&text).filter(|word| !markers.contains(*word) && seen.insert(word)).collect();
                if !letters.is_empty() {
                    problems.warnings.push(format!(
                        "the chat template writes {}, no token of this tokenizer: it becomes letters, as with transformers",
                        list_some(&letters)
                    ));
                }
            }
            (ChatTemplate::Jinja(_), Err(error)) => {
                problems.warnings.push(format!("the chat template does not take a user's message alone: {error}"));
            }
            (ChatTemplate::Nemotron(_), Err(error)) => problems.refusals.push(error.to_string()),
            (ChatTemplate::Raw, _) => {}
        }
        if self.stop_ids().is_empty() && self.chat_stop_strings().is_empty() {
            problems
                .warnings
                .push("the checkpoint names no end-of-sequence id: generations end at their token limit".into());
        }
        problems
    }
}

/// The markers that are not one token each wherever `text`, a prompt of one user message, has them.
fn broken_markers(markers: &NemotronMarkers, text: &str, tokenizer: &Tokenizer) -> Vec<String> {
    let ids = tokenizer.encode(text).unwrap_or_default();
    let named = markers.named();
    let mut broken: Vec<String> = Vec::new();
    for (index, (name, marker, _)) in named.iter().enumerate() {
        if named.iter().take(index).any(|(_, earlier, _)| earlier == marker) {
            continue;
        }
        // Several markers may be the same text.
        let written: usize = named.iter().filter(|(_, other, _)| other == marker).map(|(_, _, times)| times).sum();
        let found = tokenizer.marker_id(marker).map_or(0, |id| ids.iter().filter(|other| **other == id).count());
        if found < written {
            broken.push(format!(
                "the tokenizer has no piece for {marker:?}, the {name} of the chat format nemotron, and would break it \
                 into letters"
            ));
        }
    }
    broken
}

/// Substrings that look like markers in a prompt: `<…>` without spaces, up to [`MAX_WORD_BYTES`] long.
fn angled(text: &str) -> impl Iterator<Item = &str> {
    text.match_indices('<').filter_map(|(start, _)| {
        let rest = text.get(start..)?;
        let len = rest.bytes().take(MAX_WORD_BYTES).position(|byte| byte == b'>')? + 1;
        let word = rest.get(..len)?;
        let inner = word.get(1..)?;
        (word.len() > 3 && !inner.contains(['<', ' ', '\n', '"', '='])).then_some(word)
    })
}
