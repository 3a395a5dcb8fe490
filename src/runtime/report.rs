//! What a request is told about each of its tokens: ids, log-probabilities, and the most likely alternatives.

use serde::Serialize;

use super::sampler::{check_row, log_softmax_offset};
use crate::error::{Error, Result};

/// Largest number of alternatives that are reported for a token.
pub const MAX_TOP_LOGPROBS: usize = 20;

/// The tokens of an answer that a request wants reported, beside the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TokenReports {
    /// None.
    #[default]
    None,
    /// The ids.
    Ids,
    /// The ids, their log-probabilities, and those of this many of the most likely ids, at most [`MAX_TOP_LOGPROBS`].
    Logprobs(usize),
}

/// The natural log-probabilities of one position, by a softmax over all of a row of logits as the model computed it:
/// before temperature, penalties, biases and grammar.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TokenLogprobs {
    /// Of the token itself.
    pub logprob: f64,
    /// The most likely ids with theirs, in descending order; equal ones by ascending id. The token is among them only if
    /// it is as likely.
    pub top: Vec<(u32, f64)>,
}

/// A token of a prompt or an answer.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TokenReport {
    /// Its id.
    pub id: u32,
    /// Its log-probabilities, if they were asked for. The first token of a prompt has none.
    pub logprobs: Option<TokenLogprobs>,
}

impl TokenReports {
    /// Checks the number of alternatives.
    pub(super) fn validate(self) -> Result<()> {
        match self {
            TokenReports::Logprobs(top) if top > MAX_TOP_LOGPROBS => {
                Err(Error::Request(format!("{top} log-probabilities per token; expected 0 to {MAX_TOP_LOGPROBS}")))
            }
            _ => Ok(()),
        }
    }

    /// The number of alternatives to report, if log-probabilities are wanted.
    pub(super) fn top(self) -> Option<usize> {
        match self {
            TokenReports::Logprobs(top) => Some(top),
            TokenReports::None | TokenReports::Ids => None,
        }
    }
}

impl TokenLogprobs {
    /// The log-probabilities of `id` and of the `top` most likely of the first `ids` columns of a row of logits,
    /// `[vocab_size]`.
    ///
    /// # Errors
    /// As [`log_probability`](super::log_probability).
    pub(super) fn of_row(row: &[f32], id: u32, top: usize, ids: usize) -> Result<TokenLogprobs> {
        check_row(row)?;
        let offset = log_softmax_offset(row)?;
        let logit = row.get(id as usize).ok_or_else(|| {
            Error::Request(format!("id {id}; the logits have ids 0 to {}", row.len().saturating_sub(1)))
        })?;
        let columns = row.get(..ids).unwrap_or(row);
        let best = largest(columns, top);
        let top = best.into_iter().map(|(id, logit)| (id, offset.of(logit))).collect();
        Ok(TokenLogprobs { logprob: offset.of(*logit), top })
    }
}

/// The `count` largest values and their indices, in descending order; of equal ones, the first.
fn largest(values: &[f32], count: usize) -> Vec<(u32, f32)> {
    let mut best: Vec<(u32, f32)> = Vec::with_capacity(count + 1);
    if count == 0 {
        return best;
    }
    for (index, value) in values.iter().enumerate() {
        if best.len() == count && best.last().is_some_and(|(_, least)| value <= least) {
            continue;
        }
        let place = best.partition_point(|(_, other)| other >= value);
        best.insert(place, (index as u32, *value));
        best.truncate(count);
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::log_probability;

    #[test]
    fn the_token_and_its_alternatives_have_the_numbers_of_a_score() {
        let row = [0.5, 3.0, -1.0, 3.0, f32::NEG_INFINITY, 7.0];
        let found = TokenLogprobs::of_row(&row, 0, 3, 5).unwrap();
        let score = |id| log_probability(&row, id).unwrap();
        assert_eq!(found.logprob.to_bits(), score(0).to_bits());
        assert_eq!(found.top, [(1, score(1)), (3, score(3)), (0, score(0))], "column 5 is not an id");
        assert_eq!(TokenLogprobs::of_row(&row, 5, 0, 5).unwrap().top, []);
        assert_eq!(TokenLogprobs::of_row(&row, 1, 20, 6).unwrap().top.len(), 6);
        assert!(TokenLogprobs::of_row(&row, 6, 1, 6).is_err());
        assert!(TokenLogprobs::of_row(&[f32::NAN, 1.0], 1, 1, 2).is_err());
        assert!(TokenReports::Logprobs(21).validate().unwrap_err().to_string().contains("0 to 20"));
    }
}
