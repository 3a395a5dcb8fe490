//! Verification: a plan proves itself before it answers.
//!
//! A GPU plan is compiled by a library that has been seen to answer wrongly without an error, on cards that nobody has
//! tried it on. So a plan is held to two kinds of cases, over nothing but the interface that the runtime uses:
//!
//! | kind | cases |
//! | --- | --- |
//! | alone | the same tokens give the same logits whichever way they are computed: prefilled, chunked, decoded, beside others, at every batch size, after another sequence, over junk, up to the last position; the largest logits are the row's; NaN is seen |
//! | reference | the logits are those that the CPU executor computed when the package was built |
//!
//! [`verify()`] runs them on any [`Executor`] and returns a [`Report`]. [`open`] opens a plan for the runtime and, for a
//! plan on a GPU, verifies it first unless it has passed before on the same card, driver and library
//! (records are in the user's cache). What this proves and what it cannot is in docs/verify.md.

mod alone;
mod compare;
mod dice;
mod gate;
mod prompts;
mod record;
mod reference;
mod run;
mod tolerance;

use serde::Serialize;

pub use compare::{CaseResult, RowStats, WorstLogit, row_error};
pub use gate::{Gate, OpenedPlan, open, open_unchecked};
pub use prompts::prompts;
pub use reference::{Reference, ReferenceAnswers, ReferencePrompt, ReferenceRow};
pub use tolerance::{limit_on_cpu, limit_on_gpu};

use self::alone::AloneCases;
use self::dice::Dice;
use self::run::Runner;
use crate::backend::{Executor, Limits};
use crate::error::Result;

/// Options of a verification.
#[derive(Clone, Copy)]
pub struct VerifyOptions<'a> {
    /// Most tokens of a sequence; `None` fills a slot to its last position.
    pub most_tokens: Option<usize>,
    /// Called before each step; an error ends the verification.
    pub on_step: &'a dyn Fn() -> Result<()>,
}

impl Default for VerifyOptions<'_> {
    fn default() -> Self {
        VerifyOptions { most_tokens: None, on_step: &|| Ok(()) }
    }
}

/// Errors allowed to a plan.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ErrorLimits {
    /// Largest error of a row between two ways to compute it. Executors that promise the same bits get 0.
    pub alone: f32,
    /// Largest error of a row against the reference.
    pub reference: f32,
}

/// Result of a verification.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// The cases, in the order they ran.
    pub cases: Vec<CaseResult>,
    /// Seconds that it took.
    pub seconds: f64,
}

impl Report {
    /// Returns true if all cases passed.
    pub fn passes(&self) -> bool {
        self.cases.iter().all(CaseResult::passes)
    }

    /// The cases that failed.
    pub fn failures(&self) -> impl Iterator<Item = &CaseResult> {
        self.cases.iter().filter(|case| !case.passes())
    }

    /// Rows of logits compared.
    pub fn rows(&self) -> usize {
        self.cases.iter().map(|case| case.rows).sum()
    }

    /// The failures in words, on one line; empty if there are none.
    pub fn words(&self) -> String {
        let one = |case: &CaseResult| {
            let worst = case.worst.as_ref().map_or(String::new(), |worst| format!(" ({worst})"));
            format!("{}: error {:.2e}, at most {:.2e} is allowed{worst}", case.case, case.worst_error, case.limit)
        };
        self.failures().map(one).collect::<Vec<_>>().join("; ")
    }
}

/// Verifies an executor. All its slots are overwritten and, where it has access to its KV memory, left zeroed.
/// `expected` are a package's reference and the answers expected of the plan.
///
/// # Errors
/// Any error of the executor, and of `options.on_step`. A wrong answer is not an error: the [`Report`] has it.
pub fn verify(
    executor: &mut dyn Executor,
    limits: ErrorLimits,
    expected: Option<(&Reference, &ReferenceAnswers)>,
    options: &VerifyOptions<'_>,
) -> Result<Report> {
    let started = std::time::Instant::now();
    let promises = executor.promises();
    let mut runner = Runner::new(executor, options.on_step);
    let mut cases = AloneCases::run(&mut runner, promises, limits.alone, options)?;
    if let Some((reference, answers)) = expected {
        let decoded = !promises.same_bits; // otherwise decoding has been held to the same bits above
        cases.extend(reference::compare(&mut runner, reference, answers, limits.reference, decoded)?);
    }
    for slot in 0..runner.limits.slots {
        runner.zero(slot)?;
    }
    cases.push(runner.tops);
    cases.retain(|case| case.rows > 0 || case.skipped.is_some() || !case.passes());
    Ok(Report { cases, seconds: started.elapsed().as_secs_f64() })
}

/// Token ids that look arbitrary, the same in each run.
fn sample_tokens(limits: &Limits, seed: u64, count: usize) -> Vec<u32> {
    let mut dice = Dice::new(seed + 1);
    (0..count).map(|_| dice.below(limits.vocab_size) as u32).collect()
}
