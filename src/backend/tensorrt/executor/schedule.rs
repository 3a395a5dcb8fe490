//! Scheduling: splits a step of the runtime into runs of plans.
//!
//! | part of the step | run |
//! | --- | --- |
//! | sequences of one capacity class with one new token each | one decode run of the class over row 0 to the last of them, rounded up to a bucket size |
//! | a sequence with more | prefill runs of its row alone, in order, each as long as the token and row limits allow, rounded up to a bucket of tokens |
//!
//! Where a class has too few rows for the bucket, its rows are decoded in several runs of smaller buckets.
//!
//! **Padding.** A prefill run computes token 0 after its own tokens until its bucket is full, since every number of tokens
//! has kernels of its own. Their entries lie past what the run was asked for, where entries count as undefined, and no
//! requested row attends to them: a query attends to nothing past its own position. Where they would lie past the row's
//! capacity, which no plan may write, the tokens are split into buckets that they fill instead.
//!
//! **Idle rows.** A decode run also writes to rows in its range that the step does not decode. Such a row gets token 0,
//! attends to one key, and writes at position `min(tokens, S - 1)`, where `tokens` is the length of its slot after the
//! last step that named it. Nothing ever reads that entry: the runtime owns the lengths and may truncate a slot, and
//! entries at or past the `past_tokens` of the slot's next step count as undefined. That `past_tokens` is at most
//! `tokens`, which is at most `S - 1` except in the largest class; there it is at most `S - 1` since a step adds at least
//! one token. So everything read later lies before the idle write.

use super::placement::{ClassRow, Placement};
use crate::backend::{Span, Step};
use crate::engine::Limits;
use crate::engine::tensorrt::Sizes;
use crate::error::{Error, Result};

/// The next batch size of decode runs from `rows` on, of a plan for at most `most`. There are few, since each has
/// specialized kernels and a CUDA graph of its own: powers of two up to 8, then four or so to each doubling.
pub(super) fn bucket(rows: usize, most: usize) -> usize {
    let size = match rows {
        0..=8 => rows.max(1).next_power_of_two(),
        _ => rows.next_multiple_of((1 << (rows.ilog2() - 2)).max(8)),
    };
    size.min(most.max(1))
}

/// Least number of tokens that a prefill run is padded to: fewer take as long, since reading the weights does.
pub(super) const LEAST_PREFILL_TOKENS: usize = 8;

/// The next number of tokens of prefill runs from `tokens` on, of a plan for at most `most`: 8, 16, 32, 64, then four to
/// each doubling, so that beyond 64 at most a quarter is added.
pub(super) fn prefill_bucket(tokens: usize, most: usize) -> usize {
    let size = match tokens {
        0..=64 => tokens.max(LEAST_PREFILL_TOKENS).next_power_of_two(),
        _ => tokens.next_multiple_of(1 << (tokens.ilog2() - 2)),
    };
    size.min(most.max(1))
}

/// The largest bucket that `tokens` fill: below 8 tokens, a power of two.
fn filled_bucket(tokens: usize, most: usize) -> usize {
    let tokens = tokens.clamp(1, most.max(1));
    let is_filled =
        |size: &usize| prefill_bucket(*size, most) == *size || *size < LEAST_PREFILL_TOKENS && size.is_power_of_two();
    (1..=tokens).rev().find(is_filled).unwrap_or(1)
}

/// The batches, as first row and size, that decode the first `needed` of a class's `rows`.
fn batches(needed: usize, rows: usize, most: usize) -> Vec<(usize, usize)> {
    let mut found = Vec::new();
    let mut first = 0;
    while first < needed {
        let rest = needed - first;
        let whole = bucket(rest, most);
        // The largest bucket that is no larger than the rest; 1 always is one.
        let part = || (1..=rest).rev().find(|size| bucket(*size, most) == *size).unwrap_or(1);
        let size = if first + whole <= rows { whole } else { part() };
        found.push((first, size));
        first += size;
    }
    found
}

/// Most batches that one class is decoded in: the rest of each is less than half of it.
const MOST_BATCHES: usize = 12;

/// Batching constraints: the limits within which a step is split into runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct BatchingConstraints {
    /// Limits the executor announces to the runtime.
    pub limits: Limits,
    /// The capacity classes, ascending.
    pub classes: Vec<ClassConstraints>,
    /// Rows of all classes together, at most.
    pub rows: usize,
    /// Required alignment of a run's first output row, in rows.
    pub row_align: usize,
}

/// Constraints of one capacity class.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ClassConstraints {
    /// Sizes the class's plans were built for.
    pub sizes: Sizes,
    /// A separate plan prefills sequences that have no past.
    pub has_context_plan: bool,
}

impl BatchingConstraints {
    /// Number of output rows reserved for decode runs; the prefill rows follow.
    pub(super) fn decode_rows(&self) -> usize {
        let gaps = self.classes.len() * MOST_BATCHES * (self.row_align - 1);
        (self.rows + gaps).next_multiple_of(self.row_align)
    }

    /// Output row of prefill runs of which no row is wanted.
    pub(super) fn spare_row(&self) -> usize {
        self.decode_rows() + self.limits.max_logits_rows * self.row_align
    }

    /// Number of output rows reserved for prefill runs: in the worst case each requested row is in a run of its own,
    /// plus a spare one for the output of runs without requested rows.
    pub(super) fn prefill_rows(&self) -> usize {
        self.limits.max_logits_rows * self.row_align + self.row_align
    }
}

/// Plan and profile of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum RunKind {
    /// The context plan: prefill of sequences without a past.
    ContextPrefill,
    /// Profile 0 of the plan that reads the cache: prefill of later chunks.
    CachedPrefill,
    /// A later profile of the same plan: the one for the batch.
    Decode,
}

/// One run of a plan. Vectors are the inputs of the same names, row-major.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PlanRun {
    pub kind: RunKind,
    /// Row of batch row 0, and the class.
    pub first: ClassRow,
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
    /// `[B]`: keys that the last query attends to.
    pub total_tokens: Vec<i32>,
    /// `[R]`
    pub logits_rows: Vec<i32>,
    /// Output row of the first of the R logits rows.
    pub output_row: usize,
}

impl PlanRun {
    /// What determines the run's kernels.
    pub(super) fn shape(&self) -> RunShape {
        let size = if self.kind == RunKind::Decode { self.sequences } else { self.tokens };
        RunShape { class: self.first.class, kind: self.kind, size }
    }
}

/// What determines the kernels of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct RunShape {
    pub class: usize,
    pub kind: RunKind,
    /// Sequences of a decode run, tokens of a prefill run.
    pub size: usize,
}

/// The runs of a step, and the location of its logits.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Schedule {
    pub runs: Vec<PlanRun>,
    /// Output row of each entry of [`Step::logits_rows`].
    pub rows: Vec<usize>,
}

/// Splits a step into runs. `placement` has a row for each of its slots, and is as after the step.
///
/// # Errors
/// [`Error::Internal`] if a slot has no row.
pub(super) fn schedule(step: &Step, placement: &Placement, constraints: &BatchingConstraints) -> Result<Schedule> {
    let mut found = Schedule { runs: Vec::new(), rows: Vec::with_capacity(step.logits_rows().len()) };
    let mut next_row = 0;
    let mut output_rows = vec![0; constraints.limits.slots];
    let mut decoded: Vec<Option<&Span>> = vec![None; constraints.limits.slots];
    for span in step.spans().iter().filter(|span| span.len == 1) {
        if let Some(place) = decoded.get_mut(span.slot) {
            *place = Some(span);
        }
    }
    for (class, class_constraints) in constraints.classes.iter().enumerate() {
        let of_slot = |slot: usize| decoded.get(slot).copied().flatten();
        let spans: Vec<Option<&Span>> = placement.rows(class).iter().map(|slot| slot.and_then(of_slot)).collect();
        let class_row = next_row;
        next_row = (next_row + spans.len()).next_multiple_of(constraints.row_align);
        let Some(last) = spans.iter().rposition(Option::is_some) else { continue };
        let sizes = &class_constraints.sizes;
        let mut output_row = class_row;
        for (row, sequences) in batches(last + 1, spans.len(), sizes.decode_sequences) {
            let Some(batch) = spans.get(row..row + sequences) else {
                return Err(Error::internal(format!("a batch of {sequences} rows from {row}"), "rows of its class"));
            };
            if batch.iter().all(Option::is_none) {
                continue;
            }
            for (index, span) in batch.iter().enumerate() {
                if let Some(row) = span.and_then(|span| output_rows.get_mut(span.slot)) {
                    *row = output_row + index;
                }
            }
            let first = ClassRow { class, row };
            let mut run = decode(first, batch, step, placement, sizes.max_sequence_tokens);
            run.output_row = output_row;
            output_row = (output_row + sequences).next_multiple_of(constraints.row_align);
            next_row = next_row.max(output_row);
            found.runs.push(run);
        }
    }
    // Requested rows ascend, as spans do, so each span's rows are next in line.
    let mut wanted = step.logits_rows();
    let mut next_row = constraints.decode_rows();
    let spare_row = constraints.spare_row();
    for span in step.spans() {
        let end = span.first + span.len;
        if span.len == 1 {
            if let [row, rest @ ..] = wanted
                && (*row as usize) < end
            {
                wanted = rest;
                found.rows.push(output_rows.get(span.slot).copied().unwrap_or(spare_row));
            }
            continue;
        }
        let place = placement.place(span.slot);
        let place =
            place.ok_or_else(|| Error::internal(format!("slot {} has no row", span.slot), "one after it is placed"))?;
        let ClassConstraints { sizes, has_context_plan } = &constraints.classes[place.class];
        let mut first = span.first;
        while first < end {
            let past = span.past_tokens + (first - span.first);
            // Up to the token whose row would be one too many.
            let most_rows = wanted.get(sizes.prefill_logits_rows).map_or(end, |row| (*row as usize).min(end));
            let count = (most_rows - first).min(sizes.prefill_tokens);
            let padded = prefill_bucket(count, sizes.prefill_tokens);
            let tokens = match past + padded <= sizes.max_sequence_tokens {
                true => padded,
                false => filled_bucket(count, sizes.prefill_tokens),
            };
            let next = first + count.min(tokens);
            let (of_run, rest) = wanted.split_at(wanted.partition_point(|row| (*row as usize) < next));
            wanted = rest;
            let mut rows: Vec<i32> = of_run.iter().map(|row| (*row as usize - first) as i32).collect();
            let output_row = if rows.is_empty() { spare_row } else { next_row };
            found.rows.extend((0..rows.len()).map(|row| output_row + row));
            next_row += rows.len().next_multiple_of(constraints.row_align);
            if rows.is_empty() {
                rows.push(0); // R is at least 1 in the profile
            }
            let mut token_ids: Vec<i32> = step.tokens()[first..next].iter().map(|token| *token as i32).collect();
            token_ids.resize(tokens, 0);
            found.runs.push(PlanRun {
                kind: if past == 0 && *has_context_plan { RunKind::ContextPrefill } else { RunKind::CachedPrefill },
                first: place,
                sequences: 1,
                tokens,
                token_ids,
                positions: (past..past + tokens).map(|position| position as i32).collect(),
                past_tokens: vec![past as i32],
                total_tokens: vec![(past + tokens) as i32],
                logits_rows: rows,
                output_row,
            });
            first = next;
        }
    }
    Ok(found)
}

/// The decode run over a batch of a class's rows: the step's token for rows it decodes, an idle row for the others.
fn decode(first: ClassRow, batch: &[Option<&Span>], step: &Step, placement: &Placement, capacity: usize) -> PlanRun {
    let rows = placement.rows(first.class).get(first.row..).unwrap_or_default();
    let held = |slot: &Option<usize>| slot.map_or(0, |slot| placement.held(slot));
    let idle: Vec<i32> = rows.iter().take(batch.len()).map(|slot| held(slot).min(capacity - 1) as i32).collect();
    let mut run = PlanRun {
        kind: RunKind::Decode,
        first,
        sequences: batch.len(),
        tokens: 1,
        token_ids: vec![0; batch.len()],
        positions: idle.clone(),
        past_tokens: idle,
        total_tokens: vec![1; batch.len()],
        logits_rows: (0..batch.len() as i32).collect(),
        output_row: 0,
    };
    for (row, span) in batch.iter().enumerate().filter_map(|(row, span)| Some((row, (*span)?))) {
        run.token_ids[row] = step.tokens()[span.first] as i32;
        run.positions[row] = span.past_tokens as i32;
        run.past_tokens[row] = span.past_tokens as i32;
        run.total_tokens[row] = span.past_tokens as i32 + 1;
    }
    run
}

#[cfg(test)]
mod tests;
