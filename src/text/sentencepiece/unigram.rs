//! The unigram model: `unigram::Model::EncodeOptimized` of SentencePiece 0.2.3, reproducing its arithmetic.

use super::trie::Trie;
use super::vocabulary::{PieceKind, Vocabulary};
use super::{PieceSpan, character_len};

/// Penalty of an unknown character relative to the worst piece.
const UNKNOWN_PENALTY: f32 = 10.0;
/// Once the best path's score exceeds this in magnitude, scores are rebased to 0, which keeps enough f32 precision in
/// long texts.
const RESET_THRESHOLD: f32 = 100_000.0;

/// The state that the Viterbi search needs besides the vocabulary.
#[derive(Debug)]
pub(super) struct Unigram {
    /// All pieces that can be chosen.
    pieces: Trie,
    /// Score of every id.
    scores: Vec<f32>,
    /// Bytes of the longest piece, at least those of one character.
    longest: usize,
    unknown_score: f32,
    /// [`SETTLED_BYTES`]; tests also disable it.
    pub(super) settled_bytes: usize,
}

/// The best path to a position in the text.
#[derive(Clone, Copy)]
struct Best {
    id: u32,
    score: f32,
    /// Start of the last span, relative to `base`; [`NOWHERE`] if the position is not reachable yet.
    start: u32,
}

const NOWHERE: u32 = u32::MAX;
/// Decided spans are flushed once there are this many bytes of them.
const SETTLED_BYTES: usize = 1 << 10;

impl Unigram {
    pub(super) fn new(vocabulary: &Vocabulary) -> Unigram {
        let normal = vocabulary.ids_of(PieceKind::Normal).map(|id| vocabulary.score(id));
        let unknown_score = normal.fold(f32::MAX, f32::min) - UNKNOWN_PENALTY;
        let scores = vocabulary.kinds().enumerate().map(|(id, kind)| match kind {
            // High enough to win over pieces, whose scores are negative.
            PieceKind::UserDefined => (0.1 * (vocabulary.text(id as u32).len() - 1) as f64) as f32,
            _ => vocabulary.score(id as u32),
        });
        let chosen = vocabulary.plain_ids().filter(|id| vocabulary.kind(*id) != PieceKind::Unused);
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

    /// Splits a normalized text of at most 2^32 - 2 bytes into pieces.
    pub(super) fn encode(&self, vocabulary: &Vocabulary, text: &[u8]) -> Vec<PieceSpan> {
        let mut parts = Vec::with_capacity(text.len() / 3);
        // Best paths to the positions from `base` on. Where no span crosses a position, all paths pass through it and
        // everything before it is decided, so a long text does not need memory for all its positions.
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
            // Indexed by the length of a span that starts here.
            let ends = &mut best[here..];
            let mut has_character = false;
            let mut longest = 0;
            self.pieces.prefixes(rest, |len, id| {
                ends[len].improve(self.scores[id as usize] + score_here, here, id);
                longest = len;
                has_character |= len == character;
            });
            // Without a piece for it, the character becomes an unknown span, so every position stays reachable.
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

/// Appends the spans of the best path through these positions, first to last.
fn push_parts(best: &[Best], parts: &mut Vec<PieceSpan>) {
    let first = parts.len();
    let mut end = best.len() - 1;
    while end > 0 {
        // Every reachable position has a predecessor; if one did not, the rest would become a single unknown span.
        let start = if best[end].start == NOWHERE { 0 } else { (best[end].start as usize).min(end - 1) };
        parts.push(PieceSpan { len: (end - start) as u32, id: best[end].id });
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
