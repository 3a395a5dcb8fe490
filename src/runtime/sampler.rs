//! From one row of logits to one id, with the settings as TensorRT-LLM and NeMo define them.

use std::cmp::Ordering;
use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};

use rand_chacha::ChaCha20Rng;
use rand_core::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

#[cfg(test)]
mod tests;

/// Temperatures below this are greedy: dividing logits by less would leave the range of f32.
const MIN_TEMPERATURE: f32 = 1e-3;

/// How the next id is chosen. The default is greedy, as the model card's `top_k=1, top_p=0.0`.
///
/// The settings apply in this order: logit bias, temperature, repetition penalty, presence and frequency penalty,
/// the ban of stop ids before `min_tokens`, top-k, top-p, min-p. Ids the tokenizer does not have are never chosen.
/// Of equal logits the lowest id comes first.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SamplingParams {
    /// Logits are divided by it; 0 to 100. Below 0.001 the choice is greedy.
    pub temperature: f32,
    /// Choose among this many of the largest logits; 1 is greedy whatever the temperature, 0 is off.
    pub top_k: u32,
    /// Choose among the most probable ids that together reach this probability; 0 to 1. 1 is off; 0 is off
    /// where `top_k` is set, and with `top_k` 0 it means greedy.
    pub top_p: f32,
    /// Choose among ids at least this fraction as probable as the most probable one; 0 to 1, 0 is off.
    pub min_p: f32,
    /// Logits of ids in the prompt or the output are divided by it, or multiplied where negative; 0.01 to 100, 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted from the logits of ids in the output; -100 to 100, 0 is off. As OpenAI's, the prompt does not count.
    pub presence_penalty: f32,
    /// Subtracted once for each time an id is in the output; -100 to 100, 0 is off. The prompt does not count.
    pub frequency_penalty: f32,
    /// Added to single ids' logits; -100 to 100 each. An id named twice gets both.
    pub logit_bias: Vec<(u32, f32)>,
    /// Stop ids are not chosen before the output has this many tokens. Stop strings still end it.
    pub min_tokens: usize,
    /// Fixes the random draws; draw i depends on the seed and i alone. `None` takes one from the operating system,
    /// which the completion reports.
    pub seed: Option<u64>,
}

impl Default for SamplingParams {
    fn default() -> SamplingParams {
        SamplingParams {
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

impl SamplingParams {
    /// Checks every field; `vocab_size` is the number of ids that can be chosen.
    ///
    /// # Errors
    /// [`Error::Request`] with the field, its value and what is accepted.
    pub fn validate(&self, vocab_size: usize) -> Result<()> {
        let ranges = [
            ("temperature", self.temperature, 0.0, 100.0),
            ("top_p", self.top_p, 0.0, 1.0),
            ("min_p", self.min_p, 0.0, 1.0),
            ("repetition_penalty", self.repetition_penalty, 0.01, 100.0),
            ("presence_penalty", self.presence_penalty, -100.0, 100.0),
            ("frequency_penalty", self.frequency_penalty, -100.0, 100.0),
        ];
        for (field, value, low, high) in ranges {
            // Not a pair of comparisons: NaN has to fail too.
            if !(low..=high).contains(&value) {
                return Err(Error::Request(format!("{field} is {value}; accepted are {low} to {high}")));
            }
        }
        for (id, bias) in &self.logit_bias {
            if *id as usize >= vocab_size {
                return Err(Error::Request(format!(
                    "logit_bias names id {id}; accepted are 0 to {}",
                    vocab_size.saturating_sub(1)
                )));
            }
            if !(-100.0..=100.0).contains(bias) {
                return Err(Error::Request(format!("logit_bias of id {id} is {bias}; accepted are -100 to 100")));
            }
        }
        Ok(())
    }

    /// Whether the largest logit is always chosen, so that temperature, top-p, min-p and seed have no effect.
    pub fn is_greedy(&self) -> bool {
        self.top_k == 1 || self.temperature < MIN_TEMPERATURE || (self.top_k == 0 && self.top_p == 0.0)
    }
}

/// An id with its logit after all adjustments.
#[derive(Debug, Clone, Copy)]
struct Candidate {
    logit: f32,
    id: u32,
}

/// Larger logits first, then lower ids. Logits are not NaN.
fn best_first(a: &Candidate, b: &Candidate) -> Ordering {
    b.logit.partial_cmp(&a.logit).unwrap_or(Ordering::Equal).then(a.id.cmp(&b.id))
}

/// Chooses the ids of one generation, and remembers them for the penalties.
#[derive(Debug)]
pub struct Sampler {
    params: SamplingParams,
    is_greedy: bool,
    /// What logits are divided by.
    temperature: f32,
    /// Ids that can be chosen: 0 to this - 1.
    vocab_size: usize,
    stop_ids: Vec<u32>,
    seed: u64,
    rng: ChaCha20Rng,
    /// Ids in prompt or output and how often each is in the output; kept where a penalty needs it.
    seen: HashMap<u32, u32>,
    generated: usize,
    /// `[vocab_size]`, adjusted logits.
    logits: Vec<f32>,
    candidates: Vec<Candidate>,
}

impl Sampler {
    /// A sampler for one generation. `vocab_size` is the number of ids that can be chosen, at most the columns of the
    /// logits; `prompt` counts for the repetition penalty, `stop_ids` for `min_tokens`.
    ///
    /// # Errors
    /// As [`SamplingParams::validate`].
    pub fn new(params: &SamplingParams, vocab_size: usize, stop_ids: &[u32], prompt: &[u32]) -> Result<Sampler> {
        params.validate(vocab_size)?;
        let seed = params.seed.unwrap_or_else(random_seed);
        let mut key = [0; 32];
        let (low, _) = key.split_at_mut(8);
        low.copy_from_slice(&seed.to_le_bytes());
        // A greedy choice is the same at every temperature, penalties included.
        let is_greedy = params.is_greedy();
        let mut sampler = Sampler {
            params: params.clone(),
            is_greedy,
            temperature: if is_greedy { 1.0 } else { params.temperature },
            vocab_size,
            stop_ids: stop_ids.to_vec(),
            seed,
            rng: ChaCha20Rng::from_seed(key),
            seen: HashMap::new(),
            generated: 0,
            logits: Vec::new(),
            candidates: Vec::new(),
        };
        if sampler.params.repetition_penalty != 1.0 {
            sampler.seen.extend(prompt.iter().map(|id| (*id, 0)));
        }
        Ok(sampler)
    }

    /// The seed of the draws: the request's, or the one taken.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// Chooses the next id from `row`, one row of logits over the model's vocabulary, and counts it as output.
    ///
    /// # Errors
    /// [`Error::Numerics`] naming the index of a NaN or an infinite logit, or where no id can be chosen because every
    /// logit is negative infinity; nothing is counted then.
    pub fn sample(&mut self, row: &[f32]) -> Result<u32> {
        check_row(row)?;
        let Some(allowed) = row.get(..self.vocab_size) else {
            return Err(Error::Numerics(format!("{} logits for {} ids", row.len(), self.vocab_size)));
        };
        self.logits.clear();
        self.logits.extend_from_slice(allowed);
        self.adjust();
        let best = self.best()?;
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

    /// Bias, temperature, penalties and bans, in TensorRT-LLM's order.
    fn adjust(&mut self) {
        let p = &self.params;
        for (id, bias) in &p.logit_bias {
            if let Some(logit) = self.logits.get_mut(*id as usize) {
                *logit += bias;
            }
        }
        if self.temperature != 1.0 {
            for logit in &mut self.logits {
                *logit /= self.temperature;
            }
        }
        for (id, times) in &self.seen {
            let Some(logit) = self.logits.get_mut(*id as usize) else { continue };
            if *logit < 0.0 {
                *logit *= p.repetition_penalty;
            } else {
                *logit /= p.repetition_penalty;
            }
            if *times > 0 {
                *logit -= p.presence_penalty + p.frequency_penalty * *times as f32;
            }
        }
        if self.generated < p.min_tokens {
            for id in &self.stop_ids {
                if let Some(logit) = self.logits.get_mut(*id as usize) {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
    }

    /// The largest adjusted logit, of the lowest id that has it.
    fn best(&self) -> Result<Candidate> {
        let mut best = Candidate { logit: f32::NEG_INFINITY, id: 0 };
        for (id, logit) in self.logits.iter().enumerate() {
            if *logit > best.logit {
                best = Candidate { logit: *logit, id: id as u32 };
            }
        }
        if best.logit == f32::NEG_INFINITY {
            return Err(Error::Numerics(format!(
                "no id can be chosen: all of the {} logits, from index 0 on, are negative infinity or banned",
                self.logits.len()
            )));
        }
        if best.logit == f32::INFINITY {
            return Err(Error::Numerics(format!("the logit at index {} overflows after temperature", best.id)));
        }
        Ok(best)
    }

    /// Draws among the candidates top-k, top-p and min-p leave. `max` is the largest logit.
    fn draw(&mut self, max: f32) -> Result<u32> {
        let weight = |candidate: &Candidate| f64::from((candidate.logit - max).exp());
        self.keep_top_k();
        if self.params.top_p > 0.0 && self.params.top_p < 1.0 {
            let total: f64 = self.candidates.iter().map(weight).sum();
            let mass = f64::from(self.params.top_p) * total;
            // All candidates lighter than this weigh less than `total - mass` together, so none of them is among the
            // best that reach `mass`. A little slack outweighs the rounding of f32.
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
        // 53 random bits, uniform in [0, 1). Each draw takes two 32-bit words of the stream, at its own place.
        self.rng.set_word_pos(2 * self.generated as u128);
        let mut left = (self.rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64 * total;
        let mut last = None;
        for candidate in &self.candidates {
            let weight = weight(candidate);
            if weight > 0.0 {
                last = Some(candidate.id);
                left -= weight;
                if left < 0.0 {
                    break;
                }
            }
        }
        last.ok_or_else(|| Error::Numerics("no candidate has a positive probability".into()))
    }

    /// Fills `candidates` with the `top_k` largest logits best first, or with all in the order of ids.
    /// Time is linear in the vocabulary: candidates are cut back to the best k each time there are 2k.
    fn keep_top_k(&mut self) {
        self.candidates.clear();
        let k = self.params.top_k as usize;
        let all = self.logits.iter().enumerate().map(|(id, logit)| Candidate { logit: *logit, id: id as u32 });
        let possible = all.filter(|candidate| candidate.logit != f32::NEG_INFINITY);
        if k == 0 || k >= self.logits.len() {
            return self.candidates.extend(possible);
        }
        let mut worst_kept = f32::NEG_INFINITY;
        for candidate in possible {
            // Ids come in ascending order, so an equal logit ranks behind those kept.
            if candidate.logit > worst_kept {
                self.candidates.push(candidate);
                if self.candidates.len() >= 2 * k {
                    let (_, kth, _) = self.candidates.select_nth_unstable_by(k - 1, best_first);
                    worst_kept = kth.logit;
                    self.candidates.truncate(k);
                }
            }
        }
        if self.candidates.len() > k {
            self.candidates.select_nth_unstable_by(k - 1, best_first);
            self.candidates.truncate(k);
        }
        self.candidates.sort_unstable_by(best_first);
    }

    /// Cuts `candidates` to the best ones whose weights reach `mass`, the one that reaches it included. Sorts only a
    /// prefix, four times as long each time it was too short.
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

/// Refuses NaN and positive infinity, which no model computes on purpose.
pub(crate) fn check_row(row: &[f32]) -> Result<()> {
    match row.iter().position(|logit| logit.is_nan() || *logit == f32::INFINITY) {
        Some(index) => Err(Error::Numerics(format!(
            "the logit at index {index} of {} is {}; the weights or a kernel are wrong",
            row.len(),
            row.get(index).copied().unwrap_or(f32::NAN)
        ))),
        None => Ok(()),
    }
}

/// Natural logarithm of the probability the softmax over all of `row` gives to `id`, in f64.
///
/// # Errors
/// [`Error::Numerics`] for a NaN or infinite logit or a row of negative infinity, [`Error::Request`] for an id
/// outside the row.
pub fn log_probability(row: &[f32], id: u32) -> Result<f64> {
    check_row(row)?;
    let Some(logit) = row.get(id as usize) else {
        return Err(Error::Request(format!("id {id}; the logits have ids 0 to {}", row.len().saturating_sub(1))));
    };
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if max == f32::NEG_INFINITY {
        return Err(Error::Numerics(format!(
            "all of the {} logits, from index 0 on, are negative infinity",
            row.len()
        )));
    }
    let sum: f64 = row.iter().map(|logit| (f64::from(*logit) - f64::from(max)).exp()).sum();
    Ok(f64::from(*logit) - f64::from(max) - sum.ln())
}

/// A seed from the operating system's randomness, which keys every new hasher. It has 53 bits, so that it survives JSON
/// readers that hold numbers as f64.
fn random_seed() -> u64 {
    RandomState::new().hash_one("sampler seed") >> 11
}
