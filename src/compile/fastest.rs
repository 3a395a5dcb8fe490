//! The choice between the ways to hold FP8 weights: each is compiled to a package of its own beside the one that is being
//! finished, verified and timed on the GPU, and the faster of those that verify is kept.

use std::path::Path;
use std::time::Instant;

use super::finish::{FinishJob, add_reference, publish, replace_plan};
use super::{PlanSummary, Recipe};
use crate::backend::tensorrt::GpuOptions;
use crate::backend::{Chunk, Executor, ExecutorOptions, NextToken, Rows, Step, select};
use crate::engine::tensorrt::Fp8Weights;
use crate::engine::{Manifest, Package, PackageWriter, PlanInfo};
use crate::error::{Error, Result};
use crate::verify::{Gate, Reference, VerifyOptions, open_unchecked};

/// Runs of a step before it is timed: contexts are created, kernels compiled and graphs captured in the first.
const WARM_UPS: usize = 3;
/// Timed runs of a step, whose median counts.
const RUNS: usize = 7;

/// Medians of a plan's steps.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepTimes {
    /// Prefill of a sequence's first `chunk_tokens` tokens.
    pub prefill_seconds: f64,
    /// As many as a step takes.
    pub chunk_tokens: usize,
    /// Decoding one sequence after these tokens.
    pub single_seconds: f64,
    /// Decoding `batch` such sequences together.
    pub batch_seconds: f64,
    /// As many as fit.
    pub batch: usize,
}

impl StepTimes {
    /// Shares of the single sequence, of the batch and of prefill in [`StepTimes::relative_to`].
    pub const SHARES: [f64; 3] = [0.3, 0.5, 0.2];

    /// Time as a multiple of another plan's: the weighted geometric mean of decoding one sequence, decoding one of as many
    /// as fit, and prefill.
    pub fn relative_to(&self, other: &StepTimes) -> f64 {
        let parts = |times: &StepTimes| {
            [times.single_seconds, times.batch_seconds / times.batch.max(1) as f64, times.prefill_seconds]
        };
        let ratios = parts(self).into_iter().zip(parts(other)).map(|(own, others)| (own / others).ln());
        ratios.zip(StepTimes::SHARES).map(|(ratio, share)| share * ratio).sum::<f64>().exp()
    }
}

/// One way to hold FP8 weights, as it was found to be.
#[derive(Debug, Clone, PartialEq)]
pub struct Fp8Trial {
    /// The way.
    pub kind: Fp8Weights,
    /// Seconds that compiling took, transposing weights included.
    pub compile_seconds: f64,
    /// Rows of logits that were verified and the times, or why the plan cannot be used.
    pub outcome: Result<(usize, StepTimes), String>,
}

/// The ways that were tried, and the one that was kept.
#[derive(Debug, Clone, PartialEq)]
pub struct Fp8Trials {
    /// Name of the GPU.
    pub gpu: String,
    /// All ways.
    pub trials: Vec<Fp8Trial>,
    /// The way of the plan that is kept.
    pub kept: Fp8Weights,
}

impl Fp8Trials {
    /// Timed runs of each step, whose median is reported.
    pub const RUNS: usize = RUNS;

    /// Time of a trial as a multiple of that of the first one with times.
    pub fn relative(&self, trial: &Fp8Trial) -> Option<f64> {
        let times = |trial: &Fp8Trial| trial.outcome.as_ref().ok().map(|(_, times)| *times);
        Some(times(trial)?.relative_to(&self.trials.iter().find_map(times)?))
    }
}

/// Compiles a plan in each of these ways, verifies and times each on the GPU, and adds the faster to the package that is
/// being written. `finished` are that package's manifest and reference so far.
///
/// # Errors
/// [`Error::Package`] if no plan can be used, with the reason for each; [`Error::Cancelled`]; any I/O error.
pub(super) fn choose(
    job: &FinishJob<'_>,
    recipe: &Recipe,
    kinds: &[Fp8Weights],
    writer: &mut PackageWriter,
    finished: (&Manifest, Option<&Reference>),
) -> Result<(PlanInfo, PlanSummary)> {
    let mut trials = Vec::with_capacity(kinds.len());
    let mut gpu = String::new();
    let mut best: Option<(StepTimes, Fp8Weights, PlanInfo, PlanSummary)> = None;
    let folder = |kind: &Fp8Weights| format!("as-{kind}");
    for kind in kinds {
        let started = Instant::now();
        let recipe = recipe.with_fp8_weights(*kind);
        let path = writer.scratch(&folder(kind));
        let compiled = candidate(job, &recipe, *kind, &path, finished);
        let compile_seconds = started.elapsed().as_secs_f64();
        let tried = compiled.and_then(|(info, summary)| Ok((try_out(job, &path, *kind, &mut gpu)?, info, summary)));
        let outcome = match tried {
            Err(Error::Cancelled) => return Err(Error::Cancelled),
            Err(error) => {
                let target = &job.old.target;
                job.progress.warn(&format!("plan {target} with FP8 weights as {kind} is not used: {error}"));
                Err(error.to_string())
            }
            Ok((Err(words), ..)) => {
                let target = &job.old.target;
                job.progress.warn(&format!("plan {target} with FP8 weights as {kind} gives wrong answers: {words}"));
                Err(format!("it gives wrong answers: {words}"))
            }
            Ok((Ok((rows, times)), info, summary)) => {
                if best.as_ref().is_none_or(|(fastest, ..)| times.relative_to(fastest) < 1.0) {
                    best = Some((times, *kind, info, summary));
                }
                Ok((rows, times))
            }
        };
        trials.push(Fp8Trial { kind: *kind, compile_seconds, outcome });
    }
    let Some((_, kept, info, mut summary)) = best else {
        let words = |trial: &Fp8Trial| {
            let reason = trial.outcome.as_ref().err().map_or("", String::as_str);
            format!("with FP8 weights as {}: {reason}", trial.kind)
        };
        let words: Vec<String> = trials.iter().map(words).collect();
        let detail = format!(
            "it is left as it is, since no plan for {} that was compiled here can be used; {}",
            job.old.target,
            words.join("; ")
        );
        return Err(Error::package(job.package.path(), detail));
    };
    let path = writer.scratch(&folder(&kept));
    let chosen = Package::open(&path)?;
    for file in info.files().filter(|file| **file != info.weights) {
        let file =
            chosen.manifest().file(file).ok_or_else(|| Error::internal(format!("no {file}"), "a plan's file"))?;
        writer.add_existing(&path, file)?;
    }
    for kind in kinds {
        let path = writer.scratch(&folder(kind));
        if path.exists() {
            std::fs::remove_dir_all(&path).map_err(Error::io("remove", &path))?;
        }
    }
    summary.fp8_trials = Some(Fp8Trials { gpu, trials, kept });
    Ok((info, summary))
}

/// Compiles a plan to a package at `path`, which shares all other files with the one that is finished.
fn candidate(
    job: &FinishJob<'_>,
    recipe: &Recipe,
    kind: Fp8Weights,
    path: &Path,
    (manifest, reference): (&Manifest, Option<&Reference>),
) -> Result<(PlanInfo, PlanSummary)> {
    let mut writer = PackageWriter::create(path, false)?;
    let limits = recipe.step_limits(job.old.limits.max_sequence_tokens, &manifest.model);
    let name = format!("{} with FP8 weights as {kind}", recipe.target.name());
    let (info, summary) = job.compile(recipe, &limits, &name, &mut writer)?;
    let mut manifest = manifest.clone();
    // Plans that wait for their turn to be compiled have no files yet.
    manifest.plans.retain(|plan| plan.target == "cpu");
    replace_plan(&mut manifest, info.clone());
    let mut added: Vec<String> = info.files().filter(|file| **file != info.weights).cloned().collect();
    if let Some(reference) = reference {
        added.extend(add_reference(reference.clone(), &mut writer, &mut manifest)?);
    }
    publish(job.package, writer, manifest, &added, Vec::new())?;
    Ok((info, summary))
}

/// Verifies and times the plan of a candidate. Returns the rows verified and the times, or what is wrong with its answers.
fn try_out(
    job: &FinishJob<'_>,
    path: &Path,
    kind: Fp8Weights,
    gpu: &mut String,
) -> Result<Result<(usize, StepTimes), String>> {
    let target = &job.old.target;
    let progress = &**job.progress;
    let package = Package::open(path)?;
    let gpu_options = GpuOptions { device: job.means.gpu(), ..GpuOptions::default() };
    let options = ExecutorOptions { target: Some(target.clone()), gpu: gpu_options, ..ExecutorOptions::default() };
    let selection = select(&package, &options)?;
    let gate = Gate::new(&package, &selection)?;
    let mut opened = open_unchecked(&package, &selection, &options)?;
    *gpu = job.means.timed_on().map(|gpu| gpu.name).unwrap_or_default();
    let go_on = || if progress.is_cancelled() { Err(Error::Cancelled) } else { Ok(()) };
    progress.work(&format!("verifying {target} with FP8 weights as {kind}"));
    let on_step = || {
        progress.advance(1);
        go_on()
    };
    let report = gate.verify(&mut opened, &VerifyOptions { most_tokens: None, on_step: &on_step })?;
    if !report.passes() {
        return Ok(Err(report.words()));
    }
    if let Err(reason) = gate.keep(&opened, &report, &options) {
        progress.warn(&format!("the verdict cannot be kept, so the next start verifies again: {reason}"));
    }
    progress.work(&format!("timing {target} with FP8 weights as {kind}"));
    Ok(Ok((report.rows(), step_times(&mut *opened.executor, &on_step)?)))
}

/// Times an executor's steps. `on_step` is called before each and may end it with an error.
///
/// # Errors
/// Any error of the executor; [`Error::Request`] if it has no room for one sequence.
fn step_times(executor: &mut dyn Executor, on_step: &dyn Fn() -> Result<()>) -> Result<StepTimes> {
    let limits = executor.limits().clone();
    let steps = WARM_UPS + RUNS;
    let chunk_tokens = limits.max_step_tokens.min(limits.max_sequence_tokens.saturating_sub(steps)).max(1);
    let tokens = (chunk_tokens + steps).min(limits.max_sequence_tokens);
    let token = |index: usize| (index.wrapping_mul(7919) % limits.vocab_size.max(1)) as u32;
    let prompt: Vec<u32> = (0..chunk_tokens).map(token).collect();
    let run = |executor: &mut dyn Executor, step: &Step| -> Result<f64> {
        on_step()?;
        let started = Instant::now();
        // The step is over when its largest logits are here.
        std::hint::black_box(executor.forward(step)?.top(0));
        Ok(started.elapsed().as_secs_f64())
    };
    let prefill = |slot| Step::prefill(&limits, &[Chunk { slot, past_tokens: 0, tokens: &prompt, rows: Rows::Last }]);
    let decode = |executor: &mut dyn Executor, batch: usize| -> Result<f64> {
        let mut times = Vec::with_capacity(steps);
        for index in 0..steps {
            // A short cache is written to its last position again and again.
            let past_tokens = (chunk_tokens + index).min(tokens - 1);
            let next: Vec<NextToken> =
                (0..batch).map(|slot| NextToken { slot, past_tokens, token: token(slot + index) }).collect();
            times.push(run(executor, &Step::decode(&limits, &next)?)?);
        }
        Ok(median(times.split_off(WARM_UPS)))
    };
    if !executor.reserve(0, tokens) {
        return Err(Error::Request(format!("the KV memory holds no sequence of {tokens} tokens")));
    }
    let mut times = Vec::with_capacity(steps);
    for _ in 0..steps {
        times.push(run(executor, &prefill(0)?)?);
    }
    let prefill_seconds = median(times.split_off(WARM_UPS));
    let single_seconds = decode(executor, 1)?;
    let batch = (1..limits.slots).take_while(|slot| executor.reserve(*slot, tokens)).count() + 1;
    for slot in 0..batch {
        run(executor, &prefill(slot)?)?;
    }
    let batch_seconds = decode(executor, batch)?;
    (0..batch).for_each(|slot| executor.release(slot));
    Ok(StepTimes { prefill_seconds, chunk_tokens, single_seconds, batch_seconds, batch })
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_compared_per_sequence_and_by_their_shares() {
        let inputs = StepTimes {
            prefill_seconds: 0.06,
            chunk_tokens: 1024,
            single_seconds: 0.006,
            batch_seconds: 0.02,
            batch: 56,
        };
        assert_eq!(inputs.relative_to(&inputs), 1.0);
        let close = |found: f64, expected: f64| assert!((found - expected).abs() < 1e-9, "{found} {expected}");
        // The same step for half as many sequences takes twice the time.
        close(StepTimes { batch: 28, ..inputs }.relative_to(&inputs), 2f64.powf(0.5));
        close(StepTimes { single_seconds: 0.003, ..inputs }.relative_to(&inputs), 0.5f64.powf(0.3));
        close(StepTimes { prefill_seconds: 0.03, ..inputs }.relative_to(&inputs), 0.5f64.powf(0.2));
        close(StepTimes::SHARES.iter().sum(), 1.0);
    }
}
