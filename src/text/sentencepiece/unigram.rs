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
    pieces: Trie,
    unknown_score: f32,
}

/// The best way to a place in the text.
#[derive(Clone, Copy)]
struct Best {
    id: u32,
    score: f32,
    /// Where its last part starts; `None` where no way is known.
    start: Option<u32>,
}

impl Unigram {
    pub(super) fn new(vocabulary: &Vocabulary) -> Unigram {
        let scores = vocabulary.ids_of(Kind::Normal).map(|id| vocabulary.score(id));
        Unigram {
            pieces: Trie::new(vocabulary.plain_pieces()),
            unknown_score: scores.fold(f32::MAX, f32::min) - UNKNOWN_PENALTY,
        }
    }

    /// The parts of a normalized text, which has at most 2^32 - 2 bytes.
    pub(super) fn encode(&self, vocabulary: &Vocabulary, text: &[u8]) -> Vec<Part> {
        let mut best = vec![Best { id: 0, score: 0.0, start: None }; text.len() + 1];
        let (mut start, mut farthest) = (0, 0);
        while start < text.len() {
            let rest = &text[start..];
            if best[start].score.abs() > RESET_THRESHOLD {
                let offset = best[start].score;
                for end in &mut best[start..=farthest] {
                    if end.start.is_some() {
                        end.score -= offset;
                    }
                }
            }
            let score_here = best[start].score;
            let character = character_len(rest);
            let mut has_character = false;
            for (len, id) in self.pieces.prefixes(rest) {
                let score = match vocabulary.kind(id) {
                    Kind::Unused => continue,
                    // So much that it is chosen before pieces, whose scores are negative.
                    Kind::UserDefined => (0.1 * (len - 1) as f64) as f32,
                    _ => vocabulary.score(id),
                };
                best[start + len].improve(score + score_here, start, id);
                farthest = farthest.max(start + len);
                has_character |= len == character;
            }
            if !has_character {
                best[start + character].improve(self.unknown_score + score_here, start, vocabulary.unknown);
                farthest = farthest.max(start + character);
            }
            start += character;
        }
        let mut parts = Vec::new();
        let mut end = text.len();
        while end > 0 {
            // Every end a way leads to has a start before it; were there none, what is left would be one unknown part.
            let from = best[end].start.map_or(0, |start| start as usize).min(end - 1);
            parts.push(Part { len: end - from, id: best[end].id });
            end = from;
        }
        parts.reverse();
        parts
    }
}

impl Best {
    fn improve(&mut self, score: f32, start: usize, id: u32) {
        if self.start.is_none() || score > self.score {
            *self = Best { id, score, start: Some(start as u32) };
        }
    }
}
