//! Element types and their conversion to FP32.

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
    /// 8-bit signed integer: a code that a scale multiplies.
    I8,
    /// 4-bit signed integer, two to a byte, the first in the low half: a code that a scale multiplies.
    I4,
    /// Truth value of one byte, 0 or 1: the elements of an attention mask.
    Bool,
    /// 8-bit float, 4 bits of exponent and 3 of mantissa, without infinities (E4M3FN): a code that a scale multiplies.
    F8,
}

impl DType {
    /// Bytes of one element; an I4 by itself takes a whole one.
    pub const fn bytes(self) -> usize {
        match self {
            DType::F32 | DType::I32 => 4,
            DType::F16 | DType::BF16 => 2,
            DType::I8 | DType::I4 | DType::F8 | DType::Bool => 1,
        }
    }

    /// Reads little-endian floats of this type to `out` as f32, as many as there are in both; exact. Other types are no
    /// numbers by themselves and give NaN.
    pub fn decode(self, bytes: &[u8], out: &mut [f32]) {
        match self {
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
            DType::I32 | DType::I8 | DType::I4 | DType::F8 | DType::Bool => out.fill(f32::NAN),
        }
    }

    /// Returns true for floats: neither indices nor codes of a quantized tensor.
    pub const fn is_float(self) -> bool {
        matches!(self, DType::F32 | DType::F16 | DType::BF16)
    }

    /// Returns true for codes, which mean nothing without their scales.
    pub const fn is_code(self) -> bool {
        matches!(self, DType::I8 | DType::I4 | DType::F8)
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            DType::F32 => "f32",
            DType::F16 => "f16",
            DType::BF16 => "bf16",
            DType::I32 => "i32",
            DType::I8 => "i8",
            DType::I4 => "i4",
            DType::F8 => "f8",
            DType::Bool => "bool",
        })
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
            let mut out = [f32::NAN; 2];
            dtype.decode(&data[dtype.bytes()..], &mut out);
            assert_eq!(out, [-0.25, 3.0], "{dtype}");
        }
    }
}
