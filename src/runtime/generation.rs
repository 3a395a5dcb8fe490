//! One generation, from its first row of logits to its completion: the only code that chooses ids, turns them into text
//! and decides when to stop.

use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use super::request::{Completion, FinishReason, GenerationRequest, Timings};
use super::sampler::{Sampler, check_row};
use super::stop::StopFilter;
use crate::backend::{Limits, Logits};
use crate::error::{Error, Result};
use crate::text::{StreamDecoder, Tokenizer};

/// State shared by all generations of one engine.
#[derive(Debug, Clone)]
pub(super) struct OutputVocabulary {
    tokenizer: Option<Arc<Tokenizer>>,
    /// Number of ids that can be sampled: the model's, without padding past the tokenizer's vocabulary.
    sampled_ids: usize,
}

impl OutputVocabulary {
    pub(super) fn new(limits: &Limits, tokenizer: Option<Arc<Tokenizer>>) -> OutputVocabulary {
        let known = tokenizer.as_ref().map_or(limits.vocab_size, |tokenizer| tokenizer.vocab_size());
        OutputVocabulary { tokenizer, sampled_ids: known.min(limits.vocab_size) }
    }

    pub(super) fn tokenizer(&self) -> Option<&Arc<Tokenizer>> {
        self.tokenizer.as_ref()
    }
}

/// A caller-supplied choice of the next id.
pub(super) struct ChooseToken(Box<ChooseFn>);

type ChooseFn = dyn FnMut(&[f32], &[u32]) -> Result<u32> + Send;

impl ChooseToken {
    pub(super) fn new(choose: impl FnMut(&[f32], &[u32]) -> Result<u32> + Send + 'static) -> ChooseToken {
        ChooseToken(Box::new(choose))
    }
}

impl fmt::Debug for ChooseToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ChooseToken")
    }
}

/// A validated request and its progress.
#[derive(Debug)]
pub(super) struct Generation {
    prompt: Vec<u32>,
    stop_ids: Vec<u32>,
    /// Limit on ids to sample, capped by the room in the sequence.
    budget: usize,
    sampler: Sampler,
    /// Replaces the sampler if set.
    choose: Option<ChooseToken>,
    /// Ids below this can be chosen.
    sampled_ids: usize,
    decoder: Option<StreamDecoder>,
    filter: StopFilter,
    ids: Vec<u32>,
    text: String,
    finish: Option<FinishReason>,
    reused_tokens: usize,
    started: Option<Instant>,
    first_id: Option<Instant>,
    last_id: Option<Instant>,
}

impl Generation {
    /// Validates a request against the engine's limits. A request that passes is never refused later.
    pub(super) fn new(
        request: GenerationRequest,
        limits: &Limits,
        vocabulary: &OutputVocabulary,
    ) -> Result<Generation> {
        if limits.slots == 0 || limits.max_step_tokens == 0 || limits.max_logits_rows == 0 {
            return Err(Error::Step(format!("an engine with these limits cannot run anything: {limits:?}")));
        }
        let GenerationRequest { prompt, sampling, max_tokens, stop_strings, stop_ids, trim } = request;
        let room = check_prompt(&prompt, limits)?;
        if let Some(id) = stop_ids.iter().find(|id| **id as usize >= limits.vocab_size) {
            return Err(Error::Request(format!("stop id {id}; expected 0 to {}", limits.vocab_size.saturating_sub(1))));
        }
        let decoder = vocabulary.tokenizer.clone().map(StreamDecoder::continuing);
        if decoder.is_none() && !stop_strings.is_empty() {
            return Err(Error::Request(format!(
                "{} stop strings, but there is no tokenizer to find them with; use stop ids",
                stop_strings.len()
            )));
        }
        let budget = max_tokens.min(room);
        Ok(Generation {
            sampler: Sampler::new(&sampling, vocabulary.sampled_ids, &stop_ids, &prompt)?,
            choose: None,
            sampled_ids: vocabulary.sampled_ids,
            decoder,
            filter: StopFilter::new(&stop_strings, trim)?,
            prompt,
            stop_ids,
            budget,
            ids: Vec::new(),
            text: String::new(),
            finish: (budget == 0).then_some(FinishReason::Length),
            reused_tokens: 0,
            started: None,
            first_id: None,
            last_id: None,
        })
    }

    /// Lets the caller choose ids from here on.
    pub(super) fn choose_by(&mut self, choose: ChooseToken) {
        self.choose = Some(choose);
    }

    /// Tokens that the sequence has in the KV cache at most: the last one of the answer is never computed.
    pub(super) fn most_tokens(&self) -> usize {
        self.prompt.len().saturating_add(self.budget.saturating_sub(1))
    }

    /// Starts the clock; `reused_tokens` of the prompt are already in the KV cache.
    pub(super) fn start(&mut self, reused_tokens: usize) {
        self.reused_tokens = reused_tokens;
        self.started = Some(Instant::now());
    }

    /// Chooses an id from row `row` of a step's logits and appends to `delta` the text that it makes certain. The row
    /// is fetched only if its largest logits do not decide the choice.
    ///
    /// # Errors
    /// The outer error is the executor's, for a row that is missing or cannot be fetched; the inner error concerns this
    /// generation only.
    pub(super) fn accept(&mut self, logits: &mut Logits<'_>, row: usize, delta: &mut String) -> Result<Result<()>> {
        if self.choose.is_some() {
            let chosen = self.chosen(logits.row(row)?);
            return Ok(chosen.and_then(|id| self.push(id, delta)));
        }
        let id = match logits.top(row).map(|top| self.sampler.sample_top(top)) {
            None | Some(Ok(None)) => self.sampler.sample(logits.row(row)?),
            Some(Ok(Some(id))) => Ok(id),
            Some(Err(error)) => Err(error),
        };
        Ok(id.and_then(|id| self.push(id, delta)))
    }

    /// Asks the caller for an id.
    fn chosen(&mut self, row: &[f32]) -> Result<u32> {
        check_row(row)?;
        let allowed = row.get(..self.sampled_ids).unwrap_or(row);
        let Some(ChooseToken(choose)) = &mut self.choose else {
            return Err(Error::Request("no choice of tokens was given".into()));
        };
        let id = choose(allowed, &self.ids)?;
        if id as usize >= allowed.len() {
            let most = allowed.len().saturating_sub(1);
            return Err(Error::Request(format!("id {id} was chosen as the next token; expected 0 to {most}")));
        }
        Ok(id)
    }

    /// Appends `id` to the output.
    fn push(&mut self, id: u32, delta: &mut String) -> Result<()> {
        let now = Instant::now();
        self.first_id.get_or_insert(now);
        self.last_id = Some(now);
        self.ids.push(id);
        if self.stop_ids.contains(&id) {
            self.end(FinishReason::Stop, delta);
            return Ok(());
        }
        let mut shown = String::new();
        if let Some(decoder) = &mut self.decoder {
            let mut decoded = String::new();
            decoder.push(id, &mut decoded)?;
            if self.filter.push(&decoded, &mut shown) {
                self.finish = Some(FinishReason::Stop);
            }
        }
        self.show(&shown, delta);
        if self.finish.is_none() && self.ids.len() >= self.budget {
            self.end(FinishReason::Length, delta);
        }
        Ok(())
    }

    /// Ends the text: text that was held back is shown, unless it completes a stop string.
    fn end(&mut self, reason: FinishReason, delta: &mut String) {
        // Bytes that the decoder held back may complete a stop string, which then is the reason instead.
        self.finish = Some(reason);
        let (mut decoded, mut shown) = (String::new(), String::new());
        if let Some(decoder) = &mut self.decoder {
            decoder.flush(&mut decoded);
        }
        if self.filter.push(&decoded, &mut shown) {
            self.finish = Some(FinishReason::Stop);
        }
        self.filter.flush(&mut shown);
        self.show(&shown, delta);
    }

    fn show(&mut self, shown: &str, delta: &mut String) {
        self.text.push_str(shown);
        delta.push_str(shown);
    }

    pub(super) fn prompt(&self) -> &[u32] {
        &self.prompt
    }

    /// The ids sampled so far.
    pub(super) fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// The id sampled last.
    pub(super) fn last(&self) -> Option<u32> {
        self.ids.last().copied()
    }

    pub(super) fn is_finished(&self) -> bool {
        self.finish.is_some()
    }

    /// The completion so far; marked as cancelled if the generation has not ended.
    pub(super) fn complete(self) -> Completion {
        let seconds = |from: Option<Instant>, to: Option<Instant>| match (from, to) {
            (Some(from), Some(to)) => to.saturating_duration_since(from).as_secs_f64(),
            _ => 0.0,
        };
        let prompt_tokens = self.prompt.len();
        let has_ids = !self.ids.is_empty();
        Completion {
            text: self.text,
            finish_reason: self.finish.unwrap_or(FinishReason::Cancelled),
            prompt_tokens,
            reused_tokens: self.reused_tokens,
            completion_tokens: self.ids.len(),
            seed: self.sampler.seed(),
            timings: Timings {
                prefill_seconds: seconds(self.started, self.first_id),
                decode_seconds: seconds(self.first_id, self.last_id),
                prefill_tokens: if has_ids { prompt_tokens - self.reused_tokens.min(prompt_tokens) } else { 0 },
                decode_tokens: self.ids.len().saturating_sub(1),
            },
            token_ids: self.ids,
        }
    }
}

/// Returns the room left for an answer in tokens, at least 1.
fn check_prompt(prompt: &[u32], limits: &Limits) -> Result<usize> {
    if prompt.is_empty() {
        return Err(Error::Request("the prompt is empty; it needs at least one token".into()));
    }
    let room = limits.max_sequence_tokens.saturating_sub(prompt.len());
    if room == 0 {
        return Err(Error::PromptTooLong {
            prompt_tokens: prompt.len(),
            max_sequence_tokens: limits.max_sequence_tokens,
        });
    }
    check_ids(prompt, limits)?;
    Ok(room)
}

/// Refuses ids that the model has no embedding for.
pub(super) fn check_ids(ids: &[u32], limits: &Limits) -> Result<()> {
    match ids.iter().position(|id| *id as usize >= limits.vocab_size) {
        Some(index) => Err(Error::Request(format!(
            "token {index} of the prompt has id {}; expected 0 to {}",
            ids.get(index).copied().unwrap_or_default(),
            limits.vocab_size.saturating_sub(1)
        ))),
        None => Ok(()),
    }
}
