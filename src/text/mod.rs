//! Text: the tokenizer, the streaming decoder and the chat template.
//!
//! The template writes special pieces as text and its output is encoded in one call with nothing added, so only the
//! template has to know about them.

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
