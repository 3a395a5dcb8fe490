//! Raw SentencePiece models: a `tokenizer.model`, encoded and decoded exactly as SentencePiece does.
//!
//! This is our own encoder rather than a conversion to a tokenizer.json, because that format cannot express all of it.
//! There, control pieces written in a text become their ids, whereas here they are ordinary characters; the space added
//! in front comes after a leading user-defined piece or not at all, whereas here it comes before it; merges are an
//! ordered list, whereas here equal scores merge from the left; unused pieces are not split again; and character rules
//! apply to grapheme clusters rather than to the longest byte sequence. So a package stores the model file's own
//! fields.
//!
//! Nor is it a binding to SentencePiece, which would require a C++ compiler and its library. Ids and decoded text are
//! equal on every line of the comparison in docs/tokenizer.md (20,000 lines in twelve scripts, eight models), encoding
//! is 1.4 to 2.6 times and decoding 1.2 to 3.2 times as fast, and the untrusted model file is read in safe Rust.
//!
//! Encoding takes three steps: [`normalizer`] turns the text into one byte sequence, [`bpe`] or [`unigram`] splits it
//! into spans, and [`SentencePieceModel::encode`] writes spans without a piece as bytes or as the unknown piece.
//! Decoding uses the same kind of table as a tokenizer.json, built by [`SentencePieceModel::piece_table`].

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

use super::pieces::{DecodingRules, PieceTable, PieceText};
use crate::error::{Error, Result, clip};
pub(super) use added::AddedTokens;
use bpe::Bpe;
use normalizer::Normalizer;
use unigram::Unigram;
use vocabulary::{PieceKind, Vocabulary};

/// The spelling of a space in pieces.
const SPACE: &str = "▁";
/// Text of the unknown piece, unless the model defines another.
const UNKNOWN_SURFACE: &str = " \u{2047} ";

/// Limit on the text of the unknown piece, because every unknown span decodes to it.
const MAX_SURFACE_BYTES: usize = 256;

/// A SentencePiece model, ready to encode.
#[derive(Debug)]
pub(super) struct SentencePieceModel {
    vocabulary: Vocabulary,
    normalizer: Normalizer,
    algorithm: Algorithm,
    facts: SentencePieceFacts,
    /// Text that the unknown piece decodes to.
    unknown_surface: String,
}

#[derive(Debug)]
enum Algorithm {
    Bpe(Bpe),
    Unigram(Unigram),
}

/// A span of a normalized text: its length in bytes, and the id of its piece or of the unknown piece.
#[derive(Clone, Copy)]
struct PieceSpan {
    len: u32,
    id: u32,
}

/// Properties of a SentencePiece model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SentencePieceFacts {
    /// `"bpe"` or `"unigram"`.
    pub model_type: &'static str,
    /// Number of pieces of all kinds.
    pub pieces: usize,
    /// Number of pieces that always match whole.
    pub user_defined_pieces: usize,
    /// Number of control pieces, such as `<s>`, which text never encodes to.
    pub control_pieces: usize,
    /// Number of pieces that are never chosen.
    pub unused_pieces: usize,
    /// If true, characters without a piece become the pieces of their bytes, otherwise the unknown piece.
    pub byte_fallback: bool,
    /// Name of the character rules: `identity`, `nmt_nfkc`.
    pub normalizer: String,
    /// True if there are any character rules.
    pub has_character_rules: bool,
    /// A space is added in front of a text.
    pub add_dummy_prefix: bool,
    /// Leading, trailing and repeated spaces are removed.
    pub remove_extra_whitespaces: bool,
    /// Spaces are written as `▁`.
    pub escape_whitespaces: bool,
    /// The added space goes to the end of a text instead of the front.
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

/// Returns true for the content of a model file, as opposed to a tokenizer.json: a model starts with the protobuf key
/// of its first piece, which as JSON text would be a line break.
pub(super) fn is_model(bytes: &[u8]) -> bool {
    bytes.first() == Some(&b'\n') && !matches!(bytes.trim_ascii_start().first(), None | Some(b'{' | b'['))
}

/// The model file reduced to the fields that are read. The others, such as the paths and settings of its training,
/// affect neither ids nor text.
///
/// # Errors
/// As [`SentencePieceModel::from_bytes`], if the file is not a model.
pub(super) fn essential(name: &Path, bytes: &[u8]) -> Result<Vec<u8>> {
    Ok(proto::read(name, bytes)?.encode_to_vec())
}

impl SentencePieceModel {
    /// Reads a model. `name` is the file named in errors.
    pub(super) fn from_bytes(name: &Path, bytes: &[u8]) -> Result<SentencePieceModel> {
        let proto = proto::read(name, bytes)?;
        let (trainer, spec) = (proto.trainer_spec.unwrap_or_default(), proto.normalizer_spec.unwrap_or_default());
        let rules = proto.denormalizer_spec.and_then(|spec| spec.precompiled_charsmap).unwrap_or_default();
        if !rules.is_empty() {
            let detail = "denormalizer_spec.precompiled_charsmap: rules that change decoded text are not supported";
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
            vocabulary.lookup(piece.as_bytes()).filter(|id| vocabulary.kind(*id) == PieceKind::Control)
        };
        let facts = SentencePieceFacts {
            model_type,
            pieces: vocabulary.len(),
            user_defined_pieces: count(PieceKind::UserDefined),
            control_pieces: count(PieceKind::Control),
            unused_pieces: count(PieceKind::Unused),
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
            let detail =
                format!("trainer_spec.unk_surface has {bytes} bytes; at most {MAX_SURFACE_BYTES} are accepted");
            return Err(Error::format(name, detail));
        }
        let mut unknown_surface = trainer.unk_surface.unwrap_or_else(|| UNKNOWN_SURFACE.into());
        unknown_surface.truncate(unknown_surface.find('\0').unwrap_or(unknown_surface.len()));
        Ok(SentencePieceModel { vocabulary, normalizer, algorithm, facts, unknown_surface })
    }

    /// Encodes a text; nothing is added except by the normalizer.
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
        for PieceSpan { len, id } in parts {
            let (part, after) = rest.split_at(len as usize);
            rest = after;
            let is_unknown = id == self.vocabulary.unknown;
            match &self.vocabulary.bytes {
                Some(bytes) if is_unknown => ids.extend(part.iter().map(|byte| bytes[usize::from(*byte)])),
                // Adjacent unknown spans count as one.
                _ if is_unknown && after_unknown => {}
                _ if self.vocabulary.kind(id) == PieceKind::Control => {
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

    /// The text of each id: SentencePiece's `Decode`. Control pieces have none, and added tokens past the pieces stand
    /// for themselves.
    pub(super) fn piece_table(&self, added: &AddedTokens) -> PieceTable {
        let takes_space = self.facts.add_dummy_prefix || self.facts.remove_extra_whitespaces;
        let rules = DecodingRules::sentencepiece(takes_space, self.facts.remove_extra_whitespaces);
        let texts = self.vocabulary.kinds().enumerate().map(|(id, kind)| match kind {
            PieceKind::Control => PieceText::Plain(""),
            PieceKind::Unknown => PieceText::Plain(&self.unknown_surface),
            PieceKind::Byte(byte) => PieceText::Byte(byte),
            PieceKind::Normal | PieceKind::UserDefined | PieceKind::Unused => {
                PieceText::Spelled(self.vocabulary.text(id as u32))
            }
        });
        let beyond = (self.vocabulary.len()..added.vocab_size()).map(|id| added.piece(id as u32).unwrap_or_default());
        PieceTable::of_texts(rules, texts.chain(beyond.map(PieceText::Plain)))
    }

    pub(super) fn piece(&self, id: u32) -> Option<&str> {
        self.vocabulary.piece(id)
    }

    /// Pieces that match whole wherever they occur in a text.
    pub(super) fn user_defined(&self) -> impl Iterator<Item = (&str, u32)> {
        self.vocabulary.ids_of(PieceKind::UserDefined).map(|id| (self.vocabulary.text(id), id))
    }

    /// Control pieces and the unknown piece: text never encodes to their names.
    pub(super) fn unspelled(&self) -> impl Iterator<Item = &str> {
        let ids = self.vocabulary.ids_of(PieceKind::Control).chain([self.vocabulary.unknown]);
        ids.filter_map(|id| self.vocabulary.piece(id))
    }

    /// Returns true if `id` is the unknown piece.
    pub(super) fn is_unknown(&self, id: u32) -> bool {
        id == self.vocabulary.unknown
    }

    /// Returns true if `id` is a control piece, which text never encodes to.
    pub(super) fn is_control(&self, id: u32) -> bool {
        (id as usize) < self.vocabulary.len() && self.vocabulary.kind(id) == PieceKind::Control
    }

    pub(super) fn id(&self, piece: &str) -> Option<u32> {
        self.vocabulary.lookup(piece.as_bytes())
    }

    pub(super) fn facts(&self) -> &SentencePieceFacts {
        &self.facts
    }
}

/// Length in bytes of the first character of `text`, derived from its first byte and capped at the length of `text`.
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
