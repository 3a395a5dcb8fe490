//! The tokenizer. Encoding uses either the reference implementation over a tokenizer.json or our own SentencePiece;
//! decoding uses a lookup table for both.

use std::cell::Cell;
use std::collections::HashSet;
use std::fmt::Display;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Once;

use serde::de::IgnoredAny;
use tokenizers::{Model as _, Normalizer as _, OffsetType, PreTokenizedString, PreTokenizer as _};

use super::chat::PromptPart;
use super::pieces::{Decoding, DecodingRules, PieceTable};
use super::sentencepiece::{self, AddedTokens, SentencePieceFacts};
use crate::checkpoint::AddedToken;
use crate::error::{Error, Result, clip};

/// A larger vocabulary means a damaged file; the largest known ones have under 300,000 pieces.
const MAX_VOCAB_SIZE: usize = 1 << 24;
/// Usual name of a SentencePiece model's file.
const SENTENCEPIECE_FILE: &str = "tokenizer.model";

/// Converts text to token ids and back. Immutable, so sessions and threads share it through an `Arc`.
#[derive(Debug)]
pub struct Tokenizer {
    encoder: Encoder,
    pieces: PieceTable,
}

/// The encoder, by file format.
#[derive(Debug)]
enum Encoder {
    HuggingFace(Box<tokenizers::Tokenizer>),
    SentencePiece {
        model: Box<sentencepiece::SentencePieceModel>,
        /// Tokens listed beside the model, followed by those of [`Tokenizer::with_whole`].
        added: AddedTokens,
        /// Number of the former.
        listed: usize,
    },
}

impl Tokenizer {
    /// Reads a tokenizer.json or a SentencePiece model; the content decides which. `name` is the file named in errors.
    /// Truncation and padding requested by a tokenizer.json are turned off: a prompt is never cut silently.
    ///
    /// # Errors
    /// [`Error::Format`] if the file is neither; [`Error::Unsupported`] if it requires a feature that this version
    /// lacks.
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
    /// [`Error::Format`] if the file is not a model or contradicts itself; [`Error::Unsupported`] if its type is
    /// neither BPE nor unigram, or if it changes decoded text.
    pub fn from_sentencepiece(name: &Path, bytes: &[u8]) -> Result<Tokenizer> {
        Self::from_sentencepiece_and(name, bytes, Vec::new())
    }

    /// As [`Tokenizer::from_sentencepiece`], with tokens added to the model. Each occurrence of an added token in a
    /// text is that token, and the model encodes only the text in between. Added tokens may be control pieces of the
    /// model or have ids past its pieces.
    ///
    /// # Errors
    /// As [`Tokenizer::from_sentencepiece`], and [`Error::Format`] for a token that contradicts the model.
    pub fn from_sentencepiece_and(name: &Path, bytes: &[u8], added: Vec<AddedToken>) -> Result<Tokenizer> {
        let model = sentencepiece::SentencePieceModel::from_bytes(name, bytes)?;
        let listed = added.len();
        let added = AddedTokens::new(name, &model, added)?;
        let pieces = model.piece_table(&added);
        Ok(Tokenizer { encoder: Encoder::SentencePiece { model: Box::new(model), added, listed }, pieces })
    }

    /// Reads a tokenizer.json. `name` is the file named in errors.
    ///
    /// # Errors
    /// [`Error::Format`] if the file is not one; [`Error::Unsupported`] if this version does not support its decoder.
    pub fn from_json(name: &Path, bytes: &[u8]) -> Result<Tokenizer> {
        let refused = |source: &dyn Display| Error::format(name, format!("not a tokenizer.json: {source}"));
        // Catches a truncated file early, with line and column.
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
            return Err(Error::format(
                name,
                format!("largest id {largest}; at most {} is accepted", MAX_VOCAB_SIZE - 1),
            ));
        }
        let decoder = inner
            .get_decoder()
            .map(serde_json::to_value)
            .transpose()
            .map_err(|source| Error::format(name, format!("decoder: {source}")))?;
        let rules =
            DecodingRules::read(decoder.as_ref()).map_err(|error| Error::unsupported(name, error.to_string()))?;
        let pieces = PieceTable::new(vocab_size, rules, |id| inner.id_to_token(id));
        Ok(Tokenizer { encoder: Encoder::HuggingFace(Box::new(inner)), pieces })
    }

    /// This tokenizer, which from now on encodes each occurrence of these pieces in a text whole, as transformers does
    /// with special tokens. Without it, a special token that a tokenizer.json does not list among its added tokens, or
    /// a control or unknown piece of a SentencePiece model, is ordinary characters in a text.
    ///
    /// Only pieces of the vocabulary that are not whole already are affected; the second value lists them. Ids and
    /// decoded text stay the same.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if the tokenizer rejects one of them.
    pub(crate) fn with_whole(self, contents: &[String]) -> Result<(Tokenizer, Vec<String>)> {
        let known: HashSet<String> = self.markers().into_iter().map(|(marker, _)| marker).collect();
        let mut ids = HashSet::new();
        let mut whole: Vec<AddedToken> = Vec::new();
        for content in contents.iter().filter(|content| !content.is_empty() && !known.contains(*content)) {
            let id = self.id(content).filter(|id| match &self.encoder {
                Encoder::HuggingFace(_) => true,
                Encoder::SentencePiece { model, .. } => model.is_control(*id) || model.is_unknown(*id),
            });
            if let Some(id) = id.filter(|id| ids.insert(*id)) {
                whole.push(AddedToken { id, content: content.clone(), lstrip: false, rstrip: false });
            }
        }
        let contents = whole.iter().map(|token| token.content.clone()).collect();
        if whole.is_empty() {
            return Ok((self, contents));
        }
        let encoder = match self.encoder {
            Encoder::HuggingFace(mut inner) => {
                let tokens: Vec<_> =
                    whole.into_iter().map(|token| tokenizers::AddedToken::from(token.content, true)).collect();
                contained(|| inner.add_special_tokens(tokens)).map_err(|e| Error::Tokenizer(e.to_string()))?;
                Encoder::HuggingFace(inner)
            }
            Encoder::SentencePiece { model, added, listed } => {
                let tokens = added.tokens().iter().cloned().chain(whole).collect();
                let added = AddedTokens::new(Path::new(SENTENCEPIECE_FILE), &model, tokens)?;
                Encoder::SentencePiece { model, added, listed }
            }
        };
        Ok((Tokenizer { encoder, pieces: self.pieces }, contents))
    }

    /// Encodes `text` in one call; no special tokens are added. Special pieces written in the text become their ids,
    /// which is how those of the chat template reach the model. Control pieces of a SentencePiece model, such as
    /// `</s>`, are ordinary characters in a text, however.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if the tokenizer cannot represent the text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let inner = match &self.encoder {
            Encoder::HuggingFace(inner) => inner,
            Encoder::SentencePiece { model, added, .. } => return added.encode(model, text),
        };
        let encoding = contained(|| inner.encode_fast(text, false))
            .map_err(|source| Error::Tokenizer(format!("cannot encode a text of {} bytes: {source}", text.len())))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Decodes `ids` as a complete text: the space that the tokenizer adds in front of a text is removed if the file
    /// says so. All ids of a tokenizer.json are shown, special ones such as `</s>` included; hiding the ids that end a
    /// generation is up to the stop logic. Control pieces of a SentencePiece model have no text, and its unknown piece
    /// has the text that the model defines, by default ` ⁇ `. Bytes that form no character become U+FFFD; with
    /// byte-fallback pieces one per byte, as in SentencePiece.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] for an id at or past [`Tokenizer::vocab_size`].
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.decode_all(ids, false)
    }

    /// Decodes `ids` that follow other ids: as [`Tokenizer::decode`], but a leading space is kept. Model output is
    /// decoded this way, so that `decode(prompt)` followed by it is the text of both. A character that it ends inside of is
    /// one U+FFFD.
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

    /// The bytes that an id contributes to a text, anywhere but at its start. They need not be whole characters.
    pub fn token_bytes(&self, id: u32) -> Option<&[u8]> {
        self.pieces.bytes_of(id)
    }

    /// Most bytes that a token contributes to a text. A text with more bytes than this times a number of tokens has more
    /// tokens than that, unless the tokenizer drops some of it, as a normalizer may drop spaces.
    pub fn longest_token_bytes(&self) -> usize {
        self.pieces.longest()
    }

    /// The piece of an id as it appears in the vocabulary: `▁the`, `<0x0A>`, `</s>`.
    pub fn piece(&self, id: u32) -> Option<String> {
        match &self.encoder {
            Encoder::HuggingFace(inner) => inner.id_to_token(id),
            Encoder::SentencePiece { model, added, .. } => {
                model.piece(id).or_else(|| added.piece(id)).map(str::to_string)
            }
        }
    }

    /// The id of a piece as it appears in the vocabulary.
    pub fn id(&self, piece: &str) -> Option<u32> {
        match &self.encoder {
            Encoder::HuggingFace(inner) => inner.token_to_id(piece),
            Encoder::SentencePiece { model, added, .. } => added.id(piece).or_else(|| model.id(piece)),
        }
    }

    /// Largest id + 1, added tokens included. Ids past it pad the model's vocabulary.
    pub fn vocab_size(&self) -> usize {
        self.pieces.vocab_size()
    }

    /// Properties of the SentencePiece model, if this is one.
    pub fn sentencepiece(&self) -> Option<&SentencePieceFacts> {
        match &self.encoder {
            Encoder::HuggingFace(_) => None,
            Encoder::SentencePiece { model, .. } => Some(model.facts()),
        }
    }

    /// Usual name of the file that holds such a tokenizer: `tokenizer.json` or `tokenizer.model`.
    pub fn file_name(&self) -> &'static str {
        match &self.encoder {
            Encoder::HuggingFace(_) => "tokenizer.json",
            Encoder::SentencePiece { .. } => SENTENCEPIECE_FILE,
        }
    }

    /// Tokens listed beside a SentencePiece model and added to its pieces.
    pub fn added_tokens(&self) -> &[AddedToken] {
        match &self.encoder {
            Encoder::HuggingFace(_) => &[],
            Encoder::SentencePiece { added, listed, .. } => &added.tokens()[..*listed],
        }
    }

    /// Texts that are a single token wherever they occur, with their ids: the added tokens of either file format and,
    /// of a SentencePiece model, the user-defined pieces that look like markers, which is to say start and end with
    /// punctuation; other user-defined pieces are plain words, digits or runs of spaces.
    pub fn markers(&self) -> Vec<(String, u32)> {
        let mut markers: Vec<(String, u32)> = match &self.encoder {
            Encoder::HuggingFace(inner) => {
                let added = inner.get_added_vocabulary().get_added_tokens_decoder().iter();
                let of_marker = added.filter(|(_, token)| token.special || looks_like_marker(&token.content));
                of_marker.map(|(id, token)| (token.content.clone(), *id)).collect()
            }
            Encoder::SentencePiece { model, added, .. } => {
                let user_defined = model.user_defined().filter(|(text, _)| looks_like_marker(text));
                let added = added.tokens().iter().map(|token| (token.content.as_str(), token.id));
                user_defined.chain(added).map(|(text, id)| (text.to_owned(), id)).collect()
            }
        };
        markers.sort();
        markers
    }

    /// Returns true if `id` is a control piece of a SentencePiece model, which text never encodes to unless it was also
    /// added as a token.
    pub fn is_control(&self, id: u32) -> bool {
        match &self.encoder {
            Encoder::HuggingFace(_) => false,
            Encoder::SentencePiece { model, .. } => model.is_control(id),
        }
    }

    /// Pieces of a SentencePiece model that text never encodes to: its control pieces and its unknown piece.
    pub(crate) fn unspelled_pieces(&self) -> impl Iterator<Item = &str> {
        let model = match &self.encoder {
            Encoder::HuggingFace(_) => None,
            Encoder::SentencePiece { model, .. } => Some(model.unspelled()),
        };
        model.into_iter().flatten()
    }

    /// The ids that a tokenizer.json puts in front of a text when asked to add special tokens, which
    /// [`Tokenizer::encode`] never does.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if encoding fails.
    pub fn prefix(&self) -> Result<Vec<u32>> {
        let Encoder::HuggingFace(inner) = &self.encoder else { return Ok(Vec::new()) };
        // The post-processor may add ids on both sides: those before the ids of "a" are the prefix.
        let encoded = contained(|| inner.encode("", true)).map_err(|source| Error::Tokenizer(source.to_string()))?;
        let with = contained(|| inner.encode("a", true)).map_err(|source| Error::Tokenizer(source.to_string()))?;
        let alone = contained(|| inner.encode("a", false)).map_err(|source| Error::Tokenizer(source.to_string()))?;
        let (with, alone) = (with.get_ids(), alone.get_ids());
        let start = with.windows(alone.len().max(1)).position(|window| window == alone);
        Ok(start.map_or_else(|| encoded.get_ids().to_vec(), |start| with[..start].to_vec()))
    }

    /// The id of a template's marker: that of its piece or, for a single byte, of its byte-fallback piece.
    pub fn marker_id(&self, marker: &str) -> Option<u32> {
        let of_byte = || match marker.as_bytes() {
            [byte] => self.id(&format!("<0x{byte:02X}>")),
            _ => None,
        };
        self.id(marker).or_else(of_byte)
    }

    /// Encodes a prompt part by part; markers spelled in message contents are encoded as plain text. As in
    /// transformers, each part is encoded separately, behind a line break whose ids are then dropped, so that only the
    /// first part gets the space that a tokenizer adds in front of a text.
    pub(crate) fn encode_parts(&self, parts: &[PromptPart<'_>]) -> Result<Vec<u32>> {
        let mut ids = Vec::new();
        for (index, part) in parts.iter().enumerate() {
            match part {
                PromptPart::Text(text) if index == 0 => ids.extend(self.encode(text)?),
                PromptPart::Text(text) => ids.extend(behind_a_line_break(text, &|text| self.encode(text))?),
                PromptPart::Spelled(text) => {
                    let spelled = self.encode_spelled(text)?;
                    if self.id(text).is_some_and(|id| spelled.contains(&id)) {
                        let text = clip(text);
                        return Err(Error::Tokenizer(format!(
                            "`{text}` cannot be escaped: the tokenizer encodes its letters as that token too"
                        )));
                    }
                    ids.extend(spelled);
                }
            }
        }
        Ok(ids)
    }

    /// Encodes a marker as plain text, letter by letter if need be.
    fn encode_spelled(&self, text: &str) -> Result<Vec<u32>> {
        match &self.encoder {
            Encoder::HuggingFace(inner) => behind_a_line_break(text, &|text| {
                contained(|| encode_without_added_tokens(inner, text)).map_err(|source| {
                    Error::Tokenizer(format!("cannot encode a text of {} bytes: {source}", text.len()))
                })
            }),
            // User-defined pieces are matched by their text; splitting the text after its first character prevents
            // that.
            Encoder::SentencePiece { model, .. } => {
                let first = text.chars().next().map_or(0, char::len_utf8);
                let (first, rest) = text.split_at(first);
                let mut ids = behind_a_line_break(first, &|text| model.encode(text))?;
                ids.extend(behind_a_line_break(rest, &|text| model.encode(text))?);
                Ok(ids)
            }
        }
    }

    pub(super) fn pieces(&self) -> &PieceTable {
        &self.pieces
    }
}

/// Returns true for a text that starts and ends with punctuation, such as `<|im_end|>`, and for a control character that
/// is not whitespace.
pub(super) fn looks_like_marker(text: &str) -> bool {
    let sign = |c: Option<char>| c.is_some_and(|c| c.is_ascii_punctuation());
    match text.as_bytes() {
        [byte] => byte.is_ascii_control() && !byte.is_ascii_whitespace(),
        _ => text.len() > 2 && sign(text.chars().next()) && sign(text.chars().next_back()),
    }
}

/// Encodes a text that follows another one.
fn behind_a_line_break(text: &str, encode: &dyn Fn(&str) -> Result<Vec<u32>>) -> Result<Vec<u32>> {
    if text.is_empty() {
        return Ok(Vec::new());
    }
    let line_break = encode("\n")?;
    let mut ids = encode(&format!("\n{text}"))?;
    match ids.starts_with(&line_break) {
        true => Ok(ids.split_off(line_break.len())),
        false => encode(text),
    }
}

/// The reference implementation's steps except the first, which finds added tokens.
fn encode_without_added_tokens(inner: &tokenizers::Tokenizer, text: &str) -> tokenizers::Result<Vec<u32>> {
    let mut pieces = PreTokenizedString::from(text);
    if let Some(normalizer) = inner.get_normalizer() {
        pieces.normalize(|piece| normalizer.normalize(piece))?;
    }
    if let Some(pre_tokenizer) = inner.get_pre_tokenizer() {
        pre_tokenizer.pre_tokenize(&mut pieces)?;
    }
    pieces.tokenize(|piece| inner.get_model().tokenize(piece.get()))?;
    Ok(pieces.into_encoding(None, 0, OffsetType::None)?.get_ids().to_vec())
}

/// Runs the reference implementation, which panics on some damaged files (for example a merge shorter than the model's
/// prefix), and silently turns such a panic into an error. All it can leave behind is an inconsistent cache, which it
/// rebuilds.
fn contained<T>(run: impl FnOnce() -> tokenizers::Result<T>) -> tokenizers::Result<T> {
    static HOOK: Once = Once::new();
    thread_local!(static CONTAINED: Cell<bool> = const { Cell::new(false) });
    // The panic hook runs before a panic can be caught; this one stays quiet for contained panics only.
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
