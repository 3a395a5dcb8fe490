//! 8-bit weights times 8-bit activations, summed in 32-bit integers: `out[r, o] = Σ x[r, i] · codes[o, i]`, times the
//! row's scale and the output's.
//!
//! **Packing.** Panels of [`NR`] outputs, the last padded with zeros; four inputs of an output lie side by side, as the
//! dot products of bytes take them: `[panels, ceil(inputs / 4), NR, 4]`.
//! - [`QUADS`] is that alone, for AVX2's `vpmaddubsw`, which multiplies unsigned by signed bytes: it is given `|x|` and
//!   the weights with the sign of `x`. No pair of products can saturate, since codes of weights are at least -127 (those of
//!   inputs may be -128).
//! - [`VNNI`] is for AVX-512's `vpdpbusd`, which also multiplies unsigned by signed bytes, but has no cheap sign: it is
//!   given `x + 128`, and one more row of each panel holds `128 · Σ codes` of its outputs, in 32 bits, to take away again.
//!
//! Integer sums are exact, so every path gives the same bits, and both packings do: which one a package has decides its
//! speed on a CPU, not its answers.
//!
//! **Cost.** One `vpdpbusd` is 64 multiply-adds. AVX2 takes four instructions for 32 of one row, and two for 16 of several
//! rows: `vpmaddwd` of what was widened to 16 bits, of which a core starts two in a cycle, and an addition.
#![allow(unsafe_code)]

use super::{Activations, LinearKernel, LinearShape, Operand, PackedWeight, PanelShape, RowsRef, TileSize};
use crate::error::Result;
use crate::isa::{CpuFeatures, Isa, dispatch};
use crate::tensor::DType;

/// For AVX2 and CPUs without byte dot products.
pub(super) static QUADS: Int8 = Int8 { name: "int8-quads", has_offsets: false };
/// For AVX-512 VNNI.
pub(super) static VNNI: Int8 = Int8 { name: "int8-quads-vnni", has_offsets: true };

/// Outputs of one panel: four AVX-512 vectors of sums.
const NR: usize = 64;
/// Rows of `x` in registers at once: 4 × 4 vectors of sums, 4 of weights and 1 of inputs fit 32 registers.
const MR: usize = 4;
/// Rows of `x` that one task carries: their sums take 8 KiB.
const MC: usize = 32;
/// Inputs of a panel that stay in the L2 cache while the rows pass: 4096 × 64 bytes = 256 KiB.
const KC: usize = 4096;
/// Inputs side by side.
const QUAD: usize = 4;
/// The most inputs whose sum, each at most 128 · 127, fits 32 bits.
const MAX_INPUTS: usize = i32::MAX as usize / (128 * 127);

/// A packing for 8-bit activations.
pub(super) struct Int8 {
    name: &'static str,
    /// True if each panel ends with a row of `128 · Σ codes`.
    has_offsets: bool,
}

impl LinearKernel for Int8 {
    fn name(&self) -> &'static str {
        self.name
    }

    fn weight_dtype(&self) -> DType {
        DType::I8
    }

    fn activation_dtypes(&self) -> &'static [DType] {
        &[DType::I8]
    }

    fn features(&self) -> CpuFeatures {
        match self.has_offsets {
            true => CpuFeatures::AVX512.and(CpuFeatures::AVX512_VNNI),
            false => CpuFeatures::PORTABLE,
        }
    }

    fn tile_size(&self) -> TileSize {
        TileSize { mr: MR, nr: NR, mc: MC }
    }

    fn has_scales(&self) -> bool {
        true
    }

    fn check(&self, shape: LinearShape) -> Result<(), String> {
        if shape.group < shape.inputs {
            return Err(format!("the int8 kernel has per-channel scales, not groups of {}", shape.group));
        }
        match shape.inputs > MAX_INPUTS {
            true => Err(format!("sums over {} inputs may overflow 32 bits; at most {MAX_INPUTS} fit", shape.inputs)),
            false => Ok(()),
        }
    }

    fn panel_shape(&self, columns: usize) -> PanelShape {
        PanelShape::from([columns.div_ceil(QUAD) + usize::from(self.has_offsets), NR, QUAD])
    }

    fn pack(&self, rows: &[f32], columns: usize, panel: &mut [u8]) {
        let quads = columns.div_ceil(QUAD);
        for (lane, row) in rows.chunks_exact(columns).enumerate() {
            let mut sum = 0i32;
            for (k, code) in row.iter().enumerate() {
                let code = *code as i8;
                panel[(k / QUAD * NR + lane) * QUAD + k % QUAD] = code as u8;
                sum += i32::from(code);
            }
            if self.has_offsets {
                panel[(quads * NR + lane) * QUAD..][..QUAD].copy_from_slice(&(128 * sum).to_le_bytes());
            }
        }
    }

    fn unpack(&self, panel: &[u8], columns: usize, rows: &mut [f32]) {
        for (lane, row) in rows.chunks_exact_mut(columns).enumerate() {
            for (k, code) in row.iter_mut().enumerate() {
                *code = f32::from(panel[(k / QUAD * NR + lane) * QUAD + k % QUAD] as i8);
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
        let quads: &[[[i8; QUAD]; NR]] = bytemuck::cast_slice(weight.panel::<i8>(Operand::Weight, panel));
        let (quads, offsets) = quads.split_at(quads.len() - usize::from(self.has_offsets));
        let panel_scales: &[f32] = weight.panel(Operand::Scales, panel);
        let sums = sums.as_chunks_mut::<NR>().0;
        let mut dots = [[0i32; NR]; MC];
        let dots = &mut dots[..sums.len()];
        match offsets {
            [] => dot(isa, codes, quads, dots),
            [offsets, ..] => dot_offset(isa, codes, quads, offsets, dots),
        }
        for (row, (sums, dots)) in sums.iter_mut().zip(dots).enumerate() {
            let row_scale = scales.row(row)[0];
            for (lane, sum) in sums.iter_mut().enumerate() {
                *sum = dots[lane] as f32 * row_scale * panel_scales[lane];
            }
        }
        Ok(())
    }
}

dispatch! {
    /// `dots[r] = Σ x[r] · weights` over a panel, `[quads, NR, QUAD]`.
    fn dot[](x: RowsRef<'_, i8>, quads: &[[[i8; QUAD]; NR]], dots: &mut [[i32; NR]]) {
        avx2 => dot_avx2_body,
        portable => dot_body::<Portable, 1, 4>,
    }
}

dispatch! {
    /// The same, with `offsets` of 128 times the weights' sums.
    fn dot_offset[](x: RowsRef<'_, i8>, quads: &[[[i8; QUAD]; NR]], offsets: &[[i8; QUAD]; NR], dots: &mut [[i32; NR]]) {
        avx512_vnni => dot_offset_body,
        avx2 => dot_avx2_without_offset_body,
        portable => dot_without_offset_body,
    }
}

/// The sums of `x + 128` and what that adds taken away; both may wrap, their difference does not.
#[inline(always)]
#[cfg(target_arch = "x86_64")]
fn dot_offset_body(x: RowsRef<'_, i8>, quads: &[[[i8; QUAD]; NR]], offsets: &[[i8; QUAD]; NR], dots: &mut [[i32; NR]]) {
    dot_body::<x86::Vnni, 4, 4>(x, quads, dots);
    for dots in dots {
        for (dot, offset) in dots.iter_mut().zip(offsets) {
            *dot = dot.wrapping_sub(i32::from_le_bytes(offset.map(|byte| byte as u8)));
        }
    }
}

/// Where signed inputs are taken as they are.
#[inline(always)]
fn dot_without_offset_body(
    x: RowsRef<'_, i8>,
    quads: &[[[i8; QUAD]; NR]],
    _: &[[i8; QUAD]; NR],
    dots: &mut [[i32; NR]],
) {
    dot_body::<Portable, 1, 4>(x, quads, dots);
}

/// The same.
#[inline(always)]
#[cfg(target_arch = "x86_64")]
fn dot_avx2_without_offset_body(
    x: RowsRef<'_, i8>,
    quads: &[[[i8; QUAD]; NR]],
    _: &[[i8; QUAD]; NR],
    dots: &mut [[i32; NR]],
) {
    dot_avx2_body(x, quads, dots);
}

/// One row from memory to registers; several in 16 bits, which takes two instructions for 16 multiply-adds and so does as
/// many in a cycle, without a sign to be moved for each row.
#[inline(always)]
#[cfg(target_arch = "x86_64")]
fn dot_avx2_body(x: RowsRef<'_, i8>, quads: &[[[i8; QUAD]; NR]], dots: &mut [[i32; NR]]) {
    match dots {
        [_] => dot_body::<x86::Avx2, 2, 8>(x, quads, dots),
        dots => wide::dot_body(x, quads, dots),
    }
}

/// A vector of 32-bit sums, and the products of four bytes that are added to each.
trait Bytes {
    /// Sums in a vector.
    const LANES: usize;
    type Sums: Copy;
    type Weights: Copy;
    type Inputs: Copy;

    unsafe fn load_sums(from: *const i32) -> Self::Sums;
    unsafe fn store_sums(sums: Self::Sums, to: *mut i32);
    /// `LANES` quads.
    unsafe fn load_weights(from: *const [i8; QUAD]) -> Self::Weights;
    /// One quad in every lane.
    unsafe fn splat_inputs(quad: [i8; QUAD]) -> Self::Inputs;
    unsafe fn add_dots(sums: Self::Sums, inputs: Self::Inputs, weights: Self::Weights) -> Self::Sums;
}

/// Adds the products of `dots.len()` rows with a panel, [`KC`] inputs at a time: [`MR`] rows by `VECTORS` vectors of outputs
/// in registers, or one row by `ALONE`, which is the whole panel, so that it is read once from start to end. The
/// instructions of `B` must be present, which the dispatchers above see to.
#[inline(always)]
fn dot_body<B: Bytes, const VECTORS: usize, const ALONE: usize>(
    x: RowsRef<'_, i8>,
    quads: &[[[i8; QUAD]; NR]],
    dots: &mut [[i32; NR]],
) {
    assert!(quads.len() == x.width().div_ceil(QUAD));
    for start in (0..x.width()).step_by(KC) {
        let end = x.width().min(start + KC);
        let quads = &quads[start / QUAD..end.div_ceil(QUAD)];
        for (index, dots) in dots.chunks_mut(MR).enumerate() {
            let row = |r: usize| &x.row(index * MR + r)[start..end];
            match dots {
                [a, b, c, d] => register_tile::<B, VECTORS, 4>([row(0), row(1), row(2), row(3)], quads, [a, b, c, d]),
                [a, b, c] => register_tile::<B, VECTORS, 3>([row(0), row(1), row(2)], quads, [a, b, c]),
                [a, b] => register_tile::<B, VECTORS, 2>([row(0), row(1)], quads, [a, b]),
                // A loop, not an iterator's closure: that would be compiled without the dispatcher's instructions.
                dots => {
                    for (r, dots) in dots.iter_mut().enumerate() {
                        register_tile::<B, ALONE, 1>([row(r)], quads, [dots]);
                    }
                }
            }
        }
    }
}

/// `ROWS` rows by one panel, `VECTORS` vectors of outputs at a time.
#[inline(always)]
#[allow(clippy::needless_range_loop)] // indices, not iterators: no closure may come between vectors and registers
fn register_tile<B: Bytes, const VECTORS: usize, const ROWS: usize>(
    x: [&[i8]; ROWS],
    quads: &[[[i8; QUAD]; NR]],
    dots: [&mut [i32; NR]; ROWS],
) {
    let whole = x.map(|x| x.as_chunks::<QUAD>().0);
    // The last inputs, if they are no whole quad, with zeros behind them.
    let rest = x.map(|x| {
        let mut quad = [0; QUAD];
        let rest = x.as_chunks::<QUAD>().1;
        quad[..rest.len()].copy_from_slice(rest);
        quad
    });
    let mut lane = 0;
    while lane < NR {
        // SAFETY: `lane + VECTORS * LANES <= NR`, the length of each row of sums and of weights.
        unsafe {
            let mut acc = [[B::load_sums(dots[0].as_ptr()); VECTORS]; ROWS];
            for r in 0..ROWS {
                for v in 0..VECTORS {
                    acc[r][v] = B::load_sums(dots[r].as_ptr().add(lane + v * B::LANES));
                }
            }
            for (k, quad) in quads.iter().enumerate() {
                let from = quad.as_ptr().add(lane);
                let mut weights = [B::load_weights(from); VECTORS];
                for v in 1..VECTORS {
                    weights[v] = B::load_weights(from.add(v * B::LANES));
                }
                for r in 0..ROWS {
                    let inputs = B::splat_inputs(*whole[r].get(k).unwrap_or(&rest[r]));
                    for v in 0..VECTORS {
                        acc[r][v] = B::add_dots(acc[r][v], inputs, weights[v]);
                    }
                }
            }
            for r in 0..ROWS {
                for v in 0..VECTORS {
                    B::store_sums(acc[r][v], dots[r].as_mut_ptr().add(lane + v * B::LANES));
                }
            }
        }
        lane += VECTORS * B::LANES;
    }
}

/// The oracle of the others, and what runs where there are no byte dot products.
struct Portable;

impl Bytes for Portable {
    const LANES: usize = 16;
    type Sums = [i32; 16];
    type Weights = [[i8; QUAD]; 16];
    type Inputs = [i8; QUAD];

    #[inline(always)]
    unsafe fn load_sums(from: *const i32) -> [i32; 16] {
        // SAFETY: the caller has 16 sums there.
        unsafe { from.cast::<[i32; 16]>().read() }
    }
    #[inline(always)]
    unsafe fn store_sums(sums: [i32; 16], to: *mut i32) {
        // SAFETY: as above.
        unsafe { to.cast::<[i32; 16]>().write(sums) }
    }
    #[inline(always)]
    unsafe fn load_weights(from: *const [i8; QUAD]) -> [[i8; QUAD]; 16] {
        // SAFETY: the caller has 16 quads there.
        unsafe { from.cast::<[[i8; QUAD]; 16]>().read() }
    }
    #[inline(always)]
    unsafe fn splat_inputs(quad: [i8; QUAD]) -> [i8; QUAD] {
        quad
    }
    #[inline(always)]
    unsafe fn add_dots(mut sums: [i32; 16], inputs: [i8; QUAD], weights: [[i8; QUAD]; 16]) -> [i32; 16] {
        for (sum, weights) in sums.iter_mut().zip(weights) {
            for (x, w) in inputs.iter().zip(weights) {
                *sum = sum.wrapping_add(i32::from(*x) * i32::from(w));
            }
        }
        sums
    }
}

#[cfg(target_arch = "x86_64")]
mod wide {
    //! Several rows, with inputs and weights widened to 16 bits, for AVX2. A vector holds two partial sums of four outputs.

    use std::arch::x86_64::*;

    use super::{NR, QUAD, RowsRef};

    /// Rows in registers at once: 6 × 2 vectors of sums, 2 of weights and one of inputs fit 16 registers.
    const MR: usize = 6;
    /// Quads of a panel that stay in the nearest cache while the rows pass: 64 × 256 bytes.
    const KC: usize = 64;
    /// Outputs of two vectors.
    const LANES: usize = 8;

    /// Adds the products of `dots.len()` rows with a panel.
    #[inline(always)]
    pub(super) fn dot_body(x: RowsRef<'_, i8>, quads: &[[[i8; QUAD]; NR]], dots: &mut [[i32; NR]]) {
        assert!(quads.len() == x.width().div_ceil(QUAD));
        let mut wide = [[[0i16; QUAD]; KC]; MR];
        for (index, quads) in quads.chunks(KC).enumerate() {
            let start = index * KC * QUAD;
            let end = x.width().min(start + KC * QUAD);
            for (block, dots) in dots.chunks_mut(MR).enumerate() {
                for (r, wide) in wide.iter_mut().enumerate().take(dots.len()) {
                    let row = &x.row(block * MR + r)[start..end];
                    let wide = wide.as_flattened_mut();
                    for (wide, x) in wide.iter_mut().zip(row) {
                        *wide = i16::from(*x);
                    }
                    wide[row.len()..row.len().next_multiple_of(QUAD)].fill(0);
                }
                match dots {
                    [a] => register_tile::<1>(&wide, quads, [a]),
                    [a, b] => register_tile::<2>(&wide, quads, [a, b]),
                    [a, b, c] => register_tile::<3>(&wide, quads, [a, b, c]),
                    [a, b, c, d] => register_tile::<4>(&wide, quads, [a, b, c, d]),
                    [a, b, c, d, e] => register_tile::<5>(&wide, quads, [a, b, c, d, e]),
                    [a, b, c, d, e, f] => register_tile::<MR>(&wide, quads, [a, b, c, d, e, f]),
                    _ => {}
                }
            }
        }
    }

    /// `ROWS` rows by one panel over `quads.len()` quads, at most [`KC`].
    #[inline(always)]
    #[allow(clippy::needless_range_loop)] // indices, not iterators: no closure may come between vectors and registers
    fn register_tile<const ROWS: usize>(
        x: &[[[i16; QUAD]; KC]; MR],
        quads: &[[[i8; QUAD]; NR]],
        dots: [&mut [i32; NR]; ROWS],
    ) {
        for lane in (0..NR).step_by(LANES) {
            // SAFETY: the instructions are present, `lane + LANES <= NR`, and there are at most [`KC`] quads.
            unsafe {
                let mut acc = [[_mm256_setzero_si256(); 2]; ROWS];
                for (k, quad) in quads.iter().enumerate() {
                    let from = quad.as_ptr().add(lane).cast::<__m128i>();
                    let weights = [
                        _mm256_cvtepi8_epi16(_mm_loadu_si128(from)),
                        _mm256_cvtepi8_epi16(_mm_loadu_si128(from.add(1))),
                    ];
                    for r in 0..ROWS {
                        let inputs = _mm256_set1_epi64x(x[r].as_ptr().add(k).cast::<i64>().read_unaligned());
                        for v in 0..2 {
                            acc[r][v] = _mm256_add_epi32(acc[r][v], _mm256_madd_epi16(inputs, weights[v]));
                        }
                    }
                }
                for r in 0..ROWS {
                    // Neighbours are the parts of one output; the sum has the outputs' pairs in the order 0, 2, 1, 3.
                    let pairs = _mm256_hadd_epi32(acc[r][0], acc[r][1]);
                    let sums = _mm256_permute4x64_epi64::<0b11_01_10_00>(pairs);
                    let to = dots[r].as_mut_ptr().add(lane).cast();
                    _mm256_storeu_si256(to, _mm256_add_epi32(_mm256_loadu_si256(to), sums));
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    //! Every method needs the instructions in its type's name, which the dispatchers above check.
    #![allow(clippy::missing_safety_doc)]

    use std::arch::x86_64::*;

    use super::{Bytes, QUAD};

    pub struct Avx2;
    pub struct Vnni;

    impl Bytes for Avx2 {
        const LANES: usize = 8;
        type Sums = __m256i;
        type Weights = __m256i;
        /// The inputs and their magnitudes.
        type Inputs = (__m256i, __m256i);

        #[inline(always)]
        unsafe fn load_sums(from: *const i32) -> __m256i {
            // SAFETY: the caller has 8 sums there.
            unsafe { _mm256_loadu_si256(from.cast()) }
        }
        #[inline(always)]
        unsafe fn store_sums(sums: __m256i, to: *mut i32) {
            // SAFETY: as above.
            unsafe { _mm256_storeu_si256(to.cast(), sums) }
        }
        #[inline(always)]
        unsafe fn load_weights(from: *const [i8; QUAD]) -> __m256i {
            // SAFETY: the caller has 8 quads there.
            unsafe { _mm256_loadu_si256(from.cast()) }
        }
        #[inline(always)]
        unsafe fn splat_inputs(quad: [i8; QUAD]) -> (__m256i, __m256i) {
            // SAFETY: the instructions are present.
            unsafe {
                let inputs = _mm256_set1_epi32(i32::from_le_bytes(quad.map(|byte| byte as u8)));
                (inputs, _mm256_abs_epi8(inputs))
            }
        }
        #[inline(always)]
        unsafe fn add_dots(sums: __m256i, (inputs, magnitudes): (__m256i, __m256i), weights: __m256i) -> __m256i {
            // SAFETY: the instructions are present.
            unsafe {
                let pairs = _mm256_maddubs_epi16(magnitudes, _mm256_sign_epi8(weights, inputs));
                _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
            }
        }
    }

    impl Bytes for Vnni {
        const LANES: usize = 16;
        type Sums = __m512i;
        type Weights = __m512i;
        /// The inputs plus 128.
        type Inputs = __m512i;

        #[inline(always)]
        unsafe fn load_sums(from: *const i32) -> __m512i {
            // SAFETY: the caller has 16 sums there.
            unsafe { _mm512_loadu_si512(from.cast()) }
        }
        #[inline(always)]
        unsafe fn store_sums(sums: __m512i, to: *mut i32) {
            // SAFETY: as above.
            unsafe { _mm512_storeu_si512(to.cast(), sums) }
        }
        #[inline(always)]
        unsafe fn load_weights(from: *const [i8; QUAD]) -> __m512i {
            // SAFETY: the caller has 16 quads there.
            unsafe { _mm512_loadu_si512(from.cast()) }
        }
        #[inline(always)]
        unsafe fn splat_inputs(quad: [i8; QUAD]) -> __m512i {
            // SAFETY: the instructions are present.
            unsafe { _mm512_set1_epi32(i32::from_le_bytes(quad.map(|byte| byte as u8 ^ 0x80))) }
        }
        #[inline(always)]
        unsafe fn add_dots(sums: __m512i, inputs: __m512i, weights: __m512i) -> __m512i {
            // SAFETY: the instructions are present.
            unsafe { _mm512_dpbusd_epi32(sums, inputs, weights) }
        }
    }
}
