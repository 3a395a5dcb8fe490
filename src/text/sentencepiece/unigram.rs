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
    unknown_score: f32,
}

/// The best way to a place in the text.
#[derive(Clone, Copy)]
struct Best {
    id: u32,
    score: f32,
    /// Where its last part starts; [`NOWHERE`] where no way is known.
    start: u32,
}

const NOWHERE: u32 = u32::MAX;

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
        let pieces = Trie::new(chosen.map(|id| (vocabulary.text(id).as_bytes(), id)));
        Unigram { pieces, scores: scores.collect(), unknown_score }
    }

    /// The parts of a normalized text, which has at most 2^32 - 2 bytes.
    pub(super) fn encode(&self, vocabulary: &Vocabulary, text: &[u8]) -> Vec<Part> {
        let mut best = vec![Best { id: 0, score: 0.0, start: NOWHERE }; text.len() + 1];
        let (mut start, mut farthest) = (0, 0);
        while start < text.len() {
            let rest = &text[start..];
            if best[start].score.abs() > RESET_THRESHOLD {
                let offset = best[start].score;
                for end in &mut best[start..=farthest] {
                    if end.start != NOWHERE {
                        end.score -= offset;
                    }
                }
            }
            let score_here = best[start].score;
            let character = character_len(rest);
            let mut has_character = false;
            // By length of the part that starts here and ends there.
            let ends = &mut best[start..=start + rest.len()];
            let mut longest = 0;
            self.pieces.prefixes(rest, |len, id| {
                ends[len].improve(self.scores[id as usize] + score_here, start, id);
                longest = len;
                has_character |= len == character;
            });
            if !has_character {
                ends[character].improve(self.unknown_score + score_here, start, vocabulary.unknown);
                longest = longest.max(character);
            }
            farthest = farthest.max(start + longest);
            start += character;
        }
        // Every end a way leads to has a start before it; were there none, what is left would be one unknown part.
        let start_of =
            |end: usize| if best[end].start == NOWHERE { 0 } else { (best[end].start as usize).min(end - 1) };
        let ends = std::iter::successors(Some(text.len()), |end| (*end > 0).then(|| start_of(*end)))
            .take_while(|end| *end > 0);
        // Counted first: a long text's parts take much memory, and from the last one on they would have to be turned.
        let mut parts = vec![Part { len: 0, id: 0 }; ends.clone().count()];
        for (part, end) in parts.iter_mut().rev().zip(ends) {
            *part = Part { len: (end - start_of(end)) as u32, id: best[end].id };
        }
        parts
    }
}

impl Best {
    #[inline]
    fn improve(&mut self, score: f32, start: usize, id: u32) {
        if self.start == NOWHERE || score > self.score {
            *self = Best { id, score, start: start as u32 };
        }
    }
}
