//! One conversation on one slot.

use std::ops::ControlFlow;
use std::sync::Arc;

use super::generation::{Generation, Vocabulary, check_ids};
use super::request::{Completion, GenerationRequest};
use super::sampler::log_probability;
use super::slots::reusable;
use super::stream::TextStream;
use crate::backend::{Chunk, Executor, Limits, NextToken, Rows, Step};
use crate::error::{Error, Result};
use crate::text::Tokenizer;

#[cfg(test)]
mod tests;

/// The one slot a session uses.
const SLOT: usize = 0;

/// Runs generations one after the other on one slot of an executor.
///
/// The slot's keys and values outlive a generation: of the next prompt only what differs from the ids already there
/// is computed, which changes the time it takes and nothing else. After an error the slot counts as empty, after a
/// cancel it holds what was computed; either way the next generation gives what a fresh session would.
pub struct Session {
    executor: Box<dyn Executor>,
    vocabulary: Vocabulary,
    /// Ids whose keys and values are in the slot.
    cached: Vec<u32>,
}

impl Session {
    /// A session over an executor it owns. Without a tokenizer there are ids only: texts stay empty, and stop strings
    /// are refused. With one, ids past its vocabulary, the model's padding, are never sampled.
    pub fn new(executor: Box<dyn Executor>, tokenizer: Option<Arc<Tokenizer>>) -> Session {
        let vocabulary = Vocabulary::new(executor.limits(), tokenizer);
        Session { executor, vocabulary, cached: Vec::new() }
    }

    /// What the engine was built for.
    pub fn limits(&self) -> &Limits {
        self.executor.limits()
    }

    /// The tokenizer, if there is one.
    pub fn tokenizer(&self) -> Option<&Arc<Tokenizer>> {
        self.vocabulary.tokenizer()
    }

    /// Forgets what the slot holds: the next prompt is computed whole.
    pub fn reset(&mut self) {
        self.cached.clear();
    }

    /// Starts a generation, whose text comes from the returned iterator. It runs until a stop, `max_tokens` or the
    /// engine's limit:
    ///
    /// 1. find how much of the prompt is in the slot;
    /// 2. prefill the rest, at most `max_step_tokens` at a time;
    /// 3. choose an id, show its text, and unless it ends the generation
    /// 4. decode it and go to 3.
    ///
    /// # Errors
    /// [`Error::Request`] or [`Error::PromptTooLong`]; nothing was computed then.
    pub fn stream(&mut self, request: GenerationRequest) -> Result<TextStream<'_>> {
        let mut generation = Generation::new(request, self.executor.limits(), &self.vocabulary)?;
        if !generation.is_finished() {
            let reused = reusable(&self.cached, generation.prompt());
            self.cached.truncate(reused);
            generation.start(reused);
        }
        Ok(TextStream::new(self, generation))
    }

    /// Runs a generation to its end, or until `on_text` breaks it. `on_text` is called after every step with the text
    /// that became certain in it, empty while a prompt is prefilled or text is held back, so that `Break` ends a long
    /// prefill too. A generation ended that way returns what it has, with
    /// [`FinishReason::Cancelled`](super::FinishReason::Cancelled); one whose last step was done is finished, whatever
    /// `on_text` says.
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

    /// Runs one step of a generation that is not finished.
    pub(super) fn advance(&mut self, generation: &mut Generation, delta: &mut String) -> Result<()> {
        let advanced = match generation.last() {
            None => self.prefill(generation, delta),
            Some(token) => self.decode(token, generation, delta),
        };
        if advanced.is_err() {
            // Keys and values that led to NaN, or that a failed step left behind, are not to be reused.
            self.cached.clear();
        }
        advanced
    }

    /// Computes the id sampled last; chooses the next.
    fn decode(&mut self, token: u32, generation: &mut Generation, delta: &mut String) -> Result<()> {
        let next = NextToken { slot: SLOT, past_tokens: self.cached.len(), token };
        let step = Step::decode(self.executor.limits(), &[next])?;
        let mut logits = self.executor.forward(&step)?;
        self.cached.push(token);
        generation.accept(&mut logits, 0, delta)?
    }

    /// Computes the next chunk of the prompt; the last one gives the first id.
    fn prefill(&mut self, generation: &mut Generation, delta: &mut String) -> Result<()> {
        let past_tokens = self.cached.len();
        let limits = self.executor.limits();
        let rest = generation.prompt().get(past_tokens..).unwrap_or_default();
        let tokens = rest.get(..limits.max_step_tokens).unwrap_or(rest);
        let is_last = tokens.len() == rest.len();
        let rows = if is_last { Rows::Last } else { Rows::None };
        let step = Step::prefill(limits, &[Chunk { slot: SLOT, past_tokens, tokens, rows }])?;
        let mut logits = self.executor.forward(&step)?;
        self.cached.extend_from_slice(tokens);
        if is_last {
            generation.accept(&mut logits, 0, delta)??;
        }
        Ok(())
    }

    /// Scores a text: the log-probability (natural, softmax over all columns) of each id but the first, given the
    /// ids before it; `[ids.len() - 1]`. `on_row` sees every row of logits, `[vocab_size]`, with the index of the id
    /// it follows. All of it is computed, whatever the slot holds; afterwards the slot holds `ids`.
    ///
    /// # Errors
    /// [`Error::Request`] for no ids, more than a sequence holds, or an id out of range; [`Error::Numerics`] naming
    /// the index of a logit that is NaN or infinite; whatever the executor reports.
    pub fn score(&mut self, ids: &[u32], on_row: &mut dyn FnMut(usize, &[f32])) -> Result<Vec<f64>> {
        let limits = self.executor.limits().clone();
        if ids.is_empty() || ids.len() > limits.max_sequence_tokens {
            return Err(Error::Request(format!(
                "{} ids to score; accepted are 1 to {}",
                ids.len(),
                limits.max_sequence_tokens
            )));
        }
        check_ids(ids, &limits)?;
        self.cached.clear();
        let chunk_tokens = limits.max_step_tokens.min(limits.max_logits_rows).max(1);
        let mut scores = Vec::with_capacity(ids.len() - 1);
        for (index, tokens) in ids.chunks(chunk_tokens).enumerate() {
            let past_tokens = index * chunk_tokens;
            let step = Step::prefill(&limits, &[Chunk { slot: SLOT, past_tokens, tokens, rows: Rows::All }])?;
            let mut logits = self.executor.forward(&step)?;
            for offset in 0..tokens.len() {
                let row = logits.row(offset)?;
                on_row(past_tokens + offset, row);
                if let Some(next) = ids.get(past_tokens + offset + 1) {
                    scores.push(log_probability(row, *next)?);
                }
            }
        }
        self.cached.extend_from_slice(ids);
        Ok(scores)
    }
}
