//! The chat format of a package: the one source of its template, of the ids and texts that end an answer, and of
//! whether whitespace around an answer is removed.

mod message;
mod nemotron;

use serde::{Deserialize, Serialize};

pub use message::{Message, Role};
pub use nemotron::NemotronMarkers;

use super::Tokenizer;
use crate::error::Result;

/// How a conversation becomes a prompt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum ChatTemplate {
    /// The model card's, with these markers.
    Nemotron(NemotronMarkers),
    /// None: the contents one after the other, with nothing added.
    Raw,
}

/// A text that ends an answer because the template writes it after one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EndOfTurn {
    /// The text.
    pub text: String,
    /// Its id, where it is one token.
    pub id: Option<u32>,
}

/// A chat format, as a package keeps it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChatFormat {
    /// How a conversation becomes a prompt.
    pub template: ChatTemplate,
    /// Ids that end every generation, with or without the template.
    pub eos_token_ids: Vec<u32>,
    /// Texts that end every generation: the checkpoint's own.
    pub stop_strings: Vec<String>,
    /// The template's own end of an answer.
    pub end_of_turn: Option<EndOfTurn>,
}

impl ChatFormat {
    /// The model card's format: its template with these markers, ended by `eos_token_ids` or the marker of the next
    /// turn.
    pub fn nemotron(markers: NemotronMarkers, eos_token_ids: &[u32], tokenizer: &Tokenizer) -> ChatFormat {
        let text = markers.turn_start.clone();
        let end_of_turn = Some(EndOfTurn { id: tokenizer.id(&text), text });
        ChatFormat {
            template: ChatTemplate::Nemotron(markers),
            eos_token_ids: eos_token_ids.to_vec(),
            stop_strings: Vec::new(),
            end_of_turn,
        }
    }

    /// No template, and `eos_token_ids` alone end a generation.
    pub fn raw(eos_token_ids: &[u32]) -> ChatFormat {
        ChatFormat {
            template: ChatTemplate::Raw,
            eos_token_ids: eos_token_ids.to_vec(),
            stop_strings: Vec::new(),
            end_of_turn: None,
        }
    }

    /// The text of a conversation, ready for the assistant's next answer.
    ///
    /// # Errors
    /// [`Error::Request`](crate::Error::Request) where the template does not take these messages.
    pub fn render(&self, messages: &[Message]) -> Result<String> {
        match &self.template {
            ChatTemplate::Nemotron(markers) => markers.render(messages),
            ChatTemplate::Raw => Ok(messages.iter().map(|message| message.content.as_str()).collect()),
        }
    }

    /// The ids of a conversation, ready for the assistant's next answer.
    ///
    /// # Errors
    /// As [`ChatFormat::render`] and [`Tokenizer::encode`].
    pub fn prompt(&self, tokenizer: &Tokenizer, messages: &[Message]) -> Result<Vec<u32>> {
        tokenizer.encode(&self.render(messages)?)
    }

    /// Ids that end an answer and are not shown, each once.
    pub fn stop_ids(&self) -> Vec<u32> {
        let end_of_turn = self.end_of_turn.iter().filter_map(|end| end.id);
        let mut ids: Vec<u32> = self.eos_token_ids.iter().copied().chain(end_of_turn).collect();
        ids.sort_unstable();
        ids.dedup();
        ids
    }

    /// Texts that end a chat answer and are not shown.
    pub fn chat_stop_strings(&self) -> Vec<String> {
        self.end_of_turn.iter().map(|end| end.text.clone()).chain(self.stop_strings.iter().cloned()).collect()
    }

    /// Whether whitespace around an answer is removed, as the model card's code does.
    pub fn trims(&self) -> bool {
        self.template != ChatTemplate::Raw
    }
}
