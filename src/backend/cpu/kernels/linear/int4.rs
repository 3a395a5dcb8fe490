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
use crate::backend::cpu::kernels::mul_add;
use crate::error::Result;
use crate::isa::{Isa, dispatch};
use crate::tensor::DType;

/// The kernel.
pub(super) static PAIRS: Int4 = Int4;

/// Outputs of one panel: four AVX-512 vectors of sums.
const NR: usize = 64;
/// Rows of `x` in registers at once: 4 × 4 vectors of sums, 4 × 2 of inputs and 3 of weights fit 32 registers.
const MR: usize = 4;
/// Rows of `x` that one task carries.
const MC: usize = 64;
/// Inputs side by side in a vector.
const QUAD: usize = 4;
/// Inputs of one byte row: those in the low halves and those in the high halves.
const PAIR: usize = 2 * QUAD;
/// What is added to a code so that it has no sign.
const OFFSET: i32 = 8;
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
        avx512_vnni => tile_body::<x86::Vnni, 4, 4, true>,
        avx2 => tile_body::<x86::Avx2, 1, 8, true>,
        portable => tile_body::<Portable, 1, 4, false>,
    }
}

/// A vector of 32-bit sums, and the products of four bytes that are added to each.
trait Nibbles {
    /// Sums in a vector.
    const LANES: usize;
    /// Products of eight inputs that [`Nibbles::Run`] can hold.
    const PAIRS_IN_RUN: usize;
    type Sums: Copy;
    /// Sums of a few products, perhaps in fewer bits.
    type Run: Copy;
    type Weights: Copy;
    type Inputs: Copy;

    unsafe fn zero_sums() -> Self::Sums;
    unsafe fn store_sums(sums: Self::Sums, to: *mut i32);
    unsafe fn zero_run() -> Self::Run;
    unsafe fn add_run(sums: Self::Sums, run: Self::Run) -> Self::Sums;
    /// `LANES` quads of bytes: the low and the high halves.
    unsafe fn load_weights(from: *const [u8; QUAD]) -> [Self::Weights; 2];
    /// One quad in every lane.
    unsafe fn splat_inputs(quad: [i8; QUAD]) -> Self::Inputs;
    unsafe fn add_dots(run: Self::Run, inputs: Self::Inputs, weights: Self::Weights) -> Self::Run;
}

/// Group after group: [`MR`] rows by `VECTORS` vectors of outputs in registers, or one row by `ALONE`, which is the whole
/// panel, so that it is read once from start to end. The instructions of `N` must be present, which the dispatcher above
/// sees to.
#[inline(always)]
fn tile_body<N: Nibbles, const VECTORS: usize, const ALONE: usize, const FMA: bool>(
    x: RowsRef<'_, i8>,
    panel: Panel<'_>,
    sums: &mut [[f32; NR]],
) {
    let inputs = x.width();
    assert!(panel.pairs.len() == inputs.div_ceil(PAIR));
    for (index, scales) in panel.scales.iter().enumerate() {
        let start = index * panel.group;
        let end = inputs.min(start.saturating_add(panel.group));
        let pairs = &panel.pairs[start / PAIR..end.div_ceil(PAIR)];
        for (block, sums) in sums.chunks_mut(MR).enumerate() {
            let row = |r: usize| &x.row(block * MR + r)[start..end];
            match sums {
                [a, b, c, d] => {
                    let x = [row(0), row(1), row(2), row(3)];
                    let dots = register_tile::<N, VECTORS, 4>(x, pairs);
                    add_group::<4, FMA>(x, &dots, scales, [a, b, c, d]);
                }
                // A loop, not an iterator's closure: that would be compiled without the dispatcher's instructions.
                sums => {
                    for (r, sums) in sums.iter_mut().enumerate() {
                        let x = [row(r)];
                        let dots = register_tile::<N, ALONE, 1>(x, pairs);
                        add_group::<1, FMA>(x, &dots, scales, [sums]);
                    }
                }
            }
        }
    }
}

/// Adds a group's sums times its scales, without what [`OFFSET`] added to them.
#[inline(always)]
fn add_group<const ROWS: usize, const FMA: bool>(
    x: [&[i8]; ROWS],
    dots: &[[i32; NR]; ROWS],
    scales: &[f32; NR],
    sums: [&mut [f32; NR]; ROWS],
) {
    for ((x, dots), sums) in x.into_iter().zip(dots).zip(sums) {
        let mut added = 0i32;
        for code in x {
            added += i32::from(*code);
        }
        for lane in 0..NR {
            sums[lane] = mul_add::<FMA>((dots[lane] - OFFSET * added) as f32, scales[lane], sums[lane]);
        }
    }
}

/// `ROWS` rows by one panel, `VECTORS` vectors of outputs at a time: `Σ x · (codes + 8)` over a group.
#[inline(always)]
#[allow(clippy::needless_range_loop)] // indices, not iterators: no closure may come between vectors and registers
fn register_tile<N: Nibbles, const VECTORS: usize, const ROWS: usize>(
    x: [&[i8]; ROWS],
    pairs: &[BytePair],
) -> [[i32; NR]; ROWS] {
    let whole = x.map(|x| x.as_chunks::<PAIR>().0);
    let full = whole[0].len();
    // The last inputs, if they are fewer than eight, with zeros behind them.
    let rest = x.map(|x| {
        let mut pair = [0; PAIR];
        let rest = x.as_chunks::<PAIR>().1;
        pair[..rest.len()].copy_from_slice(rest);
        pair
    });
    let mut dots = [[0i32; NR]; ROWS];
    let mut lane = 0;
    while lane < NR {
        // SAFETY: `lane + VECTORS * LANES <= NR`, the length of each row of sums and of weights.
        unsafe {
            let mut acc = [[N::zero_sums(); VECTORS]; ROWS];
            let mut k = 0;
            while k < pairs.len() {
                let end = pairs.len().min(k + N::PAIRS_IN_RUN);
                let mut run = [[N::zero_run(); VECTORS]; ROWS];
                while k < end {
                    let mut low = [N::splat_inputs([0; QUAD]); ROWS];
                    let mut high = low;
                    for r in 0..ROWS {
                        let [a, b, c, d, e, f, g, h] = if k < full { whole[r][k] } else { rest[r] };
                        low[r] = N::splat_inputs([a, b, c, d]);
                        high[r] = N::splat_inputs([e, f, g, h]);
                    }
                    let from = pairs[k].as_ptr().add(lane);
                    for v in 0..VECTORS {
                        let weights = N::load_weights(from.add(v * N::LANES));
                        for r in 0..ROWS {
                            run[r][v] = N::add_dots(run[r][v], low[r], weights[0]);
                            run[r][v] = N::add_dots(run[r][v], high[r], weights[1]);
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
            for r in 0..ROWS {
                for v in 0..VECTORS {
                    N::store_sums(acc[r][v], dots[r].as_mut_ptr().add(lane + v * N::LANES));
                }
            }
        }
        lane += VECTORS * N::LANES;
    }
    dots
}

/// The oracle of the others, and what runs where there are no byte dot products.
struct Portable;

impl Nibbles for Portable {
    const LANES: usize = 16;
    const PAIRS_IN_RUN: usize = usize::MAX / 2;
    type Sums = [i32; 16];
    type Run = [i32; 16];
    type Weights = [[u8; QUAD]; 16];
    type Inputs = [i8; QUAD];

    #[inline(always)]
    unsafe fn zero_sums() -> [i32; 16] {
        [0; 16]
    }
    #[inline(always)]
    unsafe fn store_sums(sums: [i32; 16], to: *mut i32) {
        // SAFETY: the caller has 16 sums there.
        unsafe { to.cast::<[i32; 16]>().write(sums) }
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
    unsafe fn splat_inputs(quad: [i8; QUAD]) -> [i8; QUAD] {
        quad
    }
    #[inline(always)]
    unsafe fn add_dots(mut run: [i32; 16], inputs: [i8; QUAD], weights: [[u8; QUAD]; 16]) -> [i32; 16] {
        for (sum, weights) in run.iter_mut().zip(weights) {
            for (x, w) in inputs.iter().zip(weights) {
                *sum += i32::from(*x) * i32::from(w);
            }
        }
        run
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

    #[inline(always)]
    fn bits_of(quad: [i8; QUAD]) -> i32 {
        i32::from_le_bytes(quad.map(|byte| byte as u8))
    }

    impl Nibbles for Avx2 {
        const LANES: usize = 8;
        /// A product is at most 15 · 128, a lane of 16 bits takes two of each quad: eight quads make at most 30,720.
        const PAIRS_IN_RUN: usize = 4;
        type Sums = __m256i;
        /// 16 sums of 16 bits.
        type Run = __m256i;
        type Weights = __m256i;
        type Inputs = __m256i;

        #[inline(always)]
        unsafe fn zero_sums() -> __m256i {
            // SAFETY: the instructions are present.
            unsafe { _mm256_setzero_si256() }
        }
        #[inline(always)]
        unsafe fn store_sums(sums: __m256i, to: *mut i32) {
            // SAFETY: the caller has 8 sums there.
            unsafe { _mm256_storeu_si256(to.cast(), sums) }
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
        unsafe fn splat_inputs(quad: [i8; QUAD]) -> __m256i {
            // SAFETY: the instructions are present.
            unsafe { _mm256_set1_epi32(bits_of(quad)) }
        }
        #[inline(always)]
        unsafe fn add_dots(run: __m256i, inputs: __m256i, weights: __m256i) -> __m256i {
            // SAFETY: the instructions are present.
            unsafe { _mm256_add_epi16(run, _mm256_maddubs_epi16(weights, inputs)) }
        }
    }

    impl Nibbles for Vnni {
        const LANES: usize = 16;
        const PAIRS_IN_RUN: usize = usize::MAX / 2;
        type Sums = __m512i;
        type Run = __m512i;
        type Weights = __m512i;
        type Inputs = __m512i;

        #[inline(always)]
        unsafe fn zero_sums() -> __m512i {
            // SAFETY: the instructions are present.
            unsafe { _mm512_setzero_si512() }
        }
        #[inline(always)]
        unsafe fn store_sums(sums: __m512i, to: *mut i32) {
            // SAFETY: the caller has 16 sums there.
            unsafe { _mm512_storeu_si512(to.cast(), sums) }
        }
        #[inline(always)]
        unsafe fn zero_run() -> __m512i {
            // SAFETY: the instructions are present.
            unsafe { _mm512_setzero_si512() }
        }
        #[inline(always)]
        unsafe fn add_run(_: __m512i, run: __m512i) -> __m512i {
            // There is one run, which is the whole group.
            run
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
        unsafe fn splat_inputs(quad: [i8; QUAD]) -> __m512i {
            // SAFETY: the instructions are present.
            unsafe { _mm512_set1_epi32(bits_of(quad)) }
        }
        #[inline(always)]
        unsafe fn add_dots(run: __m512i, inputs: __m512i, weights: __m512i) -> __m512i {
            // SAFETY: the instructions are present.
            unsafe { _mm512_dpbusd_epi32(run, weights, inputs) }
        }
    }
}
