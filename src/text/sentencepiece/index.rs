//! Hash index from a piece's bytes to its id.

use std::hash::{BuildHasher, RandomState};

/// An open-addressing hash table of pieces whose bytes are stored elsewhere. Encoding looks up about two candidates per
/// byte of text, most of them short and most of them absent. That should cost one multiplication and one slot; the
/// standard library's map uses a general-purpose hash and follows a pointer to the key.
#[derive(Debug)]
pub(super) struct PieceIndex {
    /// Power-of-two size, at most half full.
    slots: Vec<IndexSlot>,
    /// Random per table, so that no file can be crafted whose pieces all collide.
    seed: u64,
}

#[derive(Debug, Clone, Copy)]
struct IndexSlot {
    /// The half of the hash that does not choose the slot.
    tag: u32,
    /// [`FREE`] if the slot is empty.
    id: u32,
}

const FREE: u32 = u32::MAX;

impl PieceIndex {
    /// Creates an empty index with room for this many pieces.
    pub(super) fn with_capacity(pieces: usize) -> PieceIndex {
        let slots = vec![IndexSlot { tag: 0, id: FREE }; (2 * pieces).next_power_of_two().max(16)];
        PieceIndex { slots, seed: RandomState::new().hash_one(0) }
    }

    /// Looks up a piece; `bytes_of` returns the bytes of an inserted id.
    #[inline]
    pub(super) fn get<'a>(&self, piece: &[u8], bytes_of: impl Fn(u32) -> &'a [u8]) -> Option<u32> {
        self.find(piece, self.hash(piece), bytes_of).ok().map(|at| self.slots[at].id)
    }

    /// Inserts a piece, or returns the id of an equal one and leaves it in place. The caller must not exceed the
    /// capacity.
    pub(super) fn insert<'a>(&mut self, piece: &[u8], id: u32, bytes_of: impl Fn(u32) -> &'a [u8]) -> Option<u32> {
        let hash = self.hash(piece);
        match self.find(piece, hash, bytes_of) {
            Ok(at) => Some(self.slots[at].id),
            Err(at) => {
                self.slots[at] = IndexSlot { tag: (hash >> 32) as u32, id };
                None
            }
        }
    }

    /// The slot of a piece, or the free slot where it would go.
    #[inline]
    fn find<'a>(&self, piece: &[u8], hash: u64, bytes_of: impl Fn(u32) -> &'a [u8]) -> Result<usize, usize> {
        let mask = self.slots.len() - 1;
        let mut at = hash as usize & mask;
        loop {
            let slot = self.slots[at];
            if slot.id == FREE {
                return Err(at);
            }
            if slot.tag == (hash >> 32) as u32 && bytes_of(slot.id) == piece {
                return Ok(at);
            }
            at = (at + 1) & mask;
        }
    }

    #[inline]
    fn hash(&self, mut piece: &[u8]) -> u64 {
        let mut seed = self.seed ^ piece.len() as u64;
        while let Some((first, rest)) = piece.split_first_chunk::<8>() {
            if rest.len() <= 8 {
                break;
            }
            seed = folded(u64::from_le_bytes(*first) ^ seed, MULTIPLIER);
            piece = rest;
        }
        // Up to 16 bytes are covered by two words, which overlap if there are fewer.
        let (first, last) = if let (Some(first), Some(last)) = (piece.first_chunk(), piece.last_chunk()) {
            (u64::from_le_bytes(*first), u64::from_le_bytes(*last))
        } else if let (Some(first), Some(last)) = (piece.first_chunk(), piece.last_chunk()) {
            (u32::from_le_bytes(*first).into(), u32::from_le_bytes(*last).into())
        } else if let [first, .., last] = piece {
            (u64::from(*first) << 8 | u64::from(*last), u64::from(piece[1]))
        } else {
            (piece.first().map_or(0, |byte| u64::from(*byte)), 0)
        };
        folded(first ^ seed, last ^ MULTIPLIER)
    }
}

/// 2^64 divided by the golden ratio.
const MULTIPLIER: u64 = 0x9E37_79B9_7F4A_7C15;

/// XOR of both halves of a 128-bit product, so that every input bit affects the low bits too.
#[inline]
fn folded(a: u64, b: u64) -> u64 {
    let product = u128::from(a) * u128::from(b);
    product as u64 ^ (product >> 64) as u64
}
