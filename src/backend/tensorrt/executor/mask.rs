//! The attention mask of a run, `bool[B, 1, T, S]`: a query attends to every key up to its own position, and to nothing
//! past it.
//!
//! A decode run's mask has one row of S bytes per sequence. All of them together have as many bytes as the cache has
//! tokens (28 · 4,096 = 112 KiB), so the host writes them anew for every run: two fills of memory for each row,
//! microseconds in all. They travel with the other inputs in one copy.
//!
//! A prefill run's mask has T rows (1,024 · 4,096 = 4 MiB), which would take the host and the bus a fraction of a
//! millisecond. It is written on the GPU instead: zeros, ones in the columns of the past, and a triangle that was copied
//! there when the plan was opened.

use super::memory::{BufferRange, InputRanges};
use crate::backend::tensorrt::device::{Buffer, ByteGrid, Stream};
use crate::error::{Error, Result};

/// Writes the rows of a decode run to `rows`, `[B, capacity]`: sequence b attends to its first `total_tokens[b]` keys.
///
/// # Errors
/// [`Error::Step`] if a length is outside 1 to the capacity: a row without a key would give NaN.
pub(super) fn write_rows(rows: &mut [u8], total_tokens: &[i32], capacity: usize) -> Result<()> {
    if rows.len() != total_tokens.len().saturating_mul(capacity) {
        return Err(Error::Step("a run's mask is larger than its buffer".into()));
    }
    for (row, total) in rows.chunks_exact_mut(capacity.max(1)).zip(total_tokens) {
        let keys = usize::try_from(*total).ok().filter(|total| (1..=capacity).contains(total));
        let keys = keys.ok_or_else(|| Error::Step(format!("a row attends to {total} keys of {capacity}")))?;
        let (seen, unseen) = row.split_at_mut(keys);
        seen.fill(1);
        unseen.fill(0);
    }
    Ok(())
}

/// Writes the triangle, `[tokens, tokens]`, true on and below the diagonal.
pub(super) fn write_triangle(bytes: &mut [u8], tokens: usize) {
    for (index, row) in bytes.chunks_exact_mut(tokens.max(1)).enumerate() {
        let (seen, unseen) = row.split_at_mut((index + 1).min(tokens));
        seen.fill(1);
        unseen.fill(0);
    }
}

/// Enqueues writing the mask of a prefill run of one sequence: query t attends to its first `past_tokens + t + 1` keys.
///
/// # Errors
/// [`Error::Step`] if the tokens do not fit the capacity; [`Error::Gpu`] if the driver fails.
pub(super) fn write_prefill(
    stream: &Stream,
    buffer: &Buffer,
    inputs: &InputRanges,
    (past_tokens, tokens): (usize, usize),
    capacity: usize,
) -> Result<()> {
    let InputRanges { mask, triangle, .. } = inputs;
    let side = triangle.bytes.isqrt();
    let (past, new, columns) = (past_tokens as u64, tokens as u64, capacity as u64);
    if new > side || past + new > columns || new * columns > mask.bytes {
        let detail = format!("{tokens} tokens after {past_tokens} do not fit a mask of {capacity} columns");
        return Err(Error::Step(detail));
    }
    let at = |range: &BufferRange, column: u64, pitch: u64| ByteGrid { buffer, offset: range.offset + column, pitch };
    stream.fill_rows(at(mask, 0, new * columns), 0, new * columns, 1)?;
    stream.fill_rows(at(mask, 0, columns), 1, past, new)?;
    stream.copy_rows(at(triangle, 0, side), at(mask, past, columns), new, new)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_see_their_own_keys() {
        let mut rows = vec![7; 12];
        write_rows(&mut rows, &[1, 4, 2], 4).unwrap();
        assert_eq!(rows, [1, 0, 0, 0, 1, 1, 1, 1, 1, 1, 0, 0]);
        for total in [0, 5, -1] {
            assert!(write_rows(&mut rows[..4], &[total], 4).is_err(), "{total}");
        }
        assert!(write_rows(&mut rows[..8], &[1], 4).is_err());
        let mut triangle = vec![7; 9];
        write_triangle(&mut triangle, 3);
        assert_eq!(triangle, [1, 0, 0, 1, 1, 0, 1, 1, 1]);
    }
}
