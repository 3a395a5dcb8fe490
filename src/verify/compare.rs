//! Comparison of rows of logits, and the result of a case.
//!
//! The error of a row is the root mean square of the differences between logits of the same id, or a sixth of the
//! largest difference if that is more, relative to the standard deviation of the expected row. Rounding errors spread
//! over a row like a normal distribution, whose largest of 10⁵ samples is below six deviations, so for them the mean
//! decides, which varies little; a single wrong logit shows up in the largest. Unlike a difference of probabilities the
//! measure also sees what softmax hides, such as a shift of all logits.

use std::fmt;

use serde::Serialize;

/// Mean and standard deviation of a row of logits.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RowStats {
    /// Mean.
    pub mean: f32,
    /// Standard deviation.
    pub deviation: f32,
}

impl RowStats {
    /// The statistics of a row, summed in FP64.
    pub fn of(row: &[f32]) -> RowStats {
        let count = row.len().max(1) as f64;
        let mean = row.iter().map(|v| f64::from(*v)).sum::<f64>() / count;
        let variance = row.iter().map(|v| (f64::from(*v) - mean).powi(2)).sum::<f64>() / count;
        RowStats { mean: mean as f32, deviation: variance.sqrt() as f32 }
    }

    /// `difference` in units of the deviation. NaN becomes infinite, and any difference of a constant row is large.
    pub fn relative(&self, difference: f32) -> f32 {
        if difference == 0.0 {
            return 0.0;
        }
        let error = difference.abs() / self.deviation.max(f32::MIN_POSITIVE);
        if error.is_nan() { f32::INFINITY } else { error }
    }
}

/// Deviations within which the largest of a row's rounding errors stays.
const LARGEST_OF_ROW: f32 = 6.0;

/// The error of a row, and the index of its largest difference; docs/verify.md has its definition. `stats` are the
/// expected row's. NaN gives an infinite error, and bits that differ in any way one above 0.
pub fn row_error(found: &[f32], expected: &[f32], stats: RowStats) -> (f32, usize) {
    let (mut squares, mut largest, mut at, mut same) = (0f64, 0f32, 0, true);
    for (index, (a, b)) in found.iter().zip(expected).enumerate() {
        let difference = (a - b).abs();
        squares += f64::from(difference).powi(2);
        same &= a.to_bits() == b.to_bits();
        if difference > largest || difference.is_nan() && !largest.is_nan() {
            (largest, at) = (difference, index);
        }
    }
    if same {
        return (0.0, at);
    }
    let mean = (squares / found.len().max(1) as f64).sqrt() as f32;
    let error = if largest.is_nan() { f32::NAN } else { mean.max(largest / LARGEST_OF_ROW) };
    (stats.relative(error).max(f32::MIN_POSITIVE), at)
}

/// The worst logit of a case: where it is, and both values.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct WorstLogit {
    /// The run that gave it, in words, such as "chunks of 5, position 17".
    pub place: String,
    /// Token id of the logit; `None` for a statistic of the row.
    pub id: Option<u32>,
    /// Value found.
    pub found: f32,
    /// Value expected.
    pub expected: f32,
}

impl fmt::Display for WorstLogit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let WorstLogit { place, id, found, expected } = self;
        match id {
            Some(id) => write!(f, "{place}, token id {id}: {found} instead of {expected}"),
            None => write!(f, "{place}: {found} instead of {expected}"),
        }
    }
}

/// Result of one case.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CaseResult {
    /// Name of the case.
    pub case: &'static str,
    /// Rows of logits compared.
    pub rows: usize,
    /// Largest error of a row; docs/verify.md has its definition.
    pub worst_error: f32,
    /// Largest error that passes; 0 asks for the same bits.
    pub limit: f32,
    /// The logit with the largest error, if there is an error at all.
    pub worst: Option<WorstLogit>,
    /// Reason why the case, or a part of it, did not run.
    pub skipped: Option<String>,
}

impl CaseResult {
    /// A case that has compared nothing yet.
    pub(super) fn new(case: &'static str, limit: f32) -> CaseResult {
        CaseResult { case, rows: 0, worst_error: 0.0, limit, worst: None, skipped: None }
    }

    /// Returns true if no row's error exceeds the limit.
    pub fn passes(&self) -> bool {
        self.worst_error <= self.limit
    }

    /// Records an error; `place` is called only for the worst so far.
    pub(super) fn record(
        &mut self,
        error: f32,
        id: Option<u32>,
        found: f32,
        expected: f32,
        place: &dyn Fn() -> String,
    ) {
        if error > self.worst_error || (error > 0.0 && self.worst.is_none()) {
            self.worst_error = error;
            self.worst = Some(WorstLogit { place: place(), id, found, expected });
        }
    }

    /// Compares a whole row with the expected one.
    pub(super) fn compare(&mut self, found: &[f32], expected: &[f32], place: &dyn Fn() -> String) {
        self.rows += 1;
        if found.len() != expected.len() {
            let (found, expected) = (found.len() as f32, expected.len() as f32);
            self.record(f32::INFINITY, None, found, expected, &|| format!("{}, length of the row", place()));
            return;
        }
        let (error, at) = row_error(found, expected, RowStats::of(expected));
        if let (true, Some(a), Some(b)) = (error > 0.0, found.get(at), expected.get(at)) {
            self.record(error, Some(at as u32), *a, *b, place);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_relative_to_the_deviation() {
        let stats = RowStats::of(&[1.0, 3.0, 1.0, 3.0]);
        assert_eq!(stats, RowStats { mean: 2.0, deviation: 1.0 });
        let mut case = CaseResult::new("case", 0.1);
        case.compare(&[1.0, 3.0, 1.0, 3.1], &[1.0, 3.0, 1.0, 3.0], &|| "here".into());
        assert!(case.passes() && (case.worst_error - 0.05).abs() < 1e-6, "{case:?}");
        let (mut spiked, zeros) = ([0f32; 1000], [0f32; 1000]);
        spiked[7] = 3.0;
        assert_eq!(row_error(&spiked, &zeros, stats), (0.5, 7), "a single wrong logit is not averaged away");
        case.compare(&[1.0, 2.0, 1.0, 3.0], &[1.0, 3.0, 1.0, 3.0], &|| "there".into());
        assert!(!case.passes());
        assert_eq!(case.worst.unwrap().to_string(), "there, token id 1: 2 instead of 3");
        assert_eq!(case.rows, 2);
    }

    #[test]
    fn nan_and_single_bits_are_seen() {
        let mut case = CaseResult::new("case", 0.0);
        case.compare(&[1.0, 2.0], &[1.0, 2.0], &String::new);
        assert!(case.passes());
        case.compare(&[-0.0, 2.0], &[0.0, 2.0], &String::new);
        assert!(!case.passes(), "a limit of 0 asks for the same bits");
        let mut case = CaseResult::new("case", 1e9);
        case.compare(&[1.0, f32::NAN], &[1.0, 2.0], &String::new);
        assert!(!case.passes() && case.worst_error == f32::INFINITY);
        let mut case = CaseResult::new("case", 1e9);
        case.compare(&[1.0], &[1.0, 2.0], &String::new);
        assert!(!case.passes());
        let mut case = CaseResult::new("case", 1.0);
        case.compare(&[1.0, 1.0001], &[1.0, 1.0], &String::new);
        assert!(!case.passes(), "a constant row has no deviation");
    }
}
