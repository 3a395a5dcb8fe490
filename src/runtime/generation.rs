//! One generation, from its first row of logits to its completion: the only code that chooses ids, turns them into text
//! and decides when to stop.

use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use super::constraint::{ActiveConstraint, Grammar};
use super::prefix_cache::Salt;
use super::report::{TokenLogprobs, TokenReport, TokenReports};
use super::request::{Completion, FinishReason, GenerationRequest, StopMatch, Timings};
use super::sampler::{Sampler, check_row};
use super::slots::reusable;
use super::stop::StopFilter;
use crate::backend::{Limits, Logits, Rows};
use crate::error::{Error, Result};
use crate::text::{StreamDecoder, Tokenizer};

/// Most stop ids of a request; they are compared with every token.
const MAX_STOP_IDS: usize = 256;

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
    stop: Option<StopMatch>,
    /// What to report of each token, and what was.
    wanted: TokenReports,
    reports: Vec<TokenReport>,
    prompt_wanted: TokenReports,
    prompt_reports: Vec<TokenReport>,
    grammar: Option<Grammar>,
    constraint: Option<ActiveConstraint>,
    cache_salt: Salt,
    deadline: Option<Instant>,
    reused_tokens: usize,
    created: Instant,
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
        let GenerationRequest { prompt, sampling, max_tokens, stop_strings, stop_ids, trim, .. } = request;
        let GenerationRequest { reports, prompt_reports, grammar, cache_salt, deadline, .. } = request;
        reports.validate().and_then(|()| prompt_reports.validate())?;
        if stop_ids.len() > MAX_STOP_IDS {
            return Err(Error::Request(format!("{} stop ids; expected at most {MAX_STOP_IDS}", stop_ids.len())));
        }
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
        // The prompt's ids are known at once; their log-probabilities come with its steps.
        let first = match prompt_reports {
            TokenReports::None => 0,
            TokenReports::Ids => prompt.len(),
            TokenReports::Logprobs(_) => 1,
        };
        let known = prompt.iter().take(first).map(|id| TokenReport { id: *id, logprobs: None }).collect();
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
            finish: (budget == 0 && prompt_reports.top().is_none()).then_some(FinishReason::Length),
            stop: None,
            wanted: reports,
            reports: Vec::new(),
            prompt_wanted: prompt_reports,
            prompt_reports: known,
            grammar,
            constraint: None,
            cache_salt: cache_salt.map(Arc::from),
            deadline,
            reused_tokens: 0,
            created: Instant::now(),
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

    /// Starts the clock.
    pub(super) fn start(&mut self) {
        self.started = Some(Instant::now());
    }

    /// Records that `tokens` of the prompt were in the KV cache before the first step.
    pub(super) fn reuse(&mut self, tokens: usize) {
        self.reused_tokens = tokens;
    }

    /// Tokens of the prompt that need not be computed where a slot holds `cached`.
    pub(super) fn reusable(&self, cached: &[u32]) -> usize {
        // Log-probabilities of the prompt come from its steps.
        if self.prompt_wanted.top().is_some() { 0 } else { reusable(cached, &self.prompt) }
    }

    /// The salt that whose keys and values it reuses must have.
    pub(super) fn cache_salt(&self) -> &Salt {
        &self.cache_salt
    }

    /// The prompt's ids.
    pub(super) fn prompt(&self) -> &[u32] {
        &self.prompt
    }

    /// When to give up.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// The next tokens of the prompt to compute, after `past_tokens` of it, and the rows of logits to return; empty where
    /// `max_tokens` or `max_rows` leave no room.
    pub(super) fn next_chunk(&self, past_tokens: usize, max_tokens: usize, max_rows: usize) -> (&[u32], Rows) {
        let rest = self.prompt.get(past_tokens..).unwrap_or_default();
        if self.prompt_wanted.top().is_some() {
            return (rest.get(..max_tokens.min(max_rows)).unwrap_or(rest), Rows::All);
        }
        match rest.get(..max_tokens) {
            Some(tokens) if tokens.len() < rest.len() => (tokens, Rows::None),
            _ if max_rows > 0 => (rest, Rows::Last),
            _ => (&[], Rows::None),
        }
    }

    /// Takes the rows of logits, from `row` on, of a chunk of the prompt that [`Generation::next_chunk`] gave after
    /// `past_tokens`. After the last chunk, chooses the first id. Errors as in [`Generation::accept`].
    pub(super) fn accept_chunk(
        &mut self,
        logits: &mut Logits<'_>,
        row: usize,
        (past_tokens, tokens): (usize, usize),
        delta: &mut String,
    ) -> Result<Result<()>> {
        let is_last = past_tokens + tokens == self.prompt.len();
        let Some(top) = self.prompt_wanted.top() else {
            return if is_last { self.accept(logits, row, delta) } else { Ok(Ok(())) };
        };
        for index in 0..tokens {
            let Some(id) = self.prompt.get(past_tokens + index + 1).copied() else { break };
            match TokenLogprobs::of_row(logits.row(row + index)?, id, top, self.sampled_ids) {
                Ok(logprobs) => self.prompt_reports.push(TokenReport { id, logprobs: Some(logprobs) }),
                Err(error) => return Ok(Err(error)),
            }
        }
        match is_last {
            true if self.budget == 0 => {
                self.finish = Some(FinishReason::Length);
                Ok(Ok(()))
            }
            true => self.accept(logits, row + tokens - 1, delta),
            false => Ok(Ok(())),
        }
    }

    /// Chooses an id from row `row` of a step's logits and appends to `delta` the text that it makes certain. The row
    /// is fetched only if its largest logits do not decide the choice.
    ///
    /// # Errors
    /// The outer error is the executor's, for a row that is missing or cannot be fetched; the inner error concerns this
    /// generation only.
    pub(super) fn accept(&mut self, logits: &mut Logits<'_>, row: usize, delta: &mut String) -> Result<Result<()>> {
        let id = if self.choose.is_some() {
            self.chosen(logits.row(row)?)
        } else {
            match self.sampled(logits, row)? {
                Ok(id) => Ok(id),
                Err(error) => return Ok(Err(error)),
            }
        };
        let id = match id {
            Ok(id) => id,
            Err(error) => return Ok(Err(error)),
        };
        let logprobs = match self.wanted.top() {
            Some(top) => match TokenLogprobs::of_row(logits.row(row)?, id, top, self.sampled_ids) {
                Ok(logprobs) => Some(logprobs),
                Err(error) => return Ok(Err(error)),
            },
            None => None,
        };
        if self.wanted != TokenReports::None {
            self.reports.push(TokenReport { id, logprobs });
        }
        Ok(self.push(id, delta))
    }

    /// Samples an id. Errors as in [`Generation::accept`].
    fn sampled(&mut self, logits: &mut Logits<'_>, row: usize) -> Result<Result<u32>> {
        if let (Some(grammar), None) = (&self.grammar, &self.constraint) {
            match grammar.start() {
                Ok(constraint) => self.constraint = Some(ActiveConstraint::new(constraint, self.sampled_ids)),
                Err(error) => return Ok(Err(error)),
            }
        }
        let allowed = match self.constraint.as_mut().map(ActiveConstraint::allowed).transpose() {
            Ok(allowed) => allowed,
            Err(error) => return Ok(Err(error)),
        };
        let id = match logits.top(row).map(|top| self.sampler.sample_top_allowed(top, allowed)) {
            None | Some(Ok(None)) => self.sampler.sample_allowed(logits.row(row)?, allowed),
            Some(Ok(Some(id))) => Ok(id),
            Some(Err(error)) => Err(error),
        };
        Ok(id.and_then(|id| {
            self.constraint.as_mut().map_or(Ok(()), |constraint| constraint.push(id))?;
            Ok(id)
        }))
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
            self.stop = Some(StopMatch::Id(id));
            self.end(FinishReason::Stop, delta);
            return Ok(());
        }
        let mut shown = String::new();
        if let Some(decoder) = &mut self.decoder {
            let mut decoded = String::new();
            decoder.push(id, &mut decoded)?;
            if self.filter.push(&decoded, &mut shown) {
                self.finish = Some(FinishReason::Stop);
                self.stop = self.filter.matched().map(|text| StopMatch::Text(text.to_owned()));
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
            self.stop = self.filter.matched().map(|text| StopMatch::Text(text.to_owned()));
        }
        self.filter.flush(&mut shown);
        self.show(&shown, delta);
    }

    fn show(&mut self, shown: &str, delta: &mut String) {
        self.text.push_str(shown);
        delta.push_str(shown);
    }

    /// The ids sampled so far.
    pub(super) fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// The reports so far of the answer's tokens, from index `first` on.
    pub(super) fn reports_from(&self, first: usize) -> &[TokenReport] {
        self.reports.get(first..).unwrap_or_default()
    }

    /// The reports of the prompt's tokens, once there is one for each.
    pub(super) fn prompt_reports(&self) -> Option<&[TokenReport]> {
        let is_complete = self.prompt_wanted != TokenReports::None && self.prompt_reports.len() == self.prompt.len();
        is_complete.then_some(&self.prompt_reports[..])
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
            stop: self.stop,
            prompt_tokens,
            reused_tokens: self.reused_tokens,
            completion_tokens: self.ids.len(),
            seed: self.sampler.seed(),
            timings: Timings {
                queue_seconds: seconds(Some(self.created), self.started),
                prefill_seconds: seconds(self.started, self.first_id),
                decode_seconds: seconds(self.first_id, self.last_id),
                prefill_tokens: if has_ids { prompt_tokens - self.reused_tokens.min(prompt_tokens) } else { 0 },
                decode_tokens: self.ids.len().saturating_sub(1),
            },
            token_ids: self.ids,
            reports: self.reports,
            prompt_reports: self.prompt_reports,
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
