//! Byte-pair encoding: SentencePiece's `bpe::Model`, without dropout.

use std::cmp::Ordering;
use std::collections::{BinaryHeap, HashMap};

use super::vocabulary::{Kind, Vocabulary};
use super::{Part, character_len};

/// No symbol, no id.
const NONE: u32 = u32::MAX;

/// A part of the text, to be merged with its neighbours.
struct Symbol {
    start: u32,
    /// 0: merged into a symbol on its left.
    len: u32,
    previous: u32,
    next: u32,
    /// Of the piece it was merged to.
    id: u32,
    /// A user-defined piece, which is never merged.
    frozen: bool,
}

/// Two neighbours that make a piece.
#[derive(PartialEq)]
struct Pair {
    score: f32,
    left: u32,
    right: u32,
    /// Of both; a pair whose symbols have changed has another by now.
    len: u32,
    id: u32,
}

impl Eq for Pair {}

impl PartialOrd for Pair {
    fn partial_cmp(&self, other: &Pair) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Pair {
    /// The best score is greatest, then the leftmost.
    fn cmp(&self, other: &Pair) -> Ordering {
        self.score.total_cmp(&other.score).then(other.left.cmp(&self.left)).then(other.right.cmp(&self.right))
    }
}

/// Merging in progress.
struct Merging<'a> {
    vocabulary: &'a Vocabulary,
    text: &'a [u8],
    symbols: Vec<Symbol>,
    pairs: BinaryHeap<Pair>,
    /// Of the unused pieces that were met: the length of the left part of the last pair that made them.
    unused: HashMap<u32, usize>,
}

/// The parts of a normalized text, which has at most 2^32 - 2 bytes.
pub(super) fn encode(vocabulary: &Vocabulary, text: &[u8]) -> Vec<Part> {
    let mut merging = Merging {
        vocabulary,
        text,
        symbols: Vec::with_capacity(text.len()),
        pairs: BinaryHeap::new(),
        unused: HashMap::new(),
    };
    merging.split();
    for right in 1..merging.symbols.len() as u32 {
        merging.consider(right - 1, right);
    }
    merging.merge();
    merging.parts()
}

impl Merging<'_> {
    /// Cuts the text into characters and user-defined pieces.
    fn split(&mut self) {
        let mut start = 0;
        while start < self.text.len() {
            let rest = &self.text[start..];
            let user_defined = self.vocabulary.user_defined.longest(rest);
            let len = user_defined.unwrap_or_else(|| character_len(rest));
            let index = self.symbols.len() as u32;
            let end = start + len;
            self.symbols.push(Symbol {
                start: start as u32,
                len: len as u32,
                previous: index.checked_sub(1).unwrap_or(NONE),
                next: if end < self.text.len() { index + 1 } else { NONE },
                id: NONE,
                frozen: user_defined.is_some(),
            });
            start = end;
        }
    }

    /// Notes two neighbours, if there are two and they make a piece.
    fn consider(&mut self, left: u32, right: u32) {
        let (Some(first), Some(second)) = (self.symbols.get(left as usize), self.symbols.get(right as usize)) else {
            return;
        };
        if first.frozen || second.frozen {
            return;
        }
        let len = first.len + second.len;
        let piece = &self.text[first.start as usize..(first.start + len) as usize];
        let Some(id) = self.vocabulary.plain(piece) else { return };
        if self.vocabulary.kind(id) == Kind::Unused {
            self.unused.insert(id, first.len as usize);
        }
        self.pairs.push(Pair { score: self.vocabulary.score(id), left, right, len, id });
    }

    fn merge(&mut self) {
        while let Some(Pair { left, right, len, id, .. }) = self.pairs.pop() {
            let (first, second) = (&self.symbols[left as usize], &self.symbols[right as usize]);
            if first.len == 0 || second.len == 0 || first.len + second.len != len {
                continue;
            }
            let (previous, next) = (first.previous, second.next);
            self.symbols[right as usize].len = 0;
            let merged = &mut self.symbols[left as usize];
            (merged.len, merged.next, merged.id) = (len, next, id);
            if let Some(next) = self.symbols.get_mut(next as usize) {
                next.previous = left;
            }
            self.consider(previous, left);
            self.consider(left, next);
        }
    }

    fn parts(self) -> Vec<Part> {
        let mut parts = Vec::with_capacity(self.text.len() / 3);
        let mut open: Vec<&[u8]> = Vec::new();
        for symbol in self.symbols.iter().filter(|symbol| symbol.len > 0) {
            let text = &self.text[symbol.start as usize..(symbol.start + symbol.len) as usize];
            if symbol.id != NONE && self.vocabulary.kind(symbol.id) != Kind::Unused && !self.vocabulary.has_shadowed() {
                parts.push(Part { len: text.len(), id: symbol.id });
                continue;
            }
            // An unused piece is cut into the two it was made of, and so are those.
            open.push(text);
            while let Some(text) = open.pop() {
                let id = self.vocabulary.lookup(text).unwrap_or(self.vocabulary.unknown);
                match self.unused.get(&id).and_then(|len| text.split_at_checked(*len)) {
                    Some((left, right)) if !left.is_empty() && !right.is_empty() => open.extend([right, left]),
                    // One that was not made of others, a single character, is not known.
                    _ if self.vocabulary.kind(id) == Kind::Unused => {
                        parts.push(Part { len: text.len(), id: self.vocabulary.unknown });
                    }
                    _ => parts.push(Part { len: text.len(), id }),
                }
            }
        }
        parts
    }
}
