//! Byte-pair encoding: SentencePiece's `bpe::Model`, without dropout.
//!
//! Among adjacent symbols that together form a piece, the pair with the best score is merged (the leftmost of equals),
//! until none is left. If two adjacent characters of the text are not adjacent in any piece, nothing is ever merged
//! across that boundary and the two sides do not affect each other. So the text is first split at such boundaries, and
//! the segments, mostly words, are merged independently. Only [`PieceKind::Unused`] pieces require state across the
//! whole text.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

use super::vocabulary::{PieceKind, Vocabulary};
use super::{PieceSpan, character_len};

/// No symbol, no id or no pair.
const NONE: u32 = u32::MAX;
/// The id of a symbol that is never merged.
const FROZEN: u32 = u32::MAX - 1;

/// Up to this many symbols, scanning all pairs for the best one is faster than a priority queue.
const FEW: usize = 32;

/// The state that merging needs besides the vocabulary.
#[derive(Debug)]
pub(super) struct Bpe {
    neighbours: Neighbours,
    has_unused: bool,
}

/// A span of the text, to be merged with its neighbours.
#[derive(Debug, Clone, Copy)]
struct Symbol {
    start: u32,
    /// The piece it was merged into; [`FROZEN`] for a user-defined piece, which is never merged.
    id: u32,
    /// The pair it forms with the symbol on its right.
    pair: Pair,
}

/// Two adjacent symbols that form a piece.
#[derive(Debug, Clone, Copy)]
struct Pair {
    /// Lower is better; [`NONE`] means no pair.
    rank: u32,
    /// The piece they form.
    id: u32,
}

const NO_PAIR: Pair = Pair { rank: NONE, id: NONE };

impl Bpe {
    pub(super) fn new(vocabulary: &Vocabulary) -> Bpe {
        Bpe {
            neighbours: Neighbours::new(vocabulary),
            has_unused: vocabulary.kinds().any(|kind| kind == PieceKind::Unused),
        }
    }

    /// Splits a normalized text of at most 2^32 - 2 bytes into pieces.
    pub(super) fn encode(&self, vocabulary: &Vocabulary, text: &[u8]) -> Vec<PieceSpan> {
        let mut merging = Merging { vocabulary, text, symbols: Vec::new(), parts: Vec::with_capacity(text.len() / 3) };
        if self.has_unused {
            merging.whole();
            return merging.parts;
        }
        let (mut start, mut left) = (0, 0);
        while start < text.len() {
            let rest = &text[start..];
            // User-defined pieces match whole and separate the segments around them.
            if let Some(len) = vocabulary.user_defined.longest(rest) {
                merging.segment(start);
                merging.push_unmerged(start, start + len);
                start += len;
                continue;
            }
            let len = character_len(rest);
            let right = packed(&rest[..len]);
            if !self.neighbours.contains(left, right) {
                merging.segment(start);
            }
            merging.symbols.push(Symbol { start: start as u32, id: NONE, pair: NO_PAIR });
            left = right;
            start += len;
        }
        merging.segment(start);
        merging.parts
    }
}

/// Merging in progress.
struct Merging<'a> {
    vocabulary: &'a Vocabulary,
    text: &'a [u8],
    /// The symbols of the current segment.
    symbols: Vec<Symbol>,
    parts: Vec<PieceSpan>,
}

impl Merging<'_> {
    /// Merges the collected symbols, the last of which ends at `end`, and clears them.
    fn segment(&mut self, end: usize) {
        match self.symbols.len() {
            0 => return,
            1 => self.push_unmerged(self.symbols[0].start as usize, end),
            2..=FEW => self.merge_few(end as u32),
            _ => {
                self.merge_many(end as u32, &mut |_, _| {});
                self.push_all(end as u32);
            }
        }
        self.symbols.clear();
    }

    fn merge_few(&mut self, end: u32) {
        for index in 0..self.symbols.len() {
            self.symbols[index].pair = self.pair(index, end);
        }
        loop {
            let ranks = self.symbols.iter().map(|symbol| symbol.pair.rank).enumerate();
            // `min_by_key` returns the first minimum, hence the leftmost pair.
            let Some((best, rank)) = ranks.min_by_key(|(_, rank)| *rank) else { break };
            if rank == NONE {
                break;
            }
            self.symbols[best].id = self.symbols[best].pair.id;
            self.symbols.remove(best + 1);
            self.symbols[best].pair = self.pair(best, end);
            if let Some(previous) = best.checked_sub(1) {
                self.symbols[previous].pair = self.pair(previous, end);
            }
        }
        self.push_all(end);
    }

    /// The pair formed by a symbol and its right neighbour.
    fn pair(&self, index: usize, end: u32) -> Pair {
        if index + 1 == self.symbols.len() {
            return NO_PAIR;
        }
        pair(self.vocabulary, &self.text[self.symbols[index].start as usize..self.start(index + 2, end) as usize])
    }

    /// The start of a symbol; for the index past the last one, the end of the segment.
    fn start(&self, index: usize, end: u32) -> u32 {
        self.symbols.get(index).map_or(end, |symbol| symbol.start)
    }

    fn push_all(&mut self, end: u32) {
        for index in 0..self.symbols.len() {
            let (Symbol { start, id, .. }, end) = (self.symbols[index], self.start(index + 1, end));
            // A reserved piece of the same name takes precedence over the one that merging found.
            if id == NONE || self.vocabulary.has_shadowed() {
                self.push_unmerged(start as usize, end as usize);
            } else {
                self.parts.push(PieceSpan { len: end - start, id });
            }
        }
    }

    /// Pushes a span that was not merged from others.
    fn push_unmerged(&mut self, start: usize, end: usize) {
        let id = self.vocabulary.lookup(&self.text[start..end]).unwrap_or(self.vocabulary.unknown);
        self.parts.push(PieceSpan { len: (end - start) as u32, id });
    }

    /// Same result as [`Merging::merge_few`], in O(n log n). `met` is called for every piece that a pair forms, with
    /// its id and the length of its left part.
    fn merge_many(&mut self, end: u32, met: &mut impl FnMut(u32, u32)) {
        let count = self.symbols.len() as u32;
        let mut list = SymbolList {
            previous: (0..count).map(|index| index.wrapping_sub(1)).collect(),
            next: (1..=count).collect(),
        };
        // Candidate merges, best last: the initial pairs in a sorted list, pairs created by merging in a heap. An entry
        // is stale if the symbol's rank has changed since; if it has the same rank again, there are two entries for it,
        // and the first one popped stands for both.
        let mut pairs = Vec::with_capacity(self.symbols.len());
        for left in 0..count {
            pairs.extend(self.consider(left, &list, end, met));
        }
        pairs.sort_unstable();
        let mut made = BinaryHeap::new();
        while let Some(Reverse((rank, left))) = match (pairs.last(), made.peek()) {
            (Some(pair), Some(other)) if other > pair => made.pop(),
            (None, _) => made.pop(),
            _ => pairs.pop(),
        } {
            let symbol = &mut self.symbols[left as usize];
            if symbol.pair.rank != rank {
                continue;
            }
            symbol.id = symbol.pair.id;
            let right = list.remove_after(left);
            self.symbols[right as usize].start = NONE;
            self.symbols[right as usize].pair = NO_PAIR;
            made.extend(self.consider(list.previous[left as usize], &list, end, met));
            made.extend(self.consider(left, &list, end, met));
        }
        self.symbols.retain(|symbol| symbol.start != NONE);
    }

    /// Recomputes the pair of a symbol, if it exists, and its right neighbour; returns a queue entry if they form a
    /// piece.
    fn consider(
        &mut self,
        left: u32,
        list: &SymbolList,
        end: u32,
        met: &mut impl FnMut(u32, u32),
    ) -> Option<Reverse<(u32, u32)>> {
        let first = self.symbols.get(left as usize)?;
        let right = list.next[left as usize];
        let found = match self.symbols.get(right as usize) {
            Some(second) if first.id != FROZEN && second.id != FROZEN => {
                let start_after = self.start(list.next[right as usize] as usize, end);
                let found = pair(self.vocabulary, &self.text[first.start as usize..start_after as usize]);
                if found.rank != NONE {
                    met(found.id, second.start - first.start);
                }
                found
            }
            _ => NO_PAIR,
        };
        self.symbols[left as usize].pair = found;
        (found.rank != NONE).then_some(Reverse((found.rank, left)))
    }

    /// Merges the whole text at once, for models with unused pieces.
    fn whole(&mut self) {
        let (vocabulary, text) = (self.vocabulary, self.text);
        let mut start = 0;
        while start < text.len() {
            let rest = &text[start..];
            let user_defined = vocabulary.user_defined.longest(rest);
            let id = if user_defined.is_some() { FROZEN } else { NONE };
            self.symbols.push(Symbol { start: start as u32, id, pair: NO_PAIR });
            start += user_defined.unwrap_or_else(|| character_len(rest));
        }
        // For each unused piece seen, the length of the left part of the last pair that formed it.
        let mut unused: HashMap<u32, usize> = HashMap::new();
        self.merge_many(text.len() as u32, &mut |id, left_len| {
            if vocabulary.kind(id) == PieceKind::Unused {
                unused.insert(id, left_len as usize);
            }
        });
        let mut open: Vec<&[u8]> = Vec::new();
        for index in 0..self.symbols.len() {
            // An unused piece is split into the two parts it was merged from, recursively.
            open.push(&text[self.symbols[index].start as usize..self.start(index + 1, text.len() as u32) as usize]);
            while let Some(text) = open.pop() {
                let id = vocabulary.lookup(text).unwrap_or(vocabulary.unknown);
                match unused.get(&id).and_then(|len| text.split_at_checked(*len)) {
                    Some((left, right)) if !left.is_empty() && !right.is_empty() => open.extend([right, left]),
                    // An unused piece that was not merged from others, a single character, is unknown.
                    _ if vocabulary.kind(id) == PieceKind::Unused => {
                        self.parts.push(PieceSpan { len: text.len() as u32, id: vocabulary.unknown });
                    }
                    _ => self.parts.push(PieceSpan { len: text.len() as u32, id }),
                }
            }
        }
    }
}

/// Doubly linked list over the symbols' indices; past either end, the index is out of range.
struct SymbolList {
    previous: Vec<u32>,
    next: Vec<u32>,
}

impl SymbolList {
    /// Unlinks the right neighbour of this symbol, which must have one.
    fn remove_after(&mut self, left: u32) -> u32 {
        let right = self.next[left as usize];
        let next = self.next[right as usize];
        self.next[left as usize] = next;
        if let Some(previous) = self.previous.get_mut(next as usize) {
            *previous = left;
        }
        right
    }
}

/// The pair that forms this piece, if it is one.
#[inline]
fn pair(vocabulary: &Vocabulary, piece: &[u8]) -> Pair {
    vocabulary.plain(piece).map_or(NO_PAIR, |id| Pair { rank: rank(vocabulary.score(id)), id })
}

/// Maps a score to an integer that is lower the better the score, equal for equal scores, and less than [`NONE`], which
/// no finite score maps to. The order of floats is that of their bits, reversed for negative ones.
fn rank(score: f32) -> u32 {
    let bits = score.to_bits();
    if bits >> 31 == 1 { bits } else { !bits & !(1 << 31) }
}

/// Pairs of characters that are adjacent in some piece: a Bloom filter with one hash, so false positives are possible
/// and only cost speed.
#[derive(Debug)]
struct Neighbours {
    /// One bit per hash of two characters.
    bits: Vec<u64>,
    /// Shift that reduces a hash to a bit index.
    shift: u32,
}

impl Neighbours {
    fn new(vocabulary: &Vocabulary) -> Neighbours {
        // The 8B model's pairs fill a twentieth of 256 KB.
        let bits = (16 * vocabulary.len()).next_power_of_two().clamp(1 << 12, 1 << 21);
        let mut neighbours = Neighbours { bits: vec![0; bits / 64], shift: 64 - bits.ilog2() };
        for id in vocabulary.plain_ids() {
            let mut rest = vocabulary.text(id).as_bytes();
            let mut left = None;
            while !rest.is_empty() {
                let (character, after) = rest.split_at(character_len(rest));
                let right = packed(character);
                if let Some(left) = left.replace(right) {
                    let place = neighbours.place(left, right);
                    neighbours.bits[place / 64] |= 1 << (place % 64);
                }
                rest = after;
            }
        }
        neighbours
    }

    #[inline]
    fn contains(&self, left: u32, right: u32) -> bool {
        let place = self.place(left, right);
        self.bits[place / 64] >> (place % 64) & 1 == 1
    }

    #[inline]
    fn place(&self, left: u32, right: u32) -> usize {
        let both = u64::from(left) << 32 | u64::from(right);
        (both.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> self.shift) as usize
    }
}

/// A character's bytes as an integer; 0 for anything longer than 4 bytes.
#[inline]
fn packed(character: &[u8]) -> u32 {
    match *character {
        [a] => u32::from(a),
        [a, b] => u32::from_le_bytes([a, b, 0, 0]),
        [a, b, c] => u32::from_le_bytes([a, b, c, 0]),
        [a, b, c, d] => u32::from_le_bytes([a, b, c, d]),
        _ => 0,
    }
}
