//! The chat template of the model card of Nemotron-3-8B-Chat-4k-RLHF.
//!
//! ```text
//! <extra_id_0>System
//! {system}
//! <extra_id_1>User
//! {prompt}
//! <extra_id_1>Assistant
//! {response}
//! <extra_id_1>User
//! …
//! <extra_id_1>Assistant
//! ```
//!
//! The rendered text ends with a newline, after which the model writes its answer and closes it with
//! [`TURN_MARKER`]. It is encoded whole, without BOS.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Opens the system turn, and with it the conversation.
pub const SYSTEM_MARKER: &str = crate::checkpoint::card::SYSTEM_MARK;

/// Opens every later turn. The model writes it to end its answer: generation stops there and does not show it.
pub const TURN_MARKER: &str = crate::checkpoint::card::TURN_MARK;

/// Who speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Instructions that hold for the conversation; the card recommends none.
    System,
    /// The person.
    User,
    /// The model.
    Assistant,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Role::System => "system",
            Role::User => "user",
            Role::Assistant => "assistant",
        })
    }
}

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Message {
    /// Who speaks.
    pub role: Role,
    /// What they say, verbatim.
    pub content: String,
}

impl Message {
    /// A system turn.
    pub fn system(content: impl Into<String>) -> Message {
        Message { role: Role::System, content: content.into() }
    }

    /// A user turn.
    pub fn user(content: impl Into<String>) -> Message {
        Message { role: Role::User, content: content.into() }
    }

    /// An assistant turn.
    pub fn assistant(content: impl Into<String>) -> Message {
        Message { role: Role::Assistant, content: content.into() }
    }
}

/// Renders a conversation, ready for the assistant's next answer. An optional system message comes first, then user
/// and assistant take turns, and a user's message is last.
///
/// Contents go in verbatim, as in the card's code: nothing is trimmed, and a marker written in a content counts as
/// a marker. Without a system message the system turn is empty, as the card recommends.
///
/// # Errors
/// [`Error::Request`] naming the message by its place, from 1, where the order is another one.
pub fn render(messages: &[Message]) -> Result<String> {
    let (system, turns) = match messages {
        [first, turns @ ..] if first.role == Role::System => (first.content.as_str(), turns),
        turns => ("", turns),
    };
    let skipped = messages.len() - turns.len();
    let mut text = format!("{SYSTEM_MARKER}System\n{system}\n");
    for (index, turn) in turns.iter().enumerate() {
        let expected = if index % 2 == 0 { Role::User } else { Role::Assistant };
        if turn.role != expected {
            return Err(Error::Request(format!(
                "message {} has role {}, but {expected} is next; after at most one leading system message, user and \
                 assistant take turns",
                index + skipped + 1,
                turn.role
            )));
        }
        let name = if turn.role == Role::User { "User" } else { "Assistant" };
        text.push_str(&format!("{TURN_MARKER}{name}\n{}\n", turn.content));
    }
    if turns.len() % 2 == 0 {
        return Err(Error::Request(format!(
            "a conversation ends with a user message for the assistant to answer, but of {} messages {}",
            messages.len(),
            if turns.is_empty() { "none is the user's" } else { "the last is the assistant's" }
        )));
    }
    text.push_str(TURN_MARKER);
    text.push_str("Assistant\n");
    Ok(text)
}
