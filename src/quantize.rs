//! Quantizes rows of weights to codes and scales: symmetric, so that zero stays zero and there is no zero point, with
//! scales chosen to minimize the error rather than by the largest weight alone.
//!
//! A block of weights `w` is kept as codes `c` and one scale `s`, standing for `s · c`. For each of a list of scales
//! from "the largest weight takes the largest code" downwards (clipping the largest ones lets all others lie closer)
//! the codes are the nearest ones; the best of them is refined by least squares, `s = Σ w·c / Σ c²`, for as long as
//! that lowers `Σ (w − s·c)²`.

use std::fmt;

use crate::isa::{Isa, dispatch};
use crate::tensor::DType;
use half::bf16;

/// Largest magnitude of an E4M3 float.
pub const F8_MAX: f32 = 448.0;
/// Scales tried, from the one that clips nothing down to [`SMALLEST_CLIP`] of it.
const CANDIDATES: usize = 20;
/// Part of the largest weight that the smallest scale tried still represents.
const SMALLEST_CLIP: f32 = 0.5;
/// Least-squares refinements at most; the error seldom falls after the second.
const REFINEMENTS: usize = 3;
/// Partial sums of an error: whole vectors.
const LANES: usize = 16;

/// Quantization scheme of a matrix's rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Scheme {
    code: Code,
    block: Option<usize>,
}

/// Format of a code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Code {
    /// -127 to 127.
    I8,
    /// -8 to 7.
    I4,
    /// An E4M3 float.
    F8,
}

impl Scheme {
    /// 8-bit integers with per-channel scales.
    pub const INT8: Scheme = Scheme { code: Code::I8, block: None };
    /// 4-bit integers with group size 128; scales are representable in BF16, and the last group of a row may be
    /// shorter.
    pub const INT4: Scheme = Scheme { code: Code::I4, block: Some(128) };
    /// E4M3 floats with per-channel scales.
    pub const FP8: Scheme = Scheme { code: Code::F8, block: None };

    /// Element type of the codes.
    pub const fn dtype(self) -> DType {
        match self.code {
            Code::I8 => DType::I8,
            Code::I4 => DType::I4,
            Code::F8 => DType::F8,
        }
    }

    /// Quantization group size; `None`: per-channel.
    pub const fn block(self) -> Option<usize> {
        self.block
    }

    /// Number of scales of a row of `columns` weights.
    pub fn blocks(self, columns: usize) -> usize {
        self.block.map_or(1, |block| columns.div_ceil(block))
    }

    /// Computes the scales of one row into `scales`, `[blocks]`; all are positive and finite. `row` holds finite
    /// numbers.
    pub fn scales(self, row: &[f32], scales: &mut [f32]) {
        let block = self.block.unwrap_or(row.len()).max(1);
        let mut scratch = Vec::with_capacity(block.min(row.len()));
        let isa = Isa::detect();
        for (scale, weights) in scales.iter_mut().zip(row.chunks(block)) {
            *scale = best_scale(isa, self.code, weights, &mut scratch);
        }
    }

    /// As [`Scheme::scales`], with the sum of squared errors weighted by `importance`, one number of 0 or more for each
    /// weight of the row.
    pub fn weighted_scales(self, row: &[f32], importance: &[f32], scales: &mut [f32]) {
        let block = self.block.unwrap_or(row.len()).max(1);
        let mut scratch = [Vec::new(), Vec::new()];
        let isa = Isa::detect();
        let blocks = row.chunks(block).zip(importance.chunks(block));
        for (scale, (weights, importance)) in scales.iter_mut().zip(blocks) {
            *scale = best_weighted_scale(isa, self.code, weights, importance, &mut scratch);
        }
    }

    /// Replaces each weight of a row by its code, as a number.
    pub fn codes(self, row: &mut [f32], scales: &[f32]) {
        let block = self.block.unwrap_or(row.len()).max(1);
        let isa = Isa::detect();
        for (weights, scale) in row.chunks_mut(block).zip(scales) {
            nearest_codes(isa, self.code, weights, *scale);
        }
    }

    /// The code nearest to `weight / scale`, as a number.
    #[inline(always)]
    pub fn nearest(self, weight: f32, scale: f32) -> f32 {
        match self.code {
            Code::I8 => round_integer((weight / scale).clamp(-127.0, 127.0)),
            Code::I4 => round_integer((weight / scale).clamp(-8.0, 7.0)),
            Code::F8 => round_f8(weight / scale),
        }
    }

    /// Quantizes whole rows in place: `[rows, columns]` become codes, as numbers; their scales go into `scales`,
    /// `[rows, blocks]`.
    pub fn quantize(self, columns: usize, rows: &mut [f32], scales: &mut [f32]) {
        for (row, scales) in rows.chunks_exact_mut(columns).zip(scales.chunks_exact_mut(self.blocks(columns))) {
            self.scales(row, scales);
            self.codes(row, scales);
        }
    }

    /// The code's bits: of a number that [`Scheme::codes`] gave. An I4 is in the low half, the high half zero.
    pub fn bits(self, code: f32) -> u8 {
        code_bits(self.dtype(), code)
    }
}

/// The bits of a code of type `dtype`, given as a number: an I4 is in the low half, the high half zero. A type that has
/// no codes has no bits either.
pub fn code_bits(dtype: DType, code: f32) -> u8 {
    match dtype {
        DType::I8 => code as i8 as u8,
        DType::I4 => code as i8 as u8 & 0x0f,
        DType::F8 => f8_bits(code),
        DType::F32 | DType::F16 | DType::BF16 | DType::I32 | DType::Bool => 0,
    }
}

impl Code {
    /// The nearest scale that is kept: a positive number, of BF16 where TensorRT takes no others, that no code makes
    /// infinite.
    #[inline(always)]
    fn kept_scale(self, scale: f32) -> f32 {
        let scale = scale.max(f32::MIN_POSITIVE);
        match self {
            Code::I8 | Code::F8 => scale,
            Code::I4 => {
                let nearest = bf16::from_f32(scale).to_f32();
                if (8.0 * nearest).is_finite() { nearest } else { f32::from_bits(scale.to_bits() & 0xffff_0000) }
            }
        }
    }

    fn largest(self) -> f32 {
        match self {
            Code::I8 => 127.0,
            Code::I4 => 7.0,
            Code::F8 => F8_MAX,
        }
    }
}

impl fmt::Display for Scheme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.block {
            Some(block) => write!(f, "{}, group size {block}", self.dtype()),
            None => write!(f, "{}, per-channel scales", self.dtype()),
        }
    }
}

dispatch! {
    /// The best scale of a block. `scratch` is room for the block, to spare an allocation.
    ///
    /// Each weight is rounded some 25 times, so this is compiled for wide vectors too; results do not depend on which.
    fn best_scale[](code: Code, weights: &[f32], scratch: &mut Vec<f32>) -> f32 {
        avx512 => best_scale_body,
        avx2 => best_scale_body,
        portable => best_scale_body,
    }
}

dispatch! {
    /// As [`best_scale`], with the squared errors weighted by `importance`.
    fn best_weighted_scale[](code: Code, weights: &[f32], importance: &[f32], scratch: &mut [Vec<f32>; 2]) -> f32 {
        avx512 => best_weighted_scale_body,
        avx2 => best_weighted_scale_body,
        portable => best_weighted_scale_body,
    }
}

dispatch! {
    /// Replaces each weight of a block by its code, as a number.
    fn nearest_codes[](code: Code, weights: &mut [f32], scale: f32) {
        avx512 => nearest_codes_body,
        avx2 => nearest_codes_body,
        portable => nearest_codes_body,
    }
}

#[inline(always)]
fn best_scale_body(code: Code, weights: &[f32], scratch: &mut Vec<f32>) -> f32 {
    least_error_scale::<false>(code, weights, scratch, &[])
}

#[inline(always)]
fn best_weighted_scale_body(code: Code, weights: &[f32], importance: &[f32], scratch: &mut [Vec<f32>; 2]) -> f32 {
    let [scratch, parts] = scratch;
    // As parts of the largest, so that no product over- or underflows.
    let largest = importance.iter().fold(f32::MIN_POSITIVE, |most, part| most.max(*part));
    parts.clear();
    parts.extend(importance.iter().map(|part| part / largest));
    parts.resize(importance.len().next_multiple_of(LANES), 0.0);
    least_error_scale::<true>(code, weights, scratch, parts.as_chunks::<LANES>().0)
}

/// The best scale of a block. `importance` is ignored unless `WEIGHTED`.
#[inline(always)]
fn least_error_scale<const WEIGHTED: bool>(
    code: Code,
    weights: &[f32],
    scratch: &mut Vec<f32>,
    importance: &[[f32; LANES]],
) -> f32 {
    let largest = weights.iter().fold(0f32, |most, w| most.max(w.abs()));
    let whole = largest / code.largest();
    if whole < f32::MIN_POSITIVE {
        return 1.0; // every code is zero
    }
    // Weights as parts of the largest, so that no square over- or underflows; zeros fill the last group.
    scratch.clear();
    scratch.extend(weights.iter().map(|w| w / largest));
    scratch.resize(weights.len().next_multiple_of(LANES), 0.0);
    let (groups, _) = scratch.as_chunks::<LANES>();
    let importance = if WEIGHTED { importance } else { groups };
    // A scale as it will be kept, again as a part of the largest weight.
    let kept = |scale: f32| code.kept_scale(scale * largest) / largest;
    let unclipped = kept(1.0 / code.largest());
    let error = |scale: f32| match code {
        Code::I8 => error_of::<WEIGHTED>(groups, importance, scale, |v| round_integer(v.clamp(-127.0, 127.0))),
        Code::I4 => error_of::<WEIGHTED>(groups, importance, scale, |v| round_integer(v.clamp(-8.0, 7.0))),
        Code::F8 => error_of::<WEIGHTED>(groups, importance, scale, round_f8),
    };
    let refined = |scale: f32| match code {
        Code::I8 => refined_scale::<WEIGHTED>(groups, importance, scale, |v| round_integer(v.clamp(-127.0, 127.0))),
        Code::I4 => refined_scale::<WEIGHTED>(groups, importance, scale, |v| round_integer(v.clamp(-8.0, 7.0))),
        Code::F8 => refined_scale::<WEIGHTED>(groups, importance, scale, round_f8),
    };
    let mut best = (unclipped, error(unclipped));
    for step in 1..=CANDIDATES {
        let clip = 1.0 - (1.0 - SMALLEST_CLIP) * step as f32 / CANDIDATES as f32;
        let scale = kept(clip / code.largest());
        let error = error(scale);
        if error < best.1 {
            best = (scale, error);
        }
    }
    for _ in 0..REFINEMENTS {
        let scale = kept(refined(best.0));
        let error = error(scale);
        if error < best.1 {
            best = (scale, error);
        } else {
            break;
        }
    }
    code.kept_scale(best.0 * largest)
}

/// `Σ (w − s·c)²` for the codes nearest at scale `s`.
#[inline(always)]
fn error_of<const WEIGHTED: bool>(
    groups: &[[f32; LANES]],
    importance: &[[f32; LANES]],
    scale: f32,
    nearest: impl Fn(f32) -> f32,
) -> f64 {
    let inverse = 1.0 / scale;
    let mut error = 0f64;
    // Short runs, so that single precision loses nothing that matters.
    for (run, importance) in groups.chunks(64).zip(importance.chunks(64)) {
        let mut sums = [0f32; LANES];
        for (group, importance) in run.iter().zip(importance) {
            for (sum, (w, part)) in sums.iter_mut().zip(group.iter().zip(importance)) {
                let left = w - nearest(w * inverse) * scale;
                *sum += if WEIGHTED { left * left * part } else { left * left };
            }
        }
        error += total(&sums);
    }
    error
}

/// The scale that is best for the codes nearest at scale `s`, `Σ w·c / Σ c²`; 0 if they are all zero.
#[inline(always)]
fn refined_scale<const WEIGHTED: bool>(
    groups: &[[f32; LANES]],
    importance: &[[f32; LANES]],
    scale: f32,
    nearest: impl Fn(f32) -> f32,
) -> f32 {
    let inverse = 1.0 / scale;
    let (mut products, mut squares) = (0f64, 0f64);
    for (run, importance) in groups.chunks(64).zip(importance.chunks(64)) {
        let mut sums = [[0f32; LANES]; 2];
        for (group, importance) in run.iter().zip(importance) {
            for (lane, (w, part)) in group.iter().zip(importance).enumerate() {
                let code = nearest(w * inverse);
                let part = if WEIGHTED { code * part } else { code };
                sums[0][lane] += w * part;
                sums[1][lane] += code * part;
            }
        }
        products += total(&sums[0]);
        squares += total(&sums[1]);
    }
    if squares > 0.0 { (products / squares) as f32 } else { 0.0 }
}

/// Sum of the lanes, halves upon halves.
#[inline(always)]
fn total(lanes: &[f32; LANES]) -> f64 {
    let mut sums = lanes.map(f64::from);
    let mut half = LANES / 2;
    while half > 0 {
        let (low, high) = sums.split_at_mut(half);
        low.iter_mut().zip(high).for_each(|(low, high)| *low += *high);
        half /= 2;
    }
    sums[0]
}

#[inline(always)]
fn nearest_codes_body(code: Code, weights: &mut [f32], scale: f32) {
    // The scale may be too small to have a finite inverse.
    match code {
        Code::I8 => weights.iter_mut().for_each(|w| *w = round_integer((*w / scale).clamp(-127.0, 127.0))),
        Code::I4 => weights.iter_mut().for_each(|w| *w = round_integer((*w / scale).clamp(-8.0, 7.0))),
        Code::F8 => weights.iter_mut().for_each(|w| *w = round_f8(*w / scale)),
    }
}

/// To the nearest integer, ties to even, for magnitudes below 2²²: adding 1.5 · 2²³ leaves no bit for a fraction.
#[inline(always)]
pub fn round_integer(value: f32) -> f32 {
    const SHIFT: f32 = 12_582_912.0;
    (value + SHIFT) - SHIFT
}

/// The nearest integer from -128 to 127, ties to even; NaN stays NaN. Weights have no code -128, inputs do, as in
/// TensorRT's QuantizeLinear.
#[inline(always)]
pub fn round_i8(value: f32) -> f32 {
    round_integer(value.clamp(-128.0, 127.0))
}

/// The nearest E4M3 float, ties to even; magnitudes past the largest become it, NaN stays NaN.
#[inline(always)]
pub fn round_f8(value: f32) -> f32 {
    let clamped = value.clamp(-F8_MAX, F8_MAX);
    // The distance between neighbours: 2^(exponent − 3), and 2⁻⁹ among the subnormal ones.
    let exponent = (clamped.to_bits() >> 23 & 0xff).clamp(127 - 6, 127 + 8);
    // Adding 1.5 · 2²³ times that distance leaves no finer bit.
    let shift = f32::from_bits((exponent - 3 + 23) << 23) * 1.5;
    (clamped + shift) - shift
}

/// The bits of an E4M3 float that `value` equals.
fn f8_bits(value: f32) -> u8 {
    let bits = value.to_bits();
    let sign = (bits >> 24) as u8 & 0x80;
    if value.is_nan() {
        return sign | 0x7f;
    }
    // Times 2⁻¹²⁰ the exponents of both formats have one meaning, subnormal numbers included.
    let scaled = value.abs() * f32::from_bits(7 << 23);
    sign | (scaled.to_bits() >> 20) as u8
}

/// The value of an E4M3 float's bits but for its two NaNs, which give ±480.
#[inline(always)]
pub fn f8_value(bits: u8) -> f32 {
    let (sign, magnitude) = (u32::from(bits & 0x80), u32::from(bits & 0x7f));
    f32::from_bits(sign << 24 | magnitude << 20) * f32::from_bits(247 << 23)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SCHEMES: [Scheme; 3] = [Scheme::INT8, Scheme::INT4, Scheme::FP8];

    fn random(seed: &mut u32) -> f32 {
        let mut uniform = || {
            *seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (*seed >> 8) as f32 / (1 << 24) as f32
        };
        (0..12).map(|_| uniform()).sum::<f32>() - 6.0 // close to normal
    }

    fn restored(scheme: Scheme, row: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let mut scales = vec![f32::NAN; scheme.blocks(row.len())];
        scheme.scales(row, &mut scales);
        let mut codes = row.to_vec();
        scheme.codes(&mut codes, &scales);
        let block = scheme.block().unwrap_or(row.len());
        let values = codes.iter().enumerate().map(|(i, code)| code * scales[i / block]).collect();
        (values, scales)
    }

    fn error(a: &[f32], b: &[f32]) -> f64 {
        a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum()
    }

    #[test]
    fn e4m3_is_its_256_values() {
        let values: Vec<f32> = (0..=255u8).filter(|b| b & 0x7f != 0x7f).map(f8_value).collect();
        assert_eq!(f8_value(0x7e), F8_MAX);
        assert_eq!(f8_value(0x01), 2f32.powi(-9));
        assert_eq!(f8_value(0x38), 1.0);
        for value in &values {
            assert_eq!(round_f8(*value), *value);
            assert_eq!(f8_value(f8_bits(*value)), *value);
        }
        let mut seed = 1;
        for _ in 0..20_000 {
            let value = random(&mut seed) * 10f32.powi((seed % 7) as i32 - 4);
            let nearest = values.iter().map(|v| (v - value).abs()).fold(f32::MAX, f32::min);
            assert_eq!((round_f8(value) - value).abs(), nearest, "{value}");
        }
        assert_eq!(round_f8(1.0625), 1.0, "ties go to even");
        assert_eq!(round_f8(1.1875), 1.25, "ties go to even");
        assert_eq!([round_f8(1e9), round_f8(f32::NEG_INFINITY)], [F8_MAX, -F8_MAX]);
        assert!(round_f8(f32::NAN).is_nan());
    }

    #[test]
    fn the_scale_is_better_than_the_largest_weight_s() {
        let mut seed = 2;
        for scheme in SCHEMES {
            for columns in [1, 7, 128, 192, 300, 2000] {
                let row: Vec<f32> = (0..columns).map(|_| random(&mut seed)).collect();
                let (values, scales) = restored(scheme, &row);
                assert!(scales.iter().all(|s| s.is_finite() && *s > 0.0));
                let block = scheme.block().unwrap_or(columns);
                let mut plain = row.clone();
                for block in plain.chunks_mut(block) {
                    let scale = block.iter().fold(0f32, |m, w| m.max(w.abs())) / scheme.code.largest();
                    let scale = scheme.code.kept_scale(scale);
                    nearest_codes(Isa::detect(), scheme.code, block, scale);
                    block.iter_mut().for_each(|code| *code *= scale);
                }
                assert!(error(&values, &row) <= error(&plain, &row) * 1.0001 + 1e-10, "{scheme}, {columns} columns");
            }
        }
    }

    #[test]
    fn weights_that_matter_more_are_closer() {
        let mut seed = 3;
        for scheme in SCHEMES {
            let row: Vec<f32> = (0..100).map(|_| random(&mut seed)).collect();
            let equal = vec![7e20f32; row.len()];
            let importance: Vec<f32> = (0..row.len()).map(|i| if i % 10 == 0 { 1e-3 } else { 0.0 }).collect();
            let (mut plain, mut same, mut weighted) = ([0f32], [0f32], [0f32]);
            scheme.scales(&row, &mut plain);
            scheme.weighted_scales(&row, &equal, &mut same);
            scheme.weighted_scales(&row, &importance, &mut weighted);
            assert_eq!(plain, same, "{scheme}");
            let off = |scale: f32| -> f64 {
                let off = |w: &f32| f64::from(w - scheme.nearest(*w, scale) * scale).powi(2);
                row.iter().step_by(10).map(off).sum()
            };
            assert!(weighted != plain && off(weighted[0]) < off(plain[0]), "{scheme}: {weighted:?}, {plain:?}");
        }
    }

    #[test]
    fn zeros_outliers_and_extremes_survive() {
        for scheme in SCHEMES {
            let (values, scales) = restored(scheme, &[0.0; 130]);
            assert!(values.iter().all(|v| *v == 0.0) && scales.iter().all(|s| *s == 1.0));

            let mut row = [1e-3f32; 130];
            row[5] = 1e6;
            let (values, _) = restored(scheme, &row);
            assert!((values[5] - 1e6).abs() < 1e5, "{scheme}: {}", values[5]);

            for extreme in [f32::MAX, f32::MIN, 1e-36, -f32::MIN_POSITIVE, 1e-44] {
                let (values, scales) = restored(scheme, &[extreme, extreme / 2.0, 0.0]);
                assert!(values.iter().chain(&scales).all(|v| v.is_finite()), "{scheme} {extreme:e}: {values:?}");
                assert!((values[0] - extreme).abs() <= extreme.abs(), "{scheme} {extreme:e}: {values:?}");
            }
        }
    }

    #[test]
    fn integer_codes_keep_their_bits() {
        for code in -127..=127i8 {
            assert_eq!(Scheme::INT8.bits(f32::from(code)) as i8, code);
        }
        for code in -8..=7i8 {
            assert_eq!((Scheme::INT4.bits(f32::from(code)) << 4) as i8 >> 4, code);
        }
    }
}
