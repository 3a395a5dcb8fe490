//! Byte-pair encoding: SentencePiece's `bpe::Model`, without dropout.
//!
//! Of all neighbours that make a piece, those with the best score are merged, the leftmost of equal ones first, until
//! no two make one. Where the characters on both sides of a place are side by side in no piece, nothing is ever merged
//! across it, and what is on one side of it does not matter to the other: so the text is first cut at such places, and
//! the parts, mostly words, are merged each for itself. Only [`Kind::Unused`] pieces are remembered across a whole text.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

use super::vocabulary::{Kind, Vocabulary};
use super::{Part, character_len};

/// No symbol, no id, no pair.
const NONE: u32 = u32::MAX;
/// The id of a symbol that is never merged.
const FROZEN: u32 = u32::MAX - 1;

/// Up to so many symbols, looking at all pairs for the best one is faster than keeping them in order.
const FEW: usize = 32;

/// What merging needs beside the vocabulary.
#[derive(Debug)]
pub(super) struct Bpe {
    neighbours: Neighbours,
    has_unused: bool,
}

/// A part of the text, to be merged with its neighbours.
#[derive(Debug, Clone, Copy)]
struct Symbol {
    start: u32,
    /// Of the piece it was merged to; [`FROZEN`] for a user-defined piece, which is never merged.
    id: u32,
    /// With the symbol on its right.
    pair: Pair,
}

/// Two neighbours that make a piece.
#[derive(Debug, Clone, Copy)]
struct Pair {
    /// The best score is the least; [`NONE`] is no pair.
    rank: u32,
    /// The piece.
    id: u32,
}

const NO_PAIR: Pair = Pair { rank: NONE, id: NONE };

impl Bpe {
    pub(super) fn new(vocabulary: &Vocabulary) -> Bpe {
        Bpe { neighbours: Neighbours::new(vocabulary), has_unused: vocabulary.kinds().any(|kind| kind == Kind::Unused) }
    }

    /// The parts of a normalized text, which has at most 2^32 - 2 bytes.
    pub(super) fn encode(&self, vocabulary: &Vocabulary, text: &[u8]) -> Vec<Part> {
        let mut merging = Merging { vocabulary, text, symbols: Vec::new(), parts: Vec::with_capacity(text.len() / 3) };
        if self.has_unused {
            merging.whole();
            return merging.parts;
        }
        let (mut start, mut left) = (0, 0);
        while start < text.len() {
            let rest = &text[start..];
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
    /// Of the segment that is being read.
    symbols: Vec<Symbol>,
    parts: Vec<Part>,
}

impl Merging<'_> {
    /// Merges the symbols there are, the last of which ends at `end`, and leaves none.
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
            // The first of equal ones.
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

    /// The pair of a symbol and the one on its right.
    fn pair(&self, index: usize, end: u32) -> Pair {
        if index + 1 == self.symbols.len() {
            return NO_PAIR;
        }
        pair(self.vocabulary, &self.text[self.symbols[index].start as usize..self.start(index + 2, end) as usize])
    }

    /// Where a symbol starts; the one past the last, where the segment ends.
    fn start(&self, index: usize, end: u32) -> u32 {
        self.symbols.get(index).map_or(end, |symbol| symbol.start)
    }

    fn push_all(&mut self, end: u32) {
        for index in 0..self.symbols.len() {
            let (Symbol { start, id, .. }, end) = (self.symbols[index], self.start(index + 1, end));
            if id == NONE || self.vocabulary.has_shadowed() {
                self.push_unmerged(start as usize, end as usize);
            } else {
                self.parts.push(Part { len: end - start, id });
            }
        }
    }

    /// A part that was not made of others.
    fn push_unmerged(&mut self, start: usize, end: usize) {
        let id = self.vocabulary.lookup(&self.text[start..end]).unwrap_or(self.vocabulary.unknown);
        self.parts.push(Part { len: (end - start) as u32, id });
    }

    /// Does what [`Merging::merge_few`] does, in time that grows little faster than the text. `met` is told of every
    /// piece that a pair makes: its id, and the length of its left part.
    fn merge_many(&mut self, end: u32, met: &mut impl FnMut(u32, u32)) {
        let count = self.symbols.len() as u32;
        let mut list =
            List { previous: (0..count).map(|index| index.wrapping_sub(1)).collect(), next: (1..=count).collect() };
        // What can be merged, the best last: at first all there is, then in a heap what merging made. One that has
        // changed since has another rank by now; if it has the same, it is here twice, and the first stands for both.
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

    /// Looks at a symbol, if there is one, and the one on its right; gives what to note where they make a piece.
    fn consider(
        &mut self,
        left: u32,
        list: &List,
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

    /// The whole text at once, with unused pieces.
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
        // Of the unused pieces that were met: the length of the left part of the last pair that made them.
        let mut unused: HashMap<u32, usize> = HashMap::new();
        self.merge_many(text.len() as u32, &mut |id, left_len| {
            if vocabulary.kind(id) == Kind::Unused {
                unused.insert(id, left_len as usize);
            }
        });
        let mut open: Vec<&[u8]> = Vec::new();
        for index in 0..self.symbols.len() {
            // An unused piece is cut into the two it was made of, and so are those.
            open.push(&text[self.symbols[index].start as usize..self.start(index + 1, text.len() as u32) as usize]);
            while let Some(text) = open.pop() {
                let id = vocabulary.lookup(text).unwrap_or(vocabulary.unknown);
                match unused.get(&id).and_then(|len| text.split_at_checked(*len)) {
                    Some((left, right)) if !left.is_empty() && !right.is_empty() => open.extend([right, left]),
                    // One that was not made of others, a single character, is not known.
                    _ if vocabulary.kind(id) == Kind::Unused => {
                        self.parts.push(Part { len: text.len() as u32, id: vocabulary.unknown });
                    }
                    _ => self.parts.push(Part { len: text.len() as u32, id }),
                }
            }
        }
    }
}

/// The symbols on both sides of each; past either end is an index there is no symbol at.
struct List {
    previous: Vec<u32>,
    next: Vec<u32>,
}

impl List {
    /// Takes out the symbol on the right of this one, which must have one.
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

/// The pair that makes this piece, if it is one.
#[inline]
fn pair(vocabulary: &Vocabulary, piece: &[u8]) -> Pair {
    vocabulary.plain(piece).map_or(NO_PAIR, |id| Pair { rank: rank(vocabulary.score(id)), id })
}

/// A number that is the less the better a score is, equal for equal ones and less than [`NONE`], which no finite score
/// gives: the order of floats is that of their bits, backwards if negative.
fn rank(score: f32) -> u32 {
    let bits = score.to_bits();
    if bits >> 31 == 1 { bits } else { !bits & !(1 << 31) }
}

/// Which characters are side by side in pieces, of which some more may be taken for such.
#[derive(Debug)]
struct Neighbours {
    /// A bit for each hash of two characters.
    bits: Vec<u64>,
    /// Takes a hash to its place.
    shift: u32,
}

impl Neighbours {
    fn new(vocabulary: &Vocabulary) -> Neighbours {
        // The 8B model's fill a twentieth of 256 KB.
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

/// A character's bytes as a number; of more than 4 there is none.
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
