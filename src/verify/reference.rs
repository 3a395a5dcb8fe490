//! The reference of a package: what the CPU executor answered at build, for a few short prompts in the precision of each
//! plan. Of every row it holds the largest logits, a few others, and the row's mean and deviation, so that a shifted,
//! scaled or permuted row is seen.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::compare::{CaseResult, RowStats, row_error};
use super::dice::Dice;
use super::run::{Part, Runner};
use crate::backend::{Chunk, Executor, Limits, Rows, Step};
use crate::engine::Package;
use crate::error::{Error, Result, clip};

/// Version of the file; another one is refused.
const REFERENCE_VERSION: u32 = 1;
/// Largest accepted file.
const MAX_BYTES: u64 = 64 << 20;
/// Largest logits kept of a row.
const TOP: usize = 16;
/// Other logits kept of a row.
const OTHERS: usize = 16;

/// Content of a reference file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reference {
    /// [`REFERENCE_VERSION`].
    version: u32,
    /// The prompts, the same for all plans.
    pub prompts: Vec<ReferencePrompt>,
    /// One entry for each way of computing that some plan has.
    pub answers: Vec<ReferenceAnswers>,
}

/// A prompt.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReferencePrompt {
    /// Its name, such as the script it is written in.
    pub name: String,
    /// Its tokens.
    pub token_ids: Vec<u32>,
}

/// Answers of the CPU executor in one precision.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReferenceAnswers {
    /// Targets of the plans that they are expected of.
    pub targets: Vec<String>,
    /// Precision, as in the manifest.
    pub precision: String,
    /// Instruction set and packing that computed them. A CPU plan run with both must give the same bits.
    pub computed_by: String,
    /// One entry per token of each prompt.
    pub rows: Vec<Vec<ReferenceRow>>,
}

/// What is kept of a row of logits.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReferenceRow {
    /// Mean of all logits.
    mean: f32,
    /// Their standard deviation.
    deviation: f32,
    /// How many of `ids` are the row's largest, in descending order; the others come from anywhere in the row.
    top: usize,
    /// Token ids.
    ids: Vec<u32>,
    /// Their logits.
    values: Vec<f32>,
}

impl ReferenceRow {
    /// Keeps what a reference needs of a row, `[vocab_size]`. `seed` chooses the other ids.
    fn new(row: &[f32], seed: u64) -> Result<ReferenceRow> {
        if let Some(id) = row.iter().position(|value| !value.is_finite()) {
            return Err(Error::Numerics(format!("reference: the logit of token id {id} is {}", row[id])));
        }
        let RowStats { mean, deviation } = RowStats::of(row);
        let mut ids: Vec<u32> = (0..row.len() as u32).collect();
        let descending = |a: &u32, b: &u32| row[*b as usize].total_cmp(&row[*a as usize]).then(a.cmp(b));
        let top = TOP.min(ids.len());
        if top > 0 && top < ids.len() {
            ids.select_nth_unstable_by(top - 1, descending);
        }
        ids.truncate(top);
        ids.sort_unstable_by(descending);
        let mut known: BTreeSet<u32> = ids.iter().copied().collect();
        let (mut dice, most) = (Dice::new(seed), row.len().min(top + OTHERS));
        while ids.len() < most {
            let id = dice.below(row.len()) as u32;
            if known.insert(id) {
                ids.push(id);
            }
        }
        let values = ids.iter().map(|id| row[*id as usize]).collect();
        Ok(ReferenceRow { mean, deviation, top, ids, values })
    }

    /// Compares a row with this one.
    fn compare(&self, case: &mut CaseResult, row: &[f32], place: &dyn Fn() -> String) {
        case.rows += 1;
        let stats = RowStats { mean: self.mean, deviation: self.deviation };
        let found: Vec<f32> = self.ids.iter().map(|id| row.get(*id as usize).copied().unwrap_or(f32::NAN)).collect();
        let (error, at) = row_error(&found, &self.values, stats);
        if let (true, Some(id), Some(a), Some(b)) = (error > 0.0, self.ids.get(at), found.get(at), self.values.get(at))
        {
            case.record(error, Some(*id), *a, *b, place);
        }
        let of_row = RowStats::of(row);
        for (name, found, expected) in [
            ("mean of the row", of_row.mean, self.mean),
            ("standard deviation of the row", of_row.deviation, self.deviation),
        ] {
            let error = stats.relative(found - expected);
            case.record(error, None, found, expected, &|| format!("{}, {name}", place()));
        }
        // No other logit may be above the least of the largest.
        let Some(least) = self.top.checked_sub(1).and_then(|last| self.values.get(last)) else { return };
        let among: BTreeSet<u32> = self.ids.iter().take(self.top).copied().collect();
        let others = (0u32..).zip(row).filter(|(id, value)| **value > *least && !among.contains(id));
        if let Some((id, value)) = others.max_by(|a, b| a.1.total_cmp(b.1)) {
            let (error, _) = row_error(&[*value], &[*least], stats);
            case.record(error, Some(id), *value, *least, &|| format!("{}, above the largest logits", place()));
        }
    }
}

impl Reference {
    /// A reference without answers.
    pub fn new(prompts: Vec<ReferencePrompt>) -> Reference {
        Reference { version: REFERENCE_VERSION, prompts, answers: Vec::new() }
    }

    /// Name of the file in a package.
    pub const PACKAGE_FILE: &str = "reference.json";

    /// Reads a package's reference; `None` if it has none.
    ///
    /// # Errors
    /// [`Error::Package`] if it is damaged, of another version, or does not fit the package's plans.
    pub fn of_package(package: &Package) -> Result<Option<Reference>> {
        let Some(file) = &package.manifest().reference else { return Ok(None) };
        let refuse = |detail: String| {
            let remedy = "build the package again, or with --no-reference";
            Error::package(package.path(), format!("{file}: {detail}; {remedy}"))
        };
        let bytes = package.manifest().file(file).map_or(0, |info| info.bytes);
        if bytes > MAX_BYTES {
            return Err(refuse(format!("it has {bytes} bytes; at most {MAX_BYTES} are accepted")));
        }
        let reference: Reference = serde_json::from_slice(&package.read(file)?).map_err(|e| refuse(clip(e)))?;
        reference.check(package).map_err(refuse)?;
        Ok(Some(reference))
    }

    /// Its text.
    ///
    /// # Errors
    /// [`Error::Internal`] if it cannot be written as JSON.
    pub fn to_json(&self) -> Result<Vec<u8>> {
        let mut text = serde_json::to_vec(self).map_err(|error| {
            Error::internal(format!("a reference that JSON cannot hold: {error}"), "finite numbers")
        })?;
        text.push(b'\n');
        Ok(text)
    }

    fn check(&self, package: &Package) -> Result<(), String> {
        if self.version != REFERENCE_VERSION {
            return Err(format!("version {}, this aotron reads version {REFERENCE_VERSION}", self.version));
        }
        let vocab_size = package.manifest().model.vocab_size;
        let out_of_range = |ids: &[u32]| ids.iter().any(|id| *id as usize >= vocab_size);
        for prompt in &self.prompts {
            if prompt.token_ids.is_empty() || out_of_range(&prompt.token_ids) {
                return Err(format!("prompt \"{}\" is empty, or not of the model's vocabulary", clip(&prompt.name)));
            }
        }
        for answers in &self.answers {
            let sound = answers.rows.len() == self.prompts.len()
                && answers.rows.iter().zip(&self.prompts).all(|(rows, prompt)| rows.len() == prompt.token_ids.len())
                && answers.rows.iter().flatten().all(|row| {
                    row.ids.len() == row.values.len()
                        && row.top > 0
                        && row.top <= row.ids.len()
                        && !out_of_range(&row.ids)
                        && row.deviation.is_finite()
                        && row.mean.is_finite()
                        && row.values.iter().all(|value| value.is_finite())
                });
            if !sound {
                return Err(format!("the answers in {} do not fit the prompts", clip(&answers.precision)));
            }
        }
        Ok(())
    }

    /// The answers expected of the plan for a target.
    pub fn answers_for(&self, target: &str) -> Option<&ReferenceAnswers> {
        self.answers.iter().find(|answers| answers.targets.iter().any(|name| name == target))
    }

    /// Makes a target's answers those of `other`, for plans that compute alike, or removes them with `None`.
    pub fn expect_alike(&mut self, target: &str, other: Option<&str>) {
        if other == Some(target) {
            return;
        }
        for answers in &mut self.answers {
            answers.targets.retain(|name| name != target);
            if other.is_some_and(|other| answers.targets.iter().any(|name| name == other)) {
                answers.targets.push(target.into());
            }
        }
        self.answers.retain(|answers| !answers.targets.is_empty());
    }

    /// Adds a target's answers, replacing earlier ones.
    pub fn add(&mut self, target: &str, precision: &str, computed_by: String, rows: Vec<Vec<ReferenceRow>>) {
        self.expect_alike(target, None);
        let (targets, precision) = (vec![target.into()], precision.into());
        self.answers.push(ReferenceAnswers { targets, precision, computed_by, rows });
    }

    /// Tokens of all prompts.
    pub fn tokens(&self) -> usize {
        self.prompts.iter().map(|prompt| prompt.token_ids.len()).sum()
    }

    /// Keeps what is needed of the logits after each token of each prompt; `row` is called for one token after another.
    ///
    /// # Errors
    /// Any error of `row`; [`Error::Numerics`] if a logit is not finite.
    pub fn keep<'l>(&self, mut row: impl FnMut(usize) -> Result<&'l [f32]>) -> Result<Vec<Vec<ReferenceRow>>> {
        let mut index = 0;
        let mut next = || {
            let kept = ReferenceRow::new(row(index)?, index as u64);
            index += 1;
            kept
        };
        self.prompts.iter().map(|prompt| prompt.token_ids.iter().map(|_| next()).collect()).collect()
    }

    /// Answers of an executor.
    ///
    /// # Errors
    /// Any error of the executor; [`Error::Numerics`] if a logit is not finite.
    pub fn ask(
        &self,
        executor: &mut dyn Executor,
        on_tokens: &dyn Fn(u64) -> Result<()>,
    ) -> Result<Vec<Vec<ReferenceRow>>> {
        let limits = executor.limits().clone();
        let mut rows: Vec<Vec<ReferenceRow>> = self.prompts.iter().map(|_| Vec::new()).collect();
        for (step, places) in steps(&self.prompts, &limits)? {
            let mut logits = executor.forward(&step)?;
            for (index, (prompt, seed)) in places.into_iter().enumerate() {
                let kept = ReferenceRow::new(logits.row(index)?, seed)?;
                if let Some(rows) = rows.get_mut(prompt) {
                    rows.push(kept);
                }
            }
            on_tokens(step.tokens().len() as u64)?;
        }
        Ok(rows)
    }
}

/// A step over several prompts, and for each of its rows the prompt's index and the number of the token among all.
type PromptStep = (Step, Vec<(usize, u64)>);

/// Cuts prompts into steps within the limits, as many prompts at once as fit.
fn steps(prompts: &[ReferencePrompt], limits: &Limits) -> Result<Vec<PromptStep>> {
    let most = limits.max_step_tokens.min(limits.max_logits_rows).max(1);
    let mut steps = Vec::new();
    let (mut chunks, mut places, mut tokens, mut seed): (Vec<Chunk<'_>>, Vec<(usize, u64)>, usize, u64) =
        Default::default();
    for (index, prompt) in prompts.iter().enumerate() {
        for (chunk, ids) in prompt.token_ids.chunks(most).enumerate() {
            let past_tokens = chunk * most;
            if tokens + ids.len() > most || chunks.len() == limits.slots || past_tokens > 0 {
                steps.push((Step::prefill(limits, &chunks)?, std::mem::take(&mut places)));
                chunks.clear();
                tokens = 0;
            }
            // A prompt that is cut fills a step, so all its chunks are the first of theirs: in slot 0.
            chunks.push(Chunk { slot: chunks.len(), past_tokens, tokens: ids, rows: Rows::All });
            tokens += ids.len();
            places.extend(ids.iter().map(|_| {
                seed += 1;
                (index, seed - 1)
            }));
        }
    }
    if !chunks.is_empty() {
        steps.push((Step::prefill(limits, &chunks)?, places));
    }
    Ok(steps)
}

/// Cases that compare an executor with the answers expected of its plan, prefilled at once and, if `decoded`, token by
/// token.
///
/// # Errors
/// Any error of the executor.
pub(super) fn compare(
    runner: &mut Runner<'_>,
    reference: &Reference,
    answers: &ReferenceAnswers,
    limit: f32,
    decoded: bool,
) -> Result<Vec<CaseResult>> {
    let mut prefilled = CaseResult::new("the CPU's answers, prefilled", limit);
    let mut stepwise = CaseResult::new("the CPU's answers, decoded", limit);
    let most = runner.most_rows();
    for (prompt, answers) in reference.prompts.iter().zip(&answers.rows) {
        let ids = &prompt.token_ids[..prompt.token_ids.len().min(runner.limits.max_sequence_tokens)];
        let place = |position: usize| format!("prompt \"{}\", position {position}", prompt.name);
        runner.zero(0)?;
        let mut rows = Vec::with_capacity(ids.len());
        for (chunk, tokens) in ids.chunks(most).enumerate() {
            rows.extend(runner.prefill(&[Part { slot: 0, past_tokens: chunk * most, tokens, rows: Rows::All }])?);
        }
        for (position, (row, answer)) in rows.iter().zip(answers).enumerate() {
            answer.compare(&mut prefilled, row, &|| place(position));
        }
        if decoded {
            let rows = runner.decode_all(0, 0, ids)?;
            for (position, (row, answer)) in rows.iter().zip(answers).enumerate() {
                answer.compare(&mut stepwise, row, &|| place(position));
            }
        }
    }
    Ok(if decoded { vec![prefilled, stepwise] } else { vec![prefilled] })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row() -> Vec<f32> {
        (0..500u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 16) as f32 / 6553.6 - 5.0).collect()
    }

    fn error(change: impl FnOnce(&mut Vec<f32>)) -> f32 {
        let kept = ReferenceRow::new(&row(), 3).unwrap();
        let (mut case, mut row) = (CaseResult::new("case", 0.0), row());
        change(&mut row);
        kept.compare(&mut case, &row, &String::new);
        case.worst_error
    }

    #[test]
    fn a_row_that_is_changed_as_a_whole_is_seen() {
        let kept = ReferenceRow::new(&row(), 3).unwrap();
        assert_eq!((kept.top, kept.ids.len()), (TOP, TOP + OTHERS));
        assert!(kept.values[..TOP].is_sorted_by(|a, b| a >= b));
        assert_eq!(error(|_| {}), 0.0);
        assert!(error(|row| row.iter_mut().for_each(|v| *v += 1.0)) > 0.3, "shifted");
        assert!(error(|row| row.iter_mut().for_each(|v| *v *= 1.2)) > 0.19, "scaled");
        assert!(error(|row| row.rotate_left(1)) > 0.5, "ids off by one");
        assert!(error(|row| row[499] = 50.0) > 1.0, "a logit that should not be large");
        assert!(error(|row| row[1] = f32::NAN) == f32::INFINITY, "a NaN anywhere");
        assert!(ReferenceRow::new(&[1.0, f32::INFINITY], 0).unwrap_err().to_string().contains("token id 1"));
    }

    #[test]
    fn prompts_are_cut_into_steps_within_the_limits() {
        let prompt = |n: u32| ReferencePrompt { name: n.to_string(), token_ids: (0..n).collect() };
        let limits =
            Limits { slots: 2, max_sequence_tokens: 40, max_step_tokens: 7, max_logits_rows: 5, vocab_size: 50 };
        let prompts = [prompt(3), prompt(2), prompt(1), prompt(12), prompt(1), prompt(1)];
        let steps = steps(&prompts, &limits).unwrap();
        let places: Vec<(usize, u64)> = steps.iter().flat_map(|(_, places)| places.clone()).collect();
        assert_eq!(places.iter().map(|(_, seed)| *seed).collect::<Vec<_>>(), (0..20).collect::<Vec<_>>());
        let mut held = [0usize; 2];
        for (step, places) in &steps {
            assert_eq!(step.logits_rows().len(), places.len());
            for span in step.spans() {
                assert!(span.past_tokens == 0 || span.past_tokens == held[span.slot], "{span:?}");
                held[span.slot] = span.past_tokens + span.len;
            }
        }
        assert_eq!(steps.len(), 6);
    }

    #[test]
    fn answers_are_shared_by_targets_that_compute_alike() {
        let mut reference = Reference::new(vec![ReferencePrompt { name: "p".into(), token_ids: vec![1] }]);
        let rows = || vec![vec![ReferenceRow::new(&row(), 0).unwrap()]];
        reference.add("cpu", "bf16", "here".into(), rows());
        reference.expect_alike("a100", Some("cpu"));
        assert_eq!(reference.answers[0].targets, ["cpu", "a100"]);
        reference.add("cpu", "int8", "here".into(), rows());
        assert_eq!(reference.answers_for("a100").unwrap().precision, "bf16");
        assert_eq!(reference.answers_for("cpu").unwrap().precision, "int8");
        reference.expect_alike("a100", None);
        assert!(reference.answers_for("a100").is_none() && reference.answers.len() == 1);
    }
}
