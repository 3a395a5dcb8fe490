//! Element types and borrowed tensors: what a checkpoint hands to the compiler without copying.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The element type of a stored or computed tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DType {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// The upper half of a binary32.
    BF16,
    /// 32-bit signed integer (token ids, positions, lengths).
    I32,
}

impl DType {
    /// Bytes of one element.
    pub const fn bytes(self) -> usize {
        match self {
            DType::F32 | DType::I32 => 4,
            DType::F16 | DType::BF16 => 2,
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            DType::F32 => "f32",
            DType::F16 => "f16",
            DType::BF16 => "bf16",
            DType::I32 => "i32",
        })
    }
}

/// A named tensor whose bytes live elsewhere (a memory map): little-endian, row-major, contiguous.
/// Whoever makes one has checked that `data.len() == product(shape) * dtype.bytes()`.
#[derive(Debug, Clone, Copy)]
pub struct TensorView<'a> {
    /// The tensor's name in Hugging Face's scheme, whichever file it came from.
    pub name: &'a str,
    /// Element type of `data`; F32, F16 or BF16.
    pub dtype: DType,
    /// Row-major shape.
    pub shape: &'a [usize],
    /// The elements, not necessarily aligned.
    pub data: &'a [u8],
}

impl TensorView<'_> {
    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Copies elements `start .. start + out.len()` (row-major) to `out` as f32; exact for every stored dtype.
    ///
    /// # Panics
    /// If the range is outside the tensor; callers index by the validated shape.
    pub fn read_f32(&self, start: usize, out: &mut [f32]) {
        let width = self.dtype.bytes();
        let bytes = &self.data[start * width..(start + out.len()) * width];
        match self.dtype {
            DType::F32 => {
                for (value, raw) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                    *value = f32::from_le_bytes(*raw);
                }
            }
            DType::F16 => {
                for (value, raw) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *value = half::f16::from_le_bytes(*raw).to_f32();
                }
            }
            DType::BF16 => {
                for (value, raw) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *value = half::bf16::from_le_bytes(*raw).to_f32();
                }
            }
            DType::I32 => {
                for (value, raw) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                    *value = i32::from_le_bytes(*raw) as f32;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_every_dtype_exactly() {
        let values = [1.5f32, -0.25, 3.0];
        let f32_bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let f16_bytes: Vec<u8> = values.iter().flat_map(|v| half::f16::from_f32(*v).to_le_bytes()).collect();
        let bf16_bytes: Vec<u8> = values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect();
        for (dtype, data) in [(DType::F32, f32_bytes), (DType::F16, f16_bytes), (DType::BF16, bf16_bytes)] {
            let view = TensorView { name: "t", dtype, shape: &[3], data: &data };
            let mut out = [f32::NAN; 2];
            view.read_f32(1, &mut out);
            assert_eq!(out, [-0.25, 3.0], "{dtype}");
        }
    }
}
