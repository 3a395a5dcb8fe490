//! Maps ids to text. The table of each id's bytes and the rules that apply between ids are built once, from the
//! `decoder` of a tokenizer.json or from a SentencePiece model, so that decoding is a table lookup and whole texts and
//! streams share one implementation.

use std::collections::HashSet;

use serde::Deserialize;
use serde_json::Value;

use crate::error::{Error, Result};

/// The bytes of every id, and the rules for the start of a text.
#[derive(Debug)]
pub(super) struct PieceTable {
    /// The bytes of all ids, concatenated.
    bytes: Vec<u8>,
    /// `[vocab_size + 1]`: id i has `bytes[ends[i]..ends[i + 1]]`.
    ends: Vec<usize>,
    /// Ids whose leading space is literal rather than a replaced `▁`: it is kept at the start of a text too.
    own_space: HashSet<u32>,
    rules: DecodingRules,
}

/// Rules that turn pieces into text.
#[derive(Debug, Default, Clone)]
pub(super) struct DecodingRules {
    /// Replaced in every piece, in this order: `▁` by a space.
    replacements: Vec<(String, String)>,
    /// `▁` is dropped from the first piece of a text instead of being replaced (Metaspace with a prepend scheme).
    drops_in_first: bool,
    /// Up to this many of this character are stripped from the start of a text (Strip).
    strip_start: Option<(char, usize)>,
    /// Inserted between pieces: a tokenizer.json without a decoder separates them by spaces.
    separator: &'static str,
    bytes: ByteRule,
    fused: bool,
    /// SentencePiece's rule for the start of a text.
    start: StartRule,
}

/// Spaces that a SentencePiece model strips from the start of a text.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum StartRule {
    #[default]
    Nothing,
    /// One `▁`.
    OneSpace,
    /// One `▁` of every piece until some text has been emitted.
    SpacesBeforeText,
}

/// The contribution of one id of a SentencePiece model.
pub(super) enum PieceText<'a> {
    Byte(u8),
    /// Literal text.
    Plain(&'a str),
    /// Text in which a space is written as `▁`.
    Spelled(&'a str),
}

/// Encoding of bytes that are not characters by themselves.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum ByteRule {
    /// Pieces are characters.
    #[default]
    None,
    /// SentencePiece's `<0x0A>` pieces; each byte that is not part of a valid character becomes one U+FFFD, as in
    /// SentencePiece, but a character that an answer ends inside of becomes one in all, as in Python's `errors="replace"`.
    Fallback,
    /// GPT-2's printable stand-ins for all 256 bytes; a malformed sequence becomes one U+FFFD.
    Level,
}

/// The decoders of a tokenizer.json that this crate supports.
#[derive(Deserialize)]
#[serde(tag = "type")]
enum DecoderSpec {
    Sequence { decoders: Vec<DecoderSpec> },
    Replace { pattern: PatternSpec, content: String },
    Metaspace { replacement: char, prepend_scheme: String },
    Strip { content: char, start: usize, stop: usize },
    ByteFallback {},
    ByteLevel {},
    Fuse {},
}

#[derive(Deserialize)]
enum PatternSpec {
    String(String),
}

impl DecodingRules {
    /// Reads the `decoder` value of a tokenizer.json; `None` where it has none.
    pub(super) fn read(decoder: Option<&Value>) -> Result<DecodingRules> {
        let Some(decoder) = decoder else {
            return Ok(DecodingRules { separator: " ", ..DecodingRules::default() });
        };
        let spec = DecoderSpec::deserialize(decoder).map_err(|source| {
            Error::Tokenizer(format!(
                "decoder {decoder} is not supported by this version ({source}); supported: Sequence, Replace of a \
                 string, Metaspace, ByteFallback, ByteLevel, Fuse, Strip"
            ))
        })?;
        let mut rules = DecodingRules::default();
        rules.add(spec)?;
        Ok(rules)
    }

    /// The rules of a SentencePiece model: `takes_space` if it strips a leading space, `takes_all` if it does so from
    /// every piece until there is text.
    pub(super) fn sentencepiece(takes_space: bool, takes_all: bool) -> DecodingRules {
        let start = match (takes_space, takes_all) {
            (false, _) => StartRule::Nothing,
            (true, false) => StartRule::OneSpace,
            (true, true) => StartRule::SpacesBeforeText,
        };
        DecodingRules { bytes: ByteRule::Fallback, start, ..DecodingRules::default() }
    }

    fn add(&mut self, spec: DecoderSpec) -> Result<()> {
        match spec {
            DecoderSpec::Sequence { decoders } => {
                for decoder in decoders {
                    self.add(decoder)?;
                }
            }
            // With ByteFallback present, the order only matters to a `▁` spelled in byte pieces: it is kept, as in
            // SentencePiece.
            DecoderSpec::Replace { pattern: PatternSpec::String(pattern), content } => {
                if self.fused || pattern.is_empty() {
                    return Err(Error::Tokenizer(format!(
                        "decoder Replace of {pattern:?} is supported before Fuse and for a non-empty pattern only"
                    )));
                }
                self.replacements.push((pattern, content));
            }
            DecoderSpec::Metaspace { replacement, prepend_scheme } => {
                self.drops_in_first = prepend_scheme != "never";
                self.replacements.push((replacement.to_string(), " ".into()));
            }
            DecoderSpec::Strip { content, start, stop } => {
                if !self.fused || stop != 0 {
                    return Err(Error::Tokenizer(format!(
                        "decoder Strip of {content:?} (start {start}, stop {stop}) is supported after Fuse and with \
                         stop 0 only"
                    )));
                }
                self.strip_start = Some((content, start));
            }
            DecoderSpec::ByteFallback {} => self.bytes = ByteRule::Fallback,
            DecoderSpec::ByteLevel {} => self.bytes = ByteRule::Level,
            DecoderSpec::Fuse {} => self.fused = true,
        }
        Ok(())
    }

    /// Appends the bytes that `piece` contributes anywhere but at the start of a text.
    fn piece_bytes(&self, piece: &str, out: &mut Vec<u8>) {
        if self.bytes == ByteRule::Fallback
            && let Some(byte) = fallback_byte(piece)
        {
            return out.push(byte);
        }
        let replaced;
        let text = if self.replacements.iter().any(|(from, _)| piece.contains(from.as_str())) {
            let replace = |text: String, (from, to): &(String, String)| text.replace(from.as_str(), to);
            replaced = self.replacements.iter().fold(piece.to_string(), replace);
            &replaced
        } else {
            piece
        };
        if self.bytes == ByteRule::Level {
            let start = out.len();
            for c in text.chars() {
                let Some(byte) = level_byte(c) else {
                    // An added token may contain characters outside the byte alphabet; then it stands for its own text.
                    out.truncate(start);
                    break;
                };
                out.push(byte);
            }
            if out.len() > start || text.is_empty() {
                return;
            }
        }
        out.extend_from_slice(text.as_bytes());
    }
}

impl PieceTable {
    /// Builds a table of `vocab_size` ids. `piece` returns an id's piece, or `None` for a hole in the vocabulary, which
    /// contributes nothing.
    pub(super) fn new(vocab_size: usize, rules: DecodingRules, piece: impl Fn(u32) -> Option<String>) -> PieceTable {
        let ends = Vec::with_capacity(vocab_size + 1);
        let mut table = PieceTable { bytes: Vec::new(), ends, own_space: HashSet::new(), rules };
        table.ends.push(0);
        for id in 0..vocab_size as u32 {
            if let Some(piece) = piece(id) {
                table.rules.piece_bytes(&piece, &mut table.bytes);
                if piece.contains(' ') || piece == "<0x20>" {
                    table.own_space.insert(id);
                }
            }
            table.ends.push(table.bytes.len());
        }
        table
    }

    /// Bytes of the longest piece.
    pub(super) fn longest(&self) -> usize {
        self.ends.array_windows().map(|[start, end]| end - start).max().unwrap_or(0)
    }

    /// Builds the table of a SentencePiece model's ids, in order.
    pub(super) fn of_texts<'a>(rules: DecodingRules, texts: impl Iterator<Item = PieceText<'a>>) -> PieceTable {
        let mut table = PieceTable { bytes: Vec::new(), ends: vec![0], own_space: HashSet::new(), rules };
        for (id, text) in texts.enumerate() {
            let has_own_space = match text {
                PieceText::Byte(byte) => {
                    table.bytes.push(byte);
                    byte == b' '
                }
                PieceText::Plain(text) => {
                    table.bytes.extend_from_slice(text.as_bytes());
                    text.starts_with(' ')
                }
                PieceText::Spelled(text) => {
                    for (number, part) in text.split('▁').enumerate() {
                        if number > 0 {
                            table.bytes.push(b' ');
                        }
                        table.bytes.extend_from_slice(part.as_bytes());
                    }
                    text.starts_with(' ')
                }
            };
            if has_own_space {
                table.own_space.insert(id as u32);
            }
            table.ends.push(table.bytes.len());
        }
        table
    }

    /// Largest id + 1.
    pub(super) fn vocab_size(&self) -> usize {
        self.ends.len().saturating_sub(1)
    }

    pub(super) fn bytes_of(&self, id: u32) -> Option<&[u8]> {
        let index = id as usize;
        self.bytes.get(*self.ends.get(index)?..*self.ends.get(index + 1)?)
    }
}

/// State of decoding a sequence of ids; holds back at most 3 bytes of an incomplete character.
#[derive(Debug, Clone)]
pub(super) struct Decoding {
    /// Start of a character whose remaining bytes have not arrived yet.
    pending: Vec<u8>,
    /// True until the first id (under SentencePiece's rule: the first text), if the ids start a text.
    at_first_piece: bool,
    /// Number of characters that Strip may still remove.
    strip_left: usize,
    /// True if a separator goes before the next piece.
    separate: bool,
    /// True for an answer, which may end anywhere.
    continues: bool,
}

impl Decoding {
    /// `continuing` means that the ids follow others, so the rules for the start of a text do not apply.
    pub(super) fn new(table: &PieceTable, continuing: bool) -> Decoding {
        let strip_left = table.rules.strip_start.map_or(0, |(_, count)| count);
        Decoding {
            pending: Vec::new(),
            at_first_piece: !continuing,
            strip_left: if continuing { 0 } else { strip_left },
            separate: continuing,
            continues: continuing,
        }
    }

    /// Appends to `out` all text that is certain after `id`.
    pub(super) fn push(&mut self, table: &PieceTable, id: u32, out: &mut String) -> Result<()> {
        let Some(bytes) = table.bytes_of(id) else {
            return Err(Error::Tokenizer(format!(
                "id {id} has no piece; the tokenizer has ids 0 to {}",
                table.vocab_size().saturating_sub(1)
            )));
        };
        if std::mem::replace(&mut self.separate, true) {
            self.pending.extend_from_slice(table.rules.separator.as_bytes());
        }
        if table.rules.start != StartRule::Nothing {
            // The space to strip is a replaced `▁`; a literal space belongs to the text.
            let space = match bytes {
                [b' ', ..] => usize::from(self.at_first_piece && !table.own_space.contains(&id)),
                _ => 0,
            };
            // Stay at the start while nothing is shown: `OneSpace` is then used up, `SpacesBeforeText` goes on.
            let takes_more = space == 0 || table.rules.start == StartRule::SpacesBeforeText;
            self.at_first_piece &= bytes.len() == space && takes_more;
            self.add(table, &bytes[space..], out);
            return Ok(());
        }
        let drops = table.rules.drops_in_first && !table.own_space.contains(&id);
        if std::mem::take(&mut self.at_first_piece) && drops {
            // By now Metaspace has replaced its `▁` by a space.
            self.pending.extend(bytes.iter().filter(|byte| **byte != b' '));
            self.drain(table, false, out);
        } else {
            self.add(table, bytes, out);
        }
        Ok(())
    }

    /// Appends all text that is certain after these bytes. Fast path: most pieces are whole characters.
    fn add(&mut self, table: &PieceTable, bytes: &[u8], out: &mut String) {
        match std::str::from_utf8(bytes) {
            Ok(text) if self.pending.is_empty() => self.emit(table, text, out),
            _ => {
                self.pending.extend_from_slice(bytes);
                self.drain(table, false, out);
            }
        }
    }

    /// Appends the rest, with U+FFFD for a character that is not complete.
    pub(super) fn flush(&mut self, table: &PieceTable, out: &mut String) {
        self.drain(table, true, out);
    }

    fn drain(&mut self, table: &PieceTable, last: bool, out: &mut String) {
        let pending = std::mem::take(&mut self.pending);
        let mut kept: &[u8] = &[];
        for chunk in pending.utf8_chunks() {
            self.emit(table, chunk.valid(), out);
            let invalid = chunk.invalid();
            // `invalid` is a truncated character exactly if it could still be completed, so only in the last chunk.
            let at_end = invalid.as_ptr_range().end == pending.as_ptr_range().end;
            let is_cut = at_end && is_truncated(invalid);
            if !last && is_cut {
                kept = invalid;
            } else if !invalid.is_empty() {
                let by_byte = table.rules.bytes == ByteRule::Fallback && !(is_cut && self.continues);
                let count = if by_byte { invalid.len() } else { 1 };
                for _ in 0..count {
                    self.emit(table, "\u{FFFD}", out);
                }
            }
        }
        self.pending = kept.to_vec();
    }

    fn emit(&mut self, table: &PieceTable, mut text: &str, out: &mut String) {
        while self.strip_left > 0 && !text.is_empty() {
            match table.rules.strip_start.and_then(|(c, _)| text.strip_prefix(c)) {
                Some(rest) => {
                    self.strip_left -= 1;
                    text = rest;
                }
                None => self.strip_left = 0,
            }
        }
        out.push_str(text);
    }
}

/// Returns true if more bytes could complete this character.
fn is_truncated(bytes: &[u8]) -> bool {
    std::str::from_utf8(bytes).is_err_and(|error| error.error_len().is_none())
}

/// The byte that a `<0x0A>` piece stands for.
fn fallback_byte(piece: &str) -> Option<u8> {
    let digits = piece.strip_prefix("<0x")?.strip_suffix('>')?;
    let is_hex = digits.len() == 2 && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    if is_hex { u8::from_str_radix(digits, 16).ok() } else { None }
}

/// The byte that a character of GPT-2's byte alphabet stands for: printable Latin-1 characters stand for themselves,
/// and U+0100 to U+0143 for the other 68 bytes, in order.
fn level_byte(c: char) -> Option<u8> {
    let stands_for_itself = |code: u32| matches!(code, 0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF);
    match u32::from(c) {
        code if stands_for_itself(code) => u8::try_from(code).ok(),
        code @ 0x100..=0x143 => {
            (0u8..=255).filter(|byte| !stands_for_itself(u32::from(*byte))).nth((code - 0x100) as usize)
        }
        _ => None,
    }
}
