//! Ids by the bytes of pieces.

use std::hash::{BuildHasher, RandomState};

/// A hash table of pieces whose bytes are kept elsewhere. Encoding asks for a piece about twice a byte, nearly always
/// for a short one and mostly in vain: one multiplication and one slot is what that should take, where the map of the
/// standard library takes a hash made for anything and follows a pointer to the key.
#[derive(Debug)]
pub(super) struct Index {
    /// A power of two, at most half of them taken.
    slots: Vec<Slot>,
    /// Differs from run to run, so that no file can be written whose pieces all fall into one place.
    seed: u64,
}

#[derive(Debug, Clone, Copy)]
struct Slot {
    /// The half of the hash that does not say the place.
    tag: u32,
    /// [`FREE`] where there is none.
    id: u32,
}

const FREE: u32 = u32::MAX;

impl Index {
    /// An empty index with room for so many pieces.
    pub(super) fn with_capacity(pieces: usize) -> Index {
        let slots = vec![Slot { tag: 0, id: FREE }; (2 * pieces).next_power_of_two().max(16)];
        Index { slots, seed: RandomState::new().hash_one(0) }
    }

    /// The id of a piece; `bytes_of` gives the bytes of an id that was inserted.
    #[inline]
    pub(super) fn get<'a>(&self, piece: &[u8], bytes_of: impl Fn(u32) -> &'a [u8]) -> Option<u32> {
        self.find(piece, self.hash(piece), bytes_of).ok().map(|at| self.slots[at].id)
    }

    /// Adds a piece; gives the id of an equal one where there is one, which then stays as it is. No more may be added
    /// than there is room for.
    pub(super) fn insert<'a>(&mut self, piece: &[u8], id: u32, bytes_of: impl Fn(u32) -> &'a [u8]) -> Option<u32> {
        let hash = self.hash(piece);
        match self.find(piece, hash, bytes_of) {
            Ok(at) => Some(self.slots[at].id),
            Err(at) => {
                self.slots[at] = Slot { tag: (hash >> 32) as u32, id };
                None
            }
        }
    }

    /// The slot of a piece, or the one it would get.
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
        // Of 16 bytes and fewer two words hold all, overlapping where they are not as many.
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

/// Both halves of a product, so that every bit of the factors reaches the low bits too.
#[inline]
fn folded(a: u64, b: u64) -> u64 {
    let product = u128::from(a) * u128::from(b);
    product as u64 ^ (product >> 64) as u64
}
