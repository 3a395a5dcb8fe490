//! The unigram model: `unigram::Model::EncodeOptimized` of SentencePiece 0.2.3, in its arithmetic.

use super::trie::Trie;
use super::vocabulary::{Kind, Vocabulary};
use super::{Part, character_len};

/// How far below the worst piece an unknown character lies.
const UNKNOWN_PENALTY: f32 = 10.0;
/// A way whose score is farther from 0 than this becomes the new 0, which keeps the sums of long texts exact enough.
const RESET_THRESHOLD: f32 = 100_000.0;

/// What a search needs beside the vocabulary.
#[derive(Debug)]
pub(super) struct Unigram {
    /// All that are ever chosen.
    pieces: Trie,
    /// Of every id.
    scores: Vec<f32>,
    /// Bytes of the longest piece, and of a character at least.
    longest: usize,
    unknown_score: f32,
    /// [`SETTLED_BYTES`], and all there are in a test.
    pub(super) settled_bytes: usize,
}

/// The best way to a place in the text.
#[derive(Clone, Copy)]
struct Best {
    id: u32,
    score: f32,
    /// Where its last part starts, as the places are numbered; [`NOWHERE`] where no way is known.
    start: u32,
}

const NOWHERE: u32 = u32::MAX;
/// What is decided is noted once there is so much of it.
const SETTLED_BYTES: usize = 1 << 10;

impl Unigram {
    pub(super) fn new(vocabulary: &Vocabulary) -> Unigram {
        let normal = vocabulary.ids_of(Kind::Normal).map(|id| vocabulary.score(id));
        let unknown_score = normal.fold(f32::MAX, f32::min) - UNKNOWN_PENALTY;
        let scores = vocabulary.kinds().enumerate().map(|(id, kind)| match kind {
            // So much that it is chosen before pieces, whose scores are negative.
            Kind::UserDefined => (0.1 * (vocabulary.text(id as u32).len() - 1) as f64) as f32,
            _ => vocabulary.score(id as u32),
        });
        let chosen = vocabulary.plain_ids().filter(|id| vocabulary.kind(*id) != Kind::Unused);
        let chosen = chosen.map(|id| (vocabulary.text(id).as_bytes(), id));
        let longest = chosen.clone().map(|(piece, _)| piece.len()).fold(4, usize::max);
        Unigram {
            pieces: Trie::new(chosen),
            scores: scores.collect(),
            longest,
            unknown_score,
            settled_bytes: SETTLED_BYTES,
        }
    }

    /// The parts of a normalized text, which has at most 2^32 - 2 bytes.
    pub(super) fn encode(&self, vocabulary: &Vocabulary, text: &[u8]) -> Vec<Part> {
        let mut parts = Vec::with_capacity(text.len() / 3);
        // The ways to the places from `base` on. Where no part reaches past a place, all ways lead through it: what is
        // before it is decided then, so that a long text does not take memory for all its places.
        let mut best = vec![Best::UNKNOWN_START];
        let (mut base, mut start, mut farthest) = (0, 0, 0);
        while start < text.len() {
            if start == farthest && start - base >= self.settled_bytes {
                push_parts(&best[..=start - base], &mut parts);
                best[0] = Best { score: best[start - base].score, ..Best::UNKNOWN_START };
                best.truncate(1);
                base = start;
            }
            let rest = &text[start..];
            let here = start - base;
            if best[here].score.abs() > RESET_THRESHOLD {
                let offset = best[here].score;
                for end in &mut best[here..=farthest - base] {
                    if end.start != NOWHERE {
                        end.score -= offset;
                    }
                }
            }
            let score_here = best[here].score;
            let character = character_len(rest);
            best.resize((here + self.longest.min(rest.len()) + 1).max(best.len()), Best::UNKNOWN_START);
            // By length of the part that starts here and ends there.
            let ends = &mut best[here..];
            let mut has_character = false;
            let mut longest = 0;
            self.pieces.prefixes(rest, |len, id| {
                ends[len].improve(self.scores[id as usize] + score_here, here, id);
                longest = len;
                has_character |= len == character;
            });
            if !has_character {
                ends[character].improve(self.unknown_score + score_here, here, vocabulary.unknown);
                longest = longest.max(character);
            }
            farthest = farthest.max(start + longest);
            start += character;
        }
        push_parts(&best[..=text.len() - base], &mut parts);
        parts
    }
}

/// Appends the parts of the best way through these places, from the first to the last.
fn push_parts(best: &[Best], parts: &mut Vec<Part>) {
    let first = parts.len();
    let mut end = best.len() - 1;
    while end > 0 {
        // Every end a way leads to has a start before it; were there none, what is left would be one unknown part.
        let start = if best[end].start == NOWHERE { 0 } else { (best[end].start as usize).min(end - 1) };
        parts.push(Part { len: (end - start) as u32, id: best[end].id });
        end = start;
    }
    parts[first..].reverse();
}

impl Best {
    const UNKNOWN_START: Best = Best { id: 0, score: 0.0, start: NOWHERE };

    #[inline]
    fn improve(&mut self, score: f32, start: usize, id: u32) {
        if self.start == NOWHERE || score > self.score {
            *self = Best { id, score, start: start as u32 };
        }
    }
}
