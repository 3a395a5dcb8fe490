//! Results of a step: the largest logits of each row on the host, whole rows on demand.

use std::sync::Arc;

use super::memory::{BufferRange, OutputRanges};
use crate::backend::tensorrt::device::{Buffer, Pinned, Stream};
use crate::backend::{DeferredLogits, Top};
use crate::error::{Error, Result};

/// Results of the last step.
pub(super) struct StepResults {
    /// Output row of each requested row.
    pub rows: Vec<usize>,
    pub values: Vec<f32>, // [rows, k]
    pub ids: Vec<u32>,    // [rows, k]
    pub sums: Vec<f32>,   // [rows]
    pub tops_host: Pinned,
    pub row_host: Pinned, // one row of logits
    pub outputs: Arc<Buffer>,
    pub places: OutputRanges,
    pub stream: Arc<Stream>,
}

impl StepResults {
    /// Copies the top-k logits and the sums of the rows to the host in one transfer, and waits for it.
    pub(super) fn take(&mut self, rows: Vec<usize>) -> Result<()> {
        self.values.clear();
        self.ids.clear();
        self.sums.clear();
        if rows.is_empty() {
            return Ok(());
        }
        let is_decode = |row: &usize| *row < self.places.decode_rows;
        let (decode, prefill) = (rows.iter().any(is_decode), !rows.iter().all(is_decode));
        let range = self.places.written(decode, prefill);
        let offset = range.start as u64;
        self.tops_host.download(range, &self.outputs, offset, &self.stream)?;
        let host = self.tops_host.bytes()?;
        for row in &rows {
            let of_range = |BufferRange { offset, bytes }| host.get(offset as usize..(offset + bytes) as usize);
            let [Some(values), Some(ids), Some(sums)] = self.places.top(*row).map(of_range) else {
                return Err(Error::Step(format!("output row {row} is out of range")));
            };
            let floats =
                |bytes: &'_ [u8]| bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
            let (values, sums): (Vec<f32>, Vec<f32>) = (floats(values), floats(sums));
            self.values.extend(values);
            self.sums.push(sums.iter().sum());
            self.ids.extend(ids.as_chunks::<4>().0.iter().map(|bytes| u32::from_le_bytes(*bytes)));
        }
        if let Some(id) = self.ids.iter().find(|id| **id as usize >= self.places.vocab_size) {
            let most = self.places.vocab_size - 1;
            return Err(Error::Numerics(format!("the plan returned token id {id}, but the last id is {most}")));
        }
        self.rows = rows;
        Ok(())
    }
}

impl DeferredLogits for StepResults {
    fn rows(&self) -> usize {
        self.rows.len()
    }

    fn top(&self, row: usize) -> Top<'_> {
        let range = row * self.places.k..(row + 1) * self.places.k;
        Top { values: &self.values[range.clone()], ids: &self.ids[range], sum: self.sums[row] }
    }

    fn fetch(&mut self, row: usize) -> Result<&[f32]> {
        let BufferRange { offset, bytes } = self.places.row(self.rows[row]);
        self.row_host.download(0..bytes as usize, &self.outputs, offset, &self.stream)?;
        let bytes = self.row_host.bytes()?;
        bytemuck::try_cast_slice(bytes).map_err(|error| Error::Gpu(format!("pinned memory is not aligned: {error}")))
    }
}
