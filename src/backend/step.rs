//! The input of an executor: one step over a set of slots, checked against the engine's limits before any backend sees
//! it.

use crate::engine::Limits;
use crate::error::{Error, Result};

/// Rows of a chunk's logits to return.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rows {
    /// None: more of the prompt follows.
    None,
    /// The last token's only, which is all that sampling needs.
    Last,
    /// Every token's, for scoring.
    All,
}

/// New tokens of one sequence in a prefill step.
#[derive(Debug, Clone, Copy)]
pub struct Chunk<'a> {
    /// Slot of the sequence in the KV cache.
    pub slot: usize,
    /// Tokens of this sequence already in the cache, which is also the position of the chunk's first token.
    pub past_tokens: usize,
    /// The new tokens, at least one.
    pub tokens: &'a [u32],
    /// Logits to return.
    pub rows: Rows,
}

/// One sequence's token in a decode step; its logits are always returned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NextToken {
    /// Slot of the sequence in the KV cache.
    pub slot: usize,
    /// Tokens of this sequence already in the cache, which is also this token's position.
    pub past_tokens: usize,
    /// The token.
    pub token: u32,
}

/// Location of one sequence's tokens in a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// Slot of the sequence.
    pub slot: usize,
    /// Position of the first token in its sequence.
    pub past_tokens: usize,
    /// Index of its first token in [`Step::tokens`].
    pub first: usize,
    /// Number of tokens, at least 1.
    pub len: usize,
}

/// One forward step within the limits: distinct slots in range, lengths within capacity, token ids within the
/// vocabulary.
#[derive(Debug, Clone)]
pub struct Step {
    tokens: Vec<u32>,
    spans: Vec<Span>,
    logits_rows: Vec<u32>,
}

impl Step {
    /// Checks that the step keeps to the limits of the executor that is to run it, which may not be those it was made for.
    ///
    /// # Errors
    /// [`Error::Step`] if it does not.
    pub(crate) fn check_fits(&self, limits: &Limits) -> Result<()> {
        let of_span = |span: &Span| {
            let end = span.past_tokens.checked_add(span.len);
            span.slot < limits.slots && end.is_some_and(|end| end <= limits.max_sequence_tokens)
        };
        let fits = self.tokens.len() <= limits.max_step_tokens
            && self.logits_rows.len() <= limits.max_logits_rows
            && self.tokens.iter().all(|token| (*token as usize) < limits.vocab_size)
            && self.spans.iter().all(of_span);
        if fits { Ok(()) } else { Err(Error::Step("the step was made for another engine's limits".into())) }
    }

    /// Creates a step that adds prompt tokens of one or more sequences. Rows of logits are returned in the order of the
    /// chunks.
    ///
    /// # Errors
    /// [`Error::Step`] with the number and its limit if a chunk is empty, a slot repeats or is out of range, a token id
    /// is outside the vocabulary, or tokens, rows or a sequence exceed the limits.
    pub fn prefill(limits: &Limits, chunks: &[Chunk<'_>]) -> Result<Step> {
        let total = chunks.iter().map(|c| c.tokens.len()).sum();
        let mut step = Step {
            tokens: Vec::with_capacity(total),
            spans: Vec::with_capacity(chunks.len()),
            logits_rows: Vec::new(),
        };
        for chunk in chunks {
            step.push(limits, chunk.slot, chunk.past_tokens, chunk.tokens)?;
            let end = step.tokens.len();
            match chunk.rows {
                Rows::None => {}
                Rows::Last => step.logits_rows.push(end as u32 - 1),
                Rows::All => step.logits_rows.extend((end - chunk.tokens.len()) as u32..end as u32),
            }
        }
        step.check_totals(limits)
    }

    /// Creates a step that adds one token to each of several sequences and returns one row of logits for each, in
    /// order.
    ///
    /// # Errors
    /// As [`Step::prefill`].
    pub fn decode(limits: &Limits, next: &[NextToken]) -> Result<Step> {
        let mut step = Step {
            tokens: Vec::with_capacity(next.len()),
            spans: Vec::with_capacity(next.len()),
            logits_rows: (0..next.len() as u32).collect(),
        };
        for n in next {
            step.push(limits, n.slot, n.past_tokens, &[n.token])?;
        }
        step.check_totals(limits)
    }

    fn push(&mut self, limits: &Limits, slot: usize, past_tokens: usize, tokens: &[u32]) -> Result<()> {
        if slot >= limits.slots {
            return Err(Error::Step(format!("slot {slot}, but the engine has {} slots", limits.slots)));
        }
        if self.spans.iter().any(|s| s.slot == slot) {
            return Err(Error::Step(format!("slot {slot} appears twice in one step")));
        }
        if tokens.is_empty() {
            return Err(Error::Step(format!("slot {slot} adds no tokens; a chunk has at least one")));
        }
        let end = past_tokens.saturating_add(tokens.len());
        if end > limits.max_sequence_tokens {
            return Err(Error::Step(format!(
                "slot {slot} would hold {end} tokens, but a sequence holds at most {}",
                limits.max_sequence_tokens
            )));
        }
        if let Some(token) = tokens.iter().find(|t| **t as usize >= limits.vocab_size) {
            return Err(Error::Step(format!(
                "token id {token} in slot {slot}, but the vocabulary has ids 0 to {}",
                limits.vocab_size.saturating_sub(1)
            )));
        }
        self.spans.push(Span { slot, past_tokens, first: self.tokens.len(), len: tokens.len() });
        self.tokens.extend_from_slice(tokens);
        Ok(())
    }

    fn check_totals(self, limits: &Limits) -> Result<Step> {
        if self.tokens.is_empty() {
            return Err(Error::Step("no tokens".into()));
        }
        if self.tokens.len() > limits.max_step_tokens {
            return Err(Error::Step(format!(
                "{} new tokens, but one step takes at most {}",
                self.tokens.len(),
                limits.max_step_tokens
            )));
        }
        if self.logits_rows.len() > limits.max_logits_rows {
            return Err(Error::Step(format!(
                "{} rows of logits, but one step returns at most {}",
                self.logits_rows.len(),
                limits.max_logits_rows
            )));
        }
        Ok(self)
    }

    /// The new tokens of all sequences, span after span.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// The sequences of the step, in order; slots are distinct.
    pub fn spans(&self) -> &[Span] {
        &self.spans
    }

    /// Indices into [`Step::tokens`] whose logits are requested, ascending.
    pub fn logits_rows(&self) -> &[u32] {
        &self.logits_rows
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits() -> Limits {
        Limits { slots: 2, max_sequence_tokens: 8, max_step_tokens: 6, max_logits_rows: 4, vocab_size: 10 }
    }

    fn refused(result: Result<Step>) -> String {
        result.expect_err("must be refused").to_string()
    }

    #[test]
    fn rows_follow_the_chunks() {
        let chunks = [
            Chunk { slot: 1, past_tokens: 0, tokens: &[1, 2], rows: Rows::Last },
            Chunk { slot: 0, past_tokens: 3, tokens: &[4, 5], rows: Rows::All },
        ];
        let step = Step::prefill(&limits(), &chunks).unwrap();
        assert_eq!(step.tokens(), [1, 2, 4, 5]);
        assert_eq!(step.logits_rows(), [1, 2, 3]);
        assert_eq!(step.spans()[1], Span { slot: 0, past_tokens: 3, first: 2, len: 2 });
    }

    #[test]
    fn every_limit_is_refused_with_its_number() {
        let chunk = |slot, past_tokens, tokens, rows| Chunk { slot, past_tokens, tokens, rows };
        let l = limits();
        assert!(refused(Step::prefill(&l, &[])).contains("no tokens"));
        assert!(refused(Step::prefill(&l, &[chunk(2, 0, &[1], Rows::Last)])).contains("2 slots"));
        assert!(refused(Step::prefill(&l, &[chunk(0, 0, &[], Rows::Last)])).contains("at least one"));
        assert!(refused(Step::prefill(&l, &[chunk(0, 7, &[1, 1], Rows::Last)])).contains("9 tokens"));
        assert!(refused(Step::prefill(&l, &[chunk(0, usize::MAX, &[1, 1], Rows::Last)])).contains("at most 8"));
        assert!(refused(Step::prefill(&l, &[chunk(0, 0, &[10], Rows::Last)])).contains("token id 10"));
        assert!(refused(Step::prefill(&l, &[chunk(0, 0, &[1; 7], Rows::Last)])).contains("at most 6"));
        assert!(refused(Step::prefill(&l, &[chunk(0, 0, &[1; 5], Rows::All)])).contains("5 rows"));
        let twice = [NextToken { slot: 0, past_tokens: 1, token: 1 }; 2];
        assert!(refused(Step::decode(&l, &twice)).contains("twice"));
    }
}
