//! 4-bit weights times 8-bit activations: `out[r, o] = Σ_g scales[o, g] · Σ_{i in g} x[r, i] · codes[o, i]`, times the
//! row's scale. The sums of a group `g` are of integers, in 32 bits.
//!
//! **Packing.** Panels of [`NR`] outputs, the last padded: `[panels, ceil(inputs / 8), NR, 4]` bytes. A byte holds two
//! codes of one output, each plus 8, so from 0 to 15: of input `8p + j` in its low half and of `8p + 4 + j` in its high
//! half, `j` from 0 to 3. So a vector of bytes is two vectors of quads after a mask and a shift, in the order in which dot
//! products of bytes take them, which multiply unsigned by signed bytes: codes by inputs. What the 8 adds, `8 · Σ x`, is
//! the same for all outputs of a row and a group, and taken away from each sum.
//! Scales: `[panels, groups, NR]` of F32.
//!
//! Integer sums are exact, and groups are added in order, so a sum depends neither on the rows beside it nor on how they
//! are blocked, and all instruction sets with FMA give the same bits.
//!
//! **Cost.** AVX-512 VNNI: a load, a shift and two masks for 128 weights, then one `vpdpbusd` for 64 multiply-adds. AVX2:
//! `vpmaddubsw` and an addition in 16 bits for 32 multiply-adds, and a `vpmaddwd` and an addition for every eighth: a
//! product of 4 and 8 bits is small enough for eight pairs of them to fit 16 bits. One row reads 0.53 bytes a weight.
#![allow(unsafe_code)]

use super::{Activations, LinearKernel, LinearShape, Operand, PackedWeight, PanelShape, RowsRef, TileSize};
use crate::error::Result;
use crate::isa::{Isa, dispatch};
use crate::tensor::DType;

/// The kernel.
pub(super) static PAIRS: Int4 = Int4;

/// Outputs of one panel: four AVX-512 vectors of sums.
const NR: usize = 64;
/// Rows of `x` in registers at once: 4 × 2 vectors of integer sums in two parts, as many of FP32 sums, 4 of weights and 2 of
/// inputs fit 32 registers.
const MR: usize = 4;
/// Rows of `x` that one task carries.
const MC: usize = 64;
/// Inputs side by side in a vector.
const QUAD: usize = 4;
/// Inputs of one byte row: those in the low halves and those in the high halves.
const PAIR: usize = 2 * QUAD;
/// What is added to a code so that it has no sign.
const OFFSET: i32 = 8;
/// Groups whose sums of inputs are kept at once.
const GROUPS: usize = 64;
/// The most inputs of a group, whose sum must fit 32 bits.
const MAX_GROUP: usize = i32::MAX as usize / (128 * 15);

/// Four inputs of each output of a panel in the low halves of bytes, and the next four in the high halves.
type BytePair = [[u8; QUAD]; NR];

/// The packing for 8-bit activations.
pub(super) struct Int4;

impl LinearKernel for Int4 {
    fn name(&self) -> &'static str {
        "int4-quad-pairs"
    }

    fn weight_dtype(&self) -> DType {
        DType::I4
    }

    fn activation_dtypes(&self) -> &'static [DType] {
        &[DType::I8]
    }

    fn tile_size(&self) -> TileSize {
        TileSize { mr: MR, nr: NR, mc: MC }
    }

    fn has_scales(&self) -> bool {
        true
    }

    fn check(&self, shape: LinearShape) -> Result<(), String> {
        let group = shape.group.min(shape.inputs);
        // Codes of one byte row must have one scale.
        match shape.group >= shape.inputs || (shape.group > 0 && shape.group.is_multiple_of(PAIR)) {
            false => Err(format!("the int4 kernel cannot have groups of {}", shape.group)),
            true if group > MAX_GROUP => Err(format!("sums over {group} inputs may overflow 32 bits")),
            true => Ok(()),
        }
    }

    fn panel_shape(&self, columns: usize) -> PanelShape {
        // Elements of I4 are stored two to a byte, and a byte is counted as one.
        PanelShape::from([columns.div_ceil(PAIR), NR, QUAD])
    }

    fn pack(&self, rows: &[f32], columns: usize, panel: &mut [u8]) {
        for (lane, row) in rows.chunks_exact(columns).enumerate() {
            for (k, code) in row.iter().enumerate() {
                let (pair, j) = (k / PAIR, k % PAIR);
                let bits = (*code as i32 + OFFSET) as u8 & 0xf;
                panel[(pair * NR + lane) * QUAD + j % QUAD] |= bits << (j / QUAD * 4);
            }
        }
    }

    fn unpack(&self, panel: &[u8], columns: usize, rows: &mut [f32]) {
        for (lane, row) in rows.chunks_exact_mut(columns).enumerate() {
            for (k, code) in row.iter_mut().enumerate() {
                let (pair, j) = (k / PAIR, k % PAIR);
                let byte = panel[(pair * NR + lane) * QUAD + j % QUAD];
                *code = (i32::from(byte >> (j / QUAD * 4) & 0xf) - OFFSET) as f32;
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
        let Activations::I8 { codes, scales } = x else { return Err(x.unexpected(self)) };
        let panel = Panel {
            pairs: bytemuck::cast_slice(weight.panel::<u8>(Operand::Weight, panel)),
            scales: weight.panel::<f32>(Operand::Scales, panel).as_chunks().0,
            group: weight.shape.group,
        };
        let sums = sums.as_chunks_mut().0;
        tile(isa, codes, panel, sums);
        for (row, sums) in sums.iter_mut().enumerate() {
            let scale = scales.row(row)[0];
            sums.iter_mut().for_each(|sum| *sum *= scale);
        }
        Ok(())
    }
}

/// One panel of a weight.
#[derive(Debug, Clone, Copy)]
struct Panel<'a> {
    pairs: &'a [BytePair],
    scales: &'a [[f32; NR]], // [groups]
    group: usize,
}

dispatch! {
    /// `sums[r] = Σ_g scales[g] · Σ x[r] · codes`, without the rows' scales.
    fn tile[](x: RowsRef<'_, i8>, panel: Panel<'_>, sums: &mut [[f32; NR]]) {
        avx512_vnni => tile_body::<x86::Vnni, 2, 4>,
        avx2 => tile_body::<x86::Avx2, 1, 4>,
        portable => tile_body::<Portable, 1, 4>,
    }
}

/// A vector of 32-bit sums, and the products of eight bytes that are added to each.
trait Nibbles {
    /// Sums in a vector.
    const LANES: usize;
    /// Products of eight inputs that [`Nibbles::Run`] can hold.
    const PAIRS_IN_RUN: usize;
    /// 32-bit sums of a group.
    type Sums: Copy;
    /// Sums of a few products, perhaps in fewer bits or in parts.
    type Run: Copy;
    /// FP32 sums of groups.
    type Floats: Copy;
    type Weights: Copy;
    type Inputs: Copy;

    unsafe fn zero_sums() -> Self::Sums;
    unsafe fn zero_run() -> Self::Run;
    unsafe fn add_run(sums: Self::Sums, run: Self::Run) -> Self::Sums;
    /// `LANES` quads of bytes: the low and the high halves.
    unsafe fn load_weights(from: *const [u8; QUAD]) -> [Self::Weights; 2];
    /// Four bytes in every lane.
    unsafe fn splat_inputs(from: *const i8) -> Self::Inputs;
    unsafe fn add_dots(run: Self::Run, inputs: [Self::Inputs; 2], weights: [Self::Weights; 2]) -> Self::Run;
    unsafe fn load_floats(from: *const f32) -> Self::Floats;
    unsafe fn store_floats(floats: Self::Floats, to: *mut f32);
    /// `floats + scales · (sums − offset)`
    unsafe fn add_scaled(floats: Self::Floats, sums: Self::Sums, offset: i32, scales: *const f32) -> Self::Floats;
    /// `Σ x`
    fn sum(x: &[i8]) -> i32;
}

/// [`MR`] rows by `VECTORS` vectors of outputs in registers, or one row by `ALONE`. The instructions of `N` must be present,
/// which the dispatcher above sees to.
#[inline(always)]
fn tile_body<N: Nibbles, const VECTORS: usize, const ALONE: usize>(
    x: RowsRef<'_, i8>,
    panel: Panel<'_>,
    sums: &mut [[f32; NR]],
) {
    assert!(panel.pairs.len() == x.width().div_ceil(PAIR));
    for (block, sums) in sums.chunks_mut(MR).enumerate() {
        let row = |r: usize| x.row(block * MR + r);
        match sums {
            [a, b, c, d] => register_tile::<N, VECTORS, 4>([row(0), row(1), row(2), row(3)], panel, [a, b, c, d]),
            [a, b, c] => register_tile::<N, VECTORS, 3>([row(0), row(1), row(2)], panel, [a, b, c]),
            [a, b] => register_tile::<N, VECTORS, 2>([row(0), row(1)], panel, [a, b]),
            // A loop, not an iterator's closure: that would be compiled without the dispatcher's instructions.
            sums => {
                for (r, sums) in sums.iter_mut().enumerate() {
                    register_tile::<N, ALONE, 1>([row(r)], panel, [sums]);
                }
            }
        }
    }
}

/// `ROWS` rows by one panel, `VECTORS` vectors of outputs at a time: group after group, in integers, then in FP32.
#[inline(always)]
#[allow(clippy::needless_range_loop)] // indices, not iterators: no closure may come between vectors and registers
fn register_tile<N: Nibbles, const VECTORS: usize, const ROWS: usize>(
    x: [&[i8]; ROWS],
    panel: Panel<'_>,
    sums: [&mut [f32; NR]; ROWS],
) {
    let (inputs, group) = (x[0].len(), panel.group.min(x[0].len()));
    for first in (0..panel.scales.len()).step_by(GROUPS) {
        let last = panel.scales.len().min(first + GROUPS);
        // What the codes' offset adds to each group's sum.
        let mut offsets = [[0i32; GROUPS]; ROWS];
        for r in 0..ROWS {
            for g in first..last {
                offsets[r][g - first] = OFFSET * N::sum(&x[r][g * group..inputs.min((g + 1) * group)]);
            }
        }
        let mut lane = 0;
        while lane < NR {
            // SAFETY: `lane + VECTORS * LANES <= NR`, the length of each row of sums, scales and weights; inputs and pairs are
            // those of group `g`, the last of which may have fewer inputs, given with zeros behind them.
            unsafe {
                let mut floats = [[N::load_floats(sums[0].as_ptr()); VECTORS]; ROWS];
                for r in 0..ROWS {
                    for v in 0..VECTORS {
                        floats[r][v] = N::load_floats(sums[r].as_ptr().add(lane + v * N::LANES));
                    }
                }
                for g in first..last {
                    let (start, end) = (g * group, inputs.min((g + 1) * group));
                    let whole = (end - start) / PAIR;
                    let mut acc = [[N::zero_sums(); VECTORS]; ROWS];
                    let mut from = [x[0].as_ptr(); ROWS];
                    for r in 0..ROWS {
                        from[r] = x[r].as_ptr().add(start);
                    }
                    add_pairs::<N, VECTORS, ROWS>(&mut acc, from, panel.pairs.as_ptr().add(start / PAIR), whole, lane);
                    if !(end - start).is_multiple_of(PAIR) {
                        let rest = x.map(|x| padded(&x[start + whole * PAIR..end]));
                        for r in 0..ROWS {
                            from[r] = rest[r].as_ptr();
                        }
                        let pairs = panel.pairs.as_ptr().add(start / PAIR + whole);
                        add_pairs::<N, VECTORS, ROWS>(&mut acc, from, pairs, 1, lane);
                    }
                    for r in 0..ROWS {
                        for v in 0..VECTORS {
                            let scales = panel.scales[g].as_ptr().add(lane + v * N::LANES);
                            floats[r][v] = N::add_scaled(floats[r][v], acc[r][v], offsets[r][g - first], scales);
                        }
                    }
                }
                for r in 0..ROWS {
                    for v in 0..VECTORS {
                        N::store_floats(floats[r][v], sums[r].as_mut_ptr().add(lane + v * N::LANES));
                    }
                }
            }
            lane += VECTORS * N::LANES;
        }
    }
}

/// The last inputs, fewer than eight, with zeros behind them.
#[inline(always)]
fn padded(rest: &[i8]) -> [i8; PAIR] {
    let mut pair = [0; PAIR];
    pair[..rest.len()].copy_from_slice(rest);
    pair
}

/// Adds the products of `count` times eight inputs of each row with the outputs from `lane` on.
///
/// # Safety
/// Each of `x` has `8 · count` inputs, `pairs` as many byte rows, and `lane + VECTORS · LANES` is at most [`NR`].
#[inline(always)]
#[allow(clippy::needless_range_loop)] // as above
unsafe fn add_pairs<N: Nibbles, const VECTORS: usize, const ROWS: usize>(
    acc: &mut [[N::Sums; VECTORS]; ROWS],
    x: [*const i8; ROWS],
    pairs: *const BytePair,
    count: usize,
    lane: usize,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut k = 0;
        while k < count {
            let end = count.min(k.saturating_add(N::PAIRS_IN_RUN));
            let mut run = [[N::zero_run(); VECTORS]; ROWS];
            while k < end {
                let from = pairs.add(k).cast::<[u8; QUAD]>().add(lane);
                let mut weights = [N::load_weights(from); VECTORS];
                for v in 1..VECTORS {
                    weights[v] = N::load_weights(from.add(v * N::LANES));
                }
                for r in 0..ROWS {
                    let at = x[r].add(k * PAIR);
                    let inputs = [N::splat_inputs(at), N::splat_inputs(at.add(QUAD))];
                    for v in 0..VECTORS {
                        run[r][v] = N::add_dots(run[r][v], inputs, weights[v]);
                    }
                }
                k += 1;
            }
            for r in 0..ROWS {
                for v in 0..VECTORS {
                    acc[r][v] = N::add_run(acc[r][v], run[r][v]);
                }
            }
        }
    }
}

/// The oracle of the others, and what runs where there are no byte dot products.
struct Portable;

impl Nibbles for Portable {
    const LANES: usize = 16;
    const PAIRS_IN_RUN: usize = usize::MAX;
    type Sums = [i32; 16];
    type Run = [i32; 16];
    type Floats = [f32; 16];
    type Weights = [[u8; QUAD]; 16];
    type Inputs = [i8; QUAD];

    #[inline(always)]
    unsafe fn zero_sums() -> [i32; 16] {
        [0; 16]
    }
    #[inline(always)]
    unsafe fn zero_run() -> [i32; 16] {
        [0; 16]
    }
    #[inline(always)]
    unsafe fn add_run(mut sums: [i32; 16], run: [i32; 16]) -> [i32; 16] {
        for (sum, run) in sums.iter_mut().zip(run) {
            *sum += run;
        }
        sums
    }
    #[inline(always)]
    unsafe fn load_weights(from: *const [u8; QUAD]) -> [[[u8; QUAD]; 16]; 2] {
        // SAFETY: the caller has 16 quads there.
        let bytes = unsafe { from.cast::<[[u8; QUAD]; 16]>().read() };
        [bytes.map(|quad| quad.map(|byte| byte & 0xf)), bytes.map(|quad| quad.map(|byte| byte >> 4))]
    }
    #[inline(always)]
    unsafe fn splat_inputs(from: *const i8) -> [i8; QUAD] {
        // SAFETY: the caller has four bytes there.
        unsafe { from.cast::<[i8; QUAD]>().read() }
    }
    #[inline(always)]
    unsafe fn add_dots(mut run: [i32; 16], inputs: [[i8; QUAD]; 2], weights: [[[u8; QUAD]; 16]; 2]) -> [i32; 16] {
        for (inputs, weights) in inputs.into_iter().zip(weights) {
            for (sum, weights) in run.iter_mut().zip(weights) {
                for (x, w) in inputs.iter().zip(weights) {
                    *sum += i32::from(*x) * i32::from(w);
                }
            }
        }
        run
    }
    #[inline(always)]
    unsafe fn load_floats(from: *const f32) -> [f32; 16] {
        // SAFETY: the caller has 16 elements there.
        unsafe { from.cast::<[f32; 16]>().read() }
    }
    #[inline(always)]
    unsafe fn store_floats(floats: [f32; 16], to: *mut f32) {
        // SAFETY: as above.
        unsafe { to.cast::<[f32; 16]>().write(floats) }
    }
    #[inline(always)]
    unsafe fn add_scaled(mut floats: [f32; 16], sums: [i32; 16], offset: i32, scales: *const f32) -> [f32; 16] {
        // SAFETY: the caller has 16 scales there.
        let scales = unsafe { scales.cast::<[f32; 16]>().read() };
        for ((float, sum), scale) in floats.iter_mut().zip(sums).zip(scales) {
            *float += (sum - offset) as f32 * scale;
        }
        floats
    }
    #[inline(always)]
    fn sum(x: &[i8]) -> i32 {
        x.iter().map(|x| i32::from(*x)).sum()
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    //! Every method needs the instructions in its type's name, which the dispatcher above checks.
    #![allow(clippy::missing_safety_doc)]

    use std::arch::x86_64::*;

    use super::{Nibbles, QUAD};

    pub struct Avx2;
    pub struct Vnni;

    /// Sums of absolute differences from -128, 32 bytes at a time.
    #[inline(always)]
    fn sum_avx2(x: &[i8]) -> i32 {
        let (blocks, rest) = x.as_chunks::<32>();
        // SAFETY: the instructions are present, and each block has 32 bytes.
        let blocks_sum = unsafe {
            let mut sums = _mm256_setzero_si256();
            for block in blocks {
                let bytes = _mm256_xor_si256(_mm256_loadu_si256(block.as_ptr().cast()), _mm256_set1_epi8(-128));
                sums = _mm256_add_epi64(sums, _mm256_sad_epu8(bytes, _mm256_setzero_si256()));
            }
            let sums = _mm_add_epi64(_mm256_castsi256_si128(sums), _mm256_extracti128_si256::<1>(sums));
            (_mm_cvtsi128_si64(sums) + _mm_extract_epi64::<1>(sums)) as i32
        };
        let mut sum = blocks_sum - 128 * 32 * blocks.len() as i32;
        for x in rest {
            sum += i32::from(*x);
        }
        sum
    }

    impl Nibbles for Avx2 {
        const LANES: usize = 8;
        /// A product is at most 15 · 128, a lane of 16 bits takes two of each quad: eight quads make at most 30,720.
        const PAIRS_IN_RUN: usize = 4;
        type Sums = __m256i;
        /// 16 sums of 16 bits.
        type Run = __m256i;
        type Floats = __m256;
        type Weights = __m256i;
        type Inputs = __m256i;

        #[inline(always)]
        unsafe fn zero_sums() -> __m256i {
            // SAFETY: the instructions are present.
            unsafe { _mm256_setzero_si256() }
        }
        #[inline(always)]
        unsafe fn zero_run() -> __m256i {
            // SAFETY: the instructions are present.
            unsafe { _mm256_setzero_si256() }
        }
        #[inline(always)]
        unsafe fn add_run(sums: __m256i, run: __m256i) -> __m256i {
            // SAFETY: the instructions are present.
            unsafe { _mm256_add_epi32(sums, _mm256_madd_epi16(run, _mm256_set1_epi16(1))) }
        }
        #[inline(always)]
        unsafe fn load_weights(from: *const [u8; QUAD]) -> [__m256i; 2] {
            // SAFETY: the caller has 8 quads there.
            unsafe {
                let (bytes, low) = (_mm256_loadu_si256(from.cast()), _mm256_set1_epi8(0xf));
                [_mm256_and_si256(bytes, low), _mm256_and_si256(_mm256_srli_epi16::<4>(bytes), low)]
            }
        }
        #[inline(always)]
        unsafe fn splat_inputs(from: *const i8) -> __m256i {
            // SAFETY: the caller has four bytes there.
            unsafe { _mm256_set1_epi32(from.cast::<i32>().read_unaligned()) }
        }
        #[inline(always)]
        unsafe fn add_dots(run: __m256i, inputs: [__m256i; 2], weights: [__m256i; 2]) -> __m256i {
            // SAFETY: the instructions are present.
            unsafe {
                let (low, high) =
                    (_mm256_maddubs_epi16(weights[0], inputs[0]), _mm256_maddubs_epi16(weights[1], inputs[1]));
                _mm256_add_epi16(run, _mm256_add_epi16(low, high))
            }
        }
        #[inline(always)]
        unsafe fn load_floats(from: *const f32) -> __m256 {
            // SAFETY: the caller has 8 elements there.
            unsafe { _mm256_loadu_ps(from) }
        }
        #[inline(always)]
        unsafe fn store_floats(floats: __m256, to: *mut f32) {
            // SAFETY: as above.
            unsafe { _mm256_storeu_ps(to, floats) }
        }
        #[inline(always)]
        unsafe fn add_scaled(floats: __m256, sums: __m256i, offset: i32, scales: *const f32) -> __m256 {
            // SAFETY: the caller has 8 scales there.
            unsafe {
                let sums = _mm256_cvtepi32_ps(_mm256_sub_epi32(sums, _mm256_set1_epi32(offset)));
                _mm256_fmadd_ps(sums, _mm256_loadu_ps(scales), floats)
            }
        }
        #[inline(always)]
        fn sum(x: &[i8]) -> i32 {
            sum_avx2(x)
        }
    }

    impl Nibbles for Vnni {
        const LANES: usize = 16;
        const PAIRS_IN_RUN: usize = usize::MAX;
        type Sums = __m512i;
        /// Of the low and of the high halves, so that neither waits for the other.
        type Run = [__m512i; 2];
        type Floats = __m512;
        type Weights = __m512i;
        type Inputs = __m512i;

        #[inline(always)]
        unsafe fn zero_sums() -> __m512i {
            // SAFETY: the instructions are present.
            unsafe { _mm512_setzero_si512() }
        }
        #[inline(always)]
        unsafe fn zero_run() -> [__m512i; 2] {
            // SAFETY: the instructions are present.
            unsafe { [_mm512_setzero_si512(); 2] }
        }
        #[inline(always)]
        unsafe fn add_run(sums: __m512i, run: [__m512i; 2]) -> __m512i {
            // SAFETY: the instructions are present.
            unsafe { _mm512_add_epi32(sums, _mm512_add_epi32(run[0], run[1])) }
        }
        #[inline(always)]
        unsafe fn load_weights(from: *const [u8; QUAD]) -> [__m512i; 2] {
            // SAFETY: the caller has 16 quads there.
            unsafe {
                let (bytes, low) = (_mm512_loadu_si512(from.cast()), _mm512_set1_epi8(0xf));
                [_mm512_and_si512(bytes, low), _mm512_and_si512(_mm512_srli_epi16::<4>(bytes), low)]
            }
        }
        #[inline(always)]
        unsafe fn splat_inputs(from: *const i8) -> __m512i {
            // SAFETY: the caller has four bytes there.
            unsafe { _mm512_set1_epi32(from.cast::<i32>().read_unaligned()) }
        }
        #[inline(always)]
        unsafe fn add_dots(run: [__m512i; 2], inputs: [__m512i; 2], weights: [__m512i; 2]) -> [__m512i; 2] {
            // SAFETY: the instructions are present.
            unsafe {
                [_mm512_dpbusd_epi32(run[0], weights[0], inputs[0]), _mm512_dpbusd_epi32(run[1], weights[1], inputs[1])]
            }
        }
        #[inline(always)]
        unsafe fn load_floats(from: *const f32) -> __m512 {
            // SAFETY: the caller has 16 elements there.
            unsafe { _mm512_loadu_ps(from) }
        }
        #[inline(always)]
        unsafe fn store_floats(floats: __m512, to: *mut f32) {
            // SAFETY: as above.
            unsafe { _mm512_storeu_ps(to, floats) }
        }
        #[inline(always)]
        unsafe fn add_scaled(floats: __m512, sums: __m512i, offset: i32, scales: *const f32) -> __m512 {
            // SAFETY: the caller has 16 scales there.
            unsafe {
                let sums = _mm512_cvtepi32_ps(_mm512_sub_epi32(sums, _mm512_set1_epi32(offset)));
                _mm512_fmadd_ps(sums, _mm512_loadu_ps(scales), floats)
            }
        }
        #[inline(always)]
        fn sum(x: &[i8]) -> i32 {
            sum_avx2(x)
        }
    }
}
