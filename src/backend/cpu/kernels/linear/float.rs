//! Weights in FP32 and BF16, multiplied as they are.
//!
//! **Packing.** A weight `[outputs, inputs]` is cut into panels of [`NR`] outputs, the last padded with zeros.
//! - F32: `[panels, inputs, NR]`: the panel's outputs for one input are neighbours.
//! - BF16: `[panels, ceil(inputs / 2), NR, 2]`: likewise for a pair of inputs, as `vdpbf16ps` takes them.
//!
//! One vector lane computes one output, summing its inputs in order in one accumulator, on every path. So a sum
//! does not depend on the rows beside it, on the thread, or on how rows and inputs are blocked (a block's partial
//! sums are stored and reloaded as FP32, which is exact).
//!
//! **Cost.** A register tile loads 4 vectors of weights for 24 multiply-adds (MR × 4), so it is bound by the multiply
//! units from about 4 rows on, and by reading weights below.
#![allow(unsafe_code)]

use std::marker::PhantomData;

use half::bf16;

#[cfg(target_arch = "x86_64")]
use super::avx2;
use super::{
    Activations, FloatElement, LinearKernel, LinearShape, Operand, PackedWeight, PanelShape, RowsRef, TileSize,
};
use crate::error::Result;
use crate::isa::{Isa, dispatch};
use crate::tensor::DType;

/// Weights in FP32.
pub(super) static F32: Float<f32> = Float(PhantomData);
/// Weights in BF16.
pub(super) static BF16: Float<bf16> = Float(PhantomData);

/// Outputs of one panel: four AVX-512 vectors.
pub(super) const NR: usize = 64;
/// Rows of `x` in registers at once: 6 × 4 vectors of sums, 4 of weights and 1 of inputs fit 32 registers.
const MR: usize = 6;
/// Rows of `x` that one task carries through all its input blocks: their partial sums stay in the L1/L2 caches.
const MC: usize = 96;
/// Inputs of a panel that stay in the L2 cache while the rows pass: 2048 × 64 BF16 = 256 KiB.
const KC: usize = 2048;
/// Inputs of all rows that are packed before the next ones: what they are written to stays in the nearest cache.
const PACK_INPUTS: usize = 64;

/// The kernel of an element type.
pub(super) struct Float<T>(PhantomData<T>);

/// An element type of weights.
trait Weight: FloatElement {
    const NAME: &'static str;
    const DTYPE: DType;
    /// Inputs that lie side by side.
    const GROUP: usize;

    /// The activations of this type, if these are.
    fn rows<'a>(x: Activations<'a>) -> Option<RowsRef<'a, Self>>;

    /// Adds one panel's products to `sums`.
    fn tile(isa: Isa, x: RowsRef<'_, Self>, panel: &[Self], sums: &mut [[f32; NR]]);
}

impl Weight for f32 {
    const NAME: &'static str = "f32";
    const DTYPE: DType = DType::F32;
    const GROUP: usize = 1;

    fn rows<'a>(x: Activations<'a>) -> Option<RowsRef<'a, f32>> {
        if let Activations::F32(rows) = x { Some(rows) } else { None }
    }

    fn tile(isa: Isa, x: RowsRef<'_, f32>, panel: &[f32], sums: &mut [[f32; NR]]) {
        tile_f32(isa, x, panel, sums);
    }
}

impl Weight for bf16 {
    const NAME: &'static str = "bf16-pairs";
    const DTYPE: DType = DType::BF16;
    const GROUP: usize = 2;

    fn rows<'a>(x: Activations<'a>) -> Option<RowsRef<'a, bf16>> {
        if let Activations::Bf16(rows) = x { Some(rows) } else { None }
    }

    fn tile(isa: Isa, x: RowsRef<'_, bf16>, panel: &[bf16], sums: &mut [[f32; NR]]) {
        tile_bf16(isa, x, panel, sums);
    }
}

impl<T: Weight> LinearKernel for Float<T> {
    fn name(&self) -> &'static str {
        T::NAME
    }

    fn weight_dtype(&self) -> DType {
        T::DTYPE
    }

    fn activation_dtypes(&self) -> &'static [DType] {
        const { &[T::DTYPE] }
    }

    fn tile_size(&self) -> TileSize {
        TileSize { mr: MR, nr: NR, mc: MC }
    }

    fn has_scales(&self) -> bool {
        false
    }

    fn check(&self, _: LinearShape) -> Result<(), String> {
        Ok(())
    }

    fn panel_shape(&self, columns: usize) -> PanelShape {
        match T::GROUP {
            1 => PanelShape::from([columns, NR]),
            group => PanelShape::from([columns.div_ceil(group), NR, group]),
        }
    }

    fn pack(&self, rows: &[f32], columns: usize, panel: &mut [u8]) {
        let panel: &mut [T] = bytemuck::cast_slice_mut(panel);
        for first in (0..columns).step_by(PACK_INPUTS) {
            let end = columns.min(first + PACK_INPUTS);
            for (lane, row) in rows.chunks_exact(columns).enumerate() {
                for (group, values) in (first / T::GROUP..).zip(row[first..end].chunks(T::GROUP)) {
                    let at = (group * NR + lane) * T::GROUP;
                    for (out, value) in panel[at..at + T::GROUP].iter_mut().zip(values) {
                        *out = T::from_f32(*value);
                    }
                }
            }
        }
    }

    fn unpack(&self, panel: &[u8], columns: usize, rows: &mut [f32]) {
        let panel: &[T] = bytemuck::cast_slice(panel);
        for (lane, row) in rows.chunks_exact_mut(columns).enumerate() {
            for (k, value) in row.iter_mut().enumerate() {
                *value = panel[(k / T::GROUP * NR + lane) * T::GROUP + k % T::GROUP].to_f32();
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
        let rows = T::rows(x).ok_or_else(|| x.unexpected(self))?;
        T::tile(isa, rows, weight.panel(Operand::Weight, panel), sums.as_chunks_mut().0);
        Ok(())
    }
}

dispatch! {
    fn tile_f32[](x: RowsRef<'_, f32>, panel: &[f32], sums: &mut [[f32; NR]]) {
        avx512 => tile_body::<x86::F32Avx512, 4>,
        avx2 => avx2::tile_body::<f32>,
        portable => tile_body::<portable::F32, 1>,
    }
}

dispatch! {
    fn tile_bf16[](x: RowsRef<'_, bf16>, panel: &[bf16], sums: &mut [[f32; NR]]) {
        avx512_bf16 => tile_body::<x86::Bf16Dot, 4>,
        avx512 => tile_body::<x86::Bf16Avx512, 4>,
        avx2 => avx2::tile_body::<bf16>,
        portable => tile_body::<portable::Bf16, 1>,
    }
}

/// Sixteen lanes of FP32 sums and the multiply-add of one group of inputs.
trait Lanes {
    type Weight: Weight;
    /// 16 sums.
    type Sum: Copy;
    /// 16 lanes × `GROUP` weights.
    type Weights: Copy;
    /// One group of inputs in every lane.
    type Inputs: Copy;

    unsafe fn load_sum(from: *const f32) -> Self::Sum;
    unsafe fn store_sum(sum: Self::Sum, to: *mut f32);
    unsafe fn load_weights(from: *const Self::Weight) -> Self::Weights;
    /// `len` is `GROUP`, or less for the last inputs of an odd number.
    unsafe fn splat_inputs(from: *const Self::Weight, len: usize) -> Self::Inputs;
    unsafe fn multiply_add(sum: Self::Sum, inputs: Self::Inputs, weights: Self::Weights) -> Self::Sum;
}

/// One task: `sums.len()` rows by one panel, [`KC`] inputs at a time. The instructions of `L` must be present, which the
/// dispatchers above see to.
#[inline(always)]
fn tile_body<L: Lanes, const VECTORS: usize>(x: RowsRef<'_, L::Weight>, panel: &[L::Weight], sums: &mut [[f32; NR]]) {
    let (inputs, rows) = (x.width(), sums.len());
    assert!(panel.len() == inputs.next_multiple_of(L::Weight::GROUP) * NR && x.has_rows(rows));
    let (data, stride) = x.from_row(0);
    for k in (0..inputs).step_by(KC) {
        let count = KC.min(inputs - k);
        for row in (0..rows).step_by(MR) {
            // SAFETY: `row < rows` and `k < inputs`, and `k` is a multiple of the group; the assertion above puts the rows
            // of `x` and the panel's inputs in bounds.
            unsafe {
                let x = data.as_ptr().add(row * stride + k);
                let panel = panel.as_ptr().add(k * NR);
                let sums = sums.as_mut_ptr().add(row).cast::<f32>();
                match rows - row {
                    1 => run_register_tile::<L, VECTORS, 1>(x, stride, panel, count, sums),
                    2 => run_register_tile::<L, VECTORS, 2>(x, stride, panel, count, sums),
                    3 => run_register_tile::<L, VECTORS, 3>(x, stride, panel, count, sums),
                    4 => run_register_tile::<L, VECTORS, 4>(x, stride, panel, count, sums),
                    5 => run_register_tile::<L, VECTORS, 5>(x, stride, panel, count, sums),
                    _ => run_register_tile::<L, VECTORS, MR>(x, stride, panel, count, sums),
                }
            }
        }
    }
}

/// `ROWS` rows by one panel over `inputs` inputs, `VECTORS` × 16 lanes at a time; adds to `sums`, `[ROWS, NR]`.
///
/// # Safety
/// `x` has `ROWS` rows of `inputs`, `panel` the whole panel of as many inputs, `sums` `ROWS × NR` elements.
#[inline(always)]
#[allow(clippy::needless_range_loop)] // indices, not iterators: no closure may come between vectors and registers
unsafe fn run_register_tile<L: Lanes, const VECTORS: usize, const ROWS: usize>(
    x: *const L::Weight,
    x_stride: usize,
    panel: *const L::Weight,
    inputs: usize,
    sums: *mut f32,
) {
    let group = L::Weight::GROUP;
    let mut lane = 0;
    while lane < NR {
        // SAFETY: `lane + VECTORS * 16 <= NR`; all offsets stay inside the promised shapes.
        unsafe {
            let mut acc = [[L::load_sum(sums); VECTORS]; ROWS];
            for m in 0..ROWS {
                for v in 0..VECTORS {
                    acc[m][v] = L::load_sum(sums.add(m * NR + lane + v * 16));
                }
            }
            let mut k = 0;
            while k < inputs {
                let at = panel.add(k * NR + lane * group);
                let mut weights = [L::load_weights(at); VECTORS];
                for v in 1..VECTORS {
                    weights[v] = L::load_weights(at.add(v * 16 * group));
                }
                for m in 0..ROWS {
                    let input = L::splat_inputs(x.add(m * x_stride + k), group.min(inputs - k));
                    for v in 0..VECTORS {
                        acc[m][v] = L::multiply_add(acc[m][v], input, weights[v]);
                    }
                }
                k += group;
            }
            for m in 0..ROWS {
                for v in 0..VECTORS {
                    L::store_sum(acc[m][v], sums.add(m * NR + lane + v * 16));
                }
            }
        }
        lane += VECTORS * 16;
    }
}

/// Reads one group of BF16 inputs as 32 bits, the second half zero if there is only one.
///
/// # Safety
/// `from` has `len` elements, 1 or 2.
#[inline(always)]
unsafe fn read_pair(from: *const bf16, len: usize) -> u32 {
    // SAFETY: the caller's promise; BF16 pairs need not be aligned to 4 bytes.
    unsafe { if len == 2 { from.cast::<u32>().read_unaligned() } else { u32::from(from.read().to_bits()) } }
}

mod portable {
    use super::{Lanes, bf16, read_pair};

    pub struct F32;
    pub struct Bf16;

    impl Lanes for F32 {
        type Weight = f32;
        type Sum = [f32; 16];
        type Weights = [f32; 16];
        type Inputs = f32;

        #[inline(always)]
        unsafe fn load_sum(from: *const f32) -> [f32; 16] {
            // SAFETY: the caller has 16 elements there.
            unsafe { from.cast::<[f32; 16]>().read_unaligned() }
        }
        #[inline(always)]
        unsafe fn store_sum(sum: [f32; 16], to: *mut f32) {
            // SAFETY: as above.
            unsafe { to.cast::<[f32; 16]>().write_unaligned(sum) }
        }
        #[inline(always)]
        unsafe fn load_weights(from: *const f32) -> [f32; 16] {
            // SAFETY: as above.
            unsafe { from.cast::<[f32; 16]>().read_unaligned() }
        }
        #[inline(always)]
        unsafe fn splat_inputs(from: *const f32, _len: usize) -> f32 {
            // SAFETY: the caller has an element there.
            unsafe { from.read() }
        }
        #[inline(always)]
        unsafe fn multiply_add(mut sum: [f32; 16], input: f32, weights: [f32; 16]) -> [f32; 16] {
            for (s, w) in sum.iter_mut().zip(weights) {
                *s += input * w;
            }
            sum
        }
    }

    impl Lanes for Bf16 {
        type Weight = bf16;
        type Sum = [f32; 16];
        type Weights = [u32; 16];
        type Inputs = (f32, f32);

        #[inline(always)]
        unsafe fn load_sum(from: *const f32) -> [f32; 16] {
            // SAFETY: the caller's promise.
            unsafe { F32::load_sum(from) }
        }
        #[inline(always)]
        unsafe fn store_sum(sum: [f32; 16], to: *mut f32) {
            // SAFETY: the caller's promise.
            unsafe { F32::store_sum(sum, to) }
        }
        #[inline(always)]
        unsafe fn load_weights(from: *const bf16) -> [u32; 16] {
            // SAFETY: the caller has 16 pairs there.
            unsafe { from.cast::<[u32; 16]>().read_unaligned() }
        }
        #[inline(always)]
        unsafe fn splat_inputs(from: *const bf16, len: usize) -> (f32, f32) {
            // SAFETY: the caller's promise.
            let pair = unsafe { read_pair(from, len) };
            (f32::from_bits(pair << 16), f32::from_bits(pair & 0xffff_0000))
        }
        #[inline(always)]
        unsafe fn multiply_add(mut sum: [f32; 16], input: (f32, f32), weights: [u32; 16]) -> [f32; 16] {
            for (s, w) in sum.iter_mut().zip(weights) {
                *s += input.0 * f32::from_bits(w << 16);
                *s += input.1 * f32::from_bits(w & 0xffff_0000);
            }
            sum
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    //! Every method needs the instructions in its type's name, which the dispatchers above check.
    #![allow(clippy::missing_safety_doc)]

    use std::arch::x86_64::*;

    use super::{Lanes, bf16, read_pair};

    pub struct F32Avx512;
    pub struct Bf16Avx512;
    pub struct Bf16Dot;

    /// The sums of every AVX-512 type.
    macro_rules! sums_avx512 {
        () => {
            type Sum = __m512;
            #[inline(always)]
            unsafe fn load_sum(from: *const f32) -> __m512 {
                // SAFETY: the caller has 16 elements there.
                unsafe { _mm512_loadu_ps(from) }
            }
            #[inline(always)]
            unsafe fn store_sum(sum: __m512, to: *mut f32) {
                // SAFETY: as above.
                unsafe { _mm512_storeu_ps(to, sum) }
            }
        };
    }

    impl Lanes for F32Avx512 {
        type Weight = f32;
        type Weights = __m512;
        type Inputs = __m512;
        sums_avx512!();

        #[inline(always)]
        unsafe fn load_weights(from: *const f32) -> __m512 {
            // SAFETY: the caller has 16 weights there.
            unsafe { _mm512_loadu_ps(from) }
        }
        #[inline(always)]
        unsafe fn splat_inputs(from: *const f32, _len: usize) -> __m512 {
            // SAFETY: the caller has an element there.
            unsafe { _mm512_set1_ps(from.read()) }
        }
        #[inline(always)]
        unsafe fn multiply_add(sum: __m512, inputs: __m512, weights: __m512) -> __m512 {
            // SAFETY: the instructions are present.
            unsafe { _mm512_fmadd_ps(inputs, weights, sum) }
        }
    }

    impl Lanes for Bf16Dot {
        type Weight = bf16;
        type Weights = __m512bh;
        type Inputs = __m512bh;
        sums_avx512!();

        #[inline(always)]
        unsafe fn load_weights(from: *const bf16) -> __m512bh {
            // SAFETY: the caller has 16 pairs there; both types are 64 bytes without invalid values.
            unsafe { std::mem::transmute(_mm512_loadu_si512(from.cast())) }
        }
        #[inline(always)]
        unsafe fn splat_inputs(from: *const bf16, len: usize) -> __m512bh {
            // SAFETY: the caller's promise; both types are 64 bytes without invalid values.
            unsafe { std::mem::transmute(_mm512_set1_epi32(read_pair(from, len) as i32)) }
        }
        #[inline(always)]
        unsafe fn multiply_add(sum: __m512, inputs: __m512bh, weights: __m512bh) -> __m512 {
            // SAFETY: the instructions are present.
            unsafe { _mm512_dpbf16_ps(sum, inputs, weights) }
        }
    }

    impl Lanes for Bf16Avx512 {
        type Weight = bf16;
        type Weights = [__m512; 2];
        type Inputs = [__m512; 2];
        sums_avx512!();

        #[inline(always)]
        unsafe fn load_weights(from: *const bf16) -> [__m512; 2] {
            // SAFETY: the caller has 16 pairs there.
            unsafe {
                let pairs = _mm512_loadu_si512(from.cast());
                let high = _mm512_and_si512(pairs, _mm512_set1_epi32(0xffff_0000_u32 as i32));
                [_mm512_castsi512_ps(_mm512_slli_epi32::<16>(pairs)), _mm512_castsi512_ps(high)]
            }
        }
        #[inline(always)]
        unsafe fn splat_inputs(from: *const bf16, len: usize) -> [__m512; 2] {
            // SAFETY: the caller's promise.
            unsafe {
                let pair = read_pair(from, len);
                [_mm512_set1_ps(f32::from_bits(pair << 16)), _mm512_set1_ps(f32::from_bits(pair & 0xffff_0000))]
            }
        }
        #[inline(always)]
        unsafe fn multiply_add(sum: __m512, inputs: [__m512; 2], weights: [__m512; 2]) -> __m512 {
            // SAFETY: the instructions are present.
            unsafe { _mm512_fmadd_ps(inputs[1], weights[1], _mm512_fmadd_ps(inputs[0], weights[0], sum)) }
        }
    }
}
