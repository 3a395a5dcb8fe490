//! Matrix products `x · weightᵀ` over quantized weights: `weight[o, i] = codes[o, i] · scales[o, i / block]`.
//!
//! **Packing.** As in [`super::matmul`], panels of [`PANEL`] outputs, the last padded with zeros.
//! - I8 and F8 codes: `[panels, in, PANEL]`, a byte each.
//! - I4 codes: `[panels, ceil(in / 2), PANEL]`, a byte for two inputs of one output, the first in the low half.
//! - Scales: `[panels, blocks, PANEL]` of F32.
//!
//! One vector lane computes one output: it sums `x · code` over a block in the inputs' order in one accumulator, then
//! adds the block's sum times its scale to the output's, block after block. So a sum does not depend on the rows
//! beside it, on the thread, or on how rows are blocked.
#![allow(unsafe_code)]

use rayon::prelude::*;

use super::isa::Isa;
use super::matmul::{Disjoint, Epilogue, PANEL, SERIAL_WORK, finish_row};
use super::{Element, Rows, kernel, mul_add};
use crate::quantize::f8_value;
use crate::tensor::DType;

/// Rows of `x` that one task carries.
const ROW_BLOCK: usize = 32;
/// Rows of `x` in registers at once: 4 × 4 vectors of sums, 4 of weights and 1 of inputs fit 32 registers.
const ROW_TILE: usize = 4;

/// A packed quantized weight of logical shape `[outputs, inputs]`.
#[derive(Debug, Clone, Copy)]
pub struct Quantized<'a> {
    codes: &'a [u8],   // [panels, code rows, PANEL]
    scales: &'a [f32], // [panels, blocks, PANEL]
    dtype: DType,      // I8, I4 or F8
    outputs: usize,
    inputs: usize,
    block: usize, // inputs that share a scale
}

/// Inputs whose decoded weights many rows share: 64 × 64 FP32 stay in the L1 cache.
const DEPTH: usize = 64;

/// Rows of `PANEL` bytes that a panel of codes over `inputs` inputs has.
pub const fn code_rows(dtype: DType, inputs: usize) -> usize {
    match dtype {
        DType::I4 => inputs.div_ceil(2),
        _ => inputs,
    }
}

impl<'a> Quantized<'a> {
    /// A weight of `dtype` I8, I4 or F8; `None` if `codes` or `scales` have another length, or blocks of I4 an odd one.
    pub fn new(
        codes: &'a [u8],
        scales: &'a [f32],
        dtype: DType,
        [outputs, inputs]: [usize; 2],
        block: usize,
    ) -> Option<Quantized<'a>> {
        let panels = outputs.div_ceil(PANEL);
        let fits = dtype.is_code()
            && inputs > 0
            && block > 0
            && (dtype != DType::I4 || block.is_multiple_of(2) || block >= inputs)
            && codes.len() == panels.checked_mul(code_rows(dtype, inputs))?.checked_mul(PANEL)?
            && scales.len() == panels.checked_mul(inputs.div_ceil(block))?.checked_mul(PANEL)?;
        fits.then_some(Quantized { codes, scales, dtype, outputs, inputs, block })
    }

    fn panel(&self, index: usize) -> Panel<'a> {
        let codes = code_rows(self.dtype, self.inputs);
        let blocks = self.inputs.div_ceil(self.block);
        Panel {
            codes: &self.codes.as_chunks().0[index * codes..(index + 1) * codes],
            scales: &self.scales.as_chunks().0[index * blocks..(index + 1) * blocks],
            inputs: self.inputs,
            block: self.block,
        }
    }
}

/// Packs one panel of codes: `rows` are at most [`PANEL`] rows of `inputs` bytes, one code each (an I4 in the low
/// half); `out` is `[code_rows, PANEL]`.
pub fn pack_codes(dtype: DType, rows: &[u8], inputs: usize, out: &mut [u8]) {
    out.fill(0);
    for (lane, row) in rows.chunks_exact(inputs).take(PANEL).enumerate() {
        for (k, code) in row.iter().enumerate() {
            match dtype {
                DType::I4 => out[k / 2 * PANEL + lane] |= (code & 0x0f) << (4 * (k % 2)),
                _ => out[k * PANEL + lane] = *code,
            }
        }
    }
}

/// Runs `$body` with `$rows`, indices of rows of `x` from `$first` on, and `$sums`, an array of their sums: `ROW_TILE`
/// rows at a time, then one.
macro_rules! for_row_tiles {
    ($all:expr, $first:expr, |$rows:ident, $sums:ident| $body:block) => {{
        let (tiles, rest) = $all.as_chunks_mut::<ROW_TILE>();
        let done = tiles.len() * ROW_TILE;
        for (index, $sums) in tiles.iter_mut().enumerate() {
            let $rows: [usize; ROW_TILE] = std::array::from_fn(|i| $first + index * ROW_TILE + i);
            $body
        }
        for (index, sums) in rest.iter_mut().enumerate() {
            let ($rows, $sums) = ([$first + done + index], std::array::from_mut(sums));
            $body
        }
    }};
}

/// Computes `rows` rows of `x · weightᵀ` into `out`, `[rows, outputs]` with rows `out_stride` apart.
///
/// # Panics
/// If `x` or `out` is too short for `rows`; plans are validated before they run.
pub fn linear<T: Element, O: Element>(
    isa: Isa,
    x: Rows<'_, T>,
    rows: usize,
    weight: Quantized<'_>,
    epilogue: Epilogue,
    out: &mut [O],
    out_stride: usize,
) {
    if rows == 0 {
        return;
    }
    assert!(out_stride >= weight.outputs && out.len() >= (rows - 1) * out_stride + weight.outputs);
    assert!(x.width == weight.inputs);
    let row_blocks = rows.div_ceil(ROW_BLOCK);
    let tasks = weight.outputs.div_ceil(PANEL) * row_blocks;
    let out = Disjoint(out.as_mut_ptr());
    let task = |index: usize| {
        let (panel, block) = (index / row_blocks, index % row_blocks);
        let first = block * ROW_BLOCK;
        let count = ROW_BLOCK.min(rows - first);
        let mut sums = [[0f32; PANEL]; ROW_BLOCK];
        let sums = &mut sums[..count];
        match weight.dtype {
            DType::I4 => tile(isa, I4, x, first, weight.panel(panel), sums),
            DType::F8 => tile(isa, F8, x, first, weight.panel(panel), sums),
            _ => tile(isa, I8, x, first, weight.panel(panel), sums),
        }
        let outputs = PANEL.min(weight.outputs - panel * PANEL);
        for (row, sums) in sums.iter().enumerate() {
            // SAFETY: row and columns are inside `out` (asserted above), and tasks write disjoint (row block, panel)
            // rectangles of it.
            let out =
                unsafe { std::slice::from_raw_parts_mut(out.at((first + row) * out_stride + panel * PANEL), outputs) };
            finish_row(epilogue, sums, out);
        }
    };
    if tasks == 1 || rows * weight.outputs * weight.inputs < SERIAL_WORK {
        (0..tasks).for_each(task);
    } else {
        (0..tasks).into_par_iter().for_each(task);
    }
}

/// One panel of a weight.
#[derive(Debug, Clone, Copy)]
pub struct Panel<'a> {
    codes: &'a [[u8; PANEL]],   // [code rows]
    scales: &'a [[f32; PANEL]], // [blocks]
    inputs: usize,
    block: usize,
}

/// How the codes of a panel are read.
pub trait Coding: Copy {
    /// The code of one output of the panel for input `k`, from the byte that holds it.
    fn value(self, byte: u8, k: usize) -> f32;

    /// Row of the panel's codes that input `k` is in.
    fn code_row(self, k: usize) -> usize {
        k
    }

    /// The codes of input `k`, for every output of the panel.
    #[inline(always)]
    fn decode(self, codes: &[[u8; PANEL]], k: usize) -> [f32; PANEL] {
        let bytes = &codes[self.code_row(k)];
        let mut values = [0f32; PANEL];
        for lane in 0..PANEL {
            values[lane] = self.value(bytes[lane], k);
        }
        values
    }
}

/// 8-bit integers.
#[derive(Debug, Clone, Copy)]
pub struct I8;
/// 4-bit integers.
#[derive(Debug, Clone, Copy)]
pub struct I4;
/// E4M3 floats.
#[derive(Debug, Clone, Copy)]
pub struct F8;

impl Coding for I8 {
    #[inline(always)]
    fn value(self, byte: u8, _: usize) -> f32 {
        i32::from(byte as i8) as f32
    }
}

impl Coding for I4 {
    #[inline(always)]
    fn value(self, byte: u8, k: usize) -> f32 {
        // The input's half to the top of 32 bits, and back with its sign.
        let to_top = if k.is_multiple_of(2) { 28 } else { 24 };
        ((i32::from(byte) << to_top) >> 28) as f32
    }

    #[inline(always)]
    fn code_row(self, k: usize) -> usize {
        k / 2
    }
}

impl Coding for F8 {
    #[inline(always)]
    fn value(self, byte: u8, _: usize) -> f32 {
        f8_value(byte)
    }
}

kernel! {
    /// `sums.len()` rows of `x` from row `first` on by one panel, into `sums`, which are zero.
    pub fn tile[C: Coding, T: Element](
        coding: C, x: Rows<'_, T>, first: usize, panel: Panel<'_>, sums: &mut [[f32; PANEL]],
    ) = tile_body
}

#[inline(always)]
fn tile_body<C: Coding, T: Element, const FMA: bool>(
    coding: C,
    x: Rows<'_, T>,
    first: usize,
    panel: Panel<'_>,
    sums: &mut [[f32; PANEL]],
) {
    for (index, scales) in panel.scales.iter().enumerate() {
        let start = index * panel.block;
        let end = panel.inputs.min(start.saturating_add(panel.block));
        let mut block = [[0f32; PANEL]; ROW_BLOCK];
        let block = &mut block[..sums.len()];
        if block.len() <= ROW_TILE {
            // Few rows: codes go from memory to registers.
            for_row_tiles!(block, first, |rows, sums| {
                let x = rows.map(|row| &x.row(row)[start..end]);
                accumulate::<T, _, FMA>(x, sums, |k| coding.decode(panel.codes, start + k));
            });
        } else {
            // Many rows: they share what is decoded, some inputs at a time.
            for start in (start..end).step_by(DEPTH) {
                let end = end.min(start + DEPTH);
                let mut weights = [[0f32; PANEL]; DEPTH];
                for (weights, k) in weights.iter_mut().zip(start..end) {
                    *weights = coding.decode(panel.codes, k);
                }
                for_row_tiles!(block, first, |rows, sums| {
                    let x = rows.map(|row| &x.row(row)[start..end]);
                    accumulate::<T, _, FMA>(x, sums, |k| weights[k]);
                });
            }
        }
        for (sums, block) in sums.iter_mut().zip(block) {
            for lane in 0..PANEL {
                sums[lane] = mul_add::<FMA>(block[lane], scales[lane], sums[lane]);
            }
        }
    }
}

/// Adds `x · weights` to `sums`, input after input; `x` are rows of one length, and `weights(k)` those of input `k`.
#[inline(always)]
#[allow(clippy::needless_range_loop)] // one index for several rows
fn accumulate<T: Element, const ROWS: usize, const FMA: bool>(
    x: [&[T]; ROWS],
    sums: &mut [[f32; PANEL]; ROWS],
    weights: impl Fn(usize) -> [f32; PANEL],
) {
    let mut acc = *sums;
    for k in 0..x[0].len() {
        let weights = weights(k);
        for r in 0..ROWS {
            let input = x[r][k].to_f32();
            for lane in 0..PANEL {
                acc[r][lane] = mul_add::<FMA>(input, weights[lane], acc[r][lane]);
            }
        }
    }
    *sums = acc;
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::super::matmul::{pack_panel, panel_elements};
    use super::*;
    use crate::quantize::Scheme;

    fn random(seed: &mut u32) -> f32 {
        *seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (*seed >> 8) as f32 / (1 << 23) as f32 - 1.0
    }

    /// Packed codes, packed scales, and the weight they stand for.
    fn quantize(scheme: Scheme, weight: &[f32], inputs: usize) -> (Vec<u8>, Vec<f32>, Vec<f32>) {
        let (blocks, block) = (scheme.blocks(inputs), scheme.block().unwrap_or(inputs));
        let (mut codes, mut scales, mut values) = (Vec::new(), Vec::new(), Vec::new());
        for row in weight.chunks(inputs) {
            let mut row_scales = vec![0.0; blocks];
            scheme.scales(row, &mut row_scales);
            let mut row = row.to_vec();
            scheme.codes(&mut row, &row_scales);
            codes.extend(row.iter().map(|code| scheme.bits(*code)));
            values.extend(row.iter().enumerate().map(|(i, code)| code * row_scales[i / block]));
            scales.extend(row_scales);
        }
        let (mut packed_codes, mut packed_scales) = (Vec::new(), Vec::new());
        for (codes, scales) in codes.chunks(PANEL * inputs).zip(scales.chunks(PANEL * blocks)) {
            let mut panel = vec![0; code_rows(scheme.dtype(), inputs) * PANEL];
            pack_codes(scheme.dtype(), codes, inputs, &mut panel);
            packed_codes.extend(panel);
            let mut panel = vec![0.0; panel_elements::<f32>(blocks)];
            pack_panel(scales, blocks, &mut panel);
            packed_scales.extend(panel);
        }
        (packed_codes, packed_scales, values)
    }

    /// Against a plain product in f64 with the weights that the codes stand for, on poisoned outputs.
    fn check<T: Element>(scheme: Scheme) {
        let mut seed = 11;
        for (rows, inputs, outputs) in [(1, 1, 1), (3, 33, 65), (5, 64, 64), (7, 130, 3), (70, 300, 130)] {
            let (x_stride, out_stride) = (inputs + 3, outputs + 5);
            let x: Vec<T> = (0..rows * x_stride).map(|_| T::from_f32(random(&mut seed))).collect();
            let weight: Vec<f32> = (0..outputs * inputs).map(|_| random(&mut seed)).collect();
            let (codes, scales, values) = quantize(scheme, &weight, inputs);
            let block = scheme.block().unwrap_or(inputs);
            let packed = Quantized::new(&codes, &scales, scheme.dtype(), [outputs, inputs], block).unwrap();
            for isa in Isa::available() {
                let mut out = vec![f32::NAN; rows * out_stride];
                linear(isa, Rows::new(&x, x_stride, inputs), rows, packed, Epilogue::Store, &mut out, out_stride);
                let mut alone = vec![f32::NAN; outputs];
                for row in 0..rows {
                    for n in 0..outputs {
                        let terms =
                            (0..inputs).map(|k| x[row * x_stride + k].to_f32() as f64 * values[n * inputs + k] as f64);
                        let (sum, size) = terms.fold((0.0, 0.0), |(s, a), t| (s + t, a + t.abs()));
                        let error = (out[row * out_stride + n] as f64 - sum).abs();
                        assert!(error <= 1e-5 * size, "{scheme} {isa} {rows}x{inputs}x{outputs} [{row}, {n}]: {error}");
                    }
                    assert!(out[row * out_stride + outputs..][..5].iter().all(|v| v.is_nan()), "wrote past a row");
                    let x = Rows::new(&x[row * x_stride..], x_stride, inputs);
                    linear(isa, x, 1, packed, Epilogue::Store, &mut alone, outputs);
                    assert_eq!(alone, out[row * out_stride..][..outputs], "{isa}: a row depends on its batch");
                }
            }
        }
    }

    #[test]
    fn products_are_those_of_the_restored_weights() {
        for scheme in [Scheme::INT8, Scheme::INT4, Scheme::FP8] {
            check::<f32>(scheme);
            check::<bf16>(scheme);
        }
    }

    #[test]
    fn a_nan_is_not_swallowed_and_zero_rows_are_zero() {
        for scheme in [Scheme::INT8, Scheme::INT4, Scheme::FP8] {
            let (codes, scales, _) = quantize(scheme, &[0.0, 0.0, 1.0, -1.0], 2);
            let block = scheme.block().unwrap_or(2);
            let packed = Quantized::new(&codes, &scales, scheme.dtype(), [2, 2], block).unwrap();
            let mut out = [f32::NAN; 2];
            linear(Isa::detect(), Rows::new(&[3.0f32, 2.0], 2, 2), 1, packed, Epilogue::Relu2, &mut out, 2);
            assert!(out[0] == 0.0 && (out[1] - 1.0).abs() < 0.02, "{scheme}: {out:?}");
            linear(Isa::detect(), Rows::new(&[f32::NAN, 2.0], 2, 2), 1, packed, Epilogue::Relu2, &mut out, 2);
            assert!(out[1].is_nan());
        }
    }

    #[test]
    fn lengths_that_do_not_fit_are_refused() {
        let (codes, scales) = ([0u8; 6 * PANEL], [0f32; 2 * PANEL]);
        assert!(Quantized::new(&codes, &scales, DType::I8, [64, 6], 3).is_some());
        assert!(Quantized::new(&codes, &scales, DType::I8, [64, 6], 6).is_none());
        assert!(Quantized::new(&codes, &scales, DType::I8, [65, 6], 3).is_none());
        assert!(Quantized::new(&codes, &scales, DType::I8, [64, 6], 0).is_none());
        assert!(Quantized::new(&codes, &scales, DType::F32, [64, 6], 3).is_none());
        assert!(
            Quantized::new(&codes[..3 * PANEL], &scales, DType::I4, [64, 6], 3).is_none(),
            "a pair over two blocks"
        );
        assert!(Quantized::new(&codes[..3 * PANEL], &scales, DType::I4, [64, 6], 4).is_some());
    }
}
