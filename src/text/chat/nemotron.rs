//! The chat template of the Nemotron-3-8B-Chat-4k-RLHF model card, which is that of NeMo's chat fine-tuning.
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
//! The rendered text ends with a newline, after which the model writes its answer and closes it with the marker of the
//! next turn. It is encoded in one call, without BOS. Training may have used other markers: NeMo's configuration lists
//! them under `data.chat_prompt_tokens`.

use serde::{Deserialize, Serialize};

use super::message::{Message, Role};
use crate::checkpoint::NemoPromptTokens;
use crate::error::{Error, Result};
use crate::text::looks_like_marker;

/// The template's markers, under NeMo's names.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NemotronMarkers {
    /// Opens the system turn, and with it the conversation.
    pub system_turn_start: String,
    /// Opens every later turn. The model ends its answer by writing it: generation stops there and does not show it.
    pub turn_start: String,
    /// Follows the content of a turn.
    pub end_of_turn: String,
    /// Follows the name of the speaker.
    pub end_of_name: String,
}

impl Default for NemotronMarkers {
    /// The model card's markers.
    fn default() -> NemotronMarkers {
        NemotronMarkers {
            system_turn_start: crate::checkpoint::card::SYSTEM_MARK.to_owned(),
            turn_start: crate::checkpoint::card::TURN_MARK.to_owned(),
            end_of_turn: "\n".to_owned(),
            end_of_name: "\n".to_owned(),
        }
    }
}

impl From<NemoPromptTokens> for NemotronMarkers {
    fn from(tokens: NemoPromptTokens) -> NemotronMarkers {
        let NemoPromptTokens { system_turn_start, turn_start, end_of_turn, end_of_name } = tokens;
        NemotronMarkers { system_turn_start, turn_start, end_of_turn, end_of_name }
    }
}

impl NemotronMarkers {
    /// The markers without surrounding whitespace, under NeMo's names, and how often a prompt of one user message has
    /// each. What follows a turn or a name is usually a line break, which is no marker and left out.
    pub(super) fn named(&self) -> Vec<(&'static str, &str, usize)> {
        let closing = [("end_of_turn", &self.end_of_turn, 2), ("end_of_name", &self.end_of_name, 3)];
        let closing = closing.into_iter().filter(|(_, marker, _)| looks_like_marker(marker.trim()));
        [("system_turn_start", &self.system_turn_start, 1), ("turn_start", &self.turn_start, 2)]
            .into_iter()
            .chain(closing)
            .map(|(name, marker, times)| (name, marker.trim(), times))
            .collect()
    }

    /// Renders a conversation, ready for the assistant's next answer: an optional system message, then user and
    /// assistant messages in turn, ending with a user message.
    ///
    /// Contents are inserted verbatim, as in the card's code: nothing is trimmed. Without a system message the system
    /// turn is empty, as the card recommends.
    ///
    /// # Errors
    /// [`Error::Request`] naming the message by its position, counted from 1, if the roles are in another order.
    pub fn render(&self, messages: &[Message]) -> Result<String> {
        let NemotronMarkers { system_turn_start, turn_start, end_of_turn, end_of_name } = self;
        let (system, turns) = match messages {
            [first, turns @ ..] if first.role == Role::System => (first.content.as_str(), turns),
            turns => ("", turns),
        };
        let skipped = messages.len() - turns.len();
        let mut text = format!("{system_turn_start}System{end_of_name}{system}{end_of_turn}");
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
            text.push_str(&format!("{turn_start}{name}{end_of_name}{}{end_of_turn}", turn.content));
        }
        if turns.len() % 2 == 0 {
            return Err(Error::Request(format!(
                "a conversation ends with a user message for the assistant to answer, but {}",
                if turns.is_empty() { "it has none" } else { "the last message is the assistant's" }
            )));
        }
        text.push_str(&format!("{turn_start}Assistant{end_of_name}"));
        Ok(text)
    }
}
