//! The tokenizer: a tokenizer.json over the reference implementation, or a SentencePiece model, for encoding, and a
//! table for decoding.

use std::cell::Cell;
use std::fmt::Display;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Once;

use serde::de::IgnoredAny;

use super::pieces::{Decoding, PieceTable, Rules};
use super::sentencepiece::{self, SentencePieceFacts};
use crate::error::{Error, Result};

/// Vocabularies past this are taken for damaged files; the largest known ones have under 300,000 pieces.
const MAX_VOCAB_SIZE: usize = 1 << 24;

/// Turns text into token ids and back. Immutable, so it is shared by `Arc` between sessions and threads.
#[derive(Debug)]
pub struct Tokenizer {
    encoder: Encoder,
    pieces: PieceTable,
}

/// What encodes, by the kind of the file.
#[derive(Debug)]
enum Encoder {
    HuggingFace(Box<tokenizers::Tokenizer>),
    SentencePiece(Box<sentencepiece::Model>),
}

impl Tokenizer {
    /// Reads a tokenizer.json, or a SentencePiece model where the content is one. `name` is the file named in errors.
    /// Truncation and padding a tokenizer.json may ask for are off: a prompt is never cut in silence.
    ///
    /// # Errors
    /// [`Error::Format`] where the file is neither; [`Error::Unsupported`] where it asks for something this version
    /// does not compute.
    pub fn from_bytes(name: &Path, bytes: &[u8]) -> Result<Tokenizer> {
        if sentencepiece::is_model(bytes) {
            Self::from_sentencepiece(name, bytes)
        } else {
            Self::from_json(name, bytes)
        }
    }

    /// Reads a SentencePiece model (`tokenizer.model`). `name` is the file named in errors.
    ///
    /// # Errors
    /// [`Error::Format`] where the file is not one, or contradicts itself; [`Error::Unsupported`] where it is of a type
    /// other than BPE and unigram, or changes decoded text.
    pub fn from_sentencepiece(name: &Path, bytes: &[u8]) -> Result<Tokenizer> {
        let model = sentencepiece::Model::from_bytes(name, bytes)?;
        let pieces = model.piece_table();
        Ok(Tokenizer { encoder: Encoder::SentencePiece(Box::new(model)), pieces })
    }

    /// Reads a tokenizer.json. `name` is the file named in errors.
    ///
    /// # Errors
    /// [`Error::Format`] where the file is not one; [`Error::Unsupported`] where its decoder is one this version does
    /// not compute.
    pub fn from_json(name: &Path, bytes: &[u8]) -> Result<Tokenizer> {
        let refused = |source: &dyn Display| Error::format(name, format!("not a tokenizer.json: {source}"));
        // A truncated file is found here, with its line and column.
        serde_json::from_slice::<IgnoredAny>(bytes).map_err(|source| refused(&source))?;
        let mut inner = contained(|| tokenizers::Tokenizer::from_bytes(bytes)).map_err(|source| refused(&source))?;
        inner
            .with_padding(None)
            .with_truncation(None)
            .map_err(|source| Error::format(name, format!("truncation cannot be turned off: {source}")))?;
        let Some(largest) = inner.get_vocab(true).into_values().max() else {
            return Err(Error::format(name, "the vocabulary is empty"));
        };
        let vocab_size = largest as usize + 1;
        if vocab_size > MAX_VOCAB_SIZE {
            return Err(Error::format(name, format!("largest id {largest}; at most {} is read", MAX_VOCAB_SIZE - 1)));
        }
        let decoder = inner
            .get_decoder()
            .map(serde_json::to_value)
            .transpose()
            .map_err(|source| Error::format(name, format!("decoder: {source}")))?;
        let rules = Rules::read(decoder.as_ref()).map_err(|error| Error::unsupported(name, error.to_string()))?;
        let pieces = PieceTable::new(vocab_size, rules, |id| inner.id_to_token(id));
        Ok(Tokenizer { encoder: Encoder::HuggingFace(Box::new(inner)), pieces })
    }

    /// The ids of `text`, encoded in one call; no special tokens are added. Special pieces written in the text become
    /// their ids, which is how the chat template's reach the model; but control pieces of a SentencePiece model, such as
    /// `</s>`, are plain characters in a text.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] where the tokenizer has no way to write the text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let inner = match &self.encoder {
            Encoder::HuggingFace(inner) => inner,
            Encoder::SentencePiece(model) => return model.encode(text),
        };
        let encoding = contained(|| inner.encode_fast(text, false))
            .map_err(|source| Error::Tokenizer(format!("cannot encode a text of {} bytes: {source}", text.len())))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of `ids` as a text of its own: the leading space a tokenizer adds in front of a text is removed
    /// where the file says so. Every id of a tokenizer.json shows, special ones too (`</s>`): which ids end a
    /// generation and stay out of sight is for the stop logic to say. Control pieces of a SentencePiece model have no
    /// text, and its unknown piece has the one the model says, ` ⁇ ` if it says none. Bytes that make no character become U+FFFD, for byte-fallback
    /// pieces one for each byte, as SentencePiece does.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] for an id at or past [`Tokenizer::vocab_size`].
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.decode_all(ids, false)
    }

    /// The text of `ids` that follow other ids: as [`Tokenizer::decode`], but a leading space is kept. What a
    /// model adds to a prompt is decoded this way, so that `decode(prompt)` followed by it is the text of both.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn decode_continuation(&self, ids: &[u32]) -> Result<String> {
        self.decode_all(ids, true)
    }

    fn decode_all(&self, ids: &[u32], continuing: bool) -> Result<String> {
        let mut text = String::new();
        let mut decoding = Decoding::new(&self.pieces, continuing);
        for id in ids {
            decoding.push(&self.pieces, *id, &mut text)?;
        }
        decoding.flush(&self.pieces, &mut text);
        Ok(text)
    }

    /// The piece of an id as the vocabulary spells it: `▁the`, `<0x0A>`, `</s>`.
    pub fn piece(&self, id: u32) -> Option<String> {
        match &self.encoder {
            Encoder::HuggingFace(inner) => inner.id_to_token(id),
            Encoder::SentencePiece(model) => model.piece(id).map(str::to_string),
        }
    }

    /// The id of a piece as the vocabulary spells it.
    pub fn id(&self, piece: &str) -> Option<u32> {
        match &self.encoder {
            Encoder::HuggingFace(inner) => inner.token_to_id(piece),
            Encoder::SentencePiece(model) => model.id(piece),
        }
    }

    /// Largest id + 1, added tokens included. Ids past it are padding of the model's vocabulary.
    pub fn vocab_size(&self) -> usize {
        self.pieces.vocab_size()
    }

    /// What the SentencePiece model says about itself, where this is one.
    pub fn sentencepiece(&self) -> Option<&SentencePieceFacts> {
        match &self.encoder {
            Encoder::HuggingFace(_) => None,
            Encoder::SentencePiece(model) => Some(model.facts()),
        }
    }

    /// The usual name of the file it is read from: `tokenizer.json` or `tokenizer.model`.
    pub fn file_name(&self) -> &'static str {
        match &self.encoder {
            Encoder::HuggingFace(_) => "tokenizer.json",
            Encoder::SentencePiece(_) => "tokenizer.model",
        }
    }

    pub(super) fn pieces(&self) -> &PieceTable {
        &self.pieces
    }
}

/// Runs the reference implementation, which panics on some damaged files (a merge shorter than the model's prefix,
/// for one), and makes such a panic an error, silently. What it may leave behind is a cache, which it rebuilds.
fn contained<T>(run: impl FnOnce() -> tokenizers::Result<T>) -> tokenizers::Result<T> {
    static HOOK: Once = Once::new();
    thread_local!(static CONTAINED: Cell<bool> = const { Cell::new(false) });
    // Panics are reported by a hook before they can be caught: this one passes on all but the contained.
    HOOK.call_once(|| {
        let report = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if !CONTAINED.get() {
                report(panic);
            }
        }));
    });
    CONTAINED.set(true);
    let result = catch_unwind(AssertUnwindSafe(run));
    CONTAINED.set(false);
    result.unwrap_or_else(|_| Err("the tokenizer's data contradicts itself in a way its reader cannot handle".into()))
}
