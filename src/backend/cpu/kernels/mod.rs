//! The CPU's kernels. Each output element is computed by one fixed sequence of operations, whatever else is in the
//! step and however work is split between threads: that is what makes a sequence's logits independent of its
//! batch and its chunks.

pub mod attention;
pub mod linear;
pub mod rowwise;

/// Rows of equal width inside a larger buffer: row `i` is `data[i * stride .. i * stride + width]`.
#[derive(Debug, Clone, Copy)]
pub struct RowsRef<'a, T> {
    data: &'a [T],
    stride: usize,
    width: usize,
}

impl<'a, T> RowsRef<'a, T> {
    /// Rows of `width`, `stride` apart, the first at the start of `data`.
    ///
    /// # Panics
    /// If a row would be wider than the stride; plans are validated before they run.
    pub fn new(data: &'a [T], stride: usize, width: usize) -> RowsRef<'a, T> {
        assert!(width <= stride, "rows of {width} cannot be {stride} apart");
        RowsRef { data, stride, width }
    }

    /// Row `index`, `[width]`.
    #[inline(always)]
    pub fn row(&self, index: usize) -> &'a [T] {
        &self.data[index * self.stride..index * self.stride + self.width]
    }

    /// Elements of a row.
    #[inline(always)]
    pub fn width(&self) -> usize {
        self.width
    }

    /// Returns true if there are at least this many rows.
    pub fn has_rows(&self, rows: usize) -> bool {
        let len = rows.checked_sub(1).map_or(Some(0), |last| last.checked_mul(self.stride)?.checked_add(self.width));
        len.is_some_and(|len| len <= self.data.len())
    }

    /// The rows from `index` on.
    ///
    /// # Panics
    /// If there is no such row.
    #[inline(always)]
    pub fn starting_at(self, index: usize) -> RowsRef<'a, T> {
        RowsRef { data: &self.data[index * self.stride..], ..self }
    }

    /// Everything from the start of row `index`, and the distance to the next row.
    #[inline(always)]
    pub fn from_row(&self, index: usize) -> (&'a [T], usize) {
        (&self.data[index * self.stride..], self.stride)
    }
}

/// Rounds to BF16, ties to even; NaN stays NaN. Branch-free, so loops over it vectorize.
#[inline(always)]
pub fn round_bf16(value: f32) -> half::bf16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    let quiet = (bits >> 16) | 0x40;
    half::bf16::from_bits(if bits & 0x7fff_ffff > 0x7f80_0000 { quiet } else { rounded } as u16)
}

/// An element that activations are kept in.
pub trait FloatElement: bytemuck::Pod + Send + Sync {
    /// From FP32, ties to even.
    fn from_f32(value: f32) -> Self;
    /// To FP32, exactly.
    fn to_f32(self) -> f32;
}

impl FloatElement for f32 {
    #[inline(always)]
    fn from_f32(value: f32) -> f32 {
        value
    }
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
}

impl FloatElement for half::bf16 {
    #[inline(always)]
    fn from_f32(value: f32) -> half::bf16 {
        round_bf16(value)
    }
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
}

/// `a · b + c`, in one rounding where `FMA` says the machine has the instruction.
#[inline(always)]
fn mul_add<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bf16_rounding_is_half_crates() {
        let mut bits = 0x1234_5678u32;
        for _ in 0..200_000 {
            bits = bits.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let value = f32::from_bits(bits);
            let (ours, theirs) = (round_bf16(value), half::bf16::from_f32(value));
            assert!(ours.to_bits() == theirs.to_bits() || (ours.is_nan() && theirs.is_nan()), "{value:e}");
        }
        assert_eq!(round_bf16(f32::INFINITY).to_f32(), f32::INFINITY);
        assert_eq!(round_bf16(f32::MAX).to_f32(), f32::INFINITY);
        assert!(round_bf16(f32::from_bits(0x7f80_0001)).is_nan());
    }
}
