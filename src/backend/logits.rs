//! Logits returned by a step: rows on the host, or still on a device.

use std::fmt;

use crate::error::{Error, Result};

/// The `k` largest logits of one row, `[k]`, in descending order. Every other logit of the row is at most as large as
/// the last one here; ties at that boundary may be broken either way. A NaN may be among them or may be left out: the sum
/// tells.
#[derive(Debug, Clone, Copy)]
pub struct Top<'a> {
    /// The logits.
    pub values: &'a [f32],
    /// Their token ids (columns of the row), without duplicates.
    pub ids: &'a [u32],
    /// Sum of all logits of the row in FP32, in any order. It is NaN or positive infinity if one of them is.
    pub sum: f32,
}

/// Rows of logits that stay on a device, with the largest logits of each already on the host.
pub trait DeferredLogits {
    /// Number of rows, in the order of [`Step::logits_rows`](super::Step::logits_rows).
    fn rows(&self) -> usize;

    /// Largest logits of row `row`; `row` is below [`DeferredLogits::rows`].
    fn top(&self, row: usize) -> Top<'_>;

    /// Copies row `row`, `[vocab_size]`, to the host; `row` is below [`DeferredLogits::rows`].
    ///
    /// # Errors
    /// Whatever the backend reports.
    fn fetch(&mut self, row: usize) -> Result<&[f32]>;
}

/// Rows of logits, FP32, `[rows, vocab_size]`, in the order of [`Step::logits_rows`](super::Step::logits_rows).
pub struct Logits<'a>(LogitsSource<'a>);

/// Location of the rows.
enum LogitsSource<'a> {
    /// The executor's own host buffer.
    Host { values: &'a [f32], vocab_size: usize },
    /// On a device; the executor fetches rows on demand.
    Deferred(&'a mut dyn DeferredLogits),
}

impl<'a> Logits<'a> {
    /// Wraps a buffer of complete rows.
    ///
    /// # Errors
    /// [`Error::Step`] if `values` is not a whole number of rows.
    pub fn new(values: &'a [f32], vocab_size: usize) -> Result<Logits<'a>> {
        if vocab_size == 0 || !values.len().is_multiple_of(vocab_size) {
            return Err(Error::Step(format!("{} logits are not whole rows of {vocab_size}", values.len())));
        }
        Ok(Logits(LogitsSource::Host { values, vocab_size }))
    }

    /// Wraps rows that are fetched on demand, one at a time.
    pub fn deferred(rows: &'a mut dyn DeferredLogits) -> Logits<'a> {
        Logits(LogitsSource::Deferred(rows))
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        match &self.0 {
            LogitsSource::Host { values, vocab_size } => values.len() / vocab_size,
            LogitsSource::Deferred(rows) => rows.rows(),
        }
    }

    /// The largest logits of row `index`, if they are on the host and the full row is not. `None` for rows on the host,
    /// which [`Logits::row`] returns at no cost, and past the last row.
    pub fn top(&self, index: usize) -> Option<Top<'_>> {
        match &self.0 {
            LogitsSource::Host { .. } => None,
            LogitsSource::Deferred(rows) => (index < rows.rows()).then(|| rows.top(index)),
        }
    }

    /// Row `index`, `[vocab_size]`, fetched if it is not on the host.
    ///
    /// # Errors
    /// [`Error::Step`] past the last row; any error of the executor's fetch.
    pub fn row(&mut self, index: usize) -> Result<&[f32]> {
        let count = self.rows();
        let missing = || Error::Step(format!("row {index} of logits, but the step returned {count}"));
        match &mut self.0 {
            LogitsSource::Host { values, vocab_size } => {
                values.chunks_exact(*vocab_size).nth(index).ok_or_else(missing)
            }
            LogitsSource::Deferred(rows) if index < count => rows.fetch(index),
            LogitsSource::Deferred(_) => Err(missing()),
        }
    }
}

impl fmt::Debug for Logits<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Logits").field("rows", &self.rows()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two rows of three logits; fetching the second fails.
    struct Remote;

    impl DeferredLogits for Remote {
        fn rows(&self) -> usize {
            2
        }

        fn top(&self, row: usize) -> Top<'_> {
            [Top { values: &[3.0], ids: &[2], sum: 6.0 }, Top { values: &[6.0], ids: &[0], sum: 15.0 }][row]
        }

        fn fetch(&mut self, row: usize) -> Result<&[f32]> {
            if row == 0 { Ok(&[1.0, 2.0, 3.0]) } else { Err(Error::Step("the device is gone".into())) }
        }
    }

    #[test]
    fn rows_on_the_host_are_given_as_they_are() {
        let values = [1.0, 2.0, 3.0, 4.0];
        let mut logits = Logits::new(&values, 2).unwrap();
        assert_eq!(logits.rows(), 2);
        assert!(logits.top(0).is_none());
        assert_eq!(logits.row(1).unwrap(), [3.0, 4.0]);
        assert!(logits.row(2).unwrap_err().to_string().contains("row 2 of logits, but the step returned 2"));
        assert!(Logits::new(&values, 3).unwrap_err().to_string().contains("4 logits are not whole rows of 3"));
        assert!(Logits::new(&values, 0).is_err());
        assert_eq!(Logits::new(&[], 3).unwrap().rows(), 0);
    }

    #[test]
    fn deferred_rows_are_fetched_when_asked_for() {
        let mut remote = Remote;
        let mut logits = Logits::deferred(&mut remote);
        assert_eq!(logits.rows(), 2);
        let top = logits.top(1).unwrap();
        assert_eq!((top.values, top.ids), (&[6.0][..], &[0][..]));
        assert_eq!(logits.row(0).unwrap(), [1.0, 2.0, 3.0]);
        assert!(logits.row(1).unwrap_err().to_string().contains("the device is gone"));
        assert!(logits.top(2).is_none());
        assert!(logits.row(2).unwrap_err().to_string().contains("row 2"));
    }
}
