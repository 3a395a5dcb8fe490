//! One conversation on one slot.

use std::ops::ControlFlow;
use std::sync::Arc;

use super::generation::{Generation, OutputVocabulary, check_ids};
use super::request::{Completion, GenerationRequest};
use super::sampler::log_probability;
use super::stream::TextStream;
use crate::backend::{Chunk, Executor, Limits, NextToken, Rows, Step};
use crate::error::{Error, Result};
use crate::text::Tokenizer;

#[cfg(test)]
mod tests;

/// The only slot that a session uses.
const SLOT: usize = 0;

/// Runs one generation after another on one slot of an executor.
///
/// The slot's keys and values outlive a generation: only the part of the next prompt that differs from the ids already
/// there is computed, which affects speed but not the result. After an error the slot counts as empty; after a
/// cancellation it holds what was computed. Either way the next generation gives the result of a fresh session.
pub struct Session {
    executor: Box<dyn Executor>,
    vocabulary: OutputVocabulary,
    /// Ids whose keys and values are in the slot.
    cached: Vec<u32>,
}

impl Session {
    /// Creates a session over an executor that it owns. Without a tokenizer it works on ids only: texts stay empty, and
    /// stop strings are refused. With one, ids past its vocabulary, the model's padding, are never sampled.
    pub fn new(executor: Box<dyn Executor>, tokenizer: Option<Arc<Tokenizer>>) -> Session {
        let vocabulary = OutputVocabulary::new(executor.limits(), tokenizer);
        Session { executor, vocabulary, cached: Vec::new() }
    }

    /// The limits that the engine was built with.
    pub fn limits(&self) -> &Limits {
        self.executor.limits()
    }

    /// The tokenizer, if there is one.
    pub fn tokenizer(&self) -> Option<&Arc<Tokenizer>> {
        self.vocabulary.tokenizer()
    }

    /// Discards the contents of the slot, so that the next prompt is computed in full.
    pub fn reset(&mut self) {
        self.cached.clear();
    }

    /// Starts a generation, whose text comes from the returned iterator. It runs until a stop, `max_tokens` or the
    /// engine's limit:
    ///
    /// 1. find the prefix of the prompt that is in the slot;
    /// 2. prefill the rest, at most `max_step_tokens` at a time;
    /// 3. choose an id, show its text, and unless it ends the generation
    /// 4. decode it and go to 3.
    ///
    /// # Errors
    /// [`Error::Request`] or [`Error::PromptTooLong`]; nothing was computed then.
    pub fn stream(&mut self, request: GenerationRequest) -> Result<TextStream<'_>> {
        let mut generation = Generation::new(request, self.executor.limits(), &self.vocabulary)?;
        if !generation.is_finished() {
            let reused = generation.reusable(&self.cached);
            self.cached.truncate(reused);
            generation.start();
            generation.reuse(reused);
        }
        Ok(TextStream::new(self, generation))
    }

    /// Runs a generation to its end, or until `on_text` breaks. `on_text` is called after every step with the text that
    /// became certain in it, which is empty during prefill or while text is held back, so that `Break` can end a long
    /// prefill too. A generation ended this way returns what it has, with
    /// [`FinishReason::Cancelled`](super::FinishReason::Cancelled); after its last step it is finished, whatever
    /// `on_text` returns.
    ///
    /// # Errors
    /// As [`Session::stream`] and [`TextStream::step`].
    pub fn generate(
        &mut self,
        request: &GenerationRequest,
        on_text: &mut dyn FnMut(&str) -> ControlFlow<()>,
    ) -> Result<Completion> {
        let mut stream = self.stream(request.clone())?;
        while let Some(text) = stream.step()? {
            if on_text(text).is_break() {
                break;
            }
        }
        stream.finish()
    }

    /// Runs one step of an unfinished generation.
    pub(super) fn advance(&mut self, generation: &mut Generation, delta: &mut String) -> Result<()> {
        let advanced = match generation.last() {
            None => self.prefill(generation, delta),
            Some(token) => self.decode(token, generation, delta),
        };
        if advanced.is_err() {
            self.mend();
        }
        advanced
    }

    /// Empties the slot: keys and values that led to NaN, or that a failed step left behind, must be neither reused nor
    /// read past the end of the next sequence.
    fn mend(&mut self) {
        self.cached.clear();
        // If this fails, the executor has, and the next step says so.
        let _ = self.executor.mend_slot(SLOT);
    }

    /// Computes the last sampled id and chooses the next one.
    fn decode(&mut self, token: u32, generation: &mut Generation, delta: &mut String) -> Result<()> {
        let next = NextToken { slot: SLOT, past_tokens: self.cached.len(), token };
        let step = Step::decode(self.executor.limits(), &[next])?;
        let mut logits = self.executor.forward(&step)?;
        self.cached.push(token);
        generation.accept(&mut logits, 0, delta)?
    }

    /// Computes the next chunk of the prompt; the last chunk gives the first id.
    fn prefill(&mut self, generation: &mut Generation, delta: &mut String) -> Result<()> {
        let past_tokens = self.cached.len();
        let limits = self.executor.limits();
        let (tokens, rows) = generation.next_chunk(past_tokens, limits.max_step_tokens, limits.max_logits_rows);
        let tokens = tokens.to_vec();
        let step = Step::prefill(limits, &[Chunk { slot: SLOT, past_tokens, tokens: &tokens, rows }])?;
        let mut logits = self.executor.forward(&step)?;
        self.cached.extend_from_slice(&tokens);
        generation.accept_chunk(&mut logits, 0, (past_tokens, tokens.len()), delta)?
    }

    /// Scores a text: the log-probability (natural, softmax over all columns) of each id except the first, given the
    /// ids before it; `[ids.len() - 1]`. `on_row` receives every row of logits, `[vocab_size]`, and the index of the id
    /// that it follows. All ids are computed, whatever the slot holds; afterwards it holds `ids`.
    ///
    /// # Errors
    /// [`Error::Request`] if there are no ids, more than a sequence holds, or one out of range; [`Error::Numerics`]
    /// with the index of a NaN or infinite logit; whatever the executor reports.
    pub fn score(&mut self, ids: &[u32], on_row: &mut dyn FnMut(usize, &[f32])) -> Result<Vec<f64>> {
        let limits = self.executor.limits().clone();
        if ids.is_empty() || ids.len() > limits.max_sequence_tokens {
            return Err(Error::Request(format!(
                "{} ids to score; expected 1 to {}",
                ids.len(),
                limits.max_sequence_tokens
            )));
        }
        check_ids(ids, &limits)?;
        self.cached.clear();
        let scores = self.score_checked(ids, &limits, on_row);
        match scores {
            Ok(_) => self.cached.extend_from_slice(ids),
            Err(_) => self.mend(),
        }
        scores
    }

    fn score_checked(
        &mut self,
        ids: &[u32],
        limits: &Limits,
        on_row: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<Vec<f64>> {
        let chunk_tokens = limits.max_step_tokens.min(limits.max_logits_rows).max(1);
        let mut scores = Vec::with_capacity(ids.len() - 1);
        for (index, tokens) in ids.chunks(chunk_tokens).enumerate() {
            let past_tokens = index * chunk_tokens;
            let step = Step::prefill(limits, &[Chunk { slot: SLOT, past_tokens, tokens, rows: Rows::All }])?;
            let mut logits = self.executor.forward(&step)?;
            for offset in 0..tokens.len() {
                let row = logits.row(offset)?;
                on_row(past_tokens + offset, row);
                if let Some(next) = ids.get(past_tokens + offset + 1) {
                    scores.push(log_probability(row, *next)?);
                }
            }
        }
        Ok(scores)
    }
}
