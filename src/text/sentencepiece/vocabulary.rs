//! The pieces: SentencePiece's `ModelInterface::InitializePieces`.

use std::ops::Range;
use std::path::Path;

use super::index::Index;
use super::proto::{SentencePiece, kind};
use super::trie::Trie;
use crate::error::{Error, Result, clip};

/// Longest piece that is read; the trainer makes none past 16 characters unless told.
const MAX_PIECE_BYTES: usize = 4096;

/// Most bytes of all pieces together, which bounds the memory of a [`Trie`]; the 8B model's have under 3 MB.
const MAX_TEXT_BYTES: usize = 32 << 20;

/// What a piece is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte(u8),
}

impl Kind {
    /// Whether a text can contain it.
    fn is_plain(self) -> bool {
        matches!(self, Kind::Normal | Kind::UserDefined | Kind::Unused)
    }
}

/// The pieces by id, and the ids by piece.
#[derive(Debug)]
pub(super) struct Vocabulary {
    pieces: Vec<Piece>,
    /// The pieces, one after the other.
    texts: String,
    /// Normal, user-defined and unused pieces: those a text can contain.
    plain: Index,
    /// All others.
    reserved: Index,
    /// Whether a piece is among both.
    has_shadowed: bool,
    longest_plain_bytes: usize,
    pub(super) unknown: u32,
    pub(super) user_defined: Trie,
    /// With `byte_fallback`, the ids of the pieces `<0x00>` to `<0xFF>`.
    pub(super) bytes: Option<Box<[u32; 256]>>,
}

#[derive(Debug)]
struct Piece {
    /// In [`Vocabulary::texts`].
    start: u32,
    len: u16,
    kind: Kind,
    score: f32,
}

impl Vocabulary {
    pub(super) fn new(name: &Path, pieces: Vec<SentencePiece>, byte_fallback: bool) -> Result<Vocabulary> {
        let mut vocabulary = Vocabulary {
            pieces: Vec::with_capacity(pieces.len()),
            texts: String::with_capacity(pieces.iter().map(|piece| piece.piece.len()).sum()),
            plain: Index::with_capacity(0),
            reserved: Index::with_capacity(0),
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
                    "with it the pieces have {text_bytes} bytes; at most {MAX_TEXT_BYTES} are read"
                ));
            }
            if text.contains('\0') {
                return refused("it contains a zero byte, which SentencePiece takes for its end".into());
            }
            if !score.is_finite() {
                return refused(format!("`{}` has score {score}, which is not a finite number", clip(&text)));
            }
            let kind = match kind.unwrap_or(kind::NORMAL) {
                kind::NORMAL => Kind::Normal,
                kind::UNKNOWN => Kind::Unknown,
                kind::CONTROL => Kind::Control,
                kind::USER_DEFINED => Kind::UserDefined,
                kind::UNUSED => Kind::Unused,
                kind::BYTE => match byte_of(&text) {
                    Some(byte) if byte_fallback => Kind::Byte(byte),
                    Some(_) => return refused(format!("`{text}` is a byte, but trainer_spec.byte_fallback is off")),
                    None => {
                        let text = clip(&text);
                        return refused(format!("`{text}` has the type of bytes, which are `<0x00>` to `<0xFF>`"));
                    }
                },
                other => return refused(format!("`{}` has type {other}; types are 1 to 6", clip(&text))),
            };
            if kind.is_plain() {
                vocabulary.longest_plain_bytes = vocabulary.longest_plain_bytes.max(text.len());
            }
            match kind {
                Kind::Unknown => {
                    if let Some(earlier) = unknown.replace(id) {
                        return refused(format!("its type is unknown, but piece {earlier} has that already"));
                    }
                }
                Kind::Byte(byte) => bytes[usize::from(byte)] = Some(id),
                _ => {}
            }
            // The limits above keep both in range. Adding 0 makes a negative zero positive, so that both are equal in
            // order too.
            let (start, len) = (vocabulary.texts.len() as u32, text.len() as u16);
            vocabulary.pieces.push(Piece { start, len, kind, score: score + 0.0 });
            vocabulary.texts.push_str(&text);
        }
        vocabulary.fill(name)?;
        let Some(unknown) = unknown else {
            let detail = format!("none of its {} pieces has the type unknown, which a model needs", vocabulary.len());
            return Err(Error::format(name, detail));
        };
        vocabulary.unknown = unknown;
        let user_defined = vocabulary.ids_of(Kind::UserDefined);
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

    /// Fills the indices: in a loop that does nothing else, whose waits for memory then overlap.
    fn fill(&mut self, name: &Path) -> Result<()> {
        let Vocabulary { pieces, texts, .. } = self;
        let bytes_of = |id: u32| pieces[id as usize].bytes(texts);
        let plain = pieces.iter().filter(|piece| piece.kind.is_plain()).count();
        self.plain = Index::with_capacity(plain);
        self.reserved = Index::with_capacity(pieces.len() - plain);
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

    /// The piece of an id there is.
    pub(super) fn text(&self, id: u32) -> &str {
        &self.texts[self.pieces[id as usize].range()]
    }

    /// The piece of an id, if there is one.
    pub(super) fn piece(&self, id: u32) -> Option<&str> {
        self.pieces.get(id as usize).map(|piece| &self.texts[piece.range()])
    }

    pub(super) fn kind(&self, id: u32) -> Kind {
        self.pieces[id as usize].kind
    }

    pub(super) fn score(&self, id: u32) -> f32 {
        self.pieces[id as usize].score
    }

    /// The id of a piece a text can contain.
    #[inline]
    pub(super) fn plain(&self, piece: &[u8]) -> Option<u32> {
        if piece.len() > self.longest_plain_bytes { None } else { self.plain.get(piece, |id| self.bytes_of(id)) }
    }

    /// The id of any piece; of one that is among both, the reserved one's.
    pub(super) fn lookup(&self, piece: &[u8]) -> Option<u32> {
        self.reserved.get(piece, |id| self.bytes_of(id)).or_else(|| self.plain(piece))
    }

    fn bytes_of(&self, id: u32) -> &[u8] {
        self.pieces[id as usize].bytes(&self.texts)
    }

    pub(super) fn has_shadowed(&self) -> bool {
        self.has_shadowed
    }

    pub(super) fn ids_of(&self, kind: Kind) -> impl Iterator<Item = u32> {
        self.kinds().enumerate().filter(move |(_, other)| *other == kind).map(|(id, _)| id as u32)
    }

    /// What the pieces are, in order of their ids.
    pub(super) fn kinds(&self) -> impl Iterator<Item = Kind> + Clone {
        self.pieces.iter().map(|piece| piece.kind)
    }

    /// The ids of pieces a text can contain.
    pub(super) fn plain_ids(&self) -> impl Iterator<Item = u32> + Clone {
        self.kinds().enumerate().filter(|(_, kind)| kind.is_plain()).map(|(id, _)| id as u32)
    }
}

impl Piece {
    fn range(&self) -> Range<usize> {
        let start = self.start as usize;
        start..start + usize::from(self.len)
    }

    #[inline]
    fn bytes<'a>(&self, texts: &'a str) -> &'a [u8] {
        &texts.as_bytes()[self.range()]
    }
}

/// The byte of a `<0x0A>` piece, which is spelled with capital letters.
fn byte_of(piece: &str) -> Option<u8> {
    let digits = piece.strip_prefix("<0x")?.strip_suffix('>')?;
    let byte = u8::from_str_radix(digits, 16).ok()?;
    (format!("{byte:02X}") == digits).then_some(byte)
}
