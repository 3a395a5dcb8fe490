//! The pieces: SentencePiece's `ModelInterface::InitializePieces`.

use std::collections::HashMap;
use std::path::Path;

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

/// The pieces by id, and the ids by piece.
#[derive(Debug)]
pub(super) struct Vocabulary {
    pieces: Vec<Piece>,
    /// Normal, user-defined and unused pieces: those a text can contain.
    plain: HashMap<Box<[u8]>, u32>,
    /// All others.
    reserved: HashMap<Box<[u8]>, u32>,
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
    text: Box<str>,
    score: f32,
    kind: Kind,
}

impl Vocabulary {
    pub(super) fn new(name: &Path, pieces: Vec<SentencePiece>, byte_fallback: bool) -> Result<Vocabulary> {
        let mut vocabulary = Vocabulary {
            pieces: Vec::with_capacity(pieces.len()),
            plain: HashMap::with_capacity(pieces.len()),
            reserved: HashMap::new(),
            has_shadowed: false,
            longest_plain_bytes: 0,
            unknown: 0,
            user_defined: Trie::new(std::iter::empty()),
            bytes: None,
        };
        let mut unknown = None;
        let mut text_bytes = 0;
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
            text_bytes += text.len();
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
            let map = match kind {
                Kind::Normal | Kind::UserDefined | Kind::Unused => {
                    vocabulary.longest_plain_bytes = vocabulary.longest_plain_bytes.max(text.len());
                    &mut vocabulary.plain
                }
                Kind::Unknown | Kind::Control | Kind::Byte(_) => &mut vocabulary.reserved,
            };
            if let Some(earlier) = map.insert(text.as_bytes().into(), id) {
                return refused(format!("`{}` is piece {earlier} already", clip(&text)));
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
            // Adding 0 makes a negative zero positive, so that both are equal in order too.
            vocabulary.pieces.push(Piece { text: text.into(), score: score + 0.0, kind });
        }
        let Some(unknown) = unknown else {
            let detail = format!("none of its {} pieces has the type unknown, which a model needs", vocabulary.len());
            return Err(Error::format(name, detail));
        };
        vocabulary.unknown = unknown;
        vocabulary.has_shadowed = vocabulary.reserved.keys().any(|piece| vocabulary.plain.contains_key(piece));
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

    pub(super) fn len(&self) -> usize {
        self.pieces.len()
    }

    /// The piece of an id there is.
    pub(super) fn text(&self, id: u32) -> &str {
        &self.pieces[id as usize].text
    }

    /// The piece of an id, if there is one.
    pub(super) fn piece(&self, id: u32) -> Option<&str> {
        self.pieces.get(id as usize).map(|piece| &*piece.text)
    }

    pub(super) fn kind(&self, id: u32) -> Kind {
        self.pieces[id as usize].kind
    }

    pub(super) fn score(&self, id: u32) -> f32 {
        self.pieces[id as usize].score
    }

    /// The id of a piece a text can contain.
    pub(super) fn plain(&self, piece: &[u8]) -> Option<u32> {
        if piece.len() > self.longest_plain_bytes { None } else { self.plain.get(piece).copied() }
    }

    /// The id of any piece; of one that is among both, the reserved one's.
    pub(super) fn lookup(&self, piece: &[u8]) -> Option<u32> {
        self.reserved.get(piece).copied().or_else(|| self.plain(piece))
    }

    pub(super) fn has_shadowed(&self) -> bool {
        self.has_shadowed
    }

    pub(super) fn ids_of(&self, kind: Kind) -> impl Iterator<Item = u32> {
        self.kinds().enumerate().filter(move |(_, other)| *other == kind).map(|(id, _)| id as u32)
    }

    /// What the pieces are, in order of their ids.
    pub(super) fn kinds(&self) -> impl Iterator<Item = Kind> {
        self.pieces.iter().map(|piece| piece.kind)
    }

    pub(super) fn plain_pieces(&self) -> impl Iterator<Item = (&[u8], u32)> {
        self.plain.iter().map(|(piece, id)| (&**piece, *id))
    }
}

/// The byte of a `<0x0A>` piece, which is spelled with capital letters.
fn byte_of(piece: &str) -> Option<u8> {
    let digits = piece.strip_prefix("<0x")?.strip_suffix('>')?;
    let byte = u8::from_str_radix(digits, 16).ok()?;
    (format!("{byte:02X}") == digits).then_some(byte)
}
