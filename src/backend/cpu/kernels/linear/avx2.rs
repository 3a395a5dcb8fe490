//! The tile of FP32 and BF16 weights for AVX2: FP32 inputs times weights that are widened in registers.
//!
//! **Cost.** 6 rows by 16 outputs: for each input two loads of weights (and, of BF16, a shift or a mask) and six of inputs
//! for 12 FMAs, two of which a core starts in a cycle: bound by them. One row takes a panel as it lies in memory, in eight
//! sums of eight outputs each, as many as hide an FMA's latency.
//!
//! Each lane sums one output's products in the inputs' order, as every tile of these weights does.
#![allow(clippy::missing_safety_doc)] // every function needs AVX2 and FMA, which the dispatchers in `float` see to

use std::arch::x86_64::*;

use half::bf16;

use super::RowsRef;
use super::float::NR;
use crate::backend::cpu::kernels::FloatElement;

/// Rows in registers at once: 6 × 2 vectors of sums, 2 of weights and one of inputs fit 16 registers.
const MR: usize = 6;
/// Inputs of a panel that stay in the nearest cache while the rows pass: 128 × 64 BF16 are 16 KiB, and 6 rows 3 KiB.
const KC: usize = 128;
/// Outputs of one vector.
const LANES: usize = 8;

/// An element type of weights.
pub(super) trait Widened: FloatElement {
    /// Inputs side by side in a panel.
    const GROUP: usize;

    /// The weights of 8 outputs, from `lane` on, for input `k + index` of a group that begins at `k`.
    unsafe fn load(panel: *const Self, k: usize, index: usize, lane: usize) -> __m256;
}

impl Widened for f32 {
    const GROUP: usize = 1;

    #[inline(always)]
    unsafe fn load(panel: *const f32, k: usize, _: usize, lane: usize) -> __m256 {
        // SAFETY: the caller has the whole panel there.
        unsafe { _mm256_loadu_ps(panel.add(k * NR + lane)) }
    }
}

impl Widened for bf16 {
    const GROUP: usize = 2;

    #[inline(always)]
    unsafe fn load(panel: *const bf16, k: usize, index: usize, lane: usize) -> __m256 {
        // SAFETY: as above: 8 pairs, whose first half is the lower.
        unsafe {
            let pairs = _mm256_loadu_si256(panel.add(k * NR + lane * 2).cast());
            _mm256_castsi256_ps(match index {
                0 => _mm256_slli_epi32::<16>(pairs),
                _ => _mm256_and_si256(pairs, _mm256_set1_epi32(0xffff_0000_u32 as i32)),
            })
        }
    }
}

/// Adds the products of `sums.len()` rows with a panel.
#[inline(always)]
pub(super) fn tile_body<T: Widened>(x: RowsRef<'_, T>, panel: &[T], sums: &mut [[f32; NR]]) {
    let inputs = x.width();
    assert!(panel.len() == inputs.next_multiple_of(T::GROUP) * NR);
    let mut wide = [[0f32; KC]; MR];
    for start in (0..inputs).step_by(KC) {
        let count = KC.min(inputs - start);
        let padded = count.next_multiple_of(T::GROUP);
        for (block, sums) in sums.chunks_mut(MR).enumerate() {
            for (r, wide) in wide.iter_mut().enumerate().take(sums.len()) {
                for (wide, x) in wide.iter_mut().zip(&x.row(block * MR + r)[start..start + count]) {
                    *wide = x.to_f32();
                }
                wide[count..padded].fill(0.0);
            }
            // SAFETY: `padded` inputs of each row are there, and as many of the panel, by the assertion above: `start` is a
            // multiple of the group.
            unsafe {
                let panel = panel.as_ptr().add(start * NR);
                let sums_at = sums.as_mut_ptr().cast::<f32>();
                match sums.len() {
                    1 => register_tile::<T, 8, 1>(&wide, panel, padded, sums_at),
                    2 => register_tile::<T, 4, 2>(&wide, panel, padded, sums_at),
                    3 => register_tile::<T, 2, 3>(&wide, panel, padded, sums_at),
                    4 => register_tile::<T, 2, 4>(&wide, panel, padded, sums_at),
                    5 => register_tile::<T, 2, 5>(&wide, panel, padded, sums_at),
                    _ => register_tile::<T, 2, MR>(&wide, panel, padded, sums_at),
                }
            }
        }
    }
}

/// `ROWS` rows by one panel over `inputs` inputs, a multiple of the group, `VECTORS` × 8 outputs at a time.
///
/// # Safety
/// `panel` has the whole panel of as many inputs, at most [`KC`], and `sums` `ROWS × NR` elements.
#[inline(always)]
#[allow(clippy::needless_range_loop)] // indices, not iterators: no closure may come between vectors and registers
unsafe fn register_tile<T: Widened, const VECTORS: usize, const ROWS: usize>(
    x: &[[f32; KC]; MR],
    panel: *const T,
    inputs: usize,
    sums: *mut f32,
) {
    let mut lane = 0;
    while lane < NR {
        // SAFETY: `lane + VECTORS * LANES <= NR`, and `inputs` is at most the rows' length.
        unsafe {
            let mut acc = [[_mm256_setzero_ps(); VECTORS]; ROWS];
            for m in 0..ROWS {
                for v in 0..VECTORS {
                    acc[m][v] = _mm256_loadu_ps(sums.add(m * NR + lane + v * LANES));
                }
            }
            let mut k = 0;
            while k < inputs {
                for index in 0..T::GROUP {
                    let mut weights = [_mm256_setzero_ps(); VECTORS];
                    for v in 0..VECTORS {
                        weights[v] = T::load(panel, k, index, lane + v * LANES);
                    }
                    for m in 0..ROWS {
                        let input = _mm256_broadcast_ss(&*x[m].as_ptr().add(k + index));
                        for v in 0..VECTORS {
                            acc[m][v] = _mm256_fmadd_ps(input, weights[v], acc[m][v]);
                        }
                    }
                }
                k += T::GROUP;
            }
            for m in 0..ROWS {
                for v in 0..VECTORS {
                    _mm256_storeu_ps(sums.add(m * NR + lane + v * LANES), acc[m][v]);
                }
            }
        }
        lane += VECTORS * LANES;
    }
}
