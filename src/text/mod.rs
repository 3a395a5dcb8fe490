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

pub use chat::{ChatFormat, ChatTemplate, EndOfTurn, FormatProblems, JinjaTemplate, Message, NemotronMarkers, Role};
pub(crate) use chat::{MAX_STOP_BYTES, MAX_STOP_STRINGS};
pub use sentencepiece::SentencePieceFacts;
pub use stream::StreamDecoder;
pub use tokenizer::Tokenizer;
use tokenizer::looks_like_marker;
