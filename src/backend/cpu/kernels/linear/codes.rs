//! Quantized weights, dequantized as they are multiplied: `weight[o, i] = codes[o, i] · scales[o, i / group]`, with
//! activations in FP32 or BF16.
//!
//! **Packing.** Panels of [`NR`] outputs, the last padded with zeros.
//! - I8 and F8 codes: `[panels, inputs, NR]`, a byte each.
//! - I4 codes: `[panels, ceil(inputs / 2), NR]`, a byte for two inputs of one output, the first in the low half.
//! - Scales: `[panels, groups, NR]` of F32.
//!
//! One vector lane computes one output: it sums `x · code` over a group in the inputs' order in one accumulator, then
//! adds the group's sum times its scale to the output's, group after group. So a sum does not depend on the rows
//! beside it, on the thread, or on how rows are blocked.
//!
//! **Cost.** A code is widened to FP32 before it is multiplied: about three instructions for 8 or 16 weights where a float
//! has one load. With few rows that is hidden behind memory; with many, codes are dequantized once for all rows of a task.

use super::{
    Activations, FloatElement, LinearKernel, LinearShape, Operand, PackedWeight, PanelShape, RowsRef, TileSize,
};
use crate::backend::cpu::kernels::mul_add;
use crate::error::Result;
use crate::isa::{Isa, dispatch};
use crate::quantize::{code_bits, f8_value};
use crate::tensor::DType;

/// 8-bit integers.
pub(super) static I8: Codes<IntByte> = Codes { name: "i8-codes", coding: IntByte };
/// 4-bit integers, two to a byte.
pub(super) static I4: Codes<IntNibble> = Codes { name: "i4-codes", coding: IntNibble };
/// E4M3 floats.
pub(super) static F8: Codes<FloatByte> = Codes { name: "f8-codes", coding: FloatByte };

/// Outputs of one panel: four AVX-512 vectors of sums.
const NR: usize = 64;
/// Rows of `x` in registers at once: 4 × 4 vectors of sums, 4 of weights and 1 of inputs fit 32 registers.
const MR: usize = 4;
/// Rows of `x` that one task carries.
const MC: usize = 32;
/// Inputs whose dequantized weights many rows share: 64 × 64 FP32 stay in the L1 cache.
const KC: usize = 64;

/// The kernel of a kind of code.
pub(super) struct Codes<C> {
    name: &'static str,
    coding: C,
}

impl<C: Coding> LinearKernel for Codes<C> {
    fn name(&self) -> &'static str {
        self.name
    }

    fn weight_dtype(&self) -> DType {
        C::DTYPE
    }

    fn activation_dtypes(&self) -> &'static [DType] {
        &[DType::F32, DType::BF16]
    }

    fn tile_size(&self) -> TileSize {
        TileSize { mr: MR, nr: NR, mc: MC }
    }

    fn has_scales(&self) -> bool {
        true
    }

    fn check(&self, shape: LinearShape) -> Result<(), String> {
        // Codes of one byte must have one scale.
        let whole = shape.group >= shape.inputs || shape.group.is_multiple_of(C::PER_BYTE);
        match shape.group > 0 && whole {
            true => Ok(()),
            false => Err(format!("{} codes cannot have groups of {}", C::DTYPE, shape.group)),
        }
    }

    fn panel_shape(&self, columns: usize) -> PanelShape {
        PanelShape::from([columns.div_ceil(C::PER_BYTE), NR])
    }

    fn pack(&self, rows: &[f32], columns: usize, panel: &mut [u8]) {
        for (lane, row) in rows.chunks_exact(columns).enumerate() {
            for (k, code) in row.iter().enumerate() {
                let at = k / C::PER_BYTE * NR + lane;
                panel[at] |= code_bits(C::DTYPE, *code) << (8 / C::PER_BYTE * (k % C::PER_BYTE));
            }
        }
    }

    fn unpack(&self, panel: &[u8], columns: usize, rows: &mut [f32]) {
        for (lane, row) in rows.chunks_exact_mut(columns).enumerate() {
            for (k, code) in row.iter_mut().enumerate() {
                *code = self.coding.value(panel[k / C::PER_BYTE * NR + lane], k);
            }
        }
    }

    fn tile(
        &self,
        isa: Isa,
        weight: &PackedWeight<'_>,
        panel: usize,
        x: Activations<'_>,
        sums: &mut [f32],
    ) -> Result<()> {
        let panel = Panel {
            codes: weight.panel::<u8>(Operand::Weight, panel).as_chunks().0,
            scales: weight.panel::<f32>(Operand::Scales, panel).as_chunks().0,
            inputs: weight.shape.inputs,
            group: weight.shape.group,
        };
        let sums = sums.as_chunks_mut().0;
        match x {
            Activations::F32(x) => tile(isa, self.coding, x, panel, sums),
            Activations::Bf16(x) => tile(isa, self.coding, x, panel, sums),
            Activations::I8 { .. } => return Err(x.unexpected(self)),
        }
        Ok(())
    }
}

/// Runs `$body` with `$rows`, indices of rows of `x` and `$sums`, an array of their sums: `MR`
/// rows at a time, then one.
macro_rules! for_row_tiles {
    ($all:expr, |$rows:ident, $sums:ident| $body:block) => {{
        let (tiles, rest) = $all.as_chunks_mut::<MR>();
        let done = tiles.len() * MR;
        for (index, $sums) in tiles.iter_mut().enumerate() {
            let $rows: [usize; MR] = std::array::from_fn(|i| index * MR + i);
            $body
        }
        for (index, sums) in rest.iter_mut().enumerate() {
            let ($rows, $sums) = ([done + index], std::array::from_mut(sums));
            $body
        }
    }};
}

/// One panel of a weight.
#[derive(Debug, Clone, Copy)]
struct Panel<'a> {
    codes: &'a [[u8; NR]],   // [code rows]
    scales: &'a [[f32; NR]], // [groups]
    inputs: usize,
    group: usize,
}

/// Encoding of a panel's codes.
pub(super) trait Coding: Copy + Send + Sync {
    const DTYPE: DType;
    /// Codes of one byte, the first in the lowest bits.
    const PER_BYTE: usize = 1;

    /// The code of one output of the panel for input `k`, from the byte that holds it.
    fn value(self, byte: u8, k: usize) -> f32;

    /// The codes of input `k`, for every output of the panel.
    #[inline(always)]
    fn dequantize(self, codes: &[[u8; NR]], k: usize) -> [f32; NR] {
        let bytes = &codes[k / Self::PER_BYTE];
        let mut values = [0f32; NR];
        for lane in 0..NR {
            values[lane] = self.value(bytes[lane], k);
        }
        values
    }
}

/// 8-bit integers.
#[derive(Debug, Clone, Copy)]
pub(super) struct IntByte;
/// 4-bit integers.
#[derive(Debug, Clone, Copy)]
pub(super) struct IntNibble;
/// E4M3 floats.
#[derive(Debug, Clone, Copy)]
pub(super) struct FloatByte;

impl Coding for IntByte {
    const DTYPE: DType = DType::I8;

    #[inline(always)]
    fn value(self, byte: u8, _: usize) -> f32 {
        i32::from(byte as i8) as f32
    }
}

impl Coding for IntNibble {
    const DTYPE: DType = DType::I4;
    const PER_BYTE: usize = 2;

    #[inline(always)]
    fn value(self, byte: u8, k: usize) -> f32 {
        // The input's half to the top of 32 bits, and back with its sign.
        let to_top = if k.is_multiple_of(2) { 28 } else { 24 };
        ((i32::from(byte) << to_top) >> 28) as f32
    }
}

impl Coding for FloatByte {
    const DTYPE: DType = DType::F8;

    #[inline(always)]
    fn value(self, byte: u8, _: usize) -> f32 {
        f8_value(byte)
    }
}

dispatch! {
    /// `sums.len()` rows of `x` by one panel, into `sums`, which are zero.
    fn tile[C: Coding, T: FloatElement](coding: C, x: RowsRef<'_, T>, panel: Panel<'_>, sums: &mut [[f32; NR]]) {
        avx512 => tile_body::<C, T, true>,
        avx2 => tile_body::<C, T, true>,
        portable => tile_body::<C, T, false>,
    }
}

#[inline(always)]
fn tile_body<C: Coding, T: FloatElement, const FMA: bool>(
    coding: C,
    x: RowsRef<'_, T>,
    panel: Panel<'_>,
    sums: &mut [[f32; NR]],
) {
    for (index, scales) in panel.scales.iter().enumerate() {
        let start = index * panel.group;
        let end = panel.inputs.min(start.saturating_add(panel.group));
        let mut group_sums = [[0f32; NR]; MC];
        let group_sums = &mut group_sums[..sums.len()];
        if group_sums.len() <= MR {
            // Few rows: codes go from memory to registers.
            for_row_tiles!(group_sums, |rows, sums| {
                let x = rows.map(|row| &x.row(row)[start..end]);
                accumulate::<T, _, FMA>(x, sums, |k| coding.dequantize(panel.codes, start + k));
            });
        } else {
            // Many rows: they share the dequantized weights, KC inputs at a time.
            for start in (start..end).step_by(KC) {
                let end = end.min(start + KC);
                let mut weights = [[0f32; NR]; KC];
                for (weights, k) in weights.iter_mut().zip(start..end) {
                    *weights = coding.dequantize(panel.codes, k);
                }
                for_row_tiles!(group_sums, |rows, sums| {
                    let x = rows.map(|row| &x.row(row)[start..end]);
                    accumulate::<T, _, FMA>(x, sums, |k| weights[k]);
                });
            }
        }
        for (sums, group_sums) in sums.iter_mut().zip(group_sums) {
            for lane in 0..NR {
                sums[lane] = mul_add::<FMA>(group_sums[lane], scales[lane], sums[lane]);
            }
        }
    }
}

/// Adds `x · weights` to `sums`, input after input; `x` are rows of one length, and `weights(k)` those of input `k`.
#[inline(always)]
#[allow(clippy::needless_range_loop)] // one index for several rows
fn accumulate<T: FloatElement, const ROWS: usize, const FMA: bool>(
    x: [&[T]; ROWS],
    sums: &mut [[f32; NR]; ROWS],
    weights: impl Fn(usize) -> [f32; NR],
) {
    let mut acc = *sums;
    for k in 0..x[0].len() {
        let weights = weights(k);
        for r in 0..ROWS {
            let input = x[r][k].to_f32();
            for lane in 0..NR {
                acc[r][lane] = mul_add::<FMA>(input, weights[lane], acc[r][lane]);
            }
        }
    }
    *sums = acc;
}
