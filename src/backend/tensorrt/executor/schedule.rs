//! Scheduling: splits a step of the runtime into runs of a plan.
//!
//! | part of the step | run |
//! | --- | --- |
//! | sequences with one new token each | one decode run over slots 0 to the last of them, rounded up to a bucket size: batch row b is slot b |
//! | a sequence with more | prefill runs of its slot alone, in order, each as long as the token and row limits allow |
//!
//! **Idle rows.** A decode run also writes to slots in its range that the step does not name. Such a row gets token 0
//! and writes at position `min(tokens, S - 1)`, where `tokens` is the length of the slot after the last step that named
//! it. Nothing ever reads that entry: the runtime owns the lengths and may truncate a slot, and entries at or past the
//! `past_tokens` of the slot's next step count as undefined. That `past_tokens` is at most `tokens`, and at most `S -
//! 1` since a step adds at least one token, so everything read later lies before the idle write.

use crate::backend::Step;
use crate::engine::Limits;
use crate::engine::tensorrt::Sizes;
use crate::error::{Error, Result};

/// Batch sizes of decode runs. They are few, since each has specialized kernels and a CUDA graph of its own.
pub(super) fn buckets(slots: usize) -> Vec<usize> {
    let powers = [1, 2, 4].into_iter().chain((8..).step_by(8));
    let mut buckets: Vec<usize> = powers.take_while(|bucket| *bucket < slots).collect();
    buckets.push(slots);
    buckets
}

/// Batching constraints: the limits within which a step is split into runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct BatchingConstraints {
    /// Limits the executor announces to the runtime.
    pub limits: Limits,
    /// Sizes the plan was built for.
    pub sizes: Sizes,
    /// A separate plan prefills sequences that have no past.
    pub has_context_plan: bool,
    /// Required alignment of a run's first output row, in rows.
    pub row_align: usize,
}

impl BatchingConstraints {
    /// Number of output rows reserved for decode runs; the prefill rows follow.
    pub(super) fn decode_rows(&self) -> usize {
        self.limits.slots.next_multiple_of(self.row_align)
    }

    /// Number of output rows reserved for prefill runs: in the worst case each requested row is in a run of its own,
    /// plus a spare one for the output of runs without requested rows.
    pub(super) fn prefill_rows(&self) -> usize {
        self.limits.max_logits_rows * self.row_align + self.row_align
    }
}

/// Plan and profile of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RunKind {
    /// The context plan: prefill of sequences without a past.
    ContextPrefill,
    /// Profile 0 of the plan that reads the cache: prefill of later chunks.
    CachedPrefill,
    /// Profile 1 of the same plan.
    Decode,
}

/// One run of a plan. Vectors are the inputs of the same names, row-major.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PlanRun {
    pub kind: RunKind,
    /// Slot of batch row 0.
    pub first_slot: usize,
    /// B, the batch size.
    pub sequences: usize,
    /// T, new tokens per sequence.
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
    /// Output row of the first of the R logits rows.
    pub output_row: usize,
}

/// The runs of a step, and the location of its logits.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Schedule {
    pub runs: Vec<PlanRun>,
    /// Output row of each entry of [`Step::logits_rows`].
    pub rows: Vec<usize>,
}

/// Splits a step into runs. `held` is the number of tokens in every slot after this step, or after the last step that
/// named it.
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
    // Requested rows ascend, as spans do, so each span's rows are next in line.
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
                rows.push(0); // R is at least 1 in the profile
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

/// The decode run over the first slots: the step's token for slots it decodes, an idle row for the others.
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
