//! Codes and scales of weights that were rounded ahead of packing, because their rounding needs more than the weights
//! themselves. They stand in for the nearest codes wherever a checkpoint's weights are quantized, so that every plan and
//! every check of a plan reads the same.

use std::ops::Range;
use std::path::Path;

use super::Checkpoint;
use crate::error::{Error, Result};
use crate::quantize::{Scheme, f8_value};
use crate::tensor::DType;
use crate::tensor_file::{StoredTensor, TensorFile};

/// Schemes that weights are rounded ahead in.
const ROUNDED: [Scheme; 2] = [Scheme::INT4, Scheme::FP8];

/// Rounded matrices in a mapped file. A matrix `[rows, columns]` has codes of one byte each, `[rows, columns]`, and FP32
/// scales, `[rows, blocks]`.
#[derive(Debug)]
pub struct RoundedWeights {
    file: TensorFile,
}

/// Name of a matrix's codes in the file: `tensors` are those it is stacked from.
pub fn codes_name(tensors: &[String], scheme: Scheme) -> String {
    format!("{}.{}", tensors.join("+"), scheme.dtype())
}

/// Name of a matrix's scales in the file.
pub fn scales_name(tensors: &[String], scheme: Scheme) -> String {
    format!("{}.scales", codes_name(tensors, scheme))
}

impl RoundedWeights {
    /// Maps a file of rounded matrices. It may be removed once it is mapped, but not changed.
    ///
    /// # Errors
    /// As [`TensorFile::open`].
    pub fn open(path: &Path) -> Result<RoundedWeights> {
        Ok(RoundedWeights { file: TensorFile::open(path)? })
    }

    fn holds(&self, tensors: &[String], scheme: Scheme) -> bool {
        self.file.tensor(&codes_name(tensors, scheme)).is_some()
    }

    fn read(
        &self,
        tensors: &[String],
        scheme: Scheme,
        rows: Range<usize>,
        codes: &mut [f32],
        scales: &mut [f32],
    ) -> Result<()> {
        let name = codes_name(tensors, scheme);
        let stored = self.file.tensor(&name).zip(self.file.tensor(&scales_name(tensors, scheme)));
        let part = |(stored, bytes): (&StoredTensor, _), values: usize| {
            let width = stored.shape.get(1).copied().filter(|width| width * rows.len() == values)?;
            let bytes_per_row = width * stored.dtype.bitsize() / 8;
            <[u8]>::get(bytes, rows.start * bytes_per_row..rows.end * bytes_per_row)
        };
        let found = stored
            .and_then(|(of_codes, of_scales)| Some((part(of_codes, codes.len())?, part(of_scales, scales.len())?)));
        let Some((stored, of_rows)) = found else {
            return Err(Error::internal(format!("rows {rows:?} of `{name}` are read"), "rows that were rounded"));
        };
        let is_float = scheme.dtype() == DType::F8;
        for (code, byte) in codes.iter_mut().zip(stored) {
            *code = if is_float { f8_value(*byte) } else { f32::from(*byte as i8) };
        }
        for (scale, bytes) in scales.iter_mut().zip(of_rows.as_chunks::<4>().0) {
            *scale = f32::from_le_bytes(*bytes);
        }
        Ok(())
    }
}

impl Checkpoint {
    /// From now on, quantized forms of the matrices in `rounded` are the ones there.
    pub fn use_rounded(&mut self, rounded: RoundedWeights) {
        self.rounded = Some(rounded);
    }

    /// Schemes in which the matrix stacked from these tensors was rounded ahead; see [`RoundedWeights`].
    pub fn rounded_schemes<'s>(&'s self, tensors: &'s [String]) -> impl Iterator<Item = Scheme> + 's {
        let holds = |rounded: &RoundedWeights, scheme: &Scheme| rounded.holds(tensors, *scheme);
        ROUNDED.into_iter().filter(move |scheme| self.rounded.as_ref().is_some_and(|rounded| holds(rounded, scheme)))
    }

    /// Reads rows of a matrix that was rounded ahead: codes, as numbers, into `codes`, `[rows, columns]`, and scales
    /// into `scales`, `[rows, blocks]`.
    ///
    /// # Errors
    /// [`Error::Internal`] if it was not, or in another shape.
    pub fn read_rounded(
        &self,
        tensors: &[String],
        scheme: Scheme,
        rows: Range<usize>,
        codes: &mut [f32],
        scales: &mut [f32],
    ) -> Result<()> {
        match &self.rounded {
            Some(rounded) => rounded.read(tensors, scheme, rows, codes, scales),
            None => Err(Error::internal(format!("rounded {tensors:?} are read"), "weights that were rounded")),
        }
    }
}
