//! Text: the tokenizer, the decoder that turns sampled ids into text as they come, and the chat template.
//!
//! The template writes the special pieces as text and its output is encoded whole, with nothing added, so there is
//! one place that knows them.

mod chat;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod package_form;
mod pieces;
mod sentencepiece;
mod stream;
mod tokenizer;

#[cfg(test)]
pub(crate) mod fixture;
#[cfg(test)]
mod tests;

pub use chat::{ChatFormat, ChatTemplate, EndOfTurn, JinjaTemplate, Message, NemotronMarkers, Role};
pub use sentencepiece::SentencePieceFacts;
pub use stream::StreamDecoder;
pub use tokenizer::Tokenizer;
