//! Matrix products `x · weightᵀ` over packed weights.
//!
//! **Packing.** A weight `[out, in]` is cut into panels of [`PANEL`] outputs, the last padded with zeros.
//! - F32: `[panels, in, PANEL]`: the panel's outputs for one input are neighbours.
//! - BF16: `[panels, ceil(in / 2), PANEL, 2]`: likewise for a pair of inputs, as `vdpbf16ps` takes them.
//!
//! One vector lane computes one output, summing its inputs in order in one accumulator, on every path. So a sum
//! does not depend on the rows beside it, on the thread, or on how rows and inputs are blocked (a block's partial
//! sums are stored and reloaded as FP32, which is exact).
#![allow(unsafe_code)]

use half::bf16;
use rayon::prelude::*;

use super::isa::Isa;
use super::{Element, Rows};

/// Outputs of one panel: four AVX-512 vectors.
pub const PANEL: usize = 64;
/// Rows of `x` that one task carries through all its input blocks: their partial sums stay in the L1/L2 caches.
const ROW_BLOCK: usize = 96;
/// Rows of `x` in registers at once: 6 × 4 vectors of sums, 4 of weights and 1 of inputs fit 32 registers.
const ROW_TILE: usize = 6;
/// Inputs of a panel that stay in the L2 cache while the rows pass: 2048 × 64 BF16 = 256 KiB.
const INPUT_BLOCK: usize = 2048;
/// Multiply-adds below which a product is not worth waking other threads.
pub(super) const SERIAL_WORK: usize = 1 << 18;

/// A packed weight.
#[derive(Debug, Clone, Copy)]
pub struct Packed<'a, T> {
    data: &'a [T], // [panels, in, PANEL] or [panels, in / 2, PANEL, 2]
    outputs: usize,
    inputs: usize,
}

/// An element type that weights are packed in.
pub trait Weight: bytemuck::Pod + Send + Sync {
    /// Inputs that lie side by side.
    const GROUP: usize;
}

impl Weight for f32 {
    const GROUP: usize = 1;
}

impl Weight for bf16 {
    const GROUP: usize = 2;
}

/// Elements of one panel over `inputs` inputs, zero padding included.
pub const fn panel_elements<T: Weight>(inputs: usize) -> usize {
    inputs.next_multiple_of(T::GROUP) * PANEL
}

impl<'a, T: Weight> Packed<'a, T> {
    /// A packed weight of logical shape `[outputs, inputs]`; `None` if `data` is not that long.
    pub fn new(data: &'a [T], outputs: usize, inputs: usize) -> Option<Packed<'a, T>> {
        let elements = outputs.div_ceil(PANEL).checked_mul(panel_elements::<T>(inputs))?;
        (data.len() == elements && inputs > 0).then_some(Packed { data, outputs, inputs })
    }

    fn panel(&self, index: usize) -> &'a [T] {
        let len = panel_elements::<T>(self.inputs);
        &self.data[index * len..(index + 1) * len]
    }
}

/// Packs one panel: `out` is `[panel_elements]`; `rows` are at most [`PANEL`] rows of `inputs` elements.
pub fn pack_panel<T: Weight + Element>(rows: &[f32], inputs: usize, out: &mut [T]) {
    /// Inputs of all rows that are packed before the next ones: what they are written to stays in the nearest cache.
    const TILE: usize = 64;
    let lanes = rows.len() / inputs.max(1);
    if lanes < PANEL || !inputs.is_multiple_of(T::GROUP) {
        out.fill(T::zeroed());
    }
    for first in (0..inputs).step_by(TILE) {
        let end = inputs.min(first + TILE);
        for (lane, row) in rows.chunks_exact(inputs).take(PANEL).enumerate() {
            for (group, values) in (first / T::GROUP..).zip(row[first..end].chunks(T::GROUP)) {
                let at = (group * PANEL + lane) * T::GROUP;
                for (out, value) in out[at..at + T::GROUP].iter_mut().zip(values) {
                    *out = T::from_f32(*value);
                }
            }
        }
    }
}

/// What happens to a sum.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Epilogue {
    /// `out = sum`
    Store,
    /// `out = max(sum, 0)²`
    Relu2,
    /// `out = out + sum`
    Accumulate,
}

/// Computes `rows` rows of `x · weightᵀ` into `out`, `[rows, outputs]` with rows `out_stride` apart.
///
/// # Panics
/// If `x` or `out` is too short for `rows`; plans are validated before they run.
pub fn linear<T: Weight + Multiply, O: Element>(
    isa: Isa,
    x: Rows<'_, T>,
    rows: usize,
    weight: Packed<'_, T>,
    epilogue: Epilogue,
    out: &mut [O],
    out_stride: usize,
) {
    if rows == 0 {
        return;
    }
    assert!(out_stride >= weight.outputs && out.len() >= (rows - 1) * out_stride + weight.outputs);
    assert!(x.width == weight.inputs && x.data.len() >= (rows - 1) * x.stride + x.width);
    let row_blocks = rows.div_ceil(ROW_BLOCK);
    let tasks = weight.outputs.div_ceil(PANEL) * row_blocks;
    let out = Disjoint(out.as_mut_ptr());
    let task = |index: usize| {
        let (panel, block) = (index / row_blocks, index % row_blocks);
        let first = block * ROW_BLOCK;
        let tile = Tile {
            x: x.data[first * x.stride..].as_ptr(),
            x_stride: x.stride,
            rows: ROW_BLOCK.min(rows - first),
            panel: weight.panel(panel),
            inputs: weight.inputs,
            outputs: PANEL.min(weight.outputs - panel * PANEL),
            epilogue,
            // SAFETY: `first < rows` and `panel * PANEL < outputs`, so the offset is inside `out` (asserted above).
            out: unsafe { out.at(first * out_stride + panel * PANEL) },
            out_stride,
        };
        // SAFETY: the asserts above put all rows of `x` and `out` in bounds, `panel` has `panel_elements`, and
        // tasks write disjoint (row block, panel) rectangles of `out`.
        unsafe { T::tile(isa, tile) }
    };
    if tasks == 1 || rows * weight.outputs * weight.inputs < SERIAL_WORK {
        (0..tasks).for_each(task);
    } else {
        (0..tasks).into_par_iter().for_each(task);
    }
}

/// The start of an output that several tasks write disjoint parts of.
pub(super) struct Disjoint<T>(pub(super) *mut T);

// SAFETY: the pointer is only used through `at`, whose callers write disjoint elements; `T` is plain data.
unsafe impl<T: Send> Sync for Disjoint<T> {}

impl<T> Disjoint<T> {
    /// # Safety
    /// `offset` is inside the allocation.
    pub(super) unsafe fn at(&self, offset: usize) -> *mut T {
        // SAFETY: the caller's promise.
        unsafe { self.0.add(offset) }
    }
}

/// One task: up to `ROW_BLOCK` rows by one panel.
pub struct Tile<'a, T, O> {
    x: *const T, // [rows, inputs], rows x_stride apart
    x_stride: usize,
    rows: usize,
    panel: &'a [T], // one packed panel
    inputs: usize,
    outputs: usize, // lanes of the panel that exist
    epilogue: Epilogue,
    out: *mut O, // [rows, outputs], rows out_stride apart
    out_stride: usize,
}

/// A weight type's products on each instruction set.
pub trait Multiply: Sized {
    /// Runs one tile.
    ///
    /// # Safety
    /// The tile's pointers are valid for the shapes beside them, and nothing else accesses its part of `out`.
    unsafe fn tile<O: Element>(isa: Isa, tile: Tile<'_, Self, O>);
}

macro_rules! multiply {
    ($ty:ty, avx512_bf16: $dp:ty, avx512: $avx512:ty, avx2: $avx2:ty, portable: $portable:ty) => {
        impl Multiply for $ty {
            unsafe fn tile<O: Element>(isa: Isa, tile: Tile<'_, $ty, O>) {
                #[cfg(target_arch = "x86_64")]
                {
                    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
                    unsafe fn bf16<O: Element>(tile: Tile<'_, $ty, O>) {
                        // SAFETY: the caller's promise.
                        unsafe { run_tile::<$dp, O, 4>(tile) }
                    }
                    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
                    unsafe fn avx512<O: Element>(tile: Tile<'_, $ty, O>) {
                        // SAFETY: the caller's promise.
                        unsafe { run_tile::<$avx512, O, 4>(tile) }
                    }
                    #[target_feature(enable = "avx2,fma")]
                    unsafe fn avx2<O: Element>(tile: Tile<'_, $ty, O>) {
                        // SAFETY: the caller's promise.
                        unsafe { run_tile::<$avx2, O, 1>(tile) }
                    }
                    if isa.has_avx512_bf16() {
                        // SAFETY: an `Isa` is only made after its features were detected; the rest is the caller's.
                        return unsafe { bf16(tile) };
                    }
                    if isa.has_avx512() {
                        // SAFETY: as above.
                        return unsafe { avx512(tile) };
                    }
                    if isa.has_avx2() {
                        // SAFETY: as above.
                        return unsafe { avx2(tile) };
                    }
                }
                let _ = isa;
                // SAFETY: the caller's promise.
                unsafe { run_tile::<$portable, O, 1>(tile) }
            }
        }
    };
}

multiply!(f32, avx512_bf16: x86::F32Avx512, avx512: x86::F32Avx512, avx2: x86::F32Avx2, portable: portable::F32);
multiply!(bf16, avx512_bf16: x86::Bf16Dot, avx512: x86::Bf16Avx512, avx2: x86::Bf16Avx2, portable: portable::Bf16);

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

/// # Safety
/// As [`Multiply::tile`], with the instructions of `L` present.
#[inline(always)]
unsafe fn run_tile<L: Lanes, O: Element, const VECTORS: usize>(tile: Tile<'_, L::Weight, O>) {
    if tile.rows <= ROW_TILE {
        // SAFETY: the caller's promise; the sums hold the rows.
        unsafe { run_rows::<L, O, VECTORS, ROW_TILE>(tile) }
    } else {
        // SAFETY: as above.
        unsafe { run_rows::<L, O, VECTORS, ROW_BLOCK>(tile) }
    }
}

/// # Safety
/// As [`run_tile`], with `tile.rows <= MAX_ROWS`.
#[inline(always)]
unsafe fn run_rows<L: Lanes, O: Element, const VECTORS: usize, const MAX_ROWS: usize>(tile: Tile<'_, L::Weight, O>) {
    let mut sums = [[0f32; PANEL]; MAX_ROWS];
    let mut k = 0;
    while k < tile.inputs {
        let inputs = INPUT_BLOCK.min(tile.inputs - k);
        let mut row = 0;
        while row < tile.rows {
            let left = tile.rows - row;
            // SAFETY: `row < tile.rows` and `k < tile.inputs`, and `k` is a multiple of the group.
            unsafe {
                let x = tile.x.add(row * tile.x_stride + k);
                let panel = tile.panel.as_ptr().add(k * PANEL);
                let sums = sums[row].as_mut_ptr();
                match left {
                    1 => run_register_tile::<L, VECTORS, 1>(x, tile.x_stride, panel, inputs, sums),
                    2 => run_register_tile::<L, VECTORS, 2>(x, tile.x_stride, panel, inputs, sums),
                    3 => run_register_tile::<L, VECTORS, 3>(x, tile.x_stride, panel, inputs, sums),
                    4 => run_register_tile::<L, VECTORS, 4>(x, tile.x_stride, panel, inputs, sums),
                    5 => run_register_tile::<L, VECTORS, 5>(x, tile.x_stride, panel, inputs, sums),
                    _ => run_register_tile::<L, VECTORS, ROW_TILE>(x, tile.x_stride, panel, inputs, sums),
                }
            }
            row += left.min(ROW_TILE);
        }
        k += inputs;
    }
    for (row, sums) in sums.iter().take(tile.rows).enumerate() {
        // SAFETY: `row < tile.rows`, and the tile owns `outputs` elements of each row of `out`.
        let out = unsafe { std::slice::from_raw_parts_mut(tile.out.add(row * tile.out_stride), tile.outputs) };
        finish_row(tile.epilogue, sums, out);
    }
}

/// One row's sums to its outputs; lanes past those are padding.
#[inline(always)]
pub(super) fn finish_row<O: Element>(epilogue: Epilogue, sums: &[f32; PANEL], out: &mut [O]) {
    match epilogue {
        Epilogue::Store => out.iter_mut().zip(sums).for_each(|(o, s)| *o = O::from_f32(*s)),
        Epilogue::Relu2 => out.iter_mut().zip(sums).for_each(|(o, s)| {
            let positive = if *s < 0.0 { 0.0 } else { *s }; // NaN passes
            *o = O::from_f32(positive * positive);
        }),
        Epilogue::Accumulate => out.iter_mut().zip(sums).for_each(|(o, s)| *o = O::from_f32(o.to_f32() + *s)),
    }
}

/// `ROWS` rows by one panel over `inputs` inputs, `VECTORS` × 16 lanes at a time; adds to `sums`, `[ROWS, PANEL]`.
///
/// # Safety
/// `x` has `ROWS` rows of `inputs`, `panel` the whole panel of as many inputs, `sums` `ROWS × PANEL` elements.
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
    while lane < PANEL {
        // SAFETY: `lane + VECTORS * 16 <= PANEL`; all offsets stay inside the promised shapes.
        unsafe {
            let mut acc = [[L::load_sum(sums); VECTORS]; ROWS];
            for m in 0..ROWS {
                for v in 0..VECTORS {
                    acc[m][v] = L::load_sum(sums.add(m * PANEL + lane + v * 16));
                }
            }
            let mut k = 0;
            while k < inputs {
                let at = panel.add(k * PANEL + lane * group);
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
                    L::store_sum(acc[m][v], sums.add(m * PANEL + lane + v * 16));
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
    //! Every method needs the instructions in its type's name, which the callers in `multiply!` have.
    #![allow(clippy::missing_safety_doc)]

    use std::arch::x86_64::*;

    use super::{Lanes, bf16, read_pair};

    pub struct F32Avx512;
    pub struct Bf16Avx512;
    pub struct Bf16Dot;
    pub struct F32Avx2;
    pub struct Bf16Avx2;

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

    /// The sums of every AVX2 type: two halves.
    macro_rules! sums_avx2 {
        () => {
            type Sum = [__m256; 2];
            #[inline(always)]
            unsafe fn load_sum(from: *const f32) -> [__m256; 2] {
                // SAFETY: the caller has 16 elements there.
                unsafe { [_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))] }
            }
            #[inline(always)]
            unsafe fn store_sum(sum: [__m256; 2], to: *mut f32) {
                // SAFETY: as above.
                unsafe {
                    _mm256_storeu_ps(to, sum[0]);
                    _mm256_storeu_ps(to.add(8), sum[1]);
                }
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

    impl Lanes for F32Avx2 {
        type Weight = f32;
        type Weights = [__m256; 2];
        type Inputs = __m256;
        sums_avx2!();

        #[inline(always)]
        unsafe fn load_weights(from: *const f32) -> [__m256; 2] {
            // SAFETY: the caller has 16 weights there.
            unsafe { [_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))] }
        }
        #[inline(always)]
        unsafe fn splat_inputs(from: *const f32, _len: usize) -> __m256 {
            // SAFETY: the caller has an element there.
            unsafe { _mm256_set1_ps(from.read()) }
        }
        #[inline(always)]
        unsafe fn multiply_add(sum: [__m256; 2], x: __m256, w: [__m256; 2]) -> [__m256; 2] {
            // SAFETY: the instructions are present.
            unsafe { [_mm256_fmadd_ps(x, w[0], sum[0]), _mm256_fmadd_ps(x, w[1], sum[1])] }
        }
    }

    impl Lanes for Bf16Avx2 {
        type Weight = bf16;
        type Weights = [[__m256; 2]; 2];
        type Inputs = [__m256; 2];
        sums_avx2!();

        #[inline(always)]
        unsafe fn load_weights(from: *const bf16) -> [[__m256; 2]; 2] {
            // SAFETY: the caller has 16 pairs there: two vectors of 8.
            unsafe {
                let high = _mm256_set1_epi32(0xffff_0000_u32 as i32);
                let (a, b) = (_mm256_loadu_si256(from.cast()), _mm256_loadu_si256(from.add(16).cast()));
                let (a0, b0) = (_mm256_slli_epi32::<16>(a), _mm256_slli_epi32::<16>(b));
                let (a1, b1) = (_mm256_and_si256(a, high), _mm256_and_si256(b, high));
                [[_mm256_castsi256_ps(a0), _mm256_castsi256_ps(a1)], [_mm256_castsi256_ps(b0), _mm256_castsi256_ps(b1)]]
            }
        }
        #[inline(always)]
        unsafe fn splat_inputs(from: *const bf16, len: usize) -> [__m256; 2] {
            // SAFETY: the caller's promise.
            unsafe {
                let pair = read_pair(from, len);
                [_mm256_set1_ps(f32::from_bits(pair << 16)), _mm256_set1_ps(f32::from_bits(pair & 0xffff_0000))]
            }
        }
        #[inline(always)]
        unsafe fn multiply_add(sum: [__m256; 2], x: [__m256; 2], w: [[__m256; 2]; 2]) -> [__m256; 2] {
            // SAFETY: the instructions are present.
            unsafe {
                [
                    _mm256_fmadd_ps(x[1], w[0][1], _mm256_fmadd_ps(x[0], w[0][0], sum[0])),
                    _mm256_fmadd_ps(x[1], w[1][1], _mm256_fmadd_ps(x[0], w[1][0], sum[1])),
                ]
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(seed: &mut u32) -> f32 {
        *seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (*seed >> 8) as f32 / (1 << 23) as f32 - 1.0
    }

    fn pack<T: Weight + Element>(weight: &[f32], inputs: usize) -> Vec<T> {
        let mut packed = Vec::new();
        for rows in weight.chunks(PANEL * inputs) {
            let mut panel = vec![T::zeroed(); panel_elements::<T>(inputs)];
            pack_panel(rows, inputs, &mut panel);
            packed.extend(panel);
        }
        packed
    }

    /// Against a plain product in f64, on poisoned outputs, for every instruction set and odd sizes.
    fn check<T: Weight + Multiply + Element>(tolerance: f64) {
        let mut seed = 7;
        for (rows, inputs, outputs) in
            [(1, 1, 1), (1, 33, 65), (5, 64, 64), (7, 31, 130), (97, 48, 3), (200, 5, 70), (13, 2051, 66)]
        {
            let (x_stride, out_stride) = (inputs + 3, outputs + 5);
            let x: Vec<T> = (0..rows * x_stride).map(|_| T::from_f32(random(&mut seed))).collect();
            let weight: Vec<f32> = (0..outputs * inputs).map(|_| T::from_f32(random(&mut seed)).to_f32()).collect();
            let packed = pack::<T>(&weight, inputs);
            let packed = Packed::new(&packed, outputs, inputs).unwrap();
            for isa in Isa::available() {
                let mut out = vec![f32::NAN; rows * out_stride];
                linear(isa, Rows::new(&x, x_stride, inputs), rows, packed, Epilogue::Store, &mut out, out_stride);
                let mut alone = vec![f32::NAN; outputs];
                for row in 0..rows {
                    for n in 0..outputs {
                        let terms =
                            (0..inputs).map(|k| x[row * x_stride + k].to_f32() as f64 * weight[n * inputs + k] as f64);
                        let (sum, size) = terms.fold((0.0, 0.0), |(s, a), t| (s + t, a + t.abs()));
                        let error = (out[row * out_stride + n] as f64 - sum).abs();
                        assert!(error <= tolerance * size, "{isa} {rows}x{inputs}x{outputs} [{row}, {n}]: {error}");
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
    fn f32_products() {
        check::<f32>(1e-5);
    }

    #[test]
    fn bf16_products() {
        check::<bf16>(1e-5);
    }

    #[test]
    fn epilogues() {
        let weight = pack::<f32>(&[1.0, -1.0], 1);
        let weight = Packed::new(&weight, 2, 1).unwrap();
        let x = [3.0f32];
        for isa in Isa::available() {
            let mut out = [f32::NAN; 2];
            linear(isa, Rows::new(&x, 1, 1), 1, weight, Epilogue::Relu2, &mut out, 2);
            assert_eq!(out, [9.0, 0.0]);
            linear(isa, Rows::new(&x, 1, 1), 1, weight, Epilogue::Accumulate, &mut out, 2);
            assert_eq!(out, [12.0, -3.0]);
            let mut narrow = [bf16::NAN; 2];
            linear(isa, Rows::new(&x, 1, 1), 1, weight, Epilogue::Relu2, &mut narrow, 2);
            assert_eq!(narrow.map(|v| v.to_f32()), [9.0, 0.0]);
        }
    }

    #[test]
    fn a_nan_is_not_swallowed() {
        let weight = pack::<f32>(&[1.0], 1);
        let x = [f32::NAN];
        let mut out = [0.0f32];
        let weight = Packed::new(&weight, 1, 1).unwrap();
        linear(Isa::detect(), Rows::new(&x, 1, 1), 1, weight, Epilogue::Relu2, &mut out, 1);
        assert!(out[0].is_nan());
    }
}
