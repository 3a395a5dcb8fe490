//! Ids to text while they are being sampled.

use std::sync::Arc;

use super::Tokenizer;
use super::pieces::Decoding;
use crate::error::Result;

/// Decodes ids one at a time. What [`StreamDecoder::push`] and [`StreamDecoder::flush`] append, put together, is what
/// [`Tokenizer::decode`] (or [`Tokenizer::decode_continuation`]) gives for all the ids: they run the same code. A
/// push takes time in the piece's length, whatever came before; at most 3 bytes, the start of a
/// character, are held back.
#[derive(Debug)]
pub struct StreamDecoder {
    tokenizer: Arc<Tokenizer>,
    decoding: Decoding,
}

impl StreamDecoder {
    /// A decoder of a text of its own.
    pub fn new(tokenizer: Arc<Tokenizer>) -> StreamDecoder {
        let decoding = Decoding::new(tokenizer.pieces(), false);
        StreamDecoder { tokenizer, decoding }
    }

    /// A decoder of what follows a prompt: a leading space is kept.
    pub fn continuing(tokenizer: Arc<Tokenizer>) -> StreamDecoder {
        let decoding = Decoding::new(tokenizer.pieces(), true);
        StreamDecoder { tokenizer, decoding }
    }

    /// Appends to `out` the text that is certain now: whole characters, and U+FFFD for bytes that can no longer
    /// become one.
    ///
    /// # Errors
    /// [`Error::Tokenizer`](crate::error::Error::Tokenizer) for an id the tokenizer does not have.
    pub fn push(&mut self, id: u32, out: &mut String) -> Result<()> {
        self.decoding.push(self.tokenizer.pieces(), id, out)
    }

    /// Appends what was held back; no id follows.
    pub fn flush(&mut self, out: &mut String) {
        self.decoding.flush(self.tokenizer.pieces(), out);
    }
}
