//! Steps of a verification: runs tokens on an executor and reads back the rows of logits, holding every row to what the
//! executor says are its largest logits.

use super::compare::CaseResult;
use crate::backend::{Chunk, Executor, Limits, Logits, NextToken, Rows, Step, Top};
use crate::error::{Error, Result};

/// Name of the case of [`Runner::tops`].
pub(super) const TOP: &str = "largest logits are the row's";

/// New tokens of one sequence.
#[derive(Debug, Clone, Copy)]
pub(super) struct Part<'a> {
    pub slot: usize,
    pub past_tokens: usize,
    pub tokens: &'a [u32],
    pub rows: Rows,
}

/// Runs steps on an executor.
pub(super) struct Runner<'e> {
    executor: &'e mut dyn Executor,
    pub limits: Limits,
    /// Comparison of the largest logits, as the executor returns them, with the rows they belong to.
    pub tops: CaseResult,
    on_step: &'e dyn Fn() -> Result<()>,
}

impl<'e> Runner<'e> {
    /// `on_step` is called before each step and may end the verification with an error.
    pub fn new(executor: &'e mut dyn Executor, on_step: &'e dyn Fn() -> Result<()>) -> Runner<'e> {
        let limits = executor.limits().clone();
        Runner { executor, limits, tops: CaseResult::new(TOP, 0.0), on_step }
    }

    /// Most tokens of a step whose rows are all returned.
    pub fn most_rows(&self) -> usize {
        self.limits.max_step_tokens.min(self.limits.max_logits_rows)
    }

    /// Fills a slot; false if the executor cannot.
    pub fn fill(&mut self, slot: usize, byte: u8) -> Result<bool> {
        self.executor.fill_slot(slot, byte)
    }

    /// Zeroes a slot, unless the executor never reads what a sequence has not written.
    pub fn zero(&mut self, slot: usize) -> Result<()> {
        if self.executor.promises().ignores_unwritten { Ok(()) } else { self.executor.fill_slot(slot, 0).map(drop) }
    }

    /// Mends a slot after NaN.
    pub fn mend(&mut self, slot: usize) -> Result<()> {
        self.executor.mend_slot(slot)
    }

    /// Runs a prefill step and returns the requested rows, in order.
    pub fn prefill(&mut self, parts: &[Part<'_>]) -> Result<Vec<Vec<f32>>> {
        let chunks: Vec<Chunk<'_>> = parts
            .iter()
            .map(|part| {
                let Part { slot, past_tokens, tokens, rows } = *part;
                Chunk { slot, past_tokens, tokens, rows }
            })
            .collect();
        self.step(&Step::prefill(&self.limits, &chunks)?)
    }

    /// Runs a decode step and returns one row for each sequence. More sequences than a step takes are split.
    pub fn decode(&mut self, next: &[NextToken]) -> Result<Vec<Vec<f32>>> {
        let mut rows = Vec::with_capacity(next.len());
        for next in next.chunks(self.most_rows()) {
            rows.extend(self.step(&Step::decode(&self.limits, next)?)?);
        }
        Ok(rows)
    }

    /// Decodes `tokens` one by one in a slot; one row for each.
    pub fn decode_all(&mut self, slot: usize, past_tokens: usize, tokens: &[u32]) -> Result<Vec<Vec<f32>>> {
        let mut rows = Vec::with_capacity(tokens.len());
        for (index, token) in tokens.iter().enumerate() {
            rows.extend(self.decode(&[NextToken { slot, past_tokens: past_tokens + index, token: *token }])?);
        }
        Ok(rows)
    }

    /// Prefills tokens in a slot, as many at once as a step takes, without logits.
    pub fn fill_with(&mut self, slot: usize, past_tokens: usize, tokens: &[u32]) -> Result<()> {
        for (index, chunk) in tokens.chunks(self.limits.max_step_tokens).enumerate() {
            let past_tokens = past_tokens + index * self.limits.max_step_tokens;
            self.prefill(&[Part { slot, past_tokens, tokens: chunk, rows: Rows::None }])?;
        }
        Ok(())
    }

    fn step(&mut self, step: &Step) -> Result<Vec<Vec<f32>>> {
        (self.on_step)()?;
        let wanted = step.logits_rows().len();
        let vocab_size = self.limits.vocab_size;
        let rows = self.rows_of(step, wanted, vocab_size)?;
        // Cases use more slots than all fit in memory at full length: those of earlier steps may make room.
        step.spans().iter().for_each(|span| self.executor.release(span.slot));
        Ok(rows)
    }

    fn rows_of(&mut self, step: &Step, wanted: usize, vocab_size: usize) -> Result<Vec<Vec<f32>>> {
        let mut logits = self.executor.forward(step)?;
        if logits.rows() != wanted {
            return Err(Error::Step(format!("{} rows of logits, but the step asked for {wanted}", logits.rows())));
        }
        (0..wanted)
            .map(|index| {
                let row = logits.row(index)?.to_vec();
                if row.len() != vocab_size {
                    let found = row.len();
                    return Err(Error::Step(format!("a row of {found} logits, but the vocabulary has {vocab_size}")));
                }
                check_top(&mut self.tops, &logits, index, &row);
                Ok(row)
            })
            .collect()
    }
}

/// Error of a row's sum in FP32, relative to the sum of magnitudes. Kernels sum in parts, whose rounding stays far below
/// this; the sums of two rows of 256,000 independent logits differ by about 2e-3.
const SUM_TOLERANCE: f64 = 1e-4;

/// Compares the largest logits of row `index`, and the sum of all, if the executor returns them apart, with those of the row.
fn check_top(case: &mut CaseResult, logits: &Logits<'_>, index: usize, row: &[f32]) {
    let Some(Top { values, ids, sum }) = logits.top(index) else { return };
    case.rows += 1;
    let mut sorted: Vec<f32> = row.to_vec();
    let rank = |value: &f32| if value.is_nan() { f32::INFINITY } else { *value };
    let k = values.len().min(sorted.len());
    if k > 0 && k < sorted.len() {
        sorted.select_nth_unstable_by(k - 1, |a, b| rank(b).total_cmp(&rank(a)));
    }
    sorted.truncate(k);
    sorted.sort_unstable_by(|a, b| rank(b).total_cmp(&rank(a)));
    // Of the sum in FP32, all that matters is that no NaN or infinity can hide in it: it must be that of this row.
    let exact: f64 = row.iter().map(|value| f64::from(*value)).sum();
    let magnitude: f64 = row.iter().map(|value| f64::from(value.abs())).sum();
    let is_sum = match exact.is_finite() {
        true => (f64::from(sum) - exact).abs() <= SUM_TOLERANCE * magnitude,
        false => sum.is_nan() == exact.is_nan() && !sum.is_finite(),
    };
    if !is_sum {
        case.record(f32::INFINITY, None, sum, exact as f32, &|| format!("row {index}, the sum of its logits"));
    }
    if row.iter().any(|value| value.is_nan()) {
        // Whether NaN are among the largest, and in what order, is open: the sum has them.
        return;
    }
    for (rank, ((value, id), expected)) in values.iter().zip(ids).zip(&sorted).enumerate() {
        let of_id = row.get(*id as usize).copied().unwrap_or(f32::NAN);
        let repeats = ids.iter().take(rank).any(|other| other == id);
        let wrong = value.to_bits() != of_id.to_bits() || value.to_bits() != expected.to_bits() || repeats;
        if wrong {
            let expected = if value.to_bits() == expected.to_bits() { of_id } else { *expected };
            case.record(f32::INFINITY, Some(*id), *value, expected, &|| {
                format!("row {index}, rank {rank}{}", if repeats { ", an id that came before" } else { "" })
            });
        }
    }
    if values.len() != ids.len() || k == 0 {
        case.record(f32::INFINITY, None, values.len() as f32, ids.len() as f32, &|| {
            format!("row {index}, values and ids returned")
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::DeferredLogits;

    struct One<'a>(&'a [f32], &'a [f32], &'a [u32], f32);

    impl DeferredLogits for One<'_> {
        fn rows(&self) -> usize {
            1
        }

        fn top(&self, _: usize) -> Top<'_> {
            Top { values: self.1, ids: self.2, sum: self.3 }
        }

        fn fetch(&mut self, _: usize) -> Result<&[f32]> {
            Ok(self.0)
        }
    }

    fn holds(row: &[f32], values: &[f32], ids: &[u32]) -> bool {
        holds_with(row, values, ids, row.iter().sum())
    }

    fn holds_with(row: &[f32], values: &[f32], ids: &[u32], sum: f32) -> bool {
        let mut case = CaseResult::new(TOP, 0.0);
        let mut one = One(row, values, ids, sum);
        check_top(&mut case, &Logits::deferred(&mut one), 0, row);
        assert_eq!(case.rows, 1);
        case.passes()
    }

    #[test]
    fn largest_logits_are_held_to_the_row() {
        let row = [1.0, 5.0, 3.0, 5.0, -2.0];
        assert!(holds(&row, &[5.0, 5.0, 3.0], &[1, 3, 2]));
        assert!(holds(&row, &[5.0, 5.0, 3.0], &[3, 1, 2]), "ties in either order");
        assert!(!holds(&row, &[5.0, 5.0, 3.0], &[1, 1, 2]), "an id twice");
        assert!(!holds(&row, &[5.0, 5.0, 3.0], &[2, 4, 3]), "ids off by one");
        assert!(!holds(&row, &[5.0, 3.0, 1.0], &[1, 2, 0]), "a larger one is left out");
        assert!(!holds(&row, &[5.0, 3.0, 5.0], &[1, 2, 3]), "out of order");
        assert!(!holds(&row, &[5.0, 5.0], &[1, 9]), "an id past the row");
        assert!(!holds(&row, &[], &[]));
        let nan = [1.0, f32::NAN, 3.0];
        assert!(holds(&nan, &[f32::NAN, 3.0], &[1, 2]));
        assert!(holds(&nan, &[3.0, f32::NAN], &[2, 1]));
        assert!(holds(&nan, &[3.0, 1.0], &[2, 0]), "the sum tells");
        assert!(!holds_with(&nan, &[3.0, 1.0], &[2, 0], 4.0), "NaN must be seen");
        assert!(!holds_with(&nan, &[f32::NAN, 3.0], &[1, 2], f32::INFINITY));
        let sum = |sum| holds_with(&row, &[5.0, 5.0], &[1, 3], sum);
        assert!(sum(12.0) && sum(12.0001) && !sum(12.1) && !sum(f32::NAN), "of this row");
        let low = [1.0, f32::NEG_INFINITY];
        assert!(holds(&low, &[1.0], &[0]) && !holds_with(&low, &[1.0], &[0], 1.0));
    }
}
