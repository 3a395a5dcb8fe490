//! The vocabulary: SentencePiece's `ModelInterface::InitializePieces`.

use std::ops::Range;
use std::path::Path;

use super::index::PieceIndex;
use super::proto::{SentencePiece, kind};
use super::trie::Trie;
use crate::error::{Error, Result, clip};

/// Longer pieces are refused; by default the trainer makes none of more than 16 characters.
const MAX_PIECE_BYTES: usize = 4096;

/// Limit on the total bytes of all pieces, which bounds the memory of a [`Trie`]; the 8B model has under 3 MB.
const MAX_TEXT_BYTES: usize = 32 << 20;

/// The kind of a piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PieceKind {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte(u8),
}

impl PieceKind {
    /// Returns true if text can encode to this kind of piece.
    fn is_plain(self) -> bool {
        matches!(self, PieceKind::Normal | PieceKind::UserDefined | PieceKind::Unused)
    }
}

/// The pieces by id, and the ids by piece.
#[derive(Debug)]
pub(super) struct Vocabulary {
    pieces: Vec<VocabularyEntry>,
    /// All pieces, concatenated.
    texts: String,
    /// Normal, user-defined and unused pieces, which text can encode to.
    plain: PieceIndex,
    /// All other pieces.
    reserved: PieceIndex,
    /// True if some piece is in both indices.
    has_shadowed: bool,
    longest_plain_bytes: usize,
    pub(super) unknown: u32,
    pub(super) user_defined: Trie,
    /// With `byte_fallback`, the ids of `<0x00>` to `<0xFF>`.
    pub(super) bytes: Option<Box<[u32; 256]>>,
}

#[derive(Debug)]
struct VocabularyEntry {
    /// Offset into [`Vocabulary::texts`].
    start: u32,
    len: u16,
    kind: PieceKind,
    score: f32,
}

impl Vocabulary {
    pub(super) fn new(name: &Path, pieces: Vec<SentencePiece>, byte_fallback: bool) -> Result<Vocabulary> {
        let mut vocabulary = Vocabulary {
            pieces: Vec::with_capacity(pieces.len()),
            texts: String::with_capacity(pieces.iter().map(|piece| piece.piece.len()).sum()),
            plain: PieceIndex::with_capacity(0),
            reserved: PieceIndex::with_capacity(0),
            has_shadowed: false,
            longest_plain_bytes: 0,
            unknown: 0,
            user_defined: Trie::new(std::iter::empty()),
            bytes: None,
        };
        let mut unknown = None;
        let mut bytes = [None; 256];
        for (index, piece) in pieces.into_iter().enumerate() {
            let id = index as u32;
            let refused = |detail: String| Err(Error::format(name, format!("piece {id}: {detail}")));
            let SentencePiece { piece: text, score, kind } = piece;
            let score = score.unwrap_or(0.0);
            if text.is_empty() {
                return refused("it is empty".into());
            }
            if text.len() > MAX_PIECE_BYTES {
                return refused(format!("{} bytes; a piece has at most {MAX_PIECE_BYTES}", text.len()));
            }
            let text_bytes = vocabulary.texts.len() + text.len();
            if text_bytes > MAX_TEXT_BYTES {
                return refused(format!(
                    "with it the pieces have {text_bytes} bytes; at most {MAX_TEXT_BYTES} are accepted"
                ));
            }
            if text.contains('\0') {
                return refused("it contains a zero byte, where SentencePiece would end it".into());
            }
            if !score.is_finite() {
                return refused(format!("`{}` has score {score}, which is not a finite number", clip(&text)));
            }
            let kind = match kind.unwrap_or(kind::NORMAL) {
                kind::NORMAL => PieceKind::Normal,
                kind::UNKNOWN => PieceKind::Unknown,
                kind::CONTROL => PieceKind::Control,
                kind::USER_DEFINED => PieceKind::UserDefined,
                kind::UNUSED => PieceKind::Unused,
                kind::BYTE => match byte_of(&text) {
                    Some(byte) if byte_fallback => PieceKind::Byte(byte),
                    Some(_) => return refused(format!("`{text}` is a byte, but trainer_spec.byte_fallback is off")),
                    None => {
                        let text = clip(&text);
                        return refused(format!("`{text}` has type byte, but byte pieces are `<0x00>` to `<0xFF>`"));
                    }
                },
                other => return refused(format!("`{}` has type {other}; types are 1 to 6", clip(&text))),
            };
            if kind.is_plain() {
                vocabulary.longest_plain_bytes = vocabulary.longest_plain_bytes.max(text.len());
            }
            match kind {
                PieceKind::Unknown => {
                    if let Some(earlier) = unknown.replace(id) {
                        return refused(format!("its type is unknown, but so is that of piece {earlier}"));
                    }
                }
                PieceKind::Byte(byte) => bytes[usize::from(byte)] = Some(id),
                _ => {}
            }
            // The limits above keep both in range. Adding 0 turns a negative zero positive, so that both compare equal
            // by their bits too.
            let (start, len) = (vocabulary.texts.len() as u32, text.len() as u16);
            vocabulary.pieces.push(VocabularyEntry { start, len, kind, score: score + 0.0 });
            vocabulary.texts.push_str(&text);
        }
        vocabulary.fill(name)?;
        let Some(unknown) = unknown else {
            let detail = format!("none of its {} pieces has type unknown; a model needs one", vocabulary.len());
            return Err(Error::format(name, detail));
        };
        vocabulary.unknown = unknown;
        let user_defined = vocabulary.ids_of(PieceKind::UserDefined);
        vocabulary.user_defined = Trie::new(user_defined.map(|id| (vocabulary.text(id).as_bytes(), id)));
        if byte_fallback {
            if let Some(missing) = bytes.iter().position(Option::is_none) {
                let detail = format!("trainer_spec.byte_fallback is on, but there is no piece `<0x{missing:02X}>`");
                return Err(Error::format(name, detail));
            }
            vocabulary.bytes = Some(Box::new(bytes.map(Option::unwrap_or_default)));
        }
        Ok(vocabulary)
    }

    /// Fills the indices in a loop that does nothing else, so that its cache misses overlap.
    fn fill(&mut self, name: &Path) -> Result<()> {
        let Vocabulary { pieces, texts, .. } = self;
        let bytes_of = |id: u32| pieces[id as usize].bytes(texts);
        let plain = pieces.iter().filter(|piece| piece.kind.is_plain()).count();
        self.plain = PieceIndex::with_capacity(plain);
        self.reserved = PieceIndex::with_capacity(pieces.len() - plain);
        for (id, piece) in pieces.iter().enumerate() {
            let index = if piece.kind.is_plain() { &mut self.plain } else { &mut self.reserved };
            if let Some(earlier) = index.insert(piece.bytes(texts), id as u32, bytes_of) {
                let text = clip(&texts[piece.range()]);
                return Err(Error::format(name, format!("piece {id}: `{text}` is piece {earlier} already")));
            }
        }
        let mut reserved = pieces.iter().filter(|piece| !piece.kind.is_plain());
        self.has_shadowed = reserved.any(|piece| self.plain.get(piece.bytes(texts), bytes_of).is_some());
        Ok(())
    }

    pub(super) fn len(&self) -> usize {
        self.pieces.len()
    }

    /// The piece of a valid id.
    pub(super) fn text(&self, id: u32) -> &str {
        &self.texts[self.pieces[id as usize].range()]
    }

    /// The piece of an id, if it is valid.
    pub(super) fn piece(&self, id: u32) -> Option<&str> {
        self.pieces.get(id as usize).map(|piece| &self.texts[piece.range()])
    }

    pub(super) fn kind(&self, id: u32) -> PieceKind {
        self.pieces[id as usize].kind
    }

    pub(super) fn score(&self, id: u32) -> f32 {
        self.pieces[id as usize].score
    }

    /// The id of a piece that text can encode to.
    #[inline]
    pub(super) fn plain(&self, piece: &[u8]) -> Option<u32> {
        if piece.len() > self.longest_plain_bytes { None } else { self.plain.get(piece, |id| self.bytes_of(id)) }
    }

    /// The id of any piece; of one that is in both indices, that of the reserved one.
    pub(super) fn lookup(&self, piece: &[u8]) -> Option<u32> {
        self.reserved.get(piece, |id| self.bytes_of(id)).or_else(|| self.plain(piece))
    }

    fn bytes_of(&self, id: u32) -> &[u8] {
        self.pieces[id as usize].bytes(&self.texts)
    }

    pub(super) fn has_shadowed(&self) -> bool {
        self.has_shadowed
    }

    pub(super) fn ids_of(&self, kind: PieceKind) -> impl Iterator<Item = u32> {
        self.kinds().enumerate().filter(move |(_, other)| *other == kind).map(|(id, _)| id as u32)
    }

    /// The kind of every piece, by id.
    pub(super) fn kinds(&self) -> impl Iterator<Item = PieceKind> + Clone {
        self.pieces.iter().map(|piece| piece.kind)
    }

    /// The ids of pieces that text can encode to.
    pub(super) fn plain_ids(&self) -> impl Iterator<Item = u32> + Clone {
        self.kinds().enumerate().filter(|(_, kind)| kind.is_plain()).map(|(id, _)| id as u32)
    }
}

impl VocabularyEntry {
    fn range(&self) -> Range<usize> {
        let start = self.start as usize;
        start..start + usize::from(self.len)
    }

    #[inline]
    fn bytes<'a>(&self, texts: &'a str) -> &'a [u8] {
        &texts.as_bytes()[self.range()]
    }
}

/// The byte of a `<0x0A>` piece, which is spelled in upper case.
fn byte_of(piece: &str) -> Option<u8> {
    let digits = piece.strip_prefix("<0x")?.strip_suffix('>')?;
    let byte = u8::from_str_radix(digits, 16).ok()?;
    (format!("{byte:02X}") == digits).then_some(byte)
}
