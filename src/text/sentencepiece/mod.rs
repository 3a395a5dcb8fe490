//! Raw SentencePiece models: a `tokenizer.model`, encoded and decoded as SentencePiece itself does.
//!
//! This is an encoder of its own and not a conversion to a tokenizer.json, for that form cannot say all of it: there
//! control pieces written in a text become their ids, which here are plain characters; the space added in front comes
//! after a leading user-defined piece or not at all, which here comes before it; merges are a list, where here equal
//! scores are merged from the left; unused pieces are not cut again; and rules for characters apply to grapheme
//! clusters, which here apply to the longest sequence of bytes. So a package keeps what the model's file says.
//!
//! Nor is it a binding to SentencePiece, which would need a C++ compiler and its library: ids and decoded text are equal on
//! every line of docs/tokenizer.md's comparison (20,000 lines in twelve scripts, eight models), encoding is 1.4 to 2.6 times
//! and decoding 1.2 to 3.2 times as fast, and a model's file, which is not trusted, is read in safe Rust.
//!
//! Encoding takes three steps: [`normalizer`] makes the text one sequence of bytes, [`bpe`] or [`unigram`] cuts it into
//! parts, and [`Model::encode`] writes parts that are no pieces as bytes or as the unknown piece. Decoding is a table
//! like that of a tokenizer.json, which [`Model::piece_table`] makes.

mod added;
mod bpe;
mod index;
mod normalizer;
mod proto;
mod trie;
mod unigram;
mod vocabulary;

#[cfg(test)]
mod tests;

use std::path::Path;

use prost::Message;
use serde::Serialize;

use super::pieces::{PieceTable, PieceText, Rules};
use crate::error::{Error, Result, clip};
pub(super) use added::AddedTokens;
use bpe::Bpe;
use normalizer::Normalizer;
use unigram::Unigram;
use vocabulary::{Kind, Vocabulary};

/// How pieces spell a space.
const SPACE: &str = "▁";
/// The text of the unknown piece, unless the model says another.
const UNKNOWN_SURFACE: &str = " \u{2047} ";

/// The longest text of the unknown piece, which every unknown part of a text decodes to.
const MAX_SURFACE_BYTES: usize = 256;

/// A SentencePiece model, ready to encode.
#[derive(Debug)]
pub(super) struct Model {
    vocabulary: Vocabulary,
    normalizer: Normalizer,
    algorithm: Algorithm,
    facts: SentencePieceFacts,
    /// What the unknown piece decodes to.
    unknown_surface: String,
}

#[derive(Debug)]
enum Algorithm {
    Bpe(Bpe),
    Unigram(Unigram),
}

/// A part of a normalized text: so many bytes, and the id of the piece they are, or of the unknown one.
#[derive(Clone, Copy)]
struct Part {
    len: u32,
    id: u32,
}

/// What a SentencePiece model says about itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SentencePieceFacts {
    /// `"bpe"` or `"unigram"`.
    pub model_type: &'static str,
    /// Pieces of all kinds.
    pub pieces: usize,
    /// Pieces that always match whole.
    pub user_defined_pieces: usize,
    /// Pieces that no text contains, such as `<s>`.
    pub control_pieces: usize,
    /// Pieces that are never chosen.
    pub unused_pieces: usize,
    /// Characters without a piece become the pieces of their bytes; without it, the unknown piece.
    pub byte_fallback: bool,
    /// The name of the rules for characters: `identity`, `nmt_nfkc`.
    pub normalizer: String,
    /// Whether there are such rules.
    pub has_character_rules: bool,
    /// A space is put in front of a text.
    pub add_dummy_prefix: bool,
    /// Spaces at the ends of a text and in runs are dropped.
    pub remove_extra_whitespaces: bool,
    /// Spaces are spelled `▁`.
    pub escape_whitespaces: bool,
    /// The space goes to the end of a text, not in front.
    pub treat_whitespace_as_suffix: bool,
    /// Id of the unknown piece.
    pub unk_id: u32,
    /// Id of the control piece that begins a text, if there is one.
    pub bos_id: Option<u32>,
    /// Id of the control piece that ends a text, if there is one.
    pub eos_id: Option<u32>,
    /// Id of the control piece that pads a text, if there is one.
    pub pad_id: Option<u32>,
}

/// Whether this is the content of a model file, not of a tokenizer.json: the former starts with the key of its first
/// piece, which to the latter is a line break.
pub(super) fn is_model(bytes: &[u8]) -> bool {
    bytes.first() == Some(&b'\n') && !matches!(bytes.trim_ascii_start().first(), None | Some(b'{' | b'['))
}

/// A model's file without what is not read, which decides about no id and no text: where it was trained, and how.
///
/// # Errors
/// As [`Model::from_bytes`], of a file that is none.
pub(super) fn essential(name: &Path, bytes: &[u8]) -> Result<Vec<u8>> {
    Ok(proto::read(name, bytes)?.encode_to_vec())
}

impl Model {
    /// Reads a model. `name` is the file named in errors.
    pub(super) fn from_bytes(name: &Path, bytes: &[u8]) -> Result<Model> {
        let proto = proto::read(name, bytes)?;
        let (trainer, spec) = (proto.trainer_spec.unwrap_or_default(), proto.normalizer_spec.unwrap_or_default());
        let rules = proto.denormalizer_spec.and_then(|spec| spec.precompiled_charsmap).unwrap_or_default();
        if !rules.is_empty() {
            let detail = "denormalizer_spec.precompiled_charsmap: rules that change decoded text are not computed";
            return Err(Error::unsupported(name, detail));
        }
        if proto.pieces.is_empty() {
            return Err(Error::format(name, "not a SentencePiece model: it has no pieces"));
        }
        let ids = [("unk", trainer.unk_id), ("bos", trainer.bos_id), ("eos", trainer.eos_id), ("pad", trainer.pad_id)];
        for (which, id) in ids {
            if let Some(id) = id.filter(|id| *id < -1 || *id >= 0 && *id as usize >= proto.pieces.len()) {
                let last = proto.pieces.len() - 1;
                let detail = format!("trainer_spec.{which}_id is {id}; pieces are 0 to {last}, and -1 is none");
                return Err(Error::format(name, detail));
            }
        }
        let byte_fallback = trainer.byte_fallback.unwrap_or(false);
        let vocabulary = Vocabulary::new(name, proto.pieces, byte_fallback)?;
        let normalizer = Normalizer::new(&spec, &trainer, &vocabulary.user_defined);
        let normalizer = normalizer.map_err(|detail| Error::format(name, detail))?;
        let (algorithm, model_type) = match trainer.model_type.unwrap_or(proto::model_type::UNIGRAM) {
            proto::model_type::UNIGRAM => (Algorithm::Unigram(Unigram::new(&vocabulary)), "unigram"),
            proto::model_type::BPE => (Algorithm::Bpe(Bpe::new(&vocabulary)), "bpe"),
            other => {
                let detail = format!(
                    "trainer_spec.model_type is {other} (3 is word, 4 is char); supported: 1 (unigram) and 2 (bpe)"
                );
                return Err(Error::unsupported(name, detail));
            }
        };
        let count = |kind| vocabulary.ids_of(kind).count();
        let control = |piece: &Option<String>, default: &str| {
            let piece = piece.as_deref().filter(|piece| !piece.is_empty()).unwrap_or(default);
            vocabulary.lookup(piece.as_bytes()).filter(|id| vocabulary.kind(*id) == Kind::Control)
        };
        let facts = SentencePieceFacts {
            model_type,
            pieces: vocabulary.len(),
            user_defined_pieces: count(Kind::UserDefined),
            control_pieces: count(Kind::Control),
            unused_pieces: count(Kind::Unused),
            byte_fallback,
            normalizer: spec.name.clone().unwrap_or_default(),
            has_character_rules: spec.precompiled_charsmap.as_ref().is_some_and(|rules| !rules.is_empty()),
            add_dummy_prefix: spec.add_dummy_prefix.unwrap_or(true),
            remove_extra_whitespaces: spec.remove_extra_whitespaces.unwrap_or(true),
            escape_whitespaces: spec.escape_whitespaces.unwrap_or(true),
            treat_whitespace_as_suffix: trainer.treat_whitespace_as_suffix.unwrap_or(false),
            unk_id: vocabulary.unknown,
            bos_id: control(&trainer.bos_piece, "<s>"),
            eos_id: control(&trainer.eos_piece, "</s>"),
            pad_id: control(&trainer.pad_piece, "<pad>"),
        };
        if let Some(surface) = trainer.unk_surface.as_ref().filter(|surface| surface.len() > MAX_SURFACE_BYTES) {
            let bytes = surface.len();
            let detail = format!("trainer_spec.unk_surface has {bytes} bytes; at most {MAX_SURFACE_BYTES} are read");
            return Err(Error::format(name, detail));
        }
        let mut unknown_surface = trainer.unk_surface.unwrap_or_else(|| UNKNOWN_SURFACE.into());
        unknown_surface.truncate(unknown_surface.find('\0').unwrap_or(unknown_surface.len()));
        Ok(Model { vocabulary, normalizer, algorithm, facts, unknown_surface })
    }

    /// The ids of a text; nothing is added but what the normalizer adds.
    pub(super) fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let normalized = self.normalizer.normalize(text, &self.vocabulary.user_defined);
        if u32::try_from(normalized.len()).is_err() || normalized.len() == u32::MAX as usize {
            return Err(Error::Tokenizer(format!("a text of {} bytes is too long to encode at once", text.len())));
        }
        let parts = match &self.algorithm {
            Algorithm::Bpe(bpe) => bpe.encode(&self.vocabulary, &normalized),
            Algorithm::Unigram(unigram) => unigram.encode(&self.vocabulary, &normalized),
        };
        let mut ids = Vec::with_capacity(parts.len());
        let mut rest = normalized.as_slice();
        let mut after_unknown = false;
        for Part { len, id } in parts {
            let (part, after) = rest.split_at(len as usize);
            rest = after;
            let is_unknown = id == self.vocabulary.unknown;
            match &self.vocabulary.bytes {
                Some(bytes) if is_unknown => ids.extend(part.iter().map(|byte| bytes[usize::from(*byte)])),
                // Unknown parts side by side are one.
                _ if is_unknown && after_unknown => {}
                _ if self.vocabulary.kind(id) == Kind::Control => {
                    let piece = clip(self.vocabulary.text(id));
                    return Err(Error::Tokenizer(format!(
                        "the text contains `{piece}`, which SentencePiece cannot encode: the model's piece {id} is a \
                         control piece of the same name"
                    )));
                }
                _ => ids.push(id),
            }
            after_unknown = is_unknown;
        }
        Ok(ids)
    }

    /// What each id contributes to a text: SentencePiece's `Decode`. Control pieces contribute nothing, and added tokens
    /// beyond the pieces their own text.
    pub(super) fn piece_table(&self, added: &AddedTokens) -> PieceTable {
        let takes_space = self.facts.add_dummy_prefix || self.facts.remove_extra_whitespaces;
        let rules = Rules::sentencepiece(takes_space, self.facts.remove_extra_whitespaces);
        let texts = self.vocabulary.kinds().enumerate().map(|(id, kind)| match kind {
            Kind::Control => PieceText::Plain(""),
            Kind::Unknown => PieceText::Plain(&self.unknown_surface),
            Kind::Byte(byte) => PieceText::Byte(byte),
            Kind::Normal | Kind::UserDefined | Kind::Unused => PieceText::Spelled(self.vocabulary.text(id as u32)),
        });
        let beyond = (self.vocabulary.len()..added.vocab_size()).map(|id| added.piece(id as u32).unwrap_or_default());
        PieceTable::of_texts(rules, texts.chain(beyond.map(PieceText::Plain)))
    }

    pub(super) fn piece(&self, id: u32) -> Option<&str> {
        self.vocabulary.piece(id)
    }

    /// Pieces that match whole wherever a text has them.
    pub(super) fn user_defined(&self) -> impl Iterator<Item = (&str, u32)> {
        self.vocabulary.ids_of(Kind::UserDefined).map(|id| (self.vocabulary.text(id), id))
    }

    /// Pieces that no text contains.
    pub(super) fn control(&self) -> impl Iterator<Item = &str> {
        self.vocabulary.ids_of(Kind::Control).filter_map(|id| self.vocabulary.piece(id))
    }

    /// Whether `id` is a control piece, which no text contains.
    pub(super) fn is_control(&self, id: u32) -> bool {
        (id as usize) < self.vocabulary.len() && self.vocabulary.kind(id) == Kind::Control
    }

    pub(super) fn id(&self, piece: &str) -> Option<u32> {
        self.vocabulary.lookup(piece.as_bytes())
    }

    pub(super) fn facts(&self) -> &SentencePieceFacts {
        &self.facts
    }
}

/// How many bytes the first character of `text` has by its first byte, and at most those there are.
fn character_len(text: &[u8]) -> usize {
    let len = match text.first() {
        None => 0,
        Some(0xC0..=0xDF) => 2,
        Some(0xE0..=0xEF) => 3,
        Some(0xF0..) => 4,
        Some(_) => 1,
    };
    len.min(text.len())
}
