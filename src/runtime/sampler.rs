//! The sampler: from one row of logits to one id, with the settings as defined by TensorRT-LLM and NeMo.

use std::cmp::Ordering;
use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};

use rand_chacha::ChaCha20Rng;
use rand_core::{Rng, SeedableRng};

use super::constraint::TokenMask;
use super::sampling::SamplingParams;
use crate::backend::Top;
use crate::error::{Error, Result};

#[cfg(test)]
mod tests;
#[cfg(test)]
mod top_tests;

/// Lower temperatures are greedy, because dividing logits by them would overflow f32.
pub(super) const MIN_TEMPERATURE: f32 = 1e-3;

/// Most entries of a `logit_bias`; OpenAI's API accepts fewer.
const MAX_LOGIT_BIASES: usize = 4096;

/// The settings of [`SamplingParams`], resolved to numbers. The default is greedy.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Settings {
    /// Divides the logits; 0 to 100. Below 0.001 sampling is greedy.
    pub temperature: f32,
    /// Sample from this many of the largest logits; 1 is greedy at any temperature, 0 is off.
    pub top_k: u32,
    /// Sample from the most probable ids that together reach this probability; 0 to 1. 1 is off; 0 is off if `top_k` is
    /// set, and greedy if `top_k` is 0.
    pub top_p: f32,
    /// Sample from ids at least this fraction as probable as the most probable one; 0 to 1, 0 is off.
    pub min_p: f32,
    /// Divides the logits of ids in the prompt or the output, or multiplies them if negative; 0.01 to 100, 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted from the logits of ids in the output; -100 to 100, 0 is off. As in OpenAI's API, the prompt does not
    /// count.
    pub presence_penalty: f32,
    /// Subtracted once per occurrence of an id in the output; -100 to 100, 0 is off. The prompt does not count.
    pub frequency_penalty: f32,
    /// Added to the logits of single ids; -100 to 100 each. The biases of an id listed twice add up.
    pub logit_bias: Vec<(u32, f32)>,
    /// Stop ids are not chosen before the output has this many tokens. Stop strings can still end it.
    pub min_tokens: usize,
    /// Seed of the random draws; draw i depends on the seed and on i only. `None` takes one from the operating system,
    /// which the completion reports.
    pub seed: Option<u64>,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings {
            temperature: 1.0,
            top_k: 1,
            top_p: 0.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            min_tokens: 0,
            seed: None,
        }
    }
}

impl Settings {
    /// Validates every field; `vocab_size` is the number of ids that can be chosen.
    ///
    /// # Errors
    /// [`Error::Request`] with the field, its value and the accepted range.
    pub(super) fn validate(&self, vocab_size: usize) -> Result<()> {
        let ranges = [
            ("temperature", self.temperature, 0.0, 100.0),
            ("top_p", self.top_p, 0.0, 1.0),
            ("min_p", self.min_p, 0.0, 1.0),
            ("repetition_penalty", self.repetition_penalty, 0.01, 100.0),
            ("presence_penalty", self.presence_penalty, -100.0, 100.0),
            ("frequency_penalty", self.frequency_penalty, -100.0, 100.0),
        ];
        for (field, value, low, high) in ranges {
            // `contains` rather than two comparisons, because NaN has to fail too.
            if !(low..=high).contains(&value) {
                return Err(Error::Request(format!("{field} is {value}; expected {low} to {high}")));
            }
        }
        if self.logit_bias.len() > MAX_LOGIT_BIASES {
            let count = self.logit_bias.len();
            return Err(Error::Request(format!("logit_bias has {count} entries; expected at most {MAX_LOGIT_BIASES}")));
        }
        for (id, bias) in &self.logit_bias {
            if *id as usize >= vocab_size {
                return Err(Error::Request(format!(
                    "logit_bias names id {id}; expected 0 to {}",
                    vocab_size.saturating_sub(1)
                )));
            }
            if !(-100.0..=100.0).contains(bias) {
                return Err(Error::Request(format!("logit_bias of id {id} is {bias}; expected -100 to 100")));
            }
        }
        Ok(())
    }

    /// Returns true if the largest logit is always chosen, so that temperature, top-p, min-p and seed have no effect.
    pub(super) fn is_greedy(&self) -> bool {
        self.top_k == 1 || self.temperature < MIN_TEMPERATURE || (self.top_k == 0 && self.top_p == 0.0)
    }
}

/// An id and its logit after all adjustments.
#[derive(Debug, Clone, Copy)]
struct Candidate {
    logit: f32,
    id: u32,
}

/// Orders by descending logit, then by ascending id. Logits must not be NaN.
fn best_first(a: &Candidate, b: &Candidate) -> Ordering {
    b.logit.partial_cmp(&a.logit).unwrap_or(Ordering::Equal).then(a.id.cmp(&b.id))
}

/// Pairs each logit with its index as a candidate.
fn numbered(logits: &[f32]) -> impl Iterator<Item = Candidate> + '_ {
    logits.iter().enumerate().map(|(id, logit)| Candidate { logit: *logit, id: id as u32 })
}

/// Chooses the ids of one generation and tracks them for the penalties.
#[derive(Debug)]
pub struct Sampler {
    /// As requested, with `logit_bias` sorted by id.
    params: Settings,
    is_greedy: bool,
    /// Divisor of the logits.
    temperature: f32,
    /// Ids below this can be chosen.
    vocab_size: usize,
    stop_ids: Vec<u32>,
    seed: u64,
    rng: ChaCha20Rng,
    /// Ids in the prompt or output, with their count in the output; only maintained if a penalty needs it.
    seen: HashMap<u32, u32>,
    generated: usize,
    /// `[vocab_size]`, the adjusted logits of a full row.
    logits: Vec<f32>,
    /// The choosable ids among a row's largest logits, in ascending order of ids.
    top: Vec<Candidate>,
    /// The candidates that survive top-k, top-p and min-p.
    candidates: Vec<Candidate>,
}

impl Sampler {
    /// Creates a sampler for one generation. `vocab_size` is the number of ids that can be chosen, at most the number
    /// of logits in a row; `prompt` counts for the repetition penalty, `stop_ids` for `min_tokens`.
    ///
    /// # Errors
    /// As [`SamplingParams::validate`].
    pub fn new(params: &SamplingParams, vocab_size: usize, stop_ids: &[u32], prompt: &[u32]) -> Result<Sampler> {
        params.validate(vocab_size)?;
        Sampler::with_settings(&params.settings(), vocab_size, stop_ids, prompt)
    }

    fn with_settings(params: &Settings, vocab_size: usize, stop_ids: &[u32], prompt: &[u32]) -> Result<Sampler> {
        params.validate(vocab_size)?;
        let mut params = params.clone();
        // The biases of an id listed twice are added once, here: in a stable order, since they are floats.
        params.logit_bias.sort_by_key(|(id, _)| *id);
        params.logit_bias.dedup_by(|(id, bias), (kept_id, kept_bias)| {
            let is_same = id == kept_id;
            *kept_bias += if is_same { *bias } else { 0.0 };
            is_same
        });
        let seed = params.seed.unwrap_or_else(random_seed);
        let mut key = [0; 32];
        let (low, _) = key.split_at_mut(8);
        low.copy_from_slice(&seed.to_le_bytes());
        // A greedy choice does not depend on the temperature, even with penalties.
        let is_greedy = params.is_greedy();
        let mut sampler = Sampler {
            is_greedy,
            temperature: if is_greedy { 1.0 } else { params.temperature },
            params,
            vocab_size,
            stop_ids: sorted(stop_ids),
            seed,
            rng: ChaCha20Rng::from_seed(key),
            seen: HashMap::new(),
            generated: 0,
            logits: Vec::new(),
            top: Vec::new(),
            candidates: Vec::new(),
        };
        if sampler.params.repetition_penalty != 1.0 {
            sampler.seen.extend(prompt.iter().map(|id| (*id, 0)));
        }
        Ok(sampler)
    }

    /// The seed of the draws, whether requested or taken from the operating system.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// Chooses the next id from `row`, one row of logits over the model's vocabulary, and counts it as output.
    ///
    /// # Errors
    /// [`Error::Numerics`] with the index of a NaN or infinite logit, or if no id can be chosen because every logit is
    /// negative infinity; nothing is counted then.
    pub fn sample(&mut self, row: &[f32]) -> Result<u32> {
        self.sample_allowed(row, None)
    }

    /// As [`Sampler::sample`], of the ids in `allowed` only.
    pub(super) fn sample_allowed(&mut self, row: &[f32], allowed: Option<&TokenMask>) -> Result<u32> {
        check_row(row)?;
        let mask = allowed;
        let Some(allowed) = row.get(..self.vocab_size) else {
            return Err(Error::Numerics(format!("{} logits for {} ids", row.len(), self.vocab_size)));
        };
        self.adjust(allowed, mask);
        let best = self.best(numbered(&self.logits))?;
        if !self.is_greedy {
            let top_k = self.top_k();
            keep_top_k(&mut self.candidates, numbered(&self.logits), top_k);
        }
        self.choose(best)
    }

    /// Chooses the next id from a row's largest logits, with the same result as [`Sampler::sample`] on the whole row,
    /// and counts it as output. Returns `None`, and counts nothing, if the choice depends on the rest of the row. That
    /// is the case
    ///
    /// - without top-k, unless min-p drops the rest, and if top-k takes more ids than are known to be the largest:
    ///   the probabilities depend on all candidates;
    /// - if a penalty or a bias may lift an id of the rest above one of these.
    ///
    /// The ids of the rest are assumed to have the least logit of `top`, which is an upper bound. So an id is chosen
    /// only if its adjusted logit is strictly above the bound for all of them: an equal one might have a lower id. The
    /// order within `top` does not matter.
    ///
    /// # Errors
    /// [`Error::Numerics`] where [`Sampler::sample`] would report one, [`Error::Step`] if `top` does not pair each
    /// logit with an id of its own; nothing is counted then.
    pub fn sample_top(&mut self, top: Top<'_>) -> Result<Option<u32>> {
        self.sample_top_allowed(top, None)
    }

    /// As [`Sampler::sample_top`], of the ids in `allowed` only.
    pub(super) fn sample_top_allowed(&mut self, top: Top<'_>, allowed: Option<&TokenMask>) -> Result<Option<u32>> {
        let rest = self.adjust_top(top, allowed)?;
        // Even if there is a rest, it cannot be chosen if all of it is negative infinity.
        let is_all = rest == f32::NEG_INFINITY;
        if self.top.is_empty() && !is_all {
            return Ok(None);
        }
        let best = self.best(self.top.iter().copied())?;
        if !self.is_greedy {
            let top_k = self.top_k();
            let has_top_k = top_k.is_some_and(|k| k <= self.top.len());
            if !is_all && !has_top_k && !self.drops_by_min_p(rest, best.logit) {
                return Ok(None);
            }
            keep_top_k(&mut self.candidates, self.top.iter().copied(), top_k);
        }
        self.choose(best).map(Some)
    }

    /// Chooses the best candidate, or draws among `candidates`, and counts the choice as output.
    fn choose(&mut self, best: Candidate) -> Result<u32> {
        let id = if self.is_greedy { best.id } else { self.draw(best.logit)? };
        self.generated += 1;
        if self.has_penalties() {
            *self.seen.entry(id).or_default() += 1;
        }
        Ok(id)
    }

    fn has_penalties(&self) -> bool {
        let p = &self.params;
        p.repetition_penalty != 1.0 || p.presence_penalty != 0.0 || p.frequency_penalty != 0.0
    }

    /// Number of best candidates that top-k keeps, or `None` for all.
    fn top_k(&self) -> Option<usize> {
        let k = self.params.top_k as usize;
        (k > 0 && k < self.vocab_size).then_some(k)
    }

    /// Returns true if top-p drops anything.
    fn has_top_p(&self) -> bool {
        self.params.top_p > 0.0 && self.params.top_p < 1.0
    }

    /// Returns true if min-p alone is sure to drop every candidate with a logit of at most `logit`. `max` is the
    /// largest logit.
    fn drops_by_min_p(&self, logit: f32, max: f32) -> bool {
        // An upper bound of f32's `exp` for this and any smaller logit, however it rounds.
        let most = f64::from(logit - max).exp() * (1.0 + 1e-6) + f64::from(f32::from_bits(1));
        !self.has_top_p() && most < f64::from(self.params.min_p)
    }

    /// One id's logit after bias, temperature and penalties, in TensorRT-LLM's order. `times` is the id's count in the
    /// output, if it is in the prompt or output. Monotonic in `logit`: every operation preserves order, rounding
    /// included.
    fn adjusted(&self, id: u32, logit: f32, times: Option<u32>) -> f32 {
        let p = &self.params;
        let bias =
            p.logit_bias.binary_search_by_key(&id, |(biased, _)| *biased).ok().and_then(|at| p.logit_bias.get(at));
        let logit = bias.map_or(logit, |(_, bias)| logit + bias) / self.temperature;
        let Some(times) = times else { return logit };
        let logit = if logit < 0.0 { logit * p.repetition_penalty } else { logit / p.repetition_penalty };
        if times > 0 { logit - (p.presence_penalty + p.frequency_penalty * times as f32) } else { logit }
    }

    /// The ids whose logits may change by more than the temperature, with the arguments of [`Sampler::adjusted`]. May
    /// list an id twice.
    fn special_ids(&self) -> impl Iterator<Item = (u32, Option<u32>)> + '_ {
        let biased = self.params.logit_bias.iter().map(|(id, _)| (*id, self.seen.get(id).copied()));
        biased.chain(self.seen.iter().map(|(id, times)| (*id, Some(*times))))
    }

    /// Stop ids that may not be chosen yet. Where nothing else is allowed, they may: the form of the answer is complete.
    fn banned(&self, allowed: Option<&TokenMask>) -> &[u32] {
        let is_complete = || {
            allowed.is_some_and(|allowed| {
                let stops = self.stop_ids.iter().filter(|id| allowed.contains(**id)).count();
                allowed.count() == stops
            })
        };
        if self.generated < self.params.min_tokens && !is_complete() { &self.stop_ids } else { &[] }
    }

    /// Fills `logits` with the adjusted logits of `row`, `[vocab_size]`: negative infinity for ids that are not allowed.
    fn adjust(&mut self, row: &[f32], allowed: Option<&TokenMask>) {
        let mut logits = std::mem::take(&mut self.logits);
        logits.clear();
        logits.extend_from_slice(row);
        // A plain loop, which vectorizes; the few ids with further adjustments are redone from the raw row below.
        if self.temperature != 1.0 {
            for logit in &mut logits {
                *logit /= self.temperature;
            }
        }
        for (id, times) in self.special_ids() {
            if let (Some(logit), Some(raw)) = (logits.get_mut(id as usize), row.get(id as usize)) {
                *logit = self.adjusted(id, *raw, times);
            }
        }
        for id in self.banned(allowed) {
            if let Some(logit) = logits.get_mut(*id as usize) {
                *logit = f32::NEG_INFINITY;
            }
        }
        if let Some(allowed) = allowed {
            let ids = 0u32..;
            for (_, logit) in ids.zip(&mut logits).filter(|(id, _)| !allowed.contains(*id)) {
                *logit = f32::NEG_INFINITY;
            }
        }
        self.logits = logits;
    }

    /// Fills `top` with the ids from a row's largest logits that can be chosen and whose adjusted logits exceed those
    /// of the rest. Returns an upper bound for the adjusted logits of the rest: negative infinity if there is no rest.
    fn adjust_top(&mut self, top: Top<'_>, allowed: Option<&TokenMask>) -> Result<f32> {
        let Top { values, ids, sum } = top;
        if values.len() != ids.len() {
            return Err(Error::Step(format!("{} largest logits with {} ids", values.len(), ids.len())));
        }
        let mut kept = std::mem::take(&mut self.top);
        kept.clear();
        kept.extend(values.iter().zip(ids).map(|(logit, id)| Candidate { logit: *logit, id: *id }));
        kept.sort_unstable_by_key(|candidate| candidate.id);
        if let Some([first, _]) = kept.array_windows().find(|[a, b]| a.id == b.id) {
            return Err(Error::Step(format!("id {} is listed twice among the largest logits of a row", first.id)));
        }
        if let Some(wrong) = kept.iter().find(|candidate| is_wrong(candidate.logit)) {
            return Err(Error::Numerics(format!(
                "the logit at index {} is {}; the weights or a kernel are wrong",
                wrong.id, wrong.logit
            )));
        }
        if is_wrong(sum) {
            return Err(Error::Numerics(format!(
                "the sum of the row's logits is {sum}, so one of them is not a number or is infinite, although none of the {} \
                 largest is; the weights or a kernel are wrong",
                values.len()
            )));
        }
        let least = values.iter().copied().fold(f32::INFINITY, f32::min);
        // Padding ids, which cannot be chosen, sort last.
        kept.truncate(kept.partition_point(|candidate| (candidate.id as usize) < self.vocab_size));
        let mut rest = f32::NEG_INFINITY;
        if kept.len() < self.vocab_size {
            rest = least / self.temperature;
            // A penalty or bias may lift single ids of the rest above what the temperature alone makes of `least`.
            for (id, times) in self.special_ids() {
                let most = self.adjusted(id, least, times);
                if most > rest && kept.binary_search_by_key(&id, |candidate| candidate.id).is_err() {
                    rest = most;
                }
            }
        }
        for candidate in &mut kept {
            candidate.logit = self.adjusted(candidate.id, candidate.logit, self.seen.get(&candidate.id).copied());
        }
        let banned = self.banned(allowed);
        kept.retain(|candidate| {
            let is_allowed = allowed.is_none_or(|allowed| allowed.contains(candidate.id));
            candidate.logit > rest && is_allowed && !banned.contains(&candidate.id)
        });
        self.top = kept;
        Ok(rest)
    }

    /// The largest adjusted logit and the lowest id that has it; ids must ascend.
    fn best(&self, possible: impl Iterator<Item = Candidate>) -> Result<Candidate> {
        let mut best = Candidate { logit: f32::NEG_INFINITY, id: 0 };
        for candidate in possible {
            if candidate.logit > best.logit {
                best = candidate;
            }
        }
        if best.logit == f32::NEG_INFINITY {
            return Err(Error::Numerics(format!(
                "no id can be chosen: all of the {} logits, from index 0 on, are negative infinity or banned",
                self.vocab_size
            )));
        }
        if best.logit == f32::INFINITY {
            return Err(Error::Numerics(format!("the logit at index {} overflows after temperature", best.id)));
        }
        Ok(best)
    }

    /// Draws from the `candidates` that survive top-p and min-p. `max` is the largest logit.
    fn draw(&mut self, max: f32) -> Result<u32> {
        let weight = |candidate: &Candidate| f64::from((candidate.logit - max).exp());
        if self.has_top_p() {
            let total: f64 = self.candidates.iter().map(weight).sum();
            let mass = f64::from(self.params.top_p) * total;
            // All candidates lighter than this together weigh less than `total - mass`, so none of them is among the
            // best that reach `mass`. The slack outweighs f32 rounding.
            let least = (total - mass) / self.candidates.len() as f64;
            let least_logit = max + least.ln() as f32 - 0.01;
            self.candidates.retain(|candidate| candidate.logit >= least_logit);
            self.keep_top_p(mass, weight);
        }
        if self.params.min_p > 0.0 {
            let least = f64::from(self.params.min_p);
            self.candidates.retain(|candidate| weight(candidate) >= least);
        }
        let total: f64 = self.candidates.iter().map(weight).sum();
        // 53 random bits, uniform in [0, 1). Each draw takes two 32-bit words at its own position of the stream.
        self.rng.set_word_pos(2 * self.generated as u128);
        let mut left = (self.rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64 * total;
        let mut last = None;
        for candidate in &self.candidates {
            let weight = weight(candidate);
            if weight > 0.0 {
                // Rounding may leave `left` at or above 0 after the last candidate, which is then the one drawn.
                last = Some(candidate.id);
                left -= weight;
                if left < 0.0 {
                    break;
                }
            }
        }
        last.ok_or_else(|| Error::Numerics("no candidate has a positive probability".into()))
    }

    /// Truncates `candidates` to the best ones whose weights reach `mass`, including the one that reaches it. Sorts
    /// only a prefix, which grows fourfold each time it was too short.
    fn keep_top_p(&mut self, mass: f64, weight: impl Fn(&Candidate) -> f64) {
        let mut reached = 0.0;
        let mut sorted = 0;
        let mut next = 256;
        while let Some(rest) = self.candidates.get_mut(sorted..).filter(|rest| !rest.is_empty()) {
            let count = rest.len().min(next);
            if count < rest.len() {
                rest.select_nth_unstable_by(count, best_first);
            }
            let Some(chunk) = rest.get_mut(..count) else { return };
            chunk.sort_unstable_by(best_first);
            for (index, candidate) in chunk.iter().enumerate() {
                reached += weight(candidate);
                if reached >= mass {
                    return self.candidates.truncate(sorted + index + 1);
                }
            }
            sorted += count;
            next *= 4;
        }
    }
}

/// Fills `kept` with the `top_k` best candidates, best first, or with all of them in the order given, that of ids.
/// Takes linear time: `kept` is cut back to the best k whenever it holds 2k.
fn keep_top_k(kept: &mut Vec<Candidate>, all: impl Iterator<Item = Candidate>, top_k: Option<usize>) {
    kept.clear();
    let possible = all.filter(|candidate| candidate.logit != f32::NEG_INFINITY);
    let Some(k) = top_k else { return kept.extend(possible) };
    let mut worst_kept = f32::NEG_INFINITY;
    for candidate in possible {
        // Ids ascend, so an equal logit ranks behind those kept.
        if candidate.logit > worst_kept {
            kept.push(candidate);
            if kept.len() >= 2 * k {
                // Amortized linear: a selection in 2k candidates makes room for k more.
                let (_, kth, _) = kept.select_nth_unstable_by(k - 1, best_first);
                worst_kept = kth.logit;
                kept.truncate(k);
            }
        }
    }
    if kept.len() > k {
        kept.select_nth_unstable_by(k - 1, best_first);
        kept.truncate(k);
    }
    kept.sort_unstable_by(best_first);
}

/// The ids in ascending order, without duplicates.
fn sorted(ids: &[u32]) -> Vec<u32> {
    let mut ids = ids.to_vec();
    ids.sort_unstable();
    ids.dedup();
    ids
}

/// Returns true for NaN and positive infinity, which no model computes on purpose.
fn is_wrong(logit: f32) -> bool {
    logit.is_nan() || logit == f32::INFINITY
}

/// Refuses a row with a logit that [`is_wrong`].
pub(crate) fn check_row(row: &[f32]) -> Result<()> {
    match row.iter().position(|logit| is_wrong(*logit)) {
        Some(index) => Err(Error::Numerics(format!(
            "the logit at index {index} of {} is {}; the weights or a kernel are wrong",
            row.len(),
            row.get(index).copied().unwrap_or(f32::NAN)
        ))),
        None => Ok(()),
    }
}

/// Natural logarithm of the probability of `id` under the softmax over all of `row`, in f64.
///
/// # Errors
/// [`Error::Numerics`] for a NaN or infinite logit or a row of negative infinity, [`Error::Request`] for an id outside
/// the row.
pub fn log_probability(row: &[f32], id: u32) -> Result<f64> {
    check_row(row)?;
    let Some(logit) = row.get(id as usize) else {
        return Err(Error::Request(format!("id {id}; the logits have ids 0 to {}", row.len().saturating_sub(1))));
    };
    Ok(log_softmax_offset(row)?.of(*logit))
}

/// What is subtracted from a row's logits to make log-probabilities of them.
#[derive(Debug, Clone, Copy)]
pub(super) struct LogSoftmaxOffset {
    max: f64,
    /// Logarithm of the sum of the exponentials of the logits, less `max`.
    log_sum: f64,
}

impl LogSoftmaxOffset {
    /// The log-probability of an id with this logit.
    pub(super) fn of(self, logit: f32) -> f64 {
        f64::from(logit) - self.max - self.log_sum
    }
}

/// The offset of a row that [`check_row`] accepts.
///
/// # Errors
/// [`Error::Numerics`] for a row of negative infinity.
pub(super) fn log_softmax_offset(row: &[f32]) -> Result<LogSoftmaxOffset> {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if max == f32::NEG_INFINITY {
        return Err(Error::Numerics(format!(
            "all of the {} logits, from index 0 on, are negative infinity",
            row.len()
        )));
    }
    let sum: f64 = row.iter().map(|logit| (f64::from(*logit) - f64::from(max)).exp()).sum();
    Ok(LogSoftmaxOffset { max: f64::from(max), log_sum: sum.ln() })
}

/// A seed from the operating system. It has 53 bits, so that it survives JSON readers that store numbers as f64.
fn random_seed() -> u64 {
    // Even if the OS call fails, the standard library has seeded its hashers as well as it can.
    getrandom::u64().unwrap_or_else(|_| RandomState::new().hash_one("sampler seed")) >> 11
}
