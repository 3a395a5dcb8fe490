//! A step of the runtime as runs of a plan.
//!
//! | part of the step | run |
//! | --- | --- |
//! | sequences with one new token each | one decode run over slots 0 to the last of them, rounded up to a bucket: batch row b is slot b |
//! | a sequence with more | prefill runs of its slot alone, in order, as long as tokens and wanted rows allow |
//!
//! **Idle rows.** A decode run also writes to the slots between that the step does not name. Such a row is given token 0
//! and its write goes to position `min(tokens, S - 1)`, where `tokens` is what the slot held after the last step that
//! named it. That position holds nothing that is ever read: the runtime owns the lengths, may cut a slot back, and a
//! slot holds nothing defined past the `past_tokens` it names next. It cannot name more than `tokens`, and not more than
//! `S - 1` either, since a step adds at least one token. So what is read later lies before the position.

use crate::backend::Step;
use crate::engine::Limits;
use crate::engine::tensorrt::Sizes;
use crate::error::{Error, Result};

/// Numbers of sequences that decode runs have: few, since each has kernels and a recorded graph of its own.
pub(super) fn buckets(slots: usize) -> Vec<usize> {
    let powers = [1, 2, 4].into_iter().chain((8..).step_by(8));
    let mut buckets: Vec<usize> = powers.take_while(|bucket| *bucket < slots).collect();
    buckets.push(slots);
    buckets
}

/// What decides how a step becomes runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct BatchingConstraints {
    /// What the executor promised.
    pub limits: Limits,
    /// What the plan was built for.
    pub sizes: Sizes,
    /// Whether there is a plan for first chunks.
    pub has_context_plan: bool,
    /// The first output row of a run is a multiple of this.
    pub row_align: usize,
}

impl BatchingConstraints {
    /// Output rows of decode runs; those of prefill runs come after them.
    pub(super) fn decode_rows(&self) -> usize {
        self.limits.slots.next_multiple_of(self.row_align)
    }

    /// Output rows of prefill runs: every wanted row, each in the worst case in a run of its own, and one that takes what
    /// nobody wants.
    pub(super) fn prefill_rows(&self) -> usize {
        self.limits.max_logits_rows * self.row_align + self.row_align
    }
}

/// Which plan and profile a run takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RunKind {
    /// The plan for first chunks.
    ContextPrefill,
    /// The plan that reads the cache, profile 0.
    CachedPrefill,
    /// The same, profile 1.
    Decode,
}

/// One run. Vectors are the inputs of these names, row-major.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PlanRun {
    pub kind: RunKind,
    /// The slot of batch row 0.
    pub first_slot: usize,
    /// B.
    pub sequences: usize,
    /// T.
    pub tokens: usize,
    /// `[B, T]`
    pub token_ids: Vec<i32>,
    /// `[B, T]`
    pub positions: Vec<i32>,
    /// `[B]`
    pub past_tokens: Vec<i32>,
    /// `[B]`
    pub total_tokens: Vec<i32>,
    /// `[R]`
    pub logits_rows: Vec<i32>,
    /// The output row of the first of R.
    pub output_row: usize,
}

/// A step's runs, and where its rows of logits are.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Schedule {
    pub runs: Vec<PlanRun>,
    /// The output row of each of [`Step::logits_rows`].
    pub rows: Vec<usize>,
}

/// Splits a step into runs. `held` is, for every slot, the tokens it holds after this step, or after the last that named
/// it.
///
/// # Errors
/// [`Error::Step`] if the step was made for other limits.
pub(super) fn schedule(step: &Step, held: &[usize], constraints: &BatchingConstraints) -> Result<Schedule> {
    let BatchingConstraints { limits, sizes, .. } = constraints;
    let fits = step.tokens().len() <= limits.max_step_tokens
        && step.logits_rows().len() <= limits.max_logits_rows
        && step.tokens().iter().all(|token| (*token as usize) < limits.vocab_size)
        && step.spans().iter().all(|span| {
            span.slot < limits.slots.min(held.len()) && span.past_tokens + span.len <= limits.max_sequence_tokens
        });
    if !fits {
        return Err(Error::Step("the step was made for another engine's limits".into()));
    }
    // Wanted rows ascend, as spans do, so each span's are the next of them.
    let mut wanted = step.logits_rows().iter().map(|row| *row as usize).peekable();
    let mut found = Schedule { runs: Vec::new(), rows: Vec::with_capacity(step.logits_rows().len()) };
    let last_decoding = step.spans().iter().filter(|span| span.len == 1).map(|span| span.slot).max();
    if let Some(last) = last_decoding {
        let sequences = buckets(limits.slots).into_iter().find(|bucket| *bucket > last).unwrap_or(limits.slots);
        found.runs.push(decode(sequences, step, held, sizes.max_sequence_tokens));
    }
    let mut next_row = constraints.decode_rows();
    let spare_row = next_row + limits.max_logits_rows * constraints.row_align;
    for span in step.spans() {
        let end = span.first + span.len;
        if span.len == 1 {
            if wanted.next_if(|row| *row < end).is_some() {
                found.rows.push(span.slot);
            }
            continue;
        }
        let mut first = span.first;
        while first < end {
            let mut rows = Vec::new();
            let mut next = first;
            while next < end && next - first < sizes.prefill_tokens {
                if wanted.peek() == Some(&next) {
                    if rows.len() == sizes.prefill_logits_rows {
                        break;
                    }
                    wanted.next();
                    rows.push((next - first) as i32);
                }
                next += 1;
            }
            let output_row = if rows.is_empty() { spare_row } else { next_row };
            found.rows.extend((0..rows.len()).map(|row| output_row + row));
            next_row += rows.len().next_multiple_of(constraints.row_align);
            if rows.is_empty() {
                rows.push(0); // a run has at least one
            }
            let past = span.past_tokens + (first - span.first);
            found.runs.push(PlanRun {
                kind: if past == 0 && constraints.has_context_plan {
                    RunKind::ContextPrefill
                } else {
                    RunKind::CachedPrefill
                },
                first_slot: span.slot,
                sequences: 1,
                tokens: next - first,
                token_ids: step.tokens()[first..next].iter().map(|token| *token as i32).collect(),
                positions: (past..past + next - first).map(|position| position as i32).collect(),
                past_tokens: vec![past as i32],
                total_tokens: vec![(past + next - first) as i32],
                logits_rows: rows,
                output_row,
            });
            first = next;
        }
    }
    Ok(found)
}

/// A token for each of the first slots: the step's, where it names the slot with one, else idle.
fn decode(sequences: usize, step: &Step, held: &[usize], max_sequence_tokens: usize) -> PlanRun {
    let idle = |slot: usize| held[slot].min(max_sequence_tokens - 1) as i32;
    let mut run = PlanRun {
        kind: RunKind::Decode,
        first_slot: 0,
        sequences,
        tokens: 1,
        token_ids: vec![0; sequences],
        positions: (0..sequences).map(idle).collect(),
        past_tokens: (0..sequences).map(idle).collect(),
        total_tokens: vec![1; sequences],
        logits_rows: (0..sequences as i32).collect(),
        output_row: 0,
    };
    for span in step.spans().iter().filter(|span| span.len == 1) {
        run.token_ids[span.slot] = step.tokens()[span.first] as i32;
        run.positions[span.slot] = span.past_tokens as i32;
        run.past_tokens[span.slot] = span.past_tokens as i32;
        run.total_tokens[span.slot] = span.past_tokens as i32 + 1;
    }
    run
}

#[cfg(test)]
mod tests;
