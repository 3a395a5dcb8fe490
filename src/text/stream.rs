//! Streaming decoder: turns ids into text as they are sampled.

use std::sync::Arc;

use super::Tokenizer;
use super::pieces::Decoding;
use crate::error::Result;

/// Decodes ids one at a time. The text appended by [`StreamDecoder::push`] and [`StreamDecoder::flush`] adds up to the
/// result of [`Tokenizer::decode`] (or [`Tokenizer::decode_continuation`]) on all the ids, because they share one
/// implementation. A push takes time proportional to the length of the piece, however many came before, and at most 3
/// bytes (the start of a character) are held back.
#[derive(Debug)]
pub struct StreamDecoder {
    tokenizer: Arc<Tokenizer>,
    decoding: Decoding,
}

impl StreamDecoder {
    /// Creates a decoder for a text that starts with these ids.
    pub fn new(tokenizer: Arc<Tokenizer>) -> StreamDecoder {
        let decoding = Decoding::new(tokenizer.pieces(), false);
        StreamDecoder { tokenizer, decoding }
    }

    /// Creates a decoder for ids that follow a prompt: a leading space is kept.
    pub fn continuing(tokenizer: Arc<Tokenizer>) -> StreamDecoder {
        let decoding = Decoding::new(tokenizer.pieces(), true);
        StreamDecoder { tokenizer, decoding }
    }

    /// Appends to `out` the text that is now certain: whole characters, and U+FFFD for bytes that can no longer become
    /// part of one.
    ///
    /// # Errors
    /// [`Error::Tokenizer`](crate::error::Error::Tokenizer) for an id outside the tokenizer's vocabulary.
    pub fn push(&mut self, id: u32, out: &mut String) -> Result<()> {
        self.decoding.push(self.tokenizer.pieces(), id, out)
    }

    /// Appends U+FFFD if bytes of a character were held back; no more ids may follow.
    pub fn flush(&mut self, out: &mut String) {
        self.decoding.flush(self.tokenizer.pieces(), out);
    }
}
