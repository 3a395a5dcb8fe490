//! Kernels that treat each row by itself: norms, rotary positions, elementwise operations, gathers.

use rayon::prelude::*;

use super::{FloatElement, RowsRef, mul_add};
use crate::isa::{Isa, dispatch};
use crate::quantize::{round_f8, round_i8, round_integer};

/// Elements below which rows are not worth waking other threads.
const SERIAL_ELEMENTS: usize = 1 << 15;
/// Partial sums of a reduction: one per lane of the widest vector, so every machine sums in one order.
const LANES: usize = 16;

/// Rows to write: `rows` of them, starting at `data` and `stride` apart.
#[derive(Debug)]
pub struct RowsMut<'a, T> {
    /// At least `rows * stride` elements.
    pub data: &'a mut [T],
    /// Elements from one row to the next.
    pub stride: usize,
    /// Number of rows.
    pub rows: usize,
}

impl<T: Send> RowsMut<'_, T> {
    /// Runs `row(index, out_row)` for each row, on all threads if there is enough to do.
    fn for_each(self, row: impl Fn(usize, &mut [T]) + Sync) {
        let used = &mut self.data[..self.rows * self.stride];
        if self.rows < 2 || used.len() < SERIAL_ELEMENTS {
            used.chunks_exact_mut(self.stride).enumerate().for_each(|(i, out)| row(i, out));
        } else {
            used.par_chunks_exact_mut(self.stride).enumerate().for_each(|(i, out)| row(i, out));
        }
    }
}

/// LayerNorm: `(x − mean) / sqrt(var + eps) · gamma + beta`, population variance, two passes, FP32 inside.
/// `gamma` and `beta` are `[width]`.
pub fn layer_norm<O: FloatElement>(
    isa: Isa,
    x: RowsRef<'_, f32>,
    gamma: &[f32],
    beta: &[f32],
    eps: f32,
    out: RowsMut<'_, O>,
) {
    out.for_each(|i, out| layer_norm_row(isa, x.row(i), gamma, beta, eps, out));
}

dispatch! {
    /// One row of [`layer_norm`].
    pub fn layer_norm_row[O: FloatElement](x: &[f32], gamma: &[f32], beta: &[f32], eps: f32, out: &mut [O]) {
        avx512 => layer_norm_body::<O, true>,
        avx2 => layer_norm_body::<O, true>,
        portable => layer_norm_body::<O, false>,
    }
}

#[inline(always)]
fn layer_norm_body<O: FloatElement, const FMA: bool>(x: &[f32], gamma: &[f32], beta: &[f32], eps: f32, out: &mut [O]) {
    let width = x.len() as f32;
    let mean = sum_lanes(x, |v| v) / width;
    let variance = sum_lanes(x, |v| (v - mean) * (v - mean)) / width;
    let scale = 1.0 / (variance + eps).sqrt();
    for (((out, x), gamma), beta) in out.iter_mut().zip(x).zip(gamma).zip(beta) {
        *out = O::from_f32(mul_add::<FMA>((x - mean) * scale, *gamma, *beta));
    }
}

/// Sums `f(x)` in [`LANES`] partial sums, then those in order.
#[inline(always)]
fn sum_lanes(x: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0f32; LANES];
    let (blocks, rest) = x.as_chunks::<LANES>();
    for block in blocks {
        for (lane, v) in lanes.iter_mut().zip(block) {
            *lane += f(*v);
        }
    }
    for (lane, v) in lanes.iter_mut().zip(rest) {
        *lane += f(*v);
    }
    lanes.iter().sum()
}

/// Rotates dims `(j, j + half)` of each head of `head_dim` by the row's angle and copies the others;
/// `cos` and `sin` have rows of `half`.
pub fn rotary<O: FloatElement>(
    isa: Isa,
    x: RowsRef<'_, f32>,
    cos: RowsRef<'_, f32>,
    sin: RowsRef<'_, f32>,
    head_dim: usize,
    out: RowsMut<'_, O>,
) {
    out.for_each(|i, out| rotary_row(isa, x.row(i), cos.row(i), sin.row(i), head_dim, out));
}

dispatch! {
    /// One row of [`rotary`].
    pub fn rotary_row[O: FloatElement](x: &[f32], cos: &[f32], sin: &[f32], head_dim: usize, out: &mut [O]) {
        avx512 => rotary_body::<O>,
        avx2 => rotary_body::<O>,
        portable => rotary_body::<O>,
    }
}

#[inline(always)]
fn rotary_body<O: FloatElement>(x: &[f32], cos: &[f32], sin: &[f32], head_dim: usize, out: &mut [O]) {
    let half = cos.len();
    for (x, out) in x.chunks_exact(head_dim).zip(out.chunks_exact_mut(head_dim)) {
        let (x1, x2, pass) = (&x[..half], &x[half..2 * half], &x[2 * half..]);
        let (out1, rest) = out.split_at_mut(half);
        let (out2, out_pass) = rest.split_at_mut(half);
        for j in 0..half {
            out1[j] = O::from_f32(x1[j] * cos[j] - x2[j] * sin[j]);
            out2[j] = O::from_f32(x2[j] * cos[j] + x1[j] * sin[j]);
        }
        for (out, x) in out_pass.iter_mut().zip(pass) {
            *out = O::from_f32(*x);
        }
    }
}

/// An operation on each element.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Unary {
    /// To the output's element type.
    Convert,
    /// `max(x, 0)²`
    Relu2,
    /// `x + scalar`
    AddScalar(f32),
    /// The scale times the E4M3 float nearest to `x / scale`.
    FakeQuantizeF8(f32),
}

/// Applies `op` to each element.
pub fn unary<T: FloatElement, O: FloatElement>(op: Unary, x: RowsRef<'_, T>, out: RowsMut<'_, O>) {
    out.for_each(|i, out| {
        for (out, x) in out.iter_mut().zip(x.row(i)) {
            let x = x.to_f32();
            *out = O::from_f32(match op {
                Unary::Convert => x,
                Unary::Relu2 if x < 0.0 => 0.0, // NaN passes
                Unary::Relu2 => x * x,
                Unary::AddScalar(scalar) => x + scalar,
                Unary::FakeQuantizeF8(scale) => round_f8(x / scale) * scale,
            });
        }
    });
}

/// Quantizes each row to 8-bit integers: `x[i] ≈ scale · codes[i]`, ties to even. With `fixed` that is the scale, and codes
/// saturate at -128 and 127; else it is chosen by the row's largest magnitude, which gets the code 127. `scales` has rows
/// of one. A row with a number that is not finite gets the scale NaN, so that its dot products are NaN too.
pub fn quantize<T: FloatElement>(
    isa: Isa,
    x: RowsRef<'_, T>,
    fixed: Option<f32>,
    codes: RowsMut<'_, i8>,
    scales: RowsMut<'_, f32>,
) {
    let RowsMut { data, stride, rows } = scales;
    let scales = &mut data[..rows * stride];
    let quantize = |i: usize, codes: &mut [i8], scale: &mut f32| match fixed {
        Some(fixed) => *scale = quantize_row_by(isa, x.row(i), fixed, codes),
        None => quantize_row(isa, x.row(i), codes, scale),
    };
    if rows < 2 || rows * codes.stride < SERIAL_ELEMENTS {
        let codes = codes.data.chunks_exact_mut(codes.stride);
        scales
            .chunks_exact_mut(stride)
            .zip(codes)
            .enumerate()
            .for_each(|(i, (s, codes))| quantize(i, codes, &mut s[0]));
    } else {
        let codes = codes.data.par_chunks_exact_mut(codes.stride);
        scales
            .par_chunks_exact_mut(stride)
            .zip(codes)
            .enumerate()
            .for_each(|(i, (s, codes))| quantize(i, codes, &mut s[0]));
    }
}

dispatch! {
    /// One row of [`quantize`].
    pub fn quantize_row[T: FloatElement](x: &[T], codes: &mut [i8], scale: &mut f32) {
        avx512 => quantize_row_body::<T>,
        avx2 => quantize_row_body::<T>,
        portable => quantize_row_body::<T>,
    }
}

dispatch! {
    /// One row of [`quantize`] by a fixed scale. Returns that scale, or NaN.
    fn quantize_row_by[T: FloatElement](x: &[T], scale: f32, codes: &mut [i8]) -> f32 {
        avx512 => quantize_row_by_body::<T>,
        avx2 => quantize_row_by_body::<T>,
        portable => quantize_row_by_body::<T>,
    }
}

#[inline(always)]
fn quantize_row_by_body<T: FloatElement>(x: &[T], scale: f32, codes: &mut [i8]) -> f32 {
    const EXPONENT: u32 = 0x7f80_0000;
    let mut is_finite = true;
    for (code, x) in codes.iter_mut().zip(x) {
        let x = x.to_f32();
        is_finite &= x.to_bits() & EXPONENT != EXPONENT;
        *code = round_i8(x / scale) as i8;
    }
    if is_finite { scale } else { f32::NAN }
}

#[inline(always)]
fn quantize_row_body<T: FloatElement>(x: &[T], codes: &mut [i8], scale: &mut f32) {
    // Magnitudes compare as their bits do, and NaN is above all numbers.
    let largest = x.iter().fold(0, |most, x| (x.to_f32().to_bits() & 0x7fff_ffff).max(most));
    let largest = f32::from_bits(largest);
    *scale = if largest.is_finite() { largest / 127.0 } else { f32::NAN };
    // A row whose scale is too small to divide by is as good as zero.
    let inverse = if *scale >= f32::MIN_POSITIVE { 1.0 / *scale } else { 0.0 };
    for (code, x) in codes.iter_mut().zip(x) {
        *code = round_integer((x.to_f32() * inverse).clamp(-127.0, 127.0)) as i8;
    }
}

/// `x + y`.
pub fn add(x: RowsRef<'_, f32>, y: RowsRef<'_, f32>, out: RowsMut<'_, f32>) {
    out.for_each(|i, out| {
        for ((out, x), y) in out.iter_mut().zip(x.row(i)).zip(y.row(i)) {
            *out = x + y;
        }
    });
}

/// Row `indices[i]` of `table` to row `i` of `out`.
///
/// # Panics
/// If an index is outside the table; steps are checked before they run.
pub fn gather<T: FloatElement>(table: RowsRef<'_, T>, indices: &[u32], out: RowsMut<'_, f32>) {
    out.for_each(|i, out| {
        for (out, value) in out.iter_mut().zip(table.row(indices[i] as usize)) {
            *out = value.to_f32();
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn out(data: &mut [f32], stride: usize) -> RowsMut<'_, f32> {
        let rows = data.len() / stride;
        RowsMut { data, stride, rows }
    }

    #[test]
    fn layer_norm_is_the_formula() {
        let width = 37;
        let x: Vec<f32> = (0..2 * width).map(|i| ((i * 37 % 11) as f32 - 4.0) * 1.7 + 100.0).collect();
        let gamma: Vec<f32> = (0..width).map(|i| 1.0 + i as f32 * 0.01).collect();
        let beta: Vec<f32> = (0..width).map(|i| i as f32 * -0.02).collect();
        for isa in Isa::available() {
            let mut got = vec![f32::NAN; 2 * width];
            layer_norm(isa, RowsRef::new(&x, width, width), &gamma, &beta, 1e-5, out(&mut got, width));
            for (got, x) in got.chunks(width).zip(x.chunks(width)) {
                let mean = x.iter().map(|v| *v as f64).sum::<f64>() / width as f64;
                let var = x.iter().map(|v| (*v as f64 - mean).powi(2)).sum::<f64>() / width as f64;
                for i in 0..width {
                    let expected = (x[i] as f64 - mean) / (var + 1e-5).sqrt() * gamma[i] as f64 + beta[i] as f64;
                    assert!((got[i] as f64 - expected).abs() < 2e-5, "{isa} {i}: {} {expected}", got[i]);
                }
            }
        }
    }

    #[test]
    fn rotary_rotates_halves_and_passes_the_rest() {
        let x = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
        let (cos, sin) = ([0.0, 1.0], [1.0, 0.0]);
        let mut got = [f32::NAN; 6];
        let (cos, sin) = (RowsRef::new(&cos[..], 2, 2), RowsRef::new(&sin[..], 2, 2));
        rotary(Isa::detect(), RowsRef::new(&x, 6, 6), cos, sin, 6, out(&mut got, 6));
        assert_eq!(got, [-3.0, 2.0, 1.0, 4.0, 5.0, 6.0]);
    }

    #[test]
    fn quantized_rows_are_within_half_a_step_and_keep_nan() {
        let width = 37;
        let mut x: Vec<f32> = (0..3 * width).map(|i| ((i * 37 % 101) as f32 - 50.0) * 0.3).collect();
        x[width..2 * width].fill(0.0);
        x[2 * width + 5] = f32::NAN;
        for isa in Isa::available() {
            let (mut codes, mut scales) = (vec![99i8; 3 * width], [f32::NAN; 3]);
            let out = RowsMut { data: &mut codes, stride: width, rows: 3 };
            quantize(isa, RowsRef::new(&x, width, width), None, out, RowsMut { data: &mut scales, stride: 1, rows: 3 });
            for (x, code) in x[..width].iter().zip(&codes) {
                assert!((x - f32::from(*code) * scales[0]).abs() <= scales[0] * 0.500_01, "{isa}: {x} {code}");
            }
            assert!(codes[..width].iter().any(|code| code.abs() == 127), "{isa}: the largest takes the largest code");
            assert!(codes[width..2 * width].iter().all(|code| *code == 0) && scales[1] == 0.0, "{isa}");
            assert!(scales[2].is_nan(), "{isa}");
        }
    }

    #[test]
    fn a_fixed_scale_saturates_and_keeps_nan() {
        let x = [0.0, 0.25, 0.75, -63.7, -64.3, 1e9, -1e9, 63.4, 1.0, f32::NAN, f32::INFINITY, 3.0];
        for isa in Isa::available() {
            let (mut codes, mut scales) = ([99i8; 12], [0.0; 3]);
            let out = RowsMut { data: &mut codes, stride: 4, rows: 3 };
            let of_rows = RowsMut { data: &mut scales, stride: 1, rows: 3 };
            quantize(isa, RowsRef::new(&x, 4, 4), Some(0.5), out, of_rows);
            assert_eq!(codes[..8], [0, 0, 2, -127, -128, 127, -128, 127], "{isa}");
            assert!(scales[..2] == [0.5, 0.5] && scales[2].is_nan(), "{isa}: {scales:?}");
        }
    }

    #[test]
    fn elementwise_and_gather() {
        let x = [-2.0, 3.0, f32::NAN, 1.0];
        let mut got = [0.0; 4];
        unary(Unary::Relu2, RowsRef::new(&x, 2, 2), out(&mut got, 2));
        assert!(got[0] == 0.0 && got[1] == 9.0 && got[2].is_nan() && got[3] == 1.0);
        gather(RowsRef::new(&x, 2, 2), &[1, 0], out(&mut got, 2));
        assert!(got[0].is_nan() && got[1..] == [1.0, -2.0, 3.0]);
    }
}
