//! The unigram model: SentencePiece's `unigram::Model::EncodeOptimized`, in its arithmetic.

use super::trie::Trie;
use super::vocabulary::{Kind, Vocabulary};
use super::{Part, character_len};

/// How far below the worst piece an unknown character lies.
const UNKNOWN_PENALTY: f32 = 10.0;

/// What a search needs beside the vocabulary.
#[derive(Debug)]
pub(super) struct Unigram {
    pieces: Trie,
    unknown_score: f32,
    /// Of normal pieces, but not below the least positive normal number, as SentencePiece starts its search for it.
    best_score: f32,
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
        let scores = || vocabulary.ids_of(Kind::Normal).map(|id| vocabulary.score(id));
        Unigram {
            pieces: Trie::new(vocabulary.plain_pieces()),
            unknown_score: scores().fold(f32::MAX, f32::min) - UNKNOWN_PENALTY,
            best_score: scores().fold(f32::MIN_POSITIVE, f32::max),
        }
    }

    /// The parts of a normalized text, which has at most 2^32 - 2 bytes.
    pub(super) fn encode(&self, vocabulary: &Vocabulary, text: &[u8]) -> Vec<Part> {
        let mut best = vec![Best { id: 0, score: 0.0, start: None }; text.len() + 1];
        let mut start = 0;
        while start < text.len() {
            let rest = &text[start..];
            let score_here = best[start].score;
            let character = character_len(rest);
            let mut has_character = false;
            for (len, id) in self.pieces.prefixes(rest) {
                let score = match vocabulary.kind(id) {
                    Kind::Unused => continue,
                    // So much that it is always chosen.
                    Kind::UserDefined => f64::from(len as f32 * self.best_score) - 0.1,
                    _ => f64::from(vocabulary.score(id)),
                };
                best[start + len].improve(score + f64::from(score_here), start, id);
                has_character |= len == character;
            }
            if !has_character {
                let score = self.unknown_score + score_here;
                best[start + character].improve(f64::from(score), start, vocabulary.unknown);
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
    fn improve(&mut self, score: f64, start: usize, id: u32) {
        if self.start.is_none() || score > f64::from(self.score) {
            *self = Best { id, score: score as f32, start: Some(start as u32) };
        }
    }
}
